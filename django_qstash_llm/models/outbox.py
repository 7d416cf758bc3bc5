"""The outbox: pending rows on their way into QStash, many at a time.

The row is the outbox. What Celery gets is only a doorbell: a task without arguments that takes
whatever is pending. Claim in a short transaction, call QStash outside any, record in one update.
"""

from __future__ import annotations

import logging
import random
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, NamedTuple

from django.db import connections, transaction
from django.db.models import Exists, F, Min, OuterRef, Q
from django.db.models.functions import Coalesce
from django.utils import timezone

from ..cleaning import clean_text
from ..conf import app_settings, qstash_client
from ..exceptions import ConfigurationError, InvalidRequest
from ..providers import Provider, get_provider
from ..qstash import (
    Accepted,
    AuthenticationError,
    Client,
    FlowControl,
    InvalidOption,
    Message,
    NotFound,
    Options,
    QStashError,
    RateLimited,
    Refused,
    ResponseError,
    TransportError,
    UnreadableAnswer,
)
from ..signals import request_submitted
from .budget import Budget, BudgetQuerySet
from .circuit import CLOCKS_DIFFER, LONGEST_PAUSE, QSTASH, Circuit, CircuitQuerySet
from .lane import Lane
from .reconciler import known_message_id
from .request import CLAIM_SECONDS, LLMRequest, LLMRequestQuerySet, OverTheWire

logger = logging.getLogger(__name__)

ROWS_PER_CLAIM = 1000
STALE_PER_CLAIM = 25
"""Each takes a look into QStash's logs before it may go."""
DEDUPLICATION_WINDOW = timedelta(minutes=8)
"""QStash remembers a deduplication id for 10 minutes. We stop relying on it a little earlier."""
TRIES_IN_DOUBT = 20
"""More than an hour: as long as a worker may be without a provider that the site already names."""
CALLS_FOR_ALL = 3
"""So often in a row a failure is taken to be everybody's. Then one row goes first and by itself:
another that QStash cannot take may be in every batch."""
MOST_IN_VAIN = 3
"""So many in a row fail by themselves before it is everybody's after all."""
# Refusals that a message deserves. Every other says something about us, the way or the hour.
_ABOUT_THE_MESSAGE = {400, 412, 413, 422}
# And these never say anything about a message.
_ABOUT_US = {401, 429}
_CANNOT_BE_COMPOSED = (InvalidRequest, InvalidOption, ConfigurationError, TypeError, ValueError)


class _Excerpt(NamedTuple):
    pk: int
    uuid: uuids.UUID
    provider: str
    model: str
    messages: list[Any]
    parameters: dict[str, Any]
    labels: list[str]
    queue: str
    not_before: datetime | None
    retries: int | None
    retry_delay: str
    timeout: int | None
    flow_control: dict[str, Any]
    redact: list[str]
    submission_number: int
    submission_tries: int
    first_tried_at: datetime | None
    submit_after: datetime | None
    claim_token: uuids.UUID
    claimed_until: datetime | None
    tenant: str
    user_id: Any
    api_key_id: int | None


class Claimed(OverTheWire, _Excerpt):
    """What the outbox needs of a row. Making the whole row of it would take as long as all the rest."""

    __slots__ = ()

    @property
    def has_paused(self) -> bool:
        """Whether it was last put back for its own sake, and not with everybody."""
        return self.submit_after is not None

    def is_stale(self, now: datetime) -> bool:
        """QStash may have it, and may have forgotten its deduplication id."""
        tried_at = self.first_tried_at
        if tried_at is None:
            return False
        return tried_at <= now - DEDUPLICATION_WINDOW or tried_at > now + CLOCKS_DIFFER


Submission = tuple[Claimed, Message]


