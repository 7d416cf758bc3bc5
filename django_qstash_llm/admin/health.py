"""How it goes: a page of its own, and a word at the top of the list when something does not move."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.translation import gettext_lazy as _

from ..health import Health, Pulse, capped
from ..models import CallbackResponse
from . import figures

if TYPE_CHECKING:
    from .record import RecordAdmin as _Admin
else:
    _Admin = object

TEMPLATE = "admin/django_qstash_llm/health.html"

# What is counted, and which list shows it.
_COUNTED: dict[str, tuple[Any, str]] = {
    "pending": (_("pending"), "state__exact=pending"),
    "submitted": (_("submitted"), "state__exact=submitted"),
    "overdue": (_("submitted, past their deadline"), ""),
    "given_up": (_("finished, and announcing was given up"), "attention=given_up"),
    "unpriced": (_("answered, without a price"), "attention=unpriced"),
    "unread": (_("callbacks whose reading broke"), "attention=unread"),
    "quarantined": (_("callbacks in quarantine"), "kind__exact=quarantined"),
    "orphaned": (_("callbacks without a request"), "orphaned=yes"),
    "by_next_key": (_("callbacks of 24 hours verified by the next key"), "attention=next_key"),
}
_OF_RECEIPTS = {"unread", "quarantined", "orphaned", "by_next_key"}


class HealthMixin(_Admin):
    """For the admin of the requests, before ``RecordAdmin``."""

    def get_urls(self) -> list[Any]:
        meta = self.model._meta
        name = f"{meta.app_label}_{meta.model_name}_health"
        view = self.admin_site.admin_view(self.health_view)
        # First: Django's last pattern takes every path for a primary key.
        return [path("health/", view, name=name), *super().get_urls()]

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        context = dict(extra_context or {})
        if request.method == "GET" and self.has_view_permission(request):
            context["pulse"] = Pulse.read(self.get_queryset(request).db)
        return super().changelist_view(request, context)

    def health_view(self, request: HttpRequest) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        health = Health.read(self.get_queryset(request).db)
        context = {
            **self.admin_site.each_context(request),
            "title": _("Health"),
            "opts": self.model._meta,
            "media": self.media,
            "health": health,
            "ages": _ages(health),
            "counts": self._counts(health),
            "list_url": self.list_url(self.model),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, TEMPLATE, context)

    def _counts(self, health: Health) -> list[tuple[Any, str, str]]:
        rows = []
        for name, number in health.counts.items():
            label, query = _COUNTED[name]
            rows.append((label, capped(number), self._where(name, query) if number else ""))
        return rows

    def _where(self, name: str, query: str) -> str:
        """Which list shows these; empty where none does."""
        model = CallbackResponse if name in _OF_RECEIPTS else self.model
        if not query or not self.admin_site.is_registered(model):
            return ""
        return self.list_url(model, f"?{query}")


def _ages(health: Health) -> list[tuple[Any, str]]:
    ages = (
        (_("oldest due request"), health.oldest_due),
        (_("oldest finished request to be announced"), health.oldest_unannounced),
        (_("oldest request past its deadline"), health.oldest_overdue),
        (_("oldest answer to be added up"), health.oldest_unsettled),
    )
    return [
        (label, figures.UNKNOWN if age is None else figures.duration(timedelta(seconds=age)))
        for label, age in ages
    ]
