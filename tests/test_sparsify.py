"""sparsify_ and densify_ on every kind of layer, copies and state dicts between them, and bad input."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

import sparing
from sparing import STR, InputError, SparsityWarning, select
from tolerance import near

# sigmoid(-3) = 0.047: some weights of every layer below are under it and some above.
HALF = STR(init=-3.0)


class Tied(nn.Module):
    """An embedding whose table is also the weight of the decoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 20, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.hidden(self.embedding(tokens)))


class Recurrent(nn.Module):
    """A recurrent layer followed by a classifier on its mean output."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(6, 9, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.fc = nn.Linear(self.rnn(torch.zeros(1, 1, 6))[0].shape[-1], 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0].mean(dim=1))


class Cell(nn.Module):
    """One step of a recurrent cell, from a state that is not zero."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 5)

    def forward(self, x):
        state = torch.linspace(-1, 1, 5).expand(len(x), 5)
        if isinstance(self.cell, nn.LSTMCell):
            return self.cell(x, (state, state))[0]
        return self.cell(x, state)


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), torch.randn(4, 3, 9)),
    "conv2d": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(4, 3, 9, 9)),
    "conv3d": lambda: (nn.Conv3d(3, 8, 3), torch.randn(4, 3, 5, 5, 5)),
    "grouped": lambda: (nn.Conv2d(4, 8, 3, groups=2), torch.randn(4, 4, 9, 9)),
    "depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), torch.randn(4, 4, 9, 9)),
    "transposed1d": lambda: (nn.ConvTranspose1d(3, 8, 3), torch.randn(4, 3, 9)),
    "transposed2d": lambda: (nn.ConvTranspose2d(3, 8, 3, stride=2), torch.randn(4, 3, 9, 9)),
    "transposed3d": lambda: (nn.ConvTranspose3d(3, 8, 3), torch.randn(4, 3, 4, 4, 4)),
    "channels_last": lambda: (
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last),
        torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last),
    ),
    "rnn": lambda: (Recurrent(nn.RNN), torch.randn(4, 7, 6)),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(4, 7, 6)),
    "lstm_projected": lambda: (Recurrent(nn.LSTM, proj_size=3), torch.randn(4, 7, 6)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(4, 7, 6)),
    "lstm_cell": lambda: (Cell(nn.LSTMCell), torch.randn(4, 6)),
    "gru_cell": lambda: (Cell(nn.GRUCell), torch.randn(4, 6)),
    "tied": lambda: (Tied(), torch.randint(0, 20, (4, 5))),
}
GRANULARITIES = ["layer", "filter", "weight", "global"]


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def small():
    return MODELS["linear"]()


