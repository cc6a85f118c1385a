"""Stop a run by a signal, after its state is saved."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SAVED = 75
"""Exit status of a command that a signal stopped after it saved everything: EX_TEMPFAIL, "try again later"."""

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C; the end of a job; the warning that SLURM sends before it preempts a job (`--signal`)."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the state of the run is saved")


class StopSignals:
    """Context in which the first signal asks to stop, and a second Ctrl-C ends the process at once.

    Outside of the main thread Python handles no signals, so nothing changes there. Signals that the process
    ignores, as under nohup, remain ignored.

    Attributes:
        received: number of the last signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that loads data; the main process tells it to end
            return
        self.received = number
        text = f"sparing: {signal.Signals(number).name}: saving the run after this step"
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            text += "; press Ctrl-C again to leave at once"
        os.write(2, f"{text}\n".encode())  # print() may not be called while another print() is interrupted
