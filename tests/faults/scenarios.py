"""Small stories in which one bug shows itself, each named after the bug.

``python -m tests.faults.run scenarios NAME…`` plays them, in the process and the database that the
environment says, and leaves ledgers for the checker.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import OperationalError, connection

from django_qstash_llm.models.outbox import Outbox

from . import world as worlds
from .world import World, as_another, later, signed


def no_unique(world: World) -> None:
    """A callback that comes three times."""
    world.create()
    world.submit()
    world.deliver()
    world.repeat()
    world.repeat()


def early_submitted(world: World) -> None:
    """Nobody is there when the requests are handed in."""
    world.create(2)
    world.way.is_qstash_away = True
    world.submit()


def no_claim_token(world: World) -> None:
    """A worker sleeps through its claim, and wakes up while its successor is at work."""
    world.create(3)
    sleeper = Outbox()
    claimed = sleeper.claim(10)
    world.let_pass(settings.FAULTS["claim_seconds"] + 1)
    sleeper.clock = later(settings.FAULTS["claim_seconds"] + 1)

    def succeed() -> None:
        successor = Outbox()
        taken = successor.claim(10)
        as_another("sleeper", lambda: sleeper.hand_over(claimed))
        successor.hand_over(taken)

    as_another("successor", succeed)


def leeway_times_ten(world: World) -> None:
    """A callback that was valid until a hundred seconds ago, which is more than clocks differ."""
    world.create()
    world.submit()
    world.deliver()
    last = world.way.came[-1]
    old = signed(last, last.content, ago=400)
    world.bring(body=last.content, signature=old, is_genuine=False, what="it had expired")


def swallowed_errors(world: World) -> None:
    """The database is away when the callback is to be stored."""

    def refuse(run: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if worlds.IS_RECEIPT.search(str(sql)):
            raise OperationalError("the database is away")
        return run(sql, params, many, context)

    world.create()
    world.submit()
    with connection.execute_wrapper(refuse):
        world.deliver()


def cost_added_up(world: World) -> None:
    """A callback that comes twice."""
    world.create()
    world.submit()
    world.deliver()
    world.repeat()


def ack_before_commit(world: World) -> None:
    """The web process is killed when its answer is out."""
    world.create()
    world.submit()
    world.way.dies_after_answering = True
    world.deliver()


def sweep_off(world: World) -> None:
    """Nobody hears a bell."""
    world.create()


def never_asks(world: World) -> None:
    """The site is away for as long as QStash repeats a callback: the answer, which is paid for, lies
    among QStash's dead letters."""
    world.create()
    world.submit()
    world.way.is_site_away = True
    for _ in range(3):
        world.deliver()
        world.let_pass(20)


def body_reserialised(world: World) -> None:
    """A callback with white space in its JSON, and one whose white space was not signed."""
    world.create()
    world.submit()
    world.deliver()
    last = world.way.came[-1]
    spaced = json.dumps(json.loads(last.content), indent=1).encode()
    world.bring(body=spaced, signature=signed(last, spaced), is_genuine=True, what="")
    world.bring(
        body=spaced,
        signature=signed(last, last.content),
        is_genuine=False,
        what="its body was changed on the way",
    )


def lax_base64(world: World) -> None:
    """An answer that was damaged on the way, where it would read well without the damaged part."""
    world.create()
    world.submit()
    world.way.damage = worlds.with_hole
    world.deliver()


def handler_outside(world: World) -> None:
    """A handler that fails the first time, after it has written."""
    world.create(text="stumble")
    world.submit()
    world.deliver()


def failure_wins(world: World) -> None:
    """QStash took a message for dead whose answer had come."""
    world.create()
    world.submit()
    world.deliver()
    last = world.way.came[-1]
    told = json.loads(last.content) | {"status": 500, "dlqId": "1-0", "body": ""}
    body = json.dumps(told).encode()
    world.bring(body=body, signature=signed(last, body), is_genuine=True, what="")


def keys_kept(world: World) -> None:
    """A provider that repeats the key which it refuses."""
    world.create()
    world.way.is_provider_angry = True
    world.submit()
    world.deliver()


def new_deduplication_id(world: World) -> None:
    """The answer to a submission is lost, and to its repetitions too."""
    world.create()
    world.way.lost_acks = 10
    world.submit()


SCENARIOS: dict[str, Callable[[World], None]] = {
    story.__name__: story
    for story in (
        no_unique,
        early_submitted,
        no_claim_token,
        leeway_times_ten,
        swallowed_errors,
        cost_added_up,
        ack_before_commit,
        sweep_off,
        never_asks,
        body_reserialised,
        lax_base64,
        handler_outside,
        failure_wins,
        keys_kept,
        new_deduplication_id,
    )
}


def main(*names: str) -> None:
    world = World(Path(settings.FAULTS["folder"]))
    for name in names:
        SCENARIOS[name](world)
        world.settle()
