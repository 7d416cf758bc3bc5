from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.db import connections, transaction
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.conf import qstash_client
from django_qstash_llm.exceptions import ConfigurationError
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.reconciler import (
    HOLD,
    LONGEST_WAIT,
    MOST_INQUIRIES,
    OUTAGE_PAUSE,
    Reconciler,
    known_message_id,
)
from django_qstash_llm.qstash import Callback, DeadLetter, LogEntry, MessageRecord
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter as ServersDeadLetter
from django_qstash_llm.server.models import Message, Queue
from django_qstash_llm.signals import request_completed, request_failed
from testproject.provider import MODEL, Provider
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MESSAGES = [{"role": "user", "content": "How many roads?"}]
DONE = json.dumps(ANSWER).encode()
PROVIDER = "https://provider.test/v1/chat/completions"
DEADLINE = timedelta(seconds=900)
KEY = settings.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **duration: float) -> None:
        self.now += timedelta(**duration)

    @property
    def milliseconds(self) -> int:
        return round(self.now.timestamp() * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def announced() -> Iterator[list[Any]]:
    """The requests that receivers were told of, as (state, error code)."""
    told: list[Any] = []

    def note(sender: Any, llm_request: LLMRequest, **others: Any) -> None:
        told.append((llm_request.state, llm_request.error_code))

    for signal in (request_completed, request_failed):
        signal.connect(note)
    yield told
    for signal in (request_completed, request_failed):
        signal.disconnect(note)


class Desk:
    """A reconciler, the QStash that it asks and the clock of both."""

    def __init__(self, qstash: FakeQStash, clock: Clock, commits: Any) -> None:
        self.qstash, self.clock, self.commits = qstash, clock, commits
        self.reconciler = Reconciler(clock=clock)

    def reconcile(self, **limit: int) -> int:
        """With what is done after the commit, which in a test case never comes."""
        with self.commits(execute=True):
            return self.reconciler.reconcile(**limit)

    def ask_again(self) -> None:
        """The next inquiry: when the deadline has come."""
        self.ask_again_about(LLMRequest.objects.get())

    def ask_again_about(self, row: LLMRequest) -> None:
        row.refresh_from_db()
        assert row.deadline_at is not None
        self.clock.now = row.deadline_at
        assert self.reconcile() == 1

    @property
    def counted(self) -> dict[str, int]:
        names = ("recovered", "failed", "lost", "waiting")
        return {name: n for name in names if (n := getattr(self.reconciler, name))}

    def log(
        self, row: LLMRequest, state: str, *, ago: float = 600, url: str = PROVIDER, **others: Any
    ) -> None:
        """One more entry of our message, so many seconds ago; of its callback, with its url."""
        is_ours = url == PROVIDER
        entry = LogEntry(
            time=self.clock.milliseconds - round(ago * 1000),
            message_id=others.pop("message_id", row.qstash_message_id if is_ours else "msg_back"),
            state=state,
            url=url,
            labels=others.pop("labels", (row.wire_label,) if is_ours else ()),
            **others,
        )
        self.qstash.logs.insert(0, entry.to_json())

    def keep(self, message_id: str) -> None:
        """This message is still to be delivered."""
        record = MessageRecord(message_id=message_id, url=PROVIDER)
        self.qstash.kept[message_id] = record.to_json()

    def bury_callback(self, row: LLMRequest, body: bytes, **others: Any) -> str:
        return self._bury(
            url=others.pop("url", callback_url(row)), body=body, response_status=503, **others
        )

    def bury_message(self, row: LLMRequest, status: int, body: bytes = b"", **others: Any) -> str:
        fields = {"message_id": row.qstash_message_id, "labels": (row.wire_label,)} | others
        return self._bury(url=PROVIDER, response_status=status, response_body=body, **fields)

    def _bury(self, **fields: Any) -> str:
        number = len(self.qstash.dead_letters)
        letter = DeadLetter(
            **{"message_id": f"msg_dead_{number}", "dlq_id": f"1772366400000-{number}"} | fields
        )
        self.qstash.dead_letters.append(letter.to_json())
        return letter.dlq_id


@pytest.fixture
def desk(qstash: FakeQStash, clock: Clock, django_capture_on_commit_callbacks: Any) -> Desk:
    return Desk(qstash, clock, django_capture_on_commit_callbacks)


def overdue(**fields: Any) -> LLMRequest:
    """A request that was submitted 15 minutes ago, and nobody has heard of it since."""
    given = {
        "messages": MESSAGES,
        "state": "submitted",
        "provider": "openai",
        "model": "m",
        "retries": 3,
        "qstash_message_id": "msg_ours",
        "submitted_at": NOW - DEADLINE,
        "deadline_at": NOW,
    }
    [row] = LLMRequest.objects.bulk_create([LLMRequest(**given | fields)])
    return row


def callback_url(row: LLMRequest) -> str:
    return f"http://testserver/llm/callback/{row.uuid}/"


def envelope(row: LLMRequest, status: int = 200, body: bytes = DONE, **others: Any) -> bytes:
    fields = {"source_message_id": row.qstash_message_id, "max_retries": 3} | others
    return Callback(status=status, body=body, **fields).to_json()


def unix_milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


# --- what is asked about ---


def test_nothing_is_asked_before_the_deadline(desk: Desk) -> None:
    overdue(deadline_at=NOW + timedelta(microseconds=1))
    overdue(deadline_at=None)
    for state in ("pending", "completed", "failed", "cancelled"):
        overdue(state=state)
    assert desk.reconcile() == 0
    assert (desk.qstash.calls, desk.counted) == ([], {})


def test_the_one_that_waits_longest_is_asked_about_first(desk: Desk) -> None:
    late, later, latest = (overdue(deadline_at=NOW - timedelta(hours=n)) for n in (1, 2, 3))
    assert list(desk.reconciler.due()) == [latest, later, late]
    assert desk.reconcile(limit=2) == 2
    assert list(desk.reconciler.due()) == [late]


def test_of_300_overdue_requests_as_many_are_asked_about_as_was_said(desk: Desk) -> None:
    rows = [overdue(qstash_message_id=f"msg_{n}") for n in range(300)]
    for row in rows:
        desk.keep(row.qstash_message_id)
    assert [desk.reconcile(limit=200), desk.reconcile(limit=200), desk.reconcile()] == [200, 100, 0]
    assert desk.counted == {"waiting": 300}


def test_queries_per_request_are_constant(
    desk: Desk, django_assert_num_queries: Callable[[int], AbstractContextManager[None]]
) -> None:
    counts = []
    for count in (1, 5, 25):
        for n in range(count):
            row = overdue(qstash_message_id=f"msg_{count}_{n}")
            desk.keep(row.qstash_message_id)
        with django_assert_num_queries(1 + 4 * count):
            desk.reconcile()
        counts.append(count)
    assert desk.counted == {"waiting": sum(counts)}


def test_a_site_without_a_token_asks_nothing_and_claims_nothing(desk: Desk) -> None:
    row = overdue()
    with (
        override_settings(QSTASH_TOKEN=""),
        pytest.raises(ConfigurationError, match="QSTASH_TOKEN"),
    ):
        desk.reconcile()
    row.refresh_from_db()
    assert (row.deadline_at, row.inquiries) == (NOW, 0)


# --- a lost callback ---


def test_a_lost_callback_is_taken_from_the_dead_letters(desk: Desk, announced: list[Any]) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row), message_id="msg_callback")
    assert desk.reconcile() == 1
    row.refresh_from_db()
    assert (row.state, row.completion) == ("completed", "Forty-two.")
    assert (row.input_tokens, row.output_tokens) == (9, 3)
    assert (row.deadline_at, row.finished_at) == (None, NOW)
    receipt = row.callback_responses.get()
    assert (receipt.kind, receipt.status, receipt.is_recovered) == ("callback", 200, True)
    assert (receipt.source_message_id, receipt.callback_message_id) == ("msg_ours", "msg_callback")
    assert (desk.counted, announced) == ({"recovered": 1}, [("completed", "")])


