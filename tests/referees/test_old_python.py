"""``qstash`` 2.0.5 for Python: the last that could ask Upstash's hosted models.

``old_sdk.py`` makes the calls, in a process of its own.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from django_qstash_llm.models import LLMRequest
from django_qstash_llm.server.serving import Server

from ..openai.conftest import wsgi
from ..server.conftest import TOKEN
from ..server.test_delivery import eventually
from ..server.test_sdk import Recently, Some
from .conftest import HERE, Site, completion, run_script

Run = Callable[..., Any]
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
ACCEPTED = {"message_id": Some("msg_"), "deduplicated": False}
NOTHING = dict.fromkeys(
    (
        *("url_group", "endpoint", "api", "queue", "body", "body_base64", "headers"),
        *("callback", "failure_callback", "schedule_id"),
        *("flow_control_key", "parallelism", "rate_per_second"),
    )
)


@pytest.fixture
def run(server: Server, site: Site, old_python_sdk: Path) -> Run:
    def run(section: str, *, given: str = "") -> Any:
        command = (sys.executable, HERE / "old_sdk.py", section)
        environment = {"PYTHONPATH": str(old_python_sdk), "SITE": site.url}
        return run_script(*command, url=server.url, environment=environment, given=given)

    return run


def told(now: Recently, due: Recently | None = None, **differences: Any) -> dict[str, Any]:
    return (
        NOTHING
        | {
            "message_id": Some("msg_"),
            "method": "POST",
            "headers": {"Content-Type": ["application/json"]},
            "max_retries": 3,
            "created_at": now,
            "not_before": due or now,
            "caller_ip": "127.0.0.1",
        }
        | differences
    )


def test_a_chat_with_a_hosted_model_is_answered_by_a_signed_callback(run: Run, site: Site) -> None:
    now = Recently()
    answers = run("chat")
    assert answers == {
        "publish_json": ACCEPTED,
        "get": told(now, url="api/llm", body=CHAT.decode(), callback=f"{site.url}/callback"),
        "enqueue_json": ACCEPTED,
        "batch_json": [ACCEPTED],
        "without_callback": Some("Request failed with status: 400, body: "),
    }
    eventually(lambda: len(site.to("/callback")) == 3)
    asked = site.to("/v1/chat/completions")
    assert [each.body for each in asked] == [CHAT] * 3
    for each in asked:
        # A provider's own key, and nothing of QStash.
        assert each.headers["Authorization"] == "Bearer hosted-key"
        assert not [name for name in each.headers if name.lower().startswith("upstash-")]
    callbacks = site.to("/callback")
    envelopes = [json.loads(each.body) for each in callbacks]
    given = answers["publish_json"], answers["enqueue_json"], *answers["batch_json"]
    ids = {each["message_id"] for each in given}
    assert {envelope["sourceMessageId"] for envelope in envelopes} == ids
    for envelope in envelopes:
        assert (envelope["status"], envelope["url"]) == (200, "api/llm")
        assert json.loads(base64.b64decode(envelope["body"])) == completion("m", "hi")
        assert base64.b64decode(envelope["sourceBody"]) == CHAT
    came = [
        {
            "signature": each.headers["Upstash-Signature"],
            "body": each.body.decode(),
            "url": f"{site.url}/callback",
        }
        for each in callbacks
    ]
    verdict = run("verify", given=json.dumps(came))
    assert verdict["verified"] == [None] * 3
    assert all(isinstance(reason, str) for reason in verdict["refused"])


def test_a_chat_with_a_hosted_model_is_answered_at_once(
    old_python_sdk: Path, site: Site, settings: Any, transactional_db: None
) -> None:
    """By the OpenAI-compatible endpoint, with QStash's token for a key."""
    settings.ROOT_URLCONF = "tests.openai.urls_of_qstash"
    settings.QSTASH_TOKEN = TOKEN
    settings.QSTASH_LLM = {
        **settings.QSTASH_LLM,
        "OPENAI_TAKES_QSTASH_TOKEN": True,
        "CHAT_TRANSPORT": None,
        "PROVIDERS": {"upstash": {"BASE_URL": site.url}, "openai": {"API_KEY": "not-asked-at-all"}},
    }
    command = (sys.executable, HERE / "old_sdk.py", "immediate")
    environment = {"PYTHONPATH": str(old_python_sdk), "SITE": site.url}
    with wsgi() as url:
        answers = run_script(*command, url=url, environment=environment)
    for way in ("create", "prompt"):
        [choice] = answers[way]["choices"]
        assert choice["message"]["content"] == "hi to you too."
        assert answers[way]["usage"]["total_tokens"] == 5
        said = [each["choices"][0]["delta"]["content"] for each in answers[f"{way} streamed"]]
        assert said == ["hi", " to you too.", None]
    assert (
        list(LLMRequest.objects.values_list("provider", "state", "completion"))
        == [("upstash", "completed", "hi to you too.")] * 4
    )


