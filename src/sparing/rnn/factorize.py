"""Replace the weight matrices of a model by factors, to learn their ranks, and remove what has become zero."""

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import Layer, all_layers
from sparing.register import check_weight, register
from sparing.rnn.low_rank import Diagonal, LowRankLinear, linear_from, truncated_svd
from sparing.select import Select, resolve
from sparing.sparsify import densify_


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
        >>> list(sparsify_(model, STR(init=-10.0), select=sparing.rnn.is_diagonal).layers)[1]
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

    All other sparsified weights are made dense, as by `densify_`. Frozen weights stay frozen.

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
        weights = [parameter for parameter in module.parameters() if parameter is not module.bias]
        replacement.requires_grad_(any(weight.requires_grad for weight in weights))
        if module.bias is not None:
            replacement.bias.requires_grad_(module.bias.requires_grad)  # type: ignore[arg-type, operator, union-attr]
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
    for name, factor in (("original0", left), ("original1", right)):
        setattr(parametrizations, name, nn.Parameter(factor.clone(), getattr(parametrizations, name).requires_grad))


def _smaller_form(left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a LowRankLinear of the two factors, or a Linear of their product if it has no more weights."""
    if left.numel() + right.numel() >= len(left) * right.shape[1]:
        return linear_from(left @ right, bias)
    layer = LowRankLinear(right.shape[1], len(left), rank=0, bias=False)
    layer.right, layer.left = linear_from(right), linear_from(left, bias)
    return layer
