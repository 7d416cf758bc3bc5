"""How fast the server delivers, how many slow calls one worker holds, what a long line costs.

    python benchmarks/server.py [--quick] [--json]

One Celery worker (``-P threads -c 2``, Redis), a destination in another process. Measured in one
run, on SQLite and on PostgreSQL:

(a) messages delivered per second, the callback of each included, to an instant destination, against
    (a1) what the same worker does of an empty task that writes one row, and
    (a2) a bare pooled HTTP client that does the same two POSTs, one after the other;
(b) many calls of ten seconds at once: makespan against the ten seconds, memory, connections;
(c) publishing and claiming with 100,000 messages waiting (delayed, in a queue's line, at a
    flow-control key) against the same with 100.

Needs Redis on 127.0.0.1 (TEST_REDIS_URL) and PostgreSQL (TEST_POSTGRES_URL) for its rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import Figure, at_least, at_most, no_more_than, show

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0
"""Seconds that a slow call takes."""
BODY = json.dumps(
    {
        "model": "gpt-5.4-mini",
        "messages": [
            {"role": "system", "content": "Summarise the user's text in two sentences."},
            {"role": "user", "content": "It was the best of times, the worst of times. " * 10},
        ],
    }
).encode()
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "choices": [{"message": {"role": "assistant", "content": "Both. " * 40}}],
        "usage": {"prompt_tokens": 130, "completion_tokens": 80},
    }
).encode()


# --- the destination -------------------------------------------------------------------------


class Destination(asyncio.Protocol):
    """As little HTTP as will do: what is measured is the sender."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (head_ends := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:head_ends].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.received) < head_ends + 4 + length:
                return
            self.received = self.received[head_ends + 4 + length :]
            if b"/slow" in head.split(b"\r\n")[0]:
                asyncio.get_running_loop().call_later(SLOW, self.answer)
            else:
                self.answer()

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(ANSWER)
                + ANSWER
            )


def serve(port: multiprocessing.Queue[int]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Destination, "127.0.0.1", 0, backlog=4096)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def start_destination() -> str:
    context = multiprocessing.get_context("spawn")
    port: multiprocessing.Queue[int] = context.Queue()
    context.Process(target=serve, args=(port,), daemon=True).start()
    return f"http://127.0.0.1:{port.get(timeout=30)}"


# --- the site and its worker -------------------------------------------------------------------


