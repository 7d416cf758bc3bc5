"""The description is true: of the routes, and, by schemathesis' judgement, of every answer."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import schemathesis
from django.urls import URLPattern, resolve
from hypothesis import strategies as st
from schemathesis.engine import events, from_schema

from django_qstash_llm.server import filters, openapi, urls
from django_qstash_llm.server.serving import Server
from django_qstash_llm.server.views.base import UnknownView

from .conftest import TOKEN, Api, Wire

METHODS = ["get", "post", "put", "patch", "delete"]
# More of them by hand: QSTASH_EXAMPLES=500.
EXAMPLES = int(os.environ.get("QSTASH_EXAMPLES", "3"))

CONFIG = {
    "seed": int(os.environ.get("QSTASH_SEED", "20261123")),
    "continue-on-failure": True,
    "auth": {"openapi": {"token": {"bearer": TOKEN}}},
    "generation": {"max-examples": EXAMPLES, "deterministic": EXAMPLES < 50, "database": "none"},
    "phases": {
        # The others are looked at one by one above.
        "coverage": {"unexpected-methods": ["TRACE"]},
        "stateful": {"generation": {"max-examples": EXAMPLES * 2}},
    },
    "checks": {
        # 411: the client sends an empty form in chunks. 412: the limits are the site's, so no
        # schema has them all.
        "positive_data_acceptance": {"expected-statuses": ["2xx", 404, 411, 412]},
    },
}


def described() -> dict[str, Any]:
    return openapi.description("/qstash")


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in described()["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation


def view_of(path: str) -> Any:
    filled = path.replace("{destination}", "https://host.test/").replace("{", "").replace("}", "")
    return resolve(f"/qstash{filled}").func.view_class


def routed_views() -> set[Any]:
    patterns: list[URLPattern] = urls.urlpatterns
    return {pattern.callback.view_class for pattern in patterns} - {UnknownView}


def test_every_route_is_described_and_every_described_path_is_routed() -> None:
    assert {view_of(path) for path in described()["paths"]} == routed_views()


@pytest.mark.parametrize("path", described()["paths"])
def test_the_described_methods_are_those_of_the_view(path: str) -> None:
    view = view_of(path)
    taken = {method for method in METHODS if method in view.http_method_names}
    assert set(described()["paths"][path]) == {method for method in taken if hasattr(view, method)}


@pytest.mark.parametrize("path", described()["paths"])
def test_other_methods_are_answered_405_in_json(api: Api, path: str) -> None:
    filled = re.sub(r"\{\w+\}", "a", path)
    taken = set(described()["paths"][path])
    for method in (
        {*METHODS, "options", "trace", "head", "brew"}
        - taken
        - ({"head"} if "get" in taken else set())
    ):
        answer = api.call(method.upper(), filled)
        assert answer.status_code == 405, method
        assert {each.lower() for each in answer["Allow"].split(", ")} - {"head"} == taken
        if method != "head":
            assert answer.json() == {"error": f'Method "{method.upper()}" not allowed.'}


def test_it_is_served_without_a_token(api: Api) -> None:
    api.token = ""
    answer = api.get("/openapi.json")
    assert answer.status_code == 200
    assert answer["Content-Type"] == "application/json"
    assert answer.json() == described()


def test_names_of_calls_are_unique_and_links_lead_to_them() -> None:
    names = [operation["operationId"] for *_, operation in calls()]
    assert len(set(names)) == len(names)
    links = [
        link["operationId"]
        for *_, operation in calls()
        for answer in operation["responses"].values()
        for link in answer.get("links", {}).values()
    ]
    assert set(links) <= set(names)


def test_every_call_can_be_refused_for_its_token_and_for_want_of_a_database() -> None:
    for method, path, operation in calls():
        if path == "/openapi.json":
            continue
        told = set(operation["responses"])
        assert {"401", "503"} <= told
        assert ("403" in told) == (method != "get")


def test_caps_are_those_of_the_settings(configure: Callable[..., None]) -> None:
    configure(MAX_BATCH_MESSAGES=7)
    body = described()["paths"]["/v2/batch"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["maxItems"] == 7


@pytest.mark.parametrize(
    ("method", "path", "table"),
    [
        ("delete", "/v2/messages", filters.MESSAGES),
        ("get", "/v2/dlq", filters.DEAD_LETTERS),
        ("get", "/v2/logs", filters.LOGS),
    ],
)
def test_every_filter_is_described(method: str, path: str, table: dict[str, Any]) -> None:
    parameters = described()["paths"][path][method]["parameters"]
    assert set(table) <= {each["name"] for each in parameters}


def strict(schema: Any) -> Any:
    """The same, and nothing beside what is described."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def strict_about_answers(description: dict[str, Any]) -> dict[str, Any]:
    description["components"]["schemas"] = {
        name: schema if name in {"BatchItem", "Endpoint"} else strict(schema)
        for name, schema in description["components"]["schemas"].items()
    }
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"] = strict(operation["responses"])
    return description


