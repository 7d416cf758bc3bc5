"""Telling that a threshold of a budget is reached: the signal, e-mail and the log."""

from __future__ import annotations

import logging

from django.core.mail import send_mail
from django.utils import timezone

from .models.alert import Alert
from .models.budget import Budget
from .signals import budget_threshold_reached

logger = logging.getLogger(__name__)


def alert(using: str) -> int:
    """Tell of every alert of which nobody was told; how many. None is told by two at a time.

    An address that cannot be reached is logged, and does not keep the others from being told.
    """
    told = 0
    for row in Alert.objects.using(using).untold().select_related("budget").order_by("pk"):
        # Marked first: a mail server that takes a minute is not asked by every sweep in it.
        mine = Alert.objects.using(using).untold().filter(pk=row.pk)
        if mine.update(told_at=timezone.now()):
            _tell(row)
            told += 1
    return told


def _tell(row: Alert) -> None:
    logger.warning("%s", row.in_words)
    answers = budget_threshold_reached.send_robust(Budget, budget=row.budget, alert=row)
    for handler, answer in answers:
        if isinstance(answer, Exception):
            name = getattr(handler, "__qualname__", repr(handler))
            logger.error("%s failed when told: %s", name, row.in_words, exc_info=answer)
    if not row.budget.emails:
        return
    subject = f"{row.threshold} % of the budget {row.budget.name} are spent"
    text = f"{row.in_words}\n{row.budget.renewal_in_words(row.crossed_at)}"
    for address in row.budget.emails:
        try:
            send_mail(subject.replace("\n", " "), text, None, [address])
        # Whatever a backend raises; there are many.
        except Exception:
            logger.exception("The e-mail to %s could not be sent: %s", address, row.in_words)
