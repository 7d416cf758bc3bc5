"""The callback's door. What a callback then does to its request is in models/test_callback.py."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import io
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from django.apps import apps
from django.conf import settings as django_settings
from django.db import connection, connections
from django.test import Client, override_settings
from django.utils import timezone

from django_qstash_llm.models import CallbackResponse, LLMRequest
from django_qstash_llm.qstash import Callback, sign
from django_qstash_llm.qstash.signing import hash_body

from .conftest import ANSWER

pytestmark = pytest.mark.django_db

Post = Callable[..., Any]
CURRENT = django_settings.QSTASH_CURRENT_SIGNING_KEY
NEXT = django_settings.QSTASH_NEXT_SIGNING_KEY
STRANGERS = "sig_aStrangersKeyOfTheRightLength"
DONE = json.dumps(ANSWER).encode()
SUCCESS = Callback(status=200, body=DONE, source_message_id="msg_1", max_retries=3)


@pytest.fixture
def llm_request(qstash: Any) -> LLMRequest:
    row: LLMRequest = LLMRequest.objects.publish([{"role": "user", "content": "?"}])
    return row


def snapshot() -> dict[str, list[Any]]:
    """Everything in every table of the app."""
    models = apps.get_app_config("django_qstash_llm").get_models()
    return {model.__name__: list(model.objects.order_by("pk").values()) for model in models}


def url_of(llm_request: LLMRequest) -> str:
    return f"http://testserver/llm/callback/{llm_request.uuid}/"


def seconds_ago(seconds: float) -> float:
    return timezone.now().timestamp() - seconds


def b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def token(header: dict[str, Any], claims: dict[str, Any] | bytes, key: str | None) -> str:
    """A token made by hand, which need not be one that ``sign`` would make."""
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    signed = f"{b64(json.dumps(header).encode())}.{b64(payload)}"
    digest = b"" if key is None else hmac.digest(key.encode(), signed.encode(), hashlib.sha256)
    return f"{signed}.{b64(digest)}"


def claims_for(url: str, content: bytes, **changed: Any) -> dict[str, Any]:
    now = int(timezone.now().timestamp())
    claims = {"iss": "Upstash", "sub": url, "exp": now + 300, "nbf": now, "iat": now}
    return claims | {"body": hash_body(content)} | changed


HS256 = {"alg": "HS256", "typ": "JWT"}


# --- accepted ---


def test_success_completes_the_request(llm_request: LLMRequest, post_callback: Post) -> None:
    response = post_callback(llm_request, SUCCESS)
    llm_request.refresh_from_db()
    assert (response.status_code, response.json()) == (200, {"stored": True})
    assert (llm_request.state, llm_request.completion) == ("completed", "Forty-two.")


def test_url_without_the_slash_is_the_same_door(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    response = post_callback(llm_request, SUCCESS, url=url_of(llm_request).rstrip("/"))
    llm_request.refresh_from_db()
    assert (response.status_code, llm_request.state) == (200, "completed")


def test_signature_for_either_spelling_of_the_url_is_good(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = SUCCESS.to_json()
    signature = sign(body, url=url_of(llm_request).rstrip("/"), key=CURRENT, now=seconds_ago(0))
    assert post_callback(llm_request, body, signature=signature).status_code == 200


def test_former_base_url_is_still_believed(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {
        "CALLBACK_BASE_URL": "https://new.example.com/llm",
        "FORMER_CALLBACK_BASE_URLS": ("http://testserver/llm",),
    }
    assert post_callback(llm_request, SUCCESS).status_code == 200


def test_next_key_is_accepted_remembered_and_told(
    llm_request: LLMRequest, post_callback: Post, caplog: pytest.LogCaptureFixture
) -> None:
    assert post_callback(llm_request, SUCCESS, key=NEXT).status_code == 200
    assert CallbackResponse.objects.get().verified_by_next_key
    assert "next signing key" in caplog.text


@override_settings(QSTASH_NEXT_SIGNING_KEY="")
def test_without_a_next_key_the_current_one_still_works(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    assert post_callback(llm_request, SUCCESS).status_code == 200
    assert not CallbackResponse.objects.get().verified_by_next_key


@pytest.mark.parametrize("skew", [-25, 25])
def test_small_clock_difference_is_forgiven(
    llm_request: LLMRequest, post_callback: Post, skew: int
) -> None:
    body = SUCCESS.to_json()
    late = skew + 300 if skew > 0 else skew
    signature = sign(body, url=url_of(llm_request), key=CURRENT, now=seconds_ago(late))
    assert post_callback(llm_request, body, signature=signature).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": "application/xml"},
        {"Accept": "nonsense"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Bearer sk-anything"},
        {"Cookie": "sessionid=nobody"},
        {"Upstash-Message-Id": "m" * 300},
        {"Host": "elsewhere.example.com", "X-Forwarded-Host": "evil.example.com"},
        {"X-Forwarded-Proto": "https"},
        {"X-HTTP-Method-Override": "GET"},
    ],
)
def test_other_headers_change_nothing(
    llm_request: LLMRequest, post_callback: Post, headers: dict[str, str]
) -> None:
    assert post_callback(llm_request, SUCCESS, headers=headers).status_code == 200
    llm_request.refresh_from_db()
    assert llm_request.state == "completed"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "",
        "application/json; charset=bogus",
        "application/json; charset=utf-16",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
    ],
)
def test_content_type_changes_nothing(
    llm_request: LLMRequest, post_callback: Post, content_type: str
) -> None:
    response = post_callback(llm_request, SUCCESS.to_json(), content_type=content_type)
    llm_request.refresh_from_db()
    assert (response.status_code, llm_request.state) == (200, "completed")


def test_gzipped_envelope_signed_as_it_travels_is_read(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = gzip.compress(SUCCESS.to_json())
    response = post_callback(llm_request, body, headers={"Content-Encoding": "gzip"})
    llm_request.refresh_from_db()
    assert (response.status_code, llm_request.state) == (200, "completed")


def test_envelope_over_djangos_upload_limit_is_read(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    text = "long " * 700_000
    answer = ANSWER | {"choices": [{"message": {"role": "assistant", "content": text}}]}
    callback = Callback(status=200, body=json.dumps(answer).encode(), source_message_id="msg_1")
    assert len(callback.to_json()) > 2_621_440
    assert post_callback(llm_request, callback).status_code == 200
    llm_request.refresh_from_db()
    assert llm_request.completion == text


def test_atomic_requests_change_nothing(llm_request: LLMRequest, post_callback: Post) -> None:
    with atomic_requests():
        assert post_callback(llm_request, SUCCESS).status_code == 200
        assert post_callback(llm_request, b"not json").status_code == 489
    assert CallbackResponse.objects.count() == 2


@contextmanager
def atomic_requests() -> Iterator[None]:
    connections.settings["default"]["ATOMIC_REQUESTS"] = True
    try:
        yield
    finally:
        connections.settings["default"]["ATOMIC_REQUESTS"] = False


# --- again ---


def test_exact_replay_is_answered_200_and_has_no_effect(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = SUCCESS.to_json()
    signature = sign(body, url=url_of(llm_request), key=CURRENT, now=seconds_ago(0))
    post_callback(llm_request, body, signature=signature)
    before = snapshot()
    assert post_callback(llm_request, body, signature=signature).status_code == 200
    before["CallbackResponse"][0]["seen_count"] = 2
    assert snapshot() == before


def test_redelivery_signed_anew_is_answered_200_and_has_no_effect(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, SUCCESS)
    before = snapshot()
    assert post_callback(llm_request, SUCCESS).status_code == 200
    before["CallbackResponse"][0]["seen_count"] = 2
    assert snapshot() == before


def test_unknown_request_is_answered_200_and_kept_as_an_orphan(post_callback: Post) -> None:
    uuid = uuid4()
    response = post_callback(None, SUCCESS, url=f"http://testserver/llm/callback/{uuid}/")
    orphan = CallbackResponse.objects.orphaned().get()
    assert (response.status_code, orphan.uuid, bytes(orphan.body)) == (200, uuid, DONE)
    assert LLMRequest.objects.count() == 0


def test_purged_request_is_answered_200(llm_request: LLMRequest, post_callback: Post) -> None:
    url = url_of(llm_request)
    post_callback(llm_request, Callback(status=500, max_retries=3, source_message_id="msg_1"))
    llm_request.delete()
    assert post_callback(None, SUCCESS, url=url).status_code == 200
    assert post_callback(None, SUCCESS, url=url).status_code == 200
    assert CallbackResponse.objects.orphaned().get().seen_count == 2


# --- refused: 401, and nothing written ---

FORGERIES: dict[str, Callable[[str, bytes], str]] = {
    "none at all": lambda url, body: "",
    "not a token": lambda url, body: "Bearer of bad news",
    "two parts": lambda url, body: "e30.e30",
    "huge": lambda url, body: "a" * 100_000,
    "strangers key": lambda url, body: sign(body, url=url, key=STRANGERS, now=seconds_ago(0)),
    "empty key": lambda url, body: token(HS256, claims_for(url, body), ""),
    "key None": lambda url, body: token(HS256, claims_for(url, body), "None"),
    "alg none": lambda url, body: token({"alg": "none"}, claims_for(url, body), None),
    "alg none, signed": lambda url, body: token({"alg": "none"}, claims_for(url, body), CURRENT),
    "alg HS512": lambda url, body: token({"alg": "HS512"}, claims_for(url, body), CURRENT),
    "crit": lambda url, body: token(HS256 | {"crit": ["b64"]}, claims_for(url, body), CURRENT),
    "other body": lambda url, body: sign(body + b" ", url=url, key=CURRENT, now=seconds_ago(0)),
    "other request": lambda url, body: sign(
        body, url=url.replace(url.split("/")[-2], str(UUID(int=1))), key=CURRENT, now=seconds_ago(0)
    ),
    "other host": lambda url, body: sign(
        body, url=url.replace("testserver", "evil.test"), key=CURRENT, now=seconds_ago(0)
    ),
    "other scheme": lambda url, body: sign(
        body, url=url.replace("http:", "https:"), key=CURRENT, now=seconds_ago(0)
    ),
    "other path": lambda url, body: sign(
        body, url=url.replace("/llm/", "/other/"), key=CURRENT, now=seconds_ago(0)
    ),
    "with a query": lambda url, body: sign(body, url=f"{url}?a=1", key=CURRENT, now=seconds_ago(0)),
    "expired": lambda url, body: sign(body, url=url, key=CURRENT, now=seconds_ago(340)),
    "from the future": lambda url, body: sign(body, url=url, key=CURRENT, now=seconds_ago(-40)),
    "issuer Up": lambda url, body: token(HS256, claims_for(url, body, iss="Up"), CURRENT),
    "issuer list": lambda url, body: token(HS256, claims_for(url, body, iss=["Upstash"]), CURRENT),
    "valid for a year": lambda url, body: token(
        HS256, claims_for(url, body, exp=int(seconds_ago(-31_536_000))), CURRENT
    ),
    "no expiry": lambda url, body: token(HS256, claims_for(url, body, exp=None), CURRENT),
    "expiry as text": lambda url, body: token(
        HS256, claims_for(url, body, exp=str(int(seconds_ago(-100)))), CURRENT
    ),
    "no body claim": lambda url, body: token(HS256, claims_for(url, body, body=None), CURRENT),
    "body claim a number": lambda url, body: token(HS256, claims_for(url, body, body=1), CURRENT),
    "twice a claim": lambda url, body: token(
        HS256,
        json.dumps(claims_for(url, body)).encode().replace(b"{", b'{"sub": "x", ', 1),
        CURRENT,
    ),
    "claims a list": lambda url, body: token(HS256, b"[]", CURRENT),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgery_is_refused_and_writes_nothing(
    llm_request: LLMRequest,
    post_callback: Post,
    caplog: pytest.LogCaptureFixture,
    forgery: str,
) -> None:
    body = SUCCESS.to_json()
    signature = FORGERIES[forgery](url_of(llm_request), body)
    before = snapshot()
    response = post_callback(llm_request, body, signature=signature)
    assert (response.status_code, response.json()) == (401, {"error": "invalid signature"})
    assert snapshot() == before
    assert str(llm_request.uuid) in caplog.text


def test_forgery_about_an_unknown_request_writes_nothing(post_callback: Post) -> None:
    url = f"http://testserver/llm/callback/{uuid4()}/"
    assert post_callback(None, SUCCESS, url=url, key=STRANGERS).status_code == 401
    assert CallbackResponse.objects.count() == 0


def test_hand_made_token_is_good_when_nothing_is_wrong_with_it(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    """So that each forgery above is refused for the one thing that is wrong with it."""
    body = SUCCESS.to_json()
    signature = token(HS256, claims_for(url_of(llm_request), body), CURRENT)
    assert post_callback(llm_request, body, signature=signature).status_code == 200


def test_hosts_in_headers_cannot_move_our_url(llm_request: LLMRequest, post_callback: Post) -> None:
    body = SUCCESS.to_json()
    evil = url_of(llm_request).replace("testserver", "evil.example.com")
    signature = sign(body, url=evil, key=CURRENT, now=seconds_ago(0))
    headers = {"Host": "evil.example.com", "X-Forwarded-Host": "evil.example.com"}
    before = snapshot()
    response = post_callback(llm_request, body, signature=signature, headers=headers)
    assert response.status_code == 401
    assert snapshot() == before


@override_settings(QSTASH_CURRENT_SIGNING_KEY="", QSTASH_NEXT_SIGNING_KEY="")
def test_without_any_key_nobody_is_believed(llm_request: LLMRequest, post_callback: Post) -> None:
    body = SUCCESS.to_json()
    signature = token(HS256, claims_for(url_of(llm_request), body), "")
    assert post_callback(llm_request, body, signature=signature).status_code == 401


@override_settings(QSTASH_CURRENT_SIGNING_KEY="short", QSTASH_NEXT_SIGNING_KEY="None")
@pytest.mark.parametrize("key", ["short", "None"])
def test_unusable_key_is_believed_by_nobody(
    llm_request: LLMRequest, post_callback: Post, key: str
) -> None:
    body = SUCCESS.to_json()
    signature = token(HS256, claims_for(url_of(llm_request), body), key)
    assert post_callback(llm_request, body, signature=signature).status_code == 401


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_only_post_is_allowed(
    client: Client, llm_request: LLMRequest, method: str, slash: str
) -> None:
    before = snapshot()
    path = f"/llm/callback/{llm_request.uuid}{slash}"
    assert client.generic(method, path).status_code == 405
    assert snapshot() == before


@pytest.mark.parametrize(
    "name", ["1", "not-a-uuid", "../admin", "2222D222-2222-4222-8222-222222222222"]
)
def test_url_without_a_uuid_is_not_found(client: Client, name: str) -> None:
    assert client.post(f"/llm/callback/{name}/").status_code == 404


def test_larger_than_the_setting_is_413_and_writes_nothing(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    body = SUCCESS.to_json()
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"MAX_CALLBACK_BYTES": len(body)}
    assert post_callback(llm_request, body).status_code == 200
    before = snapshot()
    response = post_callback(llm_request, body + b" ")
    assert response.status_code == 413
    assert "MAX_CALLBACK_BYTES" in response.json()["error"]
    assert snapshot() == before


class GoneHalfway(io.BytesIO):
    """A body whose sender hangs up."""

    def read(self, size: int | None = -1) -> bytes:
        raise ConnectionResetError


@pytest.mark.parametrize("door", ["callback", "ping"])
def test_sender_that_hangs_up_halfway_is_answered_400_and_may_come_again(
    llm_request: LLMRequest, post_callback: Post, door: str
) -> None:
    CallbackResponse.objects.create(
        uuid=llm_request.uuid, kind="ping", source_message_id="ping:1", received_at=timezone.now()
    )
    url = url_of(llm_request).replace("/callback/", f"/{door}/")
    body = SUCCESS.to_json()
    response = post_callback(llm_request, body, url=url, **{"wsgi.input": GoneHalfway()})
    assert (response.status_code, response.json()) == (400, {"error": "the body broke off"})
    receipt = CallbackResponse.objects.get()
    assert receipt.problem == ("body: it broke off" if door == "ping" else "")
    assert post_callback(llm_request, body, url=url).status_code == 200


# --- signed and unusable: quarantine ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"1",
        b"{}",
        b"{",
        b'{"sourceMessageId": ""}',
        b'{"sourceMessageId": 7}',
        b'{"sourceMessageId": "m", "status": NaN}',
        b'{"sourceMessageId": "m", "status": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe\x00",
        b"\x00",
        b"status=200",
        gzip.compress(b"{}", mtime=0),
        b"\x1f\x8bnot gzip",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_signed_garbage_is_quarantined_once_and_never_wanted_again(
    llm_request: LLMRequest, post_callback: Post, body: bytes
) -> None:
    before = snapshot()["LLMRequest"]
    response = post_callback(llm_request, body)
    assert response.status_code == 489
    assert response.headers["Upstash-NonRetryable-Error"] == "true"
    post_callback(llm_request, body)
    kept = CallbackResponse.objects.quarantined().get()
    assert (kept.uuid, kept.llm_request, kept.seen_count) == (llm_request.uuid, llm_request, 2)
    assert kept.problem
    assert snapshot()["LLMRequest"] == before
    assert CallbackResponse.objects.count() == 1


def test_a_million_keys_are_read_or_quarantined(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = b'{"sourceMessageId": "m", ' + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}"
    assert post_callback(llm_request, body).status_code == 200


def test_quarantine_of_an_unknown_request_is_kept_too(post_callback: Post) -> None:
    url = f"http://testserver/llm/callback/{uuid4()}/"
    assert post_callback(None, b"[]", url=url).status_code == 489
    assert CallbackResponse.objects.quarantined().get().llm_request is None


def test_quarantine_keeps_the_envelope_without_our_keys(
    llm_request: LLMRequest, post_callback: Post, settings: Any
) -> None:
    keys = [settings.QSTASH_TOKEN, CURRENT, "sk-canary-0123456789", "ant-canary-0123456789"]
    post_callback(llm_request, json.dumps({"sourceHeader": keys, "kept": "évidence"}).encode())
    kept = bytes(CallbackResponse.objects.get().body)
    assert b"kept" in kept
    assert [key for key in keys if key.encode() in kept] == []


def test_quarantine_of_a_gzipped_envelope_holds_no_key(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    body = gzip.compress(b'{"sourceHeader": "sk-canary-0123456789", "kept": 1}')
    post_callback(llm_request, body)
    kept = bytes(CallbackResponse.objects.get().body)
    assert kept == b'{"sourceHeader": null, "kept": 1}'


def test_quarantine_keeps_nothing_of_what_cannot_be_unpacked(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    post_callback(llm_request, gzip.compress(b'{"sourceBody": "aGk="}')[:-6])
    kept = CallbackResponse.objects.get()
    assert (bytes(kept.body), kept.is_body_cut) == (b"", True)
    assert "gzip" in kept.problem


@pytest.mark.parametrize("left", [None, -5, -30, -60], ids=["whole", "by 5", "by 30", "by 60"])
def test_quarantine_keeps_neither_a_former_key_nor_the_prompt(
    llm_request: LLMRequest, post_callback: Post, left: int | None
) -> None:
    """The key was changed since, so that nothing but its place says that it is one."""
    source = {"Authorization": ["Bearer sk-of-last-year-8b1f"], "X-More": ["x"]}
    callback = Callback(
        status=200,
        body=DONE,
        source_message_id="",
        source_header=source,
        source_body=b"a prompt of ours",
    )
    envelope = callback.to_json()
    post_callback(llm_request, envelope[:left])
    kept = bytes(CallbackResponse.objects.get().body)
    assert b"sk-of-last-year" not in kept
    assert base64.b64encode(b"a prompt of ours") not in kept
    before, _ = envelope.split(b'"sourceHeader"')
    assert kept.startswith(before + b'"sourceHeader": null')


def test_quarantine_is_capped(llm_request: LLMRequest, post_callback: Post, settings: Any) -> None:
    settings.QSTASH_LLM = settings.QSTASH_LLM | {"MAX_STORED_BODY_BYTES": 100}
    post_callback(llm_request, b"x" * 1000)
    assert len(bytes(CallbackResponse.objects.get().body)) == 100


# --- the database is not there ---


@contextmanager
def somebody_else_holds_the_database() -> Iterator[None]:
    """A real lock, held by a second connection, and no patience with it on ours."""
    if connection.vendor == "sqlite":
        other: Any = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        impatient = "PRAGMA busy_timeout = 20"
    else:
        names = {"dbname", "user", "password", "host", "port"}
        given = connection.get_connection_params().items()
        other = psycopg.connect(**{name: value for name, value in given if name in names})
        other.execute(f"LOCK TABLE {LLMRequest._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        impatient = "SET lock_timeout = '20ms'"
    with connection.cursor() as cursor:
        cursor.execute(impatient)
    try:
        yield
    finally:
        other.rollback()
        other.close()
        connection.close()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("body", [SUCCESS.to_json(), b"garbage"], ids=["answer", "garbage"])
def test_unavailable_database_is_503_and_qstash_comes_again(
    llm_request: LLMRequest, post_callback: Post, body: bytes
) -> None:
    with somebody_else_holds_the_database():
        response = post_callback(llm_request, body)
    assert response.status_code == 503
    # QStash's own back-off outlasts an outage; five repeats a few seconds apart would not.
    assert "Retry-After" not in response.headers
    assert CallbackResponse.objects.count() == 0
    assert post_callback(llm_request, body).status_code in {200, 489}
    assert CallbackResponse.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_connection_that_broke_is_503(llm_request: LLMRequest, post_callback: Post) -> None:
    connection.ensure_connection()
    connection.connection.close()
    try:
        response = post_callback(llm_request, SUCCESS)
    finally:
        connection.close()
    assert response.status_code == 503
    assert post_callback(llm_request, SUCCESS).status_code == 200


@pytest.mark.django_db(transaction=True)
def test_missing_table_is_503_and_not_the_callbacks_fault(
    llm_request: LLMRequest, post_callback: Post
) -> None:
    """A deploy whose migrations have not run yet must not make QStash give up."""
    table = LLMRequest._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO {table}_elsewhere")
    try:
        response = post_callback(llm_request, SUCCESS)
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table}_elsewhere RENAME TO {table}")
    assert response.status_code == 503
    assert CallbackResponse.objects.count() == 0


# --- secrets ---

CANARIES = [
    "sk-canary-0123456789",
    "ant-canary-0123456789",
    django_settings.QSTASH_TOKEN,
    CURRENT,
    NEXT,
]


def echoes() -> list[Callback | bytes]:
    """Every way in which a callback can bring a key back."""
    error = json.dumps({"error": {"message": f"Incorrect API key: {CANARIES[0]}"}}).encode()
    source = {"Authorization": [f"Bearer {CANARIES[0]}"], "X-Api-Key": [CANARIES[1]]}
    common: dict[str, Any] = {"source_header": source, "source_body": error, "max_retries": 0}
    return [
        Callback(status=401, body=error, source_message_id="m1", **common),
        Callback(status=401, body=gzip.compress(error), source_message_id="m2", **common),
        Callback(status=401, body=f"no: {CANARIES[1]}".encode(), source_message_id="m3", **common),
        Callback(
            status=401,
            header={"X-Echo": [CANARIES[0]], f"X-{CANARIES[1]}": ["1"], "Set-Cookie": ["a=b"]},
            source_message_id="m4",
            **common,
        ),
        Callback(status=200, body=DONE, source_message_id="m5", **common),
        Callback(status=200, body=error, source_message_id="m6", **common),
        Callback(status=200, body=error[:-9], source_message_id="m7", dlq_id="d", **common),
        Callback(status=500, body=error, source_message_id="m8", **common).to_json()[:-40],
        gzip.compress(Callback(status=500, source_message_id="m9", **common).to_json()[:-40]),
    ]


def readable(value: Any) -> str:
    """All of a value as text, packed bytes unpacked."""
    if isinstance(value, memoryview | bytes):
        raw = bytes(value)
        return repr(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return repr(value)


@pytest.mark.parametrize("number", range(len(echoes())))
def test_keys_that_come_back_are_in_no_row_log_or_response(
    llm_request: LLMRequest,
    post_callback: Post,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    response = post_callback(llm_request, echoes()[number])
    assert response.status_code in {200, 489}
    rows = [readable(v) for rows in snapshot().values() for row in rows for v in row.values()]
    logged = [repr(vars(record)) + record.getMessage() for record in caplog.records]
    # The request of the test client itself is in Django's own log records.
    logged = [text for text in logged if "django.request" not in text]
    everything = [*rows, *logged, response.content.decode(), str(response.headers)]
    assert [text for text in everything if any(canary in text for canary in CANARIES)] == []
