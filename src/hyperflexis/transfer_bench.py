"""`hyperflexis transfer bench`: how fast a new instance has its weights on this machine, on each way.

    weights   a copy into memory of its own: from disk as vLLM loads it and as we do, over TCP, over shared memory
    whole     from the decision to the first token: a process started anew, and a standby that is told to load

What bounds a way is printed beside it: a copy of memory, a bare socket. Attaching, which copies nothing, is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bench import write_json
from .errors import HyperFlexisError
from .make_model import SIZES, Recipe, make_model, num_bytes
from .telemetry import machine

UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
ROOM = 2
"""Scratch disk, in sizes of the model: it, and what the file system needs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    commands = parser.add_subparsers(dest="transfer_command", metavar="COMMAND", required=True)
    text = "measure how fast weights arrive on each way, and how fast a standby is ready"
    bench = commands.add_parser("bench", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add = bench.add_argument
    add("--size", default="1GiB", metavar="SIZE", help="of the weights, as 256MiB (default: %(default)s)")
    add("--receivers", type=int, default=1, metavar="N", help="at the end of one chain (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="the fastest of so many counts (default: %(default)s)")
    add("--warm", action="store_true", help="leave files in the page cache: the disk is then a copy of memory")
    add("--weights-only", action="store_true", help="start no instances")
    add("--scratch", type=Path, metavar="DIR", help="where the model is made (default: the system's)")
    add("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    add("--json", metavar="FILE", help="write the figures as JSON ('-': standard output)")


def main(args: argparse.Namespace) -> int:
    """Run the command; raises HyperFlexisError for what the user has to change."""
    size = parse_size(args.size)
    if args.receivers < 1 or args.rounds < 1:
        raise HyperFlexisError("--receivers and --rounds are at least 1")
    log = sys.stderr if args.json == "-" else sys.stdout
    found = bench(
        size,
        args.receivers,
        args.rounds,
        cold=not args.warm,
        whole=not args.weights_only,
        scratch=args.scratch,
        seed=args.seed,
        say=lambda text: print(text, file=log, flush=True),
    )
    if args.json:
        write_json(found, args.json)
    return 0


def bench(
    size: int,
    receivers: int,
    rounds: int,
    *,
    cold: bool,
    whole: bool,
    scratch: Path | None,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all ways for about ``size`` bytes. Raises HyperFlexisError where torch is missing, or room on disk."""
    try:
        import safetensors  # noqa: F401  (asked for before minutes are spent)
        import torch  # noqa: F401

        from . import transfer_measure as measure
    except ModuleNotFoundError as error:
        raise HyperFlexisError(f"transfer bench needs {error.name}: pip install 'hyperflexis[torch]'") from error
    recipe = recipe_for(size, seed)
    size = num_bytes(recipe)
    with tempfile.TemporaryDirectory(prefix="hfx-", dir=scratch) as folder:
        free = shutil.disk_usage(folder).free
        if free < ROOM * size:
            raise HyperFlexisError(
                f"{folder} has {free / 1e9:.1f} GB free, and {ROOM * size / 1e9:.1f} GB are needed: give another "
                "--scratch or a smaller --size"
            )
        directory, sockets = Path(folder) / "model", Path(folder)
        make_model(directory, recipe)
        seconds: dict[str, float] = {}

        def note(name: str, value: float) -> None:
            seconds[name] = value
            say(f"{name:32} {value:9.4f} s {size / value / 1e9:8.2f} GB/s")

        def fastest(work: Callable[[], float]) -> float:
            return min(work() for _ in range(rounds))

        say(f"{size / 2**30:.2f} GiB of weights, {machine.num_cores()} cores, the fastest of {rounds}")
        note("memory copy", measure.memory_copy_s(size, 1, rounds))
        note("memory copy, 2 threads", measure.memory_copy_s(size, 2, rounds))
        note("bare tcp socket", measure.bare_socket_s("127.0.0.1:0", size, rounds))
        note("disk as vLLM loads it", fastest(lambda: measure.disk_as_vllm_s(directory, cold)))
        note("disk", fastest(lambda: measure.disk_ours_s(directory, cold)))
        note("tcp", measure.chain_s(size, 1, None, rounds))
        note("shared memory", measure.chain_s(size, 1, sockets, rounds))
        note("attach, no copy", measure.attach_s(size, sockets))
        if receivers > 1:
            note(f"tcp, chain of {receivers}", measure.chain_s(size, receivers, None, rounds))
            note(f"tcp, star of {receivers}", measure.chain_s(size, receivers, None, rounds, star=True))
            note(f"shared memory, chain of {receivers}", measure.chain_s(size, receivers, sockets, rounds))
        starts = asyncio.run(measure.starts(directory, cold)) if whole else {}
        if starts:
            # No instance of ours loads so: its start, with the other's load in place of its own.
            more_s = seconds["disk as vLLM loads it"] - seconds["disk"]
            ours = starts["disk"]
            starts["disk as vLLM loads it (computed)"] = replace(
                ours, ready_s=ours.ready_s + more_s, first_token_s=ours.first_token_s + more_s
            )
        for name, one in starts.items():
            say(f"start: {name:33} {one.ready_s:9.4f} s to ready, {one.first_token_s:.4f} s to the first token")
    ratio = seconds["disk as vLLM loads it"] / seconds["shared memory"]
    say(
        f"shared memory is {ratio:.1f} times as fast as the disk as vLLM loads it; a copy of memory would be "
        f"{seconds['disk as vLLM loads it'] / seconds['memory copy']:.1f}"
    )
    standby = [one.ready_s for name, one in starts.items() if name == "standby + shared memory"]
    return {
        "machine": machine.describe(),
        "size_bytes": size,
        "receivers": receivers,
        "rounds": rounds,
        "seed": seed,
        "cold": cold,
        "paths": {
            name: {
                "seconds": round(value, 5),
                "gb_per_s": round(size / value / 1e9, 3),
                "ratio_to_disk": round(seconds["disk as vLLM loads it"] / value, 2),
                "ratio_to_our_disk": round(seconds["disk"] / value, 2),
            }
            for name, value in seconds.items()
        },
        "ratio_to_disk": round(ratio, 2),
        "shared_memory_of_a_copy": round(seconds["memory copy"] / seconds["shared memory"], 3),
        "tcp_of_a_bare_socket": round(seconds["bare tcp socket"] / seconds["tcp"], 3),
        "ready_from_standby_s": round(standby[0], 4) if standby else None,
        "starts": {
            name: {
                "ready_s": round(one.ready_s, 4),
                "first_token_s": round(one.first_token_s, 4),
                "phases_s": {phase.name: round(phase.seconds, 4) for phase in one.phases},
            }
            for name, one in starts.items()
        },
    }


def parse_size(text: str) -> int:
    """``1GiB`` -> bytes. Raises HyperFlexisError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B|)", text)
    if found is None or float(found[1]) <= 0.0:
        raise HyperFlexisError(f"--size {text!r} is no size; write for example 256MiB or 1GiB")
    return int(float(found[1]) * UNITS[found[2]])


def recipe_for(size: int, seed: int) -> Recipe:
    """A model of about ``size`` bytes: the largest widths of which four layers are not too many, and as many layers as
    that takes."""
    for name in reversed(SIZES):
        recipe = Recipe(name, seed=seed, context=512, layers=1)
        one = num_bytes(recipe)
        layer = num_bytes(replace(recipe, layers=2)) - one
        if one + 3 * layer <= size:
            return replace(recipe, layers=1 + round((size - one) / layer))
    raise HyperFlexisError(f"--size of {size} bytes is too little; give at least 4MiB")
