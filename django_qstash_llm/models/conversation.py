"""``Conversation``: a chat session whose history is its completed requests."""

from __future__ import annotations

import uuid as uuids
from typing import Any

from django.conf import settings
from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from .request import LLMRequest, State


class Conversation(models.Model):
    uuid = models.UUIDField(_("uuid"), default=uuids.uuid4, unique=True, editable=False)
    title = models.CharField(_("title"), max_length=255, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_conversations",
        verbose_name=_("user"),
    )
    system = models.TextField(_("system prompt"), blank=True)
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    class Meta:
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.title or str(self.uuid)

    def history(self) -> list[dict[str, Any]]:
        """The messages so far, in the order they were asked: each question with its answer."""
        messages: list[dict[str, Any]] = []
        # A forgotten question cannot be repeated, nor can its answer without it.
        completed = self.llm_requests.completed().exclude(messages=[]).order_by("id")
        # What was asked again and answered was said once.
        completed = completed.exclude(resubmissions__state=State.COMPLETED)
        for asked, *said in completed.values_list("messages", "completion", "refusal"):
            answer = next(filter(None, said), "")
            if answer:  # a tool call says nothing, and providers refuse an empty message
                messages += [asked[-1], {"role": "assistant", "content": answer}]
        return messages

    def ask(self, content: str, **asked: Any) -> LLMRequest:
        """Go on with the conversation, durably: the answer comes by callback.

        ``asked``: further arguments of ``LLMRequest.objects.publish``.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.history(), {"role": "user", "content": content}]
        asked.setdefault("user", self.user)
        return LLMRequest.objects.publish(messages, conversation=self, **asked)
