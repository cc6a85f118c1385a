"""CIFAR-10, from the official binary files or from an archive of JPEG files."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparing.data.cache import cached
from sparing.data.image import ImageData, Images, stratified_split
from sparing.data.tar import read_tar
from sparing.errors import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Class names, indexed by label."""
RECORD_BYTES = 1 + 3 * 32 * 32
"""Size of an image in the binary version: one byte for the label, then the red, green and blue planes."""


def cifar10(root: str = "data/cifar-10-batches-bin", shift: int = 4, flip: bool = True) -> ImageData:
    """Load CIFAR-10 from its binary version: 60,000 color images of ten classes, 32×32 pixels.

    The 50,000 training images are divided into fixed splits: 4,500 training and 500 validation images per
    class. The 10,000 test images are the test split.

    Args:
        root: folder `cifar-10-batches-bin` of the binary version, with `data_batch_1.bin` to `data_batch_5.bin`
            and `test_batch.bin`. The Python version is not supported, because it consists of pickle files.
        shift: maximum random shift of a training image, in pixels, per direction.
        flip: flip training images horizontally with probability 0.5.

    Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"data cifar10: folder {folder} not found; download the binary version from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and set data.root to its folder"
        )
    batches = [_read_binary(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    train = Images(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))
    # Mean and std of the training images.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _build(folder, train, _read_binary(folder / "test_batch.bin"), mean=mean, std=std, shift=shift, flip=flip)


def cifar10_jpeg(root: str = "data/cifar10-jpeg.tar.xz", shift: int = 4, flip: bool = True) -> ImageData:
    """Load CIFAR-10 from an archive of JPEG files.

    JPEG compression changes the pixels slightly, so results differ from those on the official files. The
    decoded images are cached next to the archive, in a file with the suffix `.safetensors`. The splits are made
    as in `cifar10`.

    Args:
        root: archive (`.tar`, `.tar.gz` or `.tar.xz`) of the files `train/<class>/*.jpg` and
            `test/<class>/*.jpg`, with equal counts per class.
        shift: maximum random shift of a training image, in pixels, per direction.
        flip: flip training images horizontally with probability 0.5.
    """
    archive = Path(root).expanduser()
    if not archive.is_file():
        raise InputError(
            f"data cifar10_jpeg: archive {archive} not found; set data.root to its path, or use cifar10 with the "
            "official files"
        )
    key = ("cifar10_jpeg", archive.stat().st_size, archive.stat().st_mtime_ns)
    found = cached(archive.with_name(f"{archive.name}.safetensors"), key, lambda: _read_archive(archive), _is_valid)
    train, test = (Images(found[f"{split}.pixels"], found[f"{split}.labels"]) for split in ("train", "test"))
    # Mean and std of the decoded training images. The std is lower than in cifar10 as JPEG removes some noise.
    mean, std = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)
    return _build(archive, train, test, mean=mean, std=std, shift=shift, flip=flip)


def _build(source: Path, train: Images, test: Images, **arguments: object) -> ImageData:
    """Build the data set, with a tenth of each training class held out for validation."""
    for name, images in (("training", train), ("test", test)):
        counts = torch.bincount(images.labels, minlength=len(CLASSES)).tolist()
        # CIFAR-10 is balanced, so unequal counts mean that images are missing.
        if min(counts) != max(counts) or not counts[0]:
            raise InputError(
                f"data {source}: the {name} classes must have equal numbers of images, got {counts}; "
                "download the data set again"
            )
    count = len(train) // len(CLASSES)
    train, validation = (train[index] for index in stratified_split(train.labels, (count - count // 10, count // 10)))
    return ImageData(train, validation, test, num_classes=len(CLASSES), **arguments)  # type: ignore[arg-type]


def _read_binary(path: Path) -> Images:
    try:
        size = path.stat().st_size
        if not size or size % RECORD_BYTES:
            raise InputError(
                f"data {path}: the size of {size:,} bytes is not a multiple of {RECORD_BYTES:,}; download it again"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"data {path}: cannot be read ({error.strerror})") from error
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, RECORD_BYTES)
    labels = records[:, 0].to(torch.int64)
    if int(labels.max()) >= len(CLASSES):
        raise InputError(
            f"data {path}: labels must be from 0 to 9, got {int(labels.max())}; this is not a CIFAR-10 batch file"
        )
    return Images(records[:, 1:].reshape(-1, 3, 32, 32).clone(), labels)


def _read_archive(path: Path) -> dict[str, Tensor]:
    """Read the pixels and labels of "train" and "test", sorted by class and file name."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("data cifar10_jpeg needs Pillow: pip install pillow") from error
    places = re.compile(rf"(?:\./)?(train|test)/({'|'.join(CLASSES)})/(.*)", re.DOTALL)
    found: dict[str, dict[tuple[int, str], Tensor]] = {"train": {}, "test": {}}
    try:
        with path.open("rb") as stream:
            for member, content in read_tar(stream):
                if place := places.fullmatch(member.name):
                    with Image.open(io.BytesIO(content()), formats=["JPEG"]) as image:
                        if image.size != (32, 32):
                            raise InputError(f"data {path}: {member.name} must have 32×32 pixels, got {image.size}")
                        raw = bytearray(image.convert("RGB").tobytes())
                    pixels = torch.frombuffer(raw, dtype=torch.uint8).reshape(32, 32, 3)
                    found[place[1]][CLASSES.index(place[2]), place[3]] = pixels
    except InputError:
        raise
    except Exception as error:  # A damaged image can raise almost any type of exception.
        raise InputError(f"data {path}: damaged, or not an archive of JPEG files ({error})") from error
    return {name: tensor for split, images in found.items() for name, tensor in _stack(split, images)}


def _is_valid(found: dict[str, Tensor]) -> bool:
    """Return whether tensors have the shapes and values of what `_read_archive` returns."""
    splits = [(found[f"{split}.pixels"], found[f"{split}.labels"]) for split in ("train", "test")]
    return all(
        (pixels.dtype, labels.dtype) == (torch.uint8, torch.int64)
        and pixels.shape == (labels.numel(), 3, 32, 32)
        and labels.dim() == 1
        and 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES)
        for pixels, labels in splits
    )


def _stack(split: str, images: dict[tuple[int, str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    keys = sorted(images)
    pixels = [images[key] for key in keys] or [torch.empty(32, 32, 0, dtype=torch.uint8)]
    yield f"{split}.pixels", torch.stack(pixels).movedim(-1, 1).contiguous()
    yield f"{split}.labels", torch.tensor([label for label, _ in keys], dtype=torch.int64)
