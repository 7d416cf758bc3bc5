from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import models, transaction
from django.db.models import Count, OuterRef, Subquery
from django.db.models.functions import Coalesce

from ...qstash import Queue as QueueRecord
from .. import doorbell

if TYPE_CHECKING:
    from .message import MessageQuerySet


def milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


class QueueQuerySet(models.QuerySet["Queue"]):
    def owned_by(self, account: str) -> QueueQuerySet:
        return self.filter(account=account)

    def standing(self) -> QueueQuerySet:
        return self.filter(deleted_at__isnull=True)

    def named(self, names: Iterable[str], *, account: str, now: datetime) -> dict[str, Queue]:
        """These queues, made where they do not stand. One that does is not touched."""
        wanted = sorted(set(names))
        if not wanted:
            return {}
        rows = self.owned_by(account).filter(name__in=wanted)
        queues = {queue.name: queue for queue in rows.standing()}
        if len(queues) == len(wanted):
            return queues
        fresh = [
            Queue(account=account, name=name, created_at=now, updated_at=now)
            for name in wanted
            if name not in queues
        ]
        self.bulk_create(fresh, ignore_conflicts=True)
        rows.filter(deleted_at__isnull=False).update(
            deleted_at=None, parallelism=1, is_paused=False, created_at=now, updated_at=now
        )
        return {queue.name: queue for queue in rows}

    def with_lag(self) -> QueueQuerySet:
        """Each with ``lag``: how many of its messages are not finished."""
        started, in_line, _ = _counts()
        lag = Coalesce(Subquery(started), 0) + Coalesce(Subquery(in_line), 0)
        return self.annotate(lag=lag)  # type: ignore[no-redef]

    def waited_for(self) -> QueueQuerySet:
        """Queues in which somebody waits whom no pause holds."""
        from .message import Message

        line = Message.objects.in_line().filter(queue=OuterRef("pk"))
        return self.filter(line.first_exists(), is_paused=False)

    def with_room(self) -> QueueQuerySet:
        """Queues in which somebody waits and a place is free, at a glance: nothing is locked."""
        started, _, telling = _counts()
        return self.waited_for().filter(
            parallelism__gt=Coalesce(Subquery(started), 0) + Coalesce(Subquery(telling), 0)
        )


def _counts() -> list[models.QuerySet[Any]]:
    """Of a queue in the query around them: the started, those in line, those that wait for their
    callbacks. Each has an index of its own, so that a long history costs nothing."""
    from .message import Message

    messages = Message.objects.filter(queue=OuterRef("pk"))
    kinds = messages.started(), messages.in_line(), messages.waiting_for_their_callbacks()
    return [kind.values("queue").annotate(count=Count("pk")).values("count") for kind in kinds]


class Queue(models.Model):
    """Messages that go one after the other: the next starts when the one before, its retries
    and its callbacks are done with."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
    name = models.CharField(max_length=256)
    parallelism = models.PositiveIntegerField(default=1)
    is_paused = models.BooleanField(default=False)
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()
    deleted_at = models.DateTimeField(null=True, editable=False)
    """Kept, so that a message enqueued at that very moment still has its queue."""

    objects = QueueQuerySet.as_manager()

    class Meta:
        ordering = ["name"]
        constraints = [
            models.UniqueConstraint(fields=["account", "name"], name="qstash_server_queue_name")
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def mine(self) -> MessageQuerySet:
        from .message import Message

        return Message.objects.filter(queue=self)

    def room(self) -> int:
        """How many more may start. Ask with the queue's row locked."""
        if self.is_paused:
            return 0
        busy = self.mine.started().count() + self.mine.waiting_for_their_callbacks().count()
        return max(0, self.parallelism - busy)

    def set_up(self, *, parallelism: int | None, is_paused: bool, now: datetime) -> None:
        """``parallelism`` None is as it is."""
        changes = {} if parallelism is None else {"parallelism": parallelism}
        self._change(now=now, is_paused=is_paused, **changes)

    def pause(self, *, now: datetime) -> None:
        """Deliver nothing, go on accepting. What is in flight may finish."""
        self._change(now=now, is_paused=True)

    def resume(self, *, now: datetime) -> None:
        self._change(now=now, is_paused=False)

    def _change(self, *, now: datetime, **values: int | bool) -> None:
        Queue.objects.filter(pk=self.pk).update(**values, updated_at=now)
        # There may be more room now.
        transaction.on_commit(doorbell.ring, robust=True)

    def discard(self, *, now: datetime) -> None:
        """Delete the queue, and with it what waits in it."""
        with transaction.atomic():
            self.mine.cancel(now=now)
            # Not paused: what is enqueued at this very moment would wait for ever.
            rows = Queue.objects.filter(pk=self.pk)
            rows.update(deleted_at=now, is_paused=False, updated_at=now)

    lag: int
    """Of a queue that was fetched ``with_lag``."""

    def to_record(self) -> QueueRecord:
        return QueueRecord(
            name=self.name,
            parallelism=self.parallelism,
            created_at=milliseconds(self.created_at),
            updated_at=milliseconds(self.updated_at),
            lag=self.lag,
            is_paused=self.is_paused,
        )
