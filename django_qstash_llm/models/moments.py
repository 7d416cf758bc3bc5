"""Moments in the columns and outside: with ``USE_TZ`` off the columns hold the local time."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.utils import timezone


def aware(at: datetime) -> datetime:
    """A moment that a column held, with its time zone."""
    return at if timezone.is_aware(at) else timezone.make_aware(at, timezone.get_default_timezone())


def as_stored(at: datetime) -> datetime:
    """An aware moment as a column holds it."""
    return at if settings.USE_TZ else timezone.make_naive(at, timezone.get_default_timezone())
