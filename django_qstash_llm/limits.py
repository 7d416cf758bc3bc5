"""What a provider's answer says of its limits: what is wrong, how long to wait, how much is left.

A 429 is read, not counted: it may mean a second, a day, or an invoice. Plain Python, because both
the app and ``server/`` ask.

    reading = read(429, {"Retry-After": "20"}, body, now=time.time())
    reading.trouble, reading.wait, reading.wait_source  # Trouble.RATE, 20.0, "retry-after"
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum, auto
from typing import Any, NamedTuple

from .cleaning import clean_text
from .qstash.durations import parse_duration
from .qstash.exceptions import InvalidOption

SHORTEST_WAIT = 0.05
"""Seconds. Providers round down to 0, and who obeys that asks again in a hot loop."""
LONGEST_WAIT = 7 * 86_400.0
"""Seconds. What names a longer wait is a mistake, or an epoch in a unit we do not know."""
LARGEST_ERROR = 2**18
"""Bytes of a body that are read. Errors are small; a large answer that succeeded is none."""

SECOND, MINUTE, HOUR, DAY = 1.0, 60.0, 3600.0, 86_400.0


class Trouble(StrEnum):
    """Why a provider did not answer, by what can be done about it."""

    RATE = auto()
    """Too many requests or tokens for these seconds."""
    OVERLOAD = auto()
    """The provider is full, or we grew too fast: cut what is in flight."""
    DAILY = auto()
    """A quota of a day, which may be none at all."""
    MONEY = auto()
    """No credit, or a spend limit: for the key, not for one request."""
    TOO_LARGE = auto()
    """This one request can never fit: over the context, or over a whole minute's limit."""
    CONTENT = auto()
    """A filter refused the prompt."""
    AUTH = auto()
    """The key is wrong, or may not do this."""
    GONE = auto()
    """No such model or address."""
    INVALID = auto()
    """A request that can never work: an unknown parameter, a value out of range."""
    FAULT = auto()
    """The provider's own failure, or no answer at all."""

    @property
    def is_passing(self) -> bool:
        """Whether time alone cures it; the others wait for a person."""
        return self in {Trouble.RATE, Trouble.OVERLOAD, Trouble.DAILY, Trouble.FAULT}

    @property
    def remedy(self) -> str:
        """What the operator can do, in a sentence."""
        return _REMEDIES[self]


