"""The reconciler: asks QStash about requests of which nobody has heard past their deadline.

A lost callback lies among QStash's dead letters with the whole answer in its body; a message that
was given up lies there with the provider's words; of all others QStash's log tells whether they
may still answer. The provider is never called: what may still answer waits, and what is lost fails
with a sentence that says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import Any, TypeVar

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from ..cleaning import clean_text
from ..completions import read_completion, read_error
from ..conf import app_settings, qstash_client
from ..exceptions import UnreadableCompletion
from ..qstash import (
    AuthenticationError,
    Callback,
    Client,
    DeadLetter,
    EnvelopeError,
    LogEntry,
    NotFound,
    Page,
    QStashError,
    RateLimited,
    ResponseError,
    TransportError,
)
from ..qstash.callback import NO_RESPONSE
from .callback import MOST_APPLY_TRIES, UNSTORABLE, CallbackResponse, Kind, plain
from .request import LONGEST_TIMEOUT, LLMRequest, LLMRequestQuerySet, OverTheWire, State, Via

logger = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(hours=6)
"""Between two inquiries about one request, unless QStash names a later delivery."""
HOLD = timedelta(minutes=15)
"""For how long a claim keeps others from asking about the same request; no inquiry takes longer."""
OUTAGE_PAUSE = timedelta(minutes=5)
"""Before the request is asked about again, over which QStash turned out not to answer."""
INQUIRIES_IN_DOUBT = 2
"""How many inquiries in a row find nothing before a request is lost: QStash's log may lag."""
MOST_INQUIRIES = 10
"""How many in a row may end in one more delivery of a callback, or in a refusal. With the pauses
between them and QStash's own retries that is days, in which a person may mend what refuses it."""
QSTASH_REMEMBERS = timedelta(days=30)
"""No plan keeps logs or dead letters longer: what cannot be asked by then is asked in vain."""
LETTERS_PER_PAGE = 5
"""Each may hold an answer and its question, and what QStash answers is not read without end."""
ENTRIES_PER_PAGE = 20
MOST_PAGES = 20

_ENDED = ("DELIVERED", "FAILED", "CANCELED")
# What comes later where a log tells several things of one moment.
_ORDER = ("CREATED", "ACTIVE", "ERROR", "RETRY", "CANCEL_REQUESTED", *_ENDED)
# What QStash shows in place of a body that it was asked to hide.
_HIDDEN = b"REDACTED:"


T = TypeVar("T")


