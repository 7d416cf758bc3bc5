from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import override_settings

from django_qstash_llm.exceptions import ConfigurationError, InvalidRequest
from django_qstash_llm.providers import (
    HOSTED_MODELS,
    OPTIONS,
    Pace,
    Provider,
    build_provider,
    chat_url,
    endpoint_url,
    get_provider,
)
from django_qstash_llm.qstash import FlowControl
from django_qstash_llm.qstash.options import check_name

BEARER = {"Authorization": "Bearer sk-1"}


def test_a_provider_is_built_once_and_anew_when_the_settings_change() -> None:
    with override_settings(QSTASH_LLM={"PROVIDERS": {"openai": {"API_KEY": "sk-1"}}}):
        provider = get_provider("openai")
        assert get_provider("openai") is provider
    with override_settings(QSTASH_LLM={"PROVIDERS": {"openai": {"API_KEY": "sk-2"}}}):
        assert get_provider("openai").headers == {"Authorization": "Bearer sk-2"}


@pytest.mark.parametrize(
    ("name", "options", "provider"),
    [
        (
            "openai",
            {"API_KEY": "sk-1"},
            Provider(
                name="openai",
                kind="openai",
                destination="https://api.openai.com/v1/chat/completions",
                headers=BEARER,
            ),
        ),
        (
            "openai",
            {"API_KEY": " sk-1\n", "ORGANIZATION": "org", "MODELS": ["m"]},
            Provider(
                name="openai",
                kind="openai",
                destination="https://api.openai.com/v1/chat/completions",
                headers={**BEARER, "OpenAI-Organization": "org"},
                models=("m",),
            ),
        ),
        (
            "second",
            {"KIND": "openai", "API_KEY": "sk-1", "BASE_URL": "https://h/openai/v1"},
            Provider(
                name="second",
                kind="openai",
                destination="https://h/openai/v1/chat/completions",
                headers=BEARER,
            ),
        ),
        (
            "anthropic",
            {"API_KEY": "ant", "MAX_TOKENS": 100},
            Provider(
                name="anthropic",
                kind="anthropic",
                destination="https://api.anthropic.com/v1/messages",
                headers={"x-api-key": "ant", "anthropic-version": "2023-06-01"},
                max_tokens=100,
            ),
        ),
        (
            "upstash",
            {},
            Provider(name="upstash", kind="upstash", destination="api/llm", models=HOSTED_MODELS),
        ),
        (
            "upstash",
            {"MODELS": ["qwen"]},
            Provider(name="upstash", kind="upstash", destination="api/llm", models=("qwen",)),
        ),
        (
            "groq",
            {"BASE_URL": "https://api.groq.com/openai/v1", "API_KEY": "sk-1"},
            Provider(
                name="groq",
                kind="custom",
                destination="https://api.groq.com/openai/v1/chat/completions",
                headers=BEARER,
            ),
        ),
        (
            "local",
            {"BASE_URL": "http://127.0.0.1:11434"},
            Provider(
                name="local",
                kind="custom",
                destination="http://127.0.0.1:11434/v1/chat/completions",
            ),
        ),
        # Helicone in front of any of them.
        (
            "openai",
            {"API_KEY": "sk-1", "HELICONE_API_KEY": "hel"},
            Provider(
                name="openai",
                kind="openai",
                destination="https://gateway.helicone.ai/v1/chat/completions",
                headers={
                    **BEARER,
                    "Helicone-Auth": "Bearer hel",
                    "Helicone-Target-Url": "https://api.openai.com",
                },
            ),
        ),
        (
            "anthropic",
            {"API_KEY": "ant", "HELICONE_API_KEY": "hel"},
            Provider(
                name="anthropic",
                kind="anthropic",
                destination="https://gateway.helicone.ai/v1/messages",
                headers={
                    "x-api-key": "ant",
                    "anthropic-version": "2023-06-01",
                    "Helicone-Auth": "Bearer hel",
                    "Helicone-Target-Url": "https://api.anthropic.com",
                },
            ),
        ),
        (
            "azure",
            {
                "BASE_URL": "https://x.azure.com/openai/v1?api-version=preview",
                "API_KEY": "sk-1",
                "HELICONE_API_KEY": "hel",
            },
            Provider(
                name="azure",
                kind="custom",
                destination=(
                    "https://gateway.helicone.ai/openai/v1/chat/completions?api-version=preview"
                ),
                headers={
                    **BEARER,
                    "Helicone-Auth": "Bearer hel",
                    "Helicone-Target-Url": "https://x.azure.com",
                },
            ),
        ),
    ],
)
def test_provider_is_built_from_its_entry(
    name: str, options: dict[str, Any], provider: Provider
) -> None:
    assert build_provider(name, options) == provider


