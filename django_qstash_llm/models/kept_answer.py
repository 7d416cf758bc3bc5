"""``KeptAnswer``: what a caller of the OpenAI-compatible endpoint is told again.

One who sends an ``Idempotency-Key`` and has lost the answer may ask once more, and is not made to
pay once more.
"""

from __future__ import annotations

import hashlib
import json
import uuid as uuids
from datetime import datetime, timedelta
from typing import Any, Self

from django.db import models, transaction
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_text
from ..conf import app_settings

KEPT_FOR = timedelta(hours=24)
LEASE = timedelta(seconds=60)
"""How long a claim holds that nothing came of: its process has died before it wrote the call down."""


class KeptAnswerQuerySet(models.QuerySet["KeptAnswer"]):
    def claim(
        self, *, caller: str, key: str, asked: Any, uuid: uuids.UUID, now: datetime
    ) -> tuple[KeptAnswer, bool]:
        """The row of this caller's key, and whether it is ours: then the call is to be made, as the
        row ``uuid``, which is to be written where ``hold`` says yes."""
        self._for_write = True
        digest = _digest([caller, key])
        leased_until = now + LEASE
        with transaction.atomic(using=self.db):
            self.filter(digest=digest).expired(now).delete()
            # Unique: of two at once one makes the call.
            kept, is_ours = self.get_or_create(
                digest=digest,
                defaults={
                    "asked": _digest(asked),
                    "uuid": uuid,
                    "leased_until": leased_until,
                    "created_at": now,
                    "expires_at": now + KEPT_FOR,
                },
            )
            if not is_ours and kept.is_for(asked):
                # Should its process live after all, it finds another's uuid here, and stops.
                lapsed = kept._rows().filter(leased_until__lte=now)
                is_ours = bool(lapsed.update(uuid=uuid, leased_until=leased_until))
                kept.uuid = uuid if is_ours else kept.uuid
        return kept, is_ours

    def expired(self, now: datetime) -> Self:
        return self.filter(expires_at__lte=now)


class KeptAnswer(models.Model):
    digest = models.CharField(max_length=64, unique=True)
    """SHA-256 of whose key it is and the key, which is for its owner to know."""
    asked = models.CharField(max_length=64)
    """SHA-256 of the body that came with it."""
    uuid = models.UUIDField()
    """That of the row it makes. No foreign key: this one is written before it."""
    leased_until = models.DateTimeField(null=True)
    """Until when nobody else may make the call; None from when it is written down, and for ever."""
    status = models.PositiveSmallIntegerField(_("status"), null=True)
    """None while the call is under way."""
    content_type = models.CharField(max_length=100, default="application/json")
    body = models.TextField(_("body"), blank=True)
    created_at = models.DateTimeField(_("created at"), default=timezone.now)
    expires_at = models.DateTimeField(_("expires at"), db_index=True)

    objects = KeptAnswerQuerySet.as_manager()

    class Meta:
        verbose_name = _("kept answer")
        verbose_name_plural = _("kept answers")

    def __str__(self) -> str:
        return f"{self.digest[:12]} · {self.status or '…'}"

    def is_for(self, asked: Any) -> bool:
        """Whether the same was asked then."""
        return self.asked == _digest(asked)

    def hold(self) -> bool:
        """Whether the claim is still ours: asked in the transaction that writes the call down, after
        which nobody takes it over. Otherwise the call is another's, and not to be made."""
        return bool(self._rows().filter(status=None).update(leased_until=None))

    def keep(self, status: int, body: bytes, content_type: str) -> None:
        """This was answered."""
        text = clean_text(body.decode("utf-8", "replace"))
        self._rows().update(
            status=status,
            body=app_settings().without_secrets(text),
            content_type=content_type[:100],
        )

    def let_go(self) -> None:
        """Nothing was paid for, so the same may be tried again."""
        self._rows().delete()

    def _rows(self) -> models.QuerySet[KeptAnswer]:
        # As long as it is ours: see ``claim``.
        rows = type(self).objects.using(self._state.db)
        return rows.filter(pk=self.pk, uuid=self.uuid)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
