"""How fast, and how politely, a backlog drains against a provider that limits it.

    python benchmarks/ratelimit.py [--quick | --full] [--only NAME] [--database postgres] [--json]

N calls are waiting, and one provider takes R of them a minute, with a minute's worth at once.
Nobody can be faster than the ideal makespan:

    T* = max((N - burst) / (R/60), (tokens - burst of them) / (T/60), N * latency / slots) + latency

Measured over real sockets, every process its own: our server with gates (one engine, and two that
share the database) against the same server without them, tenacity's recipe of OpenAI's cookbook,
and the ``openai`` client's own retries. What counts is what the provider saw: who was delivered,
who was rejected, who came before a ``Retry-After`` that had been named to that key was over.

The providers are in ``ratelimit_providers``. A client has three times T*; what is not delivered by
then is lost.

Needs ``llmock``, ``openai`` and ``tenacity`` (``pip install llmock openai tenacity``): what is
missing is said, and left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import Figure, at_least, at_most, no_more_than, show
from benchmarks.ratelimit_providers import (
    LATENCY,
    PROVIDERS,
    Call,
    Child,
    Limits,
    charge_of,
    llmock,
)
from testproject.provider import MODEL as OFFLINE_MODEL

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")
BUDGET = 3.0
"""Times T* that a client has."""
SLOTS = 200
"""Calls that a baseline keeps in flight."""
ON_ITS_WAY = 0.1
"""Seconds after a rejection in which a call may arrive that was sent before it was known."""
LEASE = 4.0
"""Where an engine is killed."""


# --- what is measured ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    limits: Limits
    count: int
    goal: float = 1.10
    """Of the makespan, times T*."""
    most_rejected: float = 0.01
    """Of the count."""
    provider: str = "fake"
    charges: tuple[int, int] = (60, 120)
    clients: tuple[str, ...] = ("gates", "gates-two")
    kills: bool = False

    @property
    def lease(self) -> float:
        return LEASE if self.kills else 30.0

    def bodies(self) -> list[bytes]:
        """Each different: a provider knows a retry by its body."""
        dice = random.Random(1)
        return [self._body(number, dice.randint(*self.charges)) for number in range(self.count)]

    def _body(self, number: int, charge: int) -> bytes:
        content = f"Number {number}: it was the best of times, it was the worst of times. "
        fields: dict[str, Any] = {
            "model": OFFLINE_MODEL if self.provider == "offline" else "gpt-5.4-mini",
            "messages": [{"role": "user", "content": content}],
        }
        size = len(json.dumps(fields)) + len(',"max_tokens":999')
        return json.dumps(
            fields | {"max_tokens": max(1, charge - size // 4)}, separators=(",", ":")
        ).encode()

    def ideal(self, bodies: list[bytes]) -> float:
        """T*: the seconds that nobody can beat."""
        limits, count = self.limits, len(bodies)
        if limits.window:
            per_window = math.floor(limits.rpm * limits.window / 60)
            return limits.window * (math.ceil(count / per_window) - 1) + LATENCY
        rate = limits.rpm / 60
        terms = [0.0, (count - limits.burst) / rate, count * LATENCY / SLOTS]
        if limits.tpm:
            terms.append((sum(map(charge_of, bodies)) - limits.tpm) / (limits.tpm / 60))
        begin, length = limits.outage
        if length:
            end = begin + length
            left = count - min(count, limits.burst + rate * begin)
            saved = min(limits.burst, rate * length)
            terms.append(end + max(0.0, left - saved) / rate)
        return max(terms) + LATENCY


@dataclass
class Run:
    """What became of one client's backlog."""

    scenario: str
    client: str
    count: int
    ideal: float
    delivered: int = 0
    twice: int = 0
    """Delivered once more, and billed."""
    makespan: float = 0.0
    """Seconds until the last delivery."""
    rejected: int = 0
    unavailable: int = 0
    """Calls that an outage met."""
    rejected_after_outage: int = 0
    early: int = 0
    """Calls before a Retry-After that this key had been named was over."""
    longest_wait: float = 0.0
    """Seconds between a call that was refused and its next attempt."""
    verdict: int | None = None
    """FAILs of llmock."""
    seconds: float = 0.0
    """Until the client had nothing more to do, or its time was up."""
    calls: list[Call] = field(default_factory=list, repr=False)

    def read(self, calls: list[Call], *, began: float, outage: tuple[float, float]) -> None:
        calls = self.calls = sorted(calls, key=lambda call: call.began)
        ends = [call.ended for call in calls if call.status == 200]
        self.delivered = len({call.body for call in calls if call.status == 200})
        self.twice = len(ends) - self.delivered
        self.makespan = max(ends, default=began) - began
        self.rejected = sum(call.status == 429 for call in calls)
        self.unavailable = sum(call.status == 503 for call in calls)
        if calls:
            over = calls[0].began + sum(outage)
            after = [call for call in calls if call.began >= over]
            self.rejected_after_outage = sum(call.status == 429 for call in after)
        self.early = early(calls)
        self.longest_wait = longest_wait(calls)

    @property
    def is_complete(self) -> bool:
        return self.delivered == self.count

    @property
    def ratio(self) -> float:
        return self.makespan / self.ideal


