"""The processes of one site, and what can be done to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import redis

from tests.server.processes import Process, Redis, free_port, wait_until

from . import checker, database
from .ledgers import Ledger

WEB_WORKERS, WEB_THREADS = 2, 4
WORKER_THREADS = 3
LOOK_EVERY = 0.25


class Program:
    """A process group of the site's, started anew when it has died."""

    process: Process | None = None

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path):
        self.name, self.log = name, log
        self._command, self._environment = command, environment

    def start(self, **environment: str) -> None:
        with self.log.open("ab") as log:
            self.process = Process(
                [sys.executable, "-m", *self._command],
                env=os.environ | self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process._popen.poll() is None

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def kill(self) -> None:
        """All of its group: a crash leaves Celery's beat behind."""
        if self.process is not None:
            self.process.kill()


class Teller:
    """A process that prints its address when it is ready."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = Process(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self._process.output.readline().strip()
        assert self.url, f"{module} did not start"

    def close(self) -> None:
        self._process.kill()
        self._process.output.close()


class Site:
    """Everything real: nothing is left out, and nothing runs in the test's own process."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        crash_at: dict[str, str] | None = None,
        **faults: Any,
    ) -> None:
        """``crash_at``: of ``web`` and ``worker``, see ``crash``. ``faults``: see ``settings``."""
        self.folder, self.seed = folder, seed
        self.crash_at = {"web": "", "worker": "", **(crash_at or {})}
        self.deaths = Ledger(folder, "D")
        self._ending = threading.Event()
        self._stack = contextlib.ExitStack()
        try:
            self._begin(faults)
        except BaseException:
            self.close()
            raise

    def _begin(self, faults: dict[str, Any]) -> None:
        self.database = database.begin(self.folder)
        self._stack.callback(self.database.close)
        self.database_url = database.create(self.database, f"faults_{os.getpid()}")
        database.migrate(self.database_url, checker.WATCH)
        self.redis = Redis(self.folder)
        self.redis.start()
        self._stack.callback(self.redis.kill)
        self.provider = Teller("tests.faults.provider", str(self.folder), str(self.seed))
        self._stack.callback(self.provider.close)
        web_url = f"http://127.0.0.1:{free_port()}"
        self.front = Teller("tests.faults.front", str(self.folder), web_url)
        self._stack.callback(self.front.close)
        self.faults = {
            "folder": str(self.folder),
            "front": self.front.url,
            "provider": self.provider.url,
            **faults,
        }
        self.web = self._program("web", _gunicorn(web_url))
        # Two for the app and two for QStash's side.
        self.workers = [
            self._program(f"{queue}{number}", _celery(queue, f"{queue}{number}"))
            for number in range(2)
            for queue in ("celery", "qstash")
        ]
        for program in (self.web, *self.workers):
            self.start(program)
            self._stack.callback(program.kill)
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        assert wait_until(self.answers, seconds=30), self.web.log.read_text()[-2000:]

    def _program(self, name: str, command: list[str]) -> Program:
        environment = {
            "CELERY_BROKER_URL": self.redis.url,
            "DATABASE_URL": self.database_url.replace("postgresql://", "postgres://"),
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "FAULTS": json.dumps(self.faults | {"name": name}),
            "PYTHONDEVMODE": "",
            "COVERAGE_PROCESS_START": "",
        }
        return Program(name, command, environment, self.folder / f"{name}.log")

    def start(self, program: Program) -> None:
        program.start(CRASH_AT=self.crash_at["web" if program is self.web else "worker"])

    def answers(self) -> bool:
        try:
            # Refused for want of a token, by our server behind all of it.
            return httpx.get(f"{self.front.url}/qstash/v2/keys", timeout=2).status_code == 401
        except httpx.HTTPError:
            return False

    def behave(self, **shares: float) -> None:
        """See ``front.Behaviour``."""
        httpx.post(f"{self.front.url}/behave", json={"seed": self.seed, **shares})

    @property
    def most_connections(self) -> int:
        """Each thread may have one; Celery's beat and whoever looks are the five beside them."""
        web = WEB_WORKERS * WEB_THREADS
        # An engine and its watch have threads of their own.
        return web + len(self.workers) * (WORKER_THREADS + 2) + 4 + 5

    def client(self, first: int, count: int, seconds: float, **environment: str) -> Program:
        arguments = [str(first), str(count), str(seconds)]
        program = self._program("client", ["tests.faults.run", "client", *arguments])
        program.start(**environment)
        self._stack.callback(program.kill)
        return program

    # --- what is done to it ---

    def kill(self, program: Program) -> None:
        began = time.monotonic()
        program.kill()
        self._died("kill", program.name, began)
        self.start(program)

    def kill_web_child(self, chance: random.Random) -> None:
        """One of gunicorn's; the others go on, and gunicorn starts another."""
        began = time.monotonic()
        children = self.web.children()
        if children:
            os.kill(chance.choice(children), signal.SIGKILL)
        self._died("kill", "web", began)

    def _died(self, what: str, who: str, began: float) -> None:
        self.deaths.write(what=what, who=who, at=began, until=time.monotonic())

    def sleep(self, program: Program, seconds: float) -> None:
        self.deaths.write(what="stop", who=program.name)
        program.process.send(signal.SIGSTOP)
        time.sleep(seconds)
        program.process.send(signal.SIGCONT)
        # What it does on waking up belongs to its sleep.
        time.sleep(0.5)
        self.deaths.write(what="continue", who=program.name)

    def lose_redis(self, seconds: float) -> None:
        self.deaths.write(what="redis down", who="redis")
        self.redis.kill()
        time.sleep(seconds)
        self.redis.start()
        self.deaths.write(what="redis up", who="redis")

    def fail_database(self) -> None:
        self.deaths.write(what="database down", who="database")
        self.database.fail()
        # Until everybody has noticed.
        time.sleep(1.0)
        self.deaths.write(what="database up", who="database")

    def revive(self) -> list[str]:
        """Start again who has died by itself, as any supervisor would: a Celery worker may end when
        its Redis does. Answers who that was."""
        dead = [each for each in (self.web, *self.workers) if not each.is_running]
        for program in dead:
            if program.process.wait(0) != -signal.SIGKILL:
                # It was seen within a second.
                self._died("exit", program.name, time.monotonic() - 1)
            program.kill()
            self.start(program)
        return [program.name for program in dead]

    # --- what is seen of it ---

    def ask(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Of the database; nothing while it is away."""
        try:
            with database.connected(self.database_url) as connection:
                return connection.execute(sql, parameters).fetchall()
        except psycopg.OperationalError:
            return []

    def counts(self) -> dict[str, int]:
        """State -> requests, and how many are still to be announced under ``unannounced``."""
        rows = self.ask(
            "SELECT CASE WHEN announced_at IS NULL AND state IN ('completed', 'failed')"
            " THEN 'unannounced' ELSE state END AS what, count(*)"
            " FROM django_qstash_llm_llmrequest GROUP BY what"
        )
        return {str(what): count for what, count in rows}

    def has_finished(self, count: int) -> bool:
        """So many requests; whoever died meanwhile is started again."""
        self.revive()
        return self.finished() >= count

    def finished(self) -> int:
        counts = self.counts()
        return sum(counts.get(state, 0) for state in ("completed", "failed"))

    def write_redis_down(self) -> None:
        """Into a file, for the checker to look for secrets in."""
        client = redis.Redis.from_url(self.redis.url)
        with contextlib.suppress(redis.RedisError):
            client.save()
        client.close()

    def _look(self) -> None:
        ledger, queueing = Ledger(self.folder, "A"), Queueing()
        for _ in self._while_open():
            rows = self.ask(
                "SELECT application_name, state, left(query, 60), extract(epoch from now() - state_change)"
                " FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            idle = [
                (who, float(seconds), round(queueing.of(who, float(seconds)), 3), query)
                for who, state, query, seconds in rows
                if str(state).startswith("idle in transaction") and seconds > 0.2
            ]
            queueing.look(who for who, *_ in rows)
            ledger.write(connections=len(rows), idle=idle)

    def _while_open(self) -> Iterator[None]:
        while not self._ending.wait(LOOK_EVERY):
            yield

    def close(self) -> None:
        self._ending.set()
        if getattr(self, "_watch", None):
            self._watch.join(5)
        self._stack.close()


class Queueing:
    """How long processes stood in line for a processor, by Linux's own account: on a busy machine a
    transaction stands open because of that, and of nothing that the product does."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, float]]] = {}

    def look(self, names: Iterable[str]) -> None:
        """``names``: as connections call themselves, with the process at the end."""
        for name in {*names}:
            seen = self._seen.setdefault(name, [])
            seen.append((time.monotonic(), _queued(name)))
            del seen[:-40]

    def of(self, name: str, seconds: float) -> float:
        """Seconds in line, of the last so many; from the look before them on."""
        begin = time.monotonic() - seconds
        earlier = [queued for at, queued in self._seen.get(name, []) if at <= begin]
        return _queued(name) - earlier[-1] if earlier else 0.0


def _queued(name: str) -> float:
    total = 0
    for path in Path(f"/proc/{name.rpartition(':')[2]}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[1])
    return total / 1e9


def _gunicorn(url: str) -> list[str]:
    options = (
        f"gunicorn tests.faults.web:application --bind {url.removeprefix('http://')}"
        f" --workers {WEB_WORKERS} --worker-class gthread --threads {WEB_THREADS}"
        " --log-level warning --keep-alive 0 --graceful-timeout 2"
    ).split()
    return options if not _has_control_socket() else [*options, "--no-control-socket"]


def _has_control_socket() -> bool:
    from gunicorn.config import KNOWN_SETTINGS

    return any("--no-control-socket" in (each.cli or ()) for each in KNOWN_SETTINGS)


def _celery(queue: str, name: str) -> list[str]:
    # Beat's schedule is kept in memory: the file that it would share with a killed one's can be
    # locked for good.
    beat = "-B --scheduler celery.beat:Scheduler" if queue == "celery" else ""
    return (
        f"celery -A tests.faults.work worker -Q {queue} -n {name}@%h -l WARNING -P threads"
        f" -c {WORKER_THREADS} {beat} --without-gossip --without-mingle"
    ).split()
