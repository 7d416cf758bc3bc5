from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from django_qstash_llm.completions import Usage
from django_qstash_llm.pricing import Cost, Tariff, cost_of

pytestmark = pytest.mark.django_db

AT = datetime(2026, 1, 1, tzinfo=UTC)
USAGE = Usage(input_tokens=1_000_000, output_tokens=100_000)
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