@dataclass
class Inquiry:
    """What QStash knows of one request. Each thing is asked once, when it is first needed.

    Raises QStash's errors.
    """

    client: Client
    llm_request: OverTheWire

    @cached_property
    def callback_urls(self) -> list[str]:
        """Every spelling of its callback's URL, the one that is published today first."""
        conf, uuid = app_settings(), self.llm_request.uuid
        today = conf.callback_url(uuid)
        return [today, *sorted(conf.callback_urls(uuid) - {today})]

    @cached_property
    def message_id(self) -> str:
        """The id by which QStash knows it, from its log or its dead letters; empty if from neither."""
        known = [entry.message_id for entry in self.log]
        known += [] if known else [letter.message_id for letter in self.dead_messages]
        return next(filter(None, known), "")

    # --- dead letters ---

    @cached_property
    def dead_messages(self) -> list[DeadLetter]:
        """The message itself, where it was given up. Of several submissions, several."""
        return [letter for letter in self._labelled_letters if not self._is_callback(letter)]

    @cached_property
    def dead_callbacks(self) -> list[DeadLetter]:
        """Callbacks that never arrived, each with an envelope in its body."""
        # Whether a callback inherits its message's label is not documented. Its URL is ours.
        found = list(filter(self._is_callback, self._labelled_letters))
        for url in self.callback_urls:
            found += filter(self._is_callback, self._letters(url=url))
        return list({letter.dlq_id: letter for letter in found}.values())

    @cached_property
    def _labelled_letters(self) -> list[DeadLetter]:
        letters = self._letters(label=self.llm_request.wire_label)
        return [letter for letter in letters if self._is_ours(letter)]

    def _letters(self, **filters: str) -> list[DeadLetter]:
        return _listed(self.client.dead_letters, count=LETTERS_PER_PAGE, **filters)

    # --- the log ---

    @cached_property
    def log(self) -> list[LogEntry]:
        """What became of the message itself, newest first. Of several submissions, several."""
        entries = self._entries(label=self.llm_request.wire_label)
        return _newest_first(
            entry for entry in entries if self._is_ours(entry) and not self._is_callback(entry)
        )

    @cached_property
    def callback_log(self) -> list[LogEntry]:
        """What became of its callbacks, newest first."""
        entries: list[LogEntry] = []
        for url in self.callback_urls:
            entries += self._entries(url=url)
        return _newest_first(filter(self._is_callback, entries))

    def _entries(self, **filters: str) -> list[LogEntry]:
        return _listed(self.client.logs, count=ENTRIES_PER_PAGE, **filters)

    def failed_attempts(self, message_id: str) -> list[LogEntry]:
        """Newest first."""
        return [e for e in self.log if e.message_id == message_id and e.state == "ERROR"]

    def _is_ours(self, told: DeadLetter | LogEntry) -> bool:
        # Not every answer is documented to tell the labels. The callback's URL is as much our own.
        return self.llm_request.wire_label in told.labels or told.callback in self.callback_urls

    def _is_callback(self, told: DeadLetter | LogEntry) -> bool:
        return told.url in self.callback_urls

    # --- whether something may still come ---

    def underway(self, entries: Iterable[LogEntry], now: datetime) -> list[LogEntry]:
        """The latest of each message that QStash is not done with, as far as it can be believed."""
        unended = [entry for entry in _latest(entries) if entry.state not in _ENDED]
        return [entry for entry in unended if self._may_go_on(entry, now)]

    def _may_go_on(self, entry: LogEntry, now: datetime) -> bool:
        # A log that is cut short says the same for ever; no attempt lasts that long.
        longest = timedelta(seconds=LONGEST_TIMEOUT)
        moments = filter(None, (_moment(entry.time), _moment(entry.next_delivery_time)))
        return any(moment + longest > now for moment in moments) or self.is_kept(entry.message_id)

    def is_kept(self, message_id: str) -> bool:
        """Whether QStash has the message: it is to be delivered, or was a moment ago."""
        if not message_id:
            return False
        try:
            self.client.get_message(message_id)
        except NotFound:
            return False
        return True


def known_message_id(client: Client, llm_request: OverTheWire) -> str:
    """The id of the message by which QStash has ``llm_request``, or had it; empty if it knows none.

    For a submission whose answer was lost, after its deduplication window. Raises QStash's errors.
    """
    return Inquiry(client, llm_request).message_id


