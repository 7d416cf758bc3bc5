from __future__ import annotations

import secrets
from collections.abc import Iterable

from django.db import models, transaction

from ...qstash import Keys
from .. import conf


class SigningKeysQuerySet(models.QuerySet["SigningKeys"]):
    def current(self, account: str = "") -> Keys:
        """The keys in force: those rotated to, else the settings', else ones made here and now."""
        return self.of_accounts([account])[account]

    def of_accounts(self, accounts: Iterable[str]) -> dict[str, Keys]:
        """Each account's keys in force."""
        wanted = set(accounts)
        rows = self.filter(account__in=wanted)
        keys = {row.account: row.keys for row in rows if row.is_believed}
        for account in wanted - set(keys):
            keys[account] = conf.current().keys_of(account) or self._made(account).keys
        return keys

    def rotate(self, account: str = "") -> Keys:
        """current := next, next := new. Durable, so the settings' keys are history from then on."""
        with transaction.atomic():
            row = self.select_for_update().get(pk=self._made(account).pk)
            row.current, row.next = row.next, new_key()
            row.save()
        return row.keys

    def _made(self, account: str) -> SigningKeys:
        keys = conf.current().keys_of(account) or Keys(new_key(), new_key())
        values = {"current": keys.current, "next": keys.next}
        row = self.get_or_create(account=account, defaults=values)[0]
        if not row.is_believed:
            # Rotated to in development, and everybody knows them.
            public = {"current": row.current, "next": row.next}
            self.filter(pk=row.pk, **public).update(**values)
            row.refresh_from_db()
        return row


class SigningKeys(models.Model):
    """At most one row an account: what its deliveries are signed with, once that is not the
    settings' to say."""

    account = models.CharField(max_length=64, unique=True, blank=True, default="")
    current = models.CharField(max_length=200)
    next = models.CharField(max_length=200)
    updated_at = models.DateTimeField(auto_now=True)

    objects = SigningKeysQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "signing keys"

    def __str__(self) -> str:
        return f"signing keys {self.account}".strip()

    @property
    def is_believed(self) -> bool:
        return conf.are_believed(self.current, self.next)

    @property
    def keys(self) -> Keys:
        return Keys(self.current, self.next)


def new_key() -> str:
    return f"sig_{secrets.token_urlsafe(24)}"
