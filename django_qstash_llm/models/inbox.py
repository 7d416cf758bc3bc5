"""The statements of a callback: look at the request, store the receipt, write what it changes.

Plain SQL of the smallest kind, put together once and not for each callback: composing it with the
ORM takes more time than all the rest of a callback, its signature included.

With a lock these are three statements in a transaction, five messages to and fro on PostgreSQL, and
on SQLite every other writer waits while the callback is read. ``store_at_once`` writes if the row is
still the one that was looked at without a lock, and otherwise nothing at all, so that it is done again
with one: on PostgreSQL one statement, on SQLite a short transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar
from uuid import UUID

from django.db import DatabaseError, connections, models, transaction
from django.db.models.base import ModelState

from .money import USDField

try:
    from psycopg import Cursor, adapters, pq
except ImportError:  # psycopg2, or no PostgreSQL at all
    Cursor: Any = None  # type: ignore[no-redef]

Row = TypeVar("Row", bound=models.Model)


VERSION = "_version"
"""Where a row that was looked at keeps which version of it that was: names of columns and what they
held. On PostgreSQL these are its key and PostgreSQL's own mark of a version."""
MARK = "xmin"
"""The transaction that wrote a version of a row."""


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
    return _look(model, uuid, names, using, version=f"{MARK}::text" if is_postgresql else "NULL")


def can_suppose(using: str) -> bool:
    """Whether a wrong supposition costs less than looking does."""
    return connections[using].vendor == "postgresql"


def suppose(model: type[Row], values: Mapping[str, Any], *, to_learn: str, using: str) -> Row:
    """A row that nobody has looked at, for ``store_at_once``, which writes if it is there and holds
    these ``values``. What the field ``to_learn`` holds is known after that, as is its key."""
    row = new(model)
    row.__dict__.update(values)
    names = tuple(values)
    row.__dict__[VERSION] = names, _prepared(model, names, values.values(), using)
    row.__dict__[TO_LEARN] = to_learn
    row._state.adding, row._state.db = False, using
    return row


TO_LEARN = "_to_learn"


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
    sql, attnames, converters = _select(model, names, using, by, version, suffix)
    found = _fetch(sql, _prepared(model, (by,), [value], using), using)
    if found is None:
        return None
    values = list(found)
    mark = values[-1]
    values[-1] = (names, found[:-1]) if mark is None else (("id", MARK), (values[0], mark))
    for index, convert in converters:
        values[index] = convert(values[index], connection)
    # What ``from_db`` does, without asking each of sixty fields whether it was loaded.
    row = model.__new__(model)
    row.__dict__.update(zip(attnames, values, strict=True), _state=ModelState())
    row._state.adding, row._state.db = False, using
    return row


def insert(row: models.Model, *, using: str) -> None:
    """Store a new row; its key is set. Sends no signals: nobody else's code runs here."""
    connection = connections[using]
    names, usual, values = _stored(row, using)
    if connection.features.can_return_columns_from_insert:
        sql = _insert(type(row), names, usual, using, returning=True)
        [row.pk] = _fetch(sql, values, using)
    else:
        with connection.cursor() as cursor:
            cursor.execute(_insert(type(row), names, usual, using, returning=False), values)
            key: Any = row._meta.pk
            row.pk = connection.ops.last_insert_id(cursor, row._meta.db_table, key.column)
    row._state.adding, row._state.db = False, using


def update(row: models.Model, changes: Mapping[str, Any], *, using: str) -> None:
    """Write ``changes`` of a row that is locked."""
    names = tuple(changes)
    values = _prepared(type(row), names, changes.values(), using)
    _write(_update(type(row), names, using), [*values, row.pk], using)


