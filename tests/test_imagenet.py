"""Image data sets in folders: shares of the ranks, order, pixels, damaged files, wrong layouts."""

import csv
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparing import InputError, SparsityWarning
from sparing.data import DATASETS
from sparing.data.pictures import MEAN, STD, decode, default_workers, max_unreadable
from sparing.run.recipe import load_recipe
from sparing.run.training import train_run
from tolerance import tolerance

ROOT = Path(__file__).parent.parent
CLASSES, TRAIN, VAL = 100, 4, 2

# Raised on a machine with fewer cores than the workers of a test.
pytestmark = [
    pytest.mark.usefixtures("vision_operators"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def number_to_color(number):
    """Encode a number as a color: 12 levels per channel, which stay distinct after JPEG compression."""
    return tuple(20 * (number // 12**place % 12) + 10 for place in range(3))


def color_numbers(pixels):
    """Decode the numbers of uniform images from their normalized pixels (N, 3, H, W)."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (MEAN, STD))
    levels = ((pixels.cpu() * std + mean) * 255).mean(dim=(2, 3)).sub(10).div(20).round()
    return (levels @ torch.tensor([1.0, 12.0, 144.0])).int().tolist()


def noise_image(number, width=80, height=60):
    """Return an image of which no two crops are equal."""
    small = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_image_tree(root, classes, train, val, image):
    """Write `train` and `val` images per class, made by `image(number)`; numbers are in the order of the paths."""
    count = 0
    for split, per_class in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for _ in range(per_class):
                image(count).save(folder / f"{folder.name}_{count:04}.JPEG", quality=90)
                count += 1
    return root


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """100 classes of 4 + 2 uniform images, each with its own color."""
    root = tmp_path_factory.mktemp("colors")
    return write_image_tree(
        root, CLASSES, TRAIN, VAL, lambda number: Image.new("RGB", (84, 76), number_to_color(number))
    )


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("textures"), classes=5, train=7, val=3, image=noise_image)


@pytest.fixture
def small(tmp_path):
    """Two classes of 5 + 2 uniform images, which a test can damage."""
    image = lambda number: Image.new("RGB", (40, 50), number_to_color(number))  # noqa: E731
    return write_image_tree(tmp_path / "tree", classes=2, train=5, val=2, image=image)


def imagenet(root, size=32, validation_per_class=1, workers=0, **arguments):
    return DATASETS["imagenet"](str(root), size, validation_per_class, workers, **arguments)


def one_pass(batches, epoch=1):
    batches.epoch = epoch
    return list(batches)


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) for one, other in zip(first, second, strict=True) for x, y in zip(one, other, strict=True)
    )


def concatenated(shares):
    """Concatenate the shares of all ranks to global batches."""
    return [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in zip(*shares, strict=True)]


# Folders


def test_splits_classes_and_shapes(colors):
    data = imagenet(colors)
    assert [data.size(split) for split in ("train", "validation", "test")] == [300, 100, 200]
    assert data.num_classes == CLASSES
    assert data.classes[:2] == ("n00000000", "n00000001")
    assert data.input_size == (1, 3, 32, 32)
    assert data.model_arguments() == {"num_classes": CLASSES, "in_channels": 3}
    batches = one_pass(data.training(128, seed=0))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(128, 3, 32, 32)] * 2 + [(44, 3, 32, 32)]
    assert all(pixels.dtype == torch.float32 and labels.dtype == torch.int64 for pixels, labels in batches)


def test_an_image_folder_may_have_a_test_split_of_its_own(small):
    def load(**arguments):
        return DATASETS["image_folder"](str(small), size=32, workers=0, **arguments)

    def sizes(data):
        return [data.size(split) for split in ("train", "validation", "test")]

    assert sizes(load(validation_per_class=2)) == [6, 4, 4]  # held out of train, and val
    shutil.copytree(small / "val", small / "test")
    next((small / "test").rglob("*.JPEG")).unlink()
    assert sizes(load()) == [10, 4, 3]
    assert sizes(imagenet(small)) == [8, 2, 4]  # the images in test/ of ImageNet have no labels
    shutil.rmtree(next(path for path in (small / "test").iterdir()))
    with pytest.raises(InputError, match="1 classes of .*/train/ are not in test/"):
        load()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_training_yields_each_image_once_per_epoch_over_all_ranks(colors, ranks):
    data = imagenet(colors)
    shares = [data.training(64, 5, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {5}
    batches = [batch for share in shares for batch in one_pass(share)]
    seen = {
        image: label
        for pixels, labels in batches
        for image, label in zip(color_numbers(pixels), labels.tolist(), strict=True)
    }
    assert sum(len(labels) for _, labels in batches) == len(seen) == 300
    assert all(image // TRAIN == label for image, label in seen.items())
    held_out = [image for pixels, _ in data.evaluation("validation") for image in color_numbers(pixels)]
    assert sorted([*seen, *held_out]) == list(range(CLASSES * TRAIN))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_yields_each_image_once_over_all_ranks(colors, ranks, monkeypatch):
    monkeypatch.setattr("sparing.data.pictures.EVALUATION_BATCH", 16)
    for split, first, per_class in (("test", CLASSES * TRAIN, VAL), ("validation", 0, TRAIN)):
        data = imagenet(colors)
        shares = [data.evaluation(split, rank, ranks) for rank in range(ranks)]
        batches = [list(share) for share in shares]
        assert [len(share) for share in shares] == [len(share) for share in batches]
        pairs = [
            pair
            for share in batches
            for pixels, labels in share
            for pair in zip(color_numbers(pixels), labels.tolist(), strict=True)
        ]
        assert len(pairs) == len(set(pairs)) == data.size(split)
        assert all((image - first) // per_class == label for image, label in pairs)


def test_evaluation_with_more_ranks_than_images_gives_some_ranks_no_batches(small):
    shares = [list(imagenet(small).evaluation("validation", rank, 3)) for rank in range(3)]
    assert [sum(len(labels) for _, labels in share) for share in shares] == [1, 1, 0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_do_not_depend_on_the_number_of_ranks(textures, ranks):
    data = imagenet(textures)
    whole = one_pass(data.training(8, seed=3))
    shares = [one_pass(data.training(8, 3, rank, ranks)) for rank in range(ranks)]
    assert equal(concatenated(shares), whole)


def test_a_last_batch_with_fewer_images_than_ranks_is_dropped(textures):
    assert len(imagenet(textures).training(29, 0, ranks=2)) == 1
    assert len(imagenet(textures).training(28, 0, ranks=2)) == 2
    assert len(imagenet(textures).training(29, 0, ranks=1)) == 2


def test_batches_do_not_depend_on_the_number_of_workers(textures):
    without, with_workers = (imagenet(textures, workers=workers).training(8, seed=3) for workers in (0, 2))
    epochs = [one_pass(without, epoch) for epoch in (1, 2)]
    # Persistent workers must use the epoch that is set before each pass.
    assert [equal(one_pass(with_workers, epoch), epochs[epoch - 1]) for epoch in (1, 2, 1)] == [True] * 3
    evaluations = [imagenet(textures, workers=workers).evaluation("test") for workers in (0, 2)]
    assert equal(*map(list, evaluations))


def test_a_pass_begins_at_any_batch_with_the_same_batches(textures):
    batches = imagenet(textures).training(4, seed=1)
    whole = one_pass(batches, 2)
    batches.start = len(batches) - 2
    assert equal(one_pass(batches, 2), whole[-2:])


def test_order_and_crops_differ_between_epochs_and_seeds(textures):
    data = imagenet(textures)
    first, second, other = (one_pass(data.training(30, s), epoch)[0] for s, epoch in ((0, 1), (0, 2), (1, 1)))
    for batch in (second, other):
        assert not torch.equal(first[1], batch[1])
        assert not any(torch.equal(one, two) for one in first[0] for two in batch[0])


def test_loading_does_not_change_the_global_random_state(textures):
    before = torch.get_rng_state()
    one_pass(imagenet(textures).training(8, 0))
    one_pass(imagenet(textures, workers=1).training(8, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_the_validation_split_depends_only_on_file_names(small):
    def held_out():
        files = imagenet(small, validation_per_class=2).validation
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
    stored = decode(data.test.path(0)).getpixel((40, 40))
    for channel, mean, std in zip(range(3), MEAN, STD, strict=True):
        wanted = torch.full((32, 32), (stored[channel] / 255 - mean) / std)
        rounding = tolerance(torch.float32, terms=2, scale=1 / std)
        torch.testing.assert_close(pixels[0, channel].cpu(), wanted, rtol=0, atol=rounding)


def test_evaluation_resizes_the_shorter_side_and_crops_the_center(textures):
    data = imagenet(textures, size=56)
    pixels, _ = next(iter(data.evaluation("test")))
    image = decode(data.test.path(0))
    assert image.size == (80, 60)
    scaled = image.resize((64 * 80 // 60, 64), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 56) / 2), (64 - 56) // 2
    middle = np.asarray(scaled.crop((left, top, left + 56, top + 56)), dtype=np.float32)
    wanted = (middle / 255 - np.array(MEAN)) / np.array(STD)
    rounding = tolerance(torch.float32, terms=2, scale=1 / min(STD))
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), wanted, rtol=0, atol=rounding)


def test_training_crops_8_to_100_percent_and_flips_half(tmp_path):
    # Red increases to the right and green downwards, so that the colors of a crop tell its edges.
    x, y = np.meshgrid(np.linspace(0, 255, 100), np.linspace(0, 255, 100))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    data = imagenet(write_image_tree(tmp_path, 1, 2, 1, lambda number: ramp))
    first, second = one_pass(imagenet(tmp_path, validation_per_class=0).training(2, seed=0))[0][0]
    assert not torch.equal(first, second), "both images of an epoch have the same crop"
    batches = data.training(1, seed=0)
    areas, flips = [], []
    for epoch in range(300):
        pixels = one_pass(batches, epoch)[0][0][0] * torch.tensor(STD).reshape(-1, 1, 1)
        red, green = pixels[0].mean(dim=0), pixels[1].mean(dim=1)
        # The centers of the first and last of 32 columns are 31/32 of the width apart.
        width, height = (red[-1] - red[0]) * 32 / 31, (green[-1] - green[0]) * 32 / 31
        areas.append(float(width.abs() * height))
        flips.append(bool(width < 0))
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.06 < min(areas) < 0.15
    assert 0.9 < max(areas) < 1.1
    assert 0.45 < np.mean(areas) < 0.6  # uniform on 0.08 to 1: 0.54


def write_variant(kind, path):
    """Write a red image in another format than an RGB JPEG file."""
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
def test_every_image_mode_is_converted_to_rgb(small, kind):
    path = next(small.glob("val/n00000000/*.JPEG"))
    write_variant(kind, path)
    batches = imagenet(small).evaluation("test")
    pixels, labels = next(iter(batches))
    assert len(labels) == 4
    assert not batches.skipped
    rgb = (pixels[0] * torch.tensor(STD).reshape(-1, 1, 1) + torch.tensor(MEAN).reshape(-1, 1, 1)).mean(dim=(1, 2))
    wanted = [76, 76, 76] if kind == "gray" else [254, 0, 0]
    assert torch.allclose(rgb * 255, torch.tensor(wanted).float(), atol=4)


def test_the_exif_orientation_is_ignored(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(0, 80, 60).save(path, exif=exif)
    assert decode(str(path)).size == (80, 60)


def test_formats_that_run_external_programs_are_rejected(tmp_path):
    path = tmp_path / "page.jpg"
    noise_image(0).save(path, format="EPS")
    with pytest.raises(ValueError, match="not a JPEG, PNG"):
        decode(str(path))


# Damaged files


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another kind of file": lambda content: b"not an image at all",
    "overwritten": lambda content: content[:20] + bytes(len(content) - 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_replaces_a_damaged_image_by_the_next_one_and_warns(small, damage):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.1)
    whole = one_pass(data.training(10, seed=0))[0]
    path = data.train.path(3)
    Path(path).write_bytes(DAMAGES[damage](Path(path).read_bytes()))
    batches = data.training(10, seed=0)
    with pytest.warns(
        SparsityWarning, match=rf"{re.escape(path)} .*skipped in the train split \(1 of 1 allowed\)"
    ) as caught:
        pixels, labels = one_pass(batches)[0]
    assert len(caught) == 1
    assert list(batches.skipped) == [path]
    position = color_numbers(whole[0]).index(3)
    wanted = list(color_numbers(whole[0]))
    wanted[position] = 4
    assert color_numbers(pixels) == wanted
    assert torch.equal(labels, whole[1])
    # A second pass does not warn again, and worker processes give the same batches.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(one_pass(batches), [(pixels, labels)])
    with_workers = imagenet(small, validation_per_class=0, max_corrupt=0.1, workers=2).training(10, seed=0)
    with pytest.warns(SparsityWarning):
        assert equal(one_pass(with_workers), [(pixels, labels)])
    assert with_workers.skipped == batches.skipped


def test_too_many_damaged_images_raise_an_error(small):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.2)
    for index in (2, 3, 4):
        Path(data.train.path(index)).write_bytes(b"")
    with (
        pytest.warns(SparsityWarning),
        pytest.raises(InputError, match=r"3 of 10 images of the train split .*max_corrupt=0.2 allows 2"),
    ):
        one_pass(data.training(10, seed=0))
    data = imagenet(small, validation_per_class=0)
    with pytest.raises(InputError, match=r"1 of 10 images"):
        one_pass(data.training(10, seed=0))


def test_damaged_replacements_are_skipped_too(small):
    data = imagenet(small, validation_per_class=0, max_corrupt=0.2)
    for index in (9, 0):  # the last and, after it, the first
        Path(data.train.path(index)).write_bytes(b"")
    with pytest.warns(SparsityWarning):
        pixels, _ = one_pass(data.training(10, seed=0))[0]
    assert sorted(color_numbers(pixels)) == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8]


def test_evaluation_skips_a_damaged_image(small):
    data = imagenet(small, max_corrupt=0.25)
    path = data.test.path(1)
    Path(path).write_bytes(b"")
    batches = data.evaluation("test")
    with pytest.warns(SparsityWarning, match="1 of 1 allowed"):
        assert [color_numbers(pixels) for pixels, _ in batches] == [[10, 12, 13]]
    assert batches.skipped.keys() == {path}


def test_a_batch_without_readable_images_is_skipped(small, monkeypatch):
    monkeypatch.setattr("sparing.data.pictures.EVALUATION_BATCH", 1)
    data = imagenet(small, max_corrupt=0.25)
    Path(data.test.path(0)).write_bytes(b"")
    with pytest.warns(SparsityWarning):
        assert [color_numbers(pixels) for pixels, _ in data.evaluation("test")] == [[11], [12], [13]]


def test_at_most_ten_warnings_are_shown(tmp_path):
    data = imagenet(write_image_tree(tmp_path, 1, 2, 20, lambda number: Image.new("RGB", (8, 8))), max_corrupt=1)
    for path in tmp_path.glob("val/*/*"):
        path.write_bytes(b"")
    batches = data.evaluation("test")
    with pytest.warns(SparsityWarning) as caught:
        assert list(batches) == []
    assert len(caught) == 10
    assert "further unreadable images are counted" in str(caught[-1].message)
    assert len(batches.skipped) == 20


def test_max_unreadable_is_not_affected_by_rounding_errors():
    wanted = {0: 0, 0.009: 0, 0.01: 1, 0.07: 7, 0.29: 29, 0.57: 57, 1: 100}
    assert {fraction: max_unreadable(fraction, 100) for fraction in wanted} == wanted
    assert max_unreadable(0.001, 1_281_167) == 1281


def test_waited_seconds_is_measured(textures):
    batches = imagenet(textures).training(8, seed=0)
    one_pass(batches)
    assert 0 < batches.waited_seconds < 60


# Layouts


def flatten(root):
    """Move all val images out of their class folders, as in ImageNet's archive. Returns image name → class."""
    classes = {}
    for path in sorted(root.glob("val/*/*.JPEG")):
        classes[path.stem] = path.parent.name
        path.rename(root / "val" / path.name)
    for folder in root.glob("val/*/"):
        folder.rmdir()
    return classes


def test_unsorted_val_is_rejected_and_the_documented_command_sorts_it(small):
    wanted = imagenet(small).test
    classes = flatten(small)
    with pytest.raises(InputError, match=r"4 images outside of class folders .* 0 class folders.*LOC_val_solution"):
        imagenet(small)
    with open(small / "LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([image, f"{name} 85 1 499 272 "] for image, name in classes.items())
    page = (ROOT / "docs" / "imagenet.md").read_text()
    line = re.search(r"```bash\n(.*?LOC_val_solution.*?)```", page, re.DOTALL)
    subprocess.run(["bash", "-euc", line[1]], cwd=small, check=True)
    sorted_again = imagenet(small).test
    assert list(sorted_again.names) == list(wanted.names)


def without(name):
    def change(root):
        (root / name).rename(root / "elsewhere")

    return change


def clear(root):
    for path in root.glob("train/n00000001/*"):
        path.rename(path.with_suffix(".npy"))


def one_loose(root):
    path = next(root.glob("train/n00000001/*"))
    path.rename(root / "train" / path.name)


LAYOUTS = {
    "no train": (without("train"), "has no directory train/; it contains elsewhere/, val/"),
    "no val": (without("val"), "has no directory val/; it contains elsewhere/, train/"),
    "a class without images": (clear, "1 classes of .*train have no images: n00000001$"),
    "a class only in train": (
        lambda root: (root / "val" / "n00000001").rename(root / "n1"),
        "1 classes of .*train/ are not in val/ (n00000001)",
    ),
    "a class only in val": (
        lambda root: (root / "train" / "n00000001").rename(root / "n1"),
        "1 classes of .*val/ are not in train/ (n00000001)",
    ),
    "an image outside of the class folders": (one_loose, "train has 1 images outside of class folders"),
    "an empty train": (
        lambda root: ((root / "train").rename(root / "old"), (root / "train").mkdir()),
        "train has no class folders; it is empty",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_folder_layouts_are_rejected(small, layout):
    change, message = LAYOUTS[layout]
    change(small)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        imagenet(small)


def test_folders_without_read_permission_are_reported(small, monkeypatch):
    folder = small / "train" / "n00000001"
    for path in folder.iterdir():
        path.unlink()
    # Mocked, because the tests may run as root, who can read every folder.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    with pytest.raises(InputError, match="1 classes .* have no images: .*no permission to read n00000001"):
        imagenet(small)

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="train cannot be read .Permission denied."):
        imagenet(small)


def test_hidden_files_and_other_file_types_are_ignored(small):
    (small / "train" / ".ipynb_checkpoints").mkdir()
    (small / "train" / "README.txt").write_text("not an image")
    (small / "train" / "n00000000" / "._n00000000_0000.JPEG").write_bytes(b"left behind by a copy")
    (small / "train" / "n00000000" / "n00000000_0000.JPEG.part").write_bytes(b"half a download")
    assert imagenet(small, validation_per_class=0).size("train") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer >= 1, got 0"),
        ({"size": 32.5}, "size must be an integer >= 1, got 32.5"),
        ({"workers": -1}, "workers must be an integer >= 0, got -1"),
        ({"max_corrupt": 2}, r"max_corrupt must be in \[0, 1\], got 2"),
        ({"max_corrupt": True}, r"max_corrupt must be in \[0, 1\], got True"),
        ({"validation_per_class": -1}, "validation_per_class must be an integer >= 0, got -1"),
        (
            {"validation_per_class": 5},
            "class n00000000 has 5 images in train/, but validation_per_class=5; it must be smaller",
        ),
    ],
)
def test_imagenet_rejects_arguments_out_of_range(small, arguments, message):
    with pytest.raises(InputError, match=message):
        imagenet(small, **arguments)


def test_imagenet_rejects_a_missing_root(tmp_path):
    with pytest.raises(
        InputError, match="nowhere is not a directory; set data.root to the folder that contains train/ and val/"
    ):
        imagenet(tmp_path / "nowhere")


def test_the_ranks_of_a_host_share_the_default_workers(monkeypatch):
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


@pytest.mark.slow
def test_torchvision_of_another_build_raises_input_error(small):
    done = subprocess.run([sys.executable, "-c", TORCHVISION, str(small)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this torchvision loads")
    assert "was not built for torch" in done.stdout
    assert "pytorch.org" in done.stdout


@pytest.mark.parametrize("name", ["imagenet", "webdataset"])
def test_a_missing_torchvision_raises_input_error(small, monkeypatch, name):
    for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    arguments = {"imagenet": [str(small)], "webdataset": ["a.tar", "b.tar", 1, 1, 1]}[name]
    with pytest.raises(InputError, match=rf"{name} needs torchvision .*pip install 'sparing\[imagenet\]'"):
        DATASETS[name](*arguments)


# Training


@pytest.mark.slow
def test_a_run_on_folders_resumes_with_another_root_and_other_workers(textures, tmp_path):
    def train(root, workers, **options):
        changes = {
            "model.name": "resnet8", "data.root": root, "data.workers": workers, "data.validation_per_class": 1,
            "schedule.epochs": 2, "device": "cpu",
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in changes.items()]
        recipe = load_recipe(ROOT / "recipes" / "imagenet" / "check-folders.yaml", overrides)
        return train_run(recipe, tmp_path / "run", **options)

    assert train(textures, 0, stop_after=1) is None
    shutil.copytree(textures, tmp_path / "copy")
    assert train(tmp_path / "copy", 1, resume=True)["test_count"] == 15
