"""What happened, to look at. The record is not edited; the actions call one verb each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from ..qstash import InvalidOption
from . import redaction
from .exceptions import Refusal
from .models import DeadLetter, LogEntry, Message, Queue

LARGEST_SHOWN = 20_000


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Foreign text everywhere: it is shown as text, never as markup."""

    list_per_page = 50
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # The actions change something; the form must not.
        return obj is None and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def say(self, request: HttpRequest, one: str, many: str, count: int) -> None:
        self.message_user(request, ngettext(one, many, count) % {"count": count}, messages.SUCCESS)


def as_text(body: bytes) -> SafeString:
    text = body[:LARGEST_SHOWN].decode("utf-8", "backslashreplace")
    return format_html("<pre>{}</pre>{}", text, "…" if len(body) > LARGEST_SHOWN else "")


def as_header(header: Mapping[str, list[str]]) -> SafeString:
    shown = json.dumps(redaction.without_secrets(header), indent=2)
    return format_html("<pre>{}</pre>", shown)


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin):
    actions = ("cancel",)
    list_display = (
        "message_id",
        "kind",
        "state",
        "method",
        "url",
        "retried",
        "queue",
        "created_at",
    )
    list_filter = ("state", "kind", "queue")
    list_select_related = ("queue",)
    search_fields = ("=message_id", "url", "labels")
    date_hierarchy = "created_at"
    ordering = ("-id",)
    fields = (
        "message_id",
        "kind",
        "source",
        "state",
        "method",
        "url",
        "shown_header",
        "shown_body",
        "queue",
        "labels",
        "flow_control_key",
        "caller_ip",
        "retried",
        "retries",
        "timeout",
        "interruptions",
        "created_at",
        "not_before",
        "due_at",
        "finished_at",
        "claimed_by",
    )
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[Message]:
        rows: QuerySet[Message] = super().get_queryset(request)
        # A list of prompts would be a lot to load for a column that is not there.
        return rows.defer("body") if request.resolver_match and self.is_list(request) else rows

    def is_list(self, request: HttpRequest) -> bool:
        match = request.resolver_match
        return bool(match and match.url_name and match.url_name.endswith("_changelist"))

    @admin.display(description=_("header"))
    def shown_header(self, message: Message) -> SafeString:
        redact = message.wire.options.redact
        return as_header(redaction.redacted_header(message.header, redact))

    @admin.display(description=_("body"))
    def shown_body(self, message: Message) -> SafeString:
        return as_text(redaction.redacted_body(bytes(message.body), message.wire.options.redact))

    @admin.action(description=_("Cancel the selected messages"), permissions=["change"])
    def cancel(self, request: HttpRequest, rows: QuerySet[Message]) -> None:
        chosen = Message.objects.filter(pk__in=rows.values("pk"))
        count = chosen.cancel(now=timezone.now())
        self.say(request, "%(count)d message cancelled.", "%(count)d messages cancelled.", count)


@admin.register(LogEntry)
class LogEntryAdmin(ReadOnlyAdmin):
    actions = None
    list_display = ("time", "message_id", "state", "url", "response_status", "error")
    list_filter = ("state", "queue_name")
    search_fields = ("=message_id", "url", "labels")
    date_hierarchy = "time"
    ordering = ("-id",)
    fields = (
        "time",
        "message_id",
        "state",
        "url",
        "queue_name",
        "labels",
        "flow_control_key",
        "caller_ip",
        "error",
        "next_delivery_at",
        "response_status",
        "shown_header",
        "shown_body",
        "details",
    )
    readonly_fields = fields

    @admin.display(description=_("response header"))
    def shown_header(self, entry: LogEntry) -> SafeString:
        return as_header(entry.response_header)

    @admin.display(description=_("response body"))
    def shown_body(self, entry: LogEntry) -> SafeString:
        return as_text(bytes(entry.response_body))


@admin.register(DeadLetter)
class DeadLetterAdmin(ReadOnlyAdmin):
    actions = ("retry", "discard")
    list_display = ("dlq_id", "message", "url", "response_status", "error", "created_at")
    list_filter = ("response_status",)
    list_select_related = ("message__queue",)
    search_fields = ("=message__message_id", "message__url", "message__labels")
    date_hierarchy = "created_at"
    ordering = ("-id",)
    fields = (
        "dlq_id",
        "message",
        "url",
        "created_at",
        "response_status",
        "error",
        "shown_header",
        "shown_body",
    )
    readonly_fields = fields

    @admin.display(description=_("url"))
    def url(self, letter: DeadLetter) -> str:
        return letter.message.url

    @admin.display(description=_("response header"))
    def shown_header(self, letter: DeadLetter) -> SafeString:
        return as_header(letter.response_header)

    @admin.display(description=_("response body"))
    def shown_body(self, letter: DeadLetter) -> SafeString:
        return as_text(bytes(letter.response_body))

    @admin.action(description=_("Retry the selected dead letters"), permissions=["change"])
    def retry(self, request: HttpRequest, rows: QuerySet[DeadLetter]) -> None:
        count = 0
        for letter in DeadLetter.objects.with_messages().filter(pk__in=rows.values("pk")):
            try:
                letter.retry({}, now=timezone.now())
            except (InvalidOption, Refusal) as error:
                self.message_user(request, f"{letter}: {error}", messages.ERROR)
            else:
                count += 1
        self.say(request, "%(count)d published again.", "%(count)d published again.", count)

    @admin.action(description=_("Delete the selected dead letters"), permissions=["change"])
    def discard(self, request: HttpRequest, rows: QuerySet[DeadLetter]) -> None:
        count = DeadLetter.objects.filter(pk__in=rows.values("pk")).discard()
        self.say(
            request, "%(count)d dead letter deleted.", "%(count)d dead letters deleted.", count
        )


@admin.register(Queue)
class QueueAdmin(ReadOnlyAdmin):
    actions = ("pause", "resume")
    list_display = ("name", "parallelism", "is_paused", "lag", "created_at", "updated_at")
    list_filter = ("is_paused",)
    search_fields = ("name",)
    fields = ("name", "parallelism", "is_paused", "lag", "created_at", "updated_at")
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[Queue]:
        return Queue.objects.standing().with_lag()

    @admin.display(description=_("waiting"))
    def lag(self, queue: Queue) -> int:
        return queue.lag

    @admin.action(description=_("Pause the selected queues"), permissions=["change"])
    def pause(self, request: HttpRequest, rows: QuerySet[Queue]) -> None:
        for queue in rows:
            queue.pause(now=timezone.now())
        self.say(request, "%(count)d queue paused.", "%(count)d queues paused.", len(rows))

    @admin.action(description=_("Resume the selected queues"), permissions=["change"])
    def resume(self, request: HttpRequest, rows: QuerySet[Queue]) -> None:
        for queue in rows:
            queue.resume(now=timezone.now())
        self.say(request, "%(count)d queue resumed.", "%(count)d queues resumed.", len(rows))
