"""Placement by the fewest seconds of prompts to compute, whatever becomes late by it."""

from dataclasses import replace

from hyperflexis.policy.baselines.place import least_work
from hyperflexis.policy.catalog import POLICIES

POLICY = replace(POLICIES["hyperflexis"], place=least_work)
