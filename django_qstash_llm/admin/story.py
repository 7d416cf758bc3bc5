"""What has become of a request so far, in sentences: the top of its page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ..conf import app_settings
from ..models import CallbackResponse, Lane, LLMRequest
from ..models.circuit import QSTASH, Circuit
from ..models.request import ANNOUNCED, UNFINISHED, State, Via
from . import figures

Sentence = SafeString | str


@dataclass(frozen=True)
class Moment:
    label: str
    at: datetime
    since: timedelta | None
    """Since the moment before."""

    @property
    def shown(self) -> Sentence:
        return figures.moment(self.at)

    @property
    def shown_since(self) -> str:
        return "" if self.since is None else f"+ {figures.duration(self.since)}"


def moments(llm_request: LLMRequest) -> list[Moment]:
    """The stations it has passed, in the order of time."""
    passed = [
        (_("asked"), llm_request.created_at),
        (_("submitted"), llm_request.submitted_at),
        (State(llm_request.state).label, llm_request.finished_at),
        (_("announced"), llm_request.announced_at),
    ]
    found: list[Moment] = []
    before: datetime | None = None
    for label, at in sorted(((str(label), at) for label, at in passed if at), key=lambda m: m[1]):
        found.append(Moment(label, at, None if before is None else at - before))
        before = at
    return found


def sentences(llm_request: LLMRequest, *, now: datetime) -> list[Sentence]:
    tell = {
        State.PENDING: _pending,
        State.SUBMITTED: _submitted,
        State.COMPLETED: _completed,
        State.FAILED: _failed,
        State.CANCELLED: _cancelled,
    }[State(llm_request.state)]
    return [*tell(llm_request, now), *_announcing(llm_request, now), *_forgotten(llm_request, now)]


def _forgotten(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    if row.forgotten_at:
        since = figures.moment(row.forgotten_at, now=now)
        yield format_html(_("Its messages are not kept since {}."), since)
    if row.digest:
        yield _("Their SHA-256 is %(digest)s.") % {"digest": row.digest}


def last_attempt(
    llm_request: LLMRequest, receipts: Iterable[CallbackResponse]
) -> Iterator[Sentence]:
    """Why it waits, of what is known of its attempts."""
    if llm_request.state in UNFINISHED:
        known = [each for each in receipts if each.attempt == llm_request.attempts]
        yield from (each.sentence for each in known[-1:] if each.trouble)


def trouble(llm_request: LLMRequest) -> tuple[str, str]:
    """(what kind of text, the text) of the error that stands on the row."""
    if not llm_request.error and not llm_request.error_code:
        return "", ""
    if llm_request.state in UNFINISHED:
        return _("What the last try to submit it met"), llm_request.error
    return llm_request.error_code or _("error"), llm_request.error


def _pending(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    yield format_html(
        _("Waiting to be handed to QStash; asked {}."), figures.moment(row.created_at, now=now)
    )
    if row.claimed_until and row.claimed_until > now:
        yield _("A worker is handing it over just now.")
    elif lane := Lane.objects.using(row._state.db).holding(row, now):
        yield " ".join(filter(None, [lane.pause_in_words, lane.remedy]))
    elif row.queue and _is_behind_a_paused_one(row, now):
        yield _("It is behind another of its queue, of which a lane is paused.")
    elif row.submit_after and row.submit_after > now:
        yield format_html(_("Next try {}."), figures.moment(row.submit_after, now=now))
    elif until := Circuit.objects.using(row._state.db).open_until(QSTASH, now):
        yield format_html(
            _("QStash takes nothing from anybody at the moment; it is asked again {}."),
            figures.moment(until, now=now),
        )
    else:
        yield _("It is due: the next worker that hears of it takes it. Is one running?")
    if row.submission_tries:
        tries = ngettext("Tried %d time.", "Tried %d times.", row.submission_tries)
        yield tries % row.submission_tries
    yield from _not_before(row, now)


def _is_behind_a_paused_one(row: LLMRequest, now: datetime) -> bool:
    held = Lane.objects.using(row._state.db).held(now)
    before = LLMRequest.objects.using(row._state.db).pending().filter(queue=row.queue)
    return bool(held) and before.filter(held, pk__lt=row.pk).exists()


def _submitted(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    since = figures.moment(row.submitted_at, now=now)
    if row.via == Via.CHAT:
        yield format_html(_("The provider is being asked, without QStash, since {}."), since)
        return
    yield format_html(_("QStash has it; handed over {}."), since)
    if lane := Lane.objects.using(row._state.db).holding(row, now):
        yield lane.pause_in_words
    yield from _not_before(row, now)
    if not row.attempts:
        yield _("No attempt is known yet: the provider may be answering just now.")
        return
    yield _("Attempt %(attempt)s of %(most)s ended with %(status)s; QStash goes on.") % {
        "attempt": row.attempts,
        "most": (row.retries or 0) + 1,
        "status": figures.status(row.last_status),
    }


def _not_before(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    if row.not_before and row.not_before > now:
        when = figures.moment(row.not_before, now=now)
        yield format_html(_("The provider is not to be called yet: first {}."), when)


def _completed(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    yield from _took(row)
    if row.answered_by and row.answered_by != row.model:
        yield _("%s answered.") % row.answered_by
    if row.finish_reason == "length":
        yield _("The answer is cut: the model ran into its token limit.")
    if row.finish_reason == "content_filter":
        yield _("The provider's content filter stopped the answer.")
    if row.cost is None:
        yield _("Unpriced: what it cost is not known.")


def _failed(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    yield from _took(row)
    if row.last_status is not None:
        yield _("The last attempt ended with %s.") % figures.status(row.last_status)
    if not row.submitted_at and not row.qstash_message_id:
        yield _("It never reached QStash.")
    if row.dead_letter_id:
        yield _("QStash keeps it among its dead letters as %s.") % row.dead_letter_id


def _cancelled(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    yield format_html(_("Cancelled {}."), figures.moment(row.finished_at, now=now))
    if row.error_code == "aborted":
        yield _("Who asked has left before the answer was whole; what had come is kept.")
    elif row.submitted_at:
        yield _("An attempt that was in flight may still have been paid for.")


def _took(row: LLMRequest) -> Iterator[Sentence]:
    if row.finished_at is None:
        return
    span = figures.duration(row.finished_at - row.created_at)
    attempts = ngettext("%d attempt", "%d attempts", row.attempts) % row.attempts
    yield _("Took %(span)s and %(attempts)s.") % {"span": span, "attempts": attempts}


def _announcing(row: LLMRequest, now: datetime) -> Iterator[Sentence]:
    if row.state not in ANNOUNCED or row.announced_at:
        return
    most = app_settings().announce_tries
    if row.announce_tries >= most:
        yield _("Its handler failed %s times and was given up. Mend it, then announce again.") % (
            row.announce_tries
        )
    elif row.announce_tries:
        again = figures.moment(row.announce_after, now=now)
        yield format_html(
            _("Its handler failed {} of {} times; next try {}."), row.announce_tries, most, again
        )
    else:
        yield _("Its trigger and receivers have not been told yet.")
