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

from django_qstash_llm.models import CallbackResponse, Lane, LLMRequest
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


def lanes(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_lanes", *arguments, stdout=out)
    return out.getvalue()


def test_a_lane_is_paused_listed_and_resumed(qstash: FakeQStash) -> None:
    assert lanes() == ""
    told = lanes("pause", "--provider", "openai", "--reason", "a new key", "--by", "ada")
    lane = Lane.objects.get()
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    assert told == f"{lane.pause_in_words} 0 wait.\n"
    assert lanes() == f"{lane.pause_in_words} 1 wait.\n"
    assert sweep().startswith("0 submitted, 0 announced, 1 still pending.\n")
    assert lane.pause_in_words in sweep()
    assert lanes("resume", "--provider", "openai") == "openai: open. QStash is being told.\n"
    lane.refresh_from_db()
    assert (lane.is_paused, lane.resumed_by) == (False, "llm_lanes")
    assert sweep().startswith("1 submitted")


def test_a_lane_is_paused_for_a_while(qstash: FakeQStash) -> None:
    lanes("pause", "--tenant", "acme", "--for", "1h30m")
    span = Lane.objects.get().paused_until - timezone.now()
    assert timedelta(minutes=89) < span <= timedelta(minutes=90)
    lanes("pause", "--tenant", "acme", "--until", "2999-01-01T08:00+01:00")
    assert Lane.objects.get().paused_until.isoformat() == "2999-01-01T07:00:00+00:00"


def test_sweep_tells_qstash_of_lanes(qstash: FakeQStash) -> None:
    lanes("pause", "--queue", "slow")
    assert Lane.objects.get().is_held is None
    qstash.answer = lambda request: httpx.Response(200)
    sweep()
    assert Lane.objects.get().is_held is True
    assert qstash.calls == ["POST /v2/queues/slow/pause"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pause"], "--provider: name at least one of provider, model, tenant, queue"),
        (["pause", "--provider", "opnai"], "--provider: there is no 'opnai'"),
        (["pause", "--tenant", "a", "--for", "long"], "--for long: give a duration"),
        (["pause", "--tenant", "a", "--until", "noon"], "--until noon: give a moment"),
        (["pause", "--tenant", "a", "--until", "2026-13-01T00:00"], "--until 2026-13"),
        (["pause", "--tenant", "a", "--until", "2001-01-01T00:00"], "--until: .* has passed"),
        (["resume", "--tenant", "a"], "There is no lane --tenant a"),
        (["resume", "--queue", "open"], "Lane queue open is not paused"),
    ],
)
def test_what_is_wrong_with_a_lane_names_the_option(arguments: list[str], problem: str) -> None:
    Lane.objects.create(queue="open")
    with pytest.raises(CommandError, match=problem):
        lanes(*arguments)
