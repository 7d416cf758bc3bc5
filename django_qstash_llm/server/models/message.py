from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from django.db import models, transaction
from django.db.models import Case, Exists, F, Min, OuterRef, Q, When

from ...qstash import Accepted, Callback, MessageRecord, Options
from ...qstash import Message as WireMessage
from ...qstash.callback import NO_RESPONSE
from ...qstash.options import DEFAULT_RETRIES
from ...qstash.retry import delay_before_retry
from .. import admission, conf, doorbell, redaction
from .deduplication import Deduplication, key_of
from .log_entry import LogEntry
from .queue import Queue, milliseconds

# What a message brought for its first time only.
_NOT_REPEATED = {
    "upstash-content-based-deduplication",
    "upstash-deduplication-id",
    "upstash-delay",
    "upstash-not-before",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one attempt ended."""

    status: int = NO_RESPONSE
    header: Mapping[str, list[str]] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    error: str = ""
    """Why there was no response; empty when there was one."""

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @cached_property
    def first_values(self) -> dict[str, str]:
        return {name.lower(): values[0] for name, values in self.header.items() if values}

    @property
    def forbids_retry(self) -> bool:
        """Both are asked for: the status alone, or the header alone, is retried."""
        says_so = self.first_values.get("upstash-nonretryable-error", "").lower() == "true"
        return self.status == 489 and says_so


class MessageQuerySet(models.QuerySet["Message"]):
    # --- kinds -------------------------------------------------------------------------------

    def unfinished(self) -> MessageQuerySet:
        return self.filter(finished_at__isnull=True)

    def readable(self) -> MessageQuerySet:
        """What ``GET /v2/messages`` knows: the pending, and the finished for a while."""
        return self.exclude(state=Message.State.CANCELED).select_related("queue")

    def due(self, now: datetime) -> MessageQuerySet:
        return self.filter(due_at__lte=now).filter(_HELD_BY_NO_PAUSE)

    def is_anything_due(self, now: datetime) -> bool:
        # Ordered, so that a planner without fresh statistics takes the index, not the table.
        return bool(self.due(now).order_by("due_at").values_list("pk", flat=True)[:1])

    def in_line(self) -> MessageQuerySet:
        """In a queue and not begun."""
        return self.unfinished().filter(queue__isnull=False, due_at__isnull=True)

    def started(self) -> MessageQuerySet:
        """In a queue, begun, and not finished: each takes a place."""
        return self.unfinished().filter(queue__isnull=False, due_at__isnull=False)

    def waiting_for_their_callbacks(self) -> MessageQuerySet:
        """In a queue and finished, but their callbacks are not: each takes a place."""
        telling = Message.objects.filter(due_at__isnull=False, source__isnull=False)
        return self.filter(
            queue__isnull=False, finished_at__isnull=False, pk__in=telling.values("source")
        )

    def next_due_at(self) -> datetime | None:
        due = self.filter(due_at__isnull=False).filter(_HELD_BY_NO_PAUSE)
        moment: datetime | None = due.aggregate(moment=Min("due_at"))["moment"]
        return moment

    # --- in ----------------------------------------------------------------------------------

    def accept(
        self, messages: Sequence[WireMessage], *, caller_ip: str, now: datetime
    ) -> list[Accepted]:
        """Take messages that ``admission`` let through. All of them or, on an error, none."""
        ids = [new_message_id() for _ in messages]
        keys = [key_of(message) for message in messages]
        firsts: dict[str, str] = {}
        for key, message_id in zip(keys, ids, strict=True):
            if key:
                firsts.setdefault(key, message_id)
        with transaction.atomic():
            holders = Deduplication.objects.claim(firsts, now=now)
            accepted = [
                Accepted(holders.get(key, message_id), holders.get(key, message_id) != message_id)
                for key, message_id in zip(keys, ids, strict=True)
            ]
            fresh = [
                (answer.message_id, message)
                for answer, message in zip(accepted, messages, strict=True)
                if not answer.is_duplicate
            ]
            queues = Queue.objects.named((m.queue for _, m in fresh if m.queue), now=now)
            self.insert(
                [
                    Message.of(
                        message,
                        message_id=message_id,
                        caller_ip=caller_ip,
                        queue=queues.get(message.queue),
                        now=now,
                    )
                    for message_id, message in fresh
                ],
                now=now,
            )
        return accepted

    def insert(
        self, rows: Sequence[Message], *, now: datetime, after: Sequence[LogEntry] = ()
    ) -> None:
        """Store new messages and their log entries, ``after`` those that come first."""
        created = [LogEntry.of(row, LogEntry.State.CREATED, now=now) for row in rows]
        LogEntry.objects.tell(*after, *created)
        if not rows:
            return
        self.bulk_create(rows, batch_size=200)
        wait = min((row.due_at - now).total_seconds() if row.due_at else 0.0 for row in rows)
        transaction.on_commit(lambda: doorbell.ring(wait), robust=True)

    # --- claims ------------------------------------------------------------------------------

    def claim(
        self, *, engine: str, limit: int, now: datetime, lease: float | None = None
    ) -> list[Message]:
        """Take up to ``limit`` messages to deliver; nobody else will until the lease is over.

        ``lease``: seconds, for an engine that renews it. Without, it lasts as long as the
        longest of their timeouts.
        """
        claimed: list[Message] = []
        # A look first: on SQLite the transaction below locks out every writer.
        if self.is_anything_due(now):
            with transaction.atomic():
                rows = self.due(now).order_by("due_at", "pk").select_related("queue")
                locked = rows.select_for_update(skip_locked=True, of=("self",))[:limit]
                claimed = self._take(list(locked), engine, now, lease)
        for queue in Queue.objects.with_room()[:limit]:
            if len(claimed) >= limit:
                break
            claimed += self._claim_from(queue, engine, limit - len(claimed), now, lease)
        return claimed

    def _claim_from(
        self, queue: Queue, engine: str, limit: int, now: datetime, lease: float | None
    ) -> list[Message]:
        with transaction.atomic():
            # no_key: whoever enqueues at this moment need not wait for us.
            queue = Queue.objects.select_for_update(no_key=True).get(pk=queue.pk)
            line = queue.mine.in_line().order_by("pk").select_related("queue")
            # The lock is for those who cancel.
            locked = line.select_for_update(of=("self",))[: min(limit, queue.room())]
            return self._take(list(locked), engine, now, lease)

    def _take(
        self, rows: list[Message], engine: str, now: datetime, lease: float | None
    ) -> list[Message]:
        """Mark locked rows as ours. A cancelled one whose engine died is only finished."""
        taken = [row for row in rows if not row.is_cancelling]
        self._finish_cancelled([row for row in rows if row.is_cancelling], now=now)
        if not taken:
            return []
        settings = conf.current()
        seconds = lease or max(row.timeout for row in taken) + settings.lease
        token, until = uuid.uuid4().hex, now + timedelta(seconds=seconds)
        interrupted = Case(
            # Still active and yet due: the engine that had it is no more.
            When(state=Message.State.ACTIVE, then=F("interruptions") + 1),
            default=F("interruptions"),
            output_field=models.PositiveIntegerField(),
        )
        Message.objects.filter(pk__in=[row.pk for row in taken]).update(
            state=Message.State.ACTIVE,
            claim_token=token,
            claimed_by=engine,
            due_at=until,
            interruptions=interrupted,
        )
        for row in taken:
            row.interruptions += row.state == Message.State.ACTIVE
            row.state, row.claim_token, row.due_at = Message.State.ACTIVE, token, until
        LogEntry.objects.tell(*(LogEntry.of(row, LogEntry.State.ACTIVE, now=now) for row in taken))
        return taken

    def renew(self, tokens: Iterable[str], *, until: datetime) -> None:
        """Say that the engine which holds these claims is alive."""
        # An empty token is everybody's who holds nothing.
        self.filter(claim_token__in=set(tokens) - {""}).update(due_at=until)

    def release(self, *, now: datetime) -> int:
        """Let go of claims whose engine is gone or going: they are due at once."""
        return self.filter(claimed_by__gt="", finished_at__isnull=True).update(
            state=Case(
                When(state=Message.State.CANCEL_REQUESTED, then=F("state")),
                When(retried__gt=0, then=models.Value(Message.State.RETRY)),
                default=models.Value(Message.State.CREATED),
                output_field=models.CharField(),
            ),
            claim_token="",
            claimed_by="",
            due_at=now,
        )

    # --- out ---------------------------------------------------------------------------------

    def cancel(self, *, now: datetime) -> int:
        """No further attempt. What is in flight may still arrive. Answers how many there were."""
        total, last = 0, 0
        while True:
            with transaction.atomic():
                rows = self.unfinished().exclude(state=Message.State.CANCEL_REQUESTED)
                rows = rows.filter(pk__gt=last).order_by("pk").select_related("queue")
                chunk = list(rows.select_for_update(of=("self",))[:500])
                if not chunk:
                    return total
                self._cancel_locked(chunk, now)
            total, last = total + len(chunk), chunk[-1].pk

    def _cancel_locked(self, rows: list[Message], now: datetime) -> None:
        requested = LogEntry.State.CANCEL_REQUESTED
        LogEntry.objects.tell(*(LogEntry.of(row, requested, now=now) for row in rows))
        in_flight = [row.pk for row in rows if row.state == Message.State.ACTIVE]
        Message.objects.filter(pk__in=in_flight).update(state=Message.State.CANCEL_REQUESTED)
        self._finish_cancelled([row for row in rows if row.pk not in set(in_flight)], now=now)

    def _finish_cancelled(self, rows: list[Message], *, now: datetime) -> None:
        if not rows:
            return
        with_secrets = [row for row in rows if row.headers != redaction.scrubbed(row.headers)]
        for row in rows:
            row.end(Message.State.CANCELED, now=now)
        ended = {name: getattr(rows[0], name) for name in Message.ENDING if name != "headers"}
        Message.objects.filter(pk__in=[row.pk for row in rows]).update(**ended)
        Message.objects.bulk_update(with_secrets, ["headers"], batch_size=100)
        canceled = LogEntry.State.CANCELED
        LogEntry.objects.tell(*(LogEntry.of(row, canceled, now=now) for row in rows))

    def purge(self, *, before: datetime, chunk: int = 500) -> int:
        """Delete what was finished before then and nothing needs any more, a chunk at a time."""
        total = 0
        while True:
            old = self.filter(
                ~Exists(Message.objects.unfinished().filter(source=OuterRef("pk"))),
                finished_at__lt=before,
                dead_letter__isnull=True,
            )
            keys = list(old.order_by("finished_at").values_list("pk", flat=True)[:chunk])
            if not keys:
                return total
            Message.objects.filter(pk__in=keys).delete()
            total += len(keys)


_HELD_BY_NO_PAUSE = Q(queue__isnull=True) | Q(queue__is_paused=False)


class Message(models.Model):
    """One thing to deliver: what somebody published, or a callback of ours.

    ``due_at`` is the heart: when something is to be done next. Deliver it, or, while it is
    active, take it from an engine that gave no sign of life. Nothing is to be done with what is
    finished, nor with what waits in a queue's line: there it is empty.
    """

    class State(models.TextChoices):
        CREATED = "CREATED"
        ACTIVE = "ACTIVE"
        RETRY = "RETRY"
        CANCEL_REQUESTED = "CANCEL_REQUESTED"
        DELIVERED = "DELIVERED"
        FAILED = "FAILED"
        CANCELED = "CANCELED"

    class Kind(models.TextChoices):
        MESSAGE = "message"
        CALLBACK = "callback"
        FAILURE_CALLBACK = "failure callback"

    ENDING = ("state", "finished_at", "due_at", "claim_token", "claimed_by", "headers")
    RETRYING = ("state", "due_at", "retried", "claim_token", "claimed_by", "interruptions")
    MOST_INTERRUPTIONS = 5
    """Times an engine may die over a message before that counts as a failed attempt."""

    message_id = models.CharField(max_length=64, unique=True)
    kind = models.CharField(max_length=20, choices=Kind.choices, default=Kind.MESSAGE)
    source = models.ForeignKey(
        "self", models.SET_NULL, null=True, blank=True, related_name="callbacks"
    )
    """Whose attempt a callback tells of."""
    queue = models.ForeignKey(
        Queue, models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )

    url = models.TextField()
    method = models.CharField(max_length=10)
    headers = models.JSONField(default=dict)
    """As published, ``Upstash-*`` and all. Of those that hold keys only the names are left once
    the message is finished, unless it lies among the dead letters."""
    body = models.BinaryField(default=b"")
    retries = models.PositiveIntegerField()
    """After the first attempt."""
    timeout = models.FloatField()
    """Seconds per attempt."""
    labels = models.TextField(blank=True)
    """With commas between them."""
    flow_control_key = models.CharField(max_length=256, blank=True)
    caller_ip = models.CharField(max_length=64, blank=True)

    state = models.CharField(max_length=20, choices=State.choices, default=State.CREATED)
    created_at = models.DateTimeField()
    not_before = models.DateTimeField()
    due_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    retried = models.PositiveIntegerField(default=0)
    """What ``Upstash-Retried`` says at the next attempt: attempts that ended, so far."""
    claim_token = models.CharField(max_length=32, blank=True, editable=False)
    """Whoever writes down how the attempt ended must know it."""
    claimed_by = models.CharField(max_length=128, blank=True)
    interruptions = models.PositiveIntegerField(default=0)
    """Engines that died during this attempt."""

    objects = MessageQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(
                fields=["due_at"],
                name="qstash_server_due",
                condition=Q(due_at__isnull=False),
            ),
            models.Index(
                fields=["queue", "id"],
                name="qstash_server_line",
                condition=Q(finished_at__isnull=True, queue__isnull=False, due_at__isnull=True),
            ),
            models.Index(
                fields=["queue"],
                name="qstash_server_started",
                condition=Q(finished_at__isnull=True, queue__isnull=False, due_at__isnull=False),
            ),
            models.Index(
                fields=["source"],
                name="qstash_server_telling",
                condition=Q(due_at__isnull=False, source__isnull=False),
            ),
            models.Index(
                fields=["finished_at"],
                name="qstash_server_finished",
                condition=Q(finished_at__isnull=False),
            ),
            models.Index(
                fields=["claim_token"],
                name="qstash_server_claimed",
                condition=~Q(claim_token=""),
            ),
        ]

    def __str__(self) -> str:
        return self.message_id

    @classmethod
    def of(
        cls,
        message: WireMessage,
        *,
        now: datetime,
        message_id: str = "",
        caller_ip: str = "",
        queue: Queue | None = None,
        kind: Message.Kind = Kind.MESSAGE,
        source: Message | None = None,
    ) -> Message:
        options, settings = message.options, conf.current()
        not_before = now + timedelta(seconds=options.delay or 0)
        if options.not_before is not None:
            not_before = max(now, options.not_before)
        return cls(
            message_id=message_id or new_message_id(),
            kind=kind,
            source=source,
            queue=queue,
            url=message.destination,
            method=options.method,
            headers=admission.deliverable(message.to_headers()),
            body=message.body,
            retries=DEFAULT_RETRIES if options.retries is None else options.retries,
            timeout=min(options.timeout or settings.max_timeout, settings.max_timeout),
            labels=",".join(options.labels),
            flow_control_key=options.flow_control.key if options.flow_control else "",
            caller_ip=caller_ip,
            created_at=now,
            not_before=not_before,
            due_at=None if queue else not_before,
        )

    # --- what it says ------------------------------------------------------------------------

    @cached_property
    def wire(self) -> WireMessage:
        headers = {name.lower(): value for name, value in self.headers.items()}
        return WireMessage.from_headers(self.url, headers, bytes(self.body), self.queue_name)

    @property
    def queue_name(self) -> str:
        return self.queue.name if self.queue else ""

    @property
    def is_cancelling(self) -> bool:
        return self.state == self.State.CANCEL_REQUESTED

    @property
    def is_interrupted_for_good(self) -> bool:
        return self.interruptions >= self.MOST_INTERRUPTIONS

    @property
    def header(self) -> dict[str, list[str]]:
        """What the destination is told of the publisher's: name -> values."""
        options = self.wire.options
        own = {"Content-Type": [options.content_type]} if options.content_type else {}
        return own | _lists(options)

    def record_fields(self) -> dict[str, Any]:
        """The message as the read API tells it, without what it asked to hide."""
        wire, options = self.wire, self.wire.options
        flow, redact = options.flow_control, options.redact
        return {
            "message_id": self.message_id,
            "url": self.url,
            "method": self.method,
            "header": redaction.redacted_header(self.header, redact),
            "body": redaction.redacted_body(wire.body, redact),
            "max_retries": self.retries,
            "not_before": milliseconds(self.not_before),
            "created_at": milliseconds(self.created_at),
            "queue_name": self.queue_name,
            "callback": wire.callback,
            "failure_callback": wire.failure_callback,
            "callback_header": redaction.redacted_header(_lists(options.callback), redact),
            "failure_callback_header": redaction.redacted_header(
                _lists(options.failure_callback), redact
            ),
            "caller_ip": self.caller_ip,
            "labels": options.labels,
            "flow_control_key": self.flow_control_key,
            "rate": flow.rate if flow else None,
            "period": flow.period if flow else None,
            "parallelism": flow.parallelism if flow else None,
            "retry_delay": options.retry_delay,
            "timeout": options.timeout,
        }

    def to_record(self) -> MessageRecord:
        return MessageRecord(**self.record_fields())

    def log_details(self) -> dict[str, Any]:
        """What a log entry keeps of it: no body, no keys."""
        record = self.record_fields()
        names = ("method", "callback", "failure_callback", "max_retries", "retry_delay")
        details = {name: record[name] for name in (*names, "rate", "period", "parallelism")}
        details["header"] = redaction.without_secrets(record["header"])
        if self.wire.options.timeout:
            details["timeout"] = round(self.timeout * 1000)
        return {name: value for name, value in details.items() if value not in (None, "", {})}

    # --- what becomes of it ------------------------------------------------------------------

    def record(self, outcome: Outcome, *, now: datetime) -> bool:
        """Write down how the attempt ended, and whom to tell. All of it, or nothing.

        False when the claim was lost to another engine: then that one's word counts.
        """
        with transaction.atomic():
            # Locked: whoever takes the claim from us waits until this is written, or we for them.
            mine = Message.objects.filter(pk=self.pk, claim_token=self.claim_token or None)
            state = mine.select_for_update().values_list("state", flat=True).first()
            if state is None:
                return False
            if outcome.is_success:
                self._delivered(outcome, now)
            elif state == self.State.CANCEL_REQUESTED:
                self._canceled(outcome, now)
            elif outcome.forbids_retry or self.retried >= self.retries:
                self._failed(outcome, now)
            else:
                self._will_retry(outcome, now)
        return True

    def end(self, state: Message.State, *, now: datetime, keeps_secrets: bool = False) -> None:
        self.state, self.finished_at, self.due_at = state, now, None
        self.claim_token = self.claimed_by = ""
        if not keeps_secrets:
            self.headers = redaction.scrubbed(self.headers)

    def _delivered(self, outcome: Outcome, now: datetime) -> None:
        told = LogEntry.of(self, LogEntry.State.DELIVERED, now=now, outcome=outcome)
        self._tell(self._callback(outcome, self.Kind.CALLBACK, now), now, told)
        self.end(self.State.DELIVERED, now=now)
        self.save(update_fields=self.ENDING)

    def _canceled(self, outcome: Outcome, now: datetime) -> None:
        error = LogEntry.of(self, LogEntry.State.ERROR, now=now, outcome=outcome)
        self._tell([], now, error, LogEntry.of(self, LogEntry.State.CANCELED, now=now))
        self.end(self.State.CANCELED, now=now)
        self.save(update_fields=self.ENDING)

    def _will_retry(self, outcome: Outcome, now: datetime) -> None:
        wait = delay_before_retry(
            self.retried,
            status=outcome.status,
            headers=outcome.first_values,
            expression=self.wire.options.retry_delay,
            now=now.timestamp(),
        )
        due_at = now + timedelta(seconds=wait)
        state = LogEntry.State
        self._tell(
            self._callback(outcome, self.Kind.CALLBACK, now),
            now,
            LogEntry.of(self, state.ERROR, now=now, outcome=outcome, next_delivery_at=due_at),
            LogEntry.of(self, state.RETRY, now=now, next_delivery_at=due_at),
        )
        self.state, self.due_at, self.retried = self.State.RETRY, due_at, self.retried + 1
        self.claim_token, self.claimed_by, self.interruptions = "", "", 0
        self.save(update_fields=self.RETRYING)

    def _failed(self, outcome: Outcome, now: datetime) -> None:
        from .dead_letter import DeadLetter

        letter = DeadLetter.objects.create(
            message=self,
            created_at=now,
            response_status=outcome.status,
            response_header=redaction.without_secrets(outcome.header),
            response_body=outcome.body,
            error=outcome.error,
        )
        callbacks = self._callback(outcome, self.Kind.CALLBACK, now)
        callbacks += self._callback(outcome, self.Kind.FAILURE_CALLBACK, now, letter.dlq_id)
        self._tell(
            callbacks,
            now,
            LogEntry.of(self, LogEntry.State.ERROR, now=now, outcome=outcome),
            LogEntry.of(self, LogEntry.State.FAILED, now=now, outcome=outcome),
        )
        self.end(self.State.FAILED, now=now, keeps_secrets=True)
        self.save(update_fields=self.ENDING)

    def _tell(self, callbacks: list[Message], now: datetime, *entries: LogEntry) -> None:
        """Whoever asked, and the log: in the transaction that ends the attempt."""
        Message.objects.insert(callbacks, now=now, after=entries)

    def _callback(
        self, outcome: Outcome, kind: Message.Kind, now: datetime, dlq_id: str = ""
    ) -> list[Message]:
        """The message that tells of an attempt, if somebody asked for it."""
        wire, options = self.wire, self.wire.options
        url, how = wire.callback, options.callback
        if kind == self.Kind.FAILURE_CALLBACK:
            url, how = wire.failure_callback, options.failure_callback
        if not url:
            return []
        how = how or Options()
        callback = WireMessage(
            destination=url,
            body=self._envelope(outcome, dlq_id),
            options=dataclasses.replace(
                how,
                content_type="application/json",
                retries=self.retries if how.retries is None else how.retries,
            ),
        )
        return [Message.of(callback, now=now, kind=kind, source=self, caller_ip=self.caller_ip)]

    def _envelope(self, outcome: Outcome, dlq_id: str) -> bytes:
        shows_secrets = conf.current().source_header_secrets
        return Callback(
            status=outcome.status,
            header=outcome.header,
            body=outcome.body,
            retried=self.retried,
            max_retries=self.retries,
            source_message_id=self.message_id,
            url=self.url,
            method=self.method,
            source_header=self.header if shows_secrets else redaction.without_secrets(self.header),
            source_body=self.wire.body,
            not_before=milliseconds(self.not_before),
            created_at=milliseconds(self.created_at),
            caller_ip=self.caller_ip,
            dlq_id=dlq_id,
        ).to_json()

    def published_again(self, overrides: Mapping[str, str], *, now: datetime) -> Message:
        """The same once more under a new id: of a dead letter, whose secrets are still there."""
        headers = {name.lower(): value for name, value in self.headers.items()} | dict(overrides)
        kept = {name: value for name, value in headers.items() if name not in _NOT_REPEATED}
        wire = WireMessage.from_headers(self.url, kept, bytes(self.body), self.queue_name)
        admission.check(wire, now=now)
        message = Message.of(
            wire,
            now=now,
            caller_ip=self.caller_ip,
            queue=Queue.objects.named([wire.queue], now=now)[wire.queue] if wire.queue else None,
            kind=self.Kind(self.kind),
            source=self.source,
        )
        Message.objects.insert([message], now=now)
        return message

    def forget_secrets(self) -> None:
        self.headers = redaction.scrubbed(self.headers)
        self.save(update_fields=["headers"])


def new_message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _lists(options: Options | None) -> dict[str, list[str]]:
    return {name: [value] for name, value in options.headers.items()} if options else {}
