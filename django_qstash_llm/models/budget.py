"""``Budget``: how much may be spent in a time, on what. It holds before the call.

A request that is handed in reserves the most it may cost in every budget it falls under; one that does
not fit is refused. When it has ended, ``Settlement`` puts what it did cost in the reservation's place.
So what is spent and what is reserved never exceed the amount together, however many hand in at once, as
long as no request costs more than the most that was expected of it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Any, Protocol, Self
from zoneinfo import ZoneInfo, available_timezones

from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import DatabaseError, models, transaction
from django.db.models import F, Q, Sum
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..exceptions import BudgetExceeded
from ..pricing import WorstCosts
from .alert import Alert
from .doorbell import Bell, ring_on_commit
from .ledger import LedgerEntry, texts_in
from .moments import as_stored, aware
from .money import MOST, STEP, USDField, dollars, units, usd
from .reservation import Reservation
from .tally import Tally

logger = logging.getLogger(__name__)

TOO_MUCH = MOST + 1
"""USD: more than any budget's amount."""
_CANNOT_BE_WEIGHED = (AttributeError, TypeError, ValueError, ArithmeticError)
PIECES = 48
"""Into which a rolling window is cut. What was spent leaves it a piece at a time, never too early."""


class Scope(models.TextChoices):
    ALL = "all", _("everything")
    TENANT = "tenant", _("tenant")
    USER = "user", _("user")
    PROVIDER = "provider", _("provider")
    MODEL = "model", _("model")
    LABEL = "label", _("label")
    API_KEY = "api_key", _("API key")


class Period(models.TextChoices):
    DAY = "day", _("calendar day")
    WEEK = "week", _("calendar week, from Monday")
    MONTH = "month", _("calendar month")
    ROLLING = "rolling", _("the last days")


class Action(models.TextChoices):
    REFUSE = "refuse", _("refuse what does not fit")
    ALERT = "alert", _("let it pass, and alert")


def default_thresholds() -> list[int]:
    return [50, 80, 100]


_OWN = ("reserved", "counted_as")
"""Columns that only reserving, settling and counting write."""
Place = tuple[str, str]
"""Scope and value."""


class Spending(Protocol):
    """What decides which budgets a request falls under. (A row, or the outbox's excerpt of it.)"""

    @property
    def pk(self) -> Any: ...
    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def messages(self) -> Any: ...
    @property
    def parameters(self) -> Any: ...
    @property
    def tenant(self) -> str: ...
    @property
    def user_id(self) -> Any: ...
    @property
    def labels(self) -> Any: ...
    @property
    def api_key_id(self) -> Any: ...


def places(
    *, provider: str, model: str, tenant: str, user: Any, labels: Any, api_key: Any
) -> set[Place]:
    """Scopes and values of the budgets that this falls under."""
    found: set[Place] = {
        (Scope.ALL, ""),
        (Scope.PROVIDER, provider),
        (Scope.MODEL, model),
        (Scope.MODEL, f"{provider}/{model}"),
        *((Scope.LABEL, label) for label in texts_in(labels)),
    }
    for scope, value in ((Scope.TENANT, tenant), (Scope.USER, user), (Scope.API_KEY, api_key)):
        if value not in (None, ""):
            found.add((scope, str(value)))
    return found


def places_of(llm_request: Spending) -> set[Place]:
    return places(
        provider=llm_request.provider,
        model=llm_request.model,
        tenant=llm_request.tenant,
        user=llm_request.user_id,
        labels=llm_request.labels,
        api_key=llm_request.api_key_id,
    )


