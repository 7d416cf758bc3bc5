"""Celery's part: a bell to answer, and a sweep for beat.

Deliveries wait for slow destinations, so give them a worker of their own::

    CELERY_TASK_ROUTES = {"qstash_server.deliver": {"queue": "qstash"}}
    celery -A proj worker -Q qstash -P threads -c 2

Whatever the pool, one task per process keeps ``CONCURRENCY`` calls in flight.
"""

from __future__ import annotations

import threading
import time
from typing import Any
from weakref import WeakKeyDictionary

from celery import shared_task
from celery.signals import worker_shutdown, worker_shutting_down
from django.utils import timezone

from . import conf, doorbell, retention
from .delivery import Engine, engine_if_kept, kept_engine, release_claims_of_the_dead
from .models import Message, Schedule

YEAR = 365 * 86_400
LOOK_EVERY = 15.0
"""Seconds between two looks of a worker at what it should have been rung for."""
LONGEST_PURGE = 5.0
"""Seconds of a sweep: the next one goes on."""

_watches: WeakKeyDictionary[Engine, threading.Thread] = WeakKeyDictionary()


@shared_task(
    name="qstash_server.deliver",
    bind=True,
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
    # Over the site's own: it goes on for as long as there is work, and a call may take hours.
    time_limit=YEAR,
    soft_time_limit=YEAR,
)
def deliver(self: Any) -> None:
    """Deliver all that is due."""
    engine = kept_engine()
    if self.request.is_eager:
        # Inline: whoever rang waits for us, so nothing may wait for them.
        engine.deliver_due()
        return
    _keep_watch(engine)
    if doorbell.somebody_listens():
        doorbell.ring()
        _pass_on(engine)
        return
    wait = engine.drain()
    if wait is not None and (engine.is_stopped or wait <= doorbell.FARTHEST_HINT):
        deliver.apply_async(countdown=min(max(wait, 0.1), doorbell.FARTHEST_HINT), retry=False)


def _keep_watch(engine: Engine) -> None:
    """Who was rung for once goes on by itself: after a broker that came back, a worker may be deaf
    for good (celery#8030), and so may be all of them, with the sweep unheard in the broker too."""
    watch = threading.Thread(
        target=engine.watch, args=(LOOK_EVERY,), name="qstash-watch", daemon=True
    )
    if _watches.setdefault(engine, watch) is watch:
        watch.start()


def _pass_on(engine: Engine) -> None:
    """A worker that is full heard a bell that others could have answered. One goes round, a second
    apart, until somebody has room: each that is heard would be a crowd."""
    if engine.is_full and engine.is_time_for("passing on", every=1):
        deliver.apply_async(countdown=1, retry=False)


@worker_shutting_down.connect
def hand_over(**kwargs: Any) -> None:
    """A worker that is asked to end would wait for as long as there is work."""
    if engine := engine_if_kept():
        engine.stop()


@worker_shutdown.connect
def let_the_watch_end(**kwargs: Any) -> None:
    """What Celery does not know to be running would die with its calls in flight."""
    if (engine := engine_if_kept()) and (watch := _watches.get(engine)):
        watch.join(conf.current().grace + 5)


@shared_task(
    name="qstash_server.sweep", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def sweep() -> None:
    """Every ten seconds or so, by beat: fire the schedules whose time it is, ring for what is due
    though no bell was heard, and clear out what is too old."""
    now = timezone.now()
    release_claims_of_the_dead(now)
    Schedule.objects.fire_due(now=now)
    if Message.objects.is_anything_to_do(now):
        doorbell.ring()
        if engine := engine_if_kept():
            _pass_on(engine)
    end = time.monotonic() + LONGEST_PURGE
    while retention.purge(now) and time.monotonic() < end:
        # There is more than one go takes.
        continue
