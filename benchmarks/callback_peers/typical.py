"""(b1) A callback taken as a typical project takes it: DRF, a serializer, PyJWT and the ORM."""

from __future__ import annotations

import base64
import hashlib
import json
from decimal import Decimal
from typing import Any

import jwt
from django.conf import settings
from django.db import transaction
from django.urls import path
from django.utils import timezone
from rest_framework import serializers
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from .models import Ask, Told


class CallbackSerializer(serializers.Serializer):
    status = serializers.IntegerField()
    header = serializers.DictField(child=serializers.ListField(), required=False)
    body = serializers.CharField(allow_blank=True)
    retried = serializers.IntegerField(min_value=0)
    maxRetries = serializers.IntegerField(min_value=0)
    sourceMessageId = serializers.CharField(max_length=255)
    dlqId = serializers.CharField(max_length=255, required=False, allow_blank=True)


def verify(request: Request, body: bytes, url: str) -> None:
    token = request.headers.get("Upstash-Signature", "")
    for key in (settings.QSTASH_CURRENT_SIGNING_KEY, settings.QSTASH_NEXT_SIGNING_KEY):
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=["HS256"],
                issuer="Upstash",
                leeway=30,
                options={"require": ["iss", "sub", "exp", "nbf", "body"]},
            )
        except jwt.InvalidSignatureError:
            continue
        except jwt.PyJWTError as error:
            raise AuthenticationFailed("invalid signature") from error
        digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode()
        if claims["sub"] == url and claims["body"].rstrip("=") == digest.rstrip("="):
            return
        break
    raise AuthenticationFailed("invalid signature")


class CallbackView(APIView):
    authentication_classes: list[Any] = []
    permission_classes: list[Any] = []

    def post(self, request: Request, uuid: Any) -> Response:
        verify(request, request.body, f"{settings.QSTASH_CALLBACK_URL}/callback/{uuid}/")
        serializer = CallbackSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        told = serializer.validated_data
        body = base64.b64decode(told["body"]).decode()
        with transaction.atomic():
            ask = Ask.objects.select_for_update().get(uuid=uuid)
            _, is_new = Told.objects.get_or_create(
                source_message_id=told["sourceMessageId"],
                retried=told["retried"],
                defaults={
                    "ask": ask,
                    "max_retries": told["maxRetries"],
                    "status": told["status"],
                    "header": told.get("header", {}),
                    "body": body,
                    "dead_letter_id": told.get("dlqId", ""),
                },
            )
            if is_new:
                self.apply(ask, told, body)
                ask.save()
        return Response({"stored": True})

    def apply(self, ask: Ask, told: dict[str, Any], body: str) -> None:
        if 200 <= told["status"] < 300:
            answer = json.loads(body)
            price = settings.PRICES[ask.model]
            ask.completion = answer["choices"][0]["message"]["content"]
            ask.finish_reason = answer["choices"][0]["finish_reason"]
            ask.input_tokens = answer["usage"]["prompt_tokens"]
            ask.output_tokens = answer["usage"]["completion_tokens"]
            ask.cost = (
                ask.input_tokens * Decimal(price["input"])
                + ask.output_tokens * Decimal(price["output"])
            ) / 1_000_000
            ask.state = "completed"
            ask.finished_at = timezone.now()
        elif told["retried"] >= told["maxRetries"]:
            ask.error = body
            ask.state = "failed"
            ask.finished_at = timezone.now()


urlpatterns = [path("callback/<uuid:uuid>/", CallbackView.as_view())]
