from __future__ import annotations

from typing import Any

from rest_framework.request import Request
from rest_framework.response import Response

from .. import filters
from ..filters import count_of, narrowed, page_of
from ..models import LogEntry
from .base import QStashView

MOST_PER_PAGE = 1000


class LogsView(QStashView):
    keys: tuple[str, ...] = ("logs", "events")

    def get(self, request: Request) -> Response:
        query = request.query_params
        rows = narrowed(
            LogEntry.objects.owned_by(self.account).with_messages(), query, filters.LOGS
        )
        count = count_of(query, default=100, most=MOST_PER_PAGE)
        page, cursor = page_of(rows, query, count=count, newest_first=True)
        entries = [entry.to_record().to_json() for entry in page]
        answer: dict[str, Any] = dict.fromkeys(self.keys, entries)
        return Response(answer | ({"cursor": cursor} if cursor else {}))


class EventsView(LogsView):
    keys = ("events",)
