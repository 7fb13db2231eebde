"""The instance host over real sockets: in this process where it can be, in its own where signals matter."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.contract.support import LIMIT_S, emulated

from hyperflexis import wire
from hyperflexis.core.effects import Drain, SetRole
from hyperflexis.core.events import (
    InstanceDraining,
    InstanceJoined,
    InstanceReported,
    LaunchProgressed,
    PrefillEnding,
)
from hyperflexis.engines.base import EngineInfo, EngineStart
from hyperflexis.engines.emulated import EmulatedEngine
from hyperflexis.engines.host import InstanceHost, InstanceIdentity
from hyperflexis.errors import HyperFlexisError

T = TypeVar("T")


class Peer:
    """A gateway or a controller: keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.links: list[wire.Link] = []
        self.lost: list[str] = []
        self._moved = asyncio.Event()

    def link_made(self, link: wire.Link, hello: wire.Hello) -> None:
        self.links.append(link)
        self._moved.set()

    def message_received(self, link: wire.Link, message: Any) -> None:
        self.messages.append(message)
        self._moved.set()

    def link_lost(self, link: wire.Link, reason: str) -> None:
        self.lost.append(reason)
        self._moved.set()

    async def until(self, value: Callable[[], T]) -> T:
        async with asyncio.timeout(LIMIT_S):
            while not (found := value()):
                self._moved.clear()
                await self._moved.wait()
            return found

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.messages if isinstance(message, kind)]

    def finish(self, stream: int) -> wire.Finish | None:
        ends = [end for output in self.of(wire.Output) for end in output.finished if end.stream == stream]
        assert len(ends) <= 1, "a stream ended twice"
        return ends[0] if ends else None

    def tokens(self, stream: int) -> list[int]:
        return [
            token
            for output in self.of(wire.Output)
            for number, part in zip(output.streams, output.tokens, strict=True)
            if number == stream
            for token in part
        ]


async def gateway_at(address: str, token: str = "", role: str = "gateway") -> Peer:
    peer = Peer()
    await wire.connect(address, peer, wire.Hello(wire.VERSION, role, "g", token=token))
    await peer.until(lambda: peer.links)
    return peer


def generate(stream: int, max_tokens: int = 5, epoch: int = 1) -> wire.Generate:
    ids = wire.pack_ids([65, 66, stream])
    sampling = wire.Sampling(temperature=0.0, max_tokens=max_tokens)
    return wire.Generate(stream, f"r{stream}", epoch, ids, sampling)


@asynccontextmanager
async def hosted(
    engine: EmulatedEngine, address: str, controller: str | None = None, token: str = ""
) -> AsyncIterator[InstanceHost]:
    host = InstanceHost(engine, InstanceIdentity("i1", 1, token), report_every_s=0.01)
    await host.start(address, controller)
    running = asyncio.create_task(host.run())
    try:
        yield host
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.stop()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/i"


async def test_two_gateways_get_their_own_streams_one_frame_an_iteration(address: str) -> None:
    async with hosted(emulated("hyperflexis"), address):
        first, second = await gateway_at(address), await gateway_at(address)
        for peer in (first, second):
            for stream in (1, 2, 3):
                # Equal numbers on two links are different streams; their prompts differ by the request's.
                peer.links[0].send(msg_with_id(generate(stream, 20), f"{id(peer)}-{stream}"))
        for peer in (first, second):
            for stream in (1, 2, 3):
                end = await peer.until(lambda peer=peer, stream=stream: peer.finish(stream))
                assert (end.reason, end.num_output_tokens, len(peer.tokens(stream))) == ("length", 20, 20)
        assert first.tokens(1) == second.tokens(1) != first.tokens(2)
        assert max(len(output.streams) for output in first.of(wire.Output)) == 3
        assert len(first.of(wire.Output)) < 40


def msg_with_id(message: wire.Generate, request_id: str) -> wire.Generate:
    return wire.Generate(message.stream, request_id, message.epoch, message.token_ids, message.sampling)


async def test_another_epoch_is_refused(address: str) -> None:
    async with hosted(emulated("hyperflexis"), address):
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, epoch=2))
        end = await gateway.until(lambda: gateway.finish(1))
        assert end.reason == "refused"
        assert "epoch 1" in end.message


async def test_cancel_frees_at_once_and_has_no_answer(address: str) -> None:
    engine = emulated("hyperflexis")
    async with hosted(engine, address):
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 400))
        await gateway.until(lambda: gateway.tokens(1))
        gateway.links[0].send(wire.Cancel(1))
        gateway.links[0].send(wire.Cancel(77))  # of no stream: nothing
        gateway.links[0].send(generate(2))
        await gateway.until(lambda: gateway.finish(2))
        assert gateway.finish(1) is None
        assert engine.report().kv_used_tokens == 0
        gateway.links[0].send(msg_with_id(generate(1), "again"))  # its number is free again
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "length"


