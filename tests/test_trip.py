"""The whole trip: a saved model becomes an answered completion.

Everything is real: our site through its WSGI handler, the QStash-compatible server, both
directions signed, the offline provider. Only the sockets are missing from the first tests, and
they are there in the last ones, where a Celery worker in a process of its own works over Redis.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.db import connection, transaction
from django.test import override_settings
from django.utils import timezone

import testproject.settings
from django_qstash_llm.models import Batch, CallbackResponse, LLMRequest
from django_qstash_llm.models.request import CLAIM_SECONDS
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import Gate, Message
from testproject.articles.models import Article
from testproject.celery import app as celery_app
from testproject.provider import MODEL, Provider

from .wire import Wire

KEY = settings.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
BODY = (
    "Four score and seven years ago our fathers brought forth on this continent a new nation. "
    "It was conceived in liberty. Now we are engaged in a great civil war. "
    "We are met on a great battlefield of that war."
)
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def provider(wire: Wire) -> Iterator[Provider]:
    """The offline provider, answering on the wire under its public name."""
    provider = Provider(api_keys={KEY}, sleep=lambda seconds: None)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = provider.respond(
            request.method, request.url.raw_path.decode(), dict(request.headers), request.content
        )
        return httpx.Response(status, headers=headers, content=body)

    wire.hosts["provider.test"] = answer
    with override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "DEFAULT_MODEL": MODEL}):
        yield provider


def deliver_everything() -> None:
    """What QStash does when the time of every retry, and of every limit, has come."""
    Message.objects.filter(due_at__gt=timezone.now()).update(due_at=timezone.now())
    for gate in Gate.objects.all():
        gate.reset(now=timezone.now())
    engine = Engine()
    engine.deliver_due()
    engine.close()


def question(text: str = BODY) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Summarise in one sentence:\n\n{text}"}]


def test_a_saved_article_gets_its_summary(provider: Provider) -> None:
    article = Article.objects.create(title="Gettysburg", body=BODY)
    article.refresh_from_db()
    assert article.summary
    assert all(sentence in BODY for sentence in article.summary.split(". "))

    llm_request = LLMRequest.objects.get()
    assert llm_request.about == article
    assert (llm_request.state, llm_request.attempts, llm_request.last_status) == (
        "completed",
        1,
        200,
    )
    assert llm_request.input_tokens
    assert llm_request.output_tokens
    assert llm_request.announced_at
    # Nobody knows what the offline model costs, and nobody says it is free.
    assert llm_request.cost is None
    assert [call.status for call in provider.journal] == [200]


def test_writing_the_answer_back_does_not_ask_again(provider: Provider) -> None:
    Article.objects.create(title="Once", body=BODY)
    assert LLMRequest.objects.count() == 1
    assert len(provider.journal) == 1


def test_a_rolled_back_save_asks_nothing(provider: Provider) -> None:
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        Article.objects.create(title="Never", body=BODY)
        raise ZeroDivisionError
    assert not LLMRequest.objects.exists()
    assert provider.journal == []


def test_a_rate_limit_is_waited_for_and_then_answered(provider: Provider) -> None:
    provider.fail_next(1, status=429)
    llm_request = LLMRequest.objects.publish(question())
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts, llm_request.last_status) == (
        "submitted",
        1,
        429,
    )

    deliver_everything()
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts, llm_request.last_status) == (
        "completed",
        2,
        200,
    )
    receipts = llm_request.callback_responses.order_by("retried")
    assert list(receipts.values_list("status", "retried", "kind")) == [
        (429, 0, "callback"),
        (200, 1, "callback"),
    ]


def test_a_provider_that_never_answers_ends_in_a_dead_letter_with_its_words(
    provider: Provider,
) -> None:
    provider.fail_next(10, status=500)
    llm_request = LLMRequest.objects.publish(question(), retries=2)
    for _ in range(3):
        deliver_everything()
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts, llm_request.last_status) == ("failed", 3, 500)
    assert llm_request.dead_letter_id
    assert "after 3 attempts" in llm_request.error
    kinds = llm_request.callback_responses.order_by("id").values_list("kind", flat=True)
    assert sorted(kinds) == ["callback", "callback", "callback", "failure_callback"]
    assert len(provider.journal) == 3


def test_a_failed_request_is_asked_again_as_its_own(provider: Provider) -> None:
    provider.fail_next(1, status=500)
    failed = LLMRequest.objects.publish(question(), retries=0)
    failed.refresh_from_db()
    assert failed.state == "failed"
    again = failed.resubmit()
    again.refresh_from_db()
    assert again.state == "completed"
    assert again.resubmission_of == failed


def test_a_batch_answers_every_item(provider: Provider) -> None:
    batch = Batch.objects.submit([{"messages": question()} for _ in range(25)], name="speeches")
    deliver_everything()
    assert batch.counts() == {
        "pending": 0,
        "submitted": 0,
        "completed": 25,
        "failed": 0,
        "cancelled": 0,
    }
    assert batch.is_finished
    assert len({call.message_id for call in provider.journal}) == 25


def test_a_queue_answers_in_order(provider: Provider) -> None:
    with transaction.atomic():
        asked = [
            LLMRequest.objects.enqueue(question(f"Sentence {n}."), queue="in-order")
            for n in range(6)
        ]
    deliver_everything()
    rows = [LLMRequest.objects.get(pk=llm_request.pk) for llm_request in asked]
    assert {row.state for row in rows} == {"completed"}
    ids = [row.qstash_message_id for row in rows]
    assert [call.message_id for call in provider.journal] == ids


def test_the_key_is_in_no_row_when_all_is_done(provider: Provider) -> None:
    Article.objects.create(title="Secret", body=BODY)
    assert [call.status for call in provider.journal] == [200]
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(table)}")
            for row in cursor.fetchall():
                assert KEY not in repr(
                    [bytes(x) if isinstance(x, memoryview) else x for x in row]
                ), table


# --- with a Celery worker over Redis, and real sockets ----------------------------------------

REDIS = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")


def redis_problem() -> str:
    import redis

    try:
        redis.Redis.from_url(REDIS, socket_connect_timeout=2).ping()
    except redis.ConnectionError as error:
        return f"Redis does not answer: {error}"
    return ""


class Worker:
    """``celery worker`` in a process group of its own, so that all of it can be killed."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # -B: beat's sweep is what finds the work of a worker that was killed. Its schedule is kept
        # in memory: the file that it would share with a killed one's can be locked for good.
        command = "-m celery -A testproject worker -B --scheduler celery.beat:Scheduler -P threads -c 4 -l ERROR"
        arguments = [sys.executable, *command.split()]
        self.process = subprocess.Popen(arguments, env=self.environment, start_new_session=True)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        self.process.wait(timeout=30)


