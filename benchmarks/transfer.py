"""How fast new instances have their weights: each way by size, chains over limited links, and what a kill costs.

    python benchmarks/transfer.py                     100 MiB, 1 GiB and 4 GiB; chains of up to 8 over 400 Mbit/s
    python benchmarks/transfer.py --sizes 64MiB --chain-size 32MiB --rounds 1       quickly, to see that it works
    python benchmarks/transfer.py --sizes 4GiB --receivers ''                       a part; the others' figures stay

*Ways* are those of `hyperflexis transfer bench`, in one run each. *Chains*: hosts are network namespaces on a bridge,
each with a link limited both ways (`tc tbf`); the time until the last receiver has everything and has found it right,
for a chain and for a star. *Killed*: the receiver in the middle of the chain dies half way; the others go on behind
the one before it. *Disk*: also one that reads no faster than a cloud volume, by the kernel's throttle (blkio, cgroup
v1).
*Over*: TCP, and in the same run what is asked for with --over, in processes that begin with it: `torch` (Gloo), `nixl`,
which without RDMA needs UCX_TLS=tcp or the like.
*Large pages*: shared memory once more where the kernel gives it pages of 2 MiB to who asks (the setting is put back).
Parts that need root or a kernel's feature which is not there say so and are skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from common import RESULTS, command, environment, write_results
from hyperflexis import transfer_measure as measure
from hyperflexis.make_model import make_model, num_bytes
from hyperflexis.policy.multicast import Node, chunk_for, plan
from hyperflexis.transfer.fetch import FetchConfig
from hyperflexis.transfer.paths import Over
from hyperflexis.transfer_bench import bench, parse_size, recipe_for

CLOUD_BYTES_PER_S = 1.0e9
"""What a gp3 volume of Amazon EBS gives at most, in round numbers: 1,000 MiB/s
(docs.aws.amazon.com/prescriptive-guidance/latest/sql-server-ec2-ha-dr/ebs-storage-types.html)."""
WANTED_CHAIN, WANTED_KILLED = 1.25, 1.5
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
CGROUP = Path("/sys/fs/cgroup/blkio")
SUBNET = "10.99.0"


class Skipped(Exception):
    """The machine does not allow it; the message says what."""


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


@contextmanager
def hosts(count: int, bits_per_s: int) -> Iterator[list[measure.Place]]:
    """Network namespaces on one bridge, each behind a link of that rate, each way."""
    tag = f"hfx{os.getpid() % 10_000}"
    rate = ("tbf", "rate", f"{bits_per_s}bit", "burst", "256kb", "latency", "50ms")
    try:
        run("ip", "link", "add", f"{tag}b", "type", "bridge")
        run("ip", "link", "set", f"{tag}b", "up")
        places = []
        for i in range(count):
            name, near = f"{tag}n{i}", f"{tag}v{i}"
            inside = ("ip", "netns", "exec", name)
            run("ip", "netns", "add", name)
            run("ip", "link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", near, "master", f"{tag}b", "up")
            run(*inside, "ip", "addr", "add", f"{SUBNET}.{i + 1}/24", "dev", "eth0")
            run(*inside, "ip", "link", "set", "eth0", "up")
            run("tc", "qdisc", "add", "dev", near, "root", *rate)
            run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", *rate)
            places.append(measure.Place(f"{SUBNET}.{i + 1}:7000", name))
        yield places
    finally:
        for i in range(count):
            with suppress(Skipped):
                run("ip", "netns", "del", f"{tag}n{i}")
        with suppress(Skipped):
            run("ip", "link", "del", f"{tag}b")


def received(size: int, places: Sequence[measure.Place], **how: Any) -> dict[str, Any]:
    """Seconds of the slowest receiver, and whether all are right."""
    chunk = chunk_for(size, len(places) - 1)
    chain = measure.Chain(measure.layout_of(size), places, FetchConfig(measure.TOKEN, chunk_bytes=chunk), None)
    try:
        found = chain.run(**how)
    finally:
        chain.close()
    return {
        "seconds": round(max(one.seconds for one in found.values()), 3),
        "first_s": round(min(one.seconds for one in found.values()), 3),
        "right": all(one.is_right for one in found.values()),
        "attempts": {number: len(one.attempts) for number, one in sorted(found.items())},
    }


def chains(size: int, receivers: Sequence[int], bits_per_s: int) -> dict[str, Any]:
    """Chains, stars, and a chain whose middle dies."""
    rate = bits_per_s / 8
    found: dict[str, Any] = {"size_bytes": size, "link_bytes_per_s": rate}
    with hosts(max(receivers) + 1, bits_per_s) as places:
        for count in receivers:
            some = places[: count + 1]
            one: dict[str, Any] = {"chain": received(size, some), "star": received(size, some, star=True)}
            # All of the link here, no half of it: the source serves nobody.
            nodes = [Node(f"r{i}", rate) for i in range(count)]
            one["predicted_s"] = round(plan(size, [Node("s", 2 * rate)], nodes, {}).done_s, 3)
            if count >= 3:
                half_s = one["chain"]["seconds"] / 2
                one["killed"] = received(size, some, kill=(count + 1) // 2, kill_after_s=half_s)
                one["killed_ratio"] = round(one["killed"]["seconds"] / one["chain"]["seconds"], 3)
            found[str(count)] = one
            print(f"{count} receivers: " + ", ".join(f"{name} {value}" for name, value in one.items()))
    first = found[str(receivers[0])]["chain"]["seconds"]
    found["ratio_of_the_longest"] = round(found[str(receivers[-1])]["chain"]["seconds"] / first, 3)
    print(f"chain of {receivers[-1]}: {found['ratio_of_the_longest']} times that of {receivers[0]}")
    return found


def _limited(directory: Path, group: Path, ready: Any) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    vllm_s, ours_s = measure.disk_as_vllm_s(directory, True), measure.disk_ours_s(directory, True)
    ready.put((vllm_s, ours_s))


def limited_disk(size: int, seed: int) -> dict[str, float]:
    """Both disk paths where the disk gives CLOUD_BYTES_PER_S at most."""
    group = CGROUP / f"hfx{os.getpid()}"
    recipe = recipe_for(size, seed)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        try:
            group.mkdir()
            device = os.stat(folder).st_dev
            limit = f"{os.major(device)}:{os.minor(device)} {int(CLOUD_BYTES_PER_S)}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)
        except OSError as error:
            with suppress(OSError):
                group.rmdir()
            raise Skipped(f"no limit on the disk's rate: {error}") from error
        make_model(directory, recipe)
        context = multiprocessing.get_context("spawn")
        ready = context.Queue()
        process = context.Process(target=_limited, args=(directory, group, ready))
        process.start()
        vllm_s, ours_s = ready.get(timeout=measure.LIMIT_S)
        process.join()
        group.rmdir()
    size = num_bytes(recipe)
    found = {
        "limit_bytes_per_s": CLOUD_BYTES_PER_S,
        "bound_s": round(size / CLOUD_BYTES_PER_S, 4),
        "as_vllm_s": round(vllm_s, 4),
        "ours_s": round(ours_s, 4),
    }
    print(f"limited disk: {found}")
    return found


def large_pages(size: int, rounds: int) -> dict[str, float]:
    """Shared memory beside a plain copy where the kernel's shmem_enabled is at ``advise``."""
    try:
        before = LARGE_PAGES.read_text().partition("[")[2].partition("]")[0]
        LARGE_PAGES.write_text("advise")
    except OSError as error:
        raise Skipped(f"no large pages for shared memory: {error}") from error
    try:
        with tempfile.TemporaryDirectory(prefix="hfx-") as folder:
            copy_s = measure.memory_copy_s(size, 1, rounds)
            shared_s = measure.chain_s(size, 1, Path(folder), rounds)
    finally:
        LARGE_PAGES.write_text(before)
    found = {
        "shmem_enabled_before": before,
        "memory_copy_s": round(copy_s, 5),
        "shared_memory_s": round(shared_s, 5),
        "shared_memory_of_a_copy": round(copy_s / shared_s, 3),
    }
    print(f"large pages: {found}")
    return found