def early(calls: list[Call]) -> int:
    """How many came too soon. ``calls`` are of one key, in order."""
    named = sorted(
        (call.ended + ON_ITS_WAY, call.ended + call.wait) for call in calls if call.wait is not None
    )
    count, until, known = 0, 0.0, 0
    for call in calls:
        while known < len(named) and named[known][0] <= call.began:
            until = max(until, named[known][1])
            known += 1
        # A hundredth for the millisecond that headers are rounded to.
        count += call.began < until - 0.01
    return count


def longest_wait(calls: list[Call]) -> float:
    longest, refused = 0.0, dict[str, float]()
    for call in calls:
        if call.body in refused:
            longest = max(longest, call.began - refused.pop(call.body))
        if call.status >= 400:
            refused[call.body] = call.ended
    return longest


# --- our server --------------------------------------------------------------------------------


def server_settings(*, gates: bool, lease: float) -> dict[str, Any]:
    """Those that this server knows: before it had gates there was no setting for them."""
    from django_qstash_llm.server.conf import KNOWN

    wanted = {
        "TOKEN": "a-token-of-the-benchmark",
        "CURRENT_SIGNING_KEY": "sig_" + "0" * 28,
        "NEXT_SIGNING_KEY": "sig_" + "1" * 28,
        "ALLOW_LOOPBACK": True,
        "ENGINE": "thread",
        "LEASE": lease,
        "GATES": gates,
    }
    return {name: value for name, value in wanted.items() if name in KNOWN}


def set_up(database: dict[str, Any], server: dict[str, Any] | None = None) -> None:
    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY="benchmark",
        DEBUG=False,
        USE_TZ=True,
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="django_qstash_llm.server.urls",
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "rest_framework",
            "django_qstash_llm.server",
        ],
        DATABASES={"default": database},
        QSTASH_SERVER=server or {},
        # A refusal that is expected is no news.
        LOGGING_CONFIG=None,
    )
    django.setup()


@contextmanager
def database(vendor: str) -> Iterator[dict[str, Any]]:
    """One of its own, gone afterwards."""
    if vendor == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{directory}/server.sqlite3",
                "CONN_MAX_AGE": None,
                "OPTIONS": {
                    "timeout": 20,
                    "transaction_mode": "IMMEDIATE",
                    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
                },
            }
        return
    import environ
    import psycopg

    name = f"qstash_ratelimit_{os.getpid()}"
    url = POSTGRES.replace("postgres://", "postgresql://")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield environ.Env.db_url_config(POSTGRES) | {"NAME": name, "CONN_MAX_AGE": None}
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def run_engine(pipe: Connection, database: dict[str, Any], server: dict[str, Any]) -> None:
    set_up(database, server)
    from django.db import connections

    from django_qstash_llm.server.delivery import Engine

    engine = Engine()
    connections.close_all()
    thread = threading.Thread(target=engine.run, kwargs={"grace": 1.0}, daemon=True)
    pipe.send("ready")
    try:
        pipe.recv()
        thread.start()
        pipe.recv()
    finally:
        engine.stop()
        if thread.ident:
            thread.join(4)


