"""Many new rows in one statement.

Django's ``bulk_create`` writes a placeholder for each value, and a driver that has to find them
all in the statement again: with six entries of the log and a callback for every message that was
most of what a delivery cost. Here a statement has one parameter a column, an array, where the
database can take one apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from django.db import connections, models, router
from django.db.backends.base.base import BaseDatabaseWrapper

MOST_PARAMETERS = 999
"""What any SQLite takes."""
MOST_ROWS = 500
MOST_BYTES = 16 * 1024 * 1024
"""Of bodies in one statement, so that a few large ones are not held several times over: PostgreSQL
takes no statement of a gigabyte."""

if TYPE_CHECKING:
    Field = models.Field[Any, Any]


def insert(rows: Sequence[models.Model]) -> None:
    """Store new rows of one model, and tell them their primary keys. No signals are sent."""
    if not rows:
        return
    model = type(rows[0])
    fields = [field for field in model._meta.concrete_fields if not field.primary_key]
    alias = router.db_for_write(model)
    if not connections[alias].features.can_return_rows_from_bulk_insert:
        # An SQLite before 3.35.
        model._default_manager.using(alias).bulk_create(rows)
        return
    values = [[getattr(row, field.attname) for field in fields] for row in rows]
    pks = insert_values(model, fields, values, returns_keys=True)
    for row, pk in zip(rows, pks, strict=True):
        row.pk = pk
        row._state.adding, row._state.db = False, alias


def insert_values(
    model: type[models.Model],
    fields: Sequence[Field],
    rows: Sequence[Sequence[Any]],
    *,
    returns_keys: bool = False,
) -> list[int]:
    """Store rows of values, in the order of ``fields``. Answers their primary keys, if asked."""
    connection = connections[router.db_for_write(model)]
    is_postgres = connection.vendor == "postgresql"
    write = _arrays if is_postgres else _placeholders
    size = MOST_ROWS if is_postgres else MOST_PARAMETERS // len(fields)
    quote = connection.ops.quote_name
    names = ", ".join(quote(str(field.column)) for field in fields)
    into = f"INSERT INTO {quote(model._meta.db_table)} ({names})"
    returning = f"RETURNING {quote(str(model._meta.pk.column))}" if returns_keys else ""
    pks: list[int] = []
    with connection.cursor() as cursor:
        for chunk in _chunks(rows, size):
            source, parameters = write(connection, fields, chunk)
            cursor.execute(f"{into} {source} {returning}", parameters)
            if returns_keys:
                pks += [pk for (pk,) in cursor.fetchall()]
    return pks


def _chunks(rows: Sequence[Sequence[Any]], size: int) -> Iterator[Sequence[Sequence[Any]]]:
    chunk: list[Sequence[Any]] = []
    weight = 0
    for row in rows:
        own = sum(len(value) for value in row if isinstance(value, bytes))
        if len(chunk) == size or (chunk and weight + own > MOST_BYTES):
            yield chunk
            chunk, weight = [], 0
        chunk.append(row)
        weight += own
    if chunk:
        yield chunk


def _placeholders(
    connection: BaseDatabaseWrapper, fields: Sequence[Field], rows: Sequence[Sequence[Any]]
) -> tuple[str, list[Any]]:
    row = f"({', '.join(['%s'] * len(fields))})"
    prepare = [_preparer(connection, field) for field in fields]
    return f"VALUES {', '.join([row] * len(rows))}", [
        make(value) for values in rows for make, value in zip(prepare, values, strict=True)
    ]


def _arrays(
    connection: BaseDatabaseWrapper, fields: Sequence[Field], rows: Sequence[Sequence[Any]]
) -> tuple[str, list[Any]]:
    # Without a length: a cast to one would cut what does not fit, and say nothing.
    types = [re.sub(r"\(.*\)", "", str(field.db_type(connection))) for field in fields]
    arrays = ", ".join(f"%s::{name}[]" for name in types)
    prepare = [_preparer(connection, field) for field in fields]
    columns = zip(*rows, strict=True)
    return f"SELECT * FROM unnest({arrays})", [  # noqa: S608
        [make(value) for value in column] for make, column in zip(prepare, columns, strict=True)
    ]


def _preparer(connection: BaseDatabaseWrapper, field: Field) -> Callable[[Any], Any]:
    if isinstance(field, models.JSONField):
        # As text: not every driver makes an array of its JSON type.
        return json.dumps
    return lambda value: field.get_db_prep_save(value, connection)
