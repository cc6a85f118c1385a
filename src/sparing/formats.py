"""Table of the file formats of `sparing export`."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparing import engine
from sparing.engine.file import contents
from sparing.export import compressed, mnn, onnx, openvino
from sparing.export.inputs import Example, find_inputs
from sparing.export.network import Written, check, check_values, outputs, plain, tolerance
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
    with atomic_write(path) as temporary:
        save_file(state, temporary)
    return Written(path, path.stat().st_size, 0.0)


def save_engine(model: nn.Module, path: Path, example: Example) -> Written:
    """Write an .engine file, and check its outputs against PyTorch."""
    from safetensors.torch import save_file

    fast = engine.compile(model, example)
    network = plain(model).float()  # the engine computes in float32
    example = tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, example)
    args, kwargs = find_inputs(network, example).sample(3)
    tensors, metadata = contents(fast)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
        got = outputs(engine.load(temporary), args, kwargs)
        error = check(str(path), outputs(network, args, kwargs), got, tolerance(network))
    return Written(path, path.stat().st_size, error)


FORMATS: dict[str, tuple[str, Save]] = {
    "compressed": ("compressed.safetensors", save_compressed),
    "safetensors": ("model.safetensors", save_safetensors),
    "engine": ("model.engine", save_engine),
    "onnx": ("model.onnx", onnx.save),
    "mnn": ("model.mnn", mnn.save),
    "openvino": ("model.xml", openvino.save),
}
"""Format name → default file name in a run directory, and the function that writes the file."""
