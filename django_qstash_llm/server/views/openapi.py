from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from .. import openapi
from .base import QStashView


class OpenAPIView(QStashView):
    """Tells no secret, so it asks for no token."""

    authentication_classes = ()
    permission_classes = ()

    def get(self, request: Request) -> Response:
        return Response(openapi.description(request.path.removesuffix("/openapi.json")))