def test_its_dead_letter_is_deleted_once_the_answer_is_stored(desk: Desk) -> None:
    row = overdue()
    dlq_id = desk.bury_callback(row, envelope(row))
    desk.reconcile()
    assert desk.qstash.calls[-1] == f"DELETE /v2/dlq/{dlq_id}"
    assert desk.qstash.dead_letters == []


def test_nothing_is_deleted_by_a_transaction_that_is_rolled_back(desk: Desk) -> None:
    row = overdue()
    dlq_id = desk.bury_callback(row, envelope(row))
    with desk.commits(execute=True), transaction.atomic():
        desk.reconciler.reconcile()
        transaction.set_rollback(True)
    row.refresh_from_db()
    assert row.state == "submitted"
    assert [letter["dlqId"] for letter in desk.qstash.dead_letters] == [dlq_id]


@pytest.mark.parametrize(
    "url",
    [
        "http://testserver/llm/callback/{}/",
        "http://testserver/llm/callback/{}",
        "https://old.example/hooks/callback/{}/",
        "https://older.example/callback/{}",
    ],
)
def test_a_lost_callback_is_found_under_every_spelling_of_its_url(desk: Desk, url: str) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row), url=url.format(row.uuid))
    former = ["https://old.example/hooks/", "https://older.example"]
    ours = {**settings.QSTASH_LLM, "FORMER_CALLBACK_BASE_URLS": former}
    with override_settings(QSTASH_LLM=ours):
        desk.reconcile()
    assert desk.counted == {"recovered": 1}


def test_somebody_elses_dead_letters_are_left_alone(desk: Desk) -> None:
    row, other = overdue(), overdue(deadline_at=NOW + DEADLINE, qstash_message_id="msg_other")
    desk.bury_callback(other, envelope(other))
    desk.bury_message(other, 500)
    desk.keep(row.qstash_message_id)
    desk.reconcile()
    row.refresh_from_db()
    other.refresh_from_db()
    assert (row.state, other.state) == ("submitted", "submitted")
    assert len(desk.qstash.dead_letters) == 2


def test_a_qstash_that_ignores_a_filter_settles_nothing_with_what_is_anothers(desk: Desk) -> None:
    row, other = overdue(), overdue(deadline_at=NOW + DEADLINE, qstash_message_id="msg_other")
    desk.bury_callback(other, envelope(other))
    desk.bury_message(other, 500)
    desk.log(other, "DELIVERED", response_body=DONE)
    desk.log(other, "FAILED", url=callback_url(other), ago=1)

    def everything(request: httpx.Request) -> httpx.Response:
        listings = {"/v2/dlq": ("messages", desk.qstash.dead_letters)}
        listings["/v2/events"] = ("events", desk.qstash.logs)
        key, listing = listings.get(request.url.path.removeprefix("/qstash"), ("", []))
        return httpx.Response(200 if key else 404, json={key: listing})

    desk.qstash.answer = everything
    LLMRequest.objects.filter(pk=other.pk).update(deadline_at=NOW + timedelta(days=1))
    desk.reconcile()
    desk.ask_again_about(row)
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "lost")
    assert not CallbackResponse.objects.exists()


def test_a_callback_that_inherits_the_label_is_still_known_as_one(desk: Desk) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row), labels=(row.wire_label,))
    desk.reconcile()
    assert desk.counted == {"recovered": 1}
    assert row.callback_responses.count() == 1


def test_the_lost_callbacks_of_all_attempts_are_taken(desk: Desk) -> None:
    row = overdue()
    for retried in range(7):
        desk.bury_callback(row, envelope(row, 429, b"", retried=retried, max_retries=9))
    desk.bury_callback(row, envelope(row, retried=7, max_retries=9))
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.attempts, row.last_status) == ("completed", 8, 200)
    assert row.callback_responses.filter(is_recovered=True).count() == 8
    assert desk.qstash.dead_letters == []


def test_a_lost_failure_callback_fails_with_the_providers_words(
    desk: Desk, announced: list[Any]
) -> None:
    row = overdue()
    body = b'{"error": {"code": "overloaded", "message": "Try later."}}'
    told = envelope(row, 529, body, retried=3, dlq_id="1772366400000-9")
    desk.bury_callback(row, told)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code, row.dead_letter_id) == (
        "failed",
        "overloaded",
        "1772366400000-9",
    )
    assert row.error == "Try later. (after 4 attempts)"
    assert (desk.counted, announced) == ({"failed": 1}, [("failed", "overloaded")])


def test_a_recovered_attempt_that_is_not_the_last_goes_on_waiting(desk: Desk) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row, 500, b"", retried=0))
    desk.log(row, "RETRY", next_delivery_time=unix_milliseconds(NOW + timedelta(hours=1)))
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.attempts, row.inquiries) == ("submitted", 1, 0)
    assert row.deadline_at == NOW + timedelta(hours=1) + DEADLINE
    assert (desk.qstash.dead_letters, desk.counted) == ([], {"waiting": 1})


