from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone

from django_qstash_llm import pricing
from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import InvalidRequest
from django_qstash_llm.models import Batch, LLMRequest
from django_qstash_llm.pricing import Cost, Estimate, Tariff, cost_of, listed, worst_cost

pytestmark = pytest.mark.django_db

AT = datetime(2026, 1, 1, tzinfo=UTC)
USAGE = Usage(input_tokens=1_000_000, output_tokens=100_000)
LATER = datetime(2026, 11, 1, tzinfo=UTC)
SOUND = Usage(input_tokens=100, output_tokens=10, audio_input_tokens=90)
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


def prices(settings: Any, **of_models: Any) -> None:
    named = {name.replace("__", "/"): price for name, price in of_models.items()}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": named}


@pytest.mark.parametrize(
    ("price", "usage", "amount"),
    [
        (Tariff(Decimal(2), Decimal(8)), USAGE, Decimal("2.8")),
        (
            Tariff(Decimal("0.15"), Decimal("0.6")),
            Usage(input_tokens=0, output_tokens=0),
            Decimal(0),
        ),
        (
            Tariff(Decimal(2), Decimal(8), cached=Decimal("0.5")),
            Usage(input_tokens=1_000_000, output_tokens=0, cached_tokens=400_000),
            Decimal("1.4"),
        ),
        (
            Tariff(Decimal(2), Decimal(8), cache_write=Decimal("2.5")),
            Usage(input_tokens=1_000_000, output_tokens=0, cache_write_tokens=1_000_000),
            Decimal("2.5"),
        ),
        (
            Tariff(Decimal(2), Decimal(8)),
            Usage(input_tokens=1_000_000, output_tokens=0, cached_tokens=400_000),
            Decimal(2),
        ),
        (Tariff(Decimal(2), Decimal(8)), Usage(input_tokens=5), None),
        (Tariff(Decimal(2), Decimal(8)), Usage(output_tokens=5), None),
        (Tariff(Decimal(2), Decimal(8)), Usage(), None),
        (
            Tariff(Decimal(2), Decimal(8)),
            Usage(input_tokens=5, output_tokens=5, cached_tokens=6),
            None,
        ),
    ],
)
def test_price_of_usage(price: Tariff, usage: Usage, amount: Decimal | None) -> None:
    assert price.cost(usage) == amount


def test_reported_cost_comes_first(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 1})
    usage = Usage(input_tokens=1, output_tokens=1, reported_cost=Decimal("0.25"))
    assert cost_of("openai", "m", usage, at=AT) == Cost(Decimal("0.25"), "reported")


def test_price_in_the_settings_comes_second(settings: Any) -> None:
    prices(settings, openai__m={"input": "0.15", "output": 0.6})
    assert cost_of("openai", "m", USAGE, at=AT) == Cost(Decimal("0.21"), "setting")


def test_model_that_answered_prices_better_than_the_one_asked(settings: Any) -> None:
    prices(
        settings,
        **{"openai__m": {"input": 1, "output": 1}, "openai__m-2026": {"input": 2, "output": 2}},
    )
    cost = cost_of("openai", "m", USAGE, at=AT, answered_by="m-2026")
    assert cost == Cost(Decimal("2.2"), "setting")
    assert cost_of("openai", "m", USAGE, at=AT, answered_by="m-2027") == Cost(
        Decimal("1.1"), "setting"
    )


def test_price_is_the_providers_own(settings: Any) -> None:
    prices(settings, other__m={"input": 1, "output": 1})
    assert cost_of("openai", "m", USAGE, at=AT) is None


def test_hosted_models_cost_thirty_cents_a_million() -> None:
    assert cost_of("upstash", LLAMA, USAGE, at=AT) == Cost(Decimal("0.33"), "hosted")


def test_price_in_the_settings_wins_over_the_hosted_one(settings: Any) -> None:
    prices(settings, **{f"upstash__{LLAMA}": {"input": 0, "output": 0}})
    assert cost_of("upstash", LLAMA, USAGE, at=AT) == Cost(Decimal(0), "setting")


@pytest.mark.parametrize("usage", [Usage(), Usage(input_tokens=5), Usage(output_tokens=5)])
def test_unknown_tokens_cost_an_unknown_amount_and_not_nothing(settings: Any, usage: Usage) -> None:
    prices(settings, openai__m={"input": 1, "output": 1})
    assert cost_of("openai", "m", usage, at=AT) is None
    assert cost_of("upstash", LLAMA, usage, at=AT) is None
    assert cost_of("openai", "gpt-5.4-mini", usage, at=AT) is None


