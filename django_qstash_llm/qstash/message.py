"""One thing handed to QStash, and what QStash says to it: message <-> headers, batch items."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Self

from .exceptions import InvalidOption
from .options import NAME, Options, canonical, check_name

HOSTED_LLM = "api/llm"
"""The destination that stands for Upstash's hosted models."""

# Lone surrogates are text in JSON and cannot be sent.
_URL = re.compile(
    r"https?://[^/?#\\@\"\s\x00-\x1f\x7f\ud800-\udfff]+([/?][^#\"\s\x00-\x1f\x7f\\\ud800-\udfff]*)?",
    re.IGNORECASE,
)
_DEFAULT_OPTIONS = Options()


class Accepted(NamedTuple):
    """QStash took the message and answers for it from here on."""

    message_id: str
    is_duplicate: bool = False
    """The deduplication id had been seen: ``message_id`` is the first message's."""
    url: str = ""
    """Which endpoint of a URL group; empty otherwise."""

    def to_json(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"messageId": self.message_id}
        if self.url:
            answer["url"] = self.url
        return answer | ({"deduplicated": True} if self.is_duplicate else {})


class Refused(NamedTuple):
    """QStash did not take this item of a batch; the others are not touched by that."""

    error: str

    def to_json(self) -> dict[str, Any]:
        return {"error": self.error}


Answer = Accepted | Refused | list[Accepted | Refused]
"""One per message; a list when the destination is a URL group."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message on its way into QStash. Raises ``InvalidOption`` when it could not travel."""

    destination: str
    """An absolute http(s) URL, a URL group's name, or ``api/llm``."""
    body: bytes = field(default=b"", repr=False)
    """For a batch, ``JSONText`` is encoded fastest."""
    options: Options = field(default=_DEFAULT_OPTIONS)
    queue: str = ""
    """Enqueue there; empty publishes."""
    deduplication_id: str = ""
    callback: str = ""
    """URL that is told of every attempt."""
    failure_callback: str = ""
    """URL that is told, once, that no attempt will follow."""
    label: str = ""
    """One more label, before the options' own: that by which the sender finds this very message.
    Read back, it is the first of ``options.labels``."""

    def __post_init__(self) -> None:
        check_destination(self.destination)
        if self.queue:
            check_name("queue", self.queue, wire_text="invalid queue name")
        if self.deduplication_id and not NAME.fullmatch(self.deduplication_id):
            name = "deduplication_id"
            problem = f"{self.deduplication_id!r} is no id: 1 to 256 letters, digits, '_', '-', '.'"
            raise InvalidOption(name, problem, wire_text=_wire_text(name, problem))
        if self.label:
            check_name("label", self.label)
        for name, url in (("callback", self.callback), ("failure_callback", self.failure_callback)):
            if url and not (_URL.fullmatch(url) and url.isascii()):
                problem = f"{url!r} is not an absolute http(s) URL in ASCII"
                raise InvalidOption(name, problem, wire_text=_wire_text(name, problem))
        if self.destination == HOSTED_LLM and not self.callback:
            problem = "api/llm answers by callback: give its URL"
            raise InvalidOption("callback", problem, wire_text=_wire_text("callback", problem))

    @property
    def path(self) -> str:
        """Where it is posted. The destination goes in raw: QStash refuses an encoded one."""
        if self.queue:
            return f"/v2/enqueue/{self.queue}/{self.destination}"
        return f"/v2/publish/{self.destination}"

    def _own_headers(self) -> dict[str, str]:
        own = {
            "Upstash-Deduplication-Id": self.deduplication_id,
            "Upstash-Callback": self.callback,
            "Upstash-Failure-Callback": self.failure_callback,
            "Upstash-Label": ",".join(filter(None, (self.label, *self.options.labels))),
        }
        return {name: value for name, value in own.items() if value}

    def to_headers(self) -> dict[str, str]:
        return self.options.wire_headers() | self._own_headers()

    @classmethod
    def from_headers(
        cls, destination: str, headers: Mapping[str, str], body: bytes, queue: str = ""
    ) -> Message:
        """Read one off the wire. ``headers`` has lower-case names."""
        return cls(
            destination=destination,
            body=body,
            options=Options.from_headers(headers),
            queue=queue,
            deduplication_id=headers.get("upstash-deduplication-id", "").strip(),
            callback=headers.get("upstash-callback", "").strip(),
            failure_callback=headers.get("upstash-failure-callback", "").strip(),
        )

    def to_batch_item(self) -> bytes:
        """This message as one item of ``/v2/batch``'s JSON."""
        return batch_body([self])[1:-1]

    @classmethod
    def from_batch_item(cls, item: Any) -> Message:
        """Read one item of ``/v2/batch``: values may be strings or lists (Go), body text or JSON."""
        if not isinstance(item, dict):
            raise InvalidOption("batch", "each item is an object with a destination")
        destination, queue = item.get("destination"), item.get("queue")
        if not isinstance(destination, str):
            raise InvalidOption("destination", "missing", wire_text="missing destination")
        if not isinstance(queue, str | None):
            raise InvalidOption("queue", "not a string", wire_text="invalid queue name")
        body = item.get("body")
        if body is not None and not isinstance(body, str):
            body = json.dumps(body)
        headers = item.get("headers")
        # Text that JSON can hold and UTF-8 cannot is replaced, not refused: it is the body's affair.
        encoded = (body or "").encode("utf-8", "replace")
        flat = {} if headers is None else _flat_headers(headers)
        return cls.from_headers(destination, flat, encoded, queue or "")


