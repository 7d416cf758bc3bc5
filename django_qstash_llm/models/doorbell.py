"""The doorbell: after a commit, Celery is told that there is something to do.

It carries no work. What there is to do stands in the rows, so a bell that nobody hears costs time
and loses nothing: the sweep rings again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache

from django.db import connections, transaction


class Bell(StrEnum):
    SUBMIT = "submit"
    """There are pending requests."""
    ANNOUNCE = "announce"
    """There are finished requests that triggers and signals have not been told of."""


def ring_on_commit(bell: Bell, using: str) -> None:
    """Ring once after the transaction in progress, however many rows it wrote."""
    ring = _ringer(bell, using)
    # Django drops what a rolled-back savepoint registered, so looking is the safe way to know.
    registered = connections[using].run_on_commit
    if not any(callback is ring for _, callback, *_ in registered):
        transaction.on_commit(ring, using=using, robust=True)


@cache
def _ringer(bell: Bell, using: str) -> Callable[[], None]:
    """The same function every time, by which ``ring_on_commit`` knows it again."""

    def ring() -> None:
        # The one stair that goes up: a row asks Celery to see to it.
        from .. import tasks

        tasks.ring(bell, using)

    return ring
