from __future__ import annotations

import gzip
import inspect
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from django_qstash_llm.qstash import (
    Accepted,
    AsyncClient,
    AuthenticationError,
    BurstLimitExceeded,
    Client,
    DailyLimitExceeded,
    DeadLetter,
    FlowControl,
    InvalidOption,
    Message,
    NotFound,
    Options,
    Page,
    QuotaExceeded,
    Refused,
    ResponseError,
    TransportError,
    UnreadableAnswer,
    calls,
)

from .conftest import TOKEN, Caller, Referee
from .loopback import Request, answering, cutting, dripping, resetting, serving

URL = "https://api.openai.com/v1/chat/completions"
CALLBACK = "https://example.com/llm/callback/1/?a=b"
ONCE = Message(URL, b"{}", deduplication_id="7b6e-1")
BLIND = Message(URL, b"{}")


class Wire(httpx.MockTransport):
    """Answers with what a function makes of a request, and remembers the requests."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        super().__init__(self.keep)
        self.answer = answer
        self.requests: list[httpx.Request] = []

    def keep(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answer(request)


def saying(answer: Any = None, status: int = 200, **headers: str) -> Wire:
    return Wire(lambda request: httpx.Response(status, json=answer, headers=headers))


def stumbling(error: Exception, times: int) -> Wire:
    """Fails as often as told, and then takes the message."""

    def answer(request: httpx.Request) -> httpx.Response:
        if len(wire.requests) <= times:
            raise error
        return httpx.Response(200, json={"messageId": "msg_1"})

    wire = Wire(answer)
    return wire


# --- both clients carry out every call -----------------------------------------------------------

# A way to call each, and an answer it can read.
EXAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {
    "publish": ((ONCE,), {}, {"messageId": "msg_1"}),
    "batch": (([ONCE, BLIND],), {}, [{"messageId": "msg_1"}, {"error": "no"}]),
    "get_message": (("msg_1",), {}, {"messageId": "msg_1"}),
    "cancel_message": (("msg_1",), {}, None),
    "cancel_messages": ((["msg_1"],), {}, {"cancelled": 1}),
    "cancel_messages_by": ((), {"label": "a b", "url": URL}, {"cancelled": 1}),
    "cancel_all_messages": ((), {}, {"cancelled": 1}),
    "logs": ((), {"cursor": "1-2", "label": ["a", "b"]}, {"events": []}),
    "dead_letters": ((), {"count": 5}, {"messages": []}),
    "get_dead_letter": (("1-0",), {}, {"messageId": "msg_1"}),
    "delete_dead_letter": (("1-0",), {}, None),
    "delete_dead_letters": ((["1-0"],), {}, {"deleted": 1}),
    "retry_dead_letter": (("1-0",), {}, {"messageId": "msg_2"}),
    "retry_dead_letters": ((["1-0"],), {}, {"responses": []}),
    "queues": ((), {}, [{"name": "q"}]),
    "get_queue": (("q",), {}, {"name": "q"}),
    "upsert_queue": (("q",), {"parallelism": 2}, None),
    "delete_queue": (("q",), {}, None),
    "pause_queue": (("q",), {}, None),
    "resume_queue": (("q",), {}, None),
    "flow_controls": ((), {"search": "k"}, []),
    "get_flow_control": (("k",), {}, {"flowControlKey": "k"}),
    "pause_flow_control": (("k",), {}, None),
    "resume_flow_control": (("k",), {}, None),
    "pin_flow_control": (("k",), {"rate": 1}, None),
    "unpin_flow_control": (("k",), {"rate": True}, None),
    "reset_flow_control_rate": (("k",), {}, None),
    "resume_gates": (("api.host.test",), {}, None),
    "global_parallelism": ((), {}, {"parallelismMax": 1, "parallelismCount": 0}),
    "keys": ((), {}, {"current": "a", "next": "b"}),
    "rotate_keys": ((), {}, {"current": "a", "next": "b"}),
}


def test_every_call_is_a_method_of_both_clients() -> None:
    builders = {
        name
        for name, value in vars(calls).items()
        if inspect.isfunction(value) and value.__module__ == calls.__name__ and name[0] != "_"
    }
    assert builders == EXAMPLES.keys()
    assert [name for name in builders if not hasattr(Client, name)] == []
    assert [name for name in builders if not hasattr(AsyncClient, name)] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_sends_its_call_and_reads_the_answer(name: str, caller: Caller) -> None:
    args, kwargs, answer = EXAMPLES[name]
    call = getattr(calls, name)(*args, **kwargs)
    wire = saying(answer)

    read = getattr(caller.using(transport=wire), name)(*args, **kwargs)

    (request,) = wire.requests
    url = httpx.URL("https://qstash.upstash.io" + call.path, params=list(call.params) or None)
    assert (request.method, request.url, request.content) == (call.method, url, call.content)
    sent = {header: request.headers[header] for header in call.headers}
    assert (sent, request.headers["Authorization"]) == (dict(call.headers), f"Bearer {TOKEN}")
    assert read == call.parse(answer)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_is_documented_like_its_call(name: str) -> None:
    build = getattr(calls, name)
    methods = (getattr(Client, name), getattr(AsyncClient, name))
    assert [method.__doc__ for method in methods] == [build.__doc__] * 2
    assert [method.__name__ for method in methods] == [name] * 2


def test_a_call_of_ones_own_is_carried_out_too(caller: Caller) -> None:
    call = calls.Call("GET", "/v2/schedules", len)
    assert caller.using(transport=saying([1, 2])).send(call) == 2


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"OK", b"Accepted", b"{}"])
def test_an_answer_that_says_nothing_is_enough_where_nothing_is_read(
    content: bytes, caller: Caller
) -> None:
    wire = Wire(lambda request: httpx.Response(202, content=content))
    assert caller.using(transport=wire).cancel_message("msg_1") is None


@pytest.mark.parametrize("status", [200, 201, 202])
def test_every_2xx_is_a_yes(status: int, caller: Caller) -> None:
    answer = {"messageId": "msg_1", "deduplicated": True}
    accepted = caller.using(transport=saying(answer, status)).publish(ONCE)
    assert accepted == Accepted("msg_1", is_duplicate=True)


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (301, {"Location": "https://evil.example/"}, ResponseError),
        (400, {}, ResponseError),
        (401, {}, AuthenticationError),
        (404, {}, NotFound),
        (412, {}, QuotaExceeded),
        (429, {}, BurstLimitExceeded),
        (429, {"RateLimit-Limit": "500"}, DailyLimitExceeded),
        (500, {}, ResponseError),
        (503, {"Retry-After": "1"}, ResponseError),
    ],
)
def test_an_answer_is_never_retried(
    status: int, headers: dict[str, str], kind: type[ResponseError], caller: Caller
) -> None:
    wire = saying({"error": "no"}, status, **headers)
    with pytest.raises(ResponseError) as caught:
        caller.using(transport=wire).publish(ONCE)
    assert (type(caught.value), caught.value.status, json.loads(caught.value.body)) == (
        kind,
        status,
        {"error": "no"},
    )
    assert (len(wire.requests), caller.pauses) == (1, [])


@pytest.mark.parametrize("cut", [1, 10, 19])
def test_what_no_error_may_repeat_is_taken_out_before_its_words_are_cut(
    cut: int, caller: Caller
) -> None:
    secret = "sk-0123456789abcdef"
    wire = saying({"error": "x" * (489 - cut) + secret}, 400)
    with pytest.raises(ResponseError) as caught:
        caller.using(transport=wire, redact=lambda text: text.replace(secret, "…")).publish(ONCE)
    assert "sk" not in str(caught.value) + caught.value.body


def test_the_complaint_about_an_answer_repeats_nothing_it_may_not(caller: Caller) -> None:
    call = calls.Call("GET", "/v2/schedules", int)
    client = caller.using(transport=saying("sk-1"), redact=lambda text: text.replace("sk-1", "…"))
    with pytest.raises(UnreadableAnswer, match=r"'…'$"):
        client.send(call)


def test_a_daily_limit_tells_when_it_ends(caller: Caller) -> None:
    wire = saying({}, 429, **{"RateLimit-Limit": "500", "RateLimit-Reset": "1750000000"})
    with pytest.raises(DailyLimitExceeded) as caught:
        caller.using(transport=wire).publish(ONCE)
    error = caught.value
    assert (error.limit, error.remaining, error.reset) == (500, None, 1_750_000_000)


def test_a_refused_item_does_not_hide_the_ids_of_the_others(caller: Caller) -> None:
    wire = saying([{"messageId": "msg_1"}, {"error": "quota maxRetries exceeded"}])
    assert caller.using(transport=wire).batch([ONCE, BLIND]) == [
        Accepted("msg_1"),
        Refused("quota maxRetries exceeded"),
    ]


@pytest.mark.parametrize(
    ("name", "args", "content"),
    [
        ("publish", (ONCE,), b""),
        ("publish", (ONCE,), b"<html>"),
        ("publish", (ONCE,), b"{}"),
        ("publish", (ONCE,), b"null"),
        ("publish", (ONCE,), b"\xff"),
        ("publish", (ONCE,), b"[" * 100_000),
        ("batch", ([ONCE],), b"[]"),
        ("get_message", ("msg_1",), b"[]"),
        ("get_message", ("msg_1",), b"{}"),
        ("get_dead_letter", ("1-0",), b"null"),
        ("cancel_all_messages", (), b'{"cancelled": 1e400}'),
        ("logs", (), b"[]"),
        ("logs", (), b'{"events": [{}]}'),
        ("queues", (), b"{}" * 2),
        ("keys", (), b"{}"),
    ],
)
def test_an_answer_that_cannot_be_read_is_ambiguous_and_not_retried(
    name: str, args: Any, content: bytes, caller: Caller
) -> None:
    wire = Wire(lambda request: httpx.Response(200, content=content))
    with pytest.raises(TransportError, match=r"QStash's answer to .* cannot be read") as caught:
        getattr(caller.using(transport=wire), name)(*args)
    assert (caught.value.is_ambiguous, len(wire.requests), caller.pauses) == (True, 1, [])


def test_the_complaint_about_an_answer_does_not_show_the_query(caller: Caller) -> None:
    message = Message(URL + "?key=secret")
    with pytest.raises(TransportError) as caught:
        caller.using(transport=saying({})).publish(message)
    assert str(caught.value) == (
        f"QStash's answer to POST /v2/publish/{URL} cannot be read: "
        "neither a messageId nor an error"
    )


class Endless(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Says spaces, a megabyte at a time."""

    def __init__(self) -> None:
        self.megabytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.megabytes += 1
            yield b" " * 2**20

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in iter(self):
            yield chunk


