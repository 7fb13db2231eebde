"""What all tests share."""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):  # the environment of the tests on real vLLM has none
    from hypothesis import HealthCheck, settings

    # How long an example takes, to make or to run, says how busy the machine is.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
