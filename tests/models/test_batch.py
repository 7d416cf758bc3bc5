from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, Group, User
from django.db import connection
from django.test import override_settings

from django_qstash_llm.exceptions import ConfigurationError, IllegalState, InvalidRequest
from django_qstash_llm.models import Batch, LLMRequest
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.request import State
from tests.conftest import enter_costs
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]


def items(count: int, **of_seven: Any) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [{"messages": MESSAGES} for _ in range(count)]
    if of_seven:
        listed[7] = listed[7] | of_seven
    return listed


def test_each_item_is_a_row_of_its_own() -> None:
    group = Group.objects.create(name="g")
    batch = Batch.objects.submit(
        [
            {"messages": MESSAGES, "about": group, "metadata": {"n": 1}},
            {"messages": MESSAGES, "queue": "q", "temperature": 0.1},
            {"messages": MESSAGES, "model": "other", "tenant": "mine"},
        ],
        name="nightly",
        model="shared-model",
        tenant="acme",
        retries=1,
    )
    rows = list(batch.llm_requests.order_by("id"))
    assert [(row.model, row.tenant, row.queue, row.retries, row.via) for row in rows] == [
        ("shared-model", "acme", "", 1, "batch"),
        ("shared-model", "acme", "q", 1, "batch"),
        ("other", "mine", "", 1, "batch"),
    ]
    assert (rows[0].about, rows[0].metadata, rows[1].parameters) == (
        group,
        {"n": 1},
        {"temperature": 0.1},
    )
    assert str(batch) == "nightly"


def test_user_of_the_batch_is_the_user_of_its_items_that_name_none() -> None:
    ada, bob = User.objects.create(username="ada"), User.objects.create(username="bob")
    batch = Batch.objects.submit(
        [{"messages": MESSAGES}, {"messages": MESSAGES, "user": bob}], user=ada
    )
    assert [row.user for row in batch.llm_requests.order_by("id")] == [ada, bob]


def test_items_leave_in_one_call(qstash: FakeQStash) -> None:
    Batch.objects.submit([*items(20), {"messages": MESSAGES, "queue": "q"}])
    Outbox().submit()
    assert qstash.calls == ["POST /v2/batch"]
    assert [item.get("queue") for item in qstash.messages] == [None] * 20 + ["q"]


@pytest.mark.django_db(transaction=True)
def test_batch_is_submitted_on_commit(qstash: FakeQStash) -> None:
    batch = Batch.objects.submit(items(3))
    assert batch.counts()["submitted"] == 3


@pytest.mark.parametrize(
    ("of_seven", "field"),
    [
        ({"messages": []}, "items[7].messages"),
        ({"messages": [{"role": "user"}]}, "items[7].messages[0].content"),
        ({"provider": "nobody"}, "items[7].provider"),
        ({"delay": -1}, "items[7].delay"),
        ({"retries": 1000}, "items[7].retries"),
        ({"labels": ["llm-request-x"]}, "items[7].labels"),
        ({"stream": True}, "items[7].stream"),
        ({"api_key": "sk"}, "items[7].api_key"),
        ({"via": "publish"}, "items[7].via"),
        ({"about": "x"}, "items[7].about"),
        ({"user": AnonymousUser()}, "items[7].user"),
        ({"queue": "not a name"}, "items[7].queue"),
        ({"queue": "q", "delay": 5}, "items[7].delay"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_001}]}, "items[7].messages"),
    ],
)
def test_bad_item_is_named_and_nothing_at_all_is_stored(
    of_seven: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Batch.objects.submit(items(10, **of_seven))
    assert caught.value.field == field
    assert (Batch.objects.count(), LLMRequest.objects.count()) == (0, 0)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ([], "items"),
        (None, "items"),
        ("items", "items"),
        ({"messages": MESSAGES}, "items"),
        ([{"messages": MESSAGES}, "x"], "items[1]"),
        ([{"messages": MESSAGES}, None], "items[1]"),
        ([{"messages": MESSAGES}, {}], "items[1].messages"),
        ([{"messages": MESSAGES, 7: "x"}], "items[0]"),
    ],
)
def test_what_is_no_list_of_items_is_refused(asked: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Batch.objects.submit(asked)
    assert caught.value.field == field
    assert Batch.objects.count() == 0


def test_shared_mistake_is_named_at_the_first_item() -> None:
    with pytest.raises(InvalidRequest, match=r"items\[0\]\.timeout"):
        Batch.objects.submit(items(2), timeout=0)


def test_batch_of_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="user: give a saved User"):
        Batch.objects.submit(items(1), user=AnonymousUser())
    assert Batch.objects.count() == 0


