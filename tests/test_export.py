"""Exports: outputs match PyTorch, sparsity is kept, files are small; latency, CSR products and shrinking."""

import builtins
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparing
from sparing.export import csr, formats, latency, mnn, network, onnx, openvino, runtimes
from sparing.export.runtimes import Process
from sparing.export.shrink import shrink
from sparing.plots import latency_bars
from tolerance import near, relative_error, tolerance

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} of sparing[export] is not installed")
# Importing MNN prints to stdout, so sparing imports it only in separate processes.
pytestmark = pytest.mark.skipif(not latency.available(), reason="mnn of sparing[export] is not installed")


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


@pytest.mark.parametrize("name", MODELS)
def test_outputs_match_pytorch_in_every_runtime(name):
    import onnx as package

    make, example = MODELS[name]
    model = trained(make)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = network.plain(model)
    allowed = relative_error(plain, *network.random_inputs(example, 5)[0])
    written = onnx.save(model, "network.onnx", example)
    assert written.error < allowed
    mnn.convert(Path("network.onnx"), Path("network.mnn"))
    files = {"onnxruntime": "network.onnx", "openvino_fp32": "network.onnx", "mnn": "network.mnn"}
    for runtime, file in files.items():
        with Process(runtime, file, threads=1) as process:
            for batch in (1, 5):  # the batch size is dynamic
                args, kwargs = network.random_inputs(example, batch)
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


def test_every_format_writes_a_file_with_matching_outputs():
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
    sizes, plain = {}, network.plain(model)
    allowed = relative_error(plain, *network.random_inputs((1, 3, 8, 8))[0])
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
        args, _ = network.random_inputs((1, 3, 8, 8))
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


def test_onnx_constant_of_shape_has_an_explicit_value():
    model = sparing.models.fastgrnn(5, 6, hidden_size=8).eval()  # the initial state is zeros of the batch size
    nodes = onnx.export(model, (1, 3, 6)).model.graph.all_nodes()
    (zeros,) = [node for node in nodes if node.op_type == "ConstantOfShape"]
    value = zeros.attributes["value"].as_tensor().numpy()
    assert (value.tolist(), value.dtype) == ([0.0], "float32")


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
    with pytest.raises(sparing.InputError, match=r"example must be a shape such as \(1, .*\) or tensors, got 'x'"):
        onnx.save(nn.Linear(3, 3), "no.onnx", "x")
    with pytest.raises(sparing.InputError, match="no.mnn: the suffix of an OpenVINO file must be .xml, got '.mnn'"):
        openvino.save(nn.Linear(3, 3), "no.mnn", (1, 3))
    Path("noise.onnx").write_bytes(b"noise")
    with pytest.raises(sparing.InputError, match="MNN cannot convert the network: "):
        mnn.convert(Path("noise.onnx"), Path("noise.mnn"))
    assert sorted(path.name for path in Path().iterdir()) == ["noise.onnx"]


def test_export_with_output_mismatch_is_not_written(monkeypatch):
    monkeypatch.setattr(onnx, "_run", lambda path, inputs: [torch.zeros(3, 2)])
    with pytest.raises(sparing.InputError, match="output mismatch with PyTorch: maximum relative error 1, allowed"):
        onnx.save(nn.Sequential(nn.Linear(4, 2)), "wrong.onnx", (1, 4))
    assert not list(Path().iterdir())


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "MNN" else builtins.object())
    with pytest.raises(sparing.InputError, match=re.escape("mnn is not installed; run pip install 'sparing[export]'")):
        mnn.save(nn.Linear(2, 2), "x.mnn", (1, 2))


def test_max_relative_error_and_check():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert network.max_relative_error([one], [one]) == 0
    assert network.max_relative_error([one], [torch.ones(3)]) == float("inf")
    assert network.max_relative_error([one], [one, one]) == float("inf")
    for pair in (([one], [nan]), ([one, one], [nan, one])):
        with pytest.raises(sparing.InputError, match="the model: output mismatch with PyTorch"):
            network.check("the model", *pair)


