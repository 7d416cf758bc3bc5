"""The rules of a shared gate, in a simulated time of which a minute takes a moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_qstash_llm.limits import Reading, read
from django_qstash_llm.server.pacing import (
    FIRST_WINDOW,
    SETTLED,
    SPACING,
    Bucket,
    Caps,
    Charge,
    Measured,
    Pace,
    counted_as,
)

from .simulation import Outage, Provider, Refilling, Windowed, drain

NONE_IN_FLIGHT = {"in_flight": 0, "settled": 0}


def no_jitter(least: float, most: float) -> float:
    return least


def let_in(pace: Pace, now: float, **headers: str) -> None:
    answered(pace, 200, now, **headers)


def answered(pace: Pace, status: int, now: float, *, body: bytes = b"", **headers: str) -> None:
    """A call began and ended at this moment."""
    mark = pace.begin([Charge(100, 100)], now=now)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    reading = read(status, fields, body, now=now)
    pace.learn(reading, now=now, began=now, mark=mark, in_flight=0, jitter=no_jitter)


def free(pace: Pace, now: float, in_flight: int = 0, settled: int = 0) -> int:
    return pace.fitting([Charge(100, 100)] * 10_000, now=now, in_flight=in_flight, settled=settled)


# --- a backlog drains ----------------------------------------------------------------------------


TPM = 240_000
SILENT = {"has_headers": False}


@pytest.mark.parametrize("latency", [0.2, 0.5])
@pytest.mark.parametrize(
    ("provider", "count", "ideal", "slower", "refused"),
    [
        pytest.param(lambda: Refilling(600), 900, 30, 1.10, 0.01, id="headers"),
        pytest.param(lambda: Refilling(600, TPM), 900, 52.5, 1.10, 0.01, id="tokens"),
        pytest.param(lambda: Refilling(6000), 9000, 30, 1.10, 0.01, id="fast"),
        pytest.param(lambda: Windowed(300, 15, True), 900, 30, 1.10, 0.01, id="window"),
        pytest.param(lambda: Refilling(600, **SILENT), 900, 30, 1.15, 0.02, id="silent"),
        pytest.param(lambda: Refilling(600, TPM, **SILENT), 900, 52.5, 1.15, 0.03, id="both"),
        pytest.param(
            lambda: Refilling(600, **SILENT, counts_refused=True), 900, 30, 1.6, 0.02, id="debt"
        ),
        pytest.param(lambda: Windowed(10, 1), 300, 29, 1.7, 0.03, id="per-second"),
        pytest.param(lambda: Outage(Refilling(600), 5, 65), 900, 65, 1.15, 0.02, id="outage"),
    ],
)
def test_a_backlog_drains_at_the_providers_speed(
    provider: Callable[[], Provider],
    count: int,
    ideal: float,
    slower: float,
    refused: float,
    latency: float,
) -> None:
    drained = drain(provider(), count, latency=latency)
    assert drained.delivered == count
    assert drained.seconds <= slower * (ideal + latency)
    assert drained.refused <= refused * count
    assert drained.early == 0


def test_a_provider_that_is_back_is_not_stormed() -> None:
    outage = Outage(Refilling(600, has_headers=False), 5, 65)
    drained = drain(outage, 900)
    # Those that were in flight, and one at a time to find out.
    assert outage.calls <= 24
    assert drained.refused - outage.calls <= 18
    assert drained.delivered == 900


def test_slow_calls_do_not_wait_for_each_other_to_end() -> None:
    """Of 30 seconds each: by eight at a time it would be an hour."""
    drained = drain(Refilling(600_000, has_headers=False), 1000, latency=30)
    assert drained.seconds < 200


# --- before a call -------------------------------------------------------------------------------


def test_the_first_call_finds_out_and_the_next_are_a_window() -> None:
    pace = Pace()
    assert free(pace, 0) == 1
    mark = pace.begin([Charge()], now=0.0)
    assert free(pace, 0.5, in_flight=1) == 0
    pace.learn(Reading(), now=1.0, began=0.0, mark=mark, in_flight=0)
    assert free(pace, 1.0) >= 1
    assert free(pace, 1.0, in_flight=int(FIRST_WINDOW)) == 0


def test_a_first_call_that_takes_long_holds_up_nobody() -> None:
    pace = Pace()
    pace.begin([Charge()], now=0.0)
    assert pace.next_at(Charge(), now=0.1) == SETTLED
    assert free(pace, SETTLED, in_flight=1, settled=1) == 1


def test_calls_that_were_let_in_take_no_place_in_the_window() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    window = int(pace.window)
    assert free(pace, 1.0, in_flight=window) == 0
    assert free(pace, 1.0, in_flight=window, settled=2) > 0


def test_groups_are_spaced_so_that_a_refusal_is_known_in_time() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    pace.begin([Charge()], now=1.0)
    assert free(pace, 1.0 + SPACING / 2, in_flight=1) == 0
    assert free(pace, 1.0 + SPACING, in_flight=1) > 0
    # With nothing in flight there is nothing to wait for.
    assert free(pace, 1.0 + SPACING / 2) > 0


def test_what_is_left_is_held_by_requests_and_by_tokens() -> None:
    pace = Pace()
    let_in(
        pace, 0.0,
        x_ratelimit_limit_requests="600", x_ratelimit_remaining_requests="599",
        x_ratelimit_reset_requests="100ms",
        x_ratelimit_limit_tokens="60000", x_ratelimit_remaining_tokens="1000",
        x_ratelimit_reset_tokens="59s",
    )  # fmt: skip
    # A quarter of a second's worth of tokens is left for what arrives unevenly.
    assert free(pace, 0.0) == 3
    pace.begin([Charge(100, 100)] * 3, now=0.0)
    assert free(pace, 0.0) == 0
    # 49 tokens at 1,000 a second, a hundredth slower.
    assert pace.next_at(Charge(100, 100), now=0.0) == pytest.approx(0.05, rel=0.05)
    assert free(pace, 0.06) == 1


def test_a_call_over_the_limit_goes_alone_once_the_bucket_is_full() -> None:
    """It can never fit, and it is the provider who says so."""
    pace = Pace()
    let_in(
        pace, 0.0,
        x_ratelimit_limit_tokens="1000", x_ratelimit_remaining_tokens="900",
        x_ratelimit_reset_tokens="6s",
    )  # fmt: skip
    big = [Charge(5000)]
    assert pace.fitting(big, now=0.0, **NONE_IN_FLIGHT) == 0
    at = pace.next_at(big[0], now=0.0)
    assert 5 < at < 8
    assert pace.fitting(big, now=at, **NONE_IN_FLIGHT) == 1


def test_the_sites_own_bounds_hold_whatever_is_learnt() -> None:
    pace = Pace()
    let_in(pace, 0.0, x_ratelimit_limit_requests="6000", x_ratelimit_remaining_requests="5999",
           x_ratelimit_reset_requests="10ms")  # fmt: skip
    pace.cap(Caps(requests_per_minute=300, concurrency=3), now=0.0)
    assert free(pace, 0.0) == 3
    pace.begin([Charge()] * 4, now=0.0)
    assert free(pace, 0.01) == 0
    assert free(pace, 0.3) == 2
    assert free(pace, 9.0, in_flight=3) == 0
    pace.cap(Caps(), now=9.0)
    assert free(pace, 9.0) > 2


# --- after an answer -----------------------------------------------------------------------------


def test_a_refusal_blocks_all_until_it_says_and_then_one_finds_out() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    answered(pace, 429, 1.0, retry_after="20")
    assert free(pace, 20.9) == 0
    at = pace.next_at(Charge(), now=1.0)
    assert 21.0 < at < 22.1
    assert free(pace, at) == 1
    pace.begin([Charge()], now=at)
    assert free(pace, at + 0.1, in_flight=1) == 0


def test_refusals_in_a_row_lengthen_the_wait_and_a_success_forgets_them() -> None:
    pace, now, waits = Pace(), 0.0, []
    for _ in range(4):
        answered(pace, 429, now, retry_after="10")
        waits.append(pace.blocked_until - now)
        now = pace.blocked_until
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(10.02)
    assert waits[3] == pytest.approx(10.02 + 10 * (1.5**3 - 1))
    let_in(pace, now)
    answered(pace, 429, now, retry_after="10")
    assert pace.blocked_until - now == pytest.approx(10.02)


def test_refusals_of_one_wave_are_one() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    mark = pace.begin([Charge()] * 5, now=1.0)
    for _ in range(5):
        reading = read(429, {"retry-after": "2"}, b"", now=1.1)
        pace.learn(reading, now=1.1, began=1.0, mark=mark, in_flight=0, jitter=no_jitter)
    assert pace.strikes == 1
    assert pace.blocked_until == pytest.approx(3.12)


def test_a_later_refusal_of_a_wave_may_only_lengthen_the_wait() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    mark = pace.begin([Charge()] * 2, now=1.0)
    for wait in ("9", "1"):
        reading = read(429, {"retry-after": wait}, b"", now=1.1)
        pace.learn(reading, now=1.1, began=1.0, mark=mark, in_flight=0, jitter=no_jitter)
    assert pace.blocked_until == pytest.approx(10.12)


def test_a_full_reset_is_not_waited_for_where_the_wait_is_named() -> None:
    """What aimock answers: a second to wait, both used up, six minutes until all is full."""
    pace = Pace()
    let_in(pace, 0.0, x_ratelimit_limit_tokens="1000", x_ratelimit_remaining_tokens="1",
           x_ratelimit_reset_tokens="6m0s")  # fmt: skip
    answered(
        pace, 429, 1.0, retry_after="1", x_ratelimit_remaining_requests="0",
        x_ratelimit_remaining_tokens="0", x_ratelimit_reset_tokens="6m0s",
    )  # fmt: skip
    assert free(pace, 2.2) == 1


def test_a_day_without_a_named_end_is_asked_about_ever_less_often() -> None:
    pace, now, waits = Pace(), 0.0, []
    for _ in range(9):
        answered(pace, 429, now, body=b'{"error": {"message": "quota per day exceeded"}}')
        waits.append(pace.blocked_until - now)
        now = pace.blocked_until
    assert waits[0] >= 60
    assert waits[-1] == pytest.approx(3600, rel=0.01)


def test_an_overload_halves_what_is_in_flight_and_every_success_adds_one() -> None:
    pace = Pace()
    let_in(pace, 0.0, x_ratelimit_limit_requests="60000", x_ratelimit_remaining_requests="59999",
           x_ratelimit_reset_requests="1ms")  # fmt: skip
    mark = pace.begin([Charge()], now=1.0)
    pace.learn(
        read(503, {}, b"", now=1.0), now=1.0, began=1.0, mark=mark, in_flight=39, jitter=no_jitter
    )
    assert pace.window == 20
    now = pace.blocked_until
    for number in range(5):
        let_in(pace, now + number)
    assert pace.window == 25
    for number in range(30):
        let_in(pace, now + 5 + number)
    assert not pace.is_overloaded


def test_a_single_fault_stops_nobody_and_three_in_a_row_do() -> None:
    pace = Pace()
    let_in(pace, 0.0)
    answered(pace, 500, 1.0)
    answered(pace, -1, 1.0)
    assert free(pace, 1.0) > 0
    answered(pace, 502, 1.0)
    assert free(pace, 1.0) == 0


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_who_refuses_a_request_for_itself_has_let_it_in(status: int) -> None:
    pace = Pace()
    answered(pace, status, 0.0)
    assert not pace.is_probing
    assert free(pace, 0.1) > 0


def test_what_others_use_of_the_same_key_is_seen() -> None:
    pace = Pace()
    header = {"x_ratelimit_limit_requests": "600", "x_ratelimit_reset_requests": "1s"}
    let_in(pace, 0.0, x_ratelimit_remaining_requests="590", **header)
    assert pace.buckets["requests"].level == pytest.approx(590)
    let_in(pace, 0.1, x_ratelimit_remaining_requests="100", **header)
    assert pace.buckets["requests"].level == pytest.approx(100)


def test_what_an_old_answer_says_is_less_what_was_sent_since() -> None:
    pace = Pace()
    let_in(pace, 0.0, x_ratelimit_limit_requests="600", x_ratelimit_remaining_requests="599",
           x_ratelimit_reset_requests="100ms")  # fmt: skip
    slow = pace.begin([Charge()], now=1.0)
    for number in range(50):
        pace.begin([Charge()] * 10, now=1.0 + number / 1000)
    told = {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "598",
        "x-ratelimit-reset-requests": "200ms",
    }
    pace.learn(read(200, told, b"", now=2.0), now=2.0, began=1.0, mark=slow, in_flight=0)
    assert 97 <= pace.buckets["requests"].level <= 110


def test_a_measured_rate_is_what_was_let_in_between_two_refusals() -> None:
    measured = Measured(since=0.0, sent=100)
    measured.refused(10.0, 151)
    assert measured.rate == pytest.approx(50 / 10 * 0.95)
    measured.correct()
    assert measured.rate == pytest.approx(49 / 10 * 0.95)


@pytest.mark.parametrize(
    ("dimension", "counted"),
    [
        ("requests", "requests"),
        ("requests_day", "requests"),
        ("tokens", "tokens"),
        ("project_tokens", "tokens"),
        ("input_tokens", "input_tokens"),
        ("tokens_cache_adjusted_prompt", "input_tokens"),
        ("output_tokens", "output_tokens"),
        ("query_cost", "tokens"),
        ("whatever", "requests"),
    ],
)
def test_a_limits_name_says_what_counts(dimension: str, counted: str) -> None:
    assert counted_as(dimension) == counted


# --- kept in a row -------------------------------------------------------------------------------


def test_it_survives_its_row() -> None:
    drained = drain(Refilling(600, 240_000, has_headers=False), 650)
    pace = drained.pace
    assert pace.measured is not None
    assert Pace.from_json(json.loads(json.dumps(pace.to_json()))) == pace
    let_in(pace, 100.0, x_ratelimit_limit_requests="600", x_ratelimit_remaining_requests="9")
    assert Pace.from_json(json.loads(json.dumps(pace.to_json()))) == pace
    assert Pace.from_json({}) == Pace()


def test_a_bucket_never_holds_more_than_its_limit() -> None:
    bucket = Bucket(limit=10, level=9, at=0.0, period=60)
    bucket.refill(1e9)
    assert bucket.level == 10
    bucket.refill(0.0)
    assert bucket.at == 1e9


events = st.lists(
    st.tuples(
        st.sampled_from([200, 200, 200, 400, 402, 429, 429, 500, 503, -1]),
        st.floats(0, 100),
        st.fixed_dictionaries(
            {},
            optional={
                "retry-after": st.sampled_from(["0", "1", "20", "1e9", "x", "-1"]),
                "x-ratelimit-limit-requests": st.sampled_from(["-1", "0", "1", "60", "1e99"]),
                "x-ratelimit-remaining-requests": st.sampled_from(["0", "1", "59", "1000", "-3"]),
                "x-ratelimit-reset-requests": st.sampled_from(["0s", "1s", "6m0s", "59.9", "z"]),
                "x-ratelimit-remaining-tokens": st.sampled_from(["0", "10000"]),
                "x-ratelimit-limit-tokens": st.sampled_from(["1", "10000"]),
                "x-ratelimit-over-limit": st.just("yes"),
            },
        ),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(events)
def test_whatever_is_answered_somebody_goes_in_the_end(
    answers: list[tuple[int, float, dict[str, str]]],
) -> None:
    pace, now = Pace(), 0.0
    for status, passed, headers in answers:
        now += passed
        mark = pace.begin([Charge(10, 10)], now=now)
        pace.learn(read(status, headers, b"", now=now), now=now, began=now, mark=mark, in_flight=0)
        pace = Pace.from_json(json.loads(json.dumps(pace.to_json(), allow_nan=False)))
        assert pace.window >= 1
    for _ in range(200):
        if pace.fitting([Charge(10, 10)], now=now, **NONE_IN_FLIGHT):
            break
        at = pace.next_at(Charge(10, 10), now=now)
        assert math.isfinite(at)
        assert now < at < now + 8 * 86_400
        now = at
    else:
        pytest.fail("nobody may ever go again")


def test_a_quiet_night_makes_no_measured_rate_endless() -> None:
    pace = drain(Refilling(600, has_headers=False), 900).pace
    assert pace.measured is not None
    quiet = pace.measured.since + 10 * 3600
    assert free(pace, quiet) <= 2 * FIRST_WINDOW
    assert pace.measured is None


def test_one_call_over_all_limits_shuts_nobody_out_for_long() -> None:
    pace = Pace()
    told = {"x-ratelimit-limit-tokens": "10000", "x-ratelimit-remaining-tokens": "9000",
            "x-ratelimit-reset-tokens": "6s"}  # fmt: skip
    mark = pace.begin([Charge(10)], now=0.0)
    pace.begin([Charge(10, 2**31 - 1)], now=3.0)
    pace.learn(read(200, told, b"", now=4.0), now=4.0, began=0.0, mark=mark, in_flight=1)
    assert pace.next_at(Charge(10), now=4.0) < 4.0 + 120


def test_the_sites_own_tokens_hold_for_calls_of_more_than_a_seconds_worth() -> None:
    pace, now, spent = Pace(), 0.0, 0.0
    let_in(pace, 0.0)
    pace.cap(Caps(tokens_per_minute=60_000), now=0.0)
    while now < 600:
        if pace.fitting([Charge(4000)], now=now, **NONE_IN_FLIGHT):
            pace.begin([Charge(4000)], now=now)
            spent += 4000
        now += 0.1
    assert spent <= 1.02 * 600_000


def test_what_another_version_kept_is_passed_over() -> None:
    assert Pace.from_json({**Pace().to_json(), "of_tomorrow": 1}) == Pace()
