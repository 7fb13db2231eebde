"""How near the torch engine is to the bare matrix products and attention of the same shapes, and where the rest goes.

    python benchmarks/engine.py                                     20M, fp32, one thread
    python benchmarks/engine.py --size 100m --threads 2
    python benchmarks/engine.py --device cuda --dtype bfloat16 --model DIR

Each case is a decode step of a batch, or a prompt of 512 tokens, driven through the real Batcher. The *roofline* of a
case is the time of its matrix products, each in the fastest of the layouts that PyTorch offers here, and of one
scaled_dot_product_attention a layer on keys and values that lie contiguous and unpadded. Engine and roofline are run
in turns, best of the rounds each, so that a busy machine slows both. The ratios are the result; times are of this
machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from common import RESULTS, environment, write_results
from hyperflexis.batcher import Batcher, BatcherConfig, Sampled
from hyperflexis.core.latency import Coefficients, OnlineFit
from hyperflexis.engines.torch.attention import attend
from hyperflexis.engines.torch.loader import find_device, load
from hyperflexis.engines.torch.model import Inputs, Linear, Model, can_pack
from hyperflexis.engines.torch.runner import Runner, Stream
from hyperflexis.engines.torch.sampler import sample
from hyperflexis.make_model import SIZES, Recipe, make_model
from hyperflexis.policy import step
from hyperflexis.sequences import Sequence
from hyperflexis.wire import Sampling

ROUNDS = 16
DECODE_CONTEXT = 256
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Case:
    name: str
    decodes: int = 0
    prefill: int = 0

    @property
    def rows(self) -> int:
        return self.decodes + self.prefill


CASES = [Case("decode_1", 1), Case("decode_8", 8), Case("decode_32", 32), Case("prefill_512", 0, PREFILL_TOKENS)]


class Clock:
    """Seconds of a call, with an accelerator's queue drained before and after."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def best(self, call: Callable[[], object], repeats: int = 8) -> float:
        call()
        times = []
        for _ in range(repeats):
            start = self.now()
            call()
            times.append(self.now() - start)
        return min(times)


class Drive:
    """One case through a Batcher of its own; ``step`` returns seconds by part."""

    def __init__(self, runner: Runner, case: Case, clock: Clock, seed: int, greedy: bool) -> None:
        self._runner, self._case, self._clock = runner, case, clock
        self._random = torch.Generator().manual_seed(seed)
        self._count = 0
        self._sampling = Sampling(temperature=0.0 if greedy else 1.0, max_tokens=1 << 20)
        cache = runner.model.cache
        config = BatcherConfig(
            cache.num_blocks, cache.block_size, 64, PREFILL_TOKENS, runner.model.config.context_length, False
        )
        self._batcher = Batcher(config, OnlineFit(Coefficients(1e-3, 1e-6, 0.0, 1e-6, 0.0)), step.plan, step.victim)
        for _ in range(case.decodes):
            self._add(DECODE_CONTEXT)
        while self._batcher.num_waiting:
            self.step()

    def step(self) -> dict[str, float]:
        clock, runner, batcher, model = self._clock, self._runner, self._batcher, self._runner.model
        if self._case.prefill:
            self._add(self._case.prefill)
        a = clock.now()
        batch = batcher.plan(a)
        assert batch is not None
        work = runner.work_of(batch)
        b = clock.now()
        inputs = model.prepare(work.spans, work.token_ids, work.sampling)
        c = clock.now()
        logits = model.forward(inputs)
        d = clock.now()
        drawn = sample(logits, work.draws)
        e = clock.now()
        emitted = batcher.commit(batch, [Sampled(t.token_id) for t in drawn], e, e - a)
        f = clock.now()
        if self._case.prefill:
            for one in emitted:
                batcher.cancel(one.seq.id)
        self.inputs, self.logits, self.draws = inputs, logits, work.draws
        return {"batcher": b - a + f - e, "prepare": c - b, "forward": d - c, "sampling": e - d}

    def _add(self, tokens: int) -> None:
        self._count += 1
        ids = torch.randint(self._runner.model.config.vocab_size, (tokens,), generator=self._random).tolist()
        stream = Stream(None, self._sampling, self._count, frozenset())
        self._batcher.add(Sequence(str(self._count), tokens, 1 << 20, ids, payload=stream), time.perf_counter())


