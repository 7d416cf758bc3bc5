"""The API on a port of its own, with an engine beside it: one process that is a whole QStash.

For development, tests and demos. A site that mounts ``server.urls`` needs none of this.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from typing import Any, Self

from django.core.handlers.exception import convert_exception_to_response
from django.core.handlers.wsgi import WSGIHandler
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from . import console
from .delivery import Engine
from .page import QUIET_PATHS

logger = logging.getLogger(__name__)

LONGEST_CONTENT_TYPE = 1000


def _log(event: console.Event) -> None:
    logger.info(console.as_line(event))


class Server:
    """Serves and delivers while it is open."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        engine: Engine | None = None,
        say: console.Say = _log,
    ) -> None:
        """``port`` 0 takes a free one. ``say`` gets an event for each request and, unless the
        engine is given, each attempt; from several threads."""
        self._stop = threading.Event()
        # First: a port that is taken must leave no engine open.
        self._http = _HttpServer((host, port), _Connection, ipv6=":" in host)
        self._http.say = say
        self.engine = engine or Engine(say=say)
        self._http.set_app(_Application())
        self._threads = [
            threading.Thread(target=self._http.serve_forever, args=(0.1,), name="qstash-http"),
            threading.Thread(target=self.engine.run, args=(self._stop,), name="qstash-engine"),
        ]

    @property
    def url(self) -> str:
        host, port = self._http.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take no more requests, finish what is in flight for a while, then let go of the rest."""
        self._http.shutdown()
        self._http.close_connections()
        self._stop.set()
        self.engine.ring()
        for thread in self._threads:
            thread.join()
        self._http.server_close()
        self.engine.close()


class _Application(WSGIHandler):
    """Only our URLs, at the root, and none of the site's middleware: no redirect to https, no
    login, no session has any business here."""

    def load_middleware(self, is_async: bool = False) -> None:
        self._view_middleware: list[Any] = []
        self._template_response_middleware: list[Any] = []
        self._exception_middleware: list[Any] = []
        self._middleware_chain = convert_exception_to_response(self._get_response)  # type: ignore[attr-defined]

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if len(environ["CONTENT_TYPE"]) <= LONGEST_CONTENT_TYPE:
            return super().__call__(environ, start_response)
        # Django makes no request of it, and so no answer.
        body = json.dumps({"error": "the Content-Type is too long"}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("400 Bad Request", headers)
        return [body]

    def get_response(self, request: HttpRequest) -> HttpResponseBase:
        request.urlconf = "django_qstash_llm.server.serving_urls"
        response = super().get_response(request)
        if isinstance(response, HttpResponse) and not response.has_header("Content-Length"):
            # Without it the connection could not be kept.
            response["Content-Length"] = str(len(response.content))
        return response


class _HttpServer(ThreadedWSGIServer):
    say: console.Say
    request_queue_size = 512

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for this host's name, which can take seconds without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A kept connection on which nothing came is closed, and that is all there is to it.
        if not isinstance(sys.exc_info()[1], TimeoutError):
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        """A kept connection would otherwise be served for as long as its client keeps it."""
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError:
                    continue


class _Connection(WSGIRequestHandler):
    server: _HttpServer
    disable_nagle_algorithm = True
    # Head and body leave in one packet.
    wbufsize = -1
    # A kept connection that says nothing for this long is closed.
    timeout = 120

    def handle_one_request(self) -> None:
        super().handle_one_request()
        # What has no body, and what is refused before it is ours, is written and not sent.
        self.wfile.flush()
        headers = getattr(self, "headers", {})
        length = headers.get("Content-Length", "0")
        if "Transfer-Encoding" in headers or not re.fullmatch("[0-9]{1,18}", length):
            # Where that body ends nobody knows, and the rest of it is no request.
            self.close_connection = True

    def parse_request(self) -> bool:
        # Not from when the connection was ready: it may have been kept for long.
        self._began = time.monotonic()
        return super().parse_request()

    _began = 0.0

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        # PATH_INFO is decoded, and a destination must not be.
        environ["RAW_URI"] = self.path
        # Nor is a message text because nobody said what it is.
        environ["CONTENT_TYPE"] = self.headers.get("Content-Type", "")
        # Two of them are one that is refused: who believes which is how requests are smuggled.
        environ["CONTENT_LENGTH"] = ", ".join(self.headers.get_all("Content-Length", []))
        return environ

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        method, _, rest = self.requestline.partition(" ")
        # Without its query: it may hold the token.
        path = rest.rpartition(" ")[0].partition("?")[0]
        if path in QUIET_PATHS:
            return
        self.server.say(
            {
                "event": "request",
                "method": method,
                "path": path,
                "status": int(code.value if isinstance(code, HTTPStatus) else code),
                "seconds": time.monotonic() - self._began if self._began else 0.0,
            }
        )

    def log_message(self, format: str, *args: Any) -> None:
        """What is wrong with a request is answered, and said with its status above."""
