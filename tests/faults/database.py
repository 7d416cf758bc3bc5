"""The database of the faults: a PostgreSQL of their own, which they may restart, or else a
database on a server that others use too, whose connections they cut."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import psycopg

from tests.server.processes import REPOSITORY, free_port

OWNER = "postgres"
SHARED = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")


class Database(Protocol):
    how_it_fails: str
    """What ``fail`` does, for whoever reads the result."""

    def url(self, name: str) -> str: ...

    def fail(self) -> None: ...

    def close(self) -> None: ...


class Cluster:
    """Made here and thrown away afterwards. Its program refuses to be run by root."""

    how_it_fails = "pg_ctl restart -m immediate, of a cluster of its own"

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder / "postgresql", free_port()
        self.folder.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self.folder, OWNER)
        self._call("initdb", "-U", OWNER, "-A", "trust", "--no-sync", "-E", "UTF8")
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c max_connections=120"
            # A path may be too long for one.
            " -c unix_socket_directories="
            # Or it opens and syncs each of its thousand files before it is back.
            " -c recovery_init_sync_method=syncfs"
        )
        self._call("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def _call(self, program: str, *arguments: str) -> None:
        as_owner = {"user": OWNER} if os.geteuid() == 0 else {}
        subprocess.run(
            [_program(program), "-D", str(self.folder / "data"), *arguments],
            check=True,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            **as_owner,  # type: ignore[call-overload]
        )

    def url(self, name: str) -> str:
        return f"postgresql://{OWNER}@127.0.0.1:{self.port}/{name}"

    def fail(self) -> None:
        """As if its machine had lost power, and come back."""
        self._call("pg_ctl", "-w", "-m", "immediate", "restart")

    def close(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self._call("pg_ctl", "-w", "-m", "immediate", "stop")


class Shared:
    """A server that is there already."""

    how_it_fails = "pg_terminate_backend of all its connections"

    def __init__(self) -> None:
        self.server = SHARED.replace("postgres://", "postgresql://").rpartition("/")[0]
        self.made: list[str] = []
        """The only ones whose connections are cut: the others are other people's."""

    def url(self, name: str) -> str:
        if name != OWNER:
            self.made.append(name)
        return f"{self.server}/{name}"

    def fail(self) -> None:
        with psycopg.connect(f"{self.server}/postgres", autocommit=True) as connection:
            for _ in range(10):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = ANY(%s)",
                    [self.made],
                )
                time.sleep(0.1)

    def close(self) -> None:
        with psycopg.connect(f"{self.server}/postgres", autocommit=True) as connection:
            for name in {*self.made}:
                connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def _program(name: str) -> str:
    found = shutil.which(name) or next(
        iter(sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None
    )
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def begin(folder: Path) -> Database:
    """A cluster where that can be made, else databases on TEST_POSTGRES_URL."""
    return Cluster(folder) if _can_make_a_cluster() else Shared()


def problem() -> str:
    """Why there can be neither; empty when there can."""
    if _can_make_a_cluster():
        return ""
    try:
        psycopg.connect(SHARED.replace("postgres://", "postgresql://"), connect_timeout=3).close()
    except psycopg.OperationalError as error:
        return f"no PostgreSQL: {str(error).strip().splitlines()[0]}"
    return ""


def _can_make_a_cluster() -> bool:
    try:
        _program("initdb"), _program("pg_ctl")
        if os.geteuid() == 0:
            pwd.getpwnam(OWNER)
    except (FileNotFoundError, KeyError):
        return False
    return True


def create(database: Database, name: str, *, template: str = "template1") -> str:
    """A new database, and its URL."""
    with psycopg.connect(database.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return database.url(name)


def migrate(url: str, watch: str) -> None:
    """The site's tables in an empty database, and what watches over them."""
    environment = os.environ | {
        "DATABASE_URL": url.replace("postgresql://", "postgres://"),
        "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
        "CELERY_BROKER_URL": "memory://",
    }
    subprocess.run(
        [sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"],
        check=True,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(watch)


@contextlib.contextmanager
def connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    """For a look. It may be away: then ``psycopg.OperationalError``."""
    connection = psycopg.connect(url, autocommit=True, connect_timeout=2)
    try:
        yield connection
    finally:
        connection.close()
