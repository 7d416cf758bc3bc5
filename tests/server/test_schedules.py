"""What is published again and again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import qstash
from django.db import connection
from django.http import HttpResponse
from django.test.utils import CaptureQueriesContext
from qstash.schedule import ScheduleState

from django_qstash_llm.server import doorbell
from django_qstash_llm.server.models import Message, Outcome, Queue, Schedule
from django_qstash_llm.server.models.schedule import MOST_SCHEDULES
from django_qstash_llm.server.serving import Server

from .conftest import CALLBACK, FAILURE, PROVIDER, TOKEN, Api, with_dashes
from .test_models import at_once
from .test_serving import connected

OTHER = {"other": {"TOKEN": "the-token-of-somebody-else-0001"}}
HOURLY = "0 * * * *"


def create(
    api: Api, destination: str = PROVIDER, body: bytes = b"", cron: str = HOURLY, **headers: str
) -> HttpResponse:
    sent = with_dashes(headers) | {"Upstash-Cron": cron}
    return api.post(f"/v2/schedules/{destination}", body, headers=sent)


def created(api: Api, destination: str = PROVIDER, body: bytes = b"", **headers: str) -> str:
    answer = create(api, destination, body, **headers)
    assert answer.status_code == 200, answer.content
    return answer.json()["scheduleId"]


def read(api: Api, schedule_id: str) -> dict[str, Any]:
    answer = api.get(f"/v2/schedules/{schedule_id}")
    assert answer.status_code == 200, answer.content
    return answer.json()


def next_at() -> datetime:
    moment = Schedule.objects.next_at()
    assert moment is not None
    return moment


def fire(after: timedelta = timedelta()) -> int:
    """When the first is due, or later."""
    return Schedule.objects.fire_due(now=next_at() + after)


def milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


# --- the schedule itself -----------------------------------------------------------------------


def test_a_schedule_is_read_back_with_all_it_said(api: Api) -> None:
    schedule_id = created(
        api,
        f"{PROVIDER}?v=1",
        b"\x00\xffbytes",
        cron=" CRON_TZ=Europe/Berlin  */10 8-9 * * mon ",
        Content_Type="application/octet-stream",
        Upstash_Method="put",
        Upstash_Retries="5",
        Upstash_Timeout="90s",
        Upstash_Delay="1m",
        Upstash_Callback=CALLBACK,
        Upstash_Failure_Callback=FAILURE,
        Upstash_Callback_Forward_X_A="a",
        Upstash_Failure_Callback_Forward_X_B="b",
        Upstash_Label="a, b",
        Upstash_Flow_Control_Key="k",
        Upstash_Flow_Control_Value="rate=4, period=2s, parallelism=3",
        Upstash_Retry_Delay="1000 * (1 + retried)",
        Upstash_Forward_X_Trace="t",
        Upstash_Telemetry_Sdk="x",
    )
    assert schedule_id.startswith("scd_")
    record = read(api, schedule_id)
    assert record == {
        "scheduleId": schedule_id,
        "cron": "CRON_TZ=Europe/Berlin */10 8-9 * * mon",
        "destination": f"{PROVIDER}?v=1",
        "createdAt": record["createdAt"],
        "method": "PUT",
        "isPaused": False,
        "header": {"Content-Type": ["application/octet-stream"], "X-Trace": ["t"]},
        "bodyBase64": "AP9ieXRlcw==",
        "retries": 5,
        "delay": 60,
        "timeout": 90,
        "callback": CALLBACK,
        "failureCallback": FAILURE,
        "callbackHeader": {"X-A": ["a"]},
        "failureCallbackHeader": {"X-B": ["b"]},
        "callerIP": "127.0.0.1",
        "label": "a",
        "labels": ["a", "b"],
        "flowControlKey": "k",
        "rate": 4,
        "period": 2,
        "parallelism": 3,
        "retryDelayExpression": "1000 * (1 + retried)",
        "nextScheduleTime": milliseconds(next_at()),
    }
    assert api.get("/v2/schedules").json() == [record]


def test_a_plain_schedule_tells_what_clients_cannot_do_without(api: Api) -> None:
    record = read(api, created(api))
    assert set(record) == {
        "scheduleId",
        "cron",
        "destination",
        "createdAt",
        "method",
        "retries",
        "isPaused",
        "callerIP",
        "nextScheduleTime",
    }
    assert (record["method"], record["retries"], record["cron"]) == ("POST", 3, HOURLY)


def test_the_query_says_what_headers_would(api: Api) -> None:
    query = "upstash-cron=0%208%20*%20*%20*&upstash-schedule-id=mine&upstash-retries=1&x=1"
    answer = api.post(f"/v2/schedules/{PROVIDER}?{query}", b"x")
    assert answer.json() == {"scheduleId": "mine"}
    record = read(api, "mine")
    assert (record["cron"], record["retries"]) == ("0 8 * * *", 1)
    assert record["destination"] == f"{PROVIDER}?x=1"


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ({"Upstash-Cron": ""}, 400, "missing Upstash-Cron header"),
        ({"Upstash-Cron": "99 * * * *"}, 400, "invalid Upstash-Cron header: minute"),
        ({"Upstash-Cron": "* * * * * *"}, 400, "invalid Upstash-Cron header: 6 fields"),
        ({"Upstash-Cron": "0 0 30 2 *"}, 400, "invalid Upstash-Cron header: no month"),
        ({"Upstash-Cron": "CRON_TZ=X * * * * *"}, 400, 'unknown time zone "X"'),
        ({"Upstash-Schedule-Id": "a b"}, 400, "Upstash-Schedule-Id"),
        ({"Upstash-Schedule-Id": ".."}, 400, "Upstash-Schedule-Id"),
        ({"Upstash-Schedule-Id": "x" * 257}, 400, "Upstash-Schedule-Id"),
        ({"Upstash-Queue-Name": "a/b"}, 400, "queue"),
        ({"Upstash-Retries": "x"}, 400, "Upstash-Retries"),
        ({"Upstash-Callback": "http://127.0.0.1/"}, 400, "loopback"),
        ({"Upstash-Delay": "9999d"}, 412, "quota maxDelay exceeded"),
        ({"Upstash-Delay": "9999d", "Upstash-Queue-Name": "q"}, 412, "quota maxDelay exceeded"),
        ({"Upstash-Not-Before": "4000000000"}, 412, "quota maxDelay exceeded"),
        ({"Upstash-Not-Before": "1", "Upstash-Queue-Name": "q"}, 400, "its turn decides"),
    ],
)
def test_what_could_never_be_published_is_refused(
    api: Api, headers: dict[str, str], status: int, problem: str
) -> None:
    answer = api.post(f"/v2/schedules/{PROVIDER}", headers={"Upstash-Cron": HOURLY} | headers)
    assert (answer.status_code, problem in answer.json()["error"]) == (status, True), answer.content
    assert not Schedule.objects.exists()


@pytest.mark.parametrize(
    ("destination", "status", "problem"),
    [
        ("", 400, "invalid destination url"),
        ("a.test/x", 400, "invalid scheme"),
        ("http://127.0.0.1/", 400, "loopback"),
        ("nobody", 404, "topic nobody not found"),
        ("api/llm", 400, "api/llm"),
    ],
)
def test_a_bad_destination_is_refused(
    api: Api, destination: str, status: int, problem: str
) -> None:
    answer = create(api, destination)
    assert (answer.status_code, problem in answer.json()["error"]) == (status, True), answer.content
    assert not Schedule.objects.exists()


def test_hosted_models_may_be_asked_by_a_schedule(api: Api, configure: Callable[..., None]) -> None:
    configure(HOSTED_MODELS_URL="https://models.test/v1")
    created(api, "api/llm", b'{"model":"m"}', Upstash_Callback=CALLBACK)
    assert fire() == 1
    assert Message.objects.get().url == "api/llm"


def test_an_account_has_so_many_schedules_and_no_more(api: Api) -> None:
    created(api, Upstash_Schedule_Id="one")
    now = datetime.now(UTC)
    Schedule.objects.bulk_create(
        Schedule(schedule_id=str(number), cron=HOURLY, destination=PROVIDER, created_at=now)
        for number in range(MOST_SCHEDULES - 1)
    )
    created(api, Upstash_Schedule_Id="one", cron="@daily")
    answer = create(api, Upstash_Schedule_Id="two")
    assert answer.status_code == 412
    assert answer.json() == {"error": "quota maxSchedules exceeded"}


def test_the_same_id_overwrites_everything(api: Api) -> None:
    headers = {"Upstash_Label": "a", "Upstash_Forward_X_Api_Key": "canary", "Upstash_Retries": "1"}
    created(api, body=b"body", Upstash_Schedule_Id="mine", **headers)
    api.post("/v2/schedules/mine/pause")
    before = read(api, "mine")
    created(api, "https://other.test/", Upstash_Schedule_Id="mine", cron="@daily")
    after = read(api, "mine")
    assert after == {
        "scheduleId": "mine",
        "cron": "@daily",
        "destination": "https://other.test/",
        "createdAt": before["createdAt"],
        "method": "POST",
        "retries": 3,
        "isPaused": False,
        "callerIP": "127.0.0.1",
        "nextScheduleTime": after["nextScheduleTime"],
    }
    assert Schedule.objects.get().secrets == {}


def test_the_tick_at_which_it_is_overwritten_is_not_lost(api: Api) -> None:
    created(api, Upstash_Schedule_Id="mine")
    due = datetime.now(UTC) - timedelta(milliseconds=1)
    Schedule.objects.update(next_at=due)
    created(api, "https://other.test/", Upstash_Schedule_Id="mine")
    assert next_at() == due
    created(api, Upstash_Schedule_Id="mine", cron="@daily")
    assert next_at() > due


def test_a_deleted_schedule_is_gone(api: Api) -> None:
    schedule_id = created(api)
    assert api.delete(f"/v2/schedules/{schedule_id}").status_code == 200
    assert api.get("/v2/schedules").json() == []
    assert Schedule.objects.next_at() is None


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("PATCH", "/pause"), ("POST", "/resume")],
)
@pytest.mark.parametrize("name", ["nobody", "scd_1"])
def test_an_unknown_schedule_is_not_found(api: Api, method: str, path: str, name: str) -> None:
    answer = api.call(method, f"/v2/schedules/{name}{path}")
    assert answer.status_code == 404
    assert answer.json() == {"error": f"schedule {name} not found"}


@pytest.mark.parametrize("name", ["a%20b", "a%00b", "https://a.test/"])
def test_what_is_no_id_is_not_found(api: Api, name: str) -> None:
    assert api.get(f"/v2/schedules/{name}").status_code == 404


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
def test_a_schedule_is_paused_and_resumed(api: Api, method: str) -> None:
    schedule_id = created(api)
    for _ in range(2):
        assert api.call(method, f"/v2/schedules/{schedule_id}/pause").status_code == 200
        record = read(api, schedule_id)
        assert (record["isPaused"], "nextScheduleTime" in record) == (True, False)
        assert Schedule.objects.next_at() is None
    for _ in range(2):
        assert api.call(method, f"/v2/schedules/{schedule_id}/resume").status_code == 200
        record = read(api, schedule_id)
        assert (record["isPaused"], "nextScheduleTime" in record) == (False, True)


def test_a_schedule_that_runs_is_not_moved_by_resuming_it(api: Api) -> None:
    schedule_id = created(api)
    due = datetime.now(UTC) - timedelta(milliseconds=1)
    Schedule.objects.update(next_at=due)
    api.call("PATCH", f"/v2/schedules/{schedule_id}/resume")
    assert next_at() == due


def test_keys_are_kept_to_publish_with_and_shown_nowhere(api: Api) -> None:
    schedule_id = created(
        api,
        body=b"private",
        Upstash_Forward_Authorization="Bearer sk-canary",
        Upstash_Callback=CALLBACK,
        Upstash_Callback_Forward_X_Api_Key="canary-2",
        Upstash_Redact_Fields="body, header[X-Other]",
        Upstash_Forward_X_Other="canary-3",
    )
    row = Schedule.objects.get()
    assert "canary" not in json.dumps({**row.headers, "Upstash-Forward-X-Other": ""})
    for answer in (api.get(f"/v2/schedules/{schedule_id}"), api.get("/v2/schedules")):
        assert b"canary" not in answer.content
        assert b"private" not in answer.content
    record = read(api, schedule_id)
    assert record["header"]["Authorization"] == ["REDACTED"]
    assert record["header"]["X-Other"][0].startswith("REDACTED:")
    assert record["callbackHeader"] == {"X-Api-Key": ["REDACTED"]}
    assert fire() == 1
    wire = Message.objects.get().wire
    assert wire.options.headers["Authorization"] == "Bearer sk-canary"
    assert wire.options.callback is not None
    assert wire.options.callback.headers["X-Api-Key"] == "canary-2"
    assert wire.options.headers["X-Other"] == "canary-3"


# --- firing ------------------------------------------------------------------------------------


def test_it_is_published_when_it_is_time_and_not_before(api: Api) -> None:
    schedule_id = created(api, body=b"hello", Upstash_Retries="1", Upstash_Delay="1m")
    due = next_at()
    assert Schedule.objects.fire_due(now=due - timedelta(microseconds=1)) == 0
    assert Schedule.objects.fire_due(now=due) == 1
    message = Message.objects.get()
    record = api.get(f"/v2/messages/{message.message_id}").json()
    assert record == {
        "messageId": message.message_id,
        "url": PROVIDER,
        "scheduleId": schedule_id,
        "method": "POST",
        "header": {"Content-Type": ["application/json"]},
        "body": "hello",
        "maxRetries": 1,
        "createdAt": milliseconds(due),
        "notBefore": milliseconds(due) + 60_000,
        "callerIP": "127.0.0.1",
    }
    assert next_at() == due + timedelta(hours=1)
    assert Schedule.objects.fire_due(now=due + timedelta(minutes=59)) == 0
    assert fire() == 1


def test_what_became_of_the_last_run_is_told(api: Api) -> None:
    schedule_id = created(api)
    due = next_at()
    fire()
    first = Message.objects.get()
    record = read(api, schedule_id)
    assert record["lastScheduleTime"] == milliseconds(due)
    assert record["nextScheduleTime"] == milliseconds(due) + 3_600_000
    assert record["lastScheduleStates"] == {first.message_id: "IN_PROGRESS"}
    [claimed] = Message.objects.claim(engine="e", limit=1, now=due, lease=60)
    claimed.record(Outcome(status=200), now=due)
    assert read(api, schedule_id)["lastScheduleStates"] == {first.message_id: "SUCCESS"}
    fire()
    second = Message.objects.latest("pk")
    api.delete(f"/v2/messages/{second.message_id}")
    assert read(api, schedule_id)["lastScheduleStates"] == {second.message_id: "FAIL"}


def test_a_stretch_that_was_missed_is_made_up_for_once(api: Api) -> None:
    created(api)
    due = next_at()
    assert fire(after=timedelta(hours=5, minutes=20)) == 1
    assert next_at() == due + timedelta(hours=6)
    assert Message.objects.count() == 1


def test_a_paused_schedule_never_fires_and_makes_up_for_nothing(api: Api) -> None:
    schedule_id = created(api)
    far = next_at() + timedelta(days=30)
    api.post(f"/v2/schedules/{schedule_id}/pause")
    assert Schedule.objects.fire_due(now=far) == 0
    api.post(f"/v2/schedules/{schedule_id}/resume")
    assert next_at() > datetime.now(UTC)
    assert not Message.objects.exists()


def test_a_group_is_looked_up_anew_each_time(api: Api) -> None:
    def endpoints(*urls: str) -> None:
        api.post("/v2/topics/group/endpoints", {"endpoints": [{"url": url} for url in urls]})

    endpoints("https://a.test/", "https://b.test/")
    schedule_id = created(api, "group", Upstash_Forward_X="mine")
    headers = {"Upstash-Retries": "1", "Upstash-Forward-X": "default"}
    api.call("PATCH", "/v2/topics/group", {"headers": headers})
    assert fire() == 2
    endpoints("https://c.test/")
    assert fire() == 3
    urls = list(Message.objects.order_by("pk").values_list("url", flat=True))
    a_and_b = ["https://a.test/", "https://b.test/"]
    assert urls == [*a_and_b, *a_and_b, "https://c.test/"]
    for message in Message.objects.all():
        assert (message.topic_name, message.schedule_id) == ("group", schedule_id)
        assert (message.retries, message.wire.options.headers["X"]) == (1, "mine")
    assert len(read(api, schedule_id)["lastScheduleStates"]) == 3


def test_what_can_no_longer_be_published_says_why_and_goes_on(api: Api) -> None:
    endpoints = {"endpoints": [{"url": "https://a.test/"}]}
    api.post("/v2/topics/group/endpoints", endpoints)
    broken, good = created(api, "group"), created(api)
    api.delete("/v2/topics/group")
    due = next_at()
    assert fire() == 1
    record = read(api, broken)
    assert record["error"] == "topic group not found"
    assert record["lastScheduleTime"] == milliseconds(due)
    assert "lastScheduleStates" not in record
    assert "error" not in read(api, good)
    api.post("/v2/topics/group/endpoints", endpoints)
    assert fire() == 2
    assert "error" not in read(api, broken)


def test_a_quota_that_was_lowered_is_told_too(api: Api, configure: Callable[..., None]) -> None:
    schedule_id = created(api, Upstash_Retries="9")
    configure(MAX_RETRIES=5)
    assert fire() == 0
    assert read(api, schedule_id)["error"] == "quota maxRetries exceeded"


def test_an_expression_that_can_no_longer_be_read_does_not_publish_for_ever(api: Api) -> None:
    """Time zones come and go with the machine's data."""
    schedule_id = created(api)
    due = next_at()
    Schedule.objects.update(cron="CRON_TZ=Gone/Away 0 * * * *")
    assert Schedule.objects.fire_due(now=due) == 0
    assert Schedule.objects.next_at() is None
    assert 'unknown time zone "Gone/Away"' in read(api, schedule_id)["error"]
    assert api.post(f"/v2/schedules/{schedule_id}/resume").status_code == 400


