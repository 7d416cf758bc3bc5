"""The provider of ``benchmarks/chat.py``: as little HTTP as will do, in a process of its own.

    python benchmarks/chat_provider.py

Prints its port. A whole answer comes at once. A stream has ``CHUNKS`` chunks, which the model named
``paced-5`` sends five milliseconds apart, the first at once; each holds the moment of its sending,
by a clock that all processes share.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

CHUNKS = 50
WORDS = "Both, and a tale is told of them."
_PACE = re.compile(rb'"model": ?"paced-(\d+)"')
_STREAM = re.compile(rb'"stream": ?true')
_LENGTH = re.compile(rb"content-length: *(\d+)")
USAGE = {"prompt_tokens": 130, "completion_tokens": 80, "total_tokens": 210}
HEAD = {
    "id": "chatcmpl-benchmark",
    "created": 1_790_000_000,
    "model": "gpt-5.4-mini-2026-03-17",
    "service_tier": "default",
}


def answer() -> bytes:
    message = {"role": "assistant", "content": WORDS * 15, "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = json.dumps(
        HEAD | {"object": "chat.completion", "choices": [choice], "usage": USAGE}
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def event(**told: Any) -> bytes:
    written = json.dumps(HEAD | {"object": "chat.completion.chunk", **told}, separators=(",", ":"))
    return b"data: " + written.encode() + b"\n\n"


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event(choices=[choice])


def piece(data: bytes) -> bytes:
    """Of a body whose length nobody knows beforehand."""
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = answer()
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
FIRST = chunk({"role": "assistant", "content": "@0@"})
CONTENT = chunk({"content": "@0@"})
LAST = (
    piece(chunk({}, "stop"))
    + piece(event(choices=[], usage=USAGE))
    + piece(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


class Provider(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (head_ends := self.received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.received[:head_ends].lower())
            ends = head_ends + 4 + (int(length[1]) if length else 0)
            if len(self.received) < ends:
                return
            body, self.received = self.received[head_ends + 4 : ends], self.received[ends:]
            if _STREAM.search(body) is None:
                self.transport.write(ANSWER)
                continue
            pace = _PACE.search(body)
            self.transport.write(STREAM_HEAD)
            self.say(0, int(pace[1]) / 1000 if pace else 0.0, asyncio.get_running_loop().time())

    def say(self, number: int, pace: float, began: float) -> None:
        if self.transport.is_closing():
            return
        if number == CHUNKS:
            self.transport.write(LAST)
            return
        moment = b"@%d@" % time.monotonic_ns()
        self.transport.write(piece((CONTENT if number else FIRST).replace(b"@0@", moment)))
        due = began + (number + 1) * pace
        asyncio.get_running_loop().call_at(due, self.say, number + 1, pace, began)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
