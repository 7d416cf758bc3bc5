"""``LLMRequest``: one thing asked of a model, from the asking to the answer."""

from __future__ import annotations

import difflib
import json
import math
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.contenttypes.fields import GenericForeignKey
from django.contrib.contenttypes.models import ContentType
from django.db import models, router, transaction
from django.db.models import Q
from django.dispatch import Signal
from django.utils import timezone
from django.utils.functional import Promise
from django.utils.translation import gettext_lazy as _

from .. import pricing
from ..cleaning import DEEPEST, WIDEST_INTEGER, clean_json, clean_text
from ..completions import Completion, Usage, read_usage
from ..conf import app_settings, qstash_client
from ..exceptions import IllegalState, InvalidRequest
from ..providers import get_provider
from ..qstash import (
    Accepted,
    FlowControl,
    InvalidOption,
    NotFound,
    Options,
    QStashError,
    Refused,
    ResponseError,
    TransportError,
)
from ..qstash.options import check_name, is_integer, is_number
from ..signals import request_completed, request_failed
from . import inbox
from .doorbell import Bell, ring_on_commit
from .forgetting import changes_at_end
from .ledger import LedgerEntry, Total
from .moments import aware

if TYPE_CHECKING:
    from ..chat import AsyncStream, Stream
    from ..pricing import Cost, Estimate, Line
    from .callback import CallbackResponse

LONGEST_TIMEOUT = 7200
"""Seconds: QStash waits two hours for an answer, and no longer."""
LONGEST_DELAY = 365 * 86_400
"""Seconds: the longest delay of any QStash plan."""
MOST_RETRIES = 100
COST_STEP = Decimal("1e-12")
"""USD: what the column of costs tells apart."""
RESERVED_LABEL = "llm-request-"
"""Labels that begin so are ours: by them a request is found again in QStash's logs."""
MOST_MESSAGES = 10_000
ROWS_AT_ONCE = 500
"""How many rows one statement writes or names."""
ABANDONED_AFTER = 60
"""Seconds after its last moment that a chat is taken for one whose process has died over it."""
CLAIM_SECONDS = 120
"""How long a claim of the outbox holds, and so how long a killed worker's rows wait for another."""


Changes = dict[str, Any]
"""Of a row: names of its fields, and what they are to be."""


class State(models.TextChoices):
    PENDING = "pending", _("pending")
    SUBMITTED = "submitted", _("submitted")
    COMPLETED = "completed", _("completed")
    FAILED = "failed", _("failed")
    CANCELLED = "cancelled", _("cancelled")


UNFINISHED = (State.PENDING, State.SUBMITTED)
ANNOUNCED = (State.COMPLETED, State.FAILED)


class Via(models.TextChoices):
    PUBLISH = "publish", _("publish")
    ENQUEUE = "enqueue", _("enqueue")
    BATCH = "batch", _("batch")
    CHAT = "chat", _("chat")


class CallerKind(models.TextChoices):
    """Who asked at the OpenAI-compatible endpoint: by what they were believed."""

    KEY = "key", _("API key")
    USER = "user", _("user")
    QSTASH = "qstash", _("QStash token")


_IS_UNPRICED = Q(Q(state=State.COMPLETED) | Q(input_tokens__isnull=False), cost=None)


