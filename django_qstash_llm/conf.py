"""Every setting, read in one place, when first needed, and again when a test changes one.

What Upstash names keeps Upstash's name at top level (``QSTASH_TOKEN``); everything of ours is in
one dictionary, ``QSTASH_LLM``. Nothing here reads the environment, except ``from_env``, which a
project's settings module may call.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property, lru_cache
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

# What local servers are given, because clients insist on a key: lm-studio, not-needed, EMPTY. Blacked
# out it would be missing from answers that speak of LM Studio. A key is told from it by its length,
# its digits, its mix of cases or its prefix: of random keys of eight letters and digits one in some
# hundred looks like words, and providers' have twenty and more. Only a provider's key can be one;
# nobody gives QStash's token in such words but to keep it.
_PLACEHOLDER = re.compile(
    r"(?=.{,19}$)(?!sk[-_])(?:[a-z]{1,12}|[A-Z]{1,12}|[A-Z][a-z]{1,11})"
    r"(?:[-_. ](?:[a-z]{1,12}|[A-Z]{1,12}|[A-Z][a-z]{1,11}))*"
)

UPSTASH_URL = "https://qstash.upstash.io"
SHORTEST_HEALTH_TOKEN = 16
PAUSING = ("money", "rate", "daily")
"""The troubles that are everybody's of a provider or model, and so may pause its lane."""


