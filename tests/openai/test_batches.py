"""Files and batches, by the official client and as HTTP has them."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import openai
import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from django_qstash_llm.conf import app_settings
from django_qstash_llm.models import (
    ApiKey,
    Batch,
    BatchInput,
    File,
    FilePart,
    KeptAnswer,
    LLMRequest,
)
from django_qstash_llm.models.batch_input import WINDOW
from django_qstash_llm.models.intake import Intake
from django_qstash_llm.models.purge import Purge
from django_qstash_llm.qstash import Callback
from django_qstash_llm.tasks import sweep
from tests.conftest import ANSWER
from tests.test_readme import example
from tests.wire import FakeQStash, Wire

from .conftest import ASK, PROVIDER
from .test_views import ours, refused

pytestmark = pytest.mark.django_db(transaction=True)

NOBODYS = "0" * 32
ENDPOINT: Any = "/v1/chat/completions"
FILES, BATCHES = "/openai/v1/files", "/openai/v1/batches"


def line(
    custom_id: Any = "a", *, changed: dict[str, Any] | None = None, **body: Any
) -> dict[str, Any]:
    asked = {"model": "gpt-5.4-mini", "messages": ASK, **body}
    whole = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": asked}
    return {**whole, **(changed or {})}


def jsonl(*lines: Any) -> bytes:
    return b"".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines
    )


def read(content: Any) -> list[Any]:
    return [json.loads(each) for each in content.read().splitlines()]


def answers(wire: Wire) -> None:
    """A provider who knows some models, and repeats what it was asked."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if asked["model"] == "gone":
            error = {
                "message": "no such model",
                "type": "x",
                "param": None,
                "code": "model_not_found",
            }
            return httpx.Response(404, json={"error": error})
        said = {**ANSWER, "system_fingerprint": "fp", "echo": asked.get("user")}
        return httpx.Response(200, json=said)

    wire.hosts[PROVIDER] = answer


@pytest.fixture
def ai(site: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site}/openai/v1", api_key=key, max_retries=0) as client:
        yield client


class Calls:
    """Without a server between: what one caller asks and is answered."""

    def __init__(self, client: Client, key: str) -> None:
        self.client = client
        self.headers = {"Authorization": f"Bearer {key}"}

    def upload(
        self, content: bytes, *, headers: dict[str, str] | None = None, **fields: Any
    ) -> Any:
        file = io.BytesIO(content)
        file.name = fields.pop("filename", "asked.jsonl")
        form = {"purpose": "batch", "file": file, **fields}
        return self.client.post(FILES, form, headers={**self.headers, **(headers or {})})

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        given = {**self.headers, **{name.replace("_", "-"): each for name, each in headers.items()}}
        return self.client.post(path, body or {}, "application/json", headers=given)

    def begin(self, *lines: Any, **fields: Any) -> Any:
        file_id = self.upload(jsonl(*lines)).json()["id"]
        return self.post(BATCHES, batch_of(file_id, **fields)).json()

    def get(self, path: str) -> Any:
        return self.client.get(path, headers=self.headers)

    def delete(self, path: str) -> Any:
        return self.client.delete(path, headers=self.headers)

    def batch(self, name: str) -> Any:
        return self.get(f"{BATCHES}/{name}").json()

    def content(self, name: str) -> list[Any]:
        response = self.get(f"{FILES}/{name}/content")
        return [json.loads(each) for each in b"".join(response.streaming_content).splitlines()]


def batch_of(file_id: str, **fields: Any) -> dict[str, Any]:
    whole = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    return {**whole, **fields}


@pytest.fixture
def calls(client: Client, key: str) -> Calls:
    return Calls(client, key)


@pytest.fixture
def another(client: Client) -> Calls:
    return Calls(client, ApiKey.objects.issue("another")[1])


# --- the whole trip ------------------------------------------------------------------------------


