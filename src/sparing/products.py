"""Count the products with weights in a forward pass.

A product counts if one of its factors is made of weights alone: a weight, a part or a rearrangement of it, or what the
model computes from it. A weight that is added to an activation, such as an embedding of positions, is an activation
from then on.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from sparing.errors import InputError, listed
from sparing.layers import Layer
from sparing.origins import CONSTANT, COPIES, MOVES, Origin, Origins, layers_of

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
            text.format(by=operation, layers=listed((repr(name) for name in names if found.get(name) == operation), 3))
            for text, found in texts.items()
            for operation in sorted({found[name] for name in names if name in found})
        ]


_PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.convolution, aten._trilinear,
    aten._scaled_mm, aten.mul,
}  # fmt: skip
_RECURRENT = {aten.mkldnn_rnn_layer, aten._cudnn_rnn, aten.miopen_rnn}  # a whole layer in one operation
_ADDED = {aten.addmm, aten.baddbmm, aten.addmv}  # the first argument is added
# They read or add weights, and multiply nothing by them.
_FREE = {
    aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only, aten.index, aten.index_select, aten.gather,
    aten.native_layer_norm, aten.native_group_norm, aten.native_batch_norm, aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
}  # fmt: skip
_KNOWN = _PRODUCTS | _RECURRENT | COPIES | MOVES | _FREE


class ProductCounter(TorchDispatchMode):
    """While it is active, torch's operations are seen, and their products with weights are counted.

    Args:
        layers: the layers of the model, by name.

    Attributes:
        origins: what the tensors of the pass were made from. The inputs and the weights must be marked.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.origins = Origins(layers)
        self._counts = dict.fromkeys(layers, 0)
        self._parts: list[tuple[Origin, int]] = []
        self._changed: dict[str, str] = {}
        self._unknown: dict[str, str] = {}
        self._told: dict[str, int] = {}

    def tell(self, name: str, number: int) -> None:
        """Add applications of a layer, whatever is seen: of a module that says itself how often it uses its parts."""
        self._told[name] = self._told.get(name, 0) + number

    def applications(self) -> Applications:
        """Return what was counted."""
        counts: dict[str, int | Tensor] = dict(self._counts)
        for name in layers_of(origin for origin, _ in self._parts):
            counts[name] = self.origins.applications(name, self._counts[name], self._parts)
        changed, unknown = (
            {name: by for name, by in found.items() if name not in self._told}
            for found in (self._changed, self._unknown)
        )
        return Applications({**counts, **self._told}, changed, unknown)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._run_functions(func, args, kwargs)
        if func.overloadpacket not in _KNOWN:
            with self:  # a composite operation, in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._see(func, args, kwargs, result)
        return result

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count the products of an operation with weights, and follow the weights to its result."""
        origins = [self.origins[part] for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        if all(origin is CONSTANT for origin in origins):
            return
        operation, data = func.overloadpacket, any(origin.data for origin in origins)
        product = operation in _PRODUCTS and (data or operation is not aten.mul)
        if product:
            self._count_product(operation, args, result)
        elif operation is aten._grouped_mm:
            self._count_groups(*args, **kwargs)
        elif operation in _RECURRENT:
            for name in layers_of(origins):
                self._counts[name] += math.prod(args[0].shape[:-1])
        elif data and not _is_free(func):
            used = layers_of(origin for origin in origins if origin.places is not None)
            self._unknown |= dict.fromkeys(used, operation.__name__)
        if data:
            self.origins.mark(result, self.origins.of_data(func, origins))
        elif product:
            self.origins.mark(result, Origin(layers=layers_of(origins)))
        elif layers_of(origins):
            self.origins.follow(func, args, kwargs, result)

    def _run_functions(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that calls functions, such as flex_attention or cond, and see what these do."""
        if args and isinstance(args[0], OpOverload):  # out_dtype(aten.mm.default, torch.int32, x, y)
            result = func(*args, **kwargs)
            self._see(args[0], args[2:], kwargs, result)
            return result

        def seen(leaf: Any) -> Any:
            def call(*inputs: Any) -> Any:
                with self:
                    return leaf(*inputs)

            return call if callable(leaf) else leaf

        used = layers_of(self.origins[part] for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
        self._unknown |= dict.fromkeys(used, func.__name__)
        args, kwargs = tree_map(seen, (args, kwargs))
        result = func(*args, **kwargs)
        self.origins.mark(result)
        return result

    def _count_product(self, operation: Any, args: Any, result: Tensor) -> None:
        factors = [part for part in args[1:] if isinstance(part, Tensor)] if operation in _ADDED else args[:2]
        for index, part in enumerate(factors):
            derived = self.origins[part] if isinstance(part, Tensor) else CONSTANT
            # A kernel that depends on the inputs, as in StyleGAN 2, is no activation, but a product of one often is.
            if derived.chosen or (operation is aten.convolution and index == 1):
                self._unknown |= dict.fromkeys(derived.derived, operation.__name__)
        tensors = [part for part in factors if isinstance(part, Tensor) and part.numel()]
        factor = next((part for part in reversed(tensors) if self.origins[part].layers), None)
        if factor is None:
            return
        origin = self.origins[factor]
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

    def _count_groups(self, rows: Tensor, experts: Tensor, offs: Tensor | None = None, **others: Any) -> None:
        """Count the products of a mixture of experts: how many rows an expert gets follows from their values."""
        origin = self.origins[experts]
        if origin.places is None or offs is None or experts.dim() != 3:
            self._unknown |= dict.fromkeys(origin.layers, "_grouped_mm")
            return
        for index, number in enumerate(offs.diff(prepend=offs.new_zeros(1)).tolist()):
            self._parts.append((origin.part(index), number))


def _is_free(func: Any) -> bool:
    operation = func.overloadpacket
    attention = operation in flop_registry
    return torch.Tag.pointwise in func.tags or func.is_view or operation in MOVES | _FREE or attention
