"""Health: the figures over our rows, the page for monitors and the one in the admin."""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import Permission, User
from django.db import OperationalError, connection
from django.test import Client, RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.health import Health, Pulse, capped
from django_qstash_llm.models import CallbackResponse, Circuit, LLMRequest
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.circuit import QSTASH
from django_qstash_llm.views import health

pytestmark = pytest.mark.django_db

NOW = timezone.now()
TOKEN = "health-token-of-the-tests-0001"
MESSAGES = [{"role": "user", "content": "?"}]
URL = "/llm/health/"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def rows(count: int = 1, **fields: Any) -> list[LLMRequest]:
    asked = {"messages": MESSAGES, "provider": "openai", "model": "m", "created_at": NOW}
    # No save: nobody is to be rung.
    return LLMRequest.objects.bulk_create([LLMRequest(**asked | fields) for _ in range(count)])


def receipts(count: int = 1, **fields: Any) -> list[CallbackResponse]:
    told = {"kind": Kind.CALLBACK, "status": 200, "received_at": NOW, "applied_at": NOW}
    return CallbackResponse.objects.bulk_create(
        CallbackResponse(
            uuid=uuids.uuid4(), source_message_id=f"msg_{uuids.uuid4().hex}", **told | fields
        )
        for _ in range(count)
    )


def finished(**fields: Any) -> LLMRequest:
    done = {"state": "completed", "finished_at": NOW, "announced_at": NOW, "cost": 1}
    return rows(**done | fields)[0]


def read() -> Health:
    return Health.read(now=NOW)


# --- figures -------------------------------------------------------------------------------------


def test_an_empty_database_is_healthy() -> None:
    assert read() == Health(at=NOW, late_after=120.0)
    assert (read().is_ok, read().problems, read().remarks) == (True, [], [])


def test_what_moves_is_healthy() -> None:
    rows(3, created_at=ago(60))
    rows(2, state="submitted", submitted_at=ago(600), deadline_at=NOW + timedelta(seconds=300))
    finished()
    health = read()
    assert (health.oldest_due, health.pending, health.submitted) == (60.0, 3, 2)
    assert health.is_ok
    assert health.remarks == []


def test_a_due_request_that_waits_is_a_problem() -> None:
    rows(created_at=ago(340))
    rows(created_at=ago(10))
    (problem,) = read().problems
    assert problem.startswith("The oldest due request has waited 340 s: is a worker running?")
    assert "llm_sweep" in problem


@pytest.mark.parametrize(
    "fields",
    [
        {"submit_after": NOW + timedelta(seconds=5)},
        {"claimed_until": NOW + timedelta(seconds=5)},
        {"submit_after": ago(100)},
        {"claimed_until": ago(100)},
    ],
)
def test_a_request_waits_from_when_it_was_due(fields: dict[str, Any]) -> None:
    rows(created_at=ago(900), **fields)
    assert read().is_ok
    assert read().oldest_due in {None, 100.0}


def test_a_request_past_its_deadline_that_nobody_asked_about_is_a_problem() -> None:
    rows(2, state="submitted", deadline_at=ago(60))
    assert (read().overdue, read().oldest_overdue, read().is_ok) == (2, 60.0, True)
    rows(state="submitted", deadline_at=ago(700))
    (problem,) = read().problems
    assert "past its deadline for 700 s" in problem
    assert "beat" in problem


def test_an_end_that_is_not_announced_is_a_problem() -> None:
    finished(announced_at=None, finished_at=ago(500))
    (problem,) = read().problems
    assert "waited 500 s for its trigger" in problem


def test_an_end_whose_receiver_failed_waits_from_its_next_try() -> None:
    trouble = {"announced_at": None, "finished_at": ago(500), "announce_tries": 2}
    finished(**trouble, announce_after=ago(20))
    assert (read().oldest_unannounced, read().is_ok) == (20.0, True)