class _Standstill(Exception):
    """No further call of this claim makes sense now. ``error`` is None when only time ran out."""

    def __init__(self, error: QStashError | None) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class _Course:
    """What has shown since a claim began to be handed over. Rows by their keys."""

    in_doubt: set[int] = field(default_factory=set)
    """QStash may have them: until it says so, nothing that it says of a later call changes that."""
    tried: set[int] = field(default_factory=set)
    """They were in a call whose failure may be their own doing: this try counts."""
    held: set[str] = field(default_factory=set)
    """Queues of which a row was put back: those behind it do not go before it."""
    takes: bool = False
    """Whether QStash has taken one, or refused one for what is in it."""
    in_vain: int = 0
    """How many in a row it has not, by themselves, of which nothing of the kind was known."""


@dataclass
class Outbox:
    """Submits the pending rows of one database."""

    using: str = "default"
    clock: Callable[[], datetime] = timezone.now
    submitted: int = 0
    """How many rows QStash has taken from us so far."""
    problem: str = ""
    """Why the last ones that were put back were."""
    failures: int = field(default=0, init=False, repr=False)
    """The circuit's: how often in a row QStash has taken nothing."""
    course: _Course = field(default_factory=_Course, init=False, repr=False)

    @property
    def rows(self) -> LLMRequestQuerySet:
        return LLMRequest.objects.using(self.using)

    @property
    def circuits(self) -> CircuitQuerySet:
        return Circuit.objects.using(self.using)

    @property
    def budgets(self) -> BudgetQuerySet:
        return Budget.objects.using(self.using)

    @cached_property
    def client(self) -> Client:
        return qstash_client()

    def due(self, among: Q | None = None) -> LLMRequestQuerySet:
        """Pending, not being submitted by anybody, not told to wait, in no paused lane, nor behind
        one in its queue that is. ``among`` narrows it: what it leaves out waits, and what is behind
        that in a queue."""
        now, among = self.clock(), among or Q()
        if held := Lane.objects.using(self.using).held(now):
            among &= ~held
        is_free, may_go = _is_free(now), _may_go(now)
        before_it = self.rows.pending().filter(queue=OuterRef("queue"), pk__lt=OuterRef("pk"))
        is_next = Q(queue="") | ~Exists(before_it.exclude(is_free, may_go, among))
        return self.rows.pending().filter(is_free, may_go, among, is_next)

    def submit(self, *, limit: int = 2000) -> int:
        """Submit up to ``limit`` due rows; answers how many were taken. Never raises for a row.

        And then a few of those about which QStash must be asked first: that takes seconds each, for
        which nobody else waits. Raises ``ConfigurationError`` when nothing could be submitted at
        all; the rows stay pending.
        """
        app_settings().check_ready()
        self.failures = self.circuits.failures(QSTASH)
        if self.failures and not self.may_find_out():
            return 0
        taken = 0
        while taken < limit:
            claimed = self.claim(min(ROWS_PER_CLAIM, limit - taken), ~_is_stale(self.clock()))
            if not claimed:
                break
            taken += len(claimed)
            if not self.hand_over(claimed):
                return taken
        stale = self.claim(min(STALE_PER_CLAIM, limit), _is_stale(self.clock()))
        if stale:
            self.hand_over(stale)
        return taken + len(stale)

    def may_find_out(self) -> bool:
        """Whether there is something by which to find out if QStash takes anything again, and
        nobody else is about to."""
        return self.due().exists() and self.circuits.may_call(QSTASH, self.clock())

    def hand_over(self, claimed: Sequence[Claimed]) -> bool:
        """Submit what is claimed. Whether it makes sense to go on with more."""
        self.course = _Course()
        try:
            reserved = self.reserve(claimed)
            for alike in self.in_turn(reserved) if reserved else ():
                for chunk in self.chunks(self.compose(self.settle_stale(alike))):
                    self.check_claim(claimed)
                    self.hand_in(chunk)
        except _Standstill as standstill:
            self.stand_still(claimed, standstill)
            return False
        finally:
            self.cancel_meanwhile(claimed)
        return True

    def reserve(self, claimed: Sequence[Claimed]) -> list[Claimed]:
        """Those of ``claimed`` that their budgets have room for; the others fail, with the reason."""
        conf = app_settings()
        named = [
            # What ``prepare`` will fill in.
            row._replace(
                provider=row.provider or conf.default_provider,
                model=row.model or conf.default_model,
                tenant=row.tenant or self.tenant_of(row),
            )
            for row in claimed
        ]
        refused = self.budgets.reserve(named, now=self.clock())
        for row in claimed:
            if row.pk in refused:
                self.fail(row, "budget_exceeded", str(refused[row.pk]))
        return [row for row in claimed if row.pk not in refused]

    def tenant_of(self, claimed: Claimed) -> str:
        """Of a row that ``save`` has not prepared. What is wrong with it is said when it is composed."""
        if not app_settings().tenant or (claimed.provider and claimed.model):
            return ""
        with suppress(ConfigurationError):
            return app_settings().tenant_of(self.rows.get(pk=claimed.pk))
        return ""

    def in_turn(self, claimed: Sequence[Claimed]) -> Iterator[list[Claimed]]:
        """What was put back for its own sake goes apart and last: nobody else is to fail with it.
        None overtakes another of its queue."""
        rows = list(claimed)
        if self.failures >= CALLS_FOR_ALL:
            first = _least_suspect(rows)
            rows.remove(first)
            yield [first]
        others, apart, behind = [], [], []
        queues_apart = set()
        for row in rows:
            if row.queue in queues_apart:
                behind.append(row)
            elif row.has_paused:
                apart.append(row)
                queues_apart |= {row.queue} - {""}
            else:
                others.append(row)
        yield from (others, apart, behind)

    def claim(self, count: int, among: Q | None = None) -> list[Claimed]:
        """Take ``count`` due rows for ourselves, oldest first."""
        token, now = uuids.uuid4(), self.clock()
        with transaction.atomic(using=self.using):
            free = self.due(among).order_by("id")
            if connections[self.using].features.has_select_for_update_skip_locked:
                free = free.select_for_update(skip_locked=True, of=("self",))
            ids = self.in_order(list(free.values_list("pk", "queue")[:count]))
            # Guarded again: on SQLite without IMMEDIATE two readers see the same free rows.
            self.rows.pending().filter(_is_free(now), pk__in=ids).update(
                claim_token=token,
                claimed_until=now + timedelta(seconds=CLAIM_SECONDS),
                submission_tries=F("submission_tries") + 1,
                first_tried_at=Coalesce("first_tried_at", now),
            )
        ours = self.rows.filter(pk__in=ids, claim_token=token).order_by("id")
        return [Claimed(*row) for row in ours.values_list(*Claimed._fields)]

    def in_order(self, free: list[tuple[int, str]]) -> list[int]:
        """The keys of ``free`` without those whose queue has an earlier row that is not among them.

        ``due`` leaves out what it can see; another outbox's claim that is not committed it cannot.
        """
        first: dict[str, int] = {}
        for pk, queue in free:
            first.setdefault(queue, pk)
        first.pop("", None)
        if not first:
            return [pk for pk, _ in free]
        waiting = self.rows.pending().filter(queue__in=first).order_by()
        earliest = dict(waiting.values_list("queue").annotate(Min("pk")))
        overtaking = {queue for queue, pk in first.items() if earliest.get(queue, pk) < pk}
        return [pk for pk, queue in free if queue not in overtaking]

    def check_claim(self, claimed: Sequence[Claimed]) -> None:
        """Begin no call in the second half of a claim: it could end after the claim does.

        A process that was paused must not send what another has taken over since.
        """
        if self.has_passed(claimed, CLAIM_SECONDS / 2):
            raise _Standstill(None)

    def has_passed(self, claimed: Sequence[Claimed], seconds: float) -> bool:
        """Whether they were claimed longer ago."""
        claimed_at = claimed[0].claimed_at
        return claimed_at is not None and self.clock() > claimed_at + timedelta(seconds=seconds)

    def settle_stale(self, claimed: Sequence[Claimed]) -> Iterator[Claimed]:
        """Those of ``claimed`` that may be submitted, without what QStash turns out to have.

        Within the deduplication window the same id makes a second submission harmless. After it,
        QStash's logs and dead letters are asked first; only what they do not know is submitted anew.
        They are asked for a quarter of the claim, so that what is settled by then still leaves with
        it; whose turn does not come is let go as it was.
        """
        later = []
        for llm_request in claimed:
            if not llm_request.is_stale(self.clock()):
                yield llm_request
            elif self.has_passed(claimed, CLAIM_SECONDS / 4):
                self.hold_queues([llm_request])
                later.append(llm_request)
            elif settled := self.settle(llm_request):
                yield settled
        self.let_go(later)

    def settle(self, llm_request: Claimed) -> Claimed | None:
        """It as a new submission, or None when there is nothing to submit now."""
        try:
            message_id = known_message_id(self.client, llm_request)
        except (ResponseError, TransportError) as error:
            is_refused = isinstance(error, ResponseError) and error.status in _ABOUT_THE_MESSAGE
            if _may_be_about_a_message(error):
                self.course.tried.add(llm_request.pk)
            if is_refused or (_may_be_about_a_message(error) and not self.failures):
                # Next time another is asked about first.
                self.put_back([llm_request], str(error), self.pause([llm_request]))
            if is_refused:
                return None
            raise _Standstill(error) from error
        if message_id:
            self.record([(llm_request, Accepted(message_id))])
            return None
        # Should it not be sent after all, it is as one that was never tried: this is not asked again.
        number = llm_request.submission_number + 1
        anew = {"submission_number": number, "first_tried_at": llm_request.claimed_at}
        if not self.claimed([llm_request]).update(**anew):
            return None
        return llm_request._replace(**anew)

    def compose(self, llm_requests: Iterable[Claimed]) -> Iterator[Submission]:
        """Each row as QStash's message. A row that cannot become one fails, with the reason."""
        composer = Composer(self.using, now=self.clock())
        for llm_request in llm_requests:
            try:
                if not (llm_request.provider and llm_request.model):
                    llm_request = self.prepare(llm_request)
                yield llm_request, composer.message(llm_request)
            except _CANNOT_BE_COMPOSED as error:
                self.doubt_or_fail(llm_request, error)

    def doubt_or_fail(self, llm_request: Claimed, error: Exception) -> None:
        """It cannot become a message. While that may be this worker's settings, it waits."""
        is_ours = isinstance(error, ConfigurationError)
        is_ours |= isinstance(error, InvalidRequest) and error.field == "provider"
        if is_ours and llm_request.submission_tries < TRIES_IN_DOUBT:
            self.close_window([llm_request])
            self.put_back([llm_request], str(error), self.pause([llm_request]))
        else:
            self.fail(llm_request, "cannot_submit", str(error))

    def prepare(self, claimed: Claimed) -> Claimed:
        """What ``save`` does. ``bulk_create`` and fixtures go round it."""
        filled_in = (
            *("provider", "model", "messages", "parameters", "labels", "retries", "timeout"),
            "tenant",
        )
        llm_request = self.rows.get(pk=claimed.pk)
        llm_request.prepare()
        llm_request.save(using=self.using, update_fields=filled_in)
        return claimed._replace(**{name: getattr(llm_request, name) for name in filled_in})

    def chunks(self, submissions: Iterator[Submission]) -> Iterator[list[Submission]]:
        """Groups that fit one call, by count and by bytes."""
        conf = app_settings()
        chunk: list[Submission] = []
        size = 0
        for submission in submissions:
            # Escaped once more inside the batch's JSON, and its headers beside it.
            weight = len(submission[1].body) * 5 // 4 + 1500
            if chunk and (len(chunk) >= conf.batch_size or size + weight > conf.batch_bytes):
                yield chunk
                chunk, size = [], 0
            chunk.append(submission)
            size += weight
        if chunk:
            yield chunk

    def hand_in(self, chunk: Sequence[Submission]) -> None:
        """One call for the group, and each row told what became of it."""
        chunk = self.not_overtaking(chunk)
        if not chunk:
            return
        llm_requests, messages = [row for row, _ in chunk], [message for _, message in chunk]
        try:
            if len(messages) == 1:
                answers = [self.client.publish(messages[0])]
            else:
                answers = self.client.batch(messages)
            outcomes = [_of_no_group(answer) for answer in answers]
        except (TransportError, ResponseError) as error:
            if error.is_ambiguous:
                self.course.in_doubt.update(row.pk for row in llm_requests)
            if _may_be_about_a_message(error):
                self.course.tried.update(row.pk for row in llm_requests if not row.has_paused)
            self.take_failure(chunk, error)
        else:
            self.take_outcomes(chunk, outcomes)

    def take_outcomes(
        self, chunk: Sequence[Submission], outcomes: Sequence[Accepted | Refused]
    ) -> None:
        """QStash said of each message what becomes of it."""
        told = list(zip(chunk, outcomes, strict=True))
        accepted = [(row, each) for (row, _), each in told if isinstance(each, Accepted)]
        refused = [(submission, each) for submission, each in told if isinstance(each, Refused)]
        self.record(accepted)
        if accepted or len(chunk) == 1:
            self.takes_something()
        if len(chunk) > 1:
            # For now or for good? A batch does not say; by itself it is answered with a status.
            self.hand_in_each([submission for submission, _ in refused])
            return
        for (llm_request, _), answer in refused:
            self.fail(llm_request, "qstash_refused", answer.error)

    def takes_something(self) -> None:
        """QStash's answer shows that it is there for us: nobody needs to wait for that any more."""
        self.course.in_vain = 0
        if not self.course.takes:
            self.course.takes, self.failures = True, 0
            self.circuits.close(QSTASH)

    def not_overtaking(self, chunk: Sequence[Submission]) -> Sequence[Submission]:
        """Without those behind one of their queue that was put back since they were claimed."""
        if not self.course.held:
            return chunk
        self.let_go([row for row, _ in chunk if row.queue in self.course.held])
        return [submission for submission in chunk if submission[0].queue not in self.course.held]

    def take_failure(
        self, chunk: Sequence[Submission], error: TransportError | ResponseError
    ) -> None:
        """The call as a whole brought nothing that says which message is which."""
        if isinstance(error, ResponseError) and error.status in _ABOUT_THE_MESSAGE:
            if len(chunk) == 1:
                self.takes_something()
                self.fail(chunk[0][0], f"qstash_{error.status}", str(error))
                return
        elif len(chunk) == 1 or not isinstance(error, UnreadableAnswer):
            if not self.is_about_these([row for row, _ in chunk], error):
                raise _Standstill(error) from error
            if len(chunk) == 1:
                self.set_aside(chunk[0][0], error)
                return
        # One of them is the culprit, and the others must not suffer for it. Or the answer was too
        # short: those that were taken are known by their deduplication ids, and each by itself is
        # told which message is its own.
        self.hand_in_each(chunk)

    def is_about_these(
        self, llm_requests: Sequence[Claimed], error: TransportError | ResponseError
    ) -> bool:
        """Whether it is they that QStash does not take, and not anybody at the moment."""
        is_known_of_these = not self.failures and all(row.has_paused for row in llm_requests)
        return _may_be_about_a_message(error) and (self.course.takes or is_known_of_these)

    def set_aside(self, llm_request: Claimed, error: TransportError | ResponseError) -> None:
        """QStash takes others and not this one: it waits by itself, and not for ever."""
        # What it was tried together with everybody says nothing about it.
        tries = llm_request.submission_tries if llm_request.has_paused else 1
        if tries >= TRIES_IN_DOUBT:
            status = error.status if isinstance(error, ResponseError) else "unanswered"
            self.fail(llm_request, f"qstash_{status}", str(error))
        else:
            aside = llm_request._replace(submission_tries=tries)
            self.claimed([aside]).update(submission_tries=tries)
            self.close_window([aside])
            self.put_back([aside], str(error), self.pause([aside]))
        self.course.in_vain += not llm_request.has_paused
        if self.course.in_vain >= MOST_IN_VAIN:
            raise _Standstill(error) from error

    def hand_in_each(self, chunk: Sequence[Submission]) -> None:
        for submission in chunk:
            self.check_claim([llm_request for llm_request, _ in chunk])
            self.hand_in([submission])

    def stand_still(self, claimed: Sequence[Claimed], standstill: _Standstill) -> None:
        """QStash takes nothing at the moment: all that is due waits, and is not tried row by row.

        What never reached it has not been tried, and so has lost none of its tries.
        """
        error = standstill.error
        if error is None:
            self.let_go(claimed)
            return
        self.never_sent(claimed)
        advice = ""
        if isinstance(error, AuthenticationError | TransportError):
            advice = f" (QSTASH_URL is {app_settings().qstash_url}; check it and QSTASH_TOKEN.)"
        self.problem = _problem(f"{error}{advice}")
        now = self.clock()
        self.circuits.trip(QSTASH, self.problem, now=now, until=_reset(error, now))
        # It is the circuit that all of them wait for.
        self.put_back(claimed, self.problem, None)

    def let_go(self, llm_requests: Sequence[Claimed]) -> None:
        """Theirs is the next claim, whoever makes it."""
        if llm_requests:
            self.hold_queues(llm_requests)
            self.never_sent(llm_requests)
            self.claimed(llm_requests).update(claim_token=None, claimed_until=None)

    def hold_queues(self, llm_requests: Sequence[Claimed]) -> None:
        self.course.held.update(row.queue for row in llm_requests if row.queue)

    def never_sent(self, llm_requests: Sequence[Claimed]) -> None:
        """They never arrived: this try does not count, nor does it open a deduplication window."""
        untried = [row for row in llm_requests if row.pk not in self.course.tried]
        if untried:
            tried_before = self.claimed(untried).filter(submission_tries__gt=0)
            tried_before.update(submission_tries=F("submission_tries") - 1)
        self.close_window(llm_requests)

    def close_window(self, llm_requests: Sequence[Claimed]) -> None:
        """Unless QStash may have them, this claim has not opened the one for deduplication."""
        unsent = [row for row in llm_requests if row.pk not in self.course.in_doubt]
        if unsent:
            opened = self.claimed(unsent).filter(first_tried_at=unsent[0].claimed_at)
            opened.update(first_tried_at=None)

    def pause(self, llm_requests: Sequence[Claimed]) -> timedelta:
        """How long these wait before the next try."""
        tries = min(max(row.submission_tries for row in llm_requests), 10)
        jitter = random.uniform(1.0, 1.2)  # noqa: S311
        return timedelta(seconds=min(LONGEST_PAUSE, 2.0**tries) * jitter)

    def put_back(
        self, llm_requests: Sequence[Claimed], problem: str, pause: timedelta | None
    ) -> None:
        """Back to pending, to be tried later with the same deduplication id. ``pause``: their own,
        unless they wait with everybody."""
        self.problem = problem = _problem(problem)
        rows = self.claimed(llm_requests)
        changes: dict[str, Any] = {"error": problem}
        if pause is not None:
            self.hold_queues(llm_requests)
            changes["submit_after"] = self.clock() + pause
        # Its callback may have come, or somebody have cancelled it: then there is no later.
        put_back = rows.pending().update(**changes)
        rows.update(claim_token=None, claimed_until=None)
        logger.warning("%d requests could not be submitted: %s", put_back, problem)

    def claimed(self, llm_requests: Sequence[Claimed]) -> LLMRequestQuerySet:
        """These rows, as far as our claim on them still holds."""
        return self.rows.filter(
            pk__in=[row.pk for row in llm_requests], claim_token=llm_requests[0].claim_token
        )

    def fail(self, llm_request: Claimed, code: str, error: str) -> None:
        """No submission will succeed. Said only of a row that is still pending and ours."""
        with transaction.atomic(using=self.using):
            claimed = self.claimed([llm_request])
            if claimed.pending().update(claim_token=None, claimed_until=None):
                self.rows.get(pk=llm_request.pk).fail(code, error, now=self.clock())
            claimed.update(claim_token=None, claimed_until=None)

    def record(self, accepted: Sequence[tuple[Claimed, Accepted]]) -> None:
        """Write down, in one update, the ids by which QStash has them."""
        if not accepted:
            return
        self.write_message_ids(
            [(row, clean_text(answer.message_id, limit=255)) for row, answer in accepted]
        )
        self.submitted += len(accepted)
        if request_submitted.has_listeners(LLMRequest):
            submitted = self.rows.filter(pk__in=[row.pk for row, _ in accepted])
            for llm_request in submitted.order_by("id"):
                request_submitted.send_robust(LLMRequest, llm_request=llm_request)

    def write_message_ids(self, ids: Sequence[tuple[Claimed, str]]) -> None:
        """``pending -> submitted`` for many rows at once, guarded by our claim.

        By hand, because ``bulk_update`` costs more than the HTTP calls. A callback may have come
        first: then the state stays what it made of it, and only the id is filled in.
        """
        connection = connections[self.using]
        table = connection.ops.quote_name(LLMRequest._meta.db_table)
        token = LLMRequest._meta.get_field("claim_token")
        claim = token.get_db_prep_value(ids[0][0].claim_token, connection)
        moment, now = connection.ops.adapt_datetimefield_value, self.clock()
        changes = f"""
            UPDATE {table} SET qstash_message_id = {{id}}, claim_token = NULL, claimed_until = NULL,
                submitted_at = COALESCE(submitted_at, %s),
                deadline_at = CASE WHEN state = 'pending' THEN {{deadline}} ELSE deadline_at END,
                error = CASE WHEN state = 'pending' THEN '' ELSE error END,
                state = CASE WHEN state = 'pending' THEN 'submitted' ELSE state END
        """  # noqa: S608 - the table's own name
        given = [(row.pk, message_id, moment(row.next_deadline(now))) for row, message_id in ids]
        with transaction.atomic(using=self.using), connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                pks, message_ids, deadlines = map(list, zip(*given, strict=True))
                cursor.execute(
                    f"""{changes.format(id="given.message_id", deadline="given.deadline")}
                    FROM unnest(%s::bigint[], %s::text[], %s::timestamptz[])
                        AS given (pk, message_id, deadline)
                    WHERE {table}.id = given.pk AND claim_token = %s""",
                    [moment(now), pks, message_ids, deadlines, claim],
                )
            else:
                cursor.executemany(
                    f"{changes.format(id='%s', deadline='%s')} WHERE id = %s AND claim_token = %s",
                    [(each[1], moment(now), each[2], each[0], claim) for each in given],
                )

    def cancel_meanwhile(self, llm_requests: Sequence[Claimed]) -> None:
        """What somebody cancelled while it was on its way is cancelled at QStash too."""
        first, last = llm_requests[0], llm_requests[-1]
        # Asked of every claim and nearly always for nothing, so it must be cheap: no list of keys.
        cancelled = self.rows.cancelled().filter(
            pk__range=(first.pk, last.pk), finished_at__gte=first.claimed_at
        )
        with_qstash = cancelled.exclude(qstash_message_id="")
        ids = list(with_qstash.values_list("qstash_message_id", flat=True))
        if not ids:
            return
        try:
            self.client.cancel_messages(ids)
        except NotFound:
            pass
        except QStashError as error:
            logger.warning("Cancelled here, but QStash could not be told of %s: %s", ids, error)


