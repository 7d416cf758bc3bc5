from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connections

from django_qstash_llm.models import Circuit
from django_qstash_llm.models.circuit import LONGEST_PAUSE, PROBE_SECONDS, QSTASH
from tests.server.conftest import at_once

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_nobody_is_kept_from_calling_what_never_failed() -> None:
    assert Circuit.objects.may_call(QSTASH, NOW)
    assert Circuit.objects.open_until(QSTASH, NOW) is None
    assert not Circuit.objects.exists()


def test_it_stays_open_until_the_moment_that_was_named() -> None:
    Circuit.objects.trip(QSTASH, "429", now=NOW, until=later(7200))
    assert Circuit.objects.open_until(QSTASH, NOW) == later(7200)
    assert not Circuit.objects.may_call(QSTASH, later(7199))
    assert Circuit.objects.may_call(QSTASH, later(7200))
    assert Circuit.objects.may_call("another", NOW)


def test_pauses_double_with_a_little_jitter_and_stay_within_minutes() -> None:
    pauses = []
    for _ in range(14):
        until = Circuit.objects.trip(QSTASH, "500", now=NOW)
        pauses.append((until - NOW).total_seconds())
    for number, pause in enumerate(pauses, start=1):
        least = min(LONGEST_PAUSE, 2.0**number)
        assert least <= pause <= 1.2 * least
    assert len(set(pauses[-5:])) > 1


def test_after_a_pause_one_finds_out_and_the_others_wait_for_it() -> None:
    Circuit.objects.trip(QSTASH, "500", now=NOW, until=later(10))
    assert Circuit.objects.may_call(QSTASH, later(10))
    assert not Circuit.objects.may_call(QSTASH, later(11))
    # It never came back: somebody else finds out.
    assert not Circuit.objects.may_call(QSTASH, later(9 + PROBE_SECONDS))
    assert Circuit.objects.may_call(QSTASH, later(10 + PROBE_SECONDS))


def test_a_closed_circuit_lets_everybody_call_and_begins_its_pauses_anew() -> None:
    for _ in range(5):
        Circuit.objects.trip(QSTASH, "500", now=NOW)
    Circuit.objects.close(QSTASH)
    assert Circuit.objects.may_call(QSTASH, NOW)
    assert Circuit.objects.may_call(QSTASH, NOW)
    row = Circuit.objects.get()
    assert (row.is_open, row.reason) == (False, "")
    assert Circuit.objects.trip(QSTASH, "500", now=later(60)) <= later(63)
    assert Circuit.objects.get().opened_at == later(60)


@pytest.mark.django_db(transaction=True)
def test_of_many_at_once_one_finds_out() -> None:
    Circuit.objects.trip(QSTASH, "500", now=NOW, until=later(10))

    def ask(_: int) -> bool:
        try:
            return Circuit.objects.may_call(QSTASH, later(10))
        finally:
            connections.close_all()

    assert sorted(at_once(8, ask)) == [False] * 7 + [True]


@pytest.mark.django_db(transaction=True)
def test_many_that_fail_at_once_are_each_counted() -> None:
    at_once(6, lambda _: Circuit.objects.trip(QSTASH, "500", now=NOW))
    assert Circuit.objects.get().failures == 6
