from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from django.db import models

M = TypeVar("M")

MOST_CHUNKS = 20
"""At one go: who purges has other things to do, and comes again."""


def in_chunks(
    rows: models.QuerySet[Any], size: int, take_out: Callable[[list[Any]], object]
) -> bool:
    """Have ``rows`` taken out, by their primary keys, ``size`` at a time, so that nobody waits for
    long. Whether some may be left."""
    first = rows.values_list("pk", flat=True)[:size]
    for _ in range(MOST_CHUNKS):
        keys = list(first.all())
        if keys:
            take_out(keys)
        if len(keys) < size:
            return False
    return True


def within(rows: Sequence[M], most_bytes: int, *, size: Callable[[M], int]) -> list[M]:
    """The first of them, as long as there is room for any more: the last may be over it, or it
    would never be its turn."""
    found: list[M] = []
    for row in rows:
        if most_bytes <= 0:
            break
        found.append(row)
        most_bytes -= size(row)
    return found
