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
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    close_old_connections,
    connections,
)
from django.utils import timezone

from ...qstash import Keys, sign
from ...qstash.message import HOSTED_LLM
from ...qstash.signing import HEADER as SIGNATURE
from .. import conf, doorbell, hosted_models, retention
from ..destinations import mapped
from ..models import Message, Outcome, Schedule, SigningKeys, ending
from ..models.claims import Adoption
from .http import KEPT_FOR, Http
from .identity import process_identity, release_claims_of_the_dead
from .threads import Threads

logger = logging.getLogger(__name__)

USER_AGENT = "Upstash-QStash"
MOST_AT_ONCE = 500
"""Messages that are claimed, and attempts whose ends are written down, in one transaction."""
MOST_BYTES = 32 * 1024 * 1024
"""Of bodies that are claimed, or written down, in one transaction: their callbacks hold them once
more."""
MOST_BYTES_IN_FLIGHT = 256 * 1024 * 1024
"""Of bodies that an engine holds at once: where they are large, that many fewer calls go on."""
LONGEST_TROUBLE = 5.0
"""Seconds between rounds while every round breaks."""


class Engine:
    """Delivers. ``deliver_due`` one message after the other in this thread, ``run`` and
    ``drain`` many at a time."""

    def __init__(
        self,
        *,
        transport: Any = None,
        concurrency: int | None = None,
        most_bytes: int = MOST_BYTES_IN_FLIGHT,
        clock: Callable[[], datetime] = timezone.now,
        say: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """``transport``: an httpx transport, instead of the settings'. ``most_bytes``: of bodies
        in flight; the last one may be over that. ``say`` is told of each
        attempt, from the thread that made it: message_id, url, status, error, retried, seconds."""
        settings = conf.current()
        self.clock = clock
        self.concurrency = concurrency or settings.concurrency
        self.most_bytes = most_bytes
        self.identity = process_identity()
        self._http = Http(transport or settings.make_transport())
        self._threads = Threads()
        self._say = say
        self._stop = threading.Event()
        self._next_time: dict[str, float] = {}
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
                keys = _keys_of(claimed)
                for message in claimed:
                    outcome = self._attempt(message, keys[message.account])
                    message.record(outcome, now=self.clock())
                    count += 1
        return count

    # --- many at a time ----------------------------------------------------------------------

    def run(self, stop: threading.Event | None = None, *, grace: float | None = None) -> None:
        """Deliver until ``stop`` is set, then let what is in flight finish for ``grace`` seconds.
        What is too old is purged meanwhile: nobody else may be there to do it.

        Call ``ring`` after setting ``stop``, or it is noticed at the next poll.
        """
        stop = stop or self._stop
        with self._alone, doorbell.listening(self._bell):
            self._outlive(release_claims_of_the_dead)
            while not stop.is_set():
                self._outlive(self._round)
                if self.is_time_for("purge", every=60):
                    self._outlive(self._purge)
                self._rest(stop)
            self._wind_down(grace)
        # This thread is the caller's; the connection was ours.
        connections.close_all()

    def drain(self, *, grace: float | None = None) -> float | None:
        """Deliver until nothing is due and nothing in flight, however long that takes, or until
        ``stop``. Answers the seconds until something is due again, None for never.

        For a Celery task: while it goes on, this process needs no other, and has no other.
        """
        with self._alone, doorbell.listening(self._bell):
            while not self._stop.is_set():
                self._outlive(self._round)
                if not self._in_flight and not self._troubles and not self._is_anything_to_do():
                    break
                self._rest(self._stop)
            self._wind_down(grace)
        # Once more: whoever came since the last look rang a bell that nobody heard.
        return 0.0 if self._is_anything_to_do() else self._seconds_until_next()

    def watch(self, every: float) -> None:
        """Look every so many seconds, until ``stop``, and ``drain`` what nobody rang for.

        For a thread of its own, beside tasks that drain when they are rung for.
        """
        while not self._stop.wait(every):
            if not self._alone.locked():
                self._outlive(self._drain_if_needed)
                # It may be long until the next look.
                connections.close_all()

    def _drain_if_needed(self) -> None:
        if self._is_anything_to_do():
            self.drain()

    def stop(self) -> None:
        """End ``run``, ``drain`` or ``watch``, from another thread."""
        self._stop.set()
        self._bell.set()

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def _has_suspect(self) -> bool:
        return any(message.is_suspect for message in self._in_flight.values())

    @property
    def is_full(self) -> bool:
        return len(self._in_flight) >= self.concurrency or self._bytes_left <= 0

    @property
    def _bytes_left(self) -> int:
        # A copy: a task that passes a bell on asks from another thread.
        return self.most_bytes - sum(len(each.body) for each in list(self._in_flight.values()))

    def ring(self) -> None:
        self._bell.set()

    def _round(self) -> None:
        self._renew_leases()
        self._write_down_what_ended()
        if self.is_time_for("schedules", every=1):
            # By itself: one that breaks is to keep nobody's message from being delivered.
            self._outlive(lambda: Schedule.objects.fire_due(now=self.clock()))
        self._may_have_more = False
        limit = min(self.concurrency - len(self._in_flight), MOST_AT_ONCE)
        most_bytes = min(self._bytes_left, MOST_BYTES)
        if limit > 0 and most_bytes > 0:
            claimed = Message.objects.claim(
                engine=self.identity,
                limit=limit,
                now=self.clock(),
                lease=conf.current().lease,
                takes_suspect=not self._has_suspect,
                most_bytes=most_bytes,
            )
            self._begin(claimed)
            size = sum(len(message.body) for message in claimed)
            self._may_have_more = len(claimed) == limit or size >= most_bytes

    def _purge(self) -> None:
        if retention.purge(self.clock()):
            # There is more than one go takes: on with it after the next round.
            self._next_time["purge"] = 0.0

    _may_have_more = False
    """Whether the last claim got all that it asked for."""

    def _begin(self, claimed: list[Message]) -> None:
        if not claimed:
            return
        keys = _keys_of(claimed)
        fresh = [message for message in claimed if not self._goes_on(message)]
        for message in fresh:
            self._in_flight[message.message_id] = message
        for number, message in enumerate(fresh):
            try:
                self._threads.begin(partial(self._call, message, keys[message.account]))
            except RuntimeError:
                # No more threads: with as many as there are it goes on, and others take the rest.
                self._let_go(fresh[number:])
                self.concurrency = max(1, len(self._in_flight))
                logger.warning("no more threads: %d calls at once from here on", self.concurrency)
                raise

    def _goes_on(self, message: Message) -> bool:
        """Whether this very attempt is under way here, though its lease ran out: then it is not
        made a second time, and ends under the new claim."""
        running = self._in_flight.get(message.message_id)
        if running is None or running.retried != message.retried:
            return False
        running.claim_token = message.claim_token
        return True

    def _forget(self, message: Message) -> None:
        if self._in_flight.get(message.message_id) is message:
            del self._in_flight[message.message_id]

    def _let_go(self, messages: Iterable[Message]) -> None:
        """They are due at once, for whoever comes."""
        tokens = {message.message_id: message.claim_token for message in messages}
        for message_id in tokens:
            self._in_flight.pop(message_id, None)
        mine = Message.objects.filter(claim_token__in=set(tokens.values()), message_id__in=tokens)
        self._outlive(lambda: mine.release(now=self.clock()))

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
        left = self._ended.qsize()
        while left > 0:
            group: list[tuple[Message, Outcome]] = []
            weight = 0
            # While it goes wrong, one by one: one alone may be what no database takes.
            most = MOST_AT_ONCE if self._unwritten < 3 else 1
            while left > 0 and len(group) < most and weight < MOST_BYTES:
                group.append(self._ended.get_nowait())
                weight += len(group[-1][0].body) + len(group[-1][1].body)
                left -= 1
            self._outlive(partial(self._write_down, group))

    _unwritten = 0
    """Times in a row that writing down broke."""

    def _write_down(self, group: list[tuple[Message, Outcome]]) -> None:
        # Should it break below, their leases end and they are tried again.
        for message, _ in group:
            self._forget(message)
        try:
            recorded = ending.record(group, now=self.clock(), adoption=self._adoption())
            self._unwritten = 0
        except (OperationalError, InterfaceError):
            # Answers that were paid for: keep them until the database is back.
            self._unwritten += 1
            for message, outcome in group:
                self._in_flight.setdefault(message.message_id, message)
                self._ended.put((message, outcome))
            raise
        except Exception:
            if len(group) == 1:
                raise
            # One of them cannot be written; the others can.
            for message, _ in group:
                self._in_flight.setdefault(message.message_id, message)
            for each in group:
                self._outlive(partial(self._write_down, [each]))
            return
        for message in recorded.lost:
            logger.warning("%s was taken over by another engine", message.message_id)
        self._begin(recorded.adopted)

    def _adoption(self) -> Adoption:
        """Callbacks are begun as they are written down, as far as there is room for them."""
        room = self.concurrency - len(self._in_flight)
        until = self.clock() + timedelta(seconds=conf.current().lease)
        return Adoption(self.identity, until, max(0, room), self._bytes_left)

    def _renew_leases(self) -> None:
        lease = conf.current().lease
        if self._in_flight and self.is_time_for("leases", every=lease / 4):
            # Until it is done: what it broke on may last as long as the lease.
            next_time, self._next_time["leases"] = self._next_time["leases"], 0.0
            tokens = {message.claim_token for message in self._in_flight.values()}
            Message.objects.renew(tokens, until=self.clock() + timedelta(seconds=lease))
            self._next_time["leases"] = next_time

    def is_time_for(self, what: str, *, every: float) -> bool:
        """Whether ``every`` seconds went by since this was asked and answered yes."""
        now = time.monotonic()
        if now < self._next_time.get(what, 0.0):
            return False
        self._next_time[what] = now + every
        return True

    def _rest(self, stop: threading.Event) -> None:
        """Wait for the bell, or for the next thing to do."""
        if self._may_have_more:
            return
        if self._troubles:
            # Not for the bell: what ends meanwhile rings it, and could not be written down either.
            stop.wait(min(LONGEST_TROUBLE, 0.05 * 2 ** min(self._troubles, 10)))
        else:
            self._bell.wait(self._pause())
        self._bell.clear()

    def _is_anything_to_do(self) -> bool:
        with suppress(DatabaseError, InterfaceError):
            now = self.clock()
            return Message.objects.is_anything_to_do(now) or Schedule.objects.due(now).exists()
        return True

    def _pause(self) -> float:
        """Seconds until there may be something to do although nobody rings."""
        longest = conf.current().poll
        with suppress(DatabaseError, InterfaceError):
            if not self.is_full:
                wait = self._seconds_until_next()
                if wait is not None:
                    # Not nothing: what is due and was not taken is another engine's at the moment.
                    return min(longest, max(0.02, wait))
        return longest

    def _seconds_until_next(self) -> float | None:
        now = self.clock()
        # While one suspect is in flight, the others are nothing to do.
        messages = Message.objects.trusted() if self._has_suspect else Message.objects.all()
        moments = (messages.next_moment(now), Schedule.objects.next_at())
        waits = [(moment - now).total_seconds() for moment in moments if moment is not None]
        return max(0.0, min(waits)) if waits else None

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
            self._troubles += 1
        else:
            self._troubles = 0
            self._now_and_then()

    _troubles = 0
    """Rounds in a row that broke."""

    def _now_and_then(self) -> None:
        # As the end of a request does: honours CONN_MAX_AGE, which 0 would make a reconnect per poll.
        if self.is_time_for("connections", every=60):
            close_old_connections()
        if self.is_time_for("tidying", every=KEPT_FOR):
            # Of many hosts that are called once each, every one keeps a file open until then.
            self._http.tidy()

    def _wind_down(self, grace: float | None) -> None:
        end = time.monotonic() + (conf.current().grace if grace is None else grace)
        while self._in_flight and time.monotonic() < end:
            self._outlive(self._renew_leases)
            self._write_down_what_ended()
            if self._in_flight:
                self._bell.wait(0.2)
                self._bell.clear()
        if self._in_flight:
            self._let_go(list(self._in_flight.values()))

    # --- one attempt -------------------------------------------------------------------------

    def _attempt(self, message: Message, keys: Keys) -> Outcome:
        if message.is_interrupted_for_good:
            outcome = Outcome(
                error=f"interrupted {message.interruptions} times: engines died over it"
            )
            self._tell(message, outcome, 0.0)
            return outcome
        began = time.monotonic()
        url, headers, body, is_trusted = self._addressed(message, keys)
        outcome = self._http.call(
            message.method, url, headers, body, timeout=message.timeout, is_trusted=is_trusted
        )
        self._tell(message, outcome, time.monotonic() - began)
        return outcome

    def _tell(self, message: Message, outcome: Outcome, seconds: float) -> None:
        if self._say is None:
            return
        try:
            self._say(
                {
                    "event": "attempt",
                    "message_id": message.message_id,
                    "url": message.url,
                    "status": outcome.status,
                    "error": outcome.error,
                    "retried": message.retried,
                    "seconds": seconds,
                }
            )
        except Exception:
            # A line of a log is not worth an answer that was paid for.
            logger.exception("telling of an attempt broke")

    def _addressed(self, message: Message, keys: Keys) -> tuple[str, dict[str, str], bytes, bool]:
        """What is called, with which headers and body, and whether the address is the operator's."""
        headers = {name: values[0] for name, values in message.header.items()}
        body, settings = bytes(message.body), conf.current()
        if message.url == HOSTED_LLM:
            # Not a receiver of ours but a provider: it gets its key and no signature.
            url, own, body = hosted_models.call(body)
            return url, headers | own, body, True
        now = self.clock().timestamp()
        signature = sign(body, url=message.url, key=keys.current, now=now)
        headers |= {
            "User-Agent": USER_AGENT,
            "Upstash-Message-Id": message.message_id,
            "Upstash-Retried": str(message.retried),
            SIGNATURE: signature,
            "Upstash-Region": settings.region,
        }
        told = {
            "Upstash-Caller-Ip": message.caller_ip,
            "Upstash-Topic-Name": message.topic_name,
            "Upstash-Schedule-Id": message.schedule_id,
        }
        headers |= {name: value for name, value in told.items() if value}
        place = mapped(message.url)
        return place or message.url, headers, body, place is not None


_kept: dict[tuple[int, conf.ServerSettings], Engine] = {}
_keeping = threading.Lock()


def kept_engine() -> Engine:
    """The engine of this process's Celery tasks: a new one costs 40 ms of TLS context."""
    with _keeping:
        engine = engine_if_kept()
        if engine is None or engine.is_stopped:
            _kept.clear()
            engine = _kept[_whose()] = Engine()
        return engine


def engine_if_kept() -> Engine | None:
    return _kept.get(_whose())


def _whose() -> tuple[int, conf.ServerSettings]:
    # By process, since connections must not cross a fork.
    return os.getpid(), conf.current()


def _keys_of(messages: Iterable[Message]) -> dict[str, Keys]:
    return SigningKeys.objects.of_accounts({message.account for message in messages})
