"""The Chat API: over ``httpx``'s own mock where an answer is enough, and a real server where it
matters how bytes come and connections end."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings as site
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm import chat
from django_qstash_llm.exceptions import ChatFailed, ConfigurationError, InvalidRequest
from django_qstash_llm.models import LLMRequest, Price
from django_qstash_llm.models.price import forget_prices
from django_qstash_llm.models.reconciler import Reconciler
from django_qstash_llm.models.request import Via
from django_qstash_llm.providers import get_provider
from django_qstash_llm.qstash import FlowControl
from django_qstash_llm.signals import request_completed, request_failed
from testproject.articles.models import Article
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

ASK = [{"role": "user", "content": "How many roads?"}]
KEY = "sk-canary-0123456789"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
PRICES = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}


pytestmark = pytest.mark.django_db


def ours(**more: Any) -> Any:
    return override_settings(QSTASH_LLM={**site.QSTASH_LLM, **more})


def delta(text: str = "", reason: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    told = {"content": text} if text else {}
    choice = {"index": index, "delta": told, "finish_reason": reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "gpt-5.4-mini-1"}
    return {**head, "choices": [choice], **more}


def sse(*events: Any, done: bool = True) -> bytes:
    told = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {each}\n\n" for each in [*told, *["[DONE]"] * done]).encode()


COUNTED = {"id": "chatcmpl-1", "choices": [], "usage": USAGE}
STREAM = sse(delta("Forty"), delta("-two."), delta(reason="stop"), COUNTED)


def answers(wire: Wire, answer: httpx.Response | Callable[[httpx.Request], httpx.Response]) -> None:
    wire.hosts["provider.test"] = answer if callable(answer) else lambda request: answer


def streams(wire: Wire, *pieces: bytes, **headers: str) -> None:
    told = {"content-type": "text/event-stream", **headers}
    answers(wire, lambda request: httpx.Response(200, headers=told, content=iter(pieces)))


def only_row() -> LLMRequest:
    return LLMRequest.objects.get()


# --- whole answers ---------------------------------------------------------------------------


def test_answer_is_there_at_once_and_recorded_as_any_other(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    user = User.objects.create(username="ada")
    article = Article.objects.create(title="A", summary="there")
    with ours(PRICES=PRICES):
        row = LLMRequest.objects.chat(
            ASK, about=article, user=user, tenant="acme", labels=["x"], metadata={"a": 1}, seed=7
        )
    stored = only_row()
    assert stored == row
    for each in (row, stored):
        assert (each.state, each.via, each.attempts, each.last_status) == (
            "completed",
            "chat",
            1,
            200,
        )
        assert (each.completion, each.finish_reason) == ("Forty-two.", "stop")
        assert (each.completion_id, each.answered_by) == ("chatcmpl-1", "gpt-5.4-mini-2026-03-01")
        assert (each.input_tokens, each.output_tokens, each.usage) == (9, 3, USAGE)
        assert (each.cost, each.cost_source) == (Decimal("0.000015"), "setting")
        assert (each.about, each.user, each.tenant) == (article, user, "acme")
        assert each.parameters == {"seed": 7}
        assert each.deadline_at is None
    [request] = wire.requests
    assert json.loads(request.content) == {"model": "gpt-5.4-mini", "messages": ASK, "seed": 7}
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert str(request.url) == "https://provider.test/v1/chat/completions"


@pytest.mark.django_db(transaction=True)
def test_row_is_there_before_the_provider_is_called(wire: Wire) -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        row = only_row()
        seen.append((row.state, row.via, row.attempts, row.deadline_at is not None))
        seen.append(connection.in_atomic_block)
        return httpx.Response(200, json=ANSWER)

    answers(wire, answer)
    LLMRequest.objects.chat(ASK, timeout=30)
    assert seen == [("submitted", "chat", 1, True), False]


def test_bytes_are_passed_on_as_they_came(wire: Wire) -> None:
    body = json.dumps(ANSWER | {"unknown": [1.0, "ü"]}, indent=1).encode()
    headers = {"X-RateLimit-Remaining-Requests": "7", "Set-Cookie": "a=b", "X-Echo": KEY}
    answers(wire, httpx.Response(200, content=body, headers=headers))
    # As an endpoint asks: parameters of an OpenAI client may have the names of our arguments.
    row = LLMRequest(
        via=Via.CHAT, messages=ASK, parameters={"user": "u-1", "metadata": {"a": "b"}, "n": 1}
    )
    answer = chat.complete(row)
    assert (answer.status, answer.body, answer.llm_request) == (200, body, row)
    assert answer.headers == {"x-ratelimit-remaining-requests": "7", "x-echo": "[redacted]"}
    assert json.loads(wire.requests[0].content)["user"] == "u-1"


@pytest.mark.django_db(transaction=True)
def test_signals_are_sent_as_for_any_other(wire: Wire) -> None:
    told: list[tuple[str, str]] = []

    def completed(llm_request: LLMRequest, **kwargs: Any) -> None:
        told.append(("completed", llm_request.completion))

    def failed(llm_request: LLMRequest, **kwargs: Any) -> None:
        told.append(("failed", llm_request.error_code))

    request_completed.connect(completed)
    request_failed.connect(failed)
    try:
        answers(wire, httpx.Response(200, json=ANSWER))
        LLMRequest.objects.chat(ASK)
        answers(wire, httpx.Response(500, json={"error": {"code": "boom"}}))
        with pytest.raises(ChatFailed):
            LLMRequest.objects.chat(ASK)
    finally:
        request_completed.disconnect(completed)
        request_failed.disconnect(failed)
    assert told == [("completed", "Forty-two."), ("failed", "boom")]
    assert not LLMRequest.objects.filter(announced_at=None).exists()


@pytest.mark.parametrize(
    ("status", "body", "code", "trouble", "wait"),
    [
        (429, {"error": {"code": "rate_limit_exceeded", "message": "slow"}}, "rate_limit_exceeded", "rate", 7.0),
        (401, {"error": {"message": f"bad key {KEY}", "type": "auth"}}, "auth", "auth", None),
        (400, {"error": {"param": "n", "code": "unsupported_value"}}, "unsupported_value", "invalid", None),
        (302, {}, "http_302", "gone", None),
        (200, {"error": {"code": 502, "message": "upstream"}}, "502", "fault", 7.0),
        (200, {"choices": []}, "no_choices", "", None),
        (200, "no JSON", "not_json", "", None),
    ],
)  # fmt: skip
def test_refusal_is_raised_and_recorded_in_the_providers_words(
    wire: Wire, status: int, body: Any, code: str, trouble: str, wait: float | None
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Retry-After": "7", "Location": "https://elsewhere.test/"}
    answers(wire, httpx.Response(status, content=content.encode(), headers=headers))
    with pytest.raises(ChatFailed) as caught:
        LLMRequest.objects.chat(ASK)
    error, row = caught.value, only_row()
    assert (error.code, error.status, error.trouble, error.wait) == (code, status, trouble, wait)
    assert error.llm_request == row
    assert error.headers["retry-after"] == "7"
    assert error.body.decode() == content.replace(KEY, "[redacted]")
    assert (row.state, row.error_code, row.last_status) == ("failed", code, status)
    assert KEY not in str(error) + row.error
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (httpx.ConnectError("refused"), "no_response"),
        (httpx.ConnectTimeout("slow"), "timeout"),
        (httpx.ReadTimeout("slow"), "timeout"),
        (httpx.RemoteProtocolError("closed"), "no_response"),
    ],
)
@pytest.mark.parametrize("way", ["chat", "stream"])
def test_silence_is_a_failure_and_never_asked_again(
    wire: Wire, raised: Exception, code: str, way: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise raised

    answers(wire, answer)
    with pytest.raises(ChatFailed) as caught:
        getattr(LLMRequest.objects, way)(ASK)
    row = only_row()
    assert (caught.value.code, caught.value.status, caught.value.trouble) == (code, None, "fault")
    assert (row.state, row.error_code, row.last_status) == ("failed", code, -1)
    assert len(wire.requests) == 1


def test_what_breaks_in_between_leaves_no_row_behind_that_waits(wire: Wire) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    answers(wire, answer)
    with pytest.raises(KeyboardInterrupt):
        LLMRequest.objects.chat(ASK)
    assert (only_row().state, only_row().error_code) == ("cancelled", "aborted")


@pytest.mark.parametrize("way", ["chat", "stream", "achat", "astream"])
def test_what_breaks_in_ours_is_a_failure_and_nobody_who_left(wire: Wire, way: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise LookupError(f"inner workings with {KEY}")

    answers(wire, answer)
    ask = getattr(LLMRequest.objects.all(), way)
    with pytest.raises(LookupError):
        (async_to_sync(ask) if way[0] == "a" else ask)(ASK)
    row = only_row()
    assert (row.state, row.error_code) == ("failed", "unexpected")
    assert row.error == "LookupError was raised before the answer was whole"


def test_what_breaks_in_a_stream_keeps_what_came(wire: Wire) -> None:
    def pieces() -> Iterator[bytes]:
        yield sse(delta("Forty"), done=False)
        raise LookupError("a transport of yours")

    answers(wire, lambda request: httpx.Response(200, content=pieces()))
    with pytest.raises(LookupError):
        list(LLMRequest.objects.stream(ASK))
    row = only_row()
    assert (row.state, row.error_code, row.completion) == ("failed", "unexpected", "Forty")
    assert row.usage["estimated"] is True


def test_answer_to_a_cancelled_request_is_still_paid_for(wire: Wire, qstash: FakeQStash) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        only_row().cancel()
        return httpx.Response(200, json=ANSWER)

    answers(wire, answer)
    row = LLMRequest.objects.chat(ASK)
    assert (row.state, row.completion, row.input_tokens) == ("cancelled", "", 9)
    assert qstash.calls == []


@pytest.mark.parametrize(
    "asked",
    [
        {"queue": "q"},
        {"delay": 3},
        {"retries": 3},
        {"retry_delay": "1000"},
        {"flow_control": FlowControl(key="k", rate=1)},
        {"redact": ["body"]},
        {"stream": True},
        {"via": "chat"},
        {"label": "x"},
        {"api_key": "x"},
        {"timout": 7},
        {"timeout": 0},
        {"provider": "nobody"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    wire: Wire, asked: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLMRequest.objects.chat(ASK, **asked)
    assert caught.value.field in asked
    with pytest.raises(InvalidRequest):
        LLMRequest.objects.stream(ASK, **asked)
    assert not LLMRequest.objects.exists()
    assert wire.requests == []


def test_chat_is_not_saved_to_be_asked_by_qstash(qstash: FakeQStash) -> None:
    with pytest.raises(InvalidRequest, match="chat or stream"):
        LLMRequest.objects.create(via="chat", messages=ASK)
    row = LLMRequest.objects.publish(ASK)
    for unusable in (row, LLMRequest(messages=ASK)):
        with pytest.raises(InvalidRequest, match="unsaved"):
            chat.complete(unusable)


def test_durable_ways_name_the_chat_api_when_asked_to_stream() -> None:
    with pytest.raises(InvalidRequest, match="Chat API"):
        LLMRequest.objects.publish(ASK, stream=True)


def test_nothing_of_qstash_has_to_be_set_up(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    with override_settings(QSTASH_TOKEN="", QSTASH_CURRENT_SIGNING_KEY=""):
        assert LLMRequest.objects.chat(ASK).completion == "Forty-two."


def test_hosted_models_need_an_upstream(wire: Wire) -> None:
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    with pytest.raises(ConfigurationError, match=r"'upstash'.*BASE_URL"):
        LLMRequest.objects.chat(ASK, provider="upstash", model=model)
    assert not LLMRequest.objects.exists()
    answers(wire, httpx.Response(200, json=ANSWER))
    upstash = {"BASE_URL": "https://provider.test/v1", "API_KEY": "key-of-the-upstream"}
    with ours(PROVIDERS={"upstash": upstash}):
        assert LLMRequest.objects.chat(ASK, provider="upstash", model=model).cost_source == "hosted"
        # QStash's own endpoint is still reached without the upstream's key.
        assert get_provider("upstash").headers == {}  # QStash is not told the upstream's key
    assert wire.requests[0].headers["Authorization"] == "Bearer key-of-the-upstream"


def test_in_a_transaction_the_row_shares_its_fate(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    with transaction.atomic():
        assert LLMRequest.objects.chat(ASK).completion == "Forty-two."
        transaction.set_rollback(True)
    assert not LLMRequest.objects.exists()


def test_texts_are_forgotten_as_the_setting_says(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    with ours(STORE_MESSAGES="none"):
        LLMRequest.objects.chat(ASK, temperature=0)
    assert (only_row().messages, only_row().parameters) == ([], {})


def test_chat_that_nobody_waits_for_is_lost_by_its_deadline(wire: Wire) -> None:
    row = LLMRequest(via=Via.CHAT, messages=ASK)
    row.prepare()
    row.begin(now=timezone.now(), seconds=600)  # and its process was killed
    reconciler = Reconciler()
    assert reconciler.reconcile() == 0
    LLMRequest.objects.update(deadline_at=timezone.now())
    assert (reconciler.reconcile(), reconciler.lost) == (1, 1)
    assert (only_row().state, only_row().error_code) == ("failed", "lost")
    assert wire.requests == []


def test_asked_again_it_is_asked_durably(wire: Wire, qstash: FakeQStash) -> None:
    answers(wire, httpx.Response(500))
    with pytest.raises(ChatFailed) as caught:
        LLMRequest.objects.stream(ASK, stream_options={"include_usage": True}, top_p=1)
    again = caught.value.llm_request.resubmit()
    assert (again.via, again.retries, again.parameters) == ("publish", 3, {"top_p": 1})


# --- streams ---------------------------------------------------------------------------------


def test_stream_is_handed_on_and_recorded(wire: Wire) -> None:
    streams(wire, STREAM, **{"x-request-id": "r1"})
    with ours(PRICES=PRICES), LLMRequest.objects.stream(ASK, temperature=0) as stream:
        assert (stream.status, stream.headers["x-request-id"]) == (200, "r1")
        assert stream.llm_request.state == "submitted"
        chunks = list(stream)
    assert [(chunk.text, chunk.is_extra) for chunk in chunks] == [
        ("Forty", False),
        ("-two.", False),
        ("", False),
        ("", True),
    ]
    assert json.loads(chunks[0].data) == delta("Forty")
    row = only_row()
    assert (row.state, row.completion, row.finish_reason) == ("completed", "Forty-two.", "stop")
    assert (row.usage, row.cost_source, row.answered_by) == (USAGE, "setting", "gpt-5.4-mini-1")
    assert row.parameters == {"temperature": 0}
    asked = json.loads(wire.requests[0].content)
    assert (asked["stream"], asked["stream_options"]) == (True, {"include_usage": True})


def test_usage_that_the_caller_asked_for_is_not_extra(wire: Wire) -> None:
    streams(wire, STREAM)
    options = {"include_usage": True, "include_obfuscation": False}
    chunks = list(LLMRequest.objects.stream(ASK, stream_options=options))
    assert not any(chunk.is_extra for chunk in chunks)
    assert json.loads(wire.requests[0].content)["stream_options"] == options


def test_tool_calls_are_put_together(wire: Wire) -> None:
    def call(**told: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": [told]}}]}

    events = [
        call(index=0, id="t1", type="function", function={"name": "f", "arguments": ""}),
        call(index=0, function={"arguments": '{"a"'}),
        call(index=1, id="t2", type="function", function={"name": "g", "arguments": "{}"}),
        call(index=0, function={"arguments": ": 1}"}),
        delta(reason="tool_calls"),
    ]
    streams(wire, sse(*events))
    list(LLMRequest.objects.stream(ASK))
    assert only_row().tool_calls == [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "t2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_several_answers_have_to_end_all(wire: Wire) -> None:
    both = [delta("A"), delta("B", index=1), delta(reason="stop")]
    streams(wire, sse(*both, delta(reason="stop", index=1)))
    assert [c.text for c in LLMRequest.objects.stream(ASK, n=2)] == ["A", "", "", ""]
    assert (only_row().state, only_row().completion) == ("completed", "A")
    streams(wire, sse(*both))
    with pytest.raises(ChatFailed, match="finish_reason"):
        list(LLMRequest.objects.stream(ASK, n=2))


def test_answer_that_never_began_is_missed(wire: Wire) -> None:
    one = [delta("A"), delta(reason="stop")]
    streams(wire, sse(*one, done=False))
    with pytest.raises(ChatFailed, match="finish_reason"):
        list(LLMRequest.objects.stream(ASK, n=2))
    stream = LLMRequest.objects.stream(ASK, n=2)
    assert [next(stream).text for _ in range(2)] == ["A", ""]
    stream.close()
    assert LLMRequest.objects.latest("id").error_code == "aborted"
    # A provider that knows of one answer only says when it is done.
    streams(wire, sse(*one))
    assert len(list(LLMRequest.objects.stream(ASK, n=2))) == 2
    assert LLMRequest.objects.latest("id").state == "completed"


def test_image_is_not_estimated_by_its_bytes(wire: Wire) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 400_000}"}}
    streams(wire, sse(delta("A cat.", "stop")))
    list(LLMRequest.objects.stream([{"role": "user", "content": [image]}]))
    assert 1000 < (only_row().input_tokens or 0) < 1100


def test_missing_usage_is_estimated_and_says_so(wire: Wire) -> None:
    streams(wire, sse(delta("12345678"), delta("9", "stop")))
    with ours(PRICES=PRICES):
        list(LLMRequest.objects.stream(ASK))
    row = only_row()
    assert (row.state, row.output_tokens, row.usage["estimated"]) == ("completed", 3, True)
    assert row.input_tokens == -(-len(json.dumps(ASK, separators=(",", ":"))) // 4)
    assert row.cost_source == "estimated"


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (sse(delta("Forty"), done=False), "cut", "Forty"),
        (sse(delta("Forty")), "cut", "Forty"),
        (b"", "cut", ""),
        (b"<html>busy</html>", "cut", ""),
        (sse(delta("Forty"), done=False)[:-20] + b"\n\n", "malformed", ""),
        (sse(delta("Forty"), "{oops"), "malformed", "Forty"),
        (sse(delta("Forty"), "7"), "malformed", "Forty"),
        (sse(delta("Forty"), {"error": {"code": "overloaded", "message": KEY}}), "overloaded", "Forty"),
        (sse(delta("Forty"), delta(reason="error")), "error", "Forty"),
        (sse(delta("Forty"), delta(reason="error", error={"code": 502})), "502", "Forty"),
        (sse(delta("Forty"), done=False) + b'event: error\ndata: {"message": "m"}\n\n', "error", "Forty"),
    ],
)  # fmt: skip
def test_broken_stream_raises_and_keeps_what_came(
    wire: Wire, body: bytes, code: str, text: str
) -> None:
    streams(wire, body)
    with pytest.raises(ChatFailed) as caught:
        list(LLMRequest.objects.stream(ASK))
    row = only_row()
    assert (caught.value.code, caught.value.status, caught.value.llm_request) == (code, 200, row)
    assert (row.state, row.error_code, row.completion) == ("failed", code, text)
    assert row.usage["estimated"] is True
    assert KEY not in row.error + str(caught.value) + caught.value.body.decode()


def test_whole_answer_in_place_of_a_stream_is_a_failure_that_was_paid_for(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    with pytest.raises(ChatFailed) as caught:
        LLMRequest.objects.stream(ASK)
    row = only_row()
    assert (caught.value.code, row.completion, row.input_tokens) == (
        "not_a_stream",
        "Forty-two.",
        9,
    )


@pytest.mark.parametrize("way", ["close", "del", "with", "after one", "before any"])
def test_who_leaves_is_written_down(wire: Wire, way: str) -> None:
    streams(wire, sse(delta("Forty")), sse(delta("-two.")))
    stream = LLMRequest.objects.stream(ASK)
    if way != "before any":
        assert next(stream).text == "Forty"
    if way == "with":
        with stream:
            pass
    elif way == "del":
        del stream
    else:
        stream.close()
        stream.close()
        assert list(stream) == []
    row = only_row()
    said = "" if way == "before any" else "Forty"
    assert (row.state, row.error_code, row.completion) == ("cancelled", "aborted", said)
    assert row.usage["estimated"] is True


def test_who_leaves_after_the_end_has_missed_nothing(wire: Wire) -> None:
    streams(wire, sse(delta("Forty"), delta(reason="stop"), done=False), sse(COUNTED))
    stream = LLMRequest.objects.stream(ASK)
    assert [next(stream).text for _ in range(2)] == ["Forty", ""]
    stream.close()
    assert (only_row().state, only_row().completion) == ("completed", "Forty")


def test_key_that_comes_back_is_not_passed_on(wire: Wire) -> None:
    streams(wire, sse(delta(f"your key is {KEY}"), delta(reason="stop")))
    chunks = list(LLMRequest.objects.stream(ASK))
    assert chunks[0].text == "your key is [redacted]"
    assert KEY.encode() not in b"".join(chunk.data for chunk in chunks)
    assert KEY not in only_row().completion


# --- real connections ------------------------------------------------------------------------


class Upstream(ThreadingHTTPServer):
    """A provider on loopback. ``plan`` writes the answer; ``left`` is when its caller hung up."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, plan: Callable[[Upstream, BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = plan
        self.ports: list[int] = []
        self.left = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def asked_with(self, **more: Any) -> Any:
        """The settings by which this is the provider that is asked."""
        entry = {"API_KEY": KEY, "BASE_URL": f"http://127.0.0.1:{self.server_port}/v1"}
        return ours(PROVIDERS={"openai": entry}, CHAT_TRANSPORT=None, **more)

    def handle_error(self, *args: Any) -> None:
        """The caller hung up: what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.ports.append(self.client_address[1])
        self.server.plan(self.server, self)

    def log_message(self, *args: Any) -> None:
        pass


def head(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def send(handler: BaseHTTPRequestHandler, piece: bytes) -> None:
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.flush()


def whole(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
    head(handler)
    send(handler, STREAM)
    handler.wfile.write(b"0\r\n\r\n")


def hangs(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
    """Says a word, and then nothing until its caller has hung up."""
    head(handler)
    send(handler, sse(delta("Forty"), done=False))
    connection = handler.connection
    if select.select([connection], [], [], 20)[0] and not connection.recv(1):
        server.left.set()
    handler.close_connection = True


def breaks(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
    head(handler)
    send(handler, sse(delta("Forty"), done=False))
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


@pytest.fixture
def upstream(transactional_db: None) -> Iterator[Callable[..., Upstream]]:
    servers: list[Upstream] = []

    def start(plan: Any) -> Upstream:
        servers.append(Upstream(plan))
        return servers[-1]

    yield start
    chat.close()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_connection_is_kept_from_stream_to_stream(upstream: Any) -> None:
    server = upstream(whole)
    with server.asked_with():
        for _ in range(3):
            assert "".join(c.text for c in LLMRequest.objects.stream(ASK)) == "Forty-two."
    assert len(set(server.ports)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_forked_child_opens_connections_of_its_own(upstream: Any) -> None:
    key = os.getpid(), "openai"
    server = upstream(whole)
    with server.asked_with():
        list(LLMRequest.objects.stream(ASK))
        assert key in chat._pools
        read, write = os.pipe()
        child = os.fork()
        if not child:
            is_other = chat._transport(get_provider("openai")) is not chat._pools[key]
            os.write(write, b"other" if is_other else b"same")
            os._exit(0)
        os.waitpid(child, 0)
    assert os.read(read, 5) == b"other"
    os.close(read)
    os.close(write)


def test_each_chunk_is_handed_on_when_it_comes(upstream: Any) -> None:
    heard = threading.Event()

    def one_by_one(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
        head(handler)
        # Not even its blank line is there.
        send(handler, sse(delta("Forty"), done=False).rstrip(b"\n") + b"\n")
        assert heard.wait(10)
        send(handler, b"\n" + sse(delta("-two.", "stop")))
        handler.wfile.write(b"0\r\n\r\n")

    with upstream(one_by_one).asked_with():
        texts = []
        for chunk in LLMRequest.objects.stream(ASK):
            texts.append(chunk.text)
            heard.set()
    assert texts == ["Forty", "-two."]


def test_reader_who_leaves_has_the_provider_stop(upstream: Any) -> None:
    server = upstream(hangs)
    with server.asked_with():
        stream = LLMRequest.objects.stream(ASK)
        next(stream)
        stream.close()
        assert server.left.wait(2)
    assert (only_row().state, only_row().completion) == ("cancelled", "Forty")


def test_last_word_does_not_wait_for_the_connection_to_end(upstream: Any) -> None:
    is_over = threading.Event()

    def lingers(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
        head(handler)
        send(handler, STREAM)
        is_over.wait(20)
        handler.wfile.write(b"0\r\n\r\n")

    server = upstream(lingers)
    with server.asked_with():
        begun_at = time.monotonic()
        assert len(list(LLMRequest.objects.stream(ASK))) == 4
        assert time.monotonic() - begun_at < 2
        assert only_row().state == "completed"
        is_over.set()


def trickles(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
    """A word every 50 ms, until its caller has hung up."""
    head(handler)
    try:
        while True:
            send(handler, sse(delta("Forty"), done=False))
            time.sleep(0.05)
    except OSError:
        server.left.set()
    handler.close_connection = True


def test_stream_of_a_cancelled_request_is_left(upstream: Any) -> None:
    server = upstream(trickles)
    with server.asked_with():
        stream = LLMRequest.objects.stream(ASK)
        next(stream)
        LLMRequest.objects.get().cancel()
        with pytest.raises(ChatFailed) as caught:
            list(stream)
        assert server.left.wait(2)
    row = only_row()
    assert (caught.value.code, row.state, row.completion) == ("cancelled", "cancelled", "")
    assert row.usage["estimated"] is True
    assert row.output_tokens


def test_async_stream_of_a_cancelled_request_is_left(upstream: Any) -> None:
    server = upstream(trickles)

    async def ask() -> None:
        async with await LLMRequest.objects.astream(ASK) as stream:
            await anext(stream)
            await sync_to_async(stream.llm_request.cancel)()
            async for _ in stream:
                pass

    async def ask_and_close() -> None:
        try:
            await ask()
        finally:
            await chat.aclose()

    with server.asked_with(), pytest.raises(ChatFailed) as caught:
        async_to_sync(ask_and_close)()
    assert server.left.wait(2)
    assert (caught.value.code, only_row().state) == ("cancelled", "cancelled")


def test_stream_that_says_nothing_more_is_stalled(upstream: Any) -> None:
    server = upstream(hangs)
    with server.asked_with(CHAT_READ_TIMEOUT=0.2), pytest.raises(ChatFailed) as caught:
        list(LLMRequest.objects.stream(ASK))
    assert server.left.wait(2)
    assert (caught.value.code, caught.value.trouble) == ("stalled", "")
    assert (only_row().state, only_row().completion) == ("failed", "Forty")


def test_connection_that_breaks_cuts_the_stream(upstream: Any) -> None:
    with upstream(breaks).asked_with(), pytest.raises(ChatFailed) as caught:
        list(LLMRequest.objects.stream(ASK))
    assert caught.value.code == "cut"
    assert (only_row().state, only_row().completion) == ("failed", "Forty")


@pytest.mark.parametrize("way", ["chat", "stream"])
def test_all_of_the_answer_has_a_deadline(upstream: Any, way: str) -> None:
    def trickles(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
        head(handler)
        for _ in range(200):
            send(handler, b": keep-alive\n\n")
            time.sleep(0.02)

    with (
        upstream(trickles).asked_with(CHAT_TIMEOUT=0.2),
        pytest.raises(ChatFailed) as caught,
    ):
        list(getattr(LLMRequest.objects, way)(ASK))
    assert caught.value.code == "timeout"
    assert "0.2 s" in only_row().error


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no connections to lose")
@pytest.mark.django_db(transaction=True)
def test_database_that_hung_up_meanwhile_is_asked_anew(wire: Wire) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        # As an idle timeout does, while the model thinks.
        connection.connection.close()
        return httpx.Response(200, json=ANSWER)

    answers(wire, answer)
    LLMRequest.objects.chat(ASK)
    assert only_row().completion == "Forty-two."


# --- async -----------------------------------------------------------------------------------


def test_async_answer_is_recorded_the_same(wire: Wire) -> None:
    answers(wire, httpx.Response(200, json=ANSWER))
    article = Article.objects.create(title="A", summary="there")
    row = async_to_sync(LLMRequest.objects.all().achat)(ASK, about=article)
    assert (row.state, row.completion) == ("completed", "Forty-two.")
    assert only_row().about == article
    answers(wire, httpx.Response(503))
    with pytest.raises(ChatFailed, match="503"):
        async_to_sync(LLMRequest.objects.all().achat)(ASK)


@pytest.mark.django_db(transaction=True)
def test_database_is_let_go_while_async_code_waits() -> None:
    held: list[bool] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        held.append(await sync_to_async(lambda: connection.connection is not None)())
        return httpx.Response(200, json=ANSWER)

    with ours(CHAT_TRANSPORT=httpx.MockTransport(answer)):
        async_to_sync(LLMRequest.objects.all().achat)(ASK)
    assert held == [False]
    assert only_row().state == "completed"


def test_async_stream_is_recorded_the_same(upstream: Any) -> None:
    server = upstream(whole)

    async def ask() -> list[str]:
        texts = []
        for _ in range(2):
            async with await LLMRequest.objects.astream(ASK) as stream:
                texts.append("".join([chunk.text async for chunk in stream]))
        await chat.aclose()
        return texts

    with server.asked_with():
        assert async_to_sync(ask)() == ["Forty-two.", "Forty-two."]
    assert [row.state for row in LLMRequest.objects.all()] == ["completed"] * 2
    assert len(set(server.ports)) == 1


@pytest.mark.parametrize(
    ("plan", "seconds", "code"), [(hangs, 0.2, "stalled"), (breaks, 5.0, "cut")]
)
def test_async_stream_that_breaks_is_recorded(
    upstream: Any, plan: Any, seconds: float, code: str
) -> None:
    async def ask() -> None:
        try:
            async for _ in await LLMRequest.objects.astream(ASK):
                pass
        finally:
            await chat.aclose()

    with upstream(plan).asked_with(CHAT_READ_TIMEOUT=seconds), pytest.raises(ChatFailed) as caught:
        async_to_sync(ask)()
    assert caught.value.code == code
    assert (only_row().state, only_row().completion) == ("failed", "Forty")


@pytest.mark.parametrize("way", ["cancelled", "closed", "dropped"])
def test_async_reader_who_leaves_has_the_provider_stop(upstream: Any, way: str) -> None:
    server = upstream(hangs)

    async def ask() -> None:
        stream = await LLMRequest.objects.astream(ASK)
        assert (await anext(stream)).text == "Forty"
        if way == "cancelled":
            reading = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        elif way == "closed":
            await stream.aclose()
        else:
            del stream
            gc.collect()
        for _ in range(100):
            if server.left.is_set() and await LLMRequest.objects.cancelled().aexists():
                break
            await asyncio.sleep(0.02)
        await chat.aclose()

    with server.asked_with():
        async_to_sync(ask)()
    assert server.left.is_set()
    row = only_row()
    assert (row.state, row.error_code, row.completion) == ("cancelled", "aborted", "Forty")


def test_async_caller_who_leaves_before_the_head_is_written_down(upstream: Any) -> None:
    asked = threading.Event()

    def silent(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        if select.select([handler.connection], [], [], 20)[0]:
            server.left.set()
        handler.close_connection = True

    server = upstream(silent)

    async def ask() -> None:
        task = asyncio.create_task(LLMRequest.objects.achat(ASK))
        await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await chat.aclose()

    with server.asked_with():
        async_to_sync(ask)()
        assert server.left.wait(2)
    assert (only_row().state, only_row().error_code) == ("cancelled", "aborted")


@pytest.mark.parametrize(
    "run",
    [lambda ask: asyncio.run(ask()), lambda ask: async_to_sync(ask)()],
    ids=["asyncio", "asgiref"],
)
def test_loop_that_ends_leaves_no_connection_behind(upstream: Any, run: Any) -> None:
    def waits(server: Upstream, handler: BaseHTTPRequestHandler) -> None:
        whole(server, handler)
        if select.select([handler.connection], [], [], 20)[0]:
            server.left.set()
        handler.close_connection = True

    async def ask() -> None:
        async for _ in await LLMRequest.objects.astream(ASK):
            pass
        assert not server.left.is_set()
        await sync_to_async(close)()

    def close() -> None:
        """The thread that asyncio's loop asks lives on, and would keep its connection."""
        if not connection.in_atomic_block:
            connection.close()

    server = upstream(waits)
    with server.asked_with():
        run(ask)
    assert server.left.wait(2)
    assert not chat._async_pools


