"""What a caller asks: their body, and their header that wishes for an answer in the background."""

from __future__ import annotations

import re
from dataclasses import replace

from rest_framework.request import Request

from ..exceptions import InvalidRequest
from ..models.asked import Asked, read_asked
from .authentication import caller_of
from .body import object_of


def read(request: Request) -> Asked:
    """Raises what ``object_of`` and ``read_asked`` raise."""
    asked = read_asked(caller_of(request), object_of(request))
    if _prefers_async(request):
        asked = replace(asked, is_background=True)
    if asked.is_stream and asked.is_background:
        raise InvalidRequest("stream", "what is answered in the background cannot be streamed")
    return asked


def _prefers_async(request: Request) -> bool:
    """RFC 7240."""
    preferences = re.split("[,;]", request.headers.get("Prefer", ""))
    return "respond-async" in {each.strip().lower() for each in preferences}
