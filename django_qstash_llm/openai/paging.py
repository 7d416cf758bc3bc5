"""Lists in pages: ``limit``, ``after``, ``order``, and what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from django.db import models
from django.http import JsonResponse
from rest_framework.request import Request

from ..exceptions import InvalidRequest

Row = TypeVar("Row", bound=models.Model)


def page_of(
    request: Request, rows: models.QuerySet[Row], *, most: int, usual: int, prefix: str, by: str
) -> tuple[list[Row], bool]:
    """One page of ``rows``, newest first unless ``order`` is ``asc``, and whether there are more.
    ``by``: where their UUIDs stand. Raises ``InvalidRequest``."""
    limit = _limit(request, most=most, usual=usual)
    order = request.query_params.get("order") or "desc"
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "give 'asc' or 'desc'")
    if after := request.query_params.get("after"):
        uuid = uuid_of(after, prefix)
        last = rows.filter(**{by: uuid}).values_list("pk", flat=True).first() if uuid else None
        if last is None:
            raise InvalidRequest("after", "give the id of one of the list")
        rows = rows.filter(**{"pk__gt" if order == "asc" else "pk__lt": last})
    found = list(rows.order_by("pk" if order == "asc" else "-pk")[: limit + 1])
    return found[:limit], len(found) > limit


def listed(page: list[Row], has_more: bool, told: Callable[[Row], dict[str, Any]]) -> JsonResponse:
    items = [told(row) for row in page]
    return JsonResponse(
        {
            "object": "list",
            "data": items,
            "first_id": items[0]["id"] if items else None,
            "last_id": items[-1]["id"] if items else None,
            "has_more": has_more,
        }
    )


def uuid_of(name: str, prefix: str) -> UUID | None:
    """The row's of an id like ``file-…``; None of what is no id of ours."""
    shown = name.removeprefix(prefix)
    if shown == name or len(shown) != 32:
        return None
    try:
        return UUID(hex=shown)
    except ValueError:
        return None


def _limit(request: Request, *, most: int, usual: int) -> int:
    given = request.query_params.get("limit") or str(usual)
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= most:
        raise InvalidRequest("limit", f"give a whole number, 1 to {most}")
    return int(given[:9])
