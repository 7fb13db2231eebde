"""A shell gets its weights, from wherever they are to be had, and never serves with others."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.contract.support import Driver, driven
from tests.unit.transfer.weights_case import Wire

from hyperflexis.core.weights import LoadWeights, Manifest, WeightSource
from hyperflexis.engines.base import Loaded
from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
from hyperflexis.errors import HyperFlexisError
from hyperflexis.make_model import Recipe, make_model
from hyperflexis.policy.catalog import STEPS

PROMPT = list(range(300, 340))
TOKEN = "fleet"


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same configuration with another seed."""
    directory = tmp_path_factory.mktemp("models") / "other"
    make_model(directory, Recipe(size="1m", context=512, seed=1))
    return directory


@asynccontextmanager
async def engine(
    model: Path, listen: str | None = None, name: str = "i", standby: bool = False, **options: object
) -> AsyncIterator[Driver]:
    fields = {"kv_tokens": 1024, "max_batch": 8, "kv_token": TOKEN, "weights_listen": listen} | options
    config = TorchConfig("m", model, STEPS["hyperflexis"], **fields)  # type: ignore[arg-type]
    async with driven(TorchEngine(config), name, standby) as one:
        yield one


def where(source: Driver, name: str = "i") -> WeightSource:
    assert source.info is not None and source.info.weights_address
    return WeightSource(source.info.weights_address, name, 1)


async def tokens(driver: Driver) -> list[int]:
    stream = await driver.run(PROMPT, 12)
    assert stream.end is not None and stream.end.finish == "length", stream.end
    return stream.tokens


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def load(driver: Driver, *sources: WeightSource, digest: str = "") -> Loaded:
    return await driver.engine.load(LoadWeights("i", 1, sources, digest))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_standby_serves_what_its_source_does(
    small_model: Path, other_weights: Path, tmp_path: Path, kind: str
) -> None:
    listen = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/w"
    async with engine(small_model, listen, "a") as source:
        assert source.info is not None
        digest = source.info.weights_digest
        # Its own disk has other weights: so what it serves came from the source.
        async with engine(other_weights, f"unix:{tmp_path}/b", "b", standby=True) as shell:
            assert shell.info is not None and shell.info.weights_digest == ""
            loaded = await load(shell, where(source, "a"), digest=digest)
            assert (loaded.problem, loaded.digest) == ("", digest)
            assert [one.path for one in loaded.attempts] == ["tcp" if kind == "tcp" else "shared memory"]
            assert [phase.name for phase in loaded.phases] == ["transfer", "check"]
            assert await tokens(shell) == await tokens(source)
            # And from there on to the next.
            async with engine(other_weights, None, "c", standby=True) as last:
                assert not (await load(last, where(shell, "b"), digest=digest)).problem
                assert await tokens(last) == await tokens(source)


async def test_it_gets_and_gives_them_over_what_both_are_set_to(small_model: Path, other_weights: Path) -> None:
    async with (
        engine(small_model, "127.0.0.1:0", "a", weights_over="torch") as source,
        engine(other_weights, None, "b", standby=True, weights_over="torch") as shell,
        engine(other_weights, None, "c", standby=True) as other,
    ):
        assert [one.path for one in (await load(shell, where(source, "a"))).attempts] == ["gloo"]
        assert [one.path for one in (await load(other, where(source, "a"))).attempts] == ["tcp"]
        assert await tokens(shell) == await tokens(other) == await tokens(source)


@pytest.mark.skipif(find_spec("nixl") is not None, reason="NIXL is installed in this environment")
async def test_a_way_that_is_not_installed_is_told_with_the_remedy(small_model: Path) -> None:
    with pytest.raises(HyperFlexisError, match=r"come over NIXL, and it does not load: .*; pip install nixl, or leave"):
        async with engine(small_model, None, standby=True, weights_over="nixl"):
            pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_weights_are_the_same_from_disk_and_from_another(small_model: Path, dtype: str) -> None:
    async with (
        engine(small_model, "127.0.0.1:0", dtype=dtype) as source,
        engine(small_model, "127.0.0.1:0", dtype=dtype, standby=True) as from_disk,
        engine(small_model, None, dtype=dtype, standby=True) as from_other,
    ):
        disk, other = await load(from_disk), await load(from_other, where(source))
        assert disk.digest == other.digest == source.info.weights_digest  # type: ignore[union-attr]
        assert [one.path for one in disk.attempts] == ["disk"] and disk.attempts[0].num_bytes > 1e6
        assert await tokens(from_disk) == await tokens(from_other) == await tokens(source)


