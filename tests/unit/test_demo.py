"""What the demo reads from its fleets, and what its command line takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hyperflexis import demo
from hyperflexis.config import read_fleet
from hyperflexis.core.slo import Slo
from hyperflexis.demo_measure import Counted, counted, metric
from hyperflexis.errors import ConfigError
from hyperflexis.metrics import GatewayMetrics, Levels, Outcome

METRICS = """\
# HELP hyperflexis_instances_ready Ready instances
# TYPE hyperflexis_instances_ready gauge
hyperflexis_instances_ready{model="model-20m"} 1.0
hyperflexis_instances_ready{model="a \\"b\\""} 2.0
# HELP hyperflexis_requests_running Requests that an instance computes
# TYPE hyperflexis_requests_running gauge
hyperflexis_requests_running{instance="model-20m-0"} 7.0
"""


def test_ready_instances_are_those_of_the_model() -> None:
    assert metric(METRICS, "instances_ready", model="model-20m") == 1
    assert metric(METRICS, "instances_ready", model='a "b"') == 2
    assert metric(METRICS, "instances_ready", model="other") == 0
    assert metric("", "instances_ready", model="model-20m") == 0


def test_a_window_counts_what_came_in_it_and_was_not_cancelled() -> None:
    levels = Levels(0, 0, True, {}, (), {})
    metrics = GatewayMetrics(lambda: levels)

    def end(outcome: Outcome, ttft_s: float, e2e_s: float) -> None:
        metrics.request_ended("m", "chat", outcome, Slo(ttft_s=0.2, tpot_s=0.1), 8, 5, ttft_s, e2e_s)

    end("finished", 0.1, 0.3)
    metrics.handed_over("m", "chat", 0.01)
    before = counted(metrics.render().decode())
    assert before == Counted(requests=1, ttft_attained=1, tpot_attained=1, handed=1)
    end("finished", 0.1, 3.0)
    end("finished", 0.4, 0.6)
    end("failed", 0.1, 0.2)
    end("cancelled", 0.1, 0.2)
    metrics.handed_over("m", "chat", None)
    metrics.handoff_failed("m")
    found = Counted().plus(before, counted(metrics.render().decode()))
    assert found == Counted(requests=3, ttft_attained=1, tpot_attained=1, handed=1, failed_handoffs=1)


def plan(*arguments: str) -> demo.Plan:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.make_plan(parser.parse_args(arguments))


def test_roles_are_left_to_hyperflexis_and_static_for_the_others() -> None:
    assert plan("--policies", "round_robin,hyperflexis").roles("round_robin") == {}
    apart = plan("--mode", "disaggregated")
    assert apart.roles("hyperflexis") == apart.roles("hyperflexis@512") == {"mode": "disaggregated"}
    assert apart.roles("round_robin") == {"mode": "disaggregated", "prefill": 1, "roles": "static"}
    assert plan("--mode", "disaggregated", "--engine", "emulated").roles("round_robin")["prefill"] == 2
    with pytest.raises(ConfigError, match="needs two at least"):
        plan("--mode", "disaggregated", "--instances", "1")


def test_fleets_of_a_disaggregated_demo_can_be_served(tmp_path: Path) -> None:
    apart = plan("--mode", "disaggregated", "--engine", "emulated")
    model: dict[str, object] = {"name": "m", "engine": "emulated", "profile": apart.profile, "instances": {"min": 4}}
    found = {}
    for policy in apart.policies:
        demo.FleetProcess(policy, tmp_path / policy, model | apart.roles(policy), 4, apart.workload)
        fleet = read_fleet(tmp_path / policy / "fleet.yaml")
        found[policy] = fleet.disaggregated, fleet.prefill, fleet.static_roles
    assert found == {"round_robin": (True, 2, True), "hyperflexis": (True, 0, False)}


def test_what_the_gateway_counted_is_told_by_stage() -> None:
    line = demo.stage_line(plan("--mode", "disaggregated"), "round_robin", Counted(8, 6, 4, 7, 1))
    assert "1 for prompts, 1 to decode" in line
    assert "first token in time 75.0%, pace kept 50.0%, 7 handoffs, 1 failed" in line


def test_figures_may_go_to_a_file_or_to_standard_output() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([]).json is None
    assert parser.parse_args(["--json", "-"]).json == "-"
