"""What a caller asks: their body made into a row of ours, and which provider is to answer it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rest_framework.request import Request

from ..conf import app_settings
from ..exceptions import InvalidRequest
from ..models import LLMRequest
from ..models.request import Via
from ..providers import HOSTED_MODELS, get_provider
from .authentication import Caller, caller_of
from .body import check_links, invalid, object_of
from .refusals import no_such_model

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
    """A call of ``chat/completions``."""

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
        return LLMRequest(
            via=via,
            provider=self.provider,
            model=self.model,
            messages=self.messages,
            parameters=self.parameters,
            user=self.caller.user,
            tenant=self.caller.tenant,
            api_key=self.caller.api_key,
        )


def read(request: Request) -> Asked:
    """Raises ``Refusal``."""
    body, caller = object_of(request), caller_of(request)
    for name in sorted(_NOT_TAKEN & body.keys()):
        raise invalid(name, "providers and their keys are this server's own")
    if caller.api_key is not None and caller.api_key.allowed_models:
        for name in sorted(_OTHER_MODELS & body.keys()):
            raise invalid(name, "this key may ask certain models only: name one as model")
    parameters = dict(body)
    model = parameters.pop("model", None)
    if not isinstance(model, str) or not model:
        raise invalid("model", "give the name of a model")
    messages = parameters.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "give a list of at least one message")
    check_links(messages)
    is_stream = _flag(body, "stream")
    is_background = _flag(body, "background") or _prefers_async(request)
    for name in ("stream", "background"):  # these two are for us
        parameters.pop(name, None)
    if is_stream and is_background:
        raise invalid("stream", "what is answered in the background cannot be streamed")
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
    """Who is asked for the model ``name``, and under which name. Raises ``Refusal``.

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
        raise no_such_model(name) from error
    if not caller.may_ask(provider, model):
        raise no_such_model(name)
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
    raise invalid(name, "give true or false")


def _prefers_async(request: Request) -> bool:
    """RFC 7240."""
    preferences = re.split("[,;]", request.headers.get("Prefer", ""))
    return "respond-async" in {each.strip().lower() for each in preferences}
