"""Weights over real sockets and real shared memory: whole, or refused with the reason."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest
from tests.unit.transfer.weights_case import (
    SIZES,
    TOKEN,
    Wire,
    content,
    empty,
    fetched,
    free_address,
    full,
    layout,
    served,
)

from hyperflexis.core.weights import Manifest, TensorSpec, WeightSource
from hyperflexis.errors import HyperFlexisError, ProtocolError
from hyperflexis.transfer import auth, tcp
from hyperflexis.transfer.arena import Arena, Foreign, Mapped
from hyperflexis.transfer.fetch import FetchConfig, Fetcher
from hyperflexis.transfer.pace import TokenBucket
from hyperflexis.transfer.tcp import SocketChannel
from hyperflexis.transfer.weights import COPY_BYTES_PER_S, VERSION, Shard


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return free_address(request.param, tmp_path)


@pytest.mark.parametrize("sockets", [1, 3])
def test_weights_arrive_as_they_are_and_with_their_digest(address: str, sockets: int) -> None:
    source, target = full(), empty()
    with served(source, address) as at:
        attempts = fetched(target, at, sockets=sockets)
    assert [one.problem for one in attempts] == [""]
    assert attempts[0].num_bytes == sum(SIZES)
    assert attempts[0].path == ("shared memory" if address.startswith("unix") else "tcp")
    assert content(target) == content(source)
    assert target.manifest is not None and source.manifest is not None
    assert target.manifest.digest == source.manifest.digest
    assert target.digests() == source.digests()


def test_on_one_host_bytes_are_sent_where_memory_is_not_shared(tmp_path: Path) -> None:
    source, target = full(shared=False), empty()
    with served(source, f"unix:{tmp_path}/w") as at:
        assert not fetched(target, at)[0].problem
    assert content(target) == content(source)


def test_a_mapped_source_is_never_written(tmp_path: Path) -> None:
    source = full()
    assert source.arena.descriptor is not None
    mapped = Mapped(source.arena.descriptor, source.layout.size)
    before = content(source)
    mapped.view[:4] = b"else"
    assert content(source) == before
    with pytest.raises(OSError, match="shared memory of"):
        Mapped(source.arena.descriptor, source.layout.size + 1)


def test_a_chain_passes_on_what_still_comes(address: str, tmp_path: Path) -> None:
    """The last of three has something before the first has everything."""
    source = full()
    relays = [empty(shared=True) for _ in range(3)]
    bucket = TokenBucket(8e6)
    with served(source, address, bucket=bucket) as first:
        second_at = free_address("tcp" if address.startswith("127") else "unix", tmp_path, "w2")
        third_at = free_address("tcp" if address.startswith("127") else "unix", tmp_path, "w3")
        with served(relays[0], second_at, "second") as second, served(relays[1], third_at, "third") as third:
            came: list[tuple[bool, bool]] = []
            threads = [
                threading.Thread(target=fetched, args=(relay, at))
                for relay, at in zip(relays, (first, second, third), strict=True)
            ]
            for thread in threads:
                thread.start()
            while not relays[2].is_complete:
                came.append((relays[2].bytes_missing() < sum(SIZES), relays[0].is_complete))
                time.sleep(0.005)
            for thread in threads:
                thread.join()
    assert (True, False) in came
    assert all(content(relay) == content(source) for relay in relays)


def test_a_damaged_byte_is_found_and_only_what_is_missing_comes_again(tmp_path: Path) -> None:
    source, target = full(), empty()
    with served(source, "127.0.0.1:0") as at:
        way = Wire(at)
        way.damage_at = 2 << 20
        attempts = fetched(target, way.source, sockets=1)
        way.close()
    assert "was damaged on its way: the digest of block" in attempts[0].problem
    assert attempts[1].problem == "" and attempts[1].num_bytes < sum(SIZES)
    assert attempts[0].num_bytes + attempts[1].num_bytes == sum(SIZES)
    assert content(target) == content(source)


@pytest.mark.parametrize("cut_at", [10, 300, 1500, 1 << 20, 5 << 20])
def test_after_a_cut_at_any_phase_the_rest_comes_from_the_next(cut_at: int) -> None:
    source, target = full(), empty()
    with served(source, "127.0.0.1:0") as at, served(source, "127.0.0.1:0", "other") as other:
        way = Wire(at)
        way.cut_at = cut_at
        attempts = fetched(target, way.source, other, sockets=1)
        way.close()
    assert attempts[0].problem and not attempts[-1].problem
    assert sum(one.num_bytes for one in attempts) == sum(SIZES)
    assert content(target) == content(source)


def test_a_source_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    deaf = socket.create_server(("127.0.0.1", 0))
    silent = WeightSource(f"127.0.0.1:{deaf.getsockname()[1]}", "silent", 1)
    source, target = full(), empty()
    with served(source, "127.0.0.1:0") as at:
        attempts = fetched(target, silent, at, silence_s=0.2)
    deaf.close()
    assert [bool(one.problem) for one in attempts] == [True, False]
    assert attempts[0].seconds < 2.0 and attempts[0].problem == "it said nothing for 0.2 s"


def test_one_that_lives_and_has_nothing_is_left_for_one_that_has() -> None:
    """As a standby that nobody told to load."""
    target = empty()
    with served(empty(), "127.0.0.1:0") as idle, served(full(), "127.0.0.1:0", "other") as other:
        attempts = fetched(target, idle, other, patience_s=0.5)
    assert attempts[0].problem == "it has had nothing new for 0.5 s" and not attempts[1].problem
    assert target.is_complete


def test_nobody_there_is_told_at_once() -> None:
    free, address = tcp.listen("127.0.0.1:0")
    free.close()
    target = empty()
    attempts = fetched(target, WeightSource(address, "gone", 1))
    assert len(attempts) == 1 and "refused" in attempts[0].problem
    assert not target.is_complete


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_wrong_token_is_found_by_either_side_before_anything_is_told(address: str, side: str) -> None:
    with served(full(), address, token="another" if side == "source" else TOKEN) as at:
        attempts = fetched(empty(), at, token=TOKEN if side == "source" else "another")
    assert len(attempts) == 1 and attempts[0].num_bytes == 0
    assert "does not know this fleet's token: check HYPERFLEXIS_KV_TOKEN" in attempts[0].problem


def test_a_target_without_the_token_is_refused_though_it_does_not_check_its_source() -> None:
    with served(full(), "127.0.0.1:0") as at:
        channel = SocketChannel(tcp.connect(at.address))
        channel.limit_receive(5.0)
        channel.send(msgspec.msgpack.encode(auth.Hello(VERSION, auth.nonce(), "source", 1, 0, 1)))
        challenge = channel.receive(lambda frame: msgspec.msgpack.decode(frame.header))
        # Its own proof back to it: the words for the sides differ.
        channel.send(msgspec.msgpack.encode(auth.Proof(challenge["proof"])))
        verdict = channel.receive(lambda frame: msgspec.msgpack.decode(frame.header))
        channel.close()
        channel.release()
    assert verdict["type"] == "Denied" and "only instances of this fleet" in verdict["reason"]


def test_the_token_itself_is_never_sent() -> None:
    source = full()
    with served(source, "127.0.0.1:0") as at:
        seen = bytearray()
        listener, address = tcp.listen("127.0.0.1:0")

        def tap() -> None:
            target, _ = listener.accept()
            upstream = tcp.connect(at.address)
            upstream.settimeout(None)

            def back() -> None:
                while data := upstream.recv(1 << 16):
                    if len(seen) < 1 << 20:
                        seen.extend(data)
                    target.sendall(data)

            threading.Thread(target=back, daemon=True).start()
            while data := target.recv(1 << 16):
                seen.extend(data)
                upstream.sendall(data)
            upstream.close()

        thread = threading.Thread(target=tap, daemon=True)
        thread.start()
        assert not fetched(empty(), WeightSource(address, "source", 1), sockets=1)[0].problem
        thread.join(5.0)
        listener.close()
    assert TOKEN.encode() not in seen and b"Proof" in seen


def with_dtype(index: int) -> tuple[TensorSpec, ...]:
    tensors = list(layout().tensors)
    one = tensors[index]
    tensors[index] = TensorSpec(one.name, "bfloat16", (one.size // 2,), one.size)
    return tuple(tensors)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tensors": with_dtype(2)}, "tensor t2 is bfloat16 there, float32 here"),
        ({"tensors": layout().tensors[:-1]}, "tensor t5 is not there"),
        ({"tensors": layout((4 << 20, *SIZES[1:])).tensors}, r"tensor t0 has shape \[1048576\] there, \[786432\] here"),
        ({"model": "n"}, "configuration is n there, m here"),
        ({"ranks": 2}, "this is rank 0 of 2, not 0 of 1"),
        ({"ranks": 2, "rank": 1}, "this is rank 1 of 2, not 0 of 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(fields: dict[str, object], problem: str) -> None:
    target = empty()
    with served(full(layout(**fields)), "127.0.0.1:0") as at:
        attempts = fetched(target, at)
    assert len(attempts) == 1 and attempts[0].num_bytes == 0
    assert re.search(problem, attempts[0].problem), attempts[0].problem


def test_another_epoch_or_version_is_refused() -> None:
    with served(full(), "127.0.0.1:0") as at:
        attempts = fetched(empty(), WeightSource(at.address, "source", 2))
    assert "this is epoch 1 of instance source, not 2 of source" in attempts[0].problem


def test_other_weights_than_the_wanted_ones_are_not_taken() -> None:
    target = empty()
    with served(full(seed=1), "127.0.0.1:0") as at:
        attempts = fetched(target, at, digest="0" * 32)
    assert "are wanted" in attempts[0].problem and target.manifest is None


def test_parts_of_two_different_weights_are_never_mixed() -> None:
    one, other, target = full(seed=1), full(seed=2), empty()
    with served(one, "127.0.0.1:0") as first, served(other, "127.0.0.1:0", "other") as second:
        way = Wire(first)
        way.cut_at, way.stays_cut = 2 << 20, True
        attempts = fetched(target, way.source, second, sockets=1)
        way.close()
    assert "are others than those that have come" in attempts[-1].problem
    assert not target.is_complete


def test_a_rate_is_kept_and_may_be_changed_while_weights_leave(address: str) -> None:
    source, target = full(), empty()
    bucket = TokenBucket(6e6)
    with served(source, address, bucket=bucket) as at:
        began = time.monotonic()
        thread = threading.Thread(target=fetched, args=(target, at))
        thread.start()
        time.sleep(0.5)
        moved = sum(SIZES) - target.bytes_missing()
        assert 1e6 < moved < 6e6 * (time.monotonic() - began) + 1.5e6
        bucket.set_rate(None)
        thread.join(2.0)
        assert target.is_complete and time.monotonic() - began < 1.0 + 0.9


def test_two_connections_share_a_rate() -> None:
    bucket = TokenBucket(10e6)
    bucket.take(1 << 20)
    began = time.monotonic()
    threads = [threading.Thread(target=lambda: [bucket.take(100_000) for _ in range(10)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.25 < time.monotonic() - began < 1.5
    with pytest.raises(ValueError, match="a rate of 0"):
        bucket.set_rate(0)


def test_a_source_that_stops_ends_its_connections_and_a_target_that_is_cancelled_ends_too(address: str) -> None:
    source, target = full(), empty()
    with served(source, address, bucket=TokenBucket(2e6)) as at:
        fetcher = Fetcher(target, FetchConfig(TOKEN, chunk_bytes=1 << 20))
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.extend(fetcher.run([at])))
        thread.start()
        while target.manifest is None:
            time.sleep(0.01)
        fetcher.cancel()
        thread.join(5.0)
        assert not thread.is_alive() and found and not target.is_complete


def test_a_block_comes_once_and_only_if_it_is_what_was_announced() -> None:
    source, target = full(), empty()
    assert source.manifest is not None
    target.expect(source.manifest)
    with pytest.raises(ProtocolError, match="tensor t0 was damaged"):
        target.came(range(1))
    where = source.layout.blocks[0]
    data = bytes(source.arena.read(where.start, where.stop))
    target.arena.fill(where.start, where.stop, lambda into: into.__setitem__(slice(None), data))
    target.came(range(1))
    with pytest.raises(ProtocolError, match="block 0 of"):
        target.came(range(1))


def test_a_manifest_with_too_few_digests_is_no_manifest() -> None:
    target = empty()
    with pytest.raises(ProtocolError, match="digests for"):
        target.expect(Manifest(target.layout, b"x" * 16))


def test_no_memory_is_told_with_the_size() -> None:
    with pytest.raises(HyperFlexisError, match=r"no memory for 4611686018427387904 bytes of weights"):
        Arena(1 << 62)


def test_bytes_that_are_no_hello_end_the_connection_and_nothing_else(address: str) -> None:
    source, target = full(), empty()
    with served(source, address) as at:
        for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(12), b"\xff" * 64):
            with tcp.connect(at.address) as sock:
                sock.sendall(data)
        assert not fetched(target, at)[-1].problem
    assert isinstance(target, Shard) and content(target) == content(source)


def test_a_source_that_is_written_over_meanwhile_is_found_out(tmp_path: Path) -> None:
    """What is copied out of its memory, without its doing, is digested where it came."""
    source = full()
    first = source.layout.blocks[0]

    class Overwriting(Arena):
        """The source's memory is another while the first block is copied."""

        def take(self, other: Foreign, start: int, stop: int) -> None:
            if start == first.start and not overwritten:
                overwritten.append(True)
                assert isinstance(source.arena, Arena)
                before = bytes(source.arena.view[:8])
                source.arena.view[:8] = b"elsewise"
                super().take(other, start, stop)
                source.arena.view[:8] = before
                return
            super().take(other, start, stop)

    overwritten: list[bool] = []
    target = Shard(source.layout, Overwriting(source.layout.size))
    with served(source, f"unix:{tmp_path}/w") as at:
        attempts = fetched(target, at, sockets=1)
        assert overwritten and "damaged on its way" in attempts[0].problem, attempts
        if not target.is_complete:
            assert not fetched(target, at)[-1].problem
    assert content(target) == content(source)


