"""``Price``: what a class of a model's tokens costs, from a moment on.

Prices are dated and never edited. A change closes a price and opens the next one at the same moment, in
one transaction, so that what was answered before keeps its own. That no two of a class overlap is seen
to by ``set``, which locks what it looks at, and by what the database refuses whoever writes: two that
begin at once, two that are open, two that end at once, and one that ends before it begins.

Every process knows the prices for ``KNOWN_FOR`` seconds before it asks whether there are others. Therefore
a change of what is known begins ``NOTICE`` from now at the earliest: by then all know of it, and no
answer is priced by a price that is not that of its moment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Self

from django.conf import settings
from django.db import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    connections,
    models,
    router,
    transaction,
)
from django.db.models import Count, F, Max, Q
from django.db.models.signals import post_migrate
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_text
from ..exceptions import IllegalState, InvalidRequest
from ..pricing import ABSURD, CLASSES, STANDARD_TIERS, PriceList, Rate, is_count, means
from .moments import aware

KNOWN_FOR = 30.0
"""Seconds for which a process goes by the prices it has read."""
NOTICE = timedelta(seconds=60)
"""From when a change is set until it begins, at least. Half of it is for a slow transaction and for clocks
that differ."""
PLACES = 8
KEY = ("provider", "model", "token_class", "tier", "above")
"""What a price is of."""


class TokenClass(models.TextChoices):
    INPUT = "input", _("input")
    OUTPUT = "output", _("output")
    CACHED = "cached", _("cached")
    CACHE_WRITE = "cache_write", _("cache write")
    CACHE_WRITE_1H = "cache_write_1h", _("cache write for an hour")
    REASONING = "reasoning", _("reasoning")
    AUDIO_INPUT = "audio_input", _("audio input")
    AUDIO_OUTPUT = "audio_output", _("audio output")
    IMAGE_INPUT = "image_input", _("image input")
    IMAGE_OUTPUT = "image_output", _("image output")
    WEB_SEARCH = "web_search", _("web search")


class PriceQuerySet(models.QuerySet["Price"]):
    def in_force(self, at: datetime) -> Self:
        return self.filter(Q(until=None) | Q(until__gt=at), since__lte=at)

    def set(
        self,
        provider: str,
        model: str,
        amounts: Mapping[str, Any],
        *,
        tier: str = "",
        above: int = 0,
        since: datetime | None = None,
        source: str = "",
        now: datetime | None = None,
    ) -> list[Price]:
        """Have a model cost ``amounts`` from ``since`` on, and answer what is new; nothing where it
        costs that already.

        ``amounts``: USD per million by class (``input``, ``output``, ``cached``, …), None where there is
        no price from then on; classes that are left out stay as they are. ``model`` is a name, or a
        pattern in which ``*`` stands for any letters. ``tier`` is the provider's word for another service
        tier (``flex``, ``priority``, ``batch``), and ``above`` makes it a price of inputs longer than so
        many tokens.

        ``since`` is now where no price of ours was known, and may be any time before that; a change of
        a known one begins ``NOTICE`` from now at the earliest, and nothing of the past is changed.

        Raises ``InvalidRequest`` that names the argument.
        """
        self._for_write = True  # for self.db: not the replica that reads would go to
        now = now or timezone.now()
        wanted = {name: _amount(name, given) for name, given in amounts.items()}
        if not wanted:
            raise InvalidRequest("amounts", "give at least one class and its price")
        tier = "" if tier in STANDARD_TIERS else tier
        of = {"provider": provider, "model": model, "tier": tier, "above": above}
        _check(of)
        source = clean_text(source, limit=255)
        try:
            with transaction.atomic(using=self.db):
                return self._set(of, wanted, since, source, now)
        except IntegrityError as error:
            raise InvalidRequest(
                "model",
                f"another set a price of {provider}/{model} at this moment; look, and set it again",
            ) from error

    def _set(
        self,
        of: dict[str, Any],
        wanted: Mapping[str, Decimal | None],
        since: datetime | None,
        source: str,
        now: datetime,
    ) -> list[Price]:
        # Locked first and then looked at: another change may have come first.
        of_provider = self.filter(provider=of["provider"])
        list(of_provider.select_for_update().order_by("pk").values_list("pk"))
        related = [row for row in of_provider if _may_mean_the_same(row.model, of["model"])]
        is_known = any(row.is_in_force(now) for row in related)
        since = since or (now + NOTICE if is_known else now)
        if settings.USE_TZ and timezone.is_naive(since):
            raise InvalidRequest("since", "give an aware datetime")
        closed, opened = [], []
        for token_class, amount in wanted.items():
            key = {**of, "token_class": token_class}
            same = [row for row in related if all(getattr(row, n) == v for n, v in key.items())]
            before = next((row for row in same if row.is_in_force(since)), None)
            if before is not None and before.amount != amount:
                closed.append(before.check_closing(since))
            if amount is not None and (before is None or before.amount != amount):
                until = min((row.since for row in same if row.since > since), default=None)
                opened.append(
                    self.model(**key, amount=amount, since=since, until=until, source=source)
                )
        changes_what_is_known = closed or any(
            row.is_in_force_within(new.since, new.until) for new in opened for row in related
        )
        if changes_what_is_known and since < now + NOTICE:
            raise InvalidRequest(
                "since",
                f"{of['provider']}/{of['model']} has a price, and a change of it begins in "
                f"{NOTICE.seconds} seconds at the earliest, so that every process knows of it in time; "
                "what was answered before keeps its cost",
            )
        self.filter(pk__in=[row.pk for row in closed]).update(until=since)
        for new in opened:
            new.save(using=self.db, force_insert=True)
        if closed or opened:
            _forget_on_commit(self.db)
        return opened


class Price(models.Model):
    """What a class of a model's tokens costs, in a tier, for inputs of a length, for a time."""

    provider = models.CharField(_("provider"), max_length=64)
    model = models.CharField(
        _("model"), max_length=255, help_text=_("“*” stands for any letters, as in “gpt-5*”.")
    )
    token_class = models.CharField(_("of"), max_length=16, choices=TokenClass)
    tier = models.CharField(
        _("service tier"),
        max_length=64,
        blank=True,
        help_text=_("The provider's word: flex, priority, batch. Empty is its standard one."),
    )
    above = models.PositiveBigIntegerField(
        _("above"), default=0, help_text=_("Only of inputs longer than so many tokens.")
    )
    amount = models.DecimalField(
        _("amount"), max_digits=16, decimal_places=PLACES, help_text=_("USD per million.")
    )
    since = models.DateTimeField(_("since"))
    until = models.DateTimeField(_("until"), null=True, blank=True, editable=False)
    """Not included. None is open."""
    source = models.CharField(_("source"), max_length=255, blank=True)
    """Who or what says so."""
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    objects = PriceQuerySet.as_manager()

    class Meta:
        verbose_name = _("price")
        verbose_name_plural = _("prices")
        ordering = ("provider", "model", "tier", "above", "token_class", "since")
        constraints = (
            models.UniqueConstraint(fields=[*KEY, "since"], name="price_begins_once"),
            models.UniqueConstraint(fields=[*KEY, "until"], name="price_ends_once"),
            models.UniqueConstraint(fields=KEY, name="price_is_open_once", condition=Q(until=None)),
            models.CheckConstraint(
                condition=Q(until=None) | Q(until__gt=F("since")), name="price_lasts"
            ),
            models.CheckConstraint(condition=Q(amount__gte=0), name="price_is_not_negative"),
        )

    def __str__(self) -> str:
        words = [f"{self.provider}/{self.model}", self.get_token_class_display(), self.tier]
        words += [f"> {self.above}"] if self.above else []
        return f"{' · '.join(filter(None, words))}: ${self.amount.normalize():f}/M"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            raise IllegalState(
                "A price is not edited: Price.objects.set closes it and opens another."
            )
        super().save(*args, **kwargs)

    def is_in_force(self, at: datetime) -> bool:
        return self.since <= at and (self.until is None or at < self.until)

    def is_in_force_within(self, since: datetime, until: datetime | None) -> bool:
        ends_before = self.until is not None and self.until <= since
        return not ends_before and (until is None or self.since < until)

    def check_closing(self, at: datetime) -> Self:
        """Raises ``InvalidRequest`` where it cannot be closed at that moment."""
        if self.until is not None:
            raise InvalidRequest(
                "since",
                f"{self} changes on {self.until.isoformat()} already; give a later moment, or withdraw "
                "that change where it has not begun",
            )
        if self.since == at:
            raise InvalidRequest("since", f"{self} begins at that very moment")
        return self

    def withdraw(self, *, now: datetime | None = None) -> None:
        """Undo a change that has not begun: the price before it stays open.

        Raises ``IllegalState`` where it has begun, or begins too soon for every process to hear of it.
        """
        now, rows = now or timezone.now(), type(self).objects.using(self._state.db)
        with transaction.atomic(using=self._state.db):
            key = {name: getattr(self, name) for name in KEY}
            same = {row.pk: row for row in rows.filter(**key).select_for_update()}
            found = same.get(self.pk)
            if found is None or found.until is not None or found.since < now + NOTICE:
                raise IllegalState(f"{self} has begun, or is about to: set another from later on.")
            rows.filter(pk=self.pk).delete()
            rows.filter(**key, until=found.since).update(until=None)
            _forget_on_commit(self._state.db or "default")


