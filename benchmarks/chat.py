"""How fast chats are passed on: the OpenAI-compatible endpoint, every call of it recorded.

    python benchmarks/chat.py [--quick] [--json] [--database sqlite|postgres] [--litellm DIR]

A provider on loopback answers at once, whole or in 50 chunks. A load process, all on raw sockets, asks
it directly; through a minimal Django view that forwards with httpx and records nothing; through our
endpoint, with an API key of ours; and through the LiteLLM proxy, with its master key and no database.
One process each: gunicorn (gthread, 16 threads) and uvicorn for both sites, without middleware; on
PostgreSQL, or on SQLite (WAL, IMMEDIATE, synchronous NORMAL). Rounds take turns, and after each of
ours the rows are counted. Measured in one run:

(a) added latency, the median, one call after the other, against LiteLLM's;
(b) requests per second, 16 connections, against LiteLLM's and the minimal view's;
(c) added time to the first token, the median, against both;
(d) how many chunks came before the provider sent the next one, as often as it has been asked for;
(e) 200 streams at once through one uvicorn: memory, and that each came whole and at its pace;
(f) that the load is not what is measured: the rate of direct calls against the fastest of all.

What everybody did is printed to stderr, and how far we are from 8 times LiteLLM's rate, which is a
Node gateway's.

LiteLLM lives in a virtual environment of its own, DIR, which is made where there is none: 576 MB.
Without DIR it is left out, and so it is where it cannot be installed. To make it by hand:

    python -m venv DIR && DIR/bin/pip install 'litellm[proxy]==1.106.2'

Needs gunicorn, uvicorn, and for PostgreSQL (TEST_POSTGRES_URL) psycopg[binary,pool].
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.callback import (
    NAMES,
    Untrustworthy,
    end_with_the_benchmark,
    postgres_problem,
)
from benchmarks.chat_provider import CHUNKS, USAGE
from benchmarks.figures import Figure, at_least, at_most, no_more_than, show

ROOT = Path(__file__).resolve().parent.parent
LITELLM = "litellm[proxy]==1.106.2"
BOOTED_WITHIN = 180.0
"""Seconds."""
THREADS = CONNECTIONS = 16
PACE = 5
"""Milliseconds between the chunks of (c) and (d)."""
MANY, SLOW_PACE = 200, 200
"""Streams of (e), and the milliseconds between their chunks."""
STRETCH = 8
MESSAGES = [
    {"role": "system", "content": "Summarise the user's text in two sentences."},
    {"role": "user", "content": "It was the best of times, it was the worst of times. " * 6},
]
TITLES = {
    "direct": "direct",
    "minimal_wsgi": "minimal view, gunicorn",
    "minimal_asgi": "minimal view, uvicorn",
    "ours_wsgi": "ours, gunicorn",
    "ours_asgi": "ours, uvicorn",
    "litellm": "LiteLLM",
}


@dataclass
class Told:
    """What a load process saw, in milliseconds."""

    count: int
    seconds: float
    latencies: list[float]
    firsts: list[float]
    lags: list[list[float]]
    """Of each stream's chunks, from the provider's sending to our reading."""

    @property
    def rate(self) -> float:
        return self.count / self.seconds


@dataclass
class Contender:
    """Somebody who passes a chat on, and is listening."""

    name: str
    port: int
    path: str
    key: str
    process: subprocess.Popen[bytes] | None = None
    whole: list[Told] = field(default_factory=list)
    crowded: list[Told] = field(default_factory=list)
    streamed: list[Told] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def ask(self, count: int, *, connections: int = 1, pace: int | None = None) -> Told:
        """Whole answers, or with a ``pace`` streams. Raises ``Untrustworthy``."""
        before = recorded() if self.name.startswith("ours") else 0
        command = [sys.executable, str(ROOT / "benchmarks" / "chat_load.py")]
        command += [str(each) for each in (self.port, connections, count)]
        request = self.request(pace)
        done = subprocess.run(command, input=request, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise Untrustworthy(f"{self.title}: its load broke")
        told = json.loads(done.stdout)
        if told["refused"]:
            raise Untrustworthy(f"{self.title} refused: {told['refused'][0]}")
        if pace is not None and (cut := [n for n in map(len, told["lags"]) if n != CHUNKS]):
            raise Untrustworthy(f"{self.title}: a stream had {cut[0]} chunks")
        if self.name.startswith("ours") and (found := recorded() - before) != count:
            raise Untrustworthy(f"{self.title}: {found} of {count} are recorded")
        return Told(
            count,
            told["seconds"],
            [each * 1000 for each in told["latencies"]],
            [each * 1000 for each in told["firsts"]],
            [[each * 1000 for each in lags] for lags in told["lags"]],
        )

    def request(self, pace: int | None) -> bytes:
        asked: dict[str, Any] = {"model": model(pace), "messages": MESSAGES}
        body = json.dumps(asked if pace is None else asked | {"stream": True}).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
            f"Accept: application/json\r\nUser-Agent: benchmark\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def latency(self) -> float:
        return statistics.median(each for told in self.whole for each in told.latencies)

    def rate(self) -> float:
        return statistics.median(told.rate for told in self.crowded)

    def first(self) -> float:
        return statistics.median(each for told in self.streamed for each in told.firsts)

    def passed_at_once(self) -> float:
        """The share of chunks that were here before the next was sent."""
        lags = [lag for told in self.streamed for each in told.lags for lag in each]
        return sum(lag < PACE for lag in lags) / len(lags)

    def describe(self) -> str:
        rates = [told.rate for told in self.crowded]
        lag = statistics.median(lag for told in self.streamed for each in told.lags for lag in each)
        return (
            f"{self.title:<24} p50 {self.latency():>6.2f} ms,"
            f" {self.rate():>6,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) requests/s,"
            f" first token {self.first():>6.2f} ms, chunks {lag:>6.2f} ms late,"
            f" {self.passed_at_once():>7.2%} before the next"
        )

    def megabytes(self) -> float:
        """The most it ever held."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def model(pace: int | None) -> str:
    return "instant" if pace is None else f"paced-{pace}"


