"""``Spend``: the ledger, added up by day. Made of it by ``Settlement``, and made anew by ``llm_spend``.

An answer is in several rows: in that of its day, provider and model, and once more in those of its
tenant, its user, each of its labels, what it was about and the API key. So each question reads few rows, and
a request with two labels counts once in the whole and once in each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from django.contrib.contenttypes.models import ContentType
from django.db import connections, models, transaction
from django.db.models import Sum
from django.utils.translation import gettext_lazy as _

from ..exceptions import InvalidRequest
from .ledger import SUMMED, LedgerEntry, Total, about_model_of, texts_in, total_of
from .money import USDField, units
from .request import LLMRequest

ROWS_AT_ONCE = 200
"""In one statement."""
ENTRIES_AT_ONCE = 5000


def lock_out_writers(model: type[models.Model], *, using: str) -> None:
    """Until the transaction ends nobody else writes rows of ``model``; they are read as before. (SQLite
    has one writer anyway.)"""
    connection = connections[using]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            table = connection.ops.quote_name(model._meta.db_table)
            cursor.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")


class Dimension(models.TextChoices):
    """By what it is added up, beside day, provider and model."""

    ALL = "", _("all")
    TENANT = "tenant", _("tenant")
    USER = "user", _("user")
    LABEL = "label", _("label")
    ABOUT = "about", _("about")
    API_KEY = "api_key", _("API key")


DIMENSIONS = tuple(each.value for each in Dimension if each.value)
BY = ("day", "month", "provider", "model", *DIMENSIONS)


class Key(NamedTuple):
    """Which row of ``Spend``."""

    dimension: str
    value: str
    day: date
    month: date
    provider: str
    model: str


class Difference(NamedTuple):
    """A row that is not what the ledger says. Figures are those of ``SUMMED``."""

    key: Key
    found: list[Any] | None
    """None where there is no such row."""
    expected: list[Any]


def places_of(entry: Mapping[str, Any], using: str) -> set[tuple[str, str]]:
    """Dimension and value of the rows that an entry, as a dictionary, is in."""
    places = {("", "")}
    for name in ("tenant", "user", "api_key"):
        if entry[name]:
            places.add((name, entry[name]))
    if about := about_model_of(entry["about_type"], using):
        places.add(("about", about))
    places.update(("label", label[:255]) for label in texts_in(entry["labels"]) if label)
    return places


ENTRY_FIELDS = (
    *("day", "provider", "model", "tenant", "user", "labels", "about_type", "api_key"),
    *SUMMED,
)


_NOTHING = [getattr(Total, name) for name in SUMMED]


def added_up(entries: Iterable[Mapping[str, Any]], using: str) -> dict[Key, list[Any]]:
    """What ``entries``, dictionaries of ``ENTRY_FIELDS``, come to, in each row of ``Spend``."""
    sums: dict[Key, list[Any]] = defaultdict(lambda: [*_NOTHING])
    for entry in entries:
        day = entry["day"]
        figures = [entry[name] for name in SUMMED]
        for place in places_of(entry, using):
            key = Key(*place, day, day.replace(day=1), entry["provider"], entry["model"])
            sums[key] = [a + b for a, b in zip(sums[key], figures, strict=True)]
    return sums


class SpendQuerySet(models.QuerySet["Spend"]):
    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add ``entries`` to the rows that they are in, which are made where there is none."""
        self._for_write = True
        # In one order for all, so that two of them do not wait for each other.
        rows = sorted(added_up(entries, self.db).items())
        for first in range(0, len(rows), ROWS_AT_ONCE):
            self._add(rows[first : first + ROWS_AT_ONCE])

    def _add(self, rows: Sequence[tuple[Key, Sequence[Any]]]) -> None:
        """The one statement that the ORM cannot say: its conflicts replace, they do not add."""
        connection = connections[self.db]
        quote = connection.ops.quote_name
        table = quote(self.model._meta.db_table)
        columns = [quote(name) for name in (*Key._fields, *SUMMED)]
        marks = f"({', '.join(['%s'] * len(columns))})"
        adds = [
            f"{quote(name)} = {table}.{quote(name)} + EXCLUDED.{quote(name)}" for name in SUMMED
        ]
        of_a_row = ("dimension", "value", "day", "provider", "model")
        sql = f"""
            INSERT INTO {table} ({", ".join(columns)})
            VALUES {", ".join([marks] * len(rows))}
            ON CONFLICT ({", ".join(quote(name) for name in of_a_row)})
            DO UPDATE SET {", ".join(adds)}
        """  # noqa: S608 - the model's own names
        to_date = connection.ops.adapt_datefield_value
        values: list[Any] = []
        for key, figures in rows:
            values += [
                *(to_date(part) if isinstance(part, date) else part for part in key),
                *(
                    units(figure) if name in ("spent", "useful") else figure
                    for name, figure in zip(SUMMED, figures, strict=True)
                ),
            ]
        with connection.cursor() as cursor:
            cursor.execute(sql, values)

    def report(
        self,
        *by: str,
        since: date | None = None,
        until: date | None = None,
        provider: str | None = None,
        model: str | None = None,
        **place: str,
    ) -> list[tuple[dict[str, Any], Total]]:
        """What was spent from ``since`` to ``until``, both included, split up ``by`` any of ``day``,
        ``month``, ``provider``, ``model`` and one of ``tenant``, ``user``, ``label``, ``about``,
        ``api_key``; ``place`` is one of the latter with its value, to look at that alone.

        Answers what each line is of, and its ``Total``, in the order of ``by``. Days are the site's
        time zone's. What was answered up to now is in it. Raises ``InvalidRequest``.
        """
        from .settlement import settle  # it knows what is added up here

        dimension = self.check_report(*by, **place)
        self._for_write = True
        if (
            LedgerEntry.objects.using(self.db).unfolded().exists()
        ):  # what is reserved is in no row here
            settle(self.db)
        rows = self.filter(dimension=dimension)
        chosen = {
            "value": place.get(dimension),
            "day__gte": since,
            "day__lte": until,
            "provider": provider,
            "model": model,
        }
        rows = rows.filter(**{name: value for name, value in chosen.items() if value is not None})
        columns = ["value" if name in DIMENSIONS else name for name in by]
        sums = {f"total_{name}": Sum(name) for name in SUMMED}
        if not by:
            return [({}, total_of([*rows.aggregate(**sums).values()]))]
        grouped: Any = rows.order_by(*columns).values_list(*columns).annotate(**sums)
        return [
            (dict(zip(by, row[: len(by)], strict=True)), total_of(row[len(by) :]))
            for row in grouped
        ]

    def check_report(self, *by: str, **place: str) -> str:
        """Raise ``InvalidRequest`` unless ``report`` can answer that. Answers in what ``Dimension``."""
        return _dimension(by, place)

    def rebuild(self, on_progress: Callable[[int], None] = lambda done: None) -> int:
        """Add the whole ledger up anew, in one transaction; how many entries that were.

        Nobody sees it half done. What is answered meanwhile is added when this is over.
        """
        self._for_write = True
        with transaction.atomic(using=self.db):
            lock_out_writers(self.model, using=self.db)
            self.all().delete()
            sums, done = self._ledger_added_up(on_progress)
            rows = sorted(sums.items())
            for first in range(0, len(rows), ROWS_AT_ONCE):
                self._add(rows[first : first + ROWS_AT_ONCE])
        return done

    def differences(
        self, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Difference]:
        """Where the rows are not what the ledger, as far as it is settled, adds up to. None of them
        unless somebody has meddled. Settling waits meanwhile."""
        self._for_write = True
        with transaction.atomic(using=self.db):
            lock_out_writers(self.model, using=self.db)
            sums, _done = self._ledger_added_up(on_progress)
            found = []
            rows = self.order_by().values_list(*Key._fields, *SUMMED)
            for row in rows.iterator(chunk_size=ENTRIES_AT_ONCE):
                key, figures = Key(*row[: len(Key._fields)]), list(row[len(Key._fields) :])
                expected = sums.pop(key, _NOTHING)
                if figures != expected:
                    found.append(Difference(key, figures, expected))
            found += [Difference(key, None, e) for key, e in sums.items() if e != _NOTHING]
        return sorted(found, key=lambda difference: difference.key)

    def _ledger_added_up(
        self, on_progress: Callable[[int], None]
    ) -> tuple[dict[Key, list[Any]], int]:
        """What all that is folded comes to, and how many entries that are. Read while the lock is held:
        what somebody else is adding right now is not folded yet."""
        sums: dict[Key, list[Any]] = {}
        done = last = 0
        folded = LedgerEntry.objects.using(self.db).filter(is_folded=True).order_by("pk")
        while piece := list(
            folded.filter(pk__gt=last).values("pk", *ENTRY_FIELDS)[:ENTRIES_AT_ONCE]
        ):
            last = piece[-1]["pk"]
            for key, figures in added_up(piece, self.db).items():
                known = sums.get(key, _NOTHING)
                sums[key] = [a + b for a, b in zip(known, figures, strict=True)]
            done += len(piece)
            on_progress(done)
        return sums, done


