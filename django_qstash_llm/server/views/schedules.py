from __future__ import annotations

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash import Message as WireMessage
from ...qstash.options import NAME
from .. import conf
from ..exceptions import Refusal
from ..models import Schedule
from ..targets import headers_of, target_of
from .base import QStashView, body_of, caller_ip_of, plain


class SchedulesView(QStashView):
    def get(self, request: Request) -> Response:
        schedules = Schedule.objects.owned_by(self.account).listed()
        return Response([record.to_json() for record in Schedule.to_records(schedules)])


class _OneScheduleView(QStashView):
    def schedule(self, schedule_id: str) -> Schedule:
        rows = Schedule.objects.owned_by(self.account)
        schedule = rows.filter(schedule_id=plain(schedule_id)).first()
        if schedule is None:
            raise Refusal(404, f"schedule {schedule_id} not found")
        return schedule


class ScheduleView(_OneScheduleView):
    """What follows is a destination where one is made, and else an id."""

    def post(self, request: Request) -> Response:
        """Create, or overwrite the one by the same id."""
        now = timezone.now()
        target = target_of(request._request, "/v2/schedules/")
        headers = headers_of(request._request, target)
        cron = headers.get("upstash-cron", "").strip()
        if not cron:
            raise Refusal(400, "missing Upstash-Cron header")
        schedule_id = headers.get("upstash-schedule-id", "").strip()
        if schedule_id and not NAME.fullmatch(schedule_id):
            raise Refusal(
                400,
                "invalid Upstash-Schedule-Id header: schedule IDs can only contain alphanumeric "
                "characters, hyphens, periods, and underscores",
            )
        body = body_of(request, conf.current().max_body)
        queue = headers.get("upstash-queue-name", "").strip()
        schedule = Schedule.of(
            WireMessage.from_headers(target.destination, headers, body, queue),
            cron=cron,
            schedule_id=schedule_id,
            account=self.account,
            caller_ip=caller_ip_of(request),
            now=now,
        )
        Schedule.objects.put(schedule, now=now)
        return Response({"scheduleId": schedule.schedule_id})

    def get(self, request: Request) -> Response:
        [record] = Schedule.to_records([self.schedule(self.called(request))])
        return Response(record.to_json())

    def delete(self, request: Request) -> Response:
        self.schedule(self.called(request)).delete()
        return Response({})

    def called(self, request: Request) -> str:
        return target_of(request._request, "/v2/schedules/").rest


class PauseScheduleView(_OneScheduleView):
    def post(self, request: Request, schedule_id: str) -> Response:
        self.change(self.schedule(schedule_id))
        return Response({})

    # The specification says POST, and the SDKs PATCH.
    put = patch = post

    def change(self, schedule: Schedule) -> None:
        schedule.pause()


class ResumeScheduleView(PauseScheduleView):
    def change(self, schedule: Schedule) -> None:
        schedule.resume(now=timezone.now())
