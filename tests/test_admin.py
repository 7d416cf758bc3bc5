"""The admin, through the test client: real rows, real pages, and an HTML parser as the reader."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from functools import partial
from html.parser import HTMLParser
from typing import Any
from uuid import uuid4

import httpx
import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_qstash_llm.admin import text
from django_qstash_llm.conf import app_settings
from django_qstash_llm.models import (
    Batch,
    CallbackResponse,
    Circuit,
    Conversation,
    Lane,
    LLMRequest,
    Price,
)
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.request import State, Via
from django_qstash_llm.qstash import Callback
from testproject.articles.models import Article

from .conftest import ANSWER, enter_costs
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

HAS_MARKDOWN = bool(importlib.util.find_spec("markdown_it") and importlib.util.find_spec("nh3"))
REQUESTS = "admin:django_qstash_llm_llmrequest_changelist"
REQUEST = "admin:django_qstash_llm_llmrequest_change"
BATCHES = "admin:django_qstash_llm_batch_changelist"
BATCH = "admin:django_qstash_llm_batch_change"
RECEIPTS = "admin:django_qstash_llm_callbackresponse_changelist"
RECEIPT = "admin:django_qstash_llm_callbackresponse_change"
CONVERSATIONS = "admin:django_qstash_llm_conversation_changelist"
CONVERSATION = "admin:django_qstash_llm_conversation_change"
CIRCUITS = "admin:django_qstash_llm_circuit_changelist"
CIRCUIT = "admin:django_qstash_llm_circuit_change"
LANES = "admin:django_qstash_llm_lane_changelist"
LANE = "admin:django_qstash_llm_lane_change"
MESSAGES = [{"role": "user", "content": "?"}]
ANSWERED = json.dumps(ANSWER).encode()

XSS = (
    "<script>xss()</script>",
    "<img src=x onerror=xss()>",
    "'\"><svg onload=xss()><circle></svg>",
    "</pre></title></textarea></script><script>xss()</script>",
    "<iframe src='https://evil.test/'></iframe><style>*{display:none}</style>",
    "<a href='javascript:xss()' onclick='xss()' style='x:y'>a</a>",
    "[a](javascript:xss()) [b](data:text/html;base64,eHNzKCk=) [c](vbscript:xss()) [d](//evil.test)",
    "![pixel](https://evil.test/pixel.png)",
    "<javascript:xss()> <https://x.test/onmouseover=xss()>",
    "`</code><script>xss()</script>` {{ 7|add:7 }} {% now 'Y' %} %s %(x)d {0} {x.y}",
    "```html\n</code></pre><img src=x onerror=xss()>\n```",
    "[a](https://x.test/\"onmouseover='xss()')",
)


class Page(HTMLParser):
    """What a browser would make of it: text, and each element with its attributes."""

    def __init__(self, response: Any) -> None:
        super().__init__()
        assert response.status_code == 200
        self.html: str = response.content.decode()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inline_code: list[str] = []
        self._inside = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._inside in {"script", "style"} and data.strip():
            self.inline_code.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def values(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for each, attrs in self.elements if each == tag and name in attrs]

    def buttons(self) -> list[str]:
        return [
            attrs["value"] or ""
            for tag, attrs in self.elements
            if tag == "input" and attrs.get("name") == "action"
        ]

    def menu(self) -> list[str]:
        return [value for value in self.values("option", "value") if value]


def assert_inert(page: Page) -> None:
    assert page.inline_code == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "circle", "style", "base"}
    assert [src for src in page.values("img", "src") if not src.startswith("/static/admin/")] == []
    for _tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("href", "src", "action", "formaction", "xlink:href"):
            where = (attrs.get(name) or "").strip().lower()
            assert not where.startswith(("javascript:", "data:", "vbscript:"))
        assert "evil.test" not in (attrs.get("src") or "")


def completed(**fields: Any) -> LLMRequest:
    now = timezone.now()
    return LLMRequest.objects.create(
        **{
            "state": State.COMPLETED,
            "provider": "openai",
            "model": "gpt-5.4-mini",
            "messages": [{"role": "user", "content": "What is it?"}],
            "completion": "Forty-two.",
            "attempts": 1,
            "last_status": 200,
            "input_tokens": 1234,
            "output_tokens": 5,
            "cost": Decimal("0.000123"),
            "created_at": now - timedelta(seconds=90),
            "submitted_at": now - timedelta(seconds=89),
            "finished_at": now - timedelta(seconds=48),
            "announced_at": now,
            **fields,
        }
    )


def failed(**fields: Any) -> LLMRequest:
    return completed(
        **{
            "state": State.FAILED,
            "completion": "",
            "cost": None,
            "input_tokens": None,
            "output_tokens": None,
            "last_status": 500,
            "error_code": "server_error",
            "error": "The server had an error (after 4 attempts)",
            **fields,
        }
    )


def pending(**fields: Any) -> LLMRequest:
    fields.setdefault("messages", [{"role": "user", "content": "What is it?"}])
    return LLMRequest.objects.create(**fields)


def submitted(**fields: Any) -> LLMRequest:
    return pending(
        **{
            "state": State.SUBMITTED,
            "provider": "openai",
            "model": "gpt-5.4-mini",
            "qstash_message_id": "msg_7",
            "submitted_at": timezone.now(),
            **fields,
        }
    )


def receipt_of(llm_request: LLMRequest | None, **fields: Any) -> CallbackResponse:
    if llm_request is not None:
        fields.setdefault("uuid", llm_request.uuid)
    return CallbackResponse.objects.create(
        llm_request=llm_request,
        **{
            "kind": Kind.CALLBACK,
            "source_message_id": "msg_7",
            "retried": 0,
            "max_retries": 3,
            "status": 200,
            "body": b'{"choices": []}',
            **fields,
        },
    )


def misread() -> LLMRequest:
    """Failed on an answer that can be read by now."""
    row = failed(error_code="not_json")
    receipt_of(row, body=ANSWERED, applied_at=timezone.now())
    return row


def unread() -> CallbackResponse:
    """Its reading broke."""
    row = submitted(deadline_at=timezone.now() + timedelta(minutes=9))
    return receipt_of(row, body=ANSWERED, apply_tries=1, problem="KeyError: 'choices'")


def page_of(client: Client, name: str, obj: Any = None) -> Page:
    return Page(client.get(reverse(name, args=[obj.pk] if obj else [])))


def act(client: Client, name: str, action: str, *rows: Any, **data: Any) -> Any:
    keys = [row.pk for row in rows]
    return client.post(reverse(name), {"action": action, "_selected_action": keys, **data})


def messages_of(response: Any) -> list[str]:
    return [str(message) for message in response.wsgi_request._messages]


@pytest.fixture
def staff_client() -> Callable[..., Client]:
    """A client of a staff user with these permissions and no others."""

    def make(*codenames: str) -> Client:
        user = User.objects.create_user("staff", password="secret", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        client = Client()
        client.force_login(user)
        return client

    return make


# --- the list ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_the_list_names_each_state_by_word_and_sign(admin_client: Client, state: State) -> None:
    pending(model="m", provider="openai", state=state)
    page = page_of(admin_client, REQUESTS)
    assert ("span", {"class": f"llm-state llm-state-{state}"}) in page.elements
    assert re.search(rf"[○◐✓✕⊘] +{state.label}", page.text)


def test_the_list_never_shows_an_unknown_cost_as_nothing(admin_client: Client) -> None:
    completed(cost=None)
    failed()
    page = page_of(admin_client, REQUESTS)
    assert "unpriced" in page.text
    assert "$" not in page.text


def test_a_cost_of_nothing_is_a_cost(admin_client: Client) -> None:
    completed(cost=Decimal(0))
    page = page_of(admin_client, REQUESTS)
    assert "$0.00" in page.text
    assert ("span", {"class": "llm-unpriced"}) not in page.elements


def test_the_list_shows_tokens_cost_and_duration(admin_client: Client) -> None:
    completed()
    shown = page_of(admin_client, REQUESTS).text
    for figure in ("1,234 → 5", "$0.000123", "42 s", "gpt-5.4-mini", "openai", "publish"):
        assert figure in shown


def test_the_list_shows_what_a_request_is_about(admin_client: Client) -> None:
    article = Article.objects.create(title="On tides", body="…", summary="There is one.")
    completed(about=article)
    assert "On tides" in page_of(admin_client, REQUESTS).text


def test_what_a_request_is_about_is_linked_to_its_page(admin_client: Client) -> None:
    user = User.objects.create_user("ada")
    completed(about=user)
    page = page_of(admin_client, REQUESTS)
    assert reverse("admin:auth_user_change", args=[user.pk]) in page.values("a", "href")
    assert "ada" in page.text


def test_what_the_user_may_not_view_is_not_named(staff_client: Callable[..., Client]) -> None:
    secret = User.objects.create_user("countess")
    completed(about=secret)
    page = page_of(staff_client("view_llmrequest"), REQUESTS)
    assert "countess" not in page.html
    assert f"user {secret.pk}" in page.text


def test_what_has_been_deleted_is_named_by_its_key(admin_client: Client) -> None:
    article = Article.objects.create(title="On tides", body="…", summary="There is one.")
    completed(about=article)
    key = article.pk
    article.delete()
    assert f"article {key} (deleted)" in page_of(admin_client, REQUESTS).text


def test_about_survives_a_missing_app_and_a_key_of_another_type(admin_client: Client) -> None:
    gone = ContentType.objects.create(app_label="gone", model="thing")
    completed(content_type=gone, object_id="5")
    articles = ContentType.objects.get_for_model(Article)
    odd = completed(content_type=articles, object_id="not-a-number")
    assert "not-a-number (deleted)" in page_of(admin_client, REQUESTS).text
    page_of(admin_client, REQUEST, odd)


def fill(number: int) -> None:
    """Rows of every sort, about two models, in batches and conversations, with attempts."""
    for index in range(number):
        article = Article.objects.create(title=f"On {index}", body="…", summary="There is one.")
        user = User.objects.create_user(f"user{LLMRequest.objects.count()}")
        batch = Batch.objects.create(name=f"nightly {index}", user=user)
        conversation = Conversation.objects.create(title=f"About {index}", user=user)
        completed(about=article, batch=batch, conversation=conversation, user=user)
        failed(about=user, batch=batch, cost=None)
        row = submitted(about=article, batch=batch, conversation=conversation)
        receipt_of(row, source_message_id=f"msg_{row.pk}")


@pytest.mark.parametrize("name", [REQUESTS, BATCHES, RECEIPTS, CONVERSATIONS])
def test_a_list_takes_as_many_queries_for_many_rows_as_for_few(
    admin_client: Client, name: str
) -> None:
    fill(2)
    page_of(admin_client, name)  # content types are looked up once per process
    with CaptureQueriesContext(
        connection,
    ) as few:
        page_of(admin_client, name)
    fill(10)
    with CaptureQueriesContext(connection) as many:
        page_of(admin_client, name)
    assert len(many) == len(few)


def test_a_page_takes_as_many_queries_for_many_attempts_as_for_few(admin_client: Client) -> None:
    row = failed()
    receipt_of(row)
    page_of(admin_client, REQUEST, row)
    with CaptureQueriesContext(connection) as few:
        page_of(admin_client, REQUEST, row)
    for retried in range(1, 15):
        receipt_of(row, retried=retried, status=500)
        failed(resubmission_of=row)
    with CaptureQueriesContext(connection) as many:
        page_of(admin_client, REQUEST, row)
    assert len(many) == len(few)


def test_the_list_reads_no_prompts_and_counts_once(admin_client: Client) -> None:
    completed()
    with CaptureQueriesContext(connection) as queries:
        page_of(admin_client, REQUESTS)
    ours = [q["sql"] for q in queries if "django_qstash_llm_llmrequest" in q["sql"]]
    assert len([sql for sql in ours if "COUNT(" in sql]) == 1
    assert not [sql for sql in ours if '"messages"' in sql or '"completion"' in sql]
    assert not [sql for sql in ours if "DISTINCT" in sql]


@pytest.mark.parametrize(
    ("query", "matching"),
    [
        ("state__exact=failed", "failed"),
        ("via__exact=enqueue", "queued"),
        ("provider=anthropic", "claude"),
        ("attention=error", "failed"),
        ("attention=unpriced", "unpriced"),
        ("attention=dead_letter", "dead"),
        ("attention=overdue", "overdue"),
        ("attention=unannounced", "waiting"),
        ("attention=handler_failed", "trying"),
        ("attention=given_up", "given_up"),
    ],
)
def test_filters_find(admin_client: Client, query: str, matching: str) -> None:
    rows = {
        "plain": completed(),
        "failed": failed(),
        "queued": completed(via=Via.ENQUEUE, queue="summaries"),
        "claude": completed(provider="anthropic"),
        "unpriced": completed(cost=None),
        "dead": completed(dead_letter_id="dlq-1"),
        "overdue": submitted(
            deadline_at=timezone.now() - timedelta(minutes=1), announced_at=timezone.now()
        ),
        "waiting": completed(announced_at=None),
        "trying": completed(announced_at=None, announce_tries=1, announce_error="ValueError: x"),
        "given_up": completed(announced_at=None, announce_tries=5, announce_error="ValueError: x"),
    }
    wider = {"waiting": {"waiting", "trying", "given_up"}, "trying": {"trying", "given_up"}}
    wanted = {rows[name].pk for name in wider.get(matching, {matching})}
    response = admin_client.get(f"{reverse(REQUESTS)}?{query}")
    assert {row.pk for row in response.context["cl"].result_list} == wanted


def test_requests_are_found_by_the_trouble_of_their_last_attempt(admin_client: Client) -> None:
    waiting = submitted(attempts=2)
    receipt_of(waiting, status=429, trouble="rate", source_message_id="msg_1")
    receipt_of(waiting, status=503, trouble="overload", source_message_id="msg_1", retried=1)
    unpaid = failed(attempts=1)
    receipt_of(unpaid, status=402, trouble="money", source_message_id="msg_2")
    answered = completed(attempts=1)
    receipt_of(answered, status=429, trouble="rate", source_message_id="msg_3")
    for trouble, wanted in (("overload", [waiting]), ("money", [unpaid]), ("rate", [])):
        response = admin_client.get(f"{reverse(REQUESTS)}?trouble={trouble}")
        assert list(response.context["cl"].result_list) == wanted


def test_providers_to_filter_by_come_from_the_settings(admin_client: Client) -> None:
    hrefs = page_of(admin_client, REQUESTS).values("a", "href")
    assert {"?provider=openai", "?provider=anthropic", "?provider=upstash"} <= set(hrefs)


@pytest.mark.parametrize(
    "term",
    ["{uuid}", "{hex}", "{hex:.8}", "msg_77", "acme corp", "{object_id}"],
)
def test_search_finds_by_what_a_person_holds(admin_client: Client, term: str) -> None:
    article = Article.objects.create(pk=918_273, title="t", body="b", summary="s")
    wanted = completed(about=article, qstash_message_id="msg_77", tenant="acme corp")
    for _ in range(3):
        completed()
    term = term.format(uuid=wanted.uuid, hex=wanted.uuid.hex, object_id=wanted.object_id)
    response = admin_client.get(reverse(REQUESTS), {"q": term})
    assert [row.pk for row in response.context["cl"].result_list] == [wanted.pk]


@pytest.mark.parametrize("term", ["Forty", "%", "' OR 1=1", "f" * 500, "f-f"])
def test_search_reads_through_no_texts_and_survives_anything(
    admin_client: Client, term: str
) -> None:
    completed()
    response = admin_client.get(reverse(REQUESTS), {"q": term})
    assert response.status_code == 200
    assert list(response.context["cl"].result_list) == []


# --- one request's page -----------------------------------------------------------------------


def test_a_pending_request_says_why_it_waits(admin_client: Client) -> None:
    row = pending(
        submit_after=timezone.now() + timedelta(minutes=3),
        submission_tries=4,
        error="QStash answered 503: down",
    )
    shown = page_of(admin_client, REQUEST, row).text
    for words in (
        "Waiting to be handed to QStash",
        "Next try in 2 min",
        "Tried 4 times",
        "503: down",
    ):
        assert words in shown


def test_a_pending_request_that_nobody_took_asks_for_a_worker(admin_client: Client) -> None:
    assert "Is one running?" in page_of(admin_client, REQUEST, pending()).text


def test_a_submitted_request_says_how_its_last_attempt_ended(admin_client: Client) -> None:
    row = submitted(attempts=2, last_status=-1, retries=3)
    shown = page_of(admin_client, REQUEST, row).text
    assert "Attempt 2 of 4 ended with no response; QStash goes on." in shown


def test_a_failed_request_says_why(admin_client: Client) -> None:
    row = failed(dead_letter_id="dlq-1")
    shown = page_of(admin_client, REQUEST, row).text
    for words in ("server_error", "The server had an error", "dead letters as dlq-1"):
        assert words in shown


def test_a_completed_request_shows_its_messages_answer_usage_and_cost(admin_client: Client) -> None:
    row = completed(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        ],
        cost=Decimal("0.000123456789"),
        cost_source="genai-prices",
        cached_tokens=1000,
        finish_reason="length",
    )
    shown = page_of(admin_client, REQUEST, row).text
    for words in (
        "Be brief.",
        "What is it?",
        "Forty-two.",
        "1,234",
        "1,000",
        "$0.000123456789",
        "from genai-prices",
        "ran into its token limit",
    ):
        assert words in shown


def test_tool_calls_are_shown_with_their_arguments(admin_client: Client) -> None:
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    row = completed(completion="", tool_calls=[call, {"odd": 1}, "odder"])
    shown = page_of(admin_client, REQUEST, row).text
    assert "calls weather" in shown
    assert '"city": "Oslo"' in shown


def test_an_image_in_a_prompt_is_named_and_not_loaded(admin_client: Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    row = completed(messages=[{"role": "user", "content": [image]}])
    page = page_of(admin_client, REQUEST, row)
    assert "img" not in {tag for tag, _ in page.elements}
    assert "image_url" in page.text


def test_attempts_are_told_in_order_with_the_providers_words(admin_client: Client) -> None:
    row = failed()
    error = {"error": {"code": "overloaded", "message": "Come back later"}}
    packed = gzip.compress(json.dumps(error).encode())
    receipt_of(row, retried=1, status=-1, body=b"", seen_count=3)
    receipt_of(row, retried=0, status=503, body=packed, problem="odd header")
    page = page_of(admin_client, REQUEST, row)
    for words in ("overloaded: Come back later", "odd header", "3×", "no response"):
        assert words in page.text
    assert page.text.index("1 / 4") < page.text.index("2 / 4")


def test_the_timeline_says_what_was_wrong_what_was_named_and_when_the_next_try_is(
    admin_client: Client,
) -> None:
    now = timezone.now()
    row = submitted(attempts=2, retries=3, last_status=429)
    trouble = {"trouble": "rate", "code": "rate_limit_exceeded", "words": "Slow <down>"}
    receipt_of(row, status=503, trouble="overload", retried=0, received_at=now)
    receipt_of(
        row,
        status=429,
        retried=1,
        received_at=now,
        wait=360.0,
        wait_source="x-ratelimit-reset-tokens",
        next_try_at=now + timedelta(minutes=6),
        delayed_by="provider",
        **trouble,
    )
    page = page_of(admin_client, REQUEST, row)
    for words in (
        "rate_limit_exceeded: Slow <down>",
        "6m0s (x-ratelimit-reset-tokens)",
        "after 6 min: the provider's header",
        "429 rate: tokens reset in 6m0s; next try ",
        "503",
        "overload",
    ):
        assert words in page.text
    assert page.inline_code == []
    assert not page.values("td", "style")


def test_a_receipts_page_tells_its_attempt_in_a_sentence(admin_client: Client) -> None:
    receipt = receipt_of(failed(), status=402, trouble="money", words="Pay first", retried=0)
    shown = page_of(admin_client, RECEIPT, receipt).text
    assert "402 money: Pay first. Raise the spend limit" in shown
    found = admin_client.get(f"{reverse(RECEIPTS)}?trouble__exact=money").context["cl"].result_list
    assert list(found) == [receipt]


def test_attempts_are_for_those_who_may_view_receipts(staff_client: Callable[..., Client]) -> None:
    row = failed()
    receipt_of(row, status=500, body=b'{"error": "Oh no"}')
    page = page_of(staff_client("view_llmrequest"), REQUEST, row)
    assert "Oh no" not in page.html


def test_the_raw_request_is_what_the_provider_is_sent_without_any_key(admin_client: Client) -> None:
    row = completed(parameters={"temperature": 0.2})
    page = page_of(admin_client, REQUEST, row)
    assert '"temperature": 0.2' in page.text
    for provider in app_settings().providers.values():
        assert provider["API_KEY"] not in page.html


def test_a_request_of_a_provider_that_has_left_the_settings_has_a_page(
    admin_client: Client,
) -> None:
    row = completed(provider="gone", model="old-model")
    assert '"model": "old-model"' in page_of(admin_client, REQUEST, row).text


def test_what_was_forgotten_is_said_to_be_and_cannot_be_asked_again(admin_client: Client) -> None:
    row = completed(messages=[], digest="ab" * 32, forgotten_at=timezone.now())
    shown = page_of(admin_client, REQUEST, row).text
    assert "Forgotten: the messages are not kept." in shown
    assert "ab" * 32 in shown
    assert "Resubmit…" not in shown
    assert "Resubmit…" in page_of(admin_client, REQUEST, completed()).text


def test_a_handler_that_was_given_up_is_shown_with_its_error(admin_client: Client) -> None:
    row = completed(announced_at=None, announce_tries=5, announce_error="KeyError: 'summary'")
    shown = page_of(admin_client, REQUEST, row).text
    assert "failed 5 times and was given up" in shown
    assert "KeyError: 'summary'" in shown


@pytest.mark.parametrize(
    ("last_status", "words"),
    [
        (200, "the provider answered 200"),
        (-1, "the provider did not answer"),
        (None, "It is under way"),
    ],
)
def test_a_chats_page_tells_of_its_one_call(
    admin_client: Client, last_status: int | None, words: str
) -> None:
    chat = completed(via="chat", last_status=last_status)
    text = page_of(admin_client, REQUEST, chat).text
    assert "One call, without QStash" in text
    assert words in text
    assert "None has been heard of" not in text


def test_the_page_links_to_batch_conversation_and_resubmissions(admin_client: Client) -> None:
    batch, talk = Batch.objects.create(name="nightly"), Conversation.objects.create(title="Chat")
    first = failed(batch=batch, conversation=talk)
    again = completed(resubmission_of=first)
    hrefs = page_of(admin_client, REQUEST, first).values("a", "href")
    assert reverse(BATCH, args=[batch.pk]) in hrefs
    assert reverse(CONVERSATION, args=[talk.pk]) in hrefs
    assert reverse(REQUEST, args=[again.pk]) in hrefs
    hrefs = page_of(admin_client, REQUEST, again).values("a", "href")
    assert reverse(REQUEST, args=[first.pk]) in hrefs


def test_very_long_texts_are_cut_and_say_so(admin_client: Client) -> None:
    row = completed(
        messages=[{"role": "user", "content": "x" * 100_000}] * 200, completion="y" * 100_000
    )
    page = page_of(admin_client, REQUEST, row)
    assert "32,768 of 100,000 are shown" in page.text
    assert "140 messages are left out here" in page.text
    assert len(page.html) < 3_000_000


@pytest.mark.parametrize("messages", [None, "text", {}, [], ["text"], [{"role": 5}], [[1]]])
def test_messages_of_any_shape_have_a_page(admin_client: Client, messages: Any) -> None:
    page_of(admin_client, REQUEST, completed(messages=messages or {}, parameters={}))


# --- text of strangers ------------------------------------------------------------------------


@pytest.mark.parametrize("payload", XSS)
def test_foreign_text_is_inert_wherever_it_appears(admin_client: Client, payload: str) -> None:
    user = User.objects.create_user("ada", first_name=payload[:150])
    article = Article.objects.create(title=payload, body="…", summary="There is one.")
    batch = Batch.objects.create(name=payload, user=user)
    talk = Conversation.objects.create(title=payload, system=payload)
    function = {"name": payload, "arguments": payload}
    foreign = {
        "messages": [{"role": payload, "content": payload, "name": payload}],
        "model": payload,
        "provider": payload[:64],
        "about": article,
        "tenant": payload,
        "labels": [payload],
        "metadata": {payload: payload},
        "trigger": payload,
        "queue": payload,
        "batch": batch,
        "conversation": talk,
        "qstash_message_id": payload,
        "dead_letter_id": payload,
        "completion": payload,
        "answered_by": payload,
        "finish_reason": payload[:64],
        "refusal": payload,
        "tool_calls": [{"function": function, "id": payload}],
        "usage": {payload: payload},
        "cost_source": payload[:32],
        "announced_at": None,
        "announce_tries": 2,
        "announce_error": payload,
        "error_code": payload[:64],
        "error": payload,
    }
    rows = [completed(**foreign), failed(**foreign), submitted(**foreign | {"model": "m"})]
    receipts = [
        receipt_of(
            row,
            source_message_id=f"{payload}{row.pk}",
            status=500,
            header={payload: [payload]},
            body=json.dumps({"error": {"code": payload, "message": payload}}).encode(),
            problem=payload,
            dead_letter_id=payload,
        )
        for row in rows
    ]
    orphan = receipt_of(None, uuid=rows[0].uuid, kind=Kind.QUARANTINED, body=payload.encode())
    for name in (REQUESTS, BATCHES, RECEIPTS, CONVERSATIONS):
        assert_inert(page_of(admin_client, name))
    for row in rows:
        assert_inert(page_of(admin_client, REQUEST, row))
    for receipt in (*receipts, orphan):
        assert_inert(page_of(admin_client, RECEIPT, receipt))
    assert_inert(page_of(admin_client, BATCH, batch))
    assert_inert(page_of(admin_client, CONVERSATION, talk))
    assert_inert(Page(act(admin_client, REQUESTS, "resubmit", *rows)))
    response = act(admin_client, REQUESTS, "cancel", *rows[:2])
    assert_inert(Page(admin_client.get(response.url)))


@pytest.mark.skipif(not HAS_MARKDOWN, reason="the admin extra is not installed")
def test_markdown_is_rendered_with_its_headings_below_the_pages_own(admin_client: Client) -> None:
    row = completed(completion="# Tides\n\n- *rise*\n- fall\n\n[more](https://x.test/)")
    page = page_of(admin_client, REQUEST, row)
    assert "<h4>Tides</h4>" in page.html
    assert "<em>rise</em>" in page.html
    link = {"href": "https://x.test/", "rel": "noopener noreferrer nofollow"}
    assert ("a", link) in page.elements


@pytest.mark.skipif(HAS_MARKDOWN, reason="the admin extra is installed")
def test_without_the_extra_an_answer_is_escaped_text(admin_client: Client) -> None:
    page = page_of(admin_client, REQUEST, completed(completion="# Tides\n\n<b>"))
    assert "# Tides\n\n&lt;b&gt;</pre>" in page.html


@pytest.mark.parametrize("hostile", ["[" * 32_000, "x" * 40_000, "[" * 40_000])
def test_what_is_slow_to_render_is_shown_as_text(hostile: str) -> None:
    assert text.completion(hostile).startswith('<pre class="llm-text"')


@pytest.mark.parametrize(
    "hostile",
    ["*a" * 16_000, "_" * 32_000, "`" * 32_000, "![" * 900, "> " * 16_000, "- " * 16_000,
     "|a" * 16_000, "<" * 32_000, "~~a" * 10_000, "&" * 32_000, "`a``" * 8_000, "\\" * 32_000],
)  # fmt: skip
@pytest.mark.timeout(5)
def test_no_answer_makes_a_page_wait(hostile: str) -> None:
    text.completion(hostile)


def test_a_json_answer_is_laid_out() -> None:
    assert "{\n  &quot;city&quot;: &quot;Ås&quot;\n}" in text.completion('{"city": "\\u00c5s"}')


# --- showing, not editing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [REQUEST, BATCH, CONVERSATION, RECEIPT])
def test_nothing_can_be_changed_or_added_by_hand(admin_client: Client, name: str) -> None:
    batch = Batch.objects.create(name="nightly")
    talk = Conversation.objects.create(title="Chat")
    row = failed(batch=batch, conversation=talk)
    objects = {REQUEST: row, BATCH: batch, CONVERSATION: talk, RECEIPT: receipt_of(row)}
    obj = objects[name]
    page = page_of(admin_client, name, obj)
    assert not [a for tag, a in page.elements if tag in {"textarea", "select"}]
    changed = {"name": "changed", "title": "changed", "state": "completed", "_save": "1"}
    response = admin_client.post(reverse(name, args=[obj.pk]), changed)
    assert response.status_code == 403
    assert admin_client.get(reverse(name.replace("_change", "_add"))).status_code == 403
    assert "changed" not in str(type(obj).objects.values().get(pk=obj.pk))


def test_deleting_needs_its_permission(staff_client: Callable[..., Client]) -> None:
    row = failed()
    client = staff_client("view_llmrequest", "change_llmrequest")
    url = reverse("admin:django_qstash_llm_llmrequest_delete", args=[row.pk])
    assert client.post(url, {"post": "yes"}).status_code == 403
    assert LLMRequest.objects.filter(pk=row.pk).exists()


def test_a_request_is_deleted_with_its_receipts(admin_client: Client) -> None:
    row = failed()
    receipt_of(row)
    url = reverse("admin:django_qstash_llm_llmrequest_delete", args=[row.pk])
    assert admin_client.post(url, {"post": "yes"}).status_code == 302
    assert not CallbackResponse.objects.exists()


# --- verbs ------------------------------------------------------------------------------------


def test_who_may_only_view_sees_no_action(staff_client: Callable[..., Client]) -> None:
    client = staff_client("view_llmrequest", "view_batch")
    batch = Batch.objects.create()
    row = failed(batch=batch)
    for page in (
        page_of(client, REQUESTS),
        page_of(client, REQUEST, row),
        page_of(client, BATCHES),
        page_of(client, BATCH, batch),
    ):
        assert page.buttons() == []
        assert page.menu() == []


def test_who_may_only_view_can_use_no_verb(
    staff_client: Callable[..., Client], qstash: FakeQStash
) -> None:
    client = staff_client("view_llmrequest", "view_batch", "change_batch")
    batch = Batch.objects.create()
    bad, going = failed(batch=batch, dead_letter_id="dlq-1"), submitted(batch=batch)
    receipt_of(bad, body=ANSWERED)
    act(client, REQUESTS, "cancel", going)
    act(client, REQUESTS, "resubmit", bad, confirmed="1")
    act(client, REQUESTS, "retry_dead_letter", bad, confirmed="1")
    act(client, REQUESTS, "drop_dead_letter", bad)
    act(client, REQUESTS, "read_again", bad)
    act(client, BATCHES, "cancel_unfinished", batch)
    act(client, BATCHES, "resubmit_failed", batch, confirmed="1")
    assert qstash.calls == []
    assert LLMRequest.objects.count() == 2
    for row, state in ((going, State.SUBMITTED), (bad, State.FAILED)):
        row.refresh_from_db()
        assert row.state == state
    assert bad.dead_letter_id == "dlq-1"


@pytest.mark.parametrize(
    ("make", "buttons"),
    [
        (pending, ["cancel"]),
        (submitted, ["cancel"]),
        (completed, ["resubmit"]),
        (failed, ["resubmit"]),
        (lambda: failed(announced_at=None, announce_tries=2), ["resubmit", "announce_again"]),
        (lambda: pending(state=State.CANCELLED), ["resubmit"]),
        (
            lambda: failed(dead_letter_id="dlq-1"),
            ["resubmit", "retry_dead_letter", "drop_dead_letter"],
        ),
        (lambda: completed(dead_letter_id="dlq-1"), ["resubmit", "drop_dead_letter"]),
        (lambda: misread(), ["resubmit", "read_again"]),
        (lambda: unread().llm_request, ["cancel", "read_again"]),
    ],
)
def test_buttons_fit_the_state(admin_client: Client, make: Any, buttons: list[str]) -> None:
    row = make()
    page = page_of(admin_client, REQUEST, row)
    assert page.buttons() == buttons
    forms = [a for tag, a in page.elements if tag == "form" and a.get("class") == "llm-tool"]
    assert {form["method"] for form in forms} == {"post"}


def test_a_verb_needs_a_csrf_token(admin_user: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    row = pending()
    assert act(client, REQUESTS, "cancel", row).status_code == 403
    row.refresh_from_db()
    assert row.state == State.PENDING


def test_no_verb_is_used_by_following_a_link(admin_client: Client) -> None:
    row = pending()
    admin_client.get(reverse(REQUESTS), {"action": "cancel", "_selected_action": row.pk})
    row.refresh_from_db()
    assert row.state == State.PENDING


def test_cancelling_tells_qstash_and_leaves_a_log_entry(
    admin_client: Client, qstash: FakeQStash
) -> None:
    row = submitted()
    response = act(admin_client, REQUESTS, "cancel", row, from_page="1")
    row.refresh_from_db()
    assert row.state == State.CANCELLED
    assert qstash.cancelled == ["msg_7"]
    assert response.url == reverse(REQUEST, args=[row.pk])
    assert messages_of(response) == ["1 request was cancelled."]
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.get_change_message()) == (str(row.pk), "Cancelled.")


def test_what_cannot_be_cancelled_is_named_with_the_reason(
    admin_client: Client, qstash: FakeQStash
) -> None:
    done, going = completed(), pending()
    response = act(admin_client, REQUESTS, "cancel", done, going)
    assert messages_of(response) == [
        "1 request was cancelled.",
        f"{done.uuid} is completed: only an unfinished request can be cancelled.",
    ]
    assert LogEntry.objects.count() == 1


def test_a_request_goes_on_when_qstash_cannot_be_told(
    admin_client: Client, qstash: FakeQStash
) -> None:
    qstash.answer = lambda request: httpx.Response(500, text="<b>down</b>")
    row = submitted()
    response = act(admin_client, REQUESTS, "cancel", row)
    assert messages_of(response) == [f"{row.uuid}: QStash answered 500: <b>down</b>"]
    row.refresh_from_db()
    assert row.state == State.SUBMITTED
    assert "&lt;b&gt;down" in admin_client.get(response.url).content.decode()


def test_many_reasons_are_not_all_told(admin_client: Client) -> None:
    rows = [completed() for _ in range(9)]
    told = messages_of(act(admin_client, REQUESTS, "cancel", *rows))
    assert len(told) == 6
    assert told[-1] == "4 more were refused."


def test_resubmitting_asks_first_and_says_what_it_cost(admin_client: Client) -> None:
    earlier = failed()
    failed(resubmission_of=earlier)
    rows = [completed(cost=Decimal("0.25")), completed(cost=None), earlier, pending()]
    enter_costs()
    page = Page(act(admin_client, REQUESTS, "resubmit", *rows))
    assert LLMRequest.objects.count() == 5
    for words in (
        "4 requests are about to be asked again",
        "The first time came to $0.25.",
        "1 has no known cost.",
        "1 is unfinished and will be refused",
        "1 was resubmitted before.",
    ):
        assert words in page.text


def test_resubmitting_from_the_page_leads_to_the_new_request(admin_client: Client) -> None:
    row = failed(labels=["nightly"], parameters={"temperature": 0.2})
    page = Page(act(admin_client, REQUESTS, "resubmit", row, from_page="1"))
    assert reverse(REQUEST, args=[row.pk]) in page.values("a", "href")
    hidden = {
        str(a["name"]): a["value"]
        for tag, a in page.elements
        if tag == "input" and a.get("type") == "hidden" and a["name"] != "csrfmiddlewaretoken"
    }
    response = admin_client.post(reverse(REQUESTS), hidden)
    again = LLMRequest.objects.get(resubmission_of=row)
    assert again.state == State.PENDING
    assert (again.messages, again.labels) == (row.messages, ["nightly"])
    assert response.url == reverse(REQUEST, args=[again.pk])
    told = [(e.object_id, e.get_change_message()) for e in LogEntry.objects.order_by("id")]
    assert told == [
        (str(row.pk), f"Resubmitted as {again.uuid}."),
        (str(again.pk), f"Resubmission of {row.uuid}."),
    ]


def test_an_unfinished_request_is_not_resubmitted(admin_client: Client) -> None:
    row = pending()
    response = act(admin_client, REQUESTS, "resubmit", row, confirmed="1")
    assert messages_of(response) == [f"{row.uuid} is pending: an answer may still come."]
    assert LLMRequest.objects.count() == 1


def test_what_can_no_longer_be_asked_is_refused_with_the_reason(admin_client: Client) -> None:
    row = failed(provider="gone")
    response = act(admin_client, REQUESTS, "resubmit", row, confirmed="1")
    assert "there is no provider 'gone'" in messages_of(response)[0]


def test_a_handler_that_was_given_up_is_told_again(
    admin_client: Client, django_capture_on_commit_callbacks: Any
) -> None:
    row = completed(announced_at=None, announce_tries=5, announce_error="KeyError: 'x'")
    with django_capture_on_commit_callbacks(execute=True):
        response = act(admin_client, REQUESTS, "announce_again", row, from_page="1")
    assert messages_of(response) == ["1 request will be announced again."]
    row.refresh_from_db()
    assert row.announced_at is not None
    assert row.announce_error == ""


@pytest.mark.parametrize("make", [pending, completed])
def test_what_was_told_or_is_not_finished_is_not_told_again(
    admin_client: Client, make: Any
) -> None:
    row = make()
    response = act(admin_client, REQUESTS, "announce_again", row)
    assert "there is nothing to announce" in messages_of(response)[0]


def test_retrying_a_dead_letter_asks_first_and_then_submits_it_once_more(
    admin_client: Client, qstash: FakeQStash
) -> None:
    qstash.answer = lambda request: httpx.Response(201, json={"messageId": "msg_new"})
    row, without = failed(dead_letter_id="dlq-1"), failed()
    page = Page(act(admin_client, REQUESTS, "retry_dead_letter", row, without))
    assert "QStash is about to try 2 requests again, from its dead letters." in page.text
    assert "1 has not failed or has no known dead letter, and will be refused." in page.text
    assert qstash.calls == []

    response = act(admin_client, REQUESTS, "retry_dead_letter", row, without, confirmed="1")
    assert messages_of(response) == [
        "1 request is being tried again.",
        f"{without.uuid} has no known dead letter: resubmit it instead.",
    ]
    assert qstash.calls == ["POST /v2/dlq/retry/dlq-1"]
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id) == ("submitted", "msg_new")
    assert LogEntry.objects.get().get_change_message() == "Retried from its dead letter."


def test_retrying_from_the_page_leads_back_to_it(admin_client: Client, qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(201, json={"messageId": "msg_new"})
    row = failed(dead_letter_id="dlq-1")
    page = Page(act(admin_client, REQUESTS, "retry_dead_letter", row, from_page="1"))
    hidden = {
        str(a["name"]): a["value"]
        for tag, a in page.elements
        if tag == "input" and a.get("type") == "hidden" and a["name"] != "csrfmiddlewaretoken"
    }
    response = admin_client.post(reverse(REQUESTS), hidden)
    assert response.url == reverse(REQUEST, args=[row.pk])
    assert page_of(admin_client, REQUEST, row).buttons() == ["cancel"]


def test_retry_that_qstash_does_not_take_is_shown_plainly(
    admin_client: Client, qstash: FakeQStash
) -> None:
    row = failed(dead_letter_id="dlq-1")
    response = act(admin_client, REQUESTS, "retry_dead_letter", row, confirmed="1")
    assert messages_of(response) == [
        f'{row.uuid}: QStash answered 404: {{"error":"not found"}}',
    ]


def test_dropping_a_dead_letter_deletes_it_at_qstash(
    admin_client: Client, qstash: FakeQStash
) -> None:
    qstash.answer = lambda request: httpx.Response(200, json={})
    row = failed(dead_letter_id="dlq-1")
    response = act(admin_client, REQUESTS, "drop_dead_letter", row, from_page="1")
    assert messages_of(response) == ["1 dead letter was dropped."]
    assert response.url == reverse(REQUEST, args=[row.pk])
    assert qstash.calls == ["DELETE /v2/dlq/dlq-1"]
    assert page_of(admin_client, REQUEST, row).buttons() == ["resubmit"]


def test_an_answer_that_was_misread_is_read_again_for_nothing(
    admin_client: Client, qstash: FakeQStash
) -> None:
    row, without = misread(), failed()
    response = act(admin_client, REQUESTS, "read_again", row, without)
    assert messages_of(response) == [
        "1 read again; 1 of them changed something.",
        f"{without.uuid}: nothing is stored that could be read again.",
    ]
    row.refresh_from_db()
    assert (row.state, row.completion) == ("completed", "Forty-two.")
    assert qstash.calls == []


def test_an_answer_is_read_anew_when_its_model_has_a_price(
    admin_client: Client, settings: Any
) -> None:
    row = misread()
    act(admin_client, REQUESTS, "read_again", row)
    row.refresh_from_db()
    assert (row.state, row.cost) == ("completed", None)
    told_at = row.announced_at
    assert "read_again" in page_of(admin_client, REQUEST, row).buttons()
    prices = {f"{row.provider}/{row.model}": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "PRICES": prices}
    assert messages_of(act(admin_client, REQUESTS, "read_again", row)) == [
        "1 read again; 1 of them changed something."
    ]
    row.refresh_from_db()
    assert row.cost == Decimal(row.input_tokens + 2 * row.output_tokens) / 1_000_000
    assert (row.state, row.announced_at) == ("completed", told_at)


def test_an_answer_that_is_still_unreadable_says_why(admin_client: Client) -> None:
    row = misread()
    CallbackResponse.objects.update(body=b"<answer/>")
    LLMRequest.objects.update(error="the answer is not JSON")
    response = act(admin_client, REQUESTS, "read_again", row)
    assert messages_of(response) == [f"{row.uuid}: the answer is not JSON"]


def test_receipts_are_read_again_quarantined_ones_too(
    admin_client: Client, qstash: FakeQStash
) -> None:
    receipt, row = unread(), submitted(qstash_message_id="msg_8")
    envelope = Callback(status=200, body=ANSWERED, source_message_id="msg_8").to_json()
    quarantined = receipt_of(
        row, kind=Kind.QUARANTINED, source_message_id="sha256:1", body=envelope
    )
    broken = receipt_of(row, kind=Kind.QUARANTINED, source_message_id="sha256:2", body=b"[]")
    assert page_of(admin_client, RECEIPT, receipt).buttons() == ["read_again"]
    response = act(admin_client, RECEIPTS, "read_again", receipt, quarantined, broken)
    done, refused = messages_of(response)
    assert done == "2 read again; 2 of them changed something."
    assert refused.startswith(f"{row.uuid}: Still not an envelope")
    assert set(LLMRequest.objects.values_list("state", flat=True)) == {"completed"}
    assert page_of(admin_client, RECEIPT, receipt).buttons() == []
    assert LogEntry.objects.count() == 2


def test_reading_again_needs_the_permission_to_change_requests(
    staff_client: Callable[..., Client],
) -> None:
    client = staff_client("view_callbackresponse", "change_callbackresponse")
    receipt = unread()
    assert page_of(client, RECEIPT, receipt).buttons() == []
    act(client, RECEIPTS, "read_again", receipt)
    receipt.refresh_from_db()
    assert receipt.applied_at is None


def test_everything_that_matches_can_be_chosen_and_is_taken_in_portions(
    admin_client: Client,
) -> None:
    LLMRequest.objects.bulk_create(
        LLMRequest(model="m", provider="openai", messages=[{"role": "user", "content": "?"}])
        for _ in range(502)
    )
    row = LLMRequest.objects.first()
    response = act(admin_client, REQUESTS, "cancel", row, select_across="1")
    assert messages_of(response) == [
        "500 requests were cancelled.",
        "2 were left for another time: do it again.",
    ]
    assert LLMRequest.objects.pending().count() == 2


# --- batches, receipts, conversations ---------------------------------------------------------


def test_a_batch_shows_how_far_it_is_and_what_it_cost(admin_client: Client) -> None:
    batch = Batch.objects.create(name="nightly")
    completed(batch=batch, cost=Decimal("0.25"))
    completed(batch=batch, cost=None)
    failed(batch=batch)
    pending(batch=batch)
    enter_costs()
    page = page_of(admin_client, BATCH, batch)
    assert "2 completed, 1 failed, 1 pending" in page.text
    assert "$0.25 + 1 unpriced" in page.text
    assert "server_error" in page.text
    widths = [attrs.get("width") for tag, attrs in page.elements if tag == "rect"]
    assert widths == ["100", "50.000", "25.000", "25.000"]
    link = f"{reverse(REQUESTS)}?batch__id__exact={batch.pk}&state__exact=failed"
    assert link in page.values("a", "href")
    assert len(admin_client.get(link).context["cl"].result_list) == 1


def test_an_empty_batch_has_a_page(admin_client: Client) -> None:
    page = page_of(admin_client, BATCH, Batch.objects.create())
    assert "no requests" in page.text
    assert page.buttons() == []


def test_the_unfinished_of_a_batch_are_cancelled(admin_client: Client, qstash: FakeQStash) -> None:
    batch = Batch.objects.create()
    rows = [pending(batch=batch), submitted(batch=batch), failed(batch=batch), pending()]
    response = act(admin_client, BATCHES, "cancel_unfinished", batch, from_page="1")
    assert messages_of(response) == ["2 requests were cancelled."]
    assert response.url == reverse(BATCH, args=[batch.pk])
    states = [LLMRequest.objects.get(pk=row.pk).state for row in rows]
    assert states == ["cancelled", "cancelled", "failed", "pending"]


def test_the_failed_of_a_batch_are_resubmitted_once(admin_client: Client) -> None:
    batch = Batch.objects.create()
    failed(batch=batch)
    completed(batch=batch)
    page = Page(act(admin_client, BATCHES, "resubmit_failed", batch, from_page="1"))
    assert "1 request is about to be asked again" in page.text
    for _ in range(2):
        act(admin_client, BATCHES, "resubmit_failed", batch, confirmed="1")
    assert LLMRequest.objects.count() == 3
    assert batch.counts() == {
        "pending": 1, "submitted": 0, "completed": 1, "failed": 0, "cancelled": 0
    }  # fmt: skip
    page = page_of(admin_client, BATCH, batch)
    assert page.buttons() == ["cancel_unfinished"]
    assert "1 completed, 1 pending" in page.text
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.get_change_message()) == (
        str(batch.pk),
        "Resubmitted 1 failed request.",
    )


def test_what_failed_in_a_batch_and_cannot_be_asked_is_named_with_the_reason(
    admin_client: Client,
) -> None:
    batch = Batch.objects.create()
    gone = failed(batch=batch, provider="gone")
    failed(batch=batch)
    response = act(admin_client, BATCHES, "resubmit_failed", batch, confirmed="1")
    success, reason = messages_of(response)
    assert success == "1 request was resubmitted."
    assert reason.startswith(f"{gone.uuid}: ")
    assert "there is no provider 'gone'" in reason
    assert LLMRequest.objects.count() == 3


def test_all_that_failed_in_a_large_batch_is_resubmitted_in_one_portion(
    admin_client: Client,
) -> None:
    batch = Batch.objects.create()
    LLMRequest.objects.bulk_create(
        LLMRequest(model="m", provider="openai", messages=MESSAGES, state=State.FAILED, batch=batch)
        for _ in range(502)
    )
    page = Page(act(admin_client, BATCHES, "resubmit_failed", batch))
    assert "502 requests are about to be asked again" in page.text
    response = act(admin_client, BATCHES, "resubmit_failed", batch, confirmed="1")
    assert messages_of(response) == ["502 requests were resubmitted."]
    assert LLMRequest.objects.pending().count() == 502


def test_resubmitting_from_a_batch_without_a_token_names_the_setting(
    admin_client: Client, settings: Any
) -> None:
    batch = Batch.objects.create()
    failed(batch=batch)
    settings.QSTASH_TOKEN = ""
    response = act(admin_client, BATCHES, "resubmit_failed", batch, confirmed="1")
    assert "QSTASH_TOKEN" in messages_of(response)[0]
    assert LLMRequest.objects.count() == 1


def test_a_receipt_shows_its_body_as_text(admin_client: Client) -> None:
    body = gzip.compress(b'{"answer": "\xc3\x85s <b>"}')
    page = page_of(admin_client, RECEIPT, receipt_of(submitted(), body=body))
    assert '"answer": "Ås <b>"' in page.text
    assert "b" not in {tag for tag, _ in page.elements}


@pytest.mark.parametrize("body", [b"", b"\x00\xff\xfe\x80", b"\x1f\x8bbroken", b"[" * 50_000])
def test_a_body_of_any_bytes_has_a_page(admin_client: Client, body: bytes) -> None:
    row = failed()
    receipt = receipt_of(row, body=body, status=500)
    page_of(admin_client, RECEIPT, receipt)
    page_of(admin_client, REQUEST, row)


def test_a_large_body_is_not_read_whole(admin_client: Client) -> None:
    receipt = receipt_of(submitted(), body=b"x" * 2_000_000)
    page = page_of(admin_client, RECEIPT, receipt)
    assert "32,768 of 2,000,000 are shown" in page.text
    with CaptureQueriesContext(connection) as queries:
        page_of(admin_client, RECEIPT, receipt)
    whole = [re.sub(r"(SUBSTR|SUBSTRING|LENGTH)\([^)]*\)", "", q["sql"]) for q in queries]
    assert not [sql for sql in whole if '"body"' in sql]


def test_receipts_without_a_request_are_found(admin_client: Client) -> None:
    here = receipt_of(submitted())
    orphan = receipt_of(None, uuid=here.uuid, source_message_id="msg_8")
    for query, wanted in (("orphaned=yes", orphan), ("orphaned=no", here)):
        found = admin_client.get(f"{reverse(RECEIPTS)}?{query}").context["cl"].result_list
        assert [row.pk for row in found] == [wanted.pk]


def test_receipts_that_a_person_should_see_are_found(admin_client: Client) -> None:
    now = timezone.now()
    wanted = {
        "unread": unread(),
        "recovered": receipt_of(
            submitted(), source_message_id="msg_8", is_recovered=True, applied_at=now
        ),
        "next_key": receipt_of(
            submitted(), source_message_id="msg_9", verified_by_next_key=True, applied_at=now
        ),
    }
    for query, receipt in wanted.items():
        found = admin_client.get(f"{reverse(RECEIPTS)}?attention={query}").context["cl"].result_list
        assert [row.pk for row in found] == [receipt.pk]


def test_a_receipts_page_says_how_its_reading_went(admin_client: Client) -> None:
    shown = page_of(admin_client, RECEIPT, unread()).text
    assert re.search(r"Apply tries: +1", shown)
    assert "KeyError: 'choices'" in shown
    assert not re.search("Applied at|Recovered", shown)
    recovered = receipt_of(
        submitted(), source_message_id="msg_8", is_recovered=True, applied_at=timezone.now()
    )
    shown = page_of(admin_client, RECEIPT, recovered).text
    assert "Applied at" in shown
    assert "Recovered" in shown


def test_a_ping_has_a_page_and_nothing_to_read_again(admin_client: Client) -> None:
    ping = receipt_of(None, uuid=uuid4(), kind=Kind.PING, applied_at=timezone.now())
    page = page_of(admin_client, RECEIPT, ping)
    assert page.buttons() == []
    assert "↔" in page.text
    response = act(admin_client, RECEIPTS, "read_again", ping)
    assert "A ping says nothing about a request." in messages_of(response)[0]


def test_a_waiting_request_shows_its_deadline_and_how_often_qstash_was_asked(
    admin_client: Client,
) -> None:
    row = submitted(deadline_at=timezone.now(), inquiries=3)
    shown = page_of(admin_client, REQUEST, row).text
    assert "Deadline" in shown
    assert re.search(r"Inquiries: +3", shown)


def test_a_circuit_is_shown_and_closed_by_who_may(
    admin_client: Client, staff_client: Callable[..., Client]
) -> None:
    now = timezone.now()
    Circuit.objects.trip("qstash", "429: <b>daily limit</b>", now=now)
    circuit = Circuit.objects.get()
    assert_inert(page_of(admin_client, CIRCUITS))
    assert "daily limit" in page_of(admin_client, CIRCUITS).text
    viewer = staff_client("view_circuit", "change_circuit")
    assert page_of(viewer, CIRCUIT, circuit).buttons() == []
    act(viewer, CIRCUITS, "close", circuit)
    assert not Circuit.objects.may_call("qstash", now)

    assert page_of(admin_client, CIRCUIT, circuit).buttons() == ["close"]
    response = act(admin_client, CIRCUITS, "close", circuit, from_page="1")
    assert messages_of(response) == ["1 circuit was closed."]
    assert Circuit.objects.may_call("qstash", now)
    assert page_of(admin_client, CIRCUIT, circuit).buttons() == []
    delete = reverse("admin:django_qstash_llm_circuit_delete", args=[circuit.pk])
    assert admin_client.post(delete, {"post": "yes"}).status_code == 403


# --- lanes ------------------------------------------------------------------------------------


def broke() -> Lane:
    """OpenAI wants money."""
    words = "You exceeded your quota <b>now</b>."
    paused = {"paused_at": timezone.now(), "trouble": "money", "reason": words}
    return Lane.objects.create(provider="openai", **paused)


def test_a_lane_is_paused_and_resumed_by_its_buttons(
    admin_client: Client, qstash: FakeQStash
) -> None:
    lane = Lane.objects.create(tenant="acme")
    pending(tenant="acme")
    assert page_of(admin_client, LANE, lane).buttons() == ["pause"]
    response = act(admin_client, LANES, "pause", lane, from_page="1")
    assert messages_of(response) == ["1 lane is paused."]
    page = page_of(admin_client, LANE, lane)
    assert page.buttons() == ["resume"]
    assert re.search("Paused by: +admin", page.text)
    assert "What QStash has already goes on." in page.text
    (waiting,) = [href for href in page.values("a", "href") if "state__exact=pending" in href]
    assert "1 LLM request" in Page(admin_client.get(waiting)).text

    response = act(admin_client, LANES, "resume", lane, from_page="1")
    assert messages_of(response) == ["1 lane goes on."]
    lane.refresh_from_db()
    assert (lane.is_paused, lane.resumed_by) == (False, "admin")
    notes = LogEntry.objects.order_by("pk").values_list("change_message", flat=True)
    told = [str(note) for note in notes]
    assert told[0].startswith("Lane tenant acme is paused since")
    assert told[1].startswith("Resumed. Before: Lane tenant acme is paused since")
    assert "admin" in told[1]


def test_what_has_no_lane_yet_is_paused_from_the_form(
    admin_client: Client, qstash: FakeQStash
) -> None:
    add = reverse("admin:django_qstash_llm_lane_add")
    assert "Pause a lane" in Page(admin_client.get(add)).text
    for reason in ("a new key", "a newer key"):  # the second time it is there already
        data = {"provider": "openai", "model": "m", "reason": reason}
        response = admin_client.post(add, data)
        assert response.status_code == 302
        lane = Lane.objects.get()
        assert (lane.paused_by, lane.reason) == ("admin", reason)
        assert messages_of(response)[-1] == lane.pause_in_words
    assert LogEntry.objects.count() == 2


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "name at least one of provider, model, tenant, queue"),
        ({"provider": "opnai"}, "there are anthropic, openai, upstash"),
        ({"queue": "a b"}, "is not a name"),
        (
            {"tenant": "acme", "paused_until_0": "2020-01-01", "paused_until_1": "00:00"},
            "It has passed",
        ),
    ],
)
def test_a_lane_of_nothing_is_refused_by_the_form(
    admin_client: Client, data: dict[str, str], problem: str
) -> None:
    response = admin_client.post(reverse("admin:django_qstash_llm_lane_add"), data)
    assert problem in Page(response).text
    assert not Lane.objects.exists()


def test_lanes_are_for_those_who_may(staff_client: Callable[..., Client]) -> None:
    lane = broke()
    viewer = staff_client("view_lane", "change_lane", "add_lane", "delete_lane")
    assert page_of(viewer, LANE, lane).buttons() == []
    act(viewer, LANES, "resume", lane)
    lane.refresh_from_db()
    assert lane.is_paused
    for name, args in (("add", []), ("delete", [lane.pk])):
        url = reverse(f"admin:django_qstash_llm_lane_{name}", args=args)
        assert viewer.post(url, {"post": "yes"}).status_code == 403


def test_what_a_provider_paused_is_told_at_the_top_of_our_pages(admin_client: Client) -> None:
    index = reverse("admin:app_list", args=["django_qstash_llm"])
    health = reverse("admin:django_qstash_llm_llmrequest_health")
    pages = [reverse(REQUESTS), reverse(RECEIPTS), reverse(LANES), index, health]
    assert "is paused" not in Page(admin_client.get(index)).text
    Lane.objects.named(tenant="acme").pause(by="ada", reason="a person's own")
    assert "llm-paused" not in Page(admin_client.get(index)).html
    lane = broke()
    for url in pages:
        page = Page(admin_client.get(url))
        assert_inert(page)
        assert "Lane openai is paused since" in page.text
        assert "You exceeded your quota <b>now</b>." in page.text
        assert "pay at the provider's console, then resume." in page.text
        assert reverse(LANE, args=[lane.pk]) in page.values("a", "href")
    lane.resume(by="ada")
    assert "llm-paused" not in Page(admin_client.get(index)).html


def test_who_may_not_see_lanes_is_not_told_of_them(staff_client: Callable[..., Client]) -> None:
    broke()
    client = staff_client("view_llmrequest")
    for url in (reverse(REQUESTS), reverse("admin:app_list", args=["django_qstash_llm"])):
        assert "exceeded your quota" not in Page(client.get(url)).text


def test_a_request_says_for_which_lane_it_waits(admin_client: Client) -> None:
    behind = [pending(queue="q", via="enqueue", provider=name) for name in ("openai", "anthropic")]
    broke()
    waiting, after = (page_of(admin_client, REQUEST, row).text for row in behind)
    assert "Lane openai is paused since" in waiting
    assert "then resume." in waiting
    assert "behind another of its queue, of which a lane is paused" in after
    assert "Lane openai is paused" in page_of(admin_client, REQUEST, submitted()).text


def test_a_lane_shows_what_was_learned_and_what_qstash_was_told(
    admin_client: Client, qstash: FakeQStash
) -> None:
    limit = {"learned_limit": 600, "learned_period": 60, "learned_at": timezone.now()}
    lane = Lane.objects.create(provider="openai", model="m", key="k", **limit)
    shown = page_of(admin_client, LANE, lane).text
    assert "600 requests in 60 s" in shown
    assert "QStash delivers it." in shown
    lane.pause(by="ada")
    assert "QStash is being told." in page_of(admin_client, LANE, lane).text
    Lane.objects.update(tell_problem="QStash answered 503")
    provider = Lane.objects.named(provider="openai")
    assert "QStash answered 503" in page_of(admin_client, LANE, provider).text
    Lane.objects.filter(key="k").update(is_held=True)
    for held in (lane, provider):
        assert "QStash holds what it has of it." in page_of(admin_client, LANE, held).text


def test_requests_of_a_tenant_are_found(admin_client: Client) -> None:
    row = pending(tenant="acme & co")
    pending(tenant="other")
    links = page_of(admin_client, REQUEST, row).values("a", "href")
    (of_tenant,) = [href for href in links if "?tenant=" in href]
    response = admin_client.get(of_tenant)
    assert [found.pk for found in response.context["cl"].result_list] == [row.pk]


def test_receipts_are_found_by_request_and_message(admin_client: Client) -> None:
    wanted = receipt_of(submitted())
    receipt_of(submitted(), source_message_id="msg_8")
    for term in (str(wanted.uuid), "msg_7"):
        found = admin_client.get(reverse(RECEIPTS), {"q": term}).context["cl"].result_list
        assert [row.pk for row in found] == [wanted.pk]


def test_a_conversation_is_shown_turn_by_turn(admin_client: Client) -> None:
    talk = Conversation.objects.create(title="Tides", system="Be brief.")
    completed(conversation=talk, messages=[{"role": "user", "content": "Why tides?"}])
    failed(conversation=talk, messages=[{"role": "user", "content": "And the sun?"}])
    shown = page_of(admin_client, CONVERSATION, talk).text
    order = ["Be brief.", "Why tides?", "Forty-two.", "And the sun?", "The server had an error"]
    positions = [shown.index(words) for words in order]
    assert positions == sorted(positions)


def test_the_pages_carry_no_inline_style_or_script(admin_client: Client) -> None:
    fill(1)
    broke()
    for name in (REQUESTS, BATCHES, RECEIPTS, CONVERSATIONS, LANES):
        page = page_of(admin_client, name)
        assert page.inline_code == []
        assert not [attrs for _, attrs in page.elements if "style" in attrs]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (submitted, "The provider is being asked, without QStash"),
        (
            partial(failed, state=State.CANCELLED, error_code="aborted"),
            "has left before the answer",
        ),
    ],
)
def test_chat_is_told_of_without_qstash(
    admin_client: Client, row: Callable[..., LLMRequest], sentence: str
) -> None:
    asked = row(via="chat", qstash_message_id="", submitted_at=timezone.now())
    content = admin_client.get(reverse(REQUEST, args=[asked.pk])).content.decode()
    assert sentence in content
    assert "QStash has it" not in content


# --- prices -----------------------------------------------------------------------------------

PRICES = "admin:django_qstash_llm_price_changelist"
PRICE = "admin:django_qstash_llm_price_change"
ADD_PRICE = "admin:django_qstash_llm_price_add"


def form(**given: Any) -> dict[str, Any]:
    of = {"provider": "openai", "model": "m", "token_class": "input", "tier": "", "above": "0"}
    return of | {"amount": "2.5", "since_0": "", "since_1": "", "source": ""} | given


def test_price_is_set_by_the_form_and_never_edited(admin_client: Client) -> None:
    assert "Set a price" in Page(admin_client.get(reverse(ADD_PRICE))).text
    admin_client.post(reverse(ADD_PRICE), form())
    price = Price.objects.get()
    assert (price.amount, price.source, price.until) == (Decimal("2.5"), "admin", None)
    assert LogEntry.objects.get().object_id == str(price.pk)
    page = Page(admin_client.post(reverse(ADD_PRICE), form()))
    assert "It costs that already." in page.text
    admin_client.post(reverse(ADD_PRICE), form(amount="3", source="a letter"))
    price.refresh_from_db()
    new = Price.objects.get(until=None)
    assert (new.amount, new.since, new.source) == (3, price.until, "a letter")
    now = timezone.localtime()
    early = form(amount="4", since_0=f"{now:%Y-%m-%d}", since_1=f"{now:%H:%M:%S.%f}")
    assert "changes on" in Page(admin_client.post(reverse(ADD_PRICE), early)).text
    assert Price.objects.count() == 2
    listed = Page(admin_client.get(reverse(PRICES))).text
    assert "openai/m" in listed
    assert "$2.50" in listed
    url = reverse(PRICE, args=[price.pk])
    admin_client.post(url, form(amount="9"))
    assert (
        admin_client.post(
            reverse("admin:django_qstash_llm_price_delete", args=[price.pk])
        ).status_code
        == 403
    )
    price.refresh_from_db()
    assert price.amount == Decimal("2.5")


def test_change_of_a_price_that_has_not_begun_is_withdrawn(admin_client: Client) -> None:
    Price.objects.set("openai", "m", {"input": 1})
    later = timezone.now() + timedelta(days=1)
    [new] = Price.objects.set("openai", "m", {"input": 2}, since=later)
    assert page_of(admin_client, PRICE, new).buttons() == ["withdraw"]
    response = act(admin_client, PRICES, "withdraw", new)
    assert messages_of(response) == ["1 change is withdrawn."]
    left = Price.objects.get()
    assert left.until is None
    assert page_of(admin_client, PRICE, left).buttons() == []
    assert "has begun" in messages_of(act(admin_client, PRICES, "withdraw", left))[1]


def test_prices_are_for_those_who_may(staff_client: Callable[..., Client]) -> None:
    [price] = Price.objects.set("openai", "m", {"input": 1})
    viewer = staff_client("view_price")
    assert viewer.get(reverse(PRICES)).status_code == 200
    assert viewer.post(reverse(ADD_PRICE), form(amount="9")).status_code == 403
    unpriced = reverse("admin:django_qstash_llm_price_unpriced")
    assert viewer.get(unpriced).status_code == 200
    User.objects.get(username="staff").user_permissions.clear()
    assert viewer.get(unpriced).status_code == 403
    assert Price.objects.get() == price


def test_models_without_a_price_are_listed(admin_client: Client) -> None:
    url = reverse("admin:django_qstash_llm_price_unpriced")
    assert "None: all that was answered has a cost." in Page(admin_client.get(url)).text
    answered = {"state": State.COMPLETED, "provider": "openai", "model": "unheard-of"}
    LLMRequest.objects.create(**answered, input_tokens=1, output_tokens=1)
    assert "openai/unheard-of" in Page(admin_client.get(url)).text
    assert url in admin_client.get(reverse(PRICES)).content.decode()


def test_cost_is_explained_on_the_page(admin_client: Client) -> None:
    Price.objects.set(
        "openai", "m", {"input": "0.25", "output": 2}, since=timezone.now() - timedelta(days=1)
    )
    usage = {"prompt_tokens": 1200, "completion_tokens": 300}
    usage["completion_tokens_details"] = {"audio_tokens": 7}  # type: ignore[assignment]
    row = LLMRequest.objects.create(
        state=State.COMPLETED, provider="openai", model="m", input_tokens=1200, output_tokens=300,
        usage=usage, finished_at=timezone.now(),
    )  # fmt: skip
    text_ = page_of(admin_client, REQUEST, row).text
    assert "unpriced" in text_
    assert "of the output sound" in text_
    usage.pop("completion_tokens_details")
    LLMRequest.objects.update(usage=usage)
    assert [cost.amount for _, cost in LLMRequest.objects.price_unpriced()] == [Decimal("0.0009")]
    text_ = page_of(admin_client, REQUEST, row).text
    assert "1,200 input × $0.25/M + 300 output × $2.00/M" in text_
    assert "openai/m, since" in text_
    assert "unpriced" not in text_