def test_a_callback_that_arrived_all_the_same_is_stored_once(
    desk: Desk, post_callback: Callable[..., Any]
) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row))
    assert post_callback(row, envelope(row)).status_code == 200
    row.refresh_from_db()
    LLMRequest.objects.filter(pk=row.pk).update(state="submitted", deadline_at=NOW)
    desk.keep(row.qstash_message_id)
    desk.reconcile()
    assert row.callback_responses.get().seen_count == 2
    assert desk.qstash.dead_letters == []


def test_a_dead_letter_that_is_gone_by_now_is_no_trouble(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row))

    def gone(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            return httpx.Response(404, json={"error": "not found"})
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = gone
    desk.reconcile()
    assert desk.counted == {"recovered": 1}
    assert "not deleted" not in caplog.text


def test_a_dead_letter_that_cannot_be_deleted_is_only_logged(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    row = overdue()
    dlq_id = desk.bury_callback(row, envelope(row))

    def refuse(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            return httpx.Response(500, json={"error": "not today"})
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = refuse
    assert desk.reconcile() == 1
    assert (desk.counted, desk.reconciler.problem) == ({"recovered": 1}, "")
    assert f"Dead letter {dlq_id} is recovered, but not deleted" in caplog.text


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"status": 200}', b"\xff\xfe"])
def test_an_envelope_that_cannot_be_read_is_quarantined_and_left_there(
    desk: Desk, body: bytes
) -> None:
    row = overdue()
    desk.bury_callback(row, body)
    desk.reconcile()
    row.refresh_from_db()
    receipt = row.callback_responses.get()
    assert (receipt.kind, bytes(receipt.body), row.state) == ("quarantined", body, "submitted")
    assert (len(desk.qstash.dead_letters), desk.counted) == (1, {"waiting": 1})

    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "answer_unread")
    assert "stored here" in row.error
    assert (row.callback_responses.count(), desk.counted) == (1, {"waiting": 1, "lost": 1})


def test_a_callback_whose_body_qstash_hides_is_delivered_once_more(desk: Desk) -> None:
    row = overdue()
    dlq_id = desk.bury_callback(row, b"REDACTED:9f86d081884c7d659a2feaa0c55ad015")
    desk.reconcile()
    row.refresh_from_db()
    assert (desk.qstash.retried, row.state, row.inquiries) == ([dlq_id], "submitted", 1)
    assert (desk.counted, row.callback_responses.count()) == ({"waiting": 1}, 0)
    assert row.error == (
        f"A callback of this request lies at QStash as dead letter {dlq_id} after 503 of this site, "
        "and QStash shows no body of it. It is delivered once more (1 of 10)."
    )


def hide(desk: Desk, row: LLMRequest) -> str:
    return desk.bury_callback(row, b"REDACTED:9f86d081884c7d659a2feaa0c55ad015")


@pytest.mark.parametrize("is_seen_underway", [False, True])
def test_a_hidden_callback_that_is_refused_again_and_again_is_lost_in_the_end(
    desk: Desk, announced: list[Any], is_seen_underway: bool
) -> None:
    row = overdue()
    desk.log(row, "DELIVERED", response_status=200)
    for _ in range(MOST_INQUIRIES):
        hide(desk, row)
        desk.ask_again()
        if is_seen_underway:  # which is no news: it may be refused once more
            desk.log(row, "RETRY", url=callback_url(row), ago=1)
            desk.keep("msg_back")
            desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.inquiries, len(desk.qstash.retried)) == ("submitted", 10, 10)
    dlq_id = hide(desk, row)
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code, len(desk.qstash.retried)) == ("failed", "answer_lost", 10)
    assert f"dead letter {dlq_id} after 503 of this site" in row.error
    assert (desk.reconciler.lost, len(desk.qstash.dead_letters)) == (1, 1)


def test_a_hidden_callback_that_arrives_after_all_completes_what_was_lost(
    desk: Desk, post_callback: Callable[..., Any]
) -> None:
    row = overdue(inquiries=MOST_INQUIRIES)
    hide(desk, row)
    desk.reconcile()
    row.refresh_from_db()
    assert row.error_code == "answer_lost"
    assert post_callback(row, envelope(row)).status_code == 200
    row.refresh_from_db()
    assert (row.state, row.error) == ("completed", "")


def test_a_hidden_callback_of_a_dead_message_is_not_taken_for_an_answer(desk: Desk) -> None:
    row = overdue(inquiries=MOST_INQUIRIES)
    hide(desk, row)
    desk.bury_message(row, 401, b'{"error": {"message": "No such key", "code": "auth"}}')
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code, desk.counted) == ("failed", "auth", {"failed": 1})


def test_news_of_a_hidden_callback_that_is_delivered_again_begin_to_count_anew(
    desk: Desk, post_callback: Callable[..., Any]
) -> None:
    row = overdue(inquiries=7)
    hide(desk, row)
    desk.reconcile()
    post_callback(row, envelope(row, 500, b"busy", retried=1))
    row.refresh_from_db()
    assert (row.state, row.inquiries) == ("submitted", 0)


def test_news_of_an_earlier_submission_does_not_fail_the_one_that_is_underway(desk: Desk) -> None:
    row = overdue(qstash_message_id="msg_second")
    told = envelope(row, 500, b"", retried=3, source_message_id="msg_first")
    desk.bury_callback(row, told)
    desk.bury_message(row, 500, message_id="msg_first")
    desk.log(row, "FAILED", message_id="msg_first")
    desk.log(row, "ACTIVE", ago=60)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, desk.counted) == ("submitted", {"waiting": 1})


def test_an_answer_to_an_earlier_submission_is_an_answer(desk: Desk) -> None:
    row = overdue(qstash_message_id="msg_second")
    desk.bury_callback(row, envelope(row, source_message_id="msg_first"))
    desk.reconcile()
    assert desk.counted == {"recovered": 1}


# --- a message that was given up ---


def test_a_dead_message_fails_with_the_providers_words_and_keeps_its_dead_letter(
    desk: Desk, announced: list[Any]
) -> None:
    row = overdue(attempts=1)
    body = f'{{"error": {{"code": "invalid_api_key", "message": "Not {KEY}"}}}}'.encode()
    dlq_id = desk.bury_message(row, 401, body, max_retries=3)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code, row.dead_letter_id) == ("failed", "invalid_api_key", dlq_id)
    remedy = "Check the provider's API key and what it is allowed to do."
    assert row.error == f"Not [redacted] (after 4 attempts). {remedy}"
    receipt = row.callback_responses.get()
    assert (receipt.kind, receipt.status, receipt.is_recovered) == ("failure_callback", 401, True)
    assert KEY.encode() not in bytes(receipt.body)
    assert [letter["dlqId"] for letter in desk.qstash.dead_letters] == [dlq_id]
    assert (desk.counted, announced) == ({"failed": 1}, [("failed", "invalid_api_key")])


