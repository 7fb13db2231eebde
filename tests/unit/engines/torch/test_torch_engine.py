"""What the contract suite does not ask of every engine."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hyperflexis.engines.base import Emission, EngineStart
from hyperflexis.engines.torch.engine import MAX_FAILURES, TorchConfig, TorchEngine
from hyperflexis.engines.torch.runner import Runner, Work
from hyperflexis.engines.torch.sampler import Drawn
from hyperflexis.errors import HyperFlexisError
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Generate, Sampling, pack_ids

PROMPT = list(range(300, 340))


class Client:
    """Collects emissions by key."""

    def __init__(self, directory: Path) -> None:
        self.engine = TorchEngine(TorchConfig("m", directory, STEPS["hyperflexis"], kv_tokens=1024, max_batch=8))
        self.emissions: dict[object, list[Emission]] = {}
        self._news = asyncio.Event()

    def sink(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            self.emissions.setdefault(emission.key, []).append(emission)
        self._news.set()

    def send(self, key: str, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> None:
        self.engine.generate(key, Generate(1, key, 1, pack_ids(prompt), sampling))

    async def ended(self, key: str) -> Emission:
        async with asyncio.timeout(20.0):
            while not (found := self.emissions.get(key)) or found[-1].finish is None:
                self._news.clear()
                await self._news.wait()
        return found[-1]

    async def run(self, key: str, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> list[int]:
        self.send(key, sampling, prompt)
        await self.ended(key)
        return self.tokens(key)

    def tokens(self, key: str) -> list[int]:
        return [token for emission in self.emissions[key] for token in emission.token_ids]


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Client]:
    client = Client(directory)
    await client.engine.start(EngineStart(client.sink))
    yield client
    await client.engine.stop()


def greedy(max_tokens: int, **fields: object) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


async def test_a_stop_token_ends_the_stream_and_is_not_part_of_it(small_model: Path) -> None:
    async with started(small_model) as client:
        whole = await client.run("whole", greedy(12))
        stop = whole[6]
        cut = await client.run("cut", greedy(12, stop_token_ids=(stop,), logprobs=0))
        first = whole.index(stop)
        assert cut == whole[:first]
        end = await client.ended("cut")
        assert (end.finish, end.num_output_tokens, end.token_ids, end.logprobs) == ("stop", first + 1, [], None)


async def test_end_of_text_is_read_from_the_model_and_can_be_ignored(small_model: Path, tmp_path: Path) -> None:
    async with started(small_model) as client:
        whole = await client.run("whole", greedy(12))
    copy = tmp_path / "model"
    shutil.copytree(small_model, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole[4]]}))
    async with started(copy) as client:
        assert await client.run("ends", greedy(12)) == whole[: whole.index(whole[4])]
        assert await client.run("ignores", greedy(12, ignore_eos=True)) == whole


async def test_logprobs_come_with_every_token(small_model: Path) -> None:
    async with started(small_model) as client:
        tokens = await client.run("a", greedy(5, logprobs=2))
        found = [one for emission in client.emissions["a"] for one in emission.logprobs or []]
        assert [one.token_id for one in found] == tokens
        for one in found:
            assert one.top[0] == (one.token_id, one.logprob)  # greedy: the chosen is the likeliest
            assert len(one.top) == 2 and one.top[1][1] < one.logprob < 0.0


async def test_a_token_outside_the_vocabulary_harms_only_its_own_request(small_model: Path) -> None:
    async with started(small_model) as client:
        client.send("good", greedy(20))
        client.send("bad", greedy(20), [5, 1024])
        bad = await client.ended("bad")
        assert bad.finish == "invalid" and "1024" in bad.message
        assert (await client.ended("good")).finish == "length"


class Failing(Runner):
    """A device that fails for iterations of a prompt token."""

    def __init__(self, runner: Runner, poison: int) -> None:
        super().__init__(runner.model)
        self._poison = poison

    def run(self, work: Work) -> Sequence[Drawn]:
        if self._poison in work.token_ids:
            raise RuntimeError("out of memory")
        return super().run(work)


async def test_a_failed_iteration_ends_its_streams_and_the_engine_goes_on(small_model: Path) -> None:
    async with started(small_model) as client:
        expected = await client.run("before", greedy(10))
        client.engine._runner = Failing(client.engine._runner, 777)
        bad = [777] * 10
        for i in range(2 * MAX_FAILURES):
            client.send(f"bad {i}", greedy(10), bad)
            end = await client.ended(f"bad {i}")
            assert end.finish == "error" and "out of memory" in end.message
            assert await client.run(f"after {i}", greedy(10)) == expected
        assert client.engine.report().kv_used_tokens == 0


async def test_failures_in_a_row_end_the_engine_and_its_report_says_so(small_model: Path) -> None:
    async with started(small_model) as client:
        client.engine._runner = Failing(client.engine._runner, 777)
        for i in range(MAX_FAILURES):
            await client.run(f"bad {i}", greedy(10), [777] * 10)
        with pytest.raises(HyperFlexisError, match="3 iterations failed in a row, the last with: out of memory"):
            client.engine.report()
        client.send("late", greedy(10))
        assert (await client.ended("late")).finish == "refused"


async def test_the_same_request_id_twice_at_once_is_an_error_of_the_second(small_model: Path) -> None:
    async with started(small_model) as client:
        client.send("a", greedy(30))
        client.engine.generate("b", Generate(2, "a", 1, pack_ids(PROMPT), greedy(5)))
        assert (await client.ended("b")).finish == "invalid"
        assert (await client.ended("a")).finish == "length"
        assert len(client.tokens("a")) == 30


async def test_seeds_decide_and_requests_without_one_differ(small_model: Path) -> None:
    async with started(small_model) as client:
        one, again, other = [
            await client.run(f"{i}", Sampling(temperature=1.0, seed=seed, max_tokens=16))
            for i, seed in enumerate((5, 5, 6))
        ]
        assert one == again != other
        free = [await client.run(f"free {i}", Sampling(temperature=1.0, max_tokens=16)) for i in range(2)]
        assert free[0] != free[1]


async def test_a_missing_model_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    client = Client(tmp_path / "nowhere")
    with pytest.raises(HyperFlexisError, match="make-model"):
        await client.engine.start(EngineStart(client.sink))
    await client.engine.stop()
