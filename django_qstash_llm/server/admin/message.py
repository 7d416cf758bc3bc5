from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import Message
from ..waiting import at, reasons
from . import text
from .filters import QueueFilter, WaitsFilter
from .record import RecordAdmin, Tool

LENGTH = len("msg_") + 32
"""Of a message's id."""


@admin.register(Message)
class MessageAdmin(RecordAdmin):
    actions = ("cancel",)
    heavy_fields = ("body", "headers", "secrets")
    list_display = ("short_id", "sign", "destination", "reason", "created")
    list_filter = ("state", "kind", WaitsFilter, QueueFilter)
    list_select_related = ("queue",)
    search_fields = ("message_id",)
    search_help_text = _("A message's id or how it begins, or part of its URL or labels.")
    ordering = ("-id",)
    sections = (
        (None, ("message_id", "kind", "source", "sign", "attempt", "reason")),
        (
            _("Where it goes"),
            (
                "method",
                "url",
                "queue",
                "flow_control",
                "gate",
                "topic_name",
                "endpoint_name",
                "schedule_id",
                "labels",
                "caller_ip",
            ),
        ),
        (
            _("When"),
            ("created_at", "not_before", "due_at", "finished_at", "timeout", "interruptions"),
        ),
        (_("What it says"), ("shown_header", "shown_body")),
    )
    wide = ("reason", "url", "labels", "shown_header", "shown_body")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return searched(queryset, search_term.strip()), False

    def complete_page(self, request: HttpRequest, rows: list[Message]) -> None:
        found = reasons(rows, now=timezone.now())
        for row in rows:
            row.reason = found[row.pk]  # type: ignore[attr-defined]

    @admin.display(description=_("message"))
    def short_id(self, message: Message) -> SafeString:
        is_plain = message.kind == Message.Kind.MESSAGE
        return text.short_id(message.message_id, "" if is_plain else message.get_kind_display())

    @admin.display(description=_("state"))
    def sign(self, message: Message) -> SafeString:
        return text.badge(message.state)

    @admin.display(description=_("goes to"))
    def destination(self, message: Message) -> str:
        return f"{message.method} {text.excerpt(message.url)}"

    @admin.display(description=_("created"))
    def created(self, message: Message) -> str:
        return at(message.created_at, timezone.now())

    @admin.display(description=_("attempt"))
    def attempt(self, message: Message) -> str:
        words = {"number": message.retried + 1, "most": message.retries + 1}
        return _("%(number)s of %(most)s") % words

    @admin.display(description=_("waits for"))
    def reason(self, message: Any) -> str:
        if not hasattr(message, "reason"):
            self.complete_page(None, [message])  # type: ignore[arg-type]
        return str(message.reason)

    @admin.display(description=_("header"))
    def shown_header(self, message: Message) -> SafeString:
        return text.as_header(message.shown_header)

    @admin.display(description=_("body"))
    def shown_body(self, message: Message) -> SafeString | str:
        if message.is_purged:
            return str(_("Gone: it was finished so long ago."))
        return text.as_text(message.shown_body)

    def tools(self, obj: Message) -> list[Tool]:
        is_over = obj.finished_at is not None or obj.is_cancelling
        return [] if is_over else [Tool("cancel", _("Cancel"))]

    @admin.action(description=_("Cancel the selected messages"), permissions=["change"])
    def cancel(self, request: HttpRequest, rows: QuerySet[Message]) -> HttpResponse | None:
        chosen = Message.objects.filter(pk__in=rows.values("pk"))
        count = chosen.cancel(now=timezone.now())
        self.say(request, "%(count)d message cancelled.", "%(count)d messages cancelled.", count)
        return self.back(request, rows.first())


def searched(rows: QuerySet[Any], term: str, *, prefix: str = "") -> QuerySet[Any]:
    """By id, which has an index, or by part of the URL or the labels, which have none."""
    if not term:
        return rows
    if term.startswith("msg_"):
        # With regard to case: without it each row's would be looked at.
        lookup = "message_id" if len(term) == LENGTH else "message_id__startswith"
        return rows.filter(**{f"{prefix}{lookup}": term})
    is_part = Q(**{f"{prefix}url__icontains": term}) | Q(**{f"{prefix}labels__icontains": term})
    return rows.filter(is_part)
