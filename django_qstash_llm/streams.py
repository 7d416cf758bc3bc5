"""Reading what providers stream: bytes, in whatever pieces they come -> chunks, and the completion.

No input or output of its own: ``chat`` feeds it. Outside names stop here, as in ``completions``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import anthropic
from .cleaning import clean_text
from .completions import (
    BYTES_PER_TOKEN,
    LARGEST_ANSWER,
    Completion,
    Usage,
    error_in,
    read_answer,
    read_usage,
)

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a last \r may be half of \r\n


class StreamBroken(Exception):
    """A stream that is no whole completion. ``code``: ``cut``, ``malformed``, ``too_large``, or the
    provider's own word for its error."""

    def __init__(self, code: str, problem: str, *, body: bytes = b"") -> None:
        super().__init__(problem)
        self.code = code
        self.body = body
        """The event that said so."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of an answer."""

    data: bytes
    """JSON of a ``chat.completion.chunk``, as it came or translated."""
    text: str = ""
    """What it adds to the text of the (first) answer."""
    is_extra: bool = False
    """The count of tokens that we asked for and the caller did not."""


class Events:
    """Server-sent events. Each is handed on as soon as it is whole, which is at the end of a line
    where that makes a JSON; the blank line is not waited for, and may be missing."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        """A line whose end has not come."""
        self._data: list[bytes] = []
        """Lines of an event's data that are no JSON yet."""
        self._name = b""
        self._size = 0

    def feed(self, received: bytes) -> Iterator[tuple[bytes, Any, bytes]]:
        """Name, JSON and bytes of each event that ends in ``received``; of ``[DONE]`` the JSON is
        None. Raises ``StreamBroken``."""
        self._size += len(received)
        if self._size > LARGEST_ANSWER:
            raise StreamBroken("too_large", f"the stream is over {LARGEST_ANSWER} bytes")
        self._line.append(received)
        if b"\n" not in received and b"\r" not in received:
            return  # looked through again and again, a long line would take for ever
        *lines, rest = _LINE_END.split(b"".join(self._line))
        self._line = [rest]
        for line in lines:
            yield from self._read(line)

    def end(self) -> Iterator[tuple[bytes, Any, bytes]]:
        """The same for what no line end came after. Raises ``StreamBroken``."""
        rest = b"".join(self._line)
        self._line = []
        yield from self._read(rest.rstrip(b"\r"))
        yield from self._read(b"")

    def _read(self, line: bytes) -> Iterator[tuple[bytes, Any, bytes]]:
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if any(self._data):
                said = clean_text(b"\n".join(self._data)[:80].decode("utf-8", "replace"))
                raise StreamBroken("malformed", f"an event of the stream is not JSON: {said!r}")
            self._name, self._data = b"", []
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._name = value
        elif name == b"data":
            self._data.append(value)
            whole = b"\n".join(self._data)
            if whole.strip() == b"[DONE]":
                yield b"", None, whole
            else:
                try:
                    read = json.loads(whole)
                except (ValueError, RecursionError):
                    return  # goes on in the next line, or the blank line says that it does not
                yield self._name, read, whole
            self._data = []


