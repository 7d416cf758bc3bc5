"""The Chat API: completions straight from the provider, whole or streamed, recorded like all others.

The row is written before the call is made, and one row is one call: nothing is repeated here. No
transaction is open while the provider thinks, unless the caller has opened one.

``LLMRequest.objects.chat`` and ``.stream`` are the way in for people; ``complete`` and ``open_stream``
are the same for who passes answers on, as an endpoint does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast
from weakref import WeakKeyDictionary

import httpx
from asgiref.sync import async_to_sync, sync_to_async
from django.core.signals import setting_changed
from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.dispatch import receiver
from django.utils import timezone

from . import anthropic, limits
from .completions import LARGEST_ANSWER, Completion, Usage, read_error, weigh
from .conf import app_settings, named
from .exceptions import ChatFailed, ConfigurationError, InvalidRequest, UnreadableCompletion
from .models import LLMRequest
from .models.callback import DROPPED_HEADERS, plain, read_body, without_secrets
from .models.ledger import CHAT, LedgerEntry
from .models.request import Changes, State, Via
from .pricing import Cost, cost_of
from .providers import Provider, get_provider
from .streams import Chunk, StreamBroken, StreamReader

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Transport = TypeVar("Transport")
Within = AbstractContextManager[object]
Bill = Callable[[LLMRequest, Changes], LedgerEntry | None]
_NOTHING: Within = nullcontext()

KEPT_FOR = 30.0
"""Seconds that an unused connection is kept."""
MOST_KEPT = 100
"""Unused connections to a provider that are kept. Used there are as many as there are calls: who waits
for a model holds its connection for minutes."""
END_AGAIN_AFTER = (0.0, 0.1, 0.3, 1.0, 2.0)
"""Seconds after each failure to write down how a call ended, until it is tried again."""
LAST_WORDS = 0.1
"""Seconds that the end of a response is waited for once its stream has said ``[DONE]``; a connection
is kept only if it was read to its end."""
LOOK_AFTER = 2.0
"""Seconds between two looks whether a request that is being streamed was cancelled meanwhile."""
_NOT_TOLD = {
    *DROPPED_HEADERS,
    "connection",
    "content-encoding",
    "content-length",
    "keep-alive",
    "transfer-encoding",
}
"""Response headers that are nobody's business, or were about the transfer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole completion as it is passed on."""

    status: int
    headers: Mapping[str, str]
    """The provider's, names in lower case, without cookies and what was about the transfer."""
    body: bytes
    """JSON of a ``chat.completion``, as it came or translated."""
    llm_request: LLMRequest


# --- one call --------------------------------------------------------------------------------


