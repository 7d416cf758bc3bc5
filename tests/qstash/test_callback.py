from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm.qstash import Callback, EnvelopeError

from .strategies import fuzz

# As QStash's documentation draws it, with numbers where the service sends numbers.
ENVELOPE = {
    "status": 200,
    "header": {"Content-Type": ["application/json"], "Set-Cookie": ["a=1", "b=2"]},
    "body": base64.b64encode(b'{"id": "chatcmpl-1"}').decode(),
    "retried": 2,
    "maxRetries": 3,
    "sourceMessageId": "msg_1",
    "topicName": "my-group",
    "endpointName": "first",
    "url": "https://api.openai.com/v1/chat/completions",
    "method": "PUT",
    "sourceHeader": {"Authorization": ["Bearer sk-1"]},
    "sourceBody": base64.b64encode(b'{"model": "m"}').decode(),
    "notBefore": 1_701_198_458_025,
    "createdAt": 1_701_198_447_054,
    "scheduleId": "scd_1",
    "callerIP": "192.0.2.7",
    "dlqId": "1725323658779-0",
}
CALLBACK = Callback(
    status=200,
    header={"Content-Type": ["application/json"], "Set-Cookie": ["a=1", "b=2"]},
    body=b'{"id": "chatcmpl-1"}',
    retried=2,
    max_retries=3,
    source_message_id="msg_1",
    topic_name="my-group",
    endpoint_name="first",
    url="https://api.openai.com/v1/chat/completions",
    method="PUT",
    source_header={"Authorization": ["Bearer sk-1"]},
    source_body=b'{"model": "m"}',
    not_before=1_701_198_458_025,
    created_at=1_701_198_447_054,
    schedule_id="scd_1",
    caller_ip="192.0.2.7",
    dlq_id="1725323658779-0",
)


def read(**fields: Any) -> Callback:
    return Callback.from_json(json.dumps({"sourceMessageId": "msg_1"} | fields).encode())


# --- both ways -----------------------------------------------------------------------------------


def test_the_documented_envelope_is_read() -> None:
    callback = Callback.from_json(json.dumps(ENVELOPE).encode())
    assert (callback, callback.notes) == (CALLBACK, ())


def test_the_documented_envelope_is_written() -> None:
    assert json.loads(CALLBACK.to_json()) == ENVELOPE


def test_what_is_empty_and_optional_is_left_out() -> None:
    callback = Callback(status=-1, source_message_id="msg_1")
    assert json.loads(callback.to_json()) == {
        "status": -1,
        "header": {},
        "body": "",
        "retried": 0,
        "maxRetries": 0,
        "sourceMessageId": "msg_1",
        "url": "",
        "method": "POST",
        "sourceHeader": {},
        "sourceBody": "",
        "notBefore": 0,
        "createdAt": 0,
    }


header_maps = st.dictionaries(
    st.text(max_size=8), st.lists(st.text(max_size=8), max_size=3), max_size=3
)
milliseconds = st.integers(0, 2**63 - 1)
texts = st.text(max_size=10)
callbacks = st.builds(
    Callback,
    status=st.just(-1) | st.integers(100, 599),
    header=header_maps,
    body=st.binary(max_size=50),
    retried=milliseconds,
    max_retries=milliseconds,
    source_message_id=st.text(min_size=1, max_size=10),
    url=texts,
    method=st.sampled_from(["GET", "POST"]),
    source_header=header_maps,
    source_body=st.binary(max_size=50),
    not_before=milliseconds,
    created_at=milliseconds,
    topic_name=texts,
    endpoint_name=texts,
    schedule_id=texts,
    caller_ip=texts,
    dlq_id=texts,
)


@given(callbacks)
@fuzz
def test_a_callback_survives_the_wire(callback: Callback) -> None:
    read_back = Callback.from_json(callback.to_json())
    assert (read_back, read_back.notes) == (callback, ())


def test_no_repr_shows_what_the_source_was_sent_with() -> None:
    assert "sk-1" not in repr(CALLBACK)
    assert "model" not in repr(CALLBACK)


