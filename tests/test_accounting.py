"""Counts that must come out exactly: weights, multiply-accumulates, sparsity."""

import copy
import csv
import dataclasses
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import sparing
from sparing import STR, Budget, InputError

IMAGE = (1, 3, 224, 224)


def meta(function, *args, **kwargs):
    with torch.device("meta"):
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, {"num_classes": 0}, "num_classes must be an integer >= 1, got 0") for name in sparing.models.MODELS),
        ("resnet8", {"width": 0}, "resnet8: width must be an integer >= 1, got 0"),
        ("resnet20", {"in_channels": True}, "resnet20: in_channels must be an integer >= 1, got True"),
        ("resnet20", {"stem_stride": 0}, "resnet20: stem_stride must be an integer >= 1, got 0"),
        ("lenet_300_100", {"in_channels": -1}, "lenet_300_100: in_channels must be an integer >= 1, got -1"),
        ("mobilenet_v1", {"width": 0.01}, "mobilenet_v1: width must be a number >= 1/32, .* got 0.01"),
        ("mobilenet_v1", {"width": math.nan}, "mobilenet_v1: width must be a number >= 1/32, .* got nan"),
        ("mobilenet_v1", {"width": "1"}, "mobilenet_v1: width must be a number >= 1/32, .* got '1'"),
    ],
)
def test_models_of_no_size_are_refused(name, arguments, message):
    with pytest.raises(InputError, match=message):
        meta(sparing.models.MODELS[name], **arguments)


def test_sizes_of_numpy_are_sizes():
    assert meta(sparing.models.resnet8, num_classes=np.int64(3)).fc.out_features == 3


def test_resnet50_is_the_papers():
    # Kusupati et al. 2020, the released budgets: 54 conv and fc layers; the average pool's
    # 100,352 additions, which the paper's 4,089,284,608 includes, are no multiplications.
    model = meta(sparing.models.resnet50)
    model.train()
    uses = sparing.count_applications(model, IMAGE)
    layers = sparing.layers.find_layers(model)
    assert len(layers) == 54
    assert sum(layer.weight.numel() for layer in layers.values()) == 25_502_912
    assert sum(uses[name] * layer.weight.numel() for name, layer in layers.items()) == 4_089_184_256
    assert uses["conv1"] * layers["conv1"].weight.numel() == 118_013_952
    assert layers["conv1"].weight.numel() == 9_408
    backbone = {name: layer for name, layer in layers.items() if name != "fc"}
    assert sum(layer.weight.numel() for layer in backbone.values()) == 23_454_912
    assert sum(uses[name] * layer.weight.numel() for name, layer in backbone.items()) == 4_087_136_256
    assert model.training, "counting must leave the mode as it was"


def test_mobilenet_v1_is_the_papers():
    model = meta(sparing.models.mobilenet_v1)
    uses = sparing.count_applications(model, IMAGE)
    layers = sparing.layers.find_layers(model)
    assert sum(layer.weight.numel() for layer in layers.values()) == 4_209_088
    assert sum(uses[name] * layer.weight.numel() for name, layer in layers.items()) == 568_740_352


def test_mobilenet_v1_initializes_its_classifier_with_kaiming_normal_fan_in():
    # The 2020 release of STR does. PyTorch's default for a Linear has std 1 / sqrt(3 * 1024) = 0.0180.
    torch.manual_seed(0)
    weight = sparing.models.mobilenet_v1().fc.weight.detach()
    assert weight.shape == (1000, 1024)
    assert weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)
    assert weight.abs().max() > 4 * weight.std(), "the distribution is not normal"


def test_mobilenet_v1_leaves_its_convolutions_at_the_default_init():
    # So does the release: Kaiming uniform with a = sqrt(5), whose bound is 1 / sqrt(fan in).
    torch.manual_seed(0)
    weight = sparing.models.mobilenet_v1().model[13][3].weight.detach()
    assert weight.shape == (1024, 1024, 1, 1)
    assert weight.abs().max().item() == pytest.approx(1024**-0.5, rel=0.01)


