"""Sparse products in torch itself: layers swapped for a CSR product where that is faster here.

    y = W x + b, with W kept as its nonzero values, their columns, and where each row begins

A product with W in compressed sparse row (CSR) form takes time in proportion to the nonzero weights, but
far more for each of them than a dense product does: on CPUs it begins to pay somewhere above nine zeros
in ten, and where depends on the layer, the batch and the machine. So each layer is measured.
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
from sparing.export.network import largest_error, random_inputs
from sparing.layers import sparse_layers
from sparing.macs import Example


@dataclass(frozen=True)
class Swap:
    """What was found out about one layer.

    Attributes:
        name: of the module.
        sparsity: of its weight.
        dense_seconds: of the layer as it was, the median.
        csr_seconds: of the CSR product, the median; None if the layer is too dense to try.
        error: the largest difference between the two, as a fraction of the largest output.
        swapped: whether the CSR product is in its place now.
    """

    name: str
    sparsity: float
    dense_seconds: float | None
    csr_seconds: float | None
    error: float | None
    swapped: bool


class CSRLinear(nn.Module):
    """A Linear layer whose weight is stored without its zeros. For inference: no gradient reaches the weight.

    Args:
        layer: the layer to take weight and bias from.

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
        self.register_buffer("weight", _compress(layer.weight))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        product = self.weight @ x.reshape(-1, self.in_features).T
        if self.bias is not None:
            product = product + self.bias[:, None]
        return product.T.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for print."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nonzero={self.weight.values().numel()}"
        )


class CSRPointwise(nn.Module):
    """A 1×1 convolution, not grouped, not padded, whose weight is stored without its zeros. For inference.

    Args:
        layer: the convolution to take weight, bias and stride from.

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
        self.register_buffer("weight", _compress(layer.weight.flatten(1)))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        batch, channels, height, width = x.shape
        # One product for the whole batch: pixels of all images side by side.
        product = self.weight @ x.transpose(0, 1).reshape(channels, -1)
        if self.bias is not None:
            product = product + self.bias[:, None]
        return product.reshape(-1, batch, height, width).transpose(0, 1)

    def extra_repr(self) -> str:
        """Sizes, for print."""
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
    """Swap layers for CSR products where that is faster on this machine, in place.

    Every Linear and every plain 1×1 Conv2d that is sparse enough is timed both ways, in turns, on inputs
    of the shape it gets in the model, with as many threads as torch uses now. It is swapped if the
    CSR product is `least_gain` times as fast and gives the same numbers up to rounding.

    Args:
        model: plain, on the CPU; it is put into evaluation mode, and what is swapped can no longer train.
        example: the shape of one input, batch first, or tensors, as for `sparing.export.onnx.save`.
        batch: the batch size to be fast for.
        least_sparsity: layers below it are not tried.
        least_gain: how many times as fast a CSR product must be.
        rounds: turns of each.

    Returns:
        A `Swap` for each Linear and 1×1 Conv2d the model uses, swapped or not.

    Raises:
        InputError: the model is still sparsified, or not on the CPU.

    Examples:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> [swap.swapped for swap in accelerate_(model, (1, 256))]  # nothing is zero here
        [False, False]
    """
    if sparse_layers(model):
        raise InputError("the model is still sparsified; call sparing.densify_(model) first")
    elsewhere = {str(p.device) for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise InputError(f"the model is on {', '.join(sorted(elsewhere))}; CSR products are measured on the CPU")
    model.eval()
    seen = _inputs(model, example, batch)
    swaps = []
    for name, (layer, x) in seen.items():
        swap, made = _try(name, layer, x, least_sparsity, least_gain, rounds)
        swaps.append(swap)
        if swap.swapped:
            for path, module in list(model.named_modules(remove_duplicate=False)):
                if module is layer:
                    model.set_submodule(path, made)
    return swaps


def _compress(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return weight.detach().to_sparse_csr()


def _fits(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        plain = module.padding in ((0, 0), "valid") and module.groups == 1
        return module.kernel_size == (1, 1) and plain
    return type(module) is nn.Linear


def _inputs(model: nn.Module, example: Example, batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """The modules that could be swapped and run, each with an input it gets."""
    seen: dict[str, tuple[nn.Module, Tensor]] = {}
    # Their fused kernel takes the weights of these without calling them.
    fused = {
        part for each in model.modules() if isinstance(each, nn.TransformerEncoderLayer) for part in each.children()
    }
    names = {each: name for name, each in model.named_modules() if name and _fits(each) and each not in fused}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(names[module], (module, args[0].detach().clone()))

    handles = [module.register_forward_pre_hook(keep) for module in names]
    args, kwargs = random_inputs(example, batch)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _try(
    name: str, layer: Any, x: Tensor, least_sparsity: float, least_gain: float, rounds: int
) -> tuple[Swap, nn.Module]:
    weight = layer.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    if sparsity < least_sparsity:
        return Swap(name, sparsity, None, None, None, False), layer
    made = CSRLinear(layer) if isinstance(layer, nn.Linear) else CSRPointwise(layer)
    error = largest_error([layer(x)], [made(x)])
    dense, csr = _turns(lambda: layer(x), lambda: made(x), rounds)
    swapped = error < 1e-4 and dense >= least_gain * csr
    return Swap(name, sparsity, dense, csr, error, swapped), made


def _turns(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """The median seconds of each, a few calls a turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, mine in zip((first, second), seconds, strict=True):
            run()
            start = time.perf_counter()
            for _ in range(3):
                run()
            mine.append((time.perf_counter() - start) / 3)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
