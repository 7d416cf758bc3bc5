"""Official clients from other registries, called against the server as their users call QStash.

Only ``tox -e referees`` runs these: they are fetched, into the folder that ``TEST_REFEREES`` names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from django_qstash_llm.server.serving import Server

from ..server.conftest import KEYS, TOKEN

HERE = Path(__file__).parent
FETCHED = Path(os.environ.get("TEST_REFEREES") or tempfile.gettempdir())
Run = Callable[..., Any]


def fetched(name: str, *command: str | Path) -> None:
    """Run what fetches a client, or skip and say why it cannot be had."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"{name}: {command[0]} is not on this machine")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name} could not be fetched within 90 seconds")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        # npm ends with where its own log is.
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        pytest.skip(f"{name} could not be fetched: {reason}")


@pytest.fixture(scope="session")
def node_sdk() -> Path:
    folder = FETCHED / "node_modules" / "@upstash" / "qstash"
    if not shutil.which("node"):
        pytest.skip("@upstash/qstash: node is not on this machine")
    if not folder.exists():
        package = "@upstash/qstash@2.12"
        flags = ("--no-save", "--no-audit", "--no-fund", "--prefix", FETCHED)
        fetched("@upstash/qstash", "npm", "install", *flags, package)
    version = json.loads((folder / "package.json").read_text())["version"]
    assert version.startswith("2.12."), version
    return folder


@pytest.fixture(scope="session")
def node_openai() -> Path:
    # By itself: npm takes out what it finds beside it and was not asked for.
    prefix = FETCHED / "npm-openai"
    folder = prefix / "node_modules" / "openai"
    if not shutil.which("node"):
        pytest.skip("openai: node is not on this machine")
    if not folder.exists():
        prefix.mkdir(parents=True, exist_ok=True)
        flags = ("--no-save", "--no-audit", "--no-fund", "--prefix", prefix)
        fetched("openai", "npm", "install", *flags, "openai@6")
    return folder


@pytest.fixture(scope="session")
def old_python_sdk() -> Path:
    folder = FETCHED / "qstash-2.0.5"
    if not folder.exists():
        # It needs what the new one, of which this environment has one, needs too.
        flags = ("--quiet", "--no-deps", "--target", folder)
        fetched("qstash 2.0.5", sys.executable, "-m", "pip", "install", *flags, "qstash==2.0.5")
    assert (folder / "qstash-2.0.5.dist-info").exists()
    return folder


class Came(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes


class Site:
    """Takes callbacks, and plays an OpenAI-compatible provider below ``/v1``."""

    def __init__(self) -> None:
        self.came: list[Came] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                site.came.append(Came(self.path, dict(self.headers), body))
                status, answer = site.answer(self.path, body)
                content = json.dumps(answer).encode()
                kind = "application/json"
                if self.path == "/v1/chat/completions" and json.loads(body).get("stream"):
                    content, kind = streamed(answer), "text/event-stream"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/busy":
            return 503, {"error": "busy"}
        if path != "/v1/chat/completions":
            return 200, {}
        asked = json.loads(body)
        return 200, completion(asked["model"], asked["messages"][-1]["content"])

    def to(self, path: str) -> list[Came]:
        return [each for each in self.came if each.path == path]


def completion(model: str, prompt: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"{prompt} to you too."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5},
    }


def streamed(answer: dict[str, Any]) -> bytes:
    """The same as it would come in pieces, with its usage, as whoever asks for that gets it."""
    first, rest = answer["choices"][0]["message"]["content"].split(" ", 1)
    common = {**answer, "object": "chat.completion.chunk", "usage": None}
    deltas = ({"role": "assistant", "content": first}, {"content": f" {rest}"}, {})
    chunks = [
        {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    chunks.append({**common, "choices": [], "usage": answer["usage"]})
    events = [json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture
def server(settings: Any, site: Site, transactional_db: None) -> Iterator[Server]:
    settings.QSTASH_SERVER = {
        "TOKEN": TOKEN,
        "CURRENT_SIGNING_KEY": KEYS[0],
        "NEXT_SIGNING_KEY": KEYS[1],
        "ALLOW_LOOPBACK": True,
        "MAX_RETRIES": 5,
        "HOSTED_MODELS_URL": f"{site.url}/v1",
        "HOSTED_MODELS_KEY": "hosted-key",
    }
    with Server() as server:
        yield server


def run_script(*command: str | Path, url: str, environment: dict[str, str], given: str = "") -> Any:
    """What a script prints as JSON."""
    identity = {
        "QSTASH_URL": url,
        "QSTASH_TOKEN": TOKEN,
        "QSTASH_CURRENT_SIGNING_KEY": KEYS[0],
        "QSTASH_NEXT_SIGNING_KEY": KEYS[1],
    }
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PATH": os.environ["PATH"], **identity, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
