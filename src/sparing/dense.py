"""Write dense weights into a sparsified model: a pretrained checkpoint, or an update such as LoRA's."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from sparing.errors import InputError, SparsityWarning, listed
from sparing.goal import start_ramp
from sparing.layers import check_module
from sparing.parametrizations import Sparse
from sparing.sharding import is_sharded


@torch.no_grad()
def load_dense_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a checkpoint of the dense model into the sparsified one: the inverse of `dense_state_dict`.

    The values become the dense weights, biases and buffers, as if they had been there before `sparsify_`: up to the
    first optimizer step, masks are made anew from them, and a sparsity ramp starts at their zeros. After the first step
    masks and thresholds stay as they are, so that weights can be rewound. Learned thresholds always stay.

    Args:
        model: the whole model that `sparsify_` was called on.
        state_dict: with the keys and shapes of the dense model. Floating point numbers are converted to the dtype of
            the model.

    Raises:
        InputError: the state dict is no mapping; keys are missing or unexpected; a shape or the kind of a dtype
            differs; a weight to sparsify is not finite, or is sparser than the target; tied weights differ; the model
            is a copy of which the masks cannot be made anew, is on the meta device, or is sharded. The model is then
            as it was.

    Examples:
        >>> pretrained = nn.Linear(4, 2).state_dict()
        >>> model = nn.Linear(4, 2)
        >>> _ = sparsify_(model, STR(init=-5.0))
        >>> load_dense_state_dict(model, pretrained)
        >>> torch.equal(model.parametrizations.weight.original, pretrained["weight"])
        True
    """
    check_module(model)
    if not isinstance(state_dict, Mapping):
        raise InputError(f"load_dense_state_dict(): the state dict must be a mapping, got {type(state_dict).__name__}")
    entries, keys = _entries(model)
    given = {**_missing_counters(entries, state_dict), **state_dict}
    _check_keys([key for key in entries if key not in given], [key for key in given if key not in entries])
    for key, ours in entries.items():
        _check_value(key, ours, given[key])
    weights: dict[int, Tensor] = {}
    for made_by, internal in keys.items():
        names = list(internal)
        first = weights[id(made_by)] = given[names[0]]
        if bad := first.numel() - int(torch.isfinite(first).sum()):
            raise InputError(f"load_dense_state_dict(): {names[0]!r} holds {bad} weights that are NaN or infinite")
        if other := next((name for name in names if not torch.equal(given[name], first)), None):
            raise InputError(
                f"load_dense_state_dict(): {names[0]!r} and {other!r} are one tied weight of the model, and differ"
            )
    runs = _runs_to_restart(model, weights)
    renamed = {name: key for internal in keys.values() for name, key in internal.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)  # that masks are not in it
        model.load_state_dict({renamed.get(key, key): value for key, value in given.items()}, strict=False)
    for run in runs:
        run.restart()


