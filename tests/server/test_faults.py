"""Processes that die, sleep and lose their connections, and a server that loses nothing.

Everything is real: PostgreSQL, a Redis of our own, Celery workers in process groups of theirs.
Whether something was lost or done twice is told by the destinations, which nobody kills and which
keep a ledger, see ``ledger``.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlencode

import pytest
from django.db import connection
from django.utils import timezone

from django_qstash_llm.qstash import FlowControl, Options
from django_qstash_llm.qstash import Message as WireMessage
from django_qstash_llm.server import doorbell
from django_qstash_llm.server.models import Admitted, DeadLetter, LogEntry, Message

from .conftest import PROVIDER, Api, at_once, states
from .ledger import Attempt, Call, Death, Ledger, most_at_once, most_within
from .processes import Site, Worker, wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.once]


@pytest.fixture
def site(transactional_db: None, tmp_path: Path, configure: Callable[..., None]) -> Iterator[Site]:
    if connection.vendor != "postgresql":
        pytest.skip("on SQLite a killed writer holds up all others; this is about PostgreSQL")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    configure(ALLOW_LOOPBACK=True)
    site = Site(tmp_path)
    # Nobody is rung from here: eager, that would deliver. The workers' sweep finds the work.
    with doorbell.listening(Event()):
        try:
            yield site
        finally:
            site.close()


class Batch:
    """Messages to be published, and what each is to meet."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.items: list[dict[str, Any]] = []

    def add(
        self, count: int, *, queue: str = "", key: str = "", limit: str = "", **how: Any
    ) -> None:
        """``how``: what their destination does, see ``ledger``; or ``retries``."""
        retries = how.pop("retries", 3)
        for _ in range(count):
            number = len(self.items)
            told = {"number": number, "queue": queue, "key": key}
            url = self.site.destinations.url
            headers = {
                "Upstash-Retries": str(retries),
                "Upstash-Callback": f"{url}/callback/?{urlencode(told)}",
                "Upstash-Failure-Callback": f"{url}/callback/?{urlencode(told)}",
            }
            if key:
                headers["Upstash-Flow-Control-Key"] = key
                headers["Upstash-Flow-Control-Value"] = limit
            destination = f"{url}/provider/?{urlencode(told | how)}"
            item = {"destination": destination, "headers": headers, "body": "hello"}
            self.items.append(item | ({"queue": queue} if queue else {}))

    def publish(self) -> list[str]:
        answer = Api().post("/v2/batch", self.items)
        assert answer.status_code == 200, answer.content
        return [each["messageId"] for each in json.loads(answer.content)]


def is_all_finished() -> bool:
    return not Message.objects.unfinished().exists()


def finished_messages() -> int:
    return Message.objects.filter(kind="message", finished_at__isnull=False).count()


def unfinished() -> list[Any]:
    """For whoever reads that a test failed."""
    rows = Message.objects.unfinished().values_list(
        "kind", "state", "waits_for", "due_at", "claimed_by", "interruptions"
    )
    return [timezone.now(), len(rows), *rows[:10]]


# --- what must be true at the end -------------------------------------------------------------


def assert_nothing_is_lost(ids: list[str], ledger: Ledger) -> None:
    """Each message ended, and once; whoever asked was told of each attempt, and of that end."""
    assert is_all_finished(), unfinished()
    assert Message.objects.filter(kind="message").count() == len(set(ids)) == len(ids)
    assert Message.objects.next_due_at() is None
    assert not Message.objects.claimed().exists()
    assert not Message.objects.exclude(state__in=["DELIVERED", "FAILED"]).exists()

    ends = LogEntry.objects.filter(state__in=["DELIVERED", "FAILED"])
    ends_of = Counter(ends.values_list("message__message_id", "state"))
    expected = Counter(Message.objects.values_list("message_id", "state"))
    assert ends_of == expected

    sources = Message.objects.filter(kind="message")
    failed = set(sources.filter(state="FAILED").values_list("message_id", flat=True))
    letters = DeadLetter.objects.values_list("message__message_id", flat=True)
    assert sorted(letters) == sorted(failed)

    callbacks = Message.objects.exclude(kind="message")
    assert not callbacks.exclude(state="DELIVERED").exists()
    called = {call.attempt.message for call in ledger.read() if call.status == 200}
    assert set(callbacks.values_list("message_id", flat=True)) <= called
    assert_each_attempt_is_told_once(ids, ledger)


