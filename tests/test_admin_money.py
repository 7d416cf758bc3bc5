"""The admin's pages about money: budgets, the ledger, what was spent, and costs beside other things."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import connection
from django.template import Context, Template
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.admin import CostColumn
from django_qstash_llm.admin.budget import gauge
from django_qstash_llm.admin.chart import Chart
from django_qstash_llm.doctor import Doctor, Level
from django_qstash_llm.health import Health
from django_qstash_llm.models import (
    ApiKey,
    Batch,
    Budget,
    CallbackResponse,
    LedgerEntry,
    LLMRequest,
    Spend,
)
from django_qstash_llm.models.alert import Alert
from django_qstash_llm.models.budget import Standing
from django_qstash_llm.models.ledger import Total
from django_qstash_llm.models.settlement import settle
from testproject.articles.models import Article

from .test_admin import (
    BATCH,
    BATCHES,
    REQUEST,
    REQUESTS,
    XSS,
    Page,
    act,
    assert_inert,
    completed,
    failed,
    messages_of,
    page_of,
    staff_client,
)
from .test_spend_doors import receipt, spend

__all__ = ["staff_client"]
pytestmark = pytest.mark.django_db

BUDGETS = "admin:django_qstash_llm_budget_changelist"
BUDGET = "admin:django_qstash_llm_budget_change"
NEW_BUDGET = "admin:django_qstash_llm_budget_add"
LEDGER = "admin:django_qstash_llm_ledgerentry_changelist"
ENTRY = "admin:django_qstash_llm_ledgerentry_change"
SPEND = "admin:django_qstash_llm_spend_changelist"
SPEND_CSV = "admin:django_qstash_llm_spend_csv"
HEALTH = "admin:django_qstash_llm_llmrequest_health"
NOW = timezone.now()


def billed(row: LLMRequest, amount: str | None = "0.5", *, answer: str = "chat", is_useful: bool = True,
           number: int = 0) -> LedgerEntry:  # fmt: skip
    """An answer to ``row``, as the ledger has it."""
    spent = Decimal(amount or 0)
    return LedgerEntry.objects.create(
        uuid=row.uuid,
        answer=answer,
        number=number,
        at=NOW,
        entered_at=NOW,
        day=NOW.date(),
        provider=row.provider,
        model=row.model,
        spent=spent,
        useful=spent if is_useful else Decimal(0),
        unpriced=int(amount is None),
        answers=int(number == 0),
        input_tokens=9,
        output_tokens=3,
        cost_source="own" if amount else "",
    )


def queries_of(client: Client, url: str) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert client.get(url).status_code == 200
    return len(queries)


# --- budgets --------------------------------------------------------------------------------------


def test_the_list_of_budgets_shows_figures_and_a_gauge(admin_client: Client) -> None:
    Budget.objects.create(name="house", amount=20)
    Budget.objects.create(name="acme", amount=1, scope="tenant", value="acme", action="alert",
                          period="rolling", days=7)  # fmt: skip
    spend("0.9", tenant="acme", at=NOW)
    page = page_of(admin_client, BUDGETS)
    for words in ("house", "$20.00 · calendar month", "everything", "$0.90 spent (4 %)", "$19.10", "acme",
                  "$1.00 · the last 7 days", "tenant acme", "$0.90 spent (90 %)", "$0.10", "by and by",
                  "alerts only", "refuses"):  # fmt: skip
        assert words in page.text, words
    assert "$0.90 spent and $0.00 reserved of $20.00" in page.text
    assert [kind for kind in page.values("rect", "class") if kind.startswith("llm-gauge-high")]
    assert_inert(page)


def test_the_list_of_budgets_takes_as_many_queries_for_many_as_for_few(
    admin_client: Client,
) -> None:
    url = reverse(BUDGETS)
    Budget.objects.create(name="first", amount=1)
    admin_client.get(url)
    few = queries_of(admin_client, url)
    for number in range(20):
        Budget.objects.create(name=f"b{number}", amount=1, period="day")
    admin_client.get(url)
    assert queries_of(admin_client, url) == few


def test_a_page_of_a_budget_shows_how_it_stands_and_its_alerts(admin_client: Client) -> None:
    budget = Budget.objects.create(name="house", amount=2, thresholds=[50])
    spend("1.5", at=NOW)
    page = page_of(admin_client, BUDGET, budget)
    for words in ("How it stands", "$1.50 spent (75 %)", "left $0.50", "reserved for requests under way",
                  "threshold spent then of reached told 50 % $1.50 $2.00"):  # fmt: skip
        assert words in page.text, words
    assert set(page.buttons()) >= {"count_anew", "pause"}
    assert_inert(page)
    few = queries_of(admin_client, reverse(BUDGET, args=[budget.pk]))
    Alert.objects.bulk_create(
        Alert(budget=budget, starts_at=NOW - timedelta(days=n), threshold=50, spent=1, amount=2, crossed_at=NOW)
        for n in range(1, 40)
    )  # fmt: skip
    assert queries_of(admin_client, reverse(BUDGET, args=[budget.pk])) == few


FORM = {"name": "house", "amount": "20", "period": "month", "scope": "all", "action": "refuse", "is_active": "on",
        "value": "", "days": "", "time_zone": "", "thresholds": "50, 80, 100", "emails": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "marks"),
    [
        ("50, 80, 100", [50, 80, 100]),
        ("[80, 50]", [50, 80]),
        ("80 % 90%", [80, 90]),
        ("100;100", [100]),
        ("", []),
    ],
)
def test_thresholds_are_typed_as_people_do(
    admin_client: Client, typed: str, marks: list[int]
) -> None:
    emails = "ann@example.com, bob@example.com"
    response = admin_client.post(
        reverse(NEW_BUDGET), FORM | {"thresholds": typed, "emails": emails}
    )
    assert response.status_code == 302
    budget = Budget.objects.get()
    assert (budget.thresholds, budget.emails) == (marks, emails.split(", "))
    assert budget.amount == 20
    page = page_of(admin_client, BUDGET, budget)
    shown = [
        attrs.get("value", "") for _, attrs in page.elements if attrs.get("name") == "thresholds"
    ]
    assert shown == [", ".join(map(str, marks))]


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"thresholds": "half"}, "thresholds", "“half” is no percent: give whole numbers"),
        ({"thresholds": "0"}, "thresholds", "is no percent"),
        ({"thresholds": "[80"}, "thresholds", "This begins as JSON and is none"),
        ({"emails": "ann"}, "emails", "“ann” is no e-mail address"),
        ({"scope": "tenant"}, "value", "Say which tenant it is of."),
        ({"value": "acme"}, "value", "leave it empty"),
        (
            {"scope": "provider", "value": "opnai"},
            "value",
            "There is no such provider; there are: anthropic",
        ),
        (
            {"scope": "user", "value": "nobody"},
            "value",
            "There is no such user: give its name, or its id.",
        ),
        ({"scope": "api_key", "value": "x"}, "value", "There is no such API key"),
        ({"period": "rolling"}, "days", "Say how many: 1 to 366."),
        ({"days": "3"}, "days", "Only for “the last days”"),
        ({"time_zone": "Mars/Base"}, "time_zone", "Not a time zone"),
        ({"amount": "-1"}, "amount", "0"),
        ({"amount": "much"}, "amount", "Enter a number"),
    ],
)
def test_a_budget_that_means_nothing_is_refused_at_its_field(
    admin_client: Client, changed: dict[str, str], field: str, words: str
) -> None:
    response = admin_client.post(reverse(NEW_BUDGET), FORM | changed)
    assert response.status_code == 200
    errors = response.context["adminform"].form.errors
    assert words in " ".join(errors[field])
    assert not Budget.objects.exists()


def test_a_user_and_a_key_may_be_given_by_name(admin_client: Client) -> None:
    ada = User.objects.create_user("ada")
    key, _ = ApiKey.objects.issue("Ann's notebook")
    for scope, typed, pk in (("user", "ada", ada.pk), ("user", str(ada.pk), ada.pk),
                             ("api_key", "Ann's notebook", key.pk)):  # fmt: skip
        asked = FORM | {"name": f"{scope} {typed}", "scope": scope, "value": typed}
        assert admin_client.post(reverse(NEW_BUDGET), asked).status_code == 302
        assert Budget.objects.get(name=f"{scope} {typed}").value == str(pk)


def test_changing_a_budget_leaves_what_is_reserved(admin_client: Client) -> None:
    budget = Budget.objects.create(name="house", amount=1)
    Budget.objects.update(reserved=Decimal("0.25"))
    response = admin_client.post(reverse(BUDGET, args=[budget.pk]), FORM | {"amount": "30"})
    assert response.status_code == 302
    budget.refresh_from_db()
    assert (budget.amount, budget.reserved) == (30, Decimal("0.25"))


def test_budgets_are_counted_anew_paused_and_activated(admin_client: Client) -> None:
    budget = Budget.objects.create(name="house", amount=9)
    spend("1", at=NOW)
    budget.standing()
    budget.tallies.update(spent=7)
    response = act(admin_client, BUDGETS, "count_anew", budget)
    assert messages_of(response) == ["1 budget was counted anew."]
    assert budget.standing().spent == 1
    assert messages_of(act(admin_client, BUDGETS, "pause", budget))[-1] == "1 budget is paused."
    budget.refresh_from_db()
    assert not budget.is_active
    assert "paused" in page_of(admin_client, BUDGETS).text
    assert "It is paused" in page_of(admin_client, BUDGET, budget).text
    assert messages_of(act(admin_client, BUDGETS, "activate", budget, from_page="1"))
    assert [str(entry.change_message) for entry in LogEntry.objects.order_by("pk")] == [
        *("Counted anew.", "Paused.", "Activated.")
    ]


def test_who_may_only_look_at_budgets_changes_none(staff_client: Callable[..., Client]) -> None:
    budget = Budget.objects.create(name="house", amount=9)
    client = staff_client("view_budget")
    page = page_of(client, BUDGET, budget)
    assert "How it stands" in page.text
    assert page.buttons() == []
    act(client, BUDGETS, "pause", budget)
    assert Budget.objects.get().is_active
    assert client.post(reverse(BUDGET, args=[budget.pk]), FORM).status_code == 403
    assert client.get(reverse(NEW_BUDGET)).status_code == 403


@pytest.mark.parametrize(
    ("spent", "reserved", "level", "widths"),
    [
        ("0", "0", "fine", ("0.000", "0.000")),
        ("5", "2.5", "fine", ("50.000", "25.000")),
        ("9", "0", "high", ("90.000", "0.000")),
        ("15", "5", "over", ("75.000", "25.000")),
        ("-1", "0", "fine", ("0.000", "0.000")),
    ],
)
def test_a_gauge_is_never_wider_than_it_is(
    spent: str, reserved: str, level: str, widths: tuple[str, str]
) -> None:
    svg = gauge(Standing(Decimal(10), Decimal(spent), Decimal(reserved), None))
    assert f'"llm-gauge-{level}" width="{widths[0]}"' in svg
    assert f'"llm-gauge-reserved" x="{widths[0]}" width="{widths[1]}"' in svg


# --- the ledger -----------------------------------------------------------------------------------


def test_the_ledger_shows_answers_and_links_their_requests(admin_client: Client) -> None:
    row = completed()
    entry = billed(row, "0.0123")
    gone = billed(LLMRequest(provider="anthropic", model="claude"), None)
    page = page_of(admin_client, LEDGER)
    assert reverse(REQUEST, args=[row.pk]) in page.values("a", "href")
    for words in ("$0.0123", "unpriced", "own", "9 → 3", str(gone.uuid), "gpt-5.4-mini", "claude"):
        assert words in page.text, words
    assert_inert(page)
    one = page_of(admin_client, ENTRY, entry)
    for words in ("$0.0123", "openai", str(row.uuid)[:8]):
        assert words in one.text, words
    assert_inert(one)
    for client_url in (reverse(ENTRY, args=[entry.pk]), reverse(LEDGER)):
        assert admin_client.post(client_url, {"spent": "0"}).status_code in (302, 403, 200)
    assert LedgerEntry.objects.get(pk=entry.pk).spent == Decimal("0.0123")
    assert "delete_selected" not in page.menu()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("provider=anthropic", "claude"),
        ("model=claude", "claude"),
        ("source=own", "plain in_vain difference claude"),
        ("kind=unpriced", "unpriced"),
        ("kind=in_vain", "in_vain"),
        ("kind=difference", "difference"),
        ("day=2026-03-01", "old"),
        ("day=2026-02-30", "plain in_vain difference claude unpriced old"),
        ("day=2026-03-01&provider=openai", "old"),
    ],
)
def test_the_ledger_is_filtered(admin_client: Client, query: str, found: str) -> None:
    row = completed()
    rows = {
        "plain": billed(row),
        "in_vain": billed(row, answer="b", is_useful=False),
        "difference": billed(row, answer="c", number=1),
        "claude": billed(LLMRequest(provider="anthropic", model="claude")),
        "unpriced": billed(row, None, answer="d"),
        "old": spend(at=datetime(2026, 3, 1, 12, tzinfo=UTC)),
    }
    response = admin_client.get(f"{reverse(LEDGER)}?{query}")
    assert {each.pk for each in response.context["cl"].result_list} == {
        rows[name].pk for name in found.split()
    }
    assert_inert(Page(response))


def test_the_ledger_is_searched_by_request(admin_client: Client) -> None:
    row = completed()
    entry = billed(row)
    billed(completed())
    response = admin_client.get(f"{reverse(LEDGER)}?q={row.uuid}")
    assert [each.pk for each in response.context["cl"].result_list] == [entry.pk]
    assert not admin_client.get(f"{reverse(LEDGER)}?q=acme").context["cl"].result_list


def test_the_ledger_takes_as_many_queries_for_many_as_for_few(admin_client: Client) -> None:
    billed(completed())
    url = reverse(LEDGER)
    few = queries_of(admin_client, url)
    for number in range(20):
        billed(completed(), answer=str(number))
    with CaptureQueriesContext(connection) as queries:
        admin_client.get(url)
    assert len(queries) == few
    counts = [q["sql"] for q in queries if "COUNT(" in q["sql"]]
    assert all("LIMIT" in sql for sql in counts)  # none counts a whole table


def test_who_may_not_view_requests_is_linked_to_none(staff_client: Callable[..., Client]) -> None:
    row = completed()
    billed(row)
    page = page_of(staff_client("view_ledgerentry"), LEDGER)
    assert str(row.uuid) in page.text
    assert not [href for href in page.values("a", "href") if "llmrequest" in href]


# --- what was spent -------------------------------------------------------------------------------


def test_the_page_shows_totals_a_chart_and_qstash_beside(admin_client: Client) -> None:
    spend("1.5", at=NOW)
    spend("0.5", at=NOW, model="other", is_useful=False)
    spend(None, at=NOW, model="new")
    receipt(at=NOW)
    page = page_of(admin_client, SPEND)
    month = timezone.localtime(NOW).strftime("%Y-%m")
    for words in ("$2.00 + 1 unpriced spent", "of it useful $1.50", f"{month} gpt-5.4-mini $1.50 $1.50 1 10 2",
                  f"{month} other $0.50 $0.00 1 10 2", f"{month} new unpriced – 1 10 2",
                  "all $2.00 + 1 unpriced $1.50 3 30 6", "at QSTASH_MESSAGE_PRICE $0.00002"):  # fmt: skip
        assert words in page.text, words
    assert f"{month} · gpt-5.4-mini: $1.50" in page.text  # in the chart
    assert {"llm-chart", "llm-swatch"} <= set(page.values("svg", "class"))
    assert_inert(page)


def test_the_page_is_of_what_is_chosen(admin_client: Client) -> None:
    ada = User.objects.create_user("ada")
    spend("1", user=ada)
    spend("2", tenant="acme")
    spend(
        "4",
        tenant="acme",
        provider="anthropic",
        model="claude",
        at=datetime(2026, 3, 2, 12, tzinfo=UTC),
    )
    asked = {
        "from": "2026-03-01",
        "to": "2026-03-31",
        "by": ["day", "tenant"],
        "provider": "anthropic",
    }
    page = Page(admin_client.get(reverse(SPEND), asked))
    assert "2026-03-02 acme $4.00" in page.text
    assert "$2.00" not in page.text
    asked = {
        "from": "2026-03-01",
        "to": "2026-03-31",
        "by": "model",
        "of": "tenant",
        "value": "acme",
    }
    page = Page(admin_client.get(reverse(SPEND), asked))
    assert "claude $4.00 $4.00 1 10 2" in page.text
    assert "acme" in page.values("input", "value")
    [link] = [href for href in page.values("a", "href") if href.startswith("csv/")]
    assert "tenant=acme" in link
    page = Page(admin_client.get(reverse(SPEND), {"from": "2026-03-01", "by": "user"}))
    assert f"ada ({ada.pk}) $1.00" in page.text


def test_the_csv_is_what_the_page_shows(
    admin_client: Client, staff_client: Callable[..., Client]
) -> None:
    spend("2", tenant="=acme")
    url = f"{reverse(SPEND_CSV)}?from=2026-03-01&by=tenant"
    assert (
        admin_client.get(url).getvalue().decode().splitlines()[1].startswith("'=acme,2,2,1,0,10,2")
    )
    assert admin_client.get(f"{reverse(SPEND_CSV)}?from=x").status_code == 400
    client = staff_client("view_llmrequest")
    assert client.get(url).status_code == 403
    assert client.get(reverse(SPEND)).status_code == 403


def test_what_is_chosen_wrongly_is_said_on_the_page(admin_client: Client) -> None:
    response = admin_client.get(reverse(SPEND), {"from": "2026-13-01", "by": "tenant"})
    assert response.status_code == 400
    assert (
        "from: &#x27;2026-13-01&#x27; is no day; give one as in 2026-03-31"
        in response.content.decode()
    )


def test_the_page_takes_as_many_queries_for_much_as_for_little(admin_client: Client) -> None:
    for by in ("month,model", "user", "label"):
        url = f"{reverse(SPEND)}?by={by}&from=2026-01-01"
        spend()
        admin_client.get(url)
        few = queries_of(admin_client, url)
        for number in range(12):
            user = User.objects.create_user(f"{by}{number}")
            spend(user=user, model=f"m{number}", labels=[f"l{number}"])
        settle()
        assert queries_of(admin_client, url) == few


@pytest.mark.parametrize("text", XSS, ids=[str(number) for number in range(len(XSS))])
def test_names_of_strangers_are_inert(admin_client: Client, text: str) -> None:
    spend(tenant=text, model=text[:200], labels=[text], at=NOW)
    budget = Budget.objects.create(name=text[:90], amount=1, scope="tenant", value=text)
    for url in (f"{reverse(SPEND)}?by=tenant", f"{reverse(SPEND)}?by=label", reverse(BUDGETS),
                reverse(BUDGET, args=[budget.pk]), reverse(LEDGER), f"{reverse(LEDGER)}?model=%22%3E%3Csvg",
                f"{reverse(SPEND)}?model=%22%3E%3Csvg%20onload=x()%3E"):  # fmt: skip
        assert_inert(Page(admin_client.get(url)))


def test_a_chart_holds_few_colours_and_no_more_bars_than_fit() -> None:
    lines = [(f"2026-{n // 28 + 1:02}-{n % 28 + 1:02}", f"m{n % 9}", Total(spent=Decimal(n), answers=1))
             for n in range(200)]  # fmt: skip
    chart = Chart.of(lines)
    assert len(chart.bars) == 92
    assert len(chart.series) == 7
    assert chart.names[-1][1] == "others"
    assert sum((t.spent for t in chart.totals.values()), Decimal(0)) == sum(range(108, 200))
    heights = [float(each) for each in re.findall(r'height="([\d.]+)"><title>', chart.svg)]
    assert max(heights) == 60.0
    assert Chart.of(
        [("2026-01", "m", Total(answers=1, unpriced=1))]
    ).svg  # of nothing that is priced


# --- beside other things --------------------------------------------------------------------------


def test_the_page_of_a_request_shows_its_entries(admin_client: Client) -> None:
    row = completed(cost=Decimal("0.5"))
    billed(row, "0.5", answer="msg_1.0")
    billed(row, "0.25", answer="msg_2.0", is_useful=False)
    billed(row, "0.05", answer="msg_1.0", number=1)
    page = page_of(admin_client, REQUEST, row)
    for words in ("In the ledger", "msg_2.0", "spent on all its answers $0.80", "of it useful $0.55",
                  "a difference that became known later"):  # fmt: skip
        assert words in page.text, words
    assert_inert(page)
    alone = page_of(admin_client, REQUEST, completed())
    assert "spent on all its answers" not in alone.text


def test_the_list_of_requests_says_what_the_page_cost(admin_client: Client) -> None:
    billed(completed(), "0.5")
    row = completed(cost=Decimal("0.25"))
    billed(row, "0.25", answer="a")
    billed(row, "0.25", answer="b", is_useful=False)
    billed(completed(cost=None), None)
    page = page_of(admin_client, REQUESTS)
    assert "On this page: $1.00 + 1 unpriced spent, of it useful $0.75" in page.text
    assert "1,234 → 5 $0.50 spent" in page.text
    assert reverse(SPEND) in page.values("a", "href")


def test_a_batch_costs_what_the_ledger_says(admin_client: Client) -> None:
    batch = Batch.objects.create(name="nightly")
    row = completed(batch=batch)
    billed(row, "0.5", answer="a")
    billed(row, "0.25", answer="b", is_useful=False)
    billed(failed(batch=batch), None)
    for page in (page_of(admin_client, BATCHES), page_of(admin_client, BATCH, batch)):
        assert "$0.75 + 1 unpriced" in page.text
    assert "of it useful $0.50" in page.text


class ArticleAdmin(CostColumn, admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ("title",)


def test_any_admin_shows_what_requests_about_its_objects_cost() -> None:
    articles = [Article.objects.create(title=title, body="…") for title in ("one", "two", "three")]
    billed(completed(about=articles[0]), "0.5")
    billed(completed(about=articles[0]), "0.25")
    billed(completed(about=articles[1]), None)
    request = RequestFactory().get("/")
    request.user = User.objects.create_superuser("ada")
    site = ArticleAdmin(Article, admin.AdminSite())
    with CaptureQueriesContext(connection) as queries:
        changelist = site.get_changelist_instance(request)
        shown = {row.title: str(site.llm_cost(row)) for row in changelist.result_list}
    ledger = [q["sql"] for q in queries if "django_qstash_llm_ledgerentry" in q["sql"]]
    assert len(ledger) == 1
    assert "$0.75" in shown["one"]
    assert "unpriced" in shown["two"]
    assert shown["three"] == "–"
    assert site.get_list_display(request) == ("title", "llm_cost")
    assert "$0.75" in str(site.llm_cost(articles[0]))  # on its own page


def test_a_template_says_what_an_instance_cost() -> None:
    def said(instance: Any) -> str:
        template = Template("{% load llm %}{% llm_cost thing %}")
        return template.render(Context({"thing": instance}))

    article = Article.objects.create(title="<b>", body="…")
    assert said(article) == "–"
    assert (said(None), said(Article())) == ("–", "–")
    billed(completed(about=article), None)
    assert said(article) == "unpriced"
    billed(completed(about=article), "0.0123")
    assert said(article) == "$0.0123 + 1 unpriced"


# --- health ---------------------------------------------------------------------------------------


def test_health_tells_of_budgets_and_of_what_is_not_added_up(admin_client: Client) -> None:
    Budget.objects.create(name="house", amount=2, thresholds=[10, 50])
    Budget.objects.create(name="other", amount=200, thresholds=[50])
    spend("1.5", at=NOW)
    settle()
    health = Health.read()
    assert health.budgets == (
        "50 % of the budget “house” ($2.00 a month) are spent: $1.50 of $2.00.",
    )
    assert health.budgets[0] in health.remarks
    assert health.is_ok
    assert health.oldest_unsettled is None
    assert Health.read(now=NOW + timedelta(days=40)).budgets == ()
    billed(completed())
    late = Health.read(now=NOW + timedelta(minutes=10))
    assert "has waited 600 s to be added up" in " ".join(late.remarks)
    assert "house" in page_of(admin_client, HEALTH).text
    Budget.objects.filter(name="house").update(amount=100)
    assert Health.read().budgets == ()


def test_the_doctor_warns_where_a_budget_refuses_what_is_asked_by_default(settings: Any) -> None:
    def money() -> list[tuple[str, str]]:
        return [(each.level, each.sentence) for each in Doctor().money()]

    assert money() == []
    Budget.objects.create(name="house", amount=2)
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"DEFAULT_MODEL": "nobody-knows-it"}
    [(level, sentence)] = money()
    assert level == Level.WARNING
    assert "No price is known for openai/nobody-knows-it" in sentence
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"BUDGETS_ALLOW_UNPRICED": True}
    [(level, sentence)] = money()
    assert (level, "“house” let pass" in sentence) == (Level.WARNING, True)
    settings.QSTASH_LLM = settings.QSTASH_LLM | {
        "BUDGETS_ALLOW_UNPRICED": False,
        "PRICES": {"openai/nobody-knows-it": {"input": "1", "output": "1"}},
    }
    assert money() == [(Level.OK, "“house” can hold what is asked by default.")]


def test_nothing_of_money_is_in_the_way_of_an_empty_site(admin_client: Client) -> None:
    for name in (BUDGETS, LEDGER, SPEND, REQUESTS, BATCHES, HEALTH):
        assert_inert(page_of(admin_client, name))
    assert not CallbackResponse.objects.exists()
    assert not Spend.objects.exists()
