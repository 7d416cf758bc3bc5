"""Budgets: how much of each is spent, reserved and left, and where it is going."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.auth import get_user_model
from django.core.exceptions import ObjectDoesNotExist, ValidationError
from django.core.validators import validate_email
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..models import ApiKey, Budget
from ..models.budget import Action, Period, Scope, Standing, default_thresholds
from ..models.standing import forecast, standings
from ..reports import usd_text
from . import actions, figures
from .record import MadeByPeople, Tool

MOST_ALERTS = 20
DECIMALS = 4
"""Of figures among others; on its own page a budget's are whole."""


class ListField(forms.CharField):
    """A list as a person types it: with commas, spaces or lines between, or as JSON."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("encoder", None), kwargs.pop("decoder", None)
        super().__init__(**{"required": False, **kwargs})

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        if isinstance(value, list):  # what the model has from the start
            return value
        text = str(value or "").strip()
        if not text.startswith("["):
            return [each for each in text.replace(",", " ").replace(";", " ").split() if each]
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise ValidationError(
                gettext("This begins as JSON and is none: close it, or leave the brackets out.")
            ) from error

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return bool(self.clean(data) != (initial or []))
        except ValidationError:
            return True


class ThresholdsField(ListField):
    """Whole percents."""

    def to_python(self, value: Any) -> Any:
        marks: list[int] = []
        for each in super().to_python(value):
            text = str(each).removesuffix("%")
            if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 1000:
                # A sign by itself, as in “80 %”, belongs to the number before it.
                if not text and marks:
                    continue
                raise ValidationError(
                    gettext(
                        "“%(text)s” is no percent: give whole numbers of 1 to 1000, as in 50, 80, 100."
                    )
                    % {"text": str(each)[:40]}
                )
            marks.append(int(text))
        return sorted(set(marks))


class EmailsField(ListField):
    def to_python(self, value: Any) -> Any:
        addresses = super().to_python(value)
        for address in addresses:
            try:
                validate_email(address)
            except (ValidationError, TypeError) as error:
                raise ValidationError(
                    gettext("“%(text)s” is no e-mail address.") % {"text": str(address)[:80]}
                ) from error
        return addresses


class BudgetForm(forms.ModelForm):  # type: ignore[type-arg]
    thresholds = ThresholdsField(
        label=_("Thresholds"),
        initial=default_thresholds,
        help_text=_(
            "Percent of the amount, as in “50, 80, 100”; each alerts once in a period, when that much is "
            "spent."
        ),
    )
    emails = EmailsField(
        label=_("E-mail addresses"),
        help_text=_("Who is told of them, with commas between. The log and the signal always are."),
    )

    class Meta:
        model = Budget
        fields = (
            *("name", "is_active", "amount", "period", "days", "time_zone", "scope", "value"),
            *("action", "thresholds", "emails"),
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        amount = self.initial.get("amount")
        if isinstance(amount, Decimal):
            self.initial["amount"] = usd_text(amount)  # without the zeros of the column

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        scope, value = given.get("scope"), (given.get("value") or "").strip()
        if scope == Scope.ALL and value:
            self.add_error(
                "value", _("A budget of everything is of nothing in particular: leave it empty.")
            )
        elif scope and scope != Scope.ALL and not value:
            label = Scope(scope).label
            self.add_error("value", _("Say which %(what)s it is of.") % {"what": label})
        elif scope and value:
            given["value"] = self._known(scope, value)
        period, days = given.get("period"), given.get("days")
        if period == Period.ROLLING and not (days and 1 <= days <= 366):
            self.add_error("days", _("Say how many: 1 to 366."))
        elif period and period != Period.ROLLING and days is not None:
            self.add_error("days", _("Only for “the last days”: leave it empty."))
        return given

    def _known(self, scope: str, value: str) -> str:
        """The value as requests are compared with it: people know a user's name, and not their key."""
        if scope == Scope.PROVIDER:
            known = sorted({*app_settings().providers, "upstash"})
            if value not in known:
                self.add_error(
                    "value", _("There is no such provider; there are: %s.") % ", ".join(known)
                )
        if scope == Scope.USER:
            return self._key_of(get_user_model()._default_manager.all(), value, _("user"))
        if scope == Scope.API_KEY:
            return self._key_of(ApiKey.objects.all(), value, _("API key"))
        return value

    def _key_of(self, rows: QuerySet[Any], value: str, what: Any) -> str:
        name = "name" if rows.model is ApiKey else rows.model.USERNAME_FIELD
        try:
            return str(rows.get(**{name: value}).pk)
        except (ObjectDoesNotExist, rows.model.MultipleObjectsReturned):
            pass
        try:
            return str(rows.get(pk=value).pk)
        except (ObjectDoesNotExist, ValueError, ValidationError):
            self.add_error(
                "value", _("There is no such %(what)s: give its name, or its id.") % {"what": what}
            )
        return value


