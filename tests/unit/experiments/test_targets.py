"""What was to be reached, beside raw results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.experiments.targets import markdown

TITLES = {"ascend-azure": "A", "h100-poisson": "H", "not-run": "N"}


def mean(value: float) -> dict[str, Any]:
    return {"mean": value}


def test_a_missed_target_is_in_bold_and_what_was_not_run_a_dash(tmp_path: Path) -> None:
    lines = [
        {"scenario": "ascend-azure", "ratio": mean(4.4), "ours": mean(0.86)},
        {"scenario": "h100-poisson", "ratio": mean(4.5), "ours": mean(0.84)},
    ]
    (tmp_path / "e1.json").write_text(json.dumps({"lines": lines}))
    page = markdown(tmp_path, TITLES).splitlines()
    assert len(page) == 4  # targets of experiments without results have no line
    assert page[2].endswith("| **4.40 ×** | 4.50 × | – |")
    assert page[3].endswith("| 86.0% | **84.0%** | – |")


def test_targets_differ_by_device_and_arrivals(tmp_path: Path) -> None:
    def carried(door: float, every: float) -> list[dict[str, Any]]:
        return [
            {"policy": "hyperflexis", "every_class": {"value": mean(every)}},
            {"policy": "edf@512", "ours_over_it": {"value": mean(1.3)}},
            {"policy": "reject_at_door@512,1.1", "ours_over_it": {"value": mean(door)}},
        ]

    sweep = [{"points": mean(0.02)}, {"points": None}, {"points": mean(-0.006)}]
    lines = [
        {"scenario": "ascend-azure", "carried": carried(1.15, 0.99), "sweep": sweep},
        {"scenario": "h100-poisson", "carried": carried(1.15, 1.0), "sweep": sweep[:2]},
    ]
    (tmp_path / "e2.json").write_text(json.dumps({"lines": lines}))
    fluid = [
        {"scenario": name, "ours": {"value": mean(0.86)}, "fluid": 1.0, "known_over_ours": {"value": mean(1.06)}}
        for name in ("ascend-azure", "h100-poisson")
    ]
    (tmp_path / "e4.json").write_text(json.dumps({"lines": fluid}))
    best, door, every, worst, share, told = markdown(tmp_path, TITLES).splitlines()[2:]
    assert best.endswith("| 1.30 × | 1.30 × | – |")
    assert door.endswith("| **1.15 ×** | 1.15 × | – |")
    assert every.endswith("| **0.99** | 1.00 | – |")
    assert worst.endswith("| **−0.60 points** | 2.00 points | – |")
    assert share.endswith("| 86.0% | **86.0%** | – |")
    assert told.endswith("| **1.06 ×** | **1.06 ×** | – |")
