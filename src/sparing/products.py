"""Follow the weights of a model through a forward pass, and count the products with them.

A product counts if one of its factors is made of weights alone: a weight, a part or a rearrangement of it, or what the
model computes from it. A weight that is added to an activation, such as an embedding of positions, is an activation
from then on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from sparing.errors import InputError
from sparing.layers import Layer

aten = torch.ops.aten


@dataclass
class Applications:
    """How often one forward pass multiplies by the weights of each layer.

    Attributes:
        counts: by layer: one number for all of its weights, or a number for each, of the shape of the weight, where
            they differ.
        changed: by layer: the operation that makes another weight of it before the multiplication, in which zeros need
            not be zero.
        unknown: by layer: the operation that uses it in a way that is not known here.
    """

    counts: dict[str, int | Tensor]
    changed: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def dense_macs(self, layer: Layer) -> int | None:
        """Return the MACs of a layer if no weight were zero; None where they are not known."""
        if layer.name in self.unknown:
            return None
        count = self.counts[layer.name]
        return int(count.sum()) if isinstance(count, Tensor) else count * math.prod(layer.shape)

    @torch.no_grad()
    def sparse_macs(self, layer: Layer) -> int | None:
        """Return the MACs of the nonzero weights of a layer; None where they are not known."""
        if layer.name in self.unknown or layer.name in self.changed:
            return self.dense_macs(layer)
        count = self.counts[layer.name]
        if isinstance(count, Tensor):
            return int((count * (layer.effective_weight != 0).cpu()).sum())
        return count * layer.nonzero()

    def per_weight(self, name: str) -> int:
        """Return how often the pass multiplies by each weight of a layer.

        Raises:
            InputError: it is not known, or differs between its weights.
        """
        count = self.counts[name]
        if isinstance(count, Tensor):
            raise InputError(
                f"the weights of layer {name!r} are multiplied {int(count.min())} to {int(count.max())} times in a "
                "forward pass, so they have no common cost in MACs: leave the layer out, or give a sparsity"
            )
        for note in self.notes([name]):
            raise InputError(f"{note}. Leave it out, or give a sparsity")
        return count

    def notes(self, names: Iterable[str] | None = None) -> list[str]:
        """Return a sentence for each operation that makes the MACs of some layers others than those of its weights.

        Args:
            names: of the layers to speak of; None is all.
        """
        names = list(self.counts if names is None else names)
        texts = {
            "the model multiplies by what {by!r} makes of the weight of {layers}, in which zeros need not be zero; the "
            "MACs are those of a dense layer": self.changed,
            "the MACs of {layers} are not known, because {by!r} uses the weight, and are in no sum": self.unknown,
        }
        return [
            text.format(by=operation, layers=_listed([name for name in names if found.get(name) == operation]))
            for text, found in texts.items()
            for operation in sorted({found[name] for name in names if name in found})
        ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"


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


DATA, CONSTANT = Origin(data=True), Origin()

_PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.convolution, aten._trilinear,
    aten._scaled_mm, aten.mul,
}  # fmt: skip
_RECURRENT = {aten.mkldnn_rnn_layer, aten._cudnn_rnn, aten.miopen_rnn}  # a whole layer in one operation
_ADDED = {aten.addmm, aten.baddbmm, aten.addmv}  # the first argument is added
_COPIES = {aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh}
_MOVES = {aten._unsafe_view, aten.cat, aten.stack, aten.repeat, aten.flip, aten.unsafe_split}
# They read or add weights, and multiply nothing by them.
_FREE = {
    aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only, aten.index, aten.index_select, aten.gather,
    aten.native_layer_norm, aten.native_group_norm, aten.native_batch_norm, aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
}  # fmt: skip
_CHOICES = {aten.index, aten.index_select, aten.gather, aten.embedding}
_KNOWN = _PRODUCTS | _RECURRENT | _COPIES | _MOVES | _FREE


class ProductCounter(TorchDispatchMode):
    """While it is active, torch's operations are seen, and their products with weights are counted.

    Args:
        layers: the layers of the model, by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self._shapes = {name: layer.shape for name, layer in layers.items()}
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._first = dict(zip(layers, accumulate(sizes, initial=0), strict=False))  # the position of its first weight
        self._origins: MutableMapping[Tensor, Origin] = WeakTensorKeyDictionary()
        self._counts = dict.fromkeys(layers, 0)
        self._parts: list[tuple[Origin, int]] = []
        self._changed: dict[str, str] = {}
        self._unknown: dict[str, str] = {}
        self._told: dict[str, int] = {}

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

    def tell(self, name: str, number: int) -> None:
        """Add applications of a layer, whatever is seen: of a module that says itself how often it uses its parts."""
        self._told[name] = self._told.get(name, 0) + number

    def applications(self) -> Applications:
        """Return what was counted."""
        counts: dict[str, int | Tensor] = dict(self._counts)
        for name in {name for origin, _ in self._parts for name in origin.layers}:
            shape = self._shapes[name]
            each = torch.full((math.prod(shape),), self._counts[name], dtype=torch.int64, device="cpu")
            for origin, number in self._parts:
                if name in origin.layers and origin.places is not None:
                    index = origin.places().flatten() - self._first[name]
                    index = index[(index >= 0) & (index < len(each))]
                    each.index_add_(0, index, torch.full_like(index, number))
            counts[name] = int(each[0]) if bool((each == each[0]).all()) else each.reshape(shape)
        changed, unknown = (
            {name: by for name, by in found.items() if name not in self._told}
            for found in (self._changed, self._unknown)
        )
        return Applications({**counts, **self._told}, changed, unknown)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _KNOWN:
            with self:  # a composite operation, in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        origins = [self._origins.get(tensor, CONSTANT) for tensor in given]
        if all(origin is CONSTANT for origin in origins):
            return result
        operation, data = func.overloadpacket, any(origin.data for origin in origins)
        weights = {tensor: origin for tensor, origin in zip(given, origins, strict=True) if origin.layers}
        layers = frozenset().union(*(origin.layers for origin in weights.values()))
        if operation in _PRODUCTS and (data or operation is not aten.mul):
            self._count_product(operation, args, result, weights)
            self.mark(result, self._of_data(func, origins) if data else Origin(layers=layers))
        elif operation is aten._grouped_mm:
            self._count_groups(*args, **kwargs)
            self.mark(result)
        elif operation in _RECURRENT:
            for name in layers:
                self._counts[name] += math.prod(args[0].shape[:-1])
            self.mark(result)
        elif data:
            if not _is_free(func):
                used = [origin.layers for origin in weights.values() if origin.places is not None]
                self._unknown |= dict.fromkeys(frozenset().union(*used), operation.__name__)
            self.mark(result, self._of_data(func, origins))
        elif layers:
            self._follow(func, args, kwargs, result, weights)
        return result

    def _count_product(self, operation: Any, args: Any, result: Tensor, weights: dict[Tensor, Origin]) -> None:
        factors = [part for part in args[1:] if isinstance(part, Tensor)] if operation in _ADDED else args[:2]
        for index, part in enumerate(factors):
            derived = self._origins.get(part, CONSTANT) if isinstance(part, Tensor) else CONSTANT
            # A kernel that depends on the inputs, as in StyleGAN 2, is no activation, but a product of one often is.
            if derived.chosen or (operation is aten.convolution and index == 1):
                self._unknown |= dict.fromkeys(derived.derived, operation.__name__)
        made_of_weights = [part for part in factors if part in weights and part.numel()]
        if not made_of_weights:
            return
        factor = made_of_weights[-1]
        origin = weights[factor]
        if origin.places is None:
            # What was computed from weights alone may be an activation, such as that of a learned query: then it is
            # the first factor, or attention multiplies it by bmm.
            # A spectrum of a kernel is complex: the product is a convolution by Fourier transforms.
            activation = factor is not factors[1] or operation in (aten.bmm, aten.baddbmm, aten.mul)
            if not activation or factor.is_complex():
                self._unknown |= dict.fromkeys(origin.layers, operation.__name__)
            return
        if operation in flop_registry:
            macs = flop_registry[operation](*args, out_val=result) // 2
        elif operation is aten._trilinear:
            macs = factor.numel() * len(args[0])
        else:  # of vectors, or elementwise
            macs = max(part.numel() for part in (*factors, result) if isinstance(part, Tensor))
        number = macs // factor.numel()
        if origin.whole is not None:
            self._counts[origin.whole] += number
        else:
            self._parts.append((origin, number))
        if origin.changed is not None:
            self._changed |= dict.fromkeys(origin.layers, origin.changed)

    def _of_data(self, func: Any, origins: Iterable[Origin]) -> Origin:
        """Return the origin of what an operation makes of activations and weights."""
        operation, origins = func.overloadpacket, list(origins)
        used = frozenset().union(*(each.layers for each in origins if each.places is not None))
        # Of experts; an embedding has two dimensions.
        if operation in _CHOICES and any(len(self._shapes[name]) > 2 for name in used):
            return Origin(data=True, derived=used, chosen=True)
        if used and operation in (aten.mul, aten.mm, aten.bmm):
            return Origin(data=True, derived=used)
        if func.is_view or operation in _MOVES | _COPIES | {aten.mul, aten.sum}:
            derived = frozenset().union(*(each.derived for each in origins))
            return Origin(data=True, derived=derived, chosen=any(each.chosen for each in origins))
        return DATA

    def _count_groups(self, rows: Tensor, experts: Tensor, offs: Tensor | None = None, **others: Any) -> None:
        """Count the products of a mixture of experts: how many rows an expert gets follows from their values."""
        origin = self._origins.get(experts, CONSTANT)
        if origin.places is None or offs is None or experts.dim() != 3:
            self._unknown |= dict.fromkeys(origin.layers, "_grouped_mm")
            return
        for index, number in enumerate(offs.diff(prepend=offs.new_zeros(1)).tolist()):
            self._parts.append((replace(origin, places=partial(_one_of, origin.places, index)), number))

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, weights: dict[Tensor, Origin]) -> None:
        """Mark what an operation makes of weights alone."""
        operation = func.overloadpacket
        origin = Origin(
            layers=frozenset().union(*(each.layers for each in weights.values())),
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
            elif func.is_view or operation in _MOVES:
                whole = source.whole if len(known) == 1 and first.numel() == made.numel() else None
                self.mark(made, replace(origin, places=partial(_moved, func, args, kwargs, known, index), whole=whole))
            elif first.numel() == made.numel():
                changed = origin.changed or (None if _keeps_zeros(func, args, kwargs, known) else operation.__name__)
                self.mark(made, replace(origin, places=source.places, whole=source.whole, changed=changed))
            elif operation in _CHOICES and made.dim() > 2:  # as a table of relative positions
                self.mark(made, replace(origin, derived=origin.layers, chosen=True))
            else:
                self.mark(made, origin)


def _one_of(places: Callable[[], Tensor], index: int) -> Tensor:
    return places()[index]


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
        operation in _COPIES
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


def _is_free(func: Any) -> bool:
    operation = func.overloadpacket
    attention = operation in flop_registry
    return torch.Tag.pointwise in func.tags or func.is_view or operation in _MOVES | _FREE or attention
