"""The compiler of the engine: which operators run in the engine, in which segments, and that the outputs are right."""

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, namedtuple
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import sparing
from sparing.engine.attention import Attention
from sparing.engine.library import openmp
from sparing.engine.operations import Affine, Convolution, Copy, Mean
from sparing.engine.segment import Port, Segment
from sparing.engine.shapes import Count, Images, Matrix, Window
from sparing.export.inputs import find_inputs
from sparing.export.network import max_relative_error, outputs

pytestmark = pytest.mark.usefixtures("engine_library")


@torch.no_grad()
def sparse(model, density=0.4):
    """Give a model sparse weights that keep the scale of the activations, and statistics to batch norm."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=(2 / (fan_in * density)) ** 0.5)
            module.weight *= torch.rand_like(module.weight) < density
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.normal_()
            module.bias.normal_()
    return model.eval()


def compiled(model, example, **options):
    """Compile a model and compare its outputs at several batch sizes with those of the model in float64.

    The example may also be the shapes of several inputs.
    """
    sparse(model)
    if isinstance(example[0], tuple):
        example = tuple(torch.randn(shape) for shape in example)
    engine = sparing.engine.compile(model, example, **options)
    inputs = find_inputs(model, example)
    for batch in (1, 2, 5):
        args, kwargs = inputs.sample(batch)
        double = [x.double() if x.is_floating_point() else x for x in args]
        doubles = {name: x.double() if x.is_floating_point() else x for name, x in kwargs.items()}
        expected = outputs(copy.deepcopy(model).double(), tuple(double), doubles)
        for number, pair in enumerate(zip(expected, outputs(engine, args, kwargs), strict=True)):
            one, other = ([leaf] for leaf in pair)
            assert max_relative_error(one, other) < 1e-5, f"output {number}"
        assert max(float(leaf.abs().max()) for leaf in expected) > 1e-2
    return engine


def kinds(engine):
    """The operations of each segment, as text, and the operators in PyTorch."""
    segments = [
        " ".join(f"{count}{kind}" for kind, count in sorted(Counter(type(o).__name__ for o in s.operations).items()))
        for s in engine.program.segments
    ]
    views = {"reshape", "transpose", "permute", "squeeze", "unsqueeze", "expand", "getitem", "zeros"}
    calls = [call.name.removeprefix("aten.").split(".")[0] for call in engine.program.calls]
    return segments, Counter(name for name in calls if name not in views)


class Residual(nn.Module):
    """Basic block of a ResNet."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))
        self.skip = self.skip if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.body(x)
        y += self.skip(x)
        return F.relu_(y)


class Excite(nn.Module):
    """Inverted residual of MobileNetV3 with squeeze-and-excitation."""

    def __init__(self, channels):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 16, 1), nn.BatchNorm2d(16), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )  # fmt: skip
        self.project = nn.Sequential(nn.Conv2d(16, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.gate(y))


class DenseNet(nn.Module):
    """Concatenations, batch norm before the convolution, and a head on the mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(2)
        )
        self.head = nn.Sequential(nn.Conv2d(16, 10, 1), nn.AvgPool2d(2), nn.BatchNorm2d(10), nn.ReLU6())
        self.classifier = nn.Linear(10, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.classifier(self.head(x).mean((2, 3)))


class Inception(nn.Module):
    """Parallel branches, rectangular and grouped kernels, dilation, padding as a string, chunks."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.two = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), nn.SiLU())
        self.three = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 2, 4, padding="same"))
        self.four = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(3, 2, 3, padding="same"))
        self.last = nn.Conv2d(14, 28, 3, stride=(2, 1), groups=7, padding=2, dilation=2)

    def forward(self, x):
        y = self.last(torch.cat([F.relu(self.one(x)), self.two(x), self.three(x), self.four(x)], 1))
        first, second = y.chunk(2, 1)
        return torch.sigmoid(first) * second, y[:, 3:5]


class ConvNeXt(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """Patches of an image are tokens."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 16, 16))
        self.layer, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.layer(self.norm(tokens))
        return (tokens + self.position).mean(1), tokens.mean(1)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def tower():
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, 2, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, padding="same", dilation=2), nn.Sigmoid(), nn.AvgPool1d(3, 2, 1), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Dropout(), nn.Linear(8, 2), nn.BatchNorm1d(2),
    )  # fmt: skip


def resnet():
    stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*stem, Residual(8, 8, 1), Residual(8, 16, 2), *head)


def mobilenet():
    stem = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6()
    return nn.Sequential(*stem, Excite(8), Excite(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 20), nn.GELU("tanh"), nn.Linear(20, 10), nn.LogSoftmax(1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "example", "segments", "in_torch"),
    [
        (resnet, (1, 3, 32, 32), ["7Convolution 1Mean 1Pool"], {}),
        (mobilenet, (1, 3, 16, 16), ["2Binary 10Convolution 2Depthwise 3Mean"], {}),
        (DenseNet, (1, 3, 8, 8), ["3Affine 5Convolution 4Copy 1Mean 1Pool"], {}),
        (Inception, (1, 3, 9, 8), ["1Affine 1Binary 6Convolution 7Copy 2Pool"], {}),
        (lambda: ConvNeXt(8), (1, 8, 9, 9), ["2Convolution 1Depthwise 1LayerNorm"], {}),
        (lenet, (1, 1, 28, 28), ["2Convolution 2Pool", "2Convolution"], {"log_softmax": 1}),
        (tower, (1, 4, 60), ["3Convolution 1Mean 2Pool"], {}),
        (Patches, (1, 3, 16, 16), ["2Convolution 1LayerNorm 1Mean"], {"add": 1, "mean": 1}),
        (
            lambda: encoder(norm_first=True, activation="gelu"),
            torch.randn(2, 3, 16),  # fewer tokens than some batches
            ["2Attention 8Convolution 4LayerNorm"],
            {},
        ),
        (lambda: encoder(batch_first=True), (1, 7, 16), ["2Attention 8Convolution 4LayerNorm"], {}),
    ],
    ids=[
        "resnet", "mobilenet", "densenet", "inception", "convnext", "lenet", "conv1d", "patches", "tokens first",
        "batch first",
    ],
)  # fmt: skip
def test_operations_and_outputs(make, example, segments, in_torch):
    engine = compiled(make(), example, threads=2)
    assert kinds(engine) == (segments, in_torch)


class Recurrent(nn.Module):
    """Several inputs and outputs, nested, with a recurrent layer and an embedding in PyTorch."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.embedding = nn.Linear(4, 6), nn.Linear(4, 6), nn.Embedding(7, 4)
        self.layer = nn.GRU(6, 5, batch_first=True)

    def forward(self, x, tokens, state):
        y = F.relu(self.one(x) + self.two(self.embedding(tokens)))
        z, last = self.layer(y, state)
        return {"y": y, "z": (z, last), "none": None, "three": 3, "list": [y * 2, x.shape[0]]}


def test_recurrent_layers_embeddings_and_nested_outputs():
    model = Recurrent()
    inputs = torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), torch.randn(1, 1, 5)
    engine = compiled(model, inputs)
    assert kinds(engine) == (["1Affine 2Convolution"], {"embedding": 1, "gru": 1})
    result = engine(*[x.repeat_interleave(4, dim) for x, dim in zip(inputs, (0, 0, 1), strict=True)])
    assert result["none"] is None
    assert result["three"] == 3
    assert result["list"][1] == 4
    assert isinstance(result["z"], tuple)
    assert not result["y"].requires_grad