async def test_each_way_that_fails_is_told_and_the_next_is_tried(small_model: Path, tmp_path: Path) -> None:
    async with (
        engine(small_model, "127.0.0.1:0", "stranger", kv_token="another") as stranger,
        engine(small_model, "127.0.0.1:0", "typed", dtype="bfloat16") as typed,
        engine(small_model, "127.0.0.1:0", "good") as good,
        engine(small_model, None, standby=True) as shell,
    ):
        gone = WeightSource(f"unix:{tmp_path}/nobody", "gone", 1)
        sources = [gone, where(stranger, "stranger"), where(typed, "typed"), where(good, "good")]
        loaded = await load(shell, *sources)
        assert [one.source for one in loaded.attempts] == ["gone", "stranger", "typed", "good"]
        problems = [one.problem for one in loaded.attempts]
        assert "No such file" in problems[0] and "token" in problems[1] and "is bfloat16 there" in problems[2]
        assert problems[3] == "" == loaded.problem
        assert await tokens(shell) == await tokens(good)


async def test_the_disk_is_the_last_way(small_model: Path, tmp_path: Path) -> None:
    async with engine(small_model, None, standby=True) as shell, engine(small_model) as cold:
        loaded = await load(shell, WeightSource(f"unix:{tmp_path}/nobody", "gone", 1))
        assert [one.path for one in loaded.attempts] == ["shared memory", "disk"] and not loaded.problem
        assert await tokens(shell) == await tokens(cold)