def update_in(
    row: models.Model,
    state: str,
    changes: Mapping[str, Any],
    entry: models.Model | None = None,
    *,
    using: str,
) -> bool:
    """Write ``changes`` of a row that nobody has locked, and store ``entry``, and whether the row was
    in ``state`` still; otherwise neither is done."""
    connection, names = connections[using], tuple(changes)
    values = [*_prepared(type(row), names, changes.values(), using), row.pk, state]
    # Not as it is: of an index that holds the rows in one state PostgreSQL believes that these are
    # few, and reads all that have been in it since the last vacuum.
    sql = f"{_update(type(row), names, using)} AND state || '' = %s"
    if entry is None:
        return bool(_write(sql, values, using))
    if connection.vendor == "postgresql":
        entered, usual, more = _stored(entry, using, without=_OF_ROW)
        both = _update_and_enter(sql, type(entry), entered, usual, using)
        return bool(_write(both, [*values, *more], using))
    if can_store_at_once(using):
        return _write_and_insert(sql, values, [entry], using)
    with transaction.atomic(using=using, savepoint=False):
        is_done = bool(_write(sql, values, using))
        if is_done:
            insert(entry, using=using)
    return is_done


def can_store_at_once(using: str) -> bool:
    """By itself: in a transaction of somebody else's a refusal would end that. With autocommit off
    there is always one."""
    connection = connections[using]
    is_by_itself = connection.get_autocommit() and not connection.in_atomic_block
    return connection.vendor in _AT_ONCE and is_by_itself


def store_at_once(
    receipt: models.Model,
    row: models.Model | None,
    changes: Mapping[str, Any],
    entry: models.Model | None = None,
    *,
    using: str,
) -> bool:
    """Store ``receipt`` and ``entry`` and write ``changes`` of ``row``, all or nothing, and whether it
    was all: it is nothing when somebody has changed the row since ``look``."""
    if row is None or not changes:
        if entry is None:
            insert(receipt, using=using)
        elif connections[using].vendor == "postgresql":
            _insert_both(receipt, entry, using)
        else:
            _write_and_insert("", (), [receipt, entry], using)
        return True
    return _AT_ONCE[connections[using].vendor](receipt, row, changes, entry, using)


def _insert_both(receipt: models.Model, entry: models.Model, using: str) -> None:
    """Of an answer that changes nothing, as nearly always where the same is told again: then PostgreSQL
    refuses both."""
    entered, as_usual, given = _stored(entry, using)
    stored, usual, values = _stored(receipt, using)
    also = _insert(type(entry), entered, as_usual, using, returning=False)
    sql = _insert(type(receipt), stored, usual, using, returning=True)
    [receipt.pk] = _fetch(f"WITH entered AS ({also}) {sql}", [*given, *values], using)
    receipt._state.adding, receipt._state.db = False, using


def _in_one_statement(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    entry: models.Model | None,
    using: str,
) -> bool:
    names, (known, held) = tuple(changes), getattr(row, VERSION)
    to_learn = getattr(row, TO_LEARN, "id")
    stored, usual, values = _stored(receipt, using, without=_OF_REQUEST)
    changed = _prepared(type(row), names, changes.values(), using)
    nulls = tuple(name for name, value in zip(known, held, strict=True) if value is None)
    held = [value for value in held if value is not None]
    entered: Entered | None = None
    if entry is not None:
        columns, as_usual, more = _stored(entry, using, without=_OF_ROW)
        entered, values = (type(entry), columns, as_usual), [*more, *values]
    sql = _statement(
        type(receipt), stored, usual, type(row), names, known, nulls, to_learn, entered, using
    )
    found = _fetch(sql, [*changed, *held, *values], using)
    if found is None:
        return False
    receipt.pk, row.pk, row.__dict__[to_learn] = found
    receipt.__dict__[_LINK] = row.pk
    receipt._state.adding, receipt._state.db = False, using
    return True


def _in_a_short_transaction(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    entry: models.Model | None,
    using: str,
) -> bool:
    names, (looked_at, found) = tuple(changes), getattr(row, VERSION)
    update = _guarded_update(type(row), names, looked_at, using)
    changed = _prepared(type(row), names, changes.values(), using)
    rows = [receipt] if entry is None else [receipt, entry]
    return _write_and_insert(update, [*changed, row.pk, *found], rows, using)


