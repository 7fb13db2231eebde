"""Reading workload files: what they say, and what is said about their mistakes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hyperflexis.core.slo import Slo
from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import (
    LogNormal,
    Phase,
    RateArrivals,
    SessionArrivals,
    SessionRow,
    StatisticalLengths,
    TableLengths,
    TraceArrivals,
    generate,
)
from hyperflexis.sim.workload_file import parse_workload

EXAMPLES = Path(__file__).parents[3] / "examples"
FILES = {
    "trace.csv": "t,prompt_tokens,output_tokens,hash_ids,session,other\n3,20,7,,b,y\n\n5,10,1,1 2,a,x\n",
    "lengths.csv": "prompt_tokens,output_tokens\n100,10\n",
    "bad.csv": "t,prompt_tokens,output_tokens\n0,1,2\n1,x,2\n",
    "headless.csv": "a,b\n1,2\n",
    "empty.csv": "t,prompt_tokens,output_tokens\n",
    "still.csv": "t,prompt_tokens,output_tokens\n1,1,1\n1,2,2\n",
    "rates.csv": "pool,t,rate_rps\na,0,10\na,600,0\na,1200,5.5\n",
    "sessions.csv": "session,t_in_session,prompt_tokens,output_tokens,reusable_prefix_tokens\na,0,10,5,0\n",
}


def read(name: str) -> str:
    if name not in FILES:
        raise FileNotFoundError(2, "No such file or directory", name)
    return FILES[name]


def test_a_whole_file() -> None:
    w = parse_workload(
        """
seed: 7
duration_s: 300
max_context: 8192
arrivals: {trace: trace.csv, start_s: 1, rate_scale: 2.0, copies: 2, jitter_s: 0.5}
classes:
  - {name: chat, share: 0.4, ttft_ms: 1000, tpot_ms: 50, priority: 2, lengths: lengths.csv}
  - {name: batch, share: 0.6, e2e_ms: 60000}
  - name: own
    arrivals: {steps: [[0, 5], [60, 40]], cv: 2}
    tenant: acme
    model: big
    lengths: {prompt: {lognormal: {median: 100, sigma: 0.5, min: 3, max: 900}}, output: 12}
