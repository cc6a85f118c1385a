"""FastGRNN, a gated recurrent network whose gate and candidate state share their weight matrices.

    a  = W xₜ + U hₜ₋₁
    z  = gate(a + b_z)          c = update(a + b_h)
    hₜ = z ⊙ hₜ₋₁ + (σ(ζ) (1 − z) + σ(ν)) ⊙ c

W (H, D) and U (H, H) are dense, have a fixed low rank, or have a learned rank (`LowRankLinear`).

Reference: Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent
Neural Network", NeurIPS 2018. The initialization is that of EdgeML (edgeml_pytorch/graph/rnn.py).
Deviations from EdgeML: the batch is the first dimension of the inputs; ζ and ν have shape (1,).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError, check_sizes
from sparing.operators import is_transformed
from sparing.rnn.gates import Gate, find_gate
from sparing.rnn.low_rank import LowRankLinear, linear_from

MIN_SAVED_MACS = 2**15
"""MACs per time step that two low-rank products must save to be faster than one dense product, measured on a CPU.

The saved MACs are those of the smaller products, plus, per time step, those of computing U from its factors once
per sequence. The threshold is the overhead of the second product."""


class FastGRNNCell(nn.Module):
    """Compute one time step of FastGRNN.

        a  = W xₜ + U hₜ₋₁
        z  = gate(a + b_z)          c = update(a + b_h)
        hₜ = z ⊙ hₜ₋₁ + (σ(ζ) (1 − z) + σ(ν)) ⊙ c

    The cell has D · H + H² + 2H + 2 parameters with dense matrices. A matrix of rank r has r (D + H) parameters
    instead of D · H, or 2 r H instead of H².

    Args:
        input_size: number of input features D.
        hidden_size: size of the hidden state H.
        input_rank: rank of W, at most min(D, H). None uses a dense matrix.
        hidden_rank: rank of U, at most H. None uses a dense matrix.
        learned_rank: learn both ranks; `input_rank` and `hidden_rank` are the maximum ranks. To learn them, call
            `sparsify_(model, STR(init=-10.0), select=is_diagonal)`.
        gate: activation of the gate z, one of `GATES`.
        update: activation of the candidate state c, one of `GATES`.

    Raises:
        InputError: a size is less than 1, a rank is out of range, or an activation is unknown.

    Examples:
        >>> cell = FastGRNNCell(32, 100)
        >>> sum(p.numel() for p in cell.parameters())
        13402
        >>> cell(torch.randn(4, 32)).shape
        torch.Size([4, 100])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        input_rank: int | None = None,
        hidden_rank: int | None = None,
        learned_rank: bool = False,
        gate: str = "sigmoid",
        update: str = "tanh",
    ) -> None:
        super().__init__()
        check_sizes("FastGRNN", input_size=input_size, hidden_size=hidden_size)
        self.gate, self.update = find_gate("gate", gate), find_gate("update", update)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.input = _matrix("input_rank", hidden_size, input_size, input_rank, learned_rank)
        self.hidden = _matrix("hidden_rank", hidden_size, hidden_size, hidden_rank, learned_rank)
        self.bias_gate = nn.Parameter(torch.ones(hidden_size))
        self.bias_update = nn.Parameter(torch.ones(hidden_size))
        self.zeta = nn.Parameter(torch.tensor([1.0]))
        self.nu = nn.Parameter(torch.tensor([-4.0]))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Compute the next state.

        Args:
            x: input, (N, D).
            h: state, (N, H). None is zero.

        Returns:
            The next state, (N, H).
        """
        if h is None:
            h = x.new_zeros(len(x), self.hidden_size)
        a = self.input(x) + self.hidden(h)
        z, c = self.gate.function(a + self.bias_gate), self.update.function(a + self.bias_update)
        return z * h + (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * c

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class FastGRNN(nn.Module):
    """Apply FastGRNN to sequences.

    The inputs of all time steps are multiplied by W in one product. U is computed once per sequence, also if it has
    a low rank or is sparsified. The backward pass is written by hand and computes the gradient of U in one product
    over all time steps.

    Args:
        input_size: number of input features D.
        hidden_size: size of the hidden state H.
        **cell: other arguments of `FastGRNNCell`.

    Raises:
        InputError: an argument is invalid, see `FastGRNNCell`.

    Examples:
        >>> rnn = FastGRNN(9, 80, input_rank=9, hidden_rank=8)
        >>> outputs, last = rnn(torch.randn(2, 128, 9))
        >>> outputs.shape, last.shape
        (torch.Size([2, 128, 80]), torch.Size([2, 80]))
    """

    def __init__(self, input_size: int, hidden_size: int, **cell: Any) -> None:
        super().__init__()
        self.cell = FastGRNNCell(input_size, hidden_size, **cell)

    def forward(self, x: Tensor, lengths: Tensor | None = None, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the states at all time steps, and the last state.

        Args:
            x: inputs, (N, T, D).
            lengths: number of time steps of each sequence without padding, integers, (N,). None is T for all.
            h: initial state, (N, H). None is zero.

        Returns:
            The states, (N, T, H), which are undefined in the padding; and the state of each sequence after its
            last time step, (N, H).

        Raises:
            InputError: x or h has the wrong shape, T is 0, or a length is not in [1, T].
        """
        cell = self.cell
        if x.dim() != 3 or x.shape[2] != cell.input_size or x.shape[1] == 0:
            raise InputError(
                f"FastGRNN: x must have shape (batch, steps >= 1, {cell.input_size}), got {tuple(x.shape)}"
            )
        if h is not None and h.shape != (x.shape[0], cell.hidden_size):
            raise InputError(f"FastGRNN: h must have shape ({x.shape[0]}, {cell.hidden_size}), got {tuple(h.shape)}")
        if lengths is not None:
            _check_lengths(lengths, x)
        projected = cell.input(x.transpose(0, 1))
        h = projected.new_zeros(x.shape[0], cell.hidden_size) if h is None else h
        zeta, nu = torch.sigmoid(cell.zeta), torch.sigmoid(cell.nu)
        # The loop computes a + b_z, and adds b_h − b_z for the argument of `update`: one addition less per step.
        arguments = (
            projected + cell.bias_gate,
            h,
            cell.bias_update - cell.bias_gate,
            zeta,
            zeta + nu,
            *self._hidden_factors(h.shape[0], x.shape[1]),
        )
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
            or is_transformed()
        ):
            # torch.compile, autocast, forward mode and the transforms of torch.func handle the operations of the loop,
            # but not the hand-written backward pass.
            outputs = _run_steps(cell.gate, cell.update, *arguments)[0]
        else:
            outputs = _FastGRNNFunction.apply(cell.gate, cell.update, *arguments)
        if lengths is None:
            return outputs.transpose(0, 1), outputs[-1]
        last = outputs[lengths.long() - 1, torch.arange(len(lengths), device=x.device)]
        return outputs.transpose(0, 1), last

    def applications_of_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Mapping[nn.Module, int]:
        """Return the applications of the weights of U, whose module is not called, for MAC counting."""
        hidden, steps = self.cell.hidden, x.shape[0] * x.shape[1]
        modules = hidden.children() if isinstance(hidden, LowRankLinear) else [hidden]
        return dict.fromkeys(modules, steps)

    def _hidden_factors(self, batch: int, steps: int) -> tuple[Tensor, ...]:
        """Return U as one dense matrix, or as its two low-rank factors where two products per step are faster."""
        hidden = self.cell.hidden
        if not isinstance(hidden, LowRankLinear):
            return (hidden.weight,)
        right, left = hidden.factors
        units, rank = left.shape
        saved = units * units - 2 * rank * units
        if torch.compiler.is_compiling():  # A decision by batch size would specialize the graph to some batch sizes.
            low_rank = saved > 0
        else:
            low_rank = batch * saved + units * units * rank // steps > MIN_SAVED_MACS
        return (right, left) if low_rank else (left @ right,)


