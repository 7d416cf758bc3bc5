"""A whole QStash in one process, called over real sockets by the official SDK."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import qstash
from django.core.management import CommandError, call_command
from django.test import override_settings
from qstash.errors import QStashError

from django_qstash_llm.qstash import Callback, Client
from django_qstash_llm.qstash import Message as WireMessage
from django_qstash_llm.server import conf
from django_qstash_llm.server.console import as_line
from django_qstash_llm.server.management.commands.qstash_server import Command as QStashServer
from django_qstash_llm.server.management.commands.qstash_server import page_of, warning_about
from django_qstash_llm.server.models import Message
from django_qstash_llm.server.serving import Server

from .conftest import CALLBACK, KEYS, PROVIDER, TOKEN, Wire, states
from .test_delivery import eventually

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def server(qstash_server: dict[str, Any]) -> Iterator[Server]:
    with Server() as server:
        yield server


@contextmanager
def connected(url: str, token: str = TOKEN) -> Iterator[qstash.QStash]:
    sdk = qstash.QStash(token, retry=False, base_url=url)
    try:
        yield sdk
    finally:
        # It has no close of its own.
        sdk.http._client.close()


@pytest.fixture
def sdk(server: Server) -> Iterator[qstash.QStash]:
    with connected(server.url) as sdk:
        yield sdk


def test_the_sdks_publish_arrives_and_its_receiver_believes_it(
    sdk: qstash.QStash, wire: Wire
) -> None:
    url = "https://provider.test/a%2Fb//c?x=1&y=%20"
    answer = sdk.message.publish_json(
        url=url,
        body={"prompt": "é"},
        method="PUT",
        headers={"X-Trace": "t"},
        callback=CALLBACK,
        retries=1,
        timeout=30,
        label="a",
        content_based_deduplication=True,
        flow_control={"key": "k", "parallelism": 3, "rate": 4, "period": "2s"},
        redact={"header": ["X-Trace"]},
    )
    assert isinstance(answer, qstash.message.PublishResponse)
    eventually(lambda: bool(wire.to(CALLBACK)))
    receiver = qstash.Receiver(*KEYS)
    for request in wire.requests:
        sent_to = url if request is wire.requests[0] else CALLBACK
        receiver.verify(
            signature=request.headers["Upstash-Signature"],
            body=request.content.decode(),
            url=sent_to,
        )
    first = wire.requests[0]
    assert (first.method, first.url.raw_path) == ("PUT", b"/a%2Fb//c?x=1&y=%20")
    assert json.loads(first.content) == {"prompt": "é"}
    assert first.headers["X-Trace"] == "t"
    message = sdk.message.get(answer.message_id)
    assert (message.url, message.method, message.max_retries) == (url, "PUT", 1)
    flow = message.flow_control
    assert flow is not None
    assert (flow.key, flow.rate, flow.period, flow.parallelism) == ("k", 4, 2, 3)
    [told] = wire.callbacks()
    assert told.source_message_id == answer.message_id


def test_the_sdks_batch_is_answered_in_order(sdk: qstash.QStash) -> None:
    answers = sdk.message.batch_json(
        [
            {"url": PROVIDER, "body": {"n": 1}, "delay": 60},
            {"url": PROVIDER, "body": {"n": 2}, "queue": "q"},
            {"url": PROVIDER, "body": {"n": 3}, "deduplication_id": "one", "delay": "1m"},
            {"url": PROVIDER, "body": {"n": 3}, "deduplication_id": "one", "delay": "1m"},
        ]
    )
    assert [answer.deduplicated for answer in answers] == [False, False, False, True]
    rows = Message.objects.order_by("pk").values_list("message_id", flat=True)
    assert [answer.message_id for answer in answers[:3]] == list(rows)


def test_the_sdk_reads_and_cancels_messages(sdk: qstash.QStash) -> None:
    ids = [sdk.message.publish(url=PROVIDER, body="x", delay="1h").message_id for _ in range(5)]
    message = sdk.message.get(ids[0])
    assert (message.body, message.not_before - message.created_at) == ("x", 3_600_000)
    sdk.message.cancel(ids[0])
    with pytest.raises(QStashError, match="404"):
        sdk.message.cancel(ids[0])
    assert sdk.message.cancel_many(ids[:3]) == 2
    assert sdk.message.cancel_all() == 2


def test_the_sdk_reads_logs_and_works_the_dead_letters(sdk: qstash.QStash, wire: Wire) -> None:
    wire.answers(httpx.Response(503, text="busy"))
    failed = [
        sdk.message.publish(url=PROVIDER, body="x", retries=0, label="a").message_id
        for _ in range(3)
    ]
    eventually(lambda: len(sdk.dlq.list().messages) == 3)
    logs = sdk.log.list(filter={"message_id": failed[0]}).logs
    assert [log.state.value for log in logs] == states(failed[0])[::-1]
    assert logs[0].response_status == 503
    cancelled = sdk.message.publish(url=PROVIDER, body="x", delay="1h").message_id
    sdk.message.cancel(cancelled)
    [log] = sdk.log.list(filter={"state": qstash.log.LogState.CANCELED}).logs
    assert log.message_id == cancelled
    page = sdk.dlq.list(count=2, filter={"label": "a", "response_status": 503})
    assert len(page.messages) == 2
    [last] = sdk.dlq.list(cursor=page.cursor).messages
    letter = sdk.dlq.get(last.dlq_id)
    assert (letter.message_id, letter.response_body) == (last.message_id, "busy")
    # They were given up in whatever order their calls came back.
    assert {each.message_id for each in (*page.messages, last)} == set(failed)
    sdk.dlq.delete(last.dlq_id)
    with pytest.raises(QStashError, match="404"):
        sdk.dlq.get(last.dlq_id)
    assert sdk.dlq.delete_many([each.dlq_id for each in page.messages]) == 2


def test_the_sdk_works_the_queues(sdk: qstash.QStash, wire: Wire) -> None:
    sdk.queue.upsert("q", parallelism=2, paused=True)
    answer = sdk.message.enqueue(queue="q", url=PROVIDER, body="x")
    queue = sdk.queue.get("q")
    assert (queue.parallelism, queue.paused, queue.lag) == (2, True, 1)
    assert wire.requests == []
    sdk.queue.resume("q")
    eventually(lambda: states(answer.message_id)[-1] == "DELIVERED")
    sdk.queue.pause("q")
    assert [each.paused for each in sdk.queue.list()] == [True]
    sdk.queue.delete("q")
    assert sdk.queue.list() == []


def test_the_sdk_reads_and_rotates_the_keys(sdk: qstash.QStash) -> None:
    keys = sdk.signing_key.get()
    assert (keys.current, keys.next) == KEYS
    assert sdk.signing_key.rotate().current == KEYS[1]


def test_the_sdk_sees_its_errors(server: Server, sdk: qstash.QStash) -> None:
    with (
        connected(server.url, "x") as stranger,
        pytest.raises(QStashError, match="unable to authenticate: invalid token"),
    ):
        stranger.message.cancel_all()
    with pytest.raises(QStashError, match="invalid destination url: endpoint has invalid scheme"):
        sdk.message.publish(url="https%3A%2F%2Fa.test", body="x")


def test_our_own_client_gets_along_with_it(server: Server, wire: Wire) -> None:
    with Client(TOKEN, base_url=server.url) as client:
        accepted = client.publish(WireMessage(PROVIDER, b"x", deduplication_id="one"))
        again = client.publish(WireMessage(PROVIDER, b"x", deduplication_id="one"))
        assert (again.message_id, again.is_duplicate) == (accepted.message_id, True)
        eventually(lambda: len(wire.requests) == 1)
        client.upsert_queue("q", parallelism=3)
        assert client.get_queue("q").parallelism == 3
        assert client.logs(message_id=accepted.message_id).items[-1].state == "CREATED"
        assert client.keys().current == KEYS[0]


def test_a_connection_is_kept_and_other_paths_are_not_the_sites(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        for _ in range(3):
            answer = http.get("/v2/queues")
            assert answer.status_code == 200
            assert answer.headers.get("connection") != "close"
        assert http.get("/admin/").status_code == 404
        assert http.post("/v2/publish/" + PROVIDER, content=b"x" * 11_000_000).status_code == 413


# --- the command ---------------------------------------------------------------------------------


class Destination:
    """A site that takes callbacks, and a provider that answers or, told so, hangs."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.hangs = threading.Event()
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.seen.append((self.path, dict(self.headers), body))
                if outer.hangs.is_set():
                    outer.released.wait(30)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, format: str, *args: Any) -> None: ...

        class Http(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None: ...

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]


