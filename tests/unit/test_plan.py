"""`hyperflexis plan`: what it finds, and what it says when there is nothing to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperflexis import cli
from hyperflexis.fleet_search import Search

WORKLOAD = """\
seed: 3
duration_s: 4
max_context: 4096
arrivals: {rate_rps: 60, cv: 1.5}
classes:
  - {name: code, share: 0.6, ttft_ms: 300, tpot_ms: 40, lengths: {prompt: 1500, output: 20}}
  - {name: batch, share: 0.4, e2e_ms: 30000, lengths: {prompt: 1500, output: 100}}
"""
PROFILE = "h100-llama-3.1-8b"


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(WORKLOAD)
    return path


def plan(workload: Path, *options: str) -> int:
    return cli.main(["plan", str(workload), "--jobs", "1", *options])


def planned(workload: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = workload.with_name("plan.json")
    status = plan(workload, "--json", str(out), *options)
    return status, json.loads(out.read_text())


@given(st.integers(0, 5), st.integers(1, 200), st.integers(-5, 300), st.integers(0, 250))
def test_the_search_finds_the_least_that_passes_and_tries_nothing_twice(
    least: int, span: int, guess: int, answer: int
) -> None:
    search = Search(least, least + span, guess)
    tried: list[int] = []
    while (size := search.next()) is not None:
        assert least <= size <= least + span
        assert size not in tried
        tried.append(size)
        search.note(size, size >= answer)
    assert search.passed == (max(answer, least) if answer <= least + span else None)
    assert len(tried) <= 18  # two ways of eight halvings, and both ends


def test_the_search_is_short_where_the_guess_is_right() -> None:
    search, tried = Search(1, 64, 6), 0
    while (size := search.next()) is not None:
        search.note(size, size >= 6)
        tried += 1
    assert tried == 2


def test_the_fewest_instances_are_those_that_simulate_says(workload: Path) -> None:
    status, found = planned(workload, "--profile", PROFILE, "--target", "0.97", "--seeds", "1,2", "--no-scale")
    assert status == 0
    best = {one["kind"]: one for one in found["options"]}
    size = best["colocated"]["size"]
    assert size > 1

    def attainment(instances: int) -> float:
        out = workload.with_name("simulated.json")
        options = ["--instances", str(instances), "--policies", "hyperflexis", "--seeds", "1,2", "--jobs", "1"]
        cli.main(["simulate", str(workload), "--profile", PROFILE, *options, "--json", str(out)])
        kept: float = json.loads(out.read_text())["policies"]["hyperflexis"]["attainment"]
        return kept

    assert attainment(size) == best["colocated"]["attainment"] >= 0.97
    assert attainment(size - 1) < 0.97
    assert found["best"]["cost_per_hour"] == pytest.approx(6.88 * found["best"]["mean_instances"])
    assert {one["prefill"] is None for one in found["tried"] if one["kind"] == "disaggregated"} <= {True, False}


def test_the_cheaper_device_wins_and_a_price_may_be_given(workload: Path) -> None:
    options = ("--target", "0.97", "--seeds", "1", "--no-scale", "--modes", "colocated")
    _, found = planned(workload, "--profile", f"{PROFILE}=100", "--profile", "a100-llama-3.1-8b", *options)
    assert found["best"]["profile"] == "a100-llama-3.1-8b"
    assert found["prices_per_hour"] == [100.0, 3.43]
    assert {one["profile"] for one in found["options"]} == {PROFILE, "a100-llama-3.1-8b"}


def test_a_fleet_that_follows_the_demand_is_tried_beside_foresight(workload: Path) -> None:
    options = ("--target", "0.9", "--seeds", "1", "--start", "2", "--modes", "colocated")
    _, found = planned(workload, "--profile", PROFILE, *options)
    by_kind = {one["kind"]: one for one in found["options"]}
    assert set(by_kind) == {"colocated", "scaled", "foresight"}
    assert by_kind["foresight"]["attainment"] >= 0.9
    assert by_kind["scaled"]["peak_instances"] >= by_kind["scaled"]["mean_instances"]


def test_no_fleet_may_be_enough(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = plan(workload, "--profile", PROFILE, "--max", "1", "--seeds", "1", "--no-scale", "--modes", "colocated")
    assert status == 1
    assert "No fleet of at most 1 instances keeps the target; 1 colocated came nearest" in capsys.readouterr().out


def test_the_picture_is_drawn(workload: Path, tmp_path: Path) -> None:
    options = ("--target", "0.9", "--seeds", "1", "--no-scale", "--report", str(tmp_path / "out"))
    assert plan(workload, "--profile", PROFILE, *options) == 0
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--profile", PROFILE, "--target", "1"], "--target 1 must be below 1"),
        (["--profile", f"{PROFILE}=dear"], "'dear' is no price an hour"),
        (["--profile", PROFILE, "--profile", PROFILE], f"--profile {PROFILE} is given twice"),
        (["--profile", PROFILE, "--profile", "ascend-910b3"], "say its price: ascend-910b3=DOLLARS_AN_HOUR"),
        (["--profile", PROFILE, "--modes", "collocated"], "'collocated' is none of colocated, disaggregated"),
        (["--profile", PROFILE, "--max", "0"], "--max 0 must be at least 1"),
        (["--profile", PROFILE, "--max", "1", "--modes", "disaggregated"], "needs at least two instances"),
        (["--profile", PROFILE, "--start", "soon"], "--start 'soon' is neither"),
    ],
)
def test_mistakes_are_told(options: list[str], words: str, workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(workload, *options) == 2
    assert words in capsys.readouterr().err


def test_several_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(WORKLOAD.replace("name: code,", "name: code, model: a,"))
    assert plan(path, "--profile", PROFILE) == 2
    assert "plan sizes one model's fleet at a time" in capsys.readouterr().err
