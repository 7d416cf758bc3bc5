"""What was spent, and how the budgets stand, for staff who may view it. Nothing is changed here."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponseBase, StreamingHttpResponse
from rest_framework.request import Request
from rest_framework.response import Response

from ..exceptions import InvalidRequest
from ..models import Budget, Spend
from ..reports import Report, budgets_to_json, csv_headers
from .requests import ReadView, door

FORMATS = ("json", "csv")


class SpendView(ReadView):
    """A ``Report`` as JSON or CSV. What is asked for wrongly is answered 400, with field and remedy."""

    model = Spend

    def get(self, request: Request) -> HttpResponseBase:
        given: dict[str, Any] = {
            # Twice the same name is as good as a comma between.
            name: ",".join(request.query_params.getlist(name))
            for name in request.query_params
        }
        try:
            wanted = given.pop("format", "json")
            if wanted not in FORMATS:
                raise InvalidRequest("format", f"{wanted[:40]!r}; give {' or '.join(FORMATS)}")
            report = Report.asked(given)
        except InvalidRequest as error:
            return Response({"detail": str(error), "field": error.field}, status=400)
        if wanted == "csv":
            return StreamingHttpResponse(report.csv(), headers=csv_headers(report))
        return Response(report.to_json())


class BudgetsView(ReadView):
    """How each budget stands."""

    model = Budget

    def get(self, request: Request) -> Response:
        return Response({"budgets": budgets_to_json(Budget.objects.all())})


spend = door(SpendView)
budgets = door(BudgetsView)
