from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import router
from django.utils import timezone

from ... import alerting, triggers
from ...exceptions import ConfigurationError
from ...models import CallbackResponse, Lane, LLMRequest
from ...models.cancellation import Cancellations
from ...models.intake import Intake
from ...models.message_count import count_messages
from ...models.outbox import Outbox
from ...models.reconciler import Reconciler
from ...models.settlement import settle


class Command(BaseCommand):
    help = (
        "Reads the files of batches, submits what is pending, reads stored callbacks again that could not be read, asks QStash "
        "about what is overdue, cancels there what no retry would help and announces attempts and "
        "what is finished, here and now, without Celery. "
        "For cron on sites without Celery beat, and for after a broker was lost."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--database",
            default=router.db_for_write(LLMRequest),
            help="Alias of the database to sweep.",
        )

    def handle(self, *args: Any, database: str, **options: Any) -> None:
        outbox, reconciler = Outbox(database), Reconciler(database)
        receipts, lanes = CallbackResponse.objects.using(database), Lane.objects.using(database)
        applied = asked = announced = 0
        try:
            while lanes.see_to():
                pass
            while Intake(database).run():
                pass
            while outbox.submit():
                pass
            while read := receipts.apply_due(now=timezone.now()):
                applied += read
            while inquiries := reconciler.reconcile():
                asked += inquiries
                if reconciler.problem:
                    break
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        while Cancellations(database).cancel():
            pass
        while triggers.announce_attempts(database):
            pass
        while told := triggers.announce(database):
            announced += told
        settle(database)
        alerting.alert(database)
        count_messages(database)
        waiting = outbox.rows.pending().count()
        self.stdout.write(
            f"{outbox.submitted} submitted, {announced} announced, {waiting} still pending."
        )
        self.stdout.write(
            f"{applied} callbacks read again. {asked} overdue: {reconciler.recovered} recovered, "
            f"{reconciler.failed} failed, {reconciler.lost} lost, {reconciler.waiting} waiting."
        )
        for lane in lanes.paused(timezone.now()):
            self.stdout.write(lane.pause_in_words)
        if reconciler.problem:
            self.stderr.write(f"Some could not be asked about: {reconciler.problem}")
        if outbox.problem:
            raise CommandError(f"Some could not be submitted: {outbox.problem}")
