"""`hyperflexis explain`: what became of a request, an instance or a model, and why, from the journal.

Each line is something that the controller heard or decided; decisions have their reasons. Times are seconds after the
first line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .bench import write_json
from .core import effects as do
from .core import events as on
from .core import weights
from .core.effects import Effect
from .core.events import Event
from .core.slo import Slo
from .errors import ConfigError
from .operate import state_dir_of
from .runtime.journal import Header, decode_effects, read_journal

_COMPLETION_PREFIXES = ("chatcmpl-", "cmpl-")
"""Of the ids that clients see before the request's own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("what", metavar="ID", help="a completion's id, as its client got it, an instance (tiny-0) or a model")
    add("--fleet", type=Path, metavar="FLEET.yaml", help="the fleet file (default: the one fleet that ran from here)")
    add("--journal", type=Path, metavar="FILE|DIR", help="read this journal, as of `simulate --journal`, instead")
    add("--json", metavar="FILE", help="write the lines as JSON ('-': standard output)")


def main(args: argparse.Namespace) -> int:
    """Run `hyperflexis explain`. Raises ConfigError when the journal knows nothing of it."""
    path: Path = args.journal or state_dir_of(args.fleet) / "journal"
    if not path.exists():
        raise ConfigError(f"there is no journal {path}")
    story = Story(args.what)
    for item in read_journal(path):
        if isinstance(item, Header):
            story.begins(item)
        else:
            story.hear(item.now, item.event, decode_effects(item.effects))
    if not story.lines:
        raise ConfigError(
            f"{path} has nothing of {args.what!r}: it holds {story.entries} events of {story.requests} requests; the "
            "oldest are dropped"
        )
    if args.json:
        began = story.lines[0].at
        lines = [{"at_s": line.at - began, "what": line.what} for line in story.lines]
        write_json({"id": args.what, "lines": lines}, args.json)
    if args.json != "-":
        print("\n".join(story.shown()))
    return 0


@dataclass(frozen=True, slots=True)
class Line:
    """Something that happened ``at`` a time of the controller's clock."""

    at: float
    what: str


@dataclass(slots=True)
class Story:
    """What the journal has of ``id``."""

    id: str
    lines: list[Line] = field(default_factory=list)
    entries: int = 0
    requests: int = 0
    _plan: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        for prefix in _COMPLETION_PREFIXES:
            self.id = self.id.removeprefix(prefix)

    def begins(self, header: Header) -> None:
        """A segment of the journal: another controller, or a gap."""
        if self.lines and header.dropped:
            self.lines.append(
                Line(header.now, f"{header.dropped} events are missing here: the journal could not keep up")
            )

    def hear(self, now: float, event: Event, effects: list[Effect]) -> None:
        """One entry of the journal."""
        self.entries += 1
        self.requests += isinstance(event, on.RequestArrived)
        self.lines += [Line(now, what) for what in self._told(event)]
        self.lines += [Line(now, what) for effect in effects for what in self._decided(effect)]

    def shown(self) -> Iterator[str]:
        """A line each."""
        began = self.lines[0].at
        for line in self.lines:
            yield f"{line.at - began:10.3f} s  {line.what}"

    def _told(self, event: Event) -> Iterator[str]:
        match event:
            case on.RequestArrived(request=request) if request.id == self.id:
                yield _arrived(event)
            case on.RequestFinished() if event.id == self.id:
                yield _finished(event)
            case on.HandoffFailed() if event.id == self.id:
                yield f"could not go on elsewhere: {event.reason}; stays on {event.instance}"
            case on.PrefillEnding() if event.id == self.id:
                yield f"{event.instance} computes the last of its prompt, {_ms(event.left_s)} to go"
            case on.InstanceJoined(info=info) if self.id in (info.id, info.model):
                role = "" if event.prefill_share is None else f", {_role(event.prefill_share)}"
                draining = ", draining" if event.draining else ""
                again = "is linked to the controller again" if event.served else "is ready"
                yield f"{info.id} {again}: epoch {info.epoch}, {info.engine} on {info.device_kind}{role}{draining}"
            case on.InstanceLeft() if event.id == self.id:
                yield f"gone: {event.reason}"
            case on.InstanceDraining() if event.id == self.id:
                yield f"was told to end: takes nothing new, and gives back after {event.limit_s:g} s what still runs"
            case on.InstanceLinked() if event.id == self.id and event.problem:
                yield f"no link to {event.source}: {event.problem}"
            case on.DrainAsked() if event.instance == self.id:
                hard = f": it is gone in {event.limit_s:g} s" if event.hard else ""
                yield f"a person drains it{hard}" if event.on else "a person has it take requests again"
            case weights.InstanceStandby(info=info) if info.id == self.id:
                yield f"has all but its weights: epoch {info.epoch}, {info.engine} on {info.device_kind}"
            case weights.WeightsLoaded() if event.instance == self.id:
                for attempt in event.attempts:
                    came = f"{attempt.num_bytes / 1e6:.1f} MB in {_ms(attempt.seconds)}"
                    problem = f": {attempt.problem}" if attempt.problem else ""
                    yield f"weights from {attempt.source} by {attempt.path}: {came}{problem}"
                if event.problem:
                    yield f"could not load, and is a shell: {event.problem}"
            case on.LauncherJoined() if self.id in [order.instance for order in event.launches]:
                yield "runs, as the launcher says"
            case on.LaunchProgressed() if event.instance == self.id:
                yield f"{event.phase} took {event.seconds:.3f} s: {event.state}"
            case on.LaunchFailed() if event.instance == self.id:
                yield f"did not come up: {event.reason}" + (f" ({event.place})" if event.place else "")
            case on.ScaleAsked() if event.model == self.id:
                wanted = "as many instances as it needs" if event.instances is None else f"{event.instances} instances"
                yield f"a person wants {wanted}"
            case _:
                return

    def _decided(self, effect: Effect) -> Iterator[str]:
        match effect:
            case do.Dispatch() if effect.request_id == self.id:
                yield f"goes to {effect.instance}{_decision(effect.decision, effect.expected_output_tokens)}"
            case do.Handoff() if effect.request_id == self.id:
                where = f"goes on at {effect.instance} with its KV from {effect.source}"
                yield where + _decision(effect.decision, effect.expected_output_tokens)
            case do.Reject() if effect.request_id == self.id:
                yield f"refused, {effect.reason}: {effect.message}"
            case do.Suspect() if effect.instance == self.id:
                yield f"gets nothing new for {effect.hold_s:g} s: {effect.reason}"
            case do.Evacuate() if effect.instance == self.id:
                yield f"its requests go on elsewhere: {effect.reason}"
            case do.Drain() if effect.instance == self.id:
                yield _drained(effect)
            case weights.LoadWeights() if effect.instance == self.id:
                sources = [*(source.instance for source in effect.sources), "disk"]
                yield f"is to get its weights from {', else '.join(sources)}"
            case weights.SetSendRate() if effect.instance == self.id and effect.bytes_per_s is not None:
                yield f"gives its weights to another, {effect.bytes_per_s / 1e9:.3g} GB/s at most"
            case do.SetRole() if effect.instance == self.id:
                yield f"{_role(effect.prefill_share)}: {effect.reason}"
            case do.SetLinks() if effect.instance == self.id:
                yield f"is to be linked to {', '.join(source.instance for source in effect.sources) or 'none'}"
            case do.Launch() if self.id in (effect.instance, effect.model):
                how = "is woken" if effect.means == "standby" else f"is launched, weights by {effect.means}"
                if effect.shell:
                    how = "is launched as a shell, without weights"
                avoid = f"; not on {', '.join(effect.avoid)}" if effect.avoid else ""
                yield f"{effect.instance} {how}{avoid}: {effect.reason}"
            case do.StopInstance() if effect.instance == self.id:
                yield f"is stopped: {effect.reason}"
            case do.Planned() if effect.model == self.id:
                if (effect.desired, effect.held) != self._plan:  # one a second: only what is new
                    self._plan = (effect.desired, effect.held)
                    yield _planned(effect)
            case _:
                return


