"""A call's body, read and not believed: what is refused here has left no trace."""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn
from urllib.parse import urlsplit

from django.http.request import UnreadablePostError
from rest_framework.request import Request

from ..cleaning import DEEPEST
from ..conf import app_settings
from .refusals import Refusal

_LINKS = ("image_url", "file_url", "video_url", "audio_url")


def invalid(param: str | None, problem: str) -> Refusal:
    message = f"Invalid {f'value for {param!r}' if param else 'body'}: {problem}."
    return Refusal(400, "invalid_value" if param else "invalid_json", message, param=param)


def object_of(request: Request) -> dict[str, Any]:
    """The JSON object that came, fit for every database. Raises ``Refusal`` that names the field."""
    if not re.fullmatch(r"application/(.+\+)?json", _media_type(request)):
        message = "The Content-Type has to be application/json."
        raise Refusal(415, "unsupported_media_type", message)
    try:
        value = json.loads(
            _bytes_of(request).decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise invalid(None, "it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise invalid(None, "it is not JSON") from error
    if not isinstance(value, dict):
        raise invalid(None, "it is not a JSON object")
    _check(value, "")
    return value


def check_links(messages: list[Any]) -> None:
    """Refuse links into the provider's own network, and to files. (We fetch none ourselves.)"""
    for at, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for part_at, part in enumerate(parts if isinstance(parts, list) else ()):
            for name in _LINKS if isinstance(part, dict) else ():
                link = part.get(name)
                url = link.get("url") if isinstance(link, dict) else link
                if isinstance(url, str) and not _is_public(url):
                    param = f"messages[{at}].content[{part_at}].{name}"
                    raise invalid(param, "give a public http(s) URL or a data: URL")


def _is_public(url: str) -> bool:
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    if parts.scheme == "data":
        return True
    if parts.scheme not in {"http", "https"} or not host or host.endswith("localhost"):
        return False
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        # A name; or a number in another spelling, as 0x7f.1 is one.
        return not re.fullmatch(r"[0-9.]+|0x[0-9a-f.x]*", host)


def _media_type(request: Request) -> str:
    return (request._request.META.get("CONTENT_TYPE") or "").partition(";")[0].strip().lower()


def _bytes_of(request: Request) -> bytes:
    """Not ``request.body``: that one stops at Django's 2.5 MB, which is right for forms."""
    http = request._request
    largest = app_settings().openai_max_body_bytes
    length = http.META.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise invalid(None, "its Content-Length is no number")
    if http.META.get("HTTP_TRANSFER_ENCODING") and not hasattr(http, "scope"):
        # Django's WSGI side would take it for empty.
        raise Refusal(411, "length_required", "The body needs a Content-Length.")
    try:
        body: bytes = http.read(largest + 1) if int(length) <= largest else b""
    except UnreadablePostError as error:
        raise invalid(None, "it broke off") from error
    if int(length) > largest or len(body) > largest:
        raise Refusal(413, "request_too_large", f"The body is larger than {largest} bytes.")
    if len(body) < int(length):
        raise invalid(None, "it broke off")
    return body


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        # Which of the two counts, no two programs agree on.
        raise invalid(twice[:255], "it is given twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is Python's, not JSON's")


def _check(value: Any, path: str, depth: int = 0) -> None:
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict | list):
        if depth >= DEEPEST:
            raise invalid(path, f"it is nested more than {DEEPEST} levels deep")
        for name, each in _members(value, path):
            _check(each, name, depth + 1)


def _members(value: dict[str, Any] | list[Any], path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, list):
        return ((f"{path}[{at}]", each) for at, each in enumerate(value))
    for name in value:
        _check_text(name, path)
    return ((f"{path}.{name}" if path else name, each) for name, each in value.items())


def _check_text(text: str, path: str) -> None:
    if "\x00" in text:
        raise invalid(path or None, "it holds a NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(path or None, "it holds half a surrogate pair") from error