def test_a_batch_from_its_file_to_its_answers(ai: openai.OpenAI, wire: Wire) -> None:
    answers(wire)
    lines = [
        line("first", user="u-1"),
        line("second", model="gone"),
        line("third", messages=[]),
        line("fourth", model="nobody/x", messages=ASK, temperature=0.5),
    ]
    file = ai.files.create(file=("moons.jsonl", jsonl(*lines)), purpose="batch")
    assert (file.filename, file.purpose, file.bytes) == ("moons.jsonl", "batch", len(jsonl(*lines)))
    assert file.status == "processed"
    assert file.expires_at == file.created_at + 30 * 86_400
    assert ai.files.content(file.id).read() == jsonl(*lines)

    begun = ai.batches.create(
        input_file_id=file.id,
        endpoint=ENDPOINT,
        completion_window="24h",
        metadata={"night": "7"},
    )
    batch = ai.batches.retrieve(begun.id)
    assert batch.to_dict()["errors"] is None
    assert (batch.status, batch.input_file_id, batch.endpoint) == ("completed", file.id, ENDPOINT)
    assert batch.metadata == {"night": "7"}
    assert batch.request_counts
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert batch.usage
    assert (batch.usage.input_tokens, batch.usage.total_tokens) == (18, 24)
    assert batch.in_progress_at
    assert batch.completed_at
    assert batch.expires_at == batch.created_at + 86_400

    assert batch.output_file_id
    assert batch.error_file_id
    rows = {row.metadata["custom_id"]: row for row in LLMRequest.objects.all()}
    answered = read(ai.files.content(batch.output_file_id))
    assert [each["custom_id"] for each in answered] == ["first", "fourth"]
    assert answered[0] == {
        "id": f"batch_req_{rows['first'].uuid.hex}",
        "custom_id": "first",
        "response": {
            "status_code": 200,
            "request_id": str(rows["first"].uuid),
            # As the provider gave it, its own fields and all.
            "body": {**ANSWER, "system_fingerprint": "fp", "echo": "u-1"},
        },
        "error": None,
    }
    gone, empty = read(ai.files.content(batch.error_file_id))
    assert (gone["custom_id"], gone["error"]) == ("second", None)
    assert gone["response"]["status_code"] == 404
    assert gone["response"]["body"]["error"]["message"] == "no such model"
    assert (empty["custom_id"], empty["response"]["status_code"]) == ("third", 400)
    assert empty["response"]["body"]["error"]["param"] == "messages"

    sizes = {each.id: each.bytes for each in ai.files.list(purpose="batch_output")}
    for name in (batch.output_file_id, batch.error_file_id):
        assert sizes[name] == len(ai.files.content(name).read())
    [listed] = ai.batches.list()
    assert listed == batch
    sent = [json.loads(request.content) for request in wire.to(PROVIDER)]
    assert {"model": "gpt-5.4-mini", "messages": ASK, "user": "u-1"} in sent
    assert {"model": "nobody/x", "messages": ASK, "temperature": 0.5} in sent
    assert Batch.objects.get().counts()["completed"] == 2
    # Whoever wants one of them alone has it too.
    assert ai.chat.completions.retrieve(str(rows["first"].uuid)).choices[0].message.content


def test_the_async_client(site: str, key: str, wire: Wire) -> None:
    answers(wire)

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{site}/openai/v1", api_key=key) as client:
            file = await client.files.create(file=io.BytesIO(jsonl(line("x"))), purpose="batch")
            create = client.batches.create
            begun = await create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
            batch = await client.batches.retrieve(begun.id)
            assert batch.output_file_id
            content = await client.files.content(batch.output_file_id)
            said = [each["custom_id"] for each in map(json.loads, content.text.splitlines())]
            batches = [each.id async for each in client.batches.list(limit=1)]
            deleted = await client.files.delete(file.id)
            files = [each.id async for each in client.files.list()]
            return [said, batches == [batch.id], deleted.deleted, files == [batch.output_file_id]]

    assert asyncio.run(ask()) == [["x"], True, True, True]


def test_the_example_of_the_readme_runs_as_it_stands(
    wsgi_site: str, key: str, wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(wire)
    with openai.OpenAI(base_url=f"{wsgi_site}/openai/v1", api_key=key) as client:
        exec(example("client.batches.create"), {"client": client})  # noqa: S102
    told = [json.loads(each) for each in capsys.readouterr().out.splitlines() if each]
    assert [each["custom_id"] for each in told] == ["Io", "Europa", "Callisto"]


def test_a_provider_with_words_of_its_own_answers_in_openais(calls: Calls, wire: Wire) -> None:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [{"type": "text", "text": "Io."}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "output_tokens": 2},
    }
    wire.hosts["anthropic.test"] = lambda request: httpx.Response(200, json=message)
    begun = calls.begin(line("a", model="anthropic/claude-haiku-4-5", max_tokens=9))
    [answered] = calls.content(calls.batch(begun["id"])["output_file_id"])
    body = answered["response"]["body"]
    assert (body["object"], body["id"]) == ("chat.completion", "msg_1")
    assert body["choices"][0]["message"]["content"] == "Io."
    assert body["choices"][0]["finish_reason"] == "stop"


# --- under way -----------------------------------------------------------------------------------