def test_mobilenet_v1_takes_gray_pictures():
    model = sparing.models.mobilenet_v1(num_classes=10, width=0.25, in_channels=1).eval()
    assert model.model[0][0].weight.shape == (8, 1, 3, 3)
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_resnet18_has_the_published_size():
    # torchvision's ResNet-18 has 11,689,512 parameters: these weights, 9,600 of batch
    # normalization, and a classifier bias of 1,000 that ours has not.
    layers = sparing.layers.find_layers(meta(sparing.models.resnet18))
    assert sum(layer.weight.numel() for layer in layers.values()) == 11_689_512 - 9_600 - 1_000


@pytest.mark.parametrize(("function", "weights"), [("resnet8", 77_072), ("resnet20", 268_336 + 32 * 16 + 64 * 32)])
def test_small_resnets(function, weights):
    # ResNet-20 of the CIFAR-10 paper has 269,722 parameters, 268,336 of them in convolutions and
    # classifier; ours has two 1×1 shortcuts more, in place of zero padding.
    layers = sparing.layers.find_layers(getattr(sparing.models, function)())
    assert sum(layer.weight.numel() for layer in layers.values()) == weights


def test_a_stem_of_stride_two_halves_the_pictures():
    # 14², 7² and 4² pixels in place of 28², 14² and 7².
    stages = 144 * 14**2, 2 * 2304 * 14**2, (4608 + 9216 + 512) * 7**2, (18432 + 36864 + 2048) * 4**2, 640
    model = sparing.models.resnet8(stem_stride=2)
    assert sparing.report(model, input_size=(1, 1, 28, 28)).total.dense_macs == sum(stages)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), 2 * 25 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 9, 9), 49 * 8 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 9, 9), 49 * 4 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
        (nn.Linear(4, 6), (7, 4), 7 * 24),
        (nn.Linear(4, 6), (7, 5, 4), 35 * 24),
        (nn.LSTM(4, 6), (5, 2, 4), 10 * (4 * 6 * 4 + 4 * 6 * 6)),
        (nn.GRU(4, 6, bidirectional=True), (5, 2, 4), 2 * 10 * (3 * 6 * 4 + 3 * 6 * 6)),
        (nn.RNN(4, 6, num_layers=2, batch_first=True), (2, 5, 4), 10 * (6 * 4 + 6 * 6 + 6 * 6 + 6 * 6)),
        (nn.LSTMCell(4, 6), (3, 4), 3 * (24 * 4 + 24 * 6)),
    ],
)
def test_macs_of_every_kind_of_layer(module, shape, macs):
    assert sparing.report(module, shape).total.dense_macs == macs
    for layer in sparing.layers.find_layers(module).values():
        nn.init.normal_(layer.weight)
    sparing.sparsify_(module, STR(init=-0.5))
    account = sparing.report(module, shape)
    assert account.total.dense_macs == macs
    uses = sparing.count_applications(module, shape)
    assert account.total.macs == sum(
        uses[name] * int((layer.effective_weight != 0).sum()) for name, layer in sparing.sparse_layers(module).items()
    )
    assert 0 < account.total.macs < macs


def test_macs_of_tied_shared_and_unused_layers():
    shared = nn.Linear(4, 4, bias=False)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert sparing.report(twice, (3, 4)).total.dense_macs == 2 * 3 * 16
    assert not shared.weight.is_meta, "counting must leave the weights as they were"
    twice.add_module("spare", nn.Identity())
    twice.spare.fc = nn.Linear(4, 4)
    assert sparing.report(twice, (3, 4)).layers[1].dense_macs == 0

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.decoder = nn.Linear(4, 10, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens):
            return self.decoder(self.embedding(tokens))

    # Looking a row up multiplies nothing.
    assert sparing.report(Tied(), torch.zeros(2, 3, dtype=torch.long)).total.dense_macs == 6 * 40


