"""Delivering: claim what is due, call its destination, write down how that ended.

An ``Engine`` keeps many calls in flight. One thread, the one that runs it, talks to the
database; the calls wait in threads of their own that never do, so hundreds of slow destinations
hold one connection, and no transaction is open while anybody waits.

A claim is a short lease that the engine keeps renewing. An engine that dies stops renewing, and
its messages are due again after ``LEASE`` seconds, however long their timeouts are.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from datetime import datetime, timedelta
from functools import cache, lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpcore
import httpx
from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    close_old_connections,
    connections,
)
from django.utils import timezone

from ..qstash import Keys, sign
from ..qstash.message import HOSTED_LLM
from ..qstash.options import canonical
from ..qstash.signing import HEADER as SIGNATURE
from . import conf, doorbell
from .destinations import allowed_addresses, refuse_literal_address
from .exceptions import AddressRefused
from .models import Message, Outcome, SigningKeys

logger = logging.getLogger(__name__)

USER_AGENT = "Upstash-QStash"
CONNECT_TIMEOUT = 10.0
_UNTOLD = {"content-encoding", "content-length", "transfer-encoding", "connection", "keep-alive"}
"""Response headers that were about the transfer, which is over: the body is told decoded."""


class Engine:
    """Delivers. ``deliver_due`` one message after the other in this thread, ``run`` and
    ``drain`` many at a time."""

    def __init__(
        self,
        *,
        transport: Any = None,
        concurrency: int | None = None,
        clock: Callable[[], datetime] = timezone.now,
    ) -> None:
        """``transport``: an httpx transport, instead of the settings'."""
        settings = conf.current()
        self.clock = clock
        self.concurrency = concurrency or settings.concurrency
        self.identity = process_identity()
        self._http = _Http(transport or settings.make_transport(), self.concurrency)
        self._alone = threading.Lock()
        self._bell = threading.Event()
        self._in_flight: dict[str, Message] = {}
        self._ended: queue.SimpleQueue[tuple[Message, Outcome]] = queue.SimpleQueue()

    def close(self) -> None:
        self._http.close()

    # --- one after the other -----------------------------------------------------------------

    def deliver_due(self, limit: int | None = None) -> int:
        """Deliver what is due, and what that makes due (callbacks), until nothing is.

        Answers how many attempts were made, at most ``limit``.
        """
        count = 0
        with doorbell.delivering():
            while limit is None or count < limit:
                claimed = Message.objects.claim(engine=self.identity, limit=1, now=self.clock())
                if not claimed:
                    break
                keys = SigningKeys.objects.current()
                for message in claimed:
                    message.record(self._attempt(message, keys), now=self.clock())
                    count += 1
        return count

    # --- many at a time ----------------------------------------------------------------------

    def run(self, stop: threading.Event, *, grace: float = 10.0) -> None:
        """Deliver until ``stop`` is set, then let what is in flight finish for ``grace`` seconds.

        Call ``ring`` after setting ``stop``, or it is noticed at the next poll.
        """
        with self._alone, doorbell.listening(self._bell):
            self._outlive(release_claims_of_the_dead)
            while not stop.is_set():
                self._outlive(self._round)
                self._bell.wait(self._pause())
                self._bell.clear()
            self._wind_down(grace)
        # This thread is the caller's; the connection was ours.
        connections.close_all()

    def drain(self) -> float | None:
        """Deliver until nothing is due and nothing in flight, however long that takes. Answers
        the seconds until something is due again, None for never.

        For a Celery task: while it goes on, this process needs no other, and has no other.
        """
        with self._alone, doorbell.listening(self._bell):
            while True:
                self._outlive(self._round)
                if not self._in_flight and not Message.objects.is_anything_due(self.clock()):
                    break
                self._bell.wait(self._pause())
                self._bell.clear()
        next_due_at = Message.objects.next_due_at()
        if next_due_at is None:
            return None
        return max(0.0, (next_due_at - self.clock()).total_seconds())

    def ring(self) -> None:
        self._bell.set()

    def _round(self) -> None:
        self._renew_leases()
        self._write_down_what_ended()
        room = self.concurrency - len(self._in_flight)
        if room > 0:
            self._begin(room)

    def _begin(self, limit: int) -> None:
        lease = conf.current().lease
        claimed = Message.objects.claim(
            engine=self.identity, limit=limit, now=self.clock(), lease=lease
        )
        if not claimed:
            return
        keys = SigningKeys.objects.current()
        for message in claimed:
            # A daemon: a call that lasts two hours must not keep the process from ending.
            thread = threading.Thread(
                target=self._call, args=(message, keys), name=message.message_id, daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                # No more threads. What was claimed and not begun is due when its lease ends.
                logger.exception("delivering %s could not begin", message.message_id)
                return
            self._in_flight[message.message_id] = message

    def _call(self, message: Message, keys: Keys) -> None:
        """In a thread of its own, without the database."""
        try:
            outcome = self._attempt(message, keys)
        except Exception as error:
            # Whatever it was: an attempt of which nothing is heard would stay in flight for ever.
            logger.exception("delivering %s broke", message.message_id)
            outcome = Outcome(error=f"internal error: {type(error).__name__}")
        self._ended.put((message, outcome))
        self._bell.set()

    def _write_down_what_ended(self) -> None:
        # No more than there are now: what cannot be written is put back, and waits for next time.
        for _ in range(self._ended.qsize()):
            self._outlive(self._write_down_one)

    def _write_down_one(self) -> None:
        message, outcome = self._ended.get_nowait()
        # Should it break below, its lease ends and it is tried again.
        del self._in_flight[message.message_id]
        try:
            # A copy: it is changed before it is saved, and to be written again it needs its claim.
            is_ours = copy(message).record(outcome, now=self.clock())
        except (OperationalError, InterfaceError):
            # An answer that was paid for: keep it until the database is back.
            self._in_flight[message.message_id] = message
            self._ended.put((message, outcome))
            raise
        if not is_ours:
            logger.warning("%s was taken over by another engine", message.message_id)

    def _renew_leases(self) -> None:
        tokens = {message.claim_token for message in self._in_flight.values()}
        now = time.monotonic()
        lease = conf.current().lease
        if tokens and now >= self._renew_at:
            until = self.clock() + timedelta(seconds=lease)
            Message.objects.renew(tokens, until=until)
            self._renew_at = now + lease / 4

    _renew_at = 0.0

    def _pause(self) -> float:
        """Seconds until there may be something to do although nobody rings."""
        longest = conf.current().poll
        with suppress(DatabaseError, InterfaceError):
            if len(self._in_flight) < self.concurrency:
                next_due_at = Message.objects.next_due_at()
                if next_due_at is not None:
                    wait = (next_due_at - self.clock()).total_seconds()
                    # Not nothing: what is due and was not taken is another engine's at the moment.
                    return min(longest, max(0.02, wait))
        return longest

    def _outlive(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            # Whatever it was, most likely the database: an engine that gives up delivers nothing.
            is_expected = isinstance(error, DatabaseError | InterfaceError)
            logger.log(
                logging.WARNING if is_expected else logging.ERROR,
                "an engine's round broke (%s); trying again",
                type(error).__name__,
                exc_info=not is_expected,
            )
            for connection in connections.all(initialized_only=True):
                # One that broke inside a transaction would go on refusing.
                with suppress(DatabaseError, InterfaceError):
                    connection.close()
        else:
            self._now_and_then()

    def _now_and_then(self) -> None:
        # As the end of a request does: honours CONN_MAX_AGE, which 0 would make a reconnect per poll.
        if time.monotonic() >= self._refresh_at:
            close_old_connections()
            self._refresh_at = time.monotonic() + 60

    _refresh_at = 0.0

    def _wind_down(self, grace: float) -> None:
        end = time.monotonic() + grace
        while self._in_flight and time.monotonic() < end:
            self._outlive(self._renew_leases)
            self._write_down_what_ended()
            if self._in_flight:
                self._bell.wait(0.2)
                self._bell.clear()
        tokens = {message.claim_token for message in self._in_flight.values()}
        if tokens:
            unfinished = Message.objects.filter(claim_token__in=tokens)
            self._outlive(lambda: unfinished.release(now=self.clock()))
        self._in_flight.clear()

    # --- one attempt -------------------------------------------------------------------------

    def _attempt(self, message: Message, keys: Keys) -> Outcome:
        if message.is_interrupted_for_good:
            return Outcome(error=f"interrupted {message.interruptions} times: engines died over it")
        url, headers = self._addressed(message, keys)
        return self._http.call(
            message.method,
            url,
            headers,
            bytes(message.body),
            timeout=message.timeout,
            is_trusted=message.url == HOSTED_LLM,
        )

    def _addressed(self, message: Message, keys: Keys) -> tuple[str, dict[str, str]]:
        headers = {name: values[0] for name, values in message.header.items()}
        settings = conf.current()
        if message.url == HOSTED_LLM:
            # Not a receiver of ours but a provider: it gets its key and no signature.
            headers["Authorization"] = f"Bearer {settings.hosted_models_key}"
            return f"{settings.hosted_models_url.rstrip('/')}/chat/completions", headers
        signature = sign(
            bytes(message.body), url=message.url, key=keys.current, now=self.clock().timestamp()
        )
        headers |= {
            "User-Agent": USER_AGENT,
            "Upstash-Message-Id": message.message_id,
            "Upstash-Retried": str(message.retried),
            SIGNATURE: signature,
            "Upstash-Region": settings.region,
        }
        if message.caller_ip:
            headers["Upstash-Caller-Ip"] = message.caller_ip
        return message.url, headers


def kept_engine() -> Engine:
    """The engine of this process's Celery tasks: a new one costs 40 ms of TLS context."""
    # By process, since connections must not cross a fork.
    return _kept_engine(os.getpid(), conf.current())


@lru_cache(maxsize=1)
def _kept_engine(pid: int, settings: conf.ServerSettings) -> Engine:
    return Engine()


# --- the call --------------------------------------------------------------------------------


class _Http:
    """One kept client. Never follows a redirect, never looks at the environment."""

    def __init__(self, transport: Any, concurrency: int) -> None:
        self._client = httpx.Client(
            transport=transport or _transport(concurrency),
            trust_env=False,
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
            # Nobody's cookies are anybody else's: keep none.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )

    def close(self) -> None:
        self._client.close()

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
        _call.deadline, _call.is_trusted = time.monotonic() + timeout, is_trusted
        limits = httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout))
        try:
            if not is_trusted:
                refuse_literal_address(url)
            request = self._client.build_request(
                method, url, headers=headers, content=body, timeout=limits
            )
            response = self._client.send(request, stream=True)
            try:
                return self._read(response)
            finally:
                response.close()
        except AddressRefused as error:
            return Outcome(error=str(error))
        except httpx.TimeoutException as error:
            return Outcome(error=f"{type(error).__name__}: no response within {timeout:g} s")
        except httpx.ConnectError as error:
            return Outcome(error=_clean(f"ConnectError: {error}"))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            # Only the name: the text may repeat a header, and with it a key.
            return Outcome(error=type(error).__name__)

    def _read(self, response: httpx.Response) -> Outcome:
        largest = conf.current().max_body
        chunks, size = [], 0
        for chunk in response.iter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            if size >= largest:
                break
            if time.monotonic() > _call.deadline:
                raise httpx.ReadTimeout("the response took too long")
        return Outcome(
            status=response.status_code,
            header=_told(response.headers.multi_items()),
            body=b"".join(chunks)[:largest],
        )


def _told(headers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {}
    for name, value in headers:
        if name.lower() not in _UNTOLD:
            told.setdefault(_clean(canonical(name)), []).append(_clean(value))
    return told


def _clean(text: str) -> str:
    """Text that any database takes."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


_call = threading.local()
"""The attempt of this thread: ``deadline`` (monotonic) and ``is_trusted``."""


def _transport(concurrency: int) -> httpx.HTTPTransport:
    transport = httpx.HTTPTransport(trust_env=False)
    # httpx has no public seam for where a connection goes; httpcore, below it, has.
    transport._pool = httpcore.ConnectionPool(
        ssl_context=httpx.create_ssl_context(trust_env=False),
        max_connections=None,
        max_keepalive_connections=max(20, concurrency),
        keepalive_expiry=20.0,
        network_backend=_GuardedNetwork(),
    )
    return transport


class _GuardedNetwork(httpcore.NetworkBackend):
    """Connects only to addresses that may be connected to, the very ones that were looked at."""

    def __init__(self) -> None:
        self._network = httpcore.SyncBackend()

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
                stream = self._network.connect_tcp(
                    address, port, _remaining(timeout), local_address, socket_options
                )
                return _BoundedStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        if _call.is_trusted:
            return [host]
        try:
            return allowed_addresses(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error

    def sleep(self, seconds: float) -> None:
        self._network.sleep(seconds)


class _BoundedStream(httpcore.NetworkStream):
    """Bounds all reads and writes of an attempt together; httpx bounds each by itself, and a
    destination that sends a byte now and then would never be cut off."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _remaining(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _remaining(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _BoundedStream(
            self._stream.start_tls(ssl_context, server_hostname, _remaining(timeout))
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _remaining(timeout: float | None) -> float:
    left: float = _call.deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the attempt's time is over")
    return left if timeout is None else min(timeout, left)


# --- who holds a claim -----------------------------------------------------------------------


def process_identity() -> str:
    """``host/namespace:pid:start``: this process and no other, on this machine and no other.

    With the pid namespace, so that two containers of one name do not think each other dead.
    """
    pid = os.getpid()
    return f"{_machine()}:{pid}:{_started_at(pid)}"[:128]


@cache
def _machine() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    return f"{socket.gethostname()[:60]}/{''.join(c for c in namespace if c.isdigit())}"


def _started_at(pid: int) -> str:
    """When a process began, as the kernel counts; empty when it does not live or cannot be told."""
    try:
        # The name before it may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie holds nothing any more.
    return "" if len(fields) < 20 or fields[0] == "Z" else fields[19]


def release_claims_of_the_dead(now: datetime | None = None) -> int:
    """Free what engines of this machine held whose process is no more: no need to wait for
    their leases. Only where ``/proc`` tells for sure."""
    if not _started_at(os.getpid()):
        return 0
    mine = Message.objects.filter(claimed_by__startswith=f"{_machine()}:")
    dead = [
        identity
        for identity in mine.unfinished().values_list("claimed_by", flat=True).distinct()
        if not _is_alive(identity)
    ]
    return Message.objects.filter(claimed_by__in=dead).release(now=now or timezone.now())


def _is_alive(identity: str) -> bool:
    _, pid, started_at = identity.rsplit(":", 2)
    return pid.isdecimal() and _started_at(int(pid)) == started_at
