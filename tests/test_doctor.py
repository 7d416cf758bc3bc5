"""The doctor, against our own server over the suite's wire: the ping really goes all the way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from email.utils import formatdate
from io import StringIO
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.core.checks import Tags, run_checks
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection
from django.test import override_settings
from django.utils import timezone

from django_qstash_llm.conf import OUR_NAMES
from django_qstash_llm.doctor import (
    Doctor,
    Finding,
    Level,
    compare_clocks,
    compare_keys,
    fingerprint,
)
from django_qstash_llm.models import CallbackResponse, Circuit, LLMRequest
from django_qstash_llm.models.callback import Kind
from django_qstash_llm.models.circuit import QSTASH
from django_qstash_llm.qstash import Keys, sign
from django_qstash_llm.server.models import DeadLetter, Message

from .wire import Wire

# What the server delivers it delivers after a commit.
pytestmark = pytest.mark.django_db(transaction=True)
without_delivery = pytest.mark.django_db

CURRENT, NEXT = settings.QSTASH_CURRENT_SIGNING_KEY, settings.QSTASH_NEXT_SIGNING_KEY
FOREIGN = ("sig_foreign_current_key_canary_01", "sig_foreign_next_key_canary_00002")
TOKEN = settings.QSTASH_TOKEN
PROVIDER_KEY = settings.QSTASH_LLM["PROVIDERS"]["openai"]["API_KEY"]
HEALTH_TOKEN = "health-token-canary-0000001"
PASSWORD = "password-canary"
SECRETS = (TOKEN, CURRENT, NEXT, *FOREIGN, PROVIDER_KEY, HEALTH_TOKEN, PASSWORD)
UPSTASH = "https://qstash.upstash.io"
UPSTASH_US = "https://qstash-us-east-1.upstash.io"
ON_THE_WAY = "/llm/ping/"

Change = Callable[[httpx.Request], httpx.Response]


class Clock:
    """Goes on while somebody sleeps, and only then; ahead of the site's by as much as it was told."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = timedelta(seconds=ahead)

    def __call__(self) -> datetime:
        return timezone.now() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)


def ours(**changed: Any) -> Any:
    return override_settings(QSTASH_LLM={**settings.QSTASH_LLM, **changed})


def examine(*, ahead: float = 0.0, **options: Any) -> list[Finding]:
    clock = Clock(ahead)
    findings = list(Doctor(clock=clock, sleep=clock.sleep, **options).examine())
    told = repr(findings)
    assert [secret for secret in SECRETS if secret in told] == []
    # Neither here nor at QStash.
    assert not CallbackResponse.objects.exists()
    assert not DeadLetter.objects.exists()
    return findings


def found(check: str, **options: Any) -> Finding:
    """The one finding of this check."""
    findings = [each for each in examine(**options) if each.check == check]
    assert len(findings) == 1, findings
    return findings[0]


def levels(findings: list[Finding]) -> dict[str, str]:
    return {each.check: each.level.value for each in findings}


@pytest.fixture(autouse=True)
def health_token() -> Iterator[None]:
    with ours(HEALTH_TOKEN=HEALTH_TOKEN):
        yield


@pytest.fixture
def on_the_way(wire: Wire) -> Callable[[Change], None]:
    """What happens to the ping between QStash and the site."""

    def put(change: Change) -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            is_ping = request.url.path.startswith(ON_THE_WAY)
            return change(request) if is_ping else wire.site.handle_request(request)

        wire.hosts["testserver"] = answer

    return put


def answered(status: int, body: str = "", **headers: str) -> Change:
    return lambda request: httpx.Response(status, headers=headers, text=body)


def elsewhere(wire: Wire, **site: Any) -> Change:
    """The site runs with other settings than the command."""

    def answer(request: httpx.Request) -> httpx.Response:
        with override_settings(**site):
            return wire.site.handle_request(request)

    return answer


def altered(wire: Wire, content: bytes | None = None, **headers: str | None) -> Change:
    def answer(request: httpx.Request) -> httpx.Response:
        sent = {k: v for k, v in request.headers.items() if k not in {"content-length", *headers}}
        sent |= {name: value for name, value in headers.items() if value is not None}
        body = request.content if content is None else content
        return wire.site.handle_request(
            httpx.Request(request.method, request.url, headers=sent, content=body)
        )

    return answer