def test_macs_take_tensors_tuples_and_mappings():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.fc(x * mask)

    x, mask = torch.ones(2, 4), torch.ones(2, 1)
    for example in ((x, mask), {"x": x, "mask": mask}):
        assert sparing.report(Two(), example).total.dense_macs == 2 * 16


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((1, 5), "does not run on an input of shape"),
        ((0, 4), "neither a shape"),
        ((), "neither a shape"),
        (("a",), "neither a shape"),
        ((10**6, 10**9), "too large"),
    ],
)
def test_an_input_the_model_cannot_take_is_refused(example, message):
    with pytest.raises(InputError, match=message):
        sparing.count_applications(nn.Linear(4, 4), example)


def test_report_is_the_same_for_sparse_and_densified():
    model = sparing.models.resnet8(width=4)
    sparing.sparsify_(model, STR(init=-2.0))
    before = sparing.report(model, (1, 1, 28, 28))
    after = sparing.report(sparing.densify_(copy.deepcopy(model)), (1, 1, 28, 28))
    for sparse, dense in zip((*before.layers, before.total), (*after.layers, after.total), strict=True):
        sparse, dense = sparse.as_dict(), dense.as_dict()
        assert sparse.pop("threshold") == pytest.approx(0.1192, abs=1e-4) if sparse["kind"] else True
        dense.pop("threshold")
        sparse.pop("threshold", None)
        assert sparse == dense
    assert before.total.nonzero == sum(
        int((layer.effective_weight != 0).sum()) for layer in sparing.sparse_layers(model).values()
    )
    assert before.backbone.weights == before.total.weights - before.layers[-1].weights
    assert before.layers[-1].name == "fc"


def test_report_covers_layers_left_dense():
    model = sparing.models.resnet8(width=4)
    sparing.sparsify_(model, STR(init=-2.0), select=["layer*"])
    account = sparing.report(model)
    assert account.layers[0].threshold is None
    assert account.layers[0].sparsity == 0
    assert account.layers[1].sparsity > 0
    assert account.total.weights == sum(row.weights for row in account.layers)
    assert account.total.macs is None


def test_report_formats_agree():
    model = sparing.models.resnet8(width=4)
    sparing.sparsify_(model, STR(init=-2.0))
    account = sparing.report(model, (1, 1, 28, 28))
    as_json = json.loads(account.to_json())
    rows = list(csv.DictReader(io.StringIO(account.to_csv())))
    assert [row["name"] for row in rows] == [row["name"] for row in as_json["layers"]] + ["total", "backbone"]
    assert int(rows[-2]["nonzero"]) == as_json["total"]["nonzero"] == account.total.nonzero
    assert float(rows[0]["sparsity"]) == as_json["layers"][0]["sparsity"]
    text, page = str(account), account.to_html()
    for row in account.layers:
        assert row.name in text
        assert row.name in page
        assert f"{row.nonzero:,}" in text
    assert len({len(line) for line in text.splitlines() if set(line) == {"-"}}) == 1


def test_the_percentage_of_a_nearly_empty_layer_is_not_rounded_to_100():
    model = nn.Linear(500, 500, bias=False)
    nn.init.zeros_(model.weight)
    assert "100 %" in str(sparing.report(model))
    with torch.no_grad():
        model.weight[0, 0] = 1.0
    assert "99.99 %" in str(sparing.report(model))


def test_budget_from_model_save_and_load(tmp_path):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 3))
    with torch.no_grad():
        model[0].weight.view(-1)[:37] = 0
    budget = Budget.from_model(model)
    assert dict(budget) == {"0": 0.37, "1": 0.0}
    for suffix in ("json", "csv"):
        path = tmp_path / f"budget.{suffix}"
        budget.save(path)
        assert dict(Budget.load(path)) == dict(budget)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["budget.csv", "budget.json"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.json", '{"fc": 90}', r"sparsity of layer 'fc' must be in \[0, 1\], got 90"),
        ("b.json", "[1]", "not a table of layer and sparsity"),
        ("b.json", "{", "not a table of layer and sparsity"),
        ("b.csv", "a,b\n1,2\n", "not a table of layer and sparsity"),
        ("b.txt", "", "suffix must be .json or .csv"),
    ],
)
def test_a_file_that_is_no_budget_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Budget.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Budget.load(tmp_path / "absent.json")


