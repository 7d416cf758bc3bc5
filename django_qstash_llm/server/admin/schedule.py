from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from .. import redaction
from ..models import Schedule
from ..waiting import at
from . import text
from .filters import PausedFilter
from .record import CONFIRMED, RecordAdmin, Tool


@admin.register(Schedule)
class ScheduleAdmin(RecordAdmin):
    actions = ("pause", "resume", "discard")
    heavy_fields = ("body", "headers", "secrets")
    list_display = (
        "short_id",
        "sign",
        "cron",
        "shown_destination",
        "next_time",
        "last_time",
        "shown_error",
    )
    list_filter = (PausedFilter,)
    search_fields = ("schedule_id", "destination")
    ordering = ("-id",)
    sections = (
        (None, ("schedule_id", "sign", "cron", "queue_name", "destination")),
        (gettext_lazy("When"), ("created_at", "last_at", "next_at", "last_message_ids", "error")),
        (gettext_lazy("What it publishes"), ("caller_ip", "shown_header", "shown_body")),
    )
    wide = ("destination", "last_message_ids", "error", "shown_header", "shown_body")

    @admin.display(description=gettext_lazy("state"))
    def sign(self, schedule: Schedule) -> SafeString | str:
        return text.badge("paused") if schedule.is_paused else _("open")

    @admin.display(description=gettext_lazy("publishes to"))
    def shown_destination(self, schedule: Schedule) -> str:
        return text.excerpt(schedule.destination)

    @admin.display(description=gettext_lazy("why nothing was published"))
    def shown_error(self, schedule: Schedule) -> str:
        return text.excerpt(schedule.error)

    @admin.display(description=gettext_lazy("schedule"))
    def short_id(self, schedule: Schedule) -> SafeString:
        return text.short_id(schedule.schedule_id)

    @admin.display(description=gettext_lazy("next"))
    def next_time(self, schedule: Schedule) -> str:
        return at(schedule.next_at, timezone.now()) if schedule.next_at else ""

    @admin.display(description=gettext_lazy("last"))
    def last_time(self, schedule: Schedule) -> str:
        return at(schedule.last_at, timezone.now()) if schedule.last_at else ""

    @admin.display(description=gettext_lazy("header"))
    def shown_header(self, schedule: Schedule) -> SafeString:
        header = {name: [value] for name, value in schedule.headers.items()}
        return text.as_header(redaction.redacted_header(header, schedule.options.redact))

    @admin.display(description=gettext_lazy("body"))
    def shown_body(self, schedule: Schedule) -> SafeString:
        redact = schedule.options.redact
        return text.as_text(redaction.redacted_body(bytes(schedule.body), redact))

    def tools(self, obj: Schedule) -> list[Tool]:
        first = Tool("resume", _("Resume")) if obj.is_paused else Tool("pause", _("Pause"))
        return [first, Tool("discard", _("Delete…"))]

    @admin.action(description=gettext_lazy("Pause the selected schedules"), permissions=["change"])
    def pause(self, request: HttpRequest, rows: QuerySet[Any]) -> HttpResponse | None:
        return self.use(
            request,
            rows.defer(None),
            lambda schedule: schedule.pause(),
            note=_("Paused."),
            one="%(count)d schedule paused.",
            many="%(count)d schedules paused.",
        )

    @admin.action(description=gettext_lazy("Resume the selected schedules"), permissions=["change"])
    def resume(self, request: HttpRequest, rows: QuerySet[Any]) -> HttpResponse | None:
        return self.use(
            request,
            rows.defer(None),
            lambda schedule: schedule.resume(now=timezone.now()),
            note=_("Resumed."),
            one="%(count)d schedule resumed.",
            many="%(count)d schedules resumed.",
        )

    @admin.action(
        description=gettext_lazy("Delete the selected schedules…"), permissions=["change"]
    )
    def discard(self, request: HttpRequest, rows: QuerySet[Any]) -> HttpResponse | None:
        if CONFIRMED not in request.POST:
            return self.confirm(
                request,
                rows,
                title=_("Delete schedules?"),
                text=_("They publish nothing any more. What they published goes on."),
            )
        return self.use(
            request,
            rows,
            lambda schedule: schedule.delete(),
            note=_("Deleted."),
            one="%(count)d schedule deleted.",
            many="%(count)d schedules deleted.",
        )
