"""Who answers, and how each wants to be asked.

A provider is an entry of ``QSTASH_LLM["PROVIDERS"]``; a row holds only its name. Keys:

``KIND``
    ``openai``, ``anthropic``, ``upstash`` or ``custom``. May be left out where the entry's name
    says it, and where ``BASE_URL`` makes it ``custom``.
``API_KEY``
    Goes to this provider's own host and nowhere else.
``BASE_URL``
    A base URL with or without ``/v1``, or the full URL of the endpoint. Of ``upstash``: the
    OpenAI-compatible server that answers the Chat API for the hosted models.
``ORGANIZATION``
    OpenAI's organization id.
``MODELS``
    When given, the only models this provider may be asked.
``MAX_TOKENS``
    Anthropic requires ``max_tokens``; this is sent when the request names none. Default 4096.
``HELICONE_API_KEY``
    Puts Helicone's gateway in front.
``FLOW_CONTROL``
    How fast each of its models may be asked: ``{"PARALLELISM": 20, "RATE": 500, "PERIOD": 60}``.
    ``GROUPS`` in it names models that share a limit, and may give other values for these:
    ``{"gpt-5": {"MODELS": ["gpt-5.4", "gpt-5.4-mini"], "RATE": 1000}}``. See ``Pace``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from . import anthropic
from .cleaning import clean_text
from .conf import app_settings, is_http_url
from .exceptions import ConfigurationError, InvalidRequest
from .qstash import FlowControl, InvalidOption
from .qstash.message import HOSTED_LLM, JSONText

HOSTED_MODELS = ("meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2")
"""The models Upstash used to host, which the ``upstash`` provider still names."""
HELICONE_TARGET = "Helicone-Target-Url"
"""The header by which the gateway knows whom to ask."""
KINDS = ("openai", "anthropic", "upstash", "custom")
OPTIONS = (
    "KIND",
    "API_KEY",
    "BASE_URL",
    "ORGANIZATION",
    "MODELS",
    "MAX_TOKENS",
    "HELICONE_API_KEY",
    "FLOW_CONTROL",
)
ANTHROPIC_VERSION = "2023-06-01"
HELICONE_URL = "https://gateway.helicone.ai"
HELICONE_UPSTASH_URL = "https://qstash.helicone.ai/llm/v1/chat/completions"


Route = tuple[str, dict[str, str]]
"""A URL, and the headers that go there."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the models that share a limit may be asked, all together. None is no limit."""

    key: str
    """Their flow-control key at QStash."""
    models: tuple[str, ...]
    parallelism: int | None = None
    rate: int | None = None
    period: int = 1
    """Seconds, with ``rate``."""

    def at_most(self, rate: int, period: int) -> Pace:
        """No faster than that."""
        if self.rate is not None and self.rate / self.period <= rate / period:
            return self
        return replace(self, rate=rate, period=period)

    def flow_control(self) -> FlowControl | None:
        """As QStash is told of it; None where nothing is limited."""
        if self.parallelism is None and self.rate is None:
            return None
        return FlowControl(
            key=self.key, parallelism=self.parallelism, rate=self.rate, period=self.period
        )


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where a request goes and what goes with it."""

    name: str
    kind: str
    destination: str
    """The endpoint's URL, or ``api/llm``."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Forwarded by QStash. They carry the key."""
    models: tuple[str, ...] = ()
    """The only ones it may be asked; empty is any."""
    max_tokens: int = 4096
    ceiling: Mapping[str, int] = field(default_factory=dict)
    """Of ``Pace``, what the settings say for each model that is in no group."""
    groups: tuple[Pace, ...] = ()

    upstream: Route | None = field(default=None, repr=False)
    """Where the Chat API goes instead, and with which headers: only QStash knows ``api/llm``."""

    @property
    def route(self) -> Route:
        """URL and headers for a call without QStash. Raises ``ConfigurationError`` where there is
        no such way."""
        if self.upstream is None and self.kind == "upstash":
            raise ConfigurationError(
                f"QSTASH_LLM['PROVIDERS'][{self.name!r}]['BASE_URL'] is not set: the hosted models "
                "are reached through QStash only. Give the URL of an OpenAI-compatible server that "
                "answers the Chat API for them, and its API_KEY, or ask another provider."
            )
        return self.upstream or (self.destination, dict(self.headers))

    def pace(self, model: str) -> Pace:
        """What the settings say of ``model``."""
        of_group = next((pace for pace in self.groups if model in pace.models), None)
        key = _flow_control_key(self.name, model)
        return of_group or Pace(key=key, models=(model,), **self.ceiling)

    def check_model(self, model: str) -> None:
        """Raise ``InvalidRequest`` for a model this provider is known not to have."""
        if self.models and model not in self.models:
            raise InvalidRequest(
                "model",
                f"{model!r} is not one that {self.name!r} may be asked: "
                f"{', '.join(self.models)}. Add it to MODELS of QSTASH_LLM['PROVIDERS'], "
                "or ask another provider.",
            )

    def body(
        self, model: str, messages: list[dict[str, Any]], parameters: Mapping[str, Any]
    ) -> bytes:
        """The JSON this provider is sent. ``parameters`` pass through under their own names."""
        if self.kind == "anthropic":
            fields = anthropic.request_body(model, messages, parameters, max_tokens=self.max_tokens)
        else:
            fields = {"model": model, "messages": messages, **parameters}
        return JSONText.dump(fields)


