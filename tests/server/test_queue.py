"""First in, first out: whose turn it is."""

from __future__ import annotations

import httpx
import pytest

from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Message, Outcome, Queue

from .conftest import CALLBACK, FAILURE, PROVIDER, Api, Clock, Wire, state


def claimed(clock: Clock, limit: int = 10) -> list[Message]:
    return Message.objects.claim(engine="test:1:1", limit=limit, now=clock(), lease=3600)


def ids(messages: list[Message]) -> list[str]:
    return [message.message_id for message in messages]


def end(message: Message, clock: Clock, status: int = 200) -> None:
    assert message.record(Outcome(status=status), now=clock())


def test_messages_of_a_queue_go_one_after_the_other(api: Api, clock: Clock) -> None:
    queued = [api.enqueue("q") for _ in range(3)]
    for expected in queued:
        [message] = claimed(clock)
        assert message.message_id == expected
        assert claimed(clock) == []
        end(message, clock)
    assert claimed(clock) == []


def test_queues_do_not_wait_for_each_other_nor_others_for_them(api: Api, clock: Clock) -> None:
    first, _, other, free = api.enqueue("a"), api.enqueue("a"), api.enqueue("b"), api.published()
    assert sorted(ids(claimed(clock))) == sorted([first, other, free])


def test_the_next_one_waits_for_all_retries(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(500), httpx.Response(200))
    first, second = (api.enqueue("q", Upstash_Retries="2") for _ in range(2))
    assert engine.deliver_due() == 1
    assert (state(first), state(second)) == ("RETRY", "CREATED")
    clock.advance(13)
    assert engine.deliver_due() == 1
    assert (state(first), state(second)) == ("RETRY", "CREATED")
    clock.advance(149)
    assert engine.deliver_due() == 2
    assert (state(first), state(second)) == ("DELIVERED", "DELIVERED")
    order = [request.headers["Upstash-Message-Id"] for request in wire.requests]
    assert order == [first, first, first, second]


def test_the_next_one_starts_when_the_one_before_has_failed_for_good(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    first, second = (api.enqueue("q", Upstash_Retries="0") for _ in range(2))
    assert engine.deliver_due() == 2
    assert (state(first), state(second)) == ("FAILED", "DELIVERED")


@pytest.mark.parametrize("status", [200, 500])
def test_the_next_one_waits_for_the_callbacks_of_the_one_before(
    api: Api, clock: Clock, status: int
) -> None:
    first = api.enqueue(
        "q", Upstash_Retries="0", Upstash_Callback=CALLBACK, Upstash_Failure_Callback=FAILURE
    )
    second = api.enqueue("q")
    [message] = claimed(clock)
    assert message.message_id == first
    end(message, clock, status)
    callbacks = claimed(clock)
    assert {callback.url for callback in callbacks} <= {CALLBACK, FAILURE}
    assert len(callbacks) == (1 if status == 200 else 2)
    for callback in callbacks:
        assert claimed(clock) == []
        end(callback, clock)
    assert ids(claimed(clock)) == [second]


def test_parallelism_lets_so_many_go_at_once(api: Api, clock: Clock) -> None:
    api.post("/v2/queues", {"queueName": "q", "parallelism": 2})
    queued = [api.enqueue("q") for _ in range(4)]
    running = claimed(clock)
    assert ids(running) == queued[:2]
    end(running[1], clock)
    [third] = claimed(clock)
    assert third.message_id == queued[2]
    assert claimed(clock) == []


def test_fewer_claims_than_places_leave_places_free(api: Api, clock: Clock) -> None:
    api.post("/v2/queues", {"queueName": "q", "parallelism": 3})
    queued = [api.enqueue("q") for _ in range(3)]
    assert ids(claimed(clock, limit=2)) == queued[:2]
    assert ids(claimed(clock, limit=2)) == queued[2:]


def test_a_paused_queue_accepts_and_delivers_nothing(api: Api, engine: Engine) -> None:
    api.post("/v2/queues", {"queueName": "q", "paused": True})
    queued = [api.enqueue("q") for _ in range(2)]
    assert engine.deliver_due() == 0
    api.post("/v2/queues/q/resume")
    assert engine.deliver_due() == 2
    assert [state(message_id) for message_id in queued] == ["DELIVERED"] * 2


def test_a_pause_holds_retries_too(api: Api, engine: Engine, wire: Wire, clock: Clock) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    message_id = api.enqueue("q")
    engine.deliver_due()
    api.post("/v2/queues/q/pause")
    clock.advance(60)
    assert engine.deliver_due() == 0
    assert Message.objects.next_due_at() is None
    api.post("/v2/queues/q/resume")
    engine.deliver_due()
    assert state(message_id) == "DELIVERED"


def test_a_cancelled_message_gives_its_turn_away(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    first, second, third = (api.enqueue("q") for _ in range(3))
    engine.deliver_due()
    assert state(first) == "RETRY"
    api.delete("/v2/messages", {"messageIds": [first, second]})
    engine.deliver_due()
    assert state(third) == "DELIVERED"


def test_an_engine_that_died_keeps_its_place_in_the_queue(api: Api, clock: Clock) -> None:
    first, second = api.enqueue("q"), api.enqueue("q")
    Message.objects.claim(engine="dead:1:1", limit=1, now=clock(), lease=30)
    clock.advance(31)
    [again] = claimed(clock)
    assert again.message_id == first
    end(again, clock)
    assert ids(claimed(clock)) == [second]


def test_a_dead_letter_of_a_queue_is_retried_at_its_end(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    api.enqueue("q", Upstash_Retries="0")
    engine.deliver_due(limit=1)
    waiting = api.enqueue("q")
    [letter] = api.get("/v2/dlq?queueName=q").json()["messages"]
    retried = api.post(f"/v2/dlq/retry/{letter['dlqId']}").json()["messageId"]
    engine.deliver_due()
    order = [request.headers["Upstash-Message-Id"] for request in wire.to(PROVIDER)]
    assert order[1:] == [waiting, retried]


def test_a_queue_waits_for_no_dead_callback_that_is_retried(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answer = lambda request: httpx.Response(500 if str(request.url) == CALLBACK else 200)
    api.enqueue("q", Upstash_Callback=CALLBACK, Upstash_Callback_Retries="0")
    engine.deliver_due()
    [letter] = api.get("/v2/dlq").json()["messages"]
    headers = {"Upstash-Retries": "3"}
    again = api.post(f"/v2/dlq/retry/{letter['dlqId']}", headers=headers).json()["messageId"]
    engine.deliver_due()
    assert state(again) == "RETRY"
    following = api.enqueue("q")
    engine.deliver_due()
    assert state(following) == "DELIVERED"


def test_the_lag_is_what_is_not_finished(api: Api, engine: Engine, clock: Clock) -> None:
    for _ in range(3):
        api.enqueue("q")
    [message] = claimed(clock)
    assert api.get("/v2/queues/q").json()["lag"] == 3
    end(message, clock)
    assert api.get("/v2/queues/q").json()["lag"] == 2
    engine.deliver_due()
    assert api.get("/v2/queues/q").json()["lag"] == 0
    assert Queue.objects.count() == 1
