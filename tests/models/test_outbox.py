from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from django.db import connection, connections, transaction
from django.test import override_settings

from django_qstash_llm.exceptions import ConfigurationError
from django_qstash_llm.health import Pulse
from django_qstash_llm.models import Circuit, LLMRequest
from django_qstash_llm.models.circuit import QSTASH
from django_qstash_llm.models.outbox import (
    MOST_IN_VAIN,
    STALE_PER_CLAIM,
    TRIES_IN_DOUBT,
    Outbox,
)
from django_qstash_llm.models.request import State
from django_qstash_llm.qstash import Callback, Message
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MESSAGES = [{"role": "user", "content": "How many roads?"}]
DONE = json.dumps(ANSWER).encode()


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **duration: float) -> None:
        self.now += timedelta(**duration)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(clock: Clock, qstash: FakeQStash) -> Outbox:
    return Outbox(clock=clock)


def ask(count: int = 1, **asked: Any) -> list[LLMRequest]:
    return [LLMRequest.objects.publish(MESSAGES, **asked) for _ in range(count)]


def states() -> dict[str, int]:
    rows = LLMRequest.objects.values_list("state", flat=True)
    return {state: list(rows).count(state) for state in set(rows)}


def answers(status: int, content: bytes | str = b"", **headers: str) -> Callable[..., Any]:
    return lambda request: httpx.Response(status, content=content, headers=headers)


def does_the_work_and_then(qstash: FakeQStash, answer: Callable[..., Any]) -> Callable[..., Any]:
    """A QStash whose answer is lost or spoilt after it took the messages."""

    def respond(request: httpx.Request) -> httpx.Response:
        qstash.take(request, request.url.path.removeprefix("/qstash"))
        return answer(request)

    return respond


