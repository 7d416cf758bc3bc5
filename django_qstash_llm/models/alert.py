"""``Alert``: a threshold of a budget that was reached."""

from __future__ import annotations

from typing import Self

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from .money import USDField, dollars


class AlertQuerySet(models.QuerySet["Alert"]):
    def untold(self) -> Self:
        return self.filter(told_at=None)


class Alert(models.Model):
    """A threshold that was reached. Told once: by the signal, by e-mail and in the log."""

    budget = models.ForeignKey(
        "django_qstash_llm.Budget", on_delete=models.CASCADE, related_name="alerts", db_index=False
    )
    starts_at = models.DateTimeField(_("period"))
    """When the period began; of a rolling one, which of its lengths since 1970 it is."""
    threshold = models.PositiveSmallIntegerField(_("threshold"), help_text=_("Percent."))
    spent = USDField(_("spent"))
    amount = USDField(_("amount"))
    crossed_at = models.DateTimeField(_("reached at"))
    told_at = models.DateTimeField(_("told at"), null=True, blank=True)

    objects = AlertQuerySet.as_manager()

    class Meta:
        verbose_name = _("budget alert")
        verbose_name_plural = _("budget alerts")
        ordering = ("-id",)
        constraints = (
            models.UniqueConstraint(
                fields=["budget", "starts_at", "threshold"], name="llm_alert_once"
            ),
        )
        indexes = (models.Index(fields=["id"], name="llm_alert_untold", condition=Q(told_at=None)),)

    def __str__(self) -> str:
        return self.in_words

    @property
    def in_words(self) -> str:
        return (
            f"{self.threshold} % of the budget {self.budget.in_words} are spent: "
            f"{dollars(self.spent)} of {dollars(self.amount)}."
        )
