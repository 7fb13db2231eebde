"""Late requests start as soon as they fit, however full the KV cache is."""

from benchmarks.ablations import altered

from hyperflexis.policy import place as placement
from hyperflexis.policy import step

swapped = altered(step, LATE_KV_SHARE=1.0)
place, plan, victim = placement.place, swapped.plan, swapped.victim
