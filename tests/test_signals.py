from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.db import transaction
from django.dispatch import Signal

from django_qstash_llm import triggers
from django_qstash_llm.models import LLMRequest
from django_qstash_llm.qstash import Callback
from django_qstash_llm.signals import request_completed, request_failed, request_submitted

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
