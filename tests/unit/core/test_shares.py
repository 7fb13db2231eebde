from math import inf

import pytest

from hyperflexis.core.shares import EXCESS_VALUE, MOST_REQUESTS, RENEW_EVERY, SHARED, WINDOW_S, FairShares, fair_level

PER_S = 40
"""Requests of a tenant a second."""


def _play(rates: dict[str, float], seconds: int, shares: FairShares, start: float = 0.0) -> dict[str, float]:
    """The share of each tenant's work that counts in full, when it asks for ``rates`` instance seconds a second in
    requests of two sizes, as many of either."""
    full = dict.fromkeys(rates, 0.0)
    for k in range(PER_S * seconds):
        for tenant, rate in rates.items():
            cost_s = rate / PER_S * (0.5 if k % 2 else 1.5)
            if shares.discount(tenant, 1.0, 1.0, cost_s, 1, start + k / PER_S) == 1.0:
                full[tenant] += cost_s
    return {tenant: full[tenant] / (rate * seconds) for tenant, rate in rates.items()}


def test_nobody_has_to_give_way_while_all_of_it_fits() -> None:
    assert _play({"big": 0.8, "small": 0.1}, 100, FairShares()) == pytest.approx({"big": 1.0, "small": 1.0})


def test_the_expensive_give_way_to_the_cheap() -> None:
    shares = FairShares()
    _play({"only": 2.0}, 60, shares)
    assert _play({"only": 2.0}, 60, shares, 60.0)["only"] == pytest.approx(SHARED / 2.0, rel=0.02)
    assert shares.discount("only", 1.0, 1.0, 0.5 * 2.0 / PER_S, 1, 120.0) == 1.0, "the cheap half is within it"
    assert shares.discount("only", 1.0, 1.0, 2.0 * 2.0 / PER_S, 1, 120.0) == EXCESS_VALUE, "what costs more is not"


def test_a_dear_request_is_cheap_for_what_it_is_worth() -> None:
    shares = FairShares()
    _play({"only": 2.0}, 60, shares)
    assert shares.discount("only", 1.0, 1.0, 0.1, 1, 60.0) == EXCESS_VALUE
    assert shares.discount("only", 1.0, 4.0, 0.1, 1, 60.0) == 1.0


def test_who_asks_for_more_than_its_share_gives_way_and_the_other_does_not() -> None:
    shares = FairShares()
    _play({"steady": 0.2, "abuser": 0.2}, 60, shares)
    _play({"steady": 0.2, "abuser": 2.0}, 20, shares, 60.0)
    later = _play({"steady": 0.2, "abuser": 2.0}, 100, shares, 80.0)
    assert later["steady"] == pytest.approx(1.0)
    assert later["abuser"] < 0.3


def test_a_heavier_weight_has_a_larger_share() -> None:
    shares = FairShares()
    for k in range(PER_S * 60):
        for tenant, weight in (("light", 1.0), ("heavy", 3.0)):
            shares.discount(tenant, weight, 1.0, (1 + k % 10) * 1.0 / PER_S / 5.5, 1, k / PER_S)
    assert shares.accounts["heavy"].limit > shares.accounts["light"].limit > 0.0


def test_it_ends_with_the_overload_and_tenants_that_left_are_forgotten() -> None:
    shares = FairShares()
    _play({"steady": 0.1, "abuser": 5.0}, 60, shares)
    assert shares.accounts["abuser"].limit < inf
    _play({"steady": 0.1}, int(WINDOW_S) + 1, shares, 60.0)
    assert set(shares.accounts) == {"steady"}
    assert shares.discount("abuser", 1.0, 1.0, 0.5, 1, 90.0) == 1.0


def test_memory_is_bounded() -> None:
    shares = FairShares()
    for k in range(3 * MOST_REQUESTS):
        shares.discount("busy", 1.0, 1.0, 1e-3, 1, k * 1e-4)
    account = shares.accounts["busy"]
    assert MOST_REQUESTS <= len(account.recent) < MOST_REQUESTS + RENEW_EVERY
    assert account.asked_s == pytest.approx(len(account.recent) * 1e-3)
    assert account.limit < inf, "a thousand requests of a millisecond in a tenth of a second are ten instances' work"


def test_levels() -> None:
    assert fair_level([(1.0, 1.0), (2.0, 1.0)], 4.0) == inf
    assert fair_level([(1.0, 1.0), (9.0, 1.0)], 4.0) == 3.0, "what one does not need the other gets"
    assert fair_level([(9.0, 1.0), (9.0, 3.0)], 4.0) == 1.0, "by weight"