def test_keywords_in_any_order_and_positions_in_that_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, pair, y):
            return self.layer(x) - self.layer(pair["a"]) * 3 + self.layer(y) * 5

    model, (x, a, y) = sparse(Model()), torch.randn(3, 2, 3).unbind()
    engine = sparing.engine.compile(model, {"y": y, "pair": {"a": a}, "x": x})
    expected = model(x, {"a": a}, y)
    for found in (engine(x, {"a": a}, y), engine(y=y, x=x, pair={"a": a}), engine(x, y=y, pair={"a": a})):
        torch.testing.assert_close(found, expected)
    for args, kwargs, message in [
        ((x, {"a": a}), {}, "compiled for the arguments x, pair, y, got x, pair"),
        ((x, {"a": a}, y), {"z": y}, "compiled for the arguments x, pair, y, got x, pair, y, z"),
        ((x, {"b": a}, y), {}, "input pair must have the structure"),
        ((x, a, y), {}, "input pair must have the structure"),
        ((x, {"a": 3}, y), {}, r"input pair\['a'\] must be a tensor, got int"),
        ((x, {"a": a}, y, y), {}, "at most 3 positional arguments"),
        ((x, {"a": a}), {"x": x, "y": y}, "argument 'x' is given twice"),
    ]:
        with pytest.raises(sparing.InputError, match=message):
            engine(*args, **kwargs)


def test_containers_of_the_model_are_returned():
    pair = namedtuple("pair", "one other")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.free = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            y = self.layer(x)
            return OrderedDict(pair=pair(y, x), weight=self.free)

    model = Model()
    engine = compiled(model, (1, 3))
    found = engine(torch.ones(2, 3))
    assert type(found) is OrderedDict
    assert type(found["pair"]) is pair
    found["weight"].zero_()  # a copy
    torch.testing.assert_close(engine(torch.ones(2, 3))["weight"], torch.ones(2))


class Padded(nn.Module):
    """A padding before a convolution, then an operator on the images."""

    def __init__(self, pad, dilation=1, value=0.0, groups=1, pool=False):
        super().__init__()
        self.pad, self.value, self.pool = pad, value, pool
        self.convolution = nn.Conv2d(4, 4, 3, padding=1, dilation=dilation, groups=groups)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.pad(x, self.pad, value=self.value)
        return self.last(self.convolution(F.max_pool2d(x, 2) if self.pool else x))


@pytest.mark.parametrize(
    ("options", "in_torch"),
    [
        (
            [
                {"pad": (1, 1, 2, 2)},
                {"pad": (0, 1, 3, 2)},  # zeros at one end of the kernel make it symmetric
                {"pad": (2, 0), "groups": 4},
                {"pad": (0, 2, 2, 0), "dilation": 2},
            ],
            {},
        ),
        (
            [
                {"pad": (0, 1), "dilation": 2},  # half a step of the kernel
                {"pad": (1, 1, 1, 1), "value": 1.0},
                {"pad": (1, 1, 1, 1), "pool": True},  # max pooling pads with -inf
                {"pad": (-1, 1)},
            ],
            {"pad": 4, "conv2d": 1},
        ),
    ],
    ids=["folded", "not folded"],
)
def test_padding_is_folded_into_the_convolution(options, in_torch):
    engine = compiled(Parallel([Padded(**one) for one in options]), ((1, 4, 8, 7),) * len(options))
    (_,), calls = kinds(engine)
    assert calls == in_torch


def run(function, *layers):
    """A module that calls a function with the layers and its inputs."""

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, *inputs):
            return function(*self.layers, *inputs)

    return Function()


class Parallel(nn.Module):
    """Modules that have an input and an output each: tracing one large model is faster than tracing many."""

    def __init__(self, modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs):
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


C, L = (lambda: nn.Conv2d(4, 4, 3, padding=1)), (lambda: nn.Linear(4, 4))
PIXELS, TOKENS, ROWS = (1, 4, 6, 6), (1, 3, 4), (1, 4)
CONSTANT = nn.Parameter(torch.rand(4) + 0.5, requires_grad=False)


def heads(x, number=2):
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


def attend(*operands, **options):
    return join(F.scaled_dot_product_attention(*map(heads, operands), **options))


def attend_to_parts(parts):
    """Attention whose query, key and value are parts of one layer."""

    def function(f, x):
        return join(F.scaled_dot_product_attention(*parts(f(x).unflatten(-1, (2, 3, 2)))))

    return function


def grouped(repeat, **options):
    """Attention with four heads of queries and two of keys and values."""

    def function(f, x):
        parts = f(x).split((8, 4, 4), -1)
        q, k, v = (heads(part, number) for part, number in zip(parts, (4, 2, 2), strict=True))
        return join(F.scaled_dot_product_attention(q, repeat(k), repeat(v), **options))

    return function


def repeated(x):
    """As in transformers."""
    samples, number, tokens, channels = x.shape
    return x[:, :, None].expand(samples, number, 2, tokens, channels).reshape(samples, 2 * number, tokens, channels)


def rotary(views=lambda q, k: (q, k), angles=lambda part: ANGLES, layout=heads, value=lambda v, turn: v):
    """Attention with rotary embeddings. `views` come after them."""

    def function(f, x):
        def turn(x, cosine, sine):
            one, other = x.chunk(2, -1)
            return x * cosine.to(x) + torch.cat([-other, one], -1) * sine.to(x)

        q, k, v = map(layout, f(x).split(4, -1))
        of_query, of_key = views(turn(q, *angles(0)), turn(k, *angles(1)))
        return join(F.scaled_dot_product_attention(of_query, of_key, value(v, turn), is_causal=True))

    return function


def rms_norm(x):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)


def written(scale=lambda q, k: q @ k.transpose(-2, -1), mask=lambda scores: scores, dim=-1, use=lambda y, scores, w: y):
    """Attention as products and a softmax."""

    def function(f, x):
        q, k, v = map(heads, f(x).chunk(3, -1))
        weights = F.dropout(
            F.softmax(scores := mask(scale(q, k)), dim, dtype=torch.float32).to(x.dtype), training=False
        )
        return use(join(weights @ v), scores, weights)

    return function


def shared(f, x):
    """Four heads of queries, and one of keys and values."""
    q, k, v = f(x).split((8, 2, 2), -1)
    return join((heads(q, 4) @ k[:, None].mT).softmax(-1) @ v[:, None])


def einsums(f, x):
    q, k, v = (part.unflatten(-1, (2, -1)) for part in f(x).chunk(3, -1))
    weights = torch.einsum("nshc,nthc->nhts", k * 0.3, q * 2).softmax(-1)
    return torch.einsum("nhts, nshc -> nthc", weights, v).flatten(2)


def batched(f, x):
    """As in nn.MultiheadAttention, with a mask for all samples, and without dividing and joining heads."""
    q, k, v = f(x).chunk(3, -1)
    scores = torch.baddbmm(HIDE.to(x), q, k.transpose(1, 2), alpha=0.3)
    return torch.bmm(scores.softmax(2), v)


