"""Where monitors look: whether what is due is done. The figures are for those who may see them."""

from __future__ import annotations

import hmac
import logging

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError, router
from django.views.decorators.cache import never_cache
from rest_framework.request import Request
from rest_framework.response import Response

from ..conf import SHORTEST_HEALTH_TOKEN, app_settings
from ..door import OwnView, SiteSession, is_staff_who_may_view, outside_transactions
from ..health import Health, Pulse
from ..models import LLMRequest

logger = logging.getLogger(__name__)


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
    if _shows_the_token(request.headers.get("Authorization", "")):
        return True
    return is_staff_who_may_view(request.user, LLMRequest)


def _shows_the_token(authorization: str) -> bool:
    expected = app_settings().health_token
    scheme, _, shown = authorization.partition(" ")
    if len(expected) < SHORTEST_HEALTH_TOKEN or scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), expected.encode())


# With ATOMIC_REQUESTS a database that is down would be an error before we can say so.
health = outside_transactions(never_cache(login_not_required(HealthView.as_view())))
