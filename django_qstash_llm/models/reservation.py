"""``Reservation``: what is held of a budget for a request under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Self

from django.db import connections, models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from .money import USDField
from .request import UNFINISHED, LLMRequest


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def make(self, made: Sequence[tuple[int, Any, int]]) -> None:
        """Store those of these budgets, requests and amounts in 1e-12 USD. By hand: there is one for
        every request that is submitted."""
        if not made:
            return
        connection = connections[self.db]
        table = connection.ops.quote_name(self.model._meta.db_table)
        into = f"INSERT INTO {table} (budget_id, llm_request_id, amount)"
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                columns = [list(column) for column in zip(*made, strict=True)]
                arrays = "SELECT * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[])"
                cursor.execute(f"{into} {arrays}", columns)
            else:
                cursor.executemany(f"{into} VALUES (%s, %s, %s)", made)

    def over(self) -> Self:
        """Those of what has ended, or was deleted."""
        return self.filter(Q(llm_request=None) | ~Q(llm_request__state__in=UNFINISHED))

    def let_go(self, keys: Sequence[int]) -> dict[int, Decimal]:
        """Delete those of ``keys`` that are still there, and of what is not asked again since; what that
        frees of each budget, by its key. The budgets are locked, so that nobody else lets go of them, or
        relies on them, at the same time."""
        sums: dict[int, Decimal] = defaultdict(Decimal)
        there = list(self.over().filter(pk__in=keys).values_list("pk", "budget_id", "amount"))
        for _pk, budget_id, amount in there:
            sums[budget_id] += amount
        if there:
            self.filter(pk__in=[pk for pk, _, _ in there])._raw_delete(self.db)
        return sums


class Reservation(models.Model):
    """What is held of a budget for a request under way."""

    budget = models.ForeignKey(
        "django_qstash_llm.Budget",
        on_delete=models.CASCADE,
        related_name="reservations",
        db_index=False,
    )
    llm_request = models.ForeignKey(
        # Deleted while it is held: the settlement lets go of it.
        LLMRequest,
        on_delete=models.SET_NULL,
        null=True,
        related_name="reservations",
        db_index=False,
        db_constraint=False,  # nothing is made for a request that is not there, or kept
    )
    amount = USDField(_("amount"))

    objects = ReservationQuerySet.as_manager()

    class Meta:
        verbose_name = _("reservation")
        verbose_name_plural = _("reservations")
        constraints = (
            # In this order it is the index by request as well.
            models.UniqueConstraint(fields=["llm_request", "budget"], name="llm_reserved_once"),
        )

    def __str__(self) -> str:
        return f"{self.amount} of {self.budget_id}"
