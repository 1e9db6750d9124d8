"""How many cases are generated: few, or with `--hypothesis-profile=thorough` many."""

from hypothesis import HealthCheck, settings

for name, cases in (("short", 30), ("thorough", 800)):
    settings.register_profile(
        name, max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
settings.load_profile("short")