def assert_each_attempt_is_told_once(ids: list[str], ledger: Ledger) -> None:
    told: dict[str, dict[str, Call]] = {message_id: {} for message_id in ids}
    for call in ledger.read():
        if call.is_callback:
            # Under its own id: a callback that came twice is one.
            told[call.source][call.attempt.message] = call
    for message in Message.objects.filter(kind="message").only("message_id", "state", "retried"):
        heard = told[message.message_id].values()
        attempts = sorted(call.told[0] for call in heard)
        again = [message.retried] if message.state == "FAILED" else []
        assert attempts == sorted([*range(message.retried + 1), *again]), message.message_id
        statuses = {call.told[1] for call in heard if call.is_last}
        assert (200 in statuses) == (message.state == "DELIVERED")


def calls_too_many(ledger: Ledger, deaths: Iterable[Death] = ()) -> int:
    """Calls beyond the first of each attempt. None is there without a death that explains it."""
    hits = Counter(attempt for death in deaths for attempt in death.held)
    by_attempt = ledger.by_attempt()
    unexplained = {
        attempt: [(call.began, call.ended) for call in calls]
        for attempt, calls in by_attempt.items()
        if len(calls) > 1 + hits[attempt]
    }
    assert unexplained == {}
    return sum(len(calls) - 1 for calls in by_attempt.values())


def assert_queue_is_kept(queue: str, parallelism: int, ledger: Ledger) -> None:
    """A place is free when a message, its retries and its callbacks are done with."""
    spans: dict[int, tuple[float, float]] = {}
    for call in ledger.read():
        if call.asked["queue"] == queue:
            number = int(call.asked["number"])
            began, ended = spans.get(number, (call.began, call.ended))
            spans[number] = min(began, call.began), max(ended, call.ended)
    assert spans
    assert 1 <= most_at_once(spans.values()) <= parallelism
    if parallelism == 1:
        assert sorted(spans, key=lambda number: spans[number][0]) == sorted(spans)


def assert_key_is_kept(key: str, parallelism: int, ledger: Ledger) -> None:
    calls = [call for call in ledger.read() if call.asked["key"] == key and not call.is_callback]
    assert 1 <= most_at_once((call.began, call.ended) for call in calls) <= parallelism


def assert_rate_is_kept(key: str, rate: int, period: int) -> None:
    active = LogEntry.objects.filter(state="ACTIVE", message__flow_control_key=key)
    moments = [time.timestamp() for time in active.values_list("time", flat=True)]
    # The end of one window and the beginning of the next lie side by side.
    assert 1 <= most_within(period, moments) <= 2 * rate


# --- killed ----------------------------------------------------------------------------------


