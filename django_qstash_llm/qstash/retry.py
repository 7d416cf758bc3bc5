"""When a message that failed is tried again.

QStash asks, in this order: the answer's own headers (``Retry-After`` and its family), the
message's ``Upstash-Retry-Delay`` expression, the default back-off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property

from .durations import parse_duration
from .exceptions import InvalidOption

LONGEST_DELAY = 86_400.0
"""Seconds. Above a day QStash ignores a header and clamps its own back-off."""


def default_delay(retry: int) -> float:
    """Seconds before retry number ``retry`` (1 is the first): 12, 148, 1808, 22026, then a day."""
    return min(LONGEST_DELAY, math.exp(2.5 * min(retry, 10)))


def parse_reset(value: str, *, now: float) -> float | None:
    """Seconds from ``now`` (unix seconds) that a reset header names, or None when it names none.

    QStash reads seconds, an RFC 1123 date or a Go duration, and ignores what lies over a day
    ahead, which is how it survives headers that hold an epoch.
    """
    value = value.strip()
    seconds = _reset_seconds(value, now)
    if seconds is None or not 0 <= seconds <= LONGEST_DELAY:
        return None
    return seconds


def _reset_seconds(value: str, now: float) -> float | None:
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,9})?", value):
        return float(value)
    if value[:1].isdigit():
        try:
            return parse_duration(value)
        except InvalidOption:
            return None
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter for a year or an offset of twenty digits
        return None
    return max(0.0, date.timestamp() - now) if date.tzinfo else None


def delay_from_headers(status: int, headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds the destination asks us to wait, or None. ``headers`` has lower-case names.

    ``Retry-After`` counts on any failure. The ``X-RateLimit-Reset`` family counts on a 429 only:
    OpenAI sends it on every answer, and honouring it on a 500 would retry at once.
    """
    retry_after = parse_reset(headers.get("retry-after", ""), now=now)
    if retry_after is not None:
        return retry_after
    if status != 429:
        return None
    reset = parse_reset(headers.get("x-ratelimit-reset", ""), now=now)
    if reset is not None:
        return reset
    resets = [
        seconds
        for name in ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
        if (seconds := parse_reset(headers.get(name, ""), now=now)) is not None
    ]
    return max(resets, default=None)


def delay_before_retry(
    retried: int,
    *,
    status: int = -1,
    headers: Mapping[str, str] | None = None,
    expression: str = "",
    now: float,
) -> float:
    """Seconds until the next attempt, after the attempt that carried ``Upstash-Retried: retried``."""
    asked_for = delay_from_headers(status, headers or {}, now=now)
    if asked_for is not None:
        return asked_for
    if expression:
        return RetryDelay(expression).seconds(retried)
    return default_delay(retried + 1)


# --- the Retry-Delay expression language -----------------------------------------------------

# Plain spaces only: the expression travels in a header, where a line break would end it.
_TOKEN = re.compile(
    r"[ \t]*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([A-Za-z_][A-Za-z_0-9]*)|([-+*/(),]))"
)
_FUNCTIONS: dict[str, tuple[int, Callable[..., float]]] = {
    "pow": (2, math.pow),
    "exp": (1, math.exp),
    "sqrt": (1, math.sqrt),
    "abs": (1, abs),
    "floor": (1, math.floor),
    "ceil": (1, math.ceil),
    "round": (1, lambda x: math.floor(x + 0.5)),
    "min": (2, min),
    "max": (2, max),
}
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_MAX_LENGTH = 256
_MAX_DEPTH = 32

Evaluate = Callable[[float], float]


