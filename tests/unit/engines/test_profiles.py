from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperflexis.core.profile import profile_from_dict
from hyperflexis.engines.profiles import load_profile, shipped_profiles
from hyperflexis.errors import ConfigError


def valid() -> dict[str, object]:
    data: dict[str, object] = json.loads(shipped_profiles()["h100-llama-3.1-8b"].read_bytes())
    return data


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_shipped_profile_is_named_as_its_file_and_states_where_it_is_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert len(profile.source) > 40 and "commit" in profile.source
    assert profile.domain.contains(profile.domain.prefill_tokens, 1, 1)
    assert not profile.domain.contains(0, profile.domain.decodes + 1, 1)
    assert profile.coefficients.decode_s(32, 32 * 1024) < 0.05


def test_the_design_s_first_two_are_there() -> None:
    assert {"ascend-910b3", "h100-llama-3.1-8b"} <= shipped_profiles().keys()


def test_a_profile_is_read_from_a_path_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(valid() | {"name": "mine"}))
    assert load_profile(str(path)).name == "mine"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no profile is named 'h200'.*ascend-910b3, h100-llama-3.1-8b"):
        load_profile("h200")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read: No such file"):
        load_profile(str(tmp_path / "gone.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        load_profile(str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": ""}, "p: model must be a text"),
        ({"max_batch": 0}, "p: max_batch must be a whole number of at least 1, not 0"),
        ({"max_batch": True}, "p: max_batch must be a whole number"),
        ({"max_batch": 8.5}, "p: max_batch must be a whole number"),
        ({"colour": "red"}, "p: 'colour' is no field of it"),
        ({"mape": {"prefill": 0.1, "decode": 0.1}}, "p: mape: 'mixed' is missing"),
        ({"domain": []}, "p: domain: must be an object, not list"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profile_from_dict(valid() | change, "p")


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "1", None, True])
def test_a_coefficient_is_a_finite_number_of_at_least_zero(value: object) -> None:
    data = valid()
    coefficients = data["coefficients"]
    assert isinstance(coefficients, dict)
    with pytest.raises(ConfigError, match=r"p: coefficients\.c1 must be a finite number"):
        profile_from_dict(data | {"coefficients": coefficients | {"c1": value}}, "p")


def test_a_device_without_cost_is_refused() -> None:
    free = dict.fromkeys(("c0", "c1", "c2", "c3", "c4", "q90"), 0.0)
    with pytest.raises(ConfigError, match="would take no time"):
        profile_from_dict(valid() | {"coefficients": free}, "p")


def test_a_missing_field_is_named() -> None:
    data = valid()
    del data["weight_bytes"]
    with pytest.raises(ConfigError, match="'weight_bytes' is missing"):
        profile_from_dict(data, "p")
