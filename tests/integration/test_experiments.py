"""`python -m benchmarks.experiments --quick` as its users run it, and again after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300


def run(cache: Path, *options: str) -> str:
    argv = [sys.executable, "-m", "benchmarks.experiments", "--quick", "--cache", str(cache), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_quick_experiments_and_again_from_what_an_interruption_left(tmp_path: Path) -> None:
    said = run(tmp_path, "--only", "e1,e3", "--jobs", "2")
    assert "mixed-synthetic.yaml" in said and " 0 of them in the cache" in said
    found = results(tmp_path / "quick")
    assert set(found) == {"tuning", "e1", "e3"}
    assert found["e1"]["lines"][0]["ratio"]["mean"] > 0.0 and found["e1"]["runs"]
    page = (tmp_path / "quick" / "experiments.md").read_text()
    assert "Not measured in this run" in page.partition("generated: e2")[2]
    assert "| `hyperflexis` | round robin | ratio |" in page.partition("generated: e1")[2]

    runs = tmp_path / "runs.jsonl"
    text = runs.read_text()
    runs.write_text(text[: len(text) // 2])  # in the middle of a line
    run(tmp_path, "--only", "e1,e3", "--jobs", "1")
    assert results(tmp_path / "quick") == found
    assert (tmp_path / "quick" / "experiments.md").read_text() == page
