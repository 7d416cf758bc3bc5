"""What each verb of a request says of each state: whole, and to the word."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist

from django_qstash_llm.completions import Completion, Usage
from django_qstash_llm.exceptions import IllegalState
from django_qstash_llm.models import Batch, CallbackResponse, Conversation, LLMRequest
from django_qstash_llm.models.doorbell import Bell
from django_qstash_llm.models.request import State, _is_at_first
from django_qstash_llm.pricing import Cost
from django_qstash_llm.qstash import TransportError
from django_qstash_llm.signals import request_completed, request_failed
from testproject.articles.models import Article
from tests.wire import FakeQStash

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DEADLINE = 900
SECRET = "sk-canary-0123456789"
STATES = list(State)
UNFINISHED = (State.PENDING, State.SUBMITTED)
FINISHED = (State.COMPLETED, State.FAILED, State.CANCELLED)
NOT_ANNOUNCED = {
    "announced_at": None,
    "announce_tries": 0,
    "announce_after": None,
    "announce_error": "",
}
USAGE = Usage(
    input_tokens=11,
    output_tokens=7,
    cached_tokens=5,
    cache_write_tokens=3,
    reasoning_tokens=2,
    raw={"prompt_tokens": 11},
)
BASIS = {"price": "openai/m", "at": NOW.isoformat()}
SPENT = {
    "input_tokens": 11,
    "output_tokens": 7,
    "cached_tokens": 5,
    "cache_write_tokens": 3,
    "reasoning_tokens": 2,
    "usage": {"prompt_tokens": 11},
    "cost": Decimal("0.25"),
    "cost_source": "setting",
    "cost_basis": BASIS,
}
UNKNOWN_SPENT = {
    **dict.fromkeys(name for name in SPENT if name.endswith("_tokens")),
    "usage": {},
    "cost": None,
    "cost_source": "",
    "cost_basis": {},
}
COST = Cost(Decimal("0.25"), "setting", price="openai/m", at=NOW)
COMPLETION = Completion(
    text="Forty-two.",
    id="chatcmpl-1",
    model="gpt-5.4-mini-2026-03-01",
    finish_reason="stop",
    refusal="no",
    tool_calls=[{"id": "call_1"}],
    usage=USAGE,
)
COMPLETED = {
    "state": State.COMPLETED,
    "completion": "Forty-two.",
    "service_tier": "",
    "completion_id": "chatcmpl-1",
    "answered_by": "gpt-5.4-mini-2026-03-01",
    "finish_reason": "stop",
    "refusal": "no",
    "tool_calls": [{"id": "call_1"}],
    "error_code": "",
    "error": "",
    **SPENT,
    "finished_at": NOW,
    "deadline_at": None,
    **NOT_ANNOUNCED,
}


def row(state: State = State.SUBMITTED, **fields: Any) -> LLMRequest:
    """Not in the database: what becomes of it is all that is asked."""
    return LLMRequest(state=state, **{"qstash_message_id": "msg_1", "timeout": 60} | fields)


def receipt(**fields: Any) -> CallbackResponse:
    given = {"retried": 1, "status": 503, "source_message_id": "msg_2", "received_at": NOW}
    return CallbackResponse(**given | fields)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# --- how long it may take ---


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"timeout": 60}, 960),
        ({"timeout": 0}, 900),
        ({"timeout": None}, 900),
        ({"timeout": 60, "not_before": later(3600)}, 4560),
        ({"timeout": 60, "not_before": later(-3600)}, 960),
        ({"timeout": None, "not_before": NOW}, 900),
    ],
)
def test_a_deadline_gives_it_its_delay_and_its_timeout(
    fields: dict[str, Any], seconds: int
) -> None:
    assert row(**fields).next_deadline(NOW) == later(seconds)


def test_the_deadline_is_a_setting(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"DEADLINE": 10}
    assert row(timeout=5).next_deadline(NOW) == later(15)


def test_what_has_ended_waits_no_longer() -> None:
    assert row()._finished(NOW) == {"finished_at": NOW, "deadline_at": None}


def test_what_has_ended_keeps_no_texts_where_none_are_to_be_kept(settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"STORE_MESSAGES": "none"}
    changes = row(messages=[{"role": "user", "content": "?"}])._finished(NOW)
    assert (changes["messages"], changes["forgotten_at"]) == ([], NOW)


# --- one attempt ---


def test_the_first_news_of_a_pending_request_proves_that_qstash_has_it() -> None:
    pending = row(State.PENDING, qstash_message_id="", attempts=0)
    assert pending.after_attempt(receipt()) == {
        "submitted_at": NOW,
        "submit_after": None,
        "state": State.SUBMITTED,
        "attempts": 2,
        "last_status": 503,
        "qstash_message_id": "msg_2",
        "deadline_at": later(960),
        "inquiries": 0,
    }


@pytest.mark.parametrize(
    ("attempts", "retried", "changes"),
    [
        (0, 0, {"attempts": 1, "last_status": 503}),
        (1, 0, {}),
        (1, 1, {"attempts": 2, "last_status": 503}),
        (2, 1, {}),
        (3, 1, {}),
        (1, 4, {"attempts": 5, "last_status": 503}),
    ],
)
def test_later_news_of_an_earlier_attempt_only_moves_the_deadline(
    attempts: int, retried: int, changes: dict[str, Any]
) -> None:
    told = row(attempts=attempts).after_attempt(receipt(retried=retried))
    assert told == changes | {"deadline_at": later(960), "inquiries": 0}


@pytest.mark.parametrize(
    ("deadline_at", "changes"),
    [
        (None, {"deadline_at": later(960), "inquiries": 0}),
        (later(959), {"deadline_at": later(960), "inquiries": 0}),
        (later(960), {}),
        (later(961), {}),
    ],
    ids=str,
)
def test_news_move_the_deadline_and_never_back(
    deadline_at: datetime | None, changes: dict[str, Any]
) -> None:
    assert row(attempts=9, deadline_at=deadline_at).after_attempt(receipt()) == changes


@pytest.mark.parametrize("state", FINISHED)
def test_an_attempt_of_what_has_ended_gives_it_no_deadline(state: State) -> None:
    ended = row(state, attempts=1, qstash_message_id="")
    changes = {"attempts": 2, "last_status": 503} if state != State.COMPLETED else {}
    assert ended.after_attempt(receipt()) == changes | {"qstash_message_id": "msg_2"}


# --- trouble, failure ---


@pytest.mark.parametrize("state", STATES)
def test_trouble_is_shown_while_the_request_waits(state: State) -> None:
    shown = row(state).after_trouble("Busy")
    assert shown == ({"error": "Busy"} if state in UNFINISHED else {})


def test_trouble_is_cleaned_cut_and_tells_no_key() -> None:
    assert row().after_trouble(f"\x00{SECRET} refused") == {"error": "[redacted] refused"}
    assert row().after_trouble("x" * 2001) == {"error": "x" * 2000}
    assert SECRET[:2] not in row().after_trouble("x" * 1990 + SECRET)["error"]


@pytest.mark.parametrize("state", STATES)
def test_only_what_is_unfinished_can_fail(state: State) -> None:
    failed = {
        "state": State.FAILED,
        "error_code": "boom",
        "error": "It broke.",
        "finished_at": NOW,
        "deadline_at": None,
        **NOT_ANNOUNCED,
    }
    changes = row(state).after_failure("boom", "It broke.", now=NOW)
    assert changes == (failed if state in UNFINISHED else {})


def test_a_failures_words_are_cleaned_cut_and_tell_no_key() -> None:
    changes = row().after_failure("c\x00" + "x" * 70, f"\x00{SECRET} refused", now=NOW)
    assert changes["error_code"] == "c" + "x" * 63
    assert changes["error"] == "[redacted] refused"
    assert len(row().after_failure("c", "x" * 10_001, now=NOW)["error"]) == 10_000
    across = row().after_failure("c" * 50 + SECRET, "x" * 9_990 + SECRET, now=NOW)
    assert SECRET[:2] not in across["error_code"] + across["error"]


# --- the answer, and what it cost ---


@pytest.mark.parametrize("state", STATES)
def test_an_answer_completes_whatever_waits_and_wins_over_a_failure(state: State) -> None:
    changes = row(state).after_completion(COMPLETION, COST, now=NOW)
    assert changes == (COMPLETED if state in (*UNFINISHED, State.FAILED) else {})


def test_an_answer_of_unknown_cost_says_so() -> None:
    changes = row().after_completion(Completion(text="x"), None, now=NOW)
    assert {name: changes[name] for name in UNKNOWN_SPENT} == UNKNOWN_SPENT


def test_an_answer_that_cost_nothing_cost_nothing() -> None:
    changes = row().after_completion(COMPLETION, Cost(Decimal(0), "reported"), now=NOW)
    assert (changes["cost"], changes["cost_source"]) == (0, "reported")


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, SPENT),
        ({"cost": Decimal("0.1")}, {}),
        ({"cost": Decimal(0)}, {}),
        ({"input_tokens": 3}, {}),
        ({"input_tokens": 0}, {}),
        ({"cost": Decimal("0.1"), "input_tokens": 3}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
def test_what_is_known_to_be_spent_is_counted_once(
    state: State, known: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert row(state, **known).after_spending(USAGE, COST) == expected


@pytest.mark.parametrize("state", STATES)
def test_no_other_answer_is_counted_beside_a_completion(state: State) -> None:
    expected = {} if state == State.COMPLETED else SPENT
    assert row(state).after_spending(USAGE, COST) == expected


# --- writing it down ---


@pytest.fixture
def stored(db: None, qstash: FakeQStash) -> LLMRequest:
    return ask()


def ask(**asked: Any) -> LLMRequest:
    new: LLMRequest = LLMRequest.objects.publish([{"role": "user", "content": "?"}], **asked)
    return new


def locked(of: LLMRequest) -> LLMRequest:
    found = LLMRequest.objects.lock(of.uuid)
    assert found is not None
    return found


def bells(captured: list[Any]) -> list[Bell]:
    return [callback.bell for callback in captured]


@pytest.fixture
def listener() -> Iterator[list[LLMRequest]]:
    heard: list[LLMRequest] = []

    def listen(llm_request: LLMRequest, **kwargs: Any) -> None:
        heard.append(llm_request)

    request_completed.connect(listen)
    yield heard
    request_completed.disconnect(listen)


def test_a_locked_row_holds_what_decides_and_is_this_one(stored: LLMRequest) -> None:
    ask()
    with transaction.atomic(), CaptureQueriesContext(connection) as queries:
        found = locked(stored)
        assert (found.pk, found.uuid, found.state) == (stored.pk, stored.uuid, "pending")
        assert "messages" in found.get_deferred_fields()
    assert len([query for query in queries if query["sql"].startswith("SELECT")]) == 1
    assert LLMRequest.objects.lock(uuids.uuid4()) is None


def test_a_row_is_locked_in_the_database_that_was_named(db: None) -> None:
    with pytest.raises(ConnectionDoesNotExist, match="elsewhere"):
        LLMRequest.objects.using("elsewhere").lock(uuids.uuid4())


def test_what_is_written_is_on_the_row_and_in_the_database(stored: LLMRequest) -> None:
    written = locked(stored)
    written.write(COMPLETED)
    stored.refresh_from_db()
    for name, value in COMPLETED.items():
        assert getattr(written, name) == getattr(stored, name) == value, name


def test_the_first_end_writes_no_column_that_stays_as_it_was(stored: LLMRequest) -> None:
    with CaptureQueriesContext(connection) as queries:
        locked(stored).write(row().after_completion(Completion(text="x"), None, now=NOW))
    [update] = [query["sql"] for query in queries if query["sql"].startswith("UPDATE")]
    assert '"completion"' in update
    assert '"error"' in update  # which trouble writes too
    for name in ("completion_id", "refusal", "cost", "input_tokens", "usage", "announced_at"):
        assert f'"{name}"' not in update


def test_a_second_end_clears_what_the_first_one_left(stored: LLMRequest) -> None:
    """Failed by an answer that came to nothing and was counted; then one nobody counted."""
    failed = locked(stored)
    failed.write(failed.after_failure("no_choices", "no choices", now=NOW))
    failed = locked(stored)
    failed.write(failed.after_spending(USAGE, COST))
    LLMRequest.objects.update(announced_at=NOW, announce_tries=3, announce_error="x")
    failed = locked(stored)
    failed.write(failed.after_completion(Completion(text="x"), None, now=later(1)))
    stored.refresh_from_db()
    expected = {"state": "completed", "error_code": "", **UNKNOWN_SPENT, **NOT_ANNOUNCED}
    assert {name: getattr(stored, name) for name in expected} == expected
    assert stored.finished_at == later(1)


@pytest.mark.parametrize(
    ("name", "value", "is_at_first"),
    [
        ("cost", None, True),
        ("cost", Decimal(0), False),
        ("cost", Decimal(1), False),
        ("input_tokens", 0, False),
        ("input_tokens", None, True),
        ("usage", {}, True),
        ("usage", {"a": 1}, False),
        ("refusal", "", True),
        ("refusal", "no", False),
        ("error", "", False),
        ("deadline_at", None, False),
        ("finished_at", None, False),
    ],
)
def test_what_only_an_end_writes_is_at_first_empty(
    name: str, value: Any, is_at_first: bool
) -> None:
    assert bool(_is_at_first(name, value)) is is_at_first


@pytest.mark.parametrize(
    ("trigger", "hears", "changes", "rung"),
    [
        ("", False, COMPLETED, []),
        ("", True, COMPLETED, [Bell.ANNOUNCE]),
        ("app.llm.Ask", False, COMPLETED, [Bell.ANNOUNCE]),
        ("app.llm.Ask", True, {"attempts": 1}, []),
        ("", True, {"state": State.FAILED, "announced_at": None}, []),
    ],
    ids=["nobody", "a receiver", "a trigger", "no end", "a receiver of the other end"],
)
def test_an_end_rings_when_there_is_somebody_to_tell(
    stored: LLMRequest,
    django_capture_on_commit_callbacks: Any,
    request: pytest.FixtureRequest,
    trigger: str,
    hears: bool,
    changes: dict[str, Any],
    rung: list[Bell],
) -> None:
    if hears:
        request.getfixturevalue("listener")
    LLMRequest.objects.update(trigger=trigger)
    with django_capture_on_commit_callbacks() as captured:
        locked(stored).write(changes)
    assert bells(captured) == rung
    assert [callback.using for callback in captured] == ["default"] * len(rung)


def test_a_row_is_written_where_it_comes_from(stored: LLMRequest) -> None:
    elsewhere = locked(stored)
    elsewhere._state.db = "elsewhere"
    with pytest.raises(ConnectionDoesNotExist, match="elsewhere"):
        elsewhere.write({"attempts": 1})


@pytest.mark.parametrize("verb", ["write", "fail"])
def test_a_row_of_no_database_is_one_of_the_default(
    stored: LLMRequest, django_capture_on_commit_callbacks: Any, verb: str
) -> None:
    nowhere = LLMRequest(pk=stored.pk, trigger="app.llm.Ask")
    with django_capture_on_commit_callbacks() as captured:
        if verb == "write":
            nowhere.write({"attempts": 7, "announced_at": None})
        else:
            nowhere.fail("boom", "It broke.", now=NOW)
    assert [callback.using for callback in captured] == ["default"]
    stored.refresh_from_db()
    expected = (7, "pending") if verb == "write" else (0, "failed")
    assert (stored.attempts, stored.state) == expected


# --- failing ---


@pytest.mark.parametrize("state", STATES)
def test_failing_says_whether_it_was_unfinished_until_now(
    stored: LLMRequest, django_capture_on_commit_callbacks: Any, state: State
) -> None:
    LLMRequest.objects.update(state=state, trigger="app.llm.Ask", deadline_at=later(9))
    stored.refresh_from_db()
    with django_capture_on_commit_callbacks() as captured:
        assert stored.fail("boom", "It broke.", now=NOW) is (state in UNFINISHED)
    assert bells(captured) == ([Bell.ANNOUNCE] if state in UNFINISHED else [])
    after = LLMRequest.objects.get()
    assert stored.state == after.state == ("failed" if state in UNFINISHED else state)
    if state in UNFINISHED:
        shown = (after.error_code, after.error, after.finished_at, after.deadline_at)
        assert shown == ("boom", "It broke.", NOW, None)


def test_what_has_ended_meanwhile_does_not_fail(
    stored: LLMRequest, django_capture_on_commit_callbacks: Any
) -> None:
    LLMRequest.objects.update(state=State.COMPLETED, trigger="app.llm.Ask")
    stored.trigger = "app.llm.Ask"
    with django_capture_on_commit_callbacks() as captured:
        assert stored.fail("boom", "It broke.", now=NOW) is False
    assert captured == []
    assert stored.state == State.PENDING  # what was read of it
    assert LLMRequest.objects.get().state == State.COMPLETED


def test_a_failure_that_nobody_waits_for_rings_nothing(
    stored: LLMRequest, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks() as captured:
        assert stored.fail("boom", "It broke.", now=NOW)
    assert captured == []


def test_a_receiver_of_failures_is_told(
    stored: LLMRequest, django_capture_on_commit_callbacks: Any
) -> None:
    def listen(**kwargs: Any) -> None:
        raise AssertionError("told before the commit")

    request_failed.connect(listen)
    try:
        with django_capture_on_commit_callbacks() as captured:
            stored.fail("boom", "It broke.", now=NOW)
    finally:
        request_failed.disconnect(listen)
    assert bells(captured) == [Bell.ANNOUNCE]
    assert [callback.using for callback in captured] == ["default"]


def test_it_fails_where_it_comes_from(stored: LLMRequest) -> None:
    stored._state.db = "elsewhere"
    with pytest.raises(ConnectionDoesNotExist, match="elsewhere"):
        stored.fail("boom", "It broke.", now=NOW)


# --- cancelling ---


@pytest.mark.parametrize("state", STATES)
def test_only_what_is_unfinished_can_be_cancelled(stored: LLMRequest, state: State) -> None:
    LLMRequest.objects.update(state=state, deadline_at=later(9), finished_at=None)
    stored.refresh_from_db()
    if state in UNFINISHED:
        stored.cancel(now=NOW)
        assert (stored.state, stored.finished_at, stored.deadline_at) == ("cancelled", NOW, None)
    else:
        with pytest.raises(IllegalState) as caught:
            stored.cancel(now=NOW)
        assert str(caught.value) == (
            f"{stored.uuid} is {state}: only an unfinished request can be cancelled."
        )
    after = LLMRequest.objects.get()
    assert after.state == ("cancelled" if state in UNFINISHED else state)
    assert after.finished_at == (NOW if state in UNFINISHED else None)


def test_cancelling_happens_now_unless_another_moment_is_given(stored: LLMRequest) -> None:
    before = timezone.now()
    stored.cancel()
    assert stored.finished_at is not None
    assert before <= stored.finished_at <= timezone.now()


def test_the_refusal_to_cancel_names_the_state_of_the_database(stored: LLMRequest) -> None:
    LLMRequest.objects.update(state=State.FAILED, error="It broke.")
    with pytest.raises(IllegalState, match="is failed: only"):
        stored.cancel(now=NOW)
    assert stored.state == State.FAILED
    assert stored.error == ""  # no more than the state was read anew


def test_cancelling_what_was_submitted_a_moment_ago_tells_qstash(
    stored: LLMRequest, qstash: FakeQStash
) -> None:
    LLMRequest.objects.update(state=State.SUBMITTED, qstash_message_id="msg_9", error="note")
    stored.cancel(now=NOW)
    assert qstash.cancelled == ["msg_9"]
    assert stored.error == ""  # no more than the id was read anew


def test_cancelling_what_qstash_knows_tells_it_once(stored: LLMRequest, qstash: FakeQStash) -> None:
    LLMRequest.objects.update(state=State.SUBMITTED, qstash_message_id="msg_9")
    stored.refresh_from_db()
    stored.cancel(now=NOW)
    assert qstash.cancelled == ["msg_9"]


def test_cancelling_what_never_left_tells_nobody(stored: LLMRequest, qstash: FakeQStash) -> None:
    stored.cancel(now=NOW)
    assert qstash.calls == []


def test_what_qstash_could_not_be_told_goes_on(stored: LLMRequest, qstash: FakeQStash) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    LLMRequest.objects.update(state=State.SUBMITTED, qstash_message_id="msg_9")
    stored.refresh_from_db()
    qstash.answer = refuse
    with pytest.raises(TransportError):
        stored.cancel(now=NOW)
    assert LLMRequest.objects.get().state == State.SUBMITTED


# --- asking again ---


@pytest.mark.parametrize("state", STATES)
def test_only_what_has_ended_can_be_asked_again(stored: LLMRequest, state: State) -> None:
    LLMRequest.objects.update(state=state)
    if state in UNFINISHED:
        with pytest.raises(IllegalState) as caught:
            stored.resubmit()
        assert str(caught.value) == f"{stored.uuid} is {state}: an answer may still come."
        assert LLMRequest.objects.count() == 1
    else:
        again = stored.resubmit()
        assert LLMRequest.objects.exclude(pk=stored.pk).get() == again
        assert (again.resubmission_of, again.state) == (stored, "pending")


def test_what_was_forgotten_cannot_be_asked_again(stored: LLMRequest) -> None:
    LLMRequest.objects.update(state=State.FAILED, forgotten_at=NOW, messages=[])
    with pytest.raises(IllegalState) as caught:
        stored.resubmit()
    assert str(caught.value) == (
        f"{stored.uuid} was forgotten on 2026-03-01: its messages are not kept, "
        "so it cannot be asked again."
    )
    # Of a conversation the messages stay, though the rest is forgotten.
    LLMRequest.objects.update(messages=[{"role": "user", "content": "?"}])
    assert stored.resubmit().messages == stored.messages


def test_what_is_being_asked_again_is_not_asked_a_third_time(stored: LLMRequest) -> None:
    LLMRequest.objects.update(state=State.FAILED)
    # Neither another request that waits, nor one that has ended, stands in its way.
    ask()
    first = stored.resubmit()
    with pytest.raises(IllegalState) as caught:
        stored.resubmit()
    assert str(caught.value) == (f"{stored.uuid} is being asked again already, as {first.uuid}.")
    LLMRequest.objects.filter(pk=first.pk).update(state=State.FAILED)
    assert stored.resubmit() != first
    assert LLMRequest.objects.filter(resubmission_of=stored).count() == 2


def test_a_resubmission_asks_exactly_the_same(stored: LLMRequest) -> None:
    article = Article.objects.create(title="t", body="b")
    LLMRequest.objects.filter(pk=stored.pk).update(
        state=State.FAILED,
        model="gpt-5.4",
        parameters={"temperature": 0.5},
        tenant="acme",
        labels=["a"],
        metadata={"n": 1},
        trigger="app.llm.Ask",
        queue="slow",
        via="enqueue",
        retries=1,
        retry_delay="1000",
        timeout=70,
        redact=["body"],
        flow_control={"key": "k", "rate": 1},
        content_type=ContentType.objects.get_for_model(article),
        object_id=str(article.pk),
        conversation=Conversation.objects.create(),
        batch=Batch.objects.create(),
        not_before=NOW,
        attempts=4,
        error="x",
        error_code="x",
        completion="x",
    )
    stored.refresh_from_db()
    again = LLMRequest.objects.get(pk=stored.resubmit().pk)
    own = {
        "id",
        "uuid",
        "state",
        "created_at",
        "resubmission_of_id",
        "not_before",
        "attempts",
        "error",
        "error_code",
        "completion",
    }
    names = [f.attname for f in LLMRequest._meta.concrete_fields if f.attname not in own]
    assert {name: getattr(again, name) for name in names} == {
        name: getattr(stored, name) for name in names
    }
    unlike = (again.state, again.not_before, again.attempts, again.error, again.completion)
    assert unlike == ("pending", None, 0, "", "")
    assert again.about == article


def test_the_row_is_locked_while_it_is_decided(stored: LLMRequest) -> None:
    """On SQLite the whole database is, from the beginning of the transaction."""
    LLMRequest.objects.update(state=State.FAILED)
    with CaptureQueriesContext(connection) as queries:
        stored.resubmit()
    first = next(query["sql"] for query in queries if query["sql"].startswith("SELECT"))
    own_table = 'FOR UPDATE OF "django_qstash_llm_llmrequest"'
    assert first.endswith(own_table) is connection.features.has_select_for_update_of
    assert any(query["sql"].startswith("SAVEPOINT") for query in queries)


def test_it_is_asked_again_where_it_comes_from(stored: LLMRequest) -> None:
    stored._state.db = "elsewhere"
    with pytest.raises(ConnectionDoesNotExist, match="elsewhere"):
        stored.resubmit()
