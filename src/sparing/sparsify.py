"""`sparsify_` and `densify_`: make a model sparse in place, and plain again.

A method says how the effective weight of each layer is made, and what happens around
`optimizer.step()`. Everything else (the loop, the optimizer, the loss) stays the user's.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparing.errors import InputError, SparsityWarning
from sparing.layers import Layer, find_layers
from sparing.parametrizations import Sparse
from sparing.register import check_weight, register, unregister
from sparing.select import Select, resolve

Part = TypeVar("Part", bound=Sparse)


@dataclass(frozen=True)
class Method(ABC):
    """Abstract: a way to train a sparse network. A subclass is final and is its own configuration.

    `parametrizations` is called once, by `sparsify_`. The two hooks are called around every
    optimizer step once `Sparsifier.attach` was, but for steps that a GradScaler skips.
    State belongs to the parametrizations, as parameters and buffers; the method holds none.
    """

    name: ClassVar[str]

    @abstractmethod
    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        """A parametrization for every layer, by the layer's name, on the device of its weight."""

    def plan(self, model: nn.Module, layers: Mapping[str, Layer]) -> Any:
        """What the method works out once from the model, before anything is changed; `Sparsifier.plan`.

        It follows from model and method alone, so a checkpoint need not hold it.
        """
        return None

    def before_step(self, sparsifier: "Sparsifier") -> None:
        """Runs just before the optimizer moves the weights; gradients are there.

        They are unscaled, but with a GradScaler and a fused optimizer, which unscales them itself.
        """

    def after_step(self, sparsifier: "Sparsifier") -> None:
        """Runs just after the optimizer has moved the weights; `sparsifier.step` counts this step."""


