from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import current_app
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Tags, run_checks
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import include, path

from django_qstash_llm.checks import (
    PUBLIC_KEYS,
    SQLITE_OPTIONS,
    check_celery,
    check_settings,
    check_sqlite,
)

GOOD = {
    **django_settings.QSTASH_LLM,
    "CALLBACK_BASE_URL": "https://example.com/llm",
}
OWN_KEYS = {
    "QSTASH_CURRENT_SIGNING_KEY": "sig_ourOwnKeyThatNobodyKnows",
    "QSTASH_NEXT_SIGNING_KEY": "sig_ourNextKeyThatNobodyKnows",
}


def elsewhere(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


urlpatterns = [
    path("llm/", include("django_qstash_llm.urls")),
    path("wrong/callback/<uuid:uuid>/", elsewhere),
]


@pytest.fixture(autouse=True)
def _right_settings() -> Iterator[None]:
    with override_settings(QSTASH_LLM=GOOD, ROOT_URLCONF=__name__, DEBUG=False, **OWN_KEYS):
        yield


def ids(problems: list[CheckMessage]) -> list[str]:
    return [str(problem.id).removeprefix("django_qstash_llm.") for problem in problems]


def found(**changed: Any) -> list[CheckMessage]:
    with override_settings(**changed):
        return list(check_settings(None))


def in_ours(**changed: Any) -> list[CheckMessage]:
    return found(QSTASH_LLM=GOOD | changed)


def test_nothing_is_said_when_all_is_right() -> None:
    assert found() == []
    assert check_celery(None) == [] or ids(check_celery(None)) == ["W005"]


def test_checks_run_with_djangos_own() -> None:
    with override_settings(QSTASH_TOKEN=""):
        assert "E001" in ids(run_checks(tags=[Tags.compatibility]))


@pytest.mark.parametrize(
    ("changed", "id", "said", "hint"),
    [
        ({"QSTASH_TOKEN": ""}, "E001", "QSTASH_TOKEN is not set", "qstash_server"),
        ({"QSTASH_TOKEN": None}, "E001", "QSTASH_TOKEN", "qstash_server"),
        ({"QSTASH_TOKEN": "  "}, "E001", "QSTASH_TOKEN", "qstash_server"),
        (
            {"QSTASH_CURRENT_SIGNING_KEY": ""},
            "E002",
            "QSTASH_CURRENT_SIGNING_KEY is not set",
            "both signing keys",
        ),
        (
            {"QSTASH_CURRENT_SIGNING_KEY": "None"},
            "E002",
            "QSTASH_CURRENT_SIGNING_KEY is too short",
            "both",
        ),
        ({"QSTASH_NEXT_SIGNING_KEY": "x"}, "E002", "QSTASH_NEXT_SIGNING_KEY is too short", "both"),
        ({"QSTASH_LLM": {}}, "E003", "CALLBACK_BASE_URL", "django_qstash_llm.urls"),
        ({"QSTASH_LLM": None}, "E005", "not a dictionary", "QSTASH_LLM = {"),
        ({"QSTASH_LLM": ["x"]}, "E005", "not a dictionary", "QSTASH_LLM = {"),
        (
            {"QSTASH_LLM": GOOD | {"CALBACK_BASE_URL": "x"}},
            "E005",
            "no setting 'CALBACK_BASE_URL'. Did you mean 'CALLBACK_BASE_URL'?",
            "CALLBACK_BASE_URL",
        ),
        (
            {"QSTASH_LLM": GOOD | {"retries": 3}},
            "E005",
            "no setting 'retries'. Did you mean 'RETRIES'?",
            "RETRIES",
        ),
        ({"QSTASH_LLM": GOOD | {"ZZZ": 3}}, "E005", "no setting 'ZZZ'.", "RETRIES"),
        ({"QSTASH_LLM": GOOD | {7: 3}}, "E005", "no setting 7.", "RETRIES"),
    ],
)
def test_problem_is_found_with_its_id_and_a_hint(
    changed: dict[str, Any], id: str, said: str, hint: str
) -> None:
    problem = next(each for each in found(**changed) if str(each.id).endswith(id))
    assert said in problem.msg
    assert hint in str(problem.hint)
    assert problem.is_serious()


@pytest.mark.parametrize("public", sorted(PUBLIC_KEYS))
@pytest.mark.parametrize("name", OWN_KEYS)
def test_public_development_key_is_an_error_outside_debug(name: str, public: str) -> None:
    [problem] = found(**{name: public})
    assert ids([problem]) == ["E008"]
    assert name in problem.msg
    assert public not in problem.msg
    assert found(**{name: public}, DEBUG=True) == []


@pytest.mark.parametrize(
    ("base_url", "id"),
    [
        ("", "E003"),
        ("/llm", "E003"),
        ("example.com/llm", "E003"),
        ("ftp://example.com/llm", "E003"),
        ("https:///llm", "E003"),
        ("https://example.com/llm?a=1", "E003"),
        ("https://example.com/llm#a", "E003"),
        ("https://exämple.com/llm", "E003"),
        ("https://me:password@example.com/llm", "E003"),
        ("http://[bad", "E003"),
        ("https://example.com:port/llm", "E003"),
        ("https://example.com:99999/llm", "E003"),
        ("https://example.com/wrong", "W001"),
        ("https://example.com", "W001"),
        ("http://example.com/llm", "W002"),
    ],
)
def test_callback_base_url_is_looked_at(base_url: str, id: str) -> None:
    [problem] = in_ours(CALLBACK_BASE_URL=base_url)
    assert ids([problem]) == [id]
    assert problem.hint


@pytest.mark.parametrize("base_url", ["https://example.com/llm", "https://example.com/llm/"])
def test_callback_base_url_may_end_in_a_slash(base_url: str) -> None:
    assert in_ours(CALLBACK_BASE_URL=base_url) == []


def test_plain_http_is_fine_in_development() -> None:
    with override_settings(DEBUG=True):
        assert in_ours(CALLBACK_BASE_URL="http://localhost:8000/llm") == []


@pytest.mark.parametrize(
    ("providers", "said"),
    [
        ({"openai": {}}, "['openai']['API_KEY'] is not set"),
        ({"openai": {"API_KEY": " "}}, "['openai']['API_KEY'] is not set"),
        ({"openai": {"API_KEY": "sk-é"}}, "not printable ASCII"),
        ({"openai": {"API_KEY": "sk\nx"}}, "not printable ASCII"),
        ({"openai": {"API_KEY": "k", "BASEURL": "x"}}, "no option 'BASEURL'"),
        ({"openai": {"API_KEY": "k", "BASE_URL": "h.com"}}, "not an http(s) URL"),
        ({"openai": {"API_KEY": "k", "KIND": "claude"}}, "['KIND'] is 'claude'"),
        ({"openai": {"API_KEY": "k"}, "mine": {}}, "['mine']['BASE_URL'] is not set"),
        ({"openai": "sk-secret"}, "['openai'] is not a dictionary"),
        ({"openai": None}, "['openai'] is not a dictionary"),
        ({5: {"API_KEY": "k"}}, "[5]: a provider's name"),
        ({"openai": {"API_KEY": "k", 5: 1}}, "no option 5"),
        ({"openai": {"API_KEY": "k", "BASE_URL": "http://[bad"}}, "not an http(s) URL"),
        ({"openai": {"API_KEY": "k", "MODELS": 5}}, "['MODELS'] is not a list"),
        ({"openai": {"API_KEY": "k", "MODELS": "gpt-5"}}, "['MODELS'] is not a list"),
        ({"openai": {"API_KEY": "k", "MAX_TOKENS": "many"}}, "['MAX_TOKENS'] is not a whole"),
        ({"openai": {"API_KEY": "k", "KIND": ["openai"]}}, "['KIND'] is ['openai']"),
        ({"openai": {"API_KEY": "k"}, "n" * 65: {}}, "1 to 64 characters"),
        ({}, "DEFAULT_PROVIDER is 'openai'"),
    ],
)
def test_wrong_provider_is_found(providers: dict[str, Any], said: str) -> None:
    problem = in_ours(PROVIDERS=providers)[0]
    assert ids([problem]) == ["E004"]
    assert said in problem.msg
    assert problem.hint
    assert "sk-" not in problem.msg


def test_default_provider_may_be_upstash() -> None:
    assert in_ours(DEFAULT_PROVIDER="upstash") == []


@pytest.mark.parametrize(
    ("changed", "name", "hint"),
    [
        ({"PROVIDERS": ["openai"]}, "PROVIDERS", "a dictionary"),
        ({"PRICES": "cheap"}, "PRICES", "a dictionary"),
        ({"RETRIES": "3"}, "RETRIES", "a whole number"),
        ({"RETRIES": True}, "RETRIES", "a whole number"),
        ({"RETRIES": None}, "RETRIES", "a whole number"),
        ({"TIMEOUT": "60"}, "TIMEOUT", "a whole number"),
        ({"SIGNATURE_LEEWAY": "30"}, "SIGNATURE_LEEWAY", "a number"),
        ({"CALLBACK_BASE_URL": None}, "CALLBACK_BASE_URL", "a text"),
        ({"CALLBACK_BASE_URL": 5}, "CALLBACK_BASE_URL", "a text"),
        ({"FORMER_CALLBACK_BASE_URLS": "https://a"}, "FORMER_CALLBACK_BASE_URLS", "a list"),
        ({"FORMER_CALLBACK_BASE_URLS": [5]}, "FORMER_CALLBACK_BASE_URLS", "a list of texts"),
        ({"HEALTH_TOKEN": 5}, "HEALTH_TOKEN", "a text"),
        ({"OPENAI_TAKES_QSTASH_TOKEN": 1}, "OPENAI_TAKES_QSTASH_TOKEN", "True or False"),
        ({"OPENAI_PERMISSIONS": "a.B"}, "OPENAI_PERMISSIONS", "a list"),
    ],
)
def test_setting_of_the_wrong_type_is_found(changed: dict[str, Any], name: str, hint: str) -> None:
    [problem] = in_ours(**changed)
    assert ids([problem]) == ["E007"]
    assert f"QSTASH_LLM[{name!r}]" in problem.msg
    assert hint in str(problem.hint)


@pytest.mark.parametrize("price", [{"input": 1}, {"inputs": 1, "output": 1}, {"input": "x"}, 7])
def test_wrong_price_is_found(price: Any) -> None:
    [problem] = in_ours(PRICES={"openai/m": price})
    assert ids([problem]) == ["E007"]
    assert "PRICES']['openai/m']" in problem.msg


@pytest.mark.parametrize("cap", [0, -1, 1.5, "many", True, None])
def test_wrong_output_cap_is_found(cap: Any) -> None:
    [problem] = in_ours(OUTPUT_CAP={"openai/*": cap})
    assert ids([problem]) == ["E007"]
    assert "OUTPUT_CAP']['openai/*']" in problem.msg
    assert in_ours(OUTPUT_CAP={"openai/*": 4096}) == []


def test_all_right_prices_and_types_are_right() -> None:
    prices = {"openai/m": {"input": "0.15", "output": 0.6, "cached": 0, "cache_write": "1"}}
    assert in_ours(PRICES=prices, TIMEOUT=None, SUBMIT_TIMEOUT=10, TRANSPORT=None) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"QSTASH_LLM": GOOD | {"DEFAULT_PROVIDER": "upstash"}}, ["W003"]),
        ({"QSTASH_LLM": GOOD | {"PROVIDERS": GOOD["PROVIDERS"] | {"upstash": {}}}}, ["W003"]),
        ({}, []),
    ],
)
def test_withdrawn_models_are_explained_to_users_of_the_cloud(
    changed: dict[str, Any], expected: list[str]
) -> None:
    assert ids(found(QSTASH_URL="https://qstash.upstash.io", **changed)) == expected
    assert ids(found(QSTASH_URL="http://127.0.0.1:8080", **changed)) == []


