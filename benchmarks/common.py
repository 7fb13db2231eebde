"""What every benchmark's JSON states: commit, hardware, versions, seed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyperflexis.errors import HyperFlexisError

RESULTS = Path(__file__).parent / "results"


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


def command() -> str:
    """This run's command line, folders left out."""
    return " ".join(word.rpartition("/")[2] for word in sys.argv)


def resumable(work: Callable[[], None]) -> int:
    """The exit status of ``work``, which can be interrupted and goes on where it was."""
    try:
        work()
    except HyperFlexisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def write_results(file: Path, found: dict[str, Any]) -> None:
    """Write ``found`` as JSON, and say where."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {file}")
