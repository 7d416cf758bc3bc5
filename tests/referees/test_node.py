"""``@upstash/qstash``, the JavaScript client: what each of its methods answers, whole.

``sdk.mjs`` makes the calls. It names its delivery address ``base``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from django_qstash_llm.server.serving import Server

from ..server.test_sdk import Recently, Some, redacted
from .conftest import HERE, Site, run_script

called: set[str] = set()
offered: set[str] = set()
NOT_SERVED = {
    # Deprecated by the SDK itself, and no part of what this server promises.
    "workflow.cancel",
    "chat.create",
    "chat.prompt",
}


class Ran(NamedTuple):
    base: str
    answers: dict[str, Any]
    received: list[dict[str, Any]]


@pytest.fixture
def run(server: Server, node_sdk: Path) -> Callable[[str], Ran]:
    def run(section: str) -> Ran:
        command = ("node", HERE / "sdk.mjs", section)
        environment = {"SDK": str(node_sdk)}
        printed = run_script(*command, url=server.url, environment=environment)
        called.update(printed["called"])
        offered.update(printed["offered"])
        return Ran(printed["base"], printed["answers"], printed["received"])

    return run


MESSAGE_ID = {"messageId": Some("msg_")}
DUPLICATE = MESSAGE_ID | {"deduplicated": True}
GLOBAL = {"X-Global": ["g"]}
HEADER = GLOBAL | {"X-Other": ["o, p"], "X-Trace": ["t"]}
BUSY = {"Content-Type": ["text/plain"], "X-Busy": ["1"]}
FLOW = {"flowControlKey": "k", "rate": 4, "period": 90, "parallelism": 3}


def told(base: str, created: Recently, due: Recently | None = None, **differences: Any) -> Any:
    """A message that was published with nothing but a URL."""
    return {
        "messageId": Some("msg_"),
        "url": f"{base}/later",
        "method": "POST",
        "maxRetries": 3,
        "createdAt": created,
        "notBefore": due or created,
        "header": GLOBAL,
        "callerIP": "127.0.0.1",
    } | differences


def everything(base: str, content_type: str = "text/plain") -> dict[str, Any]:
    """What the script's options of that name come to."""
    return {
        "method": "PUT",
        "header": {"Content-Type": [content_type]} | HEADER,
        "callback": f"{base}/callback",
        "failureCallback": f"{base}/failure",
        "maxRetries": 2,
        "retryDelayExpression": "1000 * (1 + retried)",
        "timeout": 30,
        "label": "a",
        "labels": ["a", "b"],
    }


def refused(status: int, beginning: str) -> dict[str, Any]:
    return {"name": "QstashError", "status": status, "message": Some(f'{{"error":"{beginning}')}


def test_what_was_published_is_told_whole(run: Callable[[str], Ran]) -> None:
    now, in_a_minute, in_an_hour = Recently(), Recently(60), Recently(3600)
    base, answers, _ = run("publish")
    first, first_same = answers["first"], answers["firstSame"]
    assert answers == {
        "publish": MESSAGE_ID,
        "get": told(base, now, in_an_hour, body="héllo")
        | everything(base)
        | FLOW
        | {"url": f"{base}/later?x=1", "ratePerSecond": 4},
        "bare": told(base, now, in_a_minute),
        "redacted": told(
            base,
            now,
            in_a_minute,
            body=redacted("b"),
            header=GLOBAL
            | {
                "Content-Type": ["text/plain;charset=UTF-8"],
                "Authorization": [redacted("k")],
                "X-Trace": ["t"],
            },
        ),
        "dated": 0,
        "first": MESSAGE_ID,
        "again": first | {"deduplicated": True},
        "firstSame": MESSAGE_ID,
        "againSame": first_same | {"deduplicated": True},
    }


