"""Hypothesis profiles: the default tries the same few examples in every run; ``fuzz`` looks for new ones, long."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Deadlines and the speed of drawing measure the machine, not the code.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "fuzz",
    derandomize=False,
    deadline=None,
    max_examples=20_000,
    stateful_step_count=100,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("default")
