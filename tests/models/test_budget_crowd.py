"""Budgets and ledger while many processes are at them at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from django_qstash_llm.models import Budget, LedgerEntry, LLMRequest, Spend
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.reservation import Reservation
from django_qstash_llm.models.settlement import settle
from django_qstash_llm.pricing import worst_cost
from tests.models.crowd import PRICES, Provider, play
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db(transaction=True)

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESSES = 8
COUNTS = {"postgresql": 2000}
"""Where the database has many writers. SQLite has one."""
MESSAGES = [{"role": "user", "content": "How many roads?"}]
PARAMETERS = {"max_completion_tokens": 100}


@pytest.fixture(autouse=True)
def priced(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}


def write(count: int, **fields: Any) -> None:
    """Pending requests, as ``bulk_create`` leaves them: the outbox prepares and submits them."""
    LLMRequest.objects.bulk_create(
        LLMRequest(
            messages=MESSAGES,
            parameters=PARAMETERS,
            provider="openai",
            model="gpt-5.4-mini",
            retries=1,
            **fields,
        )
        for _ in range(count)
    )


def most() -> Decimal:
    found = worst_cost("openai", "gpt-5.4-mini", MESSAGES, PARAMETERS, at=timezone.now())
    assert found is not None
    return found


def crowd(program: list[str]) -> list[str]:
    """What eight processes print that run ``program`` on the database of this test at once."""
    database = connection.settings_dict
    name = database["NAME"]
    url = f"sqlite:///{name}"
    if connection.vendor == "postgresql":
        secret = f":{database['PASSWORD']}" if database["PASSWORD"] else ""
        place = f"{database['HOST'] or '127.0.0.1'}:{database['PORT'] or 5432}"
        url = f"postgres://{database['USER']}{secret}@{place}/{name}"
    environment = os.environ | {
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONWARNINGS": "ignore",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *program, str(part), str(PROCESSES)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    said = [
        process.communicate(timeout=float(os.environ.get("TEST_CROWD_SECONDS") or 280))
        for process in processes
    ]
    for process, (_, complaints) in zip(processes, said, strict=True):
        assert process.returncode == 0, complaints[-3000:]
    return [out for out, _ in said]


SUBMIT = """
import django, json, sys
django.setup()
from django.conf import settings
from django_qstash_llm.models.outbox import Outbox
from tests.models.crowd import PRICES
from tests.wire import FakeQStash, wire
settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}
wire.hosts["testserver"] = qstash = FakeQStash()
while Outbox().submit(limit=1):
    pass
print(len(qstash.messages))
"""


def test_of_ten_submitted_at_once_by_eight_processes_three_fit(qstash: FakeQStash) -> None:
    budget = Budget.objects.create(name="for three", amount=most() * 3)
    write(10)
    sent = sum(int(said) for said in crowd(["-c", SUBMIT]))
    assert sent == 3
    assert LLMRequest.objects.submitted().count() == 3
    failed = LLMRequest.objects.failed()
    assert set(failed.values_list("error_code", flat=True)) == {"budget_exceeded"}
    assert failed.count() == 7
    assert all("“for three”" in error for error in failed.values_list("error", flat=True))
    standing = budget.standing()
    assert (standing.reserved, standing.spent, standing.left) == (most() * 3, 0, 0)

    for row in LLMRequest.objects.submitted():
        row.fail("lost", "so that its place is free again", now=timezone.now())
    write(1)
    assert Outbox().submit() == 1
    assert LLMRequest.objects.submitted().count() == 1


def test_what_was_reserved_is_let_go_to_the_last_cent_and_the_ledger_is_the_bill(
    qstash: FakeQStash,
) -> None:
    """``TEST_CROWD=10000`` makes it as many."""
    count = int(os.environ.get("TEST_CROWD") or COUNTS.get(connection.vendor, 300))
    wide = Budget.objects.create(name="wide", amount=1000)
    tight = Budget.objects.create(
        name="tight", scope="label", value="tight", amount=most() * count / 50
    )
    write(count * 9 // 10)
    write(count // 10, labels=["tight"], tenant="acme")

    told = [json.loads(said) for said in crowd(["-m", "tests.models.crowd"])]
    settle()

    assert not LLMRequest.objects.unfinished().exists()
    assert not Reservation.objects.exists()
    for budget in (wide, tight):
        budget.refresh_from_db()
        assert budget.reserved == 0
    refused = LLMRequest.objects.filter(error_code="budget_exceeded").count()
    assert sum(each["sent"] for each in told) == count - refused
    # What was refused was not sent, and what was spent never exceeded the amount.
    assert 0 < refused < count // 10
    assert tight.spent(timezone.now()) <= tight.amount

    bill = sum(Decimal(each["bill"]) for each in told)
    total = LedgerEntry.objects.total()
    assert total.spent == bill
    assert total.unpriced == 0
    assert total.useful < total.spent
    assert wide.spent(timezone.now()) == bill
    [(_, summed)] = Spend.objects.report()
    assert summed == total
    assert sum(t.spent for _, t in Spend.objects.report("label")) == tight.spent(timezone.now())
    completed = LLMRequest.objects.completed()
    assert total.useful == sum(completed.values_list("cost", flat=True))


def test_a_provider_and_its_ledger_agree_whatever_happens(qstash: FakeQStash) -> None:
    """The same with one process, in which a failure is easier to look at."""
    Budget.objects.create(name="wide", amount=1000)
    write(100)
    Outbox().submit()
    provider = Provider(7)
    for row in LLMRequest.objects.submitted():
        play(row, provider)
    assert LedgerEntry.objects.total().spent == provider.bill
    assert Budget.objects.get().standing().reserved == 0
