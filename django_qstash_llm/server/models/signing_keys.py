from __future__ import annotations

import secrets

from django.db import models, transaction

from ...qstash import Keys
from .. import conf


class SigningKeysQuerySet(models.QuerySet["SigningKeys"]):
    def current(self) -> Keys:
        """The keys in force: those rotated to, else the settings', else ones made here and now."""
        row = self.first()
        if row is not None:
            return row.keys
        return conf.current().keys or self._made().keys

    def rotate(self) -> Keys:
        """current := next, next := new. Durable, so the settings' keys are history from then on."""
        with transaction.atomic():
            row = self.select_for_update().get(pk=self._made().pk)
            row.current, row.next = row.next, new_key()
            row.save()
        return row.keys

    def _made(self) -> SigningKeys:
        keys = conf.current().keys or Keys(new_key(), new_key())
        return self.get_or_create(pk=1, defaults={"current": keys.current, "next": keys.next})[0]


class SigningKeys(models.Model):
    """One row at most: what deliveries are signed with, once that is not the settings' to say."""

    current = models.CharField(max_length=200)
    next = models.CharField(max_length=200)
    updated_at = models.DateTimeField(auto_now=True)

    objects = SigningKeysQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "signing keys"

    def __str__(self) -> str:
        return "signing keys"

    @property
    def keys(self) -> Keys:
        return Keys(self.current, self.next)


def new_key() -> str:
    return f"sig_{secrets.token_urlsafe(24)}"
