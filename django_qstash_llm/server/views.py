"""QStash's REST API, as its SDKs call it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from django.db import InterfaceError, OperationalError, transaction
from django.http import Http404
from django.http.request import RawPostDataException, UnreadablePostError
from django.utils import timezone
from django.utils.decorators import method_decorator
from rest_framework.exceptions import APIException
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import JSONParser
from rest_framework.permissions import IsAuthenticated
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from ..qstash import Accepted, InvalidOption, Refused
from ..qstash import Message as WireMessage
from ..qstash.options import NAME
from . import admission, conf, filters
from .authentication import TokenAuthentication
from .exceptions import Refusal
from .filters import count_of, narrowed, page_of, values_of
from .models import DeadLetter, LogEntry, Message, Queue, SigningKeys
from .targets import Target, headers_of, target_of

logger = logging.getLogger(__name__)

MOST_PER_PAGE = 100
MOST_LOGS_PER_PAGE = 1000
LARGEST_MANAGEMENT_BODY = 1024 * 1024


class WhateverIsAsked(BaseContentNegotiation):
    """JSON is all there is, so an ``Accept`` that wants something else is answered with it."""

    def select_parser(self, request: Request, parsers: Iterable[Any]) -> Any:
        return next(iter(parsers))

    def select_renderer(
        self, request: Request, renderers: Iterable[Any], format_suffix: str | None = None
    ) -> tuple[Any, str]:
        renderer = next(iter(renderers))
        return renderer, renderer.media_type


@method_decorator(transaction.non_atomic_requests, name="dispatch")
class QStashView(APIView):
    """What all calls have in common. The host site's REST_FRAMEWORK defaults are not ours."""

    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated,)
    parser_classes = (JSONParser,)
    renderer_classes = (JSONRenderer,)
    throttle_classes = ()
    content_negotiation_class = WhateverIsAsked
    versioning_class = None
    metadata_class = None
    schema = None

    def get_exception_handler(self) -> Any:
        return answer_to_exception


def answer_to_exception(error: Exception, context: Mapping[str, Any]) -> Response | None:
    """Every refusal is ``{"error": text}``; a status that says whether to try again."""
    if isinstance(error, InvalidOption):
        return refusal(400, error.wire_text)
    if isinstance(error, Refusal):
        return refusal(error.status, str(error))
    if isinstance(error, Http404):
        return refusal(404, "not found")
    if isinstance(error, UnreadablePostError | RawPostDataException):
        return refusal(400, "the body could not be read")
    if isinstance(error, APIException):
        headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {}
        return refusal(error.status_code, str(error.detail), headers)
    if isinstance(error, OperationalError | InterfaceError):
        # Nothing was kept, so trying again is right.
        logger.error("the database does not answer: %s", type(error).__name__)
        return refusal(503, "the database is not available", {"Retry-After": "1"})
    return None


def refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response({"error": text}, status=status, headers=dict(headers or {}))


def body_of(request: Request, largest: int) -> bytes:
    """The body as it was sent. Not ``request.body``: that one stops at Django's 2.5 MB."""
    http = request._request
    length = http.META.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refusal(400, "invalid Content-Length")
    if int(length) > largest:
        raise Refusal(413, f"body is larger than {largest} bytes")
    if http.META.get("HTTP_TRANSFER_ENCODING") and not (hasattr(http, "scope") or int(length)):
        # Django's WSGI side would take it for empty.
        raise Refusal(411, "a body needs a Content-Length")
    body: bytes = http.read(largest + 1)
    if len(body) > largest:
        raise Refusal(413, f"body is larger than {largest} bytes")
    return body


def json_of(request: Request, largest: int = LARGEST_MANAGEMENT_BODY) -> Any:
    """The JSON body, None when there is none."""
    body = body_of(request, largest)
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error


def plain(name: str) -> str:
    """A name out of the path; one that nothing here can have is not found."""
    if not NAME.fullmatch(name):
        raise Refusal(404, "not found")
    return name


def caller_ip_of(request: Request) -> str:
    return str(request.META.get("REMOTE_ADDR") or "")[:64]


# --- ways in ---------------------------------------------------------------------------------


class PublishView(QStashView):
    def post(self, request: Request) -> Response:
        return self.take(request, target_of(request._request, "/v2/publish/"))

    def take(self, request: Request, target: Target, queue: str = "") -> Response:
        now = timezone.now()
        headers = headers_of(request._request, target)
        body = body_of(request, conf.current().max_body)
        message = WireMessage.from_headers(target.destination, headers, body, queue)
        admission.check(message, now=now)
        [accepted] = Message.objects.accept([message], caller_ip=caller_ip_of(request), now=now)
        return Response(accepted.to_json(), status=202 if accepted.is_duplicate else 200)


