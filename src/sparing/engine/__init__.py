"""Inference on the CPU whose time follows the number of nonzero weights.

    fast = sparing.engine.compile(model, (1, 3, 224, 224))
    outputs = fast(images)
    sparing.engine.save(fast, "model.engine")
    fast = sparing.engine.load("model.engine")

Convolutions and linear layers multiply by their nonzero weights only, in float32. A C++ compiler is required at the
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.engine.file import load, save
    from sparing.engine.module import Engine, compile

MODULES = {"Engine": "module", "compile": "module", "load": "file", "save": "file"}
"""Name → the module that has it, which is imported at first use."""

__all__ = ["Engine", "compile", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
