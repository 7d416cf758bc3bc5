from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta

from django.db import models

from ...qstash import Message as WireMessage
from .chunks import in_chunks

WINDOW = timedelta(minutes=10)


class DeduplicationQuerySet(models.QuerySet["Deduplication"]):
    def claim(self, wanted: Mapping[str, str], *, now: datetime) -> dict[str, str]:
        """For each key -> message id, whose message id it is now: the one given, or the first's.

        Call it in the transaction that inserts the messages. The keys go in sorted, so that two
        batches with the same keys wait for each other instead of locking each other out.
        """
        if not wanted:
            return {}
        rows = [
            Deduplication(key=key, message_id=wanted[key], expires_at=now + WINDOW)
            for key in sorted(wanted)
        ]
        self.bulk_create(rows, ignore_conflicts=True)
        holders = dict(self.filter(key__in=wanted).values_list("key", "message_id"))
        expired = self.filter(key__in=wanted, expires_at__lte=now).order_by("key")
        for row in expired:
            holders[row.key] = self._take_over(row, wanted[row.key], now)
        return holders

    def _take_over(self, row: Deduplication, message_id: str, now: datetime) -> str:
        is_mine = self.filter(key=row.key, message_id=row.message_id).update(
            message_id=message_id, expires_at=now + WINDOW
        )
        if is_mine:
            return message_id
        # Somebody else's now, or, if it was cleared out this very moment, nobody's.
        return self.claim({row.key: message_id}, now=now)[row.key]

    def purge(self, *, now: datetime, chunk: int = 1000) -> bool:
        """Delete those whose window is closed, a chunk at a time. Whether there may be more."""
        closed = self.filter(expires_at__lte=now)
        # Asked again: one may have been taken over since.
        return in_chunks(
            closed.order_by("expires_at"), chunk, lambda keys: closed.filter(pk__in=keys).delete()
        )


class Deduplication(models.Model):
    """Which message an id, or a content, stands for until its window closes."""

    key = models.CharField(max_length=64, primary_key=True)
    message_id = models.CharField(max_length=64)
    expires_at = models.DateTimeField(db_index=True)

    objects = DeduplicationQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.key[:12]} is {self.message_id}"


def key_of(message: WireMessage, account: str, topic: str = "") -> str:
    """What makes two messages the same, or ``""`` when nothing shall. The explicit id wins.

    The endpoints of a URL group share an id and are yet told apart.
    """
    endpoint = [topic, message.destination] if topic else []
    if message.deduplication_id:
        return _digest("id", account, *endpoint, message.deduplication_id)
    if not message.options.content_based_deduplication:
        return ""
    headers = sorted(message.options.headers.items())
    parts = [message.destination, message.options.content_type, *map(":".join, headers)]
    return _digest("content", account, *parts, message.body)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        # With its length, or ("a", "bc") would be ("ab", "c").
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
