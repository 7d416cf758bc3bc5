"""The way between the app and QStash, in both directions: it loses, delays and repeats.

``python -m tests.faults.front FOLDER UPSTREAM`` prints its address. Calls to QStash lose their
answer after the work is done, or are held until the callback has come, or never arrive.
Callbacks come one to five times, in parallel and in any order; each delivery and the status that
our view answered is written down before QStash hears of it.

``POST /behave`` with a JSON object changes what it does; it begins as a way that does nothing.
"""

from __future__ import annotations

import base64
import json
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

from .ledgers import Ledger

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
_WAYS_IN = ("/qstash/v2/publish", "/qstash/v2/batch", "/qstash/v2/enqueue")


@dataclass(frozen=True)
class Behaviour:
    """Shares of calls, between 0 and 1."""

    seed: int = 0
    lost_acks: float = 0.0
    """QStash took it, and nobody hears so."""
    held_acks: float = 0.0
    """The answer comes later than the callback does."""
    never_arrive: float = 0.0
    repeats: float = 0.0
    """Callbacks that come more than once: two to five times."""
    held_seconds: float = 1.5


class Call(NamedTuple):
    """One that came: a handler goes on to the next while copies of this are under way."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    behaviour = Behaviour()
    chance = random.Random(0)
    upstream: str
    lost_again: ClassVar[dict[bytes, int]] = {}
    """A submission's body -> how many more of its answers are lost."""
    callbacks: Ledger
    submissions: Ledger

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {n: v for n, v in self.headers.items() if n.lower() not in _HOP_BY_HOP}
        call = Call(self.command, self.path, headers, body)
        if self.path == "/behave":
            type(self).behaviour = replace(Front.behaviour, **json.loads(body))
            type(self).chance = random.Random(Front.behaviour.seed)
            self.relay(Answer(200, [], json.dumps(asdict(Front.behaviour)).encode()))
        elif self.path.startswith("/llm/callback/"):
            self.relay(self.deliver_callback(call))
        elif self.path.startswith(_WAYS_IN):
            self.submit(call)
        else:
            self.relay(self.pass_on(call))

    do_GET = do_DELETE = do_POST

    # --- to QStash ---

    def submit(self, call: Call) -> None:
        how, fate = self.behaviour, self.chance.random()
        if fate < how.never_arrive:
            self.submissions.write(what="never arrived")
            self.close_connection = True
            return
        answer = self.pass_on(call)
        if self.is_lost(call.body, fate - how.never_arrive):
            self.submissions.write(what="lost ack", status=answer.status)
            self.close_connection = True
            return
        if fate - how.never_arrive - how.lost_acks < how.held_acks:
            self.submissions.write(what="held ack", status=answer.status)
            time.sleep(how.held_seconds)
        self.relay(answer)

    def is_lost(self, body: bytes, fate: float) -> bool:
        """Once it is, so are the next two: our client repeats it at once, and little would be left
        in doubt."""
        if self.lost_again.get(body):
            self.lost_again[body] -= 1
            return True
        if fate < self.behaviour.lost_acks:
            self.lost_again[body] = 2
            return True
        return False

    # --- to the app ---

    def deliver_callback(self, call: Call) -> Answer:
        """What QStash hears is the answer to the first copy; the others are the way's own."""
        copies = 0
        if self.chance.random() < self.behaviour.repeats:
            copies = self.chance.randint(1, 4)
        for _ in range(copies):
            # Before, beside and after the one that counts.
            copy = threading.Timer(self.chance.uniform(0, 1.5), self.deliver_one, [call])
            copy.daemon = True
            copy.start()
        if copies:
            time.sleep(self.chance.uniform(0, 0.3))
        return self.deliver_one(call)

    def deliver_one(self, call: Call) -> Answer:
        answer = self.pass_on(call)
        told = json.loads(call.body)
        self.callbacks.write(
            uuid=call.path.split("/")[3],
            source=told["sourceMessageId"],
            retried=told["retried"],
            kind="failure_callback" if told.get("dlqId") else "callback",
            provider_status=told["status"],
            length=len(base64.b64decode(told["body"])),
            status=answer.status if answer.status != 502 else 0,
            is_genuine=True,
        )
        return answer

    # --- both ---

    def pass_on(self, call: Call) -> Answer:
        """The site's answer, or 502 where it gave none."""
        connection = HTTPConnection(self.upstream, timeout=30)
        headers = {**call.headers, "Host": self.upstream, "Content-Length": str(len(call.body))}
        try:
            connection.request(call.method, call.path, call.body, headers)
            return _read(connection.getresponse())
        except (OSError, HTTPException):
            # A second, instead of QStash's twelve before a first retry.
            return Answer(502, [("Retry-After", "1")], b"")
        finally:
            connection.close()

    def relay(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = [(n, v) for n, v in answer.headers if n.lower() not in _HOP_BY_HOP]
        if answer.status == 503 and "retry-after" not in {n.lower() for n, _ in headers}:
            headers.append(("Retry-After", "1"))
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _read(response: HTTPResponse) -> Answer:
    return Answer(response.status, response.getheaders(), response.read())


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever called was killed meanwhile. That is what this is for.
        pass


def main(folder: str, upstream: str) -> None:
    Front.upstream = urlsplit(upstream).netloc
    Front.callbacks, Front.submissions = Ledger(folder, "K"), Ledger(folder, "W")
    server = Server(("127.0.0.1", 0), Front)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
