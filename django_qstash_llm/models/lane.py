"""``Lane``: the way of all requests of a provider, a model, a tenant or a queue, which can be paused.

A pause loses nothing. Pending requests of a paused lane stay pending, and what QStash has of it is
held there, by pausing its flow-control key or its queue. QStash is told from Celery, until it took it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from django.conf import settings
from django.db import models, transaction
from django.db.models import F, Q
from django.utils import timezone
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_text
from ..conf import app_settings, qstash_client
from ..exceptions import ConfigurationError, IllegalState, InvalidRequest
from ..limits import HOUR, Limit, Reading, Trouble, read
from ..providers import Provider, get_provider
from ..qstash import (
    Client,
    FlowControl,
    InvalidOption,
    NotFound,
    QStashError,
    ResponseError,
)
from ..qstash.options import check_name
from .doorbell import Bell, ring_on_commit
from .request import LLMRequest, LLMRequestQuerySet

if TYPE_CHECKING:
    from .callback import CallbackResponse

logger = logging.getLogger(__name__)

SCOPE = ("provider", "model", "tenant", "queue")
TELL_SECONDS = 120
"""How long the call that tells QStash may take, before another worker makes it."""
LONGEST_PAUSE = 300.0
"""Seconds between two tries to tell QStash."""
UNKNOWN_PAUSE = timedelta(seconds=60)
"""Between two tries to hold what QStash knows nothing of yet: it may be on its way."""
LEARN_AGAIN = timedelta(minutes=10)
"""A limit that stays what it is is written down this often, and no more."""
LEARN_ANEW = timedelta(seconds=10)
"""The same of one that changes: some providers' do with every answer."""
LEARNED_FOR = timedelta(days=7)
"""What was learned longer ago counts no more."""
LONGEST_PERIOD = HOUR
"""Seconds. In windows of a day, as QStash counts, the last request would wait for a day where the
provider refills by the minute; a day's limit pauses the lane when it is reached."""


class LaneQuerySet(models.QuerySet["Lane"]):
    def named(self, **scope: str) -> Lane:
        """The lane of this scope, made where there is none. Raises ``InvalidRequest``."""
        check_scope(scope)
        return self._of(**scope)

    def _of(self, **scope: str) -> Lane:
        self._for_write = True  # for self.db: not the replica that reads would go to
        return self.get_or_create(**_whole(scope))[0]

    def paused(self, now: datetime) -> Self:
        is_on = Q(paused_until=None) | Q(paused_until__gt=now)
        return self.filter(is_on, paused_at__isnull=False)

    def held(self, now: datetime) -> Q:
        """What selects the requests that a paused lane holds; empty while none is paused."""
        self._for_write = True
        return _selecting(self.paused(now).order_by("pk").values_list(*SCOPE))

    def holding(self, llm_request: LLMRequest, now: datetime) -> Lane | None:
        """The paused lane for which it waits."""
        conf = app_settings()
        of_it = {
            "provider": llm_request.provider or conf.default_provider,
            "model": llm_request.model or conf.default_model,
            "tenant": llm_request.tenant,
            "queue": llm_request.queue,
        }
        either = {f"{name}__in": ("", value) for name, value in of_it.items()}
        return self.paused(now).filter(**either).order_by("pk").first()

    # --- pacing ---

    def flow_control(self, provider: Provider, model: str, *, now: datetime) -> FlowControl | None:
        """How fast QStash is to ask ``model``; None where nothing limits it. That the lane has a
        flow-control key is written down: by it a pause reaches what is with QStash."""
        self._for_write = True
        pace = provider.pace(model)
        is_own = Q(provider=provider.name, model=model, tenant="", queue="")
        lanes = list(self.filter(Q(key=pace.key) | is_own))
        if app_settings().flow_control == "learned":
            for lane in lanes:
                if lane.learned_at is not None and lane.learned_at > now - LEARNED_FOR:
                    pace = pace.at_most(lane.learned_rate, lane.learned_period or 1)
        flow_control = pace.flow_control()
        is_known = any((lane.model, lane.key) == (model, pace.key) for lane in lanes)
        if flow_control is not None and not is_known:
            self._of(provider=provider.name, model=model)._give_key(pace.key)
        return flow_control

    def learn(self, provider: str, model: str, limit: Limit, *, at: datetime) -> None:
        """Write down what was said at ``at``, unless that is known."""
        self._for_write = True
        told = {"learned_limit": int(limit.limit or 0), "learned_period": int(limit.period or 0)}
        scope = _whole({"provider": provider, "model": model})
        lane = self.filter(**scope).first()
        if lane is not None and lane.learned_at is not None:
            is_same = all(getattr(lane, name) == value for name, value in told.items())
            if at - lane.learned_at < (LEARN_AGAIN if is_same else LEARN_ANEW):
                return
        self.update_or_create(**scope, defaults={**told, "learned_at": at})

    # --- what time and QStash are to do ---

    def due(self, now: datetime) -> Self:
        """Whose pause is over, or of which QStash is to be told."""
        return self.filter(_is_over(now) | _is_to_be_told(now))

    def see_to(self, *, limit: int = 100, clock: Callable[[], datetime] = timezone.now) -> int:
        """End the pauses whose time has come, and tell QStash what to hold and what to let go.
        Answers how many were seen to. Raises ``ConfigurationError`` without a way to QStash."""
        self._for_write = True
        ended = [lane for lane in self.filter(_is_over(clock()))[:limit] if lane._end(clock())]
        due = self.filter(_is_to_be_told(clock())).order_by("pk")[:limit]
        return len(ended) + sum([lane.tell(qstash_client(), clock=clock) for lane in due])


