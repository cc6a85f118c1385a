"""Sparse convolutions: outputs match PyTorch, and they replace dense convolutions only where they are faster."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing.export import native, network
from sparing.export.inputs import find_inputs
from sparing.export.runtimes import HUGE_PAGES, Process
from tolerance import near, relative_error, tolerance

pytest.importorskip("onnx", reason="onnx of sparing[export] is not installed")
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sparse_is_faster(monkeypatch):
    """Make the sparse convolution win every measurement."""
    monkeypatch.setattr(native, "_min_times", lambda first, second, rounds: (2.0, 1.0))


def convolve(x, weight, bias, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), relu=False):
    *compressed, geometry = native.compress(weight, x.shape[2:], stride, padding, dilation)
    return native.sparse_conv2d(x, *compressed, bias, residual, geometry, relu)


@pytest.mark.parametrize(
    ("size", "kernel", "geometry"),
    [
        ((14, 14), (1, 1), {}),  # number of pixels not a multiple of the vector length: the image is copied
        ((16, 16), (1, 1), {}),  # multiple of the vector length: the image is read without a copy
        ((1, 1), (1, 1), {}),
        ((9, 12), (1, 1), {"padding": (1, 2)}),
        ((9, 13), (1, 1), {"stride": (2, 2)}),
        ((14, 14), (3, 3), {"padding": (1, 1)}),
        ((7, 7), (3, 3), {}),
        ((32, 33), (7, 7), {"stride": (2, 2), "padding": (3, 3)}),
        ((13, 17), (3, 5), {"stride": (3, 1), "padding": (0, 2)}),
        ((13, 17), (3, 3), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 3)}),
        ((2, 3), (3, 3), {"padding": (4, 4)}),  # padding larger than the image
        ((1, 90), (1, 5), {"padding": (0, 2)}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2)])
def test_sparse_convolution_matches_conv2d(size, kernel, geometry, batch, threads):
    torch.manual_seed(0)
    weight = torch.randn(7, 70, *kernel) * (torch.rand(7, 70, *kernel) < 0.2)
    weight[3] = 0  # the output of an all-zero filter is its bias
    x, bias = torch.randn(batch, 70, *size), torch.randn(7)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), **geometry)
    residual = torch.randn(expected.shape)
    squares = F.conv2d(x.double() ** 2, weight.double() ** 2, bias.double() ** 2, **geometry) + residual**2
    terms = int((weight != 0).flatten(1).sum(1).max()) + 2
    close = {"rtol": 0.0, "atol": tolerance(torch.float32, terms, squares.max().sqrt())}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(convolve(x, weight, bias, **geometry).double(), expected, **close)
        got = convolve(x.to(memory_format=torch.channels_last), weight, bias, residual, relu=True, **geometry)
        torch.testing.assert_close(got.double(), F.relu(expected + residual), **close)
    finally:
        torch.set_num_threads(before)


def test_relu_keeps_nan():
    x = torch.full((1, 1, 4, 4), float("nan"))
    assert convolve(x, torch.ones(1, 1, 1, 1), torch.zeros(1), relu=True).isnan().all()


def test_other_image_size_or_dtype_raises():
    *compressed, geometry = native.compress(torch.ones(1, 2, 3, 3), (32, 32), (1, 1), (0, 0), (1, 1))
    for wrong in (torch.randn(1, 2, 8, 8), torch.randn(1, 2, 32, 32).double()):
        with pytest.raises(sparing.InputError, match=r"must have shape \[N, 2, 32, 32\] and dtype torch.float32, got"):
            native.sparse_conv2d(wrong, *compressed, torch.zeros(1), None, geometry, False)


class Block(nn.Module):
    """Model with convolutions before and after batch normalization, sums, ReLU, pooling and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.last = nn.Conv2d(16, 4, 3, padding="same")
        self.pool = nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((2, 1), (1, 1)))

    def forward(self, x, scale):
        x = self.pool(self.stem(x))
        y = F.relu(self.first(x) + self.second(x))  # one convolution is the residual of the other
        y = self.second(x) + y.mean((2, 3), keepdim=True)  # another shape: not a residual
        z = self.depthwise(y)
        return self.last(z) * scale, z + self.second(y)[:, :, 1:-1, 1:-1]