def loss(out):
    """Return a weighted sum of the outputs, with another weight for each of them."""
    return (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_outputs_and_gradients_are_those_of_the_thresholded_weights(case, granularity):
    """The reference is the dense model with its weights replaced by those of the formula."""
    model, x = case
    reference = copy.deepcopy(model)
    sparsifier = sparing.sparsify_(model, STR(init=-3.0, granularity=granularity))
    threshold = torch.sigmoid(torch.tensor(-3.0))
    plain = {}
    for layer in sparsifier.layers.values():
        weight = layer.weight.detach()
        plain[layer.places[0].key] = torch.sign(weight) * torch.relu(weight.abs() - threshold)
        assert 0 < layer.nonzero() < weight.numel()
    with torch.no_grad():
        for key, tensor in plain.items():
            reference.get_parameter(key).copy_(tensor)
    model.eval(), reference.eval()
    out, expected = model(x), reference(x)
    assert torch.equal(out, expected)
    loss(out).backward()
    loss(expected).backward()
    dense = dict(reference.named_parameters())
    for layer in sparsifier.layers.values():
        gradient = dense[layer.places[0].key].grad
        active = layer.effective_weight.detach() != 0
        torch.testing.assert_close(layer.weight.grad, gradient * active)
        assert layer.weight.grad.abs().sum() > 0


def test_densify_leaves_plain_modules_with_equal_outputs(case):
    model, x = case
    plain_keys = list(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    types = [type(m) for m in model.modules()]
    sparing.sparsify_(model, HALF)
    model.eval()
    expected = model(x)
    dense = sparing.dense_state_dict(model)
    assert sparing.densify_(model) is model
    assert torch.equal(model(x), expected)
    assert [type(m) for m in model.modules()] == types
    assert set(model.state_dict()) == set(plain_keys)
    assert {id(p) for p in model.parameters()} == parameters
    assert set(dense) == set(plain_keys)
    assert all(torch.equal(dense[key], value) for key, value in model.state_dict().items())
    assert sparing.sparse_layers(model) == {}


def test_densify_does_not_change_a_dense_model():
    model, x = small()
    expected = model(x)
    assert torch.equal(sparing.densify_(model)(x), expected)


@pytest.mark.parametrize("copies", [pickle.dumps, copy.copy, lambda model: torch.save(model, io.BytesIO())])
@pytest.mark.parametrize("change", [lambda model: sparing.sparsify_(model, HALF), sparing.rnn.factorize_])
def test_pickling_says_what_to_do(copies, change):
    """It raises a PicklingError, which libraries that try it expect."""
    layer = nn.Linear(8, 4)
    change(layer)
    with pytest.raises(InputError, match=r"a sparsified or factorized Linear .*save model.state_dict\(\)") as error:
        copies(layer)
    assert isinstance(error.value, pickle.PicklingError)
    copies(sparing.rnn.compact_(copy.deepcopy(layer)))


def test_a_deepcopy_is_independent_and_either_can_be_densified(case):
    model, x = case
    sparing.sparsify_(model, HALF)
    model.eval()
    expected = model(x)  # keeps a graph, which a copy must not fail on
    replica = copy.deepcopy(model)
    assert torch.equal(replica(x), expected)
    sparing.densify_(replica)
    assert torch.equal(replica(x), expected)
    with torch.no_grad():
        for p in replica.parameters():
            p.zero_()
    assert torch.equal(model(x), expected)
    assert sparing.sparse_layers(model)
    sparing.densify_(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_state_dict_round_trip_is_strict_and_exact(case, granularity, tmp_path):
    model, x = case
    fresh = copy.deepcopy(model)
    method = STR(init=-3.0, granularity=granularity)
    sparing.sparsify_(model, method)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    sparing.sparsify_(fresh, method)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    model.eval(), fresh.eval()
    assert torch.equal(fresh(x), model(x))


def test_dense_state_dict_loads_into_the_plain_model(case):
    model, x = case
    plain = copy.deepcopy(model)
    sparing.sparsify_(model, HALF)
    plain.load_state_dict(sparing.dense_state_dict(model))
    model.eval(), plain.eval()
    assert torch.equal(plain(x), model(x))


def test_averaged_model_averages_weights_and_thresholds():
    model, x = small()
    sparing.sparsify_(model, HALF)
    average = AveragedModel(model, avg_fn=lambda old, new, n: 0.5 * old + 0.5 * new)
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)
    layer = sparing.sparse_layers(average.module)["0"]
    assert torch.equal(layer.parametrization.s, torch.tensor([-2.5]))
    assert average(x).shape == (4, 3)
    sparing.densify_(average.module)
    assert sparing.sparse_layers(model), "densifying the average must leave the model as it is"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_s_stays_float32_in_a_half_precision_model(dtype):
    model, x = small()
    s_value = -5.4321
    sparing.sparsify_(model, STR(init=s_value))
    model.to(dtype)
    layer = sparing.sparse_layers(model)["0"]
    assert layer.weight.dtype == layer.effective_weight.dtype == dtype
    assert layer.parametrization.s.dtype == torch.float32
    assert torch.equal(layer.parametrization.s, torch.tensor([s_value]))
    # In bf16 this step would be lost to rounding.
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=5e-4), lr=0.1)
    model(x.to(dtype)).float().sum().backward()
    optimizer.step()
    assert layer.parametrization.s != s_value

    again, _ = small()
    again.to(dtype)
    sparing.sparsify_(again, STR())
    assert sparing.sparse_layers(again)["0"].parametrization.s.dtype == torch.float32


def test_double_moves_s_to_double_and_meta_model_can_be_materialized():
    model, _ = small()
    sparing.sparsify_(model, HALF)
    assert sparing.sparse_layers(model.double())["0"].parametrization.s.dtype == torch.float64
    meta, x = small()
    meta.to("meta")
    sparing.sparsify_(meta, HALF)
    meta.to_empty(device="cpu").load_state_dict(model.float().state_dict())
    assert torch.equal(meta(x), model(x))


def test_moves_between_devices(device):
    model, x = small()
    sparing.sparsify_(model, STR(init=-3.0, granularity="global"))
    expected, close = model(x), near(model, x)
    model.to(device)
    torch.testing.assert_close(model(x.to(device)).cpu(), expected, **close)
    shared = {id(layer.parametrization.s) for layer in sparing.sparse_layers(model).values()}
    assert len(shared) == 1


# torch.compile uses functions that torch itself deprecates.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["linear", "conv2d", "channels_last"])
def test_compiles_in_one_graph_and_exports(name):
    model, x = MODELS[name]()
    sparing.sparsify_(model, HALF)
    model.eval()
    expected, close = model(x), near(model, x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, **close)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, **close)