def test_param_groups_go_by_type_and_not_by_name():
    model = sparing.models.mobilenet_v1(num_classes=10, width=0.25)  # its norms are called model.N.M
    model.bn = nn.Linear(2, 2)
    sparing.sparsify_(model, STR())
    groups = {
        g["name"]: g for g in sparing.param_groups(model, 1e-4, threshold_weight_decay=1e-2, norm_weight_decay=0.0)
    }
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(groups["norms"]["params"]) == 2 * len(norms)
    assert len(groups["thresholds"]["params"]) == len(sparing.sparse_layers(model))
    assert {n: g["weight_decay"] for n, g in groups.items()} == {"weights": 1e-4, "thresholds": 1e-2, "norms": 0.0}
    everything = [p for g in groups.values() for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    assert any(p is model.bn.parametrizations.weight.original for p in groups["weights"]["params"])


def test_param_groups_default_to_one_decay_and_leave_out_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.LSTM(2, 2))
    model[1].requires_grad_(False)
    groups = sparing.param_groups(model, 0.5)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("weights", 0.5)]
    for wrong in (-1, float("inf"), float("nan"), "0.1", torch.ones(2)):
        with pytest.raises(
            InputError, match=rf"weight decay of norms must be in \[0, inf\), got {re.escape(repr(wrong))}"
        ):
            sparing.param_groups(model, 0.5, norm_weight_decay=wrong)


def test_counting_leaves_nothing_behind_that_a_forward_caches():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.triu(torch.ones(4, 4))
            return self.fc(x) * self.mask

    model = Caching()
    sparing.report(model, (4, 4))
    assert model.mask is None
    assert model(torch.ones(4, 4)).device.type == "cpu"


def test_macs_of_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = {"self_attn.in_proj_weight": 3 * 64, "self_attn.out_proj": 64, "linear1": 128, "linear2": 128}
    for _ in range(2):  # dense, then sparsified
        by_name = {row.name: row.dense_macs for row in sparing.report(model, (3, 5, 8)).layers}
        assert by_name == {name: 15 * weights for name, weights in expected.items()}
        if not sparing.sparse_layers(model):
            sparing.sparsify_(model, STR(), select=sparing.select.of_type(nn.MultiheadAttention))


def test_macs_of_cross_attention_count_each_projection_by_its_own_input():
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    sparing.sparsify_(layer, sparing.GMP(sparsity=0.5, begin=0, end=0), select=["*attn.in_proj_weight", "linear*"])
    decoder, encoder = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    rows = {row.name: row for row in sparing.report(layer, (decoder, encoder)).layers}
    assert rows["self_attn.in_proj_weight"].dense_macs == 10 * 3 * 256
    assert rows["multihead_attn.in_proj_weight"].dense_macs == 10 * 256 + 14 * 2 * 256
    active = (layer.multihead_attn.in_proj_weight != 0).reshape(3, 256).sum(1).tolist()
    assert rows["multihead_attn.in_proj_weight"].macs == 10 * active[0] + 14 * (active[1] + active[2])
    with pytest.raises(InputError, match="multiplied 10 to 14 times in a forward pass"):
        sparing.sparsify_(
            nn.MultiheadAttention(16, 2, batch_first=True),
            STR(macs=0.5, input_size=(decoder, encoder, encoder)),
            select=["in_proj_weight"],
            steps=10,
        )


class Odd(nn.Module):
    """A module that uses weights in unusual ways, given by a function."""

    def __init__(self, use, *shapes):
        super().__init__()
        self.use = use
        self.linear = nn.Linear(6, 8, bias=False)
        for number, shape in enumerate(shapes):
            self.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape)))

    def forward(self, x, **others):
        return self.use(self, x, **others)


def _by_rows(m, x):
    first, second = m.linear.weight.chunk(2)
    return torch.cat([x[:2] @ first.t(), x[:3] @ second.t()])


