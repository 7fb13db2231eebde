"""A start from zero: the copy in the host's memory beside the disk, and what a KV cache costs that is not reserved.

    python benchmarks/host_copy.py                        1 GiB of weights and of KV, two minutes
    python benchmarks/host_copy.py --size 64MiB --rounds 1       quickly, to see that it works

No instance serves. In each round a shell in a process of its own is told to load, by each way in turn, and is asked for
a token: ``disk``, after the files were dropped from the page cache; ``page cache``, not dropped; ``copy``, from the
process that `host_copy: true` starts; ``copy, KV taken``, the same with `reserve_kv: false`. Seconds from the order on,
medians; ratios are of medians in this run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, command, environment, write_results
from hyperflexis.config import read_fleet
from hyperflexis.core.weights import WeightSource
from hyperflexis.engines.torch.config import load_config
from hyperflexis.launch.local import own_command
from hyperflexis.make_model import make_model, num_bytes
from hyperflexis.serve import copy_of, fleet_file
from hyperflexis.transfer.auth import TOKEN_VARIABLE
from hyperflexis.transfer_bench import parse_size, recipe_for
from hyperflexis.transfer_measure import TOKEN, Start, forget_pages, instance

WAYS = ("disk", "page cache", "copy", "copy, KV taken")
KEPT = b"kept in memory"


@asynccontextmanager
async def copy(directory: Path, folder: Path) -> AsyncIterator[tuple[WeightSource, dict[str, Any]]]:
    """Where it is, and what it says of itself."""
    file = folder / "fleet.yaml"
    model = {"name": "m", "engine": "torch", "path": str(directory), "instances": {"min": 0, "max": 1}}
    file.write_text(json.dumps({"model": model | {"host_copy": True}}))
    fleet_file(folder).write_text(read_fleet(file).model_dump_json(exclude_unset=True))
    process = await asyncio.create_subprocess_exec(
        *own_command("_copy", str(folder), "m"),
        env={**os.environ, TOKEN_VARIABLE: TOKEN},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        said = await process.stderr.readline()
        if KEPT not in said:
            sys.exit((said + await process.stderr.read()).decode())
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        resident = {key: int(status[key].split()[0]) << 10 for key in ("VmRSS", "RssShmem", "RssAnon", "RssFile")}
        yield (
            copy_of(folder, "m"),
            {"says": said.decode().strip().partition("m-copy: ")[2].partition(", at ")[0], "resident_bytes": resident},
        )
    finally:
        process.kill()
        await process.wait()


async def start(way: str, directory: Path, folder: Path, source: WeightSource, kv_tokens: int) -> Start:
    sources = (source,) if way.startswith("copy") else ()
    options = ["--kv-tokens", str(kv_tokens), f"--reserve-kv={way != WAYS[-1]}"]
    async with AsyncExitStack() as stack:
        shell = await stack.enter_async_context(instance("shell", directory, folder, None, True, options))
        await shell.source()
        if way == "disk":
            forget_pages(directory)
        return await shell.start_from_standby(*sources)


async def measure(directory: Path, kv_tokens: int, rounds: int) -> tuple[dict[str, list[Start]], dict[str, Any]]:
    found: dict[str, list[Start]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="hfx-") as scratch:
        folder = Path(scratch)
        async with copy(directory, folder) as (source, told):
            for _ in range(rounds):
                for way in WAYS:
                    found[way].append(await start(way, directory, folder, source, kv_tokens))
    return found, told


def summary(starts: list[Start], disk: list[Start]) -> dict[str, Any]:
    ready, first = ([getattr(one, what) for one in starts] for what in ("ready_s", "first_token_s"))
    phases: dict[str, list[float]] = {}
    for one in starts:
        for phase in one.phases:
            phases.setdefault(phase.name, []).append(phase.seconds)
    return {
        "ready_s": round(statistics.median(ready), 4),
        "first_token_s": round(statistics.median(first), 4),
        "ready_times_as_soon_as_disk": round(
            statistics.median([d.ready_s for d in disk]) / statistics.median(ready), 3
        ),
        "phases_s": {name: round(statistics.median(seconds), 4) for name, seconds in phases.items()},
        "all_ready_s": [round(seconds, 4) for seconds in ready],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=1 << 30, help="of weights, and of KV (default: 1GiB)")
    parser.add_argument("--rounds", type=int, default=3, help="starts by each way (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_copy.json")
    args = parser.parse_args()
    recipe = recipe_for(args.size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        make_model(directory, recipe)
        kv_tokens = args.size // (4 * load_config(directory).kv_elements_per_token)
        starts, told = asyncio.run(measure(directory, kv_tokens, args.rounds))
    found: dict[str, Any] = {"command": command(), "environment": environment(0), "copy": told}
    found |= {"weights_bytes": num_bytes(recipe), "kv_bytes": args.size, "rounds": args.rounds}
    found["starts"] = {way: summary(one, starts["disk"]) for way, one in starts.items()}
    print(told)
    for way, one in found["starts"].items():
        print(f"{way:15} {one}")
    write_results(args.out, found)


if __name__ == "__main__":
    main()
