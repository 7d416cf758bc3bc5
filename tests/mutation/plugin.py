"""For pytest, which mutmut runs again and again in one process and its children."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "mutation",
    # The same examples for each mutant, or one would be killed today and survive tomorrow.
    derandomize=True,
    database=None,
    deadline=None,
    # mutmut collects the tests anew for each run, so that a test has another instance.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
settings.load_profile("mutation")
