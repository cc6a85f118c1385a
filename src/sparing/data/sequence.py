"""Sequence data sets held in memory, and the inertial-sensor data sets HAR-2, HAR-6 and watch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.data.base import SPLITS, Examples, Shares, Split, Splits
from sparing.errors import InputError


@dataclass(frozen=True)
class Sequences(Examples):
    """Sequences and labels of one split.

    Attributes:
        values: float32, (N, T, F): examples, time steps, features.
        labels: int64, (N,).
        lengths: int64, (N,): number of time steps of each example without padding. None if all have T steps.
    """

    values: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def steps(self) -> Tensor:
        """Return all time steps that are not padding, (steps, F)."""
        if self.lengths is None:
            return self.values.flatten(0, 1)
        return self.values[torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]]


@dataclass(frozen=True)
class SequenceData(Splits[Sequences]):
    """Sequence data set that fits in memory.

    Batches are `(sequences, labels)`, or `(sequences, lengths, labels)` if the lengths differ.

    Attributes:
        train: training split.
        validation: validation split.
        test: test split.
        num_classes: number of classes; labels are 0 to num_classes − 1.
    """

    num_classes: int

    def __post_init__(self) -> None:
        self.check_labels(self.num_classes)

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, T, F), where T is the length of the longest training example."""
        return (1, *self.train.values.shape[1:])

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "input_size": self.input_size[2]}

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "SequenceBatches":
        return SequenceBatches(self.train, batch_size, shuffle=True, seed=seed, rank=rank, ranks=ranks)

    def evaluation(self, split: Split, rank: int = 0, ranks: int = 1) -> "SequenceBatches":
        return SequenceBatches(getattr(self, split), 500, rank=rank, ranks=ranks)


class SequenceBatches(Shares):
    """Batches of sequences (N, T, F), float32, lengths (N,) if they differ, and labels (N,).

    T is the length of the longest sequence in the batch. The order depends only on (seed, epoch).

    Args:
        sequences: sequences and labels to iterate over.
        batch_size: sequences per batch, over all ranks; the last batch may be smaller.
        shares: `shuffle`, `seed`, `rank` and `ranks` of `Shares`.
    """

    def __init__(self, sequences: Sequences, batch_size: int, **shares: Any) -> None:
        super().__init__(len(sequences), batch_size, **shares)
        self.sequences = sequences

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = self.order(self.generator())
        for own in self.positions():
            share = self.sequences[order[own].to(self.sequences.labels.device)]
            if share.lengths is None:
                yield share.values, share.labels
            else:
                yield share.values[:, : int(share.lengths.max())], share.lengths, share.labels


def normalized(name: str, train: Sequences, validation: Sequences, test: Sequences, num_classes: int) -> SequenceData:
    """Build a data set whose features have mean 0 and std 1 over the time steps of the training split."""
    for split, sequences in (("training", train), ("validation", validation), ("test", test)):
        if not len(sequences):
            raise InputError(f"data {name}: the {split} split is empty")
        if sequences.lengths is not None and int(sequences.lengths.min()) < 1:
            empty = int(sequences.lengths.argmin())
            raise InputError(f"data {name}: sequence {empty} of the {split} split has no time steps")
        broken = (~torch.isfinite(sequences.values)).flatten(1).any(1).nonzero().flatten()
        if len(broken):
            raise InputError(
                f"data {name}: {len(broken)} of {len(sequences)} sequences of the {split} split contain NaN or "
                f"infinite values, the first at index {int(broken[0])}"
            )
    # The clamp avoids a division by zero: a constant feature becomes 0.
    mean, std = train.steps().mean(0), train.steps().std(0).clamp(min=1e-6)
    train, validation, test = (replace(each, values=(each.values - mean) / std) for each in (train, validation, test))
    return SequenceData(train, validation, test, num_classes)


HAR_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
HAR_STEPS = 128
HAR_PAGE = "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones"


def har6(root: str = "data/UCI HAR Dataset") -> SequenceData:
    """Load UCI HAR: six activities from 9 inertial signals of a smartphone worn at the waist.

    A sequence is a window of 2.56 s at 50 Hz: 128 time steps × 9 features (3-axis body acceleration, angular
    velocity and total acceleration). Classes 0 to 5 are walking, walking upstairs, walking downstairs, sitting,
    standing and laying. The test split is that of the archive. The validation split is the last fifth of the
    training windows. The windows are sorted by person, so the two splits share hardly any persons.
    Each feature is normalized with its mean and std over the training split.

    Args:
        root: folder "UCI HAR Dataset" of the archive, with `train/Inertial Signals` etc.

    Reference: Anguita et al., "A Public Domain Dataset for Human Activity Recognition Using Smartphones", ESANN 2013.
    """
    train, test = _read_har(Path(root).expanduser(), "train"), _read_har(Path(root).expanduser(), "test")
    keep, order = len(train) - len(train) // 5, torch.arange(len(train))
    return normalized("UCI HAR", train[order[:keep]], train[order[keep:]], test, num_classes=6)


