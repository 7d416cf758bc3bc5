"""``Report``: what was spent, as somebody asks for it at a door: in the admin, by REST or a command.

What is asked comes as texts, and what is wrong with them is said by name, with the remedy.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property
from typing import Any

from django.db import router
from django.db.models import QuerySet
from django.utils import timezone

from .exceptions import ConfigurationError, InvalidRequest
from .models import Budget, MessageCount, Spend
from .models.budget import Standing
from .models.ledger import COUNTS, MONEY, SUMMED, TOKENS, Total
from .models.message_count import COUNTED, Messages
from .models.spend import DIMENSIONS
from .models.standing import forecast, standings

CHOICES = ("from", "to", "by", "provider", "model", *DIMENSIONS)
"""What may be asked."""
FIGURES = (*MONEY, *COUNTS, *TOKENS)
"""The columns of a line, after those that say of what it is."""
MOST_BUDGETS = 1000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for something to be worked out."""

Line = tuple[dict[str, Any], Total]
"""What it is of, and what that came to."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was spent ``since`` … ``until``, both included, split up ``by``."""

    by: tuple[str, ...] = ("month", "model")
    since: date | None = None
    until: date | None = None
    provider: str | None = None
    model: str | None = None
    place: Mapping[str, str] = field(default_factory=dict)
    """One of ``DIMENSIONS`` with its value at most, to look at that alone."""
    using: str = field(default_factory=lambda: router.db_for_write(Spend))

    @classmethod
    def asked(cls, given: Mapping[str, str | None], **settled: Any) -> Report:
        """From texts by the names of ``CHOICES``; an empty one is none. Raises ``InvalidRequest``."""
        for name in given:
            if name not in CHOICES:
                close = difflib.get_close_matches(name, CHOICES, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"give {', '.join(CHOICES)}"
                raise InvalidRequest(name, f"unknown; {hint}")
        texts = {name: (text or "").strip() for name, text in given.items()}
        since, until = _day("from", texts.get("from")), _day("to", texts.get("to"))
        if since and until and since > until:
            raise InvalidRequest("to", f"{until} is before {since}; give a later day")
        if by := tuple(each.strip() for each in texts.get("by", "").split(",") if each.strip()):
            settled["by"] = by
        report = cls(
            since=since,
            until=until,
            provider=texts.get("provider") or None,
            model=texts.get("model") or None,
            place={name: texts[name] for name in DIMENSIONS if texts.get(name)},
            **settled,
        )
        Spend.objects.check_report(*report.by, **report.place)
        return report

    def split(self, *by: str) -> list[Line]:
        """Its lines, split up by these."""
        return Spend.objects.using(self.using).report(
            *by,
            since=self.since,
            until=self.until,
            provider=self.provider,
            model=self.model,
            **self.place,
        )

    @cached_property
    def lines(self) -> list[Line]:
        return self.split(*self.by)

    @cached_property
    def total(self) -> Total:
        """Of all that is asked about; with labels less than the sum of the lines, as a request may have
        several."""
        if "label" in self.by and not self.place:
            [(_, total)] = self.split()
            return total
        return sum((total for _, total in self.lines), Total())

    @cached_property
    def messages(self) -> Messages:
        """QStash's, of all requests in these days."""
        counts = MessageCount.objects.using(self.using)
        return counts.counted(since=self.since, until=self.until)

    # --- as others read it ---

    def to_json(self) -> dict[str, Any]:
        """Money is text: a number of JSON's may lose what is behind a cent."""
        return {
            "from": self.since and self.since.isoformat(),
            "to": self.until and self.until.isoformat(),
            "by": list(self.by),
            **{name: value for name, value in self._chosen.items() if value},
            "lines": [{**_told(of), **figures_of(total)} for of, total in self.lines],
            "total": figures_of(self.total),
            "qstash_messages": messages_to_json(self.messages),
        }

    @property
    def _chosen(self) -> dict[str, str | None]:
        return {"provider": self.provider, "model": self.model, **self.place}

    def csv(self) -> Iterator[str]:
        """Line by line, its heading first. QStash's messages are none of the lines."""
        writer = csv.writer(_Echo())
        yield writer.writerow((*self.by, *FIGURES))
        for of, total in self.lines:
            cells = map(as_cell, _told(of).values())
            yield writer.writerow((*cells, *figures_of(total).values()))


def figures_of(total: Total) -> dict[str, Any]:
    values = {name: getattr(total, name) for name in SUMMED}
    return {name: usd_text(each) if name in MONEY else each for name, each in values.items()}


def messages_to_json(messages: Messages) -> dict[str, Any]:
    cost = cost_of_messages(messages)
    return {
        **{name: getattr(messages, name) for name in COUNTED},
        "total": messages.total,
        "cost": None if cost is None else usd_text(cost),
        "is_complete": messages.is_complete,
    }


def cost_of_messages(messages: Messages) -> Decimal | None:
    """USD; None also where the setting is wrong, which a system check says."""
    try:
        return messages.cost
    except ConfigurationError:
        return None


def usd_text(amount: Decimal) -> str:
    """``0.000039``: all of it, and never in powers of ten."""
    return f"{amount.normalize() + 0:f}"


def csv_headers(report: Report) -> dict[str, str]:
    """HTTP's, of the answer that holds ``report.csv()``."""
    days = "_".join(str(day) for day in (report.since, report.until) if day)
    return {
        "Content-Type": "text/csv; charset=utf-8",
        "Content-Disposition": f'attachment; filename="spend{days and "_"}{days}.csv"',
        "X-Content-Type-Options": "nosniff",
    }


def budgets_to_json(budgets: QuerySet[Budget]) -> list[dict[str, Any]]:
    """How each of ``budgets`` stands, by name; ``MOST_BUDGETS`` of them at most."""
    now, rows = timezone.now(), list(budgets.order_by("name")[:MOST_BUDGETS])
    found = standings(rows, now=now)
    return [budget_to_json(budget, found[budget.pk], now=now) for budget in rows]


def budget_to_json(budget: Budget, standing: Standing, *, now: datetime) -> dict[str, Any]:
    expected = forecast(budget, standing, now)
    told = ("name", "scope", "value", "period", "days", "action", "is_active", "thresholds")
    return {
        **{name: getattr(budget, name) for name in told},
        "time_zone": str(budget.zone),
        "amount": usd_text(standing.amount),
        "spent": usd_text(standing.spent),
        "reserved": usd_text(standing.reserved),
        "left": usd_text(standing.left),
        "percent": float(round(standing.percent, 2)),
        "forecast": None if expected is None else usd_text(expected),
        "renews_at": standing.renews_at and standing.renews_at.isoformat(),
    }


def as_cell(text: str) -> str:
    """``text`` for a cell of CSV, which no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def shown(name: str, value: Any) -> str:
    """A value of what a line is of: a month without its day."""
    return f"{value:%Y-%m}" if name == "month" else str(value)


def _told(of: Mapping[str, Any]) -> dict[str, str]:
    return {name: shown(name, value) for name, value in of.items()}


def _day(name: str, text: str | None) -> date | None:
    if not text:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(name, f"{text[:40]!r} is no day; give one as in 2026-03-31") from error


class _Echo:
    """A file that says what it was told to write."""

    def write(self, text: str) -> str:
        return text
