from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from django.db import connections, transaction

from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import BudgetExceeded
from django_qstash_llm.models import Budget, LedgerEntry, LLMRequest, settlement
from django_qstash_llm.models.reservation import Reservation
from django_qstash_llm.models.settlement import settle
from django_qstash_llm.pricing import Cost
from tests.wire import Wire

pytestmark = pytest.mark.django_db(transaction=True)

MESSAGES = [{"role": "user", "content": "How many roads?"}]
PRICE = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
needs_locks = pytest.mark.skipif(
    connections["default"].vendor != "postgresql", reason="has one writer"
)


@pytest.fixture(autouse=True)
def priced(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICE}


def enter(number: int, spent: int, row: LLMRequest | None = None) -> None:
    entry = LedgerEntry.of_answer(
        row or LLMRequest(provider="openai", model="m"),
        answer=str(number),
        usage=Usage(),
        cost=Cost(Decimal(spent), "setting"),
        at=NOON,
        is_useful=True,
    )
    LedgerEntry.objects.correct(entry, now=NOON)


def hold(budget: Budget, amount: int, state: str) -> LLMRequest:
    [row] = LLMRequest.objects.bulk_create(
        [LLMRequest(provider="openai", model="m", messages=MESSAGES, state=state)]
    )
    Reservation.objects.create(budget=budget, llm_request=row, amount=amount)
    Budget.objects.filter(pk=budget.pk).update(reserved=budget.reserved + amount)
    return row


def meanwhile(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """In a thread with a connection of its own; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def until_somebody_waits() -> Iterator[None]:
    """For a lock in this database."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    for _ in range(1_000_000):
        with connections["default"].cursor() as cursor:
            cursor.execute(waiting)
            if cursor.fetchone()[0]:
                return
        yield


def test_what_was_held_is_not_free_before_it_is_spent() -> None:
    """In no piece of a settlement, of which others may come between two."""
    budget = Budget.objects.create(name="b", amount=10)
    for number in range(settlement.AT_ONCE):
        enter(number, 0)
    row = hold(budget, 5, "completed")
    enter(settlement.AT_ONCE, 4, row)
    settlement._settle("default", NOON)
    budget.refresh_from_db()
    assert budget.spent(NOON) + budget.reserved >= 4
    settle(now=NOON)
    budget.refresh_from_db()
    assert (budget.spent(NOON), budget.reserved) == (4, 0)


@needs_locks
def test_what_is_asked_again_while_it_is_settled_stays_held() -> None:
    budget = Budget.objects.create(name="b", amount=10)
    row = hold(budget, 5, "failed")
    with transaction.atomic():
        # As ``retry_dead_letter`` does, which finds it held already.
        LLMRequest.objects.filter(pk=row.pk).update(state="submitted")
        Budget.objects.select_for_update().get()
        thread, raised = meanwhile(settle)
        for _ in until_somebody_waits():
            pass
    thread.join(30)
    assert raised == []
    budget.refresh_from_db()
    assert (budget.reserved, Reservation.objects.count()) == (5, 1)


@needs_locks
def test_who_is_refused_and_who_settles_do_not_wait_for_each_other(wire: Wire) -> None:
    budget = Budget.objects.create(name="b", amount=1)
    hold(budget, 1, "submitted")
    enter(1, 0)
    enter(2, 0)
    with transaction.atomic():
        # As a settlement does: first the entries and then the budgets.
        list(LedgerEntry.objects.select_for_update())
        thread, raised = meanwhile(lambda: LLMRequest.objects.chat(MESSAGES))
        for _ in until_somebody_waits():
            pass
        Budget.objects.select_for_update().get()
    thread.join(30)
    assert [type(error) for error in raised] == [BudgetExceeded]
    assert LLMRequest.objects.filter(via="chat").count() == 0


def test_what_a_refused_chat_settles_stays_settled(wire: Wire) -> None:
    Budget.objects.create(name="b", amount=0)
    enter(1, 1)
    with pytest.raises(BudgetExceeded):
        LLMRequest.objects.chat(MESSAGES)
    assert not LedgerEntry.objects.unfolded().exists()
