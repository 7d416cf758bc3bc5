"""One attempt's HTTP call: bounded in time and size, and only to where it may go."""

from __future__ import annotations

import re
import select
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httpcore
import httpx

from ...qstash.options import canonical
from .. import conf
from ..destinations import allowed_addresses, refuse_literal_address
from ..exceptions import AddressRefused
from ..models import Outcome

CONNECT_TIMEOUT = 10.0
MOST_UNSENT = 64 * 1024
"""Bytes of a request that are gathered before they are sent."""
KEPT_FOR = 1.5
"""Seconds that a connection is kept unused: the most impatient server known closes after two."""

_UNTOLD = {"content-length", "transfer-encoding", "connection", "keep-alive"}
"""Response headers that were about the transfer, which is over."""
_WITH_BODY = {"POST", "PUT", "PATCH"}
_ASKED_FOR = {"Accept": "*/*", "Accept-Encoding": "identity"}


class Http:
    """Never follows a redirect, keeps no cookie, never looks at the environment."""

    def __init__(self, transport: Any = None) -> None:
        """``transport``: an httpx transport in place of real connections."""
        self._carrier = Injected(transport) if transport else Connections()

    def close(self) -> None:
        self._carrier.close()

    def tidy(self) -> None:
        self._carrier.tidy()

    def call(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes,
        *,
        timeout: float,
        is_trusted: bool,
    ) -> Outcome:
        """``is_trusted``: the URL is the operator's, who may call any address."""
        _call.deadline, _call.is_trusted = time.monotonic() + timeout, is_trusted
        try:
            if not is_trusted:
                refuse_literal_address(url)
            answer = self._carrier.send(method, url, _ASKED_FOR | headers, body, timeout)
            try:
                return _read(answer)
            finally:
                answer.close()
        except AddressRefused as error:
            return Outcome(error=str(error))
        except (httpx.TimeoutException, httpcore.TimeoutException) as error:
            return Outcome(error=f"{type(error).__name__}: no response within {timeout:g} s")
        except (httpx.ConnectError, httpcore.ConnectError) as error:
            return Outcome(error=_clean(f"ConnectError: {error}"))
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            httpcore.ConnectionNotAvailable,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.ProxyError,
            httpcore.UnsupportedProtocol,
            # Also httpcore's: of an address that it will not connect to.
            RuntimeError,
            ValueError,
        ) as error:
            # Only the name: the text may repeat a header, and with it a key.
            return Outcome(error=type(error).__name__)


_call = threading.local()
"""The attempt of this thread: ``deadline`` (monotonic) and ``is_trusted``."""


# --- the answer ------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A response whose body is still to come."""

    status: int
    headers: Iterable[tuple[bytes, bytes]]
    chunks: Iterable[bytes]
    close: Callable[[], None]


def _read(answer: Answer) -> Outcome:
    header = _told(answer.headers)
    # Not asked for, and yet some send it. What else they send is told as it came.
    is_packed = header.get("Content-Encoding") in (["gzip"], ["deflate"])
    body = _Body(conf.current().max_body, is_packed=is_packed)
    for chunk in answer.chunks:
        body.add(chunk)
        if body.is_complete:
            break
        if time.monotonic() > _call.deadline:
            raise httpx.ReadTimeout("the response took too long")
    if body.is_unpacked:
        del header["Content-Encoding"]
    return Outcome(status=answer.status, header=header, body=body.content)


class _Body:
    """What a destination answered, cut where it is too long. Packed, it is unpacked if that can be
    done, and kept as it came if not: the work was done, and paid for, all the same."""

    # With a header, gzip's or zlib's, and then as some servers send deflate: without any.
    _WINDOWS = (47, -15)

    def __init__(self, largest: int, *, is_packed: bool) -> None:
        self._largest = largest
        self._raw, self._unpacked = bytearray(), bytearray()
        self._ways = [zlib.decompressobj(wbits=each) for each in self._WINDOWS if is_packed]

    def add(self, chunk: bytes) -> None:
        self._raw += chunk[: self._largest - len(self._raw)]
        while self._ways:
            # No more than there is room for: a small chunk may hold gigabytes.
            room = max(1, self._largest - len(self._unpacked))
            try:
                self._unpacked += self._ways[0].decompress(chunk, room)
                return
            except zlib.error:
                # Another way, from the beginning.
                del self._ways[0], self._unpacked[:]
                chunk = bytes(self._raw)

    @property
    def is_unpacked(self) -> bool:
        return bool(self._ways)

    @property
    def is_complete(self) -> bool:
        if self._ways and self._ways[0].eof:
            return True
        return len(self._unpacked if self._ways else self._raw) >= self._largest

    @property
    def content(self) -> bytes:
        return bytes(self._unpacked if self._ways else self._raw)[: self._largest]


