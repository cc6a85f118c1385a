"""ImageNet, and other image data sets with one folder per class, as torchvision's ImageFolder reads them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparing.data.pictures import FileData, ImageFiles, check_arguments, check_count, hash_seed, require_torchvision
from sparing.errors import InputError, listed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name extensions of images: those of torchvision's ImageFolder."""


def imagenet(
    root: str, size: int = 224, validation_per_class: int = 10, workers: int | None = None, max_corrupt: float = 0.001
) -> FileData:
    """Load images with one folder per class: `root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`.

    The number and names of the classes are arbitrary. Classes are sorted by name and labelled 0, 1, ...; for
    ImageNet this is the usual order.

    The labels of ImageNet's own test set are not public, and papers report the accuracy on `val`. So `val` is the
    *test* split here. The *validation* split is held out of `train`. It does not depend on the seed of the run.

    Training images are cropped and flipped at random (`RandomResizedCrop`, `RandomHorizontalFlip`). In
    evaluation, images are resized to size · 256/224 and center-cropped.

    Args:
        root: folder that contains `train` and `val`.
        size: height and width of the network input, in pixels.
        validation_per_class: images per class held out of `train`. With 0, the network trains on all images, as
            in the paper. Then there is no validation split, and the last epoch is the result of the run.
        workers: number of decoding processes. None uses one per core, at most 16, divided among the ranks that
            torchrun starts on the host. 0 decodes in the main process. Results do not depend on it.
        max_corrupt: maximum fraction of unreadable images in a split. In training, an unreadable image is
            replaced by the next one in the folder. In evaluation, it is skipped.

    Examples:
        >>> data = imagenet("imagenet", size=160)  # doctest: +SKIP
        >>> data.size("train"), data.size("validation"), data.size("test")  # doctest: +SKIP
        (1271167, 10000, 50000)
    """
    return _load("imagenet", root, size, validation_per_class, workers, max_corrupt, has_test=False)


def image_folder(
    root: str, size: int = 224, validation_per_class: int = 10, workers: int | None = None, max_corrupt: float = 0.001
) -> FileData:
    """Load your own images, with one folder per class: `root/train/<class>/*.jpg`, `root/val/...`, `root/test/...`.

    With a folder `test`, `val` is the validation split and `test` the test split. Without it, `val` is the test split,
    and the validation split is held out of `train`. Everything else is as for `imagenet`.

    Examples:
        >>> image_folder("flowers").classes  # doctest: +SKIP
        ('daisy', 'rose', 'tulip')
    """
    has_test = (Path(root).expanduser() / "test").is_dir()
    return _load("image_folder", root, size, validation_per_class, workers, max_corrupt, has_test)


def _load(
    name: str, root: str, size: int, validation_per_class: int, workers: int | None, max_corrupt: float, has_test: bool
) -> FileData:
    workers = check_arguments(name, size, workers, max_corrupt)
    check_count(name, "validation_per_class", validation_per_class, least=0)
    base = Path(root).expanduser()
    if not base.is_dir():
        raise InputError(
            f"data {name}: root {root} is not a directory; set data.root to the folder that contains train/ and val/"
        )
    for folder in ("train", "val"):
        if not (base / folder).is_dir():
            raise InputError(f"data {name}: {root} has no directory {folder}/; {_contents(base)}")
    require_torchvision(name)
    classes = _classes(base / "train")
    for folder in ("val", "test") if has_test else ("val",):
        _check_same_classes(classes, _classes(base / folder), base, folder)
    train, validation = FolderFiles.scan(base / "train", classes), FolderFiles.scan(base / "val", classes)
    if has_test:
        test = FolderFiles.scan(base / "test", classes)
    else:
        (train, validation), test = _hold_out(train, classes, validation_per_class), validation
    return FileData(train, validation, test, len(classes), size, workers, max_corrupt, classes=classes)


@dataclass(frozen=True)
class FolderFiles(ImageFiles):
    """Images whose names are relative to a folder."""

    folder: Path

    @classmethod
    def scan(cls, folder: Path, classes: tuple[str, ...]) -> "FolderFiles":
        """List the images in the class folders, sorted by name; raise InputError if a class has none."""
        from torchvision.datasets import ImageFolder

        # Not an ImageFolder, which takes hidden folders for classes, and holds a list of strings, see `ImageFiles`.
        index = {name: label for label, name in enumerate(classes)}
        samples = ImageFolder.make_dataset(str(folder), index, is_valid_file=_is_image, allow_empty=True)
        labels = np.array([label for _, label in samples], dtype=np.int64)
        empty = [classes[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
        if empty:
            hidden = [name for name in empty if not os.access(folder / name, os.R_OK | os.X_OK)]
            why = f"; no permission to read {listed(hidden, 3)}" if hidden else ""
            raise InputError(f"images: {len(empty)} classes of {folder} have no images: {listed(empty, 3)}{why}")
        prefix = os.path.join(folder, "")
        return cls(np.array([os.fsencode(path.removeprefix(prefix)) for path, _ in samples]), labels, folder)

    def path(self, index: int) -> str:
        return str(self.folder / os.fsdecode(bytes(self.names[index])))

    open = path

    def subset(self, index: NDArray[Any]) -> "FolderFiles":
        return replace(self, names=self.names[index], labels=self.labels[index])


def _classes(folder: Path) -> tuple[str, ...]:
    """List the names of the class folders, sorted; raise InputError if there are none, or images outside of them."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"images: {folder} cannot be read ({error.strerror})") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())
    if loose:
        raise InputError(
            f"images: {folder} has {len(loose)} images outside of class folders ({listed(loose, 3)}) and "
            f"{len(classes)} class folders; move every image to {folder.name}/<class>/. For ImageNet's val, the page "
            "ImageNet of the documentation has a shell command that does this with LOC_val_solution.csv"
        )
    if not classes:
        raise InputError(f"images: {folder} has no class folders; {_contents(folder)}")
    return tuple(classes)


def _check_same_classes(train: tuple[str, ...], other: tuple[str, ...], base: Path, folder: str) -> None:
    for here, there, names in (("train", folder, set(train) - set(other)), (folder, "train", set(other) - set(train))):
        if names:
            raise InputError(
                f"images: {len(names)} classes of {base}/{here}/ are not in {there}/ ({listed(sorted(names), 3)}); "
                "both folders must have the same classes"
            )


def _hold_out(files: FolderFiles, classes: tuple[str, ...], per_class: int) -> tuple[FolderFiles, FolderFiles]:
    """Divide the training images into training and validation split, by a hash of the file names.

    With a hash, adding or removing an image changes the split of at most one other image.
    """
    counts = np.bincount(files.labels)
    if counts.min() <= per_class:
        least = int(counts.argmin())
        raise InputError(
            f"images: class {classes[least]} has {counts[least]} images in train/, but "
            f"validation_per_class={per_class}; it must be smaller, so that training images are left"
        )
    hashes = np.array([hash_seed(bytes(name)) for name in files.names])
    by_hash = np.lexsort((hashes, files.labels))
    # by_hash is sorted by class, then by hash: hold out the first images of each class.
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(files), dtype=bool)
    held[by_hash[np.arange(len(files)) - starts < per_class]] = True
    return files.subset(~held), files.subset(held)


def _is_image(name: str) -> bool:
    # Copies from macOS contain a hidden metadata file ._x.JPEG for every x.JPEG.
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _contents(folder: Path) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f"it contains {listed(names, 3)}" if names else "it is empty"