FUNCTIONAL = {
    # Every row of x is a product with each weight; x has the shape (4, 6).
    "functional linear": (lambda m, x: F.linear(x, m.linear.weight), (), {"linear": 4 * 48}),
    "matmul": (lambda m, x: x @ m.linear.weight.T, (), {"linear": 4 * 48}),
    "a vector": (lambda m, x: m.linear.weight @ x[0], (), {"linear": 48}),
    "used twice": (lambda m, x: m.linear(x) + m.linear(x), (), {"linear": 2 * 4 * 48}),
    "not used": (lambda m, x: x, (), {"linear": 0}),
    "experts": (lambda m, x: torch.einsum("bi,eio->beo", x, m.p0), ((3, 6, 5),), {"linear": 0, "p0": 4 * 90}),
    "one expert": (lambda m, x: x @ m.p0[1], ((3, 6, 5),), {"linear": 0, "p0": 4 * 30}),
    "broadcast": (lambda m, x: torch.bmm(x[None].expand(2, 4, 6), m.p0.expand(2, 6, 5)), ((1, 6, 5),), {"p0": 8 * 30}),
    "parts": (_by_rows, (), {"linear": 2 * 24 + 3 * 24}),
    "two weights as one": (
        lambda m, x: F.linear(x, torch.cat([m.linear.weight, m.p0])), ((3, 6),), {"linear": 4 * 48, "p0": 4 * 18},
    ),
    "a copy": (lambda m, x: F.linear(x, m.linear.weight.t().contiguous().t()), (), {"linear": 4 * 48}),
    "scaled": (lambda m, x: F.linear(x, m.linear.weight * 0.1), (), {"linear": 4 * 48}),
    "tanh": (lambda m, x: F.linear(x, m.linear.weight.tanh()), (), {"linear": 4 * 48}),
    "fake quantization": (
        lambda m, x: F.linear(x, torch.fake_quantize_per_tensor_affine(m.linear.weight, 0.01, 0, -128, 127)),
        (),
        {"linear": 4 * 48},
    ),
    "a diagonal": (lambda m, x: (x[:, None] * m.p0).sum(1), ((6, 6),), {"p0": 4 * 36}),
    "functional convolution": (
        lambda m, x: F.conv1d(x.reshape(1, 2, 12), m.p0, padding=1), ((4, 2, 3),), {"p0": 12 * 24},
    ),
    "positions": (lambda m, x: m.linear(x + m.p0), ((4, 6),), {"linear": 4 * 48, "p0": 0}),
    "a token": (lambda m, x: m.linear(torch.cat([m.p0, x])), ((2, 6),), {"linear": 6 * 48, "p0": 0}),
    "learned queries": (
        lambda m, x: (m.linear(m.p0) @ m.linear(x).t()).softmax(-1), ((2, 6),), {"linear": 6 * 48, "p0": 0},
    ),
    "autocast": (lambda m, x: _autocast(m.linear, x), (), {"linear": 4 * 48}),
    "flex attention": (lambda m, x: flex_attention(*[m.linear(x)[None, None]] * 3), (), {"linear": 4 * 48}),
    "a branch": (lambda m, x: torch.cond(x.sum() < 9e9, m.linear, m.linear, (x,)), (), {"linear": 4 * 48}),
}  # fmt: skip


