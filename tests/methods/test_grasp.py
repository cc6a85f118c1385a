"""GraSP: exact by `prune`, and estimated by the first two optimizer steps without it."""

import pytest
import torch
from harness import Run, batch, build
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import GMP, GraSP
from sparing.patterns import Block


def smooth(seed=0):
    """Return a network without ReLU, in double precision, so that finite differences are accurate."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).double()


def data(step=0):
    x, y = batch((16,), step)
    return x.double(), y


def scores(model, x, y):
    """Return −W ⊙ Hg, with the full Hessian of all weights."""
    weights = {key: p.detach() for key, p in model.named_parameters() if p.dim() > 1}
    biases = {key: p.detach() for key, p in model.named_parameters() if p.dim() == 1}
    shapes = {key: w.shape for key, w in weights.items()}

    def loss(vector):
        parts = vector.split([w.numel() for w in weights.values()])
        named = {key: part.reshape(shapes[key]) for key, part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, {**named, **biases}, (x,)), y)

    vector = torch.cat([w.flatten() for w in weights.values()])
    gradient = torch.autograd.functional.jacobian(loss, vector)
    return -vector * (torch.autograd.functional.hessian(loss, vector) @ gradient)


def flat(sparsifier):
    return torch.cat([layer.parametrization.mask.flatten() for layer in sparsifier.layers.values()])


def by_block(values, n, reduce):
    """Reduce values of all weights, in one vector, over blocks of n neighbouring rows of one column."""
    parts = values.split([24 * 16, 4 * 24])
    shaped = [part.reshape(-1, n, inputs) for part, inputs in zip(parts, (16, 24), strict=True)]
    return torch.cat([reduce(part, 1).flatten() for part in shaped])


def attached(model, method):
    sparsifier = sparing.sparsify_(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    sparsifier.attach(optimizer)
    return sparsifier, optimizer


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("n", [1, 4])
def test_prune_removes_the_weights_or_blocks_of_largest_score_of_all_layers(n):
    x, y = data()
    expected = by_block(scores(smooth(), x, y), n, torch.mean)
    model, method = smooth(), GraSP(sparsity=0.75, pattern=Block(n))
    sparsifier = sparing.sparsify_(model, method)
    method.prune(sparsifier, lambda: F.cross_entropy(model(x), y))
    mask = by_block(flat(sparsifier), n, torch.any)
    assert torch.equal(mask, by_block(flat(sparsifier), n, torch.all))
    assert int(mask.sum()) == 120 // n
    assert expected[mask].max() <= expected[~mask].min()
    assert all(p.grad is None for p in model.parameters())


def test_a_score_is_the_first_order_change_of_the_squared_gradient():
    """Shrinking the weight of largest score raises ‖g‖² by about twice its score."""
    x, y = data()
    model = smooth()
    expected = scores(model, x, y)
    weights = [p for p in model.parameters() if p.dim() > 1]

    def norm():
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
        return sum(g.square().sum() for g in gradients)

    position = int(expected[:384].argmax())
    before, shrink = norm(), 1e-4
    with torch.no_grad():
        weights[0].view(-1)[position] *= 1 - shrink
    assert torch.allclose((norm() - before) / shrink, 2 * expected[position], rtol=1e-2)
    assert expected[position] > 0


def test_after_prune_the_first_step_trains():
    x, y = data()
    model, method = smooth(), GraSP(sparsity=0.75)
    sparsifier, optimizer = attached(model, method)
    method.prune(sparsifier, lambda: F.cross_entropy(model(x), y))
    mask, before = flat(sparsifier), [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, x, y)
    assert not any(map(torch.equal, model.parameters(), before))
    step(model, optimizer, x, y)
    assert torch.equal(flat(sparsifier), mask)


@pytest.mark.parametrize("fused", [False, True])
def test_two_steps_on_one_batch_choose_as_prune_does_also_under_a_gradient_scaler(fused):
    x, y = data()
    expected = scores(smooth(), x, y)
    model = smooth()
    sparsifier = sparing.sparsify_(model, GraSP(sparsity=0.75, probe=1e-4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=fused)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    mask, exact = flat(sparsifier), expected <= expected.kthvalue(120).values
    assert int(mask.sum()) == 120
    assert int((mask & exact).sum()) >= 119


def test_the_two_steps_move_no_parameter_and_the_network_is_displaced_in_between():
    model = smooth()
    sparsifier, optimizer = attached(model, GraSP(sparsity=0.75, probe=0.5))
    start = [p.detach().clone() for p in model.parameters()]
    layer = sparsifier.layers["0"]
    x, y = data()
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), layer.weight)[0]
    step(model, optimizer, x, y)
    assert torch.allclose(layer.effective_weight, layer.weight + 0.5 * gradient)
    step(model, optimizer, *data(1))
    assert all(map(torch.equal, model.parameters(), start))
    assert torch.equal(layer.effective_weight, layer.weight * layer.parametrization.mask)
    assert not layer.parametrization.displaced
    step(model, optimizer, *data(2))
    assert not any(map(torch.equal, model.parameters(), start))


@pytest.mark.parametrize("split", [1, 2])
def test_a_checkpoint_between_the_two_steps_continues_to_the_last_bit(split, tmp_path):
    straight = Run("conv2d", GraSP(sparsity=0.75)).train(5)
    first = Run("conv2d", GraSP(sparsity=0.75)).train(split)
    torch.save(first.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run("conv2d", GraSP(sparsity=0.75), seed=7).load(state).train(5 - split)
    expected, found = straight.model.state_dict(), second.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_no_tensor_of_the_state_is_empty():
    # accelerate's save_model takes all empty tensors for one shared tensor, and leaves out all but one.
    model = smooth()
    attached(model, GraSP(sparsity=0.75))
    assert 0 not in {value.numel() for value in model.state_dict().values()}


# In both orders: if the scores tied, one of them would be wrong.
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
def test_scores_too_small_for_half_precision_are_ranked(weights):
    model = nn.Linear(4, 1, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]) * 1e-4)
    sparsifier, optimizer = attached(model, GraSP(sparsity=0.5))
    layer = sparsifier.layers["weight"]
    for gradient in (0.0, 1e-5):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
    assert layer.parametrization.mask.flatten().tolist() == [weight > 2 for weight in weights]


def test_prune_is_called_once_before_training_and_with_its_own_sparsifier():
    x, y = data()
    method = GraSP(sparsity=0.75)
    model = smooth()
    sparsifier, optimizer = attached(model, method)
    with pytest.raises(sparing.InputError, match="the sparsifier is that of GraSP.sparsity=0.75"):
        GraSP(sparsity=0.5).prune(sparsifier, lambda: F.cross_entropy(model(x), y))
    step(model, optimizer, x, y)
    with pytest.raises(sparing.InputError, match=r"call prune\(\) once, before training; 1 optimizer steps"):
        method.prune(sparsifier, lambda: F.cross_entropy(model(x), y))
    fresh = smooth()
    sparsifier = sparing.sparsify_(fresh, method)
    method.prune(sparsifier, lambda: F.cross_entropy(fresh(x), y))
    with pytest.raises(sparing.InputError, match=r"call prune\(\) once, before training"):
        method.prune(sparsifier, lambda: F.cross_entropy(fresh(x), y))
    other, _ = build("linear")
    with pytest.raises(sparing.InputError, match="the sparsifier is that of GMP"):
        method.prune(sparing.sparsify_(other, GMP(sparsity=0.5), steps=1000), lambda: None)


@pytest.mark.parametrize("exact", [True, False])
def test_a_layer_that_the_loss_does_not_use_is_named(exact):
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    method, loss = GraSP(sparsity=0.5), lambda: model[0](torch.ones(1, 4)).square().sum()
    sparsifier, optimizer = attached(model, method)
    prune = (lambda: method.prune(sparsifier, loss)) if exact else optimizer.step
    loss().backward()
    if not exact:
        optimizer.step()
        loss().backward()
    with pytest.warns(sparing.SparsityWarning, match="no gradient reached 1 of 2 layers in this step: 1, whose"):
        prune()


@pytest.mark.parametrize("probe", [0, float("inf"), "0.1"])
def test_a_probe_out_of_range_is_refused(probe):
    with pytest.raises(sparing.InputError, match=r"GraSP: probe must be a number in \(0, inf\), got"):
        GraSP(sparsity=0.5, probe=probe)
