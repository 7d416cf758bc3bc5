"""How fast a provider may be called: what its answers taught, and how many calls may begin now.

Plain arithmetic on seconds and counts, so that a day of it can be tested in a moment. ``Pace`` is
what ``models.gate.Gate`` keeps in its row and changes under its lock; the rules are those of a
shared gate: learn limits from every answer, reserve before sending, and after a refusal wait as
long as it says, let one call find out, and never let the herd go.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..limits import HOUR, MINUTE, Limit, Reading, Trouble

FIRST_WINDOW = 8.0
"""Calls at once to a provider of which no limit is known."""
MOST_IN_WINDOW = 10_000.0
MOST_BUCKETS = 16
"""Limits of one provider that are kept: their names are its own."""
SETTLED = 2.0
"""Seconds after which a call that was not refused is taken to be let in: refusals come at once. It
takes no place in the window any more, and if it was to find out, nobody waits for it."""
SPACING = 0.02
"""Seconds between groups of calls, so that the refusal of one is known before the last begins."""
GROUP = 3
"""Calls in a group while no limit is known, and little of the provider: see ``Pace._group``."""
MOST_GROUPS = 2.0
"""That may go together where nobody looked for so long."""
KNOWN_GROUP = 10
"""The same at least where one is."""
BACKOFF = 1.5
"""By which each refusal in a row lengthens the wait that it names."""
LONGEST_BACKOFF = 30.0
"""Seconds added at most to a named wait, and waited at most after a refusal that names none."""
LONGEST_OUTAGE = 5.0
"""Seconds between two calls to find out whether a provider that is down is back."""
FAULTS_IN_A_ROW = 3
"""After which a provider that fails is taken to be down."""
SPARE_SHARE, SPARE_SECONDS = 0.02, 0.25
"""Of a bucket that much is left unused at most: this share of it, and a call and what refills in so
many seconds."""
CAUTION = 0.99
"""Of what refills at the provider's we count this much: its clock and ours differ, and a refused
call costs more than a late one."""
GROWTH = 0.02
"""By which a measured rate grows per second, or nobody would notice that more is let in."""
MEASURED_FOR = 600.0
"""Seconds after the last refusal in which a measured rate counts."""
EASE = 0.95
"""Of a rate that was measured we use this much: exactly at it, every second call is refused."""
DECREASE = 0.7
"""What is left of a measured rate after a refusal, at least: what came before it may have been idle."""
SLOWEST = 1 / 60
"""Calls per second, of a measured rate."""
LATE = 0.05
"""Seconds after a window's announced opening, for two clocks that differ."""
_LITTLE = 1e-6

Jitter = Callable[[float, float], float]


@dataclass(frozen=True, slots=True)
class Charge:
    """What one call takes of a provider's buckets, before it is known."""

    input_tokens: float = 0.0
    output_tokens: float = 0.0

    def of(self, dimension: str) -> float:
        return {
            "requests": 1.0,
            "tokens": self.input_tokens + self.output_tokens,
            "input_tokens": self.input_tokens,
            # Counted as they are made: nobody knows them before.
            "output_tokens": 0.0,
        }[counted_as(dimension)]


COUNTED = ("requests", "tokens", "input_tokens", "output_tokens")


def counted_as(dimension: str) -> str:
    """Which of ``COUNTED`` a provider's word for a limit means."""
    if "token" not in dimension and dimension != "query_cost":
        return "requests"
    if "output" in dimension or "generated" in dimension:
        return "output_tokens"
    return "input_tokens" if "input" in dimension or "prompt" in dimension else "tokens"


