"""Bugs on purpose, and a checker that finds each of them and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.processes import REPOSITORY

from . import checker, database
from .checker import Violation
from .settings import SECRETS

EXPECTED = {
    "no_unique": {"I6"},
    "early_submitted": {"I5"},
    "no_claim_token": {"I8"},
    "leeway_times_ten": {"I6"},
    "swallowed_errors": {"I6"},
    "cost_added_up": {"I4"},
    "ack_before_commit": {"I6"},
    "sweep_off": {"I1"},
    "never_asks": {"I1"},
    "body_reserialised": {"I6"},
    "lax_base64": {"I4"},
    "handler_outside": {"I2"},
    "failure_wins": {"I5"},
    "keys_kept": {"I7"},
    "new_deduplication_id": {"I3"},
}
"""Which invariants a bug breaks, at least."""


class Stage:
    """A database for each play, all alike."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, database.begin(folder)
        self.template = f"faults_template_{os.getpid()}"
        database.migrate(database.create(self.database, self.template), checker.WATCH)

    def play(self, *names: str, bug: str = "") -> list[Violation]:
        """The scenarios, with or without the bug; what the checker says of it."""
        what = bug or "clean"
        folder = self.folder / what
        folder.mkdir()
        name = f"faults_{what}_{os.getpid()}"
        url = database.create(self.database, name, template=self.template)
        transport = {"TRANSPORT": "tests.faults.world.way"}
        faults = {
            "folder": str(folder),
            "name": "scenario",
            "front": "http://front.test",
            "provider": "https://provider.test",
            # One is enough for what is not about giving up.
            "llm": transport | {"CALLBACK_RETRIES": 1},
            "server": transport | {"ENGINE": "thread"},
        }
        environment = {
            "CELERY_BROKER_URL": "memory://",
            "DATABASE_URL": url.replace("postgresql://", "postgres://"),
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "FAULTS": json.dumps(faults),
            "SEEDED_BUG": bug,
        }
        with (folder / "scenario.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "tests.faults.run", "scenarios", *names],
                check=True,
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=60,
            )
        return checker.check(folder, url, secrets=SECRETS)


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    yield stage
    stage.database.close()


@pytest.mark.timeout(240)
def test_each_seeded_bug_is_found_and_without_it_there_is_nothing_to_find(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        clean = pool.submit(stage.play, *EXPECTED)
        found = dict(
            zip(EXPECTED, pool.map(lambda bug: stage.play(bug, bug=bug), EXPECTED), strict=True)
        )
    caught = {bug: sorted({each.invariant for each in found[bug]}) for bug in EXPECTED}
    with capsys.disabled():
        print("", *(f"{bug:22} {' '.join(names)}" for bug, names in caught.items()), sep="\n  ")
    assert not clean.result(), "\n".join(map(str, clean.result()))
    missed = {bug: names for bug, names in caught.items() if not EXPECTED[bug] <= set(names)}
    assert missed == {}
