"""Late requests start as soon as they fit, however full the KV cache is."""

from benchmarks.ablations import altered, stepping

from hyperflexis.policy import step

swapped = altered(step, LATE_KV_SHARE=1.0)
POLICY = stepping(__name__, swapped)
