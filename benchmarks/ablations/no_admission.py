"""Requests join the batch while there is a place and room in the KV cache, whatever becomes of the paces."""

from math import inf

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import budget, step

swapped = altered(step, budget=altered(budget, PACE_MARGIN=inf))
POLICY = stepping(__name__, swapped)