@pytest.mark.parametrize(("status", "kind"), [(200, TransportError), (500, ResponseError)])
def test_an_answer_is_not_read_without_end(
    status: int, kind: type[TransportError | ResponseError], caller: Caller
) -> None:
    stream = Endless()
    wire = Wire(lambda request: httpx.Response(status, stream=stream))
    with pytest.raises(kind) as caught:
        caller.using(transport=wire).publish(ONCE)
    assert (caught.value.is_ambiguous, len(wire.requests), stream.megabytes) == (True, 1, 33)


def test_an_answer_may_be_compressed(caller: Caller) -> None:
    content = gzip.compress(b'{"messageId": "msg_1"}')
    headers = {"Content-Encoding": "gzip"}
    wire = Wire(lambda request: httpx.Response(200, content=content, headers=headers))
    assert caller.using(transport=wire).publish(ONCE) == Accepted("msg_1")


# --- retries: only when nothing was sent, or when repeating does no harm -------------------------


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.PoolTimeout("busy")],
    ids=repr,
)
@pytest.mark.parametrize("message", [ONCE, BLIND], ids=["repeatable", "not repeatable"])
def test_a_call_that_never_arrived_is_made_again(
    error: Exception, message: Message, caller: Caller
) -> None:
    wire = stumbling(error, times=2)
    assert caller.using(transport=wire).publish(message) == Accepted("msg_1")
    assert (len(wire.requests), caller.pauses) == (3, [0.0, 0.2])


