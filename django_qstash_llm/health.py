"""How it goes, by our own rows: nothing is asked of anybody else, and no large table is read through.

``Pulse`` says whether things move, which takes four short queries; ``Health`` adds what there is to
look at.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

from django.db.models import Q, QuerySet
from django.utils import timezone
from django.utils.translation import gettext as _

from . import triggers
from .conf import app_settings
from .models import Budget, CallbackResponse, Circuit, Lane, LedgerEntry, LLMRequest
from .models.alert import Alert
from .models.callback import Kind
from .models.circuit import QSTASH
from .models.moments import as_stored, aware
from .models.outbox import Outbox
from .models.replay import QUARANTINED, UNREAD
from .models.request import ANNOUNCED

MOST_COUNTED = 1000
"""Beyond it a count says "more": counting them all would take longer the worse it is."""
MOST_LANES = 20
MOST_BUDGETS = 100
UNSETTLED_FOR = 300.0
"""Seconds that an answer may wait to be added up. Nobody's answer waits for that."""
NEXT_KEY_FOR = timedelta(hours=24)


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """Whether what is due is done. Ages are seconds since it was due; None is nothing due."""

    at: datetime
    late_after: float
    """``HEALTH_LATE``, seconds."""
    oldest_due: float | None = None
    """Of the pending requests that may be submitted."""
    oldest_unannounced: float | None = None
    oldest_overdue: float | None = None
    """Of the submitted requests, since the deadline at which QStash should have been asked."""
    circuit_reason: str = ""
    circuit_since: datetime | None = None
    """None while QStash takes what it is sent."""
    circuit_until: datetime | None = None

    @classmethod
    def read(cls, using: str = "default", now: datetime | None = None) -> Self:
        """Raises Django's ``DatabaseError`` when there is no database to read."""
        return cls(**cls._figures(using, now))

    @classmethod
    def _figures(cls, using: str, now: datetime | None) -> dict[str, Any]:
        at = now or timezone.now()
        rows = LLMRequest.objects.using(using)
        circuit = Circuit.objects.using(using).filter(name=QSTASH, failures__gt=0).first()
        return {
            "at": at,
            "late_after": app_settings().health_late,
            "oldest_due": _age_of_first(
                Outbox(using, clock=lambda: at).due().order_by("id"),
                at,
                "created_at",
                "submit_after",
                "claimed_until",
            ),
            "oldest_unannounced": _age_of_first(
                triggers.unannounced(using).order_by("id"), at, "finished_at", "announce_after"
            ),
            "oldest_overdue": _age_of_first(
                rows.overdue(at).order_by("deadline_at"), at, "deadline_at"
            ),
            "circuit_reason": circuit.reason if circuit else "",
            "circuit_since": circuit and circuit.opened_at,
            "circuit_until": circuit and circuit.open_until,
        }

    @property
    def is_ok(self) -> bool:
        return not self.problems

    @property
    def status(self) -> str:
        """``ok`` or ``late``."""
        return "ok" if self.is_ok else "late"

    @property
    def problems(self) -> list[str]:
        """What does not move, each with what to do about it."""
        found = []
        if self._is_late(self._waited_for_a_worker):
            found.append(
                _(
                    "The oldest due request has waited %(seconds)d s: is a worker running? "
                    "`manage.py llm_sweep` submits without one."
                )
                % {"seconds": self._waited_for_a_worker}
            )
        if self._is_late(self.oldest_overdue):
            found.append(
                _(
                    "A submitted request has been past its deadline for %(seconds)d s and QStash was "
                    "not asked about it: is beat running, and a worker?"
                )
                % {"seconds": self.oldest_overdue}
            )
        if self._is_late(self.oldest_unannounced):
            found.append(
                _(
                    "The oldest finished request has waited %(seconds)d s for its trigger and "
                    "receivers to be told: is a worker running?"
                )
                % {"seconds": self.oldest_unannounced}
            )
        if self.circuit_problem:
            found.append(self.circuit_problem)
        return found

    @property
    def circuit_problem(self) -> str:
        """That QStash takes nothing, when that has kept something waiting for long; else empty."""
        is_late = self._is_late(self._circuit_age) or self._is_late(self.oldest_due)
        return self._circuit_sentence() if is_late and not self._is_circuit_over else ""

    @property
    def notice(self) -> str:
        """That QStash takes nothing at the moment, while that is no problem yet; else empty."""
        if self.circuit_problem or (self._is_late(self._circuit_age) and self._is_circuit_over):
            return ""
        return self._circuit_sentence()

    @property
    def _waited_for_a_worker(self) -> float | None:
        """Seconds. While the circuit is open there is nothing for one to do."""
        if self.oldest_due is None or self.circuit_until is None:
            return self.oldest_due
        return min(self.oldest_due, (self.at - self.circuit_until).total_seconds())

    @property
    def _circuit_age(self) -> float | None:
        since = self.circuit_since
        return None if since is None else (self.at - since).total_seconds()

    @property
    def _is_circuit_over(self) -> bool:
        """Its time has come, and nothing is there by which to find out."""
        has_come = self.circuit_until is not None and self.circuit_until <= self.at
        return has_come and self.oldest_due is None

    def _circuit_sentence(self) -> str:
        if self.circuit_since is None:
            return ""
        sentence = _(
            "QStash has taken nothing since %(since)s and is asked again at %(until)s: %(reason)s"
        )
        return sentence % {
            "since": _time(self.circuit_since),
            "until": _time(self.circuit_until),
            "reason": self.circuit_reason,
        }

    def _is_late(self, age: float | None) -> bool:
        return age is not None and age > self.late_after


