"""CIFAR-10: from the official binary files, or from an archive of JPEG files."""

import io
import json
import lzma
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparing.data.image import ImageData, Images, stratified_split
from sparing.errors import InputError
from sparing.files import atomic_write

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""By label."""
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image in the binary version: its label, then red, green and blue, row by row."""


def cifar10(root: str = "data/cifar-10-batches-bin", shift: int = 4, flip: bool = True) -> ImageData:
    """CIFAR-10: 60,000 color photographs of ten kinds of things, 32×32.

    Its 50,000 training images are split once and for all: of each class 4,500 to train on, 500 to
    validate. Its 10,000 test images are the test.

    Args:
        root: the folder `cifar-10-batches-bin` of the "binary version": `data_batch_1.bin` to
            `data_batch_5.bin` and `test_batch.bin`. The version for Python is made of pickles, which are
            not loaded.
        shift: pixels by which a training image may move, in both directions.
        flip: mirror training images by chance.

    Raises:
        InputError: a file is missing or damaged.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(
            f"data cifar10: no folder {folder}; download the binary version from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder with data.root"
        )
    train = [_read_binary(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    together = Images(torch.cat([part.pixels for part in train]), torch.cat([part.labels for part in train]))
    # mean and std of the training images
    return _image_data(
        folder, together, _read_binary(folder / "test_batch.bin"),
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), shift=shift, flip=flip,
    )  # fmt: skip


def cifar10_jpeg(root: str = "data/cifar10-jpeg.tar.xz", shift: int = 4, flip: bool = True) -> ImageData:
    """CIFAR-10 from an archive of JPEG files. Its pixels are not quite the originals; nor are results.

    The files are decoded once, and kept as bytes beside the archive in a file of its name with
    `.safetensors` at the end, where the folder can be written. Split as `cifar10`.

    Args:
        root: the archive, `.tar`, `.tar.gz` or `.tar.xz`, of `train/airplane/*.jpg` to
            `test/truck/*.jpg`, as many of each class.
        shift: pixels by which a training image may move, in both directions.
        flip: mirror training images by chance.

    Raises:
        InputError: the archive is missing, damaged, or holds something else; Pillow is not installed.
    """
    archive = Path(root)
    if not archive.is_file():
        raise InputError(
            f"data cifar10_jpeg: no archive {archive}; name it with data.root, or use cifar10 with the official one"
        )
    parts = _read_cache(archive)
    if parts is None:
        parts = _read_archive(archive)
        _write_cache(archive, parts)
    # mean and std of its training images, whose noise JPEG has smoothed a little
    return _image_data(
        archive, parts["train"], parts["test"],
        mean=(0.4913, 0.4821, 0.4465), std=(0.2452, 0.2428, 0.2606), shift=shift, flip=flip,
    )  # fmt: skip


def _image_data(
    source: Path,
    train: Images,
    test: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    shift: int,
    flip: bool,
) -> ImageData:
    """The data set, a tenth of each training class for validation."""
    for name, part in (("training", train), ("test", test)):
        counts = torch.bincount(part.labels, minlength=len(CLASSES)).tolist()
        # Both sets are balanced: whatever is not has lost something on the way.
        if min(counts) != max(counts) or not counts[0]:
            raise InputError(f"data {source}: its {name} classes have {counts} images, not the same number each")
    count = len(train) // len(CLASSES)
    index = stratified_split(train.labels, (count - count // 10, count // 10))
    rest, validation = (Images(train.pixels[i], train.labels[i]) for i in index)
    return ImageData(rest, validation, test, mean, std, num_classes=len(CLASSES), shift=shift, flip=flip)


def _read_binary(path: Path) -> Images:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"data {path}: cannot be read ({error.strerror})") from error
    if not raw or len(raw) % RECORD:
        raise InputError(f"data {path}: {len(raw):,} bytes are no whole number of images; download it again")
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, RECORD)
    labels = records[:, 0].to(torch.int64)
    if int(labels.max()) >= len(CLASSES):
        raise InputError(f"data {path}: an image has label {int(labels.max())}; this is no batch of CIFAR-10")
    return Images(records[:, 1:].reshape(-1, 3, 32, 32).clone(), labels)


def _read_archive(path: Path) -> dict[str, Images]:
    """The images of "train" and "test", in the order of their classes and names."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("data cifar10_jpeg needs Pillow: pip install pillow") from error
    pixels: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                part, _, rest = member.name.removeprefix("./").partition("/")
                name, _, file = rest.partition("/")
                if not member.isfile() or part not in ("train", "test") or name not in CLASSES:
                    continue
                stream = archive.extractfile(member)
                assert stream is not None
                with Image.open(io.BytesIO(stream.read()), formats=["JPEG"]) as image:
                    if image.size != (32, 32):
                        raise InputError(f"data {path}: {member.name} has {image.size} pixels, not 32×32")
                    raw = bytearray(image.convert("RGB").tobytes())
                pixels[part, name][file] = torch.frombuffer(raw, dtype=torch.uint8).reshape(32, 32, 3)
    # Pillow's own error for what it cannot read is an OSError.
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise InputError(f"data {path}: damaged, or no archive of JPEG files ({error})") from error
    return {part: _stack([pixels[part, name] for name in CLASSES]) for part in ("train", "test")}


def _stack(classes: Iterable[dict[str, Tensor]]) -> Images:
    """One part from its classes, by label, each a mapping from file name to (32, 32, 3)."""
    labelled = [(each[file], label) for label, each in enumerate(classes) for file in sorted(each)]
    if not labelled:
        return Images(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    pixels = torch.stack([image for image, _ in labelled]).movedim(-1, 1).contiguous()
    return Images(pixels, torch.tensor([label for _, label in labelled]))


def _signature(archive: Path) -> str:
    """Changes when the archive does."""
    status = archive.stat()
    return json.dumps([status.st_size, status.st_mtime_ns])


def _cache(archive: Path) -> Path:
    return archive.with_name(f"{archive.name}.safetensors")


def _read_cache(archive: Path) -> dict[str, Images] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_cache(archive), framework="pt") as file:
            if (file.metadata() or {}).get("archive") != _signature(archive):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return None
    return {part: Images(tensors[f"{part}.pixels"], tensors[f"{part}.labels"]) for part in ("train", "test")}


def _write_cache(archive: Path, parts: dict[str, Images]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{part}.pixels": images.pixels for part, images in parts.items()}
    tensors |= {f"{part}.labels": images.labels for part, images in parts.items()}
    try:
        with atomic_write(_cache(archive)) as temporary:
            save_file(tensors, temporary, metadata={"archive": _signature(archive)})
    except OSError:  # a folder that cannot be written: decoded again next time
        return
