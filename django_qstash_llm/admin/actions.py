"""Verbs on many rows, from the list's menu or from a button on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..exceptions import ConfigurationError, QStashLLMError
from ..models import Batch, CallbackResponse, LLMRequest
from ..models.batch import to_resubmit
from ..models.replay import read_again as read_receipt_again
from ..models.replay import read_all_again
from ..models.request import LLMRequestQuerySet, State
from ..qstash import QStashError
from . import figures
from .record import RecordAdmin
from .text import excerpt

MOST_AT_ONCE = 500
"""Rows of one action: each may be a call to QStash, and the browser waits."""
MOST_BATCHES = 20
"""Batches of one action; each may hold thousands of requests."""
MOST_REASONS = 5
ROWS_SHOWN = 20
FROM_PAGE = "from_page"
"""In a POST: the button on the object's page was used, so go back there."""
CONFIRMED = "confirmed"


@dataclass
class Outcome:
    done: list[tuple[Any, Any]] = field(default_factory=list)
    """Each row with what the verb returned."""
    refused: list[tuple[Any, str]] = field(default_factory=list)
    """Each row with the reason."""
    left_over: int = 0
    """Rows beyond ``MOST_AT_ONCE``."""


def use_verb(rows: QuerySet[Any], verb: Callable[[Any], Any]) -> Outcome:
    """Use ``verb`` on each of ``rows``; one that refuses does not stop the others."""
    outcome = Outcome()
    keys = list(rows.order_by("pk").values_list("pk", flat=True)[:MOST_AT_ONCE])
    if len(keys) == MOST_AT_ONCE:
        outcome.left_over = rows.count() - len(keys)
    for key in keys:
        # One by one: its state may change while the ones before it are seen to.
        row = rows.model._default_manager.using(rows.db).filter(pk=key).first()
        if row is None:
            continue
        try:
            outcome.done.append((row, verb(row)))
        except (QStashLLMError, QStashError) as error:
            outcome.refused.append((row, str(error)))
    return outcome


def tell(model_admin: RecordAdmin, request: HttpRequest, outcome: Outcome, *, success: str) -> None:
    """``success``: the sentence for those that are done, in their number."""
    if outcome.done:
        model_admin.message_user(request, success, messages.SUCCESS)
    elif not outcome.refused:
        model_admin.message_user(request, _("There was nothing to do."), messages.WARNING)
    for row, reason in outcome.refused[:MOST_REASONS]:
        named = reason if str(row.uuid) in reason else f"{row.uuid}: {reason}"
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


def resubmit_failed(
    model_admin: RecordAdmin, request: HttpRequest, batches: Sequence[Batch]
) -> None:
    """Ask again what failed in each of ``batches``, at most ``MOST_BATCHES`` of them."""
    outcome = Outcome()
    for batch in batches:
        failed = to_resubmit(batch.llm_requests.all())
        keys = set(failed.values_list("pk", flat=True))
        try:
            again = batch.resubmit_failed()
        except ConfigurationError as error:
            outcome.refused.append((batch, str(error)))
            continue
        outcome.done += [(batch, row) for row in again]
        if again:
            resubmitted = ngettext(
                "Resubmitted %d failed request.", "Resubmitted %d failed requests.", len(again)
            )
            model_admin.log_change(request, batch, resubmitted % len(again))
        # What could not be asked is tried by itself, to hear why.
        left = sorted(keys - {row.resubmission_of_id for row in again})[:MOST_AT_ONCE]
        outcome.refused += use_verb(failed.filter(pk__in=left), LLMRequest.resubmit).refused
    number = len(outcome.done)
    success = ngettext("%d request was resubmitted.", "%d requests were resubmitted.", number)
    tell(model_admin, request, outcome, success=success % number)


def retry_dead_letter(
    model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet
) -> Outcome:
    outcome = use_verb(rows, LLMRequest.retry_dead_letter)
    for llm_request, _nothing in outcome.done:
        model_admin.log_change(request, llm_request, _("Retried from its dead letter."))
    number = len(outcome.done)
    success = ngettext(
        "%d request is being tried again.", "%d requests are being tried again.", number
    )
    tell(model_admin, request, outcome, success=success % number)
    return outcome


def drop_dead_letter(
    model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet
) -> Outcome:
    outcome = use_verb(rows, LLMRequest.drop_dead_letter)
    for llm_request, _nothing in outcome.done:
        model_admin.log_change(request, llm_request, _("Dropped its dead letter."))
    number = len(outcome.done)
    success = ngettext("%d dead letter was dropped.", "%d dead letters were dropped.", number)
    tell(model_admin, request, outcome, success=success % number)
    return outcome