@dataclass(frozen=True, kw_only=True)
class Health(Pulse):
    """The pulse, and how many there are of what. A count above 1000 means "more than 1000"."""

    pending: int = 0
    submitted: int = 0
    overdue: int = 0
    """Submitted, and past their deadline."""
    quarantined: int = 0
    """Callbacks that are signed and that nobody could read."""
    unread: int = 0
    """Callbacks that are stored and whose reading broke."""
    orphaned: int = 0
    """Callbacks for a request that is not here."""
    given_up: int = 0
    """Finished requests whose trigger or receivers failed as often as they are tried."""
    unpriced: int = 0
    by_next_key: int = 0
    """Callbacks of the last 24 hours that the next signing key verified."""
    oldest_unsettled: float | None = None
    """Seconds since the oldest answer that is in no sum by day yet."""
    budgets: tuple[str, ...] = ()
    """A sentence for each budget, up to ``MOST_BUDGETS``, that has reached a threshold in its present
    period."""
    paused: tuple[str, ...] = ()
    """A sentence for each paused lane, up to ``MOST_LANES``: since when, by whom, why, and how many
    requests wait."""

    @classmethod
    def _figures(cls, using: str, now: datetime | None) -> dict[str, Any]:
        figures = super()._figures(using, now)
        at = figures["at"]
        rows, receipts = LLMRequest.objects.using(using), CallbackResponse.objects.using(using)
        tried = {"announce_tries__gte": app_settings().announce_tries}
        next_key = {"verified_by_next_key": True, "received_at__gte": at - NEXT_KEY_FOR}
        # Each in the order of the partial index that holds just these: without being told so,
        # SQLite would rather read all that is completed, or all that has a request.
        counted: dict[str, QuerySet[Any]] = {
            "pending": rows.pending().order_by("id"),
            "submitted": rows.submitted().order_by("deadline_at"),
            "overdue": rows.overdue(at).order_by("deadline_at"),
            "quarantined": receipts.filter(QUARANTINED).order_by("received_at"),
            "unread": receipts.filter(UNREAD, llm_request__isnull=False).order_by("id"),
            "orphaned": receipts.orphaned().exclude(kind=Kind.PING).order_by("received_at"),
            "given_up": rows.filter(announced_at=None, state__in=ANNOUNCED, **tried).order_by("id"),
            "unpriced": rows.unpriced().order_by("id"),
            "by_next_key": receipts.filter(**next_key).order_by("received_at"),
        }
        paused = Lane.objects.using(using).paused(at).order_by("pk")[:MOST_LANES]
        return {
            **figures,
            **{name: _count(queryset) for name, queryset in counted.items()},
            "oldest_unsettled": _age_of_first(
                LedgerEntry.objects.using(using).unfolded().order_by("id"), at, "entered_at"
            ),
            "budgets": tuple(each.in_words for each in _reached(using, at)),
            "paused": tuple(map(_paused, paused)),
        }

    @property
    def counts(self) -> dict[str, int]:
        names = [f.name for f in dataclasses.fields(self) if f.type == "int"]
        return {name: getattr(self, name) for name in names}

    @property
    def remarks(self) -> list[str]:
        """What moves, or has stopped for good, and a person should look at."""
        sentences = {
            "quarantined": _(
                "%(count)s signed callbacks could not be read: see their problem in the admin; "
                "`manage.py llm_replay --quarantined` reads them again."
            ),
            "unread": _(
                "%(count)s stored callbacks broke the code that read them: see their problem in the "
                "admin; once it is mended, `manage.py llm_replay --unread` reads them again."
            ),
            "given_up": _(
                "%(count)s finished requests were not announced, as their trigger or a receiver "
                "raises: see the error in the admin, and announce them again."
            ),
            "orphaned": _(
                "%(count)s callbacks belong to no request that is here: was one deleted, or do two "
                "sites share an address?"
            ),
            "unpriced": _(
                "%(count)s answers have no price: give QSTASH_LLM['PRICES'] one for their model, and "
                "run manage.py llm_replay --unpriced."
            ),
            "by_next_key": _(
                "%(count)s callbacks of the last 24 hours were signed with the next key: copy both "
                "signing keys from QStash and restart, or the next rotation locks it out."
            ),
        }
        counts = self.counts
        found = [
            sentence % {"count": capped(counts[name])}
            for name, sentence in sentences.items()
            if counts[name]
        ]
        if self.oldest_unsettled is not None and self.oldest_unsettled > UNSETTLED_FOR:
            sentence = _(
                "The oldest answer has waited %(seconds)d s to be added up: is beat running, and a "
                "worker? `manage.py llm_sweep` does it without."
            )
            found.append(sentence % {"seconds": self.oldest_unsettled})
        return [*filter(None, [self.notice]), *self.paused, *self.budgets, *found]

    def to_json(self) -> dict[str, Any]:
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "status": self.status,
            "problems": self.problems,
            "remarks": self.remarks,
            "figures": figures,
        }