class EnqueueView(PublishView):
    def post(self, request: Request) -> Response:
        target = target_of(request._request, "/v2/enqueue/")
        queue, _, rest = target.rest.partition("/")
        if not NAME.fullmatch(queue):
            raise Refusal(400, "invalid queue name")
        return self.take(request, target._replace(rest=rest), queue)


class BatchView(QStashView):
    def post(self, request: Request) -> Response:
        items = json_of(request, conf.current().max_batch_body)
        most = conf.current().max_batch_messages
        if not isinstance(items, list) or not 1 <= len(items) <= most:
            raise Refusal(400, f"a batch is an array of 1 to {most} messages")
        now = timezone.now()
        read = [self._read(item, now) for item in items]
        good = [message for message in read if isinstance(message, WireMessage)]
        accepted = iter(Message.objects.accept(good, caller_ip=caller_ip_of(request), now=now))
        answers = [each if isinstance(each, Refused) else next(accepted) for each in read]
        return Response([answer.to_json() for answer in answers])

    def _read(self, item: Any, now: Any) -> WireMessage | Refused:
        """One item; a bad one does not touch the others."""
        try:
            message = WireMessage.from_batch_item(item)
            admission.check(message, now=now)
        except InvalidOption as error:
            return Refused(error.wire_text)
        except Refusal as error:
            return Refused(str(error))
        return message


# --- messages --------------------------------------------------------------------------------


class MessageView(QStashView):
    def get(self, request: Request, message_id: str) -> Response:
        message = Message.objects.readable().filter(message_id=plain(message_id)).first()
        if message is None:
            raise Refusal(404, f"message {message_id} not found")
        return Response(message.to_record().to_json())

    def delete(self, request: Request, message_id: str) -> Response:
        rows = Message.objects.filter(message_id=plain(message_id))
        cancelled = rows.cancel(now=timezone.now())
        if not cancelled:
            raise Refusal(404, f"message {message_id} not found")
        return Response({"cancelled": cancelled}, status=202)


class MessagesView(QStashView):
    def delete(self, request: Request) -> Response:
        """These, those that filters select, or, with neither, all."""
        rows = Message.objects.all()
        ids = ids_of(request, "messageIds")
        if ids is not None:
            rows = rows.filter(message_id__in=ids)
        rows = narrowed(rows, request.query_params, filters.MESSAGES, besides=["messageIds"])
        if "count" in request.query_params:
            count = count_of(request.query_params, default=500, most=500)
            keys = rows.unfinished().order_by("pk").values_list("pk", flat=True)[:count]
            rows = Message.objects.filter(pk__in=list(keys))
        return Response({"cancelled": rows.cancel(now=timezone.now())})


def ids_of(request: Request, name: str) -> list[str] | None:
    """Ids from the body or the query; None when neither is there. An empty list is refused:
    without ids the call is about everything."""
    body = json_of(request)
    if body is None:
        return values_of(request.query_params, name) if name in request.query_params else None
    ids = body.get(name) if isinstance(body, dict) and set(body) == {name} else None
    if (
        not isinstance(ids, list)
        or not ids
        or not all(isinstance(each, str) and each for each in ids)
    ):
        raise Refusal(400, f"{name} is not a list of at least one id")
    return [each for each in ids if NAME.fullmatch(each)]


# --- logs and dead letters -------------------------------------------------------------------


class LogsView(QStashView):
    keys: tuple[str, ...] = ("logs", "events")

    def get(self, request: Request) -> Response:
        query = request.query_params
        rows = narrowed(LogEntry.objects.all(), query, filters.LOGS)
        count = count_of(query, default=MOST_PER_PAGE, most=MOST_LOGS_PER_PAGE)
        page, cursor = page_of(rows, query, count=count, newest_first=True)
        entries = [entry.to_record().to_json() for entry in page]
        answer: dict[str, Any] = dict.fromkeys(self.keys, entries)
        return Response(answer | ({"cursor": cursor} if cursor else {}))


class EventsView(LogsView):
    keys = ("events",)


class DeadLettersView(QStashView):
    def get(self, request: Request) -> Response:
        page, cursor = self.selected(request)
        answer: dict[str, Any] = {"messages": [letter.to_record().to_json() for letter in page]}
        return Response(answer | ({"cursor": cursor} if cursor else {}))

    def delete(self, request: Request) -> Response:
        page, cursor = self.selected(request)
        deleted = DeadLetter.objects.filter(pk__in=[letter.pk for letter in page]).discard()
        return Response({"deleted": deleted} | ({"cursor": cursor} if cursor else {}))

    def selected(self, request: Request) -> tuple[list[DeadLetter], str]:
        query = request.query_params
        rows = DeadLetter.objects.with_messages()
        ids = ids_of(request, "dlqIds")
        if ids is not None:
            rows = rows.called(ids)
        rows = narrowed(rows, query, filters.DEAD_LETTERS, besides=["dlqIds"])
        count = count_of(query, default=MOST_PER_PAGE, most=MOST_PER_PAGE)
        if ids is not None and "count" not in query:
            count = len(ids) or 1
        return page_of(rows, query, count=count, newest_first=False)


