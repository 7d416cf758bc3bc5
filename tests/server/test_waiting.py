from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from django_qstash_llm.qstash import FlowControl, Options
from django_qstash_llm.qstash import Message as WireMessage
from django_qstash_llm.server.models import Admitted, FlowControlKey, Message, Queue
from django_qstash_llm.server.waiting import reasons

from .conftest import PROVIDER

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 5, 4, 14, 2, 0, tzinfo=UTC)
ENGINE = "host.name/4026:812:99"


@pytest.fixture(autouse=True)
def in_utc(settings: object) -> None:
    with override_settings(TIME_ZONE="UTC"):
        yield


def accepted(queue: str = "", *, now: datetime = NOW, **options: object) -> Message:
    wire = WireMessage(PROVIDER, b"x", options=Options(**options), queue=queue)  # type: ignore[arg-type]
    [answer] = Message.objects.accept([Admitted(wire)], account="", caller_ip="", now=now)
    return Message.objects.get(message_id=answer.message_id)


def reason(message: Message, now: datetime = NOW) -> str:
    row = Message.objects.select_related("queue").get(pk=message.pk)
    return reasons([row], now=now)[row.pk]


def claim(limit: int = 1, *, now: datetime = NOW, lease: float = 30) -> list[Message]:
    return Message.objects.claim(engine=ENGINE, limit=limit, now=now, lease=lease)


def test_its_time() -> None:
    message = accepted(delay=3600)
    assert reason(message) == "delayed until 15:02:00"
    assert reason(message, NOW + timedelta(hours=2)) == "an engine to take it: due since 15:02:00"


def test_a_time_of_another_day_has_its_date() -> None:
    assert reason(accepted(delay=86_400)) == "delayed until 05/05/2026 14:02:00"


def test_a_retry() -> None:
    message = accepted()
    Message.objects.filter(pk=message.pk).update(
        retried=2, state="RETRY", due_at=NOW + timedelta(minutes=3)
    )
    assert reason(message) == "retry 2 of 3 at 14:05:00"


def test_an_answer() -> None:
    message = accepted()
    claim()
    assert reason(message) == "in flight since 14:02:00, held by host.name, process 812"
    later = NOW + timedelta(seconds=31)
    assert reason(message, later).endswith("process 812, of whom nothing is heard")
    Message.objects.cancel(now=NOW)
    assert reason(message).endswith("process 812; not tried again: cancelled")


def test_a_turn_in_a_queue() -> None:
    first, second, third = (accepted("summaries") for _ in range(3))
    assert reason(first) == "turn in queue summaries, next"
    assert reason(third) == "turn in queue summaries, 2 before it"
    Queue.objects.get().pause(now=NOW)
    assert reason(second) == "queue summaries is paused"


def test_flow_control_that_is_full() -> None:
    messages = [accepted(flow_control=FlowControl(key="openai", parallelism=2)) for _ in range(3)]
    assert reason(messages[2]) == "flow control openai: there is room, an engine takes it next"
    claim(5)
    assert reason(messages[2]) == "flow control openai: 2 of 2 in flight"
    FlowControlKey.objects.get().pause(now=NOW)
    assert reason(messages[2]) == "flow control openai is paused"


def test_flow_control_until_the_next_window() -> None:
    rate = FlowControl(key="openai", rate=1, period=72)
    messages = [accepted(flow_control=rate) for _ in range(2)]
    claim(5)
    shown = reason(messages[1])
    assert shown == "flow control openai: 1 of 1 started, next window 14:03:12"
    later = NOW + timedelta(seconds=72)
    assert reason(messages[1], later).endswith("there is room, an engine takes it next")


def test_nothing() -> None:
    message = accepted()
    Message.objects.all().end(Message.State.DELIVERED, now=NOW)
    assert reason(message) == ""


def test_many_take_the_same_queries_as_one_of_each() -> None:
    def queries() -> int:
        for number in range(3):
            accepted(f"q{number}")
            key = FlowControl(key=f"k{number}", parallelism=1)
            [accepted(flow_control=key) for _ in range(2)]
            accepted(delay=60)
            accepted()
        claim(2)
        rows = list(Message.objects.select_related("queue"))
        with CaptureQueriesContext(connection) as captured:
            reasons(rows, now=NOW)
        return len(captured)

    assert queries() == queries() == 3
