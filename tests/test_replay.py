"""Once more, without paying twice: stored callbacks are read again, dead letters are retried."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from io import StringIO
from typing import Any
from uuid import uuid4

import httpx
import pytest
from django.conf import settings as django_settings
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm import triggers
from django_qstash_llm.exceptions import ConfigurationError, IllegalState
from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.reconciler import Reconciler
from django_qstash_llm.models.replay import read_anew
from django_qstash_llm.models.request import UNFINISHED, State
from django_qstash_llm.qstash import Callback, NotFound, QStashError, TransportError
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter, Gate, Message
from django_qstash_llm.signals import request_completed, request_failed
from testproject.provider import MODEL, Provider

from .conftest import ANSWER
from .wire import FakeQStash, Wire

KEY = django_settings.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
MESSAGES = [{"role": "user", "content": "What is it?"}]
GOOD = json.dumps(ANSWER).encode()
PRICES = {"openai/gpt-5.4-mini": {"input": "1", "output": "10"}}
COST = Decimal("0.000039")
"""Nine tokens in and three out, at ``PRICES``."""

Post = Callable[..., Any]


def replay(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_replay", *arguments, stdout=out)
    return out.getvalue()


def refused_replay(*arguments: str) -> tuple[str, str]:
    """What it printed, and why it ended with an error."""
    out = StringIO()
    with pytest.raises(CommandError) as caught:
        call_command("llm_replay", *arguments, stdout=out)
    return out.getvalue(), str(caught.value)


def publish(**asked: Any) -> LLMRequest:
    return LLMRequest.objects.publish(MESSAGES, **asked)


def answered(body: bytes = GOOD, **fields: Any) -> Callback:
    return Callback(**{"status": 200, "body": body, "source_message_id": "msg_1", **fields})


@pytest.fixture
def told() -> Iterator[list[tuple[str, Any]]]:
    """What receivers have been told, in order."""
    heard: list[tuple[str, Any]] = []

    def hear_completed(llm_request: LLMRequest, **kwargs: Any) -> None:
        heard.append(("completed", llm_request.uuid))

    def hear_failed(llm_request: LLMRequest, **kwargs: Any) -> None:
        heard.append(("failed", llm_request.uuid))

    request_completed.connect(hear_completed)
    request_failed.connect(hear_failed)
    yield heard
    request_completed.disconnect(hear_completed)
    request_failed.disconnect(hear_failed)


def announce() -> None:
    while triggers.announce("default"):
        pass


# --- reading again -----------------------------------------------------------------------------


@pytest.fixture
def unread(qstash: FakeQStash, post_callback: Post, settings: Any) -> LLMRequest:
    """Its answer has arrived while reading answers broke: PRICES are no dictionary."""
    llm_request = publish()
    ours = settings.QSTASH_LLM
    settings.QSTASH_LLM = ours | {"PRICES": ["cheap"]}
    assert post_callback(llm_request, answered()).status_code == 200
    settings.QSTASH_LLM = ours | {"PRICES": PRICES}
    assert CallbackResponse.objects.get().applied_at is None
    return llm_request


@pytest.mark.django_db
def test_answer_whose_reading_broke_is_read_after_the_mending(
    unread: LLMRequest, qstash: FakeQStash, told: list[Any]
) -> None:
    calls = list(qstash.calls)
    receipt = CallbackResponse.objects.get()
    assert replay("--unread") == (
        f"{unread.uuid} callback {receipt.pk} changed: request is completed\n1 changed.\n"
    )
    unread.refresh_from_db()
    assert (unread.state, unread.completion, unread.cost) == ("completed", "Forty-two.", COST)
    announce()
    assert told == [("completed", unread.uuid)]
    assert qstash.calls == calls


@pytest.mark.django_db
def test_reading_again_and_again_changes_nothing_more(unread: LLMRequest, told: list[Any]) -> None:
    replay("--unread")
    announce()
    before = LLMRequest.objects.values().get()
    assert replay("--unread") == "Nothing to do.\n"
    assert replay(str(unread.uuid)) == (
        f"{unread.uuid} answer unchanged: request is completed\n1 unchanged.\n"
    )
    assert CallbackResponse.objects.get().apply_again(now=timezone.now()) is False
    announce()
    assert LLMRequest.objects.values().get() == before
    assert CallbackResponse.objects.count() == 1
    assert told == [("completed", unread.uuid)]


@pytest.mark.django_db
def test_what_still_cannot_be_read_is_named_and_the_command_fails(
    unread: LLMRequest, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": ["cheap"]}
    printed, why = refused_replay("--unread")
    assert f"{unread.uuid} callback" in printed
    assert "unreadable: AttributeError" in printed
    assert why == "1 of 1 could not be done: see above."
    unread.refresh_from_db()
    assert unread.state in UNFINISHED


@pytest.mark.django_db
def test_dry_run_says_what_it_would_read_and_reads_nothing(unread: LLMRequest) -> None:
    assert "due" in replay("--unread", "--dry-run")
    unread.refresh_from_db()
    assert unread.state in UNFINISHED
    assert CallbackResponse.objects.get().applied_at is None


@pytest.mark.django_db
def test_json_is_one_object_for_a_program_to_read(unread: LLMRequest) -> None:
    receipt = CallbackResponse.objects.get()
    assert json.loads(replay("--unread", "--json")) == {
        "counts": {"changed": 1},
        "items": [
            {
                "uuid": str(unread.uuid),
                "what": f"callback {receipt.pk}",
                "outcome": "changed",
                "detail": "request is completed",
            }
        ],
    }


@pytest.mark.django_db
def test_quarantined_envelope_that_can_be_read_now_completes_its_request_once(
    qstash: FakeQStash, post_callback: Post, told: list[Any], settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}
    llm_request = publish()
    calls = list(qstash.calls)
    CallbackResponse.objects.quarantine(
        answered().to_json(), uuid=llm_request.uuid, problem="a fault of ours", now=timezone.now()
    )
    for _ in range(2):
        replay("--quarantined")
        announce()
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.cost) == ("completed", COST)
    kinds = CallbackResponse.objects.order_by("id").values_list("kind", flat=True)
    assert list(kinds) == [Kind.QUARANTINED, Kind.CALLBACK]
    assert told == [("completed", llm_request.uuid)]
    assert qstash.calls == calls
    # The same callback once more from QStash is the one that is known.
    assert post_callback(llm_request, answered()).status_code == 200
    assert CallbackResponse.objects.get(kind=Kind.CALLBACK).seen_count == 2


@pytest.mark.django_db
def test_what_is_no_envelope_stays_in_quarantine(qstash: FakeQStash) -> None:
    llm_request = publish()
    CallbackResponse.objects.quarantine(
        b"[]", uuid=llm_request.uuid, problem="not an object", now=timezone.now()
    )
    printed, _ = refused_replay("--quarantined")
    assert "unreadable: Still not an envelope" in printed
    assert CallbackResponse.objects.get().kind == Kind.QUARANTINED


@pytest.fixture
def misread(qstash: FakeQStash, post_callback: Post, settings: Any) -> LLMRequest:
    """Failed on an answer that the code of today can read."""
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": PRICES}
    llm_request = publish()
    post_callback(llm_request, answered(b"<answer>Forty-two.</answer>"))
    llm_request.refresh_from_db()
    assert llm_request.error_code == "not_json"
    announce()
    CallbackResponse.objects.update(body=GOOD)
    return llm_request


@pytest.mark.django_db
@pytest.mark.parametrize("arguments", [["--failed"], ["--failed", "--code", "not_json"]])
def test_failed_request_whose_answer_was_misread_is_completed(
    misread: LLMRequest, arguments: list[str], told: list[Any]
) -> None:
    assert replay(*arguments).endswith("1 changed.\n")
    misread.refresh_from_db()
    assert (misread.state, misread.error, misread.cost) == ("completed", "", COST)
    announce()
    assert told == [("completed", misread.uuid)]


@pytest.mark.django_db
def test_other_error_codes_are_left_alone(misread: LLMRequest) -> None:
    assert replay("--failed", "--code", "truncated") == "Nothing to do.\n"


@pytest.mark.django_db
def test_failed_request_whose_answer_is_still_unreadable_stays_failed(
    misread: LLMRequest,
) -> None:
    CallbackResponse.objects.update(body=b"<answer/>")
    printed, _ = refused_replay("--failed")
    assert "unreadable: the answer is not JSON" in printed
    misread.refresh_from_db()
    assert misread.state == State.FAILED


@pytest.mark.django_db
def test_failure_of_the_provider_is_no_answer_to_read_again(
    qstash: FakeQStash, post_callback: Post
) -> None:
    llm_request = publish(retries=0)
    post_callback(llm_request, answered(b"{}", status=500, dlq_id="1-1"))
    llm_request.refresh_from_db()
    assert llm_request.state == State.FAILED
    assert replay("--failed") == "Nothing to do.\n"
    assert replay(str(llm_request.uuid)) == "Nothing to do.\n"


@pytest.mark.django_db
def test_answer_that_was_cut_cannot_be_read_again(misread: LLMRequest) -> None:
    CallbackResponse.objects.update(is_body_cut=True)
    printed, _ = refused_replay("--failed")
    assert "MAX_STORED_BODY_BYTES" in printed


@pytest.mark.django_db
def test_only_the_named_requests_are_read(misread: LLMRequest) -> None:
    other = uuid4()
    printed, _ = refused_replay(str(other))
    assert f"{other} callbacks unreadable: none is stored" in printed
    misread.refresh_from_db()
    assert misread.state == State.FAILED
    assert replay(str(misread.uuid)).endswith("1 changed.\n")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "Say what to read again: --quarantined"),
        (["nonsense"], "'nonsense' is not the UUID of a request"),
        (["--code", "not_json"], "--code goes with --failed"),
        (["--dead-letters", "retry"], "give UUIDs of requests, or --failed"),
        (["--dead-letters", "drop", "--unread"], "--dead-letters goes with --failed or"),
        (["--dead-letters", "drop", "--completed"], "--dead-letters goes with --failed or"),
        (["--dead-letters", "retry", "--unpriced"], "--dead-letters goes with --failed or"),
    ],
)
def test_command_that_says_too_little_is_told_what_to_say(
    arguments: list[str], remedy: str
) -> None:
    _, why = refused_replay(*arguments)
    assert remedy in why


# --- answers that were misread or had no price -------------------------------------------------


@pytest.fixture
def set_prices(settings: Any) -> Callable[[Any], None]:
    def change(prices: Any) -> None:
        settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": prices}

    return change


@pytest.fixture
def unpriced(
    qstash: FakeQStash, post_callback: Post, set_prices: Callable[[Any], None]
) -> LLMRequest:
    """Completed at no known price, told, and priced since."""
    llm_request = publish(model="unheard-of")
    post_callback(llm_request, answered(UNHEARD_OF))
    announce()
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.cost) == (State.COMPLETED, None)
    set_prices({"openai/unheard-of": PRICES["openai/gpt-5.4-mini"]})
    return llm_request


UNHEARD_OF = json.dumps(ANSWER | {"model": "unheard-of"}).encode()


def priced() -> dict[str, Any]:
    """What a price makes of it: as of the moment it was answered, whenever it is read."""
    answered_at = LLMRequest.objects.latest("finished_at").finished_at
    assert answered_at is not None
    lines = [["input", 9, "1"], ["output", 3, "10"]]
    price = "PRICES openai/unheard-of"
    basis = {"price": price, "at": answered_at.isoformat(), "lines": lines}
    return {"cost": COST, "cost_source": "setting", "cost_basis": basis}


def changed_fields(before: dict[str, Any]) -> dict[str, Any]:
    after = LLMRequest.objects.values().get(pk=before["id"])
    return {name: value for name, value in after.items() if value != before[name]}


@pytest.mark.django_db
@pytest.mark.parametrize("how", ["--unpriced", "--completed", "UUID", "UUID --unpriced"])
def test_answer_without_a_price_is_priced_from_the_receipt_that_completed_it(
    unpriced: LLMRequest, qstash: FakeQStash, told: list[Any], how: str
) -> None:
    before, calls = LLMRequest.objects.values().get(), list(qstash.calls)
    arguments = how.replace("UUID", str(unpriced.uuid)).split()
    assert replay(*arguments) == (
        f"{unpriced.uuid} answer changed: cost unknown -> 0.000039, cost_source none -> setting, "
        "cost_basis rewritten\n1 changed.\n"
    )
    assert changed_fields(before) == priced()
    announce()
    assert (told, qstash.calls) == ([], calls)
    again = replay(*arguments)
    assert again == "Nothing to do.\n" if "--unpriced" in how else "1 unchanged.\n" in again


@pytest.mark.django_db
def test_dry_run_says_what_would_change_of_an_answer(unpriced: LLMRequest) -> None:
    before = LLMRequest.objects.values().get()
    assert "due: cost unknown -> 0.000039" in replay("--unpriced", "--dry-run")
    assert changed_fields(before) == {}


@pytest.mark.django_db
def test_misread_answer_is_written_anew_and_what_changes_is_printed(
    unpriced: LLMRequest, settings: Any
) -> None:
    """As if the code of that day had taken it for another."""
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"STORE_MESSAGES": "none"}
    right = LLMRequest.objects.values().get()
    LLMRequest.objects.update(
        completion="", finish_reason="length", input_tokens=1, usage={}, tool_calls=[{"id": "x"}]
    )
    printed = replay("--completed", "--json")
    [item] = json.loads(printed)["items"]
    assert item["outcome"] == "changed"
    assert set(item["detail"].split(", ")) == {
        "completion rewritten",
        "finish_reason length -> stop",
        "input_tokens 1 -> 9",
        "usage rewritten",
        "tool_calls rewritten",
        "cost unknown -> 0.000039",
        "cost_source none -> setting",
        "cost_basis rewritten",
    }
    assert changed_fields(right) == priced()


@pytest.mark.django_db
def test_known_cost_is_never_made_unknown_and_another_one_is_printed(
    unpriced: LLMRequest, set_prices: Callable[[Any], None]
) -> None:
    replay("--unpriced")
    set_prices({})
    assert "1 unchanged." in replay("--completed")
    set_prices({"openai/unheard-of": {"input": "2", "output": "20"}})
    assert "Nothing to do." in replay("--unpriced")
    assert "changed: cost 0.000039 -> 0.000078, cost_basis rewritten\n" in replay("--completed")


@pytest.mark.django_db
def test_only_the_answer_that_completed_a_request_rewrites_it(
    unpriced: LLMRequest, post_callback: Post
) -> None:
    other = UNHEARD_OF.replace(b"Forty-two", b"Forty-three").replace(b"9", b"7")
    post_callback(unpriced, answered(other, source_message_id="msg_0"))
    before = LLMRequest.objects.values().get()
    replay("--completed")
    assert changed_fields(before) == priced()
    first, second = CallbackResponse.objects.order_by("id")
    unpriced.refresh_from_db()
    assert first.anew(unpriced) == {}
    with pytest.raises(IllegalState, match="another answer"):
        second.anew(unpriced)


@pytest.mark.django_db
def test_answer_that_was_paid_for_and_came_to_nothing_is_priced_too(
    qstash: FakeQStash, post_callback: Post, set_prices: Callable[[Any], None]
) -> None:
    body = json.dumps({"model": "unheard-of", "choices": [], "usage": ANSWER["usage"]}).encode()
    failed, cancelled = publish(model="unheard-of"), publish(model="unheard-of")
    cancelled.cancel()
    post_callback(failed, answered(body))
    post_callback(cancelled, answered(UNHEARD_OF, source_message_id="msg_2"))
    set_prices({"openai/unheard-of": PRICES["openai/gpt-5.4-mini"]})
    assert replay("--unpriced").endswith("2 changed.\n")
    ends = LLMRequest.objects.order_by("id").values_list("state", "cost", "completion")
    assert list(ends) == [(State.FAILED, COST, ""), (State.CANCELLED, COST, "")]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ({"is_body_cut": True}, "MAX_STORED_BODY_BYTES"),
        ({"body": b"<html>"}, "not JSON"),
        ({"kind": Kind.FAILURE_CALLBACK}, "its answer is not stored"),
    ],
)
def test_answer_that_cannot_be_read_anew_leaves_all_as_it_was(
    unpriced: LLMRequest, kept: dict[str, Any], why: str
) -> None:
    before = LLMRequest.objects.values().get()
    CallbackResponse.objects.update(**kept)
    printed, _ = refused_replay("--completed")
    assert "unreadable" in printed
    assert why in printed
    assert changed_fields(before) == {}


@pytest.mark.django_db
def test_answer_that_was_forgotten_does_not_come_back(unpriced: LLMRequest) -> None:
    LLMRequest.objects.update(completion="", forgotten_at=timezone.now())
    assert read_anew(unpriced) == {
        "cost": (None, COST),
        "cost_source": ("", "setting"),
        "cost_basis": ({}, priced()["cost_basis"]),
    }
    assert LLMRequest.objects.get().completion == ""


@pytest.mark.django_db
def test_what_waits_has_no_answer_to_read_anew(qstash: FakeQStash) -> None:
    with pytest.raises(IllegalState, match="pending: it has no answer yet"):
        read_anew(publish())


# --- dead letters, with a QStash that only answers ---------------------------------------------


def dead_letter(**fields: Any) -> LLMRequest:
    return LLMRequest.objects.create(
        **{
            "state": State.FAILED,
            "provider": "openai",
            "model": "gpt-5.4-mini",
            "messages": MESSAGES,
            "timeout": 60,
            "attempts": 4,
            "last_status": 500,
            "error_code": "http_500",
            "error": "The server had an error (after 4 attempts)",
            "dead_letter_id": "1-1",
            "qstash_message_id": "msg_old",
            "submitted_at": timezone.now(),
            "finished_at": timezone.now(),
            "announced_at": timezone.now(),
            **fields,
        }
    )


def answering(status: int, **content: Any) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(status, json=content)


@pytest.mark.django_db
def test_retried_dead_letter_is_submitted_once_more_from_the_beginning(qstash: FakeQStash) -> None:
    row, now = dead_letter(inquiries=2), timezone.now()
    qstash.answer = answering(201, messageId="msg_new")
    row.retry_dead_letter(now=now)
    assert qstash.calls == ["POST /v2/dlq/retry/1-1"]
    stored = LLMRequest.objects.get()
    for each in (row, stored):
        assert (each.state, each.qstash_message_id, each.dead_letter_id) == (
            "submitted",
            "msg_new",
            "",
        )
        assert (each.attempts, each.last_status, each.error_code, each.error) == (0, None, "", "")
        assert (each.deadline_at, each.inquiries) == (row.next_deadline(now), 0)
        assert (each.submitted_at, each.finished_at, each.announced_at) == (now, None, None)


@pytest.mark.django_db
@pytest.mark.parametrize("state", [s for s in State if s != State.FAILED])
def test_only_what_failed_is_retried(qstash: FakeQStash, state: State) -> None:
    row = dead_letter(state=state)
    with pytest.raises(IllegalState, match=f"{row.uuid} is {state}"):
        row.retry_dead_letter()
    assert qstash.calls == []


@pytest.mark.django_db
def test_without_a_dead_letter_the_way_is_named(qstash: FakeQStash) -> None:
    with pytest.raises(IllegalState, match="no known dead letter: resubmit it instead"):
        dead_letter(dead_letter_id="").retry_dead_letter()
    assert qstash.calls == []


@pytest.mark.django_db
def test_what_is_being_asked_again_is_not_retried_and_the_other_way_round(
    qstash: FakeQStash,
) -> None:
    row = dead_letter()
    again = row.resubmit()
    with pytest.raises(IllegalState, match=str(again.uuid)):
        row.retry_dead_letter()
    LLMRequest.objects.filter(pk=again.pk).update(state=State.FAILED)
    qstash.answer = answering(201, messageId="msg_new")
    row.retry_dead_letter()
    with pytest.raises(IllegalState, match="an answer may still come"):
        row.resubmit()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("status", "error"), [(401, QStashError), (412, QStashError), (429, QStashError)]
)
def test_retry_that_qstash_refuses_leaves_all_as_it_was(
    qstash: FakeQStash, status: int, error: type[Exception]
) -> None:
    row = dead_letter()
    before = LLMRequest.objects.values().get()
    qstash.answer = answering(status, error="no")
    with pytest.raises(error):
        row.retry_dead_letter()
    assert LLMRequest.objects.values().get() == before
    assert row.state == State.FAILED


@pytest.mark.django_db
def test_retry_that_is_refused_inside_an_answer_leaves_all_as_it_was(qstash: FakeQStash) -> None:
    row = dead_letter()
    before = LLMRequest.objects.values().get()
    qstash.answer = answering(201, error="queue is full")
    with pytest.raises(IllegalState, match="queue is full"):
        row.retry_dead_letter()
    assert LLMRequest.objects.values().get() == before


@pytest.mark.django_db
def test_dead_letter_that_qstash_no_longer_has_is_not_offered_again(qstash: FakeQStash) -> None:
    row = dead_letter()
    with pytest.raises(NotFound):
        row.retry_dead_letter()
    stored = LLMRequest.objects.get()
    assert (stored.state, stored.dead_letter_id, stored.attempts) == ("failed", "", 4)
    with pytest.raises(IllegalState, match="resubmit it instead"):
        row.retry_dead_letter()


@pytest.mark.django_db
def test_retry_that_never_arrived_leaves_all_as_it_was(wire: Wire) -> None:
    row = dead_letter()
    before = LLMRequest.objects.values().get()
    wire.hosts["testserver"] = closed
    with pytest.raises(TransportError):
        row.retry_dead_letter()
    assert LLMRequest.objects.values().get() == before


def closed(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("closed", request=request)


@pytest.mark.django_db
@pytest.mark.parametrize("answer", ["lost", 500, "unreadable"])
def test_retry_in_doubt_stays_submitted_with_a_deadline_and_is_not_sent_again(
    qstash: FakeQStash, answer: Any
) -> None:
    def doubtful(request: httpx.Request) -> httpx.Response:
        if answer == "lost":
            raise httpx.ReadTimeout("nothing came", request=request)
        return httpx.Response(201 if answer == "unreadable" else answer, text="?")

    qstash.answer = doubtful
    row, now = dead_letter(), timezone.now()
    with pytest.raises(QStashError):
        row.retry_dead_letter(now=now)
    stored = LLMRequest.objects.get()
    assert (stored.state, stored.qstash_message_id, stored.attempts) == ("submitted", "", 0)
    assert stored.deadline_at == row.next_deadline(now)
    assert "Whether QStash retries its dead letter is not known" in stored.error
    assert list(LLMRequest.objects.overdue(stored.deadline_at)) == [stored]
    for verb in (stored.retry_dead_letter, stored.resubmit, stored.drop_dead_letter):
        with pytest.raises(IllegalState):
            verb()
    assert qstash.calls == ["POST /v2/dlq/retry/1-1"]


@pytest.mark.django_db
@override_settings(QSTASH_TOKEN="")
def test_retry_without_a_token_changes_nothing() -> None:
    row = dead_letter()
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        row.retry_dead_letter()
    assert LLMRequest.objects.get().state == State.FAILED


@pytest.mark.django_db
def test_retry_that_was_cancelled_on_its_way_is_cancelled_at_qstash_too(
    qstash: FakeQStash,
) -> None:
    row = dead_letter()

    def cancelling(request: httpx.Request) -> httpx.Response:
        if "/v2/dlq/retry/" not in request.url.path:
            return qstash.take(request, request.url.path.removeprefix("/qstash"))
        LLMRequest.objects.update(state=State.CANCELLED)
        return httpx.Response(201, json={"messageId": "msg_new"})

    qstash.answer = cancelling
    row.retry_dead_letter()
    assert qstash.cancelled == ["msg_new"]
    assert LLMRequest.objects.get().state == State.CANCELLED


@pytest.mark.django_db
@pytest.mark.parametrize("status", [200, 404])
def test_dropped_dead_letter_is_deleted_at_qstash_and_not_offered_again(
    qstash: FakeQStash, status: int
) -> None:
    row = dead_letter()
    qstash.answer = answering(status)
    row.drop_dead_letter()
    assert qstash.calls == ["DELETE /v2/dlq/1-1"]
    stored = LLMRequest.objects.get()
    assert (stored.state, stored.dead_letter_id, row.dead_letter_id) == ("failed", "", "")
    with pytest.raises(IllegalState, match="no known dead letter"):
        row.drop_dead_letter()


@pytest.mark.django_db
def test_dead_letter_is_kept_when_qstash_could_not_be_told(qstash: FakeQStash) -> None:
    row = dead_letter()
    qstash.answer = answering(503)
    with pytest.raises(QStashError):
        row.drop_dead_letter()
    assert LLMRequest.objects.get().dead_letter_id == "1-1"


@pytest.mark.django_db
def test_command_retries_the_failed_and_leaves_what_was_asked_again(qstash: FakeQStash) -> None:
    first, second = dead_letter(), dead_letter(dead_letter_id="1-2", error_code="no_response")
    asked_again = dead_letter(dead_letter_id="1-3")
    dead_letter(dead_letter_id="")
    asked_again.resubmit()
    qstash.answer = answering(201, messageId="msg_new")
    assert replay("--dead-letters", "retry", "--failed", "--dry-run").endswith("2 due.\n")
    assert qstash.calls == []
    assert replay("--dead-letters", "retry", "--failed", "--code", "http_500") == (
        f"{first.uuid} 1-1 retried\n1 retried.\n"
    )
    assert replay("--dead-letters", "retry", str(second.uuid)) == (
        f"{second.uuid} 1-2 retried\n1 retried.\n"
    )
    assert qstash.calls == ["POST /v2/dlq/retry/1-1", "POST /v2/dlq/retry/1-2"]


@pytest.mark.django_db
def test_command_drops_dead_letters_and_names_what_is_refused(qstash: FakeQStash) -> None:
    row, without, unknown = dead_letter(), dead_letter(dead_letter_id=""), uuid4()
    qstash.answer = answering(200)
    printed, why = refused_replay(
        "--dead-letters", "drop", str(row.uuid), str(without.uuid), str(unknown)
    )
    assert printed == (
        f"{row.uuid} 1-1 dropped\n"
        f"{without.uuid} - refused: {without.uuid} has no known dead letter.\n"
        f"{unknown} - refused: there is no such request\n"
        "1 dropped, 2 refused.\n"
    )
    assert why == "2 of 3 could not be done: see above."
    assert qstash.calls == ["DELETE /v2/dlq/1-1"]


@pytest.mark.django_db
@override_settings(QSTASH_TOKEN="")
def test_command_without_a_token_names_the_setting() -> None:
    dead_letter()
    _, why = refused_replay("--dead-letters", "retry", "--failed")
    assert "QSTASH_TOKEN" in why


# --- dead letters, through the whole trip ------------------------------------------------------


@pytest.fixture
def provider(wire: Wire) -> Iterator[Provider]:
    """The offline provider, answering on the wire under its public name."""
    provider = Provider(api_keys={KEY}, sleep=lambda seconds: None)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = provider.respond(
            request.method, request.url.raw_path.decode(), dict(request.headers), request.content
        )
        return httpx.Response(status, headers=headers, content=body)

    wire.hosts["provider.test"] = answer
    with override_settings(
        QSTASH_LLM={**django_settings.QSTASH_LLM, "DEFAULT_MODEL": MODEL, "RETRIES": 2}
    ):
        yield provider


def deliver_everything(times: int = 1) -> None:
    """What QStash does when the time of every retry, and of every limit, has come."""
    for _ in range(times):
        Message.objects.filter(due_at__gt=timezone.now()).update(due_at=timezone.now())
        for gate in Gate.objects.all():
            gate.reset(now=timezone.now())
        engine = Engine()
        engine.deliver_due()
        engine.close()


@pytest.fixture
def given_up(provider: Provider) -> LLMRequest:
    """Failed in three attempts, and a dead letter of our server."""
    provider.fail_next(3, status=500)
    llm_request = publish()
    deliver_everything(3)
    llm_request.refresh_from_db()
    assert (llm_request.state, llm_request.attempts) == ("failed", 3)
    assert DeadLetter.objects.get().dlq_id == llm_request.dead_letter_id
    return llm_request


@pytest.mark.django_db(transaction=True)
def test_dead_letter_of_a_provider_that_was_repaired_is_answered_with_one_more_call(
    provider: Provider, given_up: LLMRequest, told: list[Any]
) -> None:
    first_id = given_up.qstash_message_id
    given_up.retry_dead_letter()
    deliver_everything()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.attempts, given_up.last_status) == ("completed", 1, 200)
    assert given_up.completion
    assert (given_up.deadline_at, given_up.dead_letter_id) == (None, "")
    assert given_up.qstash_message_id != first_id
    assert [call.status for call in provider.journal] == [500, 500, 500, 200]
    assert told == [("completed", given_up.uuid)]
    assert not DeadLetter.objects.exists()
    receipts = given_up.callback_responses.order_by("id")
    assert receipts.filter(source_message_id=first_id).count() == 4
    assert receipts.last().source_message_id == given_up.qstash_message_id


@pytest.mark.django_db(transaction=True)
def test_dead_letter_may_be_retried_again_after_it_failed_again(
    provider: Provider, given_up: LLMRequest
) -> None:
    first = given_up.dead_letter_id
    provider.fail_next(3, status=503)
    given_up.retry_dead_letter()
    deliver_everything(3)
    given_up.refresh_from_db()
    assert (given_up.state, given_up.attempts, given_up.last_status) == ("failed", 3, 503)
    assert given_up.dead_letter_id not in {"", first}
    given_up.retry_dead_letter()
    deliver_everything()
    given_up.refresh_from_db()
    assert given_up.state == State.COMPLETED
    assert [call.status for call in provider.journal] == [500] * 3 + [503] * 3 + [200]


@pytest.mark.django_db(transaction=True)
def test_repeated_callbacks_of_the_first_message_do_not_disturb_the_second(
    provider: Provider, given_up: LLMRequest, post_callback: Post
) -> None:
    letter = DeadLetter.objects.get()
    late = [
        Callback(
            status=500,
            body=b"{}",
            source_message_id=given_up.qstash_message_id,
            retried=2,
            max_retries=2,
            dlq_id=dlq_id,
        )
        for dlq_id in ("", letter.dlq_id)
    ]
    provider.fail_next(1, status=429)
    given_up.retry_dead_letter()
    before = LLMRequest.objects.values().get()
    assert (before["state"], before["attempts"], before["last_status"]) == ("submitted", 1, 429)
    for callback in late:
        assert post_callback(given_up, callback).status_code == 200
    assert LLMRequest.objects.values().get() == before
    deliver_everything()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.attempts) == ("completed", 2)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_known", [True, False])
def test_callback_of_the_first_message_that_comes_late_does_not_disturb_the_second(
    provider: Provider, given_up: LLMRequest, post_callback: Post, is_known: bool
) -> None:
    first_id = given_up.qstash_message_id
    # The failure callback has overtaken the last two callbacks, which come after the retry.
    given_up.callback_responses.filter(kind=Kind.CALLBACK, retried__gt=0).delete()
    provider.fail_next(1, status=429)
    given_up.retry_dead_letter()
    if not is_known:  # the answer to the retry was lost, and nothing was heard of it yet
        LLMRequest.objects.update(qstash_message_id="", attempts=0, last_status=None)
    before = LLMRequest.objects.values().get()
    for retried in (1, 2):
        late = Callback(
            status=500,
            body=b"{}",
            source_message_id=first_id,
            retried=retried,
            max_retries=2,
        )
        assert post_callback(given_up, late).status_code == 200
    assert LLMRequest.objects.values().get() == before
    assert not CallbackResponse.objects.filter(applied_at=None).exists()
    deliver_everything()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.attempts) == ("completed", 2)


@pytest.mark.django_db(transaction=True)
def test_failure_of_the_first_message_that_is_read_again_does_not_disturb_the_second(
    provider: Provider, given_up: LLMRequest
) -> None:
    failure = given_up.callback_responses.get(kind=Kind.FAILURE_CALLBACK)
    provider.fail_next(1, status=429)
    given_up.retry_dead_letter()
    before = LLMRequest.objects.values().get()
    assert failure.apply_again(now=timezone.now()) is False
    assert LLMRequest.objects.values().get() == before


@pytest.mark.django_db(transaction=True)
@pytest.mark.django_db(transaction=True)
def test_two_retries_at_the_same_time_are_one(provider: Provider, given_up: LLMRequest) -> None:
    barrier = threading.Barrier(2)

    def retry(_: int) -> str:
        row = LLMRequest.objects.get(pk=given_up.pk)
        try:
            barrier.wait(timeout=20)
            row.retry_dead_letter()
        except IllegalState as error:
            return str(error)
        finally:
            connection.close()
        return ""

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(retry, range(2)))
    assert outcomes[0] == ""
    assert "only what failed is retried" in outcomes[1]
    deliver_everything()
    given_up.refresh_from_db()
    assert given_up.state == State.COMPLETED
    assert [call.status for call in provider.journal] == [500, 500, 500, 200]


@pytest.mark.django_db(transaction=True)
def test_retry_whose_acknowledgement_was_lost_is_answered_all_the_same(
    provider: Provider, given_up: LLMRequest, wire: Wire
) -> None:
    def lose_acknowledgement(request: httpx.Request) -> httpx.Response:
        response = wire.site.handle_request(request)
        if "/v2/dlq/retry/" in request.url.path:
            raise httpx.ReadTimeout("cut", request=request)
        return response

    wire.hosts["testserver"] = lose_acknowledgement
    with pytest.raises(TransportError):
        given_up.retry_dead_letter()
    deliver_everything()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.error) == ("completed", "")
    assert given_up.qstash_message_id == provider.journal[-1].message_id
    assert [call.status for call in provider.journal] == [500, 500, 500, 200]


@pytest.mark.django_db(transaction=True)
def test_retry_that_qstash_never_took_fails_at_its_deadline_and_can_be_retried_then(
    provider: Provider, given_up: LLMRequest, wire: Wire
) -> None:
    def lose_question(request: httpx.Request) -> httpx.Response:
        if "/v2/dlq/retry/" in request.url.path:
            raise httpx.ReadTimeout("cut", request=request)
        return wire.site.handle_request(request)

    wire.hosts["testserver"] = lose_question
    with pytest.raises(TransportError):
        given_up.retry_dead_letter()
    deadline = LLMRequest.objects.get().deadline_at
    assert Reconciler(clock=lambda: deadline).reconcile() == 1
    given_up.refresh_from_db()
    assert given_up.state == State.FAILED
    assert given_up.dead_letter_id == DeadLetter.objects.get().dlq_id
    assert len(provider.journal) == 3

    del wire.hosts["testserver"]
    given_up.retry_dead_letter()
    deliver_everything()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.dead_letter_id) == ("completed", "")
    assert [call.status for call in provider.journal] == [500, 500, 500, 200]


@pytest.mark.django_db(transaction=True)
def test_dropped_dead_letter_is_gone_from_the_server(
    provider: Provider, given_up: LLMRequest
) -> None:
    given_up.drop_dead_letter()
    assert not DeadLetter.objects.exists()
    given_up.refresh_from_db()
    assert (given_up.state, given_up.dead_letter_id) == ("failed", "")
    deliver_everything()
    assert len(provider.journal) == 3