def get_provider(name: str) -> Provider:
    """The provider of that name. Raises ``InvalidRequest`` or, for a wrong entry, ``ConfigurationError``."""
    conf = app_settings()
    if (built := conf.built_providers.get(name)) is not None:
        return cast(Provider, built)
    options = conf.providers.get(name)
    if options is None:
        if name != "upstash":
            known = ", ".join(sorted({*conf.providers, "upstash"}))
            raise InvalidRequest(
                "provider",
                f"there is no provider {name!r}; there are {known}. "
                "Add it to QSTASH_LLM['PROVIDERS'].",
            )
        options = {}
    return cast(Provider, conf.built_providers.setdefault(name, build_provider(name, options)))


def provider_at(url: str) -> str:
    """The name of the provider that is asked at ``url``; where none is any more, or it cannot be told
    which, the URL's host.

    Of several that differ in nothing but their keys it is the default one, or else the first.
    """
    conf = app_settings()
    found: dict[str | None, str] = {}
    for name in dict.fromkeys([conf.default_provider, *conf.providers, "upstash"]):
        with suppress(ConfigurationError, InvalidRequest):
            provider = get_provider(name)
            if provider.destination == url:
                # A gateway has one URL for all who are behind it.
                found.setdefault(provider.headers.get(HELICONE_TARGET), name)
    if len(found) == 1:
        return next(iter(found.values()))
    with suppress(ValueError):
        return clean_text(urlsplit(url).hostname or "", limit=64)
    return ""


def build_provider(name: str, options: Mapping[str, Any]) -> Provider:
    """A provider from its entry in the settings. Raises ``ConfigurationError``."""
    setting = f"QSTASH_LLM['PROVIDERS'][{name!r}]"
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"{setting} is not a dictionary.")
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise ConfigurationError(f"{setting}: a provider's name has 1 to 64 characters.")
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        raise ConfigurationError(
            f"{setting} has no option {unknown[0]!r}; there are {', '.join(OPTIONS)}."
        )
    kind = options.get("KIND") or (name if name in KINDS else "custom")
    if kind not in KINDS:
        raise ConfigurationError(f"{setting}['KIND'] is {kind!r}; there are {', '.join(KINDS)}.")
    key = str(options.get("API_KEY") or "").strip()
    if not key and kind in {"openai", "anthropic"}:
        raise ConfigurationError(f"{setting}['API_KEY'] is not set.")
    if not key.isascii() or not key.isprintable():
        raise ConfigurationError(f"{setting}['API_KEY'] is not printable ASCII.")
    base_url = str(options.get("BASE_URL") or "")
    if kind == "custom" and not base_url:
        raise ConfigurationError(f"{setting}['BASE_URL'] is not set.")
    if base_url and not (re.match(r"https?://[^/\s]+", base_url) and is_http_url(base_url)):
        raise ConfigurationError(f"{setting}['BASE_URL'] is {base_url!r}, not an http(s) URL.")
    models = options.get("MODELS") or (HOSTED_MODELS if kind == "upstash" else ())
    if not isinstance(models, list | tuple | set | frozenset) or not all(
        isinstance(each, str) for each in models
    ):
        raise ConfigurationError(f"{setting}['MODELS'] is not a list of models' names.")
    try:
        max_tokens = int(options.get("MAX_TOKENS") or 4096)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{setting}['MAX_TOKENS'] is not a whole number.") from error
    destination, headers = _ROUTES[kind](key, base_url, options)
    if options.get("HELICONE_API_KEY"):
        destination, headers = _through_helicone(
            destination, headers, str(options["HELICONE_API_KEY"])
        )
    return Provider(
        name=name,
        kind=kind,
        destination=destination,
        headers=headers,
        models=tuple(models),
        max_tokens=max_tokens,
        **_flow_control(name, options.get("FLOW_CONTROL", {}), f"{setting}['FLOW_CONTROL']"),
        upstream=_custom(key, base_url, options) if kind == "upstash" and base_url else None,
    )


