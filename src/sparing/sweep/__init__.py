"""Sweeps: one recipe at many settings, and which of them nothing beats in accuracy and cost at once.

A sweep is an Optuna study of two objectives: accuracy on the validation part, up, and nonzero weights or
MACs, down. A worker is a process that takes trial after trial from the study's database, each a run
directory of its own; as many may work on one study as can reach the database. Workers tell the database
that they live. The trial of one that went silent is given to the next, which continues its run where it
finds its directory.

Needs the extra `sparing[sweep]`.
"""

from sparing.sweep.file import Range, Sweep, load_sweep
from sparing.sweep.worker import run_sweep

__all__ = ["Range", "Sweep", "load_sweep", "run_sweep"]
