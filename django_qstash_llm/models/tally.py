"""``Tally``: what was spent of a budget in one of its periods."""

from __future__ import annotations

from decimal import Decimal

from django.db import models
from django.utils.translation import gettext_lazy as _

from .money import USDField


class Tally(models.Model):
    """What was spent of a budget in one of its periods, or in a piece of a rolling one."""

    budget = models.ForeignKey(
        "django_qstash_llm.Budget", on_delete=models.CASCADE, related_name="tallies", db_index=False
    )
    starts_at = models.DateTimeField(_("starts at"))
    spent = USDField(_("spent"), default=Decimal(0))

    class Meta:
        verbose_name = _("tally")
        verbose_name_plural = _("tallies")
        constraints = (
            models.UniqueConstraint(fields=["budget", "starts_at"], name="llm_tally_of_period"),
        )

    def __str__(self) -> str:
        return f"{self.spent} since {self.starts_at}"
