"""How fast callbacks are taken: verified, stored, applied, committed.

    python benchmarks/callback.py [--quick] [--json] [--database sqlite|postgres]

gunicorn (gthread, 2 workers of 4 threads) for each contender, without middleware, on SQLite (WAL,
IMMEDIATE, synchronous NORMAL) and on PostgreSQL; a load process with 16 kept connections. Rounds
take turns, and after each the rows are counted and the costs compared. Measured in one run:

(a) callbacks per second against
    (b1) the typical way: a DRF view, a serializer, PyJWT, get_or_create, select_for_update, save;
    (b2) the webhook view of ``django-qstash``, its task a no-op, its result stored;
(b) processor time of the site per callback, against
    (b3) a bare WSGI function that verifies by hand and inserts one row;
(c) the 99th percentile at 50 callbacks a second, which arrive whether or not others are done;
(d) statements of each kind of callback, BEGIN and COMMIT included, with 1 receipt and with 5,000.

What everybody did is printed to stderr, and without ``--quick`` also what it costs us to ring for
the announcers, in Redis (TEST_REDIS_URL) or where there is none in memory; nobody else tells.

Needs gunicorn; PostgreSQL (TEST_POSTGRES_URL) for its rows, ``django-qstash`` for (b2).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import pickle
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import Figure, at_least, at_most, no_more_than, show

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 16
RATE = 50
"""Callbacks per second of the open loop."""
NAMES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
B2_GOALS = {"sqlite": 1.3, "postgres": 1.5}
MOST_STATEMENTS = 6
PROMPT = [
    {"role": "system", "content": "Summarise the user's text in two sentences."},
    {"role": "user", "content": "It was the best of times, it was the worst of times. " * 6},
]


class Untrustworthy(Exception):
    """Something went wrong in a round: no figure can be trusted."""


# --- what is told ------------------------------------------------------------------------------


def answer(index: int) -> dict[str, Any]:
    """A chat completion as OpenAI answers. Its tokens differ from one to the next."""
    prompt, completion, cached = 130 + index % 50, 80 + index % 7, index % 3
    return {
        "id": f"chatcmpl-{uuids.uuid4().hex}",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "gpt-5.4-mini-2026-03-17",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "A tale is told of two cities, and of times good and bad. " * 9,
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": None,
    }


def cost(index: int, *, tells_cached: bool) -> Decimal:
    """USD of ``answer(index)``, worked out apart from what is measured."""
    from benchmarks.callback_site import PRICE

    usage = answer(index)["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"] if tells_cached else 0
    return (
        (usage["prompt_tokens"] - cached) * Decimal(PRICE["input"])
        + cached * Decimal(PRICE["cached"])
        + usage["completion_tokens"] * Decimal(PRICE["output"])
    ) / 1_000_000


def envelope(index: int, **changed: Any) -> bytes:
    """What QStash sends, about 3 KB."""
    from django_qstash_llm.qstash import Callback

    told: dict[str, Any] = {
        "status": 200,
        "header": {
            "Content-Type": ["application/json"],
            "Date": ["Mon, 23 Nov 2026 00:00:00 GMT"],
            "Openai-Organization": ["site"],
            "Openai-Processing-Ms": ["1204"],
            "Openai-Version": ["2020-10-01"],
            "X-Ratelimit-Limit-Requests": ["10000"],
            "X-Ratelimit-Remaining-Requests": ["9999"],
            "X-Request-Id": [f"req_{uuids.uuid4().hex}"],
        },
        "body": json.dumps(answer(index)).encode(),
        "max_retries": 3,
        "source_message_id": f"msg_{uuids.uuid4().hex}",
        "url": "https://api.openai.com/v1/chat/completions",
        "source_header": {"Content-Type": ["application/json"]},
        "source_body": json.dumps({"model": "gpt-5.4-mini", "messages": PROMPT}).encode(),
        "created_at": 1_790_000_000_000,
    }
    return Callback(**{**told, **changed}).to_json()


def post(path: str, body: bytes, url: str) -> bytes:
    """One signed HTTP request, as bytes. The signature is good for five minutes."""
    from benchmarks.callback_site import SIGNING_KEYS
    from django_qstash_llm.qstash import sign

    signature = sign(body, url=url, key=SIGNING_KEYS[0], now=time.time())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: site.example\r\nContent-Type: application/json\r\n"
        f"User-Agent: Upstash-QStash\r\nUpstash-Message-Id: msg_{uuids.uuid4().hex}\r\n"
        f"Upstash-Retried: 0\r\nUpstash-Signature: {signature}\r\n"
        f"Accept-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def callback_post(uuid: object, index: int, **changed: Any) -> bytes:
    from benchmarks.callback_site import CALLBACK_URL

    return post(
        f"/callback/{uuid}/", envelope(index, **changed), f"{CALLBACK_URL}/callback/{uuid}/"
    )


# --- the contenders ----------------------------------------------------------------------------
#
# Each makes the rows and the signed requests of one round, and afterwards says what is wrong.


class Ours:
    name, title = "ours", "ours"

    def prepare(self, count: int) -> list[bytes]:
        from django.utils import timezone

        from django_qstash_llm.models import CallbackResponse, LLMRequest

        self.newest_receipt = newest(CallbackResponse)
        self.newest = newest(LLMRequest)
        now = timezone.now()
        rows = [LLMRequest(messages=PROMPT) for _ in range(count)]
        for row in rows:
            row.prepare()
            # As the outbox leaves it.
            row.state, row.qstash_message_id = "submitted", f"msg_{uuids.uuid4().hex}"
            row.submitted_at, row.deadline_at = now, row.next_deadline(now)
        LLMRequest.objects.bulk_create(rows, batch_size=500)
        return [
            callback_post(row.uuid, index, source_message_id=row.qstash_message_id)
            for index, row in enumerate(rows)
        ]

    def problem(self, count: int) -> str:
        from django_qstash_llm.models import CallbackResponse, LLMRequest

        receipts = CallbackResponse.objects.filter(pk__gt=self.newest_receipt)
        completed = LLMRequest.objects.filter(pk__gt=self.newest).completed()
        return unequal(
            stored=(receipts.count(), count),
            linked=(receipts.filter(llm_request__in=completed, problem="").count(), count),
            unfinished=(LLMRequest.objects.unfinished().count(), 0),
            costs=(costs(completed), [cost(index, tells_cached=True) for index in range(count)]),
        )


class Telling(Ours):
    """With a receiver that waits for completions, so that each rings the bell of the announcers."""

    name, title = "telling", "ours, somebody to tell"


class Typical:
    name, title = "typical", "(b1) the typical way"

    def prepare(self, count: int) -> list[bytes]:
        from benchmarks.callback_peers.models import Ask, Told
        from benchmarks.callback_site import MODEL

        self.newest_receipt, self.newest = newest(Told), newest(Ask)
        rows = [Ask(model=MODEL, messages=PROMPT) for _ in range(count)]
        Ask.objects.bulk_create(rows, batch_size=500)
        return [callback_post(row.uuid, index) for index, row in enumerate(rows)]

    def problem(self, count: int) -> str:
        from benchmarks.callback_peers.models import Ask, Told

        receipts = Told.objects.filter(pk__gt=self.newest_receipt)
        completed = Ask.objects.filter(pk__gt=self.newest, state="completed")
        return unequal(
            stored=(receipts.count(), count),
            linked=(receipts.filter(ask__in=completed).count(), count),
            costs=(costs(completed), [cost(index, tells_cached=False) for index in range(count)]),
        )


def newest(model: Any) -> int:
    """The primary key of the newest row, so that a round's own can be told from it."""
    return int(model.objects.order_by("-pk").values_list("pk", flat=True).first() or 0)


