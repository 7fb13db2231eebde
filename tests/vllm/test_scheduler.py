"""Our scheduler inside vLLM's, step by step, beside vLLM's own. No model: tokens are invented."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="`make test-vllm` makes an environment that has vLLM, and runs this", exc_type=ImportError
)

from tests.vllm.inside import Driven, scheduler_of
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from hyperflexis.engines.profiles import load_profile
from hyperflexis.engines.vllm import SloScheduler
from hyperflexis.engines.vllm.terms import PROBE, PROFILE_VARIABLE, Promise
from hyperflexis.errors import ConfigError

KINDS = (AsyncScheduler, SloScheduler)
EASY = Promise(first_due_s=60.0, pace_s=5.0, expected_output_tokens=8.0)


def finish(driven: Driven, limit: int = 3000) -> None:
    while driven.scheduler.has_unfinished_requests():
        driven.step()
        limit -= 1
        assert limit, "it does not end"


@pytest.mark.parametrize("blocks", [1000, 60])
def test_each_request_gets_its_tokens_also_when_the_cache_is_full(model: Path, blocks: int) -> None:
    rng = random.Random(7)
    sizes = [(rng.randrange(1, 500), rng.randrange(1, 60)) for _ in range(40)]
    preempted = []
    for kind in KINDS:
        driven = Driven(scheduler_of(kind, model, blocks=blocks))
        requests = [
            driven.add(f"r{i}", range(i, i + prompt), output, EASY if i % 3 else Promise())
            for i, (prompt, output) in enumerate(sizes)
        ]
        finish(driven)
        assert [driven.output[f"r{i}"] for i in range(40)] == [list(range(1, output + 1)) for _, output in sizes]
        preempted.append(sum(request.num_preemptions for request in requests))
        assert driven.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1  # one is vLLM's own
    assert (preempted[0] > 0) == (blocks == 60)


def test_its_books_are_vllms(model: Path) -> None:
    """What the policy plans with follows from vLLM's own state after every step, with steps planned ahead too."""
    rng = random.Random(3)
    driven = Driven(scheduler_of(SloScheduler, model, blocks=70))
    scheduler = driven.scheduler
    ahead = []
    preemptions = 0
    for number in range(600):
        if number < 300 and len(scheduler.requests) < 14:
            driven.add(f"r{number}", range(number, number + rng.randrange(1, 400)), rng.randrange(1, 80), EASY)
        if number % 17 == 0 and scheduler.running:
            scheduler.finish_requests(rng.choice(scheduler.running).request_id, RequestStatus.FINISHED_ABORTED)
        ahead.append(driven.plan())
        if len(ahead) == 2 or not scheduler.has_unfinished_requests():
            driven.commit(ahead.pop(0))
        queues = scheduler._queues
        for seq in queues.running:
            assert seq.payload.status == RequestStatus.RUNNING
            assert seq.output_tokens == seq.payload.num_output_tokens, number
        for seq in queues.waiting:
            assert seq.started == (seq.payload.status == RequestStatus.RUNNING)
            if seq.started:
                assert seq.computed == seq.payload.num_computed_tokens
        in_flight = sum(len(step.finals) for step in scheduler._steps)
        assert len(queues.running) + len(queues.waiting) <= len(scheduler.requests)
        assert len(queues.running) + len(queues.waiting) + in_flight >= len(scheduler._seqs)
        preemptions = scheduler._counters.preemptions
    while ahead:
        driven.commit(ahead.pop(0))
    assert preemptions > 0
    assert not scheduler._seqs and not scheduler._partial and not scheduler._queues.waiting


def test_who_can_be_on_time_goes_before_who_came_first(model: Path) -> None:
    driven = Driven(scheduler_of(SloScheduler, model, max_batch_tokens=256))
    teach(driven)
    driven.add("late", range(2000, 3500), 4, Promise(first_due_s=0.0))
    driven.add("loose", range(1000), 4, Promise(first_due_s=50.0))
    driven.add("tight", range(5000, 5200), 4, Promise(first_due_s=1.0))
    first = driven.step()
    assert next(iter(first)) == "tight" and first["tight"] == 200
    assert "late" not in first


def teach(driven: Driven) -> None:
    """An iteration takes 1 ms and 0.1 ms a prompt token, as far as the scheduler knows."""
    fit = driven.scheduler._fit
    rng = random.Random(1)
    for _ in range(400):
        n, decodes = rng.randrange(0, 512), rng.randrange(0, 8)
        fit.observe(n, 0.0, decodes, 100 * decodes, 1e-3 + 1e-4 * n + 1e-4 * decodes)


def test_prompts_leave_decodes_their_pace(model: Path) -> None:
    driven = Driven(scheduler_of(SloScheduler, model))
    teach(driven)
    driven.add("decodes", range(30), 200, Promise(first_due_s=10.0, pace_s=0.02, expected_output_tokens=200.0))
    driven.step()
    driven.step()
    driven.add("prompt", range(1000, 2500), 4, Promise(first_due_s=60.0))
    chunk = driven.step()["prompt"]
    # Its next token is due in 40 ms at the latest, which is time for fewer than 400 tokens.
    assert 32 <= chunk < 400
    free = Driven(scheduler_of(SloScheduler, model))
    teach(free)
    free.add("decodes", range(30), 200, Promise())
    free.step()
    free.step()
    free.add("prompt", range(1000, 2500), 4, Promise(first_due_s=60.0))
    assert free.step()["prompt"] == 511


def test_a_known_prefix_is_counted_as_computed(model: Path) -> None:
    driven = Driven(scheduler_of(SloScheduler, model))
    driven.add("first", range(400), 2, EASY)
    finish(driven)
    driven.add("second", range(400), 2, EASY)
    (seq,) = driven.scheduler._queues.waiting
    assert seq.computed == 384
    assert driven.step()["second"] == 16
    assert driven.scheduler._counters.prefix_hit_tokens == 384


def test_a_probe_is_told_what_the_server_takes(model: Path) -> None:
    driven = Driven(scheduler_of(SloScheduler, model))
    request = driven.add("probe", [1, 2, 3], 1, EASY)
    request.sampling_params.extra_args = {PROBE: 1}
    (outputs,) = driven.commit(driven.plan()).values()
    told = outputs.outputs[0].kv_transfer_params["hyperflexis"]
    assert (told["max_batch"], told["max_batch_tokens"]) == (8, 512)


def test_it_begins_where_a_profile_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROFILE_VARIABLE, "h100-llama-3.1-8b")
    scheduler = scheduler_of(SloScheduler, model)
    known = load_profile("h100-llama-3.1-8b").coefficients
    assert known.curve
    assert scheduler._fit.coefficients == known
    monkeypatch.setenv(PROFILE_VARIABLE, "no-such-profile")
    with pytest.raises(ConfigError, match="no profile is named 'no-such-profile'"):
        scheduler_of(SloScheduler, model)


def test_a_promise_that_is_no_number_is_passed_over(model: Path) -> None:
    driven = Driven(scheduler_of(SloScheduler, model))
    request = driven.add("r", [1, 2, 3], 1)
    request.sampling_params.extra_args = {"hfx_pace_s": "soon"}
    driven.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    request.status = RequestStatus.WAITING
    driven.scheduler.add_request(request)
    finish(driven)
    assert driven.output["r"] == [1]


def test_another_release_of_vllm_is_refused_by_name() -> None:
    program = "import vllm; vllm.__version__ = '0.99.1'; import hyperflexis.engines.vllm.scheduler"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "0.99.1" in done.stderr and "0.32" in done.stderr and "without --scheduler-cls" in done.stderr
