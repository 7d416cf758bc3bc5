"""How attempts ended: what becomes of their messages, whom to tell, what the log says.

Many are written down in one transaction, with a statement for each kind of ending and not for
each message: a commit costs more than a delivery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from django.db import transaction

from ...qstash import Callback, Options
from ...qstash import Message as WireMessage
from ...qstash.callback import NO_RESPONSE
from ...qstash.retry import delay_before_retry
from .. import conf, redaction
from .claims import Adoption
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
        endings = _Endings(now)
        lost = []
        for message, outcome in ended:
            token, state = held.get(message.pk, ("", ""))
            if not token or token != message.claim_token:
                lost.append(message)
                continue
            endings.add(message, outcome, is_cancelled=state == Message.State.CANCEL_REQUESTED)
        adopted = endings.write(adoption)
    return Recorded(lost, adopted)


class _Endings:
    """What is to be written of several attempts, gathered by how they ended."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.delivered: list[int] = []
        self.canceled: list[int] = []
        self.failed: list[tuple[Message, Outcome]] = []
        self.retrying: list[Message] = []
        self.callbacks: list[Message] = []
        self.entries: list[Told] = []

    def add(self, message: Message, outcome: Outcome, *, is_cancelled: bool) -> None:
        if outcome.is_success:
            self.delivered.append(message.pk)
            self._log(message, LogEntry.State.DELIVERED, outcome)
            self._tell(message, outcome)
        elif is_cancelled:
            self.canceled.append(message.pk)
            self._log(message, LogEntry.State.ERROR, outcome)
            self._log(message, LogEntry.State.CANCELED)
        elif outcome.forbids_retry or message.retried >= message.retries:
            self.failed.append((message, outcome))
            self._log(message, LogEntry.State.ERROR, outcome)
            self._log(message, LogEntry.State.FAILED, outcome)
            self._tell(message, outcome)
        else:
            due_at = self.now + timedelta(seconds=self._wait(message, outcome))
            self._log(message, LogEntry.State.ERROR, outcome, due_at)
            self._log(message, LogEntry.State.RETRY, None, due_at)
            self._tell(message, outcome)
            self.retrying.append(message.retried_at(due_at))

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
    retries = message.retries if how is None or how.retries is None else how.retries
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