# --- a healthy site --------------------------------------------------------------------------------


@override_settings(DEBUG=True)  # or the checks speak of the suite's broker
def test_a_site_that_is_well_has_no_problem(wire: Wire) -> None:
    findings = examine()
    assert levels(findings) == {
        "settings": "ok",
        "qstash": "ok",
        "token": "ok",
        "keys": "ok",
        "clock": "skipped",
        "callback url": "ok",
        "ping": "ok",
        "work": "ok",
    }
    pings = [r for r in wire.to("testserver") if r.url.path.startswith(ON_THE_WAY)]
    assert [request.method for request in pings] == ["POST"]
    assert Message.objects.count() == 1
    assert found("work").sentence == "Nothing waits for a worker."


def test_without_a_ping_nothing_is_sent(wire: Wire) -> None:
    assert found("ping", wait=None) == Finding("ping", Level.SKIPPED, "Not sent, as asked.")
    assert not Message.objects.exists()
    assert {request.method for request in wire.requests} == {"GET"}


@override_settings(DEBUG=True, USE_TZ=False, TIME_ZONE="America/New_York")
def test_a_site_in_local_time_is_examined_as_well() -> None:
    assert [each for each in examine() if each.level not in {Level.OK, Level.SKIPPED}] == []


# --- settings, QStash, token -------------------------------------------------------------------------


def test_what_the_checks_say_is_told_with_its_remedy() -> None:
    with ours(DEFAULT_PROVIDER="nobody"):
        findings = examine(wait=None)
    finding = next(each for each in findings if "E004" in each.sentence)
    assert (finding.check, finding.level) == ("settings", Level.PROBLEM)
    assert "DEFAULT_PROVIDER is 'nobody'" in finding.sentence
    assert finding.remedy


@without_delivery
@pytest.mark.parametrize(
    "wrong",
    [
        {"QSTASH_TOKEN": ""},
        {"QSTASH_CURRENT_SIGNING_KEY": "", "QSTASH_NEXT_SIGNING_KEY": ""},
        {"QSTASH_LLM": {"CALLBACK_BASE_URL": ""}},
        {"QSTASH_LLM": {"CALLBACK_BASE_URI": "https://example.com"}},
        {"QSTASH_URL": "qstash.upstash.io"},
    ],
    ids=repr,
)
def test_while_the_settings_are_wrong_qstash_is_not_asked(
    wire: Wire, wrong: dict[str, Any]
) -> None:
    with override_settings(**wrong):
        findings = examine()
    assert {"settings", "qstash"} <= set(levels(findings))
    assert levels(findings)["qstash"] == "skipped"
    assert any(each.check == "settings" and each.level != Level.OK for each in findings)
    assert wire.requests == []


@without_delivery
@override_settings(QSTASH_URL="https://nobody.test")
def test_a_qstash_that_does_not_answer_is_told() -> None:
    findings = examine()
    assert levels(findings)["qstash"] == "problem"
    assert levels(findings)["ping"] == "skipped"
    qstash = next(each for each in findings if each.check == "qstash")
    assert "https://nobody.test cannot be asked" in qstash.sentence
    assert "QSTASH_URL" in qstash.remedy


@override_settings(QSTASH_URL="http://testserver/somewhere")
def test_an_address_that_is_no_qstash_is_told() -> None:
    finding = found("qstash")
    assert finding.level == Level.PROBLEM
    assert "http://testserver/somewhere answers 404" in finding.sentence


@without_delivery
def test_a_page_that_is_no_qstash_is_told(wire: Wire) -> None:
    wire.hosts["testserver"] = answered(200, "<html>Welcome</html>")
    finding = found("qstash")
    assert finding.level == Level.PROBLEM
    assert "cannot be read" in finding.sentence


@without_delivery
def test_a_qstash_that_is_broken_is_told(wire: Wire) -> None:
    wire.hosts["testserver"] = answered(500, "oops")
    assert found("qstash") == Finding(
        "qstash", Level.PROBLEM, "http://testserver/qstash answers 500.", "Try again in a while."
    )


