"""An app with a model and a trigger, whose handler leaves a row for each time it ran."""

from __future__ import annotations
