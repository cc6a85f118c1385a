"""Data sets."""

from sparing.data.image import DATASETS, Batches, ImageData, Images

__all__ = ["DATASETS", "Batches", "ImageData", "Images"]
