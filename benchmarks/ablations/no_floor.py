"""No share of each iteration for demoted requests that have waited long: they may starve."""

from math import inf

from benchmarks.ablations import altered

from hyperflexis.policy import place as placement
from hyperflexis.policy import step

swapped = altered(step, STARVING_S=inf)
place, plan, victim = placement.place, swapped.plan, swapped.victim
