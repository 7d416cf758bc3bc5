"""The test project's page in a real browser, under a strict content security policy."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler, StaticFilesHandler
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.test import Client

from django_qstash_llm.models import Conversation, LLMRequest
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER
from tests.test_chat import Upstream, delta, head, send, sse
from tests.wire import FakeQStash

from ..openai.conftest import asgi, eventually, wsgi

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine"),
]


def strict(get_response: Callable[[HttpRequest], HttpResponse]) -> Any:
    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response["Content-Security-Policy"] = POLICY
        return response

    return middleware


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # Playwright has a loop of its own in this thread, in which Django would see async code.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
        # Beside a loop the test has a connection of its own, which nobody else would close.
        connections.close_all()


@pytest.fixture(params=["wsgi", "asgi"])
def site(request: pytest.FixtureRequest, settings: Any, transactional_db: None) -> Iterator[str]:
    settings.MIDDLEWARE = [f"{__name__}.strict", *settings.MIDDLEWARE]
    if request.param == "wsgi":
        serving = wsgi(StaticFilesHandler(get_wsgi_application()))
    else:
        serving = asgi(ASGIStaticFilesHandler(get_asgi_application()))
    with serving as url:
        yield url


class Scripted(Upstream):
    """A provider that says a word each time that it is told to."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.words = ["Io,", " Europa", " and", " Ganymede."]
        super().__init__(lambda server, handler: self.speak(handler))

    def speak(self, handler: Any) -> None:
        head(handler)
        for word in self.words:
            if not self.is_told_to_go_on(handler):
                return
            send(handler, sse(delta(word), done=False))
        if self.is_told_to_go_on(handler):
            send(handler, sse(delta(reason="stop")))
            handler.wfile.write(b"0\r\n\r\n")

    def is_told_to_go_on(self, handler: Any) -> bool:
        handler.connection.settimeout(0.02)
        while not self.steps.acquire(blocking=False):
            try:
                if not handler.connection.recv(1):
                    self.left.set()
                    handler.close_connection = True
                    return False
            except TimeoutError:
                continue
        handler.connection.settimeout(10)
        return True

    def sockets(self) -> int:
        """How many lead to it from here."""
        lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        columns = [line.split() for line in lines]
        port = f":{self.server_port:04X}"
        return sum(each[2].endswith(port) and each[3] == "01" for each in columns)


@pytest.fixture
def provider(transactional_db: None) -> Iterator[Scripted]:
    server = Scripted()
    with server.asked_with():
        yield server
    server.shutdown()
    server.server_close()


@contextmanager
def page_at(browser: Any, site: str, **options: Any) -> Iterator[Any]:
    """The page of somebody who is logged in; what the browser complains of is a failure."""
    ada, _ = User.objects.get_or_create(username="ada")
    client = Client()
    client.force_login(ada)
    cookie = {"name": "sessionid", "value": client.cookies["sessionid"].value, "url": site}
    context = browser.new_context(**options)
    context.add_cookies([cookie])
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{site}/talk/")
    yield page
    context.close()
    assert complaints == []


def answer_of(page: Any) -> Any:
    return page.locator(".llm-turn:last-child .llm-answer .llm-words")


def test_tokens_arrive_one_by_one_and_are_there_after_a_reload(
    browser: Any, site: str, provider: Scripted
) -> None:
    with page_at(browser, site) as page:
        page.get_by_label("Your message").fill("Name three <moons>.")
        page.get_by_label("Your message").press("Enter")
        shown = ""
        for word in provider.words:
            provider.steps.release()
            shown += word
            sync_api.expect(answer_of(page)).to_have_text(shown)
        sync_api.expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
        provider.steps.release()
        sync_api.expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
        sync_api.expect(page.get_by_label("Your message")).to_be_focused()
        page.reload()
        sync_api.expect(answer_of(page)).to_have_text(shown)
        sync_api.expect(page.get_by_text("Name three <moons>.")).to_be_visible()
    assert LLMRequest.objects.get().state == "completed"