def capped(count: int) -> str:
    return f"{MOST_COUNTED}+" if count > MOST_COUNTED else str(count)


def _count(queryset: QuerySet[Any]) -> int:
    # Only as far as it is shown.
    return queryset[: MOST_COUNTED + 1].count()


def _reached(using: str, at: datetime) -> list[Alert]:
    """Of each budget its highest threshold that is reached, by the alerts: nothing is settled here."""
    budgets = list(Budget.objects.using(using).filter(is_active=True).order_by("pk")[:MOST_BUDGETS])
    if not budgets:
        return []
    is_of_now = Q(pk__in=[])
    for budget in budgets:
        since = budget.since(aware(at))
        is_of_now |= Q(budget=budget, crossed_at__gte=as_stored(since))
    alerts = Alert.objects.using(using).filter(is_of_now).select_related("budget")
    highest: dict[int, Alert] = {}
    for alert in alerts.order_by("threshold", "pk"):
        # Not where the amount was raised since.
        if alert.spent * 100 >= alert.budget.amount * alert.threshold:
            highest[alert.budget_id] = alert
    return list(highest.values())


def _paused(lane: Lane) -> str:
    waiting = _("%(count)s requests wait.") % {"count": capped(_count(lane.waiting()))}
    return " ".join(filter(None, [lane.pause_in_words, lane.remedy, waiting]))


def _age_of_first(queryset: QuerySet[Any], now: datetime, *moments: str) -> float | None:
    """Seconds since the last of these moments of the first row."""
    row = queryset.values_list(*moments).first()
    if row is None:
        return None
    due: datetime = max((moment for moment in row if moment is not None), default=now)
    return max((now - due).total_seconds(), 0.0)


def _time(moment: datetime | None) -> str:
    return moment.isoformat(" ", "seconds") if moment else ""
