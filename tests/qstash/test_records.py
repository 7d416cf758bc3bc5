from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
import qstash.dlq
import qstash.flow_control_api
import qstash.log
import qstash.message
import qstash.queue
import qstash.signing_key
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm.qstash import (
    DeadLetter,
    FlowControlState,
    Keys,
    LogEntry,
    MessageRecord,
    Page,
    Queue,
)
from django_qstash_llm.qstash.records import read_page

from .conftest import Referee
from .loopback import answering
from .strategies import fuzz

URL = "https://api.openai.com/v1/chat/completions"
HEADER = {"Content-Type": ["application/json"], "Test-Header": ["a", "b"]}

MESSAGE = MessageRecord(
    message_id="msg_1",
    url=URL,
    method="PUT",
    header=HEADER,
    body="ž".encode(),
    max_retries=5,
    not_before=1_701_198_458_025,
    created_at=1_701_198_447_054,
    topic_name="my-group",
    endpoint_name="first",
    queue_name="q-1",
    schedule_id="scd_1",
    callback="https://example.com/callback",
    failure_callback="https://example.com/failed",
    callback_header={"X-Kind": ["callback"]},
    failure_callback_header={"X-Kind": ["failed"]},
    caller_ip="192.0.2.7",
    labels=("a", "b"),
    flow_control_key="openai",
    rate=4,
    period=2,
    parallelism=3,
    retry_delay="1000 * retried",
    timeout=30.0,
)
MESSAGE_JSON = {
    "messageId": "msg_1",
    "url": URL,
    "method": "PUT",
    "header": HEADER,
    "body": "ž",
    "maxRetries": 5,
    "notBefore": 1_701_198_458_025,
    "createdAt": 1_701_198_447_054,
    "topicName": "my-group",
    "endpointName": "first",
    "queueName": "q-1",
    "scheduleId": "scd_1",
    "callback": "https://example.com/callback",
    "failureCallback": "https://example.com/failed",
    "callbackHeader": {"X-Kind": ["callback"]},
    "failureCallbackHeader": {"X-Kind": ["failed"]},
    "callerIP": "192.0.2.7",
    "label": "a",
    "labels": ["a", "b"],
    "flowControlKey": "openai",
    "rate": 4,
    "period": 2,
    "parallelism": 3,
    "retryDelayExpression": "1000 * retried",
    "timeout": 30.0,
}
DEAD = DeadLetter(
    **vars(MESSAGE),
    dlq_id="1725323658779-0",
    response_status=500,
    response_header={"Retry-After": ["1"]},
    response_body=b"\xff",
)
DEAD_JSON = MESSAGE_JSON | {
    "dlqId": "1725323658779-0",
    "responseStatus": 500,
    "responseHeader": {"Retry-After": ["1"]},
    "responseBodyBase64": "/w==",
}
ENTRY = LogEntry(
    time=1_701_198_447_054,
    message_id="msg_1",
    state="RETRY",
    url=URL,
    error="no",
    next_delivery_time=1_701_198_458_025,
    response_status=500,
    response_header={"Retry-After": ["1"]},
    response_body=b"no",
    header=HEADER,
    body=b"\xff",
    topic_name="my-group",
    endpoint_name="first",
    queue_name="q-1",
    schedule_id="scd_1",
    method="PUT",
    callback="https://example.com/callback",
    failure_callback="https://example.com/failed",
    callback_header={"X-Called": ["c"]},
    failure_callback_header={"X-Failed": ["f"]},
    max_retries=5,
    retry_delay="1000 * retried",
    timeout=30_000,
    labels=("a", "b"),
    flow_control_key="openai",
    rate=4,
    period=2,
    parallelism=3,
)
ENTRY_JSON = {
    "time": 1_701_198_447_054,
    "messageId": "msg_1",
    "state": "RETRY",
    "url": URL,
    "error": "no",
    "nextDeliveryTime": 1_701_198_458_025,
    "responseStatus": 500,
    "responseHeader": {"Retry-After": ["1"]},
    "responseHeaders": {"Retry-After": ["1"]},
    "responseBody": base64.b64encode(b"no").decode(),
    "header": HEADER,
    "body": "/w==",
    "topicName": "my-group",
    "endpointName": "first",
    "queueName": "q-1",
    "scheduleId": "scd_1",
    "method": "PUT",
    "callback": "https://example.com/callback",
    "failureCallback": "https://example.com/failed",
    "callbackHeaders": {"X-Called": ["c"]},
    "failureCallbackHeaders": {"X-Failed": ["f"]},
    "maxRetries": 5,
    "retryDelayExpr": "1000 * retried",
    "retryDelayExpression": "1000 * retried",
    "timeout": 30_000,
    "label": "a",
    "labels": ["a", "b"],
    "flowControlKey": "openai",
    "rate": 4,
    "period": 2,
    "parallelism": 3,
}
QUEUE = Queue(name="q-1", parallelism=2, created_at=1, updated_at=2, lag=3, is_paused=True)
QUEUE_JSON = {
    "name": "q-1",
    "parallelism": 2,
    "createdAt": 1,
    "updatedAt": 2,
    "lag": 3,
    "paused": True,
}
FLOW = FlowControlState(
    key="openai",
    wait_list_size=1,
    parallelism_max=2,
    parallelism_count=3,
    rate_max=4,
    rate_count=5,
    rate_period=6,
    rate_period_start=7,
    is_paused=True,
    is_pinned_parallelism=True,
    is_pinned_rate=True,
)
FLOW_JSON = {
    "flowControlKey": "openai",
    "waitListSize": 1,
    "parallelismMax": 2,
    "parallelismCount": 3,
    "rateMax": 4,
    "rateCount": 5,
    "ratePeriod": 6,
    "ratePeriodStart": 7,
    "isPaused": True,
    "isPinnedParallelism": True,
    "isPinnedRate": True,
}
KEYS = Keys("sig_current", "sig_next")
KEYS_JSON = {"current": "sig_current", "next": "sig_next"}