def test_a_queue_gets_its_message_when_the_delay_is_over(api: Api) -> None:
    """As the SDKs' suites ask for it: a delay, and a queue."""
    now = datetime.now(UTC)
    schedule_id = created(api, Upstash_Queue_Name="q", Upstash_Delay="10s")
    record = read(api, schedule_id)
    assert (record["queueName"], record["delay"]) == ("q", 10)
    due = next_at()
    assert due > now
    assert (due.minute, due.second) == (0, 10)
    assert fire(after=timedelta(seconds=5)) == 1
    message = Message.objects.get()
    assert (message.queue, message.not_before) == (Queue.objects.get(), message.created_at)
    assert next_at() == due + timedelta(hours=1)
    assert fire(after=timedelta(hours=3, seconds=-5)) == 1
    assert next_at() == due + timedelta(hours=4)


def test_deduplication_counts_for_schedules_too(api: Api) -> None:
    schedule_id = created(api, cron="* * * * *", Upstash_Deduplication_Id="once")
    fire()
    message = Message.objects.get()
    fire()
    assert Message.objects.count() == 1
    assert set(read(api, schedule_id)["lastScheduleStates"]) == {message.message_id}


def test_messages_are_found_by_their_schedule(api: Api) -> None:
    schedule_id = created(api)
    api.published()
    fire()
    answer = api.delete(f"/v2/messages?scheduleId={schedule_id}")
    assert answer.json() == {"cancelled": 1}