def _amount(name: str, given: Any) -> Decimal | None:
    if name not in CLASSES:
        raise InvalidRequest(
            "amounts", f"there is no class {name!r}; there are {', '.join(CLASSES)}"
        )
    if given is None:
        return None
    try:
        amount = Decimal(str(given))
        is_sound = amount.is_finite() and 0 <= amount < ABSURD and not isinstance(given, bool)
        if is_sound and amount == amount.quantize(Decimal(1).scaleb(-PLACES)):
            return amount
    except InvalidOperation:
        pass
    raise InvalidRequest(
        "amounts",
        f"{given!r} is no price of {name!r}: give USD per million, {PLACES} decimals at most",
    )


def _check(of: Mapping[str, Any]) -> None:
    for name, longest in (("provider", 64), ("model", 255), ("tier", 64)):
        given = of[name]
        if not isinstance(given, str) or clean_text(given, limit=longest) != given:
            raise InvalidRequest(name, f"give a text of {longest} characters at most")
        if not given and name != "tier":
            raise InvalidRequest(name, "missing")
    if not is_count(of["above"]) or of["above"] >= 2**63:
        raise InvalidRequest("above", "give a number of tokens")


def _may_mean_the_same(one: str, other: str) -> bool:
    both = "*" in one and "*" in other
    return both or one == other or means(one, [other]) or means(other, [one])