def cut(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("connection reset", request=request)


# --- the good path ---


def test_one_row_is_published_by_itself(outbox: Outbox, qstash: FakeQStash) -> None:
    [row] = ask()
    assert outbox.submit() == 1
    row.refresh_from_db()
    assert qstash.calls == ["POST /v2/publish/https://provider.test/v1/chat/completions"]
    assert (row.state, row.qstash_message_id, row.submitted_at) == ("submitted", "msg_1", NOW)
    assert (row.claim_token, row.claimed_until) == (None, None)


def test_one_row_with_a_queue_is_enqueued(outbox: Outbox, qstash: FakeQStash) -> None:
    LLMRequest.objects.enqueue(MESSAGES, queue="slow")
    outbox.submit()
    assert qstash.calls == ["POST /v2/enqueue/slow/https://provider.test/v1/chat/completions"]


def test_many_rows_leave_in_one_call_and_each_keeps_its_own_id(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    rows = ask(100)
    assert outbox.submit() == 100
    assert qstash.calls == ["POST /v2/batch"]
    given = dict(LLMRequest.objects.values_list("uuid", "qstash_message_id"))
    assert given == {row.uuid: qstash.ids[row.deduplication_id] for row in rows}


def test_oldest_leave_first(outbox: Outbox, qstash: FakeQStash) -> None:
    rows = ask(5)
    outbox.submit()
    sent = [Message.from_batch_item(item).deduplication_id for item in qstash.messages]
    assert sent == [row.deduplication_id for row in rows]


@pytest.mark.parametrize(
    ("setting", "calls"),
    [
        ({"BATCH_SIZE": 10}, 3),
        ({"BATCH_SIZE": 1}, 25),
        ({"BATCH_BYTES": 4000}, 13),
        ({"BATCH_BYTES": 1}, 25),
        ({}, 1),
    ],
)
def test_chunks_are_limited_by_count_and_by_bytes(
    outbox: Outbox, qstash: FakeQStash, settings: Any, setting: dict[str, int], calls: int
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | setting
    ask(25)
    outbox.submit()
    assert len(qstash.calls) == calls
    assert states() == {"submitted": 25}


def test_limit_is_kept(outbox: Outbox) -> None:
    ask(7)
    assert outbox.submit(limit=3) == 3
    assert states() == {"submitted": 3, "pending": 4}


def test_nothing_to_submit_makes_no_call(outbox: Outbox, qstash: FakeQStash) -> None:
    assert outbox.submit() == 0
    assert qstash.calls == []


def test_submitted_rows_are_not_submitted_again(outbox: Outbox, qstash: FakeQStash) -> None:
    ask(2)
    outbox.submit()
    assert outbox.submit() == 0
    assert len(qstash.messages) == 2


def test_number_of_queries_does_not_grow_with_the_rows(
    outbox: Outbox, django_assert_max_num_queries: Any
) -> None:
    ask(300)
    with django_assert_max_num_queries(30 if connection.vendor == "postgresql" else 330):
        outbox.submit()


@override_settings(QSTASH_TOKEN="")
def test_missing_token_leaves_the_rows_pending_and_names_the_setting(clock: Clock) -> None:
    LLMRequest.objects.create(messages=MESSAGES)
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        Outbox(clock=clock).submit()
    assert states() == {"pending": 1}


# --- rows that did not come through save() ---


def test_bulk_created_rows_get_the_defaults_and_are_submitted(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES) for _ in range(3)])
    assert outbox.submit() == 3
    assert set(LLMRequest.objects.values_list("state", "provider", "model", "retries")) == {
        ("submitted", "openai", "gpt-5.4-mini", 3)
    }
    assert {json.loads(item["body"])["model"] for item in qstash.messages} == {"gpt-5.4-mini"}


def test_bulk_created_row_that_cannot_be_asked_fails_alone(outbox: Outbox) -> None:
    good = LLMRequest(messages=MESSAGES)
    bad = LLMRequest(messages=[])
    LLMRequest.objects.bulk_create([good, bad])
    outbox.submit()
    good.refresh_from_db()
    bad.refresh_from_db()
    assert (good.state, bad.state, bad.error_code) == ("submitted", "failed", "cannot_submit")
    assert "messages" in bad.error


def test_row_whose_provider_this_worker_lacks_waits_alone_and_says_so(
    outbox: Outbox, settings: Any
) -> None:
    ask(2)
    gone = LLMRequest.objects.publish(MESSAGES, provider="anthropic")
    providers = {"openai": settings.QSTASH_LLM["PROVIDERS"]["openai"]}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": providers}
    outbox.submit()
    gone.refresh_from_db()
    assert states() == {"submitted": 2, "pending": 1}
    assert (gone.claim_token, gone.first_tried_at) == (None, None)
    assert "anthropic" in gone.error
    # An hour later it is no worker that was deployed late.
    LLMRequest.objects.update(submission_tries=TRIES_IN_DOUBT, submit_after=None)
    outbox.submit()
    gone.refresh_from_db()
    assert (gone.state, gone.error_code) == ("failed", "cannot_submit")
    assert "anthropic" in gone.error


# --- answers that are no good ---


def test_partly_refused_batch_submits_the_others_and_fails_those_with_the_reason(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    rows = ask(100)
    for row in rows[::15]:
        qstash.refuse[row.deduplication_id] = "maximum retries exceeded"
    outbox.submit()
    assert states() == {"submitted": 93, "failed": 7}
    failed = LLMRequest.objects.failed()
    assert set(failed.values_list("pk", flat=True)) == {row.pk for row in rows[::15]}
    assert set(failed.values_list("error_code", "error", "claim_token")) == {
        ("qstash_400", 'QStash answered 400: {"error":"maximum retries exceeded"}', None)
    }
    assert len(qstash.calls) == 1 + 7  # each of these asked once more what it is refused for
    assert LLMRequest.objects.exclude(claim_token=None).count() == 0


def test_item_refused_for_now_waits_and_is_submitted_later(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    rows = ask(3)
    reset = NOW + timedelta(hours=7)

    def reach_the_daily_limit(request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/qstash")
        if path == "/v2/batch":
            [first, *others] = json.loads(request.content)
            refused = {"error": "Exceeded daily rate limit", "status": 429}
            return httpx.Response(200, json=[qstash.accept(first), *(refused for _ in others)])
        headers = {"RateLimit-Limit": "1000", "RateLimit-Reset": str(int(reset.timestamp()))}
        return httpx.Response(429, json={"error": "Exceeded daily rate limit"}, headers=headers)

    qstash.answer = reach_the_daily_limit
    outbox.submit()
    assert states() == {"submitted": 1, "pending": 2}
    assert len(qstash.calls) == 2  # the first that is refused tells for all
    refused = LLMRequest.objects.pending()
    assert set(refused.values_list("first_tried_at", "submission_tries")) == {(None, 0)}
    assert open_until() == reset

    qstash.answer = None
    clock.now = reset
    outbox.submit()
    assert states() == {"submitted": 3}
    given = dict(LLMRequest.objects.values_list("uuid", "qstash_message_id"))
    assert given == {row.uuid: qstash.ids[row.deduplication_id] for row in rows}


def test_message_refused_with_a_2xx_fails_with_qstashs_words(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    [row] = ask()
    qstash.answer = answers(200, b'{"error": "invalid destination"}')
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.error_code, row.error) == (
        "failed",
        "qstash_refused",
        "invalid destination",
    )


@pytest.mark.parametrize(
    "answer",
    [
        answers(200, b'[{"messageId": "msg_1"}]'),
        answers(200, json.dumps([{"messageId": f"m{i}"} for i in range(4)])),
        answers(200, b"[]"),
        answers(200, b"{}"),
        answers(200, b"null"),
        answers(200, b'"OK"'),
        answers(200, b""),
        answers(200, b'[{"messageId": "msg'),
        answers(200, b"<html>Bad gateway</html>"),
        answers(200, b"[[],[],[]]"),
        answers(500, b"boom"),
        answers(502, b"<html>"),
        answers(504),
        cut,
    ],
    ids=lambda answer: "cut" if answer is cut else None,
)
def test_unknown_outcome_of_a_batch_is_settled_by_the_same_deduplication_id(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, answer: Callable[..., Any]
) -> None:
    rows = ask(3)
    qstash.answer = does_the_work_and_then(qstash, answer)
    outbox.submit()
    assert states() == {"pending": 3}
    assert set(LLMRequest.objects.values_list("submission_number", "claim_token")) == {(1, None)}

    qstash.answer = None
    assert outbox.submit() == 0  # not at once
    clock.forward(minutes=1)
    assert outbox.submit() == 3
    assert states() == {"submitted": 3}
    assert len(qstash.messages) == 3  # nothing doubled
    given = dict(LLMRequest.objects.values_list("uuid", "qstash_message_id"))
    assert given == {row.uuid: qstash.ids[row.deduplication_id] for row in rows}


@pytest.mark.parametrize(
    "spoilt", [b'[{"messageId": "msg_1"}]', b"[]", b"[[],[],[]]", b"<html>Bad gateway</html>"]
)
def test_short_answer_to_a_batch_is_matched_item_by_item(
    outbox: Outbox, qstash: FakeQStash, spoilt: bytes
) -> None:
    rows = ask(3)

    def spoil_batches(request: httpx.Request) -> httpx.Response:
        answer = qstash.take(request, request.url.path.removeprefix("/qstash"))
        is_batch = request.url.path.endswith("/v2/batch")
        return httpx.Response(200, content=spoilt) if is_batch else answer

    qstash.answer = spoil_batches
    outbox.submit()
    assert states() == {"submitted": 3}
    assert len(qstash.messages) == 3  # nothing doubled
    given = dict(LLMRequest.objects.values_list("uuid", "qstash_message_id"))
    assert given == {row.uuid: qstash.ids[row.deduplication_id] for row in rows}


def takes_a_batch_and_answers_short(qstash: FakeQStash, then: Callable[..., Any]) -> None:
    """The first call is a batch, of which one item is told; ``then`` answers all that follow."""

    def respond(request: httpx.Request) -> httpx.Response:
        qstash.answer = then
        qstash.take(request, request.url.path.removeprefix("/qstash"))
        return httpx.Response(200, json=[{"messageId": "msg_1"}])

    qstash.answer = respond


@pytest.mark.parametrize(
    "then",
    [answers(401), answers(404), answers(429), answers(503), cut],
    ids=["401", "404", "429", "503", "cut"],
)
def test_batch_that_was_taken_stays_in_doubt_whatever_is_said_of_the_calls_after_it(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, then: Callable[..., Any]
) -> None:
    rows = ask(3)
    takes_a_batch_and_answers_short(qstash, then)
    outbox.submit()
    assert states() == {"pending": 3}
    assert set(LLMRequest.objects.values_list("first_tried_at", flat=True)) == {NOW}

    # QStash has forgotten the deduplication ids since, so it is asked before anything is sent.
    qstash.logs = [
        {"time": 1, "messageId": qstash.ids[row.deduplication_id], "state": "ACTIVE", "url": ""}
        | {"labels": [row.wire_label]}
        for row in rows
    ]
    qstash.ids.clear()
    qstash.answer = None
    clock.forward(hours=6)
    outbox.submit()
    assert states() == {"submitted": 3}
    assert len(qstash.messages) == 3  # nothing doubled


def test_batch_that_was_taken_stays_in_doubt_though_the_time_of_the_claim_ran_out(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    rows = ask(3)

    def take_and_be_slow(request: httpx.Request) -> httpx.Response:
        clock.forward(seconds=61)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    takes_a_batch_and_answers_short(qstash, take_and_be_slow)
    outbox.submit()
    assert states() == {"submitted": 1, "pending": 2}
    in_doubt = LLMRequest.objects.filter(pk__in=[row.pk for row in rows[1:]])
    assert set(in_doubt.values_list("first_tried_at", "claim_token")) == {(NOW, None)}


@pytest.mark.parametrize("answer", [answers(500), answers(200, b"{}"), answers(200, b"[]"), cut])
def test_unknown_outcome_of_a_single_publish_is_settled_the_same_way(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, answer: Callable[..., Any]
) -> None:
    [row] = ask()
    qstash.answer = does_the_work_and_then(qstash, answer)
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.submission_number, row.first_tried_at) == ("pending", 1, NOW)
    assert row.error

    qstash.answer = None
    clock.forward(minutes=1)
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id, row.error) == ("submitted", "msg_1", "")
    assert len(qstash.messages) == 1


def open_until(now: datetime = NOW) -> datetime | None:
    return Circuit.objects.open_until(QSTASH, now)


def test_refused_connection_is_tried_later_and_opens_no_deduplication_window(
    wire: Wire, clock: Clock
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    wire.hosts["testserver"] = refuse
    [row] = ask()
    Outbox(clock=clock).submit()
    row.refresh_from_db()
    # It never arrived, so no try of it has been used up.
    assert (row.state, row.first_tried_at, row.submission_tries) == ("pending", None, 0)
    assert NOW < open_until() <= NOW + timedelta(seconds=5)
    assert "ConnectError" in row.error


def test_pauses_grow_and_stay_within_minutes(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    ask()
    qstash.answer = answers(500)
    pauses = []
    for number in range(12):
        outbox.submit()
        until = open_until(clock.now)
        pauses.append((until - clock.now).total_seconds())
        assert len(qstash.calls) == number + 1
        clock.now = until
    assert 2 <= pauses[0] <= 2.4
    assert pauses[3] > pauses[0]
    assert max(pauses) <= 360


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("count", [1, 3])
def test_refused_token_fails_no_request(
    outbox: Outbox, qstash: FakeQStash, status: int, count: int
) -> None:
    ask(count)
    qstash.answer = answers(status, b'{"error":"invalid token"}')
    outbox.submit()
    assert states() == {"pending": count}
    assert len(qstash.calls) == 1  # and is not tried one by one
    assert set(LLMRequest.objects.values_list("first_tried_at", flat=True)) == {None}


@pytest.mark.parametrize("count", [1, 3])
def test_daily_limit_waits_for_its_reset(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, count: int
) -> None:
    ask(count)
    reset = NOW + timedelta(hours=7)
    headers = {"RateLimit-Limit": "1000", "RateLimit-Reset": str(int(reset.timestamp()))}
    qstash.answer = answers(429, b"{}", **headers)
    outbox.submit()
    assert states() == {"pending": count}
    assert open_until() == reset
    # Nothing was taken, so nobody has used up a try; nor does who comes later ask once more.
    assert set(LLMRequest.objects.values_list("submission_tries", flat=True)) == {0}
    ask(1)
    assert (outbox.submit(), len(qstash.calls)) == (0, 1)

    qstash.answer = None
    clock.forward(hours=6, minutes=59)
    assert outbox.submit() == 0
    clock.forward(minutes=1)
    assert outbox.submit() == count + 1
    assert states() == {"submitted": count + 1}
    assert open_until() is None


def test_circuit_is_left_alone_while_there_is_nothing_to_find_out_by(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, post_callback: Callable[..., Any]
) -> None:
    [row] = ask()
    qstash.answer = does_the_work_and_then(qstash, cut)
    outbox.submit()
    post_callback(row, Callback(status=200, body=DONE, source_message_id="msg_1"))
    until = open_until()
    for _ in range(24):
        clock.forward(hours=1)
        outbox.submit()
    assert Circuit.objects.get().open_until == until
    pulse = Pulse.read(now=clock.now)
    assert (pulse.problems, pulse.notice) == ([], "")


@pytest.mark.parametrize("answer", [answers(400), answers(200, b'{"error": "no"}')])
def test_circuit_closes_when_a_message_is_refused_for_what_is_in_it(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, answer: Callable[..., Any]
) -> None:
    ask()
    qstash.answer = answers(503)
    outbox.submit()
    qstash.answer = answer
    clock.forward(minutes=1)
    outbox.submit()
    assert states() == {"failed": 1}
    assert not Circuit.objects.get().is_open


def test_circuit_closes_each_time_for_the_same_outbox(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    for _ in range(2):
        ask()
        qstash.answer = answers(503)
        outbox.submit()
        qstash.answer = None
        clock.forward(minutes=1)
        outbox.submit()
        assert not Circuit.objects.get().is_open


@pytest.mark.parametrize("reset", ["0", "-5", "soon", "99999999999999", "9" * 25])
def test_absurd_reset_neither_storms_nor_freezes(
    outbox: Outbox, qstash: FakeQStash, reset: str
) -> None:
    ask()
    qstash.answer = answers(429, b"{}", **{"RateLimit-Limit": "1", "RateLimit-Reset": reset})
    outbox.submit()
    assert NOW + timedelta(seconds=1) <= open_until() <= NOW + timedelta(days=1)


def test_call_refused_as_a_whole_is_repeated_one_by_one(outbox: Outbox, qstash: FakeQStash) -> None:
    rows = ask(4)

    def refuse_batches(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/v2/batch"):
            return httpx.Response(400, json={"error": "one of them is bad"})
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = refuse_batches
    qstash.refuse[rows[2].deduplication_id] = "invalid destination"
    outbox.submit()
    assert states() == {"submitted": 3, "failed": 1}
    culprit = LLMRequest.objects.get(pk=rows[2].pk)
    assert culprit.error_code == "qstash_400"
    assert "invalid destination" in culprit.error


def test_ceiling_of_the_plan_fails_the_request_with_qstashs_words(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    [row] = ask()
    qstash.answer = answers(412, b'{"error":"quota exceeded: maxRetries"}')
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "qstash_412")
    assert "maxRetries" in row.error


def test_message_id_longer_than_the_column_is_cut(outbox: Outbox, qstash: FakeQStash) -> None:
    [row] = ask()
    qstash.answer = answers(200, json.dumps({"messageId": "m" * 300}))
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, len(row.qstash_message_id)) == ("submitted", 255)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_keys_that_qstash_repeats_are_in_no_row_and_no_log(
    outbox: Outbox,
    qstash: FakeQStash,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    [row] = ask()
    secrets = f"{settings.QSTASH_TOKEN} sk-canary-0123456789 \x00"
    qstash.answer = answers(status, secrets)
    caplog.set_level(logging.DEBUG)
    outbox.submit()
    row.refresh_from_db()
    assert "[redacted]" in row.error
    kept = row.error + caplog.text + repr(LLMRequest.objects.values().get())
    assert "canary" not in kept
    assert settings.QSTASH_TOKEN not in kept
    assert "\x00" not in kept


@pytest.mark.parametrize("at", [480, 490, 498])
def test_key_that_qstash_repeats_at_the_end_of_what_is_kept_is_kept_in_no_part(
    outbox: Outbox, qstash: FakeQStash, at: int
) -> None:
    [row] = ask()
    qstash.answer = answers(400, "x" * at + "sk-canary-0123456789")
    outbox.submit()
    row.refresh_from_db()
    assert "xxx" in row.error
    assert "sk" not in row.error


# --- claims ---


def test_claimed_row_is_nobody_elses_until_the_claim_expires(outbox: Outbox, clock: Clock) -> None:
    ask(2)
    first = outbox.claim(10)
    assert len(first) == 2
    assert outbox.claim(10) == []
    clock.forward(seconds=119)
    assert outbox.claim(10) == []
    clock.forward(seconds=2)
    second = outbox.claim(10)
    assert [row.pk for row in second] == [row.pk for row in first]
    assert {row.submission_tries for row in second} == {2}
    assert {row.first_tried_at for row in second} == {NOW}
    assert first[0].claim_token != second[0].claim_token


def test_late_acceptance_of_an_old_claimant_changes_nothing(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    [row] = ask()
    [submission] = outbox.compose(outbox.claim(1))
    clock.forward(minutes=6)
    successor = Outbox(clock=clock)
    successor.submit()
    row.refresh_from_db()
    before = LLMRequest.objects.values().get()
    outbox.hand_in([submission])
    assert LLMRequest.objects.values().get() == before
    assert len(qstash.messages) == 1


@pytest.mark.parametrize("answer", [answers(400, b"no"), answers(500), answers(401), cut])
def test_late_failure_of_an_old_claimant_changes_nothing(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, answer: Callable[..., Any]
) -> None:
    ask()
    before = {}

    def taken_over_meanwhile(request: httpx.Request) -> httpx.Response:
        clock.forward(minutes=6)
        qstash.answer = None
        Outbox(clock=clock).submit()
        before.update(LLMRequest.objects.values().get())
        return answer(request)

    qstash.answer = taken_over_meanwhile
    outbox.submit()
    assert before["state"] == "submitted"
    assert LLMRequest.objects.values().get() == before


def test_old_claimant_that_was_paused_sends_nothing(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    ask(3)
    claimed = outbox.claim(3)
    clock.forward(minutes=9)
    Outbox(clock=clock).submit()
    before = list(LLMRequest.objects.values())
    calls = len(qstash.calls)
    outbox.hand_over(claimed)
    assert len(qstash.calls) == calls
    assert list(LLMRequest.objects.values()) == before


def test_qstash_that_takes_nothing_is_asked_once_for_all(
    outbox: Outbox, qstash: FakeQStash, settings: Any, clock: Clock
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"BATCH_SIZE": 10}
    ask(100)
    qstash.answer = answers(503)
    outbox.submit()
    assert outbox.submit() == 0
    assert len(qstash.calls) == 1
    qstash.answer = None
    clock.forward(seconds=10)
    assert outbox.submit() == 100
    assert states() == {"submitted": 100}


@pytest.mark.parametrize("status", [308, 404, 408])
def test_refusal_that_is_not_about_the_message_fails_nobody(
    outbox: Outbox, qstash: FakeQStash, status: int
) -> None:
    ask(3)
    qstash.answer = answers(status)
    outbox.submit()
    assert states() == {"pending": 3}
    assert str(status) in LLMRequest.objects.earliest("id").error


# --- a message that QStash cannot take ---


def sweep(clock: Clock, every: float = 10.0, **duration: float) -> None:
    """Ring the bell again and again, as beat does."""
    until = clock.now + timedelta(**duration)
    while clock.now < until:
        Outbox(clock=clock).submit()
        clock.forward(seconds=every)


def chokes(qstash: FakeQStash, choke: Callable[..., Any]) -> None:
    """QStash takes everything but what has this in it, at which ``choke`` answers for all of it."""

    def respond(request: httpx.Request) -> httpx.Response:
        if b"indigestible" in request.content:
            return choke(request)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = respond


INDIGESTIBLE = [{"role": "user", "content": "indigestible"}]
CHOKES = {
    "qstash_500": answers(500, b"oops"),
    "qstash_404": answers(404, b"oops"),
    "qstash_403": answers(403, b"oops"),
    "qstash_308": answers(308, b"oops"),
    "qstash_unanswered": cut,
}


@pytest.mark.parametrize(
    ("choke", "batch_size"),
    [*((choke, 100) for choke in CHOKES), ("qstash_500", 1), ("qstash_404", 2)],
)
def test_message_that_qstash_cannot_take_keeps_nobody_from_leaving(
    qstash: FakeQStash, clock: Clock, settings: Any, choke: str, batch_size: int
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"BATCH_SIZE": batch_size}
    bad = [LLMRequest.objects.publish(INDIGESTIBLE) for _ in range(4)]
    ask(5)
    chokes(qstash, CHOKES[choke])
    sweep(clock, minutes=2)
    assert states() == {"submitted": 5, "pending": 4}

    for _ in range(8):  # and who comes later waits for nobody
        ask(1)
        sweep(clock, every=20, seconds=40)
        assert states().pop("pending") == 4
    assert open_until(clock.now) is None
    assert {row.pk for row in LLMRequest.objects.pending()} == {row.pk for row in bad}
    assert len(qstash.messages) == 5 + 8


@pytest.mark.parametrize("choke", CHOKES)
def test_message_that_qstash_cannot_take_fails_in_the_end_with_its_words(
    qstash: FakeQStash, clock: Clock, choke: str
) -> None:
    bad = LLMRequest.objects.publish(INDIGESTIBLE)
    ask(2)
    chokes(qstash, CHOKES[choke])
    sweep(clock, minutes=5)
    assert states() == {"submitted": 2, "pending": 1}
    sweep(clock, every=60, minutes=40)
    assert states() == {"submitted": 2, "pending": 1}
    bad.refresh_from_db()
    assert (bad.first_tried_at is None) == (choke in {"qstash_404", "qstash_403", "qstash_308"})
    qstash.calls.clear()
    sweep(clock, every=60, minutes=60)
    bad.refresh_from_db()
    assert (bad.state, bad.error_code) == ("failed", choke)
    assert "oops" in bad.error or "ReadError" in bad.error
    # Its pauses had grown. A call that is cut is three of the client's.
    tries = [call for call in qstash.calls if call.startswith("POST")]
    assert len(tries) <= 12 * (3 if choke == "qstash_unanswered" else 1)


def test_message_that_qstash_cannot_take_holds_up_its_own_queue_in_order(
    qstash: FakeQStash, clock: Clock
) -> None:
    bad = LLMRequest.objects.enqueue(INDIGESTIBLE, queue="line")
    behind = [LLMRequest.objects.enqueue(MESSAGES, queue="line") for _ in range(3)]
    ask(2)
    chokes(qstash, answers(500))
    sweep(clock, minutes=5)
    assert states() == {"submitted": 2, "pending": 4}
    sweep(clock, every=60, minutes=95)
    bad.refresh_from_db()
    assert bad.state == "failed"
    assert states() == {"submitted": 5, "failed": 1}
    assert [each[:36] for each in list(qstash.ids)[2:]] == [str(row.uuid) for row in behind]


def test_outage_is_found_out_by_one_call_each_time_and_fails_nobody(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    ask(10)
    qstash.answer = answers(403, b"oops")
    for number in range(100):  # more than seven hours
        outbox.submit()
        assert len(qstash.calls) == number + 1
        clock.now = open_until(clock.now)
    assert states() == {"pending": 10}

    # Nor does anybody whose next try comes to nothing as well, though others' do not.
    chosen = LLMRequest.objects.earliest("id")
    qstash.refuse[chosen.deduplication_id] = "not yet"

    def choke_on_one(request: httpx.Request) -> httpx.Response:
        ids = request.content.decode() + str(request.headers)
        is_chosen = chosen.deduplication_id in ids
        return httpx.Response(500) if is_chosen else qstash.take(request, request.url.path[7:])

    qstash.answer = choke_on_one
    outbox.submit()
    assert states() == {"submitted": 9, "pending": 1}
    qstash.answer = None
    qstash.refuse.clear()
    clock.forward(seconds=10)
    outbox.submit()
    assert states() == {"submitted": 10}


def test_outage_that_begins_between_two_calls_is_found_out_by_a_few(
    outbox: Outbox, qstash: FakeQStash, settings: Any, clock: Clock
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"BATCH_SIZE": 10}
    ask(100)

    def go_down(request: httpx.Request) -> httpx.Response:
        qstash.answer = answers(503)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = go_down
    outbox.submit()
    assert states() == {"submitted": 10, "pending": 90}
    assert len(qstash.calls) == 2 + MOST_IN_VAIN
    assert open_until() is not None
    qstash.answer = None
    sweep(clock, seconds=20)
    assert states() == {"submitted": 100}


def test_row_whose_look_up_fails_keeps_no_other_stale_row_waiting(
    qstash: FakeQStash, clock: Clock
) -> None:
    bad, *_ = stale_rows(3)

    def choke_on_one(request: httpx.Request) -> httpx.Response:
        if str(bad.uuid) in str(request.url):
            return httpx.Response(500)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = choke_on_one
    sweep(clock, minutes=2)
    assert states() == {"submitted": 2, "pending": 1}
    assert LLMRequest.objects.pending().get().pk == bad.pk


def test_row_without_a_provider_is_given_up_after_an_hour(
    qstash: FakeQStash, clock: Clock, settings: Any
) -> None:
    gone = LLMRequest.objects.publish(MESSAGES, provider="anthropic")
    providers = {"openai": settings.QSTASH_LLM["PROVIDERS"]["openai"]}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": providers}
    sweep(clock, every=30, minutes=60)
    assert states() == {"pending": 1}
    sweep(clock, every=60, minutes=40)
    gone.refresh_from_db()
    assert (gone.state, gone.error_code) == ("failed", "cannot_submit")
    assert qstash.calls == []


def test_queue_keeps_its_order_over_two_outboxes_and_a_put_back(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    rows = [LLMRequest.objects.enqueue(MESSAGES, queue="line") for _ in range(4)]
    apart = LLMRequest.objects.enqueue(MESSAGES, queue="other")
    [first] = outbox.claim(1)
    second = Outbox(clock=clock)
    assert [row.pk for row in second.claim(10)] == [apart.pk]
    outbox.put_back([first], "not now", timedelta(minutes=1))
    assert second.claim(10) == []
    clock.forward(minutes=2)
    assert [row.pk for row in second.claim(10)] == [row.pk for row in rows]


def test_late_failure_of_an_old_claimant_leaves_the_new_claim_alone(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    ask()
    [submission] = outbox.compose(outbox.claim(1))
    clock.forward(minutes=6)
    outbox.claim(1)
    before = LLMRequest.objects.values().get()
    qstash.answer = answers(400, b"no")
    outbox.hand_in([submission])
    assert LLMRequest.objects.values().get() == before


# --- the deduplication window ---


def stale_row(outbox: Outbox, qstash: FakeQStash, clock: Clock) -> LLMRequest:
    """Tried once with an unknown outcome, longer ago than QStash remembers."""
    [row] = ask()
    qstash.answer = answers(500)
    outbox.submit()
    qstash.answer = None
    clock.forward(minutes=9)
    return row


def test_stale_row_that_the_logs_know_is_not_sent_again(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    row = stale_row(outbox, qstash, clock)
    known = {"time": 1, "messageId": "msg_known", "state": "ACTIVE", "url": ""}
    qstash.logs.append(known | {"labels": [f"llm-request-{row.uuid}"]})
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id) == ("submitted", "msg_known")
    assert (row.submission_number, qstash.messages) == (1, [])


def test_stale_row_that_the_logs_do_not_know_is_a_new_submission(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    row = stale_row(outbox, qstash, clock)
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.submission_number, row.first_tried_at) == ("submitted", 2, clock.now)
    assert list(qstash.ids) == [f"{row.uuid}-2"]


def test_stale_row_waits_while_the_logs_cannot_be_asked(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    row = stale_row(outbox, qstash, clock)
    qstash.answer = answers(500)
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.submission_number, row.first_tried_at) == ("pending", 1, NOW)
    assert [call.split()[0] for call in qstash.calls] == ["POST", "GET"]


def test_late_look_up_of_an_old_claimant_makes_no_new_submission(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    stale_row(outbox, qstash, clock)
    claimed = outbox.claim(1)
    clock.forward(minutes=6)
    Outbox(clock=clock).submit()
    before = LLMRequest.objects.values().get()
    outbox.hand_over(claimed)
    assert LLMRequest.objects.values().get() == before
    assert len(qstash.messages) == 1


def test_row_that_never_left_is_not_looked_up(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    ask()
    qstash.answer = answers(401)
    outbox.submit()
    qstash.answer = None
    clock.forward(hours=1)
    outbox.submit()
    assert [call.split()[0] for call in qstash.calls] == ["POST", "POST"]
    assert states() == {"submitted": 1}


def stale_rows(count: int, **fields: Any) -> list[LLMRequest]:
    """Tried once by a worker that died, before the window."""
    tried = {"first_tried_at": NOW - timedelta(minutes=12), "submission_tries": 1}
    asked = {"messages": MESSAGES, "provider": "openai", "model": "m", "retries": 1}
    return LLMRequest.objects.bulk_create(
        LLMRequest(**asked | tried | fields) for _ in range(count)
    )


def slowly(qstash: FakeQStash, clock: Clock, seconds: float) -> Callable[..., Any]:
    def respond(request: httpx.Request) -> httpx.Response:
        clock.forward(seconds=seconds)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    return respond


def test_nobody_waits_for_the_look_ups_of_stale_rows(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    stale_rows(2 * STALE_PER_CLAIM)
    ask(3)
    qstash.answer = slowly(qstash, clock, 0.3)
    assert outbox.submit() == 3 + STALE_PER_CLAIM
    assert qstash.calls[0] == "POST /v2/batch"
    assert states() == {"submitted": 3 + STALE_PER_CLAIM, "pending": STALE_PER_CLAIM}


@pytest.mark.parametrize("seconds", [0.3, 3, 40])
def test_each_stale_row_is_asked_about_once_however_slow_the_answers(
    outbox: Outbox, qstash: FakeQStash, clock: Clock, seconds: float
) -> None:
    count = 60
    stale_rows(count)
    qstash.answer = slowly(qstash, clock, seconds)
    while LLMRequest.objects.pending().exists():
        assert outbox.submit()
    assert set(LLMRequest.objects.values_list("submission_number", flat=True)) == {2}
    assert len([call for call in qstash.calls if call.startswith("GET")]) == 2 * count
    assert len(qstash.messages) == count


def test_what_is_settled_leaves_before_the_time_runs_out(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    rows = stale_rows(20)
    qstash.answer = slowly(qstash, clock, 3)
    outbox.submit()
    assert [call.split()[0] for call in qstash.calls] == ["GET"] * 12 + ["POST"]
    assert states() == {"submitted": 6, "pending": 14}
    untouched = LLMRequest.objects.filter(pk__in=[row.pk for row in rows[6:]])
    told = untouched.values_list("submission_number", "submission_tries", "first_tried_at")
    assert set(told) == {(1, 1, rows[0].first_tried_at)}
    assert not untouched.exclude(claim_token=None).exists()


def test_what_is_settled_and_not_sent_is_not_asked_about_again(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    stale_rows(3)

    def refuse_all_but_look_ups(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(429)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = refuse_all_but_look_ups
    outbox.submit()
    settled = LLMRequest.objects.pending().values_list("submission_number", "first_tried_at")
    assert set(settled) == {(2, None)}
    qstash.calls.clear()
    qstash.answer = None
    clock.forward(hours=1)
    outbox.submit()
    assert qstash.calls == ["POST /v2/batch"]


def test_row_behind_a_stale_one_in_its_queue_does_not_overtake_it(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    [stale] = stale_rows(1, queue="line", via="enqueue")
    behind = LLMRequest.objects.enqueue(MESSAGES, queue="line")
    apart = LLMRequest.objects.enqueue(MESSAGES, queue="other")
    assert outbox.submit() == 2
    assert list(qstash.ids) == [apart.deduplication_id, f"{stale.uuid}-2"]
    assert outbox.submit() == 1
    assert list(qstash.ids)[2:] == [behind.deduplication_id]


def test_row_that_a_clock_since_put_back_tried_is_asked_about(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    """How long ago that was nobody knows."""
    stale_rows(1, first_tried_at=NOW + timedelta(minutes=30))
    outbox.submit()
    assert [call.split()[0] for call in qstash.calls] == ["GET", "GET", "POST"]


# --- a callback that is faster than the answer ---


def test_callback_before_the_publish_answer_is_applied_and_only_the_id_is_added(
    outbox: Outbox, qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    [row] = ask()

    def call_back_first(request: httpx.Request) -> httpx.Response:
        post_callback(row, Callback(status=200, body=DONE, source_message_id="msg_1"))
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = call_back_first
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.completion, row.qstash_message_id) == (
        "completed",
        "Forty-two.",
        "msg_1",
    )
    assert row.claim_token is None


@pytest.mark.parametrize("answer", [answers(500), answers(400), answers(401), cut])
def test_spoilt_publish_answer_after_the_callback_leaves_the_completion_alone(
    outbox: Outbox,
    qstash: FakeQStash,
    post_callback: Callable[..., Any],
    answer: Callable[..., Any],
) -> None:
    [row] = ask()

    def call_back_first(request: httpx.Request) -> httpx.Response:
        post_callback(row, Callback(status=200, body=DONE, source_message_id="msg_1"))
        return answer(request)

    qstash.answer = call_back_first
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.completion, row.error) == ("completed", "Forty-two.", "")
    assert (row.submit_after, row.claim_token) == (None, None)


def test_attempt_told_before_a_refusal_proves_that_qstash_has_it(
    outbox: Outbox, qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    [row] = ask()

    def call_back_first(request: httpx.Request) -> httpx.Response:
        post_callback(row, Callback(status=500, max_retries=3, source_message_id="msg_1"))
        return httpx.Response(400, json={"error": "no"})

    qstash.answer = call_back_first
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id, row.attempts) == ("submitted", "msg_1", 1)


# --- cancelling ---


def test_cancelled_while_pending_never_leaves(outbox: Outbox, qstash: FakeQStash) -> None:
    [row] = ask()
    row.cancel()
    assert outbox.submit() == 0
    assert (states(), qstash.calls) == ({"cancelled": 1}, [])


def test_cancelled_while_in_flight_is_cancelled_at_qstash_too(
    outbox: Outbox, qstash: FakeQStash
) -> None:
    rows = ask(3)

    def cancel_meanwhile(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            LLMRequest.objects.get(pk=rows[1].pk).cancel(now=NOW)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = cancel_meanwhile
    outbox.submit()
    assert states() == {"submitted": 2, "cancelled": 1}
    assert qstash.cancelled == ["msg_2"]


@pytest.mark.parametrize("answer", [answers(500), answers(404), cut])
def test_cancelled_stays_cancelled_though_qstash_cannot_be_told(
    outbox: Outbox, qstash: FakeQStash, answer: Callable[..., Any]
) -> None:
    [row] = ask()

    def cancel_meanwhile(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            return answer(request)
        LLMRequest.objects.get(pk=row.pk).cancel(now=NOW)
        return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = cancel_meanwhile
    outbox.submit()
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id) == ("cancelled", "msg_1")


def test_cancelled_in_flight_with_a_lost_answer_stays_cancelled(
    outbox: Outbox, qstash: FakeQStash, clock: Clock
) -> None:
    [row] = ask()

    def cancel_and_cut(request: httpx.Request) -> httpx.Response:
        LLMRequest.objects.filter(pk=row.pk, state=State.PENDING).update(state=State.CANCELLED)
        return cut(request)

    qstash.answer = cancel_and_cut
    outbox.submit()
    clock.forward(hours=1)
    assert outbox.submit() == 0
    row.refresh_from_db()
    assert (row.state, row.claim_token, row.error) == ("cancelled", None, "")


# --- many workers ---


@pytest.mark.django_db(transaction=True)
def test_racing_outboxes_hand_in_each_row_once(qstash: FakeQStash) -> None:
    count = 2000
    LLMRequest.objects.bulk_create(
        [
            LLMRequest(messages=MESSAGES, provider="openai", model="m", retries=1)
            for _ in range(count)
        ]
    )
    lock, handed_in = threading.Lock(), []

    def take_one_call_at_a_time(request: httpx.Request) -> httpx.Response:
        with lock:
            handed_in.extend(json.loads(request.content))
            return qstash.take(request, request.url.path.removeprefix("/qstash"))

    qstash.answer = take_one_call_at_a_time
    start = threading.Barrier(4)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            start.wait()
            while Outbox().submit(limit=500):
                pass
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(handed_in) == count
    assert len(qstash.messages) == count
    assert states() == {"submitted": count}


@pytest.mark.django_db(transaction=True)
def test_ten_thousand_rows_of_one_transaction_leave_in_few_calls(qstash: FakeQStash) -> None:
    with transaction.atomic():
        for _ in range(20):
            LLMRequest.objects.bulk_create(
                [
                    LLMRequest(messages=MESSAGES, provider="openai", model="m", retries=1)
                    for _ in range(499)
                ]
            )
            LLMRequest.objects.publish(MESSAGES)
    assert states() == {"submitted": 10_000}
    assert len(qstash.calls) <= 200
    assert len(qstash.ids) == 10_000


def test_claims_of_one_outbox_carry_different_tokens(outbox: Outbox) -> None:
    ask(2)
    tokens = {row.claim_token for row in [*outbox.claim(1), *outbox.claim(1)]}
    assert len(tokens) == 2
    assert all(isinstance(token, uuid.UUID) for token in tokens)
