"""The suite of the ways on which weights come (tests/contract), where NIXL is installed: over NIXL."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract import test_weight_paths as suite
from tests.unit.transfer.weights_case import content, empty, full

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> suite.Way:
    return suite.way_of("nixl", tmp_path, monkeypatch)


def test_without_rdma_it_says_so_and_they_come_over_tcp(way: suite.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS")
    target = empty()
    with suite.source("127.0.0.1:0", "nixl") as one:
        refused, sent = suite.take(target, way, one.at)
    assert refused.path == "nixl" and "NIXL finds no RDMA here" in refused.problem
    assert (sent.path, sent.problem) == ("tcp", "") and content(target) == content(full())
