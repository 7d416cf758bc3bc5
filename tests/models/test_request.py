from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import httpx
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import AnonymousUser, Group, User
from django.db import connection, models
from django.test import override_settings
from django.test.utils import isolate_apps
from django.utils import timezone
from django.utils.functional import SimpleLazyObject
from django.utils.translation import gettext_lazy

from django_qstash_llm.exceptions import ConfigurationError, IllegalState, InvalidRequest
from django_qstash_llm.models import Batch, Conversation, LLMRequest, inbox
from django_qstash_llm.models.outbox import Outbox
from django_qstash_llm.models.request import State
from django_qstash_llm.qstash import (
    Callback,
    FlowControl,
    Message,
    Options,
    ResponseError,
)
from testproject.articles.models import Article
from tests.conftest import ANSWER, enter_costs
from tests.wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "How many roads?"}]
PUBLISHED = "/v2/publish/"
DONE = Callback(status=200, body=json.dumps(ANSWER).encode(), source_message_id="msg_1")


@pytest.fixture(autouse=True)
def _no_network(qstash: FakeQStash) -> None:
    """Some tests here submit."""


def sent(qstash: FakeQStash) -> Message:
    """The one message that left, read back off the wire."""
    Outbox().submit()
    [item] = qstash.messages
    headers = {name.lower(): value for name, value in item["headers"].items()}
    if "path" in item:
        destination = item["path"].split("/", 3 if item["path"].startswith(PUBLISHED) else 4)[-1]
        queue = "" if item["path"].startswith(PUBLISHED) else item["path"].split("/")[3]
        return Message.from_headers(destination, headers, item["body"].encode(), queue)
    return Message.from_batch_item(item)


def publish(**asked: Any) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish(asked.pop("messages", MESSAGES), **asked)
    return row


# --- what goes over the wire ---


def test_published_request_goes_over_the_wire_whole(qstash: FakeQStash) -> None:
    row = publish()
    url = f"http://testserver/llm/callback/{row.uuid}/"
    callback = Options(retries=5)
    assert sent(qstash) == Message(
        destination="https://provider.test/v1/chat/completions",
        body=json.dumps(
            {"model": "gpt-5.4-mini", "messages": MESSAGES}, separators=(",", ":")
        ).encode(),
        options=Options(
            content_type="application/json",
            headers={
                "Authorization": "Bearer sk-canary-0123456789",
                "Openai-Organization": "org-1",
            },
            retries=3,
            callback=callback,
            failure_callback=callback,
            labels=(f"llm-request-{row.uuid}",),
            redact=("header[Authorization]", "header[OpenAI-Organization]"),
        ),
        deduplication_id=f"{row.uuid}-1",
        callback=url,
        failure_callback=url,
    )


@pytest.mark.parametrize(
    ("asked", "option", "value"),
    [
        ({"retries": 0}, "retries", 0),
        ({"retries": 5}, "retries", 5),
        ({"timeout": 7200}, "timeout", 7200.0),
        ({"timeout": 1.2}, "timeout", 2.0),
        ({"timeout": timedelta(minutes=1)}, "timeout", 60.0),
        ({"retry_delay": "pow(2, retried) * 1000"}, "retry_delay", "pow(2, retried) * 1000"),
        (
            {"flow_control": FlowControl(key="k", rate=2, period=60)},
            "flow_control",
            FlowControl(key="k", rate=2, period=60),
        ),
        (
            {"flow_control": FlowControl(key="k", parallelism=3)},
            "flow_control",
            FlowControl(key="k", parallelism=3),
        ),
        (
            {"not_before": datetime(2027, 1, 1, tzinfo=UTC)},
            "not_before",
            datetime(2027, 1, 1, tzinfo=UTC),
        ),
        (
            {"redact": ["body"]},
            "redact",
            ("header[Authorization]", "header[OpenAI-Organization]", "body"),
        ),
    ],
)
def test_option_arrives_on_the_wire(
    qstash: FakeQStash, asked: dict[str, Any], option: str, value: Any
) -> None:
    publish(**asked)
    assert getattr(sent(qstash).options, option) == value