def read_again(model_admin: RecordAdmin, request: HttpRequest, rows: QuerySet[Any]) -> Outcome:
    """``rows``: receipts, or requests with all that is stored of them."""
    verb: Any = read_receipt_again if rows.model is CallbackResponse else read_all_again
    outcome = use_verb(rows, lambda row: verb(row, now=timezone.now()))
    for row, _has_changed in outcome.done:
        model_admin.log_change(request, row, _("Read again."))
    success = _("%(read)d read again; %(changed)d of them changed something.") % {
        "read": len(outcome.done),
        "changed": sum(has_changed for _row, has_changed in outcome.done),
    }
    tell(model_admin, request, outcome, success=success)
    return outcome


def confirm_resubmission(
    model_admin: RecordAdmin,
    request: HttpRequest,
    rows: LLMRequestQuerySet,
    *,
    action: str,
    selected: Sequence[Any],
    most: int | None = MOST_AT_ONCE,
) -> HttpResponse:
    """The page that says what asking again would mean. ``selected``: keys for ``action``; it takes
    ``most`` of ``rows`` at once, or all."""
    taken, number = _taken(rows, most)
    question = ngettext(
        "%d request is about to be asked again, as a request of its own. "
        "The provider will charge for it.",
        "%d requests are about to be asked again, each as a request of its own. "
        "The provider will charge for them.",
        number,
    )
    return _confirm(
        model_admin,
        request,
        taken,
        action=action,
        selected=selected,
        title=_("Resubmit?"),
        question=question % number if number else "",
        nothing=_("There is nothing to resubmit."),
        remarks=[*_remarks(taken), *_left_over(rows, number, most)],
    )


def confirm_retry(
    model_admin: RecordAdmin, request: HttpRequest, rows: LLMRequestQuerySet, *, action: str
) -> HttpResponse:
    """The page that says what retrying dead letters would mean."""
    taken, number = _taken(rows, MOST_AT_ONCE)
    question = ngettext(
        "QStash is about to try %d request again, from its dead letters. "
        "The provider will charge for an answer.",
        "QStash is about to try %d requests again, from its dead letters. "
        "The provider will charge for the answers.",
        number,
    )
    without = taken.exclude(pk__in=taken.filter(state=State.FAILED).exclude(dead_letter_id=""))
    remarks = []
    if refused := without.count():
        remarks.append(
            ngettext(
                "%s has not failed or has no known dead letter, and will be refused.",
                "%s have not failed or have no known dead letter, and will be refused.",
                refused,
            )
            % figures.count(refused)
        )
    return _confirm(
        model_admin,
        request,
        taken,
        action=action,
        selected=list(taken.order_by("pk").values_list("pk", flat=True)),
        title=_("Retry from the dead letters?"),
        question=question % number if number else "",
        nothing=_("There is nothing to retry."),
        remarks=[*remarks, *_left_over(rows, number, MOST_AT_ONCE)],
    )


def _taken(rows: LLMRequestQuerySet, most: int | None) -> tuple[LLMRequestQuerySet, int]:
    """Those of ``rows`` that one action takes, and their number."""
    if most is None:
        return rows, rows.count()
    keys = list(rows.order_by("pk").values_list("pk", flat=True)[:most])
    return LLMRequest.objects.using(rows.db).filter(pk__in=keys), len(keys)


def _confirm(
    model_admin: RecordAdmin,
    request: HttpRequest,
    taken: LLMRequestQuerySet,
    *,
    action: str,
    selected: Sequence[Any],
    title: str,
    question: str,
    nothing: str,
    remarks: list[str],
) -> HttpResponse:
    is_from_page = FROM_PAGE in request.POST
    request.current_app = model_admin.admin_site.name
    context = {
        **model_admin.admin_site.each_context(request),
        "title": title,
        "question": question,
        "nothing": nothing,
        "opts": model_admin.opts,
        "media": model_admin.media,
        "action": action,
        "selected": selected,
        "checkbox_name": ACTION_CHECKBOX_NAME,
        "from_page": FROM_PAGE if is_from_page else "",
        "confirmed": CONFIRMED,
        "remarks": remarks,
        "rows": [
            (row, model_admin.page_url(row), figures.state_sign(row.state))
            for row in taken.order_by("pk").only("uuid", "model", "provider", "state")[:ROWS_SHOWN]
        ],
        "is_more": taken.count() > ROWS_SHOWN,
        "post_url": request.get_full_path(),
        "back_url": _back_url(model_admin, request, selected),
    }
    return TemplateResponse(request, "admin/django_qstash_llm/resubmit_confirmation.html", context)


def _remarks(taken: LLMRequestQuerySet) -> list[str]:
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
    return remarks


def _left_over(all_rows: LLMRequestQuerySet, number: int, most: int | None) -> list[str]:
    if number == most and (total := all_rows.count()) > number:
        return [_("These are the first of %s: more are not taken at once.") % figures.count(total)]
    return []


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
