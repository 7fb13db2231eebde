"""Measured iterations from csv files, in the formats that public sources use.

A format is known by its columns; others are ignored. Shapes that were measured several times count once, with the
median of their times: else the shape that a source repeats most would decide the fit.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from .calibrate_fit import Sample
from .errors import ConfigError

UNMEASURED_MS = 200.0
"""The Ascend iteration table of vllm-ascend holds exactly this for all mixed iterations of chunks of 4,096 and 8,192,
where its prompts alone take 145 and 300 ms: a placeholder, not a measurement."""


class Row:
    """One line of the file. Reading a field that is no number of at least ``least`` raises ConfigError."""

    def __init__(self, where: str, fields: Mapping[str, str]) -> None:
        self._where, self._fields = where, fields

    def number(self, column: str, least: float = 0.0) -> float:
        """The number in ``column``."""
        text = self._fields.get(column) or ""
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not isfinite(value) or value < least:
            raise ConfigError(
                f"{self._where}: {column} is {text!r}, not a number of at least {least:g}; correct or remove the row"
            )
        return value

    def seconds(self, column: str) -> float:
        """Milliseconds in ``column``, which must be more than 0, as seconds."""
        return self.number(column, 1e-6) / 1e3


@dataclass(frozen=True, slots=True)
class Format:
    """A source's ``columns`` and how a row of it is read."""

    columns: tuple[str, ...]
    read: Callable[[Row], Sequence[Sample]]


def sample(prompts: float, prompt: float, decodes: float, context: float, seconds: float) -> Sample:
    """An iteration of ``prompts`` fresh prompts of ``prompt`` tokens and ``decodes`` of ``context`` tokens each."""
    tokens = prompts * prompt
    lines = {"tokens": tokens} if tokens else {}
    if decodes:
        lines |= {"decodes": decodes, "context": context}
    return Sample(tokens, 0.5 * tokens * prompt, decodes, decodes * context, seconds, lines)


def _ascend(row: Row) -> Sequence[Sample]:
    prompt, decodes = row.number("p_len"), row.number("d_num")
    seconds = row.seconds("cost")
    if prompt and decodes and row.number("chunk_size") >= 4096 and seconds == UNMEASURED_MS / 1e3:
        return ()
    one = sample(1.0 if prompt else 0.0, prompt, decodes, row.number("ctx_len"), seconds)
    # What is held fixed over a line of mixed iterations is all of their tokens.
    lines = {**one.lines, "tokens": prompt + decodes} if prompt else one.lines
    return (Sample(*one.shape, seconds, lines),)


def _composed(row: Row) -> Sequence[Sample]:
    prompt, decodes = row.number("prefill_tokens"), row.number("decode_batch")
    return (sample(1.0 if prompt else 0.0, prompt, decodes, row.number("ctx_per_req"), row.seconds("iter_ms")),)


def _splitwise(row: Row) -> Sequence[Sample]:
    prompt, batch = row.number("prompt_size", 1.0), row.number("batch_size", 1.0)
    prompt_s, token_s = row.seconds("prompt_time"), row.seconds("token_time")
    # Texts may end before token_size: how many tokens there were follows from the end-to-end time.
    generated = min(row.number("token_size", 1.0), max(row.seconds("e2e_time") - prompt_s, 0.0) / token_s)
    context = prompt + 0.5 * generated
    decode = Sample(0.0, 0.0, batch, batch * context, token_s, {"decodes": batch, "context": prompt})
    return sample(batch, prompt, 0.0, 0.0, prompt_s), decode


FORMATS = {
    "vllm-ascend": Format(("chunk_size", "p_len", "d_num", "ctx_len", "cost"), _ascend),
    "iterations": Format(("prefill_tokens", "decode_batch", "ctx_per_req", "iter_ms"), _composed),
    "splitwise": Format(
        ("prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "e2e_time"), _splitwise
    ),
}


def read_samples(path: Path, where: Mapping[str, str]) -> list[Sample]:
    """The iterations in the rows of ``path`` whose columns equal ``where``, each shape once.

    Raises ConfigError naming the file, the row and the remedy.
    """
    samples: list[Sample] = []
    chosen = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            read = _format(path, columns).read
            if unknown := sorted(where.keys() - set(columns)):
                raise ConfigError(f"{path}: no column {unknown[0]!r} to select by; it has {', '.join(columns)}")
            for fields in reader:
                if all((fields[column] or "").strip() == value for column, value in where.items()):
                    chosen += 1
                    samples += read(Row(f"{path}:{reader.line_num}", fields))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a csv file in UTF-8: {error}") from error
    if not chosen:
        asked = ", ".join(f"{column}={value}" for column, value in where.items())
        raise ConfigError(f"{path}: no row {f'has {asked}; check --where' if asked else 'below the header'}")
    return merged(samples)


def merged(samples: Sequence[Sample]) -> list[Sample]:
    """Each shape once, with the median of its times."""
    groups: dict[object, list[Sample]] = {}
    for one in samples:
        groups.setdefault((one.shape, tuple(one.lines.items())), []).append(one)
    return [Sample(*same[0].shape, median(one.seconds for one in same), same[0].lines) for same in groups.values()]


def _format(path: Path, columns: Sequence[str]) -> Format:
    for one in FORMATS.values():
        if set(one.columns) <= set(columns):
            return one
    known = "; or ".join(f"{', '.join(one.columns)} ({name})" for name, one in FORMATS.items())
    raise ConfigError(f"{path}:1: the columns {', '.join(columns) or '(none)'} are of no known format; needed: {known}")
