from __future__ import annotations

import argparse
import json
from decimal import Decimal
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections, router

from ...exceptions import InvalidRequest
from ...models import Spend
from ...models.ledger import MONEY, SUMMED, Total
from ...models.money import in_words
from ...models.settlement import settle
from ...models.spend import BY, DIMENSIONS, Difference, Key
from ...reports import CHOICES, Report, cost_of_messages, shown

ENTRIES_PER_LINE = 100_000
MOST_DIFFERENCES = 20
HEADINGS = ("spent", "useful", "answers", "unpriced", "input", "output")


class Command(BaseCommand):
    help = (
        "Tells what was spent, by day, month, provider, model, tenant, user, label, what it was about or "
        "API key; what QStash's messages cost stands beside it. Exit status of --check: 0 well, 1 the "
        "sums differ from the ledger."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--from", help="First day, as in 2026-03-01; default: from the first.")
        parser.add_argument("--to", help="Last day; default: up to now.")
        parser.add_argument("--by", help=f"Of {','.join(BY)}; default month,model.")
        for name in ("provider", "model", *DIMENSIONS):
            parser.add_argument(f"--{name.replace('_', '-')}", help="Only of this.")
        form = parser.add_mutually_exclusive_group()
        form.add_argument("--csv", action="store_true", help="CSV instead of a table.")
        form.add_argument("--json", action="store_true", help="One JSON object instead of a table.")
        form.add_argument(
            "--rebuild", action="store_true", help="Add the whole ledger up anew; it tells nothing."
        )
        form.add_argument(
            "--check", action="store_true", help="Compare what is added up with the ledger."
        )
        parser.add_argument(
            "--database", default=router.db_for_write(Spend), help="Alias of the database."
        )

    def handle(self, *args: Any, database: str, **options: Any) -> None:
        if database not in connections:
            raise CommandError(f"There is no database {database!r}.")
        if options["rebuild"]:
            self.rebuild(database)
        elif options["check"]:
            self.check_sums(database)
        else:
            self.report(database, options)

    def report(self, database: str, options: dict[str, Any]) -> None:
        given = {name: options[name] for name in CHOICES if options[name]}
        try:
            report = Report.asked(given, using=database)
        except InvalidRequest as error:
            name = error.field.replace("_", "-")
            raise CommandError(f"--{name}: {error.problem}") from error
        if options["json"]:
            self.stdout.write(json.dumps(report.to_json(), indent=2))
        elif options["csv"]:
            for line in report.csv():
                self.stdout.write(line, ending="")
        else:
            self.table(report)

    def table(self, report: Report) -> None:
        rows = [[*report.by, *HEADINGS]]
        for of, total in report.lines:
            named = [shown(name, value) or "–" for name, value in of.items()]
            rows.append([*named, *_figures(total)])
        rows.append(["total", *[""] * (len(report.by) - 1), *_figures(report.total)])
        if not report.by:
            rows[-1] = _figures(report.total)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.ljust(width) if index < len(report.by) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.stdout.write("  ".join(cells).rstrip())
        messages = report.messages
        cost = cost_of_messages(messages)
        price = "at an unknown price" if cost is None else in_words(cost)
        self.stdout.write(
            f"Beside it QStash's messages, of all requests of these days: {messages.total:,} "
            f"({messages.published:,} published, {messages.retries:,} retries, "
            f"{messages.callbacks:,} callbacks, {messages.failure_callbacks:,} failure callbacks), "
            f"{price}."
        )
        if not messages.is_complete:
            self.stdout.write("Not all are counted yet: the sweep is at it.")

    def rebuild(self, database: str) -> None:
        settle(database)
        done = Spend.objects.using(database).rebuild(self.show_progress)
        self.stdout.write(f"{done:,} entries added up anew.")

    def check_sums(self, database: str) -> None:
        settle(database)
        found = Spend.objects.using(database).differences(self.show_progress)
        for difference in found[:MOST_DIFFERENCES]:
            self.stdout.write(_in_words(difference))
        if found:
            rows = "row differs" if len(found) == 1 else "rows differ"
            raise CommandError(
                f"{len(found):,} {rows} from the ledger, which is right: run llm_spend --rebuild.",
                returncode=1,
            )
        self.stdout.write("What is added up is what the ledger says.")

    def show_progress(self, done: int) -> None:
        if done % ENTRIES_PER_LINE == 0:
            self.stdout.write(f"… {done:,} entries")


def _figures(total: Total) -> list[str]:
    return [
        in_words(total.spent),
        in_words(total.useful),
        *(f"{number:,}" for number in (total.answers, total.unpriced)),
        *(f"{number:,}" for number in (total.input_tokens, total.output_tokens)),
    ]


def _in_words(difference: Difference) -> str:
    key = _of(difference.key)
    if difference.found is None:
        return f"{key}: is missing"
    figures = zip(SUMMED, difference.found, difference.expected, strict=True)
    told = [
        f"{name} is {_figure(name, is_now)}, not {_figure(name, right)}"
        for name, is_now, right in figures
        if is_now != right
    ]
    return f"{key}: {', '.join(told)}"


def _of(key: Key) -> str:
    place = f" {key.dimension} {key.value}" if key.dimension else ""
    return f"{key.day} {key.provider}/{key.model}{place}"


def _figure(name: str, figure: Decimal | int) -> str:
    return (
        f"${figure.normalize():f}" if isinstance(figure, Decimal) and name in MONEY else f"{figure}"
    )
