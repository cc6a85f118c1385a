"""FastGRNN: a gated recurrent network with one pair of matrices for gate and update alike.

    a  = W xₜ + U hₜ₋₁
    z  = gate(a + b_z)          c = update(a + b_h)
    hₜ = z ⊙ hₜ₋₁ + (σ(ζ) (1 − z) + σ(ν)) ⊙ c

W (H, D) and U (H, H) are whole, of a fixed low rank, or of a rank that is learned (`LowRankLinear`).

Source: Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent
Neural Network", NeurIPS 2018; initial values as in EdgeML (edgeml_pytorch/graph/rnn.py).
Deviations: inputs have the batch first; ζ and ν have shape (1,).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.rnn.gates import Gate, find_gate
from sparing.rnn.low_rank import LowRankLinear, linear

THIN_SAVES = 2**15
"""Multiply-accumulates a step from which two thin products beat one whole one, on a CPU: what the second call costs.
Saved are those of a smaller product, and a step's share of multiplying U out, which is done once a sequence."""


class FastGRNNCell(nn.Module):
    """One step of FastGRNN.

    D · H + H² + 2H + 2 parameters; r (D + H) and r · 2H in place of the matrices where they are of rank r.

    Args:
        input_size: D.
        hidden_size: H.
        input_rank: rank of W, up to min(D, H); None is a whole matrix.
        hidden_rank: rank of U, up to H; None is a whole matrix.
        learned_rank: both ranks are learned, with those above as the most they can be: follow with
            `sparsify_(model, STR(init=-10.0), select=is_diagonal)`.
        gate: the nonlinearity of z, one of `GATES`.
        update: the nonlinearity of c.

    Raises:
        InputError: a size is below 1, a rank is more than full, a gate is unknown.

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
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"FastGRNN: {name} must be a whole number of at least 1, got {size!r}")
        self.gate, self.update = find_gate("gate", gate), find_gate("update", update)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.input = _matrix("input_rank", hidden_size, input_size, input_rank, learned_rank)
        self.hidden = _matrix("hidden_rank", hidden_size, hidden_size, hidden_rank, learned_rank)
        self.bias_gate = nn.Parameter(torch.ones(hidden_size))
        self.bias_update = nn.Parameter(torch.ones(hidden_size))
        self.zeta = nn.Parameter(torch.tensor([1.0]))
        self.nu = nn.Parameter(torch.tensor([-4.0]))

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """The next state.

        Args:
            x: (N, D).
            h: (N, H); None is zero.

        Returns:
            (N, H).
        """
        if h is None:
            h = x.new_zeros(len(x), self.hidden_size)
        a = self.input(x) + self.hidden(h)
        z, c = self.gate.function(a + self.bias_gate), self.update.function(a + self.bias_update)
        return z * h + (torch.sigmoid(self.zeta) * (1 - z) + torch.sigmoid(self.nu)) * c  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class FastGRNN(nn.Module):
    """FastGRNN over sequences.

    The inputs of all steps are multiplied by W in one product, and U is made once a sequence, whatever
    makes it (a low rank, a threshold, a mask). The backward pass is written out by hand, and gathers the
    gradient of U in one product as well.

    Args:
        input_size: D.
        hidden_size: H.
        **cell: the other arguments of `FastGRNNCell`.

    Raises:
        InputError: as `FastGRNNCell`.

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
        """States at every step, and the last one.

        Args:
            x: (N, T, D).
            lengths: (N,), how many steps of each sequence count; the rest is padding. None is T.
            h: the state before the first step, (N, H); None is zero.

        Returns:
            The states, (N, T, H), of which those in the padding mean nothing; and for each sequence
            the state after its last step, (N, H).

        Raises:
            InputError: x or h has another shape, there are no steps, or a length is not in [1, T].
        """
        cell = self.cell
        if x.dim() != 3 or x.shape[2] != cell.input_size or x.shape[1] == 0:
            raise InputError(
                f"FastGRNN takes inputs of shape (batch, steps ≥ 1, {cell.input_size}), not {tuple(x.shape)}"
            )
        if h is not None and h.shape != (x.shape[0], cell.hidden_size):
            raise InputError(
                f"FastGRNN takes a state of shape ({x.shape[0]}, {cell.hidden_size}), not {tuple(h.shape)}"
            )
        if lengths is not None:
            _check_lengths(lengths, x)
        projected = cell.input(x.transpose(0, 1))
        h = projected.new_zeros(x.shape[0], cell.hidden_size) if h is None else h
        steepness, floor = torch.sigmoid(cell.zeta), torch.sigmoid(cell.nu)
        # Both biases go in once: a + b_z is what the loop computes, and a + b_h is an offset from it.
        arguments = (
            projected + cell.bias_gate,
            h,
            cell.bias_update - cell.bias_gate,
            steepness,
            steepness + floor,
            *self._recurrent(h.shape[0], x.shape[1]),
        )
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            # Compilers and autocast know what to do with every step of the loop, and nothing of a backward by hand.
            outputs = _states(cell.gate, cell.update, *arguments)[0]
        else:
            outputs = _Sequence.apply(cell.gate, cell.update, *arguments)
        if lengths is None:
            return outputs.transpose(0, 1), outputs[-1]
        last = outputs[lengths.long() - 1, torch.arange(len(lengths), device=x.device)]
        return outputs.transpose(0, 1), last

    def uses_of_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Mapping[nn.Module, int]:
        """U multiplies once a step, without its module being called; for `count_uses`."""
        hidden, steps = self.cell.hidden, x.shape[0] * x.shape[1]
        parts = hidden.children() if isinstance(hidden, LowRankLinear) else [hidden]
        return dict.fromkeys(parts, steps)

    def _recurrent(self, batch: int, steps: int) -> tuple[Tensor, ...]:
        """U in one piece, or in two thin ones if they save more than a second product a step costs."""
        hidden = self.cell.hidden
        if not isinstance(hidden, LowRankLinear):
            return (hidden.weight,)
        right, left = hidden.factors
        units, rank = left.shape
        saved = units * units - 2 * rank * units
        if torch.compiler.is_compiling():  # a choice by the batch would bind the graph to some batches
            thin = saved > 0
        else:
            thin = batch * saved + units * units * rank // steps > THIN_SAVES
        return (right, left) if thin else (left @ right,)


