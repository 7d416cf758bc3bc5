from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from django.core import mail
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from django_qstash_llm import alerting, tasks
from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import BudgetExceeded
from django_qstash_llm.models import Budget, LedgerEntry, LLMRequest, Spend
from django_qstash_llm.models.alert import Alert
from django_qstash_llm.models.money import MOST as MOST_USD
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.reservation import Reservation
from django_qstash_llm.models.settlement import settle
from django_qstash_llm.models.tally import Tally
from django_qstash_llm.pricing import Cost, worst_cost
from django_qstash_llm.qstash import Callback
from django_qstash_llm.signals import budget_threshold_reached
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

pytestmark = pytest.mark.django_db

Post = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "How many roads?"}]
PRICE = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
COST = Decimal("0.000039")  # 9 input tokens at $1 and 3 output tokens at $10 per million
MOST = {"max_completion_tokens": 100}


@pytest.fixture(autouse=True)
def priced(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICE}


@pytest.fixture
def outbox(qstash: FakeQStash) -> Outbox:
    return Outbox()


def ask(**asked: Any) -> LLMRequest:
    return LLMRequest.objects.publish(MESSAGES, **(MOST | asked))


def most() -> Decimal:
    """What one such request may cost."""
    found = worst_cost("openai", "gpt-5.4-mini", MESSAGES, MOST, at=timezone.now())
    assert found is not None
    return found


def make(amount: Any, **fields: Any) -> Budget:
    return Budget.objects.create(**({"name": "monthly", "amount": amount} | fields))


def told(**changes: Any) -> Callback:
    given: dict[str, Any] = {
        "status": 200,
        "body": json.dumps(ANSWER).encode(),
        "source_message_id": "msg_1",
        "max_retries": 0,
    }
    return Callback(**(given | changes))


def states() -> list[str]:
    return list(LLMRequest.objects.order_by("id").values_list("state", flat=True))


def reserved() -> Decimal:
    """As the budget says it, which is what its reservations come to."""
    [budget] = Budget.objects.all()
    held = sum((each.amount for each in budget.reservations.all()), Decimal(0))
    assert held == budget.reserved
    return held


# --- before the call ---


def test_what_fits_is_submitted_and_held(outbox: Outbox) -> None:
    make(most() * 3)
    for _ in range(3):
        ask()
    outbox.submit()
    assert states() == ["submitted"] * 3
    assert reserved() == most() * 3


def test_what_does_not_fit_fails_with_the_reason(outbox: Outbox, qstash: FakeQStash) -> None:
    make(most() * 3, scope="tenant", value="acme")
    rows = [ask(tenant="acme") for _ in range(10)]
    outbox.submit()
    assert states() == ["submitted"] * 3 + ["failed"] * 7
    assert len(qstash.messages) == 3
    rows[9].refresh_from_db()
    assert rows[9].error_code == "budget_exceeded"
    assert "“monthly”" in rows[9].error
    assert "tenant acme" in rows[9].error
    assert "renews at" in rows[9].error
    assert reserved() == most() * 3


def test_after_settling_below_what_was_held_the_next_fits(
    outbox: Outbox, post_callback: Post
) -> None:
    make(most() * 3)
    rows = [ask() for _ in range(3)]
    outbox.submit()
    refused = ask()
    outbox.submit()
    refused.refresh_from_db()
    assert refused.state == "failed"
    for number, row in enumerate(rows):
        post_callback(row, told(source_message_id=f"m{number}"))
    eighth = ask()
    outbox.submit()
    eighth.refresh_from_db()
    assert eighth.state == "submitted"
    standing = Budget.objects.get().standing()
    assert (standing.spent, standing.reserved) == (3 * COST, most())
    assert standing.left == most() * 3 - 3 * COST - most()


def test_several_budgets_apply_and_the_narrowest_decides(outbox: Outbox) -> None:
    make(most() * 9)
    narrow = make(most(), name="narrow", scope="label", value="eval")
    for labels in (["eval"], ["eval", "night"], []):
        ask(labels=labels)
    outbox.submit()
    assert states() == ["submitted", "failed", "submitted"]
    assert "“narrow”" in LLMRequest.objects.failed().get().error
    # Nothing is held in the wide one for what the narrow one refused.
    assert Budget.objects.get(name="monthly").reserved == most() * 2
    narrow.refresh_from_db()
    assert narrow.reserved == most()


