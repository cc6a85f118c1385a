"""Checkpoints of the 2020 release of STR, as state dicts that `sparing.models` loads.

The release writes pickles of {"state_dict": ..., "epoch": ..., "optimizer": ...}. A key of the state
dict begins with the `module.` of DataParallel. For every convolution it has the dense `weight` and,
where that layer was trained with STR, `sparseThreshold`, the s of that layer, of shape (1, 1). The
classifier is a 1×1 convolution: its weight is (classes, features, 1, 1). Module names are those of
`sparing.models`.

Source: the repository RAIVNLab/STR (models/, utils/conv_type.py, main.py).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.errors import CheckpointError, InputError, nearest
from sparing.models import MODELS
from sparing.threshold import soft_threshold

ARCHITECTURES = ("resnet18", "resnet50", "mobilenet_v1")
"""The architectures of the release, by their names in `sparing.models`."""

THRESHOLD = ".sparseThreshold"


def convert(path: str | Path, arch: str, *, keep_thresholds: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint of the release as a state dict of the same network in `sparing.models`.

    Without thresholds every weight W that has an s becomes sign(W) · relu(|W| − sigmoid(s)), zeros
    included. The result loads strictly into `MODELS[arch]()`. A file without thresholds, "dense
    compatible" in the words of the release, is taken as it is. Those of DNW and GMP hold the weights
    without their masks, and the release nowhere saves the masks: they come out dense.

    With thresholds the result loads strictly into the model after `sparsify_` with `STR()`, of the
    layers that have an s.

    Args:
        path: the file.
        arch: one of `ARCHITECTURES`.
        keep_thresholds: keep weights and s apart, to train on or to look at.

    Returns:
        Tensors on the CPU. Weights keep their dtype, s is float32 of shape (1,).

    Raises:
        InputError: `arch` is unknown; thresholds are to be kept and there are none.
        CheckpointError: the file is missing, truncated, or holds more than tensors and plain values;
            its keys or shapes are not those of the architecture.

    Examples:
        >>> state = convert("resnet50.pth", "resnet50")  # doctest: +SKIP
        >>> sparing.models.resnet50().load_state_dict(state)  # doctest: +SKIP
        <All keys matched successfully>
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"unknown architecture {arch!r}; {nearest(arch, ARCHITECTURES)}")
    where = f"checkpoint {path}"
    state = _flat_classifier(_read(Path(path)))
    tensors = {key: tensor for key, tensor in state.items() if not key.endswith(THRESHOLD)}
    thresholds = {key.removesuffix(THRESHOLD): s for key, s in state.items() if key.endswith(THRESHOLD)}
    _check_fits(where, tensors, arch)
    for name, s in thresholds.items():
        if f"{name}.weight" not in tensors:
            raise CheckpointError(f"{where}: a threshold stands at {name!r}, where there is no weight")
        if s.numel() != 1 or not s.is_floating_point():
            raise CheckpointError(
                f"{where}: the threshold of {name!r} is {s.dtype} of shape {tuple(s.shape)}, not one s"
            )
    if keep_thresholds and not thresholds:
        raise InputError(f"{where}: holds no thresholds to keep; convert it without them")
    for name, s in thresholds.items():
        weight = tensors.pop(f"{name}.weight")
        if keep_thresholds:
            tensors[f"{name}.parametrizations.weight.original"] = weight
            tensors[f"{name}.parametrizations.weight.0.s"] = s.reshape(1).float()
        else:
            tensors[f"{name}.weight"] = soft_threshold(weight, torch.sigmoid(s.reshape(1)))
    return tensors


def with_bias(state: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """The state dict of a ResNet as torchvision and timm name it: a bias of the classifier is added, zero.

    All other names and shapes are the same there already.

    Raises:
        InputError: `arch` is none of the ResNets, or the state dict keeps thresholds.

    Examples:
        >>> with_bias({"fc.weight": torch.ones(10, 4)}, "resnet50")["fc.bias"].shape
        torch.Size([10])
    """
    if not arch.startswith("resnet"):
        raise InputError(f"torchvision and timm have no network with the layers of {arch!r}; only the ResNets go there")
    if "fc.weight" not in state:
        raise InputError("a state dict with thresholds is for sparing alone; convert it without them")
    weight = state["fc.weight"]
    return {**state, "fc.bias": weight.new_zeros(len(weight))}


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of the file without the `module.` before its keys. No code in the file is run."""
    where = f"checkpoint {path}"
    if not path.is_file():
        raise CheckpointError(f"{where}: there is no such file")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises almost anything on a damaged file: RuntimeError, EOFError, KeyError ...
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{where}: holds more than tensors and plain values, {named[1]} for one, and loading that could run "
                "code; where you trust the file, save its 'state_dict' alone and convert that"
            ) from error
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise CheckpointError(f"{where}: unreadable or truncated ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{where}: holds no 'state_dict' of tensors")
    return {str(key).removeprefix("module."): tensor.detach() for key, tensor in state.items()}


def _numpy_scalars() -> list[Any]:
    """What torch needs to read a NumPy number, which is data and no code.

    The release computes its learning rate with NumPy, so its checkpoints hold one in the optimizer.
    """
    try:
        import numpy as np
    except ImportError:
        return []
    scalar = np.float64(0).__reduce__()[0]
    # NumPy has moved the function; files name it as it was called when they were written.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(code)) for code in ("f4", "f8", "i8"))]


def _flat_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A 1×1 convolution on one pixel is a matrix product."""
    weight = state.get("fc.weight")
    return state if weight is None or weight.shape[2:] != (1, 1) else {**state, "fc.weight": weight.flatten(1)}


def _check_fits(where: str, tensors: dict[str, Tensor], arch: str) -> None:
    problem = _misfit(tensors, arch)
    if problem is None:
        return
    fitting = [other for other in ARCHITECTURES if _misfit(tensors, other) is None]
    hint = f"; it is a {fitting[0]}" if fitting else ""
    raise CheckpointError(f"{where}: is not a {arch} ({problem}){hint}")


def _misfit(tensors: dict[str, Tensor], arch: str) -> str | None:
    """What keeps these tensors from being the architecture's, or None."""
    classifier = tensors.get("fc.weight")
    classes = len(classifier) if classifier is not None and classifier.dim() == 2 and len(classifier) else 1000
    with torch.device("meta"):
        wanted = MODELS[arch](num_classes=classes).state_dict()
    for what, keys in (("lacks", wanted.keys() - tensors.keys()), ("has also", tensors.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return f"it {what} {min(keys)!r}{more}"
    for key, tensor in wanted.items():
        if tensors[key].shape != tensor.shape:
            return f"{key!r} has shape {tuple(tensors[key].shape)}, not {tuple(tensor.shape)}"
    return None
