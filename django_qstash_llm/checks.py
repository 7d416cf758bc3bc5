"""What is wrong with the settings, found at start. Ids are stable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from django.apps.config import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.urls import Resolver404, resolve
from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission

from . import conf
from .exceptions import ConfigurationError
from .pricing import is_count, read_price
from .providers import build_provider
from .qstash.signing import is_usable_key

ID = "django_qstash_llm"
_ANY_UUID = UUID(int=0)
PUBLIC_KEYS = {
    "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r",
    "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs",
    "sig_7GVPjvuwsfqF65iC8fSrs1dfYruM",
    "sig_5NoELc3EFnZn4DVS5bDs2Nk4b7Ua",
    "sig_6jWGaWRxHsw4vMSPJprXadyvrybF",
    "sig_7qHbvhmahe5GwfePDiS5Lg3pi6Qx",
    "sig_5T8FcSsynBjn9mMLBsXhpacRovJf",
    "sig_7GFR4YaDshFcqsxWRZpRB161jguD",
}
"""What the identities of QStash's development server sign with, as documented by Upstash."""


def _serious(message: str, *, hint: str, id: str) -> CheckMessage:
    """An error where it counts; while a project is being set up, a warning that lets migrate run."""
    kind = Warning if settings.DEBUG else Error
    return kind(message, hint=hint, id=f"{ID}.{id}")


@register(Tags.compatibility)
def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    ours = getattr(settings, "QSTASH_LLM", {})
    if not isinstance(ours, dict):
        return [Error("QSTASH_LLM is not a dictionary.", hint="QSTASH_LLM = {…}", id=f"{ID}.E005")]
    unknown = conf.unknown_keys(ours)
    if unknown:
        hint = f"There are: {', '.join(conf.OUR_NAMES)}."
        return [Error(problem, hint=hint, id=f"{ID}.E005") for problem in unknown]
    in_force = conf.app_settings()
    if in_force.mistyped:  # the others would stumble over them
        return [
            Error(problem, hint=hint, id=f"{ID}.E007")
            for problem, hint in in_force.mistyped.values()
        ]
    return [
        *_check_token(in_force),
        *_check_keys(in_force),
        *_check_callback_url(in_force),
        *_check_providers(in_force),
        *_check_prices(in_force),
        *_check_hosted(in_force),
        *_check_money(in_force),
        *_check_keeping(in_force),
        *_check_pacing(in_force),
        *_check_health_token(in_force),
        *_check_openai(in_force),
    ]


