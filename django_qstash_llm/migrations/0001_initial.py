from __future__ import annotations

import uuid

import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models

import django_qstash_llm.models.request


class Migration(migrations.Migration):
    initial = True

    dependencies = [
        ("contenttypes", "0002_remove_content_type_name"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Batch",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "uuid",
                    models.UUIDField(
                        default=uuid.uuid4, editable=False, unique=True, verbose_name="uuid"
                    ),
                ),
                ("name", models.CharField(blank=True, max_length=255, verbose_name="name")),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django.utils.timezone.now, editable=False, verbose_name="created at"
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="llm_batches",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "batch",
                "verbose_name_plural": "batches",
                "ordering": ("-id",),
            },
        ),
        migrations.CreateModel(
            name="Conversation",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "uuid",
                    models.UUIDField(
                        default=uuid.uuid4, editable=False, unique=True, verbose_name="uuid"
                    ),
                ),
                ("title", models.CharField(blank=True, max_length=255, verbose_name="title")),
                ("system", models.TextField(blank=True, verbose_name="system prompt")),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django.utils.timezone.now, editable=False, verbose_name="created at"
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="llm_conversations",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "conversation",
                "verbose_name_plural": "conversations",
                "ordering": ("-id",),
            },
        ),
        migrations.CreateModel(
            name="LLMRequest",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "uuid",
                    models.UUIDField(
                        default=uuid.uuid4, editable=False, unique=True, verbose_name="uuid"
                    ),
                ),
                (
                    "state",
                    models.CharField(
                        choices=[
                            ("pending", "pending"),
                            ("submitted", "submitted"),
                            ("completed", "completed"),
                            ("failed", "failed"),
                            ("cancelled", "cancelled"),
                        ],
                        default="pending",
                        max_length=16,
                        verbose_name="state",
                    ),
                ),
                (
                    "via",
                    models.CharField(
                        choices=[
                            ("publish", "publish"),
                            ("enqueue", "enqueue"),
                            ("batch", "batch"),
                        ],
                        default="publish",
                        max_length=16,
                        verbose_name="via",
                    ),
                ),
                ("trigger", models.CharField(blank=True, max_length=255, verbose_name="trigger")),
                ("provider", models.CharField(blank=True, max_length=64, verbose_name="provider")),
                ("model", models.CharField(blank=True, max_length=255, verbose_name="model")),
                ("messages", models.JSONField(default=list, verbose_name="messages")),
                (
                    "parameters",
                    models.JSONField(blank=True, default=dict, verbose_name="parameters"),
                ),
                (
                    "object_id",
                    models.CharField(blank=True, max_length=255, verbose_name="object id"),
                ),
                ("tenant", models.CharField(blank=True, max_length=255, verbose_name="tenant")),
                ("labels", models.JSONField(blank=True, default=list, verbose_name="labels")),
                ("metadata", models.JSONField(blank=True, default=dict, verbose_name="metadata")),
                ("queue", models.CharField(blank=True, max_length=255, verbose_name="queue")),
                (
                    "not_before",
                    models.DateTimeField(blank=True, null=True, verbose_name="not before"),
                ),
                (
                    "retries",
                    models.PositiveSmallIntegerField(blank=True, null=True, verbose_name="retries"),
                ),
                (
                    "retry_delay",
                    models.CharField(blank=True, max_length=255, verbose_name="retry delay"),
                ),
                (
                    "timeout",
                    models.PositiveIntegerField(
                        blank=True, help_text="Seconds.", null=True, verbose_name="timeout"
                    ),
                ),
                (
                    "flow_control",
                    models.JSONField(blank=True, default=dict, verbose_name="flow control"),
                ),
                ("redact", models.JSONField(blank=True, default=list, verbose_name="redact")),
                (
                    "submission_number",
                    models.PositiveSmallIntegerField(default=1, verbose_name="submission number"),
                ),
                (
                    "submission_tries",
                    models.PositiveIntegerField(default=0, verbose_name="submission tries"),
                ),
                (
                    "first_tried_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="first tried at"),
                ),
                (
                    "submit_after",
                    models.DateTimeField(blank=True, null=True, verbose_name="submit after"),
                ),
                (
                    "claim_token",
                    models.UUIDField(
                        blank=True, editable=False, null=True, verbose_name="claim token"
                    ),
                ),
                (
                    "claimed_until",
                    models.DateTimeField(
                        blank=True, editable=False, null=True, verbose_name="claimed until"
                    ),
                ),
                (
                    "qstash_message_id",
                    models.CharField(blank=True, max_length=255, verbose_name="QStash message id"),
                ),
                ("attempts", models.PositiveIntegerField(default=0, verbose_name="attempts")),
                (
                    "last_status",
                    models.SmallIntegerField(
                        blank=True,
                        help_text="HTTP status of the last attempt; -1 is no response.",
                        null=True,
                        verbose_name="last status",
                    ),
                ),
                (
                    "dead_letter_id",
                    models.CharField(blank=True, max_length=255, verbose_name="dead letter"),
                ),
                ("completion", models.TextField(blank=True, verbose_name="completion")),
                (
                    "completion_id",
                    models.CharField(blank=True, max_length=255, verbose_name="completion id"),
                ),
                (
                    "answered_by",
                    models.CharField(blank=True, max_length=255, verbose_name="answered by"),
                ),
                (
                    "finish_reason",
                    models.CharField(blank=True, max_length=64, verbose_name="finish reason"),
                ),
                ("refusal", models.TextField(blank=True, verbose_name="refusal")),
                (
                    "tool_calls",
                    models.JSONField(blank=True, default=list, verbose_name="tool calls"),
                ),
                (
                    "input_tokens",
                    models.BigIntegerField(blank=True, null=True, verbose_name="input tokens"),
                ),
                (
                    "output_tokens",
                    models.BigIntegerField(blank=True, null=True, verbose_name="output tokens"),
                ),
                (
                    "cached_tokens",
                    models.BigIntegerField(blank=True, null=True, verbose_name="cached tokens"),
                ),
                (
                    "cache_write_tokens",
                    models.BigIntegerField(
                        blank=True, null=True, verbose_name="cache write tokens"
                    ),
                ),
                (
                    "reasoning_tokens",
                    models.BigIntegerField(blank=True, null=True, verbose_name="reasoning tokens"),
                ),
                ("usage", models.JSONField(blank=True, default=dict, verbose_name="usage")),
                (
                    "cost",
                    models.DecimalField(
                        blank=True,
                        decimal_places=12,
                        help_text="USD; empty is unknown.",
                        max_digits=20,
                        null=True,
                        verbose_name="cost",
                    ),
                ),
                (
                    "cost_source",
                    models.CharField(blank=True, max_length=32, verbose_name="cost source"),
                ),
                (
                    "error_code",
                    models.CharField(blank=True, max_length=64, verbose_name="error code"),
                ),
                ("error", models.TextField(blank=True, verbose_name="error")),
                (
                    "announced_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="announced at"),
                ),
                (
                    "announce_tries",
                    models.PositiveSmallIntegerField(default=0, verbose_name="announce tries"),
                ),
                (
                    "announce_after",
                    models.DateTimeField(blank=True, null=True, verbose_name="announce after"),
                ),
                ("announce_error", models.TextField(blank=True, verbose_name="announce error")),
                (
                    "created_at",
                    models.DateTimeField(
                        default=django.utils.timezone.now, editable=False, verbose_name="created at"
                    ),
                ),
                (
                    "submitted_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="submitted at"),
                ),
                (
                    "finished_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="finished at"),
                ),
                (
                    "batch",
                    models.ForeignKey(
                        blank=True,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="llm_requests",
                        to="django_qstash_llm.batch",
                        verbose_name="batch",
                    ),
                ),
                (
                    "content_type",
                    models.ForeignKey(
                        blank=True,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to="contenttypes.contenttype",
                    ),
                ),
                (
                    "conversation",
                    models.ForeignKey(
                        blank=True,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="llm_requests",
                        to="django_qstash_llm.conversation",
                        verbose_name="conversation",
                    ),
                ),
                (
                    "resubmission_of",
                    models.ForeignKey(
                        blank=True,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="resubmissions",
                        to="django_qstash_llm.llmrequest",
                        verbose_name="resubmission of",
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        blank=True,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="llm_requests",
                        to=settings.AUTH_USER_MODEL,
                        verbose_name="user",
                    ),
                ),
            ],
            options={
                "verbose_name": "LLM request",
                "verbose_name_plural": "LLM requests",
                "ordering": ("-id",),
            },
            bases=(django_qstash_llm.models.request.OverTheWire, models.Model),
        ),
        migrations.CreateModel(
            name="CallbackResponse",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "uuid",
                    models.UUIDField(db_index=True, editable=False, verbose_name="request uuid"),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("callback", "callback"),
                            ("failure_callback", "failure callback"),
                            ("quarantined", "quarantined"),
                        ],
                        max_length=16,
                        verbose_name="kind",
                    ),
                ),
                (
                    "source_message_id",
                    models.CharField(max_length=255, verbose_name="QStash message id"),
                ),
                (
                    "callback_message_id",
                    models.CharField(
                        blank=True, max_length=255, verbose_name="callback's own message id"
                    ),
                ),
                ("retried", models.PositiveIntegerField(default=0, verbose_name="retried")),
                ("max_retries", models.PositiveIntegerField(default=0, verbose_name="max retries")),
                (
                    "status",
                    models.SmallIntegerField(
                        default=-1, help_text="-1 is no response.", verbose_name="status"
                    ),
                ),
                (
                    "header",
                    models.JSONField(blank=True, default=dict, verbose_name="response header"),
                ),
                ("body", models.BinaryField(blank=True, default=b"", verbose_name="response body")),
                ("is_body_cut", models.BooleanField(default=False, verbose_name="body cut")),
                (
                    "dead_letter_id",
                    models.CharField(blank=True, max_length=255, verbose_name="dead letter"),
                ),
                ("problem", models.TextField(blank=True, verbose_name="problem")),
                ("seen_count", models.PositiveIntegerField(default=1, verbose_name="seen")),
                (
                    "verified_by_next_key",
                    models.BooleanField(default=False, verbose_name="verified by next key"),
                ),
                (
                    "received_at",
                    models.DateTimeField(
                        default=django.utils.timezone.now, verbose_name="received at"
                    ),
                ),
                (
                    "llm_request",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="callback_responses",
                        to="django_qstash_llm.llmrequest",
                        verbose_name="LLM request",
                    ),
                ),
            ],
            options={
                "verbose_name": "callback response",
                "verbose_name_plural": "callback responses",
                "ordering": ("-id",),
            },
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(fields=["state", "-id"], name="llm_request_state"),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("content_type__isnull", False)),
                fields=["content_type", "object_id", "-id"],
                name="llm_request_about",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("user__isnull", False)),
                fields=["user"],
                name="llm_request_user",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("batch__isnull", False)),
                fields=["batch"],
                name="llm_request_batch",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("conversation__isnull", False)),
                fields=["conversation"],
                name="llm_request_conversation",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("resubmission_of__isnull", False)),
                fields=["resubmission_of"],
                name="llm_request_resubmission",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("tenant", ""), _negated=True),
                fields=["tenant", "-id"],
                name="llm_request_tenant",
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("state", "pending")), fields=["id"], name="llm_request_pending"
            ),
        ),
        migrations.AddIndex(
            model_name="llmrequest",
            index=models.Index(
                condition=models.Q(("announced_at", None), ("state__in", ["completed", "failed"])),
                fields=["id"],
                name="llm_request_unannounced",
            ),
        ),
        migrations.AddConstraint(
            model_name="callbackresponse",
            constraint=models.UniqueConstraint(
                fields=("source_message_id", "retried", "kind"),
                name="callback_response_stored_once",
            ),
        ),
    ]