def sparse_block():
    torch.manual_seed(0)
    model = Block()
    sparing.sparsify_(model, sparing.StaticRandom(budget=sparing.Budget.uniform(model, 0.8)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def test_accelerated_network_outputs_match(sparse_is_faster):
    model, example = sparse_block(), {"scale": torch.ones(1, 1, 1, 1), "x": torch.randn(1, 3, 30, 30)}
    written = native.save(model, "block.pt2", example)
    plain = network.plain(model)
    allowed = relative_error(plain, torch.randn(4, 3, 30, 30), torch.randn(4, 1, 1, 1))
    assert written.error < allowed
    loaded = native.load("block.pt2")
    assert "sparse_conv2d" in loaded.code
    assert "batch_norm" not in loaded.code
    assert loaded.code.count("sparing.max_pool2d") == 2
    for batch in (1, 4):  # the batch size is dynamic
        args, kwargs = find_inputs(plain, example).sample(batch)
        expected = network.outputs(plain, args, kwargs)
        assert network.max_relative_error(expected, network.outputs(loaded, args, kwargs)) < allowed
    with Process("torch_sparse", "block.pt2", threads=1) as process:  # keyword inputs, in the order of the example
        got = process.run([tensor.numpy() for tensor in kwargs.values()])
    assert network.max_relative_error(expected, got) < allowed


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the environment of a process cannot be read")
@pytest.mark.parametrize(("setting", "tunables"), [(None, HUGE_PAGES), ("", "")])
def test_process_uses_huge_pages_unless_glibc_tunables_is_set(monkeypatch, setting, tunables):
    if setting is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", setting)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), "linear.pt2")
    with Process("torch_eager", "linear.pt2", threads=1) as process:
        environment = Path(f"/proc/{process._process.pid}/environ").read_text().split("\0")
    assert f"GLIBC_TUNABLES={tunables}" in environment


def test_every_supported_convolution_is_timed(sparse_is_faster):
    example = {"scale": torch.ones(1, 1, 1, 1), "x": torch.randn(1, 3, 30, 30)}
    graph, choices = native.accelerate(sparse_block(), example)
    assert [(choice.name, choice.sparse) for choice in choices] == [
        ("stem.0.weight", True),
        ("first.0.weight", True),
        ("second.0.weight", True),
        ("second.0.weight", True),
        ("second.0.weight", True),
    ]
    assert all(0.75 < choice.sparsity < 0.85 and choice.dense_seconds == 2 for choice in choices)
    assert graph.code.count("aten.conv2d") == 2, "the depthwise convolution and the one with padding='same'"
    assert graph.code.count("relu") == 0, "every ReLU is fused into a convolution"


def test_slower_and_dense_convolutions_are_not_replaced(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval()
    with torch.no_grad():
        model[0].weight[:6] = 0
    monkeypatch.setattr(native, "_min_times", lambda first, second, rounds: (1.0, 2.0))
    graph, (first, second) = native.accelerate(model, (1, 3, 9, 9))
    assert (first.sparse, first.dense_seconds, first.sparse_seconds) == (False, 1.0, 2.0)
    assert (second.sparse, second.sparsity, second.dense_seconds) == (False, 0, None)
    assert "sparse_conv2d" not in graph.code
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(graph(x), model(x), **near(model, x))


def test_min_times_alternates_and_measures():
    calls = []
    first, second = native._min_times(lambda: calls.append(1), lambda: calls.append(2), 3)
    assert 0 < first < 1
    assert 0 < second < 1
    assert calls == [1, 1, 2, 2] * 3


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("absent++", r"C\+\+ compiler 'absent\+\+' not found; install GCC or Clang, or set CXX"),
        ("false", r"C\+\+ compiler 'false' cannot compile native.cpp: exit status 1"),
    ],
)
def test_missing_or_failing_compiler_raises(monkeypatch, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    native.library.cache_clear()
    with pytest.raises(sparing.InputError, match=message):
        native.accelerate(nn.Conv2d(3, 3, 3), (1, 3, 9, 9))
    with pytest.raises(sparing.InputError, match=message):
        native.save(nn.Conv2d(3, 3, 3), "no.pt2", (1, 3, 9, 9))
    assert not list(Path().iterdir())
    monkeypatch.undo()
    native.library.cache_clear()


class Streaming(nn.Module):
    """Convolution over a window of frames that the caller keeps, with a recurrent layer and its state."""

    def __init__(self):
        super().__init__()
        self.convolution, self.layer = nn.Conv2d(1, 4, 3), nn.GRU(4 * 6, 8)

    def forward(self, frames, state):
        y = self.convolution(frames).flatten(1)
        return self.layer(y[None], state)


def test_batch_of_a_state_is_dynamic(sparse_is_faster):
    model = Streaming().eval()
    with torch.no_grad():
        model.convolution.weight[:3] = 0
    native.save(model, "model.pt2", (torch.randn(1, 1, 4, 5), torch.randn(1, 1, 8)))
    loaded, plain = native.load("model.pt2"), network.plain(model)
    assert "sparse_conv2d" in loaded.code
    for batch in (1, 5):
        inputs = torch.randn(batch, 1, 4, 5), torch.randn(1, batch, 8)
        torch.testing.assert_close(loaded(*inputs), plain(*inputs), **near(plain, *inputs))


def test_batch_size_is_fixed_with_one_warning(sparse_is_faster):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.convolution(x) if len(x) < 3 else x

    model = Branch().eval()
    with torch.no_grad():
        model.convolution.weight[:3] = 0
    with pytest.warns(sparing.SparsityWarning, match="the batch size is fixed at that of the example") as found:
        native.save(model, "model.pt2", (2, 1, 5, 5))
    assert len(found) == 1
    x = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(native.load("model.pt2")(x), model(x), **near(model, x))


def test_bf16_model_stays_in_bf16(sparse_is_faster):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).bfloat16()
    native.save(model, "model.pt2", (1, 1, 5, 5))
    assert native.load("model.pt2")(torch.ones(3, 1, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_program_that_cannot_be_written_raises():
    class Named(nn.Module):
        def forward(self, x):
            return namedtuple("Pair", "one other")(x, x + 1)

    with pytest.raises(sparing.InputError, match="torch.export cannot write the network: .*namedtuple"):
        native.save(Named(), "no.pt2", (1, 3))
    assert not list(Path().iterdir())


def test_unwritable_path_raises():
    with pytest.raises(sparing.InputError, match="nowhere/no.pt2 cannot be written: No such file"):
        native.save(nn.Conv2d(3, 3, 3), "nowhere/no.pt2", (1, 3, 9, 9))
