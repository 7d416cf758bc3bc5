from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from celery import Celery, current_app
from django.db import connection
from django.utils import timezone

from django_qstash_llm.server import doorbell, retention, tasks
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter, Deduplication, LogEntry, Message

from .conftest import CALLBACK, PROVIDER, Api, Clock, Wire, state
from .test_delivery import eventually


def test_the_tasks_have_names_that_routes_and_beat_can_rely_on() -> None:
    assert tasks.deliver.name == "qstash_server.deliver"
    assert tasks.sweep.name == "qstash_server.sweep"


@pytest.mark.parametrize("task", [tasks.deliver, tasks.sweep])
def test_a_task_is_kept_for_another_worker_when_its_own_dies(task: Any) -> None:
    assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (True, True, True)


def test_the_sweep_delivers_what_no_bell_was_heard_for(api: Api) -> None:
    message_id, queued = api.published(Upstash_Callback=CALLBACK), api.enqueue("q")
    assert state(message_id) == "CREATED"
    tasks.sweep()
    assert (state(message_id), state(queued)) == ("DELIVERED", "DELIVERED")


def test_a_publish_while_delivering_is_taken_up_by_the_same_loop(
    api: Api, wire: Wire, django_capture_on_commit_callbacks: Any
) -> None:
    """Eager, each ring runs at once: without a guard every hop would be a deeper call."""
    depth, deepest = 0, 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        hop = int(request.content)
        if hop < 30:
            with django_capture_on_commit_callbacks(execute=True):
                api.published(body=str(hop + 1).encode())
        depth -= 1
        return httpx.Response(200)

    wire.answer = answer
    with django_capture_on_commit_callbacks(execute=True):
        api.published(body=b"1")
    assert len(wire.requests) == 30
    assert deepest == 1


@pytest.mark.parametrize("wait", ["0s", "2h"])
def test_a_broker_that_is_away_does_not_keep_anybody_from_publishing(
    api: Api,
    wait: str,
    caplog: pytest.LogCaptureFixture,
    django_capture_on_commit_callbacks: Any,
) -> None:
    usual = current_app._get_current_object()
    away = Celery("away", broker="amqp://guest@127.0.0.1:9//")
    away.conf.broker_connection_timeout = 0.1
    try:
        with django_capture_on_commit_callbacks(execute=True):
            api.published(Upstash_Delay=wait)
            message_id = api.published(Upstash_Delay=wait)
    finally:
        usual.set_current()
    assert state(message_id) == "CREATED"
    heard = [
        record.message for record in caplog.records if "the sweep will deliver" in record.message
    ]
    # The second does not even try: each try takes seconds.
    assert len(heard) == (0 if wait == "2h" else 1)


def test_with_an_engine_of_its_own_a_site_rings_no_celery(
    api: Api,
    configure: Callable[..., None],
    django_capture_on_commit_callbacks: Any,
) -> None:
    configure(ENGINE="thread")
    with django_capture_on_commit_callbacks(execute=True):
        message_id = api.published()
    assert state(message_id) == "CREATED"


def test_an_engine_in_this_process_hears_the_bell_and_celery_does_not(
    api: Api, django_capture_on_commit_callbacks: Any
) -> None:
    bell = threading.Event()
    with doorbell.listening(bell), django_capture_on_commit_callbacks(execute=True):
        message_id = api.published()
    assert bell.is_set()
    assert state(message_id) == "CREATED"


@pytest.mark.django_db(transaction=True)
def test_a_worker_drains_with_many_calls_in_flight(api: Api, wire: Wire) -> None:
    everybody = threading.Barrier(10)

    def answer(request: httpx.Request) -> httpx.Response:
        if str(request.url) == PROVIDER:
            everybody.wait(10)
        return httpx.Response(200)

    wire.answer = answer
    with doorbell.listening(threading.Event()):
        for _ in range(10):
            api.published(Upstash_Callback=CALLBACK)
        queued = [api.enqueue("q", "https://queue.test/") for _ in range(3)]
        api.published(Upstash_Delay="50s")
    engine = Engine()
    wait = engine.drain()
    engine.close()
    assert wait is not None
    assert 40 < wait <= 50
    assert Message.objects.filter(state="DELIVERED").count() == 23
    assert [state(message_id) for message_id in queued] == ["DELIVERED"] * 3


