from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery.signals import task_prerun
from django.db import transaction

from django_qstash_llm.models import LLMRequest
from django_qstash_llm.models.doorbell import Bell, ring_on_commit
from tests.wire import FakeQStash

MESSAGES = [{"role": "user", "content": "?"}]
SUBMIT = "django_qstash_llm.submit"


@pytest.fixture
def rung(qstash: FakeQStash) -> Iterator[list[str]]:
    """The names of the tasks that Celery was asked for, with everything they were given."""
    names: list[str] = []

    def note(task: Any, args: Any, kwargs: Any, **others: Any) -> None:
        assert (list(args), kwargs) == (["default"], {})
        names.append(task.name)

    task_prerun.connect(note, weak=False)
    yield names
    task_prerun.disconnect(note)


def ask() -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish(MESSAGES)
    return row


@pytest.mark.django_db(transaction=True)
class TestCommit:
    def test_many_rows_of_one_transaction_ring_once(
        self, rung: list[str], qstash: FakeQStash
    ) -> None:
        with transaction.atomic():
            for _ in range(50):
                ask()
            assert (rung, qstash.calls) == ([], [])
        assert rung == [SUBMIT]
        assert qstash.calls == ["POST /v2/batch"]

    def test_two_transactions_ring_twice(self, rung: list[str]) -> None:
        for _ in range(2):
            with transaction.atomic():
                ask()
        assert rung == [SUBMIT, SUBMIT]

    def test_without_a_transaction_each_row_rings(self, rung: list[str]) -> None:
        ask()
        ask()
        assert rung == [SUBMIT, SUBMIT]

    def test_rolled_back_transaction_rings_nothing(
        self, rung: list[str], qstash: FakeQStash
    ) -> None:
        with transaction.atomic():
            ask()
            transaction.set_rollback(True)
        assert (rung, qstash.calls, LLMRequest.objects.count()) == ([], [], 0)

    def test_bell_of_a_rolled_back_savepoint_is_rung_by_the_row_after_it(
        self, rung: list[str], qstash: FakeQStash
    ) -> None:
        with transaction.atomic():
            with transaction.atomic():
                ask()
                transaction.set_rollback(True)
            kept = ask()
        assert rung == [SUBMIT]
        assert list(qstash.ids) == [kept.deduplication_id]

    def test_bell_before_a_rolled_back_savepoint_still_rings(
        self, rung: list[str], qstash: FakeQStash
    ) -> None:
        with transaction.atomic():
            kept = ask()
            with transaction.atomic():
                ask()
                transaction.set_rollback(True)
        assert rung == [SUBMIT]
        assert list(qstash.ids) == [kept.deduplication_id]

    def test_row_of_a_released_savepoint_rings_with_the_transaction(
        self, rung: list[str], qstash: FakeQStash
    ) -> None:
        with transaction.atomic():
            with transaction.atomic():
                ask()
            ask()
            assert rung == []
        assert rung == [SUBMIT]
        assert len(qstash.ids) == 2

    def test_each_bell_rings_by_itself(self, rung: list[str]) -> None:
        with transaction.atomic():
            for _ in range(3):
                ring_on_commit(Bell.SUBMIT, "default")
                ring_on_commit(Bell.ANNOUNCE, "default")
        assert rung == [SUBMIT, "django_qstash_llm.announce"]

    def test_users_own_callbacks_run_though_the_bell_fails(
        self, rung: list[str], settings: Any
    ) -> None:
        ran = []
        with transaction.atomic():
            ask()
            transaction.on_commit(lambda: ran.append(1))
            settings.QSTASH_TOKEN = ""
        assert (ran, LLMRequest.objects.pending().count()) == ([1], 1)


@pytest.mark.django_db
def test_second_ask_in_one_test_case_rings_again(
    rung: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    """A ``TestCase`` runs the callbacks and keeps them."""
    for _ in range(2):
        with django_capture_on_commit_callbacks(execute=True):
            ask()
    assert rung == [SUBMIT, SUBMIT]
