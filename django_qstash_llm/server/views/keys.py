from __future__ import annotations

from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response

from ..authentication import MayWrite
from ..models import SigningKeys
from .base import QStashView


class KeysView(QStashView):
    permission_classes = (IsAuthenticated, MayWrite)

    def get(self, request: Request) -> Response:
        return Response(SigningKeys.objects.current(self.account).to_json())


class RotateKeysView(QStashView):
    def post(self, request: Request) -> Response:
        return Response(SigningKeys.objects.rotate(self.account).to_json())