def database_url() -> str:
    database = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{database['NAME']}"
    host, port = database["HOST"] or "127.0.0.1", database["PORT"] or 5432
    password = f":{database['PASSWORD']}" if database["PASSWORD"] else ""
    return f"postgres://{database['USER']}{password}@{host}:{port}/{database['NAME']}"


@pytest.fixture
def worker(live_server: Any) -> Iterator[Worker]:
    problem = redis_problem()
    if problem:
        pytest.skip(problem)
    queue = f"test-{os.getpid()}-{time.time_ns()}"
    with Provider(rpm=600, tpm=1_000_000, burst=6, latency=0.05) as provider:
        environment = os.environ | {
            "CELERY_BROKER_URL": REDIS,
            "CELERY_TASK_DEFAULT_QUEUE": queue,
            "DATABASE_URL": database_url(),
            "DJANGO_SETTINGS_MODULE": "testproject.settings",
            "OFFLINE_PROVIDER_URL": provider.base_url,
            "QSTASH_LLM_RETRIES": "8",
            "SITE_URL": live_server.url,
            "SWEEP_SECONDS": "0.5",
        }
        environment.pop("QSTASH_URL", None)
        worker = Worker(environment)
        worker.provider = provider
        eager = {"task_always_eager": celery_app.conf.task_always_eager}
        celery_app.conf.update(task_always_eager=False, broker_url=REDIS, task_default_queue=queue)
        celery_app._after_fork()  # as in a child process: pools of its own, for the new broker
        ours = {
            "CALLBACK_BASE_URL": f"{live_server.url}/llm",
            "PROVIDERS": {"offline": {"BASE_URL": provider.base_url, "API_KEY": "offline"}},
            "DEFAULT_PROVIDER": "offline",
            "DEFAULT_MODEL": MODEL,
            "RETRIES": 8,
        }
        # The worker runs the testproject, whose server has the development identity.
        with override_settings(
            DEBUG=True,
            QSTASH_URL=f"{live_server.url}/qstash",
            QSTASH_TOKEN=testproject.settings.QSTASH_TOKEN,
            QSTASH_CURRENT_SIGNING_KEY=testproject.settings.QSTASH_CURRENT_SIGNING_KEY,
            QSTASH_NEXT_SIGNING_KEY=testproject.settings.QSTASH_NEXT_SIGNING_KEY,
            QSTASH_LLM=ours,
            QSTASH_SERVER={},
        ):
            worker.start()
            try:
                yield worker
            finally:
                worker.kill(signal.SIGKILL)
                celery_app.conf.update(broker_url="memory://", task_default_queue="celery", **eager)
                celery_app._after_fork()


