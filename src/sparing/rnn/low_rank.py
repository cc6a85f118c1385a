"""Weights of low rank, and of a rank that is learned.

    W = W₁ · W₂ᵀ                        fixed rank: W₁ (out, r), W₂ᵀ (r, in)
    W = W₁ · diag(S(m, s)) · W₂ᵀ        learned rank: r is the number of nonzero S(m, s)

m stands in a module of its own, a `Diagonal`, so it is a layer like any other: `sparsify_` with STR
gives it the learned threshold of the paper, and every other method can prune it as well. A zero of
m takes a column of W₁ and a row of W₂ᵀ with it; `compact_` removes them.

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML
2020, the section on low rank in recurrent networks.
Deviations: the paper's code for this was not released. Here W₁, m and W₂ start as the singular value
decomposition of the dense weight, so training starts from the function of the full-rank network.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import Layer, find_layers
from sparing.register import check_weight, register
from sparing.select import Select, resolve
from sparing.sparsify import densify_


class Diagonal(nn.Module):
    """x ↦ x ⊙ m, with m of shape (1, features): the singular values of a weight, to be sparsified.

    Args:
        values: m, of shape (features,).

    Examples:
        >>> Diagonal(torch.tensor([2.0, 0.0]))(torch.ones(1, 2)).detach()
        tensor([[2., 0.]])
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.detach().reshape(1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def uses_of_parts(self, x: Tensor) -> Mapping[nn.Module, int]:
        """Each value multiplies once a row; for `count_uses`."""
        return {self: x.shape[:-1].numel()}

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}"


def is_diagonal(name: str, module: nn.Module) -> bool:
    """A predicate for `select=`: the diagonals of a model, and nothing else.

    Examples:
        >>> model = LowRankLinear(8, 4, learned_rank=True)
        >>> list(sparsify_(model, STR(init=-10.0), select=is_diagonal).layers)
        ['diagonal']
    """
    return isinstance(module, Diagonal)


class LowRankLinear(nn.Module):
    """y = W₁ (m ⊙ (W₂ᵀ x)) + b: a Linear in two thin products; m only where the rank is learned.

    r (in + out) weights and multiply-accumulates in place of in · out, and r more while m is there.

    Args:
        in_features: size of x, (..., in_features).
        out_features: size of y, (..., out_features).
        rank: r, or with `learned_rank` the largest it can be; None is min(in, out). At rank 0 the bias
            is all there is.
        bias: whether to add b.
        learned_rank: have m, for `sparsify_(model, ..., select=is_diagonal)`.

    W₁ and W₂ start as 0.1 · N(0, 1), as in EdgeML. With `learned_rank` it is W that starts so, as the
    dense matrix of EdgeML does, taken apart into its singular vectors and values.

    Raises:
        InputError: the rank is not a whole number from 0 to min(in, out).

    Examples:
        >>> layer = LowRankLinear(32, 100, rank=9, bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        1188
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        learned_rank: bool = False,
    ) -> None:
        super().__init__()
        full = min(in_features, out_features)
        rank = full if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= full:
            raise InputError(
                f"rank={rank!r} of a weight of {out_features} × {in_features}: choose a whole number from 0 to {full}"
            )
        self.in_features, self.out_features = in_features, out_features
        diagonal: Diagonal | None = None
        if learned_rank:
            left, values, right = singular_parts(0.1 * torch.randn(out_features, in_features), rank)
            diagonal = Diagonal(values)
        else:
            left, right = 0.1 * torch.randn(out_features, rank), 0.1 * torch.randn(rank, in_features)
        bound = 1 / math.sqrt(in_features)
        self.right = linear(right)
        self.diagonal = diagonal
        self.left = linear(left, torch.empty(out_features).uniform_(-bound, bound) if bias else None)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """W₂ᵀ (r, in) and W₁ · diag(m) (out, r), in the order in which they are multiplied by."""
        left: Tensor = self.left.weight
        return self.right.weight, left if self.diagonal is None else left * self.diagonal.weight

    @property
    def weight(self) -> Tensor:
        """W, of shape (out_features, in_features), multiplied out."""
        right, left = self.factors
        return left @ right

    @property
    def bias(self) -> Tensor | None:
        """b, of shape (out_features,), or None."""
        return self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(x)
        if self.diagonal is not None:
            x = self.diagonal(x)
        return self.left(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Factored(nn.Module):
    """A parametrization W = W₁ · diag(m) · W₂ᵀ of any weight matrix, started from its singular values.

    W₁ and W₂ᵀ are `original0` and `original1` of the parametrized weight; m is here. It costs out · r · in
    multiply-accumulates a call, and the layer then runs on the whole matrix.

    Args:
        values: m, of shape (r,), or None for W₁ · W₂ᵀ.

    Examples:
        >>> Factored(torch.tensor([2.0]))(torch.ones(2, 1), torch.ones(1, 2)).detach()
        tensor([[2., 2.],
                [2., 2.]])
    """

    def __init__(self, values: Tensor | None) -> None:
        super().__init__()
        self.diagonal = None if values is None else Diagonal(values)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left if self.diagonal is None else left * self.diagonal.weight) @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W₁ and W₂ᵀ of a weight, whose singular values m takes on."""
        if self.diagonal is None:
            raise InputError("a compacted weight has a fixed rank, and cannot be assigned to")
        left, values, right = singular_parts(weight, self.diagonal.weight.shape[1])
        with torch.no_grad():
            self.diagonal.weight.copy_(values)
        return left, right