def test_other_providers_are_called_at_their_own_urls(run: Run, site: Site) -> None:
    now, due = Recently(), Recently(3600)
    shared = {"body": CHAT.decode(), "callback": f"{site.url}/callback"}
    json_with = {"Content-Type": ["application/json"]}
    assert run("providers") == {
        "openai": told(
            now,
            due,
            url="https://api.openai.com/v1/chat/completions",
            headers=json_with | {"Authorization": ["Bearer sk-1"]},
            **shared,
        ),
        "custom": told(
            now,
            due,
            url="https://a.test/v1/chat/completions",
            headers=json_with | {"Authorization": ["Bearer c"]},
            **shared,
        ),
    }


def test_messages_are_told_whole_and_cancelled(run: Run, site: Site) -> None:
    now, due = Recently(), Recently(3600)
    answers = run("messages")
    later, callback = f"{site.url}/later", f"{site.url}/callback"
    assert answers == {
        "publish_json": ACCEPTED,
        "get": told(
            now,
            due,
            url=later,
            method="PUT",
            body='{"n": 1}',
            headers={"Content-Type": ["application/json"], "X-Trace": ["t"]},
            callback=callback,
            failure_callback=callback,
            max_retries=2,
        ),
        "again": {"message_id": answers["publish_json"]["message_id"], "deduplicated": True},
        "enqueue_json": ACCEPTED,
        "enqueued": told(now, url=later, body='{"n": 2}', queue="q"),
        "batch_json": [ACCEPTED, ACCEPTED],
        "cancel": None,
        "cancel_many": 1,
        "cancel_all": 0,
    }


def test_dead_letters_and_events_are_told_whole(run: Run, site: Site) -> None:
    now = Recently()
    answers = run("dead_letters")
    letter = answers["get"]
    assert letter == told(
        now,
        url=f"{site.url}/busy",
        body='{"n": 1}',
        max_retries=0,
        dlq_id=letter["dlq_id"],
        response_status=503,
        response_headers=letter["response_headers"],
        response_body='{"error": "busy"}',
        response_body_base64=None,
    )
    assert letter["response_headers"]["Content-Type"] == ["application/json"]
    events = answers.pop("events")
    assert answers == {
        "list": {"cursor": None, "messages": [letter]},
        "get": letter,
        "delete": None,
        "pages": [1, 1, None],
        "delete_many": 2,
        "empty": {"cursor": None, "messages": []},
        "states": 3,
    }
    nothing = ("error", "next_delivery_time", "url_group", "endpoint", "api", "queue")
    event = dict.fromkeys((*nothing, "schedule_id", "body_base64")) | {
        "time": now,
        "message_id": letter["message_id"],
        "url": f"{site.url}/busy",
        "headers": {"Content-Type": ["application/json"]},
    }
    states = ("FAILED", "ERROR", "ACTIVE", "CREATED")
    assert events == {"cursor": None, "events": [event | {"state": each} for each in states]}