@override_settings(QSTASH_TOKEN="")
def test_missing_token_is_named() -> None:
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        Batch.objects.submit(items(1))


def test_progress_and_cost_are_derived_from_the_items() -> None:
    batch = Batch.objects.submit(items(4))
    other = Batch.objects.submit(items(1))
    first, second, third, _ = batch.llm_requests.order_by("id")
    rows = LLMRequest.objects
    rows.filter(pk=first.pk).update(state="completed", cost=Decimal("0.5"))
    rows.filter(pk=second.pk).update(state="completed", cost=None)
    rows.filter(pk=third.pk).update(state="failed")
    assert batch.counts() == {
        "pending": 1,
        "submitted": 0,
        "completed": 2,
        "failed": 1,
        "cancelled": 0,
    }
    enter_costs()
    assert (batch.is_finished, batch.cost(), other.cost()) == (False, Decimal("0.5"), None)
    batch.llm_requests.pending().update(state="cancelled")
    assert batch.is_finished


def test_many_items_take_few_queries(django_assert_max_num_queries: Any) -> None:
    with django_assert_max_num_queries(40):
        Batch.objects.submit(items(300))


# --- retry failed only -------------------------------------------------------------------------


def batch_of(*states: State, **shared: Any) -> Batch:
    batch = Batch.objects.submit(items(len(states)), **shared)
    for row, state in zip(batch.llm_requests.order_by("id"), states, strict=True):
        end(row, state)
    return batch


def end(row: LLMRequest, state: State) -> None:
    LLMRequest.objects.filter(pk=row.pk).update(state=state)


def counted(batch: Batch) -> dict[str, int]:
    return {state: number for state, number in batch.counts().items() if number}


FAILED, COMPLETED, CANCELLED = State.FAILED, State.COMPLETED, State.CANCELLED


def test_only_what_failed_is_asked_again_each_as_a_child_in_the_same_batch() -> None:
    batch = batch_of(*[FAILED] * 3, *[COMPLETED] * 5, CANCELLED, State.SUBMITTED, tenant="acme")
    failed = list(batch.llm_requests.failed().order_by("id"))
    again = batch.resubmit_failed()
    assert [row.resubmission_of for row in again] == failed
    stored = LLMRequest.objects.filter(pk__in=[row.pk for row in again]).order_by("id")
    assert [(row.state, row.batch, row.tenant, row.messages) for row in stored] == [
        ("pending", batch, "acme", MESSAGES)
    ] * 3


def test_second_click_asks_nothing_more() -> None:
    batch = batch_of(*[FAILED] * 3, *[COMPLETED] * 7)
    assert len(batch.resubmit_failed()) == 3
    assert batch.resubmit_failed() == []
    assert Batch.objects.get().resubmit_failed() == []
    assert LLMRequest.objects.count() == 13


@pytest.mark.parametrize("became", [State.PENDING, State.SUBMITTED, COMPLETED])
def test_what_is_being_asked_again_or_was_answered_is_left_alone(became: State) -> None:
    batch = batch_of(FAILED)
    end(batch.llm_requests.get().resubmit(), became)
    assert batch.resubmit_failed() == []


def test_resubmission_that_failed_too_is_asked_again_and_not_its_original() -> None:
    batch = batch_of(FAILED, FAILED)
    for row in (again := batch.resubmit_failed()):
        end(row, FAILED)
    assert [row.resubmission_of for row in batch.resubmit_failed()] == again
    assert counted(batch) == {"pending": 2}


def test_resubmission_that_was_cancelled_is_as_if_it_had_never_been() -> None:
    batch = batch_of(FAILED, COMPLETED)
    (again,) = batch.resubmit_failed()
    end(again, CANCELLED)
    assert counted(batch) == {"failed": 1, "completed": 1}
    (once_more,) = batch.resubmit_failed()
    assert once_more.resubmission_of == again.resubmission_of
    assert counted(batch) == {"pending": 1, "completed": 1}


