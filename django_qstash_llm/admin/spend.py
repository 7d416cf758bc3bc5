"""What was spent: totals by what is chosen, and a chart by day or month and model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import models
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..exceptions import InvalidRequest
from ..models import ApiKey, Budget, LedgerEntry, Spend
from ..models.ledger import Total, day_of
from ..models.message_count import COUNTED
from ..models.spend import DIMENSIONS, Dimension
from ..reports import Report, cost_of_messages, csv_headers, shown
from . import figures, text
from .chart import Chart
from .record import RecordAdmin

MOST_LINES = 200
BY_DAY = timedelta(days=62)
"""Up to here the chart has a bar for each day, beyond for each month."""
MONTHS_BEFORE = 11
TIMES = (("", _("all of it")), ("month", _("month")), ("day", _("day")))
PARTS = (
    ("", _("nothing else")),
    ("provider", _("provider")),
    ("model", _("model")),
    *((each.value, each.label) for each in Dimension if each.value),
)
LABELS: dict[str, Any] = {**dict(TIMES), **dict(PARTS)}


@admin.register(Spend)
class SpendAdmin(RecordAdmin):
    """No list of rows: each is in several, and adding them up is what the page is for."""

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_urls(self) -> list[Any]:
        meta = self.model._meta
        name = f"{meta.app_label}_{meta.model_name}"
        wrap = self.admin_site.admin_view
        # None for one row: it would say little and be taken for all.
        return [
            path("", wrap(self.changelist_view), name=f"{name}_changelist"),
            path("csv/", wrap(self.csv_view), name=f"{name}_csv"),
        ]

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        given = _given(request.GET)
        problem, report = "", Report()
        try:
            report = Report.asked(given)
        except InvalidRequest as error:
            problem = f"{error.field}: {error.problem}"
        context = {
            **self.admin_site.each_context(request),
            "title": _("What was spent"),
            "opts": self.opts,
            "media": self.media,
            "problem": problem,
            "form": _form(given),
            "links": self._links(request),
            **({} if problem else self._answer(report, given)),
            **(extra_context or {}),
        }
        request.current_app = self.admin_site.name
        template = "admin/django_qstash_llm/spend/change_list.html"
        return TemplateResponse(request, template, context, status=400 if problem else 200)

    def csv_view(self, request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        try:
            report = Report.asked(_given(request.GET))
        except InvalidRequest as error:
            return HttpResponse(str(error), status=400, content_type="text/plain")
        return StreamingHttpResponse(report.csv(), headers=csv_headers(report))

    def _links(self, request: HttpRequest) -> list[tuple[Any, str]]:
        models_ = [
            each
            for each in (LedgerEntry, Budget)
            if self.admin_site.is_registered(each)
            and self.admin_site.get_model_admin(each).has_view_permission(request)
        ]
        return [(each._meta.verbose_name_plural, self.list_url(each)) for each in models_]

    def _answer(self, report: Report, given: Mapping[str, str]) -> dict[str, Any]:
        lines, messages = report.lines, report.messages
        chart = _chart(report)
        names = _names(report, lines[:MOST_LINES])
        return {
            "report": report,
            "headings": [LABELS[name] for name in report.by],
            "lines": [
                ([_cell(name, value, names) for name, value in of.items()], _cells(total))
                for of, total in lines[:MOST_LINES]
            ],
            "left_out": max(len(lines) - MOST_LINES, 0),
            "total": _cells(report.total),
            "labels_overlap": "label" in report.by and not report.place,
            "chart": chart,
            "chart_heading": _("day") if _is_by_day(report) else _("month"),
            # "messages" are Django's own.
            "qstash": [
                (_MESSAGES[name], figures.count(getattr(messages, name))) for name in COUNTED
            ],
            "qstash_total": figures.count(messages.total),
            "qstash_cost": figures.amount(cost_of_messages(messages)),
            "is_qstash_counted": messages.is_complete,
            "csv_url": f"csv/?{urlencode(given)}",
        }


_MESSAGES = {
    "published": _("published, enqueued or of a batch"),
    "retries": _("retries"),
    "callbacks": _("callbacks"),
    "failure_callbacks": _("failure callbacks"),
}


def _given(asked: Any) -> dict[str, str]:
    """The form's texts by the names of a report. By default the last twelve months, as far as nothing
    says otherwise."""
    given = {name: ",".join(filter(None, asked.getlist(name))) for name in asked}
    of, value = given.pop("of", ""), given.pop("value", "")
    if of and value:
        given[of] = value
    if "by" not in given:
        given["by"] = "month,model"
    if "from" not in given:
        given["from"] = _months_before(day_of(timezone.now()), MONTHS_BEFORE).isoformat()
    return {name: text_ for name, text_ in given.items() if text_}


def _months_before(day: date, months: int) -> date:
    month = day.year * 12 + day.month - 1 - months
    return date(month // 12, month % 12 + 1, 1)


def _form(given: Mapping[str, str]) -> dict[str, Any]:
    by = given.get("by", "").split(",")
    place = next((name for name in DIMENSIONS if given.get(name)), "")
    return {
        "since": given.get("from", ""),
        "until": given.get("to", ""),
        "times": [(value, label, value in by) for value, label in TIMES],
        "parts": [(value, label, value in by) for value, label in PARTS],
        "providers": [
            (name, name == given.get("provider"))
            for name in sorted({*app_settings().providers, "upstash", given.get("provider", "")})
            if name
        ],
        "model": given.get("model", ""),
        "places": [(value, LABELS[value], value == place) for value in DIMENSIONS],
        "value": given.get(place, "") if place else "",
    }


def _is_by_day(report: Report) -> bool:
    if report.since is None:
        return False
    return (report.until or day_of(timezone.now())) - report.since <= BY_DAY


def _chart(report: Report) -> Chart:
    time = "day" if _is_by_day(report) else "month"
    return Chart.of(
        [(shown(time, of[time]), of["model"], total) for of, total in report.split(time, "model")]
    )


def _names(report: Report, lines: Any) -> dict[str, str]:
    """Of users and API keys, which are known by their keys, in one query."""
    rows: dict[str, type[models.Model]] = {"user": get_user_model(), "api_key": ApiKey}
    dimension = next((name for name in rows if name in report.by), "")
    if not dimension:
        return {}
    model, field = rows[dimension], rows[dimension]._meta.pk
    keys = []
    for of, _total in lines:
        try:
            keys.append(field.to_python(of[dimension]))
        except ValidationError:
            continue  # users had other keys in those days
    return {str(row.pk): str(row) for row in model._base_manager.filter(pk__in=keys)}


def _cell(name: str, value: Any, names: Mapping[str, str]) -> str:
    if name in ("user", "api_key"):
        return f"{names[value]} ({value})" if value in names else str(value)
    return text.excerpt(shown(name, value), 120) or figures.UNKNOWN


def _cells(total: Total) -> list[Any]:
    return [
        figures.total(total),
        figures.amount(total.useful) if total.cost is not None else figures.UNKNOWN,
        *map(figures.count, (total.answers, total.input_tokens, total.output_tokens)),
    ]