# --- what this process knows -----------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    prices: PriceList
    version: tuple[Any, ...]
    asked_at: datetime
    asked_on: float
    """By a clock that nobody sets."""

    def is_good_for(self, at: datetime) -> bool:
        ends_at = self.asked_at + timedelta(seconds=KNOWN_FOR)
        return at < ends_at and time.monotonic() < self.asked_on + KNOWN_FOR


_known: dict[str, _Known] = {}
"""By database."""


def known_prices(at: datetime) -> PriceList:
    """Our own prices, complete for what is answered at ``at``. Asks the database every ``KNOWN_FOR``
    seconds whether there are others, and reads them where there are."""
    using = router.db_for_write(Price)  # not a replica, which may know of a change too late
    if _is_changing(using):
        return _read(using)  # as this transaction sees them, which may come to nothing
    known = _known.get(using)
    if known is None or not known.is_good_for(aware(at)):
        asked_at, asked_on = datetime.now(UTC), time.monotonic()
        version = _version(using)
        prices = known.prices if known and known.version == version else _read(using)
        _known[using] = known = _Known(prices, version, asked_at, asked_on)
    return known.prices


def _version(using: str) -> tuple[Any, ...]:
    """Other, when there are others. On a new connection where the one there was has gone stale: who
    prices a chat has not used it for as long as the model thought."""
    connection = connections[using]
    # A change opens a price or closes one; one that is withdrawn is one less.
    counts = Max("id"), Count("id"), Count("until")
    try:
        return tuple(Price.objects.using(using).aggregate(*counts).values())
    except (InterfaceError, OperationalError):
        if connection.in_atomic_block or connection.is_usable():
            raise
        connection.close()
        return tuple(Price.objects.using(using).aggregate(*counts).values())


def _read(using: str) -> PriceList:
    rows = Price.objects.using(using).values_list(*KEY, "amount", "since", "until")
    return PriceList(Rate(*row) for row in rows)


def forget_prices(using: str | None = None) -> None:
    """Have the next who asks ask the database."""
    for alias in list(_known) if using is None else [using]:
        _known.pop(alias, None)


class _Forget:
    """Told on commit; while it waits for that, prices are being changed in this transaction."""

    def __init__(self, using: str) -> None:
        self.using = using

    def __call__(self) -> None:
        forget_prices(self.using)


def _forget_on_commit(using: str) -> None:
    transaction.on_commit(_Forget(using), using=using)


def _is_changing(using: str) -> bool:
    waiting: Sequence[Any] = connections[using].run_on_commit
    return any(isinstance(each[1], _Forget) for each in waiting)


def _forget_all(using: str, **kwargs: object) -> None:
    forget_prices(using)


# A migration, or a flush, may have left others.
post_migrate.connect(_forget_all, dispatch_uid="django_qstash_llm.prices")
