from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from django.db import connection, transaction

from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import ChatFailed
from django_qstash_llm.models import Budget, CallbackResponse, LedgerEntry, LLMRequest, Spend
from django_qstash_llm.models.ledger import Total
from django_qstash_llm.models.money import USDField
from django_qstash_llm.models.replay import read_anew
from django_qstash_llm.models.settlement import settle
from django_qstash_llm.pricing import Cost
from django_qstash_llm.providers import get_provider
from django_qstash_llm.qstash import Callback
from testproject.articles.models import Article
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

pytestmark = pytest.mark.django_db

Post = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "How many roads?"}]
PRICE = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
# 9 input tokens at $1 and 3 output tokens at $10 per million.
COST = Decimal("0.000039")


@pytest.fixture(autouse=True)
def priced(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICE}


def ask(**asked: Any) -> LLMRequest:
    return LLMRequest.objects.publish(MESSAGES, **asked)


def told(**changes: Any) -> Callback:
    given: dict[str, Any] = {
        "status": 200,
        "body": json.dumps(ANSWER).encode(),
        "source_message_id": "msg_1",
        "max_retries": 3,
    }
    return Callback(**(given | changes))


def entries() -> list[LedgerEntry]:
    return list(LedgerEntry.objects.order_by("id"))


# --- one entry for each answer ---


def test_an_answer_is_entered_with_the_request_it_completes(
    post_callback: Post, qstash: FakeQStash, django_user_model: Any
) -> None:
    user = django_user_model.objects.create_user("ada")
    article = Article.objects.create(title="Roads", body="…")
    row = ask(about=article, user=user, tenant="acme", labels=["night", "eval"])
    assert post_callback(row, told(retried=2)).status_code == 200
    row.refresh_from_db()
    [entry] = entries()
    assert (entry.uuid, entry.answer, entry.number) == (row.uuid, "msg_1.2", 0)
    assert (entry.provider, entry.model, entry.tenant) == ("openai", "gpt-5.4-mini", "acme")
    assert (entry.user, entry.labels) == (str(user.pk), ["night", "eval"])
    assert entry.about_type == row.content_type_id
    assert (entry.spent, entry.useful, entry.unpriced) == (COST, COST, 0)
    assert (entry.input_tokens, entry.output_tokens, entry.answers) == (9, 3, 1)
    assert (entry.at, row.cost) == (row.finished_at, COST)


