"""The one place where text from outside is made fit for every database.

PostgreSQL refuses NUL and lone surrogates, both databases refuse NaN in JSON, and an integer may
be too wide for any column. Each would turn a paid answer into an error page.
"""

from __future__ import annotations

import math
from typing import Any

DEEPEST = 64
"""Levels of nesting kept. Deeper JSON says nothing to a person and overflows stacks."""
WIDEST_INTEGER = 2**63


def clean_text(text: str, *, limit: int | None = None) -> str:
    """``text`` without NUL and lone surrogates, cut to ``limit`` characters."""
    if "\x00" in text:
        text = text.replace("\x00", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text if limit is None else text[:limit]


def clean_json(value: Any, depth: int = 0) -> Any:
    """``value``, decoded JSON, so that JSONField takes it on every database."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if abs(value) < WIDEST_INTEGER:
            return value
        # Python refuses to write out thousands of digits.
        return str(value)[:64] if value.bit_length() < 4096 else "…"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth >= DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {clean_text(str(key)): clean_json(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(each, depth + 1) for each in value]
    return clean_text(str(value))
