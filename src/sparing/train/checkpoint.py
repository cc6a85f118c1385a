"""Atomic checkpoints, loaded with weights_only=True."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.errors import CheckpointError
from sparing.files import atomic_write

FORMAT = 3


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to a file, atomically: a crash leaves the old file intact."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without running code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or not written by `save_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # On a damaged file torch raises errors of many types, such as UnpicklingError, EOFError and KeyError.
    except Exception as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise CheckpointError(f"checkpoint {path}: unreadable or truncated ({reason})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"checkpoint {path}: was not written by sparing")
    if content["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: has format {content['format']}; this version reads {FORMAT}")
    return content


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random generators of the CPU and of the device, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: list[dict[str, Tensor]], rank: int, device: torch.device) -> None:
    """Restore the random state of a rank.

    Args:
        states: results of `random_state`, by rank. A rank beyond them keeps its state.
        rank: number of this process.
        device: device of this process.
    """
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and "cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["cuda"], device)
