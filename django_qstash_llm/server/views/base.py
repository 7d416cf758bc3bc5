"""What all calls have in common: who may, how a body is read, what a refusal looks like."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.core.exceptions import SuspiciousOperation
from django.db import InterfaceError, OperationalError, transaction
from django.http import Http404
from django.http.request import RawPostDataException, UnreadablePostError
from django.utils.decorators import method_decorator
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import APIException
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import JSONParser
from rest_framework.permissions import BasePermission, IsAuthenticated
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from ...qstash import InvalidOption
from ...qstash.options import NAME
from ..authentication import MayCall, TokenAuthentication, caller
from ..exceptions import Refusal
from ..filters import values_of

logger = logging.getLogger(__name__)

LARGEST_MANAGEMENT_BODY = 1024 * 1024
MOST_IDS = 10_000


class WhateverIsAsked(BaseContentNegotiation):
    """JSON is all there is, so an ``Accept`` that wants something else is answered with it."""

    def select_parser(self, request: Request, parsers: Iterable[Any]) -> Any:
        return next(iter(parsers))

    def select_renderer(
        self, request: Request, renderers: Iterable[Any], format_suffix: str | None = None
    ) -> tuple[Any, str]:
        renderer = next(iter(renderers))
        return renderer, renderer.media_type


class OurJSON(JSONRenderer):
    """The host site's REST_FRAMEWORK settings about JSON are not ours."""

    compact = True
    strict = True
    # A refusal may repeat half a surrogate pair, which can only be said escaped.
    ensure_ascii = True


@method_decorator(transaction.non_atomic_requests, name="dispatch")
class QStashView(APIView):
    """What all calls have in common. The host site's REST_FRAMEWORK defaults are not ours."""

    authentication_classes: Sequence[type[BaseAuthentication]] = (TokenAuthentication,)
    permission_classes: Sequence[type[BasePermission]] = (IsAuthenticated, MayCall)
    parser_classes = (JSONParser,)
    renderer_classes = (OurJSON,)
    throttle_classes = ()
    content_negotiation_class = WhateverIsAsked
    versioning_class = None
    metadata_class = None
    schema = None
    # OPTIONS has nothing to tell here, and no answer may promise it.
    http_method_names = ["get", "head", "post", "put", "patch", "delete"]

    @property
    def account(self) -> str:
        """Whose data this call is about."""
        return caller(self.request).account

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
    if isinstance(error, SuspiciousOperation):
        # Django's: more than a thousand parameters.
        return refusal(400, "the query has too many parameters")
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
    if http.META.get("HTTP_TRANSFER_ENCODING") and not hasattr(http, "scope"):
        # Django's WSGI side would take it for empty, or the chunks' own headers for its bytes.
        raise Refusal(411, "a body needs a Content-Length, and no Transfer-Encoding")
    body: bytes = http.read(largest + 1)
    if len(body) > largest:
        raise Refusal(413, f"body is larger than {largest} bytes")
    if len(body) < int(length):
        # The caller was cut off, and half a message is none.
        raise Refusal(400, "the body is shorter than its Content-Length")
    return body


def json_of(request: Request, largest: int = LARGEST_MANAGEMENT_BODY) -> Any:
    """The JSON body, None when there is none."""
    body = body_of(request, largest)
    if not body.strip():
        return None
    try:
        return json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is more than a number can be")
    return number


def plain(name: str) -> str:
    """A name out of the path; one that nothing here can have is not found."""
    if not NAME.fullmatch(name):
        raise Refusal(404, "not found")
    return name


def object_of(request: Request) -> dict[str, Any]:
    """The JSON body, which has to be an object."""
    body = json_of(request)
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not an object")
    return body


def options_of(request: Request) -> dict[str, str]:
    """The ``upstash-*`` headers of a call, in lower case, with what its query says where no
    header does."""
    said = {name.lower(): str(value) for name, value in request.query_params.items()}
    said |= {name.lower(): value for name, value in request.headers.items()}
    return {name: value for name, value in said.items() if is_option(name)}


def is_option(name: str) -> bool:
    return name.lower().startswith("upstash-")


def caller_ip_of(request: Request) -> str:
    return str(request.META.get("REMOTE_ADDR") or "")[:64]


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
    if len(ids) > MOST_IDS:
        raise Refusal(400, f"{name} holds more than {MOST_IDS} ids: give them in several calls")
    return [each for each in ids if NAME.fullmatch(each)]


class UnknownView(QStashView):
    def any(self, request: Request, **kwargs: Any) -> Response:
        raise Refusal(404, "not found")

    get = post = put = patch = delete = any
