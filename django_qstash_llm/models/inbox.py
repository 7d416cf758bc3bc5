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
from datetime import datetime, tzinfo
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID

from django.db import DatabaseError, connections, models, transaction
from django.db.models.base import ModelState
from django.utils import timezone

from .money import USDField

try:
    from psycopg import Cursor, adapters, pq

    _TIMESTAMPTZ: int = adapters.types["timestamptz"].oid
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
        (field.attname, field.default)
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


def suppose(
    model: type[Row], values: Mapping[str, Any], *, to_learn: tuple[str, ...], using: str
) -> Row:
    """A row that nobody has looked at, for ``store_at_once``, which writes if it is there and holds
    these ``values``. What the columns ``to_learn`` hold is known after that, as is its key."""
    row = new(model, **values)
    names = tuple(values)
    row.__dict__[VERSION] = names, _prepared(model, names, values.values(), connections[using])
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
    sql = _select(model, names, using, by, version, suffix)
    found = _fetch(sql, _prepared(model, (by,), [value], connection), connection)
    if found is None:
        return None
    *held, mark = found
    row = model.__new__(model)
    # What ``from_db`` does, without asking each of sixty fields whether it was loaded.
    row.__dict__.update(_state=ModelState(), **_read(model, names, held, connection))
    row.__dict__[VERSION] = (
        (names, tuple(held)) if mark is None else (("id", MARK), (held[0], mark))
    )
    row._state.adding, row._state.db = False, using
    return row


def insert(row: models.Model, *, using: str) -> None:
    """Store a new row; its key is set. Sends no signals: nobody else's code runs here."""
    connection = connections[using]
    given, values = _given(row, connection)
    if connection.features.can_return_columns_from_insert:
        [row.pk] = _fetch(_insert(row, given, using, returning=True), values, connection)
    else:
        with connection.cursor() as cursor:
            cursor.execute(_insert(row, given, using), values)
            key: Any = row._meta.pk
            row.pk = connection.ops.last_insert_id(cursor, row._meta.db_table, key.column)
    row._state.adding, row._state.db = False, using


def update(row: models.Model, changes: Mapping[str, Any], *, using: str) -> None:
    """Write ``changes`` of a row that is locked."""
    connection = connections[using]
    sets, values = _changed(type(row), changes, connection)
    _write(_update(type(row), sets, using, by="id"), [*values, row.pk], connection)


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
    connection, model = connections[using], type(row)
    sets, values = _changed(model, changes, connection)
    # Not as it is: of an index that holds the rows in one state PostgreSQL believes that these are
    # few, and reads all that have been in it since the last vacuum.
    sql = f"{_update(model, sets, using, by='id')} AND state || '' = %s"
    values += [row.pk, state]
    if entry is None:
        return bool(_write(sql, values, connection))
    if connection.vendor == "postgresql":
        given, more = _given(entry, connection, tuple(_OF_ROW))
        both = _update_and_enter(sql, type(entry), given, using)
        return bool(_write(both, [*values, *more], connection))
    if can_store_at_once(using):
        return _write_and_insert(sql, values, [entry], connection)
    with transaction.atomic(using=using, savepoint=False):
        is_done = bool(_write(sql, values, connection))
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
    connection = connections[using]
    if row is None or not changes:
        if entry is None:
            insert(receipt, using=using)
        elif connection.vendor == "postgresql":
            _insert_both(receipt, entry, connection)
        else:
            _write_and_insert("", (), [receipt, entry], connection)
        return True
    return _AT_ONCE[connection.vendor](receipt, row, changes, entry, connection)


def _insert_both(receipt: models.Model, entry: models.Model, connection: Any) -> None:
    """Of an answer that changes nothing, as nearly always where the same is told again: then PostgreSQL
    refuses both."""
    using = connection.alias
    entered, values = _given(entry, connection)
    stored, more = _given(receipt, connection)
    also, sql = _insert(entry, entered, using), _insert(receipt, stored, using, returning=True)
    [receipt.pk] = _fetch(f"WITH entered AS ({also}) {sql}", [*values, *more], connection)
    receipt._state.adding, receipt._state.db = False, using


