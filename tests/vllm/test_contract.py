"""The suite of every engine (tests/contract), over real servers: stock, and with our scheduler inside."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.contract import test_engine_contract as suite
from tests.contract.support import Driver, driven
from tests.vllm.servers import FLAVOURS, Servers

from hyperflexis.engines.vllm.engine import VllmConfig, VllmEngine
from hyperflexis.policy.catalog import STEPS

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})
del globals()["test_a_standby_refuses_until_it_was_told_to_load"]  # the servers have their weights


@pytest.fixture(params=FLAVOURS)
async def driver(request: pytest.FixtureRequest, servers: Servers) -> AsyncIterator[Driver]:
    if request.node.callspec.params.get("seed") and request.param == "stock":
        pytest.skip("without our scheduler a server starts a seed's generator anew (docs/engines/vllm.md)")
    url = servers.url(request.param)
    async with driven(VllmEngine(VllmConfig("m", url, step=STEPS["hyperflexis"].plan))) as one:
        yield one
