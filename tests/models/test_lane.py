from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from django.conf import settings as site
from django.db import transaction
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.exceptions import IllegalState, InvalidRequest
from django_qstash_llm.models import CallbackResponse, Lane, LLMRequest
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.lane import (
    LEARN_AGAIN,
    LEARN_ANEW,
    LEARNED_FOR,
    LONGEST_PAUSE,
    TELL_SECONDS,
    UNKNOWN_PAUSE,
    learn_from,
)
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.qstash import FlowControl, Message, Options
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import FlowControlKey, Queue
from django_qstash_llm.server.models import Message as StoredMessage
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

from .test_outbox import NOW, Clock

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "How many roads?"}]
KEY = "llm.openai.gpt-5.4-mini"
NO_MONEY = {
    "error": {
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
}
TOO_FAST = {"error": {"message": "Rate limit reached.", "code": "rate_limit_exceeded"}}
DONE = json.dumps(ANSWER).encode()


def ours(**changed: Any) -> Any:
    """Our settings, changed. ``pace`` is the FLOW_CONTROL of the provider openai."""
    providers = {name: dict(options) for name, options in site.QSTASH_LLM["PROVIDERS"].items()}
    if (pace := changed.pop("pace", None)) is not None:
        providers["openai"]["FLOW_CONTROL"] = pace
        changed.setdefault("FLOW_CONTROL", "configured")
    return override_settings(QSTASH_LLM={**site.QSTASH_LLM, "PROVIDERS": providers, **changed})


PACED = {"PARALLELISM": 20, "RATE": 500, "PERIOD": 60}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(clock: Clock, qstash: FakeQStash) -> Outbox:
    return Outbox(clock=clock)


def ask(**asked: Any) -> LLMRequest:
    if "queue" in asked:
        return LLMRequest.objects.enqueue(MESSAGES, **asked)
    return LLMRequest.objects.publish(MESSAGES, **asked)


def lane(**scope: str) -> Lane:
    return Lane.objects.named(**scope)


def paces_sent(qstash: FakeQStash) -> list[FlowControl | None]:
    return [
        Options.from_headers(
            {name.lower(): value for name, value in item["headers"].items()}
        ).flow_control
        for item in qstash.messages
    ]


def attempt(
    status: int,
    body: Any = b"",
    *,
    at: datetime = NOW,
    header: dict[str, list[str]] | None = None,
    **asked: Any,
) -> CallbackResponse:
    """The receipt of one, of a request of its own."""
    row = ask(**asked)
    return CallbackResponse.objects.create(
        uuid=row.uuid,
        llm_request=row,
        kind=Kind.CALLBACK,
        source_message_id=f"msg_{row.pk}",
        status=status,
        received_at=at,
        header=header or {},
        body=body if isinstance(body, bytes) else json.dumps(body).encode(),
    )


def slow_down(seconds: int, **fields: Any) -> CallbackResponse:
    return attempt(429, TOO_FAST, header={"Retry-After": [str(seconds)]}, **fields)


def deliver_everything() -> None:
    """What QStash does when the time of every retry has come."""
    StoredMessage.objects.filter(due_at__gt=timezone.now()).update(due_at=timezone.now())
    engine = Engine()
    engine.deliver_due()
    engine.close()


# --- what is pending ---


@pytest.mark.parametrize(
    ("scope", "others"),
    [
        ({"provider": "openai"}, {"provider": "anthropic"}),
        ({"model": "m"}, {"model": "n"}),
        ({"tenant": "acme"}, {"tenant": "other"}),
        ({"queue": "slow"}, {"queue": "quick"}),
        ({"provider": "openai", "model": "m"}, {"provider": "anthropic", "model": "m"}),
        ({"model": "m", "tenant": "acme"}, {"model": "m", "tenant": ""}),
        ({"provider": "openai", "queue": "slow"}, {"provider": "openai", "queue": "quick"}),
    ],
)
def test_a_paused_lane_holds_what_is_of_it_and_nothing_else(
    outbox: Outbox, qstash: FakeQStash, scope: dict[str, str], others: dict[str, str]
) -> None:
    paused = lane(**scope)
    paused.pause(by="ada", now=NOW)
    held, free = ask(**{"model": "m", **scope}), ask(**{"model": "m", **others})
    assert outbox.submit() == 1
    assert list(paused.waiting()) == [held]
    assert [row.pk for row in LLMRequest.objects.submitted()] == [free.pk]
    paused.resume(by="ada", now=NOW)
    assert outbox.submit() == 1
    assert len(qstash.messages) == 2


def test_what_names_no_provider_is_of_the_default_ones_lane(outbox: Outbox) -> None:
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    for scope in ({"provider": "openai"}, {"model": "gpt-5.4-mini"}, {"provider": "openai"}):
        paused = lane(**scope)
        paused.pause(by="ada", now=NOW)
        assert (outbox.submit(), paused.waiting().count()) == (0, 1)
        assert Lane.objects.holding(LLMRequest.objects.get(), NOW) == paused
        paused.resume(by="ada", now=NOW)
    lane(provider="anthropic").pause(by="ada", now=NOW)
    assert outbox.submit() == 1


def test_nothing_of_a_queue_goes_before_what_a_paused_lane_holds_in_it(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    paused = lane(tenant="acme")
    paused.pause(by="ada", now=NOW)
    rows = [ask(queue="q", tenant=tenant) for tenant in ("", "acme", "", "acme")]
    ask(queue="another")
    outbox.submit()
    assert LLMRequest.objects.pending().count() == 3
    paused.resume(by="ada", now=NOW)
    outbox.submit()
    sent = [Message.from_batch_item(item) for item in qstash.messages]
    in_queue = [message.deduplication_id for message in sent if message.queue == "q"]
    assert in_queue == [row.deduplication_id for row in rows]


def test_a_pause_with_an_end_ends_by_itself(outbox: Outbox, clock: Clock) -> None:
    paused = lane(tenant="acme")
    paused.pause(by="ada", until=NOW + timedelta(hours=1), now=NOW)
    ask(tenant="acme")
    assert outbox.submit() == 0
    clock.forward(hours=1)
    assert outbox.submit() == 1
    assert Lane.objects.see_to(clock=clock) == 1
    paused.refresh_from_db()
    assert (paused.is_paused, paused.resumed_at, paused.resumed_by) == (False, clock.now, "")


def test_many_paused_lanes_are_one_condition(
    outbox: Outbox, django_assert_max_num_queries: Any
) -> None:
    scopes = [{"tenant": f"t{n}"} for n in range(1500)]
    scopes += [{"tenant": f"t{n}", "model": "m"} for n in range(1500)]
    Lane.objects.bulk_create([Lane(**scope, paused_at=NOW) for scope in scopes])
    ask(tenant="t7")
    ask(tenant="free")
    with django_assert_max_num_queries(30):
        assert outbox.submit() == 1


@pytest.mark.django_db(transaction=True)
def test_resuming_rings_for_what_has_waited(qstash: FakeQStash) -> None:
    paused = lane(provider="openai")
    paused.pause(by="ada")
    row = ask()
    assert qstash.messages == []
    with transaction.atomic():
        paused.resume(by="ada")
        assert qstash.messages == []
    row.refresh_from_db()
    assert row.state == "submitted"


# --- a person's words ---


def test_a_pause_says_since_when_by_whom_and_why() -> None:
    paused = lane(provider="openai", model="m")
    assert (str(paused), paused.pause_in_words) == ("openai · model m", "")
    paused.pause(by="ada", reason="moving to another key", now=NOW)
    assert paused.pause_in_words == (
        "Lane openai · model m is paused since 2026-03-01 06:00:00-06:00 by ada: "
        "moving to another key"
    )
    until = NOW + timedelta(hours=1)
    paused.pause(by="bob", until=until, now=NOW + timedelta(minutes=1))
    # Since when stays; who spoke last is heard.
    assert paused.pause_in_words == (
        "Lane openai · model m is paused from 2026-03-01 06:00:00-06:00 until "
        "2026-03-01 07:00:00-06:00 by bob: no reason given"
    )
    paused.resume(by="carol", now=until)
    assert (paused.pause_in_words, paused.resumed_by, paused.resumed_at) == ("", "carol", until)


def test_what_is_not_paused_is_not_resumed() -> None:
    with pytest.raises(IllegalState, match="Lane tenant acme is not paused"):
        lane(tenant="acme").resume(by="ada")


@pytest.mark.parametrize(
    ("scope", "field", "problem"),
    [
        ({}, "provider", "name at least one of provider, model, tenant, queue"),
        ({"tenant": ""}, "provider", "name at least one"),
        ({"provider": "opnai"}, "provider", "there are anthropic, openai, upstash"),
        ({"queue": "a b"}, "queue", "not a name"),
        ({"tenant": "x" * 256}, "tenant", "at most 255"),
        ({"tenant": "a\0b"}, "tenant", "at most 255"),
        ({"model": 7}, "model", "give a text"),
        ({"user": "ada"}, "user", "give provider, model, tenant, queue"),
    ],
)
def test_a_lane_of_nothing_is_refused_and_the_error_names_the_field(
    scope: Any, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem) as told:
        lane(**scope)
    assert told.value.field == field
    assert not Lane.objects.exists()


def test_an_end_that_has_passed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"until: .* has passed"):
        lane(tenant="acme").pause(by="ada", until=NOW, now=NOW)


# --- pace ---


def test_nothing_is_paced_unless_the_settings_say_so(outbox: Outbox, qstash: FakeQStash) -> None:
    with ours(pace=PACED, FLOW_CONTROL="off"):
        ask()
        outbox.submit()
    assert paces_sent(qstash) == [None]
    assert not Lane.objects.exists()


def test_a_provider_is_asked_at_its_pace(outbox: Outbox, qstash: FakeQStash) -> None:
    own = FlowControl(key="mine", rate=1)
    with ours(pace=PACED):
        ask()
        ask(model="meta/llama 3", delay=60)
        ask(flow_control=own)
        ask(provider="anthropic")
        outbox.submit()
    first, second, third, fourth = paces_sent(qstash)
    assert first == FlowControl(key=KEY, parallelism=20, rate=500, period=60)
    assert second is not None
    assert second.key.startswith("llm.openai.meta-llama-3-")
    assert (third, fourth) == (own, None)
    assert sorted(Lane.objects.values_list("key", flat=True)) == sorted([KEY, second.key])


def test_models_of_a_group_share_a_pace(outbox: Outbox, qstash: FakeQStash) -> None:
    groups = {"five": {"MODELS": ["a", "b"], "RATE": 1000}}
    with ours(pace={**PACED, "GROUPS": groups}):
        for model in ("a", "b", "c"):
            ask(model=model)
        outbox.submit()
    of_group = FlowControl(key="llm.openai.group.five", parallelism=20, rate=1000, period=60)
    of_c = FlowControl(key="llm.openai.c", parallelism=20, rate=500, period=60)
    assert paces_sent(qstash) == [of_group, of_group, of_c]


def test_pacing_asks_the_database_once_for_a_model(
    outbox: Outbox, django_assert_max_num_queries: Any
) -> None:
    with ours(pace=PACED):
        ask()
        outbox.submit()
        LLMRequest.objects.bulk_create(
            [
                LLMRequest(messages=MESSAGES, provider="openai", model="gpt-5.4-mini", retries=1)
                for _ in range(900)
            ]
        )
        with django_assert_max_num_queries(930):  # on SQLite each row is written by itself
            outbox.submit()
    assert Lane.objects.count() == 1


# --- what is with QStash: our own server ---


def holds(key: str) -> bool:
    return FlowControlKey.objects.get(key=key).is_paused


@pytest.mark.django_db(transaction=True)
def test_pausing_a_provider_holds_what_qstash_has_of_it(wire: Wire) -> None:
    with ours(pace=PACED):
        ask()
        ask(model="other")
        paused = lane(provider="openai")
        paused.pause(by="ada")
        assert (holds(KEY), holds("llm.openai.other")) == (True, True)
        paused.resume(by="ada")
        assert (holds(KEY), holds("llm.openai.other")) == (False, False)
    assert not Lane.objects.exclude(is_held=False).exists()


@pytest.mark.django_db(transaction=True)
def test_pausing_a_model_leaves_the_others_of_its_provider(wire: Wire) -> None:
    with ours(pace=PACED):
        ask()
        ask(model="other")
        paused = lane(provider="openai", model="other")
        paused.pause(by="ada")
        assert (holds(KEY), holds("llm.openai.other")) == (False, True)
        # Of two pauses that hold the same thing, one is over.
        lane(provider="openai").pause(by="ada")
        paused.resume(by="ada")
        assert (holds(KEY), holds("llm.openai.other")) == (True, True)


@pytest.mark.django_db(transaction=True)
def test_a_key_that_models_share_is_held_when_all_of_them_are_paused(wire: Wire) -> None:
    with ours(pace={**PACED, "GROUPS": {"g": {"MODELS": ["a", "b"]}}}):
        lanes = []
        for model in ("a", "b"):
            ask(model=model)
            lanes.append(lane(provider="openai", model=model))
        for paused, is_held in zip(lanes, (False, True), strict=True):
            paused.pause(by="ada")
            assert FlowControlKey.objects.get().is_paused is is_held
        lanes[0].resume(by="ada")
        assert not FlowControlKey.objects.get().is_paused


@pytest.mark.django_db(transaction=True)
def test_pausing_a_queue_holds_it_at_qstash_and_resuming_keeps_its_order(wire: Wire) -> None:
    ask(queue="slow")
    paused = lane(queue="slow")
    paused.pause(by="ada")
    assert Queue.objects.get(name="slow").is_paused
    ask(queue="slow")
    paused.resume(by="ada")
    assert not Queue.objects.get(name="slow").is_paused
    in_order = [row.qstash_message_id for row in LLMRequest.objects.order_by("pk")]
    stored = StoredMessage.objects.filter(message_id__in=in_order).order_by("pk")
    assert list(stored.values_list("message_id", flat=True)) == in_order
    assert all(in_order)


def test_a_tenant_is_nothing_that_qstash_could_hold(qstash: FakeQStash) -> None:
    for scope in ({"tenant": "acme"}, {"queue": "q", "provider": "openai"}):
        lane(**scope).pause(by="ada")
    assert not Lane.objects.due(NOW).exists()


# --- telling QStash, which may not be there ---


def told(qstash: FakeQStash, answer: Callable[[httpx.Request], httpx.Response]) -> list[str]:
    qstash.answer = answer
    return qstash.calls


def untold(**fields: Any) -> Lane:
    return Lane.objects.create(
        provider="openai", model="m", key="k", paused_at=NOW, is_held=None, **fields
    )


def test_qstash_is_told_until_it_takes_it(qstash: FakeQStash, clock: Clock) -> None:
    held = untold()
    token = site.QSTASH_TOKEN
    calls = told(qstash, lambda request: httpx.Response(503, json={"error": f"no {token}"}))
    for tries in range(1, 12):
        assert Lane.objects.see_to(clock=clock) == 1
        assert Lane.objects.see_to(clock=clock) == 0
        held.refresh_from_db()
        pause = timedelta(seconds=min(LONGEST_PAUSE, 2**tries))
        assert (held.is_held, held.tell_after) == (None, clock.now + pause)
        assert "503" in held.tell_problem
        assert token not in held.tell_problem
        clock.now += pause
    qstash.answer = lambda request: httpx.Response(200)
    assert Lane.objects.see_to(clock=clock) == 1
    held.refresh_from_db()
    assert (held.is_held, held.tell_problem, held.tell_tries) == (True, "", 0)
    assert calls == ["POST /v2/flowControl/k/pause"] * 12
    assert not Lane.objects.due(clock.now + timedelta(days=1)).exists()


def test_what_qstash_knows_nothing_of_yet_is_held_a_little_later(
    qstash: FakeQStash, clock: Clock
) -> None:
    held = untold()
    calls = told(qstash, lambda request: qstash.not_found())
    for _ in range(3):
        assert Lane.objects.see_to(clock=clock) == 1
        held.refresh_from_db()
        assert (held.is_held, held.tell_problem) == (None, "")
        clock.now += UNKNOWN_PAUSE
    Lane.objects.filter(pk=held.pk).update(paused_at=None)
    assert Lane.objects.see_to(clock=clock) == 1  # there is nothing to let go
    held.refresh_from_db()
    assert (held.is_held, calls[-1]) == (False, "POST /v2/flowControl/k/resume")


def test_who_resumes_a_lane_while_qstash_is_told_of_its_pause_has_it_told_again(
    qstash: FakeQStash, clock: Clock
) -> None:
    held = untold()

    def resume_meanwhile(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/pause"):
            held.resume(by="ada", now=clock())
            assert Lane.objects.see_to(clock=clock) == 0  # the call under way comes first
        return httpx.Response(200)

    calls = told(qstash, resume_meanwhile)
    assert Lane.objects.see_to(clock=clock) == 1
    assert Lane.objects.see_to(clock=clock) == 1
    held.refresh_from_db()
    assert (held.is_held, calls[-1]) == (False, "POST /v2/flowControl/k/resume")


def test_what_a_dead_worker_was_telling_is_told_by_another(
    qstash: FakeQStash, clock: Clock
) -> None:
    told(qstash, lambda request: httpx.Response(200))
    untold(tell_after=NOW + timedelta(seconds=TELL_SECONDS))
    assert Lane.objects.see_to(clock=clock) == 0
    clock.forward(seconds=TELL_SECONDS)
    assert Lane.objects.see_to(clock=clock) == 1


def test_a_model_that_gets_its_key_after_its_provider_was_paused_is_held(
    qstash: FakeQStash, clock: Clock
) -> None:
    told(qstash, lambda request: httpx.Response(200))
    with ours(pace=PACED):
        outbox = Outbox(clock=clock)
        ask()
        claimed = outbox.claim(1)
        lane(provider="openai").pause(by="ada", now=NOW)
        list(outbox.compose(claimed))
    assert Lane.objects.get(key=KEY).is_held is None
    Lane.objects.see_to(clock=clock)
    assert Lane.objects.get(key=KEY).is_held is True


# --- money ---


def test_a_provider_without_money_is_paused_with_its_words(qstash: FakeQStash) -> None:
    learn_from([attempt(429, NO_MONEY)], now=NOW)
    paused = Lane.objects.get()
    assert (str(paused), paused.trouble, paused.paused_by) == ("openai", "money", "")
    assert (paused.paused_at, paused.paused_until) == (NOW, None)
    assert "exceeded your current quota" in paused.reason
    assert "then resume" in paused.remedy


@pytest.mark.django_db(transaction=True)
def test_what_a_provider_without_money_refused_is_answered_once_somebody_paid(wire: Wire) -> None:
    """Over our own server, from the refusal to the answer."""
    answers = [httpx.Response(429, json=NO_MONEY), httpx.Response(200, content=DONE)]
    wire.hosts["provider.test"] = lambda request: answers.pop(0)
    with ours(pace=PACED):
        row = ask()
        learn_from(CallbackResponse.objects.all())
        paused = Lane.objects.named(provider="openai")
        waiting = ask()
        deliver_everything()
        assert (len(answers), holds(KEY), paused.trouble) == (1, True, "money")

        paused.resume(by="ada")
        deliver_everything()
    ends = LLMRequest.objects.order_by("pk").values_list("pk", "state", "attempts")
    # Our own server asks once, and keeps what it was refused among the dead letters.
    assert list(ends) == [(row.pk, "failed", 1), (waiting.pk, "completed", 1)]
    assert not Lane.objects.exclude(is_held=False).exists()


def test_what_was_asked_before_a_person_resumed_does_not_pause_again(qstash: FakeQStash) -> None:
    receipts = [attempt(402, NO_MONEY, at=NOW + timedelta(seconds=n)) for n in range(4)]
    learn_from([receipts[0]], now=NOW)
    paused = Lane.objects.get()
    paused.resume(by="ada", now=NOW + timedelta(seconds=2))
    learn_from(receipts[:3], now=NOW + timedelta(seconds=9))
    paused.refresh_from_db()
    assert not paused.is_paused
    learn_from(receipts, now=NOW + timedelta(seconds=9))
    paused.refresh_from_db()
    assert (paused.trouble, paused.resumed_by) == ("money", "ada")


def test_a_callback_that_came_late_tells_when_the_provider_answered(qstash: FakeQStash) -> None:
    asked_at, now = NOW, NOW + timedelta(hours=1)
    lane(provider="openai").pause(by="ada", now=NOW - timedelta(hours=1))
    Lane.objects.get().resume(by="ada", now=NOW + timedelta(minutes=1))
    date = {"Date": [format_datetime(asked_at, usegmt=True)]}
    learn_from([attempt(402, NO_MONEY, at=now, header=date)], now=now)
    assert not Lane.objects.get().is_paused
    # A clock that is ahead is not believed, nor what is no date.
    for said in (format_datetime(now + timedelta(days=9), usegmt=True), "soon"):
        learn_from([attempt(402, NO_MONEY, at=now, header={"date": [said]})], now=now)
        assert Lane.objects.get().is_paused
        Lane.objects.get().resume(by="ada", now=NOW)


def test_a_persons_pause_keeps_its_words(qstash: FakeQStash) -> None:
    lane(provider="openai").pause(by="ada", reason="a new key", now=NOW)
    learn_from([attempt(402, NO_MONEY)], now=NOW)
    paused = Lane.objects.get()
    assert (paused.paused_by, paused.trouble, paused.reason) == ("ada", "", "a new key")


def test_a_key_in_the_providers_words_is_in_no_row_and_no_log(
    qstash: FakeQStash, caplog: pytest.LogCaptureFixture
) -> None:
    key = site.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
    body = {"error": {"message": f"No credit balance for {key}", "code": "insufficient_quota"}}
    with caplog.at_level(logging.INFO):
        learn_from([attempt(429, body)], now=NOW)
    assert "[redacted]" in Lane.objects.get().reason
    assert "Lane openai is paused" in caplog.text
    assert key not in caplog.text + Lane.objects.get().reason


def test_what_a_site_does_not_pause_for_goes_on(qstash: FakeQStash) -> None:
    with ours(PAUSE_ON=["rate"]):
        learn_from([attempt(402, NO_MONEY)], now=NOW)
    with ours(PAUSE_ON=()):
        learn_from([slow_down(600)], now=NOW)
    assert not Lane.objects.exists()


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500, 503, -1])
def test_other_answers_pause_nothing(qstash: FakeQStash, status: int) -> None:
    learn_from([attempt(status, DONE if status == 200 else b"")], now=NOW)
    assert not Lane.objects.exists()