def test_of_two_resubmissions_the_newest_stands_for_the_item() -> None:
    batch = batch_of(FAILED)
    original = batch.llm_requests.get()
    end(original.resubmit(), FAILED)
    end(original.resubmit(), COMPLETED)
    assert counted(batch) == {"completed": 1}
    assert batch.resubmit_failed() == []


@pytest.mark.parametrize("first", [FAILED, CANCELLED])
@pytest.mark.parametrize("second", [FAILED, CANCELLED, COMPLETED, State.SUBMITTED])
def test_every_item_is_counted_once_whatever_became_of_it(first: State, second: State) -> None:
    batch = batch_of(first, COMPLETED, FAILED)
    end(batch.llm_requests.order_by("id")[0].resubmit(), second)
    assert sum(batch.counts().values()) == 3


def test_progress_is_counted_by_item_and_cost_by_every_time_it_was_asked() -> None:
    batch = batch_of(FAILED, COMPLETED)
    LLMRequest.objects.update(cost=Decimal("0.25"))
    (again,) = batch.resubmit_failed()
    assert (counted(batch), batch.is_finished) == ({"pending": 1, "completed": 1}, False)
    LLMRequest.objects.filter(pk=again.pk).update(state=COMPLETED, cost=Decimal("0.5"))
    assert (counted(batch), batch.is_finished) == ({"completed": 2}, True)
    enter_costs()
    assert batch.cost() == Decimal("1.0")


def test_what_failed_elsewhere_is_not_touched() -> None:
    batch_of(FAILED)
    assert Batch.objects.create().resubmit_failed() == []
    assert LLMRequest.objects.count() == 1


def test_what_cannot_be_asked_any_more_is_logged_and_the_others_are_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = batch_of(FAILED, FAILED, FAILED)
    gone, forgotten, good = batch.llm_requests.order_by("id")
    LLMRequest.objects.filter(pk=gone.pk).update(provider="gone")
    LLMRequest.objects.filter(pk=forgotten.pk).update(
        forgotten_at=forgotten.created_at, messages=[]
    )
    assert [row.resubmission_of for row in batch.resubmit_failed()] == [good]
    assert f"{gone.uuid} cannot be asked again" in caplog.text
    assert counted(batch) == {"failed": 2, "pending": 1}


def test_request_that_is_being_asked_again_by_the_batch_is_not_by_itself() -> None:
    batch = batch_of(FAILED)
    original = batch.llm_requests.get()
    (again,) = batch.resubmit_failed()
    with pytest.raises(IllegalState, match=str(again.uuid)):
        original.resubmit()


@override_settings(QSTASH_TOKEN="")
def test_nothing_is_asked_again_without_a_token() -> None:
    batch = Batch.objects.create()
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        batch.resubmit_failed()


@pytest.mark.django_db(transaction=True)
def test_what_failed_leaves_again_in_one_call(qstash: FakeQStash) -> None:
    batch = batch_of(FAILED, FAILED, FAILED, COMPLETED)
    del qstash.calls[:]
    batch.resubmit_failed()
    assert qstash.calls == ["POST /v2/batch"]
    assert counted(batch) == {"submitted": 3, "completed": 1}


@pytest.mark.django_db(transaction=True)
def test_two_clicks_at_the_same_time_ask_once(qstash: FakeQStash) -> None:
    batch = batch_of(*[FAILED] * 20)
    outcomes = at_once(lambda: len(Batch.objects.get(pk=batch.pk).resubmit_failed()), times=3)
    assert sorted(outcomes) == [0, 0, 20]
    assert LLMRequest.objects.count() == 40


def at_once(verb: Callable[[], int], *, times: int) -> list[int]:
    barrier = threading.Barrier(times)

    def run(_: int) -> int:
        try:
            barrier.wait(timeout=20)
            return verb()
        finally:
            connection.close()

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


def test_many_failures_take_few_queries(django_assert_max_num_queries: Any) -> None:
    batch = batch_of(*[FAILED] * 600)
    with django_assert_max_num_queries(60):
        assert len(batch.resubmit_failed()) == 600
    with django_assert_max_num_queries(1):
        assert counted(batch) == {"pending": 600}
