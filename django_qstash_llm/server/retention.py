"""What is too old is deleted, a chunk at a time, so that nobody waits for long."""

from __future__ import annotations

from datetime import datetime, timedelta

from . import conf
from .models import DeadLetter, Deduplication, FlowControlKey, Gate, LogEntry, Message


def purge(now: datetime) -> bool:
    """Delete what the settings keep no longer: some of it, where there is much. Whether there may
    be more."""
    settings = conf.current()
    dead_before = now - timedelta(seconds=settings.dead_letter_retention)
    finished_before = now - timedelta(seconds=max(60, settings.message_retention))
    told_before = now - timedelta(seconds=settings.log_retention)
    are_left = [
        DeadLetter.objects.purge(before=dead_before),
        Message.objects.purge(before=finished_before, log_before=min(told_before, finished_before)),
        LogEntry.objects.purge(before=told_before),
        Deduplication.objects.purge(now=now),
    ]
    FlowControlKey.objects.purge(before=finished_before)
    # Not before their messages are gone, of which there may be millions.
    Gate.objects.purge(before=min(told_before, finished_before))
    return any(are_left)
