"""Text to token ids and back: chat templates, tokenising, detokenising piece by piece, stop strings, prefix keys.

Everything here is free of I/O after loading and may run in any thread, one thread at a time for each object that
keeps state (``Detokenizer``, ``StopMatcher``).
"""

from __future__ import annotations

import codecs
import datetime
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..core.request import MAX_PREFIX_KEYS, PREFIX_KEY_TOKENS
from ..errors import HyperFlexisError
from ..openai_api import ApiError, Message

_BLOCK_BYTES = 4 * PREFIX_KEY_TOKENS
# How many prompt tokens a decoder sees first, so that the answer's first token keeps a leading space where the
# tokenizer drops that of a text's first word. Whole characters are at most four byte tokens long.
_TAIL_TOKENS = 6


class Detokenizer(Protocol):
    """Token ids of one stream in, whole characters out."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""

    def flush(self) -> str:
        """At the end: what was held back as part of a character, as replacement characters."""


class Text(Protocol):
    """A model's view of text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer. Raises ApiError when the template refuses it."""

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For one stream that goes on from ``prompt``."""

    def token(self, token_id: int) -> str:
        """One token by itself, for log-probabilities."""

    def vocab_size(self) -> int:
        """Token ids are below this."""


def load(directory: Path) -> Text:
    """A Hugging Face model directory's tokenizer and chat template. Raises HyperFlexisError naming the file."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise HyperFlexisError(f"no tokenizer at {file}: give a model directory that has a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise HyperFlexisError(f"cannot read {file}: {error}") from error
    # A file may ask for padding or truncation, which are of training.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TokenizerText(tokenizer, _load_template(directory))


class ByteText:
    """One token a byte, for engines without a tokenizer (the emulated one). Ids that are no byte give no text."""

    def encode(self, text: str) -> list[int]:
        """UTF-8."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The plain template."""
        return self.encode(_plain_template(messages))

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """UTF-8, by pieces."""
        return _ByteDetokenizer()

    def token(self, token_id: int) -> str:
        """The byte as a character."""
        return chr(token_id) if 32 <= token_id < 127 else "\N{REPLACEMENT CHARACTER}"

    def vocab_size(self) -> int:
        """All bytes."""
        return 256


class _ByteDetokenizer:
    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decode(bytes(t for t in token_ids if 32 <= t < 256 or t in (9, 10, 13)))

    def flush(self) -> str:
        return self._decode(b"", True)


class TokenizerText:
    """A tokenizer of Hugging Face's library and the model's chat template, None for the plain one."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts round a text."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Templates write their own special tokens; the plain one leaves them to the tokenizer."""
        if self._template is None:
            return self.encode(_plain_template(messages))
        ids: list[int] = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids
        return ids

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """Special tokens are hidden."""
        return _StreamDetokenizer(self._tokenizer, list(prompt[-_TAIL_TOKENS:]))

    def token(self, token_id: int) -> str:
        """With special tokens as they are written."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def vocab_size(self) -> int:
        """With added tokens."""
        size: int = self._tokenizer.get_vocab_size()
        return size


class _StreamDetokenizer:
    def __init__(self, tokenizer: Tokenizer, prompt_tail: list[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=prompt_tail, skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = [piece for token_id in token_ids if (piece := self._step(token_id))]
        return pieces[0] if len(pieces) == 1 else "".join(pieces)

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=True) if held else ""

    def _step(self, token_id: int) -> str | None:
        try:
            piece: str | None = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # tokenizers gives up on a stream whose bytes stop being UTF-8: it goes on in a new one.
            held = self.flush()
            self._stream = DecodeStream(skip_special_tokens=True)
            return held + (self._stream.step(self._tokenizer, token_id) or "")
        if piece is None:
            self._held.append(token_id)
        elif self._held:
            self._held.clear()
        return piece


class ChatTemplate:
    """A model's Jinja template, in a sandbox: it is data from a model's directory, not code of ours."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt. Raises ApiError when the template refuses the messages."""
        try:
            return self._template.render(
                messages=[_message(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            message = f"messages: the model's chat template does not take them: {error}"
            raise ApiError(400, message, param="messages") from error


def _load_template(directory: Path) -> ChatTemplate | None:
    settings: dict[str, Any] = {}
    file = directory / "tokenizer_config.json"
    if file.is_file():
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise HyperFlexisError(f"{file} is not JSON: {error}") from error
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        source, file = own_file.read_text(), own_file
    if not source:
        return None
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        if token is not None:
            special[name] = token["content"] if isinstance(token, dict) else token
    try:
        return ChatTemplate(source, special)
    except jinja2.TemplateError as error:
        raise HyperFlexisError(f"the chat template in {file} does not compile: {error}") from error


def _message(message: Message) -> dict[str, str]:
    # Templates of our engines' models know no "developer"; OpenAI means by it what "system" meant before.
    found = {"role": "system" if message.role == "developer" else message.role, "content": content_text(message)}
    if message.name is not None:
        found["name"] = message.name
    return found


def content_text(message: Message) -> str:
    """A message's text; parts are put on lines of their own."""
    content = message.content
    if isinstance(content, list):
        return "\n".join(part.text or "" for part in content)
    return content or ""


def _plain_template(messages: Sequence[Message]) -> str:
    return "".join(f"{message.role}: {content_text(message)}\n" for message in messages) + "assistant:"


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes <, > and &, which a prompt must not have.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class StopMatcher:
    """Finds stop strings across pieces of text. What might be the beginning of one is held back until it is known."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What can be sent, and whether a stop string was found behind it."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max(self._beginning(text, stop) for stop in self._stops)
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """At the end: what was held back turned out to be text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0


def prefix_keys(packed_ids: bytes, salt: str) -> tuple[int, ...]:
    """Chained 64-bit hashes of the first whole blocks of 256 token ids (packed u32), at most 64.

    Equal keys mean equal prompts up to there, for the same ``salt``.
    """
    key = blake2b(salt.encode(), digest_size=8).digest()
    keys = []
    for block in range(min(len(packed_ids) // _BLOCK_BYTES, MAX_PREFIX_KEYS)):
        at = block * _BLOCK_BYTES
        key = blake2b(packed_ids[at : at + _BLOCK_BYTES], key=key, digest_size=8).digest()
        keys.append(int.from_bytes(key, "little"))
    return tuple(keys)
