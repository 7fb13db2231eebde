"""The options of `hyperflexis simulate`, what it refuses, and its figures over loads and seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.parity.replay import replay

from hyperflexis import cli, simulate
from hyperflexis.core.links import Link, Split
from hyperflexis.core.record import Record
from hyperflexis.core.slo import Slo
from hyperflexis.errors import ConfigError
from hyperflexis.policy.catalog import POLICIES, STEPS
from hyperflexis.policy_file import load_policy
from hyperflexis.simulate import log_lines, make_plan
from hyperflexis.simulate_options import parse_loads, parse_seeds
from hyperflexis.simulate_run import BoundTask, Runner, RunTask

WORKLOAD = """\
seed: 3
duration_s: 10
max_context: 4096
arrivals: {rate_rps: 12, cv: 1.5}
classes:
  - name: code
    share: 0.6
    ttft_ms: 200
    tpot_ms: 40
    lengths: {prompt: {lognormal: {median: 600, sigma: 1.0}}, output: 20}
  - {name: batch, share: 0.4, e2e_ms: 30000, lengths: {prompt: 1500, output: 100}}
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(WORKLOAD)
    return path


def command(workload: Path, *options: str) -> list[str]:
    return ["simulate", str(workload), "--profile", "h100-llama-3.1-8b", "--instances", "1", *options]


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser("simulate").parse_args(argv)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ("0.5:1.6:0.1", tuple(round(0.5 + 0.1 * i, 9) for i in range(12))),
        ("0.7,1.0,1.3", (0.7, 1.0, 1.3)),
        ("1.3,0.7,0.7", (0.7, 1.3)),
        ("1:2:0.4", (1.0, 1.4, 1.8)),
        ("0.9,1:1.2:0.1", (0.9, 1.0, 1.1, 1.2)),
        ("1", (1.0,)),
    ],
)
def test_loads(text: str, loads: tuple[float, ...]) -> None:
    assert parse_loads(text) == loads


@pytest.mark.parametrize(
    "text",
    ["", "a", "1:2", "1:2:3:4", "0:1:0.1", "2:1:0.1", "1:2:0", "-1", "1,", "nan", "1:inf:1", "1:2:nan", "1:9:1e-9"],
)
def test_loads_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--loads"):
        parse_loads(text)


def test_seeds() -> None:
    assert parse_seeds("2,1") == (2, 1)
    for text in ("", "a", "1,,2", "1.5", "-1", "1,1", "²", "9" * 30):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policies", "hyperflex"], ["hyperflex", "did you mean hyperflexis"]),
        (["--policies", "edf@x"], ["edf@512"]),
        (["--policies", "nothing.py"], ["nothing.py", "no such file"]),
        (["--profile", "h200"], ["h200", "h100-llama-3.1-8b"]),
        (["--loads", "0:1:0.1"], ["--loads", "above 0"]),
        (["--seeds", "one"], ["--seeds", "1,2,3"]),
        (["--instances", "0"], ["--instances", "at least 1"]),
        (["--duration", "0"], ["--duration", "above 0"]),
        (["--noise", "-0.1"], ["--noise", "at least 0"]),
        (["--device-factor", "0"], ["--device-factor", "above 0"]),
        (["--report-delay-ms", "nan"], ["--report-delay-ms"]),
        (["--fault", "kill:0"], ["--fault 'kill:0'", "kill:0@60+10"]),
        (["--fault", "kill:9@1+1"], ["--fault", "instances 0 to"]),
        (["--fault", "kill:0@1+1x5"], ["--fault", "slow"]),
        (["--jobs", "0"], ["--jobs", "at least 1"]),
        (["--csv", "x"], ["NAME=FILE"]),
        (["--log", "x", "--seeds", "1,2"], ["--log", "one policy"]),
        (["--journal", "x", "--policies", "edf", "--loads", "1,2"], ["--journal", "one load"]),
        (["--journal", "x"], ["--policies hyperflexis"]),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], words: list[str], workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(command(workload, *options), capsys)
    assert all(word in error for word in words), error


def test_a_missing_workload_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml" in error_of(command(tmp_path / "nothing.yaml"), capsys)