async def test_a_lost_gateway_takes_its_streams_with_it(address: str) -> None:
    engine = emulated("hyperflexis")
    async with hosted(engine, address):
        lost, other = await gateway_at(address), await gateway_at(address)
        for stream in range(1, 4):
            lost.links[0].send(generate(stream, 450))
        await lost.until(lambda: all(lost.tokens(stream) for stream in (1, 2, 3)))
        lost.links[0].close()
        await lost.until(lambda: lost.lost)
        other.links[0].send(generate(9))
        await other.until(lambda: other.finish(9))
        report = engine.report()
        assert (report.num_running, report.num_waiting, report.kv_used_tokens) == (0, 0, 0)


async def test_a_stream_number_in_use_ends_the_link(address: str) -> None:
    async with hosted(emulated("hyperflexis"), address):
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 400))
        gateway.links[0].send(generate(1, 400))
        await gateway.until(lambda: gateway.lost)


@pytest.mark.parametrize(("role", "token"), [("gateway", "wrong"), ("controller", "right")])
async def test_strangers_are_shown_out(address: str, role: str, token: str) -> None:
    engine = emulated("hyperflexis")
    async with hosted(engine, address, token="right"):
        stranger = await gateway_at(address, token, role)
        stranger.links[0].send(generate(1))
        await stranger.until(lambda: stranger.lost)
        assert stranger.tokens(1) == []
        known = await gateway_at(address, "right")
        known.links[0].send(generate(1))
        await known.until(lambda: known.finish(1))


async def test_the_controller_hears_of_readiness_progress_and_rest(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    hello = wire.Hello(wire.VERSION, "controller", "c", term=1)
    server = await wire.listen(where, lambda: controller, lambda: hello)
    async with hosted(emulated("hyperflexis"), address, where):
        joined = await controller.until(lambda: controller.of(InstanceJoined))
        info = joined[0].info
        assert (info.id, info.epoch, info.address, info.engine) == ("i1", 1, address, "emulated")
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 60))
        await gateway.until(lambda: gateway.finish(1))

        def at_rest() -> bool:
            reports = [one.report for one in controller.of(InstanceReported)]
            return bool(reports) and reports[-1].output_tokens == 60 and reports[-1].num_running == 0

        await controller.until(at_rest)
        reports = [one.report for one in controller.of(InstanceReported)]
        assert any(progress.id == "r1" for report in reports for progress in report.progress)
        assert [report.iterations for report in reports] == sorted(report.iterations for report in reports)
    server.close()


async def test_an_idle_instance_reports_rarely_but_does(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    hello = wire.Hello(wire.VERSION, "controller", "c", term=1)
    server = await wire.listen(where, lambda: controller, lambda: hello)
    async with hosted(emulated("hyperflexis"), address, where):
        await controller.until(lambda: controller.of(InstanceReported))
        began = asyncio.get_running_loop().time()
        await controller.until(lambda: len(controller.of(InstanceReported)) >= 2)
        assert asyncio.get_running_loop().time() - began > 0.5
    server.close()


async def test_streams_go_on_without_a_controller_and_a_new_term_takes_over(address: str, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/c"
    engine = emulated("hyperflexis")
    async with hosted(engine, address, where):
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1))
        await gateway.until(lambda: gateway.finish(1))

        new, old = Peer(), Peer()
        hellos = {id(new): 5, id(old): 4}

        async def controller(peer: Peer) -> asyncio.Server:
            term = hellos[id(peer)]
            return await wire.listen(
                where, lambda: peer, lambda: wire.Hello(wire.VERSION, "controller", "c", term=term)
            )

        server = await controller(new)
        await new.until(lambda: new.of(InstanceJoined))
        server.close()
        new.links[0].close()
        await new.until(lambda: new.lost)

        stale = await controller(old)
        await old.until(lambda: old.lost)
        assert old.of(InstanceJoined) == []
        stale.close()

        server = await controller(new)
        await new.until(lambda: len(new.of(InstanceJoined)) == 2)
        server.close()