def weighted(batch_first):
    """With weights, which nothing uses."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x):
            return self.attention(x, x, x, attn_mask=FUTURE)[0]

    return Weighted()


LARGE, TRIANGLE = (lambda: nn.Linear(4, 12)), torch.ones(3, 3, dtype=torch.bool).tril()
ADDED = torch.zeros(3, 3).masked_fill(~TRIANGLE, -math.inf)
FUTURE = ~TRIANGLE
HEAD, ANGLES = torch.ones(2, 1, 1).cumsum(0), torch.rand(2, 1, 1, 3, 2).sub(0.5).unbind()
HIDE = torch.zeros(3, 3).masked_fill(FUTURE, torch.finfo(torch.float32).min)
ALONE, SDPA = "1Attention 1Convolution", "scaled_dot_product_attention"
GROUPS, NORM = (lambda: nn.Linear(4, 16)), "1Convolution 1LayerNorm"
SPLIT, WHOLE, WRITTEN = "1Attention 1Convolution 3Copy", "1Attention 2Convolution", "matmul softmax matmul "


def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [
            (lambda f, x: f(x).clamp(min=0), C, PIXELS, "1Convolution"),
            (lambda f, x: f(x).clamp(0, 6), C, PIXELS, "1Convolution"),
            (lambda f, x: (y := f(x)) * torch.sigmoid(y), L, ROWS, "1Convolution"),
            (lambda f, x: gelu(f(x)), L, ROWS, "1Convolution"),
            (lambda f, x: 3 - (f(x) / 2 - 1) * CONSTANT.view(4, 1, 1), C, PIXELS, "1Convolution"),
            (lambda f, x: f(x) - CONSTANT, L, TOKENS, "1Convolution"),
            (lambda f, x: -f(x) * CONSTANT, L, TOKENS, "1Convolution"),
            (lambda f, x: f(x) + f(x), C, PIXELS, "2Convolution"),
            (lambda f, x: (y := f(x)) + y, C, PIXELS, "1Binary 1Convolution"),
            (lambda f, x: f(x) * f(x).mean((2, 3), True), C, PIXELS, "1Binary 2Convolution 1Mean"),
            (lambda f, x: f(x) + f(x).mean((2, 3), True), C, PIXELS, "1Binary 2Convolution 1Mean"),
            (lambda f, x: F.layer_norm(f(x), (4,)), L, TOKENS, NORM),
            (lambda f, x: F.layer_norm(f(x) + 9, (4,), c := CONSTANT.to(x), c) * c - 2, L, TOKENS, NORM),
            (lambda f, x: CONSTANT * rms_norm(f(x) + 9), L, TOKENS, NORM),
            (lambda f, x: (y := f(x) + 9) * torch.rsqrt(torch.mean(y * y, -1, True) + 1e-6), L, TOKENS, NORM),
            (lambda f, x: F.rms_norm(f(x), (4,), CONSTANT.to(x)), L, TOKENS, NORM),
            (lambda f, x: F.silu(f(x)) * f(x), L, TOKENS, "1Binary 2Convolution"),
        ],
        [
            (lambda f, x: F.max_pool2d(f(x), 3, 2, 1, ceil_mode=True), C, (1, 4, 7, 7), "1Convolution 1Pool"),
            (lambda f, x: F.max_pool2d(f(x), 3, 1, 1, 2), lambda: nn.Conv2d(4, 4, 1), PIXELS, "1Convolution 1Pool"),
            (lambda f, x: F.adaptive_avg_pool2d(f(x), (2, 3)), C, PIXELS, "1Convolution 1Pool"),
            (lambda f, x: f(x).permute(0, 2, 3, 1).mean((1, 2)), C, PIXELS, "1Convolution 1Mean"),
            (lambda f, x: f(x.mean((2, 3), keepdim=True)), C, PIXELS, "1Convolution 1Mean"),  # middle of the kernel
            (lambda f, x: F.avg_pool2d(F.max_pool2d(f(x), 6), 1).mean((2, 3)), C, PIXELS, "1Convolution 1Mean 1Pool"),
            (lambda f, x: f(F.max_pool2d(F.adaptive_avg_pool2d(x, 1), 1)), C, (1, 4, 1, 1), "1Convolution"),
        ],
        [
            (lambda f, x: f(x).squeeze(2), lambda: nn.Conv2d(4, 4, (6, 1)), PIXELS, "1Convolution"),
            (lambda f, x: f(x).flatten(1) * 2, lambda: nn.Conv2d(4, 4, 6), PIXELS, "1Affine 1Convolution 1Mean"),
            (lambda f, x: f(x)[:, 1:3], C, PIXELS, "1Convolution 1Copy"),
            (lambda f, x: f(x).split([1, 3], 1)[1], C, PIXELS, "1Convolution 1Copy"),
            (lambda f, x: torch.cat([x, f(x), x], -1), L, TOKENS, "1Convolution 3Copy"),
            (lambda f, x: torch.addmm(CONSTANT.to(x), f(x), f.weight), L, ROWS, "2Convolution"),
            (lambda f, x: f(x) @ f.weight.t().reshape(4, 2, 2).flatten(1), L, TOKENS, "2Convolution"),
            (lambda f, x: f(x.view(-1, 4)).view(x.shape[0], 3, 4), L, TOKENS, "1Convolution"),
        ],
        [
            (lambda f, x: attend(f(x), f(x), f(x)), L, TOKENS, "1Attention 3Convolution"),
            (lambda f, x: attend(y := f(x), y, y, is_causal=True, scale=0.7), L, (1, 21, 4), ALONE),
            (lambda f, x: attend(*f(x).split(4, 2)), LARGE, TOKENS, "1Attention 1Convolution 3Copy"),
            (lambda f, x: attend(*f(x).chunk(3, -1)), LARGE, (1, 1, 4), "1Attention 1Convolution 3Copy"),
            (attend_to_parts(lambda x: x.permute(3, 0, 2, 1, 4).unbind(0)), LARGE, TOKENS, ALONE),
            (attend_to_parts(lambda x: [x[..., i, :].transpose(1, 2) for i in (0, 1, -1)]), LARGE, TOKENS, ALONE),
            (attend_to_parts(lambda x: x.flatten(3).transpose(1, 2).split(2, -1)), LARGE, TOKENS, ALONE),
            (lambda f, x: F.scaled_dot_product_attention(y := f(x), y, y), L, TOKENS, ALONE),
            (lambda f, x: F.scaled_dot_product_attention(*[f(x)[:, None]] * 3).squeeze(1), L, TOKENS, ALONE),
            (attend_to_parts(lambda x: [x.transpose(1, 2)[:, :, -8:, i] for i in (0, 1, 2)]), LARGE, TOKENS, ALONE),
            (lambda f, x: attend(y := f(x), y, y, attn_mask=TRIANGLE), L, TOKENS, ALONE),
            (lambda f, x: attend(y := f(x), y, y, attn_mask=ADDED), L, TOKENS, ALONE),
        ],
        [
            (written(), LARGE, TOKENS, SPLIT),
            (written(lambda q, k: 2 * (q @ k.transpose(2, 3) / 3), lambda s: s + ADDED), LARGE, TOKENS, SPLIT),
            (written(lambda q, k: (q * 2) @ (k / 3).mT, lambda s: s.masked_fill(FUTURE, -1e9)), LARGE, TOKENS, SPLIT),
            (written(lambda q, k: q @ (k.mT * -2), lambda s: HIDE[None, None] + s), LARGE, TOKENS, SPLIT),
            (written(mask=lambda s: s.masked_fill(TRIANGLE[None, None] == 0, -math.inf)), LARGE, TOKENS, SPLIT),
            (written(lambda q, k: q @ k.mT / torch.tensor(3.0).sqrt()), LARGE, TOKENS, SPLIT),
            (written(mask=lambda s: torch.where(TRIANGLE, s, torch.tensor(-1e9))), LARGE, TOKENS, SPLIT),
            (written(mask=lambda s: torch.where(FUTURE, torch.full([], -math.inf), s)), LARGE, TOKENS, SPLIT),
            (shared, LARGE, TOKENS, SPLIT),
            (einsums, LARGE, TOKENS, SPLIT),
            (batched, LARGE, TOKENS, SPLIT),
            (lambda f, x: f(x), lambda: weighted(True), TOKENS, WHOLE),
            (lambda f, x: f(x.transpose(0, 1)).transpose(0, 1), lambda: weighted(False), TOKENS, WHOLE),
        ],
        [
            (grouped(lambda x: x, enable_gqa=True), GROUPS, TOKENS, SPLIT),
            (grouped(repeated), GROUPS, TOKENS, SPLIT),
            (grouped(lambda x: x.repeat_interleave(2, 1)), GROUPS, TOKENS, SPLIT),
            (grouped(lambda x: x.repeat_interleave(2, dim=-3), is_causal=True), GROUPS, TOKENS, SPLIT),
            (grouped(lambda x: repeated(x[:, 1:]), enable_gqa=True), GROUPS, TOKENS, SPLIT),
            (rotary(), LARGE, TOKENS, SPLIT),
            (rotary(angles=lambda _: [table[0, 0] for table in ANGLES]), LARGE, TOKENS, SPLIT),
            (rotary(lambda q, k: (q, repeated(k[:, 1:])), value=lambda v, _: repeated(v[:, 1:])), LARGE, TOKENS, SPLIT),
            (
                rotary(
                    lambda *parts: [x.transpose(1, 2) for x in parts],
                    lambda _: [table.transpose(1, 2) for table in ANGLES],
                    lambda x: x.unflatten(-1, (2, -1)),
                    lambda v, _: v.transpose(1, 2),
                ),
                LARGE, TOKENS, SPLIT,
            ),
            (rotary(angles=lambda _: [table[:, :, :1] for table in ANGLES]), LARGE, (1, 1, 4), SPLIT),
            (grouped(lambda x: x[:, :1].expand(-1, 4, -1, -1), is_causal=True), GROUPS, (1, 19, 4), SPLIT),
        ],
    ],
    ids=["elementwise", "pooling", "shapes", "attention", "products and softmax", "shared keys and rotary"],
)  # fmt: skip
def test_operators_in_the_engine(cases):
    engine = compiled(Parallel([run(case[0], case[1]()) for case in cases]), tuple(case[2] for case in cases))
    expected = Counter()
    for *_, operations in cases:
        expected += Counter({part.lstrip("0123456789"): int(part[0]) for part in operations.split()})
    (segment,), calls = kinds(engine)
    assert segment == " ".join(f"{count}{kind}" for kind, count in sorted(expected.items()))
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "segments"),
    [
        (
            [
                (lambda f, x: F.leaky_relu(f(x)), C, PIXELS, "leaky_relu"),
                (lambda f, x: f(x).clamp(0, 5), C, PIXELS, "clamp"),
                (lambda f, x: f(x) + CONSTANT.to(x).view(4, 1), C, (1, 4, 4, 6), "add"),  # along the height
                (lambda f, x: f(x) * f(x).mean((1, 3), True), C, PIXELS, "mean mul"),
                (lambda f, x: F.layer_norm(f(x), (4, 6, 6)), C, PIXELS, "layer_norm"),
                (lambda f, x: x[:0].sum() + f(x), C, PIXELS, "slice sum add"),  # a tensor without elements
                (lambda f, x: f(x.double().to(f.weight)), L, ROWS, "_to_copy _to_copy"),
                (lambda f, x: f(x).double(), L, ROWS, "_to_copy"),
                (lambda f, x: f(x).repeat_interleave(2, 0), L, ROWS, "repeat_interleave"),
                (lambda f, x: torch.where(x > 0, f(x), torch.tensor(2.0)), L, ROWS, "gt where"),
                (lambda f, x: torch.where(x[:, None] > 0, f(x), torch.tensor(2.0)), L, ROWS, "gt where"),
                (lambda f, x: torch.tensor(2.0) / f(x).exp(), L, ROWS, "exp div"),
                (lambda f, x: f(torch.tanh(x.roll(1, 1))), L, (1, 5, 5, 4), "roll"),
                (lambda f, x: f(F.gelu(F.instance_norm(x))), lambda: nn.Conv1d(4, 4, 3), (1, 4, 9), "instance_norm"),
            ],
            1,
        ),
        (
            [
                (lambda f, x: F.max_pool2d(f(x), 2, 2, ceil_mode=True), C, (1, 4, 7, 7), "max_pool2d"),
                (lambda f, x: F.avg_pool2d(f(x), 2, divisor_override=3), C, PIXELS, "avg_pool2d"),
                (lambda f, x: F.adaptive_avg_pool2d(f(x), 4), C, PIXELS, "adaptive_avg_pool2d"),
                (lambda f, x: f(x).mean((1, 2)), C, PIXELS, "mean"),
                (lambda f, x: f(x)[:, :, 1:3], C, PIXELS, "slice"),
                (lambda f, x: torch.cat([x, f(x)], 1), L, TOKENS, "cat"),
                (lambda f, x: f(x).transpose(1, 2), L, TOKENS, ""),
                (lambda f, x: f(x).view(-1, 2), L, TOKENS, ""),  # half of the channels
                (lambda f, x: F.conv2d(f(x), x[:1]), C, (1, 4, 3, 3), "slice conv2d"),  # a weight that depends on x
                (lambda f, x: f(x), lambda: nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"), PIXELS, "pad"),
            ],
            1,
        ),
        (
            [
                (lambda f, x: attend(*[f(x).reshape(1, -1, 4)] * 3), L, TOKENS, SDPA),  # samples attend to one another
                (lambda f, x: attend(y := f(x), y, y, attn_mask=torch.eye(3)), L, TOKENS, SDPA),
                (lambda f, x: attend(f(x), x, x), L, TOKENS, SDPA),
                (lambda f, x: F.scaled_dot_product_attention(*[heads(f(x))] * 3), L, TOKENS, SDPA),
                (lambda f, x: F.scaled_dot_product_attention(*[heads(f(x))] * 3).flatten(1), L, TOKENS, SDPA),
                (lambda f, x: attend(*[f(x).flip(2)] * 3), L, TOKENS, f"flip {SDPA}"),
                (lambda f, x: attend(*[f(x)[:, 1:]] * 3), L, TOKENS, f"slice {SDPA}"),
                (lambda f, x: attend(*[f(x).reshape(x.shape[0], 2, 6)] * 3), L, TOKENS, SDPA),
                (grouped(lambda x: x.repeat(1, 2, 1, 1)), GROUPS, TOKENS, f"repeat repeat {SDPA}"),
                (grouped(lambda x: repeated(x)[:, :, :1].expand(-1, -1, 3, -1)), GROUPS, TOKENS, f"slice slice {SDPA}"),
            ],
            1,
        ),
        (
            [
                (written(dim=-2), LARGE, TOKENS, WRITTEN),
                (written(mask=lambda s: s.masked_fill(FUTURE, -100)), LARGE, TOKENS, WRITTEN + "masked_fill"),
                (written(mask=lambda s: s.where(TRIANGLE, torch.tensor(-5))), LARGE, TOKENS, WRITTEN + "where"),
                (written(mask=lambda s: (s + ADDED) * 2), LARGE, TOKENS, WRITTEN + "add mul"),
                (written(mask=lambda s: s + ADDED + s), LARGE, TOKENS, WRITTEN + "add add"),
                (written(mask=lambda s: s.transpose(2, 3)), LARGE, TOKENS, WRITTEN),
                (written(mask=lambda s: s * ADDED.exp()), LARGE, TOKENS, WRITTEN + "mul"),
                (written(lambda q, k: q @ k[:, :1].mT), LARGE, TOKENS, WRITTEN + "slice"),
                (written(use=lambda y, s, w: y + s.sum()), LARGE, TOKENS, WRITTEN + "sum add"),
                (written(use=lambda y, s, w: y + w.amax()), LARGE, TOKENS, WRITTEN + "amax add"),
                (lambda f, x: torch.einsum("ntc,mtc->nmt", f(x), f(x)[:1]), L, TOKENS, "einsum slice"),
            ],
            1,
        ),
        (
            [
                (lambda f, x: f(x), lambda: nn.ConvTranspose2d(4, 4, 2), (1, 4, 3, 3), "conv_transpose2d"),
                (lambda f, x: f(x), lambda: nn.Conv3d(4, 4, 2), (1, 4, 3, 3, 3), "conv3d"),
                (lambda f, x: f(F.relu(x)), lambda: nn.BatchNorm1d(4), ROWS, "relu batch_norm"),  # nothing sparse
            ],
            0,
        ),
    ],
    ids=["elementwise", "shapes", "attention", "products and softmax", "nothing sparse"],
)  # fmt: skip
def test_operators_in_torch(cases, segments):
    engine = compiled(Parallel([run(case[0], case[1]()) for case in cases]), tuple(case[2] for case in cases))
    found, calls = kinds(engine)
    assert len(found) == segments
    assert calls == Counter(name for case in cases for name in case[3].split())
    assert all(call.reason for call in engine.program.calls)


class Llama(nn.Module):
    """Two blocks of a language model of this kind."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(2))
            self.attention, self.join = nn.Linear(16, 32), nn.Linear(16, 16)
            self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x, cosine, sine):
            def turn(x):
                return x * cosine + torch.cat([-x[..., 2:], x[..., :2]], -1) * sine

            parts = self.attention(self.norms[0](x)).split([16, 8, 8], -1)
            q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
            x = x + self.join(join(y))
            y = self.norms[1](x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(20, 16), nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        x, count = self.embedding(tokens), tokens.shape[1]
        angles = torch.arange(count)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(x)


@pytest.mark.slow
def test_language_models_run_as_one_segment(tmp_path):
    model = sparse(Llama())
    engine = sparing.engine.compile(model, torch.randint(20, (2, 7)))
    assert kinds(engine) == (["2Attention 2Binary 11Convolution 6Copy 4LayerNorm"], {"embedding": 1})
    sparing.engine.save(engine, tmp_path / "model.engine")
    tokens = torch.randint(20, (3, 7))
    torch.testing.assert_close(sparing.engine.load(tmp_path / "model.engine")(tokens), model(tokens))


@pytest.mark.slow
def test_rotary_embeddings_in_torch():
    cases = [
        rotary(angles=lambda part: ANGLES if part else ANGLES[::-1]),  # others for the key than for the query
        rotary(angles=lambda _: [table.expand(1, 2, 3, 2) * HEAD for table in ANGLES]),  # others for each head
        rotary(value=lambda v, turn: turn(v, *ANGLES)),
        rotary(lambda q, k: (q, k.flip(2))),
        rotary(lambda *parts: [x[:, :, :2] for x in parts], value=lambda v, _: v[:, :, :2]),
        rotary(lambda *parts: [x.mT.reshape(-1, 2, 3, 2) for x in parts]),
        rotary(angles=lambda _: [table[0, 0, 0, 0] for table in ANGLES]),  # numbers
        rotary(layout=lambda x: heads(x)[:, :, :1], value=lambda v, _: v.expand(-1, -1, 3, -1)),  # repeat a token
    ]
    engine = compiled(Parallel([run(case, LARGE()) for case in cases]), (TOKENS,) * len(cases))
    assert kinds(engine)[1][SDPA] == len(cases)


def test_attention_to_other_tokens():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            f, longer = self.f, F.pad(x, (0, 0, 2, 0))
            y = f(x)
            return attend(y, f(y[:, :1] * 2), f(y[:, :1])), attend(y, z := f(longer), z), attend(f(longer), y, y)

    engine = compiled(Cross(), TOKENS)
    operations = [type(operation) for segment in engine.program.segments for operation in segment.operations]
    assert operations.count(Attention) == 3
    assert SDPA not in kinds(engine)[1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_attention(dtype, tmp_path):
    """A mask that the model computes is added to the scores. Layers share it."""

    def function(f, x, lengths):
        seen = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None, :]
        y = f(x)
        for shape in ((1, 1), (2, 1), (1, 7), (2, 7)):
            mask = seen.expand(-1, *shape, -1)
            mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            y = attend(y, y, y, attn_mask=mask) + attend(y, y, y * 2, attn_mask=mask, scale=0.3)
        return y

    model = sparse(run(function, nn.Linear(4, 4)))
    engine = sparing.engine.compile(model, (torch.randn(2, 7, 4), torch.tensor([3, 7])))
    assert kinds(engine)[0] == ["4Affine 8Attention 4Binary 1Convolution"]
    assert len(engine.program.segments[0].inputs) == 5
    sparing.engine.save(engine, tmp_path / "model.engine")
    engine = sparing.engine.load(tmp_path / "model.engine")
    for lengths in (torch.tensor([1]), torch.tensor([5, 7, 2, 0])):
        x = torch.randn(len(lengths), 7, 4)
        torch.testing.assert_close(engine(x, lengths), model(x, lengths))


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_scores_that_a_mask_fills(fill):
    def function(f, x, lengths):
        hidden = (torch.arange(x.shape[1]) >= lengths[:, None])[:, None, None, :]
        y = x
        for _ in range(2):  # layers share the mask
            y = written(mask=lambda scores: scores.masked_fill(hidden, fill))(f, y)
        return y

    model = sparse(run(function, nn.Linear(4, 12)))
    engine = sparing.engine.compile(model, (torch.randn(2, 7, 4), torch.tensor([3, 7])))
    assert kinds(engine)[0] == ["2Attention 2Convolution 6Copy"]
    assert len(engine.program.segments[0].inputs) == 2
    x, lengths = torch.randn(4, 7, 4), torch.tensor([5, 7, 2, 0])
    outputs, expected = engine(x, lengths), model(x, lengths)
    if fill == -math.inf:  # attention to nothing
        assert expected[3].isnan().all()
        assert outputs[3].isfinite().all()
        outputs, expected = outputs[:3], expected[:3]
    torch.testing.assert_close(outputs, expected)


def test_keys_that_are_all_hidden_have_equal_weights():
    def function(f, x, hidden):
        scores = (lambda q, k: 100 * q @ k.mT), (lambda s: s.masked_fill(hidden[:, None, None], -1e9))
        return written(*scores)(f, x)

    model = sparse(run(function, nn.Linear(4, 12)))
    x, hidden = torch.randn(2, 7, 4), torch.ones(2, 7, dtype=torch.bool)
    engine = sparing.engine.compile(model, (x, hidden))
    assert kinds(engine)[0] == ["1Attention 1Convolution 3Copy"]
    torch.testing.assert_close(engine(x, hidden), model(x, hidden))


@pytest.mark.parametrize("weights", [False, True])
def test_padding_of_multi_head_attention(weights):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x, padding):
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=weights)[0]

    model, example = (
        sparse(Padded()),
        (torch.randn(2, 3, 4), torch.tensor([[False, True, False], [False, False, True]])),
    )
    engine = sparing.engine.compile(model, example)
    assert kinds(engine)[0] == ["1Attention 2Convolution"]
    torch.testing.assert_close(engine(*example), model(*example))


