"""A conversation's page behind the servers that sites run: who leaves has the provider stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import connection

from django_qstash_llm.models import LLMRequest

from ..browser.conftest import cookie, reading
from ..browser.test_views import silent, upstream
from ..openai.conftest import eventually
from ..test_chat import hangs

__all__ = ["cookie", "upstream"]

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not find_spec("gunicorn"), reason="gunicorn is not installed"),
]

WSGI, ASGI = "django.core.wsgi:get_wsgi_application()", "django.core.asgi:get_asgi_application"
GUNICORN = ("gunicorn", "--bind", "127.0.0.1:{port}")
SERVERS = {
    "gunicorn-gthread": (*GUNICORN, "--worker-class", "gthread", "--threads", "4", WSGI),
    # One reader takes all of such a worker; it is left all the same.
    "gunicorn-sync": (*GUNICORN, "--worker-class", "sync", WSGI),
    "runserver": ("django", "runserver", "--noreload", "127.0.0.1:{port}"),
    "uvicorn": ("uvicorn", "--factory", "--lifespan", "off", "--port", "{port}", ASGI),
}


@contextmanager
def serving(command: tuple[str, ...], provider: Any) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.referees.served",
        "SERVED_DATABASE": str(connection.settings_dict["NAME"]),
        "SERVED_PROVIDER": f"http://127.0.0.1:{provider.server_port}/v1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "PYTHONWARNINGS": "ignore",
    }
    words = [word.format(port=port) for word in command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            eventually(lambda: answers(port) or process.poll() is not None, 60)
            log.seek(0)
            assert process.poll() is None, log.read().decode()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/llm/health/", trust_env=False).status_code > 0
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("plan", [silent, hangs])
def test_silent_provider_is_left_within_two_seconds(
    cookie: str, upstream: Any, server: str, plan: Any
) -> None:
    provider = upstream(plan)
    with serving(SERVERS[server], provider) as url, reading(url, cookie) as reader:
        with reader.say("How many?") as told:
            eventually(lambda: bool(provider.ports))
            if plan is hangs:
                assert next((n, d) for n, d in told if n) == ("chunk", "Forty")
            assert [next(told), next(told)] == [("", None)] * 2
        left_at = time.monotonic()
        assert provider.left.wait(10)
        took = time.monotonic() - left_at
        print(f"{server}: the provider was left {took:.2f} s after its reader")
        assert took < 2
        eventually(lambda: LLMRequest.objects.get().state == "cancelled")
    row = LLMRequest.objects.get()
    assert (row.error_code, row.usage["estimated"]) == ("aborted", True)
