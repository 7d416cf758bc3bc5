from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm.completions import LARGEST_ANSWER, Completion, Usage
from django_qstash_llm.streams import Chunk, Events, StreamBroken, StreamReader


def reader(**more: Any) -> StreamReader:
    known = {"is_anthropic": False, "asked_bytes": 40, "is_usage_asked": False, "created": 1}
    return StreamReader(**known | more)


def chunk(text: str = "", reason: str | None = None, **more: Any) -> str:
    told = {"content": text} if text else {}
    return json.dumps({"choices": [{"delta": told, "finish_reason": reason}], **more})


def read(body: bytes, size: int = 10**6, **more: Any) -> tuple[list[Chunk], Completion]:
    reading, chunks = reader(**more), []
    for start in range(0, len(body), size):
        chunks += reading.feed(body[start : start + size])
        if reading.is_done:
            break
    chunks += reading.end()
    return chunks, reading.completion


A, B, STOP = chunk("A"), chunk("B"), chunk(reason="stop")


@pytest.mark.parametrize(
    "body",
    [
        f"data: {A}\n\ndata: {B}\n\ndata: {STOP}\n\ndata: [DONE]\n\n",
        f"data: {A}\r\n\r\ndata: {B}\r\n\r\ndata: {STOP}\r\n\r\ndata: [DONE]\r\n\r\n",
        f"data: {A}\r\rdata: {B}\r\rdata: {STOP}\r\rdata: [DONE]\r\r",
        f"data:{A}\n\ndata:{B}\n\ndata:{STOP}\n\ndata:[DONE]\n\n",
        f"data: {A}\n\ndata: {B}\n\ndata: {STOP}\n\n",
        f"data: {A}\n\ndata: {B}\n\ndata: {STOP}",
        f"data: {A}\ndata: {B}\ndata: {STOP}\ndata: [DONE]\n",
        f": keep-alive\n\n\n\ndata: {A}\n: OPENROUTER PROCESSING\n\ndata: {B}\n\nretry: 3\ndata: {STOP}\n\n",
        f"event: chunk\nid: 7\ndata: {A}\n\nevent: chunk\ndata: {B}\n\nevent:\ndata: {STOP}\n\n",
        "\ufeff" + f"data: {A}\n\ndata: {B}\n\ndata: {STOP}\n\ndata: [DONE]\n\ndata: {A}\n\n",
        "".join(
            f"data: {line}\n" if line else "\n"
            for each in (A, B, STOP)
            for line in [*json.dumps(json.loads(each), indent=1).splitlines(), ""]
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_is_in_use_is_read_in_whatever_pieces_it_comes(body: str, size: int) -> None:
    chunks, completion = read(body.encode(), size)
    assert [each.text for each in chunks] == ["A", "B", ""]
    assert (completion.text, completion.finish_reason) == ("AB", "stop")


def test_bytes_are_handed_on_as_they_came() -> None:
    body = '{"choices": [ {"delta": {"content": "ü\\u00fc"}, "finish_reason": "stop"} ], "x": 1e2}'
    [only], completion = read(f"data: {body}\n\n".encode())
    assert only == Chunk(body.encode(), "üü")
    assert completion.text == "üü"


@pytest.mark.parametrize(
    ("events", "usage", "extra"),
    [
        # On the last chunk, beside the finish reason.
        ([A, chunk(reason="stop", usage={"prompt_tokens": 1, "completion_tokens": 2})], (1, 2), 0),
        # In a chunk of its own, with choices (LiteLLM) and without.
        ([A, STOP, json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})], (1, 2), 1),
        ([A, STOP, chunk(usage={"prompt_tokens": 1, "completion_tokens": 2})], (1, 2), 1),
        # Several: the last counts.
        ([chunk("A", usage={"prompt_tokens": 1, "completion_tokens": 1}), STOP, chunk(usage={"prompt_tokens": 1, "completion_tokens": 2})], (1, 2), 1),
        # Groq's.
        ([A, chunk(reason="stop", x_groq={"usage": {"prompt_tokens": 1, "completion_tokens": 2}})], (1, 2), 0),
        # None at all, or none that says anything.
        ([A, STOP], (10, 1), 0),
        ([chunk("A", usage=None), chunk(reason="stop", usage={})], (10, 1), 0),
    ],
)  # fmt: skip
def test_usage_is_found_on_any_chunk(events: list[str], usage: tuple[int, int], extra: int) -> None:
    chunks, completion = read("".join(f"data: {each}\n\n" for each in events).encode())
    assert (completion.usage.input_tokens, completion.usage.output_tokens) == usage
    assert sum(each.is_extra for each in chunks) == extra
    assert completion.usage.raw.get("estimated", False) is (usage == (10, 1))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_is_told_is_estimated_too(name: str) -> None:
    thought = json.dumps({"choices": [{"delta": {name: "x" * 40}}]})
    _, completion = read("".join(f"data: {each}\n\n" for each in (thought, A, STOP)).encode())
    assert completion.text == "A"
    assert completion.usage.output_tokens == 11


def test_chunk_without_choices_is_no_answer_and_no_fault() -> None:
    azure = json.dumps({"choices": [], "prompt_filter_results": []})
    chunks, completion = read(f"data: {azure}\n\ndata: {A}\n\ndata: {STOP}\n\n".encode())
    assert [each.is_extra for each in chunks] == [False] * 3
    assert completion.text == "A"


def test_chunks_of_odd_shapes_are_passed_on() -> None:
    odd = [
        {},
        {"choices": None},
        {"choices": [7, {"delta": 7}, {"delta": {"content": 7, "tool_calls": 7}}]},
        {"choices": [{"delta": {"tool_calls": [7, {"function": 7}, {"function": {"name": None}}]}}]},
        {"choices": [{"index": [], "delta": {"refusal": "No."}, "finish_reason": 7}], "usage": 7},
    ]  # fmt: skip
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in odd)
    chunks, completion = read(f"{body}data: {STOP}\n\n".encode())
    assert len(chunks) == len(odd) + 1
    assert (completion.refusal, completion.finish_reason) == ("No.", "stop")