def _is_over(now: datetime) -> Q:
    return Q(paused_at__isnull=False, paused_until__lte=now)


def _is_to_be_told(now: datetime) -> Q:
    return Q(is_held=None) & (Q(tell_after=None) | Q(tell_after__lte=now))


class Lane(models.Model):
    """All requests of what it names. What it does not name may be any."""

    provider = models.CharField(_("provider"), max_length=64, blank=True)
    model = models.CharField(_("model"), max_length=255, blank=True)
    tenant = models.CharField(_("tenant"), max_length=255, blank=True)
    queue = models.CharField(_("queue"), max_length=255, blank=True)

    # the pause
    paused_at = models.DateTimeField(_("paused at"), null=True, blank=True)
    """None while it is open."""
    paused_until = models.DateTimeField(
        _("paused until"),
        null=True,
        blank=True,
        help_text=_("Empty: until somebody resumes it."),
    )
    paused_by = models.CharField(_("paused by"), max_length=255, blank=True)
    """Empty where no person did, but ``trouble``."""
    trouble = models.CharField(_("trouble"), max_length=16, blank=True)
    reason = models.TextField(_("reason"), blank=True)
    """A person's, or the provider's words."""
    resumed_at = models.DateTimeField(_("resumed at"), null=True, blank=True)
    resumed_by = models.CharField(_("resumed by"), max_length=255, blank=True)
    """Empty where its time had come."""

    # what QStash holds
    key = models.CharField(_("flow-control key"), max_length=255, blank=True)
    """Under which QStash delivers what is of this provider and model."""
    is_held = models.BooleanField(_("held by QStash"), null=True, default=False)
    """None: it is to be told, or told again."""
    revision = models.PositiveIntegerField(default=0, editable=False)
    """Of what it is to hold: what is told of an older one is told again."""
    tell_after = models.DateTimeField(null=True, blank=True, editable=False)
    tell_tries = models.PositiveIntegerField(default=0, editable=False)
    tell_problem = models.TextField(_("why QStash could not be told"), blank=True)

    # what its provider said
    learned_limit = models.PositiveIntegerField(_("learned limit"), null=True, blank=True)
    """Requests per period."""
    learned_period = models.PositiveIntegerField(_("learned period"), null=True, blank=True)
    """Seconds."""
    learned_at = models.DateTimeField(_("learned at"), null=True, blank=True)

    objects = LaneQuerySet.as_manager()

    class Meta:
        verbose_name = _("lane")
        verbose_name_plural = _("lanes")
        ordering = ("-id",)
        constraints = (models.UniqueConstraint(fields=SCOPE, name="llm_lane_scope"),)
        indexes = (
            # Asked before every claim.
            models.Index(
                fields=["id"], name="llm_lane_paused", condition=Q(paused_at__isnull=False)
            ),
            models.Index(fields=["id"], name="llm_lane_to_tell", condition=Q(is_held=None)),
            models.Index(fields=["key"], name="llm_lane_key", condition=~Q(key="")),
        )

    def __str__(self) -> str:
        named = [(name, getattr(self, name)) for name in SCOPE]
        said = [
            value if name == "provider" else f"{name} {value}" for name, value in named if value
        ]
        return " · ".join(said)

    @property
    def is_paused(self) -> bool:
        return self.paused_at is not None

    @property
    def remedy(self) -> str:
        """What cures its trouble, in a sentence; empty where a person paused it."""
        return Trouble(self.trouble).remedy if self.trouble else ""

    @property
    def learned_rate(self) -> int:
        """Requests per ``learned_period`` that we let ourselves make."""
        return max(1, int((self.learned_limit or 0) * app_settings().learned_share))

    @property
    def pause_in_words(self) -> str:
        """That it is paused, since when, by whom and why; empty while it is not."""
        if self.paused_at is None:
            return ""
        said = {
            "lane": self,
            "since": _moment(self.paused_at),
            "until": _moment(self.paused_until),
            "by": self.paused_by or self.trouble,
            "reason": self.reason or gettext("no reason given"),
        }
        if self.paused_until is None:
            sentence = gettext("Lane %(lane)s is paused since %(since)s by %(by)s: %(reason)s")
        else:
            sentence = gettext(
                "Lane %(lane)s is paused from %(since)s until %(until)s by %(by)s: %(reason)s"
            )
        return sentence % said

    def waiting(self) -> LLMRequestQuerySet:
        """The pending requests that a pause of it holds."""
        scope = tuple(getattr(self, name) for name in SCOPE)
        rows = LLMRequest.objects.using(self._state.db or "default")
        return rows.pending().filter(_selecting([scope]))

    @property
    def _rows(self) -> LaneQuerySet:
        return type(self).objects.using(self._state.db or "default")

    # --- a person's verbs ---

    def pause(
        self,
        *,
        by: str,
        reason: str = "",
        until: datetime | None = None,
        now: datetime | None = None,
    ) -> None:
        """Hold all of it, until ``until`` or until it is resumed. Of one that is paused already the
        reason and the end are replaced. Raises ``InvalidRequest``."""
        now = now or timezone.now()
        if until is not None and until <= now:
            raise InvalidRequest("until", f"{_moment(until)} has passed; give a moment to come")
        changes = {
            "paused_at": self.paused_at or now,
            "paused_until": until,
            "paused_by": clean_text(by, limit=255),
            "trouble": "",
            "reason": app_settings().without_secrets(clean_text(reason), limit=2000),
        }
        with transaction.atomic(using=self._rows.db):
            self._rows.filter(pk=self.pk).update(**changes)
            self._have_qstash_told()
        self.refresh_from_db()

    def resume(self, *, by: str, now: datetime | None = None) -> None:
        """Let all of it go on. Raises ``IllegalState`` where it is not paused."""
        if not self._resume(self._rows.filter(paused_at__isnull=False), by, now or timezone.now()):
            raise IllegalState(f"Lane {self} is not paused.")
        self.refresh_from_db()

    def _end(self, now: datetime) -> bool:
        """Whether its time had come, and nobody has made it longer meanwhile."""
        return self._resume(self._rows.filter(_is_over(now)), "", now)

    def _resume(self, rows: LaneQuerySet, by: str, now: datetime) -> bool:
        with transaction.atomic(using=rows.db):
            resumed = rows.filter(pk=self.pk).update(
                **_OPEN, resumed_at=now, resumed_by=clean_text(by, limit=255)
            )
            if resumed:
                self._have_qstash_told(and_gates=bool(self.provider))
                ring_on_commit(Bell.SUBMIT, rows.db)
        return bool(resumed)

    # --- what a trouble does ---

    def pause_for(
        self, reading: Reading, *, at: datetime, until: datetime | None, now: datetime
    ) -> None:
        """The provider refused everybody at ``at``. Once: who paused it before has said why, and who
        resumed it later than that knows better."""
        words = app_settings().without_secrets(clean_text(reading.words), limit=2000)
        because = {"trouble": reading.trouble, "reason": words, "paused_until": until}
        # Both in the statement: a person's click may come between any two.
        mine = self._rows.filter(Q(resumed_at=None) | Q(resumed_at__lt=at), pk=self.pk)
        with transaction.atomic(using=self._rows.db):
            if mine.filter(paused_at=None).update(**because, paused_at=now, paused_by=""):
                self._have_qstash_told()
                logger.warning("Lane %s is paused: %s", self, words or reading.trouble)
            elif until is not None:
                mine.exclude(trouble="").filter(paused_until__lt=until).update(**because)

    # --- telling QStash ---

    def reached(self) -> LaneQuerySet:
        """The lanes by which QStash can be made to hold what it has of this one; none where only
        what is pending can be held."""
        rows = self._rows
        if self.tenant or (self.queue and (self.provider or self.model)):
            return rows.none()
        if self.queue:
            return rows.filter(pk=self.pk)
        named = {name: getattr(self, name) for name in ("provider", "model") if getattr(self, name)}
        return rows.filter(key__in=rows.filter(**named).exclude(key="").values("key"))

    def _have_qstash_told(self, *, and_gates: bool = False) -> None:
        """Of all that this pause or its end changes there; with ``and_gates``, also where all that
        was held are our own server's gates."""
        changes = {"is_held": None, "revision": F("revision") + 1, "tell_tries": 0}
        told = set(self.reached().values_list("pk", flat=True)) | (
            {self.pk} if and_gates else set()
        )
        if self._rows.filter(pk__in=told).update(**changes):
            ring_on_commit(Bell.LANES, self._rows.db)

    def _give_key(self, key: str) -> None:
        """Under this key QStash gets its messages from now on."""
        self._rows.filter(pk=self.pk).update(key=key)
        self.key = key
        if self._is_to_be_held():  # paused since this message was claimed
            self._have_qstash_told()

    def _is_to_be_held(self) -> bool:
        """Whether all that goes this way is paused: models of one group share a key, and one of them
        may go on."""
        paused = self._rows.filter(paused_at__isnull=False, tenant="")
        if not self.key:
            return paused.filter(pk=self.pk).exists()
        covering = list(paused.filter(queue="").values_list("provider", "model"))
        return all(
            any(p in ("", lane.provider) and m in ("", lane.model) for p, m in covering)
            for lane in self._rows.filter(key=self.key)
        )

    def tell(self, client: Client, *, clock: Callable[[], datetime] = timezone.now) -> bool:
        """Tell QStash what to do with what it has of this lane. Whether it was ours to tell."""
        now = clock()
        claimed_until = now + timedelta(seconds=TELL_SECONDS)
        mine = self._rows.filter(_is_to_be_told(now), pk=self.pk)
        if not mine.update(tell_after=claimed_until, tell_tries=F("tell_tries") + 1):
            return False
        self.refresh_from_db()
        is_to_be_held = self._is_to_be_held()
        mine = self._rows.filter(pk=self.pk, is_held=None, tell_after=claimed_until)
        try:
            self._tell(client, is_to_be_held)
        except NotFound:
            if is_to_be_held:
                mine.update(tell_after=clock() + UNKNOWN_PAUSE, tell_problem="")
                return True
        except QStashError as error:
            problem = app_settings().without_secrets(clean_text(str(error)), limit=500)
            pause = timedelta(seconds=min(LONGEST_PAUSE, 2.0 ** min(self.tell_tries, 10)))
            mine.update(tell_after=clock() + pause, tell_problem=problem)
            logger.warning("QStash could not be told of lane %s: %s", self, problem)
            return True
        done = {"tell_after": None, "tell_tries": 0, "tell_problem": ""}
        if not mine.filter(revision=self.revision).update(**done, is_held=is_to_be_held):
            mine.update(**done)  # paused or resumed since: told again
        return True

    def _tell(self, client: Client, is_to_be_held: bool) -> None:
        if not is_to_be_held and self.provider:
            self._resume_gates(client)
        if self.key:
            call = client.pause_flow_control if is_to_be_held else client.resume_flow_control
            call(self.key)
        elif self.queue:
            (client.pause_queue if is_to_be_held else client.resume_queue)(self.queue)

    def _resume_gates(self, client: Client) -> None:
        """Our own server stops a key without money at its gates; QStash knows no such call."""
        destination = get_provider(self.provider).destination
        try:
            client.resume_gates(urlsplit(destination).netloc.rpartition("@")[2] or destination)
        except ResponseError as error:
            if error.status not in {400, 404, 405}:
                raise