class Call:
    """A request on its way to its provider, and what is written down of how it ends."""

    def __init__(
        self,
        llm_request: LLMRequest,
        *,
        is_streamed: bool,
        transport_of: Callable[[Provider], Any],
        within: Within,
    ) -> None:
        """Write the row. Raises ``InvalidRequest`` or ``ConfigurationError``, and then there is none."""
        conf = app_settings()
        conf.check_types()
        conf.check_storing()
        if llm_request.via != Via.CHAT or not llm_request._state.adding:
            raise InvalidRequest("llm_request", "give an unsaved one with via='chat'")
        self.llm_request = llm_request
        self.is_streamed = is_streamed
        self.status: int | None = None
        self.told: Mapping[str, str] = {}
        with within:
            self._begin(transport_of)
        now = time.monotonic()
        self.deadline, self.look_at = now + self.seconds, now + LOOK_AFTER

    def _begin(self, transport_of: Callable[[Provider], Any]) -> None:
        conf, llm_request, is_streamed = app_settings(), self.llm_request, self.is_streamed
        llm_request.prepare()
        self.provider = get_provider(llm_request.provider)
        self.transport = transport_of(self.provider)
        self.url, headers = self.provider.route
        self.headers = {
            **headers,
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if is_streamed else "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "django-qstash-llm",
        }
        try:
            self.body = self.provider.body(
                llm_request.model, llm_request.messages, self._parameters()
            )
        except (TypeError, ValueError) as error:
            raise InvalidRequest("messages", f"cannot be written as JSON: {error}") from error
        self.seconds = float(llm_request.timeout or conf.chat_timeout)
        read = min(conf.chat_read_timeout, self.seconds) if is_streamed else self.seconds
        connect = min(conf.chat_connect_timeout, self.seconds)
        self.timeouts = {"connect": connect, "read": read, "write": read, "pool": connect}
        llm_request.begin(now=timezone.now(), seconds=self.seconds)

    def _parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = self.llm_request.parameters
        if not self.is_streamed:
            return parameters
        options = parameters.get("stream_options")
        options = options if isinstance(options, dict) else {}
        return {**parameters, "stream": True, "stream_options": {**options, "include_usage": True}}

    @property
    def is_usage_asked(self) -> bool:
        """By the caller."""
        options = self.llm_request.parameters.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    @property
    def using(self) -> str:
        return self.llm_request._state.db or "default"

    @property
    def request(self) -> httpx.Request:
        return httpx.Request(
            "POST",
            _url(self.url),
            headers=self.headers,
            content=self.body,
            extensions={"timeout": self.timeouts},
        )

    def reader(self) -> StreamReader:
        answers = self.llm_request.parameters.get("n")
        return StreamReader(
            is_anthropic=self.provider.kind == "anthropic",
            asked_bytes=weigh(self.llm_request.messages),
            is_usage_asked=self.is_usage_asked,
            created=int(time.time()),
            answers=answers if type(answers) is int else 1,
        )

    def check(self, *, size: int = 0) -> None:
        """httpx bounds each wait; this bounds them all together, and what has come."""
        if size > LARGEST_ANSWER:
            raise StreamBroken("too_large", f"the answer is over {LARGEST_ANSWER} bytes")
        if time.monotonic() > self.deadline:
            raise httpx.ReadTimeout(f"no whole answer within {self.seconds:g} s")

    def is_time_to_look(self) -> bool:
        now = time.monotonic()
        is_time = now >= self.look_at
        if is_time:
            self.look_at = now + LOOK_AFTER
        return is_time

    def look(self, *, always: bool = False) -> None:
        """Raise ``StreamBroken`` if the request was cancelled: nobody wants more of it. ``always``
        as in ``let_go``."""
        rows = LLMRequest.objects.using(self.using).submitted()
        is_wanted = rows.filter(pk=self.llm_request.pk).exists()
        self.let_go(always=always)
        if not is_wanted:
            raise StreamBroken("cancelled", "it was cancelled while the answer came")

    def answered(self, response: httpx.Response) -> None:
        conf = app_settings()
        self.status = response.status_code
        self.told = {
            name.lower(): conf.without_secrets(value)
            for name, value in response.headers.items()
            if name.lower() not in _NOT_TOLD
        }

    # --- how it ends ---

    def complete(self, body: bytes) -> Answer:
        """The whole answer is there. Raises ``ChatFailed`` where it is none."""
        if not self.is_success:
            raise self.refused(body)
        assert self.status is not None
        try:
            completion = read_body(body)
        except UnreadableCompletion as error:
            raise self._unreadable(error, body) from error
        self._completed(completion, self._cost(completion))
        return Answer(
            status=self.status,
            headers=self.told,
            body=self._translated(plain(body)),
            llm_request=self.llm_request,
        )

    def _translated(self, body: bytes) -> bytes:
        if self.provider.kind != "anthropic":
            return body
        answer = json.loads(body)
        if not anthropic.is_message(answer):
            return body  # a proxy that speaks OpenAI's words already
        answer = anthropic.completion(answer, created=int(time.time()))
        return json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")

    def complete_stream(self, reader: StreamReader) -> None:
        completion = reader.completion
        self._completed(completion, self._cost(completion, is_estimated=reader.is_estimated))

    @property
    def is_stream(self) -> bool:
        """Whether what comes is to be read as a stream. Some name no type, or a wrong one."""
        is_json = "json" in self.told.get("content-type", "").lower()
        return self.is_success and not is_json

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def refused(self, body: bytes) -> ChatFailed:
        """The provider answered with another status than 2xx, or with no stream."""
        if self.is_success:
            return self._not_streamed(body)
        code, message = read_error(plain(body))
        return self.failed(
            code or f"http_{self.status}",
            message or f"the provider answered {self.status}",
            Completion(text=""),
            body,
        )

    def _not_streamed(self, body: bytes) -> ChatFailed:
        try:
            completion = read_body(body)
        except UnreadableCompletion as error:
            return self._unreadable(error, body)
        problem = "the provider answered as a whole, though a stream was asked for"
        return self.failed("not_a_stream", problem, completion, body)

    def _unreadable(self, error: UnreadableCompletion, body: bytes) -> ChatFailed:
        completion = Completion(text="", usage=error.usage or Usage())
        return self.failed(error.code, str(error), completion, body)

    def broken(self, error: StreamBroken, reader: StreamReader | None = None) -> ChatFailed:
        completion = reader.completion if reader else Completion(text="")
        return self.failed(error.code, str(error), completion, error.body, reader=reader)

    def lost(self, error: httpx.HTTPError, reader: StreamReader | None = None) -> ChatFailed:
        """No answer, or no more of it."""
        completion = reader.completion if reader else Completion(text="")
        if isinstance(error, httpx.TimeoutException):
            is_over = time.monotonic() >= self.deadline
            code = "timeout" if is_over or reader is None else "stalled"
            seconds = self.seconds if is_over else self.timeouts["read"]
            problem = f"the provider did not go on within {seconds:g} s"
            if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
                problem = f"no connection to the provider within {self.timeouts['connect']:g} s"
        elif reader is not None:
            code, problem = "cut", "the connection broke before the stream was whole"
        else:
            code, problem = "no_response", "the provider did not answer"
        # Its class alone: its text may hold a URL with its query.
        problem = f"{problem} ({type(error).__name__})"
        return self.failed(code, problem, completion, reader=reader)

    def failed(
        self,
        code: str,
        problem: str,
        completion: Completion,
        body: bytes = b"",
        *,
        reader: StreamReader | None = None,
    ) -> ChatFailed:
        """Written down; what to raise."""
        self._broken_off(State.FAILED, code, problem, completion, reader)
        body = plain(body)
        status = -1 if self.status is None else self.status
        reading = limits.read(status, self.told, body, now=time.time())
        return ChatFailed(
            app_settings().without_secrets(code, limit=64),
            app_settings().without_secrets(problem),
            llm_request=self.llm_request,
            status=self.status,
            headers=self.told,
            body=body,
            trouble=str(reading.trouble or ""),
            wait=reading.wait,
        )

    def interrupted(self, error: BaseException, reader: StreamReader | None = None) -> None:
        """It ends, and not by the provider. Who asked has left: that is a wish and no failure, so the
        request is cancelled. Anything else is a failure, ours or of whoever broke in."""
        if reader is not None and reader.is_complete:
            self.complete_stream(reader)
            return
        if reader is None and self.is_streamed:
            reader = self.reader()  # the provider was at it: what was asked is counted
        completion = reader.completion if reader else Completion(text="")
        if isinstance(error, Exception):
            # Its class alone: nobody knows what its text may hold.
            problem = f"{type(error).__name__} was raised before the answer was whole"
            self._broken_off(State.FAILED, "unexpected", problem, completion, reader)
            return
        problem = "who asked has left before the answer was whole"
        self._broken_off(State.CANCELLED, "aborted", problem, completion, reader)

    def _completed(self, completion: Completion, cost: Cost | None) -> None:
        now = timezone.now()

        def decide(row: LLMRequest) -> Changes:
            changes = row.after_completion(completion, cost, now=now)
            # Cancelled in the meantime: it has to be paid for all the same.
            changes = changes or row.after_spending(completion.usage, cost)
            return without_secrets(changes) | {"last_status": self.status}

        self._end(decide, self._bill(completion.usage, cost, at=now, is_whole=True))

    def _broken_off(
        self,
        state: State,
        code: str,
        problem: str,
        completion: Completion,
        reader: StreamReader | None,
    ) -> None:
        now = timezone.now()
        cost = self._cost(completion, is_estimated=bool(reader and reader.is_estimated))
        status = -1 if self.status is None else self.status

        def decide(row: LLMRequest) -> Changes:
            changes = row.after_breaking_off(state, code, problem, completion, cost, now=now)
            return without_secrets(changes) | {"last_status": status}

        self._end(decide, self._bill(completion.usage, cost, at=now))

    @staticmethod
    def _bill(usage: Usage, cost: Cost | None, *, at: datetime, is_whole: bool = False) -> Bill:
        def bill(row: LLMRequest, changes: Changes) -> LedgerEntry | None:
            # Already, where this is written a second time: one row is one call.
            is_useful = changes.get("state", row.state) == State.COMPLETED
            if not (is_whole or is_useful or usage.is_known):
                return None  # nothing came that was paid for
            return LedgerEntry.of_answer(
                row, answer=CHAT, usage=usage, cost=cost, at=at, is_useful=is_useful
            )

        return bill

    def _end(self, decide: Callable[[LLMRequest], Changes], bill: Bill) -> None:
        """Write it down; once more where the connection has gone stale while nobody used it."""
        connection = connections[self.using]
        try:
            self.llm_request.end(decide, bill)
        except (InterfaceError, OperationalError):
            if connection.in_atomic_block:
                raise
            self._end_at_last(decide, bill)

    def _end_at_last(self, decide: Callable[[LLMRequest], Changes], bill: Bill) -> None:
        """An answer that was paid for is in hand: a lock that others hold, or a connection that has
        gone stale, is not to lose it. Guarded, so that twice is once."""
        connection = connections[self.using]
        for pause in END_AGAIN_AFTER:
            if not connection.is_usable():
                connection.close()
            try:
                self.llm_request.end(decide, bill)
                return
            except (InterfaceError, OperationalError):
                time.sleep(pause)
        self.llm_request.end(decide, bill)

    def let_go(self, *, always: bool = False) -> None:
        """Hold no connection to the database while waiting: none of a pool's, which others wait for,
        and ``always`` none where each request has a thread of its own, as under ASGI."""
        connection = connections[self.using]
        is_pooled = bool(connection.settings_dict["OPTIONS"].get("pool"))
        if (always or is_pooled) and not connection.in_atomic_block:
            connection.close()

    def _cost(self, completion: Completion, *, is_estimated: bool = False) -> Cost | None:
        try:
            cost = cost_of(
                self.llm_request.provider,
                self.llm_request.model,
                completion.usage,
                at=timezone.now(),
                answered_by=completion.model,
                service_tier=completion.service_tier,
            )
        except (DatabaseError, InterfaceError):
            if connections[self.using].in_atomic_block:
                raise
            # The answer is in hand and paid for. It is kept, and priced when prices can be read.
            logger.exception("The prices cannot be read: %s is unpriced", self.llm_request.uuid)
            return None
        return replace(cost, source="estimated") if cost and is_estimated else cost