@dataclass
class Reconciler:
    """Finds out what became of the overdue requests of one database."""

    using: str = "default"
    clock: Callable[[], datetime] = timezone.now
    recovered: int = 0
    """How many were completed by an answer that had not arrived by itself."""
    failed: int = 0
    """How many were given up by QStash, and fail with its or the provider's words."""
    lost: int = 0
    """How many will not be answered, and nobody knows more."""
    waiting: int = 0
    """How many may still be answered, or could not be asked about."""
    problem: str = ""
    """Why the last one that could not be asked about was not."""

    @property
    def rows(self) -> LLMRequestQuerySet:
        return LLMRequest.objects.using(self.using)

    @property
    def receipts(self) -> Any:
        return CallbackResponse.objects.using(self.using)

    @cached_property
    def client(self) -> Client:
        return qstash_client()

    def due(self) -> LLMRequestQuerySet:
        """Submitted, and past their deadline, the one first that has been so for the longest."""
        return self.rows.overdue(self.clock()).order_by("deadline_at", "id")

    def reconcile(self, *, limit: int = 100) -> int:
        """Ask about up to ``limit`` overdue requests; answers about how many. Never raises for a row.

        Stops at once when QStash answers nobody: the others stay due. Raises ``ConfigurationError``
        when nothing could be asked at all.
        """
        overdue = list(self.due().values_list("pk", "via")[:limit])
        if any(via != Via.CHAT for _, via in overdue):
            app_settings().check_ready()
        asked = 0
        for pk, via in overdue:
            llm_request = self.claim(pk)
            if llm_request is None:
                continue  # heard of a moment ago, or another asks about it
            asked += 1
            if via == Via.CHAT:  # of which QStash knows nothing
                self.fail(llm_request, "lost", _CHAT_LOST, is_lost=True)
                continue
            try:
                self.inquire(Inquiry(self.client, llm_request), llm_request)
            except LLMRequest.DoesNotExist:
                continue  # deleted meanwhile
            except QStashError as error:
                self.put_off(llm_request, error)
                if _is_outage(error):
                    break
        return asked

    def claim(self, pk: int) -> LLMRequest | None:
        """The request, for ourselves; None when it is not overdue any more.

        The claim is the deadline itself: whoever dies over it has it asked about again.
        """
        now = self.clock()
        is_ours = self.rows.overdue(now).filter(pk=pk)
        if not is_ours.update(deadline_at=now + HOLD, inquiries=F("inquiries") + 1):
            return None
        return self.rows.submitted().defer("messages", "parameters").filter(pk=pk).first()

    def inquire(self, inquiry: Inquiry, llm_request: LLMRequest) -> None:
        """What QStash knows of it decides what becomes of it. Raises QStash's errors."""
        hidden = self.take_callbacks(inquiry, llm_request)
        if self.is_settled(llm_request):
            return
        if hidden and llm_request.inquiries <= MOST_INQUIRIES:
            self.deliver_again(hidden, llm_request)
            return
        ours = [x for x in inquiry.dead_messages if x.message_id == llm_request.qstash_message_id]
        if self.take_dead_message(ours, llm_request):
            return
        if hidden:
            error = f"{_hidden(hidden[0])} {_MEND_AND_RETRY}"
            self.fail(llm_request, "answer_lost", error, is_lost=True)
            return
        # Another submission of the same request may be the one that is answered.
        underway = inquiry.underway(inquiry.log, self.clock())
        ended = [entry for entry in _latest(inquiry.log) if entry.state in _ENDED]
        delivered = [entry for entry in ended if entry.state == "DELIVERED"]
        if underway:
            self.wait(llm_request, underway, is_heard_of=True)
        elif delivered:
            self.seek_answer(delivered[0], inquiry, llm_request)
        elif self.take_dead_message(inquiry.dead_messages, llm_request):
            return
        elif ended:
            self.fail_as_logged(ended[0], inquiry, llm_request)
        elif inquiry.is_kept(llm_request.qstash_message_id):
            self.wait(llm_request, is_heard_of=True)
        else:
            self.give_up(
                llm_request,
                "lost",
                "QStash knows nothing of this request: no message, no log and no dead letter. "
                "Nothing will come of it any more, and it can be asked again (resubmit).",
            )

    # --- what is recovered ---

    def take_callbacks(self, inquiry: Inquiry, llm_request: LLMRequest) -> list[DeadLetter]:
        """Receive the callbacks that QStash could not deliver, and delete their dead letters.

        Answers those of which QStash shows no body.
        """
        hidden = []
        for letter in inquiry.dead_callbacks:
            if letter.body.startswith(_HIDDEN):
                hidden.append(letter)
                continue
            try:
                callback = Callback.from_json(letter.body)
                if _is_former(callback, llm_request):
                    continue
                self.receive(callback, llm_request, message_id=letter.message_id)
            except (EnvelopeError, UnreadableCompletion, *UNSTORABLE) as error:
                logger.error("Dead letter %s put into quarantine: %s", letter.dlq_id, error)
                self.receipts.quarantine(
                    letter.body, uuid=llm_request.uuid, problem=str(error), now=self.clock()
                )
                continue
            # Not within somebody's transaction: what is rolled back must still lie there.
            delete = partial(self.delete_dead_letter, letter.dlq_id)
            transaction.on_commit(delete, using=self.using)
        return hidden

    def receive(self, callback: Callback, llm_request: LLMRequest, *, message_id: str = "") -> None:
        """As if it had arrived by itself."""
        self.receipts.receive(
            callback,
            uuid=llm_request.uuid,
            message_id=message_id,
            now=self.clock(),
            is_recovered=True,
        )

    def receive_what_is_told(self, callback: Callback, llm_request: LLMRequest) -> bool:
        """``callback`` was made of what QStash tells. Whether that settles the request."""
        try:
            self.receive(callback, llm_request)
        except UNSTORABLE:
            logger.exception("What QStash tells of %s cannot be stored", llm_request.uuid)
            return False
        return self.is_settled(llm_request)

    def delete_dead_letter(self, dlq_id: str) -> None:
        """What it said is stored here. Left there it would only be read once more."""
        try:
            self.client.delete_dead_letter(dlq_id)
        except NotFound:
            pass
        except QStashError as error:
            logger.warning("Dead letter %s is recovered, but not deleted: %s", dlq_id, error)

    def deliver_again(self, letters: list[DeadLetter], llm_request: LLMRequest) -> None:
        """QStash still has these callbacks, of which it shows no body: it is to deliver them again.

        That is no news of the request. A callback that this site refuses for ever would otherwise
        be sent for as long.
        """
        number = f"{llm_request.inquiries} of {MOST_INQUIRIES}"
        for letter in letters:
            self.note_problem(
                llm_request, f"{_hidden(letter)} It is delivered once more ({number})."
            )
            with suppress(NotFound):  # somebody else has asked for it
                self.client.retry_dead_letter(letter.dlq_id)
        self.wait(llm_request)

    def take_dead_message(self, letters: Iterable[DeadLetter], llm_request: LLMRequest) -> bool:
        """QStash has given the message up, and its failure callback never came. Whether it has.

        The dead letter stays where it is: it can be retried from there.
        """
        for letter in letters:
            # A refusal that forbids a retry ends it early; how early nobody says.
            refused = letter.response_status == 489 and llm_request.attempts
            callback = _callback(
                letter,
                status=letter.response_status,
                retried=llm_request.attempts - 1 if refused else letter.max_retries,
                dlq_id=letter.dlq_id,
            )
            if self.receive_what_is_told(callback, llm_request):
                return True
        return False

    def seek_answer(self, entry: LogEntry, inquiry: Inquiry, llm_request: LLMRequest) -> None:
        """The provider has answered, and we have no callback that says so."""
        attempts = max(len(inquiry.failed_attempts(entry.message_id)), llm_request.attempts)
        status = 200 if entry.response_status is None else entry.response_status
        callback = _callback(entry, status=status, retried=attempts)
        if _is_completion(callback) and self.receive_what_is_told(callback, llm_request):
            return
        underway = inquiry.underway(inquiry.callback_log, self.clock())
        if underway:
            # It may be one that was delivered again, and does not begin to count anew.
            self.wait(llm_request, underway, is_counted=False)
            return
        # Those of earlier attempts went to the same address.
        callbacks = [each for each in inquiry.callback_log if _time(each) >= _time(entry)]
        told = _LOST_CALLBACK.get(callbacks[0].state if callbacks else "", _NO_CALLBACK)
        self.give_up(llm_request, "answer_lost", f"{told} {_ASK_AGAIN}")

    # --- what is not ---

    def fail_as_logged(self, entry: LogEntry, inquiry: Inquiry, llm_request: LLMRequest) -> None:
        """QStash is done with the message, and its dead letter is gone or never was."""
        if entry.state == "CANCELED":
            self.fail(
                llm_request,
                "cancelled_at_qstash",
                "The message was cancelled at QStash, and not from here.",
            )
            return
        told = [entry, *inquiry.failed_attempts(entry.message_id)]
        answered = [each for each in told if each.response_status is not None]
        last = next((each for each in answered if each.response_body), [*answered, entry][0])
        status = _callback(last, status=last.response_status).status
        code, words = read_error(plain(last.response_body))
        words = words or next((each.error for each in told if each.error), "")
        if status == NO_RESPONSE:
            code, words = "no_response", words or "the provider did not answer"
        words = words or f"the provider answered {status}"
        self.fail(llm_request, code or f"http_{status}", f"{words} (from QStash's log)")

    def give_up(self, llm_request: LLMRequest, code: str, error: str) -> None:
        """Nothing was found: lost, unless this may still change."""
        receipts = self.receipts.filter(llm_request=llm_request, applied_at=None)
        unread = receipts.exclude(kind=Kind.PING).order_by("apply_tries").first()
        if unread is not None and _is_read_again(unread):
            self.wait(llm_request)
        elif llm_request.inquiries < INQUIRIES_IN_DOUBT:
            self.note_problem(
                llm_request, f"{error} QStash is asked once more before that is final."
            )
            self.wait(llm_request)
        elif unread is not None:
            self.fail(llm_request, "answer_unread", _ANSWER_UNREAD, is_lost=True)
        else:
            self.fail(llm_request, code, error, is_lost=True)

    def fail(
        self, llm_request: LLMRequest, code: str, error: str, *, is_lost: bool = False
    ) -> None:
        """Said only of a request of which nothing was heard meanwhile."""
        with transaction.atomic(using=self.using):
            locked = self.rows.lock(llm_request.uuid)
            if locked is None or locked.deadline_at != llm_request.deadline_at:
                return
            has_failed = locked.fail(code, error, now=self.clock())
        self.failed += has_failed and not is_lost
        self.lost += has_failed and is_lost

    # --- what goes on ---

    def is_settled(self, llm_request: LLMRequest) -> bool:
        """Whether it is finished by now; if not, what is known of it is up to date."""
        llm_request.refresh_from_db(
            fields=["state", "deadline_at", "inquiries", "attempts", "qstash_message_id"]
        )
        self.recovered += llm_request.state == State.COMPLETED
        self.failed += llm_request.state == State.FAILED
        return llm_request.state != State.SUBMITTED

    def wait(
        self,
        llm_request: LLMRequest,
        underway: Iterable[LogEntry] = (),
        *,
        is_heard_of: bool = False,
        is_counted: bool = True,
    ) -> None:
        """Ask again later: after as long as it has been with QStash already, at most 6 hours."""
        now = self.clock()
        elapsed = now - (llm_request.submitted_at or llm_request.created_at)
        until = max(llm_request.next_deadline(now), now + min(elapsed, LONGEST_WAIT))
        for entry in underway:
            delivery = _moment(entry.next_delivery_time)
            if delivery is not None and delivery > now:
                until = max(until, llm_request.next_deadline(delivery))
        changes: dict[str, Any] = {"deadline_at": until}
        if is_heard_of:
            changes["inquiries"] = 0
        elif not is_counted:
            changes["inquiries"] = max(llm_request.inquiries - 1, 0)
        self._held(llm_request).update(**changes)
        self.waiting += 1

    def put_off(self, llm_request: LLMRequest, error: QStashError) -> None:
        """It could not be asked about. An outage says nothing of the request, and does not count."""
        now, is_outage = self.clock(), _is_outage(error)
        pause = OUTAGE_PAUSE if is_outage else LONGEST_WAIT / 6
        advice = ""
        if isinstance(error, AuthenticationError | TransportError):
            advice = f" (QSTASH_URL is {app_settings().qstash_url}; check it and QSTASH_TOKEN.)"
        self.problem = app_settings().without_secrets(clean_text(f"{error}{advice}"), limit=500)
        logger.warning("QStash could not be asked about %s: %s", llm_request.uuid, self.problem)
        is_counted = not is_outage or _begin(llm_request) + QSTASH_REMEMBERS < now
        if is_counted and llm_request.inquiries > MOST_INQUIRIES:
            problem = f"{_NOT_ASKED} {self.problem}"
            self.fail(llm_request, "lost", problem, is_lost=True)
            return
        self.note_problem(llm_request, self.problem)
        inquiries = llm_request.inquiries if is_counted else max(llm_request.inquiries - 1, 0)
        self._held(llm_request).update(deadline_at=now + pause, inquiries=inquiries)
        self.waiting += 1

    def note_problem(self, llm_request: LLMRequest, problem: str) -> None:
        if self._held(llm_request).exists():
            llm_request.note_problem(problem)

    def _held(self, llm_request: LLMRequest) -> LLMRequestQuerySet:
        """The request, unless it was heard of since: then that counts."""
        return self.rows.submitted().filter(pk=llm_request.pk, deadline_at=llm_request.deadline_at)