def _in_one_statement(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    entry: models.Model | None,
    connection: Any,
) -> bool:
    model, using = type(row), connection.alias
    sets, values = _changed(model, changes, connection)
    guards, held = _guards(row)
    values += held
    entered: Entered | None = None
    if entry is not None:
        given, more = _given(entry, connection, tuple(_OF_ROW))
        entered = type(entry), given
        values += more
    to_learn = getattr(row, TO_LEARN, ())
    given, more = _given(receipt, connection, tuple(_OF_REQUEST))
    told = type(receipt), _left_out(receipt), given
    sql = _statement(told, model, sets, guards, to_learn, entered, using)
    found = _fetch(sql, [*values, *more], connection)
    if found is None:
        return False
    receipt.pk, row.pk, *learned = found
    row.__dict__.update(_read(model, to_learn, learned, connection))
    receipt.__dict__[_LINK] = row.pk
    receipt._state.adding, receipt._state.db = False, using
    return True


def _in_a_short_transaction(
    receipt: models.Model,
    row: models.Model,
    changes: Mapping[str, Any],
    entry: models.Model | None,
    connection: Any,
) -> bool:
    sets, values = _changed(type(row), changes, connection)
    guards, held = _guards(row)
    sql = _guarded_update(type(row), sets, guards, connection.alias)
    rows = [receipt] if entry is None else [receipt, entry]
    return _write_and_insert(sql, [*values, *held], rows, connection)


def _write_and_insert(
    update: str, values: Sequence[Any], rows: Sequence[models.Model], connection: Any
) -> bool:
    """SQLite's way; without an ``update`` it only inserts. By hand: what ``atomic`` keeps account of
    takes as long as writing does."""
    using, is_as_it_was = connection.alias, not update
    inserts = []
    for row in rows:
        given, more = _given(row, connection)
        inserts.append((_for_driver(_insert(row, given, using), connection), more))
    with _cursor(connection) as cursor:
        cursor.execute("BEGIN IMMEDIATE")
        try:
            if update:
                cursor.execute(_for_driver(update, connection), values)
                is_as_it_was = bool(cursor.rowcount)
            if is_as_it_was:
                for row, (sql, more) in zip(rows, inserts, strict=True):
                    cursor.execute(sql, more)
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


def _fetch(sql: str, values: Sequence[Any], connection: Any) -> Any:
    """The first row of what it answers; None where there is none."""
    with _cursor(connection) as cursor:
        cursor.execute(_for_driver(sql, connection), values)
        return cursor.fetchone()


def _write(sql: str, values: Sequence[Any], connection: Any) -> int:
    """How many rows it has changed."""
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
    loader: Any = connection.connection.adapters.get_loader(_TIMESTAMPTZ, pq.Format.TEXT)
    return bool(loader.timezone == connection.timezone)


def _takes_question_marks(connection: Any) -> bool:
    # What is logged is logged as Django writes it.
    return connection.vendor == "sqlite" and not connection.queries_logged


def _for_driver(sql: str, connection: Any) -> str:
    return _with_question_marks(sql) if _takes_question_marks(connection) else sql


@lru_cache(maxsize=256)
def _with_question_marks(sql: str) -> str:
    return sql.replace("%s", "?")


# --- what is written --------------------------------------------------------------------------------

