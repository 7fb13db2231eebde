"""Requests join the batch while there is a place and room in the KV cache, whatever becomes of the paces."""

from math import inf

from benchmarks.ablations import altered

from hyperflexis.policy import budget, step
from hyperflexis.policy import place as placement

swapped = altered(step, budget=altered(budget, PACE_MARGIN=inf))
place, plan, victim = placement.place, swapped.plan, swapped.victim