async def test_drain_refuses_the_new_for_this_epoch_only(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    hello = wire.Hello(wire.VERSION, "controller", "c", term=1)
    server = await wire.listen(where, lambda: controller, lambda: hello)
    async with hosted(emulated("hyperflexis"), address, where) as host:
        await controller.until(lambda: controller.of(InstanceJoined))
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 200))
        await gateway.until(lambda: gateway.tokens(1))
        controller.links[0].send(Drain("i0", 7, None, "a test"))
        gateway.links[0].send(generate(2))
        assert (await gateway.until(lambda: gateway.finish(2))).reason == "length"
        controller.links[0].send(Drain("i0", 1, None, "a test"))
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "length"
        async with asyncio.timeout(LIMIT_S):
            await host.drained()
        await controller.until(lambda: controller.of(InstanceDraining))
        gateway.links[0].send(generate(3))
        assert (await gateway.until(lambda: gateway.finish(3))).reason == "refused"
    server.close()


async def test_a_drain_gives_streams_back_at_its_limit_and_can_be_taken_back(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    server = await wire.listen(where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1))
    async with hosted(emulated("hyperflexis"), address, where):
        await controller.until(lambda: controller.of(InstanceJoined))
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 450))
        await gateway.until(lambda: gateway.tokens(1))
        controller.links[0].send(Drain("i1", 1, 0.05, "a test"))
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "moved"
        assert len(gateway.tokens(1)) < 450
        gateway.links[0].send(generate(2))
        assert (await gateway.until(lambda: gateway.finish(2))).reason == "refused"
        # A controller that comes now hears of it.
        controller.links[0].close("a new one comes")
        await controller.until(lambda: len(controller.of(InstanceJoined)) == 2)
        assert [(joined.draining, joined.ends) for joined in controller.of(InstanceJoined)] == [
            (False, False),
            (True, False),
        ]
        controller.links[-1].send(Drain("i1", 1, None, "a test", ends=True))
        gateway.links[0].send(generate(4))
        await gateway.until(lambda: gateway.finish(4))
        controller.links[-1].close("and another")
        await controller.until(lambda: len(controller.of(InstanceJoined)) == 3)
        assert controller.of(InstanceJoined)[-1].ends, "whose drain it is outlives the controller"
        controller.links[-1].send(Drain("i1", 1, None, "a test", on=False))
        gateway.links[0].send(generate(3))
        assert (await gateway.until(lambda: gateway.finish(3))).reason == "length"
    server.close()


class Starts(EmulatedEngine):
    """Starts when its test lets it."""

    begun: asyncio.Event
    goes: asyncio.Event

    async def start(self, start: EngineStart) -> EngineInfo:
        assert start.phase_over is not None
        start.phase_over("engine_init", 1.5)
        self.begun.set()
        await self.goes.wait()
        start.phase_over("warm_up", 2.5)
        return await super().start(start)


async def test_controllers_hear_of_a_start_while_it_lasts(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    server = await wire.listen(where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1))
    engine = Starts(emulated("hyperflexis")._config)
    engine.begun, engine.goes = asyncio.Event(), asyncio.Event()
    host = InstanceHost(engine, InstanceIdentity("i1", 1))
    starting = asyncio.create_task(host.start(address, where, False, 0.5))
    try:
        for links in (1, 2):  # a controller that comes in between hears what is over
            await controller.until(lambda links=links: len(controller.of(LaunchProgressed)) == 2 * links)
            controller.links[-1].close("a new one comes")
        await controller.until(lambda: len(controller.links) == 3)
        engine.goes.set()
        await starting
        await controller.until(lambda: controller.of(InstanceJoined))
        told = [(one.phase, one.seconds) for one in controller.of(LaunchProgressed)[-3:]]
        assert told == [("process", 0.5), ("engine_init", 1.5), ("warm_up", 2.5)]
        assert {one.instance for one in controller.of(LaunchProgressed)} == {"i1"}
    finally:
        await host.stop()
        server.close()


class Roles(EmulatedEngine):
    """Remembers the roles that it was given."""

    shares: tuple[float, ...] = ()

    def set_role(self, prefill_share: float) -> None:
        self.shares += (prefill_share,)


async def test_a_role_of_this_epoch_reaches_the_engine(address: str, tmp_path: Path) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    server = await wire.listen(where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1))
    engine = Roles(emulated("hyperflexis")._config)
    async with hosted(engine, address, where):
        await controller.until(lambda: controller.of(InstanceJoined))
        for epoch, share in ((7, 0.3), (1, 0.0), (1, 0.5)):
            controller.links[0].send(SetRole("i1", epoch, share, "the load"))
        controller.links[0].send(Drain("i1", 1, None, "a test"))
        gateway = await gateway_at(address)

        async def refused() -> bool:
            gateway.links[0].send(generate(1))
            return (await gateway.until(lambda: gateway.finish(1))).reason == "refused"

        assert await refused()  # the drain has come, and all that was before it
        assert engine.shares == (0.0, 0.5)
    server.close()