class Worker:
    """One Celery worker, which hears a bell; what else it consumes, it is told."""

    def __init__(self) -> None:
        from benchmarks.server_worker import BELL, app

        self.app = app
        self.app.control.purge()
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.server_worker", "worker"]
        command += ["-P", "threads", "-c", "2", "-Q", BELL, "-l", "ERROR", "-n", "benchmark@here"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"BENCHMARK_ROLE": "worker"},
            # Its banner and its farewell would stand among the figures.
            stdout=subprocess.DEVNULL,
        )
        until(lambda: bool(self.app.control.inspect(timeout=1).ping()), seconds=60)

    def deliver(self) -> None:
        from django_qstash_llm.server.tasks import deliver

        deliver.delay()

    def write_rows(self, count: int) -> float:
        """Rows per second."""
        from benchmarks.server_worker import ROWS, write_one_row
        from django_qstash_llm.server.models import Deduplication

        Deduplication.objects.all().delete()
        for _ in range(count):
            write_one_row.delay()
        began = time.perf_counter()
        self.app.control.add_consumer(ROWS, reply=True)
        until(lambda: Deduplication.objects.count() >= count)
        seconds = time.perf_counter() - began
        self.app.control.cancel_consumer(ROWS, reply=True)
        return count / seconds

    def megabytes(self) -> float:
        """The most it ever held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def until(is_done: Callable[[], bool], seconds: float = 300, pause: float = 0.05) -> None:
    ends = time.perf_counter() + seconds
    while not is_done():
        if time.perf_counter() > ends:
            sys.exit("it took too long: no figure can be trusted")
        time.sleep(pause)


@contextmanager
def site(directory: str, *, on_postgres: bool) -> Iterator[None]:
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "benchmarks.server_settings",
        "BENCHMARK_ON_POSTGRES": str(on_postgres),
        "BENCHMARK_DIRECTORY": directory,
        "BENCHMARK_ROLE": "benchmark",
        "PYTHONPATH": str(ROOT),
    }
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    from benchmarks.server_settings import SCHEMA

    def drop_schema() -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")

    if on_postgres:
        drop_schema()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE SCHEMA {SCHEMA}")
    call_command("migrate", verbosity=0)
    yield
    if on_postgres:
        drop_schema()


def publish(count: int, destination: str, **options: Any) -> None:
    """Accepted, as a batch is; nobody is rung."""
    from django.utils import timezone

    from django_qstash_llm.qstash import Message as WireMessage
    from django_qstash_llm.qstash import Options
    from django_qstash_llm.server.models import Admitted, Message

    queue, callback = options.pop("queue", ""), options.pop("callback", "")
    body = options.pop("body", BODY)
    headers = {"Authorization": "Bearer sk-benchmark"}
    how = Options(content_type="application/json", headers=headers, retries=3, **options)
    message = WireMessage(destination, body, how, queue=queue, callback=callback)
    for begin in range(0, count, 1000):
        chunk = [Admitted(message)] * min(1000, count - begin)
        Message.objects.accept(chunk, account="", caller_ip="127.0.0.1", now=timezone.now())


def forget_everything() -> None:
    from django_qstash_llm.server.models import FlowControlKey, LogEntry, Message, Queue

    for model in (LogEntry, Message, Queue, FlowControlKey):
        model.objects.all()._raw_delete("default")


def is_all_finished() -> bool:
    """Of messages that wait for nothing else. By an index: asking must not cost what is measured."""
    from django_qstash_llm.server.models import Message

    return not Message.objects.filter(due_at__isnull=False).exists()


# --- (a) deliveries per second -------------------------------------------------------------------


def deliveries(worker: Worker, destination: str, count: int) -> float:
    """Messages per second, from the bell to the last callback that is written down."""
    from django_qstash_llm.server.models import Message

    forget_everything()
    publish(count, f"{destination}/instant", callback=f"{destination}/callback")
    began = time.perf_counter()
    worker.deliver()
    until(is_all_finished)
    seconds = time.perf_counter() - began
    if Message.objects.filter(state=Message.State.DELIVERED).count() != 2 * count:
        sys.exit("not all was delivered: no figure can be trusted")
    return count / seconds


def bare_loop(destination: str, count: int) -> float:
    """Pairs of POSTs per second, the same bytes both times as the server sends."""
    import httpx

    from django_qstash_llm.server.delivery.http import _ASKED_FOR
    from django_qstash_llm.server.models import Message

    rows = Message.objects.order_by("pk")
    message, callback = rows.filter(kind="message").first(), rows.filter(kind="callback").first()
    told = dict(_ASKED_FOR) | {
        "Content-Type": "application/json",
        "User-Agent": "Upstash-QStash",
        "Upstash-Message-Id": message.message_id,
        "Upstash-Retried": "0",
        "Upstash-Signature": "e" * 380,
        "Upstash-Region": "EU-CENTRAL-1",
        "Upstash-Caller-Ip": "127.0.0.1",
    }
    bodies = bytes(message.body), bytes(callback.body)
    with httpx.Client(trust_env=False) as client:
        began = time.perf_counter()
        for _ in range(count):
            client.post(f"{destination}/instant", content=bodies[0], headers=told).read()
            client.post(f"{destination}/callback", content=bodies[1], headers=told).read()
        return count / (time.perf_counter() - began)


def measure_deliveries(name: str, worker: Worker, destination: str, quick: bool) -> list[Figure]:
    from django.db import connection

    count, rounds = (1_000, 3) if quick else (3_000, 5)
    ours, tasks, bare = [], [], []
    deliveries(worker, destination, 100)
    if connection.vendor == "postgresql":
        publish(count, f"{destination}/instant", callback=f"{destination}/callback")
        with connection.cursor() as cursor:
            # What a database in use knows of its tables; autovacuum comes to it once a minute.
            cursor.execute("ANALYZE")
    for _ in range(rounds):
        ours.append(deliveries(worker, destination, count))
        bare.append(bare_loop(destination, count))
        tasks.append(worker.write_rows(count))
    rate = statistics.median(ours)
    return [
        at_least(
            f"(a) {name}: messages with callbacks / (a1) Celery tasks that write a row",
            rate,
            statistics.median(tasks),
            1.0,
            "messages/s",
        ),
        at_least(
            f"(a) {name}: messages with callbacks / (a2) bare client, two POSTs",
            rate,
            statistics.median(bare),
            0.4,
            "messages/s",
        ),
    ]


# --- (b) slow calls --------------------------------------------------------------------------


def measure_slow_calls(
    name: str, worker: Worker, destination: str, count: int, *, on_postgres: bool
) -> list[Figure]:
    forget_everything()
    publish(count, f"{destination}/slow", callback=f"{destination}/callback")
    connections = 0

    def is_done() -> bool:
        nonlocal connections
        connections = max(connections, connections_of_the_worker() if on_postgres else 0)
        return is_all_finished()

    began = time.perf_counter()
    worker.deliver()
    until(is_done, pause=0.1)
    makespan = time.perf_counter() - began
    figures = [
        no_more_than(f"(b) {name}: {count} calls of {SLOW:g} s / one", makespan, SLOW, 1.25, "s"),
        at_most(f"(b) {name}: the worker's memory at its most", worker.megabytes(), 400, "MB"),
    ]
    if on_postgres:
        most = at_most(f"(b) {name}: its database connections", connections, 1 + 5, "connections")
        figures.append(most)
    return figures


def connections_of_the_worker() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'worker'")
        return int(cursor.fetchone()[0])


# --- (c) a long line ---------------------------------------------------------------------------


def wait_in_line(count: int) -> None:
    """So many messages more, a third each: delayed, in a queue's line, at a flow-control key."""
    from django_qstash_llm.qstash import FlowControl

    url, third = "http://127.0.0.1:9/", count // 3
    publish(third, url, delay=86_400, body=b"{}")
    publish(third, url, queue="line", body=b"{}")
    flow = FlowControl(key="gate", rate=1, period=86_400, parallelism=1)
    publish(count - 2 * third, url, flow_control=flow, body=b"{}")