def test_a_circuit_that_has_just_opened_is_told_and_no_problem() -> None:
    until = NOW + timedelta(seconds=30)
    Circuit.objects.trip(QSTASH, "daily limit", now=ago(5), until=until)
    health = read()
    assert (health.circuit_reason, health.circuit_until) == ("daily limit", until)
    assert health.is_ok
    (remark,) = health.remarks
    assert remark == health.notice
    assert "daily limit" in remark
    assert until.isoformat(" ", "seconds") in remark


def test_a_circuit_that_stays_open_is_a_problem() -> None:
    Circuit.objects.trip(QSTASH, "daily limit", now=ago(500), until=NOW + timedelta(hours=3))
    health = read()
    (problem,) = health.problems
    assert "daily limit" in problem
    assert (health.notice, health.remarks) == ("", [])


def test_while_the_circuit_is_open_nobody_is_asked_whether_a_worker_runs() -> None:
    rows(created_at=ago(900))
    until = NOW + timedelta(hours=3)
    Circuit.objects.trip(QSTASH, "daily limit", now=ago(800), until=until)
    (problem,) = read().problems
    assert "daily limit" in problem
    assert until.isoformat(" ", "seconds") in problem
    assert read().oldest_due == 900.0


def test_once_the_circuits_time_has_come_it_is_for_a_worker_to_find_out() -> None:
    rows(created_at=ago(9000))
    Circuit.objects.trip(QSTASH, "daily limit", now=ago(8000), until=ago(60))
    (problem,) = read().problems
    assert "daily limit" in problem
    Circuit.objects.update(open_until=ago(340))
    worker, circuit = read().problems
    assert worker.startswith("The oldest due request has waited 340 s: is a worker running?")
    assert circuit == problem.replace(str(ago(60))[:19], str(ago(340))[:19])


def test_a_circuit_about_which_there_was_nothing_to_find_out_is_no_problem() -> None:
    Circuit.objects.trip(QSTASH, "no answer", now=ago(90_000), until=ago(89_998))
    health = read()
    assert (health.problems, health.notice, health.remarks) == ([], "", [])
    rows()
    (problem,) = read().problems
    assert "no answer" in problem


def test_a_closed_circuit_is_not_told() -> None:
    Circuit.objects.trip(QSTASH, "daily limit", now=ago(500))
    Circuit.objects.close(QSTASH)
    assert read() == Health(at=NOW, late_after=120.0)


@override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "HEALTH_LATE": 30})
def test_how_late_is_late_is_a_setting() -> None:
    rows(created_at=ago(31))
    assert not read().is_ok


def what_to_look_at() -> None:
    llm_request = finished(cost=None)
    finished(announced_at=None, finished_at=ago(900), announce_tries=5)
    receipts(2, kind=Kind.QUARANTINED, applied_at=None, llm_request=llm_request)
    # One that was read again since is done with.
    receipts(kind=Kind.QUARANTINED, applied_at=NOW, llm_request=llm_request)
    receipts(3, applied_at=None, apply_tries=10, llm_request=llm_request)
    receipts(4)
    # The doctor's own.
    receipts(kind=Kind.PING, applied_at=None)
    receipts(5, verified_by_next_key=True, llm_request=llm_request)
    receipts(verified_by_next_key=True, received_at=ago(90_000), llm_request=llm_request)


def test_what_a_person_should_look_at_is_counted_and_is_no_reason_to_be_late() -> None:
    what_to_look_at()
    health = read()
    assert health.counts == {
        "pending": 0,
        "submitted": 0,
        "overdue": 0,
        "quarantined": 2,
        "unread": 3,
        "orphaned": 4,
        "given_up": 1,
        "unpriced": 1,
        "by_next_key": 5,
    }
    assert health.is_ok
    told = " ".join(health.remarks)
    assert len(health.remarks) == 6
    for words in (
        "2 signed callbacks could not be read",
        "3 stored callbacks broke",
        "1 finished requests were not announced",
        "4 callbacks belong to no request",
        "1 answers have no price",
        "5 callbacks of the last 24 hours were signed with the next key",
    ):
        assert words in told