@override_settings(QSTASH_TOKEN="another-token-canary")
def test_a_wrong_token_is_told() -> None:
    findings = examine()
    token = next(each for each in findings if each.check == "token")
    assert (token.level, token.sentence) == (
        Level.PROBLEM,
        "QStash refuses QSTASH_TOKEN with 401.",
    )
    assert "another-token-canary" not in repr(findings)
    assert levels(findings)["ping"] == "skipped"


REFUSED = answered(401, '{"error":"unable to authenticate: invalid token"}')
TAKEN = answered(200, json.dumps({"current": CURRENT, "next": NEXT}))


@without_delivery
@pytest.mark.parametrize(
    ("here", "there", "name", "other"),
    [(UPSTASH, UPSTASH_US, "US", "EU"), (UPSTASH_US, UPSTASH, "EU", "US")],
)
def test_a_token_of_the_other_region_is_told(
    wire: Wire, here: str, there: str, name: str, other: str
) -> None:
    wire.hosts[httpx.URL(here).host] = REFUSED
    wire.hosts[httpx.URL(there).host] = TAKEN
    with override_settings(QSTASH_URL=here):
        finding = found("token")
    assert (
        finding.sentence == f"QSTASH_TOKEN is of the region {name}, and QSTASH_URL is of {other}."
    )
    assert there in finding.remedy


@without_delivery
def test_a_token_of_neither_region_is_wrong(wire: Wire) -> None:
    wire.hosts["qstash.upstash.io"] = wire.hosts["qstash-us-east-1.upstash.io"] = REFUSED
    with override_settings(QSTASH_URL=UPSTASH):
        assert found("token").sentence == "QStash refuses QSTASH_TOKEN with 401."


@override_settings(QSTASH_TOKEN="another-token-canary")
def test_the_token_of_another_server_is_not_shown_to_upstash(wire: Wire) -> None:
    wire.hosts["qstash.upstash.io"] = wire.hosts["qstash-us-east-1.upstash.io"] = TAKEN
    found("token")
    assert {request.url.host for request in wire.requests} == {"testserver"}


# --- keys and clock ------------------------------------------------------------------------------


@without_delivery
@pytest.mark.parametrize(
    ("keys", "level", "words"),
    [
        ((CURRENT, NEXT), Level.OK, "Both signing keys are QStash's."),
        ((NEXT, CURRENT), Level.WARNING, "swapped"),
        ((FOREIGN[0], CURRENT), Level.WARNING, "rotated"),
        ((CURRENT, FOREIGN[1]), Level.WARNING, "NEXT_SIGNING_KEY is not QStash's next key"),
        ((CURRENT, ""), Level.WARNING, "NEXT_SIGNING_KEY is not QStash's next key"),
        ((FOREIGN[0], NEXT), Level.PROBLEM, "CURRENT_SIGNING_KEY is not QStash's"),
        (FOREIGN, Level.PROBLEM, "of another account or region"),
    ],
)
def test_the_keys_are_compared_with_qstashs(
    keys: tuple[str, str], level: Level, words: str
) -> None:
    finding = compare_keys(keys, Keys(CURRENT, NEXT))
    assert finding.level == level
    assert words in finding.sentence
    assert [secret for secret in SECRETS if secret in repr(finding)] == []
    if level == Level.PROBLEM:
        assert fingerprint(CURRENT) in finding.sentence
        assert fingerprint(keys[0]) in finding.sentence
    assert len(fingerprint(CURRENT)) == 6


@override_settings(QSTASH_CURRENT_SIGNING_KEY=NEXT, QSTASH_NEXT_SIGNING_KEY=CURRENT)
def test_swapped_keys_are_told_and_the_ping_is_believed_all_the_same() -> None:
    findings = examine()
    assert levels(findings)["keys"] == "warning"
    pings = [each for each in findings if each.check == "ping"]
    assert [each.level for each in pings] == [Level.OK, Level.WARNING]
    assert "next signing key" in pings[1].sentence


@override_settings(QSTASH_CURRENT_SIGNING_KEY=FOREIGN[0], QSTASH_NEXT_SIGNING_KEY=FOREIGN[1])
def test_foreign_keys_are_told_and_the_ping_is_refused() -> None:
    findings = examine()
    assert levels(findings)["keys"] == "problem"
    ping = next(each for each in findings if each.check == "ping")
    assert ping.level == Level.PROBLEM
    assert "refused its signature (key): signed with none of our keys" in ping.sentence
    assert "copy both" in ping.remedy


