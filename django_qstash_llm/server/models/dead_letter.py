from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from django.db import models, transaction

from ...qstash import DeadLetter as DeadLetterRecord
from ..exceptions import Refusal
from .message import Message
from .queue import milliseconds


class DeadLetterQuerySet(models.QuerySet["DeadLetter"]):
    def with_messages(self) -> DeadLetterQuerySet:
        return self.select_related("message__queue")

    def called(self, dlq_ids: list[str]) -> DeadLetterQuerySet:
        """Those by these names. A name that is none selects nothing."""
        # The sequence is a primary key; the time before it is only there to be read.
        numbers = [dlq_id.rpartition("-")[2] for dlq_id in dlq_ids]
        rows = self.filter(pk__in=[int(n) for n in numbers if n.isdecimal() and len(n) < 19])
        wanted = set(dlq_ids)
        return self.filter(pk__in=[row.pk for row in rows if row.dlq_id in wanted])

    def discard(self) -> int:
        """Delete them. What they kept of the provider's key goes too. Answers how many there were."""
        with transaction.atomic():
            letters = list(self.select_for_update(of=("self",)).select_related("message"))
            for letter in letters:
                letter.message.forget_secrets()
            return DeadLetter.objects.filter(pk__in=[letter.pk for letter in letters]).delete()[0]


class DeadLetter(models.Model):
    """A message that was given up on, with the last answer it got. Its row keeps what a retry
    needs, the provider's key included, until it is retried, deleted or too old."""

    message = models.OneToOneField(Message, models.CASCADE, related_name="dead_letter")
    created_at = models.DateTimeField(db_index=True)
    response_status = models.IntegerField(default=-1)
    response_header = models.JSONField(default=dict, blank=True)
    response_body = models.BinaryField(default=b"", blank=True)
    error = models.TextField(blank=True)

    objects = DeadLetterQuerySet.as_manager()

    def __str__(self) -> str:
        return self.dlq_id

    @property
    def dlq_id(self) -> str:
        return f"{milliseconds(self.created_at)}-{self.pk}"

    def retry(self, overrides: Mapping[str, str], *, now: datetime) -> str:
        """Publish it again under a new id, which is answered, and take it out of here.

        ``overrides`` are ``upstash-*`` headers in lower case that replace the original's.
        """
        with transaction.atomic():
            # First, and guarded: of two retries at the same time one finds nothing.
            if not DeadLetter.objects.filter(pk=self.pk).delete()[0]:
                raise Refusal(404, f"dead letter {self.dlq_id} not found")
            message = self.message.published_again(overrides, now=now)
            self.message.forget_secrets()
        return message.message_id

    def to_record(self) -> DeadLetterRecord:
        return DeadLetterRecord(
            **self.message.record_fields(),
            dlq_id=self.dlq_id,
            response_status=self.response_status,
            response_header=self.response_header,
            response_body=bytes(self.response_body),
        )
