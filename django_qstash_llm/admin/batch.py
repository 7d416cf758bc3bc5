"""Batches: how far each has come, and what it cost so far."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from ..models import Batch, BatchInput, File, LedgerEntry, LLMRequest
from ..models.batch import standing, to_resubmit
from ..models.ledger import Total
from ..models.request import UNFINISHED, LLMRequestQuerySet, State
from . import actions, figures
from .record import RecordAdmin, Tool

_MOST_FAILURES = 20


@dataclass
class Progress:
    """What a batch's requests come to."""

    counts: dict[str, int]
    """As ``Batch.counts``: each item once."""
    total: Total = field(default_factory=Total)
    """What its requests came to, answers that nobody read included."""

    @property
    def unfinished(self) -> int:
        return sum(self.counts[state] for state in UNFINISHED)

    @property
    def number(self) -> int:
        return sum(self.counts.values())


def progress_of(batches: list[Batch]) -> dict[int, Progress]:
    """For all ``batches`` in two queries."""
    found: dict[int, Progress] = defaultdict(lambda: Progress({state.value: 0 for state in State}))
    rows = LLMRequest.objects.filter(batch__in=batches).order_by()
    counted = standing(rows).values_list("batch", "state").annotate(number=Count("pk"))
    for batch, state, number in counted:
        found[batch].counts[state] = number
    entries = LedgerEntry.objects.using(rows.db)
    for batch, total in entries.by_column(rows, "batch").items():
        found[batch].total = total
    return found


@admin.register(Batch)
class BatchAdmin(RecordAdmin):
    list_display = ("name_column", "progress_column", "cost_column", "user", "created_column")
    list_select_related = ("user",)
    search_fields = ("name",)
    searched_name = "name"
    search_help_text = _("The batch's UUID, or its exact name.")
    fields = (("uuid", "user", "created_at"),)
    actions = ("resubmit_failed", "cancel_unfinished")

    def complete_page(self, request: HttpRequest, rows: list[Batch]) -> None:
        found = progress_of(rows)
        for batch in rows:
            batch.progress = found[batch.pk]  # type: ignore[attr-defined]

    @admin.display(description=_("batch"))
    def name_column(self, batch: Batch) -> str:
        return str(batch)

    @admin.display(description=_("progress"))
    def progress_column(self, batch: Any) -> SafeString:
        counts = batch.progress.counts
        return format_html(
            '<div class="llm-progress">{}{}</div>',
            figures.progress_bar(counts),
            figures.counts_in_words(counts),
        )

    @admin.display(description=_("cost so far"))
    def cost_column(self, batch: Any) -> SafeString | str:
        return figures.total(batch.progress.total)

    @admin.display(description=_("asked"))
    def created_column(self, batch: Batch) -> SafeString | str:
        return figures.moment(batch.created_at)

    # --- the page ---

    def page(self, request: HttpRequest, obj: Batch) -> dict[str, Any]:
        progress = progress_of([obj])[obj.pk]
        requests_url = self.list_url(LLMRequest, f"?batch__id__exact={obj.pk}")
        return {
            "progress": progress,
            "bar": figures.progress_bar(progress.counts),
            "cost": figures.total(progress.total),
            "useful": figures.amount(progress.total.useful),
            "is_in_vain": progress.total.spent != progress.total.useful,
            "requests_url": requests_url,
            "states": [
                (
                    figures.state_sign(state),
                    figures.count(progress.counts[state]),
                    f"{requests_url}&state__exact={state.value}",
                )
                for state in State
                if progress.counts[state]
            ],
            "failures": self._failures(obj) if progress.counts[State.FAILED] else [],
            **self._input(obj),
        }

    def _input(self, batch: Batch) -> dict[str, Any]:
        """Of one that was asked by a file: how far that is read, and what is wrong with it."""
        batch_input = BatchInput.objects.filter(batch=batch).select_related("api_key").first()
        if batch_input is None:
            return {}
        file = File.objects.filter(uuid=batch_input.file_uuid).first()
        return {
            "input": batch_input,
            "file_url": self.page_url(file) if file else "",
            "lines": f"{figures.count(batch_input.read)} / {figures.count(batch_input.total)}",
            "wrong_lines": [
                (each.get("line"), each.get("code"), each.get("message"))
                for each in batch_input.errors[:_MOST_FAILURES]
            ],
        }

    def _failures(self, batch: Batch) -> list[tuple[str, str]]:
        """Why they failed: each reason with its number, the most frequent first."""
        rows = (
            standing(batch.llm_requests.all())
            .failed()
            .order_by()
            .values("error_code")
            .annotate(number=Count("pk"))
            .order_by("-number", "error_code")
            .values_list("error_code", "number")[:_MOST_FAILURES]
        )
        return [(code or "?", figures.count(number)) for code, number in rows]

    # --- what can be done ---

    def tools(self, obj: Batch) -> list[Tool]:
        tools = []
        if obj.llm_requests.unfinished().exists():
            tools.append(Tool("cancel_unfinished", _("Cancel the unfinished")))
        if to_resubmit(obj.llm_requests.all()).exists():
            tools.append(Tool("resubmit_failed", _("Resubmit the failed…")))
        return tools

    @admin.action(permissions=["act"], description=_("Resubmit what failed in the selected…"))
    def resubmit_failed(
        self, request: HttpRequest, queryset: QuerySet[Batch]
    ) -> HttpResponse | None:
        batches = list(queryset.order_by("pk")[: actions.MOST_BATCHES])
        if actions.CONFIRMED not in request.POST:
            return actions.confirm_resubmission(
                self,
                request,
                to_resubmit(LLMRequest.objects.filter(batch__in=batches)),
                action="resubmit_failed",
                selected=[batch.pk for batch in batches],
                most=None,
            )
        actions.resubmit_failed(self, request, batches)
        return actions.back_to_page(self, request, batches[0] if batches else None)

    @admin.action(permissions=["act"], description=_("Cancel what is unfinished in the selected"))
    def cancel_unfinished(
        self, request: HttpRequest, queryset: QuerySet[Batch]
    ) -> HttpResponse | None:
        actions.cancel(self, request, _of(queryset).unfinished())
        return actions.back_to_page(self, request, queryset.first())


def _of(batches: QuerySet[Batch]) -> LLMRequestQuerySet:
    keys = list(batches.values_list("pk", flat=True))
    return LLMRequest.objects.filter(batch__in=keys)
