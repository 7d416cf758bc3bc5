"""Lists that grow without end: nothing is counted beyond ``MOST``, and a page costs what it costs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet

if TYPE_CHECKING:
    # At run time Paginator takes no subscript.
    _Paginator = Paginator[Any]
else:
    _Paginator = Paginator

MOST = 10_000


def capped(rows: QuerySet[Any], most: int = MOST) -> int:
    """How many there are; ``most`` + 1 for more than that.

    An order makes a planner without fresh statistics take its index.
    """
    return rows.values("pk")[: most + 1].count()


class LongListPaginator(_Paginator):
    """Of a filtered list the count ends at ``MOST``; of a whole table it is estimated from there
    on."""

    object_list: QuerySet[Any]

    @cached_property
    def count(self) -> int:
        count = capped(self.object_list.order_by())
        if count <= MOST or not self.is_whole_table:
            return count
        return max(count, estimated_rows(self.object_list))

    @property
    def is_whole_table(self) -> bool:
        query = self.object_list.query
        return not (query.where or query.distinct or query.is_sliced or query.combinator)

    @property
    def is_exact(self) -> bool:
        return self.count <= MOST


def estimated_rows(rows: QuerySet[Any]) -> int:
    """How many there are in the table of ``rows``, roughly, without looking at each."""
    connection = connections[rows.db]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass",
                [connection.ops.quote_name(rows.model._meta.db_table)],
            )
            found = cursor.fetchone()
        return int(found[0]) if found else 0
    # Keys grow by one, and the oldest rows go first.
    keys = rows.model._default_manager.using(rows.db).order_by("pk").values_list("pk", flat=True)
    first, last = keys.first(), keys.last()
    return 0 if first is None or last is None else int(last) - int(first) + 1