# --- time ---


def test_a_long_wait_pauses_the_model_until_the_moment_that_was_named(qstash: FakeQStash) -> None:
    learn_from([slow_down(59)], now=NOW)
    assert not Lane.objects.exists()
    learn_from([slow_down(60)], now=NOW)
    paused = Lane.objects.get()
    assert str(paused) == "openai · model gpt-5.4-mini"
    assert (paused.trouble, paused.paused_until) == ("rate", NOW + timedelta(seconds=60))
    learn_from([slow_down(3600)], now=NOW)
    learn_from([slow_down(600)], now=NOW)
    paused.refresh_from_db()
    assert paused.paused_until == NOW + timedelta(hours=1)
    # In a moment to come it says nothing new.
    later = NOW + timedelta(hours=2)
    paused.resume(by="ada", now=NOW + timedelta(seconds=1))
    learn_from([slow_down(3600)], now=later)
    paused.refresh_from_db()
    assert not paused.is_paused


def test_a_days_quota_pauses_the_model_until_its_reset(qstash: FakeQStash) -> None:
    body = {"error": {"message": "Quota per day reached, please retry in 10h17m", "code": 429}}
    with ours(PAUSE_FROM=3600.0):
        learn_from([attempt(429, body)], now=NOW)
    paused = Lane.objects.get()
    assert (paused.trouble, paused.paused_until) == (
        "daily",
        NOW + timedelta(hours=10, minutes=17),
    )