def test_a_source_whose_memory_became_shorter_is_an_error(tmp_path: Path) -> None:
    source = full()
    assert source.arena.descriptor is not None
    with served(source, f"unix:{tmp_path}/w") as at:
        foreign = Fetcher(empty(), FetchConfig(TOKEN)).attach(at)
        assert isinstance(foreign, Mapped)
        os.ftruncate(source.arena.descriptor, 4096)
        with pytest.raises(OSError, match="shorter"):
            Arena(source.layout.size).take(foreign, 0, source.layout.size)


def test_while_a_share_of_the_time_is_left_sending_rests() -> None:
    source, target = full(), empty()
    bucket = TokenBucket()
    bucket.set_share(0.05)
    with served(source, "127.0.0.1:0", bucket=bucket) as at:
        began = time.monotonic()
        assert not fetched(target, at)[0].problem
        slow_s = time.monotonic() - began
        assert slow_s > sum(SIZES) / COPY_BYTES_PER_S / 0.05 / 2, "half of that at least: the last piece does not rest"
        bucket.set_share(0.0001)
        waiting = empty()
        thread = threading.Thread(target=fetched, args=(waiting, at))
        thread.start()
        while thread.is_alive() and waiting.bytes_missing() == sum(SIZES):
            time.sleep(0.001)
        bucket.set_share(1.0)
        thread.join(10.0)
        assert waiting.is_complete, "who rests goes on once nobody is served"
