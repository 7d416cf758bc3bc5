from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import models

from ...qstash import LogEntry as LogRecord
from .. import redaction
from .queue import milliseconds

if TYPE_CHECKING:
    from .message import Message, Outcome

LARGEST_RESPONSE = 16 * 1024
"""Bytes of a failed attempt's response that its log entry keeps."""


class LogEntryQuerySet(models.QuerySet["LogEntry"]):
    def tell(self, *entries: LogEntry) -> None:
        self.bulk_create(entries, batch_size=500)

    def purge(self, *, before: datetime, chunk: int = 1000) -> None:
        """Delete what is older, a chunk at a time, so that nobody waits for long."""
        old = self.filter(time__lt=before).order_by("time").values_list("pk", flat=True)
        while keys := list(old[:chunk]):
            LogEntry.objects.filter(pk__in=keys).delete()


class LogEntry(models.Model):
    """One change of a message's state. Outlives the message; knows neither its keys nor its body."""

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

    time = models.DateTimeField(db_index=True)
    message_id = models.CharField(max_length=64, db_index=True)
    state = models.CharField(max_length=20, choices=State.choices)
    url = models.TextField()
    queue_name = models.CharField(max_length=256, blank=True)
    labels = models.TextField(blank=True)
    flow_control_key = models.CharField(max_length=256, blank=True)
    caller_ip = models.CharField(max_length=64, blank=True)
    error = models.TextField(blank=True)
    next_delivery_at = models.DateTimeField(null=True, blank=True)
    response_status = models.IntegerField(null=True, blank=True)
    response_header = models.JSONField(default=dict, blank=True)
    response_body = models.BinaryField(default=b"", blank=True)
    details = models.JSONField(default=dict, blank=True)
    """What else QStash tells: method, header, callbacks, retries."""

    objects = LogEntryQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "log entries"

    def __str__(self) -> str:
        return f"{self.message_id} {self.state}"

    @classmethod
    def of(
        cls,
        message: Message,
        state: LogEntry.State,
        *,
        now: datetime,
        outcome: Outcome | None = None,
        next_delivery_at: datetime | None = None,
    ) -> LogEntry:
        entry = cls(
            time=now,
            message_id=message.message_id,
            state=state,
            url=message.url,
            queue_name=message.queue_name,
            labels=message.labels,
            flow_control_key=message.flow_control_key,
            caller_ip=message.caller_ip,
            next_delivery_at=next_delivery_at,
            details=message.log_details(),
        )
        if outcome is not None:
            entry.error = outcome.error
            entry.response_status = outcome.status
            entry.response_header = redaction.without_secrets(outcome.header)
            # A success is told by its callback; here it would only be a second copy of it.
            entry.response_body = b"" if outcome.is_success else outcome.body[:LARGEST_RESPONSE]
        return entry

    def to_record(self) -> LogRecord:
        details: dict[str, Any] = dict(self.details)
        next_delivery = milliseconds(self.next_delivery_at) if self.next_delivery_at else None
        return LogRecord(
            time=milliseconds(self.time),
            message_id=self.message_id,
            state=self.state,
            url=self.url,
            error=self.error,
            next_delivery_time=next_delivery,
            response_status=self.response_status,
            response_header=self.response_header,
            response_body=bytes(self.response_body),
            queue_name=self.queue_name,
            labels=tuple(self.labels.split(",")) if self.labels else (),
            flow_control_key=self.flow_control_key,
            **details,
        )
