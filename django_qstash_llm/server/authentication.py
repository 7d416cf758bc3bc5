"""Who may call: whoever knows a token."""

from __future__ import annotations

import hmac
from typing import Any, cast

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from . import conf

REFUSAL = "unable to authenticate: invalid token"


class Caller:
    """Somebody who knows an account's token."""

    is_authenticated = True
    is_anonymous = False

    def __init__(self, account: str, *, may_write: bool) -> None:
        self.account = account
        self.may_write = may_write


class TokenAuthentication(BaseAuthentication):
    """``Authorization: Bearer <token>``, or ``?qstash_token=`` for webhooks that cannot set one."""

    def authenticate(self, request: Request) -> tuple[Caller, None]:
        caller = caller_of(_presented(request))
        if caller is None:
            # Raised, not left to others: there are no others.
            raise AuthenticationFailed(REFUSAL)
        return caller, None

    def authenticate_header(self, request: Request) -> str:
        # Without it DRF answers 403.
        return "Bearer"


class MayCall(BasePermission):
    """A read-only token reads."""

    message = "forbidden: this token is read-only"

    def has_permission(self, request: Request, view: Any) -> bool:
        return request.method in SAFE_METHODS or caller(request).may_write


class MayWrite(MayCall):
    """For what a read-only token does not even read: with the keys one can sign."""

    def has_permission(self, request: Request, view: Any) -> bool:
        return caller(request).may_write


def caller(request: Request) -> Caller:
    """Who is calling, once that was asked."""
    return cast(Caller, request.user)


def caller_of(presented: str) -> Caller | None:
    """Whose token this is. All are compared, however early one fits."""
    given, found = presented.encode("utf-8", "replace"), None
    if not conf.are_believed(presented):
        return None
    for account in conf.current().known_accounts:
        for token, may_write in ((account.token, True), (account.read_only_token, False)):
            if token and hmac.compare_digest(given, token.encode()):
                found = Caller(account.name, may_write=may_write)
    return found


def _presented(request: Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return str(token.strip())
    return str(request.query_params.get("qstash_token", ""))
