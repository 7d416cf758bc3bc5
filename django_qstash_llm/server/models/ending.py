"""How attempts ended: what becomes of their messages, whom to tell, what the log says.

Many are written down in one transaction, with a statement for each kind of ending and not for
each message: a commit costs more than a delivery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from django.db import transaction

from ...limits import Reading, Trouble, read
from ...qstash import Callback, Options
from ...qstash import Message as WireMessage
from ...qstash.callback import NO_RESPONSE
from ...qstash.retry import delay_before_retry
from .. import conf, redaction
from .claims import Adoption
from .gate import Gate
from .insertion import insert
from .log_entry import LogEntry, Told
from .queue import milliseconds

if TYPE_CHECKING:
    from .message import Message


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


class Recorded(NamedTuple):
    lost: list[Message]
    """Whose claims were lost to another engine: that one's word counts."""
    adopted: list[Message]
    """Callbacks that the engine is to deliver now: they are claimed already."""


def record(
    ended: Sequence[tuple[Message, Outcome]], *, now: datetime, adoption: Adoption | None = None
) -> Recorded:
    """Write down how these attempts ended, and whom to tell. All of it, or nothing."""
    from .message import Message

    with transaction.atomic():
        # Locked, in everybody's order: whoever takes a claim from us waits until this is
        # written, or we for them.
        rows = Message.objects.filter(pk__in=[message.pk for message, _ in ended]).order_by("pk")
        held = {
            pk: (token, state)
            for pk, token, state in rows.select_for_update(of=("self",)).values_list(
                "pk", "claim_token", "state"
            )
        }
        lost, won = [], []
        for message, outcome in ended:
            token, state = held.get(message.pk, ("", ""))
            if token and token == message.claim_token:
                won.append((message, outcome, state == Message.State.CANCEL_REQUESTED))
            else:
                lost.append(message)
        gates = _Gates(message for message, *_ in won)
        endings = _Endings(now, gates)
        for message, outcome, is_cancelled in won:
            endings.add(message, outcome, is_cancelled=is_cancelled)
        adopted = endings.write(adoption)
    gates.pause_the_broke(now=now)
    return Recorded(lost, adopted)


class _Gates:
    """The gates that these messages passed, locked after them and in everybody's order. A claim
    skips what is locked, so nobody waits here for somebody who waits for us."""

    def __init__(self, messages: Iterable[Message]) -> None:
        pks = {message.gate_id for message in messages if message.gate_id is not None}
        rows = Gate.objects.filter(pk__in=pks).order_by("pk")
        self._gates = {row.pk: row for row in rows.select_for_update(no_key=True)} if pks else {}
        self._broke: dict[int, tuple[Gate, Message, Reading]] = {}

    def learn(self, message: Message, outcome: Outcome, *, now: datetime) -> Reading | None:
        """What this outcome says of its provider's limits; None of a message that has no gate."""
        gate = self._gates.get(message.gate_id or 0)
        if gate is None:
            return None
        reading = read(outcome.status, outcome.first_values, outcome.body, now=now.timestamp())
        gate.learn(message, reading, now=now)
        if reading.trouble is Trouble.MONEY:
            self._broke[gate.pk] = gate, message, reading
        return reading

    def opens_at(self, message: Message) -> datetime:
        return self._gates[message.gate_id or 0].blocked_until

    def store(self, *, now: datetime) -> None:
        for gate in self._gates.values():
            gate.look(now=now)
            gate.store(now=now)

    def pause_the_broke(self, *, now: datetime) -> None:
        """After the rest is written: of one key all gates are locked, whoever has them."""
        for gate, message, reading in self._broke.values():
            gate.pause_for_money(message, reading, now=now)