def _write_and_insert(
    update: str, values: Sequence[Any], rows: Sequence[models.Model], using: str
) -> bool:
    """SQLite's way; without an ``update`` it only inserts. By hand: what ``atomic`` keeps account of takes as long as writing does."""
    connection = connections[using]
    inserts = []
    for row in rows:
        stored, usual, given = _stored(row, using)
        inserts.append((_insert(type(row), stored, usual, using, returning=False), given))
    with _cursor(connection) as cursor:
        cursor.execute("BEGIN IMMEDIATE")
        try:
            is_as_it_was = not update
            if update:
                cursor.execute(_for_driver(update, connection), values)
                is_as_it_was = bool(cursor.rowcount)
            if is_as_it_was:
                for row, (sql, given) in zip(rows, inserts, strict=True):
                    cursor.execute(_for_driver(sql, connection), given)
                    row.pk = cursor.lastrowid
            connection.commit()
        except BaseException:
            try:
                connection.rollback()
            except DatabaseError:  # nobody knows what state it is in
                connection.close()
            raise
    for row in rows:
        row._state.adding, row._state.db = not is_as_it_was, using
    return is_as_it_was


_AT_ONCE = {"postgresql": _in_one_statement, "sqlite": _in_a_short_transaction}


# --- how a statement is given to the driver --------------------------------------------------------


def _fetch(sql: str, values: Sequence[Any], using: str) -> Any:
    """The first row of what it answers; None where there is none."""
    connection = connections[using]
    with _cursor(connection) as cursor:
        cursor.execute(_for_driver(sql, connection), values)
        return cursor.fetchone()


def _write(sql: str, values: Sequence[Any], using: str) -> int:
    """How many rows it has changed."""
    connection = connections[using]
    with _cursor(connection) as cursor:
        cursor.execute(_for_driver(sql, connection), values)
        rows: int = cursor.rowcount
        return rows


def _cursor(connection: Any) -> Any:
    """The driver's own in Django's wrapper. Django's would write the values into PostgreSQL's text,
    and look for SQLite's marks, at every call."""
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    with connection.wrap_database_errors:
        if connection.vendor == "postgresql" and Cursor is not None and _tells_time(connection):
            cursor: Any = Cursor(connection.connection)
            if connection.queries_logged:
                return connection.make_debug_cursor(cursor)
            return connection.make_cursor(cursor)
        if _takes_question_marks(connection):
            return connection.make_cursor(connection.connection.cursor())
    return connection.cursor()


def _tells_time(connection: Any) -> bool:
    """Whether the driver hands moments out in the time zone that Django wants them in: as a connection
    does that was opened under the settings there are now. Else Django's cursor sees to that."""
    loader: Any = connection.connection.adapters.get_loader(
        adapters.types["timestamptz"].oid, pq.Format.TEXT
    )
    return bool(loader.timezone == connection.timezone)


def _takes_question_marks(connection: Any) -> bool:
    # What is logged is logged as Django writes it.
    return connection.vendor == "sqlite" and not connection.queries_logged


def _for_driver(sql: str, connection: Any) -> str:
    return _with_question_marks(sql) if _takes_question_marks(connection) else sql


@lru_cache(maxsize=256)
def _with_question_marks(sql: str) -> str:
    return sql.replace("%s", "?")


Entered = tuple[type[models.Model], tuple[str, ...], frozenset[str]]
"""Of an entry its model, its columns, and those of them that a statement says itself."""
_LINK = "llm_request_id"
"""The column of a receipt that names its request."""
_OF_REQUEST = {_LINK: "changed.id"}
_READ_OF_ROW = ("provider", "model", "tenant", "user_id", "labels", "content_type_id", "api_key_id")
_OF_ROW = {
    **{name: f"changed.{name}" for name in ("provider", "model", "tenant", "labels")},
    "user": "COALESCE(changed.user_id::text, '')",
    "about_type": "changed.content_type_id",
    "api_key": "COALESCE(changed.api_key_id::text, '')",
}
"""What the one statement knows of a request that it changes, for receipt and entry."""