def sample(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from(values)


URLS = sample("https://host.test", "http://host.test:8080/a//b/", "https://down.test/%2F~x")
FORMATS = {
    "public-url": URLS,
    "destination": URLS,
    "go-duration": sample("1ms", "1.5s", "2m10s", "1d"),
    "retry-delay": sample("1000", "pow(2, retried) * 1000", "max(1, -retried / 2)"),
    "printable": st.text("ab é\U0001f600/&", min_size=1, max_size=9),
    "cron": sample("* * * * *", "0 0 1 1 *", "CRON_TZ=Europe/Berlin 0,30 9-17 * * 1-5"),
    "flow-control-value": sample("rate=1", "parallelism=2, rate=10, period=60s"),
}
for name, strategy in FORMATS.items():
    schemathesis.openapi.format(name, strategy)


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    # The destination is the one parameter that goes into the path as it is.
    for name, value in (case.path_parameters or {}).items():
        if unquote(str(value)).startswith("http"):
            case.path_parameters[name] = unquote(value)


# What the wire demands and no schema says: call, and what the answer says to it.
NO_SCHEMA_SAYS = {
    ("pinFlowControlKey", "give parallelism, rate or both"),
    ("removeEndpoints", "a url, a name or both"),
    ("setUrlGroupHeaders", "Write Upstash-Forward-"),
    ("setUrlGroupHeaders", "is not a header name"),
}


def is_excused(call: str, title: str, case: Any, response: Any) -> bool:
    answer, headers = response.content.decode(), case.headers or {}
    if title == "Schema-valid request rejected":
        return (
            any(call == name and text in answer for name, text in NO_SCHEMA_SAYS)
            # Key and value go together.
            or len({"Upstash-Flow-Control-Key", "Upstash-Flow-Control-Value"} & set(headers)) == 1
            # 2.0 is a whole number to JSON Schema; to QStash, which reads it as Go does, it is not.
            or (call == "upsertQueue" and isinstance(case.body["parallelism"], float))
        )
    if title == "Schema-violating request accepted":
        # A bad item of a batch is refused in its place; the others are not touched by that.
        # An empty header is one that is not given, and unknown ones are not ours.
        return (
            (call == "batch" and '"error":' in answer)
            or any(not value for value in headers.values())
            or "x-schemathesis-unknown-property" in headers
        )
    return False


class Failures(dict[str, str]):
    """What went wrong, each kind of it once, with a way to see it again."""

    def note(self, event: Any) -> None:
        if isinstance(event, events.NonFatalError | events.FatalError):
            error = event.value if isinstance(event, events.NonFatalError) else event.exception
            self.setdefault(f"error {type(error).__name__}", str(error)[:2000])
        if isinstance(event, events.ScenarioFinished):
            for case_id, checks in event.recorder.checks.items():
                for check in filter(lambda check: check.failure_info, checks):
                    self.note_failure(event.recorder, case_id, check)

    def note_failure(self, recorder: Any, case_id: str, check: Any) -> None:
        case, failure = recorder.cases[case_id].value, check.failure_info.failure
        answer = recorder.interactions[case_id].response
        self.setdefault(
            f"{case.operation.label} {check.name} {failure.title}",
            f"{failure.message}\n{case.as_curl_command()}\n{answer.content[:300]!r}",
        )


@pytest.mark.once
@pytest.mark.timeout(900)
@pytest.mark.django_db(transaction=True)
# It shows an example that failed, however long.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_every_answer_is_as_described(wire: Wire, configure: Callable[..., None]) -> None:
    configure(MAX_BATCH_MESSAGES=3)
    wire.answer = lambda request: httpx.Response(500 if "down" in str(request.url) else 200)
    failures, answered = Failures(), Counter[str]()
    with Server() as server:
        config = schemathesis.Config.from_dict(CONFIG | {"base-url": server.url})
        told = strict_about_answers(openapi.description(""))
        schema = schemathesis.openapi.from_dict(told, config=config)

        @schema.hook
        def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
            name = case.operation.definition.raw["operationId"]
            return not is_excused(name, failure.title, case, response)

        @schema.hook
        def filter_case(context: Any, case: Any) -> bool:
            # A request line ends at 64 kB, and with it the conversation.
            return len(json.dumps(case.query, default=str)) < 30_000

        for event in from_schema(schema).execute():
            failures.note(event)
            if isinstance(event, events.ScenarioFinished):
                answered[event.phase.value] += len(event.recorder.interactions)
    assert not failures, "\n\n".join(f"{what}\n{how}" for what, how in sorted(failures.items()))
    assert set(answered) >= {"coverage", "fuzzing", "stateful"}
    assert answered.total() > 1000
