"""Who may say what: believing a callback."""

from __future__ import annotations

import logging
from collections.abc import Collection
from uuid import UUID

from django.http import HttpRequest
from django.utils import timezone

from .conf import app_settings
from .qstash import Claims, SignatureError, signing

logger = logging.getLogger(__name__)

# ``request.headers`` would be made of every header there is.
_SIGNATURE = f"HTTP_{signing.HEADER.upper().replace('-', '_')}"


class CallbackTooLarge(Exception):
    """The callback's body is larger than ``MAX_CALLBACK_BYTES``."""


def read_signed_body(request: HttpRequest, uuid: UUID) -> tuple[bytes, Claims]:
    """The raw body of a callback that QStash signed for the request ``uuid``.

    The token is checked first, against the URLs we published and never against what the Host
    header claims; only then is the body read. Raises ``SignatureError`` or ``CallbackTooLarge``, and
    Django's ``UnreadablePostError`` when the sender is gone before all of it is here.
    """
    return _believed(request, app_settings().callback_urls(uuid), "callback", uuid)


def read_signed_ping(request: HttpRequest, uuid: UUID) -> tuple[bytes, Claims]:
    """The same of a ping of the doctor's: it is to find out what becomes of a callback."""
    return _believed(request, app_settings().ping_urls(uuid), "ping", uuid)


def _believed(
    request: HttpRequest, urls: Collection[str], what: str, uuid: UUID
) -> tuple[bytes, Claims]:
    conf = app_settings()
    try:
        claims = signing.verify_token(
            request.META.get(_SIGNATURE, ""),
            url=urls,
            keys=conf.signing_keys,
            now=timezone.now().timestamp(),
            leeway=conf.signature_leeway,
        )
        # Not request.body: Django would refuse what is over DATA_UPLOAD_MAX_MEMORY_SIZE, which is
        # right for forms and loses answers.
        body: bytes = request.read(conf.max_callback_bytes + 1)
        if len(body) > conf.max_callback_bytes:
            raise CallbackTooLarge
        claims.check_body(body)
    except SignatureError as error:
        # The reason is for the operator only: a forger learns nothing from the response.
        logger.warning("Refused a %s for %s: %s (%s)", what, uuid, error, error.reason)
        raise
    if claims.key_index == 1:
        logger.warning(
            "A %s was signed with the next signing key: update the keys and redeploy.", what
        )
    return body, claims
