"""Several accounts on one server: nobody sees, changes, or is held up by what is another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from django_qstash_llm.qstash import SignatureError, verify
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Message, Schedule

from .conftest import CALLBACK, KEYS, PROVIDER, Api, Clock, Wire, state

OTHERS_KEYS = ("sig_current-signing-key-of-the-other", "sig_next-signing-key-of-the-other")
YEARLY = {"Upstash-Cron": "0 0 1 1 *", "Upstash-Schedule-Id": "s"}
GROUP = {"endpoints": [{"url": PROVIDER, "name": "first"}]}
FLOW = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "parallelism=1, rate=5"}
EMPTY: dict[str, Any] = {
    "/v2/events": {"events": []},
    "/v2/logs": {"logs": [], "events": []},
    "/v2/dlq": {"messages": []},
    "/v2/queues": [],
    "/v2/flowControl": [],
    "/v2/topics": [],
    "/v2/schedules": [],
}


@pytest.fixture(autouse=True)
def accounts(configure: Callable[..., None]) -> None:
    configure(
        READ_ONLY_TOKEN="reader",
        ACCOUNTS={
            "other": {
                "TOKEN": "token-of-the-other",
                "READ_ONLY_TOKEN": "reader-of-the-other",
                "CURRENT_SIGNING_KEY": OTHERS_KEYS[0],
                "NEXT_SIGNING_KEY": OTHERS_KEYS[1],
            },
            "third": {"TOKEN": "token-of-the-third"},
        },
    )


def knowing(token: str) -> Api:
    api = Api()
    api.token = token
    return api


@pytest.fixture
def other(db: None) -> Api:
    return knowing("token-of-the-other")


def everything_of(api: Api) -> dict[str, Any]:
    """All that an account can list."""
    return {path: api.get(path).json() for path in EMPTY}


class Possessions:
    """One of each, of the settings' own account."""

    def __init__(self, api: Api, engine: Engine, wire: Wire) -> None:
        wire.answers(httpx.Response(500, text="no"))
        self.failed = api.published(Upstash_Retries="0")
        engine.deliver_due()
        wire.answers(httpx.Response(200))
        self.dlq_id = api.get("/v2/dlq").json()["messages"][0]["dlqId"]
        self.pending = api.published(Upstash_Delay="1h", Upstash_Label="a", **FLOW)
        self.queued = api.enqueue("q")
        assert api.post("/v2/topics/g/endpoints", GROUP).status_code == 200
        assert api.post(f"/v2/schedules/{PROVIDER}", headers=YEARLY).status_code == 200


@pytest.fixture
def possessions(api: Api, engine: Engine, wire: Wire) -> Possessions:
    return Possessions(api, engine, wire)


# --- seeing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["token-of-the-other", "reader-of-the-other"])
def test_nobody_sees_what_is_anothers(possessions: Possessions, token: str) -> None:
    assert everything_of(knowing(token)) == EMPTY


def test_everybody_sees_their_own(api: Api, possessions: Possessions) -> None:
    mine = everything_of(api)
    assert everything_of(knowing("reader")) == mine
    assert all(len(str(mine[path])) > len(str(EMPTY[path])) for path in EMPTY)


def test_nobody_finds_what_is_anothers(possessions: Possessions, other: Api) -> None:
    for path in (
        f"/v2/messages/{possessions.pending}",
        f"/v2/messages/{possessions.failed}",
        f"/v2/dlq/{possessions.dlq_id}",
        "/v2/queues/q",
        "/v2/flowControl/k",
        "/v2/topics/g",
        "/v2/schedules/s",
    ):
        assert other.get(path).status_code == 404, path
    for query in (f"messageId={possessions.pending}", "label=a", "queueName=q", f"url={PROVIDER}"):
        assert other.get(f"/v2/events?{query}").json() == {"events": []}
    assert other.get(f"/v2/dlq?dlqIds={possessions.dlq_id}").json() == {"messages": []}


