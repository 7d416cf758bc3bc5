"""The statements of a callback: look at the request, store the receipt, write what it changes.

Plain SQL of the smallest kind, put together once and not for each callback: composing it with the
ORM takes more time than all the rest of a callback, its signature included.

With a lock these are three statements in a transaction, five messages to and fro on PostgreSQL, and
on SQLite every other writer waits while the callback is read. ``store_at_once`` writes if the row is
still the one that was looked at without a lock, and otherwise nothing at all, so that it is done again
with one: on PostgreSQL one statement, on SQLite a short transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar
from uuid import UUID

from django.db import connections, models, transaction
from django.db.models.base import ModelState

Row = TypeVar("Row", bound=models.Model)


VERSION = "_version"
"""Where a row that was looked at keeps which version of it that was: PostgreSQL's own mark of it, or
what was found."""


def new(model: type[Row], /, **values: Any) -> Row:
    """An unsaved row, as ``model(**values)`` is, without asking forty fields for their defaults.
    ``values`` are those of columns."""
    row = model.__new__(model)
    row.__dict__.update(_defaults(model), _state=ModelState(), **values)
    for name, make in _made_anew(model):
        if name not in values:
            row.__dict__[name] = make()
    return row


@lru_cache(maxsize=16)
def _defaults(model: type[models.Model]) -> dict[str, Any]:
    return {
        field.attname: field.get_default()
        for field in model._meta.concrete_fields
        if field.default is models.NOT_PROVIDED or not callable(field.default)
    }


@lru_cache(maxsize=16)
def _made_anew(model: type[models.Model]) -> list[tuple[str, Callable[[], Any]]]:
    return [
        (field.attname, field.get_default)
        for field in model._meta.concrete_fields
        if field.attname not in _defaults(model)
    ]


def find(model: type[Row], name: str, value: Any, *, using: str) -> Row | None:
    """The row whose unique column ``name`` is ``value``, whole."""
    names = tuple(field.name for field in model._meta.concrete_fields)
    return _look(model, value, names, using, by=name)


def lock(model: type[Row], uuid: UUID, names: tuple[str, ...], *, using: str) -> Row | None:
    """The row of this ``uuid`` with no more than the fields ``names``, locked until the transaction
    ends where the database locks rows; None when there is none."""
    suffix = " FOR UPDATE" if connections[using].features.has_select_for_update else ""
    return _look(model, uuid, names, using, suffix=suffix)


def look(model: type[Row], uuid: UUID, names: tuple[str, ...], *, using: str) -> Row | None:
    """The same without a lock, for ``store_at_once``."""
    is_postgresql = connections[using].vendor == "postgresql"
    return _look(model, uuid, names, using, version="xmin::text" if is_postgresql else "NULL")


def _look(
    model: type[Row],
    value: Any,
    names: tuple[str, ...],
    using: str,
    *,
    by: str = "uuid",
    version: str = "NULL",
    suffix: str = "",
) -> Row | None:
    connection = connections[using]
    field: Any = model._meta.get_field(by)
    sql, attnames, converters = _select(model, names, using, by, version, suffix)
    with connection.cursor() as cursor:
        cursor.execute(sql, [field.get_db_prep_value(value, connection)])
        found = cursor.fetchone()
    if found is None:
        return None
    values = list(found)
    if values[-1] is None:
        values[-1] = names, found[:-1]
    for index, convert in converters:
        values[index] = convert(values[index], connection)
    # What ``from_db`` does, without asking each of sixty fields whether it was loaded.
    row = model.__new__(model)
    row.__dict__.update(zip(attnames, values, strict=True), _state=ModelState())
    row._state.adding, row._state.db = False, using
    return row


def insert(row: models.Model, *, using: str) -> None:
    """Store a new row; its key is set. Sends no signals: nobody else's code runs here."""
    connection, stored, first = connections[using], _stored_names(row), _at_first(type(row))
    said = tuple(name for name in stored if name not in first or first[name] != getattr(row, name))
    values = _stored(row, said, using)
    with connection.cursor() as cursor:
        if connection.features.can_return_columns_from_insert:
            cursor.execute(_insert(type(row), stored, said, using, returning=True), values)
            [row.pk] = cursor.fetchone()
        else:
            cursor.execute(_insert(type(row), stored, said, using, returning=False), values)
            key: Any = row._meta.pk
            row.pk = connection.ops.last_insert_id(cursor, row._meta.db_table, key.column)
    row._state.adding, row._state.db = False, using


