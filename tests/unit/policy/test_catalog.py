"""The names that users write."""

from __future__ import annotations

import pytest

from hyperflexis.errors import ConfigError
from hyperflexis.policy.catalog import POLICIES, STEPS, find_policy, split_specs


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_found_by_its_name_and_has_a_step(name: str) -> None:
    policy = find_policy(name)
    assert policy.step in STEPS
    assert (policy.chunk, policy.fail_fast) == (None, name == "reject_at_door")
    assert find_policy(f"{name}@512").chunk == 512
    assert find_policy(f"{name}@512").place is policy.place


def test_a_margin_changes_what_is_admitted() -> None:
    policy = find_policy("reject_at_door@256,1.5")
    assert policy.chunk == 256 and policy.fail_fast
    assert policy.place.keywords == {"margin": 1.5}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("round_robbin", "did you mean round_robin"),
        ("quickest", r"no policy is named 'quickest' \(policies: hyperflexis, round_robin"),
        ("", "no policy is named ''"),
        ("edf@", "'edf@': '' is no number of tokens; write it as in edf@512"),
        ("edf@0", "'0' is no number of tokens"),
        ("edf@-5", "'-5' is no number of tokens"),
        ("edf@5e2", "'5e2' is no number of tokens"),
        ("edf@512,1.2", "only reject_at_door takes a margin; write edf@512"),
        ("reject_at_door@512,", "margin '' is no number above 0"),
        ("reject_at_door@512,0", "margin '0' is no number above 0"),
        ("reject_at_door@512,inf", "margin 'inf' is no number above 0"),
        ("reject_at_door@,1.2", "'' is no number of tokens"),
    ],
)
def test_what_is_no_policy_is_said_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        find_policy(spec)
    assert "\n" not in str(caught.value)


def test_lists_of_policies_keep_a_margin_with_its_policy() -> None:
    assert split_specs("edf,reject_at_door@512,1.2,hyperflexis@256,edf") == [
        "edf",
        "reject_at_door@512,1.2",
        "hyperflexis@256",
    ]
    assert split_specs("edf,./mine.py,2nd.py") == ["edf", "./mine.py", "2nd.py"]