def test_progress_is_seen_while_it_is_asked(
    calls: Calls, qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    begun = calls.begin(line("a"), line("b"))
    assert begun["status"] in ("validating", "in_progress")
    batch = calls.batch(begun["id"])
    assert batch["status"] == "in_progress"
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    assert (batch["output_file_id"], batch["completed_at"]) == (None, None)
    assert len(qstash.messages) == 2
    first, second = LLMRequest.objects.order_by("pk")
    body = json.dumps(ANSWER).encode()
    post_callback(first, Callback(status=200, body=body, source_message_id="msg_1"))
    assert calls.batch(begun["id"])["request_counts"]["completed"] == 1
    post_callback(second, Callback(status=200, body=body, source_message_id="msg_2"))
    # Noticed by the sweep too, where nobody asks.
    sweep()
    batch_input = BatchInput.objects.get()
    second.refresh_from_db()
    assert (batch_input.status, batch_input.ended_at) == ("completed", second.finished_at)


def test_a_batch_is_cancelled_as_far_as_it_is_not_answered(
    ai: openai.OpenAI, qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    file = ai.files.create(file=jsonl(line("a"), line("b"), line("c")), purpose="batch")
    begun = ai.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    first, *_ = LLMRequest.objects.order_by("pk")
    body = json.dumps(ANSWER).encode()
    post_callback(first, Callback(status=200, body=body, source_message_id="msg_1"))
    cancelled = ai.batches.cancel(begun.id)
    assert cancelled.status in ("cancelling", "cancelled")
    assert cancelled.cancelling_at
    batch = ai.batches.retrieve(begun.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at
    assert qstash.cancelled == ["msg_2", "msg_3"]
    assert batch.output_file_id
    assert batch.error_file_id
    assert [each["custom_id"] for each in read(ai.files.content(batch.output_file_id))] == ["a"]
    left = read(ai.files.content(batch.error_file_id))
    assert [(each["custom_id"], each["response"]) for each in left] == [("b", None), ("c", None)]
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    # Once more changes nothing.
    assert ai.batches.cancel(begun.id) == batch


def test_what_is_over_cannot_be_cancelled(ai: openai.OpenAI, wire: Wire) -> None:
    answers(wire)
    file = ai.files.create(file=jsonl(line("a")), purpose="batch")
    begun = ai.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    with pytest.raises(openai.ConflictError, match="completed"):
        ai.batches.cancel(begun.id)


def test_a_batch_that_nobody_has_read_is_cancelled_with_nothing_asked(
    calls: Calls, qstash: FakeQStash, settings: Any
) -> None:
    settings.CELERY_TASK_ALWAYS_EAGER = False
    begun = unread(calls)
    assert calls.batch(begun["id"])["status"] == "validating"
    batch_input = BatchInput.objects.get()
    BatchInput.objects.update(cancelling_at=timezone.now())
    assert calls.batch(begun["id"])["status"] == "cancelled"
    Intake().run()
    assert not LLMRequest.objects.exists()
    batch_input.refresh_from_db()
    assert (batch_input.answers_uuid, batch_input.errors_uuid) == (None, None)


def unread(calls: Calls, *lines: Any) -> Any:
    """A batch as it is before a worker has seen to it."""
    begun = calls.begin(*(lines or (line("a"),)))
    LLMRequest.objects.all().delete()
    BatchInput.objects.update(
        total=None, read=0, in_progress_at=None, ended_at=None, answers_uuid=None, errors_uuid=None
    )
    return begun


def test_what_is_not_answered_within_its_window_expires(calls: Calls, qstash: FakeQStash) -> None:
    begun = calls.begin(line("a"))
    later = timezone.now() + WINDOW + timedelta(seconds=1)
    Intake(clock=lambda: later).run()
    batch = calls.batch(begun["id"])
    assert batch["status"] == "expired"
    assert batch["expired_at"] >= batch["expires_at"]
    assert qstash.cancelled == ["msg_1"]
    [left] = calls.content(batch["error_file_id"])
    assert (left["response"], left["error"]["code"]) == (None, "batch_expired")


def test_while_qstash_cannot_be_told_a_batch_is_cancelling(
    calls: Calls, qstash: FakeQStash
) -> None:
    begun = calls.begin(line("a"))
    qstash.answer = lambda request: httpx.Response(500)
    assert calls.post(f"{BATCHES}/{begun['id']}/cancel").json()["status"] == "cancelling"
    qstash.answer = None
    sweep()
    assert calls.batch(begun["id"])["status"] == "cancelled"


def test_what_failed_and_was_asked_again_stands_once(
    calls: Calls, qstash: FakeQStash, post_callback: Callable[..., Any]
) -> None:
    begun = calls.begin(line("a"), line("b", messages=[]))
    row = LLMRequest.objects.earliest("pk")
    error = b'{"error": {"message": "no", "code": "x"}}'
    post_callback(row, Callback(status=400, body=error, source_message_id="msg_1"))
    batch = calls.batch(begun["id"])
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    assert batch["output_file_id"] is None
    [again] = Batch.objects.get().resubmit_failed()  # and not what was never to be asked
    body = json.dumps(ANSWER).encode()
    post_callback(again, Callback(status=200, body=body, source_message_id="msg_2"))
    assert calls.batch(begun["id"])["request_counts"]["completed"] == 1
    assert [each["custom_id"] for each in calls.content(batch["error_file_id"])] == ["b"]


# --- files that are none of a batch --------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code", "at", "param"),
    [
        ([b"{\n"], "invalid_json_line", 1, None),
        ([line("a"), b"\n", b"[1]\n"], "invalid_json_line", 3, None),
        ([b"\xff\n"], "invalid_json_line", 1, None),
        ([b'{"custom_id": "a", "custom_id": "b"}\n'], "invalid_json_line", 1, None),
        ([b"[" * 100_000], "invalid_json_line", 1, None),
        ([line("a"), line("b"), line("a")], "duplicate_custom_id", 3, "custom_id"),
        ([line(None)], "missing_required_parameter", 1, "custom_id"),
        ([line(7)], "invalid_value", 1, "custom_id"),
        ([line("")], "invalid_value", 1, "custom_id"),
        ([line("a\x00")], "invalid_value", 1, "custom_id"),
        ([line("\ud800")], "invalid_value", 1, "custom_id"),
        ([line("x" * 513)], "invalid_value", 1, "custom_id"),
        ([line(changed={"method": "GET"})], "invalid_method", 1, "method"),
        ([line(changed={"url": "/v1/embeddings"})], "url_mismatch", 1, "url"),
        ([line(changed={"body": []})], "invalid_value", 1, "body"),
        ([line(changed={"body": None})], "missing_required_parameter", 1, "body"),
        ([b"\n \r\n"], "empty_file", None, None),
    ],
)
def test_a_file_that_is_none_of_a_batch_fails_it_with_nothing_asked(
    calls: Calls, qstash: FakeQStash, lines: list[Any], code: str, at: int | None, param: str | None
) -> None:
    batch = calls.batch(calls.begin(*lines)["id"])
    [error] = batch["errors"]["data"]
    assert (batch["status"], batch["errors"]["object"]) == ("failed", "list")
    assert batch["failed_at"]
    assert (error["code"], error["line"], error["param"]) == (code, at, param)
    assert error["message"]
    assert not LLMRequest.objects.exists()
    assert batch["request_counts"]["total"] == 0


def test_every_wrong_line_is_told_and_not_too_many(calls: Calls, qstash: FakeQStash) -> None:
    batch = calls.batch(calls.begin(line("fine"), *[b"{\n"] * 150)["id"])
    *told, last = batch["errors"]["data"]
    assert [each["line"] for each in told] == list(range(2, 102))
    assert "150" in last["message"]


def test_a_batch_may_have_too_many_lines(calls: Calls, qstash: FakeQStash) -> None:
    with ours(OPENAI_MAX_BATCH_LINES=2):
        assert calls.batch(calls.begin(line("a"), line("b"))["id"])["errors"] is None
        batch = calls.batch(calls.begin(line("a"), line("b"), line("c"))["id"])
    [error] = batch["errors"]["data"]
    assert (error["code"], error["line"]) == ("too_many_tasks", 3)
    assert "2" in error["message"]


def test_a_line_may_be_too_long(calls: Calls, qstash: FakeQStash) -> None:
    with ours(OPENAI_MAX_BODY_BYTES=300):
        batch = calls.batch(calls.begin(line("a"), line("b", user="u" * 300))["id"])
    [error] = batch["errors"]["data"]
    assert (error["code"], error["line"]) == ("line_too_long", 2)
    assert "300 bytes" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": None}, 400, "invalid_value", "model"),
        ({"model": "openai/secret"}, 404, "model_not_found", "model"),
        ({"messages": "text"}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "\x00"}]},
            400,
            "invalid_value",
            "messages[0].content",
        ),
        ({"stream": True}, 400, "invalid_value", "stream"),
        ({"api_key": "sk-of-the-caller"}, 400, "invalid_value", "api_key"),
        ({"models": ["openai/secret"]}, 400, "invalid_value", "models"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"user": "u" * 1_000_001}, 400, "invalid_value", "messages"),
    ],
)
def test_a_line_that_cannot_be_asked_fails_by_itself(
    client: Client, wire: Wire, body: Any, status: int, code: str, param: str
) -> None:
    answers(wire)
    _, key = ApiKey.objects.issue("some", allowed_models=["gpt-5.4-mini"])
    calls = Calls(client, key)
    batch = calls.batch(calls.begin(line("wrong", **body), line("right"))["id"])
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    [wrong] = calls.content(batch["error_file_id"])
    error = wrong["response"]["body"]["error"]
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("wrong", status)
    assert (error["code"], error["param"]) == (code, param)
    assert set(error) == {"message", "type", "param", "code"}
    # It cannot be asked by anybody later, as what it is or as something else.
    assert Batch.objects.get().resubmit_failed() == []
    assert len(wire.to(PROVIDER)) == 1


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"purpose": "assistants"}, 400, "purpose"),
        ({"purpose": ""}, 400, "purpose"),
        ({"file": "text"}, 400, "file"),
        ({"expires_after[anchor]": "created_at"}, 400, "expires_after[seconds]"),
        ({"expires_after[seconds]": "7200"}, 400, "expires_after[anchor]"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            400,
            "expires_after[seconds]",
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "9" * 5000},
            400,
            "expires_after[seconds]",
        ),
    ],
)
def test_an_upload_that_is_wrong_leaves_no_trace(
    calls: Calls, fields: dict[str, str], status: int, param: str
) -> None:
    refused(calls.upload(b"{}\n", **fields), status, "invalid_value", param)
    assert not File.objects.exists()


