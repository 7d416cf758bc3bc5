"""Real processes that a test starts, stops and kills: a Redis, a destination, Celery workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from django.db import connection

from django_qstash_llm.server.models import Message

from .ledger import Attempt, Death, Ledger

REPOSITORY = Path(__file__).resolve().parents[2]


def wait_until(is_true: Callable[[], Any], *, seconds: float, every: float = 0.05) -> bool:
    """Other processes do the work here, so this looks instead of being told."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def database_url() -> str:
    database = connection.settings_dict
    host, port = database["HOST"] or "127.0.0.1", database["PORT"] or 5432
    password = f":{database['PASSWORD']}" if database["PASSWORD"] else ""
    return f"postgres://{database['USER']}{password}@{host}:{port}/{database['NAME']}"


class Process:
    """In a process group of its own, so that all of it can be killed."""

    def __init__(self, arguments: list[str], **options: Any) -> None:
        self._popen = subprocess.Popen(arguments, cwd=REPOSITORY, start_new_session=True, **options)
        self.pid = self._popen.pid
        self.output = self._popen.stdout

    def send(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, how)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._popen.wait(30)

    def wait(self, seconds: float) -> int:
        return self._popen.wait(seconds)

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None


class Redis:
    """Keeps nothing: each start is an empty one, at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --dir {self.folder}"
        arguments = ["redis-server", *options.split(), "--save", ""]
        self.process = Process(arguments, stdout=subprocess.DEVNULL)
        assert wait_until(self.answers, seconds=10), "Redis does not answer"

    def answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_connect_timeout=1)
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
        finally:
            client.close()

    def kill(self) -> None:
        self.process.kill()


class Destinations:
    """Providers and receivers of callbacks, and the ledger of who called them."""

    def __init__(self, folder: Path) -> None:
        path = folder / "ledger"
        path.touch()
        self.ledger = Ledger(path)
        module = [sys.executable, "-m", "tests.server.ledger", str(path)]
        self._process = Process(module, stdout=subprocess.PIPE, text=True)
        self.url = self._process.output.readline().strip()
        assert self.url, "the destinations did not start"

    def close(self) -> None:
        self._process.kill()
        self._process.output.close()


class Worker:
    """A Celery worker with its beat. One at a time; started again, it is another one."""

    process: Process

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._environment = environment | {"FAULTS_NAME": name}

    def start(self) -> None:
        # Beat's schedule is kept in memory: the file that it would share with a killed one's can
        # be locked for good.
        options = (
            f"-A tests.server.faults_worker worker -n {self.name}@%h -l WARNING -P threads -c 2 "
            "-B --scheduler celery.beat:Scheduler --without-gossip --without-mingle"
        )
        with self.log.open("ab") as log:
            self.process = Process(
                [sys.executable, "-m", "celery", *options.split()],
                env=os.environ | self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def has_ended(self) -> bool:
        return self.process.has_ended

    def held(self) -> frozenset[Attempt]:
        """The attempts that it has claimed."""
        mine = Message.objects.claimed().filter(claimed_by__contains=f":{self.process.pid}:")
        return frozenset(map(Attempt._make, mine.values_list("message_id", "retried")))

    def die(self) -> Death:
        """``kill -9``. It is stopped first, so that what it held can be read."""
        self.process.send(signal.SIGSTOP)
        death = Death(time.monotonic(), self.held())
        self.process.kill()
        return death

    def said(self) -> str:
        return self.log.read_text()


class Site:
    """One database and one Redis, with as many workers as a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis, self.destinations = Redis(folder), Destinations(folder)
        self.ledger = self.destinations.ledger
        self.workers: list[Worker] = []
        self.redis.start()

    def worker(self, *, sweep: float = 0.5, **server: Any) -> Worker:
        """Start one, with these settings of the server."""
        name = f"faults{len(self.workers)}"
        settings = {
            "TOKEN": "of-no-use-to-a-worker",
            "CURRENT_SIGNING_KEY": "sig_current-signing-key-of-these-tests",
            "NEXT_SIGNING_KEY": "sig_next-signing-key-of-these-tests",
            "ALLOW_LOOPBACK": True,
            "LEASE": 2.0,
            "GRACE": 2.0,
            "CONCURRENCY": 50,
        }
        environment = {
            "CELERY_BROKER_URL": self.redis.url,
            "DATABASE_URL": database_url(),
            "DJANGO_SETTINGS_MODULE": "tests.server.faults_worker",
            "FAULTS_SERVER": json.dumps(settings | server),
            "FAULTS_SWEEP": str(sweep),
        }
        worker = Worker(name, environment, self.folder / f"{name}.log")
        self.workers.append(worker)
        worker.start()
        return worker

    def revive(self) -> list[Death]:
        """What any supervisor does: a Celery worker may end by itself when its Redis does. Answers
        what the ended ones held."""
        deaths = []
        for worker in self.workers:
            if worker.has_ended:
                deaths.append(worker.die())
                worker.start()
        return deaths

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        self.redis.kill()
        self.destinations.close()
