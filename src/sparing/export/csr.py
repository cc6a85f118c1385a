"""Replace Linear layers and 1×1 convolutions by CSR products in PyTorch where that is faster.

    y = W x + b,    W in compressed sparse row (CSR) format: nonzero values, column indices, row offsets

The time of a CSR product is proportional to the number of nonzero weights, but the time per weight is much higher
than in a dense product. On CPUs the break-even sparsity is above 90 % and depends on the layer, the batch size and
the machine, so each layer is timed.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.export.inputs import Example, find_inputs
from sparing.export.network import check_weights, max_relative_error
from sparing.layers import sparse_layers


@dataclass(frozen=True)
class Swap:
    """Measurement of one layer.

    Attributes:
        name: module name.
        sparsity: sparsity of the weight, in [0, 1].
        dense_seconds: median time of the dense layer in seconds; None if the layer was not timed.
        csr_seconds: median time of the CSR product in seconds; None if the layer was not timed.
        error: maximum relative error of the CSR product against the dense layer; None if the layer was not timed.
        swapped: whether the layer was replaced by the CSR product.
    """

    name: str
    sparsity: float
    dense_seconds: float | None
    csr_seconds: float | None
    error: float | None
    swapped: bool


class CSRLinear(nn.Module):
    """Compute a Linear layer with its weight in CSR format. For inference only: the weight gets no gradient.

    Args:
        layer: the layer whose weight and bias to copy.

    Examples:
        >>> layer = nn.Linear(64, 32)
        >>> with torch.no_grad():
        ...     _ = layer.weight.masked_fill_(torch.rand(32, 64) < 0.9, 0)
        >>> x = torch.randn(5, 64)
        >>> torch.allclose(CSRLinear(layer)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight: Tensor
        self.register_buffer("weight", _to_csr(layer.weight))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map an input (..., in_features) to an output (..., out_features)."""
        product = self.weight @ x.reshape(-1, self.in_features).T
        if self.bias is not None:
            product = product + self.bias[:, None]
        return product.T.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(module)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nonzero={self.weight.values().numel()}"
        )


class CSRPointwise(nn.Module):
    """Compute a 1×1 convolution with its weight in CSR format. For inference only: the weight gets no gradient.

    Args:
        layer: the convolution whose weight, bias and stride to copy, without groups and padding.

    Examples:
        >>> layer = nn.Conv2d(16, 8, 1, stride=2)
        >>> x = torch.randn(2, 16, 6, 6)
        >>> torch.allclose(CSRPointwise(layer)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.stride = layer.stride
        self.weight: Tensor
        self.register_buffer("weight", _to_csr(layer.weight.flatten(1)))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map an input (N, in_channels, H, W) to an output (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        batch, channels, height, width = x.shape
        # One product for the whole batch: the columns are the pixels of all images.
        product = self.weight @ x.transpose(0, 1).reshape(channels, -1)
        if self.bias is not None:
            product = product + self.bias[:, None]
        return product.reshape(-1, batch, height, width).transpose(0, 1)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(module)`."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, nonzero={self.weight.values().numel()}"


def accelerate_(
    model: nn.Module,
    example: Example,
    *,
    batch: int = 1,
    least_sparsity: float = 0.8,
    least_gain: float = 1.1,
    rounds: int = 9,
) -> list[Swap]:
    """Replace layers by CSR products where that is faster on this machine, in place.

    Time every Linear layer and every 1×1 Conv2d without groups and padding, dense and as a CSR product, in alternating
    order. The inputs have the shape that the layer gets in the model, and the number of threads is
    `torch.get_num_threads()`. A layer is replaced if the speedup is at least `least_gain` and the outputs agree up to
    rounding.

    Args:
        model: a densified model on the CPU. It is switched to evaluation mode. Replaced layers cannot be trained.
        example: the shape of one input, batch first, or tensors, as for `sparing.export.onnx.save`.
        batch: batch size to optimize for.
        least_sparsity: minimum sparsity, in [0, 1]; layers below it are not timed.
        least_gain: minimum speedup of the CSR product.
        rounds: number of measurements of each variant.

    Returns:
        A `Swap` for each Linear layer and 1×1 Conv2d that the model uses, whether it was replaced or not.

    Raises:
        InputError: the model is sparsified or quantized, or not on the CPU, or does not run on the example.

    Examples:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> [swap.swapped for swap in accelerate_(model, (1, 256))]  # the weights are dense
        [False, False]
    """
    if sparse_layers(model):
        raise InputError("the model is sparsified; call sparing.densify_(model) first")
    devices = {str(p.device) for p in model.parameters()} - {"cpu"}
    if devices:
        raise InputError(f"the model must be on the CPU, got parameters on {', '.join(sorted(devices))}")
    check_weights(model)
    model.eval()
    swaps = []
    for name, (layer, x) in _record_inputs(model, example, batch).items():
        swap, replacement = _measure(name, layer, x, least_sparsity, least_gain, rounds)
        swaps.append(swap)
        if swap.swapped:
            for path, module in list(model.named_modules(remove_duplicate=False)):
                if module is layer:
                    model.set_submodule(path, replacement)
    return swaps


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return weight.detach().to_sparse_csr()


def _is_supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid") and module.groups == 1
    return type(module) is nn.Linear


def _record_inputs(model: nn.Module, example: Example, batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Run the model once. Return each supported module that ran, by name, with its first input."""
    inputs: dict[str, tuple[nn.Module, Tensor]] = {}
    # The fused transformer kernel uses the weights of these child modules without calling them.
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    fused = {child for encoder in encoders for child in encoder.children()}
    supported = {module: name for name, module in model.named_modules() if name and _is_supported(module)}
    names = {module: name for module, name in supported.items() if module not in fused}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(names[module], (module, args[0].detach().clone()))

    args, kwargs = find_inputs(model, example).sample(batch)
    handles = [module.register_forward_pre_hook(record) for module in names]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def _measure(
    name: str, layer: Any, x: Tensor, least_sparsity: float, least_gain: float, rounds: int
) -> tuple[Swap, nn.Module]:
    weight = layer.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    if sparsity < least_sparsity:
        return Swap(name, sparsity, None, None, None, False), layer
    replacement = CSRLinear(layer) if isinstance(layer, nn.Linear) else CSRPointwise(layer)
    error = max_relative_error([layer(x)], [replacement(x)])
    dense, csr = _median_times(lambda: layer(x), lambda: replacement(x), rounds)
    swapped = error < 1e-4 and dense >= least_gain * csr
    return Swap(name, sparsity, dense, csr, error, swapped), replacement


def _median_times(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """Return the median seconds per call of two functions, timed in alternating order, three calls per round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, times in zip((first, second), seconds, strict=True):
            run()
            start = time.perf_counter()
            for _ in range(3):
                run()
            times.append((time.perf_counter() - start) / 3)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
