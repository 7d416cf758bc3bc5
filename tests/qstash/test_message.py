from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qstash.chat import openai

from django_qstash_llm.qstash import Accepted, FlowControl, InvalidOption, Message, Options, Refused
from django_qstash_llm.qstash.message import JSONText, batch_body, read_answer, read_answers

from . import strategies
from .conftest import Referee
from .loopback import Request, answering
from .strategies import fuzz

URL = "https://api.openai.com/v1/chat/completions"
CALLBACK = "https://example.com/llm/callback/1/?a=b"


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def as_read(message: Message) -> Message:
    """What comes back of it: its own label is then the first of the options'."""
    if not message.label:
        return message
    labels = (message.label, *message.options.labels)
    return replace(message, label="", options=replace(message.options, labels=labels))


# --- both ways -----------------------------------------------------------------------------------


@given(strategies.messages)
@fuzz
def test_a_message_survives_being_published(message: Message) -> None:
    read = Message.from_headers(
        message.destination, lower(message.to_headers()), message.body, message.queue
    )
    assert read == as_read(message)


@given(strategies.messages)
@fuzz
def test_a_message_survives_the_batch(message: Message) -> None:
    item = json.loads(message.to_batch_item())
    assert Message.from_batch_item(item) == as_read(message)
    assert item["headers"] == message.to_headers()


@pytest.mark.parametrize("missing", ["deduplication_id", "callback", "failure_callback", "label"])
def test_what_one_message_of_a_batch_leaves_out_is_not_there_empty(missing: str) -> None:
    message = Message(
        URL,
        deduplication_id="7b6e-1",
        callback=CALLBACK,
        failure_callback=CALLBACK,
        label="r-7b6e",
    )
    message = replace(message, **{missing: ""})
    headers = json.loads(message.to_batch_item())["headers"]
    assert (headers, len(headers)) == (message.to_headers(), 3)


@given(st.lists(strategies.messages, max_size=4))
@fuzz
def test_a_batch_is_its_messages_in_their_order(messages: list[Message]) -> None:
    items = json.loads(batch_body(messages))
    assert [Message.from_batch_item(item) for item in items] == list(map(as_read, messages))


def test_a_messages_own_headers_stand_beside_its_options() -> None:
    message = Message(
        URL,
        b"{}",
        Options(content_type="application/json", retries=2, labels=("article",)),
        deduplication_id="7b6e-1",
        callback=CALLBACK,
        failure_callback=CALLBACK + "&failed",
        label="r-7b6e",
    )
    assert message.to_headers() == {
        "Content-Type": "application/json",
        "Upstash-Retries": "2",
        "Upstash-Deduplication-Id": "7b6e-1",
        "Upstash-Callback": CALLBACK,
        "Upstash-Failure-Callback": CALLBACK + "&failed",
        "Upstash-Label": "r-7b6e,article",
    }


@pytest.mark.parametrize(
    ("label", "labels", "header"),
    [("", (), None), ("a", (), "a"), ("", ("b", "c"), "b,c"), ("a", ("b", "c"), "a,b,c")],
)
def test_a_messages_label_comes_before_those_it_shares(
    label: str, labels: tuple[str, ...], header: str | None
) -> None:
    message = Message(URL, options=Options(labels=labels), label=label)
    item = json.loads(message.to_batch_item())
    assert (message.to_headers().get("Upstash-Label"), item["headers"].get("Upstash-Label")) == (
        header,
        header,
    )


def test_a_batch_item_is_what_the_documentation_draws() -> None:
    message = Message(URL, '{"a": "ž"}'.encode(), Options(retries=2), queue="q")
    assert json.loads(message.to_batch_item()) == {
        "destination": URL,
        "headers": {"Upstash-Retries": "2"},
        "body": '{"a": "ž"}',
        "queue": "q",
    }


def test_a_bare_batch_item_has_neither_headers_nor_queue() -> None:
    assert json.loads(Message(URL).to_batch_item()) == {
        "destination": URL,
        "headers": {},
        "body": "",
    }


