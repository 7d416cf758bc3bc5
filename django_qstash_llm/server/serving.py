"""The API on a port of its own, with an engine beside it: one process that is a whole QStash.

For development, tests and demos. A site that mounts ``server.urls`` needs none of this.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

from django.core.handlers.exception import convert_exception_to_response
from django.core.handlers.wsgi import WSGIHandler
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from .delivery import Engine

logger = logging.getLogger(__name__)


class Server:
    """Serves and delivers while it is open."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        engine: Engine | None = None,
        say: Callable[[str], None] = logger.info,
        is_json: bool = False,
    ) -> None:
        """``port`` 0 takes a free one. ``say`` gets a line per request, as JSON if asked."""
        self.engine = engine or Engine()
        self._stop = threading.Event()
        self._http = _HttpServer((host, port), _Connection, ipv6=":" in host)
        self._http.say, self._http.is_json = say, is_json
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

    def get_response(self, request: HttpRequest) -> HttpResponseBase:
        request.urlconf = "django_qstash_llm.server.urls"
        response = super().get_response(request)
        if isinstance(response, HttpResponse) and not response.has_header("Content-Length"):
            # Without it the connection could not be kept.
            response["Content-Length"] = str(len(response.content))
        return response


class _HttpServer(ThreadedWSGIServer):
    say: Callable[[str], None]
    is_json = False
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

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        # PATH_INFO is decoded, and a destination must not be.
        environ["RAW_URI"] = self.path
        return environ

    def log_message(self, format: str, *args: Any) -> None:
        line, status = str(args[0]), str(args[1]) if len(args) > 1 else ""
        method, _, rest = line.partition(" ")
        # Without its query: it may hold the token.
        path = rest.rpartition(" ")[0].partition("?")[0]
        if self.server.is_json:
            line = json.dumps({"method": method, "path": path, "status": status})
        else:
            line = f"{method} {path} {status}"
        self.server.say(line)