def _whole(scope: Mapping[str, str]) -> dict[str, Any]:
    return dict.fromkeys(SCOPE, "") | dict(scope)


_OPEN: dict[str, Any] = {
    "paused_at": None,
    "paused_until": None,
    "paused_by": "",
    "trouble": "",
    "reason": "",
}


def check_scope(scope: dict[str, str]) -> None:
    """Raise ``InvalidRequest`` unless it names something that requests may be of."""
    for name, value in scope.items():
        if name not in SCOPE:
            raise InvalidRequest(name, f"a lane has none; give {', '.join(SCOPE)}")
        column: Any = Lane._meta.get_field(name)
        most = column.max_length
        if not isinstance(value, str) or len(value) > most or clean_text(value) != value:
            raise InvalidRequest(name, f"give a text of at most {most} characters")
    if not any(scope.values()):
        raise InvalidRequest("provider", f"name at least one of {', '.join(SCOPE)}")
    if scope.get("provider"):
        known = sorted({*app_settings().providers, "upstash"})
        if scope["provider"] not in known:
            raise InvalidRequest(
                "provider", f"there is no {scope['provider']!r}; there are {', '.join(known)}"
            )
    if scope.get("queue"):
        try:
            check_name("queue", scope["queue"])
        except InvalidOption as error:
            raise InvalidRequest("queue", error.problem) from error