def test_the_sweep_clears_out_what_is_too_old_and_no_more(
    api: Api, wire: Wire, clock: Clock
) -> None:
    wire.answers(httpx.Response(500), httpx.Response(200))
    dead = api.published(Upstash_Retries="0", Upstash_Forward_Authorization="Bearer canary")
    tasks.sweep()
    done = api.published(Upstash_Deduplication_Id="one")
    tasks.sweep()
    waiting = api.published(Upstash_Delay="30d")
    assert (state(dead), state(done)) == ("FAILED", "DELIVERED")

    def age(**delta: float) -> None:
        past = timezone.now() - timedelta(**delta)
        Message.objects.filter(finished_at__isnull=False).update(finished_at=past)
        LogEntry.objects.update(time=past)
        DeadLetter.objects.update(created_at=past)
        Deduplication.objects.update(expires_at=past)
        tasks.sweep()

    age(hours=23)
    assert set(Message.objects.values_list("message_id", flat=True)) == {dead, done, waiting}
    assert not Deduplication.objects.exists()
    assert api.get(f"/v2/messages/{done}").status_code == 200
    age(hours=25)
    assert api.get(f"/v2/messages/{done}").status_code == 404
    assert bytes(Message.objects.get(message_id=done).body) == b""
    assert bytes(Message.objects.get(message_id=dead).body) == b"hello"
    assert LogEntry.objects.exists()
    age(days=15)
    assert list(Message.objects.values_list("message_id", flat=True)) == [waiting]
    assert not DeadLetter.objects.exists()
    assert not LogEntry.objects.exists()


def outdated(count: int) -> None:
    past = timezone.now() - timedelta(days=30)
    Deduplication.objects.bulk_create(
        [
            Deduplication(key=str(number), message_id="msg_1", expires_at=past)
            for number in range(count)
        ],
        batch_size=1000,
    )


def test_a_sweep_goes_on_with_more_than_one_go_takes(db: None) -> None:
    outdated(20_001)
    assert retention.purge(timezone.now())
    assert Deduplication.objects.count() == 1
    assert not retention.purge(timezone.now())
    outdated(20_001)
    tasks.sweep()
    assert not Deduplication.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_an_engine_goes_on_with_more_than_one_go_takes() -> None:
    outdated(20_001)
    engine = Engine()
    running = threading.Thread(target=engine.run)
    running.start()
    try:
        # Not in a minute.
        eventually(lambda: not Deduplication.objects.exists())
    finally:
        engine.stop()
        running.join()
        engine.close()


def test_an_id_that_is_taken_over_while_ids_are_purged_stays(api: Api) -> None:
    first = api.published(Upstash_Deduplication_Id="one")
    past = timezone.now() - timedelta(minutes=1)
    Deduplication.objects.update(expires_at=past)

    def take_over(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("DELETE"):
            Deduplication.objects.update(expires_at=timezone.now() + timedelta(minutes=9))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(take_over):
        retention.purge(timezone.now())
    assert Deduplication.objects.get().message_id == first


def test_a_finished_message_stays_while_its_callback_is_under_way(api: Api, wire: Wire) -> None:
    wire.answer = lambda request: httpx.Response(200 if str(request.url) == PROVIDER else 503)
    message_id = api.published(Upstash_Callback=CALLBACK)
    tasks.sweep()
    past = timezone.now() - timedelta(days=2)
    Message.objects.filter(finished_at__isnull=False).update(finished_at=past)
    tasks.sweep()
    assert state(message_id) == "DELIVERED"
    assert Message.objects.filter(kind="callback", state="RETRY").exists()
