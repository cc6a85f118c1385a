"""CIFAR-10, from the official binary files or from an archive of JPEG files."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparing.data.image import ImageData, Images, stratified_split
from sparing.data.tar import read_tar
from sparing.errors import InputError
from sparing.files import atomic_write

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

    Raises:
        InputError: a file is missing or damaged.

    Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(
            f"data cifar10: folder {folder} not found; download the binary version from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and set data.root to its folder"
        )
    batches = [_read_binary(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    train = Images(torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches]))
    # Mean and std of the training images.
    return _build(
        folder, train, _read_binary(folder / "test_batch.bin"),
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), shift=shift, flip=flip,
    )  # fmt: skip


def cifar10_jpeg(root: str = "data/cifar10-jpeg.tar.xz", shift: int = 4, flip: bool = True) -> ImageData:
    """Load CIFAR-10 from an archive of JPEG files.

    JPEG compression changes the pixels slightly, so results differ from those on the official files. The
    decoded images are cached next to the archive, in a file with the suffix `.safetensors`, if the folder is
    writable. The splits are made as in `cifar10`.

    Args:
        root: archive (`.tar`, `.tar.gz` or `.tar.xz`) of the files `train/<class>/*.jpg` and
            `test/<class>/*.jpg`, with equal counts per class.
        shift: maximum random shift of a training image, in pixels, per direction.
        flip: flip training images horizontally with probability 0.5.

    Raises:
        InputError: the archive is missing, damaged or has other content; Pillow is not installed.
    """
    archive = Path(root)
    if not archive.is_file():
        raise InputError(
            f"data cifar10_jpeg: archive {archive} not found; set data.root to its path, or use cifar10 with the "
            "official files"
        )
    splits = _read_cache(archive)
    if splits is None:
        splits = _read_archive(archive)
        _write_cache(archive, splits)
    # Mean and std of the decoded training images. The std is lower than in cifar10 as JPEG removes some noise.
    return _build(
        archive, splits["train"], splits["test"],
        mean=(0.4913, 0.4821, 0.4465), std=(0.2452, 0.2428, 0.2606), shift=shift, flip=flip,
    )  # fmt: skip


def _build(
    source: Path,
    train: Images,
    test: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    shift: int,
    flip: bool,
) -> ImageData:
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
    index = stratified_split(train.labels, (count - count // 10, count // 10))
    train, validation = (Images(train.pixels[i], train.labels[i]) for i in index)
    return ImageData(train, validation, test, mean, std, num_classes=len(CLASSES), shift=shift, flip=flip)


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


def _read_archive(path: Path) -> dict[str, Images]:
    """Read the images of "train" and "test", sorted by class and file name."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("data cifar10_jpeg needs Pillow: pip install pillow") from error
    pixels: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    try:
        with path.open("rb") as stream:
            for member, content in read_tar(stream, lambda member: _place(member) is not None):
                place = _place(member)
                assert place is not None
                split, name, file = place
                with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                    if image.size != (32, 32):
                        raise InputError(f"data {path}: {member} must have 32×32 pixels, got {image.size}")
                    raw = bytearray(image.convert("RGB").tobytes())
                pixels[split, name][file] = torch.frombuffer(raw, dtype=torch.uint8).reshape(32, 32, 3)
    except InputError:
        raise
    except Exception as error:  # A damaged image can raise almost any type of exception.
        raise InputError(f"data {path}: damaged, or not an archive of JPEG files ({error})") from error
    return {split: _stack([pixels[split, name] for name in CLASSES]) for split in ("train", "test")}


def _place(member: str) -> tuple[str, str, str] | None:
    """Return split, class and file of a member `train/<class>/<file>`, or None for another one."""
    split, _, rest = member.removeprefix("./").partition("/")
    name, _, file = rest.partition("/")
    return (split, name, file) if split in ("train", "test") and name in CLASSES else None


def _stack(classes: Iterable[dict[str, Tensor]]) -> Images:
    """Stack the images of a split, given one mapping of file name → pixels (32, 32, 3) per class."""
    labelled = [(files[name], label) for label, files in enumerate(classes) for name in sorted(files)]
    if not labelled:
        return Images(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    pixels = torch.stack([image for image, _ in labelled]).movedim(-1, 1).contiguous()
    return Images(pixels, torch.tensor([label for _, label in labelled]))


def _signature(archive: Path) -> str:
    """Return a string that changes when the archive changes."""
    status = archive.stat()
    return json.dumps([status.st_size, status.st_mtime_ns])


def _cache_path(archive: Path) -> Path:
    return archive.with_name(f"{archive.name}.safetensors")


def _read_cache(archive: Path) -> dict[str, Images] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_cache_path(archive), framework="pt") as file:
            if (file.metadata() or {}).get("archive") != _signature(archive):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {split: Images(tensors[f"{split}.pixels"], tensors[f"{split}.labels"]) for split in ("train", "test")}
    except (OSError, SafetensorError, KeyError):
        return None  # A damaged cache is made again.


def _write_cache(archive: Path, splits: dict[str, Images]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{split}.pixels": images.pixels for split, images in splits.items()}
    tensors |= {f"{split}.labels": images.labels for split, images in splits.items()}
    try:
        with atomic_write(_cache_path(archive)) as temporary:
            save_file(tensors, temporary, metadata={"archive": _signature(archive)})
    except InputError:  # The folder is not writable: decode again next time.
        return