@dataclass
class Bucket:
    """One limit of the provider's, as we believe it to be."""

    limit: float
    level: float
    at: float
    """When it had that level."""
    period: float | None = None
    """Seconds in which it refills steadily; None is a window, full again at ``opens_at``."""
    opens_at: float | None = None
    opened_at: float = 0.0
    """When the window that it counts in opened. What was said before tells of another."""

    @property
    def rate(self) -> float:
        """Refilled per second."""
        return CAUTION * self.limit / self.period if self.period else 0.0

    def refill(self, now: float) -> None:
        if self.period:
            self.level = min(self.limit, self.level + max(0.0, now - self.at) * self.rate)
        elif self.opens_at is not None and now >= self.opens_at:
            self.level, self.opens_at, self.opened_at = self.limit, None, now
        elif self.opens_at is None and self.level < self.needed(1):
            # Nothing was heard of this window's end. Most are a minute's.
            self.opens_at = now + MINUTE
        self.at = max(now, self.at)

    def needed(self, amount: float) -> float:
        """What must be there for a call of this amount to begin, with a little to spare: calls do not
        arrive as evenly as they begin. One that is over the limit waits until it is full: the
        provider is to say that it never fits."""
        spare = (
            min(SPARE_SHARE * self.limit, 1.0 + SPARE_SECONDS * self.rate) if self.period else 0.0
        )
        return min(max(1.0, amount) + spare, self.limit)

    def when(self, amount: float) -> float:
        """The moment at which it holds so much, if nothing else happens."""
        missing = self.needed(amount) - self.level
        if missing <= 0:
            return self.at
        if self.period:
            return self.at + missing / self.rate
        return self.opens_at if self.opens_at is not None else self.at + SETTLED


@dataclass
class Measured:
    """The rate of a provider that refuses and never says how much it takes: what it let in between
    two refusals is what it takes in that time."""

    since: float
    """The last refusal."""
    sent: float
    """How many calls had been sent by then."""
    rate: float | None = None
    """Calls per second; None until there was a second refusal."""
    level: float = 0.0
    at: float = 0.0
    before: tuple[float, float, float] | None = None
    """(accepted, seconds, rate) of the last measurement: stragglers correct it."""

    def refill(self, now: float) -> None:
        if self.rate is None:
            return
        seconds = max(0.0, now - self.at)
        grown = min(self.rate * math.exp(GROWTH * min(seconds, MINUTE)), MOST_IN_WINDOW)
        self.level = min(max(1.0, grown), self.level + (self.rate + grown) / 2 * seconds)
        self.rate, self.at = grown, max(now, self.at)

    def refused(self, now: float, sent: float) -> None:
        accepted, seconds = max(0.0, sent - self.sent - 1), now - self.since
        self.before = (accepted, seconds, self.rate or 0.0)
        self._settle(accepted)
        self.since, self.sent, self.level, self.at = now, sent, 0.0, now

    def correct(self) -> None:
        """One that counted as let in was refused as well."""
        if self.before:
            accepted, seconds, rate = self.before
            self.before = (max(0.0, accepted - 1), seconds, rate)
            self._settle(self.before[0])

    def _settle(self, accepted: float) -> None:
        assert self.before is not None
        _, seconds, rate = self.before
        self.rate = max(accepted / max(seconds, 0.05) * EASE, rate * DECREASE, SLOWEST)


