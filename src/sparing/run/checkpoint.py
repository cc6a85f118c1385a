"""Checkpoints: written atomically, with a checksum, the last few kept, loaded with weights_only=True.

A checkpoint is a file of `torch.save`, which is a zip archive. The comment of the archive is the SHA-256 of all bytes
before the comment and its length, so a file in which any bit has changed is refused. `torch.load` reads such a file.
"""

import hashlib
import os
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sparing.errors import CheckpointError, InputError, SparsityWarning
from sparing.files import atomic_write

FORMAT = 4
_DIGEST_SIZE = 64
"""Length of a SHA-256 in hexadecimal digits."""
_END = struct.Struct(f"<H{_DIGEST_SIZE}s")
"""The end of a file: the length of the comment, and the comment."""


def save_checkpoint(path: str | Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write tensors and plain values to a file, atomically: a crash leaves the old file intact.

    Args:
        path: the file.
        content: tensors, numbers, strings, and lists, tuples and dicts of them.
        keep: number of checkpoints to keep: `checkpoint.pt` and, before it is replaced, `checkpoint.1.pt`, ...

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    writer = _Writer()
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb+") as writer.file:
                torch.save({"format": FORMAT, **content}, writer)  # type: ignore[arg-type]
                writer.file.seek(-2, os.SEEK_END)  # the length of the comment, which is 0 so far
                end = writer.file.tell()
                writer.file.write(_END.pack(_DIGEST_SIZE, _digest(writer.file, end)))
            _rotate(path, keep)
    except (InputError, RuntimeError) as error:
        cause = writer.error or error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(
            f"checkpoint {path}: cannot be written ({cause.strerror}); the checkpoints written before are kept"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without running code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or not written by `save_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file")
    if (damage := _damage(path)) is not None:
        raise _DamagedError(f"checkpoint {path}: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A file that was made by hand, with a right checksum, can raise errors of many types.
    except Exception as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise _DamagedError(f"checkpoint {path}: unreadable ({reason})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"checkpoint {path}: was not written by sparing")
    if content["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: has format {content['format']!r}; this version reads {FORMAT}")
    return content


def load_newest(path: str | Path) -> tuple[dict[str, Any], Path]:
    """Load the newest checkpoint that is not damaged, and return it with its path.

    Args:
        path: the newest checkpoint; those before it are found by their names, see `save_checkpoint`.

    Raises:
        CheckpointError: there is none, or all are damaged, or the newest one is of another format.

    Warns:
        SparsityWarning: a damaged or missing file is passed over.
    """
    path = Path(path)
    candidates = [path, *_older(path)]
    failures: list[CheckpointError] = []
    for candidate in candidates:
        if candidate == path and not candidate.is_file() and len(candidates) > 1:
            failures.append(CheckpointError(f"checkpoint {path}: there is no such file"))
            continue
        try:
            content = load_checkpoint(candidate)
        except _DamagedError as error:
            failures.append(error)
            continue
        if failures:
            warnings.warn(
                f"{'; '.join(map(str, failures))}. Using the checkpoint before, {candidate}",
                SparsityWarning,
                stacklevel=2,
            )
        return content, candidate
    raise CheckpointError("; ".join(map(str, failures)))


def checkpoint_exists(path: Path) -> bool:
    """Return whether there is a checkpoint, or one before it, damaged or not."""
    return path.is_file() or bool(_older(path))


def seed_all(seed: int) -> None:
    """Seed the random generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the random generators of torch (of the CPU and the device), Python and NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class _DamagedError(CheckpointError):
    """A checkpoint whose content has changed since it was written; the one before it may be intact."""


class _Writer:
    """File for `torch.save` that remembers an OSError: torch raises another error in its place."""

    file: BinaryIO
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _digest(file: BinaryIO, end: int) -> bytes:
    """Return the SHA-256 of the bytes before `end`, in hexadecimal digits, and leave the file at `end`."""
    file.seek(0)
    digest = hashlib.sha256()
    while (left := end - file.tell()) > 0:
        block = file.read(min(left, 2**20))
        if not block:
            break
        digest.update(block)
    return digest.hexdigest().encode()


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file, as far as it can be told without reading its tensors."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size - _END.size
            if end < 0:
                return "is truncated"
            wanted = _digest(file, end)
            if file.read() != _END.pack(_DIGEST_SIZE, wanted):
                return "is damaged, or not a checkpoint of sparing: its content does not match its checksum"
        with zipfile.ZipFile(path) as archive:
            # Compressed or overlapping entries can unfold into any amount of memory; torch.save writes neither.
            if sum(entry.file_size for entry in archive.infolist()) > size:
                return "declares more content than it has"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except zipfile.BadZipFile as error:
        return f"is damaged ({error})"
    return None


def _name(path: Path, age: int) -> Path:
    return path if age == 0 else path.with_name(f"{path.stem}.{age}{path.suffix}")


def _older(path: Path) -> list[Path]:
    """Return the checkpoints before the newest one, from new to old."""
    prefix, suffix = f"{path.stem}.", path.suffix
    ages = [
        int(age)
        for each in path.parent.glob(f"{path.stem}.*{suffix}")
        if (age := each.name[len(prefix) : -len(suffix)]).isascii() and age.isdigit()
    ]
    return [_name(path, age) for age in sorted(ages)]


def _rotate(path: Path, keep: int) -> None:
    """Rename the checkpoints to make room for a new one, and delete those that are too old."""
    for age in range(keep - 1, 0, -1):
        if (younger := _name(path, age - 1)).is_file():
            younger.replace(_name(path, age))
    for old in _older(path):
        if int(old.stem.rpartition(".")[2]) >= keep:
            old.unlink()
