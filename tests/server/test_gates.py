"""Gates: what asks a model waits for its provider's limits, and ends where no wait would help."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.server import doorbell, retention
from django_qstash_llm.server.checks import check_settings
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import (
    DeadLetter,
    FlowControlKey,
    Gate,
    LogEntry,
    Message,
    Outcome,
    Queue,
)
from django_qstash_llm.server.waiting import reasons

from .conftest import CALLBACK, FAILURE, PROVIDER, Api, Clock, Wire, at_once, state, states

KEY = "Bearer sk-0123456789abcdef"
CHAT = {"model": "gpt-5.4-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
DONE = Outcome(status=200)
LIMITED = {
    "x-ratelimit-limit-requests": "600",
    "x-ratelimit-remaining-requests": "599",
    "x-ratelimit-reset-requests": "100ms",
}
NO_CREDIT = {
    "error": {
        "message": "You exceeded your current quota, key sk-0123456789abcdef, check your plan.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
}
REFUSED = httpx.Response(
    429,
    headers={"Retry-After": "20"},
    json={"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}},
)


def asked(
    api: Api,
    body: dict[str, Any] | None = None,
    *,
    key: str = KEY,
    url: str = PROVIDER,
    **headers: str,
) -> str:
    forwarded = {"Upstash_Forward_Authorization": key} if key else {}
    return api.published(url, body or CHAT, **forwarded, **headers)


def claim(clock: Clock, limit: int = 100) -> list[Message]:
    return Message.objects.claim(engine="elsewhere:1:1", limit=limit, now=clock(), lease=30)


def only_gate() -> Gate:
    return Gate.objects.get()


def known(clock: Clock, api: Api, **headers: str) -> None:
    """One call was let in, and said what the limits are."""
    asked(api)
    (first,) = claim(clock)
    told = {name: [value] for name, value in (headers or LIMITED).items()}
    first.record(Outcome(status=200, header=told), now=clock())


# --- what is gated -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (CHAT, {}),
        ({"hello": "world"}, {"Upstash_Forward_Authorization": KEY}),
        (b"plain", {"Upstash_Forward_Authorization": KEY}),
        (CHAT, {"Upstash_Forward_Authorization": KEY, "Upstash_Method": "PUT"}),
        (CHAT, {"Upstash_Forward_X_Other": KEY}),
    ],
)
def test_what_asks_no_model_with_a_key_is_not_gated(
    api: Api, body: Any, headers: dict[str, str]
) -> None:
    api.published(PROVIDER, body, **headers)
    message = Message.objects.get()
    assert message.gate is None
    assert message.waits_for == ""
    assert message.due_at is not None


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "Api-Key", "X-Goog-Api-Key"])
def test_any_provider_s_key_is_known(api: Api, name: str) -> None:
    api.published(PROVIDER, CHAT, **{f"Upstash_Forward_{name.replace('-', '_')}": "sk-a-key"})
    assert only_gate().host == "provider.test"


def test_a_gate_is_of_host_model_and_key(api: Api) -> None:
    asked(api)
    asked(api)
    asked(api, key="Bearer sk-another-key-of-theirs")
    asked(api, CHAT | {"model": "other"})
    asked(api, url="https://elsewhere.test/v1/chat/completions")
    assert Gate.objects.count() == 4
    assert len({gate.credential for gate in Gate.objects.all()}) == 2


def test_no_key_is_kept_with_a_gate(api: Api, clock: Clock, wire: Wire, engine: Engine) -> None:
    wire.answers(httpx.Response(401, json={"error": {"message": f"Incorrect API key: {KEY[7:]}"}}))
    asked(api)
    engine.deliver_due()
    gate = only_gate()
    assert gate.trouble == "auth"
    assert "REDACTED" in gate.words
    assert KEY[7:] not in str(Gate.objects.values().get())
    assert KEY[7:] not in str(list(LogEntry.objects.values()))
    assert KEY[7:] not in DeadLetter.objects.get().error


def test_models_of_a_group_share_a_gate(api: Api, configure: Callable[..., None]) -> None:
    configure(
        GATE_LIMITS={
            "provider.test/a": {"GROUP": "minis"},
            "provider.test/b": {"GROUP": "minis"},
        }
    )
    asked(api, CHAT | {"model": "a"})
    asked(api, CHAT | {"model": "b"})
    asked(api, CHAT | {"model": "c"})
    assert sorted(Gate.objects.values_list("group", flat=True)) == ["c", "minis"]


def test_what_it_will_take_is_estimated(api: Api) -> None:
    body = json.dumps(CHAT | {"n": 3}).encode()
    api.published(PROVIDER, body, Upstash_Forward_Authorization=KEY)
    message = Message.objects.get()
    assert message.charge_input == -(-len(body) // 4)
    assert message.charge_output == 150


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [], "max_tokens": 10**30},
        {"messages": [], "max_tokens": -5},
        {"messages": [], "max_tokens": "many"},
        {"messages": [], "model": ["a"], "n": True},
        {"messages": 5, "model": "x" * 5000},
        {"contents": [], "generationConfig": [1]},
    ],
)
def test_odd_bodies_are_taken(api: Api, clock: Clock, body: dict[str, Any]) -> None:
    asked(api, body)
    assert len(claim(clock)) == 1


def test_switched_off_it_is_plain_qstash(
    api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(GATES=False)
    wire.answers(REFUSED)
    message_id = asked(api, Upstash_Retries="1")
    assert engine.deliver_due() == 1
    message = Message.objects.get(message_id=message_id)
    assert (message.gate, message.retried, message.retries) == (None, 1, 1)
    assert not Gate.objects.exists()


def test_what_waits_at_a_gate_leaves_when_gates_are_switched_off(
    api: Api, clock: Clock, configure: Callable[..., None]
) -> None:
    for _ in range(5):
        asked(api)
    assert len(claim(clock)) == 1
    configure(GATES=False)
    clock.advance(3)
    assert len(claim(clock)) == 4


# --- the way through -----------------------------------------------------------------------------


def test_one_call_finds_out_and_then_the_learnt_limit_lets_more(api: Api, clock: Clock) -> None:
    known(clock, api)
    for _ in range(30):
        asked(api)
    first = len(claim(clock))
    assert 10 <= first <= 20
    # The groups are spaced, so that a refusal of one is known before the next.
    clock.advance(0.03)
    assert len(claim(clock)) >= 10


def test_a_callback_is_no_call_of_a_model(api: Api, engine: Engine, wire: Wire) -> None:
    asked(api, Upstash_Callback=CALLBACK)
    assert engine.deliver_due() == 2
    assert wire.callbacks()[0].status == 200
    assert Message.objects.get(kind=Message.Kind.CALLBACK).gate is None


def test_a_delayed_one_waits_for_its_time_and_then_at_its_gate(api: Api, clock: Clock) -> None:
    asked(api, Upstash_Delay="60s")
    assert claim(clock) == []
    clock.advance(61)
    assert len(claim(clock)) == 1


def test_it_keeps_its_place_in_a_queue(api: Api, engine: Engine, wire: Wire, clock: Clock) -> None:
    headers = {"Upstash_Forward_Authorization": KEY}
    ids = [api.enqueue("q", PROVIDER, CHAT, **headers) for _ in range(3)]
    wire.answers(REFUSED, httpx.Response(200))
    assert engine.deliver_due() == 1
    assert state(ids[0]) == "RETRY"
    assert Queue.objects.get().room() == 0
    clock.advance(30)
    assert engine.deliver_due() == 3
    assert [request.headers["Upstash-Message-Id"] for request in wire.to(PROVIDER)] == [
        ids[0],
        *ids,
    ]


def test_flow_control_and_gate_both_have_to_agree(api: Api, clock: Clock) -> None:
    known(clock, api)
    control = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "parallelism=2"}
    ids = [asked(api, **control) for _ in range(5)]
    taken = claim(clock)
    assert [row.message_id for row in taken] == ids[:2]
    Gate.objects.get().pause(now=clock())
    taken[0].record(DONE, now=clock())
    assert claim(clock) == []
    Gate.objects.get().resume(now=clock())
    clock.advance(0.1)
    assert [row.message_id for row in claim(clock)] == ids[2:3]
    assert FlowControlKey.objects.get().room(clock()) == 0


def test_who_is_held_by_a_gate_holds_up_nobody_of_the_same_key(api: Api, clock: Clock) -> None:
    control = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "parallelism=1"}
    asked(api, **control)
    Gate.objects.get().pause(now=clock())
    other = asked(api, CHAT | {"model": "other"}, **control)
    # The first look sends the first to its gate.
    assert [row.message_id for row in [*claim(clock), *claim(clock)]] == [other]


def test_cancelled_while_it_waits_it_is_gone(api: Api, clock: Clock) -> None:
    ids = [asked(api) for _ in range(2)]
    assert api.delete(f"/v2/messages/{ids[0]}").status_code == 202
    assert [row.message_id for row in claim(clock)] == [ids[1]]


def test_gates_cost_a_constant_number_of_queries(api: Api, clock: Clock) -> None:
    known(clock, api)

    def queries(count: int) -> int:
        for _ in range(count):
            asked(api)
        clock.advance(1)
        with CaptureQueriesContext(
            connection,
        ) as captured:
            taken = claim(clock)
        assert len(taken) == count
        for row in taken:
            row.record(DONE, now=clock())
        return len(captured)

    assert queries(2) == queries(10)


# --- refusals ------------------------------------------------------------------------------------


def test_a_refusal_costs_no_retry_and_its_callback_is_sent(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, httpx.Response(200))
    message_id = asked(api, Upstash_Callback=CALLBACK, Upstash_Retries="1")
    for _ in range(6):
        engine.deliver_due()
        clock.advance(120)
    assert state(message_id) == "DELIVERED"
    callbacks = wire.callbacks()
    assert [each.status for each in callbacks] == [429] * 5 + [200]
    # Each is told apart, and none claims to be the last.
    assert [each.retried for each in callbacks] == list(range(6))
    assert all(each.retried < each.max_retries for each in callbacks)
    assert Message.objects.filter(kind="callback").values_list("retries", flat=True)[5] == 1


def test_nobody_calls_before_the_named_wait_is_over(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(REFUSED, httpx.Response(200))
    for _ in range(5):
        asked(api)
    assert engine.deliver_due() == 1
    clock.advance(19.9)
    assert engine.deliver_due() == 0
    (entry,) = LogEntry.objects.filter(state="RETRY")
    assert entry.next_delivery_at is not None
    assert entry.next_delivery_at - entry.time > timedelta(seconds=20)
    clock.advance(2)
    assert engine.deliver_due() == 5


def test_a_message_that_wants_no_retry_gets_none(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(REFUSED)
    message_id = asked(api, Upstash_Retries="0", Upstash_Failure_Callback=FAILURE)
    engine.deliver_due()
    assert state(message_id) == "FAILED"
    assert [each.status for each in wire.callbacks(FAILURE)] == [429]


def test_patience_ends(
    api: Api, engine: Engine, wire: Wire, clock: Clock, configure: Callable[..., None]
) -> None:
    configure(GATE_PATIENCE=100)
    wire.answers(REFUSED)
    message_id = asked(api, Upstash_Retries="1")
    engine.deliver_due()
    clock.advance(101)
    for _ in range(3):
        engine.deliver_due()
        clock.advance(200)
    assert state(message_id) == "FAILED"
    message = Message.objects.get()
    assert (message.retried, message.retries) == (2, 2)


@pytest.mark.parametrize("status", [503, 529])
def test_an_overloaded_provider_is_asked_by_one(
    api: Api, engine: Engine, wire: Wire, clock: Clock, status: int
) -> None:
    known(clock, api)
    wire.answers(httpx.Response(status), httpx.Response(200))
    for _ in range(5):
        asked(api)
    clock.advance(1)
    assert engine.deliver_due() == 1
    clock.advance(2)
    # It took one of the first one's retries, which waits as long as QStash's would.
    assert engine.deliver_due() == 4
    clock.advance(12)
    assert engine.deliver_due() == 1


def test_it_is_not_always_the_same_one_that_finds_out(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(503))
    ids = [asked(api, Upstash_Retry_Delay="1") for _ in range(3)]
    for _ in range(3):
        engine.deliver_due()
        clock.advance(10)
    assert [request.headers["Upstash-Message-Id"] for request in wire.to(PROVIDER)] == ids


def test_a_fault_is_retried_as_qstash_does(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    message_id = asked(api, Upstash_Retries="1")
    engine.deliver_due()
    message = Message.objects.get()
    assert (message.retried, message.retries, message.waits_for) == (1, 1, "")
    assert message.due_at is not None
    clock.advance(13)
    engine.deliver_due()
    assert state(message_id) == "DELIVERED"


# --- what no wait helps --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "trouble"),
    [
        (400, {"code": "context_length_exceeded", "message": "too long"}, "too_large"),
        (413, {"message": "Request too large"}, "too_large"),
        (400, {"code": "content_filter", "message": "filtered"}, "content"),
        (401, {"code": "invalid_api_key", "message": "wrong"}, "auth"),
        (404, {"code": "model_not_found", "message": "no such model"}, "gone"),
        (400, {"code": "unsupported_parameter", "message": "no such parameter"}, "invalid"),
        (429, {"message": "Request too large: Limit 30000, Requested 342389"}, "too_large"),
    ],
)
def test_what_can_never_succeed_is_called_once(
    api: Api, engine: Engine, wire: Wire, clock: Clock, status: int, error: Any, trouble: str
) -> None:
    wire.answers(httpx.Response(status, json={"error": error}))
    message_id = asked(api, Upstash_Failure_Callback=FAILURE)
    engine.deliver_due()
    assert states(message_id) == ["CREATED", "ACTIVE", "ERROR", "FAILED"]
    assert len(wire.to(PROVIDER)) == 1
    assert [each.status for each in wire.callbacks(FAILURE)] == [status]
    letter = DeadLetter.objects.get()
    assert letter.error.startswith(f"{trouble}: {error['message']}")
    assert not Gate.objects.get().is_paused


def test_the_providers_own_word_on_retries_counts_first(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(
        httpx.Response(400, headers={"x-should-retry": "true"}),
        httpx.Response(500, headers={"x-should-retry": "false"}),
    )
    first, second = asked(api), asked(api)
    engine.deliver_due()
    assert state(first) == "RETRY"
    assert state(second) == "FAILED"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, NO_CREDIT),
        (402, {"error": {"message": "Insufficient Balance"}}),
        (
            429,
            {
                "type": "error",
                "error": {
                    "type": "rate_limit_error",
                    "message": "spend limit",
                    "details": {"error_code": "enforced_spend_limit_reached"},
                },
            },
        ),
    ],
)
def test_without_credit_there_is_one_call_and_all_of_that_key_wait(
    api: Api, engine: Engine, wire: Wire, clock: Clock, status: int, body: Any
) -> None:
    wire.answers(httpx.Response(status, json=body), httpx.Response(200))
    first = asked(api)
    waiting = [asked(api) for _ in range(5)] + [asked(api, CHAT | {"model": "other"})]
    other_key = asked(api, key="Bearer sk-another-key-of-theirs")
    assert engine.deliver_due() == 2
    assert state(first) == "FAILED"
    assert state(other_key) == "DELIVERED"
    assert DeadLetter.objects.get().error.startswith("money: ")
    paused = Gate.objects.filter(is_paused=True)
    assert paused.count() == 2
    assert {gate.trouble for gate in paused} == {"money"}
    clock.advance(86_400 * 3)
    assert engine.deliver_due() == 0
    assert all(state(message_id) == "CREATED" for message_id in waiting)
    for gate in paused:
        gate.resume(now=clock())
    assert engine.deliver_due() == 6
    assert all(state(message_id) == "DELIVERED" for message_id in waiting)


def test_what_was_begun_before_a_person_resumed_pauses_nothing(api: Api, clock: Clock) -> None:
    known(clock, api)
    asked(api)
    asked(api)
    clock.advance(1)
    first, second = claim(clock)
    answer = Outcome(status=402)
    first.record(answer, now=clock())
    assert only_gate().is_paused
    clock.advance(5)
    only_gate().resume(now=clock())
    second.record(answer, now=clock())
    assert not only_gate().is_paused


# --- many engines --------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_engines_share_one_gate(api: Api, configure: Callable[..., None]) -> None:
    configure(GATE_LIMITS={"provider.test": {"CONCURRENCY": 7}})
    clock = Clock()
    # Nobody is to be rung: eager, that would deliver.
    with doorbell.listening(threading.Event()):
        known(clock, api)
        for _ in range(40):
            asked(api)
    clock.advance(1)
    now = clock()

    def take(number: int) -> int:
        rows = Message.objects.claim(engine=f"engine:{number}:1", limit=100, now=now, lease=30)
        return len(rows)

    assert sum(at_once(4, take)) <= 7
    assert Message.objects.claimed().count() <= 7


def test_an_engine_that_died_leaks_nothing_for_longer_than_its_lease(
    api: Api, clock: Clock, configure: Callable[..., None]
) -> None:
    configure(GATE_LIMITS={"provider.test": {"CONCURRENCY": 3}})
    known(clock, api)
    for _ in range(6):
        asked(api)
    clock.advance(1)
    died = claim(clock)
    assert len(died) == 3
    clock.advance(29)
    assert claim(clock) == []
    clock.advance(2)
    assert {row.pk for row in claim(clock)} == {row.pk for row in died}
    assert Message.objects.claimed().count() == 3


def test_an_answer_that_comes_after_its_claim_was_lost_teaches_nothing(
    api: Api, clock: Clock
) -> None:
    asked(api)
    (late,) = claim(clock)
    clock.advance(31)
    claim(clock)
    before = Gate.objects.values().get()
    late.record(Outcome(status=402), now=clock())
    assert Gate.objects.values().get() == before


# --- for people ----------------------------------------------------------------------------------


def why(message_id: str, clock: Clock) -> str:
    message = Message.objects.select_related("queue").get(message_id=message_id)
    return reasons([message], now=clock())[message.pk]


def test_a_message_says_why_it_waits(api: Api, engine: Engine, wire: Wire, clock: Clock) -> None:
    wire.answers(REFUSED, httpx.Response(402, json={"error": {"message": "pay first"}}))
    message_id = asked(api)
    assert why(message_id, clock) == (
        "limits of provider.test gpt-5.4-mini: there is room, an engine takes it next"
    )
    engine.deliver_due()
    text = why(message_id, clock)
    assert "refused (rate: Rate limit reached (retry-after: 20 s)), next try " in text
    clock.advance(30)
    waiting = asked(api)
    engine.deliver_due()
    assert why(waiting, clock) == ("limits of provider.test gpt-5.4-mini: paused, money: pay first")
    only_gate().pause(now=clock())
    assert why(waiting, clock) == "limits of provider.test gpt-5.4-mini: paused"
    only_gate().resume(now=clock())
    known_limit = Message.objects.get(message_id=waiting)
    assert known_limit.waits_for == "gate"


def test_the_admin_warns_and_lets_a_person_resume(
    api: Api, engine: Engine, wire: Wire, clock: Clock, admin_client: Client
) -> None:
    wire.answers(httpx.Response(429, json=NO_CREDIT), httpx.Response(200))
    asked(api)
    waiting = asked(api)
    engine.deliver_due()
    gate = only_gate()
    page = reverse("admin:qstash_server_gate_change", args=[gate.pk])
    for name in ("gate", "message", "queue", "deadletter"):
        shown = admin_client.get(reverse(f"admin:qstash_server_{name}_changelist"))
        text = shown.content.decode()
        assert "Paused: provider.test gpt-5.4-mini." in text
        assert "Raise the spend limit" in text
        assert "sk-0123456789abcdef" not in text
        assert f'href="{page}"' in text
    assert "Resume" in admin_client.get(page).content.decode()
    change = {"action": "resume", "_selected_action": gate.pk, "from_page": "1"}
    answer = admin_client.post(reverse("admin:qstash_server_gate_changelist"), change)
    assert answer.status_code == 302
    engine.deliver_due()
    assert state(waiting) == "DELIVERED"
    shown = admin_client.get(reverse("admin:qstash_server_gate_changelist"))
    assert "Paused:" not in shown.content.decode()


def test_what_was_learnt_can_be_forgotten(api: Api, clock: Clock, admin_client: Client) -> None:
    known(clock, api)
    gate = only_gate()
    url = reverse("admin:qstash_server_gate_changelist")
    assert " of 600 requests in 60 s" in admin_client.get(url).content.decode()
    change = {"action": "reset", "_selected_action": gate.pk}
    assert "Forget limits?" in admin_client.post(url, change).content.decode()
    admin_client.post(url, change | {"confirmed": "1"})
    assert only_gate().pace == {}
    assert "not known yet" in admin_client.get(url).content.decode()


def test_the_console_page_shows_gates(api: Api, clock: Clock) -> None:
    known(clock, api)
    from django_qstash_llm.server.overview import overview

    (table,) = [table for table in overview(clock()).tables if table.ident == "gates"]
    assert table.rows[0][0] == "provider.test gpt-5.4-mini"


def test_messages_can_be_filtered_by_it(api: Api, admin_client: Client) -> None:
    message_id = asked(api)
    api.published()
    shown = admin_client.get(reverse("admin:qstash_server_message_changelist"), {"waits": "limits"})
    assert [row.message_id for row in shown.context["cl"].result_list] == [message_id]


def test_unused_gates_are_forgotten(api: Api, engine: Engine, clock: Clock) -> None:
    asked(api)
    engine.deliver_due()
    waiting = asked(api, CHAT | {"model": "other"}, Upstash_Delay="5d")
    Gate.objects.update(updated_at=timezone.now() - timedelta(days=15))
    retention.purge(clock())
    assert [gate.group for gate in Gate.objects.all()] == ["other"]
    assert Message.objects.get(message_id=waiting).gate is not None


@pytest.mark.parametrize(
    "limits",
    [
        {"api.openai.com": {"RPS": 5}},
        {"api.openai.com": {"RPM": 0}},
        {"api.openai.com": {"RPM": "many"}},
        {"api.openai.com": {"CONCURRENCY": 1.5}},
        {"api.openai.com": {"CONCURRENCY": True}},
        {"api.openai.com": {"GROUP": ""}},
        {"https://api.openai.com": {"RPM": 5}},
        {"API.openai.com": {"RPM": 5}},
        {"api.openai.com": 5},
        {5: {}},
    ],
)
def test_limits_that_cannot_be_are_found(configure: Callable[..., None], limits: Any) -> None:
    configure(GATE_LIMITS=limits)
    (found,) = check_settings(None)
    assert "GATE_LIMITS" in found.msg


def test_an_app_resumes_by_the_api_what_had_no_credit(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(402, json={"error": {"message": "pay first"}}))
    asked(api)
    asked(api, CHAT | {"model": "by hand"}, key="Bearer sk-another-key-of-theirs")
    engine.deliver_due()
    Gate.objects.filter(group="by hand").update(trouble="")
    listed = {each["group"]: each for each in api.get("/v2/gates").json()}
    assert listed["gpt-5.4-mini"]["isPaused"]
    assert listed["gpt-5.4-mini"]["words"] == "pay first"
    assert api.post("/v2/gates/resume").status_code == 400
    assert api.post("/v2/gates/resume?host=elsewhere.test").json() == {"resumed": 0}
    assert api.post("/v2/gates/resume?host=provider.test").json() == {"resumed": 1}
    assert sorted(Gate.objects.filter(is_paused=True).values_list("group", flat=True)) == [
        "by hand"
    ]


@pytest.mark.parametrize("model", ["\ud800", "a\x00b", "m" * 5000])
def test_a_models_name_that_no_database_takes_is_cleaned(api: Api, model: str) -> None:
    body = json.dumps(CHAT | {"model": model}).encode()
    api.published(PROVIDER, body, Upstash_Forward_Authorization=KEY)
    assert only_gate().group


def test_one_that_is_always_refused_holds_up_nobody(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    bad = asked(api, CHAT | {"max_tokens": 9999})
    good = [asked(api) for _ in range(3)]
    wire.answer = lambda request: (
        httpx.Response(429, headers={"Retry-After": "1"})
        if b"9999" in request.content
        else httpx.Response(200)
    )
    for _ in range(12):
        engine.deliver_due()
        clock.advance(120)
    assert all(state(message_id) == "DELIVERED" for message_id in good)
    assert state(bad) == "RETRY"


def test_a_resumed_gate_finds_out_by_one_call(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    known(clock, api)
    only_gate().pause(now=clock())
    for _ in range(5):
        asked(api)
    only_gate().resume(now=clock())
    wire.answers(httpx.Response(402))
    clock.advance(1)
    assert engine.deliver_due() == 1
    assert only_gate().is_paused
    assert DeadLetter.objects.count() == 1


def test_another_model_of_a_key_without_credit_is_paused_from_the_first(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(402, json={"error": {"message": "pay first"}}))
    asked(api)
    engine.deliver_due()
    asked(api, CHAT | {"model": "other"})
    assert engine.deliver_due() == 0
    assert Gate.objects.get(group="other").words == "pay first"


def test_what_a_person_paused_stays_so_whatever_is_answered(api: Api, clock: Clock) -> None:
    known(clock, api)
    asked(api)
    clock.advance(1)
    (flying,) = claim(clock)
    only_gate().pause(now=clock())
    flying.record(Outcome(status=429), now=clock())
    assert only_gate().trouble == ""
    assert api.post("/v2/gates/resume?host=provider.test").json() == {"resumed": 0}


def test_gates_switched_off_hold_nobody_whom_a_pause_held(
    api: Api, clock: Clock, configure: Callable[..., None]
) -> None:
    message_id = asked(api)
    only_gate().pause(now=clock())
    assert claim(clock) == []
    configure(GATES=False)
    assert [row.message_id for row in claim(clock)] == [message_id]
