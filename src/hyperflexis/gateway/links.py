"""The gateway's wire links: one to the controller, one to each instance it was ever sent to.

What is asked of a link is remembered here until it is answered, so that a link's end reaches everyone who waited on
it. The controller may be away: questions then wait, bounded in number and time, and are asked again once it is back,
after ``GatewayJoined`` has told it what is in flight. Streams do not pass through it and go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from .. import wire
from ..core.effects import Dispatch, Evacuate, Handoff, Reject
from ..core.events import GatewayJoined, HandoffFailed, OpenRequest, RequestArrived, RequestFinished
from ..openai_api import ApiError

CONNECT_TIMEOUT_S = 5.0
SWEEP_S = 0.25
_log = logging.getLogger(__name__)


class Asker(Protocol):
    """Who waits for a decision of the controller."""

    @property
    def id(self) -> str:
        """The request's id, unique in the fleet."""

    def arrival(self) -> RequestArrived:
        """The question, with its age at this moment."""

    def open_request(self) -> OpenRequest | None:
        """What is in flight, None while nothing is dispatched."""

    def wait_s(self) -> float | None:
        """How long to wait for an answer, None for the usual time."""

    def dispatched(self, dispatch: Dispatch) -> None:
        """The answer: go there."""

    def hand_over(self, handoff: Handoff) -> None:
        """It is to go on elsewhere, with the KV that it has."""

    def rejected(self, reject: Reject) -> None:
        """The answer: no."""

    def unanswered(self) -> None:
        """No answer came in time."""


