"""Pictures in folders and shards: exact shares, order by seed and epoch alone, damaged files, odd layouts."""

import csv
import functools
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparing import InputError, SparsityWarning
from sparing.data import DATASETS
from sparing.data.folders import InOrder
from sparing.data.pictures import MEAN, STD, allowed, decode, default_workers
from sparing.data.shards import read_shards
from sparing.train.recipe import Recipe, load_recipe
from sparing.train.run import train_run

ROOT = Path(__file__).parent.parent
CLASSES, TRAIN, VAL = 100, 4, 2

# On a machine of fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def _torchvision():
    """torchvision's wheels load their operators from CUDA libraries and refuse to be imported beside a torch
    without them. What is tested here uses none of those operators, so that declaring two of them is enough."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

        yield library  # which forgets its operators when it goes
    else:
        yield


def color(number):
    """A color that says the number, and stays apart from the others through JPEG: 12 levels a channel."""
    return tuple(20 * (number // 12**place % 12) + 10 for place in range(3))


def number(pixels):
    """The numbers of pictures of one color, from their normalized pixels (N, 3, H, W)."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (MEAN, STD))
    levels = ((pixels.cpu() * std + mean) * 255).mean(dim=(2, 3)).sub(10).div(20).round()
    return (levels @ torch.tensor([1.0, 12.0, 144.0])).int().tolist()


def noise(number, width=80, height=60):
    """A picture of which no two crops are alike."""
    small = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def plant(root, classes, train, val, picture):
    """A tree of `train` and `val` pictures of each class, numbered in the order of their paths."""
    count = 0
    for part, each in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for _ in range(each):
                picture(count).save(folder / f"{folder.name}_{count:04}.JPEG", quality=90)
                count += 1
    return root


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """100 classes of 4 + 2 pictures, each of a color of its own."""
    root = tmp_path_factory.mktemp("colors")
    return plant(root, CLASSES, TRAIN, VAL, lambda number: Image.new("RGB", (84, 76), color(number)))


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("textures"), classes=5, train=7, val=3, picture=noise)


@pytest.fixture
def small(tmp_path):
    """Two classes of 5 + 2 pictures, to be damaged."""
    picture = lambda number: Image.new("RGB", (40, 50), color(number))  # noqa: E731
    return plant(tmp_path / "tree", classes=2, train=5, val=2, picture=picture)


def imagenet(root, size=32, validation_per_class=1, workers=0, **arguments):
    return DATASETS["imagenet"](str(root), size, validation_per_class, workers, **arguments)


def passed(batches, epoch=1):
    batches.epoch = epoch
    return list(batches)


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) for one, other in zip(first, second, strict=True) for x, y in zip(one, other, strict=True)
    )


def joined(shares):
    """The batches of all ranks, from each rank's shares of them."""
    return [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in zip(*shares, strict=True)]


# Folders: what comes, and how often


