"""What the development server says of itself while it runs: a line for each request and each
attempt, for people or, as JSON, for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from django.utils import timezone

from ..qstash.callback import NO_RESPONSE

Event = Mapping[str, Any]
"""``event`` says of what kind: ``request`` (method, path, status, seconds) or ``attempt``
(message_id, url, status, error, retried, seconds)."""
Say = Callable[[Event], None]


def as_line(event: Event) -> str:
    if event["event"] == "request":
        return f"{event['method']} {event['path']} {event['status']}"
    outcome = event["status"] if event["status"] != NO_RESPONSE else event["error"]
    again = f" (retry {event['retried']})" if event["retried"] else ""
    took = milliseconds_of(event)
    return f"{event['message_id']} -> {without_query(event['url'])} {outcome}{again} in {took} ms"


def as_json(event: Event) -> str:
    told: dict[str, Any] = {"time": timezone.now().isoformat(timespec="milliseconds")}
    told |= {_NAMES.get(name, name): value for name, value in event.items() if name != "seconds"}
    if "seconds" in event:
        told["ms"] = milliseconds_of(event)
    if "url" in event and event["event"] == "attempt":
        told["url"] = without_query(event["url"])
    return json.dumps(told)


_NAMES = {"message_id": "messageId"}


def milliseconds_of(event: Event) -> int:
    seconds: float = event["seconds"]
    return round(seconds * 1000)


def without_query(url: str) -> str:
    """A query may hold a key: some providers take theirs there."""
    try:
        return urlsplit(url)._replace(query="", fragment="").geturl()
    except ValueError:
        return url.partition("?")[0]
