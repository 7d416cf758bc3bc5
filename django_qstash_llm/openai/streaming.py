"""An answer as it comes, as server-sent events: every chunk is handed on at once."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator

from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, InterfaceError

from ..chat import AsyncStream, Stream
from ..conf import app_settings
from ..door import EVENTS
from ..exceptions import ChatFailed
from ..models import KeptAnswer, LLMRequest
from .refusals import as_refusal, logger

_DONE = b"data: [DONE]\n\n"
# Where usage is counted, chunks without it say so. We have it counted always, and to whom did not ask
# that is a surprise: qstash 2.0.5 falls over it. (In a text these quotes would be escaped.)
_NO_USAGE = re.compile(rb',\s*"usage"\s*:\s*null(?=\s*[,}])')


def events(stream: Stream | AsyncStream, kept: KeptAnswer | None) -> Iterator[bytes] | AsyncEvents:
    """What a response under WSGI or ASGI iterates."""
    return _events(stream, kept) if isinstance(stream, Stream) else AsyncEvents(stream, kept)


def _events(stream: Stream, kept: KeptAnswer | None) -> Iterator[bytes]:
    """Who stops reading closes the provider's connection."""
    said = _Said(kept, stream.llm_request)
    with stream:
        try:
            for chunk in stream:
                if not chunk.is_extra:
                    yield said.event(chunk.data)
            last = said.note(_DONE)
        except ChatFailed as error:
            last = said.event(as_refusal(error).body)
    # First: many leave as soon as they have heard the last word.
    said.keep()
    yield last


class AsyncEvents:
    """The same for ASGI."""

    def __init__(self, stream: AsyncStream, kept: KeptAnswer | None) -> None:
        self._stream = stream
        self._said = _Said(kept, stream.llm_request)
        self._is_over = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        said = self._said
        try:
            async for chunk in self._stream:
                if not chunk.is_extra:
                    yield said.event(chunk.data)
            last = said.note(_DONE)
        except ChatFailed as error:
            last = said.event(as_refusal(error).body)
        self._is_over = True
        # First: many leave as soon as they have heard the last word.
        if said.is_kept:
            await sync_to_async(said.keep)()
        yield last

    def close(self) -> None:
        """Django calls it when the response is at its end, however it came to it: a reader may leave
        while nothing here is at work that could notice."""
        if not self._is_over:
            async_to_sync(self._stream.aclose)()


class _Said:
    """What is said, and was so far, where it is to be said again on demand."""

    def __init__(self, kept: KeptAnswer | None, llm_request: LLMRequest) -> None:
        options = llm_request.parameters.get("stream_options")
        self._is_usage_asked = isinstance(options, dict) and bool(options.get("include_usage"))
        self._kept = kept
        self._parts: list[bytes] = []
        self._left = app_settings().max_stored_body_bytes

    def event(self, data: bytes) -> bytes:
        if not self._is_usage_asked:
            data = _NO_USAGE.sub(b"", data) if b'"usage"' in data else data
        # JSON may have come in several lines.
        return self.note(b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n")

    def note(self, event: bytes) -> bytes:
        if self._kept is not None:
            self._left -= len(event)
            if self._left >= 0:
                self._parts.append(event)
        return event

    @property
    def is_kept(self) -> bool:
        return self._kept is not None

    def keep(self) -> None:
        if self._kept is not None and self._left >= 0:
            try:
                self._kept.keep(200, b"".join(self._parts), EVENTS)
            except (DatabaseError, InterfaceError) as error:
                # It has been paid for, and who reads has nearly all of it.
                logger.error("A stream is told and not kept: %s", type(error).__name__)