_CEILING = ("PARALLELISM", "RATE", "PERIOD")


def _flow_control(name: str, given: Any, setting: str) -> dict[str, Any]:
    """``ceiling`` and ``groups`` of a provider."""
    values = dict(_mapping(given, setting, (*_CEILING, "GROUPS")))
    groups = _mapping(values.pop("GROUPS", {}), f"{setting}['GROUPS']")
    _read_pace(values, setting, key="any", models=())
    paces: list[Pace] = []
    for group, own in groups.items():
        of_group = f"{setting}['GROUPS'][{group!r}]"
        own = dict(_mapping(own, of_group, (*_CEILING, "MODELS")))
        models = own.pop("MODELS", None)
        if not isinstance(models, list | tuple) or not all(isinstance(m, str) for m in models):
            raise ConfigurationError(f"{of_group}['MODELS'] is not a list of models' names.")
        for model in models:
            if any(model in pace.models for pace in paces):
                raise ConfigurationError(f"{of_group}: {model!r} is in another group already.")
        key = _flow_control_key(name, f"group.{group}")
        paces.append(_read_pace({**values, **own}, of_group, key=key, models=tuple(models)))
    return {"ceiling": {name.lower(): value for name, value in values.items()}, "groups": (*paces,)}


def _mapping(given: Any, setting: str, names: tuple[str, ...] = ()) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{setting} is not a dictionary.")
    unknown = [name for name in given if names and name not in names]
    if unknown:
        raise ConfigurationError(f"{setting} has no {unknown[0]!r}; there are {', '.join(names)}.")
    return given


def _read_pace(
    values: Mapping[str, Any], setting: str, *, key: str, models: tuple[str, ...]
) -> Pace:
    if "PERIOD" in values and "RATE" not in values:
        raise ConfigurationError(f"{setting}['PERIOD'] is given without a RATE.")
    try:
        pace = Pace(key=key, models=models, **{name.lower(): each for name, each in values.items()})
        pace.flow_control()
    except InvalidOption as error:
        name = error.field.removeprefix("flow_control.").upper()
        raise ConfigurationError(f"{setting}[{name!r}]: {error.problem}.") from error
    return pace


def _flow_control_key(provider: str, name: str) -> str:
    """One that may be sent, and is no other's."""
    key = f"llm.{provider}.{name}"
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", key)[:200]
    if plain == key and "." not in provider:
        return key
    return f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _openai(key: str, base_url: str, options: Mapping[str, Any]) -> Route:
    headers = {"Authorization": f"Bearer {key}"}
    if options.get("ORGANIZATION"):
        headers["OpenAI-Organization"] = str(options["ORGANIZATION"])
    return chat_url(base_url or "https://api.openai.com/v1"), headers


def _anthropic(key: str, base_url: str, options: Mapping[str, Any]) -> Route:
    headers = {"x-api-key": key, "anthropic-version": ANTHROPIC_VERSION}
    return endpoint_url(base_url or "https://api.anthropic.com", "/messages"), headers


def _upstash(key: str, base_url: str, options: Mapping[str, Any]) -> Route:
    return HOSTED_LLM, {}


def _custom(key: str, base_url: str, options: Mapping[str, Any]) -> Route:
    # A server on the local network often wants no key at all.
    return chat_url(base_url), {"Authorization": f"Bearer {key}"} if key else {}


_ROUTES = {"openai": _openai, "anthropic": _anthropic, "upstash": _upstash, "custom": _custom}


def chat_url(base_url: str) -> str:
    """The chat-completions endpoint of an OpenAI-compatible base URL.

    >>> chat_url("https://h") == chat_url("https://h/v1/") == "https://h/v1/chat/completions"
    True
    """
    return endpoint_url(base_url, "/chat/completions")


def endpoint_url(base_url: str, endpoint: str) -> str:
    """``base_url`` may lack the version, end in it, or be the endpoint already; a query is kept."""
    parts = urlsplit(base_url.strip())
    path = re.sub(r"/{2,}", "/", parts.path).rstrip("/")
    if not path.endswith(endpoint):
        has_version = re.search(r"/v\d+[a-z0-9]*(/|$)", path)
        path += endpoint if has_version else f"/v1{endpoint}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _through_helicone(destination: str, headers: Mapping[str, str], key: str) -> Route:
    through = {**headers, "Helicone-Auth": f"Bearer {key}"}
    if destination == HOSTED_LLM:
        return HELICONE_UPSTASH_URL, {
            **through,
            "Authorization": f"Bearer {app_settings().qstash_token}",
        }
    parts = urlsplit(destination)
    through[HELICONE_TARGET] = f"{parts.scheme}://{parts.netloc}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{HELICONE_URL}{parts.path}{query}", through