def test_all_models_that_share_the_limit_wait(qstash: FakeQStash) -> None:
    with ours(pace={"RATE": 9, "GROUPS": {"g": {"MODELS": ["a", "b"]}}}):
        learn_from([slow_down(60, model="a")], now=NOW)
    assert sorted(map(str, Lane.objects.paused(NOW))) == ["openai · model a", "openai · model b"]


def test_a_person_who_resumes_ends_a_pause_of_time(qstash: FakeQStash) -> None:
    learn_from([slow_down(600)], now=NOW)
    Lane.objects.get().resume(by="ada", now=NOW + timedelta(seconds=1))
    learn_from([slow_down(600)], now=NOW + timedelta(seconds=2))
    assert not Lane.objects.get().is_paused


# --- limits ---


def says(limit: str = "600", reset: str = "1s", **fields: Any) -> CallbackResponse:
    """OpenAI's headers after one request in a bucket of ``limit`` a minute."""
    header = {
        "X-Ratelimit-Limit-Requests": [limit],
        "X-Ratelimit-Remaining-Requests": [str(int(limit) - int(limit) // 60)],
        "X-Ratelimit-Reset-Requests": [reset],
    }
    return attempt(200, DONE, header=header, **fields)


def learned() -> list[tuple[str, int | None, int | None]]:
    return [(str(row), row.learned_limit, row.learned_period) for row in Lane.objects.all()]


def test_limits_are_learned_where_the_settings_say_so(qstash: FakeQStash) -> None:
    for mode in ("off", "configured"):
        with ours(FLOW_CONTROL=mode):
            learn_from([says()], now=NOW)
    assert learned() == []
    with ours(FLOW_CONTROL="learned"):
        learn_from([says()], now=NOW)
    assert learned() == [("openai · model gpt-5.4-mini", 600, 60)]


def test_a_learned_limit_paces_what_leaves_with_a_share_of_it(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    with ours(FLOW_CONTROL="learned"):
        ask()
        outbox.submit()
        learn_from([says(model="m")], now=NOW)
        outbox.submit()
        clock.now += LEARNED_FOR
        ask(model="m")
        outbox.submit()
    assert paces_sent(qstash) == [None, FlowControl(key="llm.openai.m", rate=540, period=60), None]


@pytest.mark.parametrize(
    ("configured", "sent"),
    [({"RATE": 100, "PERIOD": 60}, (100, 60)), ({"RATE": 10}, (540, 60)), ({}, (540, 60))],
)
def test_of_what_is_learned_and_what_is_configured_the_slower_counts(
    outbox: Outbox, qstash: FakeQStash, configured: Any, sent: tuple[int, int]
) -> None:
    with ours(pace={"PARALLELISM": 3, **configured}, FLOW_CONTROL="learned"):
        learn_from([says()], now=NOW)
        outbox.submit()
    rate, period = sent
    assert paces_sent(qstash) == [FlowControl(key=KEY, parallelism=3, rate=rate, period=period)]


def test_what_is_known_is_not_written_again(
    qstash: FakeQStash, django_assert_num_queries: Any
) -> None:
    receipts = [says(at=NOW + timedelta(seconds=n)) for n in range(5)]
    with ours(FLOW_CONTROL="learned"):
        learn_from(receipts[:1], now=NOW)
        with django_assert_num_queries(3):  # a look at the lane, in a savepoint
            learn_from(receipts, now=NOW)
        assert Lane.objects.get().learned_at == NOW
        learn_from([says("6000", "1s", at=NOW + LEARN_ANEW / 2)], now=NOW)
        assert learned()[0][1:] == (600, 60)
        learn_from([says("6000", "1s", at=NOW + LEARN_ANEW)], now=NOW)
        assert learned()[0][1:] == (6000, 60)
        learn_from([says("6000", "1s", at=NOW + LEARN_ANEW + LEARN_AGAIN)], now=NOW)
        assert Lane.objects.get().learned_at == NOW + LEARN_ANEW + LEARN_AGAIN


def test_a_days_limit_is_none_that_qstash_could_keep(qstash: FakeQStash) -> None:
    with ours(FLOW_CONTROL="learned"):
        learn_from([says("14400", "1439s")], now=NOW)
    assert learned() == []


def test_a_receipt_that_cannot_be_read_does_not_stop_the_others(
    qstash: FakeQStash, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = attempt(429, TOO_FAST), attempt(402, NO_MONEY)
    bad.header = {"Retry-After": 7}  # type: ignore[dict-item]
    orphan, ping = attempt(402, NO_MONEY), attempt(402, NO_MONEY)
    orphan.llm_request, ping.kind = None, Kind.PING
    learn_from([orphan, ping], now=NOW)
    assert not Lane.objects.exists()
    learn_from([bad, good], now=NOW)
    assert "Nothing could be learned from callback" in caplog.text
    assert Lane.objects.get().trouble == "money"


@override_settings(USE_TZ=False, TIME_ZONE="America/New_York")
def test_a_site_with_local_times_learns_as_well(qstash: FakeQStash) -> None:
    now = datetime(2026, 3, 1, 12)
    date = {"Date": [format_datetime(datetime(2026, 3, 1, 16, 59, 59, tzinfo=UTC), usegmt=True)]}
    learn_from([attempt(402, NO_MONEY, at=now, header=date)], now=now)
    paused = Lane.objects.get()
    assert paused.pause_in_words.startswith("Lane openai is paused since 2026-03-01 12:00:00 by")
    paused.resume(by="ada", now=now)
    learn_from([attempt(402, NO_MONEY, at=now, header=date)], now=now)
    assert not Lane.objects.get().is_paused
