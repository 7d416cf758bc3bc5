"""Calls that nobody means well: each is answered, none with a 5xx, and a refused one leaves nothing.

Most go through Django's WSGI and ASGI handlers; what is about HTTP itself goes over a socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.core.asgi import get_asgi_application
from django.core.signals import request_finished, request_started
from django.db import close_old_connections

from django_qstash_llm.server.serving import Server

from .conftest import KEYS, TOKEN, Api

HOST = "https://host.test"
PUBLISH = f"/v2/publish/{HOST}"


class Call(NamedTuple):
    target: str
    """The path and query, as they are written into the request line."""
    headers: dict[str, str] = {}
    body: bytes = b""
    method: str = "POST"


def publish_with(**headers: str) -> Call:
    return Call(PUBLISH, {name.replace("_", "-"): value for name, value in headers.items()})


def batch(body: bytes) -> Call:
    return Call("/v2/batch", {}, body)


def get(target: str) -> Call:
    return Call(target, method="GET")


def delete(target: str, body: bytes = b"") -> Call:
    return Call(target, body=body, method="DELETE")


@cache
def client() -> Api:
    return Api()


def through_wsgi(call: Call) -> tuple[int, bytes]:
    """As gunicorn hands it on."""
    return through_decoding_wsgi(call, RAW_URI=f"/qstash{call.target}")


def through_decoding_wsgi(call: Call, **told: str) -> tuple[int, bytes]:
    """As a server that does not tell the raw target does."""
    path, _, query = call.target.partition("?")
    told |= {"QUERY_STRING": query, "PATH_INFO": unquote(f"/qstash{path}", "latin-1")}
    answer = client().call(call.method, "/", call.body, headers=call.headers, **told)
    return answer.status_code, answer.content


def through_asgi(call: Call) -> tuple[int, bytes]:
    path, _, query = call.target.partition("?")
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "testserver"} | call.headers
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": call.method,
        "path": unquote(f"/qstash{path}", errors="replace"),
        "raw_path": f"/qstash{path}".encode("latin-1", "replace"),
        "query_string": query.encode("latin-1", "replace"),
        "headers": [
            (name.lower().encode(), value.encode("latin-1", "replace"))
            for name, value in headers.items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    # The test's transaction is on this connection; Django's test client does the same.
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    try:
        return async_to_sync(_call_asgi)(scope, call.body)
    finally:
        for signal in (request_started, request_finished):
            signal.connect(close_old_connections)


asgi_application = cache(get_asgi_application)


async def _call_asgi(scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
    told: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if told:
            return told.pop()
        # Django watches for a caller who hangs up; this one does not.
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    await asgi_application()(scope, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


def rows() -> dict[str, int]:
    models = apps.get_app_config("qstash_server").get_models()
    return {model.__name__: model._default_manager.count() for model in models}


WAYS = [through_wsgi, through_asgi]
DIGITS = "9" * 5000
DESTINATIONS = [
    # Addresses off limits, however they are spelled.
    *("http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:a9fe:a9fe]/"),
    *("http://[fe80::1%25eth0]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/"),
    *("http://[fd00:ec2::254]/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/"),
    *("http://127.1/", "http://0/", "http://0x7f.1/", "http://169.254.169.254./latest"),
    *("http://0xA9FEA9FE/", "http://2852039166/", "http://LOCALHOST/", "http://a.localhost/"),
    *("http://10.0.0.1/", "http://100.64.0.1/", "http://100.100.100.200/"),
    # Hosts that are none.
    *("http://[::1", "http://[]/", "http://[1::2::3]/", "https:///path", "https:/", "https:"),
    *("http://user@host.test/", "http://user:pw@host.test/", "http://host.test\\@evil/"),
    *("http://host.test:99999/", "http://host.test:abc/", "http://host.test:%D9%A3/"),
    *("http://host.test:0/", "http://[fec0::1]/", "http://[::ffff:0:7f00:1]/"),
    *("http:host.test", "http:\\\\host.test", "http://%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1/"),
    *("http://%31%32%37.0.0.1/", "http://127%2e0.0.1/", "http://host.test%00.evil/"),
    # What is no URL, or not of ours.
    *("ftp://host.test/", "file:///etc/passwd", "gopher://x/", "javascript:alert(1)", "data:,x"),
    *("//host.test/", "", ".", "..", "a%20b", "a%00b", "api/llm"),
    *("http://host.test/a/../b", "http://host.test/./", "http://host.test/" + "a" * 10_000),
]
OPTIONS = {
    "Retries": ["-1", "+3", "1_000", "1e3", DIGITS, "٣", "0x3", "3.0", "NaN", "2147483648", "3,4"],
    "Delay": ["-5s", "5x", "5", "٣s", DIGITS + "s", "1e309s", "s", "NaN", "∞", "999999d"],
    "Timeout": ["0", "0s", "1ns", "-1s", DIGITS + "s"],
    "Not-Before": ["-1", "253402300800", "NaN", DIGITS, "٣", "1.5"],
    "Retry-Delay": ["(" * 5000, "9**9", "__import__('os')", "-" * 5000 + "1", "1e400", "min()"],
    "Flow-Control-Key": ["a"],
    "Flow-Control-Value": ["rate=1"],
    "Deduplication-Id": ["a:b", "a" * 257, "a\x00", "..", "é", "a b"],
    "Label": ["é", "\x00"],
    "Redact-Fields": ["x", "header[", "header[é]", "body;header"],
    "Method": ["BREW", "HEAD", "\x00"],
    "Header-Forward": ["maybe"],
    "Content-Based-Deduplication": ["maybe", "2"],
    "Forward-X": ["é", "\x00", "a" * 70_000, "a\r\nX-Injected: 1"],
    "Callback": DESTINATIONS[:24],
    "Failure-Callback": ["http://169.254.169.254/", "ftp://host.test/", "https://host.test/é"],
    "Callback-Retries": ["-1", DIGITS],
    "Callback-Delay": ["-1s"],
    "Failure-Callback-Not-Before": [DIGITS],
}
FLOWS = ["rate=0", "rate=٣", "rate=²", "rate=99999999999", "rate=2147483648", "period=60s", "rate"]
FLOWS += ["=", "rate=1,", "rate=-1", "RATE=1", "rate=1,period=8d", "rate=1,period=" + DIGITS]
QUERIES = ["upstash-forward-x=a%0d%0ab", "upstash-forward-%0d%0a=x", "upstash-forward-x=%00"]
QUERIES += ["upstash-retries=-1", "upstash-label=%ed%a0%80", "upstash-not-before=NaN"]
QUERIES += ["upstash-callback=http://169.254.169.254/", "upstash-method=post%00"]
QUERIES += ["&".join(f"upstash-forward-x{number}=1" for number in range(500))]
CRONS = ["* * * * * *", "99 * * * *", "*/0 * * * *", "0 0 31 2 *", "1," * 20_000 + "1 * * * *"]
CRONS += ["CRON_TZ=../../etc/passwd * * * * *", "CRON_TZ=/etc/localtime * * * * *", "٣ * * * *"]
CRONS += ["CRON_TZ=\x00 * * * * *", "59-0 * * * *", "*/99999999999 * * * *", "", "@every 1s"]
BODIES = [b"", b"null", b"{}", b"[]", b'"a"', b"[NaN]", b"[Infinity]", b"[1e400]", b"\xff\xfe"]
BODIES += [b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"[" + DIGITS.encode() + b"]", b"[]]"]
BODIES += [b"[" + b"1," * 10_000 + b"1]"]
IDS = [b'{"messageIds":[]}', b'{"messageIds":[1]}', b'{"messageIds":[""]}', b'{"messageIds":"a"}']
IDS += [b"{}", b"[]", b"false", b'{"messageids":["a"]}', b'{"messageIds":["a"],"count":1}']
IDS += [json.dumps({"messageIds": ["a"] * 100_000}).encode()]
LISTED = ["count=0", "count=-1", "count=1e3", "count=%D9%A3", "count=", "count=" + DIGITS]
LISTED += ["cursor=x", "cursor=1-", "cursor=%D9%A3-1", "cursor=-1", "cursor[$ne]=1", "order=x"]
LISTED += ["fromDate=-1", "fromDate=99999999999999", "toDate=NaN", "fromDate=", "label=", "label=,"]
LISTED += ["label=%00", "a__password=x", "account=x", "message__account=x", "%00=x", "=x"]
LISTED += ["label=" + ",".join("a" * 3000), "callerIp=%00", "queueName=" + "a," * 3000 + "a"]
LISTED += ["&".join(f"url={number}" for number in range(4000))]
NAMES = ["%00", "%0a", "a%2fb", "..", ".", "a" * 5000, "%ff", "%F0%9F%98%80"]
QUEUES = [
    b'{"queueName":"\\ud800"}',
    b'{"queueName":"a\\u0000"}',
    b'{"queueName":".."}',
    b"[]",
    b"1",
]
QUEUES += [b'{"queueName":"q","parallelism":%b}' % each for each in (b"0", b"-1", b"1e3", b"true")]
QUEUES += [b'{"queueName":"q","parallelism":%b}' % each for each in (b"2147483648", b"NaN", b'"1"')]
QUEUES += [b'{"queueName":"q","paused":%b}' % each for each in (b"null", b"1", b'"no"')]
ENDPOINTS: list[Any] = [[], {}, [{}], [1], [{"url": 1}], [{"url": "http://localhost"}]]
ENDPOINTS += [[{"url": HOST, "name": name}] for name in ("\ud800", "\x00", "a" * 257, [], 0)]
ENDPOINTS += [[{"url": f"{HOST}/{number}"} for number in range(2000)]]
ENDPOINTS += [[{"url": HOST}, {"url": "http://127.0.0.1"}]]

REFUSED = {
    **{f"to {url}": Call(f"/v2/publish/{url}") for url in DESTINATIONS},
    **{
        f"{name}: {value}": Call(PUBLISH, {f"Upstash-{name}": value})
        for name, values in OPTIONS.items()
        for value in values
    },
    **{
        f"flow {value}": publish_with(
            Upstash_Flow_Control_Key="k", Upstash_Flow_Control_Value=value
        )
        for value in FLOWS
    },
    **{f"?{query}": Call(f"{PUBLISH}?{query}") for query in QUERIES},
    "500 headers": Call(PUBLISH, {f"Upstash-Forward-X{number}": "1" for number in range(500)}),
    "a large body": Call(PUBLISH, {}, b"x" * (10 * 1024 * 1024 + 1)),
    **{f"queue {name}": Call(f"/v2/enqueue/{name}/{HOST}") for name in NAMES if name != "."},
    **{
        f"cron {cron}": Call(f"/v2/schedules/{HOST}", {"Upstash-Cron": cron, "X-N": str(number)})
        for number, cron in enumerate(CRONS)
    },
    **{f"batch {number}": batch(body) for number, body in enumerate(BODIES)},
    **{f"ids {number}": delete("/v2/messages", body) for number, body in enumerate(IDS)},
    **{
        f"{path}?{query}": get(f"{path}?{query}")
        for path in ("/v2/logs", "/v2/dlq", "/v2/events")
        for query in LISTED
    },
    "cancel?typo": delete("/v2/messages?labeel=a"),
    "cancel?count=0": delete("/v2/messages?count=0"),
    "cancel?label=": delete("/v2/messages?label="),
    **{f"{path}{name}": get(f"{path}{name}") for name in NAMES for path in ("/v2/messages/",)},
    **{f"queue body {number}": Call("/v2/queues", {}, body) for number, body in enumerate(QUEUES)},
    "a large queue": Call("/v2/queues", {}, b" " * 1024 * 1025),
    **{
        f"endpoints {number}": Call(
            "/v2/topics/g/endpoints", {}, json.dumps({"endpoints": endpoints}).encode()
        )
        for number, endpoints in enumerate(ENDPOINTS)
    },
    **{
        f"pin {query}": Call(f"/v2/flowControl/k/pin?{query}")
        for query in ("", "rate=0", "rate=%C2%B2")
    },
    **{f"pause {name}": Call(f"/v2/flowControl/{name}/pause") for name in ("%00", "a%20b")},
    **{
        f"{method} {path}": Call(path, method=method)
        for path in ("/v2", "/v2/", "/v2/nothing", "/v2//queues", "/v2/batch/", "/v2/publish")
        for method in ("GET", "POST", "DELETE", "OPTIONS", "BREW", "post")
    },
    **{
        f"Content-Length: {length}": Call(PUBLISH, {"Content-Length": length}, b"abc")
        for length in ("abc", "-1", "1e3", "٣", "9" * 20, "3, 3", "+3")
    },
    **{
        f"Authorization: {number}": Call(PUBLISH, {"Authorization": value})
        for number, value in enumerate(
            [
                *("", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer é"),
                *(f"Bearer {TOKEN} x", f"Bearer {KEYS[0]}", "Bearer " + "a" * 60_000),
            ]
        )
    },
}


def short(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()[:60]


@pytest.mark.django_db
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", REFUSED.values(), ids=[short(name) for name in REFUSED])
def test_it_is_refused_and_leaves_nothing(
    call: Call, way: Callable[[Call], tuple[int, bytes]]
) -> None:
    before = rows()
    status, answer = way(call)
    assert 400 <= status < 500, answer
    assert set(json.loads(answer)) == {"error"}
    assert rows() == before


@pytest.mark.django_db
@pytest.mark.parametrize("url", DESTINATIONS, ids=short)
def test_a_destination_is_refused_by_its_decoded_path_too(url: str) -> None:
    status, answer = through_decoding_wsgi(Call(f"/v2/publish/{url}"))
    assert status == 400, answer
    assert rows()["Message"] == 0


BAD_ITEMS: list[Any] = [None, 1, [], [[]], "a", {}, {"destination": 1}, {"destination": "\ud800"}]
BAD_ITEMS += [{"destination": f"{HOST}/\ud800"}, {"destination": f"{HOST}/\x00"}]
BAD_ITEMS += [{"destination": url} for url in DESTINATIONS[:20]]
BAD_ITEMS += [{"destination": HOST, "queue": queue} for queue in ("\ud800", "a\x00", [], 0, "..")]
BAD_ITEMS += [{"destination": HOST, "headers": each} for each in ([], ["a"], "x", 1, False)]
BAD_ITEMS += [
    {"destination": HOST, "headers": {name: value}}
    for name, value in {
        "Upstash-Delay": ["1s", "2s"],
        "Upstash-Retries": 1,
        "Upstash-Timeout": None,
        "Upstash-Method": "\ud800",
        "Upstash-Label": "\ud800",
        "Upstash-Forward-\ud800": "x",
        "Upstash-Forward-X": "a\r\nb",
        "Upstash-Retry-Delay": "\ud800",
        "Upstash-Callback": "https://\ud800/",
        "Upstash-Deduplication-Id": "\ud800",
        "Content-Type": "a\r\nb",
    }.items()
]


@pytest.mark.django_db
@pytest.mark.parametrize("bad", BAD_ITEMS, ids=[short(json.dumps(bad)) for bad in BAD_ITEMS])
def test_a_bad_item_of_a_batch_is_refused_and_the_others_are_taken(api: Api, bad: Any) -> None:
    answer = api.post("/v2/batch", [{"destination": HOST}, bad, {"destination": HOST}])
    assert answer.status_code == 200
    assert [set(each) for each in answer.json()] == [{"messageId"}, {"error"}, {"messageId"}]
    assert rows()["Message"] == 2


@pytest.mark.django_db
@pytest.mark.parametrize("depth", [500, 900, 990, 1000, 1100, 2000, 5000, 50_000])
def test_json_of_any_depth_is_taken_or_refused(api: Api, depth: int) -> None:
    answer = api.post("/v2/batch", b'[{"destination":"%b","body":' % HOST.encode() + b"[" * depth)
    assert answer.status_code == 400
    body = b"[" * depth + b"]" * depth
    answer = api.post("/v2/batch", b'[{"destination":"%b","body":%b}]' % (HOST.encode(), body))
    assert answer.status_code in {200, 400}
    assert rows()["Message"] == (answer.status_code == 200)


TAKEN = {
    "many labels": publish_with(Upstash_Label=",".join(f"label-{n}" for n in range(3000))),
    "a long URL": Call(f"{PUBLISH}/" + "a" * 8000),
    "a long callback": publish_with(Upstash_Callback=f"{HOST}/" + "a" * 8000),
    "a header of many bytes": publish_with(Upstash_Forward_X="a" * 60_000),
    "an expression that overflows": publish_with(Upstash_Retry_Delay="pow(9, pow(9, pow(9, 9)))"),
    "an expression that divides by zero": publish_with(Upstash_Retry_Delay="1 / retried"),
    "an unknown charset": Call(PUBLISH, {"Content-Type": "text/plain; charset=nope"}, b"\xff"),
    "no boundary": Call(PUBLISH, {"Content-Type": "multipart/form-data"}, b"a"),
    "a form": Call(PUBLISH, {"Content-Type": "application/x-www-form-urlencoded"}, b"a=b&c"),
    "an encoded line break": Call(f"{PUBLISH}/%0d%0aX:y%00"),
    "a NUL": Call(PUBLISH, {}, b"\x00" * 10),
    "keys twice": batch(b'[{"destination":"ftp://x","destination":"https://host.test"}]'),
    "half a surrogate pair": batch(b'[{"destination":"https://host.test","body":"\\ud800"}]'),
}


@pytest.mark.django_db
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", TAKEN.values(), ids=TAKEN)
def test_it_is_odd_and_taken(call: Call, way: Callable[[Call], tuple[int, bytes]]) -> None:
    status, answer = way(call)
    assert status == 200, answer
    assert rows()["Message"] == 1


# --- over a socket -------------------------------------------------------------------------------


@pytest.fixture
def server(qstash_server: dict[str, Any], transactional_db: None) -> Iterator[Server]:
    with Server() as server:
        yield server


def said_to(server: Server, request: str) -> bytes:
    """Everything that is answered to these bytes until the connection ends."""
    port = int(server.url.rpartition(":")[2])
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        connection.sendall(request.encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def request(*headers: str, line: str = f"POST {PUBLISH}", body: str = "") -> str:
    head = [f"{line} HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", *headers]
    return "\r\n".join(head) + f"\r\n\r\n{body}"


# Were it believed, there would be two answers.
SECOND = "0\r\n\r\nGET /v2/keys HTTP/1.1\r\nHost: x\r\n\r\n"
SENT = {
    "cut off": (400, request("Content-Length: 10", body="abc")),
    "no number": (400, request("Content-Length: abc", body=SECOND)),
    "negative": (400, request("Content-Length: -5", body=SECOND)),
    "two lengths": (400, request("Content-Length: 1", "Content-Length: 50", body=SECOND)),
    "chunks": (411, request("Transfer-Encoding: chunked", body=SECOND)),
    "chunks of a length": (
        411,
        request("Transfer-Encoding: chunked", "Content-Length: 3", body=SECOND),
    ),
    "an endless type": (400, request(f"Content-Type: {'a' * 20_000}", "Content-Length: 0")),
    "a line in a line": (400, request("Upstash-Label: a\r\n b", "Content-Length: 0")),
    "a NUL in a header": (400, request("Upstash-Label: a\x00b", "Content-Length: 0")),
    "two values": (400, request("Upstash-Retries: 1", "Upstash-Retries: 2", "Content-Length: 0")),
    "two tokens": (401, request("Authorization: Bearer x", line="GET /v2/queues")),
    "a NUL in the path": (400, request(line=f"POST {PUBLISH}/\x00")),
    "a fragment": (400, request(line=f"POST {PUBLISH}/#f")),
    "backslashes": (400, request(line="POST /v2/publish/https:\\\\host.test")),
    "an encoded destination": (400, request(line="POST /v2/publish/https%3A%2F%2Fhost.test")),
    "dot segments": (404, request(line=f"POST /v2/queues/..{PUBLISH}")),
    "two slashes": (404, request(line=f"POST //v2//publish/{HOST}")),
    "a trailing slash": (404, request(line="GET /v2/queues/")),
    "TRACE": (405, request(line="TRACE /v2/queues")),
    "BREW": (405, request(line="BREW /v2/queues")),
    "OPTIONS": (405, request(line="OPTIONS /v2/queues")),
    "HEAD of nothing": (404, request(line="HEAD /v2/queues/nothing")),
    "a long line": (414, request(line=f"GET /v2/queues?{'a' * 70_000}")),
    "a long header": (431, request(f"X: {'a' * 70_000}", line="GET /v2/queues")),
    "many headers": (431, request(*[f"X{n}: 1" for n in range(200)], line="GET /v2/queues")),
    "a space in the path": (400, request(line=f"POST {PUBLISH}/a b")),
}


@pytest.mark.parametrize(("status", "sent"), SENT.values(), ids=SENT)
def test_what_is_wrong_with_a_request_is_answered_once(
    server: Server, status: int, sent: str
) -> None:
    before = rows()
    answer = said_to(server, sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"<!DOCTYPE" not in answer.partition(b"</html>")[2]
    assert rows() == before


def test_head_is_answered_without_a_body(server: Server) -> None:
    answer = said_to(server, request(line="HEAD /v2/queues"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")
