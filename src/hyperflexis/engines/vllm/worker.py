"""Inside vLLM's workers: a seeded answer that goes on here draws what it would have drawn.

    --worker-extension-cls hyperflexis.engines.vllm.worker.Resumed

vLLM gives each seeded request a generator of its own, from which every token takes its noise. A request of whose answer
``hfx_sent`` tokens were sent (terms.py) begins with the noise of as many thrown away. That happens where the model
runner makes the generator, in a wrapper around its ``_update_states``. The extension itself is empty: that it is
imported, in each worker, is what counts.

The second model runner, which vLLM takes where there is Triton, draws by seed and position: it needs no help, as far as
its source says, and is left alone.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from .terms import sent_tokens


class Resumed:
    """Nothing: see the module."""


def skip(generator: torch.Generator, tokens: int, vocabulary: int) -> None:
    """Leave ``generator`` as it is after so many tokens were drawn with it, as vLLM's samplers do that."""
    if generator.device.type == "cpu":  # one number for each token, which seeds the noise
        torch.randint(0, 2**31, (tokens,), generator=generator, dtype=torch.long)
        return
    # A row of noise for each token, and each takes as much of a generator that counts.
    row = torch.empty(vocabulary, dtype=torch.float32, device=generator.device)
    before = generator.get_offset()
    row.exponential_(generator=generator)
    generator.set_offset(before + tokens * (generator.get_offset() - before))


def _go_on(runner: Any, scheduler_output: Any) -> None:
    for new in scheduler_output.scheduled_new_reqs:
        state = runner.requests.get(new.req_id)
        sampling = new.sampling_params
        if state is None or state.generator is None or sampling is None:
            continue
        tokens = sent_tokens(sampling.extra_args)
        if tokens:
            skip(state.generator, tokens, runner.input_batch.vocab_size)


def _wrap(update: Any) -> Any:
    @wraps(update)
    def update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, scheduler_output, *args, **kwargs)
        if scheduler_output.scheduled_new_reqs:
            _go_on(self, scheduler_output)
        return result

    return update_states


GPUModelRunner._update_states = _wrap(GPUModelRunner._update_states)