# Latency. No test asserts an absolute time.


@pytest.fixture(scope="module")
def measured():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    with torch.no_grad():
        model[0].weight[torch.rand(16, 3, 3, 3) < 0.9] = 0
    quick = ("torch sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    return latency.measure(
        model, (1, 3, 8, 8), batches=(1, 2), threads=(1,), backends=quick, sweep=(0.5, 0.9), rounds=2, turn=0.01
    )


def test_every_backend_has_a_row(measured):
    assert [(row.batch, row.name) for row in measured.rows] == [
        (batch, name)
        for batch in (1, 2)
        for name in ("MNN sparse", "torch sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    ]
    for row in measured.rows:
        if row.name == "OpenVINO bf16":  # not every processor supports it
            assert row.seconds is not None or row.note == "this processor does not support bf16"
            continue
        assert row.error < network.TOLERANCE  # dense MNN uses Winograd convolutions
        assert 0 < row.lowest <= row.seconds <= row.highest
        assert 0 < row.ratio_lowest <= row.ratio <= row.ratio_highest
    for batch in (1, 2):  # ratios are relative to the fastest sparse backend
        assert 1 in [row.ratio for row in measured.rows if row.batch == batch and row.name in latency.SPARSE_BACKENDS]
        fastest = min(
            row.seconds for row in measured.rows if row.batch == batch and row.name in latency.SPARSE_BACKENDS
        )
        assert [row.seconds for row in measured.rows if row.batch == batch and row.ratio == 1] == [fastest]
    assert list(measured.sweep) == [0.5, 0.9]
    assert measured.sizes["sparse.mnn"] > 0
    assert measured.machine["versions"]["torch"] == torch.__version__


def test_latency_of_a_model_with_keyword_inputs():
    class Difference(nn.Module):
        def forward(self, *, one, other):
            return one - other

    rows = latency.measure(
        Difference(), {"other": torch.randn(1, 4), "one": torch.randn(1, 4)}, batches=(1,), threads=(1,),
        backends=("torch eager",), sweep=(), rounds=1, turn=0.001,
    ).rows  # fmt: skip
    assert [row.error for row in rows] == [0, 0]


def test_ratios_compare_times_of_the_same_round():
    row = latency._timing("it", 1, 1, [2.0, 8.0, 3.0], [1.0, 2.0, 2.0], 0.0)
    assert (row.seconds, row.lowest, row.highest) == (3, 2, 8)
    assert (row.ratio, row.ratio_lowest, row.ratio_highest) == (2, 1.5, 4)


def test_table_json_and_figure_agree(measured):
    text = str(measured)
    assert text.count("MNN sparse") >= 2
    assert "batch 2, 1 thread" in text
    content = json.loads(measured.to_json())
    assert content["rows"][0]["seconds"] == measured.rows[0].seconds
    assert content["sweep"] == {str(key): value for key, value in measured.sweep.items()}
    figure = latency_bars(measured.bars())
    assert [axes.get_title() for axes in figure.axes] == ["batch 1, 1 thread", "batch 2, 1 thread"]
    assert len(figure.axes[0].patches) == sum(row.seconds is not None for row in measured.rows) / 2


def test_unavailable_backend_has_a_note(monkeypatch):
    monkeypatch.setitem(latency.BACKENDS, "OpenVINO fp32", ("absent", "network.onnx"))
    rows = latency.measure(
        nn.Sequential(nn.Linear(4, 4)), (1, 4), batches=(1,), threads=(1,), backends=("OpenVINO fp32",), sweep=(),
        rounds=1, turn=0.001,
    ).rows  # fmt: skip
    assert rows[0].seconds is not None
    assert (rows[1].seconds, rows[1].note) == (None, "'absent'")


def test_missing_runtime_raises_unavailable_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("onnxruntime", "openvino", "MNN"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module', name={name!r})")
    for runtime in ("onnxruntime", "openvino_bf16", "mnn"):
        with pytest.raises(runtimes.UnavailableError, match="^not installed$"):
            Process(runtime, "absent.onnx", threads=1)


def test_crashing_runtime_reports_its_error():
    Path("noise.onnx").write_bytes(b"noise")
    with pytest.raises(runtimes.UnavailableError, match="noise.onnx"):
        Process("onnxruntime", "noise.onnx", threads=1)


def row(name, ratio):
    return latency.Timing(name, 1, 1, ratio, ratio, ratio, ratio, ratio, ratio, 0.0)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (
            [("MNN sparse", 1), ("MNN dense", 3), ("ONNX Runtime", 2), ("OpenVINO bf16", 1.5)],
            "MNN sparse is 2.00x faster than the fastest dense fp32 baseline, ONNX Runtime. "
            "It is 1.50x faster than dense bf16 (OpenVINO).",
        ),
        (
            [("MNN sparse", 1), ("ONNX Runtime", 2), ("OpenVINO bf16", 0.5)],
            "MNN sparse is 2.00x faster than the fastest dense fp32 baseline, ONNX Runtime. "
            "It is 2.00x slower than dense bf16 (OpenVINO).",
        ),
        (
            [("MNN sparse", 1), ("torch eager", 0.8)],
            "MNN sparse is 1.25x slower than the fastest dense fp32 baseline, torch eager; bf16 was not measured.",
        ),
        (
            [("MNN sparse", 1.5), ("torch sparse", 1), ("torch eager", 3)],
            "torch sparse is 3.00x faster than the fastest dense fp32 baseline, torch eager; bf16 was not measured.",
        ),
        ([("MNN sparse", 1)], "Not measured: requires at least one sparse backend and one dense fp32 baseline."),
    ],
)
def test_verdict(rows, verdict):
    found = latency.Latency(tuple(row(*each) for each in rows), {}, 0.9, {"processor": "x"}, 1)
    assert found.verdict(1, 1) == verdict
    assert verdict in str(found)


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({}, "Break-even sparsity was not measured."),
        ({0.5: 0.8, 0.9: 2.0}, "Break-even sparsity is between 50 and 90 % (...); speedup of 2.00x at 90 %."),
        (
            {0.5: 1.1, 0.9: 2.0},
            "Break-even sparsity is at most 50 %, the lowest that was measured (...); speedup of 1.10x at 50 %.",
        ),
        ({0.5: 1.1, 0.7: 0.9, 0.9: 2.0}, "Break-even sparsity is between 70 and 90 % (...); speedup of 2.00x at 90 %."),
        ({0.5: 0.5, 0.9: 0.9}, "Break-even sparsity is above 90 % (...)."),
    ],
)
def test_break_even(sweep, sentence):
    expected = sentence.replace("...", "batch 1, one thread, zeros at random positions")
    assert latency.Latency((), sweep, 0.9, {}, 1).break_even() == expected