def test_when_nothing_is_due_one_query_says_so(api: Api) -> None:
    created(api)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert Schedule.objects.fire_due(now=datetime.now(UTC) - timedelta(days=1)) == 0
    assert len(queries) == 1


@pytest.mark.django_db(transaction=True)
def test_of_several_engines_one_fires() -> None:
    with doorbell.listening(threading.Event()):
        created(Api())
        created(Api())
    due = next_at()
    assert sum(at_once(8, lambda _: Schedule.objects.fire_due(now=due))) == 2
    assert Message.objects.count() == 2
    assert next_at() == due + timedelta(hours=1)


@pytest.mark.django_db(transaction=True)
def test_the_same_id_at_once_makes_one_schedule() -> None:
    def work(number: int) -> int:
        return create(Api(), Upstash_Schedule_Id="mine", Upstash_Label=str(number)).status_code

    assert at_once(8, work) == [200] * 8
    assert Schedule.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_pausing_while_it_fires_holds() -> None:
    with doorbell.listening(threading.Event()):
        schedule_id = created(Api())
    due = next_at()

    def work(number: int) -> int:
        if number % 2:
            return Schedule.objects.fire_due(now=due)
        return Api().post(f"/v2/schedules/{schedule_id}/pause").status_code

    at_once(6, work)
    schedule = Schedule.objects.get()
    assert (schedule.is_paused, schedule.next_at) == (True, None)
    assert Message.objects.count() <= 1


