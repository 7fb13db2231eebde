"""Nobody has to give way in overload but for what an instance's own queue shows; tenants have no fair shares."""

from dataclasses import replace

from hyperflexis.policy.catalog import POLICIES

POLICY = replace(POLICIES["hyperflexis"], fair=False)
