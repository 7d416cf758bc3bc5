"""Filters of the listings: query parameters -> a narrowed queryset.

Several values of one filter mean "or", several filters "and". An unknown name or an empty value
is refused: in a call that deletes, a filter that is ignored selects everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from django.db.models import F, Model, Q, QuerySet, TextField, Value
from django.db.models.functions import Concat
from django.db.models.lookups import Contains

from .exceptions import Refusal
from .models.chunks import within

if TYPE_CHECKING:
    from django.http import QueryDict

M = TypeVar("M", bound=Model)
Rows = TypeVar("Rows", bound=QuerySet[Any])
Build = Callable[[list[str]], Q]

MOST_BYTES = 16 * 1024 * 1024
"""Of bodies that one page shows, and what is over this of the last of them."""
MOST_VALUES = 200
"""Of one filter. Each may be a term of the query, which databases take a thousand of."""

_TAKES_COMMAS = {"url", "path"}
_SERVICE = {"cursor", "count", "order", "qstash_token"}
_IN_PROGRESS = ["ACTIVE", "RETRY", "ERROR"]


def _one_of(column: str) -> Build:
    return lambda values: Q(**{f"{column}__in": values})


def _labelled(column: str) -> Build:
    def build(values: list[str]) -> Q:
        # a,b holds the label a, and not the label "a,b".
        labels = Concat(Value(","), F(column), Value(","), output_field=TextField())
        query = Q()
        for value in values:
            query |= Q(Contains(labels, f",{value},"))
        return query

    return build


def _host(column: str) -> Build:
    return _matching(column, r"^https?://{}([:/?]|$)")


def _path(column: str) -> Build:
    return _matching(column, r"^https?://[^/?]+{}(\?|$)")


def _matching(column: str, pattern: str) -> Build:
    def build(values: list[str]) -> Q:
        query = Q()
        for value in values:
            query |= Q(**{f"{column}__regex": pattern.format(re.escape(value))})
        return query

    return build


def _from(column: str) -> Build:
    return lambda values: Q(**{f"{column}__gte": _moment(values)})


def _to(column: str) -> Build:
    # Milliseconds are coarser than the column: the whole last one is meant.
    return lambda values: Q(**{f"{column}__lt": _moment(values, plus=1)})


def _moment(values: list[str], plus: int = 0) -> datetime:
    number = _integer(values[-1], "date", 0, 32_503_680_000_000)
    return datetime.fromtimestamp((number + plus) / 1000, tz=UTC)


def _statuses(column: str) -> Build:
    return lambda values: Q(
        **{f"{column}__in": [_integer(value, "responseStatus", -1, 999) for value in values]}
    )


def _states(values: list[str]) -> Q:
    known = [*_IN_PROGRESS, "CREATED", "DELIVERED", "FAILED", "CANCEL_REQUESTED", "CANCELED"]
    states: list[str] = []
    for value in values:
        state = "CANCELED" if value.upper() == "CANCELLED" else value.upper()
        if state not in (*known, "IN_PROGRESS"):
            raise Refusal(400, f"invalid state {value}")
        states += _IN_PROGRESS if state == "IN_PROGRESS" else [state]
    return Q(state__in=states)


def _message_filters(prefix: str = "") -> dict[str, Build]:
    return {
        "url": _one_of(f"{prefix}url"),
        "queueName": _one_of(f"{prefix}queue__name"),
        "topicName": _one_of(f"{prefix}topic_name"),
        "scheduleId": _one_of(f"{prefix}schedule_id"),
        "callerIp": _one_of(f"{prefix}caller_ip"),
        "callerIP": _one_of(f"{prefix}caller_ip"),
        "label": _labelled(f"{prefix}labels"),
        "flowControlKey": _one_of(f"{prefix}flow_control_key"),
    }


MESSAGES = _message_filters() | {
    "host": _host("url"),
    "path": _path("url"),
    "fromDate": _from("created_at"),
    "toDate": _to("created_at"),
}
DEAD_LETTERS = _message_filters("message__") | {
    "messageId": _one_of("message__message_id"),
    "responseStatus": _statuses("response_status"),
    "fromDate": _from("created_at"),
    "toDate": _to("created_at"),
}
LOGS = _message_filters("message__") | {
    "messageId": _one_of("message__message_id"),
    "messageIds": _one_of("message__message_id"),
    "state": _states,
    "host": _host("message__url"),
    "path": _path("message__url"),
    "fromDate": _from("time"),
    "toDate": _to("time"),
}


def narrowed(
    rows: Rows,
    query: QueryDict,
    filters: Mapping[str, Build],
    *,
    besides: Iterable[str] = (),
) -> Rows:
    """``rows`` that all filters in the query let through. ``besides``: parameters read elsewhere."""
    for name in query:
        if name in _SERVICE or name in besides:
            continue
        if name not in filters:
            raise Refusal(400, f"unknown filter: {name}")
        rows = rows.filter(filters[name](values_of(query, name)))
    return rows


def values_of(query: QueryDict, name: str) -> list[str]:
    """A parameter's values, repeated or with commas between. None of them may be empty."""
    values = query.getlist(name)
    if name not in _TAKES_COMMAS:
        values = [part.strip() for value in values for part in value.split(",")]
    if not values or not all(values):
        raise Refusal(400, f"{name} is empty")
    if len(values) > MOST_VALUES:
        raise Refusal(400, f"{name} has more than {MOST_VALUES} values: give them in several calls")
    if any("\x00" in value for value in values):
        raise Refusal(400, f"{name} holds what no value can")
    return values