@override_settings(QSTASH_TOKEN="the-token-of-qstash")
def test_hosted_models_behind_helicone_are_asked_with_qstashs_token() -> None:
    provider = build_provider("upstash", {"HELICONE_API_KEY": "hel"})
    assert provider.destination == "https://qstash.helicone.ai/llm/v1/chat/completions"
    assert provider.headers == {
        "Helicone-Auth": "Bearer hel",
        "Authorization": "Bearer the-token-of-qstash",
    }


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://h", "https://h/v1/chat/completions"),
        ("https://h/", "https://h/v1/chat/completions"),
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h//v1//", "https://h/v1/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("https://h/v1/chat/completions/", "https://h/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4/chat/completions"),
        ("https://h/proxy", "https://h/proxy/v1/chat/completions"),
        ("https://h/chat/completions", "https://h/chat/completions"),
        ("https://h/v1?api-version=1", "https://h/v1/chat/completions?api-version=1"),
        ("https://h:8443/v1#x", "https://h:8443/v1/chat/completions"),
        (" https://h/v1 ", "https://h/v1/chat/completions"),
    ],
)
def test_base_url_may_be_given_in_any_form(base_url: str, url: str) -> None:
    assert chat_url(base_url) == url


def test_anthropic_has_its_own_endpoint() -> None:
    assert endpoint_url("https://h", "/messages") == "https://h/v1/messages"
    assert endpoint_url("https://h/v1/messages", "/messages") == "https://h/v1/messages"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("openai", {}, "API_KEY'] is not set"),
        ("openai", {"API_KEY": None}, "API_KEY'] is not set"),
        ("anthropic", {"API_KEY": ""}, "API_KEY'] is not set"),
        ("openai", {"API_KEY": "k", "URL": "x"}, f"no option 'URL'; there are {OPTIONS[0]}"),
        ("openai", {"API_KEY": "k", "KIND": "gpt"}, "['KIND'] is 'gpt'; there are openai"),
        ("mine", {"API_KEY": "k"}, "['BASE_URL'] is not set"),
        ("mine", {"BASE_URL": "localhost:8000"}, "['BASE_URL'] is 'localhost:8000', not an http"),
        ("mine", {"BASE_URL": "file:///etc"}, "not an http(s) URL"),
        ("mine", {"BASE_URL": "https://"}, "not an http(s) URL"),
        ("mine", 7, "is not a dictionary"),
        ("", {"BASE_URL": "https://h"}, "1 to 64 characters"),
        *(
            ("openai", {"API_KEY": "k", "FLOW_CONTROL": given}, f"['FLOW_CONTROL']{said}")
            for given, said in [
                (7, " is not a dictionary"),
                ({"rate": 5}, " has no 'rate'; there are PARALLELISM, RATE, PERIOD, GROUPS"),
                ({"RATE": 0}, "['RATE']: 0 is not a whole number of at least 1"),
                ({"RATE": "5"}, "['RATE']: '5' is not a whole number"),
                ({"PARALLELISM": 1.5}, "['PARALLELISM']: 1.5 is not a whole number"),
                ({"RATE": 5, "PERIOD": 604_801}, "['PERIOD']: longer than 7 days"),
                ({"PERIOD": 5}, "['PERIOD'] is given without a RATE"),
                ({"GROUPS": []}, "['GROUPS'] is not a dictionary"),
                ({"GROUPS": {"g": ["m"]}}, "['GROUPS']['g'] is not a dictionary"),
                ({"GROUPS": {"g": {"RATE": 1}}}, "['GROUPS']['g']['MODELS'] is not a list"),
                ({"GROUPS": {"g": {"MODELS": "m"}}}, "['GROUPS']['g']['MODELS'] is not a list"),
                ({"GROUPS": {"g": {"MODELS": ["m"], "RATE": -1}}}, "['GROUPS']['g']['RATE']: -1"),
                (
                    {"GROUPS": {"g": {"MODELS": ["m"]}, "h": {"MODELS": ["n", "m"]}}},
                    "['GROUPS']['h']: 'm' is in another group already",
                ),
            ]
        ),
    ],
)
def test_wrong_entry_is_named(name: str, options: Any, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_provider(name, options)
    assert f"QSTASH_LLM['PROVIDERS'][{name!r}]" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["sk-\x00", "sk-é", "sk\n-1", "sk-\x7f"])