def test_long_line_in_small_pieces_is_read_once() -> None:
    text = "x" * 3_000_000
    chunks, _ = read(f"data: {chunk(text, 'stop')}\n\n".encode(), 1000)
    assert [len(each.text) for each in chunks] == [3_000_000]


def test_endless_stream_has_an_end() -> None:
    comment = b":" + b"x" * 999_998 + b"\n"
    reading = reader()
    for _ in range(LARGEST_ANSWER // len(comment)):
        assert list(reading.feed(comment)) == []
    with pytest.raises(StreamBroken) as caught:
        list(reading.feed(comment))
    assert caught.value.code == "too_large"


def test_nothing_read_is_nothing_said() -> None:
    assert reader().completion == Completion(text="", usage=Usage(input_tokens=10, output_tokens=0))
    assert reader().is_estimated


@given(st.binary(max_size=300), st.integers(1, 20))
def test_any_bytes_are_events_or_a_broken_stream(body: bytes, size: int) -> None:
    events = Events()
    try:
        for start in range(0, len(body), size):
            list(events.feed(body[start : start + size]))
        list(events.end())
    except StreamBroken:
        pass


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["choices", "delta", "index", "content", "tool_calls", "function", "arguments", "name", "id", "usage", "finish_reason", "error", "type", "message", "content_block", "partial_json", "stop_reason", "text", "input"]), inner, max_size=5), max_leaves=12), st.booleans())  # fmt: skip
def test_any_json_is_chunks_or_a_broken_stream(event: Any, is_anthropic: bool) -> None:
    reading = reader(is_anthropic=is_anthropic)
    kinds = ["message_start", "content_block_start", "content_block_delta", "message_delta"]
    events = [{**event, "type": kind} for kind in kinds] if isinstance(event, dict) else [event]
    try:
        for each in [event, *events]:
            list(reading.feed(f"data: {json.dumps(each)}\n\n".encode()))
        list(reading.end())
    except StreamBroken:
        pass
    assert isinstance(reading.completion, Completion)
