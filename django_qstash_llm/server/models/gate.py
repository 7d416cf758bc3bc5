from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.db import models, transaction
from django.db.models import Count, Exists, Min, OuterRef, Q

from ...limits import Reading, Trouble
from .. import conf, doorbell, metering
from ..metering import Subject
from ..pacing import SETTLED, Charge, Mark, Pace

if TYPE_CHECKING:
    from .message import Message, MessageQuerySet

logger = logging.getLogger(__name__)

LONGEST_WORDS = 500


@dataclass(frozen=True, slots=True)
class Begun:
    """What the engine that made an attempt knows of its beginning, and nobody else."""

    at: datetime
    mark: Mark
    """What had been sent through its gate by then."""


class GateQuerySet(models.QuerySet["Gate"]):
    def of(
        self, subjects: Iterable[Subject], *, account: str, now: datetime
    ) -> dict[Subject, Gate]:
        """Their gates, made where there are none."""
        wanted = set(subjects)
        if not wanted:
            return {}
        found = self._known(wanted, account)
        if missing := sorted(wanted - set(found), key=str):
            fresh = (
                self.model(
                    account=account,
                    host=subject.host,
                    group=subject.group,
                    credential=subject.credential,
                    opens_at=now,
                    created_at=now,
                    updated_at=now,
                )
                for subject in missing
            )
            self.bulk_create(fresh, ignore_conflicts=True)
            self._pause_as_their_siblings(missing, account, now)
            found = self._known(wanted, account)
        return found

    def _pause_as_their_siblings(
        self, subjects: Iterable[Subject], account: str, now: datetime
    ) -> None:
        """A key without credit has none for another model either."""
        for host, credential in {(each.host, each.credential) for each in subjects}:
            rows = self.filter(account=account, host=host, credential=credential)
            broke = rows.filter(is_paused=True, trouble=Trouble.MONEY).values_list("words").first()
            if broke:
                # Those that nothing is known of: the others were resumed.
                rows.filter(is_paused=False, pace={}, resumed_at=None).update(
                    **_without_credit(broke[0], now)
                )

    def _known(self, wanted: set[Subject], account: str) -> dict[Subject, Gate]:
        rows = self.filter(
            account=account,
            host__in={each.host for each in wanted},
            group__in={each.group for each in wanted},
            credential__in={each.credential for each in wanted},
        )
        return {row.subject: row for row in rows if row.subject in wanted}

    def waited_at(self) -> GateQuerySet:
        """Gates at which somebody waits."""
        from .message import Message

        waiting = Message.objects.at_their_gate().filter(gate=OuterRef("pk"))
        return self.filter(waiting.first_exists())

    def waited_for(self) -> GateQuerySet:
        """Gates at which somebody waits whom no pause holds."""
        return self.waited_at().filter(is_paused=False)

    def with_room(self, now: datetime) -> GateQuerySet:
        """Gates at which somebody waits and a call may begin, at a glance: nothing is locked."""
        return self.waited_for().filter(opens_at__lte=now)

    def next_opening_at(self, now: datetime) -> datetime | None:
        shut = self.waited_for().filter(opens_at__gt=now)
        moment: datetime | None = shut.aggregate(moment=Min("opens_at"))["moment"]
        return moment

    def locked(self, pks: Iterable[int]) -> dict[int, Gate]:
        """Those by these keys that nobody else looks after at this moment, in everybody's order."""
        rows = self.filter(pk__in=set(pks)).order_by("pk")
        return {row.pk: row for row in rows.select_for_update(no_key=True, skip_locked=True)}

    def troubled(self) -> GateQuerySet:
        """Paused by what a provider answered: a person has to do something."""
        return self.filter(is_paused=True).exclude(trouble="")

    def purge(self, *, before: datetime) -> None:
        """Forget those of which nothing was seen for long."""
        from .message import Message

        in_use = Message.objects.unfinished().filter(gate=OuterRef("pk"))
        unneeded = self.filter(~Exists(in_use), updated_at__lt=before, is_paused=False)
        if not unneeded.exists():
            return
        with transaction.atomic():
            locked = unneeded.order_by("pk").select_for_update().values_list("pk", flat=True)
            unneeded.filter(pk__in=list(locked)).delete()


