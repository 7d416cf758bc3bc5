"""The management calls: messages, logs, dead letters, queues, keys."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_qstash_llm.qstash import Callback, verify
from django_qstash_llm.server import conf
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import (
    DeadLetter,
    LogEntry,
    Message,
    Outcome,
    Queue,
    SigningKeys,
)
from django_qstash_llm.server.redaction import fingerprint

from .conftest import CALLBACK, FAILURE, KEYS, PROVIDER, Api, Clock, Wire, state, states

Failed = Callable[..., str]


@pytest.fixture
def failed(api: Api, engine: Engine, wire: Wire) -> Failed:
    """Publishes a message, sees it fail for good, answers its dlqId."""

    def fail(url: str = PROVIDER, status: int = 500, **headers: str) -> str:
        wire.answers(httpx.Response(status, text="no"), url=url)
        message_id = api.published(url, **({"Upstash_Retries": "0"} | headers))
        engine.deliver_due()
        return DeadLetter.objects.get(message__message_id=message_id).dlq_id

    return fail


# --- messages ----------------------------------------------------------------------------------


def test_an_unknown_message_is_404(api: Api) -> None:
    for method in ("GET", "DELETE"):
        answer = api.call(method, "/v2/messages/msg_unknown")
        assert answer.status_code == 404
        assert "msg_unknown" in answer.json()["error"]


def test_a_message_is_cancelled_once(api: Api, engine: Engine, wire: Wire) -> None:
    message_id = api.published(Upstash_Delay="10s")
    answer = api.delete(f"/v2/messages/{message_id}")
    assert (answer.status_code, answer.json()) == (202, {"cancelled": 1})
    assert states(message_id) == ["CREATED", "CANCEL_REQUESTED", "CANCELED"]
    assert api.delete(f"/v2/messages/{message_id}").status_code == 404
    assert api.get(f"/v2/messages/{message_id}").status_code == 404
    assert engine.deliver_due() == 0


def test_a_message_in_flight_may_be_cancelled_again(api: Api, clock: Clock) -> None:
    message_id = api.published()
    [message] = Message.objects.claim(engine="elsewhere:1:1", limit=1, now=clock(), lease=60)
    for _ in range(2):
        answer = api.delete(f"/v2/messages/{message_id}")
        assert (answer.status_code, answer.json()) == (202, {"cancelled": 1})
    assert states(message_id) == ["CREATED", "ACTIVE", "CANCEL_REQUESTED"]
    message.record(Outcome(status=500), now=clock())
    assert api.delete(f"/v2/messages/{message_id}").status_code == 404


def test_what_was_delivered_is_readable_and_not_cancelled(api: Api, engine: Engine) -> None:
    message_id = api.published()
    engine.deliver_due()
    assert api.get(f"/v2/messages/{message_id}").status_code == 200
    assert api.delete("/v2/messages").json() == {"cancelled": 0}
    assert state(message_id) == "DELIVERED"


def test_many_are_cancelled_by_body_or_by_query(api: Api) -> None:
    ids = [api.published() for _ in range(4)]
    assert api.delete("/v2/messages", {"messageIds": ids[:2]}).json() == {"cancelled": 2}
    query = f"messageIds={ids[2]}&messageIds={ids[3]}&messageIds=unknown"
    assert api.delete(f"/v2/messages?{query}").json() == {"cancelled": 2}


def test_filters_beside_ids_are_not_looked_at(api: Api, failed: Failed) -> None:
    message_id, other = api.published(Upstash_Delay="1m"), api.published(Upstash_Delay="1m")
    answer = api.delete(f"/v2/messages?messageIds={message_id}&label=none")
    assert answer.json() == {"cancelled": 1}
    answer = api.delete("/v2/messages?label=none", {"messageIds": [other]})
    assert answer.json() == {"cancelled": 1}
    first, second = failed(), failed()
    answer = api.post(f"/v2/dlq/retry?dlqIds={first}&label=none")
    assert len(answer.json()["responses"]) == 1
    assert api.delete(f"/v2/dlq?dlqIds={second}&label=none").json() == {"deleted": 1}


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", {"messageIds": []}),
        ("", {"messageIds": None}),
        ("", {"messageIds": [5]}),
        ("", {"messageIds": "msg_1"}),
        ("", {"ids": ["msg_1"]}),
        ("", {}),
        ("", []),
        ("?messageIds=", b""),
        ("?label=", b""),
        ("?labeel=a", b""),
        ("?queue__name=a", b""),
        ("?count=0", b""),
        ("?count=501", b""),
        ("?fromDate=x", b""),
        ("?label=a%00", b""),
    ],
)
def test_a_selection_that_is_empty_or_misspelt_cancels_nothing(
    api: Api, query: str, body: Any
) -> None:
    message_id = api.published()
    answer = api.delete(f"/v2/messages{query}", body)
    assert answer.status_code == 400, answer.json()
    assert state(message_id) == "CREATED"


def test_nothing_at_all_cancels_everything(api: Api) -> None:
    for query in ("", "?count=2"):
        for _ in range(3):
            api.published()
        assert api.delete(f"/v2/messages{query}").json() == {"cancelled": 3}
        assert api.delete(f"/v2/messages{query}").json() == {"cancelled": 0}


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("label=a", 1),
        ("label=a&label=c", 2),
        ("label=a,c", 2),
        ("label=a%2Cb", 1),
        ("url=" + quote(PROVIDER, safe=""), 3),
        ("host=provider.test", 3),
        ("host=provider", 0),
        ("path=/v1/chat/completions", 3),
        ("queueName=q", 1),
        ("flowControlKey=k", 1),
        ("callerIp=127.0.0.1", 3),
        ("label=a&queueName=q", 0),
        ("topicName=g", 0),
        ("scheduleId=s", 0),
        ("fromDate=0&toDate=32503680000000", 3),
        ("toDate=0", 0),
    ],
)
def test_messages_are_cancelled_by_filter(api: Api, query: str, count: int) -> None:
    api.published(Upstash_Label="a,b")
    api.enqueue("q", Upstash_Label="c")
    api.published(Upstash_Flow_Control_Key="k", Upstash_Flow_Control_Value="rate=1")
    assert api.delete(f"/v2/messages?{query}").json() == {"cancelled": count}


@pytest.mark.parametrize("path", ["messages", "queues", "dlq"])
@pytest.mark.parametrize("name", ["a%00b", "a%20b", "%ff", "1-1%27"])
def test_a_name_that_nothing_can_have_is_not_found(api: Api, path: str, name: str) -> None:
    assert api.get(f"/v2/{path}/{name}").status_code == 404


# --- logs --------------------------------------------------------------------------------------


def test_logs_are_newest_first_under_both_names(api: Api, engine: Engine) -> None:
    message_id = api.published()
    engine.deliver_due()
    events = api.get("/v2/events").json()
    assert [entry["state"] for entry in events["events"]] == ["DELIVERED", "ACTIVE", "CREATED"]
    assert "logs" not in events
    logs = api.get(f"/v2/logs?messageId={message_id}").json()
    assert logs["logs"] == logs["events"] == events["events"]
    assert "cursor" not in logs


def test_logs_come_in_pages(api: Api) -> None:
    ids = [api.published() for _ in range(5)]
    found, cursor = [], ""
    for _ in range(3):
        page = api.get(f"/v2/logs?count=2{cursor and '&cursor=' + cursor}").json()
        found += [entry["messageId"] for entry in page["logs"]]
        cursor = page.get("cursor", "")
    assert found == ids[::-1]
    assert cursor == ""


def test_a_listing_may_begin_at_a_moment(api: Api, failed: Failed) -> None:
    failed()
    now = api.get("/v2/logs").json()["logs"][0]["time"]
    for path, key, all_of_them in (("logs", "logs", 4), ("dlq", "messages", 1)):
        for query, count in {
            f"cursor={now + 1000}&order=latestFirst": all_of_them,
            f"cursor={now - 60_000}&order=latestFirst": 0,
            f"cursor={now - 60_000}&order=earliestFirst": all_of_them,
            f"cursor={now + 1000}&order=earliestFirst": 0,
        }.items():
            assert len(api.get(f"/v2/{path}?{query}").json()[key]) == count, query


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("state=DELIVERED", 1),
        ("state=IN_PROGRESS", 1),
        ("state=CANCELED", 1),
        ("state=CANCELLED", 1),
        ("state=CREATED&order=earliestFirst", 2),
        ("label=a", 3),
        ("host=provider.test", 6),
        ("messageIds=x", 0),
    ],
)
def test_logs_are_filtered(api: Api, engine: Engine, query: str, count: int) -> None:
    api.published(Upstash_Label="a")
    engine.deliver_due()
    api.delete(f"/v2/messages/{api.published()}")
    assert len(api.get(f"/v2/logs?{query}").json()["logs"]) == count


@pytest.mark.parametrize(
    "query",
    [
        "cursor=forged",
        "cursor=' OR 1=1",
        "cursor=-1",
        "cursor=99999999999999999999",
        "cursor=999999999999999",
        "count=-1",
        "count=1001",
        "count=1e3",
        "state=ANY",
        "order=random",
        "message__body=x",
        "fromDate=99999999999999999",
    ],
)
def test_a_query_that_makes_no_sense_is_refused(api: Api, query: str) -> None:
    for path in ("/v2/logs", "/v2/dlq"):
        assert api.get(f"{path}?{query}").status_code == 400


def test_logs_know_no_keys_and_no_bodies(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.Response(500, headers={"Set-Cookie": "canary-3"}, text="error text"))
    api.published(
        body=b"canary-1",
        Upstash_Forward_Authorization="Bearer canary-2",
        Upstash_Retries="0",
    )
    engine.deliver_due()
    text = api.get("/v2/logs").content.decode()
    assert "canary" not in text
    entry = api.get("/v2/logs?state=FAILED").json()["logs"][0]
    assert (entry["responseStatus"], entry["responseBody"]) == (500, "ZXJyb3IgdGV4dA==")
    assert entry["header"]["Authorization"] == ["REDACTED"]


def test_logs_tell_a_callbacks_headers_without_its_keys(api: Api) -> None:
    api.published(
        Upstash_Callback=FAILURE,
        Upstash_Callback_Forward_X_Kind="callback",
        Upstash_Callback_Forward_Authorization="Bearer canary",
        Upstash_Failure_Callback=FAILURE,
        Upstash_Failure_Callback_Forward_X_Kind="failure",
    )
    [entry] = api.get("/v2/events").json()["events"]
    assert entry["callbackHeaders"] == {"X-Kind": ["callback"], "Authorization": ["REDACTED"]}
    assert entry["failureCallbackHeaders"] == {"X-Kind": ["failure"]}


def test_what_is_hidden_reads_the_same_before_and_after_the_delivery(
    api: Api, engine: Engine
) -> None:
    message_id = api.published(
        Upstash_Redact_Fields="header[Authorization],header[X-Plain]",
        Upstash_Forward_Authorization="Bearer k",
        Upstash_Forward_X_Plain="v",
        Upstash_Forward_X_Api_Key="not asked for",
        Upstash_Forward_Idempotency_Key="i",
        Upstash_Delay="1ms",
    )
    before = api.get(f"/v2/messages/{message_id}").json()
    engine.deliver_due()
    assert state(message_id) == "DELIVERED"
    # Its owner is told the key that is not to be hidden for as long as it is kept.
    assert before["header"]["X-Api-Key"] == ["not asked for"]
    after = api.get(f"/v2/messages/{message_id}").json()
    assert after == before | {"header": before["header"] | {"X-Api-Key": ["REDACTED"]}}
    assert after["header"] == {
        "Content-Type": ["application/json"],
        "Authorization": [fingerprint(b"Bearer k")],
        "X-Plain": [fingerprint(b"v")],
        "X-Api-Key": ["REDACTED"],
        "Idempotency-Key": ["i"],
    }
    for entry in api.get("/v2/events").json()["events"]:
        assert entry["header"] == after["header"]


@pytest.mark.parametrize("asked", ["body", "header[X-Plain]"])
def test_a_callback_hides_what_its_original_asks_to_hide_and_tells_it_its_receiver(
    api: Api, engine: Engine, wire: Wire, clock: Clock, asked: str
) -> None:
    wire.answer = lambda request: httpx.Response(200 if str(request.url) == PROVIDER else 500)
    api.published(
        body=b"very private",
        Upstash_Redact_Fields=asked,
        Upstash_Forward_X_Plain="v",
        Upstash_Callback=CALLBACK,
        Upstash_Callback_Retries="1",
        Upstash_Callback_Forward_X_Plain="c1",
    )
    engine.deliver_due()
    callback = Message.objects.get(kind="callback").message_id
    pending = api.get(f"/v2/messages/{callback}").json()
    clock.advance(20)
    engine.deliver_due()
    [letter] = api.get("/v2/dlq").json()["messages"]
    request, told = wire.to(CALLBACK)[-1], wire.callbacks()[-1]
    assert (told.source_body, request.headers["X-Plain"]) == (b"very private", "c1")
    assert told.source_header["X-Plain"] == ["v"]
    for shown in (pending, letter):
        if asked == "body":
            assert shown["body"] == fingerprint(request.content)
        else:
            assert shown["header"]["X-Plain"] == [fingerprint(b"c1")]
            # The answer is read from here when its receiver was away for too long.
            hidden = told.source_header | {"X-Plain": [fingerprint(b"v")]}
            assert Callback.from_json(shown["body"].encode()) == replace(told, source_header=hidden)


def test_nothing_is_logged_from_before_a_message_was_there(
    api: Api, engine: Engine, clock: Clock
) -> None:
    clock.advance(-5)
    message_id = api.enqueue("q")
    assert engine.deliver_due() == 1
    entries = api.get(f"/v2/events?messageId={message_id}").json()["events"]
    assert [entry["state"] for entry in entries] == ["DELIVERED", "ACTIVE", "CREATED"]
    assert entries[0]["time"] >= entries[1]["time"] >= entries[2]["time"]


# --- dead letters --------------------------------------------------------------------------------


def test_a_dead_letter_is_listed_with_the_last_answer(api: Api, failed: Failed) -> None:
    dlq_id = failed(Upstash_Label="a")
    answer = api.get("/v2/dlq").json()
    [letter] = answer["messages"]
    assert "cursor" not in answer
    assert letter["dlqId"] == dlq_id
    assert (letter["responseStatus"], letter["responseBody"]) == (500, "no")
    assert letter["label"] == "a"
    assert api.get(f"/v2/dlq/{dlq_id}").json() == letter


def test_a_dead_letter_without_a_response_says_minus_one(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.ConnectError("refused"))
    api.published(Upstash_Retries="0")
    engine.deliver_due()
    [letter] = api.get("/v2/dlq").json()["messages"]
    assert letter["responseStatus"] == -1


def test_dead_letters_come_in_pages_oldest_first(api: Api, failed: Failed) -> None:
    ids = [failed() for _ in range(3)]
    page = api.get("/v2/dlq?count=2").json()
    assert [letter["dlqId"] for letter in page["messages"]] == ids[:2]
    rest = api.get(f"/v2/dlq?count=2&cursor={page['cursor']}").json()
    assert [letter["dlqId"] for letter in rest["messages"]] == ids[2:]
    newest = api.get("/v2/dlq?order=latestFirst&count=1").json()
    assert newest["messages"][0]["dlqId"] == ids[2]


def test_dead_letters_are_filtered(api: Api, failed: Failed) -> None:
    first = failed(status=500, Upstash_Label="a")
    second = failed(status=404, Upstash_Label="b")
    for query, expected in {
        "responseStatus=404": [second],
        "responseStatus=404,500": [first, second],
        "label=a": [first],
        f"dlqIds={second}": [second],
        "queueName=q": [],
        "callerIp=127.0.0.1&label=b": [second],
    }.items():
        found = api.get(f"/v2/dlq?{query}").json()["messages"]
        assert [letter["dlqId"] for letter in found] == expected, query


def test_a_dead_letter_is_deleted_once_and_its_key_goes_with_it(api: Api, failed: Failed) -> None:
    dlq_id = failed(Upstash_Forward_Authorization="Bearer canary")
    assert "canary" in str(Message.objects.values().get(kind="message"))
    assert api.delete(f"/v2/dlq/{dlq_id}").status_code == 200
    assert api.delete(f"/v2/dlq/{dlq_id}").status_code == 404
    assert api.get(f"/v2/dlq/{dlq_id}").status_code == 404
    assert "canary" not in str(Message.objects.values().get(kind="message"))


def test_dead_letters_are_deleted_by_id_or_filter(api: Api, failed: Failed) -> None:
    ids = [failed() for _ in range(4)]
    assert api.delete("/v2/dlq", {"dlqIds": [ids[0], "1-999", "nonsense"]}).json() == {"deleted": 1}
    assert api.delete(f"/v2/dlq?dlqIds={ids[1]}").json() == {"deleted": 1}
    assert api.delete("/v2/dlq?label=none").json() == {"deleted": 0}
    answer = api.delete("/v2/dlq?responseStatus=500&count=1").json()
    assert answer["deleted"] == 1
    assert api.delete(f"/v2/dlq?cursor={answer['cursor']}").json() == {"deleted": 1}


@pytest.mark.parametrize("query", ["?labeel=a", "?dlqIds=", "?host=a.test"])
def test_a_misspelt_filter_deletes_nothing(api: Api, failed: Failed, query: str) -> None:
    failed()
    assert api.delete(f"/v2/dlq{query}").status_code == 400
    assert api.delete("/v2/dlq", {"dlqIds": []}).status_code == 400
    assert DeadLetter.objects.count() == 1


def test_a_dlq_id_is_believed_only_as_a_whole(api: Api, failed: Failed) -> None:
    time, _, number = failed().rpartition("-")
    assert api.get(f"/v2/dlq/{int(time) + 1}-{number}").status_code == 404
    assert api.get(f"/v2/dlq/{number}").status_code == 404


def test_a_retry_is_a_new_message_with_the_original_values(
    api: Api, failed: Failed, engine: Engine, wire: Wire
) -> None:
    dlq_id = failed(
        Upstash_Redact_Fields="body,header",
        Upstash_Forward_Authorization="Bearer sk-1",
        Upstash_Deduplication_Id="once",
    )
    original = Message.objects.get()
    wire.answers(httpx.Response(200))
    answer = api.post(f"/v2/dlq/retry/{dlq_id}", headers={"Upstash-Retries": "7"})
    assert answer.status_code == 201
    message = Message.objects.get(message_id=answer.json()["messageId"])
    assert message.message_id != original.message_id
    assert message.retries == 7
    assert engine.deliver_due() == 1
    assert wire.requests[-1].headers["Authorization"] == "Bearer sk-1"
    assert wire.requests[-1].content == b"hello"
    assert api.post(f"/v2/dlq/retry/{dlq_id}").status_code == 404
    original.refresh_from_db()
    assert "sk-1" not in str(original.headers)


def test_what_a_retry_says_counts_though_the_originals_is_not_repeated(
    api: Api, failed: Failed
) -> None:
    dlq_id = failed(
        Upstash_Delay="1ms",
        Upstash_Deduplication_Id="first",
        Upstash_Flow_Control_Key="k",
        Upstash_Flow_Control_Value="rate=9",
    )
    said = {"Upstash-Delay": "60s", "Upstash-Deduplication-Id": "again", "Upstash-Label": "l"}
    answer = api.post(f"/v2/dlq/retry/{dlq_id}?upstash-retries=2&Upstash-Label=x", headers=said)
    message_id = answer.json()["messageId"]
    told = api.get(f"/v2/messages/{message_id}").json()
    assert told["notBefore"] - told["createdAt"] == 60_000
    assert (told["maxRetries"], told["label"], told["flowControlKey"]) == (2, "l", "k")
    duplicate = api.publish(Upstash_Deduplication_Id="again")
    assert duplicate.status_code == 202
    assert duplicate.json() == {"messageId": message_id, "deduplicated": True}


def test_a_retry_may_wait_until_a_moment(api: Api, failed: Failed) -> None:
    dlq_id = failed()
    moment = int(time.time()) + 500
    answer = api.post(f"/v2/dlq/retry/{dlq_id}", headers={"Upstash-Not-Before": str(moment)})
    told = api.get(f"/v2/messages/{answer.json()['messageId']}").json()
    assert told["notBefore"] == moment * 1000


def test_a_retry_that_is_a_duplicate_leaves_its_dead_letter(api: Api, failed: Failed) -> None:
    _, second = failed(), failed()
    query = "upstash-deduplication-id=again&upstash-retries=4"
    answer = api.post(f"/v2/dlq/retry?{query}")
    assert answer.status_code == 201
    [taken, refused] = answer.json()["responses"]
    assert refused == {"messageId": taken["messageId"], "deduplicated": True}
    assert Message.objects.get(message_id=taken["messageId"]).retries == 4
    assert [letter.dlq_id for letter in DeadLetter.objects.all()] == [second]
    answer = api.post(f"/v2/dlq/retry/{second}?{query}")
    assert (answer.status_code, answer.json()) == (202, refused)
    assert api.post(f"/v2/dlq/retry/{second}").status_code == 201


def test_only_a_retry_takes_options_in_its_query(api: Api, failed: Failed) -> None:
    failed()
    for method in ("GET", "DELETE"):
        assert api.call(method, "/v2/dlq?upstash-retries=2").status_code == 400


def test_many_are_retried_by_id_or_filter(api: Api, failed: Failed) -> None:
    ids = [failed() for _ in range(3)]
    answer = api.post(f"/v2/dlq/retry?dlqIds={ids[0]}&dlqIds={ids[1]}")
    assert answer.status_code == 201
    assert len({each["messageId"] for each in answer.json()["responses"]}) == 2
    empty = api.post("/v2/dlq/retry?label=none").json()
    assert empty == {"responses": [], "cursor": ""}
    assert len(api.post("/v2/dlq/retry").json()["responses"]) == 1


def test_a_dead_letter_that_cannot_be_retried_stops_no_other(api: Api, failed: Failed) -> None:
    ids = [failed() for _ in range(3)]
    Message.objects.filter(dead_letter__pk=ids[1].rpartition("-")[2]).update(
        headers={"Upstash-Retries": "x"}
    )
    answer = api.post("/v2/dlq/retry")
    assert answer.status_code == 201
    first, refused, last = answer.json()["responses"]
    assert (
        Message.objects.filter(message_id__in=[first["messageId"], last["messageId"]]).count() == 2
    )
    assert "retries" in refused["error"].lower()
    assert [letter.dlq_id for letter in DeadLetter.objects.all()] == [ids[1]]


def test_a_callback_that_failed_lies_among_the_dead_letters_with_its_answer(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answer = lambda request: httpx.Response(
        500 if str(request.url) == FAILURE else 200, text="the answer"
    )
    api.published(Upstash_Callback=FAILURE, Upstash_Callback_Retries="0")
    engine.deliver_due()
    [letter] = api.get("/v2/dlq").json()["messages"]
    assert letter["url"] == FAILURE
    assert "dGhlIGFuc3dlcg==" in letter["body"]  # "the answer"


LARGE = b"x" * (9 * 1024 * 1024)


def reads_of_bodies(captured: CaptureQueriesContext) -> list[str]:
    column = re.compile(r'(?<!LENGTH\()"qstash_server_(message"."body|deadletter"."response_body)"')
    statements = [query["sql"] for query in captured]
    return [sql for sql in statements if sql.startswith("SELECT") and column.search(sql)]


def test_dead_letters_come_in_shorter_pages_where_they_are_large(api: Api, failed: Failed) -> None:
    ids = [failed(body=LARGE) for _ in range(3)]  # type: ignore[arg-type]
    page = api.get("/v2/dlq").json()
    assert [letter["dlqId"] for letter in page["messages"]] == ids[:2]
    assert page["messages"][0]["body"] == LARGE.decode()
    rest = api.get(f"/v2/dlq?cursor={page['cursor']}").json()
    assert [letter["dlqId"] for letter in rest["messages"]] == ids[2:]
    assert "cursor" not in rest


def test_deleting_dead_letters_reads_none_of_what_they_say(api: Api, failed: Failed) -> None:
    ids = [failed() for _ in range(4)]
    with CaptureQueriesContext(connection) as captured:
        assert api.delete(f"/v2/dlq/{ids[0]}").json() == {"deleted": 1}
        assert api.delete("/v2/dlq", {"dlqIds": [ids[1]]}).json() == {"deleted": 1}
        assert api.delete("/v2/dlq").json() == {"deleted": 2}
    assert reads_of_bodies(captured) == []


def test_retrying_dead_letters_reads_one_body_at_a_time(api: Api, failed: Failed) -> None:
    for _ in range(3):
        failed()
    with CaptureQueriesContext(connection) as captured:
        assert len(api.post("/v2/dlq/retry").json()["responses"]) == 3
    reads = reads_of_bodies(captured)
    assert len(reads) == 3
    assert "response_body" not in "".join(reads)


# --- queues --------------------------------------------------------------------------------------


def test_a_queue_is_made_changed_and_told(api: Api) -> None:
    asked = {"queueName": "q", "parallelism": 2, "paused": True}
    assert api.post("/v2/queues", asked).status_code == 200
    api.enqueue("q")
    queue = api.get("/v2/queues/q").json()
    assert set(queue) == {"name", "parallelism", "createdAt", "updatedAt", "lag", "paused"}
    assert (queue["parallelism"], queue["lag"], queue["paused"]) == (2, 1, True)
    assert api.get("/v2/queues").json() == [queue]
    assert api.post("/v2/queues", {"queueName": "q", "parallelism": 2}).status_code == 200
    assert api.get("/v2/queues/q").json()["paused"] is False
    assert api.post("/v2/queues", {"queueName": "q", "paused": True}).status_code == 200
    queue = api.get("/v2/queues/q").json()
    assert (queue["parallelism"], queue["paused"]) == (2, True)
    assert api.post("/v2/queues", {"queueName": "new"}).status_code == 200
    assert api.get("/v2/queues/new").json()["parallelism"] == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"queueName": "a b"},
        {"queueName": ""},
        {"queueName": None},
        {},
        [],
        {"queueName": "q", "parallelism": 0},
        {"queueName": "q", "parallelism": True},
        {"queueName": "q", "parallelism": "2"},
        {"queueName": "q", "parallelism": 2**31},
        {"queueName": "q", "parallelism": None},
        {"queueName": "q", "paused": "yes"},
    ],
)
def test_a_queue_that_makes_no_sense_is_refused(api: Api, asked: Any) -> None:
    assert api.post("/v2/queues", asked).status_code == 400
    assert not Queue.objects.exists()


def test_pausing_and_resuming_are_told_at_once_and_idempotent(api: Api) -> None:
    api.enqueue("q")
    for verb, paused in (("pause", True), ("pause", True), ("resume", False), ("resume", False)):
        assert api.post(f"/v2/queues/q/{verb}").status_code == 200
        assert api.get("/v2/queues/q").json()["paused"] is paused
    assert api.post("/v2/queues/other/pause").status_code == 404


def test_a_deleted_queue_is_gone_with_what_waited_in_it(api: Api, engine: Engine) -> None:
    message_id = api.enqueue("q")
    assert api.delete("/v2/queues/q").status_code == 200
    assert api.delete("/v2/queues/q").status_code == 200
    assert api.get("/v2/queues/q").status_code == 404
    assert api.get("/v2/queues").json() == []
    assert state(message_id) == "CANCELED"
    assert engine.deliver_due() == 0
    later = api.enqueue("q")
    engine.deliver_due()
    assert state(later) == "DELIVERED"


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_the_settings_until_they_are_rotated(api: Api, engine: Engine) -> None:
    assert api.get("/v2/keys").json() == {"current": KEYS[0], "next": KEYS[1]}
    rotated = api.post("/v2/keys/rotate").json()
    assert rotated["current"] == KEYS[1]
    assert rotated["next"].startswith("sig_")
    assert api.get("/v2/keys").json() == rotated
    again = api.post("/v2/keys/rotate").json()
    assert again["current"] == rotated["next"]
    assert SigningKeys.objects.count() == 1


@pytest.mark.parametrize("name", ["CURRENT_SIGNING_KEY", "NEXT_SIGNING_KEY"])
def test_nothing_is_signed_with_a_key_that_everybody_knows_outside_debug(
    api: Api,
    engine: Engine,
    wire: Wire,
    clock: Clock,
    configure: Callable[..., None],
    settings: Any,
    name: str,
) -> None:
    configure(**{name: conf.DEVELOPMENT_KEYS.current})
    settings.DEBUG = True
    assert conf.DEVELOPMENT_KEYS.current in api.get("/v2/keys").json().values()
    # Kept from here on, one of them at least.
    api.post("/v2/keys/rotate")
    settings.DEBUG = False
    told = api.get("/v2/keys").json()
    assert not conf.PUBLIC_SECRETS & set(told.values())
    api.published()
    engine.deliver_due()
    request = wire.requests[0]
    keys = told["current"], told["next"]
    now = clock().timestamp()
    assert verify(
        request.headers["Upstash-Signature"],
        request.content,
        url=str(request.url),
        keys=keys,
        now=now,
    )
    assert api.get("/v2/keys").json() == told


def test_without_keys_in_the_settings_the_server_makes_its_own_once(
    api: Api, configure: Callable[..., None]
) -> None:
    configure(CURRENT_SIGNING_KEY="", NEXT_SIGNING_KEY="")
    keys = api.get("/v2/keys").json()
    assert api.get("/v2/keys").json() == keys
    assert keys["current"] != keys["next"]
    assert all(len(key) >= 32 for key in keys.values())


def test_listings_take_the_same_queries_however_long_they_are(
    api: Api, clock: Clock, failed: Failed, django_assert_num_queries: Any
) -> None:
    failed()
    for _ in range(3):
        failed()
        api.enqueue("q1")
        api.enqueue("q2")
    # Of dead letters it is asked first how large they are.
    for path, count in (("/v2/logs", 1), ("/v2/dlq", 2), ("/v2/queues", 1)):
        with django_assert_num_queries(count):
            assert api.get(path).status_code == 200
    assert LogEntry.objects.exists()
