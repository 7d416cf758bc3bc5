"""What all calls have in common: who may, how often, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.http import HttpResponseBase
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.views import APIView

from ...conf import classes_of
from ...door import OwnView, outside_transactions
from ...models.api_key import Scope
from ..authentication import HasScope, KeyAuthentication, SiteAuthentication, caller_of
from ..refusals import Refusal, as_refusal


class OpenAIView(OwnView):
    """A call that needs a key, or whatever the site's own classes believe."""

    scope: str

    authentication_classes = (KeyAuthentication, SiteAuthentication)

    def get_permissions(self) -> list[Any]:
        return [HasScope(), *(each() for each in classes_of("openai_permissions"))]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        api_key, now = caller_of(request).api_key, timezone.now()
        if api_key is not None and not api_key.count_call(now=now):
            limit = f"{api_key.requests_per_minute} requests per minute"
            raise Refusal(
                429,
                "rate_limit_exceeded",
                f"Rate limit reached for this API key: {limit}.",
                headers={"Retry-After": str(60 - now.second)},
                should_retry=True,
            )

    def get_exception_handler(self) -> Any:
        return refuse


def refuse(error: Exception, context: Mapping[str, Any]) -> HttpResponseBase:
    return as_refusal(error).to_response()


class UnknownView(OpenAIView):
    scope = Scope.MODELS
    permission_classes = ()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise Refusal(404, "unknown_url", f"Invalid URL ({request.method} {request.path[:200]})")


def door(view: type[APIView]) -> Any:
    """With ``ATOMIC_REQUESTS`` what is written before a call would be unknown while it is made."""
    return outside_transactions(login_not_required(view.as_view()))


def is_asgi(request: Request) -> bool:
    """Then this view runs in a thread of its own, whose database connection is let go of, and it is
    the loop that waits for the provider: there a reader who waits costs next to nothing, and one who
    leaves is noticed."""
    return hasattr(request._request, "scope")


unknown = door(UnknownView)
