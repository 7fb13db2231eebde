"""Checkpoints over real sockets and memory, without vLLM. Real servers: tests/vllm/test_loader.py."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.unit.transfer.weights_case import TOKEN, Wire, free_address

from hyperflexis.core.weights import WeightSource
from hyperflexis.engines.vllm.weights import EPOCH, NAME, Model, Settings, configuration, take
from hyperflexis.errors import HyperFlexisError
from hyperflexis.transfer.arena import Arena, Mapped
from hyperflexis.transfer.weights import Shard, WeightServer

SHAPES = {"b.weight": (700, 1000), "a.bias": (7,), "c.scale": (), "d.none": (0, 4), "z.weight": (300, 1024)}


def write(path: Path, tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> Path:
    entries, at = {}, 0
    for name, (shape, data) in tensors.items():
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data for _, data in tensors.values()))
    return path


def tensors(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    random, found = Random(seed), {}
    for name, shape in (shapes or SHAPES).items():
        size = 4
        for side in shape:
            size *= side
        found[name] = (shape, random.randbytes(size))
    return found


def model(folder: Path, name: str = "m", **options: Any) -> Model:
    return Model(configuration({"model_type": "llama"}), (write(folder / f"{name}.safetensors", tensors(**options)),))


def content(shard: Shard) -> dict[str, bytes]:
    places = zip(shard.layout.tensors, shard.layout.offsets, strict=True)
    return {one.name: bytes(shard.arena.view[at : at + one.size]) for one, at in places}


class Sources:
    """Servers of this test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def give(self, shard: Shard, kind: str = "tcp", token: str = TOKEN) -> str:
        server = WeightServer(free_address(kind, self._folder, f"w{id(shard)}"), shard, NAME, EPOCH, token)
        self._stack.callback(server.close)
        return server.address

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def sources(tmp_path: Path) -> Any:
    one = Sources(tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": []}, r"unknown field `source`.*\"sources\": \["),
        ({"sources": "10.0.0.1:7000"}, r"Expected `array`.*\$\.sources"),
        ({"sources": ["10.0.0.1"]}, "sources: '10.0.0.1' is no address; write HOST:PORT or unix:PATH"),
        ({"listen": "unix:"}, "listen: 'unix:' is no address"),
        ({"listen": "0.0.0.0:7000"}, "listen: .* to anybody: set HYPERFLEXIS_KV_TOKEN"),
        ({"sources": ["10.0.0.1:7000"]}, "sources: .* from anybody: set HYPERFLEXIS_KV_TOKEN"),
        ({"digest": "12"}, "digest: '12' is none; copy"),
    ],
)
def test_settings_that_are_none_are_named_with_what_to_do(given: dict[str, Any], words: str) -> None:
    with pytest.raises(HyperFlexisError, match="--model-loader-extra-config: .*" + words):
        Settings.parse(given, token="")


def test_settings_are_taken_as_they_are() -> None:
    given = {"sources": ["[::1]:7000", "unix:/run/w"], "listen": "0.0.0.0:7000", "digest": "0" * 32}
    assert Settings.parse(given, TOKEN) == Settings(("[::1]:7000", "unix:/run/w"), "0.0.0.0:7000", "0" * 32)
    assert Settings.parse({"listen": "unix:/run/w"}, "") == Settings(listen="unix:/run/w")


def test_a_configuration_is_what_it_says_about_the_model() -> None:
    one = configuration({"hidden_size": 8, "transformers_version": "5.0", "_name_or_path": "here"})
    assert one == configuration({"transformers_version": "5.1", "hidden_size": 8})
    assert one != configuration({"hidden_size": 16})


def test_files_are_read_as_they_are_however_they_are_cut(tmp_path: Path) -> None:
    all_of_it = tensors()
    whole = Model("c", (write(tmp_path / "whole", all_of_it),)).read(shared=False)
    parts = [{name: all_of_it[name]} for name in reversed(all_of_it)]
    cut = Model("c", tuple(write(tmp_path / f"part{i}", part) for i, part in enumerate(parts))).read(shared=True)
    assert content(whole) == content(cut) == {name: data for name, (_, data) in all_of_it.items()}
    assert whole.manifest is not None and cut.manifest is not None
    assert whole.manifest.digest == cut.manifest.digest


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(("kind", "path", "memory"), [("tcp", "tcp", Arena), ("unix", "shared memory", Mapped)])
def test_a_checkpoint_comes_whether_or_not_its_files_are_here(
    tmp_path: Path, sources: Sources, kind: str, path: str, memory: type, here: bool
) -> None:
    mine = model(tmp_path)
    source = mine.read(shared=True)
    address = sources.give(source, kind)
    shard, attempts = take(mine if here else replace(mine, files=()), Settings((address,)), TOKEN)
    assert shard is not None and content(shard) == content(source) and isinstance(shard.arena, memory)
    (attempt,) = attempts
    assert (attempt.path, attempt.source, attempt.problem) == (path, address, "") and attempt.num_bytes > 4_000_000


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_it_comes_and_goes_over_what_both_ends_are_set_to(tmp_path: Path, sources: Sources, kind: str) -> None:
    pytest.importorskip("torch", reason="PyTorch moves it here")
    mine = model(tmp_path)
    source = mine.read(shared=True)
    mapped, _ = take(mine, Settings((sources.give(source, "unix"),)), TOKEN)
    assert mapped is not None and isinstance(mapped.arena, Mapped)
    address = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/over"
    server = WeightServer(address, mapped, NAME, EPOCH, TOKEN, over="torch")
    shard, attempts = take(mine, Settings((server.address,), weights_over="torch"), TOKEN)
    server.close()
    assert [(one.path, one.problem) for one in attempts] == [("gloo", "")]
    assert shard is not None and content(shard) == content(source)


