"""``models``: what a caller may ask, as far as the settings name it."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponseBase, JsonResponse
from rest_framework.request import Request

from ...conf import app_settings
from ...exceptions import ConfigurationError, NoSuchModel
from ...models.api_key import Scope
from ...models.asked import choose_provider, listed_models
from ...models.caller import Caller
from ..authentication import caller_of
from .base import OpenAIView, door


class ModelsView(OpenAIView):
    scope = Scope.MODELS
    http_method_names = ["get", "head"]

    def get(self, request: Request) -> HttpResponseBase:
        listed = [_told(name, provider) for name, provider in _models(caller_of(request)).items()]
        return JsonResponse({"object": "list", "data": listed})


class ModelView(OpenAIView):
    scope = Scope.MODELS
    http_method_names = ["get", "head"]

    def get(self, request: Request, name: str) -> HttpResponseBase:
        provider = _models(caller_of(request)).get(name)
        if provider is None:
            raise NoSuchModel(name)
        return JsonResponse(_told(name, provider))


def _models(caller: Caller) -> dict[str, str]:
    """Each name that may be asked for, and who answers."""
    conf = app_settings()
    names = {
        conf.default_model,
        *conf.prices,
        *(caller.api_key.allowed_models if caller.api_key else ()),
    }
    for provider, listed in listed_models().items():
        names |= {f"{provider}/{model}" for model in listed}
    found = {}
    for name in sorted(each for each in names if not each.endswith("*")):
        try:
            provider, _model = choose_provider(caller, name)
        except (NoSuchModel, ConfigurationError):
            # One that is set up wrongly keeps nobody from the others.
            continue
        found[name] = provider
    return found


def _told(name: str, provider: str) -> dict[str, Any]:
    # When a model was made, no setting says.
    return {"id": name, "object": "model", "created": 0, "owned_by": provider}


models = door(ModelsView)
model = door(ModelView)
