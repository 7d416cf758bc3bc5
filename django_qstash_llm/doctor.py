"""The doctor: is everything set up so that an answer comes back? One finding for each question.

Most of it is asked of the settings, of QStash and of our own rows. The last question is a signed
ping, sent through QStash to this very site and awaited, since only that goes the way of a callback.
It is one message, without retries; nothing of it stays, neither here nor at QStash.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import json
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any
from urllib.parse import urljoin, urlsplit

from django.core import checks
from django.core.checks.registry import registry
from django.db import DatabaseError, InterfaceError
from django.utils import timezone

from .conf import AppSettings, app_settings, callback_base_url_problem, new_client, qstash_client
from .exceptions import ConfigurationError
from .health import Pulse
from .models import Budget, CallbackResponse
from .models.budget import Action
from .models.callback import Kind
from .pricing import worst_cost
from .qstash import (
    Accepted,
    AuthenticationError,
    Client,
    Keys,
    LogEntry,
    Message,
    Options,
    QStashError,
    ResponseError,
)
from .qstash.signing import LIFETIME, is_usable_key, url_differences

APP = "django_qstash_llm"
REGIONS = {
    "EU": ("https://qstash.upstash.io", "https://qstash-eu-central-1.upstash.io"),
    "US": ("https://qstash-us-east-1.upstash.io",),
}
"""Upstash's hosts, which share nothing: no token, no key, no message."""
CLOUD = ".upstash.io"
POLL_SECONDS = 0.5
INQUIRE_EVERY = 4
"""Looks at the row between two questions to QStash."""
NOTABLE_SECONDS = 5.0
"""Of difference between two clocks. Below it, it is the way that takes them."""
_PRIVATE_NAMES = (".local", ".internal", ".localhost", ".lan", ".home.arpa", ".test", ".invalid")
_LOGIN_WORDS = ("login", "signin", "sign-in", "sign_in", "auth", "sso")
_CIRCUIT_REMEDY = (
    "It is tried again by itself; once the reason is mended, closing the circuit in the admin does "
    "it at once."
)
MOST_NAMED = 5
_QUESTION = [{"role": "user", "content": "?"}]
_REDIRECTS = {301, 302, 303, 307, 308}


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """The answer to one question, and what to do about it."""

    check: str
    level: Level
    sentence: str
    remedy: str = ""


def _ok(check: str, sentence: str) -> Finding:
    return Finding(check, Level.OK, sentence)


def _warning(check: str, sentence: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, sentence, remedy)


def _problem(check: str, sentence: str, remedy: str) -> Finding:
    return Finding(check, Level.PROBLEM, sentence, remedy)


def _skipped(check: str, sentence: str) -> Finding:
    return Finding(check, Level.SKIPPED, sentence)


