from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ..counting import in_words, queues_with_lag
from ..models import Queue
from . import text
from .filters import PausedFilter
from .record import CONFIRMED, RecordAdmin, Tool


@admin.register(Queue)
class QueueAdmin(RecordAdmin):
    actions = ("pause", "resume", "discard")
    list_display = ("name", "sign", "parallelism", "shown_lag", "changed")
    list_filter = (PausedFilter,)
    search_fields = ("name",)
    sections = ((None, ("name", "sign", "parallelism", "shown_lag", "created_at", "updated_at")),)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Queue]:
        return queues_with_lag().order_by("name")

    @admin.display(description=gettext_lazy("state"))
    def sign(self, queue: Queue) -> SafeString | str:
        return text.badge("paused") if queue.is_paused else _("open")

    @admin.display(description=gettext_lazy("waiting and in flight"))
    def shown_lag(self, queue: Queue) -> str:
        return in_words(queue.lag)

    def tools(self, obj: Any) -> list[Tool]:
        first = Tool("resume", _("Resume")) if obj.is_paused else Tool("pause", _("Pause"))
        return [first, Tool("discard", _("Delete…"))]

    @admin.action(description=gettext_lazy("Pause the selected queues"), permissions=["change"])
    def pause(self, request: HttpRequest, rows: QuerySet[Queue]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda queue: queue.pause(now=timezone.now()),
            note=_("Paused."),
            one="%(count)d queue paused.",
            many="%(count)d queues paused.",
        )

    @admin.action(description=gettext_lazy("Resume the selected queues"), permissions=["change"])
    def resume(self, request: HttpRequest, rows: QuerySet[Queue]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda queue: queue.resume(now=timezone.now()),
            note=_("Resumed."),
            one="%(count)d queue resumed.",
            many="%(count)d queues resumed.",
        )

    @admin.action(description=gettext_lazy("Delete the selected queues…"), permissions=["change"])
    def discard(self, request: HttpRequest, rows: QuerySet[Queue]) -> HttpResponse | None:
        if CONFIRMED not in request.POST:
            return self.confirm(
                request,
                rows,
                title=_("Delete queues?"),
                text=_("What waits in them is cancelled; what is in flight may still arrive."),
            )
        return self.use(
            request,
            rows,
            lambda queue: queue.discard(now=timezone.now()),
            note=_("Deleted, with what waited in it."),
            one="%(count)d queue deleted.",
            many="%(count)d queues deleted.",
        )
