"""Delivering: claim what is due, call its destination, write down how that ended."""

from __future__ import annotations

from .engine import Engine, engine_if_kept, kept_engine
from .identity import process_identity, release_claims_of_the_dead

__all__ = [
    "Engine",
    "engine_if_kept",
    "kept_engine",
    "process_identity",
    "release_claims_of_the_dead",
]