def _matrix(argument: str, outputs: int, inputs: int, rank: int | None, learned: bool) -> nn.Linear | LowRankLinear:
    if rank is None and not learned:
        return linear_from(0.1 * torch.randn(outputs, inputs))
    try:
        return LowRankLinear(inputs, outputs, rank, bias=False, learned_rank=learned)
    except InputError as error:
        raise InputError(f"FastGRNN: {argument}: {error}") from error


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise InputError(f"FastGRNN: lengths must be a tensor of shape ({len(x)},), got {type(lengths).__name__}")
    if lengths.shape != x.shape[:1] or lengths.dtype == torch.bool or lengths.is_floating_point():
        found = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise InputError(f"FastGRNN: lengths must be integers of shape ({len(x)},), got {found}")
    if torch.compiler.is_compiling() or lengths.is_meta or not len(lengths):
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > x.shape[1]:
        wrong = shortest if shortest < 1 else longest
        raise InputError(f"FastGRNN: lengths must be from 1 to {x.shape[1]} (the number of steps), got {wrong}")


def _run_steps(
    gate: Gate,
    update: Gate,
    projected: Tensor,
    h: Tensor,
    offset: Tensor,
    zeta: Tensor,
    zeta_nu: Tensor,
    *factors: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run all time steps: hₜ = z ⊙ hₜ₋₁ + (zeta_nu − zeta · z) ⊙ c.

    Args:
        gate: activation of z.
        update: activation of c.
        projected: W xₜ + b_z for all time steps, (T, N, H).
        h: initial state, (N, H).
        offset: b_h − b_z, (H,).
        zeta: σ(ζ), (1,).
        zeta_nu: σ(ζ) + σ(ν), (1,).
        *factors: U, or its factors in the order in which h is multiplied by them.

    Returns:
        All states, (T, N, H), and one z and one c per time step, (N, H) each.
    """
    *first, second = (matrix.t() for matrix in factors)
    negative = -zeta
    states, zs, cs = [], [], []
    for step in projected.unbind(0):
        a = torch.addmm(step, h @ first[0] if first else h, second)
        z, c = gate.function(a), update.function(a + offset)
        h = torch.addcmul(z * h, torch.addcmul(zeta_nu, z, negative), c)
        states.append(h)
        zs.append(z)
        cs.append(c)
    return torch.stack(states), zs, cs


class _FastGRNNFunction(torch.autograd.Function):
    """`_run_steps` with a hand-written backward pass, which computes each sum over time with one operation."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, update: Gate, *arguments: Tensor) -> Tensor:
        states, zs, cs = _run_steps(gate, update, *arguments)
        ctx.gates = gate, update
        ctx.save_for_backward(states, torch.stack(zs), torch.stack(cs), *arguments)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, update = ctx.gates
        states, z, c, *arguments = ctx.saved_tensors
        if torch.is_grad_enabled():  # Second derivatives: let autograd differentiate the loop.
            recomputed = _run_steps(gate, update, *arguments)[0]
            inputs = [a for a in arguments if a.requires_grad]
            grads = iter(torch.autograd.grad(recomputed, inputs, grad, create_graph=True))
            return None, None, *(next(grads) if a.requires_grad else None for a in arguments)
        _, h, _, zeta, zeta_nu, *factors = arguments
        before = torch.cat([h[None], states[:-1]])
        # The factors that do not depend on the gradient of the next step are computed for all steps at once:
        #   dc = (zeta_nu − zeta z) dh      dz = (h − zeta c) dh      da = dz z' + dc c'
        blend = torch.addcmul(zeta_nu, z, -zeta)
        to_update = blend * update.derivative(c)
        to_a = torch.addcmul(to_update, torch.addcmul(before, c, -zeta), gate.derivative(z))
        d_h, d_a = torch.zeros_like(h), torch.empty_like(z)
        d_states = torch.empty_like(z)
        for t in reversed(range(len(z))):
            d_state = torch.add(grad[t], d_h, out=d_states[t])
            step = torch.mul(d_state, to_a[t], out=d_a[t])
            for matrix in reversed(factors):
                step = step @ matrix
            d_h = torch.addcmul(step, d_state, z[t])
        d_update = d_states * to_update
        d_blend = d_states * c
        flat_a, flat_before = d_a.flatten(0, 1), before.flatten(0, 1)
        if len(factors) == 1:
            d_factors = [flat_a.t() @ flat_before]
        else:
            right, left = factors
            d_factors = [(flat_a @ left).t() @ flat_before, flat_a.t() @ (flat_before @ right.t())]
        d_zeta = -(d_blend * z).sum().reshape(1)
        return None, None, d_a, d_h, d_update.sum((0, 1)), d_zeta, d_blend.sum().reshape(1), *d_factors