def test_the_receiver_believes_what_arrives_and_nothing_else(run: Callable[[str], Ran]) -> None:
    now = Recently()
    base, answers, received = run("delivery")
    message_id = answers["publishJSON"]["messageId"]
    assert answers["verified"] == [True, True]
    assert [each["name"] for each in answers["refused"]] == ["SignatureError"] * 4
    first, callback = received
    assert (first["method"], first["url"]) == ("PUT", "/a%2Fb//c?x=1&y=%20")
    assert first["body"] == '{"n":"é"}'
    headers = first["headers"]
    assert {name: value for name, value in headers.items() if name.startswith(("x-", "up"))} == {
        "x-global": "g",
        "x-other": "o, p",
        "x-trace": "t",
        "upstash-message-id": message_id,
        "upstash-retried": "0",
        "upstash-signature": headers["upstash-signature"],
        "upstash-caller-ip": "127.0.0.1",
        "upstash-region": "EU-CENTRAL-1",
    }
    assert headers["user-agent"] == "Upstash-QStash"
    envelope = json.loads(callback["body"])
    assert envelope == {
        "status": 200,
        "header": {"Content-Type": ["application/json"]},
        "body": base64.b64encode(b'{"ok":true}').decode(),
        "retried": 0,
        "maxRetries": 2,
        "sourceMessageId": message_id,
        "url": f"{base}/a%2Fb//c?x=1&y=%20",
        "method": "PUT",
        "sourceHeader": {"Content-Type": ["application/json"]} | HEADER,
        "sourceBody": base64.b64encode('{"n":"é"}'.encode()).decode(),
        "notBefore": now,
        "createdAt": now,
        "callerIP": "127.0.0.1",
    }


def test_providers_are_called_as_the_sdk_has_it(run: Callable[[str], Ran], site: Site) -> None:
    _, answers, received = run("providers")
    shared = GLOBAL | {"Content-Type": ["application/json"]}
    chat = "/v1/chat/completions"
    assert answers == {
        "openai": {
            "url": f"https://api.openai.com{chat}",
            "header": shared | {"Authorization": ["Bearer sk-1"], "Openai-Organization": ["org"]},
        },
        "anthropic": {
            "url": "https://api.anthropic.com/v1/messages",
            "header": shared | {"Anthropic-Version": ["2023-06-01"], "X-Api-Key": ["ant-1"]},
        },
        "custom": {
            "url": f"https://a.test{chat}",
            "header": shared | {"Authorization": ["Bearer c-1"]},
        },
        "helicone": {
            "url": f"https://gateway.helicone.ai{chat}",
            "header": shared
            | {
                "Authorization": ["Bearer sk-1"],
                "Helicone-Auth": ["Bearer h-1"],
                "Helicone-Target-Url": ["https://api.openai.com"],
            },
        },
        "hosted": MESSAGE_ID,
    }
    [asked] = site.to(chat)
    assert asked.headers["Authorization"] == "Bearer hosted-key"
    [callback] = received
    envelope = json.loads(callback["body"])
    completion = json.loads(base64.b64decode(envelope["body"]))
    assert envelope["sourceMessageId"] == answers["hosted"]["messageId"]
    assert completion["choices"][0]["message"]["content"] == "hi to you too."


def test_a_batch_is_answered_in_order_and_told_whole(run: Callable[[str], Ran]) -> None:
    now, in_a_minute, in_an_hour = Recently(), Recently(60), Recently(3600)
    base, answers, _ = run("batch")
    batch = answers["batch"]
    assert batch[3]["messageId"] == batch[2]["messageId"]
    whole = everything(base) | FLOW | {"ratePerSecond": 4}
    third = told(base, now, in_a_minute, body="2")
    assert answers == {
        "batch": [MESSAGE_ID, MESSAGE_ID, MESSAGE_ID, DUPLICATE],
        "batchTold": [
            told(base, now, in_an_hour, body="0") | whole,
            told(base, now, body="1", queueName="q"),
            third,
            third,
        ],
        "batchJSON": [MESSAGE_ID, MESSAGE_ID, {"error": "topic no-such-group not found"}],
        "batchJSONTold": [
            told(
                base,
                now,
                body='{"n":1}',
                queueName="q",
                header=GLOBAL | {"Content-Type": ["application/json"], "X-Trace": ["t"]},
            ),
            told(base, now, in_an_hour, body='{"n":2}')
            | whole
            | everything(base, "application/json"),
        ],
        "single": [MESSAGE_ID],
    }


