"""The way to QStash: ``Client`` and ``AsyncClient`` carry out ``calls`` over one kept connection pool.

Retries happen here only when they cannot do harm: after a call that never arrived, or when
repeating is harmless (a read, or a message with a deduplication id). Answers are never retried;
that decision belongs to whoever owns the message.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import httpx

from . import calls
from .calls import Call
from .exceptions import InvalidOption, ResponseError, TransportError, UnreadableAnswer

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_BASE_URL = "https://qstash.upstash.io"
# Nothing reached QStash when one of these is raised.
_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)
_LARGEST_ANSWER = 32 * 1024 * 1024


class _Connection:
    """What the two clients share: where to, as whom, how long, how often."""

    def __init__(
        self,
        token: str,
        *,
        base_url: str = DEFAULT_BASE_URL,
        timeout: float = 30.0,
        retries: int = 2,
        transport: Any = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        """
        ``timeout``: seconds for any one wait, 5 at most for connecting, and in all until the
        answer must have been read; retries begin anew.
        ``retries``: further tries after a transport failure, where they are safe.
        ``transport``: an httpx transport, for tests and proxies.
        ``redact``: takes out of QStash's words what no error may repeat, before they are cut.
        """
        if not re.fullmatch(r"[\x21-\x7e]+", token or ""):
            raise InvalidOption("token", "empty, with spaces or not printable ASCII")
        if not _is_http_url(base_url):
            raise InvalidOption("base_url", f"{base_url!r} is not an http(s) URL")
        # A URL pasted from the documentation often ends in the publish path.
        self.base_url = base_url.rstrip("/").removesuffix("/v2/publish").rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self._given_transport = transport
        self._redact = redact
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": "django-qstash-llm"}
        limits = httpx.Timeout(timeout, connect=min(5.0, timeout))
        self._extensions = {"timeout": limits.as_dict()}
        # Reading a URL takes a tenth of a call, and most calls are to the same few.
        self._url = functools.lru_cache(maxsize=64)(httpx.URL)
        self._last_date = ""

    @property
    def server_time(self) -> float | None:
        """QStash's clock at its last answer, unix seconds, whole ones; None when it did not say."""
        try:
            moment = parsedate_to_datetime(self._last_date)
        except (ValueError, OverflowError):
            return None
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    def _request(self, call: Call[T]) -> httpx.Request:
        return httpx.Request(
            call.method,
            self._url(self.base_url + call.path),
            params=list(call.params) or None,
            headers={**self._headers, **call.headers},
            content=call.content or None,
            extensions=self._extensions,
        )

    def _transport_error(self, error: httpx.HTTPError) -> TransportError:
        # str(error) may hold a URL with its query; its class says enough and is harmless.
        return TransportError(
            f"no answer from QStash: {type(error).__name__}",
            is_ambiguous=not isinstance(error, _NOTHING_SENT),
        )

    def _may_try_again(self, call: Call[T], error: TransportError, tries: int) -> bool:
        return tries <= self.retries and (call.is_repeatable or not error.is_ambiguous)

    def _read(self, call: Call[T], answer: _Answer, may_have_arrived: bool) -> T:
        """``may_have_arrived``: with an earlier try, whose answer was lost."""
        if not 200 <= answer.status < 300:
            text = self._redact(answer.content.decode("utf-8", "replace"))
            error = ResponseError.from_response(answer.status, text, dict(answer.headers))
            error.is_ambiguous = error.is_ambiguous or may_have_arrived
            raise error
        if answer.is_too_large:
            raise UnreadableAnswer("QStash's answer is too large")
        if call.parse is calls._nothing:
            return call.parse(None)
        try:
            return call.parse(json.loads(answer.content))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            problem = self._redact(str(error))
            raise UnreadableAnswer(
                f"QStash's answer to {call.method} {call.path.split('?')[0]} cannot be read: {problem}"
            ) from error


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return method


