"""Weights for vLLM from a source beside the disk: the load alone, and from the start of a process to its first answer.

    .venv-vllm/bin/python benchmarks/vllm_weights.py      # about five minutes; `make test-vllm` makes .venv-vllm

One process gives a checkpoint. ``load``: vLLM's loader fills a model in this process again and again, by each way in
turn. ``start``: a server is started by each way in turn, until it answers. ``disk``: vLLM's own loader, after the files
were dropped from the page cache; ``page cache``: the same, not dropped; ``tcp``: over the loopback; ``shared memory``:
mapped. Ratios are of medians in this run. The load ends where vLLM has the tensors in its parameters; what it does with
them after that is the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.vllm.servers import ENV, EXACT, Server, recipe

from common import RESULTS, command, environment, write_results
from hyperflexis.engines.vllm.weights import EPOCH, LOAD_FORMAT, NAME, Model, configuration
from hyperflexis.make_model import Recipe, make_model
from hyperflexis.transfer.auth import TOKEN_VARIABLE
from hyperflexis.transfer.weights import WeightServer

TOKEN = "a benchmark's word"
WAYS = ("disk", "page cache", "tcp", "shared memory")
GIVE = "--give"
os.environ |= {**ENV, TOKEN_VARIABLE: TOKEN}


def give(directory: Path, unix: str) -> None:
    """The source: gives the checkpoint over both ways until its input ends."""
    config = json.loads((directory / "config.json").read_text())
    shard = Model(configuration(config), tuple(directory.glob("*.safetensors"))).read(shared=True)
    servers = [WeightServer(address, shard, NAME, EPOCH, TOKEN) for address in ("127.0.0.1:0", unix)]
    print(json.dumps({"tcp": servers[0].address, "shared memory": unix, "bytes": shard.layout.size}), flush=True)
    sys.stdin.read()


@contextmanager
def source(directory: Path, folder: Path) -> Iterator[dict[str, Any]]:
    words = [sys.executable, __file__, GIVE, str(directory), f"unix:{folder}/w"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()


def drop(directory: Path) -> None:
    """The files from the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def extra(way: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [given[way]]} if way in given else {}


def loads(directory: Path, given: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each load."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    from hyperflexis.engines.vllm.loader import register

    register()
    config = EngineArgs(model=str(directory), dtype="float32", enforce_eager=True).create_engine_config()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel()
        torch.set_default_dtype(torch.float32)
        model = initialize_model(config)
        for number in range(1 + rounds):  # the first touches the parameters
            for way in WAYS:
                drop(directory) if way == "disk" else None
                form = LOAD_FORMAT if way in given else "auto"
                loader = get_model_loader(
                    LoadConfig(load_format=form, model_loader_extra_config=extra(way, given), use_tqdm_on_load=False)
                )
                began = time.perf_counter()
                loader.load_weights(model, config.model_config)
                if number:
                    times[way].append(time.perf_counter() - began)
    return times


def starts(directory: Path, given: dict[str, Any], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each start, from the process to its first answer about its health."""
    times: dict[str, list[float]] = {way: [] for way in WAYS if way != "page cache"}
    for number in range(rounds):
        for way, found in times.items():
            arguments = (*EXACT, "--max-model-len", "512")
            if way in given:
                arguments += ("--load-format", LOAD_FORMAT)
                arguments += ("--model-loader-extra-config", json.dumps(extra(way, given)))
            else:
                drop(directory)
            log = folder / f"{way.replace(' ', '-')}-{number}.log"
            began = time.perf_counter()
            server = Server(replace(recipe(directory, "stock", arguments), env=dict(os.environ)), log)
            try:
                server.wait_ready()
                found.append(time.perf_counter() - began)
            finally:
                server.stop()
            assert (f"weights from {given.get(way)}" in log.read_text()) == (way in given), log.read_text()[-3000:]
    return times


def summary(times: dict[str, list[float]], size: int, rate: Callable[[float], float] | None) -> dict[str, Any]:
    medians = {way: statistics.median(values) for way, values in times.items() if values}
    return {
        way: {
            "median_s": round(median, 4),
            "times_as_fast_as_disk": round(medians["disk"] / median, 3),
            "all_s": [round(value, 4) for value in times[way]],
        }
        | ({} if rate is None else {"gb_per_s": round(rate(median), 2)})
        for way, median in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m", help="of the model that is made (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="a directory to take, or to make the model in and keep it")
    parser.add_argument("--rounds", type=int, default=5, help="loads by each way (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=2, help="starts by each way (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_weights.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = args.model or folder / args.size
        if not directory.exists():
            make_model(directory, Recipe(args.size, context=2048))
        given = stack.enter_context(source(directory, folder))
        size = given["bytes"]
        whole = starts(directory, given, args.starts, folder)
        alone = loads(directory, given, args.rounds)
    found: dict[str, Any] = {"command": command(), "environment": environment(0), "model": args.size, "bytes": size}
    found["load"] = summary(alone, size, lambda seconds: size / 1e9 / seconds)
    found["start"] = summary(whole, size, None)
    for part in ("load", "start"):
        for way, values in found[part].items():
            print(f"{part:6} {way:14} {values}")
    write_results(args.out, found)


if __name__ == "__main__":
    if sys.argv[1:2] == [GIVE]:
        give(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
