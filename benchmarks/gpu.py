"""What needs an NVIDIA GPU: engine equality, a profile, and how fast weights get onto the device. `make gpu` runs it.

    tests         tests/gpu: the engine on the device against the CPU and against Hugging Face transformers
    profile       `hyperflexis calibrate` on the device, for a model that is made here
    weights       on one device, from another process's memory (CUDA IPC) into memory of its own, digests included;
                  beside the same copy without digests, what the device's copy engine gives, and disk to device as
                  vLLM loads it and as we do

Nothing is installed: any Python from 3.11 on with PyTorch for CUDA will do that also has msgspec, xxhash, numpy,
safetensors and pydantic. Without a GPU, or without one of them, it says so and that is all. With one it writes
benchmarks/results/gpu.json and docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, command, environment, write_results

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "msgspec", "xxhash", "numpy", "safetensors", "pydantic")
PAGE = ROOT / "docs" / "gpu.md"


def why_not() -> str:
    """What is missing here; empty: nothing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}"
    import torch

    return "" if torch.cuda.is_available() else "no GPU at hand"


def fastest(work: Callable[[], float], rounds: int) -> float:
    return min(work() for _ in range(rounds))


def copy_s(target: Any, source: Any, rounds: int) -> float:
    """The fastest of some copies between tensors, after one that does not count."""
    import torch

    def work() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    work()
    return fastest(work, rounds)


def copy_on_device_s(size: int, rounds: int) -> float:
    """From memory to memory of one device: what its copy engine gives."""
    import torch

    target, source = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return copy_s(target, source, rounds)


def to_device_s(size: int, rounds: int) -> float:
    """From page-locked memory of the host."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    return copy_s(torch.zeros(size, dtype=torch.uint8).cuda(), source, rounds)


def give(listen: str, size: int, ready: Any, over: Any) -> None:
    """A source whose weights are on the device."""
    import torch

    from hyperflexis import transfer_measure as measure
    from hyperflexis.core.weights import Manifest
    from hyperflexis.engines.torch.device import DeviceArena
    from hyperflexis.transfer.weights import Shard, WeightServer

    layout = measure.layout_of(size)
    arena = DeviceArena(layout.size, torch.device("cuda"), shared=True)
    arena.tensor.random_(0, 256)
    shard = Shard(layout, arena)
    shard.publish(Manifest(layout, shard.digests()))
    server = WeightServer(listen, shard, "0", 1, measure.TOKEN)
    ready.put(server.address)
    over.wait()
    server.close()


def transferred_s(size: int, rounds: int) -> dict[str, float | str]:
    """Between two processes on one device: with digests, and the bare copy out of the opened memory."""
    import multiprocessing

    import torch

    from hyperflexis import transfer_measure as measure
    from hyperflexis.core.weights import WeightSource
    from hyperflexis.engines.torch.device import DeviceArena
    from hyperflexis.transfer.fetch import FetchConfig, Fetcher
    from hyperflexis.transfer.weights import Shard

    context = multiprocessing.get_context("spawn")
    ready, over = context.Queue(), context.Event()
    layout = measure.layout_of(size)
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, listen in (("ipc", f"unix:{folder}/w"), ("tcp", "127.0.0.1:0")):
            over.clear()
            process = context.Process(target=give, args=(listen, size, ready, over), daemon=True)
            process.start()
            source = WeightSource(ready.get(timeout=measure.LIMIT_S), "0", 1)
            shard = Shard(layout, DeviceArena(layout.size, torch.device("cuda")))
            best = float("inf")
            for _ in range(rounds):
                shard.forget()
                began = time.perf_counter()
                (attempt,) = Fetcher(shard, FetchConfig(measure.TOKEN)).run([source])
                best = min(best, time.perf_counter() - began)
                assert not attempt.problem, attempt
                assert shard.manifest is not None and shard.digests() == shard.manifest.blocks
                found[f"{way}_path"] = attempt.path
            found[f"{way}_s"] = best
            if way == "ipc":
                opened = Fetcher(shard, FetchConfig(measure.TOKEN)).attach(source)
                if opened is not None:
                    began = time.perf_counter()
                    shard.arena.take(opened, 0, layout.size)
                    found["ipc_bare_copy_s"] = time.perf_counter() - began
                del opened
            over.set()
            process.join()
    return found


def disk_s(size: int, rounds: int) -> dict[str, float]:
    """Files in the page cache forgotten before each."""
    import torch
    from safetensors.torch import load_file

    from hyperflexis.engines.torch.loader import allocate
    from hyperflexis.make_model import make_model
    from hyperflexis.transfer_bench import recipe_for
    from hyperflexis.transfer_measure import forget_pages

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        make_model(directory, recipe_for(size, 0))
        shell = allocate(directory, torch.device("cuda"), None, 512, 16, 512)

        def timed(work: Callable[[], object]) -> float:
            forget_pages(directory)
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - began

        def as_vllm() -> None:
            for file in sorted(directory.glob("*.safetensors")):
                for tensor in load_file(file).values():
                    tensor.cuda()

        return {
            "as_vllm_s": fastest(lambda: timed(as_vllm), rounds),
            "ours_s": fastest(lambda: timed(shell.read), rounds),
        }


def tests() -> dict[str, Any]:
    """tests/gpu, where pytest is there."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "no pytest"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    print(done.stdout)
    return {"status": done.returncode, "summary": done.stdout.strip().rpartition("\n")[2]}


