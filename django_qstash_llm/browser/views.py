"""One conversation: what was said, and what is said next."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import close_old_connections
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    HttpResponseNotModified,
    HttpResponseRedirect,
)
from django.shortcuts import render
from django.utils.http import url_has_allowed_host_and_scheme
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_http_methods

from ..door import outside_transactions
from ..exceptions import (
    BudgetExceeded,
    ChatFailed,
    ConfigurationError,
    ConversationBusy,
    InvalidRequest,
)
from ..models import Conversation
from . import turns
from .events import Tell, respond

logger = logging.getLogger(__name__)


# With ATOMIC_REQUESTS what is written before a call would be unknown while it is made.
@outside_transactions
@csrf_protect
@require_http_methods(["GET", "HEAD", "POST"])
def conversation(request: HttpRequest, uuid: UUID) -> HttpResponseBase:
    """``GET``: its turns, a piece of HTML. ``POST``: say what the form's field ``said`` holds.

    ``way=ask`` asks durably, ``way=stream`` for an answer at once. To who accepts
    ``text/event-stream`` it is told as it comes, in events whose data is JSON: ``chunk``, a text;
    ``failed``, a sentence; ``asked`` or ``answered``, the request's id. A form without JavaScript is
    answered when all of the answer is there, by a redirect to its field ``next``.
    """
    found = Conversation.objects.select_related("user").filter(uuid=uuid).first()
    # Who may not use it need not learn that it is there.
    if found is None or not found.may_use(getattr(request, "user", None)):
        raise Http404
    return _say(request, found) if request.method == "POST" else _show(request, found)


def _show(request: HttpRequest, found: Conversation) -> HttpResponseBase:
    etag = turns.etag(found)
    if request.headers.get("If-None-Match") == etag:
        response: HttpResponse = HttpResponseNotModified()
    else:
        response = render(request, "django_qstash_llm/turns.html", turns.context(found))
    response["ETag"] = etag
    response["Cache-Control"] = "private, no-cache"
    return response


def _say(request: HttpRequest, found: Conversation) -> HttpResponseBase:
    said = request.POST.get("said", "").strip()
    way = request.POST.get("way", "stream")
    if not said or way not in ("ask", "stream"):
        field = "way: give ask or stream" if said else "said: give a text"
        return HttpResponse(field, status=400, content_type="text/plain; charset=utf-8")
    user = getattr(request, "user", None)
    asked = {"user": user} if user is not None and user.is_authenticated else {}
    if "text/event-stream" not in request.headers.get("Accept", ""):
        return _answer_form(request, found, said, way, asked)

    async def tell_of_it(tell: Tell) -> None:
        try:
            await (_ask if way == "ask" else _stream)(found, said, asked, tell)
        # The response has begun: it has no status left by which a fault of ours could be told.
        except Exception as error:
            tell("failed", _sentence(error))
        finally:
            # The threads that the loop asks are in no request at whose end Django would do this.
            await sync_to_async(close_old_connections)()

    return respond(request, tell_of_it)


async def _ask(found: Conversation, said: str, asked: dict[str, Any], tell: Tell) -> None:
    llm_request = await found.aask(said, **asked)
    tell("asked", str(llm_request.uuid))


async def _stream(found: Conversation, said: str, asked: dict[str, Any], tell: Tell) -> None:
    async with await found.astream(said, **asked) as stream:
        async for chunk in stream:
            if chunk.text:
                tell("chunk", chunk.text)
    tell("answered", str(stream.llm_request.uuid))


def _answer_form(
    request: HttpRequest, found: Conversation, said: str, way: str, asked: dict[str, Any]
) -> HttpResponseBase:
    try:
        (found.ask if way == "ask" else found.chat)(said, **asked)
    except ChatFailed:
        pass  # its row says so, and the page shows it
    except (BudgetExceeded, ConversationBusy, ConfigurationError, InvalidRequest) as error:
        status = _STATUSES.get(type(error), 500)
        return HttpResponse(
            _sentence(error), status=status, content_type="text/plain; charset=utf-8"
        )
    back = request.POST.get("next", "")
    is_ours = url_has_allowed_host_and_scheme(
        back, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return HttpResponseRedirect(back if is_ours else request.path)


_STATUSES: dict[type[Exception], int] = {BudgetExceeded: 429, ConversationBusy: 409}


def _sentence(error: Exception) -> str:
    """For who asked; the reasons are for who runs the site."""
    if isinstance(error, BudgetExceeded):
        logger.warning("A turn was not asked: %s", error)
        return _("What may be spent on this is spent. Ask again later.")
    if isinstance(error, ConversationBusy):
        return _("Another question is still being answered. Ask again in a moment.")
    if not isinstance(error, ChatFailed):
        logger.error("A turn cannot be asked: %s", error, exc_info=error)
    return _("No whole answer came. Ask again.")
