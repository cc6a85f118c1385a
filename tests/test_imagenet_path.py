"""End-to-end runs of the paper's recipes on a small set of JPEG files.

A run trains on two ranks, stops, resumes on one rank, and is evaluated and reported. A checkpoint of the 2020
release of STR is evaluated on the same images.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparing.cli import app
from sparing.export.str_release import convert
from sparing.run.log import read_history
from sparing.run.recipe import load_recipe
from sparing.run.run import Run, evaluate_file
from test_imagenet import noise_image, write_image_tree
from test_str_release import STRConv, old_resnet, save, trained

ROOT = Path(__file__).parent.parent
CLASSES = 100

# The command `sparing`, after declaring the operators that a CUDA build of torchvision needs with a CPU torch.
PROGRAM = """
import torch
from sparing.cli import main
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
main()
"""


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


def sparing(*arguments, ranks=1):
    if ranks == 1:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command = [*launcher, "--no-python", sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changes(**values):
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


SHORT = {
    "data__size": 32, "data__workers": 0, "data__batch_size": 40, "method__init": -4, "schedule__epochs": 2,
    "schedule__warmup_epochs": 0, "optimizer__lr": 0.02, "tensorboard": "false", "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_a_run_on_two_ranks_resumes_on_one_rank(images, tmp_path, layout, request):
    if layout == "folders":
        recipe, more, test = "resnet50-str-90.23", {"data__root": images}, CLASSES
    else:
        shards = request.getfixturevalue("shards")
        data = (
            f"{{name: webdataset, train: '{shards}/train-*.tar', train_examples: 200, "
            f"test: '{shards}/val-*.tar', test_examples: 100, num_classes: {CLASSES}}}"
        )
        recipe, more, test = "mobilenet_v1-str-75.28", {"data": data}, CLASSES
    options = [ROOT / "recipes" / "imagenet" / f"{recipe}.yaml", *changes(**more, **SHORT), "--out", tmp_path / "run"]
    output = sparing("train", *options, "--stop-after", 1, ranks=2)
    assert output.count("stopped early") == 1
    metrics = json.loads(sparing("train", *options, "--resume", "auto", "--json"))
    assert metrics["test_count"] == test
    assert metrics["ranks"] == 1
    assert 0.1 < metrics["sparsity"] < 1
    run = Run.open(tmp_path / "run")
    evaluated, report = run.evaluate(weights="dense"), run.report("dense")
    assert [line["waited_seconds"] > 0 and line["skipped"] == 0 for line in read_history(tmp_path / "run")] == [
        True
    ] * 2
    assert evaluated.correct == metrics["test_correct"]
    assert evaluated.top5_accuracy == metrics["top5_accuracy"]
    assert report.total.nonzero == run.report().total.nonzero == metrics["nonzero"]
    classifier = 2048 * CLASSES if layout == "folders" else 1024 * CLASSES
    assert report.total.weights == {"folders": 23_454_912, "shards": 3_185_088}[layout] + classifier


def test_a_checkpoint_of_the_2020_release_is_evaluated_on_images(images, tmp_path):
    torch.manual_seed(1)
    save(trained(old_resnet(STRConv, (2, 2, 2, 2), False, CLASSES)), tmp_path / "old.pth")
    save_file(convert(tmp_path / "old.pth", "resnet18"), tmp_path / "new.safetensors")
    overrides = ["model.name=resnet18", f"data.root={images}", "data.size=64", "data.workers=0", "device=cpu"]
    recipe = load_recipe(ROOT / "recipes" / "imagenet" / "resnet50-dense.yaml", overrides)
    result, report = evaluate_file(tmp_path / "new.safetensors", recipe)
    assert result.count == CLASSES
    assert 0.2 < report.total.sparsity < 0.9
