from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import PermissionDenied
from django.db import connections
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.exceptions import ConfigurationError, ConversationBusy
from django_qstash_llm.models import Conversation, LLMRequest
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER
from tests.wire import FakeQStash, Wire

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("qstash")]


@pytest.fixture
def answer(post_callback: Callable[..., Any]) -> Callable[..., None]:
    def with_message(row: LLMRequest, **message: Any) -> None:
        body = json.dumps(ANSWER | {"choices": [{"message": message}]}).encode()
        callback = Callback(status=200, body=body, source_message_id=f"msg_{row.pk}")
        assert post_callback(row, callback).status_code == 200

    return with_message


def test_each_question_carries_what_was_said_before(answer: Callable[..., None]) -> None:
    ada = User.objects.create(username="ada")
    conversation = Conversation.objects.create(system="Be brief.", user=ada, title="Roads")
    first = conversation.ask("How many?", temperature=0)
    assert first.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
    ]
    assert (first.user, first.conversation, first.parameters) == (
        ada,
        conversation,
        {"temperature": 0},
    )
    answer(first, content="Forty-two.")
    second = conversation.ask("Why?")
    assert second.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Forty-two."},
        {"role": "user", "content": "Why?"},
    ]
    assert str(conversation) == "Roads"


def test_unanswered_questions_are_no_history(answer: Callable[..., None]) -> None:
    conversation = Conversation.objects.create()
    conversation.ask("Pending?")
    failed, cancelled = conversation.ask("Failed?"), conversation.ask("Cancelled?")
    LLMRequest.objects.filter(pk=failed.pk).update(state="failed")
    cancelled.cancel()
    assert conversation.history() == []


def test_history_is_in_the_order_of_the_questions(answer: Callable[..., None]) -> None:
    conversation = Conversation.objects.create()
    first, second = conversation.ask("One?"), conversation.ask("Two?")
    answer(second, content="2")
    answer(first, content="1")
    assert [message["content"] for message in conversation.history()] == ["One?", "1", "Two?", "2"]


def test_refusal_is_what_was_said(answer: Callable[..., None]) -> None:
    conversation = Conversation.objects.create()
    answer(conversation.ask("How to pick a lock?"), content=None, refusal="I will not say.")
    assert conversation.history()[-1] == {"role": "assistant", "content": "I will not say."}


def test_conversation_goes_on_after_an_answer_without_words(answer: Callable[..., None]) -> None:
    conversation = Conversation.objects.create()
    answer(conversation.ask("Look it up?"), content=None, tool_calls=[{"id": "1"}])
    assert conversation.ask("And now?").messages == [{"role": "user", "content": "And now?"}]


def test_conversations_do_not_mix(answer: Callable[..., None]) -> None:
    mine, other = Conversation.objects.create(), Conversation.objects.create()
    answer(other.ask("Secret?"), content="Yes.")
    assert mine.history() == []
    assert str(mine) == str(mine.uuid)


def test_history_is_one_query(answer: Callable[..., None], django_assert_num_queries: Any) -> None:
    conversation = Conversation.objects.create()
    for number in range(5):
        answer(conversation.ask(f"{number}?"), content="Yes.")
    with django_assert_num_queries(1):
        assert len(conversation.history()) == 10


# --- at once ---------------------------------------------------------------------------------


def answered(text: str | None, **message: Any) -> httpx.Response:
    choice = {"message": {"content": text, **message}, "finish_reason": "stop"}
    return httpx.Response(200, json=ANSWER | {"choices": [choice]})


def says(wire: Wire, *answers: httpx.Response) -> None:
    told = iter(answers)
    wire.hosts["provider.test"] = lambda request: next(told)


def asked(wire: Wire) -> list[Any]:
    """The messages of the newest call."""
    messages: list[Any] = json.loads(wire.to("provider.test")[-1].content)["messages"]
    return messages


def test_turns_at_once_and_durable_ones_are_one_history(
    wire: Wire, answer: Callable[..., None]
) -> None:
    conversation = Conversation.objects.create(system="Be brief.")
    says(wire, answered("Forty-two."), answered("Because."))
    assert conversation.chat("How many?", temperature=0).completion == "Forty-two."
    answer(conversation.ask("Really?"), content="Yes.")
    conversation.chat("Why?")
    assert asked(wire) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Forty-two."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    assert [row.via for row in conversation.llm_requests.order_by("id")] == [
        "chat",
        "publish",
        "chat",
    ]


