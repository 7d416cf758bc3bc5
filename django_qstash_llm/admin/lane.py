"""Lanes: what is paused, why, and how much waits for it."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from ..exceptions import InvalidRequest
from ..health import MOST_COUNTED, capped
from ..models import Lane, LLMRequest
from ..models.lane import SCOPE, check_scope
from . import actions, figures, text
from .record import RecordAdmin, Tool


class PauseForm(forms.ModelForm):  # type: ignore[type-arg]
    """Which lane to pause. One that is there already is paused, and no second one made."""

    class Meta:
        model = Lane
        fields = (*SCOPE, "paused_until", "reason")

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        try:
            check_scope({name: given.get(name, "") for name in SCOPE})
        except InvalidRequest as error:
            raise ValidationError({error.field: error.problem}) from error
        until = given.get("paused_until")
        if until is not None and until <= timezone.now():
            raise ValidationError({"paused_until": _("It has passed; give a moment to come.")})
        return given

    def _get_validation_exclusions(self) -> set[str]:
        # No constraint is to be kept: the lane is made where there is none. Django 5.2 has no other
        # name for that.
        return {*super()._get_validation_exclusions(), *SCOPE}  # type: ignore[misc]


@admin.register(Lane)
class LaneAdmin(RecordAdmin):
    list_display = (
        "lane_column",
        "state_column",
        "waiting_column",
        "reason_column",
        "pace_column",
    )
    list_filter = (("paused_at", admin.EmptyFieldListFilter), "trouble")
    search_fields = ("provider", "model", "tenant", "queue")
    actions = ("pause", "resume")

    # --- pausing what has no lane yet ---

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self.has_act_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # With a paused lane it would be forgotten what QStash holds.
        return False

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any
    ) -> Any:
        if obj is None:
            kwargs["form"] = PauseForm
        return super().get_form(request, obj, change, **kwargs)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        given = form.cleaned_data
        lane = Lane.objects.named(**{name: given[name] for name in SCOPE})
        lane.pause(by=_who(request), reason=given["reason"], until=given["paused_until"])
        obj.pk = lane.pk
        obj.refresh_from_db()

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> Any:
        title = {"title": _("Pause a lane")}
        return super().add_view(request, form_url, {**title, **(extra_context or {})})

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        self.message_user(request, obj.pause_in_words, messages.SUCCESS)
        return self.response_post_save_add(request, obj)

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> Any:
        return self.log_change(request, obj, obj.pause_in_words)

    # --- what is shown ---

    @admin.display(description=_("lane"))
    def lane_column(self, lane: Lane) -> str:
        return text.excerpt(str(lane), 120)

    @admin.display(description=_("state"))
    def state_column(self, lane: Lane) -> SafeString | str:
        if lane.paused_at is None:
            return gettext("open")
        paused = format_html(gettext("paused {}"), figures.moment(lane.paused_at))
        if lane.paused_until is None:
            return paused
        return format_html(gettext("{}, goes on {}"), paused, figures.moment(lane.paused_until))

    @admin.display(description=_("waiting"))
    def waiting_column(self, lane: Lane) -> SafeString | str:
        if not lane.is_paused:
            return figures.UNKNOWN
        number = capped(lane.waiting()[: MOST_COUNTED + 1].count())
        if not self.admin_site.is_registered(LLMRequest):
            return number
        scope = {name: getattr(lane, name) for name in SCOPE if getattr(lane, name)}
        query = urlencode({"state__exact": "pending", **scope})
        return format_html('<a href="{}">{}</a>', self.list_url(LLMRequest, f"?{query}"), number)

    @admin.display(description=_("why"))
    def reason_column(self, lane: Lane) -> str:
        by = lane.paused_by or lane.trouble
        return text.excerpt(": ".join(filter(None, (by, lane.reason))), 200) or figures.UNKNOWN

    @admin.display(description=_("learned limit"))
    def pace_column(self, lane: Lane) -> str:
        if lane.learned_limit is None:
            return figures.UNKNOWN
        return gettext("%(limit)s requests in %(period)s s") % {
            "limit": figures.count(lane.learned_limit),
            "period": lane.learned_period,
        }

    @admin.display(description=_("learned"))
    def learned_column(self, lane: Lane) -> SafeString | str:
        return figures.moment(lane.learned_at)

    @admin.display(description=_("with QStash"))
    def held_column(self, lane: Lane) -> str:
        """What becomes of what QStash has already."""
        reached = list(lane.reached())
        untold = [each for each in reached if each.is_held is None]
        if untold:
            problems = (each.tell_problem for each in untold)
            return next(filter(None, problems), gettext("QStash is being told."))
        if reached and all(each.is_held for each in reached):
            return gettext("QStash holds what it has of it.")
        if not lane.is_paused:
            return gettext("QStash delivers it.")
        return gettext(
            "What QStash has already goes on. It can hold a queue, and what it was sent with the "
            "flow-control key of a provider's model (see FLOW_CONTROL), once all models that share "
            "this key are paused."
        )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None:
            return [(None, {"fields": (("provider", "model"), ("tenant", "queue"))}),
                    (_("The pause"), {"fields": ("paused_until", "reason")})]  # fmt: skip
        shown = ["state_column", "waiting_column", "held_column"]
        if obj.is_paused:
            shown += ["paused_by", "trouble", "reason"]
        past = [name for name in ("resumed_at", "resumed_by", "key") if getattr(obj, name)]
        if obj.learned_at:
            past += ["pace_column", "learned_column"]
        return [(None, {"fields": shown}), *([(_("Before"), {"fields": past})] if past else [])]

    # --- what can be done ---

    def tools(self, obj: Lane) -> list[Tool]:
        return [Tool("resume", _("Resume")) if obj.is_paused else Tool("pause", _("Pause"))]

    @admin.action(permissions=["act"], description=_("Pause selected %(verbose_name_plural)s"))
    def pause(self, request: HttpRequest, queryset: QuerySet[Lane]) -> HttpResponse | None:
        # What is paused already keeps its reason.
        lanes = list(queryset.filter(paused_at=None))
        for lane in lanes:
            lane.pause(by=_who(request))
            self.log_change(request, lane, lane.pause_in_words)
        sentence = ngettext("%d lane is paused.", "%d lanes are paused.", len(lanes))
        self.message_user(request, sentence % len(lanes), messages.SUCCESS)
        return actions.back_to_page(self, request, queryset.first())

    @admin.action(permissions=["act"], description=_("Resume selected %(verbose_name_plural)s"))
    def resume(self, request: HttpRequest, queryset: QuerySet[Lane]) -> HttpResponse | None:
        paused = queryset.filter(paused_at__isnull=False)
        outcome = actions.use_verb(paused, lambda lane: _resume(lane, by=_who(request)))
        for lane, before in outcome.done:
            self.log_change(request, lane, gettext("Resumed. Before: %s") % before)
        number = len(outcome.done)
        sentence = ngettext("%d lane goes on.", "%d lanes go on.", number)
        self.message_user(request, sentence % number, messages.SUCCESS)
        return actions.back_to_page(self, request, queryset.first())


def _resume(lane: Lane, *, by: str) -> str:
    """Answers what its pause said."""
    before = lane.pause_in_words
    lane.resume(by=by)
    return before


def _who(request: HttpRequest) -> str:
    return str(request.user)
