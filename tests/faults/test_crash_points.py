"""Each named point at which a process of the site kills itself, tried in the whole site."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.server.processes import wait_until

from . import ledgers
from .crash import OF_CLIENTS, OF_WEB, OF_WORKERS, POINTS
from .site import Site
from .storm import is_over, judge

TIMES = int(os.environ.get("FAULTS_CRASHES", "1"))
REQUESTS = 20
"""In each wave of them. There are waves until every point has been met."""


def armed(points: list[str]) -> str:
    return ",".join(f"{point}:{TIMES}" for point in points)


def deaths(site: Site) -> Counter[str]:
    lines = ledgers.read(site.folder, "D")
    return Counter(line["who"] for line in lines if line["what"] == "crash")


@pytest.mark.timeout(120 + 60 * TIMES)
def test_a_process_that_dies_at_any_of_the_named_points_loses_nothing(
    folder: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    site = Site(folder, seed=seed, crash_at={"web": armed(OF_WEB), "worker": armed(OF_WORKERS)})
    try:
        first = 1
        while sum(deaths(site).values()) < TIMES * len(POINTS):
            assert time.monotonic() < began + 80 + 60 * TIMES, set(POINTS) - set(deaths(site))
            client = site.client(first, REQUESTS, 2, CRASH_AT=armed(OF_CLIENTS))
            # It may die over one of them; the next begins behind it.
            wait_until(
                lambda c=client: not site.revive() and not c.is_running, seconds=20, every=0.2
            )
            first += REQUESTS
        last = time.monotonic()
        wait_until(lambda: is_over(site), seconds=60, every=0.25)
        figures = judge(site, began=began, drained_in=time.monotonic() - last)
        died = deaths(site)
    finally:
        site.close()
    with capsys.disabled():
        print("", *figures.lines(), f"died at {len(died)} points: {dict(died)}", sep="\n  ")
    assert not figures.violations, "\n".join(map(str, figures.violations[:40]))
    assert died == Counter(dict.fromkeys(POINTS, TIMES))
