from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.db.models.signals import post_save
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_qstash_llm import triggers
from django_qstash_llm.exceptions import ConfigurationError, InvalidRequest
from django_qstash_llm.health import Health
from django_qstash_llm.models import LLMRequest
from django_qstash_llm.qstash import Callback
from django_qstash_llm.signals import request_completed, request_failed
from django_qstash_llm.triggers import Trigger, register
from testproject.articles.models import Article

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

Watch = Callable[[type[Trigger]], Trigger]
QUESTION = [{"role": "user", "content": "How many roads?"}]
SUMMARISE = "testproject.articles.llm.Summarise"


@pytest.fixture(autouse=True)
def _no_network(qstash: FakeQStash) -> None:
    """Every save here may ask."""


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Registers a trigger on ``Group`` for the length of a test."""
    names: list[str] = []

    def register_for_now(trigger_class: type[Trigger]) -> Trigger:
        register(Group)(trigger_class)
        name = f"{trigger_class.__module__}.{trigger_class.__qualname__}"
        names.append(name)
        return next(each for each in triggers.registered() if each.name == name)

    yield register_for_now
    for name in names:
        post_save.disconnect(sender=Group, dispatch_uid=name)
        triggers._registry.pop(name, None)


class Rename(Trigger):
    """Always asks, and writes the answer into the name."""

    answer_field = "name"

    def messages(self, instance: Group) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"A better name for {instance.name}?"}]


def done(text: str = "Forty-two.", message_id: str = "msg_1") -> Callback:
    answer = ANSWER | {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return Callback(status=200, body=json.dumps(answer).encode(), source_message_id=message_id)


def gave_up(message_id: str = "msg_1") -> Callback:
    body = b'{"error": {"message": "no such model", "code": "model_not_found"}}'
    return Callback(status=404, body=body, source_message_id=message_id, dlq_id="dlq_1")


def name_of_effects() -> list[str]:
    return list(Group.objects.order_by("id").values_list("name", flat=True))


def at(seconds: float, since: datetime) -> Callable[[], datetime]:
    return lambda: since + timedelta(seconds=seconds)


def meanwhile(work: Callable[[], Any]) -> Any:
    """What ``work`` answers over another connection, while the transaction here stands open."""

    def run() -> Any:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET lock_timeout = '5s'")
            return work()
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.fixture
def listen() -> Iterator[Callable[[Signal, Callable[..., None]], None]]:
    connected = []

    def to(signal: Signal, hear: Callable[..., None]) -> None:
        signal.connect(hear, weak=False)
        connected.append((signal, hear))

    yield to
    for signal, hear in connected:
        signal.disconnect(hear)


def make_due(llm_request: LLMRequest) -> None:
    """As if the pause after a failed announcement were over."""
    earlier = timezone.now() - timedelta(seconds=1)
    LLMRequest.objects.filter(pk=llm_request.pk).update(announce_after=earlier)


# --- asking ---


def test_saving_asks_about_the_instance() -> None:
    article = Article.objects.create(title="Lamp", body="It was dark.")
    row = LLMRequest.objects.get()
    assert (row.trigger, row.about, row.state) == (SUMMARISE, article, "pending")
    assert row.messages[-1] == {"role": "user", "content": "It was dark."}
    assert (row.provider, row.model) == ("openai", "gpt-5.4-mini")


def test_condition_that_is_false_asks_nothing() -> None:
    Article.objects.create(title="Lamp", body="It was dark.", summary="Dark.")
    assert LLMRequest.objects.count() == 0


def test_condition_is_told_whether_the_instance_is_new(watch: Watch) -> None:
    told = []

    class Curious(Rename):
        def condition(self, instance: Group, *, created: bool) -> bool:
            told.append(created)
            return False

    watch(Curious)
    group = Group.objects.create(name="a")
    group.save()
    assert told == [True, False]


def test_backfill_is_estimated_without_asking(watch: Watch, settings: Any) -> None:
    prices = {"openai/gpt-5.4-mini": {"input": "1", "output": "2"}}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PRICES": prices}

    class Backfill(Rename):
        def condition(self, instance: Group, *, created: bool) -> bool:
            return not created and instance.name != "good"

        def options(self, instance: Group) -> dict[str, Any]:
            return {"max_completion_tokens": 1000}

    with pytest.raises(ConfigurationError, match="Backfill is not registered"):
        Backfill.estimate(Group.objects.all())
    watch(Backfill)
    Group.objects.bulk_create(Group(name=name) for name in ("good", "bad", "worse"))
    estimate = Backfill.estimate(Group.objects.all())
    assert (estimate.requests, estimate.most_output_tokens, estimate.unpriced) == (2, 2000, 0)
    assert estimate.most == (estimate.most_input_tokens + 4000) / Decimal(1_000_000)
    assert not LLMRequest.objects.exists()


def test_fixtures_ask_nothing() -> None:
    call_command("loaddata", "articles", verbosity=0)
    assert Article.objects.count() > 20
    assert LLMRequest.objects.count() == 0


def test_options_of_the_trigger_reach_the_request(watch: Watch) -> None:
    class Particular(Rename):
        model = "claude-5-haiku"
        provider = "anthropic"
        queue = "names"

        def options(self, instance: Group) -> dict[str, Any]:
            return {"retries": 1, "labels": ["naming"], "temperature": 0.2, "tenant": instance.name}

    watch(Particular)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    assert (row.model, row.provider, row.queue, row.via) == (
        "claude-5-haiku",
        "anthropic",
        "names",
        "enqueue",
    )
    assert (row.retries, row.labels, row.tenant) == (1, ["naming"], "a")
    assert row.parameters == {"temperature": 0.2}


def test_trigger_without_messages_says_so(watch: Watch) -> None:
    class Mute(Trigger):
        pass

    watch(Mute)
    with pytest.raises(NotImplementedError, match="Mute has to say which messages"):
        Group.objects.create(name="a")


def test_field_the_model_has_not_is_refused_at_registration() -> None:
    class Lost(Trigger):
        answer_field = "sumary"

    with pytest.raises(ConfigurationError, match=r"Lost\.answer_field: Article has no .*'sumary'"):
        register(Article)(Lost)
    assert "Lost" not in {trigger.name.split(".")[-1] for trigger in triggers.registered()}


def test_question_that_cannot_be_asked_names_the_field(watch: Watch) -> None:
    class Empty(Rename):
        def messages(self, instance: Group) -> list[dict[str, str]]:
            return []

    watch(Empty)
    with pytest.raises(InvalidRequest, match="messages"):
        Group.objects.create(name="a")
    assert LLMRequest.objects.count() == 0


def test_same_question_unfinished_is_not_asked_twice(watch: Watch) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    group.save()
    group.save()
    assert LLMRequest.objects.count() == 1


def test_same_question_is_known_again_after_cleaning(watch: Watch) -> None:
    class Odd(Rename):
        def messages(self, instance: Group) -> Any:
            return ({"role": "user", "content": "a\x00b", "parts": (1, 2)},)

    watch(Odd)
    group = Group.objects.create(name="a")
    group.save()
    assert LLMRequest.objects.count() == 1


def test_same_question_is_asked_again_once_it_is_answered(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done())
    group.save()
    assert LLMRequest.objects.count() == 2


def test_older_pending_question_is_cancelled_by_a_newer(watch: Watch) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    group.name = "b"
    group.save()
    assert list(LLMRequest.objects.order_by("id").values_list("state", flat=True)) == [
        "cancelled",
        "pending",
    ]


@pytest.mark.parametrize(
    ("stored", "messages", "has_digest"),
    [("full", 1, False), ("hashed", 0, True), ("none", 0, False)],
)
def test_of_an_overtaken_question_is_kept_what_the_site_keeps(
    watch: Watch, settings: Any, stored: str, messages: int, has_digest: bool
) -> None:
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "STORE_MESSAGES": stored}
    watch(Rename)
    group = Group.objects.create(name="a")
    group.name = "b"
    group.save()
    older, newer = LLMRequest.objects.order_by("id")
    assert (older.state, len(older.messages), older.digest != "") == (
        "cancelled",
        messages,
        has_digest,
    )
    assert (newer.state, len(newer.messages)) == ("pending", 1)


def test_other_instances_and_other_triggers_are_left_alone(watch: Watch) -> None:
    class Other(Rename):
        pass

    watch(Rename)
    watch(Other)
    Group.objects.create(name="a")
    Group.objects.create(name="b")
    assert LLMRequest.objects.pending().count() == 4


@pytest.mark.django_db(transaction=True)
def test_committed_save_is_submitted_and_rolled_back_one_is_not(qstash: FakeQStash) -> None:
    with transaction.atomic():
        Article.objects.create(title="Kept", body="One.")
        assert qstash.calls == []  # never HTTP inside a transaction
    assert len(qstash.messages) == 1

    with transaction.atomic():
        Article.objects.create(title="Gone", body="Two.")
        transaction.set_rollback(True)
    assert len(qstash.messages) == 1
    assert LLMRequest.objects.count() == 1


# --- the answer ---


@pytest.mark.django_db(transaction=True)
def test_answer_is_written_back_and_does_not_ask_again(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done("The Committee"))
    group.refresh_from_db()
    assert group.name == "The Committee"
    assert LLMRequest.objects.count() == 1
    assert LLMRequest.objects.get().announced_at is not None


@pytest.mark.django_db(transaction=True)
def test_completed_that_saves_everything_does_not_ask_again(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    class Thorough(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            instance.name = llm_request.completion
            instance.save()
            Group.objects.get(pk=instance.pk).save()

    watch(Thorough)
    group = Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done("The Committee"))
    group.refresh_from_db()
    assert group.name == "The Committee"
    assert LLMRequest.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_saving_after_the_write_back_asks_again(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done("The Committee"))
    group.refresh_from_db()
    group.save()
    assert LLMRequest.objects.count() == 2


def test_answer_to_an_overtaken_question_is_not_written(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    first = LLMRequest.objects.get()
    LLMRequest.objects.update(state="submitted")
    group.name = "b"
    group.save()
    second = LLMRequest.objects.exclude(pk=first.pk).get()
    post_callback(first, done("Old", "msg_1"))
    triggers.announce("default")
    group.refresh_from_db()
    assert group.name == "b"
    post_callback(second, done("New", "msg_2"))
    triggers.announce("default")
    group.refresh_from_db()
    assert group.name == "New"


def test_answer_is_written_when_the_newer_question_was_cancelled(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    first = LLMRequest.objects.get()
    LLMRequest.objects.update(state="submitted")
    group.name = "b"
    group.save()
    LLMRequest.objects.exclude(pk=first.pk).get().cancel()
    post_callback(first, done("Still good"))
    triggers.announce("default")
    group.refresh_from_db()
    assert group.name == "Still good"


def test_failure_is_told_with_its_reason(watch: Watch, post_callback: Callable[..., Any]) -> None:
    told = []

    class Careful(Rename):
        def failed(self, instance: Group, llm_request: LLMRequest) -> None:
            told.append((instance.name, llm_request.error_code))

    watch(Careful)
    Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), gave_up())
    assert triggers.announce("default") == 1
    assert told == [("a", "model_not_found")]


def test_cancelled_request_is_not_told(watch: Watch) -> None:
    watch(Rename)
    Group.objects.create(name="a")
    LLMRequest.objects.get().cancel()
    assert triggers.announce("default") == 0


def test_deleted_instance_is_nobodys_trouble(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    group.delete()
    post_callback(row, done())
    triggers.announce("default")
    row.refresh_from_db()
    assert (row.state, row.announce_error) == ("completed", "")
    assert row.announced_at is not None


def test_answer_for_a_trigger_that_this_worker_does_not_know_is_told_by_one_that_does(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    trigger = watch(Rename)
    group = Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    post_callback(row, done())
    del triggers._registry[trigger.name]
    assert triggers.announce("default") == 1
    row.refresh_from_db()
    assert (row.announced_at, row.announce_tries) == (None, 1)
    assert f"No trigger '{trigger.name}' is registered in this worker" in row.announce_error
    watch(Rename)
    make_due(row)
    assert triggers.announce("default") == 1
    group.refresh_from_db()
    row.refresh_from_db()
    assert (group.name, row.announce_error) == ("Forty-two.", "")


def test_trigger_that_is_gone_from_the_code_is_given_up_and_seen(
    post_callback: Callable[..., Any],
) -> None:
    row = LLMRequest.objects.publish(QUESTION, trigger="app.llm.Gone")
    post_callback(row, done())
    for _ in range(6):
        triggers.announce("default")
        make_due(row)
    assert Health.read().given_up == 1
    assert not triggers.unannounced("default").exists()
    # What the README says to do where it was removed for good.
    LLMRequest.objects.filter(trigger="app.llm.Gone").update(trigger="")
    row.announce_again()
    triggers.announce("default")
    row.refresh_from_db()
    assert row.announced_at is not None
    assert Health.read().given_up == 0


def test_answer_is_announced_once(watch: Watch, post_callback: Callable[..., Any]) -> None:
    watch(Rename)
    Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done())
    assert triggers.announce("default") == 1
    assert triggers.announce("default") == 0


# --- handlers that raise ---


def test_handler_that_raises_is_told_again_later_and_its_effect_is_there_once(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    moods = iter([True, True, False])

    class Moody(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            Group.objects.create(name=f"effect of {llm_request.uuid}", pk=1000)
            if next(moods):
                raise RuntimeError("not\x00today")

        def condition(self, instance: Group, *, created: bool) -> bool:
            return instance.name == "a"

    watch(Moody)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    post_callback(row, done())
    for tries in (1, 2):
        before = timezone.now()
        assert triggers.announce("default") == 1
        row.refresh_from_db()
        assert (row.state, row.announced_at, row.announce_tries) == ("completed", None, tries)
        assert row.announce_error == "RuntimeError: nottoday"
        assert row.announce_after >= before + timedelta(seconds=5 * 4 ** (tries - 1))
        assert not Group.objects.filter(pk=1000).exists()
        assert triggers.announce("default") == 0  # not at once
        make_due(row)
    assert triggers.announce("default") == 1
    row.refresh_from_db()
    assert (row.announce_error, row.announced_at is not None) == ("", True)
    assert Group.objects.filter(pk=1000).count() == 1


def test_handler_that_never_works_is_given_up_and_the_others_are_told(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    class Broken(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            if instance.name == "bad":
                raise RuntimeError
            super().completed(instance, llm_request)

    watch(Broken)
    bad, good = Group.objects.create(name="bad"), Group.objects.create(name="good")
    rows = LLMRequest.objects.order_by("id")
    for number, row in enumerate(rows):
        post_callback(row, done(f"answer {number}", f"msg_{number}"))
    triggers.announce("default")
    good.refresh_from_db()
    assert good.name == "answer 1"
    for _ in range(10):
        LLMRequest.objects.update(announce_after=None)
        triggers.announce("default")
    row = LLMRequest.objects.about(bad).get()
    assert (row.announce_tries, row.announced_at, row.state) == (5, None, "completed")
    assert row.announce_error == "RuntimeError: "


def test_handler_that_breaks_the_transaction_is_told_again(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    class Clumsy(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT * FROM no_such_table")

    watch(Clumsy)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    post_callback(row, done())
    triggers.announce("default")
    row.refresh_from_db()
    assert (row.announce_tries, row.announced_at) == (1, None)
    assert "no_such_table" in row.announce_error


def test_failure_that_turns_into_an_answer_is_told_as_both(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    told = []

    class Both(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            told.append("completed")

        def failed(self, instance: Group, llm_request: LLMRequest) -> None:
            told.append("failed")

    watch(Both)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    post_callback(row, gave_up())
    triggers.announce("default")
    post_callback(row, done())
    triggers.announce("default")
    assert told == ["failed", "completed"]


@pytest.mark.django_db(transaction=True)
def test_workers_that_announce_at_the_same_time_tell_each_once(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    lock, told, errors = threading.Lock(), [], []

    class Counted(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            with lock:
                told.append(llm_request.pk)
            super().completed(instance, llm_request)

        def condition(self, instance: Group, *, created: bool) -> bool:
            return created

    watch(Counted)
    for number in range(40):
        Group.objects.create(name=f"group {number}")
    finished = timezone.now()
    LLMRequest.objects.update(state="completed", finished_at=finished)
    for row in LLMRequest.objects.all():
        LLMRequest.objects.filter(pk=row.pk).update(completion=f"answer {row.pk}")
    start = threading.Barrier(4)

    def work() -> None:
        try:
            start.wait()
            triggers.announce("default")
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
    assert sorted(told) == sorted(LLMRequest.objects.values_list("pk", flat=True))
    assert Group.objects.filter(name__startswith="answer").count() == 40


def test_resubmission_of_an_older_question_does_not_overtake_a_newer_answer(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    older = LLMRequest.objects.get()
    LLMRequest.objects.update(state="failed", announced_at=timezone.now())
    group.name = "b"
    group.save()
    newer = LLMRequest.objects.latest("id")
    post_callback(newer, done("New", "msg_new"))
    older.refresh_from_db()
    again = older.resubmit()
    post_callback(again, done("Old", "msg_old"))
    triggers.announce("default")
    group.refresh_from_db()
    assert group.name == "New"


def test_what_nobody_waits_for_is_passed_over_in_few_statements(
    django_assert_num_queries: Any,
) -> None:
    rows = [LLMRequest(messages=QUESTION, state="completed") for _ in range(300)]
    LLMRequest.objects.bulk_create(rows)
    with django_assert_num_queries(3):
        assert triggers.announce("default") == 300
    assert not triggers.unannounced("default").exists()


def test_code_that_takes_its_worker_down_is_not_tried_for_ever(settings: Any) -> None:
    settings.QSTASH_LLM = {**settings.QSTASH_LLM, "ANNOUNCE_TRIES": 3}
    calls = []

    def die(**kwargs: Any) -> None:
        calls.append(kwargs["llm_request"].pk)
        raise SystemExit

    row = LLMRequest.objects.create(messages=QUESTION, state="completed")
    request_completed.connect(die, weak=False, dispatch_uid="die")
    try:
        for _ in range(3):
            with pytest.raises(SystemExit):
                triggers.announce("default")
            LLMRequest.objects.filter(pk=row.pk).update(announce_after=None)
        assert triggers.announce("default") == 0
    finally:
        request_completed.disconnect(dispatch_uid="die")
    row.refresh_from_db()
    assert (len(calls), row.announce_tries, row.announced_at) == (3, 3, None)
    assert "died" in row.announce_error


# --- telling takes no lock ---

several_at_once = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="one at a time, whatever it writes"
)


@several_at_once
@pytest.mark.django_db(transaction=True)
def test_handler_at_work_holds_up_no_callback(
    watch: Watch, post_callback: Callable[..., Any]
) -> None:
    last = Callback(status=500, source_message_id="msg_1", retried=3, max_retries=3)
    statuses = []

    class Slow(Rename):
        def failed(self, instance: Group, llm_request: LLMRequest) -> None:
            failure = replace(last, dlq_id="dlq_1")
            statuses.append(meanwhile(lambda: post_callback(llm_request, failure).status_code))

    watch(Slow)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    statuses.append(post_callback(row, last).status_code)
    row.refresh_from_db()
    assert statuses == [200, 200]
    assert (row.dead_letter_id, row.announced_at is not None) == ("dlq_1", True)


@several_at_once
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("raises", [False, True])
def test_one_that_is_told_by_another_meanwhile_takes_effect_once(
    listen: Callable[..., None], raises: bool
) -> None:
    """The first takes longer than its claim, and the second is done before it."""
    now, answers = timezone.now(), []
    row = LLMRequest.objects.create(messages=QUESTION, state="completed")

    def hear(**kwargs: Any) -> None:
        is_first = not answers
        if is_first:
            answers.append("begun")
            answers.append(meanwhile(lambda: triggers.announce("default", clock=at(121, now))))
        Group.objects.create(name="first" if is_first else "second")
        if is_first and raises:
            raise RuntimeError

    listen(request_completed, hear)
    told = triggers.announce("default", clock=at(0, now))
    assert answers == ["begun", 1]
    assert told == (1 if raises else 0)
    assert name_of_effects() == ["second"]
    row.refresh_from_db()
    assert (row.announced_at, row.announce_error) == (at(121, now)(), "")


@several_at_once
@pytest.mark.django_db(transaction=True)
def test_handler_that_outlives_its_claim_takes_effect_if_it_is_done_first(
    listen: Callable[..., None],
) -> None:
    now, second_begins, first_is_done = timezone.now(), threading.Event(), threading.Event()
    LLMRequest.objects.create(messages=QUESTION, state="completed")
    calls: list[str] = []

    def again() -> int:
        try:
            return triggers.announce("default", clock=at(121, now))
        finally:
            connection.close()

    def hear(**kwargs: Any) -> None:
        name = "second" if calls else "first"
        calls.append(name)
        if name == "first":
            calls.append("both")
            futures.append(pool.submit(again))
            assert second_begins.wait(20)
        else:
            second_begins.set()
            assert first_is_done.wait(20)
        Group.objects.create(name=name)

    listen(request_completed, hear)
    futures: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        assert triggers.announce("default", clock=at(0, now)) == 1
        first_is_done.set()
        assert futures[0].result() == 0
    assert name_of_effects() == ["first"]


@several_at_once
@pytest.mark.django_db(transaction=True)
def test_failure_that_its_answer_overtakes_while_it_is_told_leaves_no_effect(
    listen: Callable[..., None], post_callback: Callable[..., Any]
) -> None:
    def hear(llm_request: LLMRequest, **kwargs: Any) -> None:
        Group.objects.create(name=llm_request.state)
        if llm_request.state == "failed":
            meanwhile(lambda: post_callback(llm_request, done()))

    listen(request_failed, hear)
    listen(request_completed, hear)
    row = LLMRequest.objects.publish(QUESTION)
    post_callback(row, gave_up())
    assert name_of_effects() == ["completed"]
    row.refresh_from_db()
    assert (row.state, row.announced_at is not None) == ("completed", True)


def test_one_whose_announcer_was_killed_is_told_again_when_the_claim_ends(
    listen: Callable[..., None],
) -> None:
    now, tries = timezone.now(), []
    LLMRequest.objects.create(messages=QUESTION, state="completed")

    def hear(**kwargs: Any) -> None:
        tries.append(None)
        if len(tries) == 1:
            raise SystemExit

    listen(request_completed, hear)
    with pytest.raises(SystemExit):
        triggers.announce("default", clock=at(0, now))
    assert triggers.announce("default", clock=at(119, now)) == 0
    assert triggers.announce("default", clock=at(121, now)) == 1
    assert len(tries) == 2


def test_handler_that_retries_its_dead_letter_has_been_told(
    watch: Watch, post_callback: Callable[..., Any], qstash: FakeQStash
) -> None:
    class Stubborn(Rename):
        def failed(self, instance: Group, llm_request: LLMRequest) -> None:
            llm_request.retry_dead_letter()

    watch(Stubborn)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    qstash.dead_letters = [{"dlqId": "dlq_1"}]
    post_callback(row, gave_up())
    assert triggers.announce("default") == 1
    row.refresh_from_db()
    assert (row.state, qstash.retried) == ("submitted", ["dlq_1"])


@pytest.mark.parametrize(
    "delete",
    [
        lambda row: row.delete(),
        lambda row: LLMRequest.objects.filter(pk=row.pk).delete(),
    ],
    ids=["row", "queryset"],
)
def test_handler_that_deletes_its_request_takes_effect(
    watch: Watch, post_callback: Callable[..., Any], delete: Callable[[LLMRequest], Any]
) -> None:
    class Tidy(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            super().completed(instance, llm_request)
            delete(llm_request)

    watch(Tidy)
    Group.objects.create(name="a")
    post_callback(LLMRequest.objects.get(), done())
    assert triggers.announce("default") == 1
    assert name_of_effects() == ["Forty-two."]
    assert LLMRequest.objects.count() == 0


@pytest.mark.django_db(transaction=True)
def test_telling_one_takes_few_statements(listen: Callable[..., None]) -> None:
    listen(request_completed, lambda **kwargs: None)
    for _ in range(2):
        LLMRequest.objects.create(messages=QUESTION, state="completed")
    with CaptureQueriesContext(connection) as captured:
        assert triggers.announce("default") == 2
    # What may be passed over and what is due; and of each the claim, the row, BEGIN, the mark, COMMIT.
    assert len(captured) == 2 + 2 * 5


# --- our rows in a database of their own ---

in_two_databases = pytest.mark.django_db(databases=["default", "second"], transaction=True)


@in_two_databases
def test_answer_is_written_where_the_instance_is_and_marked_where_the_request_is(
    second_database: str, watch: Watch, post_callback: Callable[..., Any]
) -> None:
    watch(Rename)
    group = Group.objects.create(name="a")
    group.save()
    row = LLMRequest.objects.get()
    assert (row._state.db, row.state, row.trigger != "") == ("second", "submitted", True)
    post_callback(row, done())
    group.refresh_from_db()
    row.refresh_from_db()
    assert (group.name, row.announce_error) == ("Forty-two.", "")
    assert row.announced_at is not None


@in_two_databases
@pytest.mark.parametrize("raises", [False, True])
def test_what_is_not_marked_has_no_effect_in_the_other_database(
    second_database: str, watch: Watch, post_callback: Callable[..., Any], raises: bool
) -> None:
    class Unlucky(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            super().completed(instance, llm_request)
            if raises:
                raise RuntimeError
            # As if it had been told by another meanwhile.
            LLMRequest.objects.filter(pk=llm_request.pk).update(announced_at=timezone.now())

    watch(Unlucky)
    group = Group.objects.create(name="a")
    row = LLMRequest.objects.get()
    post_callback(row, done())
    group.refresh_from_db()
    row.refresh_from_db()
    assert (group.name, row.announced_at) == ("a", None)


# --- effects elsewhere ---


@pytest.mark.parametrize("site", [{}, {"USE_TZ": False, "TIME_ZONE": "America/New_York"}])
def test_an_idempotency_key_is_the_same_each_time_one_end_is_told(
    watch: Watch,
    post_callback: Callable[..., Any],
    qstash: FakeQStash,
    settings: Any,
    site: dict[str, Any],
) -> None:
    for name, value in site.items():
        setattr(settings, name, value)
    keys = []

    class Moody(Rename):
        def completed(self, instance: Group, llm_request: LLMRequest) -> None:
            keys.append(llm_request.idempotency_key)
            if len(keys) % 2:
                raise RuntimeError

        failed = completed

    watch(Moody)
    Group.objects.create(name="a")
    row = LLMRequest.objects.get()

    def tell(callback: Callback) -> None:
        post_callback(row, callback)
        triggers.announce("default")
        make_due(row)
        triggers.announce("default")
        row.refresh_from_db()

    tell(gave_up())
    qstash.dead_letters = [{"dlqId": "dlq_1"}]
    row.retry_dead_letter()
    tell(gave_up("msg_again_1"))
    tell(done(message_id="msg_again_1"))
    assert len(keys) == 6
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == 3


def test_an_idempotency_key_of_a_row_without_a_moment_is_of_its_state() -> None:
    row = LLMRequest.objects.create(messages=QUESTION, state="failed")
    key = row.idempotency_key
    assert LLMRequest.objects.get(pk=row.pk).idempotency_key == key == f"{row.uuid}-failed"
    LLMRequest.objects.filter(pk=row.pk).update(state="completed")
    assert LLMRequest.objects.get(pk=row.pk).idempotency_key != key
