"""What goes by age, and what never does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from io import StringIO
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import ProtectedError
from django.db.models.signals import pre_delete
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm import triggers
from django_qstash_llm.exceptions import ConfigurationError
from django_qstash_llm.models import CallbackResponse, Conversation, LLMRequest, purge
from django_qstash_llm.models.forgetting import asked, digest_of
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.purge import Purge
from django_qstash_llm.qstash import Callback
from django_qstash_llm.server.delivery import Engine
from django_qstash_llm.server.models import DeadLetter, Message
from django_qstash_llm.server.retention import purge as purge_server
from testproject.provider import MODEL, Provider
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

Post = Callable[..., Any]
KEY = settings.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
CANARY = "canary-prompt-7b1f"
MESSAGES = [{"role": "user", "content": f"Hear the {CANARY} sing"}]
PARAMETERS = {"response_format": {"type": "json_schema", "name": CANARY}, "temperature": 0}
PRICES = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
LATER = timedelta(days=31)

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def prices() -> Iterator[None]:
    with configured(PRICES=PRICES):
        yield


def configured(**ours: Any) -> override_settings:
    return override_settings(QSTASH_LLM={**settings.QSTASH_LLM, **ours})


def ask(**given: Any) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish(MESSAGES, **PARAMETERS, **given)
    return row


def envelope(row: LLMRequest, **changed: Any) -> Callback:
    """A callback that repeats the prompt wherever a callback may."""
    answer = {**ANSWER, "choices": [{"message": {"role": "assistant", "content": CANARY}}]}
    fields: dict[str, Any] = {
        "status": 200,
        "header": {"X-Echo": [CANARY]},
        "body": json.dumps(answer).encode(),
        "source_body": row.body(),
        "source_message_id": f"msg_{row.pk}",
    }
    return Callback(**(fields | changed))


@pytest.fixture
def completed(qstash: FakeQStash, post_callback: Post) -> Callable[..., LLMRequest]:
    def complete(*, is_announced: bool = True, **given: Any) -> LLMRequest:
        row = ask(**given)
        assert post_callback(row, envelope(row)).status_code == 200
        if is_announced:
            triggers.announce("default")
        row.refresh_from_db()
        assert row.state == "completed"
        return row

    return complete


@pytest.fixture
def failed(qstash: FakeQStash, post_callback: Post) -> Callable[..., LLMRequest]:
    def fail(*, dead_letter: str = "", **given: Any) -> LLMRequest:
        row = ask(**given)
        body = json.dumps({"error": {"message": f"Unfit: {CANARY}"}}).encode()
        post_callback(row, envelope(row, status=400, body=body, dlq_id=dead_letter))
        triggers.announce("default")
        row.refresh_from_db()
        assert (row.state, row.dead_letter_id) == ("failed", dead_letter)
        return row

    return fail


def spellings(text: str) -> list[bytes]:
    """``text`` as it stands in bytes, and in Base64 at each of the three places it may begin."""
    encoded = [
        base64.b64encode(b"\0" * start + text.encode())[4 if start else 0 : -4]
        for start in range(3)
    ]
    return [text.encode(), *encoded]


def tables_with(text: str, *, prefix: str = "django_qstash_llm_") -> set[str]:
    """The tables in which any column of any row holds ``text``."""
    found = set()
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            if not table.startswith(prefix):
                continue
            cursor.execute(f"SELECT * FROM {connection.ops.quote_name(table)}")
            for row in cursor.fetchall():
                content = b"|".join(
                    bytes(x) if isinstance(x, memoryview | bytes) else str(x).encode() for x in row
                )
                if any(spelling in content for spelling in spellings(text)):
                    found.add(table)
    return found


REQUESTS, RECEIPTS = "django_qstash_llm_llmrequest", "django_qstash_llm_callbackresponse"


def purged(after: timedelta = LATER, **given: Any) -> Purge:
    return Purge(now=timezone.now() + after, **({"older_than": 30} | given)).run()


def snapshot() -> list[Any]:
    return [
        list(model.objects.order_by("pk").values())
        for model in (LLMRequest, CallbackResponse, Conversation)
    ]


# --- the texts go, the money stays ---


def test_after_the_purge_the_prompt_is_in_no_table_and_its_cost_is(
    completed: Callable[..., LLMRequest], failed: Callable[..., LLMRequest], post_callback: Post
) -> None:
    row, without = completed(labels=["kept"], metadata={"k": 1}), failed()
    garbage = json.dumps({"sourceBody": base64.b64encode(row.body()).decode()}).encode()
    assert post_callback(row, garbage).status_code == 489
    assert post_callback(LLMRequest(), envelope(row, source_message_id="msg_x")).status_code == 200
    LLMRequest.objects.filter(pk=row.pk).update(announce_error=CANARY)
    assert tables_with(CANARY) == {REQUESTS, RECEIPTS}

    done = purged()
    assert tables_with(CANARY) == set()
    assert (done.forgotten, done.emptied, done.discarded) == (2, 2, 2)
    after = LLMRequest.objects.get(pk=row.pk)
    gone = {
        "messages": [],
        "parameters": {},
        "completion": "",
        "refusal": "",
        "tool_calls": [],
        "error": "",
        "announce_error": "",
        "digest": "",
        "forgotten_at": done.now,
    }
    assert {name: getattr(after, name) for name in gone} == gone
    assert (after.cost, after.usage) == (Decimal("0.000015"), ANSWER["usage"])
    for field in LLMRequest._meta.concrete_fields:
        if field.name not in gone:
            assert getattr(after, field.attname) == getattr(row, field.attname), field.name
    assert LLMRequest.objects.get(pk=without.pk).error_code == without.error_code != ""


@pytest.mark.parametrize("how", ["hashed", "none"])
def test_messages_that_are_not_stored_are_in_no_table_once_the_request_is_finished(
    how: str, qstash: FakeQStash, post_callback: Post
) -> None:
    with configured(PRICES=PRICES, STORE_MESSAGES=how):
        row = ask()
        answer = json.dumps(ANSWER).encode()
        post_callback(row, envelope(row, body=answer, header={}))
        LLMRequest.objects.filter(pk=ask().pk).update(state="cancelled", finished_at=timezone.now())
        unfinished = ask()
        purged(timedelta(), older_than=None)
        assert tables_with(CANARY) == {REQUESTS}  # the one that still has to be sent
        unfinished.cancel()
        purged(timedelta(), older_than=None)
    assert tables_with(CANARY) == set()
    row.refresh_from_db()
    assert (row.completion, row.cost, row.usage) == (
        "Forty-two.",
        Decimal("0.000015"),
        ANSWER["usage"],
    )
    assert row.forgotten_at is not None
    found = asked(LLMRequest.objects.all(), MESSAGES).count()
    assert found == (3 if how == "hashed" else 0)


def test_a_purge_keeps_the_digest_where_messages_are_hashed(
    completed: Callable[..., LLMRequest],
) -> None:
    conversation = Conversation.objects.create()
    rows = [completed(), completed(conversation=conversation)]
    with configured(STORE_MESSAGES="hashed"):
        assert purged().forgotten == 2
    digests = LLMRequest.objects.filter(pk__in=[row.pk for row in rows]).values_list("digest")
    assert set(digests) == {(digest_of(MESSAGES),)}
    assert tables_with(CANARY) == set()


def test_nothing_goes_by_age_unless_a_setting_or_an_option_says_so(
    completed: Callable[..., LLMRequest],
) -> None:
    completed()
    before = snapshot()
    purged(timedelta(days=10_000), older_than=None)
    assert snapshot() == before
    with configured(RETENTION_DAYS=30):
        purged(timedelta(days=29), older_than=None)
        assert snapshot() == before
        assert purged(older_than=None).forgotten == 1


def test_a_second_purge_finds_nothing(
    completed: Callable[..., LLMRequest], failed: Callable[..., LLMRequest]
) -> None:
    completed()
    failed()
    purged()
    before = snapshot()
    again = purged(LATER + timedelta(days=1))
    assert (again.forgotten, again.emptied, again.discarded, again.withheld) == (0, 0, 0, 0)
    assert snapshot() == before


def test_a_callback_that_comes_after_the_purge_is_known_and_changes_nothing(
    completed: Callable[..., LLMRequest], post_callback: Post
) -> None:
    row = completed()
    callback = envelope(row)
    purged()
    before = snapshot()[0]
    assert post_callback(row, callback).status_code == 200
    assert snapshot()[0] == before
    assert CallbackResponse.objects.get().seen_count == 2
    assert tables_with(CANARY) == set()


def test_a_receipt_that_comes_after_the_purge_goes_with_the_next(
    completed: Callable[..., LLMRequest], post_callback: Post
) -> None:
    row = completed()
    other = envelope(row, source_message_id="msg_other")
    purged()
    post_callback(row, other)
    assert tables_with(CANARY) == {RECEIPTS}
    assert purged().emptied == 1
    assert tables_with(CANARY) == set()


def test_an_answer_that_comes_after_its_failure_was_purged_is_kept_and_then_purged(
    failed: Callable[..., LLMRequest], post_callback: Post
) -> None:
    row = failed()
    answer = envelope(row, source_message_id="msg_other", retried=1)
    purged()
    post_callback(row, answer)
    row.refresh_from_db()
    assert (row.state, row.completion, row.messages) == ("completed", CANARY, [])
    triggers.announce("default")
    assert purged().forgotten == 1
    assert tables_with(CANARY) == set()


def test_an_emptied_receipt_is_not_read_again(completed: Callable[..., LLMRequest]) -> None:
    completed()
    purged()
    receipt = CallbackResponse.objects.get()
    assert (bytes(receipt.body), receipt.header, receipt.is_body_cut) == (b"", {}, True)


# --- what stays ---


@pytest.mark.parametrize("state", ["pending", "submitted"])
def test_what_is_unfinished_keeps_everything(state: str, qstash: FakeQStash) -> None:
    row = ask()
    CallbackResponse.objects.create(
        uuid=row.uuid, llm_request=row, kind="callback", source_message_id="m", body=b"x"
    )
    CallbackResponse.objects.create(
        uuid=row.uuid, llm_request=row, kind="quarantined", source_message_id="q", body=b"x"
    )
    LLMRequest.objects.filter(pk=row.pk).update(state=state)
    before = snapshot()
    with configured(STORE_MESSAGES="none"):
        done = purged(timedelta(days=3650), older_than=0, deletes=True)
    assert snapshot() == before
    assert sum(vars(done)[name] for name in ("forgotten", "emptied", "discarded", "deleted")) == 0


def test_what_has_not_been_announced_is_kept_and_counted(
    completed: Callable[..., LLMRequest],
) -> None:
    completed(is_announced=False)
    before = snapshot()
    done = purged(deletes=True)
    assert snapshot() == before
    assert done.unannounced() == 1
    triggers.announce("default")
    assert purged().forgotten == 1


def test_a_cancelled_request_is_told_to_nobody_and_goes(qstash: FakeQStash) -> None:
    ask().cancel()
    assert purged().forgotten == 1
    assert tables_with(CANARY) == set()


def test_a_younger_request_stays(completed: Callable[..., LLMRequest]) -> None:
    old, young = completed(), completed()
    earlier = timezone.now() - LATER
    LLMRequest.objects.filter(pk=old.pk).update(finished_at=earlier)
    assert purged(timedelta()).forgotten == 1
    assert LLMRequest.objects.get(pk=young.pk).messages == MESSAGES
    assert LLMRequest.objects.get(pk=old.pk).messages == []


def test_a_receipt_that_is_still_to_be_read_stays_until_it_is_given_up(
    failed: Callable[..., LLMRequest],
) -> None:
    failed()
    rows = CallbackResponse.objects.all()
    rows.update(applied_at=None, apply_tries=1)
    assert purged().emptied == 0
    rows.update(apply_tries=purge.MOST_APPLY_TRIES)
    assert purged().emptied == 1


def test_a_conversation_that_goes_on_keeps_all_it_said(
    completed: Callable[..., LLMRequest],
) -> None:
    conversation = Conversation.objects.create()
    rows = [completed(conversation=conversation) for _ in range(2)]
    earlier = timezone.now() - LATER
    LLMRequest.objects.filter(pk=rows[0].pk).update(finished_at=earlier)
    history = conversation.history()
    with configured(STORE_MESSAGES="none"):
        assert purged(timedelta()).forgotten == 0
    assert conversation.history() == history != []

    assert purged().forgotten == 2
    assert conversation.history() == []
    assert Conversation.objects.filter(pk=conversation.pk).exists()


def test_what_was_said_goes_with_its_conversation_where_messages_are_not_stored(
    completed: Callable[..., LLMRequest],
) -> None:
    conversation = Conversation.objects.create()
    row = completed(conversation=conversation)
    LLMRequest.objects.update(messages=MESSAGES, forgotten_at=None)
    conversation.delete()
    with configured(STORE_MESSAGES="none"):
        assert purged(timedelta(), older_than=None).withheld == 1
    row.refresh_from_db()
    assert (row.messages, row.completion) == ([], CANARY)


# --- what nobody can use ---


def unusable(received_at: datetime) -> None:
    for kind in ("callback", "quarantined", "ping"):
        CallbackResponse.objects.create(
            uuid="00000000-0000-0000-0000-000000000000",
            kind=kind,
            source_message_id=f"{kind} {received_at}",
            received_at=received_at,
        )


def test_callbacks_of_no_request_go_after_their_own_time() -> None:
    now = timezone.now()
    unusable(now - timedelta(days=31))
    unusable(now - timedelta(days=29))
    assert Purge(now=now).run().discarded == 3
    assert Purge(now=now).run().discarded == 0
    with configured(ORPHAN_RETENTION_DAYS=28):
        assert Purge(now=now).run().discarded == 3
    assert not CallbackResponse.objects.exists()


def test_what_cannot_be_read_is_never_kept_longer_than_what_can() -> None:
    now = timezone.now()
    unusable(now - timedelta(days=8))
    assert Purge(now=now, older_than=7).run().discarded == 3


# --- in pieces ---


def test_every_piece_of_the_table_is_purged(
    completed: Callable[..., LLMRequest], django_assert_max_num_queries: Any
) -> None:
    def add(count: int) -> None:
        now = timezone.now()
        LLMRequest.objects.bulk_create(
            LLMRequest(messages=MESSAGES, state="completed", finished_at=now, announced_at=now)
            for _ in range(count)
        )

    add(purge.SPAN)
    middle = LLMRequest.objects.order_by("pk")[300].pk
    LLMRequest.objects.filter(pk__gt=middle, pk__lte=middle + 300).delete()
    add(2 * purge.SPAN)
    pieces: list[int] = []
    with django_assert_max_num_queries(30):
        done = purged(on_progress=lambda so_far: pieces.append(so_far.forgotten))
    assert done.forgotten == LLMRequest.objects.count() == 3 * purge.SPAN - 300
    assert pieces == [1000, 2000, 2700]
    assert tables_with(CANARY) == set()


def test_digests_of_more_than_a_handful_are_written(qstash: FakeQStash) -> None:
    rows = [
        LLMRequest(messages=[{"role": "user", "content": str(n)}], state="cancelled")
        for n in range(2 * purge.DIGESTS_AT_ONCE + 1)
    ]
    LLMRequest.objects.bulk_create(rows)
    with configured(STORE_MESSAGES="hashed"):
        assert purged(older_than=None).withheld == len(rows)
    for row in rows:
        assert list(asked(LLMRequest.objects.all(), row.messages)) == [row]


def test_a_purge_that_was_cut_short_is_taken_up_again(
    completed: Callable[..., LLMRequest],
) -> None:
    completed()
    purge = Purge(now=timezone.now() + LATER, older_than=30)
    purge.forget_texts(purge.before or purge.now)
    assert tables_with(CANARY) == {RECEIPTS}
    done = purged()
    assert (done.forgotten, done.emptied) == (0, 1)
    assert tables_with(CANARY) == set()


# --- deleting ---


def test_delete_takes_old_rows_with_their_receipts_and_leaves_the_rest(
    completed: Callable[..., LLMRequest], failed: Callable[..., LLMRequest]
) -> None:
    old, again = failed(), completed()
    LLMRequest.objects.filter(pk=again.pk).update(
        resubmission_of=old.pk, finished_at=timezone.now() + LATER
    )
    assert purged(deletes=True).deleted == 1
    assert list(LLMRequest.objects.all()) == [again]
    again.refresh_from_db()
    assert again.resubmission_of is None
    assert CallbackResponse.objects.get().llm_request == again


def test_what_is_being_asked_again_is_not_deleted(failed: Callable[..., LLMRequest]) -> None:
    old = failed()
    again = old.resubmit()
    assert purged(deletes=True).deleted == 0
    again.cancel()
    assert purged(deletes=True).deleted == 2


def test_what_the_site_protects_loses_its_texts_and_stays(
    completed: Callable[..., LLMRequest],
) -> None:
    kept, _deleted = completed(), completed()

    def protect(instance: LLMRequest, **kwargs: Any) -> None:
        if instance.pk == kept.pk:
            raise ProtectedError("Cited by an invoice.", {instance})

    pre_delete.connect(protect, sender=LLMRequest)
    try:
        done = purged(deletes=True)
    finally:
        pre_delete.disconnect(protect, sender=LLMRequest)
    assert (done.deleted, done.protected) == (1, 1)
    assert list(LLMRequest.objects.all()) == [kept]
    assert tables_with(CANARY) == set()


# --- QStash's dead letters ---


def deleted_at(wire: Wire) -> list[list[str]]:
    calls = [r for r in wire.to("testserver") if r.url.path.endswith("/v2/dlq")]
    assert {call.method for call in calls} <= {"DELETE"}
    return [json.loads(call.content)["dlqIds"] for call in calls]


def deleting(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"deleted": len(json.loads(request.content)["dlqIds"])})


def test_dead_letters_are_deleted_in_groups_and_once(
    failed: Callable[..., LLMRequest], qstash: FakeQStash, wire: Wire
) -> None:
    for number in range(3):
        failed(dead_letter=f"{number}-0")
    LLMRequest.objects.filter(dead_letter_id="2-0").update(dead_letter_id="2-1")
    qstash.answer = deleting
    assert purged().dead_letters == 3
    # Both of the one that had been retried.
    assert deleted_at(wire) == [["0-0", "1-0", "2-0", "2-1"]]
    assert not LLMRequest.objects.exclude(dead_letter_id="").exists()
    assert purged().dead_letters == 0
    assert len(deleted_at(wire)) == 1


def test_no_group_is_larger_than_what_qstash_takes(qstash: FakeQStash, wire: Wire) -> None:
    now = timezone.now()
    LLMRequest.objects.bulk_create(
        LLMRequest(state="failed", finished_at=now, announced_at=now, dead_letter_id=f"{n}-0")
        for n in range(230)
    )
    qstash.answer = deleting
    assert purged().dead_letters == 230
    assert [len(ids) for ids in deleted_at(wire)] == [100, 100, 30]


@pytest.mark.parametrize("how", ["full", "none"])
def test_dead_letters_go_earlier_where_messages_are_not_stored(
    how: str, failed: Callable[..., LLMRequest], qstash: FakeQStash, wire: Wire
) -> None:
    failed(dead_letter="1-0")
    qstash.answer = deleting
    with configured(STORE_MESSAGES=how):
        done = purged(older_than=None)
    assert done.dead_letters == (how == "none")
    assert len(deleted_at(wire)) == (how == "none")


def test_a_qstash_that_cannot_be_told_keeps_nothing_else_back(
    failed: Callable[..., LLMRequest], qstash: FakeQStash
) -> None:
    row = failed(dead_letter="1-0")
    qstash.answer = lambda request: httpx.Response(
        401, json={"error": f"no such token: {settings.QSTASH_TOKEN}"}
    )
    done = purged(deletes=True)
    assert (done.forgotten, done.dead_letters, done.deleted) == (1, 0, 0)
    assert "no such token" in done.problem
    assert settings.QSTASH_TOKEN not in done.problem
    row.refresh_from_db()
    assert row.dead_letter_id == "1-0"
    qstash.answer = deleting
    done = purged(deletes=True)
    assert (done.dead_letters, done.deleted, done.problem) == (1, 1, "")


@override_settings(QSTASH_TOKEN="")
def test_without_a_token_the_texts_go_all_the_same(qstash: FakeQStash) -> None:
    now = timezone.now()
    LLMRequest.objects.create(
        state="failed", finished_at=now, announced_at=now, dead_letter_id="1-0", error=CANARY
    )
    done = purged()
    assert done.forgotten == 1
    assert "QSTASH_TOKEN" in done.problem


@pytest.mark.django_db(transaction=True)
def test_the_prompt_leaves_the_dead_letters_of_a_real_server(wire: Wire) -> None:
    provider = Provider(api_keys={KEY}, sleep=lambda seconds: None)
    provider.fail_next(1, status=500)

    def answer(request: httpx.Request) -> httpx.Response:
        status, headers, body = provider.respond(
            request.method, request.url.raw_path.decode(), dict(request.headers), request.content
        )
        return httpx.Response(status, headers=headers, content=body)

    wire.hosts["provider.test"] = answer
    row = LLMRequest.objects.publish(MESSAGES, model=MODEL, retries=0)
    Outbox().submit()
    Message.objects.filter(due_at__gt=timezone.now()).update(due_at=timezone.now())
    engine = Engine()
    engine.deliver_due()
    engine.close()
    triggers.announce("default")
    row.refresh_from_db()
    assert (row.state, bool(row.dead_letter_id)) == ("failed", True)
    assert DeadLetter.objects.count() == 1
    assert tables_with(CANARY, prefix="") >= {REQUESTS}

    done = purged()
    assert (done.dead_letters, done.problem) == (1, "")
    assert not DeadLetter.objects.exists()
    # The server forgets what it has delivered by a clock of its own.
    purge_server(timezone.now() + timedelta(days=365))
    assert tables_with(CANARY, prefix="") == set()
    row.refresh_from_db()
    assert (row.state, row.dead_letter_id) == ("failed", "")


# --- the command ---


def llm_purge(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_purge", *arguments, stdout=out, stderr=out)
    return out.getvalue()


def test_a_dry_run_says_what_would_go_and_changes_nothing(
    completed: Callable[..., LLMRequest],
    failed: Callable[..., LLMRequest],
    qstash: FakeQStash,
) -> None:
    completed()
    completed(is_announced=False)
    failed(dead_letter="1-0")
    LLMRequest.objects.filter(pk=ask().pk).update(state="cancelled")
    unusable(timezone.now())
    before, calls = snapshot(), list(qstash.calls)
    with configured(STORE_MESSAGES="none"):
        said = llm_purge("--older-than", "0", "--dry-run", "--delete")
    assert snapshot() == before
    assert qstash.calls == calls
    qstash.answer = deleting
    with configured(STORE_MESSAGES="none"):
        did = llm_purge("--older-than", "0", "--delete")
    assert said == f"Would go: {did}"
    assert "3 requests deleted" in did
    assert snapshot() != before


def test_the_command_says_what_went_and_what_stayed(
    completed: Callable[..., LLMRequest],
) -> None:
    completed()
    completed(is_announced=False)
    assert llm_purge("--older-than", "0", "--database", "default") == (
        "1 requests forgotten; 1 receipts emptied; 0 unusable callbacks deleted.\n"
        "1 requests are old enough and stay until they have been announced: "
        "run llm_sweep, or see their announce errors.\n"
    )


def test_the_command_reports_dead_letters_that_are_still_there(
    failed: Callable[..., LLMRequest], qstash: FakeQStash
) -> None:
    failed(dead_letter="1-0")
    said = llm_purge("--older-than", "0")
    assert said.startswith("1 requests forgotten")
    assert "QStash's dead letters could not all be deleted, the next purge tries again" in said


@pytest.mark.parametrize(
    ("arguments", "ours", "named"),
    [
        (["--delete"], {}, "--older-than"),
        (["--older-than", "-1"], {}, "--older-than is -1"),
        (["--older-than", "99999999999"], {}, "--older-than is 99999999999"),
        ([], {"RETENTION_DAYS": "30"}, "RETENTION_DAYS.* is '30'"),
        ([], {"RETENTION_DAYS": True}, "RETENTION_DAYS.* is True"),
        ([], {"ORPHAN_RETENTION_DAYS": None}, "ORPHAN_RETENTION_DAYS.* is None"),
        ([], {"STORE_MESSAGES": "some"}, "STORE_MESSAGES.* is 'some'"),
    ],
)
def test_what_cannot_be_followed_is_named_and_nothing_goes(
    arguments: list[str], ours: dict[str, Any], named: str, completed: Callable[..., LLMRequest]
) -> None:
    completed()
    before = snapshot()
    with configured(**ours):
        with pytest.raises(CommandError, match=named):
            llm_purge(*arguments)
        if not arguments:
            with pytest.raises(ConfigurationError, match=named):
                Purge().run()
    assert snapshot() == before


def test_a_long_run_shows_how_far_it_is(qstash: FakeQStash) -> None:
    now = timezone.now()
    LLMRequest.objects.bulk_create(
        (LLMRequest(state="cancelled", finished_at=now, error="e") for _ in range(10_500)),
        batch_size=500,
    )
    said = llm_purge("--older-than", "0")
    assert said.startswith("… 10000 requests forgotten, ")
    assert said.count("…") == 1
    LLMRequest.objects.update(error="e")
    assert "…" not in llm_purge("--older-than", "0", "--verbosity", "0")
