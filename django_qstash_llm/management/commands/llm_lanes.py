from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import router
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from ...exceptions import ConfigurationError, IllegalState, InvalidRequest
from ...health import MOST_COUNTED, capped
from ...models import Lane, LLMRequest
from ...models.lane import SCOPE
from ...qstash import InvalidOption
from ...qstash.durations import parse_duration


class Command(BaseCommand):
    help = (
        "Shows lanes, and pauses or resumes one: all requests of a provider, a model, a tenant or a "
        "queue, or of several of these together. Nothing of it is lost: what is pending waits, and "
        "QStash is told to hold what it has."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("verb", nargs="?", default="list", choices=("list", "pause", "resume"))
        for name in SCOPE:
            parser.add_argument(f"--{name}", default="")
        parser.add_argument("--reason", default="", help="Why it is paused.")
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--until", help="When it goes on by itself, as in 2026-12-01T08:00+01:00.")
        end.add_argument("--for", dest="span", help="How long it is paused, as in 90s or 1h30m.")
        parser.add_argument("--by", default="llm_lanes", help="Who pauses or resumes it.")
        parser.add_argument(
            "--database",
            default=router.db_for_write(LLMRequest),
            help="Alias of the database to look into.",
        )

    def handle(self, *args: Any, verb: str, database: str, **options: Any) -> None:
        scope = {name: options[name] for name in SCOPE if options[name]}
        lanes = Lane.objects.using(database)
        if verb == "list":
            for lane in lanes.filter(**scope).order_by(*SCOPE):
                self.stdout.write(_line(lane))
            return
        try:
            if verb == "pause":
                until = _moment(options["until"], options["span"])
                lanes.named(**scope).pause(by=options["by"], reason=options["reason"], until=until)
            else:
                self.resume(lanes, scope, by=options["by"])
        except InvalidRequest as error:
            raise CommandError(f"--{error.field}: {error.problem}") from error
        except (IllegalState, ConfigurationError) as error:
            raise CommandError(str(error)) from error
        for lane in lanes.filter(**(dict.fromkeys(SCOPE, "") | scope)):
            self.stdout.write(_line(lane))

    def resume(self, lanes: Any, scope: dict[str, str], *, by: str) -> None:
        lane = lanes.filter(**(dict.fromkeys(SCOPE, "") | scope)).first()
        if lane is None:
            named = " ".join(f"--{name} {value}" for name, value in scope.items())
            raise CommandError(
                f"There is no lane {named or 'without a name'}; llm_lanes lists them."
            )
        lane.resume(by=by)


def _moment(until: str | None, span: str | None) -> datetime | None:
    if span is not None:
        try:
            return timezone.now() + timedelta(seconds=parse_duration(span))
        except (InvalidOption, OverflowError) as error:
            raise CommandError(f"--for {span}: give a duration such as 90s or 1h30m.") from error
    if until is None:
        return None
    try:
        moment = parse_datetime(until)
    except ValueError:
        moment = None
    if moment is None:
        raise CommandError(f"--until {until}: give a moment such as 2026-12-01T08:00+01:00.")
    if settings.USE_TZ and timezone.is_naive(moment):
        return timezone.make_aware(moment)
    return moment


def _line(lane: Lane) -> str:
    parts = [str(lane) + ":"]
    if lane.is_paused:
        waiting = capped(lane.waiting()[: MOST_COUNTED + 1].count())
        parts = [lane.pause_in_words, lane.remedy, f"{waiting} wait."]
    else:
        parts.append("open.")
    if lane.is_held is None:
        parts.append(lane.tell_problem or "QStash is being told.")
    if lane.learned_limit:
        parts.append(f"Learned: {lane.learned_limit} requests in {lane.learned_period} s.")
    return " ".join(filter(None, parts))
