"""What a message waits for, and why, in words: of many messages in a constant number of queries."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from django.db.models import Max, OuterRef
from django.utils import formats, timezone
from django.utils.text import Truncator
from django.utils.translation import gettext as _

from .counting import CappedCount, in_words
from .models import FlowControlKey, Gate, LogEntry, Message

MOST_BEFORE = 1000
"""Beyond that many in a line it no longer matters how many exactly."""


def reasons(messages: Sequence[Message], *, now: datetime) -> dict[int, str]:
    """Primary key -> what it waits for; empty for what waits for nothing any more.

    Fetch the messages with their ``queue``.
    """
    unfinished = [message for message in messages if message.finished_at is None]
    known = _Known(unfinished, now)
    return {message.pk: "" for message in messages} | {
        message.pk: known.reason(message) for message in unfinished
    }


def at(moment: datetime, now: datetime) -> str:
    """The time of a day that is today's, else with its date."""
    local = timezone.localtime(moment)
    shown = local.strftime("%H:%M:%S")
    if local.date() == timezone.localtime(now).date():
        return shown
    return f"{formats.date_format(local, 'SHORT_DATE_FORMAT')} {shown}"


def excerpt(text: str, length: int = 200) -> str:
    return Truncator(" ".join(text.split())).chars(length)


def holder(identity: str) -> str:
    """An engine, as ``delivery.process_identity`` calls it: on which machine, which process."""
    machine, _colon, process = identity.partition(":")
    host, pid = machine.partition("/")[0], process.partition(":")[0]
    return _("%(host)s, process %(pid)s") % {"host": host, "pid": pid} if pid else identity


class _Known:
    """What else has to be known of some unfinished messages, fetched at once."""

    def __init__(self, messages: Sequence[Message], now: datetime) -> None:
        self.now = now
        Waits = Message.Waits
        in_line = [row.pk for row in messages if row.waits_for == Waits.QUEUE]
        gated = {
            row.flow_control_id
            for row in messages
            if row.flow_control_id and row.waits_for == Waits.FLOW_CONTROL
        }
        limited = {row.gate_id for row in messages if row.gate_id and row.waits_for == Waits.GATE}
        in_flight = [row.pk for row in messages if row.claim_token]
        self.before = _places_in_line(in_line) if in_line else {}
        self.keys = _keys(gated) if gated else {}
        self.gates = Gate.objects.in_bulk(limited) if limited else {}
        self.began = _beginnings(in_flight) if in_flight else {}

    def reason(self, message: Message) -> str:
        if message.claim_token:
            return self._in_flight(message)
        if message.queue is not None and message.queue.is_paused:
            return _("queue %(name)s is paused") % {"name": message.queue.name}
        if message.waits_for == Message.Waits.QUEUE:
            return self._in_line(message)
        if message.waits_for == Message.Waits.FLOW_CONTROL:
            return self._at_flow_control(message)
        if message.waits_for == Message.Waits.GATE:
            return self._at_gate(message)
        return self._until_a_time(message)

    def _in_flight(self, message: Message) -> str:
        began = self.began.get(message.pk)
        words = {"by": holder(message.claimed_by), "since": at(began, self.now) if began else "?"}
        if message.due_at is not None and message.due_at <= self.now:
            text = _("in flight since %(since)s, held by %(by)s, of whom nothing is heard")
        else:
            text = _("in flight since %(since)s, held by %(by)s")
        shown = text % words
        if message.state == Message.State.CANCEL_REQUESTED:
            return _("%(reason)s; not tried again: cancelled") % {"reason": shown}
        return shown

    def _in_line(self, message: Message) -> str:
        before = self.before.get(message.pk, 0)
        words = {"name": message.queue_name, "count": in_words(before, MOST_BEFORE)}
        if before:
            return _("turn in queue %(name)s, %(count)s before it") % words
        return _("turn in queue %(name)s, next") % words

    def _at_flow_control(self, message: Message) -> str:
        key = self.keys.get(message.flow_control_id or 0)
        if key is None:
            return _("flow control")
        words = {"key": key.key, "taken": key.parallelism_count, "most": key.parallelism}
        if key.is_paused:
            return _("flow control %(key)s is paused") % words
        if key.parallelism is not None and key.parallelism_count >= key.parallelism:
            return _("flow control %(key)s: %(taken)s of %(most)s in flight") % words
        if (
            key.rate is not None
            and key.window_ends_at is not None
            and key.is_window_open(self.now)
            and key.rate_count >= key.rate
        ):
            words |= {"taken": key.rate_count, "most": key.rate}
            words["at"] = at(key.window_ends_at, self.now)
            text = _("flow control %(key)s: %(taken)s of %(most)s started, next window %(at)s")
            return text % words
        return _("flow control %(key)s: there is room, an engine takes it next") % words

    def _at_gate(self, message: Message) -> str:
        gate = self.gates.get(message.gate_id or 0)
        if gate is None:
            return _("its provider's limits")
        words = {"gate": gate, "trouble": gate.trouble, "words": excerpt(gate.words)}
        words["at"] = at(gate.opens_at, self.now)
        if gate.is_paused and gate.trouble:
            return _("limits of %(gate)s: paused, %(trouble)s: %(words)s") % words
        if gate.is_paused:
            return _("limits of %(gate)s: paused") % words
        if gate.blocked_until > self.now:
            words["at"] = at(gate.blocked_until, self.now)
            text = _("limits of %(gate)s: refused (%(trouble)s: %(words)s), next try %(at)s")
            return text % words
        if gate.opens_at > self.now:
            return _("limits of %(gate)s: what is left is used up, next look %(at)s") % words
        return _("limits of %(gate)s: there is room, an engine takes it next") % words

    def _until_a_time(self, message: Message) -> str:
        if message.due_at is None:
            return ""
        words = {
            "at": at(message.due_at, self.now),
            "retried": message.retried,
            "retries": message.retries,
        }
        if message.due_at <= self.now:
            return _("an engine to take it: due since %(at)s") % words
        if message.retried:
            return _("retry %(retried)s of %(retries)s at %(at)s") % words
        return _("delayed until %(at)s") % words


def _places_in_line(pks: list[int]) -> dict[int, int]:
    line = Message.objects.in_line().filter(queue=OuterRef("queue"), pk__lt=OuterRef("pk"))
    rows = Message.objects.filter(pk__in=pks).order_by()
    return dict(rows.annotate(before=CappedCount(line, MOST_BEFORE)).values_list("pk", "before"))


def _keys(pks: set[int]) -> dict[int, FlowControlKey]:
    in_flight = CappedCount(Message.objects.claimed().filter(flow_control=OuterRef("pk")))
    keys = FlowControlKey.objects.filter(pk__in=pks).order_by()
    return {
        key.pk: key
        for key in keys.annotate(parallelism_count=in_flight)  # type: ignore[no-redef]
    }


def _beginnings(pks: list[int]) -> dict[int, datetime]:
    """When the attempts that are in flight began."""
    entries = LogEntry.objects.filter(message__in=pks, state=LogEntry.State.ACTIVE).order_by()
    return dict(entries.values_list("message").annotate(at=Max("time")))
