"""Follow the weights of a model through the operations of a forward pass.

Each tensor has an `Origin`: whether it depends on the inputs, and which weights it is made of. A view or a
rearrangement of weights holds weights, and where they are is found by doing the same with their positions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from sparing.layers import Layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """What a tensor was made from.

    Attributes:
        data: it depends on the inputs of the model.
        layers: the layers it was made from.
        places: a function that computes, for each element, its position among the weights of all layers, −1 for none;
            None if the elements are no weights.
        whole: the layer all of whose weights it holds, each once.
        changed: the operation that may have made a zero nonzero.
        derived: the layers of weights that it was made from together with the inputs, or by an index.
        chosen: it was made by an index, so that it is no activation, whatever it is multiplied by.
    """

    data: bool = False
    layers: frozenset[str] = frozenset()
    places: Callable[[], Tensor] | None = None
    whole: str | None = None
    changed: str | None = None
    derived: frozenset[str] = frozenset()
    chosen: bool = False

    def part(self, index: int) -> "Origin":
        """Return the origin of one entry of the first dimension."""
        places = self.places
        return self if places is None else replace(self, places=lambda: places()[index], whole=None)


DATA, CONSTANT = Origin(data=True), Origin()

COPIES = {aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh}
MOVES = {aten._unsafe_view, aten.cat, aten.stack, aten.repeat, aten.flip, aten.unsafe_split}
CHOICES = {aten.index, aten.index_select, aten.gather, aten.embedding}


def layers_of(origins: Iterable[Origin]) -> frozenset[str]:
    """Return the layers that some origins have together."""
    return frozenset().union(*(origin.layers for origin in origins))


class Origins:
    """The origins of the tensors of a forward pass; a tensor that was not marked is a constant.

    Args:
        layers: the layers of the model, by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._shapes = {name: layer.shape for name, layer in layers.items()}
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._first = dict(zip(layers, accumulate(sizes, initial=0), strict=False))  # the position of its first weight
        self._origins: MutableMapping[Tensor, Origin] = WeakTensorKeyDictionary()

    def __getitem__(self, tensor: Tensor) -> Origin:
        return self._origins.get(tensor, CONSTANT)

    def mark(self, tensors: Any, origin: Origin = DATA, depth: int = 4) -> None:
        """Say what the tensors in a structure were made from; objects in it are searched down to a depth."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self._origins[leaf] = origin
            elif depth > 0 and hasattr(leaf, "__dict__") and not isinstance(leaf, torch.nn.Module):
                self.mark(vars(leaf), origin, depth - 1)

    def mark_weight(self, tensor: Tensor, name: str) -> None:
        """Say that a tensor is the effective weight of a layer."""
        first, shape = self._first[name], self._shapes[name]

        def places() -> Tensor:
            return torch.arange(first, first + math.prod(shape), device="cpu").reshape(shape)

        held = [tensor]
        if is_traceable_wrapper_subclass(tensor):  # a quantized weight, such as torchao's, and the codes in it
            held += [each for key in tensor.__tensor_flatten__()[0] if (each := getattr(tensor, key)).shape == shape]
        self.mark(held, Origin(layers=frozenset({name}), places=places, whole=name))

    def applications(self, name: str, whole: int, parts: Iterable[tuple[Origin, int]]) -> int | Tensor:
        """Add up the applications of the weights of a layer.

        Args:
            name: of the layer.
            whole: applications of all of its weights.
            parts: applications of the weights that the tensors of some origins hold.

        Returns:
            One number if it is that of all weights; otherwise a number for each, of the shape of the weight.
        """
        shape = self._shapes[name]
        each = torch.full((math.prod(shape),), whole, dtype=torch.int64, device="cpu")
        for origin, number in parts:
            if name in origin.layers and origin.places is not None:
                index = origin.places().flatten() - self._first[name]
                index = index[(index >= 0) & (index < len(each))]
                each.index_add_(0, index, torch.full_like(index, number))
        return int(each[0]) if bool((each == each[0]).all()) else each.reshape(shape)

    def of_data(self, func: Any, origins: Iterable[Origin]) -> Origin:
        """Return the origin of what an operation makes of activations and weights."""
        operation, origins = func.overloadpacket, list(origins)
        used = layers_of(each for each in origins if each.places is not None)
        # Of experts; an embedding has two dimensions.
        if operation in CHOICES and any(len(self._shapes[name]) > 2 for name in used):
            return Origin(data=True, derived=used, chosen=True)
        if used and operation in (aten.mul, aten.mm, aten.bmm):
            return Origin(data=True, derived=used)
        if func.is_view or operation in MOVES | COPIES | {aten.mul, aten.sum}:
            derived = frozenset().union(*(each.derived for each in origins))
            return Origin(data=True, derived=derived, chosen=any(each.chosen for each in origins))
        return DATA

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Mark what an operation makes of weights alone."""
        operation = func.overloadpacket
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        weights = {tensor: origin for tensor in given if (origin := self[tensor]).layers}
        origin = Origin(
            layers=layers_of(weights.values()),
            changed=next((each.changed for each in weights.values() if each.changed), None),
            derived=frozenset().union(*(each.derived for each in weights.values())),
            chosen=any(each.chosen for each in weights.values()),
        )
        known = {tensor: each for tensor, each in weights.items() if each.places is not None}
        first, source = next(iter(known.items()), (None, CONSTANT))
        for index, made in enumerate(tree_leaves(result)):
            if not isinstance(made, Tensor):
                continue
            if first is None:
                self.mark(made, origin)
            elif func.is_view or operation in MOVES:
                whole = source.whole if len(known) == 1 and first.numel() == made.numel() else None
                self.mark(made, replace(origin, places=partial(_moved, func, args, kwargs, known, index), whole=whole))
            elif first.numel() == made.numel():
                changed = origin.changed or (None if _keeps_zeros(func, args, kwargs, known) else operation.__name__)
                self.mark(made, replace(origin, places=source.places, whole=source.whole, changed=changed))
            elif operation in CHOICES and made.dim() > 2:  # as a table of relative positions
                self.mark(made, replace(origin, derived=origin.layers, chosen=True))
            else:
                self.mark(made, origin)


def _moved(func: Any, args: Any, kwargs: Any, known: Mapping[Tensor, Origin], index: int) -> Tensor:
    """Return the places of what a view or a rearrangement made, by doing the same with the places."""

    def places(tensor: Tensor) -> Tensor:
        origin = known.get(tensor)
        if origin is None or origin.places is None:
            return torch.full(tensor.shape, -1, device="cpu")
        return origin.places().contiguous()  # a view of a copy needs a copy

    args, kwargs = tree_map_only(Tensor, places, (args, kwargs))
    return tree_leaves(func(*args, **kwargs))[index]  # type: ignore[no-any-return]


def _keeps_zeros(func: Any, args: Any, kwargs: Any, known: Mapping[Tensor, Origin]) -> bool:
    """Return whether an elementwise operation makes zeros of zeros."""
    operation = func.overloadpacket
    if (
        operation in COPIES
        or operation in (aten.mul, aten.div)
        or "fake_q" in operation.__name__
        or "_fq_" in operation.__name__
    ):
        return True
    given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    if torch.Tag.pointwise not in func.tags or any(part not in known for part in given):
        return False
    args, kwargs = tree_map_only(Tensor, lambda part: torch.zeros(1, dtype=part.dtype, device="cpu"), (args, kwargs))
    return not bool(func(*args, **kwargs).any())
