from __future__ import annotations

from typing import Any

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash.options import NAME, is_integer
from ..exceptions import Refusal
from ..models import Queue
from .base import QStashView, object_of, plain


class _QueueView(QStashView):
    def queue(self, name: str) -> Queue:
        standing = Queue.objects.owned_by(self.account).standing().with_lag()
        queue = standing.filter(name=plain(name)).first()
        if queue is None:
            raise Refusal(404, f"queue {name} not found")
        return queue


class QueuesView(QStashView):
    def get(self, request: Request) -> Response:
        return Response(
            [
                queue.to_record().to_json()
                for queue in Queue.objects.owned_by(self.account).standing().with_lag()
            ]
        )

    def post(self, request: Request) -> Response:
        """Create or change. Without ``paused`` a paused queue goes on, as with QStash; without
        ``parallelism`` it keeps the one it has."""
        asked = object_of(request)
        name, paused = asked.get("queueName"), asked.get("paused", False)
        parallelism: Any = asked.get("parallelism")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise Refusal(400, "invalid queue name")
        if "parallelism" in asked and not (is_integer(parallelism) and 1 <= parallelism < 2**31):
            raise Refusal(400, "parallelism is not a whole number of at least 1")
        if not isinstance(paused, bool):
            raise Refusal(400, "paused is not a boolean")
        now = timezone.now()
        queue = Queue.objects.named([name], account=self.account, now=now)[name]
        queue.set_up(parallelism=parallelism, is_paused=paused, now=now)
        return Response({})


class QueueView(_QueueView):
    def get(self, request: Request, name: str) -> Response:
        return Response(self.queue(name).to_record().to_json())

    def delete(self, request: Request, name: str) -> Response:
        for queue in Queue.objects.owned_by(self.account).standing().filter(name=plain(name)):
            queue.discard(now=timezone.now())
        return Response({})


class PauseQueueView(_QueueView):
    def post(self, request: Request, name: str) -> Response:
        self.queue(name).pause(now=timezone.now())
        return Response({})


class ResumeQueueView(_QueueView):
    def post(self, request: Request, name: str) -> Response:
        self.queue(name).resume(now=timezone.now())
        return Response({})