class Gate(models.Model):
    """The limits of a provider that all messages to it share: learnt from what it answers, held by
    letting no more begin. See ``pacing`` for its rules."""

    account = models.CharField(max_length=64, blank=True, default="", editable=False)
    host = models.CharField(max_length=253)
    group = models.CharField(max_length=255)
    """The model, or by the settings a group of models that share their limits."""
    credential = models.CharField(max_length=12, blank=True, default="")
    """A fingerprint of the key, to tell one from another."""
    pace = models.JSONField(default=dict, blank=True, editable=False)
    opens_at = models.DateTimeField()
    """Until then nothing begins; then it is looked at again."""
    is_paused = models.BooleanField(default=False)
    paused_at = models.DateTimeField(null=True, blank=True)
    resumed_at = models.DateTimeField(null=True, blank=True)
    trouble = models.CharField(max_length=16, blank=True, default="")
    """What the provider last refused for: one of ``limits.Trouble``."""
    words = models.TextField(blank=True, default="")
    """Its own, and how long it asked to wait."""
    troubled_at = models.DateTimeField(null=True, blank=True)
    let_in = models.PositiveBigIntegerField(default=0)
    refused = models.PositiveBigIntegerField(default=0)
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    objects = GateQuerySet.as_manager()

    class Meta:
        ordering = ["host", "group", "credential"]
        constraints = [
            models.UniqueConstraint(
                fields=["account", "host", "group", "credential"], name="qstash_server_gate_once"
            )
        ]

    def __str__(self) -> str:
        return f"{self.host} {self.group}"

    @property
    def subject(self) -> Subject:
        return Subject(self.host, self.group, self.credential)

    @property
    def mine(self) -> MessageQuerySet:
        from .message import Message

        return Message.objects.filter(gate=self)

    @cached_property
    def pacing(self) -> Pace:
        """``pace``, to be changed with the row locked and stored by ``store``."""
        try:
            return Pace.from_json(self.pace)
        except (TypeError, ValueError, KeyError):
            # Of another version: nobody is to wait for what it meant.
            logger.exception("what gate %s learnt cannot be read, and is learnt anew", self.pk)
            return Pace()

    @property
    def blocked_until(self) -> datetime:
        return datetime.fromtimestamp(self.pacing.blocked_until, UTC)

    calls: int
    """In flight, of one that was fetched by ``counting.gates_with_counts``."""
    wait_list_size: int

    # --- who may begin: with the row locked ----------------------------------------------------

    def free(self, now: datetime) -> int:
        """How many calls may begin now, whatever tokens they take."""
        if not conf.current().gates:
            return 2**31
        if self.is_paused:
            return 0
        self.pacing.cap(metering.caps_of(self.host, self.group), now=now.timestamp())
        return self.pacing.free(now=now.timestamp(), **self.in_flight(now))

    def fitting(self, charges: Sequence[Charge], now: datetime) -> int:
        """How many of these calls may begin now, from the first on."""
        free = self.free(now)
        if free <= 0 or not conf.current().gates:
            return min(free, len(charges))
        counts = self.in_flight(now)
        return self.pacing.fitting(charges[:free], now=now.timestamp(), **counts)

    _counts: dict[str, int] | None = None

    def in_flight(self, now: datetime) -> dict[str, int]:
        """How many calls are under way (``in_flight``), and how many of them the provider seems to
        have let in (``settled``). Counted once, and kept up while the row is locked."""
        if self._counts is None:
            settled = Q(claimed_at__lte=now - timedelta(seconds=SETTLED))
            self._counts = self.mine.claimed().aggregate(
                in_flight=Count("pk"), settled=Count("pk", filter=settled)
            )
        return self._counts

    @property
    def finds_out_whether_it_is_back(self) -> bool:
        """Whether one call goes next, to a provider that failed."""
        pace = self.pacing
        # Also one that refuses again and again: it may be what the first of them asks.
        is_in_doubt = pace.is_overloaded or pace.faults > 0 or pace.strikes > 1
        return conf.current().gates and pace.is_probing and is_in_doubt

    def begin(self, rows: Sequence[Message], *, now: datetime) -> None:
        """These begin now."""
        self.in_flight(now)["in_flight"] += len(rows)
        mark = self.pacing.begin([row.charge for row in rows], now=now.timestamp())
        for row in rows:
            row.begun = Begun(now, mark)

    def look(self, *, now: datetime) -> None:
        """When the next may begin, who waits or who may come."""
        first = self.mine.at_their_gate().order_by("pk").defer("body", "headers", "secrets").first()
        charge = first.charge if first else Charge()
        if self.fitting([charge], now):
            self.opens_at = now
        else:
            at = self.pacing.next_at(charge, now=now.timestamp())
            self.opens_at = datetime.fromtimestamp(at, UTC)

    def store(self, *, now: datetime) -> None:
        self.pace, self.updated_at = self.pacing.to_json(), now
        self.save(
            update_fields=[
                "pace",
                "opens_at",
                "trouble",
                "words",
                "troubled_at",
                "let_in",
                "refused",
                "updated_at",
            ]
        )

    # --- what its answers say ------------------------------------------------------------------

    def learn(self, message: Message, reading: Reading, *, now: datetime) -> None:
        """An attempt of ``message`` was answered. With the row locked, and its claim still held."""
        counts, begun = self.in_flight(now), message.begun
        counts["in_flight"] = max(0, counts["in_flight"] - 1)
        began = begun.at if begun else (message.claimed_at or now)
        self.pacing.learn(
            reading,
            now=now.timestamp(),
            began=began.timestamp(),
            mark=begun.mark if begun else None,
            in_flight=counts["in_flight"],
        )
        self.refused += reading.trouble in _REFUSALS
        self.let_in += reading.trouble is None
        if not self.is_paused and reading.trouble not in {None, Trouble.FAULT}:
            self.trouble, self.troubled_at = reading.trouble, now
            self.words = message.without_credentials(in_words(reading))[:LONGEST_WORDS]

    def pause_for_money(self, message: Message, reading: Reading, *, now: datetime) -> None:
        """The key has no credit: nothing more goes out with it, whichever model it asks, until a
        person resumes it. What was begun before that person did says nothing new."""
        began = message.claimed_at or now
        with transaction.atomic():
            # In everybody's order: two of the key's models may find out at the same moment.
            same_key = self.of_the_same_key().filter(is_paused=False).order_by("pk")
            pks = list(same_key.select_for_update(no_key=True).values_list("pk", flat=True))
            not_since = Q(resumed_at=None) | Q(resumed_at__lte=began)
            Gate.objects.filter(not_since, pk__in=pks).update(
                **_without_credit(message.without_credentials(in_words(reading)), now)
            )

    def of_the_same_key(self) -> GateQuerySet:
        return Gate.objects.filter(account=self.account, host=self.host, credential=self.credential)

    # --- by hand -------------------------------------------------------------------------------

    def pause(self, *, now: datetime) -> None:
        """Let nothing begin, go on accepting. What is in flight may finish."""
        self._change(now=now, is_paused=True, paused_at=now, trouble="", words="")

    def resume(self, *, now: datetime) -> None:
        """Go on, with one call at first: what was wrong may still be."""
        with transaction.atomic():
            row = Gate.objects.select_for_update(no_key=True).filter(pk=self.pk).first()
            if row is None:
                return
            row.pacing.find_out()
            self._change(
                now=now,
                pace=row.pacing.to_json(),
                is_paused=False,
                resumed_at=now,
                trouble="",
                words="",
                opens_at=now,
            )

    def reset(self, *, now: datetime) -> None:
        """Forget all that was learnt: as if nothing had ever been sent."""
        self._change(now=now, pace={}, opens_at=now, trouble="", words="", let_in=0, refused=0)

    def _change(self, *, now: datetime, **values: Any) -> None:
        Gate.objects.filter(pk=self.pk).update(**values, updated_at=now)
        # There may be more room now.
        transaction.on_commit(doorbell.ring, robust=True)


def _without_credit(words: str, now: datetime) -> dict[str, Any]:
    return {
        "is_paused": True,
        "paused_at": now,
        "trouble": Trouble.MONEY,
        "words": words[:LONGEST_WORDS],
        "troubled_at": now,
        "updated_at": now,
    }


_REFUSALS = {Trouble.RATE, Trouble.DAILY, Trouble.OVERLOAD, Trouble.MONEY}


def in_words(reading: Reading) -> str:
    """What is wrong, in the provider's words and with the wait that it named."""
    words = reading.words or reading.code
    if reading.wait is None:
        return words
    return f"{words} ({reading.wait_source}: {reading.wait:g} s)"
