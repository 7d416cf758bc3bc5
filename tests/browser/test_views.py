"""A conversation on a page, over real connections, under WSGI and ASGI."""

from __future__ import annotations

import json
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from django.conf import settings as site_settings
from django.contrib.auth.models import AnonymousUser, User
from django.test import Client, override_settings
from django.urls import reverse

from django_qstash_llm.browser import events as telling
from django_qstash_llm.models import Budget, Conversation, LLMRequest
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER
from tests.test_chat import Upstream, delta, hangs, head, ours, send, sse
from tests.wire import FakeQStash, Wire

from ..openai.conftest import EVENTS, PROVIDER, Streamed, eventually
from .conftest import Reader

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def upstream(transactional_db: None) -> Iterator[Callable[[Any], Upstream]]:
    servers: list[Upstream] = []

    def start(plan: Any) -> Upstream:
        servers.append(Upstream(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def named(told: Iterator[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Without heartbeats."""
    return [(name, data) for name, data in told if name]


# --- as it comes -----------------------------------------------------------------------------


def test_each_chunk_is_told_at_once(reader: Reader, wire: Wire) -> None:
    step = threading.Semaphore(0)
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS, step=step).response()
    with reader.say("  How many?  ") as told:
        for text in ("Forty", "-two."):
            # The provider says nothing more before this one is here.
            assert next((n, d) for n, d in told if n) == ("chunk", text)
            step.release()
        step.release(9)
        [last] = named(told)
    row = LLMRequest.objects.get()
    assert last == ("answered", str(row.uuid))
    assert (row.state, row.completion, row.user) == ("completed", "Forty-two.", User.objects.get())
    assert row.messages[-1] == {"role": "user", "content": "How many?"}
    assert reader.conversation.history()[-1]["content"] == "Forty-two."


def test_nobody_between_may_collect_it(reader: Reader, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    body = {"said": "How many?", "csrfmiddlewaretoken": reader.token}
    response = reader.http.post(reader.path, data=body, headers={"Accept": "text/event-stream"})
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.text.startswith(":\n\n")


def silent(server: Upstream, handler: Any) -> None:
    """Not even a head comes."""
    if select.select([handler.connection], [], [], 20)[0]:
        server.left.set()
    handler.close_connection = True


@pytest.mark.parametrize(("plan", "said"), [(silent, ""), (hangs, "Forty")])
def test_who_leaves_a_silent_provider_has_it_stop_within_two_seconds(
    reader: Reader, upstream: Any, plan: Any, said: str
) -> None:
    server = upstream(plan)
    with server.asked_with():
        with reader.say("How many?") as told:
            if said:
                assert next((n, d) for n, d in told if n) == ("chunk", said)
            # It says nothing, and we say that we are there.
            assert [next(told), next(told)] == [("", None)] * 2
            eventually(lambda: bool(server.ports))
        left_at = time.monotonic()
        assert server.left.wait(10)
        assert time.monotonic() - left_at < 2
        eventually(lambda: LLMRequest.objects.get().state == "cancelled")
    row = LLMRequest.objects.get()
    assert (row.error_code, row.completion) == ("aborted", said)
    assert row.usage["estimated"] is True
    assert (row.input_tokens or 0) > 0
    assert row.output_tokens == -(-len(said) // 4)


def floods(server: Upstream, handler: Any) -> None:
    """Says more than its caller's reader takes, until it is left."""
    head(handler)
    try:
        while True:
            send(handler, sse(delta("x" * 100_000), done=False))
    except OSError:
        server.left.set()
    handler.close_connection = True


def test_who_leaves_while_more_is_written_than_is_read_has_the_provider_stop(
    reader: Reader, upstream: Any
) -> None:
    server = upstream(floods)
    with server.asked_with():
        with reader.say("How many?") as told:
            assert next((n, d) for n, d in told if n)[0] == "chunk"
            time.sleep(0.5)  # for all buffers to be full
        left_at = time.monotonic()
        assert server.left.wait(10)
        assert time.monotonic() - left_at < 2
        eventually(lambda: LLMRequest.objects.get().state == "cancelled")


def test_what_the_provider_refuses_is_told_without_its_reasons(reader: Reader, wire: Wire) -> None:
    body = {"error": {"message": "Organization org-1 has no credit", "code": "insufficient_quota"}}
    wire.hosts[PROVIDER] = lambda request: httpx.Response(429, json=body)
    with reader.say("How many?") as told:
        assert named(told) == [("failed", "No whole answer came. Ask again.")]
    assert LLMRequest.objects.get().error_code == "insufficient_quota"
    page = reader.http.get("/talk/").text
    assert "No whole answer came" in page
    assert "org-1" not in page


def test_stream_that_breaks_keeps_what_came(reader: Reader, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(EVENTS[0], end="").response()
    with reader.say("How many?") as told:
        assert [name for name, _ in named(told)] == ["chunk", "failed"]
    assert "Forty" in reader.http.get("/talk/").text


def test_turn_waits_for_the_one_before_it(reader: Reader, wire: Wire) -> None:
    step = threading.Semaphore(0)
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS, step=step).response()
    with ours(CHAT_TIMEOUT=0.3), reader.say("First?") as told:
        assert next((n, d) for n, d in told if n)[0] == "chunk"
        with reader.say("Second?") as second:
            [(name, sentence)] = named(second)
            assert (name, "still being answered" in sentence) == ("failed", True)
        step.release(9)
        named(told)
    assert LLMRequest.objects.count() == 1


def test_what_a_site_set_up_wrongly_is_for_its_log(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    with ours(HISTORY={"LINES": 3}), reader.say("How many?") as told:
        assert [name for name, _ in named(told)] == ["failed"]
    assert "HISTORY" in caplog.text
    assert not LLMRequest.objects.exists()


def test_fault_of_ours_is_told_and_logged(
    reader: Reader, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise LookupError("inner workings")

    wire.hosts[PROVIDER] = fail
    with reader.say("How many?") as told:
        assert named(told) == [("failed", "No whole answer came. Ask again.")]
    assert "inner workings" in caplog.text
    assert LLMRequest.objects.get().error_code == "unexpected"


# --- what was said ---------------------------------------------------------------------------


def test_history_is_there_when_the_page_is_loaded_again(reader: Reader, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    with reader.say("<b>How many?</b>") as told:
        named(told)
    page = reader.http.get("/talk/").text
    assert "&lt;b&gt;How many?&lt;/b&gt;" in page
    assert "Forty-two." in page


def test_page_is_fit_for_a_strict_policy(reader: Reader) -> None:
    page = reader.http.get("/talk/").text
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", page) == []


def test_durable_question_is_underway_until_its_callback(
    reader: Reader, qstash: FakeQStash, post_callback: Any
) -> None:
    with reader.say("How many?", way="ask") as told:
        [(name, uuid)] = named(told)
    row = LLMRequest.objects.get()
    assert (name, uuid, row.via) == ("asked", str(row.uuid), "publish")
    waiting = reader.http.get(reader.path)
    assert "data-underway" in waiting.text
    headers = {"If-None-Match": waiting.headers["ETag"]}
    assert reader.http.get(reader.path, headers=headers).status_code == 304
    callback = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_1")
    assert post_callback(row, callback).status_code == 200
    answered = reader.http.get(reader.path, headers=headers)
    assert answered.status_code == 200
    assert "Forty-two." in answered.text
    assert "data-underway" not in answered.text


def test_only_the_newest_turns_are_shown(cookie: str) -> None:
    conversation = Conversation.objects.create()
    for number in range(60):
        asked = [{"role": "system", "content": "s"}, {"role": "user", "content": f"no. {number}!"}]
        LLMRequest(
            conversation=conversation, messages=asked, state="completed", completion="Yes."
        ).save_base(raw=True)
    client = Client()
    client.cookies["sessionid"] = cookie
    page = client.get(reverse("django_qstash_llm_browser:conversation", args=[conversation.uuid]))
    assert page.content.count(b"llm-said") == 50
    assert b"no. 9!" not in page.content
    assert b"Earlier turns" in page.content


# --- without JavaScript ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("back", "to"),
    [
        ("/talk/?a=1", "/talk/?a=1"),
        ("https://evil.example/", None),
        ("//evil.example", None),
        ("", None),
    ],
)
def test_form_is_answered_by_the_page_it_came_from(
    reader: Reader, wire: Wire, back: str, to: str | None
) -> None:
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=ANSWER)
    body = {"said": "How many?", "csrfmiddlewaretoken": reader.token, "next": back}
    response = reader.http.post(reader.path, data=body)
    assert (response.status_code, response.headers["Location"]) == (302, to or reader.path)
    assert LLMRequest.objects.get().completion == "Forty-two."
    assert "Forty-two." in reader.http.get("/talk/").text


def test_form_whose_question_fails_says_so_on_the_page(reader: Reader, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: httpx.Response(500)
    body = {"said": "How many?", "csrfmiddlewaretoken": reader.token, "next": "/talk/"}
    assert reader.http.post(reader.path, data=body).status_code == 302
    assert "No whole answer came" in reader.http.get("/talk/").text


def test_what_no_budget_has_room_for_is_not_asked_and_says_so(reader: Reader, wire: Wire) -> None:
    Budget.objects.create(name="spent", amount=0)
    body = {"said": "How many?", "csrfmiddlewaretoken": reader.token, "next": "/talk/"}
    response = reader.http.post(reader.path, data=body)
    assert (response.status_code, "spent. Ask again later" in response.text) == (429, True)
    with reader.say("How many?") as told:
        assert named(told) == [("failed", response.text)]
    assert LLMRequest.objects.count() == 0
    assert wire.to(PROVIDER) == []


def test_form_asks_in_the_background(reader: Reader, qstash: FakeQStash) -> None:
    body = {"said": "How many?", "csrfmiddlewaretoken": reader.token, "way": "ask"}
    assert reader.http.post(reader.path, data=body).status_code == 302
    assert LLMRequest.objects.get().via == "publish"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "said"),
        ({"said": " \n"}, "said"),
        ({"said": "x", "way": "shout"}, "way"),
    ],
)
def test_bad_form_names_its_field(reader: Reader, body: dict[str, str], field: str) -> None:
    response = reader.http.post(reader.path, data=body | {"csrfmiddlewaretoken": reader.token})
    assert (response.status_code, response.text.partition(":")[0]) == (400, field)
    assert not LLMRequest.objects.exists()


# --- who may ---------------------------------------------------------------------------------


def staff_only(user: Any, conversation: Conversation) -> bool:
    assert isinstance(user, User | AnonymousUser)
    return bool(user.is_staff)


def asks(conversation: Conversation, user: User | None = None, *, csrf: bool = False) -> int:
    client = Client(enforce_csrf_checks=csrf)
    if user:
        client.force_login(user)
    url = reverse("django_qstash_llm_browser:conversation", args=[conversation.uuid])
    statuses = {client.get(url).status_code, client.post(url, {"said": "?"}).status_code}
    return max(statuses)


def test_owner_may_and_to_others_it_is_not_there(wire: Wire) -> None:
    ada, bob = User.objects.create(username="ada"), User.objects.create(username="bob")
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=ANSWER)
    conversation = Conversation.objects.create(user=ada)
    assert asks(conversation, ada) == 302
    assert asks(conversation, bob) == 404
    nobody = Client().get(f"/conversations/{conversation.pk}/")
    assert nobody.status_code == 404
    rule = {"MAY_USE_CONVERSATION": f"{__name__}.staff_only"}
    bob.is_staff = True
    bob.save()
    with ours(**rule):
        assert asks(conversation, ada) == 404
        assert asks(conversation, bob) == 302
    assert {row.user for row in LLMRequest.objects.all()} == {ada, bob}


def test_login_of_the_site_holds(wire: Wire) -> None:
    response = Client().get(f"/conversations/{Conversation.objects.create().uuid}/")
    assert (response.status_code, "login" in response["Location"]) == (302, True)
    rest = [each for each in site_settings.MIDDLEWARE if "LoginRequired" not in each]
    owned = Conversation.objects.create(user=User.objects.create(username="ada"))
    with override_settings(MIDDLEWARE=rest):
        assert asks(owned) == 404


def test_forged_form_is_refused(wire: Wire) -> None:
    ada = User.objects.create(username="ada")
    conversation = Conversation.objects.create(user=ada)
    rest = [each for each in site_settings.MIDDLEWARE if "Csrf" not in each]
    assert asks(conversation, ada, csrf=True) == 403
    with override_settings(MIDDLEWARE=rest):
        assert asks(conversation, ada, csrf=True) == 403
    assert not LLMRequest.objects.exists()


def test_page_is_there_whatever_calls_a_provider_has_told() -> None:
    ada = User.objects.create(username="ada")
    conversation = Conversation.objects.create(user=ada)
    told = ["x", {"function": "x"}, {"function": {"name": "look_up"}}]
    LLMRequest.objects.bulk_create(
        [LLMRequest(conversation=conversation, messages=[], state="completed", tool_calls=told)]
    )
    client = Client()
    client.force_login(ada)
    page = client.get(reverse("django_qstash_llm_browser:conversation", args=[conversation.uuid]))
    assert "Calls ?, ?, look_up." in page.content.decode()


def test_heartbeats_are_quick_enough_to_miss_a_reader_within_two_seconds() -> None:
    assert 2 * telling.HEARTBEAT < 2
