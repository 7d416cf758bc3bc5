"""What callers send, read and not believed: what is refused here has left no trace."""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn
from urllib.parse import urlsplit

from .cleaning import DEEPEST
from .exceptions import InvalidRequest

_LINKS = ("image_url", "file_url", "video_url", "audio_url")


def read_object(content: bytes) -> dict[str, Any]:
    """The JSON object that ``content`` is. Raises ``InvalidRequest``, without a field where it is
    none; whether every database takes it, ``check_fit`` says."""
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest("", "it is not UTF-8") from error
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("", "it is not JSON") from error
    if not isinstance(value, dict):
        raise InvalidRequest("", "it is not a JSON object")
    return value


def check_fit(value: Any, path: str = "", depth: int = 0) -> None:
    """Raise ``InvalidRequest`` unless every database takes it."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict | list):
        if depth >= DEEPEST:
            raise InvalidRequest(path, f"it is nested more than {DEEPEST} levels deep")
        for name, each in _members(value, path):
            check_fit(each, name, depth + 1)


def check_links(messages: list[Any]) -> None:
    """Refuse links into the provider's own network, and to files. (We fetch none ourselves.)"""
    for at, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for part_at, part in enumerate(parts if isinstance(parts, list) else ()):
            for name in _LINKS if isinstance(part, dict) else ():
                link = part.get(name)
                url = link.get("url") if isinstance(link, dict) else link
                if isinstance(url, str) and not _is_public(url):
                    field = f"messages[{at}].content[{part_at}].{name}"
                    raise InvalidRequest(field, "give a public http(s) URL or a data: URL")


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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        # Which of the two counts, no two programs agree on.
        raise InvalidRequest(twice[:255], "it is given twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is Python's, not JSON's")


def _members(value: dict[str, Any] | list[Any], path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, list):
        return ((f"{path}[{at}]", each) for at, each in enumerate(value))
    for name in value:
        _check_text(name, path)
    return ((f"{path}.{name}" if path else name, each) for name, each in value.items())


def _check_text(text: str, path: str) -> None:
    if "\x00" in text:
        raise InvalidRequest(path, "it holds a NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(path, "it holds half a surrogate pair") from error
