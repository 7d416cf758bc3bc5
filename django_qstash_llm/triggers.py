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
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from django.db import connections, models, router, transaction
from django.db.models import F, Q
from django.db.models.signals import post_save
from django.utils import timezone

from .cleaning import clean_json, clean_text
from .conf import app_settings
from .exceptions import ConfigurationError
from .models.request import ANNOUNCED, LLMRequest, LLMRequestQuerySet, State
from .signals import request_completed, request_failed

logger = logging.getLogger(__name__)

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

        Effects in the database happen once. For effects elsewhere use ``llm_request.uuid`` as
        idempotency key: after a crash this runs again. An answer that a newer question about the
        same instance has overtaken is not written.
        """
        if self.answer_field and not llm_request.is_superseded():
            setattr(instance, self.answer_field, llm_request.completion)
            instance.save(update_fields=[self.answer_field])

    def failed(self, instance: Any, llm_request: LLMRequest) -> None:
        """No answer will come; ``llm_request.error`` says why. Same transaction as ``completed``."""

    def ask(self, instance: Any, *, using: str) -> LLMRequest:
        """Write the request. The same question that is being answered already is not asked twice."""
        # As they will be stored, or the same question would not be known again.
        messages = clean_json(list(self.messages(instance)))
        asked = {"model": self.model, "provider": self.provider, **self.options(instance)}
        rows = LLMRequest.objects.using(router.db_for_write(LLMRequest, instance=instance) or using)
        earlier = rows.filter(trigger=self.name).about(instance).unfinished()
        via = "enqueue" if self.queue else "publish"
        if self.queue:
            asked["queue"] = self.queue
        with transaction.atomic(using=rows.db):
            # Two saves at once ask one after the other, so that the second sees the first's question.
            watched = type(instance)._base_manager.using(using).filter(pk=instance.pk)
            list(watched.select_for_update(of=("self",)).values_list("pk"))
            same = next((row for row in earlier if row.messages == messages), None)
            if same is not None:
                return same
            # Asked before anybody read it: an answer to the older text would be paid for nothing.
            earlier.pending().filter(claim_token=None, first_tried_at=None).update(
                state=State.CANCELLED, finished_at=timezone.now()
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


def unannounced(using: str) -> LLMRequestQuerySet:
    """Finished, and its trigger and receivers still to be told, or told again by now."""
    return LLMRequest.objects.using(using).filter(
        Q(announce_after=None) | Q(announce_after__lte=timezone.now()),
        announced_at=None,
        state__in=ANNOUNCED,
        announce_tries__lt=app_settings().announce_tries,
    )


def announce(using: str, *, limit: int = 500) -> int:
    """Tell triggers and receivers of up to ``limit`` finished requests; answers how many."""
    keys = list(unannounced(using).order_by("id").values_list("pk", flat=True)[:limit])
    return sum([_announce_one(using, pk) for pk in keys])


def _announce_one(using: str, pk: int) -> bool:
    """Whether it was told, or failed to be. Once: the mark is in the transaction in which the user's code runs."""
    rows = LLMRequest.objects.using(using)
    try:
        with transaction.atomic(using=using):
            lockable = unannounced(using).filter(pk=pk)
            if connections[using].features.has_select_for_update_skip_locked:
                lockable = lockable.select_for_update(skip_locked=True, of=("self",))
            llm_request = lockable.first()
            if llm_request is None:
                return False  # another worker is telling it, or has told it
            rows.filter(pk=pk).update(announced_at=timezone.now(), announce_error="")
            _tell(llm_request, using)
    # User code may raise anything, and the next request must be told all the same.
    except Exception as error:
        logger.exception("Announcing LLM request %s failed; it will be tried again", pk)
        tries = rows.filter(pk=pk).values_list("announce_tries", flat=True).first() or 0
        rows.filter(pk=pk).update(
            announce_tries=F("announce_tries") + 1,
            announce_after=timezone.now() + timedelta(seconds=5 * 4**tries),
            announce_error=clean_text(f"{type(error).__name__}: {error}", limit=2000),
        )
    return True


def _tell(llm_request: LLMRequest, using: str) -> None:
    is_completed = llm_request.state == State.COMPLETED
    trigger = _registry.get(llm_request.trigger)
    instance = _locked_instance(trigger, llm_request, using) if trigger else None
    if trigger and instance is not None:
        with _write_back(trigger.name, instance.pk):
            (trigger.completed if is_completed else trigger.failed)(instance, llm_request)
    signal = request_completed if is_completed else request_failed
    signal.send(LLMRequest, llm_request=llm_request)


def _locked_instance(trigger: Trigger, llm_request: LLMRequest, using: str) -> models.Model | None:
    """What was asked about; None when it has been deleted since."""
    manager = trigger.watched._base_manager.using(router.db_for_write(trigger.watched) or using)
    return manager.select_for_update(of=("self",)).filter(pk=llm_request.object_id).first()


@contextmanager
def _write_back(name: str, pk: Any) -> Iterator[None]:
    token = _writing_back.set(_writing_back.get() | {(name, pk)})
    try:
        yield
    finally:
        _writing_back.reset(token)
