"""Every call of QStash's API as a value: what to send, how to read the answer.

``Client`` and ``AsyncClient`` only carry these out, so that what QStash is asked is said once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .exceptions import InvalidOption
from .message import Answer, Message, batch_body, read_answer, read_answers
from .options import check_name, is_integer
from .records import (
    DeadLetter,
    FlowControlState,
    Keys,
    LogEntry,
    MessageRecord,
    Page,
    Queue,
    read_page,
)

T = TypeVar("T")

FILTERS = {
    "message_id": "messageId",
    "url": "url",
    "host": "host",
    "path": "path",
    "topic_name": "topicName",
    "schedule_id": "scheduleId",
    "queue_name": "queueName",
    "label": "label",
    "flow_control_key": "flowControlKey",
    "caller_ip": "callerIp",
    "state": "state",
    "response_status": "responseStatus",
    "from_date": "fromDate",
    "to_date": "toDate",
}
"""Our names for QStash's filters. Dates are unix milliseconds, inclusive."""


@dataclass(frozen=True)
class Call(Generic[T]):
    method: str
    path: str
    parse: Callable[[Any], T]
    """Reads the answer's JSON. ``KeyError``, ``TypeError`` or ``ValueError`` mean: unreadable."""
    params: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes = field(default=b"", repr=False)
    is_repeatable: bool = False
    """Whether sending it twice does what sending it once does."""


