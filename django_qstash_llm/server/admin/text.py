"""Foreign text is shown as text, never as markup; a state as word and sign."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import Truncator

from .. import redaction

LARGEST_SHOWN = 20_000
SHORTENED = 12
_OURS = re.compile("(msg|scd)_[0-9a-f]{32}")
SIGNS = {
    "CREATED": "○",
    "ACTIVE": "◐",
    "RETRY": "↻",
    "ERROR": "✕",
    "DELIVERED": "✓",
    "FAILED": "✕",
    "CANCEL_REQUESTED": "⊘",
    "CANCELED": "⊘",
    "paused": "‖",
}


def as_text(body: bytes) -> SafeString:
    text = body[:LARGEST_SHOWN].decode("utf-8", "backslashreplace")
    cut = "…" if len(body) > LARGEST_SHOWN else ""
    # Reached by keyboard, because it scrolls.
    return format_html('<pre class="qs-text" tabindex="0">{}{}</pre>', text, cut)


def as_header(header: Mapping[str, list[str]]) -> SafeString:
    shown = json.dumps(redaction.without_secrets(header), indent=2, ensure_ascii=False)
    return format_html('<pre class="qs-text" tabindex="0">{}</pre>', shown)


def excerpt(text: str, length: int = 120) -> str:
    return Truncator(" ".join(text[: length * 4].split())).chars(length)


def short_id(whole: str, remark: str = "") -> SafeString:
    """Enough of an id of ours to know it again; the whole of it is its title."""
    is_ours = _OURS.fullmatch(whole)
    shown = f"{whole[:SHORTENED]}…" if is_ours else whole
    first = format_html('<span class="qs-id" title="{}">{}</span>', whole, shown)
    return format_html('{}<br><span class="qs-quiet">{}</span>', first, remark) if remark else first


def badge(word: str) -> SafeString:
    """With a sign, so that nobody depends on its colour."""
    return format_html(
        '<span class="qs-badge qs-{}"><span aria-hidden="true">{}</span> {}</span>',
        word.lower().replace("_", "-"),
        SIGNS.get(word, "·"),
        word,
    )