class RetryDeadLettersView(DeadLettersView):
    http_method_names = ["post"]

    def post(self, request: Request) -> Response:
        page, cursor = self.selected(request)
        overrides = options_of(request)
        responses = []
        for letter in page:
            try:
                message_id = letter.retry(overrides, now=timezone.now())
            except InvalidOption as error:
                responses.append(Refused(error.wire_text).to_json())
            except Refusal as error:
                responses.append(Refused(str(error)).to_json())
            else:
                responses.append(Accepted(message_id).to_json())
        return Response({"responses": responses, "cursor": cursor}, status=201)


class DeadLetterView(QStashView):
    def get(self, request: Request, dlq_id: str) -> Response:
        return Response(self.letter(dlq_id).to_record().to_json())

    def delete(self, request: Request, dlq_id: str) -> Response:
        if not DeadLetter.objects.filter(pk=self.letter(dlq_id).pk).discard():
            raise Refusal(404, f"dead letter {dlq_id} not found")
        return Response({"deleted": 1})

    def letter(self, dlq_id: str) -> DeadLetter:
        letter = DeadLetter.objects.with_messages().called([dlq_id]).first()
        if letter is None:
            raise Refusal(404, f"dead letter {dlq_id} not found")
        return letter


class RetryDeadLetterView(DeadLetterView):
    http_method_names = ["post"]

    def post(self, request: Request, dlq_id: str) -> Response:
        message_id = self.letter(dlq_id).retry(options_of(request), now=timezone.now())
        return Response(Accepted(message_id).to_json(), status=201)


def options_of(request: Request) -> dict[str, str]:
    """The ``upstash-*`` headers of a call, in lower case."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    return {name: value for name, value in headers.items() if name.startswith("upstash-")}


# --- queues ----------------------------------------------------------------------------------


class QueuesView(QStashView):
    def get(self, request: Request) -> Response:
        return Response(
            [queue.to_record().to_json() for queue in Queue.objects.standing().with_lag()]
        )

    def post(self, request: Request) -> Response:
        """Create or change. Without ``paused`` a paused queue goes on, as with QStash."""
        asked = json_of(request)
        if not isinstance(asked, dict):
            raise Refusal(400, "the body is not an object")
        name, paused = asked.get("queueName"), asked.get("paused", False)
        parallelism = asked.get("parallelism", 1)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refusal(400, "invalid queue name")
        is_number = isinstance(parallelism, int) and not isinstance(parallelism, bool)
        if not is_number or not 1 <= parallelism < 2**31:
            raise Refusal(400, "parallelism is not a whole number of at least 1")
        if not isinstance(paused, bool):
            raise Refusal(400, "paused is not a boolean")
        now = timezone.now()
        queue = Queue.objects.named([name], now=now)[name]
        queue.set_up(parallelism=parallelism, is_paused=paused, now=now)
        return Response({})


class QueueView(QStashView):
    def get(self, request: Request, name: str) -> Response:
        return Response(queue_called(name).to_record().to_json())

    def delete(self, request: Request, name: str) -> Response:
        for queue in Queue.objects.standing().filter(name=plain(name)):
            queue.discard(now=timezone.now())
        return Response({})


class PauseQueueView(QStashView):
    def post(self, request: Request, name: str) -> Response:
        queue_called(name).pause(now=timezone.now())
        return Response({})


class ResumeQueueView(QStashView):
    def post(self, request: Request, name: str) -> Response:
        queue_called(name).resume(now=timezone.now())
        return Response({})


def queue_called(name: str) -> Queue:
    queue = Queue.objects.standing().with_lag().filter(name=plain(name)).first()
    if queue is None:
        raise Refusal(404, f"queue {name} not found")
    return queue


# --- keys, and what is not here ----------------------------------------------------------------


class KeysView(QStashView):
    def get(self, request: Request) -> Response:
        return Response(SigningKeys.objects.current().to_json())


class RotateKeysView(QStashView):
    def post(self, request: Request) -> Response:
        return Response(SigningKeys.objects.rotate().to_json())


class UnknownView(QStashView):
    def any(self, request: Request, **kwargs: Any) -> Response:
        raise Refusal(404, "not found")

    get = post = put = patch = delete = any