def test_async_caller_needs_a_transport_that_can_be_awaited() -> None:
    with (
        ours(CHAT_TRANSPORT=httpx.WSGITransport(lambda *args: [])),
        pytest.raises(ConfigurationError, match=r"CHAT_TRANSPORT.*AsyncBaseTransport"),
    ):
        async_to_sync(LLMRequest.objects.all().achat)(ASK)
    assert not LLMRequest.objects.exists()


def test_key_is_in_no_row_and_no_log(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers(wire, httpx.Response(500, content=f"no {KEY}".encode(), headers={"x": KEY}))
    with pytest.raises(ChatFailed) as caught:
        LLMRequest.objects.chat(ASK)
    stored = str(LLMRequest.objects.values().get())
    told = str(vars(caught.value) | {"llm_request": ""})
    assert KEY not in stored + caplog.text + told + repr(caught.value)


@pytest.mark.django_db(transaction=True)
def test_prices_that_cannot_be_read_lose_no_answer(wire: Wire) -> None:
    """Nobody knows what it cost, until somebody can look it up."""
    table = Price._meta.db_table

    def answer(request: httpx.Request) -> httpx.Response:
        forget_prices()
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} RENAME TO away")
        return httpx.Response(200, json=ANSWER)

    wire.hosts["provider.test"] = answer
    try:
        row = LLMRequest.objects.chat([{"role": "user", "content": "x"}])
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE away RENAME TO {table}")
    assert (row.state, row.cost) == ("completed", None)
    assert LLMRequest.objects.total().unpriced == 1
    assert len(list(LLMRequest.objects.unpriced())) == 1