def test_labels_arrive_behind_our_own(qstash: FakeQStash) -> None:
    row = publish(labels=["blue", "deep sea"])
    assert sent(qstash).options.labels == (f"llm-request-{row.uuid}", "blue", "deep sea")


@pytest.mark.parametrize("delay", [90, 90.0, timedelta(minutes=1.5)])
def test_delay_becomes_a_moment(qstash: FakeQStash, delay: Any) -> None:
    row = publish(delay=delay)
    expected = row.created_at + timedelta(seconds=90)
    message = sent(qstash)
    assert abs((row.not_before - expected).total_seconds()) < 5
    assert message.options.not_before is not None
    assert abs((message.options.not_before - expected).total_seconds()) < 5
    assert message.options.delay is None


def test_delay_of_nothing_is_no_obstacle_to_a_queue() -> None:
    row = LLMRequest.objects.enqueue(MESSAGES, queue="q", delay=None)
    assert row.not_before is None


def test_moment_that_has_passed_means_at_once(qstash: FakeQStash) -> None:
    publish(not_before=datetime(1969, 1, 1, tzinfo=UTC))
    assert sent(qstash).options.not_before == datetime(1970, 1, 1, tzinfo=UTC)


def test_enqueued_request_names_its_queue(qstash: FakeQStash) -> None:
    LLMRequest.objects.enqueue(MESSAGES, queue="summaries")
    assert sent(qstash).queue == "summaries"


def test_unknown_keyword_arguments_are_parameters_of_the_completion(qstash: FakeQStash) -> None:
    parameters = {
        "temperature": 0.2,
        "max_completion_tokens": 50,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True}},
        "stop": ["\n", "END"],
        "seed": 2**40,
        "user_location": None,
        "stream": False,
    }
    row = publish(**parameters)
    row.refresh_from_db()
    assert row.parameters == parameters
    assert json.loads(sent(qstash).body) == {
        "model": "gpt-5.4-mini",
        "messages": MESSAGES,
        **parameters,
    }


def test_anthropic_is_asked_in_its_own_shape(qstash: FakeQStash) -> None:
    system = {"role": "system", "content": "Be brief."}
    publish(messages=[system, *MESSAGES], provider="anthropic", model="claude-5-haiku")
    message = sent(qstash)
    assert message.destination == "https://anthropic.test/v1/messages"
    assert json.loads(message.body) == {
        "model": "claude-5-haiku",
        "max_tokens": 4096,
        "system": "Be brief.",
        "messages": MESSAGES,
    }
    assert message.options.headers == {
        "X-Api-Key": "ant-canary-0123456789",
        "Anthropic-Version": "2023-06-01",
    }
    assert "header[x-api-key]" in message.options.redact


@override_settings(QSTASH_TOKEN="")
@pytest.mark.parametrize("ask", ["publish", "enqueue"])
def test_missing_token_is_named_when_asking(ask: str) -> None:
    queue = {"queue": "q"} if ask == "enqueue" else {}
    with pytest.raises(ConfigurationError, match="QSTASH_TOKEN"):
        getattr(LLMRequest.objects, ask)(MESSAGES, **queue)
    assert LLMRequest.objects.count() == 0


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"QSTASH_CURRENT_SIGNING_KEY": "", "QSTASH_NEXT_SIGNING_KEY": ""}, "SIGNING_KEY"),
        ({"QSTASH_LLM": {"PROVIDERS": {}}}, "CALLBACK_BASE_URL"),
        ({"QSTASH_LLM": {"CALLBACK_BASE_URL": "/llm"}}, "CALLBACK_BASE_URL.*absolute"),
        ({"QSTASH_LLM": {"CALBACK_BASE_URL": "x"}}, "'CALBACK_BASE_URL'.*CALLBACK_BASE_URL"),
    ],
)
def test_missing_setting_is_named_when_asking(changed: dict[str, Any], match: str) -> None:
    with override_settings(**changed), pytest.raises(ConfigurationError, match=match):
        publish()
    assert LLMRequest.objects.count() == 0


# --- what it belongs to ---