def test_the_same_callback_ten_times_is_entered_once(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    for _ in range(10):
        assert post_callback(row, told()).status_code == 200
    assert len(entries()) == 1
    assert LLMRequest.objects.cost() == COST


def test_a_second_paid_answer_is_spent_and_not_useful(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    post_callback(row, told())
    post_callback(row, told(source_message_id="msg_2"))
    row.refresh_from_db()
    total = LLMRequest.objects.total()
    assert (total.spent, total.useful, total.answers) == (2 * COST, COST, 2)
    assert row.cost == COST
    assert LLMRequest.objects.cost() == 2 * COST


def test_an_attempt_that_failed_costs_nothing(post_callback: Post, qstash: FakeQStash) -> None:
    row = ask()
    post_callback(row, told(status=500, body=b'{"error": {"message": "overloaded"}}'))
    post_callback(row, told(status=429, retried=1, body=b"{}"))
    assert entries() == []
    post_callback(row, told(retried=2))
    assert LLMRequest.objects.total().spent == COST


def test_an_answer_for_a_cancelled_request_is_paid_for_in_vain(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    row.cancel()
    post_callback(row, told())
    row.refresh_from_db()
    assert (row.state, row.cost) == ("cancelled", COST)
    assert LLMRequest.objects.total() == Total(
        spent=COST, answers=1, input_tokens=9, output_tokens=3
    )


def test_an_answer_after_the_failure_that_was_told_before_it_is_useful(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    post_callback(row, told(status=500, body=b"", retried=3))
    post_callback(row, told(retried=2))
    assert LLMRequest.objects.total().useful == COST


def test_an_unreadable_answer_that_tells_its_usage_is_spent(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    body = {"choices": [], "usage": ANSWER["usage"]}
    post_callback(row, told(body=json.dumps(body).encode()))
    total = LLMRequest.objects.total()
    assert (total.spent, total.useful) == (COST, Decimal(0))


def test_an_answer_of_an_unknown_model_is_counted_and_in_no_sum(
    post_callback: Post, qstash: FakeQStash
) -> None:
    post_callback(ask(model="nobody-knows-it"), told())
    total = LLMRequest.objects.total()
    assert (total.spent, total.unpriced, total.answers, total.cost) == (0, 1, 1, None)
    assert LLMRequest.objects.cost() is None
    post_callback(ask(), told(source_message_id="msg_2"))
    total = LLMRequest.objects.total()
    assert (total.cost, total.unpriced) == (COST, 1)


def test_absurd_counts_of_tokens_fit_their_columns(post_callback: Post, qstash: FakeQStash) -> None:
    for number in range(3):
        usage = {"prompt_tokens": 2**62, "completion_tokens": 2**62}
        body = json.dumps(ANSWER | {"usage": usage}).encode()
        post_callback(ask(), told(source_message_id=f"msg_{number}", body=body))
    assert [entry.input_tokens for entry in entries()] == [10**12] * 3
    [(_, total)] = Spend.objects.report()
    assert total.input_tokens == 3 * 10**12


def test_an_absurd_cost_is_unknown_and_harms_nobody(
    post_callback: Post, qstash: FakeQStash
) -> None:
    """In another unit than USD, say: ten of these are more than the sums' columns hold."""
    for number in range(12):
        usage = ANSWER["usage"] | {"cost": 900_000}
        body = json.dumps(ANSWER | {"usage": usage}).encode()
        row = ask()
        post_callback(row, told(source_message_id=f"msg_{number}", body=body))
        row.refresh_from_db()
        assert (row.state, row.cost) == ("completed", None)
    settle()
    assert LLMRequest.objects.total().unpriced == 12


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "labels", [[["a", "list"]], [5, "x"], {"x": 1}, 5], ids=["lists", "numbers", "dict", "number"]
)
def test_labels_that_are_none_stop_neither_an_answer_nor_a_settlement(
    post_callback: Post, qstash: FakeQStash, labels: Any
) -> None:
    """``update`` is checked by nobody."""
    row = ask()
    LLMRequest.objects.update(labels=labels)
    post_callback(row, told())
    Budget.objects.create(name="b", amount=1)
    settle()
    [(_, total)] = Spend.objects.report()
    assert total.spent == COST


def test_entries_outlive_their_request(post_callback: Post, qstash: FakeQStash) -> None:
    row = ask()
    post_callback(row, told())
    row.delete()
    assert LLMRequest.objects.cost() == COST
    assert LLMRequest.objects.filter(provider="openai").cost() is None


@pytest.mark.django_db(transaction=True)
def test_an_entry_is_stored_with_all_the_rest_or_not_at_all(
    post_callback: Post, qstash: FakeQStash
) -> None:
    """Outside a transaction of the test's, where all is one statement or a short transaction."""
    row = ask()
    post_callback(row, told())
    post_callback(row, told(source_message_id="msg_2"))
    assert [(e.answer, e.useful) for e in entries()] == [("msg_1.0", COST), ("msg_2.0", 0)]


# --- chats ---


def answers(wire: Wire, body: dict[str, Any], status: int = 200) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(status, json=body)


def test_a_chat_is_entered(wire: Wire) -> None:
    answers(wire, ANSWER)
    row = LLMRequest.objects.chat(MESSAGES, tenant="acme")
    [entry] = entries()
    assert (entry.uuid, entry.answer, entry.tenant) == (row.uuid, "chat", "acme")
    assert (entry.spent, entry.useful) == (COST, COST)


def test_a_chat_that_the_provider_refuses_costs_nothing(wire: Wire) -> None:
    answers(wire, {"error": {"message": "no"}}, 400)
    with pytest.raises(ChatFailed):
        LLMRequest.objects.chat(MESSAGES)
    assert entries() == []


def test_a_stream_that_is_left_is_spent_in_vain(wire: Wire) -> None:
    lines = [
        {"id": "c", "choices": [{"index": 0, "delta": {"content": word}}]}
        for word in ("Forty", "-")
    ]
    content = b"".join(b"data: %s\n\n" % json.dumps(line).encode() for line in lines)
    wire.hosts["provider.test"] = lambda request: httpx.Response(
        200, content=content, headers={"Content-Type": "text/event-stream"}
    )
    with LLMRequest.objects.stream(MESSAGES) as stream:
        next(iter(stream))
    [entry] = entries()
    row = LLMRequest.objects.get()
    assert (row.error_code, row.cost) == ("aborted", entry.spent)
    assert entry.spent > 0
    assert entry.useful == 0


@pytest.mark.parametrize("meanwhile", ["cancelled", "deleted"])
def test_a_chat_that_is_answered_without_usage_is_unpriced_also_where_nobody_wants_it(
    wire: Wire, meanwhile: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        rows = LLMRequest.objects.all()
        rows.update(state="cancelled") if meanwhile == "cancelled" else rows.delete()
        return httpx.Response(200, json={n: v for n, v in ANSWER.items() if n != "usage"})

    wire.hosts["provider.test"] = answer
    LLMRequest.objects.chat(MESSAGES)
    [entry] = entries()
    assert (entry.answers, entry.unpriced, entry.useful) == (1, 1, 0)


# --- what becomes known later ---


def test_a_price_that_is_found_later_is_an_entry_of_its_own(
    post_callback: Post, qstash: FakeQStash, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": {}}
    row = ask(model="new")
    post_callback(row, told())
    assert LLMRequest.objects.total().unpriced == 1
    settings.QSTASH_LLM = settings.QSTASH_LLM | {
        "PRICES": {"openai/new": PRICE["openai/gpt-5.4-mini"]}
    }
    row.refresh_from_db()
    read_anew(row)
    first, second = entries()
    assert (first.spent, first.unpriced, first.number) == (0, 1, 0)
    assert (second.spent, second.useful, second.unpriced, second.answers) == (COST, COST, -1, 0)
    assert (second.day, second.at) == (first.day, first.at)
    assert second.entered_at > first.entered_at
    total = LLMRequest.objects.total()
    assert (total.cost, total.unpriced, total.answers) == (COST, 0, 1)
    read_anew(row)
    assert len(entries()) == 2


def test_replaying_what_is_entered_changes_no_sum(post_callback: Post, qstash: FakeQStash) -> None:
    row = ask()
    post_callback(row, told())
    before = LLMRequest.objects.total()
    [receipt] = CallbackResponse.objects.all()
    receipt.apply_again()
    read_anew(row)
    assert LLMRequest.objects.total() == before
    assert len(entries()) == 1


def test_a_receipt_that_could_not_be_read_is_entered_when_it_can(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    post_callback(row, told(body=b"<html>"))
    assert entries() == []
    CallbackResponse.objects.update(body=json.dumps(ANSWER).encode(), applied_at=None)
    [receipt] = CallbackResponse.objects.all()
    receipt.apply_again()
    assert LLMRequest.objects.total().useful == COST


def test_reading_anew_without_a_price_forgets_no_cost(
    post_callback: Post, qstash: FakeQStash, settings: Any
) -> None:
    row = ask()
    post_callback(row, told())
    before = LLMRequest.objects.total()
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": {"openai/gpt-5.4-mini": {}}}
    LLMRequest.objects.update(completion="misread")
    row.refresh_from_db()
    assert "completion" in read_anew(row)
    assert row.cost == COST
    assert LLMRequest.objects.total() == before


def test_a_late_price_is_that_of_the_answer_it_was_worked_out_of(
    post_callback: Post, qstash: FakeQStash, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": {}}
    row = ask(model="new")
    usage = {"prompt_tokens": 1000, "completion_tokens": 1000}
    in_vain = json.dumps({"choices": [], "usage": usage}).encode()
    post_callback(row, told(body=in_vain))
    post_callback(row, told(source_message_id="msg_2"))
    new = {"PRICES": {"openai/new": PRICE["openai/gpt-5.4-mini"]}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | new
    assert [cost.amount for _, cost in LLMRequest.objects.price_unpriced()] == [COST]
    assert entries()[-1].answer == "msg_2.0"
    LLMRequest.objects.update(cost=0)  # as if it had been misread
    row.refresh_from_db()
    read_anew(row)
    assert LLMRequest.objects.total().spent == COST


def test_corrections_come_to_what_is_said_last() -> None:
    row = LLMRequest(provider="openai", model="m", messages=MESSAGES)
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    said = [(Decimal(1), True), (Decimal(3), True), (Decimal(3), False), (None, False)]
    for cost, is_useful in said:
        entry = LedgerEntry.of_answer(
            row,
            answer="chat",
            usage=Usage(input_tokens=5),
            cost=cost and Cost(cost, "setting"),
            at=at,
            is_useful=is_useful,
        )
        with transaction.atomic():
            LedgerEntry.objects.correct(entry, now=at + timedelta(days=1))
        total = LedgerEntry.objects.total()
        spent = cost or Decimal(0)
        assert (total.spent, total.useful) == (spent, spent if is_useful else 0)
        assert (total.answers, total.input_tokens) == (1, 5)
        assert total.unpriced == int(cost is None)


# --- sums ---


def test_sums_are_exact_where_floating_point_is_not() -> None:
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    row = LLMRequest(provider="openai", model="m")
    amounts = [Decimal("0.1"), Decimal("0.2"), Decimal("1e-12"), Decimal("123456.789012345678")]
    for number, amount in enumerate(amounts * 50):
        cost = Cost(amount, "setting")
        entry = LedgerEntry.of_answer(
            row, answer=str(number), usage=Usage(), cost=cost, at=at, is_useful=True
        )
        LedgerEntry.objects.correct(entry, now=at)
    assert LedgerEntry.objects.total().spent == 50 * sum(amounts)
    [(_, total)] = Spend.objects.report()
    assert total.spent == 50 * sum(amounts)


def test_money_is_found_compared_and_shown_as_it_was_given() -> None:
    field = USDField()
    assert field.get_prep_value(Decimal("0.000000000001")) == 1
    assert field.get_prep_value("2.5") == 2_500_000_000_000
    assert field.from_db_value(1, None, connection) == Decimal("0.000000000001")
    assert field.clean("0.25", None) == Decimal("0.25")


def test_by_day_is_in_the_time_zone_of_the_site(settings: Any) -> None:
    settings.TIME_ZONE = "Pacific/Auckland"
    row = LLMRequest(provider="openai", model="m")
    for hour in (9, 13):  # in Auckland that is the 1st and the 2nd
        entry = LedgerEntry.of_answer(
            row,
            answer=str(hour),
            usage=Usage(),
            cost=Cost(Decimal(hour), "setting"),
            at=datetime(2026, 3, 1, hour, tzinfo=UTC),
            is_useful=True,
        )
        LedgerEntry.objects.correct(entry, now=entry.at)
    days = [(day, total.spent) for day, total in LLMRequest.objects.by_day()]
    assert days == [(date(2026, 3, 1), 9), (date(2026, 3, 2), 13)]


def test_what_an_object_cost(post_callback: Post, qstash: FakeQStash) -> None:
    article, other = (Article.objects.create(title=t, body="…") for t in "ab")
    post_callback(ask(about=article), told())
    post_callback(ask(about=article), told(source_message_id="msg_2"))
    post_callback(ask(about=other), told(source_message_id="msg_3"))
    assert Spend.for_object(article).spent == 2 * COST
    [(place, total)] = Spend.objects.report("about")
    assert (place["about"], total.spent) == ("articles.article", 3 * COST)
    assert LLMRequest.objects.about(other).cost() == COST


def test_nothing_is_folded_twice(post_callback: Post, qstash: FakeQStash) -> None:
    post_callback(ask(), told())
    assert settle() == 1
    assert settle() == 0
    [(_, total)] = Spend.objects.report()
    assert total.spent == COST


# --- an answer to a request that is not here ---


def told_to_nobody(**changes: Any) -> Callback:
    given: dict[str, Any] = {
        "url": get_provider("openai").destination,
        "source_body": json.dumps({"model": "gpt-5.4-mini", "messages": MESSAGES}).encode(),
    }
    return told(**(given | changes))


def test_an_answer_to_a_request_that_was_deleted_is_paid_for_all_the_same(
    post_callback: Post,
) -> None:
    llm_request = ask()
    url = f"http://testserver/llm/callback/{llm_request.uuid}/"
    uuid = llm_request.uuid
    llm_request.delete()
    for _ in range(2):
        assert post_callback(None, told_to_nobody(), url=url).status_code == 200
    [entry] = entries()
    assert (entry.uuid, entry.provider, entry.model) == (uuid, "openai", "gpt-5.4-mini")
    assert (entry.spent, entry.useful, entry.unpriced) == (COST, 0, 0)
    assert CallbackResponse.objects.orphaned().get().seen_count == 2
    settle(using="default")
    assert sum(row.spent for row in Spend.objects.all()) == COST


def test_an_answer_that_was_billed_before_its_request_was_deleted_is_not_billed_again(
    post_callback: Post,
) -> None:
    llm_request = ask()
    url = f"http://testserver/llm/callback/{llm_request.uuid}/"
    post_callback(llm_request, told_to_nobody())
    llm_request.delete()  # and its receipts with it
    assert post_callback(None, told_to_nobody(), url=url).status_code == 200
    assert [entry.spent for entry in entries()] == [COST]
    assert CallbackResponse.objects.orphaned().get().problem == ""


@pytest.mark.parametrize(
    ("changes", "billed"),
    [
        ({"status": 500, "body": b"{}"}, []),
        ({"body": b"no JSON"}, []),
        ({"url": "https://llm.example/v1/chat/completions"}, ["llm.example"]),
        ({"url": "http://["}, [""]),
        ({"url": "http://h\x00o\ud800st/v1"}, ["ho\ufffdst"]),
        ({"url": "api/llm"}, ["upstash"]),
        ({"body": json.dumps({"usage": ANSWER["usage"], "choices": []}).encode()}, ["openai"]),
    ],
)
def test_of_an_answer_to_nobody_what_is_known_is_billed(
    post_callback: Post, changes: dict[str, Any], billed: list[str]
) -> None:
    url = f"http://testserver/llm/callback/{ask().uuid}/"
    LLMRequest.objects.all().delete()
    assert post_callback(None, told_to_nobody(**changes), url=url).status_code == 200
    assert [entry.provider for entry in entries()] == billed
    assert CallbackResponse.objects.orphaned().count() == 1


def test_an_answer_that_was_billed_as_another_attempt_is_not_billed_again(
    post_callback: Post,
) -> None:
    llm_request = ask()
    url = f"http://testserver/llm/callback/{llm_request.uuid}/"
    post_callback(llm_request, told_to_nobody(status=500, body=b"{}"))
    post_callback(llm_request, told_to_nobody())  # of the first attempt as well, it says
    assert [entry.answer for entry in entries()] == ["msg_1.1"]
    llm_request.delete()
    post_callback(None, told_to_nobody(), url=url)
    assert [entry.answer for entry in entries()] == ["msg_1.1"]
    # Another answer to the same message was another call.
    usage = ANSWER["usage"] | {"completion_tokens": 4, "total_tokens": 13}
    body = json.dumps(ANSWER | {"usage": usage}).encode()
    post_callback(None, told_to_nobody(body=body, retried=2), url=url)
    assert [entry.answer for entry in entries()] == ["msg_1.1", "msg_1.2"]


def test_no_key_of_ours_comes_into_the_ledger_by_an_answer_to_nobody(
    post_callback: Post, settings: Any
) -> None:
    url = f"http://testserver/llm/callback/{ask().uuid}/"
    LLMRequest.objects.all().delete()
    models = f"asked {settings.QSTASH_TOKEN}", f"answered {settings.QSTASH_TOKEN}"
    for number, (asked, answered) in enumerate([(models[0], "m"), ("", models[1])]):
        source = json.dumps({"model": asked}).encode()
        body = json.dumps(ANSWER | {"model": answered}).encode()
        told = told_to_nobody(source_message_id=f"msg_{number}", source_body=source, body=body)
        post_callback(None, told, url=url)
    assert [entry.model for entry in entries()] == ["asked [redacted]", "answered [redacted]"]


def test_whom_a_gateway_has_asked_is_not_guessed(post_callback: Post, settings: Any) -> None:
    here = {"API_KEY": "sk-of-the-tests-1", "HELICONE_API_KEY": "hk-of-the-tests"}
    there = {**here, "BASE_URL": "https://api.together.example/v1"}
    providers = {"openai": here, "together": there}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": providers}
    url = f"http://testserver/llm/callback/{ask(provider='together').uuid}/"
    LLMRequest.objects.all().delete()
    post_callback(None, told_to_nobody(url=get_provider("together").destination), url=url)
    assert [(entry.provider, entry.unpriced) for entry in entries()] == [("gateway.helicone.ai", 1)]


@pytest.mark.parametrize("source", [b"", b"no JSON", b"[]", b'{"model": 3}'])
def test_of_an_answer_to_nobody_the_model_is_the_one_that_answered_where_no_other_is_told(
    post_callback: Post, source: bytes
) -> None:
    url = f"http://testserver/llm/callback/{ask().uuid}/"
    LLMRequest.objects.all().delete()
    post_callback(None, told_to_nobody(source_body=source), url=url)
    assert [(entry.model, entry.unpriced) for entry in entries()] == [(ANSWER["model"], 1)]


def test_an_answer_to_nobody_that_cannot_be_billed_is_stored_and_says_so(
    post_callback: Post, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://testserver/llm/callback/{ask().uuid}/"
    LLMRequest.objects.all().delete()
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": 3}  # a fault of ours, as it were
    assert post_callback(None, told_to_nobody(), url=url).status_code == 200
    assert CallbackResponse.objects.orphaned().get().problem.startswith("not in the ledger: ")
    assert entries() == []
    assert "could not be billed" in caplog.text
