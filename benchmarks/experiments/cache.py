"""Runs that were performed before, so that an interrupted `make experiments` goes on where it was.

A run is found again by a digest of all that decides its figures: its settings, the sources of policies, core and
simulator, those of scenarios.py and measure.py, the profile, the workload and its traces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Protocol, TypeVar

import hyperflexis
from hyperflexis.engines.profiles import shipped_profiles

from .measure import ROOT, Task
from .scenarios import SCENARIOS, WORKLOADS, csv_names

PACKAGE = Path(hyperflexis.__file__).parent
SOURCES = (
    "core",
    "policy",
    "sim",
    "batcher.py",
    "controller.py",
    "disaggregation.py",
    "kv_blocks.py",
    "loading.py",
    "scaling.py",
    "sequences.py",
)
"""Of the package: what a run's figures depend on."""
OWN = ("scenarios.py", "measure.py")
"""The same, beside this file."""
REQUEST_S = 1e-3
"""Seconds of a core that a request costs where no earlier run tells: of the right order on a core of 2020."""


class Files:
    """Digests of files, each of which is read once."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def code(self, parts: Iterable[str], own: Iterable[Path]) -> str:
        """Of ``parts`` of the package, files and folders, and what a benchmark has of its ``own``."""
        return self.digest([*(path for part in parts for path in _python_files(PACKAGE / part)), *own])

    def digest(self, files: Sequence[Path]) -> str:
        """Of all of them, in this order."""
        for path in files:
            if path not in self._digests:
                self._digests[path] = _digest(path.read_bytes())
        return _digest(" ".join(self._digests[path] for path in files).encode())

    def key(self, task: Any, sources: str, files: Sequence[Path]) -> str:
        """The cache's key of ``task``, a dataclass, that runs code of digest ``sources`` on these ``files``."""
        settings = json.dumps(asdict(task), sort_keys=True)
        return _digest(f"{settings} {sources} {self.digest(files)}".encode())


class Digests:
    """Of everything that a run depends on besides its settings."""

    def __init__(self, traces: Mapping[str, Path]) -> None:
        self._traces = traces
        self._files = Files()

    @cached_property
    def sources(self) -> str:
        """Of the code."""
        return self._files.code(SOURCES, [Path(__file__).with_name(name) for name in OWN])

    def key(self, task: Task) -> str:
        """The cache's key of ``task``."""
        scenario = SCENARIOS[task.scenario]
        files = [WORKLOADS / scenario.workload, shipped_profiles().get(scenario.profile, Path(scenario.profile))]
        files += [self._traces[name] for name in sorted(csv_names(scenario.workload)) if name in self._traces]
        if task.policy.endswith(".py"):
            files += [ROOT / task.policy, ROOT / "benchmarks" / "ablations" / "__init__.py"]
        return self._files.key(task, self.sources, files)


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Costed(Protocol):
    """A row: what a run gave, of how many requests, and the seconds of a core that it took."""

    @property
    def requests(self) -> int:
        """How many."""

    @property
    def cpu_s(self) -> float:
        """Seconds."""


R = TypeVar("R", bound=Costed)


class Cache(Generic[R]):
    """Rows as JSON lines in a file that only grows. Lines that were cut off or are of another form are skipped: their
    runs are performed again."""

    def __init__(self, path: Path, row_from: Callable[[dict[str, Any]], R]) -> None:
        self._path = path
        self._rows: dict[str, R] = {}
        self._cost_s: dict[str, list[float]] = {}
        text = path.read_text() if path.exists() else ""
        self._cut_off = not text.endswith("\n") and text != ""
        for line in text.splitlines():
            try:
                found = json.loads(line)
                self._add(found["key"], found["policy"], row_from(found["row"]))
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str) -> R | None:
        """The row of that key, None when it has not been measured."""
        return self._rows.get(key)

    def put(self, key: str, policy: str, row: R) -> None:
        """Keep a row, at once."""
        self._add(key, policy, row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            line = json.dumps({"key": key, "policy": policy, "row": asdict(row)}, separators=(",", ":"))
            file.write(f"\n{line}\n" if self._cut_off else f"{line}\n")
            self._cut_off = False

    def request_s(self, policy: str) -> float:
        """Seconds of a core that a request costs under ``policy``, as far as earlier runs tell."""
        return fmean(self._cost_s.get(_family(policy), [REQUEST_S]))

    def _add(self, key: str, policy: str, row: R) -> None:
        self._rows[key] = row
        self._cost_s.setdefault(_family(policy), []).append(row.cpu_s / row.requests)


def _family(policy: str) -> str:
    return "hyperflexis" if policy.endswith(".py") else policy.partition("@")[0]