def test_counts_end_at_a_thousand() -> None:
    rows(1005)
    assert read().pending == 1001
    assert (capped(1001), capped(1000), capped(0)) == ("1000+", "1000", "0")


def test_the_number_of_queries_is_constant() -> None:
    with CaptureQueriesContext(connection) as few:
        read()
    rows(30, created_at=ago(900))
    rows(30, queue="q", created_at=ago(900))
    rows(30, state="submitted", deadline_at=ago(900))
    what_to_look_at()
    with CaptureQueriesContext(connection) as many:
        read()
    assert (len(few), len(many)) == (17, 17)
    with CaptureQueriesContext(connection) as pulse:
        Pulse.read(now=NOW)
    assert len(pulse) == 5


def plans() -> Iterator[tuple[str, str]]:
    """Each statement of ``Health`` that looks into a large table, with the database's plan for it."""
    explain = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN"}[connection.vendor]
    with CaptureQueriesContext(connection) as queries:
        read()
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # As for a table in which reading all would be the worst.
            cursor.execute("SET LOCAL enable_seqscan = off")
        for query in queries:
            if not re.search("_circuit|_budget", query["sql"]):
                cursor.execute(f"{explain} {query['sql']}")
                yield query["sql"], "\n".join(str(row[-1]) for row in cursor.fetchall())


@pytest.mark.parametrize("is_analysed", [False, True])
def test_no_large_table_is_read_through(is_analysed: bool) -> None:
    what_to_look_at()
    rows(50)
    rows(50, state="submitted", deadline_at=NOW)
    # Mostly, things are done: an index that holds these is as good as none.
    rows(500, state="completed", finished_at=NOW, announced_at=NOW, cost=1)
    receipts(500, llm_request=finished())
    if is_analysed:
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
    unannounced: tuple[str, ...] = ("llm_request_unannounced",)
    if connection.vendor == "sqlite" and not is_analysed:
        # It guesses that no state has more than ten.
        unannounced = ("llm_request_unannounced", "llm_request_state")
    few = [
        ("llm_lane_paused",),
        ("llm_request_pending", "llm_request_state"),
        unannounced,
        ("llm_request_deadline", "llm_request_state"),
        ("llm_request_pending", "llm_request_state"),
        ("llm_request_deadline", "llm_request_state"),
        ("llm_request_deadline", "llm_request_state"),
        ("callback_response_quarantine",),
        ("callback_response_unapplied",),
        ("callback_response_orphaned", "django_qstash_llm_callbackresponse_llm_request_id"),
        unannounced,
        ("llm_request_unpriced",),
        ("callback_response_next_key",),
        ("llm_ledger_unfolded",),
        ("llm_lane_paused",),
    ]
    for (sql, plan), indexes in zip(plans(), few, strict=True):
        reads = re.findall(
            "^.*(?:SEARCH|SCAN (?!subquery)|Seq Scan|Index Scan|Index Only Scan).*$", plan, re.M
        )
        assert reads, plan
        for line in reads:
            assert any(f" {index}" in line for index in indexes), f"{sql}\n{plan}"


# --- the page for monitors -------------------------------------------------------------------------

WITH_TOKEN = override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "HEALTH_TOKEN": TOKEN})


def late() -> None:
    rows(created_at=timezone.now() - timedelta(seconds=340))


def test_anybody_is_told_that_it_is_well_and_no_more(client: Client) -> None:
    what_to_look_at()
    response = client.get(URL)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert "no-store" in response["Cache-Control"]
    assert response["Content-Type"] == "application/json"


