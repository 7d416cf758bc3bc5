"""Reading what providers answer: bytes -> ``Completion``, or why not.

The outside names (``choices``, ``prompt_tokens``, ``stop_reason``) stop here.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from . import anthropic
from .cleaning import WIDEST_INTEGER, clean_json, clean_text
from .exceptions import UnreadableCompletion

LARGEST_ANSWER = 64_000_000
"""Bytes of JSON read, after decompression."""
BYTES_PER_TOKEN = 4
"""About, of English with any tokenizer."""
TOKENS_PER_FILE = 1000
"""About, of an image of ordinary size with any model; a sound or a document may be more."""
# An image or another file inside of a message: a data URL, or base64 alone.
_FILE = re.compile(r'"data:[^",]*;base64,[^"]*"|"[A-Za-z0-9+/_-]{1000,}=*"')
_IN_ITS_PLACE = "x" * TOKENS_PER_FILE * BYTES_PER_TOKEN


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens, in OpenTelemetry's words. None is unknown, which is not 0."""

    input_tokens: int | None = None
    """All of the input, the cached part included."""
    output_tokens: int | None = None
    """All of the output, the reasoning part included."""
    cached_tokens: int | None = None
    """The part of the input that was read from a cache."""
    cache_write_tokens: int | None = None
    """The part of the input that was written to a cache."""
    cache_write_1h_tokens: int | None = None
    """The part of ``cache_write_tokens`` that is kept for an hour, which Anthropic charges more for."""
    reasoning_tokens: int | None = None
    """The part of the output nobody sees."""
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    """These four are parts of the input and of the output as well."""
    web_searches: int | None = None
    """No tokens: how often the provider searched the web for it, where it charges for each time."""
    service_tier: str = ""
    """Where it is told with the usage, as Anthropic does: see ``Completion``."""
    reported_cost: Decimal | None = None
    """USD, where the provider says it."""
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_known(self) -> bool:
        return self.input_tokens is not None and self.output_tokens is not None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A model's answer, read. All text is fit for the database."""

    text: str
    id: str = ""
    model: str = ""
    """The model that answered, which may be a dated version of the one asked."""
    finish_reason: str = ""
    """``stop``, ``length``, ``tool_calls``, ``content_filter`` or the provider's own word."""
    refusal: str = ""
    tool_calls: list[Any] = field(default_factory=list)
    service_tier: str = ""
    """What it was answered as, in the provider's word: ``flex``, ``priority``, ``batch``; it decides
    the price, not what was asked for."""
    usage: Usage = field(default_factory=Usage)


def weigh(messages: Any) -> int:
    """Bytes of JSON by which the tokens of ``messages`` are estimated. A file in them weighs what its
    tokens do, whatever its size."""
    text = json.dumps(messages, separators=(",", ":"), ensure_ascii=False)
    return len(_FILE.sub(_IN_ITS_PLACE, text).encode("utf-8", "replace"))


def read_completion(body: bytes) -> Completion:
    """Read a provider's 2xx answer, OpenAI's shape or Anthropic's.

    Raises ``UnreadableCompletion`` whose ``code`` says in a word what is wrong.
    """
    return read_answer(_load(body))


def read_answer(answer: Any) -> Completion:
    """The same for an answer that is decoded already."""
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        answer = answer[0]  # Gemini wraps errors in a list
    if not isinstance(answer, dict):
        raise UnreadableCompletion("not_json", "the answer is JSON, but not an object")
    if anthropic.is_message(answer):
        usage = answer.get("usage")  # as it was told, not as it is translated
        return _read_openai(anthropic.completion(answer) | {"usage": usage})
    choices = answer.get("choices")
    if not choices and answer.get("error") is not None:
        # OpenRouter and others say it with status 200.
        code, message = error_in(answer)
        raise UnreadableCompletion(
            code or "error",
            message or "the provider answered with an error",
            usage=read_usage(_usage_in(answer)),
        )
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableCompletion(
            "no_choices", "the answer has no choices", usage=read_usage(_usage_in(answer))
        )
    return _read_openai(answer)


def _usage_in(answer: Mapping[str, Any]) -> Any:
    beside = answer.get("x_groq")
    told = answer.get("usage") or answer.get("usageMetadata")  # Gemini's own word
    return told or (beside.get("usage") if isinstance(beside, dict) else None)


def _load(body: bytes) -> Any:
    body = decompress(body)
    text = body.decode("utf-8-sig", "replace").strip()
    if not text:
        raise UnreadableCompletion("empty", "the answer is empty")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UnreadableCompletion("not_json", "the answer is nested too deeply") from error
    except ValueError as error:
        # Cut inside a word or an escape, the parser stumbles a few characters before the end.
        left = len(text) - getattr(error, "pos", 0)
        if text[0] in "{[" and (left <= 6 or "Unterminated" in str(error)):
            raise UnreadableCompletion("truncated", "the answer ends in the middle") from error
        if text.startswith(("data:", "event:")):
            raise UnreadableCompletion(
                "stream", "the answer is a stream of events, not one JSON"
            ) from error
        raise UnreadableCompletion(
            "not_json", f"the answer is not JSON; it begins {clean_text(text[:80])!r}"
        ) from error


