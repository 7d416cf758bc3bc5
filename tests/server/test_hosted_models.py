"""``api/llm``: the models that Upstash hosted, answered from an upstream of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Message

from .conftest import CALLBACK, Api, Wire

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
UPSTREAM = "https://ollama.test/v1/chat/completions"
CHAT = {"model": LLAMA, "messages": [{"role": "user", "content": "Grüße"}], "temperature": 0.1}


@pytest.fixture
def hosted(configure: Callable[..., None]) -> Callable[..., None]:
    def host(**more: Any) -> None:
        configure(HOSTED_MODELS_URL="https://ollama.test/v1", **more)

    host()
    return host


@pytest.fixture
def upstream(wire: Wire) -> None:
    wire.answers(httpx.Response(200, json={"choices": []}), url=UPSTREAM)


def refused(api: Api, body: Any) -> str:
    answer = api.publish("api/llm", body, Upstash_Callback=CALLBACK)
    assert (answer.status_code, Message.objects.exists()) == (400, False)
    return str(answer.json()["error"])


@pytest.mark.usefixtures("hosted", "upstream")
@pytest.mark.parametrize("way", ["publish", "enqueue", "batch"])
def test_all_ways_in_lead_to_the_upstream_and_back(
    api: Api, engine: Engine, wire: Wire, way: str
) -> None:
    if way == "publish":
        api.published("api/llm", CHAT, Upstash_Callback=CALLBACK)
    elif way == "enqueue":
        api.enqueue("q", "api/llm", CHAT, Upstash_Callback=CALLBACK)
    else:
        headers = {"Upstash-Callback": CALLBACK}
        item = {"destination": "api/llm", "headers": headers, "body": json.dumps(CHAT)}
        assert "messageId" in api.post("/v2/batch", [item]).json()[0]
    assert engine.deliver_due() == 2
    [request] = wire.to(UPSTREAM)
    assert json.loads(request.content) == CHAT
    # Ollama has no key, and an empty one is no header.
    assert "Authorization" not in request.headers
    assert json.loads(wire.callbacks()[0].body) == {"choices": []}


@pytest.mark.usefixtures("upstream")
def test_a_model_goes_by_its_upstreams_name_and_the_callback_tells_its_own(
    api: Api, engine: Engine, wire: Wire, hosted: Callable[..., None]
) -> None:
    hosted(HOSTED_MODELS={LLAMA: "llama3:8b"})
    api.published("api/llm", CHAT, Upstash_Callback=CALLBACK)
    engine.deliver_due()
    [request] = wire.to(UPSTREAM)
    assert json.loads(request.content) == CHAT | {"model": "llama3:8b"}
    assert json.loads(wire.callbacks()[0].source_body) == CHAT


def test_a_model_that_is_not_hosted_is_refused_with_those_that_are(
    api: Api, hosted: Callable[..., None]
) -> None:
    hosted(HOSTED_MODELS={LLAMA: "llama3:8b", "other": "o"})
    assert (
        refused(api, CHAT | {"model": "gpt-5"})
        == f"model 'gpt-5' is not hosted: {LLAMA}, other are"
    )


@pytest.mark.usefixtures("hosted")
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is none"),
        (b"not json", "the body is none"),
        (b"[" * 100_000, "the body is none"),
        (b"\xff", "the body is none"),
        ([CHAT], "names no model"),
        ({"messages": []}, "names no model"),
        ({"model": 3}, "names no model"),
        (CHAT | {"stream": True}, "leave stream out"),
    ],
)
def test_what_no_upstream_could_answer_is_refused(api: Api, body: Any, says: str) -> None:
    assert says in refused(api, body)


@pytest.mark.usefixtures("hosted")
def test_one_bad_question_of_a_batch_leaves_the_others_alone(api: Api) -> None:
    headers = {"Upstash-Callback": CALLBACK}
    items = [
        {"destination": "api/llm", "headers": headers, "body": body}
        for body in (json.dumps(CHAT), "nonsense")
    ]
    good, bad = api.post("/v2/batch", items).json()
    assert list(good) == ["messageId"]
    assert "chat completion" in bad["error"]


@pytest.mark.usefixtures("hosted")
def test_an_upstream_that_is_away_is_tried_again_and_told_of(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.ConnectError("refused"), url=UPSTREAM)
    api.published("api/llm", CHAT, Upstash_Callback=CALLBACK, Upstash_Retries="0")
    engine.deliver_due()
    assert wire.callbacks()[0].status == -1
