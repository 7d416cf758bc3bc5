"""Rows of an earlier version are what the code of this one expects."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone

from django_qstash_llm.models import CallbackResponse, LLMRequest

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
