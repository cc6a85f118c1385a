"""Exports: outputs match PyTorch, sparsity is kept, files are small; shrinking."""

import builtins
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

import sparing
from sparing import formats
from sparing.export import mnn, network, onnx, openvino
from sparing.export.inputs import find_inputs
from sparing.export.runtimes import Process
from sparing.export.shrink import shrink
from sparing.latency import measure
from tolerance import near, relative_error

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} of sparing[export] is not installed")
# Importing MNN prints to stdout, so sparing imports it only in separate processes.
pytestmark = pytest.mark.skipif(network.find_spec("MNN") is None, reason="mnn of sparing[export] is not installed")


class Recurrent(nn.Module):
    """Two-layer bidirectional LSTM with a classifier on the last time step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """Transformer encoder from tokens to logits, with fused attention."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens):
        return self.head(self.encoder(self.tokens(tokens)))


MODELS = {
    "resnet8": (sparing.models.resnet8, (1, 1, 28, 28)),
    "mobilenet_v1": (lambda: sparing.models.mobilenet_v1(width=0.25), (1, 3, 64, 64)),
    "lstm": (Recurrent, (1, 7, 12)),
    "transformer": (Transformer, torch.randint(50, (2, 7))),
}  # bench/check_exports.py checks the larger models, which take long to trace