# --- what the documentation leaves open is read tolerantly ---------------------------------------


@pytest.mark.parametrize(
    ("fields", "callback"),
    [
        ({}, Callback(status=-1, source_message_id="msg_1")),
        (
            dict.fromkeys(ENVELOPE.keys() - {"sourceMessageId"}),
            Callback(status=-1, source_message_id="msg_1"),
        ),
        ({"status": 0}, Callback(status=-1, source_message_id="msg_1")),
        ({"status": "200"}, Callback(status=200, source_message_id="msg_1")),
        ({"status": 200.0}, Callback(status=200, source_message_id="msg_1")),
        (
            {"notBefore": "1701198458025"},
            Callback(status=-1, source_message_id="msg_1", not_before=1_701_198_458_025),
        ),
        (
            {"createdAt": 1701198447054.0},
            Callback(status=-1, source_message_id="msg_1", created_at=1_701_198_447_054),
        ),
        ({"maxRteries": 3}, Callback(status=-1, source_message_id="msg_1", max_retries=3)),
        (
            {"maxRteries": 3, "maxRetries": 5},
            Callback(status=-1, source_message_id="msg_1", max_retries=5),
        ),
        (
            {"header": {"A": "x"}},
            Callback(status=-1, source_message_id="msg_1", header={"A": ["x"]}),
        ),
        (
            {"sourceHeader": {"A": "x"}},
            Callback(status=-1, source_message_id="msg_1", source_header={"A": ["x"]}),
        ),
        ({"body": "-_-_"}, Callback(status=-1, source_message_id="msg_1", body=b"\xfb\xff\xbf")),
        ({"body": "+/+/"}, Callback(status=-1, source_message_id="msg_1", body=b"\xfb\xff\xbf")),
        (
            {"error": "dial tcp", "queueName": "q", "new": {}},
            Callback(status=-1, source_message_id="msg_1"),
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_spellings_seen_in_the_wild_are_read_without_a_note(
    fields: dict[str, Any], callback: Callback
) -> None:
    envelope = read(**fields)
    assert (envelope, envelope.notes) == (callback, ())


@pytest.mark.parametrize(
    ("fields", "callback", "note"),
    [
        ({"status": 99}, {}, "status 99 is not an HTTP status"),
        ({"status": 600}, {}, "status 600 is not an HTTP status"),
        ({"status": 700}, {}, "status 700 is not an HTTP status"),
        ({"status": -2}, {}, "status -2 is not an HTTP status"),
        ({"status": "ok"}, {}, "status is not a whole number"),
        ({"status": "--5"}, {}, "status is not a whole number"),
        ({"status": "٢٠٠"}, {}, "status is not a whole number"),
        ({"status": True}, {}, "status is not a whole number"),
        ({"status": 200.5}, {}, "status is not a whole number"),
        ({"status": [200]}, {}, "status is not a whole number"),
        ({"retried": "9" * 20}, {}, "retried is not a whole number"),
        ({"retried": -1}, {}, "retried is out of range"),
        ({"maxRetries": 2**63}, {}, "maxRetries is out of range"),
        ({"notBefore": 1e300}, {}, "notBefore is not a whole number"),
        ({"url": 5}, {}, "url is not a string"),
        ({"method": ["GET"]}, {}, "method is not a string"),
        ({"header": []}, {}, "header is not an object"),
        ({"sourceHeader": "A: x"}, {}, "sourceHeader is not an object"),
        (
            {"header": {"A": None}},
            {"header": {"A": []}},
            "header holds values that are not strings",
        ),
        (
            {"header": {"A": ["x", 5, {"b": 1}]}},
            {"header": {"A": ["x", "5"]}},
            "header holds values that are not strings",
        ),
        ({"body": "Y!W@J#j"}, {"body": b"Y!W@J#j"}, "body is not base64"),
        ({"body": "YWJ"}, {"body": b"YWJ"}, "body is not base64"),
        ({"body": "é"}, {"body": "é".encode()}, "body is not base64"),
        ({"body": "\ud800"}, {"body": b"?"}, "body is not base64"),
        ({"body": {"a": 1}}, {}, "body is not a string"),
        ({"sourceBody": "{}"}, {"source_body": b"{}"}, "sourceBody is not base64"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_had_to_be_bent_is_noted(
    fields: dict[str, Any], callback: dict[str, Any], note: str
) -> None:
    envelope = read(**fields)
    expected = Callback(**{"status": -1, "source_message_id": "msg_1"} | callback)
    assert (envelope, envelope.notes) == (expected, (note,))


def test_the_last_of_two_equal_fields_counts() -> None:
    envelope = b'{"sourceMessageId": "msg_1", "sourceMessageId": "msg_2", "status": 200}'
    assert Callback.from_json(envelope) == Callback(status=200, source_message_id="msg_2")


# --- what is no envelope -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("envelope", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b'{"sourceMessageId": "msg_1", "status": NaN}', "not JSON"),
        (b'{"sourceMessageId": "msg_1", "status": -Infinity}', "not JSON"),
        (b'{"sourceMessageId": "msg_1", "status": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 200_000, "not JSON"),
        (b"null", "not an object but NoneType"),
        (b"[]", "not an object but list"),
        (b'"x"', "not an object but str"),
        (b"1", "not an object but int"),
        (b"{}", "sourceMessageId is missing"),
        (b'{"status": 200}', "sourceMessageId is missing"),
        (b'{"sourceMessageId": ""}', "sourceMessageId is missing"),
        (b'{"sourceMessageId": 5}', "sourceMessageId is missing"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_names_no_message_is_no_envelope(envelope: bytes, problem: str) -> None:
    with pytest.raises(EnvelopeError, match=problem):
        Callback.from_json(envelope)


@pytest.mark.parametrize("depth", range(100, 1200, 50))
def test_headers_however_deep_do_not_make_the_reader_fail(depth: int) -> None:
    envelope = b'{"sourceMessageId": "m", "header": {"A": ' + b"[" * depth + b"]" * depth + b"}}"
    with suppress(EnvelopeError):
        assert Callback.from_json(envelope).header == {"A": []}


@given(st.binary() | st.text().map(str.encode))
@fuzz
def test_no_bytes_make_the_reader_fail_otherwise_than_by_refusing(envelope: bytes) -> None:
    with suppress(EnvelopeError):
        Callback.from_json(envelope)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.from_regex(r"-*[0-9]+"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*ENVELOPE, "maxRteries"]), json_values))
@fuzz
def test_whatever_was_read_is_read_again_the_same(fields: dict[str, Any]) -> None:
    with suppress(EnvelopeError):
        callback = Callback.from_json(json.dumps(fields).encode())
        assert Callback.from_json(callback.to_json()) == callback


# --- what it means -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "is_success", "is_failure_callback", "is_last"),
    [
        ({"status": 200, "retried": 0, "maxRetries": 3}, True, False, True),
        ({"status": 299, "retried": 3, "maxRetries": 3}, True, False, True),
        ({"status": 300, "retried": 0, "maxRetries": 3}, False, False, False),
        ({"status": 500, "retried": 2, "maxRetries": 3}, False, False, False),
        ({"status": 500, "retried": 3, "maxRetries": 3}, False, False, True),
        ({"status": 500, "retried": 0, "maxRetries": 0}, False, False, True),
        ({"status": -1, "retried": 0, "maxRetries": 3}, False, False, False),
        # After a 489 retries are left, and only the failure callback knows that none follows.
        ({"status": 489, "retried": 0, "maxRetries": 3}, False, False, False),
        ({"status": 489, "retried": 0, "maxRetries": 3, "dlqId": "1-0"}, False, True, True),
    ],
    ids=repr,
)
def test_the_first_failure_is_not_the_end(
    fields: dict[str, Any], is_success: bool, is_failure_callback: bool, is_last: bool
) -> None:
    callback = read(**fields)
    assert (callback.is_success, callback.is_failure_callback, callback.is_last) == (
        is_success,
        is_failure_callback,
        is_last,
    )