class Sparsifier:
    """What `sparsify_` returns: the sparsified layers, and the link to the optimizer.

    Thresholds and masks live on the model, in its state_dict. The sparsifier's own state is the
    number of optimizer steps seen.

    Args:
        model: a model that has been sparsified.
        method: the method it was sparsified with.
        plan: what its `plan` returned; left out, it is asked again.

    Examples:
        >>> sparsifier = sparsify_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), STR(init=-5.0))
        >>> list(sparsifier.layers)
        ['0', '2']
    """

    WATCH_EVERY = 100
    """Optimizer steps between two looks for layers that have lost every weight."""

    def __init__(self, model: nn.Module, method: Method, plan: Any = None) -> None:
        self.model = model
        self.method = method
        self.plan = method.plan(model, self.layers) if plan is None else plan
        self.step = 0
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._reported: set[str] = set()

    @property
    def layers(self) -> dict[str, Layer]:
        """The sparsified layers by name, read off the model."""
        return sparse_layers(self.model)

    def parts(self, kind: type[Part]) -> Iterator[tuple[Layer, Part]]:
        """The sparsified layers with their parametrizations, which are of the class `kind`."""
        for layer in self.layers.values():
            if isinstance(layer.parametrization, kind):
                yield layer, layer.parametrization

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Let the method act around `optimizer.step()`, through torch's own optimizer hooks.

        STR acts on nothing there; attached, its layers are still watched, and one that has lost
        every weight is named in a warning. With several optimizers, name them all in one call, in
        the order in which they step: the method acts before the first and after the last.

        Raises:
            InputError: no optimizer is given; the sparsifier is attached already; the optimizers
                lack a threshold or a dense weight of a sparsified layer.
        """
        if self.optimizers:
            raise InputError("this sparsifier is attached already; name all optimizers in one call of attach()")
        if not optimizers:
            raise InputError("attach() needs the optimizer that trains the model")
        self._check_holds_parameters(optimizers)
        optimizers[0].register_step_pre_hook(self._before_step)
        optimizers[-1].register_step_post_hook(self._after_step)
        self.optimizers = optimizers

    def collapsed(self) -> list[str]:
        """The names of the sparsified layers in which every effective weight is zero."""
        layers = self.layers
        if not layers:
            return []
        with torch.no_grad():
            # Stacked, so that a GPU is waited for once, not once a layer.
            alive = torch.stack([_whole((layer.effective_weight != 0).any()).cpu() for layer in layers.values()])
        return [name for name, lives in zip(layers, alive.tolist(), strict=True) if not lives]

    def warn_collapsed(self) -> None:
        """Warn of layers that have lost every weight, each of them once."""
        new = [name for name in self.collapsed() if name not in self._reported]
        self._reported.update(new)
        if new:
            warnings.warn(
                f"step {self.step}: every weight of {_listing(new)} is zero, so nothing passes through it. "
                "Lower what makes it sparse (in STR the weight decay of the thresholds, or init), or leave the layer "
                "out with select=",
                SparsityWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of steps seen and the method's configuration, in plain Python values."""
        config = {key: value if _is_plain(value) else repr(value) for key, value in asdict(self.method).items()}
        return {"step": self.step, "method": {"name": self.method.name, **config}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict.

        Raises:
            InputError: the state was saved by another method.
        """
        saved = state["method"]["name"]
        if saved != self.method.name:
            raise InputError(f"the state was saved by method {saved!r} and cannot continue {self.method.name!r}")
        self.step = int(state["step"])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if type(self.method).before_step is Method.before_step or _is_skipped(optimizer) or not self.layers:
            return
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise InputError(
                f"method {self.method.name!r} works on the gradients before the step, and a closure computes them "
                "within it; call backward() before optimizer.step()"
            )
        self.method.before_step(self)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _is_skipped(optimizer):
            return
        self.step += 1
        self.method.after_step(self)
        if self.step % self.WATCH_EVERY == 0:
            self.warn_collapsed()

    def _check_holds_parameters(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            wanted = [("dense weight", layer.weight)]
            wanted += [(key, p) for key, p in layer.parametrization.named_parameters()]  # type: ignore[union-attr]
            for what, parameter in wanted:
                if parameter.requires_grad and id(parameter) not in held:
                    raise InputError(
                        f"the optimizer does not hold the {what} of layer {name!r}: build it after sparsify_, "
                        "for example torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-4), lr=0.1)"
                    )


def sparsify_(model: nn.Module, method: Method, select: Select | None = None) -> Sparsifier:
    """Make layers of a model sparse, in place.

    Every selected weight W becomes the effective weight that the method makes of it; the dense W
    stays in the model as the parameter that the optimizer moves.

    Args:
        model: any module.
        method: the way to train it, such as `STR(init=-5.0)`.
        select: which layers: a predicate `(module name, module) -> bool`, or a list of layer names
            or shell patterns. None takes every convolution, transposed convolution, Linear and
            recurrent weight. A tied weight is one layer and is made sparse once.

    Returns:
        The sparsifier; `attach` it to the optimizer.

    Raises:
        InputError: nothing is selected; a name matches nothing or a layer is chosen twice; the
            model is sparsified already; a weight is not finite, not floating point, not
            initialized, or carries another parametrization.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparsifier = sparsify_(model, STR(init=-5.0), select=["0"])
        >>> model[0].weight.shape, sparsifier.layers["0"].weight.shape
        (torch.Size([32, 64]), torch.Size([32, 64]))
    """
    if not isinstance(method, Method):
        raise InputError(f"method={method!r} is not a method object; give one such as sparing.STR(init=-5.0)")
    already = sparse_layers(model)
    if already:
        raise InputError(
            f"the model is sparsified already ({_listing(list(already))}); call sparing.densify_(model) first"
        )
    layers = resolve(model, select)
    for layer in layers.values():
        check_weight(layer)
    _check_raw(model, layers)
    plan = method.plan(model, layers)
    made = method.parametrizations(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            made[name](layer.weight)
    # Everything that can fail has been tried by now, so an error leaves the model as it was.
    for name, layer in layers.items():
        register(layer, made[name])
    sparsifier = Sparsifier(model, method, plan)
    _warn_if_empty(sparsifier)
    return sparsifier


def densify_(model: nn.Module) -> nn.Module:
    """Put the effective weights, zeros included, in place of the dense ones; plain modules remain.

    Outputs stay equal to the last bit. Each weight keeps its Parameter object. A model that holds
    nothing sparsified is left as it is.

    Returns:
        The same model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = sparsify_(model, STR(init=-2.0))
        >>> densify_(model)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    for layer in sparse_layers(model).values():
        unregister(layer)
    return model


@torch.no_grad()  # methods that train with noise give the weight of evaluation where no gradient is recorded
def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the densified model, without changing the model: plain keys, effective weights.

    It loads strictly into the model as it was before `sparsify_`. Tied weights share one tensor.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> _ = sparsify_(model, STR(init=-2.0))
        >>> sorted(dense_state_dict(model))
        ['bias', 'weight']
    """
    effective: dict[str, Tensor] = {}
    internal: list[str] = []
    for layer in sparse_layers(model).values():
        tensor = layer.effective_weight.detach()
        for place in layer.places:
            effective[place.key] = tensor
            prefix = f"{place.module_name}." if place.module_name else ""
            internal.append(f"{prefix}parametrizations.{place.tensor_name}.")
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(internal))}
    return {**plain, **effective}


def sparse_layers(model: nn.Module) -> dict[str, Layer]:
    """The sparsified layers of a model by name, whoever sparsified it.

    Examples:
        >>> sparse_layers(nn.Linear(4, 2))
        {}
    """
    return {name: layer for name, layer in find_layers(model).items() if layer.parametrization is not None}


def _whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from the ranks that FSDP2 (`fully_shard`) has spread it over."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()  # type: ignore[no-any-return]


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer is about to leave everything as it is: a GradScaler hands it this number."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _check_raw(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Refuse weights that the model also holds outside a layer, where it would use them dense."""
    known = {place.key for layer in layers.values() for place in layer.places}
    names = {id(layer.weight): name for name, layer in layers.items()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names and key not in known:
            raise InputError(
                f"the weight of layer {names[id(parameter)]!r} is also the parameter {key!r}, which would stay dense; "
                "leave the layer out with select="
            )


def _warn_if_empty(sparsifier: Sparsifier) -> None:
    layers = sparsifier.layers
    if any(layer.weight.is_meta for layer in layers.values()):
        return
    empty = sparsifier.collapsed()
    sparsifier._reported.update(empty)
    if not empty:
        return
    details = []
    for name in empty[:3]:
        largest = float(layers[name].weight.detach().abs().max())
        threshold = layers[name].threshold
        over = "" if threshold is None else f" under a threshold of {float(threshold.detach().min()):.3g}"
        details.append(f"{name}: largest |weight| {largest:.3g}{over}")
    warnings.warn(
        f"{len(empty)} of {len(layers)} layers are all zero before training ({'; '.join(details)}"
        f"{'; ...' if len(empty) > 3 else ''}): nothing passes through them. "
        f"Lower the initial threshold, or the sparsity, of {sparsifier.method}",
        SparsityWarning,
        stacklevel=3,
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
