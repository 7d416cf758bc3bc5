from __future__ import annotations

import signal
import threading
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.migrations.executor import MigrationExecutor

from ... import conf
from ...models import SigningKeys
from ...serving import Server

BANNER = """\
A QStash of your own is listening. For whoever publishes to it:

QSTASH_URL={url}
QSTASH_TOKEN={token}
QSTASH_CURRENT_SIGNING_KEY={current}
QSTASH_NEXT_SIGNING_KEY={next}

Stop it with Ctrl-C."""


class Command(BaseCommand):
    # The identity that the checks would miss is given below.
    requires_system_checks = ()
    help = (
        "Serves QStash's API and delivers its messages, in one process, for development. "
        "Its identity is the well-known development one unless --token says otherwise."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8080)
        parser.add_argument(
            "--token",
            help="what callers must present; the signing keys are then those of the settings",
        )
        parser.add_argument("--json-log", action="store_true", help="one JSON object per request")

    def handle(self, *args: Any, **options: Any) -> None:
        self.refuse_without_tables()
        identity = {"token": options["token"]} if options["token"] else conf.development_identity()
        conf.override(**identity, allow_loopback=True)
        try:
            server = Server(
                options["host"],
                options["port"],
                say=self.stdout.write,
                is_json=options["json_log"],
            )
        except OSError as error:
            raise CommandError(
                f"cannot listen on {options['host']}:{options['port']}: {error.strerror}"
            ) from error
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with server:
            self.greet(server.url, is_loopback=options["host"] in {"127.0.0.1", "::1", "localhost"})
            stop.wait()
        self.stdout.write("stopped")

    def refuse_without_tables(self) -> None:
        executor = MigrationExecutor(connections[DEFAULT_DB_ALIAS])
        ours = [key for key in executor.loader.graph.leaf_nodes() if key[0] == "qstash_server"]
        if executor.migration_plan(ours):
            raise CommandError("the database has no tables for this yet: run manage.py migrate")

    def greet(self, url: str, *, is_loopback: bool) -> None:
        keys = SigningKeys.objects.current()
        token = conf.current().token
        self.stdout.write(BANNER.format(url=url, token=token, current=keys.current, next=keys.next))
        if token == conf.DEVELOPMENT_TOKEN and not is_loopback:
            self.stdout.write(
                "WARNING: everybody knows this token, and others can reach this port."
            )
        self.stdout.flush()
