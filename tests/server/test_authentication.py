from __future__ import annotations

from collections.abc import Callable

import pytest

from django_qstash_llm.server.models import LogEntry, Message

from .conftest import KEYS, TOKEN, Api

INVALID = {"error": "unable to authenticate: invalid token"}
PATHS = [
    ("POST", "/v2/publish/https://a.test"),
    ("POST", "/v2/enqueue/q/https://a.test"),
    ("POST", "/v2/batch"),
    ("GET", "/v2/messages/msg_1"),
    ("DELETE", "/v2/messages"),
    ("GET", "/v2/events"),
    ("GET", "/v2/logs"),
    ("GET", "/v2/dlq"),
    ("DELETE", "/v2/dlq/1-1"),
    ("POST", "/v2/dlq/retry"),
    ("POST", "/v2/dlq/retry/1-1"),
    ("GET", "/v2/queues"),
    ("POST", "/v2/queues/q/pause"),
    ("GET", "/v2/keys"),
    ("POST", "/v2/keys/rotate"),
    ("GET", "/v2/anything"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_call_needs_the_token(api: Api, method: str, path: str) -> None:
    api.token = "another"
    answer = api.call(method, path)
    assert (answer.status_code, answer.json()) == (401, INVALID)
    assert not Message.objects.exists()
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer \xe9"])
def test_what_is_no_bearer_token_is_refused(api: Api, sent: str) -> None:
    api.token = ""
    answer = api.get("/v2/keys", headers={"Authorization": sent} if sent else {})
    assert (answer.status_code, answer.json()) == (401, INVALID)


def test_a_signing_key_is_no_token(api: Api) -> None:
    api.token = KEYS[0]
    assert api.get("/v2/keys").status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_may_be_written_any_way(api: Api, scheme: str) -> None:
    api.token = ""
    answer = api.get("/v2/keys", headers={"Authorization": f"{scheme} {TOKEN}"})
    assert answer.status_code == 200


def test_a_webhook_may_put_the_token_in_the_query_and_the_destination_never_sees_it(
    api: Api,
) -> None:
    api.token = ""
    answer = api.post(f"/v2/publish/https://a.test/p?qstash_token={TOKEN}&x=1")
    assert answer.status_code == 200
    assert Message.objects.get().url == "https://a.test/p?x=1"


def test_without_a_token_in_the_settings_nobody_gets_in(
    api: Api, configure: Callable[..., None]
) -> None:
    configure(TOKEN="")
    api.token = ""
    assert api.get("/v2/keys", headers={"Authorization": "Bearer "}).status_code == 401
    assert api.get("/v2/keys?qstash_token=").status_code == 401
