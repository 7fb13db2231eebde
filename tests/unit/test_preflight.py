from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from hyperflexis import preflight
from hyperflexis.config import Fleet, read_fleet
from hyperflexis.errors import HyperFlexisError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
GIB = 1 << 30


def model_dir(directory: Path, weight_bytes: int) -> Path:
    path = directory / "m"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(weight_bytes)  # sparse: takes no disk
    return path


def fleet(directory: Path, args: str = "", extra: str = "") -> Fleet:
    file = directory / "fleet.yaml"
    file.write_text(
        f"model: {{name: big, engine: torch, path: m, instances: {{min: 2}}, args: {{{args}}}}}\n"
        f"listen: 127.0.0.1:0\n{extra}"
    )
    return read_fleet(file)


def test_too_little_memory_states_both_figures_and_the_remedy(tmp_path: Path) -> None:
    model_dir(tmp_path, 10 * GIB)
    with pytest.raises(HyperFlexisError) as caught:
        preflight.check_memory(fleet(tmp_path), available=20 * GIB)
    assert "needs about 20.78 GiB" in str(caught.value)  # 2 x (10 + 0.39 of the process)
    assert "20.00 GiB are available" in str(caught.value)
    assert "instances.min" in str(caught.value)
    preflight.check_memory(fleet(tmp_path), available=21 * GIB)


def test_instances_that_run_already_are_not_counted_again(tmp_path: Path) -> None:
    model_dir(tmp_path, 10 * GIB)
    with pytest.raises(HyperFlexisError, match="1 x big"):
        preflight.check_memory(fleet(tmp_path), 5 * GIB, {"big": 1})
    preflight.check_memory(fleet(tmp_path), 11 * GIB, {"big": 1})
    preflight.check_memory(fleet(tmp_path), 0, {"big": 2})


def test_another_dtype_and_the_kv_cache_count(tmp_path: Path) -> None:
    model_dir(tmp_path, 10 * GIB)
    preflight.check_memory(fleet(tmp_path, "dtype: bfloat16"), available=21 * GIB)
    with pytest.raises(HyperFlexisError, match=r"20\.00 GiB weights"):
        preflight.check_memory(fleet(tmp_path, "dtype: float32"), available=21 * GIB)
    # 2 layers x 2 KV heads x 16 x key and value x 2 bytes = 256 bytes a token
    with pytest.raises(HyperFlexisError, match=r"1\.00 GiB KV cache"):
        preflight.check_memory(fleet(tmp_path, f"kv_tokens: {GIB // 256}"), available=21 * GIB)


def test_a_shell_without_a_kv_cache_of_its_own_is_counted_without(tmp_path: Path) -> None:
    model_dir(tmp_path, 0)
    file = tmp_path / "fleet.yaml"
    text = (
        "model: {name: big, engine: torch, path: m, instances: {max: 2, standby: 3}, "
        f"args: {{kv_tokens: {10 * GIB // 256}, reserve_kv: RESERVE}}}}\n"
    )
    for reserve, gib in (("true", 50), ("false", 20)):
        file.write_text(text.replace("RESERVE", reserve))
        needed = gib * GIB + 5 * preflight.PROCESS_BYTES
        preflight.check_memory(read_fleet(file), needed)
        with pytest.raises(HyperFlexisError, match="5 x big"):
            preflight.check_memory(read_fleet(file), needed - 1)


def test_a_copy_in_the_hosts_memory_counts_also_of_a_model_on_a_device(tmp_path: Path) -> None:
    model_dir(tmp_path, 10 * GIB)
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "model: {name: big, engine: torch, path: m, instances: {max: 2}, args: {device: cuda}, host_copy: true}\n"
    )
    with pytest.raises(HyperFlexisError, match=r"a copy of big's weights \(10\.39 GiB.*remove host_copy"):
        preflight.check_memory(read_fleet(file), 10 * GIB)
    preflight.check_memory(read_fleet(file), 11 * GIB)
    preflight.check_memory(read_fleet(file), 0, kept={"big"})


def test_a_model_too_large_for_the_devices_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    model_dir(tmp_path, 10 * GIB)
    small = "devices: [{kind: gpu, count: 2, memory_gb: 8}]\n"
    with pytest.raises(HyperFlexisError, match=r"models\.big.*10\.00 GiB.*largest device"):
        preflight.check_memory(fleet(tmp_path, "device: cuda", small), available=None)
    preflight.check_memory(fleet(tmp_path, "device: cuda", small.replace("8", "24")), available=0)


def test_a_model_directory_without_weights_or_tokenizer_is_named(tmp_path: Path) -> None:
    path = model_dir(tmp_path, 10)
    preflight.check_models(fleet(tmp_path))
    (path / "model.safetensors").unlink()
    (path / "tokenizer.json").unlink()
    with pytest.raises(HyperFlexisError, match=r"models\.big\.path.*tokenizer\.json, \*\.safetensors"):
        preflight.check_models(fleet(tmp_path))


def test_this_machine_says_what_is_available() -> None:
    available = preflight.available_memory()
    assert available is None or 0 < available < 1 << 50


def test_port_zero_takes_a_free_one_and_a_taken_one_is_refused() -> None:
    port = preflight.find_port("127.0.0.1", 0)
    assert port > 0
    taken = socket.create_server(("127.0.0.1", port))
    with taken, pytest.raises(HyperFlexisError, match=f"port {port} on 127.0.0.1"):
        preflight.find_port("127.0.0.1", port)
    with pytest.raises(HyperFlexisError, match="not known"):
        preflight.find_port("no-such-host.invalid", 0)


def test_a_key_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("sk-1: a\n")
    file.chmod(0o644)
    assert "chmod 600" in (preflight.key_file_warning(file) or "")
    file.chmod(0o600)
    assert preflight.key_file_warning(file) is None
