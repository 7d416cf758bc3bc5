from __future__ import annotations

from contextlib import suppress
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_qstash_llm.qstash import FlowControl, InvalidOption, Options
from django_qstash_llm.qstash.options import canonical, check_name

from . import strategies
from .strategies import fuzz

FLOW_VALUE_TEXT = (
    "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, "
    "or both as comma-separated values"
)


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


# --- both ways -----------------------------------------------------------------------------------

EVERYTHING = Options(
    method="PUT",
    content_type="application/json",
    headers={"Authorization": "Bearer sk-1", "X-Request-Id": "7"},
    delay=90,
    not_before=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    retries=0,
    retry_delay="1000 * (1 + retried)",
    timeout=1.5,
    content_based_deduplication=True,
    callback=Options(retries=5, headers={"X-Kind": "callback"}, method="PATCH"),
    failure_callback=Options(timeout=30, delay=1, retry_delay="1000"),
    flow_control=FlowControl(key="openai", parallelism=2, rate=10, period=60),
    labels=("summary", "article"),
    redact=("body", "header[Authorization]"),
)
EVERY_HEADER = {
    "Upstash-Method": "PUT",
    "Upstash-Delay": "90s",
    "Upstash-Not-Before": "1767323045",
    "Upstash-Retries": "0",
    "Upstash-Retry-Delay": "1000 * (1 + retried)",
    "Upstash-Timeout": "1.5s",
    "Upstash-Content-Based-Deduplication": "true",
    "Upstash-Flow-Control-Key": "openai",
    "Upstash-Flow-Control-Value": "parallelism=2, rate=10, period=60s",
    "Upstash-Label": "summary,article",
    "Upstash-Redact-Fields": "body,header[Authorization]",
    "Upstash-Forward-Authorization": "Bearer sk-1",
    "Upstash-Forward-X-Request-Id": "7",
    "Upstash-Callback-Method": "PATCH",
    "Upstash-Callback-Retries": "5",
    "Upstash-Callback-Forward-X-Kind": "callback",
    "Upstash-Failure-Callback-Delay": "1s",
    "Upstash-Failure-Callback-Retry-Delay": "1000",
    "Upstash-Failure-Callback-Timeout": "30s",
}


def test_every_option_has_its_documented_header() -> None:
    assert EVERYTHING.to_headers() == EVERY_HEADER


def test_every_documented_header_is_read_into_its_option() -> None:
    headers = lower(EVERY_HEADER) | {"content-type": "application/json"}
    assert Options.from_headers(headers) == EVERYTHING


def test_what_is_left_out_is_left_to_qstash() -> None:
    assert (Options().to_headers(), Options.from_headers({})) == ({}, Options())


@given(strategies.options)
@fuzz
def test_options_survive_the_wire(options: Options) -> None:
    headers = options.to_headers() | {"Content-Type": options.content_type}
    assert Options.from_headers(lower(headers)) == options


@given(strategies.options)
@fuzz
def test_every_header_could_be_sent(options: Options) -> None:
    sent = options.to_headers()
    assert all(value.isascii() and value.isprintable() for value in sent.values())
    assert all(value == value.strip() for value in sent.values())


def test_the_callers_headers_are_never_written_to() -> None:
    mine = {"X-Mine": "1"}
    options = Options(headers=mine, content_type="text/plain")
    options.to_headers()["X-Other"] = "2"
    options.wire_headers()["X-Other"] = "2"
    assert (mine, options.wire_headers()) == (
        {"X-Mine": "1"},
        {"Content-Type": "text/plain", "Upstash-Forward-X-Mine": "1"},
    )


def test_no_repr_shows_a_forwarded_header() -> None:
    assert "sk-1" not in repr(EVERYTHING)


def test_options_do_not_change_once_made() -> None:
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.retries = 1  # type: ignore[misc]