@pytest.mark.parametrize("way", ["closed", "reloaded", "stopped"])
def test_page_closed_midway_has_the_provider_stop(
    browser: Any, site: str, provider: Scripted, way: str
) -> None:
    with page_at(browser, site) as page:
        page.get_by_label("Your message").fill("Name three moons.")
        page.get_by_role("button", name="Send").click()
        provider.steps.release(2)
        sync_api.expect(answer_of(page)).to_have_text("Io, Europa")
        assert provider.sockets() == 1
        # From here on the provider is silent.
        if way == "closed":
            page.close()
        elif way == "reloaded":
            page.reload()
        else:
            page.get_by_role("button", name="Stop").click()
        assert provider.left.wait(2)
        eventually(lambda: LLMRequest.objects.get().state == "cancelled", 2)
        if way != "closed":
            note = page.get_by_text("Stopped before the answer was whole.")
            sync_api.expect(note).to_be_visible(timeout=10_000)
            sync_api.expect(answer_of(page)).to_have_text("Io, Europa")
    row = LLMRequest.objects.get()
    assert (row.error_code, row.completion) == ("aborted", "Io, Europa")
    assert row.usage["estimated"] is True
    assert (row.output_tokens, (row.input_tokens or 0) > 0) == (3, True)
    assert provider.sockets() == 0


def test_durable_question_is_answered_on_the_open_page(
    browser: Any, site: str, qstash: FakeQStash, post_callback: Any
) -> None:
    with page_at(browser, site) as page:
        page.get_by_label("Your message").fill("How many roads?")
        page.get_by_role("button", name="Ask in the background").click()
        sync_api.expect(page.get_by_text("The answer is on its way.")).to_be_visible()
        row = LLMRequest.objects.get()
        callback = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_1")
        assert post_callback(row, callback).status_code == 200
        sync_api.expect(answer_of(page)).to_have_text("Forty-two.", timeout=10_000)
        sync_api.expect(page.get_by_text("The answer is on its way.")).to_have_count(0)
        sync_api.expect(page.get_by_label("Your message")).to_have_value("")


def test_what_fails_is_said(browser: Any, site: str, wire: Any) -> None:
    with page_at(browser, site) as page:
        page.get_by_label("Your message").fill("How many?")
        page.get_by_role("button", name="Send").click()
        sync_api.expect(page.get_by_role("status")).to_have_text("No whole answer came. Ask again.")
        # It can be asked again without being typed again.
        sync_api.expect(page.get_by_label("Your message")).to_have_value("How many?")


def test_page_works_without_javascript(browser: Any, site: str, provider: Scripted) -> None:
    provider.words = []

    def whole(server: Upstream, handler: Any) -> None:
        body = json.dumps(ANSWER).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    provider.plan = whole
    with page_at(browser, site, java_script_enabled=False) as page:
        page.get_by_label("Your message").fill("How many?")
        page.get_by_role("button", name="Send").click()
        sync_api.expect(answer_of(page)).to_have_text("Forty-two.")
        assert re.fullmatch(r"http://[^/]+/talk/", page.url)


LOOKS: list[tuple[str, dict[str, Any]]] = [
    ("wide", {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}),
    ("narrow", {"viewport": {"width": 320, "height": 640}, "color_scheme": "light"}),
    ("dark", {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}),
]


@pytest.mark.parametrize(("name", "options"), LOOKS, ids=[name for name, _ in LOOKS])
def test_page_fits_its_window(
    browser: Any, site: str, name: str, options: dict[str, Any], provider: Scripted
) -> None:
    ada = User.objects.create(username="ada")
    conversation = Conversation.objects.create(user=ada, title="Talk")
    for number in range(8):
        LLMRequest(
            conversation=conversation,
            messages=[{"role": "user", "content": f"What is {number} times a very long word?"}],
            state="completed" if number % 3 else "failed",
            completion="Supercalifragilisticexpialidocious" * 3
            + " is one.\n\nAnd so on, for a while.",
        ).save_base(raw=True)
    with page_at(browser, site, **options) as page:
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0
        form = page.locator(".llm-form").bounding_box()
        assert form["y"] + form["height"] <= options["viewport"]["height"]
        log = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
        assert page.locator(".llm-log").evaluate(log) < 5  # what was said last is in sight
        page.keyboard.press("Tab")
        page.get_by_label("Your message").fill("Name three moons.")
        page.get_by_role("button", name="Send").click()
        provider.steps.release(3)
        sync_api.expect(answer_of(page)).to_have_text("Io, Europa and")
        sync_api.expect(answer_of(page)).to_be_in_viewport()
        sync_api.expect(page.get_by_role("button", name="Stop")).to_be_focused()
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/talk-{name}.png")
        provider.steps.release(9)
        sync_api.expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
