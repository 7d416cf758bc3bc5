from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from django.db import connection
from django.http import HttpResponse
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_qstash_llm.server import counting
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import (
    Message,
    Queue,
)
from django_qstash_llm.server.page import QUIET_PATHS

from .conftest import PROVIDER, TOKEN, Api, Wire

MARKUP = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def served_as_the_development_server_does(settings: Any, db: None) -> None:
    settings.ROOT_URLCONF = "django_qstash_llm.server.serving_urls"
    settings.MIDDLEWARE = []


@pytest.fixture
def api(db: None) -> Api:
    return Api(prefix="")


def look(path: str = "/", *, host: str = "localhost:8080", **extra: Any) -> HttpResponse:
    return Client().get(path, headers={"Host": host}, **extra)


def text_of(answer: HttpResponse) -> str:
    """What a reader sees, with spaces between the cells."""
    return " ".join(re.sub(r"<[^>]+>", " ", answer.content.decode()).split())


# --- who may see it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "LOCALHOST.", "x.localhost:1", "127.0.0.1:80", "[::1]:80"],
)
@pytest.mark.parametrize("path", sorted(QUIET_PATHS))
def test_it_is_shown_to_this_machine_by_its_own_names(path: str, host: str) -> None:
    assert look(path, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.test", "localhost.evil.test", "192.168.1.5:80", "[::]", "[::1", "127.0.0.1.evil"],
)
@pytest.mark.parametrize("path", sorted(QUIET_PATHS))
def test_by_another_name_it_is_not_served(path: str, host: str) -> None:
    answer = look(path, host=host)
    assert answer.status_code == 403
    assert "Ask for this page by localhost" in answer.content.decode()


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"REMOTE_ADDR": "127.0.0.1"}, 200),
        ({"REMOTE_ADDR": "::1"}, 200),
        ({"REMOTE_ADDR": "::ffff:127.0.0.1"}, 200),
        ({"REMOTE_ADDR": "192.168.1.5"}, 403),
        ({"REMOTE_ADDR": ""}, 403),
        ({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, 403),
        ({"HTTP_FORWARDED": "for=127.0.0.1"}, 403),
    ],
)
def test_others_are_told_that_it_is_not_for_them(extra: dict[str, str], status: int) -> None:
    answer = look(**extra)
    assert answer.status_code == status
    if status == 403:
        assert answer.content.decode().startswith("This page is")


def test_a_site_that_mounts_the_api_does_not_serve_it(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.urls"
    for path in QUIET_PATHS:
        assert look(f"/qstash{path}").status_code == 404


def test_nothing_is_changed_by_it() -> None:
    for path in QUIET_PATHS:
        assert Client(headers={"Host": "localhost"}).post(path).status_code == 405


def test_the_api_is_served_beside_it(api: Api) -> None:
    assert api.get("/v2/queues").json() == []


# --- how it is served ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(QUIET_PATHS))
def test_nothing_may_run_in_it_but_its_own_files(path: str) -> None:
    answer = look(path)
    for directive in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
    ):
        assert directive in answer["Content-Security-Policy"]
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert answer["Cache-Control"] == "no-cache, private"
    assert not re.search(rb"<style|\sstyle=|\son\w+=|<script(?! src=)", answer.content)


def test_its_files_are_what_the_page_asks_for() -> None:
    asked = re.findall(r'(?:src|href)="(/[^"]+)"', look().content.decode())
    types = {path: look(path)["Content-Type"] for path in asked}
    assert types == {"/page/page.js": "text/javascript", "/page/page.css": "text/css"}


def test_without_scripts_it_comes_again_by_itself() -> None:
    assert '<noscript><meta http-equiv="refresh"' in look().content.decode()


def test_the_fragment_is_what_of_the_page_changes(api: Api) -> None:
    api.enqueue("summaries")
    fragment = look("/page/fragment").content.decode()
    assert fragment in look().content.decode()
    assert "<html" not in fragment


def test_as_long_as_nothing_happens_nothing_is_sent(api: Api) -> None:
    first = look("/page/fragment")
    again = look("/page/fragment", HTTP_IF_NONE_MATCH=first["ETag"])
    assert (again.status_code, again.content, again["ETag"]) == (304, b"", first["ETag"])
    assert "default-src 'none'" in again["Content-Security-Policy"]
    api.enqueue("summaries")
    changed = look("/page/fragment", HTTP_IF_NONE_MATCH=first["ETag"])
    assert changed.status_code == 200


# --- what it shows -------------------------------------------------------------------------------


def test_nothing_to_show_is_said() -> None:
    shown = text_of(look())
    for sentence in ("No queues.", "Nothing is in flight.", "Nothing waits.", "No dead letters."):
        assert sentence in shown


