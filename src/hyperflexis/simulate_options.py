"""Options that several simulating commands share: loads, seeds, how instances start, numbers with bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .core.launch import Means
from .core.launch import Phase as StartPhase
from .core.profile import Profile
from .errors import ConfigError, HyperFlexisError
from .sim.launches import Starts, starts_in, starts_of

MAX_LOADS = 200


def parse_loads(text: str) -> tuple[float, ...]:
    """``0.5:1.6:0.1`` (both ends, then the step) or ``0.7,1.0``, or both in one list; in order, each once.

    Raises ConfigError saying what is wrong.
    """
    found: set[float] = set()
    for part in text.split(","):
        try:
            numbers = [float(piece) for piece in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3):
            raise ConfigError(f"--loads {text!r}: {part!r} is neither a number nor FROM:TO:STEP, as in 0.5:1.6:0.1")
        first, last, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], 1.0)
        if not (isfinite(last) and 0.0 < first <= last and 0.0 < step < float("inf")):
            raise ConfigError(f"--loads {text!r}: in {part!r}, loads and step must be above 0 and FROM not above TO")
        count = int((last - first) / step * (1.0 + 1e-12) + 1e-9) + 1
        if count + len(found) > MAX_LOADS:
            raise ConfigError(f"--loads {text!r}: more than {MAX_LOADS} loads; take larger steps")
        found |= {round(first + i * step, 9) for i in range(count)}
    return tuple(sorted(found))


def parse_seeds(text: str) -> tuple[int, ...]:
    """``1,2,3``. Raises ConfigError for anything else."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers, as in 1,2,3")
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r}: a seed is given twice, which would count its run twice; give it once")
    return seeds


def parse_start(text: str, profile: Profile) -> Starts:
    """``disk``, ``d2d`` or ``standby`` as ``profile`` says that they take, the file of all three that a transfer bench
    wrote, or seconds. Raises ConfigError."""
    if text.endswith(".json"):
        return _measured(Path(text))
    if text in ("disk", "d2d", "standby"):
        if profile.start is None:
            raise ConfigError(
                f"--start {text}: profile {profile.name} says of no start how long it takes; give seconds"
            )
        return starts_of(profile.start, profile.weight_bytes, cast(Means, text))
    try:
        return starts_in(number("--start", float(text), above=0.0))
    except ValueError:
        raise ConfigError(
            f"--start {text!r} is neither disk, d2d, standby, a JSON file of transfer bench nor a number of seconds"
        ) from None


def _measured(path: Path) -> Starts:
    """What starts took: a process from disk or with weights over TCP, and shells that got theirs so."""
    try:
        found = json.loads(path.read_bytes())
        disk_s = float(found["paths"]["disk"]["seconds"])
        process_s = float(found["starts"]["disk"]["ready_s"]) - disk_s
        woken_s = float(found["starts"]["standby + tcp"]["ready_s"])
        over_tcp_s = float(found["starts"]["tcp"]["ready_s"])
    except OSError as error:
        raise ConfigError(f"--start {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--start {path} is not what hyperflexis transfer bench --json writes (without --weights-only): {error!r}"
        ) from error
    started: tuple[StartPhase, float] = ("process", process_s)
    woken: tuple[StartPhase, float] = ("weights", woken_s)
    empty: tuple[StartPhase, float] = ("process", max(over_tcp_s - woken_s, 0.0))
    return {"disk": (started, ("weights", disk_s)), "d2d": (empty, woken), "standby": (woken,)}


def at_least(option: str, value: int, least: int) -> int:
    """``value``. Raises ConfigError naming the option when it is below ``least``."""
    if value < least:
        raise ConfigError(f"{option} {value} must be at least {least}")
    return value


def number(option: str, value: float, above: float | None = None) -> float:
    """``value``. Raises ConfigError naming the option unless it is finite and at least 0, or above ``above``."""
    if not isfinite(value) or value < 0.0 or (above is not None and value <= above):
        raise ConfigError(f"{option} {value:g} must be {'at least 0' if above is None else f'above {above:g}'}")
    return value


def try_to_write(path: Path) -> None:
    """Raises HyperFlexisError when ``path`` cannot be written: better known before the runs than after."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise HyperFlexisError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere; gives what is called after each of ``total`` runs."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
