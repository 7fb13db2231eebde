from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hyperflexis.engines.torch.config import load_config
from hyperflexis.engines.torch.loader import find_device, load
from hyperflexis.engines.torch.model import rope_frequencies
from hyperflexis.errors import HyperFlexisError

CPU = torch.device("cpu")


def changed(model: Path, tmp_path: Path, **fields: object) -> Path:
    """A copy of ``model`` with other fields in config.json; None removes one."""
    copy = tmp_path / "changed"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


def test_config_has_sizes_and_end_of_text_ids(small_model: Path) -> None:
    config = load_config(small_model)
    assert (config.family, config.num_layers, config.num_kv_heads, config.context_length) == ("llama", 4, 2, 512)
    assert config.eos_token_ids == {1021, 1023}
    assert config.kv_elements_per_token == 2 * 4 * 2 * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": None}, "not supported"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_unsupported_config_names_the_field(
    small_model: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(HyperFlexisError, match=message):
        load_config(changed(small_model, tmp_path, **fields))


def test_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HyperFlexisError, match="make-model"):
        load_config(tmp_path / "nowhere")


def test_theta_and_scaling_are_found_under_their_old_and_new_names(small_model: Path, tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = changed(small_model, tmp_path / "a", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = changed(
        small_model,
        tmp_path / "b",
        rope_theta=None,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling},
    )
    assert load_config(old).rope == load_config(new).rope
    frequencies = rope_frequencies(load_config(old).rope, 32)
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    assert frequencies[0] == plain[0]  # turns often within 64 tokens: kept
    torch.testing.assert_close(frequencies[-1], plain[-1] / 8.0)  # turns less than once: stretched
    assert bool((frequencies[:-1] > frequencies[1:]).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 5}, r"9 tensors are missing, first model\.layers\.4"),
        ({"num_hidden_layers": 3}, r"9 tensors are not expected, first model\.layers\.3"),
        ({"intermediate_size": 128}, "gate_proj.weight has shape"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_weights_that_do_not_match_are_named(
    small_model: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(HyperFlexisError, match=message):
        load(changed(small_model, tmp_path, **fields), CPU, None, 512, 16, 512)


def test_truncated_weights_are_an_error_with_the_file(small_model: Path, tmp_path: Path) -> None:
    copy = changed(small_model, tmp_path)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(HyperFlexisError, match=r"model\.safetensors: cannot be read"):
        load(copy, CPU, None, 512, 16, 512)


def test_too_little_memory_is_told_before_anything_is_allocated(small_model: Path) -> None:
    with pytest.raises(HyperFlexisError, match=r"too little memory on cpu.* bytes are available; .*--kv-tokens"):
        load(small_model, CPU, None, 1 << 40, 16, 512)


def test_kv_cache_is_no_larger_than_can_be_used_and_context_no_longer_than_it(small_model: Path) -> None:
    runner = load(small_model, CPU, None, None, 16, 640)
    assert runner.model.cache.num_blocks == 40


def test_unknown_devices_are_refused() -> None:
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(HyperFlexisError, match="device"):
            find_device(name)


def test_bfloat16_runs_and_is_near_float32(small_model: Path) -> None:
    from hyperflexis.engines.torch.attention import Span

    logits = []
    for dtype in ("float32", "bfloat16"):
        model = load(small_model, CPU, dtype, 512, 16, 512).model
        ids = list(range(3, 43))
        logits.append(model.forward(model.prepare([Span(0, 40, [5, 1, 9])], ids, [39])))
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0.0 < error < 0.3
