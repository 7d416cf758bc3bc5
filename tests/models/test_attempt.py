"""What a receipt says of its attempt: what was wrong, what comes next, and both in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from django.conf import settings as site
from django.utils import timezone

from django_qstash_llm.limits import Trouble
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.attempt import DelayedBy, short_duration
from django_qstash_llm.models.cancellation import Cancellations
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DONE = json.dumps(ANSWER).encode()
MESSAGES = [{"role": "user", "content": "?"}]


def ask(**asked: Any) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish(MESSAGES, **asked)
    return row


def error(message: str = "", code: str = "") -> bytes:
    return json.dumps({"error": {"message": message, "code": code}}).encode()


def attempt(status: int, body: bytes = b"", retried: int = 0, **fields: Any) -> Callback:
    told = {"max_retries": 3, "source_message_id": "msg_1"} | fields
    return Callback(status=status, body=body, retried=retried, **told)


def receive(row: LLMRequest, callback: Callback, now: datetime = NOW) -> CallbackResponse:
    receipt = CallbackResponse.objects.receive(callback, uuid=row.uuid, now=now)
    row.refresh_from_db()
    return receipt


@pytest.fixture
def row(qstash: FakeQStash) -> LLMRequest:
    return ask()


# --- what is read ---


def test_a_rate_limit_says_how_long_to_wait_and_where_it_was_said(row: LLMRequest) -> None:
    header = {
        "X-RateLimit-Limit-Tokens": ["1000"],
        "X-RateLimit-Remaining-Tokens": ["0"],
        "X-RateLimit-Reset-Tokens": ["6m0s"],
    }
    body = error("Rate limit reached", "rate_limit_exceeded")
    receive(row, attempt(429, body, header=header))
    expected = {
        "trouble": Trouble.RATE,
        "code": "rate_limit_exceeded",
        "words": "Rate limit reached",
        "wait": 360.0,
        "wait_source": "x-ratelimit-reset-tokens",
        "next_try_at": NOW + timedelta(minutes=6),
        "delayed_by": DelayedBy.PROVIDER,
        "to_announce": True,
        "cancel_after": None,
    }
    receipt = CallbackResponse.objects.get()
    assert {name: getattr(receipt, name) for name in expected} == expected
    assert (row.state, row.error) == ("submitted", "Rate limit reached (after 1 attempt)")


def test_an_answer_leaves_all_of_it_empty(row: LLMRequest) -> None:
    receipt = receive(row, attempt(200, DONE))
    fresh = CallbackResponse()
    names = [field.attname for field in CallbackResponse._meta.fields]
    empty = names[names.index("trouble") : names.index("cancel_tries") + 1]
    assert len(empty) == 13
    assert {n: getattr(receipt, n) for n in empty} == {n: getattr(fresh, n) for n in empty}


@pytest.mark.parametrize(
    ("asked", "header", "seconds", "delayed_by"),
    [
        ({}, {"Retry-After": ["20"]}, 20, DelayedBy.PROVIDER),
        ({"retry_delay": "5000"}, {"Retry-After": ["20"]}, 20, DelayedBy.PROVIDER),
        ({"retry_delay": "(1 + retried) * 5000"}, {}, 10, DelayedBy.REQUEST),
        ({}, {}, 148.413159, DelayedBy.QSTASH),
    ],
)
def test_the_next_try_is_when_qstash_makes_it_and_says_why(
    qstash: FakeQStash,
    asked: dict[str, Any],
    header: dict[str, list[str]],
    seconds: float,
    delayed_by: str,
) -> None:
    receipt = receive(ask(**asked), attempt(503, retried=1, header=header))
    assert receipt.next_try_at == NOW + timedelta(seconds=seconds)
    assert receipt.delayed_by == delayed_by


def test_after_the_last_attempt_there_is_no_next_try(row: LLMRequest) -> None:
    receipt = receive(row, attempt(503, error("Busy"), retried=3, header={"Retry-After": ["1"]}))
    assert (receipt.trouble, receipt.next_try_at, receipt.delayed_by) == ("overload", None, "")
    assert receipt.cancel_after is None
    assert (row.state, row.error_code, row.error) == (
        "failed",
        "http_503",
        "Busy (after 4 attempts)",
    )


def test_keys_that_a_provider_repeats_are_not_kept(row: LLMRequest) -> None:
    key = site.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
    body = error(f"Incorrect API key provided: {key}. Please try again in 5s {key}", f"bad {key}")
    receive(row, attempt(401, body, header={"Retry-After": [key]}))
    receipt = CallbackResponse.objects.get()
    assert receipt.trouble == Trouble.AUTH
    told = [receipt.words, receipt.code, receipt.wait_source, receipt.sentence, row.error]
    assert key not in repr(told)
    assert "[redacted]" in receipt.words


def test_what_could_not_be_read_at_first_is_read_again_with_all_of_it(
    row: LLMRequest, settings: Any
) -> None:
    receive(row, attempt(402, error("Pay up")))
    CallbackResponse.objects.update(trouble="", words="", next_try_at=None, to_announce=False)
    CallbackResponse.objects.update(applied_at=None, cancel_after=None)
    receipt = CallbackResponse.objects.get()
    receipt.apply_again(now=NOW)
    receipt.refresh_from_db()
    assert (receipt.trouble, receipt.words) == ("money", "Pay up")
    assert (receipt.to_announce, receipt.cancel_after) == (True, NOW)


def test_what_took_effect_is_not_announced_or_cancelled_again_when_it_is_read_again(
    row: LLMRequest,
) -> None:
    receive(row, attempt(402, error("Pay up")))
    read_before_it_was_done = CallbackResponse.objects.get()
    CallbackResponse.objects.update(to_announce=False, cancel_after=None)
    read_before_it_was_done.apply_again(now=NOW)
    CallbackResponse.objects.get().apply_again(now=NOW)
    assert not CallbackResponse.objects.filter(to_announce=True).exists()
    assert not Cancellations(clock=lambda: NOW).due().exists()


# --- what is never tried blindly ---

HOPELESS = [
    (402, error("No credit", "insufficient_quota"), "insufficient_quota", Trouble.MONEY),
    (429, error("You exceeded your quota", "insufficient_quota"), "insufficient_quota", "money"),
    (413, b"", "too_large", Trouble.TOO_LARGE),
    (400, error("Flagged", "content_filter"), "content_filter", Trouble.CONTENT),
    (401, error("Wrong key", "invalid_api_key"), "invalid_api_key", Trouble.AUTH),
    (302, b"", "gone", Trouble.GONE),
    (404, error("No such model", "model_not_found"), "model_not_found", Trouble.GONE),
    (422, b"", "invalid", Trouble.INVALID),
]


@pytest.mark.parametrize(("status", "body", "code", "trouble"), HOPELESS)
def test_what_no_try_would_help_fails_at_once_with_the_remedy(
    row: LLMRequest, status: int, body: bytes, code: str, trouble: str
) -> None:
    receipt = receive(row, attempt(status, body))
    assert (receipt.trouble, receipt.next_try_at, receipt.cancel_after) == (trouble, None, NOW)
    assert (row.state, row.error_code, row.finished_at) == ("failed", code, NOW)
    words = receipt.words or f"the provider answered {status}"
    assert row.error == f"{words} (after 1 attempt). {Trouble(trouble).remedy}"


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529, -1])
def test_what_passes_is_left_to_qstash(row: LLMRequest, status: int) -> None:
    receipt = receive(row, attempt(status))
    assert (row.state, receipt.cancel_after) == ("submitted", None)
    assert receipt.next_try_at is not None


@pytest.mark.parametrize(
    ("status", "word", "state"),
    [(429, "false", "failed"), (401, "true", "submitted"), (401, "perhaps", "failed")],
)
def test_the_providers_own_word_counts_first(
    row: LLMRequest, status: int, word: str, state: str
) -> None:
    receive(row, attempt(status, header={"X-Should-Retry": [word]}))
    assert row.state == state


def test_an_answer_that_arrives_nevertheless_counts(row: LLMRequest) -> None:
    receive(row, attempt(401))
    receipt = receive(row, attempt(200, DONE, retried=1))
    assert (row.state, row.completion, row.error, row.error_code) == (
        "completed",
        "Forty-two.",
        "",
        "",
    )
    assert "the answer counts" in receipt.problem


@pytest.mark.parametrize("is_reversed", [False, True])
def test_of_several_ends_the_first_attempts_counts_whichever_is_told_first(
    row: LLMRequest, is_reversed: bool
) -> None:
    told = [attempt(401, error("Wrong key")), attempt(402, error("Pay"), 1)]
    told += [attempt(503, error("Busy"), 3), attempt(503, error("Busy"), 3, dlq_id="dlq_1")]
    for callback in told[::-1] if is_reversed else told:
        receive(row, callback)
    assert row.error.startswith("Wrong key (after 1 attempt).")
    assert (row.error_code, row.attempts, row.last_status) == ("auth", 4, 503)
    assert row.dead_letter_id == "dlq_1"


def test_an_error_with_status_200_is_trouble_too(row: LLMRequest) -> None:
    receipt = receive(row, attempt(200, error("Insufficient credits", "402")))
    assert (receipt.trouble, receipt.next_try_at, receipt.cancel_after) == ("money", None, None)
    assert row.state == "failed"
    assert row.error.startswith("Insufficient credits. Raise the spend limit")


# --- in a sentence ---

TOKENS = {
    "x-ratelimit-remaining-tokens": ["0"],
    "x-ratelimit-reset-tokens": ["6m0s"],
}


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (attempt(200, DONE), "200"),
        (attempt(429, error("Slow"), header=TOKENS), "429 rate: tokens reset in 6m0s; next try {}"),
        (
            attempt(429, header={"Retry-After": ["360"]}),
            "429 rate: retry-after 6m0s; next try {}",
        ),
        (attempt(503, error("Busy."), retried=3), "503 overload: Busy; no try is left"),
        (
            attempt(429, error("No."), header={"X-Should-Retry": ["false"]}),
            "429 rate: No; the provider asks not to try again",
        ),
        (
            attempt(402, error("Out of credit.")),
            "402 money: Out of credit. Raise the spend limit or pay at the provider's console, "
            "then resume.",
        ),
        (attempt(-1, retried=3), "no response fault: no try is left"),
        (
            attempt(429, error("Please try again in 6m0s."), header={"Retry-After": [""]}),
            "429 rate: Please try again in 6m0s; next try {later}",
        ),
    ],
)
def test_an_attempt_is_told_in_a_sentence(
    row: LLMRequest, callback: Callback, sentence: str
) -> None:
    now = timezone.now()
    receipt = receive(row, callback, now)
    at = [now + timedelta(minutes=6), receipt.next_try_at or now]
    named, later = (f"{timezone.localtime(each):%H:%M:%S}" for each in at)
    is_today = timezone.localtime(at[0]).date() == timezone.localtime(now).date()
    if is_today:
        assert receipt.sentence == sentence.format(named, later=later)


def test_a_next_try_is_told_in_the_current_time_zone_and_with_a_date_on_another_day(
    row: LLMRequest,
) -> None:
    receipt = receive(row, attempt(429, header={"Retry-After": ["60"]}))
    with timezone.override("Asia/Tokyo"):
        assert receipt.sentence.endswith("next try 2026-03-01 21:01:00")


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.05, "0.05s"),
        (20, "20s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
        (90061, "1d1h1m1s"),
    ],
)
def test_a_span_is_written_as_providers_write_it(seconds: float, written: str) -> None:
    assert short_duration(seconds) == written


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x-ratelimit-reset", "limit reset in 9s"),
        ("x-ratelimit-reset-requests", "requests reset in 9s"),
        ("x-ratelimit-reset-tokens-minute", "tokens minute reset in 9s"),
        ("anthropic-ratelimit-input-tokens-reset", "input tokens reset in 9s"),
        ("retry-after-ms", "retry-after-ms 9s"),
        ("RetryInfo", "RetryInfo 9s"),
    ],
)
def test_where_a_wait_was_named_is_said(source: str, said: str) -> None:
    receipt = CallbackResponse(status=429, trouble="rate", wait=9.0, wait_source=source)
    assert receipt.sentence == f"429 rate: {said}; no try is left"


# --- cancelling ---


def cancellations(now: datetime = NOW) -> Cancellations:
    return Cancellations(clock=lambda: now)


def test_a_hopeless_message_is_cancelled_at_qstash_and_not_in_the_callback(
    row: LLMRequest, qstash: FakeQStash
) -> None:
    receive(row, attempt(401))
    assert qstash.cancelled == []
    assert cancellations().cancel() == 1
    assert (qstash.cancelled, cancellations().cancel()) == (["msg_1"], 0)


@pytest.mark.django_db(transaction=True)
def test_its_cancellation_is_rung_for(
    qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    post_callback(ask(), attempt(401))
    assert qstash.cancelled == ["msg_1"]


def test_a_message_that_is_gone_is_cancelled(row: LLMRequest, qstash: FakeQStash) -> None:
    receive(row, attempt(401))
    qstash.answer = lambda request: qstash.not_found()
    assert cancellations().cancel() == 1
    assert CallbackResponse.objects.get().cancel_after is None


def test_a_cancellation_is_tried_again_later_each_time_and_not_for_ever(
    row: LLMRequest, qstash: FakeQStash
) -> None:
    receive(row, attempt(401))
    qstash.answer = lambda request: httpx.Response(500)
    now, pauses = NOW, []
    while receipt := CallbackResponse.objects.exclude(cancel_after=None).first():
        pauses.append((receipt.cancel_after - now).total_seconds())
        now = receipt.cancel_after
        assert cancellations(now).cancel() == 0
    assert pauses == [0, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600]
    assert row.state == "failed"


def test_an_outage_stops_at_the_first(qstash: FakeQStash) -> None:
    for number in range(3):
        receive(ask(), attempt(401, source_message_id=f"msg_{number}"))
    qstash.calls.clear()
    qstash.answer = lambda request: httpx.Response(503)
    cancellations().cancel()
    tried = CallbackResponse.objects.filter(cancel_tries=1)
    assert tried.count() == 1
    qstash.answer = None
    assert cancellations().cancel() == 2


def test_a_worker_that_dies_over_a_cancellation_has_it_made_by_another(
    row: LLMRequest, qstash: FakeQStash
) -> None:
    receipt = receive(row, attempt(401))
    assert cancellations().claim(receipt.pk) is not None
    assert cancellations().cancel() == 0
    assert cancellations(NOW + timedelta(minutes=3)).cancel() == 1