class BudgetQuerySet(models.QuerySet["Budget"]):
    def over(self, found: Iterable[Place]) -> Self:
        """The active ones of any of these places."""
        values: dict[str, set[str]] = defaultdict(set)
        for scope, value in found:
            values[scope].add(value)
        is_of = Q()
        for scope, among in values.items():
            is_of |= Q(scope=scope, value__in=among)
        return self.filter(is_of, is_active=True)

    def over_request(self, llm_request: Spending) -> Self:
        """Those that a request falls under."""
        self._for_write = True
        return self.over(places_of(llm_request))

    def reserve(
        self, llm_requests: Sequence[Spending], *, now: datetime
    ) -> dict[Any, BudgetExceeded]:
        """Hold the most that each of ``llm_requests`` may cost, in every budget it falls under; by
        their keys those that a budget refuses, for which nothing is held.

        What is held for one already stays as it is. Once more after settling what has ended, where one does not fit.
        """
        self._for_write = True
        wishes, keys = self._wishes(llm_requests, now)
        refused = self._reserve(wishes, keys, now)
        if refused:
            self._settle()
            again = [wish for wish in wishes if wish.of.pk in refused]
            refused = self._reserve(again, keys, now)
        return refused

    def hold(self, write: Callable[[], Spending], *, now: datetime) -> None:
        """Reserve for the one that ``write`` writes, in one transaction with that. Raises the
        ``BudgetExceeded`` of a budget that refuses it, and then nothing is written.

        What has ended is settled between two such transactions, and not in one: who settles locks what
        was answered before the budgets.
        """
        self._for_write = True
        for is_settled in (False, True):
            try:
                with transaction.atomic(using=self.db):
                    llm_request = write()
                    wishes, keys = self._wishes([llm_request], now)
                    if refused := self._reserve(wishes, keys, now):
                        raise refused[llm_request.pk]
                    return
            except BudgetExceeded:
                if is_settled:
                    raise
            self._settle()

    def _settle(self) -> None:
        from .settlement import settle  # it knows what is reserved here

        try:
            settle(self.db)
        except DatabaseError:
            # Then it stays refused, and nobody else waits for that.
            logger.exception("What was answered could not be settled")

    def _wishes(
        self, llm_requests: Sequence[Spending], now: datetime
    ) -> tuple[list[_Wish], list[int]]:
        """With the keys of the budgets that they fall under."""
        known: dict[Any, set[Place]] = {}
        wishes = [_Wish(each, _places(each, known)) for each in llm_requests]
        found = self.over(set().union(*known.values())).order_by("pk")
        keys = list(found.values_list("pk", flat=True))
        if keys:
            # Before anything is locked: of a thousand requests it takes longer than all the rest.
            costs = WorstCosts(at=now)
            for wish in wishes:
                wish.weigh(costs)
        return wishes, keys

    def _reserve(
        self, wishes: Sequence[_Wish], keys: Sequence[int], now: datetime
    ) -> dict[Any, BudgetExceeded]:
        refused: dict[Any, BudgetExceeded] = {}
        if not keys:
            return refused
        made: list[tuple[int, Any, int]] = []
        reservations = Reservation.objects.using(self.db)
        with transaction.atomic(using=self.db):
            budgets = list(self.select_for_update(of=("self",)).filter(pk__in=keys).order_by("pk"))
            accounts = [_Account(budget, now) for budget in budgets]
            by_place: dict[Place, list[_Account]] = defaultdict(list)
            for account in accounts:
                by_place[account.budget.scope, account.budget.value].append(account)
            of_these = reservations.filter(llm_request__in=[wish.of.pk for wish in wishes])
            held = set(of_these.values_list("budget_id", "llm_request_id"))
            for wish in wishes:
                pk, most = wish.of.pk, wish.most
                concerned = [
                    account
                    for place in wish.places & by_place.keys()
                    for account in by_place[place]
                    if (account.budget.pk, pk) not in held
                ]
                problem = next(filter(None, (each.problem(wish) for each in concerned)), None)
                if problem is not None:
                    refused[pk] = problem
                    continue
                for account in concerned:
                    # One that only alerts lets any number pass: of more than fits is held what fits.
                    held_of_it = min(most or Decimal(0), MOST - account.reserved)
                    account.reserved += held_of_it
                    made.append((account.budget.pk, pk, units(held_of_it)))
            reservations.make(made)
            for account in accounts:
                if more := account.reserved - account.budget.reserved:
                    self.filter(pk=account.budget.pk).update(reserved=F("reserved") + usd(more))
        return refused


