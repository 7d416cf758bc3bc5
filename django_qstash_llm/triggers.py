"""Triggers: "when this model is saved, ask this, and put the answer there".

They live in an app's ``llm.py``, which is discovered like ``admin.py``::

    @register(Article)
    class Summarise(Trigger):
        answer_field = "summary"

        def condition(self, article, *, created):
            return not article.summary

        def messages(self, article):
            return [{"role": "user", "content": f"Summarise in two sentences:\\n\\n{article.body}"}]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, ClassVar, TypeVar

from django.db import connections, models, router, transaction
from django.db.models import F, Q
from django.db.models.signals import post_save
from django.utils import timezone

from .cleaning import clean_json, clean_text
from .conf import app_settings
from .exceptions import ConfigurationError
from .models import CallbackResponse
from .models.callback import CallbackResponseQuerySet
from .models.forgetting import changes_at_end
from .models.lane import learn_from
from .models.request import ANNOUNCED, CLAIM_SECONDS, LLMRequest, LLMRequestQuerySet, State
from .pricing import Estimate
from .signals import request_attempted, request_completed, request_failed

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]
TriggerClass = TypeVar("TriggerClass", bound="type[Trigger]")

_registry: dict[str, Trigger] = {}
_writing_back: ContextVar[frozenset[tuple[str, Any]]] = ContextVar(
    "_writing_back", default=frozenset()
)


class Trigger:
    """What to ask when a model is saved. Register it with ``@register(Model)``.

    Writing the answer back does not fire the same trigger again. It fires the others of that
    model, so that one may work on what another wrote: two without conditions would never stop.
    """

    model: ClassVar[str] = ""
    """The LLM's wire name; empty is ``DEFAULT_MODEL``."""
    provider: ClassVar[str] = ""
    """A name in ``PROVIDERS``; empty is ``DEFAULT_PROVIDER``."""
    answer_field: ClassVar[str] = ""
    """The field that the completion's text is written to, unless ``completed`` is overridden."""
    queue: ClassVar[str] = ""
    """Ask through this QStash queue, one after the other; empty publishes."""

    name: str = ""
    """``app.llm.Class``, by which rows remember who asked."""
    watched: type[models.Model]

    def condition(self, instance: Any, *, created: bool) -> bool:
        """Whether this save asks."""
        return True

    def messages(self, instance: Any) -> Sequence[Mapping[str, Any]]:
        """The chat messages to ask with."""
        raise NotImplementedError(f"{type(self).__name__} has to say which messages to ask with")

    def options(self, instance: Any) -> Mapping[str, Any]:
        """Further arguments of ``publish``: ``retries``, ``labels``, ``temperature``, …"""
        return {}

    def completed(self, instance: Any, llm_request: LLMRequest) -> None:
        """The answer is there. Runs in one transaction with the mark that it ran.

        Effects in the database happen once. For effects elsewhere use
        ``llm_request.idempotency_key``: after a crash this runs again. To change ``llm_request``
        itself save it with ``update_fields``: callbacks may write to it at the same time. An answer
        that a newer question about the same instance has overtaken is not written.
        """
        if self.answer_field and not llm_request.is_superseded():
            setattr(instance, self.answer_field, llm_request.completion)
            instance.save(update_fields=[self.answer_field])

    def failed(self, instance: Any, llm_request: LLMRequest) -> None:
        """No answer will come; ``llm_request.error`` says why. Same transaction as ``completed``."""

    @classmethod
    def estimate(cls, instances: models.QuerySet[Any]) -> Estimate:
        """What it may come to if each of ``instances`` were saved once more, as for a backfill: the
        condition decides which of them ask. Nothing is saved, and nobody asked."""
        trigger = next((each for each in _registry.values() if type(each) is cls), None)
        if trigger is None:
            raise ConfigurationError(f"{cls.__name__} is not registered: see @register.")
        total = Estimate()
        for instance in instances.iterator(chunk_size=500):
            if trigger.condition(instance, created=False):
                total += LLMRequest.objects.estimate(
                    list(trigger.messages(instance)), **trigger._asked(instance)
                )
        return total

    def _asked(self, instance: Any) -> dict[str, Any]:
        asked = {"model": self.model, "provider": self.provider, **self.options(instance)}
        return {**asked, "queue": self.queue} if self.queue else asked

    def ask(self, instance: Any, *, using: str) -> LLMRequest:
        """Write the request. The same question that is being answered already is not asked twice."""
        # As they will be stored, or the same question would not be known again.
        messages = clean_json(list(self.messages(instance)))
        asked = self._asked(instance)
        rows = LLMRequest.objects.using(router.db_for_write(LLMRequest, instance=instance))
        earlier = rows.filter(trigger=self.name).about(instance).unfinished()
        via = "enqueue" if self.queue else "publish"
        with _transactions(using, rows.db):
            # Two saves at once ask one after the other, so that the second sees the first's question.
            list(_locked(type(instance), instance.pk, using).values_list("pk"))
            same = next((row for row in earlier if row.messages == messages), None)
            if same is not None:
                return same
            # Asked before anybody read it: an answer to the older text would be paid for nothing.
            now = timezone.now()
            unsent = earlier.pending().filter(claim_token=None, first_tried_at=None)
            for row in earlier:
                unsent.filter(pk=row.pk).update(
                    state=State.CANCELLED, finished_at=now, **changes_at_end(row, now)
                )
            new: LLMRequest = getattr(rows, via)(
                messages, about=instance, trigger=self.name, **asked
            )
            return new


