"""A disaggregated fleet as a person runs it: prompts on one instance, decodes on the other, all over real sockets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.test_serve import Serve, alive, wait_until
from tests.parity.replay import replay

from hyperflexis.core.events import InstanceReported, PrefillEnding
from hyperflexis.runtime.journal import Entry, read_journal

FLEET = """\
model:
  name: tiny
  engine: emulated
  profile: h100-llama-3.1-8b
  args: {seed: 3}
  instances: {min: 2}
"""
APART = FLEET + "  mode: disaggregated\n  prefill: 1\n  roles: static\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, str], Serve]]:
    running: list[Serve] = []

    def begin(name: str, fleet: str) -> Serve:
        file = tmp_path / f"{name}.yaml"
        file.write_text(fleet + "listen: 127.0.0.1:0\nlimits: {shutdown_grace_s: 1}\n")
        running.append(Serve(file))
        return running[-1].wait_ready()

    yield begin
    for serve in running:
        serve.stop()
    assert not [pid for serve in running for pid in serve.pids if alive(pid)], "children were left behind"


def text_of(body: str) -> str:
    """The text of a whole stream."""
    *events, done, _ = body.split("\n\n")
    assert done == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert not [event for event in found if "error" in event], body
    return "".join(choice["text"] for event in found for choice in event["choices"])


def stream(serve: Serve, max_tokens: int, meanwhile: Callable[[str], None] = lambda prompts: None) -> str:
    """The text of an answer; ``meanwhile`` is told, after its first token, which instance computes prompts."""
    connection, response = serve.stream(max_tokens)
    meanwhile(response.headers["x-hfx-instance"])
    try:
        return text_of(response.read().decode())
    finally:
        connection.close()


def test_an_answer_is_the_same_wherever_it_is_computed(start: Callable[[str, str], Serve]) -> None:
    together = start("together", FLEET)
    expected = stream(together, 50)
    assert len(expected) == 50
    assert together.metric("handoffs_total") == 0
    assert together.stop() == 0
    apart = start("apart", APART)
    assert "disaggregated, 1 for prompts" in apart.text
    assert stream(apart, 50) == expected
    assert apart.metric("handoffs_total", outcome="handed") == 1
    assert apart.metric("handoffs_total") == apart.metric("handoff_gap_seconds_count") == 1
    status, body = apart.complete()
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == expected[:8]
    assert apart.stop() == 0
    entries = [item for item in read_journal(apart.state_dir / "journal") if isinstance(item, Entry)]
    endings = [entry.event for entry in entries if isinstance(entry.event, PrefillEnding)]
    assert len(endings) == 2
    last = {entry.event.report.id: entry.event.report for entry in entries if isinstance(entry.event, InstanceReported)}
    prompts = last.pop(endings[0].instance)
    (decodes,) = last.values()
    assert prompts.prompt_tokens > 0 == decodes.prompt_tokens
    assert decodes.output_tokens > prompts.output_tokens
    assert replay(apart.state_dir / "journal") == len(entries)


def test_streams_outlive_either_instance(start: Callable[[str, str], Serve]) -> None:
    serve = start("apart", APART)
    expected = stream(serve, 300)
    for kills_prompts in (True, False):
        handed, resumed = serve.metric("handoffs_total", outcome="handed"), serve.metric("redispatched_total")

        def kill(prompts: str, handed: float = handed, kills_prompts: bool = kills_prompts) -> None:
            wait_until(lambda: serve.metric("handoffs_total", outcome="handed") > handed, serve.report)
            children = serve.state()["children"]
            names = [name for name in children if name.startswith("tiny-") and (name == prompts) == kills_prompts]
            os.kill(children[names[0]]["pid"], signal.SIGKILL)

        assert stream(serve, 300, kill) == expected
        assert serve.metric("redispatched_total") == resumed + (not kills_prompts), (
            "only a decode is lost with its place"
        )
        wait_until(lambda: serve.metric("instances_ready") == 2, serve.report)
        serve.pids |= {child["pid"] for child in serve.state()["children"].values()}
    assert serve.metric("requests_total", outcome="finished") == 3


def test_a_new_controller_hands_over_as_the_old_one_did(start: Callable[[str, str], Serve]) -> None:
    serve = start("apart", APART)
    expected = stream(serve, 300)

    def kill(prompts: str) -> None:
        os.kill(serve.state()["children"]["controller"]["pid"], signal.SIGKILL)

    assert stream(serve, 300, kill) == expected
    handed = serve.metric("handoffs_total", outcome="handed")
    wait_until(lambda: serve.request("GET", "/ready")[0] == 200, serve.report)
    assert stream(serve, 300) == expected
    assert serve.metric("handoffs_total", outcome="handed") == handed + 1
    assert serve.metric("handoffs_total", outcome="failed") == serve.metric("redispatched_total") == 0
    serve.pids |= {child["pid"] for child in serve.state()["children"].values()}
