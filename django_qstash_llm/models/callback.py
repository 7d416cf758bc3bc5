"""``CallbackResponse``: the stored receipt of what QStash told us, and what it does to its request.

Receipt first, interpretation after: the row is evidence and survives the failure to read it.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import models, transaction
from django.db.models import F
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_json, clean_text
from ..completions import Usage, decompress, read_completion, read_error
from ..conf import app_settings
from ..exceptions import UnreadableCompletion
from ..pricing import Cost, cost_of
from ..qstash import Callback
from .doorbell import Bell, ring_on_commit
from .request import LLMRequest

# What a response header may carry that is nobody's business.
_DROPPED_HEADERS = {"set-cookie", "authorization", "proxy-authorization", "x-api-key", "cookie"}

# One less than the column takes: attempts are one more than retries.
_MOST_RETRIED = 2**31 - 2


class Kind(models.TextChoices):
    CALLBACK = "callback", _("callback")
    FAILURE_CALLBACK = "failure_callback", _("failure callback")
    QUARANTINED = "quarantined", _("quarantined")


class CallbackResponseQuerySet(models.QuerySet["CallbackResponse"]):
    def quarantined(self) -> models.QuerySet[CallbackResponse]:
        """Signed by QStash, and unusable all the same."""
        return self.filter(kind=Kind.QUARANTINED)

    def orphaned(self) -> models.QuerySet[CallbackResponse]:
        """Signed by QStash, for a request that is not here (any more)."""
        return self.filter(llm_request=None)

    def receive(
        self,
        callback: Callback,
        *,
        uuid: UUID,
        message_id: str = "",
        key_index: int = 0,
        now: datetime,
    ) -> CallbackResponse:
        """Store ``callback``, told about the request ``uuid``, and let it take effect once.

        The same one again only counts ``seen_count``. Everything happens in one transaction.
        """
        self._for_write = True  # for self.db: not the replica that reads would go to
        callback = replace(callback, body=_plain(callback.body))
        with transaction.atomic(using=self.db):
            # Locking the request puts the callbacks of one request in a row.
            requests = LLMRequest.objects.using(self.db).select_for_update(of=("self",))
            llm_request = requests.filter(uuid=uuid).first()
            receipt, is_new = self.get_or_create(
                source_message_id=clean_text(callback.source_message_id, limit=255),
                retried=min(callback.retried, _MOST_RETRIED),
                kind=Kind.FAILURE_CALLBACK if callback.is_failure_callback else Kind.CALLBACK,
                defaults={
                    "uuid": uuid,
                    "llm_request": llm_request,
                    "callback_message_id": clean_text(message_id, limit=255),
                    "received_at": now,
                    "verified_by_next_key": key_index == 1,
                    **_kept_fields(callback),
                },
            )
            if not is_new:
                self.filter(pk=receipt.pk).update(seen_count=F("seen_count") + 1)
            elif llm_request is not None:
                receipt.take_effect(llm_request, callback)
        return receipt

    def quarantine(self, envelope: bytes, *, uuid: UUID, problem: str, now: datetime) -> None:
        """Keep a signed envelope that cannot be read, once, for a person to look at."""
        self._for_write = True
        digest = hashlib.sha256(envelope).hexdigest()
        with transaction.atomic(using=self.db):
            receipt, is_new = self.get_or_create(
                source_message_id=f"sha256:{digest}",
                retried=0,
                kind=Kind.QUARANTINED,
                defaults={
                    "uuid": uuid,
                    "llm_request": LLMRequest.objects.using(self.db).filter(uuid=uuid).first(),
                    "received_at": now,
                    "body": _plain(envelope)[: app_settings().max_stored_body_bytes],
                    "problem": clean_text(problem, limit=2000),
                },
            )
            if not is_new:
                self.filter(pk=receipt.pk).update(seen_count=F("seen_count") + 1)


class CallbackResponse(models.Model):
    """One thing QStash told us about one request."""

    uuid = models.UUIDField(_("request uuid"), editable=False, db_index=True)
    """From the callback's URL, and so signed."""
    llm_request = models.ForeignKey(
        LLMRequest,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="callback_responses",
        verbose_name=_("LLM request"),
    )
    kind = models.CharField(_("kind"), max_length=16, choices=Kind)
    source_message_id = models.CharField(_("QStash message id"), max_length=255)
    callback_message_id = models.CharField(
        _("callback's own message id"), max_length=255, blank=True
    )
    retried = models.PositiveIntegerField(_("retried"), default=0)
    max_retries = models.PositiveIntegerField(_("max retries"), default=0)
    status = models.SmallIntegerField(_("status"), default=-1, help_text=_("-1 is no response."))
    header = models.JSONField(_("response header"), default=dict, blank=True)
    body = models.BinaryField(_("response body"), default=b"", blank=True)
    is_body_cut = models.BooleanField(_("body cut"), default=False)
    dead_letter_id = models.CharField(_("dead letter"), max_length=255, blank=True)
    problem = models.TextField(_("problem"), blank=True)
    seen_count = models.PositiveIntegerField(_("seen"), default=1)
    verified_by_next_key = models.BooleanField(_("verified by next key"), default=False)
    received_at = models.DateTimeField(_("received at"), default=timezone.now)

    objects = CallbackResponseQuerySet.as_manager()

    class Meta:
        verbose_name = _("callback response")
        verbose_name_plural = _("callback responses")
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=["source_message_id", "retried", "kind"],
                name="callback_response_stored_once",
            ),
        )

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.status} · {self.source_message_id}"

    @property
    def attempt(self) -> int:
        """1 is the first attempt."""
        return self.retried + 1

    def take_effect(self, llm_request: LLMRequest, callback: Callback) -> None:
        """What this callback means for its request. Any order of callbacks has the same end."""
        llm_request.note_attempt(self)
        if callback.is_success:
            has_changed = self._complete(llm_request, callback)
        elif callback.is_last:
            has_changed = self._fail(llm_request, callback)
        else:
            has_changed = False
            if self.attempt == llm_request.attempts:  # the latest known: any order ends the same
                llm_request.note_problem(self._words(callback))
        if has_changed:
            ring_on_commit(Bell.ANNOUNCE, self._state.db or "default")

    def _complete(self, llm_request: LLMRequest, callback: Callback) -> bool:
        try:
            completion = read_completion(callback.body)
        except UnreadableCompletion as error:
            problem = "; ".join(filter(None, (self.problem, str(error))))
            type(self).objects.using(self._state.db).filter(pk=self.pk).update(problem=problem)
            has_failed = llm_request.fail(error.code, str(error), now=self.received_at)
            if error.usage:
                llm_request.note_spending(error.usage, self._cost(llm_request, error.usage))
            return has_failed
        cost = self._cost(llm_request, completion.usage, completion.model, completion.service_tier)
        if llm_request.complete(completion, cost, now=self.received_at):
            return True
        # Cancelled in the meantime: nobody reads the answer, and it has to be paid for.
        llm_request.note_spending(completion.usage, cost)
        return False

    def _cost(
        self, llm_request: LLMRequest, usage: Usage, answered_by: str = "", tier: str = ""
    ) -> Cost | None:
        return cost_of(
            llm_request.provider,
            llm_request.model,
            usage,
            at=self.received_at,
            answered_by=answered_by,
            service_tier=tier,
        )

    def _fail(self, llm_request: LLMRequest, callback: Callback) -> bool:
        if callback.dlq_id:
            llm_request.note_dead_letter(self.dead_letter_id)
        code = "no_response" if callback.status < 0 else read_error(callback.body)[0]
        code = code or f"http_{callback.status}"
        return llm_request.fail(code, self._words(callback), now=self.received_at)

    def _words(self, callback: Callback) -> str:
        """What the provider said, and when."""
        message = read_error(callback.body)[1]
        if not message and callback.status < 0:
            message = "the provider did not answer"
        attempts = f"after {self.attempt} attempt{'s' * (self.attempt > 1)}"
        return f"{message or f'the provider answered {callback.status}'} ({attempts})"


def _kept_fields(callback: Callback) -> dict[str, Any]:
    """What is kept of a callback. ``source_header`` carries the provider's key and is not."""
    conf = app_settings()
    limit = conf.max_stored_body_bytes
    header = {
        conf.without_secrets(name): [conf.without_secrets(value) for value in values]
        for name, values in callback.header.items()
        if name.lower() not in _DROPPED_HEADERS
    }
    return {
        "status": callback.status,
        "max_retries": min(callback.max_retries, _MOST_RETRIED),
        "header": clean_json(header),
        "body": callback.body[:limit],
        "is_body_cut": len(callback.body) > limit,
        "dead_letter_id": clean_text(callback.dlq_id, limit=255),
        "problem": clean_text("; ".join(callback.notes)),
    }


def _plain(content: bytes) -> bytes:
    """``content`` unpacked where it is gzip, and without our keys, which some send back."""
    with suppress(UnreadableCompletion):
        content = decompress(content)
    # Latin-1 is the one encoding in which every byte is a character, and our keys are ASCII.
    return app_settings().without_secrets(content.decode("latin-1")).encode("latin-1")