def register(model: type[models.Model]) -> Callable[[TriggerClass], TriggerClass]:
    """Let a ``Trigger`` watch ``model``. Raises ``ConfigurationError`` on a field it has not."""

    def decorate(trigger_class: TriggerClass) -> TriggerClass:
        name = f"{trigger_class.__module__}.{trigger_class.__qualname__}"
        field = trigger_class.answer_field
        if field and field not in {f.name for f in model._meta.concrete_fields}:
            raise ConfigurationError(
                f"{name}.answer_field: {model.__name__} has no field {field!r}."
            )
        trigger = trigger_class()
        trigger.name, trigger.watched = name, model
        _registry[name] = trigger

        def ask_when_saved(
            instance: models.Model, created: bool, raw: bool, using: str, **kwargs: Any
        ) -> None:
            if raw or (name, instance.pk) in _writing_back.get():
                return  # a fixture is being loaded, or this is the answer being written
            if trigger.condition(instance, created=created):
                trigger.ask(instance, using=using)

        # weak: nobody else holds on to the closure.
        post_save.connect(ask_when_saved, sender=model, weak=False, dispatch_uid=name)
        return trigger_class

    return decorate


def registered() -> list[Trigger]:
    """Every trigger there is."""
    return list(_registry.values())


# --- announcing ------------------------------------------------------------------------------


def unannounced(using: str, now: datetime | None = None) -> LLMRequestQuerySet:
    """Finished, and its trigger and receivers still to be told, or told again by now."""
    return LLMRequest.objects.using(using).filter(
        Q(announce_after=None) | Q(announce_after__lte=now or timezone.now()),
        announced_at=None,
        state__in=ANNOUNCED,
        announce_tries__lt=app_settings().announce_tries,
    )


def announce(using: str, *, limit: int = 500, clock: Clock = timezone.now) -> int:
    """Tell triggers and receivers of up to ``limit`` finished requests; answers how many."""
    with_nobody = _pass_over_those_that_nobody_waits_for(using, limit, clock())
    due = unannounced(using, clock()).order_by("id")
    keys = list(due.values_list("pk", flat=True)[:limit])
    return with_nobody + sum([_announce_one(using, pk, clock) for pk in keys])


def _pass_over_those_that_nobody_waits_for(using: str, limit: int, now: datetime) -> int:
    """Mark many at once as told where there is no trigger and no receiver to tell."""
    nobody = [state for state, signal in _SIGNALS.items() if not signal.has_listeners(LLMRequest)]
    if not nobody:
        return 0
    rows = unannounced(using, now).filter(trigger="", state__in=nobody)
    keys = list(rows.order_by("id").values_list("pk", flat=True)[:limit])
    return rows.filter(pk__in=keys).update(announced_at=now) if keys else 0


def _announce_one(using: str, pk: int, clock: Clock) -> bool:
    """Whether it was told, or failed to be."""
    llm_request = _claim(using, pk, clock())
    if llm_request is None:
        return False  # another worker is telling it, or has told it
    claimed = LLMRequest.objects.using(using).filter(
        pk=pk, announced_at=None, announce_after=llm_request.announce_after
    )
    tries = llm_request.announce_tries
    try:
        return _tell_once(llm_request, using, clock)
    # User code may raise anything, and the next request must be told all the same.
    except Exception as error:
        logger.exception("Announcing LLM request %s failed", pk)
        claimed.update(**_after_failing(error, tries, clock()))
    return True