def costs(rows: Any) -> list[Decimal]:
    """In the order in which they were asked. Not summed by the database: SQLite's sum is a float."""
    return list(rows.order_by("pk").values_list("cost", flat=True))


class DjangoQStash:
    name, title = "django_qstash", "(b2) django-qstash"

    def prepare(self, count: int) -> list[bytes]:
        self.stored_before = self.stored()
        return [self.post(index) for index in range(count)]

    def post(self, index: int) -> bytes:
        task = {
            "function": "nothing",
            "module": "benchmarks.callback_peers.tasks",
            "args": [],
            # As many bytes as the others, and the answer in them.
            "kwargs": json.loads(envelope(index)),
            "task_name": "nothing",
            "options": {},
        }
        url = "https://site.example/qstash/webhook/"
        return post("/qstash/webhook/", json.dumps(task).encode(), url)

    def stored(self) -> int:
        from django.apps import apps

        results = apps.get_model("django_qstash_results", "TaskResult").objects
        return int(results.filter(status="SUCCESS", kwargs__status=200).count())

    def problem(self, count: int) -> str:
        return unequal(stored=(self.stored() - self.stored_before, count))


class Bare:
    name, title = "bare", "(b3) bare WSGI, no request"

    def prepare(self, count: int) -> list[bytes]:
        self.stored_before = self.stored()
        return [callback_post(uuids.uuid4(), index) for index in range(count)]

    def stored(self) -> int:
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM bare_callback WHERE status = 200")
            return int(cursor.fetchone()[0])

    def problem(self, count: int) -> str:
        return unequal(stored=(self.stored() - self.stored_before, count))


