"""What QStash POSTs to a callback URL after an attempt: envelope <-> ``Callback``."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .exceptions import EnvelopeError

NO_RESPONSE = -1
"""``status`` when the destination could not be reached or did not answer in time."""

# Of objects with repeated fields. A hostile envelope may hold a million of them.
_MOST_NOTES = 10

Header = Mapping[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Callback:
    """One attempt, told. QStash tells of every attempt, and once more when it gives up.

    Source: QStash's callback documentation; what it leaves open is read tolerantly.
    """

    status: int
    """The destination's HTTP status, or -1 when there was no response."""
    header: Header = field(default_factory=dict)
    """The destination's response headers."""
    body: bytes = b""
    """The destination's response, cut at the plan's size."""
    retried: int = 0
    """Attempts so far minus one: 0 is the first attempt."""
    max_retries: int | None = 0
    """None is unsaid: only a failure callback knows then that no attempt follows."""
    source_message_id: str
    """The id that publish answered with."""
    url: str = ""
    method: str = "POST"
    source_header: Header = field(default_factory=dict, repr=False)
    """The original's headers. These carry the provider's key: never store or log them."""
    source_body: bytes = field(default=b"", repr=False)
    not_before: int = 0
    """Unix milliseconds."""
    created_at: int = 0
    """Unix milliseconds."""
    topic_name: str = ""
    endpoint_name: str = ""
    schedule_id: str = ""
    caller_ip: str = ""
    dlq_id: str = ""
    """Set on a failure callback: where the message lies now."""
    encoded_source: str = field(default="", repr=False, compare=False)
    """The original's body in base64, as it came: see ``asked_model``."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was odd about the envelope and how it was read."""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_failure_callback(self) -> bool:
        return bool(self.dlq_id)

    @property
    def is_last(self) -> bool:
        """No attempt follows this one. After a 489 only the failure callback knows."""
        if self.is_success or self.is_failure_callback:
            return True
        return self.max_retries is not None and self.retried >= self.max_retries

    @property
    def asked_model(self) -> str:
        """The model that the original names, where it is told; else empty."""
        with suppress(ValueError, RecursionError):  # neither base64 nor JSON
            asked = json.loads(base64.b64decode(self.encoded_source, validate=True))
            if isinstance(asked, dict) and isinstance(asked.get("model"), str):
                return str(asked["model"])
        return ""

    def to_json(self) -> bytes:
        """The envelope, with empty optional fields left out as the service does."""
        envelope: dict[str, Any] = {
            "status": self.status,
            "header": {name: list(values) for name, values in self.header.items()},
            "body": base64.b64encode(self.body).decode(),
            "retried": self.retried,
            "maxRetries": self.max_retries,
            "sourceMessageId": self.source_message_id,
            "topicName": self.topic_name,
            "endpointName": self.endpoint_name,
            "url": self.url,
            "method": self.method,
            "sourceHeader": {name: list(values) for name, values in self.source_header.items()},
            "sourceBody": base64.b64encode(self.source_body).decode(),
            "notBefore": self.not_before,
            "createdAt": self.created_at,
            "scheduleId": self.schedule_id,
            "callerIP": self.caller_ip,
            "dlqId": self.dlq_id,
        }
        optional = {"topicName", "endpointName", "scheduleId", "callerIP", "dlqId"}
        if self.max_retries is None:
            optional.add("maxRetries")
        kept = {name: value for name, value in envelope.items() if value or name not in optional}
        return json.dumps(kept, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, envelope: bytes, *, with_source: bool = True) -> Callback:
        """Read an envelope. Raises ``EnvelopeError`` when it names no attempt of any message.

        Without ``source_header`` and ``source_body``, which ``asked_model`` does without, it takes
        half the time.
        """
        notes: list[str] = []
        try:
            fields = json.loads(
                envelope,
                parse_constant=_refuse_constant,
                object_pairs_hook=partial(_last_of_each, notes),
            )
        except (ValueError, RecursionError) as error:
            raise EnvelopeError(f"not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise EnvelopeError(f"not an object but {type(fields).__name__}")
        read = _Reader(fields, notes)
        source_message_id = read.text("sourceMessageId")
        if not source_message_id:
            raise EnvelopeError("sourceMessageId is missing")
        return cls(
            status=read.status("status"),
            header=read.header("header"),
            body=read.base64("body"),
            retried=read.count("retried"),
            # One page of the documentation spells it maxRteries.
            max_retries=read.known_count("maxRetries" if "maxRetries" in fields else "maxRteries"),
            source_message_id=source_message_id,
            url=read.text("url"),
            method=read.text("method") or "POST",
            source_header=read.header("sourceHeader") if with_source else {},
            source_body=read.base64("sourceBody") if with_source else b"",
            encoded_source=source if isinstance(source := fields.get("sourceBody"), str) else "",
            not_before=read.count("notBefore"),
            created_at=read.count("createdAt"),
            topic_name=read.text("topicName"),
            endpoint_name=read.text("endpointName"),
            schedule_id=read.text("scheduleId"),
            caller_ip=read.text("callerIP"),
            dlq_id=read.text("dlqId"),
            notes=tuple(notes),
        )


@dataclass
class _Reader:
    """Reads one field at a time and notes what it had to bend."""

    fields: dict[str, Any]
    notes: list[str]

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value or ""
        self.notes.append(f"{name} is not a string")
        return ""

    def integer(self, name: str) -> int | None:
        """Numbers come as numbers; the documentation draws some as strings."""
        value = self.fields.get(name)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            self.notes.append(f"{name} is not a whole number")
        return None

    def known_count(self, name: str) -> int | None:
        """None where it is missing or no count."""
        value = self.integer(name)
        if value is None or 0 <= value < 2**63:
            return value
        self.notes.append(f"{name} is out of range")
        return None

    def count(self, name: str) -> int:
        return self.known_count(name) or 0

    def status(self, name: str) -> int:
        value = self.integer(name)
        if value is None or value == NO_RESPONSE:
            return NO_RESPONSE
        if 100 <= value <= 599:
            return value
        if value:  # 0 is a spelling of "no response"
            self.notes.append(f"status {value} is not an HTTP status")
        return NO_RESPONSE

    def header(self, name: str) -> dict[str, list[str]]:
        """Name -> values; some versions send one string instead of a list."""
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.notes.append(f"{name} is not an object")
            return {}
        lists = {
            header: values if isinstance(values, list) else [values]
            for header, values in value.items()
        }
        if {type(each) for values in lists.values() for each in values} <= _STRINGS:
            return lists
        self.notes.append(f"{name} holds values that are not strings")
        return {
            header: [str(each) for each in values if isinstance(each, str | int | float)]
            for header, values in lists.items()
        }

    def base64(self, name: str) -> bytes:
        """Standard base64, or the URL-safe kind. What is neither is kept as it came."""
        text = self.text(name)
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(text, validate=True)
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(text, altchars=b"-_", validate=True)
        self.notes.append(f"{name} is not base64")
        return text.encode("utf-8", "replace")


_STRINGS = {str}
_SOURCE = ("sourceHeader", "sourceBody")
# A text, cut short perhaps, or a sign. All between them are numbers, words and what is no JSON.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},:]', re.DOTALL)
_LEFT = re.compile(r'source(?:Header|Body)(?!": ?null)')


def without_source(envelope: bytes) -> bytes:
    """``envelope`` with null for the original's headers and body, the provider's key and the prompt.

    For envelopes that cannot be read: cut short, nested too deeply, or no JSON at all. Whatever else
    they hold stays as it is, so that they may be read yet. Where no value can be made out after one of
    the two names, all from there on goes.
    """
    # As JSON's reader takes it, which tells UTF-16 by its zeros, if it is not the usual UTF-8.
    readings = (("utf-8", "surrogateescape"), (json.detect_encoding(envelope), "replace"))
    for encoding, errors in readings:
        text = envelope.decode(encoding, errors)
        if (without := _nulled(text)) != text:
            return without.encode("utf-8", "surrogateescape")
    return envelope


def _nulled(text: str) -> str:
    kept, begin, name = [], 0, None
    tokens = _TOKEN.finditer(text)
    for token in tokens:
        if name and token[0] == ":" and _as_text(name[0]) in _SOURCE:
            kept.append(f"{text[begin : name.end()]}: null")
            begin = _end_of_value(tokens, len(text))
        name = token
    without = "".join([*kept, text[begin:]])
    left = _LEFT.search(without)
    return without[: left.start()] if left else without


def _end_of_value(tokens: Iterator[re.Match[str]], end: int) -> int:
    """Where the value ends that begins with the next of ``tokens``."""
    depth = 0
    for token in tokens:
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth < 0 or (depth == 0 and token[0] == ","):
            return token.start()
    return end


def _as_text(token: str) -> str:
    """A name may be written with escapes."""
    with suppress(ValueError):
        return str(json.loads(token))
    return token


def _last_of_each(notes: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of one object, as JSON's readers agree; a repeated one is noted, once an object."""
    fields = dict(pairs)
    if len(fields) < len(pairs) and len(notes) < _MOST_NOTES:
        [(name, _), *_] = Counter(name for name, _ in pairs).most_common(1)
        notes.append(f"{name[:40]} is given more than once")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