@admin.register(Budget)
class BudgetAdmin(MadeByPeople):
    form = BudgetForm
    list_display = (
        "name_column",
        "of_column",
        "gauge_column",
        "time_column",
    )
    list_filter = ("is_active", "scope", "period", "action")
    search_fields = ("name", "value")
    ordering = ("name",)
    fieldsets = (
        (None, {"fields": (("name", "is_active"), ("amount", "action"))}),
        (_("When"), {"fields": (("period", "days"), "time_zone")}),
        (_("Of what"), {"fields": (("scope", "value"),)}),
        (_("Telling"), {"fields": ("thresholds", "emails")}),
    )
    actions = ("count_anew", "pause", "activate")

    def complete_page(self, request: HttpRequest, rows: list[Budget]) -> None:
        now = timezone.now()
        found = standings(rows, now=now)
        for row in rows:
            row.standing_now = found[row.pk]  # type: ignore[attr-defined]
            expected = forecast(row, found[row.pk], now) if row.is_active else None
            row.forecast_now = expected  # type: ignore[attr-defined]
            row.now = now  # type: ignore[attr-defined]

    # --- the list ---

    @admin.display(description=_("budget"))
    def name_column(self, budget: Budget) -> SafeString:
        amount = figures.money(budget.amount)
        return format_html(
            '{}<br><span class="llm-quiet">{} · {}{}</span>',
            budget.name,
            amount,
            _period(budget),
            "" if budget.is_active else f" · {gettext('paused')}",
        )

    @admin.display(description=_("of · then"))
    def of_column(self, budget: Budget) -> SafeString:
        then = gettext("refuses") if budget.action == Action.REFUSE else gettext("alerts only")
        return format_html('{}<br><span class="llm-quiet">{}</span>', _of(budget), then)

    # Two lines a cell: the menu and the filter leave little room beside them.

    @admin.display(description=_("spent, reserved and left"))
    def gauge_column(self, budget: Any) -> SafeString:
        standing = budget.standing_now
        left = figures.amount(standing.left, decimals=DECIMALS)
        return format_html(
            '<div class="llm-progress">{}{}<br>{}</div>',
            gauge(standing),
            _in_words(standing),
            format_html(gettext("{} left"), left),
        )

    @admin.display(description=_("forecast"))
    def time_column(self, budget: Any) -> SafeString:
        """The forecast is of the whole period, at the pace of what is gone of it."""
        renewal = format_html(gettext("renews {}"), _renewal(budget))
        return format_html('{}<br><span class="llm-quiet">{}</span>', _forecast(budget), renewal)

    # --- the page ---

    def page(self, request: HttpRequest, obj: Any) -> dict[str, Any]:
        self.complete_page(request, [obj])
        standing: Standing = obj.standing_now
        rows = (
            (_("amount"), figures.amount(standing.amount)),
            (_("spent"), figures.amount(standing.spent)),
            (_("reserved for requests under way"), figures.amount(standing.reserved)),
            (_("left"), figures.amount(standing.left)),
            (_("forecast for the period, at this pace"), _forecast(obj)),
            (_("renews"), _renewal(obj)),
        )
        return {
            "gauge": gauge(standing),
            "in_words": _in_words(standing),
            "rows": rows,
            "is_paused": not obj.is_active,
            "alerts": [
                (
                    f"{alert.threshold} %",
                    figures.amount(alert.spent),
                    figures.amount(alert.amount),
                    figures.moment(alert.crossed_at),
                    figures.moment(alert.told_at),
                )
                for alert in obj.alerts.order_by("-id")[:MOST_ALERTS]
            ],
        }

    # --- what can be done ---

    def tools(self, obj: Budget) -> list[Tool]:
        switch = Tool("pause", _("Pause")) if obj.is_active else Tool("activate", _("Activate"))
        return [Tool("count_anew", _("Count anew")), switch]

    @admin.action(
        permissions=["act"],
        description=_("Count anew what was spent of selected %(verbose_name_plural)s"),
    )
    def count_anew(self, request: HttpRequest, queryset: QuerySet[Budget]) -> HttpResponse | None:
        now = timezone.now()
        counted = list(queryset)
        for budget in counted:
            budget.count_anew(now)
            self.log_change(request, budget, str(_("Counted anew.")))
        sentence = ngettext(
            "%d budget was counted anew.", "%d budgets were counted anew.", len(counted)
        )
        self.message_user(request, sentence % len(counted), messages.SUCCESS)
        return actions.back_to_page(self, request, counted[0] if counted else None)

    @admin.action(permissions=["act"], description=_("Pause selected %(verbose_name_plural)s"))
    def pause(self, request: HttpRequest, queryset: QuerySet[Budget]) -> HttpResponse | None:
        paused = self._switch(request, queryset, is_active=False)
        sentence = ngettext("%d budget is paused.", "%d budgets are paused.", paused)
        self.message_user(request, sentence % paused, messages.SUCCESS)
        return actions.back_to_page(self, request, queryset.first())

    @admin.action(permissions=["act"], description=_("Activate selected %(verbose_name_plural)s"))
    def activate(self, request: HttpRequest, queryset: QuerySet[Budget]) -> HttpResponse | None:
        activated = self._switch(request, queryset, is_active=True)
        sentence = ngettext("%d budget is active again.", "%d budgets are active again.", activated)
        self.message_user(request, sentence % activated, messages.SUCCESS)
        return actions.back_to_page(self, request, queryset.first())

    def _switch(self, request: HttpRequest, queryset: QuerySet[Budget], *, is_active: bool) -> int:
        budgets = list(queryset.exclude(is_active=is_active))
        for budget in budgets:
            budget.is_active = is_active
            budget.save()
            said = _("Activated.") if is_active else _("Paused.")
            self.log_change(request, budget, str(said))
        return len(budgets)


