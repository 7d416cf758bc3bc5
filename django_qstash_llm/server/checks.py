from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error

from ..qstash.options import NAME
from ..qstash.signing import SHORTEST_KEY, is_usable_key
from . import conf, metering
from .destinations import problem_with_mapping
from .exceptions import ConfigurationError


def check_settings(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    try:
        given = conf.given()
    except ConfigurationError as error:
        return [Error(str(error), id="qstash_server.E003")]
    wrong: list[CheckMessage] = [*_unknown(given), *_mistyped(given), *_half(given)]
    return wrong or [*_accounts(given), *_host_map(given), *_gate_limits(given)] or _identity()


def _accounts(given: dict[str, Any]) -> Iterator[CheckMessage]:
    tokens = [given[name] for name in ("TOKEN", "READ_ONLY_TOKEN") if given.get(name)]
    for name, values in given.get("ACCOUNTS", {}).items():
        where = f"QSTASH_SERVER['ACCOUNTS'][{name!r}]"
        is_named = isinstance(name, str) and NAME.fullmatch(name) and len(name) <= 64
        if not is_named or not isinstance(values, dict):
            yield Error(
                f"{where} is a name of 64 letters, digits, '_', '-', '.' at most, and a dictionary.",
                id="qstash_server.E003",
            )
        elif wrong := sorted(map(str, set(values) - conf.ACCOUNT_KEYS)):
            yield Error(
                f"{where} has no {', '.join(wrong)}.",
                hint=f"There are {', '.join(sorted(conf.ACCOUNT_KEYS))}.",
                id="qstash_server.E004",
            )
        elif not all(isinstance(value, str) for value in values.values()) or not values.get(
            "TOKEN"
        ):
            yield Error(f"{where} needs a TOKEN, and all are strings.", id="qstash_server.E003")
        else:
            yield from _half(values, where)
            tokens += [values[key] for key in ("TOKEN", "READ_ONLY_TOKEN") if values.get(key)]
    if len(tokens) != len(set(tokens)):
        yield Error(
            "QSTASH_SERVER gives one token to two: whose data it opens would be anybody's guess.",
            id="qstash_server.E003",
        )


def _host_map(given: dict[str, Any]) -> Iterator[CheckMessage]:
    for host, base in given.get("HOST_MAP", {}).items():
        if problem := problem_with_mapping(host, base):
            yield Error(f"QSTASH_SERVER['HOST_MAP']: {problem}.", id="qstash_server.E003")


def _gate_limits(given: dict[str, Any]) -> Iterator[CheckMessage]:
    for place, limits in given.get("GATE_LIMITS", {}).items():
        where = f"QSTASH_SERVER['GATE_LIMITS'][{place!r}]"
        if not isinstance(place, str) or not isinstance(limits, dict):
            yield Error(
                f"{where} is a host, or host/model, and a dictionary.", id="qstash_server.E003"
            )
        elif unknown := sorted(map(str, set(limits) - metering.LIMITS)):
            yield Error(
                f"{where} has no {', '.join(unknown)}.",
                hint=f"There are {', '.join(sorted(metering.LIMITS))}.",
                id="qstash_server.E004",
            )
        elif wrong := [name for name, value in limits.items() if not _is_limit(name, value)]:
            yield Error(
                f"{where}: {', '.join(wrong)} must be more than 0 (GROUP is a name).",
                id="qstash_server.E003",
            )
        elif "://" in place or (place.lower() != place and "/" not in place):
            yield Error(
                f"{where} names a host as api.openai.com, in small letters, or host/model.",
                id="qstash_server.E003",
            )


def _is_limit(name: str, value: Any) -> bool:
    if name == "GROUP":
        return isinstance(value, str) and bool(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value > 0 if is_whole or (name != "CONCURRENCY" and isinstance(value, float)) else False


def _identity() -> list[CheckMessage]:
    current = conf.current()
    if settings.DEBUG:
        return []
    if not any(account.token for account in current.known_accounts):
        return [
            Error(
                "The QStash server has no token, so it answers every call with 401.",
                hint="Set QSTASH_SERVER['TOKEN'] to a long random text; the same goes into the "
                "QSTASH_TOKEN of whoever publishes.",
                id="qstash_server.E001",
            )
        ]
    used = {
        value
        for account in current.known_accounts
        for value in (
            account.token,
            account.read_only_token,
            account.current_signing_key,
            account.next_signing_key,
        )
    }
    if used & conf.PUBLIC_SECRETS:
        return [
            Error(
                "The QStash server answers to the public development token or signs with its "
                "keys: everybody knows them.",
                hint="Set TOKEN, CURRENT_SIGNING_KEY and NEXT_SIGNING_KEY in QSTASH_SERVER to "
                "your own; without the two keys the server makes its own and keeps them.",
                id="qstash_server.E002",
            )
        ]
    return []


def _unknown(given: dict[str, Any]) -> list[Error]:
    def meant(name: str) -> str:
        close = get_close_matches(name.upper(), conf.KNOWN, n=1)
        return f"Did you mean {close[0]}?" if close else f"There are {', '.join(conf.KNOWN)}."

    return [
        Error(f"QSTASH_SERVER has no {name!r}.", hint=meant(str(name)), id="qstash_server.E004")
        for name in given
        if name not in conf.KNOWN
    ]


def _half(given: dict[str, Any], where: str = "QSTASH_SERVER") -> list[Error]:
    """One signing key is none: the server would make two of its own."""
    keys = [given.get("CURRENT_SIGNING_KEY"), given.get("NEXT_SIGNING_KEY")]
    if not any(keys) or all(map(is_usable_key, keys)):
        return []
    return [
        Error(
            f"{where} needs CURRENT_SIGNING_KEY and NEXT_SIGNING_KEY, both of "
            f"{SHORTEST_KEY} characters or more, or neither.",
            id="qstash_server.E003",
        )
    ]


def _mistyped(given: dict[str, Any]) -> list[Error]:
    return [
        Error(
            f"QSTASH_SERVER[{name!r}] cannot be a {type(value).__name__}.",
            id="qstash_server.E003",
        )
        for name, value in given.items()
        if name in conf.KNOWN and not isinstance(value, conf.expected_type(name))
    ] + [
        Error(f"QSTASH_SERVER[{name!r}] is at least {least}.", id="qstash_server.E003")
        for name, least in (("CONCURRENCY", 1), ("LEASE", 1), ("MESSAGE_RETENTION", 60))
        if isinstance(given.get(name), int | float) and given[name] < least
    ]
