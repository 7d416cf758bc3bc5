"""``chat/completions``: whole, streamed, or in the background; and what became of one."""

from __future__ import annotations

from functools import partial
from uuid import UUID

from django.db import router
from django.http import HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from rest_framework.request import Request

from ... import chat
from ...chat import AsyncStream, Stream
from ...conf import app_settings
from ...door import EVENT_HEADERS, EVENTS
from ...models import KeptAnswer, LLMRequest
from ...models.api_key import Scope
from ...models.asked import Asked
from ...models.request import Via
from .. import asking, idempotency, streaming
from ..authentication import caller_of
from ..idempotency import written_under
from ..refusals import JSON, Refusal, passed_on
from ..told import as_completion
from .base import OpenAIView, door, is_asgi


class ChatCompletionsView(OpenAIView):
    scope = Scope.CHAT
    http_method_names = ["post"]

    def post(self, request: Request) -> HttpResponseBase:
        asked = asking.read(request)
        llm_request = asked.row(Via.PUBLISH if asked.is_background else Via.CHAT)
        return idempotency.once(
            request,
            asked.caller,
            # Preferring an answer in the background is said in a header.
            [asked.body, asked.is_background],
            llm_request.uuid,
            partial(_answer, request, asked, llm_request),
            partial(idempotency.completion_again, asked),
        )


class ChatCompletionView(OpenAIView):
    scope = Scope.CHAT
    http_method_names = ["get", "head"]

    def get(self, request: Request, name: str) -> HttpResponseBase:
        return _told(_found(request, name))


class CancelView(OpenAIView):
    scope = Scope.CHAT
    http_method_names = ["post"]

    def post(self, request: Request, name: str) -> HttpResponseBase:
        llm_request = _found(request, name)
        llm_request.cancel()
        return _told(llm_request)


def _answer(
    request: Request, asked: Asked, llm_request: LLMRequest, kept: KeptAnswer | None
) -> HttpResponseBase:
    if asked.is_background:
        return _begin(llm_request, kept)
    if asked.is_stream:
        return _stream(request, llm_request, kept)
    # Who brought a key will come back for the answer, and is not to pay for it twice.
    may_leave = is_asgi(request) and kept is None
    complete = chat.complete_by_loop if may_leave else chat.complete
    answer = complete(llm_request, within=written_under(kept))
    headers = passed_on(answer.headers) | _named(llm_request)
    return HttpResponse(answer.body, status=answer.status, content_type=JSON, headers=headers)


def _begin(llm_request: LLMRequest, kept: KeptAnswer | None) -> HttpResponse:
    """By QStash; the answer is here, under the request's id, whenever somebody looks for it."""
    app_settings().check_ready()
    with written_under(kept):
        llm_request.save(using=router.db_for_write(LLMRequest), force_insert=True)
    response = _told(llm_request, status=202)
    response["Location"] = f"completions/{llm_request.uuid}"
    response["Preference-Applied"] = "respond-async"
    return response


def _stream(
    request: Request, llm_request: LLMRequest, kept: KeptAnswer | None
) -> StreamingHttpResponse:
    stream: Stream | AsyncStream
    if is_asgi(request):
        stream = chat.open_stream_by_loop(llm_request, within=written_under(kept))
    else:
        stream = chat.open_stream(llm_request, within=written_under(kept))
    headers = passed_on(stream.headers) | EVENT_HEADERS | _named(llm_request)
    said = streaming.events(stream, kept)
    return StreamingHttpResponse(said, content_type=EVENTS, headers=headers)


def _found(request: Request, name: str) -> LLMRequest:
    try:
        llm_request = caller_of(request).llm_requests().filter(uuid=UUID(name)).first()
    except ValueError:
        llm_request = None
    if llm_request is None:
        raise Refusal(404, "not_found", f"There is no chat completion {name[:100]!r} of yours.")
    return llm_request


def _told(llm_request: LLMRequest, *, status: int = 200) -> HttpResponse:
    headers = _named(llm_request)
    return JsonResponse(as_completion(llm_request), status=status, headers=headers)


def _named(llm_request: LLMRequest) -> dict[str, str]:
    return {"x-request-id": str(llm_request.uuid)}


chat_completions = door(ChatCompletionsView)
chat_completion = door(ChatCompletionView)
cancel = door(CancelView)
