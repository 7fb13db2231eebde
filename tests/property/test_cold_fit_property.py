"""A fit from a guess: right soon, right again after a busy start, and no less right for steady work."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis.core.cold_fit import ColdFit
from hyperflexis.core.latency import Coefficients

GUESS = Coefficients(0.015, 5e-5, 2e-9, 5e-5, 5e-8, 0.5)
CPU = Coefficients(0.009, 4e-4, 2e-9, 8e-4, 1e-7)
GPU = Coefficients(0.0065, 2.5e-5, 1e-9, 2e-5, 6e-8)
DEVICES = st.sampled_from([CPU, GPU])
PROMPT, ALONE, TOGETHER = (512, 0.5 * 512**2, 0, 0), (0, 0.0, 1, 512), (0, 0.0, 16, 512)


class Server:
    """Its iterations take as long as ``true`` says, more or less."""

    def __init__(self, true: Coefficients, seed: int, noise: float) -> None:
        self.true, self.random, self.noise = true, random.Random(seed), noise
        self.decodes = 4
        self.fit = ColdFit(GUESS, 10.0, 1)

    def observe(self, row: tuple[float, float, float, float], busy: float = 1.0) -> None:
        self.fit.observe(*row, self.true.predict(*row) * busy * self.random.lognormvariate(0.0, self.noise))

    def work(self, iterations: int) -> None:
        for _ in range(iterations):
            self.decodes = min(max(self.decodes + self.random.choice((-1, 0, 1)), 1), 40)
            prompt = self.random.choice((0, 0, 0, 0, 300))
            self.observe((prompt, 0.5 * prompt**2, self.decodes, 300 * self.decodes))

    def error(self, *row: float) -> float:
        ratio = self.fit.coefficients.predict(*row) / self.true.predict(*row)
        return max(ratio, 1.0 / max(ratio, 1e-9))


@settings(max_examples=40)
@given(DEVICES, st.integers(0, 10_000))
def test_it_is_right_where_a_warm_up_looked(true: Coefficients, seed: int) -> None:
    server = Server(true, seed, 0.05)
    for row in (PROMPT, ALONE, TOGETHER):
        for _ in range(4):
            server.observe(row)
    for row in (PROMPT, ALONE, TOGETHER):
        assert server.error(*row) < 1.3, f"seed {seed}"


@settings(max_examples=40)
@given(DEVICES, st.floats(2.0, 10.0), st.integers(0, 10_000))
def test_a_start_on_a_busy_machine_is_forgotten(true: Coefficients, busy: float, seed: int) -> None:
    server = Server(true, seed, 0.2)
    for row in (PROMPT, ALONE, TOGETHER, *[ALONE] * 40):
        server.observe(row, busy)
    server.work(300)
    for decodes in (4, 10, 30):
        assert server.error(0, 0.0, decodes, 300 * decodes) < 2.0, f"seed {seed}"


@settings(max_examples=20)
@given(st.floats(0.5, 2.0), st.integers(0, 10_000))
def test_cheap_chunks_of_a_profile_stay_cheap(scale: float, seed: int) -> None:
    curve = ((0.0, 0.0), (256.0, 60.0), (512.0, 250.0))
    guess = replace(GPU, curve=curve)
    server = Server(replace(guess, c0=scale * GPU.c0, c1=scale * GPU.c1), seed, 0.05)
    server.fit = ColdFit(guess, 1.0, 1)
    server.work(400)
    fitted = server.fit.coefficients
    assert fitted.curve == curve
    for prompt in (64, 256, 300, 1024):
        assert server.error(prompt, 0.5 * prompt**2, 8, 2400) < 1.3, f"seed {seed}"


@settings(max_examples=10)
@given(st.floats(6.0, 12.0), st.integers(0, 10_000))
def test_a_curve_does_not_hide_prompts_of_a_far_faster_device(faster: float, seed: int) -> None:
    guess = replace(GPU, curve=((0.0, 0.0), (256.0, 60.0), (512.0, 250.0)))
    true = Coefficients(GPU.c0 / faster, GPU.c1 / faster, GPU.c2 / faster, GPU.c3 / faster, GPU.c4 / faster)
    server = Server(replace(true, curve=guess.curve), seed, 0.05)
    server.fit = ColdFit(guess, 1.0, 1)
    server.work(1000)
    assert server.error(300, 0.5 * 300**2, 8, 2400) < 1.5, f"seed {seed}"


@settings(max_examples=20)
@given(DEVICES, st.integers(0, 10_000))
def test_steady_decodes_leave_what_is_known_of_prompts(true: Coefficients, seed: int) -> None:
    server = Server(true, seed, 0.1)
    server.work(200)
    for _ in range(1000):
        server.observe((0, 0.0, 8, 4000))
    assert server.error(*PROMPT) < 1.3, f"seed {seed}"
    assert server.error(0, 0.0, 8, 4000) < 1.2, f"seed {seed}"


def test_one_slow_iteration_in_ten_is_no_slow_device() -> None:
    server = Server(CPU, 1, 0.1)
    server.work(200)
    for number in range(300):
        server.observe((0, 0.0, 8, 2400), 20.0 if number % 10 == 0 else 1.0)
    assert server.error(0, 0.0, 8, 2400) < 1.3


def test_a_few_that_are_far_too_fast_correct_it_at_once() -> None:
    server = Server(CPU, 1, 0.05)
    for _ in range(100):
        server.observe((0, 0.0, 8, 2400), 8.0)
    assert server.error(0, 0.0, 8, 2400) > 5.0
    for _ in range(5):
        server.observe((0, 0.0, 8, 2400))
    assert server.error(0, 0.0, 8, 2400) < 1.3


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_duration_is_ignored(seconds: float) -> None:
    fit = ColdFit(GUESS, 10.0, 1)
    fit.observe(0, 0.0, 8, 2400, seconds)
    assert fit.coefficients == GUESS