AMBIGUOUS = [
    httpx.ReadTimeout("slow"),
    httpx.ReadError("reset"),
    httpx.WriteTimeout("slow"),
    httpx.WriteError("reset"),
    httpx.RemoteProtocolError("Server disconnected without sending a response."),
    httpx.ProxyError("no"),
    httpx.DecodingError("not gzip"),
]


@pytest.mark.parametrize("error", AMBIGUOUS, ids=repr)
def test_a_call_that_may_have_arrived_is_made_again_when_it_is_repeatable(
    error: Exception, caller: Caller
) -> None:
    wire = stumbling(error, times=1)
    assert caller.using(transport=wire).publish(ONCE) == Accepted("msg_1")
    assert (len(wire.requests), caller.pauses) == (2, [0.0])


@pytest.mark.parametrize("error", AMBIGUOUS, ids=repr)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("publish", (BLIND,)),
        ("batch", ([ONCE, BLIND],)),
        ("retry_dead_letter", ("1-0",)),
        ("rotate_keys", ()),
    ],
)
def test_a_call_that_may_have_arrived_is_not_made_twice(
    name: str, args: Any, error: Exception, caller: Caller
) -> None:
    wire = stumbling(error, times=1)
    with pytest.raises(TransportError) as caught:
        getattr(caller.using(transport=wire), name)(*args)
    assert (caught.value.is_ambiguous, len(wire.requests), caller.pauses) == (True, 1, [])


