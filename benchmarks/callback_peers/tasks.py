"""(b2) The task that ``django-qstash`` runs in its webhook view. It does nothing."""

from __future__ import annotations

from django_qstash import stashed_task


@stashed_task
def nothing(**_: object) -> None:
    """The same bytes come in with the arguments, and its result is stored."""
