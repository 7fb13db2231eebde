"""The step policy inside vLLM: ``--scheduler-cls hyperflexis.engines.vllm.SloScheduler``.

vLLM's own scheduler goes on doing all that it does: KV blocks, prefix cache, chunked prefill, preemption, structured
outputs, connectors. This one tells it before each step which waiting requests may start, in which order prompts go on,
and how many tokens the step may have; what comes out of a step goes into the latency model.

    add_request          one Sequence (sequences.py) for each request, with its promise (terms.py)
    schedule             plan; then vLLM schedules what the plan says, and nothing else of what waits
    update_from_output   first tokens, the clock of the decodes, the duration of the step

Made on the asynchronous scheduler, with which a step is planned while the one before runs: a prompt whose last chunk is
under way is in neither queue until its token is there. Nothing is made per request and step.

A request whose KV comes from another server is planned as a prompt of one token. While its KV is on its way vLLM keeps
it apart, out of our hands: here it is one that has begun and has that token missing. What did not come is a prompt
again.

The base class is no stable interface, so the releases of vLLM that this was tested with are listed here, and others
are refused at import.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, NamedTuple

import msgspec
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

import vllm

from ... import __version__
from ...batcher import Counters
from ...errors import ProtocolError
from ...policy import step
from ...policy.step import StepLimits
from ...sequences import Queues, Sequence
from ..openai import first_fit
from ..profiles import load_profile
from .terms import (
    KEY,
    PROBE,
    PROFILE_VARIABLE,
    REPORT_EVERY_S,
    REPORTS_VARIABLE,
    Capabilities,
    Promise,
    StepReport,
    sent_tokens,
)

TESTED = ("0.32",)
if not any(f"{vllm.__version__}.".startswith(f"{release}.") for release in TESTED):
    raise ImportError(
        f"the scheduler of HyperFlexis {__version__} is for vLLM {' and '.join(TESTED)}, and this is vLLM "
        f"{vllm.__version__}: install one of these, or start vLLM without --scheduler-cls, and HyperFlexis orders "
        "requests in front of it"
    )

GAP_S = 0.02
"""A step that is scheduled so soon after the end of the last one began with that end: what lies between is the engine's
own work, and a decode waits for it too. After a longer time the engine was idle."""
_log = init_logger(f"vllm.{__name__}")


class Offer(RequestQueue):  # type: ignore[misc]
    """The requests that wait, in order of arrival. While a step is scheduled only those that are ``offered`` are seen,
    in that order, and when they are gone the queue looks empty."""

    def __init__(self) -> None:
        self._all: dict[str, Request] = {}
        self.offered: deque[Request] | None = None

    def add_request(self, request: Request) -> None:
        """vLLM's."""
        self._all[request.request_id] = request

    def pop_request(self) -> Request:
        """vLLM's."""
        request = self.peek_request()
        if self.offered is not None:
            self.offered.popleft()
        return self._all.pop(request.request_id)

    def peek_request(self) -> Request:
        """vLLM's."""
        if self.offered is not None:
            return self.offered[0]
        return next(iter(self._all.values()))

    def prepend_request(self, request: Request) -> None:
        """vLLM's. The order is ours."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """vLLM's. The order is ours."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """vLLM's."""
        self._all.pop(request.request_id, None)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """vLLM's."""
        for request in requests:
            self._all.pop(request.request_id, None)

    def __bool__(self) -> bool:
        return bool(self._all if self.offered is None else self.offered)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._all.values()) if self.offered is None else self.offered)


class SloScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is not there where types are checked
    """See the module. Raises ValueError for settings of vLLM under which it cannot keep promises, and ConfigError for a
    profile that there is not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.scheduler_config.enable_chunked_prefill:
            raise ValueError("SloScheduler fills each step with chunks of prompts: remove --no-enable-chunked-prefill")
        self.waiting = self._offer = Offer()
        self.kv_holding_waiting = FCFSRequestQueue()
        self._kv_tokens = self.cache_config.num_gpu_blocks * self.block_size
        self._queues = Queues()
        self._seqs: dict[str, Sequence] = {}
        self._partial: dict[str, Sequence] = {}
        self._allowed: dict[str, int] = {}
        self._steps: deque[_Step] = deque()
        profile = os.environ.get(PROFILE_VARIABLE)
        self._fit = first_fit(None if profile is None else load_profile(profile))
        self._ended_at = 0.0
        self._told_at = 0.0
        self._counters = Counters()
        self._address = os.environ.get(REPORTS_VARIABLE)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        if self._socket is not None:
            self._socket.setblocking(False)
        _log.info("HyperFlexis %s schedules: up to %d requests", __version__, self.max_num_running_reqs)

    def add_request(self, request: Request) -> None:
        """A request comes."""
        known = request.request_id in self.requests
        super().add_request(request)
        if known or request.resumable or request.sampling_params is None:
            return  # sessions and pooling: as vLLM does it
        now = time.monotonic()
        try:
            promise = Promise.from_xargs(request.sampling_params.extra_args)
        except ProtocolError as error:
            _log.warning("request %s: %s; it is served as one without a promise", request.request_id, error)
            promise = Promise()
        # The time since the server got it is part of what was promised.
        sent_at = now - min(max(time.time() - request.arrival_time, 0.0), 1.0)
        seq = Sequence(
            id=request.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.max_tokens,
            value=promise.value,
            first_due=_at(sent_at, promise.first_due_s),
            pace_limit_s=_at(0.0, promise.pace_s),
            last_due=_at(sent_at, promise.last_due_s),
            expected_output_tokens=promise.expected_output_tokens,
            payload=request,
        )
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            cached = request.num_prompt_tokens - 1
        else:
            _, cached, _, _ = self._get_local_prefix_cache_hit(request)
        self._seqs[seq.id] = seq
        self._queues.add(seq, sent_at, cached)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next step."""
        now = time.monotonic()
        chosen = self._plan(now)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self._offer.offered = None
            self._allowed.clear()
        began = self._ended_at if now - self._ended_at < GAP_S else now
        self._steps.append(self._take_note(output, chosen, began))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """A step ended."""
        result = super().update_from_output(scheduler_output, model_runner_output)
        done = self._steps.popleft()
        if not scheduler_output.total_num_scheduled_tokens:
            return result
        now = time.monotonic()
        seconds = now - max(done.began, self._ended_at)
        self._ended_at = now
        self._fit.observe(done.prefill_tokens, done.attention, done.decodes, done.kv_tokens, seconds)
        queues = self._queues
        if done.decodes:
            queues.running.tick(now)
        else:
            queues.running.last_at = now
        for seq in done.finals:
            if self._seqs.get(seq.id) is not seq:
                continue  # the first token was its last, or it was cancelled
            request: Any = seq.payload
            queues.took_token(seq, now)
            if request.status == RequestStatus.RUNNING:  # else it was preempted meanwhile
                queues.run(seq)
                # A token may have come after a preemption, from the step before it.
                queues.correct(seq, request.num_output_tokens)
            elif queues.waiting.pop(seq.id) is not None:
                queues.waiting.add(seq)  # it is due at another time now
        if done.uneven:
            for seq in list(queues.running):
                request = seq.payload
                queues.correct(seq, request.num_output_tokens)
        counters = self._counters
        counters.iterations += 1
        counters.prompt_tokens += done.prefill_tokens
        counters.output_tokens += done.decodes + len(done.finals)
        counters.busy_s += seconds
        if self._socket is not None and (now - self._told_at >= REPORT_EVERY_S or not self._seqs):
            self._tell(now)
        return result

    def shutdown(self) -> None:
        """vLLM's."""
        if self._socket is not None:
            self._socket.close()
        super().shutdown()

    def _plan(self, now: float) -> list[Sequence]:
        """Say which requests this step may begin or go on with the prompts of, and with how many tokens; returns those
        that have some. Without a plan vLLM does as it likes."""
        queues, running = self._queues, self.running
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if free < 2 + 2 * len(running) // self.block_size:  # a decode needs a block once in block_size tokens
            self._choose_victim(now)
        if not queues.waiting:
            return []
        if not self._partial and len(running) >= self.max_num_active_reqs:
            return []  # none can begin
        limits = StepLimits(
            self.max_num_active_reqs,
            self.max_num_scheduled_tokens,
            self._kv_tokens,
            free * self.block_size,
        )
        plan = step.plan(now, queues.waiting, queues.running, self._fit.coefficients, limits)
        for seq in plan.late:
            queues.waiting.give_up(seq)
        if not plan.prefills and len(running) == sum(_runs(seq) for seq in self._partial.values()):
            return list(queues.waiting)  # nothing would run: vLLM knows better
        allowed = self._allowed
        for id in self._partial:
            allowed[id] = 0
        for seq, tokens in plan.prefills:
            allowed[seq.id] = tokens
        offered = deque(seq.payload for seq, _ in plan.prefills if not seq.started)
        if len(self._offer) > len(queues.waiting) - len(self._partial):
            offered.extend(request for request in self._offer if request.request_id not in self._seqs)
        self._offer.offered = offered
        # A prompt whose last token is missing gets it in any case.
        left_out = (seq for seq in self._partial.values() if not allowed[seq.id])
        return [*(seq for seq, _ in plan.prefills), *left_out]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM asks this of each request that waits for something else than its turn."""
        compiles = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        goes: bool = super()._handle_blocked_waiting_request(request)
        if goes and compiles:
            self._go_on_in_grammar(request)
        seq = self._partial.get(request.request_id)
        if goes and seq is not None and request.num_computed_tokens < seq.computed:
            # Not all of its KV came, which the plan did not know.
            self._queues.prefilled(seq, request.num_computed_tokens)
            self._allowed.pop(seq.id, None)
        return goes

    def _go_on_in_grammar(self, request: Request) -> None:
        """The grammar of an answer that goes on here begins behind what was sent of it."""
        tokens = sent_tokens(request.sampling_params.extra_args)
        if not tokens:
            return
        grammar: Any = request.structured_output_request.grammar
        if not grammar.accept_tokens(request.request_id, request.prompt_token_ids[-tokens:]):
            _log.warning("request %s: what was sent of the answer is not of its grammar", request.request_id)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM asks this of each request before it takes its blocks: where the plan's number of tokens gets in."""
        if num_new_tokens == 1 and not self.num_prefill_lookahead:
            return 1  # a decode: there are hundreds
        allowed = self._allowed.get(request.request_id, num_new_tokens)
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, min(num_new_tokens, allowed))
        return tokens

    def _take_note(self, output: SchedulerOutput, chosen: list[Sequence], began: float) -> _Step:
        """What this step computes."""
        scheduled = output.num_scheduled_tokens
        queues = self._queues
        kv_tokens = queues.running.kv_tokens
        prefill_tokens = chunks = 0
        attention = 0.0
        finals = []
        for seq in chosen:
            tokens = scheduled.get(seq.id)
            request: Any = seq.payload
            if tokens is None:
                if not seq.started and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                    queues.begin(seq)
                    self._partial[seq.id] = seq
                continue
            end = request.num_computed_tokens
            chunks += 1
            prefill_tokens += tokens
            attention += tokens * (end - 0.5 * tokens)
            if not seq.started:
                queues.begin(seq)
                self._partial[seq.id] = seq
                self._counters.prefix_hit_tokens += end - tokens
            if request.is_prefill_chunk:
                queues.prefilled(seq, end)
            else:
                del self._partial[seq.id]
                queues.end(seq)
                finals.append(seq)
        uneven = bool(output.preempted_req_ids) or self.num_spec_tokens > 0
        return _Step(began, prefill_tokens, attention, len(scheduled) - chunks, kv_tokens, finals, uneven)

    def _choose_victim(self, now: float) -> None:
        """vLLM preempts the last of those that run when there is no block for one of them."""
        holders = [*self._queues.running, *filter(_runs, self._partial.values())]
        if len(holders) > 1:
            request = step.victim(now, holders).payload
            self.running.remove(request)
            self.running.append(request)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output=drop_stale_output)
        seq = self._seqs.get(request.request_id)
        if seq is not None:
            self._partial.pop(seq.id, None)
            self._queues.preempt(seq)
            self._counters.preemptions += 1

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        seq = self._seqs.pop(request.request_id, None)
        if seq is not None:
            self._partial.pop(seq.id, None)
            self._queues.end(seq)
        kv_parameters, ec_parameters = super()._free_request(request, delay_free_blocks)
        if PROBE in ((request.sampling_params and request.sampling_params.extra_args) or ()):
            me = Capabilities(__version__, self.max_num_active_reqs, self.max_num_scheduled_tokens)
            kv_parameters = {**(kv_parameters or {}), KEY: msgspec.structs.asdict(me)}
        return kv_parameters, ec_parameters

    def _tell(self, now: float) -> None:
        """A report to the adapter that started this server. None is waited for, and none is missed."""
        self._told_at = now
        counters, fitted = self._counters, self._fit.coefficients
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        report = StepReport(
            num_running=len(self._queues.running),
            num_waiting=len(self._seqs) - len(self._queues.running),
            kv_used_tokens=max(self._kv_tokens - free * self.block_size, 0),
            iterations=counters.iterations,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            preemptions=counters.preemptions,
            busy_s=counters.busy_s,
            latency=(fitted.c0, fitted.c1, fitted.c2, fitted.c3, fitted.c4, fitted.q90),
            curve=fitted.curve,
        )
        assert self._socket is not None and self._address is not None
        with contextlib.suppress(OSError):
            self._socket.sendto(msgspec.msgpack.encode(report), self._address)


class _Step(NamedTuple):
    """What a step computes: sums over its chunks of prompts, its decodes with their context, and whose prompts it ends.
    ``uneven``: not every decode gets exactly one token. The device is free for it from ``began`` on, if not later."""

    began: float
    prefill_tokens: int
    attention: float
    decodes: int
    kv_tokens: int
    finals: list[Sequence]
    uneven: bool


def _runs(seq: Sequence) -> bool:
    """False for one whose KV is on its way."""
    request: Any = seq.payload
    return bool(request.status == RequestStatus.RUNNING)


def _at(now: float, seconds: float | None) -> float:
    return inf if seconds is None else now + seconds
