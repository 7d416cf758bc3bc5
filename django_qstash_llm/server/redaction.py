"""Values that nobody is shown: headers that hold keys, and what a message asked to hide."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..qstash import Callback

# By whole words, and the last of them: X-Author is no key, nor is Idempotency-Key, nor what is left
# of a rate limit's tokens. Azure's are called Subscription-Key and Functions-Key.
_SECRET = re.compile(
    r"(?:.*[-_])?(?:authorization|auth|token|secret|cookie|passw(?:or)?d|credentials?|apikey"
    r"|(?:api|access|auth|secret|private|master|admin|subscription|functions)[-_]key)",
    re.IGNORECASE,
)
_FIELD = re.compile(r"headers?\[([^\]]+)\]", re.IGNORECASE)
_FINGERPRINT = re.compile(r"REDACTED:[0-9a-f]{64}")
HIDDEN = "REDACTED"


def is_secret(header: str) -> bool:
    """Whether a header by this name holds a key."""
    return bool(_SECRET.fullmatch(header))


def without_secrets(header: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return redacted_header(header, ())


def parted(wire_headers: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """A message's own headers as anybody may see them, now and when it is over, and the values
    that are hidden there: those that hold keys, and those that it asks to hide."""
    is_asked_for = _asked_for(wire_headers.get("Upstash-Redact-Fields", "").split(","))
    shown, secrets = dict(wire_headers), {}
    for name, value in wire_headers.items():
        _, is_forwarded, header = name.partition("-Forward-")
        if is_forwarded and (hidden := _hidden(header, value, is_asked_for)) != value:
            shown[name], secrets[name] = hidden, value
    return shown, secrets


def fingerprint(value: bytes) -> str:
    return f"{HIDDEN}:{hashlib.sha256(value).hexdigest()}"


def redacted_header(
    header: Mapping[str, list[str]], fields: Iterable[str], *, shows_keys: bool = False
) -> dict[str, list[str]]:
    """For somebody who was asked to look away from ``fields``: those are told by their fingerprints,
    and other keys not at all, but to their owner, who ``shows_keys`` to himself."""
    is_asked_for = _asked_for(fields)
    return {
        name: [_hidden(name, value, is_asked_for, shows_keys) for value in values]
        for name, values in header.items()
    }


def _asked_for(fields: Iterable[str]) -> Callable[[str], bool]:
    """Whether a header by some name is one of ``fields``."""
    wanted = {field.strip().lower() for field in fields}
    if wanted & {"header", "headers"}:
        return lambda header: True
    named = {match[1].strip() for field in wanted if (match := _FIELD.fullmatch(field))}
    return lambda header: header.lower() in named


def _hidden(
    header: str, value: str, is_asked_for: Callable[[str], bool], shows_keys: bool = False
) -> str:
    if value == HIDDEN or _FINGERPRINT.fullmatch(value):
        # That is what it was hidden to: a fingerprint of it would be another one.
        return value
    if is_asked_for(header):
        return fingerprint(value.encode())
    return HIDDEN if is_secret(header) and not shows_keys else value


def redacted_body(body: bytes, fields: Iterable[str]) -> bytes:
    if "body" in {field.lower() for field in fields}:
        return fingerprint(body).encode()
    return body


def redacted_envelope(envelope: bytes, fields: Iterable[str]) -> bytes:
    """A callback's body, whose headers of the original are hidden as they are there. What the
    destination answered stays: a callback that was lost is read from a dead letter."""
    fields = tuple(fields)
    if not fields or not envelope:
        return envelope
    told = Callback.from_json(envelope)
    shown = redacted_header(told.source_header, fields, shows_keys=True)
    return envelope if shown == told.source_header else replace(told, source_header=shown).to_json()
