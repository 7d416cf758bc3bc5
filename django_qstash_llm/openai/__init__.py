"""The OpenAI-compatible API over our rows: any OpenAI client uses it by its ``base_url`` alone.

A URLconf and views, no models, so no app of its own::

    path("openai/v1/", include("django_qstash_llm.openai.urls"))
"""
