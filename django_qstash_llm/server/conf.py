"""``QSTASH_SERVER = {...}``: read here and nowhere else, when first asked for.

``current()`` answers what is in force. The keys of the setting are the field names of
``ServerSettings`` in capitals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from ..qstash import Keys
from .exceptions import ConfigurationError

NAME = "QSTASH_SERVER"
MINUTE, HOUR, DAY = 60, 3600, 86_400
MEGABYTE = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Account:
    """Whose data it is. What one account publishes, no other sees."""

    name: str = ""
    """Empty for the account that the settings' own ``TOKEN`` is of."""
    token: str = field(default="", repr=False)
    read_only_token: str = field(default="", repr=False)
    current_signing_key: str = field(default="", repr=False)
    next_signing_key: str = field(default="", repr=False)

    @property
    def keys(self) -> Keys | None:
        if self.current_signing_key and self.next_signing_key:
            return Keys(self.current_signing_key, self.next_signing_key)
        return None


# Known to the whole world: what every QStash development server answers to.
DEVELOPMENT_ACCOUNTS = (
    Account(
        token="eyJVc2VySUQiOiJkZWZhdWx0VXNlciIsIlBhc3N3b3JkIjoiZGVmYXVsdFBhc3N3b3JkIn0=",
        current_signing_key="sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r",
        next_signing_key="sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs",
    ),
    Account(
        name="testUser1",
        token="eyJVc2VySUQiOiJ0ZXN0VXNlcjEiLCJQYXNzd29yZCI6InRlc3RQYXNzd29yZCJ9",
        current_signing_key="sig_7GVPjvuwsfqF65iC8fSrs1dfYruM",
        next_signing_key="sig_5NoELc3EFnZn4DVS5bDs2Nk4b7Ua",
    ),
    Account(
        name="testUser2",
        token="eyJVc2VySUQiOiJ0ZXN0VXNlcjIiLCJQYXNzd29yZCI6InRlc3RQYXNzd29yZCJ9",
        current_signing_key="sig_6jWGaWRxHsw4vMSPJprXadyvrybF",
        next_signing_key="sig_7qHbvhmahe5GwfePDiS5Lg3pi6Qx",
    ),
    Account(
        name="testUser3",
        token="eyJVc2VySUQiOiJ0ZXN0VXNlcjMiLCJQYXNzd29yZCI6InRlc3RQYXNzd29yZCJ9",
        current_signing_key="sig_5T8FcSsynBjn9mMLBsXhpacRovJf",
        next_signing_key="sig_7GFR4YaDshFcqsxWRZpRB161jguD",
    ),
)
DEVELOPMENT_TOKEN = DEVELOPMENT_ACCOUNTS[0].token
DEVELOPMENT_KEYS = Keys(
    DEVELOPMENT_ACCOUNTS[0].current_signing_key, DEVELOPMENT_ACCOUNTS[0].next_signing_key
)
PUBLIC_SECRETS = frozenset(
    secret
    for account in DEVELOPMENT_ACCOUNTS
    for secret in (account.token, account.current_signing_key, account.next_signing_key)
)
ACCOUNT_KEYS = {field.name.upper() for field in fields(Account)} - {"NAME"}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    token: str = field(default="", repr=False)
    """What callers must present. Under ``DEBUG`` the well-known development token."""
    read_only_token: str = field(default="", repr=False)
    """For those who may look and not touch."""
    current_signing_key: str = field(default="", repr=False)
    """Left out, keys are made once and kept in the database (``GET /v2/keys`` tells them)."""
    next_signing_key: str = field(default="", repr=False)
    accounts: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, hash=False)
    """More of them: name -> the four above, in capitals. Their data is kept apart."""
    region: str = "EU-CENTRAL-1"
    """What ``Upstash-Region`` says."""

    max_retries: int | None = 100
    """More are answered 412. None is no limit."""
    max_body: int = 10 * MEGABYTE
    """Bytes of a message (413 above it), and where a destination's response is cut."""
    max_batch_body: int = 100 * MEGABYTE
    max_batch_messages: int = 10_000
    max_delay: int = 365 * DAY
    """Seconds into the future; beyond is answered 412."""
    max_timeout: int = 2 * HOUR
    """Seconds per attempt. A message's own timeout can only shorten it."""

    allow_loopback: bool = False
    """Whether 127.0.0.1 may be a destination. Under ``DEBUG`` it may."""
    allow_private_destinations: bool = False
    """Whether 10.0.0.0/8 and its like may. Link-local addresses (cloud metadata) never may."""
    source_header_secrets: bool = False
    """Whether callbacks tell the original's ``Authorization`` and its like in ``sourceHeader``,
    as QStash does. Left off, those values say ``REDACTED``."""
    hosted_models_url: str = ""
    """The OpenAI-compatible base URL that answers the destination ``api/llm``."""
    hosted_models_key: str = field(default="", repr=False)
    hosted_models: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Model as it is asked for -> what the upstream calls it. Given, no others are taken; left
    out, every name is handed on as it is."""
    host_map: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Host -> base URL that is called in its place; ``*`` is every host. For development: message,
    signature and logs keep the public name."""

    gates: bool = True
    """Whether messages that ask a model, with a credential, wait for their provider's limits: learnt
    from its answers, shared by all engines. False is QStash's plain way, which finds out by failing."""
    gate_limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Host, or ``host/model`` -> what is known of its limits and held whatever is learnt: ``RPM``,
    ``TPM`` (a minute's requests and tokens), ``CONCURRENCY`` (calls at once), and ``GROUP``, the name
    under which models share theirs."""
    gate_patience: int = DAY
    """Seconds after it was due in which a provider's refusals cost a message none of its retries."""

    engine: str = "celery"
    """Who is rung when something is to be delivered and no engine runs in this process:
    ``celery`` sends the task ``qstash_server.deliver``; ``thread`` rings nobody, for sites where
    an engine of its own (``manage.py qstash_server``) polls."""
    concurrency: int = 1000
    """Deliveries in flight per engine."""
    lease: float = 30.0
    """Seconds after which a message whose engine gave no sign of life is delivered again."""
    grace: float = 25.0
    """Seconds that what is in flight has to finish in when an engine is stopped. What has not is
    delivered again by another: a call that was paid for is paid for twice."""
    poll: float = 0.5
    """Seconds between an engine's looks at the database when nobody rings."""
    transport: Any = None
    """An httpx transport, or the dotted path of one or of a callable that makes one."""

    message_retention: int = DAY
    """Seconds a finished message stays readable; at least 60."""
    dead_letter_retention: int = 14 * DAY
    log_retention: int = 14 * DAY

    @cached_property
    def known_accounts(self) -> tuple[Account, ...]:
        own = Account(
            token=self.token,
            read_only_token=self.read_only_token,
            current_signing_key=self.current_signing_key,
            next_signing_key=self.next_signing_key,
        )
        others = (
            Account(name=name, **{key.lower(): value for key, value in values.items()})
            for name, values in self.accounts.items()
        )
        return (own, *others)

    def keys_of(self, account: str) -> Keys | None:
        """The signing keys that the settings give an account."""
        keys = next((each.keys for each in self.known_accounts if each.name == account), None)
        return keys if keys and are_believed(keys.current, keys.next) else None

    def make_transport(self) -> Any:
        transport = self.transport
        if isinstance(transport, str):
            transport = import_string(transport)
        return transport() if isinstance(transport, type) else transport


KNOWN = {field.name.upper(): field for field in fields(ServerSettings)}
_overrides: dict[str, Any] = {}


def given() -> dict[str, Any]:
    """The setting as the site wrote it."""
    value = getattr(settings, NAME, {})
    if not isinstance(value, dict):
        raise ConfigurationError(f"{NAME} is a dictionary, not {type(value).__name__}")
    return value


@cache
def current() -> ServerSettings:
    values = {name.lower(): value for name, value in given().items() if name in KNOWN}
    if settings.DEBUG:
        values = _development_defaults(values | _overrides) | values
    return ServerSettings(**(values | _overrides))


def are_believed(*secrets: str) -> bool:
    """Whether these tokens or keys count. Those that everybody knows do so under ``DEBUG`` and
    where a command line gives the identity, and nowhere else: no WSGI server runs the system
    check that would say so."""
    is_development = settings.DEBUG or "token" in _overrides
    return is_development or not PUBLIC_SECRETS.intersection(secrets)


def development_identity() -> dict[str, Any]:
    """The well-known token and keys, and beside them the accounts that SDKs' suites use."""
    own, *others = DEVELOPMENT_ACCOUNTS
    return _settings_of(own) | {
        "accounts": {
            other.name: {key.upper(): value for key, value in _settings_of(other).items()}
            for other in others
        }
    }


def _settings_of(account: Account) -> dict[str, str]:
    return {
        "token": account.token,
        "current_signing_key": account.current_signing_key,
        "next_signing_key": account.next_signing_key,
    }


def _development_defaults(values: dict[str, Any]) -> dict[str, Any]:
    # An identity is whole or not at all: never the public keys beside a secret token.
    identity = {} if "token" in values else development_identity()
    return identity | {"allow_loopback": True}


def override(**values: Any) -> None:
    """What a command line says, over the settings, for as long as this process lives."""
    _overrides.update(values)
    current.cache_clear()


def forget_when_settings_change() -> None:
    setting_changed.connect(_forget, dispatch_uid="qstash_server.conf")


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting in {NAME, "DEBUG"}:
        current.cache_clear()


def expected_type(name: str) -> type | tuple[type, ...]:
    """What a value of the setting ``name`` must be, going by its default."""
    default = KNOWN[name].default
    if name in {"ACCOUNTS", "GATE_LIMITS", "HOSTED_MODELS", "HOST_MAP"}:
        return dict
    if default is MISSING or name == "TRANSPORT":
        return object
    if name == "MAX_RETRIES":
        return (int, type(None))
    return (int, float) if isinstance(default, float) else type(default)
