from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm.qstash import Callback, EnvelopeError
from django_qstash_llm.qstash.callback import without_source

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


def unsaid(**fields: Any) -> Callback:
    """What is read of an envelope that does not say how many retries there are."""
    return Callback(**{"source_message_id": "msg_1", "max_retries": None} | fields)


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


def test_retries_that_are_unsaid_stay_unsaid() -> None:
    callback = unsaid(status=-1)
    assert "maxRetries" not in json.loads(callback.to_json())


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
    max_retries=milliseconds | st.none(),
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
        ({}, unsaid(status=-1)),
        (
            dict.fromkeys(sorted(ENVELOPE.keys() - {"sourceMessageId"})),
            unsaid(status=-1),
        ),
        ({"status": 0}, unsaid(status=-1)),
        ({"status": "200"}, unsaid(status=200)),
        ({"status": 200.0}, unsaid(status=200)),
        (
            {"notBefore": "1701198458025"},
            unsaid(status=-1, not_before=1_701_198_458_025),
        ),
        (
            {"createdAt": 1701198447054.0},
            unsaid(status=-1, created_at=1_701_198_447_054),
        ),
        ({"maxRteries": 3}, unsaid(status=-1, max_retries=3)),
        (
            {"maxRteries": 3, "maxRetries": 5},
            unsaid(status=-1, max_retries=5),
        ),
        (
            {"header": {"A": "x"}},
            unsaid(status=-1, header={"A": ["x"]}),
        ),
        (
            {"sourceHeader": {"A": "x"}},
            unsaid(status=-1, source_header={"A": ["x"]}),
        ),
        ({"body": "-_-_"}, unsaid(status=-1, body=b"\xfb\xff\xbf")),
        ({"body": "+/+/"}, unsaid(status=-1, body=b"\xfb\xff\xbf")),
        (
            {"error": "dial tcp", "queueName": "q", "new": {}},
            unsaid(status=-1),
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
    expected = unsaid(**{"status": -1} | callback)
    assert (envelope, envelope.notes) == (expected, (note,))


def test_the_last_of_two_equal_fields_counts_and_is_noted() -> None:
    envelope = b'{"sourceMessageId": "msg_1", "sourceMessageId": "msg_2", "status": 200}'
    callback = Callback.from_json(envelope)
    assert callback == unsaid(status=200, source_message_id="msg_2")
    assert callback.notes == ("sourceMessageId is given more than once",)


def test_an_envelope_of_nothing_but_repetitions_has_a_few_notes() -> None:
    twice = b'{"%s": 1, "%s": 2}' % (b"a" * 1000, b"a" * 1000)
    envelope = b'{"sourceMessageId": "m", "more": [%s]}' % b",".join([twice] * 1000)
    notes = Callback.from_json(envelope).notes
    assert notes == (f"{'a' * 40} is given more than once",) * 10


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


# --- what is kept of it although it cannot be read ------------------------------------------------


@pytest.mark.parametrize(
    ("envelope", "kept"),
    [
        (
            '{"status": 1e400, "sourceHeader" : {"a": ["b", "}"], "c": {}}, "body": "YQ=="}',
            '{"status": 1e400, "sourceHeader": null, "body": "YQ=="}',
        ),
        ('{"sourceBody":"a\\"b,c","n":1}', '{"sourceBody": null,"n":1}'),
        ('{"n":[1,{"sourceBody":5}],"m":2}', '{"n":[1,{"sourceBody": null}],"m":2}'),
        (
            '[{"sourceHeader":[]},{"sourceHeader":1}]',
            '[{"sourceHeader": null},{"sourceHeader": null}]',
        ),
        ('{"source\\u0048eader":{"a":"k"}}', '{"source\\u0048eader": null}'),
        ('{"sourceHeader":{"a":["k', '{"sourceHeader": null'),
        ('{"sourceHeader":', '{"sourceHeader": null'),
        ('{"sourceHeader":{"a":"k"},"sourceBody":"aG', '{"sourceHeader": null,"sourceBody": null'),
        # Where the texts begin and end cannot be told.
        ('ody":"","sourceHeader":{"a":"k"}}', 'ody":"","'),
        ('"{\\"sourceHeader\\":{\\"a\\":\\"k\\"}}"', '"{\\"'),
        ("status=1&sourceBody=k", "status=1&"),
        ('{"sourceHea', '{"sourceHea'),
        ("", ""),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_an_envelope_repeats_of_its_source_is_taken_out(
    envelope: str, kept: str, encoding: str
) -> None:
    raw = envelope.encode(encoding)
    assert without_source(raw) == (raw if kept == envelope else kept.encode())


@given(callbacks)
@fuzz
def test_without_its_source_a_callback_is_read_as_it_was(callback: Callback) -> None:
    read_back = Callback.from_json(without_source(callback.to_json()))
    assert read_back == replace(callback, source_header={}, source_body=b"")
    assert read_back.notes == ()


@given(st.binary() | st.text().map(str.encode), st.integers(0, 60))
@fuzz
def test_the_source_is_taken_out_of_any_bytes(envelope: bytes, at: int) -> None:
    without_source(envelope)
    secret = b'"sourceHeader":{"Authorization":["Bearer sk-1"]}'
    assert b"sk-1" not in without_source(envelope[:at] + secret + envelope[at:])
    assert b"sk-1" not in without_source(b"\x00" + envelope[:at] + secret)


def test_an_envelope_that_is_large_is_gone_through_once() -> None:
    deep = b"[" * 200_000 + b'{"sourceBody":"' + b"k" * 1_000_000
    assert without_source(deep) == b"[" * 200_000 + b'{"sourceBody": null'


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
        # How many follow is not said, or not in numbers: the failure callback will say.
        ({"status": 500, "retried": 0}, False, False, False),
        ({"status": 500, "retried": 7, "maxRetries": "three"}, False, False, False),
        ({"status": 500, "retried": 7, "maxRetries": -1}, False, False, False),
        ({"status": 500, "retried": 0, "dlqId": "1-0"}, False, True, True),
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
