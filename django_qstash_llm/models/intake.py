"""The intake: files of batches on their way into rows, and batches that are to be stopped.

A file is read twice. First all of it is looked at, and one that is none of a batch fails the batch
as a whole, with nothing asked. Then its lines become requests, some hundred in a transaction with the
mark of how far it has come: a worker that is killed in between is followed by another, which goes on
at the mark. Nothing is kept in memory but those hundred, and the names of the lines.
"""

from __future__ import annotations

import logging
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from django.db import transaction
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from ..bodies import check_fit, read_object
from ..cleaning import clean_text
from ..conf import app_settings, qstash_client
from ..exceptions import ConfigurationError, IllegalState, InvalidRequest, NoSuchModel
from ..qstash import NotFound, QStashError
from .asked import read_asked
from .batch_input import ENDPOINT, BatchInput, BatchInputQuerySet
from .caller import Caller
from .circuit import CLOCKS_DIFFER
from .doorbell import Bell, ring_on_commit
from .file import File, FilePart, FileQuerySet
from .forgetting import FULL, kept
from .request import CLAIM_SECONDS, ROWS_AT_ONCE, LLMRequest, LLMRequestQuerySet, State, Via

logger = logging.getLogger(__name__)

BYTES_AT_ONCE = 4_000_000
"""Of lines that are rows in memory at the same time, about."""
CANCELLED_AT_ONCE = 100
LONGEST_ID = 512
"""Characters of a ``custom_id``."""
MOST_ERRORS = 100
"""That a batch tells of its file: who has a wrong template has it in every line."""
LOOK_EVERY = 1000
"""Lines after which a reader makes sure that the batch is still its own."""


class _Lost(Exception):
    """The batch was stopped, or is another worker's by now."""


class _Malformed(Exception):
    """The file is none of a batch."""

    def __init__(self, code: str, message: str, *, param: str | None = None, line: int | None):
        super().__init__(message)
        self.as_json = {"code": code, "message": message, "param": param, "line": line}