def _is_itself(secret: str) -> bool:
    """Whether it stands in the ``repr`` of any text that holds it as it is."""
    return secret.isascii() and secret.isprintable() and not {"'", '"', "\\"} & set(secret)


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
    """``"provider/model"`` -> price per million tokens in USD: ``{"input": "0.15", "output": "0.6"}``.
    Undated; ``models.Price`` goes before it."""
    output_cap: Mapping[str, int] = field(default_factory=dict)
    """``"provider/model"`` -> tokens that an answer is taken to have at the most where its request does
    not say, for estimates and budgets. ``*`` stands for any letters."""
    deadline: float = 900.0
    """Seconds without news of a submitted request, its own timeout and delay apart, until QStash
    is asked what became of it."""
    announce_tries: int = 5
    """How often a trigger or receiver that raises is tried before a person has to look."""
    flow_control: str = "off"
    """What paces the requests that name no flow control of their own: ``off`` nothing,
    ``configured`` the providers' ``FLOW_CONTROL``, ``learned`` also what their answers say."""
    learned_share: float = 0.9
    """How much of a learned limit is used: others may be at it, and windows do not begin alike."""
    pause_on: tuple[str, ...] = ("money", "rate", "daily")
    """The troubles over which a lane is paused without a person; empty is none."""
    pause_from: float = 60.0
    """Seconds that a provider must ask to wait for, so that its lane is paused for them."""
    store_messages: str = "full"
    """What is kept of a finished request's messages: ``full``, ``hashed`` (their SHA-256) or
    ``none``. See ``models.forgetting``."""
    retention_days: int | None = None
    """Days after which ``llm_purge`` forgets the texts of what is finished; None keeps them."""
    orphan_retention_days: int = 30
    """Days after which ``llm_purge`` deletes callbacks that could not be read or belong to nothing."""
    health_late: float = 120.0
    """Seconds that what is due may wait for a worker, until the health page says it is late."""
    health_token: str = field(default="", repr=False)
    """Who shows it as a bearer token sees the figures of the health page; 16 characters or more.
    Empty, only the staff does."""
    chat_timeout: float = 540.0
    """Seconds for a whole answer of the Chat API, for a request that names none."""
    chat_connect_timeout: float = 5.0
    """Seconds of them to be connected to the provider."""
    chat_read_timeout: float = 120.0
    """Seconds that a stream may say nothing before it counts as stalled."""
    history: Mapping[str, int] = field(default_factory=dict)
    """What a conversation repeats of what was said: ``{}`` is all of it, ``{"MESSAGES": n}`` the
    last n messages at most, ``{"TOKENS": n}`` about so many tokens. See ``Conversation``."""
    may_use_conversation: str = ""
    """Dotted path to a function of a user and a conversation: whether the one may go on with the
    other. Empty, its owner may."""
    openai_authentication: tuple[str, ...] = ()
    """Dotted paths of DRF authentication classes, for callers of the OpenAI-compatible endpoint who
    show none of our API keys: ``rest_framework.authentication.SessionAuthentication``."""
    openai_permissions: tuple[str, ...] = ()
    """Dotted paths of DRF permission classes that every caller of that endpoint has to pass as well."""
    openai_takes_qstash_token: bool = False
    """Whether ``QSTASH_TOKEN`` is a key there too, as the ``qstash`` client's ``chat`` shows it."""
    openai_max_body_bytes: int = 20_000_000
    """A larger body is refused there with 413, and a longer line of a batch's file fails the batch.
    Images travel in it."""
    openai_max_file_bytes: int = 200_000_000
    """A larger file is refused there with 413; OpenAI takes as much for a batch."""
    openai_max_batch_lines: int = 50_000
    """A batch of more requests fails; OpenAI takes as many."""
    budgets_allow_unpriced: bool = False
    """Whether a budget that refuses lets pass what it has no price for. It then counts as nothing."""
    tenant: Any = ""
    """A function of an unsaved request, or the dotted path to one: the tenant of a request that names
    none. It may answer ``""`` or None."""
    qstash_message_price: str = "0.00001"
    """USD that QStash asks for a message: 1 USD for 100,000 is Upstash's pay-as-you-go. Empty is
    unknown, "0" is what your own server asks."""
    transport: Any = field(default=None, repr=False)
    """An httpx transport, or the dotted path to one, for the way to QStash."""
    chat_transport: Any = field(default=None, repr=False)
    """The same for the Chat API's way to providers; of async calls an async one."""

    qstash_url: str = UPSTASH_URL
    qstash_token: str = field(default="", repr=False)
    qstash_current_signing_key: str = field(default="", repr=False)
    qstash_next_signing_key: str = field(default="", repr=False)

    @property
    def signing_keys(self) -> list[str]:
        """Current, then next. An absent one keeps its place and is believed by nobody."""
        return [self.qstash_current_signing_key, self.qstash_next_signing_key]

    @cached_property
    def secrets(self) -> list[str]:
        """Every key of ours, the longest first, without such as are no secret: see ``_PLACEHOLDER``.

        Also where the settings are wrong: that is told to people, and no key with it.
        """
        keys = [self.qstash_token, *self.signing_keys, str(self.health_token)]
        for provider in self.providers.values() if isinstance(self.providers, Mapping) else ():
            options = provider if isinstance(provider, Mapping) else {"API_KEY": provider}
            given = [str(options.get(name) or "") for name in ("API_KEY", "HELICONE_API_KEY")]
            keys += [key for key in given if not _PLACEHOLDER.fullmatch(key.strip())]
        return sorted((key.strip() for key in keys if len(key.strip()) >= 8), key=len, reverse=True)

    @cached_property
    def secrets_in_bytes(self) -> list[bytes]:
        """The same as they stand in what comes over the wire."""
        return [secret.encode() for secret in self.secrets]

    @cached_property
    def built_providers(self) -> dict[str, Any]:
        """Name -> ``providers.Provider``, of those that have been asked for."""
        return {}

    @cached_property
    def found_prices(self) -> dict[tuple[str, tuple[str, ...]], Any]:
        """Provider and names of a model -> what was found for it in ``prices``: see ``pricing``."""
        return {}

    def without_secrets(self, text: str, *, limit: int | None = None) -> str:
        """``text`` of others with our keys blacked out: some repeat the key they refuse.

        It is cut only then: of a key that the cut goes through nearly all might stay, and nothing
        would know it. Text that is cleaned is cleaned before, for the same reason.
        """
        for secret in self.secrets:
            text = text.replace(secret, "[redacted]")
        return text[:limit]

    def without_secrets_in(self, value: Any) -> Any:
        """The same for all text in ``value``, decoded JSON."""
        return self._blacked_out(value) if self.may_hold_secrets(value) else value

    def may_hold_secrets(self, value: Any) -> bool:
        """Whether text in ``value`` needs to be looked at: a look at all of it at once is a tenth of
        the work, and every callback is looked at."""
        if self._is_any_secret_hidden:
            return True
        text = value if isinstance(value, str) else repr(value)
        return any(secret in text for secret in self.secrets)

    @cached_property
    def _is_any_secret_hidden(self) -> bool:
        """By ``repr``, which writes some characters in another way."""
        return not all(map(_is_itself, self.secrets))

    def _blacked_out(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.without_secrets(value)
        if isinstance(value, dict):
            return {self._blacked_out(key): self._blacked_out(each) for key, each in value.items()}
        return [*map(self._blacked_out, value)] if isinstance(value, list) else value

    @cached_property
    def mistyped(self) -> dict[str, tuple[str, str]]:
        """Settings of a wrong type: what is wrong with each in a sentence, and what to give instead.

        The values are not told: one may hold a key.
        """
        problems: dict[str, tuple[str, str]] = {}
        for field_ in dataclasses.fields(self):
            kind, *nullable = str(field_.type).partition("[")[0].split(" | ")
            value = getattr(self, field_.name)
            if kind not in _KINDS or (nullable and value is None):
                continue
            types, words = _KINDS[kind]
            setting = f"QSTASH_LLM[{field_.name.upper()!r}]"
            # To Python a bool is a number.
            if not isinstance(value, types) or isinstance(value, bool) != (types is bool):
                problems[field_.name] = f"{setting} is a {type(value).__name__}.", f"Give {words}."
            elif isinstance(value, list | tuple) and not all(isinstance(x, str) for x in value):
                problems[field_.name] = f"{setting} holds what is no text.", "Give a list of texts."
        return problems

    def callback_url(self, uuid: object) -> str:
        """Where QStash tells about the request ``uuid``. Raises ``ConfigurationError``."""
        return self._published("callback", uuid)

    def callback_urls(self, uuid: object) -> set[str]:
        """Every spelling under which we may have published the callback of ``uuid``."""
        return self._spellings("callback", uuid)

    def ping_url(self, nonce: object) -> str:
        """Where the doctor has QStash send its ping. Raises ``ConfigurationError``."""
        return self._published("ping", nonce)

    def ping_urls(self, nonce: object) -> set[str]:
        """The same as ``callback_urls`` for a ping."""
        return self._spellings("ping", nonce)

    def _published(self, door: str, uuid: object) -> str:
        problem = callback_base_url_problem(self.callback_base_url)
        if problem:
            raise ConfigurationError(problem)
        return f"{self.callback_base_url.rstrip('/')}/{door}/{uuid}/"

    def _spellings(self, door: str, uuid: object) -> set[str]:
        bases = [self.callback_base_url, *self.former_callback_base_urls]
        return {
            f"{base.rstrip('/')}/{door}/{uuid}{slash}"
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
        if not is_http_url(self.qstash_url):
            raise ConfigurationError(f"QSTASH_URL is {self.qstash_url!r}, not an http(s) URL.")
        self.callback_url("")
        self.check_storing()
        self.check_pacing()

    def check_types(self) -> None:
        """Raise ``ConfigurationError`` unless every setting is of its type."""
        for problem, remedy in self.mistyped.values():
            raise ConfigurationError(f"{problem} {remedy}")

    def check_storing(self) -> None:
        """Raise ``ConfigurationError`` unless it is clear what is kept of a finished request.

        Nothing is guessed: one guess would keep what was to go, the other lose what was to stay.
        """
        if self.store_messages not in ("full", "hashed", "none"):
            raise ConfigurationError(
                f"QSTASH_LLM['STORE_MESSAGES'] is {self.store_messages!r}; "
                "give 'full', 'hashed' or 'none'."
            )

    def check_pacing(self) -> None:
        """Raise ``ConfigurationError`` unless it is clear what paces requests, and what pauses them."""
        for name in ("flow_control", "learned_share", "pause_on", "pause_from"):
            if name in self.mistyped:
                raise ConfigurationError(" ".join(self.mistyped[name]))
        if self.flow_control not in ("off", "configured", "learned"):
            raise ConfigurationError(
                f"QSTASH_LLM['FLOW_CONTROL'] is {self.flow_control!r}; "
                "give 'off', 'configured' or 'learned'."
            )
        if not 0 < self.learned_share <= 1:
            raise ConfigurationError(
                f"QSTASH_LLM['LEARNED_SHARE'] is {self.learned_share}; give more than 0, 1 at most."
            )
        if unknown := [word for word in self.pause_on if word not in PAUSING]:
            raise ConfigurationError(
                f"QSTASH_LLM['PAUSE_ON'] holds {unknown[0]!r}; there are {', '.join(PAUSING)}."
            )
        if self.pause_from <= 0:
            raise ConfigurationError(
                f"QSTASH_LLM['PAUSE_FROM'] is {self.pause_from}; give more than 0 seconds, or leave "
                "'rate' and 'daily' out of PAUSE_ON."
            )

    @property
    def message_price(self) -> Decimal | None:
        """USD for a message of QStash's; None where it is unknown. Raises ``ConfigurationError``."""
        given = self.qstash_message_price
        if given == "":
            return None
        try:
            price = Decimal(given)
        except (InvalidOperation, TypeError, ValueError):
            price = Decimal("NaN")
        if not price.is_finite() or price < 0:
            raise ConfigurationError(
                f"QSTASH_LLM['QSTASH_MESSAGE_PRICE'] is {given!r}; give USD per message as a text, as "
                "in '0.00001', or '' where it is not known."
            )
        return price

    def check_tenant(self) -> None:
        """Raise ``ConfigurationError`` unless ``TENANT`` is a function, or names one."""
        if self.tenant and not callable(named("TENANT", self.tenant)):
            raise ConfigurationError(
                f"QSTASH_LLM['TENANT'] is {self.tenant!r}; give a function of an LLMRequest that "
                "answers its tenant, or the dotted path to one."
            )

    def tenant_of(self, llm_request: Any) -> str:
        """What ``TENANT`` says of ``llm_request``. Raises ``ConfigurationError``, also where the
        function fails: asked without its tenant, a request would pass by the tenant's budget."""
        if not self.tenant:
            return ""
        self.check_tenant()
        tenant_of = named("TENANT", self.tenant)
        name = getattr(tenant_of, "__qualname__", repr(tenant_of))
        try:
            tenant = tenant_of(llm_request)
        # Whatever the site's own function raises.
        except Exception as error:
            raise ConfigurationError(
                f"QSTASH_LLM['TENANT'], {name}, raised {type(error).__name__} when it was asked for the "
                "tenant of a request."
            ) from error
        if tenant is None:
            return ""
        if not isinstance(tenant, str) or len(tenant) > 255:
            raise ConfigurationError(
                f"QSTASH_LLM['TENANT'], {name}, answered a {type(tenant).__name__}; give a text of at "
                "most 255 characters, or None for no tenant."
            )
        return tenant

    def check_history(self) -> None:
        """Raise ``ConfigurationError`` unless it is clear what a conversation repeats."""
        is_clear = isinstance(self.history, Mapping) and len(self.history) <= 1
        for unit, most in self.history.items() if is_clear else ():
            is_whole = isinstance(most, int) and not isinstance(most, bool) and most >= 0
            is_clear = unit in ("MESSAGES", "TOKENS") and is_whole
        if not is_clear:
            raise ConfigurationError(
                f"QSTASH_LLM['HISTORY'] is {self.history!r}; give {{}}, {{'MESSAGES': n}} or "
                "{'TOKENS': n}."
            )


# The annotations of our settings -> what may be given, and how it is called.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a text"),
    "tuple": ((list, tuple), "a list or tuple"),
    "Mapping": (Mapping, "a dictionary"),
}

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
    """The settings in force. Raises ``ConfigurationError`` on a key that is none of ours.

    Not on a wrong type: what does not need that setting goes on, and a callback is stored first.
    """
    ours = getattr(settings, "QSTASH_LLM", {})
    if not isinstance(ours, Mapping):
        raise ConfigurationError("QSTASH_LLM is not a dictionary.")
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


def classes_of(name: str) -> list[type[Any]]:
    """The classes that the setting ``name`` names. Raises ``ConfigurationError``."""
    setting = f"QSTASH_LLM[{name.upper()!r}]"
    found = []
    for path in getattr(app_settings(), name):
        try:
            found.append(import_string(path))
        except ImportError as error:
            raise ConfigurationError(f"{setting}: there is no {path!r}: {error}") from error
        if not isinstance(found[-1], type):
            raise ConfigurationError(f"{setting}: {path!r} is no class.")
    return found


def unknown_keys(ours: Mapping[str, Any]) -> list[str]:
    """One sentence for each key of ``QSTASH_LLM`` that we do not know."""
    problems = []
    for key in ours:
        if key not in OUR_NAMES:
            close = difflib.get_close_matches(str(key).upper(), OUR_NAMES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"QSTASH_LLM has no setting {key!r}.{hint}")
    return problems


def is_http_url(url: object) -> bool:
    """Whether it is the absolute URL of a host that can be named so."""
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port that is none
        return False


def callback_base_url_problem(base_url: str) -> str:
    """What is wrong with ``CALLBACK_BASE_URL``; empty when nothing is."""
    name = "QSTASH_LLM['CALLBACK_BASE_URL']"
    if not base_url:
        return f"{name} is not set: answers would have nowhere to go."
    if not is_http_url(base_url):
        return f"{name} is {base_url!r}, which is not an absolute http(s) URL."
    parts = urlsplit(base_url)
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
    return new_client(conf.qstash_url)


def new_client(base_url: str) -> Client:
    """A client for QStash at another place than the settings say: see ``qstash_client``."""
    conf = app_settings()
    return Client(
        conf.qstash_token,
        base_url=base_url,
        timeout=conf.submit_timeout,
        transport=named("TRANSPORT", conf.transport),
        redact=conf.without_secrets,
    )


def named(name: str, value: Any) -> Any:
    """What the setting ``name`` means, a thing or the dotted path to one. Raises
    ``ConfigurationError``."""
    if not isinstance(value, str):
        return value
    try:
        return import_string(value)
    except ImportError as error:
        raise ConfigurationError(
            f"QSTASH_LLM[{name!r}] is {value!r}, and there is no such thing: {error}"
        ) from error


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
    if kind.startswith("bool"):
        return env.bool(name)
    if kind.startswith("tuple"):
        return tuple(env.list(name))
    if kind.startswith("Mapping"):
        return env.json(name)
    return env.ENVIRON[name]
