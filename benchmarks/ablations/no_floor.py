"""No share of each iteration for demoted requests that have waited long: they may starve."""

from math import inf

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import step

swapped = altered(step, STARVING_S=inf)
POLICY = stepping(__name__, swapped)
