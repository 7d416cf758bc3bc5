from __future__ import annotations

import ipaddress
import signal
import threading
from argparse import ArgumentParser
from contextlib import suppress
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections
from django.db.migrations.executor import MigrationExecutor

from ... import conf, console
from ...destinations import EVERY_HOST, problem_with_mapping
from ...models import SigningKeys
from ...serving import Server


class Command(BaseCommand):
    # The identity that the checks would miss is given below.
    requires_system_checks = ()
    help = (
        "Serves QStash's API and delivers its messages, in one process, for development. "
        "Its identity is the well-known development one unless --token says otherwise."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
        parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
        parser.add_argument(
            "--token",
            help="what callers must present; the signing keys are then those of the settings",
        )
        parser.add_argument(
            "--map",
            action="append",
            default=[],
            metavar="HOST=URL",
            help="deliver what is for HOST to URL, e.g. api.example.com=http://localhost:8000; "
            "message, signature and logs keep the public name; * is every host; repeatable",
        )
        parser.add_argument(
            "--json-log",
            action="store_true",
            help="one JSON object a line for the start, each request and each attempt",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self.is_json = options["json_log"]
        self.refuse_without_tables()
        if not 0 <= options["port"] <= 65_535:
            raise CommandError(f"there is no port {options['port']}: they go up to 65535")
        host_map = dict(map(mapping, options["map"]))
        identity = {"token": options["token"]} if options["token"] else conf.development_identity()
        if host_map:
            identity["host_map"] = {**conf.current().host_map, **host_map}
        conf.override(**identity, allow_loopback=True)
        server = self.opened(options["host"], options["port"])
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with server:
            self.greet(server)
            stop.wait()
        self.print(console.as_json({"event": "stopped"}) if self.is_json else "stopped")

    def opened(self, host: str, port: int) -> Server:
        try:
            return Server(host, port, say=self.say)
        except OSError as error:
            raise CommandError(
                f"cannot listen on {host}:{port}: {error.strerror}. Give another with --port; "
                "0 takes a free one."
            ) from error

    def refuse_without_tables(self) -> None:
        try:
            executor = MigrationExecutor(connections[DEFAULT_DB_ALIAS])
        except DatabaseError as error:
            raise CommandError(f"the database does not answer: {error}") from error
        ours = [key for key in executor.loader.graph.leaf_nodes() if key[0] == "qstash_server"]
        if executor.migration_plan(ours):
            raise CommandError("the database has no tables for this yet: run manage.py migrate")

    # --- what it says ------------------------------------------------------------------------

    def greet(self, server: Server) -> None:
        environment = self.environment(server.url)
        mapped = dict(conf.current().host_map)
        others = [account.name for account in conf.current().known_accounts if account.name]
        page, warning = page_of(server.url), warning_about(server.url)
        if not self.is_json:
            return self.print(
                banner(environment, mapped=mapped, others=others, page=page, warning=warning)
            )
        facts = {
            "event": "listening",
            "environment": environment,
            "accounts": others,
            "map": mapped,
            "page": page,
            "stop": "Ctrl-C",
        }
        self.print(console.as_json(facts | ({"warning": warning} if warning else {})))

    def environment(self, url: str) -> dict[str, str]:
        keys = SigningKeys.objects.current()
        return {
            "QSTASH_URL": url,
            "QSTASH_TOKEN": conf.current().token,
            "QSTASH_CURRENT_SIGNING_KEY": keys.current,
            "QSTASH_NEXT_SIGNING_KEY": keys.next,
        }

    def say(self, event: console.Event) -> None:
        # Whoever read it may have gone; what was delivered is delivered all the same.
        with suppress(OSError, ValueError):
            self.print(console.as_json(event) if self.is_json else console.as_line(event))

    def print(self, text: str) -> None:
        # Several threads do, and whoever reads may be a program at the end of a pipe.
        with self._printing:
            self.stdout.write(text)
            self.stdout.flush()

    _printing = threading.Lock()


def mapping(argument: str) -> tuple[str, str]:
    host, equals, url = argument.partition("=")
    if not equals:
        text = f"--map {argument} has no '=': give HOST=URL, like *=http://localhost:8000"
        raise CommandError(text)
    if problem := problem_with_mapping(host, url):
        raise CommandError(f"--map: {problem}")
    return host, url


def page_of(url: str) -> str:
    """Where the page can be looked at from this machine; empty when it cannot."""
    host, _colon, port = url.removeprefix("http://").rpartition(":")
    address = ipaddress.ip_address(host.strip("[]"))
    if address.is_unspecified:
        return f"http://127.0.0.1:{port}/"
    return f"{url}/" if address.is_loopback else ""


def warning_about(url: str) -> str:
    host = url.removeprefix("http://").rpartition(":")[0].strip("[]")
    if ipaddress.ip_address(host).is_loopback:
        return ""
    tokens = {account.token for account in conf.current().known_accounts}
    if not tokens & conf.PUBLIC_SECRETS:
        return ""
    return "everybody knows this token, and others can reach this port: give one with --token"


def banner(
    environment: dict[str, str],
    *,
    mapped: dict[str, str],
    others: list[str],
    page: str,
    warning: str,
) -> str:
    lines = ["A QStash of your own is listening. For whoever publishes to it:", ""]
    lines += [f"{name}={value}" for name, value in environment.items()]
    lines += [""]
    if others:
        lines += [f"The accounts {', '.join(others)} have tokens and keys of their own."]
    for host, url in sorted(mapped.items(), key=lambda each: each[0] == EVERY_HOST):
        rest = "any other host" if len(mapped) > 1 else "any host"
        name = rest if host == EVERY_HOST else host
        lines += [f"What is for {name} goes to {url}."]
    if page:
        lines += [f"Look at what it does: {page}"]
    if warning:
        lines += [f"WARNING: {warning}."]
    return "\n".join([*lines, "Stop it with Ctrl-C."])
