"""Callbacks for other training frameworks, and models of timm.

`SparsityCallback` is that of transformers; the module `lightning` has its own.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `SparsityCallback` when it is asked for: transformers takes seconds to import, and is not required."""
    if name == "SparsityCallback":
        from sparing.integrations.huggingface import SparsityCallback

        return SparsityCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