def trained(make, sparsity=0.9):
    """Return a model similar to a trained one: sparse, with non-trivial batch normalization statistics."""
    model = make()
    sparing.sparsify_(model, sparing.StaticRandom(budget=sparing.Budget.uniform(model, sparsity)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outputs_match_pytorch_in_every_runtime(name):
    import onnx as package

    make, example = MODELS[name]
    model = trained(make)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = network.plain(model)
    allowed = relative_error(plain, *find_inputs(plain, example).sample(5)[0])
    written = onnx.save(model, "network.onnx", example)
    assert written.error < allowed
    mnn.convert(Path("network.onnx"), Path("network.mnn"))
    files = {"onnxruntime": "network.onnx", "openvino_fp32": "network.onnx", "mnn": "network.mnn"}
    for runtime, file in files.items():
        with Process(runtime, file, threads=1) as process:
            for batch in (1, 5):  # the batch size is dynamic
                args, kwargs = find_inputs(plain, example).sample(batch)
                got = process.run([tensor.numpy() for tensor in args])
                assert network.max_relative_error(network.outputs(plain, args, kwargs), got) < allowed, runtime
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    graph = package.load("network.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    kernels = [package.numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) == 4]
    assert all((kernel == 0).mean() > 0.85 for kernel in kernels), "folding batch normalization lost zeros"
    if name.startswith(("resnet", "mobile")):
        assert Path("network.mnn").stat().st_size < 0.4 * Path("network.onnx").stat().st_size


@pytest.mark.slow
def test_every_format_writes_a_file_with_matching_outputs():
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
    sizes, plain = {}, network.plain(model)
    allowed = relative_error(plain, *find_inputs(plain, (1, 3, 8, 8)).sample(2)[0])
    for name, (file, save) in formats.FORMATS.items():
        written = save(model, Path(file), (1, 3, 8, 8))
        assert written.path == Path(file)
        assert written.error < allowed
        sizes[name] = written.bytes
    assert sizes["onnx"] == Path("model.onnx").stat().st_size
    assert sizes["openvino"] == Path("model.xml").stat().st_size + Path("model.bin").stat().st_size
    assert sizes["compressed"] < 0.2 * sizes["safetensors"]
    assert sizes["mnn"] < 0.4 * sizes["safetensors"]
    with Process("openvino_fp32", "model.xml", threads=1) as process:
        args, _ = find_inputs(plain, (1, 3, 8, 8)).sample(2)
        got = process.run([args[0].numpy()])
    assert network.max_relative_error(network.outputs(plain, args, {}), got) < allowed
    state = sparing.export.compressed.load("compressed.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in sparing.dense_state_dict(model).items())


class Untraceable(nn.Module):
    """Control flow depends on the input values, which torch.export cannot trace."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def stored_shapes(path):
    import onnx

    return {tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{}, {"hidden_rank": 4}, {"learned_rank": True}], ids=str)
def test_fastgrnn_onnx_export_has_a_dynamic_batch_size(ranks):
    import onnxruntime

    model = sparing.models.fastgrnn(5, 6, hidden_size=32, **ranks).eval()
    written = onnx.save(model, "model.onnx", (1, 9, 6))  # compares the outputs with PyTorch
    x = torch.randn(7, 9, 6)
    assert written.error < relative_error(model, x)
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), **near(model, x))
    # U is stored as two low-rank factors if they are smaller.
    assert ((32, 32) in stored_shapes(written.path)) == ("hidden_rank" not in ranks)


@pytest.mark.slow
def test_export_compacts_learned_ranks():
    model = sparing.models.fastgrnn(5, 6, hidden_size=32, learned_rank=True).eval()
    with torch.no_grad():
        model.rnn.cell.hidden.diagonal.weight[:, 4:] = 0
    x = torch.randn(3, 9, 6)
    small = network.plain(model)
    assert [row.parameters for row in sparing.rnn.ranks(small).rows] == [32 * 6, 2 * 4 * 32]
    torch.testing.assert_close(small(x), model(x), **near(model, x))
    with torch.no_grad():
        model.rnn.cell.hidden.diagonal.weight.zero_()
    zero = network.plain(model)
    assert all(parameter.numel() for parameter in zero.parameters())  # runtimes reject matrices without elements
    torch.testing.assert_close(zero(x), model(x), **near(model, x))
    with pytest.raises(sparing.InputError, match=r"^OpenVINO cannot read the network: [^\n]+$"):
        openvino.save(sparing.rnn.compact_(model), "zero.xml", (1, 9, 6))


@pytest.mark.slow
def test_onnx_constant_of_shape_has_an_explicit_value():
    model = sparing.models.fastgrnn(5, 6, hidden_size=8).eval()  # the initial state is zeros of the batch size
    program, _ = onnx.export(model, find_inputs(model, (1, 3, 6)))
    (zeros,) = [node for node in program.model.graph.all_nodes() if node.op_type == "ConstantOfShape"]
    value = zeros.attributes["value"].as_tensor().numpy()
    assert (value.tolist(), value.dtype) == ([0.0], "float32")


@pytest.mark.slow
def test_sparse_fastgrnn_outputs_match_in_mnn():
    model = sparing.models.fastgrnn(5, 6, hidden_size=32, hidden_rank=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[torch.rand_like(parameter) < 0.9] = 0
    allowed = relative_error(model, torch.randn(2, 9, 6))
    assert mnn.save(model, "model.mnn", (1, 9, 6)).error < allowed  # checked with another batch size


def test_export_errors_name_the_cause_in_one_line():
    with pytest.raises(sparing.InputError, match=r"^the model cannot be traced for export: [^\n]+$"):
        onnx.save(Untraceable(), "no.onnx", (1, 3))
    with pytest.raises(sparing.InputError, match=r"nowhere/no.onnx cannot be written: No such file"):
        onnx.save(nn.Sequential(nn.Linear(3, 3)), "nowhere/no.onnx", (1, 3))
    for example in ("x", (), (torch.ones(1, 3), None), {"input": 3}, (1, 0)):
        with pytest.raises(sparing.InputError, match=r"example must be a shape such as \(1, .*\) or tensors, got "):
            onnx.save(nn.Linear(3, 3), "no.onnx", example)
    with pytest.raises(sparing.InputError, match=r"example \(1, 10{30}\) is too large for the memory"):
        onnx.save(nn.Linear(3, 3), "no.onnx", (1, 10**30))
    with pytest.raises(sparing.InputError, match=r"does not run on inputs of shape \[\(1, 4\)\]: mat1 and mat2 shapes"):
        onnx.save(nn.Linear(3, 3), "no.onnx", (1, 4))
    with pytest.raises(sparing.InputError, match="no.mnn: the suffix of an OpenVINO file must be .xml, got '.mnn'"):
        openvino.save(nn.Linear(3, 3), "no.mnn", (1, 3))
    Path("noise.onnx").write_bytes(b"noise")
    with pytest.raises(sparing.InputError, match="MNN cannot convert the network: "):
        mnn.convert(Path("noise.onnx"), Path("noise.mnn"))
    assert sorted(path.name for path in Path().iterdir()) == ["noise.onnx"]


def test_export_with_output_mismatch_is_not_written(monkeypatch):
    monkeypatch.setattr(Process, "run", lambda process, inputs: [torch.zeros(3, 2)])
    with pytest.raises(sparing.InputError, match="output mismatch with PyTorch: maximum relative error 1, allowed"):
        onnx.save(nn.Sequential(nn.Linear(4, 2)), "wrong.onnx", (1, 4))
    assert not list(Path().iterdir())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "MNN" else builtins.object())
    with pytest.raises(sparing.InputError, match=re.escape("mnn is not installed; run pip install 'sparing[export]'")):
        mnn.save(nn.Linear(2, 2), "x.mnn", (1, 2))


@pytest.mark.slow
def test_every_module_of_the_package_is_an_attribute():
    # In a new process: here the modules are imported already.
    code = (
        "import sparing, sys; print(*[name for name in sys.argv[1:] if getattr(sparing.export, name).__name__ != "
        "f'sparing.export.{name}' or name not in dir(sparing.export)], hasattr(sparing.export, 'absent'))"
    )
    names = [path.stem for path in Path(sparing.export.__file__).parent.glob("[!_]*.py")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
    assert len(names) > 5


# Names of inputs and outputs.


def names_of(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {value.name: value.shape for value in session.get_inputs()}, {
        value.name: value.shape for value in session.get_outputs()
    }


class Classifier(nn.Module):
    """Model with keyword inputs of its own order, and names that are also those of weights and of other values."""

    def __init__(self):
        super().__init__()
        self.words, self.scale = nn.Embedding(20, 8), nn.Parameter(torch.randn(8))

    def forward(self, input_ids, scale, add=None):
        hidden = self.words(input_ids) * scale[..., None] * self.scale
        return {"logits": hidden.relu() - 2 * add, "scale": scale, "relu": hidden + 1, "parts": (add, [hidden - 1])}


@pytest.mark.slow
def test_inputs_are_named_as_keywords_and_outputs_as_keys():
    import openvino as package

    ids = torch.randint(20, (1, 6))
    example = {"add": torch.ones(1, 6, 8), "input_ids": ids, "scale": torch.ones(1, 6)}
    inputs = {"add": ["batch", 6, 8], "input_ids": ["batch", 6], "scale": ["batch", 6]}
    outputs = ["logits", "scale_out", "relu", "parts_0", "parts_1_0"]
    onnx.save(
        Classifier(), "model.onnx", example
    )  # compares the outputs with PyTorch, so the names are at their values
    found, results = names_of("model.onnx")
    assert found == inputs
    assert list(results) == outputs
    openvino.save(Classifier(), "model.xml", example)
    read = package.Core().read_model("model.xml")
    assert [value.get_any_name() for value in read.inputs] == list(inputs)
    assert [value.get_any_name() for value in read.outputs] == outputs
    mnn.save(Classifier(), "model.mnn", example)
    content = Path("model.mnn").read_bytes()
    assert all(name.encode() in content for name in (*inputs, *outputs))


Pair = namedtuple("Pair", "mean rest")


class Positional(nn.Module):
    def forward(self, image, state, *more):
        total = image + state[0] + state[1]["k"] - 2 * more[0] + more[1]
        if len(image.shape) == 2:
            return Pair(total, [image, None, total])
        return total, None, image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "outputs"), [(2, ["mean", "rest_0", "rest_2"]), (3, ["output0", "output1"])], ids=["named", "numbered"]
)
def test_positional_inputs_are_named_as_parameters(size, outputs):
    tensors = [torch.ones(*[1] * (size - 1), 3) for _ in range(5)]
    example = (tensors[0], (tensors[1], {"k": tensors[2]}), *tensors[3:])
    onnx.save(Positional(), "model.onnx", example)
    found, results = names_of("model.onnx")
    assert list(found) == ["image", "state_0", "state_1_k", "more_0", "more_1"]
    assert list(results) == outputs


def test_output_that_is_not_a_tensor_is_named():
    class Count(nn.Module):
        def forward(self, x):
            return x, 3

    with pytest.raises(sparing.InputError, match="the model must return tensors, got 3 of type int"):
        onnx.save(Count(), "no.onnx", (1, 3))


# The dimension of the batch.


class Streaming(nn.Module):
    """Recurrent layer that takes and returns its state."""

    def __init__(self, kind=nn.LSTM, inputs=4, **options):
        super().__init__()
        self.layer = kind(inputs, 8, **options)
        self.head = nn.Linear(8 * (2 if self.layer.bidirectional else 1), 2)

    def forward(self, x, *state):
        if len(state) == 2:
            y, state = self.layer(x, state)
        else:
            y, state = self.layer(x, *state)
        return self.head(y), state


class Reversed(Streaming):
    def forward(self, h, c, x):
        return super().forward(x, h, c)


class InPlace(nn.LSTM):
    def forward(self, x):
        return super().forward(x.mul_(2))


class Deep(nn.Module):
    """Eight recurrent layers, each with its own state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(8))

    def forward(self, x, *states):
        new = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            new.append(state)
        return x, new


STATE = (torch.randn(1, 1, 8), torch.randn(1, 1, 8))


# The model, an example of its inputs, and the dimension of the batch in each.
BATCHES = {
    "lstm": (Streaming(batch_first=True), (torch.randn(1, 5, 4), *STATE), (0, 1, 1)),
    "state-in-a-tuple": (Streaming(batch_first=True), (torch.randn(1, 5, 4), STATE), (0, 1, 1)),
    "time-first": (Streaming(), (torch.randn(5, 1, 4), *STATE), (1, 1, 1)),
    # The number of layers and the number of features are equal to the batch size.
    "bidirectional": (
        Streaming(num_layers=2, bidirectional=True),
        (torch.randn(5, 4, 4), tuple(torch.randn(2, 4, 4, 8))),
        (1, 1, 1),
    ),
    # The sizes of the input are those of the state.
    "one-frame": (Streaming(inputs=8, batch_first=True), (torch.randn(1, 1, 8), *STATE), (0, 1, 1)),
    "one-frame-time-first": (Streaming(inputs=8), (torch.randn(1, 1, 8), *STATE), (1, 1, 1)),
    "state-first": (
        Reversed(inputs=8, batch_first=True),
        {"h": STATE[0], "c": STATE[1], "x": torch.randn(1, 1, 8)},
        (1, 1, 0),
    ),
    "many-states": (Deep(), tuple(torch.randn(9, 1, 1, 8)), (0, *[1] * 8)),
    "gru": (Streaming(nn.GRU, batch_first=True), (torch.randn(1, 5, 4), STATE[0]), (0, 1)),
    "gru-two-layers": (Streaming(nn.GRU, num_layers=2), (torch.randn(5, 1, 4), torch.randn(2, 1, 8)), (1, 1)),
    "rnn": (Streaming(nn.RNN, batch_first=True), (torch.randn(1, 5, 4), STATE[0]), (0, 1)),
    "without-state": (nn.LSTM(4, 8), (5, 1, 4), (1,)),
    "in-place": (InPlace(4, 8), (5, 1, 4), (1,)),
    "attention": (nn.MultiheadAttention(4, 2), tuple(torch.randn(3, 5, 1, 4)), (1, 1, 1)),
    "different-sizes": (nn.Bilinear(3, 3, 2), (torch.randn(1, 3), torch.randn(4, 3)), (0, 0)),
    "dependent-samples": (nn.BatchNorm1d(4, track_running_stats=False), (3, 4), (0,)),
    "convolution": (nn.Conv2d(3, 4, 3), (1, 3, 8, 8), (0,)),
    "tokens": (nn.Embedding(9, 4), torch.ones(2, 3, dtype=torch.int32), (0,)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_dimension_of_the_batch_is_found(name):
    model, example, dims = BATCHES[name]
    found = find_inputs(model.eval(), example)
    assert found.batch_dims == dims
    args, kwargs = found.sample(7)
    assert 7 in network.outputs(model, args, kwargs)[0].shape


def test_tensor_without_a_batch_keeps_its_shape():
    class Scaled(nn.Module):
        def forward(self, x, gain, temperature):
            return x * gain / temperature

    example = {"x": torch.randn(1, 6), "gain": torch.randn(6), "temperature": torch.tensor(2.0)}
    assert find_inputs(Scaled(), example).batch_dims == (0, None, None)
    assert onnx.save(Scaled(), "model.onnx", example).error < 1e-6
    assert names_of("model.onnx")[0] == {"x": ["batch", 6], "gain": [6], "temperature": []}


def test_finding_the_batch_changes_neither_model_nor_example():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x.mul_(2)

    model, x = Counting(), torch.ones(2, 3)
    find_inputs(model, x)
    assert model.count == 0
    assert bool((x == 1).all())


@pytest.mark.slow
def test_streaming_network_is_exported_with_a_dynamic_batch_size():
    model = trained(lambda: Streaming(batch_first=True), sparsity=0.5)
    example = {"x": torch.randn(1, 5, 4)} | dict(zip("hc", STATE, strict=True))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, h, c):
            y, (h, c) = self.model(x, h, c)
            return {"y": y, "h": h, "c": c}

    allowed = relative_error(network.plain(model), torch.randn(3, 5, 4), *torch.randn(2, 1, 3, 8))
    for save, file in ((onnx.save, "model.onnx"), (openvino.save, "model.xml"), (mnn.save, "model.mnn")):
        assert save(Named(), file, example).error < allowed  # checked with a batch of three
    state = [1, "batch", 8]
    assert names_of("model.onnx") == (
        {"x": ["batch", 5, 4], "h": state, "c": state},
        {"y": ["batch", 5, 2], "h_out": state, "c_out": state},
    )


class Branch(nn.Module):
    """Model whose control flow depends on the batch size, which torch.export cannot trace with a dynamic one."""

    def forward(self, x):
        return x + 1 if x.shape[0] < 3 else x * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "example", "shape", "message"),
    [
        (
            nn.LSTM(4, 8),
            (torch.randn(5, 4), (torch.randn(1, 8), torch.randn(1, 8))),
            [5, 4],
            "no dimension of the inputs",
        ),
        (nn.LSTM(4, 8), (5, 4), [5, 4], "cannot trace the model with a dynamic batch size"),
        (Branch(), (1, 4), [1, 4], "cannot trace the model with a dynamic batch size"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(12, 2)), (3, 2, 2), [3, 2, 2], "no dimension of the inputs"),
    ],
    ids=["state", "unbatched", "branch", "flatten"],
)
def test_batch_size_is_fixed_with_a_warning(model, example, shape, message):
    with pytest.warns(
        sparing.SparsityWarning, match=f"batch size is fixed at that of the example: .*{message}"
    ) as found:
        onnx.save(model, "model.onnx", example)
    assert found[0].filename == __file__
    assert next(iter(names_of("model.onnx")[0].values())) == shape


# Models that a runtime or a format does not support.


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


SAVES = {"onnx": onnx.save, "xml": openvino.save, "mnn": mnn.save}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SAVES)
@pytest.mark.parametrize(
    "example", [(1, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)], ids=["shape", "tensor"]
)
def test_bf16_model_is_refused_in_one_sentence(suffix, example):
    with pytest.raises(sparing.InputError) as caught:
        SAVES[suffix](convolutional().bfloat16(), f"model.{suffix}", example)
    message = str(caught.value)
    assert re.match(
        r".* cannot \w+ the network in torch.bfloat16 \(call model.float\(\) before the export\): \S", message
    )
    assert "\n" not in message
    assert not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "dtype", "reason"),
    [
        ("onnx", torch.float16, None),
        ("mnn", torch.float16, "an input cannot be float16; use float32"),
        ("onnx", torch.float64, ".*Could not find an implementation for Conv"),
        ("xml", torch.float64, None),
    ],
)
def test_half_and_double_precision(suffix, dtype, reason):
    model, files = convolutional().to(dtype), {f"model.{suffix}"} | ({"model.bin"} if suffix == "xml" else set())
    if reason is None:
        SAVES[suffix](model, f"model.{suffix}", (1, 3, 8, 8))  # compares the outputs with PyTorch
    else:
        refusal = rf"cannot run the network in {dtype} \(call model.float\(\) before the export\): {reason}"
        with pytest.raises(sparing.InputError, match=refusal):
            SAVES[suffix](model, f"model.{suffix}", (1, 3, 8, 8))
    assert {path.name for path in Path().iterdir()} == (files if reason is None else set())