def _stored(
    row: Any, using: str, *, without: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], frozenset[str], list[Any]]:
    """The columns that are named when a new row is stored, those of them that are as they usually
    are, which the statement says itself, and the values of the others."""
    model: type[models.Model] = type(row)
    names = _names_without(model, getattr(row, "left_to_the_database", _NOTHING))
    here = row.__dict__
    usual = frozenset(
        name for name, value in _usual(model) if here[name] == value and name not in (without or ())
    ) | frozenset(without or ())
    named = tuple(name for name in names if name not in usual)
    return names, usual, _prepared(model, named, [here[name] for name in named], using)


_NOTHING: frozenset[str] = frozenset()


@lru_cache(maxsize=16)
def _usual(model: type[models.Model]) -> list[tuple[str, Any]]:
    """Of each column that a statement can say by itself what it usually holds."""
    defaults = _defaults(model) | {
        field.attname: field.default()
        for field in model._meta.concrete_fields
        if field.default in (list, dict)
    }
    return [
        (name, value)
        for name, value in defaults.items()
        if value is None or value in ("", [], {}) or isinstance(value, int)
    ]


def _marks(
    model: type[models.Model],
    names: tuple[str, ...],
    usual: frozenset[str],
    using: str,
    said: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """The columns of a new row, and what is put into each: what is ``said`` of it, the usual value,
    or one that is given."""
    defaults = {name: _literal(value) for name, value in _usual(model)} | dict(said or {})
    marks = [defaults[name] if name in usual else "%s" for name in names]
    return ", ".join(_column(model, name, using) for name in names), ", ".join(marks)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    # false, true, 0; the rest is '', '[]' or '{}'
    return str(value).lower() if isinstance(value, int) else f"'{value}'"


@lru_cache(maxsize=16)
def _names_without(model: type[models.Model], left_out: frozenset[str]) -> tuple[str, ...]:
    fields = (field for field in model._meta.concrete_fields if not field.primary_key)
    return tuple(field.attname for field in fields if field.attname not in left_out)


def _prepared(
    model: type[models.Model], names: tuple[str, ...], values: Iterable[Any], using: str
) -> list[Any]:
    """As the ORM does it, without asking a field for which there is nothing to do."""
    prepared = list(values)
    if to_prepare := _to_prepare(model, names, using):
        connection = connections[using]
        for index, field in to_prepare:
            prepared[index] = field.get_db_prep_save(prepared[index], connection)
    return prepared


@lru_cache(maxsize=256)
def _to_prepare(
    model: type[models.Model], names: tuple[str, ...], using: str
) -> list[tuple[int, Any]]:
    plain = _PLAIN + _PLAIN_TO_POSTGRESQL * (connections[using].vendor == "postgresql")
    fields = (model._meta.get_field(name) for name in names)
    return [
        (i, field)
        for i, field in enumerate(fields)
        if isinstance(field, USDField) or not isinstance(field, plain)
    ]


# What is given to the driver as it is.
_PLAIN: tuple[type[models.Field[Any, Any]], ...] = (
    *(models.CharField, models.TextField, models.IntegerField, models.BooleanField),
    *(models.BinaryField, models.ForeignKey),
)
_PLAIN_TO_POSTGRESQL = (models.UUIDField, models.DateTimeField, models.DecimalField)


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


@lru_cache(maxsize=256)
def _insert(
    model: type[models.Model],
    names: tuple[str, ...],
    usual: frozenset[str],
    using: str,
    *,
    returning: bool,
) -> str:
    """With a mark for each of ``names`` that is not ``usual``: sixty values take longer to send and to
    read than all that is said of a row."""
    quote = connections[using].ops.quote_name
    columns, marks = _marks(model, names, usual, using)
    sql = f"INSERT INTO {quote(model._meta.db_table)} ({columns}) VALUES ({marks})"  # noqa: S608
    key: Any = model._meta.pk
    return f"{sql} RETURNING {quote(key.column)}" if returning else sql


@lru_cache(maxsize=256)
def _guarded_update(
    model: type[models.Model], names: tuple[str, ...], looked_at: tuple[str, ...], using: str
) -> str:
    # IS, since most are NULL, compares what was found to the last bit.
    guards = "".join(f" AND {_column(model, name, using)} IS %s" for name in looked_at)
    return f"{_update(model, names, using)}{guards}"


@lru_cache(maxsize=256)
def _statement(
    receipt: type[models.Model],
    stored: tuple[str, ...],
    usual: frozenset[str],
    row: type[models.Model],
    names: tuple[str, ...],
    known: tuple[str, ...],
    nulls: tuple[str, ...],
    to_learn: str,
    entered: Entered | None,
    using: str,
) -> str:
    """The one statement that is raw because nothing else is one: a short transaction is four messages
    to and fro, during which the row is locked."""
    quote = connections[using].ops.quote_name
    columns, marks = _marks(receipt, stored, usual, using, _OF_REQUEST)
    key, *others = known
    # What the key finds is to be looked at, and no index over "submitted": of how many there are the
    # planner knows what was true a while ago.
    guards = "".join(
        f" AND {_column(row, name, using)} " + ("IS NULL" if name in nulls else "|| '' = %s")
        for name in others
    )
    learned: Any = row._meta.get_field(to_learn)
    read = entering = ""
    if entered is not None:
        read = _read_of_row(using)
        entering = f", entered AS ({_enter(*entered, using)})"
    return f"""
        WITH changed AS (
            UPDATE {quote(row._meta.db_table)} SET {_sets(row, names, using)}
            WHERE {_column(row, key, using)} = %s{guards}
            RETURNING id, {quote(learned.column)} AS learned {read}
        ){entering}
        INSERT INTO {quote(receipt._meta.db_table)} ({columns})
        SELECT {marks} FROM changed
        RETURNING id, {quote(_LINK)}, (SELECT learned FROM changed)
    """  # noqa: S608 - the models' own names


@lru_cache(maxsize=256)
def _update_and_enter(
    update: str,
    entry: type[models.Model],
    names: tuple[str, ...],
    usual: frozenset[str],
    using: str,
) -> str:
    return f"""
        WITH changed AS ({update} RETURNING id {_read_of_row(using)})
        {_enter(entry, names, usual, using)}
    """


def _read_of_row(using: str) -> str:
    quote = connections[using].ops.quote_name
    return "".join(f", {quote(name)}" for name in _READ_OF_ROW)


def _enter(
    entry: type[models.Model], names: tuple[str, ...], usual: frozenset[str], using: str
) -> str:
    columns, marks = _marks(entry, names, usual, using, _OF_ROW)
    table = connections[using].ops.quote_name(entry._meta.db_table)
    return f"INSERT INTO {table} ({columns}) SELECT {marks} FROM changed"  # noqa: S608


def _column(model: type[models.Model], name: str, using: str) -> str:
    if name == MARK:
        return f"{MARK}::text"
    field: Any = model._meta.get_field(name)
    return connections[using].ops.quote_name(field.column)


@lru_cache(maxsize=256)
def _update(model: type[models.Model], names: tuple[str, ...], using: str) -> str:
    table = connections[using].ops.quote_name(model._meta.db_table)
    return f"UPDATE {table} SET {_sets(model, names, using)} WHERE id = %s"  # noqa: S608


def _sets(model: type[models.Model], names: tuple[str, ...], using: str) -> str:
    return ", ".join(f"{_column(model, name, using)} = %s" for name in names)