def test_belongings_are_stored() -> None:
    article = Article.objects.create(title="Lamp", body="…", summary="…")
    user = User.objects.create(username="ada")
    conversation = Conversation.objects.create()
    row = publish(
        about=article,
        user=user,
        tenant="acme",
        labels=("a", "b"),
        metadata={"order": 7, "tags": ["x"]},
        conversation=conversation,
    )
    row = LLMRequest.objects.get(pk=row.pk)
    assert (row.about, row.user, row.tenant, row.conversation) == (
        article,
        user,
        "acme",
        conversation,
    )
    assert (row.labels, row.metadata) == (["a", "b"], {"order": 7, "tags": ["x"]})
    assert list(LLMRequest.objects.about(article)) == [row]


def test_user_may_come_straight_from_a_view() -> None:
    user = User.objects.create(username="ada")
    assert publish(user=SimpleLazyObject(lambda: user)).user == user


def test_lazy_text_is_text() -> None:
    row = publish(messages=[{"role": "user", "content": gettext_lazy("Yes")}])
    row.refresh_from_db()
    assert row.messages == [{"role": "user", "content": "Yes"}]


def test_text_no_database_takes_is_cleaned_before_it_is_stored() -> None:
    content = "nul\x00 and \ud800 half"
    row = publish(messages=[{"role": "user", "content": content}], tenant="a\x00b")
    row.refresh_from_db()
    assert row.messages == [{"role": "user", "content": "nul and � half"}]
    assert row.tenant == "ab"


def test_async_twins_ask_the_same() -> None:
    async def ask() -> tuple[LLMRequest, LLMRequest, Batch]:
        return (
            await LLMRequest.objects.apublish(MESSAGES, tenant="a"),
            await LLMRequest.objects.aenqueue(MESSAGES, queue="q"),
            await Batch.objects.asubmit([{"messages": MESSAGES}], name="b"),
        )

    row, queued, batch = async_to_sync(ask)()
    assert (row.tenant, row.via, queued.queue, queued.via) == ("a", "publish", "q", "enqueue")
    assert [row.via for row in batch.llm_requests.all()] == ["batch"]


def test_created_through_the_manager_is_checked_and_filled_in() -> None:
    row = LLMRequest.objects.create(messages=MESSAGES)
    assert (row.provider, row.model, row.retries, row.state) == (
        "openai",
        "gpt-5.4-mini",
        3,
        "pending",
    )
    with pytest.raises(InvalidRequest, match="messages"):
        LLMRequest.objects.create(messages=[])


@pytest.mark.django_db(transaction=True)
def test_created_through_the_manager_is_submitted(qstash: FakeQStash) -> None:
    row = LLMRequest.objects.create(messages=MESSAGES)
    row.refresh_from_db()
    assert (row.state, row.qstash_message_id) == ("submitted", "msg_1")


def test_saving_again_does_not_ask_again(qstash: FakeQStash) -> None:
    row = publish()
    Outbox().submit()
    row.refresh_from_db()
    row.tenant = "later"
    row.save()
    Outbox().submit()
    assert len(qstash.messages) == 1


@override_settings(USE_TZ=False)
def test_site_without_time_zones_can_delay(qstash: FakeQStash) -> None:
    row = publish(delay=90)
    moment = datetime(2027, 1, 1, 12, tzinfo=UTC)
    LLMRequest.objects.filter(pk=row.pk).delete()
    publish(not_before=moment)
    assert sent(qstash).options.not_before == moment


# --- bad input ---