@pytest.mark.slow
def test_allowed_error_depends_on_the_precision(monkeypatch):
    model = nn.Linear(3, 3)
    run = lambda process, inputs: [1.005 * model(torch.from_numpy(inputs[0])).detach().numpy()]  # noqa: E731
    monkeypatch.setattr(Process, "run", run)
    with pytest.raises(sparing.InputError, match="output mismatch with PyTorch: maximum relative error 0.005, allowed"):
        onnx.save(model, "model.onnx", (1, 3))
    assert 0.003 < onnx.save(model.half(), "model.onnx", (1, 3)).error < 0.007


@pytest.mark.slow
def test_network_that_crashes_the_runtime_is_refused(monkeypatch):
    # ONNX Runtime crashes on an LSTM in fp16, for example.
    crash = Path("crash", "onnxruntime.py")
    crash.parent.mkdir()
    crash.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(crash.parent.resolve()) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    with pytest.raises(sparing.InputError, match="ONNX Runtime cannot run the network: exit status -11"):
        onnx.save(nn.Linear(3, 3), "model.onnx", (1, 3))
    assert [path.name for path in Path().iterdir()] == ["crash"]


def test_model_without_values_is_refused():
    with torch.device("meta"):
        meta = convolutional()
    for model, reason in ((meta, "on the meta device"), (nn.Sequential(nn.LazyLinear(3)), "not initialized")):
        for file, save in formats.FORMATS.values():
            with pytest.raises(sparing.InputError, match=f"^'0.weight' is {reason} and has no values"):
                save(model, Path(file), (1, 3, 8, 8))
    assert not list(Path().iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantized_model_is_refused_or_exported():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    eager = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for name in ("onnx", "openvino", "mnn", "engine"):
        with pytest.raises(
            sparing.InputError, match="cannot be traced for export: '0' is quantized; export before quan"
        ):
            formats.FORMATS[name][1](eager, Path(formats.FORMATS[name][0]), (1, 16))
    for name in ("compressed", "safetensors"):
        with pytest.raises(
            sparing.InputError, match="entry '0._packed_params.dtype' of the state dict must be a tensor"
        ):
            formats.FORMATS[name][1](eager, Path(formats.FORMATS[name][0]), (1, 16))
    assert not list(Path().iterdir())
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for name in ("compressed", "safetensors"):
        with pytest.raises(sparing.InputError, match="tensor '0.weight' is of type Int8Tensor, which is quantized"):
            formats.FORMATS[name][1](model, Path(formats.FORMATS[name][0]), (1, 16))
    for call in (shrink, measure):
        with pytest.raises(sparing.InputError, match="'0.weight' is of type Int8Tensor, whose zeros are not known"):
            call(model, (1, 16))
    assert not list(Path().iterdir())
    assert onnx.save(model, "model.onnx", (1, 16)).error < network.TOLERANCE


def test_onnx_file_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(onnx, "LARGEST", 35)
    with pytest.raises(
        sparing.InputError, match="the model has 48 bytes of weights, more than the 35 of one .onnx file"
    ):
        onnx.save(nn.Linear(3, 3), "model.onnx", (1, 3))
    assert not list(Path().iterdir())


def test_openvino_writes_both_files_or_none(monkeypatch):
    Path("model.bin").write_text("weights of another model")
    Path("model.xml").mkdir()
    with pytest.raises(sparing.InputError, match=r"model.xml cannot be written: not a regular file"):
        openvino.save(nn.Linear(3, 3), "model.xml", (1, 3))
    assert Path("model.bin").read_text() == "weights of another model"


def test_max_relative_error_and_check():
    one, nan, masked = torch.ones(2), torch.tensor([1.0, float("nan")]), torch.tensor([2.0, -float("inf")])
    assert network.max_relative_error([one], [one]) == 0
    assert network.max_relative_error([masked], [masked]) == 0
    assert network.max_relative_error([masked], [masked + torch.tensor([1.0, 0.0])]) == 0.5
    assert network.max_relative_error([masked], [-masked]) == float("inf")
    assert network.max_relative_error([masked], [one]) == float("inf")
    assert network.max_relative_error([one], [torch.ones(3)]) == float("inf")
    assert network.max_relative_error([one], [one, one]) == float("inf")
    for pair in (([one], [nan]), ([one, one], [nan, one])):
        with pytest.raises(sparing.InputError, match="the model: output mismatch with PyTorch"):
            network.check("the model", *pair)
    with pytest.raises(sparing.InputError, match="the model: the model returns NaN for random inputs; no file"):
        network.check("the model", [one, nan], [one, nan])


# All-zero filters and unused channels.


def zero_filters_(layer, *filters):
    with torch.no_grad():
        layer.weight[list(filters)] = 0
    return layer


def assert_smaller(model, example, expected):
    """Assert that the shrunk copy has the expected weight shapes and the same outputs. Return the copy."""
    model.eval()
    small = shrink(model, example)
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparing.layers.find_layers(small).items()}
    assert {name: shapes[name] for name in expected} == expected
    args, kwargs = find_inputs(model, example).sample(4)
    error = network.max_relative_error(network.outputs(model, args, kwargs), network.outputs(small, args, kwargs))
    assert error < relative_error(model, *args)
    return small


