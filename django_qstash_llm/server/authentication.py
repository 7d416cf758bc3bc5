"""Who may call: whoever knows the token."""

from __future__ import annotations

import hmac

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from . import conf

REFUSAL = "unable to authenticate: invalid token"


class Account:
    """Whoever knows the token. There is one."""

    is_authenticated = True
    is_anonymous = False


class TokenAuthentication(BaseAuthentication):
    """``Authorization: Bearer <token>``, or ``?qstash_token=`` for webhooks that cannot set one."""

    def authenticate(self, request: Request) -> tuple[Account, None]:
        if not is_token(_presented(request)):
            # Raised, not left to others: there are no others.
            raise AuthenticationFailed(REFUSAL)
        return Account(), None

    def authenticate_header(self, request: Request) -> str:
        # Without it DRF answers 403.
        return "Bearer"


def is_token(presented: str) -> bool:
    token = conf.current().token
    given = presented.encode("utf-8", "replace")
    return bool(token) and hmac.compare_digest(given, token.encode())


def _presented(request: Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return str(token.strip())
    return str(request.query_params.get("qstash_token", ""))
