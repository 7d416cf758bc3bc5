from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from django.db import IntegrityError, models, transaction
from django.db.models import Q
from django.db.models.functions import Length

from ...qstash import InvalidOption, Options
from ...qstash import Message as WireMessage
from ...qstash.options import DEFAULT_RETRIES
from ...qstash.records import Schedule as ScheduleRecord
from .. import admission, doorbell, redaction
from ..cron import Cron
from ..exceptions import Refusal
from .chunks import within
from .message import Admitted, Message
from .queue import milliseconds
from .url_group import UrlGroup, admit

MOST_SCHEDULES = 10_000
"""Of one account."""
MOST_BYTES_LISTED = 16 * 1024 * 1024
"""Of bodies in one listing, and what is over this of the last of them."""
MOST_AT_A_TIME = 100
"""Schedules that are fired in one go: the engine delivers nothing meanwhile."""

# What the same id overwrites.
_SETTINGS = ("cron", "destination", "headers", "secrets", "body", "queue_name", "caller_ip")


class ScheduleQuerySet(models.QuerySet["Schedule"]):
    def owned_by(self, account: str) -> ScheduleQuerySet:
        return self.filter(account=account)

    def listed(self) -> list[Schedule]:
        """All of them, with the bodies of the first ones, as many as there is room for in one
        answer: a listing has no pages. The others' are told one by one."""
        sized = self.defer("body").annotate(body_size=Length("body"))  # type: ignore[no-redef]
        schedules = list(sized)
        told = within(schedules, MOST_BYTES_LISTED, size=lambda schedule: schedule.body_size)
        bodies = dict(self.filter(pk__in=[each.pk for each in told]).values_list("pk", "body"))
        for schedule in schedules:
            schedule.body = bodies.get(schedule.pk, b"")
            schedule.is_body_told = schedule.pk in bodies
        return schedules

    def due(self, now: datetime) -> ScheduleQuerySet:
        return self.filter(next_at__lte=now)

    def next_at(self) -> datetime | None:
        """When one of them is due next."""
        # Ordered, not the least of them, so that a planner takes the index.
        waiting = self.filter(next_at__isnull=False).order_by("next_at")
        return waiting.values_list("next_at", flat=True).first()

    def fire_due(self, *, now: datetime) -> int:
        """Publish what it is time for. Answers how many messages that were.

        A schedule that missed its time, once or often, does so now, once.
        """
        due = self.due(now).order_by("next_at").values_list("pk", flat=True)
        return sum(self._fire(pk, now) for pk in list(due[:MOST_AT_A_TIME]))

    def _fire(self, pk: int, now: datetime) -> int:
        with transaction.atomic():
            # Asked again, since another engine may have been quicker, or is at it now.
            rows = self.due(now).filter(pk=pk).select_for_update(skip_locked=True)
            schedule = rows.first()
            return schedule.fire(now=now) if schedule else 0

    def put(self, schedule: Schedule, *, now: datetime) -> None:
        """Store a new one, or overwrite the one by its id. Raises ``InvalidOption`` or
        ``Refusal`` when what it would publish is not taken."""
        schedule.try_out(now=now)
        schedule.next_at = schedule.first_after(now)
        with transaction.atomic():
            if not self._overwrite(schedule) and not self._add(schedule):
                # Somebody else came first, this very moment.
                self._overwrite(schedule)
            schedule.ring(now=now)

    def _overwrite(self, schedule: Schedule) -> bool:
        rows = self.filter(account=schedule.account, schedule_id=schedule.schedule_id)
        standing = rows.select_for_update().defer("body").first()
        if standing is None:
            return False
        if schedule.has_the_times_of(standing) and standing.next_at:
            # It may be due at this moment: that is not to be lost.
            schedule.next_at = standing.next_at
        values = {name: getattr(schedule, name) for name in (*_SETTINGS, "next_at")}
        return rows.update(**values, is_paused=False, error="") > 0

    def _add(self, schedule: Schedule) -> bool:
        if self.owned_by(schedule.account).count() >= MOST_SCHEDULES:
            raise Refusal(412, "quota maxSchedules exceeded")
        try:
            with transaction.atomic():
                schedule.save(force_insert=True)
        except IntegrityError:
            return False
        return True


