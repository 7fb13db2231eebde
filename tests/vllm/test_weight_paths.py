"""The suite of the ways on which weights come (tests/contract), where NIXL is installed: over NIXL."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract import test_weight_paths as suite

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> suite.Way:
    return suite.way_of("nixl without CMA", tmp_path, monkeypatch)


def test_they_arrive_from_a_process_whose_memory_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.test_they_arrive_with_the_source_s_digest(suite.way_of("nixl", tmp_path, monkeypatch))