def test_a_dead_message_nobody_answered_says_so(desk: Desk) -> None:
    row = overdue()
    desk.bury_message(row, -1)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code, row.last_status) == ("failed", "no_response", -1)


def test_a_refusal_that_forbids_a_retry_counts_the_attempts_that_were_heard_of(desk: Desk) -> None:
    row = overdue(attempts=2)
    desk.bury_message(row, 489, b"never", max_retries=5)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.attempts) == ("failed", 2)
    assert row.error.startswith("never (after 2 attempts)")


def test_a_dead_message_of_an_unknown_id_is_ours_by_its_label(desk: Desk) -> None:
    row = overdue(qstash_message_id="")
    desk.bury_message(row, 500, b"broken", message_id="msg_unknown")
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id) == ("failed", "msg_unknown")


def test_the_answer_of_one_submission_counts_more_than_the_failure_of_another(desk: Desk) -> None:
    row = overdue(qstash_message_id="")
    desk.bury_message(row, 500, message_id="msg_first")
    desk.log(row, "FAILED", message_id="msg_first", ago=100)
    desk.log(row, "DELIVERED", message_id="msg_second", ago=200, response_body=DONE)
    desk.reconcile()
    assert desk.counted == {"recovered": 1}


# --- what may still be answered ---


@pytest.mark.parametrize(
    "state", ["CREATED", "ACTIVE", "RETRY", "ERROR", "CANCEL_REQUESTED", "NEW"]
)
def test_a_message_that_is_underway_is_waited_for(desk: Desk, state: str) -> None:
    row = overdue()
    desk.log(row, state)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.inquiries) == ("submitted", 0)
    assert row.deadline_at == NOW + DEADLINE
    assert desk.counted == {"waiting": 1}


def test_an_entry_without_labels_is_ours_by_its_callback(desk: Desk) -> None:
    row = overdue()
    desk.log(row, "ACTIVE", callback=callback_url(row))
    fields = {name: x for name, x in desk.qstash.logs[0].items() if not name.startswith("label")}

    def untold(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/v2/events") and "label" in request.url.params:
            return httpx.Response(200, json={"events": [fields]})
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = untold
    desk.reconcile()
    row.refresh_from_db()
    assert (row.inquiries, desk.counted) == (0, {"waiting": 1})


def test_the_latest_state_counts_and_not_the_order_of_one_moment(desk: Desk) -> None:
    row = overdue()
    for state in ("RETRY", "ERROR", "ACTIVE"):  # told of one millisecond, and in no order
        desk.log(row, state, ago=60)
    desk.log(row, "FAILED", ago=60, response_status=500)
    desk.qstash.logs.append(desk.qstash.logs.pop(0))
    desk.reconcile()
    assert desk.counted == {"failed": 1}


def test_a_message_that_the_log_does_not_name_any_more_is_waited_for_while_it_is_kept(
    desk: Desk,
) -> None:
    row = overdue(submitted_at=NOW - timedelta(days=20))
    desk.keep(row.qstash_message_id)
    for _ in range(4):
        desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.inquiries, desk.counted) == ("submitted", 0, {"waiting": 4})


def test_a_message_in_a_paused_queue_is_waited_for_however_long(desk: Desk) -> None:
    row = overdue(submitted_at=NOW - timedelta(days=3))
    desk.log(row, "CREATED", ago=3 * 86_400)
    desk.keep(row.qstash_message_id)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.deadline_at) == ("submitted", NOW + LONGEST_WAIT)


@pytest.mark.parametrize("is_callback", [False, True])
def test_an_old_entry_of_a_message_that_is_still_kept_is_believed(
    desk: Desk, is_callback: bool
) -> None:
    row = overdue(qstash_message_id="", submitted_at=NOW - timedelta(days=3), inquiries=5)
    days = 2.5 * 86_400
    if is_callback:
        desk.log(row, "DELIVERED", ago=days, message_id="msg_ours")
        desk.log(row, "CREATED", ago=days, url=callback_url(row), message_id="msg_kept")
    else:
        desk.log(row, "CREATED", ago=days, message_id="msg_kept")
    desk.keep("msg_kept")
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, desk.counted) == ("submitted", {"waiting": 1})
    # A callback's way back is no news of the request: it neither counts nor begins anew.
    assert row.inquiries == (5 if is_callback else 0)


def test_each_wait_is_twice_the_one_before_and_at_most_six_hours(desk: Desk) -> None:
    row = overdue()
    desk.log(row, "CREATED")
    desk.keep(row.qstash_message_id)
    waits = []
    for _ in range(7):
        desk.ask_again()
        row.refresh_from_db()
        assert row.deadline_at is not None
        waits.append((row.deadline_at - desk.clock()).total_seconds() / 60)
    assert waits == [15, 30, 60, 120, 240, 360, 360]


def test_a_wait_is_never_shorter_than_an_attempt_may_take(desk: Desk) -> None:
    row = overdue(timeout=7200)
    desk.log(row, "ACTIVE")
    desk.reconcile()
    row.refresh_from_db()
    assert row.deadline_at == NOW + DEADLINE + timedelta(seconds=7200)


def test_a_retry_that_is_far_away_is_waited_for_with_some_slack(desk: Desk) -> None:
    row = overdue(timeout=60)
    tomorrow = NOW + timedelta(hours=22)
    desk.log(row, "RETRY", next_delivery_time=unix_milliseconds(tomorrow))
    desk.reconcile()
    row.refresh_from_db()
    assert row.deadline_at == tomorrow + DEADLINE + timedelta(seconds=60)


@override_settings(USE_TZ=False, TIME_ZONE="America/New_York")
def test_a_site_on_local_time_waits_for_the_same_moment(desk: Desk) -> None:
    now = timezone.now().replace(microsecond=0)
    desk.clock.now = now
    row = overdue(submitted_at=now - DEADLINE, deadline_at=now)
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=22)
    desk.log(row, "RETRY", next_delivery_time=unix_milliseconds(tomorrow))
    desk.reconcile()
    row.refresh_from_db()
    local = timezone.make_naive(tomorrow, timezone.get_default_timezone())
    assert row.deadline_at == local + DEADLINE
    assert abs(row.deadline_at - now - timedelta(hours=22) - DEADLINE) < timedelta(minutes=1)


