"""A call's body, as far as HTTP has a say in it."""

from __future__ import annotations

import re
from typing import Any

from django.http import HttpRequest
from django.http.request import UnreadablePostError
from rest_framework.request import Request

from ..bodies import read_object
from ..conf import app_settings
from ..exceptions import InvalidRequest
from .refusals import Refusal

BROKEN_OFF = "it broke off"


def object_of(request: Request) -> dict[str, Any]:
    """The JSON object that came. Raises ``InvalidRequest`` and ``Refusal``."""
    if not re.fullmatch(r"application/(.+\+)?json", media_type(request)):
        message = "The Content-Type has to be application/json."
        raise Refusal(415, "unsupported_media_type", message)
    return read_object(_bytes_of(request))


def media_type(request: Request) -> str:
    return (request._request.META.get("CONTENT_TYPE") or "").partition(";")[0].strip().lower()


def length_of(http: HttpRequest, *, largest: int) -> int:
    """What the body says of its length, 0 where it says nothing. Raises ``InvalidRequest`` and
    ``Refusal``."""
    length = http.META.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise InvalidRequest("", "its Content-Length is no number")
    if http.META.get("HTTP_TRANSFER_ENCODING") and not hasattr(http, "scope"):
        # Django's WSGI side would take it for empty.
        raise Refusal(411, "length_required", "The body needs a Content-Length.")
    if int(length) > largest:
        raise too_large(largest)
    return int(length)


def too_large(largest: int) -> Refusal:
    return Refusal(413, "request_too_large", f"The body is larger than {largest} bytes.")


def _bytes_of(request: Request) -> bytes:
    """Not ``request.body``: that one stops at Django's 2.5 MB, which is right for forms."""
    http = request._request
    largest = app_settings().openai_max_body_bytes
    length = length_of(http, largest=largest)
    try:
        body: bytes = http.read(largest + 1)
    except UnreadablePostError as error:
        raise InvalidRequest("", BROKEN_OFF) from error
    if len(body) > largest:
        raise too_large(largest)
    if len(body) < length:
        raise InvalidRequest("", BROKEN_OFF)
    return body