def test_messages_are_cancelled(run: Callable[[str], Ran]) -> None:
    _, answers, _ = run("cancelling")
    assert answers == {
        "one": {"cancelled": 1},
        "oneAgain": refused(404, "message msg_"),
        "getCancelled": refused(404, "message msg_"),
        "deleted": None,
        "many": {"cancelled": 2},
        "byIds": {"cancelled": 1},
        "none": {"cancelled": 0},
        "deleteMany": 1,
        "byLabel": {"cancelled": 2},
        "byFlow": {"cancelled": 1},
        "byUrl": {"cancelled": 0},
        "byDate": {"cancelled": 0},
        "misspelt": refused(400, "unknown filter: labeel"),
        "all": {"cancelled": 2},
        # More than the hundred it asks for: it says of itself that the server ignores that.
        "deleteAll": 150,
    }


def without_answer(entry: dict[str, Any]) -> dict[str, Any]:
    """Documented for errors only: whether other entries have it is free."""
    of_answer = ("responseHeader", "responseHeaders")
    return {name: value for name, value in entry.items() if name not in of_answer}


class Lately(Recently):
    """Within the last minute: the script took its time."""

    def __init__(self) -> None:
        super().__init__()
        self.since -= 60_000


def test_logs_are_told_whole_and_filtered(run: Callable[[str], Ran]) -> None:
    base, answers, _ = run("logs")
    about = everything(base) | {
        "url": f"{base}/ok",
        "messageId": Some("msg_"),
        "time": Lately(),
        "timeout": 30_000,
        "retryDelayExpr": "1000 * (1 + retried)",
    }
    logs, busy = answers["logs"], answers["busy"]["logs"]
    assert "cursor" not in logs
    assert [without_answer(entry) for entry in logs["logs"]] == [
        about | {"state": "DELIVERED", "responseStatus": 200},
        about | {"state": "ACTIVE"},
        about | {"state": "CREATED"},
    ]
    assert logs["events"] == logs["logs"]
    assert answers["events"] == logs
    of_busy = {
        "messageId": Some("msg_"),
        "url": f"{base}/busy",
        "method": "POST",
        "time": Lately(),
        "header": GLOBAL | {"Content-Type": ["text/plain;charset=UTF-8"]},
        "maxRetries": 1,
        "retryDelayExpr": "1",
        "retryDelayExpression": "1",
    }
    answer = {"responseStatus": 503, "responseBody": "YnVzeQ=="}
    answer |= {"responseHeader": BUSY, "responseHeaders": BUSY}
    due = {"nextDeliveryTime": busy[3]["nextDeliveryTime"]}
    assert due["nextDeliveryTime"] == Lately()
    assert busy == [
        of_busy | {"state": "FAILED"} | answer,
        of_busy | {"state": "ERROR"} | answer,
        of_busy | {"state": "ACTIVE"},
        of_busy | {"state": "RETRY"} | due,
        of_busy | {"state": "ERROR"} | answer | due,
        of_busy | {"state": "ACTIVE"},
        of_busy | {"state": "CREATED"},
    ]
    names = ("canceled", "labelled", "inProgress", "nothing", "fromNow", "fromLongAgo")
    assert {name: answers[name] for name in names} == {
        "canceled": ["CANCELED"],
        "labelled": ["CANCELED", "CANCEL_REQUESTED", "CREATED"],
        "inProgress": ["ERROR", "ACTIVE", "RETRY", "ERROR", "ACTIVE"],
        "nothing": [],
        "fromNow": True,
        "fromLongAgo": [],
    }
    assert len(answers["pages"]) >= 3
    assert set(answers["pages"]) == {4}


