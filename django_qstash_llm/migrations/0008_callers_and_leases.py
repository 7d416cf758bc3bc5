from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("django_qstash_llm", "0007_api_keys")]

    operations = [
        migrations.AddField(
            model_name="keptanswer",
            name="leased_until",
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name="llmrequest",
            name="caller",
            field=models.CharField(
                blank=True,
                choices=[("key", "API key"), ("user", "user"), ("qstash", "QStash token")],
                help_text="Who asked, at the OpenAI-compatible endpoint; empty is the project itself.",
                max_length=16,
                verbose_name="caller",
            ),
        ),
    ]
