"""A site under fire: nothing is lost, nothing is done twice, and every call is accounted for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .site import Site
from .storm import storm

REQUESTS = int(os.environ.get("FAULTS_REQUESTS", "1000"))
KILLS = int(os.environ.get("FAULTS_KILLS", "10"))


@pytest.mark.timeout(240)
def test_a_site_that_is_killed_again_and_again_loses_nothing_and_does_nothing_twice(
    folder: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(folder, seed=seed)
    try:
        figures = storm(site, requests=REQUESTS, kills=KILLS)
    finally:
        site.close()
    with capsys.disabled():
        print("", *figures.lines(), sep="\n  ")
    assert not figures.violations, "\n".join(map(str, figures.violations[:40]))
    assert figures.kills == KILLS
    assert figures.extra_calls <= figures.in_flight
    assert figures.refused_for_nothing == 0
    assert figures.requests + figures.refused_creations >= REQUESTS