def test_dead_letters_are_told_whole_retried_and_deleted(run: Callable[[str], Ran]) -> None:
    now = Recently()
    base, answers, _ = run("dlq")
    assert answers == {
        "letter": told(base, now, body="x")
        | everything(base)
        | FLOW
        | {
            "url": f"{base}/busy",
            "maxRetries": 0,
            "ratePerSecond": 4,
            "dlqId": answers["letter"]["dlqId"],
            "responseStatus": 503,
            "responseHeader": BUSY,
            "responseBody": "busy",
        },
        "listed": {
            "byIds": 2,
            "byLabels": 3,
            "byStatus": 8,
            "byOtherStatus": 0,
            "byQueue": 1,
            "byFlow": 1,
            "byDate": 0,
            "byGroup": 0,
        },
        "pages": [6, 2, None],
        "retriedOne": {"responses": [MESSAGE_ID]},
        "retriedMany": {"responses": [MESSAGE_ID, MESSAGE_ID]},
        "retriedUnknown": {"responses": []},
        "retriedNone": {"responses": []},
        "retriedFilter": {"responses": []},
        "deletedOne": {"deleted": 1},
        "deletedAgain": refused(404, "dead letter "),
        "deletedMany": {"deleted": 1},
        "deleteMany": {"deleted": 1},
        "deletedUnknown": {"deleted": 0},
        "misspelt": refused(400, "unknown filter: labeel"),
        # The first of them and the one that was retried.
        "deletedFilter": {"deleted": 2},
        "deletedPage": [1, "string"],
        "deletedAll": {"deleted": 2},
        "retriedAll": {"responses": []},
    }


def test_queues_are_made_told_paused_and_deleted(run: Callable[[str], Ran]) -> None:
    now = Recently()
    base, answers, _ = run("queues")
    queue = {
        "name": "q",
        "parallelism": 2,
        "createdAt": now,
        "updatedAt": now,
        "lag": 0,
        "paused": True,
    }
    assert answers.pop("resumed") in [queue | {"paused": False, "lag": lag} for lag in (0, 1)]
    assert answers == {
        "unknown": refused(404, "queue q not found"),
        "get": queue,
        "enqueue": MESSAGE_ID,
        "enqueueJSON": MESSAGE_ID,
        "told": told(
            base,
            now,
            url=f"{base}/ok",
            body='{"n":1}',
            queueName="q",
            header=GLOBAL | {"Content-Type": ["application/json"]},
        ),
        "list": [queue | {"lag": 2}],
        "paused": True,
        "defaults": queue | {"parallelism": 1, "paused": False},
        "delayed": refused(400, "a message in a queue cannot be delayed"),
        "empty": [],
    }


def test_flow_control_is_told_pinned_and_reset(run: Callable[[str], Ran]) -> None:
    _, answers, _ = run("flowControl")
    key = {
        "flowControlKey": "k",
        "waitListSize": 0,
        "parallelismMax": 3,
        "parallelismCount": 0,
        "rateMax": 4,
        "rateCount": 0,
        "ratePeriod": 90,
        "ratePeriodStart": 0,
        "isPaused": False,
        "isPinnedParallelism": False,
        "isPinnedRate": False,
    }
    starts = [answers[name]["ratePeriodStart"] for name in ("resumed", "reset")]
    assert all(start * 1000 == Lately() for start in starts)
    assert answers["global"]["parallelismMax"] > 0
    assert answers == {
        "unknown": refused(404, "flow control key k not found"),
        "get": key,
        "global": answers["global"] | {"parallelismCount": 0},
        "paused": key | {"waitListSize": 1, "isPaused": True},
        "resumed": key | {"rateCount": 1, "ratePeriodStart": starts[0]},
        "reset": key | {"ratePeriodStart": starts[1]},
        "pinned": key
        | {
            "parallelismMax": 7,
            "rateMax": 8,
            "ratePeriod": 9,
            "isPinnedParallelism": True,
            "isPinnedRate": True,
        },
        "unpinned": key,
        "lone": refused(
            400,
            "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, or both as "
            "comma-separated values",
        ),
    }


