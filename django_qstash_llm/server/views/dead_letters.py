from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash import Accepted, InvalidOption, Refused
from .. import filters
from ..exceptions import Refusal
from ..filters import count_of, narrowed, page_of
from ..models import DeadLetter
from ..models.dead_letter import DeadLetterQuerySet
from .base import QStashView, ids_of, is_option, options_of

MOST_PER_PAGE = 100


class DeadLettersView(QStashView):
    def get(self, request: Request) -> Response:
        """A page of them, shorter where they are large."""
        page, cursor = self.selected(request, size=lambda letter: letter.size)
        letters = DeadLetter.objects.with_messages().in_bulk([letter.pk for letter in page])
        # One may have gone since.
        shown = [letters[letter.pk].to_record() for letter in page if letter.pk in letters]
        answer: dict[str, Any] = {"messages": [record.to_json() for record in shown]}
        return Response(answer | ({"cursor": cursor} if cursor else {}))

    def delete(self, request: Request) -> Response:
        page, cursor = self.selected(request)
        deleted = DeadLetter.objects.filter(pk__in=[letter.pk for letter in page]).discard()
        return Response({"deleted": deleted} | ({"cursor": cursor} if cursor else {}))

    def selected(
        self, request: Request, size: Callable[[DeadLetter], int] | None = None
    ) -> tuple[list[DeadLetter], str]:
        """Which they are: what they say is read where it is needed, and may be large."""
        query = request.query_params
        rows = DeadLetter.objects.owned_by(self.account).in_brief()
        if size is not None:
            rows = rows.sized()
        ids = ids_of(request, "dlqIds")
        if ids is None:
            rows = narrowed(rows, query, filters.DEAD_LETTERS, besides=self.besides(request))
        else:
            # Whatever filters stand beside.
            rows = rows.called(ids)
        count = count_of(query, default=MOST_PER_PAGE, most=MOST_PER_PAGE)
        if ids is not None and "count" not in query:
            count = len(ids) or 1
        return page_of(rows, query, count=count, newest_first=False, size=size)

    def besides(self, request: Request) -> list[str]:
        """Parameters that are no filters."""
        return []


class RetryDeadLettersView(DeadLettersView):
    http_method_names = ["post"]

    def besides(self, request: Request) -> list[str]:
        return list(filter(is_option, request.query_params))

    def post(self, request: Request) -> Response:
        page, cursor = self.selected(request)
        overrides = options_of(request)
        responses = []
        for letter in page:
            try:
                accepted = self.retried(letter.pk, overrides)
            except InvalidOption as error:
                responses.append(Refused(error.wire_text).to_json())
            except Refusal as error:
                responses.append(Refused(str(error)).to_json())
            else:
                responses.append(accepted.to_json())
        return Response({"responses": responses, "cursor": cursor}, status=201)

    def retried(self, pk: int, overrides: Mapping[str, str]) -> Accepted:
        # One at a time: with their bodies a page of them may be a gigabyte.
        letter = DeadLetter.objects.with_messages().without_answers().filter(pk=pk).first()
        if letter is None:
            raise Refusal(404, "dead letter not found")
        return letter.retry(overrides, now=timezone.now())


class DeadLetterView(QStashView):
    def get(self, request: Request, dlq_id: str) -> Response:
        letter = self.letter(dlq_id, DeadLetter.objects.with_messages())
        return Response(letter.to_record().to_json())

    def delete(self, request: Request, dlq_id: str) -> Response:
        letter = self.letter(dlq_id, DeadLetter.objects.in_brief())
        if not DeadLetter.objects.filter(pk=letter.pk).discard():
            raise Refusal(404, f"dead letter {dlq_id} not found")
        return Response({"deleted": 1})

    def letter(self, dlq_id: str, rows: DeadLetterQuerySet) -> DeadLetter:
        letter = rows.owned_by(self.account).called([dlq_id]).first()
        if letter is None:
            raise Refusal(404, f"dead letter {dlq_id} not found")
        return letter


class RetryDeadLetterView(DeadLetterView):
    http_method_names = ["post"]

    def post(self, request: Request, dlq_id: str) -> Response:
        letter = self.letter(dlq_id, DeadLetter.objects.with_messages().without_answers())
        accepted = letter.retry(options_of(request), now=timezone.now())
        return Response(accepted.to_json(), status=202 if accepted.is_duplicate else 201)
