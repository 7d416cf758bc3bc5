from __future__ import annotations

import argparse
import json
from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import router
from django.utils import timezone

from ...models import Budget
from ...models.budget import Action, Period, Scope, Standing
from ...models.money import in_words
from ...models.standing import forecast, standings
from ...reports import MOST_BUDGETS, budgets_to_json

_FIELDS = ("amount", "period", "days", "time_zone", "scope", "value", "action")


class Command(BaseCommand):
    help = (
        "Lists budgets and how each stands, adds and changes them. A budget holds before the call: what "
        "does not fit is refused, or passes with an alert."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        # Before the verb or after it.
        shared = argparse.ArgumentParser(add_help=False)
        shared.add_argument("--database", default=argparse.SUPPRESS, help="Alias of the database.")
        parser.add_argument("--json", action="store_true", help="Of the list: one JSON object.")
        parser.add_argument("--database", default=router.db_for_write(Budget))
        commands = parser.add_subparsers(dest="verb")
        listed = commands.add_parser("list", parents=[shared], help="List them (the default).")
        listed.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
        add = commands.add_parser("add", parents=[shared], help="Make one.")
        add.add_argument("name", help="Its name, of which there is one.")
        add.add_argument("amount", help="USD per period.")
        change = commands.add_parser("set", parents=[shared], help="Change one.")
        change.add_argument("name")
        change.add_argument("--amount", help="USD per period.")
        change.add_argument("--name", dest="new_name", help="A new name.")
        for each in (add, change):
            _add_fields(each)
        for verb, words in (
            ("pause", "Have it hold nothing for the time being."),
            ("activate", "Have it hold again; what was spent meanwhile is counted."),
            ("recount", "Count what was spent of it anew, by the ledger."),
        ):
            commands.add_parser(verb, parents=[shared], help=words).add_argument("name")

    def handle(self, *args: Any, verb: str | None, database: str, **options: Any) -> None:
        self.budgets = Budget.objects.using(database)
        if verb in (None, "list"):
            self.list(is_json=options["json"])
            return
        getattr(self, verb or "list")(options)

    def list(self, *, is_json: bool) -> None:
        if is_json:
            self.stdout.write(
                json.dumps({"budgets": budgets_to_json(self.budgets.all())}, indent=2)
            )
            return
        now, rows = timezone.now(), list(self.budgets.order_by("name")[:MOST_BUDGETS])
        found = standings(rows, now=now)
        for budget in rows:
            self.stdout.write(
                line(budget, found[budget.pk], forecast(budget, found[budget.pk], now))
            )
        if not rows:
            self.stdout.write("There is no budget. llm_budgets add NAME AMOUNT makes one.")

    def add(self, options: dict[str, Any]) -> None:
        self.write(Budget(name=options["name"]), options)

    def set(self, options: dict[str, Any]) -> None:
        budget = self.named(options["name"])
        if options["new_name"]:
            budget.name = options["new_name"]
        self.write(budget, options)

    def pause(self, options: dict[str, Any]) -> None:
        self.switch(options["name"], is_active=False)

    def activate(self, options: dict[str, Any]) -> None:
        self.switch(options["name"], is_active=True)

    def recount(self, options: dict[str, Any]) -> None:
        budget = self.named(options["name"])
        budget.count_anew(timezone.now())
        self.tell(budget)

    def switch(self, name: str, *, is_active: bool) -> None:
        budget = self.named(name)
        budget.is_active = is_active
        budget.save()
        self.tell(budget)

    def write(self, budget: Budget, options: dict[str, Any]) -> None:
        """Checked as a form is, and told by option what is wrong."""
        for name in _FIELDS:
            if options[name] is not None:
                setattr(budget, name, _amount(options[name]) if name == "amount" else options[name])
        if options["period"] and options["period"] != Period.ROLLING and options["days"] is None:
            budget.days = None
        if options["scope"] == Scope.ALL and options["value"] is None:
            budget.value = ""
        if options["thresholds"] is not None:
            budget.thresholds = options["thresholds"]
        if options["emails"] is not None:
            budget.emails = [address for address in options["emails"] if address]
        try:
            budget._state.db = self.budgets.db
            budget.full_clean()
            budget.save(using=self.budgets.db)
        except ValidationError as error:
            raise CommandError(_problems(error)) from error
        self.tell(budget)

    def named(self, name: str) -> Budget:
        budget = self.budgets.filter(name=name).first()
        if budget is None:
            raise CommandError(f"There is no budget {name!r}; llm_budgets lists them.")
        return budget

    def tell(self, budget: Budget) -> None:
        now = timezone.now()
        found = standings([budget], now=now)[budget.pk]
        self.stdout.write(line(budget, found, forecast(budget, found, now)))


def _add_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--period", choices=Period.values, help="Default month.")
    parser.add_argument("--days", type=int, help="How long a rolling one is.")
    parser.add_argument("--time-zone", help="In which its periods begin; default: the site's.")
    parser.add_argument("--scope", choices=Scope.values, help="Default all.")
    parser.add_argument("--of", dest="value", help="Which tenant, provider, model, …")
    parser.add_argument("--action", choices=Action.values, help="Default refuse.")
    parser.add_argument(
        "--threshold",
        dest="thresholds",
        type=int,
        action="append",
        metavar="PERCENT",
        help="At which it alerts. May be repeated; default 50, 80 and 100.",
    )
    parser.add_argument(
        "--email",
        dest="emails",
        action="append",
        metavar="ADDRESS",
        help="Who is told. May be repeated; an empty one is nobody.",
    )


def line(budget: Budget, standing: Standing, expected: Decimal | None) -> str:
    parts = [
        f"{budget.in_words}: {in_words(standing.spent)} spent ({standing.percent:.1f} %)",
        f"{in_words(standing.reserved)} reserved",
        f"{in_words(standing.left)} left",
    ]
    if expected is not None:
        parts.append(f"{in_words(expected, decimals=2)} when it ends, at this pace")
    sentence = ", ".join(parts) + "."
    if budget.action == Action.ALERT:
        sentence += " Alerts only."
    if standing.renews_at is not None:
        sentence += f" Renews {standing.renews_at.astimezone(budget.zone):%Y-%m-%d %H:%M %Z}."
    return sentence if budget.is_active else f"(paused) {sentence}"


def _amount(given: Any) -> Decimal:
    try:
        return Decimal(given)
    except InvalidOperation as error:
        raise CommandError(f"amount: {given!r} is no amount; give USD as in 20 or 0.50.") from error


_OPTIONS = {"value": "--of", "thresholds": "--threshold", "emails": "--email"}


def _problems(error: ValidationError) -> str:
    told = []
    for name, said in error.message_dict.items():
        named = _OPTIONS.get(name, name if name in ("name", "amount") else f"--{name}")
        prefix = "" if name == "__all__" else f"{named.replace('_', '-')}: "
        told.append(prefix + " ".join(said))
    return " ".join(told)
