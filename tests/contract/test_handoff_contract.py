"""What two engines must do with a request that goes from one to the other, and what each of them when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.contract.relay import Relay
from tests.contract.support import LIMIT_S, Driver, Stream, driven, emulated

from hyperflexis.core.links import KvSource
from hyperflexis.engines.base import Engine, EngineStart
from hyperflexis.errors import HyperFlexisError
from hyperflexis.policy.catalog import STEPS
from hyperflexis.wire import Sampling

FAMILIES = ("llama", "qwen2", "qwen3")
PROMPT = [40 + (7 * i) % 50 for i in range(150)]
LONG_PROMPT = [40 + (11 * i) % 50 for i in range(400)]
CHUNK = 64
"""Tokens of an iteration: PROMPT takes three, LONG_PROMPT seven."""
Make = Callable[..., Engine]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("torch", reason="the torch engine needs PyTorch")
    from hyperflexis.make_model import Recipe, make_model

    directories = {}
    for family in FAMILIES:
        directories[family] = tmp_path_factory.mktemp("models") / family
        make_model(directories[family], Recipe("1m", family=family, context=1024))
    return directories


def torch_engine(directory: Path, **options: Any) -> Engine:
    from hyperflexis.engines.torch.engine import TorchConfig, TorchEngine

    sizes: dict[str, Any] = {"kv_tokens": 2048, "context_length": 512, "max_batch": 8, "max_batch_tokens": CHUNK}
    return TorchEngine(TorchConfig("m", directory, STEPS["hyperflexis"], **(sizes | options)))


def emulated_engine(**options: Any) -> Engine:
    return emulated("hyperflexis", **({"max_batch_tokens": CHUNK} | options))


@pytest.fixture(params=["emulated", *FAMILIES])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes engines of one kind."""
    if request.param == "emulated":
        return emulated_engine
    return partial(torch_engine, request.getfixturevalue("tiny_models")[request.param])


@pytest.fixture(params=["emulated", "llama"])
def make_one(request: pytest.FixtureRequest) -> Make:
    """The same, for what no family of models does otherwise."""
    if request.param == "emulated":
        return emulated_engine
    return partial(torch_engine, request.getfixturevalue("tiny_models")["llama"])


@dataclass
class Pair:
    """Two engines, the gateway that knows both, and what it asks of them."""

    source: Driver
    target: Driver
    address: str = ""
    hands: dict[str, Stream] = field(default_factory=dict)

    def begin(self, sampling: Sampling, prompt: list[int] = PROMPT, at_end: bool = False) -> tuple[str, object]:
        """A request at the source. ``at_end``: as soon as its prompt is nearly computed, the target is asked too."""
        request_id = f"moves-{len(self.source.streams)}"
        if at_end:
            self.source.ending = lambda request_id, left_s: self.hand_over(request_id, prompt, 0, sampling)
        key = self.source.send(prompt, sampling=sampling, request_id=request_id, hands_over=at_end)
        return request_id, key

    def hand_over(self, request_id: str, prompt: list[int], sent: int, sampling: Sampling, **kv: Any) -> None:
        """Have the target go on with a request of which ``sent`` tokens are known."""
        fields: dict[str, Any] = {"address": self.address, "instance": "source", "epoch": 1}
        rest = Sampling(
            temperature=sampling.temperature,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens - sent,
            ignore_eos=True,
            logprobs=sampling.logprobs,
        )
        key = self.target.send(prompt, sampling=rest, request_id=request_id, kv=KvSource(**(fields | kv)))
        self.hands[request_id] = self.target.streams[key]

    async def undisturbed(self, sampling: Sampling, prompt: list[int] = PROMPT) -> list[int]:
        """What one engine makes of it alone, leaving nothing that others could find."""
        key = self.source.send(prompt, sampling=sampling, salt="alone")
        await self.source.streams[key].ended()
        return self.source.streams[key].tokens

    async def handed(self, request_id: str, key: object, prompt_sent: list[int], whole: list[int]) -> None:
        """It was handed over, and source and target together have said ``whole``."""
        there = self.source.streams[key]
        assert (await there.ended()).finish == "handed", there.end
        here = self.hands[request_id]
        end = await here.ended()
        assert end.finish == "length", end
        sent = len(prompt_sent)
        assert prompt_sent + here.tokens == whole
        assert there.tokens == whole[: len(there.tokens)]
        assert end.num_output_tokens == len(whole) - sent
        await self.settled()

    async def settled(self) -> None:
        """Nothing of any request is left on either side."""
        for driver in (self.source, self.target):
            await until(lambda driver=driver: level(driver) == (0, 0, 0))


def level(driver: Driver) -> tuple[int, int, int]:
    report = driver.engine.report()
    return report.num_running, report.num_waiting, report.kv_used_tokens


