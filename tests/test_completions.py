from __future__ import annotations

import gzip
import json
import zlib
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm import completions
from django_qstash_llm.completions import (
    Completion,
    Usage,
    decompress,
    read_completion,
    read_error,
    read_usage,
    weigh,
)
from django_qstash_llm.exceptions import UnreadableCompletion

from .conftest import ANSWER

DONE = json.dumps(ANSWER).encode()
READ = Completion(
    text="Forty-two.",
    id="chatcmpl-1",
    model="gpt-5.4-mini-2026-03-01",
    finish_reason="stop",
    usage=Usage(input_tokens=9, output_tokens=3),
)


def answer(message: Any = None, **changed: Any) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps(ANSWER | {"choices": [choice]} | changed).encode()


# --- OpenAI's shape ---


def test_chat_completion_is_read() -> None:
    assert read_completion(DONE) == READ


@pytest.mark.parametrize("pack", [gzip.compress, lambda body: b"\n " + body, lambda body: body])
def test_packed_answer_is_the_same_answer(pack: Any) -> None:
    assert read_completion(pack(DONE)) == READ


def test_tool_call_has_no_text() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    completion = read_completion(answer({"content": None, "tool_calls": calls}))
    assert (completion.text, completion.tool_calls) == ("", calls)


def test_refusal_is_kept_apart_from_the_text() -> None:
    completion = read_completion(answer({"content": None, "refusal": "I will not."}))
    assert (completion.text, completion.refusal) == ("", "I will not.")


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "Forty"}, {"type": "image"}, {"text": "-two."}, 7]
    assert read_completion(answer({"content": parts})).text == "Forty-two."


def test_old_text_completion_is_read() -> None:
    assert read_completion(b'{"choices": [{"text": "Forty-two."}]}').text == "Forty-two."


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "eos", "weird_reason"])
def test_finish_reason_is_kept_as_it_is(reason: str) -> None:
    body = answer({"content": "x"}, choices=[{"finish_reason": reason, "message": {}}])
    assert read_completion(body).finish_reason == reason


def test_hostile_answer_is_cleaned() -> None:
    body = answer(
        {"content": "nul\x00 \ud800", "refusal": 7, "tool_calls": [{"n\x00": float("nan")}]},
        id="i" * 999,
        model=["m"],
        service_tier={"a": 1},
    )
    completion = read_completion(body)
    assert completion.text == "nul �"
    assert (completion.refusal, completion.model, completion.service_tier) == ("", "", "")
    assert completion.tool_calls == [{"n": None}]
    assert completion.id == "i" * 255


# --- Anthropic's shape ---