def test_each_model_needs_an_instance(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload.write_text(WORKLOAD.replace("name: code", "name: code\n    model: big"))
    error = error_of(command(workload), capsys)
    assert "at least 2" in error and "big" in error


def test_a_workload_without_arrivals_is_refused(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload.write_text(WORKLOAD.replace("rate_rps: 12", "rate_rps: 0.0001"))
    assert "no arrival" in error_of(command(workload), capsys)


def test_loads_scale_the_rate_to_the_capacity(workload: Path) -> None:
    plan = make_plan(parse(*command(workload, "--loads", "0.5,1", "--seeds", "1,2", "--policies", "edf,hyperflexis")))
    assert plan.rates == {0.5: 0.5 * plan.capacity_rps, 1.0: plan.capacity_rps}
    runs = [task for task in plan.tasks() if isinstance(task, RunTask)]
    assert len(runs) == 2 * 2 * 2 and runs[0].cell.load == 1.0
    runner = Runner(plan.setting)
    rps = len(runner.arrivals(plan.cell(0.5, 3))) / 10.0  # the workload's own seed, whose mix the capacity is of
    assert rps == pytest.approx(0.5 * plan.capacity_rps, rel=0.2)


def test_without_loads_the_workload_keeps_its_rate(workload: Path) -> None:
    plan = make_plan(parse(*command(workload, "--bound")))
    assert [task.cell.rate_scale for task in plan.tasks()] == [1.0, 1.0, 1.0]
    assert [type(task) for task in plan.tasks()] == [RunTask, RunTask, BoundTask]
    assert plan.seeds == (3,) and plan.chosen == plan.workload_rps / plan.capacity_rps


def test_only_the_load_nearest_to_capacity_is_looked_at_in_detail(workload: Path) -> None:
    options = ("--loads", "0.5,0.9,1.5", "--seeds", "4,5", "--report", "out", "--policies", "edf")
    tasks = make_plan(parse(*command(workload, *options))).tasks()
    detailed = [task for task in tasks if isinstance(task, RunTask) and task.detailed]
    assert [(task.cell.load, task.cell.seed) for task in detailed] == [(0.9, 4)]


def figures_of(argv: list[str], tmp_path: Path) -> dict[str, Any]:
    assert cli.main([*argv, "--json", str(tmp_path / "figures.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found


def test_the_sweep_ends_in_the_load_that_is_carried(workload: Path, tmp_path: Path) -> None:
    options = ("--policies", "round_robin", "--loads", "0.2,3", "--seeds", "1,2", "--jobs", "1")
    found = figures_of(command(workload, *options), tmp_path)
    policy = found["policies"]["round_robin"]
    low, high = (point["attainment"] for point in policy["sweep"])
    assert low >= 0.9 > high
    load = 0.2 + (low - 0.9) / (low - high) * 2.8
    assert policy["goodput_at_90"]["load"] == pytest.approx(load)
    assert policy["goodput_at_90"]["rps"] == pytest.approx(load * found["capacity_rps"])
    assert policy["knee_all_classes_90"]["load"] <= load
    assert [one["load"] is not None for one in policy["goodput_at_90"]["by_seed"]] == [True, True]
    first, second = policy["sweep"][0]["by_seed"]["attainment"]
    assert policy["sweep"][0]["attainment"] == pytest.approx((first + second) / 2)
    assert policy["load"] == 0.2  # the nearest to 1 stands for all


def test_a_slower_device_and_noise_and_late_reports_change_the_run(workload: Path, tmp_path: Path) -> None:
    base = command(workload, "--policies", "hyperflexis", "--jobs", "1")
    found = {
        options: figures_of([*base, *options], tmp_path)["policies"]["hyperflexis"]["mean_e2e_s"]
        for options in (
            (),
            ("--noise", "0.2"),
            ("--device-factor", "1.5"),
            ("--report-delay-ms", "500", "--instances", "2"),
            ("--instances", "2"),
        )
    }
    assert found["--device-factor", "1.5"] > 1.2 * found[()]
    assert len(set(found.values())) == len(found)


def test_the_log_has_a_line_per_request() -> None:
    slo = Slo(1.0)
    lines = log_lines(
        [
            Record("chat", slo, 0.5, 10, 5, "finished", 0.2, 0.6, 5, "0"),
            Record("chat", slo, 0.7, 10, 5, "rejected", detail="overloaded"),
        ]
    ).splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["on_time"] and first["ttft_s"] == 0.2 and first["instance"] == "0"
    assert not second["on_time"] and second["ttft_s"] is None and second["detail"] == "overloaded"


# A user's policy file

PLACE = """\
from hyperflexis.policy.place import predict_first_come
def place(now, tracked, ready, memory):
    return predict_first_come(now, tracked, ready[-1], len(ready)), memory
"""
PLAN = """\
from hyperflexis.policy.baselines import first_come
def plan(now, waiting, running, latency, limits):
    return first_come.plan(now, waiting, running, latency, limits)
"""


WriteFile = Callable[..., str]
"""(text, name) -> path"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Iterator[WriteFile]:
    """Writes a policy file; what it adds to the catalog goes again."""
    policies, steps = dict(POLICIES), dict(STEPS)

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    yield write
    for catalog, before in ((POLICIES, policies), (STEPS, steps)):
        for key in catalog.keys() - before.keys():
            del catalog[key]


def test_a_file_may_define_place_or_plan_or_a_whole_policy(policy_file: WriteFile) -> None:
    name, policy = load_policy(policy_file(PLACE))
    assert name == "mine" and policy.step == "first_come" and POLICIES["mine"] is policy
    name, policy = load_policy(policy_file(PLAN))
    assert policy.place is POLICIES["least_loaded"].place and STEPS[policy.step].plan.__name__ == "plan"
    text = PLACE + "from hyperflexis.policy.catalog import Policy\nPOLICY = Policy(place, 'edf', chunk=256)\n"
    assert load_policy(policy_file(text, "whole.py"))[1].chunk == 256
    assert load_policy("edf@64")[1].chunk == 64


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("x = 1", "mine.py", "neither POLICY nor a function"),
        ("place = 3", "mine.py", "neither POLICY nor a function"),
        ("POLICY = 3", "mine.py", "POLICY is no"),
        ("x = 1\nimport nothing_at_all", "mine.py", "mine.py:2: ModuleNotFoundError"),
        ("x = 1\ny = = 2", "mine.py", "mine.py:2: SyntaxError"),
        (PLACE, "edf.py", "rename the file"),
        (PLACE + "from hyperflexis.policy.catalog import Policy\nPOLICY = Policy(place, 'x')", "mine.py", "no step"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(text: str, name: str, words: str, policy_file: WriteFile) -> None:
    with pytest.raises(ConfigError, match=words):
        load_policy(policy_file(text, name))


def test_a_relative_path_may_be_loaded_again_and_is_told_with_its_line(
    policy_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy_file(PLACE)
    assert load_policy("mine.py")[0] == load_policy("mine.py")[0] == "mine"
    policy_file("x = 1\ny = nothing", "wrong.py")
    with pytest.raises(ConfigError, match=r"policy wrong\.py:2: NameError"):
        load_policy("wrong.py")


def test_two_files_of_one_name_are_refused(policy_file: WriteFile, tmp_path: Path) -> None:
    load_policy(policy_file(PLACE))
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="rename"):
        load_policy(policy_file(PLACE, "other/mine.py"))


def test_a_file_that_fails_while_it_runs_is_told_with_its_line(
    policy_file: WriteFile, workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policy_file("def place(now, tracked, ready, memory):\n    return ready[7]\n")
    error = error_of(command(workload, "--policies", path), capsys)
    assert f"{path}:2: IndexError" in error


def test_the_defaults_exist() -> None:
    for name in simulate.DEFAULT_POLICIES.split(","):
        assert load_policy(name)[1] is POLICIES[name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prefill", "1"], "--prefill needs --mode disaggregated"),
        (["--roles", "static"], "--roles static needs --mode disaggregated"),
        (["--mode", "disaggregated", "--prefill", "4"], "--prefill 4 must be from 1 to 3"),
        (["--mode", "disaggregated", "--prefill", "0"], "--prefill 0 must be from 1 to 3"),
        (["--mode", "auto", "--prefill", "1"], "leave out --prefill"),
        (["--mode", "auto", "--instances", "1"], "needs at least two instances"),
        (["--mode", "auto", "--link-gbps", "0"], "--link-gbps 0 must be above 0"),
    ],
)
def test_roles_that_make_no_sense_are_told(
    options: list[str], words: str, workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(command(workload, "--instances", "4", *options), capsys)


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ([], None),
        (["--mode", "auto"], Split(link=Link(bytes_per_s=25e9))),
        (["--mode", "disaggregated", "--prefill", "1"], Split(1, 0, True, Link(bytes_per_s=25e9))),
        (
            ["--mode", "disaggregated", "--prefill", "1", "--roles", "static", "--link-gbps", "8"],
            Split(1, 3, False, Link(bytes_per_s=1e9)),
        ),
    ],
)
def test_modes(options: list[str], split: Split | None, workload: Path) -> None:
    assert make_plan(parse(*command(workload, "--instances", "4", *options))).setting.split == split


def test_a_disaggregated_run_tells_of_handoffs_and_stages(workload: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.json", tmp_path / "journal.jsonl"
    options = ["--instances", "2", "--mode", "disaggregated", "--prefill", "1", "--roles", "static"]
    assert (
        cli.main(
            command(workload, *options, "--policies", "hyperflexis", "--json", str(out), "--journal", str(journal))
        )
        == 0
    )
    figures = json.loads(out.read_text())
    found = figures["policies"]["hyperflexis"]
    assert found["counters"]["handoffs"] > 50
    assert found["attainment"] <= min(found["ttft_attainment"], found["tpot_attainment"])
    assert figures["options"]["split"]["prefill"] == 1
    assert replay(journal) > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min", "2"], "--min needs --scale"),
        (["--standby", "1"], "--standby needs --scale"),
        (["--devices", "1"], "--devices needs --scale"),
        (["--fault", "fail-launch:0"], "need --scale"),
        (["--scale", "none"], "no scaler is named 'none'"),
        (["--scale", "rate@x"], "the numbers that rate takes"),
        (["--scale", "--start", "soon"], "--start 'soon' is neither"),
        (["--scale", "--start", "0"], "--start 0 must be above 0"),
        (["--scale", "--standby", "1"], "--standby needs --start standby"),
        (["--scale", "--min", "-1"], "--min -1 must be at least 0"),
        (["--scale", "--min", "3", "--max", "2"], "--max 2 must be at least 3"),
        (["--scale", "--target", "1"], "--target 1 must be below 1"),
    ],
)
def test_scaling_that_makes_no_sense_is_told(
    options: list[str], words: str, workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(command(workload, *options), capsys)


def test_a_scaled_run_costs_what_its_instances_were_there(workload: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.json", tmp_path / "journal.jsonl"
    options = ["--scale", "--start", "standby", "--standby", "1", "--max", "6", "--policies", "hyperflexis"]
    options += ["--json", str(out), "--journal", str(journal), "--report", str(tmp_path / "report")]
    assert cli.main(command(workload, *options)) == 0
    document = json.loads(out.read_text())
    found = document["policies"]["hyperflexis"]
    assert found["counters"]["launches"] >= 1
    assert found["simulated_s"] < found["accelerator_s"] < 8 * found["simulated_s"]
    assert document["options"]["scale"]["models"][0]["standby"] == 1
    assert replay(journal) > 100


def test_a_fixed_scaler_costs_what_a_fixed_fleet_costs(workload: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = []
    for options in ([], ["--scale", "fixed@1", "--start", "5"]):
        assert cli.main(command(workload, *options, "--policies", "hyperflexis", "--json", str(out))) == 0
        found.append(json.loads(out.read_text())["policies"]["hyperflexis"])
    assert found[0]["attainment"] == found[1]["attainment"]
    assert found[0]["accelerator_s"] == pytest.approx(found[1]["accelerator_s"])


def test_a_policy_that_is_told_lengths_is_a_curve_of_its_own(workload: Path, tmp_path: Path) -> None:
    workload.write_text(WORKLOAD.replace("output: 100", "output: {lognormal: {median: 100, sigma: 1.5}}"))
    options = ("--policies", "hyperflexis,hyperflexis+lengths", "--loads", "1.5", "--jobs", "1")
    found = figures_of(command(workload, *options), tmp_path)["policies"]
    assert list(found) == ["hyperflexis", "hyperflexis+lengths"]
    assert found["hyperflexis"]["mean_e2e_s"] != found["hyperflexis+lengths"]["mean_e2e_s"]


def test_a_file_may_be_told_lengths_too(policy_file: WriteFile) -> None:
    spec = policy_file(PLACE)
    name, policy = load_policy(f"{spec}+lengths")
    assert name == "mine+lengths" and policy is POLICIES["mine"]
    with pytest.raises(ConfigError, match="did you mean hyperflexis"):
        load_policy("hyperflex+lengths")
