"""Prompts get all the time that the decodes allow, also where smaller chunks cost less and are quick enough."""

from math import inf

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import step

swapped = altered(step, _thrifty_s=lambda *_: inf)
POLICY = stepping(__name__, swapped)
