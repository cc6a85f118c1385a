"""Data sets for image and sequence classification."""

from collections.abc import Callable

from sparing.data.base import Batches, Split, SplitDataset, check_split
from sparing.data.cifar import cifar10, cifar10_jpeg
from sparing.data.folders import image_folder, imagenet
from sparing.data.image import ImageBatches, ImageData, Images, fashion_mnist, mnist, mnist5k
from sparing.data.sequence import SequenceBatches, SequenceData, Sequences, har2, har6, watch
from sparing.data.shards import webdataset
from sparing.data.speech import google12, spoken_digits

__all__ = [
    "DATASETS", "Batches", "ImageBatches", "ImageData", "Images", "SequenceBatches", "SequenceData", "Sequences",
    "Split", "SplitDataset", "check_split",
]  # fmt: skip

_LOADERS: tuple[Callable[..., SplitDataset], ...] = (
    mnist5k, mnist, fashion_mnist, cifar10, cifar10_jpeg, imagenet, image_folder, webdataset, har2, har6, watch,
    google12, spoken_digits,
)  # fmt: skip
DATASETS = {load.__name__: load for load in _LOADERS}
"""Data set name in a recipe → function that loads it. The other keys of `data:` are its arguments."""