Names = tuple[str, ...]
Sets = tuple[tuple[str, str], ...]
"""Columns, and what is put into each: a mark, or what a statement says by itself."""
Entered = tuple[type[models.Model], Names]
"""Of an entry its model and the columns that are given."""
Told = tuple[type[models.Model], frozenset[str], Names]
"""The same of a receipt, and in the middle the columns that are left to the database."""
_LINK = "llm_request_id"
"""The column of a receipt that names its request."""
_OF_REQUEST = {_LINK: "changed.id"}
_OF_ROW = {
    **{name: f"changed.{name}" for name in ("provider", "model", "tenant", "labels")},
    "user": "COALESCE(changed.user_id::text, '')",
    "about_type": "changed.content_type_id",
    "api_key": "COALESCE(changed.api_key_id::text, '')",
}
"""What the one statement knows of a request that it changes, for receipt and entry."""
_READ_OF_ROW = ("provider", "model", "tenant", "user_id", "labels", "content_type_id", "api_key_id")


class _Column(NamedTuple):
    """A column of a row that is stored."""

    attname: str
    usual: Any
    """What it usually holds, where a statement can say that by itself."""
    is_container: bool
    """Whether ``usual`` is an empty list or object: every row has another one."""
    prepare: Callable[[Any, Any], Any] | None


_GIVEN = object()
"""What no column holds."""
_NOTHING: frozenset[str] = frozenset()


def _left_out(row: Any) -> frozenset[str]:
    left_out: frozenset[str] = getattr(row, "left_to_the_database", _NOTHING)
    return left_out


@lru_cache(maxsize=128)
def _columns(
    model: type[models.Model], left_out: frozenset[str], using: str, said: Names = ()
) -> list[_Column]:
    """Of a row that is stored all but those that are left out, and those that are ``said``."""
    fields = (field for field in model._meta.concrete_fields if not field.primary_key)
    usual = dict(_usual(model))
    return [
        _Column(
            field.attname,
            known := usual.get(field.attname, _GIVEN),
            isinstance(known, list | dict),
            _preparer(field, using),
        )
        for field in fields
        if field.attname not in left_out and field.attname not in said
    ]


def _given(row: Any, connection: Any, said: Names = ()) -> tuple[Names, list[Any]]:
    """The columns that have to be given when a new row is stored, and their values: those that are
    neither ``said`` nor as they usually are, which the statement says by itself."""
    here, given, values = row.__dict__, [], []
    model: type[models.Model] = type(row)
    columns = _columns(model, _left_out(row), connection.alias, said)
    for name, usual, is_container, prepare in columns:
        value = here[name]
        # What is equal, and not the same, may be given.
        if value is not usual and not (is_container and value == usual):
            given.append(name)
            values.append(value if prepare is None else prepare(value, connection))
    return tuple(given), values


def _changed(
    model: type[models.Model], changes: Mapping[str, Any], connection: Any
) -> tuple[Sets, list[Any]]:
    """What an update sets, and the values that it is given."""
    sets, values = [], []
    for name, prepare in _to_prepare(model, tuple(changes), connection.alias):
        value = changes[name]
        if value is None or (prepare is None and value == ""):
            sets.append((name, _literal(value)))
        else:
            sets.append((name, "%s"))
            values.append(value if prepare is None else prepare(value, connection))
    return tuple(sets), values


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


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    # false, true, 0; the rest is '', '[]' or '{}'
    return str(value).lower() if isinstance(value, int) else f"'{value}'"


def _prepared(
    model: type[models.Model], names: Names, values: Iterable[Any], connection: Any
) -> list[Any]:
    """As the ORM does it, without asking a field for which there is nothing to do."""
    return [
        value if prepare is None else prepare(value, connection)
        for value, (_, prepare) in zip(
            values, _to_prepare(model, names, connection.alias), strict=True
        )
    ]


@lru_cache(maxsize=256)
def _to_prepare(
    model: type[models.Model], names: Names, using: str
) -> list[tuple[str, Callable[[Any, Any], Any] | None]]:
    return [(name, _preparer(model._meta.get_field(name), using)) for name in names]


