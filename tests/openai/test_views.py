"""What the endpoint takes, what it refuses, and what it answers twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from django.contrib.auth.models import User
from django.db import InterfaceError, OperationalError, connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_qstash_llm.models import ApiKey, KeptAnswer, LLMRequest
from django_qstash_llm.models.kept_answer import LEASE
from django_qstash_llm.openai.idempotency import written_under
from django_qstash_llm.openai.refusals import Refusal
from django_qstash_llm.qstash import Callback
from django_qstash_llm.tasks import sweep
from tests.conftest import ANSWER
from tests.server.conftest import at_once
from tests.wire import FakeQStash, Wire

from .conftest import ASK, EVENTS, PROVIDER, Streamed

pytestmark = pytest.mark.django_db

COMPLETIONS = "/openai/v1/chat/completions"
BODY = {"model": "gpt-5.4-mini", "messages": ASK}
Post = Callable[..., Any]


@pytest.fixture
def post(client: Client, key: str) -> Post:
    def post(body: Any = BODY, *, path: str = COMPLETIONS, **extra: Any) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {extra.pop('key', key)}", **extra.pop("headers", {})}
        content_type = extra.pop("content_type", "application/json")
        return client.generic("POST", path, content, content_type, headers=headers, **extra)

    return post


@pytest.fixture
def get(client: Client, key: str) -> Callable[..., Any]:
    def get(path: str, key: str = key) -> Any:
        return client.get(path, headers={"Authorization": f"Bearer {key}"})

    return get


@pytest.fixture
def provider(wire: Wire) -> Wire:
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=ANSWER)
    return wire


def refused(response: Any, status: int, code: str | None, param: str | None = None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-should-retry"] == "false"
    return str(error["message"])


def nothing_is_stored(wire: Wire) -> bool:
    return not (LLMRequest.objects.exists() or KeptAnswer.objects.exists() or wire.requests)


def ours(**changes: Any) -> Any:
    """Changed settings, and all others as they are."""
    from django.conf import settings

    return override_settings(QSTASH_LLM={**settings.QSTASH_LLM, **changes})


# --- bad input -----------------------------------------------------------------------------------

DEEP = b'{"model": "m", "messages": ' + b"[" * 70 + b"]" * 70 + b"}"
BOTTOMLESS = b'{"model": "m", "messages": ' + b"[" * 200_000


def said(content: Any) -> bytes:
    return json.dumps({**BODY, "messages": [{"role": "user", "content": content}]}).encode()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b" ", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b"null", None),
        (b'{"model": NaN}', None),
        (b'{"model": 1' + b"0" * 5000 + b"}", None),
        (b"\xff\xfe{}", None),
        (json.dumps(BODY).encode("utf-16"), None),
        (BOTTOMLESS, None),
        (b'{"model": "m", "model": "n", "messages": []}', "model"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "role"),
        (b'{"messages": []}', "model"),
        ({**BODY, "model": None}, "model"),
        ({**BODY, "model": 7}, "model"),
        ({**BODY, "model": ""}, "model"),
        ({**BODY, "model": "m" * 300}, "model"),
        ({"model": "m"}, "messages"),
        ({**BODY, "messages": []}, "messages"),
        ({**BODY, "messages": "text"}, "messages"),
        ({**BODY, "messages": ["text"]}, "messages[0]"),
        ({**BODY, "messages": [{"content": "x"}]}, "messages[0].role"),
        ({**BODY, "messages": [{"role": "user"}]}, "messages[0].content"),
        (said("a\x00b"), "messages[0].content"),
        (said("\ud800"), "messages[0].content"),
        ({**BODY, "stop": ["\x00"]}, "stop[0]"),
        ({**BODY, "a\x00": 1}, None),
        ({**BODY, "seed": 2**64}, "seed"),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
            "top_p",
        ),
        (DEEP, "messages" + "[0]" * 63),
        ({**BODY, "stream": "yes"}, "stream"),
        ({**BODY, "stream": 1}, "stream"),
        ({**BODY, "background": "no"}, "background"),
        ({**BODY, "stream": True, "background": True}, "stream"),
        *(
            ({**BODY, name: "https://evil.test"}, name)
            for name in ("api_base", "api_key", "base_url", "extra_headers", "organization")
        ),
        *(
            (
                said([{"type": "image_url", "image_url": {"url": url}}]),
                "messages[0].content[0].image_url",
            )
            for url in (
                "http://169.254.169.254/latest/meta-data",
                "http://[::1]/",
                "http://10.0.0.1/a.png",
                "http://localhost./a.png",
                "http://0x7f.1/",
                "http://2130706433/",
                "file:///etc/passwd",
                "gopher://a.test",
                "http://[",
                "/etc/passwd",
                "",
            )
        ),
        (
            said([{"type": "file_url", "file_url": "file:///etc/passwd"}]),
            "messages[0].content[0].file_url",
        ),
    ],
)
def test_bad_input_is_refused_with_the_field_and_leaves_no_trace(
    post: Post, provider: Wire, body: Any, param: str | None
) -> None:
    response = post(body, headers={"Idempotency-Key": "k"})
    refused(response, 400, "invalid_value" if param else response.json()["error"]["code"], param)
    assert nothing_is_stored(provider)


def test_a_refusal_repeats_no_secret_and_no_body(post: Post, provider: Wire) -> None:
    response = post({**BODY, "api_key": "sk-of-the-caller"})
    assert b"sk-of-the-caller" not in response.content


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data; boundary=x"])
def test_what_is_not_called_json_is_not_read(post: Post, provider: Wire, content_type: str) -> None:
    refused(post(content_type=content_type), 415, "unsupported_media_type")
    assert nothing_is_stored(provider)


def test_json_of_any_kind_is_read(post: Post, provider: Wire) -> None:
    assert post(content_type="application/json; charset=utf-8").status_code == 200


@ours(OPENAI_MAX_BODY_BYTES=100)
def test_a_body_may_be_too_large(post: Post, provider: Wire) -> None:
    refused(post({**BODY, "user": "u" * 100}), 413, "request_too_large")
    assert nothing_is_stored(provider)


def test_a_body_larger_than_forms_may_be_is_taken(post: Post, provider: Wire) -> None:
    url = "data:image/png;base64," + "A" * 3_000_000
    assert post(said([{"type": "image_url", "image_url": {"url": url}}])).status_code == 200


@pytest.mark.parametrize(("length", "status"), [("1e3", 400), ("-1", 400), ("9" * 18, 413)])
def test_a_body_is_as_long_as_it_says(post: Post, provider: Wire, length: str, status: int) -> None:
    assert post(CONTENT_LENGTH=length).status_code == status
    assert nothing_is_stored(provider)


def test_what_is_not_there_is_refused_in_the_same_shape(post: Post, get: Any) -> None:
    assert "Invalid URL" in refused(get("/openai/v1/embeddings"), 404, "unknown_url")
    refused(get(COMPLETIONS), 405, "method_not_allowed")
    refused(get(f"{COMPLETIONS}/{uuid4()}"), 404, "not_found")
    refused(get(f"{COMPLETIONS}/../x"), 404, "unknown_url")
    refused(get(f"{COMPLETIONS}/chatcmpl-1"), 404, "not_found")


# --- who may -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer ", "Basic dTpw", "Bearer sk-x", "Bearer qllm_x", "\xff"]
)
def test_without_a_key_nobody_is_let_in(client: Client, provider: Wire, authorization: str) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    response = client.post(COMPLETIONS, BODY, "application/json", headers=headers)
    refused(response, 401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert nothing_is_stored(provider)


@pytest.mark.parametrize(
    "change",
    [
        {"revoked_at": timezone.now()},
        {"expires_at": timezone.now() - timedelta(seconds=1)},
        {"digest": "0" * 64},
    ],
)
def test_a_key_ends(post: Post, provider: Wire, change: dict[str, Any]) -> None:
    ApiKey.objects.update(**change)
    refused(post(), 401, "invalid_api_key")
    assert nothing_is_stored(provider)


def test_a_key_ends_with_its_users_account(post: Post, provider: Wire) -> None:
    user = User.objects.create_user("ann")
    _, key = ApiKey.objects.issue("hers", user=user, tenant="acme")
    assert post(key=key).status_code == 200
    row = LLMRequest.objects.get()
    assert (row.user, row.tenant) == (user, "acme")
    User.objects.update(is_active=False)
    refused(post(key=key), 401, "invalid_api_key")
    User.objects.all().delete()
    refused(post(key=key), 401, "invalid_api_key")


def test_a_chat_takes_few_statements(post: Post, wire: Wire) -> None:
    """Who asks, by which budgets, that they ask, and how it ended with what it cost: the third before
    the provider is called."""
    written: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        written.extend(each["sql"].split()[0] for each in connection.queries[-1:])
        return httpx.Response(200, json=ANSWER)

    wire.hosts[PROVIDER] = answer
    post()  # the first in a minute says that the key is used
    with CaptureQueriesContext(connection) as captured:
        assert post().status_code == 200
    words = [each["sql"].split()[0] for each in captured.captured_queries]
    is_one = connection.vendor == "postgresql"
    assert words == ["SELECT", "SELECT", "INSERT", *(["WITH"] if is_one else ["UPDATE", "INSERT"])]
    assert written == ["INSERT"]


def test_a_key_is_for_its_scopes(post: Post, get: Any, provider: Wire) -> None:
    _, key = ApiKey.objects.issue("looks only", scopes=["models"])
    assert "chat" in refused(post(key=key), 403, "insufficient_permissions")
    assert get("/openai/v1/models", key).status_code == 200
    assert nothing_is_stored(provider)


@pytest.mark.parametrize(
    ("model", "is_allowed"),
    [
        ("gpt-5.4-mini", True),
        ("openai/gpt-5.4-mini", True),
        ("gpt-5.4", False),
        ("anthropic/claude-haiku-4-5", True),
        ("anthropic/gpt-5.4", True),
        ("claude-haiku-4-5", False),
    ],
)
def test_a_key_may_ask_its_models_and_no_others(
    post: Post, wire: Wire, model: str, is_allowed: bool
) -> None:
    wire.hosts[PROVIDER] = wire.hosts["anthropic.test"] = lambda r: httpx.Response(200, json=ANSWER)
    _, key = ApiKey.objects.issue("some", allowed_models=["gpt-5.4-mini", "anthropic/*"])
    response = post({**BODY, "model": model}, key=key)
    if is_allowed:
        assert "error" not in response.json() or response.status_code != 404
    else:
        refused(response, 404, "model_not_found", "model")
        assert nothing_is_stored(wire)


@pytest.mark.parametrize("name", ["models", "fallbacks"])
def test_a_key_of_certain_models_asks_no_others_in_a_gateways_words(
    post: Post, wire: Wire, name: str
) -> None:
    wire.hosts[PROVIDER] = lambda r: httpx.Response(200, json=ANSWER)
    _, key = ApiKey.objects.issue("some", allowed_models=["gpt-5.4-mini"])
    response = post({**BODY, "model": "gpt-5.4-mini", name: ["openai/o3-pro"]}, key=key)
    refused(response, 400, "invalid_value", name)
    assert nothing_is_stored(wire)
    _, key = ApiKey.objects.issue("all")
    assert post({**BODY, name: ["openai/o3-pro"]}, key=key).status_code == 200


@ours(
    PROVIDERS={
        "openai": {"API_KEY": "sk-1-of-the-tests", "BASE_URL": "https://one.test"},
        "meta": {"API_KEY": "sk-2-of-the-tests", "BASE_URL": "https://two.test"},
        "hosted": {"BASE_URL": "https://three.test", "MODELS": ["mistralai/Mistral-7B"]},
    }
)
@pytest.mark.parametrize(
    ("model", "of_key", "host", "named"),
    [
        ("m", "", "one.test", "m"),
        ("m", "meta", "two.test", "m"),
        ("meta/m", "", "two.test", "m"),
        ("openai/m", "meta", "one.test", "m"),
        ("nobody/m", "", "one.test", "nobody/m"),
        ("mistralai/Mistral-7B", "", "three.test", "mistralai/Mistral-7B"),
    ],
)
def test_the_model_the_key_or_the_settings_say_who_answers(
    post: Post, wire: Wire, model: str, of_key: str, host: str, named: str
) -> None:
    for each in ("one.test", "two.test", "three.test"):
        wire.hosts[each] = lambda request: httpx.Response(200, json=ANSWER)
    _, key = ApiKey.objects.issue("k", provider=of_key)
    assert post({**BODY, "model": model}, key=key).status_code == 200
    [request] = wire.requests
    assert (request.url.host, json.loads(request.content)["model"]) == (host, named)


def test_a_rate_is_kept_by_all_calls_together(post: Post, get: Any, provider: Wire) -> None:
    _, key = ApiKey.objects.issue("slow", requests_per_minute=2)
    assert [post(key=key).status_code, get("/openai/v1/models", key).status_code] == [200, 200]
    response = post(key=key)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(response.headers["Retry-After"]) <= 60
    assert response.headers["x-should-retry"] == "true"
    assert LLMRequest.objects.count() == 1


def test_of_others_requests_nobody_sees_anything(
    post: Post, get: Any, provider: Wire, qstash: FakeQStash
) -> None:
    begun = post({**BODY, "background": True}).json()
    _, other = ApiKey.objects.issue("another")
    refused(get(f"{COMPLETIONS}/{begun['id']}", other), 404, "not_found")
    path = f"{COMPLETIONS}/{begun['id']}/cancel"
    refused(post({}, path=path, key=other), 404, "not_found")
    assert get(f"{COMPLETIONS}/{begun['id']}").status_code == 200


def test_the_sites_own_users_may_be_let_in(provider: Wire, admin_user: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(admin_user)
    call: Any = {"path": COMPLETIONS, "data": BODY, "content_type": "application/json"}
    refused(client.post(**call), 401, "invalid_api_key")
    session = {"OPENAI_AUTHENTICATION": ["rest_framework.authentication.SessionAuthentication"]}
    with ours(**session):
        assert "CSRF" in refused(client.post(**call), 403, "insufficient_permissions")
        client.handler.enforce_csrf_checks = False
        assert client.post(**call).status_code == 200
        row = LLMRequest.objects.get()
        assert (row.user, row.api_key) == (admin_user, None)
        refused(Client().post(**call), 401, "invalid_api_key")
    with ours(**session, OPENAI_PERMISSIONS=["rest_framework.permissions.IsAdminUser"]):
        assert client.post(**call).status_code == 200
        User.objects.update(is_staff=False)
        refused(client.post(**call), 403, "insufficient_permissions")


def test_the_qstash_token_is_a_key_where_the_settings_say_so(post: Post, provider: Wire) -> None:
    refused(post(key="token-of-the-tests"), 401, "invalid_api_key")
    with ours(OPENAI_TAKES_QSTASH_TOKEN=True):
        assert post(key="token-of-the-tests").status_code == 200
        refused(post(key="token-of-the-test"), 401, "invalid_api_key")
        with override_settings(QSTASH_TOKEN=""):
            refused(post(key=""), 401, "invalid_api_key")


def test_a_wrong_setting_is_the_operators_business(
    post: Post, provider: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    with ours(OPENAI_AUTHENTICATION=["no.such.Thing"]):
        # Whoever shows a key of ours needs no class of the site's.
        assert post().status_code == 200
        refused(post(key="x"), 500, "server_error")
    assert "OPENAI_AUTHENTICATION" in caplog.text


# --- models --------------------------------------------------------------------------------------


@ours(
    PROVIDERS={
        "openai": {"API_KEY": "sk-1-of-the-tests"},
        "meta": {"BASE_URL": "https://two.test", "MODELS": ["llama", "tiny"]},
    },
    PRICES={"openai/gpt-9": {"input": "1", "output": "1"}},
)
def test_models_are_those_that_the_caller_may_ask(get: Any) -> None:
    def listed(**fields: Any) -> list[tuple[str, str]]:
        _, key = ApiKey.objects.issue("k", **fields)
        models = get("/openai/v1/models", key).json()["data"]
        return [(model["id"], model["owned_by"]) for model in models]

    meta = [("meta/llama", "meta"), ("meta/tiny", "meta")]
    assert listed() == [("gpt-5.4-mini", "openai"), *meta, ("openai/gpt-9", "openai")]
    assert listed(allowed_models=["meta/*", "gpt-7"]) == [("gpt-7", "openai"), *meta]
    _, key = ApiKey.objects.issue("k", allowed_models=["meta/*"])
    assert get("/openai/v1/models/meta/tiny", key).json()["id"] == "meta/tiny"
    refused(get("/openai/v1/models/openai/gpt-9", key), 404, "model_not_found", "model")


# --- Anthropic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_background", [False, True])
def test_a_provider_with_words_of_its_own_answers_in_openais(
    post: Post,
    get: Any,
    wire: Wire,
    qstash: FakeQStash,
    post_callback: Callable[..., Any],
    is_background: bool,
) -> None:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5",
        "content": [
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 9, "output_tokens": 3},
    }
    wire.hosts["anthropic.test"] = lambda request: httpx.Response(200, json=message)
    body = {**BODY, "model": "anthropic/claude-haiku-4-5", "background": is_background}
    answer = post(body).json()
    if is_background:
        content = json.dumps(message).encode()
        row = LLMRequest.objects.get()
        post_callback(row, Callback(status=200, body=content, source_message_id="msg_1"))
        answer = get(f"{COMPLETIONS}/{answer['id']}").json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("f", {"x": 1})
    assert answer["usage"]["total_tokens"] == 12


# --- the same again ------------------------------------------------------------------------------

AGAIN = {"Idempotency-Key": "k-1"}


def test_the_same_again_is_answered_the_same_and_not_paid_again(post: Post, provider: Wire) -> None:
    first, second = post(headers=AGAIN), post(headers=AGAIN)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.content == second.content
    assert first.headers["x-request-id"] == second.headers["x-request-id"]
    assert second.headers["Idempotent-Replayed"] == "true"
    assert LLMRequest.objects.count() == 1
    # Spelled otherwise it is the same.
    body = json.dumps(dict(reversed(BODY.items())), indent=2).encode()
    assert post(body, headers=AGAIN).headers["Idempotent-Replayed"] == "true"


def test_the_same_key_for_something_else_is_refused(post: Post, provider: Wire) -> None:
    post(headers=AGAIN)
    for other in ({**BODY, "n": 2}, {**BODY, "stream": True}):
        refused(post(other, headers=AGAIN), 422, "idempotency_key_reused", "Idempotency-Key")
    assert LLMRequest.objects.count() == 1


def test_everybody_has_keys_of_their_own(post: Post, provider: Wire) -> None:
    _, other = ApiKey.objects.issue("another")
    post(headers=AGAIN)
    assert "Idempotent-Replayed" not in post(headers=AGAIN, key=other).headers
    assert LLMRequest.objects.count() == 2


def test_while_it_is_under_way_the_same_has_to_wait(post: Post, wire: Wire) -> None:
    inner: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        inner.append(post(headers=AGAIN))
        return httpx.Response(200, json=ANSWER)

    wire.hosts[PROVIDER] = answer
    assert post(headers=AGAIN).status_code == 200
    [waiting] = inner
    assert waiting.status_code == 409
    assert waiting.json()["error"]["code"] == "idempotency_key_in_use"
    assert waiting.headers["x-should-retry"] == "true"


@pytest.mark.django_db(transaction=True)
def test_of_two_at_once_one_makes_the_call(key: str, provider: Wire) -> None:
    headers = {"Authorization": f"Bearer {key}", **AGAIN}

    def call(number: int) -> int:
        response = Client().post(COMPLETIONS, BODY, "application/json", headers=headers)
        return int(response.status_code)

    statuses = at_once(6, call)
    assert set(statuses) <= {200, 409}
    assert LLMRequest.objects.count() == 1


def test_what_was_not_paid_for_may_be_tried_again(post: Post, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: httpx.Response(429, json={"error": {"message": "slow"}})
    assert post(headers=AGAIN).status_code == 429
    assert not KeptAnswer.objects.exists()
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=ANSWER)
    assert post(headers=AGAIN).status_code == 200


def test_what_may_have_been_paid_for_is_not(post: Post, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: httpx.Response(500, json={"error": {"message": "oops"}})
    first = post(headers=AGAIN)
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=ANSWER)
    second = post(headers=AGAIN)
    assert (first.status_code, second.status_code) == (500, 500)
    assert first.content == second.content


@pytest.mark.django_db(transaction=True)
def test_a_stream_is_told_again_whole(post: Post, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    body = {**BODY, "stream": True}
    first = post(body, headers=AGAIN)
    said = b"".join(first.streaming_content)
    second = post(body, headers=AGAIN)
    assert said == second.content != b""
    assert second.headers["Content-Type"] == first.headers["Content-Type"]
    assert LLMRequest.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_stream_that_was_left_is_not_asked_again_unasked(post: Post, wire: Wire) -> None:
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response()
    body = {**BODY, "stream": True}
    first = post(body, headers=AGAIN)
    next(first.streaming_content)
    first.close()
    assert LLMRequest.objects.get().state == "cancelled"
    row = LLMRequest.objects.get()
    assert str(row.uuid) in refused(post(body, headers=AGAIN), 409, "idempotency_key_spent")


def test_an_answer_that_the_dead_took_with_them_is_told_from_the_row(
    post: Post, provider: Wire
) -> None:
    post(headers=AGAIN)
    KeptAnswer.objects.update(status=None, body="")
    again = post(headers=AGAIN).json()
    assert again["choices"][0]["message"]["content"] == "Forty-two."
    assert (again["usage"]["total_tokens"], again["status"]) == (12, "completed")


def test_after_a_day_it_is_forgotten(post: Post, provider: Wire) -> None:
    post(headers=AGAIN)
    KeptAnswer.objects.update(expires_at=timezone.now())
    assert "Idempotent-Replayed" not in post(headers=AGAIN).headers
    KeptAnswer.objects.update(expires_at=timezone.now())
    sweep()
    assert not KeptAnswer.objects.exists()


def test_what_begins_in_the_background_begins_once(post: Post, qstash: FakeQStash) -> None:
    body = {**BODY, "background": True}
    first, second = post(body, headers=AGAIN), post(body, headers=AGAIN)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.content == second.content
    assert LLMRequest.objects.count() == 1


@pytest.mark.parametrize("wrong", ["", "k" * 256, "schl\u00fcssel", "a\tb"])
def test_a_key_is_a_short_text(post: Post, provider: Wire, wrong: str) -> None:
    refused(post(headers={"Idempotency-Key": wrong}), 400, "invalid_value", "Idempotency-Key")
    assert nothing_is_stored(provider)


def test_nothing_that_is_kept_holds_a_secret(post: Post, wire: Wire, key: str) -> None:
    told = {**ANSWER, "note": "sk-canary-0123456789"}
    wire.hosts[PROVIDER] = lambda request: httpx.Response(200, json=told)
    post(headers={"Idempotency-Key": "my-idempotency-key"})
    kept = str(list(KeptAnswer.objects.values()))
    for secret in ("canary", key, "my-idempotency-key"):
        assert secret not in kept


# --- whatever happens ----------------------------------------------------------------------------


def test_a_failure_of_ours_has_the_same_shape_and_says_nothing(
    key: str, provider: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise LookupError("inner workings")

    provider.hosts[PROVIDER] = fail
    client = Client(raise_request_exception=False)
    headers = {"Authorization": f"Bearer {key}"}
    response = client.post(COMPLETIONS, BODY, "application/json", headers=headers)
    assert "inner workings" not in refused(response, 500, "server_error")
    assert "inner workings" in caplog.text
    row = LLMRequest.objects.get()
    assert (row.state, row.error_code) == ("failed", "unexpected")
    assert "inner workings" not in row.error


def test_no_key_is_in_any_log(
    post: Post, provider: Wire, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    post()
    post(b"{")
    post(key=key + "x")
    assert key not in caplog.text


@override_settings(
    MIDDLEWARE=[
        "django.middleware.gzip.GZipMiddleware",
        "django.middleware.http.ConditionalGetMiddleware",
    ]
)
@pytest.mark.django_db(transaction=True)
def test_no_middleware_collects_a_stream(post: Post, wire: Wire) -> None:
    step = threading.Semaphore(0)
    events = [{**EVENTS[0], "pad": "x" * 500}]
    wire.hosts[PROVIDER] = lambda request: Streamed(*events, step=step).response()
    response = post({**BODY, "stream": True}, headers={"Accept-Encoding": "gzip"})
    assert b"Forty" in next(response.streaming_content)
    step.release(9)
    response.close()


# --- claims of the dead --------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_cannot_be_kept_is_told_whole_all_the_same(
    post: Post, wire: Wire, error: type[Exception], is_stream: bool
) -> None:
    def breaks(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if "keptanswer" in sql and 'SET "status"' in sql:
            raise error("the database has gone")
        return execute(sql, params, many, context)

    whole = httpx.Response(200, json=ANSWER)
    wire.hosts[PROVIDER] = lambda request: Streamed(*EVENTS).response() if is_stream else whole
    with connection.execute_wrapper(breaks):
        response = post({**BODY, "stream": is_stream}, headers=AGAIN)
        said = b"".join(response.streaming_content) if is_stream else response.content
    assert response.status_code == 200
    assert said.endswith(b"data: [DONE]\n\n") if is_stream else said == whole.content
    assert KeptAnswer.objects.get().status is None


def claimed_by_the_dead(post: Post, body: Any = BODY) -> KeptAnswer:
    """A claim as it is left by a process that died before it wrote anything else down."""
    post(body, headers=AGAIN)
    LLMRequest.objects.all().delete()
    KeptAnswer.objects.update(status=None, body="", leased_until=timezone.now() + LEASE)
    return KeptAnswer.objects.get()


@pytest.mark.parametrize("more", [{}, {"background": True}])
def test_a_claim_whose_process_died_is_taken_over_when_its_lease_ends(
    post: Post, provider: Wire, qstash: FakeQStash, more: dict[str, Any]
) -> None:
    body = {**BODY, **more}
    claimed_by_the_dead(post, body)
    waiting = post(body, headers=AGAIN)
    assert (waiting.status_code, waiting.headers["x-should-retry"]) == (409, "true")
    KeptAnswer.objects.update(leased_until=timezone.now())
    # Another body gets nothing by it.
    refused(post({**body, "n": 2}, headers=AGAIN), 422, "idempotency_key_reused", "Idempotency-Key")
    first, second = post(body, headers=AGAIN), post(body, headers=AGAIN)
    assert first.status_code == (202 if more else 200)
    assert first.content == second.content
    assert LLMRequest.objects.count() == 1
    assert KeptAnswer.objects.get().leased_until is None


def test_who_was_taken_for_dead_pays_nothing(post: Post, provider: Wire) -> None:
    """It slept between its claim and its row for longer than its lease, and another came."""
    slept = KeptAnswer.objects.get(pk=claimed_by_the_dead(post).pk)
    KeptAnswer.objects.update(leased_until=timezone.now())
    assert post(headers=AGAIN).status_code == 200
    calls = len(provider.to(PROVIDER))
    with pytest.raises(Refusal) as caught, written_under(slept):
        raise AssertionError("it would write its row here, and call")
    assert (caught.value.status, caught.value.headers["x-should-retry"]) == (409, "true")
    slept.let_go()
    slept.keep(500, b"nothing", "text/plain")
    assert post(headers=AGAIN).headers["Idempotent-Replayed"] == "true"
    assert len(provider.to(PROVIDER)) == calls


@pytest.mark.django_db(transaction=True)
def test_of_those_who_take_over_at_once_one_makes_the_call(
    post: Post, key: str, provider: Wire
) -> None:
    claimed_by_the_dead(post)
    calls = len(provider.to(PROVIDER))
    KeptAnswer.objects.update(leased_until=timezone.now())
    headers = {"Authorization": f"Bearer {key}", **AGAIN}

    def call(number: int) -> int:
        response = Client().post(COMPLETIONS, BODY, "application/json", headers=headers)
        return int(response.status_code)

    assert set(at_once(6, call)) <= {200, 409}
    assert len(provider.to(PROVIDER)) == calls + 1


# --- callers without a key -----------------------------------------------------------------------


def test_who_calls_by_the_qstash_token_sees_what_was_asked_by_it_and_no_more(
    post: Post, get: Any, provider: Wire, qstash: FakeQStash, key: str
) -> None:
    token = "token-of-the-tests"
    ask: Any = [{"role": "user", "content": "A secret of the project's."}]
    elsewhere = LLMRequest.objects.publish(ask)
    by_key = post({**BODY, "background": True}).json()["id"]
    with ours(OPENAI_TAKES_QSTASH_TOKEN=True):
        by_token = post({**BODY, "background": True}, key=token).json()["id"]
        assert get(f"{COMPLETIONS}/{by_token}", token).status_code == 200
        for uuid in (elsewhere.uuid, by_key):
            refused(get(f"{COMPLETIONS}/{uuid}", token), 404, "not_found")
            refused(post({}, path=f"{COMPLETIONS}/{uuid}/cancel", key=token), 404, "not_found")
        for uuid in (elsewhere.uuid, by_token):
            refused(get(f"{COMPLETIONS}/{uuid}"), 404, "not_found")
        # One whose key is gone is nobody's, and not everybody's.
        ApiKey.objects.all().delete()
        refused(get(f"{COMPLETIONS}/{by_key}", token), 404, "not_found")
        again = LLMRequest.objects.get(uuid=by_token)
        again.fail("x", "y", now=timezone.now())
        assert get(f"{COMPLETIONS}/{again.resubmit().uuid}", token).status_code == 200
    callers = LLMRequest.objects.order_by("pk").values_list("caller", flat=True)
    assert list(callers) == ["", "key", "qstash", "qstash"]


def test_a_user_of_the_site_sees_what_they_asked_here_and_no_more(
    provider: Wire, qstash: FakeQStash, admin_user: User
) -> None:
    client = Client()
    client.force_login(admin_user)
    elsewhere = LLMRequest.objects.publish(ASK, user=admin_user)
    session = {"OPENAI_AUTHENTICATION": ["rest_framework.authentication.SessionAuthentication"]}
    with ours(**session):
        body = {**BODY, "background": True}
        begun = client.post(COMPLETIONS, body, "application/json").json()
        assert client.get(f"{COMPLETIONS}/{begun['id']}").status_code == 200
        refused(client.get(f"{COMPLETIONS}/{elsewhere.uuid}"), 404, "not_found")
