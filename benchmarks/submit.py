"""How fast requests leave: from committed pending rows to submitted ones.

    python benchmarks/submit.py [--quick] [--json]

A stub QStash in another process answers at once. Measured in one run, interleaved:

(a) our client's batch call against a bare pooled httpx POST of the same bytes in the same chunks;
(b) the whole way, database included, against
    (b1) the common way: one Celery task, one new HTTP client, one POST and one save a request;
    (b2) the official ``qstash`` package publishing one by one, with no database at all.

Needs the ``qstash`` package, and PostgreSQL on 127.0.0.1 (TEST_POSTGRES_URL) for its rows.
"""

from __future__ import annotations

import multiprocessing
import os
import socketserver
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import django
import environ
import httpx
from django.conf import settings

from benchmarks.figures import Figure, arguments, at_least, at_most, median, show

TOKEN = "a-token-of-the-stub"
CHUNK = 100
MESSAGES = [
    {"role": "system", "content": "Summarise the user's text in two sentences."},
    {"role": "user", "content": "It was the best of times, it was the worst of times. " * 10},
]


# --- the stub --------------------------------------------------------------------------------


class Stub(socketserver.StreamRequestHandler):
    """As little HTTP as will do: what is measured is the sender."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while (request_line := self.rfile.readline()) not in (b"", b"\r\n"):
            length = 0
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                if header[:15].lower() == b"content-length:":
                    length = int(header[15:])
            body = self.rfile.read(length)
            answer = self.answer(request_line, body)
            self.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                + str(len(answer)).encode()
                + b"\r\n\r\n"
                + answer
            )

    def answer(self, request_line: bytes, body: bytes) -> bytes:
        one = b'{"messageId":"msg_%s"}' % uuid.uuid4().hex.encode()
        if b"/v2/batch" not in request_line:
            return one
        return b"[" + b",".join([one] * body.count(b'{"destination":')) + b"]"


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


def serve(port: multiprocessing.Queue[int]) -> None:
    server = Server(("127.0.0.1", 0), Stub)
    port.put(server.server_address[1])
    server.serve_forever()


def start_stub() -> str:
    context = multiprocessing.get_context("spawn")
    port: multiprocessing.Queue[int] = context.Queue()
    context.Process(target=serve, args=(port,), daemon=True).start()
    return f"http://127.0.0.1:{port.get(timeout=30)}"


# --- the site --------------------------------------------------------------------------------


def configure(stub: str, directory: str, *, migrates: bool = True) -> list[str]:
    """Two databases; answers the aliases that can be used. Without ``migrates`` they are there."""
    postgres = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
    settings.configure(
        SECRET_KEY="benchmark",
        DEBUG=False,
        USE_TZ=True,
        TIME_ZONE="UTC",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{directory}/submit.sqlite3",
                "OPTIONS": {
                    "timeout": 20,
                    "transaction_mode": "IMMEDIATE",
                    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
                },
            },
            "postgres": environ.Env.db_url_config(postgres) | {"CONN_MAX_AGE": None},
        },
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "rest_framework",
            "django_qstash_llm",
        ],
        QSTASH_URL=stub,
        QSTASH_TOKEN=TOKEN,
        QSTASH_CURRENT_SIGNING_KEY="sig_" + "0" * 28,
        QSTASH_LLM={
            "CALLBACK_BASE_URL": "https://site.example/llm",
            "PROVIDERS": {"openai": {"API_KEY": "sk-benchmark"}},
            "BATCH_SIZE": CHUNK,
        },
    )
    django.setup()
    from celery import Celery

    celery = Celery("benchmark", broker="memory://")
    celery.conf.task_always_eager = True
    celery.set_default()
    if not migrates:
        use_schema()
        return ["default", "postgres"]
    return ["default", *(["postgres"] if create_schema(postgres) else [])]


def use_schema() -> None:
    from django.db import connections

    connections["postgres"].settings_dict["OPTIONS"] = {"options": "-c search_path=llm_benchmark"}


def create_schema(postgres: str) -> bool:
    """Migrate both; the PostgreSQL tables live in a schema of their own that is dropped at the end."""
    from django.core.management import call_command
    from django.db import OperationalError, connections

    call_command("migrate", database="default", verbosity=0)
    try:
        with connections["postgres"].cursor() as cursor:
            cursor.execute(
                "DROP SCHEMA IF EXISTS llm_benchmark CASCADE; CREATE SCHEMA llm_benchmark"
            )
    except OperationalError as error:
        print(f"Not run on PostgreSQL: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    connections["postgres"].close()
    use_schema()
    call_command("migrate", database="postgres", verbosity=0)
    return True


def drop_schema() -> None:
    from django.db import connections

    with connections["postgres"].cursor() as cursor:
        cursor.execute("DROP SCHEMA IF EXISTS llm_benchmark CASCADE")


# --- (a) -------------------------------------------------------------------------------------


def chunk_of_messages(composer: Any) -> list[Any]:
    """As the outbox makes them, just before it hands them in."""
    from django_qstash_llm.models import LLMRequest

    rows = [
        LLMRequest(provider="openai", model="gpt-5.4-mini", messages=MESSAGES, retries=3)
        for _ in range(CHUNK)
    ]
    return [composer.message(row) for row in rows]


def measure_client(stub: str, count: int) -> Figure:
    """Call by call in turn, after the same preparations. Only the calls are timed."""
    from django_qstash_llm.models.outbox import Composer
    from django_qstash_llm.qstash import Client
    from django_qstash_llm.qstash.message import batch_body

    composer = Composer()
    ours = Client(TOKEN, base_url=stub)
    bare = httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
    json_type = {"Content-Type": "application/json"}
    our_times, bare_times = [], []
    for _ in range(count // CHUNK):
        chunk = chunk_of_messages(composer)
        started = time.perf_counter()
        answers = ours.batch(chunk)
        our_times.append(time.perf_counter() - started)
        body = batch_body(chunk_of_messages(composer))
        started = time.perf_counter()
        content = bare.post(f"{stub}/v2/batch", content=body, headers=json_type).content
        bare_times.append(time.perf_counter() - started)
        if len(answers) != CHUNK or content.count(b"messageId") != CHUNK:
            sys.exit("the stub did not answer for every message: no figure can be trusted")
    our_rate, bare_rate = (CHUNK / statistics.median(times) for times in (our_times, bare_times))
    return at_least(
        "(a) client's batch call / bare pooled POST of the same bytes", our_rate, bare_rate, 0.8
    )


def rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


# --- (b) -------------------------------------------------------------------------------------


def pending_rows(alias: str, count: int) -> None:
    """Committed rows that nobody has been told of."""
    from django_qstash_llm.models import LLMRequest

    LLMRequest.objects.using(alias).all().delete()
    rows = [LLMRequest(messages=MESSAGES) for _ in range(count)]
    for row in rows:
        row.prepare()
    LLMRequest.objects.using(alias).bulk_create(rows, batch_size=500)


class Tasks:
    """Counts the Celery tasks that run."""

    def __init__(self) -> None:
        from celery.signals import task_prerun

        self.count = 0
        task_prerun.connect(self.add, weak=False)

    def add(self, **_: object) -> None:
        self.count += 1


def measure_whole_way(alias: str, count: int, tasks: Tasks) -> tuple[float, float]:
    """Requests per second, and Celery tasks per 100 requests."""
    from django_qstash_llm.models import LLMRequest
    from django_qstash_llm.tasks import submit

    pending_rows(alias, count)
    before = tasks.count
    speed = rate(count, lambda: submit.delay(alias))
    submitted = LLMRequest.objects.using(alias).submitted().exclude(qstash_message_id="").count()
    if submitted != count:
        sys.exit(f"{submitted} of {count} rows were submitted: no figure can be trusted")
    return speed, (tasks.count - before) * 100 / count


def make_common_task(stub: str) -> Callable[..., object]:
    from celery import shared_task

    from django_qstash_llm.models import LLMRequest

    @shared_task(name="benchmark.common", ignore_result=True)
    def common(alias: str, pk: int) -> None:
        row = LLMRequest.objects.using(alias).get(pk=pk)
        with httpx.Client() as client:
            response = client.post(
                f"{stub}/v2/publish/https://api.openai.com/v1/chat/completions",
                json={"model": row.model, "messages": row.messages},
                headers={"Authorization": f"Bearer {TOKEN}", "Upstash-Retries": "3"},
            )
        row.qstash_message_id = response.json()["messageId"]
        row.state = "submitted"
        row.save()

    return common.delay


def measure_common_way(alias: str, common: Callable[..., object], count: int) -> float:
    from django_qstash_llm.models import LLMRequest

    pending_rows(alias, count)
    keys = list(LLMRequest.objects.using(alias).values_list("pk", flat=True))
    speed = rate(count, lambda: [common(alias, pk) for pk in keys])
    if LLMRequest.objects.using(alias).submitted().count() != count:
        sys.exit("the common way did not submit its rows: no figure can be trusted")
    return speed


def measure_official_package(stub: str, count: int) -> float:
    from qstash import QStash

    client = QStash(TOKEN, base_url=stub)
    body = {"model": "gpt-5.4-mini", "messages": MESSAGES}

    def publish() -> None:
        for _ in range(count):
            client.message.publish_json(
                url="https://api.openai.com/v1/chat/completions", body=body, retries=3
            )

    return rate(count, publish)


NAMES = {"default": "SQLite", "postgres": "PostgreSQL"}
B2_GOALS = {"default": 5.0, "postgres": 3.0}


def main() -> None:
    options = arguments(__doc__)
    count, common_count, rounds = (2_000, 40, 3) if options.quick else (10_000, 100, 3)
    stub = start_stub()
    with tempfile.TemporaryDirectory() as directory:
        aliases = configure(stub, directory)
        figures = [measure_client(stub, 10_000)]
        tasks, common_task = Tasks(), make_common_task(stub)
        for alias in aliases:
            ways, per_hundred = [], 0.0
            official, common = [], []
            for _ in range(rounds):
                speed, per_hundred = measure_whole_way(alias, count, tasks)
                ways.append(speed)
                official.append(measure_official_package(stub, count // 5))
                common.append(measure_common_way(alias, common_task, common_count))
            whole, b1, b2 = (median(iter(x).__next__, rounds) for x in (ways, common, official))
            name = NAMES[alias]
            figures += [
                at_least(
                    f"(b) whole way on {name} / (b1) task, client, POST, save each", whole, b1, 100
                ),
                at_least(
                    f"(b) whole way on {name} / (b2) official package, no database",
                    whole,
                    b2,
                    B2_GOALS[alias],
                ),
                at_most(f"    Celery tasks per 100 requests on {name}", per_hundred, 1.0, "tasks"),
            ]
        if "postgres" in aliases:
            drop_schema()
    show(figures, as_json=options.json)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    main()
