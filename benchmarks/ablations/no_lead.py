"""Decodes keep nothing in hand against a slow iteration: a step may last until the tightest is due."""

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import budget, step

swapped = altered(step, budget=altered(budget, LEAD=0.0, MAX_LEAD=0.0))
POLICY = stepping(__name__, swapped)