def _flat_headers(headers: Any) -> dict[str, str]:
    if not isinstance(headers, dict):
        raise InvalidOption("headers", "not an object", wire_text="invalid headers")
    flat = {}
    for name, value in headers.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in values):
            raise InvalidOption(name, "not a string")
        flat[name.lower()] = ", ".join(values)
    return flat


@lru_cache(maxsize=1024)
def check_destination(destination: str) -> None:
    """Refuse what QStash would refuse, in its words."""
    if _URL.fullmatch(destination) and len(destination) <= 8192:
        path = destination.partition("?")[0]
        if {".", ".."} & set(path.split("/")):
            raise _invalid_destination("endpoint has dot segments")
        return
    if destination == HOSTED_LLM or NAME.fullmatch(destination):
        return
    if re.match(r"https?:", destination, re.IGNORECASE):
        raise _invalid_destination("endpoint is not a valid http url")
    raise _invalid_destination("endpoint has invalid scheme, add http:// or https://")


def _invalid_destination(problem: str) -> InvalidOption:
    return InvalidOption("destination", problem, wire_text=f"invalid destination url: {problem}")


def _wire_text(field_name: str, problem: str) -> str:
    """What a server says of it: it knows the header, not our field."""
    return f"invalid {canonical(f'upstash-{field_name}'.replace('_', '-'))} header: {problem}"


class JSONText(bytes):
    """JSON as ``dump`` writes it: UTF-8, and no control character that is not escaped.

    A body of this type can be put inside a batch's JSON by escaping two characters, which is a
    fourth of the cost of encoding it as a string that might hold anything.
    """

    @classmethod
    def dump(cls, value: Any) -> Self:
        """Raises ``TypeError`` or ``ValueError`` for what JSON cannot hold.

        Not escaped to ASCII: that would double the weight of most of the world's writing.
        """
        text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        try:
            return cls(text.encode())
        except UnicodeEncodeError:  # half a surrogate pair can only be said escaped
            return cls(json.dumps(value, separators=(",", ":")).encode())


def _escaped(body: bytes) -> bytes:
    """Any body as the inside of a JSON string."""
    try:
        return json.dumps(body.decode())[1:-1].encode("ascii")
    except UnicodeDecodeError as error:
        raise InvalidOption("body", "a batch is JSON, so its bodies must be UTF-8") from error


def batch_body(messages: Sequence[Message]) -> bytes:
    """The body of ``/v2/batch``, written by hand around what the messages share.

    With a dictionary per item, building and encoding costs more than the HTTP call. What is put
    between quotes unescaped here, ``Message`` has checked.
    """
    parts = [b"["] if messages else []
    options, destination, shared, labels = None, "", "", ""
    for message in messages:
        if message.options is not options or message.destination != destination:
            options, destination = message.options, message.destination
            comma = "," if options.shared_json else ""
            shared = f'{{"destination":{json.dumps(destination)},"headers":{{{options.shared_json}{comma}'
            labels = f",{options.labels_json}" if options.labels else ""
        unique, callback, failure = (
            message.deduplication_id,
            message.callback,
            message.failure_callback,
        )
        if message.label and unique and callback and failure:
            # What our app always gives, as one string: this line is most of a submission's cost.
            head = (
                f'{shared}"Upstash-Deduplication-Id":"{unique}","Upstash-Callback":"{callback}",'
                f'"Upstash-Failure-Callback":"{failure}","Upstash-Label":"{message.label}{labels}"}},'
                '"body":"'
            )
        else:
            own = json.dumps(message._own_headers(), separators=(",", ":"))[1:-1]
            head = f"{shared}{own}".removesuffix(",") + '},"body":"'
        body = message.body
        if type(body) is JSONText:
            escaped = body.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        else:
            escaped = _escaped(body)
        end = f'","queue":"{message.queue}"}},'.encode() if message.queue else b'"},'
        parts += (head.encode(), escaped, end)
    # In place: what is joined here is large, and each further copy of it shows.
    parts[-1:] = [parts[-1][:-1], b"]"] if parts else [b"[]"]
    return b"".join(parts)


def read_answer(answer: Any) -> Answer:
    """Read what QStash says to one message. Raises ``ValueError`` when it is no answer at all."""
    group = _group(answer)
    return read_one_answer(answer) if group is None else [_read_listed(each) for each in group]


def read_answers(answers: Sequence[Any]) -> list[Answer]:
    """Read what QStash says to several messages, in their order.

    How it words a refusal among them is not documented, so whatever names no message is one:
    the ids of the others must not be lost over it.
    """
    # Nearly every answer is {"messageId": …} alone. A named tuple's own constructor is Python and
    # costs three times as much as the tuple's.
    new = tuple.__new__
    return [
        new(Accepted, (message_id, False, ""))
        if type(answer) is dict
        and len(answer) == 1
        and type(message_id := answer.get("messageId")) is str
        and message_id
        else _read_item(answer)
        for answer in answers
    ]


def _read_item(answer: Any) -> Answer:
    return _read_listed(answer) if _group(answer) is None else read_answer(answer)


def _group(answer: Any) -> list[Any] | None:
    """A URL group is answered with a list; QStash's specification draws an object around it."""
    group = answer.get("messages") if isinstance(answer, dict) else answer
    return group if isinstance(group, list) else None


def _read_listed(answer: Any) -> Accepted | Refused:
    try:
        return read_one_answer(answer)
    except ValueError:
        return Refused(json.dumps(answer)[:500])


def read_one_answer(answer: Any) -> Accepted | Refused:
    if isinstance(answer, dict):
        message_id = answer.get("messageId")
        if isinstance(message_id, str) and message_id:
            return Accepted(message_id, answer.get("deduplicated") is True, answer.get("url") or "")
        if "error" in answer:
            return Refused(str(answer["error"]))
    raise ValueError("neither a messageId nor an error")
