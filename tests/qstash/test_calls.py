from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from django_qstash_llm.qstash import (
    Accepted,
    DeadLetter,
    FlowControlState,
    InvalidOption,
    Keys,
    LogEntry,
    Message,
    MessageRecord,
    Options,
    Page,
    Queue,
    Refused,
    calls,
)
from django_qstash_llm.qstash.calls import Call

URL = "https://api.openai.com/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def asked(call: Call[Any]) -> tuple[Any, ...]:
    return (call.method, call.path, list(call.params), dict(call.headers), call.content)


# --- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "request_line", "params"),
    [
        (calls.get_message("msg_1"), "GET /v2/messages/msg_1", []),
        (calls.cancel_message("msg_1"), "DELETE /v2/messages/msg_1", []),
        (calls.cancel_all_messages(), "DELETE /v2/messages", []),
        (
            calls.cancel_messages_by(label="a", url=URL, from_date=0),
            "DELETE /v2/messages",
            [("label", "a"), ("url", URL), ("fromDate", "0")],
        ),
        (
            calls.cancel_messages_by(message_id=["msg_1", "msg_2"]),
            "DELETE /v2/messages",
            [("messageId", "msg_1"), ("messageId", "msg_2")],
        ),
        (calls.logs(), "GET /v2/events", []),
        (
            calls.logs(
                cursor="1-2",
                count=10,
                message_id="msg_1",
                state="ERROR",
                host="h",
                path="/p",
                topic_name="t",
                schedule_id="s",
                queue_name="q",
                label=["a", "b"],
                flow_control_key="k",
                caller_ip="192.0.2.7",
                from_date=1,
                to_date=2,
                url=None,
            ),
            "GET /v2/events",
            [
                ("cursor", "1-2"),
                ("count", "10"),
                ("messageId", "msg_1"),
                ("state", "ERROR"),
                ("host", "h"),
                ("path", "/p"),
                ("topicName", "t"),
                ("scheduleId", "s"),
                ("queueName", "q"),
                ("label", "a"),
                ("label", "b"),
                ("flowControlKey", "k"),
                ("callerIp", "192.0.2.7"),
                ("fromDate", "1"),
                ("toDate", "2"),
            ],
        ),
        (
            calls.dead_letters(cursor="1-2", count=5, response_status=500),
            "GET /v2/dlq",
            [("cursor", "1-2"), ("count", "5"), ("responseStatus", "500")],
        ),
        (calls.get_dead_letter("1-0"), "GET /v2/dlq/1-0", []),
        (calls.delete_dead_letter("1-0"), "DELETE /v2/dlq/1-0", []),
        (calls.retry_dead_letter("1-0"), "POST /v2/dlq/retry/1-0", []),
        (
            calls.retry_dead_letters(["1-0", "2-0"]),
            "POST /v2/dlq/retry",
            [("dlqIds", "1-0"), ("dlqIds", "2-0")],
        ),
        (calls.queues(), "GET /v2/queues", []),
        (calls.get_queue("q"), "GET /v2/queues/q", []),
        (calls.delete_queue("q"), "DELETE /v2/queues/q", []),
        (calls.pause_queue("q"), "POST /v2/queues/q/pause", []),
        (calls.resume_queue("q"), "POST /v2/queues/q/resume", []),
        (calls.flow_controls(), "GET /v2/flowControl", []),
        (calls.flow_controls(search="open"), "GET /v2/flowControl", [("search", "open")]),
        (calls.get_flow_control("k"), "GET /v2/flowControl/k", []),
        (calls.pause_flow_control("k"), "POST /v2/flowControl/k/pause", []),
        (calls.resume_flow_control("k"), "POST /v2/flowControl/k/resume", []),
        (
            calls.pin_flow_control("k", parallelism=2, rate=10, period=60),
            "POST /v2/flowControl/k/pin",
            [("parallelism", "2"), ("rate", "10"), ("period", "60")],
        ),
        (calls.pin_flow_control("k", rate=10), "POST /v2/flowControl/k/pin", [("rate", "10")]),
        (
            calls.unpin_flow_control("k", parallelism=True, rate=True),
            "POST /v2/flowControl/k/unpin",
            [("parallelism", "true"), ("rate", "true")],
        ),
        (
            calls.unpin_flow_control("k", rate=True),
            "POST /v2/flowControl/k/unpin",
            [("rate", "true")],
        ),
        (calls.reset_flow_control_rate("k"), "POST /v2/flowControl/k/resetRate", []),
        (calls.resume_gates("h"), "POST /v2/gates/resume", [("host", "h")]),
        (calls.global_parallelism(), "GET /v2/globalParallelism", []),
        (calls.keys(), "GET /v2/keys", []),
        (calls.rotate_keys(), "POST /v2/keys/rotate", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_without_a_body_asks_as_documented(
    call: Call[Any], request_line: str, params: list[tuple[str, str]]
) -> None:
    method, path = request_line.split(" ")
    assert asked(call) == (method, path, params, {}, b"")


@pytest.mark.parametrize(
    ("call", "request_line", "body"),
    [
        (
            calls.cancel_messages(["msg_1", "msg_2"]),
            "DELETE /v2/messages",
            {"messageIds": ["msg_1", "msg_2"]},
        ),
        (calls.delete_dead_letters(("1-0",)), "DELETE /v2/dlq", {"dlqIds": ["1-0"]}),
        (
            calls.upsert_queue("q"),
            "POST /v2/queues",
            {"queueName": "q", "parallelism": 1, "paused": False},
        ),
        (
            calls.upsert_queue("q", parallelism=5, is_paused=True),
            "POST /v2/queues",
            {"queueName": "q", "parallelism": 5, "paused": True},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_with_a_body_asks_as_documented(
    call: Call[Any], request_line: str, body: Any
) -> None:
    method, path, params, headers, content = asked(call)
    assert (f"{method} {path}", params, headers, json.loads(content)) == (
        request_line,
        [],
        JSON,
        body,
    )


def test_publishing_posts_the_bytes_to_the_messages_path() -> None:
    message = Message(URL, b"\xff", Options(retries=1), queue="q")
    assert asked(calls.publish(message)) == (
        "POST",
        f"/v2/enqueue/q/{URL}",
        [],
        {"Upstash-Retries": "1"},
        b"\xff",
    )


def test_a_batch_posts_all_messages_at_once() -> None:
    messages = [Message(URL, b"a"), Message("group", b"b", queue="q")]
    call = calls.batch(messages)
    assert asked(call)[:4] == ("POST", "/v2/batch", [], JSON)
    assert [Message.from_batch_item(item) for item in json.loads(call.content)] == messages


# --- what may be repeated ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "is_repeatable"),
    [
        (calls.publish(Message(URL)), False),
        (calls.publish(Message(URL, deduplication_id="a")), True),
        (calls.publish(Message(URL, deduplication_id="a", queue="q")), True),
        (calls.publish(Message(URL, options=Options(content_based_deduplication=True))), False),
        (
            calls.batch([Message(URL, deduplication_id="a"), Message(URL, deduplication_id="b")]),
            True,
        ),
        (calls.batch([Message(URL, deduplication_id="a"), Message(URL)]), False),
        (calls.retry_dead_letter("1-0"), False),
        (calls.retry_dead_letters(["1-0"]), False),
        (calls.rotate_keys(), False),
        (calls.cancel_all_messages(), False),
        (calls.get_message("msg_1"), True),
        (calls.cancel_message("msg_1"), True),
        (calls.logs(), True),
        (calls.dead_letters(), True),
        (calls.upsert_queue("q"), True),
    ],
)
def test_only_what_does_no_more_when_sent_twice_is_repeatable(
    call: Call[Any], is_repeatable: bool
) -> None:
    assert call.is_repeatable is is_repeatable


# --- what would select everything ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: calls.cancel_messages([]), "message_ids"),
        (lambda: calls.cancel_messages([""]), "message_ids"),
        (lambda: calls.cancel_messages("msg_1"), "message_ids"),
        (lambda: calls.cancel_messages_by(), "filters"),
        (lambda: calls.cancel_messages_by(label=""), "label"),
        (lambda: calls.cancel_messages_by(label=None), "label"),
        (lambda: calls.cancel_messages_by(label=[]), "label"),
        (lambda: calls.cancel_messages_by(label=[""], url=URL), "label"),
        (lambda: calls.cancel_messages_by(label=["a", None], url=URL), "label"),
        (lambda: calls.cancel_messages_by(labeel="a"), "labeel"),
        (lambda: calls.cancel_message(""), "message_id"),
        # httpx takes dot segments out of a path, and what is left cancels everything.
        (lambda: calls.cancel_message("."), "message_id"),
        (lambda: calls.cancel_message("msg_1/../"), "message_id"),
        (lambda: calls.cancel_message("?"), "message_id"),
        (lambda: calls.delete_dead_letters([]), "dlq_ids"),
        (lambda: calls.delete_dead_letters([""]), "dlq_ids"),
        (lambda: calls.delete_dead_letter(""), "dlq_id"),
        (lambda: calls.delete_dead_letter("."), "dlq_id"),
        (lambda: calls.retry_dead_letters([]), "dlq_ids"),
        (lambda: calls.retry_dead_letters([""]), "dlq_ids"),
        (lambda: calls.retry_dead_letter(""), "dlq_id"),
        (lambda: calls.logs(labeel="a"), "labeel"),
        (lambda: calls.get_queue("a/b"), "queue"),
        (lambda: calls.delete_queue(".."), "queue"),
        (lambda: calls.upsert_queue("a b"), "queue"),
        (lambda: calls.upsert_queue("q", parallelism=0), "parallelism"),
        (lambda: calls.upsert_queue("q", parallelism=True), "parallelism"),
        (lambda: calls.pause_flow_control(""), "flow_control.key"),
    ],
)
def test_a_selection_that_is_empty_or_mistyped_is_refused(
    build: Callable[[], Call[Any]], field: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        build()
    assert caught.value.field == field


# --- what is made of the answer ------------------------------------------------------------------

LETTER = {"messageId": "msg_1", "url": URL, "responseStatus": 500}


@pytest.mark.parametrize(
    ("call", "answer", "read"),
    [
        (calls.publish(Message(URL)), {"messageId": "msg_1"}, Accepted("msg_1")),
        (
            calls.batch([Message(URL), Message("group")]),
            [{"messageId": "msg_1", "deduplicated": True}, [{"messageId": "msg_2", "url": URL}]],
            [Accepted("msg_1", is_duplicate=True), [Accepted("msg_2", url=URL)]],
        ),
        (
            calls.batch([Message(URL), Message(URL)]),
            [{"error": "no"}, {"messageId": "msg_2"}],
            [Refused("no"), Accepted("msg_2")],
        ),
        (calls.batch([Message(URL)]), {"messageId": "msg_1"}, [Accepted("msg_1")]),
        (calls.batch([]), [], []),
        (
            calls.get_message("msg_1"),
            {"messageId": "msg_1", "url": URL},
            MessageRecord(message_id="msg_1", url=URL),
        ),
        (calls.cancel_messages(["msg_1"]), {"cancelled": 1}, 1),
        (calls.cancel_messages_by(label="a"), {"cancelled": 0}, 0),
        (calls.cancel_all_messages(), {"cancelled": 7}, 7),
        (
            calls.logs(),
            {
                "events": [{"time": 1, "messageId": "m", "state": "ACTIVE", "url": URL}],
                "cursor": "c",
            },
            Page([LogEntry(time=1, message_id="m", state="ACTIVE", url=URL)], "c"),
        ),
        (calls.logs(), {"logs": []}, Page([])),
        (
            calls.dead_letters(),
            {"messages": [LETTER | {"dlqId": "1-0"}]},
            Page([DeadLetter(message_id="msg_1", url=URL, dlq_id="1-0", response_status=500)]),
        ),
        # A single one may come without its own id.
        (
            calls.get_dead_letter("1-0"),
            LETTER,
            DeadLetter(message_id="msg_1", url=URL, dlq_id="1-0", response_status=500),
        ),
        (calls.delete_dead_letters(["1-0"]), {"deleted": 0}, 0),
        (calls.retry_dead_letter("1-0"), {"messageId": "msg_2"}, Accepted("msg_2")),
        (
            calls.retry_dead_letters(["1-0", "2-0"]),
            {"responses": [{"messageId": "msg_2"}, {"error": "no"}], "cursor": ""},
            [Accepted("msg_2"), Refused("no")],
        ),
        (calls.retry_dead_letters(["1-0"]), {"responses": []}, []),
        (calls.queues(), [{"name": "q"}], [Queue(name="q")]),
        (calls.get_queue("q"), {"name": "q", "lag": 3}, Queue(name="q", lag=3)),
        (calls.flow_controls(), [{"flowControlKey": "k"}], [FlowControlState(key="k")]),
        (calls.get_flow_control("k"), {"flowControlKey": "k"}, FlowControlState(key="k")),
        (calls.global_parallelism(), {"parallelismMax": 20, "parallelismCount": 3}, (20, 3)),
        # Go leaves zeros out.
        (calls.global_parallelism(), {"parallelismMax": 20}, (20, 0)),
        (calls.keys(), {"current": "a", "next": "b"}, Keys("a", "b")),
        (calls.rotate_keys(), {"current": "a", "next": "b"}, Keys("a", "b")),
    ],
)
def test_an_answer_is_read_into_our_words(call: Call[Any], answer: Any, read: Any) -> None:
    assert call.parse(answer) == read


@pytest.mark.parametrize(
    "answer", [[], [{"messageId": "a"}], [{"messageId": "a"}] * 3, {"messageId": "a"}]
)
def test_a_batchs_answer_of_another_length_cannot_be_matched(answer: Any) -> None:
    with pytest.raises(ValueError, match="2 messages went in and the answer does not match them"):
        calls.batch([Message(URL)] * 2).parse(answer)
