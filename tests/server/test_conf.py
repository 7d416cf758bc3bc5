from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError

import pytest
from django.test import override_settings

from django_qstash_llm.server import conf
from django_qstash_llm.server.exceptions import ConfigurationError


@pytest.fixture
def command_line() -> Iterator[Callable[..., None]]:
    yield conf.override
    conf._overrides.clear()
    conf.current.cache_clear()


@override_settings(DEBUG=True, QSTASH_SERVER={})
def test_under_debug_the_identity_is_the_well_known_one() -> None:
    current = conf.current()
    assert current.token == conf.DEVELOPMENT_TOKEN
    assert current.keys_of("") == conf.DEVELOPMENT_KEYS
    assert current.allow_loopback


@override_settings(DEBUG=False, QSTASH_SERVER={})
def test_outside_debug_there_is_no_identity_unless_it_is_given() -> None:
    current = conf.current()
    assert current.token == ""
    assert current.keys_of("") is None
    assert not current.allow_loopback


@override_settings(DEBUG=True, QSTASH_SERVER={"TOKEN": "mine"})
def test_the_public_keys_never_stand_beside_a_token_of_ones_own() -> None:
    assert conf.current().token == "mine"
    assert conf.current().keys_of("") is None


@override_settings(DEBUG=True, QSTASH_SERVER={})
def test_the_public_keys_never_stand_beside_a_token_of_the_command_line(
    command_line: Callable[..., None],
) -> None:
    command_line(token="mine")
    assert conf.current().token == "mine"
    assert conf.current().keys_of("") is None


def test_settings_are_read_again_when_they_change() -> None:
    with override_settings(QSTASH_SERVER={"MAX_BODY": 5}):
        assert conf.current().max_body == 5
    with override_settings(QSTASH_SERVER={"MAX_BODY": 6}):
        assert conf.current().max_body == 6


@override_settings(QSTASH_SERVER=["TOKEN"])
def test_a_setting_of_another_kind_is_named() -> None:
    with pytest.raises(ConfigurationError, match="QSTASH_SERVER is a dictionary, not list"):
        conf.current()


def test_secrets_are_in_no_repr() -> None:
    assert "secret-token" not in repr(conf.ServerSettings(token="secret-token"))
    with pytest.raises(FrozenInstanceError):
        conf.ServerSettings().token = "other"  # type: ignore[misc]