def _json(data: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(data).encode(), {"Content-Type": "application/json"}


def _nothing(answer: Any) -> None:
    """Several calls answer with ``OK`` or an empty body; their status says it all."""


def _params(**values: Any) -> list[tuple[str, str]]:
    params: list[tuple[str, str]] = []
    for name, value in values.items():
        params += [(name, str(one)) for one in _each(value) if one not in (None, "")]
    return params


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _filters(filters: Mapping[str, Any]) -> list[tuple[str, str]]:
    unknown = filters.keys() - FILTERS.keys()
    if unknown:
        raise InvalidOption(sorted(unknown)[0], f"not a filter; there are {', '.join(FILTERS)}")
    return _params(**{FILTERS[name]: value for name, value in filters.items()})


def _narrowing_filters(filters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Filters for a call that changes things: QStash takes "no filter" for "everything"."""
    empty = [
        name
        for name, value in filters.items()
        if not _each(value) or any(one in (None, "") for one in _each(value))
    ]
    if empty:
        raise InvalidOption(empty[0], "an empty filter would select everything")
    params = _filters(filters)
    if not params:
        raise InvalidOption("filters", "give at least one, or nothing would limit the selection")
    return params


def _segment(field_name: str, value: str) -> str:
    check_name(field_name, value)
    return value


def _ids(field_name: str, ids: Sequence[str]) -> list[str]:
    """Ids for a call that changes things: QStash takes "no id" for "everything"."""
    if isinstance(ids, str) or not ids:
        raise InvalidOption(field_name, "give a list of ids; an empty one would select everything")
    return [_segment(field_name, each) for each in ids]


# --- ways in ---------------------------------------------------------------------------------


def publish(message: Message) -> Call[Answer]:
    """Hand in one message (an enqueue, when it names a queue). Safe to repeat with a dedup id."""
    return Call(
        "POST",
        message.path,
        read_answer,
        headers=message.to_headers(),
        content=message.body,
        is_repeatable=bool(message.deduplication_id),
    )


def batch(messages: Sequence[Message]) -> Call[list[Answer]]:
    """Hand in many messages. The answers come in the messages' order, one ``Accepted``,
    ``Refused`` or (for a URL group) list each; a refused item does not touch the others.

    An answer of another length cannot be matched and is an ``UnreadableAnswer``.
    """
    count = len(messages)

    def parse(answers: Any) -> list[Answer]:
        # The official JavaScript client expects a batch of one to be answered without the list.
        if count == 1 and isinstance(answers, dict):
            answers = [answers]
        if not isinstance(answers, list) or len(answers) != count:
            raise ValueError(f"{count} messages went in and the answer does not match them")
        return read_answers(answers)

    return Call(
        "POST",
        "/v2/batch",
        parse,
        headers={"Content-Type": "application/json"},
        content=batch_body(messages),
        is_repeatable=all(message.deduplication_id for message in messages),
    )


# --- messages --------------------------------------------------------------------------------


def get_message(message_id: str) -> Call[MessageRecord]:
    """A message that is pending, or was a moment ago. ``NotFound`` afterwards."""
    path = f"/v2/messages/{_segment('message_id', message_id)}"
    return Call("GET", path, MessageRecord.from_json, is_repeatable=True)


def cancel_message(message_id: str) -> Call[None]:
    """No further attempt. One that is in flight may still finish."""
    path = f"/v2/messages/{_segment('message_id', message_id)}"
    return Call("DELETE", path, _nothing, is_repeatable=True)


def cancel_messages(message_ids: Sequence[str]) -> Call[int]:
    """Cancel these; answers how many were cancelled."""
    content, headers = _json({"messageIds": _ids("message_ids", message_ids)})
    return Call("DELETE", "/v2/messages", _cancelled, headers=headers, content=content)


def cancel_messages_by(**filters: Any) -> Call[int]:
    """Cancel what all ``filters`` select (see ``FILTERS``); answers how many were cancelled."""
    return Call("DELETE", "/v2/messages", _cancelled, params=_narrowing_filters(filters))


def cancel_all_messages() -> Call[int]:
    """Cancel every message of the account."""
    return Call("DELETE", "/v2/messages", _cancelled)


def _cancelled(answer: Any) -> int:
    return int(answer["cancelled"])


# --- logs and dead letters -------------------------------------------------------------------


def logs(*, cursor: str = "", count: int | None = None, **filters: Any) -> Call[Page[LogEntry]]:
    """Changes of messages' states, newest first."""
    return Call(
        "GET",
        # Both paths are served; /v2/events is the one the official SDKs call.
        "/v2/events",
        lambda answer: read_page(answer, ("events", "logs"), LogEntry.from_json),
        params=_params(cursor=cursor, count=count) + _filters(filters),
        is_repeatable=True,
    )


def dead_letters(
    *, cursor: str = "", count: int | None = None, **filters: Any
) -> Call[Page[DeadLetter]]:
    """Messages QStash gave up on, oldest first."""
    return Call(
        "GET",
        "/v2/dlq",
        lambda answer: read_page(answer, ("messages",), DeadLetter.from_json),
        params=_params(cursor=cursor, count=count) + _filters(filters),
        is_repeatable=True,
    )


def get_dead_letter(dlq_id: str) -> Call[DeadLetter]:
    # A single one may come without its own id.
    return Call(
        "GET",
        f"/v2/dlq/{_segment('dlq_id', dlq_id)}",
        lambda answer: DeadLetter.from_json({"dlqId": dlq_id} | answer),
        is_repeatable=True,
    )


def delete_dead_letter(dlq_id: str) -> Call[None]:
    path = f"/v2/dlq/{_segment('dlq_id', dlq_id)}"
    return Call("DELETE", path, _nothing, is_repeatable=True)


def delete_dead_letters(dlq_ids: Sequence[str]) -> Call[int]:
    """Delete these; answers how many were there."""
    content, headers = _json({"dlqIds": _ids("dlq_ids", dlq_ids)})
    return Call("DELETE", "/v2/dlq", lambda a: int(a["deleted"]), headers=headers, content=content)


def retry_dead_letter(dlq_id: str) -> Call[Answer]:
    """Publish it again, under a new message id."""
    return Call("POST", f"/v2/dlq/retry/{_segment('dlq_id', dlq_id)}", read_answer)


def retry_dead_letters(dlq_ids: Sequence[str]) -> Call[list[Answer]]:
    """Publish these again, under new message ids."""
    return Call(
        "POST",
        "/v2/dlq/retry",
        lambda answer: read_answers(answer["responses"]),
        params=_params(dlqIds=_ids("dlq_ids", dlq_ids)),
    )


# --- queues ----------------------------------------------------------------------------------


def queues() -> Call[list[Queue]]:
    return Call("GET", "/v2/queues", lambda a: [Queue.from_json(q) for q in a], is_repeatable=True)


def get_queue(name: str) -> Call[Queue]:
    return Call("GET", f"/v2/queues/{_segment('queue', name)}", Queue.from_json, is_repeatable=True)


def upsert_queue(name: str, *, parallelism: int = 1, is_paused: bool = False) -> Call[None]:
    """Create or change a queue. Note that leaving ``is_paused`` out resumes a paused one."""
    check_name("queue", name)
    if not is_integer(parallelism) or parallelism < 1:
        raise InvalidOption("parallelism", f"{parallelism!r} is not a whole number of at least 1")
    content, headers = _json({"queueName": name, "parallelism": parallelism, "paused": is_paused})
    return Call(
        "POST", "/v2/queues", _nothing, headers=headers, content=content, is_repeatable=True
    )


def delete_queue(name: str) -> Call[None]:
    path = f"/v2/queues/{_segment('queue', name)}"
    return Call("DELETE", path, _nothing, is_repeatable=True)


def pause_queue(name: str) -> Call[None]:
    path = f"/v2/queues/{_segment('queue', name)}/pause"
    return Call("POST", path, _nothing, is_repeatable=True)


def resume_queue(name: str) -> Call[None]:
    path = f"/v2/queues/{_segment('queue', name)}/resume"
    return Call("POST", path, _nothing, is_repeatable=True)


# --- flow control ----------------------------------------------------------------------------


def flow_controls(*, search: str = "") -> Call[list[FlowControlState]]:
    return Call(
        "GET",
        "/v2/flowControl",
        lambda answer: [FlowControlState.from_json(each) for each in answer],
        params=_params(search=search),
        is_repeatable=True,
    )


def get_flow_control(key: str) -> Call[FlowControlState]:
    return Call("GET", _flow_path(key), FlowControlState.from_json, is_repeatable=True)


def pause_flow_control(key: str) -> Call[None]:
    """Deliver nothing under this key; new messages wait."""
    return Call("POST", f"{_flow_path(key)}/pause", _nothing, is_repeatable=True)


def resume_flow_control(key: str) -> Call[None]:
    return Call("POST", f"{_flow_path(key)}/resume", _nothing, is_repeatable=True)


def pin_flow_control(
    key: str, *, parallelism: int | None = None, rate: int | None = None, period: int | None = None
) -> Call[None]:
    """Freeze these values against what messages bring. ``period`` is seconds."""
    return Call(
        "POST",
        f"{_flow_path(key)}/pin",
        _nothing,
        params=_params(parallelism=parallelism, rate=rate, period=period),
        is_repeatable=True,
    )


def unpin_flow_control(key: str, *, parallelism: bool = False, rate: bool = False) -> Call[None]:
    chosen = {"parallelism": parallelism, "rate": rate}
    return Call(
        "POST",
        f"{_flow_path(key)}/unpin",
        _nothing,
        params=_params(**{name: "true" for name, is_chosen in chosen.items() if is_chosen}),
        is_repeatable=True,
    )


def reset_flow_control_rate(key: str) -> Call[None]:
    """Count from 0, in a period that starts now."""
    return Call("POST", f"{_flow_path(key)}/resetRate", _nothing, is_repeatable=True)


def resume_gates(host: str) -> Call[None]:
    """Let go on what ``host`` refused for want of money. Our server's own: QStash answers 404."""
    return Call(
        "POST",
        "/v2/gates/resume",
        _nothing,
        params=_params(host=host),
        is_repeatable=True,
    )


def global_parallelism() -> Call[tuple[int, int]]:
    """Deliveries in flight over all keys: the ceiling, then the count."""
    return Call(
        "GET",
        "/v2/globalParallelism",
        lambda answer: (answer.get("parallelismMax", 0), answer.get("parallelismCount", 0)),
        is_repeatable=True,
    )


def _flow_path(key: str) -> str:
    return f"/v2/flowControl/{_segment('flow_control.key', key)}"


# --- keys ------------------------------------------------------------------------------------


def keys() -> Call[Keys]:
    """The signing keys in force."""
    return Call("GET", "/v2/keys", Keys.from_json, is_repeatable=True)


def rotate_keys() -> Call[Keys]:
    """current := next, next := new. Twice without a redeploy breaks every receiver."""
    return Call("POST", "/v2/keys/rotate", Keys.from_json)
