"""Celery: a few lines over a verb each. No task carries work, only the news that there is some.

All of them may run twice, at any time, in any number; a worker that is killed gives its bell back.
For a beat schedule there is ``sweep``.
"""

from __future__ import annotations

import logging

from celery import shared_task
from django.db import DatabaseError, router
from django.utils import timezone
from kombu.exceptions import OperationalError

from . import alerting, triggers
from .models import CallbackResponse, File, KeptAnswer, Lane, LLMRequest
from .models.alert import Alert
from .models.cancellation import Cancellations
from .models.doorbell import Bell
from .models.intake import Intake
from .models.message_count import count_messages
from .models.outbox import Outbox
from .models.purge import Purge
from .models.reconciler import Reconciler
from .models.settlement import settle

logger = logging.getLogger(__name__)

# Once more for a kept connection that went stale. Given retry=False, kombu would still try to
# connect for 6 seconds, and it is a web request that waits.
_AT_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


def _ours() -> str:
    """The database that our rows are in: a router may have put them into one of their own."""
    return router.db_for_write(LLMRequest)


@shared_task(
    name="django_qstash_llm.submit", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def submit(using: str = "") -> None:
    """Submit what is pending."""
    using = using or _ours()
    outbox = Outbox(using)
    if outbox.submit() and outbox.due().exists():
        ring(Bell.SUBMIT, using)


@shared_task(
    name="django_qstash_llm.announce",
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
)
def announce(using: str = "") -> None:
    """Tell triggers and signals which attempts were made, and what is finished."""
    using = using or _ours()
    told = triggers.announce_attempts(using) + triggers.announce(using)
    if told and _is_anything_unannounced(using):
        ring(Bell.ANNOUNCE, using)


def _is_anything_unannounced(using: str) -> bool:
    return triggers.unannounced_attempts(using).exists() or triggers.unannounced(using).exists()


@shared_task(
    name="django_qstash_llm.cancel", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def cancel(using: str = "") -> None:
    """Have QStash try no more what no try would help."""
    using = using or _ours()
    cancellations = Cancellations(using)
    # What QStash did not answer for is left to the next sweep.
    if cancellations.cancel() and cancellations.due().exists():
        ring(Bell.CANCEL, using)


@shared_task(
    name="django_qstash_llm.apply", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def apply(using: str = "") -> None:
    """Read again what was stored and could not be read."""
    using = using or _ours()
    receipts = CallbackResponse.objects.using(using)
    if receipts.apply_due(now=timezone.now()) and receipts.unapplied(timezone.now()).exists():
        ring(Bell.APPLY, using)


@shared_task(
    name="django_qstash_llm.reconcile",
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
)
def reconcile(using: str = "") -> None:
    """Ask QStash about what is overdue."""
    using = using or _ours()
    reconciler = Reconciler(using)
    # What cannot be asked about now is left to the next sweep.
    if reconciler.reconcile() and not reconciler.problem and reconciler.due().exists():
        ring(Bell.RECONCILE, using)


@shared_task(
    name="django_qstash_llm.lanes", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def lanes(using: str = "") -> None:
    """End pauses that are over, and tell QStash what to hold and what to let go."""
    using = using or _ours()
    rows = Lane.objects.using(using)
    if rows.see_to() and rows.due(timezone.now()).exists():
        ring(Bell.LANES, using)


@shared_task(
    name="django_qstash_llm.batches",
    ignore_result=True,
    acks_late=True,
    reject_on_worker_lost=True,
)
def batches(using: str = "") -> None:
    """Read the files of batches, and stop those that are to be."""
    using = using or _ours()
    intake = Intake(using)
    # What QStash could not be told of is left to the next sweep.
    if intake.run() and intake.due().exists():
        ring(Bell.BATCHES, using)


@shared_task(
    name="django_qstash_llm.alert", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def alert(using: str = "") -> None:
    """Tell which thresholds of budgets are reached."""
    alerting.alert(using or _ours())


@shared_task(
    name="django_qstash_llm.sweep", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def sweep(using: str = "") -> None:
    """Ring again for whatever still waits: after a lost bell, a dead worker, ``bulk_create``, a
    callback that never came."""
    using = using or _ours()
    if Lane.objects.using(using).due(timezone.now()).exists():
        ring(Bell.LANES, using)
    if Intake(using).due().exists():
        ring(Bell.BATCHES, using)
    if Outbox(using).due().exists():
        ring(Bell.SUBMIT, using)
    if CallbackResponse.objects.using(using).unapplied(timezone.now()).exists():
        ring(Bell.APPLY, using)
    if Reconciler(using).due().exists():
        ring(Bell.RECONCILE, using)
    if Cancellations(using).due().exists():
        ring(Bell.CANCEL, using)
    if _is_anything_unannounced(using):
        ring(Bell.ANNOUNCE, using)
    try:
        settle(using)
    except DatabaseError:
        # It is tried again by the next; the rest of this one does not wait for that.
        logger.exception("What was answered could not be settled")
    count_messages(using)
    if Alert.objects.using(using).untold().exists():
        ring(Bell.ALERT, using)
    KeptAnswer.objects.using(using).expired(timezone.now()).delete()
    File.objects.using(using).expired(timezone.now()).delete()


_TASKS = {
    Bell.SUBMIT: submit,
    Bell.ANNOUNCE: announce,
    Bell.CANCEL: cancel,
    Bell.APPLY: apply,
    Bell.RECONCILE: reconcile,
    Bell.BATCHES: batches,
    Bell.LANES: lanes,
    Bell.ALERT: alert,
}


@shared_task(
    name="django_qstash_llm.purge", ignore_result=True, acks_late=True, reject_on_worker_lost=True
)
def purge(using: str = "") -> None:
    """Forget what is too old. Once a day is enough."""
    using = using or _ours()
    done = Purge(using).run()
    if done.problem:
        logger.warning("QStash's dead letters could not all be deleted: %s", done.problem)


def ring(bell: Bell, using: str) -> None:
    """Wake a worker. A broker that is down costs time, not work: the sweep rings again."""
    try:
        _TASKS[bell].apply_async(args=(using,), retry=True, retry_policy=_AT_ONCE)
    except (OperationalError, OSError) as error:
        logger.warning("No broker to ring %r; the next sweep will: %s", bell.value, error)
