"""Files that keep what is slow to compute."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparing.data.base import content_hash
from sparing.errors import InputError, SparsityWarning
from sparing.files import atomic_write, open_regular


def cached(
    path: Path,
    key: object,
    compute: Callable[[], dict[str, Tensor]],
    is_valid: Callable[[dict[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """Return the tensors of `compute()`, or those in a file that was written for the same key.

    A file that is damaged or has another key is replaced. If it cannot be written, a warning says so.

    Args:
        path: the file.
        key: what the tensors are computed from.
        compute: returns the tensors.
        is_valid: returns whether tensors of the file can be those of `compute()`, or raises an error if not. A file
            from somebody else may have the key and checksum of others.
    """
    try:
        with open_regular(path), safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if (file.metadata() or {}).get("key") == checksum(key, found) and is_valid(found):
                return found
    except (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError):
        pass
    tensors = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"key": checksum(key, tensors)})
    except (OSError, InputError) as error:
        warnings.warn(f"{error}; every run computes its content again", SparsityWarning, stacklevel=2)
    return tensors


def checksum(key: object, tensors: dict[str, Tensor]) -> str:
    """Return a checksum of a key and the bytes of tensors."""
    content = content_hash(*(tensors[name] for name in sorted(tensors)))
    return hashlib.sha256(f"{key!r} {content}".encode()).hexdigest()
