"""Circuits: what outside takes nothing at the moment, and until when nobody asks it."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from ..models import Circuit
from . import actions, figures, text
from .record import RecordAdmin, Tool


@admin.register(Circuit)
class CircuitAdmin(RecordAdmin):
    list_display = ("name", "open_column", "failures", "until_column", "reason_column")
    fields = (("name", "failures"), ("opened_at", "open_until"), "reason")
    actions = ("close",)

    @admin.display(description=_("open"), boolean=True)
    def open_column(self, circuit: Circuit) -> bool:
        return circuit.is_open

    @admin.display(description=_("asked again"))
    def until_column(self, circuit: Circuit) -> SafeString | str:
        return figures.moment(circuit.open_until) if circuit.is_open else figures.UNKNOWN

    @admin.display(description=_("reason"))
    def reason_column(self, circuit: Circuit) -> str:
        return text.excerpt(circuit.reason, 200) or figures.UNKNOWN

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    # --- what can be done ---

    def tools(self, obj: Circuit) -> list[Tool]:
        return [Tool("close", _("Close: call again at once"))] if obj.is_open else []

    @admin.action(permissions=["act"], description=_("Close selected %(verbose_name_plural)s"))
    def close(self, request: HttpRequest, queryset: QuerySet[Circuit]) -> HttpResponse | None:
        closed = [circuit for circuit in queryset if circuit.is_open]
        for circuit in closed:
            Circuit.objects.using(queryset.db).close(circuit.name)
            self.log_change(request, circuit, str(_("Closed.")))
        sentence = ngettext("%d circuit was closed.", "%d circuits were closed.", len(closed))
        self.message_user(request, sentence % len(closed), messages.SUCCESS)
        return actions.back_to_page(self, request, closed[0] if closed else queryset.first())