def test_workers_killed_twenty_times_lose_nothing_and_call_twice_only_what_they_held(
    site: Site,
) -> None:
    for queue, parallelism in {"three": 3, "keyed": 3}.items():
        Api().post("/v2/queues", {"queueName": queue, "parallelism": parallelism})
    batch = Batch(site)
    for queue in ("one", "two"):
        batch.add(25, queue=queue, latency=0.03)
        batch.add(5, queue=queue, latency=0.02, failures=1)
        batch.add(10, queue=queue, latency=0.01)
    batch.add(120, queue="three", latency=0.03)
    batch.add(100, queue="keyed", key="gate", limit="parallelism=2", latency=0.02)
    batch.add(200, key="narrow", limit="parallelism=5", latency=0.06)
    batch.add(100, key="narrow", limit="parallelism=5", latency=0.06, failures=1)
    batch.add(150, key="often", limit="rate=20, period=1", latency=0.05)
    batch.add(100, key="both", limit="parallelism=4, rate=50, period=1", latency=0.02, failures=1)
    batch.add(100, latency=0.05, failures=1, status=429)
    batch.add(60, latency=0.02, failures=2)
    batch.add(40, latency=0.02, failures=9, retries=1)
    batch.add(950, latency=0.1)
    assert len(batch.items) == 2000
    ids = batch.publish()

    workers = [site.worker(CONCURRENCY=40), site.worker(CONCURRENCY=40)]
    deaths: list[Death] = []
    while len(deaths) < 20:
        enough = len(ids) * (len(deaths) + 1) // 24
        assert wait_until(lambda n=enough: finished_messages() >= n, seconds=30), unfinished()
        # The other one goes on meanwhile, if it is there already.
        victim = one_that_works(workers)
        deaths.append(victim.die())
        victim.start()
    assert wait_until(is_all_finished, seconds=90, every=0.2), unfinished()

    assert_nothing_is_lost(ids, site.ledger)
    assert Message.objects.filter(kind="message", state="FAILED").count() == 40
    assert all(death.held for death in deaths)
    assert 0 < calls_too_many(site.ledger, deaths) <= sum(len(death.held) for death in deaths)
    site.ledger.bury(deaths)
    assert_queue_is_kept("one", 1, site.ledger)
    assert_queue_is_kept("two", 1, site.ledger)
    assert_queue_is_kept("three", 3, site.ledger)
    assert_key_is_kept("gate", 2, site.ledger)
    assert_key_is_kept("narrow", 5, site.ledger)
    assert_key_is_kept("both", 4, site.ledger)
    assert_rate_is_kept("often", 20, 1)
    assert_rate_is_kept("both", 50, 1)


def one_that_works(workers: list[Worker]) -> Worker:
    working: list[Worker] = []

    def is_found() -> bool:
        working[:] = [worker for worker in workers if worker.held()]
        return bool(working)

    assert wait_until(is_found, seconds=30, every=0.02), unfinished()
    return working[-1]


def test_a_message_that_kills_its_worker_ends_as_a_dead_letter_and_its_neighbours_arrive(
    site: Site,
) -> None:
    batch = Batch(site)
    batch.add(10, latency=0.02)
    batch.add(1, latency=60, retries=0)
    batch.add(10, latency=0.2)
    # In flight at each of the first deaths, and as suspect as the one that causes them.
    batch.add(5, latency=2, retries=0)
    ids = batch.publish()
    poison = ids[10]
    worker = site.worker()
    kills = 0

    def is_called_again() -> bool:
        return len(site.ledger.by_attempt().get(Attempt(poison, 0), [])) > kills

    def is_over() -> bool:
        return Message.objects.filter(message_id=poison, finished_at__isnull=False).exists()

    while not is_over() and kills <= Message.MOST_INTERRUPTIONS:
        assert wait_until(lambda: is_called_again() or is_over(), seconds=20), unfinished()
        if not is_over():
            worker.die()
            worker.start()
            kills += 1
    assert kills == Message.MOST_INTERRUPTIONS
    assert wait_until(is_all_finished, seconds=20), unfinished()
    assert_nothing_is_lost(ids, site.ledger)
    letter = DeadLetter.objects.get()
    assert letter.message.message_id == poison
    assert "engines died" in letter.error
    assert len(site.ledger.by_attempt()[Attempt(poison, 0)]) == kills


# --- asleep ----------------------------------------------------------------------------------


