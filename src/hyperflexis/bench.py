"""`hyperflexis bench`: open-loop load against any OpenAI-compatible server, and what became of each request.

Requests leave at the workload's times whatever the server does, and times count from when a request *should* have
left, so that neither a slow server nor a slow client can hide its queue. All times are the client's: they contain the
way to the gateway and back, so attainment here is never better than at the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .bench_client import MAX_OPEN, Client, Target, find_target, missed
from .core.record import Record, Run
from .errors import ConfigError, HyperFlexisError
from .sim.workload import Arrival, Workload, generate, scaled
from .sim.workload_file import parse_workload
from .telemetry import machine, report
from .telemetry.summary import Summary, quantile, summarise

T = TypeVar("T")

UNFINISHED_AFTER = 10.0  # times the duration: a request still open then is a miss
PROGRESS_S = 0.5
PLAIN_PROGRESS_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    elapsed_s: float
    duration_s: float
    total: int
    sent: int
    finished: int
    attained: int
    rejected: int
    failed: int

    def line(self) -> str:
        """One line for a person."""
        done = self.finished + self.rejected + self.failed
        on_time = f"{100.0 * self.attained / done:.0f}%" if done else "-"
        where = "draining" if self.elapsed_s > self.duration_s else f"of {self.duration_s:.0f} s"
        return (
            f"{self.elapsed_s:5.1f} s {where} · sent {self.sent}/{self.total} · open {self.sent - done} · "
            f"finished {self.finished} ({on_time} on time) · rejected {self.rejected} · failed {self.failed}"
        )


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What a run gave. ``client_lag_p99_s`` is how late requests left; ``stopped`` is True when a person ended it."""

    run: Run
    client_lag_p99_s: float
    stopped: bool


ShowProgress = Callable[[Progress], None]


