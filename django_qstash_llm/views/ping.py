"""Where the doctor's ping arrives, as a callback would, and what became of it is written down."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from uuid import UUID

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError
from django.db.models import QuerySet
from django.http import UnreadablePostError
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ..authentication import CallbackTooLarge, read_signed_ping
from ..cleaning import clean_text
from ..conf import app_settings
from ..door import OwnView, outside_transactions
from ..models import CallbackResponse
from ..models.callback import Kind
from ..qstash import SignatureError

logger = logging.getLogger(__name__)

AWAITED_FOR = timedelta(minutes=10)
"""How long after it was sent a ping is still written down."""


class PingView(OwnView):
    """One ping of the doctor's, which waits for its row to say that it is here, or why not.

    Believed exactly as a callback is. A nonce that the doctor did not send writes nothing.
    """

    http_method_names = ["post"]

    def post(self, request: Request, uuid: UUID) -> Response:
        now = timezone.now()
        try:
            return self._take(request, uuid, now)
        except (DatabaseError, InterfaceError):
            logger.exception("What became of the ping %s could not be written down", uuid)
            return Response({"error": "database unavailable"}, status=503)

    def _take(self, request: Request, uuid: UUID, now: datetime) -> Response:
        try:
            _body, claims = read_signed_ping(request._request, uuid)
        except SignatureError as error:
            _note(uuid, f"{error.reason}: {error}", now=now)
            return Response({"error": "invalid signature"}, status=401)
        except CallbackTooLarge:
            _note(uuid, "body: it is larger than MAX_CALLBACK_BYTES", now=now)
            return Response({"error": "larger than MAX_CALLBACK_BYTES"}, status=413)
        except UnreadablePostError:
            _note(uuid, "body: it broke off", now=now)
            return Response({"error": "the body broke off"}, status=400)
        has_arrived = _awaited(uuid, now).update(
            applied_at=now,
            status=200,
            header={"issued-at": [str(claims.issued_at)]},
            verified_by_next_key=claims.key_index == 1,
            problem="",
        )
        if not has_arrived:
            return Response({"error": "no such ping"}, status=404)
        return Response({"arrived": True})


def _awaited(uuid: UUID, now: datetime) -> QuerySet[CallbackResponse]:
    pings = CallbackResponse.objects.filter(kind=Kind.PING, uuid=uuid, applied_at=None)
    return pings.filter(received_at__gt=now - AWAITED_FOR)


def _note(uuid: UUID, problem: str, *, now: datetime) -> None:
    problem = app_settings().without_secrets(clean_text(problem, limit=2000))
    _awaited(uuid, now).update(problem=problem)


# As for callbacks: a refusal that is written down must not be rolled back.
ping = outside_transactions(login_not_required(PingView.as_view()))
