"""Durations as QStash spells them: Go's grammar and ``d`` for days. Here they are seconds."""

from __future__ import annotations

import re

from .exceptions import InvalidOption

SECONDS_PER_UNIT = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,  # U+00B5, micro sign
    "μs": 1e-6,  # U+03BC, Greek mu: Go takes both
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([^0-9.]*)")


def parse_duration(text: str, *, field: str = "duration") -> float:
    """Read ``1d10h30m``, ``6m5s`` or ``120ms`` as seconds.

    Raises ``InvalidOption`` with Go's own words, which is what QStash answers with.
    """
    quoted = '"' + text + '"'
    unsigned = text[1:] if text[:1] in {"+", "-"} else text
    if unsigned == "0":
        return 0.0
    seconds, position = 0.0, 0
    for part in _PART.finditer(unsigned):
        if part.start() != position:
            break
        position = part.end()
        number, unit = part.groups()
        if not unit:
            raise InvalidOption(field, f"time: missing unit in duration {quoted}")
        if unit not in SECONDS_PER_UNIT:
            raise InvalidOption(field, f'time: unknown unit "{unit}" in duration {quoted}')
        seconds += float(number) * SECONDS_PER_UNIT[unit]
    # Go holds nanoseconds in 63 bits: about 292 years.
    if position != len(unsigned) or not unsigned or seconds > 9_223_372_036:
        raise InvalidOption(field, f"time: invalid duration {quoted}")
    return -seconds if text.startswith("-") else seconds


def format_duration(seconds: float) -> str:
    """Write seconds so that ``parse_duration`` and Go read them back: ``90s``, ``1.5s``.

    To the nanosecond, as Go counts; in seconds, the smallest unit that QStash documents.
    """
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"
