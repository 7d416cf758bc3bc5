"""What really happened, told by somebody who is never killed.

``python -m tests.server.ledger FILE`` is a provider, and a receiver of callbacks, in a process of
its own. It writes each call down when it came and before it is answered, and prints its address.
``Ledger`` reads that.

How the provider behaves is said by the URL: ``/provider/?latency=0.2&failures=1&status=429``
answers after 0.2 s, and with 429 while ``Upstash-Retried`` is less than 1. With ``then``, a
second call for the same attempt takes that long and gets 200, whatever the first one got.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from django_qstash_llm.qstash import Callback

# --- who writes ------------------------------------------------------------------------------


class Scribe:
    """Appends a line at a time, and does not return before the disk has it."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._lock = threading.Lock()
        self._calls = 0
        self._attempts: Counter[Attempt] = Counter()

    def began(self, attempt: Attempt, **facts: Any) -> tuple[int, int]:
        """The call's number, and how many there were for its attempt, this one included."""
        with self._lock:
            self._calls += 1
            self._attempts[attempt] += 1
            number, calls = self._calls, self._attempts[attempt]
            self._write(call=number, message=attempt.message, retried=attempt.retried, **facts)
        return number, calls

    def answered(self, number: int, status: int) -> None:
        with self._lock:
            self._write(call=number, status=status)

    def _write(self, **facts: Any) -> None:
        line = json.dumps({"at": time.monotonic(), **facts}).encode() + b"\n"
        os.write(self._file, line)
        os.fsync(self._file)


class Destination(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scribe: Scribe

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        attempt = Attempt(
            self.headers["Upstash-Message-Id"], int(self.headers["Upstash-Retried"] or 0)
        )
        asked = dict(parse_qsl(url.query, keep_blank_values=True))
        facts = _told(body) if url.path == "/callback/" else {}
        number, calls = self.scribe.began(attempt, path=url.path, asked=asked, **facts)
        is_second = calls > 1 and "then" in asked
        time.sleep(float(asked["then"] if is_second else asked.get("latency", 0)))
        is_failure = not is_second and attempt.retried < int(asked.get("failures", 0))
        status = int(asked.get("status", 500)) if is_failure else 200
        self.scribe.answered(number, status)
        self._answer(status, f"answer {number}".encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status >= 300:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _told(body: bytes) -> dict[str, Any]:
    callback = Callback.from_json(body)
    return {
        "source": callback.source_message_id,
        "told": [callback.retried, callback.status, callback.body.decode()],
        "is_last": bool(callback.dlq_id) or callback.status == 200,
    }


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever called was killed meanwhile. That is what this is for.
        pass


def serve(path: str) -> None:
    Destination.scribe = Scribe(path)
    server = Server(("127.0.0.1", 0), Destination)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


# --- who reads -------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """What is called once, unless somebody died over it."""

    message: str
    retried: int


@dataclass(kw_only=True)
class Call:
    number: int
    attempt: Attempt
    path: str
    asked: dict[str, str]
    """The query: how the destination was to behave, and whatever the test tells itself."""
    source: str = ""
    told: tuple[int, int, str] = (0, 0, "")
    """What a callback says of its source: retried, status, body."""
    is_last: bool = False
    """A callback that says how its source ended."""
    began: float
    ended: float = float("inf")
    """When it was answered, or when its engine died if that was before."""
    status: int = 0

    @property
    def is_callback(self) -> bool:
        return self.path == "/callback/"


@dataclass(frozen=True)
class Death:
    """Of an engine, and the attempts that it held."""

    at: float
    held: frozenset[Attempt]


@dataclass
class Ledger:
    path: Path
    calls: dict[int, Call] = field(default_factory=dict)
    _read: int = 0

    def read(self) -> list[Call]:
        """All calls up to now."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._add(json.loads(line))
        return list(self.calls.values())

    def _add(self, entry: dict[str, Any]) -> None:
        at, number = entry.pop("at"), entry.pop("call")
        if "path" not in entry:
            call = self.calls[number]
            call.ended, call.status = at, entry["status"]
            return
        attempt = Attempt(entry.pop("message"), entry.pop("retried"))
        told = tuple(entry.pop("told", ())) or (0, 0, "")
        self.calls[number] = Call(number=number, attempt=attempt, told=told, began=at, **entry)

    def by_attempt(self) -> dict[Attempt, list[Call]]:
        calls: dict[Attempt, list[Call]] = {}
        for call in self.read():
            calls.setdefault(call.attempt, []).append(call)
        return calls

    def bury(self, deaths: Iterable[Death]) -> None:
        """End the calls that an engine had open when it died: nobody waits for those answers."""
        by_attempt = self.by_attempt()
        buried: set[int] = set()
        for death in deaths:
            for attempt in death.held:
                # The first that is left is the dead one's: others came after. A little later, for
                # what lay in a socket's buffer.
                began = [c for c in by_attempt.get(attempt, []) if c.began < death.at + 0.2]
                for call in [c for c in began if c.number not in buried][:1]:
                    buried.add(call.number)
                    call.ended = min(call.ended, death.at)


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    edges = sorted(
        edge for began, ended in spans if ended > began for edge in ((ended, -1), (began, 1))
    )
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def most_within(seconds: float, moments: Sequence[float]) -> int:
    """How many of them lie in one stretch of so many seconds, at most."""
    ordered, first, most = sorted(moments), 0, 0
    for last, moment in enumerate(ordered):
        while ordered[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


if __name__ == "__main__":
    serve(sys.argv[1])
