"""What holds on every way on which weights come: the same bytes, or the reason and the next source. Sources are
processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.contract.weight_source import source
from tests.unit.transfer.weights_case import SIZES, content, empty, fetched, full, layout, served

from hyperflexis.core.weights import Attempt, WeightSource
from hyperflexis.transfer.fetch import FetchConfig, Fetcher
from hyperflexis.transfer.paths import Over
from hyperflexis.transfer.weights import Shard

TOTAL = sum(SIZES)
LARGE = (48 << 20, 12, 4096)
"""A quarter of a second at the rate at which they are given, so that most of the time a piece is under way."""


class Way:
    """``name``: what an attempt on it is called. ``over``: what both ends are set to."""

    def __init__(self, name: str, over: Over, address: Callable[[str], str]) -> None:
        self.name = name
        self.over: Over = over
        self.address = address


def way_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    over: Over = "torch" if name == "gloo" else "nixl" if name == "nixl" else ""
    if over and find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    if over == "nixl" and find_spec("nixl") is None:
        pytest.skip("NIXL is not installed in this environment: `make test-vllm` makes one that has it, and runs this")
    if name == "nixl":  # there is no RDMA here
        monkeypatch.setenv("UCX_TLS", "tcp")
    local = name == "shared memory"
    return Way(name, over, lambda one: f"unix:{tmp_path}/{one}" if local else "127.0.0.1:0")


@pytest.fixture(params=["tcp", "shared memory", "gloo", "nixl"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    return way_of(request.param, tmp_path, monkeypatch)


def take(target: Shard, way: Way, *sources: WeightSource, **options: object) -> list[Attempt]:
    return fetched(target, *sources, over=way.over, **options)


def open_sockets() -> set[str]:
    """Of this process, by inode; none where the system does not tell."""
    found = set()
    for one in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # the folder itself was open
            found.add(os.readlink(one))
    return {name for name in found if name.startswith("socket:")}


def after_the_first_block(target: Shard, act: Callable[[], None]) -> threading.Thread:
    """Do that once something has come."""

    def wait() -> None:
        target.wait(lambda one: one.run_from(0, 1), lambda: None)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_they_arrive_with_the_source_s_digest(way: Way) -> None:
    target = empty()
    with source(way.address("a"), way.over) as one:
        (attempt,) = take(target, way, one.at)
        one.close()
    assert (attempt.path, attempt.problem, attempt.num_bytes) == (way.name, "", TOTAL)
    expected = full()
    assert content(target) == content(expected)
    assert target.manifest is not None and expected.manifest is not None
    assert target.manifest.digest == expected.manifest.digest


def test_a_source_that_is_killed_midway_leaves_what_came_and_the_next_gives_the_rest(way: Way) -> None:
    target = empty()
    with (
        source(way.address("a"), way.over, rate=8e6) as one,
        source(way.address("b"), way.over, name="other") as other,
    ):
        killer = after_the_first_block(target, lambda: one.signal(signal.SIGKILL))
        began = time.monotonic()
        attempts = take(target, way, one.at, other.at)
        killer.join()
    assert time.monotonic() - began < 20.0, "no way hangs on a dead peer"
    first, last = attempts[0], attempts[-1]
    assert first.problem and 0 < first.num_bytes < TOTAL and first.path == way.name
    assert (last.source, last.path, last.problem) == ("other", way.name, "")
    assert sum(one.num_bytes for one in attempts) == TOTAL
    assert content(target) == content(full())


def test_a_source_that_stops_dead_is_left_and_what_it_sends_late_changes_nothing(way: Way) -> None:
    """SIGSTOP: its sockets stay open, and what was under way goes on when it goes on."""
    target = empty(layout(LARGE))
    with (
        source(way.address("a"), way.over, sizes=LARGE, rate=200e6) as one,
        source(way.address("b"), way.over, name="other", sizes=LARGE) as other,
    ):
        stopper = after_the_first_block(target, lambda: one.signal(signal.SIGSTOP))
        before = open_sockets()
        attempts = take(target, way, one.at, other.at, silence_s=1.0)
        stopper.join()
        assert attempts[0].problem and not attempts[-1].problem, attempts
        assert open_sockets() <= before, "through which something could still come"
        assert sum(one.num_bytes for one in attempts) == sum(LARGE)
        assert content(target) == content(full(layout(LARGE)))
        target.arena.view[:] = bytes(target.layout.size)  # what came late would be the same bytes
        one.signal(signal.SIGCONT)
        # UCX may end a source that it had answer a read over TCP, which is why that is no way by itself.
        one.close(may_have_died=way.name == "nixl")
    assert not any(target.arena.view.tobytes()), "it wrote into memory that others had filled meanwhile"


def test_a_damaged_block_is_found_and_comes_from_the_next(way: Way) -> None:
    target = empty()
    with (
        source(way.address("a"), way.over, damaged=True) as one,
        source(way.address("b"), way.over, name="other") as other,
    ):
        attempts = take(target, way, one.at, other.at)
    assert "t0 was damaged on its way: the digest of block 3 is another" in attempts[0].problem
    assert attempts[0].path == way.name and attempts[-1].source == "other"
    assert content(target) == content(full())


def test_another_token_gets_nothing(way: Way) -> None:
    target = empty()
    with source(way.address("a"), way.over, token="another") as one:
        (attempt,) = take(target, way, one.at)
    assert "does not know this fleet's token" in attempt.problem and attempt.num_bytes == 0


def test_a_relay_passes_on_what_still_comes(way: Way) -> None:
    """On the way that it got it, while it comes."""
    relay, last = empty(shared=True), empty()
    with source(way.address("a"), way.over, rate=10e6) as one, served(relay, way.address("b"), over=way.over) as next:
        first = threading.Thread(target=take, args=(relay, way, one.at))
        first.start()
        early: list[bool] = []
        looker = after_the_first_block(last, lambda: early.append(not relay.is_complete))
        (attempt,) = take(last, way, next)
        first.join()
        looker.join()
    assert early == [True], "the last has something before the relay has everything"
    assert (attempt.path, attempt.problem) == (way.name, "")
    assert content(last) == content(relay) == content(full())


def test_a_rate_is_kept(way: Way) -> None:
    target = empty()
    with source(way.address("a"), way.over, rate=TOTAL / 0.5) as one:
        (attempt,) = take(target, way, one.at)
    assert not attempt.problem and attempt.seconds > 0.4


def test_a_target_that_is_cancelled_ends(way: Way) -> None:
    target = empty()
    with source(way.address("a"), way.over, rate=4e6) as one:
        fetcher = Fetcher(target, FetchConfig("the fleet's word", over=way.over))
        canceller = after_the_first_block(target, fetcher.cancel)
        began = time.monotonic()
        fetcher.run([one.at])
        canceller.join()
    assert not target.is_complete and time.monotonic() - began < 10.0


def test_where_the_source_does_not_offer_the_way_it_says_so_and_sends_over_tcp(way: Way) -> None:
    if not way.over:
        pytest.skip("offered by every source")
    target = empty()
    with source("127.0.0.1:0") as one:
        refused, sent = take(target, way, one.at)
    assert (refused.path, refused.num_bytes) == (way.name, 0)
    assert f"not over {way.name}: set weights_over, the same at both ends" in refused.problem
    assert (sent.source, sent.path, sent.problem) == (refused.source, "tcp", "")
    assert content(target) == content(full())