def test_zero_filters_and_their_consumer_weights_are_removed():
    model = nn.Sequential(
        zero_filters_(nn.Conv2d(3, 8, 3, bias=False), 1, 2, 5), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    assert_smaller(model, (1, 3, 8, 8), {"0": (5, 3, 3, 3), "2": (4, 5, 3, 3)})
    assert model[0].weight.shape == (8, 3, 3, 3)


def batch_norm(channels, biases):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        # With a running mean of zero, the output of an all-zero filter is the bias.
        norm.running_mean[: len(biases)] = 0
        norm.bias[: len(biases)] = torch.tensor(biases)
    return norm


@pytest.mark.parametrize(("padding", "left"), [(0, 4), (1, 5)])
def test_constant_of_a_zero_filter_is_folded_unless_the_consumer_is_padded(padding, left):
    # The output of one all-zero filter is relu(-1) = 0, that of the other is relu(2) = 2. A convolution with padding
    # reads zeros instead of 2 at the border.
    model = nn.Sequential(
        zero_filters_(nn.Conv2d(3, 6, 3, bias=False), 0, 1), batch_norm(6, [-1.0, 2.0]), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=padding, bias=False),
    )  # fmt: skip
    small = assert_smaller(model, (1, 3, 8, 8), {"0": (left, 3, 3, 3), "3": (4, left, 3, 3)})
    assert (small[3].bias is not None) == (padding == 0)