# --- reading what others write -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "options"),
    [
        ({"upstash-delay": "1d10h30m"}, Options(delay=124_200)),
        ({"upstash-timeout": "1.5s"}, Options(timeout=1.5)),
        ({"upstash-timeout": "900ms"}, Options(timeout=0.9)),
        ({"upstash-retries": " 2 "}, Options(retries=2)),
        ({"upstash-method": "get"}, Options(method="GET")),
        ({"upstash-method": "POST"}, Options()),
        ({"upstash-not-before": "0"}, Options(not_before=datetime(1970, 1, 1, tzinfo=UTC))),
        (
            {"upstash-content-based-deduplication": "True"},
            Options(content_based_deduplication=True),
        ),
        ({"upstash-content-based-deduplication": "1"}, Options(content_based_deduplication=True)),
        ({"upstash-content-based-deduplication": "t"}, Options(content_based_deduplication=True)),
        ({"upstash-content-based-deduplication": "False"}, Options()),
        ({"upstash-content-based-deduplication": "false"}, Options()),
        ({"upstash-content-based-deduplication": "0"}, Options()),
        ({"upstash-label": "a, b ,,c"}, Options(labels=("a", "b", "c"))),
        ({"upstash-redact-fields": "body, headers"}, Options(redact=("body", "headers"))),
        ({"upstash-redact-fields": "HEADER[X-Api-Key]"}, Options(redact=("HEADER[X-Api-Key]",))),
        ({"upstash-forward-x-request-ID": " 1 "}, Options(headers={"X-Request-Id": "1"})),
        ({"upstash-forward-content-type": "a/b"}, Options(headers={"Content-Type": "a/b"})),
        ({"upstash-forward-x-empty": ""}, Options(headers={"X-Empty": ""})),
        ({"upstash-callback-forward-x": "1"}, Options(callback=Options(headers={"X": "1"}))),
        ({"upstash-callback-retries": "0"}, Options(callback=Options(retries=0))),
        ({"upstash-failure-callback-retries": "0"}, Options(failure_callback=Options(retries=0))),
        # Not given is what an empty header means.
        ({"upstash-retries": "", "upstash-delay": " ", "upstash-label": ","}, Options()),
        ({"upstash-forward-": "x"}, Options()),
        # Not ours to read.
        ({"upstash-telemetry-sdk": "x", "upstash-cron": "* * * * *", "x": "y"}, Options()),
        ({"upstash-callback": "https://x/", "upstash-deduplication-id": "a:b"}, Options()),
    ],
    ids=repr,
)
def test_headers_are_read_as_other_clients_write_them(
    headers: dict[str, str], options: Options
) -> None:
    assert Options.from_headers(headers) == options


