"""Small things as people read them: a state, a time, a cost, a count."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal

from django.utils import formats, timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import pgettext

from ..models import LedgerEntry, LLMRequest
from ..models.ledger import Total
from ..models.money import in_words
from ..models.request import State

UNKNOWN = "–"
"""Never 0: unknown is not nothing."""

_SIGNS: dict[str, str] = {
    State.PENDING: "○",
    State.SUBMITTED: "◐",
    State.COMPLETED: "✓",
    State.FAILED: "✕",
    State.CANCELLED: "⊘",
}
_BAR_ORDER = (State.COMPLETED, State.FAILED, State.CANCELLED, State.SUBMITTED, State.PENDING)


def state_sign(state: str) -> SafeString:
    """A state as word and sign, so that nobody depends on its colour."""
    label = State(state).label if state in State else state
    return format_html(
        '<span class="llm-state llm-state-{}"><span aria-hidden="true">{}</span> {}</span>',
        state,
        _SIGNS.get(state, "?"),
        label,
    )


def count(number: int | None) -> str:
    return UNKNOWN if number is None else formats.number_format(number, force_grouping=True)


def tokens(llm_request: LLMRequest) -> str:
    """Input and output."""
    if llm_request.input_tokens is None and llm_request.output_tokens is None:
        return UNKNOWN
    return f"{count(llm_request.input_tokens)} → {count(llm_request.output_tokens)}"


def money(amount: Decimal | None, *, decimals: int = 6) -> str:
    """USD."""
    if amount is None:
        return UNKNOWN
    return in_words(amount, decimals=decimals)


def amount(value: Decimal | None, *, decimals: int = 6) -> SafeString:
    """The same, in figures that stand under one another."""
    return format_html('<span class="llm-figure">{}</span>', money(value, decimals=decimals))


def total(found: Total, *, decimals: int = 6) -> SafeString | str:
    """What was spent, and how much of it nobody can say."""
    if not found.answers:
        return UNKNOWN
    if found.cost is None:
        return unpriced(_("unpriced"))
    spent = amount(found.spent, decimals=decimals)
    if not found.unpriced:
        return spent
    return format_html("{} {}", spent, unpriced(found.unpriced_in_words))


def entry_cost(entry: LedgerEntry, value: Decimal) -> SafeString:
    """Of one entry: what has no known cost costs no 0."""
    if entry.unpriced > 0:
        return unpriced(_("unpriced"))
    return amount(value, decimals=12)


def unpriced(words: str) -> SafeString:
    return format_html('<span class="llm-unpriced">{}</span>', words)


def cost(llm_request: LLMRequest) -> SafeString | str:
    if llm_request.cost is None and llm_request.state == State.COMPLETED:
        return format_html(
            '<span class="llm-unpriced" title="{}"><span aria-hidden="true">?</span> {}</span>',
            _("Completed, and no price is known for this model."),
            _("unpriced"),
        )
    return money(llm_request.cost)


def duration(span: timedelta, *, units_shown: int = 2) -> str:
    """``0.42 s``, ``3 min 12 s``, ``2 h 5 min``, ``3 d 4 h``."""
    seconds = max(span.total_seconds(), 0)
    if seconds < 60:
        places = 2 if seconds < 1 else 1 if seconds < 10 else 0
        return f"{formats.number_format(round(seconds, places), decimal_pos=places)} s"
    units = ((86_400, pgettext("days", "d")), (3600, "h"), (60, "min"), (1, "s"))
    whole = int(seconds)
    parts = []
    for size, unit in units:
        number, whole = divmod(whole, size)
        parts.append(f"{number} {unit}" if number else "")
    first = next(i for i, part in enumerate(parts) if part)
    return " ".join(filter(None, parts[first : first + units_shown]))


def moment(at: datetime | None, *, now: datetime | None = None) -> SafeString | str:
    """How long ago, or in how long, roughly; the exact time is its title."""
    if at is None:
        return UNKNOWN
    now = now or timezone.now()
    exact = formats.date_format(timezone.localtime(at), "DATETIME_FORMAT")
    if abs(now - at) > timedelta(days=7):
        shown = formats.date_format(timezone.localtime(at), "DATE_FORMAT")
    elif at <= now:
        shown = _("%(duration)s ago") % {"duration": duration(now - at, units_shown=1)}
    else:
        shown = _("in %(duration)s") % {"duration": duration(at - now, units_shown=1)}
    return format_html(
        '<time class="llm-moment" datetime="{}" title="{}">{}</time>', at.isoformat(), exact, shown
    )


def status(code: int | None) -> str:
    """An attempt's HTTP status."""
    if code is None:
        return UNKNOWN
    return _("no response") if code < 0 else str(code)


def progress_bar(counts: Mapping[str, int]) -> SafeString:
    """How much of a batch is in which state. The numbers stand beside it as text."""
    total = sum(counts.values())
    described = ", ".join(f"{counts[s]} {s.label}" for s in _BAR_ORDER if counts.get(s))
    pieces = []
    left = 0.0
    for state in _BAR_ORDER:
        width = 100 * counts.get(state, 0) / total if total else 0
        if width:
            pieces.append((state.value, f"{left:.3f}", f"{width:.3f}"))
        left += width
    return format_html(
        '<svg class="llm-bar" role="img" width="100%" height="12" viewBox="0 0 100 8"'
        ' preserveAspectRatio="none"><title>{}</title>'
        '<rect class="llm-bar-empty" width="100" height="8" fill="#ccc"></rect>{}</svg>',
        described or _("no requests"),
        format_html_join(
            "", '<rect class="llm-bar-{}" x="{}" width="{}" height="8"></rect>', pieces
        ),
    )


def counts_in_words(counts: Mapping[str, int]) -> SafeString:
    return format_html_join(
        " ",
        '<span class="llm-count">{} {}</span>',
        ((count(counts[state]), state_sign(state)) for state in _BAR_ORDER if counts.get(state)),
    )