def test_filter_with_weights_but_zero_output_is_kept():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias[0] = -1e4
    assert_smaller(model, (1, 4), {"0": (3, 4)})


def test_unused_filters_are_removed():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 9, 5))
    with torch.no_grad():
        model[3].weight.view(5, 6, 9)[:, [0, 4]] = 0
    assert_smaller(model, (1, 3, 5, 5), {"0": (4, 3, 3, 3), "3": (5, 36)})


def test_channel_of_a_residual_sum_is_removed_if_all_terms_are_zero():
    model = sparing.models.resnet8().eval()
    for name in ("layer2.0.conv2", "layer2.0.downsample.0"):
        zero_filters_(model.get_submodule(name), 3, 7)
    zero_filters_(model.layer2[0].conv2, 9)
    assert_smaller(model, (1, 1, 12, 12), {"layer2.0.conv2": (30, 32, 3, 3), "layer3.0.conv1": (64, 30, 3, 3)})


def test_zero_depthwise_filter_removes_its_channel():
    model = sparing.models.mobilenet_v1(width=0.25).eval()
    zero_filters_(model.model[3][0], 2, 3)
    inputs = model.model[3][0].in_channels
    assert_smaller(model, (1, 3, 32, 32), {"model.2.3": (inputs - 2, 16, 1, 1), "model.3.3": (32, inputs - 2, 1, 1)})