def test_a_body_that_json_cannot_hold_is_refused_in_a_batch_only() -> None:
    message = Message(URL, b"\xff")
    assert message.body == b"\xff"
    with pytest.raises(InvalidOption, match="body: a batch is JSON"):
        message.to_batch_item()


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (Message(URL), f"/v2/publish/{URL}"),
        (Message(URL, queue="q"), f"/v2/enqueue/q/{URL}"),
        (Message(URL + "?a=b&c=%20"), f"/v2/publish/{URL}?a=b&c=%20"),
        (Message("group"), "/v2/publish/group"),
        (Message("api/llm", callback=CALLBACK, queue="q"), "/v2/enqueue/q/api/llm"),
    ],
)
def test_the_destination_goes_into_the_path_raw(message: Message, path: str) -> None:
    assert message.path == path


def test_json_is_put_into_a_batch_as_any_other_text() -> None:
    said = {"a": ["ž", '"', "\\", "\x00\x7f", "\ud800", 1.5, None]}
    text = JSONText.dump(said)
    as_json, as_bytes = Message(URL, text), Message(URL, bytes(text))
    assert json.loads(as_json.to_batch_item()) == json.loads(as_bytes.to_batch_item())
    assert json.loads(json.loads(as_json.to_batch_item())["body"]) == said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"], ids=repr)
def test_what_json_cannot_hold_is_not_dumped(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        JSONText.dump(value)


def test_one_set_of_options_serves_any_number_of_destinations() -> None:
    messages = [Message(f"https://example.com/{number}") for number in range(200)]
    items = json.loads(batch_body(messages))
    assert [Message.from_batch_item(item) for item in items] == messages


@pytest.mark.parametrize(
    "answer",
    [
        Accepted("msg_1"),
        Accepted("msg_1", is_duplicate=True),
        Accepted("msg_1", url=URL),
        Refused("no"),
    ],
)
def test_what_qstash_says_is_written_and_read(answer: Accepted | Refused) -> None:
    assert read_answer(json.loads(json.dumps(answer.to_json()))) == answer


def test_no_repr_shows_the_body() -> None:
    assert "secret" not in repr(Message(URL, b"secret"))


# --- refusing at the door ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "destination",
    [
        URL,
        "http://localhost:8000",
        "HTTPS://Example.com/",
        "https://example.com?x=1",
        "https://example.com//a//b",
        "https://example.com/a.../b",
        "https://example.com/%2e%2e/b",
        "https://example.com/?up=/../..",
        "https://[::1]:8080/",
        "https://example.com/é",
        "my-group_1.b",
        "api/llm",
    ],
)
def test_urls_groups_and_the_hosted_models_are_destinations(destination: str) -> None:
    assert Message(destination, callback=CALLBACK).destination == destination


