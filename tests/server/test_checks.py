from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from django_qstash_llm.server import conf
from django_qstash_llm.server.checks import check_settings

OWN = {"TOKEN": "own", "CURRENT_SIGNING_KEY": "k" * 32, "NEXT_SIGNING_KEY": "l" * 32}


def ids(**values: Any) -> list[str]:
    with override_settings(QSTASH_SERVER=values):
        return [str(message.id) for message in check_settings()]


def test_an_identity_of_ones_own_is_fine() -> None:
    assert ids(**OWN) == []
    assert ids(TOKEN="own") == []


@override_settings(DEBUG=False)
def test_no_token_outside_debug_is_an_error_that_names_the_setting() -> None:
    with override_settings(QSTASH_SERVER={}):
        [message] = check_settings()
    assert message.id == "qstash_server.E001"
    assert "QSTASH_SERVER['TOKEN']" in str(message.hint)


@override_settings(DEBUG=True)
def test_no_token_under_debug_is_fine() -> None:
    assert ids() == []


@pytest.mark.parametrize(
    "public",
    [
        {"TOKEN": conf.DEVELOPMENT_TOKEN},
        {"CURRENT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.current},
        {"NEXT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.next},
    ],
)
def test_what_everybody_knows_is_an_error_outside_debug(public: dict[str, str]) -> None:
    assert ids(**(OWN | public)) == ["qstash_server.E002"]
    with override_settings(DEBUG=True):
        assert ids(**(OWN | public)) == []


def test_an_unknown_key_is_told_with_what_was_meant() -> None:
    with override_settings(QSTASH_SERVER=OWN | {"MAX_RETRY": 3}):
        [message] = check_settings()
    assert (message.id, message.hint) == ("qstash_server.E004", "Did you mean MAX_RETRIES?")


@pytest.mark.parametrize(
    "wrong",
    [
        {"NEXT_SIGNING_KEY": ""},
        {"NEXT_SIGNING_KEY": "short"},
        {"TOKEN": 5},
        {"MAX_BODY": "10"},
        {"LEASE": "x"},
        {"CONCURRENCY": 0},
        {"MAX_RETRIES": "5"},
        {"HOST_MAP": "a.test=http://localhost"},
        {"HOST_MAP": {"a.test": "localhost:8000"}},
        {"HOST_MAP": {"https://a.test": "http://localhost:8000"}},
        {"HOST_MAP": {5: "http://localhost:8000"}},
    ],
)
def test_a_value_that_cannot_be_used_is_an_error(wrong: dict[str, Any]) -> None:
    assert ids(**(OWN | wrong)) == ["qstash_server.E003"]


@pytest.mark.parametrize(
    "right",
    [
        {"MAX_RETRIES": None},
        {"LEASE": 5},
        {"TRANSPORT": object()},
        {"HOST_MAP": {"*": "http://localhost:8000", "a.test:81": "https://b.test/base"}},
    ],
)
def test_a_value_that_can_is_not(right: dict[str, Any]) -> None:
    assert ids(**(OWN | right)) == []


@pytest.mark.django_db
@override_settings(QSTASH_SERVER={}, DEBUG=False)
@pytest.mark.django_db(databases="__all__")  # others' checks ask each database what it can do
def test_the_check_is_among_those_that_manage_py_runs() -> None:
    assert "qstash_server.E001" in {message.id for message in run_checks()}
