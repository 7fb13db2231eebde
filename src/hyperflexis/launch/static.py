"""Servers that already run elsewhere: nothing is started but, for each URL, the small process that speaks for it."""

from __future__ import annotations

from collections.abc import Sequence

from .local import instance_command


def endpoint_command(
    id: str,
    epoch: int,
    name: str,
    engine: str,
    url: str,
    listen: str,
    controller: str,
    step: str,
    options: Sequence[str],
) -> list[str]:
    """Stand an instance of ``engine`` in front of the server at ``url`` (its base, without ``/v1``)."""
    return instance_command(id, epoch, name, engine, listen, controller, step, ["--url", url, *options])