def over_others(size: int, rounds: int, ways: Sequence[Over]) -> dict[str, float]:
    """TCP and these, from one process to another; the fastest of ``rounds``."""
    found = {"size_bytes": size, "tcp_s": round(measure.chain_s(size, 1, None, rounds), 4)}
    for way in ways:
        found[f"{way}_s"] = round(measure.chain_s(size, 1, None, rounds, over=way), 4)
        found[f"{way}_of_tcp"] = round(found["tcp_s"] / found[f"{way}_s"], 3)
    print(f"over others: {found}")
    return found


def part(found: dict[str, Any], name: str, work: Any) -> None:
    try:
        found[name] = work()
    except Skipped as reason:
        found[name] = {"skipped": str(reason)}
        print(f"{name}: skipped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100MiB,1GiB,4GiB")
    parser.add_argument("--chain-size", default="256MiB")
    parser.add_argument("--receivers", default="1,2,4,8")
    parser.add_argument("--link-mbit", type=int, default=400, help="that eight hops fit on two cores")
    parser.add_argument("--over", default="", help="ways to be measured beside TCP, as torch,nixl")
    parser.add_argument("--over-size", default="256MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "transfer.json")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    run_of = {**environment(args.seed), "command": command(), "rounds": args.rounds}
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"sizes": {}}
    for text in filter(None, args.sizes.split(",")):
        size = parse_size(text)
        one = bench(size, 1, args.rounds, cold=True, whole=True, scratch=None, seed=args.seed, say=print)
        part(one, "limited_disk", lambda size=size: limited_disk(size, args.seed))
        if (limited := one["limited_disk"]) and "as_vllm_s" in limited:
            for path in one["paths"].values():
                path["ratio_to_limited_disk"] = round(limited["as_vllm_s"] / path["seconds"], 2)
        part(one, "large_pages", lambda size=size: large_pages(size, args.rounds))
        found["sizes"][text] = {**one, "run": run_of}
        write_results(args.json, found)
    ways = [cast(Over, one) for one in filter(None, args.over.split(","))]
    if ways:
        key = f"over {args.over_size} {os.environ.get('UCX_TLS', '')}".strip()
        part(found, key, lambda: over_others(parse_size(args.over_size), args.rounds, ways))
        found[key]["run"] = run_of
    receivers = sorted(int(one) for one in filter(None, args.receivers.split(",")))
    if receivers:
        size = parse_size(args.chain_size)
        part(found, "chains", lambda: chains(size, receivers, args.link_mbit * 1_000_000))
        found["chains"]["run"] = run_of
    write_results(args.json, found)


if __name__ == "__main__":
    sys.exit(main())
