from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import models, transaction
from django.db.models import Count, Exists, F, Min, OuterRef, Q, Subquery
from django.db.models.functions import Coalesce

from ...qstash import FlowControl
from ...qstash.records import FlowControlState
from .. import doorbell

if TYPE_CHECKING:
    from .message import MessageQuerySet


class FlowControlKeyQuerySet(models.QuerySet["FlowControlKey"]):
    def owned_by(self, account: str) -> FlowControlKeyQuerySet:
        return self.filter(account=account)

    def brought(
        self, values: Iterable[FlowControl], *, account: str, now: datetime
    ) -> dict[str, FlowControlKey]:
        """The keys of messages that are accepted now, made where there are none, each with the
        values that the last of these messages brings."""
        wanted = {value.key: value for value in values}
        if not wanted:
            return {}
        rows = self.owned_by(account).filter(key__in=wanted)
        keys = {row.key: row for row in rows}
        if missing := sorted(set(wanted) - set(keys)):
            fresh = (FlowControlKey.called(key, account=account, now=now) for key in missing)
            self.bulk_create(fresh, ignore_conflicts=True)
            keys = {row.key: row for row in rows.all()}
        if not all(keys[key].adopt(wanted[key], now=now) for key in sorted(wanted)):
            # One was forgotten, or given another period, at this very moment.
            return self.brought(wanted.values(), account=account, now=now)
        return keys

    def with_counts(self) -> FlowControlKeyQuerySet:
        """Each with ``wait_list_size`` and ``parallelism_count``."""
        in_flight, waiting = _counts()
        return self.annotate(  # type: ignore[no-redef]
            wait_list_size=Coalesce(Subquery(waiting), 0),
            parallelism_count=Coalesce(Subquery(in_flight), 0),
        )

    def waited_for(self) -> FlowControlKeyQuerySet:
        """Keys at which somebody waits whom no pause holds."""
        from .message import Message

        waiting = Message.objects.at_their_flow_control().filter(flow_control=OuterRef("pk"))
        return self.filter(waiting.first_exists(), is_paused=False)

    def with_room(self, now: datetime) -> FlowControlKeyQuerySet:
        """Keys at which somebody waits and a delivery may start, at a glance: nothing is locked."""
        in_flight, _ = _counts()
        is_free = Q(parallelism__isnull=True) | Q(parallelism__gt=Coalesce(Subquery(in_flight), 0))
        rate_allows = (
            Q(rate__isnull=True)
            | Q(window_ends_at__isnull=True)
            | Q(window_ends_at__lte=now)
            | Q(rate__gt=F("rate_count"))
        )
        return self.waited_for().filter(is_free, rate_allows)

    def next_window_at(self, now: datetime) -> datetime | None:
        """When the first window opens for somebody who waits only for that."""
        shut = self.waited_for().filter(rate__lte=F("rate_count"), window_ends_at__gt=now)
        moment: datetime | None = shut.aggregate(moment=Min("window_ends_at"))["moment"]
        return moment

    def purge(self, *, before: datetime) -> None:
        """Forget those that nobody set up and no message was seen of for long."""
        from .message import Message

        in_use = Message.objects.unfinished().filter(flow_control=OuterRef("pk"))
        unneeded = self.filter(
            ~Exists(in_use),
            updated_at__lt=before,
            is_paused=False,
            pins_parallelism=False,
            pins_rate=False,
        )
        if not unneeded.exists():
            return
        with transaction.atomic():
            # Asked again once they are locked: a message may have brought one this very moment,
            # and would wait for ever at a key that is no more.
            locked = unneeded.order_by("pk").select_for_update().values_list("pk", flat=True)
            unneeded.filter(pk__in=list(locked)).delete()


def _counts() -> list[models.QuerySet[Any]]:
    """Of a key in the query around them: what is in flight, what waits."""
    from .message import Message

    messages = Message.objects.filter(flow_control=OuterRef("pk"))
    kinds = messages.claimed(), messages.waiting_for(Message.Waits.FLOW_CONTROL)
    return [
        kind.order_by().values("flow_control").annotate(count=Count("pk")).values("count")
        for kind in kinds
    ]


