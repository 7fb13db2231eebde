"""`hyperflexis explain`: what a journal has of a request, an instance and a model."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from hyperflexis import cli
from hyperflexis.runtime.journal import Entry, decode_effects, encode_effects, read_journal

WORKLOAD = """\
seed: 3
duration_s: 8
max_context: 4096
arrivals: {rate_rps: 40, cv: 1.5}
classes:
  - {name: code, share: 0.6, ttft_ms: 200, tpot_ms: 40, lengths: {prompt: 600, output: 20}}
  - {name: batch, share: 0.4, e2e_ms: 30000, lengths: {prompt: 1500, output: 100}}
"""


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a fleet with roles that follows its demand, and whose second launch fails."""
    folder = tmp_path_factory.mktemp("journal")
    workload, found = folder / "small.yaml", folder / "journal.jsonl"
    workload.write_text(WORKLOAD)
    fleet = ["--profile", "h100-llama-3.1-8b", "--instances", "2", "--mode", "disaggregated", "--prefill", "1"]
    scaled = ["--scale", "--start", "2", "--min", "4", "--fault", "fail-launch:1"]
    options = [*fleet, *scaled, "--policies", "hyperflexis", "--journal", str(found)]
    assert cli.main(["simulate", str(workload), *options]) == 0
    return found


def explained(journal: Path, what: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert cli.main(["explain", what, "--journal", str(journal)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_request_is_told_from_its_arrival_to_its_end(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(journal, "chatcmpl-r12", capsys)
    story = "\n".join(lines)
    assert re.match(r" +0\.000 s  arrived of default: class (code|batch), .* prompt tokens, at most", lines[0])
    assert re.search(r"goes to \d \(of 2\): expected on time; first token after \d+ ms", lines[1])
    assert "computes the last of its prompt" in story
    assert re.search(r"goes on at \d with its KV from \d", story)
    assert re.search(r"finished; \d+ tokens, first token after \d+ ms, last after \d+ ms", lines[-1])


def test_all_ways_of_saying_a_requests_id_are_one(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(journal, "r12", capsys) == explained(journal, "cmpl-r12", capsys)


def test_a_model_is_told_by_its_plans_and_launches(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = explained(journal, "model", capsys)
    planned = [line for line in story if "there or coming" in line]
    assert planned and all(re.search(r"\d instances .*forecasts 2 s ahead are off by \d+%", line) for line in planned)
    kept = [re.search(r"s  (\d+) instances .* asked for: (\d+)", line) for line in planned]
    pairs = [match.groups() for match in kept if match]
    assert all(a != b for a, b in pairwise(pairs))  # one a second would say the same again
    assert sum("is launched, weights by disk" in line for line in story) >= 3


def test_an_instance_is_told_by_its_start(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launches = [line for line in explained(journal, "model", capsys) if "is launched" in line]
    ids = [line.split("s  ")[1].split()[0] for line in launches]
    good, bad = explained(journal, ids[0], capsys), explained(journal, ids[1], capsys)
    assert "process took 2.000 s: loading" in good[1] or "is ready" in good[1]
    assert any("is ready: epoch" in line for line in good)
    assert any("did not come up" in line for line in bad) and not any("is ready" in line for line in bad)


def test_json(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "r12", "--journal", str(journal), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["id"] == "r12"
    assert [line["what"] for line in found["lines"]] == [
        line.split("s  ", 1)[1] for line in capsys.readouterr().out.splitlines()
    ]


def test_what_the_journal_does_not_have_is_told(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "r99999", "--journal", str(journal)]) == 2
    assert re.search(r"has nothing of 'r99999': it holds \d+ events of 3\d\d requests", capsys.readouterr().err)
    assert cli.main(["explain", "r1", "--journal", str(journal.with_name("none"))]) == 2
    assert "there is no journal" in capsys.readouterr().err


def test_all_effects_of_a_journal_come_back(journal: Path) -> None:
    kinds = set()
    for item in read_journal(journal):
        if isinstance(item, Entry):
            effects = decode_effects(item.effects)
            kinds |= {type(effect).__name__ for effect in effects}
            assert encode_effects(effects) == item.effects
    assert {"Dispatch", "Handoff", "Planned", "Launch", "SetLinks"} <= kinds