_REMEDIES = {
    Trouble.RATE: "It passes by itself; if it comes often, send more slowly or ask for a higher limit.",
    Trouble.OVERLOAD: "The provider is full; send fewer requests at once until it recovers.",
    Trouble.DAILY: "The day's quota is used up; wait for its reset or ask for a higher one.",
    Trouble.MONEY: "Raise the spend limit or pay at the provider's console, then resume.",
    Trouble.TOO_LARGE: "Shorten the messages, lower the maximum of output tokens, or choose a model that takes more.",
    Trouble.CONTENT: "The provider's filter refused the messages; change them.",
    Trouble.AUTH: "Check the provider's API key and what it is allowed to do.",
    Trouble.GONE: "Check the model's name and the provider's URL: there is no such thing any more, or not for this key.",
    Trouble.INVALID: "Correct the request: the provider's message says which part it does not take.",
    Trouble.FAULT: "It passes by itself; if it stays, look at the provider's status page.",
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One of the buckets that a provider counts in."""

    dimension: str
    """``requests``, ``tokens``, ``input_tokens``, ``output_tokens`` or the provider's own word."""
    limit: float | None = None
    remaining: float | None = None
    reset: float | None = None
    """Seconds until it is full again, which is later than when one more request fits."""
    period: float | None = None
    """Seconds in which ``limit`` is refilled, where that can be known."""

    @property
    def is_exhausted(self) -> bool:
        return self.remaining is not None and self.remaining < 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an answer says. A success has no trouble, and still its limits."""

    trouble: Trouble | None = None
    code: str = ""
    """The provider's most telling word for it: ``rate_limit_exceeded``, ``RESOURCE_EXHAUSTED``."""
    words: str = ""
    """The provider's own message, fit for the database."""
    wait: float | None = None
    """Seconds after which *one* request may be tried; a minimum, for which all others wait too."""
    wait_source: str = ""
    """The header or the words that ``wait`` was read from."""
    limits: tuple[Limit, ...] = ()
    should_retry: bool | None = None
    """``x-should-retry``: the server's own word, which counts before what we make of the rest."""
    is_slow_down: bool = False
    """The provider asks for less, whether or not it answered this time."""


def read(status: int, headers: Mapping[str, str], body: bytes, *, now: float) -> Reading:
    """Read an answer, of whichever provider; ``status`` -1 says that there was none. Never raises.

    ``body`` is unpacked already; ``now`` is unix seconds.
    """
    fields = {name.lower(): value for name, value in headers.items()}
    is_success = 200 <= status < 300
    complaint = _complaint_in_success(body) if is_success else _complaint(body)
    if complaint is None:
        return _success(fields, now=now)
    if is_success:
        status = complaint.status or 500
    fields = {**complaint.headers, **fields}
    buckets = _buckets(fields, now=now)
    trouble = _trouble(status, complaint, buckets)
    wait, source = None, ""
    if trouble.is_passing:
        hints = _hints(status, fields, complaint, buckets, trouble=trouble, now=now)
        wait, source = next(((w, s) for w, s in hints if w is not None), (None, ""))
    return Reading(
        trouble=trouble,
        code=complaint.code,
        words=complaint.words,
        wait=None if wait is None else max(wait, SHORTEST_WAIT),
        wait_source=source,
        limits=_limits(buckets),
        should_retry=_should_retry(fields),
        is_slow_down="slow_down" in complaint.codes or _is_over_limit(fields),
    )


def _success(headers: Mapping[str, str], *, now: float) -> Reading:
    return Reading(
        limits=_limits(_buckets(headers, now=now, is_success=True)),
        should_retry=_should_retry(headers),
        is_slow_down=_is_over_limit(headers),
    )


def _should_retry(headers: Mapping[str, str]) -> bool | None:
    word = headers.get("x-should-retry", "").strip().lower()
    return {"true": True, "false": False}.get(word)


def _is_over_limit(headers: Mapping[str, str]) -> bool:
    """Fireworks' way to say it, beside an answer that succeeded."""
    return headers.get("x-ratelimit-over-limit", "").strip().lower() == "yes"


# --- the value of one header ---

_NUMBER = re.compile(r"[0-9]{1,20}(?:\.[0-9]{0,20})?(?:[eE][-+]?[0-9]{1,2})?")


def parse_wait(value: str, *, now: float) -> float | None:
    """Seconds from ``now`` that a header's value names, or None when it names none.

    Takes Go's durations (``6m0s``), protobuf's (``45.8379s``), seconds, an epoch in seconds or in
    milliseconds, RFC 3339 and HTTP's dates. A date that has just passed is 0: clocks differ.
    """
    value = value.strip()
    seconds = _seconds(value, now) if len(value) <= 64 else None
    return seconds if seconds is not None and 0 <= seconds <= LONGEST_WAIT else None


def _seconds(value: str, now: float) -> float | None:
    if value.startswith(("-", "+")):
        return None
    if _NUMBER.fullmatch(value):
        return _read_number(float(value), now)
    with suppress(InvalidOption):
        return parse_duration(value)
    date = _read_date(value)
    return _until(date.timestamp(), now) if date and date.tzinfo else None


def _read_number(number: float, now: float) -> float | None:
    """A bare number tells its unit by its size: no wait lasts for years."""
    if number < 1e8:
        return number
    if number < 1e9:
        return None
    return _until(number if number <= 1e11 else number / 1000, now)


def _read_date(value: str) -> datetime | None:
    with suppress(ValueError):
        return datetime.fromisoformat(value.upper())
    with suppress(ValueError, OverflowError, IndexError):
        return parsedate_to_datetime(value)
    return None


def _until(moment: float, now: float) -> float | None:
    return max(0.0, moment - now) if moment - now >= -LONGEST_WAIT else None


def _parse_milliseconds(value: str) -> float | None:
    value = value.strip()
    if not _NUMBER.fullmatch(value):
        return None
    seconds = float(value) / 1000
    return seconds if seconds <= LONGEST_WAIT else None


# --- limits ---

# Names change by provider and year: they are read by their pattern.
_NAME = re.compile(
    r"(?:x-)?(?P<family>ratelimit|tokenlimit|ratelimitbysize)-"
    r"(?P<what>limit|remaining|reset)(?:-(?P<of>.+))?"
    r"|anthropic-(?:ratelimit|priority)-(?P<anthropic_of>.+)-"
    r"(?P<anthropic_what>limit|remaining|reset|status)"
)
_PERIODS = {
    "second": SECOND,
    "minute": MINUTE,
    "hour": HOUR,
    "day": DAY,
    "month": 30 * DAY,
}
_DIMENSIONS = {
    "req": "requests",
    "tokens_prompt": "input_tokens",
    "tokens_generated": "output_tokens",
}


class _Bucket(NamedTuple):
    limit: Limit
    reset_header: str


def _limits(buckets: Sequence[_Bucket]) -> tuple[Limit, ...]:
    return tuple(dict.fromkeys(bucket.limit for bucket in buckets))


def _buckets(headers: Mapping[str, str], *, now: float, is_success: bool = False) -> list[_Bucket]:
    """The limits in ``headers``, each with the header that tells its reset."""
    found = _grouped(headers)
    # Together's numbers are per second; it is known by a token limit that has no reset.
    is_together = any(
        name["family"] == "tokenlimit" and "reset" not in values for name, values in found.values()
    )
    buckets = []
    for reset_header, (name, values) in found.items():
        dimension, period = _dimension(name)
        if period is None and is_together:
            period = SECOND
        limit = _limit(dimension, period, values, now=now, infers=is_success)
        if limit is not None:
            buckets.append(_Bucket(limit, reset_header))
    return buckets


def _grouped(headers: Mapping[str, str]) -> dict[str, tuple[re.Match[str], dict[str, str]]]:
    """What belongs to one bucket, together: its names read, and ``limit``, ``remaining``, ``reset``."""
    found: dict[str, tuple[re.Match[str], dict[str, str]]] = {}
    for header, value in headers.items():
        name = _NAME.fullmatch(header)
        if name is None:
            continue
        what = "what" if name["what"] else "anthropic_what"
        reset_header = header[: name.start(what)] + "reset" + header[name.end(what) :]
        found.setdefault(reset_header, (name, {}))[1][name[what]] = value
    return found


def _dimension(name: re.Match[str]) -> tuple[str, float | None]:
    """``tokens-minute`` -> (``tokens``, 60)."""
    words, period = [], None
    for word in re.split(r"[-_]", name["of"] or name["anthropic_of"] or ""):
        if word in _PERIODS:
            period = _PERIODS[word]
        elif re.fullmatch(r"[0-9]{1,3}[smhd]", word):
            period = parse_duration(word)
        elif word not in {"", "per"}:
            words.append(word)
    if not words or words == ["dynamic"]:
        words.insert(0, "requests" if name["family"] == "ratelimit" else "tokens")
    dimension = "_".join(words)
    return _DIMENSIONS.get(dimension, dimension), period


def _limit(
    dimension: str, period: float | None, values: Mapping[str, str], *, now: float, infers: bool
) -> Limit | None:
    limit = _amount(values.get("limit", ""))
    remaining = _amount(values.get("remaining", ""))
    reset = parse_wait(values.get("reset", ""), now=now)
    if values.get("status") == "rejected":
        remaining = 0.0
    if not limit and "limit" in values:
        return None  # -1, Azure's, and 0 say that nothing is counted
    if limit is None and remaining is None and reset is None:
        return None
    if infers and period is None:
        period = _inferred_period(limit, remaining, reset)
    return Limit(dimension=dimension, limit=limit, remaining=remaining, reset=reset, period=period)


def _amount(value: str) -> float | None:
    # The first of a list, and without parameters: ``100, 100;w=60``.
    match = re.match(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:[,;]|$)", value)
    return float(match[1]) if match else None


def _inferred_period(
    limit: float | None, remaining: float | None, reset: float | None
) -> float | None:
    """The period of a bucket that refills steadily: 59 of 60 left and full in 1 s make a minute."""
    if not limit or not reset or remaining is None or remaining >= limit:
        return None
    if remaining > limit / 2 and _whole_period(reset) in {MINUTE, HOUR, DAY}:
        return None  # a fixed window that has just opened looks the same
    return _whole_period(reset * limit / (limit - remaining))


def _whole_period(seconds: float) -> float | None:
    near = (period for period in (SECOND, MINUTE, HOUR, DAY) if abs(seconds / period - 1) < 0.02)
    return next(near, None)


# --- what the body says ---

_CODE_KEYS = (
    "code",
    "error_code",
    "error_type",
    "reason",
    "type",
    "status",
    "limit_source",
    "quotaId",
)
"""Where providers put their words for machines, the most telling first."""
_WORD_KEYS = {"", "message", "msg", "detail", "error", "raw"}
_HEADER = re.compile(r"(?:x-ratelimit-|retry-after).*", re.IGNORECASE)
_MOST_FACTS = 1000


@dataclass(frozen=True, kw_only=True)
class _Complaint:
    """What the body of a failure says, in whichever of a dozen shapes."""

    words: str
    codes: tuple[str, ...] = ()
    retry_delay: str = ""
    """Google's ``RetryInfo``."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the provider behind the one that answers: OpenRouter passes them on in the body."""

    @property
    def code(self) -> str:
        telling = [code for code in self.codes if not code.isdecimal()]
        return next(iter([*telling, *self.codes]), "")

    @property
    def status(self) -> int | None:
        """The status in the body, where the one on the wire says nothing."""
        numbers = [int(code) for code in self.codes if re.fullmatch(r"[45][0-9]{2}", code)]
        return next(iter(numbers), None)

    @property
    def all_words(self) -> str:
        return " ".join([*self.codes, self.words])


def _complaint_in_success(body: bytes) -> _Complaint | None:
    """An error that came with status 200, as OpenRouter's do once the model has begun."""
    if len(body) > LARGEST_ERROR or b'"error"' not in body:
        return None
    answer = _load(body.decode("utf-8", "replace"))
    if isinstance(answer, list):
        answer = next(iter(answer), None)
    error = answer.get("error") if isinstance(answer, dict) else None
    return _read_complaint({"error": error}, "") if error and not _has_answer(answer) else None


def _has_answer(answer: Mapping[str, Any]) -> bool:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(choice, dict) and choice.get("finish_reason") != "error"


def _complaint(body: bytes) -> _Complaint:
    text = body[:LARGEST_ERROR].decode("utf-8-sig", "replace").strip()
    answer = _load(text)
    return _Complaint(words=_plain(text)) if answer is None else _read_complaint(answer, text)


def _load(text: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _read_complaint(answer: Any, text: str) -> _Complaint:
    facts = list(_facts(answer))
    words = [_fold(value) for key, value in facts if key in _WORD_KEYS]
    codes = [
        clean_text(value, limit=64)
        for wanted in _CODE_KEYS
        for key, value in facts
        if key == wanted and value and value != "error"
    ]
    return _Complaint(
        words=clean_text("; ".join(dict.fromkeys(filter(None, words))), limit=2000) or _plain(text),
        codes=tuple(dict.fromkeys(codes))[:16],
        retry_delay=next((value for key, value in facts if key == "retryDelay"), ""),
        headers={key.lower(): value for key, value in facts if _HEADER.fullmatch(key)},
    )


def _facts(answer: Any) -> Iterator[tuple[str, str]]:
    """Every name and text in a JSON document, the outermost first.

    A text that is itself JSON is opened: Gemini and OpenRouter wrap an error in another's message.
    """
    waiting = deque([("", answer)])
    for _ in range(_MOST_FACTS):
        if not waiting:
            return
        key, value = waiting.popleft()
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            value = _load(value) or value
        if isinstance(value, dict):
            # "input" is what was asked, echoed by a validator.
            waiting.extend((name, each) for name, each in value.items() if name != "input")
        elif isinstance(value, list):
            waiting.extend((key, each) for each in value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield key, str(value)


def _plain(text: str) -> str:
    """A page or a line of text, as a message."""
    title = re.search(r"<title>([^<]{1,500})", text[:5000], re.IGNORECASE)
    return clean_text(_fold(title[1] if title else text[:500]))


def _fold(text: str) -> str:
    return " ".join(text[:8000].split())


# --- what it means ---


class _Sign(NamedTuple):
    statuses: frozenset[int]
    words: re.Pattern[str]

    def is_in(self, status: int, words: str) -> bool:
        return status in self.statuses or self.words.search(words) is not None


def _sign(*statuses: int, words: str) -> _Sign:
    return _Sign(frozenset(statuses), re.compile(words, re.IGNORECASE | re.VERBOSE))


# The first that fits. Codes and messages are searched alike, because proxies put one into the other.
_SIGNS = {
    # Google says "check your plan and billing details" of any quota, OpenAI of money alone.
    Trouble.MONEY: _sign(
        402,
        words=r"""insufficient[ _](account[ _])?(balance|credit|fund|quota) | credit[ _]balance
        | exceeded_current_quota | (used\ all|out\ of|no)\ (available\ |remaining\ )?credits
        | credits\ are\ (depleted|exhausted) | spend(ing)?[ _](limit|cap)
        | usage_limit_(exceeded|reached) | specified\ API\ usage\ limits | billing_
        | payment[ _]required | key\ limit\ exceeded | billing\ details.{0,80}platform\.openai""",
    ),
    Trouble.TOO_LARGE: _sign(
        413,
        words=r"""context[ _]?(length|window) | (request|payload|entity|input)[ _]too[ _](large|long)
        | (prompt|input)\ is\ too\ long | maximum\ (prompt|input)\ length | string_above_max_length
        | exceeds\ the\ maximum\ number\ of\ tokens""",
    ),
    Trouble.CONTENT: _sign(
        words=r"""content_?filter | content[ _]?policy | ResponsibleAIPolicyViolation | flagged
        | content\ (management|filtering)\ policy | content\ exists\ risk | prohibited_content
        | data_inspection_failed""",
    ),
    # A redirect is not followed: the address has moved.
    Trouble.GONE: _sign(
        *(301, 302, 303, 307, 308, 404, 410),
        words=r"""model_not_found | model_not_exist | model\ not\ exist | decommissioned
        | DeploymentNotFound | invalid_model | not\ a\ valid\ model""",
    ),
    Trouble.DAILY: _sign(
        words=r"""per[ _-]?day | daily | \b[RT]PD\b | limit:\ 0(?![\d.]) | out\ of\ [a-z ]{1,20}\ quota
        | quota\ will\ be\ replenished | token\ quota\ (is\ |was\ )?exceeded""",
    ),
    # 498 is Groq's, 529 Anthropic's.
    Trouble.OVERLOAD: _sign(498, 503, 529, words=r"overloaded | slow_down | capacity[ _]exceeded"),
    Trouble.RATE: _sign(
        429, words=r"rate[ _-]?limit | too[ _]many[ _]requests | throttl | resource_exhausted"
    ),
    Trouble.AUTH: _sign(
        *(401, 403, 407),
        words=r"""(invalid|incorrect)[ _]api[ _]key | api[ _]key[ _](not[ _]valid|invalid)
        | authentication_error | permission_(denied|error) | unauthenticated""",
    ),
}
_PASSING_STATUSES = {408, 409, 425, 499}
_REQUESTED = re.compile(
    r"limit:?\s*(\d{1,15})\W{1,3}(?:used:?\s*\d{1,15}\W{1,3})?requested:?\s*(\d{1,15})",
    re.IGNORECASE,
)


def _trouble(status: int, complaint: _Complaint, buckets: Sequence[_Bucket]) -> Trouble:
    words = complaint.all_words
    fitting = (trouble for trouble, sign in _SIGNS.items() if sign.is_in(status, words))
    trouble = next(fitting, None)
    if trouble in {Trouble.RATE, Trouble.DAILY} and _never_fits(words):
        return Trouble.TOO_LARGE
    if trouble is Trouble.RATE and any(
        limit.is_exhausted and limit.period == DAY for limit, _ in buckets
    ):
        return Trouble.DAILY
    if trouble is not None:
        return trouble
    is_ours = 400 <= status < 500 and status not in _PASSING_STATUSES
    return Trouble.INVALID if is_ours else Trouble.FAULT


def _never_fits(words: str) -> bool:
    """Whether one request asks for more than the limit: no wait makes it fit."""
    match = _REQUESTED.search(re.sub(r"(?<=\d),(?=\d{3})", "", words))
    return match is not None and int(match[2]) > int(match[1])


# --- how long to wait ---

_SPELT_WAIT = re.compile(
    r"(?:try again|retry|wait|replenished)(?: in| after| for)? "
    r"(\d+:\d\d:\d\d"
    r"|(?:\d+(?:\.\d+)?\s?"
    r"(?:milliseconds?|[mnuµμ]s|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
    r"(?![a-z])\s?)+)",
    re.IGNORECASE,
)
_UNIT = re.compile(r"\s?(milli|[mnuµμ]s(?![a-z])|[smhd])[a-z]*\s?")


def _hints(
    status: int,
    headers: Mapping[str, str],
    complaint: _Complaint,
    buckets: Sequence[_Bucket],
    *,
    trouble: Trouble,
    now: float,
) -> Iterator[tuple[float | None, str]]:
    """What is said of the wait and where, the most exact first."""
    yield _parse_milliseconds(headers.get("retry-after-ms", "")), "retry-after-ms"
    yield parse_wait(headers.get("retry-after", ""), now=now), "retry-after"
    for wait, source in _hints_in_body(complaint, now=now):
        # Google adds seconds, meant for the minute's limit, to a day's quota.
        if trouble is not Trouble.DAILY or (wait or 0) >= MINUTE:
            yield wait, source
    if status == 429:
        # On any other status it tells when the bucket is full, which nobody asked.
        yield _latest_reset(buckets)


def _hints_in_body(complaint: _Complaint, *, now: float) -> Iterator[tuple[float | None, str]]:
    yield parse_wait(complaint.retry_delay, now=now), "RetryInfo"
    match = _SPELT_WAIT.search(complaint.words)
    if match:
        yield _spelt_seconds(match[1], now=now), match[0].strip()


def _spelt_seconds(text: str, *, now: float) -> float | None:
    """``37 seconds``, ``6m0s`` or ``01:23:45``, by way of Go's spelling."""
    text = re.sub(r"(\d+):(\d\d):(\d\d)", r"\1h\2m\3s", text.lower())
    return parse_wait(_UNIT.sub(lambda unit: unit[1].replace("milli", "ms"), text), now=now)


def _latest_reset(buckets: Sequence[_Bucket]) -> tuple[float | None, str]:
    """The last to open of the exhausted ones; or of the only one, if it does not say how full it is."""
    shut = [bucket for bucket in buckets if bucket.limit.is_exhausted]
    if not shut and len(buckets) == 1 and buckets[0].limit.remaining is None:
        shut = list(buckets)
    resets = [(limit.reset, header) for limit, header in shut if limit.reset is not None]
    return max(resets, default=(None, ""))