def _autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("use", FUNCTIONAL)
def test_macs_are_counted_whoever_multiplies(use, sparse):
    function, shapes, expected = FUNCTIONAL[use]
    model = Odd(function, *shapes)
    if sparse:
        sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0), select=["*"])
    rows = {row.name: row for row in sparing.report(model, torch.randn(4, 6)).layers}
    assert {name: rows[name].dense_macs for name in expected} == expected
    if sparse and use not in ("parts", "one expert"):  # half the weights of the layer, not of each part
        assert {name: rows[name].macs for name in expected} == {name: macs // 2 for name, macs in expected.items()}


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_macs_of_experts_follow_the_rows_that_each_of_them_gets():
    rows = [3, 0, 1]
    offsets = torch.tensor(rows).cumsum(0).to(torch.int32)
    model = Odd(lambda m, x, offsets: F.grouped_mm(x, m.p0.transpose(1, 2), offs=offsets), (3, 8, 16))
    sparing.sparsify_(model, sparing.GMP(sparsity=0.75, budget="global", begin=0, end=0), select=["p0"])
    x = {"x": torch.randn(4, 16), "offsets": offsets}
    row = next(row for row in sparing.report(model, x).layers if row.name == "p0")
    assert row.dense_macs == 4 * 128
    assert row.macs == sum(number * int((expert != 0).sum()) for number, expert in zip(rows, model.p0, strict=True))


def test_a_model_that_looks_at_values_is_run_for_real():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.seen = []

        def forward(self, x, mask):
            return self.fc(x if mask.all().item() else x[mask])

    model = Masked()
    inputs = {"x": torch.randn(5, 4), "mask": torch.tensor([True, True, True, False, False])}
    assert sparing.report(model, inputs).total.dense_macs == 3 * 12
    sparing.sparsify_(model, STR(sparsity=0.5), steps=10)
    assert sparing.report(model, inputs).total.dense_macs == 3 * 12
    assert not model.fc.weight.is_meta
    assert model.training


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_macs_of_recurrent_layers_are_the_same_in_a_real_run(kind):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 6, num_layers=2, bidirectional=True)

        def forward(self, x):
            return self.rnn(x) if x.sum().item() < math.inf else x

    model = Looking()
    assert (
        sparing.report(model, torch.randn(5, 3, 4)).total.dense_macs
        == sparing.report(model.rnn, (5, 3, 4)).total.dense_macs
    )


@pytest.mark.parametrize(
    ("change", "operation"),
    [
        (lambda w: (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-6), "sub"),
        (lambda w: F.layer_norm(w, w.shape[1:]), "native_layer_norm"),
        (lambda w: w + 1, "add"),
        (lambda w: w.cos(), "cos"),
    ],
)
def test_a_weight_that_is_changed_before_the_product_counts_as_dense_and_warns(change, operation):
    # Such as the standardized convolutions of NFNets: the zeros become −mean / std.
    model = Odd(lambda m, x: F.linear(x, change(m.linear.weight)))
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0))
    with pytest.warns(
        sparing.SparsityWarning, match=f"multiplies by what '{operation}' makes of the weight of 'linear'"
    ):
        found = sparing.report(model, torch.randn(4, 6))
    assert found.total.macs == found.total.dense_macs == 4 * 48
    assert "linear" in found.notes[0]
    with pytest.raises(InputError, match="zeros need not be zero"):
        sparing.sparsify_(Odd(model.use), STR(macs=0.5, input_size=torch.randn(4, 6)), steps=10)


@pytest.mark.parametrize(
    ("use", "operation"),
    [
        (lambda m, x: torch.cdist(x, m.linear.weight) + m.other(x), "_cdist_forward|_euclidean_dist"),
        (lambda m, x: F.linear(x, m.p0 @ m.p1) + m.other(x), "addmm|mm"),
        (lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.linear.weight[:4])) + m.other(x), "mul"),
    ],
)
def test_one_odd_layer_does_not_cost_the_whole_report(use, operation):
    model = Odd(use, (8, 2), (2, 6))
    model.other = nn.Linear(6, 1)
    with pytest.warns(sparing.SparsityWarning, match=f"are not known, because '({operation})' uses"):
        found = sparing.report(model, torch.randn(4, 6))
    assert {row.name: row.dense_macs for row in found.layers}["other"] == 4 * 6
    assert found.total.dense_macs == sum(row.dense_macs or 0 for row in found.layers)
    assert any(row.dense_macs is None for row in found.layers)


def modulated(model, x):
    """Convolve each example with a kernel of its own, as StyleGAN 2 does."""
    kernels = (model.p0 * model.linear(x)[:, None, :, None, None]).flatten(0, 1)
    return F.conv2d(torch.ones(1, len(x) * 8, 5, 5), kernels, groups=len(x))


