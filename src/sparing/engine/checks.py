"""Checks of the data classes of the engine. Each raises `InputError` if its condition is not met."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.errors import InputError

LARGEST = 2**24
"""Maximum size of a dimension, as in kernels/plan.cpp."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_integer(name: str, number: object, least: int = 1, most: int = LARGEST) -> None:
    fits = type(number) is int and least <= number <= most
    require(fits, f"{name} must be an integer in [{least}, {most}], got {number!r}")


def require_choice(name: str, choice: object, choices: Sequence[str]) -> None:
    require(choice in choices, f"{name} must be one of {', '.join(choices)}, got {choice!r}")


def require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
    require(fits, f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
