"""Every setting, read in one place, when first needed, and again when a test changes one.

What Upstash names keeps Upstash's name at top level (``QSTASH_TOKEN``); everything of ours is in
one dictionary, ``QSTASH_LLM``. Nothing here reads the environment, except ``from_env``, which a
project's settings module may call.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.utils.module_loading import import_string

from .exceptions import ConfigurationError
from .qstash import Client
from .qstash.signing import is_usable_key

if TYPE_CHECKING:
    import environ

UPSTASH_URL = "https://qstash.upstash.io"


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """The settings, typed. Field names are the keys of ``QSTASH_LLM`` in lower case."""

    callback_base_url: str = ""
    """Where ``django_qstash_llm.urls`` is reached from outside: ``https://example.com/llm``."""
    former_callback_base_urls: tuple[str, ...] = ()
    """Base URLs of earlier days, so that what is still on its way may arrive after a move."""
    providers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Name -> how to reach it, see ``providers``. Holds the provider keys."""
    default_provider: str = "openai"
    default_model: str = "gpt-5.4-mini"
    retries: int = 3
    """Retries of a request that names none. QStash's free plan allows 5 at most."""
    callback_retries: int = 5
    """How often QStash repeats a callback of ours that failed. Left to itself it would take
    ``retries``, and with none of them one dropped connection would lose a paid answer."""
    timeout: int | None = None
    """Seconds per attempt for a request that names none; None is the plan's (2 hours at most)."""
    max_body_bytes: int = 1_000_000
    """What the plan lets a message weigh: 1 MB free, 10 MB pay-as-you-go."""
    batch_size: int = 100
    """Requests per HTTP call, when many are waiting."""
    batch_bytes: int = 10_000_000
    """Bytes per HTTP call, about; QStash takes 100 MB."""
    submit_timeout: float = 30.0
    """Seconds for one HTTP call to QStash."""
    signature_leeway: float = 30.0
    """Seconds our clock and QStash's may differ. 0 means none."""
    max_callback_bytes: int = 64_000_000
    """A callback larger than this is refused with 413."""
    max_stored_body_bytes: int = 10_000_000
    """What is kept of a provider's raw answer."""
    prices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``"provider/model"`` -> price per million tokens in USD: ``{"input": "0.15", "output": "0.6"}``."""
    announce_tries: int = 5
    """How often a trigger or receiver that raises is tried before a person has to look."""
    transport: Any = field(default=None, repr=False)
    """An httpx transport, or the dotted path to one, for the way to QStash."""

    qstash_url: str = UPSTASH_URL
    qstash_token: str = field(default="", repr=False)
    qstash_current_signing_key: str = field(default="", repr=False)
    qstash_next_signing_key: str = field(default="", repr=False)

    @property
    def signing_keys(self) -> list[str]:
        """Current, then next. An absent one keeps its place and is believed by nobody."""
        return [self.qstash_current_signing_key, self.qstash_next_signing_key]

    @property
    def secrets(self) -> list[str]:
        """Every key of ours, the longest first. What is too short to be one is left out."""
        keys = [self.qstash_token, *self.signing_keys]
        for provider in self.providers.values():
            keys += [str(provider.get(name) or "") for name in ("API_KEY", "HELICONE_API_KEY")]
        return sorted((key.strip() for key in keys if len(key.strip()) >= 8), key=len, reverse=True)

    def without_secrets(self, text: str) -> str:
        """``text`` of others with our keys blacked out: some repeat the key they refuse."""
        for secret in self.secrets:
            text = text.replace(secret, "[redacted]")
        return text

    def callback_url(self, uuid: object) -> str:
        """Where QStash tells about the request ``uuid``. Raises ``ConfigurationError``."""
        problem = callback_base_url_problem(self.callback_base_url)
        if problem:
            raise ConfigurationError(problem)
        return f"{self.callback_base_url.rstrip('/')}/callback/{uuid}/"

    def callback_urls(self, uuid: object) -> set[str]:
        """Every spelling under which we may have published the callback of ``uuid``."""
        bases = [self.callback_base_url, *self.former_callback_base_urls]
        return {
            f"{base.rstrip('/')}/callback/{uuid}{slash}"
            for base in bases
            if base
            for slash in ("", "/")
        }

    def check_ready(self) -> None:
        """Raise ``ConfigurationError`` unless a request could be submitted and answered."""
        if not self.qstash_token:
            raise ConfigurationError("QSTASH_TOKEN is not set: QStash would refuse every request.")
        if not any(map(is_usable_key, self.signing_keys)):
            raise ConfigurationError(
                "QSTASH_CURRENT_SIGNING_KEY is not set or too short: no callback could be believed."
            )
        if not self.qstash_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"QSTASH_URL is {self.qstash_url!r}, not an http(s) URL.")
        self.callback_url("")


UPSTASH_NAMES = {
    "QSTASH_URL": "qstash_url",
    "QSTASH_TOKEN": "qstash_token",
    "QSTASH_CURRENT_SIGNING_KEY": "qstash_current_signing_key",
    "QSTASH_NEXT_SIGNING_KEY": "qstash_next_signing_key",
}
OUR_NAMES = {
    f.name.upper(): f.name
    for f in dataclasses.fields(AppSettings)
    if f.name not in UPSTASH_NAMES.values()
}


@lru_cache(maxsize=1)
def app_settings() -> AppSettings:
    """The settings in force. Raises ``ConfigurationError`` on a key that is none of ours."""
    ours = getattr(settings, "QSTASH_LLM", {})
    unknown = unknown_keys(ours)
    if unknown:
        raise ConfigurationError(unknown[0])
    given: dict[str, Any] = {OUR_NAMES[key]: value for key, value in ours.items()}
    upstash: dict[str, Any] = {
        name: value.strip()
        for key, name in UPSTASH_NAMES.items()
        if isinstance(value := getattr(settings, key, None), str) and value.strip()
    }
    return AppSettings(**given, **upstash)


def unknown_keys(ours: Mapping[str, Any]) -> list[str]:
    """One sentence for each key of ``QSTASH_LLM`` that we do not know."""
    problems = []
    for key in ours:
        if key not in OUR_NAMES:
            close = difflib.get_close_matches(str(key).upper(), OUR_NAMES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"QSTASH_LLM has no setting {key!r}.{hint}")
    return problems


def callback_base_url_problem(base_url: str) -> str:
    """What is wrong with ``CALLBACK_BASE_URL``; empty when nothing is."""
    name = "QSTASH_LLM['CALLBACK_BASE_URL']"
    if not base_url:
        return f"{name} is not set: answers would have nowhere to go."
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return f"{name} is {base_url!r}, which is not an absolute http(s) URL."
    if parts.query or parts.fragment or not base_url.isascii():
        return f"{name} is {base_url!r}: give scheme, host and path only, in ASCII."
    return ""


def qstash_client() -> Client:
    """The one kept client of this process. Making one costs 40 ms of TLS context.

    Raises ``ConfigurationError`` without a token.
    """
    # A forked child must not share its parent's sockets.
    return _client_of_process(os.getpid())


@lru_cache(maxsize=1)
def _client_of_process(pid: int) -> Client:
    conf = app_settings()
    conf.check_ready()
    transport = conf.transport
    if isinstance(transport, str):
        transport = import_string(transport)
    return Client(
        conf.qstash_token,
        base_url=conf.qstash_url,
        timeout=conf.submit_timeout,
        transport=transport,
    )


@receiver(setting_changed)
def forget_settings(*, setting: str, **kwargs: object) -> None:
    if setting == "QSTASH_LLM" or setting in UPSTASH_NAMES:
        app_settings.cache_clear()
        _client_of_process.cache_clear()


def from_env(env: environ.Env) -> dict[str, Any]:
    """The settings as a project usually keeps them in its environment, for ``settings.py``::

        from django_qstash_llm.conf import from_env

        globals().update(from_env(environ.Env()))

    Reads Upstash's names, ``QSTASH_LLM_<KEY>`` for our plain settings, and a provider for each of
    ``OPENAI_API_KEY`` (with ``OPENAI_BASE_URL``, ``OPENAI_ORGANIZATION``) and ``ANTHROPIC_API_KEY``
    that is there.
    """
    # env() would read a value that begins with "$" as the name of another variable.
    read = env.ENVIRON.get
    upstash = {name: read(name) for name in UPSTASH_NAMES if read(name)}
    ours: dict[str, Any] = {}
    kinds = {f.name.upper(): str(f.type) for f in dataclasses.fields(AppSettings)}
    prefix = "QSTASH_LLM_"
    for name in sorted(env.ENVIRON):
        if name.startswith(prefix):
            # One that we do not know is kept, and reported by the check of unknown keys.
            key = name.removeprefix(prefix)
            ours[key] = _parse(env, name, kinds.get(key, ""))
    providers: dict[str, dict[str, str]] = {}
    if read("OPENAI_API_KEY"):
        providers["openai"] = {"API_KEY": read("OPENAI_API_KEY", "")}
        if read("OPENAI_BASE_URL"):
            providers["openai"]["BASE_URL"] = read("OPENAI_BASE_URL", "")
        if read("OPENAI_ORGANIZATION"):
            providers["openai"]["ORGANIZATION"] = read("OPENAI_ORGANIZATION", "")
    if read("ANTHROPIC_API_KEY"):
        providers["anthropic"] = {"API_KEY": read("ANTHROPIC_API_KEY", "")}
    if providers:
        ours.setdefault("PROVIDERS", providers)
    return {**upstash, "QSTASH_LLM": ours}


def _parse(env: environ.Env, name: str, kind: str) -> Any:
    try:
        return _typed(env, name, kind)
    except ValueError as error:
        raise ConfigurationError(f"{name} in the environment: {error}") from error


def _typed(env: environ.Env, name: str, kind: str) -> Any:
    if kind.startswith("int"):
        return env.int(name)
    if kind.startswith("float"):
        return env.float(name)
    if kind.startswith("tuple"):
        return tuple(env.list(name))
    if kind.startswith("Mapping"):
        return env.json(name)
    return env.ENVIRON[name]
