"""Options of simulating commands that are files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperflexis.engines.profiles import load_profile
from hyperflexis.errors import ConfigError
from hyperflexis.simulate_options import parse_start

PROFILE = load_profile("h100-llama-3.1-8b")


def test_starts_are_as_a_transfer_bench_measured_them(tmp_path: Path) -> None:
    file = tmp_path / "transfer.json"
    starts = {"disk": {"ready_s": 7.0}, "standby + tcp": {"ready_s": 0.5}, "tcp": {"ready_s": 6.8}}
    file.write_text(json.dumps({"paths": {"disk": {"seconds": 0.75}}, "starts": starts}))
    found = parse_start(str(file), PROFILE)
    seconds = {means: sum(one for _, one in phases) for means, phases in found.items()}
    assert seconds == {"disk": 7.0, "d2d": pytest.approx(6.8), "standby": 0.5}


@pytest.mark.parametrize("content", ["{", "{}", '{"paths": {"disk": {"seconds": 1}}, "starts": {}}', "[]"])
def test_a_file_that_no_bench_wrote_is_told_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json is not what hyperflexis transfer bench --json writes"):
        parse_start(str(file), PROFILE)
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        parse_start(str(tmp_path / "none.json"), PROFILE)