def _awaitable(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @functools.wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return method


class Client(_Connection):
    """QStash, blocking. Safe to share between threads; close it, or use it in a ``with``.

    Every method raises ``TransportError`` when no answer came, and a ``ResponseError`` when the
    answer was a refusal. See ``calls`` for what each one asks.
    """

    def __init__(
        self, token: str, *, sleep: Callable[[float], None] = time.sleep, **settings: Any
    ) -> None:
        super().__init__(token, **settings)
        self._sleep = sleep
        # The transport alone: it keeps the connections. What httpx.Client adds (redirects, cookies,
        # proxies and .netrc of the environment) is not to see the token, and costs a fifth of a call.
        self._transport: httpx.BaseTransport = self._given_transport or httpx.HTTPTransport()

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, call: Call[T]) -> T:
        """Carry out any ``Call``."""
        tries, may_have_arrived = 0, False
        while True:
            tries += 1
            try:
                answer = self._send_once(call)
            except TransportError as error:
                may_have_arrived = error.is_ambiguous = error.is_ambiguous or may_have_arrived
                if not self._may_try_again(call, error, tries):
                    raise
            else:
                return self._read(call, answer, may_have_arrived)
            self._sleep(_pause_before(tries))

    def _send_once(self, call: Call[T]) -> _Answer:
        deadline = time.monotonic() + self.timeout
        try:
            response = self._transport.handle_request(self._request(call))
            try:
                answer = _Answer(response.status_code, response.headers, deadline)
                self._last_date = response.headers.get("Date", "")
                for chunk in _chunks(response):
                    answer.add(chunk)
                    if answer.is_too_large:
                        break
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise self._transport_error(error) from error
        return answer

    publish = _blocking(calls.publish)
    batch = _blocking(calls.batch)

    get_message = _blocking(calls.get_message)
    cancel_message = _blocking(calls.cancel_message)
    cancel_messages = _blocking(calls.cancel_messages)
    cancel_messages_by = _blocking(calls.cancel_messages_by)
    cancel_all_messages = _blocking(calls.cancel_all_messages)

    logs = _blocking(calls.logs)
    dead_letters = _blocking(calls.dead_letters)
    get_dead_letter = _blocking(calls.get_dead_letter)
    delete_dead_letter = _blocking(calls.delete_dead_letter)
    delete_dead_letters = _blocking(calls.delete_dead_letters)
    retry_dead_letter = _blocking(calls.retry_dead_letter)
    retry_dead_letters = _blocking(calls.retry_dead_letters)

    queues = _blocking(calls.queues)
    get_queue = _blocking(calls.get_queue)
    upsert_queue = _blocking(calls.upsert_queue)
    delete_queue = _blocking(calls.delete_queue)
    pause_queue = _blocking(calls.pause_queue)
    resume_queue = _blocking(calls.resume_queue)

    flow_controls = _blocking(calls.flow_controls)
    get_flow_control = _blocking(calls.get_flow_control)
    pause_flow_control = _blocking(calls.pause_flow_control)
    resume_flow_control = _blocking(calls.resume_flow_control)
    pin_flow_control = _blocking(calls.pin_flow_control)
    unpin_flow_control = _blocking(calls.unpin_flow_control)
    reset_flow_control_rate = _blocking(calls.reset_flow_control_rate)
    resume_gates = _blocking(calls.resume_gates)
    global_parallelism = _blocking(calls.global_parallelism)

    keys = _blocking(calls.keys)
    rotate_keys = _blocking(calls.rotate_keys)


