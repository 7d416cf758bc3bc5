from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_qstash_llm.qstash.exceptions import InvalidOption
from django_qstash_llm.qstash.retry import (
    LONGEST_DELAY,
    RetryDelay,
    default_delay,
    delay_before_retry,
    delay_from_headers,
    parse_reset,
)

NOW = 1_750_000_000.0
fuzz = settings(max_examples=100, deadline=None, database=None)


def date_in(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(NOW + seconds, tz=UTC), usegmt=True)


# --- the default back-off ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry", "seconds"), [(1, 12), (2, 148), (3, 1808), (4, 22_026), (5, 86_400), (5000, 86_400)]
)
def test_the_default_waits_are_those_of_the_documentation(retry: int, seconds: int) -> None:
    assert math.floor(default_delay(retry)) == seconds


# --- what the destination asks for -------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("30", 30.0),
        (" 30 ", 30.0),
        ("1.5", 1.5),
        ("6m5s", 365.0),
        ("120ms", 0.12),
        ("1h", 3600.0),
        ("86400", 86_400.0),
        ("86401", None),
        ("1750000000", None),  # an epoch, as some send it
        ("1750000000000", None),
        ("-5", None),
        ("-5s", None),
        ("5 s", None),
        ("soon", None),
        ("", None),
        ("²", None),
        ("NaN", None),
        ("inf", None),
        (date_in(90), 90.0),
        (date_in(86_400), 86_400.0),
        (date_in(86_401), None),
        (date_in(-90), 0.0),
        ("Sun, 15 Jun 2025 15:08:10", None),  # of no time zone: which moment is that?
        ("Mon, 1 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 1 Jan 2020 00:00:00 +99999999999999999999", None),
    ],
)
def test_a_reset_is_seconds_a_date_or_a_duration_within_a_day(
    value: str, seconds: float | None
) -> None:
    assert parse_reset(value, now=NOW) == seconds


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {}, None),
        (429, {"retry-after": "7"}, 7.0),
        (503, {"retry-after": "7"}, 7.0),
        (-1, {"retry-after": "0"}, 0.0),
        (429, {"x-ratelimit-reset": "8"}, 8.0),
        (429, {"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        (429, {"x-ratelimit-reset-requests": "9", "x-ratelimit-reset-tokens": "2"}, 9.0),
        (429, {"x-ratelimit-reset-tokens": "2"}, 2.0),
        # In the documented order.
        (429, {"retry-after": "1", "x-ratelimit-reset": "2", "x-ratelimit-reset-tokens": "3"}, 1.0),
        (429, {"x-ratelimit-reset": "2", "x-ratelimit-reset-tokens": "3"}, 2.0),
        # What cannot be used does not hide what can.
        (
            429,
            {
                "retry-after": "soon",
                "x-ratelimit-reset": "1750000000",
                "x-ratelimit-reset-tokens": "3",
            },
            3.0,
        ),
        # OpenAI sends these on every answer.
        (500, {"x-ratelimit-reset": "8"}, None),
        (500, {"x-ratelimit-reset-requests": "0", "x-ratelimit-reset-tokens": "0"}, None),
        (500, {"x-ratelimit-reset": "8", "retry-after": "7"}, 7.0),
    ],
)
def test_the_answers_own_headers_say_when_to_come_back(
    status: int, headers: dict[str, str], seconds: float | None
) -> None:
    assert delay_from_headers(status, headers, now=NOW) == seconds


def test_headers_beat_the_expression_and_the_expression_beats_the_default() -> None:
    headers, expression = {"retry-after": "5"}, "1000 * (1 + retried)"
    waits = (
        delay_before_retry(1, status=503, headers=headers, expression=expression, now=NOW),
        delay_before_retry(1, status=503, expression=expression, now=NOW),
        delay_before_retry(1, status=503, now=NOW),
    )
    assert waits == (5.0, 2.0, default_delay(2))


@given(st.text() | st.text("0123456789.-+smhd: GMTJan,"))
@fuzz
def test_no_header_makes_the_reader_fail(value: str) -> None:
    seconds = parse_reset(value, now=NOW)
    assert seconds is None or 0 <= seconds <= LONGEST_DELAY