def mixed(model, x):
    """Convolve each example with a sum of kernels, as CondConv does."""
    kernels = torch.einsum("nk,koihw->noihw", model.linear(x)[:, :3], model.p0).flatten(0, 1)
    return F.conv2d(torch.ones(1, len(x) * 8, 5, 5), kernels, groups=len(x))


@pytest.mark.parametrize(
    ("use", "shape", "operation"),
    [
        (modulated, (4, 8, 3, 3), "convolution"),
        (mixed, (3, 4, 8, 3, 3), "convolution"),
        (lambda m, x: torch.einsum("bi,bio->bo", x, m.p0[m.linear(x).argmax(1)]), (8, 6, 5), "bmm"),
        (lambda m, x: torch.bmm(x[:, None], m.p0.index_select(0, m.linear(x).argmax(1))), (8, 6, 5), "bmm"),
        (lambda m, x: torch.einsum("qd,qkd->qk", m.linear(x), m.p0[torch.ones(4, 4).long()]), (7, 8), "bmm"),
    ],
    ids=["modulated kernels", "mixed kernels", "chosen experts", "selected experts", "relative positions"],
)
def test_weights_that_depend_on_the_inputs_or_are_chosen_by_an_index_are_not_counted_as_free(use, shape, operation):
    model = Odd(use, shape)
    with pytest.warns(sparing.SparsityWarning, match=f"MACs of 'p0' are not known, because '{operation}' uses"):
        found = sparing.report(model, torch.randn(4, 6))
    assert {row.name: row.dense_macs for row in found.layers} == {"p0": None, "linear": 4 * 48}
    with pytest.raises(InputError, match="MACs of 'p0' are not known"):
        sparing.sparsify_(model, STR(macs=0.5, input_size=torch.randn(4, 6)), select=["p0"], steps=10)


def test_embeddings_and_activations_that_are_multiplied_are_no_weights():
    def use(model, i):
        rows = model.table(i)
        attention = rows @ model.linear(rows)[..., :6].mT, rows @ rows.mT  # as in word2vec
        features = model.kernel(model.linear(rows)[:, None])
        return attention, F.conv2d(features, features)  # as a Siamese tracker does

    model = Odd(use)
    table, kernel = nn.Embedding(9, 6), nn.Conv2d(1, 4, 2)
    model.table, model.kernel = table, kernel
    assert None not in [row.dense_macs for row in sparing.report(model, torch.ones(2, 6, dtype=torch.long)).layers]


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    deeper: object = None


@pytest.mark.parametrize("example", [(Batch(torch.randn(5, 6)),), {"x": Batch(None, [Batch(torch.randn(5, 6))])}])
def test_tensors_in_objects_are_inputs(example):
    # If they were not, the activation of `other` would count as a weight, and the last product would not count.
    model = Odd(lambda m, batch: m.p0 @ m.other(batch.x if batch.deeper is None else batch.deeper[0].x).T, (8, 7))
    model.other = nn.Linear(6, 7)
    counts = {row.name: row.dense_macs for row in sparing.report(model, example).layers}
    assert counts == {"p0": 5 * 56, "linear": 0, "other": 5 * 42}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*not selected by default")
def test_a_part_in_torch_script_is_counted_and_left_dense():
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4))
    assert [row.dense_macs for row in sparing.report(model, (5, 6)).layers] == [240, 160]
    with pytest.raises(InputError, match=r"layer '0' is compiled by torch.jit.script\(\)"):
        sparing.sparsify_(model, STR(init=-3.0), select=["0"])
    assert list(sparing.sparsify_(model, STR(init=-3.0)).layers) == ["2"]


def test_an_exported_program_of_a_sparsified_model_is_not_counted_as_dense():
    model, example = nn.Sequential(nn.Linear(6, 8)), (torch.randn(2, 6),)
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0))
    with pytest.raises(InputError, match=r"give the model itself, or export it after sparing.densify_\(\)"):
        sparing.report(torch.export.export(model, example).module())
    dense = torch.export.export(sparing.densify_(model), example)
    assert sparing.report(dense.module()).total.nonzero == 24


