"""The kernels of the engine against PyTorch in float64, on random operations and small networks.

`Network` adds operations to a segment, and computes each of them in float64 as well, with a bound of the rounding
error. Run with ATEN_CPU_CAPABILITY=default or avx2, the tests compile and check the library of that instruction set.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparing.engine import operations as engine
from sparing.engine.attention import Attention
from sparing.engine.plan import Plans
from sparing.engine.segment import Port, Segment
from sparing.engine.shapes import Count, Images, Matrix, Window
from tolerance import tolerance

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
SMALLEST = torch.finfo(torch.float32).tiny  # the engine treats smaller numbers as zero


class Value(NamedTuple):
    """What a tensor of the segment must hold: images [N, C, H, W] or a matrix [N, C]."""

    exact: torch.Tensor
    error: torch.Tensor


def rounding(scale, terms=1):
    return tolerance(torch.float32, terms) * scale.abs() + terms * SMALLEST


def rotate(x, error, cosine, sine):
    """Return a rotary embedding [..., tokens, channels], and its error."""
    half = x.shape[-1] // 2
    turned, of_turned = torch.cat([-x[..., half:], x[..., :half]], -1), error.roll(half, -1)
    cosine, sine = cosine.double(), sine.double()
    terms = x.abs() * cosine.abs() + turned.abs() * sine.abs()
    return x * cosine + turned * sine, error * cosine.abs() + of_turned * sine.abs() + rounding(terms, 3)


class Network:
    def __init__(self, *inputs):
        self.shapes, self.values, self.operations = [], [], []
        self.inputs = inputs
        for data in inputs:
            self.add(data.double(), torch.zeros_like(data, dtype=torch.float64))

    def __repr__(self):
        lines = [f"{i}: {list(value.exact.shape)}" for i, value in enumerate(self.values)]
        for op in self.operations:
            fields = {k: v for k, v in vars(op).items() if k != "output" and not isinstance(v, torch.Tensor)}
            lines[op.output] += f" = {type(op).__name__}({', '.join(f'{k}={v}' for k, v in fields.items())})"
        return "\n".join(lines)

    def add(self, exact, error):
        """Add a tensor. Return its number."""
        if exact.dim() == 4:
            n, c, h, w = exact.shape
            self.shapes.append(Images(Count(n), c, h, w))
        else:
            self.shapes.append(Matrix(Count(len(exact)), exact.shape[1]))
        self.values.append(Value(exact, error))
        return len(self.values) - 1

    def activated(self, name, exact, error):
        result = ACTIVATIONS[name](exact)
        # No slope exceeds 1.5. The smooth functions have rounding errors of their own.
        error = error if name in ("identity", "relu", "relu6") else 1.5 * error + rounding(1 + result.abs())
        return self.add(result, error)

    def convolution(self, x, weight, bias, window=None, residual=None, activation="identity"):
        """weight: dense [filters, channels, height, width], or [filters, channels] for a matrix."""
        window = window or Window()
        value, error = self.values[x]

        def apply(x, weight, bias):
            if x.dim() == 2:
                return F.linear(x, weight, bias)
            return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation)

        dense = weight.double()
        exact = apply(value, dense, bias.double())
        scale = apply(value.abs(), dense.abs(), bias.double().abs())
        error = apply(error, dense.abs(), None)
        if residual is not None:
            exact = exact + self.values[residual].exact
            scale = scale + self.values[residual].exact.abs()
            error = error + self.values[residual].error
        rows = weight.flatten(1)
        filters, columns = rows.nonzero(as_tuple=True)
        counts = torch.bincount(filters, minlength=len(rows))
        error = error + rounding(scale, int(counts.max()) + 2)
        number = self.activated(activation, exact, error)
        self.operations.append(
            engine.Convolution(
                number, x, residual, window, F.pad(counts.cumsum(0), (1, 0)).int(), columns.int(),
                rows[filters, columns], bias, activation,
            )
        )  # fmt: skip
        return number

    def depthwise(self, x, weight, bias, window, activation="identity"):
        def apply(x, weight, bias):
            weight = weight.double()[:, None]
            return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation, groups=len(weight))

        value, error = self.values[x]
        exact = apply(value, weight, bias.double())
        scale = apply(value.abs(), weight.abs(), bias.double().abs())
        error = apply(error, weight.abs(), None) + rounding(scale, weight[0].numel() + 1)
        number = self.activated(activation, exact, error)
        self.operations.append(engine.Depthwise(number, x, window, weight, bias, activation))
        return number

    def pool(self, x, window, kind):
        def apply(x):
            if kind == "maximum":
                return F.max_pool2d(x, window.kernel, window.stride, window.padding, window.dilation)
            return F.avg_pool2d(
                x, window.kernel, window.stride, window.padding, count_include_pad=kind != "average_without_padding"
            )

        value, error = self.values[x]
        error = apply(error)
        if kind != "maximum":
            error += rounding(apply(value.abs()), math.prod(window.kernel))
        number = self.add(apply(value), error)
        self.operations.append(engine.Pool(number, x, window, kind))
        return number

    def mean(self, x):
        value, error = self.values[x]
        pixels = value.shape[2] * value.shape[3]
        error = error.mean((2, 3)) + rounding(value.abs().mean((2, 3)), pixels)
        number = self.add(value.mean((2, 3)), error)
        self.operations.append(engine.Mean(number, x))
        return number

    def affine(self, x, scale=None, bias=None, activation="identity"):
        value, error = self.values[x]
        shape = (1, -1) + (1,) * (value.dim() - 2)
        factor = (torch.ones(1) if scale is None else scale).double().view(shape)
        term = (torch.zeros(1) if bias is None else bias).double().view(shape)
        product = value * factor
        error = error * factor.abs() + rounding(product.abs() + term.abs())
        number = self.activated(activation, product + term, error)
        self.operations.append(engine.Affine(number, x, scale, bias, activation))
        return number

    def binary(self, x, other, kind, activation="identity"):
        a, b = self.values[x], self.values[other]
        if a.exact.dim() > b.exact.dim():
            b = Value(b.exact[..., None, None], b.error[..., None, None])
        if kind == "add":
            exact, error = a.exact + b.exact, a.error + b.error + rounding(a.exact.abs() + b.exact.abs())
        else:
            exact = a.exact * b.exact
            error = a.exact.abs() * b.error + a.error * (b.exact.abs() + b.error) + rounding(exact)
        number = self.activated(activation, exact, error)
        self.operations.append(engine.Binary(number, x, other, kind, activation))
        return number

    def concatenate(self, pieces):
        """pieces: (number, first channel, channels) of each."""
        values = [self.values[x] for x, _, _ in pieces]
        number = self.add(
            *(
                torch.cat([part[:, i : i + n] for part, (_, i, n) in zip(parts, pieces, strict=True)], 1)
                for parts in zip(*values, strict=True)
            )
        )
        first = 0
        for x, begin, count in pieces:
            self.operations.append(engine.Copy(number, x, begin, first, count))
            first += count
        return number

    def layer_norm(self, x, weight, bias, epsilon, centered=True):
        value, error = (part.movedim(1, -1) for part in self.values[x])
        centre = value.mean(-1, keepdim=True) if centered else torch.zeros(())
        deviation = ((value - centre).square().mean(-1, keepdim=True) + epsilon).sqrt()
        exact = (value - centre) / deviation * weight.double() + bias.double()
        normal = (value - centre).abs() / deviation
        wrong = 3 * error.amax(-1, True) + rounding(value.abs().amax(-1, True), value.shape[-1])
        error = wrong / deviation * (1 + normal) * weight.double().abs() + rounding(exact.abs() + bias.double().abs())
        number = self.add(exact.movedim(-1, 1), error.movedim(-1, 1))
        self.operations.append(engine.LayerNorm(number, x, weight, bias, epsilon, centered))
        return number

    def attention(
        self, operands, mask, heads, channels, size, queries, keys, scale, causal, tokens_first=False, of_mask=(1, 1),
        shared=1, angles=None,
    ):  # fmt: skip
        """operands: (number, first channel, channels from head to head) of query, key and value."""
        tokens, width = (queries, keys, keys), (channels, channels, size)

        def divide(part, index):
            """Return [samples, heads, tokens, channels]."""
            _, first, stride = operands[index]
            sizes = (tokens[index], -1) if tokens_first else (-1, tokens[index])
            rows = part.view(*sizes, part.shape[1])
            rows = rows.transpose(0, 1) if tokens_first else rows
            places = [first + (head if index == 0 else head // shared) * stride for head in range(heads)]
            columns = [rows[..., place:][..., : width[index]] for place in places]
            return torch.stack(columns, 1)

        values = [self.values[number] for number, _, _ in operands]
        q, k, v = (divide(value.exact, index) for index, value in enumerate(values))
        q_error, k_error, v_error = (divide(value.error, index) for index, value in enumerate(values))
        if angles is not None:
            (q, q_error), (k, k_error) = rotate(q, q_error, *angles), rotate(k, k_error, *angles)
        k, k_error = k.mT, k_error.mT
        scores, scaled = scale * q @ k, abs(scale) * q.abs() @ k.abs()
        error = abs(scale) * (q_error @ (k.abs() + k_error) + q.abs() @ k_error) + rounding(scaled, channels + 2)
        if mask is not None:
            added, wrong = (part.view(-1, *of_mask, keys) for part in self.values[mask])
            scores, error = scores + added, error + wrong + rounding(added.masked_fill(added == -math.inf, 0))
        if causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            scores, error = scores.masked_fill(hidden, -math.inf), error.masked_fill(hidden, 0)
        error = error + rounding(scores.masked_fill(scores == -math.inf, 0))
        weights = scores.softmax(-1).nan_to_num(0) if mask is not None else scores.softmax(-1)
        relative = torch.expm1(2 * error.amax(-1, True)) + tolerance(torch.float32, keys + 8)
        error = (1 + relative) * (weights @ v_error) + relative * (weights @ v.abs()) + rounding(v.abs().amax() * 1e-30)
        order = (2, 0, 1, 3) if tokens_first else (0, 2, 1, 3)
        exact, error = (part.permute(order).flatten(2).flatten(0, 1) for part in (weights @ v, error))
        number = self.add(exact, error)
        (query, *of_query), (key, *of_key), (value, *of_value) = operands
        self.operations.append(
            Attention(
                number, query, key, value, mask, heads, channels, queries, keys, *of_query, *of_key, *of_value, scale,
                causal, tokens_first, *of_mask, shared, *(angles or (None, None)),
            )
        )  # fmt: skip
        return number

    def plan(self, outputs, threads=1, channels_last=False):
        """Return a function from inputs to outputs that calls the engine."""

        def port(number):
            last = channels_last or self.values[number].exact.dim() == 2
            shape = self.values[number].exact.movedim(1, -1 if last else 1).shape
            return Port(number, last, tuple(map(Count, shape)))

        sources, targets = [port(i) for i in range(len(self.inputs))], [port(i) for i in outputs]
        plans = Plans(Segment(tuple(self.shapes), tuple(self.operations), tuple(sources), tuple(targets)), threads)

        def run(inputs):
            given = [x.movedim(1, -1 if port.channels_last else 1) for x, port in zip(inputs, sources, strict=True)]
            results = plans.run(given, 1)
            return [x.movedim(-1 if port.channels_last else 1, 1) for x, port in zip(results, targets, strict=True)]

        return run

    def check(self, outputs, **arguments):
        """Run the engine twice and compare."""
        run = self.plan(outputs, **arguments)
        found = run(self.inputs)
        self.compare(outputs, found)
        for one, two in zip(found, run(self.inputs), strict=True):
            assert torch.equal(one, two), f"the second run gives other numbers in\n{self}"

    def compare(self, outputs, results):
        """Compare the outputs with the exact ones where those are finite."""
        for number, found in zip(outputs, results, strict=True):
            exact, error = self.values[number]
            difference = (found.double() - exact).abs()
            wrong = ~(difference <= error + SMALLEST) & exact.isfinite() & error.isfinite()
            if wrong.any():
                where = wrong.nonzero()[0].tolist()
                pytest.fail(
                    f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {where}: {found[tuple(where)]} instead of "
                    f"{exact[tuple(where)]} ± {error[tuple(where)]:.2g} in\n{self}"
                )


def sparse(filters, width, pattern, generator):
    """A weight [filters, width] with zeros of a pattern."""
    weight = torch.randn(filters, width, generator=generator)
    block = {"4": 4, "8": 8}.get(pattern, 1)
    chosen = torch.rand(-(-filters // block), width, generator=generator).repeat_interleave(block, 0)[:filters]
    density = {"empty": 0.0, "dense": 1.0, "most": 0.8, "few": 0.02, "4": 0.2, "8": 0.2}.get(pattern, 0.3)
    weight *= chosen < density
    if pattern == "dead filters":
        weight[torch.rand(filters, generator=generator) < 0.5] = 0
    return weight


ON_IMAGES = ("depthwise", *engine.POOLS, "mean", "gate")
PATTERNS = ("random", "empty", "dense", "most", "few", "dead filters", "4", "8")
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([14, 15, 16, 17, 23, 31, 33]))
CHANNELS = st.one_of(st.integers(1, 9), st.sampled_from([8, 12, 16, 17, 24, 32, 40]))
ROWS = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 129])


@st.composite
def windows(draw, size, pool=False, same=False):
    """A window that fits an image. same: the output has its size."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 2), (5, 5), (1, 7), (7, 1), (3, 2), (4, 4)]))
    if same:
        kernel = tuple(k // 2 * 2 + 1 for k in kernel)
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (3, 2)]))
    stride = (1, 1) if same else draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1), (3, 4), (4, 4)]))
    padding = []
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * dilation[axis]
        least = max(0, (reach + 2 - size[axis]) // 2)
        if same:
            padding.append(reach // 2)
        elif pool:
            padding.append(draw(st.integers(0, kernel[axis] // 2)))
        else:
            padding.append(draw(st.integers(least, least + 2)))
    window = Window(kernel, stride, tuple(padding), dilation)
    if min(window.output_size(size)) < 1:
        return Window(stride=stride)
    return window


def add_operation(draw, network, kind, generator):
    """Add an operation of some kind with a random input. Do nothing if none fits."""
    images = [i for i, value in enumerate(network.values) if value.exact.dim() == 4]
    matrices = [i for i, value in enumerate(network.values) if value.exact.dim() == 2]
    candidates = images if kind in ON_IMAGES else matrices if kind == "attention" else range(len(network.values))
    if not candidates:
        return
    x = draw(st.sampled_from(candidates))
    shape = tuple(network.values[x].exact.shape)
    channels, size = shape[1], shape[2:]
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    def alike(shape):
        return [i for i, value in enumerate(network.values) if tuple(value.exact.shape) == shape]

    # With any number of channels.
    others = [i for i, (v, _) in enumerate(network.values) if (len(v), *v.shape[2:]) == (shape[0], *size)]

    if kind in ("convolution", "residual"):
        filters, residual = draw(CHANNELS), None
        window = draw(windows(size, same=kind == "residual")) if size else Window()
        if kind == "residual":
            residual = draw(st.sampled_from(others))
            filters = network.values[residual].exact.shape[1]
        weight = sparse(filters, channels * math.prod(window.kernel), draw(st.sampled_from(PATTERNS)), generator)
        if size:
            weight = weight.reshape(filters, channels, *window.kernel)
        network.convolution(x, weight, numbers(filters), window, residual, activation)
    elif kind == "depthwise":
        window = draw(windows(size))
        network.depthwise(x, numbers(channels, *window.kernel), numbers(channels), window, activation)
    elif kind in engine.POOLS:
        window = draw(windows(size, pool=True))
        if kind != "maximum":
            undilated = Window(window.kernel, window.stride, window.padding)
            window = undilated if min(undilated.output_size(size)) > 0 else Window()
        network.pool(x, window, kind)
    elif kind == "mean":
        network.mean(x)
    elif kind == "affine":
        scale, bias = (numbers(channels) if draw(st.booleans()) else None for _ in range(2))
        network.affine(x, scale, bias, activation)
    elif kind in engine.BINARIES:
        network.binary(x, draw(st.sampled_from(alike(shape))), kind, activation)
    elif kind == "gate":
        gate = network.mean(x)
        network.binary(x, gate, draw(st.sampled_from(engine.BINARIES)), activation)
    elif kind == "copy":
        pieces = []
        for i in draw(st.lists(st.sampled_from(others), min_size=1, max_size=3)):
            count = network.values[i].exact.shape[1]
            first = draw(st.integers(0, count - 1))
            pieces.append((i, first, draw(st.integers(1, count - first))))
        network.concatenate(pieces)
    elif kind == "attention":
        samples = draw(st.sampled_from([n for n in range(1, shape[0] + 1) if shape[0] % n == 0]))
        queries, keys = shape[0] // samples, draw(st.sampled_from([1, 2, 5, 7, 18, 33]))
        if draw(st.booleans()):
            keys = queries
        others = [i for i in matrices if len(network.values[i].exact) == samples * keys]
        if not others:
            return
        key, value = (draw(st.sampled_from(others)) for _ in range(2))
        least = min(network.values[i].exact.shape[1] for i in (x, key))
        heads = draw(st.integers(1, min(least, network.values[value].exact.shape[1], 4)))
        shared = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
        size, of_value = (draw(st.integers(1, n // heads)) for n in (least, network.values[value].exact.shape[1]))
        operands = []
        for i, width, number in ((x, size, heads), (key, size, heads // shared), (value, of_value, heads // shared)):
            room = network.values[i].exact.shape[1] - width
            stride = draw(st.integers(1, max(1, room // max(1, number - 1))))
            operands.append((i, draw(st.integers(0, room - (number - 1) * stride)), stride))
        of_mask = draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, queries]))
        mask = draw(st.sampled_from([None, *alike((samples * math.prod(of_mask), keys))]))
        scale, causal, first = draw(st.sampled_from([1.0, 0.125, -0.3])), draw(st.booleans()), draw(st.booleans())
        angles = [torch.rand(keys, size) - 0.5 for _ in range(2)]
        angles = angles if queries == keys and size % 2 == 0 and draw(st.booleans()) else None
        network.attention(
            operands, mask, heads, size, of_value, queries, keys, scale, causal, first, of_mask, shared, angles
        )
    else:
        epsilon = draw(st.sampled_from([1e-5, 1e-3]))
        network.layer_norm(x, numbers(channels), numbers(channels), epsilon, draw(st.booleans()))


KINDS = (
    "convolution", "residual", "depthwise", *engine.POOLS, "mean", "affine", *engine.BINARIES, "gate", "copy",
    "layer_norm", "attention",
)  # fmt: skip


@st.composite
def networks(draw, kinds, least=1, most=1):
    """A network, and arguments to run it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 1.0, 1e3, 1e-3, 1e-39]))
    if list(kinds) == ["attention"] or (draw(st.booleans()) and not set(kinds) <= set(ON_IMAGES)):
        shape = draw(ROWS), draw(CHANNELS)
    else:
        shape = draw(st.integers(1, 5)), draw(CHANNELS), draw(SIZES), draw(SIZES)
    inputs = draw(st.integers(1, 2))
    network = Network(*(torch.randn(shape, generator=generator) * scale for _ in range(inputs)))
    for _ in range(draw(st.integers(least, most))):
        add_operation(draw, network, draw(st.sampled_from(kinds)), generator)
    last = len(network.values) - 1
    outputs = sorted({*draw(st.lists(st.integers(0, last), max_size=2)), last})
    return network, outputs, {"threads": draw(st.integers(1, 3)), "channels_last": draw(st.booleans())}


@pytest.mark.slow
@settings(max_examples=300)
@given(drawn=networks(["convolution", "residual"]))
def test_convolution(drawn):
    network, outputs, arguments = drawn
    network.check(outputs, **arguments)


@pytest.mark.parametrize("kind", KINDS[2:])
@settings(max_examples=40)
@given(data=st.data())
def test_one_operation(kind, data):
    network, outputs, arguments = data.draw(networks([kind]))
    network.check(outputs, **arguments)


@settings(max_examples=300)
@given(drawn=networks(KINDS, 2, 7))
def test_networks(drawn):
    network, outputs, arguments = drawn
    network.check(outputs, **arguments)


def numbers(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("shape", [(2, 16), (65, 16), (1, 16, 1, 1), (1, 16, 9, 9)])
def test_residual_is_the_input(shape):
    """The output must not take the memory of the residual, which it may take if nothing else reads it."""
    network = Network(numbers(*shape))
    x = network.affine(0)
    kernel = {2: (), 4: (3, 3)}[len(shape)]
    window = Window(kernel, padding=(1, 1)) if kernel else Window()
    network.check([network.convolution(x, numbers(16, 16, *kernel), numbers(16), window, residual=x)], threads=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 3), (2, 1), (3, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_kernel_of_one_element(size, stride, padding):
    network = Network(numbers(1, 5, *size))
    window = Window(stride=stride, padding=padding)
    network.check([network.convolution(0, numbers(3, 5, 1, 1), numbers(3), window)])


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_rows_of_images(stride):
    """What a kernel reads beyond the end of a row must be padding, whatever the window."""
    for kernel, dilation, padding, width in itertools.product([2, 3, 4], [1, 2, 3], range(6), [5, 10, 11, 12]):
        window = Window((1, kernel), (1, stride), (0, padding), (1, dilation))
        if window.output_size((3, width))[1] >= 1:
            network = Network(numbers(1, 2, 3, width))
            network.check([network.convolution(0, numbers(2, 2, 1, kernel), numbers(2), window)])


@pytest.mark.parametrize("shape", [(300, 260), (2, 600, 9, 11), (1, 20, 70, 61)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large(shape, channels_last):
    """Several blocks of channels, tiles and bands."""
    network = Network(numbers(*shape))
    channels, kernel = shape[1], (3, 3)[: len(shape) - 2]
    x = network.layer_norm(0, numbers(channels), numbers(channels), 1e-5)
    x = network.binary(x, 0, "add", "relu")
    if kernel:
        x = network.depthwise(x, numbers(channels, *kernel), numbers(channels), Window(kernel, (1, 1), (1, 1)))
        x = network.binary(x, network.mean(x), "multiply", "sigmoid")
        x = network.pool(x, Window(kernel, (1, 1), (1, 1)), "maximum")
    x = network.affine(x, numbers(channels), numbers(channels))
    x = network.concatenate([(0, 3, channels - 3), (x, 0, channels - 1)])
    weight = numbers(48, 2 * channels - 4, *kernel)
    weight *= torch.rand(weight.shape) < 0.1
    network.convolution(x, weight, numbers(48), Window(kernel, padding=(1, 1)) if kernel else Window())
    network.check([x, x + 1], threads=2, channels_last=channels_last)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (37, 50), (130, 9), (64, 64)])
@pytest.mark.parametrize(("causal", "tokens_first"), [(False, False), (True, True)])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("every_query", [False, True])
def test_mask_of_attention(queries, keys, causal, tokens_first, heads, every_query):
    """A mask hides keys with negative infinity. Where it hides all of them, the result is zero, as in PyTorch."""
    rows = 2 * heads * (queries if every_query else 1)
    mask = numbers(rows, keys).masked_fill(torch.rand(rows, keys) < 0.4, -math.inf)
    mask[-1] = -math.inf
    network = Network(numbers(2 * queries, 12), numbers(2 * keys, 30), mask)
    operands = [(0, 0, 4), (1, 1, 5), (1, 14, 5)]
    of_mask = heads, queries if every_query else 1
    result = network.attention(operands, 2, 3, 4, 5, queries, keys, 0.5, causal, tokens_first, of_mask)
    network.check([result], threads=2)
    assert not network.values[result].exact[-1, -5:].any()  # of the last head


def test_attention_to_numbers_that_are_not_finite():
    """A bad query spoils its own result, a bad key or value those of its sample, as in PyTorch."""
    q, k, v = numbers(2 * 20, 8), numbers(2 * 20, 8), numbers(2 * 20, 8)
    network = Network(q, k, v)
    run = network.plan([network.attention([(0, 0, 4), (1, 0, 4), (2, 0, 4)], None, 2, 4, 4, 20, 20, 0.5, False)])
    for index, rows in ((0, slice(3, 4)), (1, slice(0, 20)), (2, slice(0, 20))):
        inputs = [x.clone() for x in (q, k, v)]
        inputs[index][3, 1] = math.nan  # of head 0
        (found,) = run(inputs)
        expected = torch.zeros(40, 8, dtype=torch.bool)
        expected[rows, slice(1, 2) if index == 2 else slice(0, 4)] = True
        assert torch.equal(found.isnan(), expected)


SAME = Window((3, 3), padding=(1, 1))
HALF = Window((3, 3), (2, 2), (1, 1))
SINGLE = {
    "1x1": lambda network: network.convolution(0, numbers(8, 4, 1, 1), numbers(8)),
    "1x1 and ReLU": lambda network: network.convolution(0, numbers(8, 4, 1, 1), numbers(8), activation="relu"),
    "1x1 and SiLU": lambda network: network.convolution(0, numbers(8, 4, 1, 1), numbers(8), activation="silu"),
    "3x3": lambda network: network.convolution(0, numbers(8, 4, 3, 3), numbers(8), SAME),
    "strided 3x3": lambda network: network.convolution(0, numbers(8, 4, 3, 3), numbers(8), HALF),
    "depthwise": lambda network: network.depthwise(0, numbers(4, 3, 3), numbers(4), SAME),
    "strided depthwise": lambda network: network.depthwise(0, numbers(4, 3, 3), numbers(4), HALF),
    "maximum": lambda network: network.pool(0, HALF, "maximum"),
    "maximum 2x2": lambda network: network.pool(0, Window((2, 2), (1, 1)), "maximum"),
    "maximum 5x5": lambda network: network.pool(0, Window((5, 5), (2, 2), (2, 2)), "maximum"),
    "average": lambda network: network.pool(0, SAME, "average"),
    "mean": lambda network: network.mean(0),
    "layer norm": lambda network: network.layer_norm(0, numbers(4), numbers(4), 1e-5),
    **{name: lambda network, name=name: network.affine(0, activation=name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SINGLE)
def test_not_finite(name, bad):
    """NaN and infinity spread to the positions to which they spread in PyTorch, and not to the next run."""
    network = Network(numbers(2, 4, 7, 9))
    spoiled = Network(network.inputs[0].clone())
    for place in [(0, 1, 2, 3), (0, 1, 2, 8), (0, 2, 6, 8), (1, 3, 0, 0)]:
        spoiled.inputs[0][place] = bad
    spoiled = Network(spoiled.inputs[0])
    torch.manual_seed(1)
    number = SINGLE[name](network)
    torch.manual_seed(1)
    SINGLE[name](spoiled)
    run = network.plan([number])
    network.compare([number], run(network.inputs))
    found = run(spoiled.inputs)
    spoiled.compare([number], found)
    if math.isnan(bad):
        assert torch.equal(found[0].isnan(), spoiled.values[number].exact.isnan())
    network.compare([number], run(network.inputs))


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "gelu", "gelu_tanh", "silu"])
def test_nan_with_payload(name):
    bits = torch.tensor([0x7FC00001, 0x7FC001FF, 0x7FFFFFFF, -1, -0x3FFE01], dtype=torch.int32)
    network = Network(bits.view(torch.float32)[:, None])
    (found,) = network.plan([network.affine(0, activation=name)])(network.inputs)
    assert found.isnan().all()