@pytest.mark.parametrize(
    ("destination", "wire_text"),
    [
        ("", "endpoint has invalid scheme, add http:// or https://"),
        ("example.com/path", "endpoint has invalid scheme, add http:// or https://"),
        ("ftp://example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("https%3A%2F%2Fexample.com", "endpoint has invalid scheme, add http:// or https://"),
        ("api/other", "endpoint has invalid scheme, add http:// or https://"),
        (".", "endpoint has invalid scheme, add http:// or https://"),
        ("..", "endpoint has invalid scheme, add http:// or https://"),
        ("https://", "endpoint is not a valid http url"),
        ("https:///path", "endpoint is not a valid http url"),
        ("https:/example.com", "endpoint is not a valid http url"),
        ("https://user:password@example.com/", "endpoint is not a valid http url"),
        ("https://example.com/a b", "endpoint is not a valid http url"),
        ("https://example.com/#fragment", "endpoint is not a valid http url"),
        ("https://example.com\\@evil.example/", "endpoint is not a valid http url"),
        ("https://example.com/\r\nX: y", "endpoint is not a valid http url"),
        ('https://example.com/"', "endpoint is not a valid http url"),
        ("https://example.com/\x00", "endpoint is not a valid http url"),
        ("https://example.com/\ud800", "endpoint is not a valid http url"),
        ("https://\udfff/", "endpoint is not a valid http url"),
        ("https://example.com/" + "a" * 8192, "endpoint is not a valid http url"),
        ("https://example.com/../admin", "endpoint has dot segments"),
        ("https://example.com/a/./b", "endpoint has dot segments"),
        ("https://example.com/a/..?x", "endpoint has dot segments"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_what_could_not_be_called_is_no_destination(destination: str, wire_text: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Message(destination)
    assert (caught.value.field, caught.value.wire_text) == (
        "destination",
        f"invalid destination url: {wire_text}",
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"queue": "a/b"}, "queue"),
        ({"queue": ".."}, "queue"),
        ({"queue": 'a"b'}, "queue"),
        ({"deduplication_id": "a:b"}, "deduplication_id"),
        ({"deduplication_id": "a\r\nX: y"}, "deduplication_id"),
        ({"callback": "/relative/"}, "callback"),
        ({"callback": "ftp://example.com/"}, "callback"),
        ({"callback": "https://example.com/\nX: y"}, "callback"),
        ({"callback": "https://example.com/é"}, "callback"),
        ({"failure_callback": "example.com"}, "failure_callback"),
        ({"callback": 'https://example.com/"'}, "callback"),
        ({"callback": "https://example.com/\\"}, "callback"),
        ({"label": "a,b"}, "label"),
        ({"label": 'a"b'}, "label"),
        ({"label": "a\r\nX: y"}, "label"),
        ({"destination": "api/llm"}, "callback"),
    ],
    ids=repr,
)
def test_what_cannot_travel_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Message(**{"destination": URL} | fields)
    assert caught.value.field == field


# --- reading what others write -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"destination": URL}, Message(URL)),
        ({"destination": URL, "body": None, "queue": None, "headers": None}, Message(URL)),
        ({"destination": URL, "queue": "q"}, Message(URL, queue="q")),
        ({"destination": URL, "body": "ž"}, Message(URL, "ž".encode())),
        ({"destination": URL, "body": {"a": 1}}, Message(URL, b'{"a": 1}')),
        ({"destination": URL, "body": [1]}, Message(URL, b"[1]")),
        ({"destination": URL, "body": False}, Message(URL, b"false")),
        ({"destination": URL, "body": "\ud800"}, Message(URL, b"?")),
        ({"destination": URL, "callback": CALLBACK, "url": "x"}, Message(URL)),
        (
            {"destination": URL, "headers": {"UPSTASH-Retries": "1", "content-type": "a/b"}},
            Message(URL, options=Options(retries=1, content_type="a/b")),
        ),
        # Go sends lists.
        (
            {
                "destination": URL,
                "headers": {"Upstash-Retries": ["1"], "Upstash-Forward-X": ["a", "b"]},
            },
            Message(URL, options=Options(retries=1, headers={"X": "a, b"})),
        ),
        (
            {
                "destination": URL,
                "headers": {"Upstash-Deduplication-Id": " a ", "Upstash-Callback": f" {CALLBACK} "},
            },
            Message(URL, deduplication_id="a", callback=CALLBACK),
        ),
    ],
    ids=ascii,
)
def test_batch_items_are_read_as_every_sdk_writes_them(item: Any, message: Message) -> None:
    assert Message.from_batch_item(item) == message


@pytest.mark.parametrize(
    ("item", "wire_text"),
    [
        (None, "invalid batch header: each item is an object with a destination"),
        ([], "invalid batch header: each item is an object with a destination"),
        ({}, "missing destination"),
        ({"destination": None}, "missing destination"),
        ({"destination": [URL]}, "missing destination"),
        (
            {"destination": "x y"},
            "invalid destination url: endpoint has invalid scheme, add http:// or https://",
        ),
        ({"destination": URL, "queue": 5}, "invalid queue name"),
        ({"destination": URL, "queue": "a b"}, "invalid queue name"),
        ({"destination": URL, "headers": "a: b"}, "invalid headers"),
        ({"destination": URL, "headers": {"X": 1}}, "invalid X header: not a string"),
        ({"destination": URL, "headers": {"X": ["a", None]}}, "invalid X header: not a string"),
        (
            {"destination": URL, "headers": {"Upstash-Retries": "x"}},
            'invalid Upstash-Retries header: "x" is not a whole number of at least 0',
        ),
    ],
    ids=repr,
)
def test_a_batch_item_that_is_none_is_refused(item: Any, wire_text: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        Message.from_batch_item(item)
    assert caught.value.wire_text == wire_text


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=5) | st.just(URL),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["destination", "headers", "body", "queue"]), json_values))
@fuzz
def test_no_batch_item_makes_the_reader_fail_otherwise_than_by_refusing(item: Any) -> None:
    with suppress(InvalidOption):
        assert isinstance(Message.from_batch_item(item), Message)


