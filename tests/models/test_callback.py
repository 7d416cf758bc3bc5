"""What a callback does to its request. The door it comes through is in test_views.py."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.conf import settings
from django.db import DataError, connection, connections, transaction
from django.test import Client
from django.utils import timezone

from django_qstash_llm.exceptions import IllegalState
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.callback import MOST_APPLY_TRIES, CallbackResponseQuerySet
from django_qstash_llm.models.forgetting import digest_of
from django_qstash_llm.models.price import known_prices
from django_qstash_llm.qstash import Callback, sign
from tests.conftest import ANSWER
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db

Post = Callable[..., Any]
DONE = json.dumps(ANSWER).encode()
BUSY = b'{"error": {"message": "Busy", "code": "overloaded"}}'


@pytest.fixture
def llm_request(qstash: FakeQStash) -> LLMRequest:
    return ask()


def ask(**asked: Any) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish([{"role": "user", "content": "?"}], **asked)
    return row


def submitted(**held: Any) -> LLMRequest:
    """A row that holds what it is said to, and is submitted otherwise."""
    row = ask()
    LLMRequest.objects.filter(pk=row.pk).update(**{"state": "submitted"} | held)
    row.refresh_from_db()
    return row


def told(**changed: Any) -> Callback:
    fields: dict[str, Any] = {"status": 200, "body": DONE, "source_message_id": "msg_1"}
    return Callback(**(fields | {"max_retries": 3} | changed))


def attempt(number: int, **changed: Any) -> Callback:
    return told(**({"status": 503, "body": BUSY, "retried": number - 1} | changed))


# --- one callback ---


def test_success_is_written_down_whole(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    price = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": price}
    before = timezone.now()
    post_callback(llm_request, told(retried=1, header={"X-Request-Id": ["r"]}))
    row = LLMRequest.objects.get()
    expected = {
        "state": "completed",
        "completion": "Forty-two.",
        "completion_id": "chatcmpl-1",
        "answered_by": "gpt-5.4-mini-2026-03-01",
        "finish_reason": "stop",
        "input_tokens": 9,
        "output_tokens": 3,
        "cached_tokens": None,
        "usage": ANSWER["usage"],
        "cost": Decimal("0.000015"),
        "cost_source": "setting",
        "attempts": 2,
        "last_status": 200,
        "qstash_message_id": "msg_1",
        "error": "",
        "announced_at": None,
    }
    assert {name: getattr(row, name) for name in expected} == expected
    assert before <= row.finished_at <= timezone.now()
    assert row.submitted_at is not None

    receipt = CallbackResponse.objects.get()
    kept = {
        "uuid": row.uuid,
        "llm_request_id": row.pk,
        "kind": "callback",
        "source_message_id": "msg_1",
        "retried": 1,
        "max_retries": 3,
        "status": 200,
        "header": {"X-Request-Id": ["r"]},
        "seen_count": 1,
        "is_body_cut": False,
        "problem": "",
    }
    assert {name: getattr(receipt, name) for name in kept} == kept
    assert bytes(receipt.body) == DONE
    assert (receipt.attempt, str(receipt)) == (2, "callback 200 · msg_1")


def test_unpriced_completion_costs_an_unknown_amount(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = json.dumps({name: value for name, value in ANSWER.items() if name != "usage"}).encode()
    post_callback(llm_request, told(body=body))
    row = LLMRequest.objects.get()
    assert (row.state, row.cost, row.cost_source, row.input_tokens) == ("completed", None, "", None)
    assert list(LLMRequest.objects.unpriced()) == [row]


def test_failed_attempt_with_retries_left_is_only_an_attempt(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, attempt(2))
    row = LLMRequest.objects.get()
    assert (row.state, row.attempts, row.last_status) == ("submitted", 2, 503)
    assert row.error == "Busy (after 2 attempts)"
    assert row.finished_at is None


def test_last_failed_attempt_fails_the_request_with_the_providers_words(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, attempt(4))
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code) == ("failed", "overloaded")
    assert row.error == "Busy (after 4 attempts)"


def without(name: str, callback: Callback) -> bytes:
    """The envelope of ``callback``, had QStash left out this field."""
    envelope = json.loads(callback.to_json())
    del envelope[name]
    return json.dumps(envelope).encode()


def test_attempt_that_does_not_say_how_many_follow_is_one_of_those_we_asked_for(
    qstash: FakeQStash, post_callback: Post
) -> None:
    row = ask(retries=2)
    states = []
    for number in (1, 2, 3):
        post_callback(row, without("maxRetries", attempt(number)))
        # And so it is when it is read again.
        CallbackResponse.objects.get(retried=number - 1).apply_again()
        states.append(LLMRequest.objects.get().state)
    assert states == ["submitted", "submitted", "failed"]
    assert set(CallbackResponse.objects.values_list("max_retries", flat=True)) == {2}


def test_attempt_of_a_request_that_named_no_retries_is_the_last_when_qstash_says_so(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    LLMRequest.objects.update(retries=None)
    post_callback(llm_request, without("maxRetries", attempt(9)))
    CallbackResponse.objects.get().apply_again()
    assert LLMRequest.objects.get().state == "submitted"
    post_callback(llm_request, without("maxRetries", attempt(9, dlq_id="dlq_1")))
    assert LLMRequest.objects.get().state == "failed"


def test_fields_that_are_given_twice_are_noted(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, b'{"status":500,' + told().to_json()[1:])
    assert LLMRequest.objects.get().state == "completed"
    assert CallbackResponse.objects.get().problem == "status is given more than once"


@pytest.mark.parametrize(
    ("changed", "code", "error"),
    [
        ({"status": -1, "body": b""}, "no_response", "the provider did not answer"),
        ({"status": 0, "body": b""}, "no_response", "the provider did not answer"),
        ({"status": 500, "body": b""}, "http_500", "the provider answered 500"),
        ({"status": 502, "body": b"<html>Bad gateway"}, "http_502", "<html>Bad gateway"),
        ({"status": 429, "body": BUSY}, "overloaded", "Busy"),
        ({"status": 429, "body": gzip.compress(BUSY)}, "overloaded", "Busy"),
    ],
)
def test_reason_of_a_failure_is_kept(
    llm_request: LLMRequest, post_callback: Post, changed: dict[str, Any], code: str, error: str
) -> None:
    post_callback(llm_request, told(max_retries=0, **changed))
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code) == ("failed", code)
    assert row.error == f"{error} (after 1 attempt)"


def test_failure_callback_is_the_end_though_retries_were_left(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    """A 489 stops the retries, and only the failure callback says so."""
    post_callback(llm_request, attempt(1, status=489))
    assert LLMRequest.objects.get().state == "submitted"
    post_callback(llm_request, attempt(1, status=489, dlq_id="dlq_1"))
    row = LLMRequest.objects.get()
    assert (row.state, row.dead_letter_id, row.attempts) == ("failed", "dlq_1", 1)
    assert set(CallbackResponse.objects.values_list("kind", flat=True)) == {
        "callback",
        "failure_callback",
    }


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (DONE[:60], "truncated"),
        (b"", "empty"),
        (b"<html>OK</html>", "not_json"),
        (b"data: {}\n\n", "stream"),
        (b'{"choices": []}', "no_choices"),
        (b'{"error": {"code": "upstream", "message": "gone"}}', "upstream"),
    ],
)
def test_unreadable_success_fails_with_why_and_its_cost_is_unknown(
    llm_request: LLMRequest, post_callback: Post, body: bytes, code: str
) -> None:
    assert post_callback(llm_request, told(body=body)).status_code == 200
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code, row.cost, row.last_status) == ("failed", code, None, 200)
    receipt = CallbackResponse.objects.get()
    assert bytes(receipt.body) == body  # the evidence survives
    assert receipt.problem == row.error


def test_gzipped_answer_is_read(llm_request: LLMRequest, post_callback: Post) -> None:
    header = {"Content-Encoding": ["gzip"]}
    post_callback(llm_request, told(body=gzip.compress(DONE), header=header))
    assert LLMRequest.objects.get().completion == "Forty-two."


def test_body_is_stored_up_to_the_setting_and_read_whole(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"MAX_STORED_BODY_BYTES": 20}
    post_callback(llm_request, told())
    receipt = CallbackResponse.objects.get()
    assert (bytes(receipt.body), receipt.is_body_cut) == (DONE[:20], True)
    assert LLMRequest.objects.get().completion == "Forty-two."


def test_headers_that_are_nobodys_business_are_dropped(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    header = {"Set-Cookie": ["a=b"], "X-API-Key": ["k"], "authorization": ["x"], "Age": ["1"]}
    post_callback(llm_request, told(header=header))
    assert CallbackResponse.objects.get().header == {"Age": ["1"]}


def test_wrong_price_loses_no_answer(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": {"openai/gpt-5.4-mini": {"in": 1}}}
    assert post_callback(llm_request, told()).status_code == 200
    row = LLMRequest.objects.get()
    assert (row.state, row.completion) == ("completed", "Forty-two.")
    assert row.cost_source != "setting"


LOCAL = {"API_KEY": "lm-studio", "BASE_URL": "http://localhost:1234/v1"}


def provided(settings: Any, **provider: str) -> None:
    providers = settings.QSTASH_LLM["PROVIDERS"] | {"local": LOCAL | provider}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": providers}


def test_answer_is_kept_word_for_word_though_a_key_is_a_word_of_it(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    provided(settings)
    body = DONE.replace(b"Forty-two.", b"Install lm-studio first.")
    post_callback(llm_request, told(body=body))
    assert LLMRequest.objects.get().completion == "Install lm-studio first."
    assert bytes(CallbackResponse.objects.get().body) == body


def test_answer_is_read_as_it_came_though_a_key_is_a_part_of_its_numbers(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    provided(settings, API_KEY="12345678")
    body = DONE.replace(b'"created": 1', b'"created": 1712345678')
    post_callback(llm_request, told(body=body))
    assert LLMRequest.objects.get().completion == "Forty-two."
    assert b"12345678" not in bytes(CallbackResponse.objects.get().body)


def test_answer_that_tells_a_key_is_kept_without_it(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    key = "sk-canary-0123456789"
    message = {"content": f"It is {key}.", "refusal": key, "tool_calls": [{"id": key}]}
    answer = ANSWER | {"id": key, "model": key, "choices": [{"message": message}]}
    body = json.dumps(answer | {"usage": ANSWER["usage"] | {"note": key}}).encode()
    # Escaped it is found only in what was read.
    for number, each in enumerate((body, body.replace(b"canary", b"can\\u0061ry"))):
        row = ask()
        post_callback(row, told(body=each, source_message_id=f"msg_{number}"))
        row.refresh_from_db()
        assert row.completion == "It is [redacted]."
        assert "canary" not in repr(LLMRequest.objects.filter(pk=row.pk).values())


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("at", [70, 490])
def test_key_at_the_end_of_what_is_quoted_of_an_answer_is_kept_in_no_part(
    llm_request: LLMRequest, post_callback: Post, status: int, at: int
) -> None:
    body = b"x" * at + b"sk-canary-0123456789"
    post_callback(llm_request, told(status=status, body=body, max_retries=0))
    row, receipt = LLMRequest.objects.get(), CallbackResponse.objects.get()
    assert (row.state, "xxx" in row.error) == ("failed", True)
    assert "sk" not in row.error + receipt.problem


# --- early, late, twice ---


@pytest.mark.parametrize("claimed", [False, True])
def test_early_callback_needs_no_answer_to_the_submission(
    llm_request: LLMRequest, post_callback: Post, claimed: bool
) -> None:
    if claimed:
        until = timezone.now()
        LLMRequest.objects.update(claim_token=llm_request.uuid, claimed_until=until)
    post_callback(llm_request, attempt(1))
    row = LLMRequest.objects.get()
    assert (row.state, row.qstash_message_id, row.attempts) == ("submitted", "msg_1", 1)
    assert row.submitted_at is not None


def test_late_attempt_does_not_lower_a_completion(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, told(retried=2))
    before = LLMRequest.objects.values().get()
    for late in (attempt(1), attempt(2), attempt(3, status=500)):
        assert post_callback(llm_request, late).status_code == 200
    assert LLMRequest.objects.values().get() == before
    assert CallbackResponse.objects.count() == 3  # the third is told again, with another status


def test_answer_wins_over_a_failure_told_before(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, attempt(4, dlq_id="dlq_1"))
    LLMRequest.objects.update(announced_at=timezone.now())
    post_callback(llm_request, told(retried=3))
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.error, row.error_code) == (
        "completed",
        "Forty-two.",
        "",
        "",
    )
    assert row.announced_at is None  # to be told


def test_answer_told_as_an_attempt_that_failed_is_not_lost(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    """Envelopes that do not say which attempt they tell of are all read as the first one's."""
    untold = [without("retried", each) for each in (attempt(1), told(retried=1))]
    for envelope in (*untold, *untold):
        assert post_callback(llm_request, envelope).status_code == 200
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.cost) == ("completed", "Forty-two.", None)
    receipts = CallbackResponse.objects.order_by("retried")
    assert list(receipts.values_list("retried", "status", "seen_count")) == [
        (0, 503, 2),
        (1, 200, 2),
    ]
    assert "attempt 1, of which something else was told before" in receipts[1].problem


