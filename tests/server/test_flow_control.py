"""Flow control: so many in flight, so many started per period, and the rest wait."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.utils import timezone

from django_qstash_llm.qstash import FlowControl
from django_qstash_llm.server import doorbell, tasks
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import FlowControlKey, Message, Outcome

from .conftest import CALLBACK, Api, Clock, Wire, at_once, state

SUCCESS = Outcome(status=200)


def published(api: Api, value: str, key: str = "k", **headers: str) -> str:
    return api.published(Upstash_Flow_Control_Key=key, Upstash_Flow_Control_Value=value, **headers)


def shown(api: Api, key: str = "k") -> dict[str, Any]:
    answer = api.get(f"/v2/flowControl/{key}")
    assert answer.status_code == 200, answer.content
    return answer.json()


def claim(clock: Clock, limit: int = 100) -> list[str]:
    rows = Message.objects.claim(engine="elsewhere:1:1", limit=limit, now=clock(), lease=1000)
    return [row.message_id for row in rows]


# --- parallelism ---------------------------------------------------------------------------------


def test_no_more_are_in_flight_than_the_key_allows(api: Api, clock: Clock) -> None:
    ids = [published(api, "parallelism=2") for _ in range(5)]
    assert claim(clock) == ids[:2]
    assert claim(clock) == []
    Message.objects.get(message_id=ids[0]).record(SUCCESS, now=clock())
    assert claim(clock) == ids[2:3]
    assert shown(api)["waitListSize"] == 2
    assert shown(api)["parallelismCount"] == 2


def test_keys_are_counted_apart_and_over_all_urls(api: Api, clock: Clock) -> None:
    first = published(api, "parallelism=1", "a")
    published(api, "parallelism=1", "a", Upstash_Method="PUT")
    other = published(api, "parallelism=1", "b")
    plain = api.published()
    assert set(claim(clock)) == {first, other, plain}


def test_a_message_that_failed_gives_its_place_to_others_while_it_waits(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    failing = published(api, "parallelism=1", Upstash_Retry_Delay="60000")
    other = published(api, "parallelism=1")
    assert engine.deliver_due() == 2
    assert (state(failing), state(other)) == ("RETRY", "DELIVERED")
    assert engine.deliver_due() == 0
    clock.advance(61)
    assert engine.deliver_due() == 1
    assert state(failing) == "DELIVERED"


def test_a_delayed_message_joins_the_others_when_its_time_has_come(
    api: Api, engine: Engine, clock: Clock
) -> None:
    message_id = published(api, "rate=1, period=10s", Upstash_Delay="30s")
    assert shown(api)["waitListSize"] == 0
    first = published(api, "rate=1, period=10s")
    assert engine.deliver_due() == 1
    assert state(first) == "DELIVERED"
    clock.advance(31)
    published(api, "rate=1, period=10s")
    assert engine.deliver_due() == 1
    # The older first.
    assert state(message_id) == "DELIVERED"


def test_a_claim_whose_engine_died_takes_its_turn_again(api: Api, clock: Clock) -> None:
    ids = [published(api, "parallelism=1") for _ in range(2)]
    assert claim(clock) == ids[:1]
    clock.advance(999)
    assert claim(clock) == []
    clock.advance(2)
    assert claim(clock) == ids[:1]
    assert Message.objects.get(message_id=ids[0]).interruptions == 1


def test_a_callback_may_have_a_key_of_its_own(api: Api, engine: Engine, wire: Wire) -> None:
    for _ in range(3):
        api.published(
            Upstash_Callback=CALLBACK,
            Upstash_Callback_Flow_Control_Key="callbacks",
            Upstash_Callback_Flow_Control_Value="rate=1, period=1h",
        )
    assert engine.deliver_due() == 4
    assert len(wire.to(CALLBACK)) == 1
    assert shown(api, "callbacks")["waitListSize"] == 2


# --- rate ----------------------------------------------------------------------------------------


def test_no_more_are_started_in_a_period_than_the_rate_says(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    for _ in range(7):
        published(api, "rate=3, period=1m")
    assert engine.deliver_due() == 3
    assert shown(api)["rateCount"] == 3
    clock.advance(59)
    assert engine.deliver_due() == 0
    clock.advance(2)
    assert engine.deliver_due() == 3
    clock.advance(60)
    assert engine.deliver_due() == 1
    assert len(wire.requests) == 7


def test_retries_count_as_well(api: Api, engine: Engine, wire: Wire, clock: Clock) -> None:
    wire.answers(httpx.Response(500, headers={"Retry-After": "0"}))
    published(api, "rate=3, period=1m", Upstash_Retries="5")
    assert engine.deliver_due() == 3
    clock.advance(61)
    assert engine.deliver_due() == 3
    assert len(wire.requests) == 6


def test_rate_and_parallelism_hold_together(api: Api, clock: Clock) -> None:
    ids = [published(api, "rate=3, parallelism=2, period=1m") for _ in range(6)]
    assert claim(clock) == ids[:2]
    for message_id in ids[:2]:
        Message.objects.get(message_id=message_id).record(SUCCESS, now=clock())
    # Two are free, but only one of this minute's is left.
    assert claim(clock) == ids[2:3]
    assert claim(clock) == []


@pytest.mark.django_db(transaction=True)
def test_whoever_drains_is_told_when_the_next_window_opens(api: Api, wire: Wire) -> None:
    with doorbell.listening(threading.Event()):
        for _ in range(4):
            published(api, "rate=2, period=1s")
    engine = Engine()
    began = time.monotonic()
    wait = engine.drain()
    engine.close()
    # What the window of a second holds back is told to whoever called, not waited for here.
    assert wait is not None
    assert 0 < wait <= 1
    assert time.monotonic() - began < 1
    assert len(wire.requests) == 2


# --- one after the other, and flow control -------------------------------------------------------


def test_a_message_in_a_queue_waits_for_its_turn_and_then_for_its_key(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    flow = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "rate=1, period=1m"}
    first = api.enqueue("q", **flow)
    second = api.enqueue("q", "https://second.test/", **flow)
    other = api.enqueue("other", "https://other.test/")
    assert engine.deliver_due() == 2
    assert {state(first), state(other)} == {"DELIVERED"}
    assert state(second) == "CREATED"
    assert shown(api)["waitListSize"] == 1
    clock.advance(61)
    assert engine.deliver_due() == 1
    assert state(second) == "DELIVERED"


def test_a_paused_queue_holds_who_waits_for_a_key_as_well(
    api: Api, engine: Engine, clock: Clock
) -> None:
    flow = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "rate=1, period=1m"}
    published(api, "rate=1, period=1m")
    queued = api.enqueue("q", **flow)
    assert engine.deliver_due() == 1
    api.post("/v2/queues/q/pause")
    clock.advance(61)
    assert engine.deliver_due() == 0
    api.post("/v2/queues/q/resume")
    assert engine.deliver_due() == 1
    assert state(queued) == "DELIVERED"


def test_what_waits_for_a_key_is_cancelled_at_once(api: Api, engine: Engine) -> None:
    message_id = published(api, "parallelism=1")
    assert api.delete(f"/v2/messages/{message_id}").json() == {"cancelled": 1}
    assert state(message_id) == "CANCELED"
    assert engine.deliver_due() == 0
    assert shown(api)["waitListSize"] == 0


# --- the key -------------------------------------------------------------------------------------


def test_a_key_is_there_as_soon_as_a_message_brought_it(api: Api) -> None:
    assert api.get("/v2/flowControl/k").status_code == 404
    published(api, "rate=4, parallelism=3, period=1h30m3s")
    assert shown(api) == {
        "flowControlKey": "k",
        "waitListSize": 1,
        "parallelismMax": 3,
        "parallelismCount": 0,
        "rateMax": 4,
        "rateCount": 0,
        "ratePeriod": 5403,
        "ratePeriodStart": 0,
        "isPaused": False,
        "isPinnedParallelism": False,
        "isPinnedRate": False,
    }


def test_the_latest_messages_values_count(api: Api, clock: Clock) -> None:
    ids = [published(api, "parallelism=1") for _ in range(3)]
    assert claim(clock) == ids[:1]
    published(api, "rate=7, period=2s")
    told = shown(api)
    assert (told["parallelismMax"], told["rateMax"], told["ratePeriod"]) == (0, 7, 2)
    assert claim(clock)[:2] == ids[1:]


def test_another_period_counts_at_once_from_when_the_window_began(
    api: Api, engine: Engine, clock: Clock
) -> None:
    began = time.time()
    published(api, "rate=1, period=1h")
    engine.deliver_due()
    waiting = published(api, "rate=1, period=10s")
    told = shown(api)
    assert (told["ratePeriod"], told["rateCount"]) == (10, 1)
    assert told["ratePeriodStart"] == pytest.approx(began, abs=5)
    assert engine.deliver_due() == 0
    clock.advance(11)
    engine.deliver_due()
    assert state(waiting) == "DELIVERED"
    longer = published(api, "rate=1, period=1h")
    clock.advance(60)
    assert engine.deliver_due() == 0
    clock.advance(3600)
    engine.deliver_due()
    assert state(longer) == "DELIVERED"


def test_a_period_that_two_messages_bring_at_once_moves_the_window_once(
    api: Api, engine: Engine
) -> None:
    published(api, "rate=1, period=1h")
    engine.deliver_due()
    first, second = FlowControlKey.objects.get(), FlowControlKey.objects.get()
    ends_at = first.window_ends_at
    value = FlowControl(key="k", rate=1, period=10)
    assert first.adopt(value, now=timezone.now())
    assert not second.adopt(value, now=timezone.now())
    assert ends_at is not None
    assert FlowControlKey.objects.get().window_ends_at == ends_at - timedelta(seconds=3590)


def test_keys_are_listed_and_searched(api: Api) -> None:
    for key in ("openai-a", "openai-b", "other"):
        published(api, "parallelism=1", key)

    def listed(query: str = "") -> list[str]:
        return [each["flowControlKey"] for each in api.get(f"/v2/flowControl{query}").json()]

    assert listed() == ["openai-a", "openai-b", "other"]
    assert listed("?search=openai") == ["openai-a", "openai-b"]
    assert listed("?search=none") == listed("?search=a%25b") == []


def test_a_paused_key_takes_messages_and_delivers_none(api: Api, engine: Engine) -> None:
    published(api, "parallelism=5")
    assert api.post("/v2/flowControl/k/pause").status_code == 200
    assert api.post("/v2/flowControl/k/pause").status_code == 200
    published(api, "parallelism=5")
    assert engine.deliver_due() == 0
    assert (shown(api)["isPaused"], shown(api)["waitListSize"]) == (True, 2)
    assert api.post("/v2/flowControl/k/resume").status_code == 200
    assert engine.deliver_due() == 2
    assert shown(api)["isPaused"] is False


def test_a_key_can_be_paused_before_the_first_message_comes(api: Api, engine: Engine) -> None:
    assert api.post("/v2/flowControl/k/pause").status_code == 200
    published(api, "parallelism=5")
    assert engine.deliver_due() == 0


def test_pinned_values_hold_whatever_messages_bring(api: Api, engine: Engine) -> None:
    published(api, "rate=9, parallelism=9")
    engine.deliver_due()
    assert shown(api)["rateCount"] == 1
    assert api.post("/v2/flowControl/k/pin?parallelism=2&rate=3&period=60").status_code == 200
    published(api, "rate=9, parallelism=9")
    told = shown(api)
    assert (told["parallelismMax"], told["rateMax"], told["ratePeriod"]) == (2, 3, 60)
    assert (told["isPinnedParallelism"], told["isPinnedRate"]) == (True, True)
    # Pinning begins to count anew.
    assert told["rateCount"] == 0
    assert api.post("/v2/flowControl/k/unpin?rate=true").status_code == 200
    told = shown(api)
    assert (told["isPinnedParallelism"], told["isPinnedRate"], told["rateMax"]) == (True, False, 3)
    published(api, "rate=9, parallelism=9")
    told = shown(api)
    assert (told["parallelismMax"], told["rateMax"], told["ratePeriod"]) == (2, 9, 1)


def test_a_reset_forgets_what_was_counted(api: Api, engine: Engine) -> None:
    for _ in range(3):
        published(api, "rate=1, period=1h")
    assert engine.deliver_due() == 1
    assert api.post("/v2/flowControl/k/resetRate").status_code == 200
    told = shown(api)
    assert told["rateCount"] == 0
    assert told["ratePeriodStart"] == pytest.approx(time.time(), abs=5)
    assert engine.deliver_due() == 1


@pytest.mark.parametrize(
    "call",
    [
        "k/pin",
        "k/pin?period=5",
        "k/pin?parallelism=0",
        "k/pin?rate=x",
        "k/pin?rate=1&period=604801",
        "k/unpin?rate=maybe",
        "a%20b/pause",
    ],
)
def test_what_makes_no_sense_is_refused_and_makes_no_key(api: Api, call: str) -> None:
    answer = api.post(f"/v2/flowControl/{call}")
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert not FlowControlKey.objects.exists()


def test_what_is_in_flight_over_all_keys_is_told(api: Api, clock: Clock) -> None:
    for key in ("a", "b"):
        published(api, "parallelism=1", key)
        published(api, "parallelism=1", key)
    claim(clock)
    assert api.get("/v2/globalParallelism").json() == {
        "parallelismMax": 1000,
        "parallelismCount": 2,
    }


def test_a_key_nobody_needs_any_more_is_forgotten_and_comes_back(api: Api) -> None:
    published(api, "parallelism=1", "done")
    published(api, "parallelism=1", "waits", Upstash_Delay="30d")
    published(api, "parallelism=1", "pinned")
    api.post("/v2/flowControl/pinned/pin?parallelism=1")
    tasks.sweep()
    FlowControlKey.objects.update(updated_at=timezone.now() - timedelta(days=2))
    tasks.sweep()
    assert list(FlowControlKey.objects.values_list("key", flat=True)) == ["pinned", "waits"]
    again = published(api, "parallelism=1", "done")
    tasks.sweep()
    assert state(again) == "DELIVERED"


def test_a_key_that_is_in_use_is_seen_and_not_forgotten(api: Api) -> None:
    published(api, "parallelism=1")
    FlowControlKey.objects.update(updated_at=timezone.now() - timedelta(hours=2))
    published(api, "parallelism=1")
    assert FlowControlKey.objects.get().updated_at > timezone.now() - timedelta(minutes=1)


# --- many engines at once ------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_engines_at_once_never_start_more_than_the_key_allows(api: Api) -> None:
    with doorbell.listening(threading.Event()):
        for _ in range(30):
            published(api, "parallelism=5, rate=8, period=1h")

    def claims(number: int) -> list[str]:
        rows = Message.objects.claim(engine=f"e:{number}:1", limit=10, now=timezone.now())
        return [row.message_id for row in rows]

    taken = [message_id for each in at_once(8, claims) for message_id in each]
    assert len(taken) == len(set(taken)) == 5
    for message_id in taken:
        Message.objects.get(message_id=message_id).record(SUCCESS, now=timezone.now())
    later = [message_id for each in at_once(8, claims) for message_id in each]
    assert len(later) == 3
    assert not set(later) & set(taken)