def is_gzip(body: bytes) -> bool:
    return body[:2] == b"\x1f\x8b"


def decompress(body: bytes) -> bytes:
    """``body``, unpacked when it is gzip. Raises ``UnreadableCompletion`` when it would be too large."""
    if not is_gzip(body):
        return body
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(body, LARGEST_ANSWER)
    except zlib.error as error:
        raise UnreadableCompletion("not_json", "the answer is broken gzip") from error
    if unpacker.unconsumed_tail:
        raise UnreadableCompletion(
            "too_large", f"the answer is over {LARGEST_ANSWER} bytes unpacked"
        )
    if not unpacker.eof:
        raise UnreadableCompletion("truncated", "the answer's gzip ends in the middle")
    return unpacked


def _read_openai(answer: dict[str, Any]) -> Completion:
    choice = answer["choices"][0]
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    tool_calls = message.get("tool_calls")
    usage = read_usage(_usage_in(answer))
    return Completion(
        text=_text(message.get("content") if message else choice.get("text")),
        id=_text(answer.get("id"))[:255],
        model=_text(answer.get("model"))[:255],
        finish_reason=_text(choice.get("finish_reason"))[:64],
        refusal=_text(message.get("refusal")),
        tool_calls=clean_json(tool_calls) if isinstance(tool_calls, list) else [],
        service_tier=_text(answer.get("service_tier"))[:64] or usage.service_tier,
        usage=usage,
    )


def _text(value: Any) -> str:
    """Text out of a string or out of a list of parts."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        return clean_text("".join(part for part in parts if isinstance(part, str)))
    return ""


def read_usage(usage: Any) -> Usage:
    """Tokens of any provider's ``usage``; what is not a sound count is unknown."""
    if not isinstance(usage, dict):
        return Usage()
    raw = clean_json(usage)
    if "promptTokenCount" in usage:
        return _gemini_usage(usage, raw)
    if "prompt_tokens" not in usage and "input_tokens" in usage:
        return _anthropic_usage(usage, raw)
    input_details = _dict(usage, "prompt_tokens_details")
    output_details = _dict(usage, "completion_tokens_details")
    input_tokens = _count(usage.get("prompt_tokens"))
    cached = (
        input_details.get("cached_tokens"),
        usage.get("prompt_cache_hit_tokens"),
        usage.get("cached_tokens"),
    )
    return Usage(
        input_tokens=input_tokens,
        output_tokens=_whole_output(
            _count(usage.get("completion_tokens")), input_tokens, usage.get("total_tokens")
        ),
        cached_tokens=next((n for each in cached if (n := _count(each)) is not None), None),
        cache_write_tokens=_count(input_details.get("cache_write_tokens")),
        reasoning_tokens=_count(output_details.get("reasoning_tokens")),
        audio_input_tokens=_count(input_details.get("audio_tokens")),
        audio_output_tokens=_count(output_details.get("audio_tokens")),
        image_input_tokens=_count(input_details.get("image_tokens")),
        image_output_tokens=_count(output_details.get("image_tokens")),
        web_searches=_count(_dict(usage, "server_tool_use").get("web_search_requests")),
        reported_cost=_reported_cost(usage),
        raw=raw,
    )


def _whole_output(told: int | None, input_tokens: int | None, of_all: Any) -> int | None:
    """xAI, and Gemini on some paths, leave the reasoning out of the output and not out of the total."""
    total = _count(of_all)
    if total is None or input_tokens is None or total < input_tokens:
        return told
    return max(told or 0, total - input_tokens)


def _anthropic_usage(usage: dict[str, Any], raw: dict[str, Any]) -> Usage:
    """Anthropic counts what the cache gave and took outside ``input_tokens``."""
    cached = _count(usage.get("cache_read_input_tokens"))
    cache_write = _count(usage.get("cache_creation_input_tokens"))
    uncached = _count(usage.get("input_tokens"))
    # OpenAI's Responses API uses the same two names and counts the cache inside.
    details = _dict(usage, "input_tokens_details")
    output_details = _dict(usage, "output_tokens_details")
    reasoning = (output_details.get("thinking_tokens"), output_details.get("reasoning_tokens"))
    input_tokens = uncached
    if uncached is not None:
        input_tokens = _count(uncached + (cached or 0) + (cache_write or 0))
    return Usage(
        input_tokens=input_tokens,
        output_tokens=_count(usage.get("output_tokens")),
        cached_tokens=cached if cached is not None else _count(details.get("cached_tokens")),
        cache_write_tokens=(
            cache_write if cache_write is not None else _count(details.get("cache_write_tokens"))
        ),
        cache_write_1h_tokens=_count(
            _dict(usage, "cache_creation").get("ephemeral_1h_input_tokens")
        ),
        reasoning_tokens=next((n for each in reasoning if (n := _count(each)) is not None), None),
        web_searches=_count(_dict(usage, "server_tool_use").get("web_search_requests")),
        service_tier=_anthropic_tier(usage),
        reported_cost=_reported_cost(usage),
        raw=raw,
    )


