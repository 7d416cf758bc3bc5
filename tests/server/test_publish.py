"""The ways in: publish, enqueue, batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.db import OperationalError
from django.utils import timezone

from django_qstash_llm.server.models import Admitted, LogEntry, Message, Queue
from django_qstash_llm.server.views.base import answer_to_exception

from .conftest import CALLBACK, PROVIDER, TOKEN, Api


def row() -> Message:
    return Message.objects.get()


def test_a_message_that_was_taken_is_stored_with_all_it_said(api: Api) -> None:
    answer = api.publish(
        f"{PROVIDER}?v=1",
        b"\x00\xffbytes",
        Content_Type="application/octet-stream",
        Upstash_Method="put",
        Upstash_Retries="2",
        Upstash_Timeout="90s",
        Upstash_Delay="1m",
        Upstash_Callback=CALLBACK,
        Upstash_Label="a, b",
        Upstash_Flow_Control_Key="k",
        Upstash_Flow_Control_Value="rate=4, period=2s, parallelism=3",
        Upstash_Retry_Delay="1000 * (1 + retried)",
        Upstash_Forward_X_Trace="t",
        Upstash_Telemetry_Sdk="x",
    )
    message_id = answer.json()["messageId"]
    assert answer.json() == {"messageId": message_id}
    record = api.get(f"/v2/messages/{message_id}").json()
    created = record["createdAt"]
    assert record == {
        "messageId": message_id,
        "url": f"{PROVIDER}?v=1",
        "method": "PUT",
        "header": {"Content-Type": ["application/octet-stream"], "X-Trace": ["t"]},
        "bodyBase64": "AP9ieXRlcw==",
        "maxRetries": 2,
        "notBefore": created + 60_000,
        "createdAt": created,
        "callback": CALLBACK,
        "callerIP": "127.0.0.1",
        "label": "a",
        "labels": ["a", "b"],
        "flowControlKey": "k",
        "rate": 4,
        "period": 2,
        "parallelism": 3,
        "retryDelayExpression": "1000 * (1 + retried)",
        "timeout": 90,
    }


def test_a_plain_message_has_qstashs_defaults(api: Api) -> None:
    record = api.get(f"/v2/messages/{api.published()}").json()
    assert (record["method"], record["maxRetries"], record["body"]) == ("POST", 3, "hello")


def test_what_python_sends_for_a_boolean_is_understood(api: Api) -> None:
    api.published(Upstash_Content_Based_Deduplication="False")
    api.published(Upstash_Content_Based_Deduplication="False")
    assert Message.objects.count() == 2


@pytest.mark.parametrize(
    ("header", "value", "text"),
    [
        (
            "Upstash-Delay",
            "1",
            'invalid Upstash-Delay header: time: missing unit in duration "1"',
        ),
        ("Upstash-Delay", "5x", 'unknown unit "x"'),
        ("Upstash-Delay", "-5s", "negative duration"),
        ("Upstash-Retries", "-1", "Upstash-Retries"),
        ("Upstash-Retries", "x", "Upstash-Retries"),
        ("Upstash-Timeout", "0s", "invalid Upstash-Timeout header"),
        ("Upstash-Not-Before", "NaN", "Upstash-Not-Before"),
        ("Upstash-Retry-Delay", "__import__('os')", "Upstash-Retry-Delay"),
        ("Upstash-Method", "TRACE", "Upstash-Method"),
        ("Upstash-Callback", "ftp://a.test", "Upstash-Callback"),
        ("Upstash-Callback", "https://a.test/../b", "invalid callback url"),
        ("Upstash-Failure-Callback", "/relative", "Upstash-Failure-Callback"),
        ("Upstash-Callback", "http://127.0.0.1/", "endpoint resolves to a loopback address"),
        ("Upstash-Deduplication-Id", "a:b", "Upstash-Deduplication-Id"),
        ("Upstash-Deduplication-Id", "x" * 10_000, "Upstash-Deduplication-Id"),
        ("Upstash-Callback-Retries", "many", "Upstash-Callback-Retries"),
        ("Upstash-Content-Based-Deduplication", "yes", "boolean"),
        ("Upstash-Forward-X", "caf\xe9", "invalid Upstash-Forward-X header: the value of X is"),
        (
            "Upstash-Flow-Control-Value",
            "rate=1",
            "Upstash-Flow-Control-Key",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_headers_name(
    api: Api, header: str, value: str, text: str
) -> None:
    answer = api.post(f"/v2/publish/{PROVIDER}", headers={header: value})
    assert answer.status_code == 400
    assert text in answer.json()["error"]
    assert not Message.objects.exists()


def test_a_bad_flow_control_value_is_refused_in_qstashs_words(api: Api) -> None:
    answer = api.publish(Upstash_Flow_Control_Key="k", Upstash_Flow_Control_Value="period=60s")
    assert answer.status_code == 400
    assert answer.json()["error"] == (
        "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, "
        "or both as comma-separated values"
    )


@pytest.mark.parametrize(
    ("destination", "status", "text"),
    [
        ("ftp://a.test", 400, "endpoint has invalid scheme"),
        ("file:///etc/passwd", 400, "endpoint has invalid scheme"),
        ("//a.test", 400, "endpoint has invalid scheme"),
        ("https://user@a.test/", 400, "invalid destination url"),
        ("https://a.test\\@b.test/", 400, "invalid destination url"),
        ("https://a.test/" + "x" * 10_000, 400, "invalid destination url"),
        ("https://a.test/../b", 400, "dot segments"),
        ("https://a.test:99999/", 400, "endpoint is not a valid http url"),
        ("http://127.0.0.1:9/x", 400, "endpoint resolves to a loopback address: 127.0.0.1"),
        ("http://localhost/x", 400, "endpoint resolves to a loopback address: 127.0.0.1"),
        ("http://10.0.0.1/", 400, "endpoint resolves to a private address: 10.0.0.1"),
        ("http://169.254.169.254/", 400, "endpoint resolves to a link-local address"),
        ("some-group", 404, "topic some-group not found"),
        ("api/llm", 400, "api/llm"),
        ("", 400, "endpoint has invalid scheme"),
    ],
)
def test_a_destination_that_will_not_be_knocked_at_is_refused(
    api: Api, destination: str, status: int, text: str
) -> None:
    headers = {"Upstash-Callback": CALLBACK}
    answer = api.post(f"/v2/publish/{destination}", headers=headers)
    assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.json()
    assert not Message.objects.exists()


def test_an_encoded_destination_is_refused_where_the_server_tells_the_raw_path(api: Api) -> None:
    raw = "/qstash/v2/publish/https%3A%2F%2Fa.test%2Fp"
    answer = api.post(raw.removeprefix("/qstash"), RAW_URI=raw)
    assert answer.status_code == 400
    assert "endpoint has invalid scheme, add http:// or https://" in answer.json()["error"]


@pytest.mark.parametrize(
    ("limits", "headers", "status", "text"),
    [
        ({"MAX_RETRIES": 5}, {"Upstash-Retries": "6"}, 412, "quota maxRetries exceeded"),
        ({"MAX_RETRIES": 5}, {"Upstash-Callback-Retries": "6"}, 412, "quota maxRetries exceeded"),
        ({}, {"Upstash-Retries": "101"}, 412, "quota maxRetries exceeded"),
        ({}, {"Upstash-Retries": "1000000000"}, 412, "quota maxRetries exceeded"),
        ({}, {"Upstash-Failure-Callback-Retries": "101"}, 412, "quota maxRetries exceeded"),
        ({"MAX_DELAY": 60}, {"Upstash-Delay": "61s"}, 412, "quota maxDelay exceeded"),
        ({}, {"Upstash-Not-Before": "99999999999"}, 412, "quota maxDelay exceeded"),
        ({}, {"Upstash-Callback-Delay": "10000d"}, 412, "quota maxDelay exceeded"),
        (
            {},
            {"Upstash-Failure-Callback-Not-Before": "99999999999"},
            412,
            "quota maxDelay exceeded",
        ),
        ({}, {"Upstash-Delay": "999999d"}, 400, "Upstash-Delay"),
        ({"MAX_BODY": 4}, {}, 413, "body is larger than 4 bytes"),
        ({}, {f"Upstash-Forward-X-{i}": "v" for i in range(101)}, 400, "more than 100 headers"),
    ],
)
def test_what_is_too_much_is_refused(
    api: Api,
    configure: Callable[..., None],
    limits: dict[str, Any],
    headers: dict[str, str],
    status: int,
    text: str,
) -> None:
    configure(**limits)
    answer = api.post(f"/v2/publish/{PROVIDER}", b"hello", headers=headers)
    assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.json()
    assert not Message.objects.exists()


def test_retries_may_be_without_limit(api: Api, configure: Callable[..., None]) -> None:
    configure(MAX_RETRIES=None)
    api.published(Upstash_Retries="1000000000")
    assert row().retries == 1_000_000_000


def test_a_body_larger_than_djangos_own_limit_is_taken(api: Api) -> None:
    body = b"x" * 3_000_000
    api.published(body=body)
    assert bytes(row().body) == body


def test_a_chunked_body_is_refused_where_django_would_take_it_for_empty(api: Api) -> None:
    answer = api.post(f"/v2/publish/{PROVIDER}", headers={"Transfer-Encoding": "chunked"})
    assert answer.status_code == 411


def test_a_moment_in_the_past_means_now(api: Api) -> None:
    api.published(Upstash_Not_Before="1")
    assert abs(row().not_before - timezone.now()) < timedelta(seconds=5)


def test_not_before_wins_over_delay(api: Api) -> None:
    moment = int(timezone.now().timestamp()) + 500
    api.published(Upstash_Not_Before=str(moment), Upstash_Delay="1s")
    assert row().not_before.timestamp() == moment


def test_a_timeout_can_only_be_shortened(api: Api, configure: Callable[..., None]) -> None:
    configure(MAX_TIMEOUT=60)
    api.published(Upstash_Timeout="2h")
    assert row().timeout == 60


def test_headers_that_are_not_to_be_forwarded_are_dropped(api: Api) -> None:
    names = ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Upstash-Signature"]
    names += ["Upstash-Message-Id", "Upstash-Retried", "Upstash-Caller-Ip", "Upstash-Region"]
    names += ["Upstash-Topic-Name", "Upstash-Schedule-Id"]
    kept = ["X-Kept", "Upstash-Workflow-Sdk-Version"]
    forwarded = {f"Upstash-Forward-{name}": "x" for name in [*names, *kept]}
    message_id = api.post(f"/v2/publish/{PROVIDER}", headers=forwarded).json()["messageId"]
    header = api.get(f"/v2/messages/{message_id}").json()["header"]
    assert header == {name: ["x"] for name in kept}


def test_asked_for_fields_are_hidden_from_readers_and_not_from_the_row(api: Api) -> None:
    message_id = api.published(
        Upstash_Redact_Fields="body, header[Authorization]",
        Upstash_Forward_Authorization="Bearer sk-1",
    )
    record = api.get(f"/v2/messages/{message_id}").json()
    assert record["body"].startswith("REDACTED:")
    assert record["header"]["Authorization"][0].startswith("REDACTED:")
    assert bytes(row().body) == b"hello"


def test_only_post_publishes(api: Api) -> None:
    answer = api.get(f"/v2/publish/{PROVIDER}")
    assert answer.status_code == 405
    assert "error" in answer.json()


def test_an_unknown_path_is_404_in_json_with_and_without_a_slash(api: Api) -> None:
    for path in ("/v2", "/v2/schedule", "/v2/topics/g/x", "/v2/messages/"):
        answer = api.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "not found"})


def test_any_accept_header_is_answered_with_json(api: Api) -> None:
    answer = api.get("/v2/queues", headers={"Accept": "text/html"})
    assert answer.status_code == 200
    assert answer["Content-Type"] == "application/json"


def test_a_database_that_does_not_answer_is_503_so_that_clients_try_again() -> None:
    answer = answer_to_exception(OperationalError("gone"), {})
    assert answer is not None
    assert answer.status_code == 503


@pytest.mark.django_db(transaction=True)
def test_the_api_works_under_asgi_with_the_raw_path() -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/qstash/v2/publish/https://a.test/a/b",
        "raw_path": b"/qstash/v2/publish/https://a.test/a%2Fb",
        "query_string": b"x=1",
        "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        "client": ("1.2.3.4", 5),
    }

    async def published() -> list[Any]:
        server = ApplicationCommunicator(get_asgi_application(), scope)
        await server.send_input({"type": "http.request", "body": b"hello"})
        events = [await server.receive_output(), await server.receive_output()]
        await server.wait()
        return events

    start, end = async_to_sync(published)()
    assert start["status"] == 200, end
    message = Message.objects.get()
    assert (message.url, bytes(message.body)) == ("https://a.test/a%2Fb?x=1", b"hello")
    assert message.caller_ip == "1.2.3.4"


# --- deduplication -----------------------------------------------------------------------------


def test_a_duplicate_is_202_with_the_first_ones_id(api: Api) -> None:
    first = api.published(Upstash_Deduplication_Id="one")
    again = api.publish(body=b"other", Upstash_Deduplication_Id="one")
    assert again.status_code == 202
    assert again.json() == {"messageId": first, "deduplicated": True}
    assert Message.objects.count() == 1


def test_the_same_content_is_a_duplicate_when_asked_for(api: Api) -> None:
    options = {"Upstash_Content_Based_Deduplication": "True", "Upstash_Forward_X": "1"}
    first = api.published(**options)
    assert api.publish(**options).json() == {"messageId": first, "deduplicated": True}
    assert api.publish(**(options | {"Upstash_Forward_X": "2"})).status_code == 200
    assert api.publish(body=b"other", **options).status_code == 200
    assert api.publish(f"{PROVIDER}?x", **options).status_code == 200


def test_an_id_is_free_again_after_ten_minutes(api: Api) -> None:
    from django_qstash_llm.qstash import Message as WireMessage

    now = timezone.now()
    message = WireMessage("https://a.test", deduplication_id="one")

    def accept(minutes: float) -> Any:
        moment = now + timedelta(minutes=minutes)
        admitted = [Admitted(message)]
        return Message.objects.accept(admitted, account="", caller_ip="", now=moment)[0]

    first = accept(0)
    assert accept(9.9) == (first.message_id, True, "")
    later = accept(10)
    assert not later.is_duplicate
    assert accept(19.9) == (later.message_id, True, "")


# --- queues and batches ------------------------------------------------------------------------


def test_an_enqueue_makes_the_queue_and_leaves_one_that_is_there_as_it_is(api: Api) -> None:
    api.enqueue("q")
    assert Queue.objects.get().parallelism == 1
    api.post("/v2/queues", {"queueName": "q", "parallelism": 4, "paused": True})
    api.enqueue("q")
    assert (Queue.objects.get().parallelism, Queue.objects.get().is_paused) == (4, True)


@pytest.mark.parametrize("header", ["Upstash-Delay", "Upstash-Not-Before"])
def test_a_message_in_a_queue_cannot_be_delayed(api: Api, header: str) -> None:
    value = "10s" if header == "Upstash-Delay" else "1"
    answer = api.post(f"/v2/enqueue/q/{PROVIDER}", headers={header: value})
    assert answer.status_code == 400
    assert "cannot be delayed" in answer.json()["error"]
    assert not Queue.objects.exists()


@pytest.mark.parametrize("queue", ["a b", "a%20b", "a:b", ""])
def test_a_queue_has_a_plain_name(api: Api, queue: str) -> None:
    answer = api.post(f"/v2/enqueue/{queue}/{PROVIDER}")
    assert (answer.status_code, answer.json()) == (400, {"error": "invalid queue name"})


def test_a_batch_answers_in_order_and_one_bad_item_does_not_touch_the_others(api: Api) -> None:
    answer = api.post(
        "/v2/batch",
        [
            {"destination": PROVIDER, "body": "1", "headers": {"Upstash-Retries": "0"}},
            {"destination": "http://10.0.0.1/"},
            {"destination": PROVIDER, "body": None, "queue": None, "headers": None},
            "not an object",
            {"destination": PROVIDER, "queue": "q", "headers": {"upstash-label": ["a"]}},
            {"destination": PROVIDER, "headers": {"Upstash-Delay": "1"}},
            {"destination": "https://\ud800.test/"},
        ],
    )
    assert answer.status_code == 200
    answers = answer.json()
    assert [sorted(each) for each in answers] == [
        ["messageId"],
        ["error"],
        ["messageId"],
        ["error"],
        ["messageId"],
        ["error"],
        ["error"],
    ]
    rows = list(Message.objects.order_by("pk"))
    assert [row.message_id for row in rows] == [answers[i]["messageId"] for i in (0, 2, 4)]
    assert [row.queue_name for row in rows] == ["", "", "q"]
    assert LogEntry.objects.count() == 3


@pytest.mark.parametrize(
    "host", ["127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1", "a\u200b.test"]
)
def test_a_host_in_disguise_is_refused_in_a_batch(api: Api, host: str) -> None:
    [answer] = api.post("/v2/batch", [{"destination": f"http://{host}/"}]).json()
    assert answer == {"error": "invalid destination url: endpoint's host holds what no name does"}
    assert not Message.objects.exists()


def test_duplicates_within_a_batch_are_found(api: Api) -> None:
    item = {"destination": PROVIDER, "headers": {"Upstash-Deduplication-Id": "one"}}
    first, second = api.post("/v2/batch", [item, item]).json()
    assert second == {"messageId": first["messageId"], "deduplicated": True}


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"not json", b'"x"', b"[" * 100_000, b"[" + b"1" * 5000 + b"]"[:0]],
    ids=range(7),
)
def test_what_is_no_batch_is_refused(api: Api, body: bytes) -> None:
    answer = api.post("/v2/batch", body)
    assert answer.status_code == 400
    assert not Message.objects.exists()


def test_a_batch_may_be_too_long_or_too_large(api: Api, configure: Callable[..., None]) -> None:
    configure(MAX_BATCH_MESSAGES=2, MAX_BATCH_BODY=1000)
    item = {"destination": PROVIDER}
    assert api.post("/v2/batch", [item] * 3).status_code == 400
    assert api.post("/v2/batch", [item | {"body": "x" * 1000}]).status_code == 413


def test_a_thousand_messages_take_few_queries(api: Api, django_assert_max_num_queries: Any) -> None:
    items = [
        {"destination": PROVIDER, "headers": {"Upstash-Deduplication-Id": f"d{i}"}, "queue": "q"}
        for i in range(1000)
    ]
    with django_assert_max_num_queries(150):
        answers = api.post("/v2/batch", items).json()
    assert len({answer["messageId"] for answer in answers}) == 1000


def test_the_hosted_models_need_an_upstream_and_a_callback(
    api: Api, configure: Callable[..., None]
) -> None:
    body = json.dumps({"model": "m"}).encode()
    refused = api.publish("api/llm", body, Upstash_Callback=CALLBACK)
    assert refused.status_code == 400
    assert "HOSTED_MODELS_URL" in refused.json()["error"]
    configure(HOSTED_MODELS_URL="https://hosted.test/v1", HOSTED_MODELS_KEY="sk-hosted")
    assert api.publish("api/llm", body).status_code == 400
    assert api.publish("api/llm", body, Upstash_Callback=CALLBACK).status_code == 200


def test_what_is_published_is_delivered_at_once_where_celery_is_eager(
    api: Api, wire: Any, django_capture_on_commit_callbacks: Any
) -> None:
    wire.answers(httpx.Response(200))
    with django_capture_on_commit_callbacks(execute=True):
        message_id = api.published(Upstash_Callback=CALLBACK)
    assert Message.objects.get(message_id=message_id).state == "DELIVERED"
    assert len(wire.callbacks()) == 1
