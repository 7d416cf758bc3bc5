"""``Idempotency-Key``: the same again is answered the same, and not paid again."""

from __future__ import annotations

from django.http import HttpResponse, JsonResponse
from django.utils import timezone
from rest_framework.request import Request

from ..models import KeptAnswer, LLMRequest
from ..models.request import UNFINISHED, State
from .asking import Asked
from .refusals import Refusal
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


def claim(key: str, asked: Asked, llm_request: LLMRequest) -> tuple[KeptAnswer, bool]:
    """The kept answer, and whether it is still to be given, by ``llm_request``."""
    return KeptAnswer.objects.claim(
        caller=asked.caller.name,
        key=key,
        asked=_all_that_is_asked(asked),
        uuid=llm_request.uuid,
        now=timezone.now(),
    )


def again(kept: KeptAnswer, asked: Asked) -> HttpResponse:
    """What was answered before. Raises ``Refusal`` where that is not known, or not for this."""
    if not kept.is_for(_all_that_is_asked(asked)):
        message = "This Idempotency-Key was used for another body: use a new one for this."
        raise Refusal(422, "idempotency_key_reused", message, param="Idempotency-Key")
    headers = {
        "Idempotent-Replayed": "true",
        "x-request-id": str(kept.uuid),
        "x-should-retry": "false",
    }
    if kept.status is not None:
        return HttpResponse(
            kept.body, status=kept.status, content_type=kept.content_type, headers=headers
        )
    llm_request = LLMRequest.objects.filter(uuid=kept.uuid).first()
    if llm_request is None or llm_request.state in UNFINISHED:
        message = "The call with this Idempotency-Key is still under way."
        wait = {"Retry-After": "1"}
        raise Refusal(409, "idempotency_key_in_use", message, headers=wait, should_retry=True)
    if llm_request.state == State.COMPLETED and not asked.is_stream:
        # The process that called has died over it, or its answer was not to be had whole.
        return JsonResponse(as_completion(llm_request), headers=headers)
    message = (
        f"The call with this Idempotency-Key is {llm_request.state} and its answer was not kept: see "
        f"chat/completions/{kept.uuid}. Use a new key to ask, and pay, again."
    )
    raise Refusal(409, "idempotency_key_spent", message)


def _all_that_is_asked(asked: Asked) -> list[object]:
    # Preferring an answer in the background is said in a header.
    return [asked.body, asked.is_background]
