from __future__ import annotations

from django.db import migrations
from django.db.models import F
from django.utils import timezone


def know_what_has_been_applied(apps, schema_editor):
    """Receipts used to take effect as they were stored, and requests to wait without a deadline."""
    using = schema_editor.connection.alias
    receipts = apps.get_model("django_qstash_llm", "CallbackResponse").objects.using(using)
    receipts.filter(applied_at=None).exclude(kind="quarantined").update(applied_at=F("received_at"))
    requests = apps.get_model("django_qstash_llm", "LLMRequest").objects.using(using)
    requests.filter(state="submitted", deadline_at=None).update(deadline_at=timezone.now())


class Migration(migrations.Migration):
    dependencies = [("django_qstash_llm", "0002_deadlines_and_circuits")]

    operations = [migrations.RunPython(know_what_has_been_applied, migrations.RunPython.noop)]