def test_it_shows_what_goes_on(api: Api, engine: Engine, wire: Wire) -> None:
    wire.answers(httpx.Response(500))
    api.published(Upstash_Retries="0")
    engine.deliver_due()
    wire.answers(httpx.Response(200))
    api.published()
    engine.deliver_due()
    api.published(Upstash_Delay="1h")
    Queue.objects.named(["summaries"], account="", now=timezone.now())["summaries"].pause(
        now=timezone.now()
    )
    api.enqueue("summaries")
    flow = {"Upstash_Flow_Control_Key": "openai", "Upstash_Flow_Control_Value": "parallelism=1"}
    [api.published(**flow) for _ in range(2)]
    Message.objects.claim(engine="host/1:7:2", limit=1, now=timezone.now(), lease=30)
    shown = text_of(look())
    assert "in flight 1 waiting 3 delivered 1 dead letters 1" in shown
    assert "summaries 1 1 ‖ paused" in shown
    assert "openai 1 of 1 1 no limit open" in shown
    assert re.search(r"1 of 4 in flight since [\d:]{8}, held by host, process 7", shown)
    assert "1 of 4 queue summaries is paused" in shown
    assert "1 of 4 flow control openai: 1 of 1 in flight" in shown
    assert re.search(r"1 of 4 delayed until (\S+ )?[\d:]{8}", shown)
    assert "status 500" in shown
    assert "✓ DELIVERED" in shown
    assert "Times are" in shown


def test_foreign_text_is_text_and_keys_and_bodies_are_not_shown(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(
        httpx.Response(500, text="canary", headers={"X-M": "canary"}),
        httpx.ConnectError(MARKUP),
    )
    secret = {"Upstash_Forward_Authorization": "Bearer canary", "Upstash_Retries": "0"}
    for _ in range(2):
        api.published(body=b"canary", **secret)
        engine.deliver_due()
    api.published(f"{PROVIDER}?key=canary", Upstash_Delay="1h", **secret)
    for path in ("/", "/page/fragment"):
        content = look(path).content.decode()
        assert "canary" not in content
        assert MARKUP not in content
        assert TOKEN not in content
    assert "&lt;script&gt;" in content


def test_accounts_are_named_where_there_is_more_than_one(
    api: Api, configure: Callable[..., None]
) -> None:
    api.enqueue("summaries")
    assert "account" not in text_of(look())
    configure(ACCOUNTS={"other": {"TOKEN": "others"}})
    api.token = "others"
    api.enqueue("summaries")
    shown = text_of(look())
    assert "summaries default 1 1 open" in shown
    assert "summaries other 1 1 open" in shown


def test_an_outage_of_the_database_is_said(outage: Any) -> None:
    outage.begin(lambda statement: "qstash_server" in statement)
    answer = look("/page/fragment")
    assert (answer.status_code, answer.content) == (
        503,
        b"The database does not answer (OperationalError).\n",
    )


# --- what it costs -------------------------------------------------------------------------------


def test_it_takes_the_same_queries_however_much_goes_on(
    api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500))

    def queries() -> int:
        number = Queue.objects.count()
        api.published(Upstash_Retries="0")
        engine.deliver_due()
        for _ in range(3):
            api.enqueue(f"q{number}")
        flow = {
            "Upstash_Flow_Control_Key": f"k{number}",
            "Upstash_Flow_Control_Value": "parallelism=1",
        }
        [api.published(**flow) for _ in range(2)]
        api.published(Upstash_Delay="1h")
        Message.objects.claim(engine="host/1:7:2", limit=2, now=timezone.now(), lease=30)
        with CaptureQueriesContext(connection) as captured:
            look("/page/fragment")
        return len(captured)

    assert queries() == queries() == queries() < 24


def test_what_is_more_than_anybody_reads_is_not_counted(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = timezone.now()
    queue = Queue.objects.named(["long"], account="", now=now)["long"]
    rows = [
        Message(
            message_id=f"msg_{number}",
            url=PROVIDER,
            method="POST",
            retries=3,
            timeout=1,
            queue=queue,
            waits_for="queue",
            created_at=now,
            not_before=now,
        )
        for number in range(counting.MOST + 2)
    ]
    Message.objects.bulk_create(rows, batch_size=500)
    shown = text_of(look())
    assert "waiting 10,000+" in shown
    assert "long 10,000+ 1 open" in shown
    assert "turn in queue long, next" in shown
    assert "turn in queue long, 9 before it" in shown
    assert "At most 10 are shown" in shown


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10,000"), (10_001, "10,000+"), (20_002, "10,000+")],
)
def test_a_capped_count_in_words(count: int, words: str) -> None:
    assert counting.in_words(count) == words
