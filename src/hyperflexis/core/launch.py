"""An instance that is not ready yet: by what means it is started, and how far it is.

    means     what happens                                                           ready after
    standby   a shell that waits is given the weights                                weights from another instance
    d2d       a new process gets the weights from an instance that is ready          process, engine, weights, warm-up
    disk      a new process has the weights from no instance: from the copy that     the same, with slower weights
              the host's memory keeps, where it does (loading.py), else from disk

A *shell* is an instance without weights: its process runs, its engine is initialised and warm. It stays STANDBY until
it is woken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .instance import InstanceInfo, InstanceState, check_instance_move

Means = Literal["standby", "d2d", "disk"]
Phase = Literal["process", "engine_init", "kv_pool", "weights", "warm_up"]
"""``kv_pool``: of a shell whose KV cache is not reserved while it waits."""

PATIENCE, PATIENCE_S = 3.0, 30.0
"""A start is given up after so many times what it usually takes, and so many seconds more."""


@dataclass(slots=True, eq=False)
class Launching:
    """An instance between its launch at ``since`` and READY, or a shell. ``expected_s`` is what such a start takes;
    ``prefill_share`` its role (None: the fleet has none). ``adopted``: an earlier controller launched it, so how long
    ago that was is not known. ``phases``: the seconds of those that are over. ``info``: what it is, once it has all but
    its weights. A shell is not woken before ``wakes_at``."""

    id: str
    model: str
    means: Means
    shell: bool
    since: float
    expected_s: float
    prefill_share: float | None = None
    state: InstanceState = InstanceState.LAUNCHING
    adopted: bool = False
    phases: dict[Phase, float] = field(default_factory=dict)
    info: InstanceInfo | None = None
    wakes_at: float = 0.0

    def reach(self, state: InstanceState) -> None:
        """It has got as far as ``state``, LAUNCHING to LOADING; what lies between is passed through."""
        order = (InstanceState.LAUNCHING, InstanceState.STANDBY, InstanceState.LOADING)
        for one in order[order.index(self.state) + 1 : order.index(state) + 1]:
            check_instance_move(self.state, one)
            self.state = one

    def wait_again(self, wakes_at: float) -> None:
        """It could not load, and is a shell, until ``wakes_at`` at least."""
        check_instance_move(self.state, InstanceState.STANDBY)
        self.state, self.shell, self.wakes_at = InstanceState.STANDBY, True, wakes_at

    def is_overdue(self, now: float) -> bool:
        """Whether it should have come up long ago; a shell that is there waits as long as it is wanted to."""
        waits = self.shell and self.state is InstanceState.STANDBY
        return not waits and now - self.since > PATIENCE * self.expected_s + PATIENCE_S