def _dimension(by: Sequence[str], place: Mapping[str, str]) -> str:
    for name in by:
        if name not in BY:
            raise InvalidRequest("by", f"{name!r} is none of {', '.join(BY)}")
    if len(set(by)) != len(by):
        raise InvalidRequest("by", "names the same twice")
    for name in place:
        if name not in DIMENSIONS:
            raise InvalidRequest(name, f"give one of {', '.join(DIMENSIONS)}")
    named = {*place, *(name for name in by if name in DIMENSIONS)}
    if len(named) > 1:
        raise InvalidRequest(
            "by",
            f"{' and '.join(sorted(named))} together are not added up; give one of them, or ask "
            "LLMRequest.objects.filter(…).cost()",
        )
    return next(iter(named), "")


class Spend(models.Model):
    """What one day came to, of one provider, model and place."""

    dimension = models.CharField(
        _("dimension"), max_length=16, choices=Dimension, blank=True, default=Dimension.ALL
    )
    value = models.CharField(_("value"), max_length=255, blank=True)
    day = models.DateField(_("day"))
    month = models.DateField(_("month"), help_text=_("Its first day."))
    provider = models.CharField(_("provider"), max_length=64)
    model = models.CharField(_("model"), max_length=255)
    spent = USDField(_("spent"))
    useful = USDField(_("useful"))
    answers = models.BigIntegerField(_("answers"))
    unpriced = models.BigIntegerField(_("unpriced"))
    input_tokens = models.BigIntegerField(_("input tokens"))
    output_tokens = models.BigIntegerField(_("output tokens"))
    cached_tokens = models.BigIntegerField(_("cached tokens"))
    cache_write_tokens = models.BigIntegerField(_("cache write tokens"))
    reasoning_tokens = models.BigIntegerField(_("reasoning tokens"))

    objects = SpendQuerySet.as_manager()

    class Meta:
        verbose_name = _("spend")
        verbose_name_plural = _("spend")
        ordering = ("-day", "provider", "model")
        constraints = (
            models.UniqueConstraint(
                fields=["dimension", "value", "day", "provider", "model"], name="llm_spend_row"
            ),
        )

    def __str__(self) -> str:
        return f"{self.day} · {self.provider}/{self.model} {self.value}".rstrip()

    @staticmethod
    def for_object(instance: models.Model, *, using: str | None = None) -> Total:
        """What was spent on requests about ``instance``, of any model, as long as they are there."""
        requests = LLMRequest.objects.using(using) if using else LLMRequest.objects
        rows = requests.about(instance)
        return LedgerEntry.objects.using(rows.db).of(rows).total()

    @staticmethod
    def for_objects(
        instances: Sequence[models.Model], *, using: str | None = None
    ) -> dict[Any, Total]:
        """The same of many ``instances`` of one model, by their primary keys, in one query."""
        if not instances:
            return {}
        requests = LLMRequest.objects.using(using) if using else LLMRequest.objects.all()
        content_type = ContentType.objects.db_manager(requests.db).get_for_model(instances[0])
        keys = {str(each.pk): each.pk for each in instances}
        rows = requests.filter(content_type=content_type, object_id__in=keys)
        found = LedgerEntry.objects.using(rows.db).by_column(rows, "object_id")
        return {pk: found.get(key, Total()) for key, pk in keys.items()}