def test_an_upload_is_a_form_with_a_file(calls: Calls) -> None:
    refused(calls.upload(b""), 400, "invalid_value", "file")
    refused(calls.post(FILES, {"purpose": "batch"}), 415, "unsupported_media_type")
    boundless = {"content_type": "multipart/form-data", "headers": calls.headers}
    refused(calls.client.generic("POST", FILES, b"x", **boundless), 400, "invalid_json")
    endless = "multipart/form-data; boundary=b"
    response = calls.client.generic("POST", FILES, b"--b\r\n", endless, headers=calls.headers)
    refused(response, 400, "invalid_value", "purpose")
    assert not File.objects.exists()


def test_a_file_may_be_too_large(calls: Calls, site: str, key: str) -> None:
    with ours(OPENAI_MAX_FILE_BYTES=1000):
        assert "1000" in refused(calls.upload(b"x" * 1001), 413, "request_too_large")
        assert "bytes" in refused(calls.upload(b"x" * 200_000), 413, "request_too_large")
        assert calls.upload(b"x" * 1000).status_code == 200
        # Over a socket, where it is refused before it has all come.
        client = openai.OpenAI(base_url=f"{site}/openai/v1", api_key=key, max_retries=0)
        with client, pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=b"x" * 1001, purpose="batch")
    assert caught.value.status_code == 413
    assert File.objects.count() == 1


