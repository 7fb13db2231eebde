import random
from dataclasses import replace
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.latency import Coefficients, OnlineFit, attention_of

coefficients = st.builds(
    Coefficients,
    c0=st.floats(1e-3, 5e-2),
    c1=st.floats(1e-6, 1e-3),
    c2=st.floats(0.0, 1e-7),
    c3=st.floats(0.0, 1e-3),
    c4=st.floats(0.0, 1e-6),
)


curves = st.lists(st.tuples(st.integers(1, 500), st.floats(0.0, 2.0)), max_size=5).map(
    lambda steps: (
        tuple(
            zip(
                accumulate((x for x, _ in steps), initial=0),
                accumulate((x * y for x, y in steps), initial=0.0),
                strict=True,
            )
        )
        if steps
        else ()
    )
)


@given(
    coefficients,
    curves,
    st.floats(1e-4, 1.0),
    st.integers(0, 30_000),
    st.integers(0, 64),
    st.integers(0, 50_000),
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 4000)), max_size=2),
)
def test_tokens_within_is_the_largest_that_fits(c, curve, seconds, context, decodes, kv_tokens, chunks):
    c = replace(c, curve=curve)
    kv_tokens = kv_tokens if decodes else 0
    used, attention = sum(n for n, _ in chunks), attention_of(chunks)

    def time_of(n):
        return c.predict(used + n, attention + attention_of([(n, context)]), decodes, kv_tokens)

    n = c.tokens_within(seconds, context, decodes, kv_tokens, used, attention)
    assert n == 0 or time_of(n) <= seconds * (1 + 1e-9)
    assert time_of(n + 2) > seconds * (1 - 1e-9)


@given(coefficients, curves, st.integers(1, 64), st.lists(st.floats(0.5, 2.0), min_size=1, max_size=200))
def test_many_decodes_at_once_teach_what_single_ones_do(c, curve, decodes, factors):
    one, many = OnlineFit(replace(c, curve=curve)), OnlineFit(replace(c, curve=curve))
    kv = [1000 * decodes + k * decodes for k in range(len(factors))]
    seconds = [factor * c.decode_s(decodes, tokens) for factor, tokens in zip(factors, kv, strict=True)]
    for tokens, second in zip(kv, seconds, strict=True):
        one.observe(0, 0.0, decodes, tokens, second)
    many.observe_decodes(decodes, kv[0], seconds)
    assert many.coefficients == one.coefficients


def _shapes(rng: random.Random, count: int):
    for _ in range(count):
        chunks = [(rng.randint(16, 512), rng.randint(0, 4000)) for _ in range(rng.randint(0, 2))]
        decodes = rng.randint(0, 40)
        if not chunks and not decodes:
            decodes = 1
        yield sum(n for n, _ in chunks), attention_of(chunks), decodes, decodes * rng.randint(50, 2000)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_fit_converges_from_a_wrong_profile(seed, f0, f1, f3):
    rng = random.Random(seed)
    true = Coefficients(0.012, 8e-5, 2e-9, 3e-4, 6e-8)
    fit = OnlineFit(Coefficients(true.c0 * f0, true.c1 * f1, true.c2, true.c3 * f3, true.c4))
    for row in _shapes(rng, 400):
        fit.observe(*row, seconds=true.predict(*row) * rng.uniform(0.97, 1.03))
    errors = [abs(fit.coefficients.predict(*row) / true.predict(*row) - 1) for row in _shapes(rng, 100)]
    assert sum(errors) / len(errors) < 0.05, f"seed {seed}"
    assert min(fit.coefficients.c0, fit.coefficients.c1, fit.coefficients.c2) >= 0.0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_steady_decode_does_not_destroy_what_was_learnt_of_prefill(seed):
    """The same row thousands of times must not wind the covariance up."""
    rng = random.Random(seed)
    true = Coefficients(0.012, 8e-5, 2e-9, 3e-4, 6e-8)
    fit = OnlineFit(true)
    for row in _shapes(rng, 200):
        fit.observe(*row, seconds=true.predict(*row))
    for _ in range(5000):
        fit.observe(0, 0.0, 8, 8000, seconds=true.predict(0, 0.0, 8, 8000) * rng.uniform(0.95, 1.05))
    prefill = (512, attention_of([(512, 0)]), 0, 0)
    assert abs(fit.coefficients.predict(*prefill) / true.predict(*prefill) - 1) < 0.15, f"seed {seed}"


def test_a_device_that_slows_down_is_followed():
    true = Coefficients(0.012, 8e-5, 2e-9, 3e-4, 6e-8)
    fit = OnlineFit(true)
    for row in _shapes(random.Random(3), 300):
        fit.observe(*row, seconds=2.0 * true.predict(*row))
    row = (256, attention_of([(256, 100)]), 4, 2000)
    assert 1.8 < fit.coefficients.predict(*row) / true.predict(*row) < 2.2


def test_q90_covers_nine_in_ten():
    rng = random.Random(5)
    true = Coefficients(0.012, 8e-5, 2e-9, 3e-4, 6e-8)
    fit = OnlineFit(true)
    over = 0
    for k, row in enumerate(_shapes(rng, 6000)):
        seconds = true.predict(*row) * rng.uniform(0.8, 1.2)
        if k >= 3000:
            c = fit.coefficients
            over += seconds > c.predict(*row) * (1 + c.q90)
        fit.observe(*row, seconds=seconds)
    assert 0.05 < over / 3000 < 0.16


def test_impossible_durations_are_ignored():
    fit = OnlineFit(Coefficients(0.01, 1e-4, 0.0, 1e-4, 0.0))
    before = fit.coefficients
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        fit.observe(100, 5000.0, 1, 10, seconds)
    assert fit.coefficients == before
