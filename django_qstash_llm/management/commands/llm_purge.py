from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import router

from ...exceptions import ConfigurationError
from ...models import LLMRequest
from ...models.purge import Purge

ROWS_PER_LINE = 10_000


class Command(BaseCommand):
    help = (
        "Forgets the texts of requests that finished long ago, here and among QStash's dead "
        "letters, and deletes old callbacks that nobody can use. Rows with usage, cost, states and "
        "times stay, unless --delete is given."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--older-than",
            type=int,
            metavar="DAYS",
            help="Days since a request was finished; default: QSTASH_LLM['RETENTION_DAYS'].",
        )
        parser.add_argument(
            "--database",
            default=router.db_for_write(LLMRequest),
            help="Alias of the database to purge.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Only say what would go.")
        parser.add_argument(
            "--delete",
            action="store_true",
            help="Delete the old rows too. What they cost is then in no sum any more.",
        )

    def handle(
        self,
        *args: Any,
        older_than: int | None,
        database: str,
        dry_run: bool,
        delete: bool,
        **options: Any,
    ) -> None:
        self.shown = 0
        purge = Purge(
            using=database,
            older_than=older_than,
            deletes=delete,
            is_rehearsal=dry_run,
            on_progress=self.show_progress if options["verbosity"] > 0 else lambda purge: None,
        )
        try:
            purge.run()
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        would = "Would go: " if dry_run else ""
        self.stdout.write(f"{would}{'; '.join(counts(purge))}.")
        if waiting := purge.unannounced():
            self.stdout.write(
                f"{waiting} requests are old enough and stay until they have been announced: "
                "run llm_sweep, or see their announce errors."
            )
        if purge.protected:
            self.stdout.write(f"{purge.protected} requests stay: other rows protect them.")
        if purge.problem:
            self.stderr.write(
                f"QStash's dead letters could not all be deleted, the next purge tries again: "
                f"{purge.problem}"
            )

    def show_progress(self, purge: Purge) -> None:
        done = sum(vars(purge)[name] for name in FIGURES)
        if done >= self.shown + ROWS_PER_LINE:
            self.shown = done
            self.stdout.write(f"… {', '.join(counts(purge))}")


FIGURES = {
    "forgotten": "{} requests forgotten",
    "withheld": "{} requests without their messages from now on",
    "emptied": "{} receipts emptied",
    "discarded": "{} unusable callbacks deleted",
    "files": "{} files deleted or emptied",
    "dead_letters": "{} dead letters deleted at QStash",
    "deleted": "{} requests deleted",
}


def counts(purge: Purge) -> list[str]:
    """What went, in words. What a setting or option did not ask for is left out where it is 0."""
    always = {"forgotten", "emptied", "discarded"}
    return [
        words.format(number)
        for name, words in FIGURES.items()
        if (number := vars(purge)[name]) or name in always
    ]
