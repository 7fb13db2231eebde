from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperflexis.config import Fleet, read_api_keys, read_fleet
from hyperflexis.config import docs as config_docs
from hyperflexis.engines.profiles import shipped_profiles
from hyperflexis.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model: {name: tiny, engine: emulated, profile: h100-llama-3.1-8b}\n"
ENDPOINTS = "model: {name: a, engine: openai, endpoints: ['http://x:1', 'http://y:1']}\n"


def read(directory: Path, text: str) -> Fleet:
    file = directory / "fleet.yaml"
    file.write_text(text)
    return read_fleet(file)


REFUSED = {
    "unknown key": (MODEL + "polcy: hyperflexis\n", ["fleet.yaml:2: polcy", "unknown key", "did you mean 'policy'"]),
    "unknown key far down": (
        "model:\n  name: a\n  engine: emulated\n  profile: h100-llama-3.1-8b\n  instances:\n    mim: 2\n",
        ["fleet.yaml:6: models.a.instances.mim", "did you mean 'min'"],
    ),
    "key that stands too high": (MODEL + "mode: observe\n", ["fleet.yaml:2: mode", "did you mean 'models.NAME.mode'?"]),
    "unknown engine option": (
        "model: {name: a, engine: emulated, profile: h100-llama-3.1-8b,\n  args: {nose: 0.1}}\n",
        ["fleet.yaml:2: models.a.args.nose", "did you mean 'noise'"],
    ),
    "wrong type": (MODEL + "gateways: two\n", ["fleet.yaml:2: gateways", "integer", "'two'"]),
    "number in quotes": (MODEL + "gateways: '2'\n", ["fleet.yaml:2: gateways", "integer"]),
    "wrong type of option": (
        "model: {name: a, engine: emulated, profile: h100-llama-3.1-8b, args: {seed: x}}\n",
        ["fleet.yaml:1: models.a.args.seed", "integer"],
    ),
    "out of range": (
        MODEL + "classes:\n- {name: a, ttft_ms: 5}\n- {name: b, ttft_ms: -5}\n",
        ["fleet.yaml:4: classes.1.ttft_ms"],
    ),
    "not a number": (MODEL + "classes: [{name: a, ttft_ms: .nan}]\n", ["fleet.yaml:2: classes.0.ttft_ms"]),
    "unknown policy": (MODEL + "policy: fastest\n", ["fleet.yaml:2: policy", "round_robin"]),
    "bad chunk of a policy": (MODEL + "policy: edf@many\n", ["fleet.yaml:2: policy", "'many' is no number of tokens"]),
    "chunk for servers of their own": (
        "model: {name: a, engine: openai, endpoints: ['http://x:1']}\npolicy: edf@512\n",
        ["fleet.yaml:2: policy", "write edf"],
    ),
    "twice": (MODEL + "gateways: 1\ngateways: 2\n", ["fleet.yaml:3", "'gateways' stands here twice"]),
    "syntax": (MODEL + "gateways: [1\n", ["fleet.yaml:3", "not valid YAML"]),
    "no mapping": ("- 1\n", ["fleet.yaml:1", "mapping"]),
    "empty": ("", ["fleet.yaml:1", "mapping"]),
    "no model": ("gateways: 1\n", ["models", "missing"]),
    "both forms": (MODEL + "models: {}\n", ["fleet.yaml:1: model", "give one of them"]),
    "short form without a name": ("model: {engine: torch}\n", ["fleet.yaml:1: model", "name"]),
    "port as a number": (MODEL + "listen: 8080\n", ["fleet.yaml:2: listen", "8080"]),
    "port too large": (MODEL + "listen: 127.0.0.1:80800\n", ["fleet.yaml:2: listen", "65535"]),
    "class twice": (
        MODEL + "classes: [{name: a}, {name: a}]\n",
        ["fleet.yaml:2: classes", "two classes are named 'a'"],
    ),
    "unknown default class": (MODEL + "default_class: fast\n", ["default_class", "'fast'", "batch, interactive"]),
    "unknown class of a tier": (MODEL + "service_tiers: {flex: slow}\n", ["service_tiers.flex", "'slow'"]),
    "tenants without keys": (MODEL + "tenants: {a: {weight: 2}}\n", ["api_keys_file"]),
    "unknown profile": (
        "model: {name: a, engine: emulated,\n profile: h999}\n",
        ["fleet.yaml:2: models.a.profile", "h100-llama-3.1-8b"],
    ),
    "emulated without profile": ("model: {name: a, engine: emulated}\n", ["fleet.yaml:1: models.a", "profile"]),
    "torch without path": ("model: {name: a, engine: torch}\n", ["fleet.yaml:1: models.a", "make-model"]),
    "openai without endpoints": ("model: {name: a, engine: openai}\n", ["models.a", "endpoints"]),
    "endpoint that is no URL": (
        "model: {name: a, engine: openai, endpoints: [x]}\n",
        ["models.a.endpoints", "http://HOST:PORT"],
    ),
    "endpoint twice": ("model: {name: a, engine: openai, endpoints: ['http://x', 'http://x']}\n", ["listed twice"]),
    "endpoints of torch": (
        "model: {name: a, engine: torch, path: x, endpoints: ['http://x']}\n",
        ["endpoints", "openai"],
    ),
    "instances of endpoints": (
        ENDPOINTS.replace("]}", "], instances: {min: 3}}"),
        ["instances.min is 3 for 2 endpoints"],
    ),
    "wrong launcher": (ENDPOINTS + "launcher: {kind: local}\n", ["launcher local cannot serve models.a"]),
    "more instances than devices": (
        MODEL.replace("}", ", instances: {min: 3}}") + "devices: [{kind: cpu, count: 2}]\n",
        ["need 3 devices, of which there are 2"],
    ),
    "max below min": (
        MODEL.replace("}", ", instances: {min: 3, max: 2}}"),
        ["fleet.yaml:1: models.tiny.instances", "max (2) is less than min (3): raise max, or lower min"],
    ),
    "none at least and none at most": (
        MODEL.replace("}", ", instances: {min: 0}}"),
        ["fleet.yaml:1: models.tiny.instances", "set max"],
    ),
    "servers that are scaled": (
        ENDPOINTS.replace("]}", "], instances: {max: 4}}"),
        ["fleet.yaml:1: models.a", "instances.max and standby are for engines torch and emulated"],
    ),
    "vLLM that is scaled": (
        "model: {name: a, engine: vllm, path: m, instances: {max: 3}}",
        ["instances.max and standby are for engines torch and emulated", "not vllm"],
    ),
    "observing what is scaled": (
        MODEL.replace("}", ", mode: observe, instances: {standby: 1}}"),
        ["fleet.yaml:1: models.tiny: mode observe changes nothing", "remove instances.max and standby"],
    ),
    "a copy for instances that stay": (
        "model: {name: a, engine: torch, path: m, instances: {min: 2}, host_copy: true}",
        ["fleet.yaml:1: models.a", "host_copy is for engine torch, where instances come and go"],
    ),
    "a copy of no weights": (
        MODEL.replace("}", ", instances: {standby: 1}, host_copy: true}"),
        ["fleet.yaml:1: models.tiny", "host_copy is for engine torch"],
    ),
    "no KV for shells that there are not": (
        "model: {name: a, engine: torch, path: m, instances: {max: 2}, args: {reserve_kv: false}}",
        ["fleet.yaml:1: models.a", "args.reserve_kv is for shells that wait: set instances.standby"],
    ),
    "no KV for shells of others": (
        MODEL.replace("}", ", instances: {standby: 1}, args: {reserve_kv: false}}"),
        ["fleet.yaml:1: models.tiny.args.reserve_kv", "unknown key"],
    ),
    "unknown scaler": (MODEL + "scaler: magic\n", ["fleet.yaml:2: scaler", "no scaler is named 'magic'", "forecast"]),
    "numbers of a scaler": (
        MODEL + "scaler: fixed\n",
        ["fleet.yaml:2: scaler", "are not the numbers that fixed takes"],
    ),
    "disaggregated on one instance": (
        MODEL.replace("}", ", mode: disaggregated}"),
        ["fleet.yaml:1: models.tiny: mode disaggregated", "set instances.min to 2 or more"],
    ),
    "disaggregated servers": (
        ENDPOINTS.replace("]}", "], mode: disaggregated}"),
        ["fleet.yaml:1: models.a: mode disaggregated", "engine openai", "use colocated or observe"],
    ),
    "none left to decode": (
        MODEL.replace("}", ", mode: disaggregated, instances: {min: 3}, prefill: 3}"),
        ["fleet.yaml:1: models.tiny: prefill is 3 of 3 instances", "set it to 2 at most"],
    ),
    "prefill of a colocated model": (
        MODEL.replace("}", ", instances: {min: 2}, prefill: 1}"),
        ["fleet.yaml:1: models.tiny: prefill", "mode disaggregated, not colocated", "remove it"],
    ),
    "roles of a colocated model": (
        MODEL.replace("}", ", roles: static}"),
        ["fleet.yaml:1: models.tiny: roles", "mode disaggregated, not colocated", "remove it"],
    ),
    "no prefill at all": (
        MODEL.replace("}", ", mode: disaggregated, instances: {min: 2},\n prefill: 0}"),
        ["fleet.yaml:2: models.tiny.prefill"],
    ),
    "some disaggregated": (
        "models:\n  a: {engine: emulated, profile: h100-llama-3.1-8b}\n"
        "  b: {engine: emulated, profile: h100-llama-3.1-8b, mode: disaggregated, instances: {min: 2}}\n",
        ["some models are disaggregated and some are not", "a fleet of their own"],
    ),
    "prefill that differs": (
        "models:\n  a: {engine: emulated, profile: h100-llama-3.1-8b, mode: disaggregated, instances: {min: 3}}\n"
        "  b: {engine: emulated, profile: h100-llama-3.1-8b, mode: disaggregated, instances: {min: 3}, prefill: 1}\n",
        ["prefill differs between models"],
    ),
    "not built: weights": (MODEL + "weights: {}\n", ["fleet.yaml:2: weights", "not built yet"]),
    "not built: ray": (MODEL + "launcher: {kind: ray}\n", ["fleet.yaml:2: launcher.kind", "not built yet"]),
    "not built: prices": (
        MODEL + "devices: [{kind: a, count: 1, price_per_hour: 2}]\n",
        ["price_per_hour", "not built yet"],
    ),
    "modes that differ": (
        "models:\n  a: {engine: emulated, profile: h100-llama-3.1-8b}\n"
        "  b: {engine: emulated, profile: h100-llama-3.1-8b, mode: observe}\n",
        ["some models observe and some do not"],
    ),
    "alias into itself": ("model: &a\n  name: x\n  env: *a\n", ["fleet.yaml:", "alias"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_line_key_and_remedy(name: str, tmp_path: Path) -> None:
    text, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_named_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, MODEL + "zzz: 1\ngateways: x\naaa: 2\n")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3", "4"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml.*No such file"):
        read_fleet(tmp_path / "nothing.yaml")


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    fleet = read(tmp_path, "model: {name: tiny, engine: torch, path: m/tiny}\napi_keys_file: keys.yaml\n")
    assert fleet.models["tiny"].path == str(tmp_path / "m/tiny")
    assert fleet.state_dir == str(tmp_path / ".hyperflexis/fleet")
    assert fleet.api_keys_file == str(tmp_path / "keys.yaml")
    assert fleet.models["tiny"].num_instances == 1
    assert [c.name for c in fleet.classes] == ["interactive", "batch"]
    assert fleet.tiers["flex"] == "batch"
    assert not fleet.observe


def test_a_fleet_says_whether_it_hands_over(tmp_path: Path) -> None:
    fleet = read(tmp_path, MODEL)
    assert (fleet.disaggregated, fleet.prefill) == (False, 0)
    fleet = read(tmp_path, MODEL.replace("}", ", mode: disaggregated, instances: {min: 2}}"))
    assert (fleet.disaggregated, fleet.prefill, fleet.static_roles, fleet.observe) == (True, 0, False, False)
    fleet = read(tmp_path, MODEL.replace("}", ", mode: disaggregated, instances: {min: 2}, prefill: 1}"))
    assert (fleet.disaggregated, fleet.prefill) == (True, 1)


def test_short_and_long_form_are_the_same(tmp_path: Path) -> None:
    short = read(tmp_path, MODEL)
    long = read(tmp_path, "models: {tiny: {engine: emulated, profile: h100-llama-3.1-8b}}\n")
    assert short == long


def test_endpoints_make_one_instance_each(tmp_path: Path) -> None:
    assert read(tmp_path, ENDPOINTS).models["a"].num_instances == 2


def test_own_classes_have_no_tiers_of_the_default_classes(tmp_path: Path) -> None:
    assert read(tmp_path, MODEL + "classes: [{name: a}]\n").tiers == {}


def test_instances_come_and_go_where_they_may(tmp_path: Path) -> None:
    for words, scaled, least, most in (
        ("{min: 2}", False, 2, 2),
        ("{min: 2, max: 2}", False, 2, 2),
        ("{min: 0, max: 3}", True, 0, 3),
        ("{max: 3}", True, 1, 3),
        ("{min: 2, standby: 1}", True, 2, 2),
    ):
        instances = read(tmp_path, MODEL.replace("}", f", instances: {words}}}")).models["tiny"].instances
        assert (instances.scaled, instances.min, instances.most) == (scaled, least, most), words


def test_a_start_is_emulated_where_the_profile_knows_it(tmp_path: Path) -> None:
    profile = json.loads((shipped_profiles()["h100-llama-3.1-8b"]).read_text())
    del profile["start"]
    (tmp_path / "quick.json").write_text(json.dumps(profile))
    text = "model: {name: a, engine: emulated, profile: quick.json,\n  args: {start_scale: 0.1}}\n"
    with pytest.raises(
        ConfigError,
        match=r"fleet\.yaml:2: models\.a\.args\.start_scale: profile .*quick.json does not say .*: remove it",
    ):
        read(tmp_path, text)
    assert read(tmp_path, text.replace("0.1", "0")).models["a"].args == {"start_scale": 0}


def test_a_resolved_fleet_survives_its_json(tmp_path: Path) -> None:
    for text in (MODEL, ENDPOINTS, MODEL + "classes: [{name: a, ttft_ms: 5}]\n"):
        fleet = read(tmp_path, text)
        again = Fleet.model_validate_json(fleet.model_dump_json(exclude_unset=True))
        assert again == fleet
        assert again.tiers == fleet.tiers
        assert again.digest() == fleet.digest()


def test_merge_keys_and_aliases_of_yaml_work(tmp_path: Path) -> None:
    fleet = read(
        tmp_path,
        "models:\n  a: &a {engine: emulated, profile: h100-llama-3.1-8b, args: {seed: 1}}\n"
        "  b: {<<: *a, args: {seed: 2}}\n",
    )
    assert (fleet.models["a"].args, fleet.models["b"].args) == ({"seed": 1}, {"seed": 2})


def test_api_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("sk-1: a\nsk-2: b\n")
    assert read_api_keys(file) == {"sk-1": "a", "sk-2": "b"}
    file.write_text("sk-1: a\n12345: b\n")
    with pytest.raises(ConfigError, match=r"keys\.yaml:2") as caught:
        read_api_keys(file)
    assert "12345" not in str(caught.value), "a key is a secret"


def test_the_page_on_configuration_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == config_docs.render(), "run `make docs`"


@pytest.mark.parametrize("name", ["quickstart.yaml", "static.yaml", "observe.yaml"])
def test_examples_are_right(name: str) -> None:
    assert read_fleet(ROOT / "examples" / name).models