def test_anybody_is_told_that_it_is_late_and_no_more(client: Client) -> None:
    late()
    response = client.get(URL)
    assert (response.status_code, response.json()) == (503, {"status": "late"})
    assert "no-store" in response["Cache-Control"]


def test_head_is_answered_without_a_body(client: Client) -> None:
    late()
    response = client.head(URL)
    assert (response.status_code, response.content) == (503, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(client: Client, method: str) -> None:
    assert client.generic(method, URL).status_code == 405


@WITH_TOKEN
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_who_shows_the_token_sees_the_figures(client: Client, scheme: str) -> None:
    late()
    what_to_look_at()
    response = client.get(URL, headers={"Authorization": f"{scheme} {TOKEN}"})
    assert response.status_code == 503
    told = response.json()
    assert told["status"] == "late"
    assert "is a worker running?" in told["problems"][0]
    assert len(told["remarks"]) == 6
    figures = told["figures"]
    assert (figures["pending"], figures["quarantined"], figures["by_next_key"]) == (1, 2, 5)
    assert figures["oldest_due"] >= 340
    assert TOKEN not in response.content.decode()


@WITH_TOKEN
@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é", TOKEN],
)
def test_another_token_shows_no_figures(client: Client, shown: str) -> None:
    response = client.get(URL, headers={"Authorization": shown})
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("token", ["", "short", "x" * 15])
def test_a_token_too_short_to_be_one_opens_nothing(client: Client, token: str) -> None:
    with override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "HEALTH_TOKEN": token}):
        response = client.get(URL, headers={"Authorization": f"Bearer {token}"})
    assert response.json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("fields", "permissions", "sees"),
    [
        ({"is_staff": True}, ["view_llmrequest"], True),
        ({"is_superuser": True, "is_staff": True}, [], True),
        ({"is_staff": True}, [], False),
        ({"is_staff": False}, ["view_llmrequest"], False),
        ({"is_staff": True}, ["view_batch"], False),
    ],
)
def test_of_the_logged_in_only_the_staff_that_may_see_requests_sees_figures(
    client: Client, fields: dict[str, Any], permissions: list[str], sees: bool
) -> None:
    user = User.objects.create(username="somebody", **fields)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    assert ("figures" in client.get(URL).json()) is sees


class Visitor(AbstractBaseUser):
    """What a user model has to know, and no more: nothing of staff or permissions."""

    class Meta:
        app_label = "tests"
        managed = False


@pytest.mark.parametrize("knows", [{}, {"is_staff": True}])
def test_a_user_that_knows_no_permissions_sees_no_figures(
    rf: RequestFactory, knows: dict[str, Any]
) -> None:
    request = rf.get(URL)
    request.user = user = Visitor()
    vars(user).update(knows)
    assert health(request).data == {"status": "ok"}


def down(*args: Any) -> Any:
    raise OperationalError("password of canary is wrong")


@WITH_TOKEN
@pytest.mark.parametrize("shown", ["", f"Bearer {TOKEN}"])
def test_a_database_that_is_down_is_told_as_such(client: Client, shown: str) -> None:
    with connection.execute_wrapper(down):
        response = client.get(URL, headers={"Authorization": shown})
    assert (response.status_code, response.json()) == (503, {"status": "database unavailable"})
    assert "no-store" in response["Cache-Control"]


def test_a_database_that_is_down_is_told_to_the_staff_as_well(admin_client: Client) -> None:
    # Django 5.2's own asks the database who it is, before any view is reached.
    required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    others = [name for name in settings.MIDDLEWARE if name != required]
    with override_settings(MIDDLEWARE=others), connection.execute_wrapper(down):
        response = admin_client.get(URL)
    assert (response.status_code, response.json()) == (503, {"status": "database unavailable"})


def test_anybody_costs_few_queries(client: Client) -> None:
    with CaptureQueriesContext(connection) as queries:
        client.get(URL)
    assert len(queries) == 5


