from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.http import StreamingHttpResponse
from django.test import AsyncRequestFactory, RequestFactory

from django_qstash_llm.browser import events
from django_qstash_llm.browser.events import Tell, respond

# A response that ends has Django see to its connections.
pytestmark = pytest.mark.django_db

WSGI, ASGI = RequestFactory().get("/"), AsyncRequestFactory().get("/")


def heard(response: StreamingHttpResponse) -> list[bytes]:
    async def listen() -> list[bytes]:
        return [part async for part in response]

    return async_to_sync(listen)() if response.is_async else list(response)


@pytest.mark.parametrize("request_", [WSGI, ASGI], ids=["wsgi", "asgi"])
def test_what_is_said_cannot_end_an_event_nor_begin_one(request_: Any) -> None:
    async def say(tell: Tell) -> None:
        tell("chunk", "a\n\nevent: answered\r\ndata: \u2028")

    comment, event = heard(respond(request_, say))
    assert comment == b":\n\n"
    assert event == b'event: chunk\ndata: "a\\n\\nevent: answered\\r\\ndata: \\u2028"\n\n'


@pytest.mark.parametrize("request_", [WSGI, ASGI], ids=["wsgi", "asgi"])
def test_what_is_raised_breaks_off_after_what_was_told(request_: Any) -> None:
    async def say(tell: Tell) -> None:
        tell("chunk", "Forty")
        raise LookupError

    with pytest.raises(LookupError):
        heard(respond(request_, say))


@pytest.mark.parametrize("heard_parts", [1, 2])
def test_thread_that_stops_reading_waits_until_it_is_written_down(heard_parts: int) -> None:
    noted: list[str] = []

    async def say(tell: Tell) -> None:
        noted.append("begun")
        tell("chunk", "Forty")
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)
            noted.append("written down")

    response = respond(WSGI, say)
    parts = iter(response)
    for _ in range(heard_parts):
        next(parts)
    response.close()
    response.close()
    # Cancelled at once, it may not even have begun.
    assert noted in (["begun", "written down"], [])
    assert noted or heard_parts == 1


def test_thread_that_stops_after_the_last_word_is_not_held() -> None:
    async def say(tell: Tell) -> None:
        tell("answered", "Forty")

    response = respond(WSGI, say)
    parts = iter(response)
    next(parts)
    next(parts)
    response.close()


def test_thread_that_leaves_before_anything_was_begun_has_nothing_begun() -> None:
    begun = threading.Event()

    async def say(tell: Tell) -> None:
        begun.set()

    respond(WSGI, say).close()
    assert not begun.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_forked_child_has_a_loop_of_its_own() -> None:
    async def say(tell: Tell) -> None:
        tell("chunk", os.getpid())

    heard(respond(WSGI, say))
    parents = events._loop()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        is_told = str(os.getpid()).encode() in heard(respond(WSGI, say))[-1]
        os.write(write, b"own" if is_told and events._loop() is not parents else b"same")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 5) == b"own"
    os.close(read)
    os.close(write)
