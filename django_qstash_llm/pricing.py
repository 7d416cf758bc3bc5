"""What a completion cost. Money is ``Decimal`` USD; an unpriced model is None, never 0.

In order: what the provider reported, our own dated prices (``models.Price``),
``QSTASH_LLM["PRICES"]``, the hosted models' price, and genai-prices where the ``costs`` extra is
installed. The first that knows the model decides; what it does not know is not looked up further down.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, NamedTuple, cast

from . import estimates
from .completions import Usage
from .conf import app_settings
from .exceptions import ConfigurationError
from .providers import HOSTED_MODELS, get_provider

logger = logging.getLogger(__name__)

MILLION = Decimal(1_000_000)
ABSURD = Decimal(10_000_000)
"""USD: what no price is."""
MOST_OF_AN_ANSWER = Decimal(10_000)
"""USD: a hundred times what the dearest model's longest answer costs. More is an error, of the unit say,
and a thousand such are more than the columns of sums hold."""
STANDARD_TIERS = frozenset({"", "auto", "default", "standard", "on_demand"})
"""Words of providers for their standard tier."""
HOSTED_PRICE = Decimal("0.3")
"""USD per million tokens of Upstash's hosted models, input and output alike."""
HOSTED_SINCE = datetime(2024, 6, 1, tzinfo=UTC)
OUTPUT_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Parameters by which a request caps its answer."""
DEFAULT_OUTPUT_CAP = 16_384
"""Tokens, where neither the request nor ``OUTPUT_CAP`` says anything."""
MOST_MISSES = 1000
"""How many names are remembered, with what is said of them: names are anybody's."""


class Line(NamedTuple):
    """A part of a cost: so many of a class, at so much per million."""

    token_class: str
    number: int
    price: Decimal

    @property
    def amount(self) -> Decimal:
        return self.number * self.price / MILLION


@dataclass(frozen=True)
class Tariff:
    """What a model's tokens cost at a moment, by class: USD per million.

    A class that is not given costs what the whole costs that it is a part of. Not so audio, images
    that are made and web searches, which cost many times as much: a cost with any of them is unknown.
    """

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    reasoning: Decimal | None = None
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    image_output: Decimal | None = None
    web_search: Decimal | None = None

    def lines(self, usage: Usage) -> tuple[Line, ...] | None:
        """What ``usage`` is charged, class by class; None where that cannot be known."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        written, for_an_hour = usage.cache_write_tokens or 0, usage.cache_write_1h_tokens or 0
        if (usage.cached_tokens or 0) + written > usage.input_tokens or for_an_hour > written:
            return None
        of_input = {
            "cached": usage.cached_tokens,
            "cache_write": written - for_an_hour,
            "cache_write_1h": for_an_hour,
            "audio_input": usage.audio_input_tokens,
            "image_input": usage.image_input_tokens,
        }
        of_output = {
            "reasoning": usage.reasoning_tokens,
            "audio_output": usage.audio_output_tokens,
            "image_output": usage.image_output_tokens,
        }
        beside = {"web_search": usage.web_searches}
        lines: list[Line] = []
        for whole, total, parts in (
            ("input", usage.input_tokens, of_input),
            ("output", usage.output_tokens, of_output),
            ("", 0, beside),
        ):
            charged = [self._line(name, count) for name, count in parts.items() if count]
            if None in charged:
                return None
            apart = [line for line in charged if line and line.token_class != whole]
            rest = total - sum(line.number for line in apart) if whole else 0
            if rest < 0:  # classes that overlap, as cached audio does: nobody says by how much
                return None
            if rest:
                lines.append(Line(whole, rest, getattr(self, whole)))
            lines += apart
        return tuple(lines)

    def _line(self, name: str, count: int) -> Line | None:
        """None where there is no price for it. Of a class that costs what the whole does the line
        is the whole's."""
        if (price := getattr(self, name)) is not None:
            return Line(name, count, price)
        if name == "cache_write_1h" and self.cache_write is not None:
            # More than for five minutes, and nobody knows how much more.
            return None
        whole = _COSTS_WHAT_THE_WHOLE_DOES.get(name)
        return Line(whole, count, getattr(self, whole)) if whole else None

    def cost(self, usage: Usage) -> Decimal | None:
        """None when the tokens or a price of theirs are unknown."""
        lines = self.lines(usage)
        return None if lines is None else sum((line.amount for line in lines), Decimal(0))


