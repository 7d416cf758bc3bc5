"""Bugs on purpose. ``SEEDED_BUG`` names one, and it replaces a method of the product when the
process begins. Each is one that somebody has shipped; the checker has to find every one of them.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from django.db import connection
from django.db.models import F
from django.utils import timezone

from django_qstash_llm import tasks, triggers
from django_qstash_llm.conf import AppSettings
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.outbox import Claimed, Outbox
from django_qstash_llm.models.reconciler import Reconciler
from django_qstash_llm.qstash import Claims, signing
from django_qstash_llm.qstash import callback as envelopes

Receipts: Any = type(CallbackResponse.objects.get_queryset())


def plant(name: str) -> None:
    BUGS[name]()


def no_unique() -> None:
    """No unique constraint: what came before is not seen."""
    receive = Receipts.receive

    def anew(self: Any, callback: Any, **told: Any) -> Any:
        with connection.cursor() as cursor:
            table = CallbackResponse._meta.db_table
            name = "callback_response_stored_once"
            cursor.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")
        earlier = self.filter(source_message_id=callback.source_message_id)
        keys = list(earlier.values_list("pk", flat=True))
        self.filter(pk__in=keys).update(source_message_id="looked away from")
        receipt = receive(self, callback, **told)
        self.filter(pk__in=keys).update(source_message_id=callback.source_message_id)
        return receipt

    Receipts.receive = anew


def early_submitted() -> None:
    """Submitted is written down before anybody has been asked."""
    hand_in = Outbox.hand_in

    def hand_in_early(self: Outbox, chunk: Any) -> None:
        rows = self.rows.filter(pk__in=[row.pk for row, _ in chunk])
        rows.update(state="submitted", submitted_at=timezone.now())
        hand_in(self, chunk)

    Outbox.hand_in = hand_in_early  # type: ignore[method-assign]


def no_claim_token() -> None:
    """Rows are ours because they were."""

    def claimed(self: Outbox, llm_requests: Any) -> Any:
        return self.rows.filter(pk__in=[row.pk for row in llm_requests])

    Outbox.claimed = claimed  # type: ignore[method-assign]


def leeway_times_ten() -> None:
    """Clocks may differ by five minutes."""
    verify_token = signing.verify_token

    def verify_generously(*args: Any, leeway: float, **told: Any) -> Claims:
        return verify_token(*args, leeway=leeway * 10, **told)

    signing.verify_token = verify_generously  # type: ignore[assignment]


def swallowed_errors() -> None:
    """Whatever happens to a callback, the answer is 200."""
    receive = Receipts.receive

    def receive_somehow(self: Any, callback: Any, **told: Any) -> Any:
        try:
            return receive(self, callback, **told)
        except Exception:
            return None

    Receipts.receive = receive_somehow


def cost_added_up() -> None:
    """Each callback with an answer adds its cost to what is there."""
    receive = Receipts.receive

    def receive_and_add(self: Any, callback: Any, *, uuid: Any, **told: Any) -> Any:
        row = LLMRequest.objects.filter(uuid=uuid, cost__isnull=False)
        was_paid = callback.is_success and row.exists()
        receipt = receive(self, callback, uuid=uuid, **told)
        if was_paid:
            row.update(cost=F("cost") + F("cost"))
        return receipt

    Receipts.receive = receive_and_add


def ack_before_commit() -> None:
    """Answered first and stored a moment later."""
    receive = Receipts.receive

    def receive_later(self: Any, callback: Any, **told: Any) -> None:
        def store() -> None:
            time.sleep(0.5)
            receive(self, callback, **told)

        threading.Thread(target=store).start()

    Receipts.receive = receive_later


def sweep_off() -> None:
    """Nobody looks for what no bell was heard for."""
    tasks.sweep.run = lambda *args, **told: None  # type: ignore[method-assign]


def never_asks() -> None:
    """A callback that does not come is waited for."""
    Reconciler.reconcile = lambda self, *args, **told: 0  # type: ignore[method-assign]


def body_reserialised() -> None:
    """What is verified is the body as this side would have written it."""
    check_body = Claims.check_body

    def check_rewritten(self: Claims, body: bytes) -> None:
        check_body(self, json.dumps(json.loads(body), separators=(",", ":")).encode())

    Claims.check_body = check_rewritten  # type: ignore[method-assign]


def lax_base64() -> None:
    """Characters that do not belong there are overlooked."""

    def read_base64(self: Any, name: str) -> bytes:
        return base64.b64decode(self.text(name))

    envelopes._Reader.base64 = read_base64  # type: ignore[method-assign]


def handler_outside() -> None:
    """The handler runs by itself, and the mark that it ran follows."""

    def announce_one(using: str, pk: int, clock: Any) -> bool:
        rows = LLMRequest.objects.using(using).filter(pk=pk)
        try:
            triggers._tell(rows.get(), using)
            rows.update(announced_at=timezone.now())
        except Exception:
            rows.update(announce_tries=F("announce_tries") + 1)
        return True

    def instance_of(trigger: Any, llm_request: Any, using: str) -> Any:
        return trigger.watched._base_manager.filter(pk=llm_request.object_id).first()

    triggers._announce_one = announce_one
    triggers._locked_instance = instance_of


def failure_wins() -> None:
    """Whatever a request has become, a failure that is told of it fails it."""
    receive = Receipts.receive

    def receive_and_fail(self: Any, callback: Any, *, uuid: Any, **told: Any) -> Any:
        receipt = receive(self, callback, uuid=uuid, **told)
        if callback.is_last and not callback.is_success:
            LLMRequest.objects.filter(uuid=uuid).update(state="failed")
        return receipt

    Receipts.receive = receive_and_fail


def keys_kept() -> None:
    """What others say is stored as they said it, the key that they repeat included."""
    AppSettings.without_secrets = lambda self, text, limit=None: text[:limit]  # type: ignore[method-assign]


def new_deduplication_id() -> None:
    """Every try of one submission is a new one to QStash."""
    Claimed.deduplication_id = property(lambda row: f"{row.uuid}-{uuid4()}")  # type: ignore[assignment]


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (
        no_unique,
        early_submitted,
        no_claim_token,
        leeway_times_ten,
        swallowed_errors,
        cost_added_up,
        ack_before_commit,
        sweep_off,
        never_asks,
        body_reserialised,
        lax_base64,
        handler_outside,
        failure_wins,
        keys_kept,
        new_deduplication_id,
    )
}
