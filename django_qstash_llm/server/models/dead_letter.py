from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from django.db import models, transaction
from django.db.models.functions import Length

from ...qstash import Accepted
from ...qstash import DeadLetter as DeadLetterRecord
from ..exceptions import Refusal
from .chunks import in_chunks
from .message import Message
from .queue import milliseconds


class DeadLetterQuerySet(models.QuerySet["DeadLetter"]):
    def owned_by(self, account: str) -> DeadLetterQuerySet:
        return self.filter(message__account=account)

    def with_messages(self) -> DeadLetterQuerySet:
        return self.select_related("message__queue")

    def without_answers(self) -> DeadLetterQuerySet:
        """Those are large, and a retry needs none."""
        return self.defer("response_header", "response_body")

    def in_brief(self) -> DeadLetterQuerySet:
        """Of each no more than its place in the listing."""
        return self.only("created_at")

    def sized(self) -> DeadLetterQuerySet:
        """Each with its ``size``: the bytes of its two bodies."""
        size = Length("message__body") + Length("response_body")
        return self.annotate(size=size)  # type: ignore[no-redef]

    def called(self, dlq_ids: list[str]) -> DeadLetterQuerySet:
        """Those by these names. A name that is none selects nothing."""
        # The sequence is a primary key; the time before it is only there to be read.
        numbers = [dlq_id.rpartition("-")[2] for dlq_id in dlq_ids]
        known = [int(n) for n in numbers if n.isdecimal() and len(n) < 19]
        moments = self.filter(pk__in=known).values_list("pk", "created_at")
        wanted = set(dlq_ids)
        return self.filter(pk__in=[pk for pk, moment in moments if _dlq_id(pk, moment) in wanted])

    def discard(self) -> int:
        """Delete them. What they kept of the provider's key goes too. Answers how many there were."""
        with transaction.atomic():
            # The order by which everybody locks them.
            rows = self.order_by("pk").select_for_update(of=("self",))
            letters = dict(rows.values_list("pk", "message_id"))
            Message.objects.filter(pk__in=letters.values()).forget_secrets()
            return DeadLetter.objects.filter(pk__in=letters).delete()[0]

    def purge(self, *, before: datetime, chunk: int = 500) -> bool:
        """Delete what is older, a chunk at a time. Whether there may be more."""
        old = self.filter(created_at__lt=before).order_by("created_at")
        return in_chunks(old, chunk, lambda keys: DeadLetter.objects.filter(pk__in=keys).discard())


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

    size: int
    """Of one that was fetched ``sized``."""

    def __str__(self) -> str:
        return self.dlq_id

    @property
    def dlq_id(self) -> str:
        return _dlq_id(self.pk, self.created_at)

    def retry(self, overrides: Mapping[str, str], *, now: datetime) -> Accepted:
        """Publish it again under a new id, which is answered, and take it out of here. A duplicate
        of another message is not published, and stays.

        ``overrides`` are ``upstash-*`` headers in lower case that replace the original's.
        """
        with transaction.atomic():
            # First, and guarded: of two retries at the same time one finds nothing.
            if not DeadLetter.objects.filter(pk=self.pk).delete()[0]:
                raise Refusal(404, f"dead letter {self.dlq_id} not found")
            accepted = self.message.published_again(overrides, now=now)
            Message.objects.filter(pk=self.message.pk).forget_secrets()
            if accepted.is_duplicate:
                transaction.set_rollback(True)
        return accepted

    def to_record(self) -> DeadLetterRecord:
        return DeadLetterRecord(
            **self.message.record_fields(),
            dlq_id=self.dlq_id,
            response_status=self.response_status,
            response_header=self.response_header,
            response_body=bytes(self.response_body),
        )


def _dlq_id(pk: int, created_at: datetime) -> str:
    return f"{milliseconds(created_at)}-{pk}"