CLASSES = tuple(each.name for each in dataclasses.fields(Tariff))
"""Of tokens; and the searches, of which a million has a price as well."""
_COSTS_WHAT_THE_WHOLE_DOES = {
    "cached": "input",
    "cache_write": "input",
    "cache_write_1h": "input",
    "image_input": "input",
    "reasoning": "output",
}


@dataclass(frozen=True)
class Cost:
    """What a completion cost, and how that comes about."""

    amount: Decimal
    source: str
    """``reported``, ``own``, ``setting``, ``hosted``, ``genai-prices`` or ``estimated``."""
    lines: tuple[Line, ...] = field(default=(), compare=False)
    """Empty where it was reported: nobody says what it is made of."""
    price: str = field(default="", compare=False)
    """Which price, in words: ``openai/gpt-5*, flex, above 272000, since 2026-11-01``."""
    at: datetime | None = field(default=None, compare=False)
    """The moment whose price it is."""

    @property
    def basis(self) -> dict[str, Any]:
        """The same as JSON, to be kept with the cost: ``lines`` are class, number and USD per million."""
        told = {
            "price": self.price,
            "at": self.at and self.at.isoformat(),
            "lines": [[line.token_class, line.number, f"{line.price:f}"] for line in self.lines],
        }
        return {name: value for name, value in told.items() if value}


def read_basis(basis: Mapping[str, Any]) -> tuple[Line, ...]:
    """The lines of ``Cost.basis``."""
    return tuple(Line(name, n, Decimal(price)) for name, n, price in basis.get("lines", ()))


def cost_of(
    provider: str,
    model: str,
    usage: Usage,
    *,
    at: datetime,
    answered_by: str = "",
    service_tier: str = "",
) -> Cost | None:
    """The cost of a completion, or None when it cannot be known. Of what a provider says it raises
    nothing; a database that cannot be asked does.

    ``model`` is the one asked for and ``answered_by`` the one that answered, which prices better:
    it carries the version. ``service_tier`` is the one of the answer, and ``at`` its moment.
    """
    if usage.reported_cost is not None:
        cost: Cost | None = Cost(usage.reported_cost, "reported", at=at)
    else:
        cost = _priced(provider, model, usage, at, answered_by, service_tier or usage.service_tier)
    return cost if cost and 0 <= cost.amount < MOST_OF_AN_ANSWER else None


def _priced(
    provider: str, model: str, usage: Usage, at: datetime, answered_by: str, service_tier: str
) -> Cost | None:
    names = _names(answered_by, model)
    found = find_tariff(
        provider, names, at=at, service_tier=service_tier, input_tokens=usage.input_tokens or 0
    )
    if found is None:
        return None
    lines = found.tariff.lines(usage)
    if lines is None:
        return None
    amount = sum((line.amount for line in lines), Decimal(0))
    return Cost(amount, found.source, lines, found.price, at)


def _names(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, names)))


# --- before it is asked ----------------------------------------------------------------------


def worst_cost(
    provider: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, Any] | None = None,
    *,
    at: datetime,
) -> Decimal | None:
    """USD that an answer may cost at the most, by the prices of ``at``; None when it is unpriced.

    Of the input the most that it may count, all of the output up to its cap, and of each the dearest
    class. Not in it: what tools that the provider itself runs may read or charge.
    """
    return WorstCosts(at=at).of(provider, model, messages, parameters)


