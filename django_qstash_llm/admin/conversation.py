"""Conversations, turn by turn."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count
from django.http import HttpRequest
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import Conversation, LLMRequest
from . import chat, figures, text
from .record import RecordAdmin

_MOST_TURNS = 30


@admin.register(Conversation)
class ConversationAdmin(RecordAdmin):
    list_display = ("title_column", "turns_column", "user", "created_column")
    list_select_related = ("user",)
    search_fields = ("title",)
    searched_name = "title"
    search_help_text = _("The conversation's UUID, or its exact title.")
    fields = (("uuid", "user", "created_at"),)
    heavy_fields = ("system",)

    def complete_page(self, request: HttpRequest, rows: list[Conversation]) -> None:
        counted = (
            LLMRequest.objects.filter(conversation__in=rows)
            .order_by()
            .values_list("conversation")
            .annotate(number=Count("pk"))
        )
        numbers = dict(counted)
        for conversation in rows:
            conversation.number_of_turns = numbers.get(conversation.pk, 0)  # type: ignore[attr-defined]

    @admin.display(description=_("conversation"))
    def title_column(self, conversation: Conversation) -> str:
        return str(conversation)

    @admin.display(description=_("turns"))
    def turns_column(self, conversation: Any) -> str:
        return figures.count(conversation.number_of_turns)

    @admin.display(description=_("begun"))
    def created_column(self, conversation: Conversation) -> SafeString | str:
        return figures.moment(conversation.created_at)

    def page(self, request: HttpRequest, obj: Conversation) -> dict[str, Any]:
        newest = list(obj.llm_requests.order_by("-id")[: _MOST_TURNS + 1])
        turns = newest[:_MOST_TURNS][::-1]
        return {
            "system": text.preformatted(obj.system) if obj.system else "",
            "turns": [
                (self.page_url(row), figures.state_sign(row.state), asked, answer, row)
                for row, asked, answer in chat.turns(turns)
            ],
            "has_earlier": len(newest) > _MOST_TURNS,
            "requests_url": self.list_url(LLMRequest, f"?conversation__id__exact={obj.pk}"),
        }