def har2(root: str = "data/UCI HAR Dataset") -> SequenceData:
    """Load HAR-2: UCI HAR with two classes, as in the FastGRNN and STR papers. Otherwise the same as `har6`.

    Class 0 is sitting, laying and walking upstairs. Class 1 is standing, walking and walking downstairs.

    Reference: Kusupati et al., "FastGRNN", NeurIPS 2018, appendix B.
    """
    merged, six = torch.tensor([1, 0, 1, 0, 1, 0]), har6(root)
    splits = {split: replace(getattr(six, split), labels=merged[getattr(six, split).labels]) for split in SPLITS}
    return replace(six, **splits, num_classes=2)


def _read_har(root: Path, split: str) -> Sequences:
    folder = root / split
    paths = [folder / "Inertial Signals" / f"{signal}_{split}.txt" for signal in HAR_SIGNALS]
    labels = folder / f"y_{split}.txt"
    if missing := [path for path in (*paths, labels) if not path.is_file()]:
        raise InputError(
            f"data UCI HAR: {missing[0]} is missing ({len(missing)} of {len(paths) + 1} files of the {split} split "
            f'are missing); unpack "UCI HAR Dataset.zip" from {HAR_PAGE} and set data.root to its folder'
        )
    numbers, targets = [_read_table(path) for path in paths], _read_table(labels).flatten()
    for path, table in zip(paths, numbers, strict=True):
        if table.shape != (len(targets), HAR_STEPS):
            raise InputError(
                f"data {path}: must contain a table of {len(targets)} × {HAR_STEPS} numbers, as {labels.name} has "
                f"{len(targets)} labels, got {' × '.join(map(str, table.shape))}; unpack the archive again"
            )
    if not bool(torch.isin(targets, torch.arange(1.0, 7.0)).all()):
        raise InputError(f"data {labels}: labels must be integers from 1 to 6; unpack the archive again")
    return Sequences(torch.stack(numbers, dim=2), targets.long() - 1)


def _read_table(path: Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.loadtxt(path, dtype=np.float32, ndmin=2))
    except (OSError, ValueError) as error:
        raise InputError(f"data {path}: cannot be read ({error}); unpack the archive again") from error


def watch() -> SequenceData:
    """Load the watch data set: seven shoulder exercises of ten persons, from 6 inertial signals of a smartwatch.

    The 140 recordings are part of the package seglearn. They are divided into windows of 2 s at 50 Hz (100 time
    steps × 6 features) with a stride of 50 steps. Persons 1 to 6 are the training split, person 7 is the
    validation split, persons 8 to 10 are the test split. Each feature is normalized with its mean and std over
    the training split.

    Reference: Burns et al., "Shoulder Physiotherapy Exercise Recognition", 2018, arXiv 1802.01489.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError as error:
        raise InputError("data watch needs the package seglearn: pip install seglearn") from error
    recorded: dict[str, Any] = load_watch()

    def windows_of(persons: Sequence[int]) -> Sequences:
        series = zip(recorded["X"], recorded["y"], recorded["subject"], strict=True)
        cut = [(windows(torch.from_numpy(x).float()), int(y)) for x, y, person in series if int(person) in persons]
        labels = torch.cat([torch.full((len(values),), label) for values, label in cut])
        return Sequences(torch.cat([values for values, _ in cut]), labels)

    return normalized("watch", windows_of(range(1, 7)), windows_of([7]), windows_of(range(8, 11)), num_classes=7)


def windows(series: Tensor, width: int = 100, stride: int = 50) -> Tensor:
    """Divide a series (T, F) into windows (N, width, F). The incomplete window at the end is dropped.

    Examples:
        >>> windows(torch.zeros(250, 6)).shape
        torch.Size([4, 100, 6])
    """
    if len(series) < width:
        return series.new_empty(0, width, series.shape[1])
    return series.unfold(0, width, stride).transpose(1, 2).contiguous()