def test_unknown_model_costs_an_unknown_amount() -> None:
    assert cost_of("nobody", "no-such-model", USAGE, at=AT) is None


@pytest.mark.parametrize(
    "wrong", [{"inputs": 1, "output": 1}, {"input": "free", "output": 1}, {"input": 1}, 7, None]
)
def test_wrong_price_in_the_settings_costs_no_answer(
    settings: Any, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    prices(settings, openai__nonsense=wrong)
    assert cost_of("openai", "nonsense", USAGE, at=AT) is None
    assert wrong is None or "PRICES" in caplog.text


@pytest.mark.parametrize(
    "usage",
    [
        Usage(input_tokens=2**62, output_tokens=2**62),
        Usage(reported_cost=Decimal(10) ** 9),
    ],
)
def test_cost_that_no_column_holds_is_unknown(settings: Any, usage: Usage) -> None:
    prices(settings, openai__m={"input": 1, "output": 1})
    assert cost_of("openai", "m", usage, at=AT) is None


def test_amounts_are_never_floats(settings: Any) -> None:
    prices(settings, openai__m={"input": 0.1, "output": 0.2})
    cost = cost_of("openai", "m", Usage(input_tokens=1, output_tokens=1), at=AT)
    assert cost is not None
    assert cost.amount == Decimal("0.0000003")


@pytest.mark.skipif(
    importlib.util.find_spec("genai_prices") is not None, reason="the costs extra is installed"
)
def test_without_the_costs_extra_a_model_is_unpriced() -> None:
    assert cost_of("openai", "gpt-4o-mini", USAGE, at=AT) is None


@pytest.fixture
def at_its_own_place(settings: Any) -> None:
    providers = {"openai": {"API_KEY": "sk-x"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": providers}


@pytest.mark.usefixtures("at_its_own_place")
class TestWithTheCostsExtra:
    @pytest.fixture(autouse=True)
    def _extra(self) -> None:
        pytest.importorskip("genai_prices")

    def test_known_model_is_priced(self) -> None:
        cost = cost_of("openai", "gpt-4o-mini", USAGE, at=AT)
        assert cost == Cost(Decimal("0.21"), "genai-prices")

    def test_cached_tokens_are_cheaper(self) -> None:
        usage = Usage(input_tokens=1_000_000, output_tokens=0, cached_tokens=1_000_000)
        cost = cost_of("openai", "gpt-4o-mini", usage, at=AT)
        assert cost is not None
        assert cost.amount == Decimal("0.075")

    def test_version_that_answered_is_enough(self) -> None:
        cost = cost_of("openai", "alias", USAGE, at=AT, answered_by="gpt-4o-mini-2024-07-18")
        assert cost is not None
        assert cost.source == "genai-prices"

    @pytest.mark.parametrize(
        "usage",
        [
            Usage(input_tokens=1, output_tokens=1, cached_tokens=5),
            Usage(input_tokens=1, output_tokens=1, cache_write_tokens=5),
            Usage(input_tokens=2**62, output_tokens=2**62),
        ],
    )
    def test_usage_that_makes_no_sense_is_unpriced(self, usage: Usage) -> None:
        assert cost_of("openai", "gpt-4o-mini", usage, at=AT) is None

    def test_unknown_model_and_provider_are_unpriced(self) -> None:
        assert cost_of("openai", "no-such-model", USAGE, at=AT) is None
        assert cost_of("my own server", "gpt-4o-mini", USAGE, at=AT) is None

    @pytest.mark.parametrize("tier", ["", "flex", "priority", "batch"])
    @pytest.mark.parametrize("tokens", [1000, 272_000, 272_001])
    @pytest.mark.parametrize("model", ["gpt-5.4", "gpt-5.4-mini", "gpt-5"])
    def test_cost_is_what_genai_prices_itself_works_out(
        self, model: str, tokens: int, tier: str
    ) -> None:
        from genai_prices import Usage as GenaiUsage
        from genai_prices import calc_price

        usage = Usage(input_tokens=tokens, output_tokens=777, cached_tokens=500)
        theirs = GenaiUsage(input_tokens=tokens, output_tokens=777, cache_read_tokens=500)
        context = {"processing": "batch"} if tier == "batch" else {"service_tier": tier}
        said = calc_price(
            theirs,
            model,
            provider_id="openai",
            genai_request_timestamp=LATER,
            price_context=context if tier else None,
        )
        cost = cost_of("openai", model, usage, at=LATER, service_tier=tier)
        assert cost == Cost(said.total_price, "genai-prices")

    def test_tier_it_does_not_know_is_unpriced_and_not_the_standard_one(self) -> None:
        assert cost_of("openai", "gpt-5.4-mini", USAGE, at=LATER, service_tier="scale") is None
        assert cost_of("openai", "gpt-4o-audio-preview", SOUND, at=LATER) is None

    def test_price_it_does_not_know_is_not_made_up_of_others(self) -> None:
        hour = {"cache_write_tokens": 10, "cache_write_1h_tokens": 10}
        usage = Usage(input_tokens=10, output_tokens=0, **hour)
        cost = cost_of("anthropic", "claude-sonnet-4-5", usage, at=LATER)
        assert cost is None or cost.amount == Decimal("0.00006")

    def test_names_that_it_does_not_know_do_not_pile_up(self) -> None:
        from genai_prices import data_snapshot

        snapshot = data_snapshot.get_snapshot()
        for number in range(pricing.MOST_MISSES + 50):
            assert cost_of("openai", f"junk-{number}", USAGE, at=AT) is None
            assert cost_of(f"nobody-{number}", "m", USAGE, at=AT) is None
        assert len(snapshot._provider_cache) <= pricing.MOST_MISSES + 1
        assert len(snapshot._provider_misses) <= pricing.MOST_MISSES + 1

    def test_what_it_lists_prices_the_same_when_it_is_ours(self) -> None:
        found = listed("openai", "gpt-5.4", at=LATER)
        assert found["", 0] | {} == {
            "input": Decimal("2.5"),
            "cached": Decimal("0.25"),
            "output": Decimal(15),
            "web_search": Decimal(10_000),
        }
        assert found["", 272_000]["input"] == 5
        assert {tier for tier, _ in found} == {"", "flex", "priority", "batch"}
        assert listed("openai", "no-such-model", at=LATER) == {}


# --- how a cost comes about ---


def test_cost_says_what_it_is_made_of(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 2, "cached": "0.5", "reasoning": 4})
    usage = Usage(input_tokens=10, cached_tokens=4, output_tokens=5, reasoning_tokens=3)
    cost = cost_of("openai", "m", usage, at=AT)
    assert cost is not None
    assert [tuple(line) for line in cost.lines] == [
        ("input", 6, 1),
        ("cached", 4, Decimal("0.5")),
        ("output", 2, 2),
        ("reasoning", 3, 4),
    ]
    assert cost.basis == {
        "price": "PRICES openai/m",
        "at": AT.isoformat(),
        "lines": [
            ["input", 6, "1"],
            ["cached", 4, "0.5"],
            ["output", 2, "2"],
            ["reasoning", 3, "4"],
        ],
    }
    assert pricing.read_basis(cost.basis) == cost.lines
    assert pricing.read_basis({}) == ()


@pytest.mark.parametrize(
    "usage",
    [
        Usage(input_tokens=10, output_tokens=1, audio_input_tokens=1),
        Usage(input_tokens=10, output_tokens=1, audio_output_tokens=1),
        Usage(input_tokens=10, output_tokens=1, image_output_tokens=1),
        Usage(input_tokens=10, output_tokens=1, web_searches=1),
        Usage(input_tokens=10, output_tokens=1, cache_write_tokens=2, cache_write_1h_tokens=1),
        Usage(input_tokens=10, output_tokens=1, cache_write_1h_tokens=1),
    ],
)
def test_class_that_is_dear_is_not_taken_for_text(usage: Usage) -> None:
    tariff = Tariff(Decimal(1), Decimal(1), cache_write=Decimal("1.25"))
    assert tariff.cost(usage) is None
    whole = Tariff(*[Decimal(1)] * len(pricing.CLASSES))
    known = usage.cache_write_tokens or not usage.cache_write_1h_tokens
    assert (whole.cost(usage) is not None) == bool(known)


def test_classes_that_overlap_are_unknown_only_where_it_matters() -> None:
    usage = Usage(input_tokens=10, output_tokens=0, cached_tokens=8, audio_input_tokens=8)
    one = Tariff(Decimal(1), Decimal(1), audio_input=Decimal(5))
    assert one.cost(usage) == Decimal("0.000042")
    assert (
        Tariff(Decimal(1), Decimal(1), Decimal("0.1"), audio_input=Decimal(5)).cost(usage) is None
    )


# --- before it is asked ---

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


def worst(**parameters: Any) -> Decimal | None:
    return worst_cost("openai", "m", ASKED, parameters, at=AT)


def test_worst_cost_is_the_longest_input_and_all_of_the_output(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 2, "cached": "0.1"})
    most = pricing.estimate("openai", "m", ASKED, {"max_tokens": 50}, at=AT)
    assert most.most_output_tokens == 50
    assert worst(max_tokens=50) == (most.most_input_tokens + 100) / pricing.MILLION == most.most
    assert most.least is not None
    assert 0 < most.least < most.most
    assert worst(max_completion_tokens=50, n=3) - worst(max_tokens=50) == 200 / pricing.MILLION
    assert worst_cost("openai", "unheard-of", ASKED, at=AT) is None


def test_worst_cost_is_of_the_dearest_class(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 1, "cache_write": 3, "reasoning": 5})
    tokens = pricing.estimate("openai", "m", ASKED, {"max_tokens": 10}, at=AT).most_input_tokens
    assert worst(max_tokens=10) == (3 * tokens + 50) / pricing.MILLION


