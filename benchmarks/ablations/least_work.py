"""Placement by the fewest seconds of prompts to compute, whatever becomes late by it."""

from hyperflexis.policy.baselines.place import least_work
from hyperflexis.policy.catalog import Policy

POLICY = Policy(least_work, "hyperflexis")
