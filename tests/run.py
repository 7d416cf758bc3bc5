"""Runs the suite as a user of the package would meet it: against what is installed.

Once on SQLite, and once on PostgreSQL where one answers; on one of the two only where
TEST_DATABASES names it. The tests are copied away from the source tree first, so that they cannot
import the package that lies beside them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITH_LONG_ONES = os.environ.get("TEST_ONCE", "1") != "0"
DATABASES = os.environ.get("TEST_DATABASES", "sqlite postgresql").split()
WITH_COVERAGE = os.environ.get("TEST_COVERAGE", "1") != "0"
# By file: the worker processes that one of them starts share a broker. Two cores are enough for four,
# which often wait.
AT_ONCE = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
NO_DATABASE = ("--ignore=tests/qstash", "--ignore=tests/test_provider.py")
POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TEST_DIRECTORY")) as directory:
        copy = Path(directory)
        for name in ("tests", "testproject"):
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3*")
            )
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        environment = {**os.environ, "TEST_DIRECTORY": directory}
        results = []
        problem = postgres_problem() if "postgresql" in DATABASES else "it was not asked for"
        if "sqlite" in DATABASES or problem:
            results.append(run("SQLite", copy, environment, arguments))
        if problem:
            print(f"\nNot run on PostgreSQL: {problem}", flush=True)
        else:
            on_postgres = {
                "DATABASE_URL": POSTGRES,
                "TEST_DATABASE_NAME": f"test_llm_{os.getpid()}",
            }
            # What touches no database has nothing to prove on a second one.
            chosen = arguments or ([*NO_DATABASE] if results else [])
            results.append(run("PostgreSQL", copy, environment | on_postgres, chosen))
        if WITH_COVERAGE:
            coverage(copy)
        return max(results)


def run(database: str, copy: Path, environment: dict[str, str], arguments: list[str]) -> int:
    print(f"\n--- on {database} ---", flush=True)
    measured = ["--cov", "--cov-append", "--cov-report="] if WITH_COVERAGE else []
    chosen = [] if WITH_LONG_ONES else ["-m", "not once"]
    command = [sys.executable, "-m", "pytest", "-q", *AT_ONCE, *measured, *chosen, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, check=False).returncode


def postgres_problem() -> str:
    """Why PostgreSQL cannot be used; empty when it can."""
    import psycopg

    try:
        psycopg.connect(POSTGRES.replace("postgres://", "postgresql://"), connect_timeout=3).close()
    except psycopg.OperationalError as error:
        return str(error).strip().splitlines()[0]
    return ""


def coverage(copy: Path) -> None:
    print("\n--- coverage of the package, both databases together ---", flush=True)
    subprocess.run(
        [sys.executable, "-m", "coverage", "report", "--skip-covered"], cwd=copy, check=False
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
