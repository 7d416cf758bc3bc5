"""The whole product in one process: site, QStash-compatible server, Celery worker, provider.

No account and no broker: SQLite, ``memory://``, and an offline provider that answers with
sentences of the article it is given. Articles are saved; a trigger asks for a summary of each;
the answers come back by signed callbacks. Killed in the middle, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .provider import Provider

if TYPE_CHECKING:
    from django_qstash_llm.models import LLMRequest

HOST = "127.0.0.1"
SWEEP_SECONDS = 1.0


def main() -> int:
    options = parse_arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Or a log that nobody watches as a terminal shows the address only at the end.
        sys.stdout.reconfigure(line_buffering=True)
    options.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # The same ports at every start: what is on its way when the process is killed names them.
        port = free_port(options.port)
        # A low burst against many articles: some meet a 429, as in life.
        provider = stack.enter_context(
            Provider(
                rpm=900,
                tpm=200_000,
                burst=8,
                latency=0.2,
                per_token=0.02,
                port=free_port(port + 1),
            )
        )
        set_environment(options, port, provider)
        prepare_database()
        stack.enter_context(site(port))
        stack.enter_context(server_engine())
        if not options.no_worker:
            stack.enter_context(worker())
        stack.enter_context(ticker())
        return run(options, port)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="Stop when all are answered.")
    parser.add_argument("--port", type=int, default=8000, help="The next free one from here.")
    parser.add_argument(
        "--timeout", type=float, default=180.0, help="Seconds to wait for the answers."
    )
    parser.add_argument("--directory", type=Path, default=Path(".demo"), help="For the database.")
    parser.add_argument(
        "--no-worker", action="store_true", help="A Celery worker of yours does the work."
    )
    return parser.parse_args()


# --- setting up ------------------------------------------------------------------------------


def free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    sys.exit(f"No free port from {first} to {first + 99}: give another with --port.")


def set_environment(options: argparse.Namespace, port: int, provider: Provider) -> None:
    """The settings read the environment; what is there already wins."""
    environment = {
        "DJANGO_SETTINGS_MODULE": "testproject.settings",
        "DATABASE_URL": f"sqlite:///{options.directory.resolve() / 'demo.sqlite3'}",
        "SITE_URL": f"http://{HOST}:{port}",
        "OFFLINE_PROVIDER_URL": provider.base_url,
        # Several threads write rows of their own; what Celery says of itself is not the point here.
        "DJANGO_ALLOW_ASYNC_UNSAFE": "true",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def prepare_database() -> None:
    import django

    django.setup()
    from django.conf import settings
    from django.core.management import call_command

    settings.QSTASH_LLM.setdefault("RETRIES", 5)
    logging.getLogger("django").setLevel(logging.ERROR)
    call_command("migrate", verbosity=0)


@contextlib.contextmanager
def site(port: int) -> Iterator[None]:
    """Admin, callback view and QStash's API, each request in a thread."""
    from django.contrib.staticfiles.handlers import StaticFilesHandler
    from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
    from django.core.wsgi import get_wsgi_application

    class QuietHandler(WSGIRequestHandler):
        def log_message(self, *args: Any) -> None:
            """The progress line is the log."""

    server = ThreadedWSGIServer((HOST, port), QuietHandler)
    server.set_app(StaticFilesHandler(get_wsgi_application()))
    server.daemon_threads = True
    with running(server.serve_forever):
        yield
        server.shutdown()


@contextlib.contextmanager
def server_engine() -> Iterator[None]:
    """What delivers the messages that the server's API has accepted."""
    from django_qstash_llm.server.delivery import Engine

    stop = threading.Event()
    with running(lambda: Engine().run(stop)):
        yield
        stop.set()


@contextlib.contextmanager
def worker() -> Iterator[None]:
    """A Celery worker in a thread of this process."""
    from .celery import app

    app.finalize()
    controller = app.WorkController(
        pool_cls="threads",
        concurrency=4,
        loglevel="ERROR",
        without_gossip=True,
        without_mingle=True,
    )
    with running(controller.start):
        yield
        controller.stop()


@contextlib.contextmanager
def ticker() -> Iterator[None]:
    """Celery beat's part: ring again for whatever a killed process has left behind."""
    from django_qstash_llm.tasks import sweep

    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(SWEEP_SECONDS):
            sweep.delay()

    with running(tick):
        yield
        stop.set()


@contextlib.contextmanager
def running(target: Any) -> Iterator[None]:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    yield
    thread.join(timeout=5)


# --- the show --------------------------------------------------------------------------------


