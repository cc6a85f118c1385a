"""Sequences small enough to hold in memory: inertial sensors here, speech in `speech.py`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.data.base import Data, Part
from sparing.errors import InputError


@dataclass(frozen=True)
class Sequences:
    """One part of a data set.

    Attributes:
        values: float32, (N, T, F): examples, steps, features.
        labels: int64, (N,).
        lengths: int64, (N,): how many steps of each example are not padding; None where all are T long.
    """

    values: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Sequences":
        lengths = None if self.lengths is None else self.lengths[index]
        return Sequences(self.values[index], self.labels[index], lengths)

    def to(self, device: torch.device) -> "Sequences":
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Sequences(self.values.to(device), self.labels.to(device), lengths)

    def steps(self) -> Tensor:
        """Every step that is not padding, (steps, F)."""
        if self.lengths is None:
            return self.values.flatten(0, 1)
        return self.values[torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]]


@dataclass(frozen=True)
class SequenceData(Data):
    """A set of sequences that fits in memory; batches are `(sequences, labels)`, or with lengths between.

    Attributes:
        train: what to train on.
        validation: for every choice.
        test: used once, at the end.
        num_classes: the labels are 0 to num_classes − 1.
    """

    train: Sequences
    validation: Sequences
    test: Sequences
    num_classes: int

    @property
    def input_size(self) -> tuple[int, ...]:  # type: ignore[override]
        """(1, T, F), T of the longest example to train on."""
        return (1, *self.train.values.shape[1:])

    def model_arguments(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "input_size": self.input_size[2]}

    def size(self, part: Part) -> int:
        return len(getattr(self, part))

    def to(self, device: torch.device) -> "SequenceData":
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def training(self, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> "SequenceBatches":
        return SequenceBatches(self.train, batch_size, shuffle=True, seed=seed, rank=rank, ranks=ranks)

    def evaluation(self, part: Part, rank: int = 0, ranks: int = 1) -> "SequenceBatches":
        return SequenceBatches(getattr(self, part), 500, rank=rank, ranks=ranks)


class SequenceBatches:
    """Batches (N, T, F) float32, lengths (N,) where they differ, and labels (N,).

    T is that of the longest sequence of the batch. In training the order follows from (seed, epoch) alone.

    Args:
        sequences: what to go through.
        batch_size: sequences a batch; the last may be smaller.
        shuffle: a new order every epoch.
        seed: of the order.
        rank: whose share of every batch to give.
        ranks: how many ranks share it. In training a last batch with fewer sequences than ranks is left out.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.sequences = sequences
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.sequences), self.batch_size)
        return full + (rest >= self.ranks if self.shuffle else rest > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # On the CPU and before the ranks share it, so that every device and every number of ranks sees the same.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.sequences)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for batch in order.split(self.batch_size)[: len(self)]:
            own = batch.tensor_split(self.ranks)[self.rank]
            if not len(own):  # only in evaluation
                return
            part = self.sequences[own.to(self.sequences.labels.device)]
            if part.lengths is None:
                yield part.values, part.labels
            else:
                yield part.values[:, : int(part.lengths.max())], part.lengths, part.labels


def normalized(name: str, train: Sequences, validation: Sequences, test: Sequences, num_classes: int) -> SequenceData:
    """A data set in which each feature has mean 0 and standard deviation 1 over the steps of the training part.

    Raises:
        InputError: a part is empty, a sequence has no steps, or a value is NaN or infinite.
    """
    for part, sequences in (("training", train), ("validation", validation), ("test", test)):
        if not len(sequences):
            raise InputError(f"data {name}: the {part} part is empty")
        if sequences.lengths is not None and int(sequences.lengths.min()) < 1:
            empty = int(sequences.lengths.argmin())
            raise InputError(f"data {name}: sequence {empty} of the {part} part has no steps")
        broken = (~torch.isfinite(sequences.values)).flatten(1).any(1).nonzero().flatten()
        if len(broken):
            raise InputError(
                f"data {name}: {len(broken)} of {len(sequences)} sequences of the {part} part hold values that are "
                f"NaN or infinite, the first at position {int(broken[0])}"
            )
    steps = train.steps()
    # A sensor that never moves stays at zero.
    mean, std = steps.mean(0), steps.std(0).clamp(min=1e-6)
    train, validation, test = (replace(part, values=(part.values - mean) / std) for part in (train, validation, test))
    return SequenceData(train, validation, test, num_classes)


HAR_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
HAR_STEPS = 128
HAR_PAGE = "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones"


def har6(root: str = "data/UCI HAR Dataset") -> SequenceData:
    """UCI HAR: what a person with a telephone at the waist is doing, from 2.56 s of 9 inertial signals at 50 Hz.

    128 steps × 9: acceleration of the body, rotation, total acceleration. Classes 0 to 5: walking,
    walking upstairs, walking downstairs, sitting, standing, laying. The test part is the archive's;
    the last fifth of its training windows is the validation part. They are in the order of the persons, so
    hardly anyone is in both. Each signal is normalised on the training part.

    Args:
        root: the folder "UCI HAR Dataset" of the archive, with `train/Inertial Signals` and so on.

    Raises:
        InputError: a file is missing, or does not hold what the others do.

    Source: Anguita et al., "A Public Domain Dataset for Human Activity Recognition Using Smartphones",
    ESANN 2013; https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones.
    """
    train, test = _read_har(Path(root), "train"), _read_har(Path(root), "test")
    keep = len(train) - len(train) // 5
    order = torch.arange(len(train))
    return normalized("UCI HAR", train[order[:keep]], train[order[keep:]], test, num_classes=6)


def har2(root: str = "data/UCI HAR Dataset") -> SequenceData:
    """HAR-2, the two classes that FastGRNN and STR report on: everything else as `har6`.

    Class 0 is sitting, laying and walking upstairs, class 1 standing, walking and walking downstairs.

    Source: Kusupati et al., "FastGRNN", NeurIPS 2018, appendix B.
    """
    merged = torch.tensor([1, 0, 1, 0, 1, 0])
    six = har6(root)
    train, validation, test = (
        replace(part, labels=merged[part.labels]) for part in (six.train, six.validation, six.test)
    )
    return SequenceData(train, validation, test, num_classes=2)


def _read_har(root: Path, part: str) -> Sequences:
    folder = root / part
    paths = [folder / "Inertial Signals" / f"{signal}_{part}.txt" for signal in HAR_SIGNALS]
    labels = folder / f"y_{part}.txt"
    missing = [path for path in (*paths, labels) if not path.is_file()]
    if missing:
        raise InputError(
            f"data UCI HAR: {missing[0]} is missing ({len(missing)} of {len(paths) + 1} files of the part are); unpack "
            f'"UCI HAR Dataset.zip" from {HAR_PAGE} and name its folder with data.root'
        )
    numbers = [_read_table(path) for path in paths]
    targets = _read_table(labels).flatten()
    for path, table in zip(paths, numbers, strict=True):
        if table.shape != (len(targets), HAR_STEPS):
            raise InputError(
                f"data {path}: holds a table of {' × '.join(map(str, table.shape))} numbers; with the {len(targets)} "
                f"labels of {labels.name} it must be {len(targets)} × {HAR_STEPS}; unpack the archive again"
            )
    if not bool(torch.isin(targets, torch.arange(1.0, 7.0)).all()):
        raise InputError(f"data {labels}: labels must be from 1 to 6; unpack the archive again")
    return Sequences(torch.stack(numbers, dim=2), targets.long() - 1)


def _read_table(path: Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.loadtxt(path, dtype=np.float32, ndmin=2))
    except (OSError, ValueError) as error:
        raise InputError(f"data {path}: cannot be read ({error}); unpack the archive again") from error


WATCH_WINDOW, WATCH_STRIDE = 100, 50
"""Steps of a window, 2 s, and steps from one to the next."""


def watch() -> SequenceData:
    """Seven shoulder exercises of ten persons, from the watch on their wrist: windows of 2 s at 50 Hz, 6 signals.

    The 140 recordings inside the package seglearn, cut into windows of 100 steps, each 50 after the one
    before. Persons 1 to 6 are the training part, 7 the validation part, 8 to 10 the test part.
    Each signal is normalised on the training part.

    Raises:
        InputError: seglearn is not installed.

    Source: Burns et al., "Shoulder Physiotherapy Exercise Recognition", 2018, arXiv 1802.01489.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError as error:
        raise InputError("data watch is inside the package seglearn: pip install seglearn") from error
    recorded: dict[str, Any] = load_watch()

    def part(persons: Sequence[int]) -> Sequences:
        series = zip(recorded["X"], recorded["y"], recorded["subject"], strict=True)
        cut = [(windows(torch.from_numpy(x).float()), int(y)) for x, y, person in series if int(person) in persons]
        labels = torch.cat([torch.full((len(values),), label) for values, label in cut])
        return Sequences(torch.cat([values for values, _ in cut]), labels)

    return normalized("watch", part(range(1, 7)), part([7]), part(range(8, 11)), num_classes=7)


def windows(series: Tensor, width: int = WATCH_WINDOW, stride: int = WATCH_STRIDE) -> Tensor:
    """A series (T, F) cut into windows (N, width, F); what does not fill one is left out.

    Examples:
        >>> windows(torch.zeros(250, 6)).shape
        torch.Size([4, 100, 6])
    """
    if len(series) < width:
        return series.new_empty(0, width, series.shape[1])
    return series.unfold(0, width, stride).transpose(1, 2).contiguous()
