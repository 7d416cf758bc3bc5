"""Replay: what QStash told us, read once more after the code that read it was mended.

The answer is stored, so nothing is asked and nothing is paid again. A receipt that is read a second
time to the same end changes nothing.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from ..exceptions import IllegalState
from .callback import CallbackResponse, Kind
from .ledger import LedgerEntry
from .request import UNFINISHED, LLMRequest, State

UNREAD = Q(kind__in=[Kind.CALLBACK, Kind.FAILURE_CALLBACK], applied_at=None)
"""Receipts whose reading broke, and which have taken no effect yet."""
QUARANTINED = Q(kind=Kind.QUARANTINED, applied_at=None)
"""Signed envelopes that nobody could read."""
MISREAD = Q(kind=Kind.CALLBACK, status__gte=200, status__lt=300, llm_request__state=State.FAILED)
"""Answers of a provider that were read as no completion, so that their request failed."""
TO_READ_AGAIN = UNREAD | QUARANTINED | MISREAD
ANSWERS = Q(kind=Kind.CALLBACK, status__gte=200, status__lt=300, applied_at__isnull=False)
"""Answers of a provider that have taken effect, to read anew."""


def read_again(receipt: CallbackResponse, *, now: datetime) -> bool:
    """Let a stored receipt take effect once more, and say whether that changed anything.

    Raises ``IllegalState`` with the reason where it cannot be read, or comes to no completion still.
    """
    has_changed = receipt.apply_again(now=now)
    if receipt.applied_at is None:
        raise IllegalState(receipt.problem)
    if receipt.kind == Kind.CALLBACK and 200 <= receipt.status < 300:
        rows = LLMRequest.objects.using(receipt._state.db).filter(uuid=receipt.uuid)
        error = rows.failed().values_list("error", flat=True).first()
        if error is not None:
            raise IllegalState(error)
    return has_changed


def read_all_again(llm_request: LLMRequest, *, now: datetime) -> bool:
    """``read_again`` for what is stored of a request, or ``read_anew`` where all of it has taken
    effect. Whether anything changed.

    Raises ``IllegalState`` where nothing is stored that may have more to say, or none can be read.
    """
    receipts = llm_request.callback_responses.filter(TO_READ_AGAIN).order_by("pk")
    if not receipts.exists():
        if may_be_read_anew(llm_request):
            return bool(read_anew(llm_request))
        raise IllegalState(f"{llm_request.uuid}: nothing is stored that could be read again.")
    has_changed, trouble = False, None
    for receipt in receipts:
        try:
            has_changed |= read_again(receipt, now=now)
        except IllegalState as error:
            trouble = error
    if trouble is not None and not has_changed:
        raise trouble
    return has_changed


def may_be_read_anew(llm_request: LLMRequest) -> bool:
    is_finished = llm_request.state not in UNFINISHED
    return is_finished and llm_request.callback_responses.filter(ANSWERS).exists()


def would_change(llm_request: LLMRequest) -> dict[str, tuple[Any, Any]]:
    """What the answer of a finished request says and costs otherwise than is written down: of each
    field what it is and what it would be if the answer came today.

    Raises ``IllegalState`` where that very answer is not stored whole, or cannot be read.
    """
    return _read_anew(llm_request)[0]


def _read_anew(
    llm_request: LLMRequest,
) -> tuple[dict[str, tuple[Any, Any]], LedgerEntry | None]:
    if llm_request.state in UNFINISHED:
        raise IllegalState(f"{llm_request.uuid} is {llm_request.state}: it has no answer yet.")
    answers = llm_request.callback_responses.filter(ANSWERS).order_by("pk")
    if llm_request.state == State.COMPLETED:
        answers = answers.filter(received_at=F("llm_request__finished_at"))
    trouble = IllegalState(f"{llm_request.uuid}: its answer is not stored.")
    for receipt in answers:
        try:
            changes = receipt.anew(llm_request)
        except IllegalState as error:
            trouble = error
        else:
            changed = {name: (getattr(llm_request, name), each) for name, each in changes.items()}
            return changed, receipt.entry
    raise trouble


def read_anew(llm_request: LLMRequest) -> dict[str, tuple[Any, Any]]:
    """Read the answer of a finished request anew, after code or a price was mended, write down what
    it says and costs, and answer what that changed, as ``would_change`` does.

    State and end stay, nobody is told again, nothing asked and nothing paid. A cost that is known is
    not forgotten.
    """
    using = llm_request._state.db
    rows = LLMRequest.objects.using(using)
    with transaction.atomic(using=using):
        locked = rows.select_for_update(of=("self",)).get(pk=llm_request.pk)
        changed, entry = _read_anew(locked)
        if changed:
            rows.filter(pk=locked.pk).update(**{name: now for name, (_, now) in changed.items()})
            if entry is not None:
                LedgerEntry.objects.using(using).correct(entry, now=timezone.now())
    llm_request.refresh_from_db()
    return changed
