from __future__ import annotations

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash.options import LONGEST_PERIOD, NAME
from .. import conf
from ..exceptions import Refusal
from ..filters import integer_of, truth_of
from ..models import FlowControlKey, Message
from .base import QStashView, plain


class FlowControlKeysView(QStashView):
    def get(self, request: Request) -> Response:
        """All keys, or those whose names hold ``search``."""
        now = timezone.now()
        keys = FlowControlKey.objects.owned_by(self.account).with_counts()
        if search := request.query_params.get("search"):
            # No key holds what no name can.
            keys = keys.filter(key__contains=search) if NAME.fullmatch(search) else keys.none()
        return Response([key.to_record(now).to_json() for key in keys])


class FlowControlKeyView(QStashView):
    def get(self, request: Request, key: str) -> Response:
        keys = FlowControlKey.objects.owned_by(self.account).with_counts()
        found = keys.filter(key=plain(key)).first()
        if found is None:
            raise Refusal(404, f"flow control key {key} not found")
        return Response(found.to_record(timezone.now()).to_json())


class _ChangeView(QStashView):
    """A change of a key, which is made if no message brought it yet: an operator may come first."""

    def called(self, key: str) -> FlowControlKey:
        if not NAME.fullmatch(key):
            raise Refusal(400, "invalid flow control key")
        now = timezone.now()
        defaults = {"created_at": now, "updated_at": now}
        return FlowControlKey.objects.get_or_create(
            account=self.account, key=key, defaults=defaults
        )[0]


class PauseView(_ChangeView):
    def post(self, request: Request, key: str) -> Response:
        self.called(key).pause(now=timezone.now())
        return Response({})


class ResumeView(_ChangeView):
    def post(self, request: Request, key: str) -> Response:
        self.called(key).resume(now=timezone.now())
        return Response({})


class PinView(_ChangeView):
    def post(self, request: Request, key: str) -> Response:
        query = request.query_params
        parallelism = integer_of(query, "parallelism", least=1, most=2**31 - 1)
        rate = integer_of(query, "rate", least=1, most=2**31 - 1)
        period = integer_of(query, "period", least=1, most=LONGEST_PERIOD)
        if parallelism is None and rate is None:
            raise Refusal(400, "give parallelism, rate or both to pin")
        self.called(key).pin(now=timezone.now(), parallelism=parallelism, rate=rate, period=period)
        return Response({})


class UnpinView(_ChangeView):
    def post(self, request: Request, key: str) -> Response:
        parallelism = truth_of(request.query_params, "parallelism")
        rate = truth_of(request.query_params, "rate")
        self.called(key).unpin(now=timezone.now(), parallelism=parallelism, rate=rate)
        return Response({})


class ResetRateView(_ChangeView):
    def post(self, request: Request, key: str) -> Response:
        self.called(key).reset_rate(now=timezone.now())
        return Response({})


class GlobalParallelismView(QStashView):
    def get(self, request: Request) -> Response:
        """How many deliveries are in flight, and how many one engine takes at most."""
        in_flight = Message.objects.owned_by(self.account).claimed().count()
        most = conf.current().concurrency
        return Response({"parallelismMax": most, "parallelismCount": in_flight})
