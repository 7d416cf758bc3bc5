from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, NamedTuple

from django.db import models, transaction
from django.db.models import Exists, OuterRef, Q, Subquery
from django.db.models.lookups import IsNull

from ...qstash import Accepted, MessageRecord, Options
from ...qstash import Message as WireMessage
from ...qstash.options import DEFAULT_RETRIES
from .. import admission, conf, doorbell, metering, redaction
from ..pacing import Charge
from . import claims, ending
from .chunks import in_chunks
from .deduplication import Deduplication, key_of
from .flow_control import FlowControlKey
from .gate import Begun, Gate
from .insertion import insert
from .log_entry import LogEntry, Told
from .queue import Queue, milliseconds

# What a message brought for its first time only.
_NOT_REPEATED = {
    "upstash-content-based-deduplication",
    "upstash-deduplication-id",
    "upstash-delay",
    "upstash-not-before",
}


SHORTEST_SECRET = 8
"""Characters of a header's value that is blacked out of foreign text."""


class Admitted(NamedTuple):
    """A message that ``admission`` let through, and where it comes from if not from a URL."""

    message: WireMessage
    topic_name: str = ""
    """The URL group's, if its destination is an endpoint of one."""
    endpoint_name: str = ""
    schedule_id: str = ""


class MessageQuerySet(models.QuerySet["Message"]):
    # --- kinds -------------------------------------------------------------------------------

    def owned_by(self, account: str) -> MessageQuerySet:
        return self.filter(account=account)

    def unfinished(self) -> MessageQuerySet:
        return self.filter(finished_at__isnull=True)

    def readable(self) -> MessageQuerySet:
        """What ``GET /v2/messages`` knows: the pending, and the finished for a while."""
        shown = self.exclude(state=Message.State.CANCELED).filter(is_purged=False)
        return shown.select_related("queue")

    def due(self, now: datetime) -> MessageQuerySet:
        return self.filter(due_at__lte=now).filter(_HELD_BY_NO_PAUSE)

    def is_anything_due(self, now: datetime) -> bool:
        # Ordered, so that a planner without fresh statistics takes the index, not the table.
        return bool(self.due(now).order_by("due_at", "pk").values_list("pk", flat=True)[:1])

    def waiting_for(self, what: Message.Waits) -> MessageQuerySet:
        return self.filter(waits_for=what)

    def in_line(self) -> MessageQuerySet:
        """In a queue and not begun."""
        return self.waiting_for(Message.Waits.QUEUE)

    def at_their_flow_control(self) -> MessageQuerySet:
        """Waiting for their flow-control key only: begun, where they are in a queue."""
        return self.waiting_for(Message.Waits.FLOW_CONTROL).filter(_HELD_BY_NO_PAUSE)

    def at_their_gate(self) -> MessageQuerySet:
        """Waiting for their provider's limits only."""
        return self.waiting_for(Message.Waits.GATE).filter(_HELD_BY_NO_PAUSE)

    def ungated(self) -> MessageQuerySet:
        """Which wait for nothing but their time."""
        return self.filter(flow_control__isnull=True, gate__isnull=True)

    def started(self) -> MessageQuerySet:
        """In a queue, begun, and not finished: each takes a place."""
        return self.unfinished().filter(~Q(waits_for=Message.Waits.QUEUE), queue__isnull=False)

    def waiting_for_their_callbacks(self) -> MessageQuerySet:
        """In a queue and finished, but their callbacks are not: each takes a place."""
        telling = Message.objects.unfinished().filter(source__isnull=False)
        return self.filter(
            queue__isnull=False, finished_at__isnull=False, pk__in=telling.values("source")
        )

    def claimed(self) -> MessageQuerySet:
        """In flight: an engine has them."""
        return self.exclude(claim_token="")

    def trusted(self) -> MessageQuerySet:
        """Over which no engines seem to die."""
        return self.filter(interruptions__lt=Message.SUSPECT_AFTER)

    def next_due_at(self) -> datetime | None:
        due = self.filter(due_at__isnull=False).filter(_HELD_BY_NO_PAUSE)
        # Not Min: over the join that is a look at every message that is due one day.
        return due.order_by("due_at").values_list("due_at", flat=True).first()

    def first_exists(self) -> IsNull:
        """A condition for a query around this one: that there is any.

        Not Exists: PostgreSQL makes a join of it, which looks at all of them to find one.
        """
        return IsNull(Subquery(self.order_by("pk").values("pk")[:1]), False)

    # --- in ----------------------------------------------------------------------------------

    def accept(
        self, admitted: Sequence[Admitted], *, account: str, caller_ip: str, now: datetime
    ) -> list[Accepted]:
        """Take messages that ``admission`` let through. All of them or, on an error, none."""
        ids = [new_message_id() for _ in admitted]
        keys = [key_of(each.message, account, each.topic_name) for each in admitted]
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
                (answer.message_id, each)
                for answer, each in zip(accepted, admitted, strict=True)
                if not answer.is_duplicate
            ]
            names = (each.message.queue for _, each in fresh if each.message.queue)
            queues = Queue.objects.named(names, account=account, now=now)
            self.insert(
                [
                    Message.of(
                        each.message,
                        message_id=message_id,
                        account=account,
                        caller_ip=caller_ip,
                        queue=queues.get(each.message.queue),
                        topic_name=each.topic_name,
                        endpoint_name=each.endpoint_name,
                        schedule_id=each.schedule_id,
                        now=now,
                    )
                    for message_id, each in fresh
                ],
                now=now,
            )
        return accepted

    def insert(
        self,
        rows: Sequence[Message],
        *,
        now: datetime,
        after: Sequence[Told] = (),
        adoption: claims.Adoption | None = None,
    ) -> list[Message]:
        """Store new messages and their log entries, ``after`` those that come first. Answers
        the rows that were adopted."""
        _send_to_flow_control(rows, now)
        _send_to_gates(rows, now)
        adopted = adoption.of(rows, now) if adoption else []
        insert(rows)
        state = LogEntry.State
        created = [LogEntry.of(row, state.CREATED, now=now) for row in rows]
        active = [LogEntry.of(row, state.ACTIVE, now=now) for row in adopted]
        LogEntry.objects.tell(*after, *created, *active)
        if len(rows) > len(adopted):
            wait = min((row.due_at - now).total_seconds() if row.due_at else 0.0 for row in rows)
            transaction.on_commit(lambda: doorbell.ring(wait), robust=True)
        return adopted

    # --- claims ------------------------------------------------------------------------------

    def claim(
        self,
        *,
        engine: str,
        limit: int,
        now: datetime,
        lease: float | None = None,
        takes_suspect: bool = True,
        most_bytes: int = claims.MOST_BYTES,
    ) -> list[Message]:
        """Take up to ``limit`` messages to deliver, and of bodies no more than ``most_bytes`` and
        the rest of the last one; nobody else will until the lease is over.

        ``lease``: seconds, for an engine that renews it. Without, it lasts as long as the
        longest of their timeouts. ``takes_suspect``: whether a message over which engines seem
        to die may be among them. Never two, or the innocent would be given up with the guilty.
        """
        return claims.Claim(
            self,
            engine=engine,
            limit=limit,
            now=now,
            lease=lease,
            takes_suspect=takes_suspect,
            most_bytes=most_bytes,
        ).run()

    def is_anything_to_do(self, now: datetime) -> bool:
        """Whether a claim would find something at this moment."""
        return claims.is_anything_to_do(self, now)

    def next_moment(self, now: datetime) -> datetime | None:
        """When a claim would next find something although nothing else happens."""
        return claims.next_moment(self, now)

    def renew(self, tokens: Iterable[str], *, until: datetime) -> None:
        """Say that the engine which holds these claims is alive."""
        held = self.claimed().filter(claim_token__in=set(tokens)).order_by("pk")
        with transaction.atomic():
            # Locked in everybody's order, as those lock them who cancel many.
            pks = list(held.select_for_update(of=("self",)).values_list("pk", flat=True))
            Message.objects.filter(pk__in=pks).update(due_at=until)

    def expire(self, *, now: datetime) -> int:
        """End the leases of engines that are no more. Whoever claims these next counts an
        interruption, as after any lease that nobody renewed."""
        return self.claimed().filter(due_at__gt=now).update(due_at=now)

    def release(self, *, now: datetime) -> int:
        """Let go of claims whose engine is going: they are due at once."""
        return self.claimed().update(
            state=claims.state_before_attempt(), claim_token="", claimed_by="", due_at=now
        )

    # --- out ---------------------------------------------------------------------------------

    def end(self, state: Message.State, *, now: datetime, keeps_secrets: bool = False) -> None:
        values: dict[str, Any] = {} if keeps_secrets else {"secrets": {}}
        self.update(
            state=state,
            finished_at=now,
            due_at=None,
            waits_for=Message.Waits.NOTHING,
            claim_token="",
            claimed_by="",
            **values,
        )

    def forget_secrets(self) -> None:
        self.update(secrets={})

    def cancel(self, *, now: datetime) -> int:
        """No further attempt. What is in flight may still arrive. Answers how many there were."""
        total, last = 0, 0
        while True:
            with transaction.atomic():
                rows = self.unfinished().exclude(state=Message.State.CANCEL_REQUESTED)
                rows = rows.filter(pk__gt=last).order_by("pk").defer("body")
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
        self.finish_cancelled([row for row in rows if row.pk not in set(in_flight)], now=now)

    def finish_cancelled(self, rows: list[Message], *, now: datetime) -> None:
        if not rows:
            return
        Message.objects.filter(pk__in=[row.pk for row in rows]).end(Message.State.CANCELED, now=now)
        canceled = LogEntry.State.CANCELED
        LogEntry.objects.tell(*(LogEntry.of(row, canceled, now=now) for row in rows))

    def purge(self, *, before: datetime, log_before: datetime, chunk: int = 500) -> bool:
        """Clear the bodies of what was finished before then, and delete what is so old that
        even its log is gone; a chunk at a time. What is still needed stays. Whether there may be
        more."""
        is_told_of = Exists(Message.objects.unfinished().filter(source=OuterRef("pk")))
        done = self.filter(~is_told_of, dead_letter__isnull=True).order_by("finished_at")
        are_bodies_left = in_chunks(
            done.filter(is_purged=False, finished_at__lt=before),
            chunk,
            lambda keys: Message.objects.filter(pk__in=keys).update(is_purged=True, body=b""),
        )
        are_rows_left = in_chunks(
            done.filter(is_purged=True, finished_at__lt=log_before),
            chunk,
            lambda keys: Message.objects.filter(pk__in=keys).delete(),
        )
        return are_bodies_left or are_rows_left


