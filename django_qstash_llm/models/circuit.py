"""``Circuit``: what takes nothing at the moment, and until when nobody needs to ask it.

One row for QStash, shared by all workers: when it refuses everybody, one call finds out and all
that is due waits, without being tried one by one.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta

from django.db import models, transaction
from django.db.models import F, Q
from django.utils.translation import gettext_lazy as _

QSTASH = "qstash"
LONGEST_PAUSE = 300.0
"""Seconds between two calls to find out whether it takes anything again, unless it said when."""
CLOCKS_DIFFER = timedelta(seconds=60)
"""By how much those of two workers may, before one is taken to have been put back."""
PROBE_SECONDS = 60
"""How long everybody waits for the one that finds out."""


class CircuitQuerySet(models.QuerySet["Circuit"]):
    def open_until(self, name: str, now: datetime) -> datetime | None:
        """Until when nobody is to call; None when anybody may."""
        still_open = self.filter(name=name, open_until__gt=now).exclude(_was_put_back(now))
        return still_open.values_list("open_until", flat=True).first()

    def failures(self, name: str) -> int:
        """How often in a row it took nothing; 0 is a closed circuit."""
        self._for_write = True
        return self.filter(name=name).values_list("failures", flat=True).first() or 0

    def may_call(self, name: str, now: datetime) -> bool:
        """Whether to call now. After a pause one asks first, and the others wait for what it finds."""
        self._for_write = True
        failing = self.filter(name=name, failures__gt=0)
        if not failing.exists():
            return True
        until = now + timedelta(seconds=PROBE_SECONDS)
        is_over = Q(open_until__lte=now) | _was_put_back(now)
        return bool(failing.filter(is_over).update(open_until=until, tripped_at=now))

    def trip(
        self, name: str, reason: str, *, now: datetime, until: datetime | None = None
    ) -> datetime:
        """It took nothing: pause until the moment it named, or a little longer each time."""
        self._for_write = True
        with transaction.atomic(using=self.db):
            row, _is_new = self.select_for_update(of=("self",)).get_or_create(
                name=name, defaults={"open_until": now, "opened_at": now, "tripped_at": now}
            )
            if row.failures == 0:
                row.opened_at = now
            row.failures = min(row.failures + 1, 1000)
            row.reason = reason
            row.open_until = until or now + _pause(row.failures)
            row.tripped_at = now
            row.save(using=self.db)
        return row.open_until

    def close(self, name: str) -> None:
        """It takes something again."""
        self._for_write = True
        failing = self.filter(name=name, failures__gt=0)
        if failing.exists():
            failing.update(failures=0, open_until=F("opened_at"), reason="")


class Circuit(models.Model):
    """Whether something outside takes what we send."""

    name = models.CharField(_("name"), max_length=64, unique=True)
    failures = models.PositiveSmallIntegerField(_("failures"), default=0)
    """In a row; 0 is a closed circuit."""
    open_until = models.DateTimeField(_("open until"))
    opened_at = models.DateTimeField(_("opened at"))
    tripped_at = models.DateTimeField(_("last tried at"))
    reason = models.TextField(_("reason"), blank=True)

    objects = CircuitQuerySet.as_manager()

    class Meta:
        verbose_name = _("circuit")
        verbose_name_plural = _("circuits")

    def __str__(self) -> str:
        return self.name

    @property
    def is_open(self) -> bool:
        return self.failures > 0


def _was_put_back(now: datetime) -> Q:
    """The clock, since the last try: what seems to lie ahead says nothing about when to go on."""
    return Q(tripped_at__gt=now + CLOCKS_DIFFER)


def _pause(failures: int) -> timedelta:
    jitter = random.uniform(1.0, 1.2)  # noqa: S311
    return timedelta(seconds=min(LONGEST_PAUSE, 2.0 ** min(failures, 10)) * jitter)