phases: [{at_s: 150, shares: {chat: 0.1, batch: 0.6}}]
""",
        "dir/w.yaml",
        read,
    )
    assert (w.name, w.seed, w.duration_s, w.max_context) == ("w.yaml", 7, 300.0, 8192)
    assert isinstance(w.arrivals, TraceArrivals)
    assert [(r.t, r.num_prompt_tokens, r.num_output_tokens, r.hash_ids, r.session) for r in w.arrivals.rows] == [
        (0.0, 20, 7, (), "b"),
        (2.0, 10, 1, (1, 2), "a"),
    ]
    assert (w.arrivals.start_s, w.arrivals.rate_scale, w.arrivals.copies, w.arrivals.jitter_s) == (1.0, 2.0, 2, 0.5)
    chat, batch, own = w.classes
    assert chat.slo == Slo(1.0, 0.05) and chat.priority == 2.0 and isinstance(chat.lengths, TableLengths)
    assert batch.slo == Slo(e2e_s=60.0) and batch.lengths is None and batch.share == 0.6
    assert own.arrivals == RateArrivals(((0.0, 5.0), (60.0, 40.0)), 2.0)
    assert own.lengths == StatisticalLengths(LogNormal(100.0, 0.5, 3, 900), LogNormal(12, 0.0, 12, 12))
    assert (own.tenant, own.model) == ("acme", "big")
    assert w.phases == (Phase(150.0, (("chat", 0.1), ("batch", 0.6))),)
    assert generate(w)


GOOD = "duration_s: 10\narrivals: {rate_rps: 5}\nclasses:\n  - {name: a, share: 1, lengths: lengths.csv}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "w.yaml: the file is empty"),
        ("a: [", "w.yaml:1: not YAML"),
        ("- 1", "w.yaml:1: must be a mapping"),
        (GOOD + "max_contxt: 5\n", "w.yaml:5: max_contxt: unknown key; did you mean 'max_context'"),
        (GOOD + "zzz: 5\n", "w.yaml:5: zzz: unknown key; known keys: seed, duration_s"),
        (GOOD + "seed: 1\nseed: 2\n", "w.yaml:6: seed: given twice"),
        (GOOD + "seed: 1.5\n", "w.yaml:5: seed: must be a whole number, not 1.5"),
        (GOOD + "max_context: 1\n", "w.yaml:5: max_context: must be a number of at least 2"),
        (GOOD.replace("duration_s: 10", "duration_s: -1"), "w.yaml:1: duration_s: must be a number above 0"),
        (GOOD.replace("duration_s: 10", "duration_s: .nan"), "w.yaml:1: duration_s: must be a number above 0"),
        (GOOD.replace("duration_s: 10", "duration_s: [1]"), "duration_s: .* not a list or mapping"),
        (GOOD.replace("duration_s: 10\n", ""), "'duration_s' is missing"),
        (GOOD.replace("arrivals: {rate_rps: 5}", ""), "class 'a' has no arrivals"),
        (GOOD.replace("rate_rps: 5", "rate_rps: 0"), "w.yaml:2: arrivals.rate_rps: must be a number above 0"),
        (GOOD.replace("rate_rps: 5", "rate_rps: 5, steps: [[0, 1]]"), "exactly one of"),
        (GOOD.replace("rate_rps: 5", "cv: 2"), "exactly one of"),
        (GOOD.replace("rate_rps: 5", "trace: trace.csv, rate_rps: 5"), "exactly one of"),
        (GOOD.replace("rate_rps: 5", "sessions: sessions.csv"), "w.yaml:2: arrivals: sessions need one of"),
        (GOOD.replace("rate_rps: 5", "sessions: sessions.csv, rate_rps: 5, copies: 2"), "no meaning with sessions"),
        (GOOD.replace("rate_rps: 5", "sessions: sessions.csv, rate_rps: 5, think_scale: 0"), "think_scale: must be"),
        (GOOD.replace("rate_rps: 5", "rate_rps: 5, think_scale: 2"), "think_scale: has no meaning with rate_rps"),
        (GOOD.replace("rate_rps: 5", "sessions: sessions.csv, rate_rps: 5"), "lengths: sessions bring their own"),
        (
            GOOD.replace("rate_rps: 5", "sessions: lengths.csv, rate_rps: 5"),
            "lengths.csv:1: column 'session' is missing",
        ),
        (GOOD.replace("rate_rps: 5", "rate_rps: 5, copies: 2"), "arrivals.copies: has no meaning with rate_rps"),
        (GOOD.replace("rate_rps: 5", "trace: trace.csv, cv: 2"), "arrivals.cv: has no meaning with trace"),
        (GOOD.replace("rate_rps: 5", "trace: trace.csv, copies: 2"), "set jitter_s above 0"),
        (GOOD.replace("rate_rps: 5", "trace: trace.csv, start_s: 9"), "past the end of the trace"),
        (
            GOOD.replace("rate_rps: 5", "trace: none.csv"),
            "w.yaml:2: arrivals.trace: cannot read none.csv: No such file",
        ),
        (GOOD.replace("rate_rps: 5", "trace: still.csv"), "two rows at different times"),
        (GOOD.replace("rate_rps: 5", "trace: bad.csv"), "bad.csv:3: prompt_tokens must be a whole number, not 'x'"),
        (GOOD.replace("rate_rps: 5", "trace: empty.csv"), "empty.csv:2: no rows"),
        (GOOD.replace("rate_rps: 5", "trace: lengths.csv"), "lengths.csv:1: column 't' is missing"),
        (GOOD.replace("lengths.csv", "headless.csv"), "headless.csv:1: column 'prompt_tokens' is missing"),
        (GOOD.replace("rate_rps: 5", "steps: [[1, 5]]"), "first step must start at second 0"),
        (GOOD.replace("rate_rps: 5", "steps: [[0, 5], [0, 6]]"), "start after the step before"),
        (GOOD.replace("rate_rps: 5", "steps: [[0, 5, 6]]"), "must be \\[from second"),
        (GOOD.replace("rate_rps: 5", "steps: 5"), "must be a list of .from second, requests per second., or the name"),
        (GOOD.replace("rate_rps: 5", "steps: {a: 1}"), "arrivals.steps: must be a list of"),
        (GOOD.replace("rate_rps: 5", "steps: none.csv"), "w.yaml:2: arrivals.steps: cannot read none.csv"),
        (GOOD.replace("rate_rps: 5", "steps: trace.csv"), "trace.csv:1: column 'rate_rps' is missing"),
        (GOOD.replace("rate_rps: 5", "steps: [[0, 5]], time_scale: 0"), "time_scale: must be a number above 0"),
        (GOOD.replace("rate_rps: 5", "rate_rps: 5, rate_scale: 2"), "rate_scale: has no meaning with rate_rps"),
        (GOOD.replace(", lengths: lengths.csv", ""), "w.yaml:4: classes\\[0\\]: 'lengths' is missing"),
        (GOOD.replace("share: 1, ", ""), "w.yaml:4: classes\\[0\\]: 'share' is missing"),
        (GOOD.replace("share: 1", "share: 0"), "all shares are 0"),
        (GOOD.replace("name: a", "name: ''"), "classes\\[0\\].name: must be a text"),
        (
            GOOD.replace("share: 1", "share: 1, ttft_ms: -5"),
            "classes\\[0\\].ttft_ms: must be a number above 0.*not '-5'",
        ),
        (GOOD.replace("share: 1", "share: 1, prioritty: 5"), "did you mean 'priority'"),
        (GOOD.replace("share: 1", "share: 1, arrivals: {rate_rps: 1}"), "takes no share"),
        (
            GOOD + "  - {name: a, share: 1, lengths: lengths.csv}\n",
            "w.yaml:5: classes\\[1\\]: a second class named 'a'",
        ),
        (GOOD.replace("lengths.csv", "{prompt: 5}"), "lengths: 'output' is missing"),
        (GOOD.replace("lengths.csv", "{prompt: {normal: {}}, output: 5}"), "lengths.prompt.normal: unknown key"),
        (
            GOOD.replace("lengths.csv", "{prompt: {lognormal: {median: 5, sigma: 1, min: 9, max: 8}}, output: 5}"),
            "lognormal.max: is below min",
        ),
        (GOOD + "phases: [{at_s: 5, shares: {b: 1}}]\n", "phases\\[0\\].shares.b: no class of that name"),
        (GOOD + "phases: [{at_s: 5, shares: {a: 0}}]\n", "all shares are 0 from second 5"),
        (GOOD + "phases: [{at_s: 5, shares: {a: 1}}, {at_s: 4, shares: {a: 1}}]\n", "sort them"),
        (
            GOOD.replace("share: 1", "arrivals: {rate_rps: 1}"),
            "w.yaml:2: arrivals: every class has its own",
        ),
    ],
)
def test_mistakes_are_named_with_line_field_and_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_workload(text, "w.yaml", read)


def test_rates_of_a_file_scaled_in_rate_and_time() -> None:
    w = parse_workload(
        GOOD.replace("rate_rps: 5", "steps: rates.csv, rate_scale: 2, time_scale: 0.5, cv: 3"), "w.yaml", read
    )
    assert w.arrivals == RateArrivals(((0.0, 20.0), (300.0, 0.0), (600.0, 11.0)), 3.0)


def test_sessions_whose_rate_is_a_scaled_file() -> None:
    arrivals = "sessions: sessions.csv, steps: rates.csv, rate_scale: 0.1"
    text = GOOD.replace("rate_rps: 5", arrivals).replace(", lengths: lengths.csv", "")
    found = parse_workload(text, "w.yaml", read).arrivals
    assert isinstance(found, SessionArrivals)
    assert found.starts == RateArrivals(((0.0, 1.0), (600.0, 0.0), (1200.0, 0.55)))


def test_sessions_in_a_file() -> None:
    w = parse_workload(
        """