def _entries(model: nn.Module) -> tuple[dict[str, Any], dict[ParametrizationList, dict[str, str]]]:
    """Return the values of the dense model by key, and the keys of each sparsified weight, dense and in this model.

    `model.state_dict()` would give parametrizations that left the meta device their values, from weights that are not
    loaded yet.
    """
    entries: dict[str, Any] = {}
    keys: dict[ParametrizationList, dict[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, Sparse):
            continue
        if isinstance(module, ParametrizationList) and isinstance(module[0], Sparse):
            owner, tensor_name = name.rsplit("parametrizations.", 1)
            keys.setdefault(module, {})[owner + tensor_name] = f"{prefix}original"
            entries[owner + tensor_name] = module.original
        else:
            module._save_to_state_dict(entries, prefix, True)
    return entries, keys


def _missing_counters(entries: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch counters of normalizations that an old checkpoint lacks; torch loads it all the same."""
    return {key: ours for key, ours in entries.items() if key.endswith("num_batches_tracked") and key not in given}


def _check_keys(missing: list[str], unexpected: list[str]) -> None:
    if any("parametrizations." in key for key in unexpected):
        raise InputError(
            "load_dense_state_dict(): this is the checkpoint of a sparsified model: load it with load_state_dict()"
        )
    if missing or unexpected:
        both = {"missing": missing, "unexpected": unexpected}
        texts = "; ".join(f"{kind} keys {listed(map(repr, keys), 8)}" for kind, keys in both.items() if keys)
        raise InputError(f"load_dense_state_dict(): {texts}. Give a checkpoint of the model before sparsify_()")


def _check_value(key: str, ours: Any, theirs: Any) -> None:
    if not isinstance(ours, Tensor) or is_lazy(ours):
        return
    if ours.is_meta or is_sharded(ours):
        where = "on the meta device" if ours.is_meta else "sharded"
        raise InputError(f"load_dense_state_dict(): {key!r} of the model is {where}: load before that")
    if not isinstance(theirs, Tensor):
        raise InputError(f"load_dense_state_dict(): {key!r} must be a tensor, got {theirs!r}")
    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
        shapes = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (theirs, ours))
        raise InputError(f"load_dense_state_dict(): {key!r} has shape {next(shapes)}, the model's is {next(shapes)}")


def _runs_to_restart(model: nn.Module, weights: Mapping[int, Tensor]) -> list[Any]:
    """Return the sparsifiers of the runs that have not begun.

    Args:
        model: the sparsified model.
        weights: to load, by the id of their ParametrizationList.
    """
    runs: dict[int, Any] = {}
    modules = {id(module): module for module in model.modules()}
    for part in modules.values():
        if not isinstance(part, Sparse) or part.clock is None or part.clock.step > 0:
            continue
        runs.update((id(run), run) for run in part.sparsifier)
        if not part.sparsifier and part.state():
            raise InputError(
                f"load_dense_state_dict(): the masks of {part.clock.method['method']} were made from other weights, "
                "and this copy of the model cannot make them anew: load the checkpoint before the model is copied"
            )
    for run in runs.values():
        run.drop_lost_layers()
        ids = {name: id(layer.places[0].parametrizations) for name, layer in run.layers.items()}
        if others := [name for name in ids if ids[name] not in modules]:
            raise InputError(
                f"load_dense_state_dict(): layers {listed(map(repr, others), 8)} were sparsified together with "
                "those of this model: give the whole model that sparsify_() was called on"
            )
        if all(each in weights for each in ids.values()):  # the weight of a normalized layer is not in the checkpoint
            start_ramp(run.method, run.plan, {name: weights[ids[name]] for name in ids}, {})
    return list(runs.values())


@torch.no_grad()
def merge_(module: nn.Module, delta: Tensor, tensor_name: str = "weight") -> float:
    """Add an update to the weight of a sparse layer, where its effective weight is not zero, in place.

    W ← W + Δ ⊙ 1{S ≠ 0}

    So the product of a low-rank adapter (LoRA) can be merged without filling the zeros. Under a learned threshold, a
    weight that the update brings below the threshold becomes zero; merge after `densify_` to avoid it.

    Args:
        module: the layer, plain or sparsified. Of a sparsified layer the dense weight is changed.
        delta: Δ, of the shape of the weight, such as `scale * B @ A`.
        tensor_name: the name of the weight in the module.

    Returns:
        The share of the update that was dropped, ‖Δ ⊙ 1{S = 0}‖ / ‖Δ‖, in [0, 1].

    Raises:
        InputError: the module has no such parameter; the shapes differ; a tensor is not floating point; the update is
            not finite.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0]])
        >>> round(merge_(layer, torch.tensor([[3.0, 4.0]])), 3), layer.weight.data
        (0.6, tensor([[0., 5.]]))
    """
    check_module(module)
    made_by = dict(getattr(module, "parametrizations", {})).get(tensor_name)
    if made_by is None:
        weight = module._parameters.get(tensor_name)
    else:
        weight = made_by.original if len(made_by) == 1 and isinstance(made_by[0], Sparse) else None
    if weight is None:
        raise InputError(
            f"merge_(): {tensor_name!r} of {type(module).__name__} is no parameter of its own or of a sparsified layer"
        )
    if not (isinstance(delta, Tensor) and delta.is_floating_point() and weight.is_floating_point()):
        got = delta.dtype if isinstance(delta, Tensor) else repr(delta)
        raise InputError(f"merge_(): weight and delta must be floating point, got {weight.dtype} and {got}")
    if delta.shape != weight.shape:
        raise InputError(
            f"merge_(): delta has shape {tuple(delta.shape)}, the weight {tuple(weight.shape)}; give the product of "
            "the low-rank factors"
        )
    if bad := delta.numel() - int(torch.isfinite(delta).sum()):
        raise InputError(f"merge_(): delta holds {bad} values that are NaN or infinite, of {delta.numel()}")
    delta = delta.to(weight.device, torch.promote_types(delta.dtype, torch.float32))
    update = torch.where(getattr(module, tensor_name) != 0, delta, 0.0)
    weight.add_(update)
    if made_by is not None:
        made_by[0].keep_state()
    dropped, whole = (float(torch.linalg.vector_norm(tensor)) for tensor in (delta - update, delta))
    return dropped / whole if whole > 0 else 0.0
