"""Per-epoch logging: JSON lines, TensorBoard, console."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from sparing.data import Batches
from sparing.errors import InputError, SparsityWarning
from sparing.files import open_regular, write_text


class _Speed(ProgressColumn):
    """Progress column that shows examples per second."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._batch_size = batch_size

    def render(self, task: Task) -> Text:
        return Text(f"{(task.speed or 0) * self._batch_size:,.0f} examples/s")


class RunLog:
    """Writes one line per epoch to `history.jsonl`, to TensorBoard if it is installed, and to the console.

    Args:
        out: run directory.
        epochs_done: epochs in the checkpoint. Later lines of the history are dropped, since these epochs are trained
            again.
        tensorboard: whether to log to TensorBoard.
        console: console to print to.
    """

    def __init__(self, out: Path, epochs_done: int, tensorboard: bool, console: Console) -> None:
        self.console = console
        self._path = out / "history.jsonl"
        kept = [line for line in read_history(out) if line["epoch"] <= epochs_done]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=epochs_done + 1)  # type: ignore[no-untyped-call]

    def progress(self, batches: Batches, epoch: int, epochs: int, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches while showing a progress bar with examples per second, if the console is a terminal."""
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            _Speed(batch_size), console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        with bar:
            yield from bar.track(batches, len(batches), description=f"epoch {epoch}/{epochs}")

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Log one finished epoch."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            self._to_tensorboard(line)
        accuracy = line["validation_accuracy"]
        validated = "" if accuracy is None else f"validation accuracy {100 * accuracy:6.2f} %  "
        self.console.print(
            f"epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.4f}  "
            f"{validated}sparsity {100 * line['sparsity']:6.2f} %  {line['seconds']:.0f} s  "
            f"{line['examples_per_second']:,.0f} examples/s",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Write what TensorBoard has buffered."""
        if self._board is not None:
            self._board.close()  # type: ignore[no-untyped-call]

    def _to_tensorboard(self, line: dict[str, Any]) -> None:
        assert self._board is not None
        scalars = {key: value for key, value in line.items() if isinstance(value, float)}
        for name, layer in line["layers"].items():
            scalars |= {f"{key}/{name}": value for key, value in layer.items() if value is not None}
        for key, value in scalars.items():
            self._board.add_scalar(key, value, line["epoch"])  # type: ignore[no-untyped-call]


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `history.jsonl`, without a last line that a crash cut short.

    Raises:
        InputError: the file cannot be read.

    Warns:
        SparsityWarning: a line is damaged, and left out.
    """
    path = run / "history.jsonl"
    try:
        with open_regular(path) as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    *complete, last = text.split("\n")
    lines: list[dict[str, Any]] = []
    for number, each in enumerate([*complete, last] if last else complete, start=1):
        try:
            lines.append(_checked(json.loads(each)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if number <= len(complete):
                warnings.warn(f"{path}: line {number} is damaged, and left out", SparsityWarning, stacklevel=2)
    return lines


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a history if it has an epoch, and numbers or nothing for each layer.

    Raises:
        Exception: it has not.
    """
    values = [value for layer in line["layers"].values() for value in layer.values()]
    if type(line["epoch"]) is not int or not all(isinstance(value, (int, float, type(None))) for value in values):
        raise ValueError("no line of a history")
    return line