def test_a_recurrent_layer_computes_each_weight_once_per_call():
    model, x = MODELS["lstm"]()
    sparsifier = sparing.sparsify_(model, HALF)
    calls = []
    for layer in sparsifier.layers.values():
        layer.parametrization.register_forward_hook(lambda *_, name=layer.name: calls.append(name))
    model(x)
    assert sorted(calls) == sorted(sparsifier.layers)


def test_tied_weights_are_one_layer_thresholded_once():
    model, _ = MODELS["tied"]()
    assert list(sparing.layers.find_layers(model)) == ["hidden"], "the default leaves embeddings alone"
    assert list(sparing.layers.find_layers(model, select.excluding("hidden"))) == []
    both = select.of_type(nn.Embedding, nn.Linear)
    assert list(sparing.layers.find_layers(model, both)) == ["embedding", "hidden"]
    sparsifier = sparing.sparsify_(model, HALF, select=["decoder", "hidden"])
    assert list(sparsifier.layers) == ["embedding", "hidden"]
    layer = sparsifier.layers["embedding"]
    assert model.decoder.weight is not layer.weight
    assert torch.equal(model.decoder.weight, model.embedding.weight)
    once = sparing.soft_threshold(layer.weight, torch.sigmoid(torch.tensor(-3.0)))
    assert torch.equal(model.decoder.weight, once)
    sparing.densify_(model)
    assert model.decoder.weight is model.embedding.weight
    assert torch.equal(model.decoder.weight, once)


def test_a_module_used_under_two_names_is_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    expected = copy.deepcopy(model).state_dict().keys()
    sparsifier = sparing.sparsify_(model, HALF)
    assert list(sparsifier.layers) == ["0"]
    assert len([n for n, _ in model.named_parameters() if n.endswith(".s")]) == 1
    assert sparing.dense_state_dict(model).keys() == expected
    sparing.densify_(model)
    assert model.state_dict().keys() == expected


def test_default_selection_and_embedding_on_request():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    assert list(sparing.sparsify_(copy.deepcopy(model), HALF).layers) == ["1"]
    on_request = sparing.sparsify_(copy.deepcopy(model), HALF, select=select.of_type(nn.Embedding, nn.Linear))
    assert list(on_request.layers) == ["0", "1"]
    mine = sparing.sparsify_(copy.deepcopy(model), HALF, select=lambda name, module: name == "0")
    assert list(mine.layers) == ["0"]


def test_selection_by_name_pattern_and_exclusion():
    model = sparing.models.resnet8()
    assert list(sparing.sparsify_(copy.deepcopy(model), HALF, select=["conv1", "layer3.*"]).layers) == [
        "conv1",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer3.0.downsample.0",
    ]
    rest = sparing.sparsify_(copy.deepcopy(model), HALF, select=select.excluding("conv1", "layer[12].*", "*.conv?"))
    assert list(rest.layers) == ["layer3.0.downsample.0", "fc"]


def test_multihead_attention_on_request():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    sparing.sparsify_(model, HALF, select=select.of_type(nn.MultiheadAttention, nn.Linear))
    assert list(sparing.sparse_layers(model)) == ["in_proj_weight", "out_proj"]
    out = model(x, x, x)[0]
    sparing.densify_(model)
    assert torch.equal(model(x, x, x)[0], out)


def test_filter_thresholds_have_one_number_per_output_channel():
    shapes = {
        nn.Conv2d(4, 8, 3): (8, 1, 1, 1),
        nn.Conv2d(4, 8, 3, groups=4): (8, 1, 1, 1),
        nn.ConvTranspose2d(4, 8, 3): (1, 8, 1, 1),
        nn.Linear(4, 8): (8, 1),
    }
    for module, shape in shapes.items():
        sparsifier = sparing.sparsify_(module, STR(granularity="filter"))
        assert tuple(sparsifier.layers["weight"].parametrization.s.shape) == shape
    with pytest.raises(InputError, match="transposed convolution of 2 groups"):
        sparing.sparsify_(nn.ConvTranspose2d(4, 8, 3, groups=2), STR(granularity="filter"))


# Bad input


def test_a_selection_of_nothing_names_the_weights_of_the_model():
    with pytest.raises(InputError, match="no weight matrix or kernel; its modules are ReLU"):
        sparing.sparsify_(nn.Sequential(nn.ReLU()), HALF)
    with pytest.raises(InputError, match=r"select chose no layer; the model's weights are 0 \(Linear\), 2 \(Linear\)"):
        sparing.sparsify_(small()[0], HALF, select=lambda name, module: False)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["0", "0"], "'0' is chosen twice, by '0' and by '0'"),
        (["0", "*"], "'0' is chosen twice, by '0' and by"),
        (["00"], "no layer is named '00'; did you mean '0'"),
        ("0", "is a string; give a list"),
        ([], "select chose no layer"),
        (nn.Linear, r"for classes of modules, give sparing.select.of_type\(nn.Linear\)"),
        (["0", nn.Linear], "must be a predicate .* or a list of layer names"),
        (1000, "select=1000 must be a predicate"),
        (nn.Linear(2, 2), r"select=Linear\(.* must be a predicate"),
    ],
)
def test_a_bad_selection_is_refused(choice, message):
    model, _ = small()
    with pytest.raises(InputError, match=message):
        sparing.sparsify_(model, HALF, select=choice)
    assert not parametrize.is_parametrized(model[0])