@pytest.mark.parametrize("odd", ["soon", -5, 10**30, [], {}, True, None, 0.5])
def test_a_delivery_time_that_is_none_is_no_trouble(desk: Desk, odd: Any) -> None:
    row = overdue()
    desk.log(row, "RETRY")
    desk.qstash.logs[0]["nextDeliveryTime"] = odd
    desk.reconcile()
    row.refresh_from_db()
    assert row.deadline_at == NOW + DEADLINE


def test_a_log_that_ends_in_the_middle_is_not_believed_for_ever(desk: Desk) -> None:
    row = overdue()
    desk.log(row, "ACTIVE", ago=60)
    desk.reconcile()
    desk.clock.forward(hours=3)
    desk.reconcile()
    row.refresh_from_db()
    assert row.state == "submitted"
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code, desk.counted) == (
        "failed",
        "lost",
        {"waiting": 2, "lost": 1},
    )


@pytest.mark.parametrize(
    ("odd", "state"),
    [
        ({"responseStatus": "500", "maxRetries": "2"}, "failed"),
        ({"responseStatus": None, "maxRetries": None}, "failed"),
        ({"responseStatus": [], "responseHeader": {"A": None, "B": 1}}, "failed"),
        ({"responseStatus": 10**20, "maxRetries": 10**20, "responseBody": "\x00\ud800"}, "failed"),
    ],
)
def test_an_odd_dead_letter_is_still_one(desk: Desk, odd: dict[str, Any], state: str) -> None:
    row = overdue()
    desk.bury_message(row, 500)
    desk.qstash.dead_letters[0] |= odd
    desk.reconcile()
    row.refresh_from_db()
    assert row.state == state


@pytest.mark.parametrize("state", ["DELIVERED", "FAILED"])
@pytest.mark.parametrize("odd", ["200", None, [], 10**20, True, "OK", 0])
def test_an_odd_status_in_the_log_stops_nobody(desk: Desk, state: str, odd: Any) -> None:
    row, other = overdue(), overdue(qstash_message_id="msg_other")
    desk.bury_callback(other, envelope(other))
    desk.log(row, state)
    desk.qstash.logs[0]["responseStatus"] = odd
    assert desk.reconcile() == 2
    other.refresh_from_db()
    assert other.state == "completed"
    assert desk.reconciler.problem == ""


# --- delivered, and the callback is not here ---


def test_a_callback_that_is_on_its_way_is_waited_for(desk: Desk) -> None:
    row = overdue()
    delivery = NOW + timedelta(hours=7)
    desk.log(row, "DELIVERED", response_status=200)
    desk.log(
        row, "RETRY", url=callback_url(row), next_delivery_time=unix_milliseconds(delivery), ago=60
    )
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.deadline_at) == ("submitted", delivery + DEADLINE)
    assert (row.inquiries, desk.counted) == (0, {"waiting": 1})


def test_a_callback_that_inherits_the_label_does_not_speak_for_the_message(desk: Desk) -> None:
    row = overdue()
    desk.log(row, "DELIVERED")
    ours = {"url": callback_url(row), "labels": (row.wire_label,)}
    desk.log(row, "CREATED", ago=500, **ours)
    desk.log(row, "FAILED", ago=400, **ours)
    desk.reconcile()
    desk.ask_again()
    row.refresh_from_db()
    assert (row.error_code, desk.counted) == ("answer_lost", {"waiting": 1, "lost": 1})


def test_an_answer_in_the_log_is_recovered(desk: Desk, announced: list[Any]) -> None:
    row = overdue()
    desk.log(row, "ERROR", response_status=429, ago=500)
    desk.log(row, "DELIVERED", response_status=200, response_body=DONE, max_retries=3, ago=400)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.completion, row.attempts) == ("completed", "Forty-two.", 2)
    receipt = row.callback_responses.get()
    assert (receipt.kind, receipt.retried, receipt.is_recovered) == ("callback", 1, True)
    assert (desk.counted, announced) == ({"recovered": 1}, [("completed", "")])


@pytest.mark.parametrize("body", [b"", DONE[:-9], b"<html>", b"REDACTED:9f86d0", b"{}"])
def test_a_log_that_holds_no_whole_answer_invents_no_failure(desk: Desk, body: bytes) -> None:
    row = overdue()
    desk.log(row, "DELIVERED", response_status=200, response_body=body)
    desk.log(row, "ACTIVE", url=callback_url(row), ago=10)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.callback_responses.count()) == ("submitted", 0)
    assert desk.counted == {"waiting": 1}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("DELIVERED", "another site or database may be behind it"),
        ("FAILED", "the callback's dead letter is gone"),
        ("CANCELED", "the callback with the answer was cancelled"),
        ("", "knows of no callback"),
    ],
)
def test_an_answer_that_nobody_has_any_more_is_lost_after_two_inquiries(
    desk: Desk, announced: list[Any], state: str, words: str
) -> None:
    row = overdue()
    desk.log(row, "DELIVERED", ago=500)
    if state:
        desk.log(row, "CREATED", url=callback_url(row), ago=500)
        desk.log(row, state, url=callback_url(row), ago=400)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.inquiries, desk.counted) == ("submitted", 1, {"waiting": 1})
    assert "asked once more" in row.error
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "answer_lost")
    assert words in row.error
    assert "resubmit" in row.error
    assert (desk.counted, announced) == ({"waiting": 1, "lost": 1}, [("failed", "answer_lost")])


def test_the_callback_of_an_earlier_attempt_is_not_taken_for_the_answers(desk: Desk) -> None:
    row = overdue(attempts=1)
    desk.log(row, "DELIVERED", url=callback_url(row), message_id="msg_earlier", ago=700)
    desk.log(row, "DELIVERED", ago=500)
    desk.reconcile()
    desk.ask_again()
    row.refresh_from_db()
    assert "knows of no callback" in row.error


# --- given up, cancelled, unknown ---


def test_a_failure_without_a_dead_letter_fails_with_the_logs_words(
    desk: Desk, announced: list[Any]
) -> None:
    row = overdue()
    body = b'{"error": {"code": "server_error", "message": "Out of order."}}'
    desk.log(row, "ERROR", response_status=500, response_body=body, ago=100)
    desk.log(row, "FAILED", ago=100)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "server_error")
    assert row.error == "Out of order. (from QStash's log)"
    assert (desk.counted, announced) == ({"failed": 1}, [("failed", "server_error")])


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        ({"response_status": 502}, "http_502", "the provider answered 502"),
        ({"response_status": -1, "error": "connection refused"}, "no_response", "connection ref"),
        ({"error": f"key {KEY} refused"}, "no_response", "key [redacted] refused"),
        ({}, "no_response", "the provider did not answer"),
    ],
)
def test_a_log_of_few_words_still_says_what_there_is(
    desk: Desk, told: dict[str, Any], code: str, words: str
) -> None:
    row = overdue()
    desk.log(row, "FAILED", **told)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", code)
    assert words in row.error