_MEND_AND_RETRY = (
    f"In {MOST_INQUIRIES} inquiries no new delivery of it arrived. Once this site takes it (see what it answers to callbacks), retry that dead letter at QStash: "
    "what it brings counts still. To ask again (resubmit) is to pay again."
)
_NOT_ASKED = (
    f"QStash could not be asked what became of this request, {MOST_INQUIRIES} times in a row. An "
    "answer that comes still counts; to ask again (resubmit) may be to pay again."
)
_ASK_AGAIN = "It is kept nowhere; to ask again (resubmit) is to pay again."
_NO_CALLBACK = "The provider answered, and QStash knows of no callback that brings the answer here."
_LOST_CALLBACK = {
    "DELIVERED": "The provider answered, and QStash says that a callback with the answer was taken "
    "at our address, but nothing is stored here: another site or database may be behind it.",
    "FAILED": "The provider answered, but QStash gave up bringing the answer here, and the "
    "callback's dead letter is gone.",
    "CANCELED": "The provider answered, but the callback with the answer was cancelled at QStash.",
}
_CHAT_LOST = (
    "The process that waited for the answer has died over it. The provider may have been paid for it "
    "all the same, and it can be asked again (resubmit)."
)
_ANSWER_UNREAD = (
    "What came back is stored here, but it could not be read: see its callback responses. "
    "They can be read again, for nothing, once the cause is mended."
)


