"""What it costs to follow the load: ``python -m benchmarks.scaling --traces DIR``, from the repository's root.

Runs that were performed before are in .experiments/scaling.jsonl; the rest is performed. Raw results go to
benchmarks/results/scale/*.json, tables and a picture to docs/policies/scale.md. Ctrl-C stops it, and the same command
goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import msgspec

from hyperflexis.errors import ConfigError

from ..common import resumable
from ..experiments.measure import ROOT
from ..experiments.pages import made_with, settings, write_document
from ..experiments.scenarios import WORKLOADS, find_traces
from ..experiments.tables import replaced
from .parts import PARTS, Part
from .runs import Runs, Traces

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
    return resumable(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Raises HyperFlexisError for what a user can mend."""
    traces = find_traces(args.traces, (path.name for path in WORKLOADS.glob("scale-*.yaml")))
    runs = Runs(Traces(traces), CACHE, args.jobs)
    for name in args.only.split(","):
        if name not in PARTS:
            raise ConfigError(f"--only: there is no part {name!r}; there are {', '.join(PARTS)}")
        print(f"{name}:", flush=True)
        runs.used.clear()
        part = PARTS[name](runs)
        write(name, part, runs)


def write(name: str, part: Part, runs: Runs) -> None:
    """Raw results and the page's section, which keeps the rest of the page."""
    document = {
        "made_with": made_with(runs.sources),
        "found": msgspec.to_builtins(part.found),
        "runs": [settings(task) | asdict(row) for task, row in runs.used.items()],
    }
    write_document(RESULTS / f"{name}.json", document)
    PAGE.write_text(replaced(PAGE.read_text(), {name: part.markdown}))
    print(part.markdown, flush=True)


if __name__ == "__main__":
    sys.exit(main())