@pytest.mark.parametrize("nested", [False, True])
def test_padding_of_a_transformer_encoder(nested):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = sparse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested))
    example = {"src": torch.randn(2, 3, 4), "src_key_padding_mask": torch.tensor([[False] * 3, [False, False, True]])}
    if nested:  # PyTorch then sets the outputs of padding to zero, but not in what it exports
        with pytest.raises(sparing.InputError, match="requires enable_nested_tensor=False"):
            sparing.engine.compile(model, example)
        return
    torch.testing.assert_close(sparing.engine.compile(model, example)(**example), model(**example))


def test_attention_to_a_part_of_one_sample():
    """With one sample, strides do not tell that other rows follow."""
    model = sparse(run(lambda f, x: attend(f(x.reshape(1, 3, 4)), y := f(x)[:, :2], y), nn.Linear(4, 4)))
    with pytest.warns(sparing.SparsityWarning, match="the batch size is fixed"):
        engine = sparing.engine.compile(model, (1, 3, 4))
    assert kinds(engine)[1]["scaled_dot_product_attention"] == 1
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(engine(x), model(x))


def test_samples_as_tokens_of_multi_head_attention():
    model, x = sparse(run(lambda f, x: f(x, x, x)[0], nn.MultiheadAttention(4, 2))), torch.randn(5, 4)
    torch.testing.assert_close(sparing.engine.compile(model, (2, 4))(x), model(x))


