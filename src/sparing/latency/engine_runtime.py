"""Run an .engine file in a process of `sparing.export.runtimes`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparing import engine
from sparing.engine.program import resolve
from sparing.export.runtimes import Run, run_module


def load(path: str, threads: int) -> Callable[[list[Any]], Run]:
    """Load an .engine file."""
    torch.set_num_threads(threads)  # for the operators that run in PyTorch
    module = engine.load(path, threads=threads)

    def arrange(tensors: list[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return (), resolve(dict(module.program.arguments), dict(enumerate(tensors)), {}, 1)

    return run_module(module, arrange, torch.inference_mode)
