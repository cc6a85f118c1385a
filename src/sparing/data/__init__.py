"""Data sets."""

from collections.abc import Callable

from sparing.data.base import Batches, Data, Part, check_part
from sparing.data.cifar import cifar10, cifar10_jpeg
from sparing.data.folders import imagenet
from sparing.data.image import ImageBatches, ImageData, Images, fashion_mnist, mnist5k
from sparing.data.sequence import SequenceBatches, SequenceData, Sequences, har2, har6, watch
from sparing.data.shards import webdataset
from sparing.data.speech import google12, spoken_digits

__all__ = [
    "DATASETS",
    "Batches",
    "Data",
    "ImageBatches",
    "ImageData",
    "Images",
    "Part",
    "SequenceBatches",
    "SequenceData",
    "Sequences",
    "check_part",
]

DATASETS: dict[str, Callable[..., Data]] = {
    data.__name__: data
    for data in (
        mnist5k,
        fashion_mnist,
        cifar10,
        cifar10_jpeg,
        imagenet,
        webdataset,
        har2,
        har6,
        watch,
        google12,
        spoken_digits,
    )
}
"""The data sets by the name a recipe uses; the other keys of its `data:` are the arguments."""