def test_what_is_in_flight_is_counted_for_its_account(
    api: Api, other: Api, engine: Engine, wire: Wire
) -> None:
    counts: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        for caller in (api, other):
            counts.append(caller.get("/v2/globalParallelism").json()["parallelismCount"])
        return httpx.Response(200)

    wire.answer = answer
    api.published()
    engine.deliver_due()
    assert counts == [1, 0]


# --- changing ------------------------------------------------------------------------------------

ATTEMPTS = [
    ("DELETE", "/v2/messages/{pending}", 404, None),
    ("DELETE", "/v2/messages?messageIds={pending}", 200, {"cancelled": 0}),
    ("DELETE", "/v2/messages?label=a", 200, {"cancelled": 0}),
    ("DELETE", "/v2/messages?count=100", 200, {"cancelled": 0}),
    ("DELETE", "/v2/messages", 200, {"cancelled": 0}),
    ("DELETE", "/v2/dlq/{dlq_id}", 404, None),
    ("DELETE", "/v2/dlq?dlqIds={dlq_id}", 200, {"deleted": 0}),
    ("DELETE", "/v2/dlq", 200, {"deleted": 0}),
    ("POST", "/v2/dlq/retry/{dlq_id}", 404, None),
    ("POST", "/v2/dlq/retry?dlqIds={dlq_id}", 201, {"responses": [], "cursor": ""}),
    ("POST", "/v2/dlq/retry", 201, {"responses": [], "cursor": ""}),
    ("POST", "/v2/queues/q/pause", 404, None),
    ("POST", "/v2/queues/q/resume", 404, None),
    ("DELETE", "/v2/queues/q", 200, None),
    ("POST", "/v2/flowControl/k/pause", 200, None),
    ("POST", "/v2/flowControl/k/resume", 200, None),
    ("POST", "/v2/flowControl/k/pin?parallelism=9&rate=9", 200, None),
    ("POST", "/v2/flowControl/k/unpin?parallelism=true", 200, None),
    ("POST", "/v2/flowControl/k/resetRate", 200, None),
    ("POST", "/v2/keys/rotate", 200, None),
    ("DELETE", "/v2/topics/g", 200, None),
    ("PATCH", "/v2/schedules/s/pause", 404, None),
    ("PATCH", "/v2/schedules/s/resume", 404, None),
    ("DELETE", "/v2/schedules/s", 404, None),
]


@pytest.mark.parametrize(("method", "path", "status", "answer"), ATTEMPTS)
def test_nobody_changes_what_is_anothers(
    api: Api,
    possessions: Possessions,
    other: Api,
    method: str,
    path: str,
    status: int,
    answer: Any,
) -> None:
    before, keys = everything_of(api), api.get("/v2/keys").json()
    got = other.call(method, path.format(**vars(possessions)))
    assert got.status_code == status, got.content
    assert answer is None or got.json() == answer
    assert everything_of(api) == before
    assert api.get("/v2/keys").json() == keys


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/v2/messages", lambda its: {"messageIds": [its.pending, its.queued]}),
        ("DELETE", "/v2/dlq", lambda its: {"dlqIds": [its.dlq_id]}),
        ("POST", "/v2/queues", lambda its: {"queueName": "q", "parallelism": 7, "paused": True}),
        (
            "POST",
            "/v2/topics/g/endpoints",
            lambda its: {"endpoints": [{"url": CALLBACK, "name": "first"}]},
        ),
        ("DELETE", "/v2/topics/g/endpoints", lambda its: {"endpoints": [{"name": "first"}]}),
    ],
)
def test_nobody_changes_what_is_anothers_by_its_name_in_the_body(
    api: Api, possessions: Possessions, other: Api, method: str, path: str, body: Any
) -> None:
    before = everything_of(api)
    other.call(method, path, body(possessions))
    assert everything_of(api) == before