class MatmulRoofline:
    """All matrix products of a step in the model's order, so that weights come from memory as they do in a step; each
    shape in the layout that is fastest for it here."""

    def __init__(self, linears: list[Linear], rows: list[int], clock: Clock) -> None:
        self._clock = clock
        inputs = [torch.randn(n, m.weight.shape[0]).to(m.weight) for m, n in zip(linears, rows, strict=True)]
        layouts = [
            [partial(torch.mm, x, m.weight) for m, x in zip(linears, inputs, strict=True)],
            [partial(functional.linear, x, m.weight.t().contiguous()) for m, x in zip(linears, inputs, strict=True)],
        ]
        if can_pack(linears[0].weight.dtype, linears[0].weight.device):
            packed = [packed_copy(m) for m in linears]
            layouts.append([partial(m, x) for m, x in zip(packed, inputs, strict=True)])
        shapes = [(*m.weight.shape, n) for m, n in zip(linears, rows, strict=True)]
        best: dict[tuple[int, ...], tuple[float, int]] = {}
        with torch.inference_mode():
            for number, calls in enumerate(layouts):
                seconds = [min(column) for column in zip(*(self._each(calls) for _ in range(4)), strict=True)]
                for shape in set(shapes):
                    mine = [s for s, other in zip(seconds, shapes, strict=True) if other == shape]
                    best[shape] = min(best.get(shape, (1e9, 0)), (sum(mine) / len(mine), number))
        self._calls = [layouts[best[shape][1]][i] for i, shape in enumerate(shapes)]

    def run(self) -> float:
        """Seconds of one pass."""
        with torch.inference_mode():
            start = self._clock.now()
            for call in self._calls:
                call()
            return self._clock.now() - start

    def _each(self, calls: list[Callable[[], Tensor]]) -> list[float]:
        times = [self._clock.now()]
        for call in calls:
            call()
            times.append(self._clock.now())
        return [b - a for a, b in pairwise(times)]


def packed_copy(linear: Linear) -> Linear:
    copy = Linear(linear.weight)
    copy.pack()
    copy._direct_rows = 0
    return copy


