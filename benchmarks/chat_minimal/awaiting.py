"""For ASGI."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

# As many connections as there are streams: by its default the 101st would wait.
client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=100))
headers = {
    "Authorization": f"Bearer {settings.PROVIDER_KEY}",
    "Content-Type": "application/json",
}


@csrf_exempt
async def forward(request: HttpRequest) -> HttpResponseBase:
    url = f"{settings.PROVIDER}/chat/completions"
    if not json.loads(request.body).get("stream"):
        answer = await client.post(url, content=request.body, headers=headers)
        content_type = answer.headers["Content-Type"]
        return HttpResponse(answer.content, status=answer.status_code, content_type=content_type)
    asked = client.build_request("POST", url, content=request.body, headers=headers)
    stream = await client.send(asked, stream=True)
    content_type = stream.headers["Content-Type"]
    return StreamingHttpResponse(said(stream), status=stream.status_code, content_type=content_type)


async def said(stream: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for received in stream.aiter_raw():
            yield received
    finally:
        await stream.aclose()


urlpatterns = [path("chat/completions", forward)]
