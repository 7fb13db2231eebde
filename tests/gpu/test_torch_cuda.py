"""The torch engine on a CUDA device: the same code as on CPUs, other kernels."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.support import driven
from tests.unit.engines.torch.attention_case import mixed_batch
from tests.unit.engines.torch.ring_case import OneProcess
from tests.unit.transfer.test_channels import swallow

from hyperflexis.core.links import KvSource
from hyperflexis.core.weights import LoadWeights, Manifest, WeightSource
from hyperflexis.engines.base import Emission, EngineStart
from hyperflexis.engines.torch import handoff
from hyperflexis.engines.torch.attention import Span
from hyperflexis.engines.torch.config import load_config
from hyperflexis.engines.torch.device import DeviceArena
from hyperflexis.engines.torch.device_ring import DeviceRings
from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
from hyperflexis.engines.torch.loader import load
from hyperflexis.errors import HyperFlexisError
from hyperflexis.make_model import Recipe, make_model
from hyperflexis.policy.catalog import STEPS
from hyperflexis.transfer import tcp
from hyperflexis.transfer.fetch import FetchConfig, Fetcher
from hyperflexis.transfer.paths import Over
from hyperflexis.transfer.ring import RingSource, RingTarget
from hyperflexis.transfer.tcp import SocketChannel
from hyperflexis.transfer.transport import MAX_PAYLOAD
from hyperflexis.transfer.weights import Shard, WeightServer
from hyperflexis.transfer_measure import TOKEN, layout_of
from hyperflexis.wire import Generate, Sampling, pack_ids

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "small"
    make_model(directory, Recipe(size="1m", context=512))
    return directory


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 3e-2), ("float16", 4e-3)])
def test_attention_equals_its_definition(model: Path, dtype: str, atol: float) -> None:
    config = replace(load_config(model), num_layers=2)
    got, expected = mixed_batch(config, getattr(torch, dtype), CUDA)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


def test_logits_in_fp32_are_those_of_the_cpu(model: Path) -> None:
    logits = []
    for device in (torch.device("cpu"), CUDA):
        on_device = load(model, device, "float32", 1024, 16, 1024).model
        spans = [Span(0, 100, list(range(10, 17))), Span(0, 40, [3, 1, 5])]
        ids = [(7 * i) % 1024 for i in range(140)]
        first = on_device.forward(on_device.prepare(spans, ids, [99, 139]))
        more = on_device.forward(
            on_device.prepare([Span(100, 1, list(range(10, 17))), Span(40, 8, [3, 1, 5])], ids[:9], [0, 8])
        )
        logits.append(torch.cat((first, more)).cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-2)


async def run(model: Path, dtype: str, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Tokens of all prompts, sent at once."""
    tokens: list[list[int]] = [[] for _ in prompts]
    open_streams = len(prompts)
    done = asyncio.Event()

    def sink(emissions: list[Emission]) -> None:
        nonlocal open_streams
        for emission in emissions:
            assert emission.finish in (None, "length"), emission
            assert isinstance(emission.key, int)
            tokens[emission.key] += emission.token_ids
            open_streams -= emission.finish is not None
        if open_streams == 0:
            done.set()

    config = TorchConfig("m", model, STEPS["hyperflexis"], device="cuda", dtype=dtype, kv_tokens=16384)
    engine = TorchEngine(config)
    info = await engine.start(EngineStart(sink))
    assert info.latency.decode_s(1, 1) > 0.0
    for key, prompt in enumerate(prompts):
        engine.generate(key, Generate(key, str(key), 1, pack_ids(prompt), sampling))
    async with asyncio.timeout(60.0):
        await done.wait()
    await engine.stop()
    return tokens


async def test_greedy_fp32_tokens_are_those_of_transformers(model: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with Hugging Face transformers")
    prompts = [[(31 * i + 7 * j) % 1000 for j in range(n)] for i, n in enumerate((1, 17, 64, 200))]
    got = await run(model, "float32", prompts, Sampling(temperature=0.0, max_tokens=16, ignore_eos=True))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(CUDA).eval()
    reference.generation_config.eos_token_id = None
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt], device=CUDA)
        mask = torch.ones_like(ids)
        whole = reference.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert tokens == whole[0, len(prompt) :].tolist()


async def test_bfloat16_serves_a_large_batch_with_every_way_of_sampling(model: Path) -> None:
    prompts = [[(13 * i + j) % 1000 for j in range(5 + 6 * i)] for i in range(64)]
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=200, seed=3, max_tokens=24, ignore_eos=True, logprobs=5)
    tokens = await run(model, "bfloat16", prompts, sampling)
    assert [len(one) for one in tokens] == [24] * 64
    assert all(0 <= token < 1024 for one in tokens for token in one)
    assert len({tuple(one) for one in tokens}) > 60


def test_too_little_device_memory_is_told_with_a_remedy(model: Path) -> None:
    with pytest.raises(HyperFlexisError, match=r"too little memory on cuda.*--kv-tokens"):
        load(model, CUDA, None, 1 << 40, 16, 512)


