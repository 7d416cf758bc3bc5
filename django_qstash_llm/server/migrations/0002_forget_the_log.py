"""The log's entries lean on their messages from here on. What the old ones told is history."""

from __future__ import annotations

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("qstash_server", "0001_initial")]

    operations = [migrations.DeleteModel("LogEntry")]
