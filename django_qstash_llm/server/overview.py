"""All that goes on at one moment, short enough for one page: the same few queries always, none of
which grows with what is stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import F, QuerySet
from django.utils.html import format_html
from django.utils.safestring import SafeString

from .console import without_query
from .counting import capped, gates_with_counts, in_words, keys_with_counts, queues_with_lag
from .models import DeadLetter, FlowControlKey, Gate, LogEntry, Message, Queue
from .waiting import at, excerpt, reasons

MOST_ROWS = 50
MOST_OF_A_KIND = 10
"""Messages that wait for one and the same kind of thing; dead letters."""
MOST_ENTRIES = 20
"""Of the log."""
LONGEST_TEXT = 300
DEFAULT = "default"
"""What the account is called that has no name: the settings' own."""
_SIGNS = {
    "CREATED": "○",
    "ACTIVE": "◐",
    "RETRY": "↻",
    "ERROR": "✕",
    "DELIVERED": "✓",
    "FAILED": "✕",
    "CANCEL_REQUESTED": "⊘",
    "CANCELED": "⊘",
}


@dataclass(frozen=True)
class Figure:
    label: str
    count: str


@dataclass(frozen=True)
class Table:
    ident: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    nothing: str
    """What is said when there are no rows."""
    more: str = ""
    """What is said of those that are not shown."""


@dataclass(frozen=True)
class Overview:
    figures: list[Figure]
    tables: list[Table]


def overview(now: datetime) -> Overview:
    kinds = _waiting_kinds()
    delivered = Message.objects.filter(finished_at__isnull=False, state=Message.State.DELIVERED)
    claimed = Message.objects.claimed().order_by("claim_token")
    figures = [
        Figure("in flight", in_words(capped(claimed))),
        Figure("waiting", in_words(sum(map(capped, kinds)))),
        Figure("delivered", in_words(capped(delivered))),
        Figure("dead letters", in_words(capped(DeadLetter.objects.all()))),
    ]
    queues = _first(queues_with_lag().order_by(F("lag").desc(), "name"))
    keys = _first(
        keys_with_counts().order_by(
            F("parallelism_count").desc(), F("wait_list_size").desc(), "key"
        )
    )
    gates = _first(
        gates_with_counts().order_by(F("calls").desc(), F("wait_list_size").desc(), "host", "group")
    )
    in_flight = _first(_lean(claimed))
    waiting = [row for kind in kinds for row in _lean(kind)[:MOST_OF_A_KIND]]
    letters = list(_dead_letters()[:MOST_OF_A_KIND])
    entries = list(_log()[:MOST_ENTRIES])
    why = reasons([*in_flight, *waiting], now=now)
    told = [each.message for each in letters] + [each.message for each in entries]
    told += [*in_flight, *waiting]
    names = _Accounts(each.account for each in (*queues, *keys, *gates, *told))
    return Overview(
        figures,
        [
            Table(
                "queues",
                "Queues",
                names.columns("name", "waiting and in flight", "parallelism", "state"),
                [_queue_row(queue, names) for queue in queues[:MOST_ROWS]],
                "No queues.",
                _more(queues),
            ),
            Table(
                "flow-control",
                "Flow-control keys",
                names.columns("key", "in flight", "waiting", "rate", "state"),
                [_key_row(key, names, now) for key in keys[:MOST_ROWS]],
                "No flow-control keys.",
                _more(keys),
            ),
            Table(
                "gates",
                "Limits of providers",
                names.columns("host and model", "in flight", "waiting", "limits", "state"),
                [_gate_row(gate, names, now) for gate in gates[:MOST_ROWS]],
                "No provider was called.",
                _more(gates),
            ),
            Table(
                "in-flight",
                "In flight",
                names.columns("message", "goes to", "attempt", "since when, and who has it"),
                [_message_row(row, names, why) for row in in_flight[:MOST_ROWS]],
                "Nothing is in flight.",
                _more(in_flight),
            ),
            Table(
                "waiting",
                "Waiting",
                names.columns("message", "goes to", "attempt", "waits for"),
                [_message_row(row, names, why) for row in waiting],
                "Nothing waits.",
                f"At most {MOST_OF_A_KIND} are shown of those that wait for a time, for a queue, "
                "for flow control and for a provider's limits."
                if len(waiting) >= MOST_OF_A_KIND
                else "",
            ),
            Table(
                "dead-letters",
                "Last dead letters",
                names.columns("message", "went to", "given up at", "last answer"),
                [_letter_row(letter, names, now) for letter in letters],
                "No dead letters.",
            ),
            Table(
                "log",
                "Last log entries",
                names.columns("message", "time", "state", "goes to", "what happened"),
                [_entry_row(entry, names, now) for entry in entries],
                "Nothing has happened yet.",
            ),
        ],
    )


# --- what is looked at ---------------------------------------------------------------------------


def _waiting_kinds() -> list[QuerySet[Message]]:
    """By an index each: for a time, for a queue, for flow control, for a provider's limits."""
    messages = Message.objects
    return [
        messages.filter(due_at__isnull=False, claim_token="").order_by("due_at"),
        messages.in_line().order_by("queue_id", "pk"),
        messages.waiting_for(Message.Waits.FLOW_CONTROL).order_by("flow_control_id", "pk"),
        messages.waiting_for(Message.Waits.GATE).order_by("gate_id", "pk"),
    ]


def _lean(rows: QuerySet[Message]) -> QuerySet[Message]:
    return rows.select_related("queue").defer("body", "headers", "secrets")


def _dead_letters() -> QuerySet[DeadLetter]:
    rows = DeadLetter.objects.select_related("message").order_by("-pk")
    return rows.only(
        "created_at",
        "response_status",
        "error",
        "message__account",
        "message__message_id",
        "message__url",
    )


