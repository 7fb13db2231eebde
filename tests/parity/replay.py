"""Replays a journal and compares each answer with the recorded one."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hyperflexis.controller import Controller, ControllerConfig, Snapshot
from hyperflexis.core.events import RequestArrived
from hyperflexis.runtime.journal import Entry, Header, encode_effects, read_journal


def replay(path: Path) -> int:
    """Check each entry against a controller restored from its segment's snapshot; returns how many there were."""
    controller: Controller | None = None
    entries = 0
    for item in read_journal(path):
        match item:
            case Header():
                config = msgspec.json.decode(item.config, type=ControllerConfig)
                controller = Controller.restore(config, msgspec.msgpack.decode(item.snapshot, type=Snapshot))
            case Entry():
                assert controller is not None
                effects = controller.handle(item.event, item.now)
                assert encode_effects(effects) == item.effects, f"entry {entries}: {item.event}"
                if isinstance(item.event, RequestArrived):
                    assert msgspec.json.encode(controller.shadow) == item.shadow
                entries += 1
    return entries
