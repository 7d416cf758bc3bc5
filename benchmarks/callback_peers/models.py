"""The rows of the typical way: what was asked, and what was told about it."""

from __future__ import annotations

import uuid

from django.db import models
from django.utils import timezone


class Ask(models.Model):
    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    state = models.CharField(max_length=16, default="submitted", db_index=True)
    model = models.CharField(max_length=255)
    messages = models.JSONField(default=list)
    completion = models.TextField(blank=True)
    finish_reason = models.CharField(max_length=64, blank=True)
    input_tokens = models.BigIntegerField(null=True)
    output_tokens = models.BigIntegerField(null=True)
    cost = models.DecimalField(max_digits=20, decimal_places=12, null=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    finished_at = models.DateTimeField(null=True)


class Told(models.Model):
    ask = models.ForeignKey(Ask, on_delete=models.CASCADE, related_name="told")
    source_message_id = models.CharField(max_length=255)
    retried = models.PositiveIntegerField(default=0)
    max_retries = models.PositiveIntegerField(default=0)
    status = models.SmallIntegerField()
    header = models.JSONField(default=dict)
    body = models.TextField(blank=True)
    dead_letter_id = models.CharField(max_length=255, blank=True)
    received_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = (
            models.UniqueConstraint(fields=["source_message_id", "retried"], name="told_once"),
        )