@pytest.mark.parametrize(
    ("header", "value", "wire_text"),
    [
        ("Upstash-Delay", "1", 'invalid Upstash-Delay header: time: missing unit in duration "1"'),
        ("Upstash-Delay", "-1s", 'invalid Upstash-Delay header: negative duration "-1s"'),
        (
            "Upstash-Timeout",
            "30",
            'invalid Upstash-Timeout header: time: missing unit in duration "30"',
        ),
        (
            "Upstash-Retries",
            "-1",
            'invalid Upstash-Retries header: "-1" is not a whole number of at least 0',
        ),
        (
            "Upstash-Retries",
            "1.0",
            'invalid Upstash-Retries header: "1.0" is not a whole number of at least 0',
        ),
        (
            "Upstash-Retries",
            "٣",
            'invalid Upstash-Retries header: "٣" is not a whole number of at least 0',
        ),
        ("Upstash-Method", "TRACE", 'invalid Upstash-Method header: unsupported method "TRACE"'),
        (
            "Upstash-Not-Before",
            "1s",
            'invalid Upstash-Not-Before header: "1s" is not a unix time in seconds',
        ),
        (
            "Upstash-Not-Before",
            "1767323045000",
            'invalid Upstash-Not-Before header: "1767323045000" is not a unix time in seconds',
        ),
        (
            "Upstash-Not-Before",
            "253402300800",
            'invalid Upstash-Not-Before header: "253402300800" is not a unix time in seconds',
        ),
        (
            "Upstash-Content-Based-Deduplication",
            "yes",
            'invalid Upstash-Content-Based-Deduplication header: "yes" is not a boolean',
        ),
        (
            "Upstash-Retry-Delay",
            "attempt",
            "invalid Upstash-Retry-Delay header: unknown name 'attempt' in expression 'attempt'",
        ),
        (
            "Upstash-Failure-Callback-Retries",
            "many",
            'invalid Upstash-Failure-Callback-Retries header: "many" is not a whole number of at least 0',
        ),
        (
            "Upstash-Callback-Retry-Delay",
            "1 +",
            "invalid Upstash-Callback-Retry-Delay header: unexpected end in expression '1 +'",
        ),
        (
            "Upstash-Timeout",
            "0s",
            "invalid Upstash-Timeout header: less than 1 ms is no time to answer in; leave it out",
        ),
        (
            "Upstash-Callback-Retries",
            "9999999999",
            "invalid Upstash-Callback-Retries header: 9999999999 is not a whole number of at least 0",
        ),
        (
            "Upstash-Label",
            "é",
            "invalid Upstash-Label header: 'é' is not a label: ASCII, trimmed, without commas",
        ),
        (
            "Upstash-Redact-Fields",
            "foo",
            "invalid Upstash-Redact-Fields header: 'foo' is not body, header or header[Name]",
        ),
        (
            "Upstash-Failure-Callback-Forward-X",
            "é",
            "invalid Upstash-Failure-Callback-Forward-X header: "
            "the value of X is not printable ASCII, trimmed",
        ),
        (
            "Content-Type",
            "é",
            "invalid Content-Type header: not printable ASCII",
        ),
    ],
)
def test_a_header_that_cannot_be_read_is_refused_by_its_name(
    header: str, value: str, wire_text: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        Options.from_headers({header.lower(): value})
    assert (caught.value.field, caught.value.wire_text) == (header, wire_text)


@pytest.mark.parametrize(
    "headers",
    [
        {"upstash-timeout": "0s"},
        {"upstash-retries": "9999999999"},
        {"upstash-delay": "20000000m"},
        {"upstash-label": "é"},
        {"upstash-redact-fields": "headers[]"},
        {"upstash-forward-x": "é"},
        {"upstash-forward-x y": "1"},
        {"content-type": "text/plain; name=é"},
    ],
    ids=ascii,
)
def test_a_header_that_holds_what_no_option_may_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidOption):
        Options.from_headers(headers)


header_names = st.sampled_from([name.lower() for name in EVERY_HEADER] + ["content-type"])


@given(st.dictionaries(header_names, st.text() | st.text("0123456789.,=smhd [](")))
@fuzz
def test_no_headers_make_the_reader_fail_otherwise_than_by_refusing(
    headers: dict[str, str],
) -> None:
    with suppress(InvalidOption):
        written = Options.from_headers(headers).to_headers()
        assert Options.from_headers(lower(written)).to_headers() == written


# --- refusing at the door ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_options", "field"),
    [
        ({"method": "post"}, "method"),
        ({"method": "HEAD"}, "method"),
        ({"delay": -1}, "delay"),
        ({"delay": "10s"}, "delay"),
        ({"delay": float("nan")}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": 10**9}, "delay"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 0.0004}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"not_before": datetime(2026, 1, 1)}, "not_before"),
        ({"retries": -1}, "retries"),
        ({"retries": 1.0}, "retries"),
        ({"retries": True}, "retries"),
        ({"retries": 2**31}, "retries"),
        ({"retry_delay": "attempt"}, "retry_delay"),
        ({"retry_delay": "1000\r\nUpstash-Callback: https://evil.example"}, "retry_delay"),
        ({"content_type": "text/plain\r\nX: y"}, "content_type"),
        ({"content_type": "text/plain "}, "content_type"),
        ({"content_type": "é"}, "content_type"),
        ({"headers": {"X": "a\nb"}}, "headers"),
        ({"headers": {"X": "a\r\nY: b"}}, "headers"),
        ({"headers": {"X": "\x00"}}, "headers"),
        ({"headers": {"X": "é"}}, "headers"),
        ({"headers": {"X": " a"}}, "headers"),
        ({"headers": {"Authorization": "Bearer "}}, "headers"),
        ({"headers": {"X": 1}}, "headers"),
        ({"headers": {"X": None}}, "headers"),
        ({"headers": {"": "a"}}, "headers"),
        ({"headers": {"X Y": "a"}}, "headers"),
        ({"headers": {"X:": "a"}}, "headers"),
        ({"headers": {"X\n": "a"}}, "headers"),
        ({"labels": ("a,b",)}, "labels"),
        ({"labels": ("",)}, "labels"),
        ({"labels": (" a",)}, "labels"),
        ({"labels": ("é",)}, "labels"),
        ({"labels": ("a\r\nb",)}, "labels"),
        ({"labels": "summary"}, "labels"),
        ({"redact": ("status",)}, "redact"),
        ({"redact": ("header[]",)}, "redact"),
        ({"redact": ("header[a],body",)}, "redact"),
        ({"redact": ("header[X\r\nY: z]",)}, "redact"),
        ({"redact": ("body\n",)}, "redact"),
        ({"callback": Options(callback=Options(retries=1))}, "callback"),
        ({"callback": Options(content_type="text/plain")}, "callback"),
        ({"failure_callback": Options(failure_callback=Options(retries=1))}, "failure_callback"),
    ],
    ids=ascii,
)
def test_what_cannot_be_sent_is_refused_by_its_name(
    given_options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        Options(**given_options)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_a_refused_header_does_not_repeat_its_value() -> None:
    with pytest.raises(InvalidOption) as caught:
        Options(headers={"Authorization": "Bearer sk-1\n"})
    assert (
        str(caught.value) == "headers: the value of Authorization is not printable ASCII, trimmed"
    )


@pytest.mark.parametrize(
    ("moment", "header"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), "1767225600"),
        # Never before the moment that was meant.
        (datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC), "1767225601"),
        (datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), "1767225600"),
        (datetime(1969, 1, 1, tzinfo=UTC), "0"),
    ],
)
def test_a_moment_travels_as_whole_unix_seconds(moment: datetime, header: str) -> None:
    assert Options(not_before=moment).to_headers() == {"Upstash-Not-Before": header}


