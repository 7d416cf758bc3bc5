"""``Asked``: what a caller of the OpenAI-compatible endpoint asks, and which provider is to answer it.

The same whether it came as a call of its own or as a line of a batch's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bodies import check_fit, check_links
from ..conf import app_settings
from ..exceptions import InvalidRequest, NoSuchModel
from ..providers import HOSTED_MODELS, get_provider
from . import inbox
from .caller import Caller
from .request import LLMRequest, Via

# Of a client or a proxy, not of a completion: followed, each would send a key somewhere else.
_NOT_TAKEN = {
    "api_base",
    "api_key",
    "base_url",
    "extra_body",
    "extra_headers",
    "extra_query",
    "organization",
}

# By which some gateways are told to ask other models than the one that is named.
_OTHER_MODELS = {"fallbacks", "models"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A body of ``chat/completions``."""

    caller: Caller
    body: dict[str, Any]
    """All of it, as it came."""
    provider: str
    model: str
    messages: list[Any]
    parameters: dict[str, Any]
    """What goes to the provider, under its own names and with its own values."""
    is_stream: bool
    is_background: bool

    def row(self, via: Via) -> LLMRequest:
        """Unsaved."""
        llm_request = inbox.new(
            LLMRequest,
            via=via,
            provider=self.provider,
            model=self.model,
            messages=self.messages,
            parameters=self.parameters,
            tenant=self.caller.tenant,
        )
        for name, value in self.caller.owner.items():
            setattr(llm_request, name, value)
        return llm_request


def read_asked(caller: Caller, body: dict[str, Any]) -> Asked:
    """Raises ``InvalidRequest`` that names the field, ``NoSuchModel`` and ``ConfigurationError``."""
    check_fit(body)
    for name in sorted(_NOT_TAKEN & body.keys()):
        raise InvalidRequest(name, "providers and their keys are this server's own")
    if caller.api_key is not None and caller.api_key.allowed_models:
        for name in sorted(_OTHER_MODELS & body.keys()):
            raise InvalidRequest(name, "this key may ask certain models only: name one as model")
    parameters = dict(body)
    model = parameters.pop("model", None)
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model", "give the name of a model")
    messages = parameters.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "give a list of at least one message")
    check_links(messages)
    is_stream, is_background = _flag(body, "stream"), _flag(body, "background")
    for name in ("stream", "background"):  # these two are for us
        parameters.pop(name, None)
    provider, model = choose_provider(caller, model)
    return Asked(
        caller=caller,
        body=body,
        provider=provider,
        model=model,
        messages=messages,
        parameters=parameters,
        is_stream=is_stream,
        is_background=is_background,
    )


def choose_provider(caller: Caller, name: str) -> tuple[str, str]:
    """Who is asked for the model ``name``, and under which name. Raises ``NoSuchModel`` and
    ``ConfigurationError``.

    ``provider/model`` says it; else the caller's key does; else the one provider that lists the
    model in its ``MODELS``; else it is ``DEFAULT_PROVIDER``.
    """
    conf = app_settings()
    prefix, slash, rest = name.partition("/")
    if slash and rest and prefix in {*conf.providers, "upstash"}:
        provider, model = prefix, rest
    else:
        provider, model = caller.provider or _lists(name) or conf.default_provider, name
    try:
        get_provider(provider).check_model(model)
    except InvalidRequest as error:
        raise NoSuchModel(name) from error
    if not caller.may_ask(provider, model):
        raise NoSuchModel(name)
    return provider, model


def listed_models() -> dict[str, tuple[str, ...]]:
    """Name of each provider -> the models that it alone may be asked; of most nobody says any."""
    listed = {}
    for name, options in app_settings().providers.items():
        is_upstash = "upstash" in (name, options.get("KIND"))
        listed[name] = tuple(options.get("MODELS") or (HOSTED_MODELS if is_upstash else ()))
    return listed


def _lists(model: str) -> str:
    named = [name for name, models in listed_models().items() if model in models]
    return named[0] if len(named) == 1 else ""


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(name, "give true or false")
