"""How budgets stand: of many at once, in as many queries as of one, and where each is going."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.db.models import Q
from django.utils import timezone

from .budget import Budget, Period, Standing
from .moments import as_stored, aware
from .money import STEP
from .settlement import settle
from .tally import Tally

EARLY = Decimal("0.02")
"""The part of a period before which what was spent in it says nothing of the whole."""


def standings(budgets: Sequence[Budget], *, now: datetime | None = None) -> dict[Any, Standing]:
    """By their keys, settled up to now. ``budgets`` are of one database, and are told what is reserved
    in them by now."""
    if not budgets:
        return {}
    using = budgets[0]._state.db or "default"
    settle(using)
    now = now or timezone.now()
    keys = [budget.pk for budget in budgets]
    rows = Budget.objects.using(using).filter(pk__in=keys)
    known = {row[0]: row[1:] for row in rows.values_list("pk", "reserved", "counted_as")}
    counted = Q(pk__in=[])
    for budget in budgets:
        budget.reserved, budget.counted_as = known.get(budget.pk, (Decimal(0), ""))
        if budget.is_active:  # one that is paused stands as it did then
            budget.count_if_needed(now)  # of one that is new, or was changed: once
        since = as_stored(budget.since(now))
        is_rolling = budget.period == Period.ROLLING
        counted |= Q(
            **{"budget": budget.pk, "starts_at__gte" if is_rolling else "starts_at": since}
        )
    spent: dict[Any, Decimal] = defaultdict(Decimal)
    for key, amount in Tally.objects.using(using).filter(counted).values_list("budget", "spent"):
        spent[key] += amount
    return {
        budget.pk: Standing(budget.amount, spent[budget.pk], budget.reserved, budget.renews_at(now))
        for budget in budgets
    }


def forecast(budget: Budget, standing: Standing, now: datetime) -> Decimal | None:
    """USD that will be spent when the period ends, if it goes on as it has up to ``now``. None too early
    in it, and for “the last days”, which do not end."""
    if standing.renews_at is None:
        return None
    now = aware(now)
    since = budget.since(now)
    gone = (now - since).total_seconds()
    part = Decimal(gone) / Decimal((standing.renews_at - since).total_seconds())
    if part < EARLY:
        return None
    return (standing.spent / part).quantize(STEP)
