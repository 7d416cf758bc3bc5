"""Anything may happen to a request, in any order: a machine tries, and compares with the rules.

``TEST_EXAMPLES=2000`` makes a long run of it; the lives it tries are the same each time.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from django.conf import settings as site
from django.db import transaction
from django.test import override_settings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from django_qstash_llm.exceptions import IllegalState
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.cancellation import Cancellations
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.qstash import Callback
from django_qstash_llm.signals import request_attempted, request_completed, request_failed
from django_qstash_llm.triggers import announce, announce_attempts
from tests.wire import FakeQStash
from tests.wire import wire as the_wire

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MAX_RETRIES = 2
UNFINISHED = {"pending", "submitted"}
FORWARD = {
    "pending": {"submitted", "completed", "failed", "cancelled"},
    "submitted": {"completed", "failed", "cancelled"},
    "failed": {"completed"},
    "completed": set(),
    "cancelled": set(),
}
# Dollars for each input token and for each output token; broken, reading an answer raises.
PRICES = {"openai/gpt-5.4-mini": {"input": "1000000", "output": "1000000"}}
BROKEN = "not a dictionary of prices"
SETTINGS = site.QSTASH_LLM | {"ANNOUNCE_TRIES": 1000}


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt at the provider."""

    message: str
    retried: int
    outcome: str

    @property
    def text(self) -> str:
        return f"{self.message}, attempt {self.retried + 1}"

    @property
    def tokens(self) -> int | None:
        """Another number for each answer, or nothing where the provider said none."""
        if self.outcome not in {"answer", "no choices"}:
            return None
        return 10 * int(self.message.removeprefix("msg_")) + self.retried

    @property
    def status(self) -> int:
        return STATUSES.get(self.outcome, 200)

    @property
    def header(self) -> dict[str, list[str]]:
        should_retry = {"busy, not again": "false", "refused, again": "true"}.get(self.outcome)
        return {"X-Should-Retry": [should_retry]} if should_retry else {}

    @property
    def body(self) -> bytes:
        if self.status != 200:
            return b"" if self.status < 0 else b'{"error": {"message": "%d"}}' % self.status
        answer: dict[str, Any] = {"id": self.text, "model": "gpt-5.4-mini"}
        if self.outcome != "no choices":
            answer["choices"] = [{"message": {"content": self.text}, "finish_reason": "stop"}]
        if self.tokens is not None:
            answer["usage"] = {"prompt_tokens": self.tokens, "completion_tokens": 1}
        body = json.dumps(answer).encode()
        return {"truncated": body[:40], "unreadable": b"<html>"}.get(self.outcome, body)

    @property
    def is_answer(self) -> bool:
        return self.outcome in {"answer", "uncounted answer"}

    @property
    def is_hopeless(self) -> bool:
        """No other try would help. QStash does not know, and may make them all the same."""
        return self.outcome in {"never again", "unpaid", "busy, not again"}

    @property
    def is_end(self) -> bool:
        return self.status == 200 or self.outcome == "never again" or self.retried == MAX_RETRIES

    def callbacks(self) -> Iterator[Callback]:
        callback = Callback(
            status=self.status,
            header=self.header,
            body=self.body,
            retried=self.retried,
            max_retries=MAX_RETRIES,
            source_message_id=self.message,
        )
        yield callback
        if self.is_end and self.status != 200:
            yield replace(callback, dlq_id=f"dlq_{self.message}")


STATUSES = {
    "busy": 503,
    "no response": -1,
    "never again": 489,
    "unpaid": 402,
    "busy, not again": 429,
    "refused, again": 401,
}
OUTCOMES = (
    *("busy", "busy", "no response", "never again", "truncated", "unreadable"),
    *("unpaid", "busy, not again", "refused, again"),
    *("no choices", "no choices", "answer", "answer", "uncounted answer", "uncounted answer"),
)


outcomes = st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=MAX_RETRIES + 1)


def key(callback: Callback) -> tuple[str, int, str]:
    kind = "failure_callback" if callback.is_failure_callback else "callback"
    return callback.source_message_id, callback.retried, kind


