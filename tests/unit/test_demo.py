"""What the demo reads from its fleets, and what its command line takes."""

from __future__ import annotations

import argparse

from hyperflexis import demo

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
    assert demo.instances_ready(METRICS, "model-20m") == 1
    assert demo.instances_ready(METRICS, 'a "b"') == 2
    assert demo.instances_ready(METRICS, "other") == 0
    assert demo.instances_ready("", "model-20m") == 0


def test_figures_may_go_to_a_file_or_to_standard_output() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([]).json is None
    assert parser.parse_args(["--json", "-"]).json == "-"
