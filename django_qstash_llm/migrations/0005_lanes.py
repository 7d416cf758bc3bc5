from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("django_qstash_llm", "0004_attempts"),
    ]

    operations = [
        migrations.CreateModel(
            name="Lane",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("provider", models.CharField(blank=True, max_length=64, verbose_name="provider")),
                ("model", models.CharField(blank=True, max_length=255, verbose_name="model")),
                ("tenant", models.CharField(blank=True, max_length=255, verbose_name="tenant")),
                ("queue", models.CharField(blank=True, max_length=255, verbose_name="queue")),
                (
                    "paused_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="paused at"),
                ),
                (
                    "paused_until",
                    models.DateTimeField(
                        blank=True,
                        help_text="Empty: until somebody resumes it.",
                        null=True,
                        verbose_name="paused until",
                    ),
                ),
                (
                    "paused_by",
                    models.CharField(blank=True, max_length=255, verbose_name="paused by"),
                ),
                ("trouble", models.CharField(blank=True, max_length=16, verbose_name="trouble")),
                ("reason", models.TextField(blank=True, verbose_name="reason")),
                (
                    "resumed_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="resumed at"),
                ),
                (
                    "resumed_by",
                    models.CharField(blank=True, max_length=255, verbose_name="resumed by"),
                ),
                (
                    "key",
                    models.CharField(blank=True, max_length=255, verbose_name="flow-control key"),
                ),
                (
                    "is_held",
                    models.BooleanField(default=False, null=True, verbose_name="held by QStash"),
                ),
                ("revision", models.PositiveIntegerField(default=0, editable=False)),
                ("tell_after", models.DateTimeField(blank=True, editable=False, null=True)),
                ("tell_tries", models.PositiveIntegerField(default=0, editable=False)),
                (
                    "tell_problem",
                    models.TextField(blank=True, verbose_name="why QStash could not be told"),
                ),
                (
                    "learned_limit",
                    models.PositiveIntegerField(
                        blank=True, null=True, verbose_name="learned limit"
                    ),
                ),
                (
                    "learned_period",
                    models.PositiveIntegerField(
                        blank=True, null=True, verbose_name="learned period"
                    ),
                ),
                (
                    "learned_at",
                    models.DateTimeField(blank=True, null=True, verbose_name="learned at"),
                ),
            ],
            options={
                "verbose_name": "lane",
                "verbose_name_plural": "lanes",
                "ordering": ("-id",),
                "indexes": [
                    models.Index(
                        condition=models.Q(("paused_at__isnull", False)),
                        fields=["id"],
                        name="llm_lane_paused",
                    ),
                    models.Index(
                        condition=models.Q(("is_held", None)),
                        fields=["id"],
                        name="llm_lane_to_tell",
                    ),
                    models.Index(
                        condition=models.Q(("key", ""), _negated=True),
                        fields=["key"],
                        name="llm_lane_key",
                    ),
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("provider", "model", "tenant", "queue"), name="llm_lane_scope"
                    )
                ],
            },
        ),
    ]