@without_delivery
@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (0.4, Level.OK, "agree"),
        (-4.9, Level.OK, "agree"),
        (29, Level.WARNING, "29 s fast"),
        (-29, Level.WARNING, "29 s slow"),
        (-31, Level.PROBLEM, "31 s slow, compared with QStash's: signatures are refused"),
        (329, Level.WARNING, "329 s fast"),
        (331, Level.PROBLEM, "331 s fast, compared with QStash's: signatures are refused"),
    ],
)
def test_the_clocks_are_compared(ahead: float, level: Level, words: str) -> None:
    finding = compare_clocks(ahead, leeway=30)
    assert finding.level == level
    assert words in finding.sentence


@pytest.mark.parametrize(
    ("ahead", "level"), [(0, "ok"), (-600, "problem"), (600, "problem"), (60, "warning")]
)
def test_the_clock_is_compared_with_the_date_of_qstashs_answer(
    wire: Wire, ahead: float, level: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        response = wire.site.handle_request(request)
        response.headers["Date"] = formatdate(time.time(), usegmt=True)
        return response

    wire.hosts["testserver"] = answer
    finding = found("clock", ahead=ahead)
    assert finding.level == level
    if ahead:
        assert f"{abs(ahead):.0f} s {'fast' if ahead > 0 else 'slow'}" in finding.sentence


def re_signed(wire: Wire, seconds: float) -> Change:
    """QStash's clock is ahead of the site's."""

    def answer(request: httpx.Request) -> httpx.Response:
        now = time.time() + seconds
        request.headers["Upstash-Signature"] = sign(
            request.content, url=str(request.url), key=CURRENT, now=now
        )
        return wire.site.handle_request(request)

    return answer


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(600, "(early): not valid yet, for another"), (-600, "(expired): expired 30")],
)
def test_a_site_whose_clock_is_ten_minutes_off_is_told(
    wire: Wire, on_the_way: Any, seconds: float, words: str
) -> None:
    on_the_way(re_signed(wire, seconds))
    finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert words in finding.sentence
    assert "NTP" in finding.remedy


def test_a_site_whose_clock_is_a_little_off_is_told(wire: Wire, on_the_way: Any) -> None:
    on_the_way(re_signed(wire, -100))
    findings = examine()
    clock = [each for each in findings if each.check == "clock"][-1]
    assert clock.level == Level.WARNING
    assert re.search("The clock of the site is 10[0-5] s fast", clock.sentence)


# --- where callbacks go --------------------------------------------------------------------------


@without_delivery
@pytest.mark.parametrize(
    ("base", "level", "words"),
    [
        ("https://example.com/llm", "ok", "Callbacks are to come to https://example.com/llm."),
        ("http://example.com/llm", "warning", "readable for anyone"),
        ("https://localhost/llm", "problem", "cannot reach"),
        ("http://127.0.0.1:8000/llm", "problem", "cannot reach"),
        ("https://10.0.0.7/llm", "problem", "cannot reach"),
        ("https://[::1]/llm", "problem", "cannot reach"),
        ("https://169.254.1.1/llm", "problem", "cannot reach"),
        ("https://web/llm", "problem", "cannot reach"),
        ("https://web.internal/llm", "problem", "cannot reach"),
        (f"https://me:{PASSWORD}@example.com/llm", "problem", "has a name or password in it"),
    ],
)
def test_upstash_must_be_able_to_reach_the_callback_url(
    wire: Wire, base: str, level: str, words: str
) -> None:
    wire.hosts["qstash.upstash.io"] = TAKEN
    with override_settings(QSTASH_URL=UPSTASH), ours(CALLBACK_BASE_URL=base):
        finding = found("callback url", wait=None)
    assert finding.level == level
    assert words in finding.sentence


def test_our_own_server_may_call_a_private_address() -> None:
    with ours(CALLBACK_BASE_URL="http://127.0.0.1:8000/llm"):
        assert found("callback url", wait=None).level == Level.OK


