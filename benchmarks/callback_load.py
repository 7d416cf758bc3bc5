"""The load of ``benchmarks/callback.py``: a process of its own that sends prepared bytes.

    python benchmarks/callback_load.py PORT FILE CONNECTIONS [RATE]

Without a rate each connection sends its next request when the answer to the last has come. With
one, requests leave at fixed moments whether or not answers have come, and each is timed from the
moment it should have left. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import pickle
import re
import selectors
import socket
import sys
import time
from collections import deque

PATIENCE = 60.0
"""Seconds without any answer after which there is no use in waiting."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Connection:
    """Kept alive; one request at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.received = b""

    def send(self, request: bytes, began: float) -> None:
        self.began, self.received = began, b""
        self.socket.sendall(request)

    def answer(self) -> bytes | None:
        """The whole answer; None while it has not come."""
        received = self.socket.recv(65_536)
        if not received:
            sys.exit("the site closed a connection")
        self.received += received
        head, found, content = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = _LENGTH.search(head + b"\r\n")
        # Without a length it is in chunks: nothing else keeps a connection.
        is_whole = len(content) >= int(length[1]) if length else content.endswith(b"0\r\n\r\n")
        return self.received if is_whole else None


class Load:
    def __init__(self, port: int, requests: list[bytes], connections: int, rate: float) -> None:
        self.selector = selectors.DefaultSelector()
        self.idle: deque[Connection] = deque()
        for _ in range(connections):
            connection = Connection(port)
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)
            self.idle.append(connection)
        self.requests, self.rate = requests, rate
        self.seconds: list[float] = []
        self.refused: list[str] = []

    def run(self) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        sent = 0
        while len(self.seconds) < len(self.requests):
            sent = self.send(sent, began)
            pause = self.pause(sent, began)
            events = self.selector.select(pause)
            if not events and pause == PATIENCE:
                sys.exit(f"the site has not answered for {PATIENCE:g} seconds")
            for key, _ in events:
                self.receive(key.data)
        return time.perf_counter() - began

    def moment(self, index: int, began: float) -> float:
        return began + index / self.rate if self.rate else time.perf_counter()

    def send(self, sent: int, began: float) -> int:
        while sent < len(self.requests) and self.idle:
            moment = self.moment(sent, began)
            if moment > time.perf_counter():
                break
            self.idle.popleft().send(self.requests[sent], moment)
            sent += 1
        return sent

    def pause(self, sent: int, began: float) -> float:
        if not self.rate or sent == len(self.requests) or not self.idle:
            return PATIENCE
        return max(0.0, self.moment(sent, began) - time.perf_counter())

    def receive(self, connection: Connection) -> None:
        answer = connection.answer()
        if answer is None:
            return
        self.seconds.append(time.perf_counter() - connection.began)
        self.idle.append(connection)
        if not answer.startswith(b"HTTP/1.1 200 "):
            self.refused.append(answer[:500].decode("latin-1"))


def main() -> None:
    port, file, connections, *rate = sys.argv[1:]
    with open(file, "rb") as opened:
        requests = pickle.load(opened)  # noqa: S301  our own, written a moment ago
    load = Load(int(port), requests, int(connections), float(rate[0]) if rate else 0.0)
    gc.disable()
    took = load.run()
    print(json.dumps({"seconds": took, "latencies": load.seconds, "refused": load.refused}))


if __name__ == "__main__":
    main()