class LLMRequestQuerySet(models.QuerySet["LLMRequest"]):
    # --- what there is ---

    def pending(self) -> Self:
        """Not handed to QStash yet."""
        return self.filter(state=State.PENDING)

    def submitted(self) -> Self:
        """With QStash; the answer is awaited."""
        return self.filter(state=State.SUBMITTED)

    def unfinished(self) -> Self:
        return self.filter(state__in=UNFINISHED)

    def completed(self) -> Self:
        return self.filter(state=State.COMPLETED)

    def failed(self) -> Self:
        return self.filter(state=State.FAILED)

    def cancelled(self) -> Self:
        return self.filter(state=State.CANCELLED)

    def finished(self) -> Self:
        return self.exclude(state__in=UNFINISHED)

    def overdue(self, now: datetime) -> Self:
        """Submitted, and nothing was heard of it for longer than it may take."""
        return self.submitted().filter(deadline_at__lte=now)

    def unpriced(self) -> Self:
        """Answered, and nobody can say what it cost. Also where the answer came to nothing."""
        return self.filter(_IS_UNPRICED)

    def about(self, instance: models.Model) -> Self:
        """Asked about this instance of any model."""
        content_type = ContentType.objects.db_manager(self.db).get_for_model(instance)
        return self.filter(content_type=content_type, object_id=str(instance.pk))

    def total(self) -> Total:
        """What was spent on these, of it what was useful, and how much of it is unpriced: the sum over
        their entries in the ledger, answers that came to nothing included."""
        return LedgerEntry.objects.using(self.db).of(self).total()

    def cost(self) -> Decimal | None:
        """USD spent on what is priced here; None when nothing is. See ``total`` and ``unpriced``."""
        return self.total().cost

    def by_day(self) -> list[tuple[date, Total]]:
        """The same for each day on which one of these was answered, in the site's time zone. Of very
        many ``Spend.objects.report("day")`` answers at once."""
        return LedgerEntry.objects.using(self.db).of(self).by_day()

    def unpriced_models(self) -> list[dict[str, Any]]:
        """Of what is ``unpriced`` the models, the most used first: ``provider``, ``model``,
        ``answered_by``, ``service_tier``, ``requests``, and of these ``counted``, whose tokens are known,
        so that a price would price them."""
        of = ("provider", "model", "answered_by", "service_tier")
        counted = self.unpriced().order_by().values(*of)
        numbers = {"requests": models.Count("pk"), "counted": models.Count("output_tokens")}
        return list(counted.annotate(**numbers).order_by("-requests", *of))

    def price_unpriced(self, *, is_rehearsal: bool = False) -> Iterator[tuple[LLMRequest, Cost]]:
        """Price what could not be priced when it was answered, at the prices of that moment; answers
        each with its cost. Nothing that has a cost is touched."""
        self._for_write = True  # for self.db: not the replica that reads would go to
        last = 0
        while rows := list(self.unpriced().filter(pk__gt=last).order_by("pk")[:ROWS_AT_ONCE]):
            last = rows[-1].pk
            for row in rows:
                cost = row.cost_by_now()
                if cost is not None and (is_rehearsal or row.take_late_cost(cost)):
                    yield row, cost

    # --- before asking ---

    def estimate(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> Estimate:
        """What ``publish`` with the same arguments (or ``enqueue``, with a ``queue``) may come to, in
        tokens and USD, at today's prices. Nothing is written, and nobody asked.

        Raises what ``publish`` raises.
        """
        refuse_via(asked)
        via = Via.ENQUEUE if asked.get("queue") else Via.PUBLISH
        llm_request = self.model.compose(via=via, messages=messages, **asked)
        llm_request.prepare()
        return llm_request.estimate()

    def lock(self, uuid: uuids.UUID) -> LLMRequest | None:
        """The request, locked until the transaction ends, without its long texts."""
        return inbox.lock(self.model, uuid, _WHAT_DECIDES, using=self.db)

    def look(self, uuid: uuids.UUID) -> LLMRequest | None:
        """The same without a lock, for ``inbox.store_at_once``."""
        return inbox.look(self.model, uuid, _WHAT_DECIDES, using=self.db)

    # --- asking ---

    def publish(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> LLMRequest:
        """Ask a model, durably: the row is written now, and submitted after the commit.

        ``messages``: chat messages, ``[{"role": "user", "content": "…"}]``. Keyword arguments:

        ``model``, ``provider``
            Wire name of the model; name of an entry in ``PROVIDERS``. Default: the settings'.
        ``about``, ``user``, ``tenant``, ``labels``, ``metadata``, ``conversation``
            What it belongs to: any saved instance, a user, a text, texts, a JSON object.
        ``delay`` (seconds or timedelta), ``not_before`` (aware datetime)
            When QStash may first call the provider.
        ``retries``, ``retry_delay`` (expression in ms, with ``retried``), ``timeout`` (seconds
            per attempt, at most 7200), ``flow_control`` (``FlowControl``), ``redact``
            How it is delivered.

        Every other keyword argument (``temperature``, ``max_completion_tokens``, …) is a parameter
        of the completion and goes to the provider under its own name.

        Raises ``InvalidRequest`` that names the argument, or ``ConfigurationError``.
        """
        return self._ask(Via.PUBLISH, messages, asked)

    def enqueue(
        self, messages: Sequence[Mapping[str, Any]], *, queue: str, **asked: Any
    ) -> LLMRequest:
        """Like ``publish``, but one after the other with all that is in the same ``queue``."""
        return self._ask(Via.ENQUEUE, messages, {**asked, "queue": queue})

    async def apublish(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> LLMRequest:
        """``publish`` for async code."""
        return await sync_to_async(self.publish)(messages, **asked)

    async def aenqueue(
        self, messages: Sequence[Mapping[str, Any]], *, queue: str, **asked: Any
    ) -> LLMRequest:
        """``enqueue`` for async code."""
        return await sync_to_async(self.enqueue)(messages, queue=queue, **asked)

    def chat(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> LLMRequest:
        """Ask a model and wait for its answer, without QStash; the completed request.

        The row is written before the provider is called, once. ``asked`` as for ``publish``, without
        what QStash does; ``timeout`` is for the whole answer, ``CHAT_TIMEOUT`` by default.

        Raises ``InvalidRequest`` that names the argument, ``ConfigurationError``, and ``ChatFailed``
        when no whole answer came, which the row then says as well. ``BudgetExceeded`` where a budget
        has no room for it; then there is no row.
        """
        # A stair that goes up: who is asked knows rows, and rows how to ask.
        from .. import chat

        return chat.complete(self.for_chat(messages, asked)).llm_request

    def stream(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> Stream:
        """The same as the answer comes: an iterator of ``streams.Chunk``, with ``llm_request``.

        Close it, or use it in a ``with``: who leaves early is not charged for the rest. Raises the
        same as ``chat``, also while it is iterated.
        """
        from .. import chat  # a stair that goes up, as above

        return chat.open_stream(self.for_chat(messages, asked))

    async def achat(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> LLMRequest:
        """``chat`` for async code."""
        from .. import chat  # a stair that goes up, as above

        llm_request = await sync_to_async(self.for_chat)(messages, asked)
        return (await chat.acomplete(llm_request)).llm_request

    async def astream(self, messages: Sequence[Mapping[str, Any]], **asked: Any) -> AsyncStream:
        """``stream`` for async code: ``async for chunk in await ….astream(…)``."""
        from .. import chat  # a stair that goes up, as above

        return await chat.aopen_stream(await sync_to_async(self.for_chat)(messages, asked))

    def for_chat(
        self, messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
    ) -> LLMRequest:
        """An unsaved request from the arguments of ``chat``. Raises ``InvalidRequest``."""
        self._for_write = True
        refuse_via(asked)
        for name in _NOT_FOR_CHAT:
            if asked.get(name) is not None:
                raise InvalidRequest(
                    name, "the Chat API calls the provider at once, without QStash; use publish"
                )
        if "stream" in asked:
            raise InvalidRequest("stream", "said by the method: chat or stream")
        llm_request = self.model.compose(via=Via.CHAT, messages=messages, **asked)
        llm_request._state.db = self.db
        return llm_request

    def _ask(self, via: Via, messages: Any, asked: Mapping[str, Any]) -> LLMRequest:
        app_settings().check_ready()
        self._for_write = True  # for self.db: not the replica that reads would go to
        refuse_via(asked)
        llm_request = self.model.compose(via=via, messages=messages, **asked)
        llm_request.save(using=self.db, force_insert=True)
        return llm_request


class OverTheWire:
    """What QStash is told of a request; shared by the row and by the outbox's excerpt of it."""

    if TYPE_CHECKING:
        uuid: Any
        labels: Any
        redact: Any
        flow_control: Any
        not_before: Any
        retries: Any
        retry_delay: Any
        timeout: Any
        submission_number: Any
        claimed_until: Any

    @property
    def claimed_at(self) -> datetime | None:
        if self.claimed_until is None:
            return None
        claimed_at: datetime = self.claimed_until - timedelta(seconds=CLAIM_SECONDS)
        return claimed_at

    @property
    def deduplication_id(self) -> str:
        return f"{self.uuid}-{self.submission_number}"

    @property
    def wire_label(self) -> str:
        """The label by which this request is found in QStash's logs and dead letters."""
        return f"{RESERVED_LABEL}{self.uuid}"

    def next_deadline(self, now: datetime) -> datetime:
        """When QStash is asked what became of it, unless something is heard of it before."""
        seconds = app_settings().deadline + (self.timeout or 0)
        return max(now, self.not_before or now) + timedelta(seconds=seconds)

    def options(
        self, headers: Mapping[str, str] | None = None, pace: FlowControl | None = None
    ) -> Options:
        """How QStash is to deliver it. ``headers`` are the provider's, with its key; ``pace`` is
        that of its lane, where it has no flow control of its own."""
        secret = tuple(f"header[{name}]" for name in headers or ())
        callback = Options(retries=app_settings().callback_retries)
        return Options(
            content_type="application/json",
            headers=headers or {},
            not_before=self.not_before and aware(self.not_before),
            retries=self.retries,
            retry_delay=self.retry_delay,
            timeout=self.timeout,
            callback=callback,
            failure_callback=callback,
            flow_control=FlowControl(**self.flow_control) if self.flow_control else pace,
            labels=tuple(self.labels),
            redact=(*secret, *(self.redact or ())),
        )


class LLMRequest(OverTheWire, models.Model):
    """One thing asked of a model."""

    uuid = models.UUIDField(_("uuid"), default=uuids.uuid4, unique=True, editable=False)
    state = models.CharField(_("state"), max_length=16, choices=State, default=State.PENDING)
    via = models.CharField(_("via"), max_length=16, choices=Via, default=Via.PUBLISH)
    trigger = models.CharField(_("trigger"), max_length=255, blank=True)

    # what is asked, of whom
    provider = models.CharField(_("provider"), max_length=64, blank=True)
    model = models.CharField(_("model"), max_length=255, blank=True)
    messages = models.JSONField(_("messages"), default=list)
    parameters = models.JSONField(_("parameters"), default=dict, blank=True)

    # what it belongs to
    # Every index of this table is paid for at every change of state, so those over what most rows
    # leave empty are partial (see Meta).
    content_type = models.ForeignKey(
        ContentType,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
        db_index=False,
    )
    object_id = models.CharField(_("object id"), max_length=255, blank=True)
    about = GenericForeignKey("content_type", "object_id")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_requests",
        db_index=False,
        verbose_name=_("user"),
    )
    tenant = models.CharField(_("tenant"), max_length=255, blank=True)
    labels = models.JSONField(_("labels"), default=list, blank=True)
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)
    batch = models.ForeignKey(
        "django_qstash_llm.Batch",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_requests",
        db_index=False,
        verbose_name=_("batch"),
    )
    conversation = models.ForeignKey(
        "django_qstash_llm.Conversation",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_requests",
        db_index=False,
        verbose_name=_("conversation"),
    )
    api_key = models.ForeignKey(
        "django_qstash_llm.ApiKey",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_requests",
        db_index=False,
        verbose_name=_("API key"),
        help_text=_("By which it was asked, at the OpenAI-compatible endpoint."),
    )
    caller = models.CharField(
        _("caller"),
        max_length=16,
        choices=CallerKind,
        blank=True,
        help_text=_("Who asked, at the OpenAI-compatible endpoint; empty is the project itself."),
    )
    resubmission_of = models.ForeignKey(
        "self",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="resubmissions",
        db_index=False,
        verbose_name=_("resubmission of"),
    )

    # how it is delivered
    queue = models.CharField(_("queue"), max_length=255, blank=True)
    not_before = models.DateTimeField(_("not before"), null=True, blank=True)
    retries = models.PositiveSmallIntegerField(_("retries"), null=True, blank=True)
    retry_delay = models.CharField(_("retry delay"), max_length=255, blank=True)
    timeout = models.PositiveIntegerField(
        _("timeout"), null=True, blank=True, help_text=_("Seconds.")
    )
    flow_control = models.JSONField(_("flow control"), default=dict, blank=True)
    redact = models.JSONField(_("redact"), default=list, blank=True)

    # the outbox
    submission_number = models.PositiveSmallIntegerField(_("submission number"), default=1)
    """With ``uuid`` the deduplication id: the same for every try of one submission."""
    submission_tries = models.PositiveIntegerField(_("submission tries"), default=0)
    first_tried_at = models.DateTimeField(_("first tried at"), null=True, blank=True)
    """When this submission may first have reached QStash; its deduplication window opens here."""
    submit_after = models.DateTimeField(_("submit after"), null=True, blank=True)
    claim_token = models.UUIDField(_("claim token"), null=True, blank=True, editable=False)
    claimed_until = models.DateTimeField(_("claimed until"), null=True, blank=True, editable=False)
    qstash_message_id = models.CharField(_("QStash message id"), max_length=255, blank=True)

    # the wait
    deadline_at = models.DateTimeField(
        _("deadline"),
        null=True,
        blank=True,
        help_text=_("When QStash is asked what became of it, unless it is heard of before."),
    )
    inquiries = models.PositiveSmallIntegerField(_("inquiries"), default=0)
    """How often QStash has been asked since it was last heard of."""

    # what came back
    attempts = models.PositiveIntegerField(_("attempts"), default=0)
    last_status = models.SmallIntegerField(
        _("last status"),
        null=True,
        blank=True,
        help_text=_("HTTP status of the last attempt; -1 is no response."),
    )
    dead_letter_id = models.CharField(_("dead letter"), max_length=255, blank=True)
    completion = models.TextField(_("completion"), blank=True)
    completion_id = models.CharField(_("completion id"), max_length=255, blank=True)
    answered_by = models.CharField(_("answered by"), max_length=255, blank=True)
    finish_reason = models.CharField(_("finish reason"), max_length=64, blank=True)
    refusal = models.TextField(_("refusal"), blank=True)
    tool_calls = models.JSONField(_("tool calls"), default=list, blank=True)
    input_tokens = models.BigIntegerField(_("input tokens"), null=True, blank=True)
    output_tokens = models.BigIntegerField(_("output tokens"), null=True, blank=True)
    cached_tokens = models.BigIntegerField(_("cached tokens"), null=True, blank=True)
    cache_write_tokens = models.BigIntegerField(_("cache write tokens"), null=True, blank=True)
    reasoning_tokens = models.BigIntegerField(_("reasoning tokens"), null=True, blank=True)
    usage = models.JSONField(_("usage"), default=dict, blank=True)
    cost = models.DecimalField(
        _("cost"),
        max_digits=20,
        decimal_places=12,
        null=True,
        blank=True,
        help_text=_("USD; empty is unknown."),
    )
    cost_source = models.CharField(_("cost source"), max_length=32, blank=True)
    cost_basis = models.JSONField(
        _("cost basis"),
        default=dict,
        blank=True,
        help_text=_("The price it was charged at, and what of."),
    )
    """``pricing.Cost.basis``."""
    service_tier = models.CharField(
        _("service tier"),
        max_length=64,
        blank=True,
        help_text=_("What it was answered as, which decides the price."),
    )
    error_code = models.CharField(_("error code"), max_length=64, blank=True)
    error = models.TextField(_("error"), blank=True)

    # telling
    announced_at = models.DateTimeField(_("announced at"), null=True, blank=True)
    announce_tries = models.PositiveSmallIntegerField(_("announce tries"), default=0)
    announce_after = models.DateTimeField(_("announce after"), null=True, blank=True)
    announce_error = models.TextField(_("announce error"), blank=True)

    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)
    submitted_at = models.DateTimeField(_("submitted at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    # what is no longer kept
    forgotten_at = models.DateTimeField(
        _("forgotten at"),
        null=True,
        blank=True,
        editable=False,
        help_text=_("Since when the texts that were asked and answered are not kept."),
    )
    digest = models.CharField(
        _("digest"),
        max_length=64,
        blank=True,
        editable=False,
        help_text=_("SHA-256 of the messages, where these are not kept."),
    )

    objects = LLMRequestQuerySet.as_manager()

    class Meta:
        verbose_name = _("LLM request")
        verbose_name_plural = _("LLM requests")
        ordering = ("-id",)
        indexes = (
            models.Index(fields=["state", "-id"], name="llm_request_state"),
            models.Index(
                fields=["content_type", "object_id", "-id"],
                name="llm_request_about",
                condition=Q(content_type__isnull=False),
            ),
            *(
                models.Index(
                    fields=[name],
                    name=f"llm_request_{name[:12]}",
                    condition=Q(**{f"{name}__isnull": False}),
                )
                for name in ("user", "batch", "conversation", "resubmission_of", "api_key")
            ),
            models.Index(
                fields=["tenant", "-id"], name="llm_request_tenant", condition=~Q(tenant="")
            ),
            # What is waiting is few among many: the outbox reads this one only.
            models.Index(fields=["id"], name="llm_request_pending", condition=Q(state="pending")),
            models.Index(
                fields=["id"],
                name="llm_request_unannounced",
                condition=Q(announced_at=None, state__in=["completed", "failed"]),
            ),
            models.Index(
                fields=["deadline_at"],
                name="llm_request_deadline",
                condition=Q(state="submitted"),
            ),
            models.Index(fields=["id"], name="llm_request_unpriced", condition=_IS_UNPRICED),
        )

    def __str__(self) -> str:
        return f"{self.model} · {self.get_state_display()} · {self.uuid}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        is_new = self._state.adding
        if is_new and self.state == State.PENDING:
            if self.via == Via.CHAT:
                raise InvalidRequest("via", "a chat is not saved to be asked: use chat or stream")
            self.prepare()
        super().save(*args, **kwargs)
        if is_new and self.state == State.PENDING:
            ring_on_commit(Bell.SUBMIT, self._state.db or "default")

    @classmethod
    def suppose(cls, *, using: str, **values: Any) -> LLMRequest:
        """A submitted request that nobody has looked at, for ``inbox.store_at_once``."""
        values |= {"state": State.SUBMITTED, "finished_at": None}
        # Whether anybody is to be told is asked when all is written.
        return inbox.suppose(cls, values, to_learn=("trigger",), using=using)

    @property
    def idempotency_key(self) -> str:
        """For effects outside the database: the same whenever this end of this request is told,
        which may be twice after a crash, and another for another end, as after
        ``retry_dead_letter``."""
        if self.finished_at is None:
            return f"{self.uuid}-{self.state}"
        # In UTC: the row that has just ended and the row as it is read again say the same.
        ended_at = aware(self.finished_at).astimezone(UTC)
        return f"{self.uuid}-{self.state}-{ended_at:%Y%m%dT%H%M%S.%f}"

    # --- asking ---

    @classmethod
    def compose(
        cls,
        *,
        messages: Any,
        via: Via = Via.PUBLISH,
        about: models.Model | None = None,
        delay: float | timedelta | None = None,
        flow_control: FlowControl | None = None,
        **asked: Any,
    ) -> Self:
        """An unsaved request from the arguments of ``publish``. ``save`` checks it."""
        names = {f.name for f in _askable_fields(cls)}
        fields = {name: asked.pop(name) for name in list(asked) if name in names}
        for name in ("user", "batch", "conversation"):
            check_saved(name, fields.get(name), cls)
        _check_words(asked)
        llm_request = cls(via=via, messages=messages, parameters=asked, **fields)
        if flow_control is not None:
            if not isinstance(flow_control, FlowControl):
                raise InvalidRequest("flow_control", "give a qstash.FlowControl(key=…, rate=…)")
            llm_request.flow_control = _flow_control_json(flow_control)
        if about is not None:
            if not isinstance(about, models.Model) or about.pk is None:
                raise InvalidRequest("about", "give a saved model instance")
            llm_request.about = about
        if delay is not None:
            if fields.get("not_before") is not None:
                raise InvalidRequest("delay", "give delay or not_before, not both")
            llm_request.not_before = timezone.now() + _as_delay(delay)
        return llm_request

    def prepare(self) -> None:
        """Fill in the defaults, and raise ``InvalidRequest`` unless this can be asked."""
        conf = app_settings()
        self.provider = self.provider or conf.default_provider
        self.model = self.model or conf.default_model
        if self.via == Via.CHAT:
            self.retries = 0
        else:
            self.retries = conf.retries if self.retries is None else self.retries
            self.timeout = conf.timeout if self.timeout is None else self.timeout
        _check_messages(self.messages)
        _check_parameters(self.parameters)
        self.messages = clean_json(self.messages)
        self.parameters = clean_json(self.parameters)
        if self.tenant == "":
            self.tenant = conf.tenant_of(self)
        self._check_belongings()
        self._check_delivery()
        if not isinstance(self.provider, str):
            raise InvalidRequest("provider", "give the name of an entry in QSTASH_LLM['PROVIDERS']")
        provider = get_provider(self.provider)
        if not isinstance(self.model, str) or clean_text(self.model, limit=255) != self.model:
            raise InvalidRequest("model", f"{str(self.model)[:80]!r} is not a model's name")
        provider.check_model(self.model)
        if self.via != Via.CHAT:
            self._check_size(conf.max_body_bytes)

    def _check_delivery(self) -> None:
        if self.via == Via.ENQUEUE and not self.queue:
            raise InvalidRequest("queue", "enqueue needs the name of a queue")
        if self.queue and self.via in (Via.PUBLISH, Via.CHAT):
            raise InvalidRequest("queue", "publish takes no queue; use enqueue(queue=…)")
        if self.queue and self.not_before:
            raise InvalidRequest("delay", "QStash delays no enqueued message; publish it instead")
        if not is_integer(self.retries) or not 0 <= (self.retries or 0) <= MOST_RETRIES:
            raise InvalidRequest("retries", f"{self.retries!r} is not between 0 and {MOST_RETRIES}")
        if isinstance(self.timeout, timedelta):
            self.timeout = self.timeout.total_seconds()
        if self.timeout is not None:
            if not is_number(self.timeout) or not 1 <= self.timeout <= LONGEST_TIMEOUT:
                raise InvalidRequest(
                    "timeout",
                    f"{self.timeout!r} is not between 1 and {LONGEST_TIMEOUT} seconds (2 hours)",
                )
            self.timeout = math.ceil(self.timeout)
        if self.not_before is not None:
            if not isinstance(self.not_before, datetime) or (
                settings.USE_TZ and timezone.is_naive(self.not_before)
            ):
                raise InvalidRequest("not_before", "give an aware datetime")
            if aware(self.not_before) > datetime.now(UTC) + timedelta(seconds=LONGEST_DELAY):
                raise InvalidRequest(
                    "not_before", "more than a year ahead, further than QStash keeps it"
                )
            if not settings.USE_TZ and timezone.is_aware(self.not_before):
                # Such a site's columns hold the local time.
                self.not_before = timezone.make_naive(
                    self.not_before, timezone.get_default_timezone()
                )
        if not isinstance(self.retry_delay, str) or len(self.retry_delay) > 255:
            raise InvalidRequest(
                "retry_delay", "give an expression in ms, a text of at most 255 characters"
            )
        if not isinstance(self.redact, list | tuple):
            raise InvalidRequest("redact", "give a list of 'body', 'header' or 'header[Name]'")
        try:
            self.options()
            if self.queue:
                check_name("queue", self.queue)
                if len(self.queue) > 255:
                    raise InvalidRequest("queue", "longer than 255 characters")
        except InvalidOption as error:
            raise InvalidRequest(error.field, error.problem) from error

    def _check_belongings(self) -> None:
        if not isinstance(self.tenant, str) or len(self.tenant) > 255:
            raise InvalidRequest("tenant", "give a text of at most 255 characters")
        if not isinstance(self.metadata, dict):
            raise InvalidRequest("metadata", "give a dictionary")
        if not isinstance(self.labels, list | tuple) or not all(
            isinstance(x, str) for x in self.labels
        ):
            raise InvalidRequest("labels", "give a list of texts")
        self.labels = list(self.labels)
        reserved = [label for label in self.labels if label.startswith(RESERVED_LABEL)]
        if reserved:
            raise InvalidRequest(
                "labels",
                f"{reserved[0]!r} begins with {RESERVED_LABEL!r}, which is reserved; choose another",
            )
        _check_json("metadata", self.metadata)
        self.metadata = clean_json(self.metadata)
        self.tenant = clean_text(self.tenant)

    def _check_size(self, limit: int) -> None:
        try:
            size = len(self.body())
        except (TypeError, ValueError) as error:
            raise InvalidRequest("messages", f"cannot be written as JSON: {error}") from error
        if size > limit:
            raise InvalidRequest(
                "messages",
                f"the request weighs {size} bytes and QStash would refuse it: MAX_BODY_BYTES is {limit}. "
                "Shorten it, or raise the setting if your plan allows more.",
            )

    def estimate(self, *, at: datetime | None = None) -> Estimate:
        """What it may come to, by the prices of ``at`` (now). See ``pricing.Estimate``."""
        conf = app_settings()
        return pricing.estimate(
            self.provider or conf.default_provider,
            self.model or conf.default_model,
            self.messages,
            self.parameters,
            at=at or timezone.now(),
        )

    # --- what it cost ---

    @property
    def counted(self) -> Usage:
        """What the provider counted, in all classes."""
        told = read_usage(self.usage)
        if told.is_known:
            return told
        names = ("input", "output", "cached", "cache_write", "reasoning")
        tokens = {f"{name}_tokens": getattr(self, f"{name}_tokens") for name in names}
        return replace(told, **tokens)

    @property
    def cost_lines(self) -> tuple[Line, ...]:
        """What its cost is made of; empty where the provider reported it, or it has none."""
        return pricing.read_basis(self.cost_basis)

    def cost_by_now(self) -> Cost | None:
        """What its answer cost by the prices of that moment as they are known by now."""
        cost = pricing.cost_of(
            self.provider,
            self.model,
            self.counted,
            at=self.finished_at or timezone.now(),
            answered_by=self.answered_by,
            service_tier=self.service_tier,
        )
        is_estimated = isinstance(self.usage, dict) and self.usage.get("estimated")
        return replace(cost, source="estimated") if cost and is_estimated else cost

    def take_late_cost(self, cost: Cost) -> bool:
        """Whether it had none and takes this one."""
        late = {"cost": cost.amount, "cost_source": cost.source, "cost_basis": cost.basis}
        using = self._state.db
        # It is the cost of these tokens: another answer may have come since they were looked at.
        counted = {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        rows = type(self).objects.using(using).filter(_IS_UNPRICED, pk=self.pk, **counted)
        with transaction.atomic(using=using):
            if not rows.update(**late):
                return False
            is_useful = self.state == State.COMPLETED
            entries = LedgerEntry.objects.using(using)
            entries.price(self, self.counted, cost, is_useful=is_useful, now=timezone.now())
        self._take_over(late)
        return True

    # --- asking at once ---

    def begin(self, *, now: datetime, seconds: float) -> None:
        """Write this prepared request down, before its provider is called for ``seconds`` at most.

        From its deadline on the sweep takes it for abandoned: who called has died over it.
        """
        from .budget import Budget  # a stair that goes up: who is held for knows what is held

        self.state, self.submitted_at, self.attempts = State.SUBMITTED, now, 1
        self.deadline_at = now + timedelta(seconds=seconds + ABANDONED_AFTER)
        using = self._state.db or router.db_for_write(type(self))
        budgets = Budget.objects.using(using)
        if not budgets.over_request(self).exists():
            inbox.insert(self, using=using)
            return

        def write() -> LLMRequest:
            inbox.insert(self, using=using)
            return self

        budgets.hold(write, now=now)

    def end(
        self,
        decide: Callable[[LLMRequest], Changes],
        bill: Callable[[LLMRequest, Changes], LedgerEntry | None],
    ) -> None:
        """Write what ``decide`` makes of this row, which who began it has known since: where it is
        not as it was, cancelled say, decided anew over what it is. With it what ``bill`` enters into
        the ledger of these changes."""
        changes = decide(self)
        using = self._state.db or "default"
        needed, entry = self.needed(changes), bill(self, changes)
        if inbox.update_in(self, State.SUBMITTED, needed, entry, using=using):
            self.become(changes)
            return
        rows, entries = type(self).objects.using(using), LedgerEntry.objects.using(using)
        with transaction.atomic(using=using):
            row = rows.lock(self.uuid)
            changes = decide(row) if row is not None else {}
            if row is not None and changes:
                row.write(changes)
            # Of a row that somebody has deleted as well: it was paid for.
            if entry := bill(row or self, changes):
                entries.correct(entry, now=timezone.now())
        if row is not None:
            self.refresh_from_db()

    # --- what goes over the wire ---

    def body(self) -> bytes:
        """What the provider is sent."""
        return get_provider(self.provider).body(self.model, self.messages, self.parameters)

    # --- what happens to it: each verb an update guarded by the state it leaves ---

    # What becomes of a row that ``lock`` has locked; ``write`` writes all of it in one statement.
    # Each is nothing where the state does not allow it, and so any order and number of callbacks
    # has the same end.

    def after_attempt(self, receipt: CallbackResponse) -> Changes:
        """One attempt at the provider is known. Later news of an earlier one changes nothing, and
        none those of the attempt that answered."""
        changes: Changes = {}
        if self.state == State.PENDING:
            # A callback proves that QStash has it, whatever became of our submission's answer.
            changes |= {"submitted_at": receipt.received_at, "submit_after": None}
            changes["state"] = State.SUBMITTED
        if self.state != State.COMPLETED and self.attempts <= receipt.retried:
            changes |= {"attempts": receipt.retried + 1, "last_status": receipt.status}
        if not self.qstash_message_id:
            changes["qstash_message_id"] = receipt.source_message_id
        deadline = self.next_deadline(receipt.received_at)
        # Not back, where a receipt of long ago is read again.
        if self.state in UNFINISHED and (self.deadline_at is None or self.deadline_at < deadline):
            changes |= {"deadline_at": deadline, "inquiries": 0}
        return changes

    def after_trouble(self, problem: str) -> Changes:
        """What a person should see while the request waits. Its state stays what it is."""
        if self.state not in UNFINISHED:
            return {}
        return {"error": app_settings().without_secrets(clean_text(problem), limit=2000)}

    def after_completion(
        self, completion: Completion, cost: Cost | None, *, now: datetime
    ) -> Changes:
        """The answer is there. It wins over a failure that was told before it."""
        if self.state not in (*UNFINISHED, State.FAILED):
            return {}
        return {
            "state": State.COMPLETED,
            **_answer(completion),
            "error_code": "",
            "error": "",
            **_spending(completion.usage, cost),
            **self._finished(now),
            **_NOT_ANNOUNCED,
        }

    def after_failure(self, code: str, error: str, *, now: datetime) -> Changes:
        """No answer will come, and why."""
        if self.state not in UNFINISHED:
            return {}
        return {
            "state": State.FAILED,
            **self.after_earlier_failure(code, error),
            **self._finished(now),
            **_NOT_ANNOUNCED,
        }

    def after_earlier_failure(self, code: str, error: str) -> Changes:
        """It has failed, and by an earlier attempt than was known: that one is its end."""
        return {
            "error_code": app_settings().without_secrets(clean_text(code), limit=64),
            "error": app_settings().without_secrets(clean_text(error), limit=10_000),
        }

    def after_breaking_off(
        self,
        state: State,
        code: str,
        error: str,
        completion: Completion,
        cost: Cost | None,
        *,
        now: datetime,
    ) -> Changes:
        """No whole answer came, and why: what came is kept, and what it cost."""
        if self.state not in UNFINISHED:
            return self.after_spending(completion.usage, cost)
        kept = {**_answer(completion), **_spending(completion.usage, cost)}
        return self.after_failure(code, error, now=now) | kept | {"state": state}

    def _finished(self, now: datetime) -> Changes:
        return {"finished_at": now, "deadline_at": None, **changes_at_end(self, now)}

    def after_spending(self, usage: Usage, cost: Cost | None) -> Changes:
        """What an answer cost that nobody will read. Changes no state, and nothing known: least of
        all beside the answer of another message."""
        is_known = self.cost is not None or self.input_tokens is not None
        if is_known or self.state == State.COMPLETED:
            return {}
        return _spending(usage, cost)

    def after_reading_anew(
        self, usage: Usage, cost: Cost | None, completion: Completion | None
    ) -> Changes:
        """The answer it has, read by mended code or at a new price: what is different now.

        Its state stays, and so does a known cost for which there is no price any more.
        """
        read = _spending(usage, cost)
        if self.state == State.COMPLETED and completion is not None and not self._is_purged:
            read |= _answer(completion)
        if cost is None and self.cost is not None:
            del read["cost"], read["cost_source"], read["cost_basis"]
        read = app_settings().without_secrets_in(read)
        changes = {name: each for name, each in read.items() if not self._is_now(name, each)}
        if not {"cost", "cost_source"} & changes.keys():
            changes.pop("cost_basis", None)  # it has been charged as it says
        return changes

    @property
    def _is_purged(self) -> bool:
        """Whether its answer was forgotten as well. Its messages alone are when it is finished."""
        is_empty = not (self.completion or self.refusal or self.tool_calls)
        return is_empty and self.forgotten_at not in (None, self.finished_at)

    def _is_now(self, name: str, value: Any) -> bool:
        now = getattr(self, name)
        if name != "cost" or now is None or value is None:
            return bool(now == value)
        return bool(abs(now - value) < COST_STEP)

    def write(self, changes: Changes) -> None:
        """Write down what has become of this locked row."""
        needed = self.needed(changes)
        inbox.update(self, needed, using=self._state.db or "default")
        self.become(changes)

    def needed(self, changes: Changes) -> Changes:
        """Of ``changes`` those that are any: what only an end writes is as it was at first in a row
        that has never ended."""
        if self.finished_at is not None:
            return changes
        return {name: each for name, each in changes.items() if not _is_at_first(name, each)}

    def become(self, changes: Changes) -> None:
        """They are written: be so, and have it announced where it is an end."""
        self._take_over(changes)
        if "announced_at" in changes and self._is_anybody_to_tell():
            ring_on_commit(Bell.ANNOUNCE, self._state.db or "default")

    def _is_anybody_to_tell(self) -> bool:
        """As far as this process knows; the sweep sees to the rest. A bell costs more than a row."""
        is_completed = self.state == State.COMPLETED
        signal = request_completed if is_completed else request_failed
        return bool(self.trigger) or is_heard(signal)

    def _take_over(self, changes: Changes) -> None:
        self.__dict__.update(changes)  # columns, and none that names another row

    def _change(self, states: Iterable[State], **changes: Any) -> bool:
        """Whether the row, which nobody has locked, was in one of ``states`` and is changed now."""
        rows = type(self).objects.using(self._state.db).filter(pk=self.pk, state__in=list(states))
        has_changed = bool(rows.update(**changes))
        if has_changed:
            self._take_over(changes)
        return has_changed

    def note_problem(self, problem: str) -> None:
        """What a person should see while the request waits. Its state stays what it is."""
        if changes := self.after_trouble(problem):
            self._change(UNFINISHED, **changes)

    def fail(self, code: str, error: str, *, now: datetime) -> bool:
        """No answer will come, and why. Whether it was unfinished until now."""
        changes = self.after_failure(code, error, now=now)
        has_changed = bool(changes) and self._change(UNFINISHED, **changes)
        if has_changed and self._is_anybody_to_tell():
            ring_on_commit(Bell.ANNOUNCE, self._state.db or "default")
        return has_changed

    def cancel(self, *, now: datetime | None = None) -> None:
        """Ask no more. An attempt that is in flight may still finish, and is not waited for.

        Raises ``IllegalState`` when the request is finished, and QStash's errors when it could
        not be told; then the request goes on.
        """
        self._cancel_at_qstash()
        finished = self._finished(now or timezone.now())
        if not self._change(UNFINISHED, state=State.CANCELLED, **finished):
            self.refresh_from_db(fields=["state"])
            raise IllegalState(
                f"{self.uuid} is {self.state}: only an unfinished request can be cancelled."
            )
        if not self.qstash_message_id:
            # Submitted a moment ago, perhaps. If it is being submitted now, the outbox sees to it.
            self.refresh_from_db(fields=["qstash_message_id"])
            if self.qstash_message_id:
                self._cancel_at_qstash()

    def _cancel_at_qstash(self) -> None:
        # Not found: delivered or given up a moment ago. What it says will not be waited for.
        with suppress(NotFound):
            if self.qstash_message_id:
                qstash_client().cancel_message(self.qstash_message_id)
            elif self.first_tried_at and self.claim_token is None:
                # Sent once, and the answer lost: QStash may have it under an id we do not know.
                qstash_client().cancel_messages_by(label=self.wire_label)

    def resubmit(self) -> LLMRequest:
        """Ask the same again, as a request of its own that names this one.

        Raises ``IllegalState`` while an answer may still come, to this one or to a resubmission.
        """
        rows = type(self).objects.using(self._state.db)
        with transaction.atomic(using=self._state.db):
            # Locked: two clicks on a button are one wish.
            original = rows.select_for_update(of=("self",)).get(pk=self.pk)
            if original.state in UNFINISHED:
                raise IllegalState(f"{self.uuid} is {original.state}: an answer may still come.")
            if original.forgotten_at and not original.messages:
                raise IllegalState(
                    f"{self.uuid} was forgotten on {original.forgotten_at:%Y-%m-%d}: its messages "
                    "are not kept, so it cannot be asked again."
                )
            underway = rows.unfinished().filter(resubmission_of=original).first()
            if underway is not None:
                raise IllegalState(f"{self.uuid} is being asked again already, as {underway.uuid}.")
            again = original._copy()
            again.save(using=self._state.db)
        return again

    def retry_dead_letter(self, *, now: datetime | None = None) -> None:
        """Have QStash try again what it gave up on, from its dead letters.

        The one way back, and a person's wish: a failed request is submitted once more, under a new
        message id, with its attempts counted anew, and announced once more when it ends. Raises
        ``IllegalState`` when it has not failed, has no known dead letter or is being asked again
        already; QStash's errors when it was refused, and then it is failed as before. After an
        error that ``is_ambiguous`` it stays submitted: QStash may be at it, so it must not be
        asked again before its deadline has found out. Until QStash has said yes it keeps its dead
        letter's id: should it turn out that nothing came of it, it can be retried from there.
        ``BudgetExceeded`` where a budget has no room for it; it stays failed.
        """
        client, now = qstash_client(), now or timezone.now()
        former = self._leave_dead_letter(now)
        try:
            answer = client.retry_dead_letter(former["dead_letter_id"])
        except QStashError as error:
            if isinstance(error, TransportError | ResponseError) and error.is_ambiguous:
                self.refresh_from_db()
                if not self.qstash_message_id:  # nor heard of since
                    doubt = f"Whether QStash retries its dead letter is not known: {error}"
                    self.note_problem(doubt)
                raise
            if isinstance(error, NotFound):
                former["dead_letter_id"] = ""  # retried or deleted elsewhere, or too old
            self._change([State.SUBMITTED], **former)
            raise
        if isinstance(answer, Refused):
            self._change([State.SUBMITTED], **former)
            raise IllegalState(
                f"{self.uuid}: QStash does not retry its dead letter: {answer.error}"
            )
        if isinstance(answer, Accepted):
            rows = type(self).objects.using(self._state.db).filter(pk=self.pk)
            rows.update(qstash_message_id=clean_text(answer.message_id, limit=255))
            # Unless it has failed again by now, and lies there under another id.
            rows.filter(dead_letter_id=former["dead_letter_id"]).update(dead_letter_id="")
        self.refresh_from_db()
        if self.state == State.CANCELLED:
            # While it was on its way, so that the one who cancelled knew no id to name.
            self._cancel_at_qstash()

    def _leave_dead_letter(self, now: datetime) -> Changes:
        """``failed -> submitted``, before QStash is told; answers what the row was."""
        rows = type(self).objects.using(self._state.db)
        from .budget import Budget  # a stair that goes up, as in begin

        changes: Changes = {}
        former: Changes = {}

        def write() -> LLMRequest:
            # Locked: two clicks on a button are one wish.
            row = rows.select_for_update(of=("self",)).get(pk=self.pk)
            if row.state != State.FAILED:
                raise IllegalState(f"{self.uuid} is {row.state}: only what failed is retried.")
            if not row.dead_letter_id:
                raise IllegalState(f"{self.uuid} has no known dead letter: resubmit it instead.")
            underway = rows.unfinished().filter(resubmission_of=row).first()
            if underway is not None:
                raise IllegalState(f"{self.uuid} is being asked again already, as {underway.uuid}.")
            changes.update(
                {
                    "state": State.SUBMITTED,
                    "qstash_message_id": "",
                    "submitted_at": now,
                    "deadline_at": row.next_deadline(now),
                    "inquiries": 0,
                    "attempts": 0,
                    "last_status": None,
                    "error_code": "",
                    "error": "",
                    "finished_at": None,
                    **_NOT_ANNOUNCED,
                }
            )
            former.update({name: getattr(row, name) for name in (*changes, "dead_letter_id")})
            rows.filter(pk=self.pk).update(**changes)
            return row

        Budget.objects.using(rows.db).hold(write, now=now)
        self._take_over(changes)
        return former

    def drop_dead_letter(self) -> None:
        """Delete it from QStash's dead letters: it is not to be retried from there.

        Raises ``IllegalState`` when it has no known dead letter or is being tried again from
        there, and QStash's errors when it could not be told.
        """
        self.refresh_from_db(fields=["state", "dead_letter_id"])
        dropped = self.dead_letter_id
        if self.state in UNFINISHED:
            raise IllegalState(f"{self.uuid} is {self.state}: an answer may still come.")
        if not dropped:
            raise IllegalState(f"{self.uuid} has no known dead letter.")
        # Not found: retried or deleted elsewhere, or too old.
        with suppress(NotFound):
            qstash_client().delete_dead_letter(dropped)
        rows = type(self).objects.using(self._state.db)
        rows.filter(pk=self.pk, dead_letter_id=dropped).update(dead_letter_id="")
        self.refresh_from_db(fields=["dead_letter_id"])

    def _copy(self) -> LLMRequest:
        copied = {f.attname: getattr(self, f.attname) for f in _askable_fields(type(self))}
        via, parameters = self.via, dict(self.parameters)
        if via == Via.CHAT:
            # Who waited for it is gone: what is asked again is asked durably.
            via, copied["retries"] = Via.PUBLISH, None
            parameters.pop("stream_options", None)
        return type(self)(
            **{**copied, "not_before": None},
            parameters=parameters,
            messages=self.messages,
            via=via,
            api_key_id=self.api_key_id,
            caller=self.caller,
            flow_control=self.flow_control,
            content_type_id=self.content_type_id,
            object_id=self.object_id,
            resubmission_of=self,
        )

    def announce_again(self) -> None:
        """Tell trigger and receivers anew, after they failed and were perhaps given up on.

        Raises ``IllegalState`` when there is nothing to tell, or it has been told.
        """
        rows = type(self).objects.using(self._state.db).filter(pk=self.pk, announced_at=None)
        if not rows.filter(state__in=ANNOUNCED).update(**_NOT_ANNOUNCED):
            self.refresh_from_db(fields=["state", "announced_at"])
            told = "has been announced" if self.announced_at else f"is {self.state}"
            raise IllegalState(f"{self.uuid} {told}: there is nothing to announce.")
        ring_on_commit(Bell.ANNOUNCE, self._state.db or "default")

    def is_superseded(self) -> bool:
        """Whether the same trigger has asked anew about the same thing since."""
        if not self.trigger or not self.object_id:
            return False
        # A resubmission is as old as what it repeats.
        asked: LLMRequest = self
        while asked.resubmission_of is not None:
            asked = asked.resubmission_of
        rows = type(self).objects.using(self._state.db).exclude(state=State.CANCELLED)
        return rows.filter(
            trigger=self.trigger,
            content_type_id=self.content_type_id,
            object_id=self.object_id,
            resubmission_of=None,
            pk__gt=asked.pk,
        ).exists()

    def answer_json(self) -> Any:
        """The completion read as JSON, for requests with a ``response_format``. Raises ``ValueError``."""
        return json.loads(self.completion)


def is_heard(signal: Signal) -> bool:
    """Whether anybody in this process listens to it. ``has_listeners`` looks for whom, under a lock."""
    return bool(signal.receivers) and signal.has_listeners(LLMRequest)


def _is_at_first(name: str, value: Any) -> bool:
    return not value and name in _WRITTEN_BY_ENDS and value != 0


def _answer(completion: Completion) -> Changes:
    return {
        "completion": completion.text,
        "completion_id": completion.id,
        "answered_by": completion.model,
        "finish_reason": completion.finish_reason,
        "refusal": completion.refusal,
        "tool_calls": completion.tool_calls,
        "service_tier": completion.service_tier,
    }


def _spending(usage: Usage, cost: Cost | None) -> Changes:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "usage": dict(usage.raw),
        "cost": cost and cost.amount,
        "cost_source": cost.source if cost else "",
        "cost_basis": cost.basis if cost else {},
    }


_NOT_ANNOUNCED: Changes = {
    "announced_at": None,
    "announce_tries": 0,
    "announce_after": None,
    "announce_error": "",
}
_WRITTEN_BY_ENDS = {
    "completion",
    "completion_id",
    "answered_by",
    "finish_reason",
    "refusal",
    "tool_calls",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "usage",
    "cost",
    "cost_source",
    "cost_basis",
    "service_tier",
    "error_code",
    *_NOT_ANNOUNCED,
}
_WHAT_DECIDES = (
    "id",
    "uuid",
    "state",
    "provider",
    "model",
    "trigger",
    "retries",
    "retry_delay",
    "timeout",
    "not_before",
    "attempts",
    "qstash_message_id",
    "input_tokens",
    "cost",
    "deadline_at",
    "finished_at",
    "conversation",
    "tenant",
    "user",
    "labels",
    "content_type",
    "api_key",
)
"""What the verbs of a locked row look at."""
_ASKABLE = (
    "provider",
    "model",
    "user",
    "tenant",
    "labels",
    "metadata",
    "batch",
    "conversation",
    "trigger",
    "queue",
    "not_before",
    "retries",
    "retry_delay",
    "timeout",
    "redact",
)
_NOT_FOR_CHAT = (
    "batch",
    "queue",
    "delay",
    "not_before",
    "retries",
    "retry_delay",
    "flow_control",
    "redact",
)
# Parameters of some provider that only look like an argument of ours.
_NOT_OURS = {"models", "label"}
# Words that mean something to us elsewhere; passed through they would be silently ignored.
_MISPLACED = {
    "label": "give labels=[…]",
    "callback": "the callback URL is ours: see CALLBACK_BASE_URL",
    "deduplication_id": "the deduplication id is ours: the request's uuid",
    "api_key": "keys are held in QSTASH_LLM['PROVIDERS'], never on a request",
    "base_url": "give provider=… and its BASE_URL in QSTASH_LLM['PROVIDERS']",
    "messages": "given twice",
    "parameters": "give each by itself, as in temperature=0.2",
    "state": "a request's state is not given but changed by its verbs",
}


def _askable_fields(cls: type[LLMRequest]) -> list[models.Field[Any, Any]]:
    return [cls._meta.get_field(name) for name in _ASKABLE]  # type: ignore[misc]


def _as_delay(delay: float | timedelta) -> timedelta:
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    if not is_number(seconds) or not 0 <= seconds <= LONGEST_DELAY:
        raise InvalidRequest(
            "delay", f"{delay!r} is not between 0 and a year: give seconds or a timedelta"
        )
    return timedelta(seconds=seconds)


def refuse_via(asked: Mapping[str, Any]) -> None:
    if "via" in asked:
        raise InvalidRequest(
            "via", "said by the method: publish, enqueue, chat, stream or Batch.objects.submit"
        )


def check_saved(name: str, value: Any, cls: type[models.Model]) -> None:
    """Refuse what the foreign key ``name`` of ``cls`` cannot hold, such as an AnonymousUser."""
    related: Any = cls._meta.get_field(name).related_model
    if value is not None and (not isinstance(value, related) or value.pk is None):
        raise InvalidRequest(name, f"give a saved {related.__name__}, or None")


def _check_json(name: str, value: Any, depth: int = 0) -> None:
    """Refuse what JSON cannot say: made into text it would be paid for and mean nothing."""
    if value is None or isinstance(value, str | bool | Promise):
        return
    if isinstance(value, int):
        if abs(value) >= WIDEST_INTEGER:
            raise InvalidRequest(name, "a number of more than 64 bits; give it as text")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(name, f"{value!r} is not a number of JSON")
    elif not isinstance(value, dict | list | tuple):
        kind = type(value).__name__
        raise InvalidRequest(name, f"{kind} is not JSON; give texts, numbers, lists, dictionaries")
    elif depth >= DEEPEST:
        raise InvalidRequest(name, f"nested more than {DEEPEST} levels deep")
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(name, f"the key {key!r} is not a text")
            _check_json(f"{name}.{key}", each, depth + 1)
    else:
        for index, each in enumerate(value):
            _check_json(f"{name}[{index}]", each, depth + 1)


def _flow_control_json(flow_control: FlowControl) -> dict[str, Any]:
    names = ("key", "parallelism", "rate", "period")
    return {name: value for name in names if (value := getattr(flow_control, name)) is not None}


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages", "give a list of at least one {'role': …, 'content': …}")
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequest("messages", f"{len(messages)} messages; {MOST_MESSAGES} at most")
    _check_json("messages", messages)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]", "not a dictionary with role and content")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InvalidRequest(
                f"messages[{index}].role", "missing; give 'system', 'user' or 'assistant'"
            )
        content = message.get("content")
        if content == "" and (message["role"] == "tool" or message.get("tool_calls")):
            continue  # a call that says nothing, or a tool that has nothing to say
        if content is None and message["role"] == "assistant" and len(message) > 1:
            continue  # a tool call, a refusal or audio stands in for the content
        if not isinstance(content, str | list | tuple | Promise) or not content:
            raise InvalidRequest(
                f"messages[{index}].content", "empty; give a text or a list of parts"
            )


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, dict):
        raise InvalidRequest("parameters", "give a dictionary")
    if parameters.get("stream"):
        raise InvalidRequest(
            "stream",
            "a durable request cannot stream: QStash delivers whole answers. "
            "Use the Chat API for streamed completions: LLMRequest.objects.stream(…).",
        )
    for name, value in parameters.items():
        _check_json(name, value, depth=1)


def _check_words(parameters: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that are none of ours and yet look like it. (A row's parameters may
    have any name: at the OpenAI-compatible endpoint ``user`` is one of the provider's.)"""
    for name in parameters:
        if name in _MISPLACED:
            raise InvalidRequest(name, f"not a parameter of a completion: {_MISPLACED[name]}")
        if name not in _NOT_OURS and (close := difflib.get_close_matches(name, _ASKABLE, 1, 0.8)):
            raise InvalidRequest(name, f"did you mean {close[0]!r}?")
