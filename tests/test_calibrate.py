"""The score |W| · ‖x‖₂ of calibrated models, and one-shot pruning by it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import GMP, NM, Block, Budget, Filters, InputError, Unstructured, calibrate
from sparing.run.method_section import build_method

ONE_SHOT = {"begin": 0, "end": 0}


def norms(model, *batches):
    """The norm of the inputs of each weight, in the shape of the weight."""
    layers = sparing.layers.all_layers(model)
    found = calibrate(model, batches).norms
    return {name: norm.expand(layers[name].shape) for name, norm in found.items()}


def roots(squares):
    return squares.sum(0).sqrt()


# Norms


def test_norms_of_a_linear_layer_are_those_of_all_rows_of_all_batches():
    model, batches = nn.Linear(6, 4), [torch.randn(3, 5, 6), torch.randn(6), torch.randn(2, 6)]
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    found = calibrate(model, batches).norms["weight"]
    assert found.shape == (1, 6), "one number for each input"
    torch.testing.assert_close(found[0], roots(rows**2))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_norms_of_a_convolution_are_those_of_its_input_channels(kind, groups):
    model, transposed = kind(4, 8, 3, stride=2, padding=1, groups=groups), kind.__name__.startswith("ConvT")
    x = torch.randn(2, 4, *[9] * (model.weight.dim() - 2))
    channels = x.square().flatten(2).sum((0, 2)).sqrt()
    for (first, second), norm in zip(
        torch.cartesian_prod(*map(torch.arange, model.weight.shape[:2])),
        norms(model, x)["weight"].flatten(0, 1),
        strict=True,
    ):
        channel = first if transposed else first // (8 // groups) * (4 // groups) + second
        torch.testing.assert_close(norm, channels[channel].expand_as(norm))


@pytest.mark.slow
def test_norms_of_the_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", exc_type=ImportError)
    model, x = pytorch_utils.Conv1D(4, 6), torch.randn(2, 5, 6)
    torch.testing.assert_close(norms(model, x)["weight"], roots(x.flatten(0, 1) ** 2)[:, None].expand(6, 4))


@pytest.mark.parametrize("other", [False, True])
def test_norms_of_attention_are_those_of_query_key_value_and_heads(other):
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    query, key, value = (torch.randn(2, 5, 8) for _ in range(3)) if other else [torch.randn(2, 5, 8)] * 3
    found = norms(model, (query, key, value))
    for rows, x in zip(found["in_proj_weight"].chunk(3), (query, key, value), strict=True):
        torch.testing.assert_close(rows, roots(x.flatten(0, 1) ** 2).expand(8, 8))
    with torch.no_grad():
        model.out_proj.weight.copy_(torch.eye(8))
        heads = model(query, key, value)[0] - model.out_proj.bias
    torch.testing.assert_close(found["out_proj"], roots(heads.flatten(0, 1) ** 2).expand(8, 8))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_norms_of_recurrent_layers_are_those_of_inputs_and_hidden_states(kind, sparse):
    model, x = kind(6, 4, batch_first=True), torch.randn(2, 5, 6)
    if sparse:
        sparing.sparsify_(model, sparing.STR(init=-3.0))
    found, hidden = norms(model, x), model(x)[0].detach()[:, :-1]
    gates = len(found["weight_ih_l0"])
    torch.testing.assert_close(found["weight_ih_l0"], roots(x.flatten(0, 1) ** 2).expand(gates, 6))
    torch.testing.assert_close(found["weight_hh_l0"], roots(hidden.flatten(0, 1) ** 2).expand(gates, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.embed(tokens)).relu())


def test_a_tied_weight_has_the_norms_of_its_products():
    model, tokens = Tied(), torch.arange(12).reshape(2, 6)
    x = model.hidden(model.embed(tokens)).relu().detach().flatten(0, 1)
    torch.testing.assert_close(norms(model, tokens)["embed"], roots(x**2).expand(20, 8))
    score = calibrate(model, [{"tokens": tokens}])
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.5, score=score, **ONE_SHOT), select=["embed", "hidden"])
    assert [layer.nonzero() for layer in sparsifier.layers.values()] == [80, 32]


class Own(nn.Module):
    """Weights used in unusual ways: twice, as a copy, in parts, for every example of a batch, from the left."""

    def __init__(self):
        super().__init__()
        for name in ("twice", "copied", "parts", "expanded", "left"):
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x):
        x = x @ self.twice + 2 * x @ self.twice
        with torch.autocast("cpu", torch.bfloat16):
            self.before = x
            F.linear(x.flatten(0, 1), self.copied)
        first, second = self.parts.chunk(2)
        F.linear(x, first.t().contiguous().t()), F.linear(3 * x, second)
        torch.bmm(x, self.expanded.expand(len(x), 4, 4))
        return self.left @ x[0]


def test_views_and_copies_of_a_weight_are_recognized():
    model, x = Own(), torch.randn(2, 3, 4)
    x = F.pad(x, (0, 0, 0, 1))
    found = norms(model, x)
    with torch.no_grad():
        y = x @ model.twice + 2 * x @ model.twice
    squares = y.flatten(0, 1).square().sum(0)
    close = {"rtol": 0.02, "atol": 0.0}
    torch.testing.assert_close(found["twice"], (5 * x.flatten(0, 1).square().sum(0)).sqrt()[:, None].expand(4, 4))
    torch.testing.assert_close(found["copied"], squares.sqrt().expand(4, 4), **close)
    torch.testing.assert_close(found["parts"], torch.cat([squares.expand(2, 4), 9 * squares.expand(2, 4)]).sqrt())
    torch.testing.assert_close(found["expanded"], squares.sqrt()[:, None].expand(4, 4))
    torch.testing.assert_close(found["left"], y[0].square().sum(1).sqrt().expand(4, 4))


def test_a_weight_that_is_a_part_of_a_larger_tensor_is_calibrated():
    model, x = nn.Module(), torch.randn(3, 4)
    model.weight = nn.Parameter(torch.randn(5, 8)[:, 2:6])
    model.forward = lambda x: (x @ model.weight[:3].t(), 2 * x @ model.weight[3:].t())
    squares = x.square().sum(0).expand(5, 4) * torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0])[:, None]
    torch.testing.assert_close(norms(model, x)["weight"], squares.sqrt())


def test_the_model_is_as_before_and_runs_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(5, 6)
    found = norms(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(found["3"], roots(model.eval()[:3](x).detach() ** 2).expand(2, 4))


# Masks


def kept(scores, mask):
    """Whether a mask keeps the largest scores."""
    return bool(scores[mask].min() >= scores[~mask].max())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
def test_scores_are_relative_to_the_mean_of_their_output(kind, groups):
    """Weights that are a hundred times larger in some outputs leave the masks as they are."""
    model = kind(8, 4) if kind is nn.Linear else kind(8, 4, 3, groups=groups)
    batch, twin = torch.randn(5, 8, 4, 4) if kind is not nn.Linear else torch.randn(5, 8), copy.deepcopy(model)
    with torch.no_grad():
        transposed = kind is nn.ConvTranspose2d
        # Of a transposed convolution, output channel c of a group is [inputs of the group, c].
        model.weight[: 8 // groups, 1] *= 100 if transposed else 1
        model.weight[1] *= 1 if transposed else 100
    masks = []
    for each in (model, twin):
        method = GMP(sparsity=0.5, score=calibrate(each, [batch]), **ONE_SHOT)
        masks += [layer.parametrization.mask for layer in sparing.sparsify_(each, method).layers.values()]
    assert torch.equal(*masks)


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2), NM(2, 4), Filters()], ids=str)
@pytest.mark.parametrize(
    "budget", ["uniform", "global", Budget({"0": 0.25, "2": 0.75})], ids=["uniform", "global", "own"]
)
def test_the_largest_scores_are_kept(pattern, budget):
    if isinstance(pattern, NM) and isinstance(budget, Budget):
        pytest.skip("N:M fixes the budget")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    batches = [torch.randn(5, 8) * torch.logspace(-1, 1, 8) for _ in range(2)]
    found = norms(model, *batches)
    scores = [model[index].weight.detach().abs() * found[str(index)] for index in (0, 2)]
    if not isinstance(pattern, Filters):
        scores = [s / s.mean(1, keepdim=True) for s in scores]
    sparsity = {} if isinstance(pattern, NM) or isinstance(budget, Budget) else {"sparsity": 0.5}
    method = GMP(**sparsity, budget=budget, pattern=pattern, score=calibrate(model, batches), **ONE_SHOT)
    masks = [layer.parametrization.mask for layer in sparing.sparsify_(model, method).layers.values()]
    if isinstance(pattern, NM):
        groups = [(s.reshape(-1, 4), m.reshape(-1, 4)) for s, m in zip(scores, masks, strict=True)]
        assert all(kept(*group) for pair in groups for group in zip(*pair, strict=True))
        return
    if isinstance(pattern, Block):
        scores = [s.reshape(-1, 2, s.shape[1]).square().mean(1).flatten() for s in scores]
        masks = [m.reshape(-1, 2, m.shape[1]).all(1).flatten() for m in masks]
    elif isinstance(pattern, Filters):
        scores, masks = [s.square().mean(1) for s in scores], [m.all(1) for m in masks]
    if budget != "global":
        assert all(map(kept, scores, masks))
    elif not isinstance(pattern, Filters):  # of different sizes: as many as fit
        assert kept(torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks]))
    wanted = [0.75, 0.25] if isinstance(budget, Budget) else [0.5, 0.5]
    for mask, share in zip(masks, wanted, strict=True):
        assert budget == "global" or int(mask.sum()) == share * mask.numel()


def test_a_ramp_ranks_by_the_norms_of_the_calibration():
    model, x = nn.Linear(8, 4), torch.randn(16, 8) * torch.logspace(-1, 1, 8)
    sparsifier = sparing.sparsify_(
        model, GMP(sparsity=0.5, begin=0, end=4, every=1, score=calibrate(model, [x])), steps=4
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    (layer,) = sparsifier.layers.values()
    scores = layer.weight.detach().abs() * roots(x**2)
    scores /= scores.mean(1, keepdim=True)
    assert torch.equal(layer.parametrization.mask, scores >= scores.flatten().sort().values[16])


def test_a_checkpoint_names_the_calibration_in_few_bytes():
    model, batches = nn.Linear(8, 4), [torch.randn(4, 8) for _ in range(2)]
    first, again, second = (calibrate(model, [batch]) for batch in (batches[0], batches[0], batches[1]))
    assert repr(first) == repr(again) != repr(second)
    methods = [GMP(sparsity=0.5, score=score, **ONE_SHOT) for score in (first, again, second)]
    assert len(str(methods[0].describe())) < 250
    models = [copy.deepcopy(model) for _ in methods]
    for each, method in zip(models, methods, strict=True):
        sparing.sparsify_(each, method)
    models[1].load_state_dict(models[0].state_dict())
    with pytest.raises(InputError, match="is of a run with score='Calibration"):
        models[2].load_state_dict(models[0].state_dict())


# What cannot be calibrated


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.unused, self.scaled = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, expert=0):
        return F.linear(x @ self.experts[expert], self.scaled.weight * 2)


@pytest.mark.parametrize("name", ["experts", "unused", "scaled"])
def test_a_layer_that_was_not_reached_is_named(name):
    model = Experts()
    score = calibrate(model, [torch.randn(3, 4)])
    method = GMP(sparsity=0.5, score=score, **ONE_SHOT)
    with pytest.raises(InputError, match=f"has no layer '{name}': no batch reached all of its weights.* select="):
        sparing.sparsify_(model, method, select=[name])
    assert sparing.sparse_layers(model) == {}


@pytest.mark.parametrize("batch", [torch.zeros(3, 4), torch.ones(0, 4)])
def test_a_layer_whose_inputs_are_all_zero_is_named_and_not_ranked_by_position(batch):
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1, bias=False))
    model[1].weight = nn.Parameter(torch.ones(0, 2))
    method = GMP(sparsity=0.5, score=calibrate(model, [batch]), **ONE_SHOT)
    with pytest.raises(InputError, match="has no layer '0': .* all of its inputs were zero"):
        sparing.sparsify_(model, method, select=["0"])


def test_experts_that_were_all_reached_are_calibrated():
    assert "experts" in calibrate(Experts(), [(torch.randn(3, 4), 0), (torch.randn(3, 4), 1)]).norms


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no batch"),
        (
            [(torch.ones(1, 4), torch.ones(1))],
            r"cannot be called with a batch: .* give \(\(x,\) for x, label in loader\)",
        ),
        ([[1, 2]], "a batch must be a tensor, a tuple .* got list"),
        ([{"input": "text"}], "a batch must be a tensor"),
        ([torch.full((1, 4), torch.nan)], "inputs of layer 'weight' are NaN or infinite"),
        ([torch.full((1, 4), 1e30)], "or too large to square"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(batches, message):
    with pytest.raises(InputError, match=message):
        calibrate(nn.Linear(4, 2), batches)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 2, device="meta"), lambda: nn.LazyLinear(2)])
def test_a_model_without_values_is_refused(make):
    with pytest.raises(InputError, match="on the meta device, or not initialized"):
        calibrate(make(), [torch.randn(1, 4)])


def test_the_score_of_another_model_is_refused():
    score = calibrate(nn.Linear(4, 2), [torch.randn(3, 4)])
    with pytest.raises(InputError, match=r"made for another model: layer 'weight' has shape \(2, 5\)"):
        sparing.sparsify_(nn.Linear(5, 2), GMP(sparsity=0.5, score=score, **ONE_SHOT))


def test_a_score_of_another_shape_or_in_a_recipe_is_refused():
    with pytest.raises(InputError, match="one value for each of 8 weights or groups of layer 'weight', got 4"):
        sparing.sparsify_(nn.Linear(4, 2), GMP(sparsity=0.5, score=lambda layer, units: layer.weight[:1], **ONE_SHOT))
    with pytest.raises(InputError, match="which a recipe cannot give; got 'wanda'"):
        build_method({"name": "gmp", "sparsity": 0.5, "score": "wanda"})