def test_while_setting_up_problems_are_warnings_that_let_migrate_run() -> None:
    with override_settings(DEBUG=True):
        problems = found(QSTASH_TOKEN="", QSTASH_LLM={})
    assert ids(problems) == ["E001", "E003", "E004"]
    assert [problem.is_serious() for problem in problems] == [False] * 3


# --- Celery and SQLite ---


@pytest.fixture
def broker() -> Iterator[Any]:
    before = current_app.conf.broker_url

    def is_(url: str) -> None:
        current_app.conf.broker_url = url

    yield is_
    current_app.conf.broker_url = before


@pytest.mark.parametrize(
    ("url", "debug", "expected"),
    [
        ("filesystem://", True, ["E006"]),
        ("filesystem://localhost", False, ["E006"]),
        ("memory://", False, ["W005"]),
        ("memory://", True, []),
        ("redis://127.0.0.1/0", False, []),
        ("amqp://guest@127.0.0.1", False, []),
    ],
)
def test_brokers_that_lose_things_are_told(
    broker: Any, url: str, debug: bool, expected: list[str]
) -> None:
    broker(url)
    with override_settings(DEBUG=debug):
        problems = check_celery(None)
    assert ids(problems) == expected
    assert all(problem.hint for problem in problems)


@pytest.mark.skipif(connection.vendor != "sqlite", reason="about SQLite")
def test_sqlite_without_immediate_transactions_is_told(settings: Any) -> None:
    options = connection.settings_dict["OPTIONS"]
    assert check_sqlite(None, databases=["default"]) == []
    connection.settings_dict["OPTIONS"] = {"timeout": 20}
    try:
        [problem] = check_sqlite(None, databases=["default"])
    finally:
        connection.settings_dict["OPTIONS"] = options
    assert ids([problem]) == ["W004"]
    assert "'transaction_mode': 'IMMEDIATE'" in str(problem.hint)


