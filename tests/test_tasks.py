from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from celery import Celery, current_app
from celery.signals import task_prerun
from django.utils import timezone

from django_qstash_llm import tasks
from django_qstash_llm.models import CallbackResponse, Lane, LLMRequest
from django_qstash_llm.models.doorbell import Bell
from django_qstash_llm.signals import request_failed

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]
TASKS = [tasks.submit, tasks.apply, tasks.reconcile, tasks.announce, tasks.lanes]
SUBMIT, ANNOUNCE = "django_qstash_llm.submit", "django_qstash_llm.announce"
APPLY, RECONCILE = "django_qstash_llm.apply", "django_qstash_llm.reconcile"
LANES = "django_qstash_llm.lanes"


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


def unread(**fields: Any) -> None:
    """A request with its answer, which could not be read when it came."""
    request = LLMRequest(
        messages=MESSAGES, provider="openai", model="m", state="submitted", announce_tries=5
    )
    [row] = LLMRequest.objects.bulk_create([request])
    CallbackResponse.objects.create(
        uuid=row.uuid,
        llm_request=row,
        kind="callback",
        source_message_id=f"msg_{row.pk}",
        status=200,
        body=json.dumps(ANSWER).encode(),
        apply_tries=1,
        **fields,
    )


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


def test_sweep_finds_what_is_overdue(rung: list[str], qstash: FakeQStash) -> None:
    now = timezone.now()
    bulk(1, state="submitted", deadline_at=now - timedelta(seconds=1))
    bulk(1, state="submitted", deadline_at=now + timedelta(seconds=60))
    tasks.sweep()
    assert rung == [RECONCILE]
    assert sorted(LLMRequest.objects.values_list("inquiries", flat=True)) == [0, 1]


def test_sweep_finds_stored_callbacks_that_could_not_be_read(rung: list[str]) -> None:
    unread()
    unread(apply_after=timezone.now() + timedelta(hours=1))
    unread(apply_after=timezone.now() - timedelta(seconds=1))
    tasks.sweep()
    assert rung[0] == APPLY
    assert LLMRequest.objects.completed().count() == 2


def test_sweep_with_nothing_to_do_rings_nothing(
    rung: list[str], django_assert_max_num_queries: Any
) -> None:
    bulk(2, state="completed", announced_at=timezone.now())
    bulk(2, state="cancelled")
    bulk(2, submit_after=timezone.now() + timedelta(minutes=5))
    bulk(2, state="failed", announce_tries=5)
    bulk(2, state="submitted", deadline_at=timezone.now() + timedelta(hours=1))
    unread(apply_after=timezone.now() + timedelta(hours=1))
    with django_assert_max_num_queries(15):
        tasks.sweep()
    assert rung == []


def test_sweep_finds_lanes_that_qstash_is_to_be_told_of_or_whose_pause_is_over(
    rung: list[str], qstash: FakeQStash
) -> None:
    now = timezone.now()
    Lane.objects.create(queue="untold", paused_at=now, is_held=None)
    over = {"paused_at": now - timedelta(hours=1), "paused_until": now - timedelta(seconds=1)}
    ended = Lane.objects.create(tenant="acme", **over)
    bulk(1, tenant="acme")
    tasks.sweep()
    assert (rung[0], SUBMIT in rung) == (LANES, True)
    assert "POST /v2/queues/untold/pause" in qstash.calls
    ended.refresh_from_db()
    assert (ended.is_paused, ended.resumed_by) == (False, "")
    assert LLMRequest.objects.submitted().count() == 1


def test_submit_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    bulk(2100)
    tasks.submit()
    assert rung == [SUBMIT]  # the second, which the first one rang for
    assert LLMRequest.objects.submitted().count() == 2100


def test_announce_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    told = []

    def note(sender: Any, llm_request: LLMRequest, **others: Any) -> None:
        told.append(llm_request.pk)

    bulk(501, state="failed")
    request_failed.connect(note)
    tasks.announce()
    request_failed.disconnect(note)
    assert (rung, len(told)) == ([ANNOUNCE], 501)
    assert LLMRequest.objects.filter(announced_at=None).count() == 0


def test_reconcile_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    bulk(101, state="submitted", deadline_at=timezone.now() - timedelta(seconds=1))
    tasks.reconcile()
    assert rung == [RECONCILE]
    assert LLMRequest.objects.filter(inquiries=1).count() == 101


def test_reconcile_leaves_an_outage_to_the_next_sweep(rung: list[str], qstash: FakeQStash) -> None:
    bulk(3, state="submitted", deadline_at=timezone.now() - timedelta(seconds=1))
    qstash.answer = lambda request: httpx.Response(503)
    tasks.reconcile()
    assert (rung, len(qstash.calls)) == ([], 1)


def test_apply_rings_again_for_what_one_task_does_not_manage(rung: list[str]) -> None:
    for _ in range(101):
        unread()
    tasks.apply()
    assert rung[0] == APPLY
    assert LLMRequest.objects.completed().count() == 101


def test_every_bell_is_heard(rung: list[str]) -> None:
    for bell in Bell:
        tasks.ring(bell, "default")
    assert rung == [f"django_qstash_llm.{bell}" for bell in Bell]


def test_every_task_may_run_twice(rung: list[str], qstash: FakeQStash) -> None:
    bulk(3)
    bulk(1, state="submitted", deadline_at=timezone.now() - timedelta(seconds=1))
    unread()
    for task in TASKS:
        task()
        task()
    assert len(qstash.messages) == 3
    assert LLMRequest.objects.filter(inquiries=1).count() == 1
    assert LLMRequest.objects.completed().count() == 1


@pytest.mark.parametrize("task", [*TASKS, tasks.sweep])
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


@pytest.mark.django_db(databases=["default", "second"], transaction=True)
def test_tasks_look_where_a_router_has_put_our_rows(
    second_database: str, rung: list[str], qstash: FakeQStash
) -> None:
    now = timezone.now()
    bulk(1)
    bulk(1, state="completed")
    bulk(1, state="submitted", deadline_at=now - timedelta(seconds=1))
    bulk(1, state="completed", finished_at=now - timedelta(days=3), announced_at=now, error="x")
    unread()
    tasks.sweep()
    assert sorted(set(rung)) == [ANNOUNCE, APPLY, RECONCILE, SUBMIT]
    for task in TASKS:
        task()
    assert not LLMRequest.objects.pending().exists()


def test_purge_forgets_what_is_too_old(settings: Any, qstash: FakeQStash) -> None:
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "RETENTION_DAYS": 30}
    now = timezone.now()
    for days in (31, 29):
        ended_at = now - timedelta(days=days)
        LLMRequest.objects.create(
            messages=[{"role": "user", "content": "x"}],
            state="completed",
            created_at=ended_at,
            finished_at=ended_at,
            announced_at=ended_at,
        )
    tasks.purge()
    forgotten = LLMRequest.objects.order_by("id").values_list("forgotten_at", flat=True)
    assert [moment is not None for moment in forgotten] == [True, False]
