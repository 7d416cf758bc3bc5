"""A provider that nobody kills, and its ledger of what it was asked and what it answered.

``python -m tests.faults.provider FOLDER SEED`` prints its address. What it does to an attempt
is settled by the seed, the note and the attempt, whenever that comes. It repeats the key that it
was given in whatever goes wrong, as some do.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .ledgers import Ledger

NOTE = re.compile(r"Note (\d+): ")
INPUT_PRICE, OUTPUT_PRICE = 1, 2
"""USD per million tokens, as the site's settings say."""


@dataclass(frozen=True)
class Fate:
    """What becomes of one attempt."""

    seconds: float
    status: int
    """An HTTP status; 0 never answers, 1 is cut in the middle of its answer."""

    @classmethod
    def of(cls, seed: int, note: int, attempt: int, *, is_doomed: bool = False) -> Fate:
        fate = random.Random(f"{seed}:{note}:{attempt}")
        seconds, chance = fate.uniform(0.02, 0.4), fate.random()
        if is_doomed:
            return cls(seconds, 500)
        edges = {0.03: 429, 0.05: 500, 0.06: 0 if fate.random() < 0.5 else 1}
        return cls(seconds, next((s for edge, s in edges.items() if chance < edge), 200))


def completion(call: int, note: int) -> dict[str, Any]:
    """What the call's answer says. Its usage is its own, so that a cost tells whose it is."""
    usage = {"prompt_tokens": 100 + call % 997, "completion_tokens": 10 + call % 13}
    return {
        "id": f"chatcmpl-{call}",
        "object": "chat.completion",
        "created": 1,
        "model": "fake-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text(call, note)},
            }
        ],
        "usage": usage | {"total_tokens": sum(usage.values())},
    }


def text(call: int, note: int) -> str:
    return f"Call {call} about note {note}: do NOT pay twice."


def micro_dollars(call: int) -> int:
    """What the call cost, in millionths of a dollar."""
    return (100 + call % 997) * INPUT_PRICE + (10 + call % 13) * OUTPUT_PRICE


class Provider(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ledger: Ledger
    seed: int
    calls = itertools.count(1)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        note, attempt = int(NOTE.search(prompt)[1]), int(self.headers["Upstash-Retried"] or 0)
        call, message = next(self.calls), self.headers["Upstash-Message-Id"]
        self.ledger.write(call=call, note=note, message=message, attempt=attempt)
        fate = Fate.of(self.seed, note, attempt, is_doomed="doomed" in prompt)
        time.sleep(fate.seconds if fate.status else 5.0)
        if fate.status == 200:
            status, content = 200, completion(call, note)
        else:
            key = self.headers["Authorization"]
            status, content = fate.status, {"error": {"message": f"not now, {key}"}}
        self.ledger.write(call=call, status=status)
        if status >= 200:
            self.answer(status, json.dumps(content).encode())
            return
        # Nothing more will come on this connection.
        self.close_connection = True
        if status == 1:
            self.answer(200, b'{"id": "chatcmpl-cut", "choices": [', missing=100)

    def answer(self, status: int, body: bytes, *, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) + missing))
        if status == 429:
            self.send_header("Retry-After", "1")
        if missing:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Whoever called was killed meanwhile. That is what this is for.
        pass


def main(folder: str, seed: str) -> None:
    Provider.ledger, Provider.seed = Ledger(folder, "P"), int(seed)
    server = Server(("127.0.0.1", 0), Provider)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