def test_a_file_of_several_parts_is_what_it_was(calls: Calls, qstash: FakeQStash) -> None:
    content = jsonl(*(line(f"{at}", user="ü" * at) for at in range(2000)))
    name = calls.upload(content).json()["id"]
    response = calls.get(f"{FILES}/{name}/content")
    assert b"".join(response.streaming_content) == content
    assert FilePart.objects.count() > 10
    file = File.objects.get()
    assert b"".join(text + b"\n" for _, text in file.lines(longest=10**6) if text) == content
    assert next(at for at, text in file.lines(longest=9_000) if text is None) > 1000


def test_files_are_listed_in_pages(calls: Calls, another: Calls) -> None:
    names = [calls.upload(b"{}").json()["id"] for _ in range(5)]
    another.upload(b"{}")

    def listed(query: str) -> list[int]:
        page = calls.get(f"{FILES}?{query}").json()
        found = [names.index(each["id"]) for each in page["data"]]
        assert page["last_id"] == (names[found[-1]] if found else None)
        return [*found, *(["more"] if page["has_more"] else [])]  # type: ignore[list-item]

    assert listed("") == [4, 3, 2, 1, 0]
    assert listed("order=asc&limit=2") == [0, 1, "more"]
    assert listed(f"limit=2&after={names[4]}") == [3, 2, "more"]
    assert listed(f"order=asc&limit=2&after={names[2]}") == [3, 4]
    assert listed("purpose=batch_output") == []


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (f"{FILES}?limit=0", "limit"),
        (f"{FILES}?limit=10001", "limit"),
        (f"{FILES}?limit=²", "limit"),
        (f"{FILES}?order=up", "order"),
        (f"{FILES}?after=file-x", "after"),
        (f"{BATCHES}?limit=101", "limit"),
        (f"{BATCHES}?after=batch_{NOBODYS}", "after"),
    ],
)
def test_a_page_that_is_none_is_refused(calls: Calls, path: str, param: str) -> None:
    refused(calls.get(path), 400, "invalid_value", param)


