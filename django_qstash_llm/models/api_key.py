"""``ApiKey``: who may call the OpenAI-compatible endpoint, and for whom they spend."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import Case, F, Q, Value, When
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_text
from ..conf import app_settings
from . import inbox
from .request import check_saved

BEGINNING = "qllm_"
"""By it scanners for leaked secrets know what they have found."""
SHOWN = len(BEGINNING) + 7
"""Characters of a key that stay readable: enough to tell keys apart, and too few to guess by."""


class Scope(models.TextChoices):
    CHAT = "chat", _("chat")
    MODELS = "models", _("models")
    BATCHES = "batches", _("batches")
    FILES = "files", _("files")


def all_scopes() -> list[str]:
    return list(Scope.values)


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def issue(self, name: str, **fields: Any) -> tuple[ApiKey, str]:
        """A new row, and its key, which nobody can show again.

        ``fields``: ``user``, ``tenant``, ``scopes``, ``allowed_models``, ``provider``,
        ``requests_per_minute``, ``expires_at``. Raises Django's ``ValidationError``, or
        ``InvalidRequest`` for a user that is not saved.
        """
        self._for_write = True
        check_saved("user", fields.get("user"), self.model)
        api_key = self.model(name=name, **fields)
        key = api_key.renew()
        api_key.full_clean()
        api_key.save(using=self.db, force_insert=True)
        return api_key, key

    def of(self, key: str, *, now: datetime) -> ApiKey | None:
        """The row of a key that somebody shows, if it may still be used."""
        # Not from a replica: what is revoked is revoked at once.
        self._for_write = True
        found = inbox.find(self.model, "digest", digest_of(key), using=self.db)
        if found is not None and found.user_id is not None:
            related: Any = self.model._meta.get_field("user").related_model
            user = related._base_manager.using(self.db).filter(pk=found.user_id).first()
            if user is None:
                return None  # deleted a moment ago, and the key with them
            found.user = user
        return found if found is not None and found.is_usable(now) else None


class ApiKey(models.Model):
    """A key as we know it: its digest, what it may do, and for whom it spends."""

    name = models.CharField(_("name"), max_length=255, help_text=_("Who holds it, and what for."))
    prefix = models.CharField(_("key"), max_length=SHOWN, editable=False, db_index=True)
    digest = models.CharField(max_length=64, unique=True, editable=False)

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,  # nobody spends for somebody who is gone
        null=True,
        blank=True,
        related_name="llm_api_keys",
        verbose_name=_("user"),
        help_text=_("For whom it spends. It stops with the user's account."),
    )
    tenant = models.CharField(_("tenant"), max_length=255, blank=True)
    scopes = models.JSONField(_("scopes"), default=all_scopes)
    provider = models.CharField(
        _("provider"),
        max_length=64,
        blank=True,
        help_text=_("Who answers where a model is named without its provider."),
    )
    allowed_models = models.JSONField(
        _("models"),
        default=list,
        blank=True,
        help_text=_("The only ones it may ask: “model”, “provider/model” or “provider/*”."),
    )
    requests_per_minute = models.PositiveIntegerField(
        _("requests per minute"), null=True, blank=True, validators=[MinValueValidator(1)]
    )
    expires_at = models.DateTimeField(_("expires at"), null=True, blank=True)
    revoked_at = models.DateTimeField(_("revoked at"), null=True, blank=True, editable=False)
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    # what it is used for
    last_used_at = models.DateTimeField(_("last used"), null=True, blank=True, editable=False)
    """To the minute: see ``count_call``."""
    minute = models.BigIntegerField(default=0, editable=False)
    """Minutes since 1970, of the last call that was counted."""
    calls_in_minute = models.PositiveIntegerField(default=0, editable=False)

    objects = ApiKeyQuerySet.as_manager()

    class Meta:
        verbose_name = _("API key")
        verbose_name_plural = _("API keys")
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.name} · {self.prefix}…"

    def clean(self) -> None:
        _check_texts("allowed_models", self.allowed_models)
        _check_texts("scopes", self.scopes, among=Scope.values)
        if not self.scopes:
            raise ValidationError({"scopes": _("Without any it may do nothing.")})
        if self.provider and self.provider not in {*app_settings().providers, "upstash"}:
            raise ValidationError({"provider": _("Not an entry of QSTASH_LLM['PROVIDERS'].")})
        for name in ("name", "tenant"):
            if clean_text(getattr(self, name)) != getattr(self, name):
                raise ValidationError({name: _("Not a text that every database takes.")})

    def renew(self) -> str:
        """Be the row of a new key, which is handed back and not kept."""
        key = BEGINNING + secrets.token_urlsafe(32)
        self.prefix, self.digest = key[:SHOWN], digest_of(key)
        return key

    def is_usable(self, now: datetime) -> bool:
        if self.revoked_at is not None or (self.expires_at and self.expires_at <= now):
            return False
        # A user model need not know who is active.
        return self.user is None or bool(getattr(self.user, "is_active", True))

    def may_ask(self, provider: str, model: str) -> bool:
        """``openai/gpt-*`` is that of the provider ``openai``, ``gpt-*`` anybody's: some providers'
        models have a slash in their names, and are not the provider that they begin with."""
        if not self.allowed_models:
            return True
        named = {*app_settings().providers, "upstash", provider}
        return any(
            _matches(each, f"{provider}/{model}" if each.partition("/")[0] in named else model)
            for each in self.allowed_models
        )

    def count_call(self, *, now: datetime) -> bool:
        """Whether this call is within the key's rate; if so it is counted.

        One guarded update, so that all processes count together.
        """
        minute = int(now.timestamp()) // 60
        if self.requests_per_minute is None and self.minute == minute:
            # Calls without a limit do not stand in line for this row: one in a minute writes it.
            return True
        # A minute that lies further ahead than clocks differ is of a clock that was put back.
        is_new = Q(minute__lt=minute) | Q(minute__gt=minute + 1)
        rows = type(self).objects.using(self._state.db).filter(pk=self.pk)
        if self.requests_per_minute is None:
            rows.filter(is_new).update(minute=minute, last_used_at=now)
            return True
        is_within = Q(calls_in_minute__lt=F("requests_per_minute"))
        counted = rows.filter(is_new | is_within).update(
            minute=_either(is_new, minute, F("minute"), models.BigIntegerField()),
            calls_in_minute=_either(
                is_new, 1, F("calls_in_minute") + 1, models.PositiveIntegerField()
            ),
            last_used_at=_either(is_new, now, F("last_used_at"), models.DateTimeField()),
        )
        return bool(counted)

    def revoke(self, *, now: datetime | None = None) -> bool:
        """It is believed no more. Whether it was until now."""
        rows = type(self).objects.using(self._state.db).filter(pk=self.pk, revoked_at=None)
        has_changed = bool(rows.update(revoked_at=now or timezone.now()))
        self.refresh_from_db(fields=["revoked_at"])
        return has_changed


def digest_of(key: str) -> str:
    """What is kept of a key.

    SHA-256 and no slow hash: those make guessing dear where people choose passwords. A key is 256
    random bits, which nobody guesses at any speed, and it is looked at on every call.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _either(condition: Q, value: Any, other: Any, field: models.Field[Any, Any]) -> Case:
    return Case(When(condition, then=Value(value)), default=other, output_field=field)


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _check_texts(name: str, value: Any, *, among: list[str] | None = None) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValidationError({name: _("Give a list of texts.")})
    if unknown := [each for each in value if among is not None and each not in among]:
        raise ValidationError(
            {name: _("%(name)s is none of %(known)s.") % {"name": unknown[0], "known": among}}
        )
    if any(clean_text(each) != each for each in value):
        raise ValidationError({name: _("Not a text that every database takes.")})