def test_unknown_backend_is_named():
    with pytest.raises(sparing.InputError, match="unknown backend 'TVM'; choose from MNN sparse"):
        latency.measure(nn.Linear(2, 2), (1, 2), backends=["TVM"])


# CSR products.


def sparse_(layer, sparsity):
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < sparsity] = 0
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (64,), (2, 3, 64), (0, 64)])
def test_csr_linear_matches_linear(shape, bias):
    layer = sparse_(nn.Linear(64, 30, bias=bias), 0.9)
    x = torch.randn(shape)
    torch.testing.assert_close(csr.CSRLinear(layer)(x), layer(x), **near(layer, x))


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_csr_pointwise_matches_conv2d(stride):
    layer = sparse_(nn.Conv2d(12, 7, 1, stride=stride), 0.9)
    x = torch.randn(3, 12, 9, 8)
    torch.testing.assert_close(csr.CSRPointwise(layer)(x), layer(x), **near(layer, x))


def fix_times(monkeypatch, dense, sparse):
    """Replace the measured times, so that the result does not depend on the machine."""
    monkeypatch.setattr(csr, "_median_times", lambda first, second, rounds: (dense, sparse))


def test_faster_layers_are_replaced_and_outputs_match(monkeypatch):
    torch.manual_seed(0)
    model = sparing.densify_(trained(sparing.models.resnet8))
    model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1)  # 3×3 convolutions and dense layers are not replaced
    x = torch.randn(2, 1, 28, 28)
    expected, close = model.eval()(x), near(model, x)
    fix_times(monkeypatch, 2.0, 1.0)
    swaps = csr.accelerate_(model, (1, 1, 28, 28))
    assert [(swap.name, swap.swapped) for swap in swaps] == [
        ("layer2.0.downsample.0", True), ("layer3.0.downsample.0", True), ("fc", True)
    ]  # fmt: skip
    assert all(swap.error < tolerance(torch.float32, terms=64) for swap in swaps)  # the largest fan-in
    assert type(model.fc) is csr.CSRLinear
    assert type(model.layer2[0].downsample[0]) is csr.CSRPointwise
    torch.testing.assert_close(model(x), expected, **close)