duration_s: 10
arrivals: {sessions: sessions.csv, steps: [[0, 5], [5, 2]], cv: 2, think_scale: 0.5}
classes: [{name: agent, share: 1, ttft_ms: 1000}]
""",
        "w.yaml",
        read,
    )
    assert w.arrivals == SessionArrivals(
        "sessions.csv", ((SessionRow(0.0, 10, 5, 0),),), RateArrivals(((0.0, 5.0), (5.0, 2.0)), 2.0), 0.5
    )
    assert generate(w)


TRACE_ROWS = "t,prompt_tokens,output_tokens\n" + "".join(f"{2 * i},{100 + i},{10 + i}\n" for i in range(1000))
SESSION_ROWS = (
    "session,t_in_session,prompt_tokens,output_tokens,reusable_prefix_tokens\na,0,9000,10,0\na,5,9600,10,8960\n"
)
RATE_ROWS = "t,rate_rps\n0,200\n600,190\n"


def shipped_rows(file: str) -> str:
    return SESSION_ROWS if "session" in file else RATE_ROWS if "rates" in file else TRACE_ROWS


SHIPPED = [
    *(EXAMPLES / name for name in ("demo.yaml", "mixed.yaml", "azure.yaml", "azure_replay.yaml")),
    *sorted((EXAMPLES.parent / "benchmarks" / "workloads").glob("*.yaml")),
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_workloads_are_good(path: Path) -> None:
    text = path.read_text()
    w = parse_workload(text, path.name, shipped_rows)
    w = replace(w, duration_s=min(w.duration_s, 900.0))
    found = generate(w)
    assert len(found) > 100
    assert {a.slo_class for a in found} == {c.name for c in w.classes}
    assert w.max_context is not None
    assert all(a.num_prompt_tokens + a.num_output_tokens <= w.max_context for a in found)
    assert all(c.slo != Slo() for c in w.classes)


def test_data_are_named_by_their_source() -> None:
    for path in SHIPPED:
        text = path.read_text()
        if ".csv" in text and path.name != "azure_replay.yaml":
            assert re.search(r"commit\s[\s#]*[0-9a-f]{8}", text) and re.search(r"CC-BY-4.0|Apache-2.0|MIT", text), path