@pytest.mark.parametrize("spelling", ["CANCELED", "CANCELLED"])
def test_a_message_that_was_cancelled_at_qstash_fails(
    desk: Desk, announced: list[Any], spelling: str
) -> None:
    row = overdue()
    desk.log(row, "CANCEL_REQUESTED", ago=50)
    desk.log(row, spelling, ago=40)
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "cancelled_at_qstash")
    assert (desk.counted, announced) == ({"failed": 1}, [("failed", "cancelled_at_qstash")])


def test_what_qstash_knows_nothing_of_is_lost_after_two_inquiries(
    desk: Desk, announced: list[Any]
) -> None:
    row = overdue()
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.inquiries, row.deadline_at) == ("submitted", 1, NOW + DEADLINE)
    assert (desk.counted, announced) == ({"waiting": 1}, [])
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code, row.deadline_at) == ("failed", "lost", None)
    assert "QStash knows nothing of this request" in row.error
    assert "resubmit" in row.error
    assert (desk.counted, announced) == ({"waiting": 1, "lost": 1}, [("failed", "lost")])
    assert row.resubmit().state == "pending"


def test_a_request_without_a_message_id_is_lost_as_well(desk: Desk) -> None:
    row = overdue(qstash_message_id="")
    desk.reconcile()
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "lost")
    assert not [call for call in desk.qstash.calls if "/v2/messages" in call]


def test_what_was_found_underway_needs_two_more_inquiries_to_be_lost(desk: Desk) -> None:
    row = overdue()
    desk.keep(row.qstash_message_id)
    for _ in range(3):
        desk.ask_again()
    del desk.qstash.kept[row.qstash_message_id]
    desk.ask_again()
    row.refresh_from_db()
    assert row.state == "submitted"
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, desk.counted) == ("failed", {"waiting": 4, "lost": 1})


def test_an_answer_after_all_completes_what_was_lost(
    desk: Desk, post_callback: Callable[..., Any]
) -> None:
    row = overdue()
    desk.reconcile()
    desk.ask_again()
    row.refresh_from_db()
    assert row.error_code == "lost"
    assert post_callback(row, envelope(row)).status_code == 200
    row.refresh_from_db()
    assert (row.state, row.error_code, row.error) == ("completed", "", "")


def test_a_stored_callback_that_is_yet_to_be_read_is_not_lost(desk: Desk) -> None:
    row = overdue(inquiries=5)
    CallbackResponse.objects.create(
        uuid=row.uuid,
        llm_request=row,
        kind="callback",
        source_message_id="msg_ours",
        status=200,
        body=DONE,
        apply_tries=3,
        apply_after=NOW + timedelta(hours=1),
    )
    desk.log(row, "DELIVERED")
    desk.log(row, "DELIVERED", url=callback_url(row))
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, desk.counted) == ("submitted", {"waiting": 1})

    CallbackResponse.objects.update(apply_tries=10)
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code) == ("failed", "answer_unread")


# --- when QStash cannot be asked ---


def fails_from(desk: Desk, nth: int, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """From its ``nth`` call on, QStash answers so."""
    calls = 0

    def respond(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls >= nth:
            return answer(request)
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = respond


def status(number: int) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(number, json={"error": f"no: {number} {KEY}"})


def down(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    "answer", [status(401), status(403), status(429), status(500), status(503), down]
)
def test_an_outage_stops_the_run_and_settles_nothing(
    desk: Desk, announced: list[Any], answer: Callable[[httpx.Request], httpx.Response]
) -> None:
    rows = [overdue(qstash_message_id=f"msg_{n}") for n in range(5)]
    for row in rows:
        desk.bury_callback(row, envelope(row))
    fails_from(desk, 5, answer)  # two rows are settled with two calls each, then deletions
    with desk.commits():
        assert desk.reconciler.reconcile() == 2
    first, second, *others = LLMRequest.objects.order_by("id")
    assert first.state == "completed"
    assert (second.state, second.deadline_at, second.inquiries) == (
        "submitted",
        NOW + OUTAGE_PAUSE,
        0,
    )
    assert [(row.state, row.deadline_at) for row in others] == [("submitted", NOW)] * 3
    assert desk.counted == {"recovered": 1, "waiting": 1}
    assert desk.reconciler.problem
    assert KEY not in desk.reconciler.problem + second.error
    assert second.error == desk.reconciler.problem


def test_a_key_at_the_end_of_what_qstash_answers_is_kept_in_no_part(desk: Desk) -> None:
    row = overdue()
    desk.qstash.answer = lambda request: httpx.Response(400, text="x" * 475 + KEY)
    desk.reconcile()
    row.refresh_from_db()
    assert row.error.startswith("QStash answered 400: xxx")
    assert KEY[:2] not in row.error + desk.reconciler.problem


def test_a_key_at_the_end_of_the_logs_words_is_kept_in_no_part(desk: Desk) -> None:
    row = overdue()
    desk.log(row, "FAILED", response_status=500, response_body=b"x" * 490 + KEY.encode())
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.error[:3]) == ("failed", "xxx")
    assert KEY[:2] not in row.error


def test_after_an_outage_everything_is_asked_about(desk: Desk) -> None:
    for n in range(5):
        row = overdue(qstash_message_id=f"msg_{n}")
        desk.bury_callback(row, envelope(row))
    desk.qstash.answer = status(503)
    assert desk.reconcile() == 1
    desk.qstash.answer = None
    assert desk.reconcile() == 4
    desk.clock.forward(minutes=5)
    assert desk.reconcile() == 1
    assert LLMRequest.objects.completed().count() == 5


def test_a_refusal_of_one_question_does_not_stop_the_others(desk: Desk) -> None:
    first, second = overdue(), overdue(qstash_message_id="msg_second")
    desk.bury_callback(second, envelope(second))

    def refuse(request: httpx.Request) -> httpx.Response:
        if str(first.uuid) in str(request.url):
            return httpx.Response(400, json={"error": "what?"})
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = refuse
    assert desk.reconcile() == 2
    first.refresh_from_db()
    assert (first.state, first.inquiries) == ("submitted", 1)
    assert first.error == 'QStash answered 400: {"error":"what?"}'
    assert first.deadline_at is not None
    assert first.deadline_at > NOW
    assert desk.counted == {"waiting": 1, "recovered": 1}


def test_questions_that_failed_do_not_count_as_finding_nothing(desk: Desk) -> None:
    row = overdue()
    desk.qstash.answer = status(503)
    for _ in range(5):
        desk.ask_again()
    desk.qstash.answer = None
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.inquiries) == ("submitted", 1)


