"""User-facing errors and warnings."""

import difflib
from collections.abc import Iterable
from numbers import Integral
from pickle import PicklingError
from typing import Any


class InputError(ValueError):
    """Invalid argument, recipe or file.

    The message names the value, where it was found and the valid choices. The command line prints the
    message on one line and exits with status 2.
    """


class UnpicklableError(InputError, PicklingError):
    """An object that cannot be pickled. Lightning and torch try to pickle objects, and expect a PicklingError."""


class CheckpointError(InputError):
    """Missing, truncated or incompatible checkpoint file."""


class SparsityWarning(UserWarning):
    """Non-fatal problem in a run.

    Examples: all weights of a layer are pruned, so that it receives no gradient; the settings of a run
    cannot prune any weight; a training image cannot be read and another one is used in its place.
    """


def check_sizes(where: str, **sizes: Any) -> None:
    """Check that sizes, such as numbers of features, are integers of at least 1.

    Raises:
        InputError: one is not.

    Examples:
        >>> check_sizes("LowRankLinear", in_features=4, out_features=2)
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise InputError(f"{where}: {name} must be an integer >= 1, got {size!r:.200}")


def listed(names: Iterable[str], most: int) -> str:
    """Return names for a message, separated by commas: at most so many of them, and how many others there are.

    Examples:
        >>> listed(["conv1", "conv2", "fc"], 2)
        'conv1, conv2 and 1 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error that is not empty, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the closest choice, or all choices.

    Examples:
        >>> nearest("optimiser", ["model", "optimizer"])
        "did you mean 'optimizer'?"
        >>> nearest("x", ["model", "optimizer"])
        'choose from model, optimizer'
    """
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(choices) - 50} others" if len(choices) > 50 else ""
    return f"choose from {', '.join(choices[:50]) or 'nothing'}{more}"