class Schedule(models.Model):
    """Something that is published again and again, whenever its cron expression says."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
    schedule_id = models.CharField(max_length=256)
    cron = models.TextField()
    destination = models.TextField()
    headers = models.JSONField(default=dict)
    """As they were given, ``Upstash-*`` and all, with ``REDACTED`` for the values that hold keys."""
    secrets = models.JSONField(default=dict, blank=True, editable=False)
    """Those values, for as long as the schedule is there."""
    body = models.BinaryField(default=b"")
    queue_name = models.CharField(max_length=256, blank=True)
    caller_ip = models.CharField(max_length=64, blank=True)
    created_at = models.DateTimeField()
    is_paused = models.BooleanField(default=False)
    next_at = models.DateTimeField(null=True, blank=True)
    """Empty while it is paused."""
    last_at = models.DateTimeField(null=True, blank=True)
    last_message_ids = models.JSONField(default=list, blank=True)
    error = models.TextField(blank=True)
    """Why nothing was published at ``last_at``."""

    objects = ScheduleQuerySet.as_manager()

    body_size: int
    """Of one that was ``listed``."""
    is_body_told = True
    """Not in a listing that has no room for it."""

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["account", "schedule_id"], name="qstash_server_schedule_id"
            )
        ]
        indexes = [
            models.Index(
                fields=["next_at"],
                name="qstash_server_schedule_due",
                condition=Q(next_at__isnull=False),
            )
        ]

    def __str__(self) -> str:
        return self.schedule_id

    @classmethod
    def of(
        cls,
        message: WireMessage,
        *,
        cron: str,
        now: datetime,
        schedule_id: str = "",
        account: str = "",
        caller_ip: str = "",
    ) -> Schedule:
        """One that publishes this message, not stored yet."""
        headers, secrets = redaction.parted(admission.deliverable(message).to_headers())
        return cls(
            account=account,
            schedule_id=schedule_id or f"scd_{uuid.uuid4().hex}",
            cron=" ".join(cron.split()),
            destination=message.destination,
            headers=headers,
            secrets=secrets,
            body=message.body,
            queue_name=message.queue,
            caller_ip=caller_ip,
            created_at=now,
        )

    # --- when --------------------------------------------------------------------------------

    def first_after(self, now: datetime) -> datetime:
        return self.times.next_after(now) + self.lateness

    def next_after(self, now: datetime) -> datetime:
        """Once it was fired."""
        return self.times.next_after(now - self.lateness) + self.lateness

    @cached_property
    def times(self) -> Cron:
        return Cron.parse(self.cron)

    @property
    def lateness(self) -> timedelta:
        """A message in a queue cannot be delayed, so it is the schedule that waits."""
        return timedelta(seconds=(self.options.delay or 0) if self.queue_name else 0)

    def has_the_times_of(self, other: Schedule) -> bool:
        return (self.cron, self.lateness) == (other.cron, other.lateness)

    def ring(self, *, now: datetime) -> None:
        if self.next_at is None:
            return
        wait = max((self.next_at - now).total_seconds(), 0.0)
        transaction.on_commit(lambda: doorbell.ring(wait), robust=True)

    # --- what --------------------------------------------------------------------------------

    @cached_property
    def wire_headers(self) -> dict[str, str]:
        """Under lower-case names."""
        return {name.lower(): value for name, value in {**self.headers, **self.secrets}.items()}

    @cached_property
    def options(self) -> Options:
        return Options.from_headers(self.wire_headers)

    def admitted(self, now: datetime) -> list[Admitted]:
        """What it publishes now. Raises ``InvalidOption`` or ``Refusal`` when it cannot be."""
        groups = UrlGroup.objects.owned_by(self.account).called([self.destination])
        group = groups.get(self.destination)
        headers = dict(self.wire_headers)
        if self.queue_name:
            headers.pop("upstash-delay", None)
        message = WireMessage.from_headers(
            self.destination,
            (group.default_headers if group else {}) | headers,
            bytes(self.body),
            self.queue_name,
        )
        admitted = admit(message, group, now=now)
        return [each._replace(schedule_id=self.schedule_id) for each in admitted]

    def try_out(self, *, now: datetime) -> None:
        """Raise what firing it would: at this moment, or ever."""
        admission.check_delay(self.options, now=now)
        self.admitted(now)
        self.first_after(now)

    # --- what becomes of it ------------------------------------------------------------------

    def fire(self, *, now: datetime) -> int:
        """Publish, and set when next. Ask with its row locked. Answers how many messages."""
        self.last_at, self.last_message_ids, self.error = now, [], ""
        try:
            # Before anything is published: without a next time it would be published for ever.
            self.next_at = None
            self.next_at = self.next_after(now)
            with transaction.atomic():
                accepted = Message.objects.accept(
                    self.admitted(now), account=self.account, caller_ip=self.caller_ip, now=now
                )
            self.last_message_ids = [each.message_id for each in accepted]
        except InvalidOption as error:
            self.error = error.wire_text
        except Refusal as error:
            self.error = str(error)
        self.save(update_fields=["last_at", "last_message_ids", "error", "next_at"])
        self.ring(now=now)
        return len(self.last_message_ids)

    def pause(self) -> None:
        Schedule.objects.filter(pk=self.pk).update(is_paused=True, next_at=None)

    def resume(self, *, now: datetime) -> None:
        """What it missed while it was paused is not made up for."""
        self.next_at = self.first_after(now)
        rows = Schedule.objects.filter(pk=self.pk, next_at__isnull=True)
        if rows.update(is_paused=False, next_at=self.next_at):
            self.ring(now=now)

    # --- what it says ------------------------------------------------------------------------

    @classmethod
    def to_records(cls, schedules: Sequence[Schedule]) -> list[ScheduleRecord]:
        """As QStash tells them, without keys and without what was asked to be hidden."""
        states = _states([each for row in schedules for each in row.last_message_ids])
        return [schedule._to_record(states) for schedule in schedules]

    def _to_record(self, states: dict[str, str]) -> ScheduleRecord:
        options, flow = self.options, self.options.flow_control
        content_type = {"Content-Type": options.content_type} if options.content_type else {}
        return ScheduleRecord(
            schedule_id=self.schedule_id,
            cron=self.cron,
            destination=self.destination,
            created_at=milliseconds(self.created_at),
            method=options.method,
            is_paused=self.is_paused,
            header=self._shown({**content_type, **options.headers}),
            body=redaction.redacted_body(bytes(self.body), options.redact)
            if self.is_body_told
            else b"",
            retries=DEFAULT_RETRIES if options.retries is None else options.retries,
            retry_delay=options.retry_delay,
            delay=round(options.delay) if options.delay else None,
            timeout=options.timeout,
            callback=self.wire_headers.get("upstash-callback", ""),
            failure_callback=self.wire_headers.get("upstash-failure-callback", ""),
            callback_header=self._shown(_headers(options.callback)),
            failure_callback_header=self._shown(_headers(options.failure_callback)),
            queue_name=self.queue_name,
            caller_ip=self.caller_ip,
            labels=options.labels,
            flow_control_key=flow.key if flow else "",
            rate=flow.rate if flow else None,
            period=flow.period if flow else None,
            parallelism=flow.parallelism if flow else None,
            last_schedule_time=milliseconds(self.last_at) if self.last_at else None,
            next_schedule_time=milliseconds(self.next_at) if self.next_at else None,
            last_schedule_states={
                each: states[each] for each in self.last_message_ids if each in states
            },
            error=self.error,
        )

    def _shown(self, headers: dict[str, str]) -> dict[str, list[str]]:
        header = {name: [value] for name, value in headers.items()}
        return redaction.redacted_header(header, self.options.redact)


def _headers(options: Options | None) -> dict[str, str]:
    return dict(options.headers) if options else {}


def _states(message_ids: list[str]) -> dict[str, str]:
    """What became of these messages, in the words of schedules."""
    states: dict[str, str] = {}
    for start in range(0, len(message_ids), 1000):
        rows: Any = Message.objects.filter(message_id__in=message_ids[start : start + 1000])
        for message_id, state, finished_at in rows.values_list(
            "message_id", "state", "finished_at"
        ):
            ended = "SUCCESS" if state == Message.State.DELIVERED else "FAIL"
            states[message_id] = ended if finished_at else "IN_PROGRESS"
    return states