def test_a_schedule_of_the_same_id_takes_nobodys_place(
    api: Api, possessions: Possessions, other: Api
) -> None:
    before = everything_of(api)
    made = other.post(f"/v2/schedules/{CALLBACK}", headers=YEARLY)
    assert made.json() == {"scheduleId": "s"}
    assert other.get("/v2/schedules/s").json()["destination"] == CALLBACK
    assert everything_of(api) == before


def test_a_group_is_published_to_by_its_owner_only(
    api: Api, possessions: Possessions, other: Api
) -> None:
    assert other.publish("g").status_code == 404
    other.post("/v2/topics/g/endpoints", {"endpoints": [{"url": CALLBACK}]})
    [answer] = other.publish("g").json()
    assert answer["url"] == CALLBACK
    [answer] = api.publish("g").json()
    assert answer["url"] == PROVIDER


def test_who_may_only_read_changes_nothing_of_their_own(api: Api, possessions: Possessions) -> None:
    before = everything_of(api)
    reader = knowing("reader")
    for method, path, *_ in ATTEMPTS:
        assert reader.call(method, path.format(**vars(possessions))).status_code == 403
    for path in (f"/v2/publish/{PROVIDER}", f"/v2/enqueue/q/{PROVIDER}", "/v2/batch"):
        assert reader.post(path, b"[]").status_code == 403
    assert everything_of(api) == before


# --- the same names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twice",
    [{"Upstash_Deduplication_Id": "one"}, {"Upstash_Content_Based_Deduplication": "True"}],
)
def test_nothing_is_a_duplicate_of_what_is_anothers(
    api: Api, other: Api, twice: dict[str, str]
) -> None:
    first, others = api.publish(**twice), other.publish(**twice)
    assert (first.status_code, others.status_code) == (200, 200)
    assert first.json()["messageId"] != others.json()["messageId"]
    for caller, answer in ((api, first), (other, others)):
        again = caller.publish(**twice)
        assert again.status_code == 202
        assert again.json() == answer.json() | {"deduplicated": True}


def test_a_queue_holds_up_only_its_own_account(api: Api, other: Api, engine: Engine) -> None:
    api.post("/v2/queues", {"queueName": "q", "parallelism": 2, "paused": True})
    mine = [api.enqueue("q") for _ in range(2)]
    others = other.enqueue("q")
    assert other.get("/v2/queues/q").json()["lag"] == 1
    assert other.get("/v2/queues/q").json()["parallelism"] == 1
    engine.deliver_due()
    assert [state(each) for each in (*mine, others)] == ["CREATED", "CREATED", "DELIVERED"]
    assert api.get("/v2/queues/q").json()["lag"] == 2
    other.delete("/v2/queues/q")
    api.post("/v2/queues/q/resume")
    engine.deliver_due()
    assert [state(each) for each in mine] == ["DELIVERED", "DELIVERED"]


def test_a_flow_control_key_holds_up_only_its_own_account(
    api: Api, other: Api, engine: Engine, clock: Clock
) -> None:
    slow = FLOW | {"Upstash_Flow_Control_Value": "rate=1, period=1h"}
    mine = [api.published(**slow) for _ in range(2)]
    others = [other.published(**FLOW) for _ in range(2)]
    engine.deliver_due()
    assert [state(each) for each in mine] == ["DELIVERED", "CREATED"]
    assert [state(each) for each in others] == ["DELIVERED", "DELIVERED"]
    told = [caller.get("/v2/flowControl/k").json() for caller in (api, other)]
    assert [each["waitListSize"] for each in told] == [1, 0]
    assert [each["rateCount"] for each in told] == [1, 2]
    assert [each["rateMax"] for each in told] == [1, 5]
    other.post("/v2/flowControl/k/pause")
    clock.advance(3600)
    paused = other.published(**FLOW)
    engine.deliver_due()
    assert [state(each) for each in (*mine, paused)] == ["DELIVERED", "DELIVERED", "CREATED"]