async def until(holds: Callable[[], bool]) -> None:
    """What no emission tells of. Each look lets the engines' loop go round."""
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0)


@asynccontextmanager
async def pair(make: Make, listen: str, source: dict[str, Any] | None = None, **target: Any) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(driven(make(kv_listen=listen, **(source or {})), "source"))
        second = await stack.enter_async_context(driven(make(**target), "target"))
        assert first.info is not None and second.info is not None
        assert first.info.kv_address and not second.info.kv_address and first.info.kv_bytes_per_token
        yield Pair(first, second, first.info.kv_address)


@pytest.fixture(params=["tcp", "unix"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/kv"


def greedy(max_tokens: int, **fields: Any) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


def seeded(max_tokens: int) -> Sampling:
    return Sampling(temperature=1.0, seed=1234, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("sampling", [greedy(40), seeded(40)], ids=["greedy", "seeded"])
async def test_after_its_prompt_a_request_goes_on_as_if_nothing_had_happened(
    make: Make, listen: str, sampling: Sampling
) -> None:
    async with pair(make, listen) as two:
        whole = await two.undisturbed(sampling)
        request_id, key = two.begin(sampling, at_end=True)
        await two.handed(request_id, key, [], whole)
        assert len(set(whole)) > 5, "few tokens repeated would prove nothing"


@pytest.mark.parametrize("sampling", [greedy(200), seeded(200)], ids=["greedy", "seeded"])
async def test_a_running_request_moves_in_the_middle(make: Make, listen: str, sampling: Sampling) -> None:
    async with pair(make, listen) as two:
        whole = await two.undisturbed(sampling)
        request_id, key = two.begin(sampling)
        there = two.source.streams[key]
        await there.until(lambda: len(there.tokens) >= 20)
        known = there.tokens[:17]
        two.hand_over(request_id, PROMPT + known, len(known), sampling)
        await two.handed(request_id, key, known, whole)
        assert 20 <= len(there.tokens) < 200


async def test_a_long_prompt_may_be_asked_for_before_it_is_computed(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        whole = await two.undisturbed(greedy(30))
        request_id, key = two.begin(greedy(30))
        two.hand_over(request_id, PROMPT, 0, greedy(30))
        await two.handed(request_id, key, [], whole)


async def test_what_the_target_has_cached_does_not_travel(make: Make, listen: str) -> None:
    async with pair(make, listen) as two:
        whole = await two.undisturbed(greedy(30))
        await two.target.run(PROMPT[:100] + [41] * 20, 2)
        request_id, key = two.begin(greedy(30), at_end=True)
        await two.handed(request_id, key, [], whole)
        end = two.hands[request_id].end
        assert end is not None and end.cached_tokens == 96


async def test_what_has_come_can_be_found_again(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        whole = await two.undisturbed(greedy(30))
        request_id, key = two.begin(greedy(30), at_end=True)
        await two.handed(request_id, key, [], whole)
        again = await two.target.run(PROMPT, sampling=greedy(30))
        assert again.tokens == whole
        assert again.end is not None and again.end.cached_tokens == 144


async def test_many_requests_move_at_once(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        prompts = [[40 + (i * (7 + n)) % 50 for i in range(60 + 9 * n)] for n in range(6)]
        wholes = [await two.undisturbed(greedy(220), prompt) for prompt in prompts]
        begun = [two.begin(greedy(220), prompt) for prompt in prompts]
        for (request_id, key), prompt in zip(begun, prompts, strict=True):
            there = two.source.streams[key]
            await there.started()
            two.hand_over(request_id, prompt, 0, greedy(220))
        for (request_id, key), whole in zip(begun, wholes, strict=True):
            await two.handed(request_id, key, [], whole)


async def test_without_a_seed_the_draws_go_on_with_that_of_the_source(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        free = Sampling(temperature=1.0, max_tokens=300, ignore_eos=True)
        request_id, key = two.begin(free)
        there = two.source.streams[key]
        await there.until(lambda: len(there.tokens) >= 5)
        two.hand_over(request_id, PROMPT, 0, free)
        assert (await two.hands[request_id].ended()).finish == "length"
        assert (await there.ended()).finish == "handed"
        tokens = two.hands[request_id].tokens
        assert len(tokens) == 300 and tokens[: len(there.tokens)] == there.tokens


async def test_log_probabilities_come_along(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        sampling = greedy(300, logprobs=2)
        request_id, key = two.begin(sampling)
        there = two.source.streams[key]
        await there.until(lambda: len(there.tokens) >= 9)
        two.hand_over(request_id, PROMPT + there.tokens[:4], 4, sampling)
        here = two.hands[request_id]
        assert (await here.ended()).finish == "length"
        assert [one.token_id for one in here.logprobs] == here.tokens
        shared = len(there.tokens) - 4
        assert shared > 0 and here.logprobs[:shared] == there.logprobs[4:]


async def refused(two: Pair, request_id: str, why: str) -> None:
    end = await two.hands[request_id].ended()
    assert end.finish == "refused" and why in end.message, end
    assert not two.hands[request_id].tokens
    assert level(two.target) == (0, 0, 0)


async def stays(two: Pair, key: object, whole: list[int]) -> None:
    """It went on at the source as if nobody had asked for it."""
    there = two.source.streams[key]
    assert (await there.ended()).finish == "length"
    assert there.tokens == whole
    await two.settled()


async def test_without_room_at_the_target_a_request_stays(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen, kv_tokens=192) as two:
        whole = await two.undisturbed(greedy(60))
        other = two.target.send([50] * 60, 300)
        await two.target.streams[other].started()
        request_id, key = two.begin(greedy(60), at_end=True)
        await two.source.streams[key].started()
        end = await two.hands[request_id].ended()
        assert end.finish == "refused" and "room" in end.message
        two.target.engine.cancel(other)
        await stays(two, key, whole)


async def test_a_request_that_grows_beyond_the_targets_room_stays(make_one: Make) -> None:
    """At first there is room, and when its last tokens come there is none."""
    async with pair(make_one, "127.0.0.1:0", kv_tokens=160) as two:
        relay = await Relay(two.address).start()
        whole = await two.undisturbed(greedy(100))
        request_id, key = two.begin(greedy(100))
        there = two.source.streams[key]
        await there.until(lambda: len(there.tokens) >= 30)
        two.address = relay.address
        two.hand_over(request_id, PROMPT, 0, greedy(100))
        await refused(two, request_id, "room")
        await stays(two, key, whole)
        await relay.stop()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"instance": "other"}, "instance source"),
        ({"epoch": 2}, "epoch 1"),
        ({"address": "127.0.0.1:1"}, "refused"),
        ({"address": "unix:/nowhere/kv"}, "No such file"),
        ({"address": "nowhere"}, "neither unix:PATH nor HOST:PORT"),
    ],
    ids=["instance", "epoch", "nobody there", "no socket", "no address"],
)
async def test_a_source_that_is_another_than_was_said_gives_nothing(
    make_one: Make, wrong: dict[str, Any], why: str
) -> None:
    async with pair(make_one, "127.0.0.1:0") as two:
        whole = await two.undisturbed(greedy(60))
        request_id, key = two.begin(greedy(60))
        await two.source.streams[key].started()
        two.hand_over(request_id, PROMPT, 0, greedy(60), **wrong)
        await refused(two, request_id, why)
        await stays(two, key, whole)


@pytest.mark.parametrize("differs", ["token", "layout"])
async def test_who_may_not_have_kv_or_cannot_use_it_gets_none(make_one: Make, differs: str) -> None:
    target = {"kv_token": "fleet"}
    match differs:
        case "token":
            target, why = {"kv_token": "another"}, "kv_token"
        case _ if make_one is emulated_engine:
            target, why = target | {"model": "other"}, "laid out otherwise"
        case _:
            target, why = target | {"dtype": "bfloat16"}, "laid out otherwise"
    async with pair(make_one, "127.0.0.1:0", {"kv_token": "fleet"}, **target) as two:
        whole = await two.undisturbed(greedy(60))
        request_id, key = two.begin(greedy(60))
        await two.source.streams[key].started()
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await refused(two, request_id, why)
        await stays(two, key, whole)


async def test_an_address_that_cannot_be_listened_at_is_named(make_one: Make) -> None:
    engine = make_one(kv_listen="unix:/nowhere/kv")
    with pytest.raises(HyperFlexisError, match=r"unix:/nowhere/kv.*kv_listen"):
        await engine.start(EngineStart(lambda emissions: None))
    await engine.stop()


async def test_a_request_that_is_not_there_or_has_other_tokens_is_not_given(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        whole = await two.undisturbed(greedy(60))
        two.hand_over("nobody's", PROMPT, 0, greedy(60))
        await refused(two, "nobody's", "is not here")
        request_id, key = two.begin(greedy(60))
        await two.source.streams[key].started()
        two.hand_over(request_id, [*PROMPT[:-1], 99], 0, greedy(60))
        await refused(two, request_id, "other tokens")
        await stays(two, key, whole)


async def test_an_end_at_the_source_before_the_handoff_is_told(make_one: Make, listen: str) -> None:
    """The target is asked for KV of a prompt that never runs: its source is full."""
    async with pair(make_one, listen, {"max_batch": 1}) as two:
        first = two.source.send([45] * 20, 400)
        await two.source.streams[first].started()
        request_id, key = two.begin(greedy(60))
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await until(lambda: opened(two, request_id))
        two.source.engine.cancel(key)
        assert (await two.source.streams[key].ended()).finish == "cancelled"
        await refused(two, request_id, "it was cancelled")
        two.source.engine.cancel(first)
        await two.settled()


async def test_a_cancel_at_the_target_leaves_the_request_with_the_source(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen, {"max_batch": 1}) as two:
        whole = await two.undisturbed(greedy(60))
        first = two.source.send([45] * 20, 400)
        await two.source.streams[first].started()
        request_id, key = two.begin(greedy(60))
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await until(lambda: opened(two, request_id))
        here = next(key for key, stream in two.target.streams.items() if stream is two.hands[request_id])
        two.target.engine.cancel(here)
        assert two.hands[request_id].end is not None and two.hands[request_id].end.finish == "cancelled"
        assert level(two.target) == (0, 0, 0)
        two.source.engine.cancel(first)
        await stays(two, key, whole)


def opened(two: Pair, request_id: str) -> bool:
    """Whether the source knows that its request is to be handed over."""
    return request_id in two.source.engine._handoffs._exports  # type: ignore[attr-defined]


async def test_both_ends_cancelled_in_the_middle_leave_nothing(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen) as two:
        for _ in range(10):
            request_id, key = two.begin(greedy(200))
            await two.source.streams[key].started()
            two.hand_over(request_id, PROMPT, 0, greedy(200))
            await until(lambda request_id=request_id: opened(two, request_id))
            here = next(key for key, stream in two.target.streams.items() if stream is two.hands[request_id])
            two.source.engine.cancel(key)
            two.target.engine.cancel(here)
            await two.source.streams[key].ended()
            await two.settled()


async def test_stopping_either_end_ends_its_part(make_one: Make, listen: str) -> None:
    async with pair(make_one, listen, {"max_batch": 1}) as two:
        first = two.source.send([45] * 20, 400)
        request_id, _ = two.begin(greedy(60))
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await until(lambda: opened(two, request_id))
        await two.source.stop()
        assert two.source.streams[first].end is not None
        await refused(two, request_id, "")
    async with pair(make_one, listen, {"max_batch": 1}) as two:
        whole = await two.undisturbed(greedy(60))
        first = two.source.send([45] * 20, 30)
        request_id, key = two.begin(greedy(60))
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await until(lambda: opened(two, request_id))
        await two.target.stop()
        end = two.hands[request_id].end
        assert end is not None and end.finish == "error"
        there = two.source.streams[key]
        assert (await there.ended()).finish == "length" and there.tokens == whole


@pytest.mark.parametrize("phase", ["before it is opened", "in the middle"])
async def test_a_link_that_breaks_before_the_offer_leaves_the_request_with_the_source(
    make_one: Make, phase: str
) -> None:
    async with pair(make_one, "127.0.0.1:0") as two:
        relay = await Relay(two.address).start()
        two.address = relay.address
        # The first piece is that of the first of many chunks.
        relay.from_source = lambda header, size: size == 0 and phase != "before it is opened"
        whole = await two.undisturbed(greedy(60), LONG_PROMPT)
        request_id, key = two.begin(greedy(60), LONG_PROMPT)
        two.hand_over(request_id, LONG_PROMPT, 0, greedy(60))
        await refused(two, request_id, "did not come")
        await stays(two, key, whole)
        await relay.stop()


@pytest.mark.parametrize("lost", ["Offer", "Accept"])
async def test_a_link_that_breaks_before_the_answer_leaves_at_most_one_with_the_request(
    make_one: Make, lost: str
) -> None:
    async with pair(make_one, "127.0.0.1:0") as two:
        relay = await Relay(two.address).start()
        two.address = relay.address
        relay.from_source = relay.from_target = lambda header, size: lost.encode() not in header
        whole = await two.undisturbed(greedy(60))
        request_id, key = two.begin(greedy(60), at_end=True)
        there = two.source.streams[key]
        end = await there.ended()
        assert end.finish == "moved" and "not known" in end.message
        assert there.tokens == whole[: len(there.tokens)]
        if lost == "Offer":
            await refused(two, request_id, "did not come")
        else:
            here = two.hands[request_id]
            assert (await here.ended()).finish == "length"
            assert here.tokens == whole
        await two.settled()
        await relay.stop()


async def test_damaged_kv_is_noticed(make_one: Make) -> None:
    async with pair(make_one, "127.0.0.1:0") as two:
        relay = await Relay(two.address).start()
        two.address = relay.address
        relay.damage_piece = 3
        whole = await two.undisturbed(greedy(60))
        request_id, key = two.begin(greedy(60))
        await two.source.streams[key].started()
        two.hand_over(request_id, PROMPT, 0, greedy(60))
        await refused(two, request_id, "damaged")
        await stays(two, key, whole)
        await relay.stop()
