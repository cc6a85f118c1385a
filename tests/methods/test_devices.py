"""Every method on every device, in mixed precision, channels last and from CUDA graphs."""

import contextlib

import pytest
import torch
from harness import SETTINGS, STEPS, batch, build, make, ready_for
from torch.nn import functional as F

import sparing

pytestmark = pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
every_method = pytest.mark.parametrize("name", SETTINGS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceRun:
    """A model on a device, its optimizer, and a scaler in fp16."""

    def __init__(self, name, device, precision, steps=STEPS):
        self.model, self.shape = build("conv2d")
        self.model.to(device, memory_format=torch.channels_last)
        method = make(name)
        self.sparsifier = sparing.sparsify_(ready_for(method, self.model), method, steps=steps)
        groups = sparing.param_groups(self.model, weight_decay=1e-2)
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=device.type == "cuda")
        self.sparsifier.attach(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.device, self.dtype = device, PRECISIONS[precision]

    def batch(self, step):
        x, y = batch(self.shape, step)
        return x.to(self.device), y.to(self.device)

    def step(self, x, y, broken=False):
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            loss = F.cross_entropy(self.model(x).float(), y)
        loss = loss + self.sparsifier.penalty()
        self.scaler.scale(loss * torch.inf if broken else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@every_method
@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_in_mixed_precision_to_its_target(name, precision, device):
    run = DeviceRun(name, device, precision)
    if precision == "fp16":
        run.step(*run.batch(0), broken=True)  # the scaler skips it
        assert run.sparsifier.step == 0
    for step in range(STEPS):
        run.step(*run.batch(step))
    assert run.sparsifier.step == STEPS
    for key, value in run.model.state_dict().items():
        assert torch.isfinite(value).all(), key
        assert value.device.type == device.type or value.dtype == torch.uint8, key
    report = sparing.report(run.model)
    if make(name).describe().get("sparsity") is not None:
        assert report.total.sparsity == pytest.approx(0.75, abs=0.01)
    sparing.densify_(run.model)
    assert sparing.report(run.model).total.nonzero == report.total.nonzero


@needs_cuda
@every_method
def test_an_ordinary_step_does_not_wait_for_the_gpu(name):
    run = DeviceRun(name, torch.device("cuda"), "bf16", steps=1000)
    batches = [run.batch(step) for step in range(3)]
    run.step(*batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.sparsifier.clock.step = 401  # nothing is due
        run.step(*batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("name", ["str_sparsity", "feather", "rigl", "acdc", "gmp"])
def test_a_cuda_graph_stays_valid_while_masks_and_thresholds_change(name):
    eager, run = (DeviceRun(name, torch.device("cuda"), "float32") for _ in range(2))
    run.model.load_state_dict(eager.model.state_dict())  # the same random masks
    x, y = run.batch(0)
    state = {key: value.clone() for key, value in run.model.state_dict().items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            F.cross_entropy(run.model(x), y).backward()
    torch.cuda.synchronize()
    run.model.load_state_dict(state)  # the warm-up has changed the running statistics
    run.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(run.model(x), y).backward()
    for step in range(STEPS):
        batch_x, batch_y = run.batch(step)
        eager.step(batch_x, batch_y)
        x.copy_(batch_x)
        y.copy_(batch_y)
        graph.replay()
        run.optimizer.step()
    for (key, ours), theirs in zip(run.model.state_dict().items(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)
