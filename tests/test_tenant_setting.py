"""``TENANT``: the tenant of a request that names none, whichever way it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.test import Client

from django_qstash_llm.checks import check_settings
from django_qstash_llm.conf import AppSettings, app_settings
from django_qstash_llm.exceptions import ConfigurationError, InvalidRequest
from django_qstash_llm.models import ApiKey, Batch, Budget, Conversation, LLMRequest
from django_qstash_llm.models.outbox import Outbox
from testproject.articles.models import Article

from .conftest import ANSWER
from .wire import FakeQStash, Wire

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]


def of_user_or_article(llm_request: LLMRequest) -> str | None:
    if llm_request.user is not None:
        return f"user {llm_request.user.username}"
    return f"article {llm_request.about.title}" if llm_request.about else None


@pytest.fixture
def tenant(settings: Any) -> Callable[[Any], None]:
    def give(value: Any) -> None:
        settings.QSTASH_LLM = settings.QSTASH_LLM | {"TENANT": value}

    give("tests.test_tenant_setting.of_user_or_article")
    return give


@pytest.fixture
def ada() -> User:
    user: User = User.objects.create_user("ada")
    return user


@pytest.mark.usefixtures("tenant")
def test_it_is_filled_in_on_every_way_in(qstash: FakeQStash, wire: Wire, ada: User) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(200, json=ANSWER)
    article = Article.objects.create(title="On tides", body="…", summary="…")
    requests = LLMRequest.objects

    async def ask() -> LLMRequest:
        return await requests.apublish(MESSAGES, user=ada)

    asked = [
        requests.publish(MESSAGES, user=ada),
        requests.enqueue(MESSAGES, queue="q", user=ada),
        requests.chat(MESSAGES, user=ada),
        async_to_sync(ask)(),
        Conversation.objects.create(user=ada).ask("?"),
        Batch.objects.submit([{"messages": MESSAGES}], user=ada).llm_requests.get(),
        Batch.objects.submit([{"messages": MESSAGES, "user": ada}]).llm_requests.get(),
        LLMRequest.objects.create(messages=MESSAGES, user=ada),
    ]
    assert [row.tenant for row in asked] == ["user ada"] * len(asked)
    assert requests.publish(MESSAGES, about=article).tenant == "article On tides"
    assert requests.publish(MESSAGES).tenant == ""
    assert requests.publish(MESSAGES, user=ada, tenant="acme").tenant == "acme"
    assert asked[0].tenant == requests.get(pk=asked[0].pk).tenant


@pytest.mark.usefixtures("tenant", "qstash")
def test_rows_that_save_has_not_seen_have_it_before_their_budget_is_asked(ada: User) -> None:
    Budget.objects.create(name="ada's", amount=0, scope="tenant", value="user ada")
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES, user=ada)])
    Outbox().submit()
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code) == ("failed", "budget_exceeded")
    Budget.objects.all().delete()
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES, user=ada)])
    Outbox().submit()
    assert LLMRequest.objects.get(state="submitted").tenant == "user ada"


@pytest.mark.usefixtures("tenant")
def test_at_the_endpoint_an_api_keys_own_tenant_wins(client: Client, wire: Wire, ada: User) -> None:
    wire.hosts["provider.test"] = lambda request: httpx.Response(200, json=ANSWER)
    for name, own, expected in (("a", "globex", "globex"), ("b", "", "user ada")):
        _, key = ApiKey.objects.issue(name, user=ada, tenant=own)
        body = json.dumps({"model": "gpt-5.4-mini", "messages": MESSAGES})
        headers = {"Authorization": f"Bearer {key}"}
        response = client.post(
            "/openai/v1/chat/completions", body, "application/json", headers=headers
        )
        assert response.status_code == 200
        assert LLMRequest.objects.latest("pk").tenant == expected


def raises(llm_request: LLMRequest) -> str:
    raise KeyError("sk-canary-0123456789")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no.such.function", "there is no such thing"),
        ("tests.test_tenant_setting.MESSAGES", "give a function of an LLMRequest"),
        (5, "give a function of an LLMRequest"),
        (raises, "['TENANT'], raises, raised KeyError when it was asked"),
        (lambda llm_request: 5, "answered a int; give a text of at most 255 characters, or None"),
        (lambda llm_request: "x" * 256, "give a text of at most 255 characters"),
    ],
    ids=["missing", "no function", "number", "raises", "no text", "too long"],
)
def test_what_is_wrong_with_it_is_said_and_nothing_is_asked(
    tenant: Callable[[Any], None], qstash: FakeQStash, value: Any, words: str
) -> None:
    tenant(value)
    with pytest.raises(ConfigurationError) as wrong:
        LLMRequest.objects.publish(MESSAGES)
    assert words in str(wrong.value)
    assert "QSTASH_LLM['TENANT']" in str(wrong.value)
    assert "canary" not in str(wrong.value)
    assert not LLMRequest.objects.exists()
    assert LLMRequest.objects.publish(MESSAGES, tenant="acme").tenant == "acme"


@pytest.mark.usefixtures("tenant", "qstash")
def test_a_tenant_of_another_type_is_still_refused() -> None:
    with pytest.raises(InvalidRequest, match="tenant: give a text"):
        LLMRequest.objects.publish(MESSAGES, tenant=None)


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"TENANT": "no.such.function"}, ["E012"]),
        ({"TENANT": 5}, ["E012"]),
        ({"TENANT": "tests.test_tenant_setting.raises"}, []),
        ({"QSTASH_MESSAGE_PRICE": "much"}, ["E007"]),
        ({"QSTASH_MESSAGE_PRICE": "-1"}, ["E007"]),
        ({"QSTASH_MESSAGE_PRICE": 0.5}, ["E007"]),
        ({"QSTASH_MESSAGE_PRICE": ""}, []),
        ({"BUDGETS_ALLOW_UNPRICED": "no"}, ["E007"]),
    ],
    ids=["missing", "number", "function", "words", "negative", "no text", "unknown", "no bool"],
)
def test_the_settings_of_money_are_checked(
    settings: Any, change: dict[str, Any], ids: list[str]
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | change
    found = [each.id for each in check_settings(None) if next(iter(change)) in each.msg]
    assert found == [f"django_qstash_llm.{each}" for each in ids]


def test_by_default_there_is_no_tenant_and_a_message_costs_what_upstash_asks() -> None:
    assert app_settings().tenant_of(LLMRequest()) == ""
    assert 100_000 * (AppSettings().message_price or 0) == 1
