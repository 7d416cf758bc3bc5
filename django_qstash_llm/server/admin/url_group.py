from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..models import UrlGroup
from . import text
from .record import CONFIRMED, RecordAdmin, Tool

MOST_SHOWN = 3
"""Endpoints of one group in the list."""


@admin.register(UrlGroup)
class UrlGroupAdmin(RecordAdmin):
    actions = ("discard",)
    heavy_fields = ("headers", "secrets")
    list_display = ("name", "some_endpoints", "changed")
    search_fields = ("name",)
    ordering = ("name",)
    sections = ((None, ("name", "created_at", "updated_at", "all_endpoints", "shown_header")),)
    wide = ("all_endpoints", "shown_header")

    def get_queryset(self, request: HttpRequest) -> QuerySet[UrlGroup]:
        return UrlGroup.objects.with_endpoints()

    @admin.display(description=gettext_lazy("endpoints"))
    def some_endpoints(self, group: UrlGroup) -> SafeString | str:
        endpoints = list(group.endpoints.all())
        shown = _as_lines(endpoints[:MOST_SHOWN])
        more = len(endpoints) - MOST_SHOWN
        return format_html(_("{}<br>and {} more"), shown, more) if more > 0 else shown

    @admin.display(description=gettext_lazy("endpoints"))
    def all_endpoints(self, group: UrlGroup) -> SafeString:
        return _as_lines(list(group.endpoints.all()))

    @admin.display(description=gettext_lazy("header that each message gets"))
    def shown_header(self, group: UrlGroup) -> SafeString:
        return text.as_header({name: [value] for name, value in group.headers.items()})

    def tools(self, obj: UrlGroup) -> list[Tool]:
        return [Tool("discard", _("Delete…"))]

    @admin.action(
        description=gettext_lazy("Delete the selected URL groups…"), permissions=["change"]
    )
    def discard(self, request: HttpRequest, rows: QuerySet[Any]) -> HttpResponse | None:
        if CONFIRMED not in request.POST:
            return self.confirm(
                request,
                rows,
                title=_("Delete URL groups?"),
                text=_("What is published to them from now on is refused."),
            )
        return self.use(
            request,
            rows,
            lambda group: group.delete(),
            note=_("Deleted."),
            one="%(count)d URL group deleted.",
            many="%(count)d URL groups deleted.",
        )


def _as_lines(endpoints: list[Any]) -> SafeString:
    return format_html_join(
        SafeString("<br>"),
        "{}{}",
        ((f"{each.name}: " if each.name else "", text.excerpt(each.url)) for each in endpoints),
    )