# Further ahead than any claim or pause reaches means that the clock has been put back since: what
# waits must not wait for the clock to come round again.


def _is_free(now: datetime) -> Q:
    farthest = now + timedelta(seconds=CLAIM_SECONDS) + CLOCKS_DIFFER
    is_over = Q(claimed_until__lt=now) | Q(claimed_until__gt=farthest)
    return Q(claimed_until=None) | is_over


def _may_go(now: datetime) -> Q:
    farthest = now + timedelta(seconds=1.2 * LONGEST_PAUSE) + CLOCKS_DIFFER
    return Q(submit_after=None) | Q(submit_after__lte=now) | Q(submit_after__gt=farthest)


def _least_suspect(rows: Sequence[Claimed]) -> Claimed:
    """By which to find out whether QStash takes anything. What it cannot take has been tried before,
    and is older than what came since. Only the first of a queue may go."""
    first_in_queue: dict[str | int, Claimed] = {}
    for row in rows:
        first_in_queue.setdefault(row.queue or row.pk, row)
    return min(
        first_in_queue.values(), key=lambda row: (row.has_paused, row.submission_tries, -row.pk)
    )


def _may_be_about_a_message(error: TransportError | ResponseError) -> bool:
    """Some are answered with a 5xx, a 403 or not at all, for what is in them."""
    if isinstance(error, ResponseError):
        return error.status not in _ABOUT_US
    return error.is_ambiguous