# --- blocking --------------------------------------------------------------------------------


@contextmanager
def _ending(call: Call) -> Iterator[None]:
    """Write down what ends the call before its answer is whole."""
    try:
        yield
    except httpx.HTTPError as error:
        raise call.lost(error) from error
    except StreamBroken as error:
        raise call.broken(error) from error
    except BaseException as error:
        call.interrupted(error)
        raise


def complete(llm_request: LLMRequest, *, within: Within = _NOTHING) -> Answer:
    """Ask what an unsaved request with ``via="chat"`` asks, and wait for all of the answer.

    ``within`` is entered while the row is written, and left before the provider is called.

    Raises ``InvalidRequest`` and ``ConfigurationError``, and then nothing is written; ``ChatFailed``.
    """
    call = Call(llm_request, is_streamed=False, transport_of=_transport, within=within)
    call.let_go()
    with _ending(call):
        response = call.transport.handle_request(call.request)
        try:
            call.answered(response)
            body = _whole(call, response)
        finally:
            response.close()
    return call.complete(body)


def open_stream(llm_request: LLMRequest, *, within: Within = _NOTHING) -> Stream:
    """The same, as the answer comes. Raises the same where the provider refuses at once."""
    call = Call(llm_request, is_streamed=True, transport_of=_transport, within=within)
    call.let_go()
    with _ending(call):
        response = call.transport.handle_request(call.request)
        call.answered(response)
        if call.is_stream:
            return Stream(call, response)
        try:
            body = _whole(call, response)
        finally:
            response.close()
    raise call.refused(body)


