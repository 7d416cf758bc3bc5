"""Who is woken when there is something to deliver. The rows are the work; this is only a bell.

An engine in this process hears an event. Else Celery gets the task. An unreachable broker is
logged and forgotten: the rows wait for the sweep.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from celery import Celery
from kombu.exceptions import OperationalError

from . import conf

logger = logging.getLogger(__name__)

FARTHEST_HINT = 60.0
"""Seconds. Beyond it a Celery countdown outlives a broker's visibility timeout."""

SILENCE = 15.0
"""Seconds without a ring after a broker could not be reached: finding that out takes Celery six,
and every publish would wait for it."""

_bells: set[threading.Event] = set()
_silent_until: WeakKeyDictionary[Celery, float] = WeakKeyDictionary()
_here = threading.local()


def ring(wait: float = 0.0) -> None:
    """Something is, or in ``wait`` seconds will be, due."""
    if _bells:
        for bell in tuple(_bells):
            bell.set()
    elif not getattr(_here, "is_delivering", False) and conf.current().engine == "celery":
        _ring_celery(wait)


def _ring_celery(wait: float) -> None:
    # Upstairs: the task's work ends up here again.
    from .tasks import deliver

    if wait > FARTHEST_HINT or time.monotonic() < _silent_until.get(deliver.app, 0.0):
        return
    try:
        deliver.apply_async(countdown=max(wait, 0.0), retry=False)
    except (OperationalError, OSError) as error:
        _silent_until[deliver.app] = time.monotonic() + SILENCE
        logger.warning(
            "Celery's broker cannot be reached (%s); the sweep will deliver", type(error).__name__
        )


@contextmanager
def listening(bell: threading.Event) -> Iterator[None]:
    """While an engine runs in this process."""
    _bells.add(bell)
    try:
        yield
    finally:
        _bells.discard(bell)


def somebody_listens() -> bool:
    return bool(_bells)


@contextmanager
def delivering() -> Iterator[None]:
    """While this very thread delivers all that is due, nobody has to tell it."""
    _here.is_delivering = True
    try:
        yield
    finally:
        _here.is_delivering = False