@pytest.mark.parametrize(
    ("scope", "value", "asked"),
    [
        ("tenant", "acme", {"tenant": "acme"}),
        ("provider", "openai", {}),
        ("model", "gpt-5.4-mini", {}),
        ("model", "openai/gpt-5.4-mini", {}),
        ("label", "eval", {"labels": ["a", "eval"]}),
    ],
)
def test_scopes(outbox: Outbox, scope: str, value: str, asked: dict[str, Any]) -> None:
    make(0, scope=scope, value=value)
    ask(**asked)
    outbox.submit()
    assert states() == ["failed"]


def test_a_user_has_a_budget(outbox: Outbox, django_user_model: Any) -> None:
    ada, bob = (django_user_model.objects.create_user(name) for name in ("ada", "bob"))
    make(0, scope="user", value=str(ada.pk))
    ask(user=ada), ask(user=bob), ask()
    outbox.submit()
    assert states() == ["failed", "submitted", "submitted"]


@pytest.mark.parametrize(
    ("scope", "value"),
    [("tenant", "other"), ("provider", "anthropic"), ("model", "gpt"), ("label", "eva")],
)
def test_others_are_not_held(outbox: Outbox, scope: str, value: str) -> None:
    make(0, scope=scope, value=value)
    ask(tenant="acme", labels=["eval"])
    outbox.submit()
    assert states() == ["submitted"]


def test_a_budget_that_is_not_active_holds_nothing(outbox: Outbox) -> None:
    make(0, is_active=False)
    ask()
    outbox.submit()
    assert states() == ["submitted"]


def test_an_unpriced_model_is_refused_with_what_to_do(outbox: Outbox) -> None:
    make(100)
    row = ask(model="nobody-knows-it")
    outbox.submit()
    row.refresh_from_db()
    assert row.error_code == "budget_exceeded"
    assert "no price is known for openai/nobody-knows-it" in row.error
    assert "llm_prices" in row.error


def test_an_unpriced_model_passes_where_the_settings_say_so(outbox: Outbox, settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"BUDGETS_ALLOW_UNPRICED": True}
    make(100)
    ask(model="nobody-knows-it")
    outbox.submit()
    assert states() == ["submitted"]
    assert reserved() == 0


def test_a_request_without_an_output_cap_is_held_at_the_configured_one(
    outbox: Outbox, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"OUTPUT_CAP": {"*": 1000}}
    make(100)
    LLMRequest.objects.publish(MESSAGES)
    outbox.submit()
    assert Decimal("0.01") < reserved() < Decimal("0.0102")


def test_one_that_only_alerts_lets_pass(outbox: Outbox) -> None:
    make(0, action="alert")
    ask()
    outbox.submit()
    assert states() == ["submitted"]


def test_what_waits_again_is_held_once(outbox: Outbox, qstash: FakeQStash) -> None:
    make(most())
    ask()
    qstash.answer = lambda request: httpx.Response(503)
    outbox.submit()
    assert states() == ["pending"]
    assert reserved() == most()
    qstash.answer = None
    LLMRequest.objects.update(submit_after=None)
    from django_qstash_llm.models import Circuit

    Circuit.objects.all().delete()
    Outbox().submit()
    assert states() == ["submitted"]
    assert reserved() == most()


# --- letting go ---


def test_a_failure_lets_go(outbox: Outbox, post_callback: Post) -> None:
    make(most())
    row = ask()
    outbox.submit()
    post_callback(row, told(status=400, body=b"{}"))
    settle()
    assert reserved() == 0
    assert Budget.objects.get().standing().spent == 0


def test_cancelling_lets_go(outbox: Outbox) -> None:
    make(most())
    row = ask()
    outbox.submit()
    row.refresh_from_db()
    row.cancel()
    settle()
    assert reserved() == 0


def test_deleting_lets_go(outbox: Outbox) -> None:
    make(most())
    row = ask()
    outbox.submit()
    row.delete()
    settle()
    assert reserved() == 0


def test_what_was_lost_lets_go(outbox: Outbox) -> None:
    make(most())
    row = ask()
    outbox.submit()
    row.refresh_from_db()
    row.fail("lost", "nobody knows", now=timezone.now())
    settle()
    assert reserved() == 0