def factorize_(model: nn.Module, select: Select | None = None) -> nn.Module:
    """Write weight matrices of a model as W₁ · diag(m) · W₂ᵀ, in place, for their ranks to be learned.

    Outputs stay what they were, but for rounding. `sparsify_(model, STR(init=-10.0), select=is_diagonal)`
    then learns which of m to keep, and `compact_` removes the rest.

    Args:
        model: any module, `nn.LSTM` and `nn.GRU` among them.
        select: which weights, as for `sparsify_`; None takes every Linear and recurrent weight.

    Returns:
        The same model.

    Raises:
        InputError: nothing is selected; a weight is no matrix, is not finite, or carries a
            parametrization already.

    Examples:
        >>> model = factorize_(nn.Sequential(nn.LSTM(8, 16)))
        >>> list(sparsify_(model, STR(init=-10.0), select=is_diagonal).layers)[1]
        '0.parametrizations.weight_hh_l0.0.diagonal'
    """
    thin = {part for module in model.modules() if isinstance(module, LowRankLinear) for part in module.children()}

    def whole(name: str, module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)) and module not in thin

    layers = resolve(model, whole if select is None else select)
    for layer in layers.values():
        check_weight(layer)
        if layer.weight.dim() != 2:
            raise InputError(
                f"layer {layer.name!r} has a weight of shape {tuple(layer.weight.shape)}; only a matrix has a rank"
            )
    for layer in layers.values():
        weight = layer.weight
        made_by = Factored(weight.new_zeros(min(weight.shape)))
        made_by.requires_grad_(weight.requires_grad)
        register(layer, made_by)
    return model


@torch.no_grad()
def compact_(model: nn.Module) -> nn.Module:
    """Remove what a learned rank has left dead, in place; outputs stay equal but for rounding.

    A learned `LowRankLinear` loses m, and keeps a column and a row for each nonzero value of it. A
    factored `Linear` becomes such a layer. Where r (in + out) weights are no fewer than in · out, a
    plain `Linear` takes its place. Factored weights of `nn.LSTM`, `nn.GRU` and their kin keep the
    columns of their rank: the file shrinks, the run does not, since torch's kernels take whole matrices.

    What else is sparsified becomes plain, as by `densify_`.

    Returns:
        The same model, or what takes its place if it is itself a single Linear.

    Examples:
        >>> model = nn.Sequential(LowRankLinear(8, 8, learned_rank=True))
        >>> _ = model[0].diagonal.weight.data[:, 3:].zero_()
        >>> sum(p.numel() for p in compact_(model).parameters())
        56
    """
    densify_(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in factored_layers(model):
        if len({place.module for place in layer.places}) == 1 and isinstance(layer.module, nn.Linear):
            replacements[layer.module] = _smallest(*_alive(*parts(layer)), layer.module.bias)
        else:
            _shrink(layer)
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.diagonal is not None:
            thin = _alive(module.left.weight, module.right.weight, module.diagonal)
            replacements[module] = _smallest(*thin, module.bias)
    for module, replacement in replacements.items():
        replacement.train(module.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def factored_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model whose weight is `Factored`.

    Examples:
        >>> [layer.name for layer in factored_layers(factorize_(nn.Sequential(nn.Linear(4, 2))))]
        ['0']
    """
    layers = find_layers(model, lambda name, module: True).values()
    made_by = {layer.name: layer.places[0].parametrizations for layer in layers}
    return [layer for layer in layers if made_by[layer.name] and isinstance(made_by[layer.name][0], Factored)]  # type: ignore[index]


def parts(layer: Layer) -> tuple[Tensor, Tensor, Diagonal | None]:
    """W₁, W₂ᵀ and the diagonal of a layer whose weight is `Factored`."""
    made_by = layer.places[0].parametrizations
    assert made_by is not None
    return made_by.original0, made_by.original1, made_by[0].diagonal  # type: ignore[return-value]


def singular_parts(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix up to a rank: left (out, r), values (r,), right (r, in).

    Examples:
        >>> left, values, right = singular_parts(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), rank=1)
        >>> values
        tensor([3.])
    """
    # Not defined for half precision.
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    parts = [part.to(weight.dtype).contiguous() for part in (left[:, :rank], values[:rank], right[:rank])]
    return parts[0], parts[1], parts[2]


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A Linear with this weight (out, in) and bias (out,).

    Examples:
        >>> linear(torch.ones(3, 2))
        Linear(in_features=2, out_features=3, bias=False)
    """
    # Made at size one and filled: nn.Linear would draw random numbers, and warn of a weight without elements.
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _alive(left: Tensor, right: Tensor, diagonal: Diagonal | None) -> tuple[Tensor, Tensor]:
    """W₁ · diag(m) and W₂ᵀ without their dead columns and rows."""
    if diagonal is None:
        return left, right
    keep = diagonal.weight[0] != 0
    return (left * diagonal.weight)[:, keep], right[keep]


def _shrink(layer: Layer) -> None:
    left, right = _alive(*parts(layer))
    made_by = layer.places[0].parametrizations  # one list for all places
    assert made_by is not None
    made_by[0].diagonal = None  # type: ignore[assignment]
    made_by.original0, made_by.original1 = nn.Parameter(left.clone()), nn.Parameter(right.clone())


def _smallest(left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Module:
    """The product as a layer, in two thin matrices or in one, whichever has fewer weights."""
    if left.numel() + right.numel() >= len(left) * right.shape[1]:
        return linear(left @ right, bias)
    layer = LowRankLinear(right.shape[1], len(left), rank=0, bias=False)
    layer.right, layer.left = linear(right), linear(left, bias)
    return layer
