from __future__ import annotations

import pytest
from django.test import RequestFactory

from django_qstash_llm.server.targets import Target, headers_of, target_of


def target(path: str, raw: str = "", **meta: str) -> Target:
    request = RequestFactory().get(path)
    request.META.update(meta)
    if raw:
        request.META["RAW_URI"] = raw
    return target_of(request, "/v2/publish/")


@pytest.mark.parametrize(
    ("raw", "destination"),
    [
        ("/v2/publish/https://a.test/p", "https://a.test/p"),
        ("/qstash/v2/publish/https://a.test/p?x=1&y=2", "https://a.test/p?x=1&y=2"),
        ("/q/v2/publish/https://a.test/a%2Fb%20c?d=%2F", "https://a.test/a%2Fb%20c?d=%2F"),
        ("http://site.test/q/v2/publish/https://a.test//p", "https://a.test//p"),
        ("/q/v2/publish/https:/a.test/p", "https://a.test/p"),
        ("/q/v2/publish/http:/a.test/p", "http://a.test/p"),
        ("/q/v2/publish/https%3A%2F%2Fa.test", "https%3A%2F%2Fa.test"),
        ("/q/v2/publish/https://a.test/\xc3\xa9", "https://a.test/%C3%A9"),
        ("/q/v2/publish/https://a.test/p?qstash_token=t&x=1", "https://a.test/p?x=1"),
        ("/q/v2/publish/https://a.test/p?Upstash-Delay=1s", "https://a.test/p"),
        ("/q/v2/publish/https://a.test/p?x", "https://a.test/p?x"),
        ("/q/v2/publish/https://a.test/v2/publish/b", "https://a.test/v2/publish/b"),
        ("/q/v2/publish/api/llm", "api/llm"),
        ("/q/v2/publish/api/llm?x=1", "api/llm"),
        ("/q/v2/publish/a-group?hub=1&upstash-delay=1s", "a-group"),
    ],
)
def test_the_destination_is_read_off_the_raw_request_line(raw: str, destination: str) -> None:
    path = raw.removeprefix("http://site.test").replace("\xc3\xa9", "%C3%A9")
    assert target(path, raw).destination == destination


@pytest.mark.parametrize(
    ("path", "destination"),
    [
        ("/q/v2/publish/https://a.test/p?x=1", "https://a.test/p?x=1"),
        ("/q/v2/publish/https://a.test/a%20b%25c?x=%20", "https://a.test/a%20b%25c?x=%20"),
        ("/q/v2/publish/https://a.test/%C3%A9", "https://a.test/%C3%A9"),
        ("/q/v2/publish/https://a.test/a%3Fb", "https://a.test/a%3Fb"),
    ],
)
def test_without_a_raw_request_line_the_decoded_path_serves(path: str, destination: str) -> None:
    assert target(path).destination == destination


def test_a_path_that_was_rewritten_on_the_way_counts_more_than_the_request_line() -> None:
    assert target("/q/v2/publish/https://a.test/new", "/old").destination == "https://a.test/new"


def test_an_asgi_server_tells_the_raw_path_in_its_scope() -> None:
    request = RequestFactory().get("/v2/publish/https://a.test/a%2Fb?x=1")
    request.scope = {"raw_path": b"/v2/publish/https://a.test/a%2Fb"}  # type: ignore[attr-defined]
    assert target_of(request, "/v2/publish/").destination == "https://a.test/a%2Fb?x=1"


def test_options_may_stand_in_the_query_and_headers_win_over_them() -> None:
    request = RequestFactory().get(
        "/v2/publish/https://a.test?upstash-retries=3&Upstash-Delay=10s",
        headers={"Upstash-Retries": "1"},
    )
    headers = headers_of(request, target_of(request, "/v2/publish/"))
    assert headers["upstash-retries"] == "1"
    assert headers["upstash-delay"] == "10s"


def test_header_forward_forwards_all_but_what_is_ours_or_the_connections() -> None:
    request = RequestFactory().get(
        "/v2/publish/https://a.test",
        headers={
            "Upstash-Header-Forward": "true",
            "Authorization": "Bearer ours",
            "Host": "site.test",
            "X-Event": "push",
            "Upstash-Telemetry-Sdk": "x",
        },
    )
    headers = headers_of(request, target_of(request, "/v2/publish/"))
    forwarded = {name for name in headers if name.startswith("upstash-forward-")}
    assert forwarded == {"upstash-forward-x-event"}
