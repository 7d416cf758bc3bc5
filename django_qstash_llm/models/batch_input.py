"""``BatchInput``: the file that a batch was asked by, how far it is read, and how the batch stands.

One that is not read to its end, or that is to be stopped, is work for ``intake``.
"""

from __future__ import annotations

import uuid as uuids
from datetime import datetime, timedelta
from typing import Any, Self

from django.db import models, transaction
from django.db.models import Count, Exists, F, Max, OuterRef, Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..exceptions import IllegalState
from .batch import Batch, standing
from .caller import Caller
from .doorbell import Bell, ring_on_commit
from .file import KEPT_FOR, File, Purpose
from .request import UNFINISHED, CallerKind, LLMRequest, State

WINDOW = timedelta(hours=24)
"""OpenAI's only completion window: what is not answered by its end is cancelled."""
ENDPOINT = "/v1/chat/completions"
_OVER = ("failed", "completed", "expired", "cancelled")


class BatchInputQuerySet(models.QuerySet["BatchInput"]):
    def of(self, caller: Caller) -> Self:
        """A caller's own."""
        owner = {"caller": caller.kind, "api_key": caller.api_key, "batch__user": caller.user}
        return self.select_related("batch").filter(**owner)

    def open(self) -> Self:
        return self.filter(ended_at=None, failed_at=None)

    def unread(self) -> Self:
        """There are lines in their files that are no requests yet."""
        return self.open().filter(Q(total=None) | Q(read__lt=F("total")))

    def due(self, now: datetime) -> Self:
        """To be read, to be stopped, or over without anybody having noticed."""
        unfinished = LLMRequest.objects.filter(batch=OuterRef("batch"), state__in=UNFINISHED)
        is_to_read = Q(total=None) | Q(read__lt=F("total"))
        is_to_stop = Q(cancelling_at__isnull=False) | Q(expired_at__isnull=False)
        return self.open().filter(
            is_to_read | is_to_stop | Q(expires_at__lte=now) | ~Exists(unfinished)
        )