def _is_stale(now: datetime) -> Q:
    """QStash may have them, and may have forgotten their deduplication ids."""
    is_ahead = Q(first_tried_at__gt=now + CLOCKS_DIFFER)
    return Q(first_tried_at__lte=now - DEDUPLICATION_WINDOW) | is_ahead


def _problem(text: str) -> str:
    return app_settings().without_secrets(clean_text(text), limit=500)


def _reset(error: QStashError, now: datetime) -> datetime | None:
    """When QStash says that it takes something again. At least a second ahead, at most a day."""
    if not isinstance(error, RateLimited) or error.reset is None:
        return None
    seconds = min(max(error.reset - now.timestamp(), 1.0), 86_400.0)
    return now + timedelta(seconds=seconds)


def _of_no_group(answer: Accepted | Refused | list[Accepted | Refused]) -> Accepted | Refused:
    if isinstance(answer, list):
        raise UnreadableAnswer("QStash answered as for a URL group, and our destinations are none")
    return answer


class Composer:
    """Turns rows into messages, sharing what rows share: it is encoded once, not once a row."""

    def __init__(self, using: str = "default", *, now: datetime | None = None) -> None:
        self.lanes = Lane.objects.using(using)
        self.now = now or timezone.now()
        self.is_pacing = app_settings().flow_control != "off"
        self.paces: dict[tuple[str, str], FlowControl | None] = {}
        self.providers: dict[str, Provider] = {}
        self.callback_base = app_settings().callback_url("").removesuffix("/")
        self.shared: dict[tuple[object, ...], Options] = {}

    def message(self, llm_request: Claimed) -> Message:
        name = llm_request.provider
        if name not in self.providers:
            self.providers[name] = get_provider(name)
        provider = self.providers[name]
        url = f"{self.callback_base}{llm_request.uuid}/"
        return Message(
            destination=provider.destination,
            body=provider.body(llm_request.model, llm_request.messages, llm_request.parameters),
            options=self.options(llm_request, provider),
            queue=llm_request.queue,
            deduplication_id=llm_request.deduplication_id,
            callback=url,
            failure_callback=url,
            label=llm_request.wire_label,
        )

    def options(self, row: Claimed, provider: Provider) -> Options:
        pace = self.pace(row, provider)
        # A moment of its own is the one thing that would fill this without being shared.
        if row.not_before is not None:
            return row.options(provider.headers, pace)
        key = (
            provider.name,
            row.retries,
            row.retry_delay,
            row.timeout,
            pace or repr(row.flow_control),
            tuple(row.labels),
            tuple(row.redact),
        )
        if key not in self.shared:
            self.shared[key] = row.options(provider.headers, pace)
        return self.shared[key]

    def pace(self, row: Claimed, provider: Provider) -> FlowControl | None:
        """That of its lane, where it names no flow control of its own. The database is asked once
        for each model."""
        if not self.is_pacing or row.flow_control:
            return None
        lane = (provider.name, row.model)
        if lane not in self.paces:
            self.paces[lane] = self.lanes.flow_control(provider, row.model, now=self.now)
        return self.paces[lane]
