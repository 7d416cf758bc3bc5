"""What really happened, line by line in files that only grow and are on the disk at once.

``C`` what was asked: requests whose transaction was committed
``P`` calls of the provider: that they began, and how they were answered
``K`` callbacks: each delivery of one, and the status that our view answered
``H`` what the trigger's handler did, told outside the transaction it did it in
``D`` what was done to the processes: kills, sleeps, outages
``W`` what was done to calls on their way to QStash
``A`` the database's connections, looked at again and again
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any


class Ledger:
    """Several processes may write one. Times are of the machine's one monotonic clock."""

    def __init__(self, folder: Path | str, name: str) -> None:
        self.path = Path(folder) / name
        self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._lock = threading.Lock()

    def write(self, **facts: Any) -> None:
        """Returns when the disk has it."""
        line = json.dumps({"at": time.monotonic(), **facts}, default=str).encode() + b"\n"
        with self._lock:
            os.write(self._file, line)
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read(folder: Path | str, name: str) -> list[dict[str, Any]]:
    """All whole lines up to now; none where nobody has written."""
    path = Path(folder) / name
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
