from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections, router

from ...doctor import Doctor, Finding, Level
from ...models import LLMRequest

_INDENT = 24


class Command(BaseCommand):
    help = (
        "Examines whether everything is set up so that answers come back: settings, QStash, token, "
        "region, signing keys, clock, callback URL (a ping is sent through QStash: one message) and "
        "whether a worker is at it. Exit status: 0 well, 1 a problem, 2 could not be examined."
    )
    # It is the doctor who tells what the checks find.
    requires_system_checks = []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="One JSON object instead of lines.")
        parser.add_argument("--no-ping", action="store_true", help="Send nothing through QStash.")
        parser.add_argument(
            "--wait", type=float, default=30.0, metavar="SECONDS", help="For the ping; default 30."
        )
        parser.add_argument(
            "--database", default=router.db_for_write(LLMRequest), help="Alias of the database."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["database"] not in connections:
            raise CommandError(f"There is no database {options['database']!r}.", returncode=2)
        if not 0 <= options["wait"] <= 600:
            raise CommandError("--wait is between 0 and 600 seconds.", returncode=2)
        wait = None if options["no_ping"] else options["wait"]
        findings = []
        for finding in Doctor(options["database"], wait=wait).examine():
            findings.append(finding)
            if not options["json"]:
                self.stdout.write(self._lines(finding))
        problems = sum(finding.level == Level.PROBLEM for finding in findings)
        if options["json"]:
            document = {"ok": not problems, "findings": [asdict(each) for each in findings]}
            self.stdout.write(json.dumps(document, indent=2))
        if problems:
            word = "problem" if problems == 1 else "problems"
            raise CommandError(f"{problems} {word} found.", returncode=1)

    def _lines(self, finding: Finding) -> str:
        styles = {
            Level.OK: self.style.SUCCESS,
            Level.WARNING: self.style.WARNING,
            Level.PROBLEM: self.style.ERROR,
            Level.SKIPPED: self.style.NOTICE,
        }
        level = styles[finding.level](f"{finding.level.value:<8}")
        lines = [f"{level}  {finding.check:<12}  {finding.sentence}"]
        if finding.remedy:
            lines.append(f"{'':{_INDENT}}{finding.remedy}")
        return "\n".join(lines)
