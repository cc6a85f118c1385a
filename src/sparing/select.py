"""Which layers of a model to sparsify: predicates, and the `select` argument of `sparsify_`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn

from sparing.errors import InputError, SparsityWarning, listed, nearest
from sparing.layers import Layer, Predicate, all_layers, default, find_layers

Select = Predicate | Sequence[str]

LARGE = 0.01
"""The share of all weights from which on a layer that the default selection leaves out is named."""


def of_type(*types: type[nn.Module]) -> Predicate:
    """Return a predicate that selects the modules of these classes, such as `nn.Embedding`.

    Examples:
        >>> of_type(nn.Embedding)("tokens", nn.Embedding(2, 2))
        True
    """
    return lambda name, module: isinstance(module, types)


def excluding(*patterns: str) -> Predicate:
    """Return the default selection without the modules whose name matches one of these shell patterns.

    Examples:
        >>> excluding("conv1", "head.*")("conv1", nn.Conv2d(3, 8, 3))
        False
    """
    return _Excluding(patterns)


@dataclass(frozen=True)
class _Excluding:
    patterns: tuple[str, ...] = ()

    def __call__(self, name: str, module: nn.Module) -> bool:
        return default(name, module) and not any(fnmatchcase(name, p) for p in self.patterns)


def heads(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a transformers model that are new in each task: those outside its base model, and poolers.

    They have few weights, start at random in a fine-tuning run, and have another scale than the pretrained weights.

    Args:
        model: any module; models of transformers in it are recognized by their `base_model_prefix`.
    """
    found: set[nn.Module] = set()
    for each in model.modules():
        if isinstance(getattr(each, "base_model_prefix", None), str) and isinstance(each.base_model, nn.Module):
            base = each.base_model
            found |= {*each.modules()} - {*base.modules()}
            found |= {m for name, child in base.named_children() if name == "pooler" for m in child.modules()}
    return found


def resolve(model: nn.Module, select: Select | None) -> dict[str, Layer]:
    """Return the layers that `select` chooses.

    Args:
        model: the model.
        select: a predicate `(module name, module) -> bool`, or a list of layer names or shell
            patterns, or None for `default` without the `heads` of transformers models.

    Raises:
        InputError: nothing is chosen; a name of the list matches no layer; two entries of the list
            choose the same layer; a weight is not initialized yet.
    """
    if isinstance(select, str):
        raise InputError(f"select={select!r} is a string; give a list of layer names, such as select=[{select!r}]")
    names = [] if select is None or callable(select) else list(select) if isinstance(select, Iterable) else [select]
    if isinstance(select, (type, nn.Module)) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"select={select!r} must be a predicate (name, module) -> bool or a list of layer names; for classes of "
            "modules, give sparing.select.of_type(nn.Linear)"
        )
    if select is None or callable(select):
        predicate = _Excluding() if select is None else select
        if isinstance(predicate, _Excluding):
            predicate = _without(heads(model), predicate)
        layers = find_layers(model, predicate)
        for name, module in model.named_modules():
            plain = [n for n in ("weight", "weight_ih_l0", "weight_hh_l0") if isinstance(vars(module).get(n), Tensor)]
            if plain and predicate(name, module):
                raise InputError(
                    f"{plain[0]!r} of module {name!r} is no parameter: something recomputes it, such as "
                    "torch.nn.utils.weight_norm or prune; remove that first, or leave the module out with select="
                )
    else:
        layers = _by_pattern(all_layers(model), names)
    if not layers:
        raise InputError(f"select chose no layer; {_inventory(model)}")
    for layer in layers.values():
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise InputError(f"layer {layer.name!r} is not initialized yet: run one batch through the model first")
    if select is None:
        _warn_left_out(all_layers(model), layers)
    return layers


def _without(modules: set[nn.Module], predicate: Predicate) -> Predicate:
    return lambda name, module: module not in modules and predicate(name, module)


def _warn_left_out(layers: Mapping[str, Layer], selected: Mapping[str, Layer]) -> None:
    """Warn of weights that users may expect the default selection to take: all large ones but embeddings."""
    total = sum(prod(layer.shape) for layer in layers.values())
    out = [
        layer
        for name, layer in layers.items()
        if name not in selected and prod(layer.shape) >= LARGE * total and "embed" not in layer.kind.lower()
    ]
    if out:
        names = (f"{layer.name!r} ({layer.kind}, {' × '.join(map(str, layer.shape))})" for layer in out)
        warnings.warn(
            f"{sum(prod(layer.shape) for layer in out):,} of {total:,} weights are not selected by default: "
            f"{listed(names, 4)}. They stay dense; choose layers by name with select=[...]",
            SparsityWarning,
            stacklevel=4,
        )


def _by_pattern(layers: dict[str, Layer], patterns: Sequence[str]) -> dict[str, Layer]:
    chosen: dict[str, str] = {}
    for pattern in patterns:
        matches = [n for n, layer in layers.items() if any(fnmatchcase(p.name, pattern) for p in layer.places)]
        if not matches:
            raise InputError(f"select: no layer is named {pattern!r}; {nearest(pattern, layers)}")
        for name in matches:
            if name in chosen:
                raise InputError(f"select: layer {name!r} is chosen twice, by {chosen[name]!r} and by {pattern!r}")
            chosen[name] = pattern
    return {name: layer for name, layer in layers.items() if name in chosen}


def _inventory(model: nn.Module) -> str:
    weights = [f"{layer.name} ({layer.kind})" for layer in all_layers(model).values()]
    if weights:
        return f"the model's weights are {listed(weights, 12)}"
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    return f"the model has no weight matrix or kernel; its modules are {', '.join(kinds)}"