def recorded() -> int:
    """Rows of ours that are completed, with their tokens and what they cost."""
    from django_qstash_llm.models import LLMRequest

    rows = LLMRequest.objects.completed().filter(via="chat", api_key__isnull=False)
    return rows.filter(
        input_tokens=USAGE["prompt_tokens"],
        output_tokens=USAGE["completion_tokens"],
        cost__gt=0,
        finish_reason="stop",
    ).count()


# --- who is asked ------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # Ctrl-C is for us, who then stop it; and where we are killed it ends by itself.
        start_new_session=True,
        preexec_fn=end_with_the_benchmark,
        **how,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def provider() -> Iterator[Contender]:
    command = [sys.executable, str(ROOT / "benchmarks" / "chat_provider.py")]
    with running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Contender("direct", port, "/v1/chat/completions", "sk-benchmark", process)


@contextmanager
def site(name: str, key: str) -> Iterator[Contender]:
    kind, _, interface = name.partition("_")
    port = free_port()
    if interface == "wsgi":
        command = ["gunicorn", "django.core.wsgi:get_wsgi_application()"]
        command += ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread"]
        command += ["--workers", "1", "--threads", str(THREADS), "--keep-alive", "75"]
        command += ["--log-level", "warning", "--no-control-socket"]
    else:
        command = ["uvicorn", "--factory", "django.core.asgi:get_asgi_application"]
        # Not by a descriptor, which it would take for a Unix socket's, and let Nagle wait.
        command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--lifespan", "off", "--timeout-keep-alive", "75"]
        command += ["--log-level", "warning", "--no-access-log"]
    environment = {"BENCHMARK_SITE": kind, "BENCHMARK_IS_ASGI": str(interface == "asgi")}
    with running(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    ) as process:
        contender = Contender(name, port, "/chat/completions", key, process)
        until_up(contender, within=60.0)
        yield contender


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until_up(contender: Contender, *, within: float) -> None:
    """Raises ``Untrustworthy`` where nobody listens in time."""
    assert contender.process is not None
    ends = time.monotonic() + within
    while True:
        try:
            socket.create_connection(("127.0.0.1", contender.port), timeout=5).close()
            return
        except OSError:
            if contender.process.poll() is not None or time.monotonic() > ends:
                raise Untrustworthy(f"{contender.title} does not come up") from None
            time.sleep(0.2)


def litellm_problem(directory: Path) -> str:
    """Why LiteLLM cannot be run from ``directory``, which is made where there is none; or empty."""
    if (directory / "bin" / "litellm").exists():
        return ""
    print(f"Installing {LITELLM} into {directory}", file=sys.stderr)
    steps = [
        [sys.executable, "-m", "venv", str(directory)],
        [str(directory / "bin" / "pip"), "install", "-q", LITELLM],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(step)}: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return ""


