"""What our doors have in common: they take nothing from the host site, which has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from django.contrib.auth import get_permission_codename
from django.db import models
from rest_framework.authentication import BaseAuthentication
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.views import APIView, exception_handler

View = TypeVar("View", bound=Callable[..., Any])

EVENTS = "text/event-stream; charset=utf-8"
EVENT_HEADERS = {
    # Nobody between us and the reader may keep it, or collect it to compress it.
    "Cache-Control": "no-cache, no-transform",
    # nginx would collect what comes.
    "X-Accel-Buffering": "no",
    # And so would Django's GZipMiddleware; what is encoded already it leaves alone.
    "Content-Encoding": "identity",
}
"""Of a response of server-sent events."""


class OwnRenderer(BaseContentNegotiation):
    """Our first renderer, whatever ``Accept`` says: the official clients always say JSON."""

    def select_parser(self, request: Request, parsers: Iterable[BaseParser]) -> BaseParser | None:
        return None

    def select_renderer(
        self, request: Request, renderers: Iterable[BaseRenderer], format_suffix: str | None = None
    ) -> tuple[BaseRenderer, str]:
        renderer = next(iter(renderers))
        return renderer, renderer.media_type or ""


class OwnJSON(JSONRenderer):
    compact = True
    strict = True
    ensure_ascii = False


class SiteSession(BaseAuthentication):
    """Whoever Django says it is, not looked up before somebody asks: there may be no database."""

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        # A site without sessions has no user.
        user = getattr(request._request, "user", None)
        return None if user is None else (user, None)


def is_staff_who_may_view(user: Any, model: type[models.Model]) -> bool:
    """``user`` is None where ``REST_FRAMEWORK["UNAUTHENTICATED_USER"]`` says so."""
    permission = f"{model._meta.app_label}.{get_permission_codename('view', model._meta)}"
    # A user model need know neither staff nor permissions.
    is_staff = getattr(user, "is_active", False) and getattr(user, "is_staff", False)
    return bool(is_staff and hasattr(user, "has_perm") and user.has_perm(permission))


class OwnView(APIView):
    """A view to which the host site's ``REST_FRAMEWORK`` means nothing."""

    authentication_classes: Any = ()
    permission_classes: Any = ()
    throttle_classes = ()
    parser_classes = ()
    renderer_classes = (OwnJSON,)
    content_negotiation_class = OwnRenderer
    versioning_class = None
    metadata_class = None
    schema = None

    def perform_authentication(self, request: Request) -> None:
        """Nobody is looked up before somebody asks who it is: there may be no database."""

    def get_exception_handler(self) -> Any:
        return exception_handler


class _EveryDatabase(set[str]):
    def __contains__(self, alias: object) -> bool:
        return True


def outside_transactions(view: View) -> View:
    """``ATOMIC_REQUESTS`` is not for this view, on whichever database it stands.

    ``transaction.non_atomic_requests`` takes one alias, and ours is for a router to say.
    """
    view._non_atomic_requests = _EveryDatabase()  # type: ignore[attr-defined]
    return view
