"""Rows of an earlier version are what the code of this one expects."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone

from django_qstash_llm.models import CallbackResponse, LedgerEntry, LLMRequest
from django_qstash_llm.models.replay import read_anew
from tests.conftest import ANSWER

pytestmark = pytest.mark.django_db(transaction=True)

THEN = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def at_first() -> Iterator[Any]:
    """The app's models as its first migration made them; afterwards everything is as it was."""
    executor = MigrationExecutor(connection)
    first = [("django_qstash_llm", "0001_initial")]
    executor.migrate(first)
    yield MigrationExecutor(connection).loader.project_state(first).apps
    executor = MigrationExecutor(connection)
    executor.migrate(executor.loader.graph.leaf_nodes())


def test_rows_of_the_first_version_are_taken_over(at_first: Any) -> None:
    requests = at_first.get_model("django_qstash_llm", "LLMRequest").objects
    receipts = at_first.get_model("django_qstash_llm", "CallbackResponse").objects
    for state in ("pending", "submitted", "completed", "failed", "cancelled"):
        requests.create(uuid=uuid.uuid4(), state=state, messages=[{"role": "user", "content": "x"}])
    completed = requests.get(state="completed")
    for kind in ("callback", "failure_callback", "quarantined"):
        receipts.create(
            uuid=completed.uuid,
            llm_request=completed,
            kind=kind,
            source_message_id="m",
            received_at=THEN,
        )
    before = timezone.now()
    call_command("migrate", "django_qstash_llm", verbosity=0)

    # What waits is asked about, since nothing says since when it has been silent.
    deadlines = dict(LLMRequest.objects.values_list("state", "deadline_at"))
    assert before <= deadlines.pop("submitted") <= timezone.now()
    assert set(deadlines.values()) == {None}
    # What took effect took effect; what could not be read is still to be looked at.
    applied = dict(CallbackResponse.objects.values_list("kind", "applied_at"))
    assert applied == {"callback": THEN, "failure_callback": THEN, "quarantined": None}
    assert not CallbackResponse.objects.unapplied(timezone.now()).exists()


def test_every_migration_of_ours_can_be_undone(at_first: Any) -> None:
    assert at_first.get_model("django_qstash_llm", "LLMRequest").objects.count() == 0


def test_what_keys_asked_before_there_were_callers_is_still_theirs() -> None:
    executor = MigrationExecutor(connection)
    before = [("django_qstash_llm", "0007_api_keys")]
    executor.migrate(before)
    try:
        apps = MigrationExecutor(connection).loader.project_state(before).apps
        key = apps.get_model("django_qstash_llm", "ApiKey").objects.create(name="k", digest="d")
        rows = apps.get_model("django_qstash_llm", "LLMRequest").objects
        theirs = rows.create(uuid=uuid.uuid4(), api_key=key).uuid
        rows.create(uuid=uuid.uuid4())
    finally:
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes())
    assert LLMRequest.objects.get(caller="key").uuid == theirs
    assert LLMRequest.objects.filter(caller="").count() == 1


def test_answers_from_before_the_ledger_are_not_paid_for_twice(settings: Any) -> None:
    executor = MigrationExecutor(connection)
    before = [("django_qstash_llm", "0011_prices")]
    executor.migrate(before)
    try:
        apps = MigrationExecutor(connection).loader.project_state(before).apps
        rows = apps.get_model("django_qstash_llm", "LLMRequest").objects
        receipts = apps.get_model("django_qstash_llm", "CallbackResponse").objects
        row = rows.create(
            uuid=uuid.uuid4(),
            state="completed",
            provider="openai",
            model="gpt-5.4-mini",
            finished_at=THEN,
            cost=Decimal("0.5"),
            input_tokens=9,
            output_tokens=3,
        )
        for message_id, at in (("other", THEN - timedelta(hours=1)), ("its own", THEN)):
            receipts.create(
                uuid=row.uuid,
                llm_request=row,
                kind="callback",
                status=200,
                source_message_id=message_id,
                retried=2,
                received_at=at,
                applied_at=at,
                body=json.dumps(ANSWER).encode(),
            )
        rows.create(uuid=uuid.uuid4(), state="completed", finished_at=THEN)
        rows.create(uuid=uuid.uuid4(), state="failed", finished_at=THEN)
        chat = rows.create(uuid=uuid.uuid4(), via="chat", state="failed", input_tokens=2**62)
    finally:
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes())
    told = list(LedgerEntry.objects.order_by("id").values_list("answer", "spent", "unpriced"))
    half = Decimal("0.5")
    assert told == [("its own.2", half, 0), ("before the ledger", 0, 1), ("chat", 0, 1)]
    of_chat = LedgerEntry.objects.get(answer="chat")
    assert (of_chat.uuid, of_chat.input_tokens) == (chat.uuid, 10**12)
    prices = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": prices}
    read_anew(LLMRequest.objects.get(uuid=row.uuid))
    assert LLMRequest.objects.total().spent == LLMRequest.objects.get(uuid=row.uuid).cost
    assert LLMRequest.objects.total().answers == 3
