"""For WSGI."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

client = httpx.Client(timeout=60)
headers = {
    "Authorization": f"Bearer {settings.PROVIDER_KEY}",
    "Content-Type": "application/json",
}


@csrf_exempt
def forward(request: HttpRequest) -> HttpResponseBase:
    url = f"{settings.PROVIDER}/chat/completions"
    if not json.loads(request.body).get("stream"):
        answer = client.post(url, content=request.body, headers=headers)
        content_type = answer.headers["Content-Type"]
        return HttpResponse(answer.content, status=answer.status_code, content_type=content_type)
    asked = client.build_request("POST", url, content=request.body, headers=headers)
    stream = client.send(asked, stream=True)
    content_type = stream.headers["Content-Type"]
    return StreamingHttpResponse(said(stream), status=stream.status_code, content_type=content_type)


def said(stream: httpx.Response) -> Iterator[bytes]:
    try:
        yield from stream.iter_raw()
    finally:
        stream.close()


urlpatterns = [path("chat/completions", forward)]