async def test_without_any_way_it_stays_a_standby_and_may_be_told_again(small_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    async with engine(model, None, standby=True) as shell, engine(small_model, "127.0.0.1:0") as source:
        (model / "model.safetensors").rename(model / "away")
        loaded = await load(shell)
        assert "neither model.safetensors" in loaded.problem and loaded.digest == ""
        refused = await shell.run(PROMPT)
        assert refused.end is not None and refused.end.finish == "refused"
        assert not (await load(shell, where(source))).problem
        assert await tokens(shell) == await tokens(source)


async def test_a_kv_cache_that_is_not_reserved_is_taken_when_the_shell_loads(small_model: Path) -> None:
    tokens_held = 1 << 18
    async with (
        engine(small_model, "127.0.0.1:0") as source,
        engine(small_model, None, standby=True, kv_tokens=tokens_held, reserve_kv=False) as shell,
        engine(small_model, None, standby=True, kv_tokens=tokens_held) as reserved,
    ):
        assert shell.info is not None and reserved.info is not None
        assert replace(shell.info, latency=reserved.info.latency) == reserved.info, "the fleet is told the same"
        before = resident_bytes()
        loaded = await load(shell, where(source))
        assert not loaded.problem
        assert [phase.name for phase in loaded.phases] == ["kv_pool", "transfer", "check"]
        cache = shell.engine._shell.runner.model.cache  # type: ignore[attr-defined]
        needed = sum(layer.nbytes for layer in cache.layers)
        assert needed > 100e6 and resident_bytes() - before > 0.9 * needed, "it is touched"
        assert [phase.name for phase in (await load(reserved, where(source))).phases] == ["transfer", "check"]
        assert await tokens(shell) == await tokens(source)


async def test_a_shell_without_memory_for_its_kv_cache_stays_one_and_says_so(small_model: Path) -> None:
    """Its cache would take terabytes; in blocks so large that the books of it stay small."""
    options = {"kv_tokens": 1 << 32, "block_size": 4096}
    async with engine(small_model, None, standby=True, reserve_kv=False, **options) as shell:
        for _ in range(2):
            loaded = await load(shell)
            assert "KV cache of 4294967296 tokens needs" in loaded.problem and "are available" in loaded.problem
            assert loaded.attempts == () and [phase.name for phase in loaded.phases] == ["kv_pool"]
        refused = await shell.run(PROMPT)
        assert refused.end is not None and refused.end.finish == "refused"
    with pytest.raises(HyperFlexisError, match="too little memory"):
        async with engine(small_model, None, standby=True, **options):
            pass


async def test_a_disk_with_other_weights_than_the_wanted_ones_is_refused(
    small_model: Path, other_weights: Path
) -> None:
    async with engine(small_model, "127.0.0.1:0") as source, engine(other_weights, None, standby=True) as shell:
        assert source.info is not None
        loaded = await load(shell, digest=source.info.weights_digest)
        assert "are wanted" in loaded.problem and loaded.digest == ""
        refused = await shell.run(PROMPT)
        assert refused.end is not None and refused.end.finish == "refused"


async def test_what_computes_other_logits_than_its_source_is_not_served(small_model: Path) -> None:
    async with engine(small_model, "127.0.0.1:0") as source, engine(small_model, None, standby=True) as shell:
        assert isinstance(source.engine, TorchEngine)
        shard = source.engine._shell.shard
        assert shard is not None and shard.manifest is not None
        # As if the source's kernels, or its idea of the layout, were others.
        check = bytes(reversed(shard.manifest.check))
        shard.publish(Manifest(shard.layout, shard.manifest.blocks, check))
        loaded = await load(shell, where(source))
        assert [one.path for one in loaded.attempts] == ["tcp", "disk"]
        assert "other logits" in loaded.attempts[0].problem and not loaded.problem
        assert await tokens(shell) == await tokens(source)


async def test_damage_on_the_way_is_made_good(small_model: Path) -> None:
    async with engine(small_model, "127.0.0.1:0") as source, engine(small_model, None, standby=True) as shell:
        way = Wire(where(source))
        way.damage_at = 1 << 20
        loaded = await load(shell, way.source)
        way.close()
        assert "damaged" in loaded.attempts[0].problem and not loaded.problem
        assert await tokens(shell) == await tokens(source)


async def test_it_serves_while_it_gives_at_a_rate_and_stops_in_the_middle(small_model: Path) -> None:
    async with engine(small_model, "127.0.0.1:0") as source, engine(small_model, None, standby=True) as shell:
        source.engine.set_send_rate(2e6)
        loading = asyncio.create_task(load(shell, where(source)))
        expected = await tokens(source)
        assert not loading.done()
        source.engine.set_send_rate(None)
        assert not (await loading).problem
        assert await tokens(shell) == expected


async def test_a_standby_that_is_stopped_while_it_loads_ends_soon(small_model: Path) -> None:
    async with engine(small_model, "127.0.0.1:0") as source, engine(small_model, None, standby=True) as shell:
        source.engine.set_send_rate(1e6)
        loading = asyncio.create_task(load(shell, where(source)))
        await asyncio.sleep(0.3)
        async with asyncio.timeout(5.0):
            await shell.stop()
        assert (await loading).problem == "the instance stopped"


async def test_an_address_that_is_taken_is_an_error_with_its_flag(small_model: Path) -> None:
    async with engine(small_model, "127.0.0.1:0") as source:
        with pytest.raises(HyperFlexisError, match="weights cannot be given at"):
            async with engine(small_model, where(source).address):
                pass


async def test_the_prior_of_a_standby_is_that_of_an_instance(small_model: Path) -> None:
    """Zeros take as long as weights: a shell is measured before it has any."""
    async with engine(small_model) as ready, engine(small_model, standby=True) as shell:
        assert ready.info is not None and shell.info is not None
        ours, theirs = ready.info.latency.decode_s(8, 512), shell.info.latency.decode_s(8, 512)
        assert 0.2 < ours / theirs < 5.0
        assert replace(ready.info, latency=shell.info.latency) == shell.info


def test_packed_copies_follow_their_matrix() -> None:
    from hyperflexis.engines.torch.model import Linear

    weight = torch.randn(96, 200)
    linear = Linear(weight)
    x = torch.randn(5, 96)
    linear.pack()
    torch.testing.assert_close(linear(x), x @ weight, rtol=1e-4, atol=1e-4)
    linear.unpack()
    weight.copy_(torch.randn(96, 200))
    torch.testing.assert_close(linear(x), x @ weight, rtol=1e-4, atol=1e-4)
