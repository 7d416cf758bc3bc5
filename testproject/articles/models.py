from __future__ import annotations

from django.db import models


class Article(models.Model):
    title = models.CharField(max_length=200)
    body = models.TextField()
    source = models.CharField(max_length=200, blank=True)
    summary = models.TextField(blank=True, help_text="Filled by a trigger, see llm.py.")

    def __str__(self) -> str:
        return self.title
