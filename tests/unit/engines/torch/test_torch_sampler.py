from __future__ import annotations

import math

import pytest
import torch

from hyperflexis.engines.torch.sampler import Draw, sample, times
from hyperflexis.wire import Sampling

VOCAB = 3000


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tokens(table: torch.Tensor, sampling: Sampling, seeds: range, index: int = 5) -> list[int]:
    draws = [Draw(sampling, seed, index) for seed in seeds]
    return [drawn.token_id for drawn in sample(table.expand(len(draws), -1), draws)]


def test_greedy_takes_the_likeliest_whatever_the_filters() -> None:
    table = logits(rows=4)
    draws = [
        Draw(Sampling(temperature=0.0, top_p=p, top_k=k), 1, 1) for p, k in ((1.0, 0), (0.1, 0), (1.0, 5), (0.5, 2))
    ]
    assert [d.token_id for d in sample(table, draws)] == table.argmax(-1).tolist()


def test_times_are_exponential_and_differ_by_seed_index_and_token() -> None:
    seeds, indices = zip(*((seed, index) for seed in range(-10, 10) for index in range(20)), strict=True)
    ids = torch.arange(50, dtype=torch.int32)
    found = times(seeds, indices, ids)
    assert len(found.unique()) > 0.99 * found.numel()
    assert torch.isfinite(found).all() and (found > 0.0).all()
    for share in (0.1, 0.5, 0.9, 0.999):
        below = (found < -math.log1p(-share)).double().mean().item()
        assert below == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / found.numel()))
    some = times([3], [5], torch.tensor([[7, 2]], dtype=torch.int32))
    assert torch.equal(some, times([3], [5], ids)[:, [7, 2]])


def test_rounding_decides_hardly_any_draw() -> None:
    """Other batches change logits in the last digits."""
    table = torch.randn(1, 30_000, generator=torch.Generator().manual_seed(1))
    noisy = table * (1.0 + 1e-6 * torch.randn(table.shape, generator=torch.Generator().manual_seed(2)))
    draws = [Draw(Sampling(temperature=1.0, top_p=p), seed, 9) for seed in range(500) for p in (1.0, 0.95)]
    same = [
        a.token_id == b.token_id
        for a, b in zip(
            sample(table.expand(len(draws), -1), draws), sample(noisy.expand(len(draws), -1), draws), strict=True
        )
    ]
    assert sum(same) >= len(draws) - 1


def test_a_seeded_draw_is_the_same_alone_and_in_any_mixed_batch() -> None:
    table = logits(rows=6)
    kinds = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=0.0),
        Sampling(temperature=1.3, top_k=50),
        Sampling(temperature=1.0, top_k=2000, top_p=0.99),
        Sampling(temperature=2.0, top_p=0.999),
    ]
    draws = [Draw(kind, seed, 7) for seed, kind in enumerate(kinds)]
    together = [d.token_id for d in sample(table, draws)]
    alone = [sample(table[i : i + 1], [draw])[0].token_id for i, draw in enumerate(draws)]
    assert together == alone


def test_frequencies_follow_the_tempered_distribution() -> None:
    table = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    n = 4000
    got = tokens(table, Sampling(temperature=2.0), range(n))
    for token, p in enumerate((table[0] / 2.0).softmax(-1).tolist()):
        assert got.count(token) / n == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (1.0, 3), (0.8, 40), (0.0, 0), (0.98, 0)])
def test_only_allowed_tokens_come_and_all_of_a_small_set_do(top_p: float, top_k: int) -> None:
    table = logits(3)
    allowed = allowed_tokens(table[0], top_p, top_k)
    got = set(tokens(table, Sampling(temperature=1.0, top_p=top_p, top_k=top_k), range(600)))
    assert got <= allowed
    if len(allowed) <= 3:
        assert got == allowed


def test_top_p_wider_than_the_window_reaches_the_tail() -> None:
    flat = torch.zeros(1, VOCAB)  # every token equally likely: the nucleus of 0.9 has 2700 of them
    got = set(tokens(flat, Sampling(temperature=1.0, top_p=0.9), range(3000)))
    assert len(got) > 1500


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    table = logits(4)
    assert set(tokens(table, Sampling(temperature=1e-6), range(20))) == {int(table.argmax())}


def test_logprobs_are_natural_logs_of_the_unmodified_distribution() -> None:
    table = logits(5, rows=2)
    draws = [
        Draw(Sampling(temperature=0.5, top_k=4, logprobs=3), 9, 1),
        Draw(Sampling(temperature=0.0), 0, 1),
    ]
    first, second = sample(table, draws)
    assert second.logprob is None
    assert first.logprob is not None
    expected = table[0].log_softmax(-1)
    assert first.logprob.token_id == first.token_id
    assert first.logprob.logprob == pytest.approx(expected[first.token_id].item(), abs=1e-5)
    assert [i for i, _ in first.logprob.top] == expected.topk(3).indices.tolist()
    assert [p for _, p in first.logprob.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
    assert math.exp(first.logprob.top[0][1]) <= 1.0


def allowed_tokens(row: torch.Tensor, top_p: float, top_k: int) -> set[int]:
    """The definition, one token at a time."""
    probabilities = row.softmax(-1).double()
    order = probabilities.argsort(descending=True).tolist()[: top_k or None]
    whole = sum(probabilities[i].item() for i in order)
    kept: set[int] = set()
    mass = 0.0
    for i in order:
        if kept and mass >= top_p * whole * (1 - 1e-9):
            break
        kept.add(i)
        mass += probabilities[i].item()
    return kept
