"""llmock as provider: each of its faults ends in a row that says what happened, and it finds no fault
in how it was taken. It judges a caller who asks again, so here one does, as often as our rows and
refusals say that it may help."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from asgiref.sync import async_to_sync

from django_qstash_llm import chat
from django_qstash_llm.exceptions import ChatFailed
from django_qstash_llm.models import ApiKey, LLMRequest

from ..openai.conftest import asgi, eventually, wsgi

pytest.importorskip("llmock", reason="llmock is not installed")

ASK: list[Any] = [{"role": "user", "content": "Say a few words about Jupiter, please."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
        },
    },
}
SILENCE = 0.5
"""Seconds after which a stream is stalled here."""

pytestmark = pytest.mark.django_db(transaction=True)


@dataclass(frozen=True)
class Fault:
    """What llmock is to do, and what our row has to say of it."""

    name: str
    ask: Callable[[Any], Any]
    code: str
    status: int = 200
    says: bool = False
    """Whether a part of the answer comes before it."""
    again: bool = True
    """Whether asking again may help."""

    def __str__(self) -> str:
        return self.name


FAULTS = [
    Fault("disconnect", lambda llmock: llmock.disconnect(after_chunks=3), "cut", says=True),
    Fault("disconnect-at-once", lambda llmock: llmock.disconnect(after_chunks=0), "cut"),
    Fault("truncate", lambda llmock: llmock.truncate(after_chunks=3), "cut", says=True),
    Fault("truncate-at-once", lambda llmock: llmock.truncate(after_chunks=0), "cut"),
    # Paced, so that it is seen to be left: a stream that was sent to its end before is taken as read.
    Fault("malformed", lambda llmock: llmock.pace(30).corrupt(after_chunks=3), "malformed", says=True),
    Fault("stall", lambda llmock: llmock.stall(after_chunks=3, seconds=20), "stalled", says=True),
    Fault("slow-first-token", lambda llmock: llmock.slow_first_token(20), "stalled"),
    Fault("slow-answer", lambda llmock: llmock.delay(20), "timeout", status=-1),
    Fault("tool-call-cut", lambda llmock: llmock.call_tool("search").disconnect(after_chunks=2), "cut"),
    Fault("rate", lambda llmock: llmock.rate_limit(retry_after=0.3), "rate_limit_exceeded", 429),
    Fault("overflow", lambda llmock: llmock.context_overflow(), "context_length_exceeded", 400, again=False),
    *(
        Fault(f"http-{status}", lambda llmock, status=status: llmock.fail(status), "", status, again=again)
        for status, again in [(400, False), (401, False), (403, False), (404, False), (422, False),
                              (408, True), (409, True), (500, True), (502, True), (503, True), (504, True)]
    ),
]  # fmt: skip


@pytest.fixture
def provider(llmock: Any, settings: Any, transactional_db: None) -> Iterator[Any]:
    settings.QSTASH_LLM = {
        **settings.QSTASH_LLM,
        "CHAT_TRANSPORT": None,
        "CHAT_READ_TIMEOUT": SILENCE,
        "PROVIDERS": {"openai": {"API_KEY": "sk-of-the-site-0001", "BASE_URL": llmock.base_url()}},
    }
    yield llmock
    chat.close()


def stream() -> None:
    for _ in LLMRequest.objects.stream(ASK, tools=[TOOL], tool_choice="none"):
        pass


def astream() -> None:
    async def listen() -> None:
        try:
            kwargs: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none"}
            async with await LLMRequest.objects.astream(ASK, **kwargs) as stream:
                async for _ in stream:
                    pass
        finally:
            await chat.aclose()

    async_to_sync(listen)()


WAYS = [pytest.param(stream, id="stream"), pytest.param(astream, id="astream")]


def waits(error: ChatFailed) -> float | None:
    """Seconds after which asking again may help; None if it will not."""
    if error.trouble in ("", "fault", "overload", "rate"):
        return (error.wait or 0.0) + 0.05
    return None


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("ask", WAYS)
def test_fault_ends_in_a_row_that_says_so(
    provider: Any, settings: Any, fault: Fault, ask: Callable[[], None]
) -> None:
    if fault.name == "slow-answer":
        settings.QSTASH_LLM = {**settings.QSTASH_LLM, "CHAT_TIMEOUT": SILENCE}
    fault.ask(provider)
    with pytest.raises(ChatFailed) as caught:
        ask()
    wait = waits(caught.value)
    assert (wait is not None) is fault.again, caught.value.trouble
    if wait is not None:
        time.sleep(wait)
        settings.QSTASH_LLM = {**settings.QSTASH_LLM, "CHAT_TIMEOUT": 30.0}
        ask()
    check(fault, provider)


def check(fault: Fault, provider: Any) -> None:
    """What our rows say, and what llmock says of us."""
    broken, *again = LLMRequest.objects.order_by("id")
    assert (broken.state, broken.last_status) == ("failed", fault.status)
    assert broken.error_code == fault.code or not fault.code
    assert broken.error
    assert broken.finished_at
    assert bool(broken.completion) is fault.says
    if fault.status == 200:
        assert broken.usage["estimated"] is True
        assert bool(broken.output_tokens) is (fault.says or fault.name == "tool-call-cut")
    else:
        assert broken.output_tokens is None
    assert [row.state for row in again] == ["completed"] * fault.again
    for row in again:
        assert row.completion
        assert "estimated" not in row.usage
    # One row is one call, and nothing was asked behind anybody's back. (Of a caller who leaves before
    # it has begun llmock notes nothing.)
    assert len(provider.requests) == len(again) + (fault.name != "slow-answer")
    verdict = provider.verdict()
    assert verdict.errors == (), verdict.render()
    assert verdict.warnings == (), verdict.render()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("site", [wsgi, asgi], ids=["wsgi", "asgi"])
def test_fault_is_told_through_our_endpoint(
    provider: Any, settings: Any, fault: Fault, site: Callable[[], Any]
) -> None:
    """By the official client, which asks again by itself what it may, and nothing that broke off."""
    if fault.name == "slow-answer":
        settings.QSTASH_LLM = {**settings.QSTASH_LLM, "CHAT_TIMEOUT": SILENCE}
    fault.ask(provider)
    with site() as url:
        key = ApiKey.objects.issue("tests")[1]
        with openai.OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=0) as ai:
            with pytest.raises(openai.APIError) as caught:
                hear(ai)
            eventually(lambda: not LLMRequest.objects.unfinished().exists())
            if fault.again:
                told = (
                    caught.value.response.headers
                    if isinstance(caught.value, openai.APIStatusError)
                    else {}
                )
                time.sleep(float(told.get("Retry-After", 0)) + 0.05)
                settings.QSTASH_LLM = {**settings.QSTASH_LLM, "CHAT_TIMEOUT": 30.0}
                hear(ai)
                eventually(lambda: not LLMRequest.objects.unfinished().exists())
    row = LLMRequest.objects.earliest("id")
    if fault.status == 200:
        assert caught.value.code == row.error_code
    check(fault, provider)


def hear(ai: openai.OpenAI) -> None:
    tools: list[Any] = [TOOL]
    asked = ai.chat.completions.create(
        model="gpt-5.4-mini", messages=ASK, tools=tools, tool_choice="none", stream=True
    )
    for _ in asked:
        pass


@pytest.mark.parametrize("kind", ["malformed_arguments", "unknown_tool"])
@pytest.mark.parametrize("ask", WAYS)
def test_broken_tool_call_is_kept_as_it_came(
    provider: Any, kind: str, ask: Callable[[], None]
) -> None:
    """It is for the caller to judge: a whole answer that calls what is not there is an answer."""
    provider.call_tool("search", {"query": "moons"}).break_tool_call(kind)
    ask()
    row = LLMRequest.objects.get()
    assert (row.state, row.finish_reason) == ("completed", "tool_calls")
    [call] = row.tool_calls
    is_search = call["function"]["name"] == "search"
    assert is_search is (kind == "malformed_arguments")
    provider.assert_resilient(strict=True)


@pytest.mark.parametrize("ask", WAYS)
def test_stream_that_is_only_slow_is_whole(provider: Any, ask: Callable[[], None]) -> None:
    provider.pace(30).slow_first_token(0.3)
    ask()
    row = LLMRequest.objects.get()
    assert (row.state, row.finish_reason) == ("completed", "stop")
    provider.assert_resilient(strict=True)


def test_many_at_once_keep_their_own_faults(provider: Any) -> None:
    """llmock deals its faults out as the calls come in; each is one row's."""
    for _ in range(4):
        provider.disconnect(after_chunks=2).truncate(after_chunks=2).corrupt(after_chunks=2)

    async def ask(number: int) -> str:
        asked = [{"role": "user", "content": f"Say something about moon no. {number}."}]
        for _ in range(3):
            try:
                async with await LLMRequest.objects.astream(asked) as stream:
                    return "".join([chunk.text async for chunk in stream])
            except ChatFailed:
                continue
        return ""

    async def all_of_them() -> list[str]:
        try:
            return await asyncio.gather(*map(ask, range(24)))
        finally:
            await chat.aclose()

    assert all(async_to_sync(all_of_them)())
    codes = sorted(LLMRequest.objects.failed().values_list("error_code", flat=True))
    assert codes == ["cut"] * 8 + ["malformed"] * 4
    assert LLMRequest.objects.completed().count() == 24
    assert len(provider.requests) == 36
    verdict = provider.verdict()
    assert verdict.errors == (), verdict.render()
