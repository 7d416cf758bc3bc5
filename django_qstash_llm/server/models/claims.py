"""Claims: which messages an engine delivers next, and that no other does.

What is due is found by ``due_at``. What waits its turn, in a queue's line, at a flow-control key or
at the gate of a provider's limits, is not in that index at all, however many there are: there the
queue, the key or the gate is asked whether it has room, and then for its first.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from django.db import models, transaction
from django.db.models import Case, F, Value, When
from django.db.models.functions import Length

from .. import conf
from ..pacing import Charge
from .chunks import within
from .flow_control import FlowControlKey
from .gate import Gate
from .log_entry import LogEntry
from .queue import Queue

if TYPE_CHECKING:
    from .message import Message, MessageQuerySet

Rows = TypeVar("Rows", bound="models.QuerySet[Any]")

# As ``Message.Waits`` calls them.
FLOW_CONTROL, GATE = "flow control", "gate"
MOST_TO_GATE = 1000
"""Due messages that are sent to wait at their flow-control keys, or gates, at a time."""
MOST_AT_A_GLANCE = 200
"""Queues, keys, and gates, that are looked at per claim."""
MOST_BYTES = 32 * 1024 * 1024
"""Of bodies that one claim reads, and what is over this of the last of them."""


@dataclass(frozen=True)
class Adoption:
    """An engine's offer to take new messages as they are stored, instead of claiming them after."""

    engine: str
    until: datetime
    room: int
    most_bytes: int
    """Of bodies. As with a claim, the last may be over that."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def of(self, rows: Sequence[Message], now: datetime) -> list[Message]:
        """Those of these new rows that it takes: they are stored as claimed."""
        from .message import Message

        free = [row for row in rows if row.due_at is not None and row.due_at <= now]
        adopted = within(free[: self.room], self.most_bytes, size=lambda row: len(row.body))
        for row in adopted:
            row.state, row.due_at = Message.State.ACTIVE, self.until
            row.claim_token, row.claimed_by = self.token, self.engine
        return adopted


class Claim:
    """One go at taking messages for an engine: up to ``limit``, until ``lease`` is over.

    Bodies may be large, so how large is asked first, and no more are read than ``most_bytes``
    hold, but for what the last of them is over it.
    """

    def __init__(
        self,
        messages: MessageQuerySet,
        *,
        engine: str,
        limit: int,
        now: datetime,
        lease: float | None,
        takes_suspect: bool,
        most_bytes: int,
    ) -> None:
        self.messages, self.engine, self.now, self.lease = messages, engine, now, lease
        self.left, self.bytes_left, self.takes_suspect = limit, most_bytes, takes_suspect
        self.taken: list[Message] = []

    def run(self) -> list[Message]:
        # A look first, each time: on SQLite a transaction locks out every writer.
        is_anything_due = self.messages.is_anything_due(self.now)
        if is_anything_due:
            self._send_due_to_gate()
            if self.takes_suspect:
                self._take_suspect()
        queues = self._pks(_queues_with_room(self.messages))
        keys = self._pks(_keys_with_room(self.messages, self.now))
        gates = self._pks(_gates_with_room(self.messages, self.now))
        # What is due may be without end. Half is for those whose turn it is.
        reserved = self.left // 2 if queues or keys or gates else 0
        if is_anything_due:
            reserved_bytes = self.bytes_left // 2 if reserved else 0
            self.bytes_left -= reserved_bytes
            self._take_due(self.left - reserved)
            self.bytes_left += reserved_bytes
        if queues and self.has_room:
            most = max(1, self.left // 2) if keys or gates else self.left
            if self._begin_lines(queues, most):
                keys = self._pks(_keys_with_room(self.messages, self.now))
                gates = self._pks(_gates_with_room(self.messages, self.now))
        # Those at gates have been let through by their keys before: they are older.
        if gates and self.has_room:
            self._take_from_gates(gates, max(1, self.left // 2) if keys else self.left)
        if keys and self.has_room:
            self._take_from_keys(keys)
        if is_anything_due and reserved and self.has_room:
            self._take_due(self.left)
        return self.taken

    @property
    def has_room(self) -> bool:
        return self.left > 0 and self.bytes_left > 0

    def _pks(self, rows: models.QuerySet[Any]) -> list[int]:
        pks = list(rows.order_by().values_list("pk", flat=True))
        # Any of them, so that none is always behind the same others.
        return random.sample(pks, min(len(pks), MOST_AT_A_GLANCE))

    def _take_due(self, most: int) -> None:
        due = self.messages.trusted().due(self.now).order_by("due_at", "pk")
        with transaction.atomic():
            self._take(_locked(due.ungated(), most))

    def _send_due_to_gate(self) -> None:
        for what in ("flow_control", "gate"):
            gated = self.messages.filter(**{f"{what}__isnull": False})
            if gated.is_anything_due(self.now):
                due = gated.due(self.now).order_by("due_at", "pk")
                with transaction.atomic():
                    self._send_to_gate(_locked(due, MOST_TO_GATE))

    def _take_suspect(self) -> None:
        """One of those over which engines seem to die."""
        from .message import Message

        suspects = self.messages.filter(interruptions__gte=Message.SUSPECT_AFTER)
        if suspects.is_anything_due(self.now):
            due = suspects.due(self.now).order_by("due_at", "pk")
            with transaction.atomic():
                self._take(_locked(due, 1))

    def _begin_lines(self, queues: Sequence[int], most: int) -> bool:
        """Let those step out of their queue's line whose turn it is. Whether some of them go on to
        wait for something else."""
        with transaction.atomic():
            # no_key: whoever enqueues at this moment need not wait for us. Skipped are the queues
            # that another engine looks after at this moment.
            rows = Queue.objects.filter(pk__in=queues).order_by("pk")
            firsts: list[Locked] = []
            for queue in rows.select_for_update(no_key=True, skip_locked=True):
                line = queue.mine.in_line().order_by("pk")
                room = min(queue.room(), most)
                # The lock is for those who cancel. What they hold is not waited for: they may wait
                # for a queue that we hold.
                firsts += _locked(line, room)
            gated = [each for each in firsts if each.is_gated]
            self._send_to_gate(gated)
            self._take([each for each in firsts if not each.is_gated][:most])
        return bool(gated)

    def _take_from_keys(self, keys: Sequence[int]) -> None:
        with transaction.atomic():
            rows = FlowControlKey.objects.filter(pk__in=keys).order_by("pk")
            firsts: list[Locked] = []
            held = {}
            for key in rows.select_for_update(no_key=True, skip_locked=True):
                room = min(key.room(self.now), self.left - len(firsts))
                if room > 0:
                    held[key.pk] = key
                    waiting = key.mine.at_their_flow_control().order_by("pk")
                    firsts += _locked(waiting, room)
            gates = Gate.objects.locked(each.gate for each in firsts if each.gate)
            self._count(self._take(self._let_through(firsts, gates), gates), held)

    def _take_from_gates(self, gates: Sequence[int], most: int) -> None:
        with transaction.atomic():
            held = Gate.objects.locked(gates)
            firsts: list[Locked] = []
            for gate in held.values():
                room = min(gate.free(self.now), most - len(firsts))
                if room > 0:
                    firsts += _locked(self._next_at(gate), room)
            keys = self._keys_of(firsts)
            passing = self._let_through(self._with_room_at(keys, firsts), held)
            self._count(self._take(passing, held), keys)

    def _next_at(self, gate: Gate) -> MessageQuerySet:
        """In their order. But whoever finds out whether a provider is back may lose a retry by it:
        that is not to be the same one each time."""
        waiting = gate.mine.at_their_gate().order_by("pk")
        if not self.takes_suspect:
            # They would take the places of those behind them.
            waiting = waiting.trusted()
        if gate.finds_out_whether_it_is_back:
            firsts = waiting.values_list("retried", "pk")[:MOST_AT_A_GLANCE]
            waiting = waiting.filter(pk=min(firsts, default=(0, 0))[1])
        return waiting

    def _keys_of(self, firsts: Sequence[Locked]) -> dict[int, FlowControlKey]:
        pks = {each.flow_control for each in firsts if each.flow_control}
        if not pks:
            return {}
        rows = FlowControlKey.objects.filter(pk__in=pks).order_by("pk")
        return {key.pk: key for key in rows.select_for_update(no_key=True, skip_locked=True)}

    def _with_room_at(
        self, keys: Mapping[int, FlowControlKey], firsts: Sequence[Locked]
    ) -> list[Locked]:
        """Those whose flow-control key has room too. The others wait there, and nobody behind them
        for them."""
        rooms = {pk: key.room(self.now) for pk, key in keys.items()}
        passing, waiting = [], []
        for each in firsts:
            if each.flow_control is None:
                passing.append(each)
            elif rooms.get(each.flow_control, 0) > 0:
                rooms[each.flow_control] -= 1
                passing.append(each)
            elif each.flow_control in rooms:
                waiting.append(each)
        self._wait(waiting, FLOW_CONTROL)
        return passing

    def _let_through(self, firsts: Sequence[Locked], gates: Mapping[int, Gate]) -> list[Locked]:
        """Those whose gate lets them. The others wait at it, and nobody behind them for them."""
        passing = [each for each in firsts if each.gate is None]
        waiting = []
        for pk, gate in gates.items():
            mine = [each for each in firsts if each.gate == pk]
            count = gate.fitting([each.charge for each in mine], self.now)
            passing += mine[:count]
            waiting += mine[count:]
        self._wait(waiting, GATE)
        return passing

    def _wait(self, rows: Sequence[Locked], what: str) -> None:
        from .message import Message

        if rows:
            Message.objects.filter(pk__in=[each.pk for each in rows]).update(waits_for=what)

    def _count(self, taken: Sequence[Message], keys: Mapping[int, FlowControlKey]) -> None:
        started = Counter(row.flow_control_id for row in taken)
        for pk, key in keys.items():
            if started[pk]:
                key.count(started[pk], now=self.now)

    def _send_to_gate(self, locked: Sequence[Locked]) -> None:
        """From here on they wait for their flow-control key, or the gate of their provider's limits,
        and cost nothing while they do."""
        from .message import Message

        if not locked:
            return
        rows = Message.objects.filter(pk__in=[each.pk for each in locked]).defer("body")
        waiting = [row for row in rows if not row.is_cancelling]
        self.messages.finish_cancelled([row for row in rows if row.is_cancelling], now=self.now)
        if not waiting:
            return
        Message.objects.filter(pk__in=[row.pk for row in waiting]).update(
            interruptions=_interruptions(),
            state=state_before_attempt(),
            waits_for=Case(
                When(flow_control__isnull=False, then=Value(FLOW_CONTROL)),
                default=Value(GATE),
            ),
            due_at=None,
            claim_token="",
            claimed_by="",
        )

    def _take(
        self, locked: Sequence[Locked], gates: Mapping[int, Gate] = MappingProxyType({})
    ) -> list[Message]:
        """Mark them as the engine's, as many as there is room for their bodies, and count them at
        their ``gates``, which are locked. A cancelled one whose engine died is only finished."""

        fitting = [each.pk for each in within(locked, self.bytes_left, size=lambda one: one.size)]
        taken = self._mark(fitting) if fitting else []
        for pk, gate in gates.items():
            gate.begin([row for row in taken if row.gate_id == pk], now=self.now)
            gate.look(now=self.now)
            gate.store(now=self.now)
        return taken

    def _mark(self, fitting: Sequence[int]) -> list[Message]:
        from .message import Message

        found = Message.objects.select_related("queue").in_bulk(fitting)
        rows = [found[pk] for pk in fitting]
        taken = [row for row in rows if not row.is_cancelling and self._may_take(row)]
        self.messages.finish_cancelled([row for row in rows if row.is_cancelling], now=self.now)
        if not taken:
            return []
        settings = conf.current()
        seconds = self.lease or max(row.timeout for row in taken) + settings.lease
        token, until = uuid.uuid4().hex, self.now + timedelta(seconds=seconds)
        Message.objects.filter(pk__in=[row.pk for row in taken]).update(
            interruptions=_interruptions(),
            state=Message.State.ACTIVE,
            waits_for=Message.Waits.NOTHING,
            claim_token=token,
            claimed_by=self.engine,
            claimed_at=self.now,
            due_at=until,
        )
        for row in taken:
            row.interruptions += row.state == Message.State.ACTIVE
            row.state, row.claim_token, row.due_at = Message.State.ACTIVE, token, until
            row.waits_for, row.claimed_at = Message.Waits.NOTHING, self.now
        active = LogEntry.State.ACTIVE
        LogEntry.objects.tell(*(LogEntry.of(row, active, now=self.now) for row in taken))
        self.taken += taken
        self.left -= len(taken)
        self.bytes_left -= sum(len(row.body) for row in taken)
        return taken

    def _may_take(self, row: Message) -> bool:
        if not row.is_suspect:
            return True
        may, self.takes_suspect = self.takes_suspect, False
        return may


class Locked(NamedTuple):
    """A message that nobody else takes in this transaction, and is not read yet."""

    pk: int
    size: int
    """Of its body."""
    flow_control: int | None
    gate: int | None
    charge: Charge

    @property
    def is_gated(self) -> bool:
        return bool(self.flow_control or self.gate)


def _locked(rows: MessageQuerySet, limit: int) -> list[Locked]:
    locked = rows.select_for_update(skip_locked=True, of=("self",))
    columns = ("flow_control", "gate", "charge_input", "charge_output")
    found = locked.values_list("pk", Length("body"), *columns)[:limit]
    return [
        Locked(pk, size, key, gate, Charge(float(asked), float(answered)))
        for pk, size, key, gate, asked, answered in found
    ]


def _interruptions() -> Case:
    """Still active and yet due: the engine that had it is no more."""
    from .message import Message

    return Case(
        When(state=Message.State.ACTIVE, then=F("interruptions") + 1),
        default=F("interruptions"),
        output_field=models.PositiveIntegerField(),
    )


def state_before_attempt() -> Case:
    from .message import Message

    return Case(
        When(state=Message.State.CANCEL_REQUESTED, then=F("state")),
        When(retried__gt=0, then=Value(Message.State.RETRY)),
        default=Value(Message.State.CREATED),
        output_field=models.CharField(),
    )


def is_anything_to_do(messages: MessageQuerySet, now: datetime) -> bool:
    """Whether a claim would find something at this moment."""
    return (
        messages.is_anything_due(now)
        or _queues_with_room(messages).exists()
        or _keys_with_room(messages, now).exists()
        or _gates_with_room(messages, now).exists()
    )


# Both are long queries, and most of the time nobody waits there at all. Where somebody does, they are
# asked of few rows: of all of a table PostgreSQL thinks them so dear that it compiles them, each time.


def _queues_with_room(messages: MessageQuerySet) -> models.QuerySet[Queue]:
    in_line = messages.in_line().order_by("queue_id", "pk").values_list("pk", flat=True)
    if not in_line[:1]:
        return Queue.objects.none()
    waited_for = Queue.objects.waited_for().order_by().values_list("pk", flat=True)
    few = waited_for[: MOST_AT_A_GLANCE + 1]
    return _among(Queue.objects.all(), few).with_room()


def _keys_with_room(messages: MessageQuerySet, now: datetime) -> models.QuerySet[FlowControlKey]:
    gated = messages.at_their_flow_control().order_by("flow_control_id", "pk")
    if not gated.values_list("pk", flat=True)[:1]:
        return FlowControlKey.objects.none()
    waited_for = FlowControlKey.objects.waited_for().order_by().values_list("pk", flat=True)
    few = waited_for[: MOST_AT_A_GLANCE + 1]
    return _among(FlowControlKey.objects.all(), few).with_room(now)


def _gates_with_room(messages: MessageQuerySet, now: datetime) -> models.QuerySet[Gate]:
    gated = messages.at_their_gate().order_by("gate_id", "pk")
    if not gated.values_list("pk", flat=True)[:1]:
        return Gate.objects.none()
    if not conf.current().gates:
        # Switched off, they hold nobody.
        return Gate.objects.waited_at()
    return Gate.objects.with_room(now)


def _among(rows: Rows, few: Iterable[int]) -> Rows:
    """``rows`` by these keys, or all of them where they are many."""
    keys = list(few)
    return rows.filter(pk__in=keys) if len(keys) <= MOST_AT_A_GLANCE else rows


def next_moment(messages: MessageQuerySet, now: datetime) -> datetime | None:
    """When a claim would next find something although nothing else happens; None for never."""
    moments = (
        messages.next_due_at(),
        FlowControlKey.objects.next_window_at(now),
        Gate.objects.next_opening_at(now),
    )
    return min((moment for moment in moments if moment is not None), default=None)
