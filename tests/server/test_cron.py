"""When it is time, in every zone and on the days on which clocks are put forward and back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_qstash_llm.qstash import InvalidOption
from django_qstash_llm.server.cron import Cron

MINUTE = timedelta(minutes=1)


def times(text: str, after: datetime) -> Iterator[datetime]:
    cron = Cron.parse(text)
    while True:
        after = cron.next_after(after)
        yield after


def firsts(text: str, after: str, count: int = 3) -> list[str]:
    """The first moments, as a clock in the expression's zone shows them."""
    zone = Cron.parse(text).zone
    moments = islice(times(text, datetime.fromisoformat(after)), count)
    return [moment.astimezone(zone).isoformat(" ", "minutes") for moment in moments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* * * * *", ["2026-11-23 06:21", "2026-11-23 06:22", "2026-11-23 06:23"]),
        ("*/10 * * * * ", ["2026-11-23 06:30", "2026-11-23 06:40", "2026-11-23 06:50"]),
        ("5/20 * * * *", ["2026-11-23 06:25", "2026-11-23 06:45", "2026-11-23 07:05"]),
        ("0,30 8-9 * * *", ["2026-11-23 08:00", "2026-11-23 08:30", "2026-11-23 09:00"]),
        ("0 1-23/8 * * *", ["2026-11-23 09:00", "2026-11-23 17:00", "2026-11-24 01:00"]),
        ("1 1 1 1 1", ["2027-01-01 01:01", "2027-01-04 01:01", "2027-01-11 01:01"]),
        ("0 0 1 Feb,AUG *", ["2027-02-01 00:00", "2027-08-01 00:00", "2028-02-01 00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00", "2036-02-29 00:00"]),
        ("0 0 31 * *", ["2026-12-31 00:00", "2027-01-31 00:00", "2027-03-31 00:00"]),
        ("0 0 * * sun", ["2026-11-29 00:00", "2026-12-06 00:00", "2026-12-13 00:00"]),
        ("0 0 * * 7", ["2026-11-29 00:00", "2026-12-06 00:00", "2026-12-13 00:00"]),
        ("0 0 * * Sat-Sun", ["2026-11-28 00:00", "2026-11-29 00:00", "2026-12-05 00:00"]),
        ("0 0 * * mon-wed/2", ["2026-11-25 00:00", "2026-11-30 00:00", "2026-12-02 00:00"]),
        ("0 0 30 2 fri", ["2027-02-05 00:00", "2027-02-12 00:00", "2027-02-19 00:00"]),
        ("@hourly", ["2026-11-23 07:00", "2026-11-23 08:00", "2026-11-23 09:00"]),
        ("@daily", ["2026-11-24 00:00", "2026-11-25 00:00", "2026-11-26 00:00"]),
        ("@weekly", ["2026-11-29 00:00", "2026-12-06 00:00", "2026-12-13 00:00"]),
        ("@monthly", ["2026-12-01 00:00", "2027-01-01 00:00", "2027-02-01 00:00"]),
        ("@yearly", ["2027-01-01 00:00", "2028-01-01 00:00", "2029-01-01 00:00"]),
    ],
)
def test_the_fields_mean_what_cron_says(text: str, expected: list[str]) -> None:
    found = firsts(text, "2026-11-23T06:20:30.5+00:00")
    assert found == [f"{moment}+00:00" for moment in expected]


def test_a_moment_that_fits_is_not_after_itself() -> None:
    assert firsts("0 8 * * *", "2026-11-23T08:00:00+00:00", 1) == ["2026-11-24 08:00+00:00"]


def test_two_restricted_days_mean_either_of_them() -> None:
    assert firsts("0 0 13 * fri", "2026-11-08T00:00:00+00:00") == [
        "2026-11-13 00:00+00:00",
        "2026-11-20 00:00+00:00",
        "2026-11-27 00:00+00:00",
    ]


