"""Every call of the official Python client, sync and async, over a real socket: what it hands
back is compared, whole, with what QStash's protocol says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import qstash
from qstash import chat
from qstash.dlq import DlqMessage, ListDlqMessagesResponse
from qstash.errors import QStashError, SignatureError
from qstash.flow_control_api import FlowControlInfo, GlobalParallelismInfo
from qstash.log import Log, LogState
from qstash.message import (
    BatchResponse,
    BatchUrlGroupResponse,
    EnqueueResponse,
    EnqueueUrlGroupResponse,
    FlowControlProperties,
    PublishResponse,
    PublishUrlGroupResponse,
)
from qstash.message import Message as Told
from qstash.queue import Queue
from qstash.schedule import Schedule, ScheduleState
from qstash.signing_key import SigningKey
from qstash.url_group import Endpoint, UrlGroup

from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Message
from django_qstash_llm.server.serving import Server

from .conftest import CALLBACK, FAILURE, KEYS, PROVIDER, TOKEN, Clock, Wire, states
from .test_delivery import eventually

pytestmark = pytest.mark.django_db(transaction=True)

CLIENTS = {"sync": qstash.QStash, "async": qstash.AsyncQStash}
called: set[tuple[str, str]] = set()
"""Which client, and what was called of it. The last test asks whether anything is missing."""


class Sdk:
    """One of the two official clients: ``sdk.message.get(…)`` answers, whichever it is."""

    def __init__(self, kind: str, url: str, token: str = TOKEN) -> None:
        self.kind = kind
        self.client = CLIENTS[kind](token, retry=False, base_url=url)
        self.runner = asyncio.Runner()
        self.receiver = _Noted(self, "receiver", qstash.Receiver(*KEYS))

    def __getattr__(self, api: str) -> _Noted:
        return _Noted(self, api, getattr(self.client, api))

    def wait_for(self, answer: Any) -> Any:
        return self.runner.run(answer) if inspect.iscoroutine(answer) else answer

    def close(self) -> None:
        # Neither client has a close of its own.
        http = self.client.http._client
        http.close() if self.kind == "sync" else self.runner.run(http.aclose())
        self.runner.close()


class _Noted:
    """An API of a client; what is called of it is noted down."""

    def __init__(self, sdk: Sdk, name: str, api: Any) -> None:
        self.sdk, self.name, self.api = sdk, name, api

    def __getattr__(self, method: str) -> Callable[..., Any]:
        function = getattr(self.api, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = self.sdk.wait_for(function(*args, **kwargs))
            called.add((self.sdk.kind, f"{self.name}.{method}"))
            return answer

        return call


@contextmanager
def connected(kind: str, url: str, token: str = TOKEN) -> Iterator[Sdk]:
    sdk = Sdk(kind, url, token)
    try:
        yield sdk
    finally:
        sdk.close()


@pytest.fixture
def server(qstash_server: dict[str, Any]) -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(params=CLIENTS)
def sdk(server: Server, request: pytest.FixtureRequest) -> Iterator[Sdk]:
    with connected(request.param, server.url) as sdk:
        yield sdk


class Recently:
    """Equals the unix milliseconds between its making, ``plus`` seconds, and now, plus those."""

    def __init__(self, plus: float = 0) -> None:
        self.plus, self.since = plus * 1000, time.time() * 1000

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int):
            return NotImplemented
        return self.since - 1 <= other - self.plus <= time.time() * 1000 + 1

    def __repr__(self) -> str:
        return f"Recently(since={self.since}, plus={self.plus})"


class Some:
    """Equals any text of this beginning."""

    def __init__(self, beginning: str) -> None:
        self.beginning = beginning

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith(self.beginning)

    def __repr__(self) -> str:
        return f"Some({self.beginning!r})"


def told(message_id: Any, **differences: Any) -> Told:
    """A message as the SDK tells it that was published to the provider with nothing but a URL."""
    nothing: dict[str, Any] = dict.fromkeys(Told.__dataclass_fields__)
    return Told(
        **nothing
        | {
            "message_id": message_id,
            "url": PROVIDER,
            "method": "POST",
            "max_retries": 3,
            "created_at": Recently(),
            "not_before": Recently(),
            "caller_ip": "127.0.0.1",
        }
        | differences
    )


def log(message_id: Any, state: str, **differences: Any) -> Log:
    nothing: dict[str, Any] = dict.fromkeys(Log.__dataclass_fields__)
    return Log(
        **nothing
        | {
            "time": Recently(),
            "message_id": message_id,
            "state": LogState(state),
            "url": PROVIDER,
            "method": "POST",
            "max_retries": 3,
        }
        | differences
    )


def redacted(text: str) -> str:
    return f"REDACTED:{hashlib.sha256(text.encode()).hexdigest()}"


def delivered(message_id: str) -> None:
    eventually(lambda: states(message_id)[-1:] == ["DELIVERED"])


EVERYTHING: dict[str, Any] = {
    "method": "PUT",
    "headers": {"X-Trace": "t", "Upstash-Forward-X-Other": "o, p"},
    "callback": CALLBACK,
    "callback_headers": {"Forward-X-Called": "c", "Retries": "1"},
    "failure_callback": FAILURE,
    "failure_callback_headers": {"Upstash-Failure-Callback-Forward-X-Failed": "f"},
    "retries": 2,
    "retry_delay": "1000 * (1 + retried)",
    "timeout": 30,
    "label": "a",
    "content_based_deduplication": False,
}
TOLD_OF_EVERYTHING: dict[str, Any] = {
    "method": "PUT",
    "callback": CALLBACK,
    "callback_headers": {"X-Called": ["c"]},
    "failure_callback": FAILURE,
    "failure_callback_headers": {"X-Failed": ["f"]},
    "max_retries": 2,
    "retry_delay_expression": "1000 * (1 + retried)",
    "label": "a",
}
HEADERS = {"X-Trace": ["t"], "X-Other": ["o, p"]}
FLOW = {"key": "k", "parallelism": 3, "rate": 4, "period": "1m30s"}
TOLD_FLOW = FlowControlProperties(key="k", parallelism=3, rate=4, period=90)


# --- messages: in --------------------------------------------------------------------------------


def test_what_was_published_is_told_whole(sdk: Sdk) -> None:
    expected = told(
        Some("msg_"),
        body="héllo",
        headers={"Content-Type": ["text/plain"], **HEADERS},
        flow_control=TOLD_FLOW,
        not_before=Recently(3600),
        **TOLD_OF_EVERYTHING,
    )
    answer = sdk.message.publish(
        url=PROVIDER,
        body="héllo",
        content_type="text/plain",
        delay="1h",
        flow_control=FLOW,
        **EVERYTHING,
    )
    assert answer == PublishResponse(message_id=Some("msg_"), deduplicated=False)
    assert sdk.message.get(answer.message_id) == expected


def test_what_was_published_with_nothing_is_told_with_nothing(sdk: Sdk) -> None:
    expected = told(Some("msg_"), not_before=Recently(60))
    answer = sdk.message.publish(url=PROVIDER, delay=60)
    assert sdk.message.get(answer.message_id) == expected


def test_a_body_that_is_no_text_is_told_in_base64(sdk: Sdk) -> None:
    answer = sdk.message.publish(url=PROVIDER, body=b"\xff\x00", delay="1d")
    message = sdk.message.get(answer.message_id)
    assert (message.body, message.body_base64) == (None, base64.b64encode(b"\xff\x00").decode())


def test_a_message_may_wait_until_a_moment(sdk: Sdk) -> None:
    moment = int(time.time()) + 600
    answer = sdk.message.publish(url=PROVIDER, body="x", not_before=moment)
    assert sdk.message.get(answer.message_id).not_before == moment * 1000


@pytest.mark.parametrize(
    ("redact", "body", "header"),
    [
        ({"body": True}, redacted("b"), {"Authorization": ["k"], "X-Trace": ["t"]}),
        (
            {"header": ["authorization"]},
            "b",
            {"Authorization": [redacted("k")], "X-Trace": ["t"]},
        ),
        (
            {"body": True, "header": True},
            redacted("b"),
            {"Authorization": [redacted("k")], "X-Trace": [redacted("t")]},
        ),
    ],
)
def test_what_is_to_be_hidden_is_not_told_and_yet_delivered(
    sdk: Sdk, wire: Wire, redact: Any, body: str, header: dict[str, list[str]]
) -> None:
    # Keys are forgotten with the delivery: it waits until they have been asked for.
    was_asked = threading.Event()
    wire.answer = lambda request: httpx.Response(200 if was_asked.wait(10) else 500)
    answer = sdk.message.publish(
        url=PROVIDER, body="b", headers={"Authorization": "k", "X-Trace": "t"}, redact=redact
    )
    message = sdk.message.get(answer.message_id)
    was_asked.set()
    assert (message.body, message.headers) == (body, header)
    delivered(answer.message_id)
    [request] = wire.requests
    assert (request.content, request.headers["authorization"]) == (b"b", "k")
    # What was told in full is told no more, and what was hidden is told as before.
    later = sdk.message.get(answer.message_id).headers
    assert later == {name: ["REDACTED"] if v == ["k"] else v for name, v in message.headers.items()}


def test_published_json_arrives_and_the_receiver_believes_it(sdk: Sdk, wire: Wire) -> None:
    url = "https://provider.test/a%2Fb//c?x=1&y=%20"
    expected = told(
        Some("msg_"),
        url=url,
        body='{"prompt": "\\u00e9"}',
        headers={"Content-Type": ["application/json"], **HEADERS},
        **TOLD_OF_EVERYTHING,
    )
    answer = sdk.message.publish_json(url=url, body={"prompt": "é"}, **EVERYTHING)
    assert answer == PublishResponse(message_id=Some("msg_"), deduplicated=False)
    message = sdk.message.get(answer.message_id)
    assert message == expected
    eventually(lambda: bool(wire.to(CALLBACK)))
    for request in wire.requests:
        sent_to = url if request is wire.requests[0] else CALLBACK
        signature = request.headers["Upstash-Signature"]
        body = request.content.decode()
        sdk.receiver.verify(signature=signature, body=body, url=sent_to)
        with pytest.raises(SignatureError):
            sdk.receiver.verify(signature=signature, body=body + " ", url=sent_to)
    first, callback = wire.requests
    assert (first.method, first.url.raw_path) == ("PUT", b"/a%2Fb//c?x=1&y=%20")
    assert json.loads(first.content) == {"prompt": "é"}
    ours = {name: value for name, value in first.headers.items() if name.startswith(("x-", "up"))}
    assert ours == {
        "x-trace": "t",
        "x-other": "o, p",
        "upstash-message-id": answer.message_id,
        "upstash-retried": "0",
        "upstash-signature": ours["upstash-signature"],
        "upstash-caller-ip": "127.0.0.1",
        "upstash-region": "EU-CENTRAL-1",
    }
    assert first.headers["user-agent"] == callback.headers["user-agent"] == "Upstash-QStash"
    assert callback.headers["x-called"] == "c"
    assert callback.headers["upstash-message-id"] != answer.message_id
    envelope = json.loads(callback.content)
    assert envelope.pop("header")["Content-Type"] == ["application/json"]
    assert envelope == {
        "status": 200,
        "body": base64.b64encode(b'{"ok":true}').decode(),
        "retried": 0,
        "maxRetries": 2,
        "sourceMessageId": answer.message_id,
        "url": url,
        "method": "PUT",
        "sourceHeader": {"Content-Type": ["application/json"], **HEADERS},
        "sourceBody": base64.b64encode(b'{"prompt": "\\u00e9"}').decode(),
        "notBefore": message.created_at,
        "createdAt": message.created_at,
        "callerIP": "127.0.0.1",
    }


@pytest.mark.parametrize(
    ("provider", "url", "key"),
    [
        (chat.openai("sk-1"), "https://api.openai.com/v1/chat/completions", "Bearer sk-1"),
        (chat.custom("https://provider.test/v1/chat/completions", "k"), PROVIDER, "Bearer k"),
    ],
)
def test_a_chat_with_a_provider_goes_to_the_providers_own_url_with_its_key(
    sdk: Sdk, wire: Wire, provider: chat.LlmProvider, url: str, key: str
) -> None:
    answer = sdk.message.publish_json(
        api={"name": "llm", "provider": provider}, body={"model": "m"}, callback=CALLBACK
    )
    assert sdk.message.get(answer.message_id).url == url
    delivered(answer.message_id)
    [request] = wire.to(url)
    assert request.headers["authorization"] == key
    assert json.loads(request.content) == {"model": "m"}


def test_what_was_enqueued_is_told_whole_and_delivered(sdk: Sdk, wire: Wire) -> None:
    expected = told(Some("msg_"), queue="q", body="x", headers=HEADERS, **TOLD_OF_EVERYTHING)
    json_expected = told(
        Some("msg_"),
        queue="q",
        body='{"n": 1}',
        headers={"Content-Type": ["application/json"]},
    )
    answer = sdk.message.enqueue(queue="q", url=PROVIDER, body="x", **EVERYTHING)
    assert answer == EnqueueResponse(message_id=Some("msg_"), deduplicated=False)
    assert sdk.message.get(answer.message_id) == expected
    as_json = sdk.message.enqueue_json(queue="q", url=PROVIDER, body={"n": 1})
    assert as_json == EnqueueResponse(message_id=Some("msg_"), deduplicated=False)
    assert sdk.message.get(as_json.message_id) == json_expected
    delivered(as_json.message_id)
    assert [request.content for request in wire.to(PROVIDER)] == [b"x", b'{"n": 1}']


BATCH: list[dict[str, Any]] = [
    {"url": PROVIDER, "delay": "1h", "flow_control": FLOW, **EVERYTHING},
    {"url": PROVIDER, "queue": "q"},
    {"url": PROVIDER, "delay": 60, "deduplication_id": "one"},
    {"url": PROVIDER, "delay": 60, "deduplication_id": "one"},
]


@pytest.mark.parametrize("method", ["batch", "batch_json"])
def test_a_batch_is_answered_in_order_and_told_whole(sdk: Sdk, method: str) -> None:
    is_json = method == "batch_json"
    type_header = {"Content-Type": ["application/json"]} if is_json else {}
    expected = [
        told(
            Some("msg_"),
            body='{"n": 0}' if is_json else "0",
            headers=type_header | HEADERS,
            flow_control=TOLD_FLOW,
            not_before=Recently(3600),
            # The SDK loses a batch_json's retry_delay on its way out.
            **TOLD_OF_EVERYTHING | ({"retry_delay_expression": None} if is_json else {}),
        ),
        told(Some("msg_"), body='{"n": 1}' if is_json else "1", queue="q"),
        told(Some("msg_"), body='{"n": 2}' if is_json else "2", not_before=Recently(60)),
    ]
    for message in expected[1:]:
        message.headers = type_header or None
    bodies = [{"n": n} if is_json else str(n) for n in range(4)]
    answers = getattr(sdk.message, method)(
        [item | {"body": body} for item, body in zip(BATCH, bodies, strict=True)]
    )
    ids = [answer.message_id for answer in answers]
    assert ids[2] == ids[3]
    assert len(set(ids)) == 3
    assert answers == [
        BatchResponse(message_id=Some("msg_"), deduplicated=is_duplicate)
        for is_duplicate in (False, False, False, True)
    ]
    assert [sdk.message.get(message_id) for message_id in ids[:3]] == expected


@pytest.mark.parametrize(
    "twice", [{"deduplication_id": "one_-.1"}, {"content_based_deduplication": True}]
)
def test_a_duplicate_is_the_first_message_and_says_so(sdk: Sdk, twice: dict[str, Any]) -> None:
    first = sdk.message.publish(url=PROVIDER, body="x", delay="1h", **twice)
    again = sdk.message.publish(url=PROVIDER, body="x", delay="1h", **twice)
    enqueued = sdk.message.enqueue(queue="q", url=PROVIDER, body="x", **twice)
    assert again == PublishResponse(message_id=first.message_id, deduplicated=True)
    assert enqueued == EnqueueResponse(message_id=first.message_id, deduplicated=True)
    assert Message.objects.count() == 1


# --- messages: cancelling ------------------------------------------------------------------------


def test_messages_are_cancelled(sdk: Sdk) -> None:
    ids = [sdk.message.publish(url=PROVIDER, body="x", delay="1h").message_id for _ in range(5)]
    sdk.message.cancel(ids[0])
    for call in (sdk.message.cancel, sdk.message.get):
        with pytest.raises(QStashError, match="status: 404"):
            call(ids[0])
    assert sdk.message.cancel_many(ids[:3]) == 2
    assert sdk.message.cancel_many(["msg_unknown"]) == 0
    assert sdk.message.cancel_all() == 2
    assert sdk.message.cancel_all() == 0


def test_what_was_delivered_is_told_for_a_while_and_not_cancelled(sdk: Sdk) -> None:
    expected = told(Some("msg_"), body="x")
    answer = sdk.message.publish(url=PROVIDER, body="x")
    delivered(answer.message_id)
    assert sdk.message.get(answer.message_id) == expected
    assert sdk.message.cancel_all() == 0


# --- logs ----------------------------------------------------------------------------------------


def test_the_log_tells_a_delivery_newest_first(sdk: Sdk) -> None:
    about = {
        "headers": HEADERS,
        "method": "PUT",
        "callback": CALLBACK,
        "callback_headers": {"X-Called": ["c"]},
        "failure_callback": FAILURE,
        "failure_callback_headers": {"X-Failed": ["f"]},
        "max_retries": 2,
        "retry_delay_expression": "1000 * (1 + retried)",
        "timeout": 30_000,
        "flow_control": TOLD_FLOW,
        "label": "a",
    }
    expected = [
        log(Some("msg_"), "DELIVERED", response_status=200, **about),
        log(Some("msg_"), "ACTIVE", **about),
        log(Some("msg_"), "CREATED", **about),
    ]
    answer = sdk.message.publish(url=PROVIDER, body="x", flow_control=FLOW, **EVERYTHING)
    delivered(answer.message_id)
    page = sdk.log.list(filter={"message_id": answer.message_id})
    assert page.cursor is None
    # Documented for errors only: whether a success has them is free.
    page.logs[0] = replace(page.logs[0], response_headers=None)
    assert page.logs == expected


def test_the_log_tells_failures_with_the_answer(sdk: Sdk, wire: Wire) -> None:
    wire.answers(httpx.Response(503, headers={"X-Busy": "1"}, text="busy"))
    message_id = sdk.message.publish(
        url=PROVIDER, body="x", retries=1, retry_delay="1", label="a"
    ).message_id
    eventually(lambda: states(message_id)[-1:] == ["FAILED"])
    logs = sdk.log.list(filter={"message_id": message_id}).logs
    assert [entry.state.value for entry in logs] == [
        *("FAILED", "ERROR", "ACTIVE", "RETRY", "ERROR", "ACTIVE", "CREATED")
    ]
    failed, error, active, retry, first_error, *_ = logs
    for entry in (failed, error, first_error):
        assert (entry.response_status, entry.response_body) == (503, "YnVzeQ==")
        assert entry.response_headers is not None
        assert entry.response_headers["X-Busy"] == ["1"]
    assert (active.response_status, active.response_body, active.error) == (None, None, None)
    assert retry.next_delivery_time == first_error.next_delivery_time
    assert retry.next_delivery_time is not None
    assert 0 <= retry.next_delivery_time - retry.time <= 2


def test_the_log_is_filtered(sdk: Sdk) -> None:
    sdk.queue.upsert("q", paused=True)
    cancelled = sdk.message.enqueue(queue="q", url=CALLBACK, body="x").message_id
    sdk.message.cancel(cancelled)
    one = sdk.message.publish(url=PROVIDER, body="x", label="a").message_id
    delivered(one)
    later = sdk.message.publish(url=FAILURE, body="x", delay="1h").message_id

    def count(**filter: Any) -> int:
        return len(sdk.log.list(filter=filter).logs)

    by_state = {state: count(state=LogState(state)) for state in LogState.__members__}
    assert by_state == {
        "CREATED": 3,
        "ACTIVE": 1,
        "RETRY": 0,
        "ERROR": 0,
        "DELIVERED": 1,
        "FAILED": 0,
        "CANCEL_REQUESTED": 1,
        "CANCELED": 1,
        "IN_PROGRESS": 1,
    }
    assert (count(message_id=one), count(message_ids=[cancelled, later])) == (3, 4)
    assert (count(url=PROVIDER), count(url=FAILURE)) == (3, 1)
    assert (count(label="a"), count(queue="q"), count(label="a", queue="q")) == (3, 3, 0)
    assert (count(url_group="g"), count(schedule_id="s")) == (0, 0)
    assert (count(from_time=1, to_time=32_503_680_000_000), count(to_time=1)) == (7, 0)


def test_the_log_comes_in_pages(sdk: Sdk) -> None:
    ids = [sdk.message.publish(url=PROVIDER, delay="1h").message_id for _ in range(5)]
    found, cursor = [], None
    for _ in range(3):
        page = sdk.log.list(count=2, cursor=cursor)
        found += [entry.message_id for entry in page.logs]
        cursor = page.cursor
    assert (found, cursor) == (ids[::-1], None)


# --- dead letters --------------------------------------------------------------------------------


def dead(sdk: Sdk, **options: Any) -> str:
    """Publishes what nobody takes, and answers its message id when it lies among the dead."""
    options = {"url": PROVIDER, "body": "x", "retries": 0} | options
    publish = sdk.message.enqueue if "queue" in options else sdk.message.publish
    message_id: str = publish(**options).message_id
    eventually(lambda: states(message_id)[-1:] == ["FAILED"])
    return message_id


def test_a_dead_letter_is_told_whole(sdk: Sdk, wire: Wire) -> None:
    wire.answers(httpx.Response(503, headers={"X-Busy": "1"}, text="busy"))
    message = told(
        Some("msg_"),
        body="x",
        headers=HEADERS,
        flow_control=TOLD_FLOW,
        **TOLD_OF_EVERYTHING | {"max_retries": 0},
    )
    message_id = dead(sdk, flow_control=FLOW, **EVERYTHING | {"retries": 0})
    [letter] = sdk.dlq.list().messages
    assert letter.response_headers["X-Busy"] == ["1"]
    assert letter == DlqMessage(
        **vars(message),
        dlq_id=letter.dlq_id,
        response_status=503,
        response_headers=letter.response_headers,
        response_body="busy",
        response_body_base64=None,
    )
    assert letter.message_id == message_id
    milliseconds, _, sequence = letter.dlq_id.partition("-")
    assert milliseconds.isdecimal()
    assert sequence.isdecimal()
    assert sdk.dlq.get(letter.dlq_id) == letter
    [failure] = wire.callbacks(FAILURE)
    assert failure.dlq_id == letter.dlq_id


def test_a_dead_letter_that_got_no_answer_is_told_too(sdk: Sdk, wire: Wire) -> None:
    wire.answers(httpx.ConnectError("refused"))
    dead(sdk)
    [letter] = sdk.dlq.list().messages
    assert (letter.response_status, letter.response_headers) == (-1, None)
    assert (letter.response_body, letter.response_body_base64) == (None, None)


def test_dead_letters_come_in_pages_oldest_first_and_are_deleted(sdk: Sdk, wire: Wire) -> None:
    wire.answers(httpx.Response(500))
    ids = [dead(sdk) for _ in range(4)]
    page = sdk.dlq.list(count=3)
    assert [letter.message_id for letter in page.messages] == ids[:3]
    rest = sdk.dlq.list(cursor=page.cursor)
    assert rest == ListDlqMessagesResponse(cursor=None, messages=rest.messages)
    [last] = rest.messages
    assert last.message_id == ids[3]
    assert sdk.dlq.delete(last.dlq_id) is None
    for call in (sdk.dlq.get, sdk.dlq.delete):
        with pytest.raises(QStashError, match="status: 404"):
            call(last.dlq_id)
    three = [letter.dlq_id for letter in page.messages]
    assert sdk.dlq.delete_many([three[0], last.dlq_id]) == 1
    assert sdk.dlq.delete_many(three) == 2
    assert sdk.dlq.delete_many(three) == 0
    assert sdk.dlq.list() == ListDlqMessagesResponse(cursor=None, messages=[])


def test_dead_letters_are_filtered(sdk: Sdk, wire: Wire) -> None:
    wire.answer = lambda request: httpx.Response(500)
    ids = {dead(sdk, label="a"): "a", dead(sdk, url=FAILURE, queue="q"): "b"}

    def found(**filter: Any) -> str:
        return "".join(ids[letter.message_id] for letter in sdk.dlq.list(filter=filter).messages)

    assert [found(message_id=message_id) for message_id in (*ids, "msg_unknown")] == ["a", "b", ""]
    assert (found(label="a"), found(queue="q"), found(url=FAILURE)) == ("a", "b", "b")
    assert (found(response_status=500), found(response_status=404)) == ("ab", "")
    assert (found(caller_ip="127.0.0.1"), found(caller_ip="127.0.0.2")) == ("ab", "")
    assert (found(url_group="g"), found(schedule_id="s")) == ("", "")
    assert (found(from_time=1), found(to_time=1)) == ("ab", "")


# --- queues --------------------------------------------------------------------------------------


def test_queues_are_made_told_paused_and_deleted(sdk: Sdk, wire: Wire) -> None:
    expected = Queue("q", 2, created_at=Recently(), updated_at=Recently(), lag=0, paused=True)
    assert sdk.queue.upsert("q", parallelism=2, paused=True) is None
    assert sdk.queue.get("q") == expected
    answer = sdk.message.enqueue(queue="q", url=PROVIDER, body="x")
    assert sdk.queue.list() == [replace(expected, lag=1)]
    assert wire.requests == []
    assert sdk.queue.resume("q") is None
    assert sdk.queue.get("q").paused is False
    delivered(answer.message_id)
    assert sdk.queue.get("q") == replace(expected, paused=False)
    assert sdk.queue.pause("q") is None
    assert sdk.queue.get("q").paused is True
    # What is left out is the default, paused too.
    sdk.queue.upsert("q")
    assert sdk.queue.get("q") == replace(expected, parallelism=1, paused=False)
    assert sdk.queue.delete("q") is None
    assert sdk.queue.delete("q") is None
    assert sdk.queue.list() == []
    for call in (sdk.queue.get, sdk.queue.pause, sdk.queue.resume):
        with pytest.raises(QStashError, match="status: 404"):
            call("q")


def test_enqueueing_makes_a_queue_and_leaves_one_as_it_is(sdk: Sdk) -> None:
    sdk.message.enqueue(queue="new", url=PROVIDER)
    assert sdk.queue.get("new").parallelism == 1
    sdk.queue.upsert("old", parallelism=5)
    sdk.message.enqueue(queue="old", url=PROVIDER)
    assert sdk.queue.get("old").parallelism == 5


# --- flow control --------------------------------------------------------------------------------


def flow(**differences: Any) -> FlowControlInfo:
    return FlowControlInfo(
        **{
            "key": "k",
            "wait_list_size": 0,
            "parallelism_max": 3,
            "parallelism_count": 0,
            "rate_max": 4,
            "rate_count": 0,
            "rate_period": 90,
            "rate_period_start": 0,
            "is_paused": False,
            "is_pinned_parallelism": False,
            "is_pinned_rate": False,
        }
        | differences
    )


def test_a_flow_control_key_is_told_paused_and_resumed(sdk: Sdk, wire: Wire) -> None:
    with pytest.raises(QStashError, match="status: 404"):
        sdk.flow_control.get("k")
    sdk.message.publish(url=PROVIDER, delay="1h", flow_control=FLOW)
    assert sdk.flow_control.get("k") == flow()
    assert sdk.flow_control.pause("k") is None
    answer = sdk.message.publish(url=PROVIDER, flow_control=FLOW)
    assert sdk.flow_control.get("k") == flow(wait_list_size=1, is_paused=True)
    assert wire.requests == []
    before = int(time.time())
    assert sdk.flow_control.resume("k") is None
    delivered(answer.message_id)
    after = sdk.flow_control.get("k")
    assert before <= after.rate_period_start <= time.time()
    assert after == flow(rate_count=1, rate_period_start=after.rate_period_start)


def test_a_flow_control_key_is_pinned_and_unpinned(sdk: Sdk) -> None:
    sdk.message.publish(url=PROVIDER, delay="1h", flow_control=FLOW)
    assert sdk.flow_control.pin("k", {"parallelism": 7, "rate": 8, "period": 9}) is None
    pinned = flow(
        parallelism_max=7,
        rate_max=8,
        rate_period=9,
        is_pinned_parallelism=True,
        is_pinned_rate=True,
    )
    assert sdk.flow_control.get("k") == pinned
    sdk.message.publish(url=PROVIDER, delay="1h", flow_control=FLOW)
    assert sdk.flow_control.get("k") == pinned
    assert sdk.flow_control.unpin("k", {"parallelism": True}) is None
    assert sdk.flow_control.get("k") == replace(pinned, is_pinned_parallelism=False)
    sdk.message.publish(url=PROVIDER, delay="1h", flow_control=FLOW)
    assert sdk.flow_control.get("k").parallelism_max == 3
    assert sdk.flow_control.get("k").rate_max == 8
    sdk.flow_control.unpin("k", {"parallelism": False, "rate": True})
    sdk.message.publish(url=PROVIDER, delay="1h", flow_control=FLOW)
    assert sdk.flow_control.get("k") == flow()


def test_a_rate_is_counted_anew(sdk: Sdk) -> None:
    delivered(sdk.message.publish(url=PROVIDER, flow_control=FLOW).message_id)
    assert sdk.flow_control.get("k").rate_count == 1
    before = int(time.time())
    assert sdk.flow_control.reset_rate("k") is None
    after = sdk.flow_control.get("k")
    assert before <= after.rate_period_start <= time.time()
    assert after == flow(rate_period_start=after.rate_period_start)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"parallelism": 2}, FlowControlProperties("k", 2, None, 1)),
        ({"rate": 2}, FlowControlProperties("k", None, 2, 1)),
        ({"rate": 2, "period": 5}, FlowControlProperties("k", None, 2, 5)),
        ({"rate": 2, "period": "1h30m3s"}, FlowControlProperties("k", None, 2, 5403)),
        ({"parallelism": 1, "rate": 2, "period": "1d"}, FlowControlProperties("k", 1, 2, 86_400)),
    ],
)
def test_a_message_tells_its_flow_control(sdk: Sdk, given: Any, expected: Any) -> None:
    answer = sdk.message.publish(url=PROVIDER, delay="1h", flow_control={"key": "k"} | given)
    assert sdk.message.get(answer.message_id).flow_control == expected


def test_the_global_parallelism_counts_what_is_in_flight(sdk: Sdk, wire: Wire) -> None:
    in_flight = sdk.flow_control.get_global_parallelism()
    assert in_flight == GlobalParallelismInfo(
        parallelism_max=in_flight.parallelism_max, parallelism_count=0
    )
    assert in_flight.parallelism_max > 0
    seen: list[GlobalParallelismInfo] = []

    def answer(request: httpx.Request) -> httpx.Response:
        with connected("sync", str(sdk.client.http._base_url)) as inside:
            seen.append(inside.flow_control.get_global_parallelism())
        return httpx.Response(200)

    wire.answer = answer
    delivered(sdk.message.publish(url=PROVIDER).message_id)
    assert seen == [replace(in_flight, parallelism_count=1)]


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_told_and_rotated(sdk: Sdk, wire: Wire) -> None:
    assert sdk.signing_key.get() == SigningKey(current=KEYS[0], next=KEYS[1])
    rotated = sdk.signing_key.rotate()
    assert rotated == SigningKey(current=KEYS[1], next=Some("sig_"))
    assert sdk.signing_key.get() == rotated
    delivered(sdk.message.publish(url=PROVIDER, body="x").message_id)
    [request] = wire.requests
    # The receiver still knows the keys from before.
    sdk.receiver.verify(signature=request.headers["Upstash-Signature"], body="x", url=PROVIDER)


# --- URL groups ----------------------------------------------------------------------------------

FIRST = {"name": "first", "url": PROVIDER}
SECOND = {"url": FAILURE}


def test_url_groups_are_made_told_and_deleted(sdk: Sdk) -> None:
    expected = UrlGroup(
        name="g",
        created_at=Recently(),
        updated_at=Recently(),
        endpoints=[Endpoint(url=PROVIDER, name="first"), Endpoint(url=FAILURE, name=None)],
    )
    assert sdk.url_group.upsert_endpoints("g", [FIRST, SECOND]) is None
    assert sdk.url_group.get("g") == expected
    assert sdk.url_group.list() == [expected]
    sdk.url_group.upsert_endpoints("g", [{"name": "first", "url": CALLBACK}])
    changed = sdk.url_group.get("g").endpoints
    assert sorted((each.url, each.name or "") for each in changed) == [
        (CALLBACK, "first"),
        (FAILURE, ""),
    ]
    assert sdk.url_group.remove_endpoints("g", [{"name": "first"}]) is None
    assert sdk.url_group.get("g").endpoints == [Endpoint(url=FAILURE, name=None)]
    sdk.url_group.remove_endpoints("g", [SECOND])
    with pytest.raises(QStashError, match="status: 404"):
        sdk.url_group.get("g")
    sdk.url_group.upsert_endpoints("g", [FIRST])
    assert sdk.url_group.delete("g") is None
    assert sdk.url_group.delete("g") is None
    assert sdk.url_group.list() == []


def test_what_is_published_to_a_group_goes_to_each_of_its_endpoints(sdk: Sdk, wire: Wire) -> None:
    sdk.url_group.upsert_endpoints("g", [FIRST, SECOND])
    first = told(
        Some("msg_"),
        body='{"n": 1}',
        headers={"Content-Type": ["application/json"]},
        url_group="g",
        endpoint="first",
    )
    answers = sdk.message.publish_json(url_group="g", body={"n": 1}, deduplication_id="one")
    assert answers == [
        PublishUrlGroupResponse(message_id=Some("msg_"), url=PROVIDER, deduplicated=False),
        PublishUrlGroupResponse(message_id=Some("msg_"), url=FAILURE, deduplicated=False),
    ]
    assert sdk.message.get(answers[0].message_id) == first
    assert sdk.message.get(answers[1].message_id) == replace(first, url=FAILURE, endpoint=None)
    for answer in answers:
        delivered(answer.message_id)
        [request] = wire.to(answer.url)
        assert request.headers["upstash-topic-name"] == "g"
    again = sdk.message.publish_json(url_group="g", body={"n": 1}, deduplication_id="one")
    assert again == [replace(answer, deduplicated=True) for answer in answers]
    entries = sdk.log.list(filter={"url_group": "g"}).logs
    assert {(entry.url_group, entry.endpoint) for entry in entries} == {("g", "first"), ("g", None)}


def test_what_is_enqueued_for_a_group_goes_to_each_of_its_endpoints(sdk: Sdk) -> None:
    sdk.url_group.upsert_endpoints("g", [FIRST, SECOND])
    answers = sdk.message.enqueue(queue="q", url_group="g", body="x")
    assert answers == [
        EnqueueUrlGroupResponse(message_id=Some("msg_"), url=PROVIDER, deduplicated=False),
        EnqueueUrlGroupResponse(message_id=Some("msg_"), url=FAILURE, deduplicated=False),
    ]
    for answer in answers:
        delivered(answer.message_id)


def test_a_batch_may_hold_groups_beside_urls(sdk: Sdk) -> None:
    sdk.url_group.upsert_endpoints("g", [FIRST, SECOND])
    assert sdk.message.batch([{"url": PROVIDER}, {"url_group": "g"}, {"url": CALLBACK}]) == [
        BatchResponse(message_id=Some("msg_"), deduplicated=False),
        [
            BatchUrlGroupResponse(message_id=Some("msg_"), url=PROVIDER, deduplicated=False),
            BatchUrlGroupResponse(message_id=Some("msg_"), url=FAILURE, deduplicated=False),
        ],
        BatchResponse(message_id=Some("msg_"), deduplicated=False),
    ]


# --- schedules -----------------------------------------------------------------------------------

YEARLY = "0 0 1 1 *"


def schedule(schedule_id: Any, **differences: Any) -> Schedule:
    nothing: dict[str, Any] = dict.fromkeys(Schedule.__dataclass_fields__)
    return Schedule(
        **nothing
        | {
            "schedule_id": schedule_id,
            "destination": PROVIDER,
            "cron": YEARLY,
            "created_at": Recently(),
            "method": "POST",
            "retries": 3,
            "caller_ip": "127.0.0.1",
            "paused": False,
        }
        | differences
    )


def without_next(answer: Schedule) -> Schedule:
    """The schedule, once it was seen that its next time is a whole minute to come."""
    assert answer.next_schedule_time is not None
    assert answer.next_schedule_time > time.time() * 1000
    assert answer.next_schedule_time % 60_000 == 0
    return replace(answer, next_schedule_time=None)


def test_schedules_are_made_told_paused_and_deleted(sdk: Sdk) -> None:
    how = {name: value for name, value in EVERYTHING.items() if not name.startswith("content")}
    told = {name: value for name, value in TOLD_OF_EVERYTHING.items() if name != "max_retries"}
    expected = schedule(
        "mine",
        body="x",
        headers={"Content-Type": ["text/plain"], **HEADERS},
        retries=2,
        delay=60,
        timeout=30,
        queue=None,
        flow_control=TOLD_FLOW,
        **told,
    )
    given = {"body": "x", "content_type": "text/plain", "delay": 60, "flow_control": FLOW, **how}
    answer = sdk.schedule.create(destination=PROVIDER, cron=YEARLY, schedule_id="mine", **given)
    assert answer == "mine"
    assert without_next(sdk.schedule.get("mine")) == expected
    assert sdk.schedule.pause("mine") is None
    [paused] = sdk.schedule.list()
    assert replace(paused, next_schedule_time=None) == replace(expected, paused=True)
    assert sdk.schedule.resume("mine") is None
    assert without_next(sdk.schedule.get("mine")) == expected
    assert sdk.schedule.delete("mine") is None
    assert sdk.schedule.list() == []
    with pytest.raises(QStashError, match="status: 404"):
        sdk.schedule.get("mine")


def test_a_schedule_of_json_gets_an_id_of_its_own(sdk: Sdk) -> None:
    expected = schedule(
        Some("scd_"),
        cron="CRON_TZ=Europe/Istanbul 0 0 1 1 *",
        body='{"n": 1}',
        headers={"Content-Type": ["application/json"]},
        queue="q",
    )
    schedule_id = sdk.schedule.create_json(
        destination=PROVIDER, cron="CRON_TZ=Europe/Istanbul 0 0 1 1 *", body={"n": 1}, queue="q"
    )
    assert schedule_id == Some("scd_")
    assert without_next(sdk.schedule.get(schedule_id)) == expected


def test_a_schedule_with_the_same_id_takes_the_place_of_the_first(sdk: Sdk) -> None:
    sdk.schedule.create(
        destination=PROVIDER, cron=YEARLY, schedule_id="mine", body="x", label="a", retries=1
    )
    sdk.schedule.create(destination=CALLBACK, cron="* * 1 1 *", schedule_id="mine")
    [only] = sdk.schedule.list()
    assert without_next(only) == schedule(
        "mine", destination=CALLBACK, cron="* * 1 1 *", created_at=only.created_at
    )


def test_a_schedule_may_go_to_a_group(sdk: Sdk) -> None:
    sdk.url_group.upsert_endpoints("g", [FIRST])
    schedule_id = sdk.schedule.create(destination="g", cron=YEARLY)
    assert sdk.schedule.get(schedule_id).destination == "g"


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize(("status", "state"), [(200, "SUCCESS"), (500, "FAIL")])
def test_a_schedule_fires_and_tells_how_that_went(
    kind: str, clock: Clock, wire: Wire, status: int, state: str
) -> None:
    wire.answers(httpx.Response(status))
    with Server(engine=Engine(clock=clock)) as server, connected(kind, server.url) as sdk:
        sdk.schedule.create(
            destination=PROVIDER, cron=YEARLY, schedule_id="mine", body="x", retries=0, label="a"
        )
        before = sdk.schedule.get("mine")
        clock.advance(before.next_schedule_time / 1000 - time.time() + 1)
        eventually(lambda: bool(wire.requests))
        [request] = wire.requests
        assert request.headers["upstash-schedule-id"] == "mine"
        assert request.headers["upstash-caller-ip"] == "127.0.0.1"
        message_id = request.headers["upstash-message-id"]
        eventually(lambda: states(message_id)[-1] in {"DELIVERED", "FAILED"})
        after = sdk.schedule.get("mine")
        assert after == replace(
            before,
            last_schedule_time=after.last_schedule_time,
            last_schedule_states={message_id: ScheduleState(state)},
            next_schedule_time=after.next_schedule_time,
        )
        assert 0 <= after.last_schedule_time - before.next_schedule_time < 60_000
        assert after.next_schedule_time - before.next_schedule_time in {
            days * 86_400_000 for days in (365, 366)
        }
        assert sdk.message.get(message_id).schedule_id == "mine"
        entries = sdk.log.list(filter={"schedule_id": "mine", "label": "a"}).logs
        assert {entry.message_id for entry in entries} == {message_id}
        letters = sdk.dlq.list(filter={"schedule_id": "mine"}).messages
        assert [letter.schedule_id for letter in letters] == ["mine"] * (state == "FAIL")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"url": "https%3A%2F%2Fa.test"},
            'status: 400, body: {"error":"invalid destination url: endpoint has invalid scheme',
        ),
        (
            {"url": "http://127.0.0.1:1/"},
            'status: 400, body: {"error":"invalid destination url: endpoint resolves to a '
            'loopback address: 127.0.0.1"}',
        ),
        (
            {"url": PROVIDER, "delay": "1"},
            'status: 400, body: {"error":"invalid Upstash-Delay header: time: missing unit in '
            'duration \\"1\\""}',
        ),
        (
            {"url": PROVIDER, "flow_control": {"key": "k"}},
            'status: 400, body: {"error":"Upstash-Flow-Control-Value should be either rate=X or '
            'parallelism=Y, or both as comma-separated values"}',
        ),
        (
            {"url": PROVIDER, "flow_control": {"key": "k", "period": "60s"}},
            'status: 400, body: {"error":"Upstash-Flow-Control-Value should be either rate=X or '
            'parallelism=Y, or both as comma-separated values"}',
        ),
        ({"url": PROVIDER, "deduplication_id": "a:b"}, "status: 400"),
        ({"url": PROVIDER, "callback": "a.test"}, "status: 400"),
        ({"url": PROVIDER, "retry_delay": "pow("}, "status: 400"),
        ({"url": PROVIDER, "retries": -1}, "status: 400"),
        ({"url": PROVIDER, "timeout": "x"}, "status: 400"),
        ({"url_group": "unknown"}, "status: 404"),
    ],
)
def test_what_cannot_be_published_is_refused_in_qstashs_words(
    sdk: Sdk, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(QStashError) as caught:
        sdk.message.publish(body="x", **options)
    assert str(caught.value).startswith(f"Request failed with {error}")
    assert not Message.objects.exists()


def test_a_quota_is_412(sdk: Sdk, settings: Any) -> None:
    settings.QSTASH_SERVER = settings.QSTASH_SERVER | {"MAX_RETRIES": 5}
    with pytest.raises(
        QStashError, match=r'status: 412, body: {"error":"quota maxRetries exceeded"}'
    ):
        sdk.message.publish(url=PROVIDER, retries=6)


def test_a_stranger_is_told_so(server: Server, sdk: Sdk) -> None:
    with (
        connected(sdk.kind, server.url, "x") as stranger,
        pytest.raises(
            QStashError,
            match=r'status: 401, body: {"error":"unable to authenticate: invalid token"}',
        ),
    ):
        stranger.message.cancel_all()


def test_who_may_only_read_reads_and_writes_nothing(
    server: Server, sdk: Sdk, settings: Any
) -> None:
    settings.QSTASH_SERVER = settings.QSTASH_SERVER | {"READ_ONLY_TOKEN": "reader"}
    message_id = sdk.message.publish(url=PROVIDER, delay="1h").message_id
    with connected(sdk.kind, server.url, "reader") as reader:
        assert reader.message.get(message_id) == sdk.message.get(message_id)
        assert reader.log.list() == sdk.log.list()
        for write in (
            lambda: reader.message.publish(url=PROVIDER),
            lambda: reader.message.cancel_all(),
            lambda: reader.queue.upsert("q"),
            lambda: reader.signing_key.rotate(),
        ):
            with pytest.raises(QStashError, match="status: 403"):
                write()
    assert sdk.message.cancel_all() == 1


# --- nothing left out ----------------------------------------------------------------------------


def methods_of(kind: str) -> set[tuple[str, str]]:
    """What a client offers: every public method of every API it holds, and its receiver's."""
    client = CLIENTS[kind]("", retry=False, base_url="http://a.test")
    apis = {name: api for name, api in vars(client).items() if name != "http"}
    apis["receiver"] = qstash.Receiver(*KEYS)
    return {
        (kind, f"{name}.{method}")
        for name, api in apis.items()
        for method, _ in inspect.getmembers(api, inspect.isroutine)
        if not method.startswith("_")
    }


@pytest.mark.last
@pytest.mark.parametrize("kind", CLIENTS)
def test_no_method_of_the_sdk_was_left_uncalled(kind: str, request: pytest.FixtureRequest) -> None:
    here = {name for name in globals() if name.startswith("test_")}
    ran = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if ran != here:
        pytest.skip("only some of this module's tests run")
    everything = methods_of(kind)
    assert len(everything) > 40
    assert everything - called == set()
