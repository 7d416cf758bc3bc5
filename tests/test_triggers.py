from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.db.models.signals import post_save
from django.utils import timezone

from django_qstash_llm import triggers
from django_qstash_llm.exceptions import ConfigurationError, InvalidRequest
from django_qstash_llm.models import LLMRequest
from django_qstash_llm.qstash import Callback
from django_qstash_llm.triggers import Trigger, register
from testproject.articles.models import Article

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

Watch = Callable[[type[Trigger]], Trigger]
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
        triggers._registry.pop(name)


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


def test_trigger_that_is_gone_from_the_code_is_nobodys_trouble(
    post_callback: Callable[..., Any],
) -> None:
    row = LLMRequest.objects.publish([{"role": "user", "content": "?"}], trigger="app.llm.Gone")
    post_callback(row, done())
    triggers.announce("default")
    row.refresh_from_db()
    assert row.announced_at is not None


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
