"""Exported networks compute what torch computes, hold their zeros, and are as small and fast as promised."""

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

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} of sparing[export] is not installed")
# Importing MNN prints, which is why sparing itself does so in processes of their own alone.
pytestmark = pytest.mark.skipif(not latency.available(), reason="mnn of sparing[export] is not installed")


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers, read at its last step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """Tokens in, logits out, through fused attention."""

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
}  # the larger models, whose tracing takes long, are checked by bench/check_exports.py


def trained(make, sparsity=0.9):
    """A model as training would leave it: sparse, and with statistics in its batch normalization."""
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
def test_every_runtime_computes_what_torch_computes(name):
    import onnx as package

    make, example = MODELS[name]
    model = trained(make)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    written = onnx.save(model, "network.onnx", example)
    assert written.error < 1e-5
    mnn.convert(Path("network.onnx"), Path("network.mnn"))
    plain = network.plain(model)
    files = {"onnxruntime": "network.onnx", "openvino_fp32": "network.onnx", "mnn": "network.mnn"}
    for runtime, file in files.items():
        with Process(runtime, file, threads=1) as process:
            for batch in (1, 5):  # the batch size is free
                args, kwargs = network.random_inputs(example, batch)
                got = process.run([tensor.numpy() for tensor in args])
                assert network.largest_error(network.outputs(plain, args, kwargs), got) < 1e-5, runtime
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    graph = package.load("network.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    kernels = [package.numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) == 4]
    assert all((kernel == 0).mean() > 0.85 for kernel in kernels), "folding lost zeros"
    if name.startswith(("resnet", "mobile")):
        assert Path("network.mnn").stat().st_size < 0.4 * Path("network.onnx").stat().st_size


def test_each_format_is_written_checked_and_read_back():
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
    sizes = {}
    for name, (file, save) in formats.FORMATS.items():
        written = save(model, Path(file), (1, 3, 8, 8))
        assert written.path == Path(file)
        assert written.error < 1e-5
        sizes[name] = written.bytes
    assert sizes["onnx"] == Path("model.onnx").stat().st_size
    assert sizes["openvino"] == Path("model.xml").stat().st_size + Path("model.bin").stat().st_size
    assert sizes["compressed"] < 0.2 * sizes["safetensors"]
    assert sizes["mnn"] < 0.4 * sizes["safetensors"]
    with Process("openvino_fp32", "model.xml", threads=1) as process:
        args, _ = network.random_inputs((1, 3, 8, 8))
        got = process.run([args[0].numpy()])
    assert network.largest_error(network.outputs(network.plain(model), args, {}), got) < 1e-5
    state = sparing.export.compressed.load("compressed.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in sparing.dense_state_dict(model).items())


class Untraceable(nn.Module):
    """Its path depends on the numbers, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def stored_shapes(path):
    import onnx

    return {tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("ranks", [{}, {"hidden_rank": 4}, {"learned_rank": True}], ids=str)
def test_a_fastgrnn_is_written_for_any_batch(ranks):
    import onnxruntime

    model = sparing.models.fastgrnn(5, 6, hidden_size=32, **ranks).eval()
    written = onnx.save(model, "model.onnx", (1, 9, 6))  # which compares it with torch
    assert written.error < 1e-5
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    x = torch.randn(7, 9, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)
    # U is stored as its two thin factors where they are smaller.
    assert ((32, 32) in stored_shapes(written.path)) == ("hidden_rank" not in ranks)


def test_what_a_learned_rank_left_dead_is_not_exported():
    model = sparing.models.fastgrnn(5, 6, hidden_size=32, learned_rank=True).eval()
    with torch.no_grad():
        model.rnn.cell.hidden.diagonal.weight[:, 4:] = 0
    x = torch.randn(3, 9, 6)
    small = network.plain(model)
    assert [row.parameters for row in sparing.rnn.ranks(small).rows] == [32 * 6, 2 * 4 * 32]
    torch.testing.assert_close(small(x), model(x), atol=1e-6, rtol=0)
    with torch.no_grad():
        model.rnn.cell.hidden.diagonal.weight.zero_()
    dead = network.plain(model)
    assert all(parameter.numel() for parameter in dead.parameters())  # no runtime takes a matrix without elements
    torch.testing.assert_close(dead(x), model(x), atol=1e-6, rtol=0)
    with pytest.raises(sparing.InputError, match=r"^OpenVINO cannot read the network: [^\n]+$"):
        openvino.save(sparing.rnn.compact_(model), "dead.xml", (1, 9, 6))


def test_zeros_that_onnx_implies_are_written_out():
    model = sparing.models.fastgrnn(5, 6, hidden_size=8).eval()  # its first state is zeros, as many as the batch
    nodes = onnx.export(model, (1, 3, 6)).model.graph.all_nodes()
    (zeros,) = [node for node in nodes if node.op_type == "ConstantOfShape"]
    value = zeros.attributes["value"].as_tensor().numpy()
    assert (value.tolist(), value.dtype) == ([0.0], "float32")


def test_a_sparse_fastgrnn_is_right_in_mnn():
    model = sparing.models.fastgrnn(5, 6, hidden_size=32, hidden_rank=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[torch.rand_like(parameter) < 0.9] = 0
    assert mnn.save(model, "model.mnn", (1, 9, 6)).error < 1e-5  # which is checked with another batch


def test_what_cannot_be_exported_is_refused_in_one_sentence():
    with pytest.raises(sparing.InputError, match=r"^the model cannot be traced for export: [^\n]+$"):
        onnx.save(Untraceable(), "no.onnx", (1, 3))
    with pytest.raises(sparing.InputError, match=r"nowhere/no.onnx cannot be written: No such file"):
        onnx.save(nn.Sequential(nn.Linear(3, 3)), "nowhere/no.onnx", (1, 3))
    with pytest.raises(sparing.InputError, match="example='x' is neither a shape"):
        onnx.save(nn.Linear(3, 3), "no.onnx", "x")
    with pytest.raises(sparing.InputError, match="no.mnn: an OpenVINO file must end in .xml"):
        openvino.save(nn.Linear(3, 3), "no.mnn", (1, 3))
    Path("noise.onnx").write_bytes(b"noise")
    with pytest.raises(sparing.InputError, match="MNN cannot convert the network: "):
        mnn.convert(Path("noise.onnx"), Path("noise.mnn"))
    assert sorted(path.name for path in Path().iterdir()) == ["noise.onnx"]


def test_an_export_that_computes_something_else_is_not_written(monkeypatch):
    monkeypatch.setattr(onnx, "_run", lambda path, inputs: [torch.zeros(3, 2)])
    with pytest.raises(sparing.InputError, match="gives other outputs than torch: they differ by 1 of the largest"):
        onnx.save(nn.Sequential(nn.Linear(4, 2)), "wrong.onnx", (1, 4))
    assert not list(Path().iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "MNN" else builtins.object())
    with pytest.raises(sparing.InputError, match=re.escape("mnn is not installed; pip install 'sparing[export]'")):
        mnn.save(nn.Linear(2, 2), "x.mnn", (1, 2))


def test_errors_of_outputs():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert network.largest_error([one], [one]) == 0
    assert network.largest_error([one], [torch.ones(3)]) == float("inf")
    assert network.largest_error([one], [one, one]) == float("inf")
    for pair in (([one], [nan]), ([one, one], [nan, one])):
        with pytest.raises(sparing.InputError, match="gives other outputs"):
            network.check("it", *pair)


# Latency: no test asserts a time.


@pytest.fixture(scope="module")
def measured():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    with torch.no_grad():
        model[0].weight[torch.rand(16, 3, 3, 3) < 0.9] = 0
    quick = ("torch sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    return latency.measure(
        model, (1, 3, 8, 8), batches=(1, 2), threads=(1,), contestants=quick, sweep=(0.5, 0.9), rounds=2, turn=0.01
    )


def test_every_contestant_has_a_row(measured):
    assert [(row.batch, row.name) for row in measured.rows] == [
        (batch, name)
        for batch in (1, 2)
        for name in ("MNN sparse", "torch sparse", "MNN dense", "ONNX Runtime", "OpenVINO bf16", "torch eager")
    ]
    for row in measured.rows:
        if row.name == "OpenVINO bf16":  # which this processor may not have
            assert row.seconds is not None or row.note == "this processor has no bf16"
            continue
        assert row.error < 1e-3  # MNN, dense, computes convolutions by Winograd
        assert 0 < row.lowest <= row.seconds <= row.highest
        assert 0 < row.ratio_lowest <= row.ratio <= row.ratio_highest
    for batch in (1, 2):  # ratios are of the faster of the two
        assert 1 in [row.ratio for row in measured.rows if row.batch == batch and row.name in latency.SPARSE_ONES]
        fastest = min(row.seconds for row in measured.rows if row.batch == batch and row.name in latency.SPARSE_ONES)
        assert [row.seconds for row in measured.rows if row.batch == batch and row.ratio == 1] == [fastest]
    assert list(measured.sweep) == [0.5, 0.9]
    assert measured.sizes["sparse.mnn"] > 0
    assert measured.machine["versions"]["torch"] == torch.__version__


def test_a_model_of_keyword_inputs_has_its_rivals_in_torch():
    class Difference(nn.Module):
        def forward(self, *, one, other):
            return one - other

    rows = latency.measure(
        Difference(), {"other": torch.randn(1, 4), "one": torch.randn(1, 4)}, batches=(1,), threads=(1,),
        contestants=("torch eager",), sweep=(), rounds=1, turn=0.001,
    ).rows  # fmt: skip
    assert [row.error for row in rows] == [0, 0]


def test_ratios_are_of_the_same_round():
    row = latency._timing("it", 1, 1, [2.0, 8.0, 3.0], [1.0, 2.0, 2.0], 0.0)
    assert (row.seconds, row.lowest, row.highest) == (3, 2, 8)
    assert (row.ratio, row.ratio_lowest, row.ratio_highest) == (2, 1.5, 4)


def test_the_table_the_json_and_the_figure_say_the_same(measured):
    text = str(measured)
    assert text.count("MNN sparse") >= 2
    assert "batch 2, 1 thread" in text
    content = json.loads(measured.to_json())
    assert content["rows"][0]["seconds"] == measured.rows[0].seconds
    assert content["sweep"] == {str(key): value for key, value in measured.sweep.items()}
    figure = latency_bars(measured.bars())
    assert [axes.get_title() for axes in figure.axes] == ["batch 1, 1 thread", "batch 2, 1 thread"]
    assert len(figure.axes[0].patches) == sum(row.seconds is not None for row in measured.rows) / 2


def test_a_rival_that_is_missing_or_fails_says_so(monkeypatch):
    monkeypatch.setitem(latency.CONTESTANTS, "OpenVINO fp32", ("absent", "network.onnx"))
    rows = latency.measure(
        nn.Sequential(nn.Linear(4, 4)), (1, 4), batches=(1,), threads=(1,), contestants=("OpenVINO fp32",), sweep=(),
        rounds=1, turn=0.001,
    ).rows  # fmt: skip
    assert rows[0].seconds is not None
    assert (rows[1].seconds, rows[1].note) == (None, "'absent'")


def test_a_runtime_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("onnxruntime", "openvino", "MNN"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module', name={name!r})")
    for runtime in ("onnxruntime", "openvino_bf16", "mnn"):
        with pytest.raises(runtimes.UnavailableError, match="^not installed$"):
            Process(runtime, "absent.onnx", threads=1)


def test_a_crashing_runtime_says_what_it_said():
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
            "MNN sparse is 2.00 times as fast as the fastest dense fp32 rival, ONNX Runtime. "
            "It is 1.50 times as fast as dense bf16.",
        ),
        (
            [("MNN sparse", 1), ("ONNX Runtime", 2), ("OpenVINO bf16", 0.5)],
            "MNN sparse is 2.00 times as fast as the fastest dense fp32 rival, ONNX Runtime. "
            "Dense bf16, OpenVINO's, is 2.00 times as fast as sparse.",
        ),
        (
            [("MNN sparse", 1), ("torch eager", 0.8)],
            "Sparse loses: torch eager, dense, is 1.25 times as fast; bf16 was not measured.",
        ),
        (
            [("MNN sparse", 1.5), ("torch sparse", 1), ("torch eager", 3)],
            "torch sparse is 3.00 times as fast as the fastest dense fp32 rival, torch eager; bf16 was not measured.",
        ),
        ([("MNN sparse", 1)], "Not measured: it takes one sparse and one dense runtime."),
    ],
)
def test_the_verdict_is_honest(rows, verdict):
    found = latency.Latency(tuple(row(*each) for each in rows), {}, 0.9, {"processor": "x"}, 1)
    assert found.verdict(1, 1) == verdict
    assert verdict in str(found)


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({}, "Below which sparsity zeros no longer pay was not measured."),
        ({0.5: 0.8, 0.9: 2.0}, "90 % at random places pays (2.00 times); from 50 % down it does not pay."),
        ({0.5: 1.1, 0.9: 2.0}, "50 % at random places pays (1.10 times); less was not measured."),
        ({0.5: 1.1, 0.7: 0.9, 0.9: 2.0}, "90 % at random places pays (2.00 times); from 70 % down it does not pay."),
        ({0.5: 0.5, 0.9: 0.9}, "no sparsity up to 90 % pays on this network."),
    ],
)
def test_the_point_from_which_zeros_pay(sweep, says):
    assert latency.Latency((), sweep, 0.9, {}, 1).break_even().endswith(says)


def test_an_unknown_contestant_is_named():
    with pytest.raises(sparing.InputError, match="contestant 'TVM' is not known; choose from MNN sparse"):
        latency.measure(nn.Linear(2, 2), (1, 2), contestants=["TVM"])


# Products in CSR form.


def sparse_(layer, sparsity):
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape) < sparsity] = 0
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (64,), (2, 3, 64), (0, 64)])
def test_a_csr_linear_is_the_linear(shape, bias):
    layer = sparse_(nn.Linear(64, 30, bias=bias), 0.9)
    x = torch.randn(shape)
    torch.testing.assert_close(csr.CSRLinear(layer)(x), layer(x))


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_a_csr_convolution_is_the_convolution(stride):
    layer = sparse_(nn.Conv2d(12, 7, 1, stride=stride), 0.9)
    x = torch.randn(3, 12, 9, 8)
    torch.testing.assert_close(csr.CSRPointwise(layer)(x), layer(x))


def swap_by(monkeypatch, dense, sparse):
    """Times are given, so that the machine does not decide."""
    monkeypatch.setattr(csr, "_turns", lambda first, second, rounds: (dense, sparse))


def test_layers_are_swapped_where_it_was_faster_and_the_model_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    model = sparing.densify_(trained(sparing.models.resnet8))
    model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1)  # 3×3 and dense layers stay
    x = torch.randn(2, 1, 28, 28)
    expected = model.eval()(x)
    swap_by(monkeypatch, 2.0, 1.0)
    swaps = csr.accelerate_(model, (1, 1, 28, 28))
    assert [(swap.name, swap.swapped) for swap in swaps] == [
        ("layer2.0.downsample.0", True), ("layer3.0.downsample.0", True), ("fc", True)
    ]  # fmt: skip
    assert all(swap.error < 1e-5 for swap in swaps)
    assert type(model.fc) is csr.CSRLinear
    assert type(model.layer2[0].downsample[0]) is csr.CSRPointwise
    torch.testing.assert_close(model(x), expected)


def test_layers_stay_where_it_was_not_faster_or_they_are_dense(monkeypatch):
    model = nn.Sequential(sparse_(nn.Linear(50, 50), 0.95), nn.Linear(50, 50))
    swap_by(monkeypatch, 1.0, 1.0)
    first, second = csr.accelerate_(model, (1, 50))
    assert (first.swapped, second.swapped) == (False, False)
    assert (first.csr_seconds, second.csr_seconds) == (1.0, None)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize(
    "kind", [{"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, {"kernel_size": 1, "groups": 2}]
)
def test_other_convolutions_are_not_tried(monkeypatch, kind):
    model = nn.Sequential(sparse_(nn.Conv2d(4, 4, **kind), 0.95))
    swap_by(monkeypatch, 2.0, 1.0)
    assert csr.accelerate_(model, (1, 4, 5, 5)) == []


def test_a_layer_used_in_two_places_is_swapped_in_both(monkeypatch):
    shared = sparse_(nn.Linear(20, 20), 0.95)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 20)
    expected = model(x)
    swap_by(monkeypatch, 2.0, 1.0)
    csr.accelerate_(model, (1, 20))
    assert model[0] is model[2]
    assert type(model[0]) is csr.CSRLinear
    torch.testing.assert_close(model(x), expected)


def test_measuring_really_measures():
    (swap,) = csr.accelerate_(nn.Sequential(sparse_(nn.Linear(300, 300), 0.99)), (1, 300), batch=4)
    assert swap.dense_seconds > 0
    assert swap.csr_seconds > 0
    assert swap.swapped == (swap.dense_seconds >= 1.1 * swap.csr_seconds)


def test_a_layer_whose_weight_a_fused_kernel_takes_is_not_tried():
    model = Transformer().eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.02)
    tokens = torch.randint(50, (2, 7))
    swaps = csr.accelerate_(model, tokens)
    assert not [swap for swap in swaps if "encoder" in swap.name]
    with torch.no_grad():
        assert model(tokens).shape == (2, 7, 50)


def test_a_sparsified_model_is_not_accelerated():
    model = nn.Sequential(nn.Linear(4, 4))
    sparing.sparsify_(model, sparing.STR())
    with pytest.raises(sparing.InputError, match="call sparing.densify_"):
        csr.accelerate_(model, (1, 4))


# Dead channels.


def kill_(layer, *filters):
    with torch.no_grad():
        layer.weight[list(filters)] = 0
    return layer


def assert_smaller(model, example, expected):
    """The shrunk copy has weights of the expected shapes and the same outputs."""
    model.eval()
    small = shrink(model, example)
    shapes = {name: tuple(layer.weight.shape) for name, layer in sparing.layers.find_layers(small).items()}
    assert {name: shapes[name] for name in expected} == expected
    args, kwargs = network.random_inputs(example, 4)
    assert network.largest_error(network.outputs(model, args, kwargs), network.outputs(small, args, kwargs)) < 1e-5
    return small


def test_dead_filters_go_with_what_reads_them():
    model = nn.Sequential(kill_(nn.Conv2d(3, 8, 3, bias=False), 1, 2, 5), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    assert_smaller(model, (1, 3, 8, 8), {"0": (5, 3, 3, 3), "2": (4, 5, 3, 3)})
    assert model[0].weight.shape == (8, 3, 3, 3)


def batch_norm(channels, biases):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        # At a zero filter the output is the bias, less what the running mean takes away.
        norm.running_mean[: len(biases)] = 0
        norm.bias[: len(biases)] = torch.tensor(biases)
    return norm


@pytest.mark.parametrize(("padding", "left"), [(0, 4), (1, 5)])
def test_the_constant_of_a_dead_filter_is_folded_or_the_filter_is_kept(padding, left):
    # Of two dead filters one ends as relu(-1) = 0, the other as relu(2) = 2, which a padded reader
    # does not see at its border.
    model = nn.Sequential(
        kill_(nn.Conv2d(3, 6, 3, bias=False), 0, 1), batch_norm(6, [-1.0, 2.0]), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=padding, bias=False),
    )  # fmt: skip
    small = assert_smaller(model, (1, 3, 8, 8), {"0": (left, 3, 3, 3), "3": (4, left, 3, 3)})
    assert (small[3].bias is not None) == (padding == 0)


def test_a_filter_that_merely_never_fires_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias[0] = -1e4
    assert_smaller(model, (1, 4), {"0": (3, 4)})


def test_filters_that_nobody_reads_go():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 9, 5))
    with torch.no_grad():
        model[3].weight.view(5, 6, 9)[:, [0, 4]] = 0
    assert_smaller(model, (1, 3, 5, 5), {"0": (4, 3, 3, 3), "3": (5, 36)})


def test_a_residual_sum_is_cut_where_all_its_terms_are_dead():
    model = sparing.models.resnet8().eval()
    for name in ("layer2.0.conv2", "layer2.0.downsample.0"):
        kill_(model.get_submodule(name), 3, 7)
    kill_(model.layer2[0].conv2, 9)
    assert_smaller(model, (1, 1, 12, 12), {"layer2.0.conv2": (30, 32, 3, 3), "layer3.0.conv1": (64, 30, 3, 3)})


def test_a_depthwise_filter_takes_its_channel_along():
    model = sparing.models.mobilenet_v1(width=0.25).eval()
    kill_(model.model[3][0], 2, 3)
    inputs = model.model[3][0].in_channels
    assert_smaller(model, (1, 3, 32, 32), {"model.2.3": (inputs - 2, 16, 1, 1), "model.3.3": (32, inputs - 2, 1, 1)})


def test_death_spreads_until_nothing_is_left_to_cut():
    # The second layer's filter 0 reads nothing but the first layer's filter 0.
    model = nn.Sequential(
        kill_(nn.Linear(4, 3, bias=False), 0), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
    )
    with torch.no_grad():
        model[1].weight[0, 1:] = 0
        model[2].weight[0, 1:] = 0
    assert_smaller(model, (1, 4), {"0": (2, 4), "1": (2, 2), "2": (2, 2), "3": (2, 2)})


def test_the_rank_of_a_factorization_becomes_smaller():
    model = nn.Sequential(nn.Linear(20, 8, bias=False), nn.Linear(8, 30))
    with torch.no_grad():
        model[0].weight[[0, 1]] = 0
        model[1].weight[:, [1, 2, 3]] = 0
    small = assert_smaller(model, (1, 20), {"0": (4, 20), "1": (30, 4)})
    assert sum(p.numel() for p in small.parameters()) == 4 * 20 + 30 * 4 + 30


def test_a_layer_that_is_all_dead_keeps_one_channel():
    model = nn.Sequential(kill_(nn.Linear(4, 3), 0, 1, 2), nn.ReLU(), nn.Linear(3, 2))
    assert_smaller(model, (1, 4), {"0": (1, 4), "2": (2, 1)})


def test_channels_under_normalization_over_channels_stay():
    model = nn.Sequential(kill_(nn.Linear(4, 6), 0, 1), nn.LayerNorm(6), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3] = 0  # not read, but counted in the mean
    assert_smaller(model, (1, 4), {"0": (6, 4)})


class OutputToo(nn.Module):
    """Gives its channels away as an output, where none may be missing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = kill_(nn.Linear(4, 6), 0), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        return hidden, self.second(hidden)


def test_a_parameter_beside_the_layers_keeps_what_it_touches():
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
    torch.testing.assert_close(shrink(model, (1, 6))(x), model(x))


def test_a_model_that_would_give_other_outputs_is_refused():
    with pytest.raises(sparing.InputError, match="the model without its dead channels gives other outputs"):
        shrink(OutputToo(), (1, 4))


def test_thresholds_a_filter_leave_a_smaller_network():
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
    assert network.largest_error(network.outputs(model.eval(), args, {}), network.outputs(small, args, {})) < 1e-5