def test_one_head_of_one_sample():
    layer = nn.MultiheadAttention(4, 1, batch_first=True)
    model = sparse(run(lambda f, x: f(*[x.reshape(1, 3, 4)] * 3)[0], layer))
    with pytest.warns(sparing.SparsityWarning, match="the batch size is fixed"):
        engine = sparing.engine.compile(model, (1, 3, 4))
    x = torch.randn(1, 3, 4)
    torch.testing.assert_close(engine(x), model(x))


def test_levels_put_parallel_branches_into_one_segment():
    def function(one, two, three, four, x):
        shared = one(x)
        cut = F.elu(two(shared))  # in PyTorch
        return three(cut) + four(shared).relu() + shared

    engine = compiled(run(function, C(), C(), C(), C()), (1, 4, 6, 6))
    assert kinds(engine) == (["3Convolution", "1Binary 1Convolution"], {"elu": 1})


def test_constants_are_computed_and_batch_norm_with_scale_zero_removes_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask, self.layer, self.norm = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(F.linear(x, self.layer.weight * torch.sigmoid(self.mask).round()))

    model = sparse(Model())
    with torch.no_grad():
        model.norm.weight[1:3] = 0
    weight = (model.layer.weight * torch.sigmoid(model.mask).round())[[0, 3]]
    engine = sparing.engine.compile(model, (1, 4))
    ((convolution,),) = [segment.operations for segment in engine.program.segments]
    assert len(convolution.values) == int(weight.count_nonzero())
    assert convolution.starts.tolist()[1] == convolution.starts.tolist()[3]
    x = torch.randn(3, 4)
    torch.testing.assert_close(engine(x), model(x))


