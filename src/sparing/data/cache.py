"""Files that keep what is slow to compute."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparing.errors import InputError, SparsityWarning
from sparing.files import atomic_write, open_regular


def cached(path: Path, key: object, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `compute()`, or those in a file that was written for the same key.

    A file that is damaged or has another key is replaced. If it cannot be written, a warning says so.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    try:
        with open_regular(path), safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == digest:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError):
        pass
    tensors = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"key": digest})
    except (OSError, InputError) as error:
        warnings.warn(f"{error}; every run computes its content again", SparsityWarning, stacklevel=2)
    return tensors