@pytest.fixture
def destination() -> Iterator[Destination]:
    destination = Destination()
    thread = threading.Thread(target=destination.http.serve_forever, args=(0.05,))
    thread.start()
    yield destination
    destination.released.set()
    destination.http.shutdown()
    destination.http.server_close()
    thread.join()


Start = Callable[..., "Command"]


class Command:
    """``manage.py qstash_server`` in a process of its own, on the test's database."""

    def __init__(self, *arguments: str, name: str) -> None:
        code = (
            "import django, sys; from django.conf import settings;"
            "django.setup();"
            f"settings.DATABASES['default']['NAME'] = {name!r};"
            "settings.QSTASH_SERVER = {};"
            "from django.core.management import execute_from_command_line;"
            "execute_from_command_line(['manage.py', 'qstash_server', *sys.argv[1:]])"
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=Path(__file__).parent.parent.parent,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        eventually(lambda: "Ctrl-C" in "".join(self.lines) or self.process.poll() is not None, 60)

    def read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(30)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def start(db: None) -> Iterator[Start]:
    from django.db import connection

    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        name = str(connection.settings_dict["NAME"])
        commands.append(Command(*arguments, name=name))
        return commands[-1]

    yield start
    for command in commands:
        command.process.kill()
        command.end()


def test_the_command_is_a_whole_qstash_with_the_well_known_identity(
    start: Start, destination: Destination
) -> None:
    command = start()
    banner = "".join(command.lines)
    environment = dict(re.findall(r"^(QSTASH_\w+)=(.*)$", banner, re.MULTILINE))
    assert environment == {
        "QSTASH_URL": command.url,
        "QSTASH_TOKEN": conf.DEVELOPMENT_TOKEN,
        "QSTASH_CURRENT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.current,
        "QSTASH_NEXT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.next,
    }
    began = time.monotonic()
    with connected(command.url, conf.DEVELOPMENT_TOKEN) as sdk:
        sdk.message.publish(
            url=f"{destination.url}/provider", body="x", callback=f"{destination.url}/callback"
        )
    eventually(lambda: destination.paths() == ["/provider", "/callback"])
    assert time.monotonic() - began < 2
    _, headers, body = destination.seen[1]
    told = Callback.from_json(body)
    assert (told.status, told.body) == (200, b"ok")
    qstash.Receiver(*_development_keys()).verify(
        signature=headers["Upstash-Signature"],
        body=body.decode(),
        url=f"{destination.url}/callback",
    )
    assert command.stop(signal.SIGINT) == 0
    assert command.lines[-1] == "stopped\n"
    log = "".join(command.lines).partition("Ctrl-C.\n")[2]
    assert re.sub(r"msg_\w+", "msg", re.sub(r"in \d+ ms", "in n ms", log)).splitlines() == [
        f"POST /v2/publish/{destination.url}/provider 200",
        f"msg -> {destination.url}/provider 200 in n ms",
        f"msg -> {destination.url}/callback 200 in n ms",
        "stopped",
    ]


def test_the_banner_says_where_to_look_and_who_else_is_known(start: Start) -> None:
    command = start("--map", "api.example.com=http://localhost:9", "--map", "*=http://[::1]:8/b")
    assert command.stop() == 0
    banner = "".join(command.lines)
    assert f"Look at what it does: {command.url}/\n" in banner
    assert "The accounts testUser1, testUser2, testUser3 have tokens and keys" in banner
    assert "What is for api.example.com goes to http://localhost:9.\n" in banner
    assert "What is for any other host goes to http://[::1]:8/b.\n" in banner
    assert "WARNING" not in banner


def test_a_program_can_read_every_line(start: Start, destination: Destination) -> None:
    command = start("--json-log")
    with connected(command.url, conf.DEVELOPMENT_TOKEN) as sdk:
        published = sdk.message.publish(
            url=f"{destination.url}/provider?key=canary", body="x", retries=0
        )
        failed = sdk.message.publish(url="http://127.0.0.1:1/", body="x", retries=0)
    eventually(lambda: sum('"attempt"' in line for line in command.lines) == 2)
    httpx.get(f"{command.url}/v2/queues?qstash_token={conf.DEVELOPMENT_TOKEN}")
    httpx.get(f"{command.url}/page/fragment")
    assert command.stop() == 0
    assert "canary" not in "".join(command.lines)
    assert conf.DEVELOPMENT_TOKEN not in "".join(command.lines[1:])
    listening, *events, stopped = map(json.loads, command.lines)
    assert [event.pop("time")[:2] for event in (listening, stopped)] == ["20"] * 2
    assert stopped == {"event": "stopped"}
    assert listening == {
        "event": "listening",
        "environment": {
            "QSTASH_URL": command.url,
            "QSTASH_TOKEN": conf.DEVELOPMENT_TOKEN,
            "QSTASH_CURRENT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.current,
            "QSTASH_NEXT_SIGNING_KEY": conf.DEVELOPMENT_KEYS.next,
        },
        "accounts": ["testUser1", "testUser2", "testUser3"],
        "map": {},
        "page": f"{command.url}/",
        "stop": "Ctrl-C",
    }
    requests = [event for event in events if event["event"] == "request"]
    assert [(event["method"], event["path"], event["status"]) for event in requests] == [
        ("POST", f"/v2/publish/{destination.url}/provider", 200),
        ("POST", "/v2/publish/http://127.0.0.1:1/", 200),
        ("GET", "/v2/queues", 200),
    ]
    assert all(0 <= event["ms"] < 30_000 and event["time"] for event in events)
    attempts = {event["messageId"]: event for event in events if event["event"] == "attempt"}
    arrived, lost = (attempts[each.message_id] for each in (published, failed))
    assert (arrived["url"], arrived["status"]) == (f"{destination.url}/provider", 200)
    assert (arrived["error"], arrived["retried"]) == ("", 0)
    assert lost["status"] == -1
    assert lost["error"].startswith("ConnectError")


def test_what_is_for_a_mapped_host_goes_elsewhere_and_keeps_its_name(
    start: Start, destination: Destination
) -> None:
    command = start("--map", f"*.=x={destination.url}", "--map", f"*={destination.url}/base")
    assert command.end() == 1
    assert "--map: '*.' is no host" in "".join(command.lines)
    command = start("--map", f"*={destination.url}/base")
    with connected(command.url, conf.DEVELOPMENT_TOKEN) as sdk:
        sdk.message.publish(
            url="https://provider.test/a?b=c", body="x", callback="https://site.test/callback"
        )
    eventually(lambda: destination.paths() == ["/base/a?b=c", "/base/callback"])
    for (_, headers, body), url in zip(
        destination.seen,
        ("https://provider.test/a?b=c", "https://site.test/callback"),
        strict=True,
    ):
        qstash.Receiver(*_development_keys()).verify(
            signature=headers["Upstash-Signature"], body=body.decode(), url=url
        )
    told = json.loads(destination.seen[1][2])
    assert told["url"] == "https://provider.test/a?b=c"
    assert command.stop() == 0
    assert " -> https://provider.test/a 200" in "".join(command.lines)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--map", "api.example.com"), "--map api.example.com has no '='"),
        (("--map", "api.example.com=localhost"), "has no http or https URL to go to"),
        (("--port", "70000"), "there is no port 70000"),
    ],
)
def test_the_command_says_what_is_wrong_with_an_argument(
    arguments: tuple[str, ...], problem: str, db: None
) -> None:
    with pytest.raises(CommandError, match=re.escape(problem)):
        call_command("qstash_server", *arguments)


