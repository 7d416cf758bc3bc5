from __future__ import annotations

from typing import Any

from django.db import migrations


def mark_what_keys_asked(apps: Any, schema_editor: Any) -> None:
    """Until now only rows with a key say that they were asked at the endpoint."""
    rows = apps.get_model("django_qstash_llm", "LLMRequest").objects
    rows.using(schema_editor.connection.alias).filter(api_key__isnull=False).update(caller="key")


class Migration(migrations.Migration):
    # Apart from the one that makes the column: PostgreSQL would have both in one transaction.
    dependencies = [("django_qstash_llm", "0008_callers_and_leases")]

    operations = [
        migrations.RunPython(mark_what_keys_asked, migrations.RunPython.noop, elidable=True)
    ]
