"""The providers that ``benchmarks/ratelimit.py`` drains a backlog at, each in a process of its own.

A fake that enforces whatever is asked of it, and two that others made: ``llmock``, which judges its
clients, and ``testproject/provider.py``. Each tells its address, and then, as often as it is asked,
the calls since the last time and llmock's verdict.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from testproject.provider import Answer, Bucket, Provider, Request, bearer_key, go_duration

CONTEXT = multiprocessing.get_context("spawn")
LATENCY = 0.2
"""Seconds of an answer. Rejections of the fake come at once, as a real provider's do."""


class Call(NamedTuple):
    """One request as the provider saw it. Times are of the monotonic clock, which all share."""

    body: str
    """A fingerprint."""
    began: float
    ended: float
    status: int
    wait: float | None
    """Seconds that a rejection named."""


@dataclass(frozen=True)
class Limits:
    rpm: int = 600
    tpm: int | None = None
    tells: bool = True
    """Whether answers carry rate headers. Without them a 429 has whole seconds to go by."""
    per_second: bool = False
    """The minute's limit is enforced each second: a second's worth is all the burst."""
    counts_rejected: bool = False
    """A rejected request uses the limit up like any other."""
    window: float = 0.0
    """Seconds of a fixed window that the limit is counted in, instead of a bucket."""
    outage: tuple[float, float] = (0.0, 0.0)
    """503 for everybody: from when on after the first call, and for how long."""

    @property
    def burst(self) -> int:
        return self.rpm // 60 if self.per_second else self.rpm


def charge_of(body: bytes) -> int:
    return len(body) // 4 + int(json.loads(body)["max_tokens"])


# --- processes -------------------------------------------------------------------------------


