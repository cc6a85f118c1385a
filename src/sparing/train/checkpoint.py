"""Checkpoints: one file, whole or not at all, and no code in it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.errors import CheckpointError
from sparing.files import atomic_write

FORMAT = 3


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; a crash leaves the old file as it was."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. No code in the file is run.

    Raises:
        CheckpointError: the file is missing, truncated, of a newer format, or none of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises almost anything on a damaged file: RuntimeError, UnpicklingError, EOFError, KeyError ...
    except Exception as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise CheckpointError(f"checkpoint {path}: unreadable or truncated ({reason})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"checkpoint {path}: was not written by sparing")
    if content["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: has format {content['format']}; this version reads {FORMAT}")
    return content


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random generators of the CPU and of the device, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: list[dict[str, Tensor]], rank: int, device: torch.device) -> None:
    """Put back what `random_state` returned on the rank; a rank that there was not keeps its own."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and "cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["cuda"], device)
