"""The official OpenAI client, with nothing but its ``base_url`` and ``api_key`` changed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from django_qstash_llm.models import ApiKey, Budget, KeptAnswer, LLMRequest
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER
from tests.test_readme import example
from tests.wire import FakeQStash, Wire

from .conftest import ASK, EVENTS, PROVIDER, USAGE, Streamed, delta, eventually

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def ai(site: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site}/openai/v1", api_key=key) as client:
        yield client


def answers(wire: Wire, body: dict[str, Any] = ANSWER, status: int = 200, **headers: str) -> None:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    wire.hosts[PROVIDER] = lambda request: httpx.Response(status, json=body, headers=told)


def sent(wire: Wire) -> Any:
    [request] = wire.to(PROVIDER)
    return json.loads(request.content)


# --- whole ---------------------------------------------------------------------------------------


def test_a_completion_is_answered_and_recorded(ai: openai.OpenAI, wire: Wire, key: str) -> None:
    answers(wire, x_ratelimit_remaining_requests="41", set_cookie="a=b")
    raw = ai.chat.completions.with_raw_response.create(model="gpt-5.4-mini", messages=ASK)
    completion = raw.parse()
    row = LLMRequest.objects.get()
    assert completion.choices[0].message.content == "Forty-two."
    assert completion.usage
    assert completion.usage.total_tokens == 12
    assert raw.request_id == str(row.uuid)
    assert raw.headers["x-ratelimit-remaining-requests"] == "41"
    assert "set-cookie" not in raw.headers
    assert (row.state, row.via, row.completion) == ("completed", "chat", "Forty-two.")
    assert row.api_key == ApiKey.objects.get()
    assert key not in str(LLMRequest.objects.values()) + str(ApiKey.objects.values())


def test_the_example_of_the_readme_runs_as_it_stands(wsgi_site: str, key: str, wire: Wire) -> None:
    answers(wire)
    code = example("from openai import OpenAI")
    namespace: dict[str, Any] = {}
    exec(code.replace("https://example.com", wsgi_site).replace("qllm_…", key), namespace)  # noqa: S102
    assert namespace["completion"].choices[0].message.content == "Forty-two."
    namespace["client"].close()


def test_parameters_pass_through_under_their_own_names(ai: openai.OpenAI, wire: Wire) -> None:
    answers(wire)
    parameters: dict[str, Any] = {
        "n": 2,
        "user": "u-1",
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "json_object"},
        "max_completion_tokens": 5,
    }
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    asked = [{"role": "user", "content": parts}]
    ai.chat.completions.create(
        model="openai/gpt-5.4-mini",
        messages=asked,
        extra_body={"brand_new": {"x": 1}, "timeout": 7},
        **parameters,
    )
    everything = {"messages": asked, "brand_new": {"x": 1}, "timeout": 7, **parameters}
    assert sent(wire) == {"model": "gpt-5.4-mini", **everything}


def test_a_pydantic_model_is_parsed(ai: openai.OpenAI, wire: Wire) -> None:
    class Moon(BaseModel):
        name: str

    message = {"role": "assistant", "content": '{"name": "Io"}'}
    answers(wire, {**ANSWER, "choices": [{**ANSWER["choices"][0], "message": message}]})
    completion = ai.chat.completions.parse(model="gpt-5.4-mini", messages=ASK, response_format=Moon)
    assert completion.choices[0].message.parsed == Moon(name="Io")
    assert sent(wire)["response_format"]["json_schema"]["name"] == "Moon"


def test_the_async_client(site: str, key: str, wire: Wire) -> None:
    answers(wire)

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{site}/openai/v1", api_key=key) as client:
            create = client.chat.completions.create
            whole = await create(model="gpt-5.4-mini", messages=ASK)
            wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
            stream = await create(model="gpt-5.4-mini", messages=ASK, stream=True)
            said = [chunk.choices[0].delta.content async for chunk in stream]
            return [whole.choices[0].message.content, *said]

    assert asyncio.run(ask()) == ["Forty-two.", "Forty", "-two.", None]


# --- streamed ------------------------------------------------------------------------------------


def test_a_stream_comes_without_the_usage_that_nobody_asked_for(
    ai: openai.OpenAI, wire: Wire
) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    stream = ai.chat.completions.create(model="gpt-5.4-mini", messages=ASK, stream=True)
    headers = stream.response.headers
    assert [chunk.choices[0].delta.content for chunk in stream] == ["Forty", "-two.", None]
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"
    eventually(lambda: LLMRequest.objects.get().state == "completed")
    row = LLMRequest.objects.get()
    assert (row.completion, row.input_tokens) == ("Forty-two.", 9)
    assert headers["x-request-id"] == str(row.uuid)


def test_usage_is_in_a_stream_when_it_is_asked_for(ai: openai.OpenAI, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    *_, last = ai.chat.completions.create(
        model="gpt-5.4-mini", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage
    assert last.usage.total_tokens == USAGE["total_tokens"]


def test_the_streaming_helper(ai: openai.OpenAI, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    with ai.chat.completions.stream(model="gpt-5.4-mini", messages=ASK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[-1] == "content.done"
    assert final.choices[0].message.content == "Forty-two."


def test_every_chunk_is_handed_on_at_once(ai: openai.OpenAI, wire: Wire) -> None:
    step = threading.Semaphore(0)
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS, step=step).response()
    stream = ai.chat.completions.create(model="gpt-5.4-mini", messages=ASK, stream=True)
    for text in ("Forty", "-two."):
        # The provider says nothing more before this one is here.
        assert next(stream).choices[0].delta.content == text
        step.release()
    step.release(9)
    assert [chunk.choices[0].finish_reason for chunk in stream] == ["stop"]


def test_a_stream_that_breaks_says_so(ai: openai.OpenAI, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(EVENTS[0], end="").response()
    stream = ai.chat.completions.create(model="gpt-5.4-mini", messages=ASK, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cut"
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code, row.completion) == ("failed", "cut", "Forty")


def test_when_the_client_leaves_the_provider_is_left_too(
    asgi_site: str, key: str, wire: Wire
) -> None:
    streamed = Streamed(*EVENTS, step=threading.Semaphore(0))
    wire.hosts[PROVIDER] = lambda request: streamed.response()
    client = openai.OpenAI(base_url=f"{asgi_site}/openai/v1", api_key=key)
    stream = client.chat.completions.create(model="gpt-5.4-mini", messages=ASK, stream=True)
    next(stream)
    left_at = time.monotonic()
    stream.close()
    client.close()
    eventually(lambda: streamed.is_closed)
    assert time.monotonic() - left_at < 2
    eventually(lambda: LLMRequest.objects.get().state == "cancelled")
    row = LLMRequest.objects.get()
    assert (row.error_code, row.completion) == ("aborted", "Forty")


def test_nobody_is_kept_at_work_for_a_client_who_did_not_wait(
    asgi_site: str, key: str, wire: Wire
) -> None:
    never_ending = Streamed(*EVENTS, step=threading.Semaphore(0))
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, stream=never_ending)
    url = f"{asgi_site}/openai/v1"
    client = openai.OpenAI(base_url=url, api_key=key, timeout=0.5, max_retries=0)
    with client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="gpt-5.4-mini", messages=ASK)
    eventually(lambda: never_ending.is_closed, seconds=2)
    eventually(lambda: LLMRequest.objects.get().state == "cancelled")


def test_when_the_client_of_a_thread_leaves_the_provider_is_left_at_the_next_chunk(
    wsgi_site: str, key: str, wire: Wire
) -> None:
    step = threading.Semaphore(0)
    streamed = Streamed(*[delta("x" * 1000)] * 500, step=step)
    wire.hosts[PROVIDER] = lambda request: streamed.response()
    client = openai.OpenAI(base_url=f"{wsgi_site}/openai/v1", api_key=key)
    stream = client.chat.completions.create(model="gpt-5.4-mini", messages=ASK, stream=True)
    next(stream)
    stream.close()
    client.close()
    # Written into a closed socket, the first piece is not missed; soon after one is.
    for _ in range(400):
        step.release()
        if streamed.is_closed:
            break
        time.sleep(0.01)
    eventually(lambda: LLMRequest.objects.get().state == "cancelled")
    assert streamed.is_closed


def test_many_streams_at_once_in_one_asgi_process(asgi_site: str, key: str, wire: Wire) -> None:
    step = threading.Semaphore(0)
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS, step=step).response()
    many = 40

    async def ask() -> list[str]:
        url = f"{asgi_site}/openai/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
            create = client.chat.completions.create
            streams = await asyncio.gather(
                *(create(model="gpt-5.4-mini", messages=ASK, stream=True) for _ in range(many))
            )
            # All of them are open.
            step.release(1000 * many)
            return await asyncio.gather(*map(said, streams))

    async def said(stream: Any) -> str:
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == ["Forty-two."] * many
    eventually(lambda: LLMRequest.objects.completed().count() == many)


# --- models --------------------------------------------------------------------------------------


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["gpt-5.4-mini"]
    assert ai.models.retrieve("gpt-5.4-mini").owned_by == "openai"
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("nobody/has-it")
    assert caught.value.code == "model_not_found"


# --- errors --------------------------------------------------------------------------------------


def test_a_wrong_key(site: str) -> None:
    for wrong in ("qllm_" + "x" * 43, "sk-of-openai"):
        client = openai.OpenAI(base_url=f"{site}/openai/v1", api_key=wrong)
        with client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("status", "body", "error", "calls"),
    [
        (400, {"error": {"message": "no", "param": "n", "code": "x"}}, openai.BadRequestError, 1),
        (404, {"error": {"message": "no", "code": "model_not_found"}}, openai.NotFoundError, 1),
        (429, {"error": {"message": "slow", "code": "y"}}, openai.RateLimitError, 3),
        (
            429,
            {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
            openai.RateLimitError,
            1,
        ),
        # It may have been paid for: nobody's library tries it again unasked.
        (500, {"error": {"message": "oops", "code": None}}, openai.InternalServerError, 1),
        (503, {"error": {"message": "The engine is currently overloaded"}}, openai.APIError, 3),
    ],
)
def test_the_providers_errors_are_passed_on(
    ai: openai.OpenAI, wire: Wire, status: int, body: Any, error: type[Exception], calls: int
) -> None:
    answers(wire, body, status, retry_after="0", x_ratelimit_limit_requests="3")
    with pytest.raises(error) as caught:
        ai.with_options(max_retries=2).chat.completions.create(model="gpt-5.4-mini", messages=ASK)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.body == body["error"]
    assert caught.value.response.headers["x-ratelimit-limit-requests"] == "3"
    assert len(wire.to(PROVIDER)) == calls
    assert LLMRequest.objects.failed().count() == calls


def test_our_own_key_at_the_provider_is_no_business_of_the_callers(
    ai: openai.OpenAI, wire: Wire
) -> None:
    words = "Incorrect API key provided: sk-canary-0123456789."
    answers(wire, {"error": {"message": words, "code": "invalid_api_key"}}, 401)
    with pytest.raises(openai.InternalServerError) as caught:
        ai.chat.completions.create(model="gpt-5.4-mini", messages=ASK)
    assert caught.value.code == "provider_auth"
    assert "canary" not in caught.value.response.text
    assert len(wire.to(PROVIDER)) == 1


def test_a_provider_that_is_not_there_is_tried_again(ai: openai.OpenAI, wire: Wire) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ai.with_options(max_retries=1).chat.completions.create(model="gpt-5.4-mini", messages=ASK)
    assert caught.value.status_code == 502
    assert caught.value.code == "no_response"
    assert LLMRequest.objects.failed().count() == 2


def test_an_answer_that_never_came_is_not_asked_for_again(ai: openai.OpenAI, wire: Wire) -> None:
    def hang(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    wire.hosts[PROVIDER] = hang
    with pytest.raises(openai.InternalServerError) as caught:
        ai.chat.completions.create(model="gpt-5.4-mini", messages=ASK)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert LLMRequest.objects.count() == 1


# --- in the background ---------------------------------------------------------------------------


def test_in_the_background_an_answer_is_waited_for_by_its_id(
    ai: openai.OpenAI, qstash: FakeQStash, post_callback: Any
) -> None:
    begun = ai.chat.completions.with_raw_response.create(
        model="gpt-5.4-mini", messages=ASK, extra_body={"background": True}, user="u-1"
    )
    assert begun.status_code == 202
    completion = begun.parse()
    row = LLMRequest.objects.get()
    assert (completion.id, row.via) == (str(row.uuid), "publish")
    assert row.parameters == {"user": "u-1"}
    waiting = ai.chat.completions.retrieve(completion.id)
    assert (waiting.model_extra, waiting.choices) == ({"status": "in_progress"}, [])
    two = [{**ANSWER["choices"][0], "index": index} for index in (0, 1)]
    body = json.dumps({**ANSWER, "choices": two}).encode()
    post_callback(row, Callback(status=200, body=body, source_message_id="msg_1"))
    done = ai.chat.completions.retrieve(completion.id)
    assert done.model_extra == {"status": "completed"}
    assert done.id == completion.id
    assert [choice.message.content for choice in done.choices] == ["Forty-two."] * 2
    assert done.usage
    assert done.usage.total_tokens == 12


def test_what_waits_in_the_background_can_be_cancelled(
    ai: openai.OpenAI, qstash: FakeQStash
) -> None:
    begun = ai.chat.completions.create(
        model="gpt-5.4-mini", messages=ASK, extra_headers={"Prefer": "wait=9, respond-async"}
    )
    path = f"/chat/completions/{begun.id}/cancel"
    cancelled: Any = ai.post(path, cast_to=object)
    assert cancelled["status"] == "cancelled"
    assert qstash.cancelled == ["msg_1"]
    with pytest.raises(openai.ConflictError):
        ai.with_options(max_retries=0).post(path, cast_to=object)


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_a_spent_budget_is_an_insufficient_quota_and_stores_nothing(
    ai: openai.OpenAI, wire: Wire, settings: Any, is_streamed: bool
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {
        "PRICES": {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
    }
    Budget.objects.create(name="house", amount=Decimal("0.000001"))
    answers(wire)
    with pytest.raises(openai.RateLimitError) as refused:
        ai.chat.completions.create(
            model="gpt-5.4-mini",
            messages=ASK,
            max_completion_tokens=10,
            stream=is_streamed,
            extra_headers={"Idempotency-Key": "k-1"},
        )
    error = refused.value
    assert (error.status_code, error.code, error.type) == (429,) + ("insufficient_quota",) * 2
    assert error.response.headers["x-should-retry"] == "false"
    assert "“house” ($0.000001 a month) has $0.000001 left" in error.message
    assert "It renews at" in error.message
    assert wire.to(PROVIDER) == []  # the client has not tried again either
    assert not LLMRequest.objects.exists()
    assert not KeptAnswer.objects.exists()
