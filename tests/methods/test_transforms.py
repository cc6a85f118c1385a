"""Every method under the transforms of torch.func: forward mode, second derivatives, vmap over samples and models."""

import copy

import pytest
import torch
from harness import SETTINGS, Run, batch, build, make
from test_conformance import WITH_PATTERN, arguments
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import sparing
from sparing.group_threshold import feather_threshold, group_soft_threshold
from sparing.rnn import FastGRNN
from sparing.threshold import soft_threshold

pytestmark = [
    pytest.mark.filterwarnings("ignore::sparing.SparsityWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch uses functions that torch itself deprecates
]


class Penalized(nn.Module):
    """Return the outputs of a model, and the penalty of its method."""

    def __init__(self, run):
        super().__init__()
        self.model, self.sparsifier = run.model, run.sparsifier

    def forward(self, x):
        return self.model(x), self.sparsifier.penalty()


def trained(name, pattern=None, seed=0):
    """Return a module in the middle of a run, where RigL is about to regrow weights."""
    changes = arguments(name, pattern, "uniform", ()) if pattern else {}
    return Penalized(Run("linear", make(name, **changes), seed=seed).train(8)).double()


def tensors(module):
    """Return the parameters of a module, and its other tensors, by name."""
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}
    parameters = {key: state[key] for key, _ in module.named_parameters()}
    return parameters, {key: value for key, value in state.items() if key not in parameters}


def loss_of(module, tensors, x):
    torch.manual_seed(0)  # of the noise of variational dropout
    outputs, penalty = functional_call(module, tensors, (x,))
    return outputs.tanh().square().mean() + penalty


def inputs():
    return batch((16,), 0)[0].double()


def like(tree):
    return tree_map(torch.randn_like, tree)


def inner(first, second):
    return sum((a * b).sum() for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True))


