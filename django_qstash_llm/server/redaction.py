"""Values that nobody is shown: headers that hold keys, and what a message asked to hide."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

_SECRET = re.compile(r"auth|key|token|secret|cookie|passw|credential|session|signature", re.I)
_FIELD = re.compile(r"headers?\[([^\]]+)\]", re.IGNORECASE)
HIDDEN = "REDACTED"


def is_secret(header: str) -> bool:
    """Whether a header by this name is likely to hold a key. Rather one too many."""
    return bool(_SECRET.search(header))


def without_secrets(header: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: [HIDDEN for _ in values] if is_secret(name) else list(values)
        for name, values in header.items()
    }


def scrubbed(wire_headers: Mapping[str, str]) -> dict[str, str]:
    """A message's own headers, with only the names left of those that hold keys."""
    return {
        name: HIDDEN if "-Forward-" in name and is_secret(name) else value
        for name, value in wire_headers.items()
    }


def fingerprint(value: bytes) -> str:
    return f"{HIDDEN}:{hashlib.sha256(value).hexdigest()}"


def redacted_header(header: Mapping[str, list[str]], fields: Iterable[str]) -> dict[str, list[str]]:
    """As the read API shows it to somebody who was asked to look away from ``fields``."""
    wanted = {field.lower() for field in fields}
    hides_all = bool(wanted & {"header", "headers"})
    named = {match[1].strip() for field in wanted if (match := _FIELD.fullmatch(field))}
    return {
        name: [fingerprint(value.encode()) for value in values]
        if hides_all or name.lower() in named
        else list(values)
        for name, values in header.items()
    }


def redacted_body(body: bytes, fields: Iterable[str]) -> bytes:
    if "body" in {field.lower() for field in fields}:
        return fingerprint(body).encode()
    return body