def _arrived(event: on.RequestArrived) -> str:
    request = event.request
    if event.sent is not None or event.attempt:
        again = f"has to go on elsewhere, not on {event.avoid}" if event.avoid else "has to go on elsewhere"
        return f"{again}; {request.num_prompt_tokens} tokens are computed anew"
    tenant = f" of {request.tenant}" if request.tenant else ""
    return (
        f"arrived{tenant}: class {request.slo_class or '-'}, {_promise(request.slo)}, value {request.value:g}, "
        f"{request.num_prompt_tokens} prompt tokens, at most {request.max_output_tokens} more"
    )


def _finished(event: on.RequestFinished) -> str:
    first = "no token was sent" if event.ttft_s is None else f"first token after {_ms(event.ttft_s)}"
    cached = f", {event.prompt_tokens_cached} prompt tokens cached" if event.prompt_tokens_cached else ""
    detail = f": {event.detail}" if event.detail else ""
    return f"{event.outcome}{detail}; {event.output_tokens} tokens, {first}, last after {_ms(event.e2e_s)}{cached}"


def _decision(decision: do.Decision, expected_tokens: float) -> str:
    of = f" (of {decision.candidates})" if decision.candidates > 1 else ""
    saved = f", {_ms(decision.saved_s)} saved by its prefix" if decision.saved_s else ""
    note = f"; {decision.note}" if decision.note else ""
    verdict = "expected on time" if decision.on_time else "expected late, so served from what others leave"
    return (
        f"{of}: {verdict}; first token after {_ms(decision.predicted_ttft_s)}, last after "
        f"{_ms(decision.predicted_e2e_s)}, some {expected_tokens:.0f} tokens; queue {_ms(decision.load_s)}, value won "
        f"{decision.gain:g}{saved}{note}"
    )


def _drained(effect: do.Drain) -> str:
    if not effect.on:
        return f"takes requests again: {effect.reason}"
    limit = "" if effect.limit_s is None else f"; what still runs after {effect.limit_s:g} s goes on elsewhere"
    return f"takes nothing new{limit}{', and is stopped when it is empty' if effect.ends else ''}: {effect.reason}"


def _planned(effect: do.Planned) -> str:
    return (
        f"{effect.held} instances (there or coming: {effect.instances}, asked for: {effect.desired}): {effect.reason}; "
        f"forecasts {effect.horizon_s:g} s ahead are off by {100 * effect.error:.0f}%"
    )


def _promise(slo: Slo) -> str:
    promised = {"first token": slo.ttft_s, "each further one": slo.tpot_s, "all": slo.e2e_s}
    said = [f"{what} within {_ms(seconds)}" for what, seconds in promised.items() if seconds is not None]
    return ", ".join(said) or "no promise"


def _role(share: float) -> str:
    return (
        "computes prompts alone" if share >= 1.0 else "decodes alone" if share <= 0.0 else "takes prompts and decodes"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10.0 else f"{seconds:.1f} s"
