"""Filters that cost no look at a whole table to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from .. import conf
from ..models import Message, Queue
from ..overview import DEFAULT

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise

Lookups = list[tuple[Any, "_StrOrPromise"]]
MOST_QUEUES = 100


def are_several_accounts() -> bool:
    """The public ones of development do not count: they are for the SDKs' own tests."""
    public = {account.name for account in conf.DEVELOPMENT_ACCOUNTS}
    return any(account.name not in public for account in conf.current().known_accounts)


class AccountFilter(admin.SimpleListFilter):
    title = _("account")
    parameter_name = "account"
    lookup = "account"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        # From the settings: SELECT DISTINCT over a million rows takes longer than the page.
        if not are_several_accounts():
            return []
        names = (account.name for account in conf.current().known_accounts)
        return [(name or DEFAULT, name or DEFAULT) for name in names]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if not self.value():
            return queryset
        name = "" if self.value() == DEFAULT else self.value()
        return queryset.filter(**{self.lookup: name})


class MessageAccountFilter(AccountFilter):
    """Of what belongs to a message, and with it to its account."""

    lookup = "message__account"


class QueueFilter(admin.SimpleListFilter):
    title = _("queue")
    parameter_name = "queue"
    lookup = "queue"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        queues = Queue.objects.standing().order_by("name")
        return [(str(queue.pk), queue.name) for queue in queues[:MOST_QUEUES]]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value() or ""
        return queryset.filter(**{self.lookup: value}) if value.isdecimal() else queryset


class PausedFilter(admin.SimpleListFilter):
    title = _("state")
    parameter_name = "paused"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [("no", _("open")), ("yes", _("paused"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        is_paused = {"yes": True, "no": False}.get(self.value() or "")
        return queryset if is_paused is None else queryset.filter(is_paused=is_paused)


class WaitsFilter(admin.SimpleListFilter):
    """By what the engine itself looks for, so each has an index."""

    title = _("what it waits for")
    parameter_name = "waits"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [
            ("answer", _("an answer: in flight")),
            ("time", _("its time")),
            ("queue", _("its turn in a queue")),
            ("flow", _("flow control")),
            ("limits", _("its provider's limits")),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> QuerySet[Any]:
        rows: QuerySet[Any] = queryset
        match self.value():
            case "answer":
                return rows.exclude(claim_token="")
            case "time":
                return rows.filter(due_at__isnull=False, claim_token="")
            case "queue":
                return rows.filter(waits_for=Message.Waits.QUEUE)
            case "flow":
                return rows.filter(waits_for=Message.Waits.FLOW_CONTROL)
            case "limits":
                return rows.filter(waits_for=Message.Waits.GATE)
        return rows


class AnswerFilter(admin.SimpleListFilter):
    title = _("last answer")
    parameter_name = "answer"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [
            ("none", _("none")),
            ("429", _("429: too many requests")),
            ("4xx", _("another 4xx")),
            ("5xx", _("5xx")),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        match self.value():
            case "none":
                return queryset.filter(response_status__lt=0)
            case "429":
                return queryset.filter(response_status=429)
            case "4xx":
                rows = queryset.filter(response_status__gte=400, response_status__lt=500)
                return rows.exclude(response_status=429)
            case "5xx":
                return queryset.filter(response_status__gte=500)
        return queryset