class WorstCosts:
    """``worst_cost`` of many requests at one moment, which looks each price up once."""

    def __init__(self, *, at: datetime) -> None:
        self.at = at
        self._tariffs: dict[tuple[str, str, str, int], Found | None] = {}

    def of(
        self,
        provider: str,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Any] | None = None,
    ) -> Decimal | None:
        """USD; None when it is unpriced."""
        parameters = parameters or {}
        counted = estimates.count_input(messages, parameters)
        found = self._found(
            provider, model, counted.most, str(parameters.get("service_tier") or "")
        )
        cap = output_cap(provider, model, parameters)
        return _most(found.tariff, counted, cap, parameters) if found else None

    def _found(self, provider: str, model: str, tokens: int, tier: str) -> Found | None:
        # Long inputs have prices of their own, from some thousands on: rounded up it is never less.
        thousands = -(-tokens // 1000)
        key = (provider, model, tier, thousands)
        if key not in self._tariffs:
            self._tariffs[key] = find_tariff(
                provider, [model], at=self.at, service_tier=tier, input_tokens=thousands * 1000
            )
        return self._tariffs[key]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What requests may come to, before they are asked. Estimates are added with ``+``."""

    requests: int = 0
    input_tokens: int = 0
    """Counted offline: see ``estimates``."""
    most_input_tokens: int = 0
    most_output_tokens: int = 0
    """Their output caps: see ``output_cap``."""
    least: Decimal | None = None
    """USD, where inputs are short and nothing is answered. Of those that are priced; None where none is."""
    most: Decimal | None = None
    """USD, see ``worst_cost``. Of those that are priced; None where none is."""
    unpriced: int = 0
    """How many of the requests are not."""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            **{
                each.name: _sum(getattr(self, each.name), getattr(other, each.name))
                for each in dataclasses.fields(self)
            }
        )


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def estimate(
    provider: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, Any] | None = None,
    *,
    at: datetime,
) -> Estimate:
    """What one request may come to, by the prices of ``at``."""
    parameters = parameters or {}
    counted = estimates.count_input(messages, parameters)
    cap = output_cap(provider, model, parameters)
    tier = str(parameters.get("service_tier") or "")
    found = [
        find_tariff(provider, [model], at=at, service_tier=tier, input_tokens=tokens)
        for tokens in (counted.least, counted.most)
    ]
    most = _most(found[1].tariff, counted, cap, parameters) if found[1] else None
    least = _least(found[0].tariff, counted) if found[0] and most is not None else None
    is_priced = least is not None
    return Estimate(
        requests=1,
        input_tokens=counted.likely,
        most_input_tokens=counted.most,
        most_output_tokens=cap,
        least=least,
        most=most if is_priced else None,
        unpriced=0 if is_priced else 1,
    )


def _least(tariff: Tariff, counted: estimates.Counted) -> Decimal:
    cheapest = min(each for each in (tariff.input, tariff.cached) if each is not None)
    return counted.least * cheapest / MILLION


def _most(
    tariff: Tariff, counted: estimates.Counted, cap: int, parameters: Mapping[str, Any]
) -> Decimal | None:
    """None where there is sound in it, and no price for sound."""
    speaks = "audio" in (parameters.get("modalities") or ())
    if (counted.has_audio and tariff.audio_input is None) or (
        speaks and tariff.audio_output is None
    ):
        return None
    of_input = [tariff.input, tariff.cache_write, tariff.image_input]
    of_input += [tariff.audio_input] if counted.has_audio else []
    of_input += [tariff.cache_write_1h] if counted.is_kept_for_an_hour else []
    of_output = [tariff.output, tariff.reasoning, tariff.audio_output if speaks else None]
    dearest = [max(filter(None, each), default=Decimal(0)) for each in (of_input, of_output)]
    return (counted.most * dearest[0] + cap * dearest[1]) / MILLION


def output_cap(provider: str, model: str, parameters: Mapping[str, Any]) -> int:
    """Tokens that an answer has at the most: what the request says, or else what the provider is told,
    or ``OUTPUT_CAP`` says of the model."""
    answers = parameters.get("n")
    times = answers if is_count(answers) and answers else 1
    for name in OUTPUT_CAPS:
        if is_count(parameters.get(name)):
            return int(parameters[name]) * times
    options = app_settings().providers.get(provider, {})
    if (options.get("KIND") or provider) == "anthropic":
        return get_provider(provider).max_tokens * times  # which is sent where none is asked for
    caps, full = app_settings().output_cap, [f"{provider}/{model}"]
    known = [name for name in caps if means(name, full)]
    named = max(known, key=specificity, default=None)
    return (DEFAULT_OUTPUT_CAP if named is None else int(caps[named])) * times


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# --- which price -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A tariff, and where it is from."""

    tariff: Tariff
    source: str
    price: str


def find_tariff(
    provider: str,
    names: Sequence[str],
    *,
    at: datetime,
    service_tier: str = "",
    input_tokens: int = 0,
) -> Found | None:
    """What a model, known by any of ``names`` (the best first), costs at a moment, or None. A long
    input may cost more."""
    from .models.price import known_prices  # a stair that goes up: our own prices are rows

    tier = "" if service_tier in STANDARD_TIERS else service_tier
    own = known_prices(at).find(provider, names, at=at, tier=tier, input_tokens=input_tokens)
    if own is not None:
        return own[0]
    found = _in_settings(provider, names) or _hosted(provider, names, at)
    if found is not None:
        return None if tier else found  # these are of the standard tier
    by_name = (_genai_tariff(provider, name, at, tier, input_tokens) for name in names)
    return next(filter(None, by_name), None)


def _hosted(provider: str, names: Sequence[str], at: datetime) -> Found | None:
    if provider != "upstash" or not any(name in HOSTED_MODELS for name in names):
        return None
    words = f"upstash's hosted models, since {HOSTED_SINCE:%Y-%m-%d}"
    return Found(Tariff(HOSTED_PRICE, HOSTED_PRICE), "hosted", words)


class Rate(NamedTuple):
    """One price: of a class, a tier and a length of the input, from a moment on."""

    provider: str
    model: str
    """A name, or a pattern: ``*`` stands for any letters, also for none."""
    token_class: str
    tier: str
    """Empty is the standard one."""
    above: int
    """Of inputs longer than so many tokens."""
    amount: Decimal
    """USD per million."""
    since: datetime
    until: datetime | None
    """Not included; None is open."""

    def is_in_force(self, at: datetime) -> bool:
        return self.since <= at and (self.until is None or at < self.until)


def specificity(pattern: str) -> tuple[bool, int, str]:
    """By which the most specific of several patterns is the greatest: a whole name before any
    pattern, and then the one that says most letters."""
    return "*" not in pattern, len(pattern.replace("*", "")), pattern


@lru_cache(maxsize=1024)
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def means(pattern: str, names: Sequence[str]) -> bool:
    """Whether a name or a pattern means one of ``names``."""
    if "*" not in pattern:
        return pattern in names
    return any(_pattern(pattern).fullmatch(name) for name in names)


class PriceList:
    """Our own prices."""

    def __init__(self, rates: Iterable[Rate]) -> None:
        self._rates: dict[tuple[str, str], list[Rate]] = {}
        for rate in rates:
            self._rates.setdefault((rate.provider, rate.model), []).append(rate)
        self._patterns: dict[str, list[str]] = {}
        for provider, model in sorted(self._rates, key=lambda k: specificity(k[1]), reverse=True):
            if "*" in model:
                self._patterns.setdefault(provider, []).append(model)

    def _known_as(self, provider: str, names: Sequence[str]) -> Iterator[str]:
        """The most specific first. Of whole names the one that comes first in ``names``."""
        yield from (name for name in names if "*" not in name and (provider, name) in self._rates)
        yield from (each for each in self._patterns.get(provider, ()) if means(each, names))

    def find(
        self, provider: str, names: Sequence[str], *, at: datetime, tier: str, input_tokens: int
    ) -> tuple[Found | None] | None:
        """The tariff of the most specific model that has a price at ``at``; None in a tuple where it
        has none of this tier, or none of the input or the output; None where there is no such model.

        All of a tariff is from one model: what one leaves out is not made up from another's.
        """
        for model in self._known_as(provider, names):
            in_force = [rate for rate in self._rates[provider, model] if rate.is_in_force(at)]
            if in_force:
                return (_tariff(in_force, tier, input_tokens),)
        return None


def _tariff(in_force: Sequence[Rate], tier: str, input_tokens: int) -> Found | None:
    chosen: dict[str, Rate] = {}
    for rate in in_force:
        fits = rate.tier == tier and (rate.above == 0 or input_tokens > rate.above)
        known = chosen.get(rate.token_class)
        if fits and (known is None or rate.above > known.above):
            chosen[rate.token_class] = rate
    if not {"input", "output"} <= chosen.keys():
        return None
    tariff = Tariff(**{name: rate.amount for name, rate in chosen.items()})
    one = chosen["input"]
    above = max(rate.above for rate in chosen.values())
    words = [f"{one.provider}/{one.model}", tier, f"above {above}" if above else ""]
    since = max(rate.since for rate in chosen.values())
    words.append(f"since {since.isoformat(timespec='minutes')}")
    return Found(tariff, "own", ", ".join(filter(None, words)))


def _in_settings(provider: str, names: Sequence[str]) -> Found | None:
    conf, key = app_settings(), (provider, tuple(names))
    prices, known = conf.prices, conf.found_prices
    # Who changes the setting in place, as tests do, is not told an old price.
    number, name, given, found = known.get(key, _NOT_LOOKED_FOR)
    if number == len(prices) and prices.get(name) == given:
        return cast("Found | None", found)
    name = given = None
    of_now: Found | None = None
    for each in _in_settings_as([f"{provider}/{name}" for name in names]):
        try:
            of_now = Found(read_price(each, prices[each]), "setting", f"PRICES {each}")
        except ConfigurationError as error:
            # The answer has come and is paid for. It is kept, unpriced.
            logger.error("%s", error)
            continue
        name, given = each, dict(prices[each])
        break
    if len(known) >= MOST_MISSES:
        known.clear()
    known[key] = len(prices), name, given, of_now
    return of_now


_NOT_LOOKED_FOR = (-1, None, None, None)


def _in_settings_as(full: Sequence[str]) -> list[str]:
    """The most specific first."""
    prices = app_settings().prices
    named = [name for name in full if prices.get(name) is not None]
    patterns = [each for each in prices if "*" in each and means(each, full)]
    return [*named, *sorted(patterns, key=specificity, reverse=True)]


def read_price(name: str, given: Mapping[str, Any]) -> Tariff:
    """An entry of ``QSTASH_LLM["PRICES"]``. Raises ``ConfigurationError``."""
    problem = (
        f"QSTASH_LLM['PRICES'][{name!r}] is {given!r}: give 'input' and 'output', and if they "
        f"differ {', '.join(map(repr, CLASSES[2:]))}, in USD per million."
    )
    try:
        amounts = {kind: Decimal(str(amount)) for kind, amount in given.items()}
        price = Tariff(**amounts)
    except (TypeError, AttributeError, InvalidOperation) as error:
        raise ConfigurationError(problem) from error
    if not all(amount.is_finite() and 0 <= amount < ABSURD for amount in amounts.values()):
        raise ConfigurationError(problem)
    return price


# --- other people's prices -------------------------------------------------------------------

_GENAI_NAMES = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cached": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "reasoning": "output_reasoning_mtok",
    "audio_input": "input_audio_mtok",
    "audio_output": "output_audio_mtok",
    "image_input": "input_image_mtok",
    "image_output": "output_image_mtok",
}
_CHARGED_BESIDE = ("requests_kcount", "input_mchars", "input_text_messages_kcount", "audio_hours")
"""What else some models charge for, and no usage tells."""


