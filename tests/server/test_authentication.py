from __future__ import annotations

from collections.abc import Callable

import pytest
from django.test import override_settings

from django_qstash_llm.server import conf
from django_qstash_llm.server.models import FlowControlKey, LogEntry, Message, Queue

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
    ("GET", "/v2/flowControl/k"),
    ("POST", "/v2/flowControl/k/pause"),
    ("GET", "/v2/globalParallelism"),
    ("POST", "/v2/topics/g/endpoints"),
    ("DELETE", "/v2/topics/g"),
    ("GET", "/v2/topics"),
    ("POST", "/v2/schedules/https://a.test"),
    ("PATCH", "/v2/schedules/s/pause"),
    ("DELETE", "/v2/schedules/s"),
    ("GET", "/v2/schedules"),
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


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_read_only_token_reads_and_writes_nothing(
    api: Api, configure: Callable[..., None], method: str, path: str
) -> None:
    configure(READ_ONLY_TOKEN="reader")
    api.token = "reader"
    answer = api.call(method, path)
    if method == "GET" and path != "/v2/keys":
        assert answer.status_code in {200, 404}
    else:
        assert answer.status_code == 403
        assert answer.json() == {"error": "forbidden: this token is read-only"}
    assert not Message.objects.exists()
    assert not Queue.objects.exists()
    assert not FlowControlKey.objects.exists()


def test_a_read_only_token_in_the_query_may_not_publish(
    api: Api, configure: Callable[..., None]
) -> None:
    configure(READ_ONLY_TOKEN="reader")
    api.token = ""
    answer = api.post("/v2/publish/https://a.test/p?qstash_token=reader")
    assert answer.status_code == 403
    assert not Message.objects.exists()


@override_settings(DEBUG=False)
@pytest.mark.parametrize("name", ["TOKEN", "READ_ONLY_TOKEN"])
def test_a_token_that_everybody_knows_is_none_outside_debug(
    api: Api, configure: Callable[..., None], name: str
) -> None:
    configure(**{name: conf.DEVELOPMENT_TOKEN})
    api.token = conf.DEVELOPMENT_TOKEN
    answer = api.get("/v2/queues")
    assert (answer.status_code, answer.json()) == (401, INVALID)
    with override_settings(DEBUG=True):
        assert api.get("/v2/queues").status_code == 200