@dataclass(frozen=True)
class RetryDelay:
    """An ``Upstash-Retry-Delay`` expression: milliseconds, from ``retried`` (0 at the first retry).

    Numbers, ``retried``, ``+ - * /``, parentheses and ``pow exp sqrt abs floor ceil round min max``.
    All arithmetic is on floats, so no expression can cost more than its length.
    """

    expression: str

    def __post_init__(self) -> None:
        self._evaluate  # noqa: B018 - read it now, so that a wrong one is refused at the door

    @cached_property
    def _evaluate(self) -> Evaluate:
        return _Parser(self.expression).parse()

    def seconds(self, retried: int) -> float:
        """Seconds before the retry that follows the attempt ``retried``, clamped to 0..1 day.

        A result that is no number (``1/0``, ``sqrt(-1)``) falls back to the default back-off.
        """
        try:
            milliseconds = self._evaluate(float(retried))
        except OverflowError:
            return LONGEST_DELAY
        except (ZeroDivisionError, ValueError):
            return default_delay(retried + 1)
        if math.isnan(milliseconds):
            return default_delay(retried + 1)
        return min(max(milliseconds / 1000, 0.0), LONGEST_DELAY)


@dataclass
class _Parser:
    """Recursive descent over ``sum := product (± product)*``, ``product := atom (*/ atom)*``."""

    expression: str
    tokens: list[str] = field(default_factory=list)
    depth: int = 0

    def parse(self) -> Evaluate:
        if len(self.expression) > _MAX_LENGTH:
            raise self.refusal(f"longer than {_MAX_LENGTH} characters")
        self.tokens = list(reversed(self.tokenise()))
        evaluate = self.sum()
        if self.tokens:
            raise self.refusal(f"unexpected {self.tokens[-1]!r}")
        return evaluate

    def refusal(self, problem: str) -> InvalidOption:
        return InvalidOption("retry_delay", f"{problem} in expression {self.expression!r}")

    def tokenise(self) -> list[str]:
        tokens, position, text = [], 0, self.expression.rstrip(" \t")
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                culprit = text[position:].strip(" \t")[0]
                raise self.refusal(f"unexpected {culprit!r}")
            tokens.append(match.group().strip())
            position = match.end()
        return tokens

    def next_is(self, *symbols: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in symbols

    def expect(self, symbol: str) -> None:
        if not self.next_is(symbol):
            raise self.refusal(f"expected {symbol!r}")
        self.tokens.pop()

    def sum(self) -> Evaluate:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.refusal("nested too deeply")
        left = self.product()
        while self.next_is("+", "-"):
            left = _apply(_OPERATORS[self.tokens.pop()], left, self.product())
        self.depth -= 1
        return left

    def product(self) -> Evaluate:
        left = self.atom()
        while self.next_is("*", "/"):
            left = _apply(_OPERATORS[self.tokens.pop()], left, self.atom())
        return left

    def atom(self) -> Evaluate:
        negations = 0
        while self.next_is("-", "+"):
            negations += self.tokens.pop() == "-"
        positive = self.positive_atom()
        return _apply(lambda x: -x, positive) if negations % 2 else positive

    def positive_atom(self) -> Evaluate:
        if not self.tokens:
            raise self.refusal("unexpected end")
        word = self.tokens.pop()
        if word == "(":
            inner = self.sum()
            self.expect(")")
            return inner
        if word == "retried":
            return lambda retried: retried
        if word in _FUNCTIONS:
            return self.call(word)
        if word[0].isdigit() or word[0] == ".":
            number = float(word)
            return lambda retried: number
        raise self.refusal(
            f"unknown name {word!r}" if word.isidentifier() else f"unexpected {word!r}"
        )

    def call(self, name: str) -> Evaluate:
        arity, function = _FUNCTIONS[name]
        self.expect("(")
        arguments = [self.sum()]
        while self.next_is(","):
            self.tokens.pop()
            arguments.append(self.sum())
        self.expect(")")
        if len(arguments) != arity:
            raise self.refusal(f"{name} takes {arity} argument{'s' * (arity > 1)}")
        return _apply(function, *arguments)


def _apply(function: Callable[..., float], *arguments: Evaluate) -> Evaluate:
    return lambda retried: float(function(*(argument(retried) for argument in arguments)))