def _selecting(scopes: Iterable[tuple[str, ...]]) -> Q:
    """The requests of any of these scopes; those of the same shape in one list."""
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for scope in scopes:
        *others, (last, value) = [pair for pair in zip(SCOPE, scope, strict=True) if pair[1]]
        alike[(last, *others)].append(value)
    selected = Q()
    for (last, *others), values in alike.items():
        one = Q(**{f"{last}__in": _spellings(last, values)})
        for name, value in others:
            one &= Q(**{f"{name}__in": _spellings(name, [value])})
        selected |= one
    return selected


def _spellings(name: str, values: list[str]) -> list[str]:
    """What ``bulk_create`` left empty is the default's, which the outbox fills in."""
    conf = app_settings()
    default = {"provider": conf.default_provider, "model": conf.default_model}.get(name)
    return [*values, ""] if default in values else values


def _moment(moment: datetime | None) -> str:
    if moment is not None and timezone.is_aware(moment):
        moment = timezone.localtime(moment)
    return moment.isoformat(" ", "seconds") if moment else ""


# --- what callbacks teach ---------------------------------------------------------------------


def learn_from(receipts: Iterable[CallbackResponse], *, now: datetime | None = None) -> None:
    """Pause the lanes of what was refused to everybody, and learn limits from what was said of them.

    ``receipts``: callbacks of attempts, each with its ``llm_request``; others are passed over. Where
    nothing is to be learned nothing is written. Never raises for a receipt.
    """
    now = now or timezone.now()
    limits: dict[tuple[str, str, str], tuple[Limit, datetime]] = {}
    for receipt in receipts:
        # Learning is no reason not to announce what is in the others.
        try:
            llm_request = receipt.llm_request
            if llm_request is None or receipt.kind not in ("callback", "failure_callback"):
                continue
            using, at = receipt._state.db or "default", _answered_at(receipt)
            header = {name: values[0] for name, values in receipt.header.items() if values}
            reading = read(receipt.status, header, bytes(receipt.body), now=at.timestamp())
            if reading.trouble is not None and reading.trouble in app_settings().pause_on:
                with transaction.atomic(using=using):
                    _pause_for(reading, llm_request, using=using, at=at, now=now)
            if limit := _learnable(reading):
                way = (using, llm_request.provider, llm_request.model)
                limits[way] = max(
                    (limit, at), limits.get(way, (limit, at)), key=lambda told: told[1]
                )
        except Exception:
            logger.exception("Nothing could be learned from callback %s", receipt.pk)
    for (using, provider, model), (limit, at) in limits.items():
        try:
            with transaction.atomic(using=using):
                Lane.objects.using(using).learn(provider, model, limit, at=at)
        except Exception:
            logger.exception("The limit of %s, %s could not be written down", provider, model)


