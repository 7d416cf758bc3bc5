"""Usage as providers tell it, and what it costs, worked out by hand beside each.

Where a body is from: *recorded* is a provider's own answer, kept in public tests (most in those of
pydantic-ai, MIT); *documented* is in a vendor's reference; *shape* has the vendor's fields and numbers of
ours, where what is tested has to be large or is rarely recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from django_qstash_llm.completions import read_usage
from django_qstash_llm.models import Price
from django_qstash_llm.models.price import forget_prices
from django_qstash_llm.pricing import cost_of

pytestmark = pytest.mark.django_db

AT = datetime(2026, 11, 1, tzinfo=UTC)

# provider, model, tier, above -> USD per million
PRICES: dict[tuple[str, str, str, int], dict[str, str]] = {
    ("openai", "gpt-4o-2024*", "", 0): {"input": "2.5", "cached": "1.25", "output": "10"},
    ("openai", "gpt-4o-audio*", "", 0): {
        "input": "2.5", "output": "10", "audio_input": "40", "audio_output": "80",
    },
    ("openai", "gpt-4.1-mini*", "", 0): {"input": "0.4", "cached": "0.1", "output": "1.6"},
    ("openai", "gpt-5.4-mini*", "", 0): {"input": "0.75", "cached": "0.075", "output": "4.5"},
    ("openai", "gpt-5.4-mini*", "flex", 0): {"input": "0.375", "cached": "0.0375", "output": "2.25"},
    ("openai", "gpt-5.4-mini*", "priority", 0): {"input": "1.5", "cached": "0.15", "output": "9"},
    ("openai", "gpt-5.4", "", 0): {"input": "2.5", "cached": "0.25", "output": "15"},
    ("openai", "gpt-5.4", "", 272_000): {"input": "5", "cached": "0.5", "output": "22.5"},
    ("anthropic", "claude-sonnet-4-5*", "", 0): {
        "input": "3", "cached": "0.3", "cache_write": "3.75", "cache_write_1h": "6", "output": "15",
        "web_search": "10000",
    },
    ("anthropic", "claude-sonnet-4-5*", "batch", 0): {
        "input": "1.5", "cached": "0.15", "cache_write": "1.875", "cache_write_1h": "3",
        "output": "7.5",
    },
    ("anthropic", "claude-sonnet-4-5*", "", 200_000): {
        "input": "6", "cached": "0.6", "cache_write": "7.5", "cache_write_1h": "12",
        "output": "22.5",
    },
    ("anthropic", "claude-sonnet-5-5", "", 0): {
        "input": "2", "cached": "0.2", "cache_write": "2.5", "cache_write_1h": "4", "output": "10",
    },
    ("anthropic", "claude-opus-4-5*", "", 0): {
        "input": "5", "cached": "0.5", "cache_write": "6.25", "cache_write_1h": "10", "output": "25",
    },
    ("anthropic", "claude-opus-4-5*", "us", 0): {"input": "5.5", "output": "27.5"},
    ("anthropic", "claude-haiku-4-5*", "", 0): {"input": "1", "output": "5"},
    ("google", "gemini-2.5-pro", "", 0): {"input": "1.25", "cached": "0.125", "output": "10"},
    ("google", "gemini-2.5-flash", "", 0): {
        "input": "0.3", "audio_input": "1", "output": "2.5", "image_output": "30",
    },
    ("google", "gemini-flash-lite-latest", "", 0): {"input": "0.1", "output": "0.4"},
    ("google", "gemini-3-flash*", "", 0): {"input": "0.5", "output": "3"},
    ("deepseek", "deepseek-*", "", 0): {"input": "0.28", "cached": "0.028", "output": "0.42"},
    ("x-ai", "grok-4*", "", 0): {"input": "3", "cached": "0.75", "output": "15"},
    ("groq", "openai/gpt-oss-120b", "", 0): {"input": "0.15", "output": "0.6"},
    ("cerebras", "llama-3.3-70b", "", 0): {"input": "0.85", "output": "1.2"},
    ("mistral", "mistral-large*", "", 0): {"input": "0.5", "output": "1.5"},
    ("meta", "muse-spark-1.3", "", 0): {"input": "1.25", "output": "4.25"},
    ("moonshot", "kimi-k2", "", 0): {"input": "0.6", "cached": "0.15", "output": "2.5"},
    ("openrouter", "*", "", 0): {"input": "99", "output": "99"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _prices() -> Iterator[None]:
    Price.objects.bulk_create(
        Price(
            provider=provider, model=model, tier=tier, above=above, token_class=token_class,
            amount=amount, since=datetime(2026, 1, 1, tzinfo=UTC),
        )
        for (provider, model, tier, above), amounts in PRICES.items()
        for token_class, amount in amounts.items()
    )  # fmt: skip
    forget_prices()
    yield
    forget_prices()


def openai(prompt: int, completion: int, **details: int) -> dict[str, Any]:
    """As OpenAI tells it, with all that it tells."""
    output = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0} | details,
        "completion_tokens_details": output | {"rejected_prediction_tokens": 0},
    }


def anthropic(fresh: int, output: int, **more: Any) -> dict[str, Any]:
    at_first = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    told = {"input_tokens": fresh, "output_tokens": output, "service_tier": "standard"}
    return told | at_first | {"inference_geo": "not_available"} | more


def perplexity(prompt: int, completion: int, **cost: float) -> dict[str, Any]:
    told = {"prompt_tokens": prompt, "completion_tokens": completion, "search_context_size": "low"}
    return told | {"total_tokens": prompt + completion, "cost": cost}


BODIES: list[tuple[str, str, str, str, Any, str | None]] = [
    # 79 x 2.5 + 11 x 10 = 307.5
    ("recorded, OpenAI", "openai", "gpt-4o-2024-08-06", "default", openai(79, 11), "0.0003075"),
    # 75 x 0.4 + 15 x 1.6 = 54
    ("recorded, OpenAI, older", "openai", "gpt-4.1-mini-2025-04-14", "default", openai(75, 15), "0.000054"),
    # 69 of 81 are sound: 12 x 2.5 + 69 x 40 + 72 x 10 = 30 + 2,760 + 720 = 3,510
    ("recorded, OpenAI, audio", "openai", "gpt-4o-audio-preview-2024-12-17", "default",
     openai(81, 72, audio_tokens=69, image_tokens=0, text_tokens=12), "0.00351"),
    # sound, and no price for sound: not 81 x 2.5 + 72 x 10
    ("recorded, OpenAI, audio that has no price", "openai", "gpt-4o-2024-08-06", "default",
     openai(81, 72, audio_tokens=69), None),
    # 3,652 x 0.375 + 263 x 2.25 = 1,369.5 + 591.75 = 1,961.25
    ("recorded, OpenAI, as flex", "openai", "gpt-5.4-mini", "flex", openai(3652, 263), "0.00196125"),
    # 3,652 x 1.5 + 263 x 9 = 5,478 + 2,367 = 7,845
    ("recorded, OpenAI, as priority", "openai", "gpt-5.4-mini", "priority", openai(3652, 263), "0.007845"),
    # a tier that has no price is not the standard's
    ("recorded, OpenAI, as scale", "openai", "gpt-5.4-mini", "scale", openai(3652, 263), None),
    # 86 x 0.75 + 1,920 x 0.075 + 300 x 4.5 = 64.5 + 144 + 1,350 = 1,558.5
    ("documented, OpenAI, cached", "openai", "gpt-5.4-mini-2026-03-17", "default",
     openai(2006, 300, cached_tokens=1920), "0.0015585"),
    # 800 x 0.75 + 1,200 x 0.075 + 180 x 4.5 = 600 + 90 + 810 = 1,500; the reasoning is inside
    ("shape, OpenAI's Responses", "openai", "gpt-5.4-mini", "default",
     {"input_tokens": 2000, "input_tokens_details": {"cached_tokens": 1200, "cache_write_tokens": 0},
      "output_tokens": 180, "output_tokens_details": {"reasoning_tokens": 32}}, "0.0015"),
    # not longer than 272,000: 272,000 x 2.5 + 1,000 x 15 = 680,000 + 15,000 = 695,000
    ("shape, OpenAI, nearly long", "openai", "gpt-5.4", "default", openai(272_000, 1000), "0.695"),
    # 72,001 x 5 + 200,000 x 0.5 + 1,000 x 22.5 = 360,005 + 100,000 + 22,500 = 482,505
    ("shape, OpenAI, long context", "openai", "gpt-5.4", "default",
     openai(272_001, 1000, cached_tokens=200_000), "0.482505"),
    # 20 x 3 + 10 x 15 = 60 + 150 = 210
    ("recorded, Anthropic", "anthropic", "claude-sonnet-4-5-20250929", "", anthropic(20, 10), "0.00021"),
    # 3 x 3 + 1,111 x 0.3 + 406 x 15 = 9 + 333.3 + 6,090 = 6,432.3
    ("recorded, Anthropic, cached", "anthropic", "claude-sonnet-4-5-20250929", "",
     anthropic(3, 406, cache_read_input_tokens=1111), "0.0064323"),
    # 2 x 5 + 10,408 x 10 + 14,265 x 0.5 + 1 x 25 = 10 + 104,080 + 7,132.5 + 25 = 111,247.5
    ("recorded, Anthropic, kept for an hour", "anthropic", "claude-opus-4-5-20251101", "",
     anthropic(2, 1, cache_creation_input_tokens=10_408, cache_read_input_tokens=14_265,
               cache_creation={"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 10_408}),
     "0.1112475"),
    # 2 x 2 + 1,273 x 4 + 113 x 10 = 4 + 5,092 + 1,130 = 6,226, which is what its CLI said as well
    ("recorded, Anthropic, and its own estimate", "anthropic", "claude-sonnet-5-5", "",
     anthropic(2, 113, cache_creation_input_tokens=1273, speed="standard",
               cache_creation={"ephemeral_1h_input_tokens": 1273, "ephemeral_5m_input_tokens": 0},
               output_tokens_details={"thinking_tokens": 0},
               server_tool_use={"web_search_requests": 0, "web_fetch_requests": 0}), "0.006226"),
    # 12 x 1 + 54 x 5 = 282
    ("recorded, Anthropic, small", "anthropic", "claude-haiku-4-5", "", anthropic(12, 54), "0.000282"),
    # 10 x 1.5 + 5 x 7.5 = 15 + 37.5 = 52.5
    ("shape, Anthropic, batch", "anthropic", "claude-sonnet-4-5", "",
     anthropic(10, 5, service_tier="batch"), "0.0000525"),
    # 520 x 3 + 1,800 x 0.3 + 900 x 6 + 180 x 15 + 2 searches x 10,000
    # = 1,560 + 540 + 5,400 + 2,700 + 20,000 = 30,200
    ("shape, Anthropic, web search", "anthropic", "claude-sonnet-4-5", "",
     anthropic(520, 180, cache_read_input_tokens=1800, cache_creation_input_tokens=900,
               cache_creation={"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 900},
               server_tool_use={"web_search_requests": 2}), "0.0302"),
    # 200,001 in all: 1 x 6 + 150,000 x 0.6 + 50,000 x 7.5 + 100 x 22.5
    # = 6 + 90,000 + 375,000 + 2,250 = 467,256
    ("shape, Anthropic, long context", "anthropic", "claude-sonnet-4-5", "",
     anthropic(1, 100, cache_read_input_tokens=150_000, cache_creation_input_tokens=50_000), "0.467256"),
    # 1,000 x 5.5 + 100 x 27.5 = 5,500 + 2,750 = 8,250
    ("shape, Anthropic, kept to the US", "anthropic", "claude-opus-4-5", "",
     anthropic(1000, 100, inference_geo="us"), "0.00825"),
    ("shape, Anthropic, a search that has no price", "anthropic", "claude-opus-4-5", "",
     anthropic(520, 180, server_tool_use={"web_search_requests": 1}), None),
    ("shape, Anthropic, fast in a batch in the US", "anthropic", "claude-opus-4-5", "",
     anthropic(1200, 900, speed="fast", service_tier="batch", inference_geo="us"), None),
    # 12 x 0.28 + 789 x 0.42 = 3.36 + 331.38 = 334.74
    ("recorded, DeepSeek, reasoning", "deepseek", "deepseek-reasoner", "",
     {"prompt_tokens": 12, "completion_tokens": 789, "total_tokens": 801,
      "completion_tokens_details": {"reasoning_tokens": 415}, "prompt_cache_hit_tokens": 0,
      "prompt_cache_miss_tokens": 12, "prompt_tokens_details": {"cached_tokens": 0}}, "0.00033474"),
    # 601 x 0.28 + 7,936 x 0.028 + 1 x 0.42 = 168.28 + 222.208 + 0.42 = 390.908
    ("recorded, DeepSeek, cached", "deepseek", "deepseek-chat", "",
     {"prompt_tokens": 8537, "prompt_cache_hit_tokens": 7936, "prompt_cache_miss_tokens": 601,
      "completion_tokens": 1}, "0.000390908"),
    # thoughts are beside the candidates: 15 x 1.25 + (8 + 285) x 10 = 18.75 + 2,930 = 2,948.75
    ("recorded, Gemini", "google", "gemini-2.5-pro", "",
     {"promptTokenCount": 15, "candidatesTokenCount": 8, "thoughtsTokenCount": 285,
      "totalTokenCount": 308, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 15}]},
     "0.00294875"),
    # 844 x 0.3 + (46 + 1,150) x 2.5 = 253.2 + 2,990 = 3,243.2
    ("recorded, Gemini, cut in its thoughts", "google", "gemini-2.5-flash", "",
     {"promptTokenCount": 844, "candidatesTokenCount": 46, "totalTokenCount": 2040,
      "thoughtsTokenCount": 1150, "serviceTier": "standard"}, "0.0032432"),
    # 34 x 0.5 + (418 + 438) x 3 = 17 + 2,568 = 2,585
    ("documented, Gemini", "google", "gemini-3-flash-preview", "",
     {"promptTokenCount": 34, "candidatesTokenCount": 418, "totalTokenCount": 890,
      "thoughtsTokenCount": 438}, "0.002585"),
    # 6 x 0.1 + 37 x 0.4 = 0.6 + 14.8 = 15.4
    ("recorded, Gemini, small", "google", "gemini-flash-lite-latest", "",
     {"promptTokenCount": 6, "candidatesTokenCount": 37, "totalTokenCount": 43,
      "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 6}], "serviceTier": "standard"},
     "0.0000154"),
    # 20 x 0.3 + 100 x 1 + 10 x 2.5 + 1,290 x 30 = 6 + 100 + 25 + 38,700 = 38,831
    ("shape, Gemini, sound in and an image out", "google", "gemini-2.5-flash", "",
     {"promptTokenCount": 120, "candidatesTokenCount": 1300, "totalTokenCount": 1420,
      "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 100}, {"modality": "TEXT", "tokenCount": 20}],
      "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1290}]}, "0.038831"),
    # the completion leaves the reasoning out, the total does not: 21 x 0.3 + 60 x 2.5 = 156.3
    ("recorded, Gemini in OpenAI's words", "google", "gemini-2.5-flash", "",
     {"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81,
      "completion_tokens_details": {"reasoning_tokens": 60}}, "0.0001563"),
    # out are 135 - 32 = 103: 26 x 3 + 6 x 0.75 + 103 x 15 = 78 + 4.5 + 1,545 = 1,627.5
    ("documented, xAI, reasoning left out", "x-ai", "grok-4", "",
     {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135,
      "prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "cached_tokens": 6},
      "completion_tokens_details": {"reasoning_tokens": 94}, "num_sources_used": 0}, "0.0016275"),
    # 318,319,000 ticks of which a dollar has 10,000,000,000, its searches included
    ("recorded, xAI, reported", "x-ai", "grok-4", "",
     {"input_tokens": 9212, "input_tokens_details": {"cached_tokens": 3072}, "output_tokens": 3417,
      "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12_629,
      "num_server_side_tools_used": 3, "cost_in_usd_ticks": 318_319_000}, "0.0318319"),
    # 178 x 0.15 + 94 x 0.6 = 26.7 + 56.4 = 83.1
    ("recorded, Groq", "groq", "openai/gpt-oss-120b", "on_demand",
     {"queue_time": 1.095749809, "prompt_tokens": 178, "prompt_time": 0.008149307,
      "completion_tokens": 94, "completion_time": 0.186978247, "total_tokens": 272}, "0.0000831"),
    # 42 x 0.85 + 8 x 1.2 = 35.7 + 9.6 = 45.3
    ("recorded, Cerebras", "cerebras", "llama-3.3-70b", "",
     {"prompt_tokens": 42, "completion_tokens": 8, "total_tokens": 50,
      "prompt_tokens_details": {"cached_tokens": 0}}, "0.0000453"),
    # 49 x 0.5 + 69 x 1.5 = 24.5 + 103.5 = 128
    ("recorded, Mistral", "mistral", "mistral-large-latest", "",
     {"prompt_tokens": 49, "completion_tokens": 69, "total_tokens": 118,
      "prompt_tokens_details": {"cached_tokens": 0}}, "0.000128"),
    # 12 x 1.25 + 556 x 4.25 = 15 + 2,363 = 2,378
    ("recorded, Meta, nearly all reasoning", "meta", "muse-spark-1.3", "",
     {"prompt_tokens": 12, "completion_tokens": 556, "total_tokens": 568,
      "completion_tokens_details": {"reasoning_tokens": 524}}, "0.002378"),
    # 5 x 0.6 + 4 x 0.15 + 3 x 2.5 = 3 + 0.6 + 7.5 = 11.1
    ("shape, Moonshot, cached at top level", "moonshot", "kimi-k2", "",
     {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "cached_tokens": 4}, "0.0000111"),
    # as reported, and not 20 x 99 + 48 x 99
    ("recorded, OpenRouter", "openrouter", "moonshotai/kimi-k2.5", "",
     openai(20, 48) | {"cost": 0.000156, "is_byok": False,
                       "cost_details": {"upstream_inference_cost": 0.000156}}, "0.000156"),
    ("recorded, OpenRouter, reasoning", "openrouter", "openai/gpt-5-mini", "",
     openai(17, 1763) | {"cost": 0.00353025, "is_byok": False}, "0.00353025"),
    # its fee is most of it: 0.00001 + 0.00005 + 0.005
    ("recorded, Perplexity", "perplexity", "sonar", "",
     perplexity(5, 54, input_tokens_cost=1e-05, output_tokens_cost=5e-05, request_cost=0.005, total_cost=0.00506),
     "0.00506"),
    # 0.000024 + 0.006585 + 0.006
    ("documented, Perplexity", "perplexity", "sonar-pro", "",
     perplexity(8, 439, input_tokens_cost=2.4e-05, output_tokens_cost=0.006585, request_cost=0.006, total_cost=0.012609),
     "0.012609"),
    ("recorded, of a model without a price", "vllm", "qwen38-quasar", "",
     {"completion_tokens": 16_000, "completion_tokens_details": {"reasoning_tokens": 16_000},
      "prompt_tokens": 9839, "prompt_tokens_details": {"cached_tokens": 0}, "total_tokens": 25_839}, None),
    ("a server that counts nothing", "openai", "gpt-5.4-mini", "", None, None),
]  # fmt: skip


def test_there_are_enough_of_them_and_most_are_no_inventions() -> None:
    assert len(BODIES) >= 30
    assert sum(name.startswith(("recorded", "documented")) for name, *_ in BODIES) >= 24


@pytest.mark.parametrize(
    ("provider", "model", "tier", "body", "dollars"),
    [pytest.param(*body[1:], id=body[0]) for body in BODIES],
)
def test_body_costs_what_it_costs_by_hand(
    provider: str, model: str, tier: str, body: Any, dollars: str | None
) -> None:
    usage = read_usage(body)
    cost = cost_of(provider, "an-alias", usage, at=AT, answered_by=model, service_tier=tier)
    assert (cost and cost.amount) == (dollars and Decimal(dollars))
    if cost and cost.lines:
        assert sum(line.amount for line in cost.lines) == cost.amount
        if cost.lines[0].token_class != "web_search":
            tokens = [line.number for line in cost.lines if line.token_class != "web_search"]
            assert sum(tokens) == (usage.input_tokens or 0) + (usage.output_tokens or 0)
