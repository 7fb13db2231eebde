"""Our torch engine beside vLLM: the same weights, the same requests, one thread each; output tokens per second.

    make bench-vllm                                     # all benchmarks on vLLM
    .venv-vllm/bin/python benchmarks/vllm_torch.py      # this one; `make test-vllm` makes .venv-vllm

Both are driven through the engine contract by this process: the torch engine runs in it, in a thread of its own, vLLM
is a stock server behind its adapter. N requests start together, each with PROMPT tokens of its own, and put out OUTPUT
tokens. *decode* is the rate from the moment when all have their first token to the last token, *whole* that from the
start. Engines take turns, in changing order, and a ratio is of two runs that followed each other. Only one is
loaded at a time, and the other is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.contract.support import Driver, driven
from tests.vllm.servers import ENV, EXACT, Server

from common import RESULTS, command, environment, write_results
from hyperflexis.engines.base import Engine
from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine
from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.engines.vllm.server import Recipe
from hyperflexis.make_model import Recipe as ModelRecipe
from hyperflexis.make_model import make_model
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling

BATCHES = (1, 8, 32)
PROMPT, OUTPUT = 64, 128
CONTEXT, MAX_BATCH, MAX_BATCH_TOKENS, KV_TOKENS = 2048, 64, 2048, 32768
TORCH, VLLM = "torch", "vllm"


async def measure(driver: Driver, batch: int, rng: random.Random) -> dict[str, float]:
    """Tokens per second of ``batch`` requests that start together."""
    sampling = Sampling(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    began = time.monotonic()
    keys = [driver.send([rng.randrange(20, 900) for _ in range(PROMPT)], sampling=sampling) for _ in range(batch)]
    streams = [driver.streams[key] for key in keys]
    for stream in streams:
        await stream.started()
    first, before = time.monotonic(), sum(len(stream.tokens) for stream in streams)
    for stream in streams:
        end = await stream.ended()
        assert end.finish == "length" and len(stream.tokens) == OUTPUT
    ended = time.monotonic()
    for key in keys:
        del driver.streams[key]
    tokens = batch * OUTPUT
    return {"decode": (tokens - before) / (ended - first), "whole": tokens / (ended - began)}


async def compare(engines: dict[str, Engine], rounds: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    async with driven(engines[TORCH], TORCH) as torch, driven(engines[VLLM], VLLM) as vllm:
        drivers = {TORCH: torch, VLLM: vllm}
        for driver in drivers.values():
            await measure(driver, max(BATCHES), rng)  # what is made at first use is made
        for batch in BATCHES:
            runs: dict[str, list[dict[str, float]]] = {TORCH: [], VLLM: []}
            for number in range(rounds):
                order = (TORCH, VLLM) if number % 2 == 0 else (VLLM, TORCH)
                for name in order:
                    runs[name].append(await measure(drivers[name], batch, rng))
            found[str(batch)] = one = figures(runs)
            line = ", ".join(f"{phase} {f['torch']} / {f['vllm']} = {f['ratio']}" for phase, f in one.items())
            print(f"batch {batch}: torch / vLLM, tokens/s: {line}", flush=True)
    return found


def figures(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found = {}
    for phase in ("decode", "whole"):
        ours, theirs = ([run[phase] for run in runs[name]] for name in (TORCH, VLLM))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        found[phase] = {
            TORCH: round(median(ours)),
            VLLM: round(median(theirs)),
            "ratio": round(median(ratios), 2),
            "ratios": rounded(ratios),
        }
    return found


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="20m", help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each engine and batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_torch.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / args.size
        make_model(model, ModelRecipe(args.size, context=CONTEXT))
        recipe = Recipe(
            "m",
            model,
            max_batch=MAX_BATCH,
            max_batch_tokens=MAX_BATCH_TOKENS,
            arguments=(*EXACT, "--max-model-len", str(CONTEXT)),
            env=ENV,
        )
        server = Server(recipe, Path(temporary) / "vllm.log")
        try:
            url = server.wait_ready().url
            step = STEPS["hyperflexis"]
            config = TorchConfig("m", model, step, kv_tokens=KV_TOKENS, context_length=CONTEXT, max_batch=MAX_BATCH)
            engines: dict[str, Engine] = {
                TORCH: TorchEngine(config),
                VLLM: VllmEngine(VllmConfig("m", url, max_batch=MAX_BATCH, max_batch_tokens=MAX_BATCH_TOKENS)),
            }
            batches = asyncio.run(compare(engines, args.rounds, args.seed))
        finally:
            server.stop()
    found = {
        "command": command(),
        "environment": environment(args.seed),
        "model": args.size,
        "dtype": "float32",
        "threads": 1,
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "rounds": args.rounds,
        "batches": batches,
    }
    write_results(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
