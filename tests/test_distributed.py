"""Distributed training: equal results on one and two ranks, resuming, and restarts after a rank was killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import sparing
from small_run import descendants, torchrun
from sparing.run.build import build_data, build_model, build_optimizer
from sparing.run.distributed import Ranks
from sparing.run.loop import backward
from sparing.run.method_section import build_method
from sparing.run.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

RECIPE = {
    "model": {"name": "resnet8", "width": 2},
    "data": {"name": "small_run:noise", "batch_size": 4},
    "method": {"name": "str", "init": -4.0},
    "optimizer": {"lr": 0.05, "weight_decay": 5e-4, "threshold_weight_decay": 0.05},
    "schedule": {"epochs": 2},
    "tensorboard": False,
    "device": "cpu",
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def on_forks(count, function, *arguments):
    """Run a function on forked ranks, which spares them the imports."""
    torch.multiprocessing.start_processes(function, (count, *arguments), count, start_method="fork")


METHODS = {
    "str": {"name": "str", "init": -4.0},
    "gmp, global": {"name": "gmp", "sparsity": 0.75, "every": 3, "budget": "global"},
    "dst, with a penalty": {"name": "dst", "alpha": 0.02},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_take_the_same_steps_as_one(tmp_path, method):
    states = []
    for ranks in (1, 2):
        on_forks(ranks, twenty_steps, tmp_path, METHODS[method])
        states.append(torch.load(tmp_path / f"{ranks}.pt", weights_only=True))
    assert states[0].keys() == states[1].keys()
    for key, alone in states[0].items():
        torch.testing.assert_close(states[1][key], alone, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    masks = [{key: value == 0 for key, value in each.items() if key.startswith("effective.")} for each in states]
    assert masks[0]
    assert 0.1 < float(torch.cat([mask.flatten() for mask in masks[0].values()]).float().mean()) < 0.99
    assert all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0])


def twenty_steps(rank, count, folder, method):
    """Train on batches of 32 over all ranks, in two micro-batches per rank, with batch normalization frozen.

    In float64, except for the thresholds: 20 steps with ReLUs and masks make a rounding error of float32 weights larger
    than any fixed tolerance.
    """
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    ranks = Ranks(torch.device("cpu"), rank, count)
    data_section = {"name": "small_run:noise", "count": 640, "batch_size": 32, "accumulate": 2}
    recipe = Recipe.model_validate(RECIPE | {"data": data_section, "method": method})
    torch.manual_seed(5)
    data = build_data(recipe.data)
    model = build_model(recipe.model, data.model_arguments())
    train = data.training(32, 0, rank, count)
    sparsifier = sparing.sparsify_(model.double(), build_method(recipe.method), recipe.select, 20)
    optimizer = build_optimizer(recipe.optimizer, model)
    sparsifier.attach(optimizer)
    parallel = ranks.wrap(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for _, batch in zip(range(20), train, strict=False):
        optimizer.zero_grad()
        images, labels = batch
        backward(
            parallel, (images.double(), labels), recipe, ranks, torch.amp.GradScaler("cpu", enabled=False), sparsifier
        )
        optimizer.step()
    model.eval()
    if rank == 0:
        with torch.no_grad():
            effective = {f"effective.{name}": layer.effective_weight for name, layer in sparsifier.layers.items()}
        torch.save({k: v.detach() for k, v in {**model.state_dict(), **effective}.items()}, folder / f"{count}.pt")
    if count > 1:
        torch.distributed.barrier()
        os._exit(0)  # gloo may abort a rank whose peer has exited


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the rank to kill")
def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(recipe, tmp_path):
    out = tmp_path / "run"
    changes = ["--set", "schedule.epochs=12"]
    process = torchrun(2, recipe, "--out", out, "--resume", "auto", *changes, restarts=1)
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(descendants(process.pid)[1], signal.SIGKILL)
    assert "continuing after epoch" in finish(process)
    assert [json.loads(line)["epoch"] for line in (out / "history.jsonl").read_text().splitlines()] == list(
        range(1, 13)
    )
    assert json.loads((out / "metrics.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_fully_sharded_training_saves_the_same_state_as_one_process(tmp_path):
    states = []
    for ranks in (1, 2):
        on_forks(ranks, sharded_steps, tmp_path)
        states.append(torch.load(tmp_path / f"{ranks}.pt", weights_only=True))
    model = two_layers()
    sparing.sparsify_(model, sparing.STR(init=-3.0))
    model.load_state_dict(states[1])
    assert 0.05 < sparing.report(model).total.sparsity < 0.95
    for key, alone in states[0].items():
        torch.testing.assert_close(states[1][key], alone, msg=lambda m, key=key: f"{key}: {m}")


def two_layers():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def _shard(model, count):
    mesh = torch.distributed.init_device_mesh("cpu", (count,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def _check_sharded_masks_and_targets_are_refused(count):
    for method in (sparing.GMP(sparsity=0.5), sparing.RigL(sparsity=0.5), sparing.ST3(sparsity=0.5)):
        model = two_layers()
        sparsifier = sparing.sparsify_(model, method, steps=10)
        optimizer = torch.optim.SGD(_shard(model, count).parameters(), lr=0.1)
        with pytest.raises(sparing.InputError, match="masks and targets are not supported under FSDP2"):
            sparsifier.attach(optimizer)
        with pytest.raises(sparing.InputError, match="a weight with .* is sharded, and these are not"):
            sparing.report(model)
    for keeps_names in (True, False):
        model = two_layers()
        sparsifier = sparing.sparsify_(model, sparing.STR(init=-3.0))
        wrapped = FullyShardedDataParallel(model, use_orig_params=keeps_names, device_id=torch.device("cpu"))
        for run in (
            lambda model=model: sparing.report(model),
            lambda wrapped=wrapped: sparing.report(wrapped, (1, 12)),
        ):
            with pytest.raises(sparing.InputError, match=r"sharded by FullyShardedDataParallel \(FSDP1\)"):
                run()
        with pytest.raises(sparing.InputError, match=r"sharded by FullyShardedDataParallel \(FSDP1\)"):
            sparsifier.attach(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    model = two_layers()
    sparsifier = sparing.sparsify_(model, sparing.STR(sparsity=0.5), steps=10)
    optimizer = torch.optim.SGD(_shard(model, count).parameters(), lr=0.1)
    with pytest.raises(sparing.InputError, match="masks and targets are not supported under FSDP2"):
        sparsifier.attach(optimizer)
    with pytest.raises(sparing.InputError, match="the model is sharded: count its MACs before"):
        sparing.report(model, (1, 12))


def sharded_steps(rank, count, folder):
    """Train STR under FSDP2, or in one process: 110 steps, past the check for layers without weights at step 100."""
    torch.set_num_threads(1)
    model = two_layers()
    sparsifier = sparing.sparsify_(model, sparing.STR(init=-3.0))
    if count > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/sharded", rank=rank, world_size=count)
        counted = sparing.report(model).total.nonzero
        _shard(model, count)
        assert sparing.report(model).total.nonzero == counted < 256
        assert sparing.Budget.from_model(model)["0"] > 0.1
        _check_sharded_masks_and_targets_are_refused(count)
    groups = sparing.param_groups(model, weight_decay=1e-3, threshold_weight_decay=1e-2)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    torch.manual_seed(4)
    for _ in range(110):
        inputs = torch.randn(8, 12)
        labels = inputs[:, :4].argmax(dim=1)
        own = slice(8 * rank // count, 8 * (rank + 1) // count)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[own]), labels[own]).backward()
        optimizer.step()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole) if count > 1 else model.state_dict()
    if rank == 0:
        torch.save(state, folder / f"{count}.pt")
    if count > 1:
        torch.distributed.barrier()
        os._exit(0)