def test_what_was_mapped_is_given_on_when_its_source_has_ended(tmp_path: Path, sources: Sources) -> None:
    mine = model(tmp_path)
    first = mine.read(shared=True)
    wanted = content(first)
    server = WeightServer(f"unix:{tmp_path}/first", first, NAME, EPOCH, TOKEN)
    second, _ = take(mine, Settings((server.address,)), TOKEN)
    server.close()
    first.arena.release()
    del first
    assert second is not None
    for kind in ("unix", "tcp"):
        third, attempts = take(mine, Settings((server.address, sources.give(second, kind))), TOKEN)
        assert third is not None and content(third) == wanted
        assert [bool(one.problem) for one in attempts] == [True, False]


def test_memory_that_is_not_shared_is_copied(tmp_path: Path, sources: Sources) -> None:
    mine = model(tmp_path)
    source = mine.read(shared=False)
    shard, _ = take(mine, Settings((sources.give(source, "unix"),)), TOKEN)
    assert shard is not None and content(shard) == content(source) and isinstance(shard.arena, Arena)


def test_what_is_not_the_models_checkpoint_is_left_with_the_reason(tmp_path: Path, sources: Sources) -> None:
    mine = model(tmp_path)
    right = mine.read(shared=True)
    values = model(tmp_path, "values", seed=1)
    wide = model(tmp_path, "wide", **(SHAPES | {"a.bias": (8,)}))
    more = model(tmp_path, "more", **(SHAPES | {"extra": (2,)}))
    other = Model(configuration({"model_type": "qwen3"}), mine.files)
    bad = {
        sources.give(right, token="another"): "does not know this fleet's token",
        sources.give(other.read(shared=True)): "model's configuration",
        sources.give(values.read(shared=True)): "has other values than in",
        sources.give(values.read(shared=True), "unix"): "has other values than in",
        sources.give(wide.read(shared=True)): r"tensor a.bias has shape [8] there, [7] here",
        sources.give(more.read(shared=True)): "the tensors are others",
        "127.0.0.1:1": "refused",
    }
    shard, attempts = take(mine, Settings(tuple(bad)), TOKEN)
    assert shard is None
    for attempt, (address, words) in zip(attempts, bad.items(), strict=True):
        assert attempt.source == address and attempt.num_bytes == 0 and words in attempt.problem, attempt
    good = sources.give(right)
    shard, attempts = take(mine, Settings((*bad, good)), TOKEN)
    assert shard is not None and content(shard) == content(right) and len(attempts) == len(bad) + 1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_damage_shows_with_the_tensors_name(tmp_path: Path, sources: Sources, kind: str) -> None:
    mine = model(tmp_path)
    source = mine.read(shared=True)
    at = dict(zip((one.name for one in source.layout.tensors), source.layout.offsets, strict=True))["z.weight"]
    source.arena.view[at + 1000] ^= 1
    shard, attempts = take(mine, Settings((sources.give(source, kind),)), TOKEN)
    assert shard is None and attempts
    assert "tensor z.weight was damaged on its way" in attempts[-1].problem


def test_only_the_wanted_digest_is_taken(tmp_path: Path, sources: Sources) -> None:
    mine = replace(model(tmp_path), files=())
    right, wrong = (model(tmp_path, f"m{seed}", seed=seed).read(shared=True) for seed in (0, 1))
    assert right.manifest is not None and wrong.manifest is not None
    addresses = (sources.give(wrong), sources.give(right))
    shard, attempts = take(mine, Settings(addresses, digest=right.manifest.digest), TOKEN)
    assert shard is not None and content(shard) == content(right)
    assert f"has digest {wrong.manifest.digest}, and {right.manifest.digest} is wanted" in attempts[0].problem


def test_the_next_source_goes_on_where_one_broke_off(tmp_path: Path, sources: Sources) -> None:
    mine = replace(model(tmp_path), files=())
    source = model(tmp_path).read(shared=True)
    address = sources.give(source)
    wire = Wire(WeightSource(address, NAME, EPOCH))
    wire.cut_at, wire.stays_cut = 2_500_000, True
    try:
        shard, attempts = take(mine, Settings((wire.source.address, address)), TOKEN)
    finally:
        wire.close()
    assert shard is not None and content(shard) == content(source)
    assert attempts[0].num_bytes > 0 and attempts[0].problem and not attempts[-1].problem
    assert sum(one.num_bytes for one in attempts) == sum(one.size for one in source.layout.tensors)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, sources: Sources) -> None:
    mine = model(tmp_path)
    address = sources.give(mine.read(shared=True))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(mine.files[0].read_bytes()[:-1])
    shard, attempts = take(replace(mine, files=(broken,)), Settings((address,)), TOKEN)
    assert shard is None and "broken.safetensors: cannot be read" in attempts[0].problem