@pytest.mark.parametrize("then", [httpx.ConnectError("refused"), 401, 429], ids=repr)
def test_what_may_have_arrived_is_not_said_to_have_never_been_sent(
    then: Exception | int, caller: Caller
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if len(wire.requests) == 1:
            raise httpx.ReadError("reset")
        if isinstance(then, Exception):
            raise then
        return httpx.Response(then)

    wire = Wire(answer)
    with pytest.raises((TransportError, ResponseError)) as caught:
        caller.using(transport=wire).publish(ONCE)
    assert caught.value.is_ambiguous


@pytest.mark.parametrize(
    ("retries", "pauses"), [(0, []), (1, [0.0]), (2, [0.0, 0.2]), (4, [0.0, 0.2, 0.4, 0.8])]
)
def test_retries_come_to_an_end_with_the_last_error(
    retries: int, pauses: list[float], caller: Caller
) -> None:
    wire = stumbling(httpx.ConnectError("refused"), times=100)
    with pytest.raises(TransportError) as caught:
        caller.using(transport=wire, retries=retries).publish(ONCE)
    assert (str(caught.value), caught.value.is_ambiguous) == (
        "no answer from QStash: ConnectError",
        False,
    )
    assert (len(wire.requests), caller.pauses) == (retries + 1, pauses)


def test_a_transport_error_does_not_repeat_what_the_transport_said(caller: Caller) -> None:
    wire = stumbling(httpx.ReadError(f"{URL}?token=secret"), times=100)
    with pytest.raises(TransportError) as caught:
        caller.using(transport=wire).publish(ONCE)
    assert str(caught.value) == "no answer from QStash: ReadError"


def test_these_calls_and_no_others_are_never_repeated_blindly() -> None:
    examples = {name: getattr(calls, name)(*args, **kw) for name, (args, kw, _) in EXAMPLES.items()}
    assert {name for name, call in examples.items() if not call.is_repeatable} == {
        "batch",  # of which one message has no deduplication id
        "cancel_messages",
        "cancel_messages_by",
        "cancel_all_messages",
        "delete_dead_letters",
        "retry_dead_letter",
        "retry_dead_letters",
        "rotate_keys",
    }


@pytest.mark.parametrize(
    ("timeout", "connect"), [(30.0, 5.0), (600.0, 5.0), (5.0, 5.0), (0.5, 0.5)]
)
def test_every_wait_has_its_limit(timeout: float, connect: float, caller: Caller) -> None:
    wire = saying({"messageId": "msg_1"})
    caller.using(transport=wire, timeout=timeout).publish(ONCE)
    assert [request.extensions["timeout"] for request in wire.requests] == [
        {"connect": connect, "read": timeout, "write": timeout, "pool": timeout}
    ]


def test_every_try_sends_the_same(caller: Caller) -> None:
    wire = stumbling(httpx.ReadError("reset"), times=2)
    caller.using(transport=wire).publish(ONCE)
    sent = {
        (request.method, request.url, request.content, tuple(request.headers.raw))
        for request in wire.requests
    }
    assert len(sent) == 1


# --- the same, over a real socket ----------------------------------------------------------------


class Forgetful:
    """A QStash that takes every message and whose first acknowledgement is lost on the way."""

    def __init__(self, lose: Callable[..., None]) -> None:
        self.lose = lose
        self.ids: dict[str, str] = {}
        self.messages: list[str] = []

    def __call__(self, request: Request, connection: Any) -> None:
        deduplication_id = request.headers.get("upstash-deduplication-id", f"#{len(self.messages)}")
        is_duplicate = deduplication_id in self.ids
        if not is_duplicate:
            self.ids[deduplication_id] = f"msg_{len(self.messages)}"
            self.messages.append(self.ids[deduplication_id])
            self.lose(request, connection)
            return
        answer = {"messageId": self.ids[deduplication_id], "deduplicated": True}
        answering(answer, status=202)(request, connection)


@pytest.mark.parametrize("lose", [resetting, cutting])
def test_a_lost_acknowledgement_creates_no_second_message(
    lose: Callable[..., None], caller: Caller
) -> None:
    qstash = Forgetful(lose)
    with serving(qstash) as server:
        accepted = caller.using(base_url=server.url).publish(ONCE)
    assert (accepted, qstash.messages) == (Accepted("msg_0", is_duplicate=True), ["msg_0"])


@pytest.mark.parametrize("lose", [resetting, cutting])
def test_without_a_deduplication_id_a_lost_acknowledgement_is_told(
    lose: Callable[..., None], caller: Caller
) -> None:
    qstash = Forgetful(lose)
    with serving(qstash) as server, pytest.raises(TransportError) as caught:
        caller.using(base_url=server.url).publish(BLIND)
    assert (caught.value.is_ambiguous, qstash.messages) == (True, ["msg_0"])


def test_a_server_that_is_not_there_was_sent_nothing(caller: Caller) -> None:
    with serving(answering()) as server:
        url = server.url
    with pytest.raises(TransportError) as caught:
        caller.using(base_url=url).publish(BLIND)
    assert (str(caught.value), caught.value.is_ambiguous) == (
        "no answer from QStash: ConnectError",
        False,
    )
    assert caller.pauses == [0.0, 0.2]


def test_an_answer_that_drips_is_given_up_at_the_deadline(caller: Caller) -> None:
    """Each byte comes in time; the answer does not."""
    with serving(dripping) as server, pytest.raises(TransportError) as caught:
        caller.using(base_url=server.url, timeout=0.2).publish(BLIND)
    assert (str(caught.value), caught.value.is_ambiguous) == ("QStash's answer took too long", True)


# --- the referee: our requests are the official SDK's --------------------------------------------

LETTERS = {"messages": []}
QUEUE = {"name": "q", "parallelism": 1, "createdAt": 1, "updatedAt": 1, "lag": 0, "paused": False}
MESSAGE = {
    "messageId": "m",
    "url": URL,
    "method": "POST",
    "maxRetries": 1,
    "notBefore": 1,
    "createdAt": 1,
}
JSON = Options(content_type="application/json")
FULL = Message(
    URL + "?a=b%20c",
    b'{"model": "m"}',
    Options(
        method="PUT",
        content_type="application/json",
        headers={"Authorization": "Bearer sk-1"},
        callback=Options(retries=5, headers={"X-Kind": "callback"}),
        failure_callback=Options(timeout=30),
        retries=0,
        retry_delay="1000 * retried",
        delay=90,
        timeout=60,
        flow_control=FlowControl(key="openai", parallelism=2, rate=10, period=60),
        labels=("summary",),
        redact=("body", "header[Authorization]"),
    ),
    deduplication_id="7b6e-1",
    callback=CALLBACK,
    failure_callback=CALLBACK + "&failed",
)
SDK_FULL = {
    "url": URL + "?a=b%20c",
    "body": {"model": "m"},
    "method": "PUT",
    "headers": {"Authorization": "Bearer sk-1"},
    "callback_headers": {"Retries": "5", "Forward-X-Kind": "callback"},
    "failure_callback_headers": {"Timeout": "30s"},
    "retries": 0,
    "retry_delay": "1000 * retried",
    "delay": 90,
    "timeout": 60,
    "flow_control": {"key": "openai", "parallelism": 2, "rate": 10, "period": 60},
    "label": "summary",
    "redact": {"body": True, "header": ["Authorization"]},
    "deduplication_id": "7b6e-1",
    "callback": CALLBACK,
    "failure_callback": CALLBACK + "&failed",
}


def without_nulls(request: Request) -> tuple[Any, ...]:
    """The SDK spells out what an item of a batch does not have."""
    body: Any = request.body
    if request.target == "/v2/batch":
        items = json.loads(request.body)
        body = [
            {name: value for name, value in item.items() if value is not None} for item in items
        ]
    elif request.said.get("content-type") == "application/json":
        body = json.loads(request.body)
    return (request.method, request.target, request.said, body)


@pytest.mark.parametrize(
    ("use_sdk", "name", "args", "kwargs", "answer"),
    [
        (
            lambda sdk: sdk.message.publish(url=URL),
            "publish",
            [Message(URL)],
            {},
            {"messageId": "m"},
        ),
        (
            lambda sdk: sdk.message.publish(url_group="group", body=b"\xff"),
            "publish",
            [Message("group", b"\xff")],
            {},
            [{"messageId": "m", "url": URL}],
        ),
        (
            lambda sdk: sdk.message.publish_json(**SDK_FULL),
            "publish",
            [FULL],
            {},
            {"messageId": "m"},
        ),
        (
            lambda sdk: sdk.message.enqueue_json(queue="q-1", url=URL, body=1),
            "publish",
            [Message(URL, b"1", JSON, queue="q-1")],
            {},
            {"messageId": "m"},
        ),
        (
            lambda sdk: sdk.message.batch(
                [
                    {
                        "url": URL,
                        "body": "ž",
                        "retries": 1,
                        "queue": "q-1",
                        "deduplication_id": "a",
                    },
                    {"url_group": "group", "body": ""},
                ]
            ),
            "batch",
            [
                [
                    Message(
                        URL, "ž".encode(), Options(retries=1), queue="q-1", deduplication_id="a"
                    ),
                    Message("group"),
                ]
            ],
            {},
            [{"messageId": "m"}, [{"messageId": "n", "url": URL}]],
        ),
        (lambda sdk: sdk.message.get("m"), "get_message", ["m"], {}, MESSAGE),
        (lambda sdk: sdk.message.cancel("m"), "cancel_message", ["m"], {}, {"cancelled": 1}),
        (
            lambda sdk: sdk.message.cancel_many(["m"]),
            "cancel_messages",
            [["m"]],
            {},
            {"cancelled": 1},
        ),
        (lambda sdk: sdk.message.cancel_all(), "cancel_all_messages", [], {}, {"cancelled": 1}),
        (
            lambda sdk: sdk.log.list(
                cursor="c", count=5, filter={"message_id": "m", "label": "a b", "from_time": 1}
            ),
            "logs",
            [],
            {"cursor": "c", "count": 5, "message_id": "m", "from_date": 1, "label": "a b"},
            {"events": []},
        ),
        (
            lambda sdk: sdk.dlq.list(
                count=5, filter={"url": URL, "queue": "q", "response_status": 500}
            ),
            "dead_letters",
            [],
            {"count": 5, "url": URL, "queue_name": "q", "response_status": 500},
            {"messages": []},
        ),
        (
            lambda sdk: sdk.dlq.get("1-0"),
            "get_dead_letter",
            ["1-0"],
            {},
            MESSAGE | {"responseStatus": 1},
        ),
        (lambda sdk: sdk.dlq.delete("1-0"), "delete_dead_letter", ["1-0"], {}, None),
        (
            lambda sdk: sdk.dlq.delete_many(["1-0"]),
            "delete_dead_letters",
            [["1-0"]],
            {},
            {"deleted": 1},
        ),
        (lambda sdk: sdk.queue.list(), "queues", [], {}, [QUEUE]),
        (lambda sdk: sdk.queue.get("q"), "get_queue", ["q"], {}, QUEUE),
        (
            lambda sdk: sdk.queue.upsert("q", parallelism=2, paused=True),
            "upsert_queue",
            ["q"],
            {"parallelism": 2, "is_paused": True},
            None,
        ),
        (lambda sdk: sdk.queue.delete("q"), "delete_queue", ["q"], {}, None),
        (lambda sdk: sdk.queue.pause("q"), "pause_queue", ["q"], {}, None),
        (lambda sdk: sdk.queue.resume("q"), "resume_queue", ["q"], {}, None),
        (
            lambda sdk: sdk.flow_control.get("k"),
            "get_flow_control",
            ["k"],
            {},
            {"flowControlKey": "k"},
        ),
        (lambda sdk: sdk.flow_control.pause("k"), "pause_flow_control", ["k"], {}, None),
        (lambda sdk: sdk.flow_control.resume("k"), "resume_flow_control", ["k"], {}, None),
        (
            lambda sdk: sdk.flow_control.pin("k", {"parallelism": 1, "rate": 2, "period": 3}),
            "pin_flow_control",
            ["k"],
            {"parallelism": 1, "rate": 2, "period": 3},
            None,
        ),
        (
            lambda sdk: sdk.flow_control.unpin("k", {"parallelism": True, "rate": True}),
            "unpin_flow_control",
            ["k"],
            {"parallelism": True, "rate": True},
            None,
        ),
        (lambda sdk: sdk.flow_control.reset_rate("k"), "reset_flow_control_rate", ["k"], {}, None),
        (lambda sdk: sdk.flow_control.get_global_parallelism(), "global_parallelism", [], {}, {}),
        (lambda sdk: sdk.signing_key.get(), "keys", [], {}, {"current": "a", "next": "b"}),
        (
            lambda sdk: sdk.signing_key.rotate(),
            "rotate_keys",
            [],
            {},
            {"current": "a", "next": "b"},
        ),
    ],
)
def test_we_ask_exactly_what_the_official_sdk_asks(
    use_sdk: Callable[[Any], Any],
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    answer: Any,
    referee: Referee,
) -> None:
    _, theirs = referee.ask_sdk(use_sdk, answering(answer))
    _, ours = referee.ask_us(lambda us: getattr(us, name)(*args, **kwargs), answering(answer))
    assert without_nulls(ours) == without_nulls(theirs)


# --- where to and as whom ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "asked"),
    [
        ("https://qstash-us-east-1.upstash.io", "https://qstash-us-east-1.upstash.io/v2/keys"),
        ("https://qstash.upstash.io/", "https://qstash.upstash.io/v2/keys"),
        ("https://qstash.upstash.io/v2/publish", "https://qstash.upstash.io/v2/keys"),
        ("https://qstash.upstash.io/v2/publish/", "https://qstash.upstash.io/v2/keys"),
        ("http://localhost:8000/qstash", "http://localhost:8000/qstash/v2/keys"),
    ],
)
def test_the_base_url_is_taken_as_people_paste_it(
    base_url: str, asked: str, caller: Caller
) -> None:
    wire = saying({"current": "a", "next": "b"})
    caller.using(transport=wire, base_url=base_url).keys()
    assert [str(request.url) for request in wire.requests] == [asked]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "qstash.upstash.io",
        "ftp://qstash.upstash.io",
        "https://",
        "https://h:port",
        "https://\n",
    ],
)
def test_a_base_url_that_is_none_is_refused(
    base_url: str, kind: type[Client] | type[AsyncClient]
) -> None:
    with pytest.raises(InvalidOption, match=r"base_url: .* is not an http"):
        kind(TOKEN, base_url=base_url)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("token", ["", None, "to ken", "token\n", "token ", "tokén", "\x00"])