def _after_failing(error: Exception, tries: int, now: datetime) -> dict[str, Any]:
    problem = app_settings().without_secrets(f"{type(error).__name__}: {error}")
    return {
        "announce_error": clean_text(problem, limit=2000),
        "announce_after": now + timedelta(seconds=5 * 4 ** (tries - 1)),
    }


def _claim(using: str, pk: int, now: datetime) -> LLMRequest | None:
    """The request, ours to tell until its ``announce_after``; None when it is another's.

    A claim and no lock: callbacks write to the row while a handler is at work. The try is counted
    before it is made, so that code that takes its worker down is tried no more often than code that
    raises.
    """
    until = now + timedelta(seconds=CLAIM_SECONDS)
    due = unannounced(using, now).filter(pk=pk)
    claimed = due.update(
        announce_tries=F("announce_tries") + 1,
        announce_after=until,
        announce_error=_NEVER_CAME_BACK,
    )
    rows = LLMRequest.objects.using(using).filter(pk=pk, announced_at=None, announce_after=until)
    return rows.first() if claimed else None


def _tell_once(llm_request: LLMRequest, using: str, clock: Clock) -> bool:
    """Whether this was the telling that counts: all that the user's code did and the mark that it
    was told are one transaction.

    The mark comes last, so that the row is locked for a moment only. It asks whether the same end
    is still untold and not whether the claim still holds: of two who tell it, because one took
    longer than its claim, the first to be done is the one.
    """
    rows = LLMRequest.objects.using(using).filter(pk=llm_request.pk)
    state = llm_request.state
    untold = rows.filter(announced_at=None, state=state, finished_at=llm_request.finished_at)
    home = _home_of(llm_request, using)
    # The user's first to be committed: what is not marked is told again, what is marked is not.
    with _transactions(using, home):
        _tell(llm_request, home)
        if untold.update(announced_at=clock(), announce_error=""):
            return True
        if llm_request.state != state or not rows.exists():
            return True  # retried from its dead letter or deleted, by the very code that was told
        for alias in {using, home}:
            transaction.set_rollback(True, using=alias)
    return False


def _home_of(llm_request: LLMRequest, using: str) -> str:
    """The database of what was asked about, where a router has put our rows into another."""
    trigger = _registry.get(llm_request.trigger)
    return router.db_for_write(trigger.watched) if trigger else using


@contextmanager
def _transactions(*aliases: str) -> Iterator[None]:
    """A transaction in each of these databases. The last one's is the first to be committed."""
    with ExitStack() as stack:
        for alias in dict.fromkeys(aliases):
            stack.enter_context(transaction.atomic(using=alias))
        yield


_SIGNALS = {State.COMPLETED: request_completed, State.FAILED: request_failed}
_NEVER_CAME_BACK = "Being told, or the worker that told it died over it."


def _tell(llm_request: LLMRequest, home: str) -> None:
    # Read before the trigger's own code may take the request further.
    state = State(llm_request.state)
    trigger = _registry.get(llm_request.trigger)
    if llm_request.trigger and trigger is None:
        # Another worker may know it, one of a newer version say: nobody has been told yet.
        raise ConfigurationError(
            f"No trigger {llm_request.trigger!r} is registered in this worker. Could its app's "
            "llm.py not be imported, or was it renamed or removed since it asked?"
        )
    instance = _locked_instance(trigger, llm_request, home) if trigger else None
    if trigger and instance is not None:
        with _write_back(trigger.name, instance.pk):
            tell = trigger.completed if state == State.COMPLETED else trigger.failed
            tell(instance, llm_request)
    _SIGNALS[state].send(LLMRequest, llm_request=llm_request)


def _locked_instance(trigger: Trigger, llm_request: LLMRequest, home: str) -> models.Model | None:
    """What was asked about; None when it has been deleted since."""
    return _locked(trigger.watched, llm_request.object_id, home).first()


