"""What it costs to follow the load: ``python -m benchmarks.scaling --traces DIR``, from the repository's root.

Runs that were performed before are in .experiments/scaling.jsonl; the rest is performed. Raw results go to
benchmarks/results/scale/*.json, tables and a picture to docs/policies/scale.md. Ctrl-C stops it, and the same command
goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec

from hyperflexis.errors import ConfigError, HyperFlexisError

from ..common import environment
from ..experiments.measure import ROOT
from ..experiments.pages import write_document
from ..experiments.scenarios import SUFFIXES, WORKLOADS, csv_names
from ..experiments.tables import replaced
from .parts import PARTS, Part
from .runs import Runs, Task, Traces

PAGE = ROOT / "docs" / "policies" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results" / "scale"
CACHE = ROOT / ".experiments" / "scaling.jsonl"


def main() -> int:
    """Run the chosen parts, write results and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR", help="folder of the csv files")
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    args = parser.parse_args()
    try:
        runs = Runs(Traces(find_traces(args.traces)), CACHE, args.jobs)
        for name in args.only.split(","):
            if name not in PARTS:
                raise ConfigError(f"--only: there is no part {name!r}; there are {', '.join(PARTS)}")
            print(f"{name}:", flush=True)
            runs.used.clear()
            part = PARTS[name](runs)
            write(name, part, runs)
    except HyperFlexisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def find_traces(folder: Path) -> dict[str, Path]:
    """The csv files of all workloads here, wherever under ``folder`` they lie. Raises ConfigError for a missing one."""
    files = {path.name: path for path in sorted(folder.rglob("*.csv"))}
    found = {}
    for name in sorted({name for path in WORKLOADS.glob("scale-*.yaml") for name in csv_names(path.name)}):
        stem = name.removesuffix(".csv")
        path = next((files[f"{stem}{suffix}.csv"] for suffix in SUFFIXES if f"{stem}{suffix}.csv" in files), None)
        if path is None:
            raise ConfigError(f"{folder} has no {name}: benchmarks/workloads/README.md says how to get it")
        found[name] = path
    return found


def write(name: str, part: Part, runs: Runs) -> None:
    """Raw results and the page's section, which keeps the rest of the page."""
    made = environment(0)
    del made["seed"]
    document = {
        "made_with": made | {"sources": runs.sources},
        "found": msgspec.to_builtins(part.found),
        "runs": [settings(task) | asdict(row) for task, row in runs.used.items()],
    }
    write_document(RESULTS / f"{name}.json", document)
    PAGE.write_text(replaced(PAGE.read_text(), {name: part.markdown}))
    print(part.markdown, flush=True)


def settings(task: Task) -> dict[str, Any]:
    """Without those that are as usual."""
    usual = {field.name: field.default for field in fields(Task)}
    return {key: value for key, value in asdict(task).items() if value != usual[key]}


if __name__ == "__main__":
    sys.exit(main())
