"""Score weights by their size and by the inputs that they multiply: one-shot pruning with data.

    a     = |W| · ‖x‖₂              x: all values that the weight multiplies, over all batches, positions and tokens
    score = a / mean of a           over the weights of the same output; for whole filters a itself

    Linear, attention    ‖x_j‖₂ of input feature j, for every weight W_ij of shape (outputs, inputs)
    Conv1D               the same for W_ji of shape (inputs, outputs)
    convolution          ‖x_c‖₂ of input channel c, for every weight W_ochw or, transposed, W_cohw
    recurrent            ‖x_j‖₂ over all time steps; of the hidden state for the hidden weights

A weight of small size matters if its input is large. Every product with a weight, or with a view or a copy of it, is
seen as it happens, so the module that multiplies may be any. A weight that is used several times has the inputs of
all uses.

Source: Sun, Liu, Bair & Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), ICLR
2024, section 3.
Deviations: the paper keeps equally many weights of every output, and measures Linear layers. Here the score is relative
to the mean of its output, and compared as the budget says, within each layer or over all layers. On MiniLM this agrees
as much with the dense model as the paper's rule, and more with a global budget, where the paper has none. A convolution
takes the norm of the whole input channel, also where padding or stride keep a position from a weight.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparing.errors import InputError
from sparing.layers import Layer, all_layers, check_module, is_transposed
from sparing.macs import evaluation
from sparing.patterns import Units
from sparing.sharding import is_sharded

aten = torch.ops.aten
_MATRIX = {aten.mm, aten.bmm, aten.mv, aten.addmm, aten.baddbmm, aten.addmv}
_ADDED = {aten.addmm, aten.baddbmm, aten.addmv}  # the first argument is added
_COPIES = {aten.clone, aten._to_copy}


class Calibration:
    """The score |W| · ‖x‖₂ of a calibrated model, relative to the mean of its output; `calibrate` makes it.

    Args:
        norms: by layer: ‖x‖₂ of the input of each weight, of a shape that broadcasts to the weight.
    """

    def __init__(self, norms: Mapping[str, Tensor]) -> None:
        self.norms = dict(norms)
        values = hashlib.sha256()
        for name, norm in sorted(self.norms.items()):
            values.update(f"{name} {tuple(norm.shape)}".encode())
            values.update(norm.cpu().numpy().tobytes())
        self._digest = values.hexdigest()[:12]

    def __call__(self, layer: Layer, units: Units) -> Tensor:
        norm = self.norms.get(layer.name)
        if norm is None:
            raise InputError(
                f"the score of calibrate() has no layer {layer.name!r}: no batch reached all of its weights, all "
                "of its inputs were zero, or the model multiplies by others that it computes from them. Calibrate the "
                "model that sparsify_() is called on, with other batches, or leave the layer out with select="
            )
        if norm.dim() != len(layer.shape) or any(n not in (1, m) for n, m in zip(norm.shape, layer.shape, strict=True)):
            raise InputError(
                f"the score of calibrate() was made for another model: layer {layer.name!r} has shape {layer.shape}, "
                f"and its norms {tuple(norm.shape)}"
            )
        sizes = layer.weight.abs() * norm.to(layer.weight.device)
        # The dimensions are channel group, input and output of a transposed convolution, or output and inputs.
        transposed, groups = is_transposed(layer.module), getattr(layer.module, "groups", 1)
        rows = sizes.unflatten(0, (groups, -1)) if transposed else sizes
        means = rows.mean([d for d in range(1, rows.dim()) if not transposed or d != 2], keepdim=True)
        if units.weights * means.numel() < sizes.numel():  # otherwise a unit is all of an output
            sizes = (rows / means.clamp_min(torch.finfo(means.dtype).tiny)).reshape(sizes.shape)
        return units.norm(sizes)

    def __repr__(self) -> str:
        return f"Calibration({len(self.norms)} layers, {self._digest})"


def calibrate(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    """Run a model over batches, without gradients, and return a score of its weights for one-shot pruning.

    score = |W| · ‖x‖₂ of the input x that the weight multiplies, relative to the mean of its output

    The model runs in evaluation mode, and is as before afterwards. Some hundred examples are enough. In distributed
    training, give every process the same batches, so that all have the same masks.

    Args:
        model: dense, or sparsified.
        batches: each is what the model is called with: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments; of a loader with labels, `((x,) for x, label in loader)`.

    Returns:
        A function (layer, units) → score, for `GMP(score=...)`. It knows the layers that the batches reach, with all
        of their weights and inputs that are not all zero, and raises `InputError` for others.

    Raises:
        InputError: there is no batch, or one of another type; the model is sharded, on the meta device or not
            initialized; inputs of a layer are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> score = calibrate(model, [torch.randn(16, 64) for _ in range(4)])
        >>> _ = sparsify_(model, GMP(sparsity=0.5, begin=0, end=0, score=score))
        >>> report(model).total.sparsity
        0.5
    """
    check_module(model)
    if any(is_sharded(each) or each.is_meta or is_lazy(each) for each in model.parameters()):
        raise InputError(
            "calibrate(): the model is sharded, on the meta device, or not initialized: initialize it, and calibrate "
            "before fully_shard()"
        )
    layers = all_layers(model)
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.inference_mode(False))  # in it, products come within larger operations
        stack.enter_context(torch.no_grad())
        stack.enter_context(parametrize.cached())  # so that a computed weight is one tensor
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # these libraries run a layer as a whole
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        inputs = _Inputs({name: getattr(layer.module, layer.places[0].tensor_name) for name, layer in layers.items()})
        batch = None
        for batch in batches:
            args, kwargs = _arguments(batch)
            try:
                with inputs:
                    model(*args, **kwargs)
            except TypeError as error:
                raise InputError(
                    f"calibrate(): the model cannot be called with a batch: {error}. Of a loader with labels, give "
                    "((x,) for x, label in loader)"
                ) from error
            inputs.drop_copies()
        if batch is None:
            raise InputError("calibrate(): there is no batch in batches")
        return Calibration(inputs.norms())


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)):
        raise InputError(
            "calibrate(): a batch must be a tensor, a tuple of arguments of the model, or a mapping of its keyword "
            f"arguments, got {type(batch).__name__}"
        )
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch,) if isinstance(batch, Tensor) else tuple(batch), {}


class _Inputs(TorchDispatchMode):
    """While it is active, the squares of what weights are multiplied by are summed.

    A view of a weight is recognized by its storage. What it is multiplied by is summed by shape, strides and offset of
    the view, in as few numbers as differ: one for each input, not for each weight.

    Args:
        weights: the weights by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = list(weights)
        self._tensors: list[Tensor] = []  # the weights, and after them the copies that the model makes of them
        self._copied: list[Tensor] = []  # what the copies were made of
        self._stored: dict[int, list[int]] = {}  # by address of the storage: indices of tensors
        self._sums: dict[int, dict[Any, Tensor]] = {}
        for weight in weights.values():
            self._watch(weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, operation = func(*args, **(kwargs or {})), func.overloadpacket
        if operation in _MATRIX:
            first, second = args[1:3] if operation in _ADDED else args[:2]
            if second.dim() == 1:
                second = second.unsqueeze(-1)
            if self._find(second) is not None:
                self._add(second, _squares(first).sum(-2).unsqueeze(-1))
            if self._find(first) is not None:
                self._add(first, _squares(second).sum(-1).unsqueeze(-2))
        elif operation is aten.convolution and self._find(args[1]) is not None:
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            channels = _squares(x).sum([d for d in range(x.dim()) if d != 1])
            if not transposed:
                channels = channels.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
            self._add(weight, channels.reshape(len(weight), -1, *[1] * (x.dim() - 2)))
        elif operation in _COPIES and self._find(args[0]) is not None:
            self._watch(result)
            self._copied.append(args[0])
        return result

    def drop_copies(self) -> None:
        """Add to the weights what their copies were multiplied by, and forget the copies."""
        while self._copied:
            index, source = len(self._tensors) - 1, self._copied.pop()
            if index in self._sums:
                self._add(source, self._total(index))
                del self._sums[index]
            self._stored[self._tensors.pop().untyped_storage().data_ptr()].remove(index)

    def norms(self) -> dict[str, Tensor]:
        """Return the norms of the layers all of whose weights were multiplied, in as few numbers as differ.

        Raises:
            InputError: a norm is not finite.
        """
        norms = {}
        for index, name in enumerate(self._names):
            reached = _zeros(self._tensors[index], torch.bool)
            for view in self._sums.get(index, ()):
                reached.as_strided(*view).fill_(True)
            norm = self._total(index).sqrt_()
            if not reached.all() or not norm.any():
                continue
            if not norm.isfinite().all():
                raise InputError(f"calibrate(): inputs of layer {name!r} are NaN or infinite, or too large to square")
            for dim in range(norm.dim()):
                first = norm.narrow(dim, 0, 1)
                norm = first if torch.equal(first.expand_as(norm), norm) else norm
            norms[name] = norm.clone(memory_format=torch.contiguous_format)
        return norms

    def _watch(self, tensor: Tensor) -> None:
        self._stored.setdefault(tensor.untyped_storage().data_ptr(), []).append(len(self._tensors))
        self._tensors.append(tensor)

    def _find(self, tensor: Tensor) -> int | None:
        """Return the index of the tensor that this one is a view of."""
        if tensor.layout is not torch.strided:
            return None
        for index in self._stored.get(tensor.untyped_storage().data_ptr(), ()):
            known = self._tensors[index]
            end = sum((size - 1) * stride for size, stride in zip(known.shape, known.stride(), strict=True))
            if 0 <= tensor.storage_offset() - known.storage_offset() <= end:
                return index
        return None

    def _add(self, view: Tensor, squares: Tensor) -> None:
        """Add squares, of a shape that broadcasts to the view, to the sums of the tensor that it is a view of."""
        index = self._find(view)
        assert index is not None
        for dim in range(view.dim()):
            if view.stride(dim) == 0 and view.shape[dim] > 1:  # one weight for several inputs
                squares = squares.expand_as(view).sum(dim, keepdim=True)
                view = view.narrow(dim, 0, 1)
        offset = view.storage_offset() - self._tensors[index].storage_offset()
        key = (tuple(view.shape), view.stride(), offset)
        sums = self._sums.setdefault(index, {})
        sums[key] = sums[key] + squares if key in sums else squares

    def _total(self, index: int) -> Tensor:
        """Return the sum for each weight of a tensor."""
        tensor = self._tensors[index]
        total = _zeros(tensor, torch.promote_types(tensor.dtype, torch.float32))
        for view, squares in self._sums.get(index, {}).items():
            total.as_strided(*view).add_(squares)
        return total


def _zeros(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros with the strides of a tensor, so that its views are views of the zeros, too."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device).zero_()


def _squares(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
