from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.test import Client
from django.urls import reverse

from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter, LogEntry, Message, Queue

from .conftest import PROVIDER, Api, Wire, state

MARKUP = "<script>alert(1)</script>"


@pytest.fixture
def staff(db: None) -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "a@a.test", "pw"))
    return client


@pytest.fixture
def history(api: Api, engine: Engine, wire: Wire) -> str:
    """A message that failed, one that was delivered, one that waits in a queue."""
    wire.answers(httpx.Response(500, text=MARKUP, headers={"X-M": MARKUP}), httpx.Response(200))
    failed = api.published(
        body=MARKUP.encode(), Upstash_Retries="0", Upstash_Forward_Authorization="Bearer canary"
    )
    engine.deliver_due()
    api.published(f"{PROVIDER}?q={MARKUP.replace('<', '%3C')}")
    engine.deliver_due()
    api.enqueue("q")
    return failed


def changelist(model: type) -> str:
    return reverse(f"admin:qstash_server_{model.__name__.lower()}_changelist")


def page_of(row: Any) -> str:
    return reverse(f"admin:qstash_server_{type(row).__name__.lower()}_change", args=[row.pk])


def act(client: Client, action: str, *rows: Any) -> str:
    answer = client.post(
        changelist(type(rows[0])),
        {"action": action, "_selected_action": [row.pk for row in rows]},
        follow=True,
    )
    assert answer.status_code == 200
    return answer.content.decode()


@pytest.mark.parametrize("model", [Message, LogEntry, DeadLetter, Queue])
def test_pages_show_foreign_text_as_text_and_no_keys(
    staff: Client, history: str, model: type
) -> None:
    rows = model._default_manager.all()
    assert rows
    for url in [changelist(model), f"{changelist(model)}?q=provider", *map(page_of, rows)]:
        answer = staff.get(url)
        assert answer.status_code == 200
        content = answer.content.decode()
        assert MARKUP not in content
        assert "canary" not in content


def test_a_failed_message_shows_what_was_asked_and_answered(staff: Client, history: str) -> None:
    letter = DeadLetter.objects.get()
    assert "&lt;script&gt;alert(1)" in staff.get(page_of(letter)).content.decode()
    message = staff.get(page_of(letter.message)).content.decode()
    assert "&lt;script&gt;alert(1)" in message
    assert "REDACTED" in message


@pytest.mark.parametrize("model", [Message, LogEntry, DeadLetter, Queue])
def test_nothing_is_added_edited_or_deleted(staff: Client, history: str, model: type) -> None:
    row = model._default_manager.first()
    name = f"admin:qstash_server_{model.__name__.lower()}"
    assert staff.get(reverse(f"{name}_add")).status_code == 403
    assert staff.post(reverse(f"{name}_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
    assert staff.post(page_of(row), {"state": "DELIVERED"}).status_code == 403
    assert "delete_selected" not in staff.get(changelist(model)).content.decode()


def test_messages_are_cancelled(staff: Client, api: Api) -> None:
    ids = [api.published(Upstash_Delay="1h") for _ in range(2)]
    assert "2 messages cancelled." in act(staff, "cancel", *Message.objects.all())
    assert [state(message_id) for message_id in ids] == ["CANCELED"] * 2


def test_dead_letters_are_retried_and_deleted(
    staff: Client, api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500))
    for _ in range(2):
        api.published(Upstash_Retries="0")
    engine.deliver_due()
    first, second = DeadLetter.objects.order_by("pk")
    assert "1 published again." in act(staff, "retry", first)
    assert Message.objects.filter(state="CREATED").count() == 1
    assert "1 dead letter deleted." in act(staff, "discard", second)
    assert not DeadLetter.objects.exists()


def test_a_dead_letter_that_is_refused_now_says_why(
    staff: Client, api: Api, engine: Engine, wire: Wire, configure: Callable[..., None]
) -> None:
    wire.answers(httpx.Response(500))
    api.published(Upstash_Retries="4")
    Message.objects.update(retries=0)
    engine.deliver_due()
    configure(MAX_RETRIES=3)
    assert "quota maxRetries exceeded" in act(staff, "retry", DeadLetter.objects.get())
    assert DeadLetter.objects.count() == 1


def test_a_dead_letter_that_cannot_be_read_any_more_stops_no_other(
    staff: Client, api: Api, engine: Engine, wire: Wire
) -> None:
    wire.answers(httpx.Response(500))
    for _ in range(3):
        api.published(Upstash_Retries="0")
    engine.deliver_due()
    letters = list(DeadLetter.objects.order_by("pk"))
    Message.objects.filter(dead_letter=letters[1]).update(
        headers={"Upstash-Delay": "1h", "Upstash-Retries": "x"}
    )
    shown = act(staff, "retry", *letters)
    assert "retries" in shown.lower()
    assert "2 published again." in shown
    assert DeadLetter.objects.get() == letters[1]


def test_queues_are_paused_and_resumed(staff: Client, api: Api) -> None:
    api.enqueue("q")
    assert "1 queue paused." in act(staff, "pause", Queue.objects.get())
    assert Queue.objects.get().is_paused
    assert "1 queue resumed." in act(staff, "resume", Queue.objects.get())
    assert not Queue.objects.get().is_paused


def test_who_may_only_look_is_offered_no_actions(staff: Client, api: Api) -> None:
    api.published(Upstash_Delay="1h")
    user = get_user_model().objects.create_user("viewer", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_message"))
    viewer = Client()
    viewer.force_login(user)
    assert viewer.get(changelist(Message)).status_code == 200
    viewer.post(
        changelist(Message),
        {"action": "cancel", "_selected_action": [Message.objects.get().pk]},
    )
    assert Message.objects.get().state == "CREATED"


@pytest.mark.parametrize("model", [Message, LogEntry, DeadLetter, Queue])
def test_a_list_takes_the_same_queries_however_long_it_is(
    staff: Client, api: Api, engine: Engine, wire: Wire, model: type
) -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    wire.answers(httpx.Response(500))

    def queries() -> int:
        api.enqueue(f"q{Queue.objects.count()}", Upstash_Retries="0")
        engine.deliver_due()
        with CaptureQueriesContext(
            connection,
        ) as captured:
            staff.get(changelist(model))
        return len(captured)

    queries()
    assert queries() == queries()