def _in_place(f, g, x):
    y = f(x)
    y += 1
    z = y.relu_()
    y.mul_(2)
    return g(y), z


def _in_place_before_another_use(f, g, x):
    y = f(x)
    before = g(y)
    y.relu_()
    return before, y


def _seen_by_a_slice(f, g, x):
    y = f(x)
    part = y[:, :2]
    y.relu_()
    return g(y), part


def _of_a_view(f, g, x):
    y = f(x)
    y.flatten(1).relu_()
    return g(y)


def _of_some_elements(f, g, x):
    y = f(x)
    y[:, 0] = 0
    return g(y)


def _of_the_input(f, g, x):
    x.relu_()
    return g(f(x))


@pytest.mark.parametrize(
    ("function", "direct"),
    [
        (_in_place, True), (_in_place_before_another_use, True), (_seen_by_a_slice, False), (_of_a_view, False),
        (_of_some_elements, False), (_of_the_input, False),
    ],
)  # fmt: skip
def test_changes_in_place_and_what_sees_them(monkeypatch, function, direct):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return function(self.f, self.g, x)

    decomposed = []
    original = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *args: (decomposed.append(1), original(*args))[1]
    )
    model = sparse(Both())
    engine = sparing.engine.compile(model, (1, 3, 4, 4))
    assert bool(decomposed) != direct
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(engine(x.clone()), model(x.clone()))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.flatten(2).mT, lambda x: x.movedim(1, -1), lambda x: x.swapaxes(1, 2), lambda x: x.ravel(),
        lambda x: x[0].flatten(1).t(), lambda x: x.flatten(0, 1), lambda x: x.unflatten(1, (2, 2)),
        lambda x: x.mean((2, 3)).T, lambda x: x.view_as(x + 1), lambda x: x[0, 0].expand_as(x),
        lambda x: x.mean((2, 3), True).expand_as(x),
    ],
)  # fmt: skip
def test_views_that_torch_export_leaves_as_they_are(view):
    model = sparse(run(lambda f, x: view(f(x)), nn.Conv2d(3, 4, 3)))
    engine = sparing.engine.compile(model, (1, 3, 6, 5))
    for size in (1, 3):
        x = torch.randn(size, 3, 6, 5)
        torch.testing.assert_close(engine(x), model(x))