def profile(size: str, folder: Path) -> dict[str, Any]:
    """The device's coefficients for a model of that size in bfloat16."""
    from hyperflexis.make_model import Recipe, make_model

    directory, out = folder / "model", folder / "profile.json"
    make_model(directory, Recipe(size=size, context=4096))
    words = ["calibrate", "--engine", "torch", "--model", str(directory), "--device", "cuda", "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "hyperflexis", *words, "--out", str(out), "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr.strip()[-500:]}
    return {"profile": json.loads(out.read_text()), "errors": json.loads(done.stdout)}


def page(found: dict[str, Any]) -> str:
    """docs/gpu.md."""
    weights, size = found["weights"], found["size_bytes"]
    rows = "\n".join(
        f"| {name} | {weights[key]:.4f} | {size / weights[key] / 1e9:.1f} |"
        for name, key in (
            ("copy on the device", "copy_on_device_s"),
            ("CUDA IPC, copy without digests", "ipc_bare_copy_s"),
            ("CUDA IPC, digests included", "ipc_s"),
            ("TCP, through the host at both ends", "tcp_s"),
            ("page-locked host memory to device", "to_device_s"),
            ("disk to device as vLLM loads it, cold", "as_vllm_s"),
            ("disk to device, ours, cold", "ours_s"),
        )
        if key in weights
    )
    return f"""# On a GPU

Written by `make gpu` on {found["device"]}, PyTorch {found["torch"]}, Python {found["python"]}, commit
{found["commit"]};
all figures: [benchmarks/results/gpu.json](../benchmarks/results/gpu.json).

Tests on the device: {found["tests"].get("summary") or found["tests"]}.

| {size / 2**30:.2f} GiB of weights | s | GB/s |
|---|---|---|
{rows}

Profile ({found["profile_model"]}, bfloat16): {found["profile"].get("errors") or found["profile"]}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--model", default="100m", help="of the profile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    import torch

    from hyperflexis.transfer_bench import parse_size

    size = parse_size(args.size)
    found: dict[str, Any] = {**environment(0), "command": command(), "size_bytes": size}
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tests": tests()}
    weights: dict[str, Any] = {"copy_on_device_s": copy_on_device_s(size, args.rounds)}
    weights["to_device_s"] = to_device_s(size, args.rounds)
    weights |= transferred_s(size, args.rounds) | disk_s(size, args.rounds)
    found["weights"] = weights
    with tempfile.TemporaryDirectory() as folder:
        found |= {"profile_model": args.model, "profile": profile(args.model, Path(folder))}
    write_results(args.json, found)
    PAGE.write_text(page(found))
    print(f"written: {PAGE}")
    return found["tests"].get("status", 0)


if __name__ == "__main__":
    sys.exit(main())
