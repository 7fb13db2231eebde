"""`hyperflexis simulate` as its users run it: processes, files, signals."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.parity.replay import replay

SOURCE = Path(__file__).resolve().parents[2] / "src"
DOCUMENT = SOURCE.parent / "docs" / "simulator.md"
WORKLOAD = """\
seed: 3
duration_s: 8
max_context: 4096
arrivals: {rate_rps: 20, cv: 1.5}
classes:
  - name: code
    share: 0.6
    ttft_ms: 200
    tpot_ms: 40
    lengths: {prompt: {lognormal: {median: 600, sigma: 1.0}}, output: {lognormal: {median: 20, sigma: 0.8}}}
  - {name: batch, share: 0.4, e2e_ms: 30000, lengths: {prompt: 1500, output: 100}}
"""
KEYS = {
    "attainment",
    "attainment_by_class",
    "goodput_rps",
    "mean_e2e_s",
    "mean_capped_e2e_s",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p50_tpot_ms",
    "p99_tpot_ms",
    "rejected",
    "unfinished",
    "accelerator_s",
    "ci95",
}
TIMEOUT_S = 120


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(WORKLOAD)
    return path


def argv(workload: Path, *options: str) -> list[str]:
    base = ["simulate", str(workload), "--profile", "h100-llama-3.1-8b", "--instances", "2"]
    return [sys.executable, "-m", "hyperflexis", *base, *options]


def environment(hash_seed: str = "0") -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": hash_seed}


def run(workload: Path, *options: str, hash_seed: str = "0") -> str:
    done = subprocess.run(
        argv(workload, *options), capture_output=True, text=True, env=environment(hash_seed), timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert ("on time" in done.stderr) == ("-" in options)  # the table makes room for JSON, and nothing else is said
    return done.stdout


def repeatable(figures: Any) -> Any:
    """All but the wall clock and the number of events, among which are the samples of a report's timeline."""
    if isinstance(figures, dict):
        return {key: repeatable(value) for key, value in figures.items() if key not in ("wall_s", "events")}
    return [repeatable(value) for value in figures] if isinstance(figures, list) else figures


