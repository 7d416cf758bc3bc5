"""The long tier: ``python -m tests.faults.long [--requests 10000] [--kills 50] [--seed N]``.

Runs the storm, prints what came of it, and writes it to ``docs/faults.md`` with the date and the
versions. Ends with 1 where the checker found anything, or less was done than was
asked for.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import django

if TYPE_CHECKING:
    from .storm import Figures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- the long tier -->", "<!-- /the long tier -->"


def run(requests: int, kills: int, seed: int) -> Figures:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    from .site import Site
    from .storm import storm

    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    site = Site(folder, seed=seed)
    try:
        figures = storm(site, requests=requests, kills=kills, patience=300)
    finally:
        site.close()
    if figures.violations:
        print(f"The ledgers and logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def versions() -> str:
    names = ("django-qstash-llm", "Django", "celery", "kombu", "gunicorn", "psycopg")
    found = [f"{name} {_version(name)}" for name in names]
    programs = [_first_line("postgres", "-V"), _first_line("redis-server", "-v")]
    return ", ".join([f"Python {platform.python_version()}", *found, *programs])


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "(not installed: the source tree)"


def _first_line(*command: str) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{command[0]} (unknown)"
    found = re.search(r"\d+(\.\d+)+", said)
    return f"{command[0]} {found[0] if found else said.strip()}"


def table(figures: Figures, kills: int) -> str:
    rows = {
        "requests": f"{figures.requests:,}: {_listed(figures.states)}",
        "kills": f"{figures.kills} of {kills}",
        "other faults": _listed(
            {
                what: count
                for what, count in figures.faults.items()
                if what in {"stop", "redis down", "database down"}
            }
        ),
        "the database goes down by": figures.how_the_database_fails,
        "on the way to QStash": _listed(dict(figures.on_the_way)),
        "**lost**": figures.lost,
        "**double effects**": figures.double_effects,
        "provider calls": f"{figures.calls:,}",
        "**extra provider calls**": f"{figures.extra_calls}, with {figures.in_flight} in flight "
        "or not yet written down at the faults",
        "callbacks": f"{figures.callbacks:,} delivered, {figures.callbacks_taken:,} taken, "
        f"{figures.receipts:,} receipts",
        "answers recovered from QStash": figures.recovered,
        "creations refused": f"{figures.refused_creations}, of these {figures.refused_for_nothing} "
        "while the database was there",
        "slowest creation": f"{figures.slowest_creation:.2f} s",
        "longest pause without a finished request": f"{figures.longest_pause:.1f} s",
        "drained": f"{figures.drained_in:.1f} s after the last creation",
        "duration": f"{figures.seconds:.0f} s",
        "**violations of I1-I10**": len(figures.violations),
    }
    lines = ["| what | how much |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {what} | {value} |" for what, value in rows.items())])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "none"


def write(figures: Figures, kills: int, page: Path = PAGE) -> None:
    """Put the result between the two marks of the page."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    result = (
        f"{BEGIN}\n{when}, seed {figures.seed}. {versions()}.\n\n{table(figures, kills)}\n{END}"
    )
    text = page.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{result}{after}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=20260301)
    parser.add_argument("--no-page", action="store_true", help="leave docs/faults.md as it is")
    asked = parser.parse_args(arguments)
    print(f"seed {asked.seed}", flush=True)
    figures = run(asked.requests, asked.kills, asked.seed)
    print(*figures.lines(), *figures.violations[:100], sep="\n")
    if not asked.no_page:
        write(figures, asked.kills)
    created = figures.requests + figures.refused_creations
    return bool(figures.violations) or created < asked.requests or figures.kills < asked.kills


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
