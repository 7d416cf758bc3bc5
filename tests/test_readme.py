"""What the README says is so."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db.models.signals import post_save

from django_qstash_llm import providers, triggers
from django_qstash_llm.conf import OUR_NAMES, UPSTASH_NAMES, AppSettings
from django_qstash_llm.models import Budget, LLMRequest
from django_qstash_llm.server.conf import KNOWN, ServerSettings
from django_qstash_llm.signals import budget_threshold_reached
from testproject.articles.models import Article

from .conftest import ANSWER
from .wire import FakeQStash, Wire

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(words: str) -> str:
    return next(code for code in EXAMPLES if words in code)


def rows_of_table(heading: str) -> dict[str, list[str]]:
    table = README.split(heading, 1)[1].split("\n\n", 2)[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize(
    ("heading", "settings", "names"),
    [
        ("Ours are keys of the dictionary", AppSettings, OUR_NAMES),
        ("The server's are keys of the dictionary", ServerSettings, KNOWN),
    ],
)
def test_every_setting_is_there_with_its_default(
    heading: str, settings: Any, names: dict[str, Any]
) -> None:
    defaults = {
        f.name.upper(): f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(settings)
        if f.name.upper() in names
    }
    documented = {
        name.strip("`"): row[2].strip("`")
        for names, row in rows_of_table(heading).items()
        for name in names.split(", ")
    }
    assert documented.keys() == defaults.keys()
    for name, shown in documented.items():
        assert (ast.literal_eval(shown) if shown else "") == defaults[name], name


def test_every_name_of_upstash_is_there() -> None:
    assert rows_of_table("Upstash's names stand at top level").keys() == UPSTASH_NAMES.keys()


def test_every_promise_is_held_by_tests_that_are_there() -> None:
    promises = rows_of_table("one checker look at ledgers that were kept outside the system.")
    assert list(promises) == [str(number) for number in range(1, 13)]
    for row in promises.values():
        held_by = re.findall(r"`(tests/[^`:]+)(?:::(\w+))?`", row[2])
        assert held_by
        for path, name in held_by:
            place = Path(__file__).parent.parent / path
            assert place.exists(), path
            assert not name or f"def {name}(" in place.read_text(), name


def test_every_option_of_a_provider_is_there() -> None:
    assert set(rows_of_table("### Providers\n").keys()) <= set(providers.OPTIONS)
    for option in providers.OPTIONS:
        assert f"| `{option}` |" in README


def test_the_providers_of_the_example_can_be_built() -> None:
    namespace: dict[str, dict[str, dict[str, str]]] = {}
    exec(example("PROVIDERS = {").replace("…", "key"), namespace)  # noqa: S102
    built = {
        name: providers.build_provider(name, options)
        for name, options in namespace["PROVIDERS"].items()
    }
    assert {name: provider.destination for name, provider in built.items()} == {
        "openai": "https://api.openai.com/v1/chat/completions",
        "anthropic": "https://api.anthropic.com/v1/messages",
        "groq": "https://api.groq.com/openai/v1/chat/completions",
        "ollama": "http://gpu.internal:11434/v1/chat/completions",
    }


def test_the_pace_of_the_example_is_that_of_its_models() -> None:
    namespace: dict[str, Any] = {}
    exec(example('"GROUPS"').replace("…", "key"), namespace)  # noqa: S102
    given = namespace["QSTASH_LLM"]
    AppSettings(flow_control=given["FLOW_CONTROL"]).check_pacing()
    provider = providers.build_provider("openai", given["PROVIDERS"]["openai"])
    rates = {model: provider.pace(model).rate for model in ("gpt-5.4", "gpt-5.4-mini", "other")}
    assert rates == {"gpt-5.4": 1000, "gpt-5.4-mini": 1000, "other": 500}


@pytest.mark.django_db(transaction=True)
def test_the_examples_of_asking_run_as_they_stand(qstash: FakeQStash) -> None:
    article = Article.objects.create(title="A", body="B", summary="already there")
    namespace: dict[str, object] = {"article": article}
    exec(example("Name three moons"), namespace)  # noqa: S102
    exec(example("llm_request.refresh_from_db()"), namespace)  # noqa: S102
    exec(example("squared?"), namespace)  # noqa: S102
    states = LLMRequest.objects.order_by("id").values_list("via", "state")
    assert list(states) == [
        ("publish", "submitted"),
        *[("batch", "submitted")] * 3,
        ("enqueue", "submitted"),
        ("publish", "submitted"),
    ]
    assert LLMRequest.objects.earliest("id").parameters == {"temperature": 0.2}


def answer_at_once(request: httpx.Request) -> httpx.Response:
    if not json.loads(request.content).get("stream"):
        return httpx.Response(200, json=ANSWER)
    chunk = {"choices": [{"delta": {"content": "Titan."}, "finish_reason": "stop"}]}
    return httpx.Response(200, content=f"data: {json.dumps(chunk)}\n\n".encode())


@pytest.mark.django_db(transaction=True)
def test_the_examples_of_immediate_answers_run_as_they_stand(
    qstash: FakeQStash, wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    wire.hosts["provider.test"] = answer_at_once
    user = User.objects.create(username="ada")
    exec(example("LLMRequest.objects.stream("), {"LLMRequest": LLMRequest})  # noqa: S102
    exec(example("conversation.stream("), {"user": user})  # noqa: S102
    assert capsys.readouterr().out == "Titan." * 2
    states = LLMRequest.objects.order_by("id").values_list("via", "state", "user")
    assert list(states) == [
        *[("chat", "completed", None)] * 2,
        ("chat", "completed", user.pk),
        ("publish", "submitted", user.pk),
        ("chat", "completed", user.pk),
    ]


@pytest.mark.django_db(transaction=True)
def test_the_trigger_of_the_example_asks(qstash: FakeQStash) -> None:
    # As a module of the app would be: the relative import is part of the example.
    namespace = {"__package__": "testproject.articles", "__name__": "testproject.articles.readme"}
    name = "testproject.articles.readme.Summarise"
    try:
        exec(example("class Summarise(Trigger)"), namespace)  # noqa: S102
        Article.objects.create(title="A", body="Some text.")
    finally:
        post_save.disconnect(sender=Article, dispatch_uid=name)
        triggers._registry.pop(name, None)
    asked = LLMRequest.objects.get(trigger=name)
    assert asked.messages == [
        {"role": "user", "content": "Summarise in two sentences:\n\nSome text."}
    ]


@pytest.mark.django_db
def test_the_examples_of_what_was_spent_run_as_they_stand() -> None:
    article = Article.objects.create(title="A", body="B", summary="already there")
    exec(example("Spend.for_object(article)"), {"article": article, "date": date})  # noqa: S102
    namespace: dict[str, Any] = {}
    exec(example("def tenant_of"), namespace)  # noqa: S102
    assert namespace["tenant_of"](LLMRequest()) == ""


@pytest.mark.django_db
def test_the_budgets_of_the_example_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    chapter = README.split("## Budgets and what was spent", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^python manage\.py (llm_budgets[^#\n]*)", chapter, re.M)
    for line in lines:
        call_command(*shlex.split(line))
    assert [budget.name for budget in Budget.objects.all()] == ["acme", "house", "opus"]
    assert "“acme” ($30.00 a week, tenant acme)" in capsys.readouterr().out.splitlines()[-1]


def test_the_receiver_of_the_example_is_told() -> None:
    try:
        namespace: dict[str, Any] = {}
        exec(example("budget_threshold_reached)"), namespace)  # noqa: S102
    finally:
        budget_threshold_reached.disconnect(namespace["tell_the_team"])