@dataclass
class Doctor:
    """Examines this site. ``wait``: seconds that the ping is awaited for; ``None`` sends none."""

    using: str = "default"
    wait: float | None = 30.0
    clock: Callable[[], datetime] = timezone.now
    sleep: Callable[[float], None] = time.sleep

    has_token: bool = False
    """Whether QStash has been found to answer us."""

    def examine(self) -> Iterator[Finding]:
        """Every finding as it is made. None of them holds a key or token."""
        for finding in self._findings():
            yield replace(
                finding,
                sentence=_without_secrets(finding.sentence),
                remedy=_without_secrets(finding.remedy),
            )

    def _findings(self) -> Iterator[Finding]:
        yield from self.settings()
        try:
            self.conf.check_types()
            self.conf.check_ready()
        except ConfigurationError as error:
            yield _skipped("qstash", f"Not asked while the settings are wrong: {error}")
        else:
            yield from self.qstash()
            yield from self.base_url()
            yield from self.ping()
        yield from self.work()
        yield from self.money()

    @cached_property
    def conf(self) -> AppSettings:
        return app_settings()

    @cached_property
    def client(self) -> Client:
        return qstash_client()

    @property
    def is_cloud(self) -> bool:
        return (urlsplit(self.conf.qstash_url).hostname or "").endswith(CLOUD)

    # --- the settings ---

    def settings(self) -> Iterator[Finding]:
        """What our system checks say."""
        # Not everybody's: one of another app that breaks is not to end the examination.
        ours = [check for check in registry.get_checks() if check.__module__ == f"{APP}.checks"]
        messages = [
            message for check in ours for message in check(app_configs=None, databases=None)
        ]
        for message in messages:
            level = Level.PROBLEM if message.level >= checks.ERROR else Level.WARNING
            sentence = f"{message.msg} ({message.id})"
            yield Finding("settings", level, sentence, message.hint or "")
        if not messages:
            yield _ok("settings", "The system checks have nothing to say.")

    # --- QStash ---

    def qstash(self) -> Iterator[Finding]:
        """Whether it answers, takes our token, signs with the keys we know, and what time it has."""
        try:
            keys = self.client.keys()
        except AuthenticationError as error:
            yield _ok("qstash", f"{_shown(self.conf.qstash_url)} answers.")
            yield self._refused_token(error)
            return
        except (QStashError, ConfigurationError) as error:
            yield self._unreachable(error)
            return
        self.has_token = True
        yield _ok("qstash", f"{_shown(self.conf.qstash_url)} answers.")
        yield _ok("token", "QStash accepts QSTASH_TOKEN.")
        yield compare_keys(self.conf.signing_keys, keys)
        yield self._clock()

    def _unreachable(self, error: Exception) -> Finding:
        url = _shown(self.conf.qstash_url)
        if isinstance(error, ResponseError) and error.status < 500:
            return _problem(
                "qstash",
                f"{url} answers {error.status} when asked for its signing keys.",
                f"Is that QStash? QSTASH_URL is the address without a path, as in {REGIONS['EU'][0]}.",
            )
        if isinstance(error, ResponseError):
            return _problem("qstash", f"{url} answers {error.status}.", "Try again in a while.")
        return _problem(
            "qstash",
            f"{url} cannot be asked: {error}.",
            "Check QSTASH_URL, and whether this machine may connect to it (proxy, firewall, DNS).",
        )

    def _refused_token(self, error: AuthenticationError) -> Finding:
        here, elsewhere = self._region(), self._region_that_takes_the_token()
        if elsewhere:
            name, url = elsewhere
            return _problem(
                "token",
                f"QSTASH_TOKEN is of the region {name}, and QSTASH_URL is of {here}.",
                f"Set QSTASH_URL to {url}, or copy token and signing keys of {here}: "
                "the regions share nothing.",
            )
        return _problem(
            "token",
            f"QStash refuses QSTASH_TOKEN with {error.status}.",
            f"Copy the token of the account at {_shown(self.conf.qstash_url)} again; it may have been reset.",
        )

    def _region(self) -> str:
        url = self.conf.qstash_url.rstrip("/")
        return next((name for name, urls in REGIONS.items() if url in urls), "")

    def _region_that_takes_the_token(self) -> tuple[str, str] | None:
        here = self._region()
        # The token is for Upstash's own hosts only.
        for name, urls in REGIONS.items() if here else ():
            if name != here:
                with suppress(QStashError):
                    new_client(urls[0]).keys()
                    return name, urls[0]
        return None

    def _clock(self) -> Finding:
        theirs = self.client.server_time
        if theirs is None:
            return _skipped("clock", "QStash's answer has no Date to compare this clock with.")
        # Theirs is cut to whole seconds.
        return compare_clocks(self.clock().timestamp() - (theirs + 0.5), self.conf.signature_leeway)

    # --- where callbacks go ---

    def base_url(self) -> Iterator[Finding]:
        url = self.conf.callback_base_url
        if callback_base_url_problem(url):
            return  # told by the settings
        shown, parts = _shown(url), urlsplit(url)
        if "@" in parts.netloc:
            yield _problem(
                "callback url",
                "CALLBACK_BASE_URL has a name or password in it, and QStash takes no such address.",
                "Leave them out; what asks for them has to let <base>/callback/ and <base>/ping/ pass.",
            )
        elif self.is_cloud and _is_private(parts.hostname or ""):
            yield _problem(
                "callback url",
                f"CALLBACK_BASE_URL is {shown}, which Upstash cannot reach from outside.",
                "Give the site's public address; in development a tunnel's, or use the built-in "
                "server (`manage.py qstash_server`).",
            )
        elif self.is_cloud and parts.scheme != "https":
            yield _warning(
                "callback url",
                f"CALLBACK_BASE_URL is {shown}: answers travel readable for anyone on the way.",
                "Use https.",
            )
        else:
            yield _ok("callback url", f"Callbacks are to come to {shown}.")

    # --- the ping ---

    def ping(self) -> Iterator[Finding]:
        if self.wait is None:
            yield _skipped("ping", "Not sent, as asked.")
        elif not self.has_token:
            yield _skipped("ping", "Not sent: QStash does not take it.")
        elif callback_base_url_problem(self.conf.callback_base_url):
            yield _skipped("ping", "Not sent: there is no address to send it to.")
        else:
            try:
                with Ping(self) as ping:
                    yield from ping.examine(self.wait)
            except (DatabaseError, InterfaceError) as error:
                yield _problem(
                    "ping",
                    f"It could not be written down: {type(error).__name__}.",
                    "Is the database there, and migrated? See `manage.py migrate --check`.",
                )

    # --- worker and beat ---

    def work(self) -> Iterator[Finding]:
        """Whether what is due is done, by our own rows."""
        try:
            self.conf.check_types()
        except ConfigurationError as error:
            yield _skipped("work", f"Not asked while the settings are wrong: {error}")
            return
        try:
            pulse = Pulse.read(self.using, self.clock())
        except (DatabaseError, InterfaceError, ConfigurationError) as error:
            yield _problem(
                "work",
                f"The requests cannot be read: {type(error).__name__}.",
                "Is the database there, and migrated? See `manage.py migrate --check`.",
            )
            return
        remedy = (
            "Start a worker (`celery -A proj worker`) and beat with django_qstash_llm.sweep; "
            "`manage.py llm_sweep` does it once, without Celery."
        )
        for problem in pulse.problems:
            is_the_circuit = problem == pulse.circuit_problem
            yield _problem("work", problem, _CIRCUIT_REMEDY if is_the_circuit else remedy)
        if pulse.notice:
            yield _warning("work", pulse.notice, _CIRCUIT_REMEDY)
        if pulse.is_ok and not pulse.notice:
            yield _ok("work", _how_it_goes(pulse))

    def money(self) -> Iterator[Finding]:
        """Whether budgets can hold what is asked by default. Nothing, where there is none that refuses."""
        try:
            self.conf.check_types()
            budgets = Budget.objects.using(self.using)
            named = list(
                budgets.filter(is_active=True, action=Action.REFUSE)
                .order_by("pk")
                .values_list("name", flat=True)[:MOST_NAMED]
            )
            if not named:
                return
            provider, model = self.conf.default_provider, self.conf.default_model
            most = worst_cost(provider, model, _QUESTION, {}, at=self.clock())
        except (DatabaseError, InterfaceError, ConfigurationError):
            return  # which is said elsewhere
        names = ", ".join(f"“{name}”" for name in named)
        if self.conf.budgets_allow_unpriced:
            yield _warning(
                "money",
                f"BUDGETS_ALLOW_UNPRICED is on: {names} let pass whatever has no price, and count it as "
                "nothing.",
                "Give prices with `manage.py llm_prices`, and set it to False.",
            )
        elif most is None:
            yield _warning(
                "money",
                f"No price is known for {provider}/{model}, which is asked by default: where {names} "
                "hold, it is refused.",
                "Give one with `manage.py llm_prices`, or allow such with BUDGETS_ALLOW_UNPRICED.",
            )
        else:
            yield _ok("money", f"{names} can hold what is asked by default.")