def test_a_retry_delay_travels_without_the_blanks_around_it() -> None:
    assert Options(retry_delay=" 1000 ").to_headers() == {"Upstash-Retry-Delay": "1000"}


# --- flow control --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow_control", "value"),
    [
        (FlowControl(key="k", parallelism=3), "parallelism=3"),
        (FlowControl(key="k", rate=5), "rate=5, period=1s"),
        (FlowControl(key="k", rate=5, period=60), "rate=5, period=60s"),
        (FlowControl(key="k", parallelism=3, period=60), "parallelism=3, period=60s"),
        (
            FlowControl(key="k", parallelism=3, rate=5, period=604_800),
            "parallelism=3, rate=5, period=604800s",
        ),
    ],
)
def test_a_flow_control_is_written_and_read(flow_control: FlowControl, value: str) -> None:
    assert (flow_control.to_value(), FlowControl.from_value("k", value)) == (value, flow_control)


@given(strategies.flow_controls)
@fuzz
def test_a_flow_control_survives_the_wire(flow_control: FlowControl) -> None:
    assert FlowControl.from_value(flow_control.key, flow_control.to_value()) == flow_control


@pytest.mark.parametrize(
    ("value", "flow_control"),
    [
        ("period=1d,rate=5", FlowControl(key="k", rate=5, period=86_400)),
        ("rate=5,period=1h30m3s", FlowControl(key="k", rate=5, period=5403)),
        ("rate = 5 , period = 60", FlowControl(key="k", rate=5, period=60)),
        ("rate=5,period=1500ms", FlowControl(key="k", rate=5, period=2)),
        ("parallelism=1", FlowControl(key="k", parallelism=1)),
    ],
)
def test_a_flow_control_is_read_in_any_order_and_unit(
    value: str, flow_control: FlowControl
) -> None:
    assert FlowControl.from_value("k", value) == flow_control


