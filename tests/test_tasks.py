from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, current_app
from celery.signals import task_prerun
from django.utils import timezone

from django_qstash_llm import tasks
from django_qstash_llm.models import LLMRequest
from django_qstash_llm.models.doorbell import Bell

from .wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]
SUBMIT, ANNOUNCE = "django_qstash_llm.submit", "django_qstash_llm.announce"


@pytest.fixture
def rung(qstash: FakeQStash) -> Iterator[list[str]]:
    names: list[str] = []

    def note(task: Any, **others: Any) -> None:
        names.append(task.name)

    task_prerun.connect(note, weak=False)
    yield names
    task_prerun.disconnect(note)


def bulk(count: int, **fields: Any) -> None:
    given = {"messages": MESSAGES, "provider": "openai", "model": "m", "retries": 1} | fields
    LLMRequest.objects.bulk_create([LLMRequest(**given) for _ in range(count)])


def test_sweep_finds_rows_nobody_rang_for(rung: list[str]) -> None:
    bulk(30)
    tasks.sweep()
    assert rung == [SUBMIT]
    assert LLMRequest.objects.submitted().count() == 30


def test_sweep_finds_what_was_not_announced(rung: list[str]) -> None:
    bulk(3, state="completed")
    tasks.sweep()
    assert rung == [ANNOUNCE]
    assert LLMRequest.objects.filter(announced_at=None).count() == 0


def test_sweep_finds_claims_of_dead_workers(rung: list[str]) -> None:
    now = timezone.now()
    token = "00000000-0000-0000-0000-000000000001"
    tried = now - timedelta(seconds=301)
    dead = {"claim_token": token, "claimed_until": now - timedelta(seconds=1)}
    bulk(2, **dead, first_tried_at=tried)
    alive = {"claim_token": token, "claimed_until": now + timedelta(seconds=60)}
    bulk(3, **alive, first_tried_at=now)
    tasks.sweep()
    assert LLMRequest.objects.submitted().count() == 2


def test_sweep_with_nothing_to_do_rings_nothing(
    rung: list[str], django_assert_max_num_queries: Any
) -> None:
    bulk(2, state="completed", announced_at=timezone.now())
    bulk(2, state="cancelled")
    bulk(2, submit_after=timezone.now() + timedelta(hours=1))
    bulk(2, state="failed", announce_tries=5)
    with django_assert_max_num_queries(2):
        tasks.sweep()
    assert rung == []


def test_submit_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    bulk(2100)
    tasks.submit()
    assert rung == [SUBMIT]  # the second, which the first one rang for
    assert LLMRequest.objects.submitted().count() == 2100


def test_announce_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    bulk(501, state="failed")
    tasks.announce()
    assert rung == [ANNOUNCE]
    assert LLMRequest.objects.filter(announced_at=None).count() == 0


def test_every_task_may_run_twice(rung: list[str], qstash: FakeQStash) -> None:
    bulk(3)
    for task in (tasks.submit, tasks.submit, tasks.announce, tasks.announce):
        task()
    assert len(qstash.messages) == 3
    assert rung == []


@pytest.mark.parametrize("task", [tasks.submit, tasks.announce, tasks.sweep])
def test_task_survives_a_killed_worker_and_keeps_no_result(task: Any) -> None:
    assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (True, True, True)


@pytest.fixture
def unreachable_broker() -> Iterator[None]:
    before = current_app._get_current_object()
    down = Celery("down", broker="amqp://127.0.0.1:1//", set_as_current=False)
    down.set_current()
    yield
    before.set_current()
    down.close()


@pytest.mark.usefixtures("unreachable_broker")
def test_broker_that_is_down_costs_time_and_no_work(caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    tasks.ring(Bell.SUBMIT, "default")
    assert time.monotonic() - began < 3  # a web request is waiting
    assert "No broker to ring 'submit'; the next sweep will" in caplog.text


@pytest.mark.usefixtures("unreachable_broker")
@pytest.mark.django_db(transaction=True)
def test_row_is_kept_though_the_broker_is_down(qstash: FakeQStash) -> None:
    row = LLMRequest.objects.publish(MESSAGES)
    row.refresh_from_db()
    assert (row.state, qstash.calls) == ("pending", [])
