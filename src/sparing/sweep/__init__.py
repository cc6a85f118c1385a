"""Hyperparameter sweeps: train one recipe with many settings and find the Pareto front.

A sweep is an Optuna study with two objectives: maximize the validation accuracy and minimize the nonzero
weights or the MACs. A worker is a process that takes trials from the study's database and trains each of
them in its own run directory. Any number of workers can share one database. Workers send heartbeats to
it; if they stop, the next free worker continues the trial, in the same run directory if it can access it.

Requires the extra `sparing[sweep]`.
"""

from sparing.sweep.file import Range, Sweep, load_sweep
from sparing.sweep.worker import run_sweep

__all__ = ["Range", "Sweep", "load_sweep", "run_sweep"]
