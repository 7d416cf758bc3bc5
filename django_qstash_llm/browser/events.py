"""Server-sent events to a browser, the same under WSGI and ASGI.

What is told comes from a coroutine. Under ASGI the server's own loop runs it; under WSGI one loop in
a thread of this process runs those of all its readers, while each reader's thread does nothing but
write. Who leaves has the coroutine cancelled, wherever it waits.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import connections
from django.http import HttpRequest, StreamingHttpResponse

from ..door import EVENT_HEADERS, EVENTS

Tell = Callable[[str, Any], None]
"""Of a name and what JSON can say."""
Source = Callable[[Tell], Awaitable[None]]

HEARTBEAT = 0.75
"""Seconds of silence after which a comment is written. It keeps proxies from hanging up, and by it a
WSGI server notices that its reader has left: at the second write since, so within two of them."""
_COMMENT = b":\n\n"


def respond(request: HttpRequest, source: Source) -> StreamingHttpResponse:
    """What ``source`` tells, as it tells it. What it raises breaks the response off."""
    told = _AsyncTold(source) if hasattr(request, "scope") else _Told(source)
    return StreamingHttpResponse(told, content_type=EVENTS, headers=EVENT_HEADERS)


def _event(name: str, told: Any) -> bytes:
    # JSON in one line: what is said can neither end the event nor begin another.
    return f"event: {name}\ndata: {json.dumps(told)}\n\n".encode()


async def _tell(source: Source, put: Callable[[bytes], None]) -> None:
    """With a thread of its own for its database work: that of the request waits for its end, and one
    for all readers would let them wait for each other."""
    async with ThreadSensitiveContext():
        try:
            await source(lambda name, told: put(_event(name, told)))
        finally:
            # Shielded: cancelled before it began, it would not happen.
            await asyncio.shield(sync_to_async(connections.close_all)())


class _Told:
    """For WSGI."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._events: SimpleQueue[bytes | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def __iter__(self) -> Iterator[bytes]:
        self._loop = _loop()
        self._loop.call_soon_threadsafe(self._begin)
        yield _COMMENT  # so that the headers leave
        while (event := self._next()) is not None:
            yield event
        self._is_over = True
        assert self._task is not None
        self._task.result()  # raises what it raised

    def _next(self) -> bytes | None:
        try:
            return self._events.get(timeout=HEARTBEAT)
        except Empty:
            return _COMMENT

    def _begin(self) -> None:
        assert self._loop is not None
        self._task = self._loop.create_task(_tell(self._source, self._events.put))
        self._task.add_done_callback(lambda task: self._events.put(None))

    def close(self) -> None:
        """Called by the server when its reader has left, or all is told. Waits until it is written
        down, so that a worker that stops does not take it along."""
        if self._loop is None or self._is_over:
            return
        self._is_over = True
        self._loop.call_soon_threadsafe(self._cancel)
        while self._events.get() is not None:
            pass

    def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()


class _AsyncTold:
    """For ASGI."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._task: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task = asyncio.create_task(_tell(self._source, events.put_nowait))
        self._task.add_done_callback(lambda task: events.put_nowait(None))
        try:
            yield _COMMENT
            while (event := await _anext(events)) is not None:
                yield event
            await self._task  # raises what it raised
        finally:
            await self._leave()

    async def _leave(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    def close(self) -> None:
        """Django calls it at the end of the response. Its reader may have left while an event was
        being written, and then nothing above is at work that could notice."""
        async_to_sync(self._leave)()


async def _anext(events: asyncio.Queue[bytes | None]) -> bytes | None:
    try:
        async with asyncio.timeout(HEARTBEAT):
            return await events.get()
    except TimeoutError:
        return _COMMENT


_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By process: a forked child has none of its parent's threads."""
_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The one that runs for all readers of this process."""
    with _starting:
        if (pid := os.getpid()) not in _loops:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_run, args=(loop,), name="llm-events", daemon=True)
            thread.start()
            atexit.register(partial(_stop, loop, thread, pid))
            _loops[pid] = loop
    return _loops[pid]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, pid: int) -> None:
    if os.getpid() == pid:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=1)
