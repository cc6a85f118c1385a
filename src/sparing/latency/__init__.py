"""Measure the latency of a sparse network in the engine, in MNN and in dense runtimes."""

from sparing.latency.backends import BACKENDS, Backend
from sparing.latency.machine import machine
from sparing.latency.measuring import SWEEP, available, measure, measure_briefly
from sparing.latency.timings import Latency, Timing

__all__ = ["BACKENDS", "SWEEP", "Backend", "Latency", "Timing", "available", "machine", "measure", "measure_briefly"]