# --- whose -------------------------------------------------------------------------------------


def test_each_account_has_its_own_schedules(api: Api, configure: Callable[..., None]) -> None:
    configure(ACCOUNTS=OTHER)
    other = Api()
    other.token = OTHER["other"]["TOKEN"]
    created(api, Upstash_Schedule_Id="mine")
    assert other.get("/v2/schedules").json() == []
    for method, path in (("GET", ""), ("DELETE", ""), ("PATCH", "/pause")):
        assert other.call(method, f"/v2/schedules/mine{path}").status_code == 404
    created(other, "https://other.test/", Upstash_Schedule_Id="mine")
    assert read(api, "mine")["destination"] == PROVIDER
    assert fire() == 2
    accounts = dict(Message.objects.values_list("url", "account"))
    assert accounts == {PROVIDER: "", "https://other.test/": "other"}


# --- the official SDK --------------------------------------------------------------------------


@pytest.fixture
def sdk(transactional_db: None, qstash_server: dict[str, Any]) -> Iterator[qstash.QStash]:
    with Server() as server, connected(server.url, TOKEN) as sdk:
        yield sdk


def test_the_sdk_can_do_all_of_it(sdk: qstash.QStash) -> None:
    schedule_id = sdk.schedule.create_json(
        destination=PROVIDER,
        cron="1 1 1 1 1",
        body={"ex_key": "ex_value"},
        headers={"X-Trace": "t"},
        schedule_id="mine",
        delay=10,
        timeout=30,
        queue="q",
        flow_control={"key": "k", "parallelism": 2, "period": "1d", "rate": 3},
        label="a",
        redact={"body": True},
    )
    assert schedule_id == "mine"
    schedule = sdk.schedule.get("mine")
    assert [each.schedule_id for each in sdk.schedule.list()] == ["mine"]
    assert (schedule.destination, schedule.cron) == (PROVIDER, "1 1 1 1 1")
    assert (schedule.delay, schedule.timeout, schedule.queue) == (10, 30, "q")
    assert schedule.headers == {"Content-Type": ["application/json"], "X-Trace": ["t"]}
    assert (schedule.flow_control.key, schedule.flow_control.period) == ("k", 86_400)
    assert schedule.body.startswith("REDACTED:")
    sdk.schedule.pause("mine")
    assert sdk.schedule.get("mine").paused
    sdk.schedule.resume("mine")
    assert not sdk.schedule.get("mine").paused
    Queue.objects.update(is_paused=True)
    fire()
    fired = sdk.schedule.get("mine")
    assert list(fired.last_schedule_states.values()) == [ScheduleState.IN_PROGRESS]
    sdk.schedule.delete("mine")
    assert sdk.schedule.list() == []


def test_a_listing_leaves_out_bodies_that_it_has_no_room_for(api: Api) -> None:
    body = b"x" * (9 * 1024 * 1024)
    headers = {"Upstash-Cron": "0 * * * *", "Upstash-Redact-Fields": "header"}
    ids = [
        api.post(f"/v2/schedules/{PROVIDER}", body, headers=headers).json()["scheduleId"]
        for _ in range(3)
    ]
    listed = api.get("/v2/schedules").json()
    assert [each["scheduleId"] for each in listed] == ids
    assert [len(each.get("body", "")) for each in listed] == [len(body), len(body), 0]
    assert read(api, ids[2])["body"] == body.decode()
