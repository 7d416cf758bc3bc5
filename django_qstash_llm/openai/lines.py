"""The lines of a batch's two files, made of its requests while they are read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from asgiref.sync import sync_to_async
from django.db.models import Q
from django.db.models.functions import Length

from ..models import BatchInput, CallbackResponse, File, LLMRequest
from ..models.batch import standing
from ..models.callback import Kind
from ..models.replay import ANSWERS
from ..models.request import State
from .refusals import error_body
from .told import answer_of, as_it_was_read

ROWS_AT_ONCE = 50
BYTES_AT_ONCE = 8_000_000
"""Of answers in memory at the same time, one apart."""
_TOLD = (
    "uuid",
    "state",
    "metadata",
    "model",
    "answered_by",
    "completion",
    "completion_id",
    "refusal",
    "tool_calls",
    "finish_reason",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "error_code",
    "error",
    "created_at",
    "finished_at",
    "forgotten_at",
)
"""Making whole rows would take as long as all the rest."""
_CAME_TO_NOTHING = [State.FAILED, State.CANCELLED]
_STATUS_OF_REFUSAL = {"model_not_found": 404, "server_error": 500}
_REASONS = {
    "batch_cancelled": "This request was not answered before the batch was cancelled.",
    "batch_expired": "This request was not answered before the completion window expired.",
}


def pieces_of(file: File) -> Iterator[bytes]:
    return _gathered(lines_of(file)) if file.is_of_batch else file.pieces()


async def pieces_of_async(file: File) -> AsyncIterator[bytes]:
    """The same under ASGI, where each step is one of the request's own thread."""
    pieces = pieces_of(file)

    def following() -> bytes | None:
        return next(pieces, None)

    while (piece := await sync_to_async(following)()) is not None:
        yield piece


def size_of(file: File) -> int:
    """Bytes; of a batch's answers they are counted when somebody asks first."""
    if file.size is None:
        file.size = sum(map(len, lines_of(file)))
        file.save(update_fields=["size"])
    return file.size


def lines_of(file: File) -> Iterator[bytes]:
    """In the order of the batch's input; what was asked again stands at its end."""
    using = file._state.db
    rows = standing(LLMRequest.objects.using(using).filter(batch=file.batch_id))
    rows = rows.filter(state__in=_CAME_TO_NOTHING if file.holds_errors else [State.COMPLETED])
    rows = rows.only(*_TOLD).order_by("pk")
    has_expired = BatchInput.objects.using(using).filter(batch=file.batch_id, cancelling_at=None)
    reason = "batch_expired" if has_expired.exclude(expired_at=None) else "batch_cancelled"
    last = 0
    while group := list(rows.filter(pk__gt=last)[:ROWS_AT_ONCE]):
        last = group[-1].pk
        for llm_request, receipt in _with_receipts(group):
            line = _line(llm_request, receipt, reason)
            # Escaped: a provider may repeat half a surrogate pair.
            yield json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _with_receipts(
    group: list[LLMRequest],
) -> Iterator[tuple[LLMRequest, CallbackResponse | None]]:
    """Each with what its provider said last: of a completed one, its answer."""
    receipts = CallbackResponse.objects.using(group[0]._state.db)
    theirs = receipts.filter(llm_request__in=group, kind__in=[Kind.CALLBACK, Kind.FAILURE_CALLBACK])
    is_answer = Q(llm_request__state=State.COMPLETED) & ANSWERS
    told = theirs.filter(is_answer | ~Q(llm_request__state=State.COMPLETED))
    sizes = told.order_by("pk").values_list("llm_request", "pk", Length("body"))
    newest = {llm_request: (pk, size or 0) for llm_request, pk, size in sizes}
    waiting: list[LLMRequest] = []
    weight = 0
    for llm_request in group:
        weight += newest.get(llm_request.pk, (0, 0))[1]
        if waiting and weight > BYTES_AT_ONCE:
            yield from _read(waiting, newest, receipts)
            waiting, weight = [], newest.get(llm_request.pk, (0, 0))[1]
        waiting.append(llm_request)
    yield from _read(waiting, newest, receipts)


def _read(
    group: list[LLMRequest], newest: dict[int, tuple[int, int]], receipts: Any
) -> Iterator[tuple[LLMRequest, CallbackResponse | None]]:
    found = receipts.in_bulk([newest[row.pk][0] for row in group if row.pk in newest])
    for llm_request in group:
        yield llm_request, found.get(newest.get(llm_request.pk, (None, 0))[0])


def _line(llm_request: LLMRequest, receipt: CallbackResponse | None, reason: str) -> dict[str, Any]:
    response, error = _outcome(llm_request, receipt, reason)
    if response is not None:
        response = {
            "status_code": response[0],
            "request_id": str(llm_request.uuid),
            "body": response[1],
        }
    return {
        "id": f"batch_req_{llm_request.uuid.hex}",
        "custom_id": llm_request.metadata.get("custom_id"),
        "response": response,
        "error": error,
    }


def _outcome(
    llm_request: LLMRequest, receipt: CallbackResponse | None, reason: str
) -> tuple[Any, dict[str, Any] | None]:
    """Status and body of an answer, and why there is none."""
    if llm_request.state == State.CANCELLED:
        return None, {"code": reason, "message": _REASONS[reason]}
    answer = answer_of(receipt)
    if llm_request.state == State.COMPLETED:
        if receipt is not None and isinstance(answer, dict) and answer.get("choices"):
            return (receipt.status, answer), None
        if llm_request.forgotten_at and not (llm_request.completion or llm_request.tool_calls):
            return None, {"code": "forgotten", "message": "Its answer is not kept any more."}
        return (200, as_it_was_read(llm_request)), None
    if "refused" in llm_request.metadata:
        status = _STATUS_OF_REFUSAL.get(llm_request.error_code, 400)
        param, problem = llm_request.metadata["refused"] or None, llm_request.error
        message = f"Invalid {f'value for {param!r}' if param else 'body'}: {problem}."
        refused = error_body(status, llm_request.error_code, message, param=param)
        return (status, json.loads(refused)), None
    if receipt is not None and receipt.status is not None and receipt.status >= 300:
        if not isinstance(answer, dict):
            told = error_body(receipt.status, llm_request.error_code or None, llm_request.error)
            answer = json.loads(told)
        return (receipt.status, answer), None
    code = llm_request.error_code or "error"
    return None, {"code": code, "message": llm_request.error or "It was not answered."}


def _gathered(lines: Iterator[bytes]) -> Iterator[bytes]:
    """In pieces that are worth sending."""
    gathered = bytearray()
    for line in lines:
        gathered += line
        if len(gathered) >= 65_536:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
