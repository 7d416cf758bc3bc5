from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User

from django_qstash_llm.models import Conversation, LLMRequest
from django_qstash_llm.qstash import Callback
from tests.conftest import ANSWER

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
