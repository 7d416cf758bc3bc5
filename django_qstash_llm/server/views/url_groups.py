from __future__ import annotations

from typing import Any

from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from ...qstash.options import NAME
from ...qstash.records import Endpoint as EndpointRecord
from .. import admission
from ..exceptions import Refusal
from ..models import UrlGroup
from ..models.url_group import MOST_ENDPOINTS
from .base import QStashView, object_of, plain

LONGEST_NAME = 256


class UrlGroupsView(QStashView):
    def get(self, request: Request) -> Response:
        groups = UrlGroup.objects.owned_by(self.account).with_endpoints()
        return Response([group.to_record().to_json() for group in groups])


class UrlGroupView(QStashView):
    def get(self, request: Request, name: str) -> Response:
        return Response(self.group(name).to_record().to_json())

    def patch(self, request: Request, name: str) -> Response:
        """Set the headers that a publish to it has unless it says otherwise."""
        headers = object_of(request).get("headers")
        if not isinstance(headers, dict):
            raise Refusal(400, "headers is not an object of names and values")
        self.group(name).set_headers(headers, now=timezone.now())
        return Response({})

    def delete(self, request: Request, name: str) -> Response:
        for group in UrlGroup.objects.owned_by(self.account).filter(name=plain(name)):
            group.discard(now=timezone.now())
        return Response({})

    def group(self, name: str) -> UrlGroup:
        group = UrlGroup.objects.owned_by(self.account).filter(name=plain(name)).first()
        if group is None:
            raise Refusal(404, f"topic {name} not found")
        return group


class EndpointsView(QStashView):
    def post(self, request: Request, name: str) -> Response:
        """Add or change. The first makes the group."""
        endpoints = _endpoints_of(request)
        if not NAME.fullmatch(name):
            raise Refusal(400, "invalid url group name")
        for endpoint in endpoints:
            admission.check_endpoint(endpoint.url)
        UrlGroup.objects.put(name, endpoints, account=self.account, now=timezone.now())
        return Response({})

    def delete(self, request: Request, name: str) -> Response:
        endpoints = _endpoints_of(request)
        for group in UrlGroup.objects.owned_by(self.account).filter(name=plain(name)):
            group.discard_endpoints(endpoints, now=timezone.now())
        return Response({})


def _endpoints_of(request: Request) -> list[EndpointRecord]:
    endpoints = object_of(request).get("endpoints")
    if not isinstance(endpoints, list) or not endpoints:
        raise Refusal(400, "endpoints is not a list of at least one")
    if len(endpoints) > MOST_ENDPOINTS:
        # No group has so many, and each is looked for by itself.
        raise Refusal(412, "quota maxEndpointsPerUrlGroup exceeded")
    return [_endpoint_of(each) for each in endpoints]


def _endpoint_of(item: Any) -> EndpointRecord:
    if not isinstance(item, dict):
        raise Refusal(400, "each of endpoints is an object with a url")
    url, name = ("" if item.get(key) is None else item[key] for key in ("url", "name"))
    if not isinstance(url, str) or not isinstance(name, str) or not (url or name):
        raise Refusal(400, "each of endpoints is an object with a url, a name or both, as text")
    if len(name) > LONGEST_NAME or not (url + name).isprintable():
        raise Refusal(
            400, f"invalid endpoint: its name has up to {LONGEST_NAME} characters, all printable"
        )
    return EndpointRecord(url, name)
