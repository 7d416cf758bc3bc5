"""When a schedule runs: ``CRON_TZ=Europe/Berlin 30 8 * * mon-fri``.

Five fields as cron has them, or a macro. Clocks are put forward and back: a time of day that is
skipped is made up for at the first moment after the gap, and one that comes twice counts once.
What runs in every hour follows the hours as they pass instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from zoneinfo import ZoneInfo

from celery.schedules import crontab_parser

from ..qstash import InvalidOption

HEADER = "Upstash-Cron"

_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_LONGEST_TEXT = 1000
_PART = re.compile(r"(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """A cron expression, read."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    """Of the month."""
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""
    takes_either_day: bool = False
    """The day of the month and the weekday are both restricted: one of them is enough."""
    is_hourly: bool = False
    """The hours are not named, so it follows those that pass, and not the clock on the wall."""
    zone: tzinfo = UTC

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Raises ``InvalidOption`` with what is wrong with it."""
        if len(text) > _LONGEST_TEXT:
            raise _invalid(f"longer than {_LONGEST_TEXT} characters")
        fields = text.split()
        zone: tzinfo = UTC
        if fields and fields[0].startswith("CRON_TZ="):
            zone = _zone(fields.pop(0).removeprefix("CRON_TZ="))
        if fields and fields[0].startswith("@"):
            fields = _macro(" ".join(fields)).split()
        if len(fields) != 5:
            raise _invalid(
                f"{len(fields)} fields, not 5: minute, hour, day of the month, month, day of the "
                "week; one minute is the finest resolution"
            )
        minute, hour, day, month, weekday = map(str.lower, fields)
        cron = cls(
            minutes=tuple(sorted(_expanded(minute, "minute", 0, 59))),
            hours=tuple(sorted(_expanded(hour, "hour", 0, 23))),
            days=frozenset(_expanded(day, "day of the month", 1, 31)),
            months=frozenset(_expanded(_numbered(month, _MONTHS, 1), "month", 1, 12)),
            weekdays=_weekdays(weekday),
            takes_either_day=not day.startswith("*") and not weekday.startswith("*"),
            is_hourly=hour.startswith("*"),
            zone=zone,
        )
        cron._refuse_what_never_comes()
        return cron

    def _refuse_what_never_comes(self) -> None:
        longest = max(_LONGEST_MONTHS[month - 1] for month in self.months)
        if not self.takes_either_day and min(self.days) > longest:
            raise _invalid(f"no month it names has {min(self.days)} days")

    # --- when --------------------------------------------------------------------------------

    def next_after(self, moment: datetime) -> datetime:
        """The first moment after this one at which it is time."""
        local = moment.astimezone(self.zone)
        # While the clock shows again what it has shown, or is about to, times that lie behind on
        # the wall lie ahead.
        start = local.replace(tzinfo=None) - _repeated(local)
        if not self.is_hourly:
            return self._first(start, moment, fold=0)
        return min(self._first(start, moment, fold=fold) for fold in (0, 1))

    def _first(self, start: datetime, moment: datetime, *, fold: int) -> datetime:
        """``fold`` is which of the two, where the clock shows a time twice."""
        for wall in self._times(start):
            found = wall.replace(tzinfo=self.zone, fold=fold).astimezone(UTC)
            if found.astimezone(self.zone).replace(tzinfo=None) != wall:
                if self.is_hourly:
                    continue
                found = _end_of_gap(wall, self.zone)
            if found > moment:
                return found
        raise AssertionError("unreachable: every date comes again")

    def _times(self, start: datetime) -> Iterator[datetime]:
        """What a clock on the wall shows when it is time, beginning with the minute of ``start``."""
        start = start.replace(second=0, microsecond=0)
        day = start.date()
        while True:
            if self._is_day(day):
                for hour in self.hours:
                    if day == start.date() and hour < start.hour:
                        continue
                    for minute in self.minutes:
                        wall = datetime.combine(day, time(hour, minute))
                        if wall >= start:
                            yield wall
            day += timedelta(days=1)

    def _is_day(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        is_day, is_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return is_day or is_weekday if self.takes_either_day else is_day and is_weekday


# --- the clock -------------------------------------------------------------------------------


def _repeated(local: datetime) -> timedelta:
    """How long the clock shows again what it has shown, if this is such a time."""
    offsets = (local.replace(fold=fold).utcoffset() or timedelta() for fold in (0, 1))
    return max(next(offsets) - next(offsets), timedelta())


def _end_of_gap(wall: datetime, zone: tzinfo) -> datetime:
    """The first moment after the gap in which this time of day was skipped."""
    # Before and after the clock is put forward, to the second.
    before = round(wall.replace(tzinfo=zone, fold=1).timestamp())
    after = round(wall.replace(tzinfo=zone, fold=0).timestamp())
    offset = datetime.fromtimestamp(before, zone).utcoffset()
    while after - before > 1:
        middle = (before + after) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return datetime.fromtimestamp(after, UTC)


# --- reading ---------------------------------------------------------------------------------


def _invalid(problem: str) -> InvalidOption:
    return InvalidOption(HEADER, problem)


def _zone(name: str) -> ZoneInfo:
    try:
        if _ZONE.fullmatch(name):
            return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:
        raise _invalid(f'unknown time zone "{name}"') from error
    raise _invalid(f'unknown time zone "{name}"')


def _macro(text: str) -> str:
    if text.lower() not in _MACROS:
        raise _invalid(f'"{text}" is not one of {", ".join(_MACROS)}')
    return _MACROS[text.lower()]


def _numbered(field: str, names: tuple[str, ...], first: int) -> str:
    """``mon-fri`` is ``1-5``."""
    numbers = {name: str(number) for number, name in enumerate(names, first)}
    return re.sub(r"[a-z]+", lambda match: numbers.get(match[0], match[0]), field)


def _weekdays(field: str) -> frozenset[int]:
    # Sunday ends a week as well as it begins one.
    field = _numbered(re.sub(r"-sun\b", "-7", field), _DAYS, 0)
    return frozenset(day % 7 for day in _expanded(field, "day of the week", 0, 7))


def _expanded(field: str, name: str, least: int, most: int) -> set[int]:
    """The numbers that a field stands for."""
    parser = crontab_parser(most - least + 1, least)
    numbers: set[int] = set()
    for part in field.split(","):
        # Celery's parser takes more than cron's: names everywhere, and ranges that wrap around.
        if not (match := _PART.fullmatch(part)):
            raise _invalid(
                f'{name} "{part}" is not a number, a range, * or one of them with a /step'
            )
        low, high, step = match.groups()
        if high and int(high) < int(low):
            raise _invalid(f'{name} "{part}" ends before it begins')
        if step and not int(step):
            raise _invalid(f'{name} "{part}" has a step of 0')
        if step and low and not high:
            # 5/15 is from 5 on.
            part = f"{low}-{most}/{step}"
        try:
            numbers |= parser.parse(part)
        except ValueError as error:
            raise _invalid(f'{name} "{part}" is not from {least} to {most}') from error
    return numbers
