"""What is kept of a prompt. When it goes by age is in test_purge.py."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from django.conf import settings
from django.test import override_settings
from django.utils import timezone
from django.utils.translation import gettext_lazy

from django_qstash_llm.exceptions import ConfigurationError
from django_qstash_llm.models import Conversation, LLMRequest
from django_qstash_llm.models.forgetting import (
    asked,
    changes_at_end,
    changes_when_finished,
    digest_of,
)
from tests.wire import FakeQStash

MESSAGES = [{"role": "user", "content": "Grüße an Ada 🦜"}]


def storing(how: Any) -> override_settings:
    return override_settings(QSTASH_LLM={**settings.QSTASH_LLM, "STORE_MESSAGES": how})


def test_messages_stay_unless_asked_otherwise() -> None:
    assert changes_when_finished(MESSAGES, timezone.now()) == {}


def test_hashed_keeps_the_digest_only() -> None:
    now = timezone.now()
    with storing("hashed"):
        assert changes_when_finished(MESSAGES, now) == {
            "messages": [],
            "parameters": {},
            "digest": digest_of(MESSAGES),
            "forgotten_at": now,
        }


def test_none_keeps_not_even_a_digest() -> None:
    now = timezone.now()
    with storing("none"):
        assert changes_when_finished(MESSAGES, now) == {
            "messages": [],
            "parameters": {},
            "digest": "",
            "forgotten_at": now,
        }


@pytest.mark.parametrize("how", ["full", "hashed", "none"])
def test_what_is_forgotten_already_is_not_forgotten_again(how: str) -> None:
    with storing(how):
        assert changes_when_finished([], timezone.now()) == {}


@pytest.mark.parametrize("how", ["Hashed", "", None, "partly", True])
def test_a_setting_that_is_none_of_the_three_is_named_and_nothing_is_guessed(how: Any) -> None:
    with storing(how), pytest.raises(ConfigurationError, match=r"STORE_MESSAGES.*'hashed'"):
        changes_when_finished(MESSAGES, timezone.now())


def test_the_digest_is_computed_as_documented() -> None:
    canonical = '[{"content":"Grüße an Ada 🦜","role":"user"}]'
    assert digest_of(MESSAGES) == hashlib.sha256(canonical.encode()).hexdigest()
    written = json.dumps(MESSAGES, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert written == canonical


@pytest.mark.parametrize(
    "same",
    [
        [{"content": "Hi", "role": "user", "n": 1}],
        ({"role": "user", "content": "Hi", "n": 1.0},),
        [{"role": "user", "content": gettext_lazy("Hi"), "n": 1}],
        [{"role": "user", "content": "H\x00i", "n": 1}],
    ],
)
def test_the_digest_is_of_what_is_stored_not_of_how_it_was_written(same: Any) -> None:
    assert digest_of(same) == digest_of([{"role": "user", "content": "Hi", "n": 1}])


@pytest.mark.parametrize(
    "other",
    [
        [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Hi"}],
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "Hi", "n": 1.5}],
    ],
)
def test_other_messages_have_another_digest(other: Any) -> None:
    assert digest_of(other) != digest_of([{"role": "user", "content": "Hi"}])


@pytest.mark.django_db
def test_a_prompt_is_found_by_its_digest_after_a_trip_through_the_database(
    qstash: FakeQStash,
) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Ä\ud83e\udd9c\x00"}],
            "numbers": [1.0, 1e22, -0.0, 0.1, 1e-7, 2**53, True, None],
        }
    ]
    llm_request = LLMRequest.objects.publish(messages)
    llm_request.refresh_from_db()
    with storing("hashed"):
        changes = changes_when_finished(llm_request.messages, timezone.now())
    LLMRequest.objects.filter(pk=llm_request.pk).update(**changes)
    LLMRequest.objects.publish(MESSAGES)
    assert list(asked(LLMRequest.objects.all(), messages)) == [llm_request]
    assert not asked(LLMRequest.objects.all(), MESSAGES).exists()


@pytest.mark.django_db
def test_a_request_of_a_conversation_keeps_what_was_said(qstash: FakeQStash) -> None:
    alone = LLMRequest.objects.publish(MESSAGES)
    said = Conversation.objects.create().ask("Hi")
    now = timezone.now()
    with storing("none"):
        assert changes_at_end(alone, now) == changes_when_finished(MESSAGES, now) != {}
        assert changes_at_end(said, now) == {}


@pytest.mark.django_db
def test_messages_that_stay_are_not_read(
    qstash: FakeQStash, django_assert_num_queries: Any
) -> None:
    LLMRequest.objects.publish(MESSAGES)
    llm_request = LLMRequest.objects.only("conversation").get()
    with django_assert_num_queries(0):
        assert changes_at_end(llm_request, timezone.now()) == {}
    with storing("hashed"), django_assert_num_queries(1):
        assert changes_at_end(llm_request, timezone.now())["digest"] == digest_of(MESSAGES)


@pytest.mark.django_db
def test_nothing_is_asked_while_it_is_unclear_what_is_kept(qstash: FakeQStash) -> None:
    with storing("hash"), pytest.raises(ConfigurationError, match="STORE_MESSAGES"):
        LLMRequest.objects.publish(MESSAGES)
    assert not LLMRequest.objects.exists()
