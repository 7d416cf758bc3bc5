from __future__ import annotations

import os
from typing import Any

import environ
import httpx
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from django_qstash_llm import conf
from django_qstash_llm.conf import AppSettings, app_settings, from_env, qstash_client
from django_qstash_llm.exceptions import ConfigurationError
from django_qstash_llm.qstash import Message

from .wire import Wire


def test_settings_are_typed_and_have_defaults() -> None:
    with override_settings(QSTASH_LLM={}):
        assert app_settings() == AppSettings(
            **{
                name: getattr(app_settings(), name)
                for name in (
                    "qstash_url",
                    "qstash_token",
                    "qstash_current_signing_key",
                    "qstash_next_signing_key",
                )
            }
        )
        assert (app_settings().retries, app_settings().default_provider) == (3, "openai")


def test_settings_follow_override_settings() -> None:
    before = app_settings()
    with override_settings(QSTASH_LLM={"RETRIES": 1}):
        assert app_settings().retries == 1
    with override_settings(QSTASH_TOKEN="another"):
        assert app_settings().qstash_token == "another"
    assert app_settings() == before


@pytest.mark.parametrize("token", ["", None, "   ", 7])
def test_upstash_setting_that_is_no_text_is_as_good_as_absent(token: Any) -> None:
    with override_settings(QSTASH_TOKEN=token):
        assert app_settings().qstash_token == ""


def test_spaces_around_a_pasted_key_are_not_part_of_it() -> None:
    with override_settings(QSTASH_TOKEN=" token\n"):
        assert app_settings().qstash_token == "token"


def test_absent_next_key_keeps_its_place() -> None:
    with override_settings(QSTASH_CURRENT_SIGNING_KEY=""):
        assert app_settings().signing_keys[0] == ""
        assert len(app_settings().signing_keys) == 2


def test_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with (
        override_settings(QSTASH_LLM={"RETRYS": 3}),
        pytest.raises(ConfigurationError, match=r"'RETRYS'\. Did you mean 'RETRIES'"),
    ):
        app_settings()


def test_configuration_error_is_djangos_too() -> None:
    assert issubclass(ConfigurationError, ImproperlyConfigured)


def test_upstash_names_do_not_belong_in_the_dictionary() -> None:
    with (
        override_settings(QSTASH_LLM={"QSTASH_TOKEN": "x"}),
        pytest.raises(ConfigurationError, match="QSTASH_TOKEN"),
    ):
        app_settings()


def test_settings_show_no_key() -> None:
    shown = repr(app_settings())
    secrets = app_settings().secrets
    assert len(secrets) == 5
    assert [secret for secret in secrets if secret in shown] == []


def test_secrets_are_blacked_out_the_longest_first() -> None:
    providers = {"openai": {"API_KEY": " sk-short-key "}, "b": {"API_KEY": "sk-short-key-and-more"}}
    with override_settings(QSTASH_LLM={"PROVIDERS": providers}):
        text = "a sk-short-key-and-more b sk-short-key c"
        assert app_settings().without_secrets(text) == "a [redacted] b [redacted] c"


def test_what_is_too_short_to_be_a_key_is_not_blacked_out() -> None:
    with override_settings(QSTASH_LLM={"PROVIDERS": {"local": {"API_KEY": "x"}}}):
        assert app_settings().without_secrets("an x-ray") == "an x-ray"


@pytest.mark.parametrize(
    "key",
    [
        *("lm-studio", "not-needed", "no-key-required", "placeholder", "your-api-key-here"),
        *("NOT_NEEDED", "Dummy Key", "Anything", "YOUR_API_KEY", " lm-studio "),
    ],
)
def test_what_local_servers_are_given_for_a_key_is_no_secret(key: str) -> None:
    with override_settings(QSTASH_LLM={"PROVIDERS": {"local": {"API_KEY": key}}}):
        text = f"Take {key.strip()} for a key."
        assert app_settings().without_secrets(text) == text


