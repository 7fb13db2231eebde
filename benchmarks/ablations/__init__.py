"""The policy with one part in its plain form, a file a part: what is lost is what the part is worth.

    python -m hyperflexis simulate WORKLOAD ... --policies hyperflexis,benchmarks/ablations/no_lead.py

from the repository's root. The shipped modules have no switches for this: ``altered`` makes a copy of one in which
something else stands for the swapped part.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

from hyperflexis.policy.catalog import POLICIES, STEPS, Policy, StepFunctions


def altered(module: ModuleType, **parts: Any) -> ModuleType:
    """A copy of ``module`` that finds ``parts`` under their names. The module itself stays as it is.

    Raises AttributeError for a name that it does not have: the part is gone or is called otherwise now.
    """
    assert module.__file__ is not None
    spec = spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    for name, part in parts.items():
        if not hasattr(copy, name):
            raise AttributeError(f"{module.__name__} has no {name}: this ablation swaps what is not there any more")
        setattr(copy, name, part)
    return copy


def stepping(name: str, step: ModuleType) -> Policy:
    """HyperFlexis with another ``policy/step.py``, which is known by ``name`` from now on."""
    STEPS[name] = StepFunctions(step.plan, step.victim)
    return replace(POLICIES["hyperflexis"], step=name)
