"""Text of strangers: models, providers, users. It reaches the page escaped, or sanitised, and capped."""

from __future__ import annotations

import json
import zlib
from functools import cache
from typing import Any

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import Truncator
from django.utils.translation import gettext as _

from . import figures

LONGEST = 32 * 1024
"""Characters of one text that are shown."""
MOST_BRACKETS = 2000
"""Markdown's links are looked for in quadratic time: 20,000 of "[" would take two seconds."""
_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
"""No images: a model's answer must not make the reader's browser fetch what it likes."""


def excerpt(text: str, length: int = 200) -> str:
    return Truncator(" ".join(text[: length * 4].split())).chars(length)


def preformatted(text: str, *, size: int | None = None) -> SafeString:
    """``text``, escaped and wrapped. ``size`` is its whole length, when it has been cut already."""
    size = len(text) if size is None else size
    shown = text[:LONGEST]
    # Reached by keyboard, because it scrolls.
    pre = format_html('<pre class="llm-text" tabindex="0">{}</pre>', shown)
    if size <= len(shown):
        return pre
    note = _("Cut here: %(shown)s of %(size)s are shown.") % {
        "shown": figures.count(len(shown)),
        "size": figures.count(size),
    }
    return format_html('{}<p class="llm-note">{}</p>', pre, note)


def pretty_json(value: Any) -> SafeString:
    return preformatted(json.dumps(value, indent=2, ensure_ascii=False))


def completion(text: str) -> SafeString:
    """A model's answer: JSON laid out, Markdown rendered where the ``admin`` extra is there."""
    as_json = _as_json(text)
    if as_json is not None:
        return preformatted(as_json)
    if len(text) > LONGEST or text.count("[") > MOST_BRACKETS:
        return preformatted(text)
    return _as_markdown(text) or preformatted(text)


def laid_out(text: str) -> str:
    """JSON with indentation; any other text as it is."""
    return _as_json(text) or text


def _as_json(text: str) -> str | None:
    if len(text) > LONGEST or text.lstrip()[:1] not in {"{", "["}:
        return None
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _as_markdown(text: str) -> SafeString | None:
    """Sanitised HTML; None without the extra."""
    parser = _markdown_parser()
    if parser is None:
        return None
    import nh3

    tokens = parser.parse(text)
    for token in tokens:
        if token.type in {"heading_open", "heading_close"}:
            # Its headings stand below the page's own.
            token.tag = f"h{min(int(token.tag[1]) + 3, 6)}"
    html = nh3.clean(
        parser.renderer.render(tokens, parser.options, {}),
        tags=_TAGS,
        attributes={"a": {"href", "title"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    # The one place where HTML is believed: it comes out of the sanitiser.
    return format_html('<div class="llm-markdown">{}</div>', SafeString(html))


@cache
def _markdown_parser() -> Any:
    try:
        import nh3  # noqa: F401
        from markdown_it import MarkdownIt
    except ImportError:
        return None
    return MarkdownIt("js-default", {"html": False})


def decoded(body: bytes) -> str:
    """A provider's bytes as text, unpacked and laid out as far as they allow."""
    return laid_out(unpacked(body).decode("utf-8", "replace"))


def unpacked(body: bytes) -> bytes:
    """Unlike ``completions.decompress`` this takes the beginning of what was cut."""
    if body[:2] != b"\x1f\x8b":
        return body
    try:
        return zlib.decompressobj(wbits=31).decompress(body, LONGEST)
    except zlib.error:
        return body