@dataclass
class Intake:
    """Sees to the batches of one database that were asked by a file."""

    using: str = "default"
    clock: Callable[[], datetime] = timezone.now

    @property
    def inputs(self) -> BatchInputQuerySet:
        inputs: BatchInputQuerySet = BatchInput.objects.using(self.using)
        return inputs

    def due(self) -> BatchInputQuerySet:
        now = self.clock()
        # Further ahead than any claim reaches: the clock has been put back since.
        farthest = now + timedelta(seconds=CLAIM_SECONDS) + CLOCKS_DIFFER
        is_free = Q(claimed_until=None) | Q(claimed_until__lt=now) | Q(claimed_until__gt=farthest)
        return self.inputs.due(now).filter(is_free)

    def run(self, *, limit: int = 10) -> int:
        """See to up to ``limit`` of them, and answer how many came to an end of their work. Raises
        ``ConfigurationError`` when nothing could be submitted at all; they wait."""
        app_settings().check_ready()
        done = 0
        for pk in list(self.due().order_by("pk").values_list("pk", flat=True)[:limit]):
            claimed = self.claim(pk)
            if claimed is not None:
                done += self.see_to(claimed)
        return done

    def claim(self, pk: int) -> BatchInput | None:
        """Ours until it is due again, should this worker die; None when it is another's."""
        token = uuids.uuid4()
        if not self.due().filter(pk=pk).update(claim_token=token, claimed_until=self.later()):
            return None
        related = self.inputs.select_related("batch__user", "api_key__user")
        return related.filter(pk=pk, claim_token=token).first()

    def later(self) -> datetime:
        return self.clock() + timedelta(seconds=CLAIM_SECONDS)

    def ours(self, batch_input: BatchInput) -> BatchInputQuerySet:
        rows = self.inputs.filter(pk=batch_input.pk, claim_token=batch_input.claim_token)
        return rows

    def see_to(self, batch_input: BatchInput) -> bool:
        """Whether nothing is left to do for it now."""
        is_done = True
        try:
            if not batch_input.is_stopped and batch_input.expires_at <= self.clock():
                self.write(batch_input, expired_at=self.clock())
            if not batch_input.is_stopped and not batch_input.is_read:
                self.read(batch_input)
            if batch_input.is_stopped:
                is_done = self.stop(batch_input)
        except _Lost:
            pass
        self.ours(batch_input).update(claim_token=None, claimed_until=None)
        batch_input.refresh_from_db()
        batch_input.settle()
        return is_done

    def write(self, batch_input: BatchInput, **changes: Any) -> None:
        """Raises ``_Lost`` where it is not ours any more, or somebody stopped it."""
        ours = self.ours(batch_input).filter(cancelling_at=None, expired_at=None)
        if not ours.update(claimed_until=self.later(), **changes):
            raise _Lost
        batch_input.refresh_from_db(fields=list(changes))

    # --- reading ---

    def read(self, batch_input: BatchInput) -> None:
        try:
            caller, file = self.sources(batch_input)
            if batch_input.total is None:
                total, errors = self.look_through(batch_input, file)
                if errors:
                    self.write(batch_input, errors=errors, failed_at=self.clock())
                    return
                self.write(batch_input, total=total, in_progress_at=self.clock())
            self.ask(batch_input, caller, file)
        except _Malformed as error:
            if batch_input.total is not None:
                # Some of it is asked: the rest cannot be, and that is how it ends.
                self.write(batch_input, errors=[error.as_json], cancelling_at=self.clock())
                return
            self.write(batch_input, errors=[error.as_json], failed_at=self.clock())
            return
        if kept() != FULL:
            forget_read_files(self.using, Q(uuid=batch_input.file_uuid))

    def sources(self, batch_input: BatchInput) -> tuple[Caller, File]:
        caller = batch_input.asker
        if caller is None:
            message = "Who asked for this batch may ask no more."
            raise _Malformed("insufficient_permissions", message, line=None)
        files = File.objects.using(self.using).current(self.clock())
        file = files.filter(uuid=batch_input.file_uuid).first()
        if file is None or not file.is_kept:
            message = "The input file is not there any more."
            raise _Malformed("file_not_found", message, param="input_file_id", line=None)
        return caller, file

    def look_through(self, batch_input: BatchInput, file: File) -> tuple[int, list[dict[str, Any]]]:
        """How many requests the file holds, and what is wrong with it."""
        most = app_settings().openai_max_batch_lines
        seen: set[str] = set()
        errors: list[dict[str, Any]] = []
        number_of_errors = total = 0
        for line, content in _lines(file):
            total += 1
            if total > most:
                message = f"The file holds more than {most} requests, the most that a batch takes."
                return total, [_Malformed("too_many_tasks", message, line=line).as_json]
            try:
                custom_id, _body = _read_line(line, content)
                if custom_id in seen:
                    message = f"The custom_id {custom_id[:100]!r} is that of an earlier line."
                    raise _Malformed("duplicate_custom_id", message, param="custom_id", line=line)
                seen.add(custom_id)
            except _Malformed as error:
                number_of_errors += 1
                if len(errors) < MOST_ERRORS:
                    errors.append(error.as_json)
            if total % LOOK_EVERY == 0:
                self.write(batch_input)
        if not total:
            errors.append(_Malformed("empty_file", "The file holds no request.", line=None).as_json)
        if number_of_errors > len(errors):
            message = f"{number_of_errors} lines are wrong; the first {MOST_ERRORS} are told."
            errors.append(_Malformed("too_many_errors", message, line=None).as_json)
        return total, errors

    def ask(self, batch_input: BatchInput, caller: Caller, file: File) -> None:
        """Make rows of the lines that are none yet."""
        rows: list[LLMRequest] = []
        weight = 0
        for line, content in islice(_lines(file), batch_input.read, None):
            custom_id, body = _read_line(line, content)
            rows.append(_row(caller, custom_id, body))
            weight += len(content or b"")
            if len(rows) >= ROWS_AT_ONCE or weight >= BYTES_AT_ONCE:
                self.write_rows(batch_input, rows)
                rows, weight = [], 0
        if rows:
            self.write_rows(batch_input, rows)

    def write_rows(self, batch_input: BatchInput, rows: list[LLMRequest]) -> None:
        """Together with the mark, so that no line is asked twice or left out."""
        for row in rows:
            row.batch_id = batch_input.batch_id
        with transaction.atomic(using=self.using):
            self.write(batch_input, read=batch_input.read + len(rows))
            LLMRequest.objects.using(self.using).bulk_create(rows, batch_size=ROWS_AT_ONCE)
            ring_on_commit(Bell.SUBMIT, self.using)
            if any(row.state == State.FAILED for row in rows):
                ring_on_commit(Bell.ANNOUNCE, self.using)

    # --- stopping ---

    def stop(self, batch_input: BatchInput) -> bool:
        """Cancel what is not answered; whether all of it is."""
        rows = LLMRequest.objects.using(self.using).filter(batch=batch_input.batch_id)
        last = 0
        while group := list(_next(rows.unfinished(), last)):
            last = group[-1].pk
            try:
                self.cancel(group)
            except QStashError as error:
                reason = app_settings().without_secrets(str(error))
                logger.warning("Batch %s cannot be cancelled yet: %s", batch_input.batch, reason)
                return False
            self.ours(batch_input).update(claimed_until=self.later())
        return not rows.unfinished().exists()

    def cancel(self, group: list[LLMRequest]) -> None:
        """What ``LLMRequest.cancel`` does, for many in one call and one statement."""
        now = self.clock()
        sent = [row for row in group if row.qstash_message_id]
        unsent = [
            row
            for row in group
            if row not in sent and not row.first_tried_at and not row.claim_token
        ]
        if sent:
            with suppress(NotFound):  # delivered or given up a moment ago
                qstash_client().cancel_messages([row.qstash_message_id for row in sent])
            self.are_cancelled(sent, now)
        if unsent:
            # A worker may claim one at this moment, and then sees to it itself.
            self.are_cancelled(unsent, now, qstash_message_id="", claim_token=None)
        for row in group:
            if row not in sent and row not in unsent:
                with suppress(IllegalState):  # it has ended by itself
                    row.cancel(now=now)

    def are_cancelled(self, group: list[LLMRequest], now: datetime, **still: Any) -> None:
        rows = LLMRequest.objects.using(self.using).filter(**still).unfinished()
        if kept() == FULL:
            changes = {"state": State.CANCELLED, "finished_at": now, "deadline_at": None}
            rows.filter(pk__in=[row.pk for row in group]).update(**changes)
            return
        for row in group:
            rows.filter(pk=row.pk).update(state=State.CANCELLED, **row._finished(now))


