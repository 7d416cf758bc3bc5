"""Our rows in OpenAI's words. Those, ``choices`` and ``prompt_tokens``, are spoken here alone."""

from __future__ import annotations

import json
from typing import Any

from .. import anthropic
from ..completions import decompress
from ..exceptions import UnreadableCompletion
from ..models import LLMRequest
from ..models.replay import ANSWERS
from ..models.request import State

_STATUS = {State.PENDING: "queued", State.SUBMITTED: "in_progress"}


def as_completion(llm_request: LLMRequest) -> dict[str, Any]:
    """A ``chat.completion`` with a ``status``; without choices for as long as there are none."""
    completion: dict[str, Any] = {
        "id": str(llm_request.uuid),
        "object": "chat.completion",
        "created": int(llm_request.created_at.timestamp()),
        "model": llm_request.answered_by or llm_request.model,
        "status": _STATUS.get(State(llm_request.state), llm_request.state),
        "choices": [],
        "usage": None,
    }
    if llm_request.state == State.COMPLETED:
        completion |= _as_it_came(llm_request) or _as_it_was_read(llm_request)
    elif llm_request.error:
        code = llm_request.error_code or None
        completion["error"] = {"code": code, "message": llm_request.error}
    return completion


def _as_it_came(llm_request: LLMRequest) -> dict[str, Any]:
    """With all its choices, as the provider answered; empty where that is not kept, or is no
    completion of OpenAI's."""
    receipt = llm_request.callback_responses.filter(ANSWERS).order_by("-pk").first()
    try:
        answer = json.loads(decompress(bytes(receipt.body))) if receipt else None
    except (ValueError, UnreadableCompletion):  # only its beginning is kept
        return {}
    if not isinstance(answer, dict) or not answer.get("choices"):
        return {}
    return {name: each for name, each in answer.items() if name not in {"id", "object", "status"}}


def _as_it_was_read(llm_request: LLMRequest) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": llm_request.completion or None,
        "refusal": llm_request.refusal or None,
    }
    if llm_request.tool_calls:
        message["tool_calls"] = llm_request.tool_calls
    reason = llm_request.finish_reason or "stop"
    finish_reason = anthropic.FINISH_REASONS.get(reason, reason)
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return {"choices": [choice], "usage": _usage(llm_request)}


def _usage(llm_request: LLMRequest) -> dict[str, Any] | None:
    asked, said = llm_request.input_tokens, llm_request.output_tokens
    if asked is None and said is None:
        return None
    return {
        "prompt_tokens": asked or 0,
        "completion_tokens": said or 0,
        "total_tokens": (asked or 0) + (said or 0),
        "prompt_tokens_details": {"cached_tokens": llm_request.cached_tokens or 0},
        "completion_tokens_details": {"reasoning_tokens": llm_request.reasoning_tokens or 0},
    }
