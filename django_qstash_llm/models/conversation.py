"""``Conversation``: a chat session whose history is its completed requests."""

from __future__ import annotations

import asyncio
import time
import uuid as uuids
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.db import connections, models, router, transaction
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..completions import BYTES_PER_TOKEN, weigh
from ..conf import app_settings, named
from ..exceptions import ConversationBusy
from .request import LLMRequest, LLMRequestQuerySet, State, Via

if TYPE_CHECKING:
    from ..chat import AsyncStream, Stream

T = TypeVar("T")
Message = dict[str, Any]
Turn = tuple[list[Message], Message | None]
"""What was asked, without what it repeated, and what was answered."""
Said = str | Sequence[Mapping[str, Any]]
"""What is said next: a text of the user's, or messages, as the answers to tool calls are."""

FIRST_PAGE = 32
"""Turns that are read at first where ``HISTORY`` has a bound; twice as many each time."""
LONGEST_PAUSE = 0.25
"""Seconds between two looks whether the turn before is over."""


class Conversation(models.Model):
    """What is said in it is a turn: ``ask`` durably, ``chat`` or ``stream`` for an answer at once.

    A turn carries what was said before: the questions of its completed requests with their answers,
    tool calls together with what the tools answered. ``HISTORY`` in ``QSTASH_LLM`` says how much:

    ``{}``
        All of it, which is all read anew for each turn. Where conversations are long, give a bound.
    ``{"MESSAGES": n}``
        The newest, n messages at most.
    ``{"TOKENS": n}``
        The newest, n tokens at most, of four bytes of JSON each; a file in them is 1000.

    The system prompt and what is said now are never counted and never left out. Of the rest whole
    exchanges are left out, the oldest first: a question, the tool calls that it led to, what the
    tools answered, and the answer stay together or go together.

    Turns have an order, and no two are written at once. ``chat`` and ``stream`` also wait until the
    one before them is answered, so that each knows it; ``ask`` does not wait for what may take hours.
    """

    uuid = models.UUIDField(_("uuid"), default=uuids.uuid4, unique=True, editable=False)
    title = models.CharField(_("title"), max_length=255, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="llm_conversations",
        verbose_name=_("user"),
    )
    system = models.TextField(_("system prompt"), blank=True)
    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)

    class Meta:
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.title or str(self.uuid)

    def may_use(self, user: Any) -> bool:
        """Whether ``user`` may go on with it: what ``MAY_USE_CONVERSATION`` says, or else its owner
        may, and of one without owner everybody. Asked of a ``user`` who is named in asking."""
        if rule := app_settings().may_use_conversation:
            return bool(named("MAY_USE_CONVERSATION", rule)(user, self))
        return self.user_id is None or (user is not None and user.pk == self.user_id)

    def history(self) -> list[Message]:
        """The messages so far, in the order they were asked: each question with its answer."""
        exchanges = _in_exchanges([*self._turns(), ([], None)])
        return [message for exchange in exchanges for message in exchange]

    def newest(self, most: int) -> list[tuple[LLMRequest, list[Message]]]:
        """The newest turns at most, whatever became of them, in the order they were asked: each
        request with the messages that were said in it. What was asked again stands there once."""
        rows = self.llm_requests.filter(resubmissions=None).order_by("-id")[:most]
        return [(row, _news(row.messages)) for row in reversed(rows)]

    # --- the next turn ---

    def ask(self, content: Said, **asked: Any) -> LLMRequest:
        """Go on with the conversation, durably: the answer comes by callback.

        ``asked``: further arguments of ``LLMRequest.objects.publish``. Raises ``PermissionDenied``
        for a ``user`` who may not use it.
        """
        asked = self._asked(asked)
        with self._lock():
            return self._rows.publish(self._messages(content), **asked)

    def chat(self, content: Said, *, patience: float | None = None, **asked: Any) -> LLMRequest:
        """The same, and wait for the answer: the completed request.

        ``patience``: seconds to wait for the turn before, ``CHAT_TIMEOUT`` by default. ``asked``:
        further arguments of ``LLMRequest.objects.chat``. Raises the same as both, and
        ``ConversationBusy``.
        """
        from .. import chat  # a stair that goes up, as in ``LLMRequest.objects.chat``

        return self._in_turn(chat.complete, content, patience, asked).llm_request

    def stream(self, content: Said, *, patience: float | None = None, **asked: Any) -> Stream:
        """The same as the answer comes, as ``LLMRequest.objects.stream``. Close what you do not
        read to its end: the next turn waits for it."""
        from .. import chat  # a stair that goes up, as above

        return self._in_turn(chat.open_stream, content, patience, asked)

    async def achat(
        self, content: Said, *, patience: float | None = None, **asked: Any
    ) -> LLMRequest:
        """``chat`` for async code."""
        from .. import chat  # a stair that goes up, as above

        return (await self._ain_turn(chat.acomplete, content, patience, asked)).llm_request

    async def astream(
        self, content: Said, *, patience: float | None = None, **asked: Any
    ) -> AsyncStream:
        """``stream`` for async code."""
        from .. import chat  # a stair that goes up, as above

        return await self._ain_turn(chat.aopen_stream, content, patience, asked)

    async def aask(self, content: Said, **asked: Any) -> LLMRequest:
        """``ask`` for async code."""
        return await sync_to_async(self.ask)(content, **asked)

    # --- turns ---

    @property
    def _using(self) -> str:
        return router.db_for_write(Conversation, instance=self)

    @property
    def _rows(self) -> LLMRequestQuerySet:
        return LLMRequest.objects.using(self._using)

    def _asked(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if "user" in asked and not self.may_use(asked["user"]):
            raise PermissionDenied(f"{asked['user']} may not use the conversation {self.uuid}.")
        return {"user": self.user, **asked, "conversation": self}

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Until it is left nobody else writes a turn: what was read of the history stays true."""
        using = self._using
        no_key = connections[using].features.has_select_for_no_key_update
        rows = Conversation.objects.using(using).filter(pk=self.pk)
        with transaction.atomic(using=using):
            list(rows.select_for_update(of=("self",), no_key=no_key).values_list("pk"))
            yield

    def _in_turn(
        self, begin: Callable[..., T], said: Said, patience: float | None, asked: dict[str, Any]
    ) -> T:
        llm_request = self._rows.for_chat([], self._asked(asked))
        for pause in _pauses(patience):
            try:
                return begin(llm_request, within=self._turn(llm_request, said))
            except ConversationBusy:
                # In a transaction of the caller's the one who is waited for might wait for us.
                if pause is None or connections[self._using].in_atomic_block:
                    raise
                time.sleep(pause)
        raise AssertionError  # pragma: no cover - the last pause is None

    async def _ain_turn(
        self,
        begin: Callable[..., Awaitable[T]],
        said: Said,
        patience: float | None,
        asked: dict[str, Any],
    ) -> T:
        def compose() -> LLMRequest:
            return self._rows.for_chat([], self._asked(asked))

        llm_request = await sync_to_async(compose)()
        for pause in _pauses(patience):
            try:
                return await begin(llm_request, within=self._turn(llm_request, said))
            except ConversationBusy:
                if pause is None:
                    raise
                # Not in the thread of the database, which the one who is waited for needs.
                await asyncio.sleep(pause)
        raise AssertionError  # pragma: no cover - as above

    @contextmanager
    def _turn(self, llm_request: LLMRequest, said: Said) -> Iterator[None]:
        """The place in which ``llm_request`` is written. Raises ``ConversationBusy``."""
        with self._lock():
            underway = self._rows.submitted().filter(
                conversation=self, via=Via.CHAT, deadline_at__gt=timezone.now()
            )
            if (before := underway.first()) is not None:
                raise ConversationBusy(f"{self.uuid}: {before.uuid} is being answered.")
            llm_request.messages = self._messages(said)
            yield

    # --- what was said ---

    def _messages(self, said: Said) -> list[Message]:
        """All that is sent with ``said``."""
        news = [{"role": "user", "content": said}] if isinstance(said, str) else [*map(dict, said)]
        *earlier, now = self._exchanges(news)
        system = [{"role": "system", "content": self.system}] if self.system else []
        kept = [message for exchange in _newest(earlier) for message in exchange]
        return [*system, *kept, *now]

    def _exchanges(self, news: list[Message]) -> list[list[Message]]:
        """As ``_in_exchanges``, of no more turns than are needed for what ``HISTORY`` keeps: each of
        them repeats what was said before it, so that all together weigh the square of it."""
        if not app_settings().history:
            return _in_exchanges([*self._turns(), (news, None)])
        turns: list[Turn | None] = []
        size, number = 0, FIRST_PAGE
        while True:
            page = self._turns(slice(size, size + number))
            turns, size = [*page, *turns], size + number
            exchanges = *earlier, now = _in_exchanges([*turns, (news, None)])
            is_full = len(_newest(earlier)) < len(earlier)
            # Of tools' answers the calls stand in an earlier turn, which may not be read yet.
            is_whole = not now or now[0].get("role") != "tool"
            if len(page) < number or (is_full and is_whole):
                return list(exchanges)
            number *= 2

    def _turns(self, newest: slice = slice(None)) -> list[Turn | None]:
        """The ``newest``, or all, in the order in which they were asked; None where nothing was
        answered that can be repeated."""
        # A forgotten question cannot be repeated, nor can its answer without it.
        completed = self.llm_requests.completed().exclude(messages=[]).order_by("-id")
        # What was asked again and answered was said once.
        completed = completed.exclude(resubmissions__state=State.COMPLETED)
        rows = completed.values_list("messages", "tool_calls", "completion", "refusal")[newest]
        return [_turn(*row) for row in reversed(rows)]


def _turn(asked: list[Message], calls: list[Any], completion: str, refusal: str) -> Turn | None:
    answer: Message = {"role": "assistant", "content": completion or refusal or None}
    if calls:
        return _news(asked), answer | {"tool_calls": calls}
    if answer["content"]:
        return _news(asked), answer
    return None  # providers refuse an empty message


def _in_exchanges(turns: list[Turn | None]) -> list[list[Message]]:
    """What was said, an exchange each: what stays together or goes together. The last begins with
    the last turn, or with the question whose tool calls that answers."""
    exchanges: list[list[Message]] = []
    open_calls: set[Any] = set()
    for asked, answer in filter(None, turns):
        answered = {each.get("tool_call_id") for each in asked if each.get("role") == "tool"}
        if open_calls and open_calls <= answered:
            exchanges[-1] += asked
        else:
            if open_calls:
                _leave_out_calls(exchanges)
            open_calls = set()
            if answered and answer:
                continue  # of calls that are not known any more
            exchanges.append([*asked])
        if answer:
            exchanges[-1].append(answer)
            calls = answer.get("tool_calls", ())
            open_calls = {call.get("id") for call in calls if isinstance(call, dict)}
    return exchanges


def _news(messages: list[Message]) -> list[Message]:
    """What was said after the last answer that a request repeats."""
    end = len(messages)
    # At the end it is no answer: so it was to begin, or the question would be taken for repeated.
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    answers = [i for i, each in enumerate(messages[:end]) if each["role"] == "assistant"]
    since = messages[answers[-1] + 1 if answers else 0 :]
    news = [message for message in since if message["role"] not in {"system", "developer"}]
    return news or messages[-1:]


def _leave_out_calls(exchanges: list[list[Message]]) -> None:
    """The last answer's calls, which nobody has answered, and with them all that led to nothing but
    them: providers refuse a call without its answer."""
    *before, answer = exchanges[-1]
    if answer["content"]:
        exchanges[-1] = [*before, {"role": "assistant", "content": answer["content"]}]
    else:
        exchanges.pop()


def _newest(exchanges: list[list[Message]]) -> list[list[Message]]:
    """Those that ``HISTORY`` keeps."""
    conf = app_settings()
    conf.check_history()
    if not conf.history:
        return exchanges
    [(unit, room)] = conf.history.items()
    kept = []
    for exchange in reversed(exchanges):
        room -= len(exchange) if unit == "MESSAGES" else _tokens(exchange)
        if room < 0:
            break
        kept.append(exchange)
    return kept[::-1]


def _tokens(messages: list[Message]) -> int:
    """About, and rather more: nobody but the provider knows its tokenizer."""
    return -(-weigh(messages) // BYTES_PER_TOKEN)


def _pauses(patience: float | None) -> Iterator[float | None]:
    """Seconds between two tries, longer each time; None after the last."""
    left = app_settings().chat_timeout if patience is None else patience
    pause = 0.01
    while left > 0:
        yield min(pause, left)
        left -= pause
        pause = min(pause * 1.5, LONGEST_PAUSE)
    yield None