def test_a_day_with_a_star_restricts_the_other_one() -> None:
    """Every other day of the month, if it is a Monday."""
    assert firsts("0 0 */2 * mon", "2026-11-01T00:00:00+00:00") == [
        "2026-11-09 00:00+00:00",
        "2026-11-23 00:00+00:00",
        "2026-12-07 00:00+00:00",
    ]


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        # Clocks are put forward from 02:00 to 03:00.
        (
            "CRON_TZ=Europe/Berlin 30 2 * * *",
            "2026-03-28T00:00:00+00:00",
            ["2026-03-28 02:30+01:00", "2026-03-29 03:00+02:00", "2026-03-30 02:30+02:00"],
        ),
        (
            "CRON_TZ=Europe/Berlin */20 2-3 * * *",
            "2026-03-28T23:00:00+00:00",
            ["2026-03-29 03:00+02:00", "2026-03-29 03:20+02:00", "2026-03-29 03:40+02:00"],
        ),
        (
            "CRON_TZ=Europe/Berlin 30 * * * *",
            "2026-03-29T00:00:00+00:00",
            ["2026-03-29 01:30+01:00", "2026-03-29 03:30+02:00", "2026-03-29 04:30+02:00"],
        ),
        # And back, from 03:00 to 02:00.
        (
            "CRON_TZ=Europe/Berlin 30 2 * * *",
            "2026-10-24T10:00:00+00:00",
            ["2026-10-25 02:30+02:00", "2026-10-26 02:30+01:00", "2026-10-27 02:30+01:00"],
        ),
        (
            "CRON_TZ=Europe/Berlin 30 * * * *",
            "2026-10-25T00:00:00+00:00",
            ["2026-10-25 02:30+02:00", "2026-10-25 02:30+01:00", "2026-10-25 03:30+01:00"],
        ),
        # At midnight.
        (
            "CRON_TZ=America/Havana 0 0 * * *",
            "2026-03-07T12:00:00+00:00",
            ["2026-03-08 01:00-04:00", "2026-03-09 00:00-04:00", "2026-03-10 00:00-04:00"],
        ),
        # By half an hour.
        (
            "CRON_TZ=Australia/Lord_Howe 15 2 * * *",
            "2026-10-03T00:00:00+00:00",
            ["2026-10-04 02:30+11:00", "2026-10-05 02:15+11:00", "2026-10-06 02:15+11:00"],
        ),
        # A whole day was left out.
        (
            "CRON_TZ=Pacific/Apia 0 12 * * *",
            "2011-12-29T00:00:00+00:00",
            ["2011-12-29 12:00-10:00", "2011-12-31 00:00+14:00", "2011-12-31 12:00+14:00"],
        ),
    ],
)
def test_clocks_are_put_forward_and_back(text: str, after: str, expected: list[str]) -> None:
    assert firsts(text, after) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 fields, not 5"),
        ("* * * *", "4 fields, not 5"),
        ("*/5 * * * * *", "one minute is the finest resolution"),
        ("99 * * * *", 'minute "99" is not from 0 to 59'),
        ("* 24 * * *", 'hour "24" is not from 0 to 23'),
        ("0 0 0 * *", 'day of the month "0" is not from 1 to 31'),
        ("0 0 * 13 *", 'month "13" is not from 1 to 12'),
        ("0 0 * * 8", 'day of the week "8" is not from 0 to 7'),
        ("0 0 * * 1-9", 'day of the week "1-9" is not from 0 to 7'),
        ("5-1 * * * *", 'minute "5-1" ends before it begins'),
        ("*/0 * * * *", 'minute "*/0" has a step of 0'),
        ("1,,2 * * * *", 'minute "" is not a number'),
        ("mon * * * *", 'minute "mon" is not a number'),
        ("0 0 * monday *", 'month "monday" is not a number'),
        ("-5 * * * *", 'minute "-5" is not a number'),
        ("*/2-3 * * * *", 'minute "*/2-3" is not a number'),
        ("١ * * * *", "is not a number"),
        ("0 0 30 2 *", "no month it names has 30 days"),
        ("0 0 31 4,jun *", "no month it names has 31 days"),
        ("@every 5m", '"@every 5m" is not one of @yearly'),
        ("@reboot", '"@reboot" is not one of @yearly'),
        ("CRON_TZ=Mars/Olympus * * * * *", 'unknown time zone "Mars/Olympus"'),
        ("CRON_TZ=America * * * * *", 'unknown time zone "America"'),
        ("CRON_TZ=../../etc/passwd * * * * *", "unknown time zone"),
        ("CRON_TZ=/etc/localtime * * * * *", "unknown time zone"),
        ("CRON_TZ= * * * * *", "unknown time zone"),
        ("CRON_TZ=Europe/Berlin", "0 fields, not 5"),
        ("1," * 1000 + "1 * * * *", "longer than"),
    ],
)
def test_what_is_no_cron_is_refused_with_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        Cron.parse(text)
    assert problem in str(refused.value)
    assert refused.value.wire_text.startswith("invalid Upstash-Cron header: ")


# --- against a naive one -----------------------------------------------------------------------


def naive_fits(field: str, value: int, least: int, most: int) -> bool:
    for part in field.split(","):
        span, _, step = part.partition("/")
        low, _, high = (str(least) + "-" + str(most) if span == "*" else span).partition("-")
        top = int(high) if high else (most if step else int(low))
        if value in range(int(low), top + 1, int(step or 1)):
            return True
    return False


