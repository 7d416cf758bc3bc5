"""Cancellations: QStash is asked to try no more what no further try would help.

It repeats whatever is not answered 2xx: a wrong key or an unpaid bill as often as a rate limit. The
request has failed by then; what is left is to spare the provider, and the bill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from django.db import models
from django.db.models import F
from django.utils import timezone

from ..conf import app_settings, qstash_client
from ..qstash import Client, NotFound, QStashError
from .callback import CallbackResponse
from .reconciler import _is_outage
from .request import CLAIM_SECONDS

logger = logging.getLogger(__name__)

MOST_CANCEL_TRIES = 10
"""About three hours. QStash's own retries end by themselves."""


@dataclass
class Cancellations:
    """Cancels messages at QStash whose attempts told that they are not to be repeated."""

    using: str = "default"
    clock: Callable[[], datetime] = timezone.now

    @property
    def receipts(self) -> models.QuerySet[CallbackResponse]:
        return CallbackResponse.objects.using(self.using)

    @cached_property
    def client(self) -> Client:
        return qstash_client()

    def due(self) -> models.QuerySet[CallbackResponse]:
        return self.receipts.filter(cancel_after__lte=self.clock())

    def cancel(self, *, limit: int = 100) -> int:
        """Ask for up to ``limit`` of them; answers how many QStash answered for. It stops where
        QStash takes nothing from anybody."""
        keys = list(self.due().order_by("cancel_after", "id").values_list("pk", flat=True)[:limit])
        answered = 0
        for pk in keys:
            receipt = self.claim(pk)
            if receipt is None:
                continue
            try:
                self.client.cancel_message(receipt.source_message_id)
            except NotFound:
                pass  # it is gone already
            except QStashError as error:
                self.put_off(receipt, error)
                if _is_outage(error):
                    break
                continue
            self.receipts.filter(pk=pk).update(cancel_after=None)
            answered += 1
        return answered

    def claim(self, pk: int) -> CallbackResponse | None:
        """Ours until it is due again, should its worker die; None when it is another's."""
        until = self.clock() + timedelta(seconds=CLAIM_SECONDS)
        claimed = self.due().filter(pk=pk)
        if not claimed.update(cancel_after=until, cancel_tries=F("cancel_tries") + 1):
            return None
        return self.receipts.only("source_message_id", "uuid", "cancel_tries").filter(pk=pk).first()

    def put_off(self, receipt: CallbackResponse, error: QStashError) -> None:
        tries = receipt.cancel_tries
        again = self.clock() + timedelta(seconds=min(3600, 10 * 2**tries))
        is_over = tries >= MOST_CANCEL_TRIES
        self.receipts.filter(pk=receipt.pk).update(cancel_after=None if is_over else again)
        logger.warning(
            "QStash may try LLM request %s again: its message could not be cancelled (try %s of %s): %s",
            receipt.uuid,
            tries,
            MOST_CANCEL_TRIES,
            app_settings().without_secrets(str(error)),
        )
