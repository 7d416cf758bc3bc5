"""One request and its attempts as JSON, for staff who may view them. Nothing is changed here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, InterfaceError, models
from django.views.decorators.cache import never_cache
from rest_framework.exceptions import NotFound
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response

from ..conf import app_settings
from ..door import OwnView, SiteSession, is_staff_who_may_view, outside_transactions
from ..models import CallbackResponse, LLMRequest
from ..models.attempt import Attempt
from ..models.callback import Kind
from ..models.forgetting import FULL

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 1000

_OF_A_REQUEST = (
    *("uuid", "state", "via", "queue", "trigger", "provider", "model", "tenant", "labels"),
    *("metadata", "retries", "timeout", "not_before", "submission_number", "submission_tries"),
    *("qstash_message_id", "deadline_at", "attempts", "last_status", "dead_letter_id"),
    *("completion", "completion_id", "answered_by", "finish_reason", "refusal", "tool_calls"),
    *("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens"),
    *(
        "cost",
        "cost_source",
        "cost_basis",
        "service_tier",
        "error_code",
        "error",
        "created_at",
        "submitted_at",
        "finished_at",
    ),
    *("announced_at", "forgotten_at", "digest"),
)
_ASKED = ("messages", "parameters")
_OF_AN_ATTEMPT = (
    *("attempt", "kind", "status", "trouble", "code", "words", "wait", "wait_source"),
    *("next_try_at", "delayed_by", "sentence", "source_message_id", "max_retries"),
    *("dead_letter_id", "problem", "seen_count", "is_recovered", "received_at", "applied_at"),
)


class MayView(BasePermission):
    """Staff of this site who may view what the view shows."""

    def has_permission(self, request: Request, view: Any) -> bool:
        return is_staff_who_may_view(request.user, view.model)


class ReadView(OwnView):
    """What staff may read. Every answer is JSON, refusals as well."""

    authentication_classes = (SiteSession,)
    permission_classes = (MayView,)
    http_method_names = ["get", "head"]
    model: type[models.Model]

    def handle_exception(self, exc: Exception) -> Response:
        if isinstance(exc, DatabaseError | InterfaceError):
            logger.error("The database does not answer: %s", type(exc).__name__)
            return Response({"detail": "database unavailable"}, status=503)
        return super().handle_exception(exc)

    def find(self, rows: models.QuerySet[LLMRequest], uuid: UUID) -> LLMRequest:
        llm_request = rows.filter(uuid=uuid).first()
        if llm_request is None:
            raise NotFound(f"There is no LLM request {uuid}.")
        return llm_request


class RequestView(ReadView):
    model = LLMRequest

    def get(self, request: Request, uuid: UUID) -> Response:
        # A site that keeps no messages tells none, not even while they wait to be sent.
        names = _OF_A_REQUEST + (_ASKED if app_settings().store_messages == FULL else ())
        return Response(_told(self.find(LLMRequest.objects.only(*names), uuid), names))


class AttemptsView(ReadView):
    model = CallbackResponse

    def get(self, request: Request, uuid: UUID) -> Response:
        llm_request = self.find(LLMRequest.objects.only("pk"), uuid)
        told = llm_request.callback_responses.exclude(kind__in=[Kind.QUARANTINED, Kind.PING])
        receipts = told.defer("header", "body").order_by("id")[:MOST_ATTEMPTS]
        return Response({"attempts": [_told(receipt, _OF_AN_ATTEMPT) for receipt in receipts]})


def _told(row: LLMRequest | Attempt, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in names}
    # As text: a number of JSON's may lose what is behind a cent.
    return {n: str(each) if isinstance(each, Decimal) else each for n, each in values.items()}


def door(view: type[ReadView]) -> Callable[..., Any]:
    # With ATOMIC_REQUESTS a database that is down would be an error before we can say so.
    return outside_transactions(never_cache(login_not_required(view.as_view())))


llm_request = door(RequestView)
attempts = door(AttemptsView)
