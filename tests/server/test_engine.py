"""What happens between an engine's steps: leases that run out, neighbours that lock, bells that
ring too early, destinations that mean harm."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_qstash_llm.server import doorbell, retention
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import (
    DeadLetter,
    Deduplication,
    FlowControlKey,
    Message,
    Queue,
)

from .conftest import CALLBACK, Api, Clock, Outage, Wire, at_once, state
from .test_delivery import RENEWAL, eventually, listening, real

__all__ = ["real"]


def quietly(work: Callable[[], Any]) -> Any:
    """With nobody rung: eager, that would deliver."""
    with doorbell.listening(threading.Event()):
        return work()


def elsewhere(work: Callable[[], Any]) -> None:
    """On a connection of its own, to the end."""
    at_once(1, lambda _: work())


@contextmanager
def meanwhile(part: str, work: Callable[[], Any], *, nth: int = 1) -> Iterator[None]:
    """``work`` elsewhere, right after the first statement with ``part`` in it, or the ``nth``."""
    left, seen = [work], 0

    def execute(run: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        nonlocal seen
        answer = run(sql, params, many, context)
        seen += part in sql
        if left and seen == nth:
            elsewhere(left.pop())
        return answer

    with connection.execute_wrapper(execute):
        yield
    assert not left, f"nothing said {part}"


# --- leases --------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_an_engine_whose_lease_ran_out_goes_on_with_its_call_and_makes_no_second(
    api: Api, wire: Wire, clock: Clock, outage: Outage, configure: Callable[..., None]
) -> None:
    configure(POLL=0.05)
    renewed, again = threading.Event(), threading.Event()

    def note(statement: str) -> bool:
        if statement.startswith(RENEWAL):
            renewed.set()
        return False

    def answer(request: httpx.Request) -> httpx.Response:
        if len(wire.requests) > 1:
            again.set()
        else:
            # The next renewal is seconds away, and here they are over at once.
            renewed.wait(5)
            clock.advance(61)
            again.wait(0.5)
        return httpx.Response(200)

    wire.answer = answer
    message_id = quietly(api.published)
    outage.begin(note)
    engine = Engine(clock=clock)
    assert engine.drain() is None
    engine.close()
    assert state(message_id) == "DELIVERED"
    assert len(wire.requests) == 1


@pytest.mark.django_db(transaction=True)
def test_a_renewal_that_broke_is_made_up_for_at_once(
    api: Api, wire: Wire, outage: Outage, configure: Callable[..., None]
) -> None:
    configure(LEASE=20, POLL=0.05)
    tries, third = [0], threading.Event()

    def is_hit(statement: str) -> bool:
        if not statement.startswith(RENEWAL):
            return False
        tries[0] += 1
        if tries[0] == 3:
            third.set()
        return tries[0] < 3

    wire.answer = lambda request: httpx.Response(200 if third.wait(3) else 500)
    message_id = quietly(lambda: api.published(Upstash_Retries="0"))
    outage.begin(is_hit)
    engine = Engine()
    assert engine.drain() is None
    engine.close()
    assert state(message_id) == "DELIVERED"


@pytest.mark.django_db(transaction=True)
def test_what_no_thread_could_be_started_for_is_let_go_of(
    api: Api, outage: Outage, configure: Callable[..., None]
) -> None:
    configure(POLL=0.05)
    ids = [quietly(lambda: api.published(Upstash_Retries="0")) for _ in range(3)]
    usual = threading.stack_size(2**40)  # more memory than there is

    def note(statement: str) -> bool:
        if statement.startswith("UPDATE") and "CANCEL_REQUESTED" in statement:
            threading.stack_size(usual)
        return False

    outage.begin(note)
    engine = Engine(concurrency=3)
    try:
        assert engine.drain() is None
    finally:
        threading.stack_size(usual)
        engine.close()
    assert [state(message_id) for message_id in ids] == ["DELIVERED"] * 3
    assert Message.objects.filter(interruptions=0).count() == 3


# --- who comes in between ------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_key_that_is_brought_while_it_is_forgotten_keeps_its_message(
    api: Api, engine: Engine
) -> None:
    flow = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "parallelism=1"}
    api.published(**flow)
    FlowControlKey.objects.update(updated_at=timezone.now() - timedelta(days=2))
    Message.objects.all().delete()
    ids: list[str] = []
    part = 'FROM "qstash_server_flowcontrolkey"'
    with meanwhile(part, lambda: ids.append(api.published(**flow))):
        retention.purge(timezone.now())
    assert engine.deliver_due() == 1
    assert state(ids[0]) == "DELIVERED"


@pytest.mark.django_db(transaction=True)
def test_a_drain_does_not_end_on_what_came_when_it_had_looked(api: Api) -> None:
    engine = Engine()
    looked = 'FROM "qstash_server_schedule" WHERE "qstash_server_schedule"."next_at" <='
    # The first is the round's own; with the second the drain ends.
    with meanwhile(looked, lambda: api.enqueue("q"), nth=2):
        wait = engine.drain()
    engine.close()
    assert wait == 0


on_postgresql = pytest.mark.skipif(
    connection.vendor != "postgresql", reason="SQLite locks no rows, but all there is"
)


@on_postgresql
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("waits_for", ["queue", "key"])
def test_an_engine_waits_for_nobody_who_cancels(api: Api, waits_for: str) -> None:
    # It holds the queue, or the key, that a canceller of many may come to want: a deadlock.
    flow = {"Upstash_Flow_Control_Key": "k", "Upstash_Flow_Control_Value": "parallelism=1"}
    publish = (lambda: api.enqueue("q")) if waits_for == "queue" else lambda: api.published(**flow)
    held, free = quietly(publish), quietly(publish)
    claimed: list[str] = []

    def claim() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '2s'")
        rows = Message.objects.claim(engine="e:1:1", limit=10, now=timezone.now())
        claimed.extend(row.message_id for row in rows)

    with transaction.atomic():
        Message.objects.filter(message_id=held).select_for_update().get()
        elsewhere(claim)
    assert claimed == [free]


@on_postgresql
@pytest.mark.django_db(transaction=True)
def test_leases_are_renewed_in_the_order_in_which_messages_are_cancelled(api: Api) -> None:
    ids = [quietly(api.published) for _ in range(2)]
    tokens = [
        row.claim_token
        for _ in ids
        for row in Message.objects.claim(engine="e:1:1", limit=1, now=timezone.now())
    ]
    # The first has the token that sorts last: an index on tokens finds the second one before it.
    for message_id, token in zip(ids, sorted(tokens, reverse=True), strict=True):
        Message.objects.filter(message_id=message_id).update(claim_token=token)
    first = Message.objects.get(message_id=ids[0])
    renewing = threading.Thread(target=lambda: elsewhere(renew))

    def renew() -> None:
        Message.objects.renew(tokens, until=timezone.now())

    with transaction.atomic():
        Message.objects.filter(pk=first.pk).select_for_update().get()
        renewing.start()
        eventually(is_somebody_waiting)
        # Whoever cancels comes to the second after the first: nobody may hold it by then.
        Message.objects.filter(message_id=ids[1]).select_for_update(nowait=True).get()
    renewing.join()


def is_somebody_waiting() -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks "
            "WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        )
        return bool(cursor.fetchone()[0])


# --- destinations that mean harm -----------------------------------------------------------------


def test_a_destination_that_reads_slowly_is_cut_off_when_the_time_is_over(
    api: Api, real: Engine
) -> None:
    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end = time.monotonic() + 3
        while time.monotonic() < end and connection.recv(60_000):
            time.sleep(0.02)

    with listening(serve) as port:
        body = b"x" * 10_000_000
        api.published(
            f"http://127.0.0.1:{port}/", body, Upstash_Timeout="400ms", Upstash_Retries="0"
        )
        began = time.monotonic()
        real.deliver_due()
        assert time.monotonic() - began < 2
    assert "no response within 0.4 s" in DeadLetter.objects.get().error


def test_what_comes_after_a_compressed_response_is_not_kept(api: Api, real: Engine) -> None:
    sent = [0]

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 900000000\r\n\r\n"
        connection.sendall(head + gzip.compress(b"hello"))
        try:
            while sent[0] < 200_000_000:
                sent[0] += connection.send(b"x" * 65536)
        except OSError:
            return

    with listening(serve) as port:
        api.published(f"http://127.0.0.1:{port}/", Upstash_Callback=CALLBACK, Upstash_Timeout="2s")
        assert real.deliver_due(limit=1) == 1
    assert sent[0] < 20_000_000
    assert Message.objects.filter(state="DELIVERED").count() == 1


# --- many, and large -----------------------------------------------------------------------------


def test_large_messages_are_stored_in_several_statements(api: Api) -> None:
    endpoints = [{"url": f"https://endpoint-{number}.test/"} for number in range(4)]
    api.post("/v2/topics/group/endpoints", {"endpoints": endpoints})
    with CaptureQueriesContext(connection) as queries:
        quietly(lambda: api.publish("group", b"x" * 9_000_000))
    stored = [each for each in queries if each["sql"].startswith('INSERT INTO "qstash_server_mess')]
    assert len(stored) == 4
    assert Message.objects.count() == 4


def test_a_claim_takes_as_many_as_there_is_room_for_their_bodies(api: Api) -> None:
    ids = [api.published(body=bytes(400)) for _ in range(7)]

    def taken(most_bytes: int) -> list[str]:
        now = timezone.now()
        rows = Message.objects.claim(
            engine="e:1:1", limit=20, now=now, lease=9, most_bytes=most_bytes
        )
        assert all(len(row.body) == 400 for row in rows)
        return [row.message_id for row in rows]

    assert taken(1000) == ids[:3]
    assert taken(800) == ids[3:5]
    # Always one, however large.
    assert taken(1) == ids[5:6]
    assert taken(1000) == ids[6:]
    assert taken(1000) == []


def test_bodies_leave_half_of_the_room_to_those_whose_turn_it_is(api: Api) -> None:
    queued = api.enqueue("q", body=bytes(400))
    gated = api.published(
        body=bytes(400), Upstash_Flow_Control_Key="k", Upstash_Flow_Control_Value="rate=9"
    )
    for _ in range(9):
        api.published(body=bytes(400))
    rows = Message.objects.claim(
        engine="e:1:1", limit=20, now=timezone.now(), lease=9, most_bytes=2000
    )
    assert len(rows) == 5
    assert {queued, gated} <= {row.message_id for row in rows}
    assert Message.objects.get(message_id=gated).flow_control.rate_count == 1


def test_a_claim_takes_the_same_queries_however_many_it_takes(api: Api) -> None:
    def queries(count: int) -> int:
        for _ in range(count):
            api.published()
        with CaptureQueriesContext(connection) as captured:
            rows = Message.objects.claim(engine="e:1:1", limit=20, now=timezone.now(), lease=9)
        assert len(rows) == count
        return len(captured)

    assert queries(2) == queries(15)


@pytest.mark.django_db(transaction=True)
def test_large_bodies_go_a_few_at_a_time_and_all_arrive(api: Api, wire: Wire) -> None:
    under_way, most = 0, 0
    counting, together = threading.Lock(), threading.Barrier(2)

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        with counting:
            under_way += 1
            most = max(most, under_way)
        together.wait(10)
        with counting:
            under_way -= 1
        return httpx.Response(200)

    wire.answer = answer
    for _ in range(8):
        quietly(lambda: api.published(body=bytes(600)))
    engine = Engine(most_bytes=1000)
    engine.drain()
    engine.close()
    assert Message.objects.filter(state="DELIVERED").count() == 8
    assert most == 2


@pytest.mark.django_db(transaction=True)
def test_callbacks_that_there_is_no_room_for_are_claimed_later(api: Api, wire: Wire) -> None:
    for _ in range(4):
        quietly(lambda: api.published(body=bytes(600), Upstash_Callback=CALLBACK))
    engine = Engine(most_bytes=1)
    engine.drain()
    engine.close()
    assert len(wire.callbacks()) == 4
    assert set(Message.objects.values_list("state", flat=True)) == {"DELIVERED"}


@pytest.mark.django_db(transaction=True)
def test_an_id_that_is_cleared_out_while_it_is_taken_over_is_taken(api: Api) -> None:
    quietly(lambda: api.published(Upstash_Deduplication_Id="one"))
    now = timezone.now() + timedelta(minutes=11)
    key = Deduplication.objects.get().pk
    if connection.vendor == "postgresql":
        clear = Deduplication.objects.filter(pk=key).delete
        with meanwhile('FROM "qstash_server_deduplication"', lambda: clear(), nth=2):
            holders = Deduplication.objects.claim({key: "msg_2"}, now=now)
    else:
        holders = Deduplication.objects.claim({key: "msg_2"}, now=now)
    assert holders == {key: "msg_2"}
    assert Deduplication.objects.get().message_id == "msg_2"


def test_a_queue_that_is_deleted_while_paused_holds_nobody_who_came_too_late(
    api: Api, engine: Engine
) -> None:
    quietly(lambda: api.enqueue("q"))
    api.post("/v2/queues/q/pause")
    queue = Queue.objects.get()
    quietly(lambda: queue.discard(now=timezone.now()))
    # As if it had been stored right behind that.
    Message.objects.update(state="CREATED", finished_at=None, waits_for="queue")
    assert engine.deliver_due() == 1


def test_a_server_that_closes_without_saying_so_fails_no_delivery(api: Api, real: Engine) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with listening(serve) as port:
        ids = [api.published(f"http://127.0.0.1:{port}/", Upstash_Retries="0") for _ in range(6)]
        for _ in ids:
            real.deliver_due(limit=1)
    assert [state(message_id) for message_id in ids] == ["DELIVERED"] * 6


def test_a_steady_stream_leaves_half_to_those_whose_turn_it_is(api: Api) -> None:
    queued = api.enqueue("q")
    gated = api.published(Upstash_Flow_Control_Key="k", Upstash_Flow_Control_Value="rate=9")
    for _ in range(30):
        api.published()
    rows = Message.objects.claim(engine="e:1:1", limit=20, now=timezone.now(), lease=9)
    assert len(rows) == 20
    assert {queued, gated} <= {row.message_id for row in rows}
    rest = Message.objects.claim(engine="e:1:1", limit=20, now=timezone.now(), lease=9)
    assert len(rest) == 12


@pytest.mark.django_db(transaction=True)
def test_an_engine_that_watches_delivers_what_nobody_rang_for(api: Api, engine: Engine) -> None:
    watch = threading.Thread(target=engine.watch, args=(0.05,))
    watch.start()
    try:
        for _ in range(2):
            # Somebody else is rung, and does not move.
            with doorbell.listening(threading.Event()):
                message_id = api.published()
            eventually(lambda m=message_id: state(m) == "DELIVERED")
    finally:
        engine.stop()
        watch.join(10)
    assert not watch.is_alive()
