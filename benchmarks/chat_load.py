"""The load of ``benchmarks/chat.py``: a process of its own that asks the same again and again.

    python benchmarks/chat_load.py PORT CONNECTIONS COUNT < request

The request is one HTTP request as bytes. Each connection is kept, and sends it once more when the
answer has come to its end, until ``COUNT`` were asked. Prints one JSON object, all times in seconds;
of streams also what the moments in their chunks tell (see ``chat_provider``).
"""

from __future__ import annotations

import gc
import json
import re
import selectors
import socket
import sys
import time

PATIENCE = 60.0
"""Seconds without any answer after which there is no use in waiting."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_MOMENT = re.compile(rb"@(\d+)@")


class Connection:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self.received, self.read = bytearray(), 0
        self.first = 0.0
        self.lags: list[float] = []
        self.began = time.monotonic()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Whether the answer is whole."""
        received = self.socket.recv(262_144)
        now = time.monotonic()
        if not received:
            sys.exit(f"a connection was closed: {bytes(self.received[-500:])!r}")
        self.received += received
        for moment in _MOMENT.finditer(self.received, self.read):
            self.first = self.first or now - self.began
            self.lags.append(now - int(moment[1]) / 1e9)
            self.read = moment.end()
        return self.is_whole()

    def is_whole(self) -> bool:
        if self.received.endswith(b"\r\n0\r\n\r\n"):
            return True
        ends = self.received.find(b"\r\n\r\n")
        length = _LENGTH.search(self.received, 0, ends + 2) if ends >= 0 else None
        return length is not None and len(self.received) >= ends + 4 + int(length[1])


def main() -> None:
    port, connections, count = map(int, sys.argv[1:])
    request = sys.stdin.buffer.read()
    selector = selectors.DefaultSelector()
    told: dict[str, list[object]] = {"latencies": [], "firsts": [], "lags": [], "refused": []}
    gc.disable()
    opened = [Connection(port) for _ in range(connections)]
    began = time.monotonic()
    for connection in opened:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(request)
    sent = connections
    while len(told["latencies"]) < count:
        events = selector.select(PATIENCE)
        if not events:
            sys.exit(f"nothing came for {PATIENCE:g} seconds")
        for key, _ in events:
            connection = key.data
            if not connection.receive():
                continue
            told["latencies"].append(time.monotonic() - connection.began)
            told["firsts"].append(connection.first)
            told["lags"].append(connection.lags)
            if not connection.received.startswith(b"HTTP/1.1 200 "):
                told["refused"].append(connection.received[:800].decode("latin-1"))
            if sent < count:
                sent += 1
                connection.send(request)
    print(json.dumps({**told, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
