"""The outbox: pending rows on their way into QStash, many at a time.

The row is the outbox. What Celery gets is only a doorbell: a task without arguments that takes
whatever is pending. Claim in a short transaction, call QStash outside any, record in one update.
"""

from __future__ import annotations

import logging
import random
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    InvalidOption,
    Message,
    NotFound,
    Options,
    QStashError,
    RateLimited,
    Refused,
    ResponseError,
    TransportError,
)
from ..signals import request_submitted
from .doorbell import Bell, ring_on_commit
from .request import CLAIM_SECONDS, LLMRequest, LLMRequestQuerySet, OverTheWire

logger = logging.getLogger(__name__)

ROWS_PER_CLAIM = 1000
DEDUPLICATION_WINDOW = timedelta(minutes=8)
"""QStash remembers a deduplication id for 10 minutes. We stop relying on it a little earlier."""
LONGEST_PAUSE = 300.0
"""Seconds between two tries to submit, at most."""
TRIES_IN_DOUBT = 20
"""More than an hour: as long as a worker may be without a provider that the site already names."""
# Refusals that a message deserves. Every other says something about us, the way or the hour.
_ABOUT_THE_MESSAGE = {400, 412, 413, 422}
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
    claim_token: uuids.UUID
    claimed_until: datetime | None


class Claimed(OverTheWire, _Excerpt):
    """What the outbox needs of a row. Making the whole row of it would take as long as all the rest."""

    __slots__ = ()


Submission = tuple[Claimed, Message]


class _Standstill(Exception):
    """No further call of this claim makes sense now. ``error`` is None when only time ran out."""

    def __init__(self, error: QStashError | None, sent: Sequence[Claimed] = ()) -> None:
        super().__init__(error)
        self.error = error
        self.sent = sent
        """What QStash may have all the same."""


