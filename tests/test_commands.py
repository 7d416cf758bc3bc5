from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from typing import Any

import httpx
import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.qstash import Callback, DeadLetter, LogEntry, MessageRecord

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]
NOTHING_OVERDUE = "0 callbacks read again. 0 overdue: 0 recovered, 0 failed, 0 lost, 0 waiting.\n"


def sweep(*arguments: str, **streams: StringIO) -> str:
    out = StringIO()
    call_command("llm_sweep", *arguments, stdout=out, **streams)
    return out.getvalue()


def test_sweep_submits_and_announces_here_and_now(
    qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    done = LLMRequest.objects.publish(MESSAGES)
    answer = json.dumps(ANSWER).encode()
    post_callback(done, Callback(status=200, body=answer, source_message_id="msg_1"))
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES) for _ in range(3)])
    assert sweep() == "3 submitted, 1 announced, 0 still pending.\n" + NOTHING_OVERDUE
    assert LLMRequest.objects.submitted().count() == 3
    done.refresh_from_db()
    assert done.announced_at is not None


def test_sweep_with_nothing_to_do_says_so(qstash: FakeQStash) -> None:
    assert sweep() == "0 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE
    assert qstash.calls == []


def test_sweep_takes_more_than_one_claim(qstash: FakeQStash) -> None:
    rows = [
        LLMRequest(messages=MESSAGES, provider="openai", model="m", retries=1) for _ in range(2010)
    ]
    LLMRequest.objects.bulk_create(rows)
    assert sweep() == "2010 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE


def test_sweep_that_qstash_refuses_says_what_to_look_at(qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(401, json={"error": "invalid token"})
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()
    assert LLMRequest.objects.pending().count() == 1


@override_settings(QSTASH_TOKEN="")
def test_sweep_without_a_token_names_the_setting() -> None:
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()


def test_sweep_asks_about_what_is_overdue_and_announces_it(qstash: FakeQStash) -> None:
    now = timezone.now()
    fields = {"messages": MESSAGES, "state": "submitted", "deadline_at": now - timedelta(hours=1)}
    rows = [LLMRequest(**fields, qstash_message_id=f"msg_{n}", inquiries=1) for n in range(150)]
    rows = LLMRequest.objects.bulk_create(rows)
    answered, failed, waiting, *_ = rows
    answer = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_0")
    dead = DeadLetter(
        message_id="msg_back",
        dlq_id="1-1",
        url=f"http://testserver/llm/callback/{answered.uuid}/",
        body=answer.to_json(),
    )
    entry = LogEntry(
        time=1, message_id="msg_1", state="CANCELED", url="", labels=(failed.wire_label,)
    )
    qstash.dead_letters.append(dead.to_json())
    qstash.logs.append(entry.to_json())
    qstash.kept["msg_2"] = MessageRecord(message_id="msg_2", url="").to_json()
    assert sweep() == (
        "0 submitted, 149 announced, 0 still pending.\n"
        "0 callbacks read again. 150 overdue: 1 recovered, 1 failed, 147 lost, 1 waiting.\n"
    )
    waiting.refresh_from_db()
    assert waiting.state == "submitted"


def test_sweep_reads_stored_callbacks_again(qstash: FakeQStash) -> None:
    [row] = LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES, state="submitted")])
    CallbackResponse.objects.create(
        uuid=row.uuid,
        llm_request=row,
        kind="callback",
        source_message_id="msg_1",
        status=200,
        body=json.dumps(ANSWER).encode(),
        apply_tries=1,
    )
    assert sweep() == (
        "0 submitted, 1 announced, 0 still pending.\n"
        "1 callbacks read again. 0 overdue: 0 recovered, 0 failed, 0 lost, 0 waiting.\n"
    )


def test_sweep_that_cannot_ask_says_so_and_ends_as_usual(qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(503)
    fields = {"messages": MESSAGES, "state": "submitted", "deadline_at": timezone.now()}
    LLMRequest.objects.bulk_create([LLMRequest(**fields) for _ in range(3)])
    errors = StringIO()
    assert "1 overdue: 0 recovered, 0 failed, 0 lost, 1 waiting." in sweep(stderr=errors)
    assert "Some could not be asked about: QStash answered 503" in errors.getvalue()
    assert len(qstash.calls) == 1


def test_sweep_of_another_database_is_named() -> None:
    assert (
        sweep("--database", "default")
        == "0 submitted, 0 announced, 0 still pending.\n" + NOTHING_OVERDUE
    )


@pytest.mark.django_db(databases=["default", "second"], transaction=True)
def test_commands_look_where_a_router_has_put_our_rows(
    second_database: str, qstash: FakeQStash
) -> None:
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    assert sweep("--database", "default").startswith("0 submitted, 0 announced, 0 still pending.")
    assert sweep().startswith("1 submitted, 0 announced, 0 still pending.")
    row = LLMRequest.objects.get()
    ended_at = timezone.now() - timedelta(days=3)
    LLMRequest.objects.update(state="completed", finished_at=ended_at, announced_at=ended_at)
    out = StringIO()
    call_command("llm_purge", "--older-than", "1", stdout=out)
    assert out.getvalue().startswith("1 requests forgotten")
    call_command("llm_replay", "--failed", stdout=out)
    with pytest.raises(CommandError, match="1 of 1 could not be done"):
        call_command("llm_replay", str(row.uuid), "--dead-letters", "drop", stdout=out)
    assert f"{row.uuid} - refused: {row.uuid} has no known dead letter." in out.getvalue()