def test_streamed_turn_is_history_when_it_is_whole(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    chunks = [{"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in chunks).encode()
    says(wire, httpx.Response(200, content=body), httpx.Response(200, content=body))
    with conversation.stream("Hello?") as stream:
        assert [chunk.text for chunk in stream] == ["Hi"]
    conversation.stream("Left?").close()  # before anything came
    assert [message["content"] for message in conversation.history()] == ["Hello?", "Hi"]


def test_async_turns_are_the_same(wire: Wire) -> None:
    user = User.objects.create(username="ada")
    pk = Conversation.objects.create(user=user).pk

    async def talk() -> None:
        conversation = await Conversation.objects.aget(pk=pk)
        assert (await conversation.achat("One?")).completion == "1"
        async with await conversation.astream("Two?") as stream:
            assert "".join([chunk.text async for chunk in stream]) == "2"
        assert (await conversation.aask("Three?")).state == "pending"

    body = b'data: {"choices": [{"delta": {"content": "2"}, "finish_reason": "stop"}]}\n\n'
    says(wire, answered("1"), httpx.Response(200, content=body))
    async_to_sync(talk)()
    last = LLMRequest.objects.latest("id")
    assert [message["content"] for message in last.messages] == ["One?", "1", "Two?", "2", "Three?"]
    assert last.user == user


# --- tool calls ------------------------------------------------------------------------------

CALLS = [
    {"id": f"t{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for n in (1, 2)
]
RESULTS = [{"role": "tool", "tool_call_id": f"t{n}", "content": str(n)} for n in (1, 2)]


def test_tool_calls_are_kept_with_what_the_tools_answered(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    says(wire, answered(None, tool_calls=CALLS), answered("Three."), answered("Yes."))
    conversation.chat("How much?")
    conversation.chat(RESULTS)
    whole = [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        *RESULTS,
    ]
    assert asked(wire) == whole
    conversation.chat("Sure?")
    whole += [
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Sure?"},
    ]
    assert asked(wire) == whole


@pytest.mark.parametrize("words", [None, "I look."])
def test_calls_that_nobody_answered_are_not_repeated(wire: Wire, words: str | None) -> None:
    conversation = Conversation.objects.create()
    says(wire, answered(words, tool_calls=CALLS), answered("Yes."))
    conversation.chat("How much?")
    conversation.chat("Never mind?")
    said = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": words}]
    assert asked(wire) == [*(said if words else []), {"role": "user", "content": "Never mind?"}]


def test_answers_to_calls_that_were_forgotten_are_not_repeated(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    says(wire, answered(None, tool_calls=CALLS), answered("Three."), answered("Yes."))
    first = conversation.chat("How much?")
    conversation.chat(RESULTS)
    LLMRequest.objects.filter(pk=first.pk).update(messages=[])
    conversation.chat("Sure?")
    assert asked(wire) == [{"role": "user", "content": "Sure?"}]


# --- what is repeated ------------------------------------------------------------------------


def remembers(**history: int) -> Any:
    return override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "HISTORY": history})


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ({}, ["1?", "1", "How much?", None, "1", "2", "Three.", "2?", "2"]),
        ({"MESSAGES": 9}, ["1?", "1", "How much?", None, "1", "2", "Three.", "2?", "2"]),
        ({"MESSAGES": 8}, ["How much?", None, "1", "2", "Three.", "2?", "2"]),
        ({"MESSAGES": 6}, ["2?", "2"]),  # not half of what belongs together
        ({"MESSAGES": 1}, []),
        ({"MESSAGES": 0}, []),
        ({"TOKENS": 10_000}, ["1?", "1", "How much?", None, "1", "2", "Three.", "2?", "2"]),
        ({"TOKENS": 40}, ["2?", "2"]),
        ({"TOKENS": 0}, []),
    ],
)
def test_history_is_trimmed_by_whole_exchanges(
    wire: Wire, history: dict[str, int], kept: list[str | None]
) -> None:
    conversation = Conversation.objects.create(system="Be brief.")
    turns = [answered("1"), answered(None, tool_calls=CALLS), answered("Three."), answered("2")]
    says(wire, *turns, answered("Yes."))
    for content in ("1?", "How much?", RESULTS, "2?"):
        conversation.chat(content)
    with remembers(**history):
        conversation.chat("And now?")
    assert [message["content"] for message in asked(wire)] == ["Be brief.", *kept, "And now?"]


@pytest.mark.parametrize(
    ("history", "kept", "queries"),
    [({"MESSAGES": 80}, 80, 2), ({"TOKENS": 1500}, 98, 2), ({"MESSAGES": 0}, 0, 1)],
)
def test_no_more_turns_are_read_than_are_kept(
    history: dict[str, int], kept: int, queries: int, django_assert_num_queries: Any
) -> None:
    conversation = Conversation.objects.create()
    for number in range(200):
        messages = [{"role": "user", "content": f"{number}?"}]
        turn = {"via": "chat", "state": "completed", "completion": "Yes." * 9 * (number % 3)}
        # Not all were answered in words: those are no history.
        LLMRequest.objects.bulk_create(
            [LLMRequest(conversation=conversation, messages=messages, **turn)]
        )
    lines = conversation.history()
    with remembers(**history), django_assert_num_queries(queries):
        *repeated, _ = conversation._messages("And now?")
    assert (len(repeated), repeated) == (kept, lines[len(lines) - kept :])


def test_beginning_of_an_answer_does_not_drop_its_question(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    said = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are"}]
    says(wire, answered("42."), answered("Yes."))
    conversation.chat(said)
    conversation.chat("Sure?")
    assert [each["content"] for each in asked(wire)] == ["How many?", "There are", "42.", "Sure?"]


def test_calls_that_are_answered_now_are_never_left_out(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    says(wire, answered("1"), answered(None, tool_calls=CALLS), answered("Three."))
    with remembers(MESSAGES=0):
        for content in ("1?", "How much?", RESULTS):
            conversation.chat(content)
    assert [message["role"] for message in asked(wire)] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize("history", [{"MESSAGES": -1}, {"LINES": 3}, {"MESSAGES": 1, "TOKENS": 1}])
def test_unclear_policy_is_refused(history: dict[str, int]) -> None:
    conversation = Conversation.objects.create()
    with remembers(**history), pytest.raises(ConfigurationError, match="HISTORY"):
        conversation.chat("One?")
    assert not LLMRequest.objects.exists()


# --- who may ---------------------------------------------------------------------------------


def staff_only(user: User, conversation: Conversation) -> bool:
    return user.is_staff


def test_owner_may_go_on_and_nobody_else(wire: Wire) -> None:
    ada, bob = User.objects.create(username="ada"), User.objects.create(username="bob")
    conversation = Conversation.objects.create(user=ada)
    assert (conversation.may_use(ada), conversation.may_use(bob)) == (True, False)
    assert not conversation.may_use(AnonymousUser())
    assert Conversation.objects.create().may_use(bob)
    for ask in (conversation.ask, conversation.chat, conversation.stream):
        with pytest.raises(PermissionDenied, match="bob"):
            ask("May I?", user=bob)
    assert not LLMRequest.objects.exists()
    assert conversation.ask("May I?", user=ada).user == ada


def test_permission_may_be_a_function_of_yours(wire: Wire) -> None:
    ada = User.objects.create(username="ada", is_staff=True)
    conversation = Conversation.objects.create(user=User.objects.create(username="bob"))
    rule = f"{__name__}.staff_only"
    with override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "MAY_USE_CONVERSATION": rule}):
        assert conversation.ask("May I?", user=ada).user == ada
        with pytest.raises(PermissionDenied):
            conversation.ask("May I?", user=conversation.user)


# --- two at once -----------------------------------------------------------------------------


def begun(conversation: Conversation) -> LLMRequest:
    """A turn that another process is waiting for."""
    row = LLMRequest(via="chat", messages=[{"role": "user", "content": "?"}])
    row.conversation = conversation
    row.prepare()
    row.begin(now=timezone.now(), seconds=60)
    return row


def test_turn_waits_for_the_one_before_it_and_not_for_ever(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    before = begun(conversation)
    with pytest.raises(ConversationBusy, match=str(before.uuid)):
        conversation.chat("Now?", patience=0)
    assert LLMRequest.objects.get() == before
    # Unless its process has died over it.
    LLMRequest.objects.update(deadline_at=timezone.now())
    says(wire, answered("Yes."))
    assert conversation.chat("Now?", patience=0).completion == "Yes."


@pytest.mark.django_db(transaction=True)
def test_turn_that_waited_knows_the_one_before_it(wire: Wire) -> None:
    conversation = Conversation.objects.create()
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        is_asked.set()
        assert may_answer.wait(10)
        return answered("1")

    wire.hosts["provider.test"] = answer
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(in_a_thread, conversation.chat, "One?")
        assert is_asked.wait(10)
        second = threads.submit(in_a_thread, conversation.chat, "Two?")
        may_answer.set()
        first.result()
        second.result()
    assert [message["content"] for message in asked(wire)] == ["One?", "1", "Two?"]


def in_a_thread(work: Callable[..., Any], *args: Any) -> Any:
    try:
        return work(*args)
    finally:
        connections.close_all()


@pytest.mark.django_db(transaction=True)
def test_two_writers_write_200_lines_in_order(wire: Wire) -> None:
    conversation = Conversation.objects.create(system="Count.")

    def answer(request: httpx.Request) -> httpx.Response:
        [*_, question] = json.loads(request.content)["messages"]
        return answered(f"answer to {question['content']}")

    wire.hosts["provider.test"] = answer

    def write(name: str) -> None:
        for number in range(50):
            conversation.chat(f"{name}{number}")

    with ThreadPoolExecutor(2) as threads:
        for writing in [threads.submit(in_a_thread, write, name) for name in "ab"]:
            writing.result()
    lines = conversation.history()
    assert len(lines) == 200
    questions, answers = lines[::2], lines[1::2]
    assert [f"answer to {each['content']}" for each in questions] == [a["content"] for a in answers]
    for name in "ab":
        own = [each["content"] for each in questions if each["content"][0] == name]
        assert own == [f"{name}{number}" for number in range(50)]
    # Each turn was asked with all that was said before it, and nothing in between.
    for place, row in enumerate(conversation.llm_requests.order_by("id")):
        assert row.messages[1:-1] == lines[: 2 * place]


@pytest.mark.django_db(transaction=True)
def test_durable_questions_at_once_are_written_one_after_the_other(
    qstash: FakeQStash, answer: Callable[..., None]
) -> None:
    conversation = Conversation.objects.create()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: in_a_thread(conversation.ask, f"{n}?"), range(8)))
    assert conversation.llm_requests.count() == 8
