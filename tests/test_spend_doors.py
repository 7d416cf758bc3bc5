"""What was spent and how budgets stand, at the doors: REST, CSV and commands, all by one ``Report``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from io import StringIO
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_qstash_llm.completions import Usage
from django_qstash_llm.exceptions import InvalidRequest
from django_qstash_llm.models import (
    Budget,
    CallbackResponse,
    LedgerEntry,
    LLMRequest,
    MessageCount,
    Spend,
)
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.message_count import AT_ONCE, Messages, count_messages
from django_qstash_llm.models.standing import forecast, standings
from django_qstash_llm.pricing import Cost
from django_qstash_llm.reports import Report, as_cell, usd_text

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def spend(
    amount: str | None = "0.5", *, at: datetime = NOON, is_useful: bool = True, **asked: Any
) -> LedgerEntry:
    """An answer that cost ``amount``, as the ledger has it."""
    row = LLMRequest(**{"provider": "openai", "model": "gpt-5.4-mini", **asked})
    entry = LedgerEntry.of_answer(
        row,
        answer="chat",
        usage=Usage(input_tokens=10, output_tokens=2),
        cost=None if amount is None else Cost(Decimal(amount), "setting"),
        at=at,
        is_useful=is_useful,
    )
    LedgerEntry.objects.correct(entry, now=at)
    return entry


def receipt(kind: str = Kind.CALLBACK, *, at: datetime = NOON, **told: Any) -> CallbackResponse:
    return CallbackResponse.objects.create(
        kind=kind, uuid=uuid4(), source_message_id=uuid4().hex, received_at=at, **told
    )


@pytest.fixture
def staff() -> Callable[..., Client]:
    """A client of a staff user with these permissions and no others."""

    def make(*codenames: str, **fields: Any) -> Client:
        user = User.objects.create_user("staff", password="secret", **{"is_staff": True} | fields)
        user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        client = Client()
        client.force_login(user)
        return client

    return make


# --- what may be asked ----------------------------------------------------------------------------


def test_a_report_is_asked_for_in_texts() -> None:
    asked = {"from": "2026-01-01", "to": " 2026-12-31 ", "by": "day, model", "tenant": "acme"}
    report = Report.asked(asked | {"provider": "openai", "model": "", "user": None})
    assert report == Report(
        by=("day", "model"),
        since=date(2026, 1, 1),
        until=date(2026, 12, 31),
        provider="openai",
        place={"tenant": "acme"},
    )
    assert Report.asked({}) == Report(by=("month", "model"))


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({"from": "yesterday"}, "from", "give one as in 2026-03-31"),
        ({"to": "2026-02-30"}, "to", "give one as in 2026-03-31"),
        ({"from": "2026-02-02", "to": "2026-02-01"}, "to", "give a later day"),
        ({"by": "week"}, "by", "is none of day, month"),
        ({"by": "model,model"}, "by", "names the same twice"),
        ({"by": "tenant,user"}, "by", "give one of them"),
        ({"by": "label", "tenant": "acme"}, "by", "give one of them"),
        ({"tennant": "acme"}, "tennant", "did you mean 'tenant'?"),
        ({"x": "1"}, "x", "give from, to, by"),
    ],
)
def test_what_is_asked_wrongly_is_said_with_the_remedy(
    admin_client: Client, asked: dict[str, str], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        Report.asked(asked)
    assert wrong.value.field == field
    assert words in str(wrong.value)
    response = admin_client.get("/llm/spend/", asked)
    assert (response.status_code, response.json()["field"]) == (400, field)
    assert words in response.json()["detail"]


def test_with_labels_the_total_is_less_than_the_sum_of_the_lines() -> None:
    spend("1", labels=["night", "eval"])
    report = Report(by=("label",))
    assert [(of["label"], total.spent) for of, total in report.lines] == [("eval", 1), ("night", 1)]
    assert report.total.spent == 1


# --- REST -----------------------------------------------------------------------------------------


def test_spend_is_told_as_json_with_money_as_text(admin_client: Client) -> None:
    spend("0.000039")
    spend("2", at=NOON + timedelta(days=31), is_useful=False)
    spend(None, model="new")
    receipt()
    response = admin_client.get("/llm/spend/?by=month&by=model")
    assert "no-store" in response["Cache-Control"]
    told = response.json()
    figures = {"cached_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": 0}
    tokens = {"input_tokens": 10, "output_tokens": 2, **figures}
    assert told == {
        "from": None,
        "to": None,
        "by": ["month", "model"],
        "lines": [
            {"month": "2026-03", "model": "gpt-5.4-mini", "spent": "0.000039", "useful": "0.000039",
             "answers": 1, "unpriced": 0, **tokens},
            {"month": "2026-03", "model": "new", "spent": "0", "useful": "0",
             "answers": 1, "unpriced": 1, **tokens},
            {"month": "2026-04", "model": "gpt-5.4-mini", "spent": "2", "useful": "0",
             "answers": 1, "unpriced": 0, **tokens},
        ],
        "total": {"spent": "2.000039", "useful": "0.000039", "answers": 3, "unpriced": 1,
                  "input_tokens": 30, "output_tokens": 6, **figures},
        "qstash_messages": {"published": 1, "retries": 0, "callbacks": 1, "failure_callbacks": 0,
                            "total": 2, "cost": "0.00002", "is_complete": True},
    }  # fmt: skip


def test_a_report_is_of_what_is_chosen(admin_client: Client) -> None:
    spend("1", tenant="acme")
    spend("2", tenant="acme", provider="anthropic", model="claude-haiku-4-5")
    spend("4", tenant="other")
    spend("8", tenant="acme", at=NOON - timedelta(days=1))
    asked = {"tenant": "acme", "from": "2026-03-01", "by": "provider"}
    told = admin_client.get("/llm/spend/", asked).json()
    assert told["tenant"] == "acme"
    spent = [(line["provider"], line["spent"]) for line in told["lines"]]
    assert spent == [("anthropic", "2"), ("openai", "1")]
    asked = {"provider": "openai", "model": "gpt-5.4-mini", "to": "2026-02-28", "by": "day"}
    [line] = admin_client.get("/llm/spend/", asked).json()["lines"]
    assert (line["day"], line["spent"]) == ("2026-02-28", "8")


@pytest.mark.parametrize("path", ["/llm/spend/", "/llm/budgets/"])
def test_only_staff_who_may_view_is_told(staff: Callable[..., Client], path: str) -> None:
    assert Client().get(path).status_code == 403
    client = staff("view_llmrequest")
    assert client.get(path).status_code == 403
    user = User.objects.get()
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_spend", "view_budget"]))
    assert client.get(path).status_code == 200
    assert client.post(path).status_code == 405


def rows_of(response: Any) -> list[list[str]]:
    assert response.streaming
    return list(csv.reader(io.StringIO(b"".join(response.streaming_content).decode())))


def test_csv_is_streamed_and_holds_what_the_json_holds(admin_client: Client) -> None:
    spend("0.000039")
    response = admin_client.get("/llm/spend/?format=csv&from=2026-03-01&by=day,model")
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert response["Content-Disposition"] == 'attachment; filename="spend_2026-03-01.csv"'
    heading, line = rows_of(response)
    figures = ["10", "2", "0", "0", "0"]
    assert heading[:6] == ["day", "model", "spent", "useful", "answers", "unpriced"]
    assert line == ["2026-03-01", "gpt-5.4-mini", "0.000039", "0.000039", "1", "0", *figures]


@pytest.mark.parametrize("tenant", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", '=cmd|"/c calc"!A1'])
def test_no_spreadsheet_takes_a_cell_for_a_formula(admin_client: Client, tenant: str) -> None:
    spend(tenant=tenant)
    _, line = rows_of(admin_client.get("/llm/spend/?format=csv&by=tenant"))
    assert line[0] == f"'{tenant}"
    assert as_cell("acme, inc.") == "acme, inc."


def test_another_format_is_refused(admin_client: Client) -> None:
    response = admin_client.get("/llm/spend/?format=xml")
    assert response.json() == {"detail": "format: 'xml'; give json or csv", "field": "format"}


def test_amounts_are_told_whole_and_never_in_powers_of_ten() -> None:
    given = ["0", "100", "1E+3", "0.000000000001", "-0.5", "12.340"]
    assert [usd_text(Decimal(each)) for each in given] == [
        *("0", "100", "1000", "0.000000000001", "-0.5", "12.34")
    ]


def test_budgets_are_told_with_their_standing(admin_client: Client) -> None:
    now = timezone.now()
    Budget.objects.create(name="house", amount=20)
    Budget.objects.create(
        name="acme", amount=1, scope="tenant", value="acme", period="rolling", days=7
    )
    spend("0.25", tenant="acme", at=now)
    acme, house = admin_client.get("/llm/budgets/").json()["budgets"]
    assert acme["name"] == "acme"
    assert (acme["spent"], acme["reserved"], acme["left"]) == ("0.25", "0", "0.75")
    assert (acme["percent"], acme["renews_at"], acme["forecast"]) == (25.0, None, None)
    assert (house["spent"], house["left"], house["scope"], house["value"]) == (
        *("0.25", "19.75", "all", ""),
    )
    assert house["renews_at"]


# --- how budgets stand ----------------------------------------------------------------------------


def test_many_budgets_stand_in_as_many_queries_as_one() -> None:
    def number() -> int:
        budgets = list(Budget.objects.all())
        standings(budgets)  # the new ones are counted once
        with CaptureQueriesContext(connection) as queries:
            standings(budgets)
        return len(queries)

    Budget.objects.create(name="first", amount=1)
    one = number()
    for index, period in enumerate(["day", "week", "month", "rolling"] * 3):
        days = 30 if period == "rolling" else None
        Budget.objects.create(name=f"b{index}", amount=1, period=period, days=days)
    assert number() == one


def test_a_budget_stands_among_many_as_it_does_by_itself() -> None:
    now = timezone.now()
    for index, period in enumerate(["day", "week", "month", "rolling"]):
        days = 3 if period == "rolling" else None
        Budget.objects.create(name=f"b{index}", amount=9, period=period, days=days)
    for hours in (0, 30, 60, 24 * 6, 24 * 40):
        spend("1", at=now - timedelta(hours=hours))
    budgets = list(Budget.objects.all())
    together = standings(budgets, now=now)
    assert together == {budget.pk: budget.standing(now) for budget in budgets}


def test_a_forecast_goes_on_at_the_pace_of_the_period() -> None:
    budget = Budget.objects.create(name="march", amount=100, time_zone="UTC")
    spend("10", at=datetime(2026, 3, 2, tzinfo=UTC))
    now = datetime(2026, 3, 11, 8, tzinfo=UTC)  # a third of March
    standing = standings([budget], now=now)[budget.pk]
    assert forecast(budget, standing, now) == 30
    early = datetime(2026, 3, 1, 3, tzinfo=UTC)
    assert forecast(budget, standings([budget], now=early)[budget.pk], early) is None


def test_a_paused_budget_is_counted_anew_when_it_is_active_again() -> None:
    now = timezone.now()
    budget = Budget.objects.create(name="house", amount=9)
    spend("1", at=now)
    assert standings([budget])[budget.pk].spent == 1
    budget.is_active = False
    budget.save()
    spend("2", at=now)
    standings([budget])
    budget.standing()  # whoever looks meanwhile
    budget.refresh_from_db()
    budget.is_active = True
    budget.save()
    assert standings([budget])[budget.pk].spent == 3


# --- QStash's messages ----------------------------------------------------------------------------


def test_messages_are_counted_from_receipts_by_day() -> None:
    receipt()
    receipt(retried=1)
    receipt(retried=2, at=NOON + timedelta(days=1))
    receipt(Kind.FAILURE_CALLBACK, retried=2, at=NOON + timedelta(days=1))
    receipt(Kind.QUARANTINED)
    receipt(Kind.PING)
    everything = Messages(published=1, retries=2, callbacks=4, failure_callbacks=1)
    counts = MessageCount.objects
    assert counts.counted() == everything
    assert everything.total == 8
    assert everything.cost == Decimal("0.00008")
    first = Messages(published=1, retries=1, callbacks=3)
    assert counts.counted(until=date(2026, 3, 1)) == first
    assert counts.note() == 6
    assert counts.note() == 0
    assert counts.counted() == everything
    assert counts.counted(until=date(2026, 3, 1)) == first
    assert counts.counted(since=date(2026, 3, 2)) == Messages(
        retries=1, callbacks=1, failure_callbacks=1
    )
    receipt(at=NOON)  # one that comes late
    assert counts.counted().published == 2
    count_messages("default")
    assert counts.counted().published == 2
    CallbackResponse.objects.all().delete()
    assert counts.counted().total == 10


def test_what_came_a_moment_ago_is_counted_and_not_put_down_yet() -> None:
    now = timezone.now()
    receipt()
    receipt(at=now - timedelta(seconds=10))
    receipt(at=now + timedelta(days=400))  # a clock that was wrong
    assert MessageCount.objects.note(now=now) == 1
    assert MessageCount.objects.counted().published == 3
    assert MessageCount.objects.note(now=now + timedelta(minutes=6)) == 2
    assert MessageCount.objects.counted().published == 3


def test_messages_of_years_are_counted_a_piece_at_a_time() -> None:
    CallbackResponse.objects.bulk_create(
        CallbackResponse(
            kind=Kind.CALLBACK, uuid=uuid4(), source_message_id=f"m{n}", received_at=NOON
        )
        for n in range(AT_ONCE + 7)
    )
    assert MessageCount.objects.note() == AT_ONCE
    count_messages("default")
    assert MessageCount.objects.get().published == AT_ONCE + 7


def test_a_chat_has_no_messages_and_money_is_not_mixed(admin_client: Client) -> None:
    spend("1")
    told = admin_client.get("/llm/spend/").json()
    assert (told["qstash_messages"]["total"], told["qstash_messages"]["cost"]) == (0, "0")
    receipt()
    told = admin_client.get("/llm/spend/").json()
    assert (told["total"]["spent"], told["qstash_messages"]["cost"]) == ("1", "0.00002")


def test_the_price_of_a_message_is_a_setting(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"QSTASH_MESSAGE_PRICE": "0.5"}
    assert Messages(published=3).cost == Decimal("1.5")
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"QSTASH_MESSAGE_PRICE": ""}
    assert Messages(published=3).cost is None


# --- llm_spend ------------------------------------------------------------------------------------


def run(*arguments: str, **options: Any) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out, **options)
    return out.getvalue()


def test_llm_spend_prints_a_table() -> None:
    spend("1234.5")
    spend(None, model="new", is_useful=False)
    receipt()
    assert run("llm_spend", "--by", "month,model", "--from", "2026-03-01").splitlines() == [
        "month    model             spent     useful  answers  unpriced  input  output",
        "2026-03  gpt-5.4-mini  $1,234.50  $1,234.50        1         0     10       2",
        "2026-03  new               $0.00      $0.00        1         1     10       2",
        "total                  $1,234.50  $1,234.50        2         1     20       4",
        "Beside it QStash's messages, of all requests of these days: 2 (1 published, 0 retries, "
        "1 callbacks, 0 failure callbacks), $0.00002.",
    ]


def test_llm_spend_prints_what_rest_tells(admin_client: Client) -> None:
    spend("1", user=User.objects.get())
    key = str(User.objects.get().pk)
    told = admin_client.get("/llm/spend/", {"user": key, "by": "day"})
    assert json.loads(run("llm_spend", "--user", key, "--by", "day", "--json")) == told.json()
    as_csv = admin_client.get("/llm/spend/", {"user": key, "by": "day", "format": "csv"})
    assert run("llm_spend", "--user", key, "--by", "day", "--csv") == as_csv.getvalue().decode()


def test_llm_spend_names_the_option_that_is_wrong() -> None:
    with pytest.raises(CommandError, match="--to: '2026' is no day; give one as in 2026-03-31"):
        run("llm_spend", "--to", "2026")
    with pytest.raises(CommandError, match="There is no database 'nowhere'"):
        run("llm_spend", "--database", "nowhere")


def test_llm_spend_finds_what_differs_from_the_ledger_and_rebuilds_it() -> None:
    spend("1", tenant="acme")
    spend("2", model="other")
    assert run("llm_spend", "--check") == "What is added up is what the ledger says.\n"
    Spend.objects.filter(dimension="tenant").delete()
    Spend.objects.filter(model="other").update(spent=Decimal(5), answers=3)
    Spend.objects.create(day=NOON.date(), month=NOON.date(), provider="x", model="y", spent=1,
                         useful=0, answers=1, unpriced=0, input_tokens=0, output_tokens=0,
                         cached_tokens=0, cache_write_tokens=0, reasoning_tokens=0)  # fmt: skip
    out = StringIO()
    with pytest.raises(CommandError, match="3 rows differ from the ledger") as failed:
        call_command("llm_spend", "--check", stdout=out)
    assert failed.value.returncode == 1
    assert out.getvalue().splitlines() == [
        "2026-03-01 openai/other: spent is $5, not $2, answers is 3, not 1",
        "2026-03-01 x/y: spent is $1, not $0, answers is 1, not 0",
        "2026-03-01 openai/gpt-5.4-mini tenant acme: is missing",
    ]
    assert run("llm_spend", "--rebuild") == "2 entries added up anew.\n"
    assert run("llm_spend", "--check") == "What is added up is what the ledger says.\n"


# --- llm_budgets ----------------------------------------------------------------------------------


def test_llm_budgets_makes_lists_and_changes_them() -> None:
    assert "There is no budget" in run("llm_budgets")
    out = run("llm_budgets", "add", "acme", "20", "--scope", "tenant", "--of", "acme", "--period", "week",
              "--threshold", "90", "--email", "ann@example.com", "--action", "alert")  # fmt: skip
    assert out.startswith("“acme” ($20.00 a week, tenant acme): $0.00 spent (0.0 %), $0.00 reserved, "
                          "$20.00 left")  # fmt: skip
    assert "Alerts only. Renews" in out
    budget = Budget.objects.get()
    assert (budget.thresholds, budget.emails, budget.amount) == ([90], ["ann@example.com"], 20)
    spend("5", tenant="acme", at=timezone.now())
    assert "$5.00 spent (25.0 %)" in run("llm_budgets", "list")
    run("llm_budgets", "set", "acme", "--amount", "50", "--name", "Acme", "--scope", "all")
    budget.refresh_from_db()
    assert (budget.name, budget.amount, budget.scope, budget.value) == ("Acme", 50, "all", "")
    assert run("llm_budgets", "pause", "Acme").startswith("(paused) “Acme”")
    assert not Budget.objects.get().is_active
    spend("1", at=timezone.now())
    assert "$6.00 spent" in run("llm_budgets", "activate", "Acme")
    budget.tallies.update(spent=0)
    assert "$6.00 spent" in run("llm_budgets", "recount", "Acme")


def test_llm_budgets_tells_json(admin_client: Client) -> None:
    Budget.objects.create(name="house", amount=1)
    told = admin_client.get("/llm/budgets/").json()
    for arguments in (["--json"], ["list", "--json"]):
        found = json.loads(run("llm_budgets", *arguments))
        del found["budgets"][0]["forecast"], told["budgets"][0]["forecast"]
        assert found == told
        told = admin_client.get("/llm/budgets/").json()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "b", "much"], "amount: 'much' is no amount; give USD"),
        (["add", "b", "-1"], "amount"),
        (["add", "house", "1"], "name: Budget with this Name already exists"),
        (["add", "b", "1", "--scope", "tenant"], "Say of what it is"),
        (["add", "b", "1", "--period", "rolling"], "Give days, 1 to 366"),
        (["add", "b", "1", "--time-zone", "Mars/Base"], "--time-zone: Not a time zone"),
        (["add", "b", "1", "--email", "ann"], "--email: Give a list of addresses"),
        (["add", "b", "1", "--threshold", "0"], "--threshold: Give a list of whole percents"),
        (
            ["set", "nobody", "--amount", "1"],
            "There is no budget 'nobody'; llm_budgets lists them.",
        ),
    ],
)
def test_llm_budgets_names_what_is_wrong(arguments: list[str], words: str) -> None:
    Budget.objects.create(name="house", amount=1)
    with pytest.raises(CommandError) as wrong:
        run("llm_budgets", *arguments)
    assert words in str(wrong.value)
    assert Budget.objects.count() == 1