def publish(url: str, key: str, bodies: list[bytes]) -> None:
    """As the app does: a batch, and the provider's key forwarded."""
    from django.test import Client

    headers = {
        "Content-Type": "application/json",
        "Upstash-Forward-Authorization": f"Bearer {key}",
        "Upstash-Retries": "3",
    }
    client, token = Client(), "Bearer a-token-of-the-benchmark"
    for begin in range(0, len(bodies), 500):
        items = [
            {"destination": f"{url}/chat/completions", "headers": headers, "body": body.decode()}
            for body in bodies[begin : begin + 500]
        ]
        answer = client.post(
            "/v2/batch", json.dumps(items), "application/json", headers={"Authorization": token}
        )
        if answer.status_code != 200 or any("error" in each for each in answer.json()):
            sys.exit(f"{answer.status_code} {answer.content[:200]!r}: no figure can be trusted")


class OurServer:
    def __init__(self, *, gates: bool, engines: int) -> None:
        self.gates, self.engines = gates, engines

    def missing(self) -> str:
        return ""

    def drain(
        self, scenario: Scenario, url: str, key: str, bodies: list[bytes], *, seconds: float
    ) -> float:
        """Answers the moment at which it began."""
        from django.core.management import call_command
        from django.db import connection
        from django.test import override_settings

        settings = server_settings(gates=self.gates, lease=scenario.lease)
        call_command("flush", interactive=False, verbosity=0)
        with override_settings(QSTASH_SERVER=settings), ExitStack() as stack:
            publish(url, key, bodies)
            arguments = (run_engine, connection.settings_dict, settings)
            engines = [stack.enter_context(Child(*arguments)) for _ in range(self.engines)]
            for engine in engines:
                engine.hear()
            began = time.monotonic()
            for engine in engines:
                engine.tell("go")
            half = began + scenario.ideal(bodies) / 2 if scenario.kills else math.inf
            while time.monotonic() < began + seconds and not is_all_finished():
                if time.monotonic() > half:
                    engines[0].kill()
                    half = math.inf
                time.sleep(0.1)
        return began


def is_all_finished() -> bool:
    from django_qstash_llm.server.models import Message

    return not Message.objects.unfinished().exists()


# --- what others do ------------------------------------------------------------------------------