def test_worst_cost_of_sound_without_a_price_is_unknown(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 1})
    assert worst(modalities=["text", "audio"]) is None
    prices(settings, openai__m={"input": 1, "output": 1, "audio_output": 80})
    assert worst(modalities=["text", "audio"], max_tokens=1_000_000) > 80
    assert worst(service_tier="flex") is None


@pytest.mark.parametrize(
    ("provider", "parameters", "cap"),
    [
        ("openai", {}, 16_384),
        ("openai", {"max_tokens": 9, "max_completion_tokens": 7}, 7),
        ("openai", {"max_tokens": "many"}, 16_384),
        ("openai", {"max_output_tokens": 5, "n": 2}, 10),
        ("anthropic", {}, 4096),
        ("anthropic", {"max_tokens": 5}, 5),
    ],
)
def test_output_has_a_cap(provider: str, parameters: Any, cap: int) -> None:
    assert pricing.output_cap(provider, "m", parameters) == cap


def test_cap_in_the_settings_is_the_most_specific(settings: Any) -> None:
    caps = {"*": 100, "openai/gpt-5*": 200, "openai/gpt-5-mini": 300}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"OUTPUT_CAP": caps}
    models = ("o9", "gpt-5-nano", "gpt-5-mini")
    assert [pricing.output_cap("openai", model, {}) for model in models] == [100, 200, 300]


