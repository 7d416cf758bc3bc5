"""``{% conversation_box conversation %}``: what was said in it, and a form to say more.

Needs ``django_qstash_llm.browser.urls``, and on the page ``django_qstash_llm/conversation.js`` and
``conversation.css`` from the static files.
"""

from __future__ import annotations

from typing import Any

from django import template
from django.urls import reverse

from ..browser import turns
from ..models import Conversation

register = template.Library()


@register.inclusion_tag("django_qstash_llm/conversation.html", takes_context=True)
def conversation_box(
    context: template.RequestContext, conversation: Conversation
) -> dict[str, Any]:
    request = context.request
    arguments = {"uuid": conversation.uuid}
    return {
        **turns.context(conversation),
        "url": reverse("django_qstash_llm_browser:conversation", kwargs=arguments),
        "next": request.get_full_path(),
        "csrf_token": context.get("csrf_token"),
    }
