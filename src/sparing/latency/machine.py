"""Describe the machine of a measurement."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparing.export.network import PACKAGES

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""Processor flags that decide which kernels the runtimes use."""


def machine() -> dict[str, Any]:
    """Return the processor name, its `FLAGS`, the number of logical processors and the package versions."""
    processor, flags = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                processor = value.strip()
            if key.strip() == "flags":
                flags = [flag for flag in FLAGS if flag in value.split()]
    versions = {"torch": str(torch.__version__)}
    for package in PACKAGES.values():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": processor, "flags": flags, "processors": os.cpu_count(), "versions": versions}