def _listed(listing: Callable[..., Page[T]], **asked: Any) -> list[T]:
    """All that a listing has, within reason."""
    items: list[T] = []
    cursor = ""
    for _ in range(MOST_PAGES):
        page = listing(cursor=cursor, **asked)
        items += page.items
        cursor = page.cursor
        if not cursor:
            break
    return items


def _begin(llm_request: LLMRequest) -> datetime:
    begin = llm_request.submitted_at or llm_request.created_at
    return max(begin, llm_request.not_before or begin)


def _hidden(letter: DeadLetter) -> str:
    refusal = f" after {letter.response_status} of this site" if letter.response_status else ""
    return (
        f"A callback of this request lies at QStash as dead letter {letter.dlq_id}{refusal}, and "
        "QStash shows no body of it."
    )


def _is_outage(error: QStashError) -> bool:
    """Whether the next question would fare the same."""
    is_refused = isinstance(error, RateLimited | AuthenticationError | TransportError)
    return is_refused or (isinstance(error, ResponseError) and error.status >= 500)


def _is_former(callback: Callback, llm_request: LLMRequest) -> bool:
    """Whether it tells of a submission before the last one. Only its success counts still."""
    known = llm_request.qstash_message_id
    return bool(known) and callback.source_message_id != known and not callback.is_success


