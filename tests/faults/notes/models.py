from __future__ import annotations

from typing import ClassVar

from django.db import models


class Note(models.Model):
    number = models.IntegerField()
    text = models.TextField()
    answer = models.TextField(blank=True)

    # Asks by itself when saved, unless somebody else is going to.
    asks: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.text


class Effect(models.Model):
    """The handler ran. Nothing here keeps it from being there twice: that is to be seen."""

    uuid = models.UUIDField(db_index=True)
    kind = models.CharField(max_length=16)
    note = models.ForeignKey(Note, on_delete=models.CASCADE)

    def __str__(self) -> str:
        return f"{self.kind} {self.uuid}"