def forget_read_files(using: str, among: Q) -> int:
    """Drop the texts of those of ``among`` that are requests by now; answers how many."""
    read = list(read_files(using, among))
    for file in read:
        file.forget()
    return len(read)


def read_files(using: str, among: Q) -> FileQuerySet:
    """Those of ``among`` whose texts are there, and read to the end by every batch that names them."""
    inputs = BatchInput.objects.using(using).filter(file_uuid=OuterRef("uuid"))
    parts = FilePart.objects.using(using).filter(file=OuterRef("pk"))
    files: FileQuerySet = File.objects.using(using)
    return files.filter(among, Exists(inputs), ~Exists(inputs.unread()), Exists(parts))


def _lines(file: File) -> Iterator[tuple[int, bytes | None]]:
    return file.lines(longest=app_settings().openai_max_body_bytes)


def _read_line(line: int, content: bytes | None) -> tuple[str, dict[str, Any]]:
    """The name and the body of what a line asks. Raises ``_Malformed``."""

    def malformed(code: str, problem: str, param: str | None = None) -> _Malformed:
        return _Malformed(code, problem, param=param, line=line)

    if content is None:
        most = app_settings().openai_max_body_bytes
        raise malformed("line_too_long", f"This line is longer than {most} bytes.")
    try:
        asked = read_object(content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content)
    except InvalidRequest as error:
        where = f" ({error.field})" if error.field else ""
        raise malformed(
            "invalid_json_line", f"No valid JSON object{where}: {error.problem}."
        ) from error
    for name in ("custom_id", "method", "url", "body"):
        if asked.get(name) is None:
            raise malformed("missing_required_parameter", f"Missing: {name!r}.", name)
    custom_id = asked["custom_id"]
    if not _is_name(custom_id):
        problem = f"Invalid 'custom_id': give a text of 1 to {LONGEST_ID} characters."
        raise malformed("invalid_value", problem, "custom_id")
    if asked["method"] != "POST":
        raise malformed("invalid_method", "Invalid 'method': give 'POST'.", "method")
    if asked["url"] != ENDPOINT:
        problem = f"Invalid 'url': this batch is of {ENDPOINT!r}."
        raise malformed("url_mismatch", problem, "url")
    if not isinstance(asked["body"], dict):
        raise malformed("invalid_value", "Invalid 'body': give a JSON object.", "body")
    return custom_id, asked["body"]


def _is_name(custom_id: Any) -> bool:
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_ID:
        return False
    try:
        check_fit(custom_id)
    except InvalidRequest:
        return False
    return True


def _row(caller: Caller, custom_id: str, body: dict[str, Any]) -> LLMRequest:
    """What a line asks, to be submitted; or, where it cannot be asked, that it has failed."""
    try:
        asked = read_asked(caller, body)
        if asked.is_stream:
            raise InvalidRequest("stream", "what a batch asks cannot be streamed")
        row = asked.row(Via.BATCH)
        row.metadata = {"custom_id": custom_id}
        row.prepare()
        return row
    except NoSuchModel as error:
        return _refused(caller, custom_id, body, "model_not_found", error)
    except InvalidRequest as error:
        return _refused(caller, custom_id, body, "invalid_value", error)
    except ConfigurationError as error:
        logger.error("A line of a batch cannot be asked: %s", error)
        problem = InvalidRequest("", "this server is not set up for it")
        return _refused(caller, custom_id, body, "server_error", problem)


def _refused(
    caller: Caller, custom_id: str, body: dict[str, Any], code: str, problem: InvalidRequest
) -> LLMRequest:
    """Nothing of it is kept that could be asked later, by whoever may."""
    now, model = timezone.now(), body.get("model")
    return LLMRequest(
        via=Via.BATCH,
        state=State.FAILED,
        model=clean_text(model, limit=255) if isinstance(model, str) else "",
        tenant=caller.tenant,
        **caller.owner,
        metadata={"custom_id": custom_id, "refused": problem.field},
        error_code=code,
        error=clean_text(problem.problem, limit=2000),
        retries=0,
        finished_at=now,
        forgotten_at=now,
    )


def _next(rows: LLMRequestQuerySet, after: int) -> LLMRequestQuerySet:
    return (
        rows.filter(pk__gt=after).defer("messages", "parameters").order_by("pk")[:CANCELLED_AT_ONCE]
    )