async def test_the_controller_is_asked_once_where_a_request_goes_on_and_where_kv_is_to_be_had(
    address: str, tmp_path: Path
) -> None:
    controller = Peer()
    where = f"unix:{tmp_path}/c"
    server = await wire.listen(where, lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1))
    async with hosted(emulated("hyperflexis", kv_listen=f"unix:{tmp_path}/kv"), address, where):
        info = (await controller.until(lambda: controller.of(InstanceJoined)))[0].info
        assert (info.kv_address, info.kv_bytes_per_token) == (f"unix:{tmp_path}/kv", 1)
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 20))
        order = generate(2, 20)
        gateway.links[0].send(wire.Generate(2, order.request_id, 1, order.token_ids, order.sampling, hands_over=True))
        for stream in (1, 2):
            assert (await gateway.until(lambda stream=stream: gateway.finish(stream))).reason == "length"
        asked = controller.of(PrefillEnding)
        assert [(one.id, one.instance, one.epoch) for one in asked] == [("r2", "i1", 1)]
        assert 0.0 < asked[0].left_s < 1.0
    server.close()


async def test_while_the_controller_is_away_a_request_goes_on_where_it_is(address: str) -> None:
    async with hosted(emulated("hyperflexis"), address):
        gateway = await gateway_at(address)
        order = generate(1, 20)
        gateway.links[0].send(wire.Generate(1, order.request_id, 1, order.token_ids, order.sampling, hands_over=True))
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "length"


async def test_stop_tells_open_streams(address: str) -> None:
    async with hosted(emulated("hyperflexis"), address):
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 450))
        await gateway.until(lambda: gateway.tokens(1))
    end = await gateway.until(lambda: gateway.finish(1))
    assert (end.reason, end.message) == ("error", "the instance stopped")
    await gateway.until(lambda: gateway.lost)


async def test_a_broken_engine_ends_the_host(address: str) -> None:
    engine = emulated("hyperflexis")
    host = InstanceHost(engine, InstanceIdentity("i1", 1), report_every_s=0.01)
    await host.start(address, None)
    engine.fail("device lost")
    with pytest.raises(HyperFlexisError, match="device lost"):
        async with asyncio.timeout(LIMIT_S):
            await host.run()
    await host.stop()


async def test_an_address_that_is_taken_is_named(address: str) -> None:
    async with hosted(emulated("hyperflexis"), "127.0.0.1:0") as first:
        info = first._info
        assert info is not None and not info.address.endswith(":0")
        second = InstanceHost(emulated("hyperflexis"), InstanceIdentity("i2", 1))
        with pytest.raises(HyperFlexisError, match=f"instance i2 cannot listen at {info.address}"):
            await second.start(info.address, None)
        await second.stop()


PROGRAM = textwrap.dedent(
    """
    import asyncio, logging, sys
    from hyperflexis.engines.emulated import Faults
    from hyperflexis.engines.host import InstanceIdentity, run_instance
    from tests.contract.support import emulated

    def ready(info):
        print("ready", info.address, flush=True)

    logging.basicConfig(level=logging.INFO)
    engine = emulated("hyperflexis", faults=Faults(slow_factor=float(sys.argv[2])))
    asyncio.run(run_instance(engine, InstanceIdentity("i1", 1), sys.argv[1], None, on_ready=ready))
    print("clean", flush=True)
    """
)


@asynccontextmanager
async def instance_process(address: str, slow_factor: float = 1.0) -> AsyncIterator[asyncio.subprocess.Process]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, address, str(slow_factor)),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            assert (await process.stdout.readline()).startswith(b"ready")
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_sigterm_finishes_what_runs_and_exits_cleanly(address: str) -> None:
    async with instance_process(address) as process:
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 300))
        await gateway.until(lambda: gateway.tokens(1))
        process.send_signal(signal.SIGTERM)
        end = await gateway.until(lambda: gateway.finish(1))
        assert (end.reason, end.num_output_tokens) == ("length", 300)
        assert await process.wait() == 0
        assert process.stdout is not None
        assert await process.stdout.read() == b"clean\n"
        await gateway.until(lambda: gateway.lost)


async def test_a_second_signal_cuts_the_drain_short(address: str) -> None:
    async with instance_process(address, slow_factor=50.0) as process:
        gateway = await gateway_at(address)
        gateway.links[0].send(generate(1, 450))
        await gateway.until(lambda: gateway.tokens(1))
        process.send_signal(signal.SIGINT)
        gateway.links[0].send(generate(2))
        await gateway.until(lambda: gateway.finish(2))
        process.send_signal(signal.SIGINT)
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "moved"
        assert await process.wait() == 0
