"""Settlement: what has been answered is added up, and what has ended lets go of what was held for it.

Both in one transaction, so that money that was reserved is spent or free, and never both or neither. An
entry is added once, whoever settles, and however often: who comes second waits, and finds it added.

Nobody's answer waits for this. It is done when somebody asks what was spent, when a request does not
fit into its budget, and by the sweep.
"""

from __future__ import annotations

from datetime import datetime

from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from . import budget, spend
from .budget import Budget, note_spending, note_thresholds
from .ledger import LedgerEntry
from .money import usd
from .reservation import Reservation
from .spend import Spend

AT_ONCE = 1000
_FIELDS = tuple(dict.fromkeys(("pk", *spend.ENTRY_FIELDS, *budget.ENTRY_FIELDS)))


def settle(using: str = "default", *, now: datetime | None = None) -> int:
    """Settle all there is; how many entries and reservations that were."""
    settled = 0
    while is_anything_to_settle(using):
        # None, where another has just settled the same.
        settled += _settle(using, now or timezone.now())
    return settled


def is_anything_to_settle(using: str) -> bool:
    if LedgerEntry.objects.using(using).unfolded().exists():
        return True
    return Reservation.objects.using(using).over().exists()


def _settle(using: str, now: datetime) -> int:
    with transaction.atomic(using=using):
        # First what has ended, then what it cost: what ends in between is held a little longer,
        # and not free before it is spent.
        reservations = Reservation.objects.using(using)
        over = list(reservations.over().order_by("pk").values_list("pk", "budget_id")[:AT_ONCE])
        unfolded = LedgerEntry.objects.using(using).unfolded().order_by("pk")
        entries = list(unfolded.select_for_update(of=("self",)).values(*_FIELDS)[:AT_ONCE])
        if len(entries) == AT_ONCE:
            over = []  # what they cost may be among those that are left
        budgets = Budget.objects.using(using)
        # In the order of their keys, all at once.
        concerned = Q(pk__in={budget_id for _, budget_id in over})
        if entries:
            found = set().union(*map(budget.places_of_entry, entries))
            concerned |= Q(pk__in=budgets.over(found).values("pk"))
        locked = list(budgets.filter(concerned).select_for_update(of=("self",)).order_by("pk"))
        freed = reservations.let_go([pk for pk, _ in over])
        for pk, amount in freed.items():
            budgets.filter(pk=pk).update(reserved=F("reserved") - usd(amount))
        note_spending(entries, locked, now=now)
        Spend.objects.using(using).add(entries)
        LedgerEntry.objects.using(using).filter(pk__in=[e["pk"] for e in entries]).update(
            is_folded=True
        )
        for each in locked:
            note_thresholds(each, now=now)
    return len(over) + len(entries)