def _matrix(argument: str, outputs: int, inputs: int, rank: int | None, learned: bool) -> nn.Linear | LowRankLinear:
    if rank is None and not learned:
        return linear(0.1 * torch.randn(outputs, inputs))
    try:
        return LowRankLinear(inputs, outputs, rank, bias=False, learned_rank=learned)
    except InputError as error:
        raise InputError(f"FastGRNN: {argument}: {error}") from error


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise InputError(f"lengths must be a tensor of shape ({len(x)},), not {type(lengths).__name__}")
    if lengths.shape != x.shape[:1] or lengths.dtype == torch.bool or lengths.is_floating_point():
        found = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise InputError(f"lengths must be whole numbers of shape ({len(x)},), not {found}")
    if torch.compiler.is_compiling() or lengths.is_meta or not len(lengths):
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > x.shape[1]:
        wrong = shortest if shortest < 1 else longest
        raise InputError(
            f"a sequence of length {wrong} in a batch of {x.shape[1]} steps; choose from 1 to {x.shape[1]}"
        )


def _states(
    gate: Gate,
    update: Gate,
    projected: Tensor,
    h: Tensor,
    offset: Tensor,
    steepness: Tensor,
    ceiling: Tensor,
    *recurrent: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All states (T, N, H), and z and c at every step: z ⊙ h + (ceiling − steepness · z) ⊙ c."""
    *first, second = (matrix.t() for matrix in recurrent)
    negative = -steepness
    states, zs, cs = [], [], []
    for step in projected.unbind(0):
        a = torch.addmm(step, h @ first[0] if first else h, second)
        z, c = gate.function(a), update.function(a + offset)
        h = torch.addcmul(z * h, torch.addcmul(ceiling, z, negative), c)
        states.append(h)
        zs.append(z)
        cs.append(c)
    return torch.stack(states), zs, cs


class _Sequence(torch.autograd.Function):
    """The loop with a backward pass that runs once through time and leaves every sum over time to one product."""

    @staticmethod
    def forward(ctx: Any, gate: Gate, update: Gate, *arguments: Tensor) -> Tensor:
        states, zs, cs = _states(gate, update, *arguments)
        ctx.gates = gate, update
        ctx.save_for_backward(states, torch.stack(zs), torch.stack(cs), *arguments)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, update = ctx.gates
        states, z, c, *arguments = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: leave it to autograd
            again = _states(gate, update, *arguments)[0]
            wanted = [a for a in arguments if a.requires_grad]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return None, None, *(next(found) if a.requires_grad else None for a in arguments)
        _, h, _, steepness, ceiling, *recurrent = arguments
        before = torch.cat([h[None], states[:-1]])
        # What does not wait for the step after is computed for all steps at once:
        #   dc = (ceiling − steepness z) dh      dz = (h − steepness c) dh      da = dz z' + dc c'
        blend = torch.addcmul(ceiling, z, -steepness)
        to_update = blend * update.slope(c)
        to_a = torch.addcmul(to_update, torch.addcmul(before, c, -steepness), gate.slope(z))
        along, d_a = torch.zeros_like(h), torch.empty_like(z)
        d_states = torch.empty_like(z)
        for t in reversed(range(len(z))):
            d_state = torch.add(grad[t], along, out=d_states[t])
            step = torch.mul(d_state, to_a[t], out=d_a[t])
            for matrix in reversed(recurrent):
                step = step @ matrix
            along = torch.addcmul(step, d_state, z[t])
        d_update = d_states * to_update
        d_blend = d_states * c
        flat_a, flat_before = d_a.flatten(0, 1), before.flatten(0, 1)
        if len(recurrent) == 1:
            d_recurrent = [flat_a.t() @ flat_before]
        else:
            right, left = recurrent
            d_recurrent = [(flat_a @ left).t() @ flat_before, flat_a.t() @ (flat_before @ right.t())]
        d_steepness = -(d_blend * z).sum().reshape(1)
        return None, None, d_a, along, d_update.sum((0, 1)), d_steepness, d_blend.sum().reshape(1), *d_recurrent
