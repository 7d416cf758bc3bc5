"""``CallbackResponse``: the stored receipt of what QStash told us, and what it does to its request.

Receipt first, interpretation after: the row is evidence and survives the failure to read it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import UUID

from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, models, transaction
from django.db.models import F, Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_json, clean_text
from ..completions import Completion, Usage, decompress, is_gzip, read_completion
from ..conf import app_settings
from ..exceptions import IllegalState, UnreadableCompletion
from ..pricing import Cost, cost_of
from ..providers import provider_at
from ..qstash import Callback, EnvelopeError
from ..qstash.callback import without_source
from ..signals import request_attempted
from . import inbox
from .attempt import Attempt
from .doorbell import Bell, ring_on_commit
from .ledger import LedgerEntry
from .request import MOST_RETRIES, Changes, LLMRequest, State, is_heard

logger = logging.getLogger(__name__)

# What a response header may carry that is nobody's business.
DROPPED_HEADERS = {"set-cookie", "authorization", "proxy-authorization", "x-api-key", "cookie"}

# SQLite's driver and Django's fields refuse some of it before any database sees it.
UNSTORABLE = (DataError, IntegrityError, OverflowError, UnicodeError)
MOST_APPLY_TRIES = 10
"""More than an hour of tries. After them a person has to mend something."""

# The provider's URL and the model that answered -> the provider and the model that were asked when it
# last did. It saves a look and decides nothing: see ``suppose_request``.
_answered: dict[tuple[str, str], tuple[str, str]] = {}
_MOST_ANSWERED = 1000

# One less than the column takes: attempts are one more than retries.
_MOST_RETRIED = 2**31 - 2


class Kind(models.TextChoices):
    CALLBACK = "callback", _("callback")
    FAILURE_CALLBACK = "failure_callback", _("failure callback")
    QUARANTINED = "quarantined", _("quarantined")
    PING = "ping", _("ping")


_IS_UNAPPLIED = Q(
    applied_at=None, kind__in=["callback", "failure_callback"], llm_request__isnull=False
)


class CallbackResponseQuerySet(models.QuerySet["CallbackResponse"]):
    def quarantined(self) -> models.QuerySet[CallbackResponse]:
        """Signed by QStash, and unusable all the same."""
        return self.filter(kind=Kind.QUARANTINED)

    def orphaned(self) -> models.QuerySet[CallbackResponse]:
        """Signed by QStash, for a request that is not here (any more)."""
        return self.filter(llm_request=None).exclude(kind=Kind.PING)

    def unapplied(self, now: datetime) -> models.QuerySet[CallbackResponse]:
        """Stored, but reading it broke; by now to be tried again."""
        may_try = Q(apply_after=None) | Q(apply_after__lte=now)
        return self.filter(_IS_UNAPPLIED, may_try, apply_tries__lt=MOST_APPLY_TRIES)

    def receive(
        self,
        callback: Callback,
        *,
        uuid: UUID,
        message_id: str = "",
        key_index: int = 0,
        now: datetime,
        is_recovered: bool = False,
    ) -> CallbackResponse:
        """Store ``callback``, told about the request ``uuid``, and let it take effect once.

        The same one again only counts ``seen_count``. An answer where a failure is stored is not the
        same: it is kept as another attempt. Everything happens in one transaction. Where
        reading it breaks, which is a fault of ours, the receipt is stored all the same, to be read
        again: see ``unapplied``.
        """
        self._for_write = True  # for self.db: not the replica that reads would go to
        if is_gzip(callback.body):
            callback = replace(callback, body=_unpacked(callback.body))
        receipt = inbox.new(
            self.model,
            uuid=uuid,
            callback_message_id=clean_text(message_id, limit=255),
            received_at=now,
            verified_by_next_key=key_index == 1,
            is_recovered=is_recovered,
            **_kept_fields(callback),
        )
        try:
            return self._store(receipt, callback)
        except UNSTORABLE as error:
            of_message, told = self._of_message(receipt), None
            if isinstance(error, IntegrityError):
                told = of_message.filter(retried=receipt.retried).defer("header").first()
            if told is not None:
                if same := receipt.seen_among(told, of_message):
                    return same
                # Told of the first attempt, as an envelope is that does not say of which.
                numbers = set(of_message.values_list("retried", flat=True))
                free = next(number for number in itertools.count() if number not in numbers)
                note = f"told as attempt {receipt.attempt}, of which something else was told before"
                return self.receive(
                    replace(callback, retried=free, notes=(*callback.notes, note)),
                    uuid=uuid,
                    message_id=message_id,
                    key_index=key_index,
                    now=now,
                    is_recovered=is_recovered,
                )
            # Of the receipt or of what it means? The evidence goes first.
            logger.exception("A callback for %s took no effect", uuid)
            return self._store_unread(receipt, error)

    def _store(self, receipt: CallbackResponse, callback: Callback) -> CallbackResponse:
        if inbox.can_store_at_once(self.db) and self._store_at_once(receipt, callback):
            return receipt
        with transaction.atomic(using=self.db):
            # Locking the request puts the callbacks of one request in a row.
            receipt.llm_request = llm_request = LLMRequest.objects.using(self.db).lock(receipt.uuid)
            changes = receipt.read(callback, now=receipt.received_at)
            if llm_request is None:
                receipt.bill_orphan(callback, using=self.db)
            inbox.insert(receipt, using=self.db)
            if llm_request is not None and changes:
                llm_request.write(changes)
            if receipt.entry is not None:
                inbox.insert(receipt.entry, using=self.db)
            receipt.ring()
        return receipt

    def _store_at_once(self, receipt: CallbackResponse, callback: Callback) -> bool:
        """Whether nobody else has changed the request meanwhile, and all of it is written."""
        using = self.db
        unread = dict(receipt.__dict__)
        supposed = receipt.suppose_request(callback, using=using)
        if supposed is not None and self._store_read(receipt, callback, supposed):
            return True
        if supposed is not None:
            receipt.__dict__.update(unread)
        llm_request = LLMRequest.objects.using(using).look(receipt.uuid)
        if self._store_read(receipt, callback, llm_request):
            receipt.note_who_answered(callback)
            return True
        receipt.__dict__.update(unread)  # it was not read, after all
        return False

    def _store_read(
        self, receipt: CallbackResponse, callback: Callback, llm_request: LLMRequest | None
    ) -> bool:
        """Read it and write what it changes, unless ``llm_request`` is not so, or not so any more."""
        using, is_supposed = self.db, llm_request is not None and llm_request.pk is None
        # What ``receipt.llm_request = …`` comes to, asking no router.
        receipt.llm_request_id = llm_request.pk if llm_request else None
        receipt._state.fields_cache["llm_request"] = llm_request
        changes = receipt.read(callback, now=receipt.received_at)
        if llm_request is None:
            receipt.bill_orphan(callback, using=using)
        if is_supposed and changes.get("state") != State.COMPLETED:
            return False
        needed = llm_request.needed(changes) if llm_request else {}
        if not inbox.store_at_once(receipt, llm_request, needed, receipt.entry, using=using):
            return False
        if llm_request and changes:
            llm_request.become(changes)
        if is_supposed:
            # Who wants to know more of it looks.
            receipt._state.fields_cache.pop("llm_request", None)
        receipt.ring()
        return True

    def _of_message(self, receipt: CallbackResponse) -> Self:
        """What is stored of the same message, of each of its attempts."""
        return self.filter(source_message_id=receipt.source_message_id, kind=receipt.kind)

    def _store_unread(self, receipt: CallbackResponse, error: Exception) -> CallbackResponse:
        with transaction.atomic(using=self.db):
            receipt.pk = None
            receipt.llm_request = (
                LLMRequest.objects.using(self.db).filter(uuid=receipt.uuid).first()
            )
            receipt.put_off(error, now=receipt.received_at)
            receipt.save(using=self.db, force_insert=True)
        return receipt

    def quarantine(self, envelope: bytes, *, uuid: UUID, problem: str, now: datetime) -> None:
        """Keep a signed envelope that cannot be read, once, for a person to look at.

        Without what it repeats of the request: a key that was changed since nobody would know as
        one, and a prompt is kept where ``STORE_MESSAGES`` says, if anywhere.
        """
        self._for_write = True
        digest = hashlib.sha256(envelope).hexdigest()
        unpacked = _unpacked(envelope)
        # Nothing can be taken out of what cannot be unpacked, and nothing read.
        is_packed = is_gzip(unpacked)
        kept = b"" if is_packed else plain(without_source(unpacked))
        limit = app_settings().max_stored_body_bytes
        with transaction.atomic(using=self.db):
            receipt, is_new = self.get_or_create(
                source_message_id=f"sha256:{digest}",
                retried=0,
                kind=Kind.QUARANTINED,
                defaults={
                    "uuid": uuid,
                    "llm_request": LLMRequest.objects.using(self.db).filter(uuid=uuid).first(),
                    "received_at": now,
                    "body": kept[:limit],
                    "is_body_cut": is_packed or len(kept) > limit,
                    "problem": app_settings().without_secrets(clean_text(problem), limit=2000),
                },
            )
            if not is_new:
                self.filter(pk=receipt.pk).update(seen_count=F("seen_count") + 1)

    def apply_due(self, *, now: datetime, limit: int = 100) -> int:
        """Read again what could not be read and is due; answers how many were tried."""
        self._for_write = True
        receipts = list(self.unapplied(now).order_by("id")[:limit])
        for receipt in receipts:
            try:
                receipt.apply_again(now=now)
            except IllegalState as error:
                # It never will: a person sees it among the unread.
                receipts_ = self.filter(pk=receipt.pk)
                receipts_.update(apply_tries=MOST_APPLY_TRIES, problem=clean_text(str(error)))
            except UNSTORABLE as error:
                # Of what this one means, and not of the next.
                logger.exception("A callback for %s took no effect", receipt.uuid)
                receipt.put_off(error, now=now)
                late = {name: getattr(receipt, name) for name in _PUT_OFF}
                self.filter(pk=receipt.pk, applied_at=None).update(**late)
        return len(receipts)


class CallbackResponse(Attempt):
    """One thing QStash told us about one request."""

    uuid = models.UUIDField(_("request uuid"), editable=False, db_index=True)
    """From the callback's URL, and so signed."""
    llm_request = models.ForeignKey(
        LLMRequest,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="callback_responses",
        verbose_name=_("LLM request"),
    )
    kind = models.CharField(_("kind"), max_length=16, choices=Kind)
    source_message_id = models.CharField(_("QStash message id"), max_length=255)
    callback_message_id = models.CharField(
        _("callback's own message id"), max_length=255, blank=True
    )
    retried = models.PositiveIntegerField(_("retried"), default=0)
    max_retries = models.PositiveIntegerField(_("max retries"), default=0)
    status = models.SmallIntegerField(_("status"), default=-1, help_text=_("-1 is no response."))
    header = models.JSONField(_("response header"), default=dict, blank=True)
    body = models.BinaryField(_("response body"), default=b"", blank=True)
    is_body_cut = models.BooleanField(_("body cut"), default=False)
    dead_letter_id = models.CharField(_("dead letter"), max_length=255, blank=True)
    problem = models.TextField(_("problem"), blank=True)
    seen_count = models.PositiveIntegerField(_("seen"), default=1)
    verified_by_next_key = models.BooleanField(_("verified by next key"), default=False)
    is_recovered = models.BooleanField(
        _("recovered"),
        default=False,
        help_text=_("Found among QStash's dead letters or logs: it never arrived by itself."),
    )
    received_at = models.DateTimeField(_("received at"), default=timezone.now)

    # what it means, which may have to be read again
    applied_at = models.DateTimeField(
        _("applied at"), null=True, blank=True, help_text=_("When it took effect.")
    )
    apply_tries = models.PositiveSmallIntegerField(_("apply tries"), default=0)
    """How often reading it broke: a fault of ours, not of the callback's."""
    apply_after = models.DateTimeField(_("apply after"), null=True, blank=True)

    _read: tuple[Callback, Completion] | None = None
    """What was read, so that it is read once."""

    objects = CallbackResponseQuerySet.as_manager()

    entry: LedgerEntry | None = None
    """What reading it enters into the ledger: set by ``read``, and stored by who stores the rest."""

    class Meta:
        verbose_name = _("callback response")
        verbose_name_plural = _("callback responses")
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=["source_message_id", "retried", "kind"],
                name="callback_response_stored_once",
            ),
        )
        indexes = (
            models.Index(
                fields=["id"], name="callback_response_unapplied", condition=_IS_UNAPPLIED
            ),
            # What a person should look at is few among many.
            models.Index(
                fields=["received_at"],
                name="callback_response_quarantine",
                condition=Q(kind="quarantined"),
            ),
            models.Index(
                fields=["received_at"],
                name="callback_response_orphaned",
                condition=Q(llm_request=None),
            ),
            models.Index(
                fields=["received_at"],
                name="callback_response_next_key",
                condition=Q(verified_by_next_key=True),
            ),
            # What succeeded, which is nearly all, is in none of these.
            models.Index(
                fields=["trouble", "-id"],
                name="callback_response_trouble",
                condition=~Q(trouble=""),
            ),
            models.Index(
                fields=["id"], name="callback_response_to_announce", condition=Q(to_announce=True)
            ),
            models.Index(
                fields=["cancel_after"],
                name="callback_response_to_cancel",
                condition=Q(cancel_after__isnull=False),
            ),
        )

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.status} · {self.source_message_id}"

    @property
    def attempt(self) -> int:
        """1 is the first attempt."""
        return self.retried + 1

    @property
    def is_answer(self) -> bool:
        return self.kind == Kind.CALLBACK and 200 <= self.status < 300

    def seen_among(
        self, told: CallbackResponse, of_message: CallbackResponseQuerySet
    ) -> CallbackResponse | None:
        """Of what is stored of the same message the one that says the same, counted once more: ``told``,
        of the same attempt, or one of the others."""
        same: CallbackResponse | None = told
        if self._is_other_answer(told):
            others = of_message.exclude(pk=told.pk).defer("header", "body")
            same = next((each for each in others if not self._is_other_answer(each)), None)
        if same:
            type(self).objects.using(same._state.db).filter(pk=same.pk).update(
                seen_count=F("seen_count") + 1
            )
            same.seen_count += 1
        return same

    def _is_other_answer(self, stored: CallbackResponse) -> bool:
        """Whether this is an answer, and ``stored`` is not it."""
        if not self.is_answer or self.status != stored.status:
            return self.is_answer
        # What was cut or forgotten is taken for it.
        return not stored.is_body_cut and bytes(stored.body) != bytes(self.body)

    def suppose_request(self, callback: Callback, *, using: str) -> LLMRequest | None:
        """The request as it nearly always is when an answer comes: submitted, and asked for the same
        as the last one that was answered by this model from there. None where more has to be known,
        or nothing is.

        Then it need not be looked at. A wrong supposition is found out by the database, and costs
        a statement that writes nothing.
        """
        is_plain = callback.is_success and not callback.dlq_id and callback.max_retries is not None
        if not is_plain or not _answered or not inbox.can_suppose(using):
            return None
        # What else a request may lose when it ends depends on its messages.
        if app_settings().store_messages != "full":
            return None
        try:
            answered_by = self._completion(callback).model
        except UnreadableCompletion:
            return None
        asked = _answered.get((callback.url, answered_by))
        if asked is None:
            return None
        return LLMRequest.suppose(
            using=using,
            uuid=self.uuid,
            provider=asked[0],
            model=asked[1],
            qstash_message_id=self.source_message_id,
        )

    def note_who_answered(self, callback: Callback) -> None:
        """For ``suppose_request``."""
        llm_request = self.llm_request
        if llm_request is None or llm_request.finished_at != self.received_at:
            return
        if llm_request.state == State.COMPLETED:
            if len(_answered) >= _MOST_ANSWERED:
                forget_who_answered()
            asked = (llm_request.provider, llm_request.model)
            _answered[callback.url, llm_request.answered_by] = asked

    def _completion(self, callback: Callback) -> Completion:
        """Raises ``UnreadableCompletion``."""
        if self._read is None or self._read[0] is not callback:
            self._read = callback, read_body(callback.body)
        return self._read[1]

    def read(self, callback: Callback, *, now: datetime) -> Changes:
        """What ``callback`` changes about the locked ``llm_request``, and that it has been read.

        Changes nothing in the database. Never raises: what breaks is put off.
        """
        self.entry = None
        if (
            callback.max_retries is None
            and self.llm_request
            and self.llm_request.retries is not None
        ):
            # As many as we asked for. Taken for none, the first failure would be the end.
            self.max_retries = self.llm_request.retries
            callback = replace(callback, max_retries=self.max_retries)
        try:
            changes = self._effect(callback) if self.llm_request else {}
        # Whatever it is, the answer has been paid for: what broke is mended and this read again.
        except Exception as error:
            logger.exception("A callback for %s is stored, but could not be read", self.uuid)
            self.put_off(error, now=now)
            self.entry = None
            return {}
        if self.llm_request and self.applied_at is None:  # once, however often it is read
            self.to_announce = (
                bool(self.trouble)
                or is_heard(request_attempted)
                or (app_settings().flow_control == "learned" and _tells_limits(callback.header))
            )
            self.cancel_after = now if self.is_end and not callback.is_last else None
        self.applied_at, self.apply_after = now, None
        return changes

    def ring(self) -> None:
        """Wake a worker for what is to be done about it. Nothing is where the provider answered and
        nobody wants to know."""
        using = self._state.db or "default"
        if self.to_announce:
            ring_on_commit(Bell.ANNOUNCE, using)
        if self.cancel_after:
            ring_on_commit(Bell.CANCEL, using)

    def put_off(self, error: Exception, *, now: datetime) -> None:
        """Reading it broke. It will be tried again, later each time."""
        self.applied_at = None
        self.apply_tries = min(self.apply_tries + 1, 1000)
        self.apply_after = now + timedelta(
            seconds=min(3600.0, 10.0 * 2 ** min(self.apply_tries, 10))
        )
        self.problem = app_settings().without_secrets(
            clean_text(f"{type(error).__name__}: {error}"), limit=2000
        )

    def apply_again(self, *, now: datetime | None = None) -> bool:
        """Read the stored receipt once more, and whether that changed its request.

        For what could not be read, or was misread by code that has been mended since. Nothing is
        asked, and nothing paid, again. Raises ``IllegalState`` where there is nothing to read.
        """
        now = now or timezone.now()
        callback = self._kept_callback()
        receipts = type(self).objects.using(self._state.db)
        if self.kind == Kind.QUARANTINED:
            receipt = receipts.receive(callback, uuid=self.uuid, now=now)
            has_changed = receipt.applied_at == now
            if receipt.applied_at is not None:
                receipts.filter(pk=self.pk).update(applied_at=now)
                self.applied_at = now
            return has_changed and receipt.llm_request_id is not None
        with transaction.atomic(using=self._state.db):
            self.llm_request = LLMRequest.objects.using(self._state.db).lock(self.uuid)
            # Another worker may have read it first.
            self.refresh_from_db(using=self._state.db, fields=["applied_at"])
            is_first_time = self.applied_at is None
            changes = self.read(callback, now=now)
            read = (*_READ, *_TO_DO) if is_first_time else _READ
            self.save(using=self._state.db, update_fields=read)
            if self.llm_request is not None and changes:
                self.llm_request.write(changes)
            if self.entry is not None:
                entries = LedgerEntry.objects.using(self._state.db)
                entries.correct(self.entry, now=now)
            if is_first_time:
                self.ring()
        return bool(changes)

    def anew(self, llm_request: LLMRequest) -> Changes:
        """What this answer of ``llm_request`` would change about it if it came today; ``entry`` is
        what it would enter into the ledger.

        Of a completed request only the answer that completed it may, of others only one that was
        counted, and then only what it cost. Raises ``IllegalState`` where it is no such answer, or
        cannot be read.
        """
        if not self.is_answer or llm_request.uuid != self.uuid:
            raise IllegalState("It is no answer to this request.")
        completion = None
        try:
            completion = read_body(self._kept_callback().body)
            usage = completion.usage
        except UnreadableCompletion as error:
            if llm_request.state == State.COMPLETED or not error.usage:
                raise IllegalState(str(error)) from error
            usage = error.usage
        if llm_request.state == State.COMPLETED:
            is_source = self.received_at == llm_request.finished_at
        else:
            counted = (llm_request.input_tokens, llm_request.output_tokens)
            is_source = usage.is_known and counted == (usage.input_tokens, usage.output_tokens)
        if not is_source:
            raise IllegalState("It is another answer than the one that was counted.")
        told = (completion.model, completion.service_tier) if completion else ()
        cost = self._cost(llm_request, usage, *told)
        is_useful = llm_request.state == State.COMPLETED
        billed = cost
        if cost is None and llm_request.cost is not None:
            billed = Cost(llm_request.cost, llm_request.cost_source)  # the request keeps it, too
        self._bill(llm_request, usage, billed, is_useful=is_useful)
        return llm_request.after_reading_anew(usage, cost, completion)

    def _kept_callback(self) -> Callback:
        """The callback again, from what was kept of it."""
        if self.is_body_cut:
            raise IllegalState(
                "Its body was cut at MAX_STORED_BODY_BYTES, or forgotten: it cannot be read again."
            )
        if self.kind == Kind.PING:
            raise IllegalState("A ping says nothing about a request.")
        body = bytes(self.body)
        if self.kind == Kind.QUARANTINED:
            try:
                return Callback.from_json(decompress(body))
            except (EnvelopeError, UnreadableCompletion) as error:
                raise IllegalState(f"Still not an envelope: {error}") from error
        return Callback(
            status=self.status,
            header=self.header,
            body=body,
            retried=self.retried,
            max_retries=self.max_retries,
            source_message_id=self.source_message_id,
            dlq_id=self.dead_letter_id,
        )

    def _effect(self, callback: Callback) -> Changes:
        """Any order of callbacks has the same end."""
        llm_request = self.llm_request
        assert llm_request is not None
        if not callback.is_success:
            self._read_trouble(llm_request, callback)
            if self._is_of_the_past(llm_request):
                return {}
        changes = llm_request.after_attempt(self)
        if callback.is_success:
            return changes | self._completed(llm_request, callback)
        if callback.is_failure_callback and llm_request.state == State.COMPLETED:
            self._note_at_first(_GIVEN_UP_AFTER_THE_ANSWER)
        if self.is_end:
            return changes | self._failed(llm_request, callback)
        if "attempts" in changes:  # the latest known: any order ends the same
            return changes | llm_request.after_trouble(self._words())
        return changes

    def _read_trouble(self, llm_request: LLMRequest, callback: Callback) -> None:
        body, expression = plain(callback.body), llm_request.retry_delay
        self.read_trouble(callback, body, at=self.received_at, expression=expression)

    def _is_of_the_past(self, llm_request: LLMRequest) -> bool:
        """Whether its message was given up before, and the request retried under another id since."""
        if self.source_message_id == llm_request.qstash_message_id:
            return False
        receipts = type(self).objects.using(llm_request._state.db)
        given_up = receipts.filter(
            source_message_id=self.source_message_id, kind=Kind.FAILURE_CALLBACK
        )
        return given_up.exclude(applied_at=None).exists()

    def _note(self, words: str) -> None:
        if words not in self.problem:  # as it is when it was read before
            self.problem = clean_text("; ".join(filter(None, (self.problem, words))))

    def _note_at_first(self, words: str) -> None:
        """The same about what was known before. Once it has taken effect it is itself part of that."""
        if self.applied_at is None:
            self._note(words)

    def _completed(self, llm_request: LLMRequest, callback: Callback) -> Changes:
        if llm_request.state == State.COMPLETED:
            self._note_at_first(_ANOTHER_ANSWER)
        try:
            completion = self._completion(callback)
        except UnreadableCompletion as error:
            self._note(str(error))
            self._read_trouble(llm_request, callback)
            words = self._with_remedy(str(error))
            changes = llm_request.after_failure(error.code, words, now=self.received_at)
            if error.usage:
                cost = self._cost(llm_request, error.usage)
                changes |= llm_request.after_spending(error.usage, cost)
                self._bill(llm_request, error.usage, cost, is_useful=False)
            return without_secrets(changes)
        cost = self._cost(llm_request, completion.usage, completion.model, completion.service_tier)
        completed = llm_request.after_completion(completion, cost, now=self.received_at)
        is_read_again = self.received_at == llm_request.finished_at
        self._bill(llm_request, completion.usage, cost, is_useful=bool(completed) or is_read_again)
        if not completed:
            # Cancelled in the meantime: nobody reads the answer, and it has to be paid for.
            return without_secrets(llm_request.after_spending(completion.usage, cost))
        if llm_request.state == State.FAILED:
            self._note_at_first(_ANSWER_AFTER_A_FAILURE)
        # Whatever else was told, of whichever message: this is the attempt that answered.
        attempt = {"attempts": self.attempt, "last_status": self.status}
        return without_secrets(completed) | attempt

    def _bill(
        self, llm_request: LLMRequest, usage: Usage, cost: Cost | None, *, is_useful: bool
    ) -> None:
        self.entry = LedgerEntry.of_answer(
            llm_request,
            answer=self.answer,
            usage=usage,
            cost=cost,
            at=self.received_at,
            is_useful=is_useful,
        )

    def bill_orphan(self, callback: Callback, *, using: str) -> None:
        """An answer to a request that is not here, deleted while it was under way say, is paid for
        like any other. What is left to know of it is where it was asked, and of which model."""
        try:
            if self.is_answer:
                self._bill_orphan(callback, using)
        except (DatabaseError, InterfaceError):
            raise
        # Whatever it is: the receipt is stored first.
        except Exception as error:
            logger.exception("An answer to %s, which is not here, could not be billed", self.uuid)
            self.entry = None
            self._note(f"not in the ledger: {type(error).__name__}")

    def _bill_orphan(self, callback: Callback, using: str) -> None:
        answered_by, tier = "", ""
        try:
            completion = self._completion(callback)
            usage, answered_by, tier = completion.usage, completion.model, completion.service_tier
        except UnreadableCompletion as error:
            if not error.usage:
                return
            usage = error.usage
        model = clean_text(callback.asked_model) or answered_by
        asked = inbox.new(
            LLMRequest,
            uuid=self.uuid,
            provider=provider_at(callback.url),
            model=app_settings().without_secrets(model, limit=255),
        )
        cost = self._cost(asked, usage, answered_by, tier)
        self._bill(asked, usage, cost, is_useful=False)
        if self._is_billed(using):
            self.entry = None

    def _is_billed(self, using: str) -> bool:
        """Told before its request was deleted, and its receipt with it; perhaps as another attempt,
        as one is that the dead letters told of."""
        assert self.entry is not None
        same = Q(input_tokens=self.entry.input_tokens, output_tokens=self.entry.output_tokens)
        of_message = Q(answer__startswith=f"{self.source_message_id}.") & same
        entries = LedgerEntry.objects.using(using).filter(uuid=self.uuid)
        return entries.filter(Q(answer=self.answer) | of_message).exists()

    @property
    def answer(self) -> str:
        """By which the ledger knows what it says."""
        return f"{self.source_message_id}.{self.retried}"

    def _cost(
        self, llm_request: LLMRequest, usage: Usage, answered_by: str = "", tier: str = ""
    ) -> Cost | None:
        return cost_of(
            llm_request.provider,
            llm_request.model,
            usage,
            at=self.received_at,
            answered_by=answered_by,
            service_tier=tier,
        )

    def _failed(self, llm_request: LLMRequest, callback: Callback) -> Changes:
        code = self.code or (self.trouble if self.remedy else f"http_{self.status}")
        code = "no_response" if self.status < 0 else code
        words = self._with_remedy(self._words())
        changes = llm_request.after_failure(code, words, now=self.received_at)
        if not changes and self._is_earlier_end(llm_request):
            changes = llm_request.after_earlier_failure(code, words)
        if callback.dlq_id:
            changes["dead_letter_id"] = self.dead_letter_id
        return changes

    def _is_earlier_end(self, llm_request: LLMRequest) -> bool:
        """Whether its message came to an end later than this one, which was told before.

        What is not to be tried again is an end, and QStash may have tried it meanwhile all the same.
        """
        if llm_request.state != State.FAILED:
            return False
        receipts = type(self).objects.using(llm_request._state.db)
        of_message = receipts.filter(
            source_message_id=self.source_message_id, llm_request=llm_request
        )
        ends = of_message.filter(_IS_END).exclude(applied_at=None)
        first = ends.order_by("retried").values_list("retried", flat=True).first()
        return first is not None and self.retried < first

    def _words(self) -> str:
        """What the provider said, and when."""
        words = self.words
        if not words and self.status < 0:
            words = "the provider did not answer"
        attempts = f"after {self.attempt} attempt{'s' * (self.attempt > 1)}"
        return f"{words or f'the provider answered {self.status}'} ({attempts})"

    def _with_remedy(self, words: str) -> str:
        return f"{words.rstrip('.')}. {self.remedy}" if self.remedy else words


