"""End-to-end runs of the paper's recipes on a small set of JPEG files.

A run trains on two ranks, stops, resumes on one rank, and is evaluated and reported. A checkpoint of the 2020
release of STR is evaluated on the same images.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from small_run import on_ranks
from sparing.export.str_release import convert
from sparing.run.log import read_history
from sparing.run.recipe import load_recipe
from sparing.run.run import Run, evaluate_file
from sparing.run.training import train_run
from test_imagenet import noise_image, write_image_tree
from test_str_release import STRConv, old_resnet, save, trained

ROOT = Path(__file__).parent.parent
CLASSES = 100


pytestmark = pytest.mark.usefixtures("vision_operators")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 classes of two training images and one test image."""
    root = tmp_path_factory.mktemp("images")
    return write_image_tree(root, CLASSES, train=2, val=1, image=lambda number: noise_image(number, 72, 66))


@pytest.fixture(scope="module")
def shards(images):
    """The same images in four training and two test shards of 50."""
    for split, count in (("train", 4), ("val", 2)):
        command = [sys.executable, ROOT / "examples" / "04_write_shards.py", images / split, images / "shards" / split]
        subprocess.run([*command, str(count)], check=True, capture_output=True)
    return images / "shards"


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the subprocesses: the number of threads can change the order of sums, and results are compared exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHORT = [
    "data.size=32", "data.workers=0", "data.batch_size=40", "method.init=-4", "schedule.epochs=2",
    "schedule.warmup_epochs=0", "optimizer.lr=0.02", "tensorboard=false", "device=cpu",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_two_ranks_resumes_on_one_rank(shards, tmp_path):
    data = (
        f"data={{name: webdataset, train: '{shards}/train-*.tar', train_examples: 200, "
        f"test: '{shards}/val-*.tar', test_examples: 100, num_classes: {CLASSES}}}"
    )
    out = tmp_path / "run"
    recipe = load_recipe(ROOT / "recipes" / "imagenet" / "mobilenet_v1-str-75.28.yaml", [data, *SHORT])
    assert on_ranks(2, tmp_path, lambda rank: train_run(recipe, out, stop_after=1)) == [("", 0)] * 2
    assert [line["epoch"] for line in read_history(out)] == [1]
    metrics = train_run(recipe, out, resume=True)
    assert metrics["test_count"] == CLASSES
    assert metrics["ranks"] == 1
    assert 0.1 < metrics["sparsity"] < 1
    run = Run.open(out)
    evaluated, report = run.evaluate(weights="dense"), run.report("dense")
    assert [line["waited_seconds"] > 0 and line["skipped"] == 0 for line in read_history(out)] == [True] * 2
    assert evaluated.correct == metrics["test_correct"]
    assert evaluated.top5_accuracy == metrics["top5_accuracy"]
    assert report.total.nonzero == run.report().total.nonzero == metrics["nonzero"]
    assert report.total.weights == 3_185_088 + 1024 * CLASSES


@pytest.mark.slow
def test_a_checkpoint_of_the_2020_release_is_evaluated_on_images(images, tmp_path):
    torch.manual_seed(1)
    save(trained(old_resnet(STRConv, (2, 2, 2, 2), False, CLASSES)), tmp_path / "old.pth")
    save_file(convert(tmp_path / "old.pth", "resnet18"), tmp_path / "new.safetensors")
    overrides = ["model.name=resnet18", f"data.root={images}", "data.size=64", "data.workers=0", "device=cpu"]
    recipe = load_recipe(ROOT / "recipes" / "imagenet" / "resnet50-dense.yaml", overrides)
    result, report = evaluate_file(tmp_path / "new.safetensors", recipe)
    assert result.count == CLASSES
    assert 0.2 < report.total.sparsity < 0.9