# --- both ways -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "written"),
    [
        (MESSAGE, MESSAGE_JSON),
        (DEAD, DEAD_JSON),
        (ENTRY, ENTRY_JSON),
        (QUEUE, QUEUE_JSON),
        (FLOW, FLOW_JSON),
        (KEYS, KEYS_JSON),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_record_is_written_and_read_with_every_field(record: Any, written: Any) -> None:
    assert (record.to_json(), type(record).from_json(written)) == (written, record)


@pytest.mark.parametrize(
    ("record", "written"),
    [
        (
            MessageRecord(message_id="msg_1", url=URL),
            {
                "messageId": "msg_1",
                "url": URL,
                "method": "POST",
                "maxRetries": 3,
                "notBefore": 0,
                "createdAt": 0,
            },
        ),
        (
            DeadLetter(message_id="msg_1", url=URL, dlq_id="1-0"),
            {
                "messageId": "msg_1",
                "url": URL,
                "method": "POST",
                "maxRetries": 3,
                "notBefore": 0,
                "createdAt": 0,
                "dlqId": "1-0",
                # The official Python client cannot do without it.
                "responseStatus": -1,
            },
        ),
        (
            LogEntry(time=1, message_id="msg_1", state="CREATED", url=URL),
            {"time": 1, "messageId": "msg_1", "state": "CREATED", "url": URL},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_empty_optional_fields_are_left_out(record: Any, written: Any) -> None:
    assert (record.to_json(), type(record).from_json(written)) == (written, record)


@pytest.mark.parametrize("count", [0, None])
def test_a_zero_is_not_an_empty_field(count: int | None) -> None:
    record = replace(MESSAGE, rate=count, parallelism=count, timeout=count)
    written = record.to_json()
    assert (written.get("rate"), written.get("parallelism"), written.get("timeout")) == (count,) * 3
    assert MessageRecord.from_json(written) == record


texts = st.text(max_size=8)
header_maps = st.dictionaries(texts, st.lists(texts, max_size=2), max_size=2)
counts = st.none() | st.integers(0, 2**31)
shared = {
    "url": texts,
    "header": header_maps,
    "body": st.binary(max_size=30) | texts.map(str.encode),
    "topic_name": texts,
    "endpoint_name": texts,
    "queue_name": texts,
    "schedule_id": texts,
    "callback": texts,
    "failure_callback": texts,
    "callback_header": header_maps,
    "failure_callback_header": header_maps,
    "labels": st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    "flow_control_key": texts,
    "rate": counts,
    "period": counts,
    "parallelism": counts,
    "retry_delay": texts,
}
responses = {
    "response_header": header_maps,
    "response_body": st.binary(max_size=30) | texts.map(str.encode),
}
records = {
    "message_id": texts,
    "method": st.sampled_from(["GET", "POST"]),
    "max_retries": st.integers(0, 9),
    "not_before": st.integers(0, 2**53),
    "created_at": st.integers(0, 2**53),
    "caller_ip": texts,
    "timeout": st.none() | st.floats(0, 1e6),
}


@given(
    st.builds(MessageRecord, **shared, **records)
    | st.builds(
        DeadLetter,
        **shared,
        **records,
        **responses,
        dlq_id=texts,
        response_status=st.integers(-1, 599),
    )
    | st.builds(
        LogEntry,
        **shared,
        **responses,
        time=st.integers(0, 2**53),
        message_id=texts,
        state=st.sampled_from(["CREATED", "CANCELED"]),
        error=texts,
        next_delivery_time=counts,
        response_status=st.none() | st.integers(-1, 599),
        method=texts,
        max_retries=counts,
        timeout=counts,
    )
    | st.builds(
        Queue, name=texts, parallelism=st.integers(1), lag=st.integers(0), is_paused=st.booleans()
    )
    | st.builds(FlowControlState, key=texts, rate_max=st.integers(0), is_paused=st.booleans())
)
@fuzz
def test_a_record_survives_the_wire(record: Any) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("secret", ["Bearer sk-1", "sig_current", "sig_next", "the prompt"])
@pytest.mark.parametrize(
    "kind", [MESSAGE, DEAD, ENTRY, KEYS], ids=lambda record: type(record).__name__
)
def test_no_repr_shows_headers_bodies_or_keys(kind: Any, secret: str) -> None:
    if kind is not KEYS:
        kind = replace(kind, header={"Authorization": ["Bearer sk-1"]}, body=b"the prompt")
    assert secret not in repr(kind)


# --- reading what others write -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "record"),
    [
        ({"bodyBase64": "/w=="}, {"body": b"\xff"}),
        ({"body": "a", "bodyBase64": ""}, {"body": b"a"}),
        ({"body": None}, {}),
        ({"body": "REDACTED:1f"}, {"body": b"REDACTED:1f"}),
        ({"bodyBase64": "é"}, {"body": "é".encode()}),
        ({"body": "\ud800"}, {"body": b"?"}),
        ({"header": {"A": "x"}}, {"header": {"A": ["x"]}}),
        ({"header": None}, {}),
        ({"label": "a"}, {"labels": ("a",)}),
        ({"label": "a", "labels": ["a", "b"]}, {"labels": ("a", "b")}),
        ({"label": "", "labels": None}, {}),
        ({"method": None}, {}),
        ({"unheardOf": 1}, {}),
    ],
    ids=ascii,
)
def test_a_message_is_read_as_servers_of_all_ages_write_it(
    written: dict[str, Any], record: dict[str, Any]
) -> None:
    read = MessageRecord.from_json({"messageId": "msg_1", "url": URL} | written)
    assert read == MessageRecord(**{"message_id": "msg_1", "url": URL} | record)


@pytest.mark.parametrize(
    ("written", "entry"),
    [
        ({"state": "CANCELLED"}, {"state": "CANCELED"}),
        ({"state": "CANCEL_REQUESTED"}, {"state": "CANCEL_REQUESTED"}),
        ({"state": "SOMETHING_NEW"}, {"state": "SOMETHING_NEW"}),
        ({"responseHeader": {"A": ["x"]}}, {"response_header": {"A": ["x"]}}),
        ({"responseHeaders": {"A": ["x"]}}, {"response_header": {"A": ["x"]}}),
        ({"retryDelayExpr": "1"}, {"retry_delay": "1"}),
        ({"retryDelayExpression": "1"}, {"retry_delay": "1"}),
        ({"body": "not base64"}, {"body": b"not base64"}),
        ({"responseBody": None}, {}),
    ],
    ids=repr,
)
def test_a_log_entry_is_read_in_either_spelling(
    written: dict[str, Any], entry: dict[str, Any]
) -> None:
    read = LogEntry.from_json(
        {"time": 1, "messageId": "msg_1", "state": "ACTIVE", "url": URL} | written
    )
    assert read == LogEntry(
        **{"time": 1, "message_id": "msg_1", "state": "ACTIVE", "url": URL} | entry
    )


def test_what_is_left_out_of_a_queue_or_flow_control_has_its_default() -> None:
    assert Queue.from_json({"name": "q"}) == Queue(name="q")
    assert FlowControlState.from_json({"flowControlKey": "k"}) == FlowControlState(key="k")


@pytest.mark.parametrize(
    ("answer", "page"),
    [
        ({"events": [1], "cursor": "1686652644442-12"}, Page([1], "1686652644442-12")),
        ({"logs": [1]}, Page([1])),
        ({"events": [1], "logs": [2]}, Page([1])),
        ({"events": None, "logs": [2]}, Page([2])),
        ({"events": [], "cursor": ""}, Page([])),
        ({"events": None, "cursor": None}, Page([])),
        ({}, Page([])),
        ({"events": [], "cursor": 2**60}, Page([], str(2**60))),
    ],
)
def test_a_page_is_found_under_either_name_and_its_cursor_is_text(
    answer: Any, page: Page[int]
) -> None:
    assert read_page(answer, ("events", "logs"), lambda item: item) == page


# --- the referee: what the official SDK reads of what we write -----------------------------------

SDK_MESSAGE = {
    "message_id": "msg_1",
    "url": URL,
    "url_group": "my-group",
    "endpoint": "first",
    "queue": "q-1",
    "body": "ž",
    "body_base64": None,
    "method": "PUT",
    "headers": HEADER,
    "callback_headers": {"X-Kind": ["callback"]},
    "failure_callback_headers": {"X-Kind": ["failed"]},
    "max_retries": 5,
    "not_before": 1_701_198_458_025,
    "created_at": 1_701_198_447_054,
    "callback": "https://example.com/callback",
    "failure_callback": "https://example.com/failed",
    "schedule_id": "scd_1",
    "caller_ip": "192.0.2.7",
    "flow_control": qstash.message.FlowControlProperties("openai", parallelism=3, rate=4, period=2),
    "retry_delay_expression": "1000 * retried",
    "label": "a",
}
SDK_DEAD = qstash.dlq.DlqMessage(
    **SDK_MESSAGE,
    dlq_id="1725323658779-0",
    response_status=500,
    response_headers={"Retry-After": ["1"]},
    response_body=None,
    response_body_base64="/w==",
)


@pytest.mark.parametrize(
    ("use", "answer", "read"),
    [
        (
            lambda sdk: sdk.message.get("msg_1"),
            MESSAGE.to_json(),
            qstash.message.Message(**SDK_MESSAGE),
        ),
        (lambda sdk: sdk.dlq.get("1725323658779-0"), DEAD.to_json(), SDK_DEAD),
        (
            lambda sdk: sdk.dlq.list(),
            {"messages": [DEAD.to_json()], "cursor": "7"},
            qstash.dlq.ListDlqMessagesResponse(cursor="7", messages=[SDK_DEAD]),
        ),
        (
            lambda sdk: sdk.log.list(),
            {"events": [ENTRY.to_json()]},
            qstash.log.ListLogsResponse(
                cursor=None,
                logs=[
                    qstash.log.Log(
                        time=1_701_198_447_054,
                        message_id="msg_1",
                        state=qstash.log.LogState.RETRY,
                        error="no",
                        next_delivery_time=1_701_198_458_025,
                        url=URL,
                        url_group="my-group",
                        endpoint="first",
                        queue="q-1",
                        schedule_id="scd_1",
                        body_base64="/w==",
                        headers=HEADER,
                        callback_headers={"X-Called": ["c"]},
                        failure_callback_headers={"X-Failed": ["f"]},
                        response_status=500,
                        response_headers={"Retry-After": ["1"]},
                        response_body="bm8=",
                        timeout=30_000,
                        method="PUT",
                        callback="https://example.com/callback",
                        failure_callback="https://example.com/failed",
                        max_retries=5,
                        retry_delay_expression="1000 * retried",
                        flow_control=SDK_MESSAGE["flow_control"],
                        label="a",
                    )
                ],
            ),
        ),
        (
            lambda sdk: sdk.queue.get("q-1"),
            QUEUE.to_json(),
            qstash.queue.Queue(
                "q-1", parallelism=2, created_at=1, updated_at=2, lag=3, paused=True
            ),
        ),
        (
            lambda sdk: sdk.flow_control.get("openai"),
            FLOW.to_json(),
            qstash.flow_control_api.FlowControlInfo(
                "openai", 1, 2, 3, 4, 5, 6, 7, True, True, True
            ),
        ),
        (
            lambda sdk: sdk.signing_key.get(),
            KEYS.to_json(),
            qstash.signing_key.SigningKey(current="sig_current", next="sig_next"),
        ),
        # The barest of each: the SDK misses nothing it cannot do without.
        (
            lambda sdk: sdk.dlq.get("1-0").response_status,
            DeadLetter(message_id="msg_1", url=URL).to_json(),
            -1,
        ),
        (
            lambda sdk: sdk.log.list().logs[0].state,
            {"events": [LogEntry(time=1, message_id="m", state="CANCELED", url=URL).to_json()]},
            qstash.log.LogState.CANCELED,
        ),
        (lambda sdk: sdk.queue.list()[0].lag, [Queue(name="q").to_json()], 0),
    ],
)
def test_the_official_sdk_reads_what_we_write(
    use: Any, answer: Any, read: Any, referee: Referee
) -> None:
    assert referee.ask_sdk(use, answering(answer))[0] == read