def _locked(model: type[models.Model], pk: Any, using: str) -> models.QuerySet[models.Model]:
    """Locked against writing; rows that refer to it may come meanwhile, where the database can."""
    no_key = connections[using].features.has_select_for_no_key_update
    rows = model._base_manager.using(using).filter(pk=pk)
    return rows.select_for_update(of=("self",), no_key=no_key)


@contextmanager
def _write_back(name: str, pk: Any) -> Iterator[None]:
    token = _writing_back.set(_writing_back.get() | {(name, pk)})
    try:
        yield
    finally:
        _writing_back.reset(token)


# --- attempts ---


def unannounced_attempts(using: str, now: datetime | None = None) -> CallbackResponseQuerySet:
    """Receipts of attempts of which receivers are still to be told, or told again by now."""
    receipts: CallbackResponseQuerySet = CallbackResponse.objects.using(using).filter(
        Q(announce_after=None) | Q(announce_after__lte=now or timezone.now()),
        to_announce=True,
        announce_tries__lt=app_settings().announce_tries,
    )
    return receipts


def announce_attempts(using: str, *, limit: int = 500, clock: Clock = timezone.now) -> int:
    """Tell receivers of up to ``limit`` attempts, in the order they were heard of; answers of how
    many."""
    due = unannounced_attempts(using, clock()).order_by("id")
    keys = list(due.values_list("pk", flat=True)[:limit])
    # Before receivers and apart from them, whose errors are not theirs. They may hear of one twice.
    heard_of = CallbackResponse.objects.using(using).select_related("llm_request")
    learn_from(heard_of.filter(pk__in=keys).order_by("pk"), now=clock())
    for pk in keys:
        _announce_attempt(using, pk, clock)
    return len(keys)


def _announce_attempt(using: str, pk: int, clock: Clock) -> None:
    attempt = _claim_attempt(using, pk, clock())
    if attempt is None or attempt.llm_request is None:
        return
    untold = CallbackResponse.objects.using(using).filter(pk=pk, to_announce=True)
    claimed = untold.filter(announce_after=attempt.announce_after)
    try:
        _tell_of_attempt(attempt, attempt.llm_request, untold, using)
    # User code may raise anything, and the next attempt must be told all the same.
    except Exception as error:
        logger.exception("Announcing attempt %s failed", pk)
        claimed.update(**_after_failing(error, attempt.announce_tries, clock()))


def _claim_attempt(using: str, pk: int, now: datetime) -> CallbackResponse | None:
    """The receipt, ours to tell until its ``announce_after``, as a request is; None when it is
    another's, or has been told.

    QStash tells of the last attempt twice, in a callback and in a failure callback, and both may come
    at once: their request is locked while it is decided which of them is told.
    """
    receipts = CallbackResponse.objects.using(using)
    due = unannounced_attempts(using, now).filter(pk=pk)
    with transaction.atomic(using=using):
        receipt = due.defer("header", "body").first()
        if receipt is None:
            return None
        rows = LLMRequest.objects.using(using).select_for_update(of=("self",))
        receipt.llm_request = rows.filter(uuid=receipt.uuid).first()  # None: just deleted
        of_attempt = receipts.filter(
            source_message_id=receipt.source_message_id, retried=receipt.retried
        )
        if of_attempt.exclude(pk=pk).filter(announce_tries__gt=0).exists():
            due.update(to_announce=False)
            return None
        receipt.announce_tries += 1
        receipt.announce_after = now + timedelta(seconds=CLAIM_SECONDS)
        claimed = due.update(
            announce_tries=receipt.announce_tries,
            announce_after=receipt.announce_after,
            announce_error=_NEVER_CAME_BACK,
        )
    return receipt if claimed else None


def _tell_of_attempt(
    attempt: CallbackResponse,
    llm_request: LLMRequest,
    untold: models.QuerySet[CallbackResponse],
    using: str,
) -> None:
    """All that receivers do and the mark that they were told are one transaction."""
    home = _home_of(llm_request, using)
    with _transactions(using, home):
        request_attempted.send(LLMRequest, llm_request=llm_request, attempt=attempt)
        is_told = untold.update(to_announce=False, announce_error="")
        # Deleted by the very code that was told is told as well; otherwise another was the first.
        if not is_told and CallbackResponse.objects.using(using).filter(pk=attempt.pk).exists():
            for alias in {using, home}:
                transaction.set_rollback(True, using=alias)
