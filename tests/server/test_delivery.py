from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.db import connections
from django.utils import timezone

from django_qstash_llm.qstash import SignatureError
from django_qstash_llm.server import doorbell
from django_qstash_llm.server.delivery import (
    Engine,
    process_identity,
    release_claims_of_the_dead,
)
from django_qstash_llm.server.models import DeadLetter, LogEntry, Message, Outcome

from .conftest import (
    CALLBACK,
    FAILURE,
    PROVIDER,
    Api,
    Clock,
    Outage,
    Wire,
    claims_of,
    state,
    states,
)

# --- what the destination gets -------------------------------------------------------------------


def test_a_destination_gets_the_message_as_it_was_published(
    api: Api, engine: Engine, wire: Wire
) -> None:
    url = f"{PROVIDER}?a=1&b=%2F"
    message_id = api.published(
        url,
        b"\x00\xffbytes",
        Content_Type="application/octet-stream",
        Upstash_Method="PUT",
        Upstash_Forward_Authorization="Bearer sk-1",
        Upstash_Forward_X_Trace="t",
    )
    assert engine.deliver_due() == 1
    [request] = wire.requests
    assert (request.method, str(request.url)) == ("PUT", url)
    assert request.content == b"\x00\xffbytes"
    headers = dict(request.headers)
    claims = claims_of(request, time.time())
    assert claims.subject == url
    assert headers.pop("upstash-signature")
    assert headers == {
        "host": "provider.test",
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-length": "7",
        "content-type": "application/octet-stream",
        "authorization": "Bearer sk-1",
        "x-trace": "t",
        "user-agent": "Upstash-QStash",
        "upstash-message-id": message_id,
        "upstash-retried": "0",
        "upstash-region": "EU-CENTRAL-1",
        "upstash-caller-ip": "127.0.0.1",
    }
    assert states(message_id) == ["CREATED", "ACTIVE", "DELIVERED"]


def test_every_attempt_is_signed_anew(api: Api, engine: Engine, wire: Wire, clock: Clock) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    api.published()
    engine.deliver_due()
    clock.advance(3600)
    engine.deliver_due()
    first, second = wire.requests
    assert first.headers["Upstash-Message-Id"] == second.headers["Upstash-Message-Id"]
    assert (first.headers["Upstash-Retried"], second.headers["Upstash-Retried"]) == ("0", "1")
    claims_of(second, clock().timestamp())
    with pytest.raises(SignatureError, match="expired"):
        claims_of(first, clock().timestamp())


def test_deliveries_are_signed_with_the_key_that_was_rotated_to(
    api: Api, engine: Engine, wire: Wire
) -> None:
    api.post("/v2/keys/rotate")
    api.published()
    engine.deliver_due()
    assert claims_of(wire.requests[0], time.time()).key_index == 1


def test_a_get_carries_its_body(api: Api, engine: Engine, wire: Wire) -> None:
    api.published(body=b"query", Upstash_Method="GET")
    engine.deliver_due()
    assert (wire.requests[0].method, wire.requests[0].content) == ("GET", b"query")


def test_hosted_models_are_answered_by_the_upstream_with_its_own_key(
    api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(HOSTED_MODELS_URL="https://hosted.test/v1/", HOSTED_MODELS_KEY="sk-hosted")
    api.published("api/llm", b'{"model":"m"}', Upstash_Callback=CALLBACK)
    assert engine.deliver_due() == 2
    [request] = wire.to("https://hosted.test/v1/chat/completions")
    assert request.headers["Authorization"] == "Bearer sk-hosted"
    assert not [name for name in request.headers if name.startswith("upstash")]
    assert wire.callbacks()[0].url == "api/llm"


# --- when ----------------------------------------------------------------------------------------


def test_a_delayed_message_waits(api: Api, engine: Engine, clock: Clock) -> None:
    message_id = api.published(Upstash_Delay="1h")
    clock.advance(3599)
    assert engine.deliver_due() == 0
    clock.advance(1)
    assert engine.deliver_due() == 1
    assert state(message_id) == "DELIVERED"


def test_retries_come_after_qstashs_back_off_and_then_the_message_is_dead(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500))
    message_id = api.published()
    assert engine.deliver_due() == 1
    for wait in (12, 148, 1808):
        clock.advance(wait - 2)
        assert engine.deliver_due() == 0
        clock.advance(3)
        assert engine.deliver_due() == 1
    assert [request.headers["Upstash-Retried"] for request in wire.requests] == list("0123")
    assert state(message_id) == "FAILED"
    attempt = ["ACTIVE", "ERROR"]
    again = [*attempt, "RETRY"]
    assert states(message_id) == ["CREATED", *again, *again, *again, *attempt, "FAILED"]


