"""Live calibration of the torch engine: iterations of chosen shapes, timed on this machine in this process.

Only the engine's runner is driven: no Batcher, no event loop, no gateway. Times are what an instance's device takes
for one forward pass and the choice of its tokens, and so what the emulated engine and the simulator should play.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .calibrate_fit import Sample
from .errors import HyperFlexisError

if TYPE_CHECKING:
    from .engines.torch.probe import Shape
    from .engines.torch.runner import Runner

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """The torch engine's own options, and how often each shape is run. The median of the ``rounds`` counts."""

    directory: Path
    device: str
    dtype: str | None
    threads: int
    max_batch: int
    max_batch_tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Live:
    """What was measured, and the instance's sizes as they turned out."""

    samples: tuple[Sample, ...]
    device_kind: str
    dtype: str
    kv_bytes_per_token: int
    weight_bytes: int
    kv_capacity_tokens: int
    context_length: int


def measure(config: LiveConfig, progress: Callable[[int], None]) -> Live:
    """Load the model and time ``rounds`` times each shape, in turns, so that a busy moment hits all of them alike.

    ``progress`` is called with the rounds done. Raises HyperFlexisError when torch is missing or the model does not
    load.
    """
    try:
        import torch

        from .engines.torch.engine import device_kind
        from .engines.torch.loader import find_device, load
        from .engines.torch.weights import num_parameters
    except ImportError as error:
        raise HyperFlexisError(f"engine torch needs {error.name}: pip install 'hyperflexis[torch]'") from error
    torch.set_num_threads(config.threads)
    device = find_device(config.device)
    runner = load(config.directory, device, config.dtype, None, BLOCK_SIZE, config.max_batch * 4096)
    model = runner.model
    kv_tokens = model.cache.num_blocks * BLOCK_SIZE
    context = min(model.config.context_length, kv_tokens)
    samples = _timed(runner, shapes(config.max_batch, config.max_batch_tokens, context, kv_tokens), config, progress)
    return Live(
        samples=samples,
        device_kind=device_kind(device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=model.config.kv_elements_per_token * model.dtype.itemsize,
        weight_bytes=num_parameters(model.config) * model.dtype.itemsize,
        kv_capacity_tokens=kv_tokens,
        context_length=context,
    )


def shapes(max_batch: int, max_batch_tokens: int, context_length: int, kv_tokens: int) -> list[Shape]:
    """Shapes on lines of chunk sizes, decodes and contexts, within the limits; prompts alone, decodes alone, both."""
    from .engines.torch.probe import Shape

    chunks = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n <= max_batch_tokens]
    batches = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= max_batch]
    wanted = [Shape(prefill=n) for n in chunks]
    wanted += [Shape(prefill=n, prefill_context=context) for n in (128, 512) for context in (512, 2048)]
    wanted += [Shape(n, context) for n in batches for context in (64, 256, 512, 1024, 2048)]
    wanted += [Shape(n, context, prefill) for n in (4, 16) for context in (64, 512) for prefill in (64, 256, 512)]
    return [
        s
        for s in wanted
        if s.decodes <= max_batch
        and s.prefill <= max_batch_tokens
        and max(s.decode_context + 1, s.prefill_context + s.prefill) <= context_length
        and s.decodes * (s.decode_context + BLOCK_SIZE) + s.prefill_context + s.prefill <= kv_tokens
    ]


def _timed(
    runner: Runner, wanted: list[Shape], config: LiveConfig, progress: Callable[[int], None]
) -> tuple[Sample, ...]:
    from .engines.torch.probe import work_of_shape

    works = [work_of_shape(runner, shape) for shape in wanted]
    seconds: list[list[float]] = [[] for _ in wanted]
    for work in works:
        runner.run(work)  # the first run of a shape allocates
    for done in range(1, config.rounds + 1):
        for work, times in zip(works, seconds, strict=True):
            start = time.perf_counter()
            runner.run(work)  # ends with the tokens on the host, so an accelerator's queue is drained
            times.append(time.perf_counter() - start)
        progress(done)
    return tuple(_sample(shape, median(times)) for shape, times in zip(wanted, seconds, strict=True))


def _sample(shape: Shape, seconds: float) -> Sample:
    lines = {"tokens": float(shape.prefill)} if shape.prefill else {}
    if shape.decodes:
        lines |= {"decodes": float(shape.decodes), "context": float(shape.decode_context)}
    return Sample(*shape.features(), seconds, lines)
