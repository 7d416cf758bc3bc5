from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from ..models import LogEntry
from ..waiting import at
from . import text
from .filters import MessageAccountFilter, QueueFilter
from .message import searched
from .record import RecordAdmin


class MessageQueueFilter(QueueFilter):
    lookup = "message__queue"


@admin.register(LogEntry)
class LogEntryAdmin(RecordAdmin):
    actions = None
    account_filter = MessageAccountFilter
    account_field = "message__account"
    heavy_fields = ("message__body", "message__headers", "message__secrets")
    list_display = ("short_id", "when", "sign", "url", "answer")
    list_filter = ("state", "time", MessageQueueFilter)
    list_select_related = ("message",)
    search_fields = ("message__message_id",)
    search_help_text = _("A message's id or how it begins, or part of its URL or labels.")
    ordering = ("-id",)
    sections = (
        (None, ("message", "time", "sign", "full_url")),
        (
            _("What happened"),
            ("response_status", "next_delivery_at", "error", "shown_header", "shown_body"),
        ),
    )
    wide = ("full_url", "error", "shown_header", "shown_body")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return searched(queryset, search_term.strip(), prefix="message__"), False

    @admin.display(description=_("message"))
    def short_id(self, entry: LogEntry) -> SafeString:
        return text.short_id(entry.message.message_id)

    @admin.display(description=_("time"))
    def when(self, entry: LogEntry) -> str:
        return at(entry.time, timezone.now())

    @admin.display(description=_("state"))
    def sign(self, entry: LogEntry) -> SafeString:
        return text.badge(entry.state)

    @admin.display(description=_("goes to"))
    def url(self, entry: LogEntry) -> str:
        return text.excerpt(entry.message.url)

    @admin.display(description=_("goes to"))
    def full_url(self, entry: LogEntry) -> str:
        return entry.message.url

    @admin.display(description=_("answer"))
    def answer(self, entry: LogEntry) -> str:
        if entry.next_delivery_at is not None and entry.state == LogEntry.State.RETRY:
            return gettext("again at %s") % at(entry.next_delivery_at, timezone.now())
        if entry.error or entry.response_status is None:
            return text.excerpt(entry.error)
        return str(entry.response_status)

    @admin.display(description=_("response header"))
    def shown_header(self, entry: LogEntry) -> SafeString:
        return text.as_header(entry.response_header)

    @admin.display(description=_("response body"))
    def shown_body(self, entry: LogEntry) -> SafeString:
        return text.as_text(bytes(entry.response_body))