def test_a_site_without_sessions_has_a_health_page(client: Client) -> None:
    sessions = {
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.auth.middleware.LoginRequiredMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    }
    bare = [name for name in settings.MIDDLEWARE if name not in sessions]
    with override_settings(MIDDLEWARE=bare):
        assert client.get(URL).json() == {"status": "ok"}


@override_settings(MIDDLEWARE=[], REST_FRAMEWORK={"UNAUTHENTICATED_USER": None})
def test_a_site_without_users_has_a_health_page(client: Client) -> None:
    assert client.get(URL).json() == {"status": "ok"}


@override_settings(USE_TZ=False, TIME_ZONE="America/New_York")
def test_a_site_in_local_time_has_a_health_page(admin_client: Client) -> None:
    now = timezone.now()
    rows(created_at=now - timedelta(seconds=340))
    Circuit.objects.trip(QSTASH, "away", now=now)
    told = admin_client.get(URL).json()
    assert told["status"] == "late"
    assert 340 <= told["figures"]["oldest_due"] < 400


# --- the page in the admin -------------------------------------------------------------------------

REQUESTS = "admin:django_qstash_llm_llmrequest_changelist"
PAGE = "admin:django_qstash_llm_llmrequest_health"


def page(client: Client, name: str) -> str:
    response = client.get(reverse(name))
    assert response.status_code == 200
    return str(response.content.decode())


def test_the_list_of_requests_leads_to_the_health_page(admin_client: Client) -> None:
    assert f'href="{reverse(PAGE)}"' in page(admin_client, REQUESTS)


def test_the_list_of_requests_says_what_does_not_move(admin_client: Client) -> None:
    assert "messagelist" not in page(admin_client, REQUESTS)
    late()
    assert "is a worker running?" in page(admin_client, REQUESTS)


def test_the_list_of_requests_says_that_qstash_takes_nothing(admin_client: Client) -> None:
    Circuit.objects.trip(QSTASH, "the <b>daily</b> limit", now=timezone.now())
    html = page(admin_client, REQUESTS)
    assert "the &lt;b&gt;daily&lt;/b&gt; limit" in html


def test_the_health_page_shows_problems_remarks_and_counts(admin_client: Client) -> None:
    html = page(admin_client, PAGE)
    assert "All that is due is being done." in html
    late()
    rows(1005)
    what_to_look_at()
    html = page(admin_client, PAGE)
    assert "All that is due is being done." not in html
    assert "is a worker running?" in html
    assert "2 signed callbacks could not be read" in html
    assert "1000+" in html
    assert "5 min" in html


def test_every_list_that_the_health_page_leads_to_is_there(admin_client: Client) -> None:
    late()
    what_to_look_at()
    rows(state="submitted", deadline_at=ago(900))
    html = page(admin_client, PAGE)
    links = [part.split('"')[0] for part in html.split('<td class="llm-figure"><a href="')[1:]]
    assert len(links) == 8
    for link in links:
        response = admin_client.get(link.replace("&amp;", "&"))
        assert response.status_code == 200, link
        assert response.context["cl"].result_count, link


def test_the_health_page_has_nothing_that_a_strict_policy_forbids(admin_client: Client) -> None:
    late()
    what_to_look_at()
    html = page(admin_client, PAGE)
    main = html.partition('<div id="content"')[2].partition("<footer")[0]
    assert main
    for forbidden in ("<script", "<style", "style=", "onclick"):
        assert forbidden not in main


def test_the_health_page_is_for_those_who_may_see_requests(
    client: Client, post_callback: Callable[..., Any]
) -> None:
    assert client.get(reverse(PAGE)).status_code == 302
    user = User.objects.create(username="staff", is_staff=True)
    client.force_login(user)
    assert client.get(reverse(PAGE)).status_code == 403
    user.user_permissions.set(Permission.objects.filter(codename="view_llmrequest"))
    assert client.get(reverse(PAGE)).status_code == 200
