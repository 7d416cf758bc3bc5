"""Counts that cost the same however long a table grows: none goes on beyond ``MOST``."""

from __future__ import annotations

from typing import Any

from django.db.models import IntegerField, OuterRef, QuerySet, Subquery

from ..paging import MOST as MOST
from ..paging import capped as capped
from .models import FlowControlKey, Gate, Message, Queue


def in_words(count: int, most: int = MOST) -> str:
    return f"{most:,}+" if count > most else f"{count:,}"


class CappedCount(Subquery):
    """The same of a subquery, for each row of the query around it."""

    template = "(SELECT COUNT(*) FROM (%(subquery)s) capped)"
    output_field = IntegerField()

    def __init__(self, rows: QuerySet[Any], most: int = MOST) -> None:
        super().__init__(rows.order_by().values("pk")[: most + 1])


def queues_with_lag() -> QuerySet[Queue]:
    """What stands, as ``QueueQuerySet.with_lag`` says it, but capped."""
    mine = Message.objects.filter(queue=OuterRef("pk"))
    lag = CappedCount(mine.started()) + CappedCount(mine.in_line())
    return Queue.objects.standing().annotate(lag=lag)  # type: ignore[no-redef]


def keys_with_counts() -> QuerySet[FlowControlKey]:
    """As ``FlowControlKeyQuerySet.with_counts`` says it, but capped."""
    mine = Message.objects.filter(flow_control=OuterRef("pk"))
    return FlowControlKey.objects.annotate(  # type: ignore[no-redef]
        parallelism_count=CappedCount(mine.claimed()),
        wait_list_size=CappedCount(mine.waiting_for(Message.Waits.FLOW_CONTROL)),
    )


def gates_with_counts() -> QuerySet[Gate]:
    """Gates with ``calls`` in flight and ``wait_list_size``, capped."""
    mine = Message.objects.filter(gate=OuterRef("pk"))
    return Gate.objects.annotate(  # type: ignore[no-redef]
        calls=CappedCount(mine.claimed()),
        wait_list_size=CappedCount(mine.waiting_for(Message.Waits.GATE)),
    )