async def run_bench(
    arrivals: Sequence[Arrival],
    duration_s: float,
    target: Target,
    seed: int,
    show: ShowProgress,
    stop: asyncio.Event | None = None,
) -> BenchResult:
    """Send ``arrivals`` at their times and wait for their ends, ten times ``duration_s`` at most.

    ``seed`` makes the prompts. ``stop``, once set, ends the run at once: what is open then counts as cancelled.
    """
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    records: list[Record] = []
    lags: list[float] = []
    open_tasks: dict[asyncio.Task[Record], Arrival] = {}
    idle = asyncio.Event()

    def ended(task: asyncio.Task[Record]) -> None:
        del open_tasks[task]
        if not open_tasks:
            idle.set()
        if not task.cancelled():
            records.append(task.result())

    async with Client(target, seed) as client:
        started_at = time.monotonic() + 0.05
        reporter = asyncio.create_task(_report(records, lags, duration_s, len(arrivals), started_at, show))
        stopping = asyncio.create_task(stop.wait())
        try:
            for index, arrival in enumerate(arrivals):
                delay = started_at + arrival.t - time.monotonic()
                if delay > 0.0:
                    await asyncio.wait((stopping,), timeout=delay)
                if stop.is_set():
                    break
                lags.append(max(time.monotonic() - started_at - arrival.t, 0.0))
                if len(open_tasks) >= MAX_OPEN:
                    records.append(missed(arrival, "failed", f"the client has {MAX_OPEN} requests open; use several"))
                    continue
                task = loop.create_task(client.send(arrival, index, started_at))
                open_tasks[task] = arrival
                task.add_done_callback(ended)
            if open_tasks:
                idle.clear()
                drained = asyncio.create_task(idle.wait())
                limit_s = started_at + UNFINISHED_AFTER * duration_s - time.monotonic()
                await asyncio.wait((drained, stopping), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                drained.cancel()
            left = dict(open_tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            for task, arrival in left.items():
                if task.cancelled() and stop.is_set():
                    records.append(missed(arrival, "cancelled", "stopped by the user"))
                elif task.cancelled():
                    records.append(missed(arrival, "unfinished", "the run's time limit"))
        finally:
            helpers = (reporter, stopping, *open_tasks)
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        ended_s = time.monotonic() - started_at
    records.sort(key=lambda record: record.arrived_at)
    run = Run(tuple(records), duration_s if not stop.is_set() else min(duration_s, ended_s), ended_s)
    return BenchResult(run, quantile(lags, 0.99) if lags else 0.0, stop.is_set())


async def _report(
    records: Sequence[Record],
    lags: Sequence[float],
    duration_s: float,
    total: int,
    started_at: float,
    show: ShowProgress,
) -> None:
    counts = {"finished": 0, "rejected": 0, "failed": 0}
    attained = seen = 0
    while True:
        await asyncio.sleep(PROGRESS_S)
        for record in records[seen:]:
            counts[record.outcome] = counts.get(record.outcome, 0) + 1
            attained += record.is_attained
        seen = len(records)
        elapsed = time.monotonic() - started_at
        show(
            Progress(
                elapsed,
                duration_s,
                total,
                len(lags),
                counts["finished"],
                attained,
                counts["rejected"],
                counts["failed"],
            )
        )


class ProgressView:
    """Progress on ``console``: a line that renews itself on a terminal, else a line every five seconds."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live = Live(Text(title), console=console, transient=True) if console.is_terminal else None
        self._printed_at = time.monotonic()

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Called twice a second."""
        text = f"{self._title}: {progress.line()}"
        if self._live is not None:
            self._live.update(Text(text))
        elif time.monotonic() - self._printed_at >= PLAIN_PROGRESS_S:
            self._printed_at = time.monotonic()
            self._console.print(text, soft_wrap=True, highlight=False)


def run_async(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` on an event loop (uvloop's where it is installed); the first Ctrl-C sets the event it is given,
    the second interrupts."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None

    async def with_stop() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            stop.set()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            return await main(stop)
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(with_stop())


def load_workload(path: Path, csv_files: Mapping[str, Path] | None = None) -> Workload:
    """The workload in the file ``path``; its csv files are relative to it, or taken from ``csv_files`` by name.

    Raises ConfigError naming file, line, field and remedy.
    """
    replaced = csv_files or {}
    used: set[str] = set()

    def read(name: str) -> str:
        used.add(name)
        return (replaced.get(name) or path.parent / name).read_text()

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the workload {path}: {getattr(error, 'strerror', None) or error}") from None
    workload = parse_workload(text, str(path), read)
    for name in replaced.keys() - used:
        raise ConfigError(f"{path} names no csv file {name!r}; it names {', '.join(sorted(used)) or 'none'}")
    return workload


def parse_csv_options(options: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` texts of ``--csv``. Raises ConfigError for any other form."""
    found: dict[str, Path] = {}
    for option in options:
        name, equals, file = option.partition("=")
        if not equals or not name or not file:
            raise ConfigError(f"--csv {option!r} is not NAME=FILE, NAME being a csv file as the workload names it")
        found[name] = Path(file)
    return found


def table(summaries: Mapping[str, Summary], title: str) -> Table:
    """Attainment and latencies by class, one block a policy; fits 80 columns."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("policy", "class"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("sent", "on time", "TTFT ms\np50/p99", "TPOT ms\np50/p99", "e2e s\np50/p99", "rejected\n+lost"):
        shown.add_column(heading, justify="right", no_wrap=True)

    def pair(low: float | None, high: float | None, digits: int) -> str:
        return "-" if low is None or high is None else f"{low:.{digits}f}/{high:.{digits}f}"

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100.0 * value:.1f}%"

    for label, s in summaries.items():
        for index, (name, c) in enumerate(s.classes.items()):
            shown.add_row(
                label if index == 0 else "",
                name or "-",
                str(c.requests),
                percent(c.attainment),
                pair(c.p50_ttft_ms, c.p99_ttft_ms, 0),
                pair(c.p50_tpot_ms, c.p99_tpot_ms, 1),
                pair(c.p50_e2e_s, c.p99_e2e_s, 1),
                f"{c.rejected}+{c.failed + c.unfinished}",
            )
        shown.add_row(
            "",
            "all",
            str(s.requests),
            percent(s.attainment),
            pair(s.p50_ttft_ms, s.p99_ttft_ms, 0),
            pair(s.p50_tpot_ms, s.p99_tpot_ms, 1),
            "-" if s.mean_e2e_s is None else f"mean {s.mean_e2e_s:.1f}",
            f"{s.rejected}+{s.failed + s.unfinished}",
            style="bold",
            end_section=True,
        )
    return shown


def document(
    workload: str, profile: str | None, seeds: Sequence[int], summaries: Mapping[str, Summary]
) -> dict[str, object]:
    """The JSON of a live run. Times are the client's, which the ``client_*`` keys say again by name."""
    policies: dict[str, object] = {}
    for label, summary in summaries.items():
        policies[label] = asdict(summary) | {
            "measured_at": "client",
            "client_attainment": summary.attainment,
            "client_p50_ttft_ms": summary.p50_ttft_ms,
            "client_p99_ttft_ms": summary.p99_ttft_ms,
        }
    return {
        "workload": workload,
        "profile": profile,
        "seeds": list(seeds),
        "policies": policies,
        "machine": machine.describe(),
    }


def write_json(value: object, file: str) -> None:
    """Write indented JSON to ``file``, or to standard output for "-"."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text)
    except OSError as error:
        raise HyperFlexisError(f"cannot write {file}: {error.strerror}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hyperflexis bench`."""
    parser.add_argument("workload", type=Path, metavar="WORKLOAD", help="workload file (YAML)")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server's address (default: %(default)s)")
    parser.add_argument("--label", default="bench", help="name of these results (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of arrivals, lengths and prompts (default: the workload's)")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds of arrivals (default: the workload's)")
    parser.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="multiply every arrival rate by X")
    parser.add_argument("--model", help="model name (default: the only one that the server has)")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="[TENANT=]KEY",
        help="API key, of everybody or of one tenant of the workload; may be repeated",
    )
    parser.add_argument(
        "--csv", action="append", default=[], metavar="NAME=FILE", help="read FILE where the workload names NAME"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON ('-': standard output)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write plots and an HTML report to DIR")


def main(args: argparse.Namespace) -> int:
    """Run `hyperflexis bench`; 130 when it was stopped by Ctrl-C, after reporting what there was."""
    workload = load_workload(args.workload, parse_csv_options(args.csv))
    seed = workload.seed if args.seed is None else args.seed
    if args.duration is not None:
        if not args.duration > 0.0:
            raise ConfigError(f"--duration {args.duration:g} must be above 0 seconds")
        workload = replace(workload, duration_s=args.duration)
    workload = scaled(workload, args.rate_scale)
    arrivals = generate(workload, seed)
    if not arrivals:
        raise ConfigError(
            f"{args.workload} has no arrival within {workload.duration_s:g} s; raise the rate or the duration"
        )
    keys: dict[str, str] = {}
    for text in args.api_key:
        tenant, equals, key = text.partition("=")
        keys[tenant if equals else ""] = key if equals else tenant
    console = Console(stderr=True)

    async def go(stop: asyncio.Event) -> BenchResult:
        names = [c.name for c in workload.classes]
        console.print(f"asking {args.url} ...", markup=False, highlight=False, soft_wrap=True)
        target = await find_target(args.url, args.model, keys, names)
        if not target.token_ids:
            console.print("The server takes no token ids: prompts are words, their token counts approximate.")
        if unknown := [name for name in names if name not in target.classes]:
            console.print(
                f"The server does not know class {', '.join(unknown)}: "
                "their SLOs are sent per request, their priorities are not.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        with ProgressView(console, args.label) as view:
            return await run_bench(arrivals, workload.duration_s, target, seed, view.show, stop)

    result = run_async(go)
    summary = summarise([result.run])
    out = Console(stderr=args.json == "-")
    out.print(
        table(
            {args.label: summary}, f"{workload.name}, seed {seed}, {result.run.duration_s:.0f} s, times at the client"
        )
    )
    losses = Counter(record.detail for record in result.run.records if record.outcome in ("rejected", "failed"))
    for detail, count in losses.most_common(3):
        out.print(f"{count} x {detail}", markup=False, highlight=False)
    if result.client_lag_p99_s > 0.02:
        out.print(
            f"The client itself was late: 1% of requests left over {1000 * result.client_lag_p99_s:.0f} ms after their "
            "time. Give it a core of its own or lower the rate."
        )
    if args.json:
        whole = document(workload.name, None, [seed], {args.label: summary})
        write_json(
            whole | {"client_lag_p99_ms": 1000.0 * result.client_lag_p99_s, "stopped": result.stopped}, args.json
        )
    if args.report:
        facts = {"workload": workload.name, "seed": str(seed), "server": args.url} | machine.describe()
        out.print(f"Report: {report.write(args.report, f'bench: {workload.name}', facts, {args.label: [result.run]})}")
    return 130 if result.stopped else 0
