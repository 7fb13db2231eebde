"""vLLM: an adapter for its servers (engine.py), their start (server.py), and a scheduler for the inside of one.

    vllm serve MODEL --scheduler-cls hyperflexis.engines.vllm.SloScheduler

The scheduler is imported when it is asked for, since it alone needs vLLM.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SloScheduler":
        from .scheduler import SloScheduler

        return SloScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