def give(listen: str, size: int, ready: Any, over: Any, device: str = "cuda", way: Over = "") -> None:
    """A source in another process, its weights on the device."""
    layout = layout_of(size)
    arena = DeviceArena(layout.size, torch.device(device), shared=True)
    arena.tensor.random_(0, 256)
    shard = Shard(layout, arena)
    manifest = Manifest(layout, shard.digests())
    shard.publish(manifest)
    server = WeightServer(listen, shard, "0", 1, TOKEN, over=way)
    ready.put((server.address, manifest.digest))
    over.wait()
    server.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_weights_get_from_one_process_s_device_memory_into_another_s(tmp_path: Path, tcp: bool) -> None:
    context = multiprocessing.get_context("spawn")
    ready, over = context.Queue(), context.Event()
    size = 64 << 20
    listen = "127.0.0.1:0" if tcp else f"unix:{tmp_path}/w"
    process = context.Process(target=give, args=(listen, size, ready, over), daemon=True)
    process.start()
    address, digest = ready.get(timeout=120.0)
    shard = Shard(layout_of(size), DeviceArena(layout_of(size).size, CUDA))
    (attempt,) = Fetcher(shard, FetchConfig(TOKEN, digest=digest)).run([WeightSource(address, "0", 1)])
    over.set()
    process.join(30.0)
    assert (attempt.path, attempt.problem) == ("tcp" if tcp else "device", "")
    assert shard.manifest is not None and shard.digests() == shard.manifest.blocks


def send_pieces(address: str, count: int, over: Any) -> None:
    """A source in another process: pieces of its device's memory, into the target's."""
    sock = tcp.connect(address)
    control = SocketChannel(sock)
    handle = control.receive(lambda frame: frame.header)
    ring = DeviceRings(CUDA).take(sock, handle)
    assert ring is not None
    source = RingSource(control, ring)
    threading.Thread(target=swallow, args=(source,), daemon=True).start()
    for number in range(count):
        piece = torch.full((MAX_PAYLOAD,), number, dtype=torch.uint8, device=CUDA)

        def fill(memory: Any, piece: torch.Tensor = piece) -> bool:
            memory.copy_(piece)
            torch.cuda.synchronize()
            return True

        source.send(b"%d" % number, MAX_PAYLOAD, fill)
    over.wait()


def test_kv_gets_from_one_process_s_device_into_another_s(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    over, count = context.Event(), 40  # each slot several times
    listener, address = tcp.listen(f"unix:{tmp_path}/kv")
    process = context.Process(target=send_pieces, args=(address, count, over), daemon=True)
    process.start()
    sock, _ = listener.accept()
    control, ring = SocketChannel(sock), DeviceRings(CUDA).make()
    assert ring is not None
    control.limit_receive(120.0)
    control.send(ring.handle)
    target = RingTarget(control, ring)
    for number in range(count):
        header, piece = target.receive(lambda frame: (frame.header, frame.payload.cpu()))
        assert header == b"%d" % number
        assert bool((piece == number).all()), f"piece {number}"
    over.set()
    process.join(30.0)
    target.close()
    listener.close()


async def test_a_request_goes_on_with_the_kv_from_device_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = OneProcess(CUDA)  # a process cannot open a handle of its own
    monkeypatch.setattr(handoff, "DeviceRings", lambda _: device)
    sampling = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompt = [40 + (7 * i) % 900 for i in range(150)]
    (whole,) = await run(model, "float32", [prompt], sampling)
    config: dict[str, Any] = {"device": "cuda", "dtype": "float32", "kv_tokens": 1024, "max_batch_tokens": 64}
    one = TorchEngine(TorchConfig("m", model, STEPS["hyperflexis"], kv_listen=f"unix:{tmp_path}/kv", **config))
    other = TorchEngine(TorchConfig("m", model, STEPS["hyperflexis"], **config))
    async with driven(one, "one") as source, driven(other, "other") as target:
        assert source.info is not None
        where = KvSource(source.info.kv_address, "one", 1)
        keys: list[object] = []
        source.ending = lambda request_id, left_s: keys.append(
            target.send(prompt, sampling=sampling, request_id=request_id, kv=where)
        )
        key = source.send(prompt, sampling=sampling, request_id="r", hands_over=True)
        assert (await source.streams[key].ended()).finish == "handed"
        assert (await target.streams[keys[0]].ended()).finish == "length"
        assert target.streams[keys[0]].tokens == whole
    assert any(bool(ring.any()) for ring in device.made)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL connects two devices, and there is one")
def test_weights_get_from_one_device_to_another_over_nccl() -> None:
    context = multiprocessing.get_context("spawn")
    ready, over = context.Queue(), context.Event()
    size = 64 << 20
    args = ("127.0.0.1:0", size, ready, over, "cuda:1", "torch")
    process = context.Process(target=give, args=args, daemon=True)
    process.start()
    address, digest = ready.get(timeout=120.0)
    shard = Shard(layout_of(size), DeviceArena(layout_of(size).size, torch.device("cuda:0")))
    config = FetchConfig(TOKEN, digest=digest, silence_s=10.0, over="torch")
    (attempt,) = Fetcher(shard, config).run([WeightSource(address, "0", 1)])
    over.set()
    process.join(30.0)
    assert (attempt.path, attempt.problem) == ("nccl", "")
    assert shard.manifest is not None and shard.digests() == shard.manifest.blocks


async def test_a_standby_on_the_device_computes_what_its_source_does(model: Path, tmp_path: Path) -> None:
    config = TorchConfig("m", model, STEPS["hyperflexis"], device="cuda", dtype="float32", kv_tokens=4096)
    source = TorchEngine(replace(config, weights_listen=f"unix:{tmp_path}/w"))
    info = await source.start(EngineStart(lambda _: None, "a", 1))
    shell = TorchEngine(config)
    await shell.start(EngineStart(lambda _: None, "b", 1, standby=True))
    loaded = await shell.load(LoadWeights("b", 1, (WeightSource(info.weights_address, "a", 1),), info.weights_digest))
    await source.stop()
    await shell.stop()
    # In one process the handle does not open; between two it does, which the test above sees.
    assert loaded.problem == "" and loaded.digest == info.weights_digest
    assert loaded.attempts[0].path in ("device", "tcp") and not loaded.attempts[0].problem