@pytest.mark.parametrize(
    "key",
    [
        "sk-short-key",  # a prefix says that it is meant for one
        "lm-studio-2",
        "hunter22",
        "qWertyUiop",
        "abcdefghijklmnop",  # longer than words are
        "correct-horse-battery-staple",
        "12345678",
    ],
)
def test_what_may_be_a_key_is_blacked_out(key: str) -> None:
    with override_settings(QSTASH_LLM={"PROVIDERS": {"local": {"API_KEY": key}}}):
        assert app_settings().without_secrets(f"Bearer {key}.") == "Bearer [redacted]."


def test_a_token_is_a_secret_whatever_its_words() -> None:
    with override_settings(QSTASH_TOKEN="our-token", QSTASH_LLM={}):
        assert app_settings().without_secrets("our-token") == "[redacted]"


def test_secrets_are_blacked_out_however_deep() -> None:
    with override_settings(QSTASH_TOKEN="token-0123", QSTASH_LLM={}):
        value = {"token-0123": ["a token-0123", 5, None, {"b": "token-0123"}]}
        assert app_settings().without_secrets_in(value) == {
            "[redacted]": ["a [redacted]", 5, None, {"b": "[redacted]"}]
        }


@pytest.mark.parametrize("missing", range(1, 10))
def test_text_is_cut_when_no_key_is_left_in_it(missing: int) -> None:
    with override_settings(QSTASH_TOKEN="token-0123", QSTASH_LLM={}):
        text = "x" * (10 + missing) + "token-0123"
        kept = app_settings().without_secrets(text, limit=20)
        assert (len(kept), "tok" in kept) == (20, False)


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_callback_url_is_under_the_base_url(slash: str) -> None:
    with override_settings(QSTASH_LLM={"CALLBACK_BASE_URL": f"https://example.com/llm{slash}"}):
        assert app_settings().callback_url("u") == "https://example.com/llm/callback/u/"


def test_every_spelling_we_published_is_ours() -> None:
    ours = {
        "CALLBACK_BASE_URL": "https://new.example/llm/",
        "FORMER_CALLBACK_BASE_URLS": ["https://old.example/x", ""],
    }
    with override_settings(QSTASH_LLM=ours):
        assert app_settings().callback_urls("u") == {
            "https://new.example/llm/callback/u/",
            "https://new.example/llm/callback/u",
            "https://old.example/x/callback/u/",
            "https://old.example/x/callback/u",
        }


# --- the client ---


def test_client_is_kept_until_a_setting_changes() -> None:
    client = qstash_client()
    assert qstash_client() is client
    with override_settings(QSTASH_TOKEN="another"):
        assert qstash_client() is not client
    with override_settings(LANGUAGE_CODE="de"):
        assert qstash_client() is qstash_client()


def test_client_talks_to_the_url_in_the_settings_with_the_token(wire: Wire) -> None:
    wire.hosts["elsewhere.test"] = lambda request: httpx.Response(200, json={"messageId": "m"})
    with override_settings(QSTASH_URL="https://elsewhere.test", QSTASH_TOKEN="tok"):
        qstash_client().publish(Message("https://example.com"))
    [request] = wire.to("elsewhere.test")
    assert request.headers["Authorization"] == "Bearer tok"


def test_transport_may_be_an_object() -> None:
    answer = httpx.MockTransport(lambda request: httpx.Response(200, json={"messageId": "m9"}))
    ours = {"CALLBACK_BASE_URL": "https://example.com/llm", "TRANSPORT": answer}
    with override_settings(QSTASH_LLM=ours):
        accepted = qstash_client().publish(Message("https://example.com"))
    assert accepted == ("m9", False, "")


def test_client_of_a_forked_process_is_its_own() -> None:
    assert conf._client_of_process(os.getpid() + 1) is not qstash_client()


@override_settings(QSTASH_TOKEN="")
def test_client_without_a_token_names_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        qstash_client()


# --- from the environment ---


def env(**variables: str) -> environ.Env:
    made = environ.Env()
    made.ENVIRON = variables
    return made