@pytest.mark.parametrize(
    ("answer", "headers", "seconds"),
    [
        (httpx.Response(500), {"Upstash-Retry-Delay": "5000 * (1 + retried)"}, 5),
        (httpx.Response(429, headers={"Retry-After": "20"}), {"Upstash-Retry-Delay": "1000"}, 20),
        (httpx.Response(429, headers={"x-ratelimit-reset-requests": "6m5s"}), {}, 365),
        (httpx.Response(500, headers={"x-ratelimit-reset-requests": "1ms"}), {}, 12),
        (httpx.Response(301, headers={"Location": "https://else.test"}), {}, 12),
        (httpx.ConnectError("refused"), {}, 12),
    ],
)
def test_a_retry_waits_for_what_the_destination_then_the_expression_says(
    api: Api, engine: Engine, wire: Wire, answer: Any, headers: dict[str, str], seconds: float
) -> None:
    wire.answers(answer)
    api.post(f"/v2/publish/{PROVIDER}", headers=headers)
    before = timezone.now()
    engine.deliver_due()
    message = Message.objects.get()
    assert message.state == "RETRY"
    assert message.due_at is not None
    assert abs((message.due_at - before).total_seconds() - seconds) < 1
    assert len(wire.requests) == 1


def test_retries_0_is_one_attempt(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.Response(500))
    message_id = api.published(Upstash_Retries="0")
    engine.deliver_due()
    assert state(message_id) == "FAILED"


@pytest.mark.parametrize(
    ("status", "header", "end"),
    [
        (489, "true", "FAILED"),
        (489, "", "RETRY"),
        (400, "true", "RETRY"),
        (204, "true", "DELIVERED"),
    ],
)
def test_489_with_its_header_is_final_and_neither_alone_is(
    api: Api, engine: Engine, wire: Wire, status: int, header: str, end: str
) -> None:
    headers = {"Upstash-NonRetryable-Error": header} if header else {}
    wire.answers(httpx.Response(status, headers=headers))
    message_id = api.published()
    engine.deliver_due()
    assert state(message_id) == end


def test_a_redirect_is_not_followed(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.Response(302, headers={"Location": "http://169.254.169.254/"}))
    api.published()
    engine.deliver_due()
    assert [str(request.url) for request in wire.requests] == [PROVIDER]


def test_cookies_are_not_kept_from_one_message_to_the_next(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(200, headers={"Set-Cookie": "a=b; Path=/"}))
    api.published()
    api.published()
    engine.deliver_due()
    assert "cookie" not in wire.requests[1].headers


# --- callbacks -----------------------------------------------------------------------------------


def test_every_attempt_is_told_and_the_failure_once(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500, text="no", headers={"X-A": "1"}))
    message_id = api.published(
        body=b"prompt",
        Upstash_Retries="1",
        Upstash_Callback=CALLBACK,
        Upstash_Failure_Callback=FAILURE,
        Upstash_Forward_Authorization="Bearer canary",
        Upstash_Callback_Forward_X_Corr="c1",
    )
    engine.deliver_due()
    clock.advance(20)
    engine.deliver_due()
    first, second = wire.callbacks(CALLBACK)
    [failure] = wire.callbacks(FAILURE)
    assert (first.retried, second.retried, failure.retried) == (0, 1, 1)
    assert [c.dlq_id for c in (first, second)] == ["", ""]
    assert failure.dlq_id == DeadLetter.objects.get().dlq_id
    for told in (first, second, failure):
        assert (told.status, told.body, told.max_retries) == (500, b"no", 1)
        assert told.header["X-A"] == ["1"]
        assert (told.source_message_id, told.source_body) == (message_id, b"prompt")
        assert (told.url, told.method, told.caller_ip) == (PROVIDER, "POST", "127.0.0.1")
        assert told.source_header["Authorization"] == ["REDACTED"]
        assert told.created_at == told.not_before > 0
    # The order in which they were told, and each a message of its own.
    order = [str(request.url) for request in wire.requests]
    assert order == [PROVIDER, CALLBACK, PROVIDER, CALLBACK, FAILURE]
    requests = [request for request in wire.requests if str(request.url) != PROVIDER]
    assert len({request.headers["Upstash-Message-Id"] for request in requests} | {message_id}) == 4
    for request in requests:
        assert request.headers["Content-Type"] == "application/json"
        claims_of(request, clock().timestamp())
    assert [request.headers.get("X-Corr") for request in requests] == ["c1", "c1", None]
    assert b"canary" not in b"".join(request.content for request in requests)