def update(row: models.Model, changes: Mapping[str, Any], *, using: str) -> None:
    """Write ``changes`` of a row that is locked."""
    names = tuple(changes)
    values = _prepared(type(row), names, changes.values(), using)
    with connections[using].cursor() as cursor:
        cursor.execute(_update(type(row), names, using), [*values, row.pk])


def update_in(row: models.Model, state: str, changes: Mapping[str, Any], *, using: str) -> bool:
    """Write ``changes`` of a row that nobody has locked, and whether it was in ``state`` still."""
    names = tuple(changes)
    values = _prepared(type(row), names, changes.values(), using)
    # Not as it is: of an index that holds the rows in one state PostgreSQL believes that these are
    # few, and reads all that have been in it since the last vacuum.
    sql = f"{_update(type(row), names, using)} AND state || '' = %s"
    with connections[using].cursor() as cursor:
        cursor.execute(sql, [*values, row.pk, state])
        return bool(cursor.rowcount)


def can_store_at_once(using: str) -> bool:
    """By itself: in a transaction of somebody else's a refusal would end that."""
    connection = connections[using]
    return connection.vendor in _AT_ONCE and not connection.in_atomic_block


def store_at_once(
    receipt: models.Model,
    row: models.Model | None,
    changes: Mapping[str, Any],
    *,
    using: str,
) -> bool:
    """Store ``receipt`` and write ``changes`` of ``row``, both or neither, and whether it was both:
    it is neither when somebody has changed the row since ``look``."""
    if row is None or not changes:
        insert(receipt, using=using)
        return True
    return _AT_ONCE[connections[using].vendor](receipt, row, changes, using)


def _in_one_statement(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    using: str,
) -> bool:
    names, stored = tuple(changes), _stored_names(receipt)
    sql = _statement(type(receipt), stored, type(row), names, using)
    changed = _prepared(type(row), names, changes.values(), using)
    with connections[using].cursor() as cursor:
        values = _stored(receipt, stored, using)
        cursor.execute(sql, [*changed, row.pk, getattr(row, VERSION), *values])
        found = cursor.fetchone()
    if found is None:
        return False
    [receipt.pk] = found
    receipt._state.adding, receipt._state.db = False, using
    return True


def _in_a_short_transaction(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    using: str,
) -> bool:
    names, (looked_at, found) = tuple(changes), getattr(row, VERSION)
    sql = _guarded_update(type(row), names, looked_at, using)
    values = [*_prepared(type(row), names, changes.values(), using), row.pk, *found]
    with transaction.atomic(using=using):
        with connections[using].cursor() as cursor:
            cursor.execute(sql, values)
            if not cursor.rowcount:
                return False
        insert(receipt, using=using)
    return True


_AT_ONCE = {"postgresql": _in_one_statement, "sqlite": _in_a_short_transaction}


def _stored(receipt: models.Model, names: tuple[str, ...], using: str) -> list[Any]:
    values = [getattr(receipt, name) for name in names]
    return _prepared(type(receipt), names, values, using)


def _stored_names(row: Any) -> tuple[str, ...]:
    model: type[models.Model] = type(row)
    return _names_without(model, getattr(row, "left_to_the_database", frozenset()))


@lru_cache(maxsize=16)
def _names_without(model: type[models.Model], left_out: frozenset[str]) -> tuple[str, ...]:
    fields = (field for field in model._meta.concrete_fields if not field.primary_key)
    return tuple(field.attname for field in fields if field.attname not in left_out)


def _prepared(
    model: type[models.Model], names: tuple[str, ...], values: Iterable[Any], using: str
) -> list[Any]:
    """As the ORM does it, without asking a field for which there is nothing to do."""
    prepared, connection = list(values), connections[using]
    for index, field in _to_prepare(model, names, using):
        prepared[index] = field.get_db_prep_save(prepared[index], connection)
    return prepared


@lru_cache(maxsize=256)
def _to_prepare(
    model: type[models.Model], names: tuple[str, ...], using: str
) -> list[tuple[int, Any]]:
    plain = (models.CharField, models.TextField, models.IntegerField, models.BooleanField)
    fields = (model._meta.get_field(name) for name in names)
    return [(i, field) for i, field in enumerate(fields) if not isinstance(field, plain)]


