"""``Caller``: somebody who was believed at the OpenAI-compatible endpoint, and what is theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .api_key import ApiKey
from .request import CallerKind, LLMRequest, LLMRequestQuerySet


@dataclass(frozen=True, kw_only=True)
class Caller:
    kind: CallerKind
    user: Any = None
    """For whom it is spent; None is nobody."""
    api_key: ApiKey | None = None

    @property
    def name(self) -> str:
        """Of whom there is one: what each caller's idempotency keys are kept apart by."""
        whose: Any = {CallerKind.KEY: self.api_key, CallerKind.USER: self.user}.get(self.kind)
        return f"{self.kind} {whose.pk}" if whose else str(self.kind)

    @property
    def owner(self) -> dict[str, Any]:
        """The columns that say whose a row is. Of others' a caller sees nothing, nor of what the
        project has asked itself."""
        return {"caller": self.kind, "api_key": self.api_key, "user": self.user}

    @property
    def tenant(self) -> str:
        return self.api_key.tenant if self.api_key else ""

    @property
    def provider(self) -> str:
        return self.api_key.provider if self.api_key else ""

    def has(self, scope: str) -> bool:
        return self.api_key is None or scope in self.api_key.scopes

    def may_ask(self, provider: str, model: str) -> bool:
        return self.api_key is None or self.api_key.may_ask(provider, model)

    def llm_requests(self) -> LLMRequestQuerySet:
        rows: LLMRequestQuerySet = LLMRequest.objects.filter(**self.owner)
        return rows
