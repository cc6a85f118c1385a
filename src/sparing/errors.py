"""The errors sparing raises for what a caller can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message names the value, the place and the choices. The command line
    prints it as one sentence and exits with status 2.
    """


class CheckpointError(InputError):
    """A checkpoint file is missing, truncated, or not one of ours."""


class SparsityWarning(UserWarning):
    """Something a run can live with and its owner should know of.

    A layer holds no weight at all, so nothing can pass through it or train it; the numbers of a run
    can prune nothing; a picture of the training data cannot be read, and another takes its place.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message about an unknown name: the nearest one, or all there are."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(choices) or 'nothing'}"
