"""How a message is to be delivered: options <-> ``Upstash-*`` headers.

``Options`` holds what many messages share; what differs from message to message (destination,
body, deduplication id, callback URLs) is ``Message``'s. Source: QStash's publish API.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from .durations import format_duration, parse_duration
from .exceptions import InvalidOption
from .retry import RetryDelay

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
DEFAULT_RETRIES = 3
LONGEST_PERIOD = 7 * 86_400
"""Seconds: the longest period of a flow-control rate."""
NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,256}")
"""Queues, flow-control keys, deduplication ids and the ids QStash gives, which travel unescaped.
Not ``.`` and ``..``: as a path's segment they climb, and ``DELETE /v2/messages/.`` cancels all."""

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_HEADER_VALUE = re.compile(r"(?![ \t])[\x20-\x7e\t]*(?<![ \t])")
_REDACTED = re.compile(r"body|headers?(?:\[[A-Za-z0-9!#$%&'*+.^_`|~-]+\])?", re.IGNORECASE)
_TRUE = {"1", "t", "T", "true", "True", "TRUE"}
_FALSE = {"0", "f", "F", "false", "False", "FALSE"}
_FLOW_VALUE_TEXT = (
    "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, "
    "or both as comma-separated values"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowControl:
    """A ceiling that all messages with the same key share."""

    key: str
    parallelism: int | None = None
    """Deliveries in flight at most."""
    rate: int | None = None
    """Deliveries started per period at most."""
    period: int = 1
    """Seconds; with ``rate``."""

    def __post_init__(self) -> None:
        check_name("flow_control.key", self.key)
        if self.parallelism is None and self.rate is None:
            raise InvalidOption(
                "flow_control", "give rate, parallelism or both", wire_text=_FLOW_VALUE_TEXT
            )
        for name in ("parallelism", "rate", "period"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and 1 <= value < 2**31):
                raise InvalidOption(
                    f"flow_control.{name}",
                    f"{value!r} is not a whole number of at least 1",
                    wire_text=_FLOW_VALUE_TEXT,
                )
        if self.period > LONGEST_PERIOD:
            problem = "longer than 7 days"
            text = f"invalid Upstash-Flow-Control-Value header: {problem}"
            raise InvalidOption("flow_control.period", problem, wire_text=text)

    def to_value(self) -> str:
        """``parallelism=2, rate=10, period=60s``"""
        parts = [("parallelism", self.parallelism), ("rate", self.rate)]
        written = [f"{name}={value}" for name, value in parts if value is not None]
        if self.rate is not None or self.period != 1:
            written.append(f"period={format_duration(self.period)}")
        return ", ".join(written)

    @classmethod
    def from_value(
        cls, key: str, value: str, *, header: str = "Upstash-Flow-Control-Value"
    ) -> FlowControl:
        """Read the header's value: any order, optional spaces, period as duration or seconds."""
        numbers: dict[str, int] = {}
        for part in value.split(","):
            name, equals, text = (piece.strip() for piece in part.partition("="))
            if not equals or name not in {"parallelism", "rate", "period"}:
                raise InvalidOption("flow_control", _FLOW_VALUE_TEXT, wire_text=_FLOW_VALUE_TEXT)
            if name == "period" and not text.isdigit():
                numbers[name] = math.ceil(parse_duration(text, field=header))
            elif text.isascii() and text.isdigit() and len(text) < 11:
                numbers[name] = int(text)
            else:
                raise InvalidOption("flow_control", _FLOW_VALUE_TEXT, wire_text=_FLOW_VALUE_TEXT)
        return cls(key=key, **numbers)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a message is delivered. Every field left out is QStash's default.

    Raises ``InvalidOption`` naming the field when a value cannot be sent.
    """

    method: str = "POST"
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Forwarded to the destination as they stand (``Upstash-Forward-*`` on the wire).
    Keys travel here, so no repr shows them."""
    delay: float | None = None
    """Seconds from acceptance. Refused by QStash when the message is enqueued."""
    not_before: datetime | None = None
    """An aware moment; wins over ``delay``. Whole seconds on the wire."""
    retries: int | None = None
    """After the first attempt; 0 is one attempt in all. QStash's default is 3."""
    retry_delay: str = ""
    """An expression in milliseconds, see ``retry.RetryDelay``."""
    timeout: float | None = None
    """Seconds per attempt. Can only shorten the plan's."""
    content_based_deduplication: bool = False
    callback: Options | None = None
    """How the callback is delivered; its URL is ``Message.callback``."""
    failure_callback: Options | None = None
    flow_control: FlowControl | None = None
    labels: tuple[str, ...] = ()
    redact: tuple[str, ...] = ()
    """``body``, ``header`` (all of them) or ``header[Name]``: hidden in QStash's read API."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidOption("method", f"{self.method!r} is not one of {', '.join(METHODS)}")
        for name in ("delay", "timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not (is_number(seconds) and 0 <= seconds < 1e9):
                raise InvalidOption(name, f"{seconds!r} is not a number of seconds of at least 0")
        if self.timeout is not None and self.timeout < 0.001:
            raise InvalidOption("timeout", "less than 1 ms is no time to answer in; leave it out")
        if self.not_before is not None and self.not_before.tzinfo is None:
            raise InvalidOption("not_before", "give a moment with a time zone")
        if self.retries is not None and not (
            is_integer(self.retries) and 0 <= self.retries < 2**31
        ):
            raise InvalidOption("retries", f"{self.retries!r} is not a whole number of at least 0")
        if self.retry_delay:
            RetryDelay(self.retry_delay)
        if not _HEADER_VALUE.fullmatch(self.content_type):
            raise InvalidOption("content_type", "not printable ASCII")
        for header, value in self.headers.items():
            check_header(header, value)
        for name, options in (
            ("callback", self.callback),
            ("failure_callback", self.failure_callback),
        ):
            if options and (options.callback or options.failure_callback or options.content_type):
                raise InvalidOption(name, "has neither a content type nor a callback of its own")
        if isinstance(self.labels, str):
            raise InvalidOption("labels", f"{self.labels!r} is one string: give a tuple of them")
        for label in self.labels:
            check_label("labels", label)
        for redacted in self.redact:
            if not _REDACTED.fullmatch(redacted):
                raise InvalidOption("redact", f"{redacted!r} is not body, header or header[Name]")

    @cached_property
    def _shared_headers(self) -> dict[str, str]:
        headers = {"Content-Type": self.content_type} if self.content_type else {}
        headers |= self.to_headers()
        # A message adds its own label to these, so it writes them all.
        headers.pop("Upstash-Label", None)
        return headers

    @cached_property
    def shared_json(self) -> str:
        """The headers that all messages with these options share, as the inside of a JSON object."""
        return json.dumps(self._shared_headers, separators=(",", ":"))[1:-1]

    @cached_property
    def labels_json(self) -> str:
        """The labels as the inside of a JSON string."""
        return json.dumps(",".join(self.labels))[1:-1]

    def wire_headers(self) -> dict[str, str]:
        """``to_headers`` with the Content-Type, which travels as itself, and without the labels."""
        return dict(self._shared_headers)

    def to_headers(self, prefix: str = "Upstash-") -> dict[str, str]:
        """The ``Upstash-*`` headers. ``prefix`` is ``Upstash-Callback-`` for a callback's options."""
        written: dict[str, Any] = {
            "Method": self.method if self.method != "POST" else None,
            "Delay": None if self.delay is None else format_duration(self.delay),
            "Not-Before": self.not_before and str(max(0, math.ceil(self.not_before.timestamp()))),
            "Retries": None if self.retries is None else str(self.retries),
            "Retry-Delay": self.retry_delay.strip(),
            "Timeout": None if self.timeout is None else format_duration(self.timeout),
            "Content-Based-Deduplication": "true" if self.content_based_deduplication else None,
            "Flow-Control-Key": self.flow_control and self.flow_control.key,
            "Flow-Control-Value": self.flow_control and self.flow_control.to_value(),
            "Label": ",".join(self.labels),
            "Redact-Fields": ",".join(self.redact),
        }
        headers = {f"{prefix}{name}": value for name, value in written.items() if value}
        headers |= {f"{prefix}Forward-{name}": value for name, value in self.headers.items()}
        for name, options in (
            ("Callback", self.callback),
            ("Failure-Callback", self.failure_callback),
        ):
            if options is not None:
                headers |= options.to_headers(f"{prefix}{name}-")
        return headers

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], prefix: str = "upstash-") -> Options:
        """Read them back. ``headers`` has lower-case names; unknown ones are left alone."""

        def read(name: str, parse: Callable[[str, str], Any], default: Any) -> Any:
            value = headers.get(f"{prefix}{name}")
            # An empty header is how several HTTP clients spell "not given".
            if value is None or not value.strip():
                return default
            return parse(value.strip(), canonical(f"{prefix}{name}"))

        def nested(name: str) -> Options | None:
            inner = f"{prefix}{name}-"
            is_given = prefix == "upstash-" and any(header.startswith(inner) for header in headers)
            return cls.from_headers(headers, inner) if is_given else None

        forward = f"{prefix}forward-"
        forwarded = {
            canonical(name.removeprefix(forward)): value.strip()
            for name, value in headers.items()
            if name.startswith(forward) and name != forward
        }
        try:
            return cls(
                method=read("method", _read_method, "POST"),
                content_type=headers.get("content-type", "").strip()
                if prefix == "upstash-"
                else "",
                headers=forwarded,
                delay=read("delay", _read_duration, None),
                not_before=read("not-before", _read_moment, None),
                retries=read("retries", _read_count, None),
                retry_delay=read("retry-delay", _read_expression, ""),
                timeout=read("timeout", _read_duration, None),
                content_based_deduplication=read("content-based-deduplication", read_bool, False),
                callback=nested("callback"),
                failure_callback=nested("failure-callback"),
                flow_control=_read_flow_control(headers, prefix),
                labels=read("label", _read_list, ()),
                redact=read("redact-fields", _read_list, ()),
            )
        except InvalidOption as error:
            if header := _header_of(error, prefix, forwarded):
                raise InvalidOption(header, error.problem) from error
            raise


