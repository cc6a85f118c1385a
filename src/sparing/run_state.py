"""State of a run that belongs to a model but cannot be averaged: masks, and thresholds that a schedule sets.

Averages of weights (SWA, EMA) mix the parameters and often the buffers of many steps. A mixture of masks is not a mask.
Such state is therefore saved and moved with the model as buffers are, but it is no buffer, and the copy that an average
lives in takes it from the model.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError

CANDIDATES, SAMPLE = 2**20, 64
"""A copy recognizes that its weights have changed by a sample of the active ones among so many candidates."""


class RunState(nn.Module):
    """Abstract: a module called with the dense weight, with tensors that are saved and moved, but not averaged.

    A deep copy is a snapshot as long as its weights stay as they were copied or loaded. Once they have changed without
    a gradient, the copy is an average: whenever it is used or saved, it takes the state from the module that it was
    copied from. Once a gradient has flowed through it, it is trained and keeps a state of its own.

    Under torch.compile a copy keeps the state it has.
    """

    _names: tuple[str, ...] = ()
    _home: tuple[nn.Module, ...] = ()  # the ParametrizationList of the weight; in a tuple it is not a submodule
    _source: tuple["RunState", ...] = ()
    _sample: tuple[tuple[Tensor, ...], Tensor] | None = None
    _undefined: bool = False  # moved from the meta device, so far without values
    _start: tuple[Callable[[bool], None], ...] = ()

    def register_state(self, name: str, tensor: Tensor) -> None:
        """Make a tensor an attribute that is in the state_dict and is moved with the model, but is not a buffer."""
        self._names = (*self._names, name)
        setattr(self, name, tensor)

    def state(self) -> dict[str, Tensor]:
        """Return the registered tensors by name."""
        return {name: getattr(self, name) for name in self._names}

    def set_home(self, parametrizations: nn.Module) -> None:
        """Tell the module where its weight is: as `original` of this ParametrizationList, or of several."""
        self._home = (*self._home, parametrizations)

    def start_with(self, start: Callable[[bool], None]) -> None:
        """Tell a module on the meta device how to get its first values if it is not loaded from a checkpoint.

        Args:
            start: calls `take_values` of all modules of the run, with what it is given.
        """
        self._start = (start,)

    def reset_parameters(self) -> None:
        """Take the first values after `to_empty`; does nothing in a module that has values.

        State that depends on the weights is taken again at the first use, when all weights are initialized.

        Raises:
            InputError: this is a copy, which does not know its first values.
        """
        if self._undefined and not self._start:
            raise InputError(
                f"a {type(self).__name__} was copied on the meta device and has no values: load a checkpoint, or copy "
                "the model after it was initialized"
            )
        if self._undefined:
            self._start[0](False)

    @torch.no_grad()
    def take_values(self, source: "RunState", final: bool) -> None:
        """Take state, and parameters that have no values yet, of another module; only after `start_with`.

        Args:
            source: of the same class.
            final: whether the module is complete then.
        """
        if self._start:
            self.take_state(source)
            for ours, theirs in zip(self.parameters(), source.parameters(), strict=True):
                if self._undefined:
                    ours.copy_(theirs)
            self._undefined, self._start = False, () if final else self._start

    def keep_state(self) -> None:
        """Let this copy keep the state that it has, whatever becomes of its weights."""
        self._source, self._sample = (), None

    def refresh(self) -> None:
        """Take the state of the model, if this is an average."""
        if self._sample is not None and not torch.compiler.is_compiling():
            self._follow(self._home[0].original)  # type: ignore[arg-type]

    def __call__(self, weight: Tensor) -> Any:
        if self._undefined:
            self.reset_parameters()
        if torch.compiler.is_compiling():
            return super().__call__(weight)
        if self._start and not weight.is_meta:
            self._start[0](True)
        if self._sample is None:
            return super().__call__(weight)
        self._follow(weight)
        effective = super().__call__(weight)
        if effective.requires_grad:
            effective.register_hook(lambda gradient: self.keep_state())
        return effective

    @torch.no_grad()
    def _follow(self, weight: Tensor) -> None:
        assert self._sample is not None
        if _changed(weight, *self._sample):
            self.take_state(self._source[0])

    def take_state(self, source: "RunState") -> None:
        """Take the state of another module, of the same class."""
        for name, theirs in source.state().items():
            ours = getattr(self, name)
            setattr(self, name, ours.copy_(theirs) if ours.shape == theirs.shape else theirs.to(ours.device, copy=True))

    @torch.no_grad()
    def _take_sample(self) -> tuple[tuple[Tensor, ...], Tensor] | None:
        weight = getattr(self._home[0], "original", None) if len(self._home) == 1 else None
        if weight is None or weight.is_meta or hasattr(weight, "full_tensor"):
            return None
        effective = super().__call__(weight).reshape(-1)
        stride = max(len(effective) // CANDIDATES, 1)
        active = effective[::stride].nonzero()[:, 0] * stride
        index = torch.unravel_index(active[:: max(len(active) // SAMPLE, 1)], weight.shape)
        return index, weight.detach()[index].clone()

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Make the tensors buffers for a while, so that torch saves, loads and moves them."""
        for name in self._names:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            for name in self._names:
                self.__dict__[name] = self._buffers.pop(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def tracked(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            self._undefined |= tensor.is_meta and not moved.is_meta
            return moved

        with self._as_buffers():
            return super()._apply(tracked, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.refresh()
        with self._as_buffers():
            super()._save_to_state_dict(*args)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        masks = self._source[0] if self._source else self
        for name, ours in {**self._parameters, **masks.state()}.items():
            theirs = state_dict.get(prefix + name)
            if theirs is None or ours is None or theirs.dtype == ours.dtype:
                continue
            if ours.dtype == torch.bool and theirs.shape == ours.shape and not ours.is_meta:
                theirs = _not_averaged(prefix + name, theirs, ours)
            # Converted here, since assign=True would take the dtype of the checkpoint over.
            state_dict[prefix + name] = theirs.to(ours.dtype)
        with self._as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name in (*self._parameters, *self._names)):
            self._undefined, self._start = False, ()
        if self._source:
            self._sample = self._take_sample()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_source", "_sample", "_start")}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunState":
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # An average that is copied with its model belongs to the copy of the model.
        twin._source = (memo.get(id(self._source[0]), self) if self._source else self,)
        twin._sample = self._take_sample()
        return twin


def _changed(weight: Tensor, index: tuple[Tensor, ...], values: Tensor) -> bool:
    if weight.is_meta:
        return False
    now = weight.detach()[index]
    # In another dtype it is a converted snapshot.
    return now.dtype == values.dtype and not torch.equal(now, values.to(now.device))


def _not_averaged(key: str, averaged: Tensor, mask: Tensor) -> Tensor:
    """Return the mask for an average over a state_dict, in which a value is the share of steps it was active in."""
    averaged = averaged.to(mask.device)
    if bool(((averaged == 0) | (averaged == 1)).all()):
        return averaged.bool()
    if bool((mask & (averaged == 0)).any() | (~mask & (averaged == 1)).any()):
        raise InputError(
            f"{key} is an average of masks, and not of this model's: load the average into the model that was "
            "trained, or a copy of it"
        )
    return mask
