"""``File``: what a caller of the OpenAI-compatible endpoint has uploaded, or may read of a batch.

An upload's text is kept in the database, in pieces: so it is there for every process, is gone with
its row, and nobody has all of it in memory. What a batch answers is not kept a second time: its two
files are rows without text, and their lines are made of its requests when somebody reads them.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from django.conf import settings
from django.db import models, transaction
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from ..cleaning import clean_text
from .request import CallerKind

if TYPE_CHECKING:
    from .caller import Caller

PART_BYTES = 1 << 20
KEPT_FOR = timedelta(days=30)
"""As long as OpenAI keeps a batch's files, where nobody says otherwise."""


class Purpose(models.TextChoices):
    BATCH = "batch", _("batch")
    BATCH_OUTPUT = "batch_output", _("batch output")


class FileQuerySet(models.QuerySet["File"]):
    def store(self, file: File, pieces: Iterable[bytes]) -> File:
        """Keep an unsaved ``file`` with its text, in one transaction. ``pieces`` may be of any size."""
        self._for_write = True
        with transaction.atomic(using=self.db):
            file.size = 0
            file.save(using=self.db, force_insert=True)
            for number, content in enumerate(_alike(pieces)):
                FilePart.objects.using(self.db).create(file=file, number=number, content=content)
                file.size += len(content)
            file.save(using=self.db, update_fields=["size"])
        return file

    def of(self, caller: Caller) -> Self:
        """A caller's own."""
        return self.filter(**caller.owner)

    def current(self, now: datetime) -> Self:
        return self.filter(models.Q(expires_at=None) | models.Q(expires_at__gt=now))

    def expired(self, now: datetime) -> Self:
        return self.filter(expires_at__lte=now)


class File(models.Model):
    uuid = models.UUIDField(_("uuid"), default=uuids.uuid4, unique=True, editable=False)
    purpose = models.CharField(_("purpose"), max_length=16, choices=Purpose)
    filename = models.CharField(_("file name"), max_length=255)
    size = models.BigIntegerField(_("size"), null=True, help_text=_("Bytes; empty is uncounted."))
    """Of a batch's answers nobody knows it before they are read."""

    # whose it is
    caller = models.CharField(_("caller"), max_length=16, choices=CallerKind)
    api_key = models.ForeignKey(
        "django_qstash_llm.ApiKey",
        on_delete=models.CASCADE,  # nobody could read it any more
        null=True,
        blank=True,
        related_name="files",
        verbose_name=_("API key"),
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="llm_files",
        verbose_name=_("user"),
    )

    # of a batch's answers
    batch = models.ForeignKey(
        "django_qstash_llm.Batch",
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="files",
        verbose_name=_("batch"),
    )
    holds_errors = models.BooleanField(_("holds errors"), default=False)
    """Whether it is the lines that came to nothing, and not those that were answered."""

    created_at = models.DateTimeField(_("created at"), default=timezone.now, editable=False)
    expires_at = models.DateTimeField(_("expires at"), null=True, blank=True, db_index=True)

    objects = FileQuerySet.as_manager()

    class Meta:
        verbose_name = _("file")
        verbose_name_plural = _("files")
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.filename

    @property
    def is_of_batch(self) -> bool:
        return self.batch_id is not None

    @property
    def is_kept(self) -> bool:
        """Whether its text is there: it goes before its row where ``STORE_MESSAGES`` says so."""
        return self._parts().exists()

    def pieces(self) -> Iterator[bytes]:
        """An upload's text, one part in memory at a time."""
        number = 0
        while (content := self._part(number)) is not None:
            yield content
            number += 1

    def lines(self, *, longest: int) -> Iterator[tuple[int, bytes | None]]:
        """Number, from 1, and text of each line that is not blank; None for the text of one that is
        longer than ``longest`` bytes."""
        number, rest, is_too_long = 1, b"", False
        for piece in self.pieces():
            first, *others = piece.split(b"\n")
            rest = b"" if is_too_long else rest + first
            for following in others:
                if is_too_long or len(rest) > longest:
                    yield number, None
                elif rest.strip():
                    yield number, rest
                number, rest, is_too_long = number + 1, following, False
            if len(rest) > longest:
                rest, is_too_long = b"", True
        if is_too_long:
            yield number, None
        elif rest.strip():
            yield number, rest

    def beginning(self, length: int) -> bytes:
        return (self._part(0) or b"")[:length]

    def forget(self) -> None:
        """Its row stays, its text goes."""
        self._parts().delete()

    def _part(self, number: int) -> bytes | None:
        content = self._parts().filter(number=number).values_list("content", flat=True).first()
        return None if content is None else bytes(content)

    def _parts(self) -> models.QuerySet[FilePart]:
        return FilePart.objects.using(self._state.db).filter(file=self.pk)


class FilePart(models.Model):
    """``PART_BYTES`` of a file; of the last one the rest."""

    file = models.ForeignKey(File, on_delete=models.CASCADE, related_name="parts", db_index=False)
    number = models.PositiveIntegerField()
    content = models.BinaryField()

    class Meta:
        verbose_name = _("part of a file")
        verbose_name_plural = _("parts of files")
        constraints = (
            models.UniqueConstraint(fields=["file", "number"], name="llm_file_part_number"),
        )

    def __str__(self) -> str:
        return f"{self.file_id} · {self.number}"


def named(filename: Any) -> str:
    """A caller's name for a file, fit for the database."""
    return clean_text(str(filename), limit=255) or "file"


def _alike(pieces: Iterable[bytes]) -> Iterator[bytes]:
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        while len(gathered) >= PART_BYTES:
            yield bytes(gathered[:PART_BYTES])
            del gathered[:PART_BYTES]
    if gathered:
        yield bytes(gathered)