@dataclass
class _Wish:
    """A request that is to be held for."""

    of: Spending
    places: set[Place]
    most: Decimal | None = None
    """USD that it may cost; None where no price is known."""

    def weigh(self, costs: WorstCosts) -> None:
        of = self.of
        try:
            most = costs.of(of.provider, of.model, of.messages, of.parameters)
        except _CANNOT_BE_WEIGHED as error:
            # Nobody has checked it (``bulk_create``), and all others are submitted with it.
            logger.warning("Request %s cannot be weighed: %s", of.pk, type(error).__name__)
            return
        if most is not None:
            # No budget holds more than this, and no column. Up, to what is held and let go of.
            self.most = min(most, TOO_MUCH).quantize(STEP, ROUND_CEILING)


def _places(llm_request: Spending, known: dict[Any, set[Place]]) -> set[Place]:
    """As ``places_of``, once for all that are alike."""
    key = (
        llm_request.provider,
        llm_request.model,
        llm_request.tenant,
        llm_request.user_id,
        llm_request.api_key_id,
        texts_in(llm_request.labels),
    )
    if key not in known:
        known[key] = places_of(llm_request)
    return known[key]


@dataclass
class _Account:
    """A locked budget while reservations are made in it."""

    budget: Budget
    now: datetime

    def __post_init__(self) -> None:
        self.reserved: Decimal = self.budget.reserved
        self.spent = self.budget.spent(self.now)

    def problem(self, wish: _Wish) -> BudgetExceeded | None:
        """Why it is refused; None where it is not."""
        budget, most = self.budget, wish.most
        left = budget.amount - self.spent - self.reserved
        if budget.action != Action.REFUSE or (most is not None and most <= left):
            return None
        figures: dict[str, Any] = {"budget": budget.name, "amount": budget.amount}
        figures |= {"spent": self.spent, "reserved": self.reserved, "needed": most}
        if most is None:
            if app_settings().budgets_allow_unpriced:
                return None
            return BudgetExceeded(
                f"The budget {budget.in_words} cannot hold it: no price is known for "
                f"{wish.of.provider}/{wish.of.model}. Set one with manage.py llm_prices, or "
                "allow such with QSTASH_LLM['BUDGETS_ALLOW_UNPRICED'].",
                **figures,
            )
        return BudgetExceeded(
            f"The budget {budget.in_words} has {dollars(max(left, Decimal(0)))} left, and this request may cost "
            f"{dollars(most)}: {dollars(self.spent)} are spent, and {dollars(self.reserved)} reserved for requests "
            f"under way. {budget.renewal_in_words(self.now)}",
            **figures,
            renews_at=budget.renews_at(self.now),
        )