def shuffled(callbacks: Iterable[Callback]) -> list[Callback]:
    ordered = list(callbacks)
    random.Random(repr(ordered)).shuffle(ordered)
    return ordered


class CallbackMachine(RuleBasedStateMachine):
    """One request and everything that QStash, the site and its people may do about it."""

    def __init__(self) -> None:
        super().__init__()
        self.transaction = transaction.atomic()
        self.transaction.__enter__()
        self.settings = override_settings(QSTASH_LLM=SETTINGS | {"PRICES": PRICES})
        self.settings.enable()
        self.qstash = FakeQStash()
        the_wire.hosts["testserver"] = self.qstash
        request_completed.connect(self.be_told)
        request_failed.connect(self.be_told)
        request_attempted.connect(self.be_told_of_an_attempt)
        self.now = NOW
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self.bag: dict[tuple[str, int, str], Callback] = {}
        """What QStash tells, in any order and as often as it likes."""
        self.delivered: dict[tuple[str, int, str], int] = {}
        self.heard: list[Callback] = []
        """What took effect, in this order."""
        self.put_off: list[Callback] = []
        self.is_broken = False
        self.is_cancelled = False
        self.is_receiver_broken = False
        self.is_submitted = False
        self.news_at = NOW
        """When QStash was last heard of."""
        self.ends: list[str] = []
        self.told: list[str] = []
        self.told_attempts: list[tuple[str, int]] = []
        self.before: dict[str, Any] = {}
        self.is_sound = True
        """Whether the last look at it found what the rules say."""

    @initialize(
        timeout=st.sampled_from([None, 600]),
        delay=st.sampled_from([None, 3600]),
        first=outcomes,
        second=outcomes,
    )
    def ask(
        self, timeout: int | None, delay: int | None, first: list[str], second: list[str]
    ) -> None:
        not_before = None if delay is None else NOW + timedelta(seconds=delay)
        messages = [{"role": "user", "content": "?"}]
        self.uuid = LLMRequest.objects.publish(
            messages, timeout=timeout, not_before=not_before
        ).uuid
        self.before = self.values()
        self.attempts_are_made("msg_1", first, is_told=False)
        self.attempts_are_made("msg_2", second, is_told=False)

    # --- what happens ---

    @rule(seconds=st.sampled_from([1, 59, 400, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(is_lost=st.booleans())
    def submit(self, is_lost: bool) -> None:
        self.qstash.answer = self.take_and_drop_the_line if is_lost else None
        was_pending = self.values()["state"] == "pending"
        Outbox(clock=lambda: self.now).submit()
        self.qstash.answer = None
        if was_pending and self.values()["state"] == "submitted":
            self.is_submitted, self.news_at = True, self.now

    def take_and_drop_the_line(self, request: httpx.Request) -> httpx.Response:
        self.qstash.take(request, request.url.path.removeprefix("/qstash"))
        raise httpx.ReadError("connection reset", request=request)

    @rule(
        message=st.sampled_from(["msg_1", "msg_2"]),
        outcomes=outcomes,
        is_told=st.booleans(),
    )
    def attempts_are_made(self, message: str, outcomes: list[str], is_told: bool) -> None:
        """The next ones of a message. A second message is what a lost answer may lead to."""
        for outcome in outcomes:
            earlier = [each for each in self.attempts.values() if each.message == message]
            if any(each.is_end for each in earlier):
                return
            attempt = Attempt(message, len(earlier), outcome)
            self.attempts[message, attempt.retried] = attempt
            for callback in attempt.callbacks():
                self.bag[key(callback)] = callback
                if is_told:
                    self.receive(callback)

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Some of what there is to tell, in any order, late, or once more."""
        for each in data.draw(st.lists(st.sampled_from(sorted(self.bag)), min_size=1, max_size=4)):
            self.receive(self.bag[each])

    def receive(self, callback: Callback) -> None:
        CallbackResponse.objects.receive(
            Callback.from_json(callback.to_json()), uuid=self.uuid, now=self.now
        )
        is_new = key(callback) not in self.delivered
        self.delivered[key(callback)] = self.delivered.get(key(callback), 0) + 1
        if not is_new:
            return
        if self.is_broken and self.breaks(callback):
            self.put_off.append(callback)
        else:
            self.hear(callback)

    def breaks(self, callback: Callback) -> bool:
        """Only what is to be priced is broken by broken prices."""
        attempt = self.attempts[callback.source_message_id, callback.retried]
        return attempt.is_answer or attempt.tokens is not None

    def hear(self, callback: Callback) -> None:
        if self.expected_state() in UNFINISHED:
            self.news_at = self.now
        self.heard.append(callback)

    @precondition(lambda self: self.delivered and not self.is_broken)
    @rule(data=st.data())
    def read_again(self, data: st.DataObject) -> None:
        """What has taken effect once has no second one."""
        receipts = CallbackResponse.objects.exclude(applied_at=None).order_by("id")
        if receipts:
            before = self.values()
            data.draw(st.sampled_from(list(receipts))).apply_again(now=self.now)
            assert self.values() == before

    @precondition(lambda self: self.heard or self.is_submitted)
    @rule(is_meant=st.sampled_from([True, False, False]))
    def cancel(self, is_meant: bool) -> None:
        if not is_meant:
            return  # or most lives would be short ones
        row = LLMRequest.objects.get(uuid=self.uuid)
        if row.state in UNFINISHED:
            row.cancel(now=self.now)
            self.is_cancelled = True
        else:
            with pytest.raises(IllegalState):
                row.cancel(now=self.now)

    @rule(is_broken=st.booleans())
    def reading_breaks_or_is_mended(self, is_broken: bool) -> None:
        self.break_or_mend(is_broken)

    def break_or_mend(self, is_broken: bool) -> None:
        self.settings.disable()
        prices = BROKEN if is_broken else PRICES
        self.settings = override_settings(QSTASH_LLM=SETTINGS | {"PRICES": prices})
        self.settings.enable()
        self.is_broken = is_broken

    @precondition(lambda self: self.put_off)
    @rule()
    def apply_what_is_due(self) -> None:
        due = CallbackResponse.objects.unapplied(self.now).order_by("id")
        keys = [(row.source_message_id, row.retried, row.kind) for row in due]
        assert CallbackResponse.objects.apply_due(now=self.now) == len(keys)
        if not self.is_broken:
            for each in keys:
                self.put_off.remove(self.bag[each])
                self.hear(self.bag[each])

    @rule(trouble=st.sampled_from([None, 404, 500]))
    def cancel_at_qstash(self, trouble: int | None) -> None:
        """What no try would help, until QStash has answered."""
        due = {row.source_message_id for row in Cancellations(clock=lambda: self.now).due()}
        assert due <= self.hopeless()
        self.qstash.answer = (lambda request: httpx.Response(trouble)) if trouble else None
        Cancellations(clock=lambda: self.now).cancel()
        self.qstash.answer = None
        left = CallbackResponse.objects.exclude(cancel_after=None)
        if trouble == 500:
            assert all(receipt.cancel_after > self.now for receipt in left)
        else:
            assert not left.filter(source_message_id__in=due, cancel_after__lte=self.now).exists()

    @rule(is_broken=st.booleans())
    def announce(self, is_broken: bool) -> None:
        self.is_receiver_broken = is_broken
        announce_attempts("default")
        untold = CallbackResponse.objects.filter(to_announce=True)
        assert is_broken or not untold.exists()
        untold.update(announce_after=None)
        announce("default")
        row = LLMRequest.objects.get(uuid=self.uuid)
        is_end = row.state in {"completed", "failed"}
        assert (row.announced_at is not None) is (is_end and self.told[-1:] == [self.end()])
        if is_end and row.announced_at is None:
            assert "the receiver is broken" in row.announce_error
            row.announce_again()

    def be_told(self, llm_request: LLMRequest, **kwargs: Any) -> None:
        if self.is_receiver_broken:
            raise RuntimeError("the receiver is broken")
        self.told.append(f"{llm_request.state}, {self.expected_ends()}")

    def be_told_of_an_attempt(self, attempt: CallbackResponse, **kwargs: Any) -> None:
        if self.is_receiver_broken:
            raise RuntimeError("the receiver is broken")
        self.told_attempts.append((attempt.source_message_id, attempt.retried))

    # --- what the rules say of it ---

    def hopeless(self) -> set[str]:
        """The messages of which an attempt told that QStash is to try no more."""
        heard = [each for each in self.heard if not each.is_last]
        return {each.source_message_id for each in heard if self.attempt_of(each).is_hopeless}

    def expected_ends(self) -> int:
        """How often it has ended: once, and once more when the answer came after a failure."""
        return len(self.ends)

    def end(self) -> str:
        return f"{self.values()['state']}, {self.expected_ends()}"

    def attempt_of(self, callback: Callback) -> Attempt:
        return self.attempts[callback.source_message_id, callback.retried]

    def expected_state(self) -> str:
        if self.is_cancelled:
            return "cancelled"
        if any(self.attempt_of(each).is_answer for each in self.heard):
            return "completed"
        if any(each.is_last or self.attempt_of(each).is_hopeless for each in self.heard):
            return "failed"
        return "submitted" if self.heard or self.is_submitted else "pending"

    def answer(self) -> Attempt | None:
        """The first that could be read, while somebody waited for it."""
        answers = [each for each in map(self.attempt_of, self.heard) if each.is_answer]
        return answers[0] if answers and not self.is_cancelled else None

    def spent_on(self) -> Attempt | None:
        """Whose tokens are counted: the answer's, or those of the first that came to nothing."""
        counted = [each for each in map(self.attempt_of, self.heard) if each.tokens is not None]
        return self.answer() or next(iter(counted), None)

    def values(self) -> dict[str, Any]:
        values: dict[str, Any] = LLMRequest.objects.filter(uuid=self.uuid).values().get()
        return values

    # --- what always holds ---

    @invariant()
    def each_callback_is_stored_once_and_counted(self) -> None:
        receipts = CallbackResponse.objects.all()
        stored = {(row.source_message_id, row.retried, row.kind): row for row in receipts}
        assert len(stored) == len(receipts)
        assert {name: row.seen_count for name, row in stored.items()} == self.delivered
        unread = {name for name, row in stored.items() if row.applied_at is None}
        assert unread == {key(callback) for callback in self.put_off}
        assert all(stored[name].apply_tries and stored[name].problem for name in unread)

    @invariant()
    def the_request_is_what_the_rules_say(self) -> None:
        if self.before:
            self.is_sound = False
            row = LLMRequest.objects.get(uuid=self.uuid)
            self.check_state(row)
            self.check_attempts(row)
            self.check_deadline(row)
            self.check_answer(row)
            self.is_sound = True

    def check_state(self, row: LLMRequest) -> None:
        before = self.before
        if row.state != before["state"]:
            assert row.state in FORWARD[before["state"]]
            if row.state in {"completed", "failed"}:
                self.ends.append(row.state)
        assert row.state == self.expected_state()
        assert (row.finished_at is None) is (row.state in UNFINISHED)
        assert before["qstash_message_id"] in ("", row.qstash_message_id)
        self.before = {"state": row.state, "qstash_message_id": row.qstash_message_id}

    def check_attempts(self, row: LLMRequest) -> None:
        """The newest that is known, or the one that answered."""
        if answer := self.answer():
            assert (row.attempts, row.last_status) == (answer.retried + 1, 200)
            return
        newest = max((each.retried for each in self.heard), default=-1)
        statuses = [each.status for each in self.heard if each.retried == newest]
        assert row.attempts == newest + 1
        assert row.last_status == (statuses[0] if statuses else None)

    def check_deadline(self, row: LLMRequest) -> None:
        """It waits no longer than its deadline, and has one while it waits."""
        is_waiting = row.state == "submitted"
        assert row.deadline_at == (row.next_deadline(self.news_at) if is_waiting else None)

    def check_answer(self, row: LLMRequest) -> None:
        """What was answered is counted once."""
        answer, counted = self.answer(), self.spent_on()
        assert row.completion == (answer.text if answer else "")
        assert row.error == "" or row.state != "completed"
        tokens = counted.tokens if counted else None
        assert row.input_tokens == tokens
        assert row.cost == (None if tokens is None else Decimal(tokens + 1))

    @invariant()
    def each_end_and_each_attempt_is_told_once(self) -> None:
        assert len(self.told) == len(set(self.told))
        assert len(self.told_attempts) == len(set(self.told_attempts))

    @invariant()
    def hopeless_messages_are_cancelled_or_will_be(self) -> None:
        receipts = CallbackResponse.objects.exclude(cancel_after=None, cancel_tries=0)
        assert {receipt.source_message_id for receipt in receipts} == self.hopeless()

    def teardown(self) -> None:
        try:
            if self.is_sound and self.before:
                self.hear_the_rest()
                self.any_other_order_ends_the_same()
        finally:
            request_completed.disconnect(self.be_told)
            request_failed.disconnect(self.be_told)
            request_attempted.disconnect(self.be_told_of_an_attempt)
            self.settings.disable()
            the_wire.clear()
            transaction.set_rollback(True)
            self.transaction.__exit__(None, None, None)

    def hear_the_rest(self) -> None:
        """All that has not been told or not been read, in some order."""
        self.break_or_mend(False)
        self.time_passes(4000)
        if self.put_off:
            self.apply_what_is_due()
            self.the_request_is_what_the_rules_say()
        for callback in shuffled(self.bag.values()):
            self.receive(callback)
            self.the_request_is_what_the_rules_say()
        self.announce(False)
        self.each_callback_is_stored_once_and_counted()
        self.each_end_and_each_attempt_is_told_once()
        assert set(self.told_attempts) == {key(callback)[:2] for callback in self.heard}
        self.time_passes(4000)
        self.cancel_at_qstash(None)
        assert not CallbackResponse.objects.exclude(cancel_after=None).exists()

    def any_other_order_ends_the_same(self) -> None:
        assert not self.put_off
        orders = [self.heard, self.heard[::-1], sorted(self.heard, key=key), shuffled(self.heard)]
        different = {tuple(map(key, order)): order for order in orders}
        ends = [self.end_after(order, number) for number, order in enumerate(different.values())]
        assert all(end == ends[0] for end in ends)

    def end_after(self, callbacks: list[Callback], number: int) -> dict[str, Any]:
        """What a fresh request comes to, to whom all this is told in this order."""
        row = LLMRequest.objects.publish([{"role": "user", "content": "?"}])
        for callback in callbacks:
            # A receipt is stored once for all requests.
            own = replace(callback, source_message_id=f"{number} {callback.source_message_id}")
            CallbackResponse.objects.receive(own, uuid=row.uuid, now=self.now)
        row.refresh_from_db()
        seen = {"state": row.state}
        if sum(self.attempt_of(callback).is_answer for callback in callbacks) < 2:
            seen["attempts"] = row.attempts
        if len({callback.source_message_id for callback in callbacks}) == 1:
            seen |= {name: getattr(row, name) for name in SEEN_OF_ONE_MESSAGE}
        return seen


# Of two messages, which only a lost answer makes, the first to end is shown, and of two answers the
# first.
SEEN_OF_ONE_MESSAGE = (
    *("last_status", "completion", "completion_id", "answered_by", "finish_reason"),
    *("input_tokens", "output_tokens", "cost", "error", "error_code", "dead_letter_id"),
)


@pytest.mark.once
@pytest.mark.django_db
@pytest.mark.timeout(0)
def test_any_life_of_a_request_follows_the_rules() -> None:
    examples = int(os.environ.get("TEST_EXAMPLES", "25"))
    run_state_machine_as_test(
        CallbackMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


ENDS = ("never again", "unpaid", "truncated", "no choices", "answer", "uncounted answer")


@pytest.mark.django_db
@pytest.mark.parametrize("second", ENDS)
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("how", ["as they came", "reversed", "after a cancellation"])
def test_two_messages_for_one_request_follow_the_rules_too(
    how: str, first: str, second: str
) -> None:
    """Every pair of what two may come to."""
    machine = CallbackMachine()
    try:
        machine.ask(None, None, [first], [second])
        callbacks = list(machine.bag.values())
        if how == "after a cancellation":
            machine.submit(False)
            machine.cancel(True)
        for callback in callbacks[::-1] if how == "reversed" else callbacks:
            machine.receive(callback)
            machine.the_request_is_what_the_rules_say()
    finally:
        machine.teardown()
