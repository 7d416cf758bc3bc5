from __future__ import annotations

from django.contrib import admin

from django_qstash_llm.admin import CostColumn

from .models import Article


@admin.register(Article)
class ArticleAdmin(CostColumn, admin.ModelAdmin):
    list_display = ("title", "source", "is_summarised")
    search_fields = ("title",)

    @admin.display(boolean=True, description="summary")
    def is_summarised(self, article: Article) -> bool:
        return bool(article.summary)