def test_a_request_of_which_qstash_refuses_every_question_is_lost_in_the_end(desk: Desk) -> None:
    row = overdue()
    desk.qstash.answer = status(400)
    for _ in range(MOST_INQUIRIES):
        desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.inquiries) == ("submitted", 10)
    desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code, desk.reconciler.lost) == ("failed", "lost", 1)
    assert "could not be asked" in row.error
    assert "QStash answered 400" in row.error


def test_an_outage_counts_only_when_qstash_has_forgotten_what_is_asked(desk: Desk) -> None:
    row = overdue(submitted_at=NOW - timedelta(days=90), not_before=NOW - timedelta(days=29))
    desk.qstash.answer = down
    for _ in range(20):
        desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.inquiries) == ("submitted", 0)
    LLMRequest.objects.update(deadline_at=NOW + timedelta(days=2))
    for _ in range(11):
        desk.ask_again()
    row.refresh_from_db()
    assert (row.state, row.error_code, desk.reconciler.lost) == ("failed", "lost", 1)


def test_the_token_is_named_where_it_is_refused(desk: Desk) -> None:
    overdue()
    desk.qstash.answer = status(401)
    desk.reconcile()
    assert "check it and QSTASH_TOKEN" in desk.reconciler.problem


def test_an_outage_after_the_answer_was_stored_loses_nothing(desk: Desk) -> None:
    row = overdue()
    desk.bury_callback(row, envelope(row, 500, b"", retried=0))
    fails_from(desk, 4, status(503))
    desk.reconcile()
    row.refresh_from_db()
    assert (row.state, row.attempts) == ("submitted", 1)
    assert row.callback_responses.get().is_recovered


# --- at the same time ---


def test_a_claim_keeps_others_away_and_ends_by_itself(desk: Desk) -> None:
    row = overdue()
    other = Reconciler(clock=desk.clock)
    assert desk.reconciler.claim(row.pk) == row
    assert other.claim(row.pk) is None
    assert other.reconcile() == 0
    desk.clock.forward(seconds=HOLD.total_seconds())
    claimed = other.claim(row.pk)
    assert claimed is not None
    assert claimed.inquiries == 2


def test_what_is_finished_between_looking_and_claiming_is_left_alone(desk: Desk) -> None:
    row = overdue()
    assert row.fail("elsewhere", "Finished.", now=NOW)
    assert desk.reconciler.claim(row.pk) is None


@pytest.mark.parametrize("news", ["answer", "attempt", "deletion"])
def test_news_that_comes_while_qstash_is_asked_counts(
    desk: Desk, post_callback: Callable[..., Any], news: str
) -> None:
    row = overdue(inquiries=7)

    def respond(request: httpx.Request) -> httpx.Response:
        if news == "deletion":
            LLMRequest.objects.filter(pk=row.pk).delete()
        elif "/v2/messages/" in request.url.path:  # the last question
            told = envelope(row) if news == "answer" else envelope(row, 500, b"busy")
            assert post_callback(row, told).status_code == 200
        return desk.qstash.take(request, request.url.path.removeprefix("/qstash"))

    desk.qstash.answer = respond
    assert desk.reconcile() == 1
    assert desk.reconciler.lost == 0
    left = LLMRequest.objects.filter(pk=row.pk).first()
    expected = {"answer": "completed", "attempt": "submitted", "deletion": None}
    assert (left and left.state) == expected[news]


@pytest.mark.django_db(transaction=True)
def test_two_reconcilers_at_once_ask_about_each_request_once(
    qstash: FakeQStash, clock: Clock
) -> None:
    rows = [overdue(qstash_message_id=f"msg_{n}") for n in range(20)]
    desk = Desk(qstash, clock, None)
    for row in rows:
        desk.bury_callback(row, envelope(row))
    reconcilers = [Reconciler(clock=clock) for _ in range(2)]
    asked: list[int] = []
    start = threading.Barrier(2, timeout=30)

    def work(reconciler: Reconciler) -> None:
        try:
            start.wait()
            asked.append(reconciler.reconcile())
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(each,)) for each in reconcilers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(asked) == 20
    assert sum(each.recovered for each in reconcilers) == 20
    assert LLMRequest.objects.completed().count() == 20
    assert len([call for call in qstash.calls if call.startswith("DELETE")]) == 20
    assert not CallbackResponse.objects.filter(seen_count__gt=1).exists()


# --- the message id of a submission whose answer was lost ---


def test_the_message_id_is_known_from_the_log_and_not_from_its_callbacks(desk: Desk) -> None:
    row = overdue(qstash_message_id="")
    desk.log(row, "DELIVERED", message_id="msg_known")
    url = callback_url(row)
    desk.log(row, "ACTIVE", message_id="msg_back", url=url, labels=(row.wire_label,), ago=1)
    assert known_message_id(qstash_client(), row) == "msg_known"


def test_the_message_id_is_known_from_the_dead_letters(desk: Desk) -> None:
    row = overdue(qstash_message_id="")
    desk.bury_callback(row, b"", labels=(row.wire_label,))
    desk.bury_message(row, 500, message_id="msg_known")
    assert known_message_id(qstash_client(), row) == "msg_known"


def test_a_message_id_that_nobody_knows_is_empty(desk: Desk) -> None:
    assert known_message_id(qstash_client(), overdue(qstash_message_id="")) == ""


# --- against a QStash that works ---


@pytest.fixture
def provider(wire: Wire) -> Iterator[Provider]:
    provider = Provider(api_keys={KEY}, sleep=lambda seconds: None)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = provider.respond(
            request.method, request.url.raw_path.decode(), dict(request.headers), request.content
        )
        return httpx.Response(status, headers=headers, content=body)

    wire.hosts["provider.test"] = answer
    with override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "DEFAULT_MODEL": MODEL}):
        yield provider


