"""What staff read of requests and attempts as JSON. Whatever is asked, the answer is JSON."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.db import OperationalError, connection
from django.test import Client
from django.urls import reverse

from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.qstash import Callback

from .wire import FakeQStash

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BODY = b'{"error": {"message": "Pay first", "code": "insufficient_quota"}}'


@pytest.fixture
def llm_request(qstash: FakeQStash) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish(
        [{"role": "user", "content": "the prompt"}], temperature=0.5, tenant="acme"
    )
    return row


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


def url(llm_request: LLMRequest | None = None, *, of: str = "request") -> str:
    uuid = llm_request.uuid if llm_request else uuid4()
    return reverse(f"django_qstash_llm:{of}", args=[uuid])


def receive(llm_request: LLMRequest, callback: Callback) -> None:
    CallbackResponse.objects.receive(callback, uuid=llm_request.uuid, now=NOW)


def test_a_request_is_told_whole(admin_client: Client, llm_request: LLMRequest) -> None:
    LLMRequest.objects.update(cost=Decimal("0.000123456789"))
    response = admin_client.get(url(llm_request))
    assert response["Content-Type"] == "application/json"
    assert "no-store" in response["Cache-Control"]
    told = response.json()
    expected = {
        "uuid": str(llm_request.uuid),
        "state": "pending",
        "tenant": "acme",
        "messages": [{"role": "user", "content": "the prompt"}],
        "parameters": {"temperature": 0.5},
        "cost": "0.000123456789",
        "input_tokens": None,
        "finished_at": None,
    }
    assert {name: told[name] for name in expected} == expected


def test_its_attempts_are_told_in_order_each_with_its_sentence(
    admin_client: Client, llm_request: LLMRequest
) -> None:
    receive(
        llm_request,
        Callback(status=429, source_message_id="m", max_retries=2, header={"Retry-After": ["20"]}),
    )
    receive(llm_request, Callback(status=402, body=BODY, source_message_id="m", retried=1))
    first, second = admin_client.get(url(llm_request, of="attempts")).json()["attempts"]
    expected = {
        "attempt": 1,
        "status": 429,
        "trouble": "rate",
        "wait": 20.0,
        "wait_source": "retry-after",
        "next_try_at": "2026-03-01T12:00:20Z",
        "delayed_by": "provider",
        "received_at": "2026-03-01T12:00:00Z",
    }
    assert {name: first[name] for name in expected} == expected
    assert first["sentence"].startswith("429 rate: retry-after 20s; next try 2026-03-01 ")
    assert (second["attempt"], second["words"]) == (2, "Pay first")
    assert second["sentence"].startswith("402 money: Pay first")
    assert not {"body", "header"} & set(first)


@pytest.mark.parametrize("kept", ["hashed", "none"])
def test_messages_are_not_told_where_they_are_not_stored(
    admin_client: Client, llm_request: LLMRequest, settings: Any, kept: str
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"STORE_MESSAGES": kept}
    response = admin_client.get(url(llm_request))
    assert b"the prompt" not in response.content
    assert not {"messages", "parameters"} & set(response.json())


@pytest.mark.parametrize("of", ["request", "attempts"])
def test_strangers_are_refused_in_json(client: Client, llm_request: LLMRequest, of: str) -> None:
    response = client.get(url(llm_request, of=of))
    assert (response.status_code, response["Content-Type"]) == (403, "application/json")
    assert set(response.json()) == {"detail"}


@pytest.mark.parametrize(
    ("codenames", "fields", "statuses"),
    [
        (["view_llmrequest"], {}, (200, 403)),
        (["view_callbackresponse"], {}, (403, 200)),
        ([], {}, (403, 403)),
        (["view_llmrequest", "view_callbackresponse"], {"is_staff": False}, (403, 403)),
    ],
)
def test_each_needs_the_permission_to_view_what_it_tells(
    staff: Callable[..., Client],
    llm_request: LLMRequest,
    codenames: list[str],
    fields: dict[str, Any],
    statuses: tuple[int, int],
) -> None:
    client = staff(*codenames, **fields)
    answers = [client.get(url(llm_request, of=of)) for of in ("request", "attempts")]
    assert tuple(answer.status_code for answer in answers) == statuses


@pytest.mark.parametrize("of", ["request", "attempts"])
def test_what_is_not_there_is_404_in_json(admin_client: Client, of: str) -> None:
    response = admin_client.get(url(of=of))
    assert (response.status_code, response["Content-Type"]) == (404, "application/json")
    assert "There is no LLM request" in response.json()["detail"]


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete", "options"])
def test_nothing_can_be_changed(admin_client: Client, llm_request: LLMRequest, method: str) -> None:
    response = getattr(admin_client, method)(url(llm_request))
    assert (response.status_code, response["Content-Type"]) == (405, "application/json")


def test_the_host_sites_defaults_mean_nothing(
    admin_client: Client, llm_request: LLMRequest, settings: Any
) -> None:
    settings.REST_FRAMEWORK = {
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAdminUser"],
        "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.BrowsableAPIRenderer"],
        "DEFAULT_AUTHENTICATION_CLASSES": [],
        "DATETIME_FORMAT": "%d",
        "COERCE_DECIMAL_TO_STRING": False,
    }
    LLMRequest.objects.update(cost=1)
    response = admin_client.get(url(llm_request), headers={"Accept": "text/html"})
    assert response["Content-Type"] == "application/json"
    told = response.json()
    assert told["cost"] == "1.000000000000"
    assert told["created_at"].startswith("20")


def test_a_database_that_is_down_is_said_in_json(
    admin_client: Client, llm_request: LLMRequest
) -> None:
    def down(execute: Any, sql: str, *args: Any) -> Any:
        if "llmrequest" in sql:
            raise OperationalError("secret host is down")
        return execute(sql, *args)

    with connection.execute_wrapper(down):
        response = admin_client.get(url(llm_request))
    assert (response.status_code, response.json()) == (503, {"detail": "database unavailable"})


def test_attempts_take_as_many_queries_for_many_as_for_few(
    admin_client: Client, llm_request: LLMRequest, django_assert_num_queries: Any
) -> None:
    for number in range(10):
        receive(llm_request, Callback(status=500, source_message_id=f"m{number}", retried=number))
    # Session, user, request, attempts.
    with django_assert_num_queries(4):
        admin_client.get(url(llm_request, of="attempts"))