def _told(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1")
        if name.lower() not in _UNTOLD:
            told.setdefault(_clean(canonical(name)), []).append(_clean(_text(raw_value)))
    return told


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _clean(text: str) -> str:
    """Text that any database takes."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


# --- connections -----------------------------------------------------------------------------


class Connections:
    """As many as there are calls in flight, kept for a while.

    httpx's own pool looks at every connection it has at every call, which with hundreds of them
    costs more than the call.
    """

    def __init__(self) -> None:
        self._ssl_context = httpx.create_ssl_context(trust_env=False)
        self._network = _GuardedNetwork()
        self._lock = threading.Lock()
        self._idle: defaultdict[Origin, deque[httpcore.HTTPConnection]] = defaultdict(deque)

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout: float
    ) -> Answer:
        to = Address.of(url)
        # With whom it was let through: one that was opened on trust is not for others.
        origin = Origin(to.scheme, to.host, to.port, _call.is_trusted)
        connection = self._kept(origin) or httpcore.HTTPConnection(
            httpcore.Origin(*origin[:3]),
            ssl_context=self._ssl_context,
            keepalive_expiry=KEPT_FOR,
            network_backend=self._network,
        )
        told = [(b"Host", to.authority)]
        told += [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        if body or method in _WITH_BODY:
            told.append((b"Content-Length", b"%d" % len(body)))
        limits = {"connect": min(CONNECT_TIMEOUT, timeout), "read": timeout, "write": timeout}
        try:
            response = connection.handle_request(
                httpcore.Request(
                    method=method,
                    url=httpcore.URL(
                        scheme=to.scheme, host=to.host, port=to.port, target=to.target
                    ),
                    headers=told,
                    content=body,
                    extensions={"timeout": limits},
                )
            )
        except BaseException:
            connection.close()
            raise

        def end() -> None:
            response.close()
            self._keep(connection, origin)

        return Answer(response.status, response.headers, response.iter_stream(), end)

    def _kept(self, origin: Origin) -> httpcore.HTTPConnection | None:
        """One that nobody uses, the last used first."""
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                connection = idle.pop()
            # Asked each time: some servers close without saying so, and what is then sent on it
            # cannot be sent again, since it may have arrived.
            if not connection.has_expired():
                return connection
            connection.close()

    def _keep(self, connection: httpcore.HTTPConnection, origin: Origin) -> None:
        if not connection.is_idle():
            # Its response was not read to the end.
            connection.close()
            return
        with self._lock:
            self._idle[origin].append(connection)

    def tidy(self) -> None:
        """Close what nobody used for a while. Call it now and then."""
        with self._lock:
            for origin, idle in tuple(self._idle.items()):
                usable: deque[httpcore.HTTPConnection] = deque()
                for connection in idle:
                    if connection.has_expired():
                        connection.close()
                    else:
                        usable.append(connection)
                if usable:
                    self._idle[origin] = usable
                else:
                    del self._idle[origin]

    def close(self) -> None:
        with self._lock:
            for idle in self._idle.values():
                for connection in idle:
                    connection.close()
            self._idle.clear()


class Origin(NamedTuple):
    scheme: bytes
    host: bytes
    port: int
    is_trusted: bool


class Address(NamedTuple):
    """A URL as a request is addressed to it."""

    scheme: bytes
    host: bytes
    port: int
    authority: bytes
    """What ``Host`` says."""
    target: bytes

    @classmethod
    def of(cls, url: str) -> Address:
        if not _PLAIN_URL.fullmatch(url):
            # What may not stand in a request line is percent-encoded, a host made ASCII.
            url = str(httpx.URL(url))
        parts = urlsplit(url)
        scheme, host = parts.scheme, (parts.hostname or "").encode("ascii")
        authority = parts.netloc.rpartition("@")[2]
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        port = {"http": 80, "https": 443}[scheme] if parts.port is None else parts.port
        return cls(scheme.encode(), host, port, authority.lower().encode(), target.encode("ascii"))


_PLAIN_URL = re.compile(r"[A-Za-z0-9\-._~:/?\[\]!$&'()*+,;=%@]*")


class Injected:
    """An httpx transport in the place of real connections."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout: float
    ) -> Answer:
        request = httpx.Request(
            method,
            url,
            headers=headers,
            content=body,
            extensions={"timeout": httpx.Timeout(timeout).as_dict()},
        )
        response = self._transport.handle_request(request)
        chunks = cast(Iterable[bytes], response.stream)
        return Answer(response.status_code, response.headers.raw, chunks, response.close)

    def tidy(self) -> None:
        """Its own affair."""

    def close(self) -> None:
        self._transport.close()