def test_parts_classes_and_shapes(colors):
    data = imagenet(colors)
    assert [data.size(part) for part in ("train", "validation", "test")] == [300, 100, 200]
    assert data.num_classes == CLASSES
    assert data.classes[:2] == ("n00000000", "n00000001")
    assert data.input_size == (1, 3, 32, 32)
    assert data.model_arguments() == {"num_classes": CLASSES, "in_channels": 3}
    batches = passed(data.training(128, seed=0))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(128, 3, 32, 32)] * 2 + [(44, 3, 32, 32)]
    assert all(pixels.dtype == torch.float32 and labels.dtype == torch.int64 for pixels, labels in batches)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_training_sees_each_picture_once_an_epoch_over_all_ranks(colors, ranks):
    data = imagenet(colors)
    shares = [data.training(64, 5, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {5}
    batches = [batch for share in shares for batch in passed(share)]
    seen = {
        picture: label
        for pixels, labels in batches
        for picture, label in zip(number(pixels), labels.tolist(), strict=True)
    }
    assert sum(len(labels) for _, labels in batches) == len(seen) == 300
    assert all(picture // TRAIN == label for picture, label in seen.items())
    held_out = [picture for pixels, _ in data.evaluation("validation") for picture in number(pixels)]
    assert sorted([*seen, *held_out]) == list(range(CLASSES * TRAIN))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_sees_each_picture_once_over_all_ranks(colors, ranks, monkeypatch):
    monkeypatch.setattr("sparing.data.folders.EVALUATION_BATCH", 16)
    for part, first, each in (("test", CLASSES * TRAIN, VAL), ("validation", 0, TRAIN)):
        data = imagenet(colors)
        shares = [data.evaluation(part, rank, ranks) for rank in range(ranks)]
        batches = [list(share) for share in shares]
        assert [len(share) for share in shares] == [len(share) for share in batches]
        pairs = [
            pair
            for share in batches
            for pixels, labels in share
            for pair in zip(number(pixels), labels.tolist(), strict=True)
        ]
        assert len(pairs) == len(set(pairs)) == data.size(part)
        assert all((picture - first) // each == label for picture, label in pairs)


def test_more_ranks_than_pictures_leave_some_without_any_in_evaluation(small):
    shares = [list(imagenet(small).evaluation("validation", rank, 3)) for rank in range(3)]
    assert [sum(len(labels) for _, labels in share) for share in shares] == [1, 1, 0]
    assert list(InOrder(2, rank=2, ranks=3)) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_are_the_same_on_any_number_of_ranks(textures, ranks):
    data = imagenet(textures)
    whole = passed(data.training(8, seed=3))
    shares = [passed(data.training(8, 3, rank, ranks)) for rank in range(ranks)]
    assert equal(joined(shares), whole)


def test_a_last_batch_with_fewer_pictures_than_ranks_is_left_out(textures):
    assert len(imagenet(textures).training(29, 0, ranks=2)) == 1
    assert len(imagenet(textures).training(28, 0, ranks=2)) == 2
    assert len(imagenet(textures).training(29, 0, ranks=1)) == 2


def test_worker_processes_change_nothing(textures):
    alone, helped = (imagenet(textures, workers=workers).training(8, seed=3) for workers in (0, 2))
    epochs = [passed(alone, epoch) for epoch in (1, 2)]
    # The same workers, which must learn of each epoch, forwards and back.
    assert [equal(passed(helped, epoch), epochs[epoch - 1]) for epoch in (1, 2, 1)] == [True] * 3
    parts = [imagenet(textures, workers=workers).evaluation("test") for workers in (0, 2)]
    assert equal(*map(list, parts))


def test_epochs_and_seeds_differ_in_order_and_crops(textures):
    data = imagenet(textures)
    first, second, other = (passed(data.training(30, s), epoch)[0] for s, epoch in ((0, 1), (0, 2), (1, 1)))
    for batch in (second, other):
        assert not torch.equal(first[1], batch[1])
        assert not any(torch.equal(one, two) for one in first[0] for two in batch[0])


def test_loading_leaves_the_random_numbers_of_the_program_alone(textures):
    before = torch.get_rng_state()
    passed(imagenet(textures).training(8, 0))
    passed(imagenet(textures, workers=1).training(8, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_held_out_pictures_follow_from_their_names_alone(small):
    def held_out():
        files = imagenet(small, validation_per_class=2).parts["validation"]
        return {files.path(index) for index in range(len(files))}

    before = held_out()
    assert {Path(path).parent.name for path in before} == {"n00000000", "n00000001"}
    assert len(before) == 4
    gone = next(path for path in small.glob("train/*/*.JPEG") if str(path) not in before)
    gone.unlink()
    assert held_out() == before
    none = imagenet(small, validation_per_class=0)
    assert none.size("validation") == 0
    assert none.size("train") == 9
    assert list(none.evaluation("validation")) == []


# Pixels


def test_pixels_are_normalized_on_the_device(colors, device):
    data = imagenet(colors).to(device)
    pixels, labels = next(iter(data.evaluation("test")))
    assert pixels.device.type == labels.device.type == device.type
    stored = decode(data.parts["test"].path(0)).getpixel((40, 40))
    for channel, mean, std in zip(range(3), MEAN, STD, strict=True):
        wanted = torch.full((32, 32), (stored[channel] / 255 - mean) / std)
        assert torch.allclose(pixels[0, channel].cpu(), wanted, atol=1e-5)


def test_evaluation_takes_the_middle_of_the_picture_with_its_shorter_side_at_256_of_224(textures):
    data = imagenet(textures, size=56)
    pixels, _ = next(iter(data.evaluation("test")))
    picture = decode(data.parts["test"].path(0))
    assert picture.size == (80, 60)
    scaled = picture.resize((64 * 80 // 60, 64), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 56) / 2), (64 - 56) // 2
    middle = np.asarray(scaled.crop((left, top, left + 56, top + 56)), dtype=np.float32)
    wanted = (middle / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), wanted, atol=1e-4)


def test_training_crops_8_to_100_percent_and_flips_half(tmp_path):
    # Red grows to the right, green downwards, so that the edges of a crop can be read from it.
    x, y = np.meshgrid(np.linspace(0, 255, 100), np.linspace(0, 255, 100))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    data = imagenet(plant(tmp_path, 1, 2, 1, lambda number: ramp))
    first, second = passed(imagenet(tmp_path, validation_per_class=0).training(2, seed=0))[0][0]
    assert not torch.equal(first, second), "both pictures of an epoch are cropped alike"
    batches = data.training(1, seed=0)
    areas, flips = [], []
    for epoch in range(300):
        pixels = passed(batches, epoch)[0][0][0] * torch.tensor(STD).reshape(-1, 1, 1)
        red, green = pixels[0].mean(dim=0), pixels[1].mean(dim=1)
        # Between the middles of the first and last of 32 columns lie 31/32 of the width.
        width, height = (red[-1] - red[0]) * 32 / 31, (green[-1] - green[0]) * 32 / 31
        areas.append(float(width.abs() * height))
        flips.append(bool(width < 0))
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.06 < min(areas) < 0.15
    assert 0.9 < max(areas) < 1.1
    assert 0.45 < np.mean(areas) < 0.6  # uniform on 0.08 to 1: 0.54


def stored(kind, path):
    """A red picture, stored in another way than as an RGB JPEG."""
    red = Image.new("RGB", (40, 40), (254, 0, 0))
    if kind == "gray":
        red.convert("L").save(path, format="JPEG")
    elif kind == "CMYK":
        red.convert("CMYK").save(path, format="JPEG")
    elif kind == "PNG named JPEG":
        red.save(path, format="PNG")
    elif kind == "palette with transparency":
        red.convert("P").save(path, format="PNG", transparency=b"\x00\x80")
    elif kind == "transparent":
        red.convert("RGBA").save(path, format="PNG")


@pytest.mark.parametrize("kind", ["gray", "CMYK", "PNG named JPEG", "palette with transparency", "transparent"])
def test_every_kind_of_picture_becomes_rgb(small, kind):
    path = next(small.glob("val/n00000000/*.JPEG"))
    stored(kind, path)
    batches = imagenet(small).evaluation("test")
    pixels, labels = next(iter(batches))
    assert len(labels) == 4
    assert not batches.skipped
    rgb = (pixels[0] * torch.tensor(STD).reshape(-1, 1, 1) + torch.tensor(MEAN).reshape(-1, 1, 1)).mean(dim=(1, 2))
    wanted = [76, 76, 76] if kind == "gray" else [254, 0, 0]
    assert torch.allclose(rgb * 255, torch.tensor(wanted).float(), atol=4)


def test_the_orientation_that_a_camera_noted_is_not_applied(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 80, 60).save(path, exif=exif)
    assert decode(str(path)).size == (80, 60)


def test_a_picture_of_a_kind_that_starts_a_program_is_not_opened(tmp_path):
    path = tmp_path / "page.jpg"
    noise(0).save(path, format="EPS")
    with pytest.raises(ValueError, match="is no JPEG, PNG"):
        decode(str(path))


# Damaged files


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another kind of file": lambda content: b"not a picture at all",
    "overwritten": lambda content: content[:20] + bytes(len(content) - 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture_is_warned_of_and_the_next_one_stands_in(small, damage):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.1)
    whole = passed(data.training(10, seed=0))[0]
    path = data.parts["train"].path(3)
    Path(path).write_bytes(DAMAGES[damage](Path(path).read_bytes()))
    batches = data.training(10, seed=0)
    with pytest.warns(SparsityWarning, match=rf"{re.escape(path)} .* 1 of 1 allowed") as caught:
        pixels, labels = passed(batches)[0]
    assert len(caught) == 1
    assert list(batches.skipped) == [path]
    place = number(whole[0]).index(3)
    wanted = list(number(whole[0]))
    wanted[place] = 4
    assert number(pixels) == wanted
    assert torch.equal(labels, whole[1])
    # Warned of once, and the same with worker processes.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(passed(batches), [(pixels, labels)])
    helped = imagenet(small, validation_per_class=0, max_corrupt=0.1, workers=2).training(10, seed=0)
    with pytest.warns(SparsityWarning):
        assert equal(passed(helped), [(pixels, labels)])
    assert helped.skipped == batches.skipped


def test_too_many_damaged_pictures_stop_the_run(small):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.2)
    for index in (2, 3, 4):
        Path(data.parts["train"].path(index)).write_bytes(b"")
    with (
        pytest.warns(SparsityWarning),
        pytest.raises(InputError, match=r"3 of 10 pictures of the part 'train' .*max_corrupt=0.2 allows 2"),
    ):
        passed(data.training(10, seed=0))
    data = imagenet(small, validation_per_class=0)
    with pytest.raises(InputError, match=r"1 of 10 pictures"):
        passed(data.training(10, seed=0))


def test_neighbours_that_are_damaged_as_well_are_passed_over(small):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.2)
    for index in (9, 0):  # the last and, after it, the first
        Path(data.parts["train"].path(index)).write_bytes(b"")
    with pytest.warns(SparsityWarning):
        pixels, _ = passed(data.training(10, seed=0))[0]
    assert sorted(number(pixels)) == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8]


def test_evaluation_leaves_a_damaged_picture_out(small):
    data = imagenet(small, max_corrupt=0.25)
    path = data.parts["test"].path(1)
    Path(path).write_bytes(b"")
    batches = data.evaluation("test")
    with pytest.warns(SparsityWarning, match="1 of 1 allowed"):
        assert [number(pixels) for pixels, _ in batches] == [[10, 12, 13]]
    assert batches.skipped.keys() == {path}


def test_a_batch_of_damaged_pictures_alone_is_left_out(small, monkeypatch):
    monkeypatch.setattr("sparing.data.folders.EVALUATION_BATCH", 1)
    data = imagenet(small, max_corrupt=0.25)
    Path(data.parts["test"].path(0)).write_bytes(b"")
    with pytest.warns(SparsityWarning):
        assert [number(pixels) for pixels, _ in data.evaluation("test")] == [[11], [12], [13]]


def test_warnings_come_to_an_end(tmp_path):
    data = imagenet(plant(tmp_path, 1, 2, 20, lambda number: Image.new("RGB", (8, 8))), max_corrupt=1)
    for path in tmp_path.glob("val/*/*"):
        path.write_bytes(b"")
    batches = data.evaluation("test")
    with pytest.warns(SparsityWarning) as caught:
        assert list(batches) == []
    assert len(caught) == 10
    assert "further ones are counted" in str(caught[-1].message)
    assert len(batches.skipped) == 20


def test_the_limit_is_exact():
    assert [allowed(fraction, 100) for fraction in (0, 0.009, 0.01, 0.07, 0.29, 0.57, 1)] == [0, 0, 1, 7, 29, 57, 100]
    assert allowed(0.001, 1_281_167) == 1281


def test_waiting_is_measured(textures):
    batches = imagenet(textures).training(8, seed=0)
    passed(batches)
    assert 0 < batches.waited_seconds < 60


# Layouts


def flatten(root):
    """As the archive of ImageNet's validation part unpacks: no folders. Returns the classes by picture."""
    classes = {}
    for path in sorted(root.glob("val/*/*.JPEG")):
        classes[path.stem] = path.parent.name
        path.rename(root / "val" / path.name)
    for folder in root.glob("val/*/"):
        folder.rmdir()
    return classes


def test_an_unsorted_val_is_refused_and_the_documented_line_sorts_it(small):
    wanted = imagenet(small).parts["test"]
    classes = flatten(small)
    with pytest.raises(InputError, match=r"4 pictures outside of class folders .* 0 class folders.*LOC_val_solution"):
        imagenet(small)
    with open(small / "LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([picture, f"{name} 85 1 499 272 "] for picture, name in classes.items())
    page = (ROOT / "docs" / "imagenet.md").read_text()
    line = re.search(r"```bash\n(.*?LOC_val_solution.*?)```", page, re.DOTALL)
    subprocess.run(["bash", "-euc", line[1]], cwd=small, check=True)
    sorted_again = imagenet(small).parts["test"]
    assert list(sorted_again.names) == list(wanted.names)


def without(part):
    def spoil(root):
        (root / part).rename(root / "elsewhere")

    return spoil


def clear(root):
    for path in root.glob("train/n00000001/*"):
        path.rename(path.with_suffix(".npy"))


def one_loose(root):
    path = next(root.glob("train/n00000001/*"))
    path.rename(root / "train" / path.name)


LAYOUTS = {
    "no train": (without("train"), "has no directory train/; it holds elsewhere/, val/"),
    "no val": (without("val"), "has no directory val/; it holds elsewhere/, train/"),
    "a class without pictures": (clear, "no picture in 1 classes of .*train: n00000001$"),
    "a class only in train": (
        lambda root: (root / "val" / "n00000001").rename(root / "n1"),
        "1 classes of .*train/ are not in val/ (n00000001)",
    ),
    "a class only in val": (
        lambda root: (root / "train" / "n00000001").rename(root / "n1"),
        "1 classes of .*val/ are not in train/ (n00000001)",
    ),
    "some pictures not sorted": (one_loose, "train has 1 pictures outside of class folders"),
    "an empty train": (
        lambda root: ((root / "train").rename(root / "old"), (root / "train").mkdir()),
        "train has no class folders; it is empty",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_refused_in_words(small, layout):
    spoil, message = LAYOUTS[layout]
    spoil(small)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        imagenet(small)


def test_a_folder_that_may_not_be_read_is_named(small, monkeypatch):
    folder = small / "train" / "n00000001"
    for path in folder.iterdir():
        path.unlink()
    # A test may run as a user who may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    with pytest.raises(InputError, match="no picture in 1 classes .*no permission to read n00000001"):
        imagenet(small)

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="train cannot be read .Permission denied."):
        imagenet(small)


def test_hidden_and_foreign_files_are_no_pictures(small):
    (small / "train" / ".ipynb_checkpoints").mkdir()
    (small / "train" / "README.txt").write_text("no picture")
    (small / "train" / "n00000000" / "._n00000000_0000.JPEG").write_bytes(b"left behind by a copy")
    (small / "train" / "n00000000" / "n00000000_0000.JPEG.part").write_bytes(b"half a download")
    assert imagenet(small, validation_per_class=0).size("train") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a whole number, 1 or more, got 0"),
        ({"size": 32.5}, "size must be a whole number"),
        ({"workers": -1}, "workers must be a whole number, 0 or more, got -1"),
        ({"max_corrupt": 2}, "max_corrupt must be a fraction from 0 to 1, got 2"),
        ({"max_corrupt": True}, "max_corrupt must be a fraction"),
        ({"validation_per_class": -1}, "validation_per_class must be a whole number, 0 or more"),
        ({"validation_per_class": 5}, "class n00000000 has 5 pictures in train/; validation_per_class=5 would leave"),
    ],
)
def test_arguments_out_of_range_are_refused(small, arguments, message):
    with pytest.raises(InputError, match=message):
        imagenet(small, **arguments)


def test_a_root_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a directory; it must hold train/ and val/"):
        imagenet(tmp_path / "nowhere")


def test_workers_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    found = []
    for ranks in ("1", "2", "8", "100"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(default_workers())
    assert found == [16, 12, 3, 1]


TORCHVISION = """
import sparing
from sparing.data import DATASETS
import sys
import tarfile
import threading
try:
    import torchvision
except RuntimeError:
    pass
else:
    sys.exit(77)
try:
    DATASETS["imagenet"](sys.argv[1])
except sparing.InputError as error:
    print(error)
"""


def test_a_torchvision_of_another_build_is_an_error_in_words(small):
    done = subprocess.run([sys.executable, "-c", TORCHVISION, str(small)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this torchvision loads")
    assert "was not built for torch" in done.stdout
    assert "pytorch.org" in done.stdout


@pytest.mark.parametrize(("package", "name"), [("torchvision", "imagenet"), ("webdataset", "webdataset")])
def test_a_package_that_is_missing_is_named(small, monkeypatch, package, name):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = {"imagenet": [str(small)], "webdataset": ["a.tar", "b.tar", 1, 1, 1]}[name]
    with pytest.raises(InputError, match=rf"{name} needs {package} .*pip install 'sparing\[imagenet\]'"):
        DATASETS[name](*arguments)


# Shards


def pack(path, pictures, ending="JPEG"):
    """A tar file of (key, picture or bytes, label), in that order."""
    with tarfile.open(path, "w") as tar:
        for key, picture, label in pictures:
            content = io.BytesIO()
            if isinstance(picture, bytes):
                content.write(picture)
            else:
                picture.save(content, format="JPEG", quality=90)
            for name, data in ((f"{key}.{ending}", content.getvalue()), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def of_color(first, count):
    return [(f"{n:05}", Image.new("RGB", (40, 50), color(n)), n // 10) for n in range(first, first + count)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """12 shards of 10 pictures to train on, 3 to validate, 5 of 7 to test."""
    root = tmp_path_factory.mktemp("shards")
    for index in range(15):
        pack(root / f"train-{index:03}.tar", of_color(10 * index, 10))
    for index in range(5):
        pack(root / f"val-{index}.tar", of_color(200 + 7 * index, 7))
    return root


def webdataset(root, size=32, workers=0, **changes):
    arguments = {
        "train": f"{root}/train-{{000..011}}.tar", "train_examples": 120,
        "validation": [f"{root}/train-012.tar", f"{root}/train-01[34].tar"], "validation_examples": 30,
        "test": f"{root}/val-*.tar", "test_examples": 35, "num_classes": 24,
    }  # fmt: skip
    return DATASETS["webdataset"](size=size, workers=workers, **arguments | changes)


def numbers(batches):
    return [n for pixels, _ in batches for n in number(pixels)]


def test_shards_have_parts_classes_and_shapes(shards):
    data = webdataset(shards)
    assert [data.size(part) for part in ("train", "validation", "test")] == [120, 30, 35]
    assert data.input_size == (1, 3, 32, 32)
    assert data.model_arguments() == {"num_classes": 24, "in_channels": 3}
    batches = data.training(50, seed=0)
    assert len(batches) == 3
    assert [tuple(pixels.shape) for pixels, _ in passed(batches)] == [(50, 3, 32, 32)] * 2 + [(20, 3, 32, 32)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_equal_shards_give_each_picture_once_an_epoch(shards, ranks, workers):
    # 12 shards divide by ranks × workers, and a step's 12 pictures by ranks.
    data = webdataset(shards, workers=workers)
    shares = [passed(data.training(12, 0, rank, ranks)) for rank in range(ranks)]
    assert [len(share) for share in shares] == [10] * ranks
    assert {len(labels) for share in shares for _, labels in share} == {12 // ranks}
    assert sorted(n for share in shares for n in numbers(share)) == list(range(120))
    assert all(torch.equal(labels, torch.tensor(number(pixels)) // 10) for share in shares for pixels, labels in share)


def test_workers_beyond_the_shards_of_a_rank_are_not_started(shards):
    data = webdataset(shards, train=f"{shards}/train-{{000..002}}.tar", train_examples=30, workers=5)
    assert sorted(numbers(passed(data.training(10, 0)))) == list(range(30))


def test_unequal_shards_fill_every_batch_of_every_rank(shards):
    # 3 shards for one rank and 2 for the other.
    data = webdataset(shards, train=f"{shards}/train-{{000..004}}.tar", train_examples=50)
    shares = [passed(data.training(15, 0, rank, 2)) for rank in range(2)]
    assert [[len(labels) for _, labels in share] for share in shares] == [[8, 8, 8, 3], [7, 7, 7, 2]]
    # The one with fewer shards begins them again, but not before it has seen them through.
    seen = [set(numbers(share)) for share in shares]
    assert not seen[0] & seen[1]
    assert list(map(len, seen)) == [27, 20]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_in_an_order_of_seed_and_epoch(shards, workers):
    def order(seed, epoch, **changes):
        return numbers(passed(webdataset(shards, workers=workers, **changes).training(30, seed), epoch))

    mixed = order(0, 1)
    assert order(0, 1) == mixed
    # Without a buffer whole shards are shuffled; with one, their pictures as well.
    unmixed, *others = (order(*each, shuffle=0) for each in ((0, 1), (0, 2), (1, 1)))
    assert unmixed[:10] == list(range(unmixed[0], unmixed[0] + 10))
    assert unmixed not in others
    assert sorted(mixed[:10]) != mixed[:10]


def test_workers_that_live_on_learn_of_the_epoch(shards):
    batches = webdataset(shards, workers=2).training(30, 0)
    epochs = [numbers(passed(batches, epoch)) for epoch in (1, 2, 1)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_the_crop_of_a_picture_follows_from_seed_and_epoch_alone(shards, tmp_path):
    for index in range(2):
        pack(tmp_path / f"{index}.tar", [(f"{n}", noise(n), n) for n in (2 * index, 2 * index + 1)])

    def crops(ranks, workers):
        data = webdataset(shards, train=f"{tmp_path}/{{0,1}}.tar", train_examples=4, workers=workers)
        shares = [passed(data.training(2, 0, rank, ranks)) for rank in range(ranks)]
        return {int(label): crop for share in shares for batch in share for crop, label in zip(*batch, strict=True)}

    alone = crops(ranks=1, workers=0)
    assert alone.keys() == {0, 1, 2, 3}
    for other in (crops(ranks=2, workers=0), crops(ranks=1, workers=2)):
        assert all(torch.equal(alone[label], crop) for label, crop in other.items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_evaluation_of_shards_sees_each_picture_once(shards, ranks, workers, monkeypatch):
    monkeypatch.setattr("sparing.data.shards.EVALUATION_BATCH", 4)
    data = webdataset(shards, workers=workers)
    for part, wanted in (("test", range(200, 235)), ("validation", range(120, 150))):
        assert sorted(n for rank in range(ranks) for n in numbers(data.evaluation(part, rank, ranks))) == list(wanted)


def test_in_a_shard_the_next_picture_stands_in_for_a_damaged_one(shards, tmp_path):
    pictures = of_color(0, 10)
    pictures[3] = ("00003", b"not a picture", 0)
    pack(tmp_path / "train.tar", pictures)
    data = webdataset(shards, train=f"{tmp_path}/train.tar", train_examples=10, max_corrupt=0.1, shuffle=0)
    batches = data.training(5, 0)
    with pytest.warns(SparsityWarning, match=r"train.tar: 00003 \(is no JPEG.* 1 of 1 allowed"):
        assert numbers(passed(batches)) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 0]
    batches = webdataset(shards, test=f"{tmp_path}/train.tar", test_examples=10, max_corrupt=0.1).evaluation("test")
    with pytest.warns(SparsityWarning):
        assert numbers(batches) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match="1 of 10 pictures of the part 'train'.*max_corrupt=0.001 allows 0"):
        passed(webdataset(shards, train=f"{tmp_path}/train.tar", train_examples=10).training(5, 0))


def test_examples_without_a_label_or_a_picture_are_unreadable(shards, tmp_path):
    pack(tmp_path / "txt.tar", of_color(0, 2), ending="txt")
    with pytest.raises(InputError, match=r"txt.tar: 0000. \(none of .jpg, .jpeg, .png, .webp\)"):
        passed(webdataset(shards, train=f"{tmp_path}/txt.tar", train_examples=2).training(2, 0))
    with tarfile.open(tmp_path / "alone.tar", "w") as tar:
        noise(0).save(tmp_path / "0.jpg")
        tar.add(tmp_path / "0.jpg", "0.jpg")
    with pytest.raises(InputError, match=r"alone.tar: 0 \(no .cls\)"):
        list(webdataset(shards, test=f"{tmp_path}/alone.tar", test_examples=1).evaluation("test"))


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_count_from_one_are_refused(shards, tmp_path, workers):
    pack(tmp_path / "one.tar", [(str(n), noise(n), n + 1) for n in range(24)])
    data = webdataset(shards, train=f"{tmp_path}/one.tar", train_examples=24, workers=workers)
    message = r"^data webdataset: .*one.tar: 23 has label 24; with num_classes=24 the last is 23$"
    with pytest.raises(InputError, match=message):
        passed(data.training(24, 0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut in a picture", "empty", "no tar", "gone"])
def test_a_damaged_shard_stops_the_run_in_words(shards, tmp_path, damage, workers):
    path = tmp_path / "train.tar"
    pack(path, of_color(0, 10))
    data = webdataset(shards, train=str(path), train_examples=10, workers=workers)
    whole = path.read_bytes()
    damages = {"cut in a picture": whole[: 4 * 1024 + 700], "empty": b"", "no tar": b"no tar " * 1000}
    path.unlink() if damage == "gone" else path.write_bytes(damages[damage])
    with pytest.raises(
        InputError, match=rf"^data webdataset: shard {re.escape(str(path))} cannot be read \([^\n]*\)$"
    ) as raised:
        passed(data.training(10, 0))
    assert (damage == "gone") == ("No such file" in str(raised.value))


def test_a_shard_without_examples_is_refused_and_not_read_forever(shards, tmp_path):
    pack(tmp_path / "none.tar", [])
    with pytest.raises(InputError, match="no examples in .*none.tar"):
        passed(webdataset(shards, train=f"{tmp_path}/none.tar", train_examples=10).training(5, 0))


def test_shards_written_from_folders_hold_the_same_pictures_and_labels(textures, tmp_path):
    script = ROOT / "examples" / "write_shards.py"
    command = [sys.executable, str(script), str(textures / "train"), str(tmp_path / "train"), "3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    names = [f"{tmp_path}/train-000{number}.tar" for number in range(3)]
    assert printed == [
        *(f"{n}: {c}" for n, c in zip(names, (12, 12, 11), strict=True)),
        "35 pictures of 5 classes in 3 shards",
    ]
    assert sorted(map(str, tmp_path.iterdir())) == names
    tars = DATASETS["webdataset"](names[:2], names[2], 24, 11, 5, size=32, workers=0)
    folders = imagenet(textures, validation_per_class=0).parts["train"]
    wanted = {(label, str(decode(folders.path(i)).tobytes())) for i, label in enumerate(folders.labels)}
    found = {(int(s["cls"]), str(decode(io.BytesIO(s["jpeg"])).tobytes())) for s in read_shards(names)}
    assert found == wanted
    assert tars.size("test") == sum(len(labels) for _, labels in tars.evaluation("test"))
    keys = [sample["__key__"] for sample in read_shards(names)]
    assert sorted(keys) != keys


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_behind_a_web_server(shards, workers):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        data = webdataset(shards, train=f"{address}/train-{{000..001}}.tar", train_examples=20, workers=workers)
        assert sorted(numbers(passed(data.training(5, 0)))) == list(range(20))
        # An epoch may end in the middle of a shard, and a connection with it.
        assert len(passed(webdataset(shards, train=f"{address}/train-000.tar", train_examples=5).training(5, 0))) == 1
        data = webdataset(shards, train=f"{address}/nowhere.tar", train_examples=20, workers=workers)
        with pytest.raises(
            InputError, match=rf"^data webdataset: shard {address}/nowhere.tar cannot be read \([^/]*\)$"
        ):
            passed(data.training(5, 0))
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": "pipe:cat a.tar"}, "train shard 'pipe:cat a.tar': choose from paths, http: and https:"),
        ({"train": "s3://bucket/a.tar"}, "choose from paths, http: and https:"),
        ({"test": "{root}/nothing-*.tar"}, "test shard .*/nothing-\\*.tar is not there"),
        ({"test": "{root}/val-{{3..7}}.tar"}, "test shard .*/val-5.tar is not there"),
        ({"test": "{root}/val-{{3..7.tar"}, "is not there|cannot be expanded"),
        ({"validation": "{root}/train-011.tar"}, "train-011.tar is in train and in validation; the parts must differ"),
        ({"validation": "{root}/val-0.tar"}, "val-0.tar is in validation and in test; the parts must differ"),
        ({"validation": None}, "validation and validation_examples must be given together"),
        ({"train_examples": 0}, "train_examples must be a whole number, 1 or more, got 0"),
        ({"num_classes": 0}, "num_classes must be a whole number, 1 or more, got 0"),
        ({"shuffle": -1}, "shuffle must be a whole number, 0 or more, got -1"),
        ({"size": "224"}, "size must be a whole number, 1 or more, got '224'"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(shards, arguments, message):
    given = {k: v.format(root=shards) if isinstance(v, str) and k != "size" else v for k, v in arguments.items()}
    with pytest.raises(InputError, match=message):
        webdataset(shards, **given)


def test_fewer_shards_than_ranks_are_refused(shards):
    with pytest.raises(InputError, match="13 ranks need as many shards to train on; there are 12"):
        webdataset(shards).training(26, 0, rank=0, ranks=13)


# Training


@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_a_recipe_trains(colors, shards, tmp_path, layout):
    folders = {"name": "imagenet", "root": str(colors), "validation_per_class": 1}
    tars = {
        "name": "webdataset", "num_classes": 24,
        "train": f"{shards}/train-{{000..011}}.tar", "train_examples": 120,
        "validation": f"{shards}/train-{{012..014}}.tar", "validation_examples": 30,
        "test": f"{shards}/val-*.tar", "test_examples": 35,
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "model": {"name": "resnet8", "width": 2},
            "data": {"size": 16, "workers": 0, "batch_size": 100} | {"folders": folders, "shards": tars}[layout],
            "method": {"name": "str", "init": -4.0},
            "schedule": {"epochs": 1},
            "tensorboard": False,
        }
    )
    metrics = train_run(recipe, tmp_path / "run")
    assert metrics["test_count"] == {"folders": CLASSES * VAL, "shards": 35}[layout]
    assert metrics["weights"] > 0


def test_the_checking_recipe_goes_through_folders_and_on_elsewhere(textures, tmp_path):
    def go(root, workers, **how):
        changes = {
            "model.name": "resnet8", "data.root": root, "data.workers": workers, "data.validation_per_class": 1,
            "schedule.epochs": 2, "device": "cpu",
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in changes.items()]
        recipe = load_recipe(ROOT / "recipes" / "imagenet" / "check-folders.yaml", overrides)
        return train_run(recipe, tmp_path / "run", **how)

    assert go(textures, 0, stop_after=1) is None
    shutil.copytree(textures, tmp_path / "copy")
    assert go(tmp_path / "copy", 1, resume=True)["test_count"] == 15