class Budget(models.Model):
    """An amount for a period, of all that falls under ``scope`` and ``value``."""

    name = models.CharField(_("name"), max_length=100, unique=True)
    amount = USDField(_("amount"), help_text=_("USD per period."))
    period = models.CharField(_("period"), max_length=16, choices=Period, default=Period.MONTH)
    days = models.PositiveSmallIntegerField(
        _("days"), null=True, blank=True, help_text=_("How long “the last days” are.")
    )
    time_zone = models.CharField(
        _("time zone"),
        max_length=64,
        blank=True,
        help_text=_("In which its periods begin, as in Europe/Berlin. Empty: the site's."),
    )
    scope = models.CharField(_("scope"), max_length=16, choices=Scope, default=Scope.ALL)
    value = models.CharField(
        _("of"),
        max_length=255,
        blank=True,
        help_text=_("Which tenant, provider, model, label; the id of a user or an API key."),
    )
    action = models.CharField(_("action"), max_length=16, choices=Action, default=Action.REFUSE)
    thresholds = models.JSONField(
        _("thresholds"),
        default=default_thresholds,
        blank=True,
        help_text=_(
            "Percent of the amount; each alerts once in a period, when that much is spent."
        ),
    )
    emails = models.JSONField(
        _("e-mail addresses"), default=list, blank=True, help_text=_("Who is told by e-mail.")
    )
    is_active = models.BooleanField(_("active"), default=True)
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    reserved = USDField(_("reserved"), default=Decimal(0), editable=False)
    """The sum of its reservations."""
    counted_as = models.CharField(max_length=400, blank=True, editable=False)
    """Of which scope and period its tallies are; where that has changed they are counted anew."""

    objects = BudgetQuerySet.as_manager()

    class Meta:
        verbose_name = _("budget")
        verbose_name_plural = _("budgets")
        ordering = ("name",)
        constraints = (
            models.CheckConstraint(
                condition=(Q(scope="all", value="") | (~Q(scope="all") & ~Q(value=""))),
                name="llm_budget_value",
                violation_error_message=_(
                    "Say of what it is; a budget of everything has no value."
                ),
            ),
            models.CheckConstraint(
                condition=(
                    Q(period="rolling", days__isnull=False, days__gte=1, days__lte=366)
                    | (~Q(period="rolling") & Q(days=None))
                ),
                name="llm_budget_days",
                violation_error_message=_(
                    "Give days, 1 to 366, for “the last days”, and only for these."
                ),
            ),
            models.CheckConstraint(
                condition=Q(amount__gte=0),
                name="llm_budget_amount",
                violation_error_message=_("An amount is not negative."),
            ),
        )
        indexes = (models.Index(fields=["scope", "value"], name="llm_budget_place"),)

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.clean()
        if not self.is_active:
            self.counted_as = ""  # nothing is added while it is not: see count_if_needed
        if not self._state.adding and kwargs.get("update_fields") is None:
            # What is reserved is not written over by who changes a name.
            kwargs["update_fields"] = [
                field.name
                for field in self._meta.concrete_fields
                if not field.primary_key
                and (field.name not in _OWN or (field.name == "counted_as" and not self.is_active))
            ]
        super().save(*args, **kwargs)

    def clean(self) -> None:
        """Raises Django's ``ValidationError``, also from ``save``: a budget that means nothing
        would hold nothing."""
        if self.time_zone and self.time_zone not in available_timezones():
            raise ValidationError({"time_zone": _("Not a time zone, as Europe/Berlin is one.")})
        marks = self.thresholds
        if not isinstance(marks, list) or not all(
            isinstance(mark, int) and not isinstance(mark, bool) and 0 < mark <= 1000
            for mark in marks
        ):
            raise ValidationError(
                {"thresholds": _("Give a list of whole percents, as in [80, 100].")}
            )
        if not isinstance(self.emails, list):
            raise ValidationError({"emails": _("Give a list of addresses.")})
        for address in self.emails:
            try:
                validate_email(address)
            except (ValidationError, TypeError) as error:
                raise ValidationError({"emails": _("Give a list of addresses.")}) from error
        if not _is_amount(self.amount):
            raise ValidationError({"amount": _("Give 0 to %(most)s USD.") % {"most": MOST}})

    # --- time ---

    @property
    def zone(self) -> Any:
        return ZoneInfo(self.time_zone) if self.time_zone else timezone.get_default_timezone()

    def starts_at(self, at: datetime) -> datetime:
        """When the period of ``at`` began; of a rolling one the piece of it that ``at`` is in."""
        if self.period == Period.ROLLING:
            seconds = self.piece.total_seconds()
            return datetime.fromtimestamp(at.timestamp() // seconds * seconds, UTC)
        day = at.astimezone(self.zone).date()
        if self.period == Period.WEEK:
            day -= timedelta(days=day.weekday())
        elif self.period == Period.MONTH:
            day = day.replace(day=1)
        return datetime.combine(day, time.min, self.zone).astimezone(UTC)

    def renews_at(self, at: datetime) -> datetime | None:
        """When the next period begins. A rolling one never does as a whole."""
        if self.period == Period.ROLLING:
            return None
        day = self.starts_at(at).astimezone(self.zone).date()
        days = {Period.DAY: 1, Period.WEEK: 7, Period.MONTH: 32}[Period(self.period)]
        day += timedelta(days=days)
        if self.period == Period.MONTH:
            day = day.replace(day=1)
        return datetime.combine(day, time.min, self.zone).astimezone(UTC)

    @property
    def piece(self) -> timedelta:
        return timedelta(days=self.days or 1) / PIECES

    def since(self, now: datetime) -> datetime:
        """From when on what was spent counts: the start of its oldest tally."""
        if self.period == Period.ROLLING:
            return self.starts_at(now) - self.piece * PIECES
        return self.starts_at(now)

    # --- money ---

    def spent(self, now: datetime) -> Decimal:
        """USD in the period of ``now``, as far as it is settled."""
        self.count_if_needed(now)
        since = as_stored(self.since(now))
        is_rolling = self.period == Period.ROLLING
        of_now = self.tallies.filter(**{"starts_at__gte" if is_rolling else "starts_at": since})
        spent: Decimal | None = of_now.aggregate(total=Sum("spent"))["total"]
        return spent or Decimal(0)

    def standing(self, now: datetime | None = None) -> Standing:
        """What is spent, reserved and left, settled up to now."""
        from .settlement import settle  # as above

        using = self._state.db or "default"
        settle(using)
        now = now or timezone.now()
        self.refresh_from_db(using=using, fields=["reserved", "counted_as"])
        return Standing(self.amount, self.spent(now), self.reserved, self.renews_at(now))

    def count_if_needed(self, now: datetime) -> None:
        """Tallies are kept from the day on that there is a budget. Of what was spent before, and
        after its scope or period was changed, they are made from the ledger."""
        if self.counted_as != self._counts_as:
            self.count_anew(now)

    @property
    def _counts_as(self) -> str:
        parts = (self.scope, self.value, self.period, str(self.days or ""), str(self.zone))
        return " ".join(parts)[:400]

    def count_anew(self, now: datetime) -> None:
        """Make its tallies from the ledger, and the sum of its reservations from these."""
        using = self._state.db or "default"
        with transaction.atomic(using=using):
            type(self).objects.using(using).select_for_update(of=("self",)).get(pk=self.pk)
            self.tallies.all().delete()
            since = self.since(now)
            sums: dict[datetime, Decimal] = defaultdict(Decimal)
            entries = LedgerEntry.objects.using(using).filter(
                is_folded=True, at__gte=as_stored(since)
            )
            if self.scope in (Scope.PROVIDER, Scope.TENANT, Scope.USER, Scope.API_KEY):
                entries = entries.filter(**{self.scope: self.value})
            for entry in entries.order_by().values(*ENTRY_FIELDS).iterator(chunk_size=2000):
                if (self.scope, self.value) in places_of_entry(entry):
                    sums[self.starts_at(aware(entry["at"]))] += entry["spent"]
            Tally.objects.using(using).bulk_create(
                [
                    Tally(budget=self, starts_at=as_stored(at), spent=spent)
                    for at, spent in sums.items()
                ]
            )
            held = self.reservations.aggregate(total=Sum("amount"))["total"]
            self.reserved = held or Decimal(0)
            # One that is paused is counted once more when it is active again.
            self.counted_as = self._counts_as if self.is_active else ""
            type(self).objects.using(using).filter(pk=self.pk).update(
                reserved=self.reserved, counted_as=self.counted_as
            )

    # --- words ---

    @property
    def in_words(self) -> str:
        """Name, amount and what it is of."""
        period = {
            Period.DAY: "a day",
            Period.WEEK: "a week",
            Period.MONTH: "a month",
            Period.ROLLING: f"in {self.days} days",
        }[Period(self.period)]
        of = "" if self.scope == Scope.ALL else f", {self.scope.replace('_', ' ')} {self.value}"
        return f"“{self.name}” ({dollars(self.amount)} {period}{of})"

    def renewal_in_words(self, now: datetime) -> str:
        renews_at = self.renews_at(now)
        if renews_at is None:
            return "What was spent leaves it by and by."
        return f"It renews at {renews_at.astimezone(self.zone):%Y-%m-%d %H:%M %Z}."


@dataclass(frozen=True)
class Standing:
    """Of a budget, in USD."""

    amount: Decimal
    spent: Decimal
    reserved: Decimal
    renews_at: datetime | None

    @property
    def left(self) -> Decimal:
        """Less than nothing where an answer cost more than the most that was expected."""
        return self.amount - self.spent - self.reserved

    @property
    def percent(self) -> Decimal:
        """Of the amount that is spent."""
        return Decimal(100) if not self.amount else 100 * self.spent / self.amount


ENTRY_FIELDS = ("at", "provider", "model", "tenant", "user", "labels", "api_key", "spent")


def places_of_entry(entry: Mapping[str, Any]) -> set[Place]:
    names = ("provider", "model", "tenant", "user", "labels", "api_key")
    return places(**{name: entry[name] for name in names})


def note_spending(
    entries: Iterable[Mapping[str, Any]], locked: Sequence[Budget], *, now: datetime
) -> None:
    """Add what ``entries``, dictionaries of ``ENTRY_FIELDS``, cost to the tallies of the ``locked``
    budgets that they fall under."""
    by_place: dict[Place, list[Budget]] = defaultdict(list)
    for budget in locked:
        if budget.is_active:
            budget.count_if_needed(now)
            by_place[budget.scope, budget.value].append(budget)
    if not by_place:
        return
    sums: dict[tuple[int, datetime], Decimal] = defaultdict(Decimal)
    for entry in entries:
        for place in places_of_entry(entry):
            for budget in by_place.get(place, ()):
                sums[budget.pk, budget.starts_at(aware(entry["at"]))] += entry["spent"]
    tallies = Tally.objects.using(locked[0]._state.db)
    for (pk, starts_at), spent in sums.items():
        if spent and not tallies.filter(budget=pk, starts_at=as_stored(starts_at)).update(
            spent=F("spent") + usd(spent)
        ):
            tallies.create(budget_id=pk, starts_at=as_stored(starts_at), spent=spent)


def note_thresholds(budget: Budget, *, now: datetime) -> None:
    """Write down which thresholds of the locked ``budget`` are reached that were not before."""
    if not budget.thresholds and budget.action == Action.REFUSE:
        return
    using = budget._state.db or "default"
    spent = budget.spent(now)
    marks = set(budget.thresholds) | ({100} if budget.action == Action.ALERT else set())
    reached = [mark for mark in marks if spent and spent * 100 >= budget.amount * mark]
    if not reached:
        return
    starts_at = budget.starts_at(now)
    if budget.period == Period.ROLLING:
        length = (budget.piece * PIECES).total_seconds()
        starts_at = datetime.fromtimestamp(now.timestamp() // length * length, UTC)
    alerts = Alert.objects.using(using).filter(budget=budget, starts_at=starts_at)
    known = set(alerts.values_list("threshold", flat=True))
    new = [
        Alert(
            budget=budget,
            starts_at=starts_at,
            threshold=mark,
            spent=spent,
            amount=budget.amount,
            crossed_at=now,
        )
        for mark in sorted(reached)
        if mark not in known
    ]
    if new:
        Alert.objects.using(using).bulk_create(new)
        ring_on_commit(Bell.ALERT, using)


def _is_amount(value: Any) -> bool:
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        return False
    return amount.is_finite() and 0 <= amount <= MOST
