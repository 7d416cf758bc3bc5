"""A day at a provider in a moment: what ``Pace`` lets begin, against providers that count.

Time is a number here. ``drain`` is the engine's loop: write down what ended, begin what may begin.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Protocol

from django_qstash_llm.limits import read
from django_qstash_llm.server.pacing import SETTLED, Caps, Charge, Mark, Pace

REACTION = 0.02
"""Seconds until an engine has written down what it was answered."""
JITTER = 0.03
"""Seconds between a call's beginning and its arrival, at most."""
REFUSING = 0.01
"""Seconds a provider takes to refuse."""

Answer = tuple[int, dict[str, str]]


class Provider(Protocol):
    def call(self, at: float, tokens: float) -> Answer: ...


def go_duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    minutes = int(seconds // 60)
    rest = f"{seconds - 60 * minutes:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


@dataclass
class Refilling:
    """Buckets of a minute's worth that refill steadily, as OpenAI's and llmock's."""

    rpm: float
    tpm: float | None = None
    has_headers: bool = True
    counts_refused: bool = False
    level: float = field(init=False)
    tokens: float = field(init=False)
    at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.level, self.tokens = self.rpm, self.tpm or 0.0

    def call(self, at: float, tokens: float) -> Answer:
        passed, self.at = at - self.at, at
        self.level = min(self.rpm, self.level + passed * self.rpm / 60)
        if self.tpm:
            self.tokens = min(self.tpm, self.tokens + passed * self.tpm / 60)
        lets_in = self.level >= 1 and (not self.tpm or self.tokens >= tokens)
        if lets_in or self.counts_refused:
            self.level = max(-5 * self.rpm / 60, self.level - 1)
        if lets_in and self.tpm:
            self.tokens -= tokens
        header = self.header() if self.has_headers else {}
        if lets_in:
            return 200, header
        wait = (1 - self.level) / (self.rpm / 60)
        if self.tpm:
            wait = max(wait, (tokens - self.tokens) / (self.tpm / 60))
        return 429, header | {"retry-after": str(max(1, math.ceil(wait)))}

    def header(self) -> dict[str, str]:
        told = {"requests": (self.rpm, self.level)}
        if self.tpm:
            told["tokens"] = (self.tpm, self.tokens)
        return {
            f"x-ratelimit-{what}-{name}": value
            for name, (limit, level) in told.items()
            for what, value in (
                ("limit", f"{limit:.0f}"),
                ("remaining", f"{max(0, math.floor(level)):.0f}"),
                ("reset", go_duration((limit - level) / (limit / 60))),
            )
        }


@dataclass
class Windowed:
    """So many in each window, counted anew in the next, as Cerebras' and a limit per second."""

    limit: int
    seconds: float
    has_headers: bool = False
    window: int = -1
    count: int = 0

    def call(self, at: float, tokens: float) -> Answer:
        window = int(at // self.seconds)
        if window != self.window:
            self.window, self.count = window, 0
        reset = (window + 1) * self.seconds - at
        lets_in = self.count < self.limit
        self.count += lets_in
        header = {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.limit - self.count),
            "x-ratelimit-reset-requests": f"{reset:.3f}",
        }
        answer = header if self.has_headers else {}
        if lets_in:
            return 200, answer
        return 429, answer | {"retry-after": str(math.ceil(reset))}


@dataclass
class Outage:
    """Another provider, that is down for a while."""

    provider: Provider
    begins: float
    ends: float
    calls: int = 0
    """While it was down."""

    def call(self, at: float, tokens: float) -> Answer:
        if self.begins <= at < self.ends:
            self.calls += 1
            return 503, {}
        return self.provider.call(at, tokens)


@dataclass(frozen=True)
class Drained:
    seconds: float
    delivered: int
    refused: int
    early: int
    """Calls that began although a wait was known that had not passed."""
    pace: Pace


@dataclass(frozen=True)
class _Call:
    began: float
    ends: float
    answer: Answer
    mark: Mark


def drain(
    provider: Provider,
    count: int,
    *,
    latency: float = 0.5,
    tokens: float = 500.0,
    caps: Caps | None = None,
    most_seconds: float = 3600.0,
) -> Drained:
    """Deliver ``count`` calls of so many tokens each to ``provider``."""
    chance = random.Random(1)
    pace, charge = Pace(), Charge(tokens)
    now = 0.0
    left, delivered, refused, early, last, known_wait = count, 0, 0, 0, 0.0, 0.0
    flying: list[_Call] = []
    arrived = 0.0
    while delivered < count and now < most_seconds:
        ended = [each for each in flying if each.ends + REACTION <= now]
        flying = [each for each in flying if each.ends + REACTION > now]
        for number, call in enumerate(sorted(ended, key=lambda each: each.ends), start=1):
            status, header = call.answer
            reading = read(status, header, b"", now=now)
            pace.learn(
                reading,
                now=now,
                began=call.began,
                mark=call.mark,
                in_flight=len(flying) + len(ended) - number,
                jitter=chance.uniform,
            )
            if status == 200:
                delivered, last = delivered + 1, call.ends
            else:
                refused, left = refused + 1, left + 1
                known_wait = max(known_wait, now + (reading.wait or 0.0))
        if caps:
            pace.cap(caps, now=now)
        settled = sum(now - each.began > SETTLED for each in flying)
        charges = [charge] * min(left, 500)
        begins = pace.fitting(charges, now=now, in_flight=len(flying), settled=settled)
        early += begins if now < known_wait else 0
        mark = pace.begin(charges[:begins], now=now)
        for _ in range(begins):
            # They arrive less evenly than they begin, but in their order.
            arrived = max(arrived, now + chance.uniform(0.0, JITTER))
            answer = provider.call(arrived, tokens)
            takes = latency if answer[0] == 200 else REFUSING
            flying.append(_Call(now, arrived + takes, answer, mark))
        left -= begins
        moments = [each.ends + REACTION for each in flying]
        if left:
            moments.append(pace.next_at(charge, now=now))
        now = max(now + REACTION, min(moments, default=now))
    return Drained(last, delivered, refused, early, pace)
