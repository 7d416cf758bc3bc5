from __future__ import annotations

import pickle

import pytest

from django_qstash_llm.qstash import exceptions
from django_qstash_llm.qstash.exceptions import (
    AuthenticationError,
    BurstLimitExceeded,
    ChatLimitExceeded,
    DailyLimitExceeded,
    EnvelopeError,
    InvalidOption,
    NotFound,
    QStashError,
    QuotaExceeded,
    RateLimited,
    ResponseError,
    SignatureError,
    TransportError,
)

CHAT = {
    "x-ratelimit-limit-requests": "100",
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-reset-requests": "60",
}
DAILY = {"ratelimit-limit": "500", "ratelimit-remaining": "0", "ratelimit-reset": "1750000000"}
BURST = {
    "burst-ratelimit-limit": "10",
    "burst-ratelimit-remaining": "3",
    "burst-ratelimit-reset": "1750000001",
}


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (400, {}, ResponseError),
        (401, {}, AuthenticationError),
        (403, {}, AuthenticationError),
        (404, {}, NotFound),
        (412, {}, QuotaExceeded),
        (429, {}, BurstLimitExceeded),
        (429, BURST, BurstLimitExceeded),
        (429, DAILY, DailyLimitExceeded),
        (429, DAILY | BURST, DailyLimitExceeded),
        (429, CHAT, ChatLimitExceeded),
        (429, CHAT | DAILY | BURST, ChatLimitExceeded),
        (500, DAILY, ResponseError),
        (302, {}, ResponseError),
    ],
)
def test_the_most_telling_error_is_raised(
    status: int, headers: dict[str, str], kind: type[ResponseError]
) -> None:
    error = ResponseError.from_response(status, '{"error":"no"}', headers)
    assert (type(error), error.status, error.body, error.headers) == (
        kind,
        status,
        '{"error":"no"}',
        headers,
    )
    assert str(error) == f'QStash answered {status}: {{"error":"no"}}'


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        (CHAT, (100, 0, 60)),
        (DAILY, (500, 0, 1_750_000_000)),
        (BURST, (10, 3, 1_750_000_001)),
        ({}, (None, None, None)),
        ({"burst-ratelimit-limit": "a few", "burst-ratelimit-reset": "-1"}, (None, None, None)),
        ({"burst-ratelimit-limit": "²", "burst-ratelimit-reset": "9" * 5000}, (None, None, None)),
    ],
)
def test_a_rate_limit_tells_its_numbers_or_none(
    headers: dict[str, str], limits: tuple[int | None, ...]
) -> None:
    error = ResponseError.from_response(429, "", headers)
    assert isinstance(error, RateLimited)
    assert (error.limit, error.remaining, error.reset) == limits


@pytest.mark.parametrize(
    ("status", "is_ambiguous"), [(400, False), (429, False), (500, True), (504, True)]
)
def test_only_a_5xx_may_come_after_the_work_was_done(status: int, is_ambiguous: bool) -> None:
    assert ResponseError(status, "").is_ambiguous is is_ambiguous


def test_a_long_answer_is_cut_in_the_message_and_kept_whole_beside_it() -> None:
    error = ResponseError(400, "x" * 10_000)
    assert (len(str(error)), len(error.body)) == (521, 10_000)


def test_a_refused_header_has_qstashs_own_words() -> None:
    error = InvalidOption("Upstash-Retries", '"x" is not a whole number')
    assert (str(error), error.wire_text) == (
        'Upstash-Retries: "x" is not a whole number',
        'invalid Upstash-Retries header: "x" is not a whole number',
    )


@pytest.mark.parametrize(
    ("kind", "standard"), [(InvalidOption, ValueError), (EnvelopeError, ValueError)]
)
def test_errors_are_also_what_a_caller_might_already_catch(
    kind: type[Exception], standard: type[Exception]
) -> None:
    assert issubclass(kind, standard)


def test_everything_can_be_caught_at_the_root() -> None:
    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    errors = [kind for kind in kinds if issubclass(kind, Exception)]
    assert [kind for kind in errors if not issubclass(kind, QStashError)] == []


@pytest.mark.parametrize(
    "error",
    [
        InvalidOption("retries", "-1 is too few", wire_text="no"),
        EnvelopeError("not JSON"),
        SignatureError("expired", "expired 5 s ago"),
        TransportError("no answer", is_ambiguous=True),
        ResponseError.from_response(500, "oh", {"x": "y"}),
        ResponseError.from_response(429, "slow down", DAILY),
    ],
)
def test_errors_travel_between_processes(error: QStashError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), copy.args, vars(copy)) == (type(error), error.args, vars(error))
