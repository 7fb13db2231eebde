"""What every benchmark's JSON states: commit, hardware, versions, seed."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any


def environment(seed: int) -> dict[str, Any]:
    """Commit, processor, cores, Python and seed of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "commit": commit or "unknown",
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "seed": seed,
    }