# --- the ping that is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("https://testserver/llm", "scheme: signed for http, published https"),
        ("http://www.testserver/llm", "host: signed for testserver, published www.testserver"),
        ("http://testserver:8000/llm", "port: signed for none, published 8000"),
        ("http://testserver/app/llm", "path: signed for /llm/ping/"),
        (f"https://me:{PASSWORD}@testserver/llm", "scheme: signed for http, published https"),
    ],
)
def test_a_site_with_another_base_url_is_told_what_differs(
    wire: Wire, on_the_way: Any, caplog: pytest.LogCaptureFixture, base: str, words: str
) -> None:
    site = settings.QSTASH_LLM | {"CALLBACK_BASE_URL": base}
    on_the_way(elsewhere(wire, QSTASH_LLM=site))
    finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert f"refused its signature (subject): {words}" in finding.sentence
    assert words in caplog.text
    assert [secret for secret in SECRETS if secret in caplog.text] == []
    assert "CALLBACK_BASE_URL" in finding.remedy


@pytest.mark.parametrize("base", ["http://testserver/llm", "http://testserver/llm/"])
def test_a_slash_at_the_end_of_the_base_url_makes_no_difference(base: str) -> None:
    with ours(CALLBACK_BASE_URL=base):
        assert found("ping").level == Level.OK


def test_a_proxy_that_drops_the_trailing_slash_does_no_harm(wire: Wire, on_the_way: Any) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        url = str(request.url).removesuffix("/")
        return wire.site.handle_request(
            httpx.Request("POST", url, headers=request.headers, content=request.content)
        )

    on_the_way(answer)
    assert found("ping").level == Level.OK


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"content": b'{"ping": "another"}'}, "body", "alters bodies"),
        ({"content": b""}, "body", "alters bodies"),
        ({"upstash-signature": None}, "missing", "drops the header"),
        ({"upstash-signature": "x.y.z"}, "malformed", "alters the header"),
    ],
    ids=repr,
)
def test_what_a_proxy_does_to_the_ping_is_told(
    wire: Wire, on_the_way: Any, change: dict[str, Any], reason: str, words: str
) -> None:
    on_the_way(altered(wire, **change))
    finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert f"refused its signature ({reason})" in finding.sentence
    assert words in finding.remedy


def test_a_site_with_other_keys_is_told(wire: Wire, on_the_way: Any) -> None:
    site = {"QSTASH_CURRENT_SIGNING_KEY": FOREIGN[0], "QSTASH_NEXT_SIGNING_KEY": FOREIGN[1]}
    on_the_way(elsewhere(wire, **site))
    findings = examine()
    assert levels(findings)["keys"] == "ok"
    ping = next(each for each in findings if each.check == "ping")
    assert "(key)" in ping.sentence
    assert "The site was started with other signing keys" in ping.remedy


