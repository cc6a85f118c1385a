"""Find the rank that stopped.

A collective operation waits for every rank. If one of them hangs, the others would wait for it in silence, for as long
as the timeout of the backend, and then fail without naming it. So a thread of each rank reports to rank 0 every few
seconds how many collective operations its rank has entered.
"""

import os
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

INTERVAL = 2.0
"""Seconds between two reports."""

ANOTHER_ENDED = (
    "another rank has ended, so this one ends too; its own message, or its launcher, says why. Continue the run with "
    "--resume auto"
)

_RUNNING, _LEAVING, _FAILED = 0, 1, 2
_GO_ON, _ALL_LEAVE, _ONE_FAILED, _LOST = -1, -2, -3, -4


class Watch:
    """Thread that ends the process, with a message, if a rank does not answer or does not go on.

    A rank that does not answer is stopped as a whole, or its host or network is. A rank that does not go on answers,
    but the others have waited for it in a collective operation: it waits for a disk, for example.

    Args:
        rank: number of this process.
        count: number of ranks.
        timeout: seconds after which a rank counts as stopped.

    Attributes:
        entered: number of collective operations that this rank has entered. Its main thread counts them.
    """

    def __init__(self, rank: int, count: int, timeout: float) -> None:
        self.entered = 0
        self._rank = rank
        self._count = count
        self._timeout = timeout
        self._state = _RUNNING
        self._wake = threading.Event()
        self._group = dist.new_group(backend="gloo")  # operations of two threads must not mix
        self._behind: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, name="sparing watch", daemon=True)
        self._thread.start()

    def leave(self, failed: bool) -> bool:
        """Stop watching, because the work is done on all ranks, or because it failed on this one.

        Returns:
            Whether the thread has ended. Otherwise the process group must not be destroyed.
        """
        self._state = _FAILED if failed else _LEAVING
        self._wake.set()
        self._thread.join(3 * INTERVAL if failed else self._timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        report = self._collect if self._rank == 0 else self._send
        while True:
            state = self._state
            try:
                verdict = report(state)
            except RuntimeError:  # the connection was closed
                verdict = _LOST
            if verdict in (_ONE_FAILED, _LOST):
                time.sleep(INTERVAL)  # the main thread may be about to end with a message of its own
            if verdict == _ALL_LEAVE or state == _FAILED or self._state == _FAILED:
                return
            if verdict in (_ONE_FAILED, _LOST):
                if verdict == _LOST and self._state == _RUNNING:
                    os.write(2, f"sparing: rank {self._rank}: {ANOTHER_ENDED}\n".encode())
                os._exit(1)
            if verdict != _GO_ON:
                self._end(verdict)
            self._wake.wait(INTERVAL if self._state == _RUNNING else 0.01)

    def _send(self, state: int) -> int:
        """Report to rank 0 and return its verdict."""
        verdict = torch.zeros(1, dtype=torch.int64)
        sent = dist.isend(torch.tensor([state, self.entered]), 0, group=self._group)
        # Rank 0 waits for `timeout`, so it names another rank before this one names rank 0.
        if not _wait(dist.irecv(verdict, 0, group=self._group), 1.2 * self._timeout + 2 * INTERVAL):
            return 0
        del sent  # the tensor had to live until here
        return int(verdict)

    def _collect(self, state: int) -> int:
        """Receive the reports of all ranks, send them the verdict, and return it."""
        reports = [(state, self.entered)]
        answering = []
        verdict = _GO_ON
        for rank in range(1, self._count):
            report = torch.zeros(2, dtype=torch.int64)
            if _wait(dist.irecv(report, rank, group=self._group), self._timeout):
                answering.append(rank)
            else:
                verdict = rank
                break
            reports.append((int(report[0]), int(report[1])))
        if verdict == _GO_ON:
            verdict = self._judge(reports)
        works = [dist.isend(torch.tensor([verdict]), rank, group=self._group) for rank in answering]
        for work in works:
            _wait(work, INTERVAL)
        return verdict

    def _judge(self, reports: list[tuple[int, int]]) -> int:
        states = [state for state, _ in reports]
        if _FAILED in states:
            return _ONE_FAILED
        if all(state == _LEAVING for state in states):
            return _ALL_LEAVE
        entered = [number for _, number in reports]
        now = time.monotonic()
        for rank, number in enumerate(entered):
            # Before the first operation, ranks may need different times to read their data.
            if number in (0, max(entered)) or self._behind.get(rank, (None, 0))[0] != number:
                self._behind[rank] = (number, now)
            elif now - self._behind[rank][1] > self._timeout:
                return self._count + rank
        return _GO_ON

    def _end(self, verdict: int) -> None:
        rank = verdict % self._count
        what = "does not answer" if verdict < self._count else "does not go on: the other ranks have waited for it"
        if rank == self._rank or self._rank == (1 if rank == 0 else 0):  # one rank prints, and the one concerned
            text = f"sparing: rank {rank} {what} for {self._timeout:g} s (rank_timeout), so the run ends; continue it "
            os.write(2, f"{text}with --resume auto\n".encode())
        os._exit(1)


def _wait(work: "dist.Work | None", seconds: float) -> bool:
    """Wait for an operation, and return whether it ended in time.

    Raises:
        RuntimeError: the connection was closed.
    """
    assert work is not None
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        if "imed out" in str(error):
            return False
        raise
    return True
