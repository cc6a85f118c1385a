"""Whether a method can work with the optimizers that it is attached to."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparing.errors import InputError, listed
from sparing.layers import Layer
from sparing.method import Method
from sparing.optimizers import copying, is_itself, parameters_of, reset_state
from sparing.sharding import is_sharded

CLOSE = 0.1
"""State that differs from the weight by less than this share of its norm is a copy of it."""

ASIDE = ("p0", "ax")
"""State with weights that never come back into the model: the first ones of Prodigy, the averages of ASGD."""


def check_optimizers(
    method: Method,
    layers: Mapping[str, Layer],
    given: Iterable[Any],
    optimizers: Iterable[Optimizer],
    resets: Iterable[Tensor],
) -> None:
    """Check that optimizers hold what a method trains, and that the method can act on them.

    Args:
        method: of the layers.
        layers: the sparsified layers by name.
        given: the optimizers and wrappers that the user named.
        optimizers: those within the wrappers.
        resets: the parameters whose state the method sets to zero.

    Raises:
        InputError: see `Sparsifier.attach`.
    """
    optimizers, name = list(optimizers), method.name
    if not optimizers:
        raise InputError("attach() needs the optimizer that trains the model")
    check_held(layers, optimizers)
    sharded = any(is_sharded(p) for layer in layers.values() for p in layer.originals)
    if sharded and (method.rescales or any(layer.parametrization.state() for layer in layers.values())):
        raise InputError(
            f"{name}: masks and targets are not supported under FSDP2, which shards neither. Use "
            "DistributedDataParallel, or STR with a weight decay on s instead of a target"
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in optimizers) and (
        method.edits_gradients or any(True for _ in resets)
    ):
        what = "works on the gradients of a step" if method.edits_gradients else "resets the state of single weights"
        raise InputError(f"{name} {what} and does not support LBFGS")
    if (copies := copying(given)) and (method.sets_weights or method.rescales):
        _refuse_copy(method, copies)


def check_held(layers: Mapping[str, Layer], optimizers: Iterable[Optimizer]) -> None:
    """Check that optimizers hold the dense weights and the thresholds of layers.

    Raises:
        InputError: they do not, or no longer, because something has replaced the parameters of the model.
    """
    held = {id(parameter) for parameter in parameters_of(optimizers)}
    for layer in layers.values():
        weights = (("dense weight", p) for p in layer.originals)
        for what, p in (*weights, *layer.parametrization.named_parameters()):
            if p.requires_grad and id(p) not in held:
                raise InputError(
                    f"the optimizer does not hold the {what} of layer {layer.name!r}. Build it after calling "
                    "sparsify_(): torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-4), lr=0.1), and after "
                    "load_state_dict(assign=True) or anything else that replaces parameters; then call attach() again"
                )


@torch.no_grad()
def check_state(
    method: Method, layers: Mapping[str, Layer], optimizers: Iterable[Any], resets: Iterable[Tensor]
) -> None:
    """Check that a method can work with the state that optimizers have.

    Args:
        method: of the layers.
        layers: the sparsified layers by name.
        optimizers: those that may hold state.
        resets: the parameters whose state the method sets to zero.

    Raises:
        InputError: the state of single weights cannot be set to zero; or the method sets weights or thresholds, and
            the state has a copy of the weights, as fp32 master weights are.
    """
    optimizers = list(optimizers)
    for parameter in resets:
        reset_state(optimizers, parameter, torch.zeros_like(parameter, dtype=torch.bool))
    if not (method.sets_weights or method.rescales):
        return
    for weight in (weight for layer in layers.values() for weight in layer.originals):
        for optimizer in optimizers:
            for key, value in optimizer.state.get(weight, {}).items():
                if key not in ASIDE and not is_itself(value, weight) and _is_copy(value, weight):
                    _refuse_copy(method, f"the state {key!r} of {type(optimizer).__name__}")


def _is_copy(value: Any, weight: Tensor) -> bool:
    """Return whether a state is close to the weight itself; momenta and second moments are not."""
    if type(value) is not Tensor or not value.is_floating_point() or not 1 < value.numel() == weight.numel():
        return False
    value = value.to(weight.device).reshape(weight.shape)
    return bool(torch.linalg.vector_norm(value - weight) < CLOSE * torch.linalg.vector_norm(weight))


def _refuse_copy(method: Method, copies: str) -> NoReturn:
    raise InputError(
        f"{method.name} sets weights or thresholds, and {copies} keeps a copy of them that it mixes into them later: "
        "use another optimizer, or a method that only masks weights, such as GMP"
    )


def check_penalty(method: Method, layers: Mapping[str, Layer]) -> None:
    """Check that the gradient of a term of the loss reaches the optimizers.

    Raises:
        InputError: it does not, because Opacus takes the gradients.
    """
    if any(hasattr(layer.weight, "grad_sample") for layer in layers.values()):
        raise InputError(
            f"{method.name} adds a term to the loss, which Opacus ignores, because it takes gradients per sample: use "
            "a method without such a term"
        )


def doubts(
    method: Method,
    plan: Any,
    layers: Mapping[str, Layer],
    optimizers: Iterable[Optimizer],
    stepping: Optimizer | None = None,
) -> list[str]:
    """Return a sentence for whatever keeps a method from reaching its aim: thresholds without decay, frozen layers.

    Before the step of one of several optimizers, layers of the others may be frozen for just this step, as in a GAN.
    """
    others = {id(p) for p in parameters_of(each for each in optimizers if stepping not in (None, each))}
    groups = {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parts = {name: layer.parametrization for name, layer in layers.items()}
    fixed = [
        name
        for name, part in parts.items()
        for key, p in part.named_parameters()
        if part.decays.get(key) == "thresholds" and p.requires_grad and not groups[id(p)].get("weight_decay")
    ]
    frozen = [
        name
        for name, layer in layers.items()
        if not layer.weight.requires_grad and others.isdisjoint(map(id, layer.originals))
    ]
    learns = any(True for part in parts.values() for _ in part.parameters())
    pruned_once = getattr(getattr(plan, "updates", None), "end", 1) == 0
    texts = []
    if fixed and method.goal(plan) is None and not method.regularizes:
        texts.append(
            f"{method.name}: nothing raises the thresholds of {_some(fixed, layers)}, because the optimizer gives them "
            "no weight decay. Build it with sparing.param_groups(model, weight_decay, threshold_weight_decay), or set "
            "a target"
        )
    if frozen and (learns or (method.acts and not pruned_once)):
        texts.append(
            f"{method.name}: {_some(frozen, layers)} are frozen: their weights do not adapt to pruning, and nothing is "
            "learned or regrown there. Finish pruning before you freeze them"
        )
    return texts


def _some(names: list[str], layers: Mapping[str, Layer]) -> str:
    return f"{len(names)} of {len(layers)} layers ({listed(names, 3)})"