def test_slower_and_dense_layers_are_not_replaced(monkeypatch):
    model = nn.Sequential(sparse_(nn.Linear(50, 50), 0.95), nn.Linear(50, 50))
    fix_times(monkeypatch, 1.0, 1.0)
    first, second = csr.accelerate_(model, (1, 50))
    assert (first.swapped, second.swapped) == (False, False)
    assert (first.csr_seconds, second.csr_seconds) == (1.0, None)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize(
    "kind", [{"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, {"kernel_size": 1, "groups": 2}]
)
def test_unsupported_convolutions_are_not_timed(monkeypatch, kind):
    model = nn.Sequential(sparse_(nn.Conv2d(4, 4, **kind), 0.95))
    fix_times(monkeypatch, 2.0, 1.0)
    assert csr.accelerate_(model, (1, 4, 5, 5)) == []


def test_shared_layer_is_replaced_in_both_places(monkeypatch):
    shared = sparse_(nn.Linear(20, 20), 0.95)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 20)
    expected, close = model(x), near(model, x)
    fix_times(monkeypatch, 2.0, 1.0)
    csr.accelerate_(model, (1, 20))
    assert model[0] is model[2]
    assert type(model[0]) is csr.CSRLinear
    torch.testing.assert_close(model(x), expected, **close)


def test_accelerate_uses_measured_times():
    (swap,) = csr.accelerate_(nn.Sequential(sparse_(nn.Linear(300, 300), 0.99)), (1, 300), batch=4)
    assert swap.dense_seconds > 0
    assert swap.csr_seconds > 0
    assert swap.swapped == (swap.dense_seconds >= 1.1 * swap.csr_seconds)


def test_layers_of_fused_transformer_kernels_are_not_timed():
    model = Transformer().eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.02)
    tokens = torch.randint(50, (2, 7))
    swaps = csr.accelerate_(model, tokens)
    assert not [swap for swap in swaps if "encoder" in swap.name]
    with torch.no_grad():
        assert model(tokens).shape == (2, 7, 50)


def test_accelerate_rejects_a_sparsified_model():
    model = nn.Sequential(nn.Linear(4, 4))
    sparing.sparsify_(model, sparing.STR())
    with pytest.raises(sparing.InputError, match="call sparing.densify_"):
        csr.accelerate_(model, (1, 4))


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
    args, kwargs = network.random_inputs(example, 4)
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
    args, _ = network.random_inputs((1, 1, 28, 28))
    error = network.max_relative_error(network.outputs(model.eval(), args, {}), network.outputs(small, args, {}))
    assert error < relative_error(model, *args)
