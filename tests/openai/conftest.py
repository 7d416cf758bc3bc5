from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from django.core.asgi import get_asgi_application
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application

from django_qstash_llm.models import ApiKey

ASK: list[Any] = [{"role": "user", "content": "What is it?"}]
PROVIDER = "provider.test"


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def wsgi(application: Any = None) -> Iterator[str]:
    server = ThreadedWSGIServer(("127.0.0.1", 0), QuietHandler)
    server.set_app(application or get_wsgi_application())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def asgi(application: Any = None) -> Iterator[str]:
    application = application or get_asgi_application()
    config = uvicorn.Config(
        application, port=0, lifespan="off", ws="none", log_level="warning", loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def eventually(is_so: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


@pytest.fixture(params=[wsgi, asgi], ids=["wsgi", "asgi"])
def site(request: pytest.FixtureRequest, transactional_db: None) -> Iterator[str]:
    """Our site on a port of its own."""
    with request.param() as url:
        yield url


@pytest.fixture
def wsgi_site(transactional_db: None) -> Iterator[str]:
    with wsgi() as url:
        yield url


@pytest.fixture
def asgi_site(transactional_db: None) -> Iterator[str]:
    with asgi() as url:
        yield url


@pytest.fixture
def key(db: None) -> str:
    return ApiKey.objects.issue("tests")[1]


def delta(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m-1",
        "choices": [choice],
        **more,
    }


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
EVENTS = [delta("Forty"), delta("-two."), delta(reason="stop"), {**delta(), "choices": []}]
EVENTS[-1]["usage"] = USAGE


class Streamed(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A provider's stream. After each event it waits to be told to go on, where it is to."""

    def __init__(self, *events: Any, step: threading.Semaphore | None = None, end: str = "[DONE]"):
        self.pieces = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
        if end:
            self.pieces.append(f"data: {end}\n\n".encode())
        self.step = step
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            yield piece
            while self.step and not self.step.acquire(timeout=0.02):
                if self.is_closed:
                    return

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
            while self.step and not self.step.acquire(blocking=False):
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True

    def response(self, headers: dict[str, str] | None = None) -> httpx.Response:
        told = {"Content-Type": "text/event-stream", **(headers or {})}
        return httpx.Response(200, headers=told, stream=self)
