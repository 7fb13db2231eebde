"""Policies from a user's own Python file, to be compared with the shipped ones.

The file defines functions with the signatures of `policy/`, one or both:

    place(now, tracked, ready, memory) -> (Placement, PlaceMemory)       PlacePolicy of policy/place.py
    plan(now, waiting, running, latency, limits) -> StepPlan             StepPolicy of policy/step.py

What it leaves out is `least_loaded`'s; beside ``plan``, ``victim(now, running)`` may say who is preempted. A file that
wants another shipped step or a limit on chunks defines ``POLICY = Policy(place, "first_come", chunk=512)`` instead.
"""

from __future__ import annotations

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import ConfigError
from .policy.catalog import POLICIES, STEPS, Policy, StepFunctions, find_policy

TOLD = "+lengths"
"""Behind a spec: the same policy, told each request's output length. Only a simulation can do that."""
_LENT = "least_loaded"


def load_policy(spec: str) -> tuple[str, Policy]:
    """The name and the policy of ``spec``: what ``find_policy`` understands, or the path of a file ending in ``.py``;
    either may be TOLD lengths.

    A file's policy enters the catalog of this process under the file's name, so that the controller finds it there.
    Raises ConfigError saying what is wrong with the spec or the file.
    """
    if spec.endswith(TOLD):
        name, policy = load_policy(spec.removesuffix(TOLD))
        return name + TOLD, policy
    if not spec.endswith(".py"):
        return spec, find_policy(spec)
    path = Path(spec)
    name = path.stem
    known = POLICIES.get(name)
    if known is not None and getattr(sys.modules.get(_module_name(path)), "__file__", None) != str(path.absolute()):
        raise ConfigError(f"{path}: a policy is named {name!r} already; rename the file")
    POLICIES[name] = _policy(path, _load(path))
    return name, POLICIES[name]


def _module_name(path: Path) -> str:
    return f"hyperflexis_policy_{path.stem}"


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"policy {path}: there is no such file")
    found = spec_from_file_location(_module_name(path), path)
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and pickle look a class's module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"policy {where(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _policy(path: Path, module: ModuleType) -> Policy:
    own = getattr(module, "POLICY", None)
    if own is not None:
        if not isinstance(own, Policy):
            raise ConfigError(f"policy {path}: POLICY is no hyperflexis.policy.catalog.Policy")
        if own.step not in STEPS:
            raise ConfigError(f"policy {path}: no step is named {own.step!r}; steps: {', '.join(STEPS)}")
        return own
    place, plan, victim = (getattr(module, name, None) for name in ("place", "plan", "victim"))
    if not (callable(place) or callable(plan)):
        raise ConfigError(f"policy {path} defines neither POLICY nor a function place or plan; see docs/simulator.md")
    lent = POLICIES[_LENT]
    step = lent.step
    if callable(plan):
        step = str(path)
        STEPS[step] = StepFunctions(plan, victim if callable(victim) else STEPS[lent.step].victim)
    return Policy(place if callable(place) else lent.place, step)


def where(error: BaseException, path: Path) -> str:
    """``path:line`` of the last line of the file at ``path`` that ``error`` went through, or only ``path``."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}"
    file = str(path.absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{path}:{lines[-1]}" if lines else str(path)