@pytest.mark.parametrize(
    "value",
    [
        "period=60s",
        "rate",
        "rate=",
        "rate=x",
        "rate=0",
        "rate=-1",
        "rate=1.5",
        "rate=²",
        "limit=5",
        "rate=1;parallelism=2",
        "rate=1,",
        " ",
        "rate=99999999999",
        "rate=3000000000",
        "rate=1,period=0",
    ],
)
def test_a_flow_control_value_that_is_none_is_refused_in_qstashs_words(value: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        FlowControl.from_value("k", value)
    assert caught.value.wire_text == FLOW_VALUE_TEXT


@pytest.mark.parametrize(
    ("value", "wire_text"),
    [
        ("rate=1,period=", 'invalid Upstash-Flow-Control-Value header: time: invalid duration ""'),
        (
            "rate=1,period=1w",
            'invalid Upstash-Flow-Control-Value header: time: unknown unit "w" in duration "1w"',
        ),
        ("rate=1,period=8d", "invalid Upstash-Flow-Control-Value header: longer than 7 days"),
    ],
)
def test_a_period_that_is_none_is_refused(value: str, wire_text: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        FlowControl.from_value("k", value)
    assert caught.value.wire_text == wire_text


@pytest.mark.parametrize(
    ("headers", "field", "wire_text"),
    [
        ({"upstash-flow-control-key": "k"}, "Upstash-Flow-Control-Value", FLOW_VALUE_TEXT),
        (
            {"upstash-flow-control-key": "k", "upstash-flow-control-value": ""},
            "Upstash-Flow-Control-Value",
            FLOW_VALUE_TEXT,
        ),
        (
            {"upstash-flow-control-value": "rate=1"},
            "Upstash-Flow-Control-Key",
            "invalid Upstash-Flow-Control-Key header: the flow-control key and value go together",
        ),
        (
            {"upstash-flow-control-key": "a b", "upstash-flow-control-value": "rate=1"},
            "Upstash-Flow-Control-Key",
            "invalid Upstash-Flow-Control-Key header: "
            "'a b' is not a name: 1 to 256 letters, digits, '_', '-' and '.'",
        ),
        (
            {"upstash-flow-control-key": "k", "upstash-flow-control-value": "rate=1,period=8d"},
            "Upstash-Flow-Control-Value",
            "invalid Upstash-Flow-Control-Value header: longer than 7 days",
        ),
        (
            {
                "upstash-callback-flow-control-key": "k",
                "upstash-callback-flow-control-value": "rate=1,period=1w",
            },
            "Upstash-Callback-Flow-Control-Value",
            "invalid Upstash-Callback-Flow-Control-Value header: "
            'time: unknown unit "w" in duration "1w"',
        ),
    ],
)
def test_a_flow_control_that_is_none_is_refused_by_its_headers_name(
    headers: dict[str, str], field: str, wire_text: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        Options.from_headers(headers)
    assert (caught.value.field, caught.value.wire_text) == (field, wire_text)


@pytest.mark.parametrize(
    ("given_limits", "field"),
    [
        ({}, "flow_control"),
        ({"period": 5}, "flow_control"),
        ({"rate": 0}, "flow_control.rate"),
        ({"rate": 1.5}, "flow_control.rate"),
        ({"rate": True}, "flow_control.rate"),
        ({"parallelism": -1}, "flow_control.parallelism"),
        ({"parallelism": 2**31}, "flow_control.parallelism"),
        ({"rate": 1, "period": 0}, "flow_control.period"),
        ({"rate": 1, "period": 604_801}, "flow_control.period"),
        ({"rate": 1, "key": "a b"}, "flow_control.key"),
        ({"rate": 1, "key": ""}, "flow_control.key"),
    ],
)
def test_a_flow_control_that_limits_nothing_is_refused(
    given_limits: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        FlowControl(**{"key": "k"} | given_limits)
    assert caught.value.field == field


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "...", ".a", "x" * 256])
def test_a_name_travels_unescaped(name: str) -> None:
    check_name("queue", name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a b", "a/b", "a:b", "a\n", "é", "a?b", "a%20b", "x" * 257, None, 5]
)
def test_what_could_not_travel_unescaped_is_no_name(name: Any) -> None:
    """``.`` and ``..`` would climb out of the path: ``DELETE /v2/messages/.`` cancels everything."""
    with pytest.raises(InvalidOption) as caught:
        check_name("queue", name)
    assert str(caught.value) == (
        f"queue: {name!r} is not a name: 1 to 256 letters, digits, '_', '-' and '.'"
    )


@pytest.mark.parametrize(
    ("header", "written"),
    [
        ("x-request-ID", "X-Request-Id"),
        ("CONTENT-TYPE", "Content-Type"),
        ("a", "A"),
        ("x--y", "X--Y"),
        ("x_y", "X_y"),
    ],
)
def test_header_names_are_written_as_go_writes_them(header: str, written: str) -> None:
    assert canonical(header) == written