def gauge(standing: Standing) -> SafeString:
    """Of the amount what is spent and what is reserved. The figures stand beside it as text."""
    whole = max(standing.amount, standing.spent + standing.reserved, Decimal("1e-12"))
    spent = 100 * max(standing.spent, Decimal(0)) / whole
    reserved = 100 * standing.reserved / whole
    limit = 100 * standing.amount / whole
    level = "over" if standing.left < 0 else "high" if standing.percent >= 80 else "fine"
    title = gettext("%(spent)s spent and %(reserved)s reserved of %(amount)s") % {
        "spent": figures.money(standing.spent),
        "reserved": figures.money(standing.reserved),
        "amount": figures.money(standing.amount),
    }
    return format_html(
        '<svg class="llm-bar" role="img" width="100%" height="12" viewBox="0 0 100 8"'
        ' preserveAspectRatio="none"><title>{}</title>'
        '<rect class="llm-bar-empty" width="100" height="8" fill="#ccc"></rect>'
        '<rect class="llm-gauge-{}" width="{}" height="8"></rect>'
        '<rect class="llm-gauge-reserved" x="{}" width="{}" height="8"></rect>'
        '<rect class="llm-gauge-limit" x="{}" width="0.6" height="8"></rect></svg>',
        title,
        level,
        f"{spent:.3f}",
        f"{spent:.3f}",
        f"{reserved:.3f}",
        f"{min(limit, Decimal('99.4')):.3f}",
    )


def _in_words(standing: Standing) -> SafeString:
    """The gauge's figures."""
    percent = f"{standing.percent:.0f} %" if standing.amount else figures.UNKNOWN
    spent = figures.amount(standing.spent, decimals=DECIMALS)
    sentence = format_html(gettext("{} spent ({})"), spent, percent)
    if not standing.reserved:
        return sentence
    return format_html(
        gettext("{}, {} reserved"), sentence, figures.amount(standing.reserved, decimals=DECIMALS)
    )


def _renewal(budget: Any) -> SafeString | str:
    if budget.standing_now.renews_at is None:
        return gettext("by and by")
    return figures.moment(budget.standing_now.renews_at, now=budget.now)


def _forecast(budget: Any) -> SafeString | str:
    expected: Decimal | None = budget.forecast_now
    if expected is None:
        return figures.UNKNOWN
    shown = figures.amount(expected, decimals=2)
    if expected <= budget.amount:
        return shown
    return format_html('<span class="llm-over">{}<br>{}</span>', shown, gettext("over it"))


def _period(budget: Budget) -> str:
    if budget.period == Period.ROLLING:
        days = budget.days or 0
        return ngettext("the last %d day", "the last %d days", days) % days
    return str(budget.get_period_display())


def _of(budget: Budget) -> str:
    scope = str(budget.get_scope_display())
    return scope if budget.scope == Scope.ALL else f"{scope} {budget.value}"