def test_macs_of_lookups_are_none():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.words, self.out = nn.EmbeddingBag(100, 8), nn.Embedding(100, 8), nn.Linear(8, 2)

        def forward(self, ids):
            return self.out(self.bag(ids) + self.words(ids).mean(1))

    model = Bag()
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0), select=["bag", "words", "out"])
    found = sparing.report(model, torch.zeros(2, 5, dtype=torch.long))
    assert [row.dense_macs for row in found.layers] == [0, 0, 2 * 16]
    assert found.total.weights == 1616


def test_a_compiled_or_wrapped_model_is_counted_as_it_is():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0))
    wrappers = (torch.compile(model, backend="eager", fullgraph=True), nn.DataParallel(model))
    for wrapper in wrappers:
        assert sparing.report(wrapper, (2, 16)).total.dense_macs == 2 * 640
        assert sparing.report(wrapper, (2, 16)).total.macs == 640


class Stateful(nn.Module):
    """A module whose forward pass changes its buffers and lists."""

    def __init__(self, looks):
        super().__init__()
        self.fc, self.looks, self.seen, self.cache = nn.Linear(4, 4), looks, [], {"first": None}
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x, scale=1.0):
        self.count += 1
        self.mean = self.mean + x.mean(0)
        self.seen.append(x)
        self.cache["first"] = self.cache["other"] = x
        return self.fc(x * scale) if not self.looks or x.sum().item() > -math.inf else x


@pytest.mark.parametrize("looks", [False, True])
def test_counting_leaves_the_model_as_it_was(looks):
    model = Stateful(looks)
    seen, mean = model.seen, model.mean
    assert sparing.report(model, (torch.randn(3, 4), 2.0)).total.dense_macs == 3 * 16
    assert (model.seen, model.cache, float(model.count)) == ([], {"first": None}, 0.0)
    assert model.seen is seen
    assert model.mean is mean
    assert not mean.any()
    assert model.training


def test_counting_in_inference_mode_and_with_cached_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.Conv1d(1, 2, 3, bias=False))
    sparing.sparsify_(model, STR(init=-5.0), select=["0"])
    with torch.inference_mode():
        assert sparing.report(model, (2, 4)).total.dense_macs == 2 * 16 + 6 * 6
    with nn.utils.parametrize.cached(), pytest.raises(InputError, match=r"not counted within parametrize.cached\(\)"):
        sparing.report(model, (2, 4))

    class Inferring(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        @torch.inference_mode()
        def forward(self, x):
            return self.fc(x)

    assert sparing.report(Inferring(), (2, 4)).total.dense_macs == 2 * 16


def test_a_shape_stands_for_an_input_of_the_models_dtype():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).bfloat16()
    assert sparing.report(model, (1, 3, 8, 8)).total.dense_macs == 36 * 216


def test_the_total_is_all_weights_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4)
            self.positions = nn.Parameter(torch.randn(1, 5, 4))
            self.token = nn.Parameter(torch.randn(1, 1, 4))  # a vector
            self.norm = nn.LayerNorm((5, 4))
            self.relative_bias = nn.Parameter(torch.randn(5, 5))
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.body(self.words(ids) + self.positions))

    model = Model()
    sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0), select=["body"])
    found = sparing.report(model, torch.zeros(2, 5, dtype=torch.long))
    assert {row.name: row.weights for row in found.layers} == {"positions": 20, "words": 40, "body": 16}
    assert (found.total.weights, found.total.nonzero) == (76, 68)
    assert (found.sparsified.weights, found.sparsified.nonzero) == (16, 8)
    assert found.backbone.weights == 36, "the classifier is the tied embedding"
    assert "sparsified" in str(found)
    assert "sparsified" in found.as_dict()
    sparing.densify_(model)
    assert sparing.report(model).sparsified is None


def test_a_model_without_values_cannot_be_counted_and_says_so():
    with pytest.raises(InputError, match="'weight' is on the meta device and has no weights to count"):
        sparing.report(nn.Linear(4, 4, device="meta"))