@contextmanager
def litellm(directory: Path, provider: str, temporary: str) -> Iterator[Contender]:
    """The proxy, booted."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"openai/{name}",
                "api_base": provider,
                "api_key": "sk-benchmark",
            },
        }
        for name in map(model, (None, PACE))
    ]
    settings = {"model_list": models, "litellm_settings": {"telemetry": False}}
    # JSON is YAML.
    config = Path(temporary, "litellm.yaml")
    config.write_text(json.dumps(settings))
    port = free_port()
    environment = {
        "PATH": f"{directory}/bin:{os.environ['PATH']}",
        "HOME": temporary,
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "NO_DOCS": "True",
        "NO_PROXY": "127.0.0.1",
    }
    command = [str(directory / "bin" / "litellm"), "--config", str(config), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--num_workers", "1"]
    with (
        Path(temporary, "litellm.log").open("wb") as log,
        running(command, cwd=temporary, env=environment, stdout=log, stderr=log) as process,
    ):
        began = time.monotonic()
        contender = Contender("litellm", port, "/v1/chat/completions", key, process)
        try:
            until_up(contender, within=BOOTED_WITHIN)
        except Untrustworthy as error:
            said = Path(temporary, "litellm.log").read_text(errors="replace")
            raise Untrustworthy(f"{error}: {said[-2000:]}") from error
        print(f"LiteLLM booted in {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield contender


# --- the rows ----------------------------------------------------------------------------------


@contextmanager
def database(directory: str, *, on_postgres: bool) -> Iterator[str]:
    """The key of a caller."""
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "benchmarks.chat_site",
        "BENCHMARK_ON_POSTGRES": str(on_postgres),
        "BENCHMARK_DIRECTORY": directory,
        "PYTHONPATH": str(ROOT),
    }
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    from benchmarks.chat_site import SCHEMA
    from django_qstash_llm.models import ApiKey

    def execute(sql: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(sql)

    drop = f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"
    if on_postgres:
        execute(f"{drop}; CREATE SCHEMA {SCHEMA}")
    try:
        call_command("migrate", verbosity=0)
        yield ApiKey.objects.issue("benchmark")[1]
    finally:
        if on_postgres:
            execute(drop)
        connection.close()


# --- all of it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    calls: int
    """Of (a), of each in a round."""
    seconds: float
    """Of (b), about, of each in a round."""
    streams: int
    """Of (c), of each in a round."""


QUICK = Size(rounds=2, calls=60, seconds=1.0, streams=8)
FULL = Size(rounds=4, calls=150, seconds=2.0, streams=12)


def compete(contenders: list[Contender], size: Size) -> None:
    """Rounds in turn. The first of all is for warming up and to know the pace."""
    from django.db import connection

    counts = {}
    for each in contenders:
        each.ask(4, pace=PACE)
        each.ask(64, connections=CONNECTIONS)
        pace = each.ask(64, connections=CONNECTIONS).rate
        counts[each.name] = max(CONNECTIONS, round(pace * size.seconds))
    with connection.cursor() as cursor:
        # What a database in use knows of its tables; autovacuum comes to it once a minute.
        cursor.execute("ANALYZE")
    for number in range(size.rounds):
        # Each is first, and each is last, as often as the others.
        turn = number % len(contenders)
        for each in contenders[turn:] + contenders[:turn]:
            each.whole.append(each.ask(size.calls))
            each.crowded.append(each.ask(counts[each.name], connections=CONNECTIONS))
            each.streamed.append(each.ask(size.streams, pace=PACE))


def measure(where: str, *, size: Size, proxy: Path | None) -> list[Figure]:
    name = NAMES[where]
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        direct = stack.enter_context(provider())
        os.environ["BENCHMARK_PROVIDER"] = f"http://127.0.0.1:{direct.port}/v1"
        key = stack.enter_context(database(temporary, on_postgres=where == "postgres"))
        contenders = {"direct": direct}
        if proxy is not None:
            contenders["litellm"] = stack.enter_context(
                litellm(proxy, os.environ["BENCHMARK_PROVIDER"], temporary)
            )
        for each in ("minimal_wsgi", "minimal_asgi", "ours_wsgi", "ours_asgi"):
            contenders[each] = stack.enter_context(site(each, key))
        compete(list(contenders.values()), size)
        alone = direct.ask(MANY, connections=MANY, pace=SLOW_PACE)
        ours = contenders["ours_asgi"]
        many = ours.ask(MANY, connections=MANY, pace=SLOW_PACE)
        megabytes = ours.megabytes()
    print(f"{name}, {size.rounds} rounds", file=sys.stderr)
    for each in TITLES:
        if each in contenders:
            print(f"  {contenders[each].describe()}", file=sys.stderr)
    print(
        f"  {MANY} streams at once: first token p50 {statistics.median(many.firsts):.0f} ms, "
        f"at most {max(many.firsts):.0f}; a chunk late by p50 "
        f"{statistics.median(lag for lags in many.lags for lag in lags):.1f} ms, "
        f"at most {max(max(lags) for lags in many.lags):.0f}",
        file=sys.stderr,
    )
    return [
        *compare(name, contenders),
        at_most(f"(e) {name}: memory with {MANY} streams at once", megabytes, 350, "MB"),
        no_more_than(
            f"(e) {name}: the last of {MANY} streams / direct",
            max(many.latencies),
            max(alone.latencies),
            1.5,
        ),
        at_most(
            f"(e) {name}: the longest that any of their chunks was held",
            max(max(lags) for lags in many.lags),
            1000,
            "ms",
        ),
    ]


def compare(name: str, contenders: dict[str, Contender]) -> list[Figure]:
    direct, proxy = contenders["direct"], contenders.get("litellm")

    def added(of: Callable[[Contender], float], contender: Contender) -> float:
        return of(contender) - of(direct)

    figures = []
    for interface, server in (("wsgi", "gunicorn"), ("asgi", "uvicorn")):
        ours, minimal = contenders[f"ours_{interface}"], contenders[f"minimal_{interface}"]
        title = f"{name}, {server}"
        latency, first = added(Contender.latency, ours), added(Contender.first, ours)
        if proxy is not None:
            times = ours.rate() / proxy.rate()
            print(
                f"  {title}: {times:.1f} times LiteLLM's rate, {times / STRETCH:.2f} of the "
                f"{STRETCH} times that are a Node gateway's",
                file=sys.stderr,
            )
            figures += [
                no_more_than(
                    f"(a) {title}: added latency, ours / LiteLLM",
                    latency,
                    added(Contender.latency, proxy),
                    0.25,
                ),
                at_least(f"(b) {title}: ours / LiteLLM", ours.rate(), proxy.rate(), 4),
            ]
        figures += [
            at_least(f"(b) {title}: ours / minimal view", ours.rate(), minimal.rate(), 0.6),
            no_more_than(
                f"(c) {title}: added to the first token, ours / minimal",
                first,
                added(Contender.first, minimal),
                1.5,
            ),
        ]
        if proxy is not None:
            figures.append(
                no_more_than(
                    f"(c) {title}: added to the first token, ours / LiteLLM",
                    first,
                    added(Contender.first, proxy),
                    0.15,
                )
            )
        figures.append(
            at_least(
                f"(d) {title}: chunks passed on before the next",
                ours.passed_at_once(),
                direct.passed_at_once(),
                0.99,
                "of all",
            )
        )
    fastest = max((each for each in contenders.values() if each is not direct), key=Contender.rate)
    title = f"(f) {name}: direct / the fastest, {fastest.title}"
    return [*figures, at_least(title, direct.rate(), fastest.rate(), 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="One object instead of the table.")
    parser.add_argument("--quick", action="store_true", help="Under a minute, with more noise.")
    parser.add_argument(
        "--database", choices=list(NAMES), default="postgres", help="PostgreSQL by default."
    )
    parser.add_argument("--litellm", metavar="DIR", type=Path, help="LiteLLM's environment.")
    options = parser.parse_args()
    # Stopped from outside, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for package in ("gunicorn", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"Not run, there is no {package}: pip install {package}")
    if options.database == "postgres" and (problem := postgres_problem()):
        sys.exit(f"Not run on PostgreSQL: {problem}. Give --database sqlite.")
    proxy = options.litellm and options.litellm.resolve()
    if proxy is None:
        print("LiteLLM is left out: give its environment with --litellm DIR", file=sys.stderr)
    elif problem := litellm_problem(proxy):
        print(f"LiteLLM is left out: {problem}", file=sys.stderr)
        proxy = None
    size = QUICK if options.quick else FULL
    try:
        figures = measure(options.database, size=size, proxy=proxy)
    except Untrustworthy as error:
        sys.exit(f"{error}: no figure can be trusted")
    show(figures, as_json=options.json)
    sys.exit(not all(figure.holds for figure in figures))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
