"""Durable LLM calls for Django: save a model, get an answer back."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("django-qstash-llm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
