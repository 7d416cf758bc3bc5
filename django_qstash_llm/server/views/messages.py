from __future__ import annotations

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from .. import filters
from ..exceptions import Refusal
from ..filters import count_of, narrowed
from ..models import Message
from .base import QStashView, ids_of, plain


class MessageView(QStashView):
    def get(self, request: Request, message_id: str) -> Response:
        message = (
            Message.objects.owned_by(self.account)
            .readable()
            .filter(message_id=plain(message_id))
            .first()
        )
        if message is None:
            raise Refusal(404, f"message {message_id} not found")
        return Response(message.to_record().to_json())

    def delete(self, request: Request, message_id: str) -> Response:
        rows = Message.objects.owned_by(self.account).filter(message_id=plain(message_id))
        cancelled = rows.cancel(now=timezone.now())
        # Said again, and no less true: it is in flight, and not cancelled yet.
        if not cancelled and not rows.filter(state=Message.State.CANCEL_REQUESTED).exists():
            raise Refusal(404, f"message {message_id} not found")
        return Response({"cancelled": 1}, status=202)


class MessagesView(QStashView):
    def delete(self, request: Request) -> Response:
        """These, whatever filters stand beside, those that filters select, or, with neither, all."""
        rows = Message.objects.owned_by(self.account)
        ids = ids_of(request, "messageIds")
        if ids is None:
            rows = narrowed(rows, request.query_params, filters.MESSAGES)
        else:
            rows = rows.filter(message_id__in=ids)
        # Read, and then let be, as QStash does since its JavaScript client 2.12: that one always
        # sends it, and promises that one call cancels all there is.
        count_of(request.query_params, default=500, most=500)
        return Response({"cancelled": rows.cancel(now=timezone.now())})