def test_url_groups_are_made_told_and_published_to(run: Callable[[str], Ran]) -> None:
    now = Recently()
    base, answers, received = run("urlGroups")
    group = {
        "name": "g",
        "createdAt": now,
        "updatedAt": now,
        "endpoints": [{"name": "first", "url": f"{base}/one"}, {"url": f"{base}/two"}],
    }
    both = [MESSAGE_ID | {"url": f"{base}/one"}, MESSAGE_ID | {"url": f"{base}/two"}]
    assert answers == {
        "get": group,
        "list": [group],
        "publish": both,
        "topic": both,
        "batch": [MESSAGE_ID, both],
        "enqueue": both,
        "told": told(
            base,
            now,
            url=f"{base}/one",
            body='{"n":1}',
            header=GLOBAL | {"Content-Type": ["application/json"]},
            topicName="g",
            endpointName="first",
            urlGroup="g",
        ),
        "groups": ["g"],
        "removed": [{"url": f"{base}/two"}],
        "vanished": refused(404, ""),
        "empty": [],
        "unknown": refused(404, ""),
    }
    assert {each["headers"]["upstash-topic-name"] for each in received} == {"g"}


def test_schedules_are_made_told_paused_and_deleted(run: Callable[[str], Ran]) -> None:
    now = Recently()
    base, answers, _ = run("schedules")
    schedule = {
        "scheduleId": "mine",
        "destination": f"{base}/later",
        "cron": "0 0 1 1 *",
        "createdAt": now,
        "method": "POST",
        "retries": 3,
        "callerIP": "127.0.0.1",
        "isPaused": False,
    }
    whole = everything(base)
    del whole["maxRetries"]
    [replaced] = answers["replaced"]
    assert replaced["nextScheduleTime"] % 60_000 == answers["get"]["nextScheduleTime"] % 60_000 == 0
    assert answers == {
        "create": {"scheduleId": "mine"},
        "get": schedule
        | whole
        | FLOW
        | {
            "body": "x",
            "delay": 60,
            "retries": 2,
            "ratePerSecond": 4,
            "nextScheduleTime": answers["get"]["nextScheduleTime"],
        },
        "paused": [True],
        "resumed": False,
        "again": {"scheduleId": "mine"},
        "replaced": [
            schedule
            | {
                "cron": "CRON_TZ=Asia/Tokyo 0 0 1 1 *",
                "header": GLOBAL | {"Content-Type": ["application/json"]},
                "createdAt": replaced["createdAt"],
                "nextScheduleTime": replaced["nextScheduleTime"],
            }
        ],
        "empty": [],
        "gone": refused(404, ""),
        "own": {"scheduleId": Some("scd_")},
        "badCron": refused(400, ""),
    }


def test_refusals_are_in_qstashs_words(run: Callable[[str], Ran]) -> None:
    _, answers, _ = run("errors")
    chat = answers.pop("chat")
    assert (chat["name"], chat["status"]) == ("QstashError", 404)
    assert answers == {
        "stranger": refused(401, 'unable to authenticate: invalid token"}'),
        "scheme": refused(400, "invalid destination url: endpoint has invalid scheme"),
        "delay": refused(
            400, 'invalid Upstash-Delay header: time: missing unit in duration \\"1\\""}'
        ),
        "retries": refused(412, 'quota maxRetries exceeded"}'),
        "colon": refused(400, "invalid "),
        "callback": refused(400, "invalid "),
        "message": refused(404, "message msg_unknown not found"),
        "workflow": refused(404, "not found"),
    }


@pytest.mark.last
def test_no_method_of_the_sdk_was_left_uncalled(request: pytest.FixtureRequest) -> None:
    here = {name for name in globals() if name.startswith("test_")}
    ran = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if ran != here or not offered:
        pytest.skip("only some of this module's tests ran")
    assert len(offered) > 45
    assert offered - called == NOT_SERVED
