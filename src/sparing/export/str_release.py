"""Convert checkpoints of the 2020 STR release to state dicts of `sparing.models`.

A checkpoint is a pickle of {"state_dict": ..., "epoch": ..., "optimizer": ...}. The keys of the state dict have the
prefix `module.` of DataParallel. Each convolution has a dense `weight` and, if the layer was trained with STR, a
`sparseThreshold`: the s of the layer, of shape (1, 1). The classifier is a 1×1 convolution with a weight of shape
(classes, features, 1, 1). The module names are the same as in `sparing.models`.

Source: the repository RAIVNLab/STR (models/, utils/conv_type.py, main.py).
"""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparing.errors import CheckpointError, InputError, listed, nearest
from sparing.files import atomic_write
from sparing.models import MODELS
from sparing.threshold import soft_threshold

ARCHITECTURES = ("resnet18", "resnet50", "mobilenet_v1")
"""Supported architectures, by their name in `sparing.models`."""

Naming = Literal["sparing", "torchvision", "timm"]
"""Libraries whose ResNet can load a converted state dict."""

THRESHOLD = ".sparseThreshold"

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
"""dtypes of weights and statistics, and int64 for the number of batches that normalization has counted."""


def convert(path: str | Path, arch: str, *, keep_thresholds: bool = False) -> dict[str, Tensor]:
    """Convert a checkpoint of the release to a state dict for the same network in `sparing.models`.

    With `keep_thresholds=False`, each weight W with a threshold is replaced by its effective weight:

        sign(W) · relu(|W| − sigmoid(s))

    The result loads into `MODELS[arch]()` with `strict=True`. The weights of a file without thresholds ("dense
    compatible" in the release) are not changed. Checkpoints of DNW and GMP give dense weights because the release does
    not save their masks.

    With `keep_thresholds=True`, the result loads with `strict=True` into a model after `sparsify_` with `STR()` on the
    layers that have a threshold.

    Args:
        path: checkpoint file.
        arch: one of `ARCHITECTURES`.
        keep_thresholds: return W and s separately, to continue training or to inspect them.

    Returns:
        Tensors on the CPU by name. Weights keep their dtype; s is float32 of shape (1,).

    Raises:
        InputError: `arch` is unknown; `keep_thresholds` is set and the file has no thresholds.
        CheckpointError: the file is missing or truncated; it has objects other than tensors and plain values; its keys
            or shapes do not match the architecture.

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
    _check_architecture(where, tensors, arch)
    for name, s in thresholds.items():
        if f"{name}.weight" not in tensors:
            raise CheckpointError(f"{where}: layer {name!r} has a threshold but no weight")
        if s.numel() != 1 or not s.is_floating_point():
            raise CheckpointError(
                f"{where}: the threshold of {name!r} must be a floating point tensor with one element, "
                f"got {s.dtype} of shape {tuple(s.shape)}"
            )
        if bool(s.isnan()):
            raise CheckpointError(f"{where}: the threshold of {name!r} is NaN")
    if keep_thresholds and not thresholds:
        raise InputError(f"{where}: has no thresholds; convert it without keeping thresholds")
    for name, s in thresholds.items():
        weight = tensors.pop(f"{name}.weight")
        if keep_thresholds:
            tensors[f"{name}.parametrizations.weight.original"] = weight
            tensors[f"{name}.parametrizations.weight.0.s"] = s.reshape(1).float()
            # No clock: the run is over.
            tensors[f"{name}.parametrizations.weight.0._extra_state"] = torch.empty(0, dtype=torch.uint8)
        else:
            tensors[f"{name}.weight"] = soft_threshold(weight, torch.sigmoid(s.reshape(1)))
    return tensors


def convert_file(
    path: str | Path, arch: str, out: str | Path, *, keep_thresholds: bool = False, names: Naming = "sparing"
) -> dict[str, int | None]:
    """Convert a checkpoint of the release to a .safetensors file.

    Args:
        path: checkpoint file.
        arch: one of `ARCHITECTURES`.
        out: the file to write.
        keep_thresholds: as of `convert`.
        names: library whose ResNet loads the file; "torchvision" and "timm" add a classifier bias of zero.

    Returns:
        Numbers of weights, of nonzero weights (None with `keep_thresholds`), and of thresholds.

    Raises:
        InputError: as `convert` and `with_bias`; the file cannot be written.
    """
    from safetensors.torch import save_file

    state = convert(path, arch, keep_thresholds=keep_thresholds)
    if names != "sparing":
        state = with_bias(state, arch)
    with atomic_write(out) as temporary:
        # Clone because safetensors rejects tensors that share memory.
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, temporary)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    return {
        "weights": sum(weight.numel() for weight in weights),
        "nonzero": None if keep_thresholds else sum(int(torch.count_nonzero(weight)) for weight in weights),
        "thresholds": sum(key.endswith(".s") for key in state),
    }


def with_bias(state: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """Return the state dict of a ResNet for torchvision and timm: add a zero bias to the classifier.

    All other names and shapes are the same in torchvision, timm and `sparing.models`.

    Args:
        state: a state dict from `convert`, without thresholds.
        arch: a ResNet of `ARCHITECTURES`.

    Raises:
        InputError: `arch` is not a ResNet, or the state dict has thresholds.

    Examples:
        >>> with_bias({"fc.weight": torch.ones(10, 4)}, "resnet50")["fc.bias"].shape
        torch.Size([10])
    """
    if not arch.startswith("resnet"):
        raise InputError(f"torchvision and timm have no equivalent of {arch!r}; choose a ResNet")
    if "fc.weight" not in state:
        raise InputError(
            "torchvision and timm cannot load thresholds; convert the checkpoint without keeping thresholds"
        )
    weight = state["fc.weight"]
    return {**state, "fc.bias": weight.new_zeros(len(weight))}


def _read(path: Path) -> dict[str, Tensor]:
    """Read the state dict without the prefix `module.`, with weights_only=True so that no code in the file runs."""
    where = f"checkpoint {path}"
    if not path.is_file():
        raise CheckpointError(f"{where}: there is no such file")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises exceptions of many types on a damaged file: RuntimeError, EOFError, KeyError, ...
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{where}: has objects other than tensors and plain values, such as {named[1]}, and loading them could "
                "run code; if you trust the file, save only its 'state_dict' to a new file and convert that file"
            ) from error
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise CheckpointError(f"{where}: unreadable or truncated ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{where}: has no 'state_dict' of tensors")
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = str(key).removeprefix("module.")
        if name in tensors:
            raise CheckpointError(f"{where}: has tensor {name!r} twice, with and without the prefix 'module.'")
        problem = _find_problem(tensor)
        if problem is not None:
            raise CheckpointError(f"{where}: tensor {name!r} {problem}")
        tensors[name] = tensor.detach()
    return tensors


def _find_problem(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be one of a checkpoint of the release, or None if it can."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        return f"has dtype {tensor.dtype} and layout {tensor.layout}; the release has dense floating point tensors"
    if tensor.is_meta:
        return "has no values"
    # A file of a few bytes can have a tensor of terabytes that repeats one number.
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"of shape {tuple(tensor.shape)} has more elements than the file has numbers for it"
    return None


def _numpy_scalars() -> list[Any]:
    """Return the globals that torch.load must allow to read a NumPy scalar, which cannot run code.

    The release computes its learning rate with NumPy, so the optimizer state has NumPy scalars.
    """
    try:
        import numpy as np
    except ImportError:
        return []
    scalar = np.float64(0).__reduce__()[0]
    # NumPy moved the function from numpy.core to numpy._core. Old files have the old name.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(code)) for code in ("f4", "f8", "i8"))]


def _flat_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reshape the classifier from a 1×1 convolution to the weight of a Linear layer."""
    weight = state.get("fc.weight")
    return state if weight is None or weight.shape[2:] != (1, 1) else {**state, "fc.weight": weight.flatten(1)}


def _check_architecture(where: str, tensors: dict[str, Tensor], arch: str) -> None:
    problem = _mismatch(tensors, arch)
    if problem is None:
        return
    matching = [other for other in ARCHITECTURES if _mismatch(tensors, other) is None]
    hint = f"; the checkpoint is a {matching[0]}" if matching else ""
    raise CheckpointError(f"{where}: is not a {arch} ({problem}){hint}")


def _mismatch(tensors: dict[str, Tensor], arch: str) -> str | None:
    """Return the first difference between the tensors and the architecture, or None if they match."""
    classifier = tensors.get("fc.weight")
    classes = len(classifier) if classifier is not None and classifier.dim() == 2 and len(classifier) else 1000
    with torch.device("meta"):
        expected = MODELS[arch](num_classes=classes).state_dict()
    for what, keys in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if keys:
            return f"{what} key {listed(map(repr, sorted(keys)), 1)}"
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            return f"{key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
        if tensors[key].is_floating_point() != tensor.is_floating_point():
            return f"{key!r} has dtype {tensors[key].dtype}, expected {tensor.dtype}"
    return None
