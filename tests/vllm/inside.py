"""vLLM's scheduler in this process, without a model: steps are planned and tokens invented."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hyperflexis.engines.vllm.terms import Promise

BLOCK = 16


def scheduler_of(
    kind: type[Scheduler], model: Path, max_batch: int = 8, max_batch_tokens: int = 512, blocks: int = 1000
) -> Scheduler:
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float32", max_model_len=2048, enforce_eager=True),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_batch,
            max_num_batched_tokens=max_batch_tokens,
            max_model_len=2048,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    with set_current_vllm_config(config):
        return kind(config, kv, StructuredOutputManager(config), block_size=BLOCK, log_stats=True)


class Driven:
    """A scheduler and the requests in it; ``step`` runs one iteration in which each that has all its tokens computed
    gets another one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.output: dict[str, list[int]] = {}
        self.scheduled: list[dict[str, int]] = []
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def add(self, id: str, prompt: Sequence[int], max_tokens: int, promise: Promise | None = None) -> Request:
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args=dict(promise.to_xargs()) if promise else None
        )
        sampling.update_from_generation_config({}, 2)
        request = Request(
            request_id=id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=time.time(),
            block_hasher=self._hasher,
        )
        self.output[id] = []
        self.scheduler.add_request(request)
        return request

    def plan(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.scheduled.append(dict(output.num_scheduled_tokens))
        return output

    def answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """What a model would have answered: the number of the token."""
        ids = list(output.num_scheduled_tokens)
        tokens = []
        for id in ids:
            request = self.scheduler.requests.get(id)
            tokens.append([] if request is None or request.is_prefill_chunk else [1 + len(request.output_token_ids)])
        places = {id: place for place, id in enumerate(ids)}
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=places, sampled_token_ids=tokens)

    def commit(self, output: SchedulerOutput) -> Any:
        result = self.scheduler.update_from_output(output, self.answer(output))
        for outputs in result.values():
            for one in outputs.outputs:
                self.output[one.request_id] += one.new_token_ids
        return result

    def step(self) -> dict[str, int]:
        output = self.plan()
        self.commit(output)
        return output.num_scheduled_tokens
