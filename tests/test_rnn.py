"""FastGRNN against its equations, low and learned ranks against the dense matrix, and what cannot be used."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError, SparsityWarning
from sparing.models import fastgrnn
from sparing.rnn import (
    GATES,
    Diagonal,
    FastGRNN,
    FastGRNNCell,
    LowRankLinear,
    compact_,
    factorize_,
    is_diagonal,
    ranks,
)
from tolerance import gradients, near, tolerance

STEPS = 128

# An independent reading of the equations: value and derivative, the latter from the argument.
NUMPY_GATES = {
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
    "tanh": (np.tanh, lambda a: 1 / np.cosh(a) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: 1.0 * (a > 0)),
    "quantTanh": (lambda a: np.minimum(np.maximum(a, -1), 1), lambda a: 1.0 * (np.abs(a) < 1)),
    "quantSigm": (lambda a: np.minimum(np.maximum((a + 1) / 2, 0), 1), lambda a: 0.5 * (np.abs(a) < 1)),
}


def by_hand(cell, x, weigh, gate, update):
    """The states (N, T, H), and the gradient of Σ weigh ⊙ states, in NumPy."""
    value = {name: p.detach().double().numpy() for name, p in cell.named_parameters()}
    w, u = (m.weight.detach().double().numpy() for m in (cell.input, cell.hidden))
    (zeta,), (nu,) = 1 / (1 + np.exp(-value["zeta"])), 1 / (1 + np.exp(-value["nu"]))
    (f, df), (g, dg) = NUMPY_GATES[gate], NUMPY_GATES[update]
    h, kept, states = np.zeros((len(x), len(u))), [], []
    for t in range(x.shape[1]):
        a = x[:, t] @ w.T + h @ u.T
        z, c = f(a + value["bias_gate"]), g(a + value["bias_update"])
        new = z * h + (zeta * (1 - z) + nu) * c
        kept.append((h, a, z, c))
        states.append(new)
        h = new
    grad = {name: np.zeros_like(v) for name, v in (("w", w), ("u", u), *value.items())}
    grad_x, along = np.zeros_like(x), np.zeros_like(h)
    for t in reversed(range(x.shape[1])):
        h, a, z, c = kept[t]
        d = weigh[:, t] + along
        d_gate = d * (h - zeta * c) * df(a + value["bias_gate"])
        d_update = d * (zeta * (1 - z) + nu) * dg(a + value["bias_update"])
        grad["bias_gate"] += d_gate.sum(0)
        grad["bias_update"] += d_update.sum(0)
        grad["zeta"] += (d * (1 - z) * c).sum() * zeta * (1 - zeta)
        grad["nu"] += (d * c).sum() * nu * (1 - nu)
        grad["w"] += (d_gate + d_update).T @ x[:, t]
        grad["u"] += (d_gate + d_update).T @ h
        grad_x[:, t] = (d_gate + d_update) @ w
        along = d * z + (d_gate + d_update) @ u
    return np.stack(states, 1), grad, grad_x


def test_the_gates_here_and_there_are_the_same():
    assert NUMPY_GATES.keys() == GATES.keys()


@pytest.mark.parametrize(
    ("gate", "update"),
    [("sigmoid", "tanh"), ("quantSigm", "quantTanh"), ("sigmoid", "relu"), ("tanh", "sigmoid"), ("relu", "quantTanh")],
)
def test_128_steps_equal_the_equations_forward_and_backward(gate, update):
    rnn = FastGRNN(9, 16, gate=gate, update=update).double()
    scale = 0.2 if "relu" in (gate, update) else 1.0  # an unbounded gate must not run away
    x = scale * torch.randn(3, STEPS, 9, dtype=torch.double)
    weigh = torch.randn(3, STEPS, 16, dtype=torch.double)
    if gate in ("relu", "tanh"):
        nn.init.constant_(rnn.cell.bias_gate, 0.2)
    x.requires_grad_()
    outputs, last = rnn(x)
    (outputs * weigh).sum().backward()
    expected, grad, grad_x = by_hand(rnn.cell, x.detach().numpy(), weigh.numpy(), gate, update)
    close = near(rnn, x)
    np.testing.assert_allclose(outputs.detach().numpy(), expected, **close)
    np.testing.assert_allclose(last.detach().numpy(), expected[:, -1], **close)
    # The longest sums are the gradients of ζ and ν: over 3 sequences, 128 steps and 16 units.
    close = near(rnn, x, terms=3 * STEPS * 16, of=gradients(lambda rnn, x: (rnn(x)[0] * weigh).sum()))
    np.testing.assert_allclose(x.grad.numpy(), grad_x, **close)
    names = {"w": "input.weight", "u": "hidden.weight"}
    parameters = dict(rnn.cell.named_parameters())
    for name in ("w", "u", "bias_gate", "bias_update", "zeta", "nu"):
        np.testing.assert_allclose(parameters[names.get(name, name)].grad.numpy(), grad[name], **close)


def test_in_single_precision_128_steps_stay_near_the_equations():
    rnn = FastGRNN(9, 80)
    x = torch.randn(2, STEPS, 9)
    expected, _, _ = by_hand(rnn.cell, x.double().numpy(), np.zeros((2, STEPS, 80)), "sigmoid", "tanh")
    np.testing.assert_allclose(rnn(x)[0].detach().numpy(), expected, **near(rnn, x))


RANKS = {
    "whole": {},
    "fixed": {"input_rank": 5, "hidden_rank": 3},
    "learned": {"learned_rank": True},
    "learned, at most": {"learned_rank": True, "input_rank": 5, "hidden_rank": 3},
}


@pytest.mark.parametrize("batch", [2, 300])  # with 300, two thin products are cheaper than a whole one
@pytest.mark.parametrize("kind", RANKS)
def test_the_layer_equals_its_cell_step_by_step(kind, batch, device):
    rnn = FastGRNN(6, 16, **RANKS[kind]).double().to(device)
    x = torch.randn(batch, 7, 6, dtype=torch.double, device=device, requires_grad=True)
    start = torch.randn(batch, 16, dtype=torch.double, device=device, requires_grad=True)
    weigh = torch.randn(batch, 7, 16, dtype=torch.double, device=device)
    leaves = [x, start, *rnn.parameters()]
    outputs, last = rnn(x, h=start)
    mine = torch.autograd.grad((outputs * weigh).sum(), leaves)
    h, states = start, []
    for step in x.unbind(1):
        h = rnn.cell(step, h)
        states.append(h)
    expected = torch.stack(states, 1)
    close = near(rnn, x, start, of=lambda rnn, x, h: rnn(x, h=h))
    torch.testing.assert_close(outputs, expected, **close)
    torch.testing.assert_close(last, h, **close)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x, h=start)[0], expected, **close)
    theirs = torch.autograd.grad((expected * weigh).sum(), leaves)
    # The longest sums are the gradients of ζ and ν: over all sequences, 7 steps and 16 units.
    of = gradients(lambda rnn, x, h: (rnn(x, h=h)[0] * weigh.cpu()).sum())
    close = near(rnn, x, start, terms=7 * batch * 16, of=of)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_thin_products_are_used_where_they_save():
    rnn = FastGRNN(6, 16, hidden_rank=3)
    assert len(rnn._hidden_factors(batch=1, steps=9)) == 1
    assert len(rnn._hidden_factors(batch=300, steps=9)) == 2
    assert len(FastGRNN(6, 16, hidden_rank=9)._hidden_factors(batch=10_000, steps=9)) == 1
    # Computing U once per sequence pays off only over many steps.
    rnn = FastGRNN(6, 128, hidden_rank=40)
    assert [len(rnn._hidden_factors(batch=1, steps=steps)) for steps in (9, 99)] == [2, 1]


@pytest.mark.parametrize("hidden_rank", [None, 1])
def test_gradients_by_finite_differences_and_of_gradients(hidden_rank):
    rnn = FastGRNN(2, 3, hidden_rank=hidden_rank).double()
    x = torch.randn(2, 4, 2, dtype=torch.double, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(rnn, dict(zip(dict(rnn.named_parameters()), values, strict=True)), (x,))[0]

    values = tuple(p.detach().clone().requires_grad_() for p in rnn.parameters())
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_variable_lengths_equal_sequences_one_by_one():
    rnn = FastGRNN(4, 8)
    lengths = torch.tensor([5, 1, 9, 3])
    x = torch.randn(4, 9, 4)
    filled = x.clone()
    for row, length in enumerate(lengths):
        filled[row, length:] = 1e3  # padding must not be seen
    alone = [rnn(x[row : row + 1, :length])[1][0] for row, length in enumerate(lengths)]
    torch.testing.assert_close(rnn(filled, lengths)[1], torch.stack(alone), **near(rnn, x))
    rnn(filled, lengths)[1].sum().backward()
    together = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    sum(last.sum() for last in alone).backward()
    # The longest sums are the gradients of ζ and ν: over 18 steps and 8 units.
    close = near(rnn, x, lengths, terms=18 * 8, of=gradients(lambda rnn, *given: rnn(*given)[1].sum()))
    for a, p in zip(together, rnn.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, **close)


def test_lengths_may_be_of_any_whole_kind_and_batches_empty():
    rnn = FastGRNN(4, 8)
    x, lengths = torch.randn(2, 5, 4), torch.tensor([5, 3])
    for kind in (torch.uint8, torch.int32):
        assert torch.equal(rnn(x, lengths.to(kind))[1], rnn(x, lengths)[1])
    assert rnn(x[:0], lengths[:0])[1].shape == (0, 8)


def test_the_classifier_reads_each_sequence_to_its_own_end():
    model = sparing.models.fastgrnn(num_classes=3, input_size=4, hidden_size=8)
    x = torch.randn(2, 6, 4)
    together = model(x, torch.tensor([6, 2]))
    close = near(model, x)
    torch.testing.assert_close(together[0], model(x[:1])[0], **close)
    torch.testing.assert_close(together[1], model(x[1:, :2])[0], **close)
    assert model(x).shape == (2, 3)


# Sizes and ranks of the paper, and the parameters of the cell that follow.
COUNTS = [
    (32, 100, None, None, 13_402),
    (32, 100, 12, 40, 9_786),
    (32, 100, 11, 35, 8_654),
    (32, 100, 10, 31, 7_722),
    (32, 100, 9, 24, 6_190),
    (9, 80, None, None, 7_282),
    (9, 80, 9, 8, 2_243),
    (9, 80, 9, 7, 2_083),
    (9, 80, 8, 7, 1_994),
]


@pytest.mark.parametrize(("inputs", "hidden", "input_rank", "hidden_rank", "count"), COUNTS)
def test_parameter_counts(inputs, hidden, input_rank, hidden_rank, count):
    cell = FastGRNNCell(inputs, hidden, input_rank, hidden_rank)
    assert sum(p.numel() for p in cell.parameters()) == count
    counted = sum(row.parameters for row in ranks(cell).rows)
    assert counted + 2 * hidden + 2 == count
    # Each weight multiplies once a step.
    assert sum(row.macs for row in ranks(cell).rows) == counted
    rnn = FastGRNN(inputs, hidden, input_rank=input_rank, hidden_rank=hidden_rank)
    assert sparing.report(rnn, (1, 10, inputs)).total.macs == 10 * counted


def sparsified(model, init=-0.5):
    sparing.sparsify_(model, STR(init=init), select=is_diagonal)
    return model


@pytest.mark.parametrize(("input_rank", "hidden_rank", "count"), [row[2:] for row in COUNTS[1:5]])
def test_a_learned_rank_compacts_to_the_published_count(input_rank, hidden_rank, count):
    rnn = FastGRNN(32, 100, learned_rank=True)
    with torch.no_grad():
        for matrix, rank in ((rnn.cell.input, input_rank), (rnn.cell.hidden, hidden_rank)):
            matrix.diagonal.weight[:, rank:] = 0.05  # under the threshold of 0.38
            matrix.diagonal.weight[:, :rank] += 1.0
    sparsified(rnn)
    x = torch.randn(4, STEPS, 32)
    before, close = rnn(x)[0], near(rnn, x)
    assert [row.rank for row in ranks(rnn).rows] == [input_rank, hidden_rank]
    promised = [row.compact_parameters for row in ranks(rnn).rows]
    assert compact_(rnn) is rnn
    torch.testing.assert_close(rnn(x)[0], before, **close)
    assert sum(p.numel() for p in rnn.parameters()) == count
    assert [row.parameters for row in ranks(rnn).rows] == promised
    fixed = FastGRNN(32, 100, input_rank=input_rank, hidden_rank=hidden_rank)
    fixed.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(fixed(x)[0], before, **close)


def test_a_learned_rank_starts_as_the_whole_matrix():
    torch.manual_seed(3)
    whole = FastGRNN(9, 80)
    torch.manual_seed(3)
    learned = FastGRNN(9, 80, learned_rank=True)
    for part in ("input", "hidden"):
        made, weight = getattr(learned.cell, part).weight, getattr(whole.cell, part).weight
        # The error of a singular value decomposition is relative to the largest singular value.
        atol = tolerance(weight.dtype, terms=min(weight.shape), scale=torch.linalg.matrix_norm(weight.detach(), 2))
        torch.testing.assert_close(made, weight, rtol=0, atol=atol)


def test_low_rank_linear_is_the_product_of_its_factors():
    layer = LowRankLinear(7, 5, rank=2)
    x = torch.randn(3, 4, 7)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, **near(layer, x))
    assert torch.linalg.matrix_rank(layer.weight) == 2


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_a_compacted_linear_is_the_smaller_of_the_two_forms(rank):
    layer = LowRankLinear(8, 8, learned_rank=True)
    with torch.no_grad():
        layer.diagonal.weight[:, rank:] = 0
    x = torch.randn(5, 8)
    before, close = layer(x), near(layer, x)
    small = compact_(nn.Sequential(layer))
    torch.testing.assert_close(small(x), before, **close)
    assert sum(p.numel() for p in small.parameters()) == min(16 * rank, 64) + 8
    assert isinstance(small[0], LowRankLinear if rank < 4 else nn.Linear)
    small(x).sum().backward()


def prune(model, keep):
    """Leave the first `keep` values of every diagonal."""
    with torch.no_grad():
        for module in model.modules():
            if is_diagonal("", module):
                module.weight[:, keep:] = 0
    return model


def test_any_linear_can_learn_its_rank():
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    x = torch.randn(5, 12)
    before = model(x)
    factorize_(model)
    torch.testing.assert_close(model(x), before, **near(model, x))
    sparsified(model, init=-1.0)
    found = {name: row["rank"] for name, row in ranks(model).as_dict().items()}
    for name, rank in found.items():
        assert torch.linalg.matrix_rank(model.get_submodule(name).weight) == rank
    prune(sparing.densify_(model), 2)
    before, close = model(x), near(model, x)
    compact_(model)
    torch.testing.assert_close(model(x), before, **close)
    assert sum(p.numel() for p in model.parameters()) == 2 * (12 + 10) + 10 + 2 * (10 + 6) + 6
    assert all(isinstance(model[i], LowRankLinear) for i in (0, 2))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_can_learn_their_ranks(kind):
    model = kind(5, 8, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(3, 6, 5)
    before = model(x)[0]
    factorize_(model)
    torch.testing.assert_close(model(x)[0], before, **near(model, x))
    sparsifier = sparing.sparsify_(model, STR(init=-1.0), select=is_diagonal)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.1), lr=0.1)
    sparsifier.attach(optimizer)
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
    prune(sparing.densify_(model), 2)
    before, close, size = model(x)[0], near(model, x), sum(p.numel() for p in model.parameters())
    rows = ranks(model).rows
    compact_(model)
    torch.testing.assert_close(model(x)[0], before, **close)
    assert sum(p.numel() for p in model.parameters()) < size
    assert [row.parameters for row in ranks(model).rows] == [row.compact_parameters for row in rows]
    assert all(0 < row.rank <= 2 and row.macs == row.shape[0] * row.shape[1] for row in ranks(model).rows)
    copy.deepcopy(model)(x)[0].sum().backward()


def test_a_tied_weight_stays_tied():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    x = torch.randn(2, 6)
    before = model(x)
    factorize_(model)
    torch.testing.assert_close(model(x), before, **near(model, x))
    prune(model, 2)
    before, close = model(x), near(model, x)
    compact_(model)
    torch.testing.assert_close(model(x), before, **close)
    assert sum(p.numel() for p in model.parameters()) == 2 * 12
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_shared_module_is_replaced_in_both_places():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, layer)
    prune(factorize_(model), 1)
    compact_(model)
    assert model[0] is model[1]
    assert isinstance(model[0], LowRankLinear)


def test_factors_can_be_sparse_as_well():
    rnn = FastGRNN(9, 16, hidden_rank=4)
    x = torch.randn(2, 5, 9)
    sparing.sparsify_(rnn, STR(init=-2.0))
    before = rnn(x)[0]
    assert 0 < sparing.report(rnn).total.sparsity < 1
    sparing.densify_(rnn)
    assert torch.equal(rnn(x)[0], before)


def test_factors_and_rank_can_be_sparse_together():
    model = sparing.models.fastgrnn(input_size=9, hidden_size=16, learned_rank=True)
    sparing.sparsify_(model, STR(init=-2.0), select=["*"])
    x = torch.randn(2, 5, 9)
    before, close = model(x), near(model, x)
    compact_(model)
    torch.testing.assert_close(model(x), before, **close)
    assert sparing.sparse_layers(model) == {}


def test_gmp_can_prune_ranks():
    model = sparing.models.fastgrnn(input_size=9, hidden_size=20, learned_rank=True)
    sparsifier = sparing.sparsify_(model, sparing.GMP(sparsity=0.75, begin=1, end=1), select=["*.diagonal"], steps=2)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.0), lr=0.01)
    sparsifier.attach(optimizer)
    model(torch.randn(2, 5, 9)).sum().backward()
    optimizer.step()
    assert [row.rank for row in ranks(model).rows] == [2, 5]


def test_weight_decay_lowers_the_rank_and_loss_holds_it():
    torch.manual_seed(0)
    model = sparing.models.fastgrnn(num_classes=2, input_size=4, hidden_size=12, learned_rank=True)
    sparsifier = sparing.sparsify_(model, STR(init=-6.0), select=is_diagonal)
    groups = sparing.param_groups(model, weight_decay=0.0, threshold_weight_decay=1.0)
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    sparsifier.attach(optimizer)
    x = torch.randn(64, 10, 4)
    y = (x[:, :, 0].sum(1) > 0).long()
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = ranks(model).rows
    assert 0 < rows[1].rank < 12
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    assert all(layer.parametrization.s.dtype == torch.float32 for layer in sparsifier.layers.values())


def test_a_rank_of_zero_warns_and_training_goes_on():
    model = sparing.models.fastgrnn(num_classes=2, input_size=4, hidden_size=6, learned_rank=True)
    with pytest.warns(SparsityWarning, match=r"rnn\.cell\.input\.diagonal"):
        sparsifier = sparing.sparsify_(model, STR(init=20.0, scale=100.0), select=is_diagonal)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.1), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(3, 5, 4)).sum().backward()
    optimizer.step()
    assert [row.rank for row in ranks(model).rows] == [0, 0]
    x = torch.randn(3, 5, 4)
    before, close = model(x), near(model, x)
    assert torch.isfinite(before).all()
    compact_(model)
    torch.testing.assert_close(model(x), before, **close)


def test_report_shows_the_ranks():
    rnn = sparsified(FastGRNN(9, 80, learned_rank=True), init=-0.3)
    rank = ranks(rnn).rows[1].rank
    assert 0 < rank < 80
    text = str(ranks(rnn))
    assert f"{rank} of 80" in text
    assert "cell.hidden" in text
    row = ranks(rnn).as_dict()["cell.hidden"]
    assert row["parameters"] == row["macs"] == 80 * 161
    assert row["compact_parameters"] == min(rank * 160, 6400)


def test_uses_are_steps():
    uses = sparing.count_applications(sparsified(FastGRNN(9, 16, learned_rank=True)), (2, 30, 9))
    assert set(uses.values()) == {60}
    assert len(uses) == 6
    assert set(sparing.count_applications(FastGRNNCell(9, 16), (2, 9)).values()) == {2}


@pytest.mark.slow
def test_it_compiles_whole():
    rnn = FastGRNN(4, 8, hidden_rank=2)
    x, lengths = torch.randn(2, 5, 4), torch.tensor([5, 2])
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of itself
        outputs, last = compiled(x, lengths)
        torch.testing.assert_close(last, rnn(x, lengths)[1], **near(rnn, x, lengths))
        outputs.sum().backward()
    found = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    rnn(x, lengths)[0].sum().backward()
    # The longest sums are the gradients of ζ and ν: over 10 steps and 8 units.
    close = near(rnn, x, lengths, terms=10 * 8, of=gradients(lambda rnn, *given: rnn(*given)[0].sum()))
    for a, p in zip(found, rnn.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, **close)


def test_autocast():
    rnn = FastGRNN(4, 8, hidden_rank=2)
    x = torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = rnn(x)
    outputs.float().sum().backward()
    torch.testing.assert_close(outputs.float(), rnn(x)[0], **near(rnn, x, dtype=torch.bfloat16))
    assert all(torch.isfinite(p.grad).all() for p in rnn.parameters())


def test_it_can_be_copied_and_pickled():
    rnn = FastGRNN(4, 8, gate="quantSigm", update="quantTanh")
    x = torch.randn(2, 5, 4)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(other(x)[0], rnn(x)[0])


def test_half_precision_keeps_s():
    rnn = sparsified(FastGRNN(4, 8, learned_rank=True), init=-5.0).to(torch.bfloat16)
    assert {p.dtype for n, p in rnn.named_parameters() if n.endswith(".s")} == {torch.float32}
    rnn(torch.randn(2, 5, 4, dtype=torch.bfloat16))[0].float().sum().backward()


REFUSED = {
    "rank above full": (
        lambda: FastGRNN(9, 80, input_rank=10),
        "input_rank: rank must be an integer from 0 to 9 .*got 10",
    ),
    "hidden rank above full": (
        lambda: FastGRNN(9, 80, hidden_rank=81),
        "hidden_rank: rank must be an integer from 0 to 80 .*got 81",
    ),
    "rank below zero": (lambda: LowRankLinear(3, 4, rank=-1), "rank must be an integer from 0 to 3 .*got -1"),
    "no number": (lambda: LowRankLinear(3, 4, rank=1.5), "rank must be an integer .*got 1.5"),
    "a gate": (lambda: FastGRNNCell(3, 4, gate="sigmoyd"), "did you mean 'sigmoid'"),
    "an update": (lambda: FastGRNNCell(3, 4, update="gelu"), "unknown activation update='gelu'"),
    "no size": (lambda: FastGRNNCell(3, 0), "hidden_size must be an integer >= 1, got 0"),
    "no input": (lambda: LowRankLinear(0, 4), "LowRankLinear: in_features must be an integer >= 1, got 0"),
    "no output": (lambda: LowRankLinear(4, -1), "LowRankLinear: out_features must be an integer >= 1, got -1"),
    "half a size": (lambda: LowRankLinear(4.5, 4, learned_rank=True), "in_features must be an integer >= 1, got 4.5"),
    "size as text": (lambda: FastGRNN("3", 4), "FastGRNN: input_size must be an integer >= 1, got '3'"),
    "a diagonal of integers": (lambda: Diagonal(torch.ones(3, dtype=int)), "values must be .* got torch.int64"),
    "a diagonal of a list": (lambda: Diagonal([1.0]), r"values must be .* got \[1.0\]"),
    "no classes": (lambda: fastgrnn(num_classes=0), "fastgrnn: num_classes must be an integer >= 1, got 0"),
    "no steps": (lambda: FastGRNN(3, 4)(torch.zeros(2, 0, 3)), "steps >= 1"),
    "features": (lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 4)), r"\(2, 5, 4\)"),
    "length zero": (
        lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), torch.tensor([0, 5])),
        "lengths must be from 1 to 5 .*got 0",
    ),
    "length beyond": (
        lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), torch.tensor([6, 5])),
        "lengths must be from 1 to 5 .*got 6",
    ),
    "lengths of another batch": (lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), torch.tensor([5])), r"\(2,\)"),
    "lengths in a list": (lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), [5, 5]), "must be a tensor of shape.*got list"),
    "lengths as a mask": (lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), torch.tensor([True, True])), "torch.bool"),
    "a state of another batch": (lambda: FastGRNN(3, 4)(torch.zeros(2, 5, 3), h=torch.zeros(1, 4)), r"\(2, 4\), got"),
    "a kernel": (lambda: factorize_(nn.Conv2d(3, 4, 3), select=["weight"]), "only a matrix"),
    "nothing": (lambda: factorize_(nn.Sequential(nn.ReLU())), "chose no layer"),
    "twice": (lambda: factorize_(factorize_(nn.Linear(3, 3))), "Factored"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused(what):
    run, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        run()


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    before = sorted(model.state_dict())
    with pytest.raises(InputError, match="NaN"):
        factorize_(model)
    assert sorted(model.state_dict()) == before


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_compact_keeps_frozen_weights_frozen(trained):
    model = nn.Sequential(factorize_(nn.Sequential(nn.Linear(8, 8), nn.LSTM(4, 4))), LowRankLinear(8, 8, 4))
    model.append(LowRankLinear(8, 8, learned_rank=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("bias" if "bias" in name else "weight") in trained)
        if name.endswith("diagonal.weight"):
            parameter.data[:, 2:] = 0
    compacted = {name: parameter.requires_grad for name, parameter in compact_(model).named_parameters()}
    assert compacted == {name: ("bias" if "bias" in name else "weight") in trained for name in compacted}
    assert not any("diagonal" in name for name in compacted)


def test_a_compacted_weight_cannot_be_assigned():
    model = compact_(factorize_(nn.LSTM(3, 4)))
    with pytest.raises(InputError, match="fixed rank"):
        model.weight_hh_l0 = torch.zeros(16, 4)
