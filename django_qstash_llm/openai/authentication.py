"""Who calls, and what they may: by one of our API keys, or as the site's own classes say."""

from __future__ import annotations

import hmac
from typing import Any

from django.contrib.auth.models import AnonymousUser
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from ..conf import app_settings, classes_of
from ..models import ApiKey
from ..models.api_key import BEGINNING
from ..models.caller import Caller
from ..models.request import CallerKind
from .refusals import Refusal


class KeyAuthentication(BaseAuthentication):
    """``Authorization: Bearer <key>``."""

    def authenticate(self, request: Request) -> tuple[Any, Caller] | None:
        shown = _bearer(request)
        if shown.startswith(BEGINNING):
            api_key = ApiKey.objects.of(shown, now=timezone.now())
            if api_key is None:
                raise AuthenticationFailed("Incorrect API key provided.")
            user = api_key.user
            caller = Caller(kind=CallerKind.KEY, user=user, api_key=api_key)
            return user or AnonymousUser(), caller
        if _is_qstash_token(shown):
            return AnonymousUser(), Caller(kind=CallerKind.QSTASH)
        return None  # perhaps the site's own classes know it

    def authenticate_header(self, request: Request) -> str:
        # Without it DRF answers 403.
        return "Bearer"


class SiteAuthentication(BaseAuthentication):
    """Whatever ``OPENAI_AUTHENTICATION`` names."""

    def authenticate(self, request: Request) -> tuple[Any, Any] | None:
        # Not by DRF's own list: that is made where a wrong setting would be nobody's to answer.
        for each in classes_of("openai_authentication"):
            found: tuple[Any, Any] | None = each().authenticate(request)
            if found is not None:
                return found
        return None


class HasScope(BasePermission):
    """The caller is known, and their key is for this part of the API."""

    def has_permission(self, request: Request, view: Any) -> bool:
        if not caller_of(request).has(view.scope):
            message = f"Your API key lacks the scope '{view.scope}'."
            raise Refusal(403, "insufficient_permissions", message)
        return True


def caller_of(request: Request) -> Caller:
    """Raises ``Refusal``, 401, when nobody was believed."""
    if isinstance(request.auth, Caller):
        return request.auth
    user = request.user  # None where REST_FRAMEWORK["UNAUTHENTICATED_USER"] says so
    if user is None or not user.is_authenticated or user.pk is None:
        problem = "Incorrect" if request.headers.get("Authorization") else "You did not provide an"
        raise no_such_key(f"{problem} API key{' provided' if problem == 'Incorrect' else ''}.")
    return Caller(kind=CallerKind.USER, user=user)


def no_such_key(message: str) -> Refusal:
    return Refusal(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


def _bearer(request: Request) -> str:
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    return shown.strip() if scheme.lower() == "bearer" else ""


def _is_qstash_token(shown: str) -> bool:
    conf = app_settings()
    if not conf.openai_takes_qstash_token or not conf.qstash_token:
        return False
    return hmac.compare_digest(shown.encode("utf-8", "replace"), conf.qstash_token.encode())