class Sdk:
    """The ``openai`` client, asynchronous, with so many calls in flight."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe

    def missing(self) -> str:
        for name in ("openai", "tenacity") if self.recipe == "tenacity" else ("openai",):
            if importlib.util.find_spec(name) is None:
                return f"there is no package {name!r}"
        return ""

    def drain(
        self, scenario: Scenario, url: str, key: str, bodies: list[bytes], *, seconds: float
    ) -> float:
        with Child(run_sdk, self.recipe, url, key, bodies) as child:
            child.hear()
            began = time.monotonic()
            child.tell("go")
            child.pipe.poll(seconds)
            # What it still does is over with its time.
            child.process.kill()
            return began


def run_sdk(pipe: Connection, recipe: str, url: str, key: str, bodies: list[bytes]) -> None:
    import openai

    retries = 0 if recipe == "tenacity" else 10
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries)
    fields = [json.loads(body) for body in bodies]

    async def create(one: dict[str, Any]) -> None:
        await client.chat.completions.create(**one)

    if recipe == "tenacity":
        from tenacity import retry, stop_after_attempt, wait_random_exponential

        # https://cookbook.openai.com/examples/how_to_handle_rate_limits
        create = retry(wait=wait_random_exponential(min=1, max=60), stop=stop_after_attempt(6))(
            create
        )

    async def drain() -> None:
        slots = asyncio.Semaphore(SLOTS)

        async def one_at_a_slot(one: dict[str, Any]) -> None:
            async with slots:
                # What was given up is lost, as the journal says.
                with suppress(Exception):
                    await create(one)

        await asyncio.gather(*map(one_at_a_slot, fields))

    pipe.send("ready")
    pipe.recv()
    asyncio.run(drain())
    pipe.send("done")


CLIENTS: dict[str, tuple[str, OurServer | Sdk]] = {
    "gates": ("our server", OurServer(gates=True, engines=1)),
    "gates-two": ("our server, two engines", OurServer(gates=True, engines=2)),
    "plain": ("our server without gates", OurServer(gates=False, engines=1)),
    "tenacity": ("tenacity's recipe", Sdk("tenacity")),
    "openai": ("openai, max_retries=10", Sdk("openai")),
}
OURS = ("gates", "gates-two")
ALL = tuple(CLIENTS)


# --- scenarios ---------------------------------------------------------------------------------


def scenarios(size: str) -> list[Scenario]:
    # T* is so many seconds, with a minute's worth at once.
    count, seconds = {"quick": (340, 8), "default": (900, 30), "full": (10_000, 90)}[size]
    rpm = round(count / (1 + seconds / 60))
    # llmock remembers 10,000 calls: with so many none is left for those of its worse clients.
    few, baselines = (9_000, OURS) if size == "full" else (count, ALL)
    limits = Limits(rpm=rpm)
    tokens = Scenario(
        "tokens",
        "llmock, where tokens are what is short",
        replace(limits, rpm=10 * rpm),
        few,
        provider="llmock",
        charges=(300, 900),
    )
    tpm = round(sum(map(charge_of, tokens.bodies())) / (1 + seconds / 60))
    tokens = replace(tokens, limits=replace(tokens.limits, tpm=tpm))
    blind = replace(limits, tells=False)
    window, outage = {"quick": (2.0, 5.0), "default": (10.0, 20.0), "full": (30.0, 60.0)}[size]
    found = [
        Scenario(
            "llmock", "llmock, which judges", limits, few, provider="llmock", clients=baselines
        ),
        tokens,
        Scenario(
            "offline",
            "testproject/provider.py",
            limits,
            count,
            provider="offline",
            clients=ALL if size == "full" else ("gates",),
        ),
        Scenario("retry-after", "no rate headers", blind, count, 1.15, 0.02, clients=ALL),
        Scenario(
            "per-second",
            "no rate headers, enforced each second",
            replace(blind, per_second=True),
            round(rpm / 60 * (seconds + 1)),
            1.7,
            0.02,
            clients=ALL,
        ),
        Scenario(
            "rejected-count",
            "no rate headers, rejected calls count",
            replace(blind, counts_rejected=True),
            count,
            1.15,
            0.02,
            clients=("gates",),
        ),
        Scenario(
            "windows",
            f"fixed windows of {window:g} s",
            replace(limits, window=window),
            round(rpm * window / 60 * (1 + seconds / window)),
            clients=("gates",),
        ),
        Scenario(
            "outage",
            f"503 for {outage:g} s",
            replace(limits, outage=(seconds / 4, outage)),
            count,
            1.5,
            clients=("gates", "plain"),
        ),
        Scenario(
            "killed", "one of two engines killed", limits, count, clients=("gates-two",), kills=True
        ),
    ]
    return found


QUICK = {"llmock": ("gates", "gates-two"), "retry-after": ("gates", "openai")}
"""What there is time for in a minute."""


def chosen(options: argparse.Namespace) -> list[Scenario]:
    size = "quick" if options.quick else "full" if options.full else "default"
    found = scenarios(size)
    if options.only:
        found = [each for each in found if each.name in options.only]
    elif options.quick:
        found = [replace(each, clients=QUICK[each.name]) for each in found if each.name in QUICK]
    if options.clients:
        wanted = options.clients.split(",")
        found = [
            replace(each, clients=tuple(name for name in wanted if name in each.clients))
            for each in found
        ]
    return found


# --- all of it ---------------------------------------------------------------------------------


def run(scenario: Scenario) -> Iterator[Run]:
    if scenario.provider == "llmock" and llmock() is None:
        print(f"Not run, {scenario.name}: there is no llmock", file=sys.stderr)
        return
    bodies = scenario.bodies()
    ideal = scenario.ideal(bodies)
    with Child(PROVIDERS[scenario.provider], scenario.limits) as provider:
        url = provider.hear()
        for name in scenario.clients:
            title, client = CLIENTS[name]
            if why := client.missing():
                print(f"Not run, {scenario.name} with {title}: {why}", file=sys.stderr)
                continue
            result = Run(scenario.name, title, scenario.count, ideal)
            # A key of its own, whose buckets are full.
            key, seconds = f"sk-{scenario.name}-{name}", BUDGET * ideal + scenario.lease
            began = client.drain(scenario, url, key, bodies, seconds=seconds)
            result.seconds = time.monotonic() - began
            calls, result.verdict = provider.ask("journal")
            result.read(calls, began=began, outage=scenario.limits.outage)
            yield result


def judged(scenario: Scenario, result: Run) -> list[Figure]:
    name = f"{scenario.name}, {result.client}:"
    figures = [at_least(f"{name} delivered / asked", result.delivered, result.count, 1.0, "calls")]
    # What a dead engine held is free after its lease.
    most = round(scenario.goal + scenario.kills * scenario.lease / result.ideal, 2)
    makespan = no_more_than(f"{name} makespan / ideal", result.makespan, result.ideal, most, "s")
    # The last delivery of some is no makespan of all.
    figures.append(replace(makespan, holds=makespan.holds and result.is_complete))
    allowed = scenario.most_rejected * result.count
    if sum(scenario.limits.outage):
        during = 0.05 * result.count
        figures += [
            at_most(f"{name} calls into the outage", result.unavailable, during, "calls"),
            at_most(
                f"{name} rejected after the outage", result.rejected_after_outage, allowed, "calls"
            ),
        ]
    figures.append(at_most(f"{name} rejected", result.rejected, allowed, "calls"))
    figures.append(none_of(f"{name} calls before Retry-After ended", result.early))
    if result.verdict is not None:
        figures.append(none_of(f"{name} llmock's verdict, FAILs", result.verdict))
    return figures


def none_of(name: str, value: int) -> Figure:
    return Figure(name, value, "calls", 0, float(value), "== 0", value == 0)


HEAD = (
    f"{'':<15} {'':<25} {'delivered':>9} {'makespan/T*':>11} {'rejected/N':>10} {'early':>6}"
    f"   {'makespan':>9} {'T*':>7} {'rejected':>8} {'503':>5} {'twice':>5} {'longest wait':>12}"
    f" {'FAIL':>4}"
)


def line(result: Run) -> str:
    # The last delivery of some is no makespan of all.
    ratio = f"{result.ratio:.2f}x" if result.is_complete else "lost"
    verdict = "" if result.verdict is None else str(result.verdict)
    return (
        f"{result.scenario:<15} {result.client:<25} {result.delivered / result.count:>9.1%}"
        f" {ratio:>11} {result.rejected / result.count:>9.2f}x {result.early:>6}"
        f"   {result.makespan:>7.1f} s {result.ideal:>5.1f} s {result.rejected:>8}"
        f" {result.unavailable:>5} {result.twice:>5} {result.longest_wait:>10.1f} s {verdict:>4}"
    )


def as_json(figures: list[Figure], results: list[Run]) -> str:
    rows = []
    for result in results:
        row = asdict(replace(result, calls=[]))
        del row["calls"]
        rows.append(row)
    return json.dumps({"figures": [asdict(figure) for figure in figures], "runs": rows})


def measure(scenarios: list[Scenario], *, told: bool) -> tuple[list[Figure], list[Run]]:
    figures, results = [], []
    if told:
        print(HEAD)
    for scenario in scenarios:
        for result in run(scenario):
            results.append(result)
            if told:
                print(line(result), flush=True)
            if result.client in {CLIENTS[name][0] for name in OURS}:
                figures += judged(scenario, result)
    return figures, results


def arguments() -> argparse.Namespace:
    known = scenarios("default")
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(f"{each.name:<15} {each.about}" for each in known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="One object instead of the tables.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="Under a minute, and the least of it.")
    size.add_argument("--full", action="store_true", help="N = 10,000; an outage of a minute.")
    names = [each.name for each in known]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="Repeatable; see below."
    )
    parser.add_argument("--clients", help=f"Of {', '.join(ALL)}: these, where a scenario has them.")
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        # On the way out everything that was begun is ended.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with database(options.database) as given:
        set_up(given)
        from django.core.management import call_command
        from django.db import connections

        from django_qstash_llm.server.conf import KNOWN

        call_command("migrate", verbosity=0)
        if "GATES" not in KNOWN:
            print("This server has no gates: all of it is measured without.", file=sys.stderr)
        try:
            figures, results = measure(chosen(options), told=not options.json)
        finally:
            connections.close_all()
    if options.json:
        print(as_json(figures, results))
    else:
        print()
        show(figures, as_json=False)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    main()