# --- what QStash says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ({"messageId": "msg_1"}, Accepted("msg_1")),
        ({"messageId": "msg_1", "url": URL}, Accepted("msg_1", url=URL)),
        ({"messageId": "msg_1", "deduplicated": True}, Accepted("msg_1", is_duplicate=True)),
        ({"messageId": "msg_1", "deduplicated": False}, Accepted("msg_1")),
        ({"error": "quota maxRetries exceeded"}, Refused("quota maxRetries exceeded")),
        ([], []),
        (
            [
                {"messageId": "msg_1", "url": "https://a"},
                {"messageId": "msg_2", "url": "https://b"},
            ],
            [Accepted("msg_1", url="https://a"), Accepted("msg_2", url="https://b")],
        ),
        # As the specification draws it, and no server answers.
        ({"messages": [{"messageId": "msg_1", "url": URL}]}, [Accepted("msg_1", url=URL)]),
        ([{"messageId": "msg_1"}, {"error": "no"}], [Accepted("msg_1"), Refused("no")]),
    ],
)
def test_an_answer_is_an_id_a_refusal_or_a_list_for_a_group(answer: Any, read: Any) -> None:
    assert read_answer(answer) == read


@pytest.mark.parametrize(
    "answer",
    [None, {}, "OK", 5, {"messageId": ""}, {"messageId": 5}, {"messageId": None}],
    ids=repr,
)
def test_what_names_no_message_is_no_answer_to_one(answer: Any) -> None:
    with pytest.raises(ValueError, match="neither a messageId nor an error"):
        read_answer(answer)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ({"error": "no"}, Refused("no")),
        ({"error": None}, Refused("None")),
        ({"error": {"code": 412}}, Refused("{'code': 412}")),
        ({"message": "no", "status": 412}, Refused('{"message": "no", "status": 412}')),
        ({"messageId": ""}, Refused('{"messageId": ""}')),
        ({}, Refused("{}")),
        (None, Refused("null")),
        ("no", Refused('"no"')),
        ("x" * 1000, Refused('"' + "x" * 499)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_refused_item_never_loses_the_others_ids(answer: Any, refused: Refused) -> None:
    answers = [
        {"messageId": "msg_1"},
        answer,
        [{"messageId": "msg_2"}, answer],
        {"messageId": "msg_3"},
    ]
    assert read_answers(answers) == [
        Accepted("msg_1"),
        refused,
        [Accepted("msg_2"), refused],
        Accepted("msg_3"),
    ]


# --- the referee: what the official SDK sends ----------------------------------------------------


def read_published(request: Request) -> Message:
    """The message in a publish or enqueue, as a server gets it."""
    way, _, rest = request.target.removeprefix("/v2/").partition("/")
    queue, destination = rest.split("/", 1) if way == "enqueue" else ("", rest)
    return Message.from_headers(destination, request.headers, request.body, queue)


FULL = {
    "body": {"model": "gpt-5.4-mini", "messages": []},
    "method": "PUT",
    "headers": {"X-Trace": "7", "Upstash-Forward-X-Named": "8"},
    "callback_headers": {"Retries": "5", "Forward-X-Kind": "callback"},
    "failure_callback_headers": {"Upstash-Failure-Callback-Timeout": "30s"},
    "retries": 2,
    "callback": CALLBACK,
    "failure_callback": CALLBACK + "&failed",
    "deduplication_id": "7b6e-1",
    "content_based_deduplication": False,
    "timeout": "1h",
    "label": "summary,article",
    "redact": {"body": True, "header": ["Authorization", "X-Api-Key"]},
}
NOT_FOR_QUEUES = {
    "delay": 90,
    "not_before": 1_767_323_045,
    "flow_control": {"key": "openai", "parallelism": 2, "rate": 10, "period": "1m"},
}
READ = Message(
    URL,
    b'{"model": "gpt-5.4-mini", "messages": []}',
    Options(
        method="PUT",
        content_type="application/json",
        headers={"X-Trace": "7", "X-Named": "8"},
        callback=Options(retries=5, headers={"X-Kind": "callback"}),
        failure_callback=Options(timeout=30),
        retries=2,
        timeout=3600,
        labels=("summary", "article"),
        redact=("body", "header[Authorization]", "header[X-Api-Key]"),
    ),
    deduplication_id="7b6e-1",
    callback=CALLBACK,
    failure_callback=CALLBACK + "&failed",
)
READ_WITH_TIMES = replace(
    READ,
    options=replace(
        READ.options,
        delay=90,
        not_before=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        flow_control=FlowControl(key="openai", parallelism=2, rate=10, period=60),
    ),
)
RETRY_DELAY = "1000 * (1 + retried)"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda sdk: sdk.message.publish(url=URL), Message(URL)),
        (
            lambda sdk: sdk.message.publish(url=URL + "?a=b%20c", body=b"\xff"),
            Message(URL + "?a=b%20c", b"\xff"),
        ),
        (lambda sdk: sdk.message.publish(url_group="my-group"), Message("my-group")),
        (
            lambda sdk: sdk.message.publish(url=URL, content_type="text/plain", body="ž"),
            Message(URL, "ž".encode(), Options(content_type="text/plain")),
        ),
        (
            lambda sdk: sdk.message.publish(
                url=URL, content_based_deduplication=True, redact={"header": True}
            ),
            Message(URL, options=Options(content_based_deduplication=True, redact=("header",))),
        ),
        (
            lambda sdk: sdk.message.publish_json(
                url=URL, retry_delay=RETRY_DELAY, **FULL, **NOT_FOR_QUEUES
            ),
            replace(
                READ_WITH_TIMES, options=replace(READ_WITH_TIMES.options, retry_delay=RETRY_DELAY)
            ),
        ),
        (
            lambda sdk: sdk.message.publish_json(
                api={"name": "llm", "provider": openai("sk-1")}, body={}, callback=CALLBACK
            ),
            Message(
                URL,
                b"{}",
                Options(content_type="application/json", headers={"Authorization": "Bearer sk-1"}),
                callback=CALLBACK,
            ),
        ),
        (
            lambda sdk: sdk.message.enqueue_json(
                queue="q-1", url=URL, retry_delay=RETRY_DELAY, **FULL
            ),
            replace(READ, queue="q-1", options=replace(READ.options, retry_delay=RETRY_DELAY)),
        ),
    ],
)
def test_what_the_official_sdk_publishes_is_read_right(
    use: Callable[[Any], Any], message: Message, referee: Referee
) -> None:
    _, request = referee.ask_sdk(use, answering({"messageId": "msg_1"}))
    assert read_published(request) == message


def test_what_the_official_sdk_sends_in_a_batch_is_read_right(
    referee: Referee,
) -> None:
    items = [
        {"url": URL} | FULL | NOT_FOR_QUEUES,
        {"url": URL, "queue": "q-1"} | FULL,
        {"url_group": "my-group", "body": None, "flow_control": {"key": "k", "rate": 5}},
    ]
    _, request = referee.ask_sdk(
        lambda sdk: sdk.message.batch_json(items), answering([{"messageId": "msg_1"}] * 3)
    )
    assert (request.method, request.target) == ("POST", "/v2/batch")
    assert [Message.from_batch_item(item) for item in json.loads(request.body)] == [
        READ_WITH_TIMES,
        replace(READ, queue="q-1"),
        Message(
            "my-group",
            b"null",
            Options(content_type="application/json", flow_control=FlowControl(key="k", rate=5)),
        ),
    ]
