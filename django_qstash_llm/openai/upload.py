"""A file that is uploaded: read as it comes, to a temporary file, and no further than it may be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import SkipFile, TemporaryFileUploadHandler
from django.http import HttpRequest
from django.http.multipartparser import MultiPartParserError
from django.http.request import UnreadablePostError
from rest_framework.request import Request

from ..conf import app_settings
from ..exceptions import InvalidRequest
from ..models.file import KEPT_FOR, PART_BYTES, Purpose, named
from .body import BROKEN_OFF, length_of, media_type, too_large
from .refusals import Refusal

AROUND = 65_536
"""Bytes that a body may have beside its file."""
SHORTEST, LONGEST = 3600, 2_592_000
"""Seconds that a file may be kept: an hour to 30 days, as at OpenAI."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    file: UploadedFile[Any]
    filename: str
    purpose: str
    kept_for: timedelta

    def pieces(self) -> Iterator[bytes]:
        pieces: Iterator[bytes] = self.file.chunks(PART_BYTES)
        return pieces

    def digest(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


class _Capped(TemporaryFileUploadHandler):
    """Takes one file, by the name ``file``."""

    def __init__(self, request: HttpRequest, *, largest: int) -> None:
        super().__init__(request)
        self.largest = largest
        self.taken = 0

    def new_file(self, field_name: str, *args: Any, **kwargs: Any) -> None:
        if field_name != "file":
            raise SkipFile
        super().new_file(field_name, *args, **kwargs)

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        self.taken += len(raw_data)
        if self.taken > self.largest:
            self.file.close()
            raise too_large(self.largest)
        super().receive_data_chunk(raw_data, start)


def prepare(http: HttpRequest) -> None:
    """Before anybody reads the form, as a session's check against forgery does. Raises ``Refusal``."""
    largest = app_settings().openai_max_file_bytes
    length_of(http, largest=largest + AROUND)
    if not hasattr(http, "_files"):  # unless a middleware has read it
        http.upload_handlers = [_Capped(http, largest=largest)]


def read(request: Request) -> Upload:
    """Raises ``InvalidRequest`` and ``Refusal``."""
    if media_type(request) != "multipart/form-data":
        message = "The Content-Type has to be multipart/form-data."
        raise Refusal(415, "unsupported_media_type", message)
    form, files = _form(request._request)
    purpose = form.get("purpose")
    if purpose != Purpose.BATCH:
        problem = "give 'batch'; files for other purposes are not kept here"
        raise InvalidRequest("purpose", problem)
    kept_for = _kept_for(form)
    file = files.get("file")
    if file is None:
        raise InvalidRequest("file", "give the file itself, with a name")
    if not file.size:
        raise InvalidRequest("file", "it is empty")
    if file.size > (largest := app_settings().openai_max_file_bytes):
        raise too_large(largest)
    return Upload(file=file, filename=named(file.name), purpose=purpose, kept_for=kept_for)


def _form(http: HttpRequest) -> tuple[Any, Any]:
    try:
        return http.POST, http.FILES
    except UnreadablePostError as error:
        for handler in http.upload_handlers:
            if (file := getattr(handler, "file", None)) is not None:
                file.close()
        raise InvalidRequest("", BROKEN_OFF) from error
    except RequestDataTooBig as error:
        raise InvalidRequest("", "its fields beside the file are too large") from error
    except (MultiPartParserError, SuspiciousOperation, UnicodeError, ValueError) as error:
        raise InvalidRequest("", "it is no multipart form") from error


def _kept_for(form: Any) -> timedelta:
    given = {
        name: form.get(f"expires_after[{name}]")
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in form
    }
    return timedelta(seconds=seconds_kept("expires_after", given)) if given else KEPT_FOR


def seconds_kept(name: str, given: Any) -> int:
    """Of a policy like ``{"anchor": "created_at", "seconds": 3600}``. Raises ``InvalidRequest``."""
    if not isinstance(given, dict) or given.get("anchor") != "created_at":
        raise InvalidRequest(f"{name}[anchor]", "give 'created_at'")
    seconds = str(given.get("seconds"))
    # Of too many digits Python makes no number.
    is_number = seconds.isascii() and seconds.isdigit() and len(seconds) <= len(str(LONGEST))
    if not is_number or not SHORTEST <= int(seconds) <= LONGEST:
        problem = f"give a whole number of seconds, {SHORTEST} to {LONGEST}"
        raise InvalidRequest(f"{name}[seconds]", problem)
    return int(seconds)