def test_the_providers_key_is_told_in_callbacks_only_when_the_site_wants_that(
    api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(SOURCE_HEADER_SECRETS=True)
    api.published(Upstash_Callback=CALLBACK, Upstash_Forward_Authorization="Bearer sk-1")
    engine.deliver_due()
    assert wire.callbacks()[0].source_header["Authorization"] == ["Bearer sk-1"]


def test_without_a_response_a_callback_says_minus_one(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.ReadTimeout("slow"))
    api.published(Upstash_Callback=CALLBACK, Upstash_Retries="0", Upstash_Timeout="5s")
    engine.deliver_due()
    [told] = wire.callbacks()
    assert (told.status, told.body, told.header) == (-1, b"", {})
    assert DeadLetter.objects.get().error == "ReadTimeout: no response within 5 s"


def test_a_callback_has_retries_and_dead_letters_of_its_own(
    api: Api, engine: Engine, wire: Wire, clock: Clock
) -> None:
    down = {CALLBACK}
    wire.answer = lambda request: httpx.Response(503 if str(request.url) in down else 200)
    message_id = api.published(
        Upstash_Callback=CALLBACK,
        Upstash_Callback_Retries="1",
        Upstash_Callback_Retry_Delay="1000",
        Upstash_Callback_Method="PUT",
    )
    engine.deliver_due()
    assert state(message_id) == "DELIVERED"
    clock.advance(2)
    engine.deliver_due()
    assert [request.method for request in wire.to(CALLBACK)] == ["PUT", "PUT"]
    letter = DeadLetter.objects.get()
    assert letter.message.kind == "callback"
    down.clear()
    api.post(f"/v2/dlq/retry/{letter.dlq_id}")
    engine.deliver_due()
    assert wire.callbacks()[-1].source_message_id == message_id
    assert Message.objects.filter(source__isnull=False, state="DELIVERED").count() == 1


def test_a_callback_inherits_the_retries_and_may_be_delayed(
    api: Api, engine: Engine, clock: Clock, wire: Wire
) -> None:
    api.published(Upstash_Callback=CALLBACK, Upstash_Retries="7", Upstash_Callback_Delay="1m")
    assert engine.deliver_due() == 1
    assert Message.objects.get(kind="callback").retries == 7
    clock.advance(61)
    assert engine.deliver_due() == 1


def test_a_489_is_told_by_the_failure_callback_although_retries_are_left(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(489, headers={"Upstash-NonRetryable-Error": "true"}))
    api.published(Upstash_Callback=CALLBACK, Upstash_Failure_Callback=FAILURE)
    engine.deliver_due()
    assert [told.is_last for told in wire.callbacks()] == [False]
    assert wire.callbacks(FAILURE)[0].is_last


# --- what a destination answers ------------------------------------------------------------------


def test_a_response_is_cut_at_the_largest_message(
    api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(MAX_BODY=1000)
    engine = Engine()
    wire.answers(httpx.Response(200, content=b"x" * 5000))
    api.published(Upstash_Callback=CALLBACK)
    engine.deliver_due()
    assert wire.callbacks()[0].body == b"x" * 1000


def test_a_compressed_response_is_told_as_what_it_says(
    api: Api, engine: Engine, wire: Wire
) -> None:
    zipped = gzip.compress(b'{"ok": true}')
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    wire.answers(httpx.Response(200, headers=headers, stream=httpx.ByteStream(zipped)))
    wire.answer = lambda request: (
        httpx.Response(200, headers=headers, stream=httpx.ByteStream(zipped))
        if str(request.url) == PROVIDER
        else httpx.Response(200)
    )
    api.published(Upstash_Callback=CALLBACK)
    engine.deliver_due()
    [told] = wire.callbacks()
    assert told.body == b'{"ok": true}'
    assert told.header == {"Content-Type": ["application/json"]}


def deflated(content: bytes) -> bytes:
    """Without zlib's header, as some servers understand the word."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "sent", "told", "is_unpacked"),
    [
        ("deflate", deflated(b"hello world" * 9), b"hello world" * 9, True),
        ("deflate", zlib.compress(b"hello world" * 9), b"hello world" * 9, True),
        ("gzip", b"not packed at all", b"not packed at all", False),
        ("deflate", b"\xff\xfe not packed", b"\xff\xfe not packed", False),
        ("gzip", gzip.compress(bytes(99), mtime=0)[:-8] + b"x" * 8, None, False),
        ("gzip", gzip.compress(b"hello", mtime=0)[:-8], b"hello", True),
        ("gzip", b"", b"", True),
        ("br", b"\x0b", b"\x0b", False),
    ],
)
def test_a_success_is_one_however_its_body_is_packed(
    api: Api,
    engine: Engine,
    wire: Wire,
    encoding: str,
    sent: bytes,
    told: bytes | None,
    is_unpacked: bool,
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) != PROVIDER:
            return httpx.Response(200)
        # In pieces, and as it comes over the wire.
        return httpx.Response(200, headers={"Content-Encoding": encoding}, stream=InPieces(sent))

    wire.answer = answer
    message_id = api.published(Upstash_Callback=CALLBACK)
    engine.deliver_due()
    assert state(message_id) == "DELIVERED"
    [callback] = wire.callbacks()
    assert callback.status == 200
    assert callback.body == (sent if told is None else told)
    assert callback.header == ({} if is_unpacked else {"Content-Encoding": [encoding]})


class InPieces(httpx.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.content), 5):
            yield self.content[start : start + 5]


def test_a_response_full_of_what_databases_hate_is_kept(
    api: Api, engine: Engine, wire: Wire
) -> None:
    answer = httpx.Response(
        500, headers=[(b"x-bad", b"a\x00b"), (b"x-latin", b"\xe9")], content=b"\x00\xff\xed\xa0\x80"
    )
    wire.answers(answer)
    api.published(Upstash_Retries="0", Upstash_Callback=CALLBACK)
    engine.deliver_due()
    letter = api.get("/v2/dlq").json()["messages"][0]
    assert letter["responseHeader"]["X-Bad"] == ["a\ufffdb"]
    assert wire.callbacks()[0].body == b"\x00\xff\xed\xa0\x80"


def test_an_error_never_repeats_a_header(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.LocalProtocolError("Illegal header value b'Bearer canary'"))
    api.published(Upstash_Retries="0")
    engine.deliver_due()
    assert DeadLetter.objects.get().error == "LocalProtocolError"


# --- keys of providers ---------------------------------------------------------------------------


def test_a_key_leaves_the_database_with_its_message(api: Api, engine: Engine, wire: Wire) -> None:
    message_id = api.published(
        Upstash_Forward_Authorization="Bearer canary", Upstash_Callback=CALLBACK
    )
    assert "canary" in str(Message.objects.get(message_id=message_id).secrets)
    engine.deliver_due()
    everything = [str(row) for row in Message.objects.values()]
    everything += [str(row) for row in LogEntry.objects.values()]
    assert "canary" not in "".join(everything)
    shown = api.get(f"/v2/messages/{message_id}").json()["header"]
    assert shown["Authorization"] == ["REDACTED"]


# --- claims --------------------------------------------------------------------------------------


def claim(clock: Clock, **kwargs: Any) -> list[Message]:
    return Message.objects.claim(engine="elsewhere:1:1", limit=10, now=clock(), **kwargs)


def test_a_claimed_message_is_nobody_elses_until_its_lease_is_over(
    api: Api, engine: Engine, clock: Clock
) -> None:
    message_id = api.published(Upstash_Timeout="60s")
    [claimed] = claim(clock)
    assert claim(clock) == []
    clock.advance(60 + 29)
    assert claim(clock) == []
    clock.advance(2)
    assert engine.deliver_due() == 1
    assert state(message_id) == "DELIVERED"
    assert claimed.record(Outcome(status=500), now=clock()) is False
    assert states(message_id) == ["CREATED", "ACTIVE", "ACTIVE", "DELIVERED"]


def test_whoever_lost_the_claim_writes_nothing(api: Api, clock: Clock) -> None:
    message_id = api.published(Upstash_Callback=CALLBACK)
    [first] = claim(clock, lease=30)
    clock.advance(31)
    [second] = claim(clock, lease=30)
    assert first.record(Outcome(status=200), now=clock()) is False
    assert state(message_id) == "ACTIVE"
    assert Message.objects.count() == 1
    assert second.record(Outcome(status=200), now=clock()) is True
    assert second.record(Outcome(status=200), now=clock()) is False
    assert Message.objects.count() == 2


def test_a_renewed_lease_lasts(api: Api, clock: Clock) -> None:
    api.published()
    [claimed] = claim(clock, lease=30)
    clock.advance(25)
    Message.objects.renew([claimed.claim_token], until=clock() + timedelta(seconds=30))
    clock.advance(25)
    assert claim(clock) == []
    clock.advance(6)
    assert len(claim(clock)) == 1


def test_a_message_that_kills_its_engines_ends_as_a_failed_attempt(
    api: Api, engine: Engine, clock: Clock, wire: Wire
) -> None:
    message_id = api.published(Upstash_Retries="0", Upstash_Failure_Callback=FAILURE)
    for _ in range(5):
        assert len(claim(clock, lease=30)) == 1
        clock.advance(31)
    engine.deliver_due()
    assert state(message_id) == "FAILED"
    assert wire.to(PROVIDER) == []
    [told] = wire.callbacks(FAILURE)
    assert told.status == -1
    assert "interrupted 5 times" in DeadLetter.objects.get().error


def test_a_cancelled_message_in_flight_may_still_arrive(api: Api, clock: Clock) -> None:
    message_id = api.published(Upstash_Callback=CALLBACK)
    [claimed] = claim(clock)
    assert api.delete(f"/v2/messages/{message_id}").json() == {"cancelled": 1}
    assert state(message_id) == "CANCEL_REQUESTED"
    assert claimed.record(Outcome(status=200), now=clock())
    assert state(message_id) == "DELIVERED"
    assert Message.objects.filter(kind="callback").count() == 1


def test_a_cancelled_message_in_flight_is_not_tried_again(api: Api, clock: Clock) -> None:
    message_id = api.published(Upstash_Callback=CALLBACK)
    [claimed] = claim(clock)
    api.delete(f"/v2/messages/{message_id}")
    assert claimed.record(Outcome(status=500), now=clock())
    assert state(message_id) == "CANCELED"
    assert Message.objects.count() == 1


def test_a_cancelled_message_whose_engine_died_is_only_finished(
    api: Api, engine: Engine, clock: Clock, wire: Wire
) -> None:
    message_id = api.published()
    claim(clock, lease=30)
    api.delete(f"/v2/messages/{message_id}")
    clock.advance(31)
    assert engine.deliver_due() == 0
    assert state(message_id) == "CANCELED"
    assert wire.requests == []


def test_claims_of_a_process_that_is_no_more_are_free_at_once(
    api: Api, engine: Engine, clock: Clock
) -> None:
    message_id = api.published()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = process_identity().rsplit(":", 2)[0]
    from django_qstash_llm.server.delivery.identity import _started_at

    dead = f"{host}:{process.pid}:{_started_at(process.pid)}"
    Message.objects.claim(engine=dead, limit=1, now=clock())
    assert release_claims_of_the_dead() == 0
    process.kill()
    process.communicate()
    assert release_claims_of_the_dead() == 1
    assert engine.deliver_due() == 1
    assert state(message_id) == "DELIVERED"


def test_claims_of_the_living_and_of_other_machines_are_left_alone(api: Api, clock: Clock) -> None:
    api.published()
    api.published()
    Message.objects.claim(engine=process_identity(), limit=1, now=clock())
    Message.objects.claim(engine="another/1:1:1", limit=1, now=clock())
    assert release_claims_of_the_dead() == 0


def test_a_pid_that_was_given_to_another_process_counts_as_dead(api: Api, clock: Clock) -> None:
    api.published()
    host = process_identity().rsplit(":", 2)[0]
    Message.objects.claim(engine=f"{host}:{os.getpid()}:1", limit=1, now=clock())
    assert release_claims_of_the_dead() == 1


# --- many at a time ------------------------------------------------------------------------------

RENEWAL = 'UPDATE "qstash_server_message" SET "due_at" = '


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=engine.run, args=(stop,), kwargs={"grace": 0.5})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        engine.ring()
        thread.join()


def eventually(is_so: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


@pytest.mark.django_db(transaction=True)
def test_an_engine_keeps_many_calls_in_flight(api: Api, wire: Wire) -> None:
    everybody = threading.Barrier(20)

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) == PROVIDER:
            everybody.wait(10)  # only passes when all are there
        return httpx.Response(200)

    wire.answer = answer
    with running(Engine(concurrency=20)):
        item = {"destination": PROVIDER, "headers": {"Upstash-Callback": CALLBACK}}
        api.post("/v2/batch", [item] * 20)
        eventually(lambda: len(wire.to(CALLBACK)) == 20)
        delivered = Message.objects.filter(state="DELIVERED")
        eventually(lambda: delivered.count() == 40)


@pytest.mark.django_db(transaction=True)
def test_an_engine_wakes_when_a_retry_is_due(api: Api, wire: Wire) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    with running(Engine()):
        message_id = api.published(Upstash_Retry_Delay="100")
        eventually(lambda: state(message_id) == "DELIVERED")


@pytest.mark.django_db(transaction=True)
def test_a_call_that_outlives_the_lease_is_not_taken_for_dead(
    api: Api, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(LEASE=1, POLL=0.1)
    done = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        done.wait(10)
        return httpx.Response(200)

    wire.answer = answer
    with running(Engine()):
        message_id = api.published()
        eventually(lambda: bool(wire.requests))
        before = Message.objects.get().due_at
        assert before is not None
        eventually(lambda: Message.objects.get().due_at > before)
        done.set()
        eventually(lambda: state(message_id) == "DELIVERED")
    assert len(wire.requests) == 1


@pytest.mark.django_db(transaction=True)
def test_an_engine_that_stops_lets_go_of_what_it_could_not_finish(
    api: Api, wire: Wire, clock: Clock
) -> None:
    hanging = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        hanging.wait(10)
        return httpx.Response(200)

    wire.answer = answer
    with running(Engine()):
        message_id = api.published()
        eventually(lambda: bool(wire.requests))
    assert state(message_id) == "CREATED"
    hanging.set()
    clock.advance(1)
    wire.answers(httpx.Response(200))
    assert Engine(clock=clock).deliver_due() == 1


@pytest.mark.django_db(transaction=True)
def test_one_slow_call_keeps_a_drain_from_nothing_else(
    api: Api, wire: Wire, configure: Callable[..., None]
) -> None:
    configure(POLL=0.05)
    quick_came = threading.Event()
    slow = "https://slow.test/"

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) == slow:
            publishing = threading.Thread(target=publish_and_close)
            publishing.start()
            publishing.join()
            return httpx.Response(200 if quick_came.wait(5) else 500)
        quick_came.set()
        return httpx.Response(200)

    def publish_and_close() -> None:
        api.published()
        connections.close_all()

    wire.answer = answer
    with doorbell.listening(threading.Event()):
        api.published(slow, Upstash_Retries="0")
    engine = Engine()
    assert engine.drain() is None
    engine.close()
    assert Message.objects.filter(state="DELIVERED").count() == 2


@pytest.mark.django_db(transaction=True)
def test_a_drain_outlives_the_database_while_a_call_is_in_flight(
    api: Api, wire: Wire, outage: Outage, configure: Callable[..., None]
) -> None:
    configure(LEASE=1, POLL=0.05)

    def answer(request: httpx.Request) -> httpx.Response:
        outage.begin(lambda statement: statement.startswith(RENEWAL))
        was_met = outage.was_met.wait(5)
        outage.end()
        return httpx.Response(200 if was_met else 500)

    wire.answer = answer
    with doorbell.listening(threading.Event()):
        message_id = api.published(Upstash_Retries="0")
    engine = Engine()
    assert engine.drain() is None
    engine.close()
    assert state(message_id) == "DELIVERED"
    assert len(wire.requests) == 1


@pytest.mark.django_db(transaction=True)
def test_an_outcome_that_cannot_be_written_holds_up_nobody_else(
    api: Api, wire: Wire, outage: Outage, configure: Callable[..., None]
) -> None:
    configure(LEASE=1, POLL=0.05)
    renewed, slow_was_written = threading.Event(), threading.Event()
    slow = "https://slow.test/"

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) == slow:
            renewed.wait(5)
        return httpx.Response(200)

    def is_hit(statement: str) -> bool:
        if outage.was_met.is_set() and statement.startswith(RENEWAL):
            renewed.set()
        if not (statement.startswith("UPDATE") and "DELIVERED" in statement):
            return False
        if not statement.endswith(f", {stuck.pk})"):
            slow_was_written.set()
            return False
        return not slow_was_written.is_set()

    wire.answer = answer
    with doorbell.listening(threading.Event()):
        stuck = Message.objects.get(message_id=api.published())
        api.published(slow)
    outage.begin(is_hit)
    engine = Engine()
    assert engine.drain() is None
    engine.close()
    assert (renewed.is_set(), slow_was_written.is_set()) == (True, True)
    assert Message.objects.filter(state="DELIVERED").count() == 2
    assert len(wire.requests) == 2


# --- over real sockets ---------------------------------------------------------------------------


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A destination that is a function of its connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    serve(connection)
        except OSError:
            return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture
def real(configure: Callable[..., None], db: None) -> Iterator[Engine]:
    configure(TRANSPORT=None, ALLOW_LOOPBACK=True)
    engine = Engine()
    yield engine
    engine.close()


def test_a_real_destination_is_reached(api: Api, real: Engine) -> None:
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    with listening(serve) as port:
        message_id = api.published(f"http://127.0.0.1:{port}/a%20b?x=%20")
        assert real.deliver_due() == 1
    assert state(message_id) == "DELIVERED"
    assert heard[0].startswith(b"POST /a%20b?x=%20 HTTP/1.1\r\n")


def test_a_destination_that_drips_is_cut_off_when_the_time_is_over(api: Api, real: Engine) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    with listening(serve) as port:
        api.published(f"http://127.0.0.1:{port}/", Upstash_Timeout="300ms", Upstash_Retries="0")
        began = time.monotonic()
        real.deliver_due()
        assert time.monotonic() - began < 3
    assert DeadLetter.objects.get().error == "ReadTimeout: no response within 0.3 s"


def test_a_name_that_points_inside_is_not_connected_to(
    api: Api, real: Engine, configure: Callable[..., None]
) -> None:
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65536))

    with listening(serve) as port:
        # Published while it was allowed, delivered when it is not any more.
        api.published(f"http://localhost:{port}/", Upstash_Retries="0")
        configure(ALLOW_LOOPBACK=False)
        Message.objects.update(url=f"http://{socket.gethostname()}:{port}/")
        real.deliver_due()
    assert heard == []
    assert "endpoint resolves to a" in DeadLetter.objects.get().error


def test_nobody_listening_is_told_as_a_refused_connection(api: Api, real: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    api.published(f"http://127.0.0.1:{port}/", Upstash_Retries="0")
    real.deliver_due()
    assert DeadLetter.objects.get().error.startswith("ConnectError:")


def test_an_address_that_the_network_code_will_not_have_is_a_failed_attempt(
    api: Api, real: Engine, configure: Callable[..., None]
) -> None:
    configure(HOST_MAP={"provider.test": "http://127.0.0.1:0"})
    message_id = api.published(Upstash_Retries="0")
    real.deliver_due()
    assert state(message_id) == "FAILED"
    assert DeadLetter.objects.get().error == "RuntimeError"
