"""Gates: the limits of providers, and whose messages wait at them."""

from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("qstash_server", "0004_turns_and_secrets"),
    ]

    operations = [
        # Its old name is the new table's.
        migrations.RenameIndex(
            model_name="message", new_name="qstash_server_at_key", old_name="qstash_server_gate"
        ),
        migrations.AddField(
            model_name="message",
            name="charge_input",
            field=models.PositiveIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="message",
            name="charge_output",
            field=models.PositiveIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="message",
            name="claimed_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AlterField(
            model_name="message",
            name="waits_for",
            field=models.CharField(
                blank=True,
                choices=[
                    ("", "Nothing"),
                    ("queue", "Queue"),
                    ("flow control", "Flow Control"),
                    ("gate", "Gate"),
                ],
                default="",
                max_length=12,
            ),
        ),
        migrations.CreateModel(
            name="Gate",
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
                ("host", models.CharField(max_length=253)),
                ("group", models.CharField(max_length=255)),
                ("credential", models.CharField(blank=True, default="", max_length=12)),
                ("pace", models.JSONField(blank=True, default=dict, editable=False)),
                ("opens_at", models.DateTimeField()),
                ("is_paused", models.BooleanField(default=False)),
                ("paused_at", models.DateTimeField(blank=True, null=True)),
                ("resumed_at", models.DateTimeField(blank=True, null=True)),
                ("trouble", models.CharField(blank=True, default="", max_length=16)),
                ("words", models.TextField(blank=True, default="")),
                ("troubled_at", models.DateTimeField(blank=True, null=True)),
                ("let_in", models.PositiveBigIntegerField(default=0)),
                ("refused", models.PositiveBigIntegerField(default=0)),
                ("created_at", models.DateTimeField()),
                ("updated_at", models.DateTimeField()),
            ],
            options={
                "ordering": ["host", "group", "credential"],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("account", "host", "group", "credential"),
                        name="qstash_server_gate_once",
                    )
                ],
            },
        ),
        migrations.AddField(
            model_name="message",
            name="gate",
            field=models.ForeignKey(
                blank=True,
                db_index=False,
                null=True,
                on_delete=django.db.models.deletion.SET_NULL,
                related_name="+",
                to="qstash_server.gate",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("due_at__isnull", False), ("gate__isnull", False)),
                fields=["due_at", "id"],
                name="qstash_server_due_at_gate",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(("waits_for", "gate")),
                fields=["gate", "id"],
                name="qstash_server_at_gate",
            ),
        ),
        migrations.AddIndex(
            model_name="message",
            index=models.Index(
                condition=models.Q(
                    models.Q(("claim_token", ""), _negated=True), ("gate__isnull", False)
                ),
                fields=["gate", "claimed_at"],
                name="qstash_server_past_gate",
            ),
        ),
    ]