@pytest.mark.parametrize(
    ("url", "page", "warns"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/", False),
        ("http://[::1]:1", "http://[::1]:1/", False),
        ("http://0.0.0.0:1", "http://127.0.0.1:1/", True),
        ("http://[::]:1", "http://127.0.0.1:1/", True),
        ("http://192.168.1.5:1", "", True),
    ],
)
def test_others_are_warned_of_and_not_shown_the_page(url: str, page: str, warns: bool) -> None:
    assert page_of(url) == page
    with override_settings(QSTASH_SERVER={"TOKEN": conf.DEVELOPMENT_TOKEN}):
        assert bool(warning_about(url)) is warns
    with override_settings(QSTASH_SERVER={"TOKEN": "own"}):
        assert warning_about(url) == ""


def test_who_stops_reading_the_log_stops_no_delivery() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    command = QStashServer(stdout=Gone())
    command.is_json = True
    command.say({"event": "request", "method": "GET", "path": "/", "status": 200, "seconds": 0})


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {"event": "request", "method": "GET", "path": "/v2/dlq", "status": 200, "seconds": 1},
            "GET /v2/dlq 200",
        ),
        (
            {
                "event": "attempt",
                "message_id": "msg_1",
                "url": "https://a.test/b?key=canary",
                "status": 503,
                "error": "",
                "retried": 0,
                "seconds": 0.0123,
            },
            "msg_1 -> https://a.test/b 503 in 12 ms",
        ),
        (
            {
                "event": "attempt",
                "message_id": "msg_1",
                "url": "https://a.test/b",
                "status": -1,
                "error": "ReadTimeout: no response within 5 s",
                "retried": 2,
                "seconds": 5,
            },
            "msg_1 -> https://a.test/b ReadTimeout: no response within 5 s (retry 2) in 5000 ms",
        ),
    ],
)
def test_an_event_as_a_line(event: dict[str, Any], line: str) -> None:
    assert as_line(event) == line


