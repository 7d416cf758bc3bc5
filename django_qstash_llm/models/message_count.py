"""``MessageCount``: how many messages QStash has delivered for us on each day, and so what it asks.

Of what is here that is known by the receipts: each attempt at a provider is told of by one callback.
So a callback stands for two messages, the delivery that it tells of and itself, and a failure
callback for one. A chat has none. What QStash is to be paid stands beside what the models cost, and is
never part of it.

Upstash's words, as of November 2026: pay-as-you-go is 1 USD for 100,000 messages
(https://upstash.com/pricing/qstash); "messages created by callbacks are charged as any other message"
(https://upstash.com/docs/qstash/features/callbacks). Of retries it says both: that each attempt at a
delivery counts (the questions under https://upstash.com/docs/qstash/overall/pricing), and that they are
free (https://upstash.com/pricing/qstash.md). Here they count, and their number is told by itself. How
often a callback of ours was repeated, because this site was away, is not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import takewhile

from django.db import models, transaction
from django.db.models import F, Subquery, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from .callback import CallbackResponse, Kind
from .ledger import day_of
from .spend import lock_out_writers

AT_ONCE = 5000
"""Receipts that are counted in one transaction."""
SETTLED_AFTER = timedelta(minutes=5)
"""Then every receipt with a lower key is there, too: none takes so long to be stored."""
MOST_LIVE = 20_000
"""Receipts that are looked at to say what is not in the table yet."""
COUNTED = ("published", "retries", "callbacks", "failure_callbacks")


@dataclass(frozen=True)
class Messages:
    """QStash's messages of some days."""

    published: int = 0
    """First deliveries, however they were handed in: publish, enqueue or batch."""
    retries: int = 0
    callbacks: int = 0
    failure_callbacks: int = 0
    is_complete: bool = True
    """False while there are receipts of long ago that the sweep has not counted yet."""

    @property
    def total(self) -> int:
        return self.published + self.retries + self.callbacks + self.failure_callbacks

    @property
    def cost(self) -> Decimal | None:
        """USD at ``QSTASH_MESSAGE_PRICE``; None where that is not known. Raises
        ``ConfigurationError``."""
        price = app_settings().message_price
        return None if price is None else price * self.total


Receipt = tuple[int, str, int, datetime]
"""Key, kind, retried, and when it was received."""


class MessageCountQuerySet(models.QuerySet["MessageCount"]):
    def counted(self, *, since: date | None = None, until: date | None = None) -> Messages:
        """From ``since`` to ``until``, both included, in the site's time zone."""
        days = self
        if since is not None:
            days = days.filter(day__gte=since)
        if until is not None:
            days = days.filter(day__lte=until)
        found = days.aggregate(**{f"total_{name}": Sum(name) for name in COUNTED})
        receipts = self._uncounted(MOST_LIVE + 1)
        live = by_day(receipts[:MOST_LIVE])
        sums = {name: found[f"total_{name}"] or 0 for name in COUNTED}
        for day, counts in live.items():
            if (since is None or day >= since) and (until is None or day <= until):
                for name in COUNTED:
                    sums[name] += counts[name]
        return Messages(**sums, is_complete=len(receipts) <= MOST_LIVE)

    def _uncounted(self, limit: int) -> list[Receipt]:
        last = Subquery(self.model.objects.order_by("-last_receipt").values("last_receipt")[:1])
        receipts = CallbackResponse.objects.using(self.db).order_by("pk")
        receipts = receipts.filter(pk__gt=Coalesce(last, 0))
        return list(receipts.values_list("pk", "kind", "retried", "received_at")[:limit])

    def _settled(self, limit: int, now: datetime) -> list[Receipt]:
        """The next ones up to the first that is too new. One of a clock that went wrong, from days to
        come, is not waited for."""
        return list(
            takewhile(
                lambda receipt: not now - SETTLED_AFTER < receipt[3] <= now, self._uncounted(limit)
            )
        )

    def note(self, *, now: datetime | None = None) -> int:
        """Count the next receipts, which are not counted again; how many those were."""
        self._for_write = True
        now = now or timezone.now()
        if not self._settled(1, now):
            return 0
        with transaction.atomic(using=self.db):
            lock_out_writers(self.model, using=self.db)
            receipts = self._settled(AT_ONCE, now)
            if not receipts:
                return 0
            last = receipts[-1][0]
            for day, counts in sorted(by_day(receipts).items()):
                added = {name: F(name) + number for name, number in counts.items()}
                if not self.filter(day=day).update(**added, last_receipt=last):
                    self.create(day=day, **counts, last_receipt=last)
        return len(receipts)


class MessageCount(models.Model):
    """Of one day."""

    day = models.DateField(_("day"), unique=True)
    """On which the callback came, in the site's time zone."""
    published = models.BigIntegerField(_("published"), default=0)
    retries = models.BigIntegerField(_("retries"), default=0)
    callbacks = models.BigIntegerField(_("callbacks"), default=0)
    failure_callbacks = models.BigIntegerField(_("failure callbacks"), default=0)
    last_receipt = models.BigIntegerField(default=0, editable=False)
    """The highest key of a receipt that is counted here."""

    objects = MessageCountQuerySet.as_manager()

    class Meta:
        verbose_name = _("QStash messages of a day")
        verbose_name_plural = _("QStash messages by day")
        ordering = ("-day",)

    def __str__(self) -> str:
        return str(self.day)


def by_day(receipts: Iterable[Receipt]) -> dict[date, dict[str, int]]:
    """The messages that ``receipts`` stand for."""
    counts: dict[date, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTED, 0))
    for _key, kind, retried, received_at in receipts:
        of_day = counts[day_of(received_at)]
        if kind == Kind.FAILURE_CALLBACK:
            of_day["failure_callbacks"] += 1
        elif kind in (Kind.CALLBACK, Kind.QUARANTINED):
            of_day["callbacks"] += 1
            if kind == Kind.CALLBACK:  # what cannot be read says of no delivery
                of_day["retries" if retried else "published"] += 1
    return counts


def count_messages(using: str, *, pieces: int = 10) -> None:
    """Count what there is to count, for a sweep: no more than it has time for."""
    for _piece in range(pieces):
        if MessageCount.objects.using(using).note() < AT_ONCE:
            return