@lru_cache(maxsize=16)
def _select(
    model: type[models.Model],
    names: tuple[str, ...],
    using: str,
    by: str,
    version: str,
    suffix: str,
) -> tuple[str, list[str], list[tuple[int, Callable[[Any, Any], Any]]]]:
    connection = connections[using]
    fields: list[Any] = [model._meta.get_field(name) for name in names]
    columns = ", ".join(connection.ops.quote_name(field.column) for field in fields)
    table = connection.ops.quote_name(model._meta.db_table)
    sql = f"SELECT {columns}, {version} FROM {table} WHERE {by} = %s{suffix}"  # noqa: S608
    converters = [
        (index, _converter(field, converts))
        for index, field in enumerate(fields)
        if (converts := _converters(field, using))
    ]
    return sql, [*(field.attname for field in fields), VERSION], converters


def _converters(field: Any, using: str) -> Sequence[Any]:
    """As the ORM does it: SQLite hands out moments as text."""
    connection = connections[using]
    column = field.get_col(field.model._meta.db_table)
    return [
        *connection.ops.get_db_converters(column),
        *field.get_db_converters(connection),
    ]


def _converter(field: Any, converts: Sequence[Any]) -> Callable[[Any, Any], Any]:
    column = field.get_col(field.model._meta.db_table)

    def convert(value: Any, connection: Any) -> Any:
        for each in converts:
            value = each(value, column, connection)
        return value

    return convert


@lru_cache(maxsize=16)
def _at_first(model: type[models.Model]) -> dict[str, Any]:
    """What most columns of a new row are, of those that a statement can say in so many words."""
    defaults = {
        field.attname: field.get_default()
        for field in model._meta.concrete_fields
        if field.db_default is models.NOT_PROVIDED
        and (field.default in (models.NOT_PROVIDED, list, dict) or not callable(field.default))
    }
    return {name: value for name, value in defaults.items() if _in_words(value) is not None}


def _in_words(value: Any) -> str | None:
    """As SQL of any database; None for what it takes a parameter to say."""
    if value is None:
        return "NULL"
    if value == "":
        return "''"
    if value in ([], {}):
        return f"'{json.dumps(value)}'"
    return str(value) if type(value) is int else None


@lru_cache(maxsize=256)
def _insert(
    model: type[models.Model],
    stored: tuple[str, ...],
    said: tuple[str, ...],
    using: str,
    *,
    returning: bool,
) -> str:
    """With a mark for each of ``said``, and the rest of ``stored`` as it is at first: sixty values
    take longer to send and to read than all that is said of a row."""
    quote = connections[using].ops.quote_name
    first = _at_first(model)
    written = {
        name: "%s" if name in said else _in_words(first[name])
        for name in stored
        if name in said or first[name] is not None
    }
    fields: list[Any] = [model._meta.get_field(name) for name in written]
    columns = ", ".join(quote(field.column) for field in fields)
    values = ", ".join(map(str, written.values()))
    sql = f"INSERT INTO {quote(model._meta.db_table)} ({columns}) VALUES ({values})"  # noqa: S608
    key: Any = model._meta.pk
    return f"{sql} RETURNING {quote(key.column)}" if returning else sql


@lru_cache(maxsize=256)
def _guarded_update(
    model: type[models.Model], names: tuple[str, ...], looked_at: tuple[str, ...], using: str
) -> str:
    quote = connections[using].ops.quote_name
    fields: list[Any] = [model._meta.get_field(name) for name in looked_at]
    # IS, since most are NULL, compares what was found to the last bit.
    guards = "".join(f" AND {quote(field.column)} IS %s" for field in fields)
    return f"{_update(model, names, using)}{guards}"


@lru_cache(maxsize=256)
def _statement(
    receipt: type[models.Model],
    stored: tuple[str, ...],
    row: type[models.Model],
    names: tuple[str, ...],
    using: str,
) -> str:
    """``xmin`` is the transaction that wrote a version of a row: PostgreSQL's own mark of it."""
    quote = connections[using].ops.quote_name
    fields: list[Any] = [receipt._meta.get_field(name) for name in stored]
    columns = ", ".join(quote(field.column) for field in fields)
    marks = ", ".join(["%s"] * len(fields))
    return f"""
        WITH changed AS ({_update(row, names, using)} AND xmin::text = %s RETURNING id)
        INSERT INTO {quote(receipt._meta.db_table)} ({columns})
        SELECT {marks} FROM changed RETURNING id
    """  # noqa: S608 - the models' own names


@lru_cache(maxsize=256)
def _update(model: type[models.Model], names: tuple[str, ...], using: str) -> str:
    quote = connections[using].ops.quote_name
    fields: list[Any] = [model._meta.get_field(name) for name in names]
    sets = ", ".join(f"{quote(field.column)} = %s" for field in fields)
    return f"UPDATE {quote(model._meta.db_table)} SET {sets} WHERE id = %s"  # noqa: S608
