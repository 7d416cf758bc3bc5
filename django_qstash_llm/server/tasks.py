"""Celery's part: a bell to answer, and a sweep for beat.

Deliveries wait for slow destinations, so give them a worker of their own::

    CELERY_TASK_ROUTES = {"qstash_server.deliver": {"queue": "qstash"}}
    celery -A proj worker -Q qstash -P threads -c 2

Whatever the pool, one task per process keeps ``CONCURRENCY`` calls in flight.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery import shared_task
from django.utils import timezone

from . import conf, doorbell
from .delivery import kept_engine, release_claims_of_the_dead
from .models import DeadLetter, Deduplication, LogEntry, Message


@shared_task(
    name="qstash_server.deliver",
    bind=True,
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
)
def deliver(self: Any) -> None:
    """Deliver all that is due."""
    if self.request.is_eager:
        # Inline: whoever rang waits for us, so nothing may wait for them.
        kept_engine().deliver_due()
        return
    if doorbell.somebody_listens():
        doorbell.ring()
        return
    wait = kept_engine().drain()
    if wait is not None and wait <= doorbell.FARTHEST_HINT:
        deliver.apply_async(countdown=max(wait, 0.1), retry=False)


@shared_task(
    name="qstash_server.sweep", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def sweep() -> None:
    """Every half minute, by beat: ring for what is due though no bell was heard, and clear out
    what is too old."""
    now = timezone.now()
    release_claims_of_the_dead(now)
    if Message.objects.is_anything_due(now) or Message.objects.in_line().exists():
        doorbell.ring()
    settings = conf.current()
    old_letters = DeadLetter.objects.filter(
        created_at__lt=now - timedelta(seconds=settings.dead_letter_retention)
    )
    while old_letters[:500].discard():
        pass
    Message.objects.purge(before=now - timedelta(seconds=max(60, settings.message_retention)))
    LogEntry.objects.purge(before=now - timedelta(seconds=settings.log_retention))
    Deduplication.objects.filter(expires_at__lte=now).delete()