def _text_of(content: Any) -> str:
    """Of a text, or of Mistral's list of parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


@dataclass
class _Choice:
    """One of the answers (``n``) as far as it came."""

    texts: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    calls: dict[Any, dict[str, Any]] = field(default_factory=dict)
    thoughts: list[str] = field(default_factory=list)
    """Reasoning that is told beside the answer: output, and paid for."""
    finish_reason: str = ""

    def add(self, delta: Mapping[str, Any]) -> str:
        """What it adds to the text."""
        text, refusal = _text_of(delta.get("content")), delta.get("refusal")
        if isinstance(refusal, str):
            self.refusals.append(refusal)
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str):
            self.thoughts.append(thought)
        calls = delta.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else []):
            if isinstance(call, dict):
                # Some leave the index out, where there is one call in each chunk.
                self._add_call(call.get("index", call.get("id") or position), call)
        if text:
            self.texts.append(text)
        return text

    def _add_call(self, index: Any, call: dict[str, Any]) -> None:
        told = self.calls.setdefault(str(index), {"id": "", "type": "function", "function": {}})
        told |= {
            name: value
            for name, value in call.items()
            if name not in {"index", "function"} and value is not None
        }
        function = call.get("function")
        for name, value in function.items() if isinstance(function, dict) else ():
            if name == "arguments" and isinstance(value, str):
                told["function"]["arguments"] = told["function"].get("arguments", "") + value
            elif value is not None:
                told["function"][name] = value

    @property
    def message(self) -> dict[str, Any]:
        return {
            "content": "".join(self.texts),
            "refusal": "".join(self.refusals),
            "tool_calls": list(self.calls.values()),
        }

    @property
    def size(self) -> int:
        """Bytes of UTF-8 that were said."""
        said = [*self.texts, *self.refusals, *self.thoughts]
        said += [json.dumps(call["function"]) for call in self.calls.values()]
        return sum(len(text.encode("utf-8", "replace")) for text in said)


class StreamReader:
    """Reads one stream."""

    def __init__(
        self,
        *,
        is_anthropic: bool,
        asked_bytes: int,
        is_usage_asked: bool,
        created: int,
        answers: int = 1,
    ) -> None:
        """``asked_bytes``: weight of the request, by which its tokens are estimated where nobody
        counts them. ``is_usage_asked``: by the caller. ``answers``: how many were asked for."""
        self.is_done = False
        """``[DONE]`` came: nothing more will."""
        self._events = Events()
        self._translator = anthropic.Chunks(created=created) if is_anthropic else None
        self._asked_bytes = asked_bytes
        self._is_usage_asked = is_usage_asked
        self._answers = answers
        self._choices: dict[Any, _Choice] = {}
        self._head: dict[str, Any] = {}
        self._usage: Any = None

    def feed(self, received: bytes) -> Iterator[Chunk]:
        """Every chunk that ends in ``received``. Raises ``StreamBroken``."""
        for name, event, data in self._events.feed(received):
            if self.is_done:
                return  # whatever it may be
            yield from self._take(name, event, data)

    def end(self) -> Iterator[Chunk]:
        """The stream is over. Raises ``StreamBroken`` unless it is a whole completion."""
        if not self.is_done:
            for name, event, data in self._events.end():
                yield from self._take(name, event, data)
        if not self.is_complete:
            raise StreamBroken("cut", "the stream ended without a finish_reason")

    @property
    def is_complete(self) -> bool:
        """Whether every answer has its finish reason. Usage may still come."""
        # Some providers know of one answer only, and say when they are done.
        are_all = self.is_done or len(self._choices) >= self._answers
        return (
            bool(self._choices) and are_all and all(c.finish_reason for c in self._choices.values())
        )

    @property
    def completion(self) -> Completion:
        """The first answer as far as it came, with its usage."""
        choice = self._choices.get(min(self._choices, default=0)) or _Choice()
        told = {"message": choice.message, "finish_reason": choice.finish_reason}
        return read_answer({**self._head, "choices": [told], "usage": self._counted()})

    @property
    def is_estimated(self) -> bool:
        """Whether the tokens are not those of the provider."""
        return "estimated" in self._counted()

    def _counted(self) -> dict[str, Any]:
        """Tokens as the provider counted them, or else as we estimate them."""
        usage = self._translator.usage if self._translator else self._usage
        said = -(-sum(choice.size for choice in self._choices.values()) // BYTES_PER_TOKEN)
        if usage and not self.is_complete:
            # Counted when it began: of the output next to nothing.
            output = max(said, read_usage(usage).output_tokens or 0)
            name = "output_tokens" if self._translator else "completion_tokens"
            return {**usage, name: output, "estimated": True}
        if usage and read_usage(usage) != Usage():
            return dict(usage)
        asked = -(-self._asked_bytes // BYTES_PER_TOKEN)
        return {"prompt_tokens": asked, "completion_tokens": said, "estimated": True}

    def _take(self, name: bytes, event: Any, data: bytes) -> Iterator[Chunk]:
        if event is None:
            self.is_done = True
            return
        if not isinstance(event, dict):
            raise StreamBroken("malformed", "an event of the stream is not an object")
        if event.get("error") or name.strip() == b"error" or event.get("type") == "error":
            self._count(event)
            code, message = error_in(event)
            raise StreamBroken(
                code or "error", message or "the provider broke off with an error", body=data
            )
        if self._translator is None:
            yield self._read(event, data)
            return
        for chunk in self._translator.translate(event):
            written = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace")
            yield self._read(chunk, written)
        self.is_done = event.get("type") == "message_stop"

    def _read(self, chunk: dict[str, Any], data: bytes) -> Chunk:
        for name in ("id", "model", "service_tier"):
            if chunk.get(name):
                self._head[name] = chunk[name]
        counts = self._count(chunk)
        choices = chunk.get("choices")
        text, says = "", False
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                added = self._add(choice)
                says = says or bool(choice.get("finish_reason")) or _says(choice)
                text += added
        return Chunk(data, text, is_extra=counts and not says and not self._is_usage_asked)

    def _count(self, chunk: dict[str, Any]) -> bool:
        beside = chunk.get("x_groq")
        usage = chunk.get("usage") or (beside.get("usage") if isinstance(beside, dict) else None)
        if not isinstance(usage, dict):
            return False
        self._usage = usage
        return True

    def _add(self, choice: dict[str, Any]) -> str:
        """What it adds to the text of the first answer."""
        index = choice.get("index")
        index = index if type(index) is int else 0
        told = self._choices.setdefault(index, _Choice())
        delta = choice.get("delta")
        added = told.add(delta) if isinstance(delta, dict) else ""
        reason = choice.get("finish_reason")
        if reason == "error":
            raise StreamBroken("error", "the provider broke off with finish_reason 'error'")
        if isinstance(reason, str) and reason:
            told.finish_reason = reason
        return added if index == min(self._choices) else ""


def _says(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(delta.values())
