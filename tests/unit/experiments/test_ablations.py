"""Policies with a part in its plain form: they still swap something that is there, and only for themselves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from benchmarks.ablations import altered
from benchmarks.experiments.measure import ROOT
from benchmarks.experiments.parts import find_parts, what

from hyperflexis.core.slo import Slo
from hyperflexis.engines.profiles import load_profile
from hyperflexis.policy import budget, step
from hyperflexis.policy.catalog import POLICIES, Policy
from hyperflexis.policy_file import load_policy
from hyperflexis.sim.config import SimConfig
from hyperflexis.sim.driver import simulate
from hyperflexis.sim.workload import Arrival

ARRIVALS = [Arrival(0.02 * i, "chat", Slo(0.3 + 0.02 * (i % 7), 0.03), 1.0, 200 + 97 * i % 3000, 20) for i in range(80)]


def test_an_altered_module_leaves_the_shipped_one_as_it_is() -> None:
    copy = altered(step, MIN_CHUNK=1, budget=altered(budget, LEAD=0.0))
    assert (copy.MIN_CHUNK, copy.budget.LEAD) == (1, 0.0)
    assert step.MIN_CHUNK != 1 and step.budget is budget and budget.LEAD != 0.0
    assert copy.plan is not step.plan and copy.plan.__globals__["MIN_CHUNK"] == 1


def test_a_part_that_is_gone_is_named() -> None:
    with pytest.raises(AttributeError, match=r"hyperflexis\.policy\.step has no PLAN_B"):
        altered(step, PLAN_B=1)


@pytest.mark.parametrize("part", find_parts(), ids=lambda part: Path(part).stem)
def test_every_ablation_is_a_policy_that_serves(part: str) -> None:
    name, rules = load_policy(str(ROOT / part))
    result = simulate(SimConfig(load_profile("h100-llama-3.1-8b"), 2, name, rules), ARRIVALS, 2.0)
    assert {record.outcome for record in result.run.records} == {"finished"}
    assert what(part) and not what(part).endswith(".")


@pytest.mark.parametrize("part", find_parts(), ids=lambda part: Path(part).stem)
def test_an_ablation_differs_in_one_part(part: str) -> None:
    _, rules = load_policy(str(ROOT / part))
    shipped = POLICIES["hyperflexis"]
    names = [one.name for one in fields(Policy) if getattr(rules, one.name) != getattr(shipped, one.name)]
    assert len(names) == 1
