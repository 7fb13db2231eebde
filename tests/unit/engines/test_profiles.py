from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hyperflexis.core.profile import REGIMES, profile_from_dict, profile_to_dict
from hyperflexis.engines.profiles import load_profile, save_profile, shipped_profiles
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
    assert 0.005 < profile.coefficients.decode_s(32, 32 * 1024) < 0.07
    # The device and what the scheduler plans with at first are of the same kind: a table may differ by its steps.
    for shape in ((0, 0.0, 64, 64 * 1024), (512, 131072.0, 0, 0), (1024, 524288.0, 32, 32 * 1024)):
        assert profile.iteration_s(*shape) == pytest.approx(profile.coefficients.predict(*shape), rel=0.15)


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_shipped_profile_s_error_is_stated_and_small(name: str) -> None:
    profile = load_profile(name)
    for regime in REGIMES:
        error, left_out = profile.mape[regime], profile.left_out_mape[regime]
        assert (error is None) == (left_out is None)
        if error is not None and left_out is not None:
            assert error <= left_out < (0.05 if regime == "decode" else 0.11)


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_the_documentation_states_the_errors_and_the_domain_of_the_file(name: str) -> None:
    profile = load_profile(name)

    def shown(errors: Mapping[str, float | None]) -> str:
        return " / ".join("-" if (e := errors[regime]) is None else f"{100 * e:.1f}" for regime in REGIMES) + " %"

    domain = profile.domain
    reach = f"{domain.prefill_tokens:,} prompt tokens, {domain.decodes} decodes, {domain.kv_tokens:,} KV tokens"
    page = (Path(__file__).parents[3] / "docs" / "profiles.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    assert row.split(" | ")[2:] == [shown(profile.mape), shown(profile.left_out_mape), f"{reach} |"]


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_shipped_price_and_start_say_where_they_are_from(name: str) -> None:
    profile = load_profile(name)
    assert (profile.price_per_hour is None) == (profile.price_source is None)
    assert profile.start is None or len(profile.start.source) > 40


def test_the_design_s_profiles_are_there() -> None:
    assert shipped_profiles().keys() == {
        "ascend-910b3",
        "h100-llama-3.1-8b",
        "a100-llama-3.1-8b",
        "h100-qwen3-32b-tp2",
        "h100-llama-2-70b-tp4",
        "a100-llama-2-70b-tp4",
    }


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_a_profile_comes_back_from_its_file_as_it_was(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    save_profile(profile, tmp_path / "copy.json")
    assert load_profile(str(tmp_path / "copy.json")) == profile
    assert (tmp_path / "copy.json").read_text() == shipped_profiles()[name].read_text()


def test_a_profile_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/p\.json cannot be written: No such file"):
        save_profile(load_profile("ascend-910b3"), tmp_path / "none" / "p.json")


def test_a_profile_is_read_from_a_path_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(valid() | {"name": "mine"}))
    assert load_profile(str(path)).name == "mine"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no profile is named 'h200'.*a100-llama-3.1-8b, ascend-910b3, h100"):
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
        ({"left_out_mape": {"prefill": -1, "decode": None, "mixed": None}}, "p: left_out_mape.prefill must be"),
        ({"price_source": None}, "p: price_source must be a text"),
        ({"start": {"process_s": 1}}, "p: start: 'engine_init_s' is missing"),
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


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        ({}, r"p: coefficients\.curve must be a list, not dict"),
        ([[0, 0], [128]], r"p: coefficients\.curve\[1\] must be a pair"),
        ([[1, 0], [128, 20]], r"p: coefficients\.curve must begin with \[0, 0\]"),
        ([[0, 0], [128, 20], [128, 30]], r"p: coefficients\.curve\[2\]: tokens must grow"),
        ([[0, 0], [128, 20], [256, 10]], r"p: coefficients\.curve\[2\]: .* must not fall"),
    ],
)
def test_a_wrong_curve_is_named(curve: object, says: str) -> None:
    data = valid()
    coefficients = data["coefficients"]
    assert isinstance(coefficients, dict)
    with pytest.raises(ConfigError, match=says):
        profile_from_dict(data | {"coefficients": coefficients | {"curve": curve}}, "p")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("decode", {"ms": [[1, 2]]}, r"p: table\.decode\.ms must have 5 entries"),
        ("decode", {"decodes": [2, 64, 64, 160, 254]}, r"p: table\.decode\.decodes must be a list of numbers"),
        ("decode", {"decodes": [0, 64, 128, 160, 254]}, r"p: table\.decode\.decodes must begin with at least 1"),
        ("decode", {"ms": [[15, 0], *[[15, 15]] * 4]}, r"p: table\.decode\.ms\[0\]\[1\] must be more than 0"),
        ("decode", {"ms": [[0.001, 15], *[[15, 15]] * 4]}, r"p: table\.decode: 1 decodes without context"),
        ("prompt", {"tokens": [1, 2, 3, 4, 5, 6, 7, 250]}, r"p: table\.prompt: the last of tokens must be more"),
        ("prompt", {"context": []}, r"p: table\.prompt\.context must be a list"),
    ],
)
def test_a_wrong_table_is_named(part: str, change: dict[str, object], says: str) -> None:
    data = profile_to_dict(load_profile("ascend-910b3"))
    data["table"][part] |= change
    with pytest.raises(ConfigError, match=says):
        profile_from_dict(data, "p")


def test_a_missing_field_is_named() -> None:
    data = valid()
    del data["weight_bytes"]
    with pytest.raises(ConfigError, match="'weight_bytes' is missing"):
        profile_from_dict(data, "p")