class _GuardedNetwork(httpcore.NetworkBackend):
    """Connects only to addresses that may be connected to, the very ones that were looked at."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses(host, port):
            try:
                connection = socket.create_connection((address, port), _remaining(timeout))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _Stream(connection)
            except TimeoutError as error:
                failure = httpcore.ConnectTimeout(str(error))
            except OSError as error:
                failure = httpcore.ConnectError(str(error))
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        if _call.is_trusted:
            return [host]
        try:
            return allowed_addresses(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error


class _Stream(httpcore.NetworkStream):
    """Bounds all reads and writes of an attempt together; httpcore bounds each by itself, and a
    destination that sends a byte now and then would never be cut off.

    One system call each way where that is possible. Each call lets go of the interpreter and has
    to win it back from all the other threads; with Python's own timeouts, which poll first, and
    with head and body sent apart, there were ten of them, and they cost more than the rest.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._unsent: list[bytes] = []
        self._unsent_size = 0
        if _KERNEL_TIMEOUTS and not self._is_tls:
            connection.settimeout(None)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            self._flush(timeout)
        self._limit(socket.SO_RCVTIMEO, timeout)
        try:
            return self._socket.recv(max_bytes)
        except (TimeoutError, BlockingIOError) as error:
            raise httpcore.ReadTimeout("no answer in time") from error
        except OSError as error:
            raise httpcore.ReadError(type(error).__name__) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sent with what follows, or when an answer is waited for."""
        self._unsent.append(buffer)
        self._unsent_size += len(buffer)
        if self._unsent_size > MOST_UNSENT:
            self._flush(timeout)

    def _flush(self, timeout: float | None) -> None:
        data = memoryview(b"".join(self._unsent))
        self._unsent, self._unsent_size = [], 0
        try:
            # Not sendall: it grants the time anew to whoever takes a little.
            while data:
                self._limit(socket.SO_SNDTIMEO, timeout)
                data = data[self._socket.send(data) :]
        except (TimeoutError, BlockingIOError) as error:
            raise httpcore.WriteTimeout("not taken in time") from error
        except OSError as error:
            raise httpcore.WriteError(type(error).__name__) from error

    def _limit(self, option: int, timeout: float | None) -> None:
        seconds = _remaining(timeout)
        if _KERNEL_TIMEOUTS and not self._is_tls:
            # Never nothing, which would be for ever.
            microseconds = max(1, round(seconds * 1_000_000))
            limit = struct.pack("ll", *divmod(microseconds, 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        else:
            self._socket.settimeout(seconds)

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        self._socket.settimeout(_remaining(timeout))
        try:
            return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))
        except TimeoutError as error:
            self.close()
            raise httpcore.ConnectTimeout("no TLS in time") from error
        except OSError as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._socket if self._is_tls else None
        if info == "is_readable":
            # Of a connection nobody uses that means: closed by the other side.
            return _is_readable(self._socket)
        return None


def _is_readable(connection: socket.socket) -> bool:
    if not hasattr(select, "poll"):
        return bool(select.select([connection], [], [], 0)[0])
    # select knows no more than 1,024 files.
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


# The kernel's own timeouts need no poll before each call. Elsewhere they are written differently.
_KERNEL_TIMEOUTS = sys.platform == "linux" and struct.calcsize("l") == 8


def _remaining(timeout: float | None) -> float:
    left: float = _call.deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the attempt's time is over")
    return left if timeout is None else min(timeout, left)
