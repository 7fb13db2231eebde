"""How far the runs are: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as rich

LINE_S = 60.0


def minutes(seconds: float) -> str:
    """``3.2 h`` or ``5 min``."""
    return f"{seconds / 3600.0:.1f} h" if seconds > 5400.0 else f"{max(round(seconds / 60.0), 1)} min"


class Progress:
    """Of ``runs`` runs that take about ``expected_s`` seconds together."""

    def __init__(self, runs: int, expected_s: float) -> None:
        self._runs, self._expected_s = runs, max(expected_s, 1e-9)
        self._done, self._done_s = 0, 0.0
        self._began = self._said = time.monotonic()
        # Without a thread of its own: workers are forked while it is shown, and a fork copies locks as they are.
        self._bar = rich.Progress(*rich.Progress.get_default_columns(), transient=True, auto_refresh=False)
        self._task = self._bar.add_task(f"{runs} runs", total=self._expected_s)

    def __enter__(self) -> Progress:
        if self._runs and self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advance(self, expected_s: float) -> None:
        """A run is over that had been expected to take so long."""
        self._done += 1
        self._done_s += expected_s
        self._bar.update(self._task, advance=expected_s, refresh=True)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._said >= LINE_S:
            self._said = now
            left_s = (now - self._began) * (self._expected_s / self._done_s - 1.0)
            print(f"{self._done} of {self._runs} runs, {minutes(left_s)} left", flush=True)