Contender = Ours | Typical | DjangoQStash | Bare


def unequal(**pairs: tuple[object, object]) -> str:
    return ", ".join(
        f"{name} {str(found)[:80]}, not {str(expected)[:80]}"
        for name, (found, expected) in pairs.items()
        if found != expected
    )


# --- gunicorn and its load ---------------------------------------------------------------------


def end_with_the_benchmark() -> None:
    """Linux's PR_SET_PDEATHSIG, in the new process: SIGTERM when the one that made it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Site:
    """gunicorn, serving one contender on a port of its own."""

    def __init__(self, contender: str) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            self.port = listening.getsockname()[1]
            command = [sys.executable, "-m", "gunicorn", "benchmarks.callback_peers.wsgi"]
            command += ["--bind", f"fd://{listening.fileno()}", "--worker-class", "gthread"]
            command += ["--workers", "2", "--threads", "4", "--keep-alive", "75"]
            command += ["--log-level", "warning", "--no-control-socket"]
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"BENCHMARK_CONTENDER": contender},
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Ctrl-C is for us, who then stop it; and where we are killed it ends by itself.
                start_new_session=True,
                preexec_fn=end_with_the_benchmark,
            )

    def processor_seconds(self) -> float:
        """User and system, of the workers and the one that keeps them."""
        ticks = 0
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in (str(self.process.pid), *children.split()):
            # After the name, which may hold anything, the 12th and 13th.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Round:
    """One round of one contender, which was right in the end."""

    rate: float
    """Callbacks per second."""
    processor: float
    """Milliseconds per callback."""
    latencies: list[float]
    """Milliseconds."""

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


@dataclass
class Runner:
    contender: Contender
    site: Site
    directory: str
    rounds: list[Round] = field(default_factory=list)

    def run(self, count: int, *rate: int) -> Round:
        """One round of ``count`` callbacks. Raises ``Untrustworthy``."""
        file = f"{self.directory}/requests"
        Path(file).write_bytes(pickle.dumps(self.contender.prepare(count)))
        command = [sys.executable, str(ROOT / "benchmarks" / "callback_load.py")]
        command += [str(each) for each in (self.site.port, file, CONNECTIONS, *rate)]
        before = self.site.processor_seconds()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise Untrustworthy(f"{self.contender.title}: its load broke")
        processor = self.site.processor_seconds() - before
        told = json.loads(done.stdout)
        if told["refused"]:
            first = told["refused"][0]
            raise Untrustworthy(f"{self.contender.title}: {len(told['refused'])} refused, {first}")
        if problem := self.contender.problem(count):
            raise Untrustworthy(f"{self.contender.title}: {problem}")
        milliseconds = [each * 1000 for each in told["latencies"]]
        return Round(count / told["seconds"], processor * 1000 / count, milliseconds)

    def median(self, of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, self.rounds))

    def describe(self) -> str:
        rates = [each.rate for each in self.rounds]
        return (
            f"{self.contender.title:<28} {self.median(lambda r: r.rate):>7,.0f}"
            f" ({min(rates):,.0f}-{max(rates):,.0f}) callbacks/s,"
            f" {self.median(lambda r: r.processor):.2f} ms of processor,"
            f" p50 {self.median(lambda r: r.percentile(50)):.1f} ms,"
            f" p99 {self.median(lambda r: r.percentile(99)):.1f} ms"
        )


def compete(runners: list[Runner], *, seconds: float, rounds: int) -> None:
    """Rounds of about ``seconds``, in turn. The first is for warming up and to know the pace."""
    counts = {}
    for runner in runners:
        runner.run(80)
        counts[runner.contender.name] = max(60, round(runner.run(80).rate * seconds))
    analyse()
    for number in range(rounds):
        # Each is first, and each is last, as often as the others.
        turn = number % len(runners)
        for runner in runners[turn:] + runners[:turn]:
            runner.rounds.append(runner.run(counts[runner.contender.name]))


def analyse() -> None:
    """What a database in use knows of its tables; autovacuum comes to it once a minute."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


# --- statements --------------------------------------------------------------------------------