def test_a_layer_is_sparsified_once_and_others_by_another_call():
    model, _ = small()
    sparing.sparsify_(model, HALF, select=["0"])
    with pytest.raises(
        InputError, match=r"'0' is sparsified already: choose other layers with select=, change its targ"
    ):
        sparing.sparsify_(model, HALF)
    assert list(sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0), select=["2"]).layers) == ["2"]
    assert list(sparing.sparse_layers(model)) == ["0", "2"]
    sparing.densify_(model)
    assert not sparing.sparse_layers(model)


@pytest.mark.parametrize("steps", [0, -1, 10.0, True, "10"])
def test_a_length_that_is_no_number_of_steps_is_refused(steps):
    model, _ = small()
    with pytest.raises(InputError, match="steps must be a whole number of optimizer steps, at least 1, got"):
        sparing.sparsify_(model, HALF, steps=steps)
    assert not sparing.sparse_layers(model)


def test_nan_weights_are_refused_by_name_without_changing_the_model():
    model, _ = small()
    with torch.no_grad():
        model[2].weight[0, :2] = float("nan")
    with pytest.raises(InputError, match="'2' holds 2 weights that are NaN or infinite, of 24"):
        sparing.sparsify_(model, HALF)
    assert not parametrize.is_parametrized(model[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: sparing.sparsify_(model, HALF),
        sparing.densify_,
        sparing.report,
        lambda model: sparing.param_groups(model, 0.1),
        lambda model: sparing.calibrate(model, []),
        lambda model: sparing.load_dense_state_dict(model, {}),
        lambda model: sparing.merge_(model, torch.zeros(2, 2)),
    ],
)
@pytest.mark.parametrize("model", [nn.Linear(2, 2).state_dict(), [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_refused(model, call):
    with pytest.raises(InputError, match=f"must be a torch.nn.Module, got {type(model).__name__}"):
        call(model)


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_dtypes_are_refused(dtype):
    model = nn.Linear(4, 4).to(dtype)
    with pytest.raises(InputError, match=f"has {dtype} weights; only floating point of 16 bits or more"):
        sparing.sparsify_(model, HALF)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize(
    "method", [sparing.GMP(sparsity=0.5, every=1), STR(sparsity=0.5, every=1), sparing.DNW(sparsity=0.5)]
)
def test_a_normalized_weight_is_made_sparse_after_its_normalization(norm, method):
    model = nn.Sequential(norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), norm(nn.Conv1d(8, 4, 3)))
    sparsifier = sparing.sparsify_(model, method, steps=10)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-4), lr=0.1)
    sparsifier.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 16)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    account = sparing.report(model.eval(), (1, 4, 16))
    assert account.total.sparsity == 0.5
    assert account.total.dense_macs == 14 * 96 + 12 * 96
    x = torch.randn(2, 4, 16)
    expected = model(x)
    assert torch.equal(sparing.densify_(model)(x), expected)
    assert type(model[0]) is nn.Conv1d


@pytest.mark.parametrize("method", [sparing.RigL(sparsity=0.5), sparing.SET(sparsity=0.5), sparing.SNIP(sparsity=0.5)])
def test_methods_that_work_on_the_gradient_of_a_weight_refuse_a_normalized_one(method):
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="'0' carries the parametrization _WeightNorm, so its weight is computed"):
        sparing.sparsify_(normed, method, steps=10)


