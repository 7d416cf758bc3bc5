"""The ways in: publish, enqueue, batch."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash import Accepted, InvalidOption, Refused
from ...qstash import Message as WireMessage
from ...qstash.options import NAME
from .. import conf
from ..exceptions import Refusal
from ..models import Admitted, Message, UrlGroup, admit
from ..targets import Target, headers_of, target_of
from .base import QStashView, body_of, caller_ip_of, json_of


class PublishView(QStashView):
    def post(self, request: Request) -> Response:
        return self.take(request, target_of(request._request, "/v2/publish/"))

    def take(self, request: Request, target: Target, queue: str = "") -> Response:
        now, destination = timezone.now(), target.destination
        group = UrlGroup.objects.owned_by(self.account).called([destination]).get(destination)
        defaults = group.default_headers if group else None
        headers = headers_of(request._request, target, defaults)
        body = body_of(request, conf.current().max_body)
        message = WireMessage.from_headers(destination, headers, body, queue)
        admitted = admit(message, group, now=now)
        accepted = Message.objects.accept(
            admitted, account=self.account, caller_ip=caller_ip_of(request), now=now
        )
        is_nothing_new = all(each.is_duplicate for each in accepted)
        return Response(_answer(admitted, accepted), status=202 if is_nothing_new else 200)


class EnqueueView(PublishView):
    def post(self, request: Request) -> Response:
        target = target_of(request._request, "/v2/enqueue/")
        queue, _, rest = target.rest.partition("/")
        if not NAME.fullmatch(queue):
            raise Refusal(400, "invalid queue name")
        return self.take(request, target._replace(rest=rest), queue)


class BatchView(QStashView):
    def post(self, request: Request) -> Response:
        items = json_of(request, conf.current().max_batch_body)
        most = conf.current().max_batch_messages
        if not isinstance(items, list) or not 1 <= len(items) <= most:
            raise Refusal(400, f"a batch is an array of 1 to {most} messages")
        now = timezone.now()
        groups = UrlGroup.objects.owned_by(self.account).called(_destinations(items))
        read = [self._read(item, groups, now) for item in items]
        good = [each for one in read if not isinstance(one, Refused) for each in one]
        if len(good) > most:
            raise Refusal(400, f"a batch makes up to {most} messages, one for each endpoint")
        caller_ip = caller_ip_of(request)
        taken = iter(
            Message.objects.accept(good, account=self.account, caller_ip=caller_ip, now=now)
        )
        return Response(
            [
                one.to_json()
                if isinstance(one, Refused)
                else _answer(one, [next(taken) for _ in one])
                for one in read
            ]
        )

    def _read(
        self, item: Any, groups: Mapping[str, UrlGroup], now: datetime
    ) -> list[Admitted] | Refused:
        """One item; a bad one does not touch the others."""
        try:
            group = groups.get(_destination(item))
            message = WireMessage.from_batch_item(_with_defaults(item, group) if group else item)
            return admit(message, group, now=now)
        except InvalidOption as error:
            return Refused(error.wire_text)
        except Refusal as error:
            return Refused(str(error))


def _answer(admitted: list[Admitted], accepted: list[Accepted]) -> Any:
    """A bare array for a URL group: the SDKs know no other form."""
    if not admitted[0].topic_name:
        return accepted[0].to_json()
    return [
        answer._replace(url=each.message.destination).to_json()
        for each, answer in zip(admitted, accepted, strict=True)
    ]


def _destinations(items: list[Any]) -> set[str]:
    return {_destination(item) for item in items}


def _destination(item: Any) -> str:
    destination = item.get("destination") if isinstance(item, dict) else ""
    return destination if isinstance(destination, str) else ""


def _with_defaults(item: dict[str, Any], group: UrlGroup) -> dict[str, Any]:
    headers = item.get("headers")
    headers = {} if headers is None else headers
    if not isinstance(headers, dict):
        # To be refused where it is read.
        return item
    own = {name.lower(): value for name, value in headers.items()}
    return {**item, "headers": group.default_headers | own}
