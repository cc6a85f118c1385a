"""Weight matrices of fixed low rank or learned rank.

    W = W₁ · W₂ᵀ                        fixed rank r: W₁ (out, r), W₂ᵀ (r, in)
    W = W₁ · diag(S(m, s)) · W₂ᵀ        learned rank r: the number of nonzero S(m, s)

S is the soft threshold with the learned parameter s. m is the weight of a separate module, a `Diagonal`, so it is
sparsified like any other layer: `sparsify_` with STR learns its threshold as in the paper, and every other method
can prune it too. For each zero of m, `compact_` removes a column of W₁ and a row of W₂ᵀ.

Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, the
section on low rank in recurrent networks. The code for this section was not released.
Deviation: W₁, m and W₂ are initialized with the singular value decomposition of the dense weight, so that the
network computes the same function as the full-rank network at the start of training.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import Layer, all_layers
from sparing.register import check_weight, register
from sparing.select import Select, resolve
from sparing.sparsify import densify_


class Diagonal(nn.Module):
    """Multiply the input elementwise by a weight m: y = x ⊙ m.

    m contains the singular values of a factorized weight matrix. Sparsifying m reduces the rank of the matrix.

    Args:
        values: initial value of m, (features,). The parameter has shape (1, features).

    Examples:
        >>> Diagonal(torch.tensor([2.0, 0.0]))(torch.ones(1, 2)).detach()
        tensor([[2., 0.]])
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.detach().reshape(1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def applications_of_parts(self, x: Tensor) -> Mapping[nn.Module, int]:
        """Return the applications of m, one per row of the input, for MAC counting."""
        return {self: x.shape[:-1].numel()}

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}"


def is_diagonal(name: str, module: nn.Module) -> bool:
    """Select the diagonals of a model. A predicate for the argument `select` of `sparsify_`.

    Examples:
        >>> model = LowRankLinear(8, 4, learned_rank=True)
        >>> list(sparsify_(model, STR(init=-10.0), select=is_diagonal).layers)
        ['diagonal']
    """
    return isinstance(module, Diagonal)


class LowRankLinear(nn.Module):
    """Apply a linear map of low rank, with a weight in two factors.

        y = W₁ (W₂ᵀ x) + b                  fixed rank
        y = W₁ (m ⊙ (W₂ᵀ x)) + b            learned rank

    A layer of rank r has r (in + out) weights and MACs per row of the input, instead of in · out. m adds r.

    W₁ and W₂ are initialized with N(0, 0.1²), as in EdgeML. With `learned_rank`, a dense W is initialized with
    N(0, 0.1²), and W₁, m and W₂ with its singular value decomposition.

    Args:
        in_features: size of x, (..., in_features).
        out_features: size of y, (..., out_features).
        rank: rank r, or maximum rank with `learned_rank`. None is min(in, out). With rank 0, y = b.
        bias: add b.
        learned_rank: add m, which `sparsify_(model, ..., select=is_diagonal)` sparsifies.

    Raises:
        InputError: the rank is not an integer from 0 to min(in, out).

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
                f"rank must be an integer from 0 to {full} for a weight of {out_features} × {in_features}, got {rank!r}"
            )
        self.in_features, self.out_features = in_features, out_features
        diagonal: Diagonal | None = None
        if learned_rank:
            left, values, right = truncated_svd(0.1 * torch.randn(out_features, in_features), rank)
            diagonal = Diagonal(values)
        else:
            left, right = 0.1 * torch.randn(out_features, rank), 0.1 * torch.randn(rank, in_features)
        bound = 1 / math.sqrt(in_features)
        self.right = linear_from(right)
        self.diagonal = diagonal
        self.left = linear_from(left, torch.empty(out_features).uniform_(-bound, bound) if bias else None)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """W₂ᵀ (r, in) and W₁ · diag(m) (out, r), in the order in which x is multiplied by them."""
        left: Tensor = self.left.weight
        return self.right.weight, left if self.diagonal is None else left * self.diagonal.weight

    @property
    def weight(self) -> Tensor:
        """The dense product W, (out_features, in_features)."""
        right, left = self.factors
        return left @ right

    @property
    def bias(self) -> Tensor | None:
        """The bias b, (out_features,), or None."""
        return self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(x)
        if self.diagonal is not None:
            x = self.diagonal(x)
        return self.left(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Factored(nn.Module):
    """Parametrization W = W₁ · diag(m) · W₂ᵀ of a weight matrix, initialized with its singular value decomposition.

    W₁ and W₂ᵀ are `original0` and `original1` of the parametrized weight. This module contains m. Each forward pass
    computes W, with out · r · in MACs, and the layer uses the dense W.

    Args:
        values: initial value of m, (r,). None for W₁ · W₂ᵀ.

    Examples:
        >>> Factored(torch.tensor([2.0]))(torch.ones(2, 1), torch.ones(1, 2)).detach()
        tensor([[2., 2.],
                [2., 2.]])
    """

    stands_alone = True  # zeros in the product of the factors would save nothing

    def __init__(self, values: Tensor | None) -> None:
        super().__init__()
        self.diagonal = None if values is None else Diagonal(values)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left if self.diagonal is None else left * self.diagonal.weight) @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return W₁ and W₂ᵀ of a weight, and set m to its singular values.

        Raises:
            InputError: the weight was compacted.
        """
        if self.diagonal is None:
            raise InputError("a compacted weight has a fixed rank and cannot be assigned; assign it before compact_()")
        left, values, right = truncated_svd(weight, self.diagonal.weight.shape[1])
        with torch.no_grad():
            self.diagonal.weight.copy_(values)
        return left, right