class FlowControlKey(models.Model):
    """A ceiling that all messages with this key share: so many in flight, so many started per
    period. The latest message's values count, unless they are pinned here."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
    key = models.CharField(max_length=256)
    parallelism = models.PositiveIntegerField(null=True, blank=True)
    """Deliveries in flight at most; empty is no limit."""
    rate = models.PositiveIntegerField(null=True, blank=True)
    """Deliveries started per period at most; empty is no limit."""
    period = models.PositiveIntegerField(default=1)
    """Seconds."""
    rate_count = models.PositiveIntegerField(default=0)
    """Started in this window."""
    window_ends_at = models.DateTimeField(null=True, blank=True)
    """A window begins with the first delivery after the one before it ended."""
    is_paused = models.BooleanField(default=False)
    pins_parallelism = models.BooleanField(default=False)
    pins_rate = models.BooleanField(default=False)
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()
    """When its values last changed, or it was last set up."""

    objects = FlowControlKeyQuerySet.as_manager()

    class Meta:
        ordering = ["key"]
        verbose_name = "flow-control key"
        constraints = [
            models.UniqueConstraint(fields=["account", "key"], name="qstash_server_flow_key")
        ]

    def __str__(self) -> str:
        return self.key

    @classmethod
    def called(cls, key: str, *, account: str, now: datetime) -> FlowControlKey:
        return cls(account=account, key=key, created_at=now, updated_at=now)

    @property
    def mine(self) -> MessageQuerySet:
        from .message import Message

        return Message.objects.filter(flow_control=self)

    # --- who may start -----------------------------------------------------------------------

    def room(self, now: datetime) -> int:
        """How many more deliveries may start. Ask with the key's row locked."""
        if self.is_paused:
            return 0
        rooms = [2**31]
        if self.parallelism is not None:
            rooms.append(self.parallelism - self.mine.claimed().count())
        if self.rate is not None:
            rooms.append(self.rate - (self.rate_count if self.is_window_open(now) else 0))
        return max(0, min(rooms))

    def is_window_open(self, now: datetime) -> bool:
        """Whether the deliveries counted still count."""
        return self.window_ends_at is not None and self.window_ends_at > now

    def count(self, started: int, *, now: datetime) -> None:
        """So many deliveries have just started. With the key's row locked."""
        if not self.is_window_open(now):
            self.rate_count = 0
            self.window_ends_at = now + timedelta(seconds=self.period)
        self.rate_count += started
        self.save(update_fields=["rate_count", "window_ends_at"])

    # --- what it is set to -------------------------------------------------------------------

    def adopt(self, value: FlowControl, *, now: datetime) -> bool:
        """A message brings these values. False when the key is no more, or not as it was."""
        rows = FlowControlKey.objects.filter(pk=self.pk)
        changes: dict[str, Any] = {}
        if not self.pins_parallelism and self.parallelism != value.parallelism:
            changes["parallelism"] = value.parallelism
        if not self.pins_rate and (self.rate, self.period) != (value.rate, value.period):
            changes |= {"rate": value.rate, "period": value.period}
            if self.period != value.period:
                # The window began when it began, and is as long as the new period. Once only,
                # though two messages may bring that at the same time.
                rows = rows.filter(period=self.period)
                longer = timedelta(seconds=value.period - self.period)
                changes["window_ends_at"] = F("window_ends_at") + longer
        # Seen, so that it is not forgotten; not by every message, or they would queue up here.
        if changes or self.updated_at < now - timedelta(hours=1):
            return self._change(rows, now=now, **changes)
        return True

    def pause(self, *, now: datetime) -> None:
        """Deliver nothing, go on accepting. What is in flight may finish."""
        self._change(now=now, is_paused=True)

    def resume(self, *, now: datetime) -> None:
        self._change(now=now, is_paused=False)

    def pin(
        self,
        *,
        now: datetime,
        parallelism: int | None = None,
        rate: int | None = None,
        period: int | None = None,
    ) -> None:
        """Hold these values, whatever messages bring. Begins to count anew."""
        changes: dict[str, Any] = {"rate_count": 0, "window_ends_at": None}
        if parallelism is not None:
            changes |= {"parallelism": parallelism, "pins_parallelism": True}
        if rate is not None or period is not None:
            changes |= {"rate": rate or self.rate, "pins_rate": True}
            changes["period"] = period or (1 if rate else self.period)
        self._change(now=now, **changes)

    def unpin(self, *, now: datetime, parallelism: bool, rate: bool) -> None:
        """Let messages decide again. The values stay until one brings others."""
        changes: dict[str, Any] = {}
        if parallelism:
            changes["pins_parallelism"] = False
        if rate:
            changes["pins_rate"] = False
        self._change(now=now, **changes)

    def reset_rate(self, *, now: datetime) -> None:
        """Forget what was counted: a window begins now."""
        ends_at = now + timedelta(seconds=self.period)
        self._change(now=now, rate_count=0, window_ends_at=ends_at)

    def _change(
        self, rows: FlowControlKeyQuerySet | None = None, *, now: datetime, **values: Any
    ) -> bool:
        if rows is None:
            rows = FlowControlKey.objects.filter(pk=self.pk)
        count = rows.update(**values, updated_at=now)
        if values:
            # There may be more room now.
            transaction.on_commit(doorbell.ring, robust=True)
        return count > 0

    # --- what it says ------------------------------------------------------------------------

    wait_list_size: int
    parallelism_count: int
    """Of a key that was fetched ``with_counts``."""

    def to_record(self, now: datetime) -> FlowControlState:
        is_open = self.is_window_open(now)
        start = 0
        if self.window_ends_at is not None:
            start = int(self.window_ends_at.timestamp()) - self.period
        return FlowControlState(
            key=self.key,
            wait_list_size=self.wait_list_size,
            parallelism_max=self.parallelism or 0,
            parallelism_count=self.parallelism_count,
            rate_max=self.rate or 0,
            rate_count=self.rate_count if is_open else 0,
            rate_period=self.period,
            rate_period_start=start,
            is_paused=self.is_paused,
            is_pinned_parallelism=self.pins_parallelism,
            is_pinned_rate=self.pins_rate,
        )
