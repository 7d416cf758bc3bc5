"""Where monitors look: whether what is due is done. The figures are for those who may see them."""

from __future__ import annotations

import hmac
import logging
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError, router
from django.views.decorators.cache import never_cache
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request
from rest_framework.response import Response

from ..conf import SHORTEST_HEALTH_TOKEN, app_settings
from ..health import Health, Pulse
from ..models import LLMRequest
from .base import OwnView, outside_transactions

logger = logging.getLogger(__name__)


class SiteSession(BaseAuthentication):
    """Whoever Django says it is, not looked up before somebody asks: there may be no database."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        # A site without sessions has no user.
        user = getattr(request._request, "user", None)
        return None if user is None else (user, None)


class HealthView(OwnView):
    """200 while everything moves; 503 when something waits for longer than ``HEALTH_LATE``, or when
    there is no database to ask."""

    authentication_classes = (SiteSession,)
    http_method_names = ["get", "head"]

    def get(self, request: Request) -> Response:
        using = router.db_for_write(LLMRequest)
        try:
            pulse = Health.read(using) if _may_see_figures(request) else Pulse.read(using)
        except (DatabaseError, InterfaceError) as error:
            logger.error("The database does not answer: %s", type(error).__name__)
            return Response({"status": "database unavailable"}, status=503)
        told = pulse.to_json() if isinstance(pulse, Health) else {"status": pulse.status}
        return Response(told, status=200 if pulse.is_ok else 503)


def _may_see_figures(request: Request) -> bool:
    return _shows_the_token(request.headers.get("Authorization", "")) or _is_staff(request)


def _shows_the_token(authorization: str) -> bool:
    expected = app_settings().health_token
    scheme, _, shown = authorization.partition(" ")
    if len(expected) < SHORTEST_HEALTH_TOKEN or scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), expected.encode())


def _is_staff(request: Request) -> bool:
    user = request.user  # None where REST_FRAMEWORK["UNAUTHENTICATED_USER"] says so
    permission = f"{LLMRequest._meta.app_label}.view_{LLMRequest._meta.model_name}"
    # A user model need know neither staff nor permissions.
    is_staff = getattr(user, "is_active", False) and getattr(user, "is_staff", False)
    return bool(is_staff and hasattr(user, "has_perm") and user.has_perm(permission))


# With ATOMIC_REQUESTS a database that is down would be an error before we can say so.
health = outside_transactions(never_cache(login_not_required(HealthView.as_view())))