def _development_keys() -> tuple[str, str]:
    return conf.DEVELOPMENT_KEYS.current, conf.DEVELOPMENT_KEYS.next


def test_what_was_in_flight_when_the_process_was_killed_is_delivered_by_the_next(
    start: Start, destination: Destination
) -> None:
    destination.hangs.set()
    command = start("--token", "mine")
    with connected(command.url, "mine") as sdk:
        sdk.message.publish(
            url=f"{destination.url}/provider", body="x", callback=f"{destination.url}/callback"
        )
    eventually(lambda: destination.paths() == ["/provider"])
    assert command.stop(signal.SIGKILL) == -signal.SIGKILL
    destination.hangs.clear()
    destination.released.set()
    start("--token", "mine")
    eventually(lambda: destination.paths() == ["/provider", "/provider", "/callback"])
    ids = [headers["Upstash-Message-Id"] for _, headers, _ in destination.seen]
    assert ids[0] == ids[1] != ids[2]


def test_the_command_says_what_is_wrong_with_its_port(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = start("--port", str(port))
        assert command.end() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in "".join(command.lines)


@pytest.mark.parametrize(("error", "is_told"), [(TimeoutError, False), (ZeroDivisionError, True)])
def test_a_connection_that_went_silent_is_no_error(
    server: Server, capsys: pytest.CaptureFixture[str], error: type[Exception], is_told: bool
) -> None:
    try:
        raise error
    except error:
        server._http.handle_error(None, ("127.0.0.1", 1))
    assert ("Traceback" in capsys.readouterr().err) is is_told