class AsyncClient(_Connection):
    """QStash, awaitable. The same calls as ``Client``."""

    def __init__(
        self,
        token: str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        **settings: Any,
    ) -> None:
        super().__init__(token, **settings)
        self._sleep = sleep
        self._transport: httpx.AsyncBaseTransport = (
            self._given_transport or httpx.AsyncHTTPTransport()
        )

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def send(self, call: Call[T]) -> T:
        """Carry out any ``Call``."""
        tries, may_have_arrived = 0, False
        while True:
            tries += 1
            try:
                answer = await self._send_once(call)
            except TransportError as error:
                may_have_arrived = error.is_ambiguous = error.is_ambiguous or may_have_arrived
                if not self._may_try_again(call, error, tries):
                    raise
            else:
                return self._read(call, answer, may_have_arrived)
            await self._sleep(_pause_before(tries))

    async def _send_once(self, call: Call[T]) -> _Answer:
        deadline = time.monotonic() + self.timeout
        try:
            response = await self._transport.handle_async_request(self._request(call))
            try:
                answer = _Answer(response.status_code, response.headers, deadline)
                self._last_date = response.headers.get("Date", "")
                async for chunk in response.aiter_bytes():
                    answer.add(chunk)
                    if answer.is_too_large:
                        break
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise self._transport_error(error) from error
        return answer

    publish = _awaitable(calls.publish)
    batch = _awaitable(calls.batch)

    get_message = _awaitable(calls.get_message)
    cancel_message = _awaitable(calls.cancel_message)
    cancel_messages = _awaitable(calls.cancel_messages)
    cancel_messages_by = _awaitable(calls.cancel_messages_by)
    cancel_all_messages = _awaitable(calls.cancel_all_messages)

    logs = _awaitable(calls.logs)
    dead_letters = _awaitable(calls.dead_letters)
    get_dead_letter = _awaitable(calls.get_dead_letter)
    delete_dead_letter = _awaitable(calls.delete_dead_letter)
    delete_dead_letters = _awaitable(calls.delete_dead_letters)
    retry_dead_letter = _awaitable(calls.retry_dead_letter)
    retry_dead_letters = _awaitable(calls.retry_dead_letters)

    queues = _awaitable(calls.queues)
    get_queue = _awaitable(calls.get_queue)
    upsert_queue = _awaitable(calls.upsert_queue)
    delete_queue = _awaitable(calls.delete_queue)
    pause_queue = _awaitable(calls.pause_queue)
    resume_queue = _awaitable(calls.resume_queue)

    flow_controls = _awaitable(calls.flow_controls)
    get_flow_control = _awaitable(calls.get_flow_control)
    pause_flow_control = _awaitable(calls.pause_flow_control)
    resume_flow_control = _awaitable(calls.resume_flow_control)
    pin_flow_control = _awaitable(calls.pin_flow_control)
    unpin_flow_control = _awaitable(calls.unpin_flow_control)
    reset_flow_control_rate = _awaitable(calls.reset_flow_control_rate)
    resume_gates = _awaitable(calls.resume_gates)
    global_parallelism = _awaitable(calls.global_parallelism)

    keys = _awaitable(calls.keys)
    rotate_keys = _awaitable(calls.rotate_keys)


def _chunks(response: httpx.Response) -> Iterable[bytes]:
    # We ask for no compression. For a proxy that compresses all the same there is the slow way.
    if "Content-Encoding" in response.headers:
        return response.iter_bytes()
    return cast("httpx.SyncByteStream", response.stream)


class _Answer:
    """An answer as it comes in. httpx bounds each read; this bounds them all together."""

    def __init__(self, status: int, headers: httpx.Headers, deadline: float) -> None:
        self.status = status
        self.headers = headers
        self.deadline = deadline
        self.size = 0
        self.chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.chunks.append(chunk)
        if time.monotonic() > self.deadline:
            raise TransportError("QStash's answer took too long", is_ambiguous=True)

    @property
    def is_too_large(self) -> bool:
        return self.size > _LARGEST_ANSWER

    @property
    def content(self) -> bytes:
        return b"".join(self.chunks)


def _is_http_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in {"http", "https"} and bool(url.host)


def _pause_before(tries: int) -> float:
    """Seconds. The first retry is at once: most often a kept connection had gone stale."""
    return 0.0 if tries == 1 else 0.2 * 2.0 ** (tries - 2)