class Odd:
    pass


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least one"),
    ({"messages": None}, "messages", "at least one"),
    ({"messages": "Hello"}, "messages", "at least one"),
    ({"messages": {"role": "user", "content": "x"}}, "messages", "at least one"),
    ({"messages": ["Hello"]}, "messages[0]", "role and content"),
    ({"messages": [*MESSAGES, {"content": "x"}]}, "messages[1].role", "'user'"),
    ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "text"),
    ({"messages": [{"role": "user", "content": Odd()}]}, "messages[0].content", "Odd"),
    ({"messages": [{"role": "user", "content": b"x"}]}, "messages[0].content", "bytes"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "empty"),
    ({"messages": MESSAGES * 10_001}, "messages", "10000 at most"),
    (
        {"messages": [{"role": "user", "content": "x" * 1_000_001}]},
        "messages",
        "MAX_BODY_BYTES is 1000000",
    ),
    (
        {"messages": [{"role": "user", "content": "é" * 500_001}]},
        "messages",
        "MAX_BODY_BYTES",
    ),
    ({"provider": "opnai"}, "provider", "QSTASH_LLM['PROVIDERS']"),
    ({"provider": ["openai"]}, "provider", "QSTASH_LLM['PROVIDERS']"),
    ({"provider": 7}, "provider", "QSTASH_LLM['PROVIDERS']"),
    ({"provider": "upstash", "model": "gpt-5.4-mini"}, "model", "Meta-Llama-3"),
    ({"model": "m" * 256}, "model", "not a model's name"),
    ({"model": 7}, "model", "not a model's name"),
    ({"model": "gpt\x00"}, "model", "not a model's name"),
    ({"delay": -1}, "delay", "between 0"),
    ({"delay": timedelta(seconds=-1)}, "delay", "between 0"),
    ({"delay": 366 * 86_400}, "delay", "a year"),
    ({"delay": timedelta(days=999_999_999)}, "delay", "a year"),
    ({"delay": float("nan")}, "delay", "between 0"),
    ({"delay": float("inf")}, "delay", "between 0"),
    ({"delay": True}, "delay", "between 0"),
    ({"delay": "10s"}, "delay", "between 0"),
    ({"delay": 1, "not_before": datetime(2027, 1, 1, tzinfo=UTC)}, "delay", "not both"),
    ({"not_before": datetime(2027, 1, 1)}, "not_before", "aware"),
    ({"not_before": date(2027, 1, 1)}, "not_before", "aware"),
    ({"not_before": "2027-01-01"}, "not_before", "aware"),
    ({"not_before": datetime(9999, 1, 1, tzinfo=UTC)}, "not_before", "a year ahead"),
    ({"retries": -1}, "retries", "between 0 and"),
    ({"retries": 101}, "retries", "between 0 and"),
    ({"retries": 2.5}, "retries", "between 0 and"),
    ({"retries": True}, "retries", "between 0 and"),
    ({"retries": "3"}, "retries", "between 0 and"),
    ({"retries": float("nan")}, "retries", "between 0 and"),
    ({"timeout": 0}, "timeout", "7200 seconds (2 hours)"),
    ({"timeout": -5}, "timeout", "7200"),
    ({"timeout": 7201}, "timeout", "7200"),
    ({"timeout": float("nan")}, "timeout", "7200"),
    ({"timeout": True}, "timeout", "7200"),
    ({"timeout": "60"}, "timeout", "7200"),
    ({"timeout": timedelta(hours=3)}, "timeout", "7200"),
    ({"retires": 1}, "retires", "did you mean 'retries'"),
    ({"retry_delay": "import os"}, "retry_delay", "import"),
    ({"retry_delay": "pow(2"}, "retry_delay", ""),
    ({"retry_delay": "1" + "+1" * 200}, "retry_delay", "255"),
    ({"retry_delay": 1000}, "retry_delay", "text"),
    ({"flow_control": {"key": "k", "rate": 1}}, "flow_control", "FlowControl(key=…, rate=…)"),
    ({"flow_control": "k"}, "flow_control", "FlowControl"),
    ({"labels": "blue"}, "labels", "list of texts"),
    ({"labels": ["blue", 7]}, "labels", "list of texts"),
    ({"labels": 7}, "labels", "list of texts"),
    ({"labels": None}, "labels", "list of texts"),
    ({"labels": ["a,b"]}, "labels", "without commas"),
    ({"labels": [""]}, "labels", "not a label"),
    ({"labels": ["b\x00"]}, "labels", "not a label"),
    ({"labels": ["llm-request-mine"]}, "labels", "reserved"),
    ({"redact": "body"}, "redact", "list"),
    ({"redact": 7}, "redact", "list"),
    ({"redact": ["everything"]}, "redact", "header[Name]"),
    ({"tenant": None}, "tenant", "255"),
    ({"tenant": "t" * 256}, "tenant", "255"),
    ({"metadata": ["x"]}, "metadata", "dictionary"),
    ({"metadata": None}, "metadata", "dictionary"),
    ({"metadata": {"at": Odd()}}, "metadata.at", "Odd"),
    ({"metadata": {7: "x"}}, "metadata", "7"),
    ({"about": Article(title="unsaved")}, "about", "saved"),
    ({"about": "article 7"}, "about", "saved"),
    ({"about": Article}, "about", "saved"),
    ({"user": AnonymousUser()}, "user", "saved User"),
    ({"user": SimpleLazyObject(AnonymousUser)}, "user", "saved User"),
    ({"user": User(username="unsaved")}, "user", "saved User"),
    ({"user": 7}, "user", "saved User"),
    ({"conversation": Conversation()}, "conversation", "saved Conversation"),
    ({"conversation": "c"}, "conversation", "saved Conversation"),
    ({"batch": 7}, "batch", "saved Batch"),
    ({"temperature": float("nan")}, "temperature", "nan"),
    ({"temperature": float("inf")}, "temperature", "inf"),
    ({"temperature": Decimal("0.5")}, "temperature", "Decimal"),
    ({"seed": 2**64}, "seed", "64 bits"),
    ({"seed": 10**5000}, "seed", "64 bits"),
    ({"response_format": Odd}, "response_format", "type"),
    ({"response_format": {"schema": {"x": Odd()}}}, "response_format.schema.x", "Odd"),
    ({"tools": [{"when": datetime(2027, 1, 1, tzinfo=UTC)}]}, "tools[0].when", "datetime"),
    ({"stream": True}, "stream", "Chat API"),
    ({"label": "blue"}, "label", "labels=[…]"),
    ({"callback": "https://example.com"}, "callback", "CALLBACK_BASE_URL"),
    ({"deduplication_id": "x"}, "deduplication_id", "uuid"),
    ({"api_key": "sk-x"}, "api_key", "QSTASH_LLM['PROVIDERS']"),
    ({"base_url": "https://x"}, "base_url", "QSTASH_LLM['PROVIDERS']"),
    ({"state": "completed"}, "state", "verbs"),
    ({"via": "batch"}, "via", "publish, enqueue"),
    ({"parameters": {"temperature": 1}}, "parameters", "by itself"),
    ({"queue": "q"}, "queue", "enqueue(queue=…)"),
]


