from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from django_qstash_llm.exceptions import ChatFailed
from django_qstash_llm.models import LLMRequest
from tests.conftest import ANSWER
from tests.wire import Wire

pytestmark = pytest.mark.django_db(transaction=True)
ASK = [{"role": "user", "content": "How many roads?"}]


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in events]
    return b"".join(
        f"data: {line}\n\n".encode() for line in [*lines, *(["[DONE]"] if done else [])]
    )


def delta(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "model": "m-1",
        "choices": [choice],
        **more,
    }


def test_sync(wire: Wire) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(200, json=ANSWER)
    row = LLMRequest.objects.chat(ASK)
    assert (row.state, row.completion, row.via, row.input_tokens) == (
        "completed",
        "Forty-two.",
        "chat",
        9,
    )
    row.refresh_from_db()
    assert (row.state, row.completion, row.via, row.last_status) == (
        "completed",
        "Forty-two.",
        "chat",
        200,
    )


def test_stream(wire: Wire) -> None:
    body = sse(
        delta("Forty"),
        delta("-two."),
        delta(reason="stop"),
        {"choices": [], "usage": ANSWER["usage"]},
    )
    wire.hosts["provider.test"] = lambda request: httpx.Response(200, content=body)
    stream = LLMRequest.objects.stream(ASK)
    assert [(c.text, c.is_extra) for c in stream] == [
        ("Forty", False),
        ("-two.", False),
        ("", False),
        ("", True),
    ]
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.input_tokens, row.finish_reason) == (
        "completed",
        "Forty-two.",
        9,
        "stop",
    )


def test_cut(wire: Wire) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(200, content=sse(delta("Forty")))
    with pytest.raises(ChatFailed) as caught:
        list(LLMRequest.objects.stream(ASK))
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.error_code, row.usage["estimated"]) == (
        "failed",
        "Forty",
        "cut",
        True,
    )


def test_left(wire: Wire) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(
        200, content=sse(delta("Forty"), delta("x"))
    )
    stream = LLMRequest.objects.stream(ASK)
    next(stream)
    del stream
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.error_code, row.usage["estimated"]) == (
        "cancelled",
        "Forty",
        "aborted",
        True,
    )


async def go() -> Any:
    row = await LLMRequest.objects.achat(ASK)
    return row


def test_async(wire: Wire) -> None:
    import asyncio

    wire.hosts["provider.test"] = lambda request: httpx.Response(200, json=ANSWER)
    row = asyncio.run(go())
    assert row.state == "completed"