def test_sqlite_is_looked_at_only_when_databases_are() -> None:
    assert check_sqlite(None) == []
    assert SQLITE_OPTIONS["transaction_mode"] == "IMMEDIATE"


@pytest.mark.skipif(connection.vendor == "sqlite", reason="about the others")
def test_other_databases_need_no_such_options() -> None:
    assert check_sqlite(None, databases=["default"]) == []


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ({"STORE_MESSAGES": "some"}, "E007"),
        ({"RETENTION_DAYS": 0}, "E007"),
        ({"ORPHAN_RETENTION_DAYS": -1}, "E007"),
        ({"DEADLINE": 0}, "E007"),
        ({"HEALTH_LATE": -5.0}, "E007"),
        ({"FLOW_CONTROL": "learnt"}, "E007"),
        ({"LEARNED_SHARE": 0.0}, "E007"),
        ({"LEARNED_SHARE": 1.1}, "E007"),
        ({"PAUSE_ON": ["money", "auth"]}, "E007"),
        ({"PAUSE_FROM": 0}, "E007"),
        ({"HEALTH_TOKEN": "short"}, "E010"),
        ({"OPENAI_AUTHENTICATION": ["no.such.Thing"]}, "E011"),
        ({"OPENAI_AUTHENTICATION": ["rest_framework.permissions.IsAdminUser"]}, "E011"),
        ({"OPENAI_PERMISSIONS": ["django_qstash_llm.conf.app_settings"]}, "E011"),
        ({"OPENAI_PERMISSIONS": ["rest_framework.authentication.BaseAuthentication"]}, "E011"),
        ({"OPENAI_MAX_BODY_BYTES": 0}, "E011"),
        ({"OPENAI_MAX_FILE_BYTES": 0}, "E011"),
        ({"OPENAI_MAX_BATCH_LINES": 0}, "E011"),
    ],
)
def test_what_is_kept_waited_for_and_shown_is_checked(change: dict[str, Any], id: str) -> None:
    [name] = change
    problems = [each for each in in_ours(**change) if name in each.msg]
    assert ids(problems) == [id]
