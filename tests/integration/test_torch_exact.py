"""Greedy fp32 output equals transformers' token for token, whatever the batch, chunks, prefix hits or preemptions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from hyperflexis.batcher import Batcher, BatcherConfig, Counters, Sampled
from hyperflexis.core.latency import Coefficients, OnlineFit
from hyperflexis.engines.torch.loader import load
from hyperflexis.engines.torch.runner import Runner, Stream
from hyperflexis.policy.catalog import STEPS, StepFunctions
from hyperflexis.sequences import Sequence
from hyperflexis.wire import Sampling

transformers = pytest.importorskip("transformers", reason="compares with Hugging Face transformers")

VOCAB = 512
NEW_TOKENS = 20
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    max_position_embeddings=512,
    initializer_range=0.2,
)
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], object]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2),
    "llama-scaled-biased-tied": lambda: transformers.LlamaConfig(
        **COMMON,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=SCALED,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, num_attention_heads=8, num_key_value_heads=2),
    "qwen3-tied": lambda: transformers.Qwen3Config(
        **COMMON, num_attention_heads=4, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True
    ),
}


@dataclass(frozen=True)
class Setup:
    """How the same requests are run. ``rounds`` > 1 sends them again, to find their prefixes."""

    block_size: int
    num_blocks: int
    max_batch: int
    max_batch_tokens: int
    rounds: int = 1
    prefix_reuse: bool = True


SETUPS = {
    "one at a time": Setup(16, 64, 1, 512, prefix_reuse=False),
    "all at once": Setup(16, 256, 16, 2048),
    "small chunks, odd blocks": Setup(7, 300, 16, 37),
    "prefixes found again": Setup(4, 600, 8, 128, rounds=2),
    "blocks of one token": Setup(1, 2048, 16, 64),
    "too little KV": Setup(8, 34, 12, 64),
}


def prompts() -> list[list[int]]:
    numbers = random.Random(7)
    shared = [numbers.randrange(VOCAB) for _ in range(70)]
    lengths = (1, 2, 15, 16, 17, 33, 64, 100, 150)
    apart = [[numbers.randrange(VOCAB) for _ in range(n)] for n in lengths]
    return apart + [shared + [numbers.randrange(VOCAB) for _ in range(n)] for n in (1, 5, 30)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[list[int]]]]:
    """A model's directory, and prompt and output of all prompts as transformers computes them."""

    @cache
    def make(name: str) -> tuple[Path, list[list[int]]]:
        directory = tmp_path_factory.mktemp("exact") / name
        torch.manual_seed(11)
        torch.set_num_threads(1)
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith((".bias", "norm.weight")):  # made as zeros and ones, which would hide a mistake
                torch.nn.init.normal_(parameter, mean=float(parameter_name.endswith("norm.weight")), std=0.2)
        model.save_pretrained(directory, max_shard_size="200KB")
        model.generation_config.eos_token_id = None
        outputs = []
        for ids in prompts():
            prompt = torch.tensor([ids])
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            outputs.append(output[0].tolist())
        return directory, outputs

    return make


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(
    expected: Callable[[str], tuple[Path, list[list[int]]]], name: str, setup: str, step: str
) -> None:
    directory, outputs = expected(name)
    chosen = SETUPS[setup]
    assert (directory / "model.safetensors.index.json").exists(), "more than one file is meant"
    runner = load(
        directory, torch.device("cpu"), None, chosen.num_blocks * chosen.block_size, chosen.block_size, 1 << 20
    )
    got, counters = run(runner, chosen, STEPS[step])
    for round_ in range(chosen.rounds):
        assert got[round_ * len(outputs) :][: len(outputs)] == outputs
    if step == "first_come":  # ours admits no more than the cache holds
        assert (counters.preemptions > 0) == (setup == "too little KV")
    if setup == "prefixes found again":
        assert counters.prefix_hit_tokens > 400
    assert len({tuple(tokens[-8:]) for tokens in outputs}) == len(outputs), "outputs that collapse prove nothing"


def run(runner: Runner, setup: Setup, step: StepFunctions) -> tuple[list[list[int]], Counters]:
    config = BatcherConfig(
        num_blocks=setup.num_blocks,
        block_size=setup.block_size,
        max_batch=setup.max_batch,
        max_batch_tokens=setup.max_batch_tokens,
        context_length=512,
        prefix_reuse=setup.prefix_reuse,
    )
    fit = OnlineFit(Coefficients(1e-3, 1e-5, 0.0, 1e-5, 0.0))
    batcher = Batcher(config, fit, step.plan, step.victim)
    clock = 0.0
    sequences = []
    for round_ in range(setup.rounds):
        for number, ids in enumerate(prompts()):
            stream = Stream(None, Sampling(temperature=0.0), 0, frozenset())
            seq = Sequence(f"{round_}/{number}", len(ids), NEW_TOKENS, list(ids), payload=stream)
            sequences.append(seq)
            batcher.add(seq, clock)
        while (batch := batcher.plan(clock)) is not None:
            drawn = runner.run(runner.work_of(batch))
            clock += 1e-3
            batcher.commit(batch, [Sampled(one.token_id) for one in drawn], clock, 1e-3)
    assert all(seq.finished for seq in sequences)
    return [seq.token_ids or [] for seq in sequences], batcher.counters