def test_empty_environment_sets_nothing() -> None:
    assert from_env(env()) == {"QSTASH_LLM": {}}


def test_environment_is_read_with_its_types() -> None:
    given = from_env(
        env(
            QSTASH_TOKEN="$dollar",
            QSTASH_CURRENT_SIGNING_KEY="sig_current",
            QSTASH_LLM_RETRIES="5",
            QSTASH_LLM_TIMEOUT="600",
            QSTASH_LLM_OPENAI_TAKES_QSTASH_TOKEN="yes",
            QSTASH_LLM_SIGNATURE_LEEWAY="1.5",
            QSTASH_LLM_CALLBACK_BASE_URL="https://example.com/llm",
            QSTASH_LLM_FORMER_CALLBACK_BASE_URLS="https://a,https://b",
            QSTASH_LLM_PRICES='{"openai/m": {"input": "1", "output": "2"}}',
            OPENAI_API_KEY="$sk",
            OPENAI_BASE_URL="https://proxy.example/v1",
            OPENAI_ORGANIZATION="org",
            ANTHROPIC_API_KEY="ant",
        )
    )
    assert given == {
        "QSTASH_TOKEN": "$dollar",
        "QSTASH_CURRENT_SIGNING_KEY": "sig_current",
        "QSTASH_LLM": {
            "RETRIES": 5,
            "TIMEOUT": 600,
            "OPENAI_TAKES_QSTASH_TOKEN": True,
            "SIGNATURE_LEEWAY": 1.5,
            "CALLBACK_BASE_URL": "https://example.com/llm",
            "FORMER_CALLBACK_BASE_URLS": ("https://a", "https://b"),
            "PRICES": {"openai/m": {"input": "1", "output": "2"}},
            "PROVIDERS": {
                "openai": {
                    "API_KEY": "$sk",
                    "BASE_URL": "https://proxy.example/v1",
                    "ORGANIZATION": "org",
                },
                "anthropic": {"API_KEY": "ant"},
            },
        },
    }
    with override_settings(**given):
        assert app_settings().retries == 5


def test_environment_that_cannot_be_read_names_the_variable() -> None:
    with pytest.raises(ConfigurationError, match="QSTASH_LLM_RETRIES in the environment"):
        from_env(env(QSTASH_LLM_RETRIES="abc"))


def test_misspelt_variable_is_kept_for_the_check_to_report() -> None:
    given = from_env(env(QSTASH_LLM_DEFAULT_MODLE="x"))
    with (
        override_settings(**given),
        pytest.raises(ConfigurationError, match="Did you mean 'DEFAULT_MODEL'"),
    ):
        app_settings()


def test_providers_given_whole_win_over_single_keys() -> None:
    given = from_env(
        env(QSTASH_LLM_PROVIDERS='{"x": {"BASE_URL": "http://x"}}', OPENAI_API_KEY="k")
    )
    assert given["QSTASH_LLM"]["PROVIDERS"] == {"x": {"BASE_URL": "http://x"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flow_control": "learnt"}, "['FLOW_CONTROL'] is 'learnt'; give 'off', 'configured'"),
        ({"flow_control": ["off"]}, "['FLOW_CONTROL'] is a list. Give a text"),
        ({"learned_share": 1.5}, "['LEARNED_SHARE'] is 1.5; give more than 0, 1 at most"),
        ({"learned_share": "0.5"}, "['LEARNED_SHARE'] is a str. Give a number"),
        ({"pause_on": ["auth"]}, "['PAUSE_ON'] holds 'auth'; there are money, rate, daily"),
        ({"pause_on": "money"}, "['PAUSE_ON'] is a str. Give a list or tuple"),
        ({"pause_from": 0.0}, "['PAUSE_FROM'] is 0.0; give more than 0 seconds"),
    ],
)
def test_what_paces_and_pauses_must_be_clear(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        AppSettings(**given).check_pacing()
    assert said in str(told.value)