def _preparer(field: Any, using: str) -> Callable[[Any, Any], Any] | None:
    """None for what is given to the driver as it is."""
    vendor = connections[using].vendor
    prepare = cast(Callable[[Any, Any], Any], field.get_db_prep_save)
    if vendor == "sqlite" and isinstance(field, models.DateTimeField):
        return partial(_moment, prepare)
    plain = _PLAIN + _PLAIN_TO_POSTGRESQL * (vendor == "postgresql")
    held = field
    while isinstance(held, models.ForeignKey):  # holds what the key that it names does
        held = held.target_field
    return prepare if isinstance(held, USDField) or not isinstance(held, plain) else None


def _moment(prepare: Callable[[Any, Any], Any], value: Any, connection: Any) -> Any:
    # Two moments that differ in their fold alone are one to a cache.
    if value is None or value.tzinfo is None or value.fold or connection.timezone is None:
        return prepare(value, connection)
    return _in_time_zone(value, connection.timezone)


@lru_cache(maxsize=64)
def _in_time_zone(value: datetime, time_zone: tzinfo) -> str:
    """As SQLite's backend writes it. Each callback writes the same one six times."""
    return str(timezone.make_naive(value, time_zone))


# What is given to the driver as it is.
_PLAIN: tuple[type[models.Field[Any, Any]], ...] = (
    *(models.CharField, models.TextField, models.IntegerField, models.BooleanField),
    models.BinaryField,
)
_PLAIN_TO_POSTGRESQL = (models.UUIDField, models.DateTimeField, models.DecimalField)


# --- what is read -----------------------------------------------------------------------------------


def _read(
    model: type[models.Model], names: Names, held: Sequence[Any], connection: Any
) -> dict[str, Any]:
    """Columns as they are in Python, of what the database holds."""
    return {
        attname: value if value is None or convert is None else convert(value, connection)
        for value, (attname, convert) in zip(
            held, _readers(model, names, connection.alias), strict=True
        )
    }


@lru_cache(maxsize=32)
def _readers(
    model: type[models.Model], names: Names, using: str
) -> list[tuple[str, Callable[[Any, Any], Any] | None]]:
    """As the ORM does it: SQLite hands out moments as text."""
    connection = connections[using]
    readers = []
    for name in names:
        field: Any = model._meta.get_field(name)
        column = field.get_col(field.model._meta.db_table)
        converts = [
            *connection.ops.get_db_converters(column),
            *field.get_db_converters(connection),
        ]
        readers.append((field.attname, _converter(column, converts) if converts else None))
    return readers


def _converter(column: Any, converts: Sequence[Any]) -> Callable[[Any, Any], Any]:
    def convert(value: Any, connection: Any) -> Any:
        for each in converts:
            value = each(value, column, connection)
        return value

    return convert


# --- statements --------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _select(
    model: type[models.Model], names: Names, using: str, by: str, version: str, suffix: str
) -> str:
    columns = ", ".join(_column(model, name, using) for name in names)
    return f"SELECT {columns}, {version} FROM {_table(model, using)} WHERE {by} = %s{suffix}"  # noqa: S608


def _insert(row: Any, given: Names, using: str, *, returning: bool = False) -> str:
    model: type[models.Model] = type(row)
    return _insert_of(model, _left_out(row), given, using, returning)


@lru_cache(maxsize=256)
def _insert_of(
    model: type[models.Model],
    left_out: frozenset[str],
    given: Names,
    using: str,
    returning: bool,
) -> str:
    """With a mark for each column that is ``given``: sixty values take longer to send and to read than
    all that is said of a row."""
    columns, marks = _marks(model, left_out, given, using)
    sql = f"INSERT INTO {_table(model, using)} ({columns}) VALUES ({marks})"  # noqa: S608
    return f"{sql} RETURNING {_key(model, using)}" if returning else sql


