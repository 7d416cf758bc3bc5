"""Named points at which a process kills itself: where a crash would leave the most in doubt.

``CRASH_AT=outbox.answered:2,callback.committed`` in the environment of a process that begins:
the first two that come to the one point die there, and the first that comes to the other. How
often is counted in files, since a process that died remembers nothing.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from celery.signals import task_prerun
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from django_qstash_llm import triggers
from django_qstash_llm.models import CallbackResponse
from django_qstash_llm.models.doorbell import _Ringing
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.server.delivery import engine
from django_qstash_llm.server.delivery.engine import Engine
from django_qstash_llm.server.models import ending

from .ledgers import Ledger

Die = Callable[[], None]
_here = threading.local()


def before(owner: Any, name: str, die: Die, *, when: Callable[..., Any] = bool) -> None:
    """Die when the method is called. ``when`` is asked of its last argument."""
    real = getattr(owner, name)

    @wraps(real)
    def dying(*args: Any, **kwargs: Any) -> Any:
        if not args or when(args[-1]):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def after(
    owner: Any, name: str, die: Die, *, when: Callable[[Any], Any] = lambda got: True
) -> None:
    """Die when the method is done. ``when`` is asked of what it answers."""
    real = getattr(owner, name)

    @wraps(real)
    def dying(*args: Any, **kwargs: Any) -> Any:
        got = real(*args, **kwargs)
        if when(got):
            die()
        return got

    setattr(owner, name, dying)


def at_commit(owner: Any, name: str, die: Die) -> None:
    """Die with everything said to the database and nothing committed: at the first commit after
    the method was called."""
    real, real_commit = getattr(owner, name), BaseDatabaseWrapper.commit
    real_rollback = BaseDatabaseWrapper.rollback

    @wraps(real)
    def watched(*args: Any, **kwargs: Any) -> Any:
        _here.called = name
        return real(*args, **kwargs)

    def commit(self: BaseDatabaseWrapper) -> None:
        if getattr(_here, "called", "") == name:
            die()
            _here.called = ""
        real_commit(self)

    def rollback(self: BaseDatabaseWrapper) -> None:
        _here.called = ""
        real_rollback(self)

    setattr(owner, name, watched)
    BaseDatabaseWrapper.commit = commit  # type: ignore[method-assign]
    BaseDatabaseWrapper.rollback = rollback  # type: ignore[method-assign]


def at_task(name: str, die: Die) -> None:
    """Die when a worker begins the task."""

    def begin(task: Any = None, **kwargs: Any) -> None:
        if task.name == name:
            die()

    task_prerun.connect(begin, weak=False)


def at_statement(pattern: str, die: Die) -> None:
    """Die when the database has carried out a statement like this, in its transaction."""
    wanted = re.compile(pattern, re.DOTALL | re.IGNORECASE)

    def execute(run: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        got = run(sql, params, many, context)
        if wanted.search(str(sql)):
            die()
        return got

    def listen(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        if execute not in connection.execute_wrappers:
            connection.execute_wrappers.append(execute)

    connection_created.connect(listen, weak=False)


Receipts = type(CallbackResponse.objects.get_queryset())
_RECEIPT = r"INSERT INTO [^;]*django_qstash_llm_callbackresponse"
_SUBMITTED = r"UPDATE [^;]*django_qstash_llm_llmrequest[^;]*qstash_message_id"

POINTS: dict[str, Callable[[Die], None]] = {
    # the app, in the process of whoever asks
    "create.committed": lambda die: before(_Ringing, "__call__", die),
    # the app's worker
    "outbox.claimed": lambda die: after(Outbox, "claim", die, when=bool),
    "outbox.composed": lambda die: before(Outbox, "hand_in", die),
    "outbox.answered": lambda die: before(Outbox, "record", die),
    "outbox.recording": lambda die: at_statement(_SUBMITTED, die),
    "outbox.record_uncommitted": lambda die: at_commit(Outbox, "record", die),
    "outbox.recorded": lambda die: after(Outbox, "record", die),
    "announce.claimed": lambda die: before(triggers, "_tell", die),
    "announce.handled": lambda die: after(triggers, "_tell", die),
    "announce.uncommitted": lambda die: at_commit(triggers, "_tell", die),
    "announce.committed": lambda die: after(triggers, "_announce_one", die, when=bool),
    "sweep.begun": lambda die: at_task("django_qstash_llm.sweep", die),
    # the web process: the callback's view
    "callback.verified": lambda die: before(Receipts, "receive", die),
    "callback.written": lambda die: at_statement(_RECEIPT, die),
    "callback.uncommitted": lambda die: at_commit(Receipts, "receive", die),
    "callback.unrung": lambda die: before(_Ringing, "__call__", die),
    "callback.committed": lambda die: after(Receipts, "receive", die),
    # QStash's side, in our server's engine
    "delivery.claimed": lambda die: before(Engine, "_begin", die),
    "delivery.answered": lambda die: before(ending, "record", die, when=lambda last: True),
    "delivery.recorded": lambda die: after(ending, "record", die),
}
OF_CLIENTS = [name for name in POINTS if name.startswith("create.")]
OF_WEB = [name for name in POINTS if name.startswith("callback.")]
OF_WORKERS = [name for name in POINTS if name not in {*OF_CLIENTS, *OF_WEB}]

assert engine.ending is ending


def arm(names: str, folder: str | Path) -> None:
    """``names``: points with commas between them, each with how often after a colon."""
    for each in names.split(","):
        name, _, times = each.partition(":")
        POINTS[name](_death_at(name, int(times or 1), Path(folder)))


def tried(folder: str | Path) -> set[str]:
    """The points at which somebody died."""
    return {path.name.split("-")[1] for path in Path(folder).glob("crash-*")}


def _death_at(name: str, times: int, folder: Path) -> Die:
    lock = threading.Lock()

    def die() -> None:
        with lock:
            for number in range(times):
                try:
                    os.close(os.open(folder / f"crash-{name}-{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                Ledger(folder, "D").write(what="crash", who=name, pid=os.getpid())
                os.kill(os.getpid(), signal.SIGKILL)

    return die