def _genai_tariff(
    provider: str, model: str, at: datetime, tier: str, input_tokens: int
) -> Found | None:
    where = _where(provider)
    standard = _genai_price(model, where, at, "")
    if standard is None:
        return None
    price = standard
    if tier:
        price = _genai_price(model, where, at, tier)
        if price is None or price == standard:
            return None  # of a tier that it does not know it says the standard's
    return _from_genai(price, tier, input_tokens)


def _genai_price(model: str, where: dict[str, str], at: datetime, tier: str) -> Any:
    try:
        # Imported when first needed: it is 100 MB in memory and most of a second.
        from genai_prices import Usage as GenaiUsage
        from genai_prices import calc_price
    except ImportError:
        return None
    context = {"processing": "batch"} if tier == "batch" else {"service_tier": tier}
    try:
        calculation = calc_price(
            GenaiUsage(input_tokens=0, output_tokens=0),
            model,
            **where,
            genai_request_timestamp=at,
            price_context=context if tier else None,
        )
    except (LookupError, ValueError):
        _miss()
        return None
    return calculation.model_price


def _from_genai(price: Any, tier: str, input_tokens: int) -> Found | None:
    """None for a model that also charges for what we are not told."""
    from genai_prices import __version__

    if any(getattr(price, name, None) is not None for name in _CHARGED_BESIDE):
        return None
    given = {name: getattr(price, theirs, None) for name, theirs in _GENAI_NAMES.items()}
    amounts = {
        name: _of_length(each, input_tokens) for name, each in given.items() if each is not None
    }
    if (searches := getattr(price, "web_searches_kcount", None)) is not None:
        amounts["web_search"] = _of_length(searches, input_tokens) * 1000
    if not {"input", "output"} <= amounts.keys():
        return None
    words = filter(None, (f"genai-prices {__version__}", tier))
    return Found(Tariff(**amounts), "genai-prices", ", ".join(words))