def test_a_late_answer_of_what_was_let_go_is_spent(outbox: Outbox, post_callback: Post) -> None:
    make(most())
    row = ask()
    outbox.submit()
    row.refresh_from_db()
    row.cancel()
    settle()
    post_callback(row, told())
    post_callback(row, told())
    assert Budget.objects.get().standing().spent == COST
    assert reserved() == 0


def test_a_dead_letter_is_retried_only_where_there_is_room(
    outbox: Outbox, post_callback: Post, qstash: FakeQStash
) -> None:
    budget = make(most())
    row = ask()
    outbox.submit()
    post_callback(row, told(status=500, body=b"", dlq_id="dlq_1"))
    settle()
    row.refresh_from_db()
    budget.amount = Decimal(0)
    budget.save()
    with pytest.raises(BudgetExceeded, match="monthly"):
        row.retry_dead_letter()
    row.refresh_from_db()
    assert row.state == "failed"
    assert qstash.retried == []
    budget.amount = most()
    budget.save()
    qstash.dead_letters = [{"dlqId": "dlq_1", "messageId": "msg_1", "url": "u"}]
    row.retry_dead_letter()
    assert row.state == "submitted"
    assert reserved() == most()


# --- what one request asks for harms no other ---


@pytest.mark.parametrize("action", ["refuse", "alert"])
@pytest.mark.parametrize("asked", [{"n": 2**62}, {"n": 1}], ids=["many", "one"])
def test_a_request_of_absurd_size_keeps_nobody_from_being_submitted(
    outbox: Outbox, action: str, asked: dict[str, Any]
) -> None:
    make(100, action=action)
    absurd = [ask(max_completion_tokens=2**62, **asked) for _ in range(3)]
    ask()
    outbox.submit()
    expected = "failed" if action == "refuse" else "submitted"
    assert states() == [expected] * 3 + ["submitted"]
    assert reserved() <= MOST_USD
    for row in absurd:
        row.refresh_from_db()
        assert action == "alert" or row.error_code == "budget_exceeded"
        LLMRequest.objects.filter(pk=row.pk).update(state="failed")
    settle()
    assert reserved() == (most() if action == "refuse" else 0)  # all that fitted was held


@pytest.mark.parametrize(
    "malformed",
    [
        {"messages": ["no message"]},
        {"parameters": []},
        {"labels": [["a", "list"]]},
        {"labels": 5},
    ],
    ids=["messages", "parameters", "list", "number"],
)
def test_a_row_that_nobody_can_weigh_keeps_nobody_from_being_submitted(
    outbox: Outbox, malformed: dict[str, Any]
) -> None:
    """``bulk_create`` goes round all checks."""
    make(100)
    whole = {"provider": "openai", "model": "gpt-5.4-mini", "messages": MESSAGES}
    LLMRequest.objects.bulk_create([LLMRequest(**(whole | malformed))])
    ask()
    outbox.submit()
    assert states() == ["failed", "submitted"]