def test_second_answer_told_as_the_same_attempt_is_kept_beside_the_first(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    other = told(body=DONE.replace(b"Forty-two", b"Forty-three"))
    for callback in (told(), other, told(), other):
        assert post_callback(llm_request, callback).status_code == 200
    assert LLMRequest.objects.get().completion == "Forty-two."
    receipts = CallbackResponse.objects.order_by("retried")
    assert list(receipts.values_list("retried", "seen_count")) == [(0, 2), (1, 2)]


def test_answer_whose_body_was_cut_is_the_same_again(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"MAX_STORED_BODY_BYTES": 20}
    for _ in range(2):
        post_callback(llm_request, told())
    assert CallbackResponse.objects.get().seen_count == 2


GIVEN_UP = attempt(4, dlq_id="dlq_1")


@pytest.mark.parametrize(
    ("callbacks", "note"),
    [
        ([GIVEN_UP, told(retried=2)], "had failed before this answer came: the answer counts"),
        ([told(retried=2), GIVEN_UP], "gave a message of this request up"),
        ([told(), told(source_message_id="msg_2")], "completed before by another answer"),
        ([told(), told(source_message_id="msg_2", body=b"")], "completed before by another answer"),
    ],
    ids=["failure, answer", "answer, failure", "two answers", "answer, unreadable answer"],
)
def test_two_ends_of_one_request_are_noted_on_the_later_one(
    llm_request: LLMRequest, post_callback: Post, callbacks: list[Callback], note: str
) -> None:
    for callback in callbacks:
        assert post_callback(llm_request, callback).status_code == 200
    assert LLMRequest.objects.get().state == "completed"
    first, second = CallbackResponse.objects.order_by("id")
    assert (first.problem, note in second.problem) == ("", True)
    # Read again, each still says what it said at first.
    for receipt in (first, second):
        before = receipt.problem
        receipt.apply_again()
        receipt.refresh_from_db()
        assert receipt.problem == before


def test_one_end_of_a_request_is_not_noted_though_it_is_read_again(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    for callback in (attempt(1), attempt(2), told(retried=2)):
        post_callback(llm_request, callback)
    for receipt in CallbackResponse.objects.all():
        receipt.apply_again()
    assert set(CallbackResponse.objects.values_list("problem", flat=True)) == {""}


def test_attempt_of_another_message_does_not_stand_for_the_one_that_answered(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    for callback in (attempt(3), told(source_message_id="msg_2"), attempt(4, dlq_id="dlq_1")):
        post_callback(llm_request, callback)
    row = LLMRequest.objects.get()
    assert (row.state, row.attempts, row.last_status) == ("completed", 1, 200)


def test_cancelled_stays_cancelled_and_the_receipt_is_kept(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    llm_request.cancel()
    for callback in (attempt(1), told(retried=1), attempt(4, dlq_id="dlq_1")):
        assert post_callback(llm_request, callback).status_code == 200
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.cost) == ("cancelled", "", None)
    assert row.callback_responses.count() == 3


def test_other_requests_are_left_alone(llm_request: LLMRequest, post_callback: Post) -> None:
    other = ask()
    before = LLMRequest.objects.values().get(pk=other.pk)
    post_callback(llm_request, told())
    assert LLMRequest.objects.values().get(pk=other.pk) == before


# Each name is one thing that may be told about one request.
TELLABLE = {
    "attempt 1": attempt(1),
    "attempt 2, no answer": attempt(2, status=-1, body=b""),
    "success": told(retried=2),
    "last attempt": attempt(4),
    "failure callback": attempt(4, dlq_id="dlq_1"),
}
SEEN_BY_USERS = [
    *("state", "completion", "completion_id", "answered_by", "input_tokens", "output_tokens"),
    *("cost", "error", "error_code", "attempts", "last_status", "dead_letter_id"),
    "qstash_message_id",
]


def test_any_order_has_the_same_end(llm_request: LLMRequest, post_callback: Post) -> None:
    """All 325 orders of up to five callbacks, walked as a tree: a branch is a savepoint."""
    ends: dict[frozenset[str], set[Any]] = defaultdict(set)

    def tell_what_is_left(heard: frozenset[str]) -> None:
        for name in TELLABLE.keys() - heard:
            with transaction.atomic():
                assert post_callback(llm_request, TELLABLE[name]).status_code == 200
                ends[heard | {name}].add(LLMRequest.objects.values_list(*SEEN_BY_USERS).get())
                tell_what_is_left(heard | {name})
                transaction.set_rollback(True)

    tell_what_is_left(frozenset())
    assert len(ends) == 31
    assert {heard: len(different) for heard, different in ends.items() if len(different) > 1} == {}
    states = {heard: end[0] for heard, [end] in ends.items()}
    assert states == {heard: state_after(heard) for heard in ends}


def state_after(heard: frozenset[str]) -> str:
    if "success" in heard:
        return "completed"
    return "failed" if {"last attempt", "failure callback"} & heard else "submitted"


@pytest.mark.django_db(transaction=True)
def test_shuffled_repeated_and_parallel_callbacks_take_effect_once(qstash: FakeQStash) -> None:
    rows = [ask() for _ in range(6)]
    deliveries = [
        (row, callback)
        for number, row in enumerate(rows)
        for callback in (
            attempt(1, source_message_id=f"m{number}"),
            attempt(2, source_message_id=f"m{number}"),
            told(retried=2, source_message_id=f"m{number}"),
            attempt(4, source_message_id=f"m{number}", dlq_id=f"d{number}"),
        )
        for _ in range(3)
    ]
    random.Random(7).shuffle(deliveries)
    answers: list[Any] = []

    def deliver(mine: list[tuple[LLMRequest, Callback]]) -> None:
        client = Client()
        for row, callback in mine:
            url = f"http://testserver/llm/callback/{row.uuid}/"
            body = callback.to_json()
            key = settings.QSTASH_CURRENT_SIGNING_KEY
            signature = sign(body, url=url, key=key, now=timezone.now().timestamp())
            headers = {"Upstash-Signature": signature}
            answers.append(client.generic("POST", url, body, headers=headers).status_code)
        connections.close_all()

    threads = [threading.Thread(target=deliver, args=[deliveries[n::8]]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * len(deliveries)
    assert CallbackResponse.objects.count() == 24
    assert sum(CallbackResponse.objects.values_list("seen_count", flat=True)) == len(deliveries)
    ends = LLMRequest.objects.values_list("state", "completion", "attempts", "error")
    assert set(ends) == {("completed", "Forty-two.", 3, "")}


# --- what providers say and databases refuse ---

HOSTILE_TEXT = ["nul\x00", "\ud800half", "x" * 5000, "<script>alert(1)</script>", "‮", "😀" * 300]


def with_answer(**changed: Any) -> Callback:
    return told(body=json.dumps(ANSWER | changed).encode())


def said(**message: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


HOSTILE: dict[str, Callback] = {
    **{f"text {t[:6]!a}": with_answer(**said(content=t)) for t in HOSTILE_TEXT},
    **{f"refusal {t[:6]!a}": with_answer(**said(refusal=t)) for t in HOSTILE_TEXT},
    **{f"id {t[:6]!a}": with_answer(id=t) for t in HOSTILE_TEXT},
    **{f"model {t[:6]!a}": with_answer(model=t) for t in HOSTILE_TEXT},
    **{
        f"finish {t[:6]!a}": with_answer(
            choices=[{"message": {"content": "x"}, "finish_reason": t}]
        )
        for t in HOSTILE_TEXT
    },
    **{
        f"usage {name} {count!r:.12}": with_answer(usage=ANSWER["usage"] | {name: count})
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        for count in (2**31, 2**62, 2**63, 10**30, -5, "abc", [1], True, 12.7, 1e300)
    },
    "usage key": with_answer(usage={"a\x00": {"\ud800": [2**80]}}),
    "usage NaN": told(body=DONE.replace(b'"prompt_tokens": 9', b'"prompt_tokens": NaN')),
    "usage 1e400": told(body=DONE.replace(b'"prompt_tokens": 9', b'"prompt_tokens": 1e400')),
    "usage deep": with_answer(usage={"a": json.loads("[" * 500 + "]" * 500)}),
    "usage a list": with_answer(usage=[1]),
    **{
        f"cost {cost!r}": with_answer(usage=ANSWER["usage"] | {"cost": cost})
        for cost in (1e30, -1, "NaN", "Infinity", 1e-30, 999_999.123456789012345, "x", [])
    },
    "tool calls": with_answer(**said(tool_calls=[{"f\x00": "\ud800", "n": float("nan")}])),
    "tool calls deep": with_answer(**said(tool_calls=[json.loads("[" * 500 + "]" * 500)])),
    "anthropic sums": told(
        body=json.dumps(
            {
                "type": "message",
                "content": [{"type": "text", "text": "x"}],
                "usage": {
                    "input_tokens": 2**62,
                    "cache_read_input_tokens": 2**62,
                    "output_tokens": 2,
                },
            }
        ).encode()
    ),
    **{f"header {t[:6]!a}": told(header={f"X-{t}": [t]}) for t in HOSTILE_TEXT},
    **{
        f"error {t[:6]!a}": told(
            status=500,
            max_retries=0,
            body=json.dumps({"error": {"message": t, "code": t}}).encode(),
        )
        for t in HOSTILE_TEXT
    },
    **{f"raw error {t[:6]!a}": told(status=500, max_retries=0, body=t.encode("utf-8", "replace"))
       for t in HOSTILE_TEXT},
    "raw bytes": told(status=500, max_retries=0, body=bytes(range(256))),
    **{f"message id {t[:6]!a}": told(source_message_id=t) for t in HOSTILE_TEXT},
    **{f"dead letter {t[:6]!a}": told(status=500, dlq_id=t) for t in HOSTILE_TEXT},
    **{f"retried {n}": told(status=500, retried=n) for n in (2**31 - 2, 2**31 - 1, 2**40, 2**62)},
    **{f"max retries {n}": told(status=500, max_retries=n) for n in (2**31, 2**62)},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_stored_clean_on_every_database(
    llm_request: LLMRequest, post_callback: Post, settings: Any, name: str
) -> None:
    price = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": price}
    callback = HOSTILE[name]
    response = post_callback(llm_request, callback)
    assert response.status_code == 200, CallbackResponse.objects.get().problem
    row = LLMRequest.objects.get()
    receipt = CallbackResponse.objects.get()
    ends = ("submitted", "failed") if callback.status >= 300 else ("completed",)
    assert (receipt.kind != "quarantined", row.state in ends) == (True, True)
    shown = repr(LLMRequest.objects.values().get()) + repr(receipt.header)
    assert "\\x00" not in shown
    assert "\\ud800" not in shown
    for field in LLMRequest._meta.concrete_fields:
        field.clean(getattr(row, field.attname), row) if not field.blank else None
    # SQLite stores what is too long for a column of PostgreSQL.
    for stored in (row, receipt):
        for field in stored._meta.concrete_fields:
            if field.max_length and isinstance(getattr(stored, field.attname), str):
                assert len(getattr(stored, field.attname)) <= field.max_length


@pytest.mark.parametrize("status", [99, 600, 700, "teapot", None, [], 1e300, "200"])
def test_status_out_of_range_is_noted_and_is_no_response(
    llm_request: LLMRequest, post_callback: Post, status: Any
) -> None:
    envelope = json.loads(told().to_json()) | {"status": status}
    assert post_callback(llm_request, json.dumps(envelope).encode()).status_code == 200
    receipt = CallbackResponse.objects.get()
    assert receipt.status == (200 if status == "200" else -1)


def test_body_that_is_not_base64_is_kept_and_noted(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    envelope = json.loads(told().to_json()) | {"body": "Y!W@J#j"}
    post_callback(llm_request, json.dumps(envelope).encode())
    receipt = CallbackResponse.objects.get()
    assert bytes(receipt.body) == b"Y!W@J#j"
    assert LLMRequest.objects.get().error_code == "not_json"


def test_note_about_the_envelope_survives_an_unreadable_answer(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    envelope = json.loads(told().to_json()) | {"body": "Y!W@J#j"}
    post_callback(llm_request, json.dumps(envelope).encode())
    problem = CallbackResponse.objects.get().problem
    assert "body is not base64" in problem
    assert "not JSON" in problem


# --- querysets ---


def test_querysets_find_what_needs_a_person(llm_request: LLMRequest, post_callback: Post) -> None:
    post_callback(llm_request, attempt(1))
    post_callback(llm_request, b"[]")
    orphans = f"http://testserver/llm/callback/{'0' * 8}-0000-0000-0000-{'0' * 12}/"
    post_callback(None, told(source_message_id="other"), url=orphans)
    receipts: CallbackResponseQuerySet = CallbackResponse.objects.all()
    assert [receipt.kind for receipt in receipts.quarantined()] == ["quarantined"]
    assert [receipt.source_message_id for receipt in receipts.orphaned()] == ["other"]


def test_receiving_takes_few_queries_however_much_is_there(
    llm_request: LLMRequest, post_callback: Post, django_assert_max_num_queries: Any
) -> None:
    for number in range(20):
        post_callback(llm_request, attempt(1, source_message_id=f"m{number}"))
    with django_assert_max_num_queries(14):
        post_callback(llm_request, told())


# --- money that is spent although nobody reads the answer ---


def test_answer_to_a_cancelled_request_keeps_its_cost_and_changes_no_state(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    price = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": price}
    llm_request.cancel()
    post_callback(llm_request, told())
    row = LLMRequest.objects.get()
    assert (row.state, row.completion, row.input_tokens) == ("cancelled", "", 9)
    assert row.cost == Decimal("0.000015")


def test_answer_without_choices_keeps_its_usage_and_counts_as_unpriced(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = json.dumps({"choices": [], "usage": ANSWER["usage"]}).encode()
    post_callback(llm_request, told(body=body))
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code, row.output_tokens, row.cost) == (
        "failed",
        "no_choices",
        3,
        None,
    )
    assert list(LLMRequest.objects.unpriced()) == [row]


def test_answer_of_another_tier_than_the_standard_one_is_unpriced(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    price = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": price}
    body = json.dumps(ANSWER | {"service_tier": "priority"}).encode()
    post_callback(llm_request, told(body=body))
    row = LLMRequest.objects.get()
    assert (row.state, row.input_tokens, row.cost) == ("completed", 9, None)


# --- receipt first, interpretation after ---

BROKEN_PRICES = ["not", "a", "dictionary"]
"""A setting over which reading an answer breaks, until somebody mends it."""


@pytest.fixture
def set_prices(settings: Any) -> Callable[[Any], None]:
    def change(prices: Any) -> None:
        settings.QSTASH_LLM = {**settings.QSTASH_LLM, "PRICES": prices}

    return change


def test_what_could_not_be_read_is_kept_and_read_again_later(
    llm_request: LLMRequest, post_callback: Post, set_prices: Callable[[Any], None]
) -> None:
    set_prices(BROKEN_PRICES)
    assert post_callback(llm_request, told()).status_code == 200
    receipt = CallbackResponse.objects.get()
    assert bytes(receipt.body) == DONE
    assert (receipt.applied_at, receipt.apply_tries) == (None, 1)
    assert receipt.apply_after > receipt.received_at
    assert "AttributeError" in receipt.problem
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts) == ("pending", 0)
    # The same once more is known, and changes nothing.
    assert post_callback(llm_request, told()).status_code == 200
    assert CallbackResponse.objects.get().seen_count == 2

    now = receipt.apply_after
    assert CallbackResponse.objects.apply_due(now=receipt.received_at) == 0
    assert CallbackResponse.objects.apply_due(now=now) == 1
    receipt.refresh_from_db()
    assert (receipt.applied_at, receipt.apply_tries) == (None, 2)
    assert receipt.apply_after > now

    set_prices({"openai/gpt-5.4-mini": {"input": "1", "output": "2"}})
    now = receipt.apply_after
    assert CallbackResponse.objects.apply_due(now=now) == 1
    receipt.refresh_from_db()
    llm_request.refresh_from_db()
    assert (receipt.applied_at, receipt.apply_after) == (now, None)
    assert (llm_request.state, llm_request.completion) == ("completed", "Forty-two.")
    assert llm_request.cost == Decimal("0.000015")
    assert CallbackResponse.objects.apply_due(now=now + timedelta(days=1)) == 0


def test_what_never_becomes_readable_is_left_to_a_person(
    llm_request: LLMRequest, post_callback: Post, set_prices: Callable[[Any], None]
) -> None:
    set_prices(BROKEN_PRICES)
    post_callback(llm_request, told())
    now, tries = timezone.now(), 0
    for _ in range(50):
        now += timedelta(days=1)
        tries += CallbackResponse.objects.apply_due(now=now)
    assert tries == MOST_APPLY_TRIES - 1
    receipt = CallbackResponse.objects.get()
    assert (receipt.applied_at, receipt.apply_tries) == (None, MOST_APPLY_TRIES)
    # And a person may, once it is mended.
    set_prices({})
    assert receipt.apply_again()
    llm_request.refresh_from_db()
    assert llm_request.state == "completed"


def test_what_the_database_refuses_of_a_meaning_costs_no_receipt(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    def refuse(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("UPDATE") and "completion" in sql:
            raise DataError("value out of range")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(refuse):
        assert post_callback(llm_request, told()).status_code == 200
    receipt = CallbackResponse.objects.get()
    assert (receipt.kind, receipt.applied_at, receipt.apply_tries) == ("callback", None, 1)
    assert "DataError" in receipt.problem
    llm_request.refresh_from_db()
    assert llm_request.state == "pending"
    assert CallbackResponse.objects.apply_due(now=receipt.apply_after) == 1
    llm_request.refresh_from_db()
    assert llm_request.state == "completed"


def test_one_meaning_that_the_database_refuses_stops_no_other(
    llm_request: LLMRequest, post_callback: Post, set_prices: Callable[[Any], None]
) -> None:
    other = LLMRequest.objects.publish(llm_request.messages)
    set_prices(BROKEN_PRICES)
    for row in (llm_request, other):
        post_callback(row, told(source_message_id=f"msg_of_{row.pk}"))
    set_prices({})
    refused = []

    def refuse_first(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("UPDATE") and '"completion" = ' in sql and not refused:
            refused.append(sql)
            raise DataError("value out of range")
        return execute(sql, params, many, context)

    now = timezone.now() + timedelta(hours=1)
    with connection.execute_wrapper(refuse_first):
        assert CallbackResponse.objects.apply_due(now=now) == 2
    first, second = CallbackResponse.objects.order_by("pk")
    assert (first.applied_at, first.apply_tries, second.applied_at) == (None, 2, now)
    assert first.apply_after > now
    assert "DataError" in first.problem
    states = LLMRequest.objects.order_by("pk").values_list("state", flat=True)
    assert list(states) == ["pending", "completed"]
    assert CallbackResponse.objects.apply_due(now=first.apply_after) == 1
    assert LLMRequest.objects.completed().count() == 2


def test_a_body_that_was_cut_is_not_read_again(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "MAX_STORED_BODY_BYTES": 20}
    post_callback(llm_request, told())
    with pytest.raises(IllegalState, match="MAX_STORED_BODY_BYTES"):
        CallbackResponse.objects.get().apply_again()


def test_reading_again_what_was_read_changes_nothing(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, told())
    before = LLMRequest.objects.values().get()
    assert not CallbackResponse.objects.get().apply_again()
    assert LLMRequest.objects.values().get() == before


def test_a_request_that_is_with_qstash_has_a_deadline_and_any_news_moves_it(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    LLMRequest.objects.update(inquiries=3)
    post_callback(llm_request, attempt(1))
    llm_request.refresh_from_db()
    received_at = CallbackResponse.objects.get().received_at
    assert llm_request.deadline_at == received_at + timedelta(seconds=900)
    assert llm_request.inquiries == 0
    post_callback(llm_request, told(retried=1))
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.deadline_at) == ("completed", None)


def test_a_callback_takes_the_same_few_statements_however_much_is_there(
    post_callback: Post, qstash: FakeQStash, django_assert_num_queries: Any
) -> None:
    first, last = ask(), ask()
    for row in (first, last):
        known_prices(timezone.now())  # asked for once in a while, not by each callback
        with django_assert_num_queries(6):  # a savepoint, lock, insert, update, entry, its release
            assert post_callback(row, told(source_message_id=f"m{row.pk}")).status_code == 200
        CallbackResponse.objects.bulk_create(
            CallbackResponse(
                uuid=row.uuid, llm_request=row, kind="callback", source_message_id=f"o{n}"
            )
            for n in range(200 * (row is first))
        )


@pytest.mark.parametrize("kept", ["hashed", "none"])
def test_what_is_not_to_be_kept_is_forgotten_by_the_statement_that_finishes(
    llm_request: LLMRequest, post_callback: Post, settings: Any, kept: str
) -> None:
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "STORE_MESSAGES": kept}
    digest = digest_of(llm_request.messages) if kept == "hashed" else ""
    post_callback(llm_request, attempt(1))
    llm_request.refresh_from_db()
    assert llm_request.messages
    post_callback(llm_request, told(retried=1))
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.messages, llm_request.digest) == (
        "completed",
        [],
        digest,
    )
    assert llm_request.forgotten_at == llm_request.finished_at
    with pytest.raises(IllegalState, match="forgotten"):
        llm_request.resubmit()


@contextmanager
def between_looking_and_writing(happens: Callable[[], Any]) -> Iterator[list[str]]:
    """``happens`` in another connection, once, when a callback was looked at and is to be written.
    Yields the statements."""
    statements: list[str] = []

    def meanwhile(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        has_looked = any(
            "FROM " in each and LLMRequest._meta.db_table in each for each in statements
        )
        is_first = not any(map(is_writing, statements))
        if has_looked and is_first and is_writing(sql):
            other = threading.Thread(target=in_another_connection)
            other.start()
            other.join()
        statements.append(sql)
        return execute(sql, params, many, context)

    def is_writing(sql: str) -> bool:
        return "WITH changed AS" in sql or sql.startswith("BEGIN")

    def in_another_connection() -> None:
        happens()
        connections.close_all()

    with connection.execute_wrapper(meanwhile):
        yield statements


@pytest.mark.django_db(transaction=True)
def test_what_changes_between_looking_and_writing_is_seen_with_a_lock(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    cancelled = {"state": "cancelled", "finished_at": timezone.now()}
    with between_looking_and_writing(
        lambda: LLMRequest.objects.filter(pk=row.pk).update(**cancelled)
    ) as statements:
        assert post_callback(row, told()).status_code == 200
    row.refresh_from_db()
    # Not completed, and yet paid for.
    assert (row.state, row.completion, row.input_tokens) == ("cancelled", "", 9)
    assert CallbackResponse.objects.get().applied_at is not None
    looks = [sql for sql in statements if "WHERE uuid = " in sql]
    assert len(looks) == 2
    assert ("FOR UPDATE" in looks[1]) == connection.features.has_select_for_update


@pytest.mark.django_db(transaction=True)
def test_the_usual_callback_takes_two_statements_on_postgresql_and_four_on_others(
    post_callback: Post, qstash: FakeQStash, django_assert_num_queries: Any
) -> None:
    most = {"postgresql": 2}.get(connection.vendor, 6)  # with its BEGIN and COMMIT
    row = ask()
    post_callback(row, attempt(1))
    known_prices(timezone.now())  # which are asked for once in a while, and not by each callback
    with django_assert_num_queries(most):
        assert post_callback(row, told(retried=1)).status_code == 200


@pytest.mark.django_db(transaction=True)
def test_with_autocommit_off_it_is_for_the_site_to_commit(qstash: FakeQStash) -> None:
    row = submitted()
    transaction.set_autocommit(False)
    try:
        LLMRequest.objects.filter(pk=row.pk).update(error="x")
        CallbackResponse.objects.receive(told(), uuid=row.uuid, now=timezone.now())
        row.refresh_from_db()
        assert row.state == "completed"
        transaction.rollback()
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    row.refresh_from_db()
    assert (row.state, row.error) == ("submitted", "")
    assert not CallbackResponse.objects.exists()


@pytest.mark.skipif(connection.vendor == "sqlite", reason="nobody can hang up on a file")
@pytest.mark.django_db(transaction=True)
def test_a_connection_that_has_gone_stale_is_found_where_the_site_has_it_checked(
    post_callback: Post, qstash: FakeQStash, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ask()
    monkeypatch.setitem(connection.settings_dict, "CONN_HEALTH_CHECKS", True)
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)
    connection.close()
    connection.connect()
    connection.close_if_unusable_or_obsolete()  # as Django does when a request begins
    connection.connection.close()
    try:
        assert post_callback(row, told()).status_code == 200
    finally:
        connection.close()


@pytest.mark.django_db(transaction=True)
def test_the_next_answer_of_a_model_takes_one_statement_on_postgresql(
    post_callback: Post, qstash: FakeQStash, django_assert_num_queries: Any
) -> None:
    first, row = submitted(), submitted(qstash_message_id="msg_2")
    post_callback(first, told())
    with django_assert_num_queries({"postgresql": 1}.get(connection.vendor, 6)):
        assert post_callback(row, told(source_message_id="msg_2")).status_code == 200
    for each in (first, row):
        each.refresh_from_db()
    receipts = [each.callback_responses.get() for each in (first, row)]
    assert [each.applied_at for each in receipts] == [each.received_at for each in receipts]
    for name in ("state", "completion", "answered_by", "cost", "usage", "attempts", "last_status"):
        assert getattr(row, name) == getattr(first, name), name
    assert row.state == "completed"


FINISHED = timezone.now()
PRICED = {f"openai/{model}": {"input": str(n), "output": "0"} for n, model in enumerate("ab", 1)}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ({}, ("completed", Decimal("0.000009"))),
        # Answered by the same model, which was asked for under another name.
        ({"model": "b"}, ("completed", Decimal("0.000018"))),
        ({"provider": "another"}, ("completed", None)),
        ({"qstash_message_id": ""}, ("completed", Decimal("0.000009"))),
        ({"qstash_message_id": "msg_former"}, ("completed", Decimal("0.000009"))),
        ({"state": "pending"}, ("completed", Decimal("0.000009"))),
        ({"state": "cancelled", "finished_at": FINISHED}, ("cancelled", Decimal("0.000009"))),
        ({"state": "failed", "finished_at": FINISHED}, ("completed", Decimal("0.000009"))),
    ],
    ids=["nothing", "model", "provider", "no id", "other id", "pending", "cancelled", "failed"],
)
def test_what_is_supposed_of_a_request_decides_nothing(
    post_callback: Post,
    qstash: FakeQStash,
    settings: Any,
    differs: dict[str, Any],
    expected: tuple[str, Decimal | None],
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICED}
    post_callback(submitted(model="a"), told())
    row = submitted(**{"model": "a", "qstash_message_id": "msg_2"} | differs)
    assert post_callback(row, told(source_message_id="msg_2")).status_code == 200
    row.refresh_from_db()
    assert (row.state, row.cost) == expected
    assert row.qstash_message_id == (differs.get("qstash_message_id") or "msg_2")
    receipt = row.callback_responses.get()
    assert receipt.applied_at == receipt.received_at
    # The same answer once more changes nothing, and is no other.
    before = [LLMRequest.objects.filter(pk=row.pk).values().get()]
    assert post_callback(row, told(source_message_id="msg_2")).status_code == 200
    assert [LLMRequest.objects.filter(pk=row.pk).values().get()] == before
    assert row.callback_responses.get().seen_count == 2


@pytest.mark.django_db(transaction=True)
def test_another_answer_that_comes_between_looking_and_writing_is_noted(
    post_callback: Post, qstash: FakeQStash
) -> None:
    row = ask()
    other = told(source_message_id="msg_2")
    with between_looking_and_writing(
        lambda: CallbackResponse.objects.receive(other, uuid=row.uuid, now=timezone.now())
    ):
        assert post_callback(row, told()).status_code == 200
    problems = dict(CallbackResponse.objects.values_list("source_message_id", "problem"))
    assert problems["msg_2"] == ""
    assert "completed before by another answer" in problems["msg_1"]