def test_a_token_that_could_not_be_sent_is_refused_without_being_shown(
    token: Any, kind: type[Client] | type[AsyncClient]
) -> None:
    with pytest.raises(InvalidOption) as caught:
        kind(token)
    assert str(caught.value) == "token: empty, with spaces or not printable ASCII"


def test_no_repr_shows_the_token() -> None:
    with Client(TOKEN, transport=saying()) as client:
        assert repr(client) == "<Client https://qstash.upstash.io>"


def test_the_environments_proxy_does_not_see_the_token(
    monkeypatch: pytest.MonkeyPatch, caller: Caller
) -> None:
    with (
        serving(answering({"messageId": "evil"})) as proxy,
        serving(answering({"messageId": "m"})) as server,
    ):
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert caller.using(base_url=server.url).publish(ONCE) == Accepted("m")
    assert proxy.requests == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_with_the_token(status: int, caller: Caller) -> None:
    wire = saying({}, status, Location="https://evil.example/")
    with pytest.raises(ResponseError):
        caller.using(transport=wire).publish(ONCE)
    assert [request.url.host for request in wire.requests] == ["qstash.upstash.io"]


@pytest.mark.parametrize(
    "destination",
    [
        "https://example.com",
        "https://example.com//a//b",
        "https://example.com/a?x=1&x=2&y=%2F%20",
        "https://example.com/?next=https://x/../y",
        "https://example.com/%2e%2e/b",
        "group.of-urls",
    ],
)
def test_the_destination_arrives_untouched(destination: str, referee: Referee) -> None:
    message = Message(destination)
    _, request = referee.ask_us(lambda us: us.publish(message), answering({"messageId": "m"}))
    assert request.target == f"/v2/publish/{destination}"


def test_a_client_keeps_its_connections_and_can_be_used_again(caller: Caller) -> None:
    wire = saying({"messages": [{"messageId": "msg_1", "dlqId": "1-0"}]})
    with Client(TOKEN, transport=wire) as client:
        pages = [client.dead_letters() for _ in range(2)]
    assert pages == [Page([DeadLetter(message_id="msg_1", url="", dlq_id="1-0")])] * 2


# --- no framework --------------------------------------------------------------------------------


def test_the_protocol_needs_no_django() -> None:
    program = (
        "import sys, django_qstash_llm.qstash; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'django', 'celery', 'rest_framework'}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
