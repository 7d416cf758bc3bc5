"""Messages as people read them: who said what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from ..models import LLMRequest
from . import text

MOST_MESSAGES = 60
"""Messages shown; the rest stands in the raw request."""
_KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: SafeString


@dataclass(frozen=True)
class Bubble:
    """One message. ``kind`` is a known role or ``other``, and fit for a CSS class."""

    role: str
    kind: str
    contents: list[SafeString] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    note: str = ""


def bubbles(messages: Any) -> tuple[list[Bubble], int, list[Bubble]]:
    """The first messages, how many are left out, the last ones."""
    messages = messages if isinstance(messages, list) else []
    if len(messages) <= MOST_MESSAGES:
        return [bubble(m) for m in messages], 0, []
    head, tail = MOST_MESSAGES // 6, MOST_MESSAGES - MOST_MESSAGES // 6
    left_out = len(messages) - MOST_MESSAGES
    return [bubble(m) for m in messages[:head]], left_out, [bubble(m) for m in messages[-tail:]]


def bubble(message: Any) -> Bubble:
    if not isinstance(message, dict):
        return Bubble("?", "other", [text.pretty_json(message)])
    role = str(message.get("role", "?"))
    return Bubble(
        role=text.excerpt(role, 40),
        kind=role if role in _KNOWN_ROLES else "other",
        contents=list(_contents(message.get("content"))),
        tool_calls=tool_calls(message.get("tool_calls")),
        note=text.excerpt(str(message.get("name") or message.get("tool_call_id") or ""), 80),
    )


def answer(llm_request: LLMRequest) -> Bubble | None:
    """What the model said; None when it has said nothing."""
    contents = [text.completion(llm_request.completion)] if llm_request.completion else []
    if llm_request.refusal:
        contents.append(text.preformatted(llm_request.refusal))
    calls = tool_calls(llm_request.tool_calls)
    if not contents and not calls:
        return None
    return Bubble(
        role="assistant",
        kind="assistant",
        contents=contents,
        tool_calls=calls,
        note=_("refused") if llm_request.refusal else llm_request.finish_reason,
    )


def _contents(content: Any) -> Iterator[SafeString]:
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, str):
            yield text.preformatted(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            yield text.preformatted(part["text"])
        elif part is not None:
            # An image or a sound: where it is, not itself. A data URL is megabytes long.
            yield text.preformatted(text.excerpt(json.dumps(part, ensure_ascii=False), 300))


def tool_calls(calls: Any) -> list[ToolCall]:
    calls = calls if isinstance(calls, list) else []
    return [_tool_call(call) for call in calls[:MOST_MESSAGES]]


def _tool_call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return ToolCall("?", text.pretty_json(call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        shown = text.preformatted(text.laid_out(arguments))
    else:
        shown = text.pretty_json(arguments)
    return ToolCall(text.excerpt(str(function.get("name") or "?"), 80), shown)


def turns(llm_requests: Sequence[LLMRequest]) -> Iterator[tuple[LLMRequest, Bubble, Bubble | None]]:
    """A conversation's requests, each as its question and its answer."""
    for row in llm_requests:
        asked = row.messages[-1] if isinstance(row.messages, list) and row.messages else {}
        yield row, bubble(asked), answer(row)
