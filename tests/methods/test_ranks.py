"""Data-parallel training: ranks of different seeds and data hold the same masks and weights after each step."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import SETTINGS, STEPS, batch, make
from torch import nn
from torch.nn import functional as F

import sparing

RANKS = 2


@pytest.mark.slow
def test_ranks_agree_on_every_mask_and_weight_after_every_step(tmp_path):
    torch.multiprocessing.spawn(train_all, args=(f"file://{tmp_path}/meeting",), nprocs=RANKS)


def train_all(rank, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), rank=rank, world_size=RANKS)
    for name in SETTINGS:
        train(name, rank)
    prune_by_grasp(rank)
    # gloo may abort a rank whose peer is gone, or whose wrappers outlive their group. So the ranks wait for
    # each other outside of gloo, and exit without destroying the group.
    done = [Path(f"{meeting.removeprefix('file://')}.{each}") for each in range(RANKS)]
    done[rank].touch()
    for _ in range(3000):
        if all(path.exists() for path in done):
            os._exit(0)
        time.sleep(0.01)
    os._exit(1)


def train(name, rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    sparsifier = sparing.sparsify_(model, make(name), steps=STEPS)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-2), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    start = held(model)
    for step in range(STEPS):
        x, y = batch((16,), RANKS * step + rank)
        optimizer.zero_grad()
        (F.cross_entropy(parallel(x), y) + sparsifier.penalty()).backward()
        optimizer.step()
        agree(name, step, held(model))
    assert not torch.equal(start, held(model)), f"{name} has not trained"


def prune_by_grasp(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    method = make("grasp")
    x, y = batch((16,), rank)
    method.prune(sparing.sparsify_(model, method), lambda: F.cross_entropy(model(x), y))
    agree("grasp", 0, held(model))


def held(model):
    """Return the state of a model in one vector: parameters, masks, other buffers and the step count."""
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


def agree(name, step, own):
    everyone = [torch.empty_like(own) for _ in range(RANKS)]
    dist.all_gather(everyone, own)
    assert torch.equal(everyone[0], everyone[1]), f"{name}: the ranks differ after step {step}"