def test_removal_repeats_until_nothing_is_left_to_remove():
    # Filter 0 of the second layer has only one input: filter 0 of the first layer.
    model = nn.Sequential(
        zero_filters_(nn.Linear(4, 3, bias=False), 0),
        nn.Linear(3, 3, bias=False),
        nn.Linear(3, 3, bias=False),
        nn.Linear(3, 2),
    )
    with torch.no_grad():
        model[1].weight[0, 1:] = 0
        model[2].weight[0, 1:] = 0
    assert_smaller(model, (1, 4), {"0": (2, 4), "1": (2, 2), "2": (2, 2), "3": (2, 2)})


def test_rank_of_a_factorization_is_reduced():
    model = nn.Sequential(nn.Linear(20, 8, bias=False), nn.Linear(8, 30))
    with torch.no_grad():
        model[0].weight[[0, 1]] = 0
        model[1].weight[:, [1, 2, 3]] = 0
    small = assert_smaller(model, (1, 20), {"0": (4, 20), "1": (30, 4)})
    assert sum(p.numel() for p in small.parameters()) == 4 * 20 + 30 * 4 + 30


def test_all_zero_layer_keeps_one_channel():
    model = nn.Sequential(zero_filters_(nn.Linear(4, 3), 0, 1, 2), nn.ReLU(), nn.Linear(3, 2))
    assert_smaller(model, (1, 4), {"0": (1, 4), "2": (2, 1)})


