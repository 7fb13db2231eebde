"""docs/configuration.md, written from the fleet file's models so that it cannot say anything else."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .fleet import (
    ENGINE_ARGS,
    Device,
    Fleet,
    Instances,
    Launcher,
    LimitFields,
    Model,
    SloClassFields,
    SloFields,
    TenantFields,
)

SECTIONS: tuple[type[BaseModel], ...] = (
    Fleet,
    Model,
    Instances,
    *ENGINE_ARGS.values(),
    SloClassFields,
    TenantFields,
    SloFields,
    Device,
    Launcher,
    LimitFields,
)
HEAD = """\
# The fleet file

Written by `hyperflexis config-docs` from the program's own definitions; `make docs` writes it anew.

A fleet file is YAML. Keys that are unknown, or known but not built yet, are refused with their line. The shortest one:

```yaml
model: {name: tiny, path: models/tiny, engine: torch, instances: {min: 2}}
```
"""


def render() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *(line for section in SECTIONS for line in _section(section))])


def _section(section: type[BaseModel]) -> Iterator[str]:
    title, _, meaning = inspect.getdoc(section).partition(": ")  # type: ignore[union-attr]
    yield f"## {title if meaning else 'The top level'}\n"
    if meaning:
        yield f"{meaning[0].upper()}{meaning[1:].rstrip('.')}.\n"
    yield "| Key | Value | Default | Meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split())
        yield f"| `{name}` | {_type(field.annotation, field)} | {_default(field)} | {meaning} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "*required*"
    if field.default is None:
        return "–"
    return f"`{json.dumps(_plain(field.default), ensure_ascii=False)}`"


def _plain(value: object) -> object:
    match value:
        case BaseModel():
            return {key: _plain(inner) for key, inner in value if inner is not None}
        case list():
            return [_plain(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _type(annotation: object, field: FieldInfo | None = None) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(arg) for arg in args if arg is not type(None)))
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return f"mapping to {_type(args[1])}"
    words: dict[object, str] = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return words.get(annotation, "mapping")