def test_key_that_no_header_carries_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigurationError, match="not printable ASCII") as caught:
        build_provider("openai", {"API_KEY": key})
    assert key not in str(caught.value)


def test_unknown_provider_is_told_which_there_are() -> None:
    with pytest.raises(InvalidRequest, match="there are anthropic, openai, upstash") as caught:
        get_provider("opnai")
    assert caught.value.field == "provider"


def test_upstash_needs_no_entry() -> None:
    assert get_provider("upstash").destination == "api/llm"


def test_nothing_of_a_provider_shows_its_key() -> None:
    assert "canary" not in repr(get_provider("openai"))


def test_any_model_may_be_asked_unless_they_are_listed() -> None:
    build_provider("local", {"BASE_URL": "http://h"}).check_model("anything")
    with pytest.raises(InvalidRequest, match="Add it to MODELS") as caught:
        build_provider("local", {"BASE_URL": "http://h", "MODELS": ["a", "b"]}).check_model("c")
    assert caught.value.field == "model"


# --- bodies ---

ASK = [{"role": "user", "content": "?"}]


def body(kind: str, messages: list[dict[str, Any]], **parameters: Any) -> Any:
    provider = Provider(name="p", kind=kind, destination="https://h", max_tokens=10)
    return json.loads(provider.body("m", messages, parameters))


def test_openais_body_is_what_was_asked() -> None:
    assert body("openai", ASK, temperature=0.5) == {
        "model": "m",
        "messages": ASK,
        "temperature": 0.5,
    }


@pytest.mark.parametrize(
    ("before", "system"),
    [
        ([], None),
        ([{"role": "system", "content": "A."}], "A."),
        ([{"role": "developer", "content": "A."}], "A."),
        (
            [{"role": "system", "content": "A."}, {"role": "system", "content": "B."}],
            "A.\n\nB.",
        ),
        (
            [
                {"role": "system", "content": "A."},
                {"role": "system", "content": [{"type": "text", "text": "B."}]},
            ],
            [{"type": "text", "text": "A."}, {"type": "text", "text": "B."}],
        ),
    ],
)
def test_anthropics_system_prompt_stands_apart(before: list[Any], system: Any) -> None:
    expected = {"model": "m", "max_tokens": 10, "messages": ASK}
    assert body("anthropic", [*before, *ASK]) == expected | ({"system": system} if system else {})


def test_anthropics_max_tokens_may_be_asked_for() -> None:
    assert body("anthropic", ASK, max_tokens=99, temperature=0)["max_tokens"] == 99


def test_pace_is_that_of_the_model_or_of_its_group() -> None:
    groups = {"g": {"MODELS": ["a", "b"], "RATE": 9}, "h": {"MODELS": ["c"]}}
    pace = {"PARALLELISM": 2, "RATE": 5, "PERIOD": 60, "GROUPS": groups}
    provider = build_provider("openai", {"API_KEY": "k", "FLOW_CONTROL": pace})
    alike = {"parallelism": 2, "period": 60}
    of_g = Pace(key="llm.openai.group.g", models=("a", "b"), rate=9, **alike)
    assert provider.pace("a") == provider.pace("b") == of_g
    assert provider.pace("c") == Pace(key="llm.openai.group.h", models=("c",), rate=5, **alike)
    assert provider.pace("d") == Pace(key="llm.openai.d", models=("d",), rate=5, **alike)


def test_without_a_pace_there_is_no_flow_control() -> None:
    provider = build_provider("openai", {"API_KEY": "k"})
    assert provider.pace("m").flow_control() is None
    slow = provider.pace("m").at_most(10, 60)
    assert slow.flow_control() == FlowControl(key="llm.openai.m", rate=10, period=60)
    assert slow.at_most(1, 1) == slow
    assert slow.at_most(1, 7) != slow


@pytest.mark.parametrize("model", ["m/n", "m n", "ü" * 255, "m" * 255, "."])
@pytest.mark.parametrize("name", ["openai", "my.own", "ß", "p" * 64])
def test_every_model_has_a_key_of_its_own_that_can_be_sent(name: str, model: str) -> None:
    provider = build_provider(name, {"API_KEY": "k", "BASE_URL": "https://h"})
    others = [f"{model[:-1]}-", f"{model[:-1]}x", model.replace("/", "-")]
    key = provider.pace(model).key
    check_name("key", key)
    assert len(key) <= 255
    assert key not in [provider.pace(other).key for other in others if other != model]
