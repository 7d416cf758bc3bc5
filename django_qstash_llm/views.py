"""Where QStash tells us: verify, read, store, 200. What the answer means to users runs later."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from uuid import UUID

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, transaction
from django.utils import timezone
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from .authentication import CallbackTooLarge, read_signed_body
from .completions import decompress
from .exceptions import UnreadableCompletion
from .models import CallbackResponse
from .qstash import Callback, EnvelopeError, SignatureError

logger = logging.getLogger(__name__)

# SQLite's driver and Django's fields refuse some of it before any database sees it.
_UNSTORABLE = (DataError, IntegrityError, OverflowError, UnicodeError)


class OwnRenderer(BaseContentNegotiation):
    """Our first renderer, whatever ``Accept`` says: QStash reads the status only."""

    def select_parser(self, request: Request, parsers: Iterable[BaseParser]) -> BaseParser | None:
        return None

    def select_renderer(
        self, request: Request, renderers: Iterable[BaseRenderer], format_suffix: str | None = None
    ) -> tuple[BaseRenderer, str]:
        renderer = next(iter(renderers))
        return renderer, renderer.media_type or ""


class CallbackView(APIView):
    """QStash's callback and failure callback for one request.

    Each status is chosen for what QStash does with it: 200 means committed and ends the matter;
    401 and 503 make it try again; 489 with ``Upstash-NonRetryable-Error`` says never again.
    """

    # The host site's defaults are not ours.
    authentication_classes = ()
    permission_classes = ()
    throttle_classes = ()
    parser_classes = ()
    renderer_classes = (JSONRenderer,)
    content_negotiation_class = OwnRenderer
    http_method_names = ["post"]
    schema = None

    def post(self, request: Request, uuid: UUID) -> Response:
        try:
            body, claims = read_signed_body(request, uuid)
        except SignatureError:
            return Response({"error": "invalid signature"}, status=401)
        except CallbackTooLarge:
            return Response({"error": "larger than MAX_CALLBACK_BYTES"}, status=413)
        now = timezone.now()
        try:
            try:
                CallbackResponse.objects.receive(
                    Callback.from_json(decompress(body)),
                    uuid=uuid,
                    message_id=request.headers.get("Upstash-Message-Id", ""),
                    key_index=claims.key_index,
                    now=now,
                )
            # What no column takes is wrong with the callback; any other DatabaseError is not.
            except (EnvelopeError, UnreadableCompletion, *_UNSTORABLE) as error:
                logger.error("Callback for %s put into quarantine: %s", uuid, error)
                CallbackResponse.objects.quarantine(body, uuid=uuid, problem=str(error), now=now)
                return Response(
                    {"error": "unusable"},
                    status=489,
                    headers={"Upstash-NonRetryable-Error": "true"},
                )
        except (DatabaseError, InterfaceError):
            logger.exception("Callback for %s could not be stored; QStash will repeat it", uuid)
            # No Retry-After: QStash's own back-off outlasts an outage, five quick repeats do not.
            return Response({"error": "database unavailable"}, status=503)
        return Response({"stored": True})


# With ATOMIC_REQUESTS a failure to read would roll back the evidence.
callback = transaction.non_atomic_requests(login_not_required(CallbackView.as_view()))
