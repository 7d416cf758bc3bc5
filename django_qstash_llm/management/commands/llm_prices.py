from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import router, transaction
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime

from ...exceptions import ConfigurationError, IllegalState, InvalidRequest
from ...models import LLMRequest, Price
from ...models.price import KEY, PriceQuerySet
from ...models.request import LLMRequestQuerySet
from ...pricing import listed

COLUMNS = ("provider", "model", "token_class", "amount", "tier", "above", "since")
"""Of a CSV file; the last three may be missing."""


class Command(BaseCommand):
    help = (
        "Shows our own prices, sets and imports them, and prices what was answered before there was a "
        "price. Prices are dated: a change closes one and opens the next, and no cost is changed."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        # Said before the verb or after it.
        shared = argparse.ArgumentParser(add_help=False)
        shared.add_argument("--database", default=router.db_for_write(LLMRequest))
        shared.add_argument("--json", action="store_true", dest="as_json", help="Print JSON.")
        dated = argparse.ArgumentParser(add_help=False)
        dated.add_argument(
            "--since",
            type=_moment,
            help="From when on, as in 2026-12-01 (midnight of this site) or 2026-12-01T00:00+01:00.",
        )
        verbs = parser.add_subparsers(dest="verb", required=True)
        shown = verbs.add_parser("list", parents=[shared], help="Those in force, or all.")
        shown.add_argument("--provider", default="")
        shown.add_argument("--model", default="")
        shown.add_argument("--at", type=_moment, help="Those in force at that moment.")
        shown.add_argument(
            "--all", action="store_true", dest="with_history", help="Former ones too."
        )
        new = verbs.add_parser(
            "set", aliases=["add"], parents=[shared, dated], help="Have a model cost something."
        )
        new.add_argument("provider")
        new.add_argument("model", help="A name, or a pattern: * stands for any letters.")
        new.add_argument(
            "amounts",
            nargs="+",
            metavar="CLASS=USD",
            help="Per million: input=0.75 output=4.5 cached=0.075; cached=none ends a price.",
        )
        new.add_argument("--tier", default="", help="A service tier: flex, priority, batch.")
        new.add_argument(
            "--above", type=int, default=0, help="Of inputs longer than so many tokens."
        )
        new.add_argument("--source", default="llm_prices", help="Who or what says so.")
        taken = verbs.add_parser(
            "import", parents=[shared, dated], help="From genai-prices, or from a CSV file."
        )
        taken.add_argument("source", help="'genai-prices', or the path of a CSV file.")
        taken.add_argument(
            "models",
            nargs="*",
            metavar="PROVIDER/MODEL",
            help="Of genai-prices; none is the unpriced.",
        )
        back = verbs.add_parser(
            "withdraw", parents=[shared], help="Undo changes that have not begun."
        )
        back.add_argument("id", type=int, nargs="+", help="As listed with --all.")
        verbs.add_parser("unpriced", parents=[shared], help="Models in use that have no price.")
        late = verbs.add_parser(
            "reprice", parents=[shared], help="Price what has no cost, at the prices of its moment."
        )
        late.add_argument("--dry-run", action="store_true", help="Only say what it would come to.")

    def handle(self, *args: Any, verb: str, database: str, as_json: bool, **options: Any) -> None:
        prices, llm_requests = Price.objects.using(database), LLMRequest.objects.using(database)
        try:
            if verb == "list":
                told, lines = _list(prices, **options)
            elif verb in ("set", "add"):
                told, lines = _told(_set(prices, options))
            elif verb == "import":
                told, lines = _told(_import(prices, llm_requests, options))
            elif verb == "withdraw":
                told, lines = _withdraw(prices, options["id"])
            elif verb == "unpriced":
                told, lines = _unpriced(llm_requests)
            else:
                told, lines = _reprice(llm_requests, is_rehearsal=options["dry_run"])
        except InvalidRequest as error:
            raise CommandError(f"{error.field}: {error.problem}") from error
        except (ConfigurationError, IllegalState) as error:
            raise CommandError(str(error)) from error
        if as_json:
            lines = [json.dumps(told, default=str)]
        for line in lines:
            self.stdout.write(line)


Told = tuple[list[dict[str, Any]], Iterable[str]]
"""For programs, and for people."""


def _list(
    prices: PriceQuerySet,
    *,
    provider: str,
    model: str,
    at: datetime | None,
    with_history: bool,
    **options: Any,
) -> Told:
    given = {"provider": provider, "model": model}
    rows = prices.filter(**{name: value for name, value in given.items() if value})
    if at or not with_history:
        rows = rows.in_force(at or timezone.now())
    return _told(rows)


def _told(rows: Iterable[Price]) -> Told:
    found = list(rows)
    told = [
        {name: getattr(row, name) for name in ("id", *KEY, "amount", "since", "until", "source")}
        for row in found
    ]
    return told, map(_line, found) if found else ["None."]


def _line(price: Price) -> str:
    until = f" until {_shown(price.until)}" if price.until else ""
    source = f" ({price.source})" if price.source else ""
    return f"{price.pk:>6}  {price} since {_shown(price.since)}{until}{source}"


def _shown(moment: datetime) -> str:
    local = timezone.localtime(moment) if timezone.is_aware(moment) else moment
    return local.isoformat(sep=" ", timespec="minutes")


def _set(prices: PriceQuerySet, options: Mapping[str, Any]) -> list[Price]:
    return prices.set(
        options["provider"],
        options["model"],
        dict(map(_amount, options["amounts"])),
        tier=options["tier"],
        above=options["above"],
        since=options["since"],
        source=options["source"],
    )


def _amount(given: str) -> tuple[str, str | None]:
    name, is_there, amount = given.partition("=")
    if not is_there:
        raise CommandError(f"{given}: give a class and its price, as in input=0.75.")
    return name, None if amount.lower() in ("", "none") else amount


def _import(
    prices: PriceQuerySet, llm_requests: LLMRequestQuerySet, options: Mapping[str, Any]
) -> list[Price]:
    """All of it or nothing."""
    since: datetime | None = options["since"]
    if options["source"] == "genai-prices":
        named = options["models"] or _in_use(llm_requests)
        sets = _listed(named, since, is_asked=bool(options["models"]))
    else:
        sets = _in_file(Path(options["source"]), since)
    new: list[Price] = []
    with transaction.atomic(using=prices.db):
        for where, (provider, model), amounts, further in sets:
            try:
                new += prices.set(provider, model, amounts, **further)
            except InvalidRequest as error:
                raise CommandError(f"{where}: {error.field}: {error.problem}") from error
    return new


Setting = tuple[str, tuple[str, str], dict[str, Any], dict[str, Any]]
"""Where it stands, provider and model, amounts, and further arguments of ``set``."""


def _in_use(llm_requests: LLMRequestQuerySet) -> list[str]:
    rows = llm_requests.unpriced_models()
    return list(dict.fromkeys(f"{row['provider']}/{row['model']}" for row in rows))


def _listed(named: Iterable[str], since: datetime | None, *, is_asked: bool) -> Iterator[Setting]:
    from importlib.metadata import version

    for name in named:
        provider, _, model = name.partition("/")
        found = listed(provider, model, at=since or timezone.now())
        if not found and is_asked:
            raise CommandError(f"genai-prices has no price for {name}.")
        for (tier, above), amounts in found.items():
            source = f"genai-prices {version('genai-prices')}"
            further = {"tier": tier, "above": above, "since": since, "source": source}
            yield name, (provider, model), amounts, further


def _in_file(path: Path, since: datetime | None) -> Iterator[Setting]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {error}") from error
    rows = csv.DictReader(text.splitlines())
    if missing := [name for name in COLUMNS[:4] if name not in (rows.fieldnames or ())]:
        raise CommandError(f"{path}: there is no column {missing[0]!r}; give {', '.join(COLUMNS)}.")
    if unknown := [name for name in rows.fieldnames or () if name not in COLUMNS]:
        raise CommandError(f"{path}: there is no column {unknown[0]!r}; give {', '.join(COLUMNS)}.")
    # What is said of a model in several lines is set together.
    sets: dict[tuple[Any, ...], Setting] = {}
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        try:
            further = {
                "tier": row.get("tier") or "",
                "above": int(row.get("above") or 0),
                "since": _moment(row["since"]) if row.get("since") else since,
                "source": f"csv {path.name}",
            }
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise CommandError(f"{where}: {error}") from error
        of = (row["provider"] or "", row["model"] or "")
        amounts = sets.setdefault((of, *further.values()), (where, of, {}, further))[2]
        amounts[row["token_class"] or ""] = _amount(f"amount={row['amount'] or ''}")[1]
    yield from sets.values()


def _withdraw(prices: PriceQuerySet, keys: list[int]) -> Told:
    found = {price.pk: price for price in prices.filter(pk__in=keys)}
    if missing := [key for key in keys if key not in found]:
        raise CommandError(f"There is no price {missing[0]}; list --all lists them.")
    told, lines = _told(found[key] for key in keys)
    lines = list(lines)
    for key in keys:
        found[key].withdraw()
    return told, [f"{line}: withdrawn" for line in lines]


def _unpriced(llm_requests: LLMRequestQuerySet) -> Told:
    told = llm_requests.unpriced_models()
    return told, map(_unpriced_line, told) if told else ["None."]


def _unpriced_line(row: Mapping[str, Any]) -> str:
    words = f"{row['requests']:>8}  {row['provider']}/{row['model']}"
    if row["answered_by"] not in ("", row["model"]):
        words += f", answered by {row['answered_by']}"
    if row["service_tier"]:
        words += f", {row['service_tier']}"
    uncounted = row["requests"] - row["counted"]
    return f"{words} ({uncounted} without a count of tokens)" if uncounted else words


def _reprice(llm_requests: LLMRequestQuerySet, *, is_rehearsal: bool) -> Told:
    by_model: dict[tuple[str, str, str], list[Decimal]] = {}
    for row, cost in llm_requests.price_unpriced(is_rehearsal=is_rehearsal):
        key = (row.provider, row.model, cost.source)
        by_model.setdefault(key, []).append(cost.amount)
    told = [
        {
            "provider": provider,
            "model": model,
            "source": source,
            "requests": len(amounts),
            "cost": sum(amounts, Decimal(0)),
        }
        for (provider, model, source), amounts in by_model.items()
    ]
    would = "would cost" if is_rehearsal else "cost"
    lines = [
        f"{row['requests']:>8}  {row['provider']}/{row['model']} {would} ${row['cost']:f} "
        f"({row['source']})"
        for row in told
    ]
    left = llm_requests.unpriced().count() - (
        sum(map(len, by_model.values())) if is_rehearsal else 0
    )
    return told, [*lines, f"{left} stay unpriced."]


def _moment(given: str) -> datetime:
    try:
        day = parse_date(given)
        moment = parse_datetime(given) if day is None else datetime(day.year, day.month, day.day)
    except ValueError:
        moment = None
    if moment is None:
        raise argparse.ArgumentTypeError(
            f"{given}: give a moment such as 2026-12-01 or 2026-12-01T00:00+01:00."
        )
    if settings.USE_TZ and timezone.is_naive(moment):
        return timezone.make_aware(moment)
    return moment