def test_a_file_is_gone_when_it_is_deleted(calls: Calls, qstash: FakeQStash) -> None:
    name = calls.upload(jsonl(line("a"))).json()["id"]
    batch = calls.post(BATCHES, batch_of(name)).json()
    told = {"id": name, "object": "file", "deleted": True}
    assert calls.delete(f"{FILES}/{name}").json() == told
    for path in (f"{FILES}/{name}", f"{FILES}/{name}/content"):
        refused(calls.get(path), 404, "not_found")
    refused(calls.delete(f"{FILES}/{name}"), 404, "not_found")
    assert not FilePart.objects.exists()
    assert calls.batch(batch["id"])["input_file_id"] == name
    assert LLMRequest.objects.count() == 1


def test_a_file_that_is_deleted_before_it_is_read_fails_its_batch(
    calls: Calls, qstash: FakeQStash
) -> None:
    begun = unread(calls)
    File.objects.all().delete()
    sweep()
    batch = calls.batch(begun["id"])
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "file_not_found")


def test_files_expire(calls: Calls) -> None:
    policy = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    told = calls.upload(b"{}", **policy).json()
    assert told["expires_at"] == told["created_at"] + 3600
    File.objects.update(expires_at=timezone.now())
    refused(calls.get(f"{FILES}/{told['id']}"), 404, "not_found")
    refused(calls.post(BATCHES, batch_of(told["id"])), 400, "invalid_value", "input_file_id")
    sweep()
    assert not File.objects.exists()


