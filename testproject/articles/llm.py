from __future__ import annotations

from django_qstash_llm.triggers import Trigger, register

from .models import Article


@register(Article)
class Summarise(Trigger):
    """When an article is saved without a summary, ask for one."""

    answer_field = "summary"

    def condition(self, article: Article, *, created: bool) -> bool:
        return not article.summary

    def messages(self, article: Article) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "Summarise the user's text in two sentences."},
            {"role": "user", "content": article.body},
        ]
