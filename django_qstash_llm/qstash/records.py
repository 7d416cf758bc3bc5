"""What QStash tells about messages, dead letters, logs, queues, flow control, URL groups and
schedules: JSON <-> records."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar

Header = Mapping[str, list[str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some of a listing, and where the rest begins."""

    items: list[T]
    cursor: str = ""
    """Empty at the end. Always text: cursors may exceed 2**53."""


@dataclass(frozen=True, kw_only=True)
class MessageRecord:
    """A message as QStash keeps it. Times are unix milliseconds."""

    message_id: str
    url: str
    method: str = "POST"
    header: Header = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    max_retries: int = 3
    not_before: int = 0
    created_at: int = 0
    topic_name: str = ""
    endpoint_name: str = ""
    queue_name: str = ""
    schedule_id: str = ""
    callback: str = ""
    failure_callback: str = ""
    callback_header: Header = field(default_factory=dict, repr=False)
    failure_callback_header: Header = field(default_factory=dict, repr=False)
    caller_ip: str = ""
    labels: tuple[str, ...] = ()
    flow_control_key: str = ""
    rate: int | None = None
    period: int | None = None
    """Seconds. QStash says 1 whenever there is a flow-control key."""
    parallelism: int | None = None
    retry_delay: str = ""
    timeout: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "messageId": self.message_id,
            "url": self.url,
            "method": self.method,
            "maxRetries": self.max_retries,
            "notBefore": self.not_before,
            "createdAt": self.created_at,
        } | _present(
            {
                "header": dict(self.header),
                **_body_fields("body", self.body),
                "topicName": self.topic_name,
                "endpointName": self.endpoint_name,
                "queueName": self.queue_name,
                "scheduleId": self.schedule_id,
                "callback": self.callback,
                "failureCallback": self.failure_callback,
                "callbackHeader": dict(self.callback_header),
                "failureCallbackHeader": dict(self.failure_callback_header),
                "callerIP": self.caller_ip,
                "label": self.labels[0] if self.labels else "",
                "labels": list(self.labels),
                "flowControlKey": self.flow_control_key,
                "rate": self.rate,
                "period": self.period,
                "parallelism": self.parallelism,
                "retryDelayExpression": self.retry_delay,
                "timeout": self.timeout,
            }
        )

    @classmethod
    def _fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "message_id": data["messageId"],
            "url": data.get("url", ""),
            "method": data.get("method") or "POST",
            "header": _lists(data.get("header")),
            "body": _read_body(data, "body"),
            "max_retries": data.get("maxRetries", 3),
            "not_before": data.get("notBefore", 0),
            "created_at": data.get("createdAt", 0),
            "topic_name": data.get("topicName", ""),
            "endpoint_name": data.get("endpointName", ""),
            "queue_name": data.get("queueName", ""),
            "schedule_id": data.get("scheduleId", ""),
            "callback": data.get("callback", ""),
            "failure_callback": data.get("failureCallback", ""),
            "callback_header": _lists(data.get("callbackHeader")),
            "failure_callback_header": _lists(data.get("failureCallbackHeader")),
            "caller_ip": data.get("callerIP", ""),
            "labels": _labels(data),
            "flow_control_key": data.get("flowControlKey", ""),
            "rate": data.get("rate"),
            "period": data.get("period"),
            "parallelism": data.get("parallelism"),
            "retry_delay": data.get("retryDelayExpression", ""),
            "timeout": data.get("timeout"),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**cls._fields(data))


