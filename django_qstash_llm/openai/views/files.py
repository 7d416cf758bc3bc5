"""``files``: uploaded for batches, and what batches answered."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.db import router
from django.http import HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.utils import timezone
from rest_framework.request import Request

from ...models import File, KeptAnswer
from ...models.api_key import Scope
from ...models.file import FileQuerySet
from .. import idempotency, paging, upload
from ..authentication import caller_of
from ..idempotency import written_under
from ..lines import pieces_of, pieces_of_async, size_of
from ..refusals import Refusal
from ..told import FILE, as_file
from ..upload import Upload
from .base import OpenAIView, door, is_asgi

_MOST = 10_000


class FilesView(OpenAIView):
    scope = Scope.FILES
    http_method_names = ["get", "head", "post"]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.method == "POST":
            upload.prepare(request._request)
        super().initial(request, *args, **kwargs)

    def get(self, request: Request) -> HttpResponseBase:
        rows = _theirs(request)
        if purpose := request.query_params.get("purpose"):
            rows = rows.filter(purpose=purpose)
        page, has_more = paging.page_of(
            request, rows, most=_MOST, usual=_MOST, prefix=FILE, by="uuid"
        )
        return paging.listed(page, has_more, _told)

    def post(self, request: Request) -> HttpResponseBase:
        caller = caller_of(request)
        uploaded = upload.read(request)
        now = timezone.now()
        file = File(
            purpose=uploaded.purpose,
            filename=uploaded.filename,
            created_at=now,
            expires_at=now + uploaded.kept_for,
            **caller.owner,
        )
        asked: list[object] = []
        if idempotency.key_of(request) is not None:
            kept_for = uploaded.kept_for.total_seconds()
            asked = ["files", uploaded.digest(), uploaded.filename, kept_for]
        answer = partial(_store, file, uploaded)
        return idempotency.once(request, caller, asked, file.uuid, answer, _again)


class FileView(OpenAIView):
    scope = Scope.FILES
    http_method_names = ["get", "head", "delete"]

    def get(self, request: Request, name: str) -> HttpResponseBase:
        return JsonResponse(_told(_found(request, name)))

    def delete(self, request: Request, name: str) -> HttpResponseBase:
        file = _found(request, name)
        told = {"id": f"{FILE}{file.uuid.hex}", "object": "file", "deleted": True}
        file.delete()
        return JsonResponse(told)


class FileContentView(OpenAIView):
    scope = Scope.FILES
    http_method_names = ["get", "head"]

    def get(self, request: Request, name: str) -> HttpResponseBase:
        file = _found(request, name)
        if not file.is_of_batch and not file.is_kept:
            problem = "its text was dropped once its requests were made, as this server is set up"
            raise Refusal(
                404, "not_found", f"There is nothing to read in {name[:100]!r}: {problem}."
            )
        pieces = pieces_of_async(file) if is_asgi(request) else pieces_of(file)
        return StreamingHttpResponse(
            pieces,
            content_type="application/octet-stream",
            headers={
                "Content-Disposition": "attachment",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            },
        )


def _store(file: File, uploaded: Upload, kept: KeptAnswer | None) -> JsonResponse:
    with written_under(kept):
        File.objects.using(router.db_for_write(File)).store(file, uploaded.pieces())
    return JsonResponse(_told(file))


def _again(kept: KeptAnswer) -> JsonResponse:
    file = File.objects.filter(uuid=kept.uuid).first()
    if file is None:
        raise idempotency.under_way()
    return JsonResponse(_told(file), headers=idempotency.headers_of(kept))


def _theirs(request: Request) -> FileQuerySet:
    files: FileQuerySet = File.objects.all()
    return files.of(caller_of(request)).current(timezone.now())


def _found(request: Request, name: str) -> File:
    uuid = paging.uuid_of(name, FILE)
    file = _theirs(request).filter(uuid=uuid).first() if uuid else None
    if file is None:
        raise Refusal(404, "not_found", f"There is no file {name[:100]!r} of yours.")
    return file


def _told(file: File) -> dict[str, Any]:
    return as_file(file, size=size_of(file))


files = door(FilesView)
file = door(FileView)
file_content = door(FileContentView)
