"""Decodes keep nothing in hand against a slow iteration: a step may last until the tightest is due."""

from benchmarks.ablations import altered

from hyperflexis.policy import budget, step
from hyperflexis.policy import place as placement

swapped = altered(step, budget=altered(budget, LEAD=0.0, MAX_LEAD=0.0))
place, plan, victim = placement.place, swapped.plan, swapped.victim
