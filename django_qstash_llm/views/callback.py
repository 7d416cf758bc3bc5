"""Where QStash tells us: verify, read, store, 200. What the answer means to users runs later."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, UnreadablePostError
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ..authentication import CallbackTooLarge, read_signed_body
from ..completions import decompress
from ..door import OwnView, outside_transactions
from ..exceptions import UnreadableCompletion
from ..models import CallbackResponse
from ..models.callback import UNSTORABLE
from ..qstash import Callback, EnvelopeError, SignatureError

logger = logging.getLogger(__name__)

_STORED = b'{"stored":true}'
# With its length a server sends it whole, and not in chunks.
_STORED_HEADERS = {"Content-Type": "application/json", "Content-Length": str(len(_STORED))}


class CallbackView(OwnView):
    """QStash's callback and failure callback for one request.

    Each status is chosen for what QStash does with it: 200 means committed and ends the matter;
    400, 401 and 503 make it try again; 489 with ``Upstash-NonRetryable-Error`` says never again.
    """

    http_method_names = ["post"]

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        # What is stored, and that is nearly all, needs nothing of what DRF gets ready for a request.
        if request.method == "POST":
            self.refusal = self._take(request, kwargs["uuid"])
            if self.refusal is None:
                return HttpResponse(_STORED, headers=_STORED_HEADERS)
        return super().dispatch(request, *args, **kwargs)

    def post(self, request: Request, uuid: UUID) -> Response:
        assert self.refusal is not None
        return self.refusal

    def _take(self, request: HttpRequest, uuid: UUID) -> Response | None:
        """Why it is refused; None where it is stored."""
        try:
            body, claims = read_signed_body(request, uuid)
        except SignatureError:
            return Response({"error": "invalid signature"}, status=401)
        except CallbackTooLarge:
            return Response({"error": "larger than MAX_CALLBACK_BYTES"}, status=413)
        except UnreadablePostError:
            return Response({"error": "the body broke off"}, status=400)
        now = timezone.now()
        try:
            try:
                CallbackResponse.objects.receive(
                    Callback.from_json(decompress(body), with_source=False),
                    uuid=uuid,
                    message_id=request.META.get("HTTP_UPSTASH_MESSAGE_ID", ""),
                    key_index=claims.key_index,
                    now=now,
                )
            # What no column takes is wrong with the callback; any other DatabaseError is not.
            except (EnvelopeError, UnreadableCompletion, *UNSTORABLE) as error:
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
        return None


# With ATOMIC_REQUESTS a failure to read would roll back the evidence.
callback = outside_transactions(login_not_required(CallbackView.as_view()))
