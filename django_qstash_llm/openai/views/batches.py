"""``batches``: many completions asked by a file, through QStash, and at once."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Callable
from functools import partial
from typing import Any

from django.db import router
from django.http import HttpResponseBase, JsonResponse
from django.utils import timezone
from rest_framework.request import Request

from ...bodies import check_fit
from ...conf import app_settings
from ...exceptions import InvalidRequest
from ...models import BatchInput, File, KeptAnswer
from ...models.api_key import Scope
from ...models.batch_input import ENDPOINT, BatchInputQuerySet, begin
from ...models.file import FileQuerySet, Purpose
from .. import idempotency, paging
from ..authentication import caller_of
from ..body import object_of
from ..idempotency import written_under
from ..refusals import Refusal
from ..told import BATCH, FILE, as_batches
from ..upload import seconds_kept
from .base import OpenAIView, door

_PARAMETERS = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
_MOST_PAIRS, _LONGEST_NAME, _LONGEST_VALUE = 16, 64, 512


class BatchesView(OpenAIView):
    scope = Scope.BATCHES
    http_method_names = ["get", "head", "post"]

    def get(self, request: Request) -> HttpResponseBase:
        page, has_more = paging.page_of(
            request, _theirs(request), most=100, usual=20, prefix=BATCH, by="batch__uuid"
        )
        for batch_input in page:
            batch_input.settle()
        told = dict(zip([each.pk for each in page], as_batches(page), strict=True))
        return paging.listed(page, has_more, lambda each: told[each.pk])

    def post(self, request: Request) -> HttpResponseBase:
        caller, asked = caller_of(request), object_of(request)
        check_fit(asked)
        for name in sorted(asked.keys() - _PARAMETERS):
            raise InvalidRequest(name[:255], "there is no such parameter")
        if asked.get("endpoint") != ENDPOINT:
            raise InvalidRequest("endpoint", f"give {ENDPOINT!r}")
        if asked.get("completion_window") != "24h":
            raise InvalidRequest("completion_window", "give '24h'")
        policy = asked.get("output_expires_after")
        uuid = uuids.uuid4()
        answer = partial(
            _begin,
            # Looked for where it is to be read, and not where the same was begun before: its text,
            # or all of it, may have gone since.
            partial(_file, request, asked.get("input_file_id")),
            {
                "caller": caller,
                "uuid": uuid,
                "metadata": _metadata(asked.get("metadata")),
                "keep_seconds": None
                if policy is None
                else seconds_kept("output_expires_after", policy),
                "now": timezone.now(),
            },
        )
        return idempotency.once(request, caller, ["batches", asked], uuid, answer, _again)


class BatchView(OpenAIView):
    scope = Scope.BATCHES
    http_method_names = ["get", "head"]

    def get(self, request: Request, name: str) -> HttpResponseBase:
        batch_input = _found(request, name)
        batch_input.settle()
        return _told(batch_input)


class CancelBatchView(OpenAIView):
    scope = Scope.BATCHES
    http_method_names = ["post"]

    def post(self, request: Request, name: str) -> HttpResponseBase:
        batch_input = _found(request, name)
        batch_input.settle()
        batch_input.cancel(now=timezone.now())
        return _told(batch_input)


def _begin(
    find: Callable[[], File], fields: dict[str, Any], kept: KeptAnswer | None
) -> JsonResponse:
    file = find()
    app_settings().check_ready()
    with written_under(kept):
        batch_input = begin(file, **fields)
    return _told(batch_input)


def _again(kept: KeptAnswer) -> JsonResponse:
    batch_input = BatchInput.objects.select_related("batch").filter(batch__uuid=kept.uuid).first()
    if batch_input is None:
        raise idempotency.under_way()
    return _told(batch_input, headers=idempotency.headers_of(kept))


def _file(request: Request, name: Any) -> File:
    # Not from a replica: it has come a moment ago.
    files: FileQuerySet = File.objects.using(router.db_for_write(File))
    theirs = files.of(caller_of(request)).current(timezone.now()).filter(purpose=Purpose.BATCH)
    uuid = paging.uuid_of(name, FILE) if isinstance(name, str) else None
    file = theirs.filter(uuid=uuid).first() if uuid else None
    if file is None:
        raise InvalidRequest("input_file_id", "give the id of a file of yours with purpose 'batch'")
    if not file.is_kept:
        problem = "its text was dropped once its requests were made; upload it again"
        raise InvalidRequest("input_file_id", problem)
    return file


def _metadata(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > _MOST_PAIRS:
        raise InvalidRequest("metadata", f"give at most {_MOST_PAIRS} pairs of texts")
    for name, value in given.items():
        if len(name) > _LONGEST_NAME:
            raise InvalidRequest("metadata", f"a name of it is longer than {_LONGEST_NAME}")
        if not isinstance(value, str) or len(value) > _LONGEST_VALUE:
            problem = f"give a text of at most {_LONGEST_VALUE} characters"
            raise InvalidRequest(f"metadata.{name}", problem)
    return given


def _theirs(request: Request) -> BatchInputQuerySet:
    # Written here, and read again a moment later.
    inputs: BatchInputQuerySet = BatchInput.objects.using(router.db_for_write(BatchInput))
    return inputs.of(caller_of(request))


def _found(request: Request, name: str) -> BatchInput:
    uuid = paging.uuid_of(name, BATCH)
    found = _theirs(request).filter(batch__uuid=uuid).first() if uuid else None
    if found is None:
        raise Refusal(404, "not_found", f"There is no batch {name[:100]!r} of yours.")
    return found


def _told(batch_input: BatchInput, headers: dict[str, str] | None = None) -> JsonResponse:
    [told] = as_batches([batch_input])
    return JsonResponse(told, headers=headers)


batches = door(BatchesView)
batch = door(BatchView)
cancel_batch = door(CancelBatchView)
