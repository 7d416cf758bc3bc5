"""``Idempotency-Key``: the same again is answered the same, and not paid again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from django.db import DatabaseError, InterfaceError, transaction
from django.http import HttpResponse, HttpResponseBase, JsonResponse
from django.utils import timezone
from rest_framework.request import Request

from ..models import KeptAnswer, LLMRequest
from ..models.asked import Asked
from ..models.caller import Caller
from ..models.request import UNFINISHED, State
from .refusals import JSON, Refusal, as_refusal, logger
from .told import as_completion

LONGEST_KEY = 255


def key_of(request: Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 1 <= len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
        problem = f"give 1 to {LONGEST_KEY} printable ASCII characters"
        message = f"Invalid Idempotency-Key: {problem}."
        raise Refusal(400, "invalid_value", message, param="Idempotency-Key")
    return key


def once(
    request: Request,
    caller: Caller,
    asked: object,
    uuid: UUID,
    answer: Callable[[KeptAnswer | None], HttpResponseBase],
    otherwise: Callable[[KeptAnswer], HttpResponse],
) -> HttpResponseBase:
    """What ``answer`` answers to ``asked``, by the row ``uuid``: once, where the caller brings a key.

    What was answered before is answered again; where that is not known it is for ``otherwise`` to
    say, which raises ``Refusal``. ``answer`` writes its row within ``written_under``.
    """
    key = key_of(request)
    if key is None:
        return answer(None)
    kept, is_ours = KeptAnswer.objects.claim(
        caller=caller.name, key=key, asked=asked, uuid=uuid, now=timezone.now()
    )
    if not is_ours:
        return _again(kept, asked, otherwise)
    try:
        response = answer(kept)
    except Exception as error:
        # Whatever it was: what was not paid for may be asked once more under this key.
        refusal = as_refusal(error)
        if refusal.may_be_paid:
            kept.keep(refusal.status, refusal.body, JSON)
        else:
            kept.let_go()
        raise refusal from error
    if isinstance(response, HttpResponse):
        try:
            kept.keep(response.status_code, response.content, JSON)
        except (DatabaseError, InterfaceError) as error:
            # It has been paid for, and its row tells it again.
            logger.error("An answer is given and not kept: %s", type(error).__name__)
    return response


@contextmanager
def written_under(kept: KeptAnswer | None) -> Iterator[None]:
    """What is to be done once is written down within. Raises ``Refusal`` where it is another's by
    now: this process was away for so long that it was taken for dead."""
    if kept is None:
        yield
        return
    with transaction.atomic(using=kept._state.db):
        if not kept.hold():
            raise under_way()
        yield


def headers_of(kept: KeptAnswer) -> dict[str, str]:
    return {
        "Idempotent-Replayed": "true",
        "x-request-id": str(kept.uuid),
        "x-should-retry": "false",
    }


def under_way() -> Refusal:
    message = "The call with this Idempotency-Key is still under way."
    wait = {"Retry-After": "1"}
    return Refusal(409, "idempotency_key_in_use", message, headers=wait, should_retry=True)


def completion_again(asked: Asked, kept: KeptAnswer) -> HttpResponse:
    """``once``'s ``otherwise`` of chat completions."""
    llm_request = LLMRequest.objects.filter(uuid=kept.uuid).first()
    if llm_request is None or llm_request.state in UNFINISHED:
        raise under_way()
    if llm_request.state == State.COMPLETED and not asked.is_stream:
        # The process that called has died over it, or its answer was not to be had whole.
        return JsonResponse(as_completion(llm_request), headers=headers_of(kept))
    message = (
        f"The call with this Idempotency-Key is {llm_request.state} and its answer was not kept: see "
        f"chat/completions/{kept.uuid}. Use a new key to ask, and pay, again."
    )
    raise Refusal(409, "idempotency_key_spent", message)


def _again(
    kept: KeptAnswer, asked: object, otherwise: Callable[[KeptAnswer], HttpResponse]
) -> HttpResponse:
    if not kept.is_for(asked):
        message = "This Idempotency-Key was used for another body: use a new one for this."
        raise Refusal(422, "idempotency_key_reused", message, param="Idempotency-Key")
    if kept.status is None:
        return otherwise(kept)
    return HttpResponse(
        kept.body, status=kept.status, content_type=kept.content_type, headers=headers_of(kept)
    )