def nested_list(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(("asked", "field", "remedy"), BAD)
def test_bad_input_names_the_field_and_the_remedy_and_stores_nothing(
    asked: dict[str, Any], field: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        publish(**asked)
    assert (caught.value.field, remedy in caught.value.problem) == (field, True), caught.value
    assert str(caught.value).startswith(f"{field}: ")
    assert LLMRequest.objects.count() == 0


def test_too_deep_a_parameter_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="tools"):
        publish(tools=nested_list(2000))


def test_error_about_a_wrong_value_is_short() -> None:
    with pytest.raises(InvalidRequest) as caught:
        publish(model="m" * 1_000_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("queue", "remedy"),
    [
        ("", "name of a queue"),
        ("with space", "letters"),
        ("a/b", "letters"),
        ("..", "letters"),
        ("q" * 256, "255"),
        (7, "letters"),
        (None, "name of a queue"),
    ],
)
def test_bad_queue_name_is_refused(queue: Any, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLMRequest.objects.enqueue(MESSAGES, queue=queue)
    assert caught.value.field == "queue"
    assert remedy in caught.value.problem
    assert LLMRequest.objects.count() == 0


def test_enqueued_request_cannot_be_delayed() -> None:
    with pytest.raises(InvalidRequest, match="delay: QStash delays no enqueued message"):
        LLMRequest.objects.enqueue(MESSAGES, queue="q", delay=5)


def test_only_the_models_a_provider_may_be_asked_are_asked(settings: Any) -> None:
    openai = settings.QSTASH_LLM["PROVIDERS"]["openai"] | {"MODELS": ["gpt-5.4-mini", "o9"]}
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"PROVIDERS": {"openai": openai}}
    assert publish(model="o9").model == "o9"
    with pytest.raises(InvalidRequest, match=r"model: 'gpt-3' .*gpt-5\.4-mini, o9.*MODELS"):
        publish(model="gpt-3")


def test_assistant_message_without_content_may_be_a_tool_call() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    row = publish(messages=[*MESSAGES, call, {"role": "tool", "content": "7"}])
    assert row.messages[1] == call


# --- verbs ---


@pytest.fixture
def submitted(qstash: FakeQStash) -> LLMRequest:
    row = publish()
    Outbox().submit()
    row.refresh_from_db()
    return row


def test_submitted_request_is_cancelled_at_qstash(
    submitted: LLMRequest, qstash: FakeQStash
) -> None:
    submitted.cancel()
    submitted.refresh_from_db()
    assert (submitted.state, qstash.cancelled) == ("cancelled", ["msg_1"])
    assert submitted.finished_at is not None


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
def test_finished_request_cannot_be_cancelled(submitted: LLMRequest, state: State) -> None:
    LLMRequest.objects.update(state=state)
    submitted.refresh_from_db()
    with pytest.raises(IllegalState, match=state):
        submitted.cancel()


def test_request_that_finished_meanwhile_cannot_be_cancelled(submitted: LLMRequest) -> None:
    LLMRequest.objects.update(state=State.COMPLETED)
    with pytest.raises(IllegalState, match="completed"):
        submitted.cancel()
    submitted.refresh_from_db()
    assert submitted.state == "completed"


def test_request_goes_on_when_qstash_cannot_be_told(
    submitted: LLMRequest, qstash: FakeQStash, wire: Any
) -> None:
    qstash.answer = lambda request: httpx.Response(401, json={"error": "no"})
    with pytest.raises(ResponseError):
        submitted.cancel()
    submitted.refresh_from_db()
    assert submitted.state == "submitted"


def test_message_that_is_gone_from_qstash_is_cancelled_here(
    submitted: LLMRequest, qstash: FakeQStash
) -> None:
    qstash.answer = lambda request: httpx.Response(404, json={"error": "not found"})
    submitted.cancel()
    assert submitted.state == "cancelled"


@pytest.mark.parametrize("state", [State.PENDING, State.SUBMITTED])
def test_unfinished_request_cannot_be_resubmitted(state: State) -> None:
    row = publish()
    LLMRequest.objects.update(state=state)
    with pytest.raises(IllegalState, match="may still come"):
        row.resubmit()
    assert LLMRequest.objects.count() == 1


def test_resubmission_asks_the_same_again_under_its_own_identity(qstash: FakeQStash) -> None:
    user = User.objects.create(username="ada")
    group = Group.objects.create(name="g")
    row = publish(
        about=group,
        user=user,
        tenant="acme",
        labels=["a"],
        metadata={"n": 1},
        retries=1,
        timeout=60,
        flow_control=FlowControl(key="k", rate=1),
        temperature=0.5,
    )
    row.fail("boom", "it broke", now=timezone.now())
    again = LLMRequest.objects.get(pk=row.resubmit().pk)
    assert again.resubmission_of == row
    assert again.uuid != row.uuid
    same = ["messages", "parameters", "provider", "model", "about", "user", "tenant", "labels"]
    same += ["metadata", "retries", "timeout", "via", "flow_control"]
    assert {name: getattr(again, name) for name in same} == {
        name: getattr(row, name) for name in same
    }
    assert (again.state, again.error, again.attempts) == ("pending", "", 0)


def test_resubmission_does_not_wait_for_the_old_moment() -> None:
    row = publish(delay=3600)
    row.cancel()
    assert row.resubmit().not_before is None


# --- what there is ---


def test_querysets_say_what_there_is(post_callback: Callable[..., Any]) -> None:
    pending, done, failed, cancelled = (publish() for _ in range(4))
    post_callback(done, DONE)
    failed.fail("boom", "it broke", now=timezone.now())
    cancelled.cancel()
    rows = LLMRequest.objects
    assert list(rows.pending()) == [pending]
    assert list(rows.unfinished()) == [pending]
    assert list(rows.completed()) == [done]
    assert list(rows.failed()) == [failed]
    assert list(rows.cancelled()) == [cancelled]
    assert set(rows.finished()) == {done, failed, cancelled}
    assert list(rows.submitted()) == []


def test_cost_of_nothing_priced_is_unknown() -> None:
    publish()
    assert LLMRequest.objects.cost() is None


def test_cost_adds_up_what_is_priced_and_counts_the_rest() -> None:
    for cost in (Decimal("0.000000000001"), Decimal("1.5"), None):
        row = publish()
        LLMRequest.objects.filter(pk=row.pk).update(state=State.COMPLETED, cost=cost)
    enter_costs()
    assert LLMRequest.objects.cost() == Decimal("1.500000000001")
    assert LLMRequest.objects.unpriced().count() == 1


def test_answer_reads_as_json() -> None:
    assert LLMRequest(completion='{"a": 1}').answer_json() == {"a": 1}
    with pytest.raises(ValueError, match="Expecting value"):
        LLMRequest(completion="no").answer_json()


def test_nothing_of_it_shows_a_key(submitted: LLMRequest) -> None:
    shown = repr(submitted) + str(submitted) + repr(vars(submitted))
    assert "canary" not in shown


def test_cancelling_what_was_sent_and_not_acknowledged_cancels_it_at_qstash(
    qstash: FakeQStash,
) -> None:
    LLMRequest.objects.publish(MESSAGES)
    LLMRequest.objects.update(
        state="pending", qstash_message_id="", first_tried_at=timezone.now(), claim_token=None
    )
    row = LLMRequest.objects.get()
    row.cancel()
    assert qstash.cancelled == [row.wire_label]
    assert LLMRequest.objects.get().state == "cancelled"


def test_second_click_on_resubmit_asks_nothing_more(qstash: FakeQStash) -> None:
    row = LLMRequest.objects.publish(MESSAGES)
    LLMRequest.objects.update(state="failed")
    row.refresh_from_db()
    again = row.resubmit()
    with pytest.raises(IllegalState, match=str(again.uuid)):
        row.resubmit()
    assert LLMRequest.objects.count() == 2


def test_a_row_that_says_what_is_new_is_the_row_that_the_orm_writes(db: None) -> None:
    """Also where a column is what it is at first, or is left out of the statement."""
    asked: dict[str, Any] = {
        "uuid": uuid4(),
        "created_at": timezone.now(),
        "via": "chat",
        "model": "gpt-5.4-mini",
        "messages": [{"role": "user", "content": "What is it?"}],
        "parameters": {"n": 1},
        "labels": ["a"],
        "retries": 0,
        "submission_number": 2,
    }
    by_orm = LLMRequest(**asked, state="submitted")
    by_orm.save()
    (stored,) = LLMRequest.objects.filter(pk=by_orm.pk).values()
    by_orm.delete()
    row = inbox.new(LLMRequest, **asked, state="submitted")
    inbox.insert(row, using="default")
    (found,) = LLMRequest.objects.filter(pk=row.pk).values()
    assert stored.pop("id") < found.pop("id")
    assert found == stored


@pytest.mark.django_db(transaction=True)
@isolate_apps("testproject.articles")
def test_a_key_that_is_no_number_is_stored_as_its_own_field_stores_it() -> None:
    """As that of a user is at many a site."""

    class Owner(models.Model):
        id = models.UUIDField(primary_key=True)

        class Meta:
            app_label = "articles"

    class Owned(models.Model):
        owner = models.ForeignKey(Owner, on_delete=models.CASCADE)
        also = models.ForeignKey(Owner, on_delete=models.CASCADE, null=True, related_name="+")

        class Meta:
            app_label = "articles"

    key = uuid4()
    with connection.schema_editor() as editor:
        editor.create_model(Owner)
        editor.create_model(Owned)
    try:
        Owner.objects.create(id=key)
        inbox.insert(inbox.new(Owned, owner_id=key, also_id=None), using="default")
        assert Owned.objects.get(owner=key).also_id is None
        found = inbox.find(Owned, "owner_id", key, using="default")
        assert found is not None
        assert found.owner_id == key
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Owned)
            editor.delete_model(Owner)


def test_two_new_rows_share_nothing(db: None) -> None:
    one, other = inbox.new(LLMRequest), inbox.new(LLMRequest)
    one.messages.append({"role": "user", "content": "Only here."})
    assert (other.messages, one.uuid != other.uuid) == ([], True)
