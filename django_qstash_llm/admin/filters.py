"""Filters that cost no look at the whole table to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import F, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..models import CallbackResponse, Lane
from ..models.attempt import TROUBLES
from ..models.callback import CallbackResponseQuerySet
from ..models.replay import UNREAD
from ..models.request import ANNOUNCED, LLMRequestQuerySet, State

if TYPE_CHECKING:
    from django.utils.functional import _StrOrPromise

MOST_TENANTS = 20
Lookups = list[tuple[Any, "_StrOrPromise"]]


class ProviderFilter(admin.SimpleListFilter):
    title = _("provider")
    parameter_name = "provider"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        # From the settings: SELECT DISTINCT over a million rows takes longer than the page.
        return [(name, name) for name in sorted({*app_settings().providers, "upstash"})]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(provider=self.value()) if self.value() else queryset


class TenantFilter(admin.SimpleListFilter):
    """The tenant that was chosen, on a request's page for instance, and those that have a lane."""

    title = _("tenant")
    parameter_name = "tenant"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        lanes = Lane.objects.exclude(tenant="").order_by("tenant")
        names = {*lanes.values_list("tenant", flat=True)[:MOST_TENANTS], self.value() or ""}
        return [(name, name) for name in sorted(names) if name]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(tenant=self.value()) if self.value() else queryset


class AttentionFilter(admin.SimpleListFilter):
    title = _("what to look at")
    parameter_name = "attention"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [
            ("error", _("has an error")),
            ("dead_letter", _("in the dead letters")),
            ("overdue", _("past its deadline")),
            ("unpriced", _("unpriced")),
            ("unannounced", _("not announced yet")),
            ("handler_failed", _("its handler failed")),
            ("given_up", _("its handler was given up")),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> LLMRequestQuerySet:
        rows: LLMRequestQuerySet = queryset
        unannounced = {"announced_at": None, "state__in": ANNOUNCED}
        match self.value():
            case "error":
                return rows.exclude(error="", error_code="")
            case "dead_letter":
                return rows.exclude(dead_letter_id="")
            case "overdue":
                return rows.overdue(timezone.now())
            case "unpriced":
                return rows.unpriced()
            case "unannounced":
                return rows.filter(**unannounced)
            case "handler_failed":
                return rows.filter(**unannounced, announce_tries__gt=0)
            case "given_up":
                most = app_settings().announce_tries
                return rows.filter(**unannounced, announce_tries__gte=most)
        return rows


class TroubleFilter(admin.SimpleListFilter):
    """Why a request waits, or why it failed: what was wrong with its last attempt."""

    title = _("trouble of its last attempt")
    parameter_name = "trouble"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return list(TROUBLES)

    def queryset(self, request: HttpRequest, queryset: Any) -> LLMRequestQuerySet:
        rows: LLMRequestQuerySet = queryset
        if not self.value():
            return rows
        troubled = CallbackResponse.objects.using(rows.db).filter(
            trouble=self.value(), retried=F("llm_request__attempts") - 1
        )
        of_last_attempts = troubled.order_by().values("llm_request")
        return rows.filter(state__in=[State.SUBMITTED, State.FAILED], pk__in=of_last_attempts)


class ReceiptAttentionFilter(admin.SimpleListFilter):
    title = _("what to look at")
    parameter_name = "attention"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [
            ("unread", _("unread: its reading broke")),
            ("recovered", _("recovered: it never arrived by itself")),
            ("next_key", _("verified by the next key")),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> CallbackResponseQuerySet:
        rows: CallbackResponseQuerySet = queryset
        match self.value():
            case "unread":
                return rows.filter(UNREAD)
            case "recovered":
                return rows.filter(is_recovered=True)
            case "next_key":
                return rows.filter(verified_by_next_key=True)
        return rows


class OrphanFilter(admin.SimpleListFilter):
    title = _("its request")
    parameter_name = "orphaned"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Lookups:
        return [("no", _("is here")), ("yes", _("is not here (any more)"))]

    def queryset(self, request: HttpRequest, queryset: Any) -> CallbackResponseQuerySet:
        rows: CallbackResponseQuerySet = queryset
        match self.value():
            case "yes":
                return rows.filter(llm_request=None)
            case "no":
                return rows.exclude(llm_request=None)
        return rows
