"""``Batch``: many requests asked together; each keeps its own answer, error and cost."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import models, transaction
from django.db.models import Count, Sum
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..conf import app_settings
from ..exceptions import InvalidRequest
from .doorbell import Bell, ring_on_commit
from .request import LLMRequest, State, Via, check_saved, refuse_via


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
        llm_requests = [_compose(index, item, shared) for index, item in enumerate(items)]
        with transaction.atomic(using=self.db):
            batch = self.create(name=name, user=user)
            for llm_request in llm_requests:
                llm_request.batch = batch
                if llm_request.user_id is None:
                    llm_request.user_id = batch.user_id
            LLMRequest.objects.using(self.db).bulk_create(llm_requests, batch_size=500)
            ring_on_commit(Bell.SUBMIT, self.db)
        return batch

    async def asubmit(
        self, items: Sequence[Mapping[str, Any]], *, name: str = "", user: Any = None, **shared: Any
    ) -> Batch:
        """``submit`` for async code."""
        return await sync_to_async(self.submit)(items, name=name, user=user, **shared)


def _compose(index: int, item: Any, shared: Mapping[str, Any]) -> LLMRequest:
    if not isinstance(item, Mapping) or not all(isinstance(name, str) for name in item):
        raise InvalidRequest(f"items[{index}]", "not a dictionary of publish's arguments")
    asked = {**shared, **item}
    if "messages" not in asked:
        raise InvalidRequest(f"items[{index}].messages", "missing")
    try:
        refuse_via(asked)
        llm_request = LLMRequest.compose(**asked, via=Via.BATCH)
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
        """State -> number of requests, every state present."""
        rows = self.llm_requests.order_by().values_list("state").annotate(n=Count("pk"))
        return {state.value: 0 for state in State} | dict(rows)

    @property
    def is_finished(self) -> bool:
        return not self.llm_requests.unfinished().exists()

    def cost(self) -> Decimal | None:
        """USD of what is priced; None when nothing is."""
        total: Decimal | None = self.llm_requests.aggregate(total=Sum("cost"))["total"]
        return total