def test_figures_pictures_and_a_policy_file(workload: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    pytest.importorskip("scipy", reason="the LP bound needs the extra `report`")
    example = re.search(r"```python\n(# fewest_tokens.py.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "fewest_tokens.py").write_text(example[1])
    names = ["hyperflexis", "edf@512", "reject_at_door@512,1.2", "fewest_tokens"]
    policies = f"{','.join(names[:3])},{tmp_path}/fewest_tokens.py"
    options = ["--policies", policies, "--seeds", "1,2", "--loads", "0.5,2", "--bound"]
    files = ["--json", str(tmp_path / "figures.json"), "--report", str(tmp_path / "out")]
    shown = run(workload, *options, *files, "--jobs", "2")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["workload"], found["profile"], found["seeds"]) == ("small.yaml", "h100-llama-3.1-8b", [1, 2])
    assert found["capacity_rps"] > 0.0 and found["oracle"]["fluid_load_at_90"] > 1.0
    assert list(found["policies"]) == names
    for policy in found["policies"].values():
        assert policy.keys() >= KEYS | {"sweep", "goodput_at_90", "knee_all_classes_90"}
        assert [point["load"] for point in policy["sweep"]] == [0.5, 2.0]
        for point in policy["sweep"]:
            assert point.keys() >= KEYS
            assert len(point["by_seed"]["attainment"]) == 2
            assert point["ci95"]["attainment"][0] <= point["attainment"] <= point["ci95"]["attainment"][1]
            assert point["accelerator_s"] == pytest.approx(2 * point["simulated_s"])
            assert point["counters"]["iterations"] > 0
            assert point["percent_of_lp_bound"] <= 100.0 + 1e-6
    page = (tmp_path / "out" / "index.html").read_text()
    for name in names:
        assert name in shown and name in page
    for picture in ("attainment", "classes", "latency", "timeline"):
        assert (tmp_path / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    # The same figures from one process, through standard output.
    again = json.loads(run(workload, *options, "--jobs", "1", "--json", "-"))
    assert repeatable(again) == repeatable(found)


@pytest.mark.parametrize("mode", ["colocated", "auto"])
def test_a_run_is_the_same_to_the_byte_under_another_hash_seed_and_without_leaps(
    mode: str, workload: Path, tmp_path: Path
) -> None:
    options = ["--mode", mode, "--policies", "hyperflexis", "--loads", "1.5", "--noise", "0.05"]
    logs, journals = [], []
    for hash_seed, more in (("1", []), ("2", []), ("3", ["--no-leap"])):
        log, journal = tmp_path / f"log{hash_seed}", tmp_path / f"journal{hash_seed}"
        run(workload, *options, *more, "--log", str(log), "--journal", str(journal), hash_seed=hash_seed)
        logs.append(log.read_bytes())
        journals.append(journal.read_bytes())
    assert logs[0] and logs[0] == logs[1] == logs[2]
    assert journals[0] == journals[1] == journals[2]
    assert replay(tmp_path / "journal1") > len(logs[0].splitlines())


@pytest.mark.parametrize("option", ["--log", "--journal", "--json"])
def test_a_file_that_cannot_be_written_is_named_before_the_runs(option: str, workload: Path, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("def place(now, tracked, ready, memory):\n    raise AssertionError\n")
    options = ["--policies", str(tmp_path / "fails.py"), option, str(tmp_path / "nowhere" / "file")]
    done = subprocess.run(
        argv(workload, *options), capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr and len(done.stderr.splitlines()) == 1


STUCK = """\
import os, threading
def place(now, tracked, ready, memory):
    with open({fifo!r}, "w") as file:
        file.write(f"{{os.getpid()}}\\n")
    threading.Event().wait()
"""


class Stuck:
    """A command whose two workers have begun a run that never ends."""

    def __init__(self, workload: Path, folder: Path) -> None:
        fifo = folder / "fifo"
        os.mkfifo(fifo)
        (folder / "stuck.py").write_text(STUCK.format(fifo=str(fifo)))
        self._fifo = os.open(fifo, os.O_RDWR)  # for writing too, so that it has no end between two writers
        self.process = subprocess.Popen(
            argv(workload, "--policies", f"{folder}/stuck.py", "--seeds", "1,2", "--jobs", "2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
            # Tests that run in a shell's background ignore it, and so would all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        said = b""
        while said.count(b"\n") < 2:
            ready, _, _ = select.select([self._fifo], [], [], TIMEOUT_S)
            assert ready, "the workers did not begin"
            said += os.read(self._fifo, 100)
        self.workers = [os.pidfd_open(int(pid)) for pid in said.split()]

    def wait_for_workers(self) -> None:
        """A process's descriptor becomes readable when it ends."""
        for worker in self.workers:
            ready, _, _ = select.select([worker], [], [], TIMEOUT_S)
            assert ready, "a worker outlived the command"

    def close(self) -> None:
        for worker in self.workers:
            if not select.select([worker], [], [], 0)[0]:
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)
        os.close(self._fifo)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def stuck(workload: Path, tmp_path: Path) -> Iterator[Stuck]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs Linux's pidfd_open to watch processes that are not its own")
    found = Stuck(workload, tmp_path)
    yield found
    found.close()


def test_ctrl_c_ends_the_workers_without_a_traceback(stuck: Stuck) -> None:
    os.killpg(stuck.process.pid, signal.SIGINT)
    _, error = stuck.process.communicate(timeout=TIMEOUT_S)
    assert stuck.process.returncode == 130
    assert error == ""
    stuck.wait_for_workers()


def test_workers_end_when_the_command_is_killed(stuck: Stuck) -> None:
    stuck.process.kill()
    stuck.wait_for_workers()