def canonical(header: str) -> str:
    """A header's name as Go writes it: ``x-request-ID`` is ``X-Request-Id``."""
    return "-".join(part[:1].upper() + part[1:].lower() for part in header.split("-"))


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_name(field_name: str, value: str, *, wire_text: str = "") -> None:
    """Refuse a name that could not travel in a path or header unescaped."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise InvalidOption(
            field_name,
            f"{value!r} is not a name: 1 to 256 letters, digits, '_', '-' and '.'",
            wire_text=wire_text,
        )


def check_label(field_name: str, label: str) -> None:
    """Refuse what would not be read back as the one label it is."""
    if not label or "," in label or not _HEADER_VALUE.fullmatch(label):
        raise InvalidOption(field_name, f"{label!r} is not a label: ASCII, trimmed, without commas")


def check_header(name: str, value: str) -> None:
    """Refuse what would end a header early or could not be sent as one."""
    if not _HEADER_NAME.fullmatch(name):
        raise InvalidOption("headers", f"{name!r} is not a header name")
    if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
        # The value may be a secret: it is not repeated.
        raise InvalidOption("headers", f"the value of {name} is not printable ASCII, trimmed")


def _read_method(value: str, header: str) -> str:
    if value.upper() not in METHODS:
        raise InvalidOption(header, f'unsupported method "{value}"')
    return value.upper()


def _read_duration(value: str, header: str) -> float:
    seconds = parse_duration(value, field=header)
    if seconds < 0:
        raise InvalidOption(header, f'negative duration "{value}"')
    return seconds


def _read_moment(value: str, header: str) -> datetime:
    # Past the year 9999 it is not seconds but milliseconds, a common mistake.
    if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) >= 253_402_300_800:
        raise InvalidOption(header, f'"{value}" is not a unix time in seconds')
    return datetime.fromtimestamp(int(value), tz=UTC)


def _read_count(value: str, header: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value):
        raise InvalidOption(header, f'"{value}" is not a whole number of at least 0')
    return int(value)


def read_bool(value: str, header: str) -> bool:
    if value not in _TRUE | _FALSE:
        raise InvalidOption(header, f'"{value}" is not a boolean')
    return value in _TRUE


def _read_expression(value: str, header: str) -> str:
    try:
        RetryDelay(value)
    except InvalidOption as error:
        raise InvalidOption(header, error.problem) from error
    return value


def _read_list(value: str, header: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


_HEADER_OF_FIELD = {
    "delay": "Delay",
    "timeout": "Timeout",
    "retries": "Retries",
    "labels": "Label",
    "redact": "Redact-Fields",
    "flow_control.key": "Flow-Control-Key",
    "flow_control.period": "Flow-Control-Value",
}


def _header_of(error: InvalidOption, prefix: str, forwarded: Mapping[str, str]) -> str:
    """The header in which that stood; empty when the error names it already."""
    if error.field == "content_type":
        return "Content-Type"
    if error.field == "headers":
        return next(
            f"{canonical(prefix)}Forward-{name}"
            for name, value in forwarded.items()
            if not _is_header(name, value)
        )
    name = _HEADER_OF_FIELD.get(error.field)
    return f"{canonical(prefix)}{name}" if name else ""


def _is_header(name: str, value: str) -> bool:
    return bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))


def _read_flow_control(headers: Mapping[str, str], prefix: str) -> FlowControl | None:
    key = headers.get(f"{prefix}flow-control-key", "").strip()
    value = headers.get(f"{prefix}flow-control-value")
    if not key and value is None:
        return None
    if not key or not value:
        missing = "Key" if not key else "Value"
        raise InvalidOption(
            canonical(f"{prefix}flow-control-{missing}"),
            "the flow-control key and value go together",
            wire_text=_FLOW_VALUE_TEXT if key else "",
        )
    return FlowControl.from_value(key, value, header=canonical(f"{prefix}flow-control-value"))