_HELD_BY_NO_PAUSE = Q(queue__isnull=True) | Q(queue__is_paused=False)


class Message(models.Model):
    """One thing to deliver: what somebody published, or a callback of ours.

    ``due_at`` is the heart: when something is to be done next. Deliver it, or, while it is
    active, take it from an engine that gave no sign of life. Nothing is to be done with what is
    finished, nor with what waits its turn, see ``waits_for``: there it is empty.
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

    class Waits(models.TextChoices):
        """For what a message waits besides the time."""

        NOTHING = ""
        QUEUE = "queue"
        FLOW_CONTROL = "flow control"
        GATE = "gate"

    RETRYING = (
        "state",
        "due_at",
        "waits_for",
        "retried",
        "retries",
        "claim_token",
        "claimed_by",
        "interruptions",
    )
    SUSPECT_AFTER = 2
    """Interruptions after which a message is delivered by itself, among those like it."""
    MOST_INTERRUPTIONS = 5
    """Times an engine may die over a message before that counts as a failed attempt."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
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
    """As published, ``Upstash-*`` and all, with ``REDACTED`` for the values that hold keys, and
    the fingerprints of those that it asks to hide."""
    secrets = models.JSONField(default=dict, blank=True, editable=False)
    """Those values. Gone once the message is finished, unless it lies among the dead letters."""
    body = models.BinaryField(default=b"")
    retries = models.PositiveIntegerField()
    """After the first attempt."""
    timeout = models.FloatField()
    """Seconds per attempt."""
    labels = models.TextField(blank=True)
    """With commas between them."""
    flow_control_key = models.CharField(max_length=256, blank=True)
    flow_control = models.ForeignKey(
        FlowControlKey, models.SET_NULL, null=True, blank=True, related_name="+", db_index=False
    )
    gate = models.ForeignKey(
        Gate, models.SET_NULL, null=True, blank=True, related_name="+", db_index=False
    )
    """The provider's limits that it counts against; none for what asks no model."""
    charge_input = models.PositiveIntegerField(default=0)
    charge_output = models.PositiveIntegerField(default=0)
    """Tokens it is taken to cost there: of the body, and of the answer at most."""
    topic_name = models.CharField(max_length=256, blank=True, default="")
    """The URL group it was published to, and which of its endpoints this is."""
    endpoint_name = models.CharField(max_length=256, blank=True, default="")
    schedule_id = models.CharField(max_length=256, blank=True, default="")
    caller_ip = models.CharField(max_length=64, blank=True)

    state = models.CharField(max_length=20, choices=State.choices, default=State.CREATED)
    created_at = models.DateTimeField()
    not_before = models.DateTimeField()
    due_at = models.DateTimeField(null=True, blank=True)
    waits_for = models.CharField(
        max_length=12, choices=Waits.choices, blank=True, default=Waits.NOTHING
    )
    finished_at = models.DateTimeField(null=True, blank=True)
    is_purged = models.BooleanField(default=False, editable=False)
    """Finished so long ago that its body is gone: it is there for its log only."""
    retried = models.PositiveIntegerField(default=0)
    """What ``Upstash-Retried`` says at the next attempt: attempts that ended, so far."""
    claim_token = models.CharField(max_length=32, blank=True, editable=False)
    """Whoever writes down how the attempt ended must know it."""
    claimed_by = models.CharField(max_length=128, blank=True)
    claimed_at = models.DateTimeField(null=True, blank=True)
    """When the attempt that is in flight, or was last, began."""
    interruptions = models.PositiveIntegerField(default=0)
    """Engines that died during this attempt."""

    objects = MessageQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(
                fields=["due_at", "id"],
                name="qstash_server_due",
                condition=Q(due_at__isnull=False),
            ),
            models.Index(
                fields=["due_at", "id"],
                name="qstash_server_due_gated",
                condition=Q(due_at__isnull=False, flow_control__isnull=False),
            ),
            models.Index(
                fields=["due_at", "id"],
                name="qstash_server_suspect",
                condition=Q(due_at__isnull=False, interruptions__gte=2),
            ),
            models.Index(
                fields=["queue", "id"],
                name="qstash_server_line",
                condition=Q(waits_for="queue"),
            ),
            models.Index(
                fields=["flow_control", "id"],
                name="qstash_server_at_key",
                condition=Q(waits_for="flow control"),
            ),
            models.Index(
                fields=["flow_control"],
                name="qstash_server_in_flight",
                condition=~Q(claim_token="") & Q(flow_control__isnull=False),
            ),
            models.Index(
                fields=["due_at", "id"],
                name="qstash_server_due_at_gate",
                condition=Q(due_at__isnull=False, gate__isnull=False),
            ),
            models.Index(
                fields=["gate", "id"],
                name="qstash_server_at_gate",
                condition=Q(waits_for="gate"),
            ),
            models.Index(
                fields=["gate", "claimed_at"],
                name="qstash_server_past_gate",
                condition=~Q(claim_token="") & Q(gate__isnull=False),
            ),
            models.Index(
                fields=["queue"],
                name="qstash_server_started",
                condition=~Q(waits_for="queue") & Q(finished_at__isnull=True, queue__isnull=False),
            ),
            models.Index(
                fields=["source"],
                name="qstash_server_telling",
                condition=Q(finished_at__isnull=True, source__isnull=False),
            ),
            models.Index(
                fields=["is_purged", "finished_at"],
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
        account: str = "",
        message_id: str = "",
        caller_ip: str = "",
        queue: Queue | None = None,
        kind: Message.Kind = Kind.MESSAGE,
        source: Message | None = None,
        topic_name: str = "",
        endpoint_name: str = "",
        schedule_id: str = "",
    ) -> Message:
        options, settings = message.options, conf.current()
        not_before = now + timedelta(seconds=options.delay or 0)
        if options.not_before is not None:
            not_before = max(now, options.not_before)
        message = admission.deliverable(message)
        headers, secrets = redaction.parted(message.to_headers())
        row = cls(
            account=account,
            message_id=message_id or new_message_id(),
            kind=kind,
            source=source,
            queue=queue,
            url=message.destination,
            method=options.method,
            headers=headers,
            secrets=secrets,
            body=message.body,
            retries=_retries_of(options),
            timeout=min(options.timeout or settings.max_timeout, settings.max_timeout),
            labels=",".join(options.labels),
            flow_control_key=options.flow_control.key if options.flow_control else "",
            topic_name=topic_name,
            endpoint_name=endpoint_name,
            schedule_id=schedule_id,
            caller_ip=caller_ip,
            created_at=now,
            not_before=not_before,
            due_at=None if queue else not_before,
            waits_for=cls.Waits.QUEUE if queue else cls.Waits.NOTHING,
        )
        # What its columns would be read back to.
        row.wire = message
        return row

    # --- what it says ------------------------------------------------------------------------

    @cached_property
    def wire(self) -> WireMessage:
        """As it was published, but for the body, which is large and a column by itself."""
        headers = {name.lower(): value for name, value in self.wire_headers.items()}
        return WireMessage.from_headers(self.url, headers, b"", self.queue_name)

    @property
    def wire_headers(self) -> dict[str, str]:
        return {**self.headers, **self.secrets}

    @property
    def published_retries(self) -> int:
        """Before its provider's refusals added to them."""
        return _retries_of(self.wire.options)

    @property
    def queue_name(self) -> str:
        return self.queue.name if self.queue else ""

    @property
    def is_cancelling(self) -> bool:
        return self.state == self.State.CANCEL_REQUESTED

    @property
    def is_suspect(self) -> bool:
        return self.interruptions >= self.SUSPECT_AFTER

    @property
    def is_interrupted_for_good(self) -> bool:
        return self.interruptions >= self.MOST_INTERRUPTIONS

    begun: Begun | None = None
    """Of a message that an engine has: how its attempt began, as its gate counts."""

    @property
    def charge(self) -> Charge:
        return Charge(float(self.charge_input), float(self.charge_output))

    def without_credentials(self, text: str) -> str:
        """``text`` of a provider, which may repeat the key that it refuses."""
        for value in self.wire.options.headers.values():
            for secret in {value, value.rpartition(" ")[2]}:
                if len(secret) >= SHORTEST_SECRET:
                    text = text.replace(secret, redaction.HIDDEN)
        return text

    @cached_property
    def header(self) -> dict[str, list[str]]:
        """What the destination is told of the publisher's: name -> values."""
        return _header(self.wire.options)

    @property
    def shown_header(self) -> dict[str, list[str]]:
        """The same as anybody may see it: keys are ``REDACTED``, and what the message asks to hide
        is its fingerprint."""
        return redaction.redacted_header(_header(self._shown), self.wire.options.redact)

    @cached_property
    def _shown(self) -> Options:
        if not self.secrets:
            return self.wire.options
        return Options.from_headers({name.lower(): value for name, value in self.headers.items()})

    def record_fields(self) -> dict[str, Any]:
        """The message as the read API tells it to its owner, without what it asked to hide. Keys are
        told for as long as they are kept: until it is finished, and while it is a dead letter."""
        return self._fields(shows_keys=True) | {"body": self.shown_body}

    @property
    def shown_body(self) -> bytes:
        body, redact = bytes(self.body), self.wire.options.redact
        if self.kind != self.Kind.MESSAGE:
            body = redaction.redacted_envelope(body, redact)
        return redaction.redacted_body(body, redact)

    @cached_property
    def log_fields(self) -> dict[str, Any]:
        """What its log entries tell of it: no body, no keys."""
        fields = self._fields(shows_keys=False)
        for name in ("not_before", "created_at", "caller_ip"):
            del fields[name]
        fields["timeout"] = round(self.timeout * 1000) if self.wire.options.timeout else None
        return fields

    def _fields(self, *, shows_keys: bool) -> dict[str, Any]:
        wire, options = self.wire, self.wire.options
        flow, told = options.flow_control, options if shows_keys else self._shown
        header, callback_header, failure_callback_header = (
            redaction.redacted_header(each, options.redact, shows_keys=shows_keys)
            for each in (_header(told), _lists(told.callback), _lists(told.failure_callback))
        )
        return {
            "message_id": self.message_id,
            "url": self.url,
            "method": self.method,
            "header": header,
            "max_retries": self.retries,
            "not_before": milliseconds(self.not_before),
            "created_at": milliseconds(self.created_at),
            "queue_name": self.queue_name,
            "topic_name": self.topic_name,
            "endpoint_name": self.endpoint_name,
            "schedule_id": self.schedule_id,
            "callback": wire.callback,
            "failure_callback": wire.failure_callback,
            "callback_header": callback_header,
            "failure_callback_header": failure_callback_header,
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

    # --- what becomes of it ------------------------------------------------------------------

    def record(self, outcome: ending.Outcome, *, now: datetime) -> bool:
        """Write down how the attempt ended, and whom to tell. All of it, or nothing.

        False when the claim was lost to another engine: then that one's word counts.
        """
        return not ending.record([(self, outcome)], now=now).lost

    def retried_at(self, due_at: datetime, *, now: datetime) -> Message:
        """This message as it waits for its next attempt. A copy: the engine keeps its own until
        this is written down."""
        message = copy(self)
        message.state, message.due_at, message.retried = self.State.RETRY, due_at, self.retried + 1
        message.claim_token, message.claimed_by, message.interruptions = "", "", 0
        message.begun = None
        if self.gate_id is not None and due_at <= now:
            message.due_at, message.waits_for = None, self.Waits.GATE
        return message

    def with_retries(self, retries: int) -> Message:
        """This attempt of it, as one of so many."""
        message = copy(self)
        message.retries = retries
        return message

    def refused_at(self, now: datetime) -> Message:
        """The same after a refusal that time alone cures: it goes back to its gate, and one retry is
        added for the one that this took, which the wire has to see."""
        message = self.retried_at(now, now=now)
        message.retries += 1
        return message

    def published_again(self, overrides: Mapping[str, str], *, now: datetime) -> Accepted:
        """The same once more under a new id: of a dead letter, whose secrets are still there.

        A duplicate is not: what ``overrides`` call it may stand for another message.
        """
        headers = {name.lower(): value for name, value in self.wire_headers.items()}
        kept = {name: value for name, value in headers.items() if name not in _NOT_REPEATED}
        wire = WireMessage.from_headers(
            self.url, {**kept, **overrides}, bytes(self.body), self.queue_name
        )
        admission.check(wire, now=now)
        message_id = new_message_id()
        if key := key_of(wire, self.account, self.topic_name):
            holder = Deduplication.objects.claim({key: message_id}, now=now)[key]
            if holder != message_id:
                return Accepted(holder, is_duplicate=True)
        names = [wire.queue] if wire.queue else []
        message = Message.of(
            wire,
            now=now,
            message_id=message_id,
            account=self.account,
            caller_ip=self.caller_ip,
            queue=Queue.objects.named(names, account=self.account, now=now).get(wire.queue),
            kind=self.Kind(self.kind),
            source=self._source_outside_queues(),
            topic_name=self.topic_name,
            endpoint_name=self.endpoint_name,
            schedule_id=self.schedule_id,
        )
        Message.objects.insert([message], now=now)
        return Accepted(message_id)

    def _source_outside_queues(self) -> Message | None:
        """A queue that has moved on is not to wait for a callback once more."""
        if self.source_id is None:
            return None
        rows = Message.objects.filter(pk=self.source_id, queue__isnull=True)
        return rows.only("pk").first()


def _send_to_flow_control(rows: Sequence[Message], now: datetime) -> None:
    """New messages that bring a flow-control key wait there, those of them that could start."""
    # In order, since keys may be locked: in everybody's.
    for account in sorted({row.account for row in rows if row.flow_control_key}):
        mine = [row for row in rows if row.account == account and row.flow_control_key]
        values = [row.wire.options.flow_control for row in mine]
        keys = FlowControlKey.objects.brought(filter(None, values), account=account, now=now)
        for row in mine:
            row.flow_control = keys[row.flow_control_key]
            if row.due_at is not None and row.due_at <= now:
                row.due_at, row.waits_for = None, Message.Waits.FLOW_CONTROL


def _send_to_gates(rows: Sequence[Message], now: datetime) -> None:
    """New messages that ask a model wait for its provider's limits, those of them that could start."""
    published = [row for row in rows if row.kind == Message.Kind.MESSAGE]
    metered = [(row, metering.meter(row.wire)) for row in published]
    for account in sorted({row.account for row, found in metered if found}):
        mine = [(row, found) for row, found in metered if found and row.account == account]
        subjects = {found.subject for _, found in mine}
        gates = Gate.objects.of(subjects, account=account, now=now)
        for row, found in mine:
            row.gate = gates.get(found.subject)
            row.charge_input = int(found.charge.input_tokens)
            row.charge_output = int(found.charge.output_tokens)
            if row.gate and row.due_at is not None and row.due_at <= now:
                row.due_at, row.waits_for = None, Message.Waits.GATE


def new_message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _retries_of(options: Options) -> int:
    return DEFAULT_RETRIES if options.retries is None else options.retries


def _header(options: Options) -> dict[str, list[str]]:
    own = {"Content-Type": [options.content_type]} if options.content_type else {}
    return own | _lists(options)


def _lists(options: Options | None) -> dict[str, list[str]]:
    return {name: [value] for name, value in options.headers.items()} if options else {}