def count_of(query: QueryDict, *, default: int, most: int) -> int:
    if "count" not in query:
        return default
    return _integer(str(query["count"]), "count", 1, most)


def page_of(
    rows: QuerySet[M],
    query: QueryDict,
    *,
    count: int,
    newest_first: bool,
    size: Callable[[M], int] | None = None,
) -> tuple[list[M], str]:
    """The rows after the cursor, and the cursor after them: empty at the end.

    With their ``size``, the page ends when it is full of bytes.
    """
    order = query.get("order", "latestFirst" if newest_first else "earliestFirst")
    if order not in {"latestFirst", "earliestFirst"}:
        raise Refusal(400, f"invalid order {order}")
    is_descending = order == "latestFirst"
    if cursor := query.get("cursor"):
        rows = rows.filter(_beyond(cursor, _moment_of(rows.model), is_descending=is_descending))
    found = list(rows.order_by("-pk" if is_descending else "pk")[: count + 1])
    page = found[:count]
    if size is not None:
        page = within(page, MOST_BYTES, size=size)
    return page, _cursor(page[-1]) if len(found) > len(page) else ""


def _cursor(row: Any) -> str:
    moment: datetime = getattr(row, _moment_of(type(row)))
    return f"{round(moment.timestamp() * 1000)}-{row.pk}"


def _beyond(cursor: str, moment: str, *, is_descending: bool) -> Q:
    """What comes after a cursor of ours, or after unix milliseconds: QStash's own clients are
    documented to begin with ``Date.now()``."""
    if match := re.fullmatch(r"[0-9]{1,14}-([0-9]{1,18})", cursor, re.ASCII):
        return Q(**{"pk__lt" if is_descending else "pk__gt": int(match[1])})
    if not re.fullmatch(r"[0-9]{1,14}", cursor, re.ASCII):
        raise Refusal(400, "invalid cursor")
    return (_to if is_descending else _from)(moment)([cursor])


def _moment_of(model: type[Any]) -> str:
    return "time" if hasattr(model, "time") else "created_at"


def _integer(text: str, name: str, least: int, most: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text, re.ASCII) or not least <= int(text) <= most:
        raise Refusal(400, f"invalid {name} {text[:40]}: not a whole number from {least} to {most}")
    return int(text)


def integer_of(query: QueryDict, name: str, *, least: int, most: int) -> int | None:
    """A parameter that is a whole number; None when it is not there."""
    return _integer(str(query[name]), name, least, most) if name in query else None


def truth_of(query: QueryDict, name: str) -> bool:
    """A parameter that is ``true`` or ``false``; false when it is not there."""
    value = str(query.get(name, "false")).lower()
    if value not in {"true", "false", "1", "0"}:
        raise Refusal(400, f"invalid {name} {value[:40]}: not true or false")
    return value in {"true", "1"}