class AttentionRoofline:
    """One attention call a layer on contiguous, unpadded keys and values."""

    def __init__(self, model: Model, case: Case, clock: Clock) -> None:
        self._clock = clock
        config, like = model.config, model.weights.embedding
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        batch, tokens = (1, case.prefill) if case.prefill else (case.decodes, DECODE_CONTEXT)
        shape = (batch, kv_heads, tokens, dim)
        self._kv = [(torch.randn(shape).to(like), torch.randn(shape).to(like)) for _ in range(config.num_layers)]
        rows = (heads, tokens) if case.prefill else (kv_heads, heads // kv_heads)
        self._queries = torch.randn(batch, *rows, dim).to(like)
        self._causal = bool(case.prefill)

    def run(self) -> float:
        """Seconds of all layers."""
        causal = self._causal
        with torch.inference_mode():
            start = self._clock.now()
            for k, v in self._kv:
                functional.scaled_dot_product_attention(self._queries, k, v, is_causal=causal, enable_gqa=causal)
            return self._clock.now() - start


def forward_parts(model: Model, inputs: Inputs, rows: int, clock: Clock) -> dict[str, float]:
    """Seconds of the parts of a forward pass, each run alone for all layers on the case's own shapes."""
    config, weights, cache = model.config, model.weights, model.cache
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    like = weights.embedding
    x = torch.randn(rows, config.hidden_size).to(like)
    attended = torch.randn(rows, heads * dim).to(like)
    inner = torch.randn(rows, config.intermediate_size).to(like)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(like)
    gate_up = torch.randn(rows, 2 * config.intermediate_size).to(like)
    last = torch.randn(len(inputs.sampling), config.hidden_size).to(like)

    def linears() -> None:
        for layer in weights.layers:
            layer.qkv(x)
            layer.o(attended)
            layer.gate_up(x)
            layer.down(inner)
        weights.head(last)

    def norms() -> None:
        for layer in weights.layers:
            model._norm(x, layer.input_norm)
            model._norm(x, layer.mlp_norm)

    def rope() -> None:
        qk = qkv[:, : heads + kv_heads]
        for _ in weights.layers:
            torch.addcmul(qk.roll(dim // 2, -1).mul_(inputs.sin), qk, inputs.cos, out=qk)

    def swiglu_and_residual() -> None:
        for _ in weights.layers:
            gate, up = gate_up.chunk(2, -1)
            functional.silu(gate).mul_(up)
            x + x
            x + x

    def write() -> None:
        for i in range(config.num_layers):
            cache.write(i, inputs.slots, qkv[:, heads:])

    def gather() -> None:
        for i in range(config.num_layers):
            for group in inputs.attention.decodes:
                cache.gather(i, group.blocks, group.last - group.first, group.context)
            for span in inputs.attention.prefills:
                if span.blocks is not None:
                    cache.gather(i, span.blocks, 1, span.pieces[-1].context)

    def attention() -> None:
        for i in range(config.num_layers):
            attend(inputs.attention, cache, i, qkv)

    with torch.inference_mode():
        parts = {
            f.__name__: clock.best(f) for f in (linears, norms, rope, swiglu_and_residual, write, gather, attention)
        }
    parts["attention"] = max(parts["attention"] - parts["gather"], 0.0)
    return parts


def measure(runner: Runner, case: Case, clock: Clock, seed: int) -> dict[str, object]:
    model = runner.model
    drive = Drive(runner, case, clock, seed, greedy=True)
    linears = model.weights.linears()
    matmul = MatmulRoofline(linears, [case.rows] * (len(linears) - 1) + [max(case.decodes, 1)], clock)
    attention = AttentionRoofline(model, case, clock)
    for _ in range(3):
        drive.step()
    steps, matmul_s, attention_s = [], [], []
    for _ in range(ROUNDS):
        steps += [drive.step() for _ in range(6)]
        matmul_s += [matmul.run() for _ in range(2)]
        attention_s += [attention.run() for _ in range(2)]
    best = min(steps, key=lambda parts: sum(parts.values()))
    seconds = sum(best.values())
    roofline = min(matmul_s) + min(attention_s)
    parts = forward_parts(model, drive.inputs, case.rows, clock)
    breakdown = {"batcher": best["batcher"], "prepare": best["prepare"], "sampling": best["sampling"], **parts}
    # Dispatch from Python, and caches that a part run alone finds warm and in a step does not.
    breakdown["other"] = max(best["forward"] - sum(parts.values()), 0.0)
    seeded = Drive(runner, case, clock, seed, greedy=False)
    seeded.step()
    return {
        "tokens_per_s": round(case.rows / seconds, 1),
        "step_ms": round(1e3 * seconds, 3),
        "roofline_ms": round(1e3 * roofline, 3),
        "roofline_matmul_ms": round(1e3 * min(matmul_s), 3),
        "roofline_attention_ms": round(1e3 * min(attention_s), 3),
        "percent_of_roofline": round(100 * roofline / seconds, 1),
        "breakdown_percent": {name: round(100 * s / seconds, 1) for name, s in breakdown.items()},
        "sampling_at_temperature_1_ms": round(1e3 * clock.best(lambda: sample(seeded.logits, seeded.draws)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; default: a made one of --size")
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="default: the checkpoint's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or Path(scratch) / "model"
        if args.model is None:
            make_model(directory, Recipe(size=args.size, seed=args.seed))
        runner = load(directory, device, args.dtype, 32768, 16, 32768)
        clock = Clock(device)
        cases = {}
        for case in CASES:
            cases[case.name] = result = measure(runner, case, clock, args.seed)
            print(
                f"{case.name:12} {result['tokens_per_s']:>10} tok/s  step {result['step_ms']} ms  "
                f"roofline {result['roofline_ms']} ms  {result['percent_of_roofline']}%\n"
                f"             {result['breakdown_percent']}",
                flush=True,
            )
    report = {
        **environment(args.seed),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": args.threads,
        "model": args.model.resolve().name if args.model else args.size,
        "dtype": str(runner.model.dtype),
        "decode_context": DECODE_CONTEXT,
        "cases": cases,
    }
    write_results(args.json, report)


if __name__ == "__main__":
    main()