def test_anthropic_message_is_read() -> None:
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-5-haiku",
        "content": [
            {"type": "thinking", "thinking": "…"},
            {"type": "text", "text": "Forty"},
            {"type": "text", "text": "-two."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": {
            "input_tokens": 10,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 5,
            "output_tokens": 7,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert read_completion(json.dumps(body).encode()) == Completion(
        text="Forty-two.",
        id="msg_1",
        model="claude-5-haiku",
        finish_reason="tool_calls",
        tool_calls=[{"id": "t1", "type": "function", "function": function}],
        usage=Usage(
            input_tokens=115,
            output_tokens=7,
            cached_tokens=100,
            cache_write_tokens=5,
            reasoning_tokens=2,
        ),
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("refusal", "refusal"),
        (None, ""),
    ],
)
def test_anthropics_reasons_become_the_usual_ones(theirs: Any, ours: str) -> None:
    body = {"type": "message", "content": [], "stop_reason": theirs}
    assert read_completion(json.dumps(body).encode()).finish_reason == ours


# --- what is no completion ---


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (gzip.compress(b"", mtime=0), "empty"),
        (b"null", "not_json"),
        (b"[]", "not_json"),
        (b'"OK"', "not_json"),
        (b"7", "not_json"),
        (b"OK", "not_json"),
        (b"<html><body>Bad gateway</body></html>", "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"a": 1} trailing words, and more of them', "not_json"),
        (b"data: {}\n\ndata: [DONE]\n\n", "stream"),
        (b"event: message_start\ndata: {}\n\n", "stream"),
        (b"{}", "no_choices"),
        (b'{"choices": []}', "no_choices"),
        (b'{"choices": null, "error": null}', "no_choices"),
        (b'{"choices": {}}', "no_choices"),
        (b'{"choices": [7]}', "no_choices"),
        (b'{"error": {"code": 502, "message": "upstream"}}', "502"),
        (b'{"error": {}}', "error"),
        (b'{"error": "no credits", "code": "spent"}', "spent"),
        (b'[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}]', "429"),
        (b"\x1f\x8bnot gzip at all", "not_json"),
        (gzip.compress(DONE, mtime=0)[:-12], "truncated"),
        (gzip.compress(DONE, mtime=0)[:40], "truncated"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_completion_says_why_in_a_word(body: bytes, code: str) -> None:
    with pytest.raises(UnreadableCompletion) as caught:
        read_completion(body)
    assert caught.value.code == code
    assert str(caught.value)


@given(st.integers(min_value=1, max_value=len(DONE) - 1))
def test_answer_cut_anywhere_is_truncated(length: int) -> None:
    with pytest.raises(UnreadableCompletion) as caught:
        read_completion(DONE[:length])
    assert caught.value.code == "truncated"


RICH = json.dumps(
    {"a": [True, False, None, -1.5e-7, 'é\U0001f600"\\/\n'], "b": {"c": {}}, "choices": []}
).encode()


@pytest.mark.parametrize("length", range(1, len(RICH)))
def test_any_json_cut_anywhere_is_truncated(length: int) -> None:
    with pytest.raises(UnreadableCompletion) as caught:
        read_completion(RICH[:length])
    assert caught.value.code == "truncated"


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    with suppress(UnreadableCompletion):
        read_completion(body)
    code, message = read_error(body)
    assert isinstance(code, str)
    assert isinstance(message, str)


def test_small_bomb_is_not_unpacked_beyond_the_limit() -> None:
    packer = zlib.compressobj(9, wbits=31)
    zeros = b"0" * 1_000_000
    bomb = b"".join(packer.compress(zeros) for _ in range(70)) + packer.flush()
    assert len(bomb) < 200_000
    with pytest.raises(UnreadableCompletion, match="over 64000000 bytes") as caught:
        decompress(bomb)
    assert caught.value.code == "too_large"


def test_what_is_not_packed_is_left_alone() -> None:
    assert decompress(b"plain") == b"plain"


# --- usage ---


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        (None, Usage()),
        ([], Usage()),
        ("12", Usage()),
        ({}, Usage()),
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 50,
                "total_tokens": 150,
                "prompt_tokens_details": {"cached_tokens": 80, "cache_write_tokens": 10},
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
            Usage(
                input_tokens=100,
                output_tokens=50,
                cached_tokens=80,
                cache_write_tokens=10,
                reasoning_tokens=30,
            ),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "prompt_cache_hit_tokens": 4},
            Usage(input_tokens=9, output_tokens=3, cached_tokens=4),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 0},
            Usage(input_tokens=9, output_tokens=3, cached_tokens=0),
        ),
        # Gemini and xAI leave the reasoning out of the completion.
        (
            {
                "prompt_tokens": 21,
                "completion_tokens": 0,
                "total_tokens": 81,
                "completion_tokens_details": {"reasoning_tokens": 60},
            },
            Usage(input_tokens=21, output_tokens=60, reasoning_tokens=60),
        ),
        ({"prompt_tokens": 9, "total_tokens": 12}, Usage(input_tokens=9, output_tokens=3)),
        # A total that contradicts the rest is not made into a count.
        ({"prompt_tokens": 9, "total_tokens": 5}, Usage(input_tokens=9)),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 1},
            Usage(input_tokens=9, output_tokens=3),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "cost": 0.00012},
            Usage(input_tokens=9, output_tokens=3, reported_cost=Decimal("0.00012")),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "cost": "1e-7"},
            Usage(input_tokens=9, output_tokens=3, reported_cost=Decimal("1e-7")),
        ),
        (
            {"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 5}},
            Usage(input_tokens=9, output_tokens=3, cached_tokens=5),
        ),
        ({"input_tokens": 0, "output_tokens": 0}, Usage(input_tokens=0, output_tokens=0)),
        # Each a count, and their sum wider than any column.
        (
            {
                "input_tokens": 2**62,
                "cache_read_input_tokens": 2**62,
                "cache_creation_input_tokens": 2**62,
                "output_tokens": 1,
            },
            Usage(output_tokens=1, cached_tokens=2**62, cache_write_tokens=2**62),
        ),
        ({"prompt_tokens": 9, "prompt_tokens_details": []}, Usage(input_tokens=9)),
    ],
)
def test_usage_of_every_provider_is_read(raw: Any, usage: Usage) -> None:
    assert read_usage(raw) == usage


@pytest.mark.parametrize(
    "count", [-5, 2**63, 2**100, 12.7, float("nan"), float("inf"), "12", True, [1], {}, None]
)
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_count_that_is_not_sound_is_unknown_and_never_zero(name: str, count: Any) -> None:
    usage = read_usage({"prompt_tokens": 9, "completion_tokens": 3} | {name: count})
    counts = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
    assert counts[name] is None
    assert not usage.is_known