def statements(request: bytes) -> list[str]:
    """The statements that one callback takes, by their first words."""
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    head, _, body = request.partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    with CaptureQueriesContext(connection) as captured:
        answer = Client().post(
            line.split()[1],
            body,
            "application/json",
            headers=dict(header.split(": ", 1) for header in headers),
        )
    if answer.status_code != 200:
        raise Untrustworthy(f"a callback was answered with {answer.status_code}")
    return [each["sql"].split()[0] for each in captured.captured_queries]


def each_kind() -> dict[str, list[str]]:
    """The statements of every kind of callback, each for a request of its own."""
    from benchmarks.callback_site import CALLBACK_URL
    from django_qstash_llm.models import CallbackResponse, LLMRequest

    def told(uuid: object, **changed: Any) -> bytes:
        url = f"{CALLBACK_URL}/callback/{uuid}/"
        return post(f"/callback/{uuid}/", envelope(1, **changed), url)

    rows = [LLMRequest(messages=PROMPT) for _ in range(4)]
    for row in rows:
        row.prepare()
        row.state = "submitted"
    LLMRequest.objects.bulk_create(rows)
    first, retried, given_up, dead = (row.uuid for row in rows)
    refusal = {"status": 500, "body": b'{"error": {"message": "try again", "type": "server"}}'}
    answered = told(first)
    kinds = {
        "a first callback": statements(answered),
        "the same again": statements(answered),
        "a failure, retries left": statements(told(retried, **refusal)),
        "a final failure": statements(told(given_up, **refusal, retried=3)),
        "a failure callback": statements(told(dead, **refusal, retried=3, dlq_id="dlq_1")),
        "an orphan": statements(told(uuids.uuid4())),
    }
    states = [LLMRequest.objects.get(pk=row.pk).state for row in rows]
    orphans = CallbackResponse.objects.filter(llm_request=None).count()
    if problem := unequal(states=(states, ["completed", "submitted", "failed", "failed"])):
        raise Untrustworthy(problem)
    if not orphans:
        raise Untrustworthy("the orphan was not stored")
    return kinds


def fill_receipts(count: int) -> None:
    from django_qstash_llm.models import CallbackResponse

    rows = [
        CallbackResponse(
            uuid=uuids.uuid4(), kind="callback", source_message_id=f"msg_{uuids.uuid4().hex}"
        )
        for _ in range(count)
    ]
    CallbackResponse.objects.bulk_create(rows, batch_size=500)


def measure_statements(name: str) -> list[Figure]:
    """On empty tables."""
    from django_qstash_llm.models import CallbackResponse, LLMRequest

    each_kind()  # a process that has been answered before, as nearly every one is
    fill_receipts(1)
    few = each_kind()
    fill_receipts(5_000)
    many = each_kind()
    print(f"{name}, statements of", file=sys.stderr)
    for kind, words in few.items():
        print(f"  {kind:<28} {len(words)}: {' '.join(words)}", file=sys.stderr)
    most = max(few, key=lambda kind: len(few[kind]))
    for model in (CallbackResponse, LLMRequest):
        model.objects.all().delete()
    return [
        at_most(f"(d) {name}: statements of {most}", len(few[most]), MOST_STATEMENTS, "statements"),
        no_more_than(
            f"(d) {name}: statements with 5,000 receipts / with 1",
            sum(map(len, many.values())),
            sum(map(len, few.values())),
            1.0,
            "statements",
        ),
    ]


# --- all of it ---------------------------------------------------------------------------------