class BatchInput(models.Model):
    batch = models.OneToOneField(
        Batch, on_delete=models.CASCADE, related_name="input", verbose_name=_("batch")
    )
    caller = models.CharField(_("caller"), max_length=16, choices=CallerKind)
    api_key = models.ForeignKey(
        "django_qstash_llm.ApiKey",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="batches",
        verbose_name=_("API key"),
    )
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)
    # No foreign keys: a batch names its files also when they are gone.
    file_uuid = models.UUIDField(_("file"))
    answers_uuid = models.UUIDField(_("file of answers"), null=True, blank=True)
    errors_uuid = models.UUIDField(_("file of errors"), null=True, blank=True)
    keep_seconds = models.PositiveIntegerField(null=True, blank=True)
    """How long those two are kept, where the caller says."""

    # how far it is read
    total = models.PositiveIntegerField(_("lines"), null=True, blank=True)
    """Requests in the file; None until all of it was found to be well-formed."""
    read = models.PositiveIntegerField(_("lines read"), default=0)
    """How many of them are rows."""
    errors = models.JSONField(_("errors"), default=list, blank=True)
    """What makes the file none of a batch: ``{code, message, param, line}`` each."""
    claim_token = models.UUIDField(null=True, blank=True, editable=False)
    claimed_until = models.DateTimeField(null=True, blank=True, editable=False)

    # when
    expires_at = models.DateTimeField(_("expires at"))
    in_progress_at = models.DateTimeField(_("in progress since"), null=True, blank=True)
    failed_at = models.DateTimeField(_("failed at"), null=True, blank=True)
    cancelling_at = models.DateTimeField(_("cancelled at"), null=True, blank=True)
    expired_at = models.DateTimeField(_("expired at"), null=True, blank=True)
    ended_at = models.DateTimeField(_("ended at"), null=True, blank=True)

    objects = BatchInputQuerySet.as_manager()

    class Meta:
        verbose_name = _("batch's file")
        verbose_name_plural = _("batches' files")
        indexes = (
            # Few among many, and looked for every few seconds.
            models.Index(
                fields=["id"],
                name="llm_batch_input_open",
                condition=Q(ended_at=None, failed_at=None),
            ),
        )

    def __str__(self) -> str:
        return f"{self.batch_id} · {self.status}"

    @property
    def status(self) -> str:
        """OpenAI's word for how the batch stands."""
        if self.failed_at:
            return "failed"
        if self.ended_at:
            how_it_ended = "expired" if self.expired_at else "completed"
            return "cancelled" if self.cancelling_at else how_it_ended
        if self.cancelling_at:
            return "cancelling"
        if self.expired_at:
            return "finalizing"
        return "in_progress" if self.in_progress_at else "validating"

    @property
    def is_over(self) -> bool:
        return self.status in _OVER

    @property
    def is_read(self) -> bool:
        return self.total is not None and self.read >= self.total

    @property
    def is_stopped(self) -> bool:
        """No more of it is asked."""
        return bool(self.cancelling_at or self.expired_at)

    @property
    def asker(self) -> Caller | None:
        """Whose batch it is; None when they are gone, or may ask no more."""
        kind = CallerKind(self.caller)
        if kind == CallerKind.KEY:
            if self.api_key is None or not self.api_key.is_usable(timezone.now()):
                return None
        elif kind == CallerKind.USER:
            user = self.batch.user
            if user is None or not getattr(user, "is_active", True):
                return None
        return Caller(kind=kind, user=self.batch.user, api_key=self.api_key)

    def cancel(self, *, now: datetime) -> None:
        """Ask no more of it, and cancel what is not answered: a worker does, in a moment.

        Raises ``IllegalState`` where it is over.
        """
        rows = self._rows().filter(ended_at=None, failed_at=None, cancelling_at=None)
        using = self._state.db or "default"
        with transaction.atomic(using=using):
            if rows.update(cancelling_at=now):
                ring_on_commit(Bell.BATCHES, using)
        self.refresh_from_db()
        if self.is_over and not self.cancelling_at:
            raise IllegalState(f"a batch that is {self.status} cannot be cancelled")

    def settle(self) -> None:
        """Where nothing of it is under way any more, say so, and have its files."""
        if self.is_over or not (self.is_read or self.is_stopped):
            return
        using = self._state.db or "default"
        rows = LLMRequest.objects.using(using).filter(batch=self.batch_id)
        if rows.unfinished().exists():
            return
        with transaction.atomic(using=using):
            # Locked: of two who notice one makes the files.
            locked = self._rows().select_for_update(of=("self",)).filter(ended_at=None).first()
            if locked is not None:
                locked._end(standing(rows))
        self.refresh_from_db()

    def _end(self, rows: models.QuerySet[LLMRequest]) -> None:
        told = rows.order_by().aggregate(
            last=Max("finished_at"),
            answered=Count("pk", filter=Q(state=State.COMPLETED)),
            all=Count("pk"),
        )
        self.ended_at = max(filter(None, (told["last"], self.cancelling_at, self.expired_at)))
        if told["answered"]:
            self.answers_uuid = self._file("output", holds_errors=False).uuid
        if told["all"] > told["answered"]:
            self.errors_uuid = self._file("errors", holds_errors=True).uuid
        self.save(update_fields=["ended_at", "answers_uuid", "errors_uuid"])

    def _file(self, ending: str, *, holds_errors: bool) -> File:
        kept_for = timedelta(seconds=self.keep_seconds) if self.keep_seconds else KEPT_FOR
        now = timezone.now()
        return File.objects.using(self._state.db).create(
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"batch_{self.batch.uuid.hex}_{ending}.jsonl",
            caller=self.caller,
            api_key=self.api_key,
            user=self.batch.user,
            batch=self.batch,
            holds_errors=holds_errors,
            created_at=now,
            expires_at=now + kept_for,
        )

    def _rows(self) -> BatchInputQuerySet:
        rows: Any = type(self).objects.using(self._state.db).filter(pk=self.pk)
        return rows  # type: ignore[no-any-return]


def begin(
    file: File,
    caller: Caller,
    *,
    uuid: uuids.UUID,
    metadata: dict[str, Any],
    keep_seconds: int | None,
    now: datetime,
) -> BatchInput:
    """A batch of the lines of ``file``, which a worker reads in a moment."""
    using = file._state.db or "default"
    with transaction.atomic(using=using):
        batch = Batch.objects.using(using).create(
            uuid=uuid, name=file.filename, user=caller.user, created_at=now
        )
        batch_input = BatchInput.objects.using(using).create(
            batch=batch,
            caller=caller.kind,
            api_key=caller.api_key,
            metadata=metadata,
            file_uuid=file.uuid,
            keep_seconds=keep_seconds,
            expires_at=now + WINDOW,
        )
        ring_on_commit(Bell.BATCHES, using)
    return batch_input
