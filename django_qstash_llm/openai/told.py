"""Our rows in OpenAI's words. Those, ``choices`` and ``prompt_tokens``, are spoken here alone."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, overload
from uuid import UUID

from django.db.models import Count, Q, Sum

from .. import anthropic
from ..completions import decompress
from ..exceptions import UnreadableCompletion
from ..models import BatchInput, CallbackResponse, File, LLMRequest
from ..models.batch import standing
from ..models.batch_input import ENDPOINT
from ..models.replay import ANSWERS
from ..models.request import State

_STATUS = {State.PENDING: "queued", State.SUBMITTED: "in_progress"}


def as_completion(llm_request: LLMRequest) -> dict[str, Any]:
    """A ``chat.completion`` with a ``status``; without choices for as long as there are none."""
    completion: dict[str, Any] = {
        "id": str(llm_request.uuid),
        "object": "chat.completion",
        "created": _moment(llm_request.created_at),
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
    answer = answer_of(receipt)
    if not isinstance(answer, dict) or not answer.get("choices"):
        return {}
    return {name: each for name, each in answer.items() if name not in {"id", "object", "status"}}


def answer_of(receipt: CallbackResponse | None) -> Any:
    """The JSON that a provider answered; None where that is none, or only its beginning is kept."""
    try:
        body = decompress(bytes(receipt.body)) if receipt else b""
        return json.loads(body, parse_constant=lambda name: None)
    except (ValueError, RecursionError, UnreadableCompletion):
        return None


def as_it_was_read(llm_request: LLMRequest) -> dict[str, Any]:
    """A ``chat.completion`` of what is kept of an answer in other words."""
    return {
        "id": llm_request.completion_id or str(llm_request.uuid),
        "object": "chat.completion",
        "created": _moment(llm_request.finished_at or llm_request.created_at),
        "model": llm_request.answered_by or llm_request.model,
        **_as_it_was_read(llm_request),
    }


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


# --- files and batches -----------------------------------------------------------------------

FILE, BATCH = "file-", "batch_"
"""How their ids begin."""


def as_file(file: File, *, size: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": f"{FILE}{file.uuid.hex}",
        "object": "file",
        "bytes": size,
        "created_at": _moment(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
    return told | ({"expires_at": _moment(file.expires_at)} if file.expires_at else {})


def as_batches(inputs: list[BatchInput]) -> list[dict[str, Any]]:
    """All of them by one query for what became of their requests."""
    sums = _sums(inputs)
    return [_as_batch(each, sums.get(each.batch_id, {})) for each in inputs]


def _as_batch(batch_input: BatchInput, sums: dict[str, Any]) -> dict[str, Any]:
    status, batch = batch_input.status, batch_input.batch
    ended = _moment(batch_input.ended_at)
    said = {name: sums.get(name) or 0 for name in _TOKENS}
    errors = {"object": "list", "data": batch_input.errors} if batch_input.errors else None
    return {
        "id": f"{BATCH}{batch.uuid.hex}",
        "object": "batch",
        "endpoint": ENDPOINT,
        "errors": errors,
        "input_file_id": _file_id(batch_input.file_uuid),
        "completion_window": "24h",
        "status": status,
        "output_file_id": _file_id(batch_input.answers_uuid),
        "error_file_id": _file_id(batch_input.errors_uuid),
        "created_at": _moment(batch.created_at),
        "in_progress_at": _moment(batch_input.in_progress_at),
        "expires_at": _moment(batch_input.expires_at),
        "finalizing_at": ended if status == "completed" else _moment(batch_input.expired_at),
        "completed_at": ended if status == "completed" else None,
        "failed_at": _moment(batch_input.failed_at),
        "expired_at": ended if status == "expired" else None,
        "cancelling_at": _moment(batch_input.cancelling_at),
        "cancelled_at": ended if status == "cancelled" else None,
        "request_counts": {
            "total": batch_input.total or 0,
            "completed": sums.get("completed") or 0,
            "failed": sums.get("failed") or 0,
        },
        "usage": {
            "input_tokens": said["input_tokens"],
            "input_tokens_details": {"cached_tokens": said["cached_tokens"]},
            "output_tokens": said["output_tokens"],
            "output_tokens_details": {"reasoning_tokens": said["reasoning_tokens"]},
            "total_tokens": said["input_tokens"] + said["output_tokens"],
        },
        "metadata": batch_input.metadata or None,
    }


_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


def _sums(inputs: list[BatchInput]) -> dict[int, dict[str, Any]]:
    """Batch -> what became of its items, each once."""
    rows = LLMRequest.objects.filter(batch__in=[each.batch_id for each in inputs])
    grouped = standing(rows).order_by().values("batch")
    summed = grouped.annotate(
        completed=Count("pk", filter=Q(state=State.COMPLETED)),
        failed=Count("pk", filter=Q(state=State.FAILED)),
        **{name: Sum(name) for name in _TOKENS},
    )
    return {row["batch"]: dict(row) for row in summed}


def _file_id(uuid: UUID | None) -> str | None:
    return None if uuid is None else f"{FILE}{uuid.hex}"


@overload
def _moment(moment: datetime) -> int: ...
@overload
def _moment(moment: None) -> None: ...
def _moment(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
