from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ... import triggers
from ...exceptions import ConfigurationError
from ...models.outbox import Outbox


class Command(BaseCommand):
    help = (
        "Submits what is pending and announces what is finished, here and now, without Celery. "
        "For cron on sites without Celery beat, and for after a broker was lost."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--database", default="default", help="Alias of the database to sweep.")

    def handle(self, *args: Any, database: str, **options: Any) -> None:
        outbox = Outbox(database)
        announced = 0
        try:
            while outbox.submit():
                pass
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        while told := triggers.announce(database):
            announced += told
        waiting = outbox.rows.pending().count()
        self.stdout.write(
            f"{outbox.submitted} submitted, {announced} announced, {waiting} still pending."
        )
        if outbox.problem:
            raise CommandError(f"Some could not be submitted: {outbox.problem}")
