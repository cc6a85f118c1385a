"""The terms that DST, variational dropout and continuous sparsification add to the loss: one law for all of them."""

import pytest
import torch
from harness import batch, build
from torch.nn import functional as F

import sparing
from sparing import DST, ContinuousSparsification, SparsityWarning, VariationalDropout

K1, K2, K3 = 0.63576, 1.87320, 1.48695


def dst(weight, part, step):
    """0.3 Σ exp(−t)."""
    return 0.3 * torch.exp(-part["t"]).sum()


def variational_dropout(weight, part, step):
    """0.01 r Σ KL, with the ramp r from step 2 to step 6 of 10."""
    log_alpha = (part["log_sigma2"] - torch.log(weight**2 + 1e-8)).clamp(-8, 8)
    minus_kl = K1 * torch.sigmoid(K2 + K3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha)) - K1
    return 0.01 * min(max((step - 2) / 4, 0), 1) * -minus_kl.sum()


def continuous_sparsification(weight, part, step):
    """0.02 Σ sigmoid(β m), with β = 81^(step / 10)."""
    return 0.02 * torch.sigmoid(81.0 ** (step / 10) * part["m"]).sum()


TERMS = {
    DST(alpha=0.3): dst,
    VariationalDropout(kl_weight=0.01, begin=2, end=6, init=-5.0): variational_dropout,
    ContinuousSparsification(weight=0.02, init=0.3, final_temperature=81.0): continuous_sparsification,
}


class Training:
    """A model that is trained with loss and penalty, and the formula of the penalty beside it."""

    def __init__(self, method, fused=False, step=4):
        self.model, self.shape = build("linear")
        self.formula = TERMS[method]
        self.sparsifier = sparing.sparsify_(self.model, method, steps=10)
        groups = sparing.param_groups(self.model, weight_decay=1e-2)
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=fused)
        self.sparsifier.attach(self.optimizer)
        # Up to that step, with parameters of the parametrizations that differ from one another.
        for _ in range(step):
            self.loss(0).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in self.sparsifier.layers.values():
                for parameter in layer.parametrization.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def loss(self, data, penalty=True):
        """The loss of one mini-batch; the same noise whenever it is computed."""
        torch.manual_seed(data)
        x, y = batch(self.shape, data)
        loss = F.cross_entropy(self.model(x), y)
        return loss + self.sparsifier.penalty() if penalty else loss

    def expected(self):
        """The term by its formula, from copies of all that it depends on, and those copies."""
        total, copies = torch.zeros(()), {}
        for layer in self.sparsifier.layers.values():
            weight = layer.weight.detach().clone().requires_grad_()
            own = {
                key: value.detach().clone().requires_grad_() for key, value in layer.parametrization.named_parameters()
            }
            total = total + self.formula(weight, own, self.sparsifier.step)
            copies[id(layer.weight)] = weight
            copies |= {id(p): own[key] for key, p in layer.parametrization.named_parameters()}
        return total, copies

    def gradients(self):
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]


def saved(function, size, known):
    """Return how many tensors of a size autograd saves for a function, besides known ones; views count once."""
    kept = {}

    def pack(tensor):
        if tensor.numel() == size:
            kept[tensor.data_ptr()] = tensor  # kept alive, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return len(kept.keys() - {tensor.data_ptr() for tensor in known})


every_term = pytest.mark.parametrize("method", TERMS, ids=lambda method: method.name)


@every_term
@pytest.mark.parametrize("step", [0, 3, 9])
def test_value_and_gradient_are_those_of_the_formula_and_nothing_else_is_added_in_a_step(method, step):
    training = Training(method, step=step)
    total, copies = training.expected()
    torch.testing.assert_close(training.sparsifier.penalty(), total)
    training.loss(7, penalty=False).backward()
    plain = training.gradients()
    training.optimizer.zero_grad()
    training.loss(7).backward()
    total.backward()
    both = training.gradients()
    for parameter, without, gradient in zip(training.model.parameters(), plain, both, strict=True):
        own = copies.get(id(parameter))
        expected = without if own is None or own.grad is None else without + own.grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    training.optimizer.step()
    assert all(map(torch.equal, training.gradients(), both))


@every_term
def test_autograd_saves_one_effective_weight_per_layer_and_nothing_of_that_size_for_the_penalty(method):
    training = Training(method)
    x = torch.randn(5, *training.shape, requires_grad=True)  # the first layer saves its weight as well
    sizes = [layer.weight.numel() for layer in training.sparsifier.layers.values()]
    for size in sizes:
        known = [*training.model.parameters(), *training.model.buffers()]
        assert saved(lambda: training.model(x), size, known) == sizes.count(size)
        assert saved(training.sparsifier.penalty, size, known) == 0


@every_term
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(method, fused):
    values = []
    for enabled in (False, True):
        training = Training(method, fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        for data in range(3):
            training.optimizer.zero_grad()
            scaler.scale(training.loss(data)).backward()
            scaler.step(training.optimizer)
            scaler.update()
        assert training.sparsifier.step == 7
        values.append(training.values())
    for plain, scaled in zip(*values, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


@every_term
def test_clipping_before_the_step_clips_the_gradient_of_loss_and_penalty(method):
    training = Training(method)
    training.loss(7).backward()
    gradients = training.gradients()
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)
    training.sparsifier.attach(training.optimizer)
    before = training.values()
    limit = 0.1 * float(norm)
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), limit)
    training.optimizer.step()
    for value, start, gradient in zip(training.values(), before, gradients, strict=True):
        torch.testing.assert_close(value, start - 0.1 * gradient, rtol=1e-4, atol=1e-6)


@every_term
def test_with_accumulation_the_penalty_counts_once_however_it_is_shared_out(method):
    """Added to one of the losses, or divided by their number and added to each."""
    gradients = []
    for shared in (True, False):
        training = Training(method)
        for data in range(4):
            loss = training.loss(data, penalty=False) / 4
            if shared or data == 2:
                loss = loss + training.sparsifier.penalty() / (4 if shared else 1)
            loss.backward()
        gradients.append(training.gradients())
        training.optimizer.step()
        assert training.sparsifier.step == 5
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@every_term
def test_a_step_without_the_penalty_warns(method):
    training = Training(method)
    training.loss(0, penalty=False).backward()
    with pytest.warns(sparing.SparsityWarning, match="adds a term to the loss, and step 5 was taken without it"):
        training.optimizer.step()


@pytest.mark.parametrize("method", [method for method in TERMS if method.name != "dst"], ids=lambda method: method.name)
def test_training_in_evaluation_mode_is_warned_of(method):
    training = Training(method, step=0)
    training.model.eval()
    with torch.no_grad():
        training.sparsifier.penalty()  # for a log
    with pytest.warns(SparsityWarning, match=f"{method.name}: 2 of 2 layers are in evaluation mode, .* model.train"):
        training.sparsifier.penalty()