@dataclass
class Outbox:
    """Submits the pending rows of one database."""

    using: str = "default"
    clock: Callable[[], datetime] = timezone.now
    submitted: int = 0
    """How many rows QStash has taken from us so far."""
    problem: str = ""
    """Why the last ones that were put back were."""

    @property
    def rows(self) -> LLMRequestQuerySet:
        return LLMRequest.objects.using(self.using)

    @cached_property
    def client(self) -> Client:
        return qstash_client()

    def due(self) -> LLMRequestQuerySet:
        """Pending, not being submitted by anybody, not told to wait, nor behind one in its queue
        that is."""
        now = self.clock()
        is_free = Q(claimed_until=None) | Q(claimed_until__lt=now)
        may_go = Q(submit_after=None) | Q(submit_after__lte=now)
        before_it = self.rows.pending().filter(queue=OuterRef("queue"), pk__lt=OuterRef("pk"))
        is_next = Q(queue="") | ~Exists(before_it.exclude(is_free, may_go))
        return self.rows.pending().filter(is_free, may_go, is_next)

    def submit(self, *, limit: int = 2000) -> int:
        """Submit up to ``limit`` due rows; answers how many were taken. Never raises for a row.

        Raises ``ConfigurationError`` when nothing could be submitted at all; the rows stay pending.
        """
        app_settings().check_ready()
        taken = 0
        while taken < limit:
            claimed = self.claim(min(ROWS_PER_CLAIM, limit - taken))
            if not claimed:
                break
            taken += len(claimed)
            if not self.hand_over(claimed):
                break
        return taken

    def hand_over(self, claimed: Sequence[Claimed]) -> bool:
        """Submit what is claimed. Whether it makes sense to go on with more."""
        try:
            for chunk in self.chunks(self.compose(self.settle_stale(claimed))):
                self.check_claim(claimed)
                self.hand_in(chunk)
        except _Standstill as standstill:
            self.stand_still(claimed, standstill)
            return False
        finally:
            self.cancel_meanwhile(claimed)
        return True

    def claim(self, count: int) -> list[Claimed]:
        """Take ``count`` due rows for ourselves, oldest first."""
        token, now = uuids.uuid4(), self.clock()
        with transaction.atomic(using=self.using):
            free = self.due().order_by("id")
            if connections[self.using].features.has_select_for_update_skip_locked:
                free = free.select_for_update(skip_locked=True, of=("self",))
            ids = self.in_order(list(free.values_list("pk", "queue")[:count]))
            # Guarded again: on SQLite without IMMEDIATE two readers see the same free rows.
            is_free = Q(claimed_until=None) | Q(claimed_until__lt=now)
            self.rows.pending().filter(is_free, pk__in=ids).update(
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
        claimed_at = claimed[0].claimed_at
        if claimed_at and self.clock() > claimed_at + timedelta(seconds=CLAIM_SECONDS / 2):
            raise _Standstill(None)

    def settle_stale(self, claimed: Sequence[Claimed]) -> list[Claimed]:
        """Drop from ``claimed`` what QStash turns out to have.

        Within the deduplication window the same id makes a second submission harmless. After it,
        QStash's logs are asked first; only what they do not know is submitted anew.
        """
        oldest = self.clock() - DEDUPLICATION_WINDOW
        to_submit = []
        for llm_request in claimed:
            first_tried_at = llm_request.first_tried_at
            if first_tried_at is None or first_tried_at > oldest:
                to_submit.append(llm_request)
                continue
            self.check_claim(claimed)
            try:
                entries = self.client.logs(label=llm_request.wire_label, count=1).items
            except QStashError as error:
                self.put_back([llm_request], str(error), self.pause([llm_request]))
                continue
            if entries:
                self.record([(llm_request, Accepted(entries[0].message_id))])
                continue
            now, number = self.clock(), llm_request.submission_number + 1
            anew = {"submission_number": number, "first_tried_at": now}
            if self.claimed([llm_request]).update(**anew):
                to_submit.append(llm_request._replace(**anew))
        return to_submit

    def compose(self, llm_requests: Sequence[Claimed]) -> Iterator[Submission]:
        """Each row as QStash's message. A row that cannot become one fails, with the reason."""
        composer = Composer()
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
            self.never_sent([llm_request])
            self.put_back([llm_request], str(error), self.pause([llm_request]))
        else:
            self.fail(llm_request, "cannot_submit", str(error))

    def prepare(self, claimed: Claimed) -> Claimed:
        """What ``save`` does. ``bulk_create`` and fixtures go round it."""
        filled_in = ("provider", "model", "messages", "parameters", "labels", "retries", "timeout")
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
        llm_requests, messages = [row for row, _ in chunk], [message for _, message in chunk]
        try:
            if len(messages) == 1:
                answers = [self.client.publish(messages[0])]
            else:
                answers = self.client.batch(messages)
            if [] in answers:
                raise TransportError("QStash's answer is an empty list", is_ambiguous=True)
        except TransportError as error:
            raise _Standstill(error, sent=llm_requests if error.is_ambiguous else ()) from error
        except ResponseError as error:
            self.take_refusal(chunk, error)
        else:
            self.record(
                [(row, _one(answer)) for row, answer in zip(llm_requests, answers, strict=True)]
            )

    def take_refusal(self, chunk: Sequence[Submission], error: ResponseError) -> None:
        """QStash refused the whole call."""
        llm_requests = [row for row, _ in chunk]
        if error.status not in _ABOUT_THE_MESSAGE:
            raise _Standstill(error, sent=llm_requests if error.is_ambiguous else ()) from error
        if len(chunk) == 1:
            self.fail(llm_requests[0], f"qstash_{error.status}", str(error))
            return
        # One of them is the culprit; the others must not suffer for it.
        for submission in chunk:
            self.check_claim(llm_requests)
            self.hand_in([submission])

    def stand_still(self, claimed: Sequence[Claimed], standstill: _Standstill) -> None:
        """QStash takes nothing at the moment: what is due waits, and is not tried row by row."""
        sent = {row.pk for row in standstill.sent}
        self.never_sent([row for row in claimed if row.pk not in sent])
        error = standstill.error
        if error is None:
            self.claimed(claimed).update(claim_token=None, claimed_until=None)
            return
        pause = self.pause(standstill.sent or claimed, error)
        advice = ""
        if isinstance(error, AuthenticationError | TransportError):
            advice = f" (QSTASH_URL is {app_settings().qstash_url}; check it and QSTASH_TOKEN.)"
        self.put_back(claimed, f"{error}{advice}", pause)
        self.due().update(submit_after=self.clock() + pause)

    def never_sent(self, llm_requests: Sequence[Claimed]) -> None:
        """They never arrived, so this try has not opened their deduplication window."""
        opened = [row.pk for row in llm_requests if row.first_tried_at == row.claimed_at]
        if opened:
            self.claimed(llm_requests).filter(pk__in=opened).update(first_tried_at=None)

    def pause(self, llm_requests: Sequence[Claimed], error: QStashError | None = None) -> timedelta:
        """How long to wait before the next try."""
        if isinstance(error, RateLimited) and error.reset is not None:
            # Whatever it says: at least a second, at most a day.
            seconds = error.reset - self.clock().timestamp()
            return timedelta(seconds=min(max(seconds, 1.0), 86_400.0))
        tries = min(max(row.submission_tries for row in llm_requests), 10)
        jitter = random.uniform(1.0, 1.2)  # noqa: S311
        return timedelta(seconds=min(LONGEST_PAUSE, 2.0**tries) * jitter)

    def put_back(self, llm_requests: Sequence[Claimed], problem: str, pause: timedelta) -> None:
        """Back to pending, to be tried later with the same deduplication id."""
        problem = app_settings().without_secrets(clean_text(problem, limit=500))
        self.problem = problem
        rows = self.claimed(llm_requests)
        # Its callback may have come, or somebody have cancelled it: then there is no later.
        put_back = rows.pending().update(submit_after=self.clock() + pause, error=problem)
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
            is_ours = claimed.pending().update(claim_token=None, claimed_until=None)
            if is_ours and self.rows.get(pk=llm_request.pk).fail(code, error, now=self.clock()):
                ring_on_commit(Bell.ANNOUNCE, self.using)
            claimed.update(claim_token=None, claimed_until=None)

    def record(self, outcomes: Sequence[tuple[Claimed, Accepted | Refused]]) -> None:
        """Write down QStash's answers: ids in one update, refusals one by one."""
        accepted = [(row, answer) for row, answer in outcomes if isinstance(answer, Accepted)]
        for row, answer in outcomes:
            if isinstance(answer, Refused):
                self.fail(row, "qstash_refused", answer.error)
        if not accepted:
            return
        self.write_message_ids(
            [(row.pk, clean_text(answer.message_id, limit=255)) for row, answer in accepted],
            accepted[0][0],
        )
        self.submitted += len(accepted)
        if request_submitted.has_listeners(LLMRequest):
            submitted = self.rows.filter(pk__in=[row.pk for row, _ in accepted])
            for llm_request in submitted.order_by("id"):
                request_submitted.send_robust(LLMRequest, llm_request=llm_request)

    def write_message_ids(self, ids: Sequence[tuple[int, str]], claimed: Claimed) -> None:
        """``pending -> submitted`` for many rows at once, guarded by our claim.

        By hand, because ``bulk_update`` costs more than the HTTP calls. A callback may have come
        first: then the state stays what it made of it, and only the id is filled in.
        """
        connection = connections[self.using]
        table = connection.ops.quote_name(LLMRequest._meta.db_table)
        token = LLMRequest._meta.get_field("claim_token")
        claim = token.get_db_prep_value(claimed.claim_token, connection)
        now = connection.ops.adapt_datetimefield_value(self.clock())
        changes = f"""
            UPDATE {table} SET qstash_message_id = {{id}}, claim_token = NULL, claimed_until = NULL,
                submitted_at = COALESCE(submitted_at, %s),
                error = CASE WHEN state = 'pending' THEN '' ELSE error END,
                state = CASE WHEN state = 'pending' THEN 'submitted' ELSE state END
        """  # noqa: S608 - the table's own name
        with transaction.atomic(using=self.using), connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute(
                    f"""{changes.format(id="given.message_id")}
                    FROM unnest(%s::bigint[], %s::text[]) AS given (pk, message_id)
                    WHERE {table}.id = given.pk AND claim_token = %s""",
                    [now, [pk for pk, _ in ids], [message_id for _, message_id in ids], claim],
                )
            else:
                cursor.executemany(
                    f"{changes.format(id='%s')} WHERE id = %s AND claim_token = %s",
                    [(message_id, now, pk, claim) for pk, message_id in ids],
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


def _one(answer: Accepted | Refused | list[Accepted | Refused]) -> Accepted | Refused:
    # A list is a URL group's, and our destinations are no groups.
    return answer[0] if isinstance(answer, list) else answer


class Composer:
    """Turns rows into messages, sharing what rows share: it is encoded once, not once a row."""

    def __init__(self) -> None:
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
        # A moment of its own is the one thing that would fill this without being shared.
        if row.not_before is not None:
            return row.options(provider.headers)
        key = (
            provider.name,
            row.retries,
            row.retry_delay,
            row.timeout,
            repr(row.flow_control),
            tuple(row.labels),
            tuple(row.redact),
        )
        if key not in self.shared:
            self.shared[key] = row.options(provider.headers)
        return self.shared[key]