def _is_read_again(receipt: CallbackResponse) -> bool:
    return receipt.kind != Kind.QUARANTINED and receipt.apply_tries < MOST_APPLY_TRIES


def _callback(told: DeadLetter | LogEntry, **fields: Any) -> Callback:
    """What a dead letter or the log tells of an attempt, as its callback would have told it."""
    callback = Callback(
        header=told.response_header,
        body=told.response_body,
        max_retries=told.max_retries or 0,
        source_message_id=told.message_id,
        url=told.url,
        **fields,
    )
    # Read as an envelope is: there everything is bent that is not of the kind it should be.
    return Callback.from_json(callback.to_json())


def _is_completion(callback: Callback) -> bool:
    """Whether this is the whole answer. The log may cut it, or hide it, or not keep it."""
    if not callback.is_success:
        return False
    try:
        read_completion(callback.body)
    except UnreadableCompletion:
        return False
    return True


def _latest(entries: Iterable[LogEntry]) -> list[LogEntry]:
    """The latest entry of each message in ``entries``, which are newest first."""
    latest: dict[str, LogEntry] = {}
    for entry in entries:
        latest.setdefault(entry.message_id, entry)
    return list(latest.values())


def _newest_first(entries: Iterable[LogEntry]) -> list[LogEntry]:
    return sorted(entries, key=lambda entry: (_time(entry), _rank(entry)), reverse=True)


def _rank(entry: LogEntry) -> int:
    return _ORDER.index(entry.state) if entry.state in _ORDER else 0


def _time(entry: LogEntry) -> int:
    """Unix milliseconds; 0 where it is no such thing."""
    return _milliseconds(entry.time) or 0


def _milliseconds(value: Any) -> int | None:
    # A foreign word is not to stop us; the documentation draws some numbers as strings.
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < 32_503_680_000_000 else None


def _moment(value: Any) -> datetime | None:
    """Unix milliseconds as the columns hold moments; None where it is no such thing."""
    number = _milliseconds(value)
    if number is None:
        return None
    moment = datetime.fromtimestamp(number / 1000, UTC)
    if settings.USE_TZ:
        return moment
    return timezone.make_naive(moment, timezone.get_default_timezone())
