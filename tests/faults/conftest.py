from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import database

# Minutes, a PostgreSQL and a Redis of their own: only when they are asked for (``tox -e faults``).
collect_ignore_glob = [] if os.environ.get("TEST_FAULTS") else ["test_*.py"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where PostgreSQL's own user gets in, unlike ``tmp_path``. FAULTS_KEEP leaves it there."""
    if missing := database.problem() or ("" if shutil.which("redis-server") else "no redis-server"):
        pytest.skip(missing)
    made = Path(tempfile.mkdtemp(prefix="faults-"))
    made.chmod(0o755)
    yield made
    if not os.environ.get("FAULTS_KEEP"):
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("FAULTS_SEED", "20260301"))
