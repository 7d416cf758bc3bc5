"""OpenAI's words to Anthropic's and back. Anthropic's side is as its documentation shows it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from django_qstash_llm import anthropic, chat
from django_qstash_llm.exceptions import ChatFailed
from django_qstash_llm.models import LLMRequest
from django_qstash_llm.models.request import Via
from tests.wire import Wire

pytestmark = pytest.mark.django_db

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = {
    "id": "t1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}


def body(messages: list[Any], **parameters: Any) -> dict[str, Any]:
    return anthropic.request_body("m", messages, parameters, max_tokens=10)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        # Text, and what is Anthropic's own already.
        (ASK, ASK),
        ([{"role": "user", "content": [{"type": "text", "text": "A"}]}],) * 2,
        ([{"role": "assistant", "content": [USE]}],) * 2,
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "18"}]}],) * 2,
        # Images, inline and by URL.
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}]}],
            [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}]}],
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://h/a.png"}}]}],
            [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://h/a.png"}}]}],
        ),
        # Tool calls, with words and without, and what the tools answered, in one message.
        (
            [
                {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "t1", "content": "18"},
                {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "19"}]},
                {"role": "user", "content": "And?"},
            ],
            [
                {"role": "assistant", "content": [{"type": "text", "text": "I look."}, USE]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "18"},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "19"}]},
                ]},
                {"role": "user", "content": "And?"},
            ],
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
            [{"role": "assistant", "content": [USE]}],
        ),
        # A refusal is what was said.
        ([{"role": "assistant", "content": None, "refusal": "No."}], [{"role": "assistant", "content": "No."}]),
        # Arguments that are no JSON: Anthropic says so itself.
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "t1", "function": {"name": "f", "arguments": "{oops"}}]}],
            [{"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": "{oops"}]}],
        ),
    ],
)  # fmt: skip
def test_messages_are_asked_in_its_own_shape(ours: list[Any], theirs: list[Any]) -> None:
    kept = json.dumps(ours)
    assert body(ours)["messages"] == theirs
    assert json.dumps(ours) == kept  # a row's own are not changed


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"max_tokens": 10}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["A", "B"]}, {"stop_sequences": ["A", "B"]}),
        ({"stop_sequences": ["A"], "top_k": 3}, {"stop_sequences": ["A"], "top_k": 3}),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]},
            {"tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}]},
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]},
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},) * 2,
        ({"tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}),
        ({"tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"tool_choice": {"type": "tool", "name": "f"}}),
        ({"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "any"}}),
        (
            {"tools": [{"name": "f"}], "parallel_tool_calls": False},
            {"tools": [{"name": "f"}], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ),
        ({"parallel_tool_calls": True}, {}),
        ({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
        ({"stream_options": {"include_usage": True}, "stream": True}, {"stream": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": 7}},
            {"output_config": {"format": {"type": "json_schema", "schema": None}}},
        ),
        # What has no other name is passed on, and refused there.
        ({"n": 2, "response_format": {"type": "json_object"}},) * 2,
    ],
)  # fmt: skip
def test_parameters_are_asked_under_its_own_names(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    told = {"max_tokens": 10, **theirs}
    assert body(ASK, **ours) == {"model": "m", "messages": ASK, **told}


def answers(wire: Wire, answer: httpx.Response) -> None:
    wire.hosts["anthropic.test"] = lambda request: answer


USAGE = {"input_tokens": 10, "cache_read_input_tokens": 100, "output_tokens": 7}


def test_answer_is_passed_on_in_openais_shape_and_recorded_as_it_was_counted(wire: Wire) -> None:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-5",
        "content": [{"type": "text", "text": "I look."}, USE],
        "stop_reason": "tool_use",
        "usage": USAGE,
    }
    answers(wire, httpx.Response(200, json=message))
    answer = chat.complete(LLMRequest(via=Via.CHAT, provider="anthropic", model="m", messages=ASK))
    told = json.loads(answer.body)
    assert told.pop("created") > 0
    assert told == {
        "id": "msg_1",
        "object": "chat.completion",
        "model": "claude-5",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 110,
            "completion_tokens": 7,
            "total_tokens": 117,
            "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 0},
        },
    }
    row = LLMRequest.objects.get()
    assert (row.completion, row.tool_calls, row.finish_reason) == ("I look.", [CALL], "tool_calls")
    assert (row.input_tokens, row.cached_tokens, row.usage) == (110, 100, USAGE)
    [request] = wire.requests
    assert request.headers["x-api-key"] == "ant-canary-0123456789"
    assert json.loads(request.content)["max_tokens"] == 4096


def sse(*events: dict[str, Any]) -> httpx.Response:
    told = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events)
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=told.encode())


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, **told: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": told}


def stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


BEGIN = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-5",
        "content": [],
        "stop_reason": None,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 100, "output_tokens": 1},
    },
}
TEXT = [start(0, type="text", text=""), delta(0, type="text_delta", text="I lo"), delta(0, type="text_delta", text="ok."), stop(0)]  # fmt: skip
TOOL = [
    start(1, type="tool_use", id="t1", name="weather", input={}),
    delta(1, type="input_json_delta", partial_json=""),
    delta(1, type="input_json_delta", partial_json='{"city": '),
    delta(1, type="input_json_delta", partial_json='"Paris"}'),
    stop(1),
]
BARE_TOOL = [start(2, type="tool_use", id="t2", name="now", input={}), stop(2)]
END = [
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 7}},
    {"type": "message_stop"},
]
THINKING = [
    start(3, type="thinking", thinking=""),
    delta(3, type="thinking_delta", thinking="Hm."),
    delta(3, type="signature_delta", signature="abc"),
    stop(3),
]


def test_stream_is_passed_on_in_openais_shape(wire: Wire) -> None:
    events = [BEGIN, {"type": "ping"}, *THINKING, *TEXT, *TOOL, *BARE_TOOL, *END]
    answers(wire, sse(*events))
    row = LLMRequest(via=Via.CHAT, provider="anthropic", model="m", messages=ASK)
    with chat.open_stream(row) as stream:
        chunks = list(stream)
    told = [json.loads(chunk.data) for chunk in chunks]
    assert all(
        (each["id"], each["object"], each["model"])
        == ("msg_1", "chat.completion.chunk", "claude-5")
        for each in told
    )
    deltas = [choice["delta"] for each in told for choice in each["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "I lo"},
        {"content": "ok."},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {
            "tool_calls": [
                {
                    "index": 1,
                    "id": "t2",
                    "type": "function",
                    "function": {"name": "now", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert told[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert (told[-1]["choices"], told[-1]["usage"]["prompt_tokens"]) == ([], 110)
    assert [chunk.is_extra for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    stored = LLMRequest.objects.get()
    function = {"name": "now", "arguments": "{}"}
    assert (stored.state, stored.completion) == ("completed", "I look.")
    assert stored.tool_calls == [CALL, {"id": "t2", "type": "function", "function": function}]
    # Its counts are cumulative, and kept as they were told.
    assert (stored.input_tokens, stored.output_tokens, stored.usage) == (110, 7, USAGE)
    assert "stream_options" not in json.loads(wire.requests[0].content)


def test_stream_that_breaks_off_says_what_it_may_have_cost(wire: Wire) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    answers(wire, sse(BEGIN, *TEXT, error))
    with pytest.raises(ChatFailed, match="Overloaded"):
        list(LLMRequest.objects.stream(ASK, provider="anthropic", model="m"))
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code, row.completion) == ("failed", "overloaded_error", "I look.")
    # Input as it was counted, output as far as it came.
    assert (row.input_tokens, row.output_tokens, row.usage["estimated"]) == (110, 2, True)


def test_stream_without_its_end_is_cut(wire: Wire) -> None:
    answers(wire, sse(BEGIN, *TEXT, {"type": "message_stop"}))
    with pytest.raises(ChatFailed) as caught:
        list(LLMRequest.objects.stream(ASK, provider="anthropic", model="m"))
    assert caught.value.code == "cut"
