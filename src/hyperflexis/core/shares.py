"""Who has to give way when a model's requests are more work than its instances can do.

As long as all of it fits, nobody has. When it does not, each tenant is due what max-min fairness gives it: those who
ask for little get all of it, the others the same *level* of work per weight. Of its share a tenant makes the most when
it spends it on its cheapest requests, as the shedding fluid of sim/oracle.py does. So a request is *within the share*
when its price is at most the tenant's limit:

    cost    seconds of an instance that the request takes, with the part of c0 that its pace wastes (the oracle's cost)
    price   cost over value
    level   the L with  sum over tenants of min(asked, weight * L) = SHARED * instances, asked in seconds a second
    limit   the price up to which the tenant's latest requests, the cheapest first, are its share of the work; of those
            that cost just that, as many as the share has room for

A request beyond the share is not refused. It only counts for less than others when somebody has to wait, and is served
from what is left over. The instances decide from second to second who can be on time. What they cannot see is that the
work of the next minutes does not fit either: an expensive request with time to spare would only come to grief later.

Virtual token counters (Sheng et al., OSDI 2024, "Fairness in serving large language models") order a queue so that the
tenant with the least service is next. Here deadlines order the queue, and the counters say who has to give way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from math import inf
from operator import itemgetter

WINDOW_S = 20.0
"""Requests of so many seconds tell what is asked for. 60 s differs by little, but notices abuse later."""
MOST_REQUESTS = 2048
"""Requests of a tenant that are remembered; more than that in WINDOW_S, and the window is shorter."""
SHARED = 0.85
"""Share of the instances' time that is shared out in overload; the rest is for whoever is left over. In simulation with
0.7 / 0.8 / 0.85 / 0.9 / 1.0 / no limit 84 / 87 / 85 / 83 / 78 / 78% are on time (Ascend, Poisson, load 1.3)."""
PROTECTED = 0.55
"""The same where some tenants ask for less than the level: what the others have beyond it would make those wait."""
FULL = 1.0
"""Work over capacity up to which nobody has to give way."""
EXCESS_VALUE = 0.1
"""What a request beyond its tenant's share counts for. With 0.5 others lose too much, with 0.01 it finds no place in a
batch where there would be one."""
RENEW_EVERY = 16
"""The limits change once in so many requests."""


@dataclass(slots=True, eq=False)
class Account:
    """A tenant's latest requests, (time, price, cost in seconds), the sum of their costs, and its limit. Of those that
    cost just that the share ``at_limit`` is within it; ``owed`` counts what of it is still to be given."""

    weight: float = 1.0
    recent: list[tuple[float, float, float]] = field(default_factory=list)
    asked_s: float = 0.0
    limit: float = inf
    at_limit: float = 1.0
    owed: float = 0.0

    def add(self, price: float, cost_s: float, now: float) -> None:
        """One more request."""
        self.recent.append((now, price, cost_s))
        self.asked_s += cost_s

    def rate(self, now: float) -> float:
        """What is asked for, in instances. Forgets what is over."""
        recent = self.recent
        over = max(bisect_left(recent, (now - WINDOW_S,)), len(recent) - MOST_REQUESTS)
        span_s = WINDOW_S if len(recent) - over < MOST_REQUESTS else max(now - recent[over][0], 1e-3)
        self.asked_s -= sum(cost_s for _, _, cost_s in recent[:over])
        del recent[:over]
        return max(self.asked_s, 0.0) / span_s

    def renew(self, share: float) -> None:
        """Let the cheapest requests that are ``share`` of the work be within the share."""
        left_s = share * self.asked_s
        rows = sorted((price, cost_s) for _, price, cost_s in self.recent)
        for self.limit, same in groupby(rows, key=itemgetter(0)):
            costs_s = sum(cost_s for _, cost_s in same)
            if costs_s > left_s:
                self.at_limit = left_s / costs_s
                break
            left_s -= costs_s

    def is_within(self, price: float) -> bool:
        """True for a request of the share."""
        if price != self.limit:
            return price < self.limit
        self.owed += self.at_limit
        if self.owed < 1.0:
            return False
        self.owed -= 1.0
        return True


@dataclass(slots=True, eq=False)
class FairShares:
    """The tenants of one model."""

    accounts: dict[str, Account] = field(default_factory=dict)
    num_requests: int = 0

    def discount(
        self, tenant: str, weight: float, value: float, cost_s: float, num_instances: int, now: float
    ) -> float:
        """Count a request of positive ``weight`` and ``value`` that costs ``cost_s`` seconds of one of the instances.
        Returns what to multiply its value with: 1, or EXCESS_VALUE when it is beyond its tenant's share."""
        account = self.accounts.setdefault(tenant, Account())
        account.weight = weight
        price = cost_s / value
        account.add(price, cost_s, now)
        self.num_requests += 1
        if self.num_requests % RENEW_EVERY == 0:
            self._renew(num_instances, now)
        return 1.0 if account.is_within(price) else EXCESS_VALUE

    def _renew(self, num_instances: int, now: float) -> None:
        asked = {tenant: (account.rate(now), account.weight) for tenant, account in self.accounts.items()}
        level = _level(asked.values(), num_instances)
        for tenant, (rate, weight) in asked.items():
            account = self.accounts[tenant]
            if not account.recent:
                del self.accounts[tenant]
            elif rate <= weight * level:
                account.limit = inf
            else:
                account.renew(weight * level / rate)


def _level(asked: Collection[tuple[float, float]], num_instances: int) -> float:
    """The level for tenants that ask for ``(rate, weight)``; inf when nobody has to give way."""
    if sum(rate for rate, _ in asked) <= FULL * num_instances:
        return inf
    level = fair_level(asked, SHARED * num_instances)
    modest = [rate / weight for rate, weight in asked if rate <= weight * level]
    if not modest:
        return level
    return max(fair_level(asked, PROTECTED * num_instances), *modest)


def fair_level(asked: Iterable[tuple[float, float]], capacity: float) -> float:
    """The level of max-min fairness between tenants that ask for ``(amount, weight)`` and get ``capacity`` in all: each
    gets what it asks for or its weight times the level. inf when that is less than ``capacity``."""
    tenants = sorted((amount / weight, amount, weight) for amount, weight in asked)
    if sum(amount for _, amount, _ in tenants) <= capacity:
        return inf
    left, weights = capacity, sum(weight for _, _, weight in tenants)
    for per_weight, amount, weight in tenants:
        if per_weight * weights >= left:
            break
        left -= amount
        weights -= weight
    return left / weights
