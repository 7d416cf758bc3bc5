"""Many requests, and everything that can be done to a site while they are under way."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise

from tests.server.processes import wait_until

from . import checker, ledgers
from .checker import Evidence, Violation
from .settings import SECRETS
from .site import Program, Site

PER_SECOND = 22
"""Requests that are created, on two cores."""

OUTAGE_ECHO = 5.0
"""Seconds after an outage in which somebody may still be told of it."""


@dataclass
class Figures:
    """What there is to say of a storm that is over."""

    seed: int
    requests: int
    kills: int
    violations: list[Violation]
    seconds: float
    drained_in: float
    """Seconds from the last creation, or the last fault, until nothing was left to do."""
    states: dict[str, int]
    lost: int
    double_effects: int
    calls: int
    extra_calls: int
    in_flight: int
    refused_creations: int
    refused_for_nothing: int
    """Of these, the ones while the database was there: Redis, workers and QStash are no reason."""
    slowest_creation: float
    callbacks: int
    callbacks_taken: int
    receipts: int
    recovered: int
    longest_pause: float
    """Seconds without a request that finished, while there were some to finish."""
    on_the_way: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    how_the_database_fails: str = ""

    def lines(self) -> list[str]:
        return [
            f"seed {self.seed}",
            f"requests {self.requests}: {self.states}",
            f"faults: {dict(self.faults)}; the database: {self.how_the_database_fails}",
            f"on the way to QStash: {dict(self.on_the_way)}",
            f"lost {self.lost}, double effects {self.double_effects}",
            f"provider calls {self.calls}, of these extra {self.extra_calls}; "
            f"in flight at the faults {self.in_flight}",
            f"callbacks delivered {self.callbacks}, taken {self.callbacks_taken}, "
            f"stored {self.receipts}, recovered {self.recovered}",
            f"creations refused {self.refused_creations}, for nothing {self.refused_for_nothing}, "
            f"slowest {self.slowest_creation:.2f} s",
            f"longest pause {self.longest_pause:.1f} s, drained in {self.drained_in:.1f} s, "
            f"all in {self.seconds:.1f} s",
            f"violations: {len(self.violations)}",
        ]


def storm(site: Site, *, requests: int, kills: int, patience: float = 90) -> Figures:
    """Create so many, kill so often, and see it through. Raises nothing for what goes wrong."""
    began = time.monotonic()
    site.behave(lost_acks=0.10, held_acks=0.05, never_arrive=0.05, repeats=0.4)
    client = site.client(1, requests, requests / PER_SECOND)
    faults = plan(site, kills, random.Random(site.seed))
    for number, fault in enumerate(faults):
        enough = requests * (number + 1) // (len(faults) + 2)
        wait_until(partial(site.has_finished, enough), seconds=30, every=0.2)
        fault()
        site.revive()
    wait_until(partial(has_created, site, client), seconds=60 + 3 * requests / PER_SECOND)
    last = time.monotonic()
    wait_until(partial(is_over, site), seconds=patience, every=0.25)
    drained_in = time.monotonic() - last
    # The last copies of callbacks are still on their way.
    time.sleep(2)
    return judge(site, began=began, drained_in=drained_in)


def plan(site: Site, kills: int, chance: random.Random) -> list[Callable[[], None]]:
    """The faults, in an order that the seed settles: so many kills, and one of each other."""
    faults: list[Callable[[], None]] = []
    for number in range(kills):
        if number % 10 == 3:
            faults.append(partial(site.kill, site.web))
        elif number % 10 in {6, 9}:
            faults.append(partial(site.kill_web_child, chance))
        else:
            faults.append(partial(site.kill, chance.choice(site.workers)))
    for _ in range(max(1, kills // 25)):
        # Longer than its claims.
        faults.append(partial(site.sleep, chance.choice(site.workers), 7.0))
        faults.append(partial(site.lose_redis, 4.0))
        faults.append(site.fail_database)
    chance.shuffle(faults)
    return faults


def has_created(site: Site, client: Program) -> bool:
    site.revive()
    return not client.is_running


def is_over(site: Site) -> bool:
    site.revive()
    counts = site.counts()
    return bool(counts) and not {"pending", "submitted", "unannounced"} & set(counts)


def judge(site: Site, *, began: float, drained_in: float) -> Figures:
    site.write_redis_down()
    violations = checker.check(
        site.folder, site.database_url, secrets=SECRETS, most_connections=site.most_connections
    )
    evidence = Evidence.gather(site.folder, site.database_url, ())
    told = ledgers.read(site.folder, "C")
    callbacks = ledgers.read(site.folder, "K")
    faults = Counter(line["what"] for line in ledgers.read(site.folder, "D"))
    return Figures(
        seed=site.seed,
        requests=len(evidence.requests),
        kills=faults["kill"] + faults["crash"],
        violations=violations,
        seconds=time.monotonic() - began,
        drained_in=drained_in,
        states=dict(Counter(row["state"] for row in evidence.requests.values())),
        lost=sum(violation.invariant == "I1" for violation in violations),
        double_effects=sum(row["times"] - 1 for row in evidence.effects),
        calls=len(evidence.calls),
        extra_calls=checker.extra_calls(evidence),
        in_flight=checker.in_flight_at_faults(evidence),
        refused_creations=sum("refused" in line for line in told),
        refused_for_nothing=len(_refused_for_nothing(evidence)),
        slowest_creation=max((line["took"] for line in told if "took" in line), default=0.0),
        callbacks=len(callbacks),
        callbacks_taken=sum(200 <= line["status"] < 300 for line in callbacks),
        receipts=len(evidence.receipts),
        recovered=sum(row["is_recovered"] for row in evidence.receipts),
        longest_pause=_longest_pause(evidence),
        on_the_way=Counter(line["what"] for line in ledgers.read(site.folder, "W")),
        faults=faults,
        how_the_database_fails=site.database.how_it_fails,
    )


def _refused_for_nothing(evidence: Evidence) -> list[str]:
    outages = evidence.outages()
    return [
        line["refused"]
        for line in ledgers.read(evidence.folder, "C")
        if "refused" in line
        and not any(begin <= line["at"] <= end + OUTAGE_ECHO for begin, end in outages)
    ]


def _longest_pause(evidence: Evidence) -> float:
    moments: list[datetime] = [
        change["at"]
        for change in evidence.history
        if change["was"]["state"] != change["is_now"]["state"]
        and change["is_now"]["state"] in {"completed", "failed"}
    ]
    return max(((b - a).total_seconds() for a, b in pairwise(moments)), default=0.0)
