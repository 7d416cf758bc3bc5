"""A conversation's turns as a page shows them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from django.utils.translation import get_language
from django.utils.translation import gettext as _

from ..models import Conversation, LLMRequest
from ..models.request import UNFINISHED

MOST_TURNS = 50
"""Turns shown; earlier ones stand in the admin."""


@dataclass(frozen=True)
class Shown:
    """One turn."""

    llm_request: LLMRequest
    said: str
    """What was asked; empty where that is forgotten."""
    answer: str
    """As far as it came."""
    is_underway: bool
    note: str
    """What is to be said of the answer, where it is none that is whole."""


def context(conversation: Conversation) -> dict[str, Any]:
    """Of the template ``turns.html``."""
    newest = conversation.newest(MOST_TURNS + 1)
    turns = [_shown(*turn) for turn in newest[-MOST_TURNS:]]
    return {"turns": turns, "has_earlier": len(newest) > MOST_TURNS}


def etag(conversation: Conversation) -> str:
    """Another one whenever the turns look otherwise."""
    rows = conversation.llm_requests.order_by("-id").values_list("pk", "state", "forgotten_at")
    told = repr((get_language(), list(rows[: MOST_TURNS + 1])))
    return f'"{hashlib.sha256(told.encode()).hexdigest()[:32]}"'


def _shown(llm_request: LLMRequest, asked: list[dict[str, Any]]) -> Shown:
    is_underway = llm_request.state in UNFINISHED
    return Shown(
        llm_request=llm_request,
        said="\n\n".join(filter(None, map(_text, asked))),
        answer=llm_request.completion or llm_request.refusal,
        is_underway=is_underway,
        note=_note(llm_request, is_underway),
    )


def _text(message: dict[str, Any]) -> str:
    """What a person said in it: what tools answered is for the model."""
    content = message.get("content") if message.get("role") == "user" else None
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n\n".join(text if isinstance(text, str) else _("(a file)") for text in texts if text)


def _note(llm_request: LLMRequest, is_underway: bool) -> str:
    if is_underway:
        return _("The answer is on its way.")
    if llm_request.error_code == "aborted":
        return _("Stopped before the answer was whole.")
    if llm_request.state == "cancelled":
        return _("Cancelled.")
    # Its reasons are for who runs the site: they may name accounts and limits.
    if llm_request.state == "failed":
        return _("No whole answer came. Ask again.")
    names = [_name(call) for call in llm_request.tool_calls or ()]
    return _("Calls %s.") % ", ".join(names) if names else ""


def _name(call: Any) -> str:
    """Kept as the provider told it, whatever that was."""
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else "?"