# --- asking for a batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"input_file_id": f"file-{NOBODYS}"}, "input_file_id"),
        ({"input_file_id": "file-../x"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "\x00"}}, "metadata.a"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after[seconds]",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": "9" * 5000}},
            "output_expires_after[seconds]",
        ),
        ({"output_expires_after": 7}, "output_expires_after[anchor]"),
        ({"output_expires_after": {}}, "output_expires_after[anchor]"),
        ({"output_expires_after": ""}, "output_expires_after[anchor]"),
        ({"output_expires_after": False}, "output_expires_after[anchor]"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_a_batch_that_cannot_be_begun_is_refused_with_the_field(
    calls: Calls, qstash: FakeQStash, fields: dict[str, Any], param: str
) -> None:
    name = calls.upload(jsonl(line("a"))).json()["id"]
    refused(calls.post(BATCHES, batch_of(name, **fields)), 400, "invalid_value", param)
    assert not Batch.objects.exists()


def test_what_a_batch_answered_is_kept_as_long_as_is_said(calls: Calls, wire: Wire) -> None:
    answers(wire)
    policy = {"anchor": "created_at", "seconds": 7200}
    begun = calls.begin(line("a"), output_expires_after=policy)
    name = calls.batch(begun["id"])["output_file_id"]
    told = calls.get(f"{FILES}/{name}").json()
    assert told["expires_at"] == told["created_at"] + 7200


def test_of_others_nobody_sees_or_uses_anything(calls: Calls, another: Calls, wire: Wire) -> None:
    answers(wire)
    begun = calls.begin(line("a"))
    batch = calls.batch(begun["id"])
    for name in (batch["input_file_id"], batch["output_file_id"]):
        refused(another.get(f"{FILES}/{name}"), 404, "not_found")
        refused(another.get(f"{FILES}/{name}/content"), 404, "not_found")
        refused(another.delete(f"{FILES}/{name}"), 404, "not_found")
    refused(
        another.post(BATCHES, batch_of(batch["input_file_id"])),
        400,
        "invalid_value",
        "input_file_id",
    )
    refused(another.get(f"{BATCHES}/{batch['id']}"), 404, "not_found")
    refused(another.post(f"{BATCHES}/{batch['id']}/cancel"), 404, "not_found")
    assert another.get(FILES).json()["data"] == another.get(BATCHES).json()["data"] == []
    assert len(calls.get(FILES).json()["data"]) == 2


def test_a_key_is_for_its_scopes(client: Client, calls: Calls) -> None:
    looks = Calls(client, ApiKey.objects.issue("chats", scopes=["chat"])[1])
    assert "files" in refused(looks.upload(b"{}"), 403, "insufficient_permissions")
    assert "batches" in refused(looks.get(BATCHES), 403, "insufficient_permissions")
    assert not File.objects.exists()


def test_a_key_that_has_ended_asks_no_more(calls: Calls, qstash: FakeQStash) -> None:
    begun = unread(calls)
    key = ApiKey.objects.get()
    key.revoke()
    sweep()
    assert BatchInput.objects.get(batch__uuid=UUID(begun["id"].removeprefix("batch_"))).errors[0][
        "code"
    ] == ("insufficient_permissions")
    assert not LLMRequest.objects.exists()


def test_a_batch_spends_for_whom_its_key_does(client: Client, qstash: FakeQStash) -> None:
    ann = User.objects.create_user("ann")
    api_key, key = ApiKey.objects.issue("hers", user=ann, tenant="acme")
    Calls(client, key).begin(line("a"))
    row = LLMRequest.objects.get()
    assert (row.user, row.tenant, row.api_key, row.via) == (ann, "acme", api_key, "batch")
    assert Batch.objects.get().user == ann


def test_the_sites_own_users_have_batches_too(client: Client, qstash: FakeQStash) -> None:
    ann, bob = User.objects.create_user("ann"), User.objects.create_user("bob")
    session = {"OPENAI_AUTHENTICATION": ["rest_framework.authentication.SessionAuthentication"]}
    calls = Calls(Client(), "")
    calls.headers = {}
    calls.client.force_login(ann)
    with ours(**session):
        begun = calls.begin(line("a"))
        assert calls.batch(begun["id"])["status"] == "in_progress"
        calls.client.force_login(bob)
        refused(calls.get(f"{BATCHES}/{begun['id']}"), 404, "not_found")
        strict = Client(enforce_csrf_checks=True)
        strict.force_login(ann)
        calls.client = strict
        assert "CSRF" in refused(calls.upload(b"{}"), 403, "insufficient_permissions")


# --- the same again ------------------------------------------------------------------------------


def test_the_same_again_is_the_same_file_and_batch(calls: Calls, qstash: FakeQStash) -> None:
    again = {"Idempotency-Key": "k-1"}
    first, second = (calls.upload(jsonl(line("a")), headers=again) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["Idempotent-Replayed"] == "true"
    refused(
        calls.upload(jsonl(line("b")), headers=again),
        422,
        "idempotency_key_reused",
        "Idempotency-Key",
    )
    body = batch_of(first.json()["id"])
    begun = [calls.post(BATCHES, body, Idempotency_Key="k-2").json() for _ in range(2)]
    assert begun[0] == begun[1]
    assert (File.objects.count(), Batch.objects.count(), LLMRequest.objects.count()) == (1, 1, 1)
    # What the dead took with them is told from the rows.
    KeptAnswer.objects.update(status=None, body="")
    assert calls.post(BATCHES, body, Idempotency_Key="k-2").json()["id"] == begun[0]["id"]
    assert calls.upload(jsonl(line("a")), headers=again).json() == first.json()


def test_what_was_begun_is_told_again_though_its_file_is_gone(
    calls: Calls, qstash: FakeQStash
) -> None:
    name = calls.upload(jsonl(line("a"))).json()["id"]
    begun = calls.post(BATCHES, batch_of(name), Idempotency_Key="k-1").json()
    calls.delete(f"{FILES}/{name}")
    assert calls.post(BATCHES, batch_of(name), Idempotency_Key="k-1").json() == begun
    # What was never begun leaves nothing behind.
    unknown = calls.post(BATCHES, batch_of(name), Idempotency_Key="k-2")
    refused(unknown, 400, "invalid_value", "input_file_id")
    assert KeptAnswer.objects.count() == 1


# --- workers that die ----------------------------------------------------------------------------


class Dies(Exception):
    pass


class Dying(Intake):
    """A worker that is killed after it has written so many times."""

    writes_left = 2

    def write_rows(self, batch_input: BatchInput, rows: list[LLMRequest]) -> None:
        if not self.writes_left:
            raise Dies
        self.writes_left -= 1
        super().write_rows(batch_input, rows)


def test_another_worker_goes_on_where_one_was_killed(calls: Calls, qstash: FakeQStash) -> None:
    many = 1700
    begun = unread(calls, *(line(f"{at}") for at in range(many)))
    with pytest.raises(Dies):
        Dying().run()
    assert calls.batch(begun["id"])["status"] == "in_progress"
    assert BatchInput.objects.get().read == LLMRequest.objects.count() == 1000
    # Its claim is not over yet.
    assert not Intake().due().exists()
    later = timezone.now() + timedelta(minutes=3)
    Intake(clock=lambda: later).run()
    ids = [row.metadata["custom_id"] for row in LLMRequest.objects.order_by("pk")]
    assert ids == [f"{at}" for at in range(many)]


def test_a_worker_that_slept_writes_nothing_any_more(calls: Calls, qstash: FakeQStash) -> None:
    unread(calls)
    first = Intake()
    claimed = first.claim(BatchInput.objects.get().pk)
    assert claimed
    later = timezone.now() + timedelta(minutes=3)
    Intake(clock=lambda: later).run()
    assert LLMRequest.objects.count() == 1
    first.see_to(claimed)
    assert LLMRequest.objects.count() == 1


def test_a_batch_that_is_cancelled_while_it_is_read_asks_no_more(
    calls: Calls, qstash: FakeQStash
) -> None:
    begun = unread(calls, *(line(f"{at}") for at in range(1200)))

    class Interrupted(Intake):
        def write_rows(self, batch_input: BatchInput, rows: list[LLMRequest]) -> None:
            super().write_rows(batch_input, rows)
            BatchInput.objects.update(cancelling_at=timezone.now())

    Interrupted().run()
    assert LLMRequest.objects.count() == 500
    sweep()
    batch = calls.batch(begun["id"])
    assert batch["status"] == "cancelled"
    assert len(calls.content(batch["error_file_id"])) == 500
    assert LLMRequest.objects.cancelled().count() == 500


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hashed", "none"])
def test_texts_that_are_not_to_be_kept_go_from_the_file_too(
    calls: Calls, wire: Wire, how: str
) -> None:
    answers(wire)
    with ours(STORE_MESSAGES=how):
        name = calls.upload(jsonl(line("a"))).json()["id"]
        assert FilePart.objects.exists()
        batch = calls.batch(calls.post(BATCHES, batch_of(name)).json()["id"])
        assert not FilePart.objects.exists()
        assert "dropped" in refused(calls.get(f"{FILES}/{name}/content"), 404, "not_found")
        refused(calls.post(BATCHES, batch_of(name)), 400, "invalid_value", "input_file_id")
    assert batch["status"] == "completed"
    assert len(calls.content(batch["output_file_id"])) == 1
    assert "What is it?" not in str(list(LLMRequest.objects.values()))


def test_the_purge_drops_what_is_old_and_read(calls: Calls, wire: Wire) -> None:
    answers(wire)
    done = calls.batch(calls.begin(line("a"))["id"])
    unread_name = calls.upload(jsonl(line("b"))).json()["id"]
    calls.post(BATCHES, batch_of(unread_name))
    waiting = BatchInput.objects.latest("pk")
    BatchInput.objects.filter(pk=waiting.pk).update(total=None, read=0, ended_at=None)
    later = timezone.now() + timedelta(days=9)
    rehearsed = Purge(older_than=7, now=later, is_rehearsal=True).run().files
    assert Purge(older_than=7, now=later).run().files == rehearsed == 3
    assert [f"file-{file.uuid.hex}" for file in File.objects.all()] == [unread_name]
    refused(calls.get(f"{FILES}/{done['output_file_id']}"), 404, "not_found")
    # Who changes the setting later has it followed.
    BatchInput.objects.filter(pk=waiting.pk).update(total=1, read=1, ended_at=timezone.now())
    with ours(STORE_MESSAGES="none"):
        assert Purge(is_rehearsal=True).run().files == 1
        out = io.StringIO()
        call_command("llm_purge", stdout=out)
    assert "1 files deleted or emptied" in out.getvalue()
    assert (File.objects.count(), FilePart.objects.count()) == (1, 0)


def test_an_answer_that_is_forgotten_is_said_to_be(calls: Calls, wire: Wire) -> None:
    answers(wire)
    batch = calls.batch(calls.begin(line("a"))["id"])
    sweep()  # what is not announced is not purged
    File.objects.update(created_at=timezone.now() + timedelta(days=5))
    Purge(older_than=0, now=timezone.now() + timedelta(seconds=1)).run()
    [line_] = calls.content(batch["output_file_id"])
    assert (line_["response"], line_["error"]["code"]) == (None, "forgotten")


def test_without_celery_the_command_reads_files(calls: Calls, qstash: FakeQStash) -> None:
    unread(calls)
    call_command("llm_sweep", stdout=io.StringIO())
    assert LLMRequest.objects.submitted().count() == 1


def test_no_secret_is_in_what_is_told(calls: Calls, wire: Wire) -> None:
    said = {**ANSWER, "note": "sk-canary-0123456789"}
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=said)
    batch = calls.batch(calls.begin(line("a"))["id"])
    assert "canary" not in json.dumps(calls.content(batch["output_file_id"]))
    assert app_settings().secrets
