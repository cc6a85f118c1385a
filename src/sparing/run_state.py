"""State of a run that belongs to a model but cannot be averaged: masks, and thresholds that a schedule sets.

Averages of weights (SWA, EMA) mix the parameters and often the buffers of many steps. A mixture of masks is not a mask.
Such state is therefore saved and moved with the model as buffers are, but `model.buffers()` does not have it, and the
copy that an average lives in takes it from the model.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError, SparsityWarning
from sparing.sharding import is_sharded

SAMPLE = 2**14
"""Weights by which a copy recognizes that it has been changed."""


class RunState(nn.Module):
    """Abstract: a module called with the dense weight, with tensors that are saved and moved, but not averaged.

    A deep copy is a snapshot as long as its weights stay as they were copied or loaded. Once they have changed without
    a gradient, the copy is an average: whenever it is used, saved or copied, it takes the state from the model that it
    was copied from. If a gradient flows through a copy that is no average, it is trained and keeps a state of its own.
    An exported copy keeps the state that it has.
    """

    def __init__(self) -> None:
        super().__init__()
        # Set here, not as defaults of the class: torch.compile would compile anew once an instance gets them.
        self._names: tuple[str, ...] = ()
        # The ParametrizationList of the weight, once for each name of the weight. In a tuple it is not a submodule.
        self._home: tuple[nn.Module, ...] = ()
        self._source: _Source | None = None
        self._start: tuple[Callable[[], None], ...] = ()
        self._undefined = False  # moved from the meta device, so far without values

    def register_state(self, name: str, tensor: Tensor) -> None:
        """Make a tensor an attribute that is in the state_dict and is moved with the model, but is not averaged."""
        self._names = (*self._names, name)
        setattr(self, name, tensor)

    def state(self) -> dict[str, Tensor]:
        """Return the registered tensors by name."""
        return {name: getattr(self, name) for name in self._names}

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """Iterate over buffers; those of this module alone, as torch.distributed.checkpoint asks, include the state."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            yield from ((f"{prefix}.{name}".lstrip("."), tensor) for name, tensor in self.state().items())

    def set_home(self, parametrizations: nn.Module) -> None:
        """Tell the module where its weight is: as `original` of this ParametrizationList.

        It is called once for each name of the weight, and for each weight that the module makes.
        """
        self._home = (*self._home, parametrizations)

    def start_with(self, start: Callable[[], None]) -> None:
        """Tell a module on the meta device what calls `take_values`, if it is not loaded from a checkpoint."""
        self._start = (start,)

    @torch.no_grad()
    def take_values(self, source: "RunState") -> None:
        """Take the first values from another module of the same class; does nothing in a module that has values."""
        if self._start:
            self._start, self._undefined = (), False
            self.take_state(source.state())
            for ours, theirs in zip(self.parameters(), source.parameters(), strict=True):
                ours.copy_(theirs)

    def take_state(self, state: dict[str, Tensor]) -> None:
        """Take the values of the registered tensors."""
        for name, theirs in state.items():
            ours = getattr(self, name)
            setattr(self, name, ours.copy_(theirs) if ours.shape == theirs.shape else theirs.to(ours.device, copy=True))

    def keep_state(self) -> None:
        """Let this copy keep the state that it has, whatever becomes of its weights."""
        self._source = None

    def refresh(self) -> None:
        """Take the first values after the meta device was left, or the state of the model if this is an average.

        Raises:
            InputError: the module has no values, and is a copy that does not know its first ones.
        """
        if self._source is None and not self._undefined:
            return
        weight = self._weight()
        if weight is None or weight.is_meta or torch.compiler.is_compiling():
            return
        if self._start:
            self._start[0]()
        if self._undefined:
            raise InputError(
                f"a {type(self).__name__} was copied on the meta device and has no values: load a checkpoint, or copy "
                "the model after it was initialized"
            )
        with torch.no_grad():
            if self._source is not None and bool(self._source.is_averaged(weight)):
                self.follow(self._source)

    def follow(self, source: "_Source") -> None:
        """Take the state of the model that this average was copied from."""
        source.followed = True
        self.take_state(source.state())

    def __call__(self, weight: Tensor) -> Any:
        if isinstance(weight, torch.fx.Proxy):  # a leaf of the graph that torch.fx traces
            return weight.tracer.create_proxy("call_module", weight.tracer.path_of_module(self), (weight,), {})
        if "_is_replica" in vars(self):  # of nn.DataParallel, which copies only parameters and buffers to other GPUs
            vars(self).update({name: own.to(weight.device) for name, own in self.state().items()})
        # A plain tensor in place of the parameter is a trial, as of functional_call, and says nothing of this module.
        if isinstance(self._weight(), nn.Parameter):
            self.refresh()
            if self._source is not None and self._names and _is_compiled_evaluation():
                return self._call_as_average(self._source, weight)
        elif self._source is not None and not weight.is_meta and any(own.is_meta for own in self.state().values()):
            return self._call_with_state_of(self._source, weight)
        elif self._names and not torch.compiler.is_compiling() and _is_mapped(weight):
            self._warn_shared()
        if self._names and is_sharded(weight):
            raise InputError(
                f"a weight with {', '.join(self._names)} is sharded, and these are not: masks are not supported under "
                "FSDP2. Use DistributedDataParallel, or STR without a target"
            )
        effective = super().__call__(weight)
        snapshot = not torch.compiler.is_compiling() and self._source is not None and not self._source.followed
        if snapshot and effective.requires_grad:
            effective.register_hook(lambda gradient: self.keep_state())
        return effective

    def _call_as_average(self, source: "_Source", weight: Tensor) -> Any:
        """Do within a compiled graph what `refresh` does before an eager call."""
        own, averaged = self.state(), source.is_averaged(weight)
        vars(self).update({name: torch.where(averaged, theirs, own[name]) for name, theirs in source.state().items()})
        try:
            return super().__call__(weight)
        finally:
            vars(self).update(own)

    def _call_with_state_of(self, source: "_Source", weight: Tensor) -> Any:
        """Call a copy on the meta device with a weight that has values: so Opacus computes gradients per sample.

        Raises:
            InputError: vmap maps over the weights of several models.
        """
        if torch._C._functorch.is_batchedtensor(weight):
            raise InputError(
                f"vmap maps over weights, and a copy on the meta device has no {', '.join(self._names)}: pass them to "
                "functional_call() with the parameters; stack_module_state() omits them"
            )
        own = self.state()
        vars(self).update(source.state())
        try:
            return super().__call__(weight)
        finally:
            vars(self).update(own)

    def _warn_shared(self) -> None:
        """Warn if vmap maps over the weights of several models, but not over their masks."""
        if not any(map(_is_mapped, self.state().values())):
            names = ", ".join(self._names)
            warnings.warn(
                f"vmap maps over weights, but not over their {names}: all of them get that of one model. Pass {names} "
                "to functional_call() with the parameters; stack_module_state() omits them",
                SparsityWarning,
                stacklevel=3,
            )

    def _weight(self) -> Tensor | None:
        """Return the dense weight, or one of the parameters that another parametrization computes it from."""
        # No next() with a default, which torch.compile of PyTorch 2.8 cannot trace.
        parameters = list(self._home[0]._parameters.values()) if self._home else []
        return parameters[0] if parameters else None

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Make the tensors buffers for a while, so that torch loads and moves them."""
        for name in self._names:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            for name in self._names:
                self.__dict__[name] = self._buffers.pop(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def tracked(tensor: Tensor) -> Tensor:
            moved = _moved(fn, tensor)
            self._undefined |= tensor.is_meta and not moved.is_meta
            return moved

        with self._as_buffers():
            return super()._apply(tracked, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.refresh()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor.detach() for name, tensor in self.state().items()})
        if len(self._home) > 1 and not keep_vars:
            self._clone_shared(destination, prefix)

    def _clone_shared(self, destination: dict[str, Any], prefix: str) -> None:
        """Clone what is saved under another name as well: safetensors refuses names that share memory."""
        home = prefix[: prefix.rfind(".", 0, -1) + 1]  # of the weight, with all that is made of it
        others = [value for key, value in destination.items() if not key.startswith(home) and isinstance(value, Tensor)]
        for key in [key for key in destination if key.startswith(home)]:
            tensor = destination[key]
            if any(other.shape == tensor.shape and other.data_ptr() == tensor.data_ptr() for other in others):
                destination[key] = tensor.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        masks = self.state() if self._source is None else self._source.state()
        for name, ours in {**self._parameters, **masks}.items():
            theirs = state_dict.get(prefix + name)
            if theirs is None or ours is None or theirs.dtype == ours.dtype:
                continue
            if ours.dtype == torch.bool and theirs.shape == ours.shape:
                theirs = self._without_average(prefix + name, theirs, ours)
            # Converted here, since assign=True would take the dtype of the checkpoint over.
            state_dict[prefix + name] = theirs.to(ours.dtype)
        trained = self.is_trained()
        with self._as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        kept = {**dict(zip(self._names, self._names, strict=True)), "_extra_state": "step count"}
        lost = [text for name, text in kept.items() if prefix + name in missing]
        if lost and not trained and f"{prefix[: prefix.rfind('.', 0, -1) + 1]}original" not in missing:
            warnings.warn(
                f"the checkpoint has the weights of sparsified layers without their {', '.join(lost)}, which stay "
                "as they are: save all of model.state_dict(), not only the parameters",
                SparsityWarning,
                stacklevel=2,
            )
        if all(prefix + name in state_dict for name in (*self._parameters, *self._names)):
            self._undefined, self._start = False, ()
        weight = self._weight()
        if self._source is not None and weight is not None:
            self._source.take_sample(weight)

    def _without_average(self, key: str, averaged: Tensor, mask: Tensor) -> Tensor:
        """Return the mask for an average over a state_dict, in which a value is the share of steps it was active in."""
        if averaged.is_meta or bool(((averaged == 0) | (averaged == 1)).all()):
            return averaged
        known = not mask.is_meta and not self._undefined and (self._source is not None or self.is_trained())
        some = int(((averaged != 0) & (averaged != 1)).sum())
        averaged = averaged.to(mask.device)
        others = (mask & (averaged == 0)) | (~mask & (averaged == 1))
        if not known or bool(others.any()):
            ours = "" if mask.is_meta else f"; at {int(others.sum())} all of them differ from the mask of this model"
            raise InputError(
                f"{key} is an average of masks, and not of this model's: {some} of {mask.numel()} weights are active "
                f"in a part of them{ours}. Load the average into the model that was trained, or a copy of it, or "
                "average dense_state_dict() of the models and call load_dense_state_dict()"
            )
        return mask

    def __prepare_scriptable__(self) -> Any:
        raise InputError(
            "torch.jit.script() cannot compile a sparsified layer: call sparing.densify_(model) first, or use "
            "torch.export.export(), torch.compile(), or torch.jit.trace() within torch.no_grad()"
        )

    def is_trained(self) -> bool:
        """Return whether the state is that of a run, and not that of its start."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None, "_start": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunState":
        self.refresh()
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        weight = self._weight()
        if len({*self._home}) == 1 and weight is not None and not weight.is_meta and not is_sharded(weight):
            # An average that is copied with its model belongs to the copy of the model.
            model = self if self._source is None else memo.get(id(self._source.module()), self)
            twin._source = _Source(model, weight)
        return twin


