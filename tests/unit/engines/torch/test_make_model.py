from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from hyperflexis.engines.torch.config import load_config
from hyperflexis.engines.torch.loader import load
from hyperflexis.engines.torch.weights import num_parameters
from hyperflexis.errors import HyperFlexisError
from hyperflexis.make_model import Recipe, add_arguments, main, make_model


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_shards_and_dtypes_load_whole(tmp_path: Path, family: str) -> None:
    import torch

    make_model(tmp_path / "m", Recipe("1m", family=family, seed=3, shards=3, dtype="bfloat16"))
    config = load_config(tmp_path / "m")
    assert (config.family, config.dtype) == (family, "bfloat16")
    weights = load(tmp_path / "m", torch.device("cpu"), "float32", 512, 16, 512).model.weights
    assert weights.head.weight.std() == pytest.approx(0.2, rel=0.02)
    assert bool((weights.norm == 1.0).all())
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3


def test_a_seed_gives_the_same_bytes_and_another_seed_other_weights(small_model: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "again", Recipe(size="1m", context=512))
    make_model(tmp_path / "other", Recipe(size="1m", context=512, seed=1))
    first, again, other = digest(small_model), digest(tmp_path / "again"), digest(tmp_path / "other")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors", "make_model.json"}


def test_sizes_are_what_they_say(tmp_path: Path) -> None:
    make_model(tmp_path / "m", Recipe(size="20m"))
    config = load_config(tmp_path / "m")
    assert num_parameters(config) == pytest.approx(20e6, rel=0.05)
    assert config.context_length == 8192


def test_tokenizer_gives_back_any_text_and_knows_its_special_tokens(small_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ünïcödé — 漢字 🙂'  # two  spaces\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    english = "the time of the people should be found in the house"
    assert len(tokenizer.encode(english).ids) <= 2 * len(english.split())
    config = load_config(small_model)
    assert tokenizer.get_vocab_size() == config.vocab_size
    ends = {tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert ends == config.eos_token_ids


def test_chat_template_renders_a_conversation(small_model: Path) -> None:
    import jinja2

    template = json.loads((small_model / "tokenizer_config.json").read_text())["chat_template"]
    text = jinja2.Template(template).render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_second_run_is_a_no_op_and_another_model_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m"
    assert run(str(target), "--size", "1m") == 0
    before = digest(target)
    assert run(str(target), "--size", "1m") == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(HyperFlexisError, match="other arguments"):
        run(str(target), "--size", "1m", "--seed", "2")
    assert digest(target) == before


def test_foreign_directories_and_bad_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(HyperFlexisError, match="no model made by this"):
        run(str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    for option, value in (
        ("--vocab", "1000"),
        ("--vocab", "64"),
        ("--context", "2"),
        ("--shards", "9"),
        ("--seed", "-1"),
    ):
        with pytest.raises(HyperFlexisError, match=option):
            run(str(tmp_path / "m"), "--size", "1m", option, value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
