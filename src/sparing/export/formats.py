"""Table of the file formats of `sparing export`."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from sparing.errors import InputError
from sparing.export import compressed, mnn, native, onnx, openvino
from sparing.export.inputs import Example
from sparing.export.network import Written, check_values
from sparing.files import atomic_write
from sparing.sparsify import dense_state_dict

Save = Callable[[nn.Module, Path, Example], Written]


def save_compressed(model: nn.Module, path: Path, example: Example) -> Written:
    """Write the effective weights to a compressed file. The example is not used."""
    check_values(model)
    compressed.save(dense_state_dict(model), path)
    return Written(path, path.stat().st_size, 0.0)


def save_safetensors(model: nn.Module, path: Path, example: Example) -> Written:
    """Write the dense effective weights to an ordinary safetensors file. The example is not used."""
    from safetensors.torch import save_file

    check_values(model)
    dense = dense_state_dict(model)
    for name, tensor in dense.items():
        compressed.check_tensor(name, tensor)
    # Clone because safetensors rejects tensors that share memory.
    state: dict[str, Tensor] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in dense.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(state, temporary)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    return Written(path, path.stat().st_size, 0.0)


FORMATS: dict[str, tuple[str, Save]] = {
    "compressed": ("compressed.safetensors", save_compressed),
    "safetensors": ("model.safetensors", save_safetensors),
    "onnx": ("model.onnx", onnx.save),
    "mnn": ("model.mnn", mnn.save),
    "torch": ("model.pt2", native.save),
    "openvino": ("model.xml", openvino.save),
}
"""Format name → default file name in a run directory, and the function that writes the file."""