def run(options: argparse.Namespace, port: int) -> int:
    from django.conf import settings

    started = time.monotonic()
    model = settings.QSTASH_LLM.get("DEFAULT_MODEL", "gpt-5.4-mini")
    is_resumed = save_articles()
    print(
        f"{'Going on with' if is_resumed else 'Saved'} the articles; {model} is asked for summaries."
    )
    answered = wait_for_answers(options.timeout)
    print_table()
    print_summary(time.monotonic() - started)
    print_login(port)
    if not answered:
        print(why_not(), file=sys.stderr)
    if options.once:
        return 0 if answered else 1
    print("Ctrl-C stops it.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    return 0


def save_articles() -> bool:
    """Save the texts, and let the trigger ask. Whether there was something to go on with."""
    from django.core import serializers
    from django.db import transaction

    from django_qstash_llm.models import LLMRequest

    from .articles.models import Article

    if LLMRequest.objects.unfinished().exists():
        return True
    fixture = Path(__file__).parent / "articles/fixtures/articles.json"
    with transaction.atomic():
        Article.objects.all().delete()
        # As a person would, one save after the other; loaddata would not fire a trigger.
        for loaded in serializers.deserialize("json", fixture.read_text()):
            loaded.object.save(force_insert=True)
    return False


def requests_of_this_run() -> list[LLMRequest]:
    from django_qstash_llm.models import LLMRequest

    from .articles.models import Article

    newest: dict[str, LLMRequest] = {}
    keys = {str(pk) for pk in Article.objects.values_list("pk", flat=True)}
    for llm_request in LLMRequest.objects.filter(object_id__in=keys).order_by("id"):
        newest[llm_request.object_id] = llm_request
    return list(newest.values())


def wait_for_answers(timeout: float) -> bool:
    """Shows the progress until every article has its summary. False when time ran out."""
    from .articles.models import Article

    deadline = time.monotonic() + timeout
    total = Article.objects.count()
    shown = ""
    while True:
        done = Article.objects.exclude(summary="").count()
        failed = sum(row.state == "failed" for row in requests_of_this_run())
        line = progress(done, failed, total)
        if line != shown:
            print(f"\r{line}" if sys.stdout.isatty() else line, end="", flush=True)
            if not sys.stdout.isatty():
                print()
            shown = line
        if done + failed >= total or time.monotonic() > deadline:
            print()
            return done == total
        time.sleep(0.2)


def progress(done: int, failed: int, total: int) -> str:
    width = 30
    filled = width * done // max(total, 1)
    failures = f", {failed} failed" if failed else ""
    return f"[{'#' * filled}{'.' * (width - filled)}] {done}/{total} answered{failures}"


def print_table() -> None:
    from .articles.models import Article

    titles = {str(pk): title for pk, title in Article.objects.values_list("pk", "title")}
    print(f"{'article':<44} {'status':<10} {'attempts':>8} {'tokens':>7} {'time':>7}")
    for row in requests_of_this_run():
        tokens = None if row.input_tokens is None else row.input_tokens + (row.output_tokens or 0)
        took = row.finished_at and f"{(row.finished_at - row.created_at).total_seconds():.1f} s"
        title = titles.get(row.object_id, "")
        title = title if len(title) <= 43 else f"{title[:42]}…"
        print(
            f"{title:<44} {row.state:<10} {row.attempts:>8} "
            f"{'–' if tokens is None else tokens:>7} {took or '–':>7}"
        )


def print_summary(seconds: float) -> None:
    """What happened, counted from the receipts rather than believed."""
    from django_qstash_llm.models import CallbackResponse, LLMRequest

    rows = requests_of_this_run()
    receipts = CallbackResponse.objects.filter(llm_request__in=[row.pk for row in rows])
    limited = set(receipts.filter(status=429).values_list("llm_request", flat=True))
    recovered = LLMRequest.objects.completed().filter(pk__in=limited).count()
    cost = LLMRequest.objects.filter(pk__in=[row.pk for row in rows]).cost()
    print(
        f"\n{sum(row.state == 'completed' for row in rows)} of {len(rows)} answered in {seconds:.1f} s; "
        f"{recovered} met a rate limit (429) and succeeded after it; "
        f"cost {'unknown: this model has no price' if cost is None else f'${cost:.4f}'}."
    )


def print_login(port: int) -> None:
    from django.contrib.auth import get_user_model

    password = secrets.token_urlsafe(9)
    user, _ = get_user_model().objects.get_or_create(
        username="demo", defaults={"is_staff": True, "is_superuser": True}
    )
    user.set_password(password)
    user.save()
    print(f"Admin: http://{HOST}:{port}/admin/   user: demo   password: {password}")
    print(f"Talk:  http://{HOST}:{port}/talk/    the same; paste a text and see it summed up.")


def why_not() -> str:
    waiting = [row for row in requests_of_this_run() if row.state != "completed"]
    reasons = sorted({f"{row.state}: {row.error or 'no answer yet'}" for row in waiting})
    if not waiting:
        return "All requests are answered, but a summary was not written: see 'announce error' in the admin."
    return f"{len(waiting)} articles are not answered.\n" + "\n".join(reasons[:5])


if __name__ == "__main__":
    # Django warns of what only this one-process arrangement does.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