@contextmanager
def database(directory: str, *, on_postgres: bool, broker: str) -> Iterator[None]:
    has_peer = importlib.util.find_spec("django_qstash") is not None
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "benchmarks.callback_site",
        "BENCHMARK_ON_POSTGRES": str(on_postgres),
        "BENCHMARK_DIRECTORY": directory,
        "BENCHMARK_BROKER": broker,
        "BENCHMARK_HAS_DJANGO_QSTASH": str(has_peer),
        "PYTHONPATH": str(ROOT),
    }
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    from benchmarks.callback_peers.bare import CREATE
    from benchmarks.callback_site import SCHEMA

    def execute(sql: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(sql)

    drop = f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"
    if on_postgres:
        execute(f"{drop}; CREATE SCHEMA {SCHEMA}")
    try:
        call_command("migrate", run_syncdb=True, verbosity=0)
        execute(CREATE.format(bytes="bytea" if on_postgres else "blob"))
        yield
    finally:
        if on_postgres:
            execute(drop)
        connection.close()


@contextmanager
def bells() -> Iterator[str]:
    """The URL of a broker for the doorbell."""
    import redis

    url = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")
    try:
        redis.Redis.from_url(url).ping()
    except redis.RedisError as error:
        print(f"No Redis, the doorbell rings in memory: {error}", file=sys.stderr)
        yield "memory://"
        return
    try:
        yield url
    finally:
        from benchmarks.callback_site import BELLS

        with suppress(redis.RedisError):
            client = redis.Redis.from_url(url)
            for key in client.scan_iter(f"*{BELLS}*"):
                client.delete(key)


def measure(where: str, *, quick: bool) -> list[Figure]:
    name = NAMES[where]
    seconds, rounds, paced_rounds, paced = (0.5, 4, 1, 150) if quick else (1.0, 9, 3, 500)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        broker = stack.enter_context(bells())
        stack.enter_context(database(directory, on_postgres=where == "postgres", broker=broker))
        figures = measure_statements(name)
        contenders: list[Contender] = [Ours(), Typical(), Bare()]
        if not quick:
            contenders.append(Telling())
        if importlib.util.find_spec("django_qstash"):
            contenders.append(DjangoQStash())
        else:
            print("(b2) skipped: the package django-qstash is not installed", file=sys.stderr)
        runners = {}
        for contender in contenders:
            site = Site(contender.name)
            stack.callback(site.stop)
            runners[contender.name] = Runner(contender, site, directory)
        compete(list(runners.values()), seconds=seconds, rounds=rounds)
        ours = runners["ours"]
        tails = [ours.run(paced, RATE).percentile(99) for _ in range(paced_rounds)]
    print(f"{name}, {rounds} rounds of {seconds:g} s", file=sys.stderr)
    for runner in runners.values():
        print(f"  {runner.describe()}", file=sys.stderr)
    print(
        f"  p99 at {RATE} callbacks/s: {', '.join(f'{each:.1f}' for each in tails)} ms",
        file=sys.stderr,
    )
    return [
        *compare(name, runners, B2_GOALS[where]),
        *(
            [at_most(f"(c) {name}: p99 at 50 callbacks/s", statistics.median(tails), 50, "ms")]
            if where == "postgres"
            else []
        ),
        *figures,
    ]


def compare(name: str, runners: dict[str, Runner], b2_goal: float) -> list[Figure]:
    def rate(contender: str) -> float:
        return runners[contender].median(lambda each: each.rate)

    def processor(contender: str) -> float:
        return runners[contender].median(lambda each: each.processor)

    unit = "callbacks/s"
    figures = [
        at_least(f"(a) {name}: ours / (b1) the typical way", rate("ours"), rate("typical"), 3, unit)
    ]
    if "django_qstash" in runners:
        peer = rate("django_qstash")
        figures.append(
            at_least(f"(a) {name}: ours / (b2) django-qstash", rate("ours"), peer, b2_goal, unit)
        )
    label = f"(b) {name}: processor time of ours / (b3) bare WSGI"
    figures.append(no_more_than(label, processor("ours"), processor("bare"), 2.5))
    return figures


def postgres_problem() -> str:
    """Why PostgreSQL cannot be used; empty when it can."""
    try:
        import psycopg

        url = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
        psycopg.connect(url.replace("postgres://", "postgresql://"), connect_timeout=3).close()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def measure_in_a_process(where: str, *, quick: bool) -> list[Figure]:
    """A process each: a site has one database."""
    command = [sys.executable, __file__, "--database", where, "--json"] + ["--quick"] * quick
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output = process.communicate()[0]
        except BaseException:
            # It has sites to stop and a schema to drop.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    try:
        return [Figure(**each) for each in json.loads(output)["figures"]]
    except ValueError:
        sys.exit(f"the run on {NAMES[where]} broke")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="One object instead of the table.")
    parser.add_argument("--quick", action="store_true", help="Under a minute, with more noise.")
    parser.add_argument("--database", choices=list(NAMES), help="Only this one.")
    options = parser.parse_args()
    # Stopped from outside, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if importlib.util.find_spec("gunicorn") is None:
        sys.exit("Not run, there is no gunicorn: pip install gunicorn")
    figures = []
    for where in [options.database] if options.database else list(NAMES):
        if where == "postgres" and (problem := postgres_problem()):
            print(f"Not run on PostgreSQL: {problem}", file=sys.stderr)
            continue
        if options.database:
            try:
                figures += measure(where, quick=options.quick)
            except Untrustworthy as error:
                sys.exit(f"{error}: no figure can be trusted")
        else:
            figures += measure_in_a_process(where, quick=options.quick)
    if not figures:
        sys.exit(1)
    show(figures, as_json=options.json)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