def naive_shows(fields: list[str], wall: datetime) -> bool:
    """Whether it is time when a clock shows this."""
    minute, hour, day, month, weekday = fields
    is_day = naive_fits(day, wall.day, 1, 31)
    is_weekday = naive_fits(weekday, wall.isoweekday() % 7, 0, 7) or (
        wall.isoweekday() == 7 and naive_fits(weekday, 7, 0, 7)
    )
    either = not day.startswith("*") and not weekday.startswith("*")
    return (
        naive_fits(minute, wall.minute, 0, 59)
        and naive_fits(hour, wall.hour, 0, 23)
        and naive_fits(month, wall.month, 1, 12)
        and (is_day or is_weekday if either else is_day and is_weekday)
    )


def naive_times(
    fields: list[str], zone: ZoneInfo, after: datetime, until: datetime
) -> list[datetime]:
    """Every minute is looked at, with what the clock shows then and what it has skipped before."""
    found = []
    moment = after.replace(second=0, microsecond=0)
    last = moment.astimezone(zone).replace(tzinfo=None)
    follows_the_hours = fields[1].startswith("*")
    while (moment := moment + MINUTE) <= until:
        local = moment.astimezone(zone)
        wall = local.replace(tzinfo=None)
        shown = [] if local.fold and not follows_the_hours else [wall]
        if wall > last + MINUTE and not follows_the_hours:
            shown += [last + MINUTE * n for n in range(1, (wall - last) // MINUTE)]
        if any(naive_shows(fields, each) for each in shown):
            found.append(moment)
        last = wall
    return found


def parts(least: int, most: int) -> st.SearchStrategy[str]:
    numbers = st.integers(least, most)
    spans = st.tuples(numbers, numbers).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")
    steps = st.integers(1, most)
    return st.one_of(
        st.just("*"),
        numbers.map(str),
        spans,
        steps.map(lambda step: f"*/{step}"),
        st.tuples(spans, steps).map(lambda pair: f"{pair[0]}/{pair[1]}"),
        st.tuples(numbers, steps).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    )


def fields_of(least: int, most: int) -> st.SearchStrategy[str]:
    return st.lists(parts(least, most), min_size=1, max_size=3).map(",".join)


crons = st.tuples(
    fields_of(0, 59),
    # Around the hours at which clocks are changed, mostly.
    fields_of(0, 23) | st.sampled_from(["*", "0", "1", "2", "3", "0-4", "*/2"]),
    fields_of(1, 31) | st.just("*"),
    st.just("*"),
    fields_of(0, 7) | st.just("*"),
).map(list)
# A few hours before a clock is put forward or back, or anything at all.
starts = st.one_of(
    st.tuples(
        st.sampled_from(
            [
                ("Europe/Berlin", "2026-03-29T01:00"),
                ("Europe/Berlin", "2026-10-25T01:00"),
                ("America/New_York", "2026-03-08T07:00"),
                ("America/New_York", "2026-11-01T06:00"),
                ("Australia/Lord_Howe", "2026-10-03T15:30"),
                ("Australia/Lord_Howe", "2026-04-04T15:00"),
                ("America/Havana", "2026-03-08T05:00"),
                ("America/Havana", "2026-11-01T05:00"),
                ("America/Sao_Paulo", "2018-02-18T02:00"),
                ("America/St_Johns", "2010-11-07T02:31"),
                ("Pacific/Apia", "2011-12-30T10:00"),
                ("Africa/Casablanca", "2026-02-15T02:00"),
            ]
        ),
        st.integers(-4 * 3600, 4 * 3600),
    ).map(
        lambda pair: (
            pair[0][0],
            datetime.fromisoformat(f"{pair[0][1]}:00+00:00") + timedelta(seconds=pair[1]),
        )
    ),
    st.tuples(
        st.sampled_from(["UTC", "Asia/Kathmandu", "Europe/London", "Asia/Tokyo"]),
        st.datetimes(datetime(2000, 1, 1), datetime(2035, 1, 1)).map(
            lambda it: it.replace(tzinfo=UTC)
        ),
    ),
)


@settings(max_examples=300, deadline=None, database=None)
@given(fields=crons, start=starts)
@example(
    fields=["0", "*", "*", "*", "*"],
    start=("Europe/Berlin", datetime(2026, 10, 25, 0, 59, 59, tzinfo=UTC)),
)
def test_every_moment_is_one_that_looking_at_each_minute_finds(
    fields: list[str], start: tuple[str, datetime]
) -> None:
    zone, after = start
    until = after + timedelta(hours=26)
    found = times(f"CRON_TZ={zone} {' '.join(fields)}", after)
    expected = naive_times(fields, ZoneInfo(zone), after, until)
    assert list(islice(found, len(expected))) == expected
    assert next(found) > until