@pytest.mark.parametrize(("name", "pattern"), [*((name, None) for name in SETTINGS), *WITH_PATTERN])
def test_forward_mode_is_the_transpose_of_reverse_mode_for_outputs_and_gradients(name, pattern):
    module, x = trained(name, pattern), inputs()
    parameters, _ = tensors(module)

    def outputs(parameters):
        torch.manual_seed(0)
        return functional_call(module, parameters, (x,))

    for function in (outputs, grad(lambda parameters: loss_of(module, parameters, x))):
        tangents = like(parameters)
        result, pushed = jvp(function, (parameters,), (tangents,))
        expected, pull = vjp(function, parameters)
        assert all(map(torch.equal, tree_leaves(result), tree_leaves(expected)))
        gradients = like(result)
        found = inner(pushed, gradients)
        assert found != 0
        torch.testing.assert_close(found, inner(tangents, pull(gradients)[0]), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_forward_mode_of_autograd_needs_no_torch_func(name):
    module, x = trained(name), inputs()
    parameters, _ = tensors(module)
    tangents = like(parameters)
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(value, tangents[key]) for key, value in parameters.items()}
        tangent = forward_ad.unpack_dual(loss_of(module, duals, x)).tangent
    torch.testing.assert_close(tangent, jvp(lambda p: loss_of(module, p, x), (parameters,), (tangents,))[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_vmap_over_models_with_masks_of_their_own_equals_a_loop(name):
    modules, x = [trained(name, seed=seed) for seed in range(3)], inputs()
    module = modules[0]
    each = [tensors(one) for one in modules]
    parameters, rest = tree_map(lambda *same: torch.stack(same), *each)
    tangents = like(parameters)

    def transformed(parameters, rest, tangents):
        function = lambda parameters: loss_of(module, {**parameters, **rest}, x)  # noqa: E731
        return grad(function)(parameters), jvp(function, (parameters,), (tangents,))[1]

    gradients, pushed = vmap(transformed, randomness="same")(parameters, rest, tangents)
    for index, one in enumerate(modules):
        one.zero_grad()
        loss_of(one, {}, x).backward()
        for key, parameter in one.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[key][index], parameter.grad)
        expected = sum((gradients[key][index] * tangents[key][index]).sum() for key in gradients)
        torch.testing.assert_close(pushed[index], expected)


def test_noise_of_its_own_for_each_sample():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    sparing.sparsify_(model, make("variational_dropout"), steps=20)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def output(parameters, x):
        return functional_call(model, parameters, (x[None],)).sum()

    def outputs(x):
        torch.manual_seed(0)
        return vmap(lambda x: output(parameters, x), randomness="different")(x)

    ones = torch.ones(5, 1, dtype=torch.float64)
    torch.manual_seed(0)
    gradients = vmap(grad(output), (None, 0), randomness="different")(parameters, ones)
    noise = outputs(ones) - parameters["parametrizations.weight.original"].flatten()
    assert len(set(noise.tolist())) == 5
    torch.testing.assert_close(gradients["parametrizations.weight.0.log_sigma2"].flatten(), noise.float() / 2)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(output, (None, 0))(parameters, ones)


@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_derivatives_are_finite_for_groups_of_zeros(threshold):
    weight = torch.tensor([[3.0, 4.0], [-1.0, 1.0], [0.0, 0.0], [1e-10, 0.0]], dtype=torch.float64)
    inputs = weight, torch.tensor([threshold], dtype=torch.float64)

    def function(weight, threshold):
        return group_soft_threshold(weight, threshold, (4, 2), (1,))

    for ours, theirs in zip(jacfwd(function, (0, 1))(*inputs), jacrev(function, (0, 1))(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    slopes = grad(lambda *inputs: function(*inputs).square().sum(), (0, 1))
    second = grad(lambda *inputs: sum(slope.sin().sum() for slope in slopes(*inputs)), (0, 1))(*inputs)
    assert all(each.isfinite().all() for each in second)


@pytest.mark.parametrize("theta", [0.5, 1.0])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_thresholds_have_tangents_whatever_is_trained(theta, learned, dtype):
    weight = torch.tensor([-3.0, 0.5, 2.0], dtype=dtype).requires_grad_()
    threshold = torch.tensor([1.0], requires_grad=learned)
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(weight, torch.ones_like(weight)), forward_ad.make_dual(threshold, torch.ones(1))
        feather, soft = (
            forward_ad.unpack_dual(effective).tangent
            for effective in (feather_threshold(*duals, theta=theta), soft_threshold(*duals))
        )
    assert feather.dtype == soft.dtype == dtype
    assert feather.tolist() == [2.0, theta, 0.0]  # that of the weight, less sign(S)
    assert soft.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("arguments", [{}, {"input_rank": 2, "hidden_rank": 2}, {"learned_rank": True}])
def test_fastgrnn_under_transforms(arguments):
    torch.manual_seed(0)
    rnn = FastGRNN(5, 6, **arguments).double()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    parameters = {key: value.detach() for key, value in rnn.named_parameters()}

    def loss(parameters, x):
        return functional_call(rnn, parameters, (x,))[1].square().sum()

    gradients = vmap(grad(lambda parameters, x: loss(parameters, x[None])), (None, 0))(parameters, x)
    for index in range(3):
        rnn.zero_grad()
        loss({}, x[index : index + 1]).backward()
        for key, parameter in rnn.named_parameters():
            torch.testing.assert_close(gradients[key][index], parameter.grad)
    tangents = like(parameters)
    _, pushed = jvp(lambda parameters: loss(parameters, x), (parameters,), (tangents,))
    torch.testing.assert_close(pushed, inner(tree_map(lambda each: each.sum(0), gradients), tangents))


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_torch_compile_does_not_drop_the_gradients_of_a_method_in_silence(transform):
    model, shape = build("linear")
    sparing.sparsify_(model, make("dnw"), steps=20)
    parameters, _ = tensors(model)
    x = batch(shape, 0)[0]

    def loss(parameters):
        return vmap(lambda x: functional_call(model, parameters, (x,)))(x).square().sum()

    def transformed(parameters):
        return grad(loss)(parameters) if transform == "grad" else jvp(loss, (parameters,), (parameters,))

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ignores the gradients of the sparsified layers"):
        torch.compile(transformed, fullgraph=True, backend="aot_eager")(parameters)
    torch._dynamo.reset()
    found = torch.compile(transformed, backend="aot_eager")(parameters)
    for ours, theirs in zip(tree_leaves(found), tree_leaves(transformed(parameters)), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
    with torch.no_grad():  # there are no gradients to lose
        torch.testing.assert_close(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(parameters), loss(parameters)
        )


def test_an_ensemble_that_is_mapped_without_its_masks_is_refused_or_warned_of():
    models = [nn.Sequential(nn.Linear(6, 4)) for _ in range(3)]
    for model in models:
        sparing.sparsify_(model, sparing.GMP(sparsity=0.5, begin=0, end=0))
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    call = torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))
    with pytest.raises(sparing.InputError, match=r"stack_module_state\(\) omits them"):
        call(parameters, buffers, torch.randn(2, 6))
    base = models[0]  # its masks may be meant for all, such as for noise that is added to its weights
    with pytest.warns(sparing.SparsityWarning, match=r"not over their mask.*stack_module_state\(\) omits them"):
        call(parameters, buffers, torch.randn(2, 6))
