"""What one of these processes does when it begins, before any work: told by its environment.

Waits that are right for a site and long for a test are shortened here, crash points armed
(``CRASH_AT``) and bugs put in (``SEEDED_BUG``). Only these processes import this.
"""

from __future__ import annotations

import os
from types import ModuleType

from django.conf import settings

from django_qstash_llm import triggers
from django_qstash_llm.models import circuit, outbox, request

from . import crash, seeded


def begin() -> None:
    shorten_waits(settings.FAULTS["claim_seconds"])
    if names := os.environ.get("CRASH_AT"):
        crash.arm(names, settings.FAULTS["folder"])
    if name := os.environ.get("SEEDED_BUG"):
        seeded.plant(name)


def shorten_waits(claim_seconds: float) -> None:
    """A claim is two minutes: so long a killed worker's rows wait for another."""
    waits = {"CLAIM_SECONDS": claim_seconds, "LONGEST_PAUSE": 4.0, "PROBE_SECONDS": claim_seconds}
    for module in (request, outbox, circuit, triggers):
        for name, seconds in waits.items():
            _shorten(module, name, seconds)


def _shorten(module: ModuleType, name: str, seconds: float) -> None:
    if hasattr(module, name):
        setattr(module, name, seconds)
