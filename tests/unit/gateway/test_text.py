from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hyperflexis.errors import HyperFlexisError
from hyperflexis.gateway.text import ByteText, StopMatcher, Text, load, prefix_keys
from hyperflexis.openai_api import ApiError, ContentPart, Message
from hyperflexis.wire import pack_ids

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a quick brown fox and a lazy dog " * 10], trainer)
    return tokenizer


TOKENIZER = make_tokenizer()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def text(directory: Path) -> Text:
    return load(directory)


def test_the_models_own_template_writes_the_prompt(text: Text) -> None:
    parts = [ContentPart("text", "a quick"), ContentPart("text", "fox")]
    ids = text.encode_chat([Message("developer", " be brief "), Message("user", parts)])
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<s>[system]be brief\n[user]a quick\nfox\n[assistant]"
    assert ids[0] == TOKENIZER.token_to_id("<s>")


def test_a_template_may_refuse(text: Text) -> None:
    with pytest.raises(ApiError, match="no tools") as error:
        text.encode_chat([Message("tool", "x")])
    assert (error.value.status, error.value.param) == (400, "messages")


def test_a_template_is_kept_in_its_sandbox(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ApiError, match="unsafe"):
        load(directory).encode_chat([Message("user", "x")])


def test_a_template_file_wins_and_named_ones_have_a_default(directory: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "D{{ messages[0].content }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert TOKENIZER.decode(load(directory).encode_chat([Message("user", "x")])) == "Dx"
    (directory / "chat_template.jinja").write_text("F{{ messages[0].content }}")
    assert TOKENIZER.decode(load(directory).encode_chat([Message("user", "x")])) == "Fx"


def test_a_model_without_a_template_gets_the_plain_one(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    ids = load(directory).encode_chat([Message("user", "fox")])
    assert TOKENIZER.decode(ids) == "user: fox\nassistant:"


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("chat_template.jinja", "{% for", "chat_template.jinja"),
    ],
)
def test_a_broken_directory_is_named(directory: Path, file: str, content: str | None, named: str) -> None:
    path = directory / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(HyperFlexisError, match=named):
        load(directory)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.lists(st.integers(1, 5), min_size=1))
def test_pieces_of_any_text_join_to_the_text(written: str, sizes: list[int]) -> None:
    from hyperflexis.gateway.text import TokenizerText

    for text in (TokenizerText(TOKENIZER, None), ByteText()):
        expected = written
        if isinstance(text, ByteText):  # control characters are no text there
            expected = "".join(c for c in written if ord(c) >= 32 or c in "\t\n\r")
        elif TOKENIZER.decode(TOKENIZER.encode(written).ids) != written:
            continue  # the text names a special token
        ids = text.encode(written)
        detokenizer = text.detokenizer(text.encode("a fox"))
        out, at, turn = "", 0, 0
        while at < len(ids):
            size = sizes[turn % len(sizes)]
            piece = detokenizer.push(ids[at : at + size])
            assert "\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in written
            out += piece
            at, turn = at + size, turn + 1
        assert out + detokenizer.flush() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() + 5), max_size=40))
def test_any_ids_decode_without_an_error_and_hide_special_tokens(ids: list[int]) -> None:
    from hyperflexis.gateway.text import TokenizerText

    detokenizer = TokenizerText(TOKENIZER, None).detokenizer([])
    out = "".join(detokenizer.push([id]) for id in ids) + detokenizer.flush()
    assert "<s>" not in out
    assert len(out) >= len(TOKENIZER.decode(ids).replace("\N{REPLACEMENT CHARACTER}", ""))


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_stop_strings_are_found_wherever_pieces_end(text: str, stops: list[str], size: int) -> None:
    matcher = StopMatcher(stops)
    out, stopped = "", False
    for at in range(0, len(text), size):
        piece, stopped = matcher.push(text[at : at + size])
        out += piece
        if stopped:
            break
    else:
        out += matcher.flush()
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(found)
    if not found:
        assert out == text
    else:
        # In the piece that completes one, another may begin earlier; nothing of a found one is ever sent.
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go ST") == ("go ", False)
    assert matcher.push("AY S") == ("STAY ", False)
    assert matcher.push("o") == ("So", False)


def test_prefix_keys_are_chained_salted_and_bounded() -> None:
    ids = list(range(256 * 3 + 255))
    keys = prefix_keys(pack_ids(ids), "t")
    assert len(keys) == 3
    assert all(0 <= key < 1 << 64 for key in keys)
    assert prefix_keys(pack_ids(ids[:512]), "t") == keys[:2]
    changed = prefix_keys(pack_ids([ids[0] + 1, *ids[1:]]), "t")
    assert not set(changed) & set(keys)
    later = prefix_keys(pack_ids([*ids[:600], 1, *ids[601:]]), "t")
    assert later[:2] == keys[:2] and later[2] != keys[2]
    assert not set(prefix_keys(pack_ids(ids), "u")) & set(keys)
    assert len(prefix_keys(pack_ids([1] * 256 * 70), "t")) == 64
    assert prefix_keys(pack_ids(ids[:255]), "t") == ()
    # Pinned: prefixes computed by another release must still match.
    assert prefix_keys(pack_ids([0] * 256), "") == prefix_keys(bytes(1024), "")