def test_a_worker_that_slept_through_its_lease_overwrites_nothing(site: Site) -> None:
    batch = Batch(site)
    # Its answers, had they counted: a 500 and another attempt.
    batch.add(15, latency=1.5, then=0.1, failures=1)
    batch.add(15, latency=1.5, then=4, failures=1)
    ids = batch.publish()
    workers = [site.worker(), site.worker()]

    def begun() -> int:
        return sum(not call.is_callback for call in site.ledger.read())

    assert wait_until(lambda: begun() == 30, seconds=20), unfinished()
    # Whoever came first has all of them.
    sleeper, successor = sorted(workers, key=lambda worker: not worker.held())
    sleeper.process.send(signal.SIGSTOP)
    slept = time.monotonic()
    assert len(sleeper.held()) == 30
    assert wait_until(lambda: begun() == 60 and finished_messages() == 15, seconds=20), unfinished()
    second = frozenset(Attempt(message_id, 0) for message_id in ids[15:])
    assert second <= successor.held()
    sleeper.process.send(signal.SIGCONT)
    assert wait_until(lambda: sleeper.said().count("taken over") == 30, seconds=10), sleeper.said()
    # What it had not overwritten then, it never will.
    assert second <= successor.held()
    assert wait_until(is_all_finished, seconds=20), unfinished()

    assert_nothing_is_lost(ids, site.ledger)
    by_attempt = site.ledger.by_attempt()
    for message_id in ids:
        stale, good = by_attempt[Attempt(message_id, 0)]
        assert (stale.status, good.status) == (500, 200)
        # It may only have slept for a moment: its lease is waited for.
        assert good.began > slept + 1
        log = ["CREATED", "ACTIVE", "ACTIVE", "DELIVERED"]
        assert states(message_id) == log
        heard = {c.told for c in site.ledger.read() if c.is_callback and c.source == message_id}
        assert heard == {(0, 200, f"answer {good.number}")}


def test_calls_that_outlast_the_lease_are_made_once_while_their_worker_lives(site: Site) -> None:
    batch = Batch(site)
    batch.add(30, latency=4)
    ids = batch.publish()
    # Three, of which two are busy, and of these one has room for what the other would lose.
    workers = [site.worker(LEASE=1.0, CONCURRENCY=20) for _ in range(3)]

    def busy() -> int:
        return sum(bool(worker.held()) for worker in workers)

    assert wait_until(lambda: busy() > 1, seconds=20), unfinished()
    assert wait_until(is_all_finished, seconds=30), unfinished()
    assert_nothing_is_lost(ids, site.ledger)
    assert calls_too_many(site.ledger) == 0
    assert {tuple(states(message_id)) for message_id in ids} == {("CREATED", "ACTIVE", "DELIVERED")}


# --- asked to end ----------------------------------------------------------------------------


def test_a_worker_that_is_asked_to_end_finishes_what_it_can_and_leaves_the_rest(
    site: Site,
) -> None:
    batch = Batch(site)
    batch.add(20, latency=1)
    batch.add(10, latency=6)
    batch.add(50, latency=0.1, key="narrow", limit="parallelism=1")
    ids = batch.publish()
    short, long = ids[:20], ids[20:30]
    worker = site.worker(GRACE=2.5)
    assert wait_until(lambda: len(site.ledger.read()) >= 31, seconds=20), unfinished()

    asked = time.monotonic()
    worker.process.send(signal.SIGTERM)
    assert worker.process.wait(2.5 + 8) == 0
    assert time.monotonic() - asked > 1
    rows = {message.message_id: message for message in Message.objects.filter(kind="message")}
    assert {rows[each].state for each in short} == {"DELIVERED"}
    # No lease to wait for, and no attempt that counts.
    left = {(rows[each].state, rows[each].claim_token, rows[each].interruptions) for each in long}
    assert left == {("CREATED", "", 0)}
    assert {rows[each].due_at < timezone.now() for each in long} == {True}
    held = {attempt for attempt in site.ledger.by_attempt() if attempt.message in long}
    assert not Message.objects.claimed().exists()

    site.worker()
    assert wait_until(is_all_finished, seconds=30), unfinished()
    assert_nothing_is_lost(ids, site.ledger)
    assert calls_too_many(site.ledger, [Death(asked, frozenset(held))]) == len(long)