class Mark(NamedTuple):
    """What had ever been sent before a group of calls, and with it: counts by ``COUNTED``."""

    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Caps:
    """Upper bounds by the site's own word, over whatever is learnt. None is no bound."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None


@dataclass
class Pace:
    """What is known of a provider's limits, and what was sent against them."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    own: dict[str, Bucket] = field(default_factory=dict)
    """The site's own caps."""
    sent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    """Everything that was ever charged: two readings of it tell what was sent between them."""
    window: float = FIRST_WINDOW
    """Calls at once that nobody knows to be let in; counts while no limit is known, or overloaded."""
    was_refused: bool = False
    is_overloaded: bool = False
    window_before: float = FIRST_WINDOW
    """Before the overload: back there, it is over."""
    blocked_at: float = 0.0
    blocked_until: float = 0.0
    strikes: int = 0
    """Refusals in a row, counting those of one wave once."""
    faults: int = 0
    """The provider's failures in a row."""
    is_probing: bool = True
    """One call is to find out whether any are let in: at first, and after every block."""
    probe_at: float | None = None
    begun_at: float = 0.0
    """When calls last began."""
    measured: Measured | None = None
    most: int | None = None
    """Calls in flight by the site's own word."""

    # --- kept in a row -----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Pace:
        values = dict(kept)
        for name in ("buckets", "own"):
            values[name] = {key: Bucket(**each) for key, each in values.get(name, {}).items()}
        if values.get("measured"):
            measured = values["measured"]
            before = measured.get("before")
            values["measured"] = Measured(**{**measured, "before": before and tuple(before)})
        # Another version may have kept more.
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in values.items() if name in known})

    # --- before a call -----------------------------------------------------------------------

    def cap(self, caps: Caps, *, now: float) -> None:
        """Hold the site's own bounds too. They let a second's worth go at once and no more, since
        that is what the strictest provider allows."""
        self.most = caps.concurrency
        given = {"requests": caps.requests_per_minute, "tokens": caps.tokens_per_minute}
        for name, per_minute in given.items():
            if per_minute is None:
                self.own.pop(name, None)
                continue
            limit = max(1.0, per_minute / MINUTE)
            if name not in self.own or self.own[name].limit != limit:
                period = limit / per_minute * MINUTE
                self.own[name] = Bucket(limit=limit, level=limit, at=now, period=period)

    def free(self, *, now: float, in_flight: int, settled: int) -> int:
        """How many calls may begin now, whatever tokens they take.

        ``in_flight``: calls under way, of which ``settled`` for longer than ``SETTLED`` seconds.
        """
        if now < self.blocked_until:
            return 0
        if self.measured is not None and now - self.measured.since > MEASURED_FOR:
            self.measured = None
        if in_flight and now - self.begun_at < SPACING - _LITTLE:
            return 0
        # Who looks seldom may let as many go as would have gone by now.
        free = int(self._group * max(1.0, min(MOST_GROUPS, (now - self.begun_at) / SPACING)))
        if self.most is not None:
            free = min(free, self.most - in_flight)
        if self.is_probing:
            is_out = self.probe_at is not None and now - self.probe_at < SETTLED
            return 0 if is_out else max(0, min(1, free))
        if self._has_window:
            free = min(free, int(self.window) - (in_flight - settled))
        if self.measured is not None and self.measured.rate is not None:
            self.measured.refill(now)
            free = min(free, int(self.measured.level + _LITTLE))
        return max(0, free)

    def fitting(
        self, charges: Sequence[Charge], *, now: float, in_flight: int, settled: int
    ) -> int:
        """How many of these calls, from the first on, may begin now. See ``free``."""
        count = min(len(charges), self.free(now=now, in_flight=in_flight, settled=settled))
        if self._asks_no_bucket:
            return count
        for name, bucket in self._all_buckets():
            bucket.refill(now)
            left = bucket.level + _LITTLE
            for number, charge in enumerate(charges[:count]):
                if left < bucket.needed(charge.of(name)):
                    count = number
                    break
                left -= charge.of(name)
        return count

    @property
    def _is_known(self) -> bool:
        """Whether a limit of requests is, which no refusal has belied."""
        if self.measured is not None:
            return self.measured.rate is not None
        return any(counted_as(name) == "requests" for name in self.buckets)

    @property
    def _has_window(self) -> bool:
        return self.is_overloaded or not self._is_known

    @property
    def _group(self) -> int:
        if not self._is_known:
            # The more were let in, the less the refusal of a group of them weighs.
            return max(1, min(int(self.window / 8), max(GROUP, int(self.window / 120))))
        if self.measured is not None:
            # Twice as fast as it refills, after a pause.
            return max(1, round(2 * SPACING * (self.measured.rate or 0.0)))
        rates = [
            bucket.rate for name, bucket in self.buckets.items() if counted_as(name) == "requests"
        ]
        return max(KNOWN_GROUP, int(2 * SPACING * max(rates, default=0.0)))

    @property
    def _asks_no_bucket(self) -> bool:
        """The one that finds out goes when the provider said, whatever we believe is left."""
        return self.is_probing and self.strikes > 0

    def _all_buckets(self) -> Iterator[tuple[str, Bucket]]:
        yield from self.buckets.items()
        yield from self.own.items()

    def begin(self, charges: Sequence[Charge], *, now: float) -> Mark:
        """These calls begin now, as one group."""
        before = dict(self.sent)
        for charge in charges:
            for name in COUNTED:
                self.sent[name] += charge.of(name)
            for name, bucket in self.own.items():
                bucket.refill(now)
                # The site's own word holds, however large a call is: all others wait for it.
                bucket.level -= min(charge.of(name), bucket.rate * HOUR)
            for name, bucket in self.buckets.items():
                bucket.refill(now)
                # One call over the limit is not to shut out all others for many periods.
                bucket.level = max(-bucket.limit, bucket.level - charge.of(name))
        if charges and self.measured is not None:
            self.measured.refill(now)
            self.measured.level -= len(charges)
        if charges:
            self.begun_at = now
            self.probe_at = now if self.is_probing else None
        return Mark(before, dict(self.sent))

    def next_at(self, charge: Charge, *, now: float) -> float:
        """When to look again whether a call may begin, should no answer come before."""
        moments = [self.blocked_until, self.begun_at + SPACING]
        if self.is_probing and self.probe_at is not None:
            moments.append(self.probe_at + SETTLED)
        if not self._asks_no_bucket:
            moments += [bucket.when(charge.of(name)) for name, bucket in self._all_buckets()]
        if self.measured is not None and self.measured.rate is not None:
            missing = 1.0 - self.measured.level
            moments.append(self.measured.at + max(0.0, missing) / self.measured.rate)
        latest = max(moments)
        return latest if latest > now else now + SETTLED

    # --- after a call ------------------------------------------------------------------------

    def learn(
        self,
        reading: Reading,
        *,
        now: float,
        began: float,
        mark: Mark | None,
        in_flight: int,
        jitter: Jitter = random.uniform,
    ) -> None:
        """An answer came to a call that began at ``began``, in the group of ``mark``.

        ``in_flight``: calls still under way. ``mark`` None is a call of an engine that died.
        """
        is_of_now = began >= self.blocked_at
        if reading.trouble in {Trouble.RATE, Trouble.DAILY}:
            self._refused(reading, now, is_of_now, in_flight, jitter)
        elif reading.trouble is Trouble.OVERLOAD:
            self._overloaded(reading, now, is_of_now, in_flight, jitter)
        elif reading.trouble is Trouble.FAULT:
            self.faults += 1
            if self.faults >= FAULTS_IN_A_ROW:
                self._overloaded(reading, now, is_of_now, in_flight, jitter)
            elif self.is_probing and is_of_now:
                self.probe_at = None
        else:
            if is_of_now:
                self._let_in(now)
            if reading.is_slow_down:
                self._shrink(in_flight)
        for name, limit in _named(reading.limits):
            self._believe(name, limit, reading, now=now, began=began, mark=mark)

    def _let_in(self, now: float) -> None:
        """Whatever else it was answered, the provider's limits let it pass."""
        self.strikes = self.faults = 0
        self.is_probing, self.probe_at = False, None
        if self.is_overloaded:
            self.window += 1
            self.is_overloaded = self.window < self.window_before
        else:
            grows = 1 / self.window if self.was_refused else 0.5
            self.window = min(MOST_IN_WINDOW, self.window + grows)

    def _shrink(self, in_flight: int) -> None:
        if not self.is_overloaded:
            self.window_before = max(self.window, float(in_flight))
        self.is_overloaded = True
        self.window = max(1.0, min(self.window_before, float(in_flight)) / 2)

    def _refused(
        self,
        reading: Reading,
        now: float,
        is_of_now: bool,
        in_flight: int,
        jitter: Jitter,
    ) -> None:
        tells = any(limit.is_exhausted for limit in reading.limits)
        if not is_of_now:
            # One of the same wave: it tells no more, but when to come again.
            if self.measured is not None:
                self.measured.correct()
            self._block(reading.wait or 0.0, now, jitter)
            return
        if not tells:
            if self.measured is None:
                self.measured = Measured(since=now, sent=self.sent["requests"])
            else:
                self.measured.refill(now)
                self.measured.refused(now, self.sent["requests"])
        self.was_refused = True
        if self._has_window and not self.is_overloaded:
            self.window = max(1.0, self.window / 2)
        if reading.trouble is Trouble.DAILY:
            self._strike(reading, now, jitter, shortest=MINUTE, longest=HOUR)
        else:
            self._strike(reading, now, jitter)

    def _overloaded(
        self,
        reading: Reading,
        now: float,
        is_of_now: bool,
        in_flight: int,
        jitter: Jitter,
    ) -> None:
        if is_of_now:
            self._shrink(in_flight + 1)
            self._strike(reading, now, jitter, longest=LONGEST_OUTAGE)
        else:
            self._block(reading.wait or 0.0, now, jitter)

    def _strike(
        self,
        reading: Reading,
        now: float,
        jitter: Jitter,
        *,
        shortest: float = 1.0,
        longest: float = LONGEST_BACKOFF,
    ) -> None:
        """All wait, and then one finds out. ``shortest`` and ``longest``: seconds, where no wait is
        named."""
        self.strikes += 1
        self.blocked_at = now
        self.is_probing, self.probe_at = True, None
        again = min(self.strikes - 1, 30)
        if reading.wait is None:
            wait = min(shortest * 2.0**again, longest)
        else:
            wait = reading.wait + min(reading.wait * (BACKOFF**again - 1), LONGEST_BACKOFF)
        self._block(wait, now, jitter)

    def _block(self, wait: float, now: float, jitter: Jitter) -> None:
        # A named wait is the least: who comes to the millisecond is refused again.
        until = now + wait + jitter(0.02, 0.05 + min(1.0, wait * 0.05))
        self.blocked_until = max(self.blocked_until, until)

    def find_out(self) -> None:
        """One call next, whatever is known."""
        self.is_probing, self.probe_at = True, None

    def _believe(
        self,
        name: str,
        limit: Limit,
        reading: Reading,
        *,
        now: float,
        began: float,
        mark: Mark | None,
    ) -> None:
        bucket = self.buckets.get(name)
        if limit.remaining is None or (bucket is None and len(self.buckets) >= MOST_BUCKETS):
            return
        if bucket is not None and not bucket.period:
            bucket.refill(now)
            if began < bucket.opened_at:
                return
        if reading.trouble is None and limit.limit:
            if bucket is None:
                bucket = self.buckets[name] = Bucket(limit.limit, limit.limit, now)
            period, opens_at = _refilling(limit, bucket.period, now=now)
            if opens_at is not None and bucket.opens_at is not None:
                # Said some time before it is heard: the earliest is the nearest.
                opens_at = min(opens_at, bucket.opens_at)
            bucket.limit, bucket.period, bucket.opens_at = limit.limit, period, opens_at
        if bucket is None:
            return
        bucket.refill(now)
        if mark is None:
            bucket.level = max(-bucket.limit, min(bucket.level, limit.remaining))
            return
        # What the provider had counted when it said this we know but for the calls that were sent
        # since, and the others of its group, which may have arrived in any order.
        counted = counted_as(name)
        least = limit.remaining - (self.sent[counted] - mark.before[counted])
        most = limit.remaining - (self.sent[counted] - mark.after[counted])
        most += (now - began) * bucket.rate
        level = min(max(bucket.level, least), max(most, least))
        bucket.level = max(-bucket.limit, min(bucket.limit, level))


def _refilling(
    limit: Limit, known: float | None, *, now: float
) -> tuple[float | None, float | None]:
    """(period, None) of a bucket that refills steadily, as it was ``known`` to or now seems to;
    (None, when it opens) of a window. Each answer is asked: some of a window's look like the other."""
    assert limit.limit
    period = limit.period or known
    if limit.reset is None:
        # Nothing is said of it. A minute is what most count in.
        return period or MINUTE, None
    if period:
        full_in = period * (limit.limit - (limit.remaining or 0.0)) / limit.limit
        # To the second is exact enough: some round.
        if abs(limit.reset - full_in) <= max(1.0, 0.1 * full_in):
            return period, None
    return None, now + limit.reset + LATE


def _named(limits: Sequence[Limit]) -> list[tuple[str, Limit]]:
    """Each with a name of its own: two limits of requests differ by their periods."""
    several = {
        limit.dimension
        for limit in limits
        if sum(each.dimension == limit.dimension for each in limits) > 1
    }
    return [
        (f"{limit.dimension}/{limit.period:g}", limit)
        if limit.dimension in several and limit.period
        else (limit.dimension, limit)
        for limit in limits
    ]
