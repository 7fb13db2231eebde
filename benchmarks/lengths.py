"""How well output lengths are expected (core/lengths.py), and what remains of a running request (batcher.py).

    python benchmarks/lengths.py --traces DIR [--rows 40000] [--json FILE]

Each row of a trace is a request: its length is expected from the rows before it, then learnt. ``--traces`` is the
folder, searched with all below it, of the csv files that benchmarks/workloads/README.md names.
"""

from __future__ import annotations

import argparse
import csv
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from math import log, log2
from pathlib import Path
from statistics import fmean
from typing import Protocol

from common import RESULTS, environment, write_results
from hyperflexis.core.lengths import PRIOR, LengthModel
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.sequences import Sequence

TRACES = (
    "azure2023_conv",
    "azure2023_code",
    "arxiv_summarization",
    "bwb",
    "sharegpt_8k",
    "mooncake_conversation",
    "servegen_mlarge",
    "claude_code_sessions",
)
WARM_UP = 200
"""Rows that are learnt but not counted."""
SEED = 101
MANY_TENANTS = 200
NO_LIMIT = 1 << 20
EMA_WEIGHT = 0.02


class Model(Protocol):
    """What is compared."""

    def predict(self, request: Request) -> float:
        """Expected output tokens."""

    def learn(self, request: Request, output_tokens: int) -> None:
        """Take in a finished request's length."""


class ClassMean:
    """The yardstick: an exponential mean of about the last 50 requests."""

    def __init__(self) -> None:
        self.mean: float | None = None

    def predict(self, request: Request) -> float:
        return PRIOR if self.mean is None else self.mean

    def learn(self, request: Request, output_tokens: int) -> None:
        self.mean = output_tokens if self.mean is None else self.mean + EMA_WEIGHT * (output_tokens - self.mean)


@dataclass
class Row:
    """A finished request."""

    request: Request
    num_output_tokens: int


def read(file: Path, rows: int) -> list[Row]:
    """The first ``rows`` requests that have an output. A ServeGen client is a tenant; a session is the request's id."""
    with file.open() as lines:
        found = (r for r in csv.DictReader(lines) if int(r["output_tokens"]) > 0)
        return [
            Row(
                Request(
                    r.get("session") or "r",
                    "m",
                    r.get("client_id") or "t",
                    "c",
                    Slo(),
                    1.0,
                    int(r["prompt_tokens"]),
                    NO_LIMIT,
                ),
                int(r["output_tokens"]),
            )
            for r in islice(found, rows)
        ]


def score(rows: list[Row], model: Model, seen: Callable[[Request], Request]) -> dict[str, float]:
    """Mean absolute log error, root mean square error over the mean length, and the ratio of the sums, of what
    ``model`` expects where ``seen`` is all that it sees of a request."""
    expected = []
    for row in rows:
        request = seen(row.request)
        expected.append(model.predict(request))
        model.learn(request, row.num_output_tokens)
    pairs = [(e, row.num_output_tokens) for e, row in zip(expected, rows, strict=True)][WARM_UP:]
    mean = fmean(o for _, o in pairs)
    return {
        "log_error": round(fmean(abs(log(o / e)) for e, o in pairs), 3),
        "rmse": round(fmean((o - e) ** 2 for e, o in pairs) ** 0.5 / mean, 3),
        "bias": round(sum(e for e, _ in pairs) / sum(o for _, o in pairs), 3),
    }


def remaining(rows: list[Row], seed: int) -> dict[str, float]:
    """Mean absolute log error of the tokens still to come, at a random token of the run: of what the Batcher expects,
    and of the mean residual life of the requests so far whose prompt was of nearly the same length."""
    rng = random.Random(seed)
    model = LengthModel()
    lengths: dict[int, list[int]] = {}
    weights, batcher, curve = 0, 0.0, 0.0
    for index, row in enumerate(rows):
        request, length = row.request, row.num_output_tokens
        bucket = lengths.setdefault(int(8 * log2(request.num_prompt_tokens or 1)), [])
        if index >= WARM_UP:
            output = int(rng.random() * length)
            left = length - output
            seq = Sequence("r", 1, NO_LIMIT, expected_output_tokens=model.predict(request), _output=output)
            longer = bucket[bisect_right(bucket, output) :]
            survived = fmean(longer) - output if longer else seq.expected_remaining
            weights += length
            batcher += length * abs(log(left / seq.expected_remaining))
            curve += length * abs(log(left / survived))
        model.learn(request, length)
        bucket.insert(bisect_right(bucket, length), length)
    return {"batcher": round(batcher / weights, 3), "survival_curve": round(curve / weights, 3)}


def measure(rows: list[Row]) -> dict[str, object]:
    """All figures of one trace. With many tenants that do not differ, the tenant should cost little."""
    rng = random.Random(SEED)
    mixed = [replace(r, request=replace(r.request, tenant=f"t{rng.randrange(MANY_TENANTS)}")) for r in rows]
    return {
        "rows": len(rows),
        "mean_output_tokens": round(fmean(row.num_output_tokens for row in rows), 1),
        "class_mean": score(rows, ClassMean(), lambda r: r),
        "class": score(rows, LengthModel(), lambda r: replace(r, num_prompt_tokens=1, tenant="t")),
        "prompt": score(rows, LengthModel(), lambda r: replace(r, tenant="t")),
        "tenant": score(rows, LengthModel(), lambda r: replace(r, num_prompt_tokens=1)),
        "session": score(rows, LengthModel(), lambda r: replace(r, num_prompt_tokens=1, tenant=r.id)),
        "all": score(rows, LengthModel(), lambda r: r),
        "all_with_200_equal_tenants": score(mixed, LengthModel(), lambda r: r),
        "remaining": remaining(rows, SEED),
    }


def main() -> None:
    """The table, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--json", type=Path, default=RESULTS / "lengths.json")
    args = parser.parse_args()
    found: dict[str, object] = {}
    for name in TRACES:
        files = sorted(args.traces.rglob(f"{name}*.csv"))
        if not files:
            print(f"{name}: no {name}*.csv below {args.traces}")
            continue
        found[name] = figures = measure(read(files[0], args.rows))
        print(f"{name}: " + " ".join(f"{key}={value}" for key, value in figures.items()), flush=True)
    write_results(args.json, environment(SEED) | {"traces": found})


if __name__ == "__main__":
    main()
