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
