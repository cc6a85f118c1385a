import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no counterexample.
settings.register_profile("sparing", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sparing")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Let Ctrl-C interrupt as usual: a shell starts background jobs with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def vision_operators():
    """Make a CUDA build of torchvision importable with a CPU build of torch.

    Its operators need CUDA libraries. The tests use none of them, so declaring two is enough for the import.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # pytest keeps it: the operators are removed when it is deleted.
