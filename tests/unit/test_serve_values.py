"""What the fleet file says reaches the parts unchanged, in their units."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperflexis import serve, wire
from hyperflexis.config import Fleet, read_fleet
from hyperflexis.core.effects import Launch
from hyperflexis.core.links import Split
from hyperflexis.core.slo import Slo, SloClass
from hyperflexis.engines.profiles import load_profile
from hyperflexis.errors import ConfigError
from hyperflexis.make_model import Recipe, make_model

FLEET = """\
models:
  org/chat:
    engine: emulated
    profile: h100-llama-3.1-8b
    path: m
    args: {noise: 0.25}
    env: {A: b}
    instances: {min: 2}
  code: {engine: openai, endpoints: ["http://x:1"], api_key_env: KEY, args: {max_batch: 3}}
classes:
  - {name: fast, ttft_ms: 200, tpot_ms: 50, priority: 3, target: 0.9}
  - {name: slow, e2e_ms: 60000}
service_tiers: {flex: slow}
policy: least_loaded
listen: 0.0.0.0:81
gateways: 2
tenants:
  gold: {weight: 4, default_class: slow, allowed_classes: [slow], floor: {ttft_ms: 500}}
api_keys_file: keys.yaml
limits: {max_body_mb: 2, max_backlog_s: 30, shutdown_grace_s: 7}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    (tmp_path / "keys.yaml").write_text("sk-1: gold\nsk-2: other\n")
    (tmp_path / "fleet.yaml").write_text(FLEET)
    return read_fleet(tmp_path / "fleet.yaml")


def test_the_gateway_is_told(fleet: Fleet, tmp_path: Path) -> None:
    config = serve.gateway_config(fleet, tmp_path, 1)
    assert (config.id, config.host, config.port, config.reuse_port) == ("gateway-1", "0.0.0.0", 81, True)
    assert dict(config.models) == {"org/chat": tmp_path / "m", "code": None}
    fast = SloClass("fast", Slo(0.2, 0.05), 3.0, 0.9)
    assert config.classes == (fast, SloClass("slow", Slo(e2e_s=60.0)))
    assert config.default_class == "fast"
    assert config.service_tiers == {"flex": "slow"}
    gold, other = config.tenants
    assert (gold.name, gold.weight, gold.default_class, gold.floor) == ("gold", 4.0, "slow", Slo(0.5))
    assert gold.allowed_classes == {"slow"}
    assert (other.name, other.allowed_classes) == ("other", None)
    assert config.api_keys == {"sk-1": "gold", "sk-2": "other"}
    assert (config.limits.max_body_bytes, config.limits.shutdown_grace_s) == (2 << 20, 7.0)


def test_the_controller_is_told(fleet: Fleet, tmp_path: Path) -> None:
    server, controller = serve.server_config(fleet, tmp_path, 5)
    assert (server.term, server.fleet_digest) == (5, fleet.digest())
    assert (controller.models, controller.policy, controller.observe) == (("org/chat", "code"), "least_loaded", False)
    assert controller.max_backlog_s == 30.0


def test_the_instances_are_told(fleet: Fleet, tmp_path: Path) -> None:
    children = {child.name: child for child in serve.children(fleet, tmp_path)}
    assert set(children) == {"controller", "org-chat-0", "org-chat-1", "code-0", "gateway-0", "gateway-1"}
    command = " ".join(children["org-chat-1"].command(7))
    for words in ("--id org-chat-1", "--epoch 7", "--name org/chat", "--engine emulated", "--noise=0.25"):
        assert words in command
    assert "--step first_come" in command, "a baseline's instances run first come, first served"
    assert children["org-chat-1"].env == {"A": "b"}
    command = " ".join(children["code-0"].command(1))
    for words in ("--engine openai", "--url http://x:1", "--api-key-env KEY", "--max-batch=3"):
        assert words in command
    listens = [arg for child in children.values() for arg in child.command(1) if arg.startswith("unix:")]
    assert len(set(listens)) == 4, "three instances and the controller"


def test_two_instances_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(
        "models:\n  a/b: {engine: emulated, profile: h100-llama-3.1-8b}\n"
        "  a-b: {engine: emulated, profile: h100-llama-3.1-8b}\n"
    )
    with pytest.raises(ConfigError, match="'a-b-0': rename a model"):
        serve.children(read_fleet(tmp_path / "fleet.yaml"), tmp_path)


