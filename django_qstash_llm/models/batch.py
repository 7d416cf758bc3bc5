"""``Batch``: many requests asked together; each keeps its own answer, error and cost."""

from __future__ import annotations

import logging
import uuid as uuids
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import models, transaction
from django.db.models import Count, Exists, OuterRef, Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..exceptions import ConfigurationError, InvalidRequest
from ..pricing import Estimate
from .doorbell import Bell, ring_on_commit
from .request import (
    ROWS_AT_ONCE,
    LLMRequest,
    LLMRequestQuerySet,
    State,
    Via,
    check_saved,
    refuse_via,
)

logger = logging.getLogger(__name__)


class BatchQuerySet(models.QuerySet["Batch"]):
    def submit(
        self, items: Sequence[Mapping[str, Any]], *, name: str = "", user: Any = None, **shared: Any
    ) -> Batch:
        """Ask many at once. All rows are written in one transaction, or none is.

        ``items``: one dictionary of ``publish``'s arguments each (``queue`` enqueues that item);
        ``shared``: arguments that every item starts from. Raises ``InvalidRequest`` that names the
        item, as in ``items[7].messages``.
        """
        app_settings().check_ready()
        self._for_write = True  # for self.db: not the replica that reads would go to
        if not isinstance(items, list | tuple) or not items:
            raise InvalidRequest("items", "give a list of at least one dictionary")
        check_saved("user", user, self.model)
        llm_requests = [_compose(index, item, shared, user) for index, item in enumerate(items)]
        with transaction.atomic(using=self.db):
            batch = self.create(name=name, user=user)
            for llm_request in llm_requests:
                llm_request.batch = batch
            LLMRequest.objects.using(self.db).bulk_create(llm_requests, batch_size=ROWS_AT_ONCE)
            ring_on_commit(Bell.SUBMIT, self.db)
        return batch

    def estimate(self, items: Sequence[Mapping[str, Any]], **shared: Any) -> Estimate:
        """What ``submit`` with the same arguments may come to. Raises what ``submit`` raises."""
        if not isinstance(items, list | tuple) or not items:
            raise InvalidRequest("items", "give a list of at least one dictionary")
        now = timezone.now()
        composed = (_compose(index, item, shared) for index, item in enumerate(items))
        return sum((each.estimate(at=now) for each in composed), Estimate())

    async def asubmit(
        self, items: Sequence[Mapping[str, Any]], *, name: str = "", user: Any = None, **shared: Any
    ) -> Batch:
        """``submit`` for async code."""
        return await sync_to_async(self.submit)(items, name=name, user=user, **shared)


def _compose(index: int, item: Any, shared: Mapping[str, Any], user: Any = None) -> LLMRequest:
    if not isinstance(item, Mapping) or not all(isinstance(name, str) for name in item):
        raise InvalidRequest(f"items[{index}]", "not a dictionary of publish's arguments")
    asked = {**shared, **item}
    if "messages" not in asked:
        raise InvalidRequest(f"items[{index}].messages", "missing")
    try:
        refuse_via(asked)
        llm_request = LLMRequest.compose(**asked, via=Via.BATCH)
        if llm_request.user_id is None:
            llm_request.user = user
        llm_request.prepare()
    except InvalidRequest as error:
        raise InvalidRequest(f"items[{index}].{error.field}", error.problem) from error
    return llm_request


class Batch(models.Model):
    """Requests asked together. Its progress is derived from theirs."""

    uuid = models.UUIDField(_("uuid"), default=uuids.uuid4, unique=True, editable=False)
    name = models.CharField(_("name"), max_length=255, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_batches",
        verbose_name=_("user"),
    )
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    objects = BatchQuerySet.as_manager()

    class Meta:
        verbose_name = _("batch")
        verbose_name_plural = _("batches")
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.name or str(self.uuid)

    def counts(self) -> dict[str, int]:
        """State -> number of items, every state present. One that failed and was asked again
        counts once: as what became of it since. See ``standing``."""
        rows = standing(self.llm_requests.all()).order_by()
        counted = rows.values_list("state").annotate(n=Count("pk"))
        return {state.value: 0 for state in State} | dict(counted)

    @property
    def is_finished(self) -> bool:
        return not self.llm_requests.unfinished().exists()

    def cost(self) -> Decimal | None:
        """USD of what is priced, of every time it was asked; None when nothing is."""
        return self.llm_requests.cost()

    def resubmit_failed(self) -> list[LLMRequest]:
        """Ask again what ``counts`` calls failed, and nothing else: each as a request of its own
        that names the one that failed, in this batch, all in one transaction.

        A second click finds nothing left to ask. What cannot be asked any more, since its provider
        has left the settings or its messages are not kept, is logged and stays failed. Raises
        ``ConfigurationError`` where nothing could be submitted at all.
        """
        app_settings().check_ready()
        using = self._state.db or "default"
        asked_again: list[LLMRequest] = []
        with transaction.atomic(using=using):
            # Locked: two clicks on a button are one wish.
            Batch.objects.using(using).select_for_update(of=("self",)).get(pk=self.pk)
            failed = to_resubmit(LLMRequest.objects.using(using).filter(batch=self))
            keys = list(failed.order_by("pk").values_list("pk", flat=True))
            for first in range(0, len(keys), ROWS_AT_ONCE):
                asked_again += _ask_again(keys[first : first + ROWS_AT_ONCE], using)
            if asked_again:
                ring_on_commit(Bell.SUBMIT, using)
        return asked_again


def standing(llm_requests: LLMRequestQuerySet) -> LLMRequestQuerySet:
    """Those of ``llm_requests`` that stand for an item of their batch, each item once.

    What failed or was cancelled and has been asked again stands for nothing any more: its newest
    resubmission does. A resubmission that was cancelled is as if it had never been.
    """
    asked = LLMRequest.objects.using(llm_requests.db).exclude(state=State.CANCELLED)
    again = asked.filter(resubmission_of=OuterRef("pk"))
    newer = asked.filter(resubmission_of=OuterRef("resubmission_of"), pk__gt=OuterRef("pk"))
    came_to_nothing = Q(state__in=[State.FAILED, State.CANCELLED])
    return llm_requests.exclude(came_to_nothing & (Q(Exists(again)) | Q(Exists(newer)))).exclude(
        state=State.CANCELLED, resubmission_of__isnull=False
    )


def to_resubmit(llm_requests: LLMRequestQuerySet) -> LLMRequestQuerySet:
    """Failed, not asked again since, and still there to be asked."""
    return standing(llm_requests).failed().filter(forgotten_at=None)


def _ask_again(keys: Sequence[int], using: str) -> list[LLMRequest]:
    rows = LLMRequest.objects.using(using).filter(pk__in=keys)
    # Locked first and then looked at: a late answer or another's resubmission may have come first.
    list(rows.order_by("pk").select_for_update(of=("self",)).values_list("pk"))
    asked_again = []
    for failed in to_resubmit(rows).order_by("pk"):
        again = failed._copy()
        try:
            again.prepare()
        except (InvalidRequest, ConfigurationError) as error:
            logger.warning("%s cannot be asked again: %s", failed.uuid, error)
        else:
            asked_again.append(again)
    return LLMRequest.objects.using(using).bulk_create(asked_again, batch_size=ROWS_AT_ONCE)
