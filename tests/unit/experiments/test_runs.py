"""A run's figures, and when a run that was performed before is found again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from benchmarks.experiments.cache import Cache, Digests
from benchmarks.experiments.latency import mean_over
from benchmarks.experiments.measure import Row, Task, measure, row_from_dict, row_of
from benchmarks.experiments.plan import FAR_OVERLOAD, OURS, Plan
from benchmarks.experiments.pool import perform, plan_work
from benchmarks.experiments.robustness import victims
from benchmarks.experiments.scenarios import Windows

from hyperflexis.core.record import Record, Run
from hyperflexis.core.slo import Slo
from hyperflexis.sim.config import SimCounters, SimResult

TASK = Task("ascend-synthetic", "round_robin@2048", 0.5, 1, 3.0)
SLO = Slo(1.0, 0.1)


def row(**changes: object) -> Row:
    usual = Row(
        0.5, {"chat": (4, 2)}, 3.0, 2.0, 1, 0, 100, 20, 0.0, 1.0, [1.0, 2.0, 3.0, 6.0], [True, True, False, False]
    )
    return replace(usual, **changes)


def test_means_are_over_all_arrivals() -> None:
    records = (
        Record("chat", SLO, 0.0, 10, 11, "finished", 0.5, 1.5, 11),  # on time
        Record("chat", SLO, 1.0, 10, 11, "finished", 5.0, 9.0, 11),  # late; capped at 3 x 2 s
        Record("code", SLO, 2.0, 10, 11, "rejected"),  # 98 s to the end; capped too
    )
    result = SimResult(Run(records, 10.0, 100.0), SimCounters(prompt_tokens=30, busy_s=10.0, outside_s=1.0), ())
    found = row_of(result, 2.0, requests=True)
    assert found.attainment == pytest.approx(1 / 3)
    assert found.classes == {"chat": (2, 1), "code": (1, 0)} and found.worst_class == 0.0 and found.requests == 3
    assert found.mean_e2e_s == pytest.approx((1.5 + 9.0 + 98.0) / 3)
    assert found.mean_capped_e2e_s == pytest.approx((1.5 + 6.0 + 6.0) / 3)
    assert (found.rejected, found.outside_share) == (1, 0.1)
    assert found.e2e_s == [1.5, 9.0, 98.0] and found.on_time == [True, False, False]
    assert not row_of(result, 2.0, requests=False).e2e_s


def test_requests_are_compared_over_those_that_were_chosen() -> None:
    assert mean_over([1.0, 2.0, 30.0], [True, True, False]) == 1.5


def test_victims_are_the_classes_of_the_tenant_that_does_not_change() -> None:
    assert victims(row(classes={"chat-steady": (8, 6), "code-steady": (2, 2), "chat-abuser": (90, 0)})) == 0.8


def test_every_request_s_time_is_kept_where_policies_are_compared_one_by_one() -> None:
    plan = Plan(scenarios=("ascend-azure",))
    assert all(task.requests for task in plan.runs("ascend-azure", OURS, FAR_OVERLOAD))
    assert not any(task.requests for task in plan.runs("ascend-azure", OURS, 1.0))
    assert not any(task.requests for task in plan.runs("ascend-azure", OURS, FAR_OVERLOAD, known_lengths=True))


def test_a_row_is_read_back_as_it_was_written() -> None:
    assert row_from_dict(json.loads(json.dumps(asdict(row())))) == row()
    with pytest.raises(KeyError):
        row_from_dict({"attainment": 0.5})


def test_a_cache_outlives_an_interrupted_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    cache = Cache(path, row_from_dict)
    cache.put("a", "edf@512", row())
    cache.put("b", "edf@512", row(cpu_s=3.0))
    path.write_text(path.read_text()[:-40])
    found = Cache(path, row_from_dict)
    assert found.get("a") == row() and found.get("b") is None
    found.put("b", "edf@512", row())
    assert Cache(path, row_from_dict).get("b") == row()


def test_costs_are_those_of_earlier_runs_of_the_policy(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "runs.jsonl", row_from_dict)
    cache.put("a", "edf@512", row(cpu_s=4.0))
    assert cache.request_s("edf@1024") == pytest.approx(1.0)
    assert cache.request_s("round_robin") != cache.request_s("edf")


def test_a_key_depends_on_all_that_decides_the_figures(tmp_path: Path) -> None:
    trace = tmp_path / "bwb.csv"
    trace.write_text("one")
    azure = replace(TASK, scenario="ascend-azure")
    keys = [Digests({}).key(task) for task in (TASK, replace(TASK, load=0.6), replace(TASK, noise=0.1), azure)]
    keys.append(Digests({"bwb.csv": trace}).key(azure))
    trace.write_text("two")
    keys.append(Digests({"bwb.csv": trace}).key(azure))
    keys.append(Digests({}).key(replace(TASK, policy="benchmarks/ablations/no_lead.py")))
    assert len(set(keys)) == len(keys)
    assert Digests({}).key(TASK) == keys[0]


def test_other_sources_make_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Digests({}).key(TASK)
    digests = Digests({})
    object.__setattr__(digests, "sources", "of another policy")
    assert digests.key(TASK) != before


def test_a_run_is_performed_once(tmp_path: Path) -> None:
    windows, digests, path = Windows({}), Digests({}), tmp_path / "runs.jsonl"
    heard: list[float] = []
    work = plan_work([TASK, TASK], windows, digests, Cache(path, row_from_dict))
    assert list(work.todo.values()) == [TASK] and sum(work.cpu_s.values()) > 0.0
    rows = perform(work, windows, Cache(path, row_from_dict), 1, heard.append)
    assert len(heard) == 1 and rows[TASK].requests > 10
    again = plan_work([TASK], windows, digests, Cache(path, row_from_dict))
    assert not again.todo
    assert perform(again, windows, Cache(path, row_from_dict), 1, heard.append) == rows and len(heard) == 1


def test_a_run_repeats_itself() -> None:
    found = [replace(measure(Windows({}), TASK), cpu_s=0.0) for _ in range(2)]
    assert found[0] == found[1]