class Stream:
    """An answer as it comes: an iterator of ``Chunk``.

    When it is exhausted the row is completed. What breaks it raises ``ChatFailed``, and who leaves
    early, by ``close`` or by letting go of it, has the provider stop.
    """

    def __init__(self, call: Call, response: httpx.Response) -> None:
        assert call.status is not None
        self.llm_request = call.llm_request
        self.status = call.status
        self.headers = call.told
        # It knows nothing of this object: letting go of this one lets go of it, which closes it.
        self._chunks = _read(call, response)
        next(self._chunks)  # begun: what has not begun does not hear that it is closed

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return cast(Chunk, next(self._chunks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. The provider's connection is closed where more was to come."""
        self._chunks.close()


def _read(call: Call, response: httpx.Response) -> Generator[Chunk | None, None, None]:
    """None, and then every chunk."""
    reader, pieces = call.reader(), _pieces(response)
    ending: threading.Thread | None = None
    try:
        try:
            yield None
            for received in pieces:
                for chunk in reader.feed(received):
                    yield _without_keys(chunk)
                if reader.is_done:
                    break
                call.check()
                if call.is_time_to_look():
                    call.look()
            for chunk in reader.end():
                yield _without_keys(chunk)
        except httpx.HTTPError as error:
            if not reader.is_complete:
                response.close()
                raise call.lost(error, reader) from error
        except StreamBroken as error:
            response.close()
            raise call.broken(error, reader) from error
        except BaseException as error:
            response.close()
            call.interrupted(error, reader)
            raise
        call.complete_stream(reader)
        # Who reads has all of it, and need not wait for a provider that is slow to hang up.
        ending = threading.Thread(target=_read_to_its_end, args=(pieces, response), daemon=True)
        ending.start()
        ending.join(LAST_WORDS)
    finally:
        if ending is None:
            response.close()


def _read_to_its_end(pieces: Iterator[bytes], response: httpx.Response) -> None:
    """What is not read to its end is not used again."""
    try:
        with suppress(httpx.HTTPError):
            next(pieces, None)
    finally:
        response.close()


def _pieces(response: httpx.Response) -> Iterator[bytes]:
    # We ask for no compression. For a proxy that compresses all the same there is the slow way.
    if "Content-Encoding" in response.headers:
        return response.iter_bytes()
    return iter(cast(httpx.SyncByteStream, response.stream))


def _whole(call: Call, response: httpx.Response) -> bytes:
    body = bytearray()
    for received in _pieces(response):
        body += received
        call.check(size=len(body))
    return bytes(body)


# --- awaitable -------------------------------------------------------------------------------


async def acomplete(llm_request: LLMRequest, *, within: Within = _NOTHING) -> Answer:
    """``complete`` for async code."""
    call = await _begin(llm_request, is_streamed=False, within=within)
    try:
        body = await _abody(call)
    except httpx.HTTPError as error:
        raise await _written(call.lost, error) from error
    except StreamBroken as error:
        raise await _written(call.broken, error) from error
    except BaseException as error:
        await _written(call.interrupted, error)
        raise
    return await _written(call.complete, body)


async def aopen_stream(llm_request: LLMRequest, *, within: Within = _NOTHING) -> AsyncStream:
    """``open_stream`` for async code."""
    call = await _begin(llm_request, is_streamed=True, within=within)
    try:
        opened = await _aopened(call)
    except httpx.HTTPError as error:
        raise await _written(call.lost, error) from error
    except StreamBroken as error:
        raise await _written(call.broken, error) from error
    except BaseException as error:
        await _written(call.interrupted, error)
        raise
    if isinstance(opened, AsyncStream):
        return opened
    raise await _written(call.refused, opened)


class AsyncStream:
    """``Stream`` for async code. The task that reads it may be cancelled at any time."""

    def __init__(self, call: Call, response: httpx.Response) -> None:
        assert call.status is not None
        self.llm_request = call.llm_request
        self.status = call.status
        self.headers = call.told
        self._chunks = _aread(call, response)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return cast(Chunk, await anext(self._chunks))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leave. The provider's connection is closed where more was to come."""
        await self._chunks.aclose()


async def _aread(call: Call, response: httpx.Response) -> AsyncGenerator[Chunk | None, None]:
    """None, and then every chunk."""
    reader, pieces = call.reader(), _apieces(response)
    try:
        try:
            yield None
            async for received in pieces:
                for chunk in reader.feed(received):
                    yield _without_keys(chunk)
                if reader.is_done:
                    break
                call.check()
                if call.is_time_to_look():
                    await _written(call.look, always=True)
            for chunk in reader.end():
                yield _without_keys(chunk)
        except httpx.HTTPError as error:
            if not reader.is_complete:
                await response.aclose()
                raise await _written(call.lost, error, reader) from error
        except StreamBroken as error:
            await response.aclose()
            raise await _written(call.broken, error, reader) from error
        except BaseException as error:
            await response.aclose()
            await _written(call.interrupted, error, reader)
            raise
        await _written(call.complete_stream, reader)
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await anext(pieces, None)
    finally:
        await response.aclose()


def _apieces(response: httpx.Response) -> AsyncIterator[bytes]:
    if "Content-Encoding" in response.headers:
        return response.aiter_bytes()
    return aiter(cast(httpx.AsyncByteStream, response.stream))


async def _awhole(call: Call, response: httpx.Response) -> bytes:
    body = bytearray()
    async for received in _apieces(response):
        body += received
        call.check(size=len(body))
    return bytes(body)


async def _abody(call: Call) -> bytes:
    """All that is answered."""
    response = await _head(call)
    try:
        call.answered(response)
        return await _awhole(call, response)
    finally:
        await response.aclose()


async def _aopened(call: Call) -> AsyncStream | bytes:
    """The stream, or all that is answered where that is none."""
    response = await _head(call)
    call.answered(response)
    if call.is_stream:
        stream = AsyncStream(call, response)
        await anext(stream._chunks)  # begun, as a ``Stream`` is
        return stream
    try:
        return await _awhole(call, response)
    finally:
        await response.aclose()


async def _head(call: Call) -> httpx.Response:
    try:
        async with asyncio.timeout(call.seconds):
            transport = call.transport or await _kept_by_loop(call.provider)
            response: httpx.Response = await transport.handle_async_request(call.request)
            return response
    except TimeoutError as error:
        raise httpx.ReadTimeout("no answer in time") from error


async def _begin(llm_request: LLMRequest, *, is_streamed: bool, within: Within) -> Call:
    begin = partial(_begin_for_loop, llm_request, is_streamed=is_streamed, within=within)
    begun = asyncio.ensure_future(sync_to_async(begin)())
    try:
        return await asyncio.shield(begun)
    except asyncio.CancelledError as error:
        call = await begun
        await _written(call.interrupted, error)
        raise


def _begin_for_loop(llm_request: LLMRequest, *, is_streamed: bool, within: Within) -> Call:
    call = Call(llm_request, is_streamed=is_streamed, transport_of=_given_to_loops, within=within)
    call.let_go(always=True)
    return call


async def _written(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Of a ``Call`` how it ended. Also where the task is cancelled once more over it."""
    writing = asyncio.ensure_future(sync_to_async(write)(*args, **kwargs))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


# --- a thread for which a loop waits ---------------------------------------------------------
#
# A view is in one under ASGI, if it writes rows. It begins and ends the call by itself, and has the
# loop wait for the provider: a reader who waits costs next to nothing, and one who leaves is noticed.
# To await ``acomplete`` there would go to and fro between thread and loop four times more.


def complete_by_loop(llm_request: LLMRequest, *, within: Within = _NOTHING) -> Answer:
    """``complete`` for a thread in which a loop runs this by ``sync_to_async``."""
    call = _begin_for_loop(llm_request, is_streamed=False, within=within)
    with _ending(call):
        body = async_to_sync(_abody)(call)
    return call.complete(body)


def open_stream_by_loop(llm_request: LLMRequest, *, within: Within = _NOTHING) -> AsyncStream:
    """``open_stream`` for a thread in which a loop runs this by ``sync_to_async``, and which hands
    the stream to that loop."""
    call = _begin_for_loop(llm_request, is_streamed=True, within=within)
    with _ending(call):
        opened = async_to_sync(_aopened)(call)
    if isinstance(opened, AsyncStream):
        return opened
    raise call.refused(opened)


# --- what both share -------------------------------------------------------------------------


def _without_keys(chunk: Chunk) -> Chunk:
    conf = app_settings()
    if not any(secret in chunk.data for secret in conf.secrets_in_bytes):
        return chunk
    return replace(chunk, data=plain(chunk.data), text=conf.without_secrets(chunk.text))


# Reading a URL takes a tenth of a call, and most calls are to the same few.
_url = lru_cache(maxsize=64)(httpx.URL)


class _Unused(Generic[Transport]):
    """Connections to a provider that nobody uses, each in a transport of its own.

    httpx's own pool asks each of them whether it is still there whenever one is wanted and whenever
    one is given back: with sixteen that takes twice as long as the call. Here the last that was given
    back is taken, and the first goes when its time is over.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[float, Transport]] = deque()
        self._is_over = False

    def take(self) -> Transport | None:
        with suppress(IndexError):
            return self._kept.pop()[1]
        return None

    def give_back(self, transport: Transport) -> list[Transport]:
        """Those that are to be closed."""
        if self._is_over:
            return [transport]
        now = time.monotonic()
        self._kept.append((now, transport))
        closed: list[Transport] = []
        with suppress(IndexError):  # other threads take them
            while self._kept[0][0] < now - KEPT_FOR or len(self._kept) > MOST_KEPT:
                closed.append(self._kept.popleft()[1])
        return closed

    def end(self) -> list[Transport]:
        """The same: all, and whatever is given back from now on."""
        self._is_over = True
        closed = []
        while (transport := self.take()) is not None:
            closed.append(transport)
        return closed


class _Pool(httpx.BaseTransport):
    def __init__(self) -> None:
        self._unused: _Unused[httpx.HTTPTransport] = _Unused()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        transport = self._unused.take() or httpx.HTTPTransport(**_how())
        try:
            response = transport.handle_request(request)
        except BaseException:
            transport.close()
            raise
        give_back = partial(self._give_back, transport)
        response.stream = _Lent(cast(httpx.SyncByteStream, response.stream), give_back)
        return response

    def _give_back(self, transport: httpx.HTTPTransport) -> None:
        for each in self._unused.give_back(transport):
            each.close()

    def close(self) -> None:
        for each in self._unused.end():
            each.close()


class _Lent(httpx.SyncByteStream):
    """A response over a connection that is given back when it is closed, which httpx does once."""

    def __init__(self, stream: httpx.SyncByteStream, give_back: Callable[[], None]) -> None:
        self._stream, self._give_back = stream, give_back

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._give_back()


class _AsyncPool(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self._unused: _Unused[httpx.AsyncHTTPTransport] = _Unused()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport = self._unused.take() or httpx.AsyncHTTPTransport(**_how())
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await transport.aclose()
            raise
        give_back = partial(self._give_back, transport)
        response.stream = _AsyncLent(cast(httpx.AsyncByteStream, response.stream), give_back)
        return response

    async def _give_back(self, transport: httpx.AsyncHTTPTransport) -> None:
        for each in self._unused.give_back(transport):
            await each.aclose()

    async def aclose(self) -> None:
        for each in self._unused.end():
            await each.aclose()


class _AsyncLent(httpx.AsyncByteStream):
    def __init__(
        self, stream: httpx.AsyncByteStream, give_back: Callable[[], Awaitable[None]]
    ) -> None:
        self._stream, self._give_back = stream, give_back

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._give_back()


_pools: dict[tuple[int, str], _Pool] = {}
"""By process and provider: a forked child must not share its parent's sockets."""
_Pools = dict[str, _AsyncPool]
_async_pools: WeakKeyDictionary[
    asyncio.AbstractEventLoop, tuple[_Pools, AsyncGenerator[None, None]]
]
_async_pools = WeakKeyDictionary()


def _transport(provider: Provider) -> httpx.BaseTransport:
    """Transports alone, as in ``qstash.client``: nothing of redirects, cookies, proxies and .netrc
    of the environment is to see the key."""
    if given := _given(httpx.BaseTransport):
        return cast(httpx.BaseTransport, given)
    key = os.getpid(), provider.name
    if key not in _pools:
        # Of two threads that come here at once both get the same one.
        _pools.setdefault(key, _Pool())
    return _pools[key]


def _given_to_loops(provider: Provider) -> httpx.AsyncBaseTransport | None:
    return cast(httpx.AsyncBaseTransport | None, _given(httpx.AsyncBaseTransport))


async def _kept_by_loop(provider: Provider) -> httpx.AsyncBaseTransport:
    """The same of the event loop that is running, which alone can use it."""
    loop = asyncio.get_running_loop()
    if loop not in _async_pools:
        opened: _Pools = {}
        _async_pools[loop] = opened, _until_the_end(opened)
        await anext(_async_pools[loop][1])
    pools, _ = _async_pools[loop]
    return pools.setdefault(provider.name, _AsyncPool())


async def _until_the_end(pools: _Pools) -> AsyncGenerator[None, None]:
    """Each loop ends its generators before it ends itself, and after that nothing can close what was
    opened in it: of a loop for each call, as ``async_to_sync`` has it, every connection would stay."""
    try:
        yield
    finally:
        _async_pools.pop(asyncio.get_running_loop(), None)
        for pool in pools.values():
            await pool.aclose()


def _given(kind: type) -> Any:
    transport = named("CHAT_TRANSPORT", app_settings().chat_transport)
    if transport is not None and not isinstance(transport, kind):
        raise ConfigurationError(
            f"QSTASH_LLM['CHAT_TRANSPORT'] is no httpx.{kind.__name__}, which this call needs."
        )
    return transport


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    # 40 ms, once.
    return httpx.create_ssl_context(trust_env=False)


def _how() -> dict[str, Any]:
    return {"verify": _ssl_context(), "limits": httpx.Limits(keepalive_expiry=KEPT_FOR)}


def close() -> None:
    """Close the connections that this process keeps; the next call opens new ones."""
    for key in [key for key in _pools if key[0] == os.getpid()]:
        _pools.pop(key).close()


async def aclose() -> None:
    """The same for this event loop."""
    if kept := _async_pools.pop(asyncio.get_running_loop(), None):
        await kept[1].aclose()


@receiver(setting_changed)
def _forget(*, setting: str, **kwargs: object) -> None:
    if setting == "QSTASH_LLM":
        close()