def _anthropic_tier(usage: dict[str, Any]) -> str:
    """What makes the price another one: its tier, fast mode, and being kept to the US."""
    tier = _text(usage.get("service_tier"))
    words = ["" if tier == "standard" else tier]
    words += ["fast"] if usage.get("speed") == "fast" else []
    words += ["us"] if usage.get("inference_geo") == "us" else []
    return "-".join(filter(None, words))[:64] or tier[:64]


def _gemini_usage(usage: dict[str, Any], raw: dict[str, Any]) -> Usage:
    """Gemini's own API counts thoughts beside the candidates, and tools' answers beside the prompt."""
    prompt, candidates = _count(usage.get("promptTokenCount")), usage.get("candidatesTokenCount")
    of_tools = _count(usage.get("toolUsePromptTokenCount"))
    thoughts = _count(usage.get("thoughtsTokenCount"))
    input_tokens = None if prompt is None else _count(prompt + (of_tools or 0))
    output_tokens = _count(candidates)
    if output_tokens is not None:
        output_tokens = _count(output_tokens + (thoughts or 0))
    return Usage(
        input_tokens=input_tokens,
        output_tokens=_whole_output(output_tokens, input_tokens, usage.get("totalTokenCount")),
        cached_tokens=_count(usage.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
        service_tier=_text(usage.get("serviceTier")).lower()[:64],
        audio_input_tokens=_of_modality(usage.get("promptTokensDetails"), "AUDIO"),
        audio_output_tokens=_of_modality(usage.get("candidatesTokensDetails"), "AUDIO"),
        image_input_tokens=_of_modality(usage.get("promptTokensDetails"), "IMAGE"),
        image_output_tokens=_of_modality(usage.get("candidatesTokensDetails"), "IMAGE"),
        raw=raw,
    )


def _of_modality(details: Any, modality: str) -> int | None:
    for each in details if isinstance(details, list) else ():
        if isinstance(each, dict) and each.get("modality") == modality:
            return _count(each.get("tokenCount"))
    return None


def _dict(usage: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = usage.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_sound = (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < WIDEST_INTEGER
    )
    return value if is_sound else None


def _reported_cost(usage: Mapping[str, Any]) -> Decimal | None:
    told = usage.get("cost")
    if isinstance(told, dict):  # Perplexity tells what it is made of
        told = told.get("total_cost")
    ticks = _count(usage.get("cost_in_usd_ticks"))  # xAI
    cost = _money(told) if ticks is None else _money(str(Decimal(ticks).scaleb(-10)))
    if not usage.get("is_byok"):
        return cost
    # OpenRouter with one's own key: its fee, and beside it what the key's owner pays.
    upstream = _money(_dict(usage, "cost_details").get("upstream_inference_cost"))
    return None if cost is None or upstream is None else cost + upstream


def _money(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        return None
    return amount if amount.is_finite() and 0 <= amount < 1_000_000 else None


def read_error(body: bytes) -> tuple[str, str]:
    """A provider's non-2xx body as (code, message); both may be empty. Never raises.

    Knows OpenAI's envelope, Anthropic's, flat ones (Cerebras, Mistral), a plain string (xAI) and
    a list around any of them (Gemini).
    """
    try:
        answer = json.loads(decompress(body).decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return "", clean_text(re.sub(r"\s+", " ", body[:500].decode("utf-8", "replace")).strip())
    return error_in(answer)


def error_in(answer: Any) -> tuple[str, str]:
    """The same for an answer that is decoded already."""
    if isinstance(answer, list):
        answer = answer[0] if answer else {}
    if not isinstance(answer, dict):
        return "", clean_text(str(answer), limit=500)
    error = answer.get("error", answer)
    if isinstance(error, str):
        return clean_text(str(answer.get("code") or ""), limit=64), clean_text(error, limit=2000)
    if not isinstance(error, dict):
        return "", clean_text(str(error), limit=2000)
    code = error.get("code") or error.get("type") or error.get("status") or ""
    message = error.get("message") or error.get("detail") or ""
    return clean_text(str(code), limit=64), clean_text(str(message), limit=2000)
