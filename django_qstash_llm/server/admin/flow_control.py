from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.urls import path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from django.views.decorators.http import require_POST

from ...qstash.options import LONGEST_PERIOD
from ..counting import in_words, keys_with_counts
from ..models import FlowControlKey
from ..overview import rate_in_words
from . import text
from .filters import PausedFilter
from .record import RecordAdmin, Tool

LARGEST = 2**31 - 1


class PinForm(forms.Form):
    """What is held from now on; a field that is left empty stays as it is."""

    use_required_attribute = False

    parallelism = forms.IntegerField(
        label=gettext_lazy("Parallelism"),
        min_value=1,
        max_value=LARGEST,
        required=False,
        help_text=gettext_lazy("Deliveries in flight at most."),
    )
    rate = forms.IntegerField(
        label=gettext_lazy("Rate"),
        min_value=1,
        max_value=LARGEST,
        required=False,
        help_text=gettext_lazy("Deliveries started per period at most."),
    )
    period = forms.IntegerField(
        label=gettext_lazy("Period"),
        min_value=1,
        max_value=LONGEST_PERIOD,
        required=False,
        help_text=gettext_lazy("Seconds. 1 if it is left empty."),
    )

    def clean(self) -> dict[str, Any]:
        values: dict[str, Any] = super().clean() or {}
        if not self.errors and not values.get("parallelism") and not values.get("rate"):
            raise forms.ValidationError(_("Give parallelism, rate or both to pin."))
        return values


@admin.register(FlowControlKey)
class FlowControlKeyAdmin(RecordAdmin):
    actions = ("pause", "resume", "unpin", "reset_rate")
    list_display = ("key", "sign", "in_flight", "waiting", "shown_rate", "pinned", "changed")
    list_filter = (PausedFilter,)
    search_fields = ("key",)
    sections = (
        (None, ("key", "sign", "pinned", "in_flight", "waiting", "shown_rate")),
        (gettext_lazy("When"), ("created_at", "updated_at")),
    )
    change_form_template = "admin/qstash_server/flowcontrolkey/change_form.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[FlowControlKey]:
        return keys_with_counts().order_by("key")

    # --- what is shown ---

    @admin.display(description=gettext_lazy("state"))
    def sign(self, key: FlowControlKey) -> SafeString | str:
        return text.badge("paused") if key.is_paused else _("open")

    @admin.display(description=gettext_lazy("in flight"))
    def in_flight(self, key: FlowControlKey) -> str:
        most = _("no limit") if key.parallelism is None else f"{key.parallelism:,}"
        return _("%(count)s of %(most)s") % {
            "count": in_words(key.parallelism_count),
            "most": most,
        }

    @admin.display(description=gettext_lazy("waiting"))
    def waiting(self, key: FlowControlKey) -> str:
        return in_words(key.wait_list_size)

    @admin.display(description=gettext_lazy("rate"))
    def shown_rate(self, key: FlowControlKey) -> str:
        return rate_in_words(key, timezone.now())

    @admin.display(description=gettext_lazy("pinned"))
    def pinned(self, key: FlowControlKey) -> str:
        pins = ((_("parallelism"), key.pins_parallelism), (_("rate"), key.pins_rate))
        return ", ".join(name for name, is_pinned in pins if is_pinned) or _("nothing")

    def page(self, request: HttpRequest, obj: FlowControlKey) -> dict[str, Any]:
        values = {"parallelism": obj.parallelism, "rate": obj.rate}
        if obj.rate is not None:
            values["period"] = obj.period
        url = reverse(f"{self._url_name}_pin", args=[obj.pk])
        return {"pin_form": PinForm(initial=values, auto_id="pin_%s"), "pin_url": url}

    def tools(self, obj: FlowControlKey) -> list[Tool]:
        tools = [Tool("resume", _("Resume")) if obj.is_paused else Tool("pause", _("Pause"))]
        if obj.pins_parallelism or obj.pins_rate:
            tools.append(Tool("unpin", _("Unpin")))
        return [*tools, Tool("reset_rate", _("Reset rate"))] if obj.rate else tools

    # --- what can be done ---

    @admin.action(description=gettext_lazy("Pause the selected keys"), permissions=["change"])
    def pause(self, request: HttpRequest, rows: QuerySet[FlowControlKey]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda key: key.pause(now=timezone.now()),
            note=_("Paused."),
            one="%(count)d key paused.",
            many="%(count)d keys paused.",
        )

    @admin.action(description=gettext_lazy("Resume the selected keys"), permissions=["change"])
    def resume(self, request: HttpRequest, rows: QuerySet[FlowControlKey]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda key: key.resume(now=timezone.now()),
            note=_("Resumed."),
            one="%(count)d key resumed.",
            many="%(count)d keys resumed.",
        )

    @admin.action(description=gettext_lazy("Unpin the selected keys"), permissions=["change"])
    def unpin(self, request: HttpRequest, rows: QuerySet[FlowControlKey]) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda key: key.unpin(now=timezone.now(), parallelism=True, rate=True),
            note=_("Unpinned."),
            one="%(count)d key unpinned.",
            many="%(count)d keys unpinned.",
        )

    @admin.action(
        description=gettext_lazy("Reset the rate of the selected keys"), permissions=["change"]
    )
    def reset_rate(
        self, request: HttpRequest, rows: QuerySet[FlowControlKey]
    ) -> HttpResponse | None:
        return self.use(
            request,
            rows,
            lambda key: key.reset_rate(now=timezone.now()),
            note=_("Rate reset."),
            one="%(count)d key begins to count anew.",
            many="%(count)d keys begin to count anew.",
        )

    # --- its form ---

    def get_urls(self) -> list[Any]:
        name = f"{self.opts.app_label}_{self.opts.model_name}_pin"
        view = self.admin_site.admin_view(require_POST(self.pin))
        return [path("<int:pk>/pin/", view, name=name), *super().get_urls()]

    def pin(self, request: HttpRequest, pk: int) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        key = get_object_or_404(FlowControlKey, pk=pk)
        form = PinForm(request.POST)
        if form.is_valid():
            key.pin(now=timezone.now(), **form.cleaned_data)
            self.log_change(request, key, _("Pinned."))
            self.message_user(request, _("Pinned."), messages.SUCCESS)
        for name, problems in form.errors.items():
            label = f"{form.fields[name].label}: " if name in form.fields else ""
            problem = f"{label}{' '.join(map(str, problems))}"
            self.message_user(request, problem, messages.ERROR)
        return HttpResponseRedirect(self.page_url(key))
