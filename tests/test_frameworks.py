"""Averages by the real packages. They are not dependencies: install timm and lightning to run these tests."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import GMP, RigL

METHODS = {
    "gmp": GMP(sparsity=0.9, begin=0, end=0.8, every=1),
    "rigl": RigL(sparsity=0.8, budget="uniform", every=2, end=0.9),
}
pytestmark = [pytest.mark.parametrize("name", METHODS), pytest.mark.filterwarnings("ignore")]


def build(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    return model, sparing.sparsify_(model, METHODS[name], steps=20)


def masks(model):
    return {name: layer.parametrization.mask.clone() for name, layer in sparing.sparse_layers(model).items()}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.fixture
def ema(vision_operators):
    return pytest.importorskip("timm.utils.model_ema", reason="timm is not installed")


@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timm_averages_have_the_masks_of_the_model(name, kind, ema):
    model, sparsifier = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    average = getattr(ema, kind)(model, decay=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()
        average.update(model)
    assert same(masks(average.ema if kind == "ModelEma" else average.module), masks(model))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_lightning_averages_have_the_masks_of_the_model(name, use_buffers, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    validated = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.sparsifier = build(name)

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *args):
            self.trained = masks(self.model)

        def validation_step(self, batch, index):
            if self.global_step:
                validated.append(same(masks(self.model), self.trained))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.sparsifier.attach(optimizer)
            return optimizer

    data = torch.utils.data.TensorDataset(torch.randn(80, 10), torch.randint(0, 5, (80,)))
    loaders = (torch.utils.data.DataLoader(data, batch_size=size) for size in (8, 80))
    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[callbacks.EMAWeightAveraging(use_buffers=use_buffers)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, *loaders)
    assert module.sparsifier.step == 20
    assert validated == [True, True]
    assert same(masks(module.model), module.trained)
