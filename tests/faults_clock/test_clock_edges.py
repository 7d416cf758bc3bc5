"""The seconds at which a signature begins and ceases to be believed, by the process's own clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from django.db import connection

from django_qstash_llm.models import CallbackResponse, LLMRequest
from tests.server.processes import REPOSITORY, database_url
from tests.wire import FakeQStash

from .at_the_door import SIGNED_AT

# A signature says iat = the moment it was made, and exp = 300 s later.
EXPIRES_AT = SIGNED_AT + timedelta(seconds=300)
OK, REFUSED = 200, 401


def at(moment: datetime, seconds: int, leeway: float) -> dict[str, Any]:
    """The clock stands still at so many seconds after this moment."""
    return {"clock": int(moment.timestamp()) + seconds, "leeway": leeway}


def off_by(seconds: int, *, age: int = 0, leeway: float = 30) -> dict[str, Any]:
    """The clock runs, and is so many seconds off, and the callback was signed ``age`` seconds ago."""
    return {"clock": f"{seconds:+d}s", "leeway": leeway, "age": age}


EDGES: dict[str, tuple[dict[str, Any], int]] = {
    "late by 29 of 30": (at(EXPIRES_AT, 29, 30), OK),
    "late by 30 of 30": (at(EXPIRES_AT, 30, 30), OK),
    "late by 31 of 30": (at(EXPIRES_AT, 31, 30), REFUSED),
    "early by 29 of 30": (at(SIGNED_AT, -29, 30), OK),
    "early by 30 of 30": (at(SIGNED_AT, -30, 30), OK),
    "early by 31 of 30": (at(SIGNED_AT, -31, 30), REFUSED),
    "late by 0 of 0": (at(EXPIRES_AT, 0, 0), OK),
    "late by 1 of 0": (at(EXPIRES_AT, 1, 0), REFUSED),
    "early by 0 of 0": (at(SIGNED_AT, 0, 0), OK),
    "early by 1 of 0": (at(SIGNED_AT, -1, 0), REFUSED),
    "a clock that is right": (off_by(0), OK),
    "a clock 25 s fast": (off_by(25), OK),
    "a clock 25 s slow": (off_by(-25), OK),
    "a clock 25 s fast, at the end of the signature": (off_by(25, age=300), OK),
    "a clock 35 s fast, at the end of the signature": (off_by(35, age=300), REFUSED),
    "a clock 35 s slow": (off_by(-35), REFUSED),
    "a clock 400 s fast": (off_by(400), REFUSED),
    "a clock 400 s slow": (off_by(-400), REFUSED),
    "a clock an hour slow, without leeway": (off_by(-3600, leeway=0), REFUSED),
}


def libfaketime() -> str:
    """What the program ``faketime`` loads into a process; it must be this machine's Python's libc."""
    if which("faketime") is None:
        pytest.skip("the program faketime is not here: apt-get install faketime")
    command = ["faketime", "-f", "+0s", "sh", "-c", 'echo "$LD_PRELOAD"']
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return said.stdout.strip()


def environment(folder: Path) -> dict[str, str]:
    database = connection.settings_dict
    is_sqlite = connection.vendor == "sqlite"
    return {
        **os.environ,
        "LD_PRELOAD": libfaketime(),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_NO_CACHE": "1",  # the file is read anew each time
        # Waiting for a database or a lock is no part of it, and a clock that stands still waits on.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DATABASE_URL": f"sqlite:///{database['NAME']}" if is_sqlite else database_url(),
    }


@pytest.mark.django_db(transaction=True)
def test_a_callback_is_believed_to_the_very_second(tmp_path: Path, qstash: FakeQStash) -> None:
    row = LLMRequest.objects.publish([{"role": "user", "content": "?"}])
    asked = "".join(json.dumps(case) + "\n" for case, _ in EDGES.values())
    (tmp_path / "clock").write_text("+0\n")
    answered = subprocess.run(
        [sys.executable, "-m", "tests.faults_clock.at_the_door", str(row.uuid)],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        input=asked,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert answered.returncode == 0, answered.stderr
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    statuses = dict(zip(EDGES, (answer["status"] for answer in answers), strict=True))
    assert statuses == {name: status for name, (_, status) in EDGES.items()}
    # What is refused writes nothing.
    receipts = [0, *(answer["receipts"] for answer in answers)]
    stored = [after - before for before, after in pairwise(receipts)]
    assert stored == [int(status == OK) for _, status in EDGES.values()]
    assert CallbackResponse.objects.count() == sum(stored)
    row.refresh_from_db()
    believed = [number for number, (_, status) in enumerate(EDGES.values()) if status == OK]
    assert (row.state, row.last_status, row.attempts) == ("submitted", 503, believed[-1] + 1)
