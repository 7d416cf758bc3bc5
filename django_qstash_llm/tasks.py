"""Celery: a few lines over a verb each. No task carries work, only the news that there is some.

All of them may run twice, at any time, in any number; a worker that is killed gives its bell back.
For a beat schedule there is ``sweep``.
"""

from __future__ import annotations

import logging

from celery import shared_task
from kombu.exceptions import OperationalError

from . import triggers
from .models.doorbell import Bell
from .models.outbox import Outbox

logger = logging.getLogger(__name__)

# Once more for a kept connection that went stale. Given retry=False, kombu would still try to
# connect for 6 seconds, and it is a web request that waits.
_AT_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


@shared_task(
    name="django_qstash_llm.submit", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def submit(using: str = "default") -> None:
    """Submit what is pending."""
    outbox = Outbox(using)
    if outbox.submit() and outbox.due().exists():
        ring(Bell.SUBMIT, using)


@shared_task(
    name="django_qstash_llm.announce",
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
)
def announce(using: str = "default") -> None:
    """Tell triggers and signals what is finished."""
    if triggers.announce(using) and triggers.unannounced(using).exists():
        ring(Bell.ANNOUNCE, using)


@shared_task(
    name="django_qstash_llm.sweep", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def sweep(using: str = "default") -> None:
    """Ring again for whatever still waits: after a lost bell, a dead worker, ``bulk_create``."""
    if Outbox(using).due().exists():
        ring(Bell.SUBMIT, using)
    if triggers.unannounced(using).exists():
        ring(Bell.ANNOUNCE, using)


def ring(bell: Bell, using: str) -> None:
    """Wake a worker. A broker that is down costs time, not work: the sweep rings again."""
    task = {Bell.SUBMIT: submit, Bell.ANNOUNCE: announce}[bell]
    try:
        task.apply_async(args=(using,), retry=True, retry_policy=_AT_ONCE)
    except (OperationalError, OSError) as error:
        logger.warning("No broker to ring %r; the next sweep will: %s", bell.value, error)
