"""The doorbell: after a commit, Celery is told that there is something to do.

It carries no work. What there is to do stands in the rows, so a bell that nobody hears costs time
and loses nothing: the sweep rings again.
"""

from __future__ import annotations

from enum import StrEnum

from django.db import connections, transaction


class Bell(StrEnum):
    SUBMIT = "submit"
    """There are pending requests."""
    ANNOUNCE = "announce"
    """There are finished requests or attempts that triggers and signals have not been told of."""
    CANCEL = "cancel"
    """There are messages that QStash is to try no more."""
    APPLY = "apply"
    """There are stored callbacks that could not be read when they came."""
    RECONCILE = "reconcile"
    """There are submitted requests of which nobody has heard past their deadline."""
    BATCHES = "batches"
    """There are batches whose file is to be read, or that are to be stopped."""
    ALERT = "alert"
    """There are budgets of which a threshold was reached, and nobody was told."""
    LANES = "lanes"
    """There are lanes of which QStash is to be told, or whose pause is over."""


class _Ringing:
    """One ring that waits for its commit."""

    def __init__(self, bell: Bell, using: str) -> None:
        self.bell = bell
        self.using = using
        self.is_over = False
        # By this Django names a robust callback that fails.
        self.__qualname__ = f"ring {bell}"

    def __call__(self) -> None:
        self.is_over = True
        # The one stair that goes up: a row asks Celery to see to it.
        from .. import tasks

        tasks.ring(self.bell, self.using)


def ring_on_commit(bell: Bell, using: str) -> None:
    """Ring once after the transaction in progress, however many rows it wrote."""
    # Django drops what a rolled-back savepoint registered, so looking is the safe way to know.
    # In a test case what has been run stays in the list.
    for _, callback, *_ in connections[using].run_on_commit:
        if (
            isinstance(callback, _Ringing)
            and (callback.bell, callback.using) == (bell, using)
            and not callback.is_over
        ):
            return
    transaction.on_commit(_Ringing(bell, using), using=using, robust=True)