def _check_prices(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    for name, given in in_force.prices.items():
        try:
            read_price(name, given)
        except ConfigurationError as error:
            hint = "Until then what it should price is stored without a cost."
            problems.append(Error(str(error), hint=hint, id=f"{ID}.E007"))
    for name, cap in in_force.output_cap.items():
        if not is_count(cap) or not cap:
            problem = f"QSTASH_LLM['OUTPUT_CAP'][{name!r}] is {cap!r}."
            problems.append(Error(problem, hint="Give tokens, more than 0.", id=f"{ID}.E007"))
    return problems


def _check_money(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    try:
        in_force.check_tenant()
    except ConfigurationError as error:
        hint = "Until then no request that names no tenant is taken."
        problems.append(Error(str(error), hint=hint, id=f"{ID}.E012"))
    try:
        in_force.message_price  # noqa: B018 - it says what is wrong with it
    except ConfigurationError as error:
        hint = "Until then it is not known what QStash's messages cost."
        problems.append(Error(str(error), hint=hint, id=f"{ID}.E007"))
    return problems


def _check_keeping(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    try:
        in_force.check_storing()
    except ConfigurationError as error:
        hint = "Until then nothing is published, and no answer is read."
        problems.append(Error(str(error), hint=hint, id=f"{ID}.E007"))
    try:
        in_force.check_history()
    except ConfigurationError as error:
        hint = "Until then no conversation goes on."
        problems.append(Error(str(error), hint=hint, id=f"{ID}.E007"))
    for name in (
        "retention_days",
        "orphan_retention_days",
        "deadline",
        "health_late",
        "chat_timeout",
        "chat_connect_timeout",
        "chat_read_timeout",
    ):
        days = getattr(in_force, name)
        if days is not None and days <= 0:
            problem = f"QSTASH_LLM[{name.upper()!r}] is {days}."
            problems.append(Error(problem, hint="Give more than 0.", id=f"{ID}.E007"))
    return problems


def _check_pacing(in_force: conf.AppSettings) -> list[CheckMessage]:
    try:
        in_force.check_pacing()
    except ConfigurationError as error:
        return [Error(str(error), hint="Until then nothing is published.", id=f"{ID}.E007")]
    return []


def _check_health_token(in_force: conf.AppSettings) -> list[CheckMessage]:
    if not in_force.health_token or len(in_force.health_token) >= conf.SHORTEST_HEALTH_TOKEN:
        return []
    return [
        _serious(
            "QSTASH_LLM['HEALTH_TOKEN'] is too short, and nobody who shows it sees any figure.",
            hint=f"Give {conf.SHORTEST_HEALTH_TOKEN} characters or more, or none.",
            id="E010",
        )
    ]


def _check_openai(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    for name, base in (
        ("openai_authentication", BaseAuthentication),
        ("openai_permissions", BasePermission),
    ):
        setting = f"QSTASH_LLM[{name.upper()!r}]"
        hint = f"Give dotted paths of subclasses of rest_framework's {base.__name__}."
        try:
            wrong = [each for each in conf.classes_of(name) if not issubclass(each, base)]
        except ConfigurationError as error:
            problems.append(Error(str(error), hint=hint, id=f"{ID}.E011"))
            continue
        for each in wrong:
            problem = f"{setting}: {each.__name__} is no {base.__name__}."
            problems.append(Error(problem, hint=hint, id=f"{ID}.E011"))
    for name, hint in (
        ("openai_max_body_bytes", "Give bytes."),
        ("openai_max_file_bytes", "Give bytes."),
        ("openai_max_batch_lines", "Give a number of requests."),
    ):
        if getattr(in_force, name) <= 0:
            problem = f"QSTASH_LLM[{name.upper()!r}] is not more than 0: nothing would be taken."
            problems.append(Error(problem, hint=hint, id=f"{ID}.E011"))
    return problems


def _check_token(in_force: conf.AppSettings) -> list[CheckMessage]:
    if not conf.is_http_url(in_force.qstash_url):
        problem = f"QSTASH_URL is {in_force.qstash_url!r}, not an http(s) URL."
        return [_serious(problem, hint=f"As in {conf.UPSTASH_URL}.", id="E009")]
    if in_force.qstash_token:
        return []
    hint = (
        "Set QSTASH_TOKEN to the token of your QStash account, or of the built-in server: "
        "`manage.py qstash_server` prints it."
    )
    return [_serious("QSTASH_TOKEN is not set.", hint=hint, id="E001")]


def _check_keys(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    hint = "Copy both signing keys from QStash's console, or from what `manage.py qstash_server` prints."
    names = ("QSTASH_CURRENT_SIGNING_KEY", "QSTASH_NEXT_SIGNING_KEY")
    for name, key in zip(names, in_force.signing_keys, strict=True):
        if key and not is_usable_key(key):
            problems.append(
                _serious(f"{name} is too short to be a signing key.", hint=hint, id="E002")
            )
        if key in PUBLIC_KEYS and not settings.DEBUG:
            problems.append(
                Error(
                    f"{name} is the public key of a development server: anybody can sign with it.",
                    hint=hint,
                    id=f"{ID}.E008",
                )
            )
    if not in_force.qstash_current_signing_key:
        problems.append(_serious(f"{names[0]} is not set.", hint=hint, id="E002"))
    return problems


def _check_callback_url(in_force: conf.AppSettings) -> list[CheckMessage]:
    problem = conf.callback_base_url_problem(in_force.callback_base_url)
    if not problem and "@" in urlsplit(in_force.callback_base_url).netloc:
        # Not repeated here: it would show the password.
        problem = "QSTASH_LLM['CALLBACK_BASE_URL'] names a user, and QStash takes no such URL."
    if problem:
        hint = (
            'Include django_qstash_llm.urls in your URLconf and set QSTASH_LLM = {"CALLBACK_BASE_URL": '
            '"https://example.com/llm"} to where it is reached from outside.'
        )
        return [_serious(problem, hint=hint, id="E003")]
    found: list[CheckMessage] = []
    path = urlsplit(in_force.callback_url(_ANY_UUID)).path
    if not _is_ours(path):
        found.append(
            Warning(
                f"No callback view answers at {path} of this site.",
                hint="Include django_qstash_llm.urls there, unless a proxy adds a part of the path.",
                id=f"{ID}.W001",
            )
        )
    if in_force.callback_base_url.startswith("http://") and not settings.DEBUG:
        found.append(
            Warning(
                "CALLBACK_BASE_URL is plain http: answers travel readable for anyone on the way.",
                hint="Use https outside development.",
                id=f"{ID}.W002",
            )
        )
    return found


def _is_ours(path: str) -> bool:
    try:
        match = resolve(path)
    except Resolver404:
        return False
    return match.url_name == "callback" and "django_qstash_llm" in match.app_names


def _check_providers(in_force: conf.AppSettings) -> list[CheckMessage]:
    problems: list[CheckMessage] = []
    hint = "See the README's section on providers."
    for name, options in in_force.providers.items():
        try:
            build_provider(name, options)
        except ConfigurationError as error:
            problems.append(_serious(str(error), hint=hint, id="E004"))
    if in_force.default_provider not in {*in_force.providers, "upstash"}:
        problem = (
            f"DEFAULT_PROVIDER is {in_force.default_provider!r}, which PROVIDERS does not have."
        )
        problems.append(_serious(problem, hint=hint, id="E004"))
    return problems


def _check_hosted(in_force: conf.AppSettings) -> list[CheckMessage]:
    uses_hosted = in_force.default_provider == "upstash" or "upstash" in in_force.providers
    if not uses_hosted or ".upstash.io" not in in_force.qstash_url:
        return []
    return [
        Warning(
            "The provider 'upstash' asks for Upstash's hosted models, which Upstash has withdrawn.",
            hint="Use another provider, or django_qstash_llm.server, which answers for those models.",
            id=f"{ID}.W003",
        )
    ]


@register(Tags.compatibility)
def check_celery(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    from celery import current_app

    broker = str(current_app.conf.broker_url or "")
    if broker.startswith("filesystem:"):
        hint = "Use Redis or RabbitMQ; in one process, memory://."
        return [
            Error(
                "Celery's filesystem:// transport loses tasks and workers.",
                hint=hint,
                id=f"{ID}.E006",
            )
        ]
    if broker.startswith("memory:") and not settings.DEBUG:
        hint = "Nothing outside this process hears it. Use Redis or RabbitMQ."
        return [Warning("Celery's broker is memory:// outside DEBUG.", hint=hint, id=f"{ID}.W005")]
    return []


@register(Tags.compatibility)
def check_sqlite(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Read off the settings: no database is asked."""
    return [
        Warning(
            f"The SQLite database {alias!r} is not set up for several writers: "
            "'database is locked' will lose callbacks.",
            hint=f"'OPTIONS': {SQLITE_OPTIONS!r}",
            id=f"{ID}.W004",
        )
        for alias, database in settings.DATABASES.items()
        if str(database.get("ENGINE", "")).endswith("sqlite3")
        and str(database.get("OPTIONS", {}).get("transaction_mode", "")).upper() != "IMMEDIATE"
    ]


SQLITE_OPTIONS = {
    "timeout": 20,
    "transaction_mode": "IMMEDIATE",
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
}