def _marks(
    model: type[models.Model],
    left_out: frozenset[str],
    given: Names,
    using: str,
    said: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """The columns of a new row, and what is put into each: what is ``said`` of it, one that is given,
    or the usual value."""
    marks = {
        column.attname: "%s" if column.attname in given else _literal(column.usual)
        for column in _columns(model, left_out, using)
    } | dict(said or {})
    return ", ".join(_column(model, name, using) for name in marks), ", ".join(marks.values())


@lru_cache(maxsize=256)
def _guarded_update(model: type[models.Model], sets: Sets, guards: Sets, using: str) -> str:
    # IS, since most are NULL, compares what was found to the last bit.
    (key, _), *others = guards
    also = "".join(f" AND {_column(model, name, using)} IS {mark}" for name, mark in others)
    return f"{_update(model, sets, using, by=key)}{also}"


def _guards(row: Any) -> tuple[Sets, list[Any]]:
    """By what a row is found that is still as it was, the first of it by an index; and the values."""
    names, held = getattr(row, VERSION)
    guards = [
        (name, "NULL" if value is None else "%s") for name, value in zip(names, held, strict=True)
    ]
    return tuple(guards), [value for value in held if value is not None]


@lru_cache(maxsize=256)
def _statement(
    told: Told,
    row: type[models.Model],
    sets: Sets,
    guards: Sets,
    to_learn: Names,
    entered: Entered | None,
    using: str,
) -> str:
    """The one statement that is raw because nothing else is one: a short transaction is four messages
    to and fro, during which the row is locked."""
    receipt, left_out, given = told
    columns, marks = _marks(receipt, left_out, given, using, _OF_REQUEST)
    (key, _), *others = guards
    # What the key finds is to be looked at, and no index over "submitted": of how many there are the
    # planner knows what was true a while ago.
    also = "".join(
        f" AND {_column(row, name, using)} " + ("IS NULL" if mark == "NULL" else "|| '' = %s")
        for name, mark in others
    )
    entering = f", entered AS ({_enter(*entered, using)})" if entered else ""
    learned = "".join(
        f", (SELECT {_column(row, name, using)} FROM changed)"  # noqa: S608
        for name in to_learn
    )
    read = {"id", *_READ_OF_ROW, *to_learn}
    return f"""
        WITH changed AS (
            {_update(row, sets, using, by=key)}{also}
            RETURNING {", ".join(_column(row, name, using) for name in sorted(read))}
        ){entering}
        INSERT INTO {_table(receipt, using)} ({columns})
        SELECT {marks} FROM changed
        RETURNING {_key(receipt, using)}, {_column(receipt, _LINK, using)}{learned}
    """  # noqa: S608 - the models' own names


@lru_cache(maxsize=256)
def _update_and_enter(update: str, entry: type[models.Model], given: Names, using: str) -> str:
    return f"""
        WITH changed AS ({update} RETURNING id, {", ".join(_READ_OF_ROW)})
        {_enter(entry, given, using)}
    """


def _enter(entry: type[models.Model], given: Names, using: str) -> str:
    columns, marks = _marks(entry, _NOTHING, given, using, _OF_ROW)
    return f"INSERT INTO {_table(entry, using)} ({columns}) SELECT {marks} FROM changed"  # noqa: S608


@lru_cache(maxsize=256)
def _update(model: type[models.Model], sets: Sets, using: str, *, by: str) -> str:
    sql = ", ".join(f"{_column(model, name, using)} = {mark}" for name, mark in sets)
    return f"UPDATE {_table(model, using)} SET {sql} WHERE {_column(model, by, using)} = %s"  # noqa: S608


def _table(model: type[models.Model], using: str) -> str:
    return connections[using].ops.quote_name(model._meta.db_table)


def _key(model: type[models.Model], using: str) -> str:
    key: Any = model._meta.pk
    return connections[using].ops.quote_name(key.column)


def _column(model: type[models.Model], name: str, using: str) -> str:
    if name == MARK:
        return f"{MARK}::text"
    field: Any = model._meta.get_field(name)
    return connections[using].ops.quote_name(field.column)