def test_the_tokens_that_a_policy_allows_reach_the_instances(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(
        "model: {name: a, engine: emulated, profile: h100-llama-3.1-8b, args: {max_batch_tokens: 4096}}\n"
        "policy: reject_at_door@512,1.2\n"
    )
    fleet = read_fleet(tmp_path / "fleet.yaml")
    (command,) = [" ".join(c.command(1)) for c in serve.children(fleet, tmp_path) if c.role == "instance"]
    assert "--step edf" in command
    assert "--max-batch-tokens=512" in command and "4096" not in command
    assert serve.server_config(fleet, tmp_path, 1)[1].policy == "reject_at_door@512,1.2"


def test_a_disaggregated_fleet_hands_over(fleet: Fleet, tmp_path: Path) -> None:
    colocated = serve.server_config(fleet, tmp_path, 1)[1]
    assert colocated.split is None
    assert not [arg for child in serve.children(fleet, tmp_path) for arg in child.command(1) if arg == "--kv-listen"]
    (tmp_path / "apart.yaml").write_text(
        "model: {name: a, engine: emulated, profile: h100-llama-3.1-8b, mode: disaggregated,\n"
        "  instances: {min: 3}, prefill: 2, roles: static}\n"
    )
    apart = read_fleet(tmp_path / "apart.yaml")
    controller = serve.server_config(apart, tmp_path, 1)[1]
    assert controller.split == Split(prefill=2, decode=1, adapt=False)
    commands = [child.command(1) for child in serve.children(apart, tmp_path) if child.role == "instance"]
    addresses = [command[command.index(flag) + 1] for command in commands for flag in ("--listen", "--kv-listen")]
    assert len(set(addresses)) == 6 and all(address.startswith("unix:") for address in addresses)


SCALED = """\
models:
  a/b:
    engine: emulated
    profile: h100-llama-3.1-8b
    args: {start_scale: 0.5, context_length: 9000}
    instances: {min: 0, max: 6, standby: 2}
  c: {engine: emulated, profile: h100-llama-3.1-8b, instances: {min: 2}}
classes: [{name: x, target: 0.9}, {name: y, target: 0.95}]
devices: [{kind: h100, count: 7}]
scaler: rate@3
limits: {reclaim_s: 20, start_wait_s: 50}
"""


def scaled(tmp_path: Path, text: str = SCALED) -> Fleet:
    (tmp_path / "scaled.yaml").write_text(text)
    return read_fleet(tmp_path / "scaled.yaml")


def test_the_controller_is_told_what_it_may_launch(tmp_path: Path) -> None:
    fleet = scaled(tmp_path)
    server, controller = serve.server_config(fleet, tmp_path, 1)
    assert server.models == {"a/b": wire.ModelStatus([], 9000, True, holds=True)}, "prompts can be checked without one"
    assert controller.scale is not None
    (one,) = controller.scale.models
    assert (controller.scale.devices, controller.scale.policy) == (5, "rate@3"), "c has two of the devices"
    assert (one.model, one.least, one.most, one.standby, one.target) == ("a/b", 0, 6, 2, 0.95)
    start = load_profile("h100-llama-3.1-8b").start
    assert start is not None
    assert one.start_s["disk"] - one.start_s["d2d"] == pytest.approx(0.5 * start.weights_s - one.start_s["standby"])
    assert serve.gateway_config(fleet, tmp_path, 0).limits.start_wait_s == 50.0
    assert (
        serve.server_config(
            scaled(tmp_path, SCALED.replace("max: 6, standby: 2", "max: 1").replace("min: 0", "min: 1")), tmp_path, 1
        )[1].scale
        is None
    )


def test_a_copy_of_the_weights_is_a_process_where_the_controller_says_it_is(tmp_path: Path) -> None:
    make_model(tmp_path / "m", Recipe(size="1m", context=512))
    text = "model: {name: a/b, engine: torch, path: m, args: {dtype: bfloat16}, instances: {max: 2}, host_copy: true}\n"
    fleet = scaled(tmp_path, text)
    copies = [child for child in serve.children(fleet, tmp_path) if child.role == "copy"]
    controller = serve.server_config(fleet, tmp_path, 1)[1]
    assert controller.scale is not None
    told = serve.copy_config(fleet, tmp_path, "a/b")
    assert [child.name for child in copies] == ["a-b-copy"] == [told.source.instance]
    assert controller.scale.models[0].copy == told.source
    assert (told.directory, told.dtype) == (tmp_path / "m", "bfloat16")
    assert copies[0].command(0)[-3:] == ["_copy", str(tmp_path), "a/b"]
    assert len(told.source.address.rpartition("/")[2]) < 20, "as socket_dir counts with"
    without = scaled(tmp_path, text.replace(", host_copy: true", ""))
    assert "copy" not in {child.role for child in serve.children(without, tmp_path)}
    scale = serve.server_config(without, tmp_path, 1)[1].scale
    assert scale is not None and scale.models[0].copy is None


def test_what_is_launched_begins_without_weights_and_can_hand_streams_over(tmp_path: Path) -> None:
    fleet = scaled(tmp_path)
    assert {child.name for child in serve.children(fleet, tmp_path)} == {"controller", "c-0", "c-1", "gateway-0"}
    orders = [Launch(f"a-b-{n}", "a/b", "disk", False, None, (), "") for n in (1, 2)]
    children = [serve.launched(fleet, tmp_path, order) for order in orders]
    assert [child.launch for child in children] == orders
    words = [child.command(7) for child in children]
    assert "--standby" in words[0] and " ".join(words[0]).count("--reclaim-s 20") == 1
    addresses = {command[command.index(flag) + 1] for command in words for flag in ("--listen", "--kv-listen")}
    assert len(addresses) == 4
    assert all(len(address.rpartition("/")[2]) < 20 for address in addresses), "as socket_dir counts with"
