from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_qstash_llm.qstash.durations import format_duration, parse_duration
from django_qstash_llm.qstash.exceptions import InvalidOption

fuzz = settings(max_examples=100, deadline=None, database=None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("+0", 0.0),
        ("0s", 0.0),
        ("1s", 1.0),
        ("90s", 90.0),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("6m5s", 365.0),
        ("1h30m3s", 5403.0),
        ("1d", 86_400.0),
        ("1d10h30m", 124_200.0),
        ("30m1d", 88_200.0),
        ("120ms", 0.12),
        ("250us", 0.00025),
        ("250µs", 0.00025),
        ("250μs", 0.00025),
        ("5ns", 5e-9),
        ("-1m", -60.0),
        ("+1m", 60.0),
        ("9223372036s", 9_223_372_036.0),
    ],
)
def test_durations_are_read_as_go_reads_them_and_with_days(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1", 'time: missing unit in duration "1"'),
        ("10s5", 'time: missing unit in duration "10s5"'),
        ("00", 'time: missing unit in duration "00"'),
        ("1w", 'time: unknown unit "w" in duration "1w"'),
        ("1 s", 'time: unknown unit " s" in duration "1 s"'),
        ("1S", 'time: unknown unit "S" in duration "1S"'),
        ("", 'time: invalid duration ""'),
        ("s", 'time: invalid duration "s"'),
        (".s", 'time: invalid duration ".s"'),
        ("-", 'time: invalid duration "-"'),
        ("--5s", 'time: invalid duration "--5s"'),
        ("+-5s", 'time: invalid duration "+-5s"'),
        (" 5s", 'time: invalid duration " 5s"'),
        ("٣s", 'time: invalid duration "٣s"'),
        ("1e3s", 'time: unknown unit "e" in duration "1e3s"'),
        ("9223372037s", 'time: invalid duration "9223372037s"'),
        ("2562048h", 'time: invalid duration "2562048h"'),
        ("9" * 400 + "s", f'time: invalid duration "{"9" * 400}s"'),
    ],
)
def test_what_go_refuses_is_refused_in_its_words(text: str, problem: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse_duration(text, field="Upstash-Delay")
    assert (caught.value.field, caught.value.problem) == ("Upstash-Delay", problem)
    assert caught.value.wire_text == f"invalid Upstash-Delay header: {problem}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (30, "30s"),
        (30.0, "30s"),
        (90, "90s"),
        (86_400, "86400s"),
        (1.5, "1.5s"),
        (0.7, "0.7s"),
        (0.001, "0.001s"),
        (0.000000001, "0.000000001s"),
        (1e-12, "0s"),
    ],
)
def test_durations_are_written_in_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**15).map(lambda microseconds: microseconds / 1_000_000))
@fuzz
def test_a_written_duration_is_read_back_to_the_microsecond(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text() | st.text("0123456789.+-nuµmshd "))
@fuzz
def test_no_text_makes_the_reader_fail_otherwise_than_by_refusing(text: str) -> None:
    with suppress(InvalidOption):
        assert abs(parse_duration(text)) < 2**34
