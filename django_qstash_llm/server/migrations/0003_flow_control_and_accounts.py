from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("qstash_server", "0002_forget_the_log"),
    ]

    operations = [
        migrations.CreateModel(
            name="Endpoint",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("url", models.TextField()),
                ("name", models.CharField(blank=True, max_length=256)),
            ],
            options={
                "ordering": ["pk"],
            },
        ),
        migrations.CreateModel(
            name="FlowControlKey",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "account",
                    models.CharField(blank=True, default="", editable=False, max_length=64),
                ),
                ("key", models.CharField(max_length=256)),
                ("parallelism", models.PositiveIntegerField(blank=True, null=True)),
                ("rate", models.PositiveIntegerField(blank=True, null=True)),
                ("period", models.PositiveIntegerField(default=1)),
                ("rate_count", models.PositiveIntegerField(default=0)),
                ("window_ends_at", models.DateTimeField(blank=True, null=True)),
                ("is_paused", models.BooleanField(default=False)),
                ("pins_parallelism", models.BooleanField(default=False)),
                ("pins_rate", models.BooleanField(default=False)),
                ("created_at", models.DateTimeField()),
                ("updated_at", models.DateTimeField()),
            ],
            options={
                "verbose_name": "flow-control key",
                "ordering": ["key"],
            },
        ),
        migrations.CreateModel(
            name="LogEntry",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("time", models.DateTimeField(db_index=True)),
                (
                    "state",
                    models.CharField(
                        choices=[
                            ("CREATED", "Created"),
                            ("ACTIVE", "Active"),
                            ("RETRY", "Retry"),
                            ("ERROR", "Error"),
                            ("DELIVERED", "Delivered"),
                            ("FAILED", "Failed"),
                            ("CANCEL_REQUESTED", "Cancel Requested"),
                            ("CANCELED", "Canceled"),
                        ],
                        max_length=20,
                    ),
                ),
                ("error", models.TextField(blank=True)),
                ("next_delivery_at", models.DateTimeField(blank=True, null=True)),
                ("response_status", models.IntegerField(blank=True, null=True)),
            ],
            options={
                "verbose_name_plural": "log entries",
            },
        ),
        migrations.CreateModel(
            name="Schedule",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "account",
                    models.CharField(blank=True, default="", editable=False, max_length=64),
                ),
                ("schedule_id", models.CharField(max_length=256)),
                ("cron", models.TextField()),
                ("destination", models.TextField()),
                ("headers", models.JSONField(default=dict)),
                ("secrets", models.JSONField(blank=True, default=dict, editable=False)),
                ("body", models.BinaryField(default=b"")),
                ("queue_name", models.CharField(blank=True, max_length=256)),
                ("caller_ip", models.CharField(blank=True, max_length=64)),
                ("created_at", models.DateTimeField()),
                ("is_paused", models.BooleanField(default=False)),
                ("next_at", models.DateTimeField(blank=True, null=True)),
                ("last_at", models.DateTimeField(blank=True, null=True)),
                ("last_message_ids", models.JSONField(blank=True, default=list)),
                ("error", models.TextField(blank=True)),
            ],
            options={
                "ordering": ["pk"],
            },
        ),
        migrations.CreateModel(
            name="UrlGroup",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "account",
                    models.CharField(blank=True, default="", editable=False, max_length=64),
                ),
                ("name", models.CharField(max_length=256)),
                ("headers", models.JSONField(blank=True, default=dict)),
                ("secrets", models.JSONField(blank=True, default=dict, editable=False)),
                ("created_at", models.DateTimeField()),
                ("updated_at", models.DateTimeField()),
            ],
            options={
                "verbose_name": "URL group",
                "ordering": ["name"],
            },
        ),
        migrations.RemoveIndex(
            model_name="message",
            name="qstash_server_due",
        ),
        migrations.RemoveIndex(
            model_name="message",
            name="qstash_server_line",
        ),
        migrations.RemoveIndex(
            model_name="message",
            name="qstash_server_started",
        ),
        migrations.RemoveIndex(
            model_name="message",
            name="qstash_server_telling",
        ),
        migrations.RemoveIndex(
            model_name="message",
            name="qstash_server_finished",
        ),
        migrations.AddField(
            model_name="message",
            name="account",
            field=models.CharField(blank=True, default="", editable=False, max_length=64),
        ),
        migrations.AddField(
            model_name="message",
            name="endpoint_name",
            field=models.CharField(blank=True, default="", max_length=256),
        ),
        migrations.AddField(
            model_name="message",
            name="is_purged",
            field=models.BooleanField(default=False, editable=False),
        ),
        migrations.AddField(
            model_name="message",
            name="schedule_id",
            field=models.CharField(blank=True, default="", max_length=256),
        ),
        migrations.AddField(
            model_name="message",
            name="secrets",
            field=models.JSONField(blank=True, default=dict, editable=False),
        ),
        migrations.AddField(
            model_name="message",
            name="topic_name",
            field=models.CharField(blank=True, default="", max_length=256),
        ),
        migrations.AddField(
            model_name="message",
            name="waits_for",
            field=models.CharField(
                blank=True,
                choices=[("", "Nothing"), ("queue", "Queue"), ("flow control", "Flow Control")],
                default="",
                max_length=12,
            ),
        ),
        migrations.AddField(
            model_name="queue",
            name="account",
            field=models.CharField(blank=True, default="", editable=False, max_length=64),
        ),
        migrations.AddField(
            model_name="signingkeys",
            name="account",
            field=models.CharField(blank=True, default="", max_length=64, unique=True),
        ),
        migrations.AlterField(
            model_name="queue",
            name="name",
            field=models.CharField(max_length=256),
        ),
        migrations.AddConstraint(
            model_name="queue",
            constraint=models.UniqueConstraint(
                fields=("account", "name"), name="qstash_server_queue_name"
            ),
        ),
        migrations.AddConstraint(
            model_name="flowcontrolkey",
            constraint=models.UniqueConstraint(
                fields=("account", "key"), name="qstash_server_flow_key"
            ),
        ),
        migrations.AddField(
            model_name="message",
            name="flow_control",
            field=models.ForeignKey(
                blank=True,
                db_index=False,
                null=True,
                on_delete=django.db.models.deletion.SET_NULL,
                related_name="+",
                to="qstash_server.flowcontrolkey",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("due_at__isnull", False)),
                fields=["due_at", "id"],
                name="qstash_server_due",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("due_at__isnull", False), ("flow_control__isnull", False)),
                fields=["due_at", "id"],
                name="qstash_server_due_gated",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("due_at__isnull", False), ("interruptions__gte", 2)),
                fields=["due_at", "id"],
                name="qstash_server_suspect",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("waits_for", "queue")),
                fields=["queue", "id"],
                name="qstash_server_line",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("waits_for", "flow control")),
                fields=["flow_control", "id"],
                name="qstash_server_gate",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(
                    models.Q(("claim_token", ""), _negated=True), ("flow_control__isnull", False)
                ),
                fields=["flow_control"],
                name="qstash_server_in_flight",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(
                    models.Q(("waits_for", "queue"), _negated=True),
                    ("finished_at__isnull", True),
                    ("queue__isnull", False),
                ),
                fields=["queue"],
                name="qstash_server_started",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("finished_at__isnull", True), ("source__isnull", False)),
                fields=["source"],
                name="qstash_server_telling",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("finished_at__isnull", False)),
                fields=["is_purged", "finished_at"],
                name="qstash_server_finished",
            ),
        ),
        migrations.CreateModel(
            name="Response",
            fields=[
                (
                    "entry",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        serialize=False,
                        to="qstash_server.logentry",
                    ),
                ),
                ("header", models.JSONField(blank=True, default=dict)),
                ("body", models.BinaryField(blank=True, default=b"")),
            ],
        ),
        migrations.AddField(
            model_name="logentry",
            name="message",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE,
                related_name="log",
                to="qstash_server.message",
            ),
        ),
        migrations.AddIndex(
            model_name="schedule",
            index=models.Index(
                condition=models.Q(("next_at__isnull", False)),
                fields=["next_at"],
                name="qstash_server_schedule_due",
            ),
        ),
        migrations.AddConstraint(
            model_name="schedule",
            constraint=models.UniqueConstraint(
                fields=("account", "schedule_id"), name="qstash_server_schedule_id"
            ),
        ),
        migrations.AddConstraint(
            model_name="urlgroup",
            constraint=models.UniqueConstraint(
                fields=("account", "name"), name="qstash_server_url_group"
            ),
        ),
        migrations.AddField(
            model_name="endpoint",
            name="group",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE,
                related_name="endpoints",
                to="qstash_server.urlgroup",
            ),
        ),
    ]