# --- the ping that never comes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "body", "words", "remedy"),
    [
        (301, {"Location": "https://testserver{path}"}, "", "a redirect (scheme: https, not http)",
         "SECURE_SSL_REDIRECT"),
        (301, {"Location": "http://www.testserver{path}"}, "",
         "a redirect (host: www.testserver, not testserver)", "CALLBACK_BASE_URL"),
        (308, {"Location": "{path_without_slash}"}, "",
         "a redirect (trailing slash: one without it, not one with it)", "CALLBACK_BASE_URL"),
        (302, {"Location": "/accounts/login/?next={path}"}, "", "login page", "without a login"),
        (302, {}, "", "a redirect; QStash follows none", "CALLBACK_BASE_URL"),
        (401, {}, "Unauthorized", "got 401", "asks for credentials"),
        (403, {}, "<h1>Forbidden</h1><p>CSRF verification failed.</p>", "a CSRF protection", "CSRF"),
        (403, {}, "Request blocked", "got 403", "WAF"),
        (404, {}, "Not here", "got 404", "django_qstash_llm.urls"),
        (405, {}, "", "got 405", "Something else"),
        (400, {}, "Bad Request", "got 400", "ALLOWED_HOSTS"),
        (502, {}, "Bad Gateway", "got 502", "log of the site"),
        (418, {}, "", "got 418", "See the log"),
        (200, {}, "Please log in", "not written down in this database", "Somebody else answers"),
        (401, {}, '{"error":"invalid signature"}', "knows nothing of this ping", "another database"),
        (404, {}, '{"error":"no such ping"}', "knows nothing of this ping", "another database"),
    ],
)  # fmt: skip
def test_what_qstash_got_instead_of_an_answer_of_ours_is_told(
    on_the_way: Any, status: int, headers: dict[str, str], body: str, words: str, remedy: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        filled = {
            name: value.format(path=path, path_without_slash=path.rstrip("/"))
            for name, value in headers.items()
        }
        return httpx.Response(status, headers=filled, text=body)

    on_the_way(answer)
    finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert words in finding.sentence
    assert remedy in finding.remedy


def test_an_address_at_which_nobody_listens_is_told(wire: Wire) -> None:
    with ours(CALLBACK_BASE_URL="http://nobody.test/llm"):
        finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert "QStash could not reach http://nobody.test/llm/ping/" in finding.sentence


def test_an_address_that_qstash_does_not_take_is_told() -> None:
    with ours(CALLBACK_BASE_URL=f"http://me:{PASSWORD}@testserver/llm"):
        finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert "QStash does not take it: destination:" in finding.sentence


def test_a_base_url_with_another_path_is_told() -> None:
    with ours(CALLBACK_BASE_URL="http://testserver/app/llm"):
        finding = found("ping")
    assert "QStash got 404 from http://testserver/app/llm/ping/" in finding.sentence
    assert "django_qstash_llm.urls" in finding.remedy


def test_a_ping_that_is_not_delivered_is_awaited_and_cancelled() -> None:
    with override_settings(QSTASH_SERVER={**settings.QSTASH_SERVER, "ENGINE": "process"}):
        finding = found("ping", wait=7)
    assert finding.level == Level.PROBLEM
    assert "has not delivered it within 7 s (its state is CREATED)" in finding.sentence
    assert not Message.objects.filter(due_at__isnull=False).exists()


def test_a_ping_that_comes_while_it_is_awaited_is_believed(wire: Wire) -> None:
    from django_qstash_llm.server.delivery import Engine

    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.ahead > timedelta(seconds=3):
            engine = Engine()
            engine.deliver_due()
            engine.close()

    with override_settings(QSTASH_SERVER={**settings.QSTASH_SERVER, "ENGINE": "process"}):
        findings = list(Doctor(clock=clock, sleep=sleep).examine())
    ping = next(each for each in findings if each.check == "ping")
    assert ping.level == Level.OK
    assert "after 3." in ping.sentence
    assert not CallbackResponse.objects.exists()


def test_a_ping_that_qstash_does_not_take_is_told(wire: Wire) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/v2/publish/" in request.url.path:
            return httpx.Response(
                429, json={"error": f"enough, {TOKEN}"}, headers={"RateLimit-Limit": "500"}
            )
        return wire.site.handle_request(request)

    wire.hosts["testserver"] = answer
    finding = found("ping")
    assert finding.level == Level.PROBLEM
    assert "QStash does not take it: QStash answered 429" in finding.sentence


# --- the ping view ---------------------------------------------------------------------------------


def ping_row(**fields: Any) -> CallbackResponse:
    told = {"kind": Kind.PING, "received_at": timezone.now(), "source_message_id": "ping:1"}
    nonce = "11111111-1111-4111-8111-111111111111"
    return CallbackResponse.objects.create(uuid=nonce, **told | fields)


def send_ping(
    client: Any, row: CallbackResponse | str, *, key: str = CURRENT, slash: str = "/"
) -> Any:
    url = f"http://testserver/llm/ping/{row if isinstance(row, str) else row.uuid}{slash}"
    signature = sign(b"{}", url=url, key=key, now=time.time())
    path = httpx.URL(url).path
    return client.post(
        path, b"{}", content_type="application/json", headers={"Upstash-Signature": signature}
    )


@without_delivery
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_ping_that_is_believed_is_written_down(client: Any, slash: str) -> None:
    row = ping_row()
    response = send_ping(client, row, slash=slash)
    assert (response.status_code, response.json()) == (200, {"arrived": True})
    row.refresh_from_db()
    assert row.applied_at is not None
    assert row.problem == ""
    # A second one is no news.
    assert send_ping(client, row).status_code == 404


@without_delivery
def test_a_ping_that_is_refused_says_nothing_and_writes_down_why(client: Any) -> None:
    row = ping_row()
    response = send_ping(client, row, key=FOREIGN[0])
    assert (response.status_code, response.json()) == (401, {"error": "invalid signature"})
    row.refresh_from_db()
    assert (row.applied_at, row.problem) == (None, "key: signed with none of our keys")


@without_delivery
@pytest.mark.parametrize("key", [CURRENT, FOREIGN[0]])
@pytest.mark.parametrize(
    "fields",
    [
        {"received_at": timezone.now() - timedelta(minutes=11)},
        {"kind": Kind.CALLBACK},
        {"uuid": "22222222-2222-4222-8222-222222222222"},
    ],
    ids=["old", "a callback", "another's"],
)
def test_a_ping_that_nobody_awaits_writes_nothing(
    client: Any, fields: dict[str, Any], key: str
) -> None:
    nonce = "11111111-1111-4111-8111-111111111111"
    CallbackResponse.objects.create(
        **{"uuid": nonce, "kind": Kind.PING, "source_message_id": "ping:1"} | fields
    )
    before = list(CallbackResponse.objects.values())
    assert send_ping(client, nonce, key=key).status_code == (404 if key == CURRENT else 401)
    assert list(CallbackResponse.objects.values()) == before


@without_delivery
def test_only_a_post_is_a_ping(client: Any) -> None:
    url = f"/llm/ping/{ping_row().uuid}/"
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        assert client.generic(method, url).status_code == 405, method


def test_a_ping_without_a_database_is_to_be_sent_again(client: Any) -> None:
    row = ping_row()

    def down(*args: Any) -> Any:
        raise OperationalError("away")

    with connection.execute_wrapper(down):
        response = send_ping(client, row)
    assert (response.status_code, response.json()) == (503, {"error": "database unavailable"})


# --- worker and beat -------------------------------------------------------------------------------


def test_what_waits_for_a_worker_is_told() -> None:
    row = LLMRequest(messages=[{"role": "user", "content": "?"}], provider="openai", model="m")
    LLMRequest.objects.bulk_create([row])
    assert "has waited" in found("work", wait=None).sentence
    late = timezone.now() - timedelta(seconds=340)
    LLMRequest.objects.update(created_at=late)
    finding = found("work", wait=None)
    assert finding.level == Level.PROBLEM
    assert "is a worker running?" in finding.sentence
    assert "llm_sweep" in finding.remedy


def test_an_open_circuit_is_told() -> None:
    Circuit.objects.trip(QSTASH, "the daily limit", now=timezone.now())
    finding = found("work", wait=None)
    assert finding.level == Level.WARNING
    assert "the daily limit" in finding.sentence


def test_a_circuit_about_which_there_was_nothing_to_find_out_is_not_told() -> None:
    yesterday = timezone.now() - timedelta(days=1)
    Circuit.objects.trip(QSTASH, "no answer", now=yesterday)
    assert found("work", wait=None).level == Level.OK


def test_a_days_limit_is_told_and_no_worker_asked_for() -> None:
    row = LLMRequest(messages=[{"role": "user", "content": "?"}], provider="openai", model="m")
    LLMRequest.objects.bulk_create([row])
    hour = timedelta(hours=1)
    now = timezone.now()
    LLMRequest.objects.update(created_at=now - hour)
    Circuit.objects.trip(QSTASH, "the daily limit", now=now - hour, until=now + hour)
    finding = found("work", wait=None)
    assert finding.level == Level.PROBLEM
    assert "the daily limit" in finding.sentence
    assert "worker" not in finding.sentence + finding.remedy


def test_without_a_database_the_rest_is_told() -> None:
    def down(execute: Any, sql: str, *args: Any) -> Any:
        if "django_qstash_llm_" in sql:
            raise OperationalError(f"no {PASSWORD}")
        return execute(sql, *args)

    with connection.execute_wrapper(down):
        findings = list(Doctor().examine())
    told = levels(findings)
    assert (told["token"], told["ping"], told["work"]) == ("ok", "problem", "problem")
    assert PASSWORD not in repr(findings)


# --- the command -----------------------------------------------------------------------------------


def doctor(*arguments: str) -> tuple[int, str]:
    out = StringIO()
    try:
        call_command("llm_doctor", *arguments, stdout=out, no_color=True)
    except CommandError as error:
        return error.returncode, out.getvalue()
    return 0, out.getvalue()


@override_settings(DEBUG=True)  # or the checks speak of the suite's broker
def test_the_command_of_a_site_that_is_well_ends_with_0() -> None:
    status, out = doctor()
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "ok        settings      The system checks have nothing to say."
    assert any(line.startswith("ok        ping          Sent through QStash") for line in lines)
    assert [secret for secret in SECRETS if secret in out] == []


@override_settings(QSTASH_CURRENT_SIGNING_KEY=FOREIGN[0], QSTASH_NEXT_SIGNING_KEY=FOREIGN[1])
def test_the_command_of_a_site_that_is_not_ends_with_1_and_says_what_to_do() -> None:
    status, out = doctor()
    assert status == 1
    assert "problem   keys          The signing keys are of another account or region" in out
    assert "\n                        Copy QSTASH_CURRENT_SIGNING_KEY" in out
    assert [secret for secret in SECRETS if secret in out] == []


@pytest.mark.parametrize(("token", "ok"), [(TOKEN, True), ("another-token-canary", False)])
def test_the_command_tells_monitors_in_json(token: str, ok: bool) -> None:
    with override_settings(QSTASH_TOKEN=token):
        status, out = doctor("--json")
    document = json.loads(out)
    assert (status, document["ok"]) == (0 if ok else 1, ok)
    checks = [finding["check"] for finding in document["findings"]]
    assert {"settings", "qstash", "token", "ping", "work"} <= set(checks)
    for finding in document["findings"]:
        assert set(finding) == {"check", "level", "sentence", "remedy"}
        assert finding["level"] in {"ok", "warning", "problem", "skipped"}
    assert [secret for secret in (*SECRETS, token) if secret in out] == []


def test_the_command_without_a_ping_sends_none() -> None:
    status, out = doctor("--no-ping", "--database", "default")
    assert status == 0
    assert "skipped   ping          Not sent, as asked." in out
    assert not Message.objects.exists()


ODD = [None, 5, "x", "900", True, [], ["x"], [5], {"x": 5}, {"x": {"API_KEY": 5}}, {5: [None]}]


@without_delivery
@pytest.mark.parametrize("value", [*ODD, "http://[bad", "https://e.com:p/llm"], ids=repr)
@pytest.mark.parametrize("name", [*sorted(OUR_NAMES.keys() - {"TRANSPORT"}), "QSTASH_LLM"])
def test_the_command_says_what_is_wrong_with_any_setting(name: str, value: Any) -> None:
    """And never breaks off itself."""
    ours = value if name == "QSTASH_LLM" else {**settings.QSTASH_LLM, name: value}
    with override_settings(QSTASH_LLM=ours):
        status, out = doctor("--json", "--no-ping")
        checked = run_checks(tags=[Tags.compatibility])
    told = [each for each in json.loads(out)["findings"] if each["level"] == "problem"]
    assert status == (1 if told else 0)
    serious = {each.id for each in checked if each.is_serious()}
    assert {each["sentence"].split("(")[-1].rstrip(")") for each in told} >= serious


@without_delivery
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CALLBACK_BASE_URL", "http://[bad", "not an absolute http(s) URL"),
        ("CALLBACK_BASE_URL", 5, "is a int"),
        ("PROVIDERS", ["openai"], "is a list"),
        ("DEADLINE", "900", "is a str"),
        ("TRANSPORT", "no.such.transport", "there is no such thing"),
    ],
)
def test_the_command_names_the_setting_and_what_to_do(name: str, value: Any, said: str) -> None:
    with ours(**{name: value}):
        status, out = doctor("--json", "--no-ping")
    [problem, *_] = [x for x in json.loads(out)["findings"] if x["level"] == "problem"]
    assert status == 1
    assert f"QSTASH_LLM['{name}']" in problem["sentence"]
    assert said in problem["sentence"]
    assert problem["remedy"]


@without_delivery
@override_settings(QSTASH_URL="http://[bad")
def test_the_command_names_an_address_of_qstash_that_is_none() -> None:
    status, out = doctor("--no-ping")
    assert (status, "QSTASH_URL is 'http://[bad'" in out) == (1, True)


@without_delivery
@pytest.mark.parametrize(
    "arguments", [["--database", "nowhere"], ["--wait", "-1"], ["--wait", "nan"]]
)
def test_the_command_that_cannot_run_ends_with_2(arguments: list[str]) -> None:
    assert doctor(*arguments) == (2, "")