# A 200 that came to nothing is one as well.
_IS_END = (~Q(trouble="") & Q(next_try_at=None)) | Q(status__gte=200, status__lt=300)
# What reading a receipt again may change about it.
_READ = (
    *("applied_at", "apply_tries", "apply_after", "problem", "llm_request"),
    *("trouble", "code", "words", "wait", "wait_source", "next_try_at", "delayed_by"),
)
_PUT_OFF = ("apply_tries", "apply_after", "problem")
# And what has to be done about it once. Later these are other workers' to write.
_TO_DO = ("to_announce", "cancel_after")
_ANSWER_AFTER_A_FAILURE = "The request had failed before this answer came: the answer counts."
_GIVEN_UP_AFTER_THE_ANSWER = "QStash gave a message of this request up, and the request has been answered: the answer counts."
_ANOTHER_ANSWER = (
    "The request was completed before by another answer. This one is paid for as well: it is in the "
    "ledger, and neither used nor part of the request's cost."
)


def forget_who_answered() -> None:
    """Suppose nothing of the next request that is answered: see ``suppose_request``."""
    _answered.clear()


def _tells_limits(header: Mapping[str, Any]) -> bool:
    return any("ratelimit-limit" in name.lower() for name in header)


def _kept_fields(callback: Callback) -> dict[str, Any]:
    """What is kept of a callback. ``source_header`` carries the provider's key and is not."""
    conf = app_settings()
    limit = conf.max_stored_body_bytes
    body = plain(callback.body)
    header = {
        name: values
        for name, values in callback.header.items()
        if name.lower() not in DROPPED_HEADERS
    }
    if conf.may_hold_secrets(header):
        header = {
            conf.without_secrets(name): [conf.without_secrets(value) for value in values]
            for name, values in header.items()
        }
    return {
        "source_message_id": clean_text(callback.source_message_id, limit=255),
        "retried": min(callback.retried, _MOST_RETRIED),
        "kind": Kind.FAILURE_CALLBACK if callback.is_failure_callback else Kind.CALLBACK,
        "status": callback.status,
        "max_retries": min(
            MOST_RETRIES if callback.max_retries is None else callback.max_retries, _MOST_RETRIED
        ),
        "header": clean_json(header),
        "body": body[:limit],
        "is_body_cut": len(body) > limit,
        "dead_letter_id": clean_text(callback.dlq_id, limit=255),
        "problem": conf.without_secrets(clean_text("; ".join(callback.notes)), limit=2000),
    }


def _unpacked(content: bytes) -> bytes:
    with suppress(UnreadableCompletion):
        return decompress(content)
    return content


def plain(content: bytes) -> bytes:
    """``content`` unpacked where it is gzip, and without our keys, which some send back.

    For what is kept or quoted. A completion is read from what came: blacking out may hit what is no
    key, and break a number.
    """
    # Latin-1 is the one encoding in which every byte is a character, and our keys are ASCII.
    return app_settings().without_secrets(_unpacked(content).decode("latin-1")).encode("latin-1")


def read_body(body: bytes) -> Completion:
    """Raises ``UnreadableCompletion``, which quotes no key of ours, nor a piece of one."""
    with suppress(UnreadableCompletion):
        return read_completion(body)
    return read_completion(plain(body))


def without_secrets(changes: Changes) -> Changes:
    conf = app_settings()
    # What is no text takes the longest to write out, and holds none.
    texts = [value for value in changes.values() if type(value) is str]
    nested = [value for value in changes.values() if type(value) in (dict, list)]
    if not conf.may_hold_secrets("\n".join(texts)) and not conf.may_hold_secrets(nested):
        return changes
    return {name: conf.without_secrets_in(value) for name, value in changes.items()}