def _log() -> QuerySet[LogEntry]:
    rows = LogEntry.objects.select_related("message").order_by("-pk")
    return rows.only(
        "time",
        "state",
        "error",
        "next_delivery_at",
        "response_status",
        "message__account",
        "message__message_id",
        "message__url",
    )


def _first(rows: QuerySet[Any]) -> list[Any]:
    """One more than is shown, to know of the others."""
    return list(rows[: MOST_ROWS + 1])


def _more(rows: list[Any]) -> str:
    return f"There are more than these {MOST_ROWS}." if len(rows) > MOST_ROWS else ""


# --- what is said of it --------------------------------------------------------------------------


class _Accounts:
    """Named only where something is another's than the settings' own account."""

    def __init__(self, accounts: Iterable[str]) -> None:
        self.are_told = any(accounts)

    def columns(self, first: str, *others: str) -> tuple[str, ...]:
        return (first, "account", *others) if self.are_told else (first, *others)

    def row(self, account: str, first: str, *others: str) -> tuple[str, ...]:
        return (first, account or DEFAULT, *others) if self.are_told else (first, *others)


def _queue_row(queue: Queue, names: _Accounts) -> tuple[str, ...]:
    is_paused = _badge("paused", "‖") if queue.is_paused else "open"
    return names.row(
        queue.account, queue.name, in_words(queue.lag), f"{queue.parallelism:,}", is_paused
    )


def _key_row(key: FlowControlKey, names: _Accounts, now: datetime) -> tuple[str, ...]:
    most = "no limit" if key.parallelism is None else f"{key.parallelism:,}"
    pinned = " (pinned)" if key.pins_parallelism else ""
    return names.row(
        key.account,
        key.key,
        f"{in_words(key.parallelism_count)} of {most}{pinned}",
        in_words(key.wait_list_size),
        rate_in_words(key, now),
        _badge("paused", "‖") if key.is_paused else "open",
    )


def _gate_row(gate: Gate, names: _Accounts, now: datetime) -> tuple[str, ...]:
    return names.row(
        gate.account,
        str(gate),
        in_words(gate.calls),
        in_words(gate.wait_list_size),
        limits_in_words(gate, now),
        _badge("paused", "‖") if gate.is_paused else state_in_words(gate, now),
    )


def limits_in_words(gate: Gate, now: datetime) -> str:
    """What is known of a provider's limits, and what is left of them: ``571 of 600 requests``."""
    pace, told = gate.pacing, []
    for name, bucket in pace.buckets.items():
        bucket.refill(now.timestamp())
        per = f" in {bucket.period:g} s" if bucket.period else ""
        name = name.partition("/")[0].replace("_", " ")
        told.append(f"{max(0, int(bucket.level)):,} of {bucket.limit:,.0f} {name}{per}")
    if pace.measured is not None and pace.measured.rate is not None:
        told.append(f"about {pace.measured.rate:.3g} calls a second, by its refusals")
    if not told and not pace.is_probing:
        told.append(f"none known, {pace.window:.0f} calls at once")
    return ", ".join(told) or "not known yet"


def state_in_words(gate: Gate, now: datetime) -> str:
    if gate.blocked_until > now:
        until = at(gate.blocked_until, now)
        words = excerpt(gate.words)
        return f"refused until {until}: {words}" if words else f"refused until {until}"
    return "finds out by one call" if gate.pacing.is_probing else "open"


def rate_in_words(key: FlowControlKey, now: datetime) -> str:
    if key.rate is None:
        return "no limit"
    pinned = " (pinned)" if key.pins_rate else ""
    per = "a second" if key.period == 1 else f"in {key.period:,} s"
    if key.window_ends_at is None or not key.is_window_open(now):
        return f"{key.rate:,} {per}{pinned}"
    until = at(key.window_ends_at, now)
    return f"{key.rate_count:,} of {key.rate:,} {per}{pinned}, until {until}"


def _message_row(message: Message, names: _Accounts, why: dict[int, str]) -> tuple[str, ...]:
    attempt = f"{message.retried + 1} of {message.retries + 1}"
    return names.row(
        message.account, message.message_id, _destination(message), attempt, why[message.pk]
    )


def _letter_row(letter: DeadLetter, names: _Accounts, now: datetime) -> tuple[str, ...]:
    message = letter.message
    answer = letter.error or _status(letter.response_status)
    return names.row(
        message.account,
        message.message_id,
        _destination(message),
        _time(letter.created_at, now),
        answer[:LONGEST_TEXT],
    )


def _entry_row(entry: LogEntry, names: _Accounts, now: datetime) -> tuple[str, ...]:
    told = [entry.error[:LONGEST_TEXT]]
    if entry.response_status is not None and not entry.error:
        told.append(_status(entry.response_status))
    if entry.next_delivery_at is not None:
        told.append(f"again at {at(entry.next_delivery_at, now)}")
    message = entry.message
    return names.row(
        message.account,
        message.message_id,
        _time(entry.time, now),
        _badge(entry.state, _SIGNS.get(entry.state, "?")),
        _destination(message),
        ", ".join(filter(None, told)),
    )


def _status(status: int) -> str:
    return f"status {status}" if status > 0 else "no response"


def _destination(message: Message) -> str:
    return without_query(message.url)[:LONGEST_TEXT]


def _time(moment: datetime, now: datetime) -> SafeString:
    return format_html('<time datetime="{}">{}</time>', moment.isoformat(), at(moment, now))


def _badge(word: str, sign: str) -> SafeString:
    """As word and sign, so that nobody depends on its colour."""
    return format_html(
        '<span class="badge badge-{}"><span aria-hidden="true">{}</span> {}</span>',
        word.lower().replace("_", "-"),
        sign,
        word,
    )
