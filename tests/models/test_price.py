"""Prices are dated, never edited, and known everywhere before they begin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import IntegrityError, connection, connections, transaction
from django.utils import timezone

from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import IllegalState, InvalidRequest
from django_qstash_llm.models import LedgerEntry, LLMRequest, Price
from django_qstash_llm.models.price import NOTICE, forget_prices, known_prices
from django_qstash_llm.models.request import State
from django_qstash_llm.pricing import Cost, Line, cost_of

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
USAGE = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
BOTH = {"input": "1", "output": "2"}


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    """Some rows here are written past ``set``, and go when their test ends: as nothing else does it."""
    forget_prices()
    yield
    forget_prices()


def set_price(model: str = "m", amounts: Any = BOTH, **further: Any) -> list[Price]:
    return Price.objects.set("openai", model, amounts, **{"now": NOW, **further})


def cost(model: str = "m", at: datetime = NOW, usage: Usage = USAGE, **further: Any) -> Any:
    found = cost_of("openai", model, usage, at=at, **further)
    return found and found.amount


def spans(token_class: str = "input") -> list[tuple[Decimal, datetime, datetime | None]]:
    rows = Price.objects.filter(token_class=token_class).order_by("since")
    return list(rows.values_list("amount", "since", "until"))


# --- what a change does ---


def test_first_price_begins_now_and_is_open() -> None:
    assert [each.token_class for each in set_price()] == ["input", "output"]
    assert spans() == [(Decimal(1), NOW, None)]
    assert cost() == 3
    assert cost(at=NOW - timedelta(microseconds=1)) is None


def test_change_closes_one_and_opens_the_next_at_the_same_moment() -> None:
    set_price()
    [new] = set_price(amounts={"input": 5}, now=NOW + HOUR)
    begins = NOW + HOUR + NOTICE
    assert new.since == begins
    assert spans() == [(Decimal(1), NOW, begins), (Decimal(5), begins, None)]
    assert cost(at=begins - timedelta(microseconds=1)) == 3
    assert cost(at=begins) == 7


def test_change_at_midnight_of_a_time_zone_leaves_what_was_before() -> None:
    set_price(since=NOW - 10 * HOUR)
    midnight = datetime(2026, 3, 2, tzinfo=ZoneInfo("Pacific/Auckland"))
    set_price(amounts={"input": 3, "output": 4}, since=midnight, now=NOW - 9 * HOUR)
    assert midnight.astimezone(UTC) == datetime(2026, 3, 1, 11, tzinfo=UTC)
    last, first = midnight - timedelta(seconds=1), midnight
    assert (cost(at=last), cost(at=first)) == (3, 7)
    assert cost(at=first.astimezone(ZoneInfo("America/New_York"))) == 7


def test_cost_that_was_charged_does_not_move_with_a_price() -> None:
    set_price(since=NOW - HOUR)
    charged = cost_of("openai", "m", USAGE, at=NOW)
    row = LLMRequest.objects.create(
        state=State.COMPLETED,
        provider="openai",
        model="m",
        input_tokens=1_000_000,
        output_tokens=1_000_000,
        finished_at=NOW,
    )
    assert charged is not None
    assert row.take_late_cost(charged)
    set_price(amounts={"input": 50}, since=NOW + HOUR)
    assert list(LLMRequest.objects.price_unpriced()) == []
    row.refresh_from_db()
    assert (row.cost, row.cost_source) == (3, "own")
    assert row.cost_lines == (
        Line("input", 1_000_000, Decimal(1)),
        Line("output", 1_000_000, Decimal(2)),
    )
    assert row.cost_basis["price"] == "openai/m, since 2026-03-01T11:00+00:00"
    assert row.cost_basis["at"] == NOW.isoformat()


def test_a_late_cost_is_not_taken_for_other_tokens_than_it_is_of() -> None:
    set_price(since=NOW - HOUR)
    row = LLMRequest.objects.create(
        state=State.FAILED, provider="openai", model="m", input_tokens=5, output_tokens=5
    )
    cost = row.cost_by_now()
    assert cost is not None
    LLMRequest.objects.update(state=State.COMPLETED, input_tokens=7, finished_at=NOW)
    assert not row.take_late_cost(cost)
    row.refresh_from_db()
    assert row.cost is None
    assert not LedgerEntry.objects.exists()
    assert [cost.amount for _, cost in LLMRequest.objects.price_unpriced()] == [Decimal("0.000017")]


def test_price_that_is_the_same_is_no_change() -> None:
    set_price()
    assert set_price(amounts={"input": "1.00"}, now=NOW + HOUR) == []
    assert len(spans()) == 1


def test_price_ends_without_another() -> None:
    set_price()
    set_price(amounts={"input": None}, since=NOW + HOUR)
    assert spans() == [(Decimal(1), NOW, NOW + HOUR)]
    assert (cost(), cost(at=NOW + HOUR)) == (3, None)
    set_price(amounts={"input": 9}, since=NOW + 3 * HOUR)
    assert (cost(at=NOW + 2 * HOUR), cost(at=NOW + 3 * HOUR)) == (None, 11)


def test_price_of_earlier_ends_where_the_known_one_begins() -> None:
    set_price()
    set_price(amounts={"input": 7, "output": 7}, since=NOW - HOUR)
    assert spans() == [(Decimal(7), NOW - HOUR, NOW), (Decimal(1), NOW, None)]
    assert (cost(at=NOW - HOUR), cost()) == (14, 3)


@pytest.mark.parametrize(
    "amounts", [{"input": 5}, {"input": None}, {"cached": "0.1"}, {"input": 5, "output": 2}]
)
@pytest.mark.parametrize("since", [NOW - HOUR / 2, NOW, NOW + NOTICE - timedelta(seconds=1)])
def test_known_price_does_not_change_before_every_process_can_know(
    since: datetime, amounts: Any
) -> None:
    set_price(since=NOW - HOUR)
    with pytest.raises(InvalidRequest, match="begins in 60 seconds at the earliest"):
        set_price(amounts=amounts, since=since)
    assert len(spans()) == 1


@pytest.mark.parametrize("known", ["m", "m*", "*"])
@pytest.mark.parametrize("model", ["m", "m*", "*n"])
def test_what_may_be_the_same_model_gives_notice_as_well(known: str, model: str) -> None:
    set_price(known, since=NOW - HOUR)
    may_be_the_same = known == model or "*" in known
    if not may_be_the_same and model == "*n":
        return
    with pytest.raises(InvalidRequest, match="at the earliest"):
        set_price(model, {"input": 5, "output": 5, "cached": 1}, since=NOW)


def test_change_that_is_coming_is_not_passed_over() -> None:
    set_price()
    set_price(amounts={"input": 5}, since=NOW + 2 * HOUR)
    with pytest.raises(InvalidRequest, match="changes on 2026-03-01T14:00"):
        set_price(amounts={"input": 6}, since=NOW + HOUR)
    with pytest.raises(InvalidRequest, match="begins at that very moment"):
        set_price(amounts={"input": 6}, since=NOW + 2 * HOUR)


def test_change_that_has_not_begun_is_withdrawn() -> None:
    set_price()
    [new] = set_price(amounts={"input": 5}, since=NOW + HOUR)
    new.withdraw(now=NOW)
    assert spans() == [(Decimal(1), NOW, None)]
    assert cost(at=NOW + 2 * HOUR) == 3
    with pytest.raises(IllegalState, match="has begun"):
        Price.objects.get(token_class="input").withdraw(now=NOW)
    [again] = set_price(amounts={"input": 5}, since=NOW + HOUR)
    with pytest.raises(IllegalState, match="about to"):
        again.withdraw(now=NOW + HOUR - timedelta(seconds=59))


def test_price_is_not_edited() -> None:
    [price, _] = set_price()
    price.amount = Decimal(9)
    with pytest.raises(IllegalState, match="not edited"):
        price.save()


# --- what the database refuses, whoever writes ---


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, "price_begins_once"),
        ({"since": NOW + HOUR}, "price_is_open_once"),
        ({"since": NOW - HOUR, "until": NOW - HOUR}, "price_lasts"),
        ({"since": NOW - HOUR, "until": NOW - 2 * HOUR}, "price_lasts"),
        ({"model": "n", "amount": -1}, "price_is_not_negative"),
    ],
)
def test_the_database_refuses_what_overlaps(fields: Any, constraint: str) -> None:
    set_price(amounts={"input": 1})
    of = {"provider": "openai", "model": "m", "token_class": "input", "amount": 2, "since": NOW}
    with pytest.raises(IntegrityError) as caught, transaction.atomic():
        Price.objects.bulk_create([Price(**of | fields)])
    unique = constraint.endswith("once")
    named = connection.vendor == "postgresql" or not unique
    assert not named or constraint in str(caught.value)


def test_two_that_end_at_once_are_refused() -> None:
    set_price(amounts={"input": 1})
    set_price(amounts={"input": 2}, since=NOW + HOUR)
    of = {"provider": "openai", "model": "m", "token_class": "input", "amount": 2}
    with pytest.raises(IntegrityError), transaction.atomic():
        Price.objects.bulk_create([Price(**of, since=NOW - HOUR, until=NOW + HOUR)])


@pytest.mark.django_db(transaction=True)
def test_of_two_who_set_the_first_price_at_once_one_is_asked_to_look_again() -> None:
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def change(amount: int) -> None:
        start.wait()
        try:
            set_price(amounts={"input": amount}, since=NOW)
            outcomes.append("set")
        except InvalidRequest as error:
            outcomes.append(error.field)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=change, args=(amount,)) for amount in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("set") == 1
    assert len(spans()) == 1


# --- what is refused with a reason ---


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"amounts": {}}, "amounts"),
        ({"amounts": {"inputs": 1}}, "amounts"),
        ({"amounts": {"input": "free"}}, "amounts"),
        ({"amounts": {"input": -1}}, "amounts"),
        ({"amounts": {"input": "NaN"}}, "amounts"),
        ({"amounts": {"input": True}}, "amounts"),
        ({"amounts": {"input": 10_000_000}}, "amounts"),
        ({"amounts": {"input": "0.000000001"}}, "amounts"),
        ({"model": ""}, "model"),
        ({"model": "m" * 256}, "model"),
        ({"model": 7}, "model"),
        ({"tier": "t" * 65}, "tier"),
        ({"above": -1}, "above"),
        ({"above": True}, "above"),
        ({"above": 2**63}, "above"),
        ({"since": datetime(2026, 3, 1)}, "since"),
    ],
)
def test_what_is_wrong_with_a_price_names_the_argument(given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        set_price(**given)
    assert caught.value.field == field
    assert not Price.objects.exists()


# --- which price ---


@pytest.mark.parametrize(
    ("asked", "answered_by", "price"),
    [
        ("gpt-5.4-mini", "", 4),
        ("gpt-5.4-mini", "gpt-5.4-mini-2026-03-17", 4),  # a name before any pattern
        ("alias", "gpt-5.4-mini-2026-01-01", 5),  # of names the one that answered
        ("gpt-5.4-mini", "gpt-5.4-mini-2026-01-01", 5),
        ("gpt-5.4-nano", "", 3),  # of patterns the one that says most
        ("gpt-5.1", "", 2),
        ("o9", "", 1),
        ("gpt-5.4x", "", 2),  # a dot is a dot
    ],
)
def test_the_most_specific_price_wins(asked: str, answered_by: str, price: int) -> None:
    names = ["*", "gpt-5*", "gpt-5.4-*", "gpt-5.4-mini", "gpt-5.4-mini-2026-01-01"]
    Price.objects.bulk_create(
        Price(provider="openai", model=name, token_class=each, amount=amount, since=NOW)
        for amount, name in enumerate(names, start=1)
        for each in ("input", "output")
    )
    forget_prices()  # they were not set by ``set``, which would want notice of each
    usage = Usage(input_tokens=1_000_000, output_tokens=0)
    assert cost(asked, usage=usage, answered_by=answered_by) == price


def test_tier_and_length_have_prices_of_their_own() -> None:
    set_price(amounts={"input": 2, "cached": "0.2", "output": 10}, since=NOW - HOUR)
    set_price(amounts={"input": 1, "output": 5}, tier="flex", since=NOW + HOUR)
    set_price(amounts={"input": 4, "output": 15}, above=200_000, since=NOW + HOUR)
    later = NOW + 2 * HOUR
    short = Usage(input_tokens=200_000, cached_tokens=100_000, output_tokens=100_000)
    long = Usage(input_tokens=200_001, cached_tokens=100_000, output_tokens=100_000)
    # 100,000 x 2 + 100,000 x 0.2 + 100,000 x 10
    assert cost(at=later, usage=short) == Decimal("1.22")
    # 100,001 x 4 + 100,000 x 0.2 (which has no price of its own length) + 100,000 x 15
    assert cost(at=later, usage=long) == Decimal("1.920004")
    # flex: 200,000 x 1 (no price for cached) + 100,000 x 5
    assert cost(at=later, usage=short, service_tier="flex") == Decimal("0.7")
    assert cost(at=later, usage=short, service_tier="default") == Decimal("1.22")
    assert cost(at=later, usage=short, service_tier="priority") is None


def test_tariff_is_all_of_one_model_and_of_one_provider() -> None:
    set_price("m*", {"input": 1, "output": 2, "cached": "0.5"}, since=NOW - HOUR)
    set_price("m-mini", {"input": 1}, since=NOW + HOUR)
    later = NOW + 2 * HOUR
    assert cost("m-mini", at=later) is None  # it says nothing of its output
    assert cost("m-maxi", at=later) == 3
    assert cost_of("other", "m-maxi", USAGE, at=later) is None


def test_own_price_goes_before_the_settings(settings: Any) -> None:
    prices = {"openai/m": {"input": 9, "output": 9}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": prices}
    set_price()
    assert cost_of("openai", "m", USAGE, at=NOW) == Cost(Decimal(3), "own")
    assert cost_of("openai", "m", USAGE, at=NOW - HOUR) == Cost(Decimal(18), "setting")


def test_pattern_in_the_settings_gives_way_to_a_name(settings: Any) -> None:
    prices = {"openai/*": {"input": 9, "output": 9}, "openai/m": {"input": 1, "output": 1}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": prices}
    assert (cost("m"), cost("n")) == (2, 18)
    assert cost("m", service_tier="flex") is None


# --- what a process knows ---


@pytest.fixture
def others_set() -> Callable[..., None]:
    """As another process does, of which this one hears nothing."""

    def change(amount: int, since: datetime) -> None:
        rows = Price.objects.filter(provider="openai", model="m")
        rows.filter(until=None).update(until=since)
        Price.objects.bulk_create(
            Price(provider="openai", model="m", token_class=each, amount=amount, since=since)
            for each in ("input", "output")
        )

    return change


def test_steady_state_asks_the_database_nothing(django_assert_num_queries: Any) -> None:
    now = timezone.now()
    known_prices(now)
    with django_assert_num_queries(0):
        for second in range(29):
            known_prices(now + timedelta(seconds=second))


def test_change_of_another_process_is_known_before_it_begins(
    others_set: Callable[..., None], django_assert_num_queries: Any
) -> None:
    now = timezone.now()
    others_set(1, now - HOUR)
    known_prices(now)
    others_set(2, now + NOTICE)  # unheard
    with django_assert_num_queries(0):
        assert cost(at=now + timedelta(seconds=29)) == 2
    with django_assert_num_queries(2):  # whether there are others, and which
        assert cost(at=now + NOTICE - timedelta(microseconds=1)) == 2
    assert cost(at=now + NOTICE) == 4
    assert cost(at=now) == 2


def test_nothing_is_read_again_where_nothing_has_changed(
    others_set: Callable[..., None], django_assert_num_queries: Any
) -> None:
    now = timezone.now()
    others_set(1, now - HOUR)
    known_prices(now + HOUR)
    with django_assert_num_queries(1):
        known_prices(now + HOUR)


def test_price_that_was_rolled_back_is_not_remembered() -> None:
    assert cost() is None
    with transaction.atomic():
        set_price()
        assert cost() == 3  # in this transaction it is one
        transaction.set_rollback(True)
    assert cost() is None


# --- pricing what had none ---


def answered(model: str = "m", **fields: Any) -> LLMRequest:
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 500_000}
    given = {
        "state": State.COMPLETED,
        "provider": "openai",
        "model": model,
        "input_tokens": 1_000_000,
        "output_tokens": 500_000,
        "usage": usage,
        "finished_at": NOW,
    }
    return LLMRequest.objects.create(**given | fields)


def test_unpriced_are_priced_at_the_prices_of_their_moment() -> None:
    early, late = answered(finished_at=NOW - HOUR / 2), answered(finished_at=NOW + HOUR)
    flex, unknown = answered(service_tier="flex"), answered("n")
    uncounted = answered(usage={}, input_tokens=None, output_tokens=None)
    estimated = answered(usage={"prompt_tokens": 10, "completion_tokens": 0, "estimated": True})
    priced = answered(cost=Decimal(77), cost_source="reported")
    set_price(since=NOW - HOUR)
    set_price(amounts={"input": 10}, since=NOW + HOUR)
    rehearsed = {
        row.pk: cost.amount for row, cost in LLMRequest.objects.price_unpriced(is_rehearsal=True)
    }
    assert LLMRequest.objects.unpriced().count() == 6
    assert rehearsed == {early.pk: 2, late.pk: 11, estimated.pk: Decimal("0.00001")}
    assert {row.pk: cost.amount for row, cost in LLMRequest.objects.price_unpriced()} == rehearsed
    costs = dict(LLMRequest.objects.values_list("pk", "cost"))
    assert costs == rehearsed | {flex.pk: None, unknown.pk: None, uncounted.pk: None, priced.pk: 77}
    estimated.refresh_from_db()
    assert estimated.cost_source == "estimated"
    assert list(LLMRequest.objects.price_unpriced()) == []


def test_more_unpriced_than_are_read_at_once_are_all_priced() -> None:
    LLMRequest.objects.bulk_create(
        LLMRequest(
            state=State.COMPLETED, provider="openai", model="m", input_tokens=1, output_tokens=1,
            finished_at=NOW,
        )
        for _ in range(1001)
    )  # fmt: skip
    set_price()
    assert sum(1 for _ in LLMRequest.objects.price_unpriced()) == 1001


def test_late_cost_is_taken_once() -> None:
    row, same = answered(), LLMRequest.objects.last()
    assert same is not None
    assert row.take_late_cost(Cost(Decimal(1), "own"))
    assert not same.take_late_cost(Cost(Decimal(2), "own"))
    row.refresh_from_db()
    assert row.cost == 1


def test_unpriced_models_are_counted() -> None:
    answered(), answered(), answered("n", answered_by="n-1", service_tier="flex")
    answered("n", usage={}, input_tokens=None, output_tokens=None)
    answered(cost=Decimal(0))
    of = ("provider", "model", "answered_by", "service_tier", "requests", "counted")
    rows = [tuple(row[name] for name in of) for row in LLMRequest.objects.unpriced_models()]
    assert rows == [
        ("openai", "m", "", "", 2, 2),
        ("openai", "n", "", "", 1, 0),
        ("openai", "n", "n-1", "flex", 1, 1),
    ]