class Child:
    """A process that is spoken to over a pipe, and ends when this end of it does, however."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_child, args=(target, theirs, *arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)

    def tell(self, what: object) -> None:
        self.pipe.send(what)

    def hear(self, seconds: float = 60) -> Any:
        if not self.pipe.poll(seconds):
            sys.exit(f"nothing was heard for {seconds:g} s: no figure can be trusted")
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit("a process of the benchmark broke: no figure can be trusted")

    def ask(self, what: object) -> Any:
        self.tell(what)
        return self.hear()

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)


def _child(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    # Ctrl-C reaches the whole group; the parent is the one to say that this is the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So may others be told to end; what this one began ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        target(pipe, *arguments)


# --- the fake provider -------------------------------------------------------------------------


class Key:
    """What a key may still use. ``admit`` answers the seconds to wait; 0 is a yes."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits, self.first_at = limits, now
        self.requests = Bucket(limits.rpm, capacity=limits.burst, now=now)
        self.tokens = Bucket(limits.tpm, capacity=limits.tpm, now=now) if limits.tpm else None
        self.window, self.used = 0, 0

    def is_down(self, now: float) -> bool:
        begin, length = self.limits.outage
        return begin <= now - self.first_at < begin + length

    def admit(self, charge: int, now: float) -> float:
        if self.limits.window:
            return self._admit_to_window(now)
        self.requests.refill(now)
        wait = self.requests.seconds_until(1)
        if self.tokens:
            self.tokens.refill(now)
            wait = max(wait, self.tokens.seconds_until(charge))
        if not wait:
            self.requests.level -= 1
            if self.tokens:
                self.tokens.level -= charge
        elif self.limits.counts_rejected:
            # A debt, up to a minute's worth: what obeys to the millisecond finds less than it
            # was promised.
            self.requests.level = max(-self.requests.capacity, self.requests.level - 1)
        return wait

    @property
    def per_window(self) -> int:
        return math.floor(self.limits.rpm * self.limits.window / 60)

    def _until_window_ends(self, now: float) -> float:
        return (self.window + 1) * self.limits.window - (now - self.first_at)

    def _admit_to_window(self, now: float) -> float:
        window = int((now - self.first_at) // self.limits.window)
        if window != self.window:
            self.window, self.used = window, 0
        if self.used >= self.per_window:
            return self._until_window_ends(now)
        self.used += 1
        return 0.0

    def headers(self, now: float) -> dict[str, str]:
        if not self.limits.tells:
            return {}
        if self.limits.window:
            left, reset = self.per_window - self.used, self._until_window_ends(now)
            return _rate_headers("requests", self.per_window, left, reset)
        headers = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket:
                until_full = bucket.seconds_until(bucket.capacity)
                left = max(0, bucket.remaining)
                headers |= _rate_headers(name, bucket.limit, left, until_full)
        return headers


def _rate_headers(name: str, limit: int, remaining: int, reset: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": go_duration(reset),
    }


class Fake:
    """Decides, and keeps the journal."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.keys: dict[str, Key] = {}
        self.journal: list[Call] = []

    def answer(self, key: str, body: bytes, now: float) -> tuple[int, dict[str, str], bytes]:
        allowance = self.keys.setdefault(key, Key(self.limits, now))
        if allowance.is_down(now):
            return self._refused(body, now, 503, {}, "The server is overloaded.", None)
        wait = allowance.admit(charge_of(body), now)
        headers = allowance.headers(now)
        if wait:
            return self._rejected(body, now, wait, headers)
        self._write(body, now, now + LATENCY, 200, None)
        return 200, headers, COMPLETION

    def _rejected(
        self, body: bytes, now: float, wait: float, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        seconds = max(1, math.ceil(wait))
        headers["retry-after"] = str(seconds)
        named, text = float(seconds), "Rate limit reached."
        if self.limits.tells:
            milliseconds = math.ceil(wait * 1000)
            headers["retry-after-ms"] = str(milliseconds)
            named = milliseconds / 1000
            text = f"Rate limit reached. Please try again in {go_duration(wait)}."
        return self._refused(body, now, 429, headers, text, named)

    def _refused(
        self,
        body: bytes,
        now: float,
        status: int,
        headers: dict[str, str],
        text: str,
        wait: float | None,
    ) -> tuple[int, dict[str, str], bytes]:
        self._write(body, now, now, status, wait)
        code = "rate_limit_exceeded" if status == 429 else "server_is_overloaded"
        error = {"message": text, "type": "requests", "param": None, "code": code}
        return status, headers, json.dumps({"error": error}).encode()

    def _write(self, body: bytes, at: float, ended: float, status: int, wait: float | None) -> None:
        self.journal.append(Call(hashlib.md5(body).hexdigest(), at, ended, status, wait))  # noqa: S324


COMPLETION = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "gpt-5.4-mini",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Both."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32},
    }
).encode()
REASONS = {200: b"OK", 429: b"Too Many Requests", 503: b"Service Unavailable"}


class Wire(asyncio.Protocol):
    """As little HTTP as will do. Rejections leave at once, answers after the latency."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (head_ends := self.received.find(b"\r\n\r\n")) >= 0:
            fields = [line.partition(b":") for line in self.received[:head_ends].split(b"\r\n")]
            headers = {name.strip().lower(): value.strip() for name, _, value in fields[1:]}
            ends = head_ends + 4 + int(headers.get(b"content-length", 0))
            if len(self.received) < ends:
                return
            body, self.received = self.received[head_ends + 4 : ends], self.received[ends:]
            key = headers.get(b"authorization", b"").decode()
            status, told, answer = self.fake.answer(key, body, time.monotonic())
            pause = LATENCY if status == 200 else 0.0
            asyncio.get_running_loop().call_later(pause, self.write, status, told, answer)

    def write(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.transport.is_closing():
            return
        head = b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\n" % (status, REASONS[status])
        head += b"".join(b"%b: %b\r\n" % (n.encode(), v.encode()) for n, v in headers.items())
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def serve_fake(pipe: Connection, limits: Limits) -> None:
    async def run() -> None:
        fake, loop, ended = Fake(limits), asyncio.get_running_loop(), asyncio.Event()

        def hear() -> None:
            try:
                pipe.recv()
            except EOFError:
                loop.remove_reader(pipe.fileno())
                ended.set()
            else:
                journal, fake.journal = fake.journal, []
                pipe.send((journal, None))

        server = await loop.create_server(lambda: Wire(fake), "127.0.0.1", 0, backlog=4096)
        loop.add_reader(pipe.fileno(), hear)
        pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await ended.wait()

    asyncio.run(run())


# --- the providers that others made --------------------------------------------------------------


class Watched(Provider):
    """``testproject/provider.py``, and when each call was answered with what."""

    calls: list[Call]

    def answer(self, request: Request) -> Answer:
        began = time.monotonic()
        answer = super().answer(request)
        pause = sum(piece.pause for piece in answer.pieces)
        wait = answer.headers.get("retry-after-ms")
        self.calls.append(
            Call(
                bearer_key(request) + hashlib.md5(request.body).hexdigest(),  # noqa: S324
                began,
                time.monotonic() + pause,
                answer.status,
                None if wait is None else float(wait) / 1000,
            )
        )
        return answer


def serve_offline(pipe: Connection, limits: Limits) -> None:
    with Watched(rpm=limits.rpm, tpm=limits.tpm, latency=LATENCY) as provider:
        provider.calls = []
        pipe.send(provider.base_url)
        while True:
            pipe.recv()
            calls, provider.calls = provider.calls, []
            pipe.send((calls, None))


def llmock() -> str | None:
    """Where it is."""
    beside = Path(sys.executable).with_name("llmock")
    return str(beside) if beside.exists() else shutil.which("llmock")


def serve_llmock(pipe: Connection, limits: Limits) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(llmock()), "serve", "--port", str(port), "--log-level", "warning"]
    command += ["--rpm", str(limits.rpm), "--latency-ms", str(round(LATENCY * 1000))]
    command += ["--tpm", str(limits.tpm)] * (limits.tpm is not None)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        pipe.send(f"http://127.0.0.1:{port}/v1")
        while True:
            pipe.recv()
            pipe.send(heard_from_llmock(f"http://127.0.0.1:{port}/_llmock"))
    finally:
        process.kill()
        process.wait()


def heard_from_llmock(control: str) -> tuple[list[Call], int]:
    import httpx

    with httpx.Client(base_url=control, timeout=60, trust_env=False) as client:
        records = client.get("/requests").json()["requests"]
        failures = client.get("/verdict").json()["errors"]
        client.post("/reset")
    if records and records[0]["seq"] != 1:
        sys.exit("more calls than llmock remembers: no figure can be trusted")
    calls = [
        Call(r["fingerprint"], r["started_at"], r["ended_at"], r["status"], r["retry_after"])
        for r in records
    ]
    return calls, failures


def wait_for_port(port: int) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    sys.exit("llmock does not listen: no figure can be trusted")


PROVIDERS = {"fake": serve_fake, "offline": serve_offline, "llmock": serve_llmock}
