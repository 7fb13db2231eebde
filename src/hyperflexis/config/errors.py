"""pydantic's findings in words: file, line, key, what is wrong, what to do."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .document import Document, Path

NOT_BUILT = {
    "weights": "transfer of weights between instances",
    "price_per_hour": "the price of devices",
    "labels": "labels of devices",
}
"""Known keys that nothing reads yet, and what they are for."""
MAX_SHOWN = 10


def describe(error: ValidationError, document: Document, root: type[BaseModel], prefix: Path = ()) -> str:
    """One line for each finding, at most ``MAX_SHOWN``. ``prefix`` is where ``root`` stands in the document."""
    found = sorted({_finding(one, document, root, prefix) for one in error.errors(include_url=False)})
    shown = [text for _, text in found[:MAX_SHOWN]]
    if len(found) > MAX_SHOWN:
        shown.append(f"... and {len(found) - MAX_SHOWN} more")
    return "\n".join(shown)


def _finding(error: ErrorDetails, document: Document, root: type[BaseModel], prefix: Path) -> tuple[int, str]:
    """Its line, by which findings are sorted, and its text."""
    inner = tuple(part for part in error["loc"] if part != "[key]")
    path = prefix + inner
    # A value that may be of several types gets a finding for each, with the type's name at the end of the path.
    while len(path) > len(prefix) and path not in document.lines and error["type"] != "missing":
        path = path[:-1]
    where = document.at(path)
    return document.line(path), f"{where}: {_problem(error, str(path[-1]) if path else '', inner, root)}"


def _problem(error: ErrorDetails, key: str, inner: Path, root: type[BaseModel]) -> str:
    match error["type"]:
        case "extra_forbidden":
            here = _model_at(root, inner[:-1])
            known = sorted(here.model_fields) if here is not None else []
            if key in NOT_BUILT:
                return f"{NOT_BUILT[key]} is not built yet; remove this key"
            close = list(_below(here, key)) or difflib.get_close_matches(key, known, n=1)
            guess = f"; did you mean {close[0]!r}?" if close else ""
            return f"unknown key{guess} (keys here: {', '.join(known)})"
        case "missing":
            return "is missing"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            return f"{error['input']!r} is not of the form {error['ctx']['pattern']}"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            given = error["input"]
            return f"{message}" + ("" if isinstance(given, dict | list) else f", not {given!r}")


def _model_at(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The section model at ``path`` below ``root``."""
    here: typing.Any = root
    for part in path:
        model = next(_models(here), None)
        if model is not None and part in model.model_fields:
            here = model.model_fields[str(part)].annotation
        # Otherwise the part is a list's index or a free name, and the annotation around it still names the model.
    return next(_models(here), None)


def _below(model: type[BaseModel] | None, key: str) -> Iterator[str]:
    """Where a key belongs that stands one level too high."""
    for name, field in model.model_fields.items() if model is not None else ():
        inner = next(_models(field.annotation), None)
        if inner is not None and key in inner.model_fields:
            several = typing.get_origin(field.annotation) in (dict, list)
            yield f"{name}.NAME.{key}" if several else f"{name}.{key}"


def _models(annotation: typing.Any) -> Iterator[type[BaseModel]]:
    """The section models named in a type, outermost first."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from _models(inner)