class Conv1D(nn.Module):
    """A Linear whose weight is transposed, as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class PatchEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 6))


def test_a_normalized_weight_starts_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
    sparing.sparsify_(model, HALF)
    model.to_empty(device="cpu")
    made_by = model[0].parametrizations.weight
    for parameter in (made_by.original0, made_by.original1):
        nn.init.ones_(parameter)
    assert model(torch.ones(1, 8)).shape == (1, 4)
    assert made_by[1].s.item() == HALF.init


@pytest.mark.parametrize("method", [HALF, sparing.GMP(sparsity=0.5, begin=0, end=0)], ids=lambda method: method.name)
def test_what_is_put_on_a_sparsified_weight_takes_it_as_it_is_or_is_refused(method):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    sparing.sparsify_(model, method)
    left, before = sparing.report(model).total.nonzero, model(torch.ones(1, 16))
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        with pytest.raises(InputError, match=r"cannot compute a weight .* register it before sparsify_"):
            norm(model[0])
    with pytest.raises(InputError, match="'weight_orig' of a sparsified Linear is computed"):
        prune.l1_unstructured(model[0], "weight", 0.5)
    assert torch.equal(model(torch.ones(1, 16)), before)
    nn.utils.parametrizations.spectral_norm(model[0])
    assert sparing.report(model).total.nonzero == left < 160
    expected = model.eval()(torch.ones(1, 16))
    assert torch.equal(sparing.densify_(model)(torch.ones(1, 16)), expected)


def test_weights_that_torch_prunes_are_reported_and_not_sparsified():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.75)
    found = sparing.report(model, (1, 16))
    assert [(row.name, row.nonzero, row.macs) for row in found.layers] == [("0", 32, 32), ("1", 32, 32)]
    with pytest.raises(InputError, match="layer '0' is no parameter"):
        sparing.sparsify_(model, HALF, select=["0"])


def test_modules_like_a_linear_are_selected_and_grouped_by_their_outputs():
    model = nn.Sequential(Conv1D(8, 6), PatchEmbedding(), nn.Embedding(9, 6), nn.LayerNorm((4, 8)))
    assert list(sparing.layers.find_layers(model)) == ["0"]
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0, pattern=sparing.Filters()))
    assert sorted((model[0].weight != 0).sum(0).tolist()) == [0] * 4 + [6] * 4
    sparing.densify_(model)
    sparsifier = sparing.sparsify_(model, STR(granularity="filter"))
    assert sparsifier.layers["0"].parametrization.s.shape == (1, 8)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(0.1 * torch.randn(4, 16, 16)), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.einsum("bi,eio->beo", x, self.experts).sum(1))


def test_a_parameter_that_a_module_multiplies_by_itself_is_selected_by_name():
    model = Experts()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9, every=1), select=["experts"], steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    account = sparing.report(model, (1, 16))
    assert account.sparsified.sparsity == pytest.approx(0.9, abs=1e-3)
    assert account.total.weights == 1024 + 64
    assert model.experts.shape == (4, 16, 16)
    assert torch.equal(sparing.densify_(model).experts != 0, model.state_dict()["experts"] != 0)


def test_patterns_refuse_a_parameter_whose_outputs_are_not_known():
    for method in (sparing.GMP(sparsity=0.5, pattern=sparing.Filters()), sparing.DST(alpha=0.1)):
        with pytest.raises(InputError, match="layer 'experts' is a Experts"):
            sparing.sparsify_(Experts(), method, select=["experts"], steps=10)


def test_weights_that_the_default_selection_leaves_out_are_named():
    with pytest.warns(
        SparsityWarning, match=r"1,024 of 1,088 weights .*'experts' \(Experts, 4 × 16 × 16\).* stay dense"
    ):
        sparing.sparsify_(Experts(), HALF, steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparing.sparsify_(Experts(), HALF, select=sparing.select.of_type(nn.Linear), steps=10)
        sparing.sparsify_(nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 2)), HALF, steps=10)


WRITES = {
    "nn.init": lambda weight: nn.init.kaiming_uniform_(weight),
    "nn.init of chunks": lambda weight: [nn.init.orthogonal_(gate) for gate in weight.chunk(3)],
    "nn.init of rows": lambda weight: [nn.init.zeros_(row) for row in weight],
    "the transpose": lambda weight: weight.T.zero_(),
    "parts of .data": lambda weight: weight.data.split(1)[0].fill_(1.0),
    "requires_grad": lambda weight: setattr(weight, "requires_grad", True),
    "freezing": lambda weight: weight.requires_grad_(False),
    "nn.init through a view": lambda weight: nn.init.orthogonal_(weight),
    "+= of .data": lambda weight: exec("weight.data += 1"),
    "a gradient": lambda weight: setattr(weight, "grad", torch.zeros(3, 8)),
    "assignment of .data": lambda weight: setattr(weight, "data", torch.zeros(3, 8)),
    "copy_ of .data": lambda weight: weight.data.copy_(torch.zeros(3, 8)),
    "elements": lambda weight: weight.__setitem__(0, 0.0),
    "a row": lambda weight: weight[0].zero_(),
    "a view of .data": lambda weight: weight.data.view(-1)[:2].fill_(1.0),
    "without a gradient": lambda weight: torch.no_grad()(lambda: weight.mul_(2))(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("method", [HALF, sparing.RigL(sparsity=0.5), sparing.DNW(sparsity=0.5)])
def test_writing_into_an_effective_weight_is_refused(write, method):
    model, _ = small()
    sparing.sparsify_(model, method, steps=10)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"would write into the effective weight .*, of shape"):
        WRITES[write](model[2].weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sparing.densify_(model)
    with torch.no_grad():
        WRITES[write](model[2].weight)


def test_the_assignment_of_a_tensor_to_a_sparsified_weight_is_refused():
    model, _ = small()
    sparing.sparsify_(model, HALF, steps=10)
    with pytest.raises(InputError, match="assigning a tensor would write into the effective weight"):
        model[2].weight = 2 * model[2].weight


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_an_effective_weight_is_refused_and_one_on_the_dense_weight_runs(register):
    model, x = small()
    sparing.sparsify_(model, HALF, steps=10)
    with pytest.raises(InputError, match="a hook on the effective weight .* register it on the dense weight"):
        getattr(model[2].weight, register)(print)
    shapes = []
    getattr(sparing.sparse_layers(model)["2"].weight, register)(lambda gradient: shapes.append(gradient.shape))
    model(x).sum().backward()
    assert len(shapes) == 1
    model[2].weight.detach().requires_grad_().register_hook(print)  # a leaf of its own


def test_hooks_of_modules_put_hooks_on_the_effective_weights_that_they_get():
    model, x = small()
    sparing.sparsify_(model, HALF)
    shapes = []
    for module in model.modules():
        module.register_forward_hook(
            lambda module, inputs, output: output.register_hook(lambda gradient: shapes.append(gradient.shape)) and None
        )
    model(x).sum().backward()
    assert shapes.count(model[2].weight.shape) == 2  # of the ParametrizationList and of what it holds


def test_what_is_made_of_an_effective_weight_is_plain():
    model, _ = small()
    sparing.sparsify_(model, HALF)
    weight = model[2].weight
    assert [type(each) for each in (weight * 2, weight.clone(), copy.deepcopy(weight.detach()))] == [torch.Tensor] * 3
    for parameter in (nn.Parameter(weight), nn.Parameter(weight.data), nn.Parameter(weight[:2])):
        assert type(parameter) is nn.Parameter
        parameter.data.zero_()
    weight = model[2].weight
    file = io.BytesIO()
    torch.save({"weight": weight.detach()}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["weight"]) is torch.Tensor
    assert "0." in repr(weight)
    assert all(type(each) is torch.Tensor for each in sparing.dense_state_dict(model).values())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(("option", "text"), [({"max_norm": 1.0}, "max_norm=1.0"), ({"sparse": True}, "sparse=True")])
def test_embeddings_that_cannot_be_sparse_are_refused(kind, option, text):
    model = nn.Sequential(kind(100, 8, **option), nn.Linear(8, 2))
    with pytest.raises(InputError, match=f"layer '0' .*{text}"):
        sparing.sparsify_(model, STR(init=-3.0), select=["0", "1"])
    assert not parametrize.is_parametrized(model[1])


def test_lazy_modules_and_what_is_no_method_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match="'0' is not initialized yet: run one batch"):
        sparing.sparsify_(lazy, HALF)
    with pytest.raises(InputError, match="give one such as sparing.STR"):
        sparing.sparsify_(nn.Linear(2, 2), "str")


def test_an_initial_threshold_above_every_weight_warns_with_the_numbers():
    model, _ = small()
    with pytest.warns(
        SparsityWarning, match=r"step 0: every weight of '0' \(largest .weight. 0\.3.*, threshold 0.881\)"
    ):
        sparing.sparsify_(model, STR(init=2.0))


def test_a_weight_held_in_two_places_is_sparse_in_both_or_refused():
    model, _ = small()
    model.table = model[0].weight
    sparsifier = sparing.sparsify_(model, HALF, select=["0"])
    assert [place.key for place in sparsifier.layers["table"].places] == ["table", "0.weight"]
    assert torch.equal(model.table, model[0].weight)
    model, _ = small()
    model.register_parameter("bias_table", model[0].weight)
    with pytest.raises(InputError, match="layer '0' is also the parameter 'bias_table'"):
        sparing.sparsify_(model, HALF)


@pytest.mark.parametrize(
    "hold",
    [lambda weight: [weight], lambda weight: {"a": weight}, lambda weight: (1, weight.t()), torch.t],
    ids=["list", "dict", "view in a tuple", "view"],
)
def test_a_weight_that_a_plain_attribute_holds_too_is_warned_of(hold):
    model, _ = small()
    model[1].held = hold(model[0].weight)
    with pytest.warns(SparsityWarning, match="the weight of layer '0' is also held by '1.held', where it stays dense"):
        sparing.sparsify_(model, HALF)


@pytest.mark.parametrize("view", [lambda table: table.t(), lambda table: table[4:]])
def test_parameters_that_share_memory_are_refused_where_one_is_to_be_sparse(view):
    model = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(view(model[0].weight.data))
    with pytest.raises(InputError, match="'0.weight' and '1.weight' share memory"):
        sparing.sparsify_(model, HALF)
    flat = torch.randn(512)
    for layer, part in zip(model, flat.chunk(2), strict=True):
        layer.weight = nn.Parameter(part.view(16, 16))
    assert list(sparing.sparsify_(model, HALF).layers) == ["1"]


@pytest.mark.parametrize("made_inside", [True, False])
def test_a_model_in_inference_mode_is_refused(made_inside):
    with torch.inference_mode(made_inside):
        model = nn.Linear(4, 4)
    with torch.inference_mode(not made_inside), pytest.raises(InputError, match="within torch.inference_mode()"):
        sparing.sparsify_(model, HALF)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.part.weight).relu()


@pytest.mark.parametrize("method", [STR(init=-2.0), sparing.RigL(sparsity=0.5)], ids=lambda method: method.name)
def test_torch_fx_traces_what_uses_a_weight_itself(method):
    model, x = nn.Sequential(Functional(), nn.Linear(8, 2)), torch.randn(4, 8)
    sparing.sparsify_(model, method, steps=10)
    traced = torch.fx.symbolic_trace(model)
    for each in (model, traced):
        each.zero_grad()
        each(x).sum().backward()
        gradient = model[0].part.parametrizations.weight.original.grad.clone()
        if each is model:
            expected = gradient
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert gradient.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_script_is_refused_until_the_model_is_dense():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    sparing.sparsify_(model, HALF)
    with pytest.raises(InputError, match=r"torch.jit.script\(\) cannot compile a sparsified layer: call"):
        torch.jit.script(model)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.jit.script(sparing.densify_(model))(x), model(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", [HALF, sparing.RigL(sparsity=0.5)], ids=lambda method: method.name)
def test_a_trace_without_gradients_can_be_saved(method):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    sparing.sparsify_(model, method, steps=10)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=0, atol=0)


def test_weights_that_something_else_computes_are_refused_and_not_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(InputError, match="'weight' of module '0' is no parameter"):
        sparing.sparsify_(old, HALF)
    pruned = nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3))
    prune.random_unstructured(pruned[0], "weight_hh_l0", 0.5)
    with pytest.raises(InputError, match="'weight_hh_l0' of module '0' is no parameter"):
        sparing.sparsify_(pruned, HALF)
    assert list(sparing.sparsify_(pruned, HALF, select=["1"]).layers) == ["1"]


def test_a_map_that_fails_on_one_layer_leaves_the_model_unchanged():
    def picky(s):
        if len(s) == 3:
            raise RuntimeError("no")
        return torch.sigmoid(s)

    model, _ = small()
    with pytest.raises(RuntimeError, match="no"):
        sparing.sparsify_(model, STR(g=picky, granularity="filter"))
    assert not sparing.sparse_layers(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_refused():
    empty = nn.Sequential(nn.Linear(0, 4, device="meta"))
    with pytest.raises(InputError, match="'0' has no weights: its shape is"):
        sparing.sparsify_(empty, HALF)


def test_a_global_threshold_stays_shared_after_to_empty_and_assignment():
    method = STR(init=-3.0, granularity="global")
    model, x = small()
    sparing.sparsify_(model, method)
    with torch.device("meta"):
        other, _ = small()
        sparing.sparsify_(other, STR(init=-3.0, granularity="global"))
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=True)
    assert len({id(layer.parametrization.s) for layer in sparing.sparse_layers(other).values()}) == 1
    assert torch.equal(other(x), model(x))


def test_sparsifying_a_model_does_not_change_a_copy_with_another_parametrization():
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    replica = copy.deepcopy(model)
    x = torch.randn(2, 3)
    expected = replica(x)
    sparing.sparsify_(model, HALF)
    assert torch.equal(replica(x), expected)


@pytest.mark.parametrize("method", [HALF, sparing.GMP(sparsity=0.8, every=1), sparing.SNIP(sparsity=0.8)], ids=repr)
@pytest.mark.parametrize("select", [None, ["*"], lambda name, module: isinstance(module, nn.Linear)])
def test_frozen_layers_are_left_as_they_are_with_a_warning(method, select):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    with pytest.warns(sparing.SparsityWarning, match="^1 of 3 selected layers are frozen and stay dense: 0. Leave"):
        sparsifier = sparing.sparsify_(model, method, select, steps=10)
    assert list(sparsifier.layers) == ["1", "2"]
    assert type(model[0]) is nn.Linear
    assert sparing.report(model).missed == () or "of 128 weights" in sparing.report(model).missed[0]


def test_a_model_whose_selected_layers_are_all_frozen_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    with pytest.raises(InputError, match="^all 1 selected layers are frozen: call requires_grad_"):
        sparing.sparsify_(model, HALF, select=["1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(dtype):
    model, x = MODELS["conv2d"]()
    layers = sparing.sparsify_(model, HALF).layers
    with torch.autocast("cpu", dtype):
        out = model(x)
    loss(out.float()).backward()
    for layer in layers.values():
        assert layer.effective_weight.dtype == torch.float32
        assert layer.weight.grad.isfinite().all()
        assert layer.parametrization.s.grad.abs() > 0


MODULES = {
    "linear": lambda: nn.Linear(6, 5),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "lstm": lambda: nn.LSTM(4, 3),
    "cell": lambda: nn.GRUCell(4, 3),
    "embedding": lambda: nn.Embedding(5, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("kind", MODULES)
def test_reset_parameters_initializes_the_dense_weights_alone(kind):
    """The values are those of torch where it draws weights in the order of the module, else of the same range."""
    torch.manual_seed(0)
    plain, module = MODULES[kind](), MODULES[kind]()
    sparing.sparsify_(module, STR(init=-5.0), select=["*"])
    replica = copy.deepcopy(module)
    before, keys = copy.deepcopy(replica.state_dict()), list(module.state_dict())
    for each in (plain, module):
        torch.manual_seed(1)
        (each.reset_parameters if hasattr(each, "reset_parameters") else each._reset_parameters)()
    for name, layer in sparing.sparse_layers(module).items():
        assert layer.parametrization.s.tolist() == [-5.0]
        if kind in ("linear", "conv", "embedding"):
            assert torch.equal(layer.weight, plain.weight)
        if name == "out_proj":
            continue  # which torch leaves to its Linear
        replica_weight = sparing.sparse_layers(replica)[name].weight
        assert not torch.equal(layer.weight, replica_weight)
        assert layer.weight.abs().max() <= 2 * replica_weight.abs().max()
    assert list(module.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in replica.state_dict().items())


ON_META = {
    "str": (STR(init=-4.0), 0),
    "rigl": (sparing.RigL(sparsity=0.5, budget="uniform"), 72 + 18),
    "gmp": (sparing.GMP(sparsity=0.5), 0),
    "st3": (sparing.ST3(sparsity=0.5), 0),
    "dst": (sparing.DST(alpha=1e-4), 0),
}


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", ON_META)
def test_a_model_made_on_the_meta_device_starts_as_any_other(name, reset):
    def build():
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))

    method, zeros = ON_META[name]
    with torch.device("meta"):
        model = build()
    plain = build()
    sparing.sparsify_(model, method, steps=10)
    sparing.sparsify_(plain, method, steps=10)
    junk = [torch.full((144,), 3e9) for _ in range(64)]
    del junk
    model.to_empty(device="cpu")
    for module in model.modules():
        if reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if not reset:
        with torch.no_grad():
            for theirs, layer in zip(plain, sparing.sparse_layers(model).values(), strict=True):
                layer.weight.copy_(sparing.sparse_layers(theirs)["weight"].weight)
        model(torch.randn(2, 12))
    for (key, value), (same, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == same
        if "parametrizations.weight.0." in key:
            assert torch.equal(value, expected)
    assert all(0 < layer.weight.abs().max() < 5 for layer in sparing.sparse_layers(model).values())
    total = sparing.report(model).total
    assert total.weights - total.nonzero >= zeros


def test_one_shot_pruning_on_the_meta_device_ranks_the_weights_that_are_initialized_later():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0, budget="global"))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model(torch.randn(2, 12))
    layers = sparing.sparse_layers(model).values()
    kept = torch.cat([layer.parametrization.mask.flatten() for layer in layers])
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    assert kept.sum() == 90
    assert sizes[kept].min() >= sizes[~kept].max()


def test_a_copy_made_on_the_meta_device_says_that_it_has_no_values():
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    sparing.sparsify_(model, STR(init=-3.0))
    replica = copy.deepcopy(model).to_empty(device="cpu")
    with pytest.raises(InputError, match="was copied on the meta device and has no values"):
        replica(torch.randn(2, 8))
    plain = nn.Linear(8, 8)
    sparing.sparsify_(plain, STR(init=-3.0))
    replica.load_state_dict(plain.state_dict())
    assert replica.parametrizations.weight[0].s.tolist() == [-3.0]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "method", [STR(init=-3.0), sparing.RigL(sparsity=0.5), sparing.Feather(sparsity=0.5), sparing.DST(alpha=0.1)]
)
def test_to_empty_leaves_masks_and_thresholds_as_they_are(method, copied):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    sparing.sparsify_(model, method, steps=10)
    kept = {key: value for key, value in copy.deepcopy(model.state_dict()).items() if "weight.0." in key}
    emptied = (copy.deepcopy(model) if copied else model).to_empty(device="cpu")
    for module in emptied:
        module.reset_parameters()
    emptied(torch.randn(2, 12))
    assert all(torch.equal(emptied.state_dict()[key], value) for key, value in kept.items())