# --- cut off ---------------------------------------------------------------------------------


def test_a_redis_that_comes_back_empty_costs_no_message_and_no_call(site: Site) -> None:
    batch = Batch(site)
    batch.add(150, latency=0.1, key="wide", limit="parallelism=10")
    batch.add(30, latency=0.05, queue="line")
    ids = batch.publish()
    site.worker()
    site.worker()
    for number in range(2):
        assert wait_until(lambda n=number: finished_messages() > 30 * (n + 1), seconds=30)
        site.redis.kill()
        # While it is away there comes more.
        more = Batch(site)
        more.add(40, latency=0.05, failures=1)
        ids += more.publish()
        time.sleep(1)
        site.redis.start()
    deaths: list[Death] = []

    def is_over() -> bool:
        deaths.extend(site.revive())
        return is_all_finished()

    assert wait_until(is_over, seconds=40), unfinished()
    late = Batch(site)
    late.add(10)
    ids += late.publish()
    # Those need a worker that found its way back to Redis.
    assert wait_until(is_over, seconds=40), unfinished()
    assert_nothing_is_lost(ids, site.ledger)
    # None, but for what a worker held that ended over it.
    assert calls_too_many(site.ledger, deaths) <= sum(len(death.held) for death in deaths)


def test_workers_whose_database_connections_are_cut_write_down_what_they_heard(
    site: Site,
) -> None:
    batch = Batch(site)
    batch.add(250, latency=0.2, failures=1)
    batch.add(30, latency=0.02, queue="line")
    batch.add(150, latency=0.05, key="narrow", limit="parallelism=6")
    ids = batch.publish()
    # Long enough that a lease which runs out would be seen.
    for _ in range(2):
        site.worker(CONCURRENCY=30, LEASE=6.0)
    cuts = 0
    for number in range(12):
        wait_until(lambda n=number: finished_messages() > 30 * (n + 1), seconds=10, every=0.02)
        cuts += cut_connections(site.workers)
    assert cuts >= 12
    assert wait_until(is_all_finished, seconds=40), unfinished()
    assert_nothing_is_lost(ids, site.ledger)
    assert calls_too_many(site.ledger) == 0


def cut_connections(workers: list[Worker]) -> int:
    names = [worker.name for worker in workers]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT COUNT(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = ANY(%s) AND datname = current_database()",
            [names],
        )
        return int(cursor.fetchone()[0])


# --- at once ---------------------------------------------------------------------------------


def test_twenty_engines_claim_four_thousand_messages_each_once() -> None:
    now = timezone.now() - timedelta(seconds=1)
    gate = Options(flow_control=FlowControl(key="gate", parallelism=5000))
    plain, gated = WireMessage(PROVIDER), WireMessage(PROVIDER, options=gate)
    with doorbell.listening(Event()):
        admitted = [Admitted(plain)] * 3000 + [Admitted(gated)] * 1000
        accepted = Message.objects.accept(admitted, account="", caller_ip="", now=now)

    def claim_all(number: int) -> list[str]:
        mine: list[str] = []
        while Message.objects.is_anything_to_do(timezone.now()):
            claimed = Message.objects.claim(
                engine=f"engine:{number}:1", limit=50, now=timezone.now(), lease=600
            )
            mine += [message.message_id for message in claimed]
        return mine

    claimed = at_once(20, claim_all)
    everything = [message_id for ids in claimed for message_id in ids]
    assert len(everything) == 4000
    assert set(everything) == {answer.message_id for answer in accepted}
    assert LogEntry.objects.filter(state="ACTIVE").count() == 4000
    assert sum(bool(ids) for ids in claimed) > 1
