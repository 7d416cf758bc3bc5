from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError

from django_qstash_llm.exceptions import InvalidRequest
from django_qstash_llm.models import ApiKey
from tests.server.conftest import at_once

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def calls(key: str, at: datetime, count: int) -> list[bool]:
    found = [ApiKey.objects.of(key, now=at) for _ in range(count)]
    return [each.count_call(now=at) for each in found if each]


def test_only_a_digest_and_a_beginning_are_kept() -> None:
    api_key, key = ApiKey.objects.issue("phone")
    [row] = ApiKey.objects.values()
    assert key not in str(row)
    assert key.startswith(row["prefix"])
    assert len(key) - len(row["prefix"]) > 32
    assert str(api_key) == f"phone · {row['prefix']}…"
    assert ApiKey.objects.of(key, now=NOW) == api_key
    assert ApiKey.objects.of(key[:-1], now=NOW) is None
    assert ApiKey.objects.of(row["digest"], now=NOW) is None


def test_no_two_keys_are_alike() -> None:
    assert len({ApiKey.objects.issue("k")[1] for _ in range(20)}) == 20


def test_a_key_ends_when_it_is_revoked_or_has_expired() -> None:
    _, key = ApiKey.objects.issue("k", expires_at=later(60))
    assert ApiKey.objects.of(key, now=later(59))
    assert ApiKey.objects.of(key, now=later(60)) is None
    api_key, key = ApiKey.objects.issue("k")
    assert api_key.revoke(now=NOW)
    assert not api_key.revoke(now=later(1))
    assert api_key.revoked_at == NOW
    assert ApiKey.objects.of(key, now=NOW) is None


def test_a_rate_holds_within_each_minute() -> None:
    _, key = ApiKey.objects.issue("k", requests_per_minute=3)
    assert calls(key, NOW, 5) == [True, True, True, False, False]
    assert calls(key, later(29), 1) == [False]
    assert calls(key, later(30), 4) == [True, True, True, False]


def test_clocks_may_differ_a_little_and_be_put_back() -> None:
    _, key = ApiKey.objects.issue("k", requests_per_minute=2)
    # One machine is in the next minute already; the other does not give the calls back.
    assert calls(key, later(31), 1) == [True]
    assert calls(key, later(29), 1) == [True]
    assert calls(key, later(31), 1) == [False]
    # Put back by an hour, nobody waits for an hour.
    assert calls(key, later(-3600), 3) == [True, True, False]


@pytest.mark.django_db(transaction=True)
def test_a_rate_is_shared_by_all_who_count_at_once() -> None:
    api_key, _ = ApiKey.objects.issue("k", requests_per_minute=5)
    counted = at_once(8, lambda number: ApiKey.objects.get(pk=api_key.pk).count_call(now=NOW))
    assert sorted(counted) == [False] * 3 + [True] * 5


@pytest.mark.parametrize("limit", [None, 1000])
def test_when_it_was_used_last_is_known_to_the_minute(
    limit: int | None, django_assert_num_queries: Any
) -> None:
    api_key, key = ApiKey.objects.issue("k", requests_per_minute=limit)
    for at, known in ((0, 0), (20, 0), (29, 0), (30, 30), (300, 300)):
        assert calls(key, later(at), 1) == [True]
        api_key.refresh_from_db()
        assert api_key.last_used_at == later(known)
    with django_assert_num_queries(1 if limit else 0):
        api_key.count_call(now=later(301))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": "chat"}, "scopes"),
        ({"allowed_models": "m"}, "allowed_models"),
        ({"allowed_models": [7]}, "allowed_models"),
        ({"allowed_models": [""]}, "allowed_models"),
        ({"allowed_models": ["\x00"]}, "allowed_models"),
        ({"provider": "nobody"}, "provider"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tenant": "t" * 256}, "tenant"),
        ({"tenant": "\x00"}, "tenant"),
        ({"name": ""}, "name"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ApiKey.objects.issue(**{"name": "k", **fields})
    assert name in caught.value.message_dict
    assert not ApiKey.objects.exists()


def test_whom_it_spends_for_is_there() -> None:
    with pytest.raises(InvalidRequest, match="user"):
        ApiKey.objects.issue("k", user=User(username="ann"))


@pytest.mark.parametrize(
    ("allowed", "provider", "model", "is_allowed"),
    [
        ([], "openai", "m", True),
        (["m"], "openai", "m", True),
        (["m"], "openai", "mm", False),
        (["openai/m"], "openai", "m", True),
        (["openai/m"], "groq", "m", False),
        (["groq/*"], "groq", "m", True),
        (["groq/*"], "groqs", "m", False),
        (["m-*"], "groq", "m-2026", True),
        (["*"], "groq", "m", True),
    ],
)
def test_which_models_it_may_ask(
    allowed: list[str], provider: str, model: str, is_allowed: bool
) -> None:
    assert ApiKey(allowed_models=allowed).may_ask(provider, model) is is_allowed