# --- whose signature -----------------------------------------------------------------------------


def test_everything_is_signed_with_its_own_accounts_keys(
    api: Api, other: Api, engine: Engine, clock: Clock, wire: Wire
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    other.published(Upstash_Retries="0", Upstash_Callback=CALLBACK)
    engine.deliver_due()
    [dead] = other.get("/v2/dlq").json()["messages"]
    assert other.post(f"/v2/dlq/retry/{dead['dlqId']}").status_code == 201
    engine.deliver_due()
    assert [str(request.url) for request in wire.requests] == [PROVIDER, CALLBACK] * 2
    for request in wire.requests:
        assert is_signed_with(request, OTHERS_KEYS, clock)
        assert not is_signed_with(request, KEYS, clock)
    api.published()
    engine.deliver_due()
    assert is_signed_with(wire.requests[-1], KEYS, clock)
    assert not is_signed_with(wire.requests[-1], OTHERS_KEYS, clock)
    states = {entry["url"] for entry in other.get("/v2/events").json()["events"]}
    assert states == {PROVIDER, CALLBACK}
    assert {entry["url"] for entry in api.get("/v2/events").json()["events"]} == {PROVIDER}


def test_what_a_schedule_or_a_group_sends_belongs_to_its_account(
    api: Api, other: Api, engine: Engine, clock: Clock, wire: Wire
) -> None:
    other.post("/v2/topics/g/endpoints", GROUP)
    assert other.post("/v2/schedules/g", headers=YEARLY).status_code == 200
    due = other.get("/v2/schedules/s").json()["nextScheduleTime"]
    clock.advance(due / 1000 - clock().timestamp() + 1)
    assert Schedule.objects.fire_due(now=clock()) == 1
    engine.deliver_due()
    [request] = wire.requests
    assert is_signed_with(request, OTHERS_KEYS, clock)
    [message_id] = other.get("/v2/schedules/s").json()["lastScheduleStates"]
    assert other.get(f"/v2/messages/{message_id}").status_code == 200
    assert api.get(f"/v2/messages/{message_id}").status_code == 404
    assert everything_of(api) == EMPTY


def is_signed_with(request: httpx.Request, keys: tuple[str, str], clock: Clock) -> bool:
    signature = request.headers["Upstash-Signature"]
    now = clock().timestamp()
    try:
        verify(signature, request.content, url=str(request.url), keys=keys, now=now)
    except SignatureError:
        return False
    return True


def test_keys_are_told_and_rotated_for_one_account(api: Api, other: Api) -> None:
    assert other.get("/v2/keys").json() == {"current": OTHERS_KEYS[0], "next": OTHERS_KEYS[1]}
    rotated = other.post("/v2/keys/rotate").json()
    assert rotated["current"] == OTHERS_KEYS[1]
    assert other.get("/v2/keys").json() == rotated
    assert api.get("/v2/keys").json() == {"current": KEYS[0], "next": KEYS[1]}


def test_an_account_without_keys_gets_its_own_once(api: Api) -> None:
    third = knowing("token-of-the-third")
    made = third.get("/v2/keys").json()
    assert third.get("/v2/keys").json() == made
    assert not {*made.values()} & {*KEYS, *OTHERS_KEYS}


@pytest.mark.parametrize("token", ["third", "other", "", OTHERS_KEYS[0], "token-of-the-Other"])
def test_an_accounts_name_or_key_is_no_token(db: None, token: str) -> None:
    assert knowing(token or "-").get("/v2/queues").status_code == 401


def test_a_batch_belongs_to_who_sent_it(api: Api, other: Api) -> None:
    other.post("/v2/batch", [{"destination": PROVIDER}, {"destination": PROVIDER, "queue": "q"}])
    assert set(Message.objects.values_list("account", flat=True)) == {"other"}
    assert everything_of(api) == EMPTY
