"""A clock that is put back while something waits: nothing storms, and nothing is frozen."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from django_qstash_llm.models import LLMRequest
from django_qstash_llm.models.circuit import LONGEST_PAUSE, PROBE_SECONDS
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.request import CLAIM_SECONDS
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
JITTER = 1.2
LONGEST_FREEZE = timedelta(seconds=LONGEST_PAUSE * JITTER + PROBE_SECONDS)
EVERY = timedelta(seconds=10)
"""How often the sweep rings."""


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(count: int) -> list[LLMRequest]:
    return [LLMRequest.objects.publish([{"role": "user", "content": "?"}]) for _ in range(count)]


def sweep(clock: Clock, duration: timedelta) -> None:
    """Ring the bell again and again, as beat does."""
    until = clock.now + duration
    while clock.now < until:
        Outbox(clock=clock).submit()
        clock.now += EVERY


def answers(status: int, **headers: str) -> Callable[..., Any]:
    return lambda request: httpx.Response(status, headers=headers)


def fail_for(clock: Clock, qstash: FakeQStash, duration: timedelta) -> None:
    qstash.answer = answers(500)
    sweep(clock, duration)


@pytest.mark.parametrize("outage", [timedelta(seconds=10), timedelta(hours=2)], ids=str)
def test_an_outage_is_over_for_everybody_though_the_clock_went_back(
    clock: Clock, qstash: FakeQStash, outage: timedelta
) -> None:
    ask(5)
    fail_for(clock, qstash, outage)
    clock.now -= HOUR
    qstash.answer = None
    sweep(clock, LONGEST_FREEZE)
    assert LLMRequest.objects.pending().count() == 0


@pytest.mark.parametrize("outage", [timedelta(seconds=10), timedelta(hours=2)], ids=str)
def test_a_clock_that_went_back_asks_no_more_often_than_one_that_did_not(
    clock: Clock, qstash: FakeQStash, outage: timedelta
) -> None:
    ask(5)
    fail_for(clock, qstash, outage)
    qstash.calls.clear()
    clock.now -= HOUR
    fail_for(clock, qstash, timedelta(minutes=30))
    # One probe for all, with pauses that grow: never more than one in every pause's length.
    most = 1 + 30 * 60 / (2.0 if outage < HOUR else PROBE_SECONDS)
    assert len(qstash.calls) <= min(most, 12)


def test_a_claim_of_the_time_before_does_not_hold_a_row_for_an_hour(
    clock: Clock, qstash: FakeQStash
) -> None:
    """Its worker died, and then the clock was put back."""
    ask(3)
    assert len(Outbox(clock=clock).claim(10)) == 3
    clock.now -= HOUR
    sweep(clock, timedelta(seconds=CLAIM_SECONDS + 60))
    assert LLMRequest.objects.pending().count() == 0


def test_a_row_that_was_put_back_waits_no_longer_than_its_pause(
    clock: Clock, qstash: FakeQStash
) -> None:
    [row] = ask(1)
    outbox = Outbox(clock=clock)
    claimed = outbox.claim(1)
    outbox.put_back(claimed, "this worker knows no such provider", outbox.pause(claimed))
    clock.now -= HOUR
    sweep(clock, LONGEST_FREEZE)
    row.refresh_from_db()
    assert row.state == "submitted"
