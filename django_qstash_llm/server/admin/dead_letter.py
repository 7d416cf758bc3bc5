from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ...qstash import InvalidOption
from ..exceptions import Refusal
from ..models import DeadLetter
from ..waiting import at
from . import text
from .filters import AnswerFilter, MessageAccountFilter
from .message import searched
from .record import CONFIRMED, RecordAdmin, Tool


@admin.register(DeadLetter)
class DeadLetterAdmin(RecordAdmin):
    actions = ("retry", "discard")
    account_filter = MessageAccountFilter
    account_field = "message__account"
    heavy_fields = (
        "response_header",
        "response_body",
        "message__body",
        "message__headers",
        "message__secrets",
    )
    list_display = ("dlq_id", "short_id", "url", "answer", "when")
    list_filter = (AnswerFilter, "created_at")
    list_select_related = ("message__queue",)
    search_fields = ("message__message_id",)
    search_help_text = gettext_lazy(
        "A message's id or how it begins, or part of its URL or labels."
    )
    ordering = ("-id",)
    sections = (
        (None, ("dlq_id", "message", "created_at", "full_url")),
        (
            gettext_lazy("Last answer"),
            ("response_status", "error", "shown_header", "shown_body"),
        ),
    )
    wide = ("full_url", "error", "shown_header", "shown_body")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return searched(queryset, search_term.strip(), prefix="message__"), False

    @admin.display(description=gettext_lazy("message"))
    def short_id(self, letter: DeadLetter) -> SafeString:
        return text.short_id(letter.message.message_id)

    @admin.display(description=gettext_lazy("went to"))
    def full_url(self, letter: DeadLetter) -> str:
        return letter.message.url

    @admin.display(description=gettext_lazy("went to"))
    def url(self, letter: DeadLetter) -> str:
        return text.excerpt(letter.message.url)

    @admin.display(description=gettext_lazy("last answer"))
    def answer(self, letter: DeadLetter) -> str:
        if letter.error or letter.response_status < 0:
            return text.excerpt(letter.error) or _("no response")
        return str(letter.response_status)

    @admin.display(description=gettext_lazy("given up at"))
    def when(self, letter: DeadLetter) -> str:
        return at(letter.created_at, timezone.now())

    @admin.display(description=gettext_lazy("response header"))
    def shown_header(self, letter: DeadLetter) -> SafeString:
        return text.as_header(letter.response_header)

    @admin.display(description=gettext_lazy("response body"))
    def shown_body(self, letter: DeadLetter) -> SafeString:
        return text.as_text(bytes(letter.response_body))

    def tools(self, obj: DeadLetter) -> list[Tool]:
        return [Tool("retry", _("Retry")), Tool("discard", _("Delete…"))]

    @admin.action(
        description=gettext_lazy("Retry the selected dead letters"), permissions=["change"]
    )
    def retry(self, request: HttpRequest, rows: QuerySet[DeadLetter]) -> None:
        count = 0
        letters = DeadLetter.objects.with_messages().without_answers()
        for pk in list(rows.values_list("pk", flat=True)):
            # One at a time: with their bodies they may be large.
            letter = letters.filter(pk=pk).first()
            if letter is None:
                continue
            try:
                letter.retry({}, now=timezone.now())
            except (InvalidOption, Refusal) as error:
                self.message_user(request, f"{letter}: {error}", messages.ERROR)
            else:
                count += 1
        if count:
            self.say(request, "%(count)d published again.", "%(count)d published again.", count)

    @admin.action(
        description=gettext_lazy("Delete the selected dead letters…"), permissions=["change"]
    )
    def discard(self, request: HttpRequest, rows: QuerySet[DeadLetter]) -> HttpResponse | None:
        if CONFIRMED not in request.POST:
            return self.confirm(
                request,
                rows,
                title=_("Delete dead letters?"),
                text=_("They cannot be retried any more: with them goes what a retry would need."),
            )
        count = DeadLetter.objects.filter(pk__in=rows.values("pk")).discard()
        self.say(
            request, "%(count)d dead letter deleted.", "%(count)d dead letters deleted.", count
        )
        return None
