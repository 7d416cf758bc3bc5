"""What a refusal looks like on OpenAI's wire, and whether its reader should try again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpResponse
from rest_framework.exceptions import APIException

from ..exceptions import (
    BudgetExceeded,
    ChatFailed,
    ConfigurationError,
    IllegalState,
    InvalidRequest,
    NoSuchModel,
)
from ..limits import Trouble
from ..qstash import QStashError

logger = logging.getLogger(__name__)

JSON = "application/json"
INSUFFICIENT_QUOTA = "insufficient_quota"
"""Code and type of OpenAI's own refusal when money has run out."""
_TYPES = {429: "requests", 401: "authentication_error", 403: "permission_error"}


class Refusal(Exception):
    """An error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        should_retry: bool = False,
        may_be_paid: bool = False,
        body: bytes | None = None,
        kind: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.may_be_paid = may_be_paid
        """Whether a provider may have been asked, and will be paid: then the same is not to be
        tried again, by nobody's library and unasked."""
        self.headers = {
            **(headers or {}),
            # Official clients try 408, 409, 429 and 5xx again by themselves unless this says no.
            "x-should-retry": "true" if should_retry and not may_be_paid else "false",
        }
        self.body = body or error_body(status, code, message, param=param, kind=kind)
        """A provider's own words, where it said any."""

    def to_response(self) -> HttpResponse:
        return HttpResponse(
            self.body, status=self.status, content_type=JSON, headers=dict(self.headers)
        )


def as_refusal(error: Exception) -> Refusal:
    """What a caller is told of anything that was raised."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ChatFailed):
        return _of_provider(error)
    if isinstance(error, NoSuchModel):
        return no_such_model(error.name)
    if isinstance(error, BudgetExceeded):
        # No wait is named: official clients would take it, and a period may be a month.
        return Refusal(429, INSUFFICIENT_QUOTA, str(error), kind=INSUFFICIENT_QUOTA)
    if isinstance(error, InvalidRequest):
        field = error.field or None
        message = f"Invalid {f'value for {field!r}' if field else 'body'}: {error.problem}."
        return Refusal(400, "invalid_value" if field else "invalid_json", message, param=field)
    if isinstance(error, IllegalState):
        return Refusal(409, "illegal_state", str(error))
    if isinstance(error, Http404):
        return Refusal(404, "not_found", "There is no such thing.")
    if isinstance(error, PermissionDenied):
        return Refusal(403, "permission_denied", "That is not for you.")
    if isinstance(error, APIException):
        return _of_framework(error)
    # Of the rest the reasons are for the operator.
    if isinstance(error, ConfigurationError):
        logger.error("A call could not be made: %s", error)
        return Refusal(500, "server_error", "This server is not set up for it.")
    if isinstance(error, QStashError):
        logger.error("QStash could not be told: %s", error)
        return Refusal(503, "server_error", "QStash is not available.")
    if isinstance(error, OperationalError | InterfaceError):
        logger.error("The database does not answer: %s", type(error).__name__)
        # Nobody knows whether before or after the provider was asked.
        return Refusal(503, "server_error", "The database is not available.", may_be_paid=True)
    logger.error("A call ended in an error", exc_info=error)
    return Refusal(500, "server_error", "The server had an error.", may_be_paid=True)


def _of_framework(error: APIException) -> Refusal:
    message = str(error.detail)
    if error.status_code == 401:
        headers = {"WWW-Authenticate": "Bearer"}
        return Refusal(401, "invalid_api_key", message, headers=headers)
    codes = {403: "insufficient_permissions", 405: "method_not_allowed", 429: "rate_limit_exceeded"}
    return Refusal(error.status_code, codes.get(error.status_code), message)


_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
"""Of httpx, which is not for this room to know."""


def _of_provider(error: ChatFailed) -> Refusal:
    """In its own words, where they are for the caller."""
    headers = passed_on(error.headers) | {"x-request-id": str(error.llm_request.uuid)}
    status, message = error.status or 0, f"The provider gave no answer: {error}."
    if not status:
        is_unsent = type(error.__cause__).__name__ in _NEVER_SENT
        return Refusal(
            504 if error.code == "timeout" else 502,
            error.code,
            message,
            headers=headers,
            should_retry=is_unsent,
            may_be_paid=not is_unsent,
        )
    if error.trouble == Trouble.AUTH:
        # Not 401: the caller's own key is as right as ever.
        message = "The provider refused this server's key."
        return Refusal(502, "provider_auth", message, headers=headers)
    if status < 400:
        return Refusal(502, error.code, message, headers=headers, may_be_paid=True)
    return Refusal(
        status,
        error.code,
        str(error),
        headers=headers,
        should_retry=error.trouble in (Trouble.RATE, Trouble.OVERLOAD),
        may_be_paid=error.trouble == Trouble.FAULT,
        body=error.body if _is_error(error.body) else None,
    )


def _is_error(body: bytes) -> bool:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("error"), dict)


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a provider's headers that a caller paces itself by."""
    return {
        name: value
        for name, value in headers.items()
        if name.startswith("x-ratelimit-") or name in {"retry-after", "retry-after-ms"}
    }


def error_body(
    status: int, code: str | None, message: str, *, param: str | None = None, kind: str = ""
) -> bytes:
    usual = "server_error" if status >= 500 else "invalid_request_error"
    kind = kind or _TYPES.get(status, usual)
    error = {"message": message, "type": kind, "param": param, "code": code}
    # Escaped: a refusal may repeat half a surrogate pair, which no other text can.
    return json.dumps({"error": error}, separators=(",", ":")).encode()


def no_such_model(name: str) -> Refusal:
    """One that a caller may not ask is to them as if it were not there."""
    message = f"The model {name[:255]!r} does not exist or you do not have access to it."
    return Refusal(404, "model_not_found", message, param="model")
