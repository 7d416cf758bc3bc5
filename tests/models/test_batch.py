from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, Group, User
from django.test import override_settings

from django_qstash_llm.exceptions import ConfigurationError, InvalidRequest
from django_qstash_llm.models import Batch, LLMRequest
from django_qstash_llm.models.outbox import Outbox
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
    assert (batch.is_finished, batch.cost(), other.cost()) == (False, Decimal("0.5"), None)
    batch.llm_requests.pending().update(state="cancelled")
    assert batch.is_finished


def test_many_items_take_few_queries(django_assert_max_num_queries: Any) -> None:
    with django_assert_max_num_queries(40):
        Batch.objects.submit(items(300))