def _is_mapped(tensor: Tensor) -> bool:
    """Return whether vmap maps over a tensor, at any level of torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return what a function of `nn.Module._apply` makes of a tensor, with its values, which to_empty() leaves out."""
    moved = fn(tensor)
    if moved is not tensor and not tensor.is_meta and not moved.is_meta:
        moved.copy_(tensor)
    return moved


def _is_compiled_evaluation() -> bool:
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled() and not torch.compiler.is_exporting()


class _Source:
    """Where a deep copy comes from, and a sample of its weight, at random positions.

    Args:
        module: what the copy was made of. It is not kept alive, its state is.
        weight: its dense weight.

    Attributes:
        followed: whether the copy is known to be an average, since its weights were copied or loaded.
    """

    def __init__(self, module: RunState, weight: Tensor) -> None:
        self.module = weakref.ref(module)
        self._state = module.state()
        self.take_sample(weight)

    def state(self) -> dict[str, Tensor]:
        module = self.module()
        if module is not None:
            self._state = module.state()
        return self._state

    @torch.no_grad()
    def take_sample(self, weight: Tensor) -> None:
        self.followed = False
        few = torch.randint(weight.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0), device="cpu")
        self._index = (few if weight.numel() > SAMPLE else torch.arange(weight.numel(), device="cpu")).to(weight.device)
        self._values = weight.detach().take(self._index)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the sample as the weight will be."""
        self._index, self._values = _moved(fn, self._index), _moved(fn, self._values)

    def is_averaged(self, weight: Tensor) -> Tensor:
        """Return whether the weight has changed since it was copied."""
        return (weight.detach().take(self._index) != self._values).any()