def test_whole_number_written_as_a_float_is_a_count() -> None:
    assert read_usage({"prompt_tokens": 9.0, "completion_tokens": 3.0}) == Usage(
        input_tokens=9, output_tokens=3
    )


@pytest.mark.parametrize("cost", [-1, float("nan"), "NaN", "Infinity", True, [1], "free", 1e30])
def test_cost_that_is_not_sound_is_not_reported(cost: Any) -> None:
    assert read_usage({"prompt_tokens": 9, "cost": cost}).reported_cost is None


def test_raw_usage_is_kept_clean() -> None:
    usage = read_usage({"prompt_tokens": 9, "odd\x00": float("nan"), "wide": 2**70})
    assert usage.raw == {"prompt_tokens": 9, "odd": None, "wide": str(2**70)}


# --- errors ---


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (
            {"error": {"message": "Slow down", "type": "requests", "code": "rate_limit_exceeded"}},
            "rate_limit_exceeded",
            "Slow down",
        ),
        (
            {"error": {"message": "Pay", "type": "insufficient_quota", "code": None}},
            "insufficient_quota",
            "Pay",
        ),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            "overloaded_error",
            "Overloaded",
        ),
        (
            {"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}},
            "429",
            "Quota",
        ),
        ([{"error": {"status": "UNAVAILABLE", "message": "Busy"}}], "UNAVAILABLE", "Busy"),
        (
            {"message": "Slow", "type": "too_many_requests_error", "code": "token_quota_exceeded"},
            "token_quota_exceeded",
            "Slow",
        ),
        ({"object": "error", "message": "Slow", "code": "1300"}, "1300", "Slow"),
        ({"detail": [{"msg": "bad"}]}, "", "[{'msg': 'bad'}]"),
        ({"code": "spent", "error": "Too many tokens"}, "spent", "Too many tokens"),
        ({"error": {"message": "litellm", "code": "429"}}, "429", "litellm"),
        ({"error": ["odd"]}, "", "['odd']"),
        ([], "", ""),
        ("words", "", "words"),
        (None, "", "None"),
        ({}, "", ""),
        ({"error": {"message": "n\x00ul \ud800", "code": "c" * 99}}, "c" * 64, "nul �"),
    ],
)
def test_error_of_every_provider_is_read(body: Any, code: str, message: str) -> None:
    assert read_error(json.dumps(body).encode()) == (code, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", ""),
        (b"upstream  connect\nerror", "upstream connect error"),
        (b"<html>" + b"x" * 9000, "<html>" + "x" * 494),
        (b"\xff\x00", "�"),
        (gzip.compress(b'{"error": "busy"}', mtime=0), "busy"),
    ],
)
def test_error_that_is_no_json_is_shown_as_it_is(body: bytes, message: str) -> None:
    assert read_error(body) == ("", message)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"9" * 5000, b"\x1f\x8bbroken", gzip.compress(b"{}", mtime=0)[:-9]]
)
def test_no_error_body_raises(body: bytes) -> None:
    code, message = read_error(body)
    assert (code, len(message) <= 2000) == ("", True)


def test_largest_answer_covers_the_largest_callback() -> None:
    assert completions.LARGEST_ANSWER >= 64_000_000


@pytest.mark.parametrize(
    ("details", "cost"),
    [({"upstream_inference_cost": 0.002}, Decimal("0.0021")), ({}, None)],
)
def test_cost_with_ones_own_key_is_what_both_take_or_unknown(details: Any, cost: Any) -> None:
    usage = {"prompt_tokens": 9, "cost": 0.0001, "is_byok": True, "cost_details": details}
    assert read_usage(usage).reported_cost == cost


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ({"image_url": {"url": "data:image/jpeg;base64," + "A" * 9}}, 1000),
        ({"image_url": {"url": "data:image/jpeg;base64," + "/9j+" * 90_000 + "=="}}, 1000),
        ({"source": {"type": "base64", "data": "_-" * 9000}}, 1000),
        ({"input_audio": {"data": "AAAA" * 9000, "format": "wav"}}, 1000),
        ({"image_url": {"url": "https://example.com/cat.png"}}, 0),
        ({"text": "data: in words, and " * 100}, 500),
    ],
)
def test_files_in_messages_weigh_what_their_tokens_do(part: dict[str, Any], tokens: int) -> None:
    weight = weigh([{"role": "user", "content": [part]}])
    assert 0 <= weight // 4 - tokens < 30
