"""Prompts get all the time that the decodes allow, also where smaller chunks cost less and are quick enough."""

from math import inf

from benchmarks.ablations import altered

from hyperflexis.policy import place as placement
from hyperflexis.policy import step

swapped = altered(step, _thrifty_s=lambda *_: inf)
place, plan, victim = placement.place, swapped.plan, swapped.victim
