from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.db import transaction
from django.dispatch import Signal
from django.utils import timezone

from django_qstash_llm import triggers
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.qstash import Callback
from django_qstash_llm.signals import (
    request_attempted,
    request_completed,
    request_failed,
    request_submitted,
)

from .conftest import ANSWER
from .wire import FakeQStash

MESSAGES = [{"role": "user", "content": "?"}]
DONE = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_1")
GAVE_UP = Callback(status=500, source_message_id="msg_1")


@pytest.fixture
def listen() -> Iterator[Callable[[Signal, Callable[[LLMRequest], None]], None]]:
    connected: list[tuple[Signal, Any]] = []

    def to(signal: Signal, hear: Callable[[LLMRequest], None]) -> None:
        def receiver(sender: type, llm_request: LLMRequest, **kwargs: Any) -> None:
            assert sender is LLMRequest
            hear(llm_request)

        signal.connect(receiver, weak=False)
        connected.append((signal, receiver))

    yield to
    for signal, receiver in connected:
        signal.disconnect(receiver)


@pytest.mark.django_db(transaction=True)
def test_each_signal_is_sent_when_its_moment_comes(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    heard: list[tuple[str, str, str]] = []
    for signal, name in (
        (request_submitted, "submitted"),
        (request_completed, "completed"),
        (request_failed, "failed"),
    ):
        listen(
            signal, lambda row, name=name: heard.append((name, row.state, row.qstash_message_id))
        )
    first, second = LLMRequest.objects.publish(MESSAGES), LLMRequest.objects.publish(MESSAGES)
    post_callback(first, DONE)
    post_callback(second, Callback(status=500, source_message_id="msg_2", body=b"", max_retries=0))
    assert heard == [
        ("submitted", "submitted", "msg_1"),
        ("submitted", "submitted", "msg_2"),
        ("completed", "completed", "msg_1"),
        ("failed", "failed", "msg_2"),
    ]


@pytest.mark.django_db(transaction=True)
def test_signal_is_sent_after_the_callback_is_committed_in_one_transaction_with_its_mark(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    seen = []

    def look(key: int) -> None:
        stored = LLMRequest.objects.get(pk=key)
        seen.append((stored.completion, stored.announced_at is not None))

    def hear(llm_request: LLMRequest) -> None:
        assert transaction.get_connection().in_atomic_block
        look(llm_request.pk)
        transaction.on_commit(lambda: look(llm_request.pk))

    listen(request_completed, hear)
    post_callback(LLMRequest.objects.publish(MESSAGES), DONE)
    # The mark is the last word of the transaction, and not the first.
    assert seen == [("Forty-two.", False), ("Forty-two.", True)]


@pytest.mark.django_db
def test_receiver_that_raises_is_told_again_and_its_effect_is_there_once(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    moods = iter([True, False])

    def hear(llm_request: LLMRequest) -> None:
        Group.objects.create(name="effect")
        if next(moods):
            raise RuntimeError("not today")

    listen(request_completed, hear)
    row = LLMRequest.objects.publish(MESSAGES)
    post_callback(row, DONE)
    triggers.announce("default")
    assert Group.objects.count() == 0
    row.refresh_from_db()
    assert (row.announce_error, row.state) == ("RuntimeError: not today", "completed")
    LLMRequest.objects.update(announce_after=None)
    triggers.announce("default")
    assert Group.objects.count() == 1


@pytest.mark.django_db
def test_receiver_of_a_submission_that_raises_stops_nobody(
    qstash: FakeQStash, listen: Any, django_capture_on_commit_callbacks: Any
) -> None:
    heard = []

    def hear(llm_request: LLMRequest) -> None:
        heard.append(llm_request.pk)
        raise RuntimeError

    listen(request_submitted, hear)
    with django_capture_on_commit_callbacks(execute=True):
        rows = [LLMRequest.objects.publish(MESSAGES) for _ in range(3)]
    assert sorted(heard) == [row.pk for row in rows]
    assert LLMRequest.objects.submitted().count() == 3


@pytest.mark.django_db(transaction=True)
def test_duplicate_callback_is_not_announced_twice(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    heard = []
    listen(request_completed, lambda row: heard.append(row.pk))
    row = LLMRequest.objects.publish(MESSAGES)
    for _ in range(3):
        post_callback(row, DONE)
    assert heard == [row.pk]


# --- attempts ---

Attempts = list[tuple[int, int, str]]


def attempted(status: int, retried: int = 0, **fields: Any) -> Callback:
    fields = {"source_message_id": "msg_1", "max_retries": 2} | fields
    return Callback(status=status, retried=retried, **fields)


@pytest.fixture
def heard() -> Iterator[Attempts]:
    """Attempts that a receiver was told of: number, status, trouble."""
    told: Attempts = []

    def hear(
        sender: type, llm_request: LLMRequest, attempt: CallbackResponse, **kwargs: Any
    ) -> None:
        assert (sender, attempt.llm_request) == (LLMRequest, llm_request)
        told.append((attempt.attempt, attempt.status, attempt.trouble))

    request_attempted.connect(hear)
    yield told
    request_attempted.disconnect(hear)


@pytest.mark.django_db(transaction=True)
def test_each_attempt_is_told_once_with_its_trouble(
    qstash: FakeQStash, heard: Attempts, post_callback: Callable[..., Any]
) -> None:
    row = LLMRequest.objects.publish(MESSAGES)
    for callback in (attempted(429), attempted(429), attempted(503, 1)):
        post_callback(row, callback)
    post_callback(row, attempted(200, 2, body=DONE.body))
    assert heard == [(1, 429, "rate"), (2, 503, "overload"), (3, 200, "")]
    assert not CallbackResponse.objects.filter(to_announce=True).exists()


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.django_db
def test_the_last_attempt_is_one_though_a_callback_and_a_failure_callback_tell_of_it(
    qstash: FakeQStash,
    heard: Attempts,
    post_callback: Callable[..., Any],
    is_together: bool,
    is_reversed: bool,
) -> None:
    row = LLMRequest.objects.publish(MESSAGES)
    told = [attempted(500, 2), attempted(500, 2, dlq_id="dlq_1")]
    for callback in told[::-1] if is_reversed else told:
        post_callback(row, callback)
        if not is_together:
            triggers.announce_attempts("default")
    assert triggers.announce_attempts("default") == (2 if is_together else 0)
    assert heard == [(3, 500, "fault")]
    assert not CallbackResponse.objects.filter(to_announce=True).exists()


@pytest.mark.django_db
def test_an_attempt_that_succeeds_is_not_marked_where_nobody_listens(
    qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    post_callback(LLMRequest.objects.publish(MESSAGES), DONE)
    assert not CallbackResponse.objects.get().to_announce


@pytest.mark.django_db
def test_receiver_of_an_attempt_that_raises_is_told_again_bounded_and_stops_no_other(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any], settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"ANNOUNCE_TRIES": 2}
    heard = []

    def hear(llm_request: LLMRequest) -> None:
        heard.append(llm_request.pk)
        Group.objects.create(name=str(llm_request.pk))
        if llm_request.pk == first.pk:
            raise RuntimeError("not today")

    listen(request_attempted, hear)
    first, second = LLMRequest.objects.publish(MESSAGES), LLMRequest.objects.publish(MESSAGES)
    post_callback(first, attempted(429))
    post_callback(second, attempted(429, source_message_id="msg_2"))
    triggers.announce_attempts("default")
    assert triggers.announce_attempts("default") == 0, "not at once"
    for _ in range(3):
        CallbackResponse.objects.update(announce_after=None)
        triggers.announce_attempts("default")
    assert heard == [first.pk, second.pk, first.pk]
    assert [group.name for group in Group.objects.all()] == [str(second.pk)]
    receipt = CallbackResponse.objects.get(llm_request=first)
    assert (receipt.announce_tries, receipt.announce_error) == (2, "RuntimeError: not today")


@pytest.mark.django_db(transaction=True)
def test_attempt_is_told_in_one_transaction_with_its_mark(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    seen = []

    def look() -> None:
        seen.append(CallbackResponse.objects.get().to_announce)

    def hear(llm_request: LLMRequest) -> None:
        assert transaction.get_connection().in_atomic_block
        look()
        transaction.on_commit(look)

    listen(request_attempted, hear)
    post_callback(LLMRequest.objects.publish(MESSAGES), attempted(429))
    assert seen == [True, False]


@pytest.mark.django_db
def test_attempt_whose_worker_was_killed_is_told_by_another(
    qstash: FakeQStash, heard: Attempts, post_callback: Callable[..., Any]
) -> None:
    row = LLMRequest.objects.publish(MESSAGES)
    post_callback(row, attempted(429))
    now = timezone.now()
    # Taken, and never told.
    CallbackResponse.objects.update(announce_tries=1, announce_after=now + timedelta(minutes=2))
    triggers.announce_attempts("default", clock=lambda: now)
    assert heard == []
    triggers.announce_attempts("default", clock=lambda: now + timedelta(minutes=3))
    assert heard == [(1, 429, "rate")]


@pytest.mark.django_db
def test_receiver_that_deletes_the_request_has_been_told(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    listen(request_attempted, lambda llm_request: llm_request.delete())
    post_callback(LLMRequest.objects.publish(MESSAGES), attempted(429))
    assert triggers.announce_attempts("default") == 1
    assert not LLMRequest.objects.exists()


@pytest.mark.django_db
def test_of_two_workers_that_tell_an_attempt_the_first_to_be_done_counts(
    qstash: FakeQStash, listen: Any, post_callback: Callable[..., Any]
) -> None:
    def hear(llm_request: LLMRequest) -> None:
        Group.objects.create(name="effect")
        # Another took over, this one having been asleep, and was done.
        CallbackResponse.objects.update(to_announce=False)

    listen(request_attempted, hear)
    post_callback(LLMRequest.objects.publish(MESSAGES), attempted(429))
    triggers.announce_attempts("default")
    assert Group.objects.count() == 0