def test_estimates_are_added_and_count_what_is_unpriced(settings: Any) -> None:
    prices(settings, openai__m={"input": 1, "output": 2})
    one = LLMRequest.objects.estimate(ASKED, model="m", max_tokens=10)
    other = LLMRequest.objects.estimate(ASKED, model="unheard-of", max_tokens=10)
    assert (other.least, other.most, other.unpriced) == (None, None, 1)
    both = Batch.objects.estimate(
        [
            {"messages": ASKED, "model": "m"},
            {"messages": ASKED, "model": "unheard-of", "queue": "q"},
        ],
        max_tokens=10,
    )
    assert both == one + other == other + one
    assert (both.requests, both.unpriced, both.most) == (2, 1, one.most)
    assert both.input_tokens == 2 * one.input_tokens
    assert sum([], Estimate()) == Estimate()
    assert not LLMRequest.objects.exists()


@pytest.mark.parametrize("asked", [{"messages": []}, {"messages": ASKED, "retries": -1}])
def test_what_cannot_be_asked_cannot_be_estimated(asked: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages|retries"):
        LLMRequest.objects.estimate(**asked)
    with pytest.raises(InvalidRequest, match="items"):
        Batch.objects.estimate([asked])
    with pytest.raises(InvalidRequest, match="items"):
        Batch.objects.estimate([])


def test_a_setting_that_is_changed_in_place_is_seen(settings: Any) -> None:
    prices: dict[str, Any] = {}
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "PRICES": prices}

    def amounts() -> tuple[Decimal, str] | None:
        found = pricing.find_tariff("openai", ["in-place"], at=timezone.now())
        return None if found is None else (found.tariff.input, found.price)

    assert amounts() is None
    prices["openai/in-*"] = {"input": 1, "output": 2}
    assert amounts() == amounts() == (1, "PRICES openai/in-*")
    prices["openai/in-*"]["input"] = 3
    assert amounts() == (3, "PRICES openai/in-*")
    prices["openai/in-place"] = {"input": 4, "output": 2}
    assert amounts() == (4, "PRICES openai/in-place")
    del prices["openai/in-place"]
    assert amounts() == (3, "PRICES openai/in-*")
    prices["openai/in-place"] = "wrong"  # the next best, and it is logged
    assert amounts() == (3, "PRICES openai/in-*")
