from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ...limits import Trouble
from ..counting import gates_with_counts, in_words
from ..models import Gate
from ..overview import limits_in_words, state_in_words
from ..waiting import at
from . import text
from .filters import PausedFilter
from .record import CONFIRMED, RecordAdmin, Tool


@admin.register(Gate)
class GateAdmin(RecordAdmin):
    actions = ("pause", "resume", "reset")
    list_display = ("host", "group", "sign", "in_flight", "waiting", "limits", "trouble_told")
    list_filter = (PausedFilter,)
    search_fields = ("host", "group")
    sections = (
        (None, ("host", "group", "credential", "sign", "in_flight", "waiting")),
        (gettext_lazy("Limits"), ("limits", "let_in", "refused")),
        (gettext_lazy("Last trouble"), ("trouble_told", "met_at", "remedy")),
        (gettext_lazy("When"), ("created_at", "updated_at", "paused_at", "resumed_at")),
    )
    wide = ("limits", "trouble_told", "remedy")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Gate]:
        return gates_with_counts().order_by("host", "group", "credential")

    # --- what is shown ---

    @admin.display(description=gettext_lazy("state"))
    def sign(self, gate: Gate) -> SafeString | str:
        return text.badge("paused") if gate.is_paused else state_in_words(gate, timezone.now())

    @admin.display(description=gettext_lazy("in flight"))
    def in_flight(self, gate: Gate) -> str:
        return in_words(gate.calls)

    @admin.display(description=gettext_lazy("waiting"))
    def waiting(self, gate: Gate) -> str:
        return in_words(gate.wait_list_size)

    @admin.display(description=gettext_lazy("limits"))
    def limits(self, gate: Gate) -> str:
        return limits_in_words(gate, timezone.now())

    @admin.display(description=gettext_lazy("last trouble"))
    def trouble_told(self, gate: Gate) -> str:
        return f"{gate.trouble}: {gate.words}" if gate.trouble else ""

    @admin.display(description=gettext_lazy("at"))
    def met_at(self, gate: Gate) -> str:
        return at(gate.troubled_at, timezone.now()) if gate.troubled_at else ""

    @admin.display(description=gettext_lazy("what to do"))
    def remedy(self, gate: Gate) -> str:
        return Trouble(gate.trouble).remedy if gate.trouble else ""

    def tools(self, obj: Any) -> list[Tool]:
        first = Tool("resume", _("Resume")) if obj.is_paused else Tool("pause", _("Pause"))
        return [first, Tool("reset", _("Forget what was learnt…"))]

    # --- what can be done ---

    @admin.action(description=gettext_lazy("Pause the selected gates"), permissions=["change"])
    def pause(self, request: HttpRequest, rows: QuerySet[Gate]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda gate: gate.pause(now=timezone.now()),
            note=_("Paused."),
            one="%(count)d gate paused.",
            many="%(count)d gates paused.",
        )

    @admin.action(description=gettext_lazy("Resume the selected gates"), permissions=["change"])
    def resume(self, request: HttpRequest, rows: QuerySet[Gate]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda gate: gate.resume(now=timezone.now()),
            note=_("Resumed."),
            one="%(count)d gate resumed.",
            many="%(count)d gates resumed.",
        )

    @admin.action(
        description=gettext_lazy("Forget what the selected gates learnt…"), permissions=["change"]
    )
    def reset(self, request: HttpRequest, rows: QuerySet[Gate]) -> HttpResponse | None:
        if CONFIRMED not in request.POST:
            return self.confirm(
                request,
                rows,
                title=_("Forget limits?"),
                text=_(
                    "What a provider's answers taught is forgotten, and what it asked to wait: one "
                    "call finds out anew."
                ),
            )
        return self.use(
            request,
            rows,
            lambda gate: gate.reset(now=timezone.now()),
            note=_("Forgot what was learnt."),
            one="%(count)d gate begins anew.",
            many="%(count)d gates begin anew.",
        )