@pytest.mark.django_db(transaction=True)
class TestServer:
    """Our server speaks QStash's wire: its log and its dead letters are as they are."""

    @pytest.fixture(autouse=True)
    def callbacks_fail(self, wire: Wire) -> Wire:
        """Our site, whose callback view is out of reach."""

        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path.startswith("/llm/callback/"):
                return httpx.Response(503)
            return wire.site.handle_request(request)

        wire.hosts["testserver"] = answer
        return wire

    @pytest.fixture
    def later(self) -> Clock:
        clock = Clock()
        clock.now = timezone.now() + timedelta(hours=1)
        return clock

    @staticmethod
    def deliver_everything(times: int = 1) -> None:
        for _ in range(times):
            Message.objects.filter(due_at__gt=timezone.now()).update(due_at=timezone.now())
            engine = Engine()
            engine.deliver_due()
            engine.close()

    @staticmethod
    def ask(**asked: Any) -> LLMRequest:
        row: LLMRequest = LLMRequest.objects.publish(MESSAGES, **asked)
        row.refresh_from_db()
        return row

    def test_the_answer_is_recovered_and_the_provider_called_once(
        self, provider: Provider, later: Clock
    ) -> None:
        row = self.ask()
        assert (row.state, row.callback_responses.count()) == ("submitted", 0)
        self.deliver_everything(6)
        assert ServersDeadLetter.objects.count() == 1
        reconciler = Reconciler(clock=later)
        assert reconciler.reconcile() == 1
        row.refresh_from_db()
        assert (row.state, row.attempts, row.last_status) == ("completed", 1, 200)
        assert row.completion
        assert row.output_tokens
        assert row.callback_responses.get().is_recovered
        assert reconciler.recovered == 1
        assert len(provider.journal) == 1
        assert not ServersDeadLetter.objects.exists()

    def test_a_recovered_request_is_announced(
        self, provider: Provider, later: Clock, announced: list[Any]
    ) -> None:
        self.ask()
        self.deliver_everything(6)
        Reconciler(clock=later).reconcile()
        assert announced == [("completed", "")]

    def test_a_callback_that_is_still_tried_is_waited_for_and_then_arrives(
        self, provider: Provider, later: Clock, callbacks_fail: Wire
    ) -> None:
        row = self.ask()
        self.deliver_everything(2)
        reconciler = Reconciler(clock=later)
        assert (reconciler.reconcile(), reconciler.waiting) == (1, 1)
        row.refresh_from_db()
        assert (row.state, row.inquiries) == ("submitted", 0)
        del callbacks_fail.hosts["testserver"]
        self.deliver_everything()
        row.refresh_from_db()
        assert (row.state, row.callback_responses.get().is_recovered) == ("completed", False)
        assert len(provider.journal) == 1

    def test_a_given_up_message_fails_with_the_providers_words_and_both_callbacks_are_taken(
        self, provider: Provider, later: Clock
    ) -> None:
        provider.fail_next(10, status=500)
        row = self.ask(retries=1)
        self.deliver_everything(9)
        assert ServersDeadLetter.objects.count() == 4
        Reconciler(clock=later).reconcile()
        row.refresh_from_db()
        assert (row.state, row.attempts, row.last_status) == ("failed", 2, 500)
        assert "after 2 attempts" in row.error
        # The message's own is left: it can be retried from there.
        assert [letter.dlq_id for letter in ServersDeadLetter.objects.all()] == [row.dead_letter_id]

    def test_a_given_up_message_whose_callbacks_are_gone_is_found_by_its_label(
        self, provider: Provider, later: Clock
    ) -> None:
        provider.fail_next(10, status=500)
        row = self.ask(retries=0)
        self.deliver_everything(9)
        callbacks = ServersDeadLetter.objects.exclude(message__kind="message")
        assert callbacks.discard() == 2
        Reconciler(clock=later).reconcile()
        row.refresh_from_db()
        assert (row.state, row.last_status) == ("failed", 500)
        assert [letter.dlq_id for letter in ServersDeadLetter.objects.all()] == [row.dead_letter_id]

    def test_a_given_up_message_whose_dead_letters_are_gone_fails_with_the_logs_words(
        self, provider: Provider, later: Clock
    ) -> None:
        provider.fail_next(10, status=500)
        row = self.ask(retries=0)
        self.deliver_everything(9)
        ServersDeadLetter.objects.discard()
        reconciler = Reconciler(clock=later)
        reconciler.reconcile()
        row.refresh_from_db()
        assert (row.state, reconciler.failed) == ("failed", 1)
        assert row.error.endswith("(from QStash's log)")

    def test_an_answer_whose_dead_letter_is_gone_is_lost_after_two_inquiries(
        self, provider: Provider, later: Clock
    ) -> None:
        row = self.ask()
        self.deliver_everything(6)
        ServersDeadLetter.objects.discard()
        reconciler = Reconciler(clock=later)
        reconciler.reconcile()
        row.refresh_from_db()
        assert (row.state, row.inquiries) == ("submitted", 1)
        later.forward(hours=6)
        reconciler.reconcile()
        row.refresh_from_db()
        assert (row.state, row.error_code) == ("failed", "answer_lost")
        assert "the callback's dead letter is gone" in row.error

    def test_a_message_in_a_paused_queue_is_waited_for(
        self, provider: Provider, later: Clock, callbacks_fail: Wire
    ) -> None:
        qstash_client().upsert_queue("slow", is_paused=True)
        row = LLMRequest.objects.enqueue(MESSAGES, queue="slow")
        reconciler = Reconciler(clock=later)
        for _ in range(3):
            later.forward(hours=7)
            reconciler.reconcile()
        row.refresh_from_db()
        assert (row.state, row.inquiries, reconciler.waiting) == ("submitted", 0, 3)
        del callbacks_fail.hosts["testserver"]
        assert Queue.objects.get().name == "slow"
        qstash_client().resume_queue("slow")
        self.deliver_everything()
        row.refresh_from_db()
        assert (row.state, len(provider.journal)) == ("completed", 1)

    def test_a_message_that_is_cancelled_at_qstash_fails(
        self, provider: Provider, later: Clock
    ) -> None:
        provider.fail_next(1, status=500)
        row = self.ask()
        qstash_client().cancel_message(row.qstash_message_id)
        self.deliver_everything(8)
        ServersDeadLetter.objects.discard()
        Reconciler(clock=later).reconcile()
        row.refresh_from_db()
        assert (row.state, row.error_code) == ("failed", "cancelled_at_qstash")

    def test_what_a_new_server_has_never_heard_of_is_lost(
        self, provider: Provider, later: Clock
    ) -> None:
        row = self.ask(delay=60)
        Message.objects.all().delete()
        reconciler = Reconciler(clock=later)
        reconciler.reconcile()
        later.forward(hours=6)
        reconciler.reconcile()
        row.refresh_from_db()
        assert (row.state, row.error_code, len(provider.journal)) == ("failed", "lost", 0)

    def test_the_message_id_is_known_to_the_server(self, provider: Provider) -> None:
        row = self.ask()
        self.deliver_everything(6)
        assert known_message_id(qstash_client(), row) == row.qstash_message_id