class _Endings:
    """What is to be written of several attempts, gathered by how they ended."""

    def __init__(self, now: datetime, gates: _Gates) -> None:
        self.now, self.gates = now, gates
        self.delivered: list[int] = []
        self.canceled: list[int] = []
        self.failed: list[tuple[Message, Outcome]] = []
        self.retrying: list[Message] = []
        self.callbacks: list[Message] = []
        self.entries: list[Told] = []

    def add(self, message: Message, outcome: Outcome, *, is_cancelled: bool) -> None:
        reading = self.gates.learn(message, outcome, now=self.now)
        if outcome.is_success:
            self.delivered.append(message.pk)
            self._log(message, LogEntry.State.DELIVERED, outcome)
            self._tell(message, outcome)
        elif is_cancelled:
            self.canceled.append(message.pk)
            self._log(message, LogEntry.State.ERROR, outcome)
            self._log(message, LogEntry.State.CANCELED)
        elif reading is not None and self._is_put_back(message, reading):
            due_at = max(self.now, self.gates.opens_at(message))
            self._log(message, LogEntry.State.ERROR, outcome, due_at)
            self._log(message, LogEntry.State.RETRY, None, due_at)
            put_back = message.refused_at(self.now)
            self._tell(message.with_retries(put_back.retries), outcome)
            self.retrying.append(put_back)
        elif (
            outcome.forbids_retry
            or message.retried >= message.retries
            or (reading is not None and not _may_pass(reading))
        ):
            outcome = _explained(outcome, message, reading)
            self.failed.append((message, outcome))
            self._log(message, LogEntry.State.ERROR, outcome)
            self._log(message, LogEntry.State.FAILED, outcome)
            self._tell(message, outcome)
        else:
            due_at = self.now + timedelta(seconds=self._wait(message, outcome))
            self._log(message, LogEntry.State.ERROR, outcome, due_at)
            self._log(message, LogEntry.State.RETRY, None, due_at)
            self._tell(message, outcome)
            self.retrying.append(message.retried_at(due_at, now=self.now))

    def _is_put_back(self, message: Message, reading: Reading) -> bool:
        """Whether a refusal costs none of the message's retries: it goes on to wait at its gate. Not
        for ever, and not where its publisher wants no second attempt at all."""
        patience = timedelta(seconds=conf.current().gate_patience)
        return (
            reading.trouble in _PUT_BACK
            and reading.should_retry is not False
            and message.retries > 0
            and message.retries < MOST_RETRIES
            and self.now - max(message.created_at, message.not_before) < patience
        )

    def _wait(self, message: Message, outcome: Outcome) -> float:
        return delay_before_retry(
            message.retried,
            status=outcome.status,
            headers=outcome.first_values,
            expression=message.wire.options.retry_delay,
            now=self.now.timestamp(),
        )

    def _log(
        self,
        message: Message,
        state: LogEntry.State,
        outcome: Outcome | None = None,
        next_delivery_at: datetime | None = None,
    ) -> None:
        self.entries.append(
            LogEntry.of(
                message, state, now=self.now, outcome=outcome, next_delivery_at=next_delivery_at
            )
        )

    def _tell(self, message: Message, outcome: Outcome) -> None:
        if message.wire.callback:
            self.callbacks.append(callback_of(message, outcome, now=self.now))

    def write(self, adoption: Adoption | None) -> list[Message]:
        from .message import Message

        states = Message.State
        for state, pks in ((states.DELIVERED, self.delivered), (states.CANCELED, self.canceled)):
            if pks:
                Message.objects.filter(pk__in=pks).end(state, now=self.now)
        if self.failed:
            self._bury()
        self.gates.store(now=self.now)
        if self.retrying:
            Message.objects.bulk_update(self.retrying, Message.RETRYING, batch_size=100)
        # Whoever asked, and the log: in the transaction that ends the attempts.
        return Message.objects.insert(
            self.callbacks, now=self.now, after=self.entries, adoption=adoption
        )

    def _bury(self) -> None:
        from .dead_letter import DeadLetter
        from .message import Message

        letters = [
            DeadLetter(
                message=message,
                created_at=self.now,
                response_status=outcome.status,
                response_header=redaction.without_secrets(outcome.header),
                response_body=outcome.body,
                error=outcome.error,
            )
            for message, outcome in self.failed
        ]
        insert(letters)
        self.callbacks += [
            callback_of(message, outcome, now=self.now, dlq_id=letter.dlq_id)
            for (message, outcome), letter in zip(self.failed, letters, strict=True)
            if message.wire.failure_callback
        ]
        failed = Message.objects.filter(pk__in=[message.pk for message, _ in self.failed])
        failed.end(Message.State.FAILED, now=self.now, keeps_secrets=True)


_PUT_BACK = {Trouble.RATE, Trouble.DAILY}
MOST_RETRIES = 2**31 - 2
"""What the column takes."""


def _may_pass(reading: Reading) -> bool:
    """Whether another attempt may have a better end: the provider's own word, else what its trouble
    is. Who has no money, or asks too much, is not asked again."""
    if reading.should_retry is not None:
        return reading.should_retry
    return reading.trouble is None or reading.trouble.is_passing


def _explained(outcome: Outcome, message: Message, reading: Reading | None) -> Outcome:
    """With what it means, and what to do about it, for whoever finds it among the dead letters."""
    if reading is None or reading.trouble is None or outcome.error:
        return outcome
    trouble = reading.trouble
    words = message.without_credentials(reading.words or reading.code)
    told = ". ".join(filter(None, (words.rstrip("."), trouble.remedy)))
    return dataclasses.replace(outcome, error=f"{trouble}: {told}")


def callback_of(message: Message, outcome: Outcome, *, now: datetime, dlq_id: str = "") -> Message:
    """The message that tells of an attempt; with a ``dlq_id``, that no other will follow."""
    from .message import Message as Row

    wire = message.wire
    url, how, kind = wire.callback, wire.options.callback, Row.Kind.CALLBACK
    if dlq_id:
        url, how, kind = (
            wire.failure_callback,
            wire.options.failure_callback,
            Row.Kind.FAILURE_CALLBACK,
        )
    retries = message.published_retries if how is None or how.retries is None else how.retries
    # It repeats the original, and so what that asks to hide.
    redact = (*wire.options.redact, *(how.redact if how else ()))
    callback = WireMessage(
        destination=url,
        body=_envelope(message, outcome, dlq_id),
        options=_plain_options(retries, redact)
        if how is None
        else dataclasses.replace(
            how, content_type="application/json", retries=retries, redact=redact
        ),
    )
    return Row.of(
        callback,
        now=now,
        account=message.account,
        kind=kind,
        source=message,
        caller_ip=message.caller_ip,
    )


@lru_cache(maxsize=64)
def _plain_options(retries: int, redact: tuple[str, ...]) -> Options:
    return Options(content_type="application/json", retries=retries, redact=redact)


def _envelope(message: Message, outcome: Outcome, dlq_id: str) -> bytes:
    shows_secrets = conf.current().source_header_secrets
    header = message.header
    return Callback(
        status=outcome.status,
        header=outcome.header,
        body=outcome.body,
        retried=message.retried,
        max_retries=message.retries,
        source_message_id=message.message_id,
        topic_name=message.topic_name,
        endpoint_name=message.endpoint_name,
        schedule_id=message.schedule_id,
        url=message.url,
        method=message.method,
        source_header=header if shows_secrets else redaction.without_secrets(header),
        source_body=bytes(message.body),
        not_before=milliseconds(message.not_before),
        created_at=milliseconds(message.created_at),
        caller_ip=message.caller_ip,
        dlq_id=dlq_id,
    ).to_json()
