"""One name, several destinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import qstash
from django.http import HttpResponse

from django_qstash_llm.server.models import Endpoint, Message, Queue, UrlGroup
from django_qstash_llm.server.models.url_group import MOST_ENDPOINTS
from django_qstash_llm.server.serving import Server

from .conftest import CALLBACK, TOKEN, Api, Clock
from .test_models import at_once
from .test_serving import connected

A, B, C = (f"https://{name}.test/hook" for name in "abc")
OTHER = {"other": {"TOKEN": "the-token-of-somebody-else-0001"}}


def put(api: Api, *endpoints: str | dict[str, Any], name: str = "group") -> HttpResponse:
    items = [{"url": each} if isinstance(each, str) else each for each in endpoints]
    return api.post(f"/v2/topics/{name}/endpoints", {"endpoints": items})


def remove(api: Api, *endpoints: dict[str, str], name: str = "group") -> HttpResponse:
    return api.delete(f"/v2/topics/{name}/endpoints", {"endpoints": list(endpoints)})


def endpoints(api: Api, name: str = "group") -> list[dict[str, str]]:
    answer = api.get(f"/v2/topics/{name}")
    assert answer.status_code == 200, answer.content
    return answer.json()["endpoints"]


def patch(api: Api, headers: Any, name: str = "group") -> HttpResponse:
    return api.call("PATCH", f"/v2/topics/{name}", {"headers": headers})


@pytest.fixture
def group(api: Api) -> Api:
    assert put(api, {"url": A, "name": "first"}, B).status_code == 200
    return api


# --- the group itself --------------------------------------------------------------------------


def test_a_group_is_made_by_its_first_endpoint_and_read_back(group: Api) -> None:
    record = group.get("/v2/topics/group").json()
    assert record == {
        "name": "group",
        "createdAt": record["createdAt"],
        "updatedAt": record["updatedAt"],
        "endpoints": [{"name": "first", "url": A}, {"url": B}],
    }
    assert group.get("/v2/topics").json() == [record]


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        pytest.param({"url": C}, [("first", A), ("", B), ("", C)], id="a new one"),
        pytest.param({"url": B}, [("first", A), ("", B)], id="the same again"),
        pytest.param({"url": A}, [("first", A), ("", B)], id="its name stays"),
        pytest.param({"url": A, "name": None}, [("first", A), ("", B)], id="no name"),
        pytest.param({"url": B, "name": "second"}, [("first", A), ("second", B)], id="named"),
        pytest.param({"url": A, "name": "1st"}, [("1st", A), ("", B)], id="renamed"),
        pytest.param({"url": C, "name": "first"}, [("first", C), ("", B)], id="moved"),
        pytest.param({"url": B, "name": "first"}, [("first", B)], id="moved onto another"),
    ],
)
def test_an_endpoint_goes_by_its_name_or_else_by_its_url(
    group: Api, endpoint: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    assert put(group, endpoint).status_code == 200
    assert [(each.get("name", ""), each["url"]) for each in endpoints(group)] == expected


@pytest.mark.parametrize(
    ("endpoint", "left"), [({"url": A}, [B]), ({"name": "first"}, [B]), ({"url": C}, [A, B])]
)
def test_an_endpoint_is_removed_by_url_or_name(
    group: Api, endpoint: dict[str, str], left: list[str]
) -> None:
    assert remove(group, endpoint).status_code == 200
    assert [each["url"] for each in endpoints(group)] == left


def test_a_group_goes_with_its_last_endpoint(group: Api) -> None:
    assert remove(group, {"url": A}, {"url": B}).status_code == 200
    assert group.get("/v2/topics/group").status_code == 404
    assert group.get("/v2/topics").json() == []
    assert remove(group, {"url": A}).status_code == 200


def test_a_deleted_group_is_gone_and_may_be_deleted_again(group: Api) -> None:
    for _ in range(2):
        assert group.delete("/v2/topics/group").status_code == 200
    assert group.get("/v2/topics/group").status_code == 404
    assert not Endpoint.objects.exists()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "endpoints is not a list of at least one"),
        ({"endpoints": []}, "endpoints is not a list of at least one"),
        ({"endpoints": [A]}, "an object with a url"),
        ({"endpoints": [{}]}, "an object with a url"),
        ({"endpoints": [{"url": 1}]}, "an object with a url"),
        ({"endpoints": [{"name": "x"}]}, "invalid endpoint url: endpoint has invalid scheme"),
        ({"endpoints": [{"url": "a.test"}]}, "add http:// or https://"),
        ({"endpoints": [{"url": "api/llm"}]}, "add http:// or https://"),
        ({"endpoints": [{"url": "http://127.0.0.1/"}]}, "resolves to a loopback address"),
        ({"endpoints": [{"url": "https://a.test/../b"}]}, "dot segments"),
        ({"endpoints": [{"url": A, "name": "x" * 257}]}, "invalid endpoint"),
        ({"endpoints": [{"url": A, "name": "\x00"}]}, "invalid endpoint"),
        ({"endpoints": [{"url": A + "\x00"}]}, "invalid endpoint"),
        ({"endpoints": [{"url": C}, {"url": "ftp://c.test"}]}, "invalid scheme"),
        ([], "the body is not an object"),
    ],
)
def test_bad_endpoints_are_refused_and_none_is_stored(api: Api, body: Any, problem: str) -> None:
    answer = api.post("/v2/topics/group/endpoints", body)
    assert (answer.status_code, problem in answer.json()["error"]) == (400, True), answer.content
    assert not UrlGroup.objects.exists()


def test_a_name_that_could_not_travel_is_refused(api: Api) -> None:
    assert put(api, A, name="a b").status_code == 400
    assert api.get("/v2/topics/a%20b").status_code == 404


def test_a_group_has_so_many_endpoints_and_no_more(api: Api) -> None:
    urls = [f"{A}/{number}" for number in range(MOST_ENDPOINTS)]
    assert put(api, *urls).status_code == 200
    answer = put(api, B)
    assert answer.status_code == 412
    assert answer.json() == {"error": "quota maxEndpointsPerUrlGroup exceeded"}
    assert len(endpoints(api)) == MOST_ENDPOINTS


@pytest.mark.django_db(transaction=True)
def test_everybody_who_adds_at_once_is_heard() -> None:
    answers = at_once(8, lambda number: put(Api(), f"{A}/{number}", B).status_code)
    assert answers == [200] * 8
    assert UrlGroup.objects.count() == 1
    assert Endpoint.objects.count() == 9


def delete(api: Api, *endpoints: dict[str, str]) -> HttpResponse:
    return api.delete("/v2/topics/group")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("removal", [remove, delete])
def test_adding_and_removing_at_once_leaves_no_empty_group(
    removal: Callable[..., HttpResponse],
) -> None:
    def work(number: int) -> list[int]:
        change = put if number % 2 else removal
        return [change(Api(), {"url": A}).status_code for _ in range(5)]

    assert at_once(8, work) == [[200] * 5] * 8
    assert UrlGroup.objects.count() == Endpoint.objects.count()


# --- publishing --------------------------------------------------------------------------------


def test_what_is_published_to_a_group_goes_to_each_of_its_endpoints(group: Api) -> None:
    answer = group.publish("group", b"hello", Upstash_Retries="1", Upstash_Callback=CALLBACK)
    assert answer.status_code == 200
    first, second = answer.json()
    assert (first, second) == (
        {"messageId": first["messageId"], "url": A},
        {"messageId": second["messageId"], "url": B},
    )
    record = group.get(f"/v2/messages/{first['messageId']}").json()
    assert record == {
        "messageId": first["messageId"],
        "url": A,
        "topicName": "group",
        "endpointName": "first",
        "method": "POST",
        "header": record["header"],
        "body": "hello",
        "maxRetries": 1,
        "notBefore": record["notBefore"],
        "createdAt": record["createdAt"],
        "callback": CALLBACK,
        "callerIP": "127.0.0.1",
    }
    other = group.get(f"/v2/messages/{second['messageId']}").json()
    assert (other["url"], other["topicName"], "endpointName" in other) == (B, "group", False)


def test_a_group_takes_a_query_with_options(group: Api) -> None:
    assert group.post("/v2/publish/group?upstash-retries=0", b"x").status_code == 200
    assert set(Message.objects.values_list("retries", flat=True)) == {0}


def test_a_group_is_enqueued_endpoint_by_endpoint(group: Api) -> None:
    answer = group.post("/v2/enqueue/q/group", b"x")
    assert [each["url"] for each in answer.json()] == [A, B]
    assert {message.queue for message in Message.objects.all()} == {Queue.objects.get()}


def test_duplicates_are_told_endpoint_by_endpoint(group: Api) -> None:
    first = group.publish("group", Upstash_Deduplication_Id="once").json()
    put(group, C)
    answer = group.publish("group", Upstash_Deduplication_Id="once")
    assert answer.status_code == 200
    *seen, new = answer.json()
    assert seen == [each | {"deduplicated": True} for each in first]
    assert (new["url"], "deduplicated" in new) == (C, False)
    assert group.publish("group", Upstash_Deduplication_Id="once").status_code == 202
    assert Message.objects.count() == 3


def test_a_group_in_a_batch_is_answered_with_a_list_in_its_place(group: Api) -> None:
    items = [
        {"destination": A, "body": "x"},
        {"destination": "group", "body": "x", "headers": {"Upstash-Retries": ["1"]}},
        {"destination": "nobody"},
        {"destination": "group", "queue": "q"},
        {"destination": ["group"]},
    ]
    answer = group.post("/v2/batch", items)
    assert answer.status_code == 200
    url, listed, unknown, queued, nothing = answer.json()
    assert set(url) == {"messageId"}
    assert [each["url"] for each in listed] == [each["url"] for each in queued] == [A, B]
    assert unknown == {"error": "topic nobody not found"}
    assert nothing == {"error": "missing destination"}
    for each in listed:
        assert Message.objects.get(message_id=each["messageId"]).retries == 1
    assert Message.objects.count() == 5


def test_a_batch_makes_only_so_many_messages(group: Api, configure: Callable[..., None]) -> None:
    configure(MAX_BATCH_MESSAGES=3)
    assert (
        group.post("/v2/batch", [{"destination": "group"}, {"destination": A}]).status_code == 200
    )
    answer = group.post("/v2/batch", [{"destination": "group"}] * 2)
    assert answer.status_code == 400
    assert "up to 3 messages" in answer.json()["error"]
    assert Message.objects.count() == 3


def test_an_unknown_group_is_not_found(api: Api) -> None:
    answer = api.publish("nobody")
    assert answer.status_code == 404
    assert answer.json() == {"error": "topic nobody not found"}


def test_an_endpoint_that_may_be_no_longer_called_refuses_the_publish(
    api: Api, configure: Callable[..., None]
) -> None:
    configure(ALLOW_LOOPBACK=True)
    put(api, A, "http://127.0.0.1:9/")
    configure(ALLOW_LOOPBACK=False)
    answer = api.publish("group")
    assert answer.status_code == 400
    assert "loopback" in answer.json()["error"]
    assert not Message.objects.exists()


# --- default headers ---------------------------------------------------------------------------


def header(message: dict[str, Any], name: str, api: Api) -> Any:
    return api.get(f"/v2/messages/{message['messageId']}").json().get(name)


def test_a_query_that_is_not_ours_is_no_part_of_the_groups_name(group: Api) -> None:
    answers = group.post("/v2/publish/group?hub=1&upstash-retries=1", b"x").json()
    assert [answer["url"] for answer in answers] == [A, B]
    assert set(Message.objects.values_list("url", "retries")) == {(A, 1), (B, 1)}


def test_default_headers_are_what_a_publish_says_unless_it_says_otherwise(group: Api) -> None:
    headers = {
        "upstash-retries": "1",
        "Upstash-Forward-X-Trace": ["a", "b"],
        "Upstash-Forward-Authorization": "Bearer sk-canary",
        "Content-Type": "text/plain",
    }
    assert patch(group, headers).status_code == 200
    before = group.publish("group").json()[0]
    assert header(before, "maxRetries", group) == 1
    assert header(before, "header", group) == {
        "Authorization": ["Bearer sk-canary"],
        "Content-Type": ["application/json"],
        "X-Trace": ["a, b"],
    }
    after = group.publish("group", Upstash_Retries="5", Upstash_Forward_X_Trace="mine").json()[0]
    assert header(after, "maxRetries", group) == 5
    assert header(after, "header", group)["X-Trace"] == ["mine"]
    [[batched, _]] = group.post("/v2/batch", [{"destination": "group"}]).json()
    assert header(batched, "header", group)["Content-Type"] == ["text/plain"]
    item = {"destination": "group", "headers": {"UPSTASH-RETRIES": "7"}}
    [[batched, _]] = group.post("/v2/batch", [item]).json()
    assert header(batched, "maxRetries", group) == 7


def test_the_content_type_of_a_group_counts_where_the_request_has_none(group: Api) -> None:
    patch(group, {"Content-Type": "text/plain"})
    message, _ = group.publish("group", b"").json()
    assert header(message, "header", group) == {"Content-Type": ["text/plain"]}


def test_a_group_may_forward_all_headers_of_a_webhook(group: Api) -> None:
    patch(group, {"Upstash-Header-Forward": ["true"]})
    message, _ = group.publish("group", X_Github_Event="push").json()
    assert header(message, "header", group)["X-Github-Event"] == ["push"]


def test_new_default_headers_take_the_place_of_the_old(group: Api) -> None:
    patch(group, {"Upstash-Retries": "1"})
    patch(group, {"Upstash-Delay": "1m"})
    message, _ = group.publish("group").json()
    assert header(message, "maxRetries", group) == 3
    patch(group, {})
    assert UrlGroup.objects.get().default_headers == {}


def test_keys_in_default_headers_are_kept_apart_and_shown_nowhere(group: Api) -> None:
    patch(group, {"Upstash-Forward-Authorization": "Bearer sk-canary"})
    row = UrlGroup.objects.get()
    assert row.headers == {"Upstash-Forward-Authorization": "REDACTED"}
    assert "canary" not in group.get("/v2/topics/group").content.decode()


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ("Upstash-Retries: 3", 400, "headers is not an object"),
        (None, 400, "headers is not an object"),
        ({"Upstash-Retries": "many"}, 400, "Upstash-Retries"),
        ({"Upstash-Retries": 3}, 400, "not a string"),
        ({"Upstash-Delay": ["1"]}, 400, "missing unit in duration"),
        ({"Upstash-Callback": "http://127.0.0.1/"}, 400, "loopback"),
        ({"Upstash-Forward-X": "caf\xe9"}, 400, "not printable ASCII"),
        ({"Upstash-Unknown": "\x00"}, 400, "not printable ASCII"),
        ({"X-Trace": "t"}, 400, "Write Upstash-Forward-X-Trace"),
        ({"Upstash-Delay": "9999d"}, 412, "quota maxDelay exceeded"),
    ],
)
def test_default_headers_that_could_not_be_read_are_refused(
    group: Api, headers: Any, status: int, problem: str
) -> None:
    answer = patch(group, headers)
    assert (answer.status_code, problem in answer.json()["error"]) == (status, True), answer.content
    assert UrlGroup.objects.get().default_headers == {}


def test_there_is_no_group_without_endpoints_to_set_headers_of(api: Api) -> None:
    answer = patch(api, {"Upstash-Retries": "1"})
    assert answer.status_code == 404
    assert answer.json() == {"error": "topic group not found"}


# --- whose -------------------------------------------------------------------------------------


def test_each_account_has_its_own_groups(group: Api, configure: Callable[..., None]) -> None:
    configure(ACCOUNTS=OTHER)
    other = Api()
    other.token = OTHER["other"]["TOKEN"]
    assert other.get("/v2/topics").json() == []
    assert other.get("/v2/topics/group").status_code == 404
    assert other.publish("group").status_code == 404
    assert patch(other, {}).status_code == 404
    assert put(other, C).status_code == 200
    other.delete("/v2/topics/group")
    remove(other, {"url": A})
    assert [each["url"] for each in endpoints(group)] == [A, B]


# --- the official SDK --------------------------------------------------------------------------


@pytest.fixture
def sdk(transactional_db: None, qstash_server: dict[str, Any]) -> Iterator[qstash.QStash]:
    with Server() as server, connected(server.url, TOKEN) as sdk:
        yield sdk


def test_the_sdk_can_do_all_of_it(sdk: qstash.QStash, clock: Clock) -> None:
    sdk.url_group.delete("group")
    sdk.url_group.upsert_endpoints("group", [{"url": A, "name": "first"}, {"url": B}])
    sdk.url_group.remove_endpoints("group", [{"url": B}])
    [listed] = sdk.url_group.list()
    found = sdk.url_group.get("group")
    assert listed == found
    assert [(each.name, each.url) for each in found.endpoints] == [("first", A)]
    [published] = sdk.message.publish(url_group="group", body="x", delay="1h")
    assert published.url == A
    message = sdk.message.get(published.message_id)
    assert (message.url_group, message.endpoint) == ("group", "first")
    [[batched]] = sdk.message.batch([{"url_group": "group", "body": "x"}])
    assert (batched.url, batched.deduplicated) == (A, False)