class ControllerLink:
    """The peer of the controller's link."""

    def __init__(
        self,
        address: str,
        gateway: str,
        token: str,
        max_waiting: int,
        wait_s: float,
        now: Callable[[], float],
        evacuate: Callable[[Evacuate], None],
    ) -> None:
        self._address = address
        self._gateway = gateway
        self._token = token
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self._now = now
        self._evacuate = evacuate
        self._link: wire.Link | None = None
        self._term = 0
        self._undecided: dict[str, tuple[Asker, float]] = {}
        self._dispatched: dict[str, Asker] = {}
        self.fleet: wire.Fleet | None = None

    @property
    def is_up(self) -> bool:
        """Whether the controller is there and has said what the fleet is."""
        return self._link is not None and self.fleet is not None

    def awaits_launch(self, model: str) -> bool:
        """Whether the model has no instance ready, and a request for it has one launched and waits for it."""
        status = None if self.fleet is None else self.fleet.models.get(model)
        return status is not None and status.holds and not status.ready

    async def run(self) -> None:
        """Keep the link, and give up on questions that wait too long. Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(wire.keep_connected(self._address, self, self._hello))
            tasks.create_task(self._sweep())

    def check_room(self) -> None:
        """Raise ApiError (503) when the controller is away and as many questions wait as may."""
        if self._link is None and len(self._undecided) >= self._max_waiting:
            raise ApiError(
                503,
                "the controller is away and the queue of requests that wait for it is full",
                code="controller_unavailable",
                retry_after_s=2.0,
            )

    def ask(self, asker: Asker) -> None:
        """Ask where to send a request; it hears of the answer."""
        self._dispatched.pop(asker.id, None)
        self._undecided[asker.id] = (asker, self._now())
        if self._link is not None:
            self._link.send(asker.arrival())

    def finished(self, event: RequestFinished) -> None:
        """The request is over, decided or not. Not repeated to a controller that is away: it is told what is open."""
        self._undecided.pop(event.id, None)
        self._dispatched.pop(event.id, None)
        if self._link is not None:
            self._link.send(event)

    def handoff_failed(self, event: HandoffFailed) -> None:
        """A request was not handed over. Not repeated to a controller that is away: it is told where each one is."""
        if self._link is not None:
            self._link.send(event)

    # wire.Peer

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """Tell what is in flight, then ask again what was not answered."""
        if hello.term < self._term:
            link.close(f"term {hello.term} is over: the controller of term {self._term} is in charge")
            return
        self._term = hello.term
        self._link = link
        found = (asker.open_request() for asker in self._dispatched.values())
        link.send(GatewayJoined(self._gateway, tuple(o for o in found if o is not None)))
        for asker, _ in list(self._undecided.values()):
            link.send(asker.arrival())

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """The controller is away; ``keep_connected`` looks for it."""
        if link is self._link:
            self._link = None
            _log.warning("controller lost: %s", reason)

    def message_received(self, link: wire.Link, message: Any) -> None:
        """A decision, or news of the fleet."""
        if link is not self._link:
            return
        if isinstance(message, Dispatch):
            entry = self._undecided.pop(message.request_id, None)
            if entry is not None:
                self._dispatched[message.request_id] = entry[0]
                entry[0].dispatched(message)
        elif isinstance(message, Handoff):
            asker = self._dispatched.get(message.request_id)
            if asker is not None:  # else it has ended, or is to be placed anew
                asker.hand_over(message)
        elif isinstance(message, Reject):
            entry = self._undecided.pop(message.request_id, None)
            if entry is not None:
                entry[0].rejected(message)
        elif isinstance(message, wire.Fleet):
            self.fleet = message
        elif isinstance(message, Evacuate):
            self._evacuate(message)
        else:
            link.close(f"a gateway takes no {type(message).__name__} from a controller")

    def _hello(self) -> wire.Hello:
        return wire.Hello(wire.VERSION, "gateway", self._gateway, token=self._token)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._now()
            late = [asker for asker, asked_at in self._undecided.values() if now - asked_at > self._limit_s(asker)]
            for asker in late:
                self._undecided.pop(asker.id, None)
                asker.unanswered()

    def _limit_s(self, asker: Asker) -> float:
        wait_s = asker.wait_s()
        return self._wait_s if wait_s is None else wait_s


class Reader(Protocol):
    """Who reads a stream of an instance; ``attempt`` is what it gave to ``open``."""

    def generate(self, attempt: int, stream: int) -> wire.Generate:
        """The order, with durations that count from now."""

    def tokens(
        self, attempt: int, now: float, token_ids: list[int], text: str | None, logprobs: list[wire.TokenLogprob] | None
    ) -> None:
        """What one iteration gave."""

    def finish(self, attempt: int, finish: wire.Finish) -> None:
        """The end, from the instance."""

    def instance_lost(self, attempt: int, reason: str, failed: bool = True) -> None:
        """The end, without a word; not ``failed``: the instance is well, but gives the stream back."""


class InstanceLink:
    """One instance's link and the streams on it. Opened at the first stream; gone for good when it ends."""

    def __init__(self, owner: InstanceLinks, address: str, instance: str) -> None:
        self._owner = owner
        self._address = address
        self.instance = instance
        self._link: wire.Link | None = None
        self._readers: dict[int, tuple[Reader, int]] = {}
        self._numbers = count(1)
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._connect())

    def open(self, reader: Reader, attempt: int) -> int:
        """Begin a stream, and return its number. It is sent once the link is up."""
        number = next(self._numbers)
        self._readers[number] = (reader, attempt)
        if self._link is not None:
            self._link.send(reader.generate(attempt, number))
        return number

    def cancel(self, number: int) -> None:
        """Nobody reads that stream any more."""
        if self._readers.pop(number, None) is not None and self._link is not None:
            self._link.send(wire.Cancel(number))

    def evacuate(self, reason: str, failed: bool) -> None:
        """Give up all streams; the link stays."""
        for number, (reader, attempt) in list(self._readers.items()):
            self.cancel(number)
            reader.instance_lost(attempt, f"instance {self.instance}: {reason}", failed)

    def close(self) -> None:
        """Let go of the link; readers are told."""
        self._task.cancel()
        if self._link is not None:
            self._link.close("the gateway stopped")
        self._end("the gateway stopped")

    async def _connect(self) -> None:
        hello = self._owner.hello()
        link: wire.Link | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                link = await wire.connect(self._address, self, hello)
                # A peer that says nothing must not hold streams: wait for its hello, or its end, within the limit.
                await asyncio.wait((self._greeted, link.closed), return_when=asyncio.FIRST_COMPLETED)
        except (OSError, TimeoutError, ValueError) as error:
            if link is not None:
                link.close("no hello came", abort=True)
            self._end(f"cannot be reached: {error or 'no answer'}")
            return
        if self._link is None:
            self._end("it refused the link")

    def _end(self, reason: str) -> None:
        self._link = None
        self._owner.forget(self._address, self)
        readers, self._readers = self._readers, {}
        for reader, attempt in readers.values():
            reader.instance_lost(attempt, f"instance {self.instance}: {reason}")

    # wire.Peer

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        """Send what waited for the link."""
        self._greeted.set_result(None)
        if hello.role != "instance" or hello.id != self.instance:
            link.close(f"{self._address} is {hello.role} {hello.id}, not instance {self.instance}")
            return
        self._link = link
        for number, (reader, attempt) in list(self._readers.items()):
            link.send(reader.generate(attempt, number))

    def link_lost(self, link: wire.Link, reason: str) -> None:
        """All its streams end."""
        self._end(reason)

    def message_received(self, link: wire.Link, message: Any) -> None:
        """All tokens of one iteration."""
        if not isinstance(message, wire.Output):
            link.close(f"a gateway takes no {type(message).__name__} from an instance")
            return
        now = self._owner.now()
        readers, texts, logprobs = self._readers, message.texts, message.logprobs
        for i, number in enumerate(message.streams):
            entry = readers.get(number)
            if entry is None:
                continue  # cancelled, with tokens still under way
            reader, attempt = entry
            text, entries = texts[i] if texts else None, logprobs[i] if logprobs else None
            try:
                reader.tokens(attempt, now, message.tokens[i], text, entries)
            except Exception:
                # One stream's bad tokens must not end the link of all the others.
                _log.exception("instance %s sent what cannot be read", self.instance)
                self.cancel(number)
                reader.instance_lost(attempt, f"instance {self.instance}: sent what cannot be read")
        for finish in message.finished:
            entry = readers.pop(finish.stream, None)
            if entry is not None:
                entry[0].finish(entry[1], finish)


class InstanceLinks:
    """All instance links of this gateway, by address."""

    def __init__(self, gateway: str, token: str, now: Callable[[], float]) -> None:
        self._gateway = gateway
        self._token = token
        self._links: dict[str, InstanceLink] = {}
        self.now = now

    def link(self, address: str, instance: str) -> InstanceLink:
        """The link to an instance, opened now if there is none."""
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = InstanceLink(self, address, instance)
        return link

    def evacuate(self, order: Evacuate) -> None:
        """What runs on an instance is to go on elsewhere."""
        for link in list(self._links.values()):
            if link.instance == order.instance:
                link.evacuate(order.reason, order.failed)

    def forget(self, address: str, link: InstanceLink) -> None:
        """The link ended."""
        if self._links.get(address) is link:
            del self._links[address]

    def hello(self) -> wire.Hello:
        """How this gateway presents itself."""
        return wire.Hello(wire.VERSION, "gateway", self._gateway, token=self._token)

    def close(self) -> None:
        """End all links."""
        for link in list(self._links.values()):
            link.close()