def test_sparsified_model_is_not_changed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    sparing.sparsify_(model, sparing.StaticRandom(budget=sparing.Budget.uniform(model, 0.9)))
    state = copy.deepcopy(model.state_dict())
    engine = sparing.engine.compile(model, (1, 3, 8, 8))
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(engine(x), sparing.densify_(model).eval()(x), rtol=1e-5, atol=1e-5)
    assert "engine: 80 nonzero of 792 weights, sparsity 89.90%" in engine.summary()
    assert "PyTorch: 1 reshape.default (a view that mixes channels and pixels, or images)" in str(engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_converted_with_a_warning(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(dtype)
    with pytest.warns(sparing.SparsityWarning, match=f"computes in float32: parameters in {dtype} are converted"):
        engine = sparing.engine.compile(model, torch.randn(1, 4, dtype=dtype))
    x = torch.randn(3, 4)
    torch.testing.assert_close(engine(x), copy.deepcopy(model).float()(x))
    with pytest.raises(sparing.InputError, match=f"compiled for input input of shape .* got .* {dtype}"):
        engine(x.to(dtype))


def test_wrong_inputs_raise():
    engine = sparing.engine.compile(nn.Conv2d(3, 4, 3), (1, 3, 8, 8))
    for wrong in ((1, 3, 9, 8), (1, 4, 8, 8), (3, 8, 8), (0, 3, 8, 8)):
        message = r"compiled for input input of shape \[batch, 3, 8, 8\] and dtype torch.float32.*, got " + (
            str(list(wrong)).replace("[", r"\[")
        )
        with pytest.raises(sparing.InputError, match=message):
            engine(torch.empty(wrong))
    with pytest.raises(sparing.InputError, match="must be a dense tensor on the CPU, got torch.strided on meta"):
        engine(torch.empty(1, 3, 8, 8, device="meta"))
    two = sparing.engine.compile(run(lambda f, x, y: f(x) + y, nn.Linear(3, 3)), (torch.ones(1, 3), torch.ones(1, 3)))
    with pytest.raises(sparing.InputError, match=r"\(batch 4\), got \[5, 3\]"):
        two(torch.ones(4, 3), torch.ones(5, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_models_that_cannot_be_compiled_raise():
    class Condition(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    class Explicit(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    for model, message in [
        (Condition(), "cannot be traced for export"),
        (Explicit(), r"control flow \(cond\), which the engine does not support"),
        (Counting(), "changes its buffer 'calls' in each call"),
        (Noise(), "does not have the outputs of the model at batch size 3"),
        (run(lambda f, x: f(x).squeeze(), nn.Linear(2, 4)), r"size 1: output shapes \[\[1, 4\]\], expected \[\[4\]\]"),
        (run(lambda f, x: f(x) / 0, nn.Linear(2, 4)), "returns NaN or infinite values for random inputs"),
        (None, "compiles a torch.nn.Module that is not compiled yet, got NoneType"),
        (nn.Linear, "compiles a torch.nn.Module that is not compiled yet, got type"),
        (nn.Linear(2, 2, device="meta"), "is on the meta device"),
    ]:
        with pytest.raises(sparing.InputError, match=message):
            sparing.engine.compile(model, (2, 2))
    with pytest.raises(sparing.InputError, match="threads must be an integer in \\[1, 1024\\] or None, got 0"):
        sparing.engine.compile(nn.Linear(2, 2), (1, 2), threads=0)


def test_fixed_batch_size():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if len(x) < 3 else x

    with pytest.warns(sparing.SparsityWarning, match="the batch size is fixed") as found:
        engine = sparing.engine.compile(Branch(), (2, 4))
    assert len(found) == 1
    assert engine(torch.ones(2, 4)).shape == (2, 4)
    with pytest.raises(sparing.InputError, match=r"of shape \[2, 4\] .* got \[1, 4\]"):
        engine(torch.ones(1, 4))


def test_inputs_that_the_model_changes_are_not_changed():
    engine = compiled(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), (1, 3))
    x = torch.randn(2, 3)
    before = x.clone()
    engine(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_regions_without_gradients_are_traced():
    def function(f, x):
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = f(x)
        return F.relu(y)

    assert kinds(compiled(run(function, C()), PIXELS)) == (["1Convolution"], {})


def test_the_plan_of_the_example_is_ready_and_four_are_kept():
    engine = sparing.engine.compile(nn.Linear(3, 3), (2, 3))
    (plans,) = engine._plans
    assert list(plans._plans) == [2]
    for batch in (1, 2, 3, 4, 1, 5):
        engine(torch.ones(batch, 3))
    assert list(plans._plans) == [3, 4, 1, 5]
    names = [name for name, _ in plans.profile()]
    assert (names[0], names[-1]) == ("input", "output")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", ["pool", "depthwise"])
def test_a_large_image_between_a_convolution_and_a_window_is_never_in_memory(window, threads):
    second = nn.MaxPool2d(3, 2, 1) if window == "pool" else nn.Conv2d(40, 40, 3, 2, 1, groups=40)
    engine = compiled(
        nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), second, nn.ReLU()), (1, 3, 131, 130), threads=threads
    )
    (plans,) = engine._plans
    names = [name for name, _ in plans.profile()]
    assert any(name.startswith("convolution, ") for name in names), names
    assert plans._find(1).bytes < 4 * 40 * 131 * 130


def test_large_batches_run_in_parts(monkeypatch):
    monkeypatch.setattr(sparing.engine.plan, "CACHE", 1)
    engine = compiled(C(), (5, 4, 6, 6), threads=2)
    (plans,) = copy.copy(engine)._plans
    assert not plans._plans
    plans.prepare(5)
    assert plans._plans.keys() == {1, 2}
    engine = compiled(run(lambda f, x: f(x.cumsum(0)), L()), torch.randn(7, 3, 4), threads=1)
    engine(torch.randn(7, 5, 4))
    assert 5 in engine._plans[-1]._plans, "tokens of different samples alternate"


def test_attention_in_large_batches(monkeypatch):
    """With tokens first, the rows of samples alternate, so a batch must not run in parts, whatever its inputs are."""
    monkeypatch.setattr(sparing.engine.plan, "CACHE", 1)

    def function(f, x):  # [tokens, samples, channels]
        tokens, samples, channels = x.shape
        y = f(x.reshape(tokens * samples, channels)).view(tokens, samples, 2, 2).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(y, y, y).permute(2, 0, 1, 3)
        return y.reshape(tokens * samples, channels).softmax(-1).view(tokens, samples, channels)

    engine = compiled(run(function, L()), torch.randn(7, 3, 4))
    assert [operation.tokens_first for operation in engine.program.segments[0].operations[1:]] == [True]


def test_mask_of_three_dimensions_is_for_heads():
    """PyTorch takes a mask [3, T, T] of queries [3, 3, T, E] for one of heads, not of samples."""

    def function(f, x, mask):
        y = f(x).view(3, 5, 3, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask).transpose(1, 2).reshape(3, 5, 12)

    model = sparse(run(function, nn.Linear(12, 12)))
    with pytest.warns(sparing.SparsityWarning, match="the batch size is fixed"):
        engine = sparing.engine.compile(model, (torch.randn(3, 5, 12), torch.ones(3, 5, 5, dtype=torch.bool)))
    x, mask = torch.randn(3, 5, 12), torch.rand(3, 5, 5) < 0.6
    torch.testing.assert_close(engine(x, mask), model(x, mask))
    model = sparse(run(lambda f, x, mask: F.scaled_dot_product_attention(*[f(x)] * 3, attn_mask=mask), nn.Linear(4, 4)))
    engine = sparing.engine.compile(model, (torch.randn(2, 5, 4), torch.randn(2, 5, 5)))
    assert kinds(engine) == (["1Attention 1Convolution"], {})


def test_masks_of_all_samples():
    model = sparse(run(lambda f, x, mask: attend(*[f(x)] * 3, attn_mask=mask), nn.Linear(4, 4)))
    for shape in ((5, 5), (1, 5)):
        engine = sparing.engine.compile(model, (torch.randn(1, 5, 4), torch.randn(shape)))
        assert kinds(engine)[1][SDPA] == 1


def test_heads_after_a_layer_are_not_those_of_multi_head_attention():
    """A Linear layer on each head, with the same views around it."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.third = nn.Linear(8, 8), nn.Linear(4, 3), nn.Linear(8, 8)

        def forward(self, x):
            n = x.shape[0]
            y = self.one(x).view(n, 2, 5, 4).permute(2, 0, 1, 3).contiguous().view(5 * n * 2, 4)
            y = self.other(y)
            z = self.third(self.one(x).view(n, 2, 5, 4).permute(2, 0, 1, 3).contiguous().view(5 * n, 8))
            halves = z.view(5, 2 * n, 4).transpose(0, 1), z.view(5, -1, 2).transpose(0, 1)
            return y.view(5, n, 6).transpose(0, 1), *halves

    compiled(Heads(), (2, 5, 8))


def test_other_default_dtype_and_device():
    x = torch.randn(2, 4)
    engine = compiled(nn.Linear(4, 4, bias=False), (1, 4))
    expected = engine(x)
    with torch.device("meta"):
        torch.testing.assert_close(engine(x), expected)
    masked = compiled(
        run(lambda f, x: attend(*[f(x)] * 3, attn_mask=(x[..., :1] > 0)[:, None]), nn.Linear(4, 4)), TOKENS
    )
    tokens = torch.randn(2, 3, 4)
    of_tokens = masked(tokens)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(engine(x), expected)
        torch.testing.assert_close(masked(tokens), of_tokens)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4, elementwise_affine=False)).float()
        engine = sparing.engine.compile(model, torch.randn(1, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(engine(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_data_are_refused():
    engine, x = compiled(nn.Linear(4, 4), (1, 4)), torch.randn(2, 4)
    torch.testing.assert_close(engine(x.as_subclass(type("Own", (torch.Tensor,), {}))), engine(x))
    for wrong in (torch._efficientzerotensor((2, 4)), torch.masked.masked_tensor(x, x > 0)):
        with pytest.raises(sparing.InputError, match="the engine needs tensors with data in memory"):
            engine(wrong)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(sparing.InputError, match="plain torch.Tensor"),
    ):
        engine(x)
    with pytest.raises(sparing.InputError, match="must be a dense tensor on the CPU, got nested"):
        engine(torch.nested.nested_tensor([x[0], x[1]]))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_cannot_be_traced():
    engine = compiled(nn.Linear(4, 4), (1, 4))
    with pytest.raises(sparing.InputError, match="cannot be traced or compiled"):
        torch.jit.trace(engine, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_does_not_trace_the_engine():
    """It fails with a RecursionError on some functions of the engine, if the process has loaded many modules."""
    engine, x = compiled(nn.Linear(4, 4), (1, 4)), torch.randn(2, 4)
    clear_compilation_metrics()
    found = torch.compile(nn.Sequential(engine, nn.ReLU()), backend="eager")(x)
    torch.testing.assert_close(found, engine(x).relu())
    folder = os.path.dirname(sparing.engine.__file__)
    traced = [frame.co_name for frame in get_compilation_metrics() if str(frame.co_filename).startswith(folder)]
    assert traced == ["forward"], traced


@pytest.mark.parametrize(
    "function",
    [
        lambda f, x: f(x) - f(x).mean(),
        lambda f, x: f(x) * x.shape[0] + x.shape[0],
        lambda f, x: (f(x) * 1e300).clamp(-1, 1),
        lambda f, x: (x.long() * torch.sigmoid(x.long())) + f(x),
        lambda f, x: f(x) * rms_norm(x.sum(1))[:, None],  # over the samples
    ],
)
def test_numbers_that_the_engine_does_not_have(function):
    model, x = sparse(run(function, nn.Linear(4, 4))), torch.randn(5, 4)
    torch.testing.assert_close(sparing.engine.compile(model, (2, 4))(x), model(x))


def test_more_outputs_than_a_convolution_may_have():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2**16))
    engine = sparing.engine.compile(model, (2, 2))
    assert kinds(engine) == (["1Convolution"], {"linear": 1})


def test_networks_that_need_two_samples():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert kinds(sparing.engine.compile(model, (2, 4)))[0] == ["1Convolution"]


def test_concurrent_calls():
    model = sparse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    engine, wrong = sparing.engine.compile(model, (1, 64), threads=2), []

    def work(seed):
        x = torch.randn(seed % 3 + 1, 64, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            if not torch.allclose(engine(x), model(x), atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_moves_and_modes():
    engine = sparing.engine.compile(nn.Linear(3, 3), (1, 3))
    x = torch.ones(2, 3)
    for other in (copy.deepcopy(engine), copy.copy(engine), nn.Sequential(engine)):
        torch.testing.assert_close(other(x), engine(x))
    assert engine.eval() is engine
    assert engine.cpu().float() is engine
    assert engine(x.requires_grad_()).requires_grad is False
    for wrong in (engine.half, engine.double, engine.train, engine.requires_grad_, lambda: engine.to("meta")):
        with pytest.raises(sparing.InputError, match="the engine"):
            wrong()
    with pytest.raises(pickle.PicklingError, match="write it with sparing.engine.save"):
        pickle.dumps(engine)


def segment(operation=None, **changes):
    """A segment of one convolution, with changes."""
    images = Images(Count(1, True), 2, 4, 4)
    port = Port(0, False, (Count(1, True), Count(2), Count(4), Count(4)))
    csr = {
        "starts": torch.tensor([0, 2, 3], dtype=torch.int32),
        "columns": torch.tensor([0, 17, 4], dtype=torch.int32),
        "values": torch.ones(3),
    }
    window = Window((3, 3), padding=(1, 1))
    first = Convolution(output=1, input=0, residual=None, window=window, bias=torch.zeros(2), **csr)
    if operation is not None:
        changes["operations"] = (operation(first),)
    good = {
        "tensors": (images, images),
        "operations": (first,),
        "inputs": (port,),
        "outputs": (replace(port, tensor=1),),
    }
    return Segment(**{**good, **changes})


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


IMAGES = Images(Count(1, True), 2, 4, 4)


def attention(**changes):
    """A segment of attention of two tokens to themselves, with two heads of two channels."""
    numbers = dict.fromkeys(("heads", "channels", "queries", "keys", "query_stride", "key_stride", "value_stride"), 2)
    numbers |= dict.fromkeys(("query_first", "key_first", "value_first"), 0)
    operation = Attention(1, 0, key=0, value=0, mask=None, scale=1.0, causal=False, **numbers)
    ports = [Port(number, True, (Count(1, True), Count(2), Count(4))) for number in (0, 1)]
    shapes = (Matrix(Count(2, True), 4),) * 2
    return Segment(shapes, (replace(operation, **changes),), (ports[0],), (ports[1],))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: segment(lambda o: replace(o, input=2)), "there is no tensor 2"),
        (lambda: segment(lambda o: replace(o, input=-1)), "there is no tensor -1"),
        (lambda: segment(lambda o: replace(o, input=True)), "there is no tensor True"),
        (lambda: segment(lambda o: replace(o, residual=1)), "reads tensor 1 before it is written"),
        (lambda: segment(lambda o: replace(o, output=0)), "tensor 0 twice"),
        (lambda: segment(operations=()), "output 1 is not written"),
        (lambda: segment(lambda o: replace(o, starts=ints(0, 3))), r"starts must be torch.int32 \[3\]"),
        (lambda: segment(lambda o: replace(o, starts=ints(0, 4, 3))), "starts must ascend from 0"),
        (lambda: segment(lambda o: replace(o, starts=ints(0, 1, 2))), "starts must ascend from 0"),
        (lambda: segment(lambda o: replace(o, starts=ints(1, 2, 3))), "starts must ascend from 0"),
        (lambda: segment(lambda o: replace(o, columns=ints(0, 18, 4))), r"columns must be in \[0, 18\)"),
        (lambda: segment(lambda o: replace(o, columns=ints(-1, 17, 4))), r"columns must be in \[0, 18\)"),
        (lambda: segment(lambda o: replace(o, columns=ints(17, 0, 4))), "columns of a filter must ascend"),
        (lambda: segment(lambda o: replace(o, columns=ints(4, 4, 4))), "columns of a filter must ascend"),
        (lambda: segment(lambda o: replace(o, columns=ints(0, 4))), r"columns must be torch.int32 \[3\]"),
        (lambda: segment(lambda o: replace(o, values=torch.ones(3).double())), "values must be torch.float32"),
        (lambda: segment(lambda o: replace(o, bias=torch.ones(3))), r"bias must be torch.float32 \[2\]"),
        (lambda: segment(lambda o: replace(o, activation="elu")), "activation must be one of"),
        (lambda: segment(lambda o: replace(o, window=Window((3, 3)))), "makes 2x2 pixels"),
        (lambda: segment(lambda o: Affine(output=1, input=0, scale=torch.ones(3))), "scale must be"),
        (lambda: segment(lambda o: Mean(output=1, input=0)), r"the mean must have shape \[batch, 2\], got"),
        (lambda: segment(lambda o: Copy(output=1, input=0, input_first=1, output_first=0, channels=2)), "are not in"),
        (lambda: segment(lambda o: Copy(output=1, input=0, input_first=0, output_first=0, channels=1)), "is not writ"),
        (lambda: segment(tensors=(IMAGES, Matrix(Count(1, True), 2))), r"2, 4, 4\], not \[batch, 2\]"),
        (lambda: segment(inputs=(Port(0, False, (Count(2),)),)), r"shape \[2\] cannot be \[batch, 2, 4, 4\]"),
        (lambda: attention(heads=3), r"3 heads and 2 rows per sample do not fit the output, \[2 \* batch, 4\]"),
        (lambda: attention(queries=3), "2 heads and 3 rows per sample do not fit"),
        (lambda: attention(keys=3), r"the key must have shape \[3 \* batch, 4\], got \[2 \* batch, 4\]"),
        (lambda: attention(channels=0), "channels must be an integer in"),
        (lambda: attention(channels=3), r"the heads of the query end at channel 5 of \[2 \* batch, 4\]"),
        (lambda: attention(key_first=-1), "the first channel must be an integer in"),
        (lambda: attention(key_first=1), "the heads of the key end at channel 5"),
        (lambda: attention(value_stride=0), "the channels from head to head must be an integer in"),
        (lambda: attention(value_stride=3), "the heads of the value end at channel 5"),
        (lambda: attention(mask=0), r"the mask must have shape \[batch, 2\], got"),
        (lambda: attention(mask_heads=3), "mask_heads must be 1 or 2, got 3"),
        (lambda: attention(mask=0, mask_heads="x", mask_queries=10**11), "mask_heads must be 1 or 2, got 'x'"),
        (lambda: attention(scale=math.inf), "scale must be a number, got inf"),
        (lambda: attention(shared=0), "shared must be an integer in"),
        (lambda: attention(shared=3), "2 heads cannot share keys in groups of 3"),
        (lambda: attention(shared=2, key_first=2, value_first=3), "the heads of the value end at channel 5"),
        (lambda: attention(cosine=torch.ones(2, 2)), "a rotary embedding needs cosine and sine"),
        (lambda: attention(sine=torch.ones(2, 3), cosine=torch.ones(2, 2)), r"sine must be torch.float32 \[2, 2\]"),
        (lambda: attention(channels=1, sine=torch.ones(2, 1), cosine=torch.ones(2, 1)), "needs an even number of chan"),
        (lambda: attention(causal=1), "causal must be true or false, got 1"),
        (lambda: Window((0, 1)), "kernel must be an integer in"),
        (lambda: Images(Count(0, True), 1, 1, 1), "number of images must be"),
        (lambda: Matrix(Count(1), 2**24 + 1), "channels must be an integer in"),
    ],
)  # fmt: skip
def test_segments_check_themselves(wrong, message):
    segment(), attention()
    with pytest.raises(sparing.InputError, match=message):
        wrong()


FORK = """
import os, sys, torch, sparing
engine = sparing.engine.load(sys.argv[1], threads=2)
x = torch.randn(50, 64)
expected = engine(x)
plan = engine._plans[0]._plans[50]
child = os.fork()
if child == 0:
    same = torch.equal(engine(x), expected)
    os._exit(0 if same and engine._plans[0]._plans[50] is not plan else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
def test_a_forked_process_has_plans_of_its_own(tmp_path):
    path = sparing.engine.save(sparing.engine.compile(nn.Linear(64, 64), (1, 64)), tmp_path / "model.engine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # PyTorch hangs in a forked process if it has threads
    subprocess.run([sys.executable, "-c", FORK, str(path)], check=True, timeout=120, env=environment)


SHARE = """
import os, torch, sparing
from torch import nn
torch.set_num_threads(2)
torch.randn(2, 500_000).softmax(1)  # PyTorch starts its threads
model = nn.Sequential(nn.Linear(512, 512), nn.Softmax(1), nn.Linear(512, 512))
x, alone = torch.randn(64, 512), sparing.engine.compile(model, (64, 512), threads=1)
before = len(os.listdir("/proc/self/task"))
shared = sparing.engine.compile(model, (64, 512), threads=2)
assert torch.equal(shared(x), alone(x))
assert len(os.listdir("/proc/self/task")) == before, "the engine has threads beside those of PyTorch"
whole = sparing.engine.compile(model[:1], (64, 512), threads=2)
assert len(os.listdir("/proc/self/task")) == before + 1, "without PyTorch in between it has its own"
"""


@pytest.mark.slow
@pytest.mark.skipif(openmp() is None or not os.path.isdir("/proc/self/task"), reason="without OpenMP, or not on Linux")
def test_a_network_that_runs_in_part_in_pytorch_uses_its_threads():
    """Otherwise threads of PyTorch that spin after an operation take the processors of those of the engine."""
    subprocess.run([sys.executable, "-c", SHARE], check=True, timeout=120)
