"""Who holds a claim: this process, and whether another one still lives."""

from __future__ import annotations

import os
import socket
from datetime import datetime
from functools import cache
from pathlib import Path

from django.utils import timezone

from ..models import Message


def process_identity() -> str:
    """``host/namespace:pid:start``: this process and no other, on this machine and no other.

    With the pid namespace, so that two containers of one name do not think each other dead.
    """
    pid = os.getpid()
    return f"{_machine()}:{pid}:{_started_at(pid)}"[:128]


@cache
def _machine() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    return f"{socket.gethostname()[:60]}/{''.join(c for c in namespace if c.isdigit())}"


def _started_at(pid: int) -> str:
    """When a process began, as the kernel counts; empty when it does not live or cannot be told."""
    try:
        # The name before it may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie holds nothing any more.
    return "" if len(fields) < 20 or fields[0] == "Z" else fields[19]


def release_claims_of_the_dead(now: datetime | None = None) -> int:
    """Free what engines of this machine held whose process is no more: no need to wait for
    their leases. Only where ``/proc`` tells for sure."""
    if not _started_at(os.getpid()):
        return 0
    # The claimed alone, who have an index: the table may be long.
    mine = Message.objects.claimed().filter(claimed_by__startswith=f"{_machine()}:")
    dead = [
        identity
        for identity in mine.unfinished().values_list("claimed_by", flat=True).distinct()
        if not _is_alive(identity)
    ]
    return Message.objects.filter(claimed_by__in=dead).expire(now=now or timezone.now())


def _is_alive(identity: str) -> bool:
    _, pid, started_at = identity.rsplit(":", 2)
    return pid.isdecimal() and _started_at(int(pid)) == started_at