def factorize_(model: nn.Module, select: Select | None = None) -> nn.Module:
    """Factorize weight matrices of a model as W₁ · diag(m) · W₂ᵀ, in place, to learn their ranks.

    The outputs of the model do not change, except for rounding. Then
    `sparsify_(model, STR(init=-10.0), select=is_diagonal)` learns which values of m to keep, and `compact_` removes
    the others.

    Args:
        model: any module, including `nn.LSTM` and `nn.GRU`.
        select: weights to factorize, as in `sparsify_`. None selects the weights of every Linear and recurrent layer.

    Returns:
        The same model.

    Raises:
        InputError: no layer is selected; a weight is not a matrix, is not finite, or has a parametrization already.

    Examples:
        >>> model = factorize_(nn.Sequential(nn.LSTM(8, 16)))
        >>> list(sparsify_(model, STR(init=-10.0), select=is_diagonal).layers)[1]
        '0.parametrizations.weight_hh_l0.0.diagonal'
    """
    factors = {child for module in model.modules() if isinstance(module, LowRankLinear) for child in module.children()}

    def is_dense(name: str, module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)) and module not in factors

    layers = resolve(model, is_dense if select is None else select)
    for layer in layers.values():
        check_weight(layer)
        if layer.places[0].parametrizations is not None:
            kind = type(layer.places[0].parametrizations[0]).__name__
            raise InputError(f"layer {layer.name!r} carries the parametrization {kind} already")
        if layer.weight.dim() != 2:
            raise InputError(
                f"layer {layer.name!r}: only a matrix can be factorized, got a weight of shape "
                f"{tuple(layer.weight.shape)}"
            )
    for layer in layers.values():
        weight = layer.weight
        parametrization = Factored(weight.new_zeros(min(weight.shape)))
        parametrization.requires_grad_(weight.requires_grad)
        register(layer, parametrization)
    return model