@dataclass(frozen=True, kw_only=True)
class DeadLetter(MessageRecord):
    """A message QStash gave up on, with the last answer it got."""

    dlq_id: str = ""
    response_status: int = -1
    response_header: Header = field(default_factory=dict, repr=False)
    response_body: bytes = field(default=b"", repr=False)

    def to_json(self) -> dict[str, Any]:
        # responseStatus is always there: the official Python client cannot do without.
        return (
            super().to_json()
            | {"dlqId": self.dlq_id, "responseStatus": self.response_status}
            | _present(
                {
                    "responseHeader": dict(self.response_header),
                    **_body_fields("responseBody", self.response_body),
                }
            )
        )

    @classmethod
    def _fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return super()._fields(data) | {
            "dlq_id": data.get("dlqId", ""),
            "response_status": data.get("responseStatus", -1),
            "response_header": _lists(data.get("responseHeader")),
            "response_body": _read_body(data, "responseBody"),
        }


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One change of a message's state. ``time`` and ``next_delivery_time`` are unix milliseconds."""

    time: int
    message_id: str
    state: str
    """CREATED, ACTIVE, RETRY, ERROR, DELIVERED, FAILED, CANCEL_REQUESTED, CANCELED."""
    url: str
    error: str = ""
    next_delivery_time: int | None = None
    response_status: int | None = None
    response_header: Header = field(default_factory=dict, repr=False)
    response_body: bytes = field(default=b"", repr=False)
    header: Header = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    topic_name: str = ""
    endpoint_name: str = ""
    queue_name: str = ""
    schedule_id: str = ""
    method: str = ""
    callback: str = ""
    failure_callback: str = ""
    callback_header: Header = field(default_factory=dict, repr=False)
    failure_callback_header: Header = field(default_factory=dict, repr=False)
    max_retries: int | None = None
    retry_delay: str = ""
    timeout: int | None = None
    """Milliseconds, unlike everywhere else."""
    labels: tuple[str, ...] = ()
    flow_control_key: str = ""
    rate: int | None = None
    period: int | None = None
    parallelism: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "messageId": self.message_id,
            "state": self.state,
            "url": self.url,
        } | _present(
            {
                "error": self.error,
                "nextDeliveryTime": self.next_delivery_time,
                "responseStatus": self.response_status,
                # The documentation and the Python client disagree on the name.
                "responseHeader": dict(self.response_header),
                "responseHeaders": dict(self.response_header),
                "responseBody": base64.b64encode(self.response_body).decode(),
                "header": dict(self.header),
                "body": base64.b64encode(self.body).decode(),
                "topicName": self.topic_name,
                "endpointName": self.endpoint_name,
                "queueName": self.queue_name,
                "scheduleId": self.schedule_id,
                "method": self.method,
                "callback": self.callback,
                "failureCallback": self.failure_callback,
                # Here in the plural, on a message in the singular.
                "callbackHeaders": dict(self.callback_header),
                "failureCallbackHeaders": dict(self.failure_callback_header),
                "maxRetries": self.max_retries,
                "retryDelayExpr": self.retry_delay,
                "retryDelayExpression": self.retry_delay,
                "timeout": self.timeout,
                "label": self.labels[0] if self.labels else "",
                "labels": list(self.labels),
                "flowControlKey": self.flow_control_key,
                "rate": self.rate,
                "period": self.period,
                "parallelism": self.parallelism,
            }
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LogEntry:
        state = data["state"]
        return cls(
            time=data["time"],
            message_id=data["messageId"],
            # The service writes it with one L, its documentation with two.
            state="CANCELED" if state == "CANCELLED" else state,
            url=data.get("url", ""),
            error=data.get("error", ""),
            next_delivery_time=data.get("nextDeliveryTime"),
            response_status=data.get("responseStatus"),
            response_header=_lists(data.get("responseHeader") or data.get("responseHeaders")),
            response_body=_unbase64(data.get("responseBody")),
            header=_lists(data.get("header")),
            body=_unbase64(data.get("body")),
            topic_name=data.get("topicName", ""),
            endpoint_name=data.get("endpointName", ""),
            queue_name=data.get("queueName", ""),
            schedule_id=data.get("scheduleId", ""),
            method=data.get("method", ""),
            callback=data.get("callback", ""),
            failure_callback=data.get("failureCallback", ""),
            callback_header=_lists(data.get("callbackHeaders")),
            failure_callback_header=_lists(data.get("failureCallbackHeaders")),
            max_retries=data.get("maxRetries"),
            retry_delay=data.get("retryDelayExpression") or data.get("retryDelayExpr") or "",
            timeout=data.get("timeout"),
            labels=_labels(data),
            flow_control_key=data.get("flowControlKey", ""),
            rate=data.get("rate"),
            period=data.get("period"),
            parallelism=data.get("parallelism"),
        )


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A queue. Times are unix milliseconds; ``lag`` counts the unprocessed."""

    name: str
    parallelism: int = 1
    created_at: int = 0
    updated_at: int = 0
    lag: int = 0
    is_paused: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parallelism": self.parallelism,
            "createdAt": self.created_at,
            "updatedAt": self.updated_at,
            "lag": self.lag,
            "paused": self.is_paused,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Queue:
        return cls(
            name=data["name"],
            parallelism=data.get("parallelism", 1),
            created_at=data.get("createdAt", 0),
            updated_at=data.get("updatedAt", 0),
            lag=data.get("lag", 0),
            is_paused=data.get("paused", False),
        )


@dataclass(frozen=True, kw_only=True)
class FlowControlState:
    """How full a flow-control key is. ``rate_period`` and ``rate_period_start`` are seconds."""

    key: str
    wait_list_size: int = 0
    parallelism_max: int = 0
    parallelism_count: int = 0
    rate_max: int = 0
    rate_count: int = 0
    rate_period: int = 1
    rate_period_start: int = 0
    is_paused: bool = False
    is_pinned_parallelism: bool = False
    is_pinned_rate: bool = False

    def to_json(self) -> dict[str, Any]:
        return {wire: getattr(self, name) for name, wire in _FLOW_CONTROL_NAMES.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FlowControlState:
        known = {name: data[wire] for name, wire in _FLOW_CONTROL_NAMES.items() if wire in data}
        return cls(**known)


_FLOW_CONTROL_NAMES = {
    "key": "flowControlKey",
    "wait_list_size": "waitListSize",
    "parallelism_max": "parallelismMax",
    "parallelism_count": "parallelismCount",
    "rate_max": "rateMax",
    "rate_count": "rateCount",
    "rate_period": "ratePeriod",
    "rate_period_start": "ratePeriodStart",
    "is_paused": "isPaused",
    "is_pinned_parallelism": "isPinnedParallelism",
    "is_pinned_rate": "isPinnedRate",
}


class Endpoint(NamedTuple):
    """One of a URL group's destinations."""

    url: str
    name: str = ""

    def to_json(self) -> dict[str, str]:
        return _present({"name": self.name, "url": self.url})


@dataclass(frozen=True, kw_only=True)
class UrlGroup:
    """A name for several destinations. Times are unix milliseconds."""

    name: str
    created_at: int = 0
    updated_at: int = 0
    endpoints: tuple[Endpoint, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "createdAt": self.created_at,
            "updatedAt": self.updated_at,
            "endpoints": [endpoint.to_json() for endpoint in self.endpoints],
        }


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is published again and again. Times are unix milliseconds."""

    schedule_id: str
    cron: str
    destination: str
    created_at: int = 0
    method: str = "POST"
    is_paused: bool = False
    header: Header = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    retries: int = 3
    retry_delay: str = ""
    delay: int | None = None
    """Seconds."""
    timeout: float | None = None
    """Seconds."""
    callback: str = ""
    failure_callback: str = ""
    callback_header: Header = field(default_factory=dict, repr=False)
    failure_callback_header: Header = field(default_factory=dict, repr=False)
    queue_name: str = ""
    caller_ip: str = ""
    labels: tuple[str, ...] = ()
    flow_control_key: str = ""
    rate: int | None = None
    period: int | None = None
    """Seconds."""
    parallelism: int | None = None
    last_schedule_time: int | None = None
    next_schedule_time: int | None = None
    last_schedule_states: Mapping[str, str] = field(default_factory=dict)
    """Message id -> IN_PROGRESS, SUCCESS or FAIL."""
    error: str = ""
    """Why nothing was published the last time."""

    def to_json(self) -> dict[str, Any]:
        # The official Python client cannot do without these.
        return {
            "scheduleId": self.schedule_id,
            "cron": self.cron,
            "destination": self.destination,
            "createdAt": self.created_at,
            "method": self.method,
            "retries": self.retries,
            "isPaused": self.is_paused,
        } | _present(
            {
                "header": dict(self.header),
                **_body_fields("body", self.body),
                "retryDelayExpression": self.retry_delay,
                "delay": self.delay,
                "timeout": self.timeout,
                "callback": self.callback,
                "failureCallback": self.failure_callback,
                "callbackHeader": dict(self.callback_header),
                "failureCallbackHeader": dict(self.failure_callback_header),
                "queueName": self.queue_name,
                "callerIP": self.caller_ip,
                "label": self.labels[0] if self.labels else "",
                "labels": list(self.labels),
                "flowControlKey": self.flow_control_key,
                "rate": self.rate,
                "period": self.period,
                "parallelism": self.parallelism,
                "lastScheduleTime": self.last_schedule_time,
                "nextScheduleTime": self.next_schedule_time,
                "lastScheduleStates": dict(self.last_schedule_states),
                "error": self.error,
            }
        )


@dataclass(frozen=True)
class Keys:
    """The signing keys of an account."""

    current: str = field(repr=False)
    next: str = field(repr=False)

    def to_json(self) -> dict[str, str]:
        return {"current": self.current, "next": self.next}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Keys:
        return cls(data["current"], data["next"])


def read_page(data: Any, keys: tuple[str, ...], read: Callable[[Any], T]) -> Page[T]:
    """A listing, whichever of ``keys`` the server used for it."""
    items: list[Any] = next((data[key] for key in keys if data.get(key) is not None), [])
    return Page([read(item) for item in items], str(data.get("cursor") or ""))


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """QStash leaves optional fields out when they are empty."""
    return {name: value for name, value in fields.items() if value not in (None, "", [], {}, ())}


def _body_fields(name: str, body: bytes) -> dict[str, str]:
    """Text goes as ``body``, other bytes as ``bodyBase64``."""
    try:
        return {name: body.decode()}
    except UnicodeDecodeError:
        return {f"{name}Base64": base64.b64encode(body).decode()}


def _read_body(data: Mapping[str, Any], name: str) -> bytes:
    if data.get(f"{name}Base64"):
        return _unbase64(data[f"{name}Base64"])
    return str(data.get(name) or "").encode("utf-8", "replace")


def _unbase64(text: str | None) -> bytes:
    try:
        return base64.b64decode(text or "", validate=True)
    except (binascii.Error, ValueError):
        return (text or "").encode("utf-8", "replace")


def _lists(header: Mapping[str, Any] | None) -> dict[str, list[str]]:
    items = (header or {}).items()
    return {name: value if isinstance(value, list) else [value] for name, value in items}


def _labels(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(data.get("labels") or ([data["label"]] if data.get("label") else []))
