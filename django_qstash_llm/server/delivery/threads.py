from __future__ import annotations

import queue
import threading
from collections.abc import Callable

IDLE_FOR = 10.0
"""Seconds that a thread waits for its next call before it ends."""


class Threads:
    """As many as there are calls at once, and used again: to start one costs a tenth of a call.

    Daemons: a call that lasts two hours must not keep the process from ending, which the
    standard library's executor would.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def begin(self, work: Callable[[], None]) -> None:
        """Raises ``RuntimeError`` when there can be no more threads."""
        if self._idle.acquire(blocking=False):
            self._work.put(work)
        else:
            threading.Thread(
                target=self._run, args=(work,), name="qstash-call", daemon=True
            ).start()

    def _run(self, work: Callable[[], None]) -> None:
        while True:
            work()
            self._idle.release()
            try:
                work = self._work.get(timeout=IDLE_FOR)
            except queue.Empty:
                if self._idle.acquire(blocking=False):
                    return
                # Somebody counted on this thread at this very moment.
                work = self._work.get()
