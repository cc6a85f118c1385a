"""torch.compile, torch.export and gradient checkpointing; bench/recompiles.py compiles every method."""

import copy

import pytest
import torch
from harness import SETTINGS, STEPS, Run, batch, make
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import sparing

# torch.compile uses functions that torch itself deprecates.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sparing.SparsityWarning")]
COMPILED = ["gmp", "rigl", "str_sparsity", "continuous_sparsification"]


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(run, forward, steps=STEPS):
    """Train through another forward pass than that of the model itself."""
    for step in range(steps):
        x, y = batch(run.shape, step)
        run.optimizer.zero_grad()
        (F.cross_entropy(forward(x), y) + run.sparsifier.penalty()).backward()
        run.optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_run_is_compiled_once_whatever_the_schedule_does(name):
    run, eager, counter = Run("linear", make(name)), Run("linear", make(name)), CompileCounterWithBackend("aot_eager")
    average = AveragedModel(run.model)
    compiled = torch.compile(run.model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(run, compiled, STEPS // 2)
        run.load(copy.deepcopy(run.state()))
        average.update_parameters(run.model)
        train(run, compiled, STEPS // 2)
    assert counter.frame_count == 1
    train(eager, eager.model, STEPS // 2)
    train(eager, eager.model, STEPS // 2)
    for ours, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_distributed_data_parallel_is_compiled():
    run, eager = Run("linear", make("rigl")), Run("linear", make("rigl")).train(STEPS)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(run.model), backend="aot_eager")
        train(run, wrapped)
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["gmp", "str", "variational_dropout"])
def test_a_model_in_training_is_exported_with_its_masks(name):
    run = Run("linear", make(name)).train(STEPS)
    run.model.eval()
    x = batch(run.shape, 0)[0]
    with torch.no_grad():
        expected = run.model(x)
        torch.testing.assert_close(torch.export.export(run.model, (x,)).module()(x), expected)
    sparing.densify_(run.model)
    torch.testing.assert_close(torch.export.export(run.model, (x,)).module()(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_checkpointing_changes_no_output_and_no_gradient(name, reentrant):
    run, plain = Run("conv2d", make(name)).train(3), Run("conv2d", make(name)).train(3)
    x, y = batch(run.shape, 3)
    outputs = []
    for each, used in ((run, True), (plain, False)):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        output = checkpoint(each.model, given, use_reentrant=reentrant) if used else each.model(given)
        each.optimizer.zero_grad()
        F.cross_entropy(output, y).backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