# --- expressions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "retried", "seconds"),
    [
        ("1000", 0, 1.0),
        ("1000 * retried", 0, 0.0),
        ("1000 * (1 + retried)", 0, 1.0),
        ("1000 * (1 + retried)", 2, 3.0),
        ("pow(2, retried) * 1000", 3, 8.0),
        ("pow(retried, 2) * 1000", 3, 9.0),
        ("max(1000, pow(2, retried) * 100)", 0, 1.0),
        ("max(1000, pow(2, retried) * 100)", 5, 3.2),
        ("min(5000, 7000 * retried)", 9, 5.0),
        ("exp(0) * 1000", 0, 1.0),
        ("sqrt(16) * 1000", 0, 4.0),
        ("abs(-1500)", 0, 1.5),
        ("floor(1.9) * 1000", 0, 1.0),
        ("ceil(1.1) * 1000", 0, 2.0),
        ("round(2.5) * 1000", 0, 3.0),
        ("2000 / 4", 0, 0.5),
        ("10000 - 1000 - 1000", 0, 8.0),
        ("1000 + 2 * 500", 0, 2.0),
        ("8000 / 2 / 2", 0, 2.0),
        (".5 * 1000", 0, 0.5),
        ("\t( ( 1000 ) ) ", 0, 1.0),
        ("--1000", 0, 1.0),
        ("+1000", 0, 1.0),
        ("5000 * -retried", 3, 0.0),  # never before now
        ("-1 / 0.0000001", 0, 0.0),
        ("1000 * 1000 * 1000", 0, LONGEST_DELAY),
        ("exp(1000000)", 0, LONGEST_DELAY),
        ("floor(pow(10, 300) * pow(10, 300))", 0, LONGEST_DELAY),
        ("1000 / retried", 0, default_delay(1)),
        ("sqrt(0 - 1)", 1, default_delay(2)),
        ("pow(10, 300) * pow(10, 300) - pow(10, 300) * pow(10, 300)", 1, default_delay(2)),
    ],
)
def test_an_expression_gives_milliseconds_from_the_attempts_number(
    expression: str, retried: int, seconds: float
) -> None:
    assert RetryDelay(expression).seconds(retried) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "unexpected end"),
        ("1 +", "unexpected end"),
        ("1 2", "unexpected '2'"),
        ("(1", "expected ')'"),
        ("1)", "unexpected ')'"),
        ("*1", "unexpected '*'"),
        ("pow 2", "expected '('"),
        ("pow(2)", "pow takes 2 arguments"),
        ("pow(1, 2, 3)", "pow takes 2 arguments"),
        ("sqrt(1, 2)", "sqrt takes 1 argument"),
        ("max(1)", "max takes 2 arguments"),
        ("pow()", "unexpected ')'"),
        ("attempt * 2", "unknown name 'attempt'"),
        ("__import__", "unknown name '__import__'"),
        ("Retried", "unknown name 'Retried'"),
        ("2 % 3", "unexpected '%'"),
        ("retried ** 2", "unexpected '*'"),
        ("1e3", "unexpected 'e3'"),
        ("1000s", "unexpected 's'"),
        ("retried.real", "unexpected '.'"),
        ("'a'", 'unexpected "\'"'),
        ("٣", "unexpected '٣'"),
        # In a header a line break would begin another one.
        ("1000\r\nUpstash-Forward-X: 1", "unexpected '\\r'"),
        ("1000\n", "unexpected '\\n'"),
        ("1\u00a0+ 1", "unexpected '\\xa0'"),
        ("1" * 257, "longer than 256 characters"),
        ("(" * 33 + "1" + ")" * 33, "nested too deeply"),
    ],
)
def test_an_expression_that_is_not_one_is_refused_with_the_reason(
    expression: str, problem: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        RetryDelay(expression)
    assert str(caught.value) == f"retry_delay: {problem} in expression {expression!r}"


@pytest.mark.parametrize(
    "expression", ["1" + "+1" * 127, "-" * 255 + "1", "(" * 31 + "1" + ")" * 31]
)
def test_the_longest_expressions_can_still_be_evaluated(expression: str) -> None:
    assert 0 <= RetryDelay(expression).seconds(0) <= 0.128


@given(
    st.text(max_size=40)
    | st.lists(
        st.sampled_from(
            [
                "0",
                "1",
                "2.5",
                "9999999999",
                "retried",
                "+",
                "-",
                "*",
                "/",
                "(",
                ")",
                ",",
                "pow(",
                "exp(",
                "sqrt(",
                "abs(",
                "floor(",
                "ceil(",
                "round(",
                "min(",
                "max(",
            ]
        ),
        max_size=20,
    ).map("".join),
    st.integers(0, 10**400),
)
@fuzz
def test_no_expression_gives_anything_but_a_wait_within_a_day(
    expression: str, retried: int
) -> None:
    try:
        delay = RetryDelay(expression)
    except InvalidOption:
        return
    assert 0 <= delay.seconds(retried) <= LONGEST_DELAY
