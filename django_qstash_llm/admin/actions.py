"""Verbs on many rows, from the list's menu or from a button on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..exceptions import QStashLLMError
from ..models import LLMRequest
from ..models.request import LLMRequestQuerySet
from ..qstash import QStashError
from . import figures
from .record import RecordAdmin
from .text import excerpt

MOST_AT_ONCE = 500
"""Rows of one action: each may be a call to QStash, and the browser waits."""
MOST_REASONS = 5
FROM_PAGE = "from_page"
"""In a POST: the button on the object's page was used, so go back there."""
CONFIRMED = "confirmed"


@dataclass
class Outcome:
    done: list[tuple[LLMRequest, Any]] = field(default_factory=list)
    """Each row with what the verb returned."""
    refused: list[tuple[LLMRequest, str]] = field(default_factory=list)
    """Each row with the reason."""
    left_over: int = 0
    """Rows beyond ``MOST_AT_ONCE``."""


def use_verb(rows: LLMRequestQuerySet, verb: Callable[[LLMRequest], Any]) -> Outcome:
    """Use ``verb`` on each of ``rows``; one that refuses does not stop the others."""
    outcome = Outcome()
    keys = list(rows.order_by("pk").values_list("pk", flat=True)[:MOST_AT_ONCE])
    if len(keys) == MOST_AT_ONCE:
        outcome.left_over = rows.count() - len(keys)
    for key in keys:
        # One by one: its state may change while the ones before it are seen to.
        llm_request = LLMRequest.objects.using(rows.db).filter(pk=key).first()
        if llm_request is None:
            continue
        try:
            outcome.done.append((llm_request, verb(llm_request)))
        except (QStashLLMError, QStashError) as error:
            outcome.refused.append((llm_request, str(error)))
    return outcome


def tell(model_admin: RecordAdmin, request: HttpRequest, outcome: Outcome, *, success: str) -> None:
    """``success``: the sentence for those that are done, in their number."""
    if outcome.done:
        model_admin.message_user(request, success, messages.SUCCESS)
    elif not outcome.refused:
        model_admin.message_user(request, _("There was nothing to do."), messages.WARNING)
    for llm_request, reason in outcome.refused[:MOST_REASONS]:
        named = reason if str(llm_request.uuid) in reason else f"{llm_request.uuid}: {reason}"
        model_admin.message_user(request, excerpt(named, 400), messages.ERROR)
    unsaid = len(outcome.refused) - MOST_REASONS
    if unsaid > 0:
        sentence = ngettext("%d more was refused.", "%d more were refused.", unsaid)
        model_admin.message_user(request, sentence % unsaid, messages.ERROR)
    if outcome.left_over:
        sentence = ngettext(
            "%d was left for another time: do it again.",
            "%d were left for another time: do it again.",
            outcome.left_over,
        )
        model_admin.message_user(request, sentence % outcome.left_over, messages.WARNING)


def cancel(model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet) -> Outcome:
    outcome = use_verb(rows, LLMRequest.cancel)
    for llm_request, _nothing in outcome.done:
        model_admin.log_change(request, llm_request, _("Cancelled."))
    number = len(outcome.done)
    success = ngettext("%d request was cancelled.", "%d requests were cancelled.", number)
    tell(model_admin, request, outcome, success=success % number)
    return outcome


def announce_again(
    model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet
) -> Outcome:
    outcome = use_verb(rows, LLMRequest.announce_again)
    for llm_request, _nothing in outcome.done:
        model_admin.log_change(request, llm_request, _("Announced again."))
    number = len(outcome.done)
    success = ngettext(
        "%d request will be announced again.", "%d requests will be announced again.", number
    )
    tell(model_admin, request, outcome, success=success % number)
    return outcome


def resubmit(model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet) -> Outcome:
    outcome = use_verb(rows, LLMRequest.resubmit)
    for llm_request, again in outcome.done:
        model_admin.log_change(request, llm_request, _("Resubmitted as %s.") % again.uuid)
        model_admin.log_addition(request, again, _("Resubmission of %s.") % llm_request.uuid)
    number = len(outcome.done)
    success = ngettext("%d request was resubmitted.", "%d requests were resubmitted.", number)
    tell(model_admin, request, outcome, success=success % number)
    return outcome


def confirm_resubmission(
    model_admin: RecordAdmin,
    request: HttpRequest,
    rows: LLMRequestQuerySet,
    *,
    action: str,
    selected: Sequence[Any],
) -> HttpResponse:
    """The page that says what asking again would mean. ``selected``: keys for ``action``."""
    keys = list(rows.order_by("pk").values_list("pk", flat=True)[:MOST_AT_ONCE])
    taken = LLMRequest.objects.using(rows.db).filter(pk__in=keys)
    is_from_page = FROM_PAGE in request.POST
    request.current_app = model_admin.admin_site.name
    context = {
        **model_admin.admin_site.each_context(request),
        "title": _("Resubmit?"),
        "opts": model_admin.opts,
        "media": model_admin.media,
        "action": action,
        "selected": selected,
        "checkbox_name": ACTION_CHECKBOX_NAME,
        "from_page": FROM_PAGE if is_from_page else "",
        "confirmed": CONFIRMED,
        "count": len(keys),
        "remarks": _remarks(rows, taken, len(keys)),
        "rows": [
            (row, model_admin.page_url(row), figures.state_sign(row.state))
            for row in taken.order_by("pk").only("uuid", "model", "provider", "state")[:20]
        ],
        "post_url": request.get_full_path(),
        "back_url": _back_url(model_admin, request, selected),
    }
    return TemplateResponse(request, "admin/django_qstash_llm/resubmit_confirmation.html", context)


def _remarks(all_rows: LLMRequestQuerySet, taken: LLMRequestQuerySet, number: int) -> list[str]:
    """What one should know before paying once more."""
    remarks = []
    if (cost := taken.cost()) is not None:
        remarks.append(_("The first time came to %s.") % figures.money(cost))
    if unpriced := taken.unpriced().count():
        remarks.append(
            ngettext("%s has no known cost.", "%s have no known cost.", unpriced)
            % figures.count(unpriced)
        )
    if unfinished := taken.unfinished().count():
        remarks.append(
            ngettext(
                "%s is unfinished and will be refused: an answer may still come.",
                "%s are unfinished and will be refused: an answer may still come.",
                unfinished,
            )
            % figures.count(unfinished)
        )
    if again := taken.filter(resubmissions__isnull=False).distinct().count():
        remarks.append(
            ngettext("%s was resubmitted before.", "%s were resubmitted before.", again)
            % figures.count(again)
        )
    if number == MOST_AT_ONCE and (total := all_rows.count()) > number:
        remarks.append(
            _("These are the first of %s: more are not taken at once.") % figures.count(total)
        )
    return remarks


def _back_url(model_admin: RecordAdmin, request: HttpRequest, selected: Sequence[Any]) -> str:
    if FROM_PAGE in request.POST and len(selected) == 1:
        obj = model_admin.model._default_manager.filter(pk=selected[0]).only("pk").first()
        if obj is not None:
            return model_admin.page_url(obj)
    return request.get_full_path()


def back_to_page(model_admin: RecordAdmin, request: HttpRequest, obj: Any) -> HttpResponse | None:
    """To ``obj``'s page when its button was used; None leaves it to Django, which shows the list."""
    if FROM_PAGE in request.POST and obj is not None:
        return HttpResponseRedirect(model_admin.page_url(obj))
    return None
