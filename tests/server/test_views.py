"""The management calls: messages, logs, dead letters, queues, keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter, LogEntry, Message, Queue, SigningKeys

from .conftest import FAILURE, KEYS, PROVIDER, Api, Clock, Wire, state, states

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
    for _ in range(3):
        api.published()
    assert api.delete("/v2/messages?count=2").json() == {"cancelled": 2}
    assert api.delete("/v2/messages").json() == {"cancelled": 1}


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
    assert "canary" in str(Message.objects.get(kind="message").headers)
    assert api.delete(f"/v2/dlq/{dlq_id}").status_code == 200
    assert api.delete(f"/v2/dlq/{dlq_id}").status_code == 404
    assert api.get(f"/v2/dlq/{dlq_id}").status_code == 404
    assert "canary" not in str(Message.objects.get(kind="message").headers)


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
    for path, count in (("/v2/logs", 1), ("/v2/dlq", 1), ("/v2/queues", 1)):
        with django_assert_num_queries(count):
            assert api.get(path).status_code == 200
    assert LogEntry.objects.exists()
