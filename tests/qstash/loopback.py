"""A real HTTP server on 127.0.0.1, for what only a socket can show: it remembers what it was
asked and answers, or misbehaves, as it is told."""

from __future__ import annotations

import json
import select
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    """As it stood in the request line: not decoded, with its query."""
    headers: dict[str, str] = field(repr=False)
    """Names in lower case."""
    body: bytes

    @property
    def said(self) -> dict[str, str]:
        """The headers that mean something to QStash, without those every HTTP client sends."""
        of_any_client = {"host", "user-agent", "accept", "accept-encoding", "connection"}
        return {
            name: value
            for name, value in self.headers.items()
            if name not in of_any_client | {"content-length"}
            and not name.startswith("upstash-telemetry-")
        }


Behaviour = Callable[[Request, socket.socket], None]


def answering(answer: Any = None, *, status: int = 200) -> Behaviour:
    """Answers with JSON, the same to everyone or what a function makes of the request."""

    def behave(request: Request, connection: socket.socket) -> None:
        content = json.dumps(answer(request) if callable(answer) else answer).encode()
        head = (
            f"HTTP/1.1 {status} Said\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + content)

    return behave


def resetting(request: Request, connection: socket.socket) -> None:
    """Hangs up without a word, with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def cutting(request: Request, connection: socket.socket) -> None:
    """Begins an answer and hangs up."""
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"messageId":')


def dripping(request: Request, connection: socket.socket) -> None:
    """Sends an answer a byte at a time, for as long as the other side listens."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" ")
        hung_up, _, _ = select.select([connection], [], [], 0.02)
        if hung_up:
            return


class _Server(socketserver.ThreadingTCPServer):
    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.requests: list[Request] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        # That the other side hung up is what some tests are about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with self.request.makefile("rb") as stream:
            method, target, _ = stream.readline().decode("ascii").split(" ")
            lines = iter(lambda: stream.readline().decode("ascii").strip(), "")
            pairs = (line.split(":", 1) for line in lines)
            headers = {name.lower(): value.strip() for name, value in pairs}
            body = stream.read(int(headers.get("content-length", 0)))
        request = Request(method, target, headers, body)
        self.server.requests.append(request)
        self.server.behaviour(request, self.request)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[_Server]:
    with _Server(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
