from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import httpx
import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings

from django_qstash_llm.models import LLMRequest
from django_qstash_llm.qstash import Callback

from .conftest import ANSWER
from .wire import FakeQStash

pytestmark = pytest.mark.django_db

MESSAGES = [{"role": "user", "content": "?"}]


def sweep(*arguments: str) -> str:
    out = StringIO()
    call_command("llm_sweep", *arguments, stdout=out)
    return out.getvalue()


def test_sweep_submits_and_announces_here_and_now(
    qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    done = LLMRequest.objects.publish(MESSAGES)
    answer = json.dumps(ANSWER).encode()
    post_callback(done, Callback(status=200, body=answer, source_message_id="msg_1"))
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES) for _ in range(3)])
    assert sweep() == "3 submitted, 1 announced, 0 still pending.\n"
    assert LLMRequest.objects.submitted().count() == 3
    done.refresh_from_db()
    assert done.announced_at is not None


def test_sweep_with_nothing_to_do_says_so(qstash: FakeQStash) -> None:
    assert sweep() == "0 submitted, 0 announced, 0 still pending.\n"
    assert qstash.calls == []


def test_sweep_takes_more_than_one_claim(qstash: FakeQStash) -> None:
    rows = [
        LLMRequest(messages=MESSAGES, provider="openai", model="m", retries=1) for _ in range(2010)
    ]
    LLMRequest.objects.bulk_create(rows)
    assert sweep() == "2010 submitted, 0 announced, 0 still pending.\n"


def test_sweep_that_qstash_refuses_says_what_to_look_at(qstash: FakeQStash) -> None:
    qstash.answer = lambda request: httpx.Response(401, json={"error": "invalid token"})
    LLMRequest.objects.bulk_create([LLMRequest(messages=MESSAGES)])
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()
    assert LLMRequest.objects.pending().count() == 1


@override_settings(QSTASH_TOKEN="")
def test_sweep_without_a_token_names_the_setting() -> None:
    with pytest.raises(CommandError, match="QSTASH_TOKEN"):
        sweep()


def test_sweep_of_another_database_is_named() -> None:
    assert sweep("--database", "default") == "0 submitted, 0 announced, 0 still pending.\n"