def measure_line(rounds: int) -> tuple[float, float]:
    """Milliseconds of a publish through the API, and of a claim that finds it."""
    from django.test import Client
    from django.utils import timezone

    from django_qstash_llm.server.models import Message

    client, publishes, claims = Client(), [], []
    headers = {"Authorization": "Bearer a-token-of-the-benchmark", "Upstash-Retries": "3"}
    for _ in range(rounds):
        began = time.perf_counter()
        answer = client.post(
            "/v2/publish/http://127.0.0.1:9/", BODY, "application/json", headers=headers
        )
        publishes.append(time.perf_counter() - began)
        began = time.perf_counter()
        claimed = Message.objects.claim(
            engine="benchmark", limit=200, now=timezone.now(), lease=86_400
        )
        claims.append(time.perf_counter() - began)
        if answer.status_code != 200 or len(claimed) != 1:
            sys.exit(f"{answer.status_code}, {len(claimed)} claimed: no figure can be trusted")
    return statistics.median(publishes) * 1000, statistics.median(claims) * 1000


def measure_waiting(name: str, count: int, rounds: int) -> list[Figure]:
    from django.utils import timezone

    from django_qstash_llm.server.models import Message

    forget_everything()
    wait_in_line(100)
    # The first of the queue, and the first at the key.
    Message.objects.claim(engine="benchmark", limit=200, now=timezone.now(), lease=86_400)
    measure_line(20)
    few = measure_line(rounds)
    wait_in_line(count - 100)
    many = measure_line(rounds)
    return [
        no_more_than(f"(c) {name}: {what} with {count:,} waiting / with 100", after, before, 1.5)
        for what, before, after in zip(("a publish", "a claim"), few, many, strict=True)
    ]


# --- all of it ---------------------------------------------------------------------------------


def measure(*, on_postgres: bool, quick: bool) -> list[Figure]:
    name = "PostgreSQL" if on_postgres else "SQLite"
    slow, waiting = (300, 10_000) if quick else (1_000, 100_000)
    destination = start_destination()
    with tempfile.TemporaryDirectory() as directory, site(directory, on_postgres=on_postgres):
        worker = Worker()
        try:
            figures = measure_deliveries(name, worker, destination, quick)
            figures += measure_slow_calls(name, worker, destination, slow, on_postgres=on_postgres)
        finally:
            worker.stop()
        figures += measure_waiting(name, waiting, 50 if quick else 200)
    return figures


def missing(what: str) -> str:
    """Why a service cannot be used; empty when it can."""
    try:
        if what == "redis":
            import redis

            url = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")
            redis.Redis.from_url(url).ping()
        else:
            import psycopg

            url = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1/postgres")
            psycopg.connect(url.replace("postgres://", "postgresql://"), connect_timeout=3).close()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="One object instead of the table.")
    parser.add_argument("--quick", action="store_true", help="Under two minutes, with more noise.")
    parser.add_argument("--database", choices=["sqlite", "postgres"], help="Only this one.")
    options = parser.parse_args()
    if problem := missing("redis"):
        sys.exit(f"Not run, there is no Redis: {problem}")
    if options.database:
        figures = measure(on_postgres=options.database == "postgres", quick=options.quick)
    else:
        figures = []
        for database in ("sqlite", "postgres"):
            if database == "postgres" and (problem := missing("postgres")):
                print(f"Not run on PostgreSQL: {problem}", file=sys.stderr)
                continue
            # A process each: a site has one database.
            command = [sys.executable, __file__, "--database", database, "--json"]
            command += ["--quick"] * options.quick
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            try:
                figures += [Figure(**each) for each in json.loads(run.stdout)["figures"]]
            except ValueError:
                sys.exit(f"the run on {database} broke")
    show(figures, as_json=options.json)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    main()
