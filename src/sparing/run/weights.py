"""Files of weights: the starting weights of a run, and the effective weights that it writes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import CheckpointError, InputError, listed
from sparing.export import compressed
from sparing.files import atomic_write, open_regular
from sparing.sparsify import dense_state_dict

WRAPPERS = ("state_dict", "model")
"""Keys under which training scripts store the weights of a model in a checkpoint."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, without running code from it.

    Args:
        path: a .safetensors file, compressed or not, or a checkpoint of PyTorch: a state dict, or a dict that has it
            under the key "state_dict" or "model".

    Raises:
        CheckpointError: the file cannot be read, or holds something else, such as sparse or quantized tensors.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with open_regular(path) as stream:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    is_compressed = "sparing.compressed" in (file.metadata() or {})
                return _checked(path, compressed.load(path) if is_compressed else load_file(path))
            found: Any = torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:  # of a compressed file
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: unreadable or truncated ({_reason(error)})") from error
    except Exception as error:  # torch raises errors of many types on damaged files
        raise CheckpointError(
            f"checkpoint {path}: unreadable, or no checkpoint with weights only ({_reason(error)})"
        ) from error
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, Mapping) and any(".parametrizations." in str(key) for key in found):
        raise CheckpointError(
            f"checkpoint {path}: holds a sparsified model in training; give the model.safetensors of its run"
        )
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise CheckpointError(f"checkpoint {path}: holds no state dict, a mapping from names to tensors")
    return _checked(path, {str(key): tensor for key, tensor in found.items()})


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        for key, tensor in tensors.items():
            compressed.check_tensor(key, tensor)
    except InputError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    return tensors


def load_weights(model: nn.Module, path: Path, sha256: str | None = None) -> None:
    """Load starting weights into a model that is not sparsified yet, in place.

    Args:
        model: the model.
        path: the file, see `read_weights`.
        sha256: checksum that the file must have; None takes any file.

    Raises:
        CheckpointError: the file cannot be read or has another checksum; a tensor is missing, unexpected, or of another
            shape; a weight is an integer, NaN or infinite in the dtype of the model. The model is then as it was.
    """
    if sha256 is not None and checksum(path) != sha256:
        raise CheckpointError(f"checkpoint {path}: has changed since the run was started; its checksum is another one")
    state, own = read_weights(path), model.state_dict()
    place = {key: (tensor.data_ptr(), tensor.shape) for key, tensor in own.items()}
    given = {place.get(key) for key in state}  # a tied weight needs one of its names
    for kind, names in (
        ("misses", [key for key in own if key not in state and place[key] not in given]),
        ("has unexpected tensors", [key for key in state if key not in own]),
    ):
        if names:
            raise CheckpointError(f"checkpoint {path}: does not fit the model: it {kind} {listed(map(repr, names), 5)}")
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            shapes = f"shape {tuple(tensor.shape)}, the model needs {tuple(own[key].shape)}"
            raise CheckpointError(f"checkpoint {path}: does not fit the model: {key!r} has {shapes}")
        dtype = own[key].dtype
        if dtype.is_floating_point and not tensor.is_floating_point():
            dtypes = f"dtype {tensor.dtype}, the model needs {dtype}"
            raise CheckpointError(f"checkpoint {path}: does not fit the model: {key!r} has {dtypes}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise CheckpointError(f"checkpoint {path}: {key!r} holds values that are NaN or infinite")
    model.load_state_dict(state, strict=False)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: unreadable or truncated ({error.strerror})") from error
    return digest.hexdigest()


def write_weights(model: nn.Module, out: Path) -> None:
    """Write the effective weights of a model to a directory: model.safetensors and compressed.safetensors."""
    from safetensors.torch import save_file

    # Cloned because safetensors rejects tensors that share memory, and contiguous because it has no memory formats.
    plain = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in dense_state_dict(model).items()
    }
    with atomic_write(out / "model.safetensors") as temporary:
        save_file(plain, temporary)
    compressed.save(plain, out / "compressed.safetensors")


def load_fitting(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a state dict into the model that it was saved from.

    Raises:
        CheckpointError: it does not fit the model; the message names the file.
    """
    try:
        model.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: does not fit the recipe ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