class Ping:
    """One message that QStash brings to us as it would a callback, and what became of it."""

    def __init__(self, doctor: Doctor) -> None:
        self.doctor = doctor
        self.conf, self.client = doctor.conf, doctor.client
        self.nonce = uuids.uuid4()
        self.url = self.conf.ping_url(self.nonce)
        self.message_id = ""

    def __enter__(self) -> Ping:
        self.row = CallbackResponse.objects.create(
            kind=Kind.PING,
            uuid=self.nonce,
            source_message_id=f"ping:{self.nonce}",
            # The views' clock decides how long it is awaited, not the doctor's.
            received_at=timezone.now(),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        has_arrived = CallbackResponse.objects.filter(pk=self.row.pk).exclude(applied_at=None)
        is_over = has_arrived.exists()
        CallbackResponse.objects.filter(pk=self.row.pk).delete()
        if self.message_id and not is_over:
            self._clear_away()

    def _clear_away(self) -> None:
        """Neither to come later, nor to lie among the dead letters."""
        with suppress(QStashError):
            self.client.cancel_message(self.message_id)
        with suppress(QStashError):
            for letter in self.client.dead_letters(message_id=self.message_id).items:
                if letter.message_id == self.message_id and letter.dlq_id:
                    self.client.delete_dead_letter(letter.dlq_id)

    def examine(self, wait: float) -> Iterator[Finding]:
        try:
            answer = self.client.publish(self._message())
        except QStashError as error:
            yield self._not_sent(error)
            return
        if not isinstance(answer, Accepted):
            yield self._not_sent(QStashError(str(answer)))
            return
        self.message_id = answer.message_id
        waited = self._await(wait)
        if self.row.applied_at is not None:
            yield from self._arrived(waited)
        elif self.row.problem:
            yield self._refused()
        else:
            yield self._never_came(wait)

    def _message(self) -> Message:
        return Message(
            destination=self.url,
            body=json.dumps({"ping": str(self.nonce)}).encode(),
            options=Options(content_type="application/json", retries=0),
            deduplication_id=f"ping-{self.nonce}",
        )

    def _await(self, wait: float) -> float:
        """Until the row says what became of it, or QStash that it gave up. Answers the seconds."""
        began = self.doctor.clock()
        until = began + timedelta(seconds=wait)
        for look in itertools.count():
            self.row.refresh_from_db()
            now = self.doctor.clock()
            is_over = bool(self.row.applied_at or self.row.problem) or now >= until
            if is_over or (look % INQUIRE_EVERY == 0 and self._is_given_up()):
                # Once more: it may have come while QStash was asked.
                self.row.refresh_from_db()
                break
            self.doctor.sleep(POLL_SECONDS)
        return (now - began).total_seconds()

    def _is_given_up(self) -> bool:
        last = self._last_entry()
        return last is not None and last.state in {"FAILED", "DELIVERED", "CANCELED"}

    def _last_entry(self) -> LogEntry | None:
        """The newest that says how it went."""
        try:
            entries: Sequence[LogEntry] = self.client.logs(
                message_id=self.message_id, count=20
            ).items
        except QStashError:
            return None
        ours = [each for each in entries if each.message_id == self.message_id]
        telling = [each for each in ours if each.response_status is not None or each.error]
        return next(iter([*telling, *ours]), None)

    # --- how it ended ---

    def _not_sent(self, error: QStashError) -> Finding:
        return _problem(
            "ping",
            f"QStash does not take it: {error}.",
            "Look at CALLBACK_BASE_URL if it speaks of a destination, and at the account's plan and "
            "token (read-only?) otherwise.",
        )

    def _arrived(self, waited: float) -> Iterator[Finding]:
        yield _ok("ping", f"Sent through QStash, believed and written down after {waited:.1f} s.")
        if self.row.verified_by_next_key:
            yield _warning(
                "ping",
                "It was signed with the next signing key: the keys were rotated.",
                "Copy both signing keys from QStash and restart, or the next rotation locks it out.",
            )
        issued_at = _issued_at(self.row)
        if issued_at is not None and self.row.applied_at is not None:
            ahead = self.row.applied_at.timestamp() - issued_at
            if abs(ahead) > max(NOTABLE_SECONDS, waited + 1):
                leeway = self.conf.signature_leeway
                yield compare_clocks(ahead, leeway, whose="The clock of the site")

    def _refused(self) -> Finding:
        reason, _, detail = self.row.problem.partition(": ")
        sentence = f"It came, and this site refused its signature ({reason}): {detail}."
        return _problem("ping", sentence, _REMEDIES.get(reason, _REMEDIES["malformed"]))

    def _never_came(self, wait: float) -> Finding:
        entry = self._last_entry()
        if entry is None or (entry.response_status is None and not entry.error):
            state = f" (its state is {entry.state})" if entry else ""
            return _problem(
                "ping",
                f"QStash took it, and has not delivered it within {wait:.0f} s{state}.",
                "Wait longer with --wait. With the built-in server: is its engine or worker running?",
            )
        if entry.response_status is None or entry.response_status < 100:
            return _problem(
                "ping",
                f"QStash could not reach {self._place}: {entry.error[:200] or 'no response'}.",
                "Is the site up and reachable from outside under CALLBACK_BASE_URL "
                "(name, port, certificate, firewall)?",
            )
        return self._answered(entry, entry.response_status)

    def _answered(self, entry: LogEntry, status: int) -> Finding:
        got = f"QStash got {status} from {self._place}"
        if status in _REDIRECTS:
            return self._redirected(entry, got)
        if 200 <= status < 300:
            return _problem(
                "ping",
                f"{got}, and it is not written down in this database.",
                "Somebody else answers there (another site, a login or maintenance page), or that "
                "site has another database than this command.",
            )
        body = entry.response_body[:4096].lower()
        if b"invalid signature" in body or b"no such ping" in body:
            return _problem(
                "ping",
                f"{got}: the callback view refused it, and knows nothing of this ping.",
                "That site has another database than this command: give both the same settings.",
            )
        if b"csrf" in body:
            return _problem(
                "ping",
                f"{got}: a CSRF protection refused it.",
                "Something before our views demands a CSRF token; let <base>/callback/ and "
                "<base>/ping/ pass.",
            )
        return _problem("ping", f"{got}.", _ANSWERS.get(status) or _ANSWERS[status // 100])

    def _redirected(self, entry: LogEntry, got: str) -> Finding:
        location = next(
            (
                values[0]
                for name, values in entry.response_header.items()
                if name.lower() == "location" and values
            ),
            "",
        )
        target = urljoin(self.url, location)
        moved = url_differences(target, self.url) if location else []
        # A query that was added says where to come back to, at length.
        moved = [each for each in moved if each.part not in {"query", "fragment"}]
        told = "; ".join(f"{part}: {there}, not {here}" for part, there, here in moved)
        path = urlsplit(location).path.lower() if location else ""
        if any(word in path for word in _LOGIN_WORDS):
            return _problem(
                "ping",
                f"{got}: it is sent to a login page ({told}).",
                "Let <base>/callback/ and <base>/ping/ pass without a login.",
            )
        return _problem(
            "ping",
            f"{got}, a redirect{f' ({told})' if told else ''}; QStash follows none.",
            "Set CALLBACK_BASE_URL to the address that is redirected to, or stop redirecting "
            "(SECURE_SSL_REDIRECT needs SECURE_PROXY_SSL_HEADER behind a proxy).",
        )

    @property
    def _place(self) -> str:
        return _shown(self.url)


_REMEDIES = {
    "subject": "The site's CALLBACK_BASE_URL is not this command's, or something between QStash and "
    "the site rewrites addresses: make it the same in both, restart the site.",
    "key": "The site was started with other signing keys than QStash signs with: copy both from "
    "QStash, restart the site.",
    "no_key": "Set QSTASH_CURRENT_SIGNING_KEY and QSTASH_NEXT_SIGNING_KEY for the site, restart it.",
    "expired": "The site's clock is fast, or something kept the ping for minutes: set up NTP there.",
    "early": "The site's clock is slow: set up NTP there.",
    "body": "Something between QStash and the site alters bodies (a proxy, a WAF, a middleware that "
    "reads them): let <base>/callback/ pass unchanged.",
    "missing": "Something between QStash and the site drops the header Upstash-Signature.",
    "malformed": "Something between QStash and the site alters the header Upstash-Signature.",
}
_ANSWERS = {
    401: "Something before our views asks for credentials: let <base>/callback/ and <base>/ping/ pass.",
    403: "A login, firewall (WAF) or proxy refused it: let <base>/callback/ and <base>/ping/ pass.",
    404: "Nothing of ours is at that path: include django_qstash_llm.urls where CALLBACK_BASE_URL "
    "points to, and deploy this version there.",
    405: "Something else is at that path: point CALLBACK_BASE_URL to where django_qstash_llm.urls is.",
    421: "The site does not know itself by that host name.",
    400: "Does the site know itself by that host name? See ALLOWED_HOSTS and the log of the site.",
    4: "See the log of the site and of what stands before it.",
    5: "See the log of the site: it was up, and broke.",
    3: "Point CALLBACK_BASE_URL to the site itself.",
    1: "See the log of what stands before the site.",
}


def compare_keys(ours: Sequence[str], theirs: Keys) -> Finding:
    """Whether what QStash signs with now, and after a rotation, will be believed."""
    current, following = theirs.current, theirs.next
    known = [key for key in ours if is_usable_key(key)]
    copy = "Copy QSTASH_CURRENT_SIGNING_KEY and QSTASH_NEXT_SIGNING_KEY from QStash, restart."
    told = f"QStash signs with {fingerprint(current)}, known here are {_fingerprints(ours)}"
    if list(ours) == [current, following]:
        return _ok("keys", "Both signing keys are QStash's.")
    if list(ours) == [following, current]:
        return _warning(
            "keys", "The signing keys are swapped: current is next and next is current.", copy
        )
    if current in known and current == ours[-1]:
        return _warning(
            "keys",
            "QStash's signing keys were rotated: it signs with what is the next key here.",
            f"{copy} The next rotation would lock it out.",
        )
    if current in known:
        return _warning(
            "keys",
            "QSTASH_NEXT_SIGNING_KEY is not QStash's next key: a rotation would lock it out.",
            copy,
        )
    if following in known:
        return _problem(
            "keys",
            f"QSTASH_CURRENT_SIGNING_KEY is not QStash's: {told}. Callbacks are refused.",
            copy,
        )
    return _problem(
        "keys",
        f"The signing keys are of another account or region: {told}. Callbacks are refused.",
        copy,
    )


def compare_clocks(ahead: float, leeway: float, *, whose: str = "This clock") -> Finding:
    """``ahead``: seconds that our clock is before QStash's. Signatures are good from ``leeway``
    before they were made until ``leeway`` after their lifetime."""
    seconds, way = abs(ahead), "fast" if ahead > 0 else "slow"
    sentence = f"{whose} is {seconds:.0f} s {way}, compared with QStash's"
    remedy = "Set it by NTP (chrony, systemd-timesyncd)."
    if ahead < -leeway or ahead > LIFETIME + leeway:
        return _problem("clock", f"{sentence}: signatures are refused.", remedy)
    if seconds > NOTABLE_SECONDS:
        return _warning("clock", f"{sentence}.", remedy)
    return _ok("clock", f"{whose} and QStash's agree.")


def fingerprint(key: str) -> str:
    """Enough of a key to tell it from others, and no more."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:6]


def _fingerprints(keys: Sequence[str]) -> str:
    return " and ".join(fingerprint(key) if is_usable_key(key) else "none" for key in keys)


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".").lower()
        return "." not in name or name.endswith(_PRIVATE_NAMES)
    return not address.is_global


def _shown(url: str) -> str:
    """Without name and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _issued_at(row: CallbackResponse) -> float | None:
    header: dict[str, Any] = row.header if isinstance(row.header, dict) else {}
    try:
        return float(header["issued-at"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _how_it_goes(pulse: Pulse) -> str:
    ages = [age for age in (pulse.oldest_due, pulse.oldest_unannounced) if age is not None]
    if not ages:
        return "Nothing waits for a worker."
    return f"What waits for a worker has waited {max(ages):.0f} s at most."


def _without_secrets(text: str) -> str:
    try:
        return app_settings().without_secrets(text)
    except ConfigurationError:
        return text  # there was no reading them
