"""The host of a standby: told by one message to load, and what it says of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.contract.support import emulated
from tests.unit.engines.test_host import Peer, gateway_at, generate

from hyperflexis import wire
from hyperflexis.core.events import InstanceJoined, InstanceReported, LaunchProgressed
from hyperflexis.core.weights import (
    Attempt,
    InstanceStandby,
    LoadWeights,
    Phase,
    SetSendRate,
    WeightsLoaded,
    WeightSource,
)
from hyperflexis.engines.base import Loaded
from hyperflexis.engines.emulated import EmulatedEngine
from hyperflexis.engines.host import InstanceHost, InstanceIdentity


class Loads(EmulatedEngine):
    """Loads as its test says."""

    outcomes: list[Loaded]
    orders: list[LoadWeights]
    rates: list[float | None]

    async def load(self, order: LoadWeights) -> Loaded:
        self.orders.append(order)
        outcome = self.outcomes.pop(0)
        if not outcome.problem:
            await super().load(order)
        return outcome

    def set_send_rate(self, bytes_per_s: float | None) -> None:
        self.rates.append(bytes_per_s)


@asynccontextmanager
async def standby(folder: Path, *outcomes: Loaded) -> AsyncIterator[tuple[Loads, Peer, Peer]]:
    """The engine, its controller and a gateway."""
    engine = Loads(emulated("hyperflexis")._config)
    engine.outcomes, engine.orders, engine.rates = list(outcomes), [], []
    controller = Peer()
    server = await wire.listen(
        f"unix:{folder}/c", lambda: controller, lambda: wire.Hello(wire.VERSION, "controller", "c", term=1)
    )
    host = InstanceHost(engine, InstanceIdentity("i1", 1), report_every_s=0.01)
    await host.start(f"unix:{folder}/i", f"unix:{folder}/c", standby=True)
    running = asyncio.create_task(host.run())
    try:
        yield engine, controller, await gateway_at(f"unix:{folder}/i")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.stop()
        server.close()


ORDER = LoadWeights("i1", 1, (WeightSource("host:1", "i0", 4),), "abc")


async def test_a_standby_is_introduced_loads_once_and_joins(tmp_path: Path) -> None:
    attempt = Attempt("tcp", "i0", 1000, 0.5)
    outcome = Loaded((attempt,), (Phase("transfer", 0.5),), "abc")
    async with standby(tmp_path, outcome) as (engine, controller, gateway):
        introduced = (await controller.until(lambda: controller.of(InstanceStandby)))[0]
        assert introduced.info.id == "i1" and [phase.name for phase in introduced.phases] == ["launching"]
        gateway.links[0].send(generate(1))
        assert "standby" in (await gateway.until(lambda: gateway.finish(1))).message
        controller.links[0].send(LoadWeights("i1", 2))  # of another launch: nothing
        controller.links[0].send(ORDER)
        controller.links[0].send(ORDER)
        told = (await controller.until(lambda: controller.of(WeightsLoaded)))[0]
        assert engine.orders == [ORDER]
        assert (told.problem, told.attempts) == ("", (attempt,))
        assert [phase.name for phase in told.phases] == ["launching", "standby", "loading", "transfer"]
        kinds = [type(message) for message in controller.messages if not isinstance(message, InstanceReported)]
        assert kinds == [InstanceStandby, LaunchProgressed, InstanceJoined, WeightsLoaded]
        assert controller.of(InstanceJoined)[0].info.weights_digest == "abc"
        gateway.links[0].send(generate(2))
        assert (await gateway.until(lambda: gateway.finish(2))).reason == "length"
        await controller.until(lambda: controller.of(InstanceReported))


async def test_a_kv_cache_taken_meanwhile_is_a_phase_of_its_own(tmp_path: Path) -> None:
    pool_s = 1e-6
    async with standby(tmp_path, Loaded(phases=(Phase("kv_pool", pool_s),))) as (_, controller, _gateway):
        await controller.until(lambda: controller.of(InstanceStandby))
        controller.links[0].send(ORDER)
        await controller.until(lambda: controller.of(WeightsLoaded))
        pool, weights = controller.of(LaunchProgressed)
        assert (pool.phase, pool.seconds, weights.phase) == ("kv_pool", pool_s, "weights")
        assert weights.seconds > 0.0, "the rest"


async def test_what_could_not_load_stays_a_standby_and_is_told_again(tmp_path: Path) -> None:
    failed = Loaded((Attempt("disk", "/m", 0, 0.1, "gone"),), (), "", "gone")
    async with standby(tmp_path, failed, Loaded()) as (_, controller, gateway):
        await controller.until(lambda: controller.of(InstanceStandby))
        controller.links[0].send(ORDER)
        assert (await controller.until(lambda: controller.of(WeightsLoaded)))[0].problem == "gone"
        assert controller.of(InstanceJoined) == [] == controller.of(InstanceReported)
        gateway.links[0].send(generate(1))
        assert (await gateway.until(lambda: gateway.finish(1))).reason == "refused"
        controller.links[0].send(ORDER)
        await controller.until(lambda: len(controller.of(WeightsLoaded)) == 2)
        assert len(controller.of(InstanceJoined)) == 1


async def test_a_new_controller_hears_what_it_is(tmp_path: Path) -> None:
    async with standby(tmp_path, Loaded()) as (_, controller, _gateway):
        await controller.until(lambda: controller.of(InstanceStandby))
        controller.links[0].close()
        await controller.until(lambda: len(controller.of(InstanceStandby)) == 2)
        controller.links[1].send(ORDER)
        await controller.until(lambda: controller.of(InstanceJoined))
        controller.links[1].close()
        await controller.until(lambda: len(controller.of(InstanceJoined)) == 2)
        assert len(controller.of(InstanceStandby)) == 2


async def test_the_send_rate_is_passed_on(tmp_path: Path) -> None:
    async with standby(tmp_path) as (engine, controller, _):
        await controller.until(lambda: controller.of(InstanceStandby))
        controller.links[0].send(SetSendRate("i1", 2, 1.0))
        controller.links[0].send(SetSendRate("i1", 1, 5e8))
        controller.links[0].send(SetSendRate("i1", 1, None))
        async with asyncio.timeout(10.0):
            while len(engine.rates) < 2:
                await asyncio.sleep(0.01)
        assert engine.rates == [5e8, None]
