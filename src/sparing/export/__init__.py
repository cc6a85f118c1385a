"""Export trained networks to smaller files and faster runtimes.

`compressed` requires only torch and safetensors (and NumPy, which safetensors uses to write files). Every other
module names the packages of the extra `sparing[export]` that it requires, and is imported at first use.
"""

from importlib import import_module
from typing import Any

from sparing.export import compressed

MODULES = ("inputs", "mnn", "network", "onnx", "openvino", "runtimes", "shrink", "str_release")

__all__ = ["compressed"]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
