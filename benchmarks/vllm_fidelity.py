"""The simulator beside real vLLM servers: the same requests, the same policy, the times of both.

    make bench-vllm                                       # all benchmarks on vLLM
    .venv-vllm/bin/python benchmarks/vllm_fidelity.py     # this one; `make test-vllm` makes .venv-vllm

As benchmarks/fidelity.py, which says what is compared, with vLLM servers of one thread each that have our scheduler
inside, behind `hyperflexis serve`. Simulated are three devices: that of the profile which `hyperflexis calibrate
--engine vllm` makes of these servers, of all at once as they will run, and what the adapters' online fits say, *fitted*
after warm-ups and *afterwards* at the end. Schedulers and adapters begin with that profile, as they do where a fleet
file names one. The load is a share of what the servers carry, which is measured.

Where there are more cores than servers, each engine has a core of its own, as an engine on an accelerator has that, and
everything else the others. Two servers on two cores take the cores from each other, from the gateway and from the
client, and a simulated device knows nothing beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.vllm.servers import ENV, EXACT, Server

from common import RESULTS, command, environment, write_results
from fidelity import Case, compare, mean_of, own_processes, show
from hyperflexis.core.profile import Profile
from hyperflexis.engines.profiles import load_profile, save_profile
from hyperflexis.engines.vllm.server import Recipe
from hyperflexis.launch.local import own_command
from hyperflexis.make_model import Recipe as ModelRecipe
from hyperflexis.make_model import make_model

MAX_BATCH, MAX_BATCH_TOKENS, CONTEXT = 32, 512, 1024
TARGET = 0.15
WARM_UP_S = 12.0
SATURATION_S = 20.0
ENGINE = "VLLM::EngineCore"[:15]
"""What the process that computes is called, as far as Linux keeps names."""


class Servers:
    """The servers of one run, and what a fleet file says of them."""

    def __init__(self, folder: Path, size: str, number: int, python: str) -> None:
        self._folder = folder
        self._profile: Path | None = None
        self._model = folder / size
        make_model(self._model, ModelRecipe(size, context=CONTEXT))
        self._recipe = Recipe(
            "m",
            self._model,
            scheduler=True,
            python=python,
            max_batch=MAX_BATCH,
            max_batch_tokens=MAX_BATCH_TOKENS,
            arguments=(*EXACT, "--max-model-len", str(CONTEXT)),
            env=ENV,
        )
        self._start(number)

    def _start(self, number: int) -> None:
        self._servers = [Server(self._recipe, self._folder / f"vllm-{n}.log") for n in range(number)]
        self._urls = [server.wait_ready().url for server in self._servers]
        cores = sorted(os.sched_getaffinity(0))
        if number < len(cores):
            own, others = cores[:number], cores[number:]
            processes = own_processes()
            for process in processes:
                pin(process.pid, others)
            engines = [process.pid for process in processes if process.name == ENGINE]
            for engine, core in zip(engines, own, strict=True):
                pin(engine, [core])

    def entry(self, _: Path) -> dict[str, object]:
        args = {"max_batch": MAX_BATCH, "max_batch_tokens": MAX_BATCH_TOKENS}
        entry = {"name": "m", "engine": "vllm", "path": str(self._model), "profile": str(self._profile)}
        return {**entry, "endpoints": self._urls, "args": args}

    def profile(self, _: Path) -> Profile:
        """Of all at once: they share memory and cache. Then they are started anew, and begin with it."""
        files = [self._folder / f"vllm-{n}.json" for n in range(len(self._urls))]
        processes = []
        for url, file in zip(self._urls, files, strict=True):
            words = own_command("calibrate", "--engine", "vllm", "--url", url, "--model", str(self._model))
            words = [*words, "--device-kind", "cpu", "--rounds", "2", "--out", str(file)]
            words += ["--max-batch", str(MAX_BATCH), "--max-batch-tokens", str(MAX_BATCH_TOKENS)]
            processes.append(subprocess.Popen(words))
        for process in processes:
            if process.wait() != 0:
                raise SystemExit("calibrate failed")
        profiles = [load_profile(str(file)) for file in files]
        mean = replace(profiles[0], coefficients=mean_of([profile.coefficients for profile in profiles]))
        self._profile = self._folder / "profile.json"
        save_profile(mean, self._profile)
        number = len(self._servers)
        self.stop()
        self._recipe = replace(self._recipe, profile=str(self._profile))
        self._start(number)
        return mean

    def stop(self) -> None:
        for server in self._servers:
            server.stop()


def pin(pid: int, cores: list[int]) -> None:
    """All threads of a process run on these cores from now on, and those that it starts."""
    with contextlib.suppress(OSError):  # what has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--size", default="20m", help="of the model (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument(
        "--load", type=float, default=0.7, help="arrival rate over what is carried (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="that has vLLM, if this one has not")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_fidelity.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-fidelity-") as temporary:
        servers = Servers(Path(temporary), args.size, args.servers, args.python)
        try:
            case = Case(
                "fidelity-torch.yaml", servers.profile, servers.entry, TARGET, WARM_UP_S, SATURATION_S, args.servers
            )
            found = compare(case, Path(temporary), args)
        finally:
            servers.stop()
    show("vllm", found)
    write_results(args.out, {**environment(args.seed), "command": command(), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