def listed(provider: str, model: str, *, at: datetime) -> dict[tuple[str, int], dict[str, Decimal]]:
    """What genai-prices lists for a model at a moment: by service tier and length of the input the USD
    per million of each class. Empty where it does not know the model, or charges by more than tokens.

    Raises ``ConfigurationError`` where the ``costs`` extra is not installed.
    """
    try:
        import genai_prices  # noqa: F401 - see ``_genai_price``
    except ImportError as error:
        raise ConfigurationError(
            "genai-prices is not installed: it is the extra 'costs'."
        ) from error
    found: dict[tuple[str, int], dict[str, Decimal]] = {}
    for tier in ("", "flex", "priority", "batch"):
        lengths = [0]
        while lengths:
            above = lengths.pop()
            said = _genai_tariff(provider, model, at, tier, above + 1)
            if said is None:
                break
            amounts = dataclasses.asdict(said.tariff)
            known = found.setdefault((tier, above), {})
            base = found[tier, 0]
            for name, amount in amounts.items():
                if amount is not None and (above == 0 or amount != base.get(name)):
                    known[name] = amount
            if above == 0:
                lengths = _lengths(provider, model, at, tier)
    return {key: amounts for key, amounts in found.items() if amounts}


def _lengths(provider: str, model: str, at: datetime, tier: str) -> list[int]:
    """From which lengths of the input on it lists other prices."""
    price = _genai_price(model, _where(provider), at, tier)
    tiered = [getattr(price, name, None) for name in _GENAI_NAMES.values()]
    return sorted({tier.start for each in tiered for tier in getattr(each, "tiers", ())})


def _where(provider: str) -> dict[str, str]:
    """An entry that is reached elsewhere has that place's prices, whatever its name."""
    base_url = app_settings().providers.get(provider, {}).get("BASE_URL")
    return {"provider_api_url": base_url} if base_url else {"provider_id": provider}


def _of_length(price: Any, input_tokens: int) -> Decimal:
    """Some cost more where the input is long."""
    tiers = [tier.price for tier in getattr(price, "tiers", ()) if input_tokens > tier.start]
    return Decimal(tiers[-1] if tiers else getattr(price, "base", price))


def _miss() -> None:
    """It keeps every name for which it was asked in vain, for ever, and names are anybody's."""
    from genai_prices import data_snapshot

    snapshot = data_snapshot.get_snapshot()
    for name in ("_provider_cache", "_provider_misses"):
        if len(getattr(snapshot, name)) > MOST_MISSES:
            getattr(snapshot, name).clear()