@torch.no_grad()
def compact_(model: nn.Module) -> nn.Module:
    """Remove the columns and rows of zero diagonal values, in place.

    The outputs of the model do not change, except for rounding. The result depends on the layer, where r is the
    number of nonzero diagonal values:

    - A `LowRankLinear` with a diagonal, or a factorized `nn.Linear`, becomes a `LowRankLinear` of rank r without a
      diagonal, or an `nn.Linear` if r (in + out) ≥ in · out.
    - A factorized weight of `nn.LSTM`, `nn.GRU`, `nn.RNN` or their cells keeps factors of rank r. The checkpoint is
      smaller, but the layer is not faster, because torch's kernels need the dense matrix.

    All other sparsified weights are made dense, as by `densify_`.

    Args:
        model: model with learned ranks.

    Returns:
        The same model, or the layer that replaces it if the model is a single Linear or LowRankLinear.

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
            replacements[layer.module] = _smaller_form(*_nonzero_factors(*factors_of(layer)), layer.module.bias)
        else:
            _compact_parametrization(layer)
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.diagonal is not None:
            factors = _nonzero_factors(module.left.weight, module.right.weight, module.diagonal)
            replacements[module] = _smaller_form(*factors, module.bias)
    for module, replacement in replacements.items():
        replacement.train(module.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def factored_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a model whose weight has the parametrization `Factored`.

    Examples:
        >>> [layer.name for layer in factored_layers(factorize_(nn.Sequential(nn.Linear(4, 2))))]
        ['0']
    """
    layers = all_layers(model).values()
    found = {layer.name: layer.places[0].parametrizations for layer in layers}
    return [layer for layer in layers if found[layer.name] and isinstance(found[layer.name][0], Factored)]  # type: ignore[index]


def factors_of(layer: Layer) -> tuple[Tensor, Tensor, Diagonal | None]:
    """Return W₁, W₂ᵀ and the diagonal of a layer whose weight has the parametrization `Factored`."""
    parametrizations = layer.places[0].parametrizations
    assert parametrizations is not None
    return parametrizations.original0, parametrizations.original1, parametrizations[0].diagonal  # type: ignore[return-value]


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a matrix, truncated to a rank.

    Args:
        weight: matrix, (out, in).
        rank: number r of singular values, the largest ones.

    Returns:
        Left singular vectors (out, r), singular values (r,) and right singular vectors (r, in).

    Examples:
        >>> left, values, right = truncated_svd(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), rank=1)
        >>> values
        tensor([3.])
    """
    # torch.linalg.svd does not support half precision.
    full = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    factors = [factor.to(weight.dtype).contiguous() for factor in (left[:, :rank], values[:rank], right[:rank])]
    return factors[0], factors[1], factors[2]


def linear_from(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Build a Linear with the given weight (out, in) and bias (out,).

    Examples:
        >>> linear_from(torch.ones(3, 2))
        Linear(in_features=2, out_features=3, bias=False)
    """
    # A 1×1 layer on the meta device avoids random numbers, and the warning of nn.Linear about an empty weight.
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _nonzero_factors(left: Tensor, right: Tensor, diagonal: Diagonal | None) -> tuple[Tensor, Tensor]:
    """Return W₁ · diag(m) and W₂ᵀ without the columns and rows of zero values of m."""
    if diagonal is None:
        return left, right
    keep = diagonal.weight[0] != 0
    return (left * diagonal.weight)[:, keep], right[keep]


def _compact_parametrization(layer: Layer) -> None:
    left, right = _nonzero_factors(*factors_of(layer))
    parametrizations = layer.places[0].parametrizations  # shared by all places of the layer
    assert parametrizations is not None
    parametrizations[0].diagonal = None  # type: ignore[assignment]
    parametrizations.original0, parametrizations.original1 = nn.Parameter(left.clone()), nn.Parameter(right.clone())


def _smaller_form(left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a LowRankLinear of the two factors, or a Linear of their product if it has no more weights."""
    if left.numel() + right.numel() >= len(left) * right.shape[1]:
        return linear_from(left @ right, bias)
    layer = LowRankLinear(right.shape[1], len(left), rank=0, bias=False)
    layer.right, layer.left = linear_from(right), linear_from(left, bias)
    return layer