def wait_until(is_true: Callable[[], bool], *, seconds: float) -> bool:
    """Other processes do the work here, so this looks instead of being told."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def all_summarised() -> bool:
    return not Article.objects.filter(summary="").exists()


def save_articles(count: int) -> None:
    with transaction.atomic():
        for number in range(count):
            Article.objects.create(
                title=f"Article {number}", body=f"{BODY} This is number {number}."
            )


@pytest.mark.redis
def test_a_worker_in_another_process_answers_over_redis(worker: Worker) -> None:
    save_articles(12)
    assert wait_until(all_summarised, seconds=60), list(
        LLMRequest.objects.values_list("state", "error", "announce_error")
    )
    assert LLMRequest.objects.completed().count() == 12
    # Six at once and twelve asked: the server's gate finds the limit, and keeps to it.
    assert CallbackResponse.objects.filter(status=429).count() < 12
    answered = [call.message_id for call in worker.provider.journal if call.status == 200]
    assert len(answered) == len(set(answered)) == 12


@pytest.mark.once
@pytest.mark.redis
@pytest.mark.timeout(420)
def test_a_worker_killed_three_times_loses_nothing_and_writes_nothing_twice(worker: Worker) -> None:
    with write_log() as writes:
        save_articles(40)
        for answered in (3, 12, 24):
            wait_until(
                lambda n=answered: Article.objects.exclude(summary="").count() >= n, seconds=60
            )
            worker.kill()
            worker.start()
        # What a killed one was telling is claimed for two minutes more.
        assert wait_until(all_summarised, seconds=CLAIM_SECONDS + 60), list(
            LLMRequest.objects.exclude(state="completed").values_list("state", "error")
        )
        assert LLMRequest.objects.count() == 40
        assert writes() == {article.pk: 1 for article in Article.objects.all()}


@contextlib.contextmanager
def write_log() -> Iterator[Callable[[], dict[int, int]]]:
    """Lets the database itself count how often each article's summary was written."""
    statements = {
        "sqlite": [
            "CREATE TABLE writes (article integer)",
            "CREATE TRIGGER log_write AFTER UPDATE OF summary ON articles_article "
            "BEGIN INSERT INTO writes VALUES (NEW.id); END",
        ],
        "postgresql": [
            "CREATE TABLE writes (article bigint)",
            "CREATE FUNCTION log_write() RETURNS trigger AS "
            "'BEGIN INSERT INTO writes VALUES (NEW.id); RETURN NEW; END' LANGUAGE plpgsql",
            "CREATE TRIGGER log_write AFTER UPDATE OF summary ON articles_article "
            "FOR EACH ROW EXECUTE FUNCTION log_write()",
        ],
    }
    drops = {
        "sqlite": ["DROP TRIGGER log_write", "DROP TABLE writes"],
        "postgresql": ["DROP FUNCTION log_write CASCADE", "DROP TABLE writes"],
    }

    def run(some: list[str]) -> None:
        with connection.cursor() as cursor:
            for statement in some:
                cursor.execute(statement)

    def count() -> dict[int, int]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT article, COUNT(*) FROM writes GROUP BY article")
            return dict(cursor.fetchall())

    run(statements[connection.vendor])
    try:
        yield count
    finally:
        run(drops[connection.vendor])
