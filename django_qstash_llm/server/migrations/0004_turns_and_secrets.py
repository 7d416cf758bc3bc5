"""What was under way when the tables changed: who waits in a queue's line, and whose keys are where."""

from __future__ import annotations

from typing import Any

from django.db import migrations

from django_qstash_llm.server.redaction import parted


def take_over(apps: Any, schema_editor: Any) -> None:
    messages = apps.get_model("qstash_server", "Message").objects.using(
        schema_editor.connection.alias
    )
    line = messages.filter(finished_at=None, due_at=None, queue__isnull=False)
    line.update(waits_for="queue")
    changed = []
    for message in messages.only("headers", "secrets").iterator(chunk_size=200):
        message.headers, message.secrets = parted(message.headers)
        # A finished one has only the names left already.
        message.secrets = {k: v for k, v in message.secrets.items() if v != "REDACTED"}
        if message.secrets:
            changed.append(message)
    messages.bulk_update(changed, ["headers", "secrets"], batch_size=100)


class Migration(migrations.Migration):
    dependencies = [("qstash_server", "0003_flow_control_and_accounts")]

    operations = [migrations.RunPython(take_over, migrations.RunPython.noop, elidable=True)]