def test_channels_before_layer_norm_are_kept():
    model = nn.Sequential(zero_filters_(nn.Linear(4, 6), 0, 1), nn.LayerNorm(6), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # unused by this layer, but part of the mean of LayerNorm
    assert_smaller(model, (1, 4), {"0": (6, 4)})


class OutputToo(nn.Module):
    """Model that returns its hidden channels, so that none may be removed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = zero_filters_(nn.Linear(4, 6), 0), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        return hidden, self.second(hidden)


def test_channels_of_a_parameter_outside_of_layers_are_kept():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.second(torch.relu(self.first(x)) * self.gain)

    model = Scaled()
    with torch.no_grad():
        model.first.weight[2:5] = 0
    x = torch.randn(4, 6)
    torch.testing.assert_close(shrink(model, (1, 6))(x), model(x), **near(model, x))


def test_shrink_rejects_a_model_with_output_mismatch():
    with pytest.raises(sparing.InputError, match="the model without all-zero filters: output mismatch with PyTorch"):
        shrink(OutputToo(), (1, 4))


def test_shrink_after_str_with_a_threshold_per_filter():
    model = sparing.models.resnet8()
    sparing.sparsify_(model, sparing.STR(init=-3.0, granularity="filter"))
    with torch.no_grad():
        for layer in sparing.sparse_layers(model).values():
            if layer.name.endswith("conv1"):
                layer.parametrization.s[::2] = 10
    small = shrink(model, (1, 1, 28, 28))
    assert small.layer3[0].conv1.weight.shape[0] == 32
    weights = sum(layer.weight.numel() for layer in sparing.layers.find_layers(small).values())
    assert weights < 0.7 * 77_072
    args = (torch.randn(2, 1, 28, 28),)
    error = network.max_relative_error(network.outputs(model.eval(), args, {}), network.outputs(small, args, {}))
    assert error < relative_error(model, *args)
