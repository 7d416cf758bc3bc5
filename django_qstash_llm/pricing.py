"""What a completion cost. Money is ``Decimal`` USD; an unpriced model is None, never 0.

In order: what the provider reported, ``QSTASH_LLM["PRICES"]``, the hosted models' price, and
genai-prices where the ``costs`` extra is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from .completions import Usage
from .conf import app_settings
from .exceptions import ConfigurationError
from .providers import HOSTED_MODELS

logger = logging.getLogger(__name__)

MILLION = Decimal(1_000_000)
_ABSURD = Decimal(10_000_000)
_STANDARD_TIERS = {"", "auto", "default", "standard"}
HOSTED_PRICE = Decimal("0.3")
"""USD per million tokens of Upstash's hosted models, input and output alike."""


@dataclass(frozen=True)
class Price:
    """USD per million tokens. A class that is not given costs what its whole costs."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    cache_write: Decimal | None = None

    def cost(self, usage: Usage) -> Decimal | None:
        """None when the tokens are unknown."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
        plain = usage.input_tokens - cached - written
        if plain < 0:
            return None
        amount = plain * self.input + usage.output_tokens * self.output
        amount += cached * (self.input if self.cached is None else self.cached)
        amount += written * (self.input if self.cache_write is None else self.cache_write)
        return amount / MILLION


@dataclass(frozen=True)
class Cost:
    amount: Decimal
    source: str
    """``reported``, ``setting``, ``hosted`` or ``genai-prices``."""


def cost_of(
    provider: str,
    model: str,
    usage: Usage,
    *,
    at: datetime,
    answered_by: str = "",
    service_tier: str = "",
) -> Cost | None:
    """The cost of a completion, or None when it cannot be known. Never raises.

    ``model`` is the one asked for and ``answered_by`` the one that answered, which prices better:
    it carries the version. Our prices are the standard tier's.
    """
    if usage.reported_cost is None and service_tier not in _STANDARD_TIERS:
        return None
    cost = _known_cost(provider, model, usage, at, answered_by)
    # No column holds it, and nobody has paid it.
    return cost if cost and 0 <= cost.amount < _ABSURD else None


def _known_cost(
    provider: str, model: str, usage: Usage, at: datetime, answered_by: str
) -> Cost | None:
    if usage.reported_cost is not None:
        return Cost(usage.reported_cost, "reported")
    names = [name for name in (answered_by, model) if name]
    for name in names:
        price = _price_in_settings(provider, name)
        if price is not None:
            return _cost(price, usage, "setting")
    if provider == "upstash" and model in HOSTED_MODELS:
        return _cost(Price(HOSTED_PRICE, HOSTED_PRICE), usage, "hosted")
    return next(
        (cost for name in names if (cost := _genai_prices_cost(provider, name, usage, at))), None
    )


def _cost(price: Price, usage: Usage, source: str) -> Cost | None:
    amount = price.cost(usage)
    return None if amount is None else Cost(amount, source)


def _price_in_settings(provider: str, model: str) -> Price | None:
    name = f"{provider}/{model}"
    given = app_settings().prices.get(name)
    if given is None:
        return None
    try:
        return read_price(name, given)
    except ConfigurationError as error:
        # The answer has come and is paid for. It is kept, unpriced.
        logger.error("%s", error)
        return None


def read_price(name: str, given: Mapping[str, Any]) -> Price:
    """An entry of ``QSTASH_LLM["PRICES"]``. Raises ``ConfigurationError``."""
    problem = (
        f"QSTASH_LLM['PRICES'][{name!r}] is {given!r}: give 'input' and 'output', and if they "
        "differ 'cached' and 'cache_write', in USD per million tokens."
    )
    try:
        amounts = {kind: Decimal(str(amount)) for kind, amount in given.items()}
        price = Price(**amounts)
    except (TypeError, AttributeError, InvalidOperation) as error:
        raise ConfigurationError(problem) from error
    if not all(amount.is_finite() and 0 <= amount < _ABSURD for amount in amounts.values()):
        raise ConfigurationError(problem)
    return price


def _genai_prices_cost(provider: str, model: str, usage: Usage, at: datetime) -> Cost | None:
    try:
        # Imported when first needed: it is 100 MB in memory and most of a second.
        from genai_prices import Usage as GenaiUsage
        from genai_prices import calc_price
    except ImportError:
        return None
    base_url = app_settings().providers.get(provider, {}).get("BASE_URL")
    if Price(MILLION, MILLION).cost(usage) is None:
        return None  # unknown, or more from the cache than there was
    try:
        calculation = calc_price(
            GenaiUsage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=usage.cached_tokens,
                cache_write_tokens=usage.cache_write_tokens,
            ),
            model,
            # An entry that is reached elsewhere has that place's prices, whatever its name.
            **({"provider_api_url": base_url} if base_url else {"provider_id": provider}),
            genai_request_timestamp=at,
        )
    except (LookupError, ValueError):
        return None
    return Cost(calculation.total_price, "genai-prices")
