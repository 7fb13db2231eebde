from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.engines.torch.attention_case import BLOCK, mixed_batch

from hyperflexis.engines.torch.attention import Span, plan_attention
from hyperflexis.engines.torch.cache import KvCache
from hyperflexis.engines.torch.config import ModelConfig, load_config


@pytest.fixture(scope="module")
def config(small_model: Path) -> ModelConfig:
    return replace(load_config(small_model), num_layers=2)


def test_every_kind_of_span_equals_dense_attention(config: ModelConfig) -> None:
    got, expected = mixed_batch(config, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_decodes_are_grouped_by_length_and_size(config: ModelConfig) -> None:
    cache = KvCache(config, 4, BLOCK, torch.float32, torch.device("cpu"))
    token_bytes = 2 * config.num_kv_heads * config.head_dim * 4
    long = (2 << 20) // token_bytes // 2  # two of these fill a group
    blocks = [0] * (long // BLOCK + 1)
    spans = [Span(n - 1, 1, blocks) for n in (long, long, long, 60, 50, 31, 20)]
    groups = plan_attention(spans, cache).decodes
    assert [(g.first, g.last, g.context) for g in groups] == [(0, 2, long), (2, 3, long), (3, 6, 60), (6, 7, 20)]