def test_what_is_held_and_let_go_is_the_same_to_the_last_digit(
    outbox: Outbox, settings: Any
) -> None:
    odd = {"openai/gpt-5.4-mini": {"input": "0.00000003", "output": "0.00000007"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": odd}
    make(1)
    for _ in range(7):
        ask()
    outbox.submit()
    LLMRequest.objects.update(state="failed")
    settle()
    assert reserved() == 0


# --- chats ---


def test_a_chat_that_does_not_fit_is_not_asked_and_leaves_no_row(wire: Wire) -> None:
    make(most() / 2)
    with pytest.raises(BudgetExceeded) as caught:
        LLMRequest.objects.chat(MESSAGES, **MOST)
    assert caught.value.needed == most()
    assert caught.value.budget == "monthly"
    assert caught.value.renews_at is not None
    assert caught.value.renews_at > timezone.now()
    assert LLMRequest.objects.count() == 0
    assert wire.requests == []
    assert reserved() == 0


def test_a_chat_is_held_and_settled(wire: Wire) -> None:
    make(most())
    held = []

    def answer(request: httpx.Request) -> httpx.Response:
        held.append(reserved())
        return httpx.Response(200, json=ANSWER)

    wire.hosts["provider.test"] = answer
    LLMRequest.objects.chat(MESSAGES, **MOST)
    standing = Budget.objects.get().standing()
    assert held == [most()]
    assert (standing.spent, standing.reserved) == (COST, 0)


# --- time ---


def enter(spent: Any, at: datetime, **fields: Any) -> None:
    row = LLMRequest(provider="openai", model="m", **fields)
    entry = LedgerEntry.of_answer(
        row,
        answer=str(LedgerEntry.objects.count()),
        usage=Usage(),
        cost=Cost(Decimal(str(spent)), "setting"),
        at=at,
        is_useful=True,
    )
    LedgerEntry.objects.correct(entry, now=at)


def test_a_calendar_month_begins_at_midnight_in_its_time_zone() -> None:
    budget = make(100, time_zone="Pacific/Auckland")
    midnight = datetime(2026, 2, 28, 11, tzinfo=UTC)  # the 1st of March, 00:00, in Auckland
    enter(1, midnight - timedelta(seconds=1))
    enter(2, midnight)
    assert budget.standing(midnight).spent == 2
    assert budget.standing(midnight - timedelta(seconds=1)).spent == 1
    assert budget.renews_at(midnight - timedelta(seconds=1)) == midnight


@pytest.mark.parametrize(
    ("period", "at", "starts", "renews"),
    [
        ("day", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),  # 23 hours
        ("day", "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00"),  # 25 hours
        ("week", "2026-03-04T12:00", "2026-03-01T23:00", "2026-03-08T23:00"),
        ("month", "2026-03-31T23:30", "2026-03-31T22:00", "2026-04-30T22:00"),
        ("month", "2026-12-05T12:00", "2026-11-30T23:00", "2026-12-31T23:00"),
    ],
)
def test_periods_where_clocks_change(period: str, at: str, starts: str, renews: str) -> None:
    budget = Budget(name="b", amount=1, period=period, time_zone="Europe/Berlin")
    moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert budget.starts_at(moment) == datetime.fromisoformat(starts).replace(tzinfo=UTC)
    assert budget.renews_at(moment) == datetime.fromisoformat(renews).replace(tzinfo=UTC)


def test_what_was_spent_leaves_a_rolling_period_by_and_by() -> None:
    budget = make(100, period="rolling", days=2)
    now = datetime(2026, 3, 10, 12, tzinfo=UTC)
    enter(1, now - timedelta(days=2, hours=2))
    enter(2, now - timedelta(days=2) + timedelta(minutes=1))
    enter(4, now)
    assert budget.standing(now).spent == 6
    assert budget.standing(now + timedelta(hours=2)).spent == 4
    assert budget.standing(now + timedelta(days=3)).spent == 0


def test_a_new_budget_knows_what_was_spent_before_it() -> None:
    now = timezone.now()
    enter(3, now, tenant="acme")
    enter(4, now, tenant="other")
    enter(5, now - timedelta(days=40), tenant="acme")
    settle()
    budget = make(100, scope="tenant", value="acme")
    assert budget.standing(now).spent == 3


def test_a_budget_of_another_scope_is_counted_anew() -> None:
    now = timezone.now()
    enter(3, now, tenant="acme", labels=["x"])
    enter(4, now, tenant="other", labels=["x", "y"])
    budget = make(100, scope="tenant", value="acme")
    assert budget.standing(now).spent == 3
    budget.scope, budget.value = "label", "x"
    budget.save()
    assert Budget.objects.get().standing(now).spent == 7
    enter(1, now, labels=["x"])
    assert Budget.objects.get().standing(now).spent == 8


def test_a_budget_that_slept_is_counted_anew() -> None:
    now = timezone.now()
    budget = make(100)
    enter(1, now)
    assert budget.standing(now).spent == 1
    budget.is_active = False
    budget.save()
    enter(2, now)
    settle()
    budget.is_active = True
    budget.save()
    assert Budget.objects.get().standing(now).spent == 3


# --- thresholds ---


def test_each_threshold_alerts_once_in_a_period(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, int]] = []

    def listen(sender: Any, budget: Budget, alert: Alert, **_: Any) -> None:
        heard.append((budget.name, alert.threshold))

    budget_threshold_reached.connect(listen)
    try:
        make(100, thresholds=[50, 80], emails=["ops@example.com"])
        now = timezone.now()
        for spent in (49, 2, 1, 30, 5):
            enter(spent, now)
            settle()
            alerting.alert("default")
    finally:
        budget_threshold_reached.disconnect(listen)
    assert heard == [("monthly", 50), ("monthly", 80)]
    assert [m.subject for m in mail.outbox] == [
        "50 % of the budget monthly are spent",
        "80 % of the budget monthly are spent",
    ]
    assert "$51.00 of $100.00" in mail.outbox[0].body
    assert caplog.text.count("of the budget “monthly”") == 2


def test_a_new_period_alerts_anew() -> None:
    make(100, thresholds=[50], period="day", time_zone="UTC")
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for at in (now, now + timedelta(days=1)):
        enter(60, at)
        settle(now=at)
    assert Alert.objects.count() == 2


def test_one_that_only_alerts_does_at_its_amount() -> None:
    make(10, action="alert", thresholds=[])
    enter(10, timezone.now())
    settle()
    assert Alert.objects.get().threshold == 100


def test_the_sweep_settles_and_tells(settings: Any) -> None:
    settings.CELERY_TASK_ALWAYS_EAGER = True
    make(10, thresholds=[50])
    enter(6, timezone.now())
    tasks.sweep()
    assert LedgerEntry.objects.unfolded().count() == 0
    tasks.alert()
    assert Alert.objects.untold().count() == 0


def test_a_receiver_that_raises_keeps_nobody_from_being_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def breaks(sender: Any, **_: Any) -> None:
        raise RuntimeError("broken")

    budget_threshold_reached.connect(breaks)
    try:
        make(10, thresholds=[50], emails=["ops@example.com"])
        enter(6, timezone.now())
        settle()
        assert alerting.alert("default") == 1
    finally:
        budget_threshold_reached.disconnect(breaks)
    assert len(mail.outbox) == 1
    assert "broken" in caplog.text


# --- what cannot be ---


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"amount": Decimal("-1")}, "amount"),
        ({"amount": Decimal(10**8)}, "amount"),
        ({"amount": Decimal("NaN")}, "amount"),
        ({"time_zone": "Mars/Olympus"}, "time_zone"),
        ({"thresholds": [0]}, "thresholds"),
        ({"thresholds": "80"}, "thresholds"),
        ({"thresholds": [True]}, "thresholds"),
        ({"emails": ["nobody"]}, "emails"),
        ({"emails": "a@example.com"}, "emails"),
    ],
)
def test_bad_budgets_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Budget.objects.create(**({"name": "b", "amount": 1} | fields))
    assert field in caught.value.message_dict
    assert Budget.objects.count() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"scope": "tenant"},
        {"scope": "all", "value": "x"},
        {"period": "rolling"},
        {"period": "month", "days": 3},
        {"period": "rolling", "days": 0},
    ],
)
def test_budgets_that_mean_nothing_are_not_stored(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        Budget.objects.create(**({"name": "b", "amount": 1} | fields))
    with pytest.raises(ValidationError):
        Budget(**({"name": "b", "amount": 1} | fields)).full_clean()


def test_saving_a_budget_does_not_write_over_what_is_reserved(outbox: Outbox) -> None:
    budget = make(most() * 5)
    ask()
    outbox.submit()
    budget.name = "renamed"
    budget.save()
    assert reserved() == most()


def test_sums_that_went_wrong_are_counted_anew(outbox: Outbox) -> None:
    budget = make(100)
    ask()
    outbox.submit()
    Budget.objects.update(reserved=Decimal(7))
    budget.count_anew(timezone.now())
    assert reserved() == most()


# --- in step ---


def test_roll_ups_are_in_step_and_can_be_made_anew(django_user_model: Any) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for number in range(30):
        at = now + timedelta(days=number)
        enter(number, at, tenant=f"t{number % 3}", labels=["x", f"l{number % 2}"])
    before = {by: Spend.objects.report(by) for by in ("month", "tenant", "label", "model", "day")}
    assert [total.spent for _, total in before["label"]] == [210, 225, 435]
    assert [row["month"].month for row, _ in before["month"]] == [3]
    rows = list(Spend.objects.order_by("dimension", "value", "day").values())
    Spend.objects.filter(dimension="tenant").delete()
    assert Spend.objects.rebuild() == 30
    anew = list(Spend.objects.order_by("dimension", "value", "day").values())
    assert [r | {"id": 0} for r in rows] == [r | {"id": 0} for r in anew]
    assert {by: Spend.objects.report(by) for by in before} == before
    assert Tally.objects.count() == 0
    assert Reservation.objects.count() == 0
