"""Gates, which QStash has not: ours to list and to resume, for apps that publish here."""

from __future__ import annotations

from typing import Any

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ..counting import gates_with_counts
from ..exceptions import Refusal
from ..models import Gate
from ..models.queue import milliseconds
from .base import QStashView


class GatesView(QStashView):
    def get(self, request: Request) -> Response:
        """What is known of providers' limits, and how many wait for them."""
        gates = gates_with_counts().filter(account=self.account).order_by("pk")
        return Response([_record(gate) for gate in gates])


class ResumeGatesView(QStashView):
    def post(self, request: Request) -> Response:
        """Resume what stands still for want of money at ``host``: somebody paid. Answers how many
        gates that were; what a person paused is that person's to resume."""
        host = request.query_params.get("host", "")
        if not host:
            raise Refusal(400, "give the host whose gates to resume")
        gates = list(Gate.objects.troubled().filter(account=self.account, host=host[:300].lower()))
        for gate in gates:
            gate.resume(now=timezone.now())
        return Response({"resumed": len(gates)})


def _record(gate: Gate) -> dict[str, Any]:
    return {
        "host": gate.host,
        "group": gate.group,
        "isPaused": gate.is_paused,
        "trouble": gate.trouble,
        "words": gate.words,
        "opensAt": milliseconds(gate.opens_at),
        "waitListSize": gate.wait_list_size,
        "parallelismCount": gate.calls,
        "letIn": gate.let_in,
        "refused": gate.refused,
    }
