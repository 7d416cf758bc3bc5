from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import models

from ...qstash import LogEntry as LogRecord
from .. import redaction
from .chunks import in_chunks
from .insertion import insert_values
from .queue import milliseconds

if TYPE_CHECKING:
    from .ending import Outcome
    from .message import Message

LARGEST_RESPONSE = 16 * 1024
"""Bytes of a failed attempt's response that its log entry keeps."""


class Told(NamedTuple):
    """An entry that is not written down yet."""

    message: Message
    time: datetime
    state: str
    error: str = ""
    next_delivery_at: datetime | None = None
    response_status: int | None = None
    response: Outcome | None = None
    """What a failed attempt was answered."""


_COLUMNS = ("message", "time", "state", "error", "next_delivery_at", "response_status")


class LogEntryQuerySet(models.QuerySet["LogEntry"]):
    def owned_by(self, account: str) -> LogEntryQuerySet:
        return self.filter(message__account=account)

    def with_messages(self) -> LogEntryQuerySet:
        return self.select_related("message__queue", "response").defer("message__body")

    def tell(self, *told: Told) -> None:
        """Write these down, in their order."""
        if any(each.response for each in told):
            self._tell_with_responses(told)
        elif told:
            fields = [LogEntry._meta.get_field(name) for name in _COLUMNS]
            rows = [(each.message.pk, *each[1:-1]) for each in told]
            insert_values(LogEntry, fields, rows)  # type: ignore[arg-type]

    def _tell_with_responses(self, told: Sequence[Told]) -> None:
        entries = [
            LogEntry(
                message=each.message,
                time=each.time,
                state=each.state,
                error=each.error,
                next_delivery_at=each.next_delivery_at,
                response_status=each.response_status,
            )
            for each in told
        ]
        self.bulk_create(entries, batch_size=200)
        Response.objects.bulk_create(
            [
                Response(
                    entry=entry,
                    header=redaction.without_secrets(each.response.header),
                    body=each.response.body[:LARGEST_RESPONSE],
                )
                for entry, each in zip(entries, told, strict=True)
                if each.response is not None
            ],
            batch_size=200,
        )

    def purge(self, *, before: datetime, chunk: int = 1000) -> bool:
        """Delete what is older, a chunk at a time. Whether there may be more."""
        old = self.filter(time__lt=before).order_by("time")
        return in_chunks(old, chunk, lambda keys: LogEntry.objects.filter(pk__in=keys).delete())


class LogEntry(models.Model):
    """One change of a message's state. What does not change is the message's to tell."""

    class State(models.TextChoices):
        CREATED = "CREATED"
        ACTIVE = "ACTIVE"
        RETRY = "RETRY"
        ERROR = "ERROR"
        DELIVERED = "DELIVERED"
        FAILED = "FAILED"
        CANCEL_REQUESTED = "CANCEL_REQUESTED"
        # One L: the official Python client knows no other spelling.
        CANCELED = "CANCELED"

    message = models.ForeignKey("Message", models.CASCADE, related_name="log")
    time = models.DateTimeField(db_index=True)
    state = models.CharField(max_length=20, choices=State.choices)
    error = models.TextField(blank=True)
    next_delivery_at = models.DateTimeField(null=True, blank=True)
    response_status = models.IntegerField(null=True, blank=True)

    objects = LogEntryQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "log entries"

    def __str__(self) -> str:
        return f"{self.message} {self.state}"

    @staticmethod
    def of(
        message: Message,
        state: LogEntry.State,
        *,
        now: datetime,
        outcome: Outcome | None = None,
        next_delivery_at: datetime | None = None,
    ) -> Told:
        # A message that waits in line may be claimed by an engine that looked at its clock before
        # the message was there.
        time = max(now, message.created_at)
        if outcome is None:
            return Told(message, time, state, next_delivery_at=next_delivery_at)
        # A success is told by its callback; here it would only be a second copy of it.
        is_worth_keeping = not outcome.is_success and bool(outcome.header or outcome.body)
        return Told(
            message,
            time,
            state,
            outcome.error,
            next_delivery_at,
            outcome.status,
            outcome if is_worth_keeping else None,
        )

    @property
    def response_header(self) -> Mapping[str, list[str]]:
        header: dict[str, list[str]] = self.response.header if hasattr(self, "response") else {}
        return header

    @property
    def response_body(self) -> bytes:
        return bytes(self.response.body) if hasattr(self, "response") else b""

    def to_record(self) -> LogRecord:
        next_delivery = milliseconds(self.next_delivery_at) if self.next_delivery_at else None
        told: dict[str, Any] = self.message.log_fields
        return LogRecord(
            time=milliseconds(self.time),
            state=self.state,
            error=self.error,
            next_delivery_time=next_delivery,
            response_status=self.response_status,
            response_header=self.response_header,
            response_body=self.response_body,
            **told,
        )


class Response(models.Model):
    """What a failed attempt was answered, in a table of its own: most attempts do not fail."""

    entry = models.OneToOneField(LogEntry, models.CASCADE, primary_key=True)
    header = models.JSONField(default=dict, blank=True)
    body = models.BinaryField(default=b"", blank=True)

    def __str__(self) -> str:
        return f"response to {self.entry}"