def _answered_at(receipt: CallbackResponse) -> datetime:
    """When the provider answered, which is soon after it was asked where it refused. A callback may
    come much later, or be found after hours."""
    for name, values in receipt.header.items():
        if name.lower() == "date" and values:
            with suppress(ValueError, OverflowError, IndexError):
                said = parsedate_to_datetime(values[0])
                said = said if said.tzinfo else said.replace(tzinfo=UTC)
                return min(
                    said if settings.USE_TZ else timezone.make_naive(said), receipt.received_at
                )
    return receipt.received_at


def _pause_for(
    reading: Reading, llm_request: LLMRequest, *, using: str, at: datetime, now: datetime
) -> None:
    lanes, provider, wait = Lane.objects.using(using), llm_request.provider, reading.wait
    least = app_settings().pause_from
    if reading.trouble is Trouble.MONEY:
        lanes._of(provider=provider).pause_for(reading, at=at, until=None, now=now)
    elif wait is not None and wait >= least and at + timedelta(seconds=wait) > now:
        until = at + timedelta(seconds=wait)
        for model in _sharing_its_limit(provider, llm_request.model):
            lane = lanes._of(provider=provider, model=model)
            lane.pause_for(reading, at=at, until=until, now=now)


def _sharing_its_limit(provider: str, model: str) -> tuple[str, ...]:
    with suppress(ConfigurationError, InvalidRequest):  # it has left the settings since
        return get_provider(provider).pace(model).models
    return (model,)


def _learnable(reading: Reading) -> Limit | None:
    """The limit of requests that QStash can keep: of the shortest period, as it is met first."""
    if app_settings().flow_control != "learned":
        return None
    fitting = [
        limit
        for limit in reading.limits
        if limit.dimension == "requests"
        and 1 <= (limit.limit or 0) < 2**31
        and 1 <= (limit.period or 0) <= LONGEST_PERIOD
    ]
    return min(fitting, key=lambda limit: limit.period or 0, default=None)
